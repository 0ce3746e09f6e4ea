//! Interval timers and POSIX timers.

#![allow(
    missing_docs,
    reason = "generated fields are documented in image/proto/timers.proto"
)]

use super::{Invalid, ascending, at_most, ensure, limits};

include!("generated/pageferry.timers.rs");

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
}
