//! Paths of UNIX sockets on this host: whether one can be bound to, and the files that were made until it is certain that they
//! stay.
//!
//! bind(2) makes a file and wants the path free. What lies there is only ever moved aside, and put back unless the tree comes to
//! run here. It must be a socket that nobody has, or the very file of the source where both hosts see one file system.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::ErrorKind;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use pageferry_image::model::sockets::{SocketFile, unix_path};
use pageferry_tracee::{Error as TraceeError, socket};

use crate::rebuild::{Error, Result};

/// The path in a UNIX address; `None` for an abstract name.
pub(super) fn path_of(address: &[u8]) -> Option<PathBuf> {
    unix_path(address).map(|path| PathBuf::from(OsStr::from_bytes(path)))
}

/// What lies at a path that is to be bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum There {
    Nothing,
    /// The file of a socket that has been closed, or of one on another host.
    Stale,
    /// The file of a socket that somebody has.
    Live {
        inode: u64,
    },
    /// No socket.
    Other,
}

fn look(path: &Path, address: &[u8]) -> std::io::Result<There> {
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(There::Nothing),
        found => found?,
    };
    if !found.file_type().is_socket() {
        return Ok(There::Other);
    }
    // A listening socket is not disturbed by one of another type, nor a datagram socket by somebody who only wants to send.
    let probe = socket::create(libc::AF_UNIX, libc::SOCK_DGRAM, 0)
        .and_then(|probe| socket::connect_raw(probe.as_fd(), address));
    match probe {
        Err(TraceeError::Kernel {
            errno: Errno::ECONNREFUSED | Errno::ENOENT,
            ..
        }) => Ok(There::Stale),
        Ok(())
        | Err(TraceeError::Kernel {
            errno: Errno::EPROTOTYPE | Errno::EPERM,
            ..
        }) => Ok(There::Live { inode: found.ino() }),
        Err(error) => Err(std::io::Error::other(error)),
    }
}

/// Why a UNIX socket cannot be bound to `address` here: a clause. `own`: the inode of the source's file there, if both hosts are
/// said to see the same one, else 0.
///
/// # Errors
/// The clause.
pub fn judge(address: &[u8], kind: i32, own: u64) -> std::result::Result<(), String> {
    let Some(path) = path_of(address) else {
        let taken = socket::create(libc::AF_UNIX, kind, 0)
            .and_then(|probe| socket::bind_raw(probe.as_fd(), address));
        return taken.map_err(|error| format!("cannot be bound on the target ({error})"));
    };
    let folder = path.parent().unwrap_or(Path::new("/"));
    if !folder.is_dir() {
        return Err("cannot be bound on the target, where its directory is missing".into());
    }
    match look(&path, address) {
        Ok(There::Nothing | There::Stale) => Ok(()),
        Ok(There::Live { inode }) if own != 0 && inode == own => Ok(()),
        Ok(There::Live { .. }) => Err(
            "is the path of a socket that a program on the target has; end that, or --same-file the path if it is the source's"
                .into(),
        ),
        Ok(There::Other) => {
            Err("cannot be bound on the target, where something that is no socket has that path".into())
        }
        Err(error) => Err(format!("cannot be looked at on the target ({error})")),
    }
}

/// What was done to one path.
#[derive(Debug, Default)]
struct Change {
    /// Where what was there lies now.
    aside: Option<PathBuf>,
    /// The inode of the file that is to stay.
    made: Option<u64>,
}

/// The files that were made for the sockets and named pipes of a tree. Unless they are [kept](Names::keep), everything is put back when this is
/// dropped.
#[derive(Debug, Default)]
pub struct Names(BTreeMap<PathBuf, Change>);

impl Names {
    /// Makes `address` free to be bound to. `own`: the inode of the source's file there.
    pub(super) fn free(&mut self, address: &[u8], own: u64, object: &str) -> Result<()> {
        let Some(path) = path_of(address) else {
            return Ok(());
        };
        if self.0.contains_key(&path) {
            return Ok(());
        }
        let failed = |call| move |error| Error::object(object, call, error);
        let there = look(&path, address).map_err(failed("stat of its path"))?;
        let mut change = Change::default();
        match there {
            There::Nothing => {}
            There::Live { inode } if inode != own => {
                return Err(Error::Mismatch {
                    object: object.into(),
                    what: "a program here has a socket at its path by now".into(),
                });
            }
            There::Other => {
                return Err(Error::Mismatch {
                    object: object.into(),
                    what: "something that is no socket has its path by now".into(),
                });
            }
            There::Stale | There::Live { .. } => {
                let mut name = OsString::from(format!(".pageferry-{}-", std::process::id()));
                name.push(path.file_name().unwrap_or_default());
                let aside = path.with_file_name(name);
                fs::rename(&path, &aside).map_err(failed("rename of what is at its path"))?;
                change.aside = Some(aside);
            }
        }
        self.0.insert(path, change);
        Ok(())
    }

    /// The socket is bound to `address`: its file gets what it had, or goes, as it had gone.
    pub(super) fn bound(
        &mut self,
        address: &[u8],
        file: Option<SocketFile>,
        object: &str,
    ) -> Result<()> {
        let Some(path) = path_of(address) else {
            return Ok(());
        };
        let failed = |call| move |error| Error::object(object, call, error);
        let Some(file) = file else {
            return fs::remove_file(&path).map_err(failed("unlink of its path"));
        };
        let inode = fs::symlink_metadata(&path)
            .map_err(failed("stat of its path"))?
            .ino();
        if let Some(change) = self.0.get_mut(&path) {
            change.made = Some(inode);
        }
        std::os::unix::fs::lchown(&path, Some(file.uid), Some(file.gid))
            .map_err(failed("chown of its path"))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(file.mode))
            .map_err(failed("chmod of its path"))
    }

    /// A file that was made where there was nothing.
    pub(crate) fn made(&mut self, path: &Path, inode: u64) {
        let change = Change {
            aside: None,
            made: Some(inode),
        };
        self.0.insert(path.to_owned(), change);
    }

    /// The tree runs here: its files stay, and what they replaced goes.
    pub fn keep(&mut self) {
        for (path, change) in std::mem::take(&mut self.0) {
            match (change.made, &change.aside) {
                (Some(_), Some(aside)) => {
                    if let Err(error) = fs::remove_file(aside) {
                        tracing::warn!("{} could not be removed: {error}", aside.display());
                    }
                }
                (None, Some(_)) => put_back(&path, &change),
                (_, None) => {}
            }
        }
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        for (path, change) in &self.0 {
            put_back(path, change);
        }
    }
}

fn put_back(path: &Path, change: &Change) {
    // Somebody may have put another there meanwhile.
    let is_ours = |inode| fs::symlink_metadata(path).is_ok_and(|found| found.ino() == inode);
    let undone = match (&change.aside, change.made) {
        (Some(aside), _) => fs::rename(aside, path),
        (None, Some(inode)) if is_ours(inode) => fs::remove_file(path),
        (None, _) => Ok(()),
    };
    if let Err(error) = undone {
        tracing::warn!(
            "{} could not be put back as it was: {error}",
            path.display()
        );
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use super::*;

    fn address(path: &Path) -> Vec<u8> {
        [b"\x01\0", path.as_os_str().as_bytes(), b"\0"].concat()
    }

    #[test]
    fn a_path_is_bound_to_where_nobody_has_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let raw = address(&path);
        let judge = |own| judge(&raw, libc::SOCK_STREAM, own);
        assert_eq!(judge(0), Ok(()));
        let listener = UnixListener::bind(&path).expect("bound");
        let inode = fs::metadata(&path).expect("made").ino();
        assert!(judge(0).is_err_and(|why| why.contains("a program on the target")));
        assert!(judge(inode + 1).is_err());
        assert_eq!(judge(inode), Ok(()), "the source's own");
        listener.set_nonblocking(true).expect("set");
        assert!(listener.accept().is_err(), "nobody has disturbed it");
        drop(listener);
        assert_eq!(judge(0), Ok(()), "a stale one");
        fs::remove_file(&path).expect("removed");
        let datagram = UnixDatagram::bind(&path).expect("bound");
        assert!(judge(0).is_err());
        drop(datagram);
        fs::remove_file(&path).expect("removed");
        fs::write(&path, "text").expect("written");
        assert!(judge(0).is_err_and(|why| why.contains("no socket")));
        let lost = address(&folder.path().join("no/socket"));
        assert!(
            super::judge(&lost, libc::SOCK_STREAM, 0)
                .is_err_and(|why| why.contains("directory is missing"))
        );
    }

    #[test]
    fn an_abstract_name_is_bound_to_where_nobody_has_it() {
        let name = format!("\u{1}\0\0pageferry-names-{}", std::process::id());
        let judge = || judge(name.as_bytes(), libc::SOCK_STREAM, 0);
        assert_eq!(judge(), Ok(()));
        let taken = socket::create(libc::AF_UNIX, libc::SOCK_STREAM, 0).expect("a socket");
        socket::bind_raw(taken.as_fd(), name.as_bytes()).expect("bound");
        assert!(judge().is_err());
    }

    fn bind(names: &mut Names, path: &Path, own: u64, file: Option<SocketFile>) -> UnixListener {
        let raw = address(path);
        names.free(&raw, own, "a socket").expect("free");
        let listener = UnixListener::bind(path).expect("bound");
        names.bound(&raw, file, "a socket").expect("bound");
        listener
    }

    #[test]
    fn what_was_there_comes_back_unless_the_tree_runs_here() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let file = Some(SocketFile {
            mode: 0o640,
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            inode: 0,
        });
        let count = || fs::read_dir(folder.path()).expect("ours").count();
        // Nothing was there.
        let mut names = Names::default();
        drop(bind(&mut names, &path, 0, file));
        assert_eq!(
            fs::metadata(&path).expect("made").permissions().mode() & 0o7777,
            0o640
        );
        drop(names);
        assert_eq!(count(), 0);
        // A live one, the source's: it is reached again.
        let source = UnixListener::bind(&path).expect("bound");
        let own = fs::metadata(&path).expect("made").ino();
        let mut names = Names::default();
        assert!(names.free(&address(&path), own + 1, "a socket").is_err());
        let target = bind(&mut names, &path, own, file);
        UnixStream::connect(&path).expect("connected");
        target.accept().expect("the new one is reached");
        drop(names);
        UnixStream::connect(&path).expect("connected");
        source.accept().expect("the old one is reached again");
        // Without a file of its own nothing stays of it.
        let mut names = Names::default();
        drop(bind(&mut names, &path, own, None));
        names.keep();
        UnixStream::connect(&path).expect("connected");
        // The tree runs here.
        let mut names = Names::default();
        let target = bind(&mut names, &path, own, file);
        names.keep();
        assert_eq!(count(), 1);
        UnixStream::connect(&path).expect("connected");
        target.accept().expect("the new one is reached");
    }
}
