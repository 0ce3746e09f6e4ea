//! An image as a source of pages: read in place, checked at every read, and nothing of it is kept.

use pageferry_image::model::memory::Kind;
use pageferry_image::model::task::{Process, Tree};
use pageferry_image::page::{PAGE_LEN, PAGE_SIZE, PageRange};
use pageferry_image::store::{self, Image, ObjectId, PageRun, PageSource as _};
use pageferry_wire::limits::BATCH_DATA_PAGES_MAX;
use pageferry_wire::{PageBatch, PageBatchBuilder, PageKind, Room};

use crate::Result;

/// Reads the pages of an image for those who run what it holds. Cheap to clone: every stream that serves pages has its own.
#[derive(Debug, Clone)]
pub struct ImagePages {
    image: Image,
}

/// The ranges of every process of `tree` that an image has pages of, or has none because they are zeros: the number of its address
/// space, and what is mapped there, ascending; behind them the same of every shared object.
pub fn all_mapped(tree: &Tree) -> Vec<(u32, Vec<PageRange>)> {
    let mapped = |process| {
        let mut ranges = mapped(process, Kind::Anon);
        ranges.extend(self::mapped(process, Kind::FilePrivate));
        ranges.sort_unstable();
        ranges
    };
    let spaces = tree.processes.iter().map(mapped);
    let objects = shared(tree).map(|(_, pages)| vec![pages]);
    (1..).zip(spaces.chain(objects)).collect()
}

/// The number of every shared object of `tree`, and all its pages.
pub fn shared(tree: &Tree) -> impl Iterator<Item = (u32, PageRange)> + '_ {
    let process_count = tree.processes.len();
    let each = tree.shared.iter().enumerate();
    each.map(move |(index, shared)| (ObjectId::shared(process_count, index).0, shared.pages()))
}

/// The ranges of the process' mappings of this kind, ascending; neighbours are one.
pub fn mapped(process: &Process, kind: Kind) -> Vec<PageRange> {
    let mut found: Vec<PageRange> = Vec::new();
    for mapping in process.space.iter().flat_map(|space| &space.mappings) {
        if mapping.kind() != kind {
            continue;
        }
        match found.last_mut() {
            Some(last) if last.end == mapping.start => last.end = mapping.end,
            _ => found.push(PageRange {
                start: mapping.start,
                end: mapping.end,
            }),
        }
    }
    found
}

impl ImagePages {
    /// The pages of `image`.
    pub fn new(image: Image) -> Self {
        Self { image }
    }

    /// Whose they are.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// The first pages of a range of `object`, as many as one batch takes: go on at the end of the batch's range. Pages that the
    /// image does not have, and those of a file that were never copied, are [`PageKind::Gone`].
    ///
    /// # Errors
    /// [`Error::Image`](crate::Error::Image): the image is damaged there, or cannot be read.
    ///
    /// # Panics
    /// If `range` is empty.
    pub fn batch(&self, object: u32, request: u64, range: PageRange) -> Result<PageBatch> {
        self.batch_of(
            object,
            request,
            range,
            BATCH_DATA_PAGES_MAX as usize,
            |pages| vec![0_u8; pages * PAGE_LEN],
        )
    }

    /// The same with as many pages as fit `room`.
    ///
    /// # Errors
    /// As [`Self::batch`].
    ///
    /// # Panics
    /// If `range` is empty, or no page fits `room`, or more than a batch takes.
    pub fn batch_within(
        &self,
        object: u32,
        request: u64,
        range: PageRange,
        room: impl Room,
    ) -> Result<PageBatch> {
        let pages_max = room.as_ref().len() / PAGE_LEN;
        assert!(pages_max > 0, "there is room for a page");
        self.batch_of(object, request, range, pages_max, |_| room)
    }

    /// The first `pages_max` pages of `range`, those with data in what `room` gives for their number.
    fn batch_of<R: Room>(
        &self,
        object: u32,
        request: u64,
        range: PageRange,
        pages_max: usize,
        room: impl FnOnce(usize) -> R,
    ) -> Result<PageBatch> {
        assert!(!range.is_empty(), "pages are asked for");
        let range = PageRange {
            start: range.start,
            end: range.end.min(range.start + pages_max as u64 * PAGE_SIZE),
        };
        let runs = self.image.runs(ObjectId(object), range)?;
        let data: u64 = runs
            .iter()
            .filter(|run| self.is_data(object, run))
            .map(|run| run.range.page_count())
            .sum();
        let count = |pages: u64| usize::try_from(pages).expect("cut to a batch above");
        let room = room(count(data));
        let mut builder = PageBatchBuilder::within(object, request, range.start, room);
        for run in runs {
            if !builder.has_room() {
                break;
            }
            let pages = run.range.page_count();
            match run.kind {
                Some(store::PageKind::Data) => {
                    let bytes = builder.data(count(pages));
                    self.image.read(ObjectId(object), run.range, bytes)?;
                }
                Some(store::PageKind::Zero) if self.is_data(object, &run) => {
                    builder.data(count(pages)).fill(0);
                }
                other => {
                    let kind = match other {
                        Some(store::PageKind::Zero) => PageKind::Zero,
                        Some(store::PageKind::Hole) if !self.is_file(object, run.range) => {
                            PageKind::Zero
                        }
                        Some(store::PageKind::Guard) => PageKind::Guard,
                        _ => PageKind::Gone,
                    };
                    builder.without_data(kind, count(pages) as u32);
                }
            }
        }
        Ok(builder.finish())
    }

    /// Whether these pages must be brought: also zeros in a mapping of a file, which were copied when they were written. Without them
    /// the file's bytes would show.
    fn is_data(&self, object: u32, run: &PageRun) -> bool {
        match run.kind {
            Some(store::PageKind::Data) => true,
            Some(store::PageKind::Zero) => self.is_file(object, run.range),
            _ => false,
        }
    }

    /// Whether any of `range` lies in a mapping of a file.
    fn is_file(&self, object: u32, range: PageRange) -> bool {
        let index = usize::try_from(object).unwrap_or(0).wrapping_sub(1);
        let process = self.image.tree().processes.get(index);
        let mut mappings = process
            .and_then(|process| process.space.as_ref())
            .into_iter()
            .flat_map(|space| {
                let first = space.mappings.partition_point(|m| m.end <= range.start);
                space.mappings[first..]
                    .iter()
                    .take_while(|mapping| mapping.start < range.end)
            });
        mappings.any(|mapping| mapping.kind() != Kind::Anon)
    }

    /// Hands on the ranges of `wanted` in `object` that have data, ascending, or guards that are not in the tree: what a page map
    /// tells. `wanted` must be ascending and disjoint.
    ///
    /// # Errors
    /// [`Error::Image`](crate::Error::Image).
    pub fn page_map(
        &self,
        object: u32,
        wanted: &[PageRange],
        mut sink: impl FnMut(PageRange),
    ) -> Result<()> {
        for &range in wanted {
            let mut at = range.start;
            while at < range.end {
                let left = PageRange {
                    start: at,
                    end: range.end,
                };
                for run in self.image.runs(ObjectId(object), left)? {
                    at = run.range.end;
                    if self.is_data(object, &run) || run.kind == Some(store::PageKind::Guard) {
                        sink(run.range);
                    }
                }
            }
        }
        Ok(())
    }
}
