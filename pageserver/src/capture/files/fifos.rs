//! Named pipes: their paths, and what lies unread in them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata, OpenOptions};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};

use pageferry_image::model::files::Fifo;
use pageferry_tracee::{pipe, procfs};

use super::{Entries, Shape, Verdict, same_inode};
use crate::survey::{Object, Pids, Refusal, RefusalKind};
use crate::{Error, Result};

/// The named pipe that is open as `open`.
pub(super) fn shape(path: String, open: &Metadata) -> Verdict<Shape> {
    match fs::symlink_metadata(&path) {
        Ok(named) if same_inode(open, &named) => Ok(Shape::Fifo(Fifo {
            pipe: 0,
            path,
            mode: open.mode() & 0o7777,
            uid: open.uid(),
            gid: open.gid(),
        })),
        _ => Err(RefusalKind::Fifo { path }),
    }
}

/// What tells one named pipe from another.
pub(super) fn key(copy: &OwnedFd) -> Result<(u64, u64)> {
    let found = nix::sys::stat::fstat(copy).map_err(|errno| Error::File {
        path: "a named pipe".into(),
        source: errno.into(),
    })?;
    Ok((found.st_dev, found.st_ino))
}

/// What lies unread, seen through an end that is open for that moment: the one at hand may be for writing only.
pub(super) fn contents(copy: &OwnedFd, path: &str) -> Result<Vec<u8>> {
    let end = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(format!("/proc/self/fd/{}", copy.as_raw_fd()))
        .map_err(|source| Error::File {
            path: path.into(),
            source,
        })?;
    Ok(pipe::contents(&end)?)
}

/// Named pipes of the tables, those among `fifos`, that processes outside of them have open.
pub(super) fn held_outside(
    tables: &[Entries],
    fifos: &BTreeSet<(u64, u64)>,
) -> Result<Vec<Refusal>> {
    if fifos.is_empty() {
        return Ok(Vec::new());
    }
    let mut named: BTreeMap<(u64, u64), (i32, u32, String)> = BTreeMap::new();
    for (pid, entries) in tables {
        for entry in entries.iter().filter(|entry| entry.link.starts_with('/')) {
            let Ok(found) = fs::metadata(format!("/proc/{pid}/fd/{}", entry.fd)) else {
                continue;
            };
            if found.file_type().is_fifo() {
                named.entry((found.dev(), found.ino())).or_insert((
                    *pid,
                    entry.fd,
                    entry.link.clone(),
                ));
            }
        }
    }
    let own = std::process::id() as i32;
    let is_inside = |holder: &i32| *holder == own || tables.iter().any(|(pid, _)| pid == holder);
    let mut holders = procfs::fifo_holders(fifos)?;
    Ok(named
        .into_iter()
        .filter_map(|(key, (pid, fd, path))| {
            let mut others = holders.remove(&key).unwrap_or_default();
            others.retain(|holder| !is_inside(holder));
            (!others.is_empty()).then(|| Refusal {
                pid,
                object: Object::Fd(fd),
                what: RefusalKind::FifoOutside {
                    path,
                    holders: Pids(others.into_iter().collect()),
                },
            })
        })
        .collect())
}
