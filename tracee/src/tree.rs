//! One process, seized.

use std::marker::PhantomData;
use std::time::Duration;

use crate::injection::Injection;
use crate::registers::Registers;
use crate::Result;

/// How to seize.
#[derive(Clone, Copy, Debug, Default)]
pub struct SeizeOptions {
    /// Kill the process when this thread ends (`PTRACE_O_EXITKILL`). Never for a process that is still its own copy.
    pub exit_kill: bool,
    /// Hear of new threads, forks and execs (`PTRACE_O_TRACECLONE|FORK|VFORK|EXEC`), so that nothing escapes the freeze.
    pub follow: bool,
    /// Lift its seccomp filters while it is traced (`PTRACE_O_SUSPEND_SECCOMP`, needs CAP_SYS_ADMIN).
    pub suspend_seccomp: bool,
}

/// A thread's restartable sequence registration (rseq(2)), as `PTRACE_GET_RSEQ_CONFIGURATION` gives it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RseqConfiguration {
    /// Address of the thread's `struct rseq`, 0 when none is registered.
    pub address: u64,
    /// Its registered size.
    pub size: u32,
    /// The signature that must precede abort handlers.
    pub signature: u32,
    /// Flags of the registration.
    pub flags: u32,
}

/// A process with all its threads seized.
#[derive(Debug)]
pub struct Tracee {
    _bound: PhantomData<*mut ()>,
}

impl Tracee {
    /// Seizes every thread.
    pub fn seize(pid: i32, options: SeizeOptions) -> Result<Self> {
        unimplemented!("{pid} {options:?}")
    }
    /// Process id.
    pub fn pid(&self) -> i32 {
        unimplemented!()
    }
    /// Thread ids, the leader's first.
    pub fn tids(&self) -> &[i32] {
        unimplemented!()
    }
    /// Stops every thread.
    pub fn freeze(&mut self, budget: Duration, attempts: u32) -> Result<()> {
        unimplemented!("{budget:?} {attempts}")
    }
    /// Registers as they are.
    pub fn registers(&self, tid: i32) -> Result<Registers> {
        unimplemented!("{tid}")
    }
    /// Sets registers.
    pub fn set_registers(&self, tid: i32, registers: &Registers) -> Result<()> {
        unimplemented!("{tid} {registers:?}")
    }
    /// Registers to go on with on another host.
    pub fn portable_registers(&self, tid: i32) -> Result<Registers> {
        unimplemented!("{tid}")
    }
    /// Extended state.
    pub fn xsave(&self, tid: i32) -> Result<Vec<u8>> {
        unimplemented!("{tid}")
    }
    /// Sets the extended state.
    pub fn set_xsave(&self, tid: i32, xsave: &[u8]) -> Result<()> {
        unimplemented!("{tid} {xsave:?}")
    }
    /// Blocked signals.
    pub fn sigmask(&self, tid: i32) -> Result<u64> {
        unimplemented!("{tid}")
    }
    /// Sets the blocked signals.
    pub fn set_sigmask(&self, tid: i32, mask: u64) -> Result<()> {
        unimplemented!("{tid} {mask}")
    }
    /// Pending signals.
    pub fn pending(&self, tid: i32, shared: bool) -> Result<Vec<[u8; 128]>> {
        unimplemented!("{tid} {shared}")
    }
    /// Restartable sequences.
    pub fn rseq(&self, tid: i32) -> Result<RseqConfiguration> {
        unimplemented!("{tid}")
    }
    /// Robust list head and its length.
    pub fn robust_list(&self, tid: i32) -> Result<(u64, u64)> {
        unimplemented!("{tid}")
    }
    /// Plants the agent.
    pub fn plant(&mut self, at: Option<u64>) -> Result<Injection<'_>> {
        unimplemented!("{at:?}")
    }
    /// From here on our death leaves the process stopped.
    pub fn park(&mut self) -> Result<()> {
        unimplemented!()
    }
    /// Takes [`Tracee::park`] back.
    pub fn unpark(&mut self) -> Result<()> {
        unimplemented!()
    }
    /// Lets it go on.
    pub fn thaw(self) -> Result<()> {
        unimplemented!()
    }
    /// Lets it go on, perhaps keeping a hold on the leader.
    pub fn release(self, hold_leader: bool) -> Result<Option<Held>> {
        unimplemented!("{hold_leader}")
    }
    /// Takes `exit_kill` back.
    pub fn clear_exit_kill(&mut self) -> Result<()> {
        unimplemented!()
    }
    /// Kills it.
    pub fn kill(self) -> Result<()> {
        unimplemented!()
    }
}

/// How a held process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pumped {
    /// It runs, or sleeps.
    Running,
    /// It has ended with this wait status.
    Exited(i32),
}

/// A running process whose leader stays seized with EXITKILL.
#[derive(Debug)]
pub struct Held {
    _bound: PhantomData<*mut ()>,
}

impl Held {
    /// Forwards what ptrace reports.
    pub fn pump(&mut self, timeout: Duration) -> Result<Pumped> {
        unimplemented!("{timeout:?}")
    }
    /// Lets go of the leader.
    pub fn release(self) -> Result<()> {
        unimplemented!()
    }
}
