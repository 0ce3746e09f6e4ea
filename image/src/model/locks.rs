//! Locks on files.
//!
//! A lock tells nobody what it protects, so a wrong one is the loss of data: what comes from a peer must be locks that the
//! processes named could have held at the same time.

#![allow(
    missing_docs,
    reason = "generated fields are documented in image/proto/locks.proto"
)]

use std::collections::{BTreeMap, BTreeSet};

use super::files::{Descriptor, File, file};
use super::memory::Space;
use super::{Invalid, ascending, at_most, ensure, limits};

include!("generated/pageferry.locks.rs");

/// One past the last byte of a file that can be locked: `OFFSET_MAX` is the last.
const END: u64 = 1 << 63;
/// Of open(2): the access mode among the flags of an open file, and the one that is for reading only.
const O_ACCMODE: u32 = 3;
const O_RDONLY: u32 = 0;

impl Lock {
    /// Validates all locks of a tree against its open files, the table of each process, by pid, and its memory.
    ///
    /// # Errors
    /// The broken rule.
    pub fn validate_all(
        locks: &[Self],
        files: &[File],
        tables: &[(i32, &[Descriptor])],
        spaces: &[&Space],
    ) -> Result<(), Invalid> {
        at_most(locks.len(), limits::LOCKS, || "list of locks".into())?;
        ascending(locks.iter().map(Self::place), "locks")?;
        let mut missing: BTreeSet<(i32, u32)> =
            locks.iter().map(|lock| (lock.pid, lock.file)).collect();
        for (pid, descriptors) in tables.iter().filter(|_| !locks.is_empty()) {
            for descriptor in *descriptors {
                missing.remove(&(*pid, descriptor.file));
            }
        }
        for lock in locks {
            let object = || format!("lock on open file {}", lock.file);
            ensure(lock.kind() != Kind::Invalid, object, "is of no known kind")?;
            ensure(
                File::find(files, lock.file).is_some(),
                object,
                "has no file",
            )?;
            let is_held = !missing.contains(&(lock.pid, lock.file));
            ensure(is_held, object, "is of a process that has not the file")?;
            let has_end = lock.start < END && lock.len < END - lock.start;
            ensure(has_end, object, "reaches beyond the end of any file")?;
            let is_whole = (lock.start, lock.len) == (0, 0);
            ensure(
                lock.kind() != Kind::Flock || is_whole,
                object,
                "is a flock on a part of the file",
            )?;
            ensure(
                lock.kind() != Kind::Lease || is_whole,
                object,
                "is a lease on a part of the file",
            )?;
        }
        Self::validate_leases(locks, files, spaces)?;
        for pair in locks.windows(2) {
            let object = || format!("lock on open file {}", pair[1].file);
            ensure(
                pair[0].owner() != pair[1].owner() || pair[0].end() <= pair[1].start,
                object,
                "overlaps another of the same owner",
            )?;
        }
        Ok(())
    }

    /// A lease is had on a file that is found by its path, and only while no other open file is against it; each mapping and each
    /// program has one of its own.
    fn validate_leases(locks: &[Self], files: &[File], spaces: &[&Space]) -> Result<(), Invalid> {
        let is_lease = |lock: &&Self| lock.kind() == Kind::Lease;
        if !locks.iter().any(|lock| is_lease(&lock)) {
            return Ok(());
        }
        let opened = files
            .iter()
            .filter_map(|file| Some((regular_path(file)?, file.flags & O_ACCMODE != O_RDONLY)));
        let mapped = spaces.iter().flat_map(|space| {
            let mappings = space.mappings.iter();
            let files = mappings.map(|mapping| (mapping.file.as_ref(), mapping.file_writable));
            files.chain([(space.exe.as_ref(), false)])
        });
        let mapped = mapped.filter_map(|(file, writes)| Some((file?.path.as_str(), writes)));
        let opened = count(opened);
        let mapped = count(mapped);
        for lock in locks.iter().filter(is_lease) {
            let object = || format!("lock on open file {}", lock.file);
            let path = File::find(files, lock.file).and_then(regular_path);
            let Some((path, opened)) = path.and_then(|path| opened.get_key_value(path)) else {
                return Err(Invalid::new(object(), "is a lease on what can have none"));
            };
            let mapped = mapped.get(path).copied().unwrap_or_default();
            let is_alone = |(all, written): (usize, usize), own| match lock.exclusive {
                true => all == own,
                false => written == 0,
            };
            ensure(
                is_alone(*opened, 1),
                object,
                "is a lease on a file that is open against it",
            )?;
            ensure(
                is_alone(mapped, 0),
                object,
                "is a lease on a file that is mapped or executed against it",
            )?;
        }
        Ok(())
    }

    /// One past its last byte.
    fn end(&self) -> u64 {
        match self.len {
            0 => END,
            len => self.start.saturating_add(len),
        }
    }

    /// Whose it is, on what: these cannot overlap. An open file has its locks whoever took them.
    fn owner(&self) -> (i32, u32, i32) {
        match self.kind() {
            Kind::Record => (self.kind, self.file, self.pid),
            _ => (self.kind, self.file, 0),
        }
    }

    /// Where it stands in the list of a tree.
    pub fn place(&self) -> (i32, u32, i32, u64) {
        let (kind, file, pid) = self.owner();
        (kind, file, pid, self.start)
    }

    /// As an operator knows it, and what for.
    pub fn name(&self) -> &'static str {
        match (self.kind(), self.exclusive) {
            (Kind::Flock, true) => "exclusive flock",
            (Kind::Flock, false) => "shared flock",
            (Kind::Record, true) => "record lock for writing",
            (Kind::Record, false) => "record lock for reading",
            (Kind::Lease, true) => "write lease",
            (Kind::Lease, false) => "read lease",
            (_, true) => "open file description lock for writing",
            (_, false) => "open file description lock for reading",
        }
    }
}

/// By path: how often it is there, and how often to be written.
fn count<'p>(paths: impl Iterator<Item = (&'p str, bool)>) -> BTreeMap<&'p str, (usize, usize)> {
    let mut counts = BTreeMap::<_, (usize, usize)>::new();
    for (path, writes) in paths {
        let (all, written) = counts.entry(path).or_default();
        *all += 1;
        *written += usize::from(writes);
    }
    counts
}

/// The path of a file that the target has.
fn regular_path(file: &File) -> Option<&str> {
    match &file.kind {
        Some(file::Kind::Regular(regular)) => Some(&regular.identity.as_ref()?.path),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::files::{Eventfd, Regular};
    use super::super::memory::{FileIdentity, Mapping};
    use super::*;

    fn lock(kind: Kind, pid: i32, file: u32, start: u64, len: u64) -> Lock {
        Lock {
            kind: kind.into(),
            exclusive: true,
            pid,
            file,
            start,
            len,
        }
    }

    fn check(locks: &[Lock]) -> Result<(), Invalid> {
        let files: Vec<File> = [1, 2]
            .map(|id| File {
                id,
                kind: Some(file::Kind::Eventfd(Eventfd::default())),
                ..File::default()
            })
            .into();
        let row = |fd, file| Descriptor {
            fd,
            file,
            close_on_exec: false,
        };
        let (root, child) = ([row(3, 1), row(4, 2)], [row(9, 2)]);
        Lock::validate_all(locks, &files, &[(7, &root), (8, &child)], &[])
    }

    #[test]
    fn a_lock_has_a_kind_a_file_and_an_owner_that_has_it() {
        for kind in [Kind::Flock, Kind::Record, Kind::Description] {
            assert_eq!(check(&[lock(kind, 7, 1, 0, 0)]), Ok(()));
        }
        assert!(check(&[lock(Kind::Invalid, 7, 1, 0, 0)]).is_err());
        let unknown = Lock {
            kind: 5,
            ..lock(Kind::Record, 7, 1, 0, 0)
        };
        assert!(check(&[unknown]).is_err());
        assert!(check(&[lock(Kind::Record, 7, 3, 0, 0)]).is_err(), "no file");
        assert!(check(&[lock(Kind::Record, 8, 1, 0, 0)]).is_err(), "not its");
        assert!(check(&[lock(Kind::Record, 9, 1, 0, 0)]).is_err(), "nobody");
    }

    #[test]
    fn a_lock_lies_within_a_file() {
        let last = END - 1;
        assert_eq!(check(&[lock(Kind::Record, 7, 1, last, 0)]), Ok(()));
        assert_eq!(check(&[lock(Kind::Record, 7, 1, 1, last - 1)]), Ok(()));
        assert!(check(&[lock(Kind::Record, 7, 1, 1, last)]).is_err());
        assert!(check(&[lock(Kind::Record, 7, 1, END, 0)]).is_err());
        assert!(check(&[lock(Kind::Record, 7, 1, 1, u64::MAX)]).is_err());
        assert!(check(&[lock(Kind::Flock, 7, 1, 0, 5)]).is_err());
    }

    #[test]
    fn locks_of_one_owner_do_not_overlap() {
        let record = |pid, start, len| lock(Kind::Record, pid, 2, start, len);
        assert_eq!(check(&[record(7, 0, 5), record(7, 5, 0)]), Ok(()));
        assert!(check(&[record(7, 0, 6), record(7, 5, 0)]).is_err());
        assert!(check(&[record(7, 0, 0), record(7, 5, 1)]).is_err());
        assert!(check(&[record(7, 5, 1), record(7, 0, 1)]).is_err(), "order");
        assert_eq!(check(&[record(7, 0, 0), record(8, 0, 0)]), Ok(()));
        let flock = |pid| lock(Kind::Flock, pid, 2, 0, 0);
        assert!(check(&[flock(7), flock(8)]).is_err(), "one open file");
    }

    #[test]
    fn a_lease_is_on_a_regular_file_that_nobody_has_open_against_it() {
        let named = |path: &str| {
            Some(FileIdentity {
                path: path.into(),
                ..FileIdentity::default()
            })
        };
        let open = |id, path, flags| File {
            id,
            flags,
            kind: Some(file::Kind::Regular(Regular {
                identity: named(path),
                position: 0,
            })),
            ..File::default()
        };
        let eventfd = File {
            id: 4,
            kind: Some(file::Kind::Eventfd(Eventfd::default())),
            ..File::default()
        };
        let row = |fd, file| Descriptor {
            fd,
            file,
            close_on_exec: false,
        };
        let table = [row(3, 1), row(4, 2), row(5, 3), row(6, 4)];
        let check_in = |space: Space, exclusive, file, second, flags| {
            let files = [
                open(1, "/a", 0o100_000),
                open(2, second, flags),
                open(3, "/c", 2),
                eventfd.clone(),
            ];
            let lease = Lock {
                exclusive,
                ..lock(Kind::Lease, 7, file, 0, 0)
            };
            Lock::validate_all(&[lease], &files, &[(7, &table)], &[&space])
        };
        let check = |exclusive, file, second, flags| {
            check_in(Space::default(), exclusive, file, second, flags)
        };
        assert_eq!(check(true, 1, "/b", 2), Ok(()));
        assert_eq!(check(false, 1, "/b", 2), Ok(()));
        assert_eq!(check(false, 1, "/a", 0), Ok(()), "both read");
        assert!(check(false, 1, "/a", 1).is_err(), "one writes");
        assert!(check(true, 1, "/a", 0).is_err(), "it is open twice");
        assert_eq!(check(true, 3, "/b", 0), Ok(()));
        assert!(check(false, 3, "/b", 0).is_err(), "open for writing");
        assert!(check(false, 4, "/b", 0).is_err(), "no file");
        let part = lock(Kind::Lease, 7, 1, 0, 5);
        assert!(super::tests::check(&[part]).is_err(), "a part");

        let mapped = |path, file_writable| Space {
            mappings: vec![Mapping {
                file: named(path),
                file_writable,
                ..Mapping::default()
            }],
            ..Space::default()
        };
        let check = |space, exclusive| check_in(space, exclusive, 1, "/b", 2);
        assert_eq!(check(mapped("/b", true), true), Ok(()), "another is mapped");
        assert!(check(mapped("/a", false), true).is_err(), "it is mapped");
        assert_eq!(check(mapped("/a", false), false), Ok(()), "both read");
        assert!(
            check(mapped("/a", true), false).is_err(),
            "the memory is it"
        );
        let program = || Space {
            exe: named("/a"),
            ..Space::default()
        };
        assert!(check(program(), true).is_err(), "it is executed");
        assert_eq!(check(program(), false), Ok(()), "executing reads");
    }
}
