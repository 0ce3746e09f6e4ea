//! The frozen process as a source of pages: its memory is read in place, and no copy of it is kept.
//!
//! A page is looked up in the page map before it is read, because reading a hole would map a page into the source. What is
//! neither data nor known to read as zeros is told as such ([`PageKind::Guard`], [`PageKind::Gone`]), never as zeros.

use std::fs::File;

use pageferry_image::model::memory::Kind;
use pageferry_image::page::{PAGE_LEN, PageRange};
use pageferry_image::store;
use pageferry_tracee::pagemap::{self, Region, Scan};
use pageferry_tracee::{Error as ProcessError, RemoteMemory, procfs};
use pageferry_wire::limits::{BATCH_DATA_PAGES_MAX, BATCH_PAGES_MAX};
use pageferry_wire::message::Map;
use pageferry_wire::{PageBatch, PageBatchBuilder, PageKind};

use crate::Result;
use crate::capture::memory;

/// What a page of the process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    /// Bytes of its own.
    Data,
    /// A page of a file, copied when it was written: bytes of its own even if they are zeros, since without it the file's show.
    Copied,
    /// There, and nothing but zeros.
    Zero,
    /// Never touched: reads as zeros.
    Hole,
    /// The page of the file that is mapped there, which is not served from here.
    File,
    /// A guard region.
    Guard,
    /// Nothing that has pages of its own is mapped there.
    Unmapped,
}

impl Content {
    /// For a peer.
    fn on_wire(self) -> PageKind {
        match self {
            Self::Data | Self::Copied => PageKind::Data,
            Self::Zero | Self::Hole => PageKind::Zero,
            Self::Guard => PageKind::Guard,
            Self::File | Self::Unmapped => PageKind::Gone,
        }
    }

    /// For an image; `None`: it has no such page.
    fn at_rest(self) -> Option<store::PageKind> {
        match self {
            Self::Data | Self::Copied => Some(store::PageKind::Data),
            Self::Zero => Some(store::PageKind::Zero),
            Self::Hole | Self::File => Some(store::PageKind::Hole),
            Self::Guard => Some(store::PageKind::Guard),
            Self::Unmapped => None,
        }
    }
}

/// Pages as [`PageReader::read_all`] hands them on.
#[derive(Debug)]
pub enum Piece<'a> {
    /// Their bytes.
    Bytes(&'a [u8]),
    /// They have none.
    Without(store::PageKind),
}

/// Pages of data that are read at once.
const PIECE_PAGES: usize = 256;

/// What a mapping's pages are when the page map says nothing about them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backing {
    /// Private anonymous: zeros.
    Anonymous,
    /// A private mapping of a file: the file's, which is not served from here.
    File,
}

/// Reads the pages of one frozen process. Every thread that serves pages has its own.
#[derive(Debug)]
pub struct PageReader {
    /// Number of the address space.
    object: u32,
    memory: RemoteMemory,
    pagemap: File,
    /// The mappings that have pages of their own, ascending. The process is frozen, so they stay.
    mappings: Vec<(PageRange, Backing)>,
    /// Whether the kernel tells guard pages from swapped ones.
    knows_guards: bool,
    buffer: Vec<u8>,
}

impl PageReader {
    /// A reader of the frozen process `pid`, whose address space has the number `object`.
    ///
    /// # Errors
    /// [`Error::Process`](crate::Error::Process).
    pub fn open(object: u32, pid: i32) -> Result<Self> {
        let mappings = procfs::maps(pid)?
            .iter()
            .filter_map(|vma| {
                let backing = match memory::classify(vma) {
                    Ok(Some(Kind::Anon)) => Backing::Anonymous,
                    Ok(Some(Kind::FilePrivate)) => Backing::File,
                    _ => return None,
                };
                Some((
                    PageRange {
                        start: vma.start,
                        end: vma.end,
                    },
                    backing,
                ))
            })
            .collect();
        Ok(Self {
            object,
            memory: RemoteMemory::open(pid)?,
            pagemap: pagemap::open(pid)?,
            mappings,
            knows_guards: pagemap::knows_guards()?,
            buffer: Vec::new(),
        })
    }

    /// The first pages of `range`, as many as one batch takes: go on at the end of the batch's range.
    ///
    /// # Errors
    /// [`Error::Process`](crate::Error::Process). A page that cannot be read is no error but [`PageKind::Gone`].
    ///
    /// # Panics
    /// If `range` is empty.
    pub fn batch(&mut self, request: u64, range: PageRange) -> Result<PageBatch> {
        assert!(!range.is_empty(), "pages are asked for");
        let page_count = range.page_count().min(u64::from(BATCH_PAGES_MAX));
        let range = PageRange {
            start: range.start,
            end: range.start + page_count * PAGE_LEN as u64,
        };
        let segments = self.segments(range)?;
        let data_pages: u64 = segments
            .iter()
            .filter(|(content, _)| content.on_wire() == PageKind::Data)
            .map(|(_, range)| range.page_count())
            .sum();
        let data_pages = usize::try_from(data_pages.min(u64::from(BATCH_DATA_PAGES_MAX)))
            .expect("a batch is small");
        let mut builder = PageBatchBuilder::new(self.object, request, range.start, data_pages);
        for (content, segment) in segments {
            if !builder.has_room() {
                break;
            }
            if content.on_wire() != PageKind::Data {
                builder.without_data(content.on_wire(), pages_of(segment));
            } else if !self.read(segment, content, &mut builder)? {
                break;
            }
        }
        // Last, so that it speaks for all that was found: a copy that somebody killed has holes only.
        self.memory.check_exists()?;
        Ok(builder.finish())
    }

    /// What the pages of `range` are, as runs without gaps.
    fn segments(&self, range: PageRange) -> Result<Vec<(Content, PageRange)>> {
        let guard = if self.knows_guards { pagemap::GUARD } else { 0 };
        let regions = pagemap::scan(
            &self.pagemap,
            &Scan {
                range: range.start..range.end,
                category_anyof: pagemap::PRESENT | pagemap::SWAPPED,
                return_mask: pagemap::FILE | pagemap::PFNZERO | guard,
                ..Scan::default()
            },
        )?;
        Ok(segments(range, &self.mappings, &regions))
    }

    /// Hands on every page of `range`, ascending, as an image holds it; neighbours in pieces. What `sink` gives instead of going on
    /// is given back.
    ///
    /// # Errors
    /// [`Error::Process`](crate::Error::Process); also for a page that cannot be read, and for a process that has ended.
    pub fn read_all<E>(
        &mut self,
        range: PageRange,
        mut sink: impl FnMut(PageRange, Piece<'_>) -> std::result::Result<(), E>,
    ) -> Result<std::result::Result<(), E>> {
        for part in memory::pieces(range) {
            for (content, segment) in self.segments(part)? {
                let kind = content.at_rest().ok_or_else(|| ProcessError::Unreadable {
                    pid: self.memory.pid(),
                    address: segment.start,
                })?;
                if kind != store::PageKind::Data {
                    if let Err(error) = sink(segment, Piece::Without(kind)) {
                        return Ok(Err(error));
                    }
                    continue;
                }
                self.buffer.resize(PIECE_PAGES * PAGE_LEN, 0);
                let mut at = segment.start;
                while at < segment.end {
                    let length = usize::try_from(segment.end - at)
                        .unwrap_or(usize::MAX)
                        .min(self.buffer.len());
                    let bytes = &mut self.buffer[..length];
                    self.memory.read(at, bytes)?;
                    let end = at + length as u64;
                    if let Err(error) = sink(PageRange { start: at, end }, Piece::Bytes(bytes)) {
                        return Ok(Err(error));
                    }
                    at = end;
                }
            }
            // Speaks for all that was found: a copy that somebody killed has holes only.
            self.memory.check_exists()?;
        }
        Ok(Ok(()))
    }

    /// Appends the pages of `segment` as far as they fit; whether all did.
    fn read(
        &mut self,
        segment: PageRange,
        content: Content,
        builder: &mut PageBatchBuilder,
    ) -> Result<bool> {
        let asked = usize::try_from(segment.page_count()).expect("cut to a batch above");
        // Zero pages among them take no room, so this may leave some unused; the next batch takes the rest.
        let page_count = asked.min(builder.data_pages_left());
        let length = page_count * PAGE_LEN;
        if self.buffer.len() < length {
            self.buffer.resize(length, 0);
        }
        let all = match self.memory.read(segment.start, &mut self.buffer[..length]) {
            Ok(()) => true,
            Err(ProcessError::Unreadable { .. }) => false,
            Err(error) => return Err(error.into()),
        };
        for page in 0..page_count {
            if !builder.has_room() {
                return Ok(false);
            }
            let bytes = &mut self.buffer[page * PAGE_LEN..(page + 1) * PAGE_LEN];
            if !all {
                // One of them failed: which one shows when each is read alone.
                match self
                    .memory
                    .read(segment.start + (page * PAGE_LEN) as u64, bytes)
                {
                    Ok(()) => {}
                    Err(ProcessError::Unreadable { address, .. }) => {
                        tracing::warn!(address, "a page of the frozen process cannot be read");
                        builder.without_data(PageKind::Gone, 1);
                        continue;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            if content == Content::Data && *bytes == [0; PAGE_LEN] {
                builder.without_data(PageKind::Zero, 1);
            } else {
                builder.data(1).copy_from_slice(bytes);
            }
        }
        Ok(page_count == asked)
    }

    /// Which pages of `lazy` have data, or are guards that were not known before: one frame for each 64 MiB that has any, with
    /// the number of its pages. Ranges must be ascending and disjoint.
    pub fn page_map<'r>(
        &'r self,
        lazy: &'r [PageRange],
    ) -> impl Iterator<Item = Result<(Map, u64)>> + use<'r> {
        let mut from = 0;
        lazy.iter()
            .flat_map(|&range| memory::pieces(range))
            .filter_map(move |piece| {
                let regions = match self.mapped(piece) {
                    Ok(regions) if regions.is_empty() => return None,
                    Ok(regions) => regions,
                    Err(error) => return Some(Err(error)),
                };
                let mut map = Map {
                    from,
                    runs: Vec::with_capacity(regions.len() * 2),
                    object: self.object,
                };
                let mut page_count = 0;
                for region in memory::merge(regions) {
                    map.runs.push(region.start / PAGE_LEN as u64 - from);
                    map.runs.push(region.page_count());
                    page_count += region.page_count();
                    from = region.end / PAGE_LEN as u64;
                }
                Some(Ok((map, page_count)))
            })
    }

    fn mapped(&self, piece: PageRange) -> Result<Vec<PageRange>> {
        let scan = Scan {
            range: piece.start..piece.end,
            category_inverted: pagemap::PFNZERO,
            category_mask: pagemap::PFNZERO,
            category_anyof: pagemap::PRESENT | pagemap::SWAPPED,
            return_mask: 0,
        };
        // Tried twice: the process runs on the target by now, and one failed look must not keep its pages from it.
        let regions =
            pagemap::scan(&self.pagemap, &scan).or_else(|_| pagemap::scan(&self.pagemap, &scan))?;
        self.memory
            .check_exists()
            .or_else(|_| self.memory.check_exists())?;
        Ok(regions
            .iter()
            .map(|region| PageRange {
                start: region.start,
                end: region.end,
            })
            .collect())
    }
}

fn pages_of(range: PageRange) -> u32 {
    u32::try_from(range.page_count()).expect("cut to a batch")
}

/// What the pages of `range` are, from its mappings and what the page map says of it.
fn segments(
    range: PageRange,
    mappings: &[(PageRange, Backing)],
    regions: &[Region],
) -> Vec<(Content, PageRange)> {
    let mut found: Vec<(Content, PageRange)> = Vec::new();
    let mut push = |content, start, end| match found.last_mut() {
        _ if start == end => {}
        Some((last, before)) if *last == content => before.end = end,
        _ => found.push((content, PageRange { start, end })),
    };
    let mut at = range.start;
    let first = mappings.partition_point(|(mapping, _)| mapping.end <= range.start);
    for (part, backing) in mappings[first..]
        .iter()
        .map_while(|&(mapping, backing)| mapping.intersect(range).map(|part| (part, backing)))
    {
        push(Content::Unmapped, at, part.start);
        at = part.start;
        let untold = if backing == Backing::Anonymous {
            Content::Hole
        } else {
            Content::File
        };
        for region in regions {
            let Some(told) = part.intersect(PageRange {
                start: region.start,
                end: region.end,
            }) else {
                continue;
            };
            let has = |category| region.categories & category != 0;
            let content = if has(pagemap::GUARD) {
                Content::Guard
            } else if has(pagemap::FILE) {
                Content::File
            } else if has(pagemap::PFNZERO) && backing == Backing::Anonymous {
                Content::Zero
            } else if backing == Backing::Anonymous {
                Content::Data
            } else {
                Content::Copied
            };
            push(untold, at, told.start);
            push(content, told.start, told.end);
            at = told.end;
        }
        push(untold, at, part.end);
        at = part.end;
    }
    push(Content::Unmapped, at, range.end);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = PAGE_LEN as u64;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange {
            start: start * PAGE,
            end: end * PAGE,
        }
    }

    fn region(start: u64, end: u64, categories: u64) -> Region {
        Region {
            start: start * PAGE,
            end: end * PAGE,
            categories,
        }
    }

    /// The page tables of a process that has ended look like those of one that has touched nothing.
    #[test]
    fn a_process_that_has_ended_is_no_process_full_of_zeros() {
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .expect("coreutils");
        let pid = i32::try_from(child.id()).expect("a pid");
        // Its memory changes hands in the exec.
        while std::fs::read_link(format!("/proc/{pid}/exe")).ok()
            == std::fs::read_link("/proc/self/exe").ok()
        {
            std::thread::yield_now();
        }
        let mut reader = PageReader::open(1, pid).expect("a reader");
        let (range, _) = *reader
            .mappings
            .iter()
            .find(|(_, backing)| *backing == Backing::Anonymous)
            .expect("a heap");
        let alive = reader.batch(1, range).map(|batch| batch.range());
        let mapped = reader.page_map(&[range]).all(|piece| piece.is_ok());
        child.kill().expect("it runs");
        child.wait().expect("it ends");
        assert!(mapped && alive.is_ok());
        assert!(reader.batch(2, range).is_err());
        assert!(reader.page_map(&[range]).any(|piece| piece.is_err()));
    }

    #[test]
    fn what_is_not_known_to_be_zero_is_never_told_as_zero() {
        let mappings = [
            (range(10, 20), Backing::Anonymous),
            (range(20, 30), Backing::File),
            (range(40, 50), Backing::Anonymous),
        ];
        let regions = [
            region(12, 14, 0),
            region(14, 15, pagemap::PFNZERO),
            region(16, 17, pagemap::GUARD),
            region(18, 22, 0),
            region(25, 26, pagemap::FILE),
        ];
        assert_eq!(
            segments(range(8, 45), &mappings, &regions),
            [
                (Content::Unmapped, range(8, 10)),
                (Content::Hole, range(10, 12)),
                (Content::Data, range(12, 14)),
                (Content::Zero, range(14, 15)),
                (Content::Hole, range(15, 16)),
                (Content::Guard, range(16, 17)),
                (Content::Hole, range(17, 18)),
                (Content::Data, range(18, 20)),
                (Content::Copied, range(20, 22)),
                (Content::File, range(22, 30)),
                (Content::Unmapped, range(30, 40)),
                (Content::Hole, range(40, 45)),
            ]
        );
        assert_eq!(
            segments(range(1, 3), &mappings, &regions),
            [(Content::Unmapped, range(1, 3))]
        );
        for content in [Content::File, Content::Unmapped] {
            assert_eq!(content.on_wire(), PageKind::Gone);
        }
        assert_eq!(Content::Unmapped.at_rest(), None);
    }
}
