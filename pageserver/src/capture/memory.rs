//! The address space: which mappings are carried and how, and which pages travel before the process runs.
//!
//! Page contents are never read here, and nothing here walks the page tables of anonymous memory: a freeze must not grow with
//! memory. Flags (`smaps`) are those of the survey; a mapping that is new since makes them be read again.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;

use pageferry_image::model::memory::{FileIdentity, Kind, Mapping, Range, Space};
use pageferry_image::page::{PAGE_SIZE, PageRange};
use pageferry_tracee::choke::{self, Kind as Call};
use pageferry_tracee::pagemap::{self, Scan};
use pageferry_tracee::procfs::{self, Stat, VmFlags, Vma};

use super::files::{Look, Verdict, present_name};
use super::{locks, shared};
use crate::survey::{Object, Refusal, RefusalKind};
use crate::{Error, Result};

/// End of the addresses a program gets without asking for more.
const ADDRESS_END: u64 = 1 << 47;
/// Bytes before and after the thread pointer that a thread uses at once: `errno` and its like below, the C library's thread
/// descriptor above.
const THREAD_POINTER_SPAN: std::ops::Range<u64> = 256..2304;

/// `VmFlags` that are told to the kernel again with `madvise(2)`.
const ADVICE: [(&str, i32); 8] = [
    ("dc", libc::MADV_DONTFORK),
    ("dd", libc::MADV_DONTDUMP),
    ("wf", libc::MADV_WIPEONFORK),
    ("hg", libc::MADV_HUGEPAGE),
    ("nh", libc::MADV_NOHUGEPAGE),
    ("sr", libc::MADV_SEQUENTIAL),
    ("rr", libc::MADV_RANDOM),
    ("mg", libc::MADV_MERGEABLE),
];

/// How a mapping is carried; `None` for the kernel's own that every process has at the same place.
pub(crate) fn classify(vma: &Vma) -> std::result::Result<Option<Kind>, RefusalKind> {
    match vma.path.as_str() {
        "[vsyscall]" => return Ok(None),
        "[vvar]" | "[vvar_vclock]" => return Ok(Some(Kind::Vvar)),
        "[vdso]" => return Ok(Some(Kind::Vdso)),
        _ => {}
    }
    let path = || vma.path.clone();
    let is = |flag| vma.flags.has(flag);
    if vma.end > ADDRESS_END {
        return Err(RefusalKind::HighMapping);
    }
    if is("ss") {
        return Err(RefusalKind::ShadowStackMapping);
    }
    if is("um") || is("uw") || is("ui") {
        return Err(RefusalKind::UserfaultMapping);
    }
    if is("ht") || vma.page_bytes > PAGE_SIZE {
        return Err(RefusalKind::HugePages);
    }
    if is("sl") {
        return Err(RefusalKind::SealedMapping);
    }
    if vma.protection_key != 0 {
        return Err(RefusalKind::ProtectionKey {
            key: vma.protection_key,
        });
    }
    let anonymous =
        matches!(vma.path.as_str(), "" | "[heap]" | "[stack]") || vma.path.starts_with("[stack:");
    if anonymous && !vma.shared {
        return Ok(Some(Kind::Anon));
    }
    let deleted = vma.path.strip_suffix(" (deleted)");
    if shared::is_object(&vma.path) {
        return Ok(Some(if vma.shared {
            Kind::Shared
        } else {
            Kind::FilePrivate
        }));
    }
    match deleted {
        Some("/anon_hugepage") => return Err(RefusalKind::HugePages),
        Some("/[aio]") => return Err(RefusalKind::AioRing),
        Some("/secretmem") => return Err(RefusalKind::SecretMemory),
        _ => {}
    }
    if is("pf") || is("io") || is("mm") {
        return Err(RefusalKind::DeviceMapping { path: path() });
    }
    if vma.path.starts_with('/') {
        return Ok(Some(if vma.shared {
            Kind::FileShared
        } else {
            Kind::FilePrivate
        }));
    }
    if vma.path.starts_with('[') || vma.path.is_empty() {
        return Err(RefusalKind::SpecialMapping { path: path() });
    }
    Err(RefusalKind::DeviceMapping { path: path() })
}

/// True if the program can write the file through this mapping, now or after mprotect(2).
fn writes_file(vma: &Vma) -> bool {
    vma.shared && (vma.write || vma.flags.has("mw"))
}

/// What is behind a mapping.
enum Backing {
    /// Memory of its own, or the kernel's.
    Nothing,
    /// A file that the target has.
    File(FileIdentity),
    /// An object that is carried, by its id.
    Object(u32),
}

fn backing(look: &mut Look<'_>, vma: &Vma, kind: Kind) -> Result<Verdict<Backing>> {
    match kind {
        Kind::Shared => mapped_object(look, vma, &vma.path),
        Kind::FilePrivate | Kind::FileShared => mapped_file(look, vma),
        _ => Ok(Ok(Backing::Nothing)),
    }
}

fn mapped_object(look: &mut Look<'_>, vma: &Vma, name: &str) -> Result<Verdict<Backing>> {
    let limit = look.options.ghost_limit;
    let object = look.shared.mapped(look.pid, vma, name, limit)?;
    Ok(object.map(Backing::Object))
}

/// The file behind a mapping: one to be mapped from its path again, or one that is carried; or why neither.
fn mapped_file(look: &mut Look<'_>, vma: &Vma) -> Result<Verdict<Backing>> {
    let path = vma.path.as_str();
    let must_be_shared = writes_file(vma);
    // The way through map_files leads to the very file, whatever its path is now; it needs CAP_CHECKPOINT_RESTORE.
    let through = format!("/proc/{}/map_files/{:x}-{:x}", look.pid, vma.start, vma.end);
    let examined = || -> Result<std::io::Result<Metadata>> {
        choke::pass(Call::Memory)
            .map_err(|errno| pageferry_tracee::Error::path("stat", through.as_str(), errno))?;
        Ok(std::fs::metadata(&through))
    };
    // Leases, and files known from elsewhere, are by the device that stat(2) tells. On Btrfs maps tells another.
    let key = |mapped: &std::io::Result<Metadata>| match mapped {
        Ok(mapped) => (mapped.dev(), mapped.ino()),
        Err(_) => (vma.device, vma.inode),
    };
    // Most trees have no lease, and most mappings need no look at the file.
    let mut mapped = None;
    if !look.leased.is_empty() {
        let leased = mapped.insert(examined()?);
        if look.leased.has(key(leased)) {
            return Ok(Err(RefusalKind::Lease {
                path: path.to_owned(),
                why: locks::MAPPED,
            }));
        }
    }
    if shared::is_object(path) || look.shared.has((vma.device, vma.inode)) {
        return mapped_object(look, vma, path);
    }
    if let Some(known) = look.known_file(path, must_be_shared, vma.device, vma.inode) {
        return Ok(Ok(Backing::File(known)));
    }
    let mapped = mapped.map_or_else(examined, Ok)?;
    let (device, inode) = key(&mapped);
    if let Some(known) = look.known_file(path, must_be_shared, device, inode) {
        return Ok(Ok(Backing::File(known)));
    }
    let present = match &mapped {
        Ok(mapped) => present_name(path.to_owned(), mapped)?,
        Err(_) => path.to_owned(),
    };
    let path = present.as_str();
    let named = std::fs::metadata(path);
    let refusal = match (&mapped, &named) {
        (Ok(mapped), _) if !mapped.is_file() => Some(RefusalKind::DeviceMapping {
            path: path.to_owned(),
        }),
        (Ok(mapped), _) if mapped.nlink() == 0 => return mapped_object(look, vma, path),
        (_, Err(_)) => Some(RefusalKind::DeletedMapping {
            path: path.to_owned(),
        }),
        (Ok(mapped), Ok(named)) if !super::files::same_inode(mapped, named) => {
            Some(RefusalKind::ReplacedMapping {
                path: path.to_owned(),
            })
        }
        (Err(_), Ok(named)) if named.ino() != vma.inode => Some(RefusalKind::ReplacedMapping {
            path: path.to_owned(),
        }),
        _ if look.goes_along(path, must_be_shared, vma.inode)? => {
            return mapped_object(look, vma, path);
        }
        _ if must_be_shared && !look.on_shared_storage(path)? => {
            Some(RefusalKind::SharedWritable {
                path: path.to_owned(),
            })
        }
        _ => None,
    };
    match refusal {
        Some(kind) => Ok(Err(kind)),
        None => look
            .identify(path, must_be_shared, device, inode)
            .map(|file| Ok(Backing::File(file))),
    }
}

/// The refusals of every mapping.
pub(crate) fn refusals(look: &mut Look<'_>, vmas: &[Vma]) -> Result<Vec<Refusal>> {
    let mut found = Vec::new();
    for vma in vmas {
        let kind = match classify(vma) {
            Ok(Some(kind)) => match backing(look, vma, kind) {
                // Unmapped meanwhile, as only a running process can do.
                Err(Error::File { source, .. }) if source.kind() == ErrorKind::NotFound => None,
                backing => backing?.err(),
            },
            Ok(None) => None,
            Err(kind) => Some(kind),
        };
        if let Some(what) = kind {
            found.push(Refusal {
                pid: look.pid,
                object: Object::Mapping {
                    start: vma.start,
                    end: vma.end,
                },
                what,
            });
        }
    }
    Ok(found)
}

/// Whether pages of this kind are missing when the process runs and fetched on demand.
pub(crate) fn is_lazy(kind: Option<Kind>) -> bool {
    kind == Some(Kind::Anon)
}

/// The pages that are fetched on demand: ascending, without the guard regions among them.
pub(crate) fn lazy(vmas: &[Vma], guards: &[PageRange]) -> Vec<PageRange> {
    let lazy = vmas
        .iter()
        .filter(|vma| is_lazy(classify(vma).ok().flatten()))
        .map(|vma| PageRange {
            start: vma.start,
            end: vma.end,
        })
        .collect();
    without(merge(lazy), guards)
}

/// Whether a mapping of this kind can hold guard regions.
fn can_hold_guards(kind: Option<Kind>) -> bool {
    matches!(kind, Some(Kind::Anon | Kind::FilePrivate | Kind::Shared))
}

/// Guard regions of the mappings that `chosen` names, ascending. Walks their page tables.
pub(crate) fn guards(
    pid: i32,
    vmas: &[Vma],
    chosen: impl Fn(&Vma) -> bool,
) -> Result<Vec<PageRange>> {
    if !pagemap::knows_guards()? {
        return Ok(Vec::new());
    }
    let pagemap = pagemap::open(pid)?;
    let mut found = Vec::new();
    for vma in vmas
        .iter()
        .filter(|vma| can_hold_guards(classify(vma).ok().flatten()) && chosen(vma))
    {
        // Pieces, so that a running program never waits long for its own mmap.
        for piece in pieces(PageRange {
            start: vma.start,
            end: vma.end,
        }) {
            let scan = Scan {
                range: piece.start..piece.end,
                category_mask: pagemap::GUARD,
                return_mask: pagemap::GUARD,
                ..Scan::default()
            };
            found.extend(
                pagemap::scan(&pagemap, &scan)?
                    .iter()
                    .map(|region| PageRange {
                        start: region.start,
                        end: region.end,
                    }),
            );
        }
    }
    Ok(merge(found))
}

/// Bytes of a page map looked at in one call.
const PIECE_LEN: u64 = 64 << 20;

/// `range` cut into pieces of at most 64 MiB.
pub(crate) fn pieces(range: PageRange) -> impl Iterator<Item = PageRange> {
    (0..range.byte_len().div_ceil(PIECE_LEN)).map(move |index| {
        let start = range.start + index * PIECE_LEN;
        PageRange {
            start,
            end: (start + PIECE_LEN).min(range.end),
        }
    })
}

/// Sorted, without overlaps, neighbours joined.
pub(crate) fn merge(mut ranges: Vec<PageRange>) -> Vec<PageRange> {
    ranges.sort_unstable();
    ranges.dedup_by(|next, kept| {
        let joins = next.start <= kept.end;
        if joins {
            kept.end = kept.end.max(next.end);
        }
        joins
    });
    ranges
}

/// `ranges` without what `holes` cover. Both ascending and disjoint, and so is the result.
pub(crate) fn without(ranges: Vec<PageRange>, holes: &[PageRange]) -> Vec<PageRange> {
    let mut left = Vec::with_capacity(ranges.len() + holes.len());
    for mut range in ranges {
        let first = holes.partition_point(|hole| hole.end <= range.start);
        for hole in &holes[first..] {
            let Some(hole) = hole.intersect(range) else {
                break;
            };
            left.push(PageRange {
                start: range.start,
                end: hole.start,
            });
            range.start = hole.end;
        }
        left.push(range);
    }
    left.retain(|range| !range.is_empty());
    left
}

/// The mappings of the frozen process, with flags: those of the survey where a mapping is still the same one, grown or shrunk.
pub(crate) fn frozen_mappings(pid: i32, surveyed: &[Vma]) -> Result<Vec<Vma>> {
    let mut now = procfs::maps(pid)?;
    for vma in &mut now {
        match known_flags(vma, surveyed) {
            Some((flags, page_bytes, key)) => {
                vma.flags = flags;
                vma.page_bytes = page_bytes;
                vma.protection_key = key;
            }
            None => {
                tracing::debug!(
                    pid,
                    start = vma.start,
                    "a mapping appeared since the survey: reading all flags again"
                );
                return Ok(procfs::smaps(pid)?);
            }
        }
    }
    Ok(now)
}

fn known_flags(vma: &Vma, surveyed: &[Vma]) -> Option<(VmFlags, u64, u32)> {
    let same = |old: &&Vma| {
        (
            old.read, old.write, old.exec, old.shared, old.device, old.inode, &old.path, &old.name,
        ) == (
            vma.read, vma.write, vma.exec, vma.shared, vma.device, vma.inode, &vma.path, &vma.name,
        ) && (vma.inode == 0
            || old.offset.wrapping_sub(old.start) == vma.offset.wrapping_sub(vma.start))
            && (old.start == vma.start
                || old.end == vma.end
                || (old.start < vma.start && vma.end < old.end))
    };
    let first = surveyed.partition_point(|old| old.end <= vma.start);
    let old = surveyed[first..]
        .iter()
        .take_while(|old| old.start < vma.end)
        .find(same)?;
    Some((old.flags.clone(), old.page_bytes, old.protection_key))
}

/// What the process itself was asked.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Asked {
    /// `brk(0)`.
    pub brk: u64,
    /// `PR_GET_THP_DISABLE`.
    pub thp_disabled: bool,
    /// The agent's own mapping was locked: `mlockall(MCL_FUTURE)`.
    pub lock_future: bool,
}

/// The model of the address space.
///
/// Mappings must have passed [`refusals`]; what has not is a bug that shows as [`Error::Changed`].
pub(crate) fn space(
    look: &mut Look<'_>,
    vmas: &[Vma],
    guards: &[PageRange],
    stat: &Stat,
    asked: Asked,
    exe: FileIdentity,
) -> Result<Space> {
    let mut mappings = Vec::with_capacity(vmas.len());
    for vma in vmas {
        let changed = || Error::Changed {
            pid: look.pid,
            what: "the address space",
        };
        let Some(kind) = classify(vma).map_err(|_| changed())? else {
            continue;
        };
        mappings.push(mapping(look, vma, kind, guards)?);
    }
    Ok(Space {
        mappings,
        start_code: stat.start_code,
        end_code: stat.end_code,
        start_data: stat.start_data,
        end_data: stat.end_data,
        start_brk: stat.start_brk,
        brk: asked.brk,
        start_stack: stat.start_stack,
        arg_start: stat.arg_start,
        arg_end: stat.arg_end,
        env_start: stat.env_start,
        env_end: stat.env_end,
        auxv: procfs::auxv(look.pid)?,
        exe: Some(exe),
        lock_future: asked.lock_future,
        thp_disabled: asked.thp_disabled,
    })
}

fn mapping(look: &mut Look<'_>, vma: &Vma, kind: Kind, guards: &[PageRange]) -> Result<Mapping> {
    let pid = look.pid;
    let changed = |_| Error::Changed {
        pid,
        what: "a mapped file",
    };
    let (kind, file, shared) = match (kind, backing(look, vma, kind)?.map_err(changed)?) {
        (kind, Backing::Nothing) => (kind, None, 0),
        (kind, Backing::File(file)) => (kind, Some(file), 0),
        (Kind::FileShared, Backing::Object(id)) => (Kind::Shared, None, id),
        (kind, Backing::Object(id)) => (kind, None, id),
    };
    let has_offset = file.is_some() || shared != 0;
    let mut prot = 0;
    for (allowed, bit) in [
        (vma.read, libc::PROT_READ),
        (vma.write, libc::PROT_WRITE),
        (vma.exec, libc::PROT_EXEC),
    ] {
        if allowed {
            prot |= bit as u32;
        }
    }
    let whole = PageRange {
        start: vma.start,
        end: vma.end,
    };
    // The kernel gives its own mappings flags that nobody asked for with madvise(2).
    let own = matches!(kind, Kind::Vvar | Kind::Vdso);
    let has = |flag| !own && vma.flags.has(flag);
    let droppable = has("dp");
    Ok(Mapping {
        start: vma.start,
        end: vma.end,
        prot,
        kind: kind.into(),
        offset: if has_offset { vma.offset } else { 0 },
        file,
        shared,
        file_writable: matches!(kind, Kind::FileShared | Kind::Shared) && writes_file(vma),
        grows_down: has("gd"),
        locked: has("lo"),
        lock_on_fault: has("lf"),
        no_reserve: has("nr"),
        advice: ADVICE
            .iter()
            // Droppable memory is wiped on fork and never dumped by its nature.
            .filter(|&&(flag, _)| has(flag) && !(droppable && matches!(flag, "wf" | "dd")))
            .map(|&(_, advice)| advice as u32)
            .collect(),
        name: vma.name.clone().unwrap_or_default(),
        guards: guards
            .iter()
            .filter_map(|guard| guard.intersect(whole))
            .map(|guard| Range {
                start: guard.start,
                end: guard.end,
            })
            .collect(),
        droppable,
    })
}

/// Pages of private file mappings that the process has copied for itself.
pub(crate) fn copied_file_pages(pid: i32, vmas: &[Vma]) -> Result<Vec<PageRange>> {
    let pagemap = pagemap::open(pid)?;
    // A guard page counts as swapped, so it has to be told apart where the kernel can.
    let guard = if pagemap::knows_guards()? {
        pagemap::GUARD
    } else {
        0
    };
    let mut found = Vec::new();
    for vma in vmas
        .iter()
        .filter(|vma| classify(vma) == Ok(Some(Kind::FilePrivate)))
    {
        let scan = Scan {
            range: vma.start..vma.end,
            category_inverted: pagemap::FILE | guard,
            category_mask: pagemap::FILE | guard,
            category_anyof: pagemap::PRESENT | pagemap::SWAPPED,
            return_mask: 0,
        };
        found.extend(
            pagemap::scan(&pagemap, &scan)?
                .iter()
                .map(|region| PageRange {
                    start: region.start,
                    end: region.end,
                }),
        );
    }
    Ok(merge(found))
}

/// What a thread touches the moment it runs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FirstTouch {
    pub instruction: u64,
    pub stack: u64,
    pub thread_pointer: u64,
    /// Address and length of small areas the kernel or the thread writes: rseq, robust list head, clear_child_tid.
    pub areas: [(u64, u64); 3],
}

/// Longest area that travels inside the freeze because others look at it, bytes: arguments and environment usually fill a
/// few pages.
const AREA_LEN_MAX: u64 = 1 << 20;

/// The lazy pages of `areas` (start and end, bytes) and among those `threads` touch first: with them resident, no thread waits for the network on its way back to
/// user mode.
pub(crate) fn first_touch_pages(
    threads: &[FirstTouch],
    areas: &[(u64, u64)],
    vmas: &[Vma],
    guards: &[PageRange],
) -> Vec<PageRange> {
    let lazy: BTreeMap<u64, u64> = vmas
        .iter()
        .filter(|vma| is_lazy(classify(vma).ok().flatten()))
        .map(|vma| (vma.start, vma.end))
        .collect();
    let mut wanted: Vec<PageRange> = areas
        .iter()
        .filter(|(start, end)| start < end && end - start <= AREA_LEN_MAX)
        .filter_map(|&(start, end)| {
            PageRange::new(
                start & !(PAGE_SIZE - 1),
                end.checked_next_multiple_of(PAGE_SIZE)?,
            )
        })
        .collect();
    for thread in threads {
        let stack = PageRange::page_of(thread.stack);
        let mut bytes = vec![
            (stack.start.saturating_sub(PAGE_SIZE), stack.end),
            (thread.instruction, thread.instruction.saturating_add(1)),
        ];
        if thread.thread_pointer != 0 {
            let pointer = thread.thread_pointer;
            bytes.push((
                pointer.saturating_sub(THREAD_POINTER_SPAN.start),
                pointer.saturating_add(THREAD_POINTER_SPAN.end),
            ));
        }
        for (address, length) in thread.areas {
            if address != 0 {
                bytes.push((address, address.saturating_add(length.max(1))));
            }
        }
        wanted.extend(bytes.into_iter().map(|(start, end)| {
            PageRange {
                start: start & !(PAGE_SIZE - 1),
                end: end
                    .checked_next_multiple_of(PAGE_SIZE)
                    .unwrap_or(start & !(PAGE_SIZE - 1)),
            }
        }));
    }
    let mut found = Vec::new();
    for range in merge(wanted) {
        // Every page of its own: a range may lie across mappings of different kinds.
        for page in (range.start..range.end).step_by(PAGE_SIZE as usize) {
            let page = PageRange::page_of(page);
            let is_lazy = lazy
                .range(..=page.start)
                .next_back()
                .is_some_and(|(_, &end)| page.end <= end);
            if is_lazy && !guards.iter().any(|guard| guard.contains(page.start)) {
                found.push(page);
            }
        }
    }
    merge(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vma(start: u64, end: u64, path: &str) -> Vma {
        Vma {
            start,
            end,
            read: true,
            write: true,
            path: path.into(),
            ..Vma::default()
        }
    }

    #[test]
    fn kinds_of_mappings() {
        let kind = |path: &str| classify(&vma(0x1000, 0x2000, path));
        assert_eq!(kind(""), Ok(Some(Kind::Anon)));
        assert_eq!(kind("[heap]"), Ok(Some(Kind::Anon)));
        assert_eq!(kind("[stack]"), Ok(Some(Kind::Anon)));
        assert_eq!(kind("[vdso]"), Ok(Some(Kind::Vdso)));
        assert_eq!(kind("[vvar_vclock]"), Ok(Some(Kind::Vvar)));
        assert_eq!(kind("[vsyscall]"), Ok(None));
        assert_eq!(kind("/usr/bin/true"), Ok(Some(Kind::FilePrivate)));
        assert_eq!(kind("/[aio] (deleted)"), Err(RefusalKind::AioRing));
        assert_eq!(kind("/secretmem (deleted)"), Err(RefusalKind::SecretMemory));
        assert_eq!(
            kind("[uprobes]"),
            Err(RefusalKind::SpecialMapping {
                path: "[uprobes]".into()
            })
        );
        // Whether it is attached is seen when it is looked at.
        assert_eq!(kind("/SYSV00000000 (deleted)"), Ok(Some(Kind::FilePrivate)));
        assert_eq!(kind("/memfd:x (deleted)"), Ok(Some(Kind::FilePrivate)));
        assert!(matches!(
            kind("anon_inode:[io_uring]"),
            Err(RefusalKind::DeviceMapping { .. })
        ));
        let shared = Vma {
            shared: true,
            ..vma(0x1000, 0x2000, "/dev/zero (deleted)")
        };
        assert_eq!(classify(&shared), Ok(Some(Kind::Shared)));
        assert_eq!(
            classify(&vma(1 << 47, (1 << 47) + 4096, "")),
            Err(RefusalKind::HighMapping)
        );
    }

    #[test]
    fn flags_are_kept_by_a_grown_mapping_and_not_by_a_new_one() {
        let old = [
            Vma {
                page_bytes: 4096,
                ..vma(0x1000, 0x3000, "[heap]")
            },
            vma(0x8000, 0x9000, ""),
        ];
        assert!(known_flags(&vma(0x1000, 0x5000, "[heap]"), &old).is_some());
        assert!(known_flags(&vma(0x2000, 0x3000, "[heap]"), &old).is_some());
        assert!(known_flags(&vma(0x5000, 0x6000, ""), &old).is_none());
        assert!(
            known_flags(
                &Vma {
                    write: false,
                    ..vma(0x8000, 0x9000, "")
                },
                &old
            )
            .is_none()
        );
    }

    #[test]
    fn first_touch_pages_are_lazy_ones_only() {
        let vmas = [
            vma(0x10_0000, 0x12_0000, "/bin/x"),
            vma(0x20_0000, 0x30_0000, ""),
        ];
        let thread = FirstTouch {
            instruction: 0x10_0010,
            stack: 0x20_0008,
            thread_pointer: 0x28_0f00,
            areas: [(0x28_1fe0, 32), (0, 24), (0x10_0000, 4)],
        };
        let guards = [PageRange {
            start: 0x28_1000,
            end: 0x28_2000,
        }];
        let pages = first_touch_pages(&[thread], &[], &vmas, &guards);
        assert_eq!(
            pages,
            [
                PageRange {
                    start: 0x20_0000,
                    end: 0x20_1000
                },
                PageRange {
                    start: 0x28_0000,
                    end: 0x28_1000
                }
            ]
        );
    }

    #[test]
    fn ranges_merge_and_pieces_cover() {
        let range = |start, end| PageRange { start, end };
        assert_eq!(
            merge(vec![range(5, 7), range(1, 3), range(3, 4), range(6, 9)]),
            [range(1, 4), range(5, 9)]
        );
        let holes = [range(0, 2), range(4, 5), range(8, 12)];
        assert_eq!(
            without(vec![range(1, 6), range(7, 9), range(20, 21)], &holes),
            [range(2, 4), range(5, 6), range(7, 8), range(20, 21)]
        );
        let long = range(0x1000, 0x1000 + (130 << 20));
        let cut: Vec<_> = pieces(long).collect();
        assert_eq!(cut.len(), 3);
        assert_eq!((cut[0].start, cut[2].end), (long.start, long.end));
        assert!(cut.windows(2).all(|pair| pair[0].end == pair[1].start));
    }
}
