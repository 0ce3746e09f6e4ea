//! Named pipes: made again where they are missing, filled, and open for reading and writing until every end has been opened, so
//! that no open waits for the other side.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use pageferry_image::model::files::{Fifo, file};
use pageferry_image::model::task::Tree;
use pageferry_tracee::pipe;

use crate::rebuild::sockets::names::Names;
use crate::rebuild::{Error, Result};

/// Opens every named pipe of `tree`, by the numbers of the pipes, with what lies unread in it.
pub(super) fn make(tree: &Tree, names: &mut Names) -> Result<BTreeMap<u32, OwnedFd>> {
    let mut made = BTreeMap::new();
    for file in &tree.files {
        let Some(file::Kind::Fifo(fifo)) = &file.kind else {
            continue;
        };
        if made.contains_key(&fifo.pipe) {
            continue;
        }
        let object = format!("named pipe {}", fifo.path);
        let opened = open(fifo, names, &object)?;
        let carried = tree.pipes.iter().find(|pipe| pipe.id == fifo.pipe);
        let unread = pipe::unread_bytes(&opened)?;
        if unread > 0 {
            return Err(Error::Mismatch {
                object,
                what: format!("{unread} bytes of another program lie in it here"),
            });
        }
        if let Some(carried) = carried {
            pipe::fill(&opened, carried.capacity, &carried.content)?;
        }
        made.insert(fifo.pipe, opened);
    }
    Ok(made)
}

fn open(fifo: &Fifo, names: &mut Names, object: &str) -> Result<OwnedFd> {
    let path = Path::new(&fifo.path);
    let failed = |call| move |error| Error::object(object, call, error);
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_fifo() => {}
        Ok(_) => {
            return Err(Error::Mismatch {
                object: object.into(),
                what: "there is something else at its path here".into(),
            });
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            nix::unistd::mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR)
                .map_err(|errno| Error::object(object, "mkfifo", errno))?;
            let inode = fs::symlink_metadata(path).map_err(failed("stat"))?.ino();
            names.made(path, inode);
            std::os::unix::fs::lchown(path, Some(fifo.uid), Some(fifo.gid))
                .map_err(failed("chown"))?;
            fs::set_permissions(path, fs::Permissions::from_mode(fifo.mode))
                .map_err(failed("chmod"))?;
        }
        Err(error) => return Err(Error::object(object, "stat", error)),
    }
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    nix::fcntl::open(path, flags, Mode::empty())
        .map_err(|errno| Error::object(object, "open", errno))
}
