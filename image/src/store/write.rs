//! Writing an image: under a temporary name beside its own, which it gets when everything lies on the disk.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use prost::Message as _;

use super::header::{Extent, Header, Origin};
use super::leaves::LeafWriter;
use super::pagemap::{self, Block, Coverage, Range};
use super::{
    BLOCK_LEN, BLOCKS, Compression, Damage, Error, FILES, HEADER, MAP, ObjectId, PAGES, PageKind,
    Result, TREE, limits,
};
use crate::model::limits::TREE_LEN;
use crate::model::task::Tree;
use crate::page::{PAGE_LEN, PAGE_SIZE, PageRange};

/// How the name of an image that is not yet one begins; the hexadecimal id of the dump follows.
pub(super) const UNFINISHED: &str = ".unfinished-";

/// Writes one image as it comes. Holds one block of pages and one leaf of each table in memory, and the tree.
///
/// The pages of all objects come in ascending order, each once: every page of each private mapping, then of each
/// shared object. Dropped unfinished, it
/// leaves nothing.
#[derive(Debug)]
pub struct ImageWriter {
    path: PathBuf,
    folder: Unfinished,
    origin: Origin,
    compression: Compression,
    tree: Tree,
    coverage: Coverage,
    map: LeafWriter<{ pagemap::RANGE_LEN }>,
    blocks: LeafWriter<{ pagemap::BLOCK_LEN }>,
    pages: File,
    pages_len: u64,
    /// The range that the next pages may go on.
    last: Option<Range>,
    /// Data pages that make no whole block yet.
    block: Vec<u8>,
    /// What LZ4 makes of a block.
    packed: Vec<u8>,
}

/// The folder under its temporary name; dropped, it is removed.
#[derive(Debug)]
struct Unfinished {
    path: PathBuf,
    is_published: bool,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.is_published {
            // What cannot be removed is found by `image ls`.
            for file in FILES {
                let _ = fs::remove_file(self.path.join(file));
            }
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// The folder that holds `path`.
pub(super) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

impl ImageWriter {
    /// Begins an image of `tree` that will lie at `path`, a name in a folder that exists.
    ///
    /// # Errors
    /// [`Error::Exists`] if there is something; [`Error::Unwritable`] if the tree breaks a rule of the model; [`Error::Io`].
    pub fn create(
        path: &Path,
        tree: Tree,
        origin: Origin,
        compression: Compression,
    ) -> Result<Self> {
        tree.validate()
            .map_err(|invalid| Error::Unwritable(Damage::Tree(invalid)))?;
        super::check_tree(&tree).map_err(Error::Unwritable)?;
        if path.file_name().is_none() {
            let source = std::io::ErrorKind::InvalidInput.into();
            return Err(Error::io(path, "make an image of this name")(source));
        }
        if path.symlink_metadata().is_ok() {
            return Err(Error::Exists {
                path: path.to_owned(),
            });
        }
        let id: String = origin.id.iter().map(|byte| format!("{byte:02x}")).collect();
        let folder = parent(path).join(format!("{UNFINISHED}{id}"));
        DirBuilder::new()
            .mode(0o700)
            .create(&folder)
            .map_err(Error::io(&folder, "make it"))?;
        let folder = Unfinished {
            path: folder,
            is_published: false,
        };
        let (map, blocks, pages) = (folder.make(MAP)?, folder.make(BLOCKS)?, folder.make(PAGES)?);
        Ok(Self {
            path: path.to_owned(),
            origin,
            compression,
            coverage: Coverage::of(&tree),
            tree,
            map: LeafWriter::new(folder.path.join(MAP), map),
            blocks: LeafWriter::new(folder.path.join(BLOCKS), blocks),
            folder,
            pages,
            pages_len: 0,
            last: None,
            block: Vec::with_capacity(BLOCK_LEN),
            packed: vec![0; lz4_flex::block::get_maximum_output_size(BLOCK_LEN)],
        })
    }

    /// The pages from `start` on have these bytes. Those that are all zero are stored as [`PageKind::Zero`].
    ///
    /// # Errors
    /// [`Error::Unwritable`] if these pages are not the next ones; [`Error::Io`]. The image cannot be finished then.
    ///
    /// # Panics
    /// If these are no whole pages.
    pub fn pages(&mut self, object: ObjectId, start: u64, bytes: &[u8]) -> Result<()> {
        assert!(
            start % PAGE_SIZE == 0 && bytes.len() % PAGE_LEN == 0,
            "whole pages"
        );
        let (mut at, mut rest) = (start, bytes);
        while !rest.is_empty() {
            let is_zero = rest[..PAGE_LEN] == [0; PAGE_LEN];
            let page_count = 1 + rest[PAGE_LEN..]
                .chunks_exact(PAGE_LEN)
                .take_while(|&page| (*page == [0; PAGE_LEN]) == is_zero)
                .count();
            let run;
            (run, rest) = rest.split_at(page_count * PAGE_LEN);
            let range = PageRange {
                start: at,
                end: at + run.len() as u64,
            };
            at = range.end;
            if is_zero {
                self.range(object, PageKind::Zero, range)?;
                continue;
            }
            self.range(object, PageKind::Data, range)?;
            for page in run.chunks_exact(PAGE_LEN) {
                self.block.extend_from_slice(page);
                if self.block.len() == BLOCK_LEN {
                    self.flush_block()?;
                }
            }
        }
        Ok(())
    }

    /// The pages of `range` are of `kind`, which has no bytes.
    ///
    /// # Errors
    /// As [`ImageWriter::pages`].
    ///
    /// # Panics
    /// If `kind` is [`PageKind::Data`].
    pub fn without_data(
        &mut self,
        object: ObjectId,
        kind: PageKind,
        range: PageRange,
    ) -> Result<()> {
        assert!(kind != PageKind::Data, "pages without bytes");
        self.range(object, kind, range)
    }

    fn range(&mut self, object: ObjectId, kind: PageKind, pages: PageRange) -> Result<()> {
        if pages.is_empty() {
            return Ok(());
        }
        let data_before = self.coverage.data_pages();
        self.coverage
            .take(object, pages, kind)
            .map_err(Error::Unwritable)?;
        if let Some(last) = &mut self.last {
            if (last.object, last.kind, last.pages.end) == (object, kind, pages.start) {
                last.pages.end = pages.end;
                return Ok(());
            }
            self.map.push(&last.encode())?;
        }
        self.last = Some(Range {
            object,
            kind,
            pages,
            data_before,
        });
        Ok(())
    }

    fn flush_block(&mut self) -> Result<()> {
        let packed_len = match self.compression {
            Compression::Raw => None,
            // It has room for the longest output, so this cannot fail; if it did, the block would be stored raw.
            Compression::Lz4 => lz4_flex::block::compress_into(&self.block, &mut self.packed)
                .ok()
                .filter(|&len| len < self.block.len()),
        };
        let stored = match packed_len {
            Some(len) => &self.packed[..len],
            None => &self.block[..],
        };
        self.blocks.push(
            &Block {
                offset: self.pages_len,
                stored_len: stored.len() as u32,
                checksum: crc32fast::hash(stored),
            }
            .encode(),
        )?;
        let path = self.folder.path.join(PAGES);
        self.pages
            .write_all(stored)
            .map_err(Error::io(&path, "write it"))?;
        self.pages_len += stored.len() as u64;
        self.block.clear();
        Ok(())
    }

    /// Completes the image, makes it last, and gives it its name.
    ///
    /// # Errors
    /// [`Error::Unwritable`] if not all pages have come, or more than an image can have; [`Error::Exists`]; [`Error::Io`].
    /// Nothing is left then.
    pub fn finish(mut self) -> Result<Header> {
        if !self.block.is_empty() {
            self.flush_block()?;
        }
        if let Some(last) = self.last.take() {
            self.map.push(&last.encode())?;
        }
        let counts = self.coverage.finish().map_err(Error::Unwritable)?;
        let tree = self.tree.encode_to_vec();
        let within = |is_within: bool, file, len, wanted| {
            if is_within {
                Ok(())
            } else {
                Err(Error::Unwritable(Damage::Length { file, len, wanted }))
            }
        };
        within(
            tree.len() <= TREE_LEN,
            TREE,
            tree.len() as u64,
            TREE_LEN as u64,
        )?;
        let range_count = self.map.record_count();
        within(
            range_count <= limits::RANGES,
            MAP,
            range_count,
            limits::RANGES,
        )?;
        within(
            counts.data_pages <= limits::DATA_PAGES,
            PAGES,
            counts.data_pages,
            limits::DATA_PAGES,
        )?;
        self.pages
            .sync_all()
            .map_err(Error::io(&self.folder.path.join(PAGES), "write it"))?;
        let (pid, comm, process_count, thread_count) = Header::of_tree(&self.tree);
        let header = Header {
            origin: self.origin,
            pid,
            comm,
            process_count,
            thread_count,
            counts,
            tree: self.folder.write(TREE, &tree)?,
            map: self.map.finish()?,
            blocks: self.blocks.finish()?,
            pages: Extent {
                len: self.pages_len,
                checksum: 0,
            },
        };
        self.folder.write(HEADER, &header.encode())?;
        self.folder.publish(&self.path)?;
        Ok(header)
    }
}

impl Unfinished {
    fn make(&self, name: &str) -> Result<File> {
        let path = self.path.join(name);
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(Error::io(&path, "make it"))
    }

    /// Writes a whole file and makes it last.
    fn write(&self, name: &str, bytes: &[u8]) -> Result<Extent> {
        let mut file = self.make(name)?;
        file.write_all(bytes)
            .and_then(|()| file.sync_all())
            .map_err(Error::io(&self.path.join(name), "write it"))?;
        Ok(Extent {
            len: bytes.len() as u64,
            checksum: crc32fast::hash(bytes),
        })
    }

    fn publish(mut self, path: &Path) -> Result<()> {
        sync_folder(&self.path)?;
        // rename(2) replaces nothing but an empty folder, and that only if it was made after this look: no image is ever lost.
        if path.symlink_metadata().is_ok() {
            return Err(Error::Exists {
                path: path.to_owned(),
            });
        }
        fs::rename(&self.path, path).map_err(|error| match error.kind() {
            std::io::ErrorKind::DirectoryNotEmpty
            | std::io::ErrorKind::AlreadyExists
            | std::io::ErrorKind::NotADirectory => Error::Exists {
                path: path.to_owned(),
            },
            _ => Error::io(path, "give the image this name")(error),
        })?;
        // A name that may not last is no name: whoever asked is told that there is none.
        sync_folder(parent(path)).inspect_err(|_| {
            self.is_published = fs::rename(path, &self.path).is_err();
        })?;
        self.is_published = true;
        Ok(())
    }
}

/// Makes the names in a folder last.
pub(super) fn sync_folder(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|folder| folder.sync_all())
        .map_err(Error::io(path, "write it"))
}
