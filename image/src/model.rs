//! What is carried, one module per kind of kernel object. The types are generated from `image/proto`; each module adds
//! the rules ([`Invalid`]) that a model from a peer or a file must meet before anything is built from it.

use std::fmt;

pub mod files;
pub mod memory;
pub mod signals;
pub mod sockets;
pub mod task;
pub mod timers;

/// Why a model from a peer or a file is refused: the object and the rule it breaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invalid {
    /// The object, as an operator would name it: `thread 12`, `mapping 7f00-7f01`, `fd 9`.
    pub object: String,
    /// The broken rule, a clause: `is over its limit of 4096`.
    pub rule: String,
}

impl Invalid {
    /// `object` breaks `rule`.
    pub fn new(object: impl Into<String>, rule: impl Into<String>) -> Self {
        Self { object: object.into(), rule: rule.into() }
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.object, self.rule)
    }
}

impl std::error::Error for Invalid {}
