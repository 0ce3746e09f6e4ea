//! Shared objects: made in our own process, filled through their descriptors, and given to every process that maps or opens them.
//!
//! They are complete before the tree runs: what read(2) or a new mapping can reach must never be a page that has yet to come.

use std::fs::{File, OpenOptions, Permissions};
use std::io::ErrorKind;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use pageferry_image::model::Invalid;
use pageferry_image::model::shared::{Carried, Memfd, Shared, shared};
use pageferry_image::model::task::Tree;
use pageferry_image::store::ObjectId;
use pageferry_tracee::{shared as kernel, sysv};

use super::sockets::names::Names;
use super::{Error, Result};

/// Files that were made at their paths, and segments with their numbers. Dropped before they are kept, they are removed again.
#[derive(Debug, Default)]
pub struct NewFiles {
    made: Vec<NewFile>,
    /// Segments, by number.
    segments: Vec<i32>,
    /// Those of sockets and named pipes.
    pub(super) names: Names,
}

#[derive(Debug)]
struct NewFile {
    path: PathBuf,
    /// Device and inode.
    key: (u64, u64),
}

impl NewFiles {
    /// The tree runs: they are its files.
    pub fn keep(&mut self) {
        self.made.clear();
        self.segments.clear();
        self.names.keep();
    }
}

impl Drop for NewFiles {
    fn drop(&mut self) {
        for file in &self.made {
            let found = file.path.symlink_metadata();
            if found.is_ok_and(|found| (found.dev(), found.ino()) == file.key) {
                // What stays is refused by name at the next attempt.
                let _ = std::fs::remove_file(&file.path);
            }
        }
        for &segment in &self.segments {
            let _ = sysv::remove(segment);
        }
    }
}

/// The shared objects of a tree, made but perhaps not filled yet.
#[derive(Debug)]
pub struct Objects {
    /// The number of the first.
    first: u32,
    made: Vec<Made>,
    new_files: NewFiles,
}

#[derive(Debug)]
struct Made {
    name: String,
    size: u64,
    seals: u32,
    /// When it was modified last, nanoseconds since 1970; memory has no such time.
    mtime_ns: Option<i64>,
    file: File,
    /// It can only be attached: its number. We are, until everybody is.
    segment: Option<(i32, sysv::Made)>,
}

impl Objects {
    /// Makes the objects of `tree`, which is valid, all holes.
    ///
    /// # Errors
    /// [`Error::Tracee`], [`Error::Object`].
    pub fn create(tree: &Tree) -> Result<Self> {
        let mut new_files = NewFiles::default();
        let mut made = Vec::with_capacity(tree.shared.len());
        for shared in &tree.shared {
            made.push(make(shared, &mut new_files)?);
        }
        Ok(Self {
            first: ObjectId::shared(tree.processes.len(), 0).0,
            made,
            new_files,
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

    /// The number of the segment that the object with this id is.
    pub(super) fn segment(&self, id: u32) -> Option<i32> {
        let made = self.made.get(usize::try_from(id.checked_sub(1)?).ok()?)?;
        made.segment.as_ref().map(|(number, _)| *number)
    }

    /// Bytes of the object with this id, up to the end of its last page.
    pub(super) fn pages(&self, id: u32) -> u64 {
        let index = id
            .checked_sub(1)
            .and_then(|index| usize::try_from(index).ok());
        let made = index.and_then(|index| self.made.get(index));
        made.map_or(0, |made| {
            made.size.next_multiple_of(pageferry_image::page::PAGE_SIZE)
        })
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
        // O_TMPFILE has that bit in it, and stays in the flags of a file that was made so.
        let flags = flags & !libc::O_DIRECTORY.unsigned_abs();
        let opened = super::files::open(&path, flags, None);
        opened
            .map(File::from)
            .map_err(|error| Error::object(&made.name, "open", error))
    }

    /// Seals what is sealed: last, when it is filled and everything that may write it is mapped. Gives the files that were made.
    pub(super) fn finish(self) -> Result<NewFiles> {
        for made in &self.made {
            if made.seals != 0 {
                kernel::seal(&made.file, made.seals).map_err(|error| {
                    let error = std::io::Error::other(error);
                    Error::object(&made.name, "fcntl(F_ADD_SEALS)", error)
                })?;
            }
            if let Some(mtime_ns) = made.mtime_ns {
                made.file
                    .set_modified(time(mtime_ns))
                    .map_err(|error| Error::object(&made.name, "futimens", error))?;
            }
        }
        Ok(self.new_files)
    }
}

fn time(ns: i64) -> SystemTime {
    let distance = Duration::from_nanos(ns.unsigned_abs());
    match ns {
        0.. => SystemTime::UNIX_EPOCH + distance,
        _ => SystemTime::UNIX_EPOCH - distance,
    }
}

fn make(shared: &Shared, new_files: &mut NewFiles) -> Result<Made> {
    let name = shared.name();
    let (mut seals, mut mtime_ns, mut segment) = (0, None, None);
    let file = match &shared.kind {
        Some(shared::Kind::Anonymous(anonymous)) => {
            kernel::anonymous(shared.size, anonymous.no_reserve)?
        }
        Some(shared::Kind::Memfd(memfd)) => {
            seals = memfd.seals;
            make_memfd(memfd, shared.size, &name)?
        }
        Some(shared::Kind::Carried(file)) => {
            mtime_ns = Some(file.mtime_ns);
            make_file(file, shared.size, &name, new_files)?
        }
        Some(shared::Kind::Segment(model)) => {
            let wanted = sysv::Segment {
                id: model.number,
                key: model.key,
                size: shared.size,
                mode: model.mode,
                uid: model.uid,
                gid: model.gid,
                removed: model.removed,
                locked: model.locked,
                ..sysv::Segment::default()
            };
            let made = sysv::create(&wanted)?;
            new_files.segments.push(wanted.id);
            let file = made.file.try_clone();
            segment = Some((wanted.id, made));
            file.map_err(|error| Error::object(&name, "dup", error))?
        }
        None => return Err(Invalid::new(name, "is of no known kind").into()),
    };
    Ok(Made {
        name,
        size: shared.size,
        seals,
        mtime_ns,
        file,
        segment,
    })
}

fn make_file(carried: &Carried, size: u64, name: &str, new_files: &mut NewFiles) -> Result<File> {
    let path = Path::new(&carried.path);
    let mut options = OpenOptions::new();
    // Nobody else may open it before it is as it was.
    options.read(true).write(true).mode(0o600);
    let nameless = || {
        let folder = path.parent().unwrap_or(Path::new("/"));
        options.clone().custom_flags(libc::O_TMPFILE).open(folder)
    };
    let named = || {
        let file = options.clone().create_new(true).open(path)?;
        if carried.deleted {
            std::fs::remove_file(path)?;
        }
        Ok(file)
    };
    let opened = match carried.nameless {
        true => nameless(),
        false => named().or_else(|error: std::io::Error| {
            // Something else has its name by now, as on the source perhaps.
            match carried.deleted && error.kind() == ErrorKind::AlreadyExists {
                true => nameless(),
                false => Err(error),
            }
        }),
    };
    let file = opened.map_err(|error| Error::object(name, "open", error))?;
    if !carried.deleted {
        let metadata = file
            .metadata()
            .map_err(|error| Error::object(name, "fstat", error))?;
        new_files.made.push(NewFile {
            path: path.to_owned(),
            key: (metadata.dev(), metadata.ino()),
        });
    }
    shape(&file, size, carried.uid, carried.gid, carried.mode, name)?;
    Ok(file)
}

fn make_memfd(memfd: &Memfd, size: u64, name: &str) -> Result<File> {
    let file = kernel::memfd(&memfd.name, memfd.mode, memfd.seals)?;
    shape(&file, size, memfd.uid, memfd.gid, memfd.mode, name)?;
    Ok(file)
}

fn shape(file: &File, size: u64, uid: u32, gid: u32, mode: u32, name: &str) -> Result<()> {
    file.set_len(size)
        .map_err(|error| Error::object(name, "ftruncate", error))?;
    std::os::unix::fs::fchown(file, Some(uid), Some(gid))
        .map_err(|error| Error::object(name, "fchown", error))?;
    // Behind the owner, whose change takes the set-user-id bit away.
    file.set_permissions(Permissions::from_mode(mode))
        .map_err(|error| Error::object(name, "fchmod", error))
}

#[cfg(test)]
mod tests {
    use pageferry_image::model::shared::Segment;

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
        objects.finish().expect("nothing maps it");
        assert!(writer.write_at(b"y", 0).is_err(), "sealed");
        let mut bytes = [0; 5];
        reader.read_exact_at(&mut bytes, 4096).expect("it is there");
        assert_eq!(bytes, [7; 5]);
    }

    #[test]
    fn a_segment_that_was_made_is_removed_unless_it_is_kept() {
        if !nix::unistd::geteuid().is_root() || !sysv::can_number() {
            return;
        }
        let number = 9 << 15 | 99;
        let segment = Segment {
            number,
            mode: 0o600,
            ..Segment::default()
        };
        let tree = Tree {
            processes: vec![Default::default()],
            shared: vec![Shared {
                id: 1,
                size: 5000,
                kind: Some(shared::Kind::Segment(segment)),
            }],
            ..Tree::default()
        };
        let is_there = || sysv::segment(number).expect("it can be asked").is_some();
        let objects = Objects::create(&tree).expect("the number is free");
        assert_eq!((objects.segment(1), objects.pages(1)), (Some(number), 8192));
        objects.write(2, 4096, &[7; 4096]).expect("it has a place");
        assert!(Objects::create(&tree).is_err(), "it is there");
        assert!(is_there(), "the first is still there");
        drop(objects);
        assert!(!is_there());
        let objects = Objects::create(&tree).expect("the number is free");
        objects.finish().expect("nothing is left to do").keep();
        assert!(is_there(), "it was kept");
        sysv::remove(number).expect("it is there");
    }

    #[test]
    fn files_that_were_made_are_removed_unless_they_are_kept() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let folder = tempfile::tempdir().expect("a folder");
        let tree = |name: &str, deleted| Tree {
            processes: vec![Default::default()],
            shared: vec![Shared {
                id: 1,
                size: 5,
                kind: Some(shared::Kind::Carried(Carried {
                    path: folder.path().join(name).display().to_string(),
                    mode: 0o4755,
                    mtime_ns: -1,
                    deleted,
                    ..Carried::default()
                })),
            }],
            ..Tree::default()
        };
        let names = || std::fs::read_dir(folder.path()).expect("a folder").count();
        let objects = Objects::create(&tree("a", false)).expect("nothing is there");
        assert_eq!(names(), 1);
        assert!(Objects::create(&tree("a", false)).is_err(), "it is there");
        drop(objects);
        assert_eq!(names(), 0);
        let objects = Objects::create(&tree("a", false)).expect("nothing is there");
        objects.finish().expect("it can be finished").keep();
        let metadata = folder.path().join("a").metadata().expect("it was kept");
        assert_eq!((metadata.mode() & 0o7777, metadata.len()), (0o4755, 5));
        assert_eq!((metadata.mtime(), metadata.mtime_nsec()), (-1, 999_999_999));
        // What has no name needs none, whether it is free or not.
        for name in ["a", "b"] {
            let objects = Objects::create(&tree(name, true)).expect("it needs no name");
            assert_eq!(names(), 1);
            objects.write(2, 0, &[1; 4096]).expect("it has a place");
        }
    }
}
