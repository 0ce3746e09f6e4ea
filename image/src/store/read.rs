//! Reading an image: everything but the page bytes is checked when it is opened, those when they are read.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::header::{self, Counts, Header};
use super::leaves::{Leaf, Leaves, Opened};
use super::pagemap::{self, Block, Coverage, Range};
use super::{
    BLOCK_LEN, BLOCK_PAGES, BLOCKS, Damage, Error, FILES, HEADER, MAP, ObjectId, PAGES, PageKind,
    PageRun, PageSource, Result, TREE, check_tree, limits,
};
use crate::encoding;
use crate::model::task::Tree;
use crate::page::{PAGE_LEN, PAGE_SIZE, PageRange};

/// An open image. Cloning shares it; it may be read by any number of threads at once.
#[derive(Debug, Clone)]
pub struct Image(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    header: Header,
    tree: Tree,
    map: Leaves<{ pagemap::RANGE_LEN }>,
    /// The first range of each leaf of the map.
    fences: Vec<Fence>,
    blocks: Leaves<{ pagemap::BLOCK_LEN }>,
    pages: Opened,
}

#[derive(Debug, Clone, Copy)]
struct Fence {
    object: ObjectId,
    start: u64,
    data_before: u64,
}

/// What the pages of one object take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Which.
    pub object: ObjectId,
    /// Its pages.
    pub counts: Counts,
}

impl Header {
    /// Reads the header of the image at `path`, and nothing else.
    ///
    /// # Errors
    /// [`Error`].
    pub fn of(path: &Path) -> Result<Self> {
        let metadata = path.metadata().map_err(Error::io(path, "look at it"))?;
        let bad = Error::bad(path);
        if !metadata.is_dir() {
            return Err(bad(Damage::NoHeader));
        }
        let file = Opened::open(path, HEADER).map_err(|error| match error {
            Error::Bad {
                damage: Damage::Missing { .. },
                ..
            } => bad(Damage::NoHeader),
            error => error,
        })?;
        let len = file.len()?;
        // One byte more than a header has tells that the file is too long.
        let mut bytes = vec![0; len.min(header::LEN as u64 + 1) as usize];
        file.read(&mut bytes, 0)?;
        Self::decode(&bytes).map_err(|damage| match damage {
            Damage::HeaderLength { .. } => bad(Damage::HeaderLength { len }),
            damage => bad(damage),
        })
    }
}

impl Image {
    /// Opens the image at `path`, and checks all of it but the page bytes: header, checksums, the rules of the model, the order
    /// and completeness of the page map, the table of blocks.
    ///
    /// # Errors
    /// [`Error`]. Nothing has been decoded before its checksum was right, nor allocated for a length that is not there.
    pub fn open(path: &Path) -> Result<Self> {
        let header = Header::of(path)?;
        let bad = Error::bad(path);
        let open = |name, len| {
            let file = Opened::open(path, name)?;
            file.check_len(len)?;
            Ok(file)
        };
        let tree = open(TREE, header.tree.len)?;
        let map = Leaves::new(open(MAP, header.map.len)?, header.map.len);
        let blocks = Leaves::new(open(BLOCKS, header.blocks.len)?, header.blocks.len);
        let pages = open(PAGES, header.pages.len)?;

        let mut bytes = vec![0; header.tree.len as usize];
        tree.read(&mut bytes, 0)?;
        if crc32fast::hash(&bytes) != header.tree.checksum {
            return Err(bad(Damage::Checksum { file: TREE }));
        }
        let tree = Tree::from_bytes(&bytes).map_err(|error| {
            bad(match error {
                encoding::Error::Invalid(invalid) => Damage::Tree(invalid),
                other => Damage::Encoding {
                    why: other.to_string(),
                },
            })
        })?;
        drop(bytes);
        check_tree(&tree).map_err(&bad)?;
        header.check_tree(&tree).map_err(&bad)?;

        let mut inner = Inner {
            path: path.to_owned(),
            header,
            tree,
            map,
            fences: Vec::new(),
            blocks,
            pages,
        };
        inner.map.check(inner.header.map)?;
        inner.fences = inner.check_map()?;
        inner.blocks.check(inner.header.blocks)?;
        inner.check_blocks()?;
        Ok(Self(Arc::new(inner)))
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// What it says of itself.
    pub fn header(&self) -> &Header {
        &self.0.header
    }

    /// The tree: every rule of the model holds.
    pub fn tree(&self) -> &Tree {
        &self.0.tree
    }

    /// What the pages of each object take, ascending.
    ///
    /// # Errors
    /// [`Error`].
    pub fn stored(&self) -> Result<Vec<Stored>> {
        let mut found: Vec<Stored> = Vec::new();
        for number in 0..self.0.map.count() {
            let leaf = self.0.map.leaf(number)?;
            for index in 0..leaf.count() {
                let range = self.0.range(&leaf, number, index)?;
                if found.last().is_none_or(|last| last.object != range.object) {
                    found.push(Stored {
                        object: range.object,
                        counts: Counts::default(),
                    });
                }
                if let Some(last) = found.last_mut() {
                    last.counts.add(range.kind, range.pages.page_count());
                }
            }
        }
        Ok(found)
    }

    /// Reads and checks every block of pages; with what [`Image::open`] has checked that is all of the image. Looks for files
    /// that belong to no image, too.
    ///
    /// # Errors
    /// The first damage.
    pub fn verify(&self) -> Result<()> {
        let inner = &*self.0;
        let entries = std::fs::read_dir(&inner.path).map_err(Error::io(&inner.path, "list it"))?;
        for entry in entries {
            let name = entry
                .map_err(Error::io(&inner.path, "list it"))?
                .file_name();
            if !FILES.iter().any(|file| name == *file) {
                return Err(Error::bad(&inner.path)(Damage::Stranger {
                    name: name.to_string_lossy().into_owned(),
                }));
            }
        }
        let mut scratch = Scratch::default();
        for number in 0..inner.header.counts.data_pages.div_ceil(BLOCK_PAGES) {
            inner.block(number, None, &mut scratch)?;
        }
        Ok(())
    }
}

impl PageSource for Image {
    fn runs(&self, object: ObjectId, range: PageRange) -> Result<Vec<PageRun>> {
        let mut runs = Vec::new();
        let mut at = range.start;
        self.0.ranges(object, range, |told| {
            if at < told.pages.start {
                runs.push(PageRun {
                    range: PageRange {
                        start: at,
                        end: told.pages.start,
                    },
                    kind: None,
                });
            }
            runs.push(PageRun {
                range: told.pages,
                kind: Some(told.kind),
            });
            at = told.pages.end;
            // With room for one more and the gap before it.
            Ok(runs.len() + 2 <= limits::RUNS)
        })?;
        if at < range.end && runs.len() + 2 <= limits::RUNS {
            runs.push(PageRun {
                range: PageRange {
                    start: at,
                    end: range.end,
                },
                kind: None,
            });
        }
        Ok(runs)
    }

    fn read(&self, object: ObjectId, range: PageRange, bytes: &mut [u8]) -> Result<()> {
        assert!(
            bytes.len() as u64 == range.byte_len(),
            "room for the pages that are asked for"
        );
        let inner = &*self.0;
        let no_data = |address| inner.bad(Damage::NoData { object, address });
        let mut scratch = Scratch::default();
        let (mut at, mut rest) = (range.start, bytes);
        inner.ranges(object, range, |told| {
            if told.kind != PageKind::Data || told.pages.start != at {
                return Err(no_data(at));
            }
            let mut page = told.data_before;
            while at < told.pages.end {
                // As many as are in this block.
                let first = page % BLOCK_PAGES;
                let count = ((told.pages.end - at) / PAGE_SIZE).min(BLOCK_PAGES - first);
                let content = inner.block(page / BLOCK_PAGES, Some((object, at)), &mut scratch)?;
                let from = first as usize * PAGE_LEN;
                let len = count as usize * PAGE_LEN;
                let (filled, left) = std::mem::take(&mut rest).split_at_mut(len);
                match content.get(from..from + len) {
                    Some(content) => filled.copy_from_slice(content),
                    None => return Err(no_data(at)),
                }
                rest = left;
                at += count * PAGE_SIZE;
                page += count;
            }
            Ok(true)
        })?;
        if at < range.end {
            return Err(no_data(at));
        }
        Ok(())
    }
}

/// Room for one block, stored and decoded, and the leaf that the last one was in; allocated once it is needed.
#[derive(Default)]
struct Scratch {
    leaf: Option<(u64, Leaf<{ pagemap::BLOCK_LEN }>)>,
    stored: Vec<u8>,
    decoded: Vec<u8>,
}

impl Inner {
    fn bad(&self, damage: Damage) -> Error {
        Error::bad(&self.path)(damage)
    }

    /// A range of a leaf of the map.
    fn range(
        &self,
        leaf: &Leaf<{ pagemap::RANGE_LEN }>,
        number: u64,
        index: usize,
    ) -> Result<Range> {
        Range::decode(&leaf.record(index)).map_err(|rule| {
            self.bad(Damage::Range {
                offset: Leaves::<{ pagemap::RANGE_LEN }>::offset(number, index),
                rule,
            })
        })
    }

    /// One pass over the map: every rule of it, and where its leaves begin.
    fn check_map(&self) -> Result<Vec<Fence>> {
        let mut fences = Vec::new();
        let mut coverage = Coverage::of(&self.tree);
        for number in 0..self.map.count() {
            let leaf = self.map.leaf(number)?;
            for index in 0..leaf.count() {
                let range = self.range(&leaf, number, index)?;
                if range.data_before != coverage.data_pages() {
                    return Err(self.bad(Damage::Range {
                        offset: Leaves::<{ pagemap::RANGE_LEN }>::offset(number, index),
                        rule: "has not the data pages that follow those before",
                    }));
                }
                coverage
                    .take(range.object, range.pages, range.kind)
                    .map_err(|damage| self.bad(damage))?;
                if index == 0 {
                    fences.push(Fence {
                        object: range.object,
                        start: range.pages.start,
                        data_before: range.data_before,
                    });
                }
            }
        }
        let counts = coverage.finish().map_err(|damage| self.bad(damage))?;
        self.header
            .check_counts(counts)
            .map_err(|damage| self.bad(damage))?;
        Ok(fences)
    }

    /// Bytes of a block before it was compressed.
    fn block_len(&self, number: u64) -> usize {
        let before = number.saturating_mul(BLOCK_PAGES);
        let pages = self.header.counts.data_pages.saturating_sub(before);
        pages.min(BLOCK_PAGES) as usize * PAGE_LEN
    }

    /// One pass over the table of blocks: they follow each other and fill `pages`.
    fn check_blocks(&self) -> Result<()> {
        let (mut offset, mut block_number) = (0, 0);
        let wanted = self.header.counts.data_pages.div_ceil(BLOCK_PAGES);
        for number in 0..self.blocks.count() {
            let leaf = self.blocks.leaf(number)?;
            for index in 0..leaf.count() {
                let bad = |rule| {
                    Err(self.bad(Damage::Block {
                        offset: Leaves::<{ pagemap::BLOCK_LEN }>::offset(number, index),
                        rule,
                    }))
                };
                let block = Block::decode(&leaf.record(index));
                if block_number == wanted {
                    return bad("is one more than there are pages for");
                }
                if block.offset != offset {
                    return bad("does not lie behind the one before");
                }
                if block.stored_len == 0 || block.stored_len as usize > self.block_len(block_number)
                {
                    return bad("has an impossible length");
                }
                offset += u64::from(block.stored_len);
                block_number += 1;
            }
        }
        if block_number < wanted {
            return Err(self.bad(Damage::Block {
                offset: self.header.blocks.len,
                rule: "is missing",
            }));
        }
        if offset != self.header.pages.len {
            return Err(self.bad(Damage::Block {
                offset: self.header.blocks.len,
                rule: "does not end where `pages` does",
            }));
        }
        Ok(())
    }

    /// The ranges of the map that `range` meets, cut to it, ascending, until `each` says that it has enough.
    fn ranges(
        &self,
        object: ObjectId,
        range: PageRange,
        mut each: impl FnMut(Range) -> Result<bool>,
    ) -> Result<()> {
        let key = (object, range.start);
        let after = self
            .fences
            .partition_point(|fence| (fence.object, fence.start) <= key);
        for number in after.saturating_sub(1) as u64..self.map.count() {
            let leaf = self.map.leaf(number)?;
            for index in 0..leaf.count() {
                let told = self.range(&leaf, number, index)?;
                if (told.object, told.pages.start) >= (object, range.end) {
                    return Ok(());
                }
                if told.object != object {
                    continue;
                }
                let Some(pages) = told.pages.intersect(range) else {
                    continue;
                };
                let skipped = match told.kind {
                    PageKind::Data => (pages.start - told.pages.start) / PAGE_SIZE,
                    _ => 0,
                };
                let cut = Range {
                    pages,
                    data_before: told.data_before.saturating_add(skipped),
                    ..told
                };
                if !each(cut)? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Reads, verifies and decodes a block. `page` is the page it is read for, if one is.
    fn block<'s>(
        &self,
        number: u64,
        page: Option<(ObjectId, u64)>,
        scratch: &'s mut Scratch,
    ) -> Result<&'s [u8]> {
        let per_leaf = super::leaves::per_leaf::<{ pagemap::BLOCK_LEN }>() as u64;
        let leaf = match scratch.leaf.take() {
            Some((at, leaf)) if at == number / per_leaf => leaf,
            _ => self.blocks.leaf(number / per_leaf)?,
        };
        let leaf = &scratch.leaf.insert((number / per_leaf, leaf)).1;
        let index = (number % per_leaf) as usize;
        let bad_record = || {
            self.bad(Damage::Block {
                offset: Leaves::<{ pagemap::BLOCK_LEN }>::offset(number / per_leaf, index),
                rule: "has changed since the image was opened",
            })
        };
        if index >= leaf.count() {
            return Err(bad_record());
        }
        let block = Block::decode(&leaf.record(index));
        let decoded_len = self.block_len(number);
        let stored_len = block.stored_len as usize;
        if stored_len == 0 || stored_len > decoded_len {
            return Err(bad_record());
        }
        scratch.stored.resize(BLOCK_LEN, 0);
        let stored = &mut scratch.stored[..stored_len];
        self.pages.read(stored, block.offset)?;
        // Who asks for no page in particular is told the first.
        let page = || match page {
            Some(page) => Ok(page),
            None => self.page_of_data(number * BLOCK_PAGES),
        };
        if crc32fast::hash(stored) != block.checksum {
            let (object, address) = page()?;
            return Err(self.bad(Damage::BlockChecksum {
                offset: block.offset,
                object,
                address,
            }));
        }
        if stored_len == decoded_len {
            return Ok(&scratch.stored[..stored_len]);
        }
        scratch.decoded.resize(BLOCK_LEN, 0);
        let decoded = &mut scratch.decoded[..decoded_len];
        let len = lz4_flex::block::decompress_into(stored, decoded).ok();
        if len != Some(decoded_len) {
            let (object, address) = page()?;
            return Err(self.bad(Damage::BlockContent {
                offset: block.offset,
                object,
                address,
            }));
        }
        Ok(&scratch.decoded[..decoded_len])
    }

    /// Whose the data page with this number is.
    fn page_of_data(&self, page: u64) -> Result<(ObjectId, u64)> {
        let after = self
            .fences
            .partition_point(|fence| fence.data_before <= page);
        let mut found = (ObjectId(0), 0);
        for number in after.saturating_sub(1) as u64..self.map.count() {
            let leaf = self.map.leaf(number)?;
            for index in 0..leaf.count() {
                let range = self.range(&leaf, number, index)?;
                if range.data_before > page {
                    return Ok(found);
                }
                if range.kind == PageKind::Data {
                    found = (
                        range.object,
                        range.pages.start + (page - range.data_before) * PAGE_SIZE,
                    );
                }
            }
        }
        Ok(found)
    }
}
