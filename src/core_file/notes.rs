//! The notes of a core file: what debuggers know of a process beside its memory. Their order is the kernel's: a thread begins
//! with its `NT_PRSTATUS`, and the first thread's others follow that.

use std::io::{self, Write};

use object::LittleEndian as Le;
use object::elf::{
    ELF_NOTE_CORE, ELF_NOTE_LINUX, NT_AUXV, NT_FILE, NT_FPREGSET, NT_PRPSINFO, NT_PRSTATUS,
    NT_SIGINFO, NT_X86_XSTATE, NoteHeader64, NoteType,
};
use object::endian::U32;
use object::pod::bytes_of;
use pageferry_image::model::memory::Mapping;
use pageferry_image::model::shared::{Shared, shared};
use pageferry_image::model::signals::Pending;
use pageferry_image::model::task::{Process, Thread, Tree};
use pageferry_image::page::PAGE_SIZE;

/// Bytes of `struct elf_prstatus` of x86-64, `linux/elfcore.h`, and where its fields lie.
const STATUS_LEN: usize = 336;
const STATUS_PENDING: usize = 16;
const STATUS_MASK: usize = 24;
const STATUS_IDS: usize = 32;
const STATUS_REGISTERS: usize = 112;
const STATUS_HAS_FPU: usize = 328;

/// Bytes of `struct elf_prpsinfo` of x86-64, and where its fields lie.
const INFO_LEN: usize = 136;
const INFO_STATE_NAME: usize = 1;
const INFO_NICE: usize = 3;
const INFO_IDS: usize = 16;
const INFO_NAME: usize = 40;
const INFO_NAME_LEN: usize = 16;
const INFO_ARGUMENTS: usize = 56;
/// Bytes of an argument list that there is room for.
pub(super) const ARGUMENTS_LEN: usize = INFO_LEN - INFO_ARGUMENTS - 1;

/// Bytes of `struct user_fpregs_struct`, with which an xsave area begins.
const FPU_LEN: usize = 512;

/// Counts what is written to it.
#[derive(Debug, Default)]
pub(super) struct Length(pub(super) u64);

impl Write for Length {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes all notes of `process`, whose argument list begins with `arguments`.
///
/// # Errors
/// What `out` says.
pub(super) fn write(
    out: &mut dyn Write,
    tree: &Tree,
    process: &Process,
    arguments: &[u8],
) -> io::Result<()> {
    for (index, thread) in process.threads.iter().enumerate() {
        note(out, ELF_NOTE_CORE, NT_PRSTATUS, &status(process, thread))?;
        if index == 0 {
            note(
                out,
                ELF_NOTE_CORE,
                NT_PRPSINFO,
                &info(process, thread, arguments),
            )?;
        }
        // No signal ended it: this is the first of those that waited.
        let shared = if index == 0 {
            &process.pending[..]
        } else {
            &[]
        };
        if let Some(signal) = thread.pending.iter().chain(shared).next() {
            note(out, ELF_NOTE_CORE, NT_SIGINFO, &signal.siginfo)?;
        }
        if index == 0 {
            if let Some(space) = tree.space_of(process) {
                note(out, ELF_NOTE_CORE, NT_AUXV, &space.auxv)?;
            }
            files(out, tree, process)?;
        }
        let fpu = thread.xsave.get(..FPU_LEN).unwrap_or_default();
        note(out, ELF_NOTE_CORE, NT_FPREGSET, fpu)?;
        note(out, ELF_NOTE_LINUX, NT_X86_XSTATE, &thread.xsave)?;
    }
    Ok(())
}

/// `bytes` up to the next multiple of four.
fn padding(len: usize) -> &'static [u8] {
    &[0; 3][..len.next_multiple_of(4) - len]
}

/// What stands before the description of a note.
fn begin(out: &mut dyn Write, name: &[u8], kind: NoteType, len: usize) -> io::Result<()> {
    let name_len = name.len() + 1;
    let header = NoteHeader64::<Le> {
        n_namesz: U32::new(Le, u32::try_from(name_len).map_err(io::Error::other)?),
        n_descsz: U32::new(Le, u32::try_from(len).map_err(io::Error::other)?),
        n_type: U32::new(Le, kind),
    };
    out.write_all(bytes_of(&header))?;
    out.write_all(name)?;
    out.write_all(&[0])?;
    out.write_all(padding(name_len))
}

fn note(out: &mut dyn Write, name: &[u8], kind: NoteType, content: &[u8]) -> io::Result<()> {
    begin(out, name, kind, content.len())?;
    out.write_all(content)?;
    out.write_all(padding(content.len()))
}

fn put(record: &mut [u8], at: usize, bytes: &[u8]) {
    record[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The signals that wait, as the kernel's set of them.
fn set(pending: &[Pending]) -> u64 {
    pending.iter().fold(0, |set, signal| {
        let number = signal.siginfo.first().copied().unwrap_or(0);
        set | 1u64
            .checked_shl(u32::from(number).wrapping_sub(1))
            .unwrap_or(0)
    })
}

fn status(process: &Process, thread: &Thread) -> [u8; STATUS_LEN] {
    let mut record = [0; STATUS_LEN];
    put(
        &mut record,
        STATUS_PENDING,
        &set(&thread.pending).to_le_bytes(),
    );
    put(&mut record, STATUS_MASK, &thread.sigmask.to_le_bytes());
    let ids = [thread.tid, process.ppid, process.pgid, process.sid];
    put(&mut record, STATUS_IDS, &ids.map(i32::to_le_bytes).concat());
    put(&mut record, STATUS_REGISTERS, &thread.registers);
    put(&mut record, STATUS_HAS_FPU, &1i32.to_le_bytes());
    record
}

fn info(process: &Process, leader: &Thread, arguments: &[u8]) -> [u8; INFO_LEN] {
    let mut record = [0; INFO_LEN];
    // Its state is 0, running.
    record[INFO_STATE_NAME] = b'R';
    let nice = leader.scheduling.as_ref().map_or(0, |one| one.nice);
    // Between -20 and 19 by the rules of the model.
    record[INFO_NICE] = nice.to_le_bytes()[0];
    let (uid, gid) = leader
        .credentials
        .as_ref()
        .map_or((0, 0), |one| (one.ruid, one.rgid));
    let ids = [process.pid, process.ppid, process.pgid, process.sid];
    let ids = [
        [uid, gid].map(u32::to_le_bytes).concat(),
        ids.map(i32::to_le_bytes).concat(),
    ];
    put(&mut record, INFO_IDS, &ids.concat());
    let name = leader.comm.as_bytes();
    put(
        &mut record,
        INFO_NAME,
        &name[..name.len().min(INFO_NAME_LEN - 1)],
    );
    let arguments = &arguments[..arguments.len().min(ARGUMENTS_LEN)];
    // The last one ends with NUL, too.
    let arguments = arguments.strip_suffix(&[0]).unwrap_or(arguments);
    let text: Vec<u8> = arguments
        .iter()
        .map(|&byte| if byte == 0 { b' ' } else { byte })
        .collect();
    put(&mut record, INFO_ARGUMENTS, &text);
    record
}

/// The name of the file that is mapped, as `/proc/PID/maps` shows it.
fn file_name(tree: &Tree, mapping: &Mapping) -> Option<String> {
    if let Some(file) = &mapping.file {
        return Some(file.path.clone());
    }
    Some(match &Shared::find(&tree.shared, mapping.shared)?.kind {
        Some(shared::Kind::Memfd(memfd)) => format!("/memfd:{} (deleted)", memfd.name),
        Some(shared::Kind::Carried(file)) if file.deleted => format!("{} (deleted)", file.path),
        Some(shared::Kind::Carried(file)) => file.path.clone(),
        Some(shared::Kind::Segment(segment)) => format!("/SYSV{:08x} (deleted)", segment.key),
        Some(shared::Kind::Anonymous(_)) | None => "/dev/zero (deleted)".into(),
    })
}

/// `NT_FILE`: which file is mapped where. A count and the page size, then start, end and offset (in pages) of each mapping, then the
/// names.
fn files(out: &mut dyn Write, tree: &Tree, process: &Process) -> io::Result<()> {
    let named = || {
        let mappings = tree.space_of(process).into_iter();
        let mappings = mappings.flat_map(|space| &space.mappings);
        mappings.filter_map(|mapping| Some((mapping, file_name(tree, mapping)?)))
    };
    let (count, names_len) = named().fold((0, 0), |(count, len), (_, name)| {
        (count + 1, len + name.len() + 1)
    });
    let len = 16 + count * 24 + names_len;
    begin(out, ELF_NOTE_CORE, NT_FILE, len)?;
    for word in [count as u64, PAGE_SIZE] {
        out.write_all(&word.to_le_bytes())?;
    }
    for (mapping, _) in named() {
        for word in [mapping.start, mapping.end, mapping.offset / PAGE_SIZE] {
            out.write_all(&word.to_le_bytes())?;
        }
    }
    for (_, name) in named() {
        out.write_all(name.as_bytes())?;
        out.write_all(&[0])?;
    }
    out.write_all(padding(len))
}
