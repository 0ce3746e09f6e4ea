//! An ELF core file of one process of an image, as the kernel would have written it and debuggers open it.
//!
//! It holds what the image holds and reads no other file: an image may be anybody's, and what lies at the paths in it is not for
//! whoever gets the core. So pages of files that were never written to are left out, each stretch of them as a segment without
//! bytes, which debuggers take from the file that `NT_FILE` names. A page is what was dumped or not there, never zeros instead.
//!
//! Nothing here grows with memory: the page map is walked once to count, once for the headers and once for the bytes, and zeros
//! are holes in the file.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use object::LittleEndian as Le;
use object::elf::{
    ELFCLASS64, ELFDATA2LSB, ELFMAG, ELFOSABI_NONE, EM_X86_64, ET_CORE, EV_CURRENT, FileHeader64,
    Ident, PF_R, PF_W, PF_X, PN_XNUM, PT_LOAD, PT_NOTE, ProgramFlags, ProgramHeader64, ProgramType,
    SectionHeader64,
};
use object::endian::{U16, U32, U64};
use object::pod::bytes_of;
use pageferry_image::model::memory::{Kind, Mapping, Space};
use pageferry_image::model::shared::Shared;
use pageferry_image::model::task::Process;
use pageferry_image::page::{PAGE_SIZE, PageRange};
use pageferry_image::store::{self, Image, ObjectId, PageKind, PageRun, PageSource as _};

mod notes;

/// Bytes that are read and written at once.
const PIECE_LEN: u64 = 1 << 20;

/// Bits of `/proc/PID/coredump_filter`, see core(5).
const FILTER_ANON_PRIVATE: u32 = 1 << 0;
const FILTER_ANON_SHARED: u32 = 1 << 1;
const FILTER_FILE_SHARED: u32 = 1 << 3;
const MADV_DONTDUMP: u32 = 16;

const PROT_READ: u32 = 1;
const PROT_WRITE: u32 = 2;
const PROT_EXEC: u32 = 4;

/// Why there is no core file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The image has not this process.
    #[error("{} has no process {pid}: `pageferry inspect` lists those it has", path.display())]
    NoProcess {
        /// The image.
        path: PathBuf,
        /// Whose number was given.
        pid: i32,
    },
    /// It is a zombie in the image.
    #[error("process {pid} of {} had ended when it was dumped, and has no memory: name another", path.display())]
    Ended {
        /// The image.
        path: PathBuf,
        /// Which.
        pid: i32,
    },
    /// The name is taken.
    #[error("{} exists already, and is never overwritten: choose another name", path.display())]
    Exists {
        /// Which.
        path: PathBuf,
    },
    /// The file system says no.
    #[error("{}: cannot {what}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What it says.
        source: io::Error,
    },
    /// The image is damaged, or cannot be read.
    #[error(transparent)]
    Image(#[from] store::Error),
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Whose core it is.
    pub pid: i32,
    /// Its threads.
    pub thread_count: usize,
    /// Its stretches of memory.
    pub segment_count: u64,
    /// Bytes of the file, holes included.
    pub len: u64,
    /// Bytes of memory in it that are no holes.
    pub memory_len: u64,
}

/// Writes the core file of process `pid` of `image`, its root if `None`, to `path`, 0600: under a temporary name beside it, which
/// becomes its own when all is on the disk. With `is_all` it has what the program kept out of its core files, too.
///
/// # Errors
/// [`Error`]. Nothing is left then.
pub fn write(image: &Image, pid: Option<i32>, path: &Path, is_all: bool) -> Result<Written, Error> {
    let subject = Subject::find(image, pid, is_all)?;
    if path.symlink_metadata().is_ok() {
        return Err(Error::Exists {
            path: path.to_owned(),
        });
    }
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let failed = |what| {
        move |source| Error::Io {
            path: path.to_owned(),
            what,
            source,
        }
    };
    // 0600, and removed again if it does not come to the end.
    let unfinished = tempfile::Builder::new()
        .prefix(".unfinished-core-")
        .tempfile_in(folder)
        .map_err(failed("make a file beside it"))?;
    let written = subject.write(unfinished.as_file(), path)?;
    unfinished
        .as_file()
        .sync_all()
        .map_err(failed("write it"))?;
    unfinished
        .persist_noclobber(path)
        .map_err(|error| match error.error.kind() {
            io::ErrorKind::AlreadyExists => Error::Exists {
                path: path.to_owned(),
            },
            _ => failed("give the core file this name")(error.error),
        })?;
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(failed("make its name last"))?;
    Ok(written)
}

/// The process, and what of it is wanted.
struct Subject<'i> {
    image: &'i Image,
    process: &'i Process,
    /// Its memory, which may be another's too.
    memory: Option<&'i Space>,
    /// Whose pages those of that are.
    space: ObjectId,
    is_all: bool,
}

/// Neighbouring pages with the same protection, and where their bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    pages: PageRange,
    prot: u32,
    content: Content,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    /// They have no bytes here: they are a file's, or zeros that nobody ever wrote.
    Elsewhere,
    /// They are pages of an object of the image, from this offset in it on. Those without data are zeros.
    Pages { object: ObjectId, offset: u64 },
    /// They are the code that the kernel lends to every process.
    Vdso,
}

impl Segment {
    /// Bytes of it in the file.
    fn file_len(&self) -> u64 {
        match self.content {
            Content::Elsewhere => 0,
            Content::Pages { .. } | Content::Vdso => self.pages.byte_len(),
        }
    }
}

impl<'i> Subject<'i> {
    fn find(image: &'i Image, pid: Option<i32>, is_all: bool) -> Result<Self, Error> {
        let tree = image.tree();
        let path = || image.path().to_owned();
        let pid = pid.unwrap_or(image.header().pid);
        let Some(index) = tree.processes.iter().position(|one| one.pid == pid) else {
            return Err(if tree.zombies.iter().any(|zombie| zombie.pid == pid) {
                Error::Ended { path: path(), pid }
            } else {
                Error::NoProcess { path: path(), pid }
            });
        };
        let process = &tree.processes[index];
        let home = tree.processes.iter();
        let home = home
            .map(|one| one.pid)
            .position(|pid| pid == process.home());
        Ok(Self {
            image,
            process,
            memory: tree.space_of(process),
            space: ObjectId::space(home.unwrap_or(index)),
            is_all,
        })
    }

    /// Writes all of it to `file`, which is empty and will be called `path`.
    fn write(&self, file: &File, path: &Path) -> Result<Written, Error> {
        let failed = |source| Error::Io {
            path: path.to_owned(),
            what: "write it",
            source,
        };
        let mut segment_count = 0;
        self.segments(|_| {
            segment_count += 1;
            Ok(())
        })?;
        let arguments = self.arguments()?;
        let mut notes_len = notes::Length::default();
        let notes_of = |out: &mut dyn io::Write| {
            notes::write(out, self.image.tree(), self.process, &arguments)
        };
        notes_of(&mut notes_len).map_err(failed)?;
        let layout = Layout::new(segment_count, notes_len.0);

        let mut out = BufWriter::new(file);
        layout.begin(&mut out).map_err(failed)?;
        let mut offset = layout.memory_offset;
        self.segments(|segment| {
            out.write_all(bytes_of(&load(&segment, offset)))
                .map_err(failed)?;
            offset += segment.file_len();
            Ok(())
        })?;
        layout.end(&mut out).map_err(failed)?;
        notes_of(&mut out).map_err(failed)?;
        out.flush().map_err(failed)?;
        drop(out);

        // What is not written from here on is a hole.
        file.set_len(offset).map_err(failed)?;
        let (len, mut offset, mut memory_len) = (offset, layout.memory_offset, 0);
        let mut piece = Vec::new();
        self.segments(|segment| {
            memory_len += self.copy(&segment, file, offset, &mut piece, path)?;
            offset += segment.file_len();
            Ok(())
        })?;
        Ok(Written {
            pid: self.process.pid,
            thread_count: self.process.threads.len(),
            segment_count,
            len,
            memory_len,
        })
    }

    /// Hands on the stretches of its memory, ascending; the same each time.
    fn segments(&self, mut sink: impl FnMut(Segment) -> Result<(), Error>) -> Result<(), Error> {
        let tree = self.image.tree();
        let mappings = self.memory.iter().flat_map(|space| &space.mappings);
        for mapping in mappings {
            let pages = PageRange {
                start: mapping.start,
                end: mapping.end,
            };
            let prot = mapping.prot;
            let mut stretch = |pages, content| {
                sink(Segment {
                    pages,
                    prot,
                    content,
                })
            };
            let shared = Shared::find(&tree.shared, mapping.shared);
            let shared = shared.zip(usize::try_from(mapping.shared).ok());
            // Where in its object it begins, and where that ends in this mapping.
            let object = shared.map(|(shared, id)| {
                let len = shared.pages().end.saturating_sub(mapping.offset);
                let end = mapping.start.saturating_add(len).min(mapping.end);
                (ObjectId::shared(tree.processes.len(), id - 1), end)
            });
            match mapping.kind() {
                Kind::Vdso => stretch(pages, Content::Vdso)?,
                Kind::Anon if self.wants(mapping) => {
                    // The kernel leaves out what was never touched, too: reservations are larger than any file may be.
                    let content = if self.is_touched(pages)? {
                        Content::Pages {
                            object: self.space,
                            offset: pages.start,
                        }
                    } else {
                        Content::Elsewhere
                    };
                    stretch(pages, content)?;
                }
                // Always: a debugger would take the file's pages for those that were written to.
                Kind::FilePrivate => {
                    self.written(pages, |part, is_written| {
                        let own = Content::Pages {
                            object: self.space,
                            offset: part.start,
                        };
                        match object {
                            _ if is_written => stretch(part, own),
                            Some((object, end)) => {
                                let offset = mapping.offset + (part.start - mapping.start);
                                let content = Content::Pages { object, offset };
                                before(part, end).map_or(Ok(()), |part| stretch(part, content))
                            }
                            None => stretch(part, Content::Elsewhere),
                        }
                    })?;
                }
                Kind::FileShared => stretch(pages, Content::Elsewhere)?,
                Kind::Shared if self.wants(mapping) => {
                    let (object, end) = object.unwrap_or((self.space, pages.start));
                    let content = Content::Pages {
                        object,
                        offset: mapping.offset,
                    };
                    // A program that touches what is behind the end gets SIGBUS.
                    before(pages, end).map_or(Ok(()), |part| stretch(part, content))?;
                }
                // Not told at all: debuggers read what has no bytes and is no file's as zeros.
                Kind::Anon | Kind::Shared | Kind::Vvar | Kind::Invalid => {}
            }
        }
        Ok(())
    }

    /// Whether the program has this mapping in its core files.
    fn wants(&self, mapping: &Mapping) -> bool {
        if self.is_all {
            return true;
        }
        let bit = match mapping.kind() {
            Kind::Shared => {
                let shared = Shared::find(&self.image.tree().shared, mapping.shared);
                match shared.and_then(Shared::new_path) {
                    Some(_) => FILTER_FILE_SHARED,
                    None => FILTER_ANON_SHARED,
                }
            }
            _ => FILTER_ANON_PRIVATE,
        };
        self.process.coredump_filter & bit != 0 && !mapping.advice.contains(&MADV_DONTDUMP)
    }

    /// Hands on the runs of pages of `object` in `pages`, ascending, until `each` says that it has enough.
    fn runs(
        &self,
        object: ObjectId,
        pages: PageRange,
        mut each: impl FnMut(PageRun) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        let mut at = pages.start;
        while at < pages.end {
            let left = PageRange {
                start: at,
                end: pages.end,
            };
            for run in self.image.runs(object, left)? {
                at = run.range.end;
                if !each(run)? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Whether any page in this part of its address space was ever there.
    fn is_touched(&self, pages: PageRange) -> Result<bool, Error> {
        let mut found = false;
        self.runs(self.space, pages, |run| {
            found = is_own(&run);
            Ok(!found)
        })?;
        Ok(found)
    }

    /// Hands on the stretches of a private mapping of a file that are the program's own, because it wrote to them, and those that
    /// are the file's.
    fn written(
        &self,
        pages: PageRange,
        mut sink: impl FnMut(PageRange, bool) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut open: Option<(PageRange, bool)> = None;
        self.runs(self.space, pages, |run| {
            let is_own = is_own(&run);
            match &mut open {
                Some((stretch, is_written)) if *is_written == is_own => {
                    stretch.end = run.range.end;
                }
                _ => {
                    if let Some((stretch, is_written)) = open.replace((run.range, is_own)) {
                        sink(stretch, is_written)?;
                    }
                }
            }
            Ok(true)
        })?;
        open.map_or(Ok(()), |(stretch, is_written)| sink(stretch, is_written))
    }

    /// Writes what of `segment` is not zero to `file`, where it begins at `offset`. Bytes written.
    fn copy(
        &self,
        segment: &Segment,
        file: &File,
        offset: u64,
        piece: &mut Vec<u8>,
        path: &Path,
    ) -> Result<u64, Error> {
        let write = |bytes: &[u8], at| {
            file.write_all_at(bytes, at).map_err(|source| Error::Io {
                path: path.to_owned(),
                what: "write it",
                source,
            })
        };
        let (object, begin) = match segment.content {
            Content::Elsewhere => return Ok(0),
            Content::Vdso => {
                let vdso = self.image.tree().host.as_ref();
                let vdso = vdso.map_or(&[][..], |host| &host.vdso);
                let len = vdso.len().min(segment.pages.byte_len() as usize);
                write(&vdso[..len], offset)?;
                return Ok(len as u64);
            }
            Content::Pages { object, offset } => (object, offset),
        };
        let all = PageRange {
            start: begin,
            end: begin + segment.pages.byte_len(),
        };
        let mut written = 0;
        self.runs(object, all, |run| {
            let mut at = match run.kind {
                Some(PageKind::Data) => run.range.start,
                Some(PageKind::Zero | PageKind::Hole | PageKind::Guard) | None => run.range.end,
            };
            while at < run.range.end {
                let end = run.range.end.min(at + PIECE_LEN);
                piece.resize((end - at) as usize, 0);
                self.image
                    .read(object, PageRange { start: at, end }, piece)?;
                write(piece, offset + (at - begin))?;
                written += end - at;
                at = end;
            }
            Ok(true)
        })?;
        Ok(written)
    }

    /// The beginning of its argument list, as `ps` shows it; what is not in the image is left out.
    fn arguments(&self) -> Result<Vec<u8>, Error> {
        let Some(space) = self.memory else {
            return Ok(Vec::new());
        };
        let end = space
            .arg_end
            .min(space.arg_start + notes::ARGUMENTS_LEN as u64);
        let mut text = Vec::new();
        let mut at = space.arg_start;
        while at < end {
            let page = PageRange::page_of(at);
            let runs = self.image.runs(self.space, page)?;
            if !matches!(&runs[..], [run] if run.kind == Some(PageKind::Data)) {
                break;
            }
            let mut bytes = vec![0; PAGE_SIZE as usize];
            self.image.read(self.space, page, &mut bytes)?;
            let until = end.min(page.end);
            text.extend_from_slice(
                &bytes[(at - page.start) as usize..(until - page.start) as usize],
            );
            at = until;
        }
        Ok(text)
    }
}

/// Whether these pages are the process' own, and not a file's or nobody's.
fn is_own(run: &PageRun) -> bool {
    matches!(run.kind, Some(PageKind::Data | PageKind::Zero))
}

/// The part of `range` before `at`.
fn before(range: PageRange, at: u64) -> Option<PageRange> {
    let end = at.clamp(range.start, range.end);
    Some(PageRange { end, ..range }).filter(|part| !part.is_empty())
}

/// Where everything lies in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    /// Program headers: one for each segment, and one for the notes.
    header_count: u64,
    /// The section header that tells their number when there are too many for the file's header; 0: there is none.
    section_offset: u64,
    notes_offset: u64,
    notes_len: u64,
    /// Bytes of the first segment; a multiple of the page size, as those of all others.
    memory_offset: u64,
}

impl Layout {
    fn new(segment_count: u64, notes_len: u64) -> Self {
        let header_count = segment_count + 1;
        let headers_end = size_of::<FileHeader64<Le>>() as u64
            + header_count * size_of::<ProgramHeader64<Le>>() as u64;
        let has_section = header_count >= u64::from(PN_XNUM);
        let section_len = if has_section {
            size_of::<SectionHeader64<Le>>() as u64
        } else {
            0
        };
        let notes_offset = headers_end + section_len;
        Self {
            header_count,
            section_offset: if has_section { headers_end } else { 0 },
            notes_offset,
            notes_len,
            memory_offset: (notes_offset + notes_len).next_multiple_of(PAGE_SIZE),
        }
    }

    /// The file's header, and the first program header, that of the notes.
    fn begin(&self, out: &mut impl io::Write) -> io::Result<()> {
        let count = u16::try_from(self.header_count).unwrap_or(PN_XNUM);
        let has_section = self.section_offset != 0;
        let header = FileHeader64 {
            e_ident: Ident {
                magic: ELFMAG,
                class: ELFCLASS64,
                data: ELFDATA2LSB,
                version: EV_CURRENT,
                os_abi: ELFOSABI_NONE,
                abi_version: 0,
                padding: [0; 7],
            },
            e_type: U16::new(Le, ET_CORE),
            e_machine: U16::new(Le, EM_X86_64),
            e_version: U32::new(Le, u32::from(EV_CURRENT.0)),
            e_phoff: U64::new(Le, size_of::<FileHeader64<Le>>() as u64),
            e_shoff: U64::new(Le, self.section_offset),
            e_ehsize: U16::new(Le, size_of::<FileHeader64<Le>>() as u16),
            e_phentsize: U16::new(Le, size_of::<ProgramHeader64<Le>>() as u16),
            e_phnum: U16::new(Le, count),
            e_shentsize: U16::new(
                Le,
                if has_section {
                    size_of::<SectionHeader64<Le>>() as u16
                } else {
                    0
                },
            ),
            e_shnum: U16::new(Le, u16::from(has_section)),
            e_entry: U64::default(),
            e_flags: U32::default(),
            e_shstrndx: U16::default(),
        };
        out.write_all(bytes_of(&header))?;
        let notes = program_header(
            PT_NOTE,
            ProgramFlags(0),
            self.notes_offset,
            0,
            self.notes_len,
            0,
            4,
        );
        out.write_all(bytes_of(&notes))
    }

    /// What lies between the program headers and the notes.
    fn end(&self, out: &mut impl io::Write) -> io::Result<()> {
        if self.section_offset == 0 {
            return Ok(());
        }
        // See "extended numbering" in elf(5).
        let count = u32::try_from(self.header_count).map_err(io::Error::other)?;
        let section = SectionHeader64::<Le> {
            sh_name: U32::default(),
            sh_type: U32::default(),
            sh_flags: U64::default(),
            sh_addr: U64::default(),
            sh_offset: U64::default(),
            sh_size: U64::new(Le, 1),
            sh_link: U32::default(),
            sh_info: U32::new(Le, count),
            sh_addralign: U64::default(),
            sh_entsize: U64::default(),
        };
        out.write_all(bytes_of(&section))
    }
}

/// The program header of a segment whose bytes begin at `offset`.
fn load(segment: &Segment, offset: u64) -> ProgramHeader64<Le> {
    let mut flags = ProgramFlags(0);
    for (prot, flag) in [(PROT_READ, PF_R), (PROT_WRITE, PF_W), (PROT_EXEC, PF_X)] {
        if segment.prot & prot != 0 {
            flags.0 |= flag.0;
        }
    }
    program_header(
        PT_LOAD,
        flags,
        offset,
        segment.pages.start,
        segment.file_len(),
        segment.pages.byte_len(),
        PAGE_SIZE,
    )
}

fn program_header(
    kind: ProgramType,
    flags: ProgramFlags,
    offset: u64,
    address: u64,
    file_len: u64,
    memory_len: u64,
    align: u64,
) -> ProgramHeader64<Le> {
    ProgramHeader64 {
        p_type: U32::new(Le, kind),
        p_flags: U32::new(Le, flags),
        p_offset: U64::new(Le, offset),
        p_vaddr: U64::new(Le, address),
        p_paddr: U64::default(),
        p_filesz: U64::new(Le, file_len),
        p_memsz: U64::new(Le, memory_len),
        p_align: U64::new(Le, align),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn golden() -> Image {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1");
        Image::open(&path).expect("it is committed")
    }

    fn word<const N: usize>(bytes: &[u8], at: u64) -> u64 {
        let mut word = [0; 8];
        word[..N].copy_from_slice(&bytes[at as usize..at as usize + N]);
        u64::from_le_bytes(word)
    }

    /// Where each segment lies in memory, and its bytes.
    fn segments(bytes: &[u8]) -> Vec<(PageRange, &[u8])> {
        let (offset, count) = (word::<8>(bytes, 32), word::<2>(bytes, 56));
        let headers = (0..count).map(|index| offset + index * 56);
        headers
            .filter(|&at| word::<4>(bytes, at) == u64::from(PT_LOAD.0))
            .map(|at| {
                let [offset, start, file_len, len] =
                    [8, 16, 32, 40].map(|field| word::<8>(bytes, at + field));
                let range = PageRange::new(start, start + len).expect("whole pages");
                let content = offset as usize..(offset + file_len) as usize;
                (range, &bytes[content])
            })
            .collect()
    }

    #[test]
    fn every_page_of_the_image_is_where_it_was_or_not_there() {
        let (image, folder) = (golden(), tempfile::tempdir().expect("a folder"));
        let path = folder.path().join("core");
        let written = write(&image, None, &path, true).expect("it is whole");
        assert_eq!((written.pid, written.thread_count), (4711, 2));
        let metadata = path.metadata().expect("it was written");
        assert_eq!(metadata.permissions().mode() & 0o7777, 0o600);
        assert_eq!(metadata.len(), written.len);
        let bytes = std::fs::read(&path).expect("it is ours");
        let segments = segments(&bytes);
        assert_eq!(segments.len() as u64, written.segment_count);
        let spaces = image.tree().processes[0].space.iter();
        let mapped: u64 = spaces
            .flat_map(|space| &space.mappings)
            .map(|mapping| mapping.end - mapping.start)
            .sum();
        let told: u64 = segments.iter().map(|(range, _)| range.byte_len()).sum();
        assert_eq!(told, mapped, "all of its memory, and each part once");
        let mut found = 0;
        for (range, content) in segments {
            let mut at = range.start;
            while at < range.end {
                let page = PageRange::page_of(at);
                let here = content.get((at - range.start) as usize..).unwrap_or(&[]);
                let here = here.get(..PAGE_SIZE as usize);
                let runs = image.runs(ObjectId::ROOT_SPACE, page).expect("it is whole");
                match runs[0].kind {
                    Some(PageKind::Data) => {
                        let mut wanted = vec![0; PAGE_SIZE as usize];
                        let read = image.read(ObjectId::ROOT_SPACE, page, &mut wanted);
                        read.expect("it is whole");
                        assert_eq!(here, Some(&wanted[..]), "page {at:x}");
                        found += 1;
                    }
                    Some(PageKind::Zero) => {
                        assert_eq!(here, Some(&[0; PAGE_SIZE as usize][..]), "page {at:x}");
                    }
                    // Zeros of anonymous memory, or a file's.
                    Some(PageKind::Hole | PageKind::Guard) | None => {}
                }
                at = page.end;
            }
        }
        assert_eq!(found, image.header().counts.data_pages);
        // Nobody's core file is overwritten, and nothing stays of what cannot be.
        assert!(matches!(
            write(&image, None, &path, true),
            Err(Error::Exists { .. })
        ));
        let other = folder.path().join("other");
        assert!(matches!(
            write(&image, Some(4712), &other, true),
            Err(Error::NoProcess { pid: 4712, .. })
        ));
        assert_eq!(std::fs::read_dir(folder.path()).expect("ours").count(), 1);
    }

    #[test]
    fn more_segments_than_a_header_can_count_are_told_by_a_section() {
        let header_len = size_of::<FileHeader64<Le>>();
        for (segment_count, told, sections) in [
            (0xfffd_u64, 0xfffe, 0),
            (0xfffe, u64::from(PN_XNUM), 1),
            (300_000, u64::from(PN_XNUM), 1),
        ] {
            let layout = Layout::new(segment_count, 100);
            let mut head = Vec::new();
            layout.begin(&mut head).expect("a vector grows");
            assert_eq!(head.len(), header_len + size_of::<ProgramHeader64<Le>>());
            assert_eq!(
                (word::<2>(&head, 56), word::<2>(&head, 60)),
                (told, sections)
            );
            let mut section = Vec::new();
            layout.end(&mut section).expect("a vector grows");
            if sections == 1 {
                assert_eq!(
                    word::<8>(&head, 40),
                    layout.notes_offset - section.len() as u64
                );
                assert_eq!(word::<4>(&section, 44), segment_count + 1);
            } else {
                assert!(section.is_empty());
            }
            assert!(layout.notes_offset + 100 <= layout.memory_offset);
        }
    }

    #[test]
    fn what_is_behind_the_end_of_an_object_is_left_out() {
        let range = |start, end| PageRange { start, end };
        let whole = range(0x1000, 0x3000);
        assert_eq!(before(whole, 0x2000), Some(range(0x1000, 0x2000)));
        assert_eq!(before(whole, 0), None);
        assert_eq!(before(whole, 0x9000), Some(whole));
    }
}
