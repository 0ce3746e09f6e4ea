//! What can go wrong on the source side: one enum for the crate.

use nix::errno::Errno;

use crate::survey::Refusal;

/// A failure to survey, capture or serve a process.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A call on the process failed.
    #[error(transparent)]
    Process(#[from] pageferry_tracee::Error),
    /// What the survey accepted was different in the freeze: these objects cannot be carried, each to be told. The
    /// process is to be thawed.
    #[error("{} object(s) that cannot be carried were found in the freeze", .0.len())]
    Refused(Vec<Refusal>),
    /// An image is damaged or cannot be read.
    #[error(transparent)]
    Image(#[from] pageferry_image::store::Error),
    /// A file of the process could not be examined.
    #[error("cannot examine {path}")]
    File {
        /// Its path.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The process could not answer a question put to it from inside.
    #[error("{what} inside thread {tid}: {errno}")]
    Asked {
        /// The call.
        what: &'static str,
        /// Who was asked.
        tid: i32,
        /// The answer.
        errno: Errno,
    },
    /// The process changed while it was held.
    #[error("{what} of process {pid} changed while it was frozen")]
    Changed {
        /// The process.
        pid: i32,
        /// What changed.
        what: &'static str,
    },
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
