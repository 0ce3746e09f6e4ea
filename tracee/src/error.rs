//! What can go wrong with a live process: one enum for the crate.
//!
//! Errors carry fields, never prepared sentences, and their `Display` never repeats a source. A process that has died is
//! always [`Error::Gone`], whichever call noticed it.

use nix::errno::Errno;

/// A failure to look at, hold or change a process.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The process or thread does not exist any more.
    #[error("process or thread {pid} is gone")]
    Gone {
        /// Process or thread id.
        pid: i32,
    },
    /// The process or thread has ended but nobody has waited for it yet.
    #[error("process or thread {pid} has ended and is a zombie")]
    Zombie {
        /// Process or thread id.
        pid: i32,
    },
    /// Somebody else already traces the thread (a debugger, strace, another pageferry).
    #[error("thread {tid} is already traced by thread {tracer}")]
    AlreadyTraced {
        /// Thread id.
        tid: i32,
        /// Thread id of the other tracer as `/proc` tells it.
        tracer: i32,
    },
    /// The pid a process is to get is in use.
    #[error("pid {pid} is taken by {holder}")]
    PidTaken {
        /// The pid.
        pid: i32,
        /// Name of the process or thread that has it.
        holder: String,
    },
    /// A system call failed.
    #[error("{what} on {pid}: {errno}")]
    Kernel {
        /// The call, as in `ptrace(SEIZE)`.
        what: &'static str,
        /// The process or thread it was about.
        pid: i32,
        /// What the kernel answered.
        errno: Errno,
    },
    /// A file could not be used.
    #[error("{what} {path}: {errno}")]
    Path {
        /// The operation, as in `open`.
        what: &'static str,
        /// The file.
        path: String,
        /// What the kernel answered.
        errno: Errno,
    },
    /// Text from `/proc` that cannot be understood.
    #[error("{path}: cannot understand {what}")]
    Malformed {
        /// The file.
        path: String,
        /// The part that made no sense.
        what: &'static str,
    },
    /// A page that cannot be had, neither by `process_vm_readv` nor through `/proc/<pid>/mem`.
    #[error("memory of {pid} at {address:#x} cannot be read or written")]
    Unreadable {
        /// Process id.
        pid: i32,
        /// First address that failed.
        address: u64,
    },
    /// A thread did not stop within the freeze budget; everything has been thawed again.
    #[error(
        "thread {tid} did not stop in time (state {state}, system call {syscall}, waiting in {wchan})"
    )]
    NotFrozen {
        /// Thread id.
        tid: i32,
        /// Number of the system call it is in, or `running`.
        syscall: String,
        /// Kernel function it sleeps in, `0` when unknown.
        wchan: String,
        /// Scheduler state letter from `/proc`.
        state: char,
    },
    /// A thread is in a state in which the asked operation has no meaning.
    #[error("thread {tid} is not in a state for {what}")]
    WrongState {
        /// Thread id.
        tid: i32,
        /// The operation.
        what: &'static str,
    },
    /// No mapping of the process holds an instruction the injection needs.
    #[error("process {pid} maps no {what} instruction")]
    NoInstruction {
        /// Process id.
        pid: i32,
        /// The instruction.
        what: &'static str,
    },
    /// An injected system call answered with an error where it must not.
    #[error("{what} inside {tid}: {errno}")]
    Injected {
        /// The call.
        what: &'static str,
        /// Thread that executed it.
        tid: i32,
        /// What it answered.
        errno: Errno,
    },
    /// The agent inside a thread did not answer in time.
    #[error("the agent in thread {tid} does not answer ({what})")]
    Silent {
        /// Thread id.
        tid: i32,
        /// What was being waited for.
        what: &'static str,
    },
    /// A husk ended otherwise than it was told to.
    #[error("process {pid} ended with the wait status {found:#x}, not {wanted:#x}")]
    WrongEnd {
        /// Process id.
        pid: i32,
        /// Wait status it was to have.
        wanted: i32,
        /// The one it has.
        found: i32,
    },
    /// More work than a limit allows.
    #[error("{what}: {asked} is more than {limit}")]
    TooMuch {
        /// What was asked for.
        what: &'static str,
        /// How much of it.
        asked: usize,
        /// The limit.
        limit: usize,
    },
    /// The kernel or the processor lacks something.
    #[error("not supported by this host: {what}")]
    Unsupported {
        /// The missing thing.
        what: &'static str,
    },
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The error of a call about `pid`; `ESRCH` becomes [`Error::Gone`].
    pub fn kernel(what: &'static str, pid: i32, errno: Errno) -> Self {
        match errno {
            Errno::ESRCH => Self::Gone { pid },
            errno => Self::Kernel { what, pid, errno },
        }
    }

    /// The error of a call on a file.
    pub fn path(what: &'static str, path: impl Into<String>, errno: Errno) -> Self {
        Self::Path {
            what,
            path: path.into(),
            errno,
        }
    }

    /// Whether the process or thread has ended.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. } | Self::Zombie { .. })
    }
}
