//! What makes a file on the target the same file as here: reading that on the source, comparing it on the target.
//!
//! A program's clean pages are not carried but mapped from the target's own copy of the file, so two files taken for the same
//! that are not would be silent corruption. The comparison is the operator's choice ([`FileCheck`]).

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};

use pageferry_image::model::memory::FileIdentity;
use pageferry_tracee::lock;
use sha2::{Digest as _, Sha256};

use crate::capture::files::{TMPFS, storage};
use crate::{Error, Result};

/// How carefully the target's files are compared with the source's (`--file-check`). Size and type are always compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FileCheck {
    /// ELF files by build id; those without one, and other files, by size and modification time.
    #[default]
    BuildId,
    /// Size only.
    Size,
    /// Size and modification time.
    Mtime,
    /// SHA-256 of the whole content.
    Content,
}

/// Most bytes of notes read from an ELF file; build ids stand in a few dozen.
const NOTES_LEN_MAX: u64 = 1 << 20;
/// Most program headers looked at.
const PROGRAM_HEADERS_MAX: u16 = 512;
const PT_NOTE: u32 = 4;
const NT_GNU_BUILD_ID: u32 = 3;

/// The identity of the file `path` leads to. `open` opens it, and is called only if something must be read.
///
/// # Errors
/// [`Error::File`] if it cannot be read as far as `check` asks.
pub fn identify(
    path: &str,
    check: FileCheck,
    must_be_shared: bool,
    open: impl FnOnce() -> io::Result<File>,
) -> Result<FileIdentity> {
    let failed = |source| Error::File {
        path: path.to_owned(),
        source,
    };
    let metadata = std::fs::metadata(path).map_err(failed)?;
    let mut identity = outline(path, &metadata, must_be_shared);
    if metadata.is_file() && !must_be_shared {
        match check {
            FileCheck::BuildId => {
                identity.build_id = build_id(&open().map_err(failed)?)
                    .map_err(failed)?
                    .unwrap_or_default()
            }
            FileCheck::Content => {
                identity.content_sha256 =
                    content_sha256(&open().map_err(failed)?).map_err(failed)?
            }
            FileCheck::Size | FileCheck::Mtime => {}
        }
    }
    Ok(identity)
}

/// Opens a file for reading. Never waits for somebody who has a lease on it: [`io::ErrorKind::WouldBlock`].
pub(crate) fn open(path: &str) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
}

/// What is known of a file without opening it.
pub(crate) fn outline(path: &str, metadata: &Metadata, must_be_shared: bool) -> FileIdentity {
    FileIdentity {
        path: path.to_owned(),
        size: if metadata.is_file() {
            metadata.len()
        } else {
            0
        },
        mtime_ns: metadata
            .mtime()
            .saturating_mul(1_000_000_000)
            .saturating_add(metadata.mtime_nsec()),
        mode: metadata.mode(),
        build_id: Vec::new(),
        content_sha256: Vec::new(),
        must_be_shared,
        device: metadata.dev(),
        inode: metadata.ino(),
    }
}

/// Takes down size and time of a file anew, if it is still the same one: a program that had it open may have written to it since.
/// On a tmpfs its content too, since there what is written through a mapping does not change the time.
///
/// # Errors
/// [`Error::File`]: its content cannot be read.
pub fn refresh(identity: &mut FileIdentity) -> Result<()> {
    let path = &identity.path;
    let same = std::fs::metadata(path)
        .ok()
        .filter(|now| (now.dev(), now.ino()) == (identity.device, identity.inode));
    let Some(now) = same else {
        return Ok(());
    };
    if now.is_file() && storage(path)? == TMPFS {
        let content = open(path).and_then(|file| content_sha256(&file));
        identity.content_sha256 = content.map_err(|source| Error::File {
            path: path.clone(),
            source,
        })?;
    }
    let now = outline(path, &now, identity.must_be_shared);
    (identity.size, identity.mtime_ns) = (now.size, now.mtime_ns);
    Ok(())
}

/// How a file that the program writes differs from what it was at rest; `None` if nobody has touched it.
pub fn touched(expected: &FileIdentity) -> Option<String> {
    let expected = FileIdentity {
        must_be_shared: false,
        ..expected.clone()
    };
    let check = match expected.content_sha256.is_empty() {
        true => FileCheck::Mtime,
        false => FileCheck::Content,
    };
    difference(&expected, check)
}

/// How a file here differs from what the source has; `None` if it does not.
///
/// The text is a clause about the file: `is missing`, `has another build id`. One that would have to be read and on which somebody
/// here has a write lease differs too: to open it would break that.
pub fn difference(expected: &FileIdentity, check: FileCheck) -> Option<String> {
    let metadata = match std::fs::metadata(&expected.path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Some("is missing".into()),
        Err(error) => return Some(format!("cannot be examined: {error}")),
    };
    if (metadata.mode() ^ expected.mode) & libc::S_IFMT != 0 {
        return Some("is of another type".into());
    }
    // A file both hosts share may grow between the two looks; that it is shared is the operator's word or its file system's.
    if !metadata.is_file() || expected.must_be_shared {
        return None;
    }
    if metadata.len() != expected.size {
        return Some(format!(
            "has {} bytes instead of {}",
            metadata.len(),
            expected.size
        ));
    }
    let same_time = || {
        let mtime_ns = metadata
            .mtime()
            .saturating_mul(1_000_000_000)
            .saturating_add(metadata.mtime_nsec());
        (mtime_ns != expected.mtime_ns).then(|| "was modified at another time".to_owned())
    };
    match check {
        FileCheck::Size => None,
        FileCheck::Mtime => same_time(),
        FileCheck::BuildId if expected.build_id.is_empty() => same_time(),
        FileCheck::BuildId => match read(&expected.path, build_id) {
            Ok(Some(id)) if id == expected.build_id => None,
            Ok(Some(_)) => Some("has another build id".into()),
            Ok(None) => Some("has no build id".into()),
            Err(why) => Some(why),
        },
        FileCheck::Content if expected.content_sha256.is_empty() => {
            Some("has no checksum to compare with (dump with --file-check content)".into())
        }
        FileCheck::Content => match read(&expected.path, content_sha256) {
            Ok(digest) if digest == expected.content_sha256 => None,
            Ok(_) => Some("has other content".into()),
            Err(why) => Some(why),
        },
    }
}

/// What `reader` finds in the file at `path`, which nobody is disturbed for; why it cannot be read, a clause.
fn read<T>(
    path: &str,
    reader: impl FnOnce(&File) -> io::Result<T>,
) -> std::result::Result<T, String> {
    let leased = |who: &str| format!("has a write lease of {who}, which opening it would break");
    let holders = lock::lease_holders(path);
    let holders = holders.map_err(|error| format!("cannot be asked for its leases: {error}"))?;
    if let Some(holder) = holders.first() {
        return Err(leased(&format!("process {holder}")));
    }
    let found = open(path).and_then(|file| reader(&file));
    found.map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => leased("somebody who cannot be seen"),
        _ => format!("cannot be read: {error}"),
    })
}

/// The position of the open file, which may be a program's, stays where it is.
fn content_sha256(file: &File) -> io::Result<Vec<u8>> {
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    loop {
        match file.read_at(&mut buffer, at)? {
            0 => return Ok(digest.finalize().to_vec()),
            length => {
                digest.update(&buffer[..length]);
                at += length as u64;
            }
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// The GNU build id of an ELF file; `None` for other files and for those without one.
///
/// # Errors
/// What reading gave.
pub fn build_id(file: &File) -> io::Result<Option<Vec<u8>>> {
    let mut header = [0; 64];
    match file.read_exact_at(&mut header, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    }
    // 64-bit, little-endian.
    if !header.starts_with(b"\x7fELF\x02\x01") {
        return Ok(None);
    }
    let (table, entry_len, count) = (
        u64_at(&header, 32),
        u16_at(&header, 54),
        u16_at(&header, 56),
    );
    let (Some(table), Some(entry_len @ 56..), Some(count @ ..=PROGRAM_HEADERS_MAX)) =
        (table, entry_len, count)
    else {
        return Ok(None);
    };
    let mut headers = vec![0; usize::from(entry_len) * usize::from(count)];
    if file.read_exact_at(&mut headers, table).is_err() {
        return Ok(None);
    }
    for entry in headers.chunks_exact(usize::from(entry_len)) {
        let (Some(PT_NOTE), Some(offset), Some(length)) =
            (u32_at(entry, 0), u64_at(entry, 8), u64_at(entry, 32))
        else {
            continue;
        };
        let mut notes = vec![0; length.min(NOTES_LEN_MAX) as usize];
        if file.read_exact_at(&mut notes, offset).is_ok() {
            if let Some(id) = note_build_id(&notes) {
                return Ok(Some(id));
            }
        }
    }
    Ok(None)
}

fn note_build_id(mut notes: &[u8]) -> Option<Vec<u8>> {
    loop {
        let (name_len, id_len, kind) = (
            u32_at(notes, 0)? as usize,
            u32_at(notes, 4)? as usize,
            u32_at(notes, 8)?,
        );
        let id_at = 12 + name_len.next_multiple_of(4);
        if kind == NT_GNU_BUILD_ID && notes.get(12..12 + name_len) == Some(b"GNU\0") {
            return notes
                .get(id_at..id_at.checked_add(id_len)?)
                .map(<[u8]>::to_vec);
        }
        notes = notes.get(id_at.checked_add(id_len)?.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn notes_before_the_build_id_are_passed_over() {
        let mut notes = Vec::new();
        for (name, kind, id) in [
            (&b"stapsdt\0"[..], 3u32, &b"abc"[..]),
            (b"GNU\0", 1, b"1234"),
            (b"GNU\0", 3, b"\x01\x02\x03\x04\x05"),
        ] {
            notes.extend_from_slice(&(name.len() as u32).to_le_bytes());
            notes.extend_from_slice(&(id.len() as u32).to_le_bytes());
            notes.extend_from_slice(&kind.to_le_bytes());
            notes.extend_from_slice(name);
            notes.resize(notes.len().next_multiple_of(4), 0);
            notes.extend_from_slice(id);
            notes.resize(notes.len().next_multiple_of(4), 0);
        }
        assert_eq!(note_build_id(&notes), Some(vec![1, 2, 3, 4, 5]));
        assert_eq!(note_build_id(&notes[..40]), None);
        assert_eq!(note_build_id(&[0xff; 64]), None);
    }

    #[test]
    fn a_changed_file_is_told_by_the_chosen_check() {
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(b"first").expect("written");
        let path = file.path().to_str().expect("UTF-8").to_owned();
        let identify = |check| identify(&path, check, false, || File::open(&path));
        let mtime = identify(FileCheck::Mtime).expect("identified");
        let content = identify(FileCheck::Content).expect("identified");
        assert_eq!(difference(&mtime, FileCheck::Mtime), None);
        assert_eq!(difference(&content, FileCheck::Content), None);
        file.as_file().write_all_at(b"FIRST", 0).expect("written");
        file.as_file()
            .set_modified(std::time::SystemTime::UNIX_EPOCH)
            .expect("modified");
        assert_eq!(difference(&mtime, FileCheck::Size), None);
        assert_eq!(
            difference(&mtime, FileCheck::Mtime).as_deref(),
            Some("was modified at another time")
        );
        assert_eq!(
            difference(&mtime, FileCheck::BuildId).as_deref(),
            Some("was modified at another time")
        );
        assert_eq!(
            difference(&content, FileCheck::Content).as_deref(),
            Some("has other content")
        );
        file.as_file().set_len(3).expect("cut");
        assert_eq!(
            difference(&mtime, FileCheck::Size).as_deref(),
            Some("has 3 bytes instead of 5")
        );
        drop(file);
        assert_eq!(
            difference(&mtime, FileCheck::Size).as_deref(),
            Some("is missing")
        );
    }

    #[test]
    fn this_program_has_a_build_id_or_none_but_no_error() {
        let own = std::env::current_exe().expect("own path");
        build_id(&File::open(own).expect("own file")).expect("readable");
    }
}
