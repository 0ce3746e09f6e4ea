//! Locks on files: each is taken by the process whose it is, on the descriptors that have been rebuilt, before it runs.
//!
//! On a file that both hosts see, the stopped source still holds what the tree is to hold here:
//! 1. What can be had is taken when a process is built. What a process of this host has, by its number, ends the attempt.
//! 2. What somebody has who cannot be seen from here may be the source's. READY tells the source that there is such a lock.
//! 3. It parks its copy, records COMMIT, gives all its locks up and sends COMMIT.
//! 4. They are taken here, before anything runs. If one cannot be had the tree is refused, and the source takes its own again.
//!
//! Between 3 and 4 nobody holds them, and nothing of the tree runs.
//!
//! A lease is never waited for: on a file that both hosts see it is for reading, and both can have it. Whoever has the file open here
//! against it ends the attempt.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;

use nix::errno::Errno;
use pageferry_image::model::Invalid;
use pageferry_image::model::files::{File, file};
use pageferry_image::model::locks::{Kind, Lock as Model};
use pageferry_image::model::task::{Process, Tree};
use pageferry_tracee::family::Family;
use pageferry_tracee::injection::Injection;
use pageferry_tracee::lock::{self, Lock};
use pageferry_tracee::procfs;

use super::files::{open, set_status};
use super::{Error, Result, Work};

/// A lock of the tree that somebody else had when its process was built.
#[derive(Debug, Clone)]
pub struct Waiting {
    pid: i32,
    fd: u32,
    /// Of the file, as far as it has one.
    path: String,
    name: &'static str,
    lock: Lock,
}

impl Waiting {
    /// It will not be had.
    pub fn refused(&self) -> Error {
        let holders = self.holders();
        Error::Mismatch {
            object: self.to_string(),
            what: match holders.is_empty() {
                true => "somebody else has it, who cannot be seen from here".into(),
                false => format!("process {} has it here; end that", list(&holders)),
            },
        }
    }

    /// Somebody has the file open, against the lease. `pids`: the tree.
    fn is_against(&self, pids: &[i32]) -> Error {
        let against = match self.lock.exclusive {
            true => "open",
            false => "open for writing",
        };
        let holders = self.openers(pids);
        Error::Mismatch {
            object: self.to_string(),
            what: match holders.is_empty() {
                true => format!("somebody who cannot be seen from here has the file {against}"),
                false => format!(
                    "the file is {against} here, perhaps by process {}; end that",
                    list(&holders)
                ),
            },
        }
    }

    /// Processes of this pid namespace, but for the tree and us, that have the file open or mapped.
    fn openers(&self, pids: &[i32]) -> Vec<i32> {
        let Ok(found) = std::fs::metadata(format!("/proc/{}/fd/{}", self.pid, self.fd)) else {
            return Vec::new();
        };
        let key = (found.dev(), found.ino());
        let mut holders = procfs::file_holders(&BTreeSet::from([key])).unwrap_or_default();
        let holders = holders.remove(&key).unwrap_or_default().into_iter();
        let own = std::process::id() as i32;
        holders
            .filter(|pid| *pid != own && !pids.contains(pid))
            .collect()
    }

    /// Processes of this pid namespace that have a lock in its way; nobody, if that cannot be found out.
    fn holders(&self) -> Vec<i32> {
        let path = format!("/proc/{}/fd/{}", self.pid, self.fd);
        let (Ok(Some(file)), Ok(all)) = (lock::file_at(&path), lock::all()) else {
            return Vec::new();
        };
        let in_the_way = |line: &&lock::Line| {
            line.pid > 0
                && !line.waits
                && line.file == file
                && line.lock.is_some_and(|other| other.conflicts(&self.lock))
        };
        all.iter().filter(in_the_way).map(|line| line.pid).collect()
    }
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            pid,
            fd,
            path,
            name,
            ..
        } = self;
        write!(f, "{name} of pid {pid} on fd {fd} ({path})")
    }
}

fn list(pids: &[i32]) -> String {
    let pids: Vec<String> = pids.iter().map(i32::to_string).collect();
    pids.join(", ")
}

/// The locks of a tree.
#[derive(Debug)]
pub(crate) struct Locks {
    /// By process.
    left: BTreeMap<i32, Vec<Model>>,
    waiting: Vec<Waiting>,
    /// Open files with a lease.
    leased: BTreeSet<u32>,
}

impl Locks {
    pub(crate) fn new(tree: &Tree) -> Self {
        let mut left: BTreeMap<i32, Vec<Model>> = BTreeMap::new();
        let mut leased = BTreeSet::new();
        for lock in &tree.locks {
            left.entry(lock.pid).or_default().push(*lock);
            if lock.kind() == Kind::Lease {
                leased.insert(lock.file);
            }
        }
        Self {
            left,
            waiting: Vec::new(),
            leased,
        }
    }

    /// Whether an open file is to have a lease.
    pub(super) fn is_leased(&self, file: u32) -> bool {
        self.leased.contains(&file)
    }

    /// Has `process` take its locks, unless that is for [`Locks::rebuild_last`]. Nothing may close a descriptor in it afterwards:
    /// record locks go with any of their file. It has not its own capabilities yet: the program may have taken a lease on a file
    /// that is no longer its own.
    pub(crate) fn rebuild(
        &mut self,
        injection: &mut Injection<'_>,
        process: &Process,
        tree: &Tree,
    ) -> Result<()> {
        let pid = process.pid;
        let Some(left) = self.left.remove(&pid) else {
            return Ok(());
        };
        // While others with this table are built, descriptors in it are closed.
        let is_closed_in = tree.processes.iter().any(|other| other.table_of == pid);
        let (now, later) = left
            .into_iter()
            .partition(|lock| !is_closed_in || lock.kind() == Kind::Lease);
        self.left.insert(pid, later);
        self.rebuild_by(process, tree, now, |calls| {
            let answers = lock::take(injection, pid, calls)?;
            disown(injection, process, tree, calls)?;
            Ok(answers)
        })
    }

    /// Has those take theirs that others have a descriptor table in common with. All of the tree is built by now.
    pub(crate) fn rebuild_last(&mut self, family: &mut Family, tree: &Tree) -> Result<()> {
        for process in &tree.processes {
            let left = self.left.remove(&process.pid).unwrap_or_default();
            self.rebuild_by(process, tree, left, |calls| {
                Ok(family.member(process.pid)?.take_locks(calls)?)
            })?;
        }
        Ok(())
    }

    fn rebuild_by(
        &mut self,
        process: &Process,
        tree: &Tree,
        locks: Vec<Model>,
        take: impl FnOnce(&[(u32, Lock)]) -> Result<Vec<std::result::Result<(), Errno>>>,
    ) -> Result<()> {
        if locks.is_empty() {
            return Ok(());
        }
        // Of several numbers the lowest: by that one a lease was most likely taken.
        let fds: BTreeMap<u32, u32> = process
            .descriptors
            .iter()
            .rev()
            .map(|descriptor| (descriptor.file, descriptor.fd))
            .collect();
        let wanted = locks.iter().map(|lock| wanted(lock, &fds, tree));
        let wanted = wanted.collect::<Result<Vec<Waiting>>>()?;
        let calls: Vec<(u32, Lock)> = wanted.iter().map(|one| (one.fd, one.lock)).collect();
        let answers = take(&calls)?;
        for (one, answer) in wanted.into_iter().zip(answers) {
            match answer {
                Ok(()) => {}
                Err(Errno::EAGAIN) if one.lock.kind == lock::Kind::Lease => {
                    let pids: Vec<i32> = tree.processes.iter().map(|other| other.pid).collect();
                    return Err(one.is_against(&pids));
                }
                Err(errno) if is_held(errno) && one.lock.kind != lock::Kind::Lease => {
                    if !one.holders().is_empty() {
                        return Err(one.refused());
                    }
                    self.waiting.push(one);
                }
                Err(errno) => return Err(Error::object(one.to_string(), "locking it", errno)),
            }
        }
        Ok(())
    }

    /// Those that somebody else had.
    pub(crate) fn into_waiting(self) -> Vec<Waiting> {
        self.waiting
    }
}

/// Takes the signals of leased files away from `process` that nobody owned: who takes a lease gets them if they are free.
fn disown(
    injection: &mut Injection<'_>,
    process: &Process,
    tree: &Tree,
    calls: &[(u32, Lock)],
) -> Result<()> {
    /// Of fcntl(2).
    const F_SETOWN: u64 = 8;
    let leases = calls
        .iter()
        .filter(|(_, lock)| lock.kind == lock::Kind::Lease);
    let mut work = Work::new(injection, process.pid);
    for (fd, _) in leases {
        let mut descriptors = process.descriptors.iter();
        let file = descriptors
            .find(|descriptor| descriptor.fd == *fd)
            .and_then(|descriptor| File::find(&tree.files, descriptor.file));
        let owner = file.and_then(|file| file.owner.as_ref());
        if owner.is_none_or(|owner| owner.id == 0) {
            work.room()?;
            let arguments = [(*fd).into(), F_SETOWN.into(), 0u64.into()];
            let object = format!("fd {fd}");
            work.call(object, "fcntl(F_SETOWN)", libc::SYS_fcntl, &arguments);
        }
    }
    work.run()?;
    Ok(())
}

/// Opens a file on which a lease is to be taken, without waiting for somebody's who has one for writing.
///
/// # Errors
/// [`Error::Mismatch`] if somebody has; [`Error::Object`].
pub(super) fn open_leased(object: &str, path: &str, flags: u32, position: u64) -> Result<OwnedFd> {
    let has_lease = |who: String| Error::Mismatch {
        object: object.to_owned(),
        what: format!(
            "{who} has a write lease on the file here, which opening it would break; end that"
        ),
    };
    let failed = |error: std::io::Error| Error::object(object, "open", error);
    let holders = lock::lease_holders(path)?;
    if !holders.is_empty() {
        return Err(has_lease(format!("process {}", list(&holders))));
    }
    let at_once = flags | libc::O_NONBLOCK.unsigned_abs();
    let opened = open(path, at_once, Some(position)).map_err(|error| match error.kind() {
        std::io::ErrorKind::WouldBlock => has_lease("somebody who cannot be seen".into()),
        _ => failed(error),
    })?;
    set_status(&opened, flags).map_err(|errno| Error::object(object, "fcntl(F_SETFL)", errno))?;
    Ok(opened)
}

/// What fcntl(2) and flock(2) answer where somebody else has a lock.
fn is_held(errno: Errno) -> bool {
    matches!(errno, Errno::EAGAIN | Errno::EACCES)
}

fn wanted(lock: &Model, fds: &BTreeMap<u32, u32>, tree: &Tree) -> Result<Waiting> {
    let object = || format!("lock on open file {}", lock.file);
    let kind = match lock.kind() {
        Kind::Flock => lock::Kind::Flock,
        Kind::Record => lock::Kind::Record,
        Kind::Description => lock::Kind::Description,
        Kind::Lease => lock::Kind::Lease,
        Kind::Invalid => return Err(Invalid::new(object(), "is of no known kind").into()),
    };
    let found = fds.get(&lock.file).zip(File::find(&tree.files, lock.file));
    let Some((&fd, file)) = found else {
        return Err(Invalid::new(object(), "is of a process that has not the file").into());
    };
    Ok(Waiting {
        pid: lock.pid,
        fd,
        path: path(file, tree),
        name: lock.name(),
        lock: Lock {
            kind,
            exclusive: lock.exclusive,
            start: lock.start,
            len: lock.len,
        },
    })
}

fn path(file: &File, tree: &Tree) -> String {
    match &file.kind {
        Some(file::Kind::Regular(regular)) => {
            let identity = regular.identity.as_ref();
            identity.map_or_else(String::new, |identity| identity.path.clone())
        }
        Some(file::Kind::Shared(shared)) => {
            let mut objects = tree.shared.iter();
            let object = objects.find(|object| object.id == shared.object);
            object.map_or_else(String::new, |object| object.name())
        }
        Some(file::Kind::Directory(directory)) => directory.path.clone(),
        Some(file::Kind::Device(device)) => device.path.clone(),
        Some(file::Kind::Fifo(fifo)) => fifo.path.clone(),
        _ => "without a path".into(),
    }
}

/// Has the processes of a rebuilt tree, which do not run yet, take what they are waiting for.
///
/// # Errors
/// [`Error::Mismatch`] names the first that somebody else has; [`Error::Tracee`].
pub fn take(family: &mut Family, waiting: &[Waiting]) -> Result<()> {
    let mut by_pid: BTreeMap<i32, Vec<&Waiting>> = BTreeMap::new();
    for one in waiting {
        by_pid.entry(one.pid).or_default().push(one);
    }
    for (pid, wanted) in by_pid {
        let calls: Vec<(u32, Lock)> = wanted.iter().map(|one| (one.fd, one.lock)).collect();
        let answers = family.member(pid)?.take_locks(&calls)?;
        for (one, answer) in wanted.into_iter().zip(answers) {
            match answer {
                Ok(()) => {}
                Err(errno) if is_held(errno) => return Err(one.refused()),
                Err(errno) => return Err(Error::object(one.to_string(), "locking it", errno)),
            }
        }
    }
    Ok(())
}
