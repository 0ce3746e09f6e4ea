//! `PAGEMAP_SCAN`: which pages of a process exist, were written, or are guards, in one call for a whole range.
//!
//! It hides the ioctl and its paging through long answers; it keeps no state and must never re-arm write tracking unless the
//! caller asked for it, because a scan that re-arms takes a debt: its pages are known to nobody else.
//!
//! # Safety
//! The one unsafe block hands the kernel a structure and a vector that it fills; both live on our side for the whole call.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};

use nix::errno::Errno;

use crate::choke::{self, Kind};
use crate::error::{Error, Result};
use crate::host::PAGE_SIZE;

/// The page is in a range that a userfaultfd tracks with `WP_ASYNC`.
pub const WPALLOWED: u64 = 1 << 0;
/// Written since it was last armed, or never armed.
pub const WRITTEN: u64 = 1 << 1;
/// Belongs to a file, or is shared.
pub const FILE: u64 = 1 << 2;
/// In memory.
pub const PRESENT: u64 = 1 << 3;
/// In swap. **A guard page has this bit too** (seen on 6.18): a scan for memory to carry inverts [`GUARD`] as well.
pub const SWAPPED: u64 = 1 << 4;
/// The shared page of zeros.
pub const PFNZERO: u64 = 1 << 5;
/// Part of a huge page.
pub const HUGE: u64 = 1 << 6;
/// Soft-dirty. Never set without `CONFIG_MEM_SOFT_DIRTY`.
pub const SOFT_DIRTY: u64 = 1 << 7;
/// A guard page of `MADV_GUARD_INSTALL`. Kernels before 6.15 answer `EINVAL` to it; they have had no other way to tell
/// guards (6.13, 6.14).
pub const GUARD: u64 = 1 << 8;

const SCAN_WP_MATCHING: u64 = 1 << 0;
const SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// What [`scan`] looks for. A page matches when, after flipping the bits of `category_inverted`, it has all of `category_mask`
/// and, unless that is 0, one of `category_anyof`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// Addresses, page aligned.
    pub range: Range<u64>,
    /// Categories to invert before matching.
    pub category_inverted: u64,
    /// Categories a page must have.
    pub category_mask: u64,
    /// Categories of which it must have one; 0 = no such condition.
    pub category_anyof: u64,
    /// Categories to report. Asking for [`WRITTEN`] alone is several times faster than asking for all.
    pub return_mask: u64,
}

/// A run of pages that matched and have the same reported categories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// One past the last address.
    pub end: u64,
    /// Those of `return_mask` that hold.
    pub categories: u64,
}

/// `struct pm_scan_arg` (linux/fs.h, 6.7).
#[repr(C)]
struct Argument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610;
const _: () = assert!(size_of::<Argument>() == 96);
const _: () = assert!(size_of::<PageRegion>() == 24);
const _: () =
    assert!(PAGEMAP_SCAN == nix::request_code_readwrite!(b'f', 16, size_of::<Argument>()));

/// Regions taken from the kernel in one call: 48 KiB of answers.
const REGIONS_PER_CALL: usize = 2048;

/// Opens `/proc/<pid>/pagemap`.
///
/// # Errors
/// [`Error::Gone`]; [`Error::Path`].
pub fn open(pid: i32) -> Result<File> {
    let path = format!("/proc/{pid}/pagemap");
    choke::pass(Kind::Proc).map_err(|errno| Error::path("open", path.as_str(), errno))?;
    File::open(&path).map_err(|error| {
        match error.raw_os_error().map_or(Errno::EIO, Errno::from_raw) {
            Errno::ENOENT | Errno::ESRCH => Error::Gone { pid },
            errno => Error::path("open", path.as_str(), errno),
        }
    })
}

/// The matching pages of a range, ascending, neighbours with equal categories joined.
///
/// # Errors
/// [`Error::Kernel`]: `EINVAL` for a category this kernel does not know, `ENOTTY` before 6.7. `pid` in it is 0: the descriptor
/// does not tell.
pub fn scan(pagemap: &File, scan: &Scan) -> Result<Vec<Region>> {
    let mut found = Vec::new();
    each(pagemap, scan, false, |region| found.push(region))?;
    Ok(found)
}

/// As [`scan`], and arms every matching page again for write tracking, in the same step of the kernel.
///
/// The caller owns the answer like a debt: pages that are then not carried must be remembered as written. The range has to be
/// registered for `WP_ASYNC` throughout.
///
/// # Errors
/// As [`scan`]; `EPERM` where the range is not registered. What was re-armed before the error is lost: treat all as written.
pub fn scan_and_protect(pagemap: &File, scan: &Scan) -> Result<Vec<Region>> {
    let mut found = Vec::new();
    each(pagemap, scan, true, |region| found.push(region))?;
    Ok(found)
}

/// Arms every matching page of a range for write tracking without reporting any.
///
/// # Errors
/// As [`scan_and_protect`].
pub fn protect(pagemap: &File, scan: &Scan) -> Result<()> {
    let mut argument = argument(scan, SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC, &mut []);
    argument.return_mask = 0;
    while argument.start < argument.end {
        call(pagemap.as_fd(), &mut argument)?;
        let reached = argument.walk_end;
        advance(&mut argument, reached)?;
    }
    Ok(())
}

/// Whether this kernel reports guard pages (6.15).
///
/// # Errors
/// [`Error::Kernel`] where there is no page map to ask.
pub fn knows_guards() -> Result<bool> {
    let pagemap = open(std::process::id() as i32)?;
    let question = Scan {
        category_mask: GUARD,
        return_mask: GUARD,
        ..Scan::default()
    };
    let mut answer = argument(&question, 0, &mut []);
    match call(pagemap.as_fd(), &mut answer) {
        Ok(_) => Ok(true),
        Err(Error::Kernel {
            errno: Errno::EINVAL,
            ..
        }) => Ok(false),
        Err(error) => Err(error),
    }
}

fn each(pagemap: &File, scan: &Scan, protect: bool, mut take: impl FnMut(Region)) -> Result<()> {
    let flags = if protect {
        SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC
    } else {
        0
    };
    // No more answers than pages: most questions are about a few, and filling 48 KiB took longer than the answer.
    let page_count = (scan.range.end.saturating_sub(scan.range.start) / PAGE_SIZE) as usize;
    let mut answers = vec![PageRegion::default(); page_count.clamp(1, REGIONS_PER_CALL)];
    let mut argument = argument(scan, flags, &mut answers);
    let mut last: Option<Region> = None;
    while argument.start < argument.end {
        let count = call(pagemap.as_fd(), &mut argument)?;
        // The kernel collects 512 answers at a time and leaves `walk_end` where an earlier collection was full although the walk
        // went on to the end (seen on 6.18): everything up to the last answer has been reported in any case.
        let reached = answers
            .get(..count)
            .and_then(<[PageRegion]>::last)
            .map_or(argument.walk_end, |last| argument.walk_end.max(last.end));
        for answer in answers.iter().take(count) {
            match &mut last {
                // The kernel joins neighbours, but not across two calls.
                Some(region)
                    if region.end == answer.start && region.categories == answer.categories =>
                {
                    region.end = answer.end;
                }
                _ => {
                    let region = Region {
                        start: answer.start,
                        end: answer.end,
                        categories: answer.categories,
                    };
                    if let Some(done) = last.replace(region) {
                        take(done);
                    }
                }
            }
        }
        advance(&mut argument, reached)?;
    }
    if let Some(done) = last {
        take(done);
    }
    Ok(())
}

fn argument(scan: &Scan, flags: u64, answers: &mut [PageRegion]) -> Argument {
    Argument {
        size: size_of::<Argument>() as u64,
        flags,
        start: scan.range.start,
        end: scan.range.end,
        walk_end: 0,
        vec: if answers.is_empty() {
            0
        } else {
            answers.as_mut_ptr() as u64
        },
        vec_len: answers.len() as u64,
        max_pages: 0,
        category_inverted: scan.category_inverted,
        category_mask: scan.category_mask,
        category_anyof_mask: scan.category_anyof,
        return_mask: scan.return_mask,
    }
}

/// Goes on from where the kernel stopped because the vector was full.
fn advance(argument: &mut Argument, reached: u64) -> Result<()> {
    if reached <= argument.start {
        return Err(Error::kernel("ioctl(PAGEMAP_SCAN)", 0, Errno::EIO));
    }
    argument.start = reached;
    Ok(())
}

fn call(pagemap: BorrowedFd<'_>, argument: &mut Argument) -> Result<usize> {
    const WHAT: &str = "ioctl(PAGEMAP_SCAN)";
    choke::pass(Kind::Ioctl).map_err(|errno| Error::kernel(WHAT, 0, errno))?;
    // SAFETY: `argument` is a `struct pm_scan_arg` of the size it states; its vector, when there is one, has `vec_len` elements
    // and is only read by our callers after the call.
    let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut *argument) };
    Errno::result(count)
        .map(|count| count as usize)
        .map_err(|errno| Error::kernel(WHAT, 0, errno))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{alone, own_pid};
    use crate::uffd::{Features, Uffd};

    const PAGE: u64 = 4096;

    fn map(pages: u64) -> u64 {
        // SAFETY: a new mapping where the kernel likes, unmapped with the process.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                (pages * PAGE) as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(address, libc::MAP_FAILED);
        address as u64
    }

    fn poke(address: u64) {
        // SAFETY: the tests pass addresses of their own mappings, to which nothing refers.
        unsafe { std::ptr::write_volatile(address as *mut u8, 1) };
    }

    fn pages(regions: &[Region], from: u64) -> Vec<u64> {
        regions
            .iter()
            .flat_map(|region| (region.start..region.end).step_by(PAGE as usize))
            .map(|address| (address - from) / PAGE)
            .collect()
    }

    #[test]
    fn long_answers_come_whole() {
        alone(|| {
            let count = REGIONS_PER_CALL as u64 * 5;
            let at = map(count);
            let written: Vec<u64> = (0..count).step_by(2).collect();
            for page in &written {
                poke(at + page * PAGE);
            }
            let present = Scan {
                range: at..at + count * PAGE,
                category_mask: PRESENT,
                return_mask: PRESENT,
                ..Scan::default()
            };
            let pagemap = open(own_pid()).expect("open");
            let found = scan(&pagemap, &present).expect("scan");
            assert_eq!(found.len(), written.len());
            assert_eq!(pages(&found, at), written);
            // The holes are the inverse.
            let absent = Scan {
                category_inverted: PRESENT,
                return_mask: 0,
                ..present
            };
            let holes = pages(&scan(&pagemap, &absent).expect("scan"), at);
            assert_eq!(holes, (1..count).step_by(2).collect::<Vec<_>>());
        });
    }

    #[test]
    fn tracking_shows_what_was_written_since() {
        alone(|| {
            let at = map(16);
            for page in 0..8 {
                poke(at + page * PAGE);
            }
            let uffd = Uffd::create().expect("create");
            uffd.handshake(Features::WP_ASYNC | Features::WP_UNPOPULATED)
                .expect("handshake");
            uffd.register_tracking(at..at + 16 * PAGE)
                .expect("register");
            let pagemap = open(own_pid()).expect("open");
            let existing = Scan {
                range: at..at + 16 * PAGE,
                category_anyof: PRESENT | SWAPPED,
                ..Scan::default()
            };
            protect(&pagemap, &existing).expect("protect");
            let written = Scan {
                category_mask: WRITTEN,
                return_mask: WRITTEN,
                ..existing.clone()
            };
            assert_eq!(scan(&pagemap, &written).expect("scan"), []);
            // An armed page, and one that did not exist.
            poke(at + 3 * PAGE);
            poke(at + 12 * PAGE);
            let found = scan_and_protect(&pagemap, &written).expect("scan");
            assert_eq!(pages(&found, at), [3, 12]);
            assert_eq!(scan_and_protect(&pagemap, &written).expect("scan"), []);
            // Untracked memory cannot be armed.
            let other = map(1);
            poke(other);
            let outside = Scan {
                range: other..other + PAGE,
                ..written
            };
            assert!(matches!(
                scan_and_protect(&pagemap, &outside),
                Err(Error::Kernel {
                    errno: Errno::EPERM,
                    ..
                })
            ));
        });
    }

    #[test]
    fn an_unknown_category_is_an_error_and_guards_are_known() {
        let pagemap = open(own_pid()).expect("open");
        let unknown = Scan {
            range: 0x1_0000..0x1_1000,
            return_mask: 1 << 63,
            ..Scan::default()
        };
        assert!(matches!(
            scan(&pagemap, &unknown),
            Err(Error::Kernel {
                errno: Errno::EINVAL,
                ..
            })
        ));
        knows_guards().expect("an answer");
        assert!(matches!(open(i32::MAX), Err(Error::Gone { .. })));
    }
}
