//! Files of records that all have one length, in leaves of at most 4096 bytes. A leaf has its own checksum and number, so any
//! record can be read, and believed, without the rest of the file.
//!
//! ```text
//! 0       4              8             16            20     32
//! | crc32 | record_count | leaf number | record_len  | 0 …  | records … | 0 …
//! ```
//! The checksum is over all that follows it. Every leaf but the last is full, and filled up to 4096 bytes; the last is not empty
//! and ends with its records.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::header::Extent;
use super::{Damage, Error, Result};

/// Bytes of a leaf that is not the last.
pub(super) const LEN: usize = 4096;
/// Bytes of it before the first record.
const HEAD_LEN: usize = 32;

/// Records of `N` bytes in a leaf.
pub(super) const fn per_leaf<const N: usize>() -> usize {
    (LEN - HEAD_LEN) / N
}

/// Bytes of a file of so many records of `N` bytes.
pub(super) fn file_len<const N: usize>(record_count: u64) -> u64 {
    let in_full_leaves = record_count / per_leaf::<N>() as u64;
    match record_count % per_leaf::<N>() as u64 {
        0 => in_full_leaves * LEN as u64,
        rest => in_full_leaves * LEN as u64 + HEAD_LEN as u64 + rest * N as u64,
    }
}

/// Whether a file of records of `N` bytes can have this length.
pub(super) fn is_file_len<const N: usize>(len: u64) -> bool {
    let rest = (len % LEN as u64) as usize;
    rest == 0 || (rest > HEAD_LEN && (rest - HEAD_LEN) % N == 0)
}

/// One file of an open image.
#[derive(Debug)]
pub(super) struct Opened {
    image: PathBuf,
    name: &'static str,
    file: File,
}

impl Opened {
    /// Opens `name` in `image`: a regular file, not reached through a link.
    pub(super) fn open(image: &Path, name: &'static str) -> Result<Self> {
        use std::os::unix::fs::MetadataExt as _;
        let path = image.join(name);
        let bad = Error::bad(image);
        // Looked at before it is opened, because opening a pipe would wait, and once more after it, in case it was exchanged.
        let seen = match path.symlink_metadata() {
            Ok(seen) => seen,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(bad(Damage::Missing { file: name }));
            }
            Err(error) => return Err(Error::io(&path, "look at it")(error)),
        };
        if !seen.is_file() {
            return Err(bad(Damage::NoFile { file: name }));
        }
        let file = File::open(&path).map_err(Error::io(&path, "open it"))?;
        let opened = file.metadata().map_err(Error::io(&path, "look at it"))?;
        if (opened.dev(), opened.ino()) != (seen.dev(), seen.ino()) {
            return Err(bad(Damage::NoFile { file: name }));
        }
        Ok(Self {
            image: image.to_owned(),
            name,
            file,
        })
    }

    /// Its length now, bytes.
    pub(super) fn len(&self) -> Result<u64> {
        let metadata = self.file.metadata();
        Ok(metadata
            .map_err(Error::io(&self.image.join(self.name), "look at it"))?
            .len())
    }

    /// `Err` unless it is as long as the header says.
    pub(super) fn check_len(&self, wanted: u64) -> Result<()> {
        let len = self.len()?;
        if len == wanted {
            return Ok(());
        }
        Err(self.bad(Damage::Length {
            file: self.name,
            len,
            wanted,
        }))
    }

    pub(super) fn read(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        match self.file.read_exact_at(bytes, offset) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                Err(self.bad(Damage::Length {
                    file: self.name,
                    len: self.len()?,
                    wanted: offset + bytes.len() as u64,
                }))
            }
            Err(error) => Err(Error::io(&self.image.join(self.name), "read it")(error)),
        }
    }

    pub(super) fn bad(&self, damage: Damage) -> Error {
        Error::bad(&self.image)(damage)
    }
}

/// A leaf that has been checked.
pub(super) struct Leaf<const N: usize> {
    bytes: Box<[u8; LEN]>,
    count: usize,
}

impl<const N: usize> Leaf<N> {
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// The record with this number in the leaf.
    ///
    /// # Panics
    /// If there are not so many.
    pub(super) fn record(&self, index: usize) -> [u8; N] {
        assert!(index < self.count, "a record of this leaf");
        let at = HEAD_LEN + index * N;
        let mut record = [0; N];
        record.copy_from_slice(&self.bytes[at..at + N]);
        record
    }
}

/// Reads leaves.
#[derive(Debug)]
pub(super) struct Leaves<const N: usize> {
    file: Opened,
    len: u64,
}

impl<const N: usize> Leaves<N> {
    /// The leaves in `file`, whose length has been checked.
    pub(super) fn new(file: Opened, len: u64) -> Self {
        Self { file, len }
    }

    /// How many leaves there are.
    pub(super) fn count(&self) -> u64 {
        self.len.div_ceil(LEN as u64)
    }

    /// Where a record lies in the file.
    pub(super) fn offset(leaf: u64, index: usize) -> u64 {
        leaf * LEN as u64 + (HEAD_LEN + index * N) as u64
    }

    /// Reads a leaf and checks all but its records.
    pub(super) fn leaf(&self, number: u64) -> Result<Leaf<N>> {
        let offset = number.saturating_mul(LEN as u64);
        let bad = |rule| {
            Err(self.file.bad(Damage::Leaf {
                file: self.file.name,
                offset,
                rule,
            }))
        };
        let len = self.len.saturating_sub(offset).min(LEN as u64) as usize;
        if len < HEAD_LEN {
            return bad("is not there");
        }
        let mut buffer = Box::new([0; LEN]);
        let bytes = &mut buffer[..len];
        self.file.read(bytes, offset)?;
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(word)
        };
        if crc32fast::hash(&bytes[4..]) != word(0) {
            return bad("has the wrong checksum");
        }
        if u64::from(word(8)) | u64::from(word(12)) << 32 != number {
            return bad("belongs elsewhere");
        }
        if word(16) as usize != N || bytes[20..HEAD_LEN].iter().any(|&byte| byte != 0) {
            return bad("is of another file");
        }
        let count = word(4) as usize;
        if count != (len - HEAD_LEN) / N {
            return bad("has an impossible number of records");
        }
        if bytes[HEAD_LEN + count * N..].iter().any(|&byte| byte != 0) {
            return bad("goes on behind its records");
        }
        Ok(Leaf {
            bytes: buffer,
            count,
        })
    }

    /// The checksum of the whole file is that of the header. One pass, a leaf at a time.
    pub(super) fn check(&self, wanted: Extent) -> Result<()> {
        let mut hasher = crc32fast::Hasher::new();
        let mut bytes = [0; LEN];
        let mut at = 0;
        while at < self.len {
            let piece = &mut bytes[..(self.len - at).min(LEN as u64) as usize];
            self.file.read(piece, at)?;
            hasher.update(piece);
            at += piece.len() as u64;
        }
        if hasher.finalize() == wanted.checksum {
            return Ok(());
        }
        Err(self.file.bad(Damage::Checksum {
            file: self.file.name,
        }))
    }
}

/// Writes leaves, one at a time.
#[derive(Debug)]
pub(super) struct LeafWriter<const N: usize> {
    path: PathBuf,
    file: File,
    leaf: Box<[u8; LEN]>,
    count: usize,
    number: u64,
    len: u64,
    hasher: crc32fast::Hasher,
}

impl<const N: usize> LeafWriter<N> {
    pub(super) fn new(path: PathBuf, file: File) -> Self {
        Self {
            path,
            file,
            leaf: Box::new([0; LEN]),
            count: 0,
            number: 0,
            len: 0,
            hasher: crc32fast::Hasher::new(),
        }
    }

    /// How many records were pushed.
    pub(super) fn record_count(&self) -> u64 {
        self.number * per_leaf::<N>() as u64 + self.count as u64
    }

    pub(super) fn push(&mut self, record: &[u8; N]) -> Result<()> {
        let at = HEAD_LEN + self.count * N;
        self.leaf[at..at + N].copy_from_slice(record);
        self.count += 1;
        if self.count == per_leaf::<N>() {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        for (at, word) in [(4, self.count as u32), (16, N as u32)] {
            self.leaf[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        self.leaf[8..16].copy_from_slice(&self.number.to_le_bytes());
        // Only the last leaf is not full.
        let len = if self.count == per_leaf::<N>() {
            LEN
        } else {
            HEAD_LEN + self.count * N
        };
        let checksum = crc32fast::hash(&self.leaf[4..len]);
        self.leaf[..4].copy_from_slice(&checksum.to_le_bytes());
        self.hasher.update(&self.leaf[..len]);
        self.file
            .write_all(&self.leaf[..len])
            .map_err(Error::io(&self.path, "write it"))?;
        self.leaf.fill(0);
        self.len += len as u64;
        self.number += 1;
        self.count = 0;
        Ok(())
    }

    /// Writes what is left and makes it last.
    pub(super) fn finish(mut self) -> Result<Extent> {
        if self.count > 0 {
            self.flush()?;
        }
        self.file
            .sync_all()
            .map_err(Error::io(&self.path, "write it"))?;
        Ok(Extent {
            len: self.len,
            checksum: self.hasher.finalize(),
        })
    }
}
