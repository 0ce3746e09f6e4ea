//! Shared objects: made in our own process, filled through their descriptors, and given to every process that maps or opens them.
//!
//! They are complete before the tree runs: what read(2) or a new mapping can reach must never be a page that has yet to come.

use std::fs::{File, Permissions};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};

use pageferry_image::model::Invalid;
use pageferry_image::model::shared::{Memfd, Shared, shared};
use pageferry_image::model::task::Tree;
use pageferry_image::store::ObjectId;
use pageferry_tracee::shared as kernel;

use super::{Error, Result};

/// The shared objects of a tree, made but perhaps not filled yet.
#[derive(Debug)]
pub struct Objects {
    /// The number of the first.
    first: u32,
    made: Vec<Made>,
}

#[derive(Debug)]
struct Made {
    name: String,
    size: u64,
    seals: u32,
    file: File,
}

impl Objects {
    /// Makes the objects of `tree`, which is valid, all holes.
    ///
    /// # Errors
    /// [`Error::Tracee`], [`Error::Object`].
    pub fn create(tree: &Tree) -> Result<Self> {
        Ok(Self {
            first: ObjectId::shared(tree.processes.len(), 0).0,
            made: tree.shared.iter().map(make).collect::<Result<_>>()?,
        })
    }

    /// Whether `object` is the number of one of them.
    pub fn has(&self, object: u32) -> bool {
        self.made(object).is_some()
    }

    fn made(&self, object: u32) -> Option<&Made> {
        let index = object.checked_sub(self.first)?;
        self.made.get(usize::try_from(index).ok()?)
    }

    /// Puts `bytes`, whole pages, at `offset`. What lies behind the end of the object is left out.
    ///
    /// # Errors
    /// [`Error::Model`] if there is no such place; [`Error::Object`].
    pub fn write(&self, object: u32, offset: u64, bytes: &[u8]) -> Result<()> {
        let made = self.made(object);
        let end = offset.saturating_add(bytes.len() as u64);
        let made = made.filter(|made| {
            let pages = made.size.next_multiple_of(pageferry_image::page::PAGE_SIZE);
            end <= pages
        });
        let Some(made) = made else {
            let page = format!("page {offset:x} of object {object}");
            return Err(Invalid::new(page, "came with the state and has no place").into());
        };
        let inside = usize::try_from(made.size - offset).unwrap_or(usize::MAX);
        let bytes = &bytes[..inside.min(bytes.len())];
        made.file
            .write_all_at(bytes, offset)
            .map_err(|error| Error::object(&made.name, "pwrite", error))
    }

    /// The object with this id as what maps it needs it: writable or not is told by the descriptor.
    pub(super) fn to_map(&self, id: u32, writable: bool) -> Result<File> {
        let flags = if writable {
            libc::O_RDWR
        } else {
            libc::O_RDONLY
        };
        self.open(id, flags.unsigned_abs())
    }

    /// A new open file description of the object with this id.
    pub(super) fn open(&self, id: u32, flags: u32) -> Result<File> {
        let made = id
            .checked_sub(1)
            .and_then(|index| self.made.get(usize::try_from(index).ok()?))
            .ok_or_else(|| Invalid::new(format!("object {id}"), "is not in the tree"))?;
        let path = format!("/proc/self/fd/{}", made.file.as_raw_fd());
        let opened = super::files::open(&path, flags, None);
        opened
            .map(File::from)
            .map_err(|error| Error::object(&made.name, "open", error))
    }

    /// Seals what is sealed: last, when it is filled and everything that may write it is mapped.
    pub(super) fn seal(&self) -> Result<()> {
        for made in self.made.iter().filter(|made| made.seals != 0) {
            kernel::seal(&made.file, made.seals).map_err(|error| {
                Error::object(
                    &made.name,
                    "fcntl(F_ADD_SEALS)",
                    std::io::Error::other(error),
                )
            })?;
        }
        Ok(())
    }
}

fn make(shared: &Shared) -> Result<Made> {
    let name = shared.name();
    let (file, seals) = match &shared.kind {
        Some(shared::Kind::Anonymous(anonymous)) => {
            (kernel::anonymous(shared.size, anonymous.no_reserve)?, 0)
        }
        Some(shared::Kind::Memfd(memfd)) => (make_memfd(memfd, shared.size, &name)?, memfd.seals),
        None => return Err(Invalid::new(name, "is of no known kind").into()),
    };
    Ok(Made {
        name,
        size: shared.size,
        seals,
        file,
    })
}

fn make_memfd(memfd: &Memfd, size: u64, name: &str) -> Result<File> {
    let file = kernel::memfd(&memfd.name, memfd.mode, memfd.seals)?;
    file.set_len(size)
        .map_err(|error| Error::object(name, "ftruncate", error))?;
    std::os::unix::fs::fchown(&file, Some(memfd.uid), Some(memfd.gid))
        .map_err(|error| Error::object(name, "fchown", error))?;
    // Behind the owner, whose change takes the set-user-id bit away.
    file.set_permissions(Permissions::from_mode(memfd.mode))
        .map_err(|error| Error::object(name, "fchmod", error))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    fn objects(size: u64) -> Objects {
        let memfd = Memfd {
            name: "object".into(),
            mode: 0o640,
            seals: 1 | 8,
            ..Memfd::default()
        };
        let tree = Tree {
            processes: vec![Default::default(); 2],
            shared: vec![Shared {
                id: 1,
                size,
                kind: Some(shared::Kind::Memfd(memfd)),
            }],
            ..Tree::default()
        };
        Objects::create(&tree).expect("they can be made")
    }

    #[test]
    fn an_object_is_filled_cut_and_sealed() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let objects = objects(4096 + 5);
        assert!(!objects.has(2) && objects.has(3) && !objects.has(4));
        let page = [7; 4096];
        objects.write(3, 4096, &page).expect("it has a place");
        assert!(objects.write(3, 2 * 4096, &page).is_err(), "behind its end");
        assert!(objects.write(4, 0, &page).is_err(), "no such object");
        let reader = objects.to_map(1, false).expect("it can be opened");
        let metadata = reader.metadata().expect("it is open");
        assert_eq!((metadata.len(), metadata.mode() & 0o7777), (4101, 0o640));
        assert!(reader.write_at(b"x", 0).is_err(), "opened for reading");
        let writer = objects.to_map(1, true).expect("it can be opened");
        writer.write_all_at(b"x", 0).expect("it is not sealed yet");
        objects.seal().expect("nothing maps it");
        assert!(writer.write_at(b"y", 0).is_err(), "sealed");
        assert!(objects.seal().is_err(), "sealed against that");
        let mut bytes = [0; 5];
        reader.read_exact_at(&mut bytes, 4096).expect("it is there");
        assert_eq!(bytes, [7; 5]);
    }
}
