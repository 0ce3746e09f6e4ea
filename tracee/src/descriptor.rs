//! Descriptors of another process: taken as copies, compared, asked for what only `fcntl(2)` tells; and eventfds and
//! signalfds made anew.
//!
//! A copy taken here refers to the same open file description as the original: whatever is changed through it (position,
//! flags, contents) is changed for the process too, so nothing here writes through one unless its name says so.
//!
//! # Safety
//! Each unsafe block is one system call with integers or with structures that outlive the call.

use std::cmp::Ordering;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;

use crate::choke::{self, Kind};
use crate::error::{Error, Result};
use crate::process::own_pid;

// ---------------------------------------------------------------------------------------------------------------------
// pidfd

/// A process that cannot be confused with a later one of the same number.
#[derive(Debug)]
pub struct PidFd {
    pid: i32,
    fd: OwnedFd,
}

impl PidFd {
    /// Opens a process by number (pidfd_open(2), 5.3). Close-on-exec.
    ///
    /// # Errors
    /// [`Error::Gone`]; [`Error::Kernel`] with `EINVAL` for a thread that is no leader.
    pub fn open(pid: i32) -> Result<Self> {
        Self::open_with(pid, 0)
    }

    /// Opens one thread, for a descriptor table it does not share with its process (`PIDFD_THREAD`, 6.9).
    ///
    /// # Errors
    /// [`Error::Gone`]; [`Error::Kernel`] with `EINVAL` before 6.9.
    pub fn open_thread(tid: i32) -> Result<Self> {
        Self::open_with(tid, libc::PIDFD_THREAD)
    }

    fn open_with(pid: i32, flags: libc::c_uint) -> Result<Self> {
        const WHAT: &str = "pidfd_open";
        choke::pass(Kind::Descriptor).map_err(|errno| Error::kernel(WHAT, pid, errno))?;
        // SAFETY: no pointers; the descriptor returned is ours alone.
        let fd = unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, pid, flags);
            let fd = Errno::result(fd).map_err(|errno| Error::kernel(WHAT, pid, errno))?;
            OwnedFd::from_raw_fd(fd as i32)
        };
        Ok(Self { pid, fd })
    }

    /// The number it was opened by.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// A copy of one of its descriptors (pidfd_getfd(2), 5.6), close-on-exec. Needs the right to trace it.
    ///
    /// # Errors
    /// [`Error::Gone`]; [`Error::Kernel`] with `EBADF` when the number is not open.
    pub fn get_fd(&self, fd: u32) -> Result<OwnedFd> {
        const WHAT: &str = "pidfd_getfd";
        choke::pass(Kind::Descriptor).map_err(|errno| Error::kernel(WHAT, self.pid, errno))?;
        // SAFETY: no pointers; the descriptor returned is ours alone.
        unsafe {
            let copy = libc::syscall(libc::SYS_pidfd_getfd, self.fd.as_raw_fd(), fd, 0);
            let copy = Errno::result(copy).map_err(|errno| Error::kernel(WHAT, self.pid, errno))?;
            Ok(OwnedFd::from_raw_fd(copy as i32))
        }
    }

    /// Sends a signal; 0 only asks whether the process is still there.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Kernel`].
    pub fn send_signal(&self, signal: i32) -> Result<()> {
        const WHAT: &str = "pidfd_send_signal";
        choke::pass(Kind::Descriptor).map_err(|errno| Error::kernel(WHAT, self.pid, errno))?;
        // SAFETY: the siginfo pointer may be null.
        let answer = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.fd.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        Errno::result(answer)
            .map(drop)
            .map_err(|errno| Error::kernel(WHAT, self.pid, errno))
    }

    /// Waits for the end of the process, at most `timeout` (rounded up to milliseconds); whether it has ended.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    pub fn poll_exit(&self, timeout: Duration) -> Result<bool> {
        let milliseconds = timeout.as_micros().div_ceil(1000);
        let mut poll = libc::pollfd {
            fd: self.fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        loop {
            // SAFETY: one pollfd, which outlives the call.
            let answer = unsafe {
                libc::poll(
                    &raw mut poll,
                    1,
                    i32::try_from(milliseconds).unwrap_or(i32::MAX),
                )
            };
            match Errno::result(answer) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(Error::kernel("poll", self.pid, errno)),
            }
        }
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// kcmp

const KCMP_FILE: i32 = 0;
const KCMP_VM: i32 = 1;
const KCMP_FILES: i32 = 2;
const KCMP_FS: i32 = 3;
const KCMP_SIGHAND: i32 = 4;
const KCMP_EPOLL_TFD: i32 = 7;

/// `struct kcmp_epoll_slot` (linux/kcmp.h).
#[repr(C)]
struct EpollSlot {
    efd: u32,
    tfd: u32,
    toff: u32,
}
const _: () = assert!(size_of::<EpollSlot>() == 12);

fn kcmp(pid_a: i32, pid_b: i32, kind: i32, a: u64, b: u64) -> Result<i64> {
    choke::pass(Kind::Descriptor).map_err(|errno| Error::kernel("kcmp", pid_a, errno))?;
    // SAFETY: the kinds used here take integers, except KCMP_EPOLL_TFD, whose `b` points to an EpollSlot that outlives the call.
    let answer = unsafe { libc::syscall(libc::SYS_kcmp, pid_a, pid_b, kind, a, b) };
    Errno::result(answer).map_err(|errno| Error::kernel("kcmp", pid_a, errno))
}

/// Whether two descriptors are one open file description: one position, one set of flags.
///
/// # Errors
/// [`Error::Gone`] (of either process, named by the first); [`Error::Kernel`] with `EBADF` for a number that is not open.
pub fn same_file(pid_a: i32, fd_a: u32, pid_b: i32, fd_b: u32) -> Result<bool> {
    Ok(order(pid_a, fd_a, pid_b, fd_b)?.is_eq())
}

/// The kernel's total order of open file descriptions, valid until the next boot: sorting by it brings shared ones together in
/// n log n calls instead of n².
///
/// # Errors
/// As [`same_file`].
pub fn order(pid_a: i32, fd_a: u32, pid_b: i32, fd_b: u32) -> Result<Ordering> {
    ordering(
        pid_a,
        kcmp(pid_a, pid_b, KCMP_FILE, fd_a.into(), fd_b.into())?,
    )
}

fn ordering(pid: i32, answer: i64) -> Result<Ordering> {
    match answer {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        // 3, "not equal, no order", is documented but produced for no kind used here.
        _ => Err(Error::kernel("kcmp", pid, Errno::EIO)),
    }
}

/// The kernel's total order of descriptor tables, as [`order`] is of open file descriptions; equal: [`same_table`].
///
/// # Errors
/// [`Error::Gone`].
pub fn table_order(tid_a: i32, tid_b: i32) -> Result<Ordering> {
    ordering(tid_a, kcmp(tid_a, tid_b, KCMP_FILES, 0, 0)?)
}

/// The same of address spaces; equal: [`same_memory`].
///
/// # Errors
/// [`Error::Gone`].
pub fn memory_order(tid_a: i32, tid_b: i32) -> Result<Ordering> {
    ordering(tid_a, kcmp(tid_a, tid_b, KCMP_VM, 0, 0)?)
}

/// The same of what holds the working directory, root and umask; equal: [`same_directory`].
///
/// # Errors
/// [`Error::Gone`].
pub fn directory_order(tid_a: i32, tid_b: i32) -> Result<Ordering> {
    ordering(tid_a, kcmp(tid_a, tid_b, KCMP_FS, 0, 0)?)
}

/// The same of signal actions; equal: [`same_actions`].
///
/// # Errors
/// [`Error::Gone`].
pub fn actions_order(tid_a: i32, tid_b: i32) -> Result<Ordering> {
    ordering(tid_a, kcmp(tid_a, tid_b, KCMP_SIGHAND, 0, 0)?)
}

/// Whether two tasks have one descriptor table (`CLONE_FILES`).
///
/// # Errors
/// [`Error::Gone`].
pub fn same_table(tid_a: i32, tid_b: i32) -> Result<bool> {
    Ok(table_order(tid_a, tid_b)?.is_eq())
}

/// Whether two tasks have one address space (`CLONE_VM`).
///
/// # Errors
/// [`Error::Gone`].
pub fn same_memory(tid_a: i32, tid_b: i32) -> Result<bool> {
    Ok(memory_order(tid_a, tid_b)?.is_eq())
}

/// Whether two tasks have one working directory, root and umask (`CLONE_FS`).
///
/// # Errors
/// [`Error::Gone`].
pub fn same_directory(tid_a: i32, tid_b: i32) -> Result<bool> {
    Ok(directory_order(tid_a, tid_b)?.is_eq())
}

/// Whether two tasks have one table of signal actions (`CLONE_SIGHAND`).
///
/// # Errors
/// [`Error::Gone`].
pub fn same_actions(tid_a: i32, tid_b: i32) -> Result<bool> {
    Ok(actions_order(tid_a, tid_b)?.is_eq())
}

/// Whether descriptor `fd` is the open file that an epoll instance of the same process watches under the number `watched`
/// (4.13).
///
/// An epoll instance keeps watching a file whose number has been closed and perhaps reused, as long as another descriptor holds
/// it; several watches may then stand under one number, and `nth` counts them from 0 in the order of
/// [`crate::procfs::FdInfo::epoll`].
///
/// # Errors
/// [`Error::Gone`]; [`Error::Kernel`] with `ENOENT` for a watch that does not exist, `EBADF` for a closed `fd`.
pub fn epoll_watches(pid: i32, epoll_fd: u32, watched: u32, nth: u32, fd: u32) -> Result<bool> {
    let slot = EpollSlot {
        efd: epoll_fd,
        tfd: watched,
        toff: nth,
    };
    Ok(kcmp(pid, pid, KCMP_EPOLL_TFD, fd.into(), &raw const slot as u64)? == 0)
}

// ---------------------------------------------------------------------------------------------------------------------
// fcntl

fn fcntl(fd: BorrowedFd<'_>, command: i32, argument: i64, what: &'static str) -> Result<i32> {
    choke::pass(Kind::Descriptor).map_err(|errno| Error::kernel(what, own_pid(), errno))?;
    // SAFETY: the commands used here take an integer, or the address of a structure that outlives the call.
    let answer = unsafe { libc::fcntl(fd.as_raw_fd(), command, argument) };
    Errno::result(answer).map_err(|errno| Error::kernel(what, own_pid(), errno))
}

/// Access mode and status flags (`F_GETFL`).
///
/// # Errors
/// [`Error::Kernel`].
pub fn status_flags(fd: BorrowedFd<'_>) -> Result<u32> {
    fcntl(fd, libc::F_GETFL, 0, "fcntl(F_GETFL)").map(|flags| flags as u32)
}

/// Sets the status flags that can be set: `O_APPEND O_ASYNC O_DIRECT O_NOATIME O_NONBLOCK`.
///
/// # Errors
/// [`Error::Kernel`].
pub fn set_status_flags(fd: BorrowedFd<'_>, flags: u32) -> Result<()> {
    fcntl(fd, libc::F_SETFL, flags.into(), "fcntl(F_SETFL)").map(drop)
}

/// Who is told when input or output becomes possible.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// `F_OWNER_TID` 0, `F_OWNER_PID` 1, `F_OWNER_PGRP` 2.
    pub kind: u32,
    /// Thread, process or group in our pid namespace; 0 = nobody.
    pub id: i32,
    /// Signal to send (`F_SETSIG`); 0 = SIGIO.
    pub signo: u32,
}

#[repr(C)]
#[derive(Default)]
struct OwnerEx {
    kind: i32,
    pid: i32,
}
const _: () = assert!(size_of::<OwnerEx>() == 8);

const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;
const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;

/// `F_GETOWN_EX` and `F_GETSIG`.
///
/// # Errors
/// [`Error::Kernel`].
pub fn owner(fd: BorrowedFd<'_>) -> Result<Owner> {
    let mut owner = OwnerEx::default();
    fcntl(fd, F_GETOWN_EX, &raw mut owner as i64, "fcntl(F_GETOWN_EX)")?;
    let signo = fcntl(fd, F_GETSIG, 0, "fcntl(F_GETSIG)")?;
    Ok(Owner {
        kind: owner.kind as u32,
        id: owner.pid,
        signo: signo as u32,
    })
}

/// `F_SETOWN_EX` and `F_SETSIG`. The kernel notes *our* credentials with the owner, so a signal may later be allowed that the
/// process itself could not have sent.
///
/// # Errors
/// [`Error::Gone`] when the owner does not exist; [`Error::Kernel`].
pub fn set_owner(fd: BorrowedFd<'_>, owner: Owner) -> Result<()> {
    let argument = OwnerEx {
        kind: owner.kind as i32,
        pid: owner.id,
    };
    fcntl(
        fd,
        F_SETOWN_EX,
        &raw const argument as i64,
        "fcntl(F_SETOWN_EX)",
    )?;
    fcntl(fd, F_SETSIG, owner.signo.into(), "fcntl(F_SETSIG)").map(drop)
}

// ---------------------------------------------------------------------------------------------------------------------
// New objects

fn own(answer: i32, what: &'static str) -> Result<OwnedFd> {
    let fd = Errno::result(answer).map_err(|errno| Error::kernel(what, own_pid(), errno))?;
    // SAFETY: every caller passes a descriptor the kernel has just made for it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes an eventfd with this counter, close-on-exec and blocking.
///
/// # Errors
/// [`Error::Kernel`].
pub fn create_eventfd(count: u64, semaphore: bool) -> Result<OwnedFd> {
    const WHAT: &str = "eventfd2";
    choke::pass(Kind::Descriptor).map_err(|errno| Error::kernel(WHAT, own_pid(), errno))?;
    let flags = libc::EFD_CLOEXEC | if semaphore { libc::EFD_SEMAPHORE } else { 0 };
    // SAFETY: no pointers.
    let eventfd = own(unsafe { libc::eventfd(0, flags) }, WHAT)?;
    // The system call takes 32 bits, a write takes all 64 of the counter.
    if count != 0 {
        let bytes = count.to_ne_bytes();
        // SAFETY: eight bytes that outlive the call; the largest counter, 2^64-2, fits into an empty eventfd without waiting.
        let written =
            unsafe { libc::write(eventfd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
        Errno::result(written)
            .map_err(|errno| Error::kernel("write(eventfd)", own_pid(), errno))?;
    }
    Ok(eventfd)
}

/// Makes a signalfd for a mask (bit n-1 for signal n), close-on-exec and blocking. It reads the signals of whoever reads it.
///
/// # Errors
/// [`Error::Kernel`].
pub fn create_signalfd(mask: u64) -> Result<OwnedFd> {
    const WHAT: &str = "signalfd4";
    choke::pass(Kind::Descriptor).map_err(|errno| Error::kernel(WHAT, own_pid(), errno))?;
    // SAFETY: the kernel's signal set is 8 bytes, which it reads during the call.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_signalfd4,
            -1,
            &raw const mask,
            size_of::<u64>(),
            libc::SFD_CLOEXEC,
        )
    };
    own(answer as i32, WHAT)
}

/// Makes an epoll instance, close-on-exec. What it watches is added inside the process, because a watch belongs to a number of
/// that process' table.
///
/// # Errors
/// [`Error::Kernel`].
pub fn create_epoll() -> Result<OwnedFd> {
    const WHAT: &str = "epoll_create1";
    choke::pass(Kind::Descriptor).map_err(|errno| Error::kernel(WHAT, own_pid(), errno))?;
    // SAFETY: no pointers.
    own(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }, WHAT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::procfs;

    fn number(fd: &impl AsFd) -> u32 {
        fd.as_fd().as_raw_fd() as u32
    }

    #[test]
    fn a_copy_is_the_same_open_file() {
        let pid = own_pid();
        let original = create_eventfd(1, false).expect("eventfd");
        let other = create_eventfd(1, false).expect("eventfd");
        let copy = PidFd::open(pid)
            .and_then(|process| process.get_fd(number(&original)))
            .expect("pidfd_getfd");
        assert!(same_file(pid, number(&original), pid, number(&copy)).expect("kcmp"));
        assert!(!same_file(pid, number(&original), pid, number(&other)).expect("kcmp"));
        let there = order(pid, number(&original), pid, number(&other)).expect("kcmp");
        let back = order(pid, number(&other), pid, number(&original)).expect("kcmp");
        assert_eq!(there, back.reverse());
        assert!(same_table(pid, pid).expect("kcmp") && same_memory(pid, pid).expect("kcmp"));
        assert!(same_directory(pid, pid).expect("kcmp") && same_actions(pid, pid).expect("kcmp"));
        let info = procfs::descriptor(pid, number(&copy))
            .expect("own descriptor")
            .info;
        assert!(info.close_on_exec());
    }

    #[test]
    fn a_number_that_is_not_open_is_told_from_a_dead_process() {
        let process = PidFd::open(own_pid()).expect("open");
        assert!(matches!(
            process.get_fd(1_000_000),
            Err(Error::Kernel {
                errno: Errno::EBADF,
                ..
            })
        ));
        assert!(!process.poll_exit(Duration::ZERO).expect("poll"));
        process.send_signal(0).expect("signal 0");
        crate::process::alone(|| {
            let child = crate::process::fork(false, || 0).expect("fork");
            let handle = PidFd::open(child).expect("open");
            assert!(handle.poll_exit(Duration::from_secs(5)).expect("poll"));
            crate::process::wait(child).expect("wait");
            for answer in [handle.send_signal(0), handle.get_fd(0).map(drop)] {
                assert!(matches!(answer, Err(Error::Gone { pid }) if pid == child));
            }
            assert!(matches!(PidFd::open(child), Err(Error::Gone { .. })));
        });
    }

    #[test]
    fn a_thread_can_be_opened_by_itself() {
        std::thread::spawn(|| {
            let tid = nix::unistd::gettid().as_raw();
            assert_eq!(PidFd::open_thread(tid).expect("open").pid(), tid);
            assert!(PidFd::open(tid).is_err());
        })
        .join()
        .expect("join");
    }

    #[test]
    fn a_watch_is_matched_with_what_it_watches() {
        let pid = own_pid();
        let epoll = create_epoll().expect("epoll");
        let watched = create_eventfd(0, false).expect("eventfd");
        let twin = watched.try_clone().expect("dup");
        let other = create_eventfd(0, false).expect("eventfd");
        let mut event = libc::epoll_event {
            events: libc::EPOLLIN as u32,
            u64: 99,
        };
        // SAFETY: one epoll_event, read during the call.
        let answer = unsafe {
            libc::epoll_ctl(
                epoll.as_raw_fd(),
                libc::EPOLL_CTL_ADD,
                watched.as_raw_fd(),
                &raw mut event,
            )
        };
        assert_eq!(answer, 0);
        let items = procfs::descriptor(pid, number(&epoll))
            .expect("own descriptor")
            .info
            .epoll;
        assert_eq!(items.len(), 1);
        assert_eq!((items[0].fd, items[0].data), (number(&watched), 99));
        assert_eq!(items[0].events, libc::EPOLLIN as u32 | 0x18);
        let is = |fd: &OwnedFd| {
            epoll_watches(pid, number(&epoll), number(&watched), 0, number(fd)).expect("kcmp")
        };
        assert!(is(&watched) && is(&twin) && !is(&other));
        assert!(matches!(
            epoll_watches(pid, number(&epoll), number(&watched), 1, number(&twin)),
            Err(Error::Kernel {
                errno: Errno::ENOENT,
                ..
            })
        ));
    }

    #[test]
    fn owners_and_flags_can_be_set_again() {
        let (end, _other) = crate::socket::create_pair(libc::SOCK_STREAM).expect("pair");
        assert_eq!(owner(end.as_fd()).expect("owner").id, 0);
        let wanted = Owner {
            kind: 1,
            id: own_pid(),
            signo: libc::SIGRTMIN() as u32,
        };
        set_owner(end.as_fd(), wanted).expect("set");
        assert_eq!(owner(end.as_fd()).expect("owner"), wanted);
        let flags = status_flags(end.as_fd()).expect("flags");
        set_status_flags(end.as_fd(), flags | libc::O_NONBLOCK as u32).expect("set");
        assert_eq!(
            status_flags(end.as_fd()).expect("flags"),
            flags | libc::O_NONBLOCK as u32
        );
    }
}
