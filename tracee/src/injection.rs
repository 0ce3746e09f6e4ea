//! System calls made by somebody else: the agent is planted in a frozen process, runs batches, and is taken out again.
//!
//! [`Injection`] is a guard. Between plant and cure the process is on loan: all its signals are blocked (none is lost), its
//! registers are the agent's. [`Injection::cure`], or dropping the guard, puts everything back bit for bit, and the same
//! happens without us: **at every point in between, the death of this thread leaves each thread of the process with
//! registers from which it finds back by itself.** The order of steps in this file is the proof of that sentence:
//!
//! 1. One thread maps the agent's memory. It makes the call through a `syscall; ret` in its own program text with its stack
//!    pointer at a signal frame, written below its red zone, that holds everything it was; the `ret` falls into the
//!    program's own rt_sigreturn. (A program without such instructions is without this safety for these microseconds.)
//! 2. The same memory is mapped here through `/proc/<pid>/map_files`: no descriptor is opened in the process, no byte of its
//!    text changed. Every slot is given its frame, every slot's word is put on our robust futex list.
//! 3. Each thread's registers are pointed at the agent; only then are its signals blocked. The agent heals its thread as soon
//!    as the word says that we are gone.
//! 4. Cure goes backwards: first the signal mask, then the registers. The memory is unmapped as it was mapped.
//!
//! After our death nobody does that: the memory stays until the next freeze (see [`crate::leftover`]).
//!
//! A process that is in the memory of another (`CLONE_VM`) has no stack that is known to be its own. Steps 1 and 2 and the unmapping
//! are then done by that other one, its *host*, in whose memory it is the same; and the host is at home again after each call.
//!
//! Nothing here ever traps or single-steps: the kernel resets a blocked or ignored SIGTRAP for that.

mod birth;

use std::fs::OpenOptions;
use std::ops::Range;
use std::time::Duration;

use nix::errno::Errno;

use crate::agent::{self, CloneArguments, Shared};
use crate::choke::{self, Kind};
use crate::interrupted::{self, NO_CALL};
use crate::leftover;
use crate::lock;
use crate::memory::RemoteMemory;
use crate::procfs::{self, Vma};
use crate::ptrace::{self, Report, Stop};
use crate::registers::{Frame, Registers};
use crate::tree::{CodePlaces, Rseq, SeizeOptions, Thread, below_red_zone, stack_start, twice};
use crate::{Error, Result, Tracee};

pub use self::birth::{Birth, End};

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
        assert!(
            arguments.len() <= 6,
            "a system call has at most six arguments"
        );
        let slot = Slot(self.calls.len());
        let mut all = [Arg::Value(0); 6];
        for (place, argument) in all.iter_mut().zip(arguments) {
            if let Arg::Result(of) = argument {
                assert!(of.0 < slot.0, "an argument names a call that comes later");
            }
            *place = *argument;
        }
        self.calls.push(Call {
            number,
            arguments: all,
        });
        slot
    }

    /// Number of calls.
    pub fn len(&self) -> usize {
        self.calls.len()
    }

    pub(crate) fn calls(&self) -> &[Call] {
        &self.calls
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

/// Linux user code on x86-64; anything else is 32-bit code, whose system calls are others.
const USER_CODE_64: u64 = 0x33;
/// Signals cannot be blocked more than this; the kernel leaves SIGKILL and SIGSTOP out by itself.
const ALL_SIGNALS: u64 = u64::MAX;
/// Bytes of a husk's stack below its red zone in which a gate's frame has room and, below that, the arguments of a call. The
/// kernel gives a new program 128 KiB.
const BELOW_GATE_LEN: u64 = 32 << 10;
const _: () = assert!(agent::FRAME_LEN as u64 + CloneArguments::MEMORY_LEN <= BELOW_GATE_LEN);
/// Bytes below a gate's frame that hold a lock's record, so many that it is aligned.
const RECORD_ROOM: u64 = 64;
/// How long a husk may take to die.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the agent may work at one batch before it is given up.
const BATCH_SECONDS: u64 = 60;
/// How often a silent agent is looked after.
const LOOK_NANOSECONDS: i64 = 10_000_000;

/// A thread on loan: what it was.
#[derive(Debug)]
struct Home {
    tid: i32,
    registers: Registers,
    sigmask: u64,
    rseq: Rseq,
    /// What it goes on with if nobody puts its registers back.
    healed: Registers,
    xsave: Vec<u8>,
    /// Its registers or signal mask may differ from what they were.
    away: bool,
}

/// A thread that makes single calls without the agent, and what lies on its stack for that.
#[derive(Debug)]
struct Gate {
    /// Index of the thread.
    index: usize,
    /// Start of the signal frame on its stack and the bytes that were there; without one, nothing brings it home but us.
    frame: Option<(u64, Vec<u8>)>,
}

/// A planted agent: a guard over a frozen process. See the module's description.
#[derive(Debug)]
pub struct Injection<'a> {
    tracee: &'a mut Tracee,
    memory: RemoteMemory,
    code: CodePlaces,
    /// One for each thread, in the order of their slots.
    homes: Vec<Home>,
    gate: Option<Gate>,
    /// Who maps and unmaps instead of a thread of its own; frozen too.
    host: Option<&'a mut Tracee>,
    /// Length of the mapping, bytes.
    len: usize,
    /// The agent's mapping in the process.
    address: Option<u64>,
    shared: Option<Shared>,
    narrowed: bool,
    /// A SIGSTOP is to be in the queue of the process.
    parked: bool,
    cured: bool,
}

impl<'a> Injection<'a> {
    pub(crate) fn plant(tracee: &'a mut Tracee, at: Option<u64>, room: usize) -> Result<Self> {
        Self::plant_by(tracee, None, at, room)
    }

    /// As [`Injection::plant`], where `host` is a process in the same memory whose threads have stacks of their own.
    pub(crate) fn plant_by(
        tracee: &'a mut Tracee,
        host: Option<&'a mut Tracee>,
        at: Option<u64>,
        room: usize,
    ) -> Result<Self> {
        let mut injection = Self::new(tracee, room)?;
        injection.host = host;
        // A failure drops the guard, which undoes what was done.
        injection.leave_home(at)?;
        Ok(injection)
    }

    /// Unmaps agents that killed tracers left (`crate::leftover`), by calls through the gate alone. No thread may need them.
    pub(crate) fn unmap_leftovers(tracee: &'a mut Tracee, agents: &[Range<u64>]) -> Result<()> {
        // Without room its own length is no agent's, so that it takes none of these for its own when something fails.
        let mut injection = Self::new(tracee, 0)?;
        injection.open_first_gate()?;
        for agent in agents {
            injection.unmap(agent.start, agent.end - agent.start)?;
        }
        injection.cure()
    }

    /// Has a parked process make the call `fcntl(fd, F_SETLK, record)` for each of `fds`, through the gate alone. Each is one call, so
    /// that nothing is half done between two of them, and the SIGSTOP of the parking, which the way to it takes off the queue, is in
    /// the queue again before the kernel does what it is asked. One that is in the memory of another, its `host`, which is parked too,
    /// has the record on the stack of that one, which makes no call.
    pub(crate) fn set_locks(
        tracee: &'a mut Tracee,
        host: Option<&'a mut Tracee>,
        fds: &[u32],
        record: &[u8; lock::RECORD_LEN],
    ) -> Result<()> {
        if tracee.host.is_some() && host.is_none() {
            return Err(Error::WrongState {
                tid: tracee.pid(),
                what: "giving up locks without the one in whose memory it is",
            });
        }
        let mut injection = Self::new(tracee, 0)?;
        injection.parked = true;
        injection.open_first_gate()?;
        let mut lender = None;
        if let Some(host) = host {
            lender.insert(Self::new(host, 0)?).open_first_gate()?;
        }
        let below = lender.as_ref().unwrap_or(&injection).below_gate();
        let mut before = [0; lock::RECORD_LEN];
        injection.memory.read(below, &mut before)?;
        let set = injection
            .memory
            .write(below, record)
            .and_then(|()| injection.set_each(fds, below));
        let put_back = twice(|| injection.memory.write(below, &before));
        let cured = injection.cure();
        let returned = lender.map_or(Ok(()), Self::cure);
        set.and(put_back).and(cured).and(returned)
    }

    /// Where a lock's record goes: below the gate's frame, so that nothing that is in use is there, and nothing of it is left.
    fn below_gate(&self) -> u64 {
        match self.gate.as_ref().and_then(|gate| gate.frame.as_ref()) {
            Some((frame, _)) => frame - RECORD_ROOM,
            None => below_red_zone(self.homes[0].registers.rsp, RECORD_ROOM),
        }
    }

    fn set_each(&mut self, fds: &[u32], record: u64) -> Result<()> {
        let tid = self.tracee.pid();
        for &fd in fds {
            let arguments = [fd.into(), libc::F_SETLK as u64, record, 0, 0, 0];
            let set = self.call("fcntl(F_SETLK)", libc::SYS_fcntl, arguments)?;
            set.map_err(|errno| Error::Injected {
                what: "fcntl(F_SETLK)",
                tid,
                errno,
            })?;
        }
        Ok(())
    }

    fn new(tracee: &'a mut Tracee, room: usize) -> Result<Self> {
        let pid = tracee.pid();
        if !tracee.is_frozen() || tracee.threads.iter().any(|thread| !thread.is_held()) {
            return Err(Error::WrongState {
                tid: pid,
                what: "planting",
            });
        }
        let memory = RemoteMemory::open(pid)?;
        let code = match tracee.code.filter(|code| code.still_there(&memory)) {
            Some(code) => code,
            None => tracee.find_code(None)?.ok_or(Error::NoInstruction {
                pid,
                what: "syscall",
            })?,
        };
        tracee.code = Some(code);
        Ok(Self {
            memory,
            code,
            homes: Vec::with_capacity(room),
            gate: None,
            host: None,
            len: agent::byte_len(room),
            address: None,
            shared: None,
            narrowed: false,
            parked: false,
            cured: false,
            tracee,
        })
    }

    /// Everything before the first call in the process. Returns its mappings.
    fn open_first_gate(&mut self) -> Result<Vec<Vma>> {
        for index in 0..self.tracee.threads.len() {
            let home = self.remember(index)?;
            self.homes.push(home);
        }
        if self.tracee.options.follow {
            // The calls we inject are ours to know about.
            self.narrowed = true;
            self.tracee.set_options(SeizeOptions {
                follow: false,
                ..self.tracee.options
            })?;
        }
        let maps = procfs::maps(self.tracee.pid())?;
        if self.host.is_none() {
            self.gate = Some(self.open_gate(&maps)?);
        }
        Ok(maps)
    }

    fn leave_home(&mut self, at: Option<u64>) -> Result<()> {
        let maps = self.open_first_gate()?;
        self.map_agent(at, &maps)?;
        for index in 0..self.homes.len() {
            self.enter_agent(index)?;
        }
        self.close_gate()
    }

    fn remember(&self, index: usize) -> Result<Home> {
        let tid = self.tracee.threads[index].tid;
        let registers = ptrace::registers(tid)?;
        if registers.cs != USER_CODE_64 {
            return Err(Error::Unsupported {
                what: "threads that run 32-bit code",
            });
        }
        let sigmask = ptrace::sigmask(tid)?;
        let rseq = Rseq::of(tid, &self.memory)?;
        let healed = match self.tracee.unleaked(index, sigmask, false)? {
            Some(registers) => registers,
            None => interrupted::without_kernel(&registers),
        };
        Ok(Home {
            tid,
            registers,
            sigmask,
            rseq,
            healed: rseq.aborted(&self.memory, healed),
            xsave: ptrace::xsave(tid)?,
            away: false,
        })
    }

    // -----------------------------------------------------------------------------------------------------------------
    // Single calls, made without the agent

    /// Chooses the thread that maps and unmaps, and writes its signal frame below its red zone. That has to be a thread whose
    /// stack is known to go on there.
    fn open_gate(&self, maps: &[Vma]) -> Result<Gate> {
        let Some((_, sigreturn)) = self.code.homing else {
            return Ok(Gate {
                index: 0,
                frame: None,
            });
        };
        let homes = self.homes.iter().enumerate();
        // In the memory of another nobody knows whose a stack is.
        for (index, home) in homes.filter(|_| self.tracee.host.is_none()) {
            let start = below_red_zone(home.registers.rsp, Frame::byte_len(&home.xsave) as u64);
            if stack_start(maps, &home.registers).is_none_or(|bottom| start < bottom) {
                continue;
            }
            let bytes = Frame {
                registers: &home.healed,
                xsave: &home.xsave,
                sigmask: home.sigmask,
                restorer: sigreturn,
            }
            .to_bytes(start);
            let mut before = vec![0; bytes.len()];
            match self
                .memory
                .read(start, &mut before)
                .and_then(|()| self.memory.write(start, &bytes))
            {
                Ok(()) => {
                    return Ok(Gate {
                        index,
                        frame: Some((start, before)),
                    });
                }
                // A guard page in the way: what was written before it is put back.
                Err(Error::Unreadable { .. }) => {
                    twice(|| match self.memory.write(start, &before) {
                        Err(Error::Unreadable { .. }) => Ok(()),
                        result => result,
                    })?
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Gate {
            index: 0,
            frame: None,
        })
    }

    /// Puts the gate's stack back. Its thread must not need the frame any more.
    fn close_gate(&mut self) -> Result<()> {
        if let Some(Gate {
            frame: Some((start, before)),
            ..
        }) = &self.gate
        {
            twice(|| self.memory.write(*start, before))?;
        }
        self.gate = None;
        Ok(())
    }

    /// Makes the gate's thread, or the host, do one system call and leaves it stopped behind it.
    fn call(
        &mut self,
        what: &'static str,
        number: i64,
        arguments: [u64; 6],
    ) -> Result<std::result::Result<u64, Errno>> {
        if let Some(host) = self.host.as_deref_mut() {
            let len = self.len;
            return Injection::through_gate(host, |gate| {
                let answer = gate.call(what, number, arguments);
                if answer.is_err() {
                    // If it was the agent that it has mapped, it knows that by the length, and takes it out again.
                    gate.len = len;
                }
                answer
            });
        }
        choke::pass(Kind::Remote).map_err(|errno| Error::kernel(what, self.tracee.pid(), errno))?;
        let Some(gate) = &self.gate else {
            return Err(Error::WrongState {
                tid: self.tracee.pid(),
                what: "a call without a gate",
            });
        };
        let index = gate.index;
        let (rip, rsp) = match (&gate.frame, self.code.homing) {
            (Some((start, _)), Some((syscall_return, _))) => {
                (syscall_return, Frame::return_slot(*start))
            }
            _ => (self.code.syscall, self.homes[index].registers.rsp),
        };
        let home = &mut self.homes[index];
        let tid = home.tid;
        home.away = true;
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        let registers = Registers {
            rip,
            rsp,
            rax: number as u64,
            orig_rax: NO_CALL,
            rdi,
            rsi,
            rdx,
            r10,
            r8,
            r9,
            ..home.registers
        };
        ptrace::set_registers(tid, &registers)?;
        ptrace::set_sigmask(tid, ALL_SIGNALS)?;
        for stop in ["entry", "exit"] {
            if self.parked && stop == "exit" {
                self.tracee.send(libc::SIGSTOP)?;
            }
            loop {
                ptrace::resume_to_syscall(tid)?;
                self.tracee.threads[index].stop = None;
                match self.tracee.await_stop(index)? {
                    Stop::Syscall => break,
                    // Sent by somebody just now; it is sent again when the process is itself again.
                    Stop::Signal(libc::SIGSTOP) => self.tracee.stop_again = true,
                    _ => {}
                }
            }
        }
        Ok(agent::answer(ptrace::registers(tid)?.rax))
    }

    // -----------------------------------------------------------------------------------------------------------------
    // Plant

    fn map_agent(&mut self, at: Option<u64>, maps: &[Vma]) -> Result<()> {
        let pid = self.tracee.pid();
        let tid = self.homes[self.gate.as_ref().map_or(0, |gate| gate.index)].tid;
        let mut flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let place = match at {
            Some(at) => {
                flags |= libc::MAP_FIXED_NOREPLACE;
                at
            }
            None => leftover::marked_place(maps, self.len as u64),
        };
        let mapped = self.call(
            "mmap",
            libc::SYS_mmap,
            [
                place,
                self.len as u64,
                (libc::PROT_READ | libc::PROT_EXEC) as u64,
                flags as u64,
                u64::MAX,
                0,
            ],
        )?;
        let address = mapped.map_err(|errno| Error::Injected {
            what: "mmap",
            tid,
            errno,
        })?;
        self.address = Some(address);

        let path = format!(
            "/proc/{pid}/map_files/{:x}-{:x}",
            address,
            address + self.len as u64
        );
        let file = choke::pass(Kind::Memory)
            .and_then(|()| {
                OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(&path)
                    .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
            })
            .map_err(|errno| Error::path("open", path, errno))?;
        let mut shared = Shared::new(&file, self.len, address)
            .map_err(|errno| Error::kernel("mmap", pid, errno))?;
        for (index, home) in self.homes.iter().enumerate() {
            shared.prepare(
                index,
                &home.frame_at(shared.slot_address(index) + agent::FRAME_OFFSET as u64),
            );
        }
        shared.watch(self.homes.len()).map_err(|_| Error::TooMuch {
            what: "threads in one process",
            asked: self.homes.len(),
            limit: agent::THREAD_LIMIT,
        })?;
        self.shared = Some(shared);

        // Execute first, write later: a process that may never make memory executable (MDWE) can do this.
        self.call(
            "mprotect",
            libc::SYS_mprotect,
            [
                address + agent::CODE_LEN as u64,
                (self.len - agent::CODE_LEN) as u64,
                (libc::PROT_READ | libc::PROT_WRITE) as u64,
                0,
                0,
                0,
            ],
        )?
        .map_err(|errno| Error::Injected {
            what: "mprotect",
            tid,
            errno,
        })?;
        Ok(())
    }

    fn enter_agent(&mut self, index: usize) -> Result<()> {
        let (Some(address), Some(shared)) = (self.address, &self.shared) else {
            return Ok(());
        };
        let home = &mut self.homes[index];
        home.away = true;
        let registers = Registers {
            rip: address,
            rbx: shared.slot_address(index),
            orig_rax: NO_CALL,
            ..home.registers
        };
        ptrace::set_registers(home.tid, &registers)?;
        ptrace::set_sigmask(home.tid, ALL_SIGNALS)?;
        ptrace::resume(home.tid, 0)?;
        let at = self.tracee.index(home.tid, "planting")?;
        self.tracee.threads[at].stop = None;
        Ok(())
    }

    // -----------------------------------------------------------------------------------------------------------------
    // Run

    fn slot(&self, tid: i32) -> Result<usize> {
        self.homes
            .iter()
            .position(|home| home.tid == tid)
            .ok_or(Error::WrongState {
                tid,
                what: "running a batch",
            })
    }

    fn shared(&mut self) -> &mut Shared {
        // `plant` returns an injection only after it has set this, and only `finish` and `cure`, which consume it, take it.
        self.shared.as_mut().expect("a planted agent has memory")
    }

    /// Makes `tid` do the calls of `batch`, in order, and returns what each returned.
    ///
    /// # Errors
    /// [`Error::Gone`] when the thread died, [`Error::Silent`] when a call does not return.
    pub fn run(&mut self, tid: i32, batch: &Batch) -> Result<Vec<std::result::Result<u64, Errno>>> {
        let slot = self.start(tid, batch, None)?;
        self.finish_batch(tid, slot, batch.len())
    }

    /// As [`Injection::run`] for many threads, which work at the same time. Batches for the same thread are done one after
    /// the other. Results are in the order of `work`.
    ///
    /// # Errors
    /// As [`Injection::run`].
    pub fn run_all(
        &mut self,
        work: &[(i32, Batch)],
    ) -> Result<Vec<Vec<std::result::Result<u64, Errno>>>> {
        let mut results = vec![Vec::new(); work.len()];
        let mut left: Vec<usize> = (0..work.len()).collect();
        while !left.is_empty() {
            let mut started: Vec<(usize, usize)> = Vec::new();
            let mut busy = std::collections::HashSet::new();
            let mut later = Vec::new();
            let mut failed = None;
            for item in left {
                let (tid, batch) = &work[item];
                if !busy.insert(*tid) {
                    later.push(item);
                    continue;
                }
                match self.start(*tid, batch, None) {
                    Ok(slot) => started.push((item, slot)),
                    Err(error) => {
                        failed = Some(error);
                        break;
                    }
                }
            }
            // Also after a failure: the cure would cut short what runs, between a call that makes something and the one that
            // takes it away.
            for (item, slot) in started {
                results[item] = self.finish_batch(work[item].0, slot, work[item].1.len())?;
            }
            if let Some(error) = failed {
                return Err(error);
            }
            left = later;
        }
        Ok(results)
    }

    fn start(&mut self, tid: i32, batch: &Batch, child: Option<usize>) -> Result<usize> {
        if batch.len() > Batch::LIMIT {
            return Err(Error::TooMuch {
                what: "calls in one batch",
                asked: batch.len(),
                limit: Batch::LIMIT,
            });
        }
        let slot = self.slot(tid)?;
        choke::pass(Kind::Remote).map_err(|errno| Error::kernel("batch", tid, errno))?;
        self.shared().start(slot, batch, child);
        Ok(slot)
    }

    fn finish_batch(
        &mut self,
        tid: i32,
        slot: usize,
        count: usize,
    ) -> Result<Vec<std::result::Result<u64, Errno>>> {
        let started = std::time::Instant::now();
        while !self.shared().finished(slot, LOOK_NANOSECONDS) {
            self.look_after(tid)?;
            if started.elapsed().as_secs() > BATCH_SECONDS {
                return Err(Error::Silent {
                    tid,
                    what: "a batch",
                });
            }
        }
        Ok(self.shared().results(slot, count))
    }

    /// From here on our death, in whatever way, has `tid` make the calls of `batch`, in order, before it goes on as it was; until
    /// [`Injection::revoke_will`], or the cure. For what a frozen process must not keep and the kernel does not put back. What they
    /// point to is in `values`, which `tid` sees at [`Injection::will_address`]. Nobody hears what they return.
    ///
    /// # Errors
    /// [`Error::TooMuch`], for more than [`agent::WILL_LIMIT`] calls or values.
    ///
    /// # Panics
    /// If one of the calls takes the result of another.
    pub fn make_will(&mut self, tid: i32, batch: &Batch, values: &[u64]) -> Result<()> {
        let asked = batch.len().max(values.len());
        if asked > agent::WILL_LIMIT {
            return Err(Error::TooMuch {
                what: "calls in a will",
                asked,
                limit: agent::WILL_LIMIT,
            });
        }
        let calls = batch.calls().iter().map(|call| {
            let mut words = [call.number as u64; 7];
            for (word, argument) in words[1..].iter_mut().zip(&call.arguments) {
                *word = match *argument {
                    Arg::Value(value) => value,
                    Arg::Result(_) => panic!("a call of a will knows no result"),
                };
            }
            words
        });
        let calls: Vec<[u64; 7]> = calls.collect();
        let slot = self.slot(tid)?;
        self.shared().make_will(slot, &calls, values);
        Ok(())
    }

    /// Where `tid` sees the values of its will.
    ///
    /// # Panics
    /// For a thread that is not of this process.
    pub fn will_address(&self, tid: i32) -> u64 {
        let slot = self.slot(tid).expect("a thread of the planted process");
        let shared = self.shared.as_ref().expect("a planted agent has memory");
        shared.slot_address(slot) + agent::WILL_VALUES_OFFSET as u64
    }

    /// Our death changes nothing any more.
    ///
    /// # Errors
    /// For a thread that is not of this process.
    pub fn revoke_will(&mut self, tid: i32) -> Result<()> {
        let slot = self.slot(tid)?;
        self.shared().make_will(slot, &[], &[]);
        Ok(())
    }

    /// A thread that does not answer has died, or stands in a stop that somebody's signal brought about.
    fn look_after(&mut self, tid: i32) -> Result<()> {
        let index = self.tracee.index(tid, "running a batch")?;
        match ptrace::look(tid).map_err(|errno| Error::kernel("waitpid", tid, errno))? {
            Report::Running => Ok(()),
            Report::Ended(_) => Err(Error::Gone { pid: tid }),
            Report::Stopped(stop) => {
                self.tracee.threads[index].stop = Some(stop);
                if stop == Stop::Signal(libc::SIGSTOP) {
                    self.tracee.stop_again = true;
                }
                ptrace::resume(tid, 0)?;
                self.tracee.threads[index].stop = None;
                Ok(())
            }
        }
    }

    /// Memory of `tid`'s own for what its calls point to: the same bytes that it sees at [`Injection::scratch_address`].
    ///
    /// # Panics
    /// For a thread that is not of this process.
    pub fn scratch(&mut self, tid: i32) -> &mut [u8] {
        let slot = self.slot(tid).expect("a thread of the planted process");
        self.shared().scratch(slot)
    }

    /// Where `tid` sees its [`Injection::scratch`].
    ///
    /// # Panics
    /// For a thread that is not of this process.
    pub fn scratch_address(&self, tid: i32) -> u64 {
        let slot = self.slot(tid).expect("a thread of the planted process");
        let shared = self.shared.as_ref().expect("a planted agent has memory");
        shared.slot_address(slot) + agent::SCRATCH_OFFSET as u64
    }

    /// Where the agent lies in the process: not part of what the process is.
    pub fn mapping(&self) -> Range<u64> {
        let start = self.address.unwrap_or(0);
        start..start + self.len as u64
    }

    /// The process this agent is planted in. Its threads' registers are the agent's for now.
    pub fn tracee(&self) -> &Tracee {
        self.tracee
    }

    /// Makes a thread with the id `tid` in a husk. It starts in the agent, with its own slot, and is seized like the others.
    /// The agent needs room for it: [`Tracee::plant_with_room`]. Such a thread has nothing to go back to: it is for
    /// [`Injection::finish`], and a cure leaves it running what the leader ran.
    ///
    /// # Errors
    /// [`Error::TooMuch`] without room; [`Error::Injected`] with what clone3(2) said: `EEXIST` when the id is taken,
    /// `EPERM` without CAP_CHECKPOINT_RESTORE in the pid namespace.
    pub fn spawn_thread(&mut self, tid: i32) -> Result<()> {
        const FLAGS: i32 = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM;
        let leader = self.homes[0].tid;
        let child = self.homes.len();
        let capacity = self.shared().capacity();
        if child >= capacity {
            return Err(Error::TooMuch {
                what: "threads in an agent's mapping",
                asked: child + 1,
                limit: capacity,
            });
        }
        choke::pass(Kind::Spawn).map_err(|errno| Error::kernel("clone3", tid, errno))?;
        let home = Home {
            tid,
            xsave: self.homes[0].xsave.clone(),
            away: true,
            rseq: Rseq::default(),
            ..self.homes[0]
        };
        let frame = home.frame_at(self.shared().slot_address(child) + agent::FRAME_OFFSET as u64);
        self.shared().prepare(child, &frame);
        let (arguments, len) = self.shared().clone_arguments(0, FLAGS as u64, tid);
        let mut batch = Batch::new();
        batch.call(libc::SYS_clone3, &[arguments.into(), len.into()]);
        let slot = self.start(leader, &batch, Some(child))?;
        let made = self.finish_batch(leader, slot, 1)?[0];
        made.map_err(|errno| Error::Injected {
            what: "clone3",
            tid,
            errno,
        })?;
        self.homes.push(home);
        let bits = SeizeOptions {
            follow: false,
            ..self.tracee.options
        };
        ptrace::seize(tid, bits.bits())?;
        self.tracee.threads.push(Thread::running(tid));
        self.tracee.list_tids();
        let count = self.homes.len();
        self.shared().watch(count).map_err(|_| Error::TooMuch {
            what: "threads in one process",
            asked: count,
            limit: agent::THREAD_LIMIT,
        })
    }

    // -----------------------------------------------------------------------------------------------------------------
    // Cure

    /// Takes the agent out and puts everything back bit for bit. The process stays frozen.
    ///
    /// # Errors
    /// Each step is tried twice, and all threads are tried; the first error is told.
    pub fn cure(mut self) -> Result<()> {
        self.undo()
    }

    fn undo(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.cured, true) {
            return Ok(());
        }
        let mut first = Ok(());
        let mut note = |result: Result<()>| match result {
            Err(error) if error.is_gone() => {}
            result => first = std::mem::replace(&mut first, Ok(())).and(result),
        };
        // Ask all to stop, then wait for each: they stop at the same time.
        for index in 0..self.homes.len() {
            if self.homes[index].away {
                note(self.ask_to_stop(index));
            }
        }
        for index in 0..self.homes.len() {
            if self.homes[index].away {
                note(self.halt(index));
            }
        }
        self.recover_address();
        let gate = self.unmapping_gate();
        for index in 0..self.homes.len() {
            if self.homes[index].away && Some(index) != gate {
                note(self.go_home(index));
            }
        }
        if gate.is_some() || self.host.is_some() {
            note(self.unmap_agent());
        }
        if let Some(index) = gate {
            note(self.go_home(index));
        }
        note(self.close_gate());
        self.shared = None;
        if std::mem::take(&mut self.narrowed) {
            note(self.tracee.set_options(self.tracee.options));
        }
        first
    }

    fn ask_to_stop(&mut self, index: usize) -> Result<()> {
        let at = self.tracee.index(self.homes[index].tid, "curing")?;
        if self.tracee.threads[at].stop.is_none() {
            let tid = self.homes[index].tid;
            twice(|| ptrace::interrupt(tid))?;
        }
        Ok(())
    }

    fn halt(&mut self, index: usize) -> Result<()> {
        let at = self.tracee.index(self.homes[index].tid, "curing")?;
        self.tracee.hold(at)
    }

    /// When planting failed between the mapping and our knowing of it, the thread's registers tell where it is.
    fn recover_address(&mut self) {
        let Some(gate) = &self.gate else { return };
        if self.address.is_some() || !self.homes[gate.index].away {
            return;
        }
        let tid = self.homes[gate.index].tid;
        if let Ok(registers) = twice(|| ptrace::registers(tid)) {
            // The kernel's word for what was called: before our call there is none, unless its own registers are still there.
            let has_mapped = registers != self.homes[gate.index].registers
                && registers.orig_rax == libc::SYS_mmap as u64
                && registers.rsi == self.len as u64
                && agent::answer(registers.rax).is_ok();
            if has_mapped {
                self.address = Some(registers.rax);
            }
        }
    }

    /// The thread that will unmap the agent, with its frame written.
    fn unmapping_gate(&mut self) -> Option<usize> {
        self.address?;
        if self.gate.is_none() && self.host.is_none() {
            let pid = self.tracee.pid();
            self.gate = twice(|| self.open_gate(&procfs::maps(pid)?)).ok();
        }
        self.gate.as_ref().map(|gate| gate.index)
    }

    fn unmap_agent(&mut self) -> Result<()> {
        let Some(address) = self.address.take() else {
            return Ok(());
        };
        let len = self.len as u64;
        match self.unmap(address, len) {
            Err(error) if !error.is_gone() => {
                if let Some(gate) = &self.gate {
                    let index = gate.index;
                    self.halt(index)?;
                }
                self.unmap(address, len)
            }
            result => result,
        }
    }

    fn unmap(&mut self, address: u64, len: u64) -> Result<()> {
        let tid = self.tracee.pid();
        self.call("munmap", libc::SYS_munmap, [address, len, 0, 0, 0, 0])?
            .map(drop)
            .map_err(|errno| Error::Injected {
                what: "munmap",
                tid,
                errno,
            })
    }

    /// Makes a thread what it was. The signal mask comes first: while it is still the agent's, or at its frame, a signal
    /// does no harm, and afterwards nothing may be missing.
    fn go_home(&mut self, index: usize) -> Result<()> {
        self.halt(index)?;
        let home = &self.homes[index];
        twice(|| ptrace::set_sigmask(home.tid, home.sigmask))?;
        if home.rseq.place != 0 {
            // The kernel clears the pointer when the thread passes through user mode outside the sequence.
            let pointer = home.rseq.pointer.to_le_bytes();
            let mut now = [0; 8];
            twice(|| self.memory.read(home.rseq.place, &mut now))?;
            if now != pointer {
                twice(|| self.memory.write(home.rseq.place, &pointer))?;
            }
        }
        twice(|| ptrace::set_registers(home.tid, &home.registers))?;
        self.homes[index].away = false;
        Ok(())
    }

    /// Ends a husk's life as a husk: the agent is unmapped and every thread gets what it is to go on with. All stay stopped.
    /// The mappings must be those of the final layout; its vdso or another mapped file must hold a `syscall` instruction,
    /// and what a return to user mode touches (rseq areas) must be filled.
    ///
    /// # Errors
    /// After an error the husk is good for nothing but to be killed.
    pub fn finish(mut self, starts: &[ThreadStart]) -> Result<()> {
        // Whatever happens, this process has no home to return to.
        self.cured = true;
        for home in &self.homes {
            if !starts.iter().any(|start| start.tid == home.tid) {
                return Err(Error::WrongState {
                    tid: home.tid,
                    what: "finishing without registers",
                });
            }
        }
        for index in 0..self.homes.len() {
            self.ask_to_stop(index)?;
        }
        for index in 0..self.homes.len() {
            self.halt(index)?;
        }
        let pid = self.tracee.pid();
        self.code = self
            .tracee
            .find_code(Some(self.mapping()))?
            .ok_or(Error::NoInstruction {
                pid,
                what: "syscall",
            })?;
        self.tracee.code = Some(self.code);
        self.gate = Some(Gate {
            index: 0,
            frame: None,
        });
        self.unmap_agent()?;
        self.halt(0)?;
        self.gate = None;
        self.shared = None;
        for start in starts {
            if !start.xsave.is_empty() {
                ptrace::set_xsave(start.tid, &start.xsave)?;
            }
            ptrace::set_sigmask(start.tid, start.sigmask)?;
            ptrace::set_registers(start.tid, &start.registers)?;
        }
        self.narrowed = false;
        self.tracee.set_options(self.tracee.options)
    }
}

impl Drop for Injection<'_> {
    fn drop(&mut self) {
        // The error has nowhere to go; what could be put back has been.
        let _ = self.undo();
    }
}

impl Home {
    /// The frame that brings this thread home when it lies at `start`.
    fn frame_at(&self, start: u64) -> Vec<u8> {
        Frame {
            registers: &self.healed,
            xsave: &self.xsave,
            sigmask: self.sigmask,
            restorer: 0,
        }
        .to_bytes(start)
    }
}
