//! The phases of one crossing. The same word is the protocol's state, a log span, a JSON event and a ledger row; it must
//! never be spelled anywhere else.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a crossing stands, in order: a later phase compares greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The hosts meet and agree on a version.
    Hello,
    /// The target looks at what is about to come; nothing is touched.
    Plan,
    /// Memory is sent while the process runs. Empty in post-copy.
    Rounds,
    /// Every thread is being stopped. Downtime begins.
    Freeze,
    /// Kernel objects are read.
    Capture,
    /// The target builds the process.
    Rebuild,
    /// The process stands on the target; only the right to run is missing.
    Ready,
    /// The right to run is handed over. Downtime ends with RUNNING.
    Commit,
    /// The process runs on the target while its pages follow.
    Drain,
    /// Every page has arrived and the source copy is gone.
    Done,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Self; 10] = [
        Self::Hello,
        Self::Plan,
        Self::Rounds,
        Self::Freeze,
        Self::Capture,
        Self::Rebuild,
        Self::Ready,
        Self::Commit,
        Self::Drain,
        Self::Done,
    ];

    /// The word, as it is written everywhere.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Plan => "plan",
            Self::Rounds => "rounds",
            Self::Freeze => "freeze",
            Self::Capture => "capture",
            Self::Rebuild => "rebuild",
            Self::Ready => "ready",
            Self::Commit => "commit",
            Self::Drain => "drain",
            Self::Done => "done",
        }
    }

    /// The phase a peer names; `None` if it is none of ours.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|phase| phase.name() == name)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_there_and_back_and_keep_their_order() {
        for pair in Phase::ALL.windows(2) {
            assert!(pair[0] < pair[1]);
        }
        for phase in Phase::ALL {
            assert_eq!(Phase::from_name(phase.name()), Some(phase));
        }
        assert_eq!(Phase::from_name("Hello"), None);
    }
}
