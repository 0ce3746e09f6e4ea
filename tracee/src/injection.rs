//! Injection.

use std::ops::Range;

use nix::errno::Errno;

use crate::registers::Registers;
use crate::{Result, Tracee};

/// The place of one call in a batch; later calls may use its result as an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(pub(crate) usize);

/// An argument of an injected call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arg {
    /// A plain value or an address inside the traced process.
    Value(u64),
    /// What an earlier call of the same batch returned.
    Result(Slot),
}

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Self::Value(value)
    }
}

impl From<usize> for Arg {
    fn from(value: usize) -> Self {
        Self::Value(value as u64)
    }
}

impl From<i32> for Arg {
    /// Sign-extended, as the C calling convention would.
    fn from(value: i32) -> Self {
        Self::Value(i64::from(value) as u64)
    }
}

impl From<i64> for Arg {
    fn from(value: i64) -> Self {
        Self::Value(value as u64)
    }
}

impl From<u32> for Arg {
    fn from(value: u32) -> Self {
        Self::Value(u64::from(value))
    }
}

impl From<Slot> for Arg {
    fn from(slot: Slot) -> Self {
        Self::Result(slot)
    }
}

/// One call of a [`Batch`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) number: i64,
    pub(crate) arguments: [Arg; 6],
}

/// System calls for one thread to make, in order. Every one of them is made, whatever the others answer.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    calls: Vec<Call>,
}

impl Batch {
    /// Calls that fit in one batch.
    pub const LIMIT: usize = 256;

    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the system call `number` (`libc::SYS_*`) and says where its result will be.
    ///
    /// Calls that do not return, or return twice, must not be injected: `clone`, `fork`, `vfork`, `execve`, `exit`,
    /// `rt_sigreturn`.
    ///
    /// # Panics
    /// With more than six arguments, or with a result that is not of an earlier call of this batch.
    pub fn call(&mut self, number: i64, arguments: &[Arg]) -> Slot {
        assert!(arguments.len() <= 6, "a system call has at most six arguments");
        let slot = Slot(self.calls.len());
        let mut all = [Arg::Value(0); 6];
        for (place, argument) in all.iter_mut().zip(arguments) {
            if let Arg::Result(of) = argument {
                assert!(of.0 < slot.0, "an argument names a call that comes later");
            }
            *place = *argument;
        }
        self.calls.push(Call { number, arguments: all });
        slot
    }

    /// Number of calls.
    pub fn len(&self) -> usize {
        self.calls.len()
    }

    /// Whether there is no call in it.
    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }
}

/// What a thread of a husk becomes when the agent leaves it.
#[derive(Clone, Debug)]
pub struct ThreadStart {
    /// Which thread.
    pub tid: i32,
    /// Its registers, fixed up for running from here (see [`Tracee::portable_registers`]).
    pub registers: Registers,
    /// Its extended state as [`Tracee::xsave`] gives it; empty leaves it as it is.
    pub xsave: Vec<u8>,
    /// Its blocked signals.
    pub sigmask: u64,
}

/// A planted agent: a guard over a frozen process.
#[derive(Debug)]
pub struct Injection<'a> {
    tracee: &'a mut Tracee,
}

impl Injection<'_> {
    /// Runs `batch` in `tid`.
    pub fn run(&mut self, tid: i32, batch: &Batch) -> Result<Vec<std::result::Result<u64, Errno>>> {
        unimplemented!("{tid} {batch:?} {:?}", self.tracee)
    }
    /// Runs batches in parallel.
    pub fn run_all(&mut self, work: &[(i32, Batch)]) -> Result<Vec<Vec<std::result::Result<u64, Errno>>>> {
        unimplemented!("{work:?}")
    }
    /// Scratch memory of `tid`, seen by it at [`Injection::scratch_address`].
    pub fn scratch(&mut self, tid: i32) -> &mut [u8] {
        unimplemented!("{tid}")
    }
    /// Where `tid` sees its scratch memory.
    pub fn scratch_address(&self, tid: i32) -> u64 {
        unimplemented!("{tid}")
    }
    /// Where the agent lies in the process.
    pub fn mapping(&self) -> Range<u64> {
        unimplemented!()
    }
    /// Makes a thread of a husk.
    pub fn spawn_thread(&mut self, tid: i32) -> Result<()> {
        unimplemented!("{tid}")
    }
    /// Puts everything back.
    pub fn cure(self) -> Result<()> {
        unimplemented!()
    }
    /// Husk only.
    pub fn finish(self, starts: &[ThreadStart]) -> Result<()> {
        unimplemented!("{starts:?}")
    }
}
