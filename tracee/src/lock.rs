//! Locks on files: what `/proc` tells of them, and how a process takes them again or gives them up.
//!
//! A record lock belongs to the process that made the call, so it is always that process which calls; the locks of an open file
//! are given up through a copy of the descriptor. Nothing here waits for a lock. A lease is taken through the holder's own number,
//! which the signal tells when it is broken; its end takes away whom the open file tells.
//!
//! # Safety
//! Each unsafe block is one system call with integers or with a structure that outlives the call.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};

use nix::errno::Errno;
use nix::sys::stat::{major, minor};

use crate::choke::{self, Kind as Call};
use crate::descriptor::{self, Owner, PidFd};
use crate::error::{Error, Result};
use crate::injection::{Batch, Injection};
use crate::procfs;
use crate::tree::Tracee;

/// Who has a lock, and on what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `flock(2)`: an open file, on the whole file.
    Flock,
    /// `F_SETLK`: a process.
    Record,
    /// `F_OFD_SETLK` (3.15): an open file.
    Description,
    /// `F_SETLEASE`: an open file, which is told before somebody opens the file in a way that is against it.
    Lease,
}

/// A lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lock {
    /// Its kind.
    pub kind: Kind,
    /// For writing.
    pub exclusive: bool,
    /// Its first byte.
    pub start: u64,
    /// Bytes; 0: to the end of the file, wherever that will be.
    pub len: u64,
}

/// A lock as its owner can give it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The owner's descriptor.
    pub fd: u32,
    /// The lock.
    pub lock: Lock,
    /// As [`Line::file`].
    pub file: (u64, u64, u64),
    /// Of a lease: whom its end is told.
    pub owner: Owner,
}

/// A line of `/proc/locks`, or of `fdinfo` behind `lock:`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The kernel's word: `POSIX`, `FLOCK`, `OFDLCK`, `LEASE`, `DELEG`.
    pub word: String,
    /// The lock; `None` for a kind that is not known, and for a lease of which nothing is to be left.
    pub lock: Option<Lock>,
    /// It is a lease that somebody waits to be given up, or to be for reading only.
    pub breaking: bool,
    /// Who took it: 0 or less if that is nobody in this pid namespace, or if the kernel does not say.
    pub pid: i32,
    /// The file: major and minor number of its file system's device, and its inode.
    pub file: (u64, u64, u64),
    /// It is not held but waited for.
    pub waits: bool,
}

impl Line {
    /// `1: POSIX  ADVISORY  WRITE 4711 08:01:99 0 EOF`, with `->` behind the number for one that waits; `None` for another form.
    pub fn parse(text: &str) -> Option<Self> {
        let mut words: Vec<&str> = text.split_ascii_whitespace().collect();
        let waits = words.get(1) == Some(&"->");
        if waits {
            words.remove(1);
        }
        let [_, word, state, access, pid, file, start, end] = words[..] else {
            return None;
        };
        let mut file = file.split(':');
        let (major, minor, inode) = (file.next()?, file.next()?, file.next()?);
        let kind = match word {
            "FLOCK" => Some(Kind::Flock),
            "POSIX" => Some(Kind::Record),
            "OFDLCK" => Some(Kind::Description),
            "LEASE" => Some(Kind::Lease),
            _ => None,
        };
        let exclusive = match access {
            "WRITE" => Some(true),
            "READ" => Some(false),
            _ => None,
        };
        let start = start.parse().ok()?;
        let len = match end {
            "EOF" => 0,
            end => end
                .parse::<u64>()
                .ok()?
                .checked_sub(start)?
                .checked_add(1)?,
        };
        let lock = kind.zip(exclusive).map(|(kind, exclusive)| Lock {
            kind,
            exclusive,
            start,
            len,
        });
        Some(Self {
            word: word.to_owned(),
            lock,
            breaking: state == "BREAKING",
            pid: pid.parse().ok()?,
            file: (
                u64::from_str_radix(major, 16).ok()?,
                u64::from_str_radix(minor, 16).ok()?,
                inode.parse().ok()?,
            ),
            waits,
        })
    }
}

/// All locks this pid namespace may know of, and who waits for them (proc_locks(5)).
///
/// # Errors
/// [`Error::Path`].
pub fn all() -> Result<Vec<Line>> {
    const PATH: &str = "/proc/locks";
    let failed = |errno| Error::path("read", PATH, errno);
    choke::pass(Call::Proc).map_err(failed)?;
    let text = std::fs::read_to_string(PATH)
        .map_err(|error| failed(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)))?;
    let lines = text.lines().filter_map(Line::parse);
    Ok(lines.filter(|line| line.lock.is_some()).collect())
}

/// The file at `path` as locks are told of it, with major and minor number of its device and its inode; nothing is opened. The device
/// that stat(2) tells may be another: on Btrfs that is the subvolume's, on an overlay the layer's.
///
/// `None`: there is no such file.
///
/// # Errors
/// [`Error::Path`].
pub fn file_at(path: &str) -> Result<Option<(u64, u64, u64)>> {
    let failed = |what, error: std::io::Error| {
        let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
        Error::path(what, path, errno)
    };
    // No open of the file itself, only its place.
    let place = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path);
    let place = match place {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        place => place.map_err(|error| failed("open(O_PATH)", error))?,
    };
    let found = place.metadata().map_err(|error| failed("stat", error))?;
    let info = procfs::own_descriptor(place.as_fd())?;
    let (major, minor) = procfs::mounted_device(info.mnt_id)?
        // A mount that is in no namespace, or not in ours.
        .unwrap_or_else(|| (major(found.dev()), minor(found.dev())));
    // Kernels before 5.14 do not say it, and it is mostly the same.
    let inode = match info.ino {
        0 => found.ino(),
        inode => inode,
    };
    Ok(Some((major, minor, inode)))
}

/// Processes of this pid namespace that have a lease for writing on the file at `path`, which whoever opens it breaks. Of one that is
/// not there nobody has.
///
/// # Errors
/// As [`all`] and [`file_at`].
pub fn lease_holders(path: &str) -> Result<Vec<i32>> {
    let mut leases = all()?;
    let is_lease = |lock: Lock| lock.kind == Kind::Lease && lock.exclusive;
    leases.retain(|line| line.lock.is_some_and(is_lease));
    if leases.is_empty() {
        return Ok(Vec::new());
    }
    let file = file_at(path)?;
    let leases = leases.iter().filter(|line| Some(line.file) == file);
    Ok(leases.map(|line| line.pid).collect())
}

impl Lock {
    /// Whether two owners cannot have both. The two kinds that lock ranges know of each other, `flock` and leases only of themselves.
    pub fn conflicts(&self, other: &Self) -> bool {
        let ranges = |kind| match kind {
            Kind::Record | Kind::Description => Kind::Record,
            alone => alone,
        };
        let end = |lock: &Self| match lock.len {
            0 => u64::MAX,
            len => lock.start.saturating_add(len),
        };
        ranges(self.kind) == ranges(other.kind)
            && (self.exclusive || other.exclusive)
            && self.start < end(other)
            && other.start < end(self)
    }

    fn flock_operation(&self) -> i32 {
        match self.exclusive {
            true => libc::LOCK_EX | libc::LOCK_NB,
            false => libc::LOCK_SH | libc::LOCK_NB,
        }
    }

    /// As fcntl(2) calls it.
    fn lock_type(&self) -> i32 {
        match self.exclusive {
            true => libc::F_WRLCK,
            false => libc::F_RDLCK,
        }
    }

    /// `struct flock` of x86-64: type, whence (from the start of the file), four bytes of nothing, start, length, pid.
    fn record(&self, lock_type: i32) -> [u8; RECORD_LEN] {
        let mut bytes = [0; RECORD_LEN];
        bytes[..2].copy_from_slice(&(lock_type as i16).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.start.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }
}

/// Bytes of a `struct flock`.
pub(crate) const RECORD_LEN: usize = 32;
const _: () = assert!(size_of::<libc::flock>() == RECORD_LEN);
const _: () = assert!(std::mem::offset_of!(libc::flock, l_start) == 8);
const _: () = assert!(std::mem::offset_of!(libc::flock, l_len) == 16);

/// Has thread `tid` take `locks`, each through the descriptor named with it. The answers are in that order; `EAGAIN` where
/// somebody else has one, or has the file of a lease open (fcntl(2), flock(2)). A lease needs `CAP_LEASE` or the file's owner, else the
/// answer is `EACCES`; an open file whose signals nobody owns becomes the caller's.
///
/// # Errors
/// As [`Injection::run`].
pub fn take(
    injection: &mut Injection<'_>,
    tid: i32,
    locks: &[(u32, Lock)],
) -> Result<Vec<std::result::Result<(), Errno>>> {
    let mut answers = Vec::with_capacity(locks.len());
    let room = injection.scratch(tid).len() / RECORD_LEN;
    for some in locks.chunks(Batch::LIMIT.min(room)) {
        let mut batch = Batch::new();
        for (index, (fd, lock)) in some.iter().enumerate() {
            let command = match lock.kind {
                Kind::Flock => {
                    let operation = lock.flock_operation();
                    batch.call(libc::SYS_flock, &[(*fd).into(), operation.into()]);
                    continue;
                }
                Kind::Lease => {
                    let (command, lock_type) = (libc::F_SETLEASE, lock.lock_type());
                    let arguments = [(*fd).into(), command.into(), lock_type.into()];
                    batch.call(libc::SYS_fcntl, &arguments);
                    continue;
                }
                Kind::Record => libc::F_SETLK,
                Kind::Description => libc::F_OFD_SETLK,
            };
            let at = index * RECORD_LEN;
            let lock_type = lock.lock_type();
            injection.scratch(tid)[at..at + RECORD_LEN].copy_from_slice(&lock.record(lock_type));
            let address = injection.scratch_address(tid) + at as u64;
            batch.call(
                libc::SYS_fcntl,
                &[(*fd).into(), command.into(), address.into()],
            );
        }
        let results = injection.run(tid, &batch)?;
        answers.extend(results.into_iter().map(|result| result.map(drop)));
    }
    Ok(answers)
}

impl Tracee {
    /// Has the frozen process take `locks`, as [`take`]. It is as it was afterwards.
    ///
    /// # Errors
    /// As [`Tracee::plant`] and [`Injection::run`].
    pub fn take_locks(
        &mut self,
        locks: &[(u32, Lock)],
    ) -> Result<Vec<std::result::Result<(), Errno>>> {
        let pid = self.pid();
        let mut injection = self.plant(None)?;
        let answers = take(&mut injection, pid, locks);
        injection.cure()?;
        answers
    }

    /// Has the frozen process take again what it [gave up](Tracee::give_up_locks), as [`Tracee::take_locks`].
    ///
    /// # Errors
    /// As [`Tracee::take_locks`]; [`Error::Kernel`] where an open file cannot be given its owner again.
    pub fn take_locks_again(
        &mut self,
        locks: &[Held],
    ) -> Result<Vec<std::result::Result<(), Errno>>> {
        let calls: Vec<(u32, Lock)> = locks.iter().map(|held| (held.fd, held.lock)).collect();
        let answers = self.take_locks(&calls)?;
        let is_lease = |held: &Held| held.lock.kind == Kind::Lease;
        for (held, answer) in locks.iter().zip(&answers) {
            if is_lease(held) && answer.is_ok() {
                let copy = PidFd::open(self.pid())?.get_fd(held.fd)?;
                match descriptor::set_owner(copy.as_fd(), held.owner) {
                    // Who has ended meanwhile is told no more.
                    Err(error) if error.is_gone() => {}
                    set => set?,
                }
            }
        }
        Ok(answers)
    }

    /// Gives up `locks` of a process that is [parked](Tracee::park), and all other record locks it has on the same files. It stays
    /// parked; on its way to the call that gives up record locks our death would let it run. One that is in the memory of another
    /// does it by [`crate::Family::give_up_locks`].
    ///
    /// # Errors
    /// [`Error::WrongState`] unless frozen; [`Error::Gone`]; [`Error::Kernel`], [`Error::Injected`]. Some may be given up by then.
    pub fn give_up_locks(&mut self, locks: &[Held]) -> Result<()> {
        self.give_up_locks_by(None, locks)
    }

    /// As [`Tracee::give_up_locks`], where `host` is a process in the same memory whose threads have stacks of their own.
    pub(crate) fn give_up_locks_by(
        &mut self,
        host: Option<&mut Self>,
        locks: &[Held],
    ) -> Result<()> {
        let pid = self.pid();
        let is_record = |held: &&Held| held.lock.kind == Kind::Record;
        let process = PidFd::open(pid)?;
        for held in locks.iter().filter(|held| !is_record(held)) {
            unlock(&process, held.fd, &held.lock)?;
        }
        let mut fds: Vec<u32> = locks.iter().filter(is_record).map(|held| held.fd).collect();
        fds.dedup();
        if fds.is_empty() {
            return Ok(());
        }
        let everything = Lock {
            kind: Kind::Record,
            exclusive: false,
            start: 0,
            len: 0,
        };
        self.set_locks(host, &fds, &everything.record(libc::F_UNLCK))
    }
}

/// Gives up a lock of the open file behind descriptor `fd` of a process.
fn unlock(process: &PidFd, fd: u32, lock: &Lock) -> Result<()> {
    let copy = process.get_fd(fd)?;
    let answer = match lock.kind {
        // SAFETY: no pointers.
        Kind::Flock => unsafe { libc::flock(copy.as_raw_fd(), libc::LOCK_UN) },
        Kind::Lease => {
            // SAFETY: no pointers.
            let answer = unsafe { libc::fcntl(copy.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
            match Errno::result(answer) {
                // Nobody has waited for the program's answer for longer than the kernel lets him.
                Err(Errno::EAGAIN) => 0,
                _ => answer,
            }
        }
        _ => {
            let record = lock.record(libc::F_UNLCK);
            // SAFETY: the structure has the length of a `struct flock` and outlives the call, which does not keep it.
            unsafe { libc::fcntl(copy.as_raw_fd(), libc::F_OFD_SETLK, record.as_ptr()) }
        }
    };
    Errno::result(answer)
        .map(drop)
        .map_err(|errno| Error::kernel("giving up a lock", process.pid(), errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel_are_understood() {
        let parse = |text| Line::parse(text).expect("a lock");
        let line = parse("1: POSIX  ADVISORY  WRITE 4711 08:1f:99 10 19");
        assert_eq!((line.pid, line.file), (4711, (8, 31, 99)));
        let lock = Lock {
            kind: Kind::Record,
            exclusive: true,
            start: 10,
            len: 10,
        };
        assert_eq!(line.lock, Some(lock));
        let line = parse("1: OFDLCK ADVISORY  READ  -1 00:2a:7 3 EOF");
        let lock = Lock {
            kind: Kind::Description,
            exclusive: false,
            start: 3,
            len: 0,
        };
        assert_eq!((line.lock, line.pid), (Some(lock), -1));
        let line = parse("2: FLOCK  ADVISORY  READ 12 00:2a:7 0 EOF");
        assert!(line.lock.is_some_and(|lock| lock.kind == Kind::Flock));
        let lease = parse("1: LEASE  ACTIVE    READ 1 00:2a:7 0 EOF");
        assert!(
            lease
                .lock
                .is_some_and(|lock| lock.kind == Kind::Lease && !lock.exclusive)
        );
        assert!(!lease.breaking);
        let broken = parse("1: LEASE  BREAKING  READ 1 00:2a:7 0 EOF");
        assert!(broken.breaking && broken.lock.is_some());
        let ending = parse("1: LEASE  BREAKING  UNLCK 1 00:2a:7 0 EOF");
        assert_eq!((ending.lock, ending.breaking), (None, true));
        let delegation = parse("1: DELEG  ACTIVE    READ 1 00:2a:7 0 EOF");
        assert_eq!((delegation.lock, delegation.word.as_str()), (None, "DELEG"));
        let waiter = parse("1: -> FLOCK  ADVISORY  READ 0 00:2a:7 0 EOF");
        assert!(waiter.waits && waiter.pid == 0 && !line.waits);
        for bad in ["", "1: POSIX ADVISORY READ 1 0:0 0 EOF"] {
            assert_eq!(Line::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn only_overlapping_locks_for_writing_conflict() {
        let lock = |kind, exclusive, start, len| Lock {
            kind,
            exclusive,
            start,
            len,
        };
        let conflict = |a: Lock, b: Lock| {
            assert_eq!(a.conflicts(&b), b.conflicts(&a));
            a.conflicts(&b)
        };
        use Kind::{Description, Flock, Lease, Record};
        assert!(conflict(
            lock(Record, true, 0, 10),
            lock(Description, false, 9, 0)
        ));
        assert!(!conflict(
            lock(Record, true, 0, 10),
            lock(Description, false, 10, 0)
        ));
        assert!(!conflict(
            lock(Record, false, 0, 0),
            lock(Record, false, 0, 0)
        ));
        assert!(!conflict(lock(Record, true, 0, 0), lock(Flock, true, 0, 0)));
        assert!(conflict(lock(Flock, true, 0, 0), lock(Flock, false, 0, 0)));
        assert!(conflict(lock(Lease, true, 0, 0), lock(Lease, false, 0, 0)));
        assert!(!conflict(lock(Lease, true, 0, 0), lock(Flock, true, 0, 0)));
        assert!(!conflict(lock(Lease, true, 0, 0), lock(Record, true, 0, 0)));
    }
}
