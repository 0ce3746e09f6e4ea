//! An image as a source of pages: read in place, checked at every read, and nothing of it is kept.

use pageferry_image::model::memory::Kind;
use pageferry_image::model::task::Tree;
use pageferry_image::page::{PAGE_SIZE, PageRange};
use pageferry_image::store::{self, Image, ObjectId, PageRun, PageSource as _};
use pageferry_wire::limits::BATCH_DATA_PAGES_MAX;
use pageferry_wire::{PageBatch, PageBatchBuilder, PageKind};

use crate::Result;

/// Reads the pages of an image for those who run what it holds. Cheap to clone: every stream that serves pages has its own.
#[derive(Debug, Clone)]
pub struct ImagePages {
    image: Image,
}

/// The ranges of `tree`'s mappings of this kind, ascending; neighbours are one.
pub fn mapped(tree: &Tree, kind: Kind) -> Vec<PageRange> {
    let mut found: Vec<PageRange> = Vec::new();
    let spaces = tree.root.iter().filter_map(|root| root.space.as_ref());
    for mapping in spaces.flat_map(|space| &space.mappings) {
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

    /// The first pages of `range`, as many as one batch takes: go on at the end of the batch's range. Pages that the image does not
    /// have, and those of a file that were never copied, are [`PageKind::Gone`].
    ///
    /// # Errors
    /// [`Error::Image`](crate::Error::Image): the image is damaged there, or cannot be read.
    ///
    /// # Panics
    /// If `range` is empty.
    pub fn batch(&self, request: u64, range: PageRange) -> Result<PageBatch> {
        assert!(!range.is_empty(), "pages are asked for");
        let room = u64::from(BATCH_DATA_PAGES_MAX);
        let range = PageRange {
            start: range.start,
            end: range.end.min(range.start + room * PAGE_SIZE),
        };
        let runs = self.image.runs(ObjectId::ROOT_SPACE, range)?;
        let data: u64 = runs
            .iter()
            .filter(|run| self.is_data(run))
            .map(|run| run.range.page_count())
            .sum();
        let count = |pages: u64| usize::try_from(pages).expect("cut to a batch above");
        let mut builder = PageBatchBuilder::new(request, range.start, count(data));
        for run in runs {
            if !builder.has_room() {
                break;
            }
            let pages = run.range.page_count();
            match run.kind {
                Some(store::PageKind::Data) => {
                    let bytes = builder.data(count(pages));
                    self.image.read(ObjectId::ROOT_SPACE, run.range, bytes)?;
                }
                Some(store::PageKind::Zero) if self.is_data(&run) => {
                    builder.data(count(pages)).fill(0);
                }
                other => {
                    let kind = match other {
                        Some(store::PageKind::Zero) => PageKind::Zero,
                        Some(store::PageKind::Hole) if !self.is_file(run.range) => PageKind::Zero,
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
    fn is_data(&self, run: &PageRun) -> bool {
        match run.kind {
            Some(store::PageKind::Data) => true,
            Some(store::PageKind::Zero) => self.is_file(run.range),
            _ => false,
        }
    }

    /// Whether any of `range` lies in a mapping of a file.
    fn is_file(&self, range: PageRange) -> bool {
        let spaces = self.image.tree().root.iter();
        let mut mappings = spaces
            .filter_map(|root| root.space.as_ref())
            .flat_map(|space| {
                let first = space.mappings.partition_point(|m| m.end <= range.start);
                space.mappings[first..]
                    .iter()
                    .take_while(|mapping| mapping.start < range.end)
            });
        mappings.any(|mapping| mapping.kind() != Kind::Anon)
    }

    /// Hands on the ranges of `wanted` that have data, ascending, or guards that are not in the tree: what a page map tells. `wanted`
    /// must be ascending and disjoint.
    ///
    /// # Errors
    /// [`Error::Image`](crate::Error::Image).
    pub fn page_map(&self, wanted: &[PageRange], mut sink: impl FnMut(PageRange)) -> Result<()> {
        for &range in wanted {
            let mut at = range.start;
            while at < range.end {
                let left = PageRange {
                    start: at,
                    end: range.end,
                };
                for run in self.image.runs(ObjectId::ROOT_SPACE, left)? {
                    at = run.range.end;
                    if self.is_data(&run) || run.kind == Some(store::PageKind::Guard) {
                        sink(run.range);
                    }
                }
            }
        }
        Ok(())
    }
}
