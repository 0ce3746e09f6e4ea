//! Rebuilds the address space: the husk is emptied, the captured mappings are made at their addresses, lazy ones are
//! registered with the run userfaultfd, and the pages that must be there at the first instruction are installed.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use pageferry_image::model::Invalid;
use pageferry_image::model::memory::{self, Kind, Mapping, Space};
use pageferry_image::page::{PAGE_SIZE, PageRange};
use pageferry_tracee::agent;
use pageferry_tracee::descriptor::PidFd;
use pageferry_tracee::injection::Injection;
use pageferry_tracee::memory::RemoteMemory;
use pageferry_tracee::procfs::{self, Vma};
use pageferry_tracee::uffd::{Copied, Features, Uffd};

use super::files::Handover;
use super::shared::Objects;
use super::{EagerPage, Error, Result, Work, mapping_name, runs};

/// Lowest address the agent is put at; below lie programs linked at fixed addresses and mmap_min_addr.
const HOLE_MIN: u64 = 0x1000_0000;
/// One past the highest user address with four-level page tables.
const HOLE_MAX: u64 = 0x7fff_ffff_0000;
/// Free bytes kept between a stack that may grow and the agent.
const STACK_ROOM: u64 = 64 << 20;
/// `arch_prctl(2)`: map the 64-bit vdso at (a hint of) an address. Linux 4.8, CONFIG_CHECKPOINT_RESTORE.
const ARCH_MAP_VDSO_64: u64 = 0x2003;
/// mmap(2), Linux 6.11: the kernel may drop the pages under pressure.
const MAP_DROPPABLE: i32 = 0x08;
const MADV_GUARD_INSTALL: u64 = 102;
const PR_SET_MM: u64 = 35;
const PR_SET_MM_MAP: u64 = 14;
const PR_SET_VMA: u64 = 0x5356_4d41;
const PR_SET_VMA_ANON_NAME: u64 = 0;
const PR_SET_THP_DISABLE: u64 = 41;

/// An address for the agent that neither the husk nor the final layout uses, with room for stacks to grow.
pub(crate) fn hole_for_agent(space: &Space, husk: &[Vma], thread_count: usize) -> Result<u64> {
    let needed = agent::byte_len(thread_count) as u64 + 2 * PAGE_SIZE;
    let mut taken: Vec<Range<u64>> = husk.iter().map(|vma| vma.start..vma.end).collect();
    for mapping in &space.mappings {
        let room = if mapping.grows_down { STACK_ROOM } else { 0 };
        taken.push(mapping.start.saturating_sub(room)..mapping.end);
    }
    // The heap grows upwards from the program break.
    taken.push(space.start_brk..space.brk.saturating_add(STACK_ROOM));
    taken.sort_by_key(|range| range.start);
    let mut at = HOLE_MIN;
    for range in taken {
        if range.start >= at && range.start - at >= needed {
            break;
        }
        at = at.max(range.end + PAGE_SIZE);
    }
    if at.saturating_add(needed) > HOLE_MAX {
        return Err(Error::Mismatch {
            object: "the address space".into(),
            what: format!("no hole of {needed} bytes is left for the agent"),
        });
    }
    Ok(at)
}

/// Unmaps all that the exec of the husk brought; only the agent stays.
pub(crate) fn clear(injection: &mut Injection<'_>, pid: i32) -> Result<()> {
    let agent = injection.mapping();
    let maps = procfs::maps(pid)?;
    let mut work = Work::new(injection, pid);
    for vma in maps.iter().filter(|vma| vma.path != "[vsyscall]") {
        if vma.start >= agent.start && vma.end <= agent.end {
            continue;
        }
        work.room()?;
        work.call(
            mapping_name(vma.start, vma.end),
            "munmap",
            libc::SYS_munmap,
            &[vma.start.into(), (vma.end - vma.start).into()],
        );
    }
    work.run()?;
    Ok(())
}

/// Maps the vdso where the captured process had it. The address given to the kernel is the start of vvar, and only a
/// hint: where it landed is checked.
pub(crate) fn map_vdso(injection: &mut Injection<'_>, pid: i32, space: &Space) -> Result<()> {
    let wanted: Vec<&Mapping> = space
        .mappings
        .iter()
        .filter(|m| matches!(m.kind(), Kind::Vvar | Kind::Vdso))
        .collect();
    let Some(first) = wanted.first() else {
        return Ok(());
    };
    let mut work = Work::new(injection, pid);
    work.call(
        "the vdso",
        "arch_prctl(ARCH_MAP_VDSO_64)",
        libc::SYS_arch_prctl,
        &[ARCH_MAP_VDSO_64.into(), first.start.into()],
    );
    work.run()?;
    let maps = procfs::maps(pid)?;
    for mapping in wanted {
        let name = if mapping.kind() == Kind::Vdso {
            "[vdso]"
        } else {
            "[vvar"
        };
        let there = maps
            .iter()
            .any(|v| v.start == mapping.start && v.end == mapping.end && v.path.starts_with(name));
        if !there {
            return Err(Error::Mismatch {
                object: mapping_name(mapping.start, mapping.end),
                what: format!(
                    "the kernel did not map {name} there: the target's kernel is built differently"
                ),
            });
        }
    }
    Ok(())
}

fn mmap_flags(mapping: &Mapping) -> u64 {
    let mut flags = libc::MAP_FIXED_NOREPLACE;
    flags |= if matches!(mapping.kind(), Kind::FileShared | Kind::Shared) {
        libc::MAP_SHARED
    } else {
        libc::MAP_PRIVATE
    };
    if mapping.kind() == Kind::Anon {
        flags |= libc::MAP_ANONYMOUS;
    }
    if mapping.no_reserve {
        flags |= libc::MAP_NORESERVE;
    }
    if mapping.droppable {
        // Instead of MAP_PRIVATE: its own kind of sharing.
        flags = (flags & !libc::MAP_PRIVATE) | MAP_DROPPABLE;
    }
    if mapping.grows_down {
        flags |= libc::MAP_GROWSDOWN;
    }
    u64::from(flags.unsigned_abs())
}

/// A locked lazy mapping is made without access, locked (which then faults nothing in), registered, and only then
/// given its access rights: `mlock` of a registered range would wait for pages that nobody fetches yet.
fn first_prot(mapping: &Mapping) -> u64 {
    if mapping.locked && mapping.kind() == Kind::Anon {
        0
    } else {
        u64::from(mapping.prot)
    }
}

/// Makes every mapping, with its advice, name and guard regions.
pub(crate) fn map(
    injection: &mut Injection<'_>,
    pid: i32,
    space: &Space,
    handed: &mut Handover,
    objects: &Objects,
) -> Result<()> {
    // Mappings of one file share one descriptor; (path, writable) keeps a shared writable one apart.
    let mut by_file: BTreeMap<(String, bool), Vec<&Mapping>> = BTreeMap::new();
    let mut by_object: BTreeMap<(u32, bool), Vec<&Mapping>> = BTreeMap::new();
    // By number, and where it was attached.
    let mut by_segment: BTreeMap<(i32, u64), Vec<&Mapping>> = BTreeMap::new();
    let mut anon: Vec<&Mapping> = Vec::new();
    for mapping in &space.mappings {
        match mapping.kind() {
            Kind::Anon => anon.push(mapping),
            Kind::Shared if objects.segment(mapping.shared).is_some() => {
                let number = objects.segment(mapping.shared).unwrap_or_default();
                let base = mapping.start.wrapping_sub(mapping.offset);
                by_segment.entry((number, base)).or_default().push(mapping);
            }
            Kind::FilePrivate | Kind::Shared if mapping.shared != 0 => by_object
                .entry((mapping.shared, mapping.file_writable))
                .or_default()
                .push(mapping),
            Kind::FilePrivate | Kind::FileShared => {
                let Some(file) = &mapping.file else {
                    return Err(Invalid::new(
                        mapping_name(mapping.start, mapping.end),
                        "names no file",
                    )
                    .into());
                };
                let writable = mapping.kind() == Kind::FileShared && mapping.file_writable;
                by_file
                    .entry((file.path.clone(), writable))
                    .or_default()
                    .push(mapping);
            }
            Kind::Vvar | Kind::Vdso => {}
            Kind::Shared | Kind::Invalid => {
                return Err(Invalid::new(
                    mapping_name(mapping.start, mapping.end),
                    "is of no known kind",
                )
                .into());
            }
        }
    }
    let mut work = Work::new(injection, pid);
    // Before all others, which may lie where a part of one was cut off.
    for ((number, base), mappings) in by_segment {
        attach(
            &mut work,
            number,
            base,
            objects.pages(mappings[0].shared),
            &mappings,
        )?;
    }
    for mapping in anon {
        work.room()?;
        map_one(&mut work, mapping, u64::MAX);
    }
    work.run()?;
    for ((path, writable), mappings) in by_file {
        let file = files_open(&path, writable)?;
        let fd = handed.lend(&mut work, &file)?;
        for mapping in mappings {
            work.room()?;
            map_one(&mut work, mapping, fd);
        }
        handed.take_back(&mut work, fd)?;
    }
    for ((id, writable), mappings) in by_object {
        let object = objects.to_map(id, writable)?;
        let fd = handed.lend(&mut work, &object)?;
        for mapping in mappings {
            work.room()?;
            map_one(&mut work, mapping, fd);
        }
        handed.take_back(&mut work, fd)?;
    }
    for mapping in &space.mappings {
        decorate(&mut work, mapping)?;
    }
    work.run()?;
    Ok(())
}

/// Attaches a segment of `len` bytes, whole pages, at `base`, and leaves of it what `mappings`, ascending, have.
fn attach(
    work: &mut Work<'_, '_>,
    number: i32,
    base: u64,
    len: u64,
    mappings: &[&Mapping],
) -> Result<()> {
    let is_writable = mappings.iter().any(|mapping| mapping.file_writable);
    let attached = match is_writable {
        true => libc::PROT_READ | libc::PROT_WRITE,
        false => libc::PROT_READ,
    };
    let flags = match is_writable {
        true => 0,
        false => libc::SHM_RDONLY,
    };
    work.room()?;
    work.exactly(
        base,
        format!("System V shared memory {number}"),
        "shmat",
        libc::SYS_shmat,
        &[number.into(), base.into(), flags.into()],
    );
    let mut at = base;
    let end = base.saturating_add(len);
    for mapping in mappings {
        work.room()?;
        cut(work, at, mapping.start);
        at = mapping.end;
        if mapping.prot != attached.unsigned_abs() {
            work.call(
                mapping_name(mapping.start, mapping.end),
                "mprotect",
                libc::SYS_mprotect,
                &[
                    mapping.start.into(),
                    (mapping.end - mapping.start).into(),
                    mapping.prot.into(),
                ],
            );
        }
    }
    work.room()?;
    cut(work, at, end);
    Ok(())
}

/// Unmaps from `start` to `end`, if that is anything.
fn cut(work: &mut Work<'_, '_>, start: u64, end: u64) {
    if start < end {
        work.call(
            mapping_name(start, end),
            "munmap",
            libc::SYS_munmap,
            &[start.into(), (end - start).into()],
        );
    }
}

fn files_open(path: &str, writable: bool) -> Result<std::fs::File> {
    std::fs::OpenOptions::new()
        .read(true)
        .write(writable)
        .open(path)
        .map_err(|error| Error::object(format!("mapped file {path}"), "open", error))
}

fn map_one(work: &mut Work<'_, '_>, mapping: &Mapping, fd: u64) {
    let fd = if mapping.kind() == Kind::Anon {
        u64::MAX
    } else {
        fd
    };
    work.exactly(
        mapping.start,
        mapping_name(mapping.start, mapping.end),
        "mmap",
        libc::SYS_mmap,
        &[
            mapping.start.into(),
            (mapping.end - mapping.start).into(),
            first_prot(mapping).into(),
            mmap_flags(mapping).into(),
            fd.into(),
            mapping.offset.into(),
        ],
    );
}

fn decorate(work: &mut Work<'_, '_>, mapping: &Mapping) -> Result<()> {
    let len = mapping.end - mapping.start;
    let name = || mapping_name(mapping.start, mapping.end);
    if mapping.advice.is_empty()
        && mapping.guards.is_empty()
        && mapping.name.is_empty()
        && !mapping.locked
    {
        return Ok(());
    }
    work.room()?;
    for advice in &mapping.advice {
        work.call(
            name(),
            "madvise",
            libc::SYS_madvise,
            &[mapping.start.into(), len.into(), u64::from(*advice).into()],
        );
    }
    if !mapping.name.is_empty() {
        let text = work.text(&mapping.name)?;
        work.call(
            name(),
            "prctl(PR_SET_VMA_ANON_NAME)",
            libc::SYS_prctl,
            &[
                PR_SET_VMA.into(),
                PR_SET_VMA_ANON_NAME.into(),
                mapping.start.into(),
                len.into(),
                text.into(),
            ],
        );
    }
    if mapping.locked {
        let flags = u64::from(mapping.lock_on_fault);
        if first_prot(mapping) == 0 {
            // ENOMEM: there is nothing to fault in; VM_LOCKED is set all the same, as `verify` checks.
            work.ignored(
                "mlock2",
                libc::SYS_mlock2,
                &[mapping.start.into(), len.into(), flags.into()],
            );
        } else {
            work.call(
                name(),
                "mlock2",
                libc::SYS_mlock2,
                &[mapping.start.into(), len.into(), flags.into()],
            );
        }
    }
    for guard in &mapping.guards {
        work.room()?;
        work.call(
            mapping_name(guard.start, guard.end),
            "madvise(MADV_GUARD_INSTALL)",
            libc::SYS_madvise,
            &[
                guard.start.into(),
                (guard.end - guard.start).into(),
                MADV_GUARD_INSTALL.into(),
            ],
        );
    }
    Ok(())
}

/// Sets the fields of mm_struct that /proc shows (code, data, heap, arguments, environment, auxiliary vector) and the
/// exe link, in one call. `struct prctl_mm_map`, Linux 3.18.
pub(crate) fn set_mm(
    injection: &mut Injection<'_>,
    pid: i32,
    space: &Space,
    handed: &mut Handover,
) -> Result<()> {
    let exe = space
        .exe
        .as_ref()
        .ok_or_else(|| Invalid::new("the address space", "names no executable"))?;
    let file = files_open(&exe.path, false)?;
    let mut work = Work::new(injection, pid);
    let fd = handed.lend(&mut work, &file)?;
    work.room()?;
    let auxv = work.bytes(&space.auxv)?;
    let mut map = Vec::with_capacity(104);
    for field in [
        space.start_code,
        space.end_code,
        space.start_data,
        space.end_data,
        space.start_brk,
        space.brk,
        space.start_stack,
        space.arg_start,
        space.arg_end,
        space.env_start,
        space.env_end,
        auxv,
    ] {
        map.extend_from_slice(&field.to_le_bytes());
    }
    let auxv_len = u32::try_from(space.auxv.len())
        .map_err(|_| Invalid::new("the auxiliary vector", "is too long"))?;
    let exe_fd =
        u32::try_from(fd).map_err(|_| Invalid::new("the executable", "has no descriptor"))?;
    map.extend_from_slice(&auxv_len.to_le_bytes());
    map.extend_from_slice(&exe_fd.to_le_bytes());
    let len = map.len() as u64;
    let at = work.bytes(&map)?;
    work.call(
        format!("executable {}", exe.path),
        "prctl(PR_SET_MM_MAP)",
        libc::SYS_prctl,
        &[
            PR_SET_MM.into(),
            PR_SET_MM_MAP.into(),
            at.into(),
            len.into(),
            0u64.into(),
        ],
    );
    if space.thp_disabled {
        work.call(
            "the address space",
            "prctl(PR_SET_THP_DISABLE)",
            libc::SYS_prctl,
            &[
                PR_SET_THP_DISABLE.into(),
                1u64.into(),
                0u64.into(),
                0u64.into(),
                0u64.into(),
            ],
        );
    }
    handed.take_back(&mut work, fd)?;
    work.run()?;
    Ok(())
}

/// Makes the run userfaultfd in the husk, takes it, registers every lazy mapping and gives locked ones their access.
pub(crate) fn register(injection: &mut Injection<'_>, pid: i32, space: &Space) -> Result<Uffd> {
    let mut work = Work::new(injection, pid);
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    work.call(
        "the run userfaultfd",
        "userfaultfd",
        libc::SYS_userfaultfd,
        &[flags.into()],
    );
    let fd = work.run()?[0];
    let number =
        u32::try_from(fd).map_err(|_| Invalid::new("the run userfaultfd", "has no number"))?;
    let uffd = Uffd::adopt(PidFd::open(pid)?.get_fd(number)?);
    work.call(
        "the run userfaultfd",
        "close",
        libc::SYS_close,
        &[fd.into()],
    );
    work.run()?;
    uffd.handshake(
        Features::EVENT_FORK
            | Features::EVENT_REMAP
            | Features::EVENT_REMOVE
            | Features::EVENT_UNMAP
            | Features::THREAD_ID,
    )?;
    let mut joined: Vec<PageRange> = Vec::new();
    for mapping in space.mappings.iter().filter(|m| m.kind() == Kind::Anon) {
        match joined.last_mut() {
            Some(last) if last.end == mapping.start => last.end = mapping.end,
            _ => joined.push(PageRange {
                start: mapping.start,
                end: mapping.end,
            }),
        }
    }
    for range in &joined {
        uffd.register_missing(range.start..range.end)?;
    }
    for mapping in space
        .mappings
        .iter()
        .filter(|m| m.locked && m.kind() == Kind::Anon && m.prot != 0)
    {
        work.room()?;
        work.call(
            mapping_name(mapping.start, mapping.end),
            "mprotect",
            libc::SYS_mprotect,
            &[
                mapping.start.into(),
                (mapping.end - mapping.start).into(),
                u64::from(mapping.prot).into(),
            ],
        );
    }
    work.run()?;
    Ok(uffd)
}

/// Longest stretch of first pages that is filled with zeros, bytes: one area that a capture looks at, and its neighbours.
const FIRST_ZEROS_MAX: u64 = 4 << 20;

/// Installs the pages that came with the state, and zeros where one of `first_touch` did not come: it has only zeros then, and nobody
/// is there yet to fill it when a thread, or we for it, touches it. Returns the addresses of all that lie in lazy mappings, and how
/// many of them are such zeros.
pub(crate) fn install(
    pid: i32,
    space: &Space,
    first_touch: &[memory::Range],
    uffd: &Uffd,
    eager: &[EagerPage],
) -> Result<(Vec<u64>, usize)> {
    let memory = RemoteMemory::open(pid)?;
    let mut resident = Vec::new();
    for (start, bytes) in runs(eager) {
        // A run may cross from one mapping into the next: it is cut there, since COPY does not cross.
        let mut offset = 0usize;
        while offset < bytes.len() {
            let address = start + offset as u64;
            let mapping = space
                .mappings
                .iter()
                .find(|m| m.start <= address && address < m.end)
                .ok_or_else(|| {
                    Invalid::new(
                        format!("page {address:x}"),
                        "came with the state but lies in no mapping",
                    )
                })?;
            let len = usize::try_from(mapping.end - address)
                .unwrap_or(usize::MAX)
                .min(bytes.len() - offset);
            let piece = &bytes[offset..offset + len];
            match mapping.kind() {
                Kind::Anon => {
                    copy(uffd, address, piece)?;
                    resident.extend(
                        (0..len as u64 / PAGE_SIZE).map(|index| address + index * PAGE_SIZE),
                    );
                }
                Kind::FilePrivate => memory.write(address, piece)?,
                Kind::FileShared | Kind::Shared | Kind::Vvar | Kind::Vdso | Kind::Invalid => {
                    return Err(Invalid::new(
                        format!("page {address:x}"),
                        "lies in a mapping that takes no pages",
                    )
                    .into());
                }
            }
            offset += len;
        }
    }
    let came_count = resident.len();
    let came: BTreeSet<u64> = eager.iter().map(|page| page.address).collect();
    let pages = first_touch
        .iter()
        .filter(|range| range.end - range.start <= FIRST_ZEROS_MAX)
        .flat_map(|range| (range.start..range.end).step_by(PAGE_SIZE as usize));
    for page in pages.filter(|page| !came.contains(page)) {
        // They are in ascending order.
        let place = space
            .mappings
            .partition_point(|mapping| mapping.end <= page);
        let is_guard = |guard: &memory::Range| guard.start <= page && page < guard.end;
        let is_lazy = space.mappings.get(place).is_some_and(|mapping| {
            mapping.start <= page
                && mapping.kind() == Kind::Anon
                && !mapping.guards.iter().any(is_guard)
        });
        if !is_lazy {
            continue;
        }
        match uffd.zero(page..page + PAGE_SIZE)? {
            Copied::Done => resident.push(page),
            Copied::Exists(_) => {}
            other => return Err(not_taken(page, "UFFDIO_ZEROPAGE", &other)),
        }
    }
    let zeros = resident.len() - came_count;
    resident.sort_unstable();
    Ok((resident, zeros))
}

fn copy(uffd: &Uffd, address: u64, bytes: &[u8]) -> Result<()> {
    match uffd.copy(address, bytes)? {
        Copied::Done => Ok(()),
        other => Err(not_taken(address, "UFFDIO_COPY", &other)),
    }
}

fn not_taken(address: u64, call: &str, answer: &Copied) -> Error {
    Error::Mismatch {
        object: format!("page {address:x}"),
        what: format!("{call} into the prepared process did not take all bytes: {answer:?}"),
    }
}

/// Compares the husk's mappings with the model: what the kernel made is what was captured, and nothing else is there.
pub(crate) fn verify(pid: i32, space: &Space, agent: &Range<u64>) -> Result<()> {
    let maps = procfs::maps(pid)?;
    let mut found = maps
        .iter()
        .filter(|vma| {
            vma.path != "[vsyscall]" && !(vma.start >= agent.start && vma.end <= agent.end)
        })
        .flat_map(|vma| [vma.start, vma.end])
        .peekable();
    // Neighbours may have merged, or one mapping may show as several: only the covered bytes count.
    let covered = |bounds: &mut dyn Iterator<Item = u64>| {
        let mut joined: Vec<(u64, u64)> = Vec::new();
        while let (Some(start), Some(end)) = (bounds.next(), bounds.next()) {
            match joined.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ => joined.push((start, end)),
            }
        }
        joined
    };
    let is = covered(&mut found);
    let should = covered(&mut space.mappings.iter().flat_map(|m| [m.start, m.end]));
    if is != should {
        let differs = is
            .iter()
            .find(|r| !should.contains(r))
            .or_else(|| should.iter().find(|r| !is.contains(r)));
        let (start, end) = differs.copied().unwrap_or_default();
        return Err(Error::Mismatch {
            object: mapping_name(start, end),
            what: "the prepared process has other mappings than the captured one".into(),
        });
    }
    if !space.mappings.iter().any(|m| m.locked) {
        return Ok(());
    }
    let smaps = procfs::smaps(pid)?;
    for mapping in space.mappings.iter().filter(|m| m.locked) {
        let locked = smaps
            .iter()
            .filter(|v| v.start < mapping.end && mapping.start < v.end)
            .all(|v| v.flags.has("lo"));
        if !locked {
            return Err(Error::object(
                mapping_name(mapping.start, mapping.end),
                "mlock2",
                std::io::Error::from_raw_os_error(libc::ENOMEM),
            ));
        }
    }
    Ok(())
}
