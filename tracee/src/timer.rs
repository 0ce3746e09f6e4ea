//! timerfds: the timers that are descriptors.
//!
//! It reads nothing (what a timerfd is set to stands in `/proc/<pid>/fdinfo`, see [`crate::procfs::TimerfdInfo`]) and makes
//! new ones in our own process, to be handed to the process being rebuilt. A timer starts to run where it is made, so it is
//! made as late as possible.
//!
//! # Safety
//! Each unsafe block is one system call on a descriptor we hold, with structures that outlive the call.

use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};

use nix::errno::Errno;

use crate::choke::{self, Kind};
use crate::error::{Error, Result};
use crate::process::own_pid;
use crate::procfs::TimerfdInfo;

/// Sets the number of expirations not yet read (3.17, `CONFIG_CHECKPOINT_RESTORE`).
const TFD_IOC_SET_TICKS: libc::Ioctl = 0x4008_5400;
const _: () = assert!(TFD_IOC_SET_TICKS == nix::request_code_write!(b'T', 0, size_of::<u64>()));
const _: () = assert!(size_of::<libc::itimerspec>() == 32);

const NANOSECONDS_PER_SECOND: u64 = 1_000_000_000;

fn timespec(nanoseconds: u64) -> libc::timespec {
    libc::timespec {
        tv_sec: (nanoseconds / NANOSECONDS_PER_SECOND) as libc::time_t,
        tv_nsec: (nanoseconds % NANOSECONDS_PER_SECOND) as libc::c_long,
    }
}

/// Makes a timerfd in the state `state` tells: clock, time left, interval, expirations not yet read.
///
/// The descriptor is close-on-exec and blocking; `F_SETFL` gives it the flags of the original. The time left is counted from
/// now, even when the original was armed with an absolute time: `TFD_TIMER_ABSTIME` only mattered when it was armed, and
/// `TFD_TIMER_CANCEL_ON_SET`, which needs it, is armed by an absolute time computed here.
///
/// # Errors
/// [`Error::Kernel`]: `EPERM` for an alarm clock without CAP_WAKE_ALARM, `ENOTTY` for ticks without
/// `CONFIG_CHECKPOINT_RESTORE`.
pub fn create(state: &TimerfdInfo) -> Result<OwnedFd> {
    let pid = own_pid();
    choke::pass(Kind::Descriptor).map_err(|errno| Error::kernel("timerfd_create", pid, errno))?;
    // SAFETY: no pointers; the descriptor returned is ours alone.
    let timer = unsafe {
        let fd = libc::timerfd_create(state.clock, libc::TFD_CLOEXEC);
        OwnedFd::from_raw_fd(
            Errno::result(fd).map_err(|errno| Error::kernel("timerfd_create", pid, errno))?,
        )
    };
    // A periodic timer that has expired says that nothing is left until its ticks are read: only the read starts it again,
    // and only if it did expire. So it has to expire here too, at once.
    let expired = state.value_ns == 0 && state.ticks != 0 && state.interval_ns != 0;
    if state.value_ns != 0 || expired {
        let value_ns = state.value_ns.max(1);
        arm(&timer, &TimerfdInfo { value_ns, ..*state })?;
    }
    // After arming, which resets the count.
    if state.ticks != 0 {
        set_ticks(&timer, state.ticks)?;
    }
    Ok(timer)
}

fn arm(timer: &OwnedFd, state: &TimerfdInfo) -> Result<()> {
    const WHAT: &str = "timerfd_settime";
    let cancel_on_set = libc::TFD_TIMER_CANCEL_ON_SET as u32;
    let (flags, value_ns) = if state.settime_flags & cancel_on_set != 0 {
        let now = crate::host::clock_ns(state.clock)?;
        let flags = libc::TFD_TIMER_ABSTIME | libc::TFD_TIMER_CANCEL_ON_SET;
        (flags, now.saturating_add(state.value_ns))
    } else {
        (0, state.value_ns)
    };
    let setting = libc::itimerspec {
        it_interval: timespec(state.interval_ns),
        it_value: timespec(value_ns),
    };
    choke::pass(Kind::Descriptor).map_err(|errno| Error::kernel(WHAT, own_pid(), errno))?;
    // SAFETY: `setting` lives through the call; the old setting is not asked for.
    let answer = unsafe {
        libc::timerfd_settime(
            timer.as_raw_fd(),
            flags,
            &raw const setting,
            std::ptr::null_mut(),
        )
    };
    Errno::result(answer)
        .map(drop)
        .map_err(|errno| Error::kernel(WHAT, own_pid(), errno))
}

/// Sets the number of expirations not yet read and wakes its readers.
///
/// # Errors
/// [`Error::Kernel`]: `EINVAL` for 0, which the kernel refuses; `ENOTTY` without `CONFIG_CHECKPOINT_RESTORE`.
pub fn set_ticks(timer: &impl AsFd, ticks: u64) -> Result<()> {
    const WHAT: &str = "ioctl(TFD_IOC_SET_TICKS)";
    choke::pass(Kind::Descriptor).map_err(|errno| Error::kernel(WHAT, own_pid(), errno))?;
    // SAFETY: `ticks` lives through the call, which only reads it.
    let answer = unsafe {
        libc::ioctl(
            timer.as_fd().as_raw_fd(),
            TFD_IOC_SET_TICKS,
            &raw const ticks,
        )
    };
    Errno::result(answer)
        .map(drop)
        .map_err(|errno| Error::kernel(WHAT, own_pid(), errno))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::procfs;

    fn state_of(timer: &OwnedFd) -> TimerfdInfo {
        procfs::descriptor(own_pid(), timer.as_raw_fd() as u32)
            .expect("own descriptor")
            .info
            .timerfd
            .expect("a timerfd")
    }

    #[test]
    fn a_timer_keeps_value_interval_and_ticks() {
        let wanted = TimerfdInfo {
            clock: libc::CLOCK_MONOTONIC,
            ticks: 7,
            settime_flags: 0,
            value_ns: 50 * NANOSECONDS_PER_SECOND,
            interval_ns: 3_000_000_001,
        };
        let timer = create(&wanted).expect("create");
        let got = state_of(&timer);
        assert_eq!(
            (got.clock, got.ticks, got.interval_ns),
            (wanted.clock, wanted.ticks, wanted.interval_ns)
        );
        assert!(got.value_ns <= wanted.value_ns && got.value_ns > 40 * NANOSECONDS_PER_SECOND);
    }

    #[test]
    fn a_periodic_timer_that_nobody_read_goes_on_when_it_is_read() {
        let timer = create(&TimerfdInfo {
            clock: libc::CLOCK_MONOTONIC,
            ticks: 3,
            interval_ns: 1_000_000,
            ..TimerfdInfo::default()
        })
        .expect("create");
        let mut ticks = [0; 8];
        assert_eq!(nix::unistd::read(&timer, &mut ticks), Ok(8));
        assert!(u64::from_ne_bytes(ticks) >= 3);
        // Would block for ever if nothing had armed it.
        let mut polled = [nix::poll::PollFd::new(
            timer.as_fd(),
            nix::poll::PollFlags::POLLIN,
        )];
        assert_eq!(nix::poll::poll(&mut polled, 10_000u16), Ok(1));
    }

    #[test]
    fn a_disarmed_timer_may_hold_ticks() {
        let wanted = TimerfdInfo {
            clock: libc::CLOCK_REALTIME,
            ticks: 2,
            ..TimerfdInfo::default()
        };
        assert_eq!(state_of(&create(&wanted).expect("create")), wanted);
    }

    #[test]
    fn cancel_on_set_survives() {
        let wanted = TimerfdInfo {
            clock: libc::CLOCK_REALTIME,
            settime_flags: (libc::TFD_TIMER_ABSTIME | libc::TFD_TIMER_CANCEL_ON_SET) as u32,
            value_ns: 50 * NANOSECONDS_PER_SECOND,
            ..TimerfdInfo::default()
        };
        let got = state_of(&create(&wanted).expect("create"));
        assert_eq!(got.settime_flags, wanted.settime_flags);
        assert!(got.value_ns <= wanted.value_ns);
    }
}
