//! Our own processes: making them, waiting for them, and what this program sets on itself.
//!
//! Everything here is about this program, not about the traced tree. [`fork`] must never be called once a second thread exists.
//!
//! # Safety
//! Each unsafe block is one system call; the one that returns twice, in [`fork`], says at its place why the child is sound.

use std::io::Write as _;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::MsFlags;

use crate::choke::{self, Kind};
use crate::error::{Error, Result};
use crate::procfs;

fn failed(what: &'static str, errno: Errno) -> Error {
    Error::Kernel {
        what,
        pid: own_pid(),
        errno,
    }
}

/// Our process id.
pub fn own_pid() -> i32 {
    // Process ids are at most 2^22.
    std::process::id() as i32
}

/// Our parent's process id; 0 when it lives outside our pid namespace.
pub fn parent_pid() -> i32 {
    // SAFETY: no arguments, never fails.
    unsafe { libc::getppid() }
}

/// Number of threads of this process.
///
/// # Errors
/// [`Error::Path`] when `/proc` is not there.
pub fn thread_count() -> Result<usize> {
    const PATH: &str = "/proc/self/task";
    let tasks =
        std::fs::read_dir(PATH).map_err(|error| Error::path("list", PATH, errno_of(&error)))?;
    Ok(tasks.count())
}

pub(crate) fn errno_of(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

// ---------------------------------------------------------------------------------------------------------------------
// Making processes

/// Makes a child that runs `child` and exits with the code it returns; a panic in it exits with 101.
///
/// With `share_files` both have one descriptor table (`CLONE_FILES`) and separate memory: a descriptor that one of them opens
/// is kept open by the other when it dies, and one that either closes is closed for both, so what `child` owns is left to the child
/// and not dropped here. Standard output is flushed in the child before it exits; destructors of the caller's
/// frames do not run there.
///
/// # Errors
/// [`Error::WrongState`] when this process has a second thread, whose locks would stay locked in the child for ever;
/// [`Error::Kernel`].
pub fn fork(share_files: bool, child: impl FnOnce() -> i32) -> Result<i32> {
    if thread_count()? != 1 {
        return Err(Error::WrongState {
            tid: own_pid(),
            what: "fork with more than one thread",
        });
    }
    choke::pass(Kind::Spawn).map_err(|errno| failed("clone", errno))?;
    // Both copies would print what is still in the buffer.
    let _ = std::io::stdout().flush();
    // fork(3) of the C library cannot share the table, and a raw clone leaves two of its notes stale in the child: the thread
    // id it has cached, at the address it registered with set_tid_address(2), and the robust list, which the kernel forgets.
    let tid_address = clear_child_tid()?;
    let robust = robust_list()?;
    let mut flags = libc::SIGCHLD | libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID;
    if share_files {
        flags |= libc::CLONE_FILES;
    }
    // SAFETY: without CLONE_VM the child goes on with a copy of this stack and of all memory, exactly as after fork(2), and this
    // is the only thread, so no lock is held by another. `tid_address` is where the C library keeps the running thread's id.
    let answer = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, tid_address, 0) };
    let pid = Errno::result(answer).map_err(|errno| failed("clone", errno))? as i32;
    if pid != 0 {
        if share_files {
            std::mem::forget(child);
        }
        return Ok(pid);
    }
    // SAFETY: the list head lies in the C library's thread descriptor, which the copied memory has at the same address.
    unsafe { libc::syscall(libc::SYS_set_robust_list, robust.0, robust.1) };
    let code = catch_unwind(AssertUnwindSafe(child)).unwrap_or(101);
    let _ = std::io::stdout().flush();
    // SAFETY: ends this process without running the exit handlers of its parent's libraries.
    unsafe { libc::_exit(code) }
}

/// The address at which the C library keeps this thread's id (`CONFIG_CHECKPOINT_RESTORE`).
fn clear_child_tid() -> Result<u64> {
    let mut address = 0_u64;
    // SAFETY: the kernel stores one address.
    let answer = unsafe { libc::prctl(libc::PR_GET_TID_ADDRESS, &raw mut address) };
    Errno::result(answer).map_err(|errno| failed("prctl(PR_GET_TID_ADDRESS)", errno))?;
    Ok(address)
}

fn robust_list() -> Result<(u64, u64)> {
    let (mut head, mut len) = (0_u64, 0_u64);
    // SAFETY: the kernel stores an address and a length.
    let answer =
        unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut head, &raw mut len) };
    Errno::result(answer).map_err(|errno| failed("get_robust_list", errno))?;
    Ok((head, len))
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It exited with this code.
    Exited(i32),
    /// This signal killed it.
    Killed(i32),
}

impl Ended {
    fn decode(status: i32) -> Option<Self> {
        if libc::WIFEXITED(status) {
            Some(Self::Exited(libc::WEXITSTATUS(status)))
        } else if libc::WIFSIGNALED(status) {
            Some(Self::Killed(libc::WTERMSIG(status)))
        } else {
            None
        }
    }
}

fn wait_with(pid: i32, flags: i32) -> Result<Option<(i32, Ended)>> {
    loop {
        let mut status = 0;
        // SAFETY: the kernel stores one int.
        let answer = unsafe { libc::waitpid(pid, &raw mut status, flags | libc::__WALL) };
        match Errno::result(answer) {
            Ok(0) => return Ok(None),
            // A stop or a continuation, which only a tracer is shown: not an end.
            Ok(child) => {
                if let Some(ended) = Ended::decode(status) {
                    return Ok(Some((child, ended)));
                }
            }
            Err(Errno::EINTR) => {}
            Err(Errno::ECHILD) => return Err(Error::Gone { pid }),
            Err(errno) => return Err(Error::kernel("waitpid", pid, errno)),
        }
    }
}

/// Waits for the end of one child.
///
/// # Errors
/// [`Error::Gone`] when it is no child of ours.
pub fn wait(pid: i32) -> Result<Ended> {
    match wait_with(pid, 0)? {
        Some((_, ended)) => Ok(ended),
        None => Err(Error::Gone { pid }),
    }
}

/// Whether a child has ended, and how. Takes it out of the process table if so.
///
/// # Errors
/// [`Error::Gone`] when it is no child of ours.
pub fn try_wait(pid: i32) -> Result<Option<Ended>> {
    Ok(wait_with(pid, libc::WNOHANG)?.map(|(_, ended)| ended))
}

/// Any child that has ended, taken out of the process table; `None` when none has, or there are no children.
///
/// # Errors
/// [`Error::Kernel`].
pub fn reap() -> Result<Option<(i32, Ended)>> {
    match wait_with(-1, libc::WNOHANG) {
        Err(Error::Gone { .. }) => Ok(None),
        answer => answer,
    }
}

/// Sends a signal to one thread (tgkill(2)): it waits in the thread's own queue, not in that of its process.
///
/// # Errors
/// [`Error::Gone`], [`Error::Kernel`].
pub fn signal_thread(pid: i32, tid: i32, signal: i32) -> Result<()> {
    choke::pass(Kind::Ptrace).map_err(|errno| Error::kernel("tgkill", tid, errno))?;
    // SAFETY: tgkill(2) takes no pointers.
    let answer = unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) };
    match Errno::result(answer) {
        Ok(_) => Ok(()),
        Err(Errno::ESRCH) => Err(Error::Gone { pid: tid }),
        Err(errno) => Err(Error::kernel("tgkill", tid, errno)),
    }
}

/// Sends a signal to a process.
///
/// # Errors
/// [`Error::Gone`], [`Error::Kernel`]; `EINVAL` for a number that is no process, so that a group is never hit by mistake.
pub fn kill(pid: i32, signal: i32) -> Result<()> {
    if pid <= 0 {
        return Err(Error::kernel("kill", pid, Errno::EINVAL));
    }
    // SAFETY: no pointers.
    let answer = unsafe { libc::kill(pid, signal) };
    Errno::result(answer)
        .map(drop)
        .map_err(|errno| Error::kernel("kill", pid, errno))
}

// ---------------------------------------------------------------------------------------------------------------------
// What this process sets on itself

fn prctl(option: i32, value: u64, what: &'static str) -> Result<()> {
    // SAFETY: the options used here take an integer.
    let answer = unsafe { libc::prctl(option, value, 0, 0, 0) };
    Errno::result(answer)
        .map(drop)
        .map_err(|errno| failed(what, errno))
}

/// Starts a session of our own, without a terminal.
///
/// # Errors
/// [`Error::Kernel`]: `EPERM` for a process that leads a group already.
pub fn set_session() -> Result<()> {
    // SAFETY: no arguments.
    let answer = unsafe { libc::setsid() };
    Errno::result(answer)
        .map(drop)
        .map_err(|errno| failed("setsid", errno))
}

/// Makes this process the parent of all its descendants that lose theirs, instead of init.
///
/// # Errors
/// [`Error::Kernel`].
pub fn become_subreaper() -> Result<()> {
    prctl(
        libc::PR_SET_CHILD_SUBREAPER,
        1,
        "prctl(PR_SET_CHILD_SUBREAPER)",
    )
}

/// Asks for `signal` when the *thread* that made this process ends; `parent` is whom the caller takes for its parent, and a
/// parent that ended before the call is answered by sending the signal at once.
///
/// # Errors
/// [`Error::Kernel`].
pub fn set_parent_death_signal(signal: i32, parent: i32) -> Result<()> {
    prctl(
        libc::PR_SET_PDEATHSIG,
        signal as u64,
        "prctl(PR_SET_PDEATHSIG)",
    )?;
    if parent_pid() == parent {
        Ok(())
    } else {
        kill(own_pid(), signal)
    }
}

/// Puts the children made from now on, not this process, into a new time namespace, whose CLOCK_MONOTONIC and CLOCK_BOOTTIME
/// are *ours now* plus the given nanoseconds (unshare(CLONE_NEWTIME), 5.6).
///
/// Must come before the first child: offsets are refused once a task is inside. A child by vfork, as a husk is, enters at its
/// execve (6.1; before, the kernel refuses the vfork).
///
/// # Errors
/// [`Error::Kernel`]: `EINVAL` without `CONFIG_TIME_NS`, `EPERM` without CAP_SYS_ADMIN; [`Error::Path`] with `ERANGE` for a
/// clock that would be negative or beyond 146 years, `EACCES` when a task is inside already.
pub fn unshare_time(monotonic_shift_ns: i64, boottime_shift_ns: i64) -> Result<()> {
    const PATH: &str = "/proc/self/timens_offsets";
    // The file counts from the host's clocks, while our caller compared what it sees in the namespace we are in now.
    let (monotonic, boottime) = procfs::timens_offsets(own_pid())?;
    let range = || Error::path("write", PATH, Errno::ERANGE);
    let monotonic = monotonic
        .checked_add(monotonic_shift_ns)
        .ok_or_else(range)?;
    let boottime = boottime.checked_add(boottime_shift_ns).ok_or_else(range)?;
    // SAFETY: no pointers; time namespaces never change the caller itself.
    let answer = unsafe { libc::unshare(libc::CLONE_NEWTIME) };
    Errno::result(answer).map_err(|errno| failed("unshare(CLONE_NEWTIME)", errno))?;
    let split = |offset: i64| {
        (
            offset.div_euclid(1_000_000_000),
            offset.rem_euclid(1_000_000_000),
        )
    };
    let ((m_s, m_ns), (b_s, b_ns)) = (split(monotonic), split(boottime));
    std::fs::write(
        PATH,
        format!("monotonic {m_s} {m_ns}\nboottime {b_s} {b_ns}\n"),
    )
    .map_err(|error| Error::path("write", PATH, errno_of(&error)))
}

/// Puts the children made from now on, not this process, into a new pid namespace (unshare(CLONE_NEWPID)). The first of them is
/// its process 1: nobody lives on in there without it. This process can have no second thread afterwards.
///
/// # Errors
/// [`Error::Kernel`]: `EPERM` without CAP_SYS_ADMIN, `ENOSPC` below 32 others.
pub fn unshare_pids() -> Result<()> {
    // SAFETY: no pointers; pid namespaces never change the caller itself.
    let answer = unsafe { libc::unshare(libc::CLONE_NEWPID) };
    Errno::result(answer)
        .map(drop)
        .map_err(|errno| failed("unshare(CLONE_NEWPID)", errno))
}

/// Gives this process, and the children made from now on, mounts of their own, which follow ours, and on `/proc` one that shows
/// the pid namespace this process is in.
///
/// # Errors
/// [`Error::Kernel`]: `EPERM` without CAP_SYS_ADMIN; [`Error::Path`] if a mount is refused.
pub fn mount_own_proc() -> Result<()> {
    // SAFETY: no pointers; this thread is the only one, or it alone is in the new namespace.
    let answer = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    Errno::result(answer).map_err(|errno| failed("unshare(CLONE_NEWNS)", errno))?;
    let nothing: Option<&str> = None;
    // Without this the new mount would go back to where we came from.
    nix::mount::mount(
        nothing,
        "/",
        nothing,
        MsFlags::MS_REC | MsFlags::MS_SLAVE,
        nothing,
    )
    .map_err(|errno| Error::path("mount", "/", errno))?;
    mount_proc()
}

/// Mounts on `/proc` one that shows the pid namespace this process is in. The mounts must be our own.
///
/// # Errors
/// [`Error::Path`].
pub fn mount_proc() -> Result<()> {
    const PROC: &str = "/proc";
    let nothing: Option<&str> = None;
    nix::mount::mount(
        Some("proc"),
        PROC,
        Some("proc"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        nothing,
    )
    .map_err(|errno| Error::path("mount", PROC, errno))
}

/// Chooses the number after which the kernel looks for one for the next process or thread of our pid namespace.
///
/// # Errors
/// [`Error::Path`]: `EINVAL` for a number above `/proc/sys/kernel/pid_max`.
pub fn set_last_pid(number: i32) -> Result<()> {
    const PATH: &str = "/proc/sys/kernel/ns_last_pid";
    std::fs::write(PATH, number.to_string())
        .map_err(|error| Error::path("write", PATH, errno_of(&error)))
}

/// The highest process id there can be, and one more.
///
/// # Errors
/// [`Error::Path`], [`Error::Malformed`].
pub fn pid_max() -> Result<i32> {
    const PATH: &str = "/proc/sys/kernel/pid_max";
    let text = std::fs::read_to_string(PATH)
        .map_err(|error| Error::path("read", PATH, errno_of(&error)))?;
    text.trim().parse().map_err(|_| Error::Malformed {
        path: PATH.into(),
        what: "the highest number",
    })
}

/// Lets go of all that a process that stays behind must not hold: its working directory, its terminal, and every descriptor but
/// `kept`. Whoever waits for the end of a pipe that was open in it waits no longer. The standard files lead to nowhere.
///
/// To be called where no other part of the program has an open file that it will use.
///
/// # Errors
/// [`Error::Path`], [`Error::Kernel`].
pub fn let_go_of_files(kept: &[BorrowedFd<'_>]) -> Result<()> {
    const NOWHERE: &str = "/dev/null";
    const STANDARD_FILES: u32 = 3;
    nix::unistd::chdir("/").map_err(|errno| Error::path("chdir", "/", errno))?;
    let nowhere = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(NOWHERE)
        .map_err(|error| Error::path("open", NOWHERE, errno_of(&error)))?;
    nix::unistd::dup2_stdin(&nowhere)
        .and_then(|()| nix::unistd::dup2_stdout(&nowhere))
        .and_then(|()| nix::unistd::dup2_stderr(&nowhere))
        .map_err(|errno| failed("dup2", errno))?;
    drop(nowhere);
    let mut numbers: Vec<u32> = kept
        .iter()
        .filter_map(|kept| u32::try_from(kept.as_raw_fd()).ok())
        .filter(|&number| number >= STANDARD_FILES)
        .collect();
    numbers.sort_unstable();
    let mut first = STANDARD_FILES;
    for number in numbers.into_iter().chain([u32::MAX]) {
        if first < number {
            // SAFETY: no pointers; the caller gives up what is open there.
            let answer = unsafe { libc::syscall(libc::SYS_close_range, first, number - 1, 0) };
            Errno::result(answer).map_err(|errno| failed("close_range", errno))?;
        }
        first = number.saturating_add(1);
    }
    Ok(())
}

/// Names this thread, as ps(1) shows it: at most 15 bytes.
///
/// # Errors
/// [`Error::Kernel`].
pub fn set_name(name: &std::ffi::CStr) -> Result<()> {
    nix::sys::prctl::set_name(name).map_err(|errno| failed("prctl(PR_SET_NAME)", errno))
}

// ---------------------------------------------------------------------------------------------------------------------
// Signals and priority

/// A set of signals: bit n-1 is signal n, as the kernel has it.
pub fn signal_set(signals: &[i32]) -> u64 {
    signals
        .iter()
        .filter(|signal| (1..=64).contains(*signal))
        .fold(0, |set, signal| set | 1 << (signal - 1))
}

/// Replaces this thread's signal mask and returns the old one. Goes to the kernel directly: the C library would leave out the
/// two signals it keeps for itself.
///
/// # Errors
/// [`Error::Kernel`].
pub fn set_signal_mask(mask: u64) -> Result<u64> {
    let mut old = 0_u64;
    // SAFETY: the kernel's signal set is 8 bytes; it reads one and stores one.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const mask,
            &raw mut old,
            size_of::<u64>(),
        )
    };
    Errno::result(answer).map_err(|errno| failed("rt_sigprocmask", errno))?;
    Ok(old)
}

/// Makes SIGCHLD one that a signalfd can read in whichever thread: of children, and of those that any thread of ours traces. For
/// this thread and all it makes from here on.
///
/// # Errors
/// [`Error::Kernel`].
pub fn queue_child_signals() -> Result<()> {
    // SAFETY: no handler is set, so nothing of ours runs for it. Ignored, as a parent of ours may have left it, it would not be
    // raised when a tracee stops.
    if unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) } == libc::SIG_ERR {
        return Err(failed("signal", Errno::last()));
    }
    let now = set_signal_mask(u64::MAX)?;
    set_signal_mask(now | 1 << (libc::SIGCHLD - 1)).map(drop)
}

/// Every signal is blocked in this thread until this is dropped.
#[derive(Debug)]
pub struct BlockedSignals {
    old: u64,
}

impl BlockedSignals {
    /// Blocks every signal that can be.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    pub fn all() -> Result<Self> {
        Self::only(u64::MAX)
    }

    /// Makes `mask` the mask.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    pub fn only(mask: u64) -> Result<Self> {
        Ok(Self {
            old: set_signal_mask(mask)?,
        })
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // Cannot fail: the same call with the same addresses has succeeded.
        let _ = set_signal_mask(self.old);
    }
}

/// This thread runs before all normal ones (`SCHED_FIFO`, priority 1) until this is dropped; processes it makes do not.
///
/// A host that forbids it (no CAP_SYS_NICE, a container) only makes the work slower, so that is not an error.
#[derive(Debug)]
pub struct RealTime {
    old: Option<(i32, i32)>,
}

impl RealTime {
    /// Raises the calling thread.
    pub fn enter() -> Self {
        // SAFETY: no pointers; 0 is the calling thread.
        let policy = unsafe { libc::sched_getscheduler(0) };
        let mut parameter = libc::sched_param { sched_priority: 0 };
        // SAFETY: the kernel stores one int.
        let known = policy >= 0 && unsafe { libc::sched_getparam(0, &raw mut parameter) } == 0;
        let raised = known && set_scheduler(libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, 1);
        Self {
            old: raised.then_some((policy, parameter.sched_priority)),
        }
    }

    /// Whether the host allowed it.
    pub fn is_raised(&self) -> bool {
        self.old.is_some()
    }
}

impl Drop for RealTime {
    fn drop(&mut self) {
        if let Some((policy, priority)) = self.old {
            // Giving up priority is always allowed. The reset-on-fork flag may not be cleared without privilege, so a first
            // refusal is answered by keeping it.
            let _ = set_scheduler(policy, priority)
                || set_scheduler(policy | libc::SCHED_RESET_ON_FORK, priority);
        }
    }
}

fn set_scheduler(policy: i32, priority: i32) -> bool {
    let parameter = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: the kernel reads one int; 0 is the calling thread.
    unsafe { libc::sched_setscheduler(0, policy, &raw const parameter) == 0 }
}

/// Waits until one of the descriptors can be read, or has an error or hang-up to tell, at most `timeout` (`None`: for ever).
/// Which of them; none when the time is over or a signal came.
///
/// # Errors
/// [`Error::Kernel`].
pub fn wait_readable(
    descriptors: &[std::os::fd::BorrowedFd<'_>],
    timeout: Option<Duration>,
) -> Result<Vec<bool>> {
    let mut polls: Vec<libc::pollfd> = descriptors
        .iter()
        .map(|descriptor| libc::pollfd {
            fd: descriptor.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    let limit = timeout.map(|timeout| libc::timespec {
        tv_sec: timeout.as_secs().try_into().unwrap_or(libc::time_t::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    let limit = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: as many pollfds as stated, which outlive the call, as does the time limit.
    let answer = unsafe {
        libc::ppoll(
            polls.as_mut_ptr(),
            polls.len() as libc::nfds_t,
            limit,
            std::ptr::null(),
        )
    };
    match Errno::result(answer) {
        Ok(_) | Err(Errno::EINTR) => Ok(polls.iter().map(|poll| poll.revents != 0).collect()),
        Err(errno) => Err(failed("ppoll", errno)),
    }
}

/// Runs a test in a process of its own that begins with one thread, because the test harness has several and because its
/// forks, mappings and descriptors are then nobody else's. A panic in it is a panic here.
#[cfg(test)]
pub(crate) fn alone(test: impl FnOnce()) {
    // Held over the fork by this thread, which the child's only thread is a copy of, so that no other holds them there.
    let output = (std::io::stdout().lock(), std::io::stderr().lock());
    // SAFETY: the C library makes its own locks usable in the child; of Rust's, the tests use only those held here.
    let pid = unsafe { libc::fork() };
    drop(output);
    assert!(pid >= 0, "fork: {}", Errno::last());
    if pid == 0 {
        let passed = catch_unwind(AssertUnwindSafe(test));
        let code = match passed {
            Ok(()) => 0,
            Err(cause) => {
                let text = cause
                    .downcast_ref::<String>()
                    .map(String::as_str)
                    .or_else(|| cause.downcast_ref::<&str>().copied())
                    .unwrap_or("a panic without words");
                // Not through the harness' capture, which dies with this process.
                // SAFETY: the text is readable for its length.
                unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
                1
            }
        };
        // SAFETY: ends this process without the harness' exit handlers.
        unsafe { libc::_exit(code) };
    }
    assert_eq!(wait(pid).expect("wait"), Ended::Exited(0));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd as _;

    #[test]
    fn a_child_that_shares_files_leaves_its_descriptor_behind() {
        alone(|| {
            let (answer, tell) = crate::pipe::create(4096, &[]).expect("pipe");
            let child = fork(true, || {
                let held = crate::descriptor::create_eventfd(5, false).expect("eventfd");
                let number = std::os::fd::IntoRawFd::into_raw_fd(held);
                // Later than the parent returns from its fork.
                std::thread::sleep(Duration::from_millis(20));
                let mut tell = std::fs::File::from(tell);
                tell.write_all(&number.to_ne_bytes()).expect("tell");
                7
            });
            let child = child.expect("fork");
            assert_eq!(wait(child).expect("wait"), Ended::Exited(7));
            let mut number = [0; 4];
            std::io::Read::read_exact(&mut std::fs::File::from(answer), &mut number).expect("read");
            let number = i32::from_ne_bytes(number) as u32;
            let entry = procfs::descriptor(own_pid(), number).expect("still open");
            assert_eq!(entry.info.eventfd.expect("eventfd").count, 5);
        });
    }

    #[test]
    fn a_child_knows_its_own_thread_id() {
        alone(|| {
            let child = fork(false, || {
                // The C library signals itself by the thread id it has noted; `raise` would hit the parent with a stale one.
                // SAFETY: no pointers.
                unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGTERM) };
                0
            });
            let child = child.expect("fork");
            assert_eq!(wait(child).expect("wait"), Ended::Killed(libc::SIGTERM));
            // Threads, which need a valid thread descriptor, can be made in a child.
            let child = fork(true, || std::thread::spawn(|| 3).join().unwrap_or(1)).expect("fork");
            assert_eq!(wait(child).expect("wait"), Ended::Exited(3));
        });
    }

    #[test]
    fn a_panic_in_a_child_is_code_101() {
        alone(|| {
            std::panic::set_hook(Box::new(|_| {}));
            let child = fork(false, || panic!("on purpose")).expect("fork");
            assert_eq!(wait(child).expect("wait"), Ended::Exited(101));
            assert!(matches!(wait(child), Err(Error::Gone { .. })));
            assert_eq!(reap().expect("reap"), None);
        });
    }

    #[test]
    fn a_subreaper_gets_the_orphans() {
        alone(|| {
            become_subreaper().expect("subreaper");
            let child = fork(false, || match fork(false, || 9) {
                // The grandchild outlives this process or not: both ways it is the subreaper's to wait for.
                Ok(_) => 0,
                Err(_) => 1,
            });
            let child = child.expect("fork");
            assert_eq!(wait(child).expect("wait"), Ended::Exited(0));
            assert_eq!(wait(-1).expect("orphan"), Ended::Exited(9));
        });
    }

    #[test]
    fn a_new_time_namespace_counts_from_ours() {
        alone(|| {
            const HOUR: i64 = 3_600_000_000_000;
            let (monotonic, boottime) = procfs::timens_offsets(own_pid()).expect("offsets");
            unshare_time(HOUR + 5, 2 * HOUR - 5).expect("unshare");
            assert_eq!(
                procfs::timens_offsets(own_pid()).expect("offsets"),
                (monotonic + HOUR + 5, boottime + 2 * HOUR - 5)
            );
            let before = crate::host::clocks().expect("clocks");
            let child = fork(false, || {
                let now = crate::host::clocks().expect("clocks");
                let moved = now.monotonic_ns.abs_diff(before.monotonic_ns + HOUR as u64);
                i32::from(moved > 60_000_000_000)
            });
            assert_eq!(wait(child.expect("fork")).expect("wait"), Ended::Exited(0));
        });
    }

    #[test]
    fn a_new_pid_namespace_has_its_own_numbers_and_proc() {
        alone(|| {
            unshare_pids().expect("unshare");
            let first = fork(false, || {
                mount_own_proc().expect("proc");
                let wanted = pid_max().expect("limit") - 500;
                set_last_pid(wanted - 1).expect("last");
                let child = fork(false, || 5).expect("fork");
                assert_eq!((own_pid(), child), (1, wanted));
                // What is listed is what is in there.
                assert_eq!(
                    procfs::descendants(own_pid()).expect("proc"),
                    [1, child].map(|pid| pid)
                );
                assert_eq!(wait(child).expect("wait"), Ended::Exited(5));
                6
            });
            assert_eq!(wait(first.expect("fork")).expect("wait"), Ended::Exited(6));
            // And here as it was.
            assert!(procfs::stat(own_pid(), own_pid()).is_ok());
        });
    }

    #[test]
    fn who_lets_go_of_files_holds_those_kept_only() {
        alone(|| {
            let (end, held) = crate::pipe::create(4096, &[]).expect("pipe");
            let (kept, tell) = crate::pipe::create(4096, &[]).expect("pipe");
            let child = fork(false, || {
                let_go_of_files(&[kept.as_fd()]).expect("let go");
                // Until it is told to end.
                let _ = wait_readable(&[kept.as_fd()], None);
                i32::from(std::env::current_dir().expect("it has one") != std::path::Path::new("/"))
            });
            drop(held);
            let ready = wait_readable(&[end.as_fd()], Some(Duration::from_secs(10)));
            assert_eq!(
                ready.expect("wait"),
                [true],
                "the child holds the other end"
            );
            // It was forked with this one, too, and has closed it.
            drop(tell);
            let child = child.expect("fork");
            assert_eq!(wait(child).expect("wait"), Ended::Exited(0));
        });
    }

    #[test]
    fn fork_refuses_with_two_threads() {
        // The test harness runs each test on a thread beside its main one.
        assert!(matches!(fork(false, || 0), Err(Error::WrongState { .. })));
    }

    #[test]
    fn a_signal_set_has_the_kernels_bits() {
        assert_eq!(signal_set(&[1, 15, 64]), 1 | 1 << 14 | 1 << 63);
        assert_eq!(signal_set(&[0, 65, -3]), 0);
    }

    #[test]
    fn blocked_signals_come_back() {
        let before = set_signal_mask(0).expect("mask");
        {
            let _blocked = BlockedSignals::all().expect("block");
            let status = procfs::status(own_pid(), nix::unistd::gettid().as_raw()).expect("status");
            // SIGKILL and SIGSTOP cannot be blocked.
            assert_eq!(status.sig_blk, !signal_set(&[libc::SIGKILL, libc::SIGSTOP]));
        }
        assert_eq!(set_signal_mask(before).expect("mask"), 0);
    }

    #[test]
    fn real_time_ends_with_its_guard() {
        // SAFETY: no pointers.
        let policy = || unsafe { libc::sched_getscheduler(0) };
        let before = policy();
        let guard = RealTime::enter();
        if guard.is_raised() {
            assert_eq!(policy(), libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK);
        }
        drop(guard);
        assert_eq!(policy(), before);
    }

    #[test]
    fn waiting_tells_which_descriptor_is_ready() {
        let (idle, _keep) = crate::pipe::create(4096, &[]).expect("pipe");
        let (full, _keep_too) = crate::pipe::create(4096, b"x").expect("pipe");
        let ready = wait_readable(
            &[idle.as_fd(), full.as_fd()],
            Some(Duration::from_millis(100)),
        )
        .expect("wait");
        assert_eq!(ready, [false, true]);
    }

    #[test]
    fn killing_a_group_by_mistake_is_refused() {
        assert!(kill(0, 0).is_err() && kill(-1, 0).is_err());
    }
}
