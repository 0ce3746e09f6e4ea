//! System calls that a stop has interrupted: what has to be done so that the program never notices.
//!
//! The kernel restarts most of them by itself when a stopped thread goes on, through one of its private error numbers in
//! rax. Three cases are ours:
//!
//! - A thread that goes on *elsewhere* than through the kernel's own restart (on another host, or out of a signal frame)
//!   must be wound back by us: the instruction pointer to the `syscall` instruction, rax to the call's number.
//! - A call that keeps its progress in the kernel (ERESTART_RESTARTBLOCK: nanosleep, poll, futex with a timeout) cannot be
//!   wound back elsewhere, because the registers hold the whole timeout again: it answers EINTR there.
//! - Some calls answer EINTR to *any* interruption, although no signal came. Such an EINTR is wound back, with the
//!   timeout shortened by the time already slept.
//!
//! This file only computes; it never talks to the kernel.

use std::time::Duration;

use crate::registers::Registers;

const EINTR: i64 = -(libc::EINTR as i64);
/// linux/errno.h: kernel-private, visible only to tracers.
const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;

/// `syscall` is `0f 05`.
const SYSCALL_LEN: u64 = 2;

/// "Not in a system call" for the kernel: it then leaves rax alone.
pub(crate) const NO_CALL: u64 = u64::MAX;

/// How a call that leaks EINTR is given its relative timeout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Timeout {
    /// It has none, or one that belongs to the object and starts anew (SO_RCVTIMEO, io_uring's own).
    None,
    /// Milliseconds in this argument, as an int; negative = for ever.
    Milliseconds(Argument),
    /// Address of a `struct timespec` in this argument; null = for ever.
    Timespec(Argument),
}

/// A system call argument, by its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Argument {
    Third,
    Fourth,
    Fifth,
}

impl Argument {
    pub(crate) fn of(self, registers: &Registers) -> u64 {
        match self {
            Self::Third => registers.rdx,
            Self::Fourth => registers.r10,
            Self::Fifth => registers.r8,
        }
    }

    pub(crate) fn set(self, registers: &mut Registers, value: u64) {
        match self {
            Self::Third => registers.rdx = value,
            Self::Fourth => registers.r10 = value,
            Self::Fifth => registers.r8 = value,
        }
    }
}

/// The calls that answer EINTR when a thread is merely stopped (seen on 6.18), and those that do so for a socket with
/// SO_RCVTIMEO or SO_SNDTIMEO.
pub(crate) fn leaking(number: i64) -> Option<Timeout> {
    Some(match number {
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => Timeout::Milliseconds(Argument::Fourth),
        libc::SYS_epoll_pwait2 | libc::SYS_semtimedop => Timeout::Timespec(Argument::Fourth),
        libc::SYS_rt_sigtimedwait => Timeout::Timespec(Argument::Third),
        libc::SYS_io_getevents => Timeout::Timespec(Argument::Fifth),
        libc::SYS_semop
        | libc::SYS_io_uring_enter
        | libc::SYS_accept
        | libc::SYS_accept4
        | libc::SYS_connect
        | libc::SYS_read
        | libc::SYS_readv
        | libc::SYS_recvfrom
        | libc::SYS_recvmsg
        | libc::SYS_recvmmsg
        | libc::SYS_write
        | libc::SYS_writev
        | libc::SYS_sendto
        | libc::SYS_sendmsg
        | libc::SYS_sendmmsg => Timeout::None,
        _ => return None,
    })
}

/// The call these registers have just answered with EINTR, if it is one that leaks it.
pub(crate) fn leaked(registers: &Registers) -> Option<Timeout> {
    if registers.rax as i64 == EINTR {
        leaking(registers.orig_rax as i64)
    } else {
        None
    }
}

/// The same registers before the call.
pub(crate) fn rewound(registers: &Registers) -> Registers {
    Registers {
        rip: registers.rip.wrapping_sub(SYSCALL_LEN),
        rax: registers.orig_rax,
        orig_rax: NO_CALL,
        ..*registers
    }
}

/// What these registers become without the kernel's restart: wound back, or EINTR, or as they are. A leaked EINTR is not
/// looked at here.
pub(crate) fn without_kernel(registers: &Registers) -> Registers {
    if (registers.orig_rax as i64) < 0 {
        return Registers {
            orig_rax: NO_CALL,
            ..*registers
        };
    }
    match registers.rax as i64 {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => rewound(registers),
        ERESTART_RESTARTBLOCK if timeout_stands(registers) => rewound(registers),
        ERESTART_RESTARTBLOCK => Registers {
            rax: EINTR as u64,
            orig_rax: NO_CALL,
            ..*registers
        },
        _ => Registers {
            orig_rax: NO_CALL,
            ..*registers
        },
    }
}

/// True for calls whose registers still hold the right timeout, although the kernel keeps a restart block: poll(2) without
/// one, and futex(2) waits until an absolute time.
fn timeout_stands(registers: &Registers) -> bool {
    const FUTEX_COMMAND: u64 = 0x7f;
    const FUTEX_WAIT_BITSET: u64 = 9;
    match registers.orig_rax as i64 {
        libc::SYS_poll => (registers.rdx as u32 as i32) < 0,
        libc::SYS_futex => registers.rsi & FUTEX_COMMAND == FUTEX_WAIT_BITSET,
        _ => false,
    }
}

/// What is left of a millisecond timeout; rounded up, because a timeout may come late but not early.
pub(crate) fn milliseconds_left(argument: u64, spent: Duration) -> u64 {
    let whole = argument as u32 as i32;
    if whole <= 0 {
        return argument;
    }
    let left = Duration::from_millis(whole as u64).saturating_sub(spent);
    left.as_micros().div_ceil(1000) as u64
}

/// What is left of a timespec (seconds, nanoseconds); one the kernel would refuse stays as it is.
pub(crate) fn timespec_left(timespec: [i64; 2], spent: Duration) -> [i64; 2] {
    let [seconds, nanoseconds] = timespec;
    if seconds < 0 || !(0..1_000_000_000).contains(&nanoseconds) {
        return timespec;
    }
    let left = Duration::new(seconds as u64, nanoseconds as u32).saturating_sub(spent);
    [left.as_secs() as i64, i64::from(left.subsec_nanos())]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stopped(number: i64, rax: i64) -> Registers {
        Registers {
            rip: 0x1002,
            rax: rax as u64,
            orig_rax: number as u64,
            ..Registers::default()
        }
    }

    #[test]
    fn restartable_calls_are_wound_back_and_blocks_become_eintr() {
        for rax in [ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND] {
            let fixed = without_kernel(&stopped(libc::SYS_pause, rax));
            assert_eq!(
                (fixed.rip, fixed.rax, fixed.orig_rax),
                (0x1000, libc::SYS_pause as u64, NO_CALL)
            );
        }
        let fixed = without_kernel(&stopped(libc::SYS_nanosleep, ERESTART_RESTARTBLOCK));
        assert_eq!((fixed.rip, fixed.rax as i64), (0x1002, EINTR));
    }

    #[test]
    fn calls_whose_timeout_still_stands_are_wound_back_in_spite_of_their_block() {
        let mut waiting = stopped(libc::SYS_poll, ERESTART_RESTARTBLOCK);
        waiting.rdx = u64::from(u32::MAX);
        assert_eq!(without_kernel(&waiting).rip, 0x1000);
        waiting.rdx = 1000;
        assert_eq!(without_kernel(&waiting).rip, 0x1002);
        let mut waiting = stopped(libc::SYS_futex, ERESTART_RESTARTBLOCK);
        waiting.rsi = 9 | 128;
        assert_eq!(without_kernel(&waiting).rip, 0x1000);
        waiting.rsi = 128;
        assert_eq!(without_kernel(&waiting).rip, 0x1002);
    }

    #[test]
    fn an_error_number_outside_a_call_is_only_a_number() {
        let outside = stopped(-1, ERESTARTSYS);
        assert_eq!(without_kernel(&outside), outside);
    }

    #[test]
    fn eintr_of_a_call_that_may_really_be_interrupted_is_kept() {
        assert_eq!(leaked(&stopped(libc::SYS_nanosleep, EINTR)), None);
        assert_eq!(leaked(&stopped(libc::SYS_close, EINTR)), None);
        assert_eq!(
            leaked(&stopped(libc::SYS_semop, EINTR)),
            Some(Timeout::None)
        );
    }

    #[test]
    fn timeouts_shrink_but_never_turn_negative_and_for_ever_stays() {
        let spent = Duration::from_micros(1_500_100);
        assert_eq!(milliseconds_left(2000, spent), 500);
        assert_eq!(milliseconds_left(10, spent), 0);
        assert_eq!(
            milliseconds_left(u64::from(u32::MAX), spent),
            u64::from(u32::MAX)
        );
        assert_eq!(timespec_left([2, 0], spent), [0, 499_900_000]);
        assert_eq!(timespec_left([1, 0], spent), [0, 0]);
        assert_eq!(timespec_left([-1, 0], spent), [-1, 0]);
    }
}
