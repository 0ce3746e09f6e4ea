//! Locks on files: each is taken by the process whose it is, on the descriptors that have been rebuilt, before it runs.
//!
//! On a file that both hosts see, the stopped source still holds what the tree is to hold here:
//! 1. What can be had is taken when a process is built. What a process of this host has, by its number, ends the attempt.
//! 2. What somebody has who cannot be seen from here may be the source's. READY tells the source that there is such a lock.
//! 3. It parks its copy, records COMMIT, gives all its locks up and sends COMMIT.
//! 4. They are taken here, before anything runs. If one cannot be had the tree is refused, and the source takes its own again.
//!
//! Between 3 and 4 nobody holds them, and nothing of the tree runs.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::fs::MetadataExt as _;

use nix::errno::Errno;
use nix::sys::stat::{major, minor};
use pageferry_image::model::Invalid;
use pageferry_image::model::files::{File, file};
use pageferry_image::model::locks::{Kind, Lock as Model};
use pageferry_image::model::task::{Process, Tree};
use pageferry_tracee::family::Family;
use pageferry_tracee::injection::Injection;
use pageferry_tracee::lock::{self, Lock};

use super::{Error, Result};

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

    /// Processes of this pid namespace that have a lock in its way; nobody, if that cannot be found out.
    fn holders(&self) -> Vec<i32> {
        let path = format!("/proc/{}/fd/{}", self.pid, self.fd);
        let Ok((found, all)) = std::fs::metadata(path).and_then(|found| {
            let all = lock::all().map_err(std::io::Error::other)?;
            Ok((found, all))
        }) else {
            return Vec::new();
        };
        let file = (major(found.dev()), minor(found.dev()), found.ino());
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
}

impl Locks {
    pub(crate) fn new(tree: &Tree) -> Self {
        let mut left: BTreeMap<i32, Vec<Model>> = BTreeMap::new();
        for lock in &tree.locks {
            left.entry(lock.pid).or_default().push(*lock);
        }
        Self {
            left,
            waiting: Vec::new(),
        }
    }

    /// Has `process` take its locks, unless that is for [`Locks::rebuild_last`]. Nothing may close a descriptor in it afterwards:
    /// record locks go with any of their file.
    pub(crate) fn rebuild(
        &mut self,
        injection: &mut Injection<'_>,
        process: &Process,
        tree: &Tree,
    ) -> Result<()> {
        let pid = process.pid;
        // While others with this table are built, descriptors in it are closed.
        if tree.processes.iter().any(|other| other.table_of == pid) {
            return Ok(());
        }
        self.rebuild_by(process, tree, |calls| {
            Ok(lock::take(injection, pid, calls)?)
        })
    }

    /// Has those take theirs that others have a descriptor table in common with. All of the tree is built by now.
    pub(crate) fn rebuild_last(&mut self, family: &mut Family, tree: &Tree) -> Result<()> {
        for process in &tree.processes {
            self.rebuild_by(process, tree, |calls| {
                Ok(family.member(process.pid)?.take_locks(calls)?)
            })?;
        }
        Ok(())
    }

    fn rebuild_by(
        &mut self,
        process: &Process,
        tree: &Tree,
        take: impl FnOnce(&[(u32, Lock)]) -> Result<Vec<std::result::Result<(), Errno>>>,
    ) -> Result<()> {
        let Some(locks) = self.left.remove(&process.pid) else {
            return Ok(());
        };
        let fds: BTreeMap<u32, u32> = process
            .descriptors
            .iter()
            .map(|descriptor| (descriptor.file, descriptor.fd))
            .collect();
        let wanted = locks.iter().map(|lock| wanted(lock, &fds, tree));
        let wanted = wanted.collect::<Result<Vec<Waiting>>>()?;
        let calls: Vec<(u32, Lock)> = wanted.iter().map(|one| (one.fd, one.lock)).collect();
        let answers = take(&calls)?;
        for (one, answer) in wanted.into_iter().zip(answers) {
            match answer {
                Ok(()) => {}
                Err(errno) if is_held(errno) => {
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
