//! Interval timers and POSIX timers.

#![allow(
    missing_docs,
    reason = "generated fields are documented in image/proto/timers.proto"
)]

use super::{Invalid, ascending, at_most, ensure, limits};

include!("generated/pageferry.timers.rs");

// Numbers of the kernel's clocks, include/uapi/linux/time.h.
const CLOCK_REALTIME: i32 = 0;
const CLOCK_MONOTONIC: i32 = 1;
const CLOCK_PROCESS_CPUTIME_ID: i32 = 2;
const CLOCK_BOOTTIME: i32 = 7;
const CLOCK_REALTIME_ALARM: i32 = 8;
const CLOCK_BOOTTIME_ALARM: i32 = 9;
const CLOCK_TAI: i32 = 11;

/// How far the clocks went between two moments, nanoseconds.
///
/// The model tells what is left of every timer as of one moment, that of the tree's clocks. Timers are read before it and armed
/// after it, by milliseconds on a busy host, and lose what has passed each time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Passed {
    /// CLOCK_MONOTONIC.
    pub monotonic_ns: u64,
    /// CLOCK_BOOTTIME.
    pub boottime_ns: u64,
    /// CLOCK_REALTIME.
    pub realtime_ns: u64,
}

impl Passed {
    /// From the moment of `then` to that of `now`, each CLOCK_MONOTONIC, CLOCK_BOOTTIME and CLOCK_REALTIME in nanoseconds. A clock
    /// that was set back has not gone.
    #[must_use]
    pub fn between(then: [u64; 3], now: [u64; 3]) -> Self {
        let [monotonic_ns, boottime_ns, realtime_ns] =
            std::array::from_fn(|clock| now[clock].saturating_sub(then[clock]));
        Self {
            monotonic_ns,
            boottime_ns,
            realtime_ns,
        }
    }

    /// What is left of `value_ns` on `clock`: at least 1 ns, so that an expired timer fires; 0 stays disarmed. Clocks of CPU
    /// time stand still, as the process does not run.
    #[must_use]
    pub fn left_ns(self, clock: i32, value_ns: u64) -> u64 {
        let passed = match clock {
            CLOCK_BOOTTIME | CLOCK_BOOTTIME_ALARM => self.boottime_ns,
            CLOCK_REALTIME | CLOCK_REALTIME_ALARM | CLOCK_TAI => self.realtime_ns,
            CLOCK_MONOTONIC => self.monotonic_ns,
            _ => 0,
        };
        if value_ns == 0 {
            0
        } else {
            value_ns.saturating_sub(passed).max(1)
        }
    }
}

impl Itimer {
    /// The clock it counts: CLOCK_MONOTONIC for `ITIMER_REAL`, CPU time for the others.
    #[must_use]
    pub fn clock(&self) -> i32 {
        if self.which == 0 {
            CLOCK_MONOTONIC
        } else {
            CLOCK_PROCESS_CPUTIME_ID
        }
    }
}

const SIGEV_SIGNAL: u32 = 0;
const SIGEV_NONE: u32 = 1;
const SIGEV_THREAD_ID: u32 = 4;

impl Itimer {
    /// Validates all of a process.
    ///
    /// # Errors
    /// The broken rule.
    pub fn validate_all(timers: &[Self]) -> Result<(), Invalid> {
        ascending(timers.iter().map(|timer| timer.which), "interval timers")?;
        for timer in timers {
            ensure(
                timer.which <= 2,
                || format!("interval timer {}", timer.which),
                "does not exist",
            )?;
        }
        Ok(())
    }
}

impl Posix {
    /// # Errors
    /// The broken rule.
    pub fn validate(&self) -> Result<(), Invalid> {
        let object = || format!("POSIX timer {}", self.id);
        ensure(
            i32::try_from(self.id).is_ok(),
            object,
            "has an id out of range",
        )?;
        let is_told = match self.notify {
            SIGEV_NONE => true,
            SIGEV_SIGNAL => (1..=limits::SIGNAL).contains(&self.signo),
            SIGEV_THREAD_ID => (1..=limits::SIGNAL).contains(&self.signo) && self.tid > 0,
            _ => false,
        };
        ensure(is_told, object, "tells nobody")
    }

    /// Validates all of a process.
    ///
    /// # Errors
    /// The broken rule.
    pub fn validate_all(timers: &[Self]) -> Result<(), Invalid> {
        at_most(timers.len(), limits::POSIX_TIMERS, || {
            "list of POSIX timers".into()
        })?;
        ascending(timers.iter().map(|timer| timer.id), "POSIX timers")?;
        timers.iter().try_for_each(Self::validate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interval_timers_exist_once() {
        let timer = |which| Itimer {
            which,
            value_us: 1,
            interval_us: 0,
        };
        assert!(Itimer::validate_all(&[timer(0), timer(2)]).is_ok());
        assert!(Itimer::validate_all(&[timer(0), timer(0)]).is_err());
        assert!(Itimer::validate_all(&[timer(3)]).is_err());
    }

    #[test]
    fn posix_timers_tell_somebody() {
        let timer = Posix {
            id: 1,
            notify: SIGEV_SIGNAL,
            signo: 14,
            ..Posix::default()
        };
        assert!(timer.validate().is_ok());
        assert!(Posix { signo: 0, ..timer }.validate().is_err());
        assert!(
            Posix {
                signo: 0,
                notify: SIGEV_NONE,
                ..timer
            }
            .validate()
            .is_ok()
        );
        assert!(
            Posix {
                notify: SIGEV_THREAD_ID,
                ..timer
            }
            .validate()
            .is_err()
        );
        assert!(
            Posix {
                notify: SIGEV_THREAD_ID,
                tid: 5,
                ..timer
            }
            .validate()
            .is_ok()
        );
        assert!(Posix { notify: 2, ..timer }.validate().is_err());
        assert!(
            Posix {
                id: u32::MAX,
                ..timer
            }
            .validate()
            .is_err()
        );
        assert!(Posix::validate_all(&[timer, timer]).is_err());
    }

    #[test]
    fn timers_lose_what_has_passed_on_their_own_clock() {
        let passed = Passed::between([5, 6, 7], [15, 26, 37]);
        assert_eq!(
            Passed::between([7; 3], [6; 3]),
            Passed::default(),
            "set back"
        );
        let left = |clock| passed.left_ns(clock, 100);
        assert_eq!(left(CLOCK_MONOTONIC), 90);
        assert_eq!(left(CLOCK_BOOTTIME), 80);
        assert_eq!(left(CLOCK_TAI), 70);
        assert_eq!(left(CLOCK_PROCESS_CPUTIME_ID), 100);
        // Expired in the meantime: fires at once. Disarmed: stays so.
        assert_eq!(passed.left_ns(CLOCK_REALTIME, 30), 1);
        assert_eq!(passed.left_ns(CLOCK_REALTIME, 0), 0);
    }
}
