//! What can be wrong with an image: each kind of damage has a sentence of its own, which names the file and the place in it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::{FORMAT_VERSION, ObjectId};
use crate::model::Invalid;
use crate::page::PageRange;

/// Why an image cannot be written, read or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
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
    /// The name is taken.
    #[error("{} exists already, and images are never overwritten: choose another name", path.display())]
    Exists {
        /// Which.
        path: PathBuf,
    },
    /// The image is not what was written, or was never possible.
    #[error("{}: {damage}: {}", path.display(), damage.next_step())]
    Bad {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        damage: Damage,
    },
    /// What was to be written would be no image.
    #[error("what was captured makes no image")]
    Unwritable(#[source] Damage),
}

impl Error {
    pub(super) fn io(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, what, source }
    }

    pub(super) fn bad(path: &Path) -> impl Fn(Damage) -> Self {
        let path = path.to_owned();
        move |damage| Self::Bad {
            path: path.clone(),
            damage,
        }
    }

    /// Whether it is the image that is wrong, and not the host.
    pub fn is_bad_image(&self) -> bool {
        matches!(self, Self::Bad { .. })
    }
}

/// One kind of damage. Offsets are bytes from the beginning of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Damage {
    /// No file `header`.
    NoHeader,
    /// The header is not one.
    Magic,
    /// The header is too short to be one.
    HeaderLength {
        /// Its length, bytes.
        len: u64,
    },
    /// A format of the future, or none.
    Version {
        /// The format's number.
        version: u32,
    },
    /// The header is not what was written.
    HeaderChecksum,
    /// A field of the header cannot be.
    HeaderField {
        /// Which.
        field: &'static str,
        /// Where.
        offset: usize,
        /// The broken rule, a clause.
        rule: String,
    },
    /// A file is not there.
    Missing {
        /// Which.
        file: &'static str,
    },
    /// A file is a directory, a link, a pipe…
    NoFile {
        /// Which.
        file: &'static str,
    },
    /// Something lies there that belongs to no image.
    Stranger {
        /// Its name.
        name: String,
    },
    /// A file is longer or shorter than it was.
    Length {
        /// Which.
        file: &'static str,
        /// Its length, bytes.
        len: u64,
        /// What the header says, bytes.
        wanted: u64,
    },
    /// A file is not the one that was written.
    Checksum {
        /// Which.
        file: &'static str,
    },
    /// A file of another image, or one that was put together.
    Leaf {
        /// Which file.
        file: &'static str,
        /// Where its leaf begins.
        offset: u64,
        /// The broken rule, a clause.
        rule: &'static str,
    },
    /// The bytes of the tree are no tree.
    Encoding {
        /// What the decoder says.
        why: String,
    },
    /// The tree breaks a rule.
    Tree(Invalid),
    /// A range of the map cannot be.
    Range {
        /// Where its record begins.
        offset: u64,
        /// The broken rule, a clause.
        rule: &'static str,
    },
    /// The map has no word about pages that the tree has.
    Uncovered {
        /// Of what.
        object: ObjectId,
        /// Which.
        range: PageRange,
    },
    /// The map tells pages that the tree does not have, or a second time.
    Unasked {
        /// Of what.
        object: ObjectId,
        /// Which.
        range: PageRange,
    },
    /// The map has other pages where the tree has a guard region.
    Unguarded {
        /// Of what.
        object: ObjectId,
        /// Which.
        range: PageRange,
    },
    /// The map has a guard region where there can be none.
    Guarded {
        /// In what.
        object: ObjectId,
        /// Where.
        range: PageRange,
    },
    /// The record of a block cannot be.
    Block {
        /// Where the record begins in `blocks`.
        offset: u64,
        /// The broken rule, a clause.
        rule: &'static str,
    },
    /// A block of pages is not what was written.
    BlockChecksum {
        /// Where it begins in `pages`.
        offset: u64,
        /// Of what the page is.
        object: ObjectId,
        /// A page in it.
        address: u64,
    },
    /// A block of pages passes its checksum, but is not LZ4 or not of its length.
    BlockContent {
        /// Where it begins in `pages`.
        offset: u64,
        /// Of what the page is.
        object: ObjectId,
        /// A page in it.
        address: u64,
    },
    /// A page is asked for as data that has none.
    NoData {
        /// Of what.
        object: ObjectId,
        /// Which.
        address: u64,
    },
}

impl Damage {
    /// What to do about it, a clause.
    pub fn next_step(&self) -> &'static str {
        match self {
            Self::NoHeader | Self::Magic => "name the directory that dump wrote",
            Self::Version { .. } => "use the pageferry that wrote it, or a newer one",
            Self::Stranger { .. } => "move it elsewhere",
            Self::HeaderLength { .. }
            | Self::Missing { .. }
            | Self::NoFile { .. }
            | Self::Length { .. } => "copy the image again, whole",
            Self::HeaderChecksum | Self::Checksum { .. } | Self::BlockChecksum { .. } => {
                "take another copy of the image, or dump again"
            }
            Self::HeaderField { .. }
            | Self::Leaf { .. }
            | Self::Encoding { .. }
            | Self::Tree(_)
            | Self::Range { .. }
            | Self::Uncovered { .. }
            | Self::Unasked { .. }
            | Self::Unguarded { .. }
            | Self::Guarded { .. }
            | Self::Block { .. }
            | Self::BlockContent { .. }
            | Self::NoData { .. } => {
                "no dump wrote this; do not restore it, and look where it comes from"
            }
        }
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pages = |range: &PageRange| format!("pages {:x}-{:x}", range.start, range.end);
        match self {
            Self::NoHeader => write!(f, "is no image, it has no file `header`"),
            Self::Magic => write!(f, "is no image, its `header` does not begin as one"),
            Self::HeaderLength { len } => {
                write!(f, "`header` has {len} bytes, not {}", super::header::LEN)
            }
            Self::Version { version } => write!(
                f,
                "`header` says format {version}, and this pageferry knows 1 to {FORMAT_VERSION}"
            ),
            Self::HeaderChecksum => write!(f, "`header` has the wrong checksum"),
            Self::HeaderField {
                field,
                offset,
                rule,
            } => write!(f, "`header` at offset {offset}: {field} {rule}"),
            Self::Missing { file } => write!(f, "the file `{file}` is missing"),
            Self::NoFile { file } => write!(f, "`{file}` is no regular file"),
            Self::Stranger { name } => write!(f, "{name:?} lies in it and belongs to no image"),
            Self::Length { file, len, wanted } if len < wanted => {
                write!(f, "`{file}` ends at offset {len} instead of {wanted}")
            }
            Self::Length { file, len, wanted } => {
                write!(f, "`{file}` goes on to offset {len} instead of {wanted}")
            }
            Self::Checksum { file } => {
                write!(f, "`{file}` has not the checksum that `header` says")
            }
            Self::Leaf { file, offset, rule } => {
                write!(f, "`{file}`: the leaf at offset {offset} {rule}")
            }
            Self::Encoding { why } => write!(f, "`tree` {why}"),
            Self::Tree(invalid) => write!(f, "`tree`: {invalid}"),
            Self::Range { offset, rule } => write!(f, "`map`: the range at offset {offset} {rule}"),
            Self::Uncovered { object, range } => {
                write!(
                    f,
                    "`map` does not tell {} of object {}",
                    pages(range),
                    object.0
                )
            }
            Self::Unasked { object, range } => write!(
                f,
                "`map` tells {} of object {}, which the tree does not have, or a second time",
                pages(range),
                object.0
            ),
            Self::Unguarded { object, range } => write!(
                f,
                "`map` has memory in the guard region {} of object {}",
                pages(range),
                object.0
            ),
            Self::Guarded { object, range } => write!(
                f,
                "`map` has the guard region {} in object {}, which can have none",
                pages(range),
                object.0
            ),
            Self::Block { offset, rule } => {
                write!(f, "`blocks`: the block at offset {offset} {rule}")
            }
            Self::BlockChecksum {
                offset,
                object,
                address,
            } => write!(
                f,
                "`pages`: the block at offset {offset} has the wrong checksum, so page {address:x} of object {} is lost",
                object.0
            ),
            Self::BlockContent {
                offset,
                object,
                address,
            } => write!(
                f,
                "`pages`: the block at offset {offset} cannot be decoded, so page {address:x} of object {} is lost",
                object.0
            ),
            Self::NoData { object, address } => {
                write!(f, "page {address:x} of object {} has no data", object.0)
            }
        }
    }
}

impl std::error::Error for Damage {}
