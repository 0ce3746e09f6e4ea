//! Signals: actions, pending queues, alternate stacks.

#![allow(
    missing_docs,
    reason = "generated fields are documented in image/proto/signals.proto"
)]

use super::{Invalid, ascending, at_most, ensure, limits};

include!("generated/pageferry.signals.rs");

const SS_ONSTACK: i32 = 1;
const SS_DISABLE: i32 = 2;
const SS_AUTODISARM: i32 = i32::MIN;
/// Bytes of `siginfo_t`.
const SIGINFO_LEN: usize = 128;
const SIGKILL: u32 = 9;
const SIGSTOP: u32 = 19;

impl Action {
    /// # Errors
    /// The broken rule.
    pub fn validate(&self) -> Result<(), Invalid> {
        let object = || format!("action of signal {}", self.signo);
        ensure(
            (1..=limits::SIGNAL).contains(&self.signo),
            object,
            "is of no signal",
        )?;
        ensure(
            !matches!(self.signo, SIGKILL | SIGSTOP),
            object,
            "cannot be set",
        )
    }

    /// Validates a whole table.
    ///
    /// # Errors
    /// The broken rule.
    pub fn validate_all(actions: &[Self]) -> Result<(), Invalid> {
        actions.iter().try_for_each(Self::validate)?;
        ascending(actions.iter().map(|action| action.signo), "signal actions")
    }
}

impl Pending {
    /// # Errors
    /// The broken rule.
    pub fn validate(&self) -> Result<(), Invalid> {
        let object = || "pending signal".to_owned();
        ensure(
            self.siginfo.len() == SIGINFO_LEN,
            object,
            "has no siginfo of 128 bytes",
        )?;
        let mut number = [0; 4];
        number.copy_from_slice(&self.siginfo[..4]);
        ensure(
            (1..=limits::SIGNAL).contains(&u32::from_le_bytes(number)),
            object,
            "is no signal",
        )
    }

    /// Validates a whole queue of `object`.
    ///
    /// # Errors
    /// The broken rule.
    pub fn validate_all(queue: &[Self], object: &str) -> Result<(), Invalid> {
        at_most(queue.len(), limits::PENDING, || {
            format!("signal queue of {object}")
        })?;
        queue.iter().try_for_each(Self::validate)
    }
}

impl AltStack {
    /// # Errors
    /// The broken rule.
    pub fn validate(&self) -> Result<(), Invalid> {
        let object = || "alternate stack".to_owned();
        ensure(
            self.flags & !(SS_ONSTACK | SS_DISABLE | SS_AUTODISARM) == 0,
            object,
            "has unknown flags",
        )?;
        let is_inside = self
            .sp
            .checked_add(self.size)
            .is_some_and(|end| end <= limits::ADDRESS_END);
        ensure(is_inside, object, "leaves the address space")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_are_of_signals_that_have_one() {
        let action = |signo| Action {
            signo,
            handler: 1,
            ..Action::default()
        };
        assert!(Action::validate_all(&[action(1), action(64)]).is_ok());
        for bad in [[1, 1], [2, 1], [0, 1], [1, 65], [8, 9], [18, 19]] {
            assert!(Action::validate_all(&bad.map(action)).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn pending_signals_are_signals() {
        let mut siginfo = vec![0; 128];
        assert!(
            Pending {
                siginfo: siginfo.clone()
            }
            .validate()
            .is_err()
        );
        siginfo[0] = 10;
        assert!(
            Pending {
                siginfo: siginfo.clone()
            }
            .validate()
            .is_ok()
        );
        siginfo.pop();
        assert!(Pending { siginfo }.validate().is_err());
    }

    #[test]
    fn alternate_stacks_lie_in_the_address_space() {
        assert!(
            AltStack {
                sp: 0x1000,
                flags: SS_AUTODISARM,
                size: 8192
            }
            .validate()
            .is_ok()
        );
        assert!(
            AltStack {
                sp: u64::MAX,
                flags: 0,
                size: 8192
            }
            .validate()
            .is_err()
        );
        assert!(
            AltStack {
                sp: 0x1000,
                flags: 4,
                size: 8192
            }
            .validate()
            .is_err()
        );
    }
}
