//! Locks on files, as `fdinfo` tells them: at each descriptor of an open file the locks it holds, and the record locks that this
//! process took through it.
//!
//! A thread that waits for a lock asks for it again when it goes on, so only locks that are held are carried.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;

use pageferry_image::model::locks::{Kind, Lock as Model};
use pageferry_tracee::descriptor;
use pageferry_tracee::lock::{self, Line, Lock};
use pageferry_tracee::procfs::{self, DescriptorEntry, FileKey};

use super::files::Verdict;
use crate::Result;
use crate::survey::{Object, Pids, Refusal, RefusalKind};

/// Locks of frozen processes as these could give them up, by process.
#[derive(Debug, Clone, Default)]
pub struct HeldLocks(BTreeMap<i32, Vec<lock::Held>>);

impl HeldLocks {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// By process.
    pub fn iter(&self) -> impl Iterator<Item = (i32, &[lock::Held])> {
        self.0.iter().map(|(pid, held)| (*pid, held.as_slice()))
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
        let waiters = all.iter().filter(|line| line.waits);
        for waiter in waiters {
            let is_wanted = |held: &&lock::Held| {
                let conflicts = |wanted: Lock| wanted.conflicts(&held.lock);
                held.file == waiter.file && waiter.lock.is_some_and(conflicts)
            };
            for (pid, locks) in self.iter() {
                if let Some(held) = locks.iter().find(is_wanted) {
                    let who = match waiter.pid {
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
}

/// The locks that a process holds through `entry`, which is open file number `file`; why one is refused.
pub(crate) fn held(pid: i32, entry: &DescriptorEntry, file: u32) -> Verdict<Vec<Held>> {
    let mut locks = Vec::with_capacity(entry.info.locks.len());
    for text in &entry.info.locks {
        let line = Line::parse(text);
        let Some((lock, file_key)) = line.as_ref().and_then(|line| Some((line.lock?, line.file)))
        else {
            return Err(RefusalKind::FileLock {
                path: entry.link.clone(),
                kind: line.map_or_else(|| text.clone(), |line| line.word),
            });
        };
        let kind = match lock.kind {
            lock::Kind::Flock => Kind::Flock,
            lock::Kind::Record => Kind::Record,
            lock::Kind::Description => Kind::Description,
        };
        locks.push(Held {
            held: lock::Held {
                fd: entry.fd,
                lock,
                file: file_key,
            },
            model: Model {
                kind: kind.into(),
                exclusive: lock.exclusive,
                pid,
                file,
                start: lock.start,
                len: lock.len,
            },
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

/// As the model wants them: those of an open file once, though each of its descriptors tells them.
pub(crate) fn in_order(mut locks: Vec<Held>) -> (Vec<Model>, HeldLocks) {
    locks.sort_by_key(|held| held.model.place());
    locks.dedup_by_key(|held| held.model.place());
    let mut by_pid = HeldLocks::default();
    for held in &locks {
        let of_process = by_pid.0.entry(held.model.pid).or_default();
        of_process.push(held.held);
    }
    (locks.into_iter().map(|held| held.model).collect(), by_pid)
}

#[cfg(test)]
mod tests {
    use pageferry_tracee::procfs::FdInfo;

    use super::*;

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
        let mut all = held(8, &entry(&[flock]), 1).expect("carried");
        all.extend(held(7, &entry(&[flock, record]), 1).expect("carried"));
        let (locks, by_pid) = in_order(all);
        assert_eq!((by_pid.0[&7].len(), by_pid.0[&8].len()), (1, 1));
        assert_eq!(locks.len(), 2, "{locks:?}");
        assert_eq!((locks[0].kind(), locks[0].pid), (Kind::Flock, 8));
        let record = &locks[1];
        assert_eq!((record.kind(), record.pid), (Kind::Record, 7));
        assert_eq!((record.start, record.len, record.exclusive), (5, 5, false));
    }

    #[test]
    fn leases_and_what_nobody_knows_are_refused_by_the_kernels_word() {
        for (line, word) in [
            ("1: LEASE  ACTIVE    READ 7 08:01:99 0 EOF", "LEASE"),
            ("1: DELEG  ACTIVE    READ 7 08:01:99 0 EOF", "DELEG"),
            ("1: new words", "1: new words"),
        ] {
            let refusal = held(7, &entry(&[line]), 1).expect_err("not carried");
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
