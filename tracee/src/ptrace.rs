//! The ptrace(2) requests this crate uses, as functions with results instead of words.
//!
//! This file knows the calling conventions and nothing else: it keeps no state about threads and never decides what to do
//! with a stop. Everything here must be called from the operating-system thread that seized the tracee.

use std::mem::{size_of, size_of_val};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::choke::{self, Kind};
use crate::registers::Registers;
use crate::tree::RseqConfiguration;
use crate::{Error, Result};

pub(crate) const OPTION_SYSGOOD: u64 = libc::PTRACE_O_TRACESYSGOOD as u64;
pub(crate) const OPTION_EXIT_KILL: u64 = libc::PTRACE_O_EXITKILL as u64;
pub(crate) const OPTION_SUSPEND_SECCOMP: u64 = libc::PTRACE_O_SUSPEND_SECCOMP as u64;
pub(crate) const OPTION_FOLLOW: u64 = (libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACEEXEC) as u64;

/// `NT_X86_XSTATE`, elf.h.
const NOTE_X86_XSTATE: usize = 0x202;
/// The extended state of a thread with AMX is 11,008 bytes; twice that leaves room for processors to come.
const XSAVE_LIMIT: usize = 32 * 1024;

/// Why a thread is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// By PTRACE_INTERRUPT, or for the first time after it was attached.
    Trap,
    /// By a stopping signal of its own, which must still stop it when we are gone.
    Group,
    /// A signal is about to be delivered and is ours to forward.
    Signal(i32),
    /// At the entry to or the exit from a system call.
    Syscall,
    /// One of the PTRACE_EVENT_* the follow options ask for.
    Event(i32),
}

/// What a look at a thread shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Report {
    Running,
    Stopped(Stop),
    /// It has ended with this wait status, or is no tracee of ours any more.
    Ended(i32),
}

fn request(
    what: &'static str,
    request: libc::c_uint,
    tid: i32,
    address: usize,
    data: usize,
) -> Result<i64> {
    choke::pass(Kind::Ptrace)
        .and_then(|()| raw(request, tid, address, data))
        .map_err(|errno| Error::kernel(what, tid, errno))
}

fn raw(
    request: libc::c_uint,
    tid: i32,
    address: usize,
    data: usize,
) -> std::result::Result<i64, Errno> {
    // SAFETY: the callers below pass, for each request, either plain numbers or the address of a live object of the size
    // that request reads or writes. The raw system call is used because glibc's wrapper changes the PEEK requests.
    Errno::result(unsafe { libc::syscall(libc::SYS_ptrace, request, tid, address, data) })
}

pub(crate) fn seize(tid: i32, options: u64) -> Result<()> {
    request(
        "ptrace(SEIZE)",
        libc::PTRACE_SEIZE,
        tid,
        0,
        options as usize,
    )
    .map(drop)
}

pub(crate) fn interrupt(tid: i32) -> Result<()> {
    request("ptrace(INTERRUPT)", libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

pub(crate) fn resume(tid: i32, signal: i32) -> Result<()> {
    request("ptrace(CONT)", libc::PTRACE_CONT, tid, 0, signal as usize).map(drop)
}

pub(crate) fn resume_to_syscall(tid: i32) -> Result<()> {
    request("ptrace(SYSCALL)", libc::PTRACE_SYSCALL, tid, 0, 0).map(drop)
}

pub(crate) fn listen(tid: i32) -> Result<()> {
    request("ptrace(LISTEN)", libc::PTRACE_LISTEN, tid, 0, 0).map(drop)
}

pub(crate) fn detach(tid: i32) -> Result<()> {
    request("ptrace(DETACH)", libc::PTRACE_DETACH, tid, 0, 0).map(drop)
}

pub(crate) fn set_options(tid: i32, options: u64) -> Result<()> {
    request(
        "ptrace(SETOPTIONS)",
        libc::PTRACE_SETOPTIONS,
        tid,
        0,
        options as usize,
    )
    .map(drop)
}

/// The number that belongs to the last event: the new thread or process, or the former id of a thread that called execve.
pub(crate) fn event_message(tid: i32) -> Result<i32> {
    let mut message: libc::c_ulong = 0;
    request(
        "ptrace(GETEVENTMSG)",
        libc::PTRACE_GETEVENTMSG,
        tid,
        0,
        &raw mut message as usize,
    )?;
    Ok(message as i32)
}

pub(crate) fn registers(tid: i32) -> Result<Registers> {
    let mut registers = Registers::default();
    request(
        "ptrace(GETREGS)",
        libc::PTRACE_GETREGS,
        tid,
        0,
        &raw mut registers as usize,
    )?;
    Ok(registers)
}

pub(crate) fn set_registers(tid: i32, registers: &Registers) -> Result<()> {
    request(
        "ptrace(SETREGS)",
        libc::PTRACE_SETREGS,
        tid,
        0,
        std::ptr::from_ref(registers) as usize,
    )
    .map(drop)
}

pub(crate) fn xsave(tid: i32) -> Result<Vec<u8>> {
    let mut bytes = vec![0; XSAVE_LIMIT];
    let mut vector = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    request(
        "ptrace(GETREGSET)",
        libc::PTRACE_GETREGSET,
        tid,
        NOTE_X86_XSTATE,
        &raw mut vector as usize,
    )?;
    bytes.truncate(vector.iov_len);
    Ok(bytes)
}

pub(crate) fn set_xsave(tid: i32, bytes: &[u8]) -> Result<()> {
    let vector = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    request(
        "ptrace(SETREGSET)",
        libc::PTRACE_SETREGSET,
        tid,
        NOTE_X86_XSTATE,
        &raw const vector as usize,
    )
    .map(drop)
}

/// The blocked signals; while a call like ppoll(2) has put others in their place, those it will put back.
pub(crate) fn sigmask(tid: i32) -> Result<u64> {
    let mut mask = 0_u64;
    request(
        "ptrace(GETSIGMASK)",
        libc::PTRACE_GETSIGMASK,
        tid,
        size_of::<u64>(),
        &raw mut mask as usize,
    )?;
    Ok(mask)
}

pub(crate) fn set_sigmask(tid: i32, mask: u64) -> Result<()> {
    request(
        "ptrace(SETSIGMASK)",
        libc::PTRACE_SETSIGMASK,
        tid,
        size_of::<u64>(),
        &raw const mask as usize,
    )
    .map(drop)
}

#[repr(C)]
struct PeekSiginfo {
    offset: u64,
    flags: u32,
    count: i32,
}
const _: () = assert!(size_of::<PeekSiginfo>() == size_of::<libc::ptrace_peeksiginfo_args>());

/// All pending signals of the thread, or of its process, without taking them.
pub(crate) fn pending(tid: i32, shared: bool) -> Result<Vec<[u8; 128]>> {
    const AT_ONCE: usize = 32;
    let mut all = Vec::new();
    loop {
        let mut some = [[0_u8; 128]; AT_ONCE];
        let arguments = PeekSiginfo {
            offset: all.len() as u64,
            flags: if shared {
                libc::PTRACE_PEEKSIGINFO_SHARED
            } else {
                0
            },
            count: AT_ONCE as i32,
        };
        let count = request(
            "ptrace(PEEKSIGINFO)",
            libc::PTRACE_PEEKSIGINFO,
            tid,
            &raw const arguments as usize,
            some.as_mut_ptr() as usize,
        )? as usize;
        debug_assert_eq!(size_of_val(&some), AT_ONCE * 128);
        all.extend_from_slice(&some[..count]);
        if count == 0 {
            return Ok(all);
        }
    }
}

#[repr(C)]
#[derive(Default)]
struct RawRseq {
    address: u64,
    size: u32,
    signature: u32,
    flags: u32,
    pad: u32,
}
const _: () = assert!(size_of::<RawRseq>() == size_of::<libc::ptrace_rseq_configuration>());

pub(crate) fn rseq(tid: i32) -> Result<RseqConfiguration> {
    let mut found = RawRseq::default();
    request(
        "ptrace(GET_RSEQ_CONFIGURATION)",
        libc::PTRACE_GET_RSEQ_CONFIGURATION,
        tid,
        size_of::<RawRseq>(),
        &raw mut found as usize,
    )?;
    Ok(RseqConfiguration {
        address: found.address,
        size: found.size,
        signature: found.signature,
        flags: found.flags,
    })
}

/// `PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG` (6.4), linux/ptrace.h.
const GET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_uint = 0x4211;

/// `struct ptrace_sud_config`.
#[repr(C)]
#[derive(Default)]
struct RawDispatch {
    mode: u64,
    selector: u64,
    offset: u64,
    len: u64,
}
const _: () = assert!(size_of::<RawDispatch>() == 32);

/// Whether the thread's system calls go to a handler of its own (`PR_SET_SYSCALL_USER_DISPATCH`).
pub(crate) fn dispatches_syscalls(tid: i32) -> Result<bool> {
    let mut found = RawDispatch::default();
    request(
        "ptrace(GET_SYSCALL_USER_DISPATCH_CONFIG)",
        GET_SYSCALL_USER_DISPATCH_CONFIG,
        tid,
        size_of::<RawDispatch>(),
        &raw mut found as usize,
    )?;
    Ok(found.mode != 0)
}

/// One look at a thread, without waiting. Not counted at the choke point: how often a wait has to look is chance.
pub(crate) fn look(tid: i32) -> std::result::Result<Report, Errno> {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    let found = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
    match Errno::result(found) {
        Ok(0) | Err(Errno::EINTR) => Ok(Report::Running),
        Ok(_) if libc::WIFSTOPPED(status) => Ok(Report::Stopped(classify(status))),
        Ok(_) if libc::WIFCONTINUED(status) => Ok(Report::Running),
        Ok(_) => Ok(Report::Ended(status)),
        Err(Errno::ECHILD) => Ok(Report::Ended(0)),
        Err(errno) => Err(errno),
    }
}

fn classify(status: i32) -> Stop {
    let signal = libc::WSTOPSIG(status);
    match status >> 16 {
        0 if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
        0 => Stop::Signal(signal),
        libc::PTRACE_EVENT_STOP if signal == libc::SIGTRAP => Stop::Trap,
        libc::PTRACE_EVENT_STOP => Stop::Group,
        event => Stop::Event(event),
    }
}

/// Waits until a thread stops or ends, at most `limit`; [`Report::Running`] when that was not enough.
pub(crate) fn wait(tid: i32, limit: Duration) -> Result<Report> {
    choke::pass(Kind::Ptrace).map_err(|errno| Error::kernel("waitpid", tid, errno))?;
    let mut patience = Patience::new(limit);
    loop {
        match look(tid).map_err(|errno| Error::kernel("waitpid", tid, errno))? {
            Report::Running if patience.nap() => {}
            report => return Ok(report),
        }
    }
}

/// How to wait for something that is mostly a matter of microseconds: look again at once a few times, then sleep a little
/// longer each time. It always gives up the processor: whoever is waited for may need it, and we may run SCHED_FIFO.
pub(crate) struct Patience {
    until: Instant,
    nap: Duration,
}

impl Patience {
    const FIRST: Duration = Duration::from_micros(5);
    const LONGEST: Duration = Duration::from_micros(500);

    pub(crate) fn new(limit: Duration) -> Self {
        Self {
            until: Instant::now() + limit,
            nap: Self::FIRST,
        }
    }

    /// Sleeps a little; false, without sleeping, when the time is up.
    pub(crate) fn nap(&mut self) -> bool {
        if Instant::now() >= self.until {
            return false;
        }
        std::thread::sleep(self.nap);
        self.nap = (self.nap * 3 / 2).min(Self::LONGEST);
        true
    }
}
