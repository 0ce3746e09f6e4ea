//! An image: a tree at rest in a directory. The format on disk is told by `docs/image.md`, which is normative.
//!
//! [`ImageWriter`] makes one, [`Image`] reads one, [`shelf`] looks after a directory of them. Hides every byte of the format;
//! must never believe a number of a file before it is checked, nor hand out a page that is not the one that was written.
//!
//! What a reader holds in memory is the tree and 24 bytes for each 127 ranges of pages; pages are read in place (`pread`) and
//! none is kept, so any number of readers may share one [`Image`].

use crate::model::Invalid;
use crate::model::task::Tree;
use crate::page::PageRange;

mod error;
mod header;
mod leaves;
mod pagemap;
mod read;
pub mod shelf;
mod write;

pub use error::{Damage, Error};
pub use header::{Counts, Header, Origin};
pub use read::{Image, Stored};
pub use write::ImageWriter;

/// The result of reading or writing an image.
pub type Result<T> = std::result::Result<T, Error>;

/// The format this program writes. It reads all from 1 on.
pub const FORMAT_VERSION: u32 = 1;

/// The files of an image, and nothing else lies in its directory.
pub const FILES: [&str; 5] = [HEADER, TREE, MAP, BLOCKS, PAGES];
const HEADER: &str = "header";
const TREE: &str = "tree";
const MAP: &str = "map";
const BLOCKS: &str = "blocks";
const PAGES: &str = "pages";

/// Data pages of a block: what has to be read, and decoded, to get one of them. LZ4 gains nothing from more, its window being
/// 64 KiB.
pub const BLOCK_PAGES: u64 = 16;
/// Bytes of a whole block before it is compressed.
const BLOCK_LEN: usize = 16 * crate::page::PAGE_LEN;

/// Limits of an image. A number in a file is compared with one of these, or with the length of a file that is there, before
/// anything is allocated for it. Those of the tree are in [`crate::model::limits`].
pub mod limits {
    /// Ranges of pages in a map: 2 GiB of it.
    pub const RANGES: u64 = 1 << 26;
    /// Data pages: 16 TiB.
    pub const DATA_PAGES: u64 = 1 << 32;
    /// Runs that one look at the map gives.
    pub const RUNS: usize = 1024;
    /// Bytes of a host's name, as in HOST_NAME_MAX.
    pub const HOST_LEN: usize = 64;
    /// Bytes of the name of the program that wrote an image.
    pub const PROGRAM_LEN: usize = 32;
}

/// What an image demands of its tree beyond the rules of the model: it is built where nobody can be asked any more.
fn check_tree(tree: &Tree) -> std::result::Result<(), Damage> {
    match tree.host {
        Some(_) => Ok(()),
        None => Err(Damage::Tree(Invalid::new("host", "is not told"))),
    }
}

/// Something that has pages. Its pages are named by their byte offset in it; in an address space that is the address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId(pub u32);

impl ObjectId {
    /// The address space of the tree's root.
    pub const ROOT_SPACE: Self = Self(1);

    /// The address space of the process that stands at `index` in the tree. There are at most
    /// [`PROCESSES`](crate::model::limits::PROCESSES).
    pub fn space(index: usize) -> Self {
        Self(u32::try_from(index).map_or(u32::MAX, |index| index.saturating_add(1)))
    }

    /// The shared object that stands at `index` in a tree of `process_count` processes. There are at most
    /// [`SHARED`](crate::model::limits::SHARED).
    pub fn shared(process_count: usize, index: usize) -> Self {
        Self::space(process_count.saturating_add(index))
    }
}

/// What a page of an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum PageKind {
    /// It has bytes of its own.
    Data = 1,
    /// It was there and all its bytes are zero.
    Zero = 2,
    /// It was not there. In private anonymous memory it reads as zeros, in a private mapping of a file as the file.
    Hole = 3,
    /// A guard region: nothing may be installed.
    Guard = 4,
}

impl PageKind {
    /// All of them, by number.
    pub const ALL: [Self; 4] = [Self::Data, Self::Zero, Self::Hole, Self::Guard];

    fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|&kind| kind as u32 == number)
    }
}

/// How blocks are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// As they are.
    Raw,
    /// By LZ4, each that becomes shorter by it.
    Lz4,
}

/// Neighbouring pages of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// Where they are in their object.
    pub range: PageRange,
    /// What they are; `None`: the source has no such pages, because nothing that has pages is mapped there. Never to be taken
    /// for zeros.
    pub kind: Option<PageKind>,
}

/// Where pages come from once their process is at rest. Any number of threads may ask at once.
pub trait PageSource: Send + Sync {
    /// What the pages of `range` are: runs that ascend, have no gaps and begin where it does. They end where it does, or, when
    /// [`limits::RUNS`] would not do, before: go on there. Page bytes are not read.
    ///
    /// # Errors
    /// [`Error`]: that nothing is known must never be taken for zeros.
    fn runs(&self, object: ObjectId, range: PageRange) -> Result<Vec<PageRun>>;

    /// Reads the pages of `range`, of which each is [`PageKind::Data`], and verifies them.
    ///
    /// # Errors
    /// [`Error`]. What `bytes` then holds means nothing.
    ///
    /// # Panics
    /// If `bytes` is not as long as `range`.
    fn read(&self, object: ObjectId, range: PageRange, bytes: &mut [u8]) -> Result<()>;
}

#[cfg(test)]
mod malformed;
#[cfg(test)]
mod tests;
