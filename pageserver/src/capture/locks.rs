//! Locks on files, as `fdinfo` tells them: at each descriptor of an open file the locks it holds, and the record locks that this
//! process took through it.
//!
//! A thread that waits for a lock asks for it again when it goes on, so only locks that are held are carried.
//!
//! Whoever opens a file on which there is a lease for writing breaks it: the program is told, and the open(2) waits, for up to 45
//! seconds. So such a file is opened by nobody here. What must be read of it is read through the program's own open file, and where
//! the target would have to open the very file, the lease is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File as OpenFile;
use std::io;
use std::os::unix::fs::MetadataExt as _;

use nix::errno::Errno;
use pageferry_image::model::files::file;
use pageferry_image::model::locks::{Kind, Lock as Model};
use pageferry_tracee::descriptor::{self, Owner, PidFd};
use pageferry_tracee::lock::{self, Line, Lock};
use pageferry_tracee::procfs::{self, DescriptorEntry, FileKey};

use super::files::Verdict;
use crate::Result;
use crate::survey::{Object, Pids, Refusal, RefusalKind};

/// Locks of frozen processes as these could give them up.
#[derive(Debug, Clone, Default)]
pub struct HeldLocks {
    /// On files of this host, by process.
    local: BTreeMap<i32, Vec<lock::Held>>,
    /// On files that the target may see too, by process.
    seen: BTreeMap<i32, Vec<lock::Held>>,
}

impl HeldLocks {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.local.is_empty() && self.seen.is_empty()
    }

    /// Those that could be in the way of the tree on the target: all if it `waits` for some, else only those on files that it may
    /// see.
    pub fn in_the_way(self, waits: bool) -> Self {
        match waits {
            true => self,
            false => Self {
                local: BTreeMap::new(),
                seen: self.seen,
            },
        }
    }

    /// By process; one may come twice.
    pub fn iter(&self) -> impl Iterator<Item = (i32, &[lock::Held])> {
        let all = self.local.iter().chain(&self.seen);
        all.map(|(pid, held)| (*pid, held.as_slice()))
    }

    /// Somebody who would get one of them if it was given up for a moment: a clause. No process of a frozen tree waits for a lock.
    ///
    /// # Errors
    /// [`crate::Error::Process`].
    pub fn waited_for(&self) -> Result<Option<String>> {
        if self.is_empty() {
            return Ok(None);
        }
        let all = lock::all()?;
        let waiters = all.iter().filter(|line| line.waits || line.breaking);
        for waiter in waiters {
            let is_wanted = |held: &&lock::Held| {
                let conflicts = |wanted: Lock| wanted.conflicts(&held.lock);
                // Of a lease the line is the holder's.
                let is_lease = waiter.breaking && held.lock.kind == lock::Kind::Lease;
                held.file == waiter.file && (is_lease || waiter.lock.is_some_and(conflicts))
            };
            for (pid, locks) in self.iter() {
                if let Some(held) = locks.iter().find(is_wanted) {
                    let who = match waiter.pid {
                        _ if waiter.breaking => "somebody who opens the file".to_owned(),
                        1.. => format!("process {}", waiter.pid),
                        _ => "a process that cannot be seen from here".to_owned(),
                    };
                    let fd = held.fd;
                    return Ok(Some(format!(
                        "{who} waits for the lock of pid {pid} on its fd {fd}"
                    )));
                }
            }
        }
        Ok(None)
    }
}

/// One of them, and what is carried of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Held {
    held: lock::Held,
    model: Model,
    /// It is this process that took it.
    is_taker: bool,
    /// No other host sees the file.
    is_local: bool,
}

/// An open file, as far as it must be known for its locks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Opened<'f> {
    /// Its number.
    pub file: u32,
    pub kind: &'f file::Kind,
    pub owner: Owner,
    /// No other host sees the file.
    pub is_local: bool,
}

/// Why the lease on a file that goes along is refused: it is had through several open files while it is read here and filled there,
/// and that is against a lease.
pub(crate) const GOES_ALONG: &str = "goes along, and would not be had there (release it)";
/// Why a lease for writing is refused on a file that is mapped: on the target a mapping has an open file of its own.
pub(crate) const MAPPED: &str =
    "is for writing, and the file is mapped: it would not be had on the target (release it)";
/// Why a lease for writing is refused on a file that both hosts see.
pub(crate) const SEEN: &str =
    "is for writing, and the target would break it by opening the same file (release it)";
/// Why it is on one that is open for writing.
pub(crate) const WRITTEN: &str = "is for writing, and the file is open for writing: it is opened on the way to be synced, which would break it (release it)";
const BREAKING: &str = "is being broken (try again when the program has answered)";

/// The lease that an open file has.
fn lease(entry: &DescriptorEntry) -> Option<Line> {
    let mut lines = entry.info.locks.iter().filter_map(|text| Line::parse(text));
    lines.find(|line| line.word == "LEASE")
}

/// Whether an open file has a lease.
pub(crate) fn is_leased(entry: &DescriptorEntry) -> bool {
    lease(entry).is_some()
}

/// Whether an open file has a lease that is broken by whoever opens the file: for writing, or one that is being broken already.
pub(crate) fn is_leased_alone(entry: &DescriptorEntry) -> bool {
    let is_alone = |line: Line| line.breaking || line.lock.is_none_or(|lock| lock.exclusive);
    lease(entry).is_some_and(is_alone)
}

/// Files that must not be opened, for that would break a lease, and where each is open already.
#[derive(Debug, Default)]
pub(crate) struct Leased(BTreeMap<FileKey, Place>);

impl Leased {
    /// Adds what a process has open.
    pub(crate) fn add(&mut self, pid: i32, entries: &[DescriptorEntry]) {
        for entry in entries.iter().filter(|entry| is_leased_alone(entry)) {
            // Closed meanwhile, and the lease gone with it, as only a running process can do.
            if let Ok(found) = std::fs::metadata(format!("/proc/{pid}/fd/{}", entry.fd)) {
                let key = (found.dev(), found.ino());
                self.0.entry(key).or_insert((pid, entry.fd));
            }
        }
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the file is one of them; its device and inode as stat(2) tells them.
    pub(crate) fn has(&self, key: FileKey) -> bool {
        self.0.contains_key(&key)
    }

    /// The open file itself, if it is one of them.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] if it has been closed meanwhile.
    pub(crate) fn copy(&self, key: FileKey) -> Option<io::Result<OpenFile>> {
        let &(pid, fd) = self.0.get(&key)?;
        Some(copy(pid, fd, key))
    }
}

fn copy(pid: i32, fd: u32, key: FileKey) -> io::Result<OpenFile> {
    let copy = PidFd::open(pid).and_then(|process| process.get_fd(fd));
    let copy = OpenFile::from(copy.map_err(|error| match &error {
        _ if error.is_gone() => io::ErrorKind::NotFound.into(),
        pageferry_tracee::Error::Kernel { errno, .. } if *errno == Errno::EBADF => {
            io::ErrorKind::NotFound.into()
        }
        _ => io::Error::other(error),
    })?);
    let found = copy.metadata()?;
    match (found.dev(), found.ino()) == key {
        true => Ok(copy),
        false => Err(io::ErrorKind::NotFound.into()),
    }
}

/// The locks that a process holds through `entry`, which is the open file `opened`; why one is refused.
pub(crate) fn held(pid: i32, entry: &DescriptorEntry, opened: Opened<'_>) -> Verdict<Vec<Held>> {
    let mut locks = Vec::with_capacity(entry.info.locks.len());
    for text in &entry.info.locks {
        let line = Line::parse(text);
        if line.as_ref().is_some_and(|line| line.breaking) {
            return Err(RefusalKind::Lease {
                path: entry.link.clone(),
                why: BREAKING,
            });
        }
        let can_be_had =
            |kind| kind != lock::Kind::Lease || matches!(opened.kind, file::Kind::Regular(_));
        let found = line.as_ref().and_then(|line| {
            let lock = line.lock.filter(|lock| can_be_had(lock.kind))?;
            Some((lock, line.file, line.pid == pid))
        });
        let Some((lock, file_key, is_taker)) = found else {
            return Err(RefusalKind::FileLock {
                path: entry.link.clone(),
                kind: line.map_or_else(|| text.clone(), |line| line.word),
            });
        };
        let kind = match lock.kind {
            lock::Kind::Lease => Kind::Lease,
            lock::Kind::Flock => Kind::Flock,
            lock::Kind::Record => Kind::Record,
            lock::Kind::Description => Kind::Description,
        };
        locks.push(Held {
            held: lock::Held {
                fd: entry.fd,
                lock,
                file: file_key,
                owner: opened.owner,
            },
            model: Model {
                kind: kind.into(),
                exclusive: lock.exclusive,
                pid,
                file: opened.file,
                start: lock.start,
                len: lock.len,
            },
            is_taker,
            is_local: opened.is_local,
        });
    }
    Ok(locks)
}

/// Why an open file is refused that only a message brings: no process could take its lock again.
pub(crate) fn sent(entry: &DescriptorEntry) -> Option<RefusalKind> {
    let text = entry.info.locks.first()?;
    Some(RefusalKind::FileLock {
        path: entry.link.clone(),
        kind: Line::parse(text).map_or_else(|| text.clone(), |line| line.word),
    })
}

/// Where a lock of an open file was found: process and descriptor.
pub(crate) type Place = (i32, u32);

/// The places of those locks that are of open files, and not of processes.
pub(crate) fn of_files(locks: &[Held]) -> BTreeSet<Place> {
    let of_files = locks
        .iter()
        .filter(|held| held.model.kind() != Kind::Record);
    of_files
        .map(|held| (held.model.pid, held.held.fd))
        .collect()
}

/// Open files among `places` that processes outside of the tree, which is `pids`, have too: what they have locked together cannot be
/// in two places.
pub(crate) fn held_outside(pids: &[i32], places: &BTreeSet<Place>) -> Result<Vec<Refusal>> {
    let mut keys: BTreeMap<FileKey, Vec<Place>> = BTreeMap::new();
    for &(pid, fd) in places {
        // Closed meanwhile, as only a running process can do.
        if let Ok(found) = std::fs::metadata(format!("/proc/{pid}/fd/{fd}")) {
            keys.entry((found.dev(), found.ino()))
                .or_default()
                .push((pid, fd));
        }
    }
    let own = std::process::id() as i32;
    let mut refusals = Vec::new();
    for (key, holders) in procfs::file_holders(&keys.keys().copied().collect())? {
        let outside = holders
            .into_iter()
            .filter(|holder| *holder != own && !pids.contains(holder));
        let mut others: BTreeMap<Place, Vec<i32>> = BTreeMap::new();
        for holder in outside {
            // One that has ended, or that may not be looked at.
            let entries = procfs::descriptors(holder).unwrap_or_default();
            for place in keys.get(&key).into_iter().flatten() {
                let is_it = |entry: &DescriptorEntry| {
                    entry.info.ino == key.1
                        && descriptor::same_file(place.0, place.1, holder, entry.fd)
                            .unwrap_or(false)
                };
                if entries.iter().any(is_it) {
                    others.entry(*place).or_default().push(holder);
                }
            }
        }
        for ((pid, fd), holders) in others {
            refusals.push(Refusal {
                pid,
                object: Object::Fd(fd),
                what: RefusalKind::LockOutside {
                    path: procfs::descriptor(pid, fd)?.link,
                    holders: Pids(holders),
                },
            });
        }
    }
    Ok(refusals)
}

/// As the model wants them: those of an open file once, though each of its descriptors tells them, and as those of the process that
/// took them, if it has them still.
pub(crate) fn in_order(mut locks: Vec<Held>) -> (Vec<Model>, HeldLocks) {
    locks.sort_by_key(|held| (held.model.place(), !held.is_taker));
    locks.dedup_by_key(|held| held.model.place());
    let mut of_tree = HeldLocks::default();
    for held in &locks {
        let by_pid = match held.is_local {
            true => &mut of_tree.local,
            false => &mut of_tree.seen,
        };
        by_pid.entry(held.model.pid).or_default().push(held.held);
    }
    (locks.into_iter().map(|held| held.model).collect(), of_tree)
}

#[cfg(test)]
mod tests {
    use pageferry_image::model::files::{Eventfd, Regular};
    use pageferry_tracee::procfs::FdInfo;

    use super::*;

    const EVENTFD: file::Kind = file::Kind::Eventfd(Eventfd {
        count: 0,
        semaphore: false,
    });

    fn held_in(pid: i32, entry: &DescriptorEntry, kind: &file::Kind) -> Verdict<Vec<Held>> {
        let opened = Opened {
            file: 1,
            kind,
            owner: Owner::default(),
            is_local: pid == 7,
        };
        super::held(pid, entry, opened)
    }

    fn held(pid: i32, entry: &DescriptorEntry) -> Verdict<Vec<Held>> {
        held_in(pid, entry, &EVENTFD)
    }

    fn entry(locks: &[&str]) -> DescriptorEntry {
        DescriptorEntry {
            fd: 3,
            link: "/var/lib/file".into(),
            info: FdInfo {
                locks: locks.iter().map(|&lock| lock.to_owned()).collect(),
                ..FdInfo::default()
            },
        }
    }

    #[test]
    fn locks_of_an_open_file_are_held_once_and_those_of_processes_by_each() {
        let flock = "1: FLOCK  ADVISORY  WRITE 7 08:01:99 0 EOF";
        let record = "2: POSIX  ADVISORY  READ 7 08:01:99 5 9";
        let mut all = held(8, &entry(&[flock])).expect("carried");
        all.extend(held(7, &entry(&[flock, record])).expect("carried"));
        let (locks, by_pid) = in_order(all);
        assert_eq!(by_pid.local[&7].len(), 2);
        assert_eq!(locks.len(), 2, "{locks:?}");
        assert_eq!((locks[0].kind(), locks[0].pid), (Kind::Flock, 7));
        let record = &locks[1];
        assert_eq!((record.kind(), record.pid), (Kind::Record, 7));
        assert_eq!((record.start, record.len, record.exclusive), (5, 5, false));
    }

    #[test]
    fn a_lease_is_held_by_who_took_it() {
        let regular = file::Kind::Regular(Regular::default());
        let entry = entry(&["1: LEASE  ACTIVE    WRITE 8 08:01:99 0 EOF"]);
        assert!(is_leased_alone(&entry));
        let mut all = held_in(7, &entry, &regular).expect("carried");
        all.extend(held_in(8, &entry, &regular).expect("carried"));
        let (locks, by_pid) = in_order(all);
        assert_eq!(by_pid.iter().count(), 1);
        assert_eq!(locks.len(), 1, "{locks:?}");
        let lease = (locks[0].kind(), locks[0].exclusive, locks[0].pid);
        assert_eq!(lease, (Kind::Lease, true, 8));
    }

    #[test]
    fn only_what_the_target_may_see_is_in_its_way_unless_it_waits() {
        let record = |pid| format!("1: POSIX  ADVISORY  READ {pid} 08:01:99 5 9");
        let (here, there) = (record(7), record(8));
        let mut all = held(7, &entry(&[&here])).expect("carried");
        all.extend(held(8, &entry(&[&there])).expect("carried"));
        let (_, locks) = in_order(all);
        let pids = |waits| -> Vec<i32> {
            let in_the_way = locks.clone().in_the_way(waits);
            in_the_way.iter().map(|(pid, _)| pid).collect()
        };
        assert_eq!(pids(true), [7, 8]);
        assert_eq!(pids(false), [8]);
    }

    #[test]
    fn a_lease_that_is_being_broken_is_refused() {
        let regular = file::Kind::Regular(Regular::default());
        for left in ["UNLCK", "READ "] {
            let line = format!("1: LEASE  BREAKING  {left} 7 08:01:99 0 EOF");
            let entry = entry(&[&line]);
            assert!(is_leased_alone(&entry));
            let refusal = held_in(7, &entry, &regular).expect_err("not carried");
            assert_eq!(refusal.key(), "lease", "{refusal}");
        }
        let reading = entry(&["1: LEASE  ACTIVE    READ 7 08:01:99 0 EOF"]);
        assert!(is_leased(&reading) && !is_leased_alone(&reading));
    }

    #[test]
    fn what_nobody_knows_is_refused_by_the_kernels_word() {
        for (line, word) in [
            ("1: LEASE  ACTIVE    READ 7 08:01:99 0 EOF", "LEASE"),
            ("1: DELEG  ACTIVE    READ 7 08:01:99 0 EOF", "DELEG"),
            ("1: new words", "1: new words"),
        ] {
            let refusal = held(7, &entry(&[line])).expect_err("not carried");
            assert_eq!(
                refusal,
                RefusalKind::FileLock {
                    path: "/var/lib/file".into(),
                    kind: word.into()
                }
            );
        }
    }
}
