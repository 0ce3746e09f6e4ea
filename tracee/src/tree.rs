//! One process with all its threads in hand: seized, frozen, looked at, and let go again.
//!
//! Two promises live here. Until [`Tracee::park`], the death of this thread lets the process go on as if nothing had been:
//! ptrace sees to that, and nothing in this file may leave a thread in a state that would make it untrue. And whoever is
//! frozen is thawed without noticing: no signal swallowed, no system call answering EINTR that was not interrupted.
//!
//! ptrace(2) binds a traced thread to the operating-system thread that seized it, so nothing here is `Send`.

use std::marker::PhantomData;
use std::ops::Range;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::choke::{self, Kind};
use crate::injection::Injection;
use crate::interrupted::{self, Timeout};
use crate::leftover;
use crate::lock::RECORD_LEN;
use crate::memory::{RemoteMemory, RemotePtr};
use crate::ptrace::{self, Patience, Report, Stop};
use crate::registers::Registers;
use crate::{Error, Result, descriptor, procfs};

/// How long a single thread may take to stop or die when nothing but us stands in its way. Reached only if it hangs in the
/// kernel.
const PATIENCE: Duration = Duration::from_secs(10);
/// A thread that sleeps uninterruptibly for longer will not stop soon.
const UNINTERRUPTIBLE: Duration = Duration::from_millis(20);
/// Longest pause between two attempts to freeze: long enough for a thread to get out of the kernel, short enough that all
/// attempts together take seconds.
const FREEZE_PAUSE_MAX: Duration = Duration::from_millis(100);
/// Rounds in which threads that were stopped inside the vdso are let out of it.
const VDSO_ROUNDS: u32 = 200;
/// How long they run in the first round: some hundred times what the vdso needs.
const VDSO_PAUSE: Duration = Duration::from_micros(20);
/// And in the last: where others wait for the processor too, it takes that long until they have it.
const VDSO_PAUSE_MAX: Duration = Duration::from_millis(1);

/// How to seize.
#[derive(Clone, Copy, Debug, Default)]
pub struct SeizeOptions {
    /// Kill the process when this thread ends (`PTRACE_O_EXITKILL`). Never for a process that is still its own copy.
    pub exit_kill: bool,
    /// Hear of new threads, forks and execs (`PTRACE_O_TRACECLONE|FORK|VFORK|EXEC`), so that nothing escapes the freeze.
    pub follow: bool,
    /// Lift its seccomp filters while it is traced (`PTRACE_O_SUSPEND_SECCOMP`, needs CAP_SYS_ADMIN and an unfiltered
    /// caller).
    pub suspend_seccomp: bool,
}

impl SeizeOptions {
    pub(crate) fn bits(self) -> u64 {
        let mut bits = ptrace::OPTION_SYSGOOD;
        if self.exit_kill {
            bits |= ptrace::OPTION_EXIT_KILL;
        }
        if self.follow {
            bits |= ptrace::OPTION_FOLLOW;
        }
        if self.suspend_seccomp {
            bits |= ptrace::OPTION_SUSPEND_SECCOMP;
        }
        bits
    }
}

/// A thread's restartable sequence registration (rseq(2)), as `PTRACE_GET_RSEQ_CONFIGURATION` (5.13) gives it.
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

/// What was known of a sleeping thread before it was stopped: from this follows how long it had slept.
#[derive(Clone, Copy, Debug)]
struct Asleep {
    number: i64,
    clock: SchedulerClock,
}

/// Two lines of `/proc/<pid>/task/<tid>/sched`.
#[derive(Clone, Copy, Debug)]
struct SchedulerClock {
    /// When the thread last began or ended to run, on its processor's clock.
    last_run: Duration,
    /// How often it has gone to sleep; being stopped by ptrace counts.
    sleeps: u64,
}

#[derive(Debug)]
pub(crate) struct Thread {
    pub(crate) tid: i32,
    /// `None` while it runs.
    pub(crate) stop: Option<Stop>,
    asleep: Option<Asleep>,
    /// How long it had slept in its system call when it was stopped. Zero when unknown.
    slept: Duration,
}

impl Thread {
    pub(crate) fn running(tid: i32) -> Self {
        Self {
            tid,
            stop: None,
            asleep: None,
            slept: Duration::ZERO,
        }
    }

    pub(crate) fn is_held(&self) -> bool {
        matches!(self.stop, Some(Stop::Trap | Stop::Group))
    }
}

/// A process with all its threads seized. Dropping it lets the process go, as [`Tracee::thaw`] does.
#[derive(Debug)]
pub struct Tracee {
    pid: i32,
    pub(crate) threads: Vec<Thread>,
    tids: Vec<i32>,
    pub(crate) options: SeizeOptions,
    frozen_at: Option<Instant>,
    /// A SIGSTOP arrived while an agent was planted and is to be sent again.
    pub(crate) stop_again: bool,
    /// A SIGCONT was pending when the process was parked.
    continue_again: bool,
    pub(crate) code: Option<CodePlaces>,
    /// The first process of its group in whose memory it is, not being a thread of it: whose its stacks are is then not known.
    pub(crate) host: Option<i32>,
    /// What it forks stays attached, and is listed in `born`; else it is let go.
    pub(crate) keeps_children: bool,
    /// Processes it has forked since somebody looked, attached to this thread.
    pub(crate) born: Vec<i32>,
    _bound: PhantomData<*mut ()>,
}

/// Instructions of the process that an injection can use, by address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CodePlaces {
    /// `syscall`
    pub(crate) syscall: u64,
    /// `syscall; ret` and a function that calls rt_sigreturn.
    pub(crate) homing: Option<(u64, u64)>,
}

impl Tracee {
    /// Seizes every thread of `pid` without stopping any. Repeats until no new thread shows up, which is certain only with
    /// `follow` or once frozen.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Zombie`], [`Error::AlreadyTraced`], or [`Error::Kernel`] (`EPERM`: not allowed to trace it).
    /// Threads seized so far are let go.
    pub fn seize(pid: i32, options: SeizeOptions) -> Result<Self> {
        let mut tracee = Self::adopted(pid, options);
        tracee.threads.clear();
        while tracee.seize_new_threads()? > 0 {}
        if tracee.threads.is_empty() {
            return Err(Error::Gone { pid });
        }
        tracee.code = tracee.find_code(None)?;
        Ok(tracee)
    }

    /// A process whose only thread known so far is attached already, and not known to have stopped.
    pub(crate) fn adopted(pid: i32, options: SeizeOptions) -> Self {
        Self {
            pid,
            threads: vec![Thread::running(pid)],
            tids: vec![pid],
            options,
            frozen_at: None,
            stop_again: false,
            continue_again: false,
            code: None,
            host: None,
            keeps_children: false,
            born: Vec::new(),
            _bound: PhantomData,
        }
    }

    /// A process that a husk has just made, attached; it is to go on with these registers and signals when it is let go.
    pub(crate) fn newborn(
        pid: i32,
        options: SeizeOptions,
        registers: &Registers,
        sigmask: u64,
    ) -> Result<Self> {
        let mut child = Self::adopted(pid, options);
        child.await_stop(0)?;
        ptrace::set_options(pid, options.bits())?;
        ptrace::set_registers(pid, registers)?;
        ptrace::set_sigmask(pid, sigmask)?;
        child.frozen_at = Some(Instant::now());
        Ok(child)
    }

    /// See [`crate::family::Family::move_in`]. Nothing of what the husk was is left in its registers: no stack that something else
    /// may lie at now, and no text that our death could let it run. It would end at its first instruction instead.
    pub(crate) fn move_to(&mut self, host: i32, code: Option<CodePlaces>) -> Result<()> {
        self.must_be_frozen("moving")?;
        self.host = Some(host);
        self.code = code;
        for thread in &self.threads {
            let registers = ptrace::registers(thread.tid)?;
            let nowhere = Registers {
                rip: 0,
                rsp: 0,
                fs_base: 0,
                ..registers
            };
            ptrace::set_registers(thread.tid, &nowhere)?;
        }
        Ok(())
    }

    /// Process id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Thread ids, the leader's first.
    pub fn tids(&self) -> &[i32] {
        &self.tids
    }

    /// Whether every thread is stopped.
    pub fn is_frozen(&self) -> bool {
        self.frozen_at.is_some()
    }

    /// Seizes threads that are not ours yet; how many were.
    fn seize_new_threads(&mut self) -> Result<usize> {
        let mut new = procfs::tids(self.pid)?;
        new.retain(|&tid| self.threads.iter().all(|thread| thread.tid != tid));
        let count = match new[..] {
            [] => return Ok(0),
            [tid] if self.threads.is_empty() => usize::from(self.seize_thread(tid)?),
            _ => reaping(self.pid, || {
                let mut count = 0;
                for &tid in &new {
                    count += usize::from(self.seize_thread(tid)?);
                }
                Ok(count)
            })?,
        };
        self.list_tids();
        Ok(count)
    }

    /// Seizes one thread; false when it has ended meanwhile.
    fn seize_thread(&mut self, tid: i32) -> Result<bool> {
        match ptrace::seize(tid, self.options.bits()) {
            Ok(()) => {
                self.threads.push(Thread::running(tid));
                Ok(true)
            }
            Err(error) => {
                let leader = tid == self.pid;
                let status = match procfs::status(self.pid, tid) {
                    Ok(status) => status,
                    Err(Error::Gone { .. }) if !leader => return Ok(false),
                    Err(gone @ Error::Gone { .. }) => return Err(gone),
                    Err(_) => return Err(error),
                };
                if matches!(status.state, 'Z' | 'X') {
                    return if leader {
                        Err(Error::Zombie { pid: tid })
                    } else {
                        Ok(false)
                    };
                }
                // A clone of a thread with the follow options arrives attached by itself.
                if status.tracer_pid == nix::unistd::gettid().as_raw() && self.options.follow {
                    self.threads.push(Thread::running(tid));
                    return Ok(true);
                }
                if status.tracer_pid != 0 {
                    return Err(Error::AlreadyTraced {
                        tid,
                        tracer: status.tracer_pid,
                    });
                }
                Err(error)
            }
        }
    }

    pub(crate) fn list_tids(&mut self) {
        let pid = self.pid;
        self.threads
            .sort_by_key(|thread| (thread.tid != pid, thread.tid));
        self.tids = self.threads.iter().map(|thread| thread.tid).collect();
    }

    /// Stops every thread within `budget`. When one does not stop, all are let run again and, after a pause, up to
    /// `attempts` attempts are made. Runs SCHED_FIFO meanwhile, where allowed.
    ///
    /// Afterwards no thread is inside the vdso: what it holds in registers there would not be true on another host. And what
    /// an earlier tracer's death has left in the process is gone: see [`crate::leftover`].
    ///
    /// Returns when the process was first touched by the attempt that succeeded: until then it ran.
    ///
    /// # Errors
    /// [`Error::NotFrozen`] names a thread that did not stop, or not outside such leftovers; every thread runs again.
    pub fn freeze(&mut self, budget: Duration, attempts: u32) -> Result<Instant> {
        freeze(self, budget, attempts)
    }

    /// A thread that is still on its way out of one of these agents, in this memory.
    fn in_leftover(&self, agents: &[Range<u64>], maps: &[procfs::Vma]) -> Result<Option<i32>> {
        let memory = RemoteMemory::open(self.pid)?;
        for thread in &self.threads {
            let registers = ptrace::registers(thread.tid)?;
            if leftover::is_needed(agents, maps, &memory, &registers)? {
                return Ok(Some(thread.tid));
            }
        }
        Ok(None)
    }

    /// Before anything is stopped: a thread in an uninterruptible sleep would not stop, so it is waited for, untouched. And
    /// what threads sleep in is remembered, because the stop wakes them.
    fn look_before_touching(&mut self, budget: Duration) -> Result<()> {
        let mut patience = Patience::new(budget);
        for index in 0..self.threads.len() {
            let tid = self.threads[index].tid;
            loop {
                match procfs::stat(self.pid, tid) {
                    Ok(stat) if stat.state == 'D' => {
                        if !patience.nap() {
                            return Err(self.not_frozen(tid));
                        }
                    }
                    Ok(_) => break,
                    Err(error) if error.is_gone() && tid != self.pid => break,
                    Err(error) => return Err(error),
                }
            }
            self.threads[index].asleep = self.asleep(tid);
            self.threads[index].slept = Duration::ZERO;
        }
        Ok(())
    }

    /// What is needed to shorten the timeout of a call that leaks EINTR. A thread of which it cannot be learned keeps its
    /// whole timeout.
    fn asleep(&self, tid: i32) -> Option<Asleep> {
        let number = procfs::syscall(self.pid, tid).ok()??.nr;
        match interrupted::leaking(number)? {
            Timeout::None => None,
            Timeout::Milliseconds(_) | Timeout::Timespec(_) => Some(Asleep {
                number,
                clock: scheduler_clock(self.pid, tid)?,
            }),
        }
    }

    /// After everything has stopped: how long had the threads slept that leak EINTR?
    ///
    /// The scheduler notes when a thread goes to sleep and when it runs again, both on the same processor's clock. If it
    /// has gone to sleep once more since we looked, that was our stop, and it slept from then until our interruption; if more
    /// often, it fell asleep after we looked, a moment ago.
    fn note_sleep(&mut self) {
        for thread in &mut self.threads {
            let Some(asleep) = thread.asleep else {
                continue;
            };
            let Ok(registers) = ptrace::registers(thread.tid) else {
                continue;
            };
            if registers.orig_rax as i64 != asleep.number
                || interrupted::leaked(&registers).is_none()
            {
                continue;
            }
            if let Some(now) = scheduler_clock(self.pid, thread.tid) {
                if now.sleeps.saturating_sub(asleep.clock.sleeps) <= 1 {
                    thread.slept = now.last_run.saturating_sub(asleep.clock.last_run);
                }
            }
        }
    }

    pub(crate) fn interrupt(&mut self, index: usize) -> Result<()> {
        if self.threads[index].is_held() {
            return Ok(());
        }
        match ptrace::interrupt(self.threads[index].tid) {
            // Ended, or about to: the next look at it says so.
            Err(error) if error.is_gone() => Ok(()),
            result => result,
        }
    }

    /// Waits until every thread is stopped and no new one has appeared.
    fn collect_stops(&mut self, patience: &mut Patience) -> Result<()> {
        loop {
            choke::pass(Kind::Ptrace).map_err(|errno| Error::kernel("waitpid", self.pid, errno))?;
            while !self.look_at_all(true)? {
                if !patience.nap() {
                    let late = self.threads.iter().find(|thread| !thread.is_held());
                    return Err(self.not_frozen(late.map_or(self.pid, |thread| thread.tid)));
                }
            }
            if self.seize_new_threads()? == 0 {
                return Ok(());
            }
            for index in 0..self.threads.len() {
                self.interrupt(index)?;
            }
        }
    }

    /// One look at every running thread; true when none runs.
    fn look_at_all(&mut self, stopping: bool) -> Result<bool> {
        let mut index = 0;
        let mut all = true;
        while index < self.threads.len() {
            let tid = self.threads[index].tid;
            if !self.threads[index].is_held() {
                match ptrace::look(tid).map_err(|errno| Error::kernel("waitpid", tid, errno))? {
                    Report::Running => all = false,
                    Report::Ended(_) => {
                        self.threads.remove(index);
                        if tid == self.pid
                            && procfs::stat(self.pid, self.pid)
                                .map_or(true, |stat| stat.state == 'Z')
                        {
                            return Err(Error::Gone { pid: tid });
                        }
                        continue;
                    }
                    Report::Stopped(stop) => {
                        self.note_stop(index, stop, stopping)?;
                        all &= self.threads[index].is_held();
                    }
                }
            }
            index += 1;
        }
        Ok(all)
    }

    /// Deals with a stop: a trap is kept; everything else belongs to the thread's own life and is passed on, after which,
    /// when `stopping`, it is asked again to stop.
    fn note_stop(&mut self, index: usize, stop: Stop, stopping: bool) -> Result<()> {
        let tid = self.threads[index].tid;
        let mut forward = 0;
        match stop {
            Stop::Trap | Stop::Group => {
                self.threads[index].stop = Some(stop);
                return Ok(());
            }
            // The signal has already been taken off the queue: if it is not passed on, it is lost.
            Stop::Signal(signal) => {
                forward = signal;
                if !stopping {
                    self.settle_ignored(tid, signal)?;
                }
            }
            Stop::Syscall => {}
            Stop::Event(event) => {
                let other = ptrace::event_message(tid)?;
                match event {
                    libc::PTRACE_EVENT_CLONE
                    | libc::PTRACE_EVENT_FORK
                    | libc::PTRACE_EVENT_VFORK => self.note_made(other)?,
                    libc::PTRACE_EVENT_EXEC => self.code = None,
                    _ => {}
                }
            }
        }
        if stopping {
            ptrace::interrupt(tid)?;
        }
        ptrace::resume(tid, forward)
    }

    /// A thread of ours has made this one, which is attached. Whether it is a thread too does not follow from the event: that is
    /// named after the signal of its end, and after vfork.
    fn note_made(&mut self, other: i32) -> Result<()> {
        let process = match twice(|| procfs::status(other, other)) {
            Ok(status) => status.tgid,
            // Killed, and there is no more of it.
            Err(error) if error.is_gone() => return Ok(()),
            Err(error) => return Err(error),
        };
        if process != self.pid {
            if self.keeps_children {
                self.born.push(other);
                return Ok(());
            }
            return release_child(other);
        }
        if !self.tids.contains(&other) {
            self.threads.push(Thread::running(other));
            self.tids.push(other);
        }
        Ok(())
    }

    /// A signal that the process ignores wakes a traced thread all the same, which makes some calls answer EINTR: they are
    /// wound back before the signal is passed on to be ignored.
    fn settle_ignored(&self, tid: i32, signal: i32) -> Result<()> {
        settle_ignored(self.pid, tid, signal)
    }

    /// Threads stopped inside the vdso run on until they are outside. Single steps would be quicker, but the kernel changes
    /// a blocked or ignored SIGTRAP for them. Between letting go and stopping again they need a moment: interrupted at once,
    /// a thread stops before it has left the kernel, where it was. One that does nothing but ask for the time is outside by
    /// chance, and stays stopped then. Returns the mappings as they are then.
    fn leave_vdso(&mut self, patience: &mut Patience) -> Result<Vec<procfs::Vma>> {
        let mut pause = VDSO_PAUSE;
        for _ in 0..VDSO_ROUNDS {
            let maps = procfs::maps(self.pid)?;
            let Some(vdso) = maps.iter().find(|vma| vma.path == "[vdso]") else {
                return Ok(maps);
            };
            let mut inside = Vec::new();
            for index in 0..self.threads.len() {
                let rip = ptrace::registers(self.threads[index].tid)?.rip;
                if (vdso.start..vdso.end).contains(&rip)
                    && self.threads[index].stop == Some(Stop::Trap)
                {
                    inside.push(index);
                }
            }
            if inside.is_empty() {
                return Ok(maps);
            }
            for &index in &inside {
                self.threads[index].stop = None;
                ptrace::resume(self.threads[index].tid, 0)?;
            }
            std::thread::sleep(pause);
            pause = VDSO_PAUSE_MAX.min(pause * 5 / 4);
            for index in inside {
                self.interrupt(index)?;
            }
            self.collect_stops(patience)?;
        }
        Err(self.not_frozen(self.pid))
    }

    fn not_frozen(&self, tid: i32) -> Error {
        let syscall = match procfs::syscall(self.pid, tid) {
            Ok(Some(blocked)) => blocked.nr.to_string(),
            _ => "running".to_owned(),
        };
        Error::NotFrozen {
            tid,
            syscall,
            wchan: procfs::wchan(self.pid, tid).unwrap_or_else(|_| "0".to_owned()),
            state: procfs::stat(self.pid, tid).map_or('?', |stat| stat.state),
        }
    }

    /// Lets all stopped threads run while they stay seized.
    fn run_on(&mut self) -> Result<()> {
        let mut first = Ok(());
        for index in 0..self.threads.len() {
            let result = self.run_one(index);
            first = first.and(result);
        }
        first
    }

    fn run_one(&mut self, index: usize) -> Result<()> {
        let tid = self.threads[index].tid;
        let result = match self.threads[index].stop {
            None => return Ok(()),
            Some(Stop::Group) => twice(|| ptrace::listen(tid)),
            Some(_) => {
                self.settle(index, true)?;
                twice(|| ptrace::resume(tid, 0))
            }
        };
        self.threads[index].stop = None;
        match result {
            Err(error) if error.is_gone() => Ok(()),
            result => result,
        }
    }

    /// Passes on what running threads report: signals, new threads, stops that came too late. To be called now and then by
    /// whoever keeps a process seized without freezing it.
    ///
    /// # Errors
    /// [`Error::Gone`] when the process has ended.
    pub fn pump(&mut self) -> Result<()> {
        if self.is_frozen() {
            return Ok(());
        }
        self.look_at_all(false)?;
        for index in 0..self.threads.len() {
            if self.threads[index].stop.is_some() {
                self.run_one(index)?;
            }
        }
        Ok(())
    }

    // -----------------------------------------------------------------------------------------------------------------
    // Looking at threads

    pub(crate) fn index(&self, tid: i32, what: &'static str) -> Result<usize> {
        self.threads
            .iter()
            .position(|thread| thread.tid == tid)
            .ok_or(Error::WrongState { tid, what })
    }

    fn held(&self, tid: i32, what: &'static str) -> Result<usize> {
        let index = self.index(tid, what)?;
        if self.threads[index].is_held() {
            Ok(index)
        } else {
            Err(Error::WrongState { tid, what })
        }
    }

    /// Registers of a stopped thread, as they are: an interrupted system call shows the kernel's private error numbers.
    ///
    /// # Errors
    /// [`Error::WrongState`] for a thread that is not stopped here; [`Error::Gone`].
    pub fn registers(&self, tid: i32) -> Result<Registers> {
        self.held(tid, "reading registers")?;
        ptrace::registers(tid)
    }

    /// Sets the registers of a stopped thread.
    ///
    /// # Errors
    /// As [`Tracee::registers`].
    pub fn set_registers(&self, tid: i32, registers: &Registers) -> Result<()> {
        self.held(tid, "writing registers")?;
        ptrace::set_registers(tid, registers)
    }

    /// Registers with which a stopped thread can go on on another host, where no kernel knows what it was doing: interrupted
    /// calls are wound back, or answer EINTR if the rest of their timeout was known to this kernel only; a thread inside a
    /// restartable sequence is at its abort handler.
    ///
    /// A timeout that lies in memory is shortened in a copy, written to unused stack far below the thread's red zone.
    ///
    /// # Errors
    /// As [`Tracee::registers`]; [`Error::Unreadable`].
    pub fn portable_registers(&self, tid: i32) -> Result<Registers> {
        let index = self.held(tid, "reading registers")?;
        let registers = match self.unleaked(index, ptrace::sigmask(tid)?, true)? {
            Some(registers) => registers,
            None => interrupted::without_kernel(&ptrace::registers(tid)?),
        };
        let memory = RemoteMemory::open(self.pid)?;
        let rseq = Rseq::of(tid, &memory)?;
        Ok(rseq.aborted(&memory, registers))
    }

    /// Extended state (x87, SSE, AVX…) of a stopped thread: the whole XSAVE area in standard format.
    ///
    /// # Errors
    /// As [`Tracee::registers`].
    pub fn xsave(&self, tid: i32) -> Result<Vec<u8>> {
        self.held(tid, "reading extended state")?;
        ptrace::xsave(tid)
    }

    /// Sets the extended state of a stopped thread.
    ///
    /// # Errors
    /// As [`Tracee::registers`]; `EINVAL` or `EFAULT` when the area does not fit this processor.
    pub fn set_xsave(&self, tid: i32, xsave: &[u8]) -> Result<()> {
        self.held(tid, "writing extended state")?;
        ptrace::set_xsave(tid, xsave)
    }

    /// Blocked signals of a stopped thread, signal n as bit n-1; inside a call like ppoll(2), those it will put back.
    ///
    /// # Errors
    /// As [`Tracee::registers`].
    pub fn sigmask(&self, tid: i32) -> Result<u64> {
        self.held(tid, "reading the signal mask")?;
        ptrace::sigmask(tid)
    }

    /// Sets the blocked signals of a stopped thread.
    ///
    /// # Errors
    /// As [`Tracee::registers`].
    pub fn set_sigmask(&self, tid: i32, mask: u64) -> Result<()> {
        self.held(tid, "writing the signal mask")?;
        ptrace::set_sigmask(tid, mask)
    }

    /// Pending signals (`siginfo_t` each), of the thread alone or of the whole process; they stay pending.
    ///
    /// # Errors
    /// As [`Tracee::registers`].
    pub fn pending(&self, tid: i32, shared: bool) -> Result<Vec<[u8; 128]>> {
        self.held(tid, "reading pending signals")?;
        ptrace::pending(tid, shared)
    }

    /// The thread's restartable sequence registration.
    ///
    /// # Errors
    /// As [`Tracee::registers`].
    pub fn rseq(&self, tid: i32) -> Result<RseqConfiguration> {
        self.held(tid, "reading rseq")?;
        ptrace::rseq(tid)
    }

    /// Whether the thread's system calls go to a handler of its own (`PR_SET_SYSCALL_USER_DISPATCH`; 6.4 tells).
    ///
    /// # Errors
    /// As [`Tracee::registers`].
    pub fn dispatches_syscalls(&self, tid: i32) -> Result<bool> {
        self.held(tid, "reading its system call dispatch")?;
        ptrace::dispatches_syscalls(tid)
    }

    /// Head and length of the thread's robust futex list (get_robust_list(2)); (0, 0) if it has none.
    ///
    /// # Errors
    /// [`Error::Gone`]; `EPERM`.
    pub fn robust_list(&self, tid: i32) -> Result<(u64, u64)> {
        let (mut head, mut len) = (0_u64, 0_u64);
        choke::pass(Kind::Ptrace)
            .and_then(|()| {
                // SAFETY: two words that outlive the call.
                Errno::result(unsafe {
                    libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut len)
                })
            })
            .map_err(|errno| Error::kernel("get_robust_list", tid, errno))?;
        Ok((head, if head == 0 { 0 } else { len }))
    }

    /// Plants the agent in every thread of a frozen process. `at` is the page-aligned address for it, in free memory;
    /// without it the kernel chooses.
    ///
    /// # Errors
    /// Nothing is left behind: see [`Injection`].
    pub fn plant(&mut self, at: Option<u64>) -> Result<Injection<'_>> {
        let threads = self.threads.len();
        Injection::plant(self, at, threads)
    }

    /// As [`Tracee::plant`], with room for `threads` threads in all, so that more can be made by
    /// [`Injection::spawn_thread`]. The mapping takes [`crate::agent::byte_len`] bytes.
    ///
    /// # Errors
    /// As [`Tracee::plant`].
    pub fn plant_with_room(&mut self, at: Option<u64>, threads: usize) -> Result<Injection<'_>> {
        let threads = threads.max(self.threads.len());
        Injection::plant(self, at, threads)
    }

    // -----------------------------------------------------------------------------------------------------------------
    // Interrupted calls

    /// The registers of a thread whose call leaked an EINTR, wound back with its timeout shortened; `None` when there is
    /// nothing to mend. `blocked`: the signals that would not interrupt the call. `writes` allows a shortened timespec to be
    /// written far below the thread's red zone; without it, and on stacks that are not certainly the thread's own, the call
    /// gets its whole timeout again.
    pub(crate) fn unleaked(
        &self,
        index: usize,
        blocked: u64,
        writes: bool,
    ) -> Result<Option<Registers>> {
        let thread = &self.threads[index];
        let registers = ptrace::registers(thread.tid)?;
        let Some(timeout) = interrupted::leaked(&registers) else {
            return Ok(None);
        };
        if deliverable(self.pid, thread.tid, blocked)? {
            return Ok(None);
        }
        let mut rewound = interrupted::rewound(&registers);
        let spent = match self.frozen_at {
            Some(at) if thread.asleep.is_some() => thread.slept + at.elapsed(),
            _ => Duration::ZERO,
        };
        match timeout {
            Timeout::None => {}
            Timeout::Milliseconds(argument) => {
                let left = interrupted::milliseconds_left(argument.of(&registers), spent);
                argument.set(&mut rewound, left);
            }
            Timeout::Timespec(argument) => {
                let address = argument.of(&registers);
                if writes && address != 0 && !spent.is_zero() {
                    let memory = RemoteMemory::open(self.pid)?;
                    let place = match self.host {
                        Some(_) => None,
                        None => timeout_place(&procfs::maps(self.pid)?, &registers),
                    };
                    let timespec = memory.read_value(RemotePtr::<[i64; 2]>::new(address));
                    if let (Some(place), Ok(timespec)) = (place, timespec) {
                        let left = interrupted::timespec_left(timespec, spent);
                        let bytes: Vec<u8> =
                            left.iter().flat_map(|word| word.to_le_bytes()).collect();
                        if memory.write(place, &bytes).is_ok() {
                            argument.set(&mut rewound, place);
                        }
                    }
                }
            }
        }
        Ok(Some(rewound))
    }

    /// Before a thread goes on by itself: mends what the kernel's restart does not. `retry` tries a failing step once more.
    fn settle(&mut self, index: usize, retry: bool) -> Result<()> {
        let tid = self.threads[index].tid;
        let mend = || -> Result<()> {
            let registers = ptrace::registers(tid)?;
            if interrupted::leaked(&registers).is_none() {
                return Ok(());
            }
            let blocked = procfs::status(self.pid, tid)?.sig_blk;
            match self.unleaked(index, blocked, true)? {
                Some(registers) => ptrace::set_registers(tid, &registers),
                None => Ok(()),
            }
        };
        let result = if retry { twice(mend) } else { mend() };
        match result {
            Err(error) if error.is_gone() => Ok(()),
            result => result,
        }
    }

    // -----------------------------------------------------------------------------------------------------------------
    // Holding, letting go

    /// From here on our death leaves the process stopped: a SIGSTOP waits in its queue, and nothing runs in front of it.
    /// A SIGCONT that somebody sends takes that away again. One that is pending already is lost by it: the kernel keeps only the
    /// later of the two. [`Tracee::unpark`] gives it back; on the target it comes from the capture, made before.
    ///
    /// # Errors
    /// [`Error::WrongState`] unless frozen, or if the SIGSTOP does not stay; [`Error::Gone`].
    pub fn park(&mut self) -> Result<()> {
        self.must_be_frozen("parking")?;
        let shared_pending = || {
            choke::pass(Kind::Park).map_err(|errno| Error::kernel("parking", self.pid, errno))?;
            Ok(procfs::status(self.pid, self.pid)?.shd_pnd)
        };
        let before = twice(shared_pending)?;
        self.send(libc::SIGSTOP)?;
        // Somebody's SIGCONT may have taken it away again, and what follows relies on it.
        let after = twice(shared_pending)?;
        self.continue_again |= before & bit(libc::SIGCONT) != 0;
        if after & bit(libc::SIGSTOP) != 0 {
            Ok(())
        } else {
            Err(Error::WrongState {
                tid: self.pid,
                what: "parking, undone by a SIGCONT of somebody else,",
            })
        }
    }

    /// Takes [`Tracee::park`] back: the SIGSTOP is taken off the queue and nobody sees it. Signals queued before it are
    /// delivered on the way, as they would be anyway. The process stays frozen.
    ///
    /// # Errors
    /// [`Error::WrongState`] unless frozen; [`Error::Gone`]; [`Error::Silent`].
    pub fn unpark(&mut self) -> Result<()> {
        self.must_be_frozen("unparking")?;
        let tid = self.threads[0].tid;
        // A thread with a SIGSTOP in its queue cannot reach user mode: each resumption ends at the next signal. Only the
        // resumption that could be the last is preceded by an interruption, since that would come before any signal.
        while twice(|| procfs::status(self.pid, tid))?.shd_pnd & bit(libc::SIGSTOP) != 0 {
            let mut forward = 0;
            loop {
                twice(|| ptrace::resume(tid, forward))?;
                self.threads[0].stop = None;
                match self.await_stop(0)? {
                    Stop::Signal(libc::SIGSTOP) => break,
                    Stop::Signal(signal) => forward = signal,
                    _ => forward = 0,
                }
            }
            twice(|| ptrace::interrupt(tid))?;
            twice(|| ptrace::resume(tid, 0))?;
            self.threads[0].stop = None;
            self.hold(0)?;
        }
        if std::mem::take(&mut self.continue_again) {
            self.send(libc::SIGCONT)?;
        }
        Ok(())
    }

    /// Has a parked process make the call `fcntl(fd, F_SETLK, record)` for each of `fds`. It stays parked. See
    /// [`Injection::set_locks`].
    pub(crate) fn set_locks(
        &mut self,
        host: Option<&mut Self>,
        fds: &[u32],
        record: &[u8; RECORD_LEN],
    ) -> Result<()> {
        self.must_be_frozen("giving up locks")?;
        let stop_again = self.stop_again;
        let set = Injection::set_locks(self, host, fds, record);
        // What was met is the SIGSTOP of the parking.
        self.stop_again = stop_again;
        let pending = twice(|| procfs::status(self.pid, self.pid))?.shd_pnd;
        if pending & bit(libc::SIGSTOP) == 0 {
            self.send(libc::SIGSTOP)?;
        }
        set
    }

    fn must_be_frozen(&self, what: &'static str) -> Result<()> {
        if self.is_frozen() {
            Ok(())
        } else {
            Err(Error::WrongState {
                tid: self.pid,
                what,
            })
        }
    }

    pub(crate) fn send(&self, signal: i32) -> Result<()> {
        twice(|| {
            choke::pass(Kind::Ptrace)
                // SAFETY: kill(2) takes no pointers.
                .and_then(|()| Errno::result(unsafe { libc::kill(self.pid, signal) }))
                .map(drop)
                .map_err(|errno| Error::kernel("kill", self.pid, errno))
        })
    }

    /// Waits for the next stop of a thread that was resumed.
    pub(crate) fn await_stop(&mut self, index: usize) -> Result<Stop> {
        let tid = self.threads[index].tid;
        match twice(|| ptrace::wait(tid, PATIENCE))? {
            Report::Stopped(stop) => {
                self.threads[index].stop = Some(stop);
                Ok(stop)
            }
            Report::Ended(_) => Err(Error::Gone { pid: tid }),
            Report::Running => Err(Error::Silent {
                tid,
                what: "a stop",
            }),
        }
    }

    /// Brings a thread, whatever it is doing, into a stop from which the kernel's own restart works. It does not reach user
    /// mode if it was stopped. All signals but SIGSTOP and SIGKILL must be blocked in it, or none be lost: they are passed on.
    pub(crate) fn hold(&mut self, index: usize) -> Result<()> {
        let tid = self.threads[index].tid;
        let mut interrupted = false;
        loop {
            match self.threads[index].stop {
                Some(Stop::Trap | Stop::Group) => return Ok(()),
                Some(stop) => {
                    let forward = match stop {
                        Stop::Signal(libc::SIGSTOP) => {
                            self.stop_again = true;
                            0
                        }
                        Stop::Signal(signal) => signal,
                        _ => 0,
                    };
                    twice(|| ptrace::interrupt(tid))?;
                    twice(|| ptrace::resume(tid, forward))?;
                    self.threads[index].stop = None;
                    interrupted = true;
                }
                None => {
                    if !interrupted {
                        twice(|| ptrace::interrupt(tid))?;
                        interrupted = true;
                    }
                    self.await_stop(index)?;
                }
            }
        }
    }

    /// Lets the process go on and lets go of it. A process that a signal had stopped stays stopped.
    ///
    /// # Errors
    /// The first that occurred; every thread is tried.
    pub fn thaw(mut self) -> Result<()> {
        self.let_go()
    }

    /// Threads that run, and sleep uninterruptibly for longer than a page takes to be read.
    fn tids_in_kernel(&self) -> Vec<i32> {
        let mut patience = Patience::new(UNINTERRUPTIBLE);
        let asleep = |tid| procfs::stat(self.pid, tid).is_ok_and(|stat| stat.state == 'D');
        let running = self.threads.iter().filter(|thread| thread.stop.is_none());
        let mut tids: Vec<i32> = running.map(|thread| thread.tid).collect();
        loop {
            tids.retain(|&tid| asleep(tid));
            if tids.is_empty() || !patience.nap() {
                return tids;
            }
        }
    }

    fn let_go(&mut self) -> Result<()> {
        if self.threads.is_empty() {
            return Ok(());
        }
        let _urgent = Urgent::enter();
        let mut first = Ok(());
        // One that sleeps uninterruptibly cannot be stopped, and so not let go by a call; the kernel does it when this thread
        // ends. Seen before any other is held, which would stand still for as long as that one was waited for.
        let tids = self.tids_in_kernel();
        // First everything that takes time, then all at once.
        for index in 0..self.threads.len() {
            if tids.contains(&self.threads[index].tid) {
                continue;
            }
            let mut result = self.hold(index);
            if result.is_ok() && self.threads[index].stop == Some(Stop::Trap) {
                result = self.settle(index, true);
            }
            if !matches!(&result, Err(error) if error.is_gone()) {
                first = first.and(result);
            }
        }
        if std::mem::take(&mut self.stop_again) {
            first = first.and(self.send(libc::SIGSTOP));
        }
        for thread in self.threads.drain(..) {
            match twice(|| ptrace::detach(thread.tid)) {
                Err(error) if error.is_gone() => {}
                result => first = first.and(result),
            }
        }
        self.frozen_at = None;
        first
    }

    /// Takes `exit_kill` back from every thread but the leader: the others can then be let go one by one, while our death still
    /// ends the process by its leader, for which [`Tracee::release`] keeps it.
    ///
    /// # Errors
    /// [`Error::WrongState`] unless frozen; [`Error::Gone`].
    pub fn clear_exit_kill(&mut self) -> Result<()> {
        self.must_be_frozen("clearing EXITKILL")?;
        self.options.exit_kill = false;
        for thread in self.threads.iter().skip(1) {
            twice(|| ptrace::set_options(thread.tid, self.options.bits()))?;
        }
        Ok(())
    }

    pub(crate) fn set_options(&self, options: SeizeOptions) -> Result<()> {
        for thread in &self.threads {
            twice(|| ptrace::set_options(thread.tid, options.bits()))?;
        }
        Ok(())
    }

    /// Lets a rebuilt process run. Without `hold_leader` all threads are let go (clear EXITKILL first). With it the leader
    /// stays seized with EXITKILL: when this thread dies, so does the process.
    ///
    /// # Errors
    /// [`Error::WrongState`] unless frozen. After another error some threads may run already.
    pub fn release(mut self, hold_leader: bool) -> Result<Option<Held>> {
        self.must_be_frozen("releasing")?;
        if !hold_leader {
            self.let_go()?;
            return Ok(None);
        }
        let _urgent = Urgent::enter();
        let leader = SeizeOptions {
            exit_kill: true,
            ..SeizeOptions::default()
        };
        let pid = self.threads[0].tid;
        twice(|| ptrace::set_options(pid, leader.bits()))?;
        for index in 0..self.threads.len() {
            self.settle(index, true)?;
        }
        // The leader first: it is already kept, whatever happens to the loop.
        let mut threads = std::mem::take(&mut self.threads).into_iter();
        let group = threads
            .next()
            .is_some_and(|leader| leader.stop == Some(Stop::Group));
        let mut first = Ok(());
        if group {
            first = first.and(twice(|| ptrace::listen(pid)));
        } else {
            first = first.and(twice(|| ptrace::resume(pid, 0)));
        }
        for thread in threads {
            match twice(|| ptrace::detach(thread.tid)) {
                Err(error) if error.is_gone() => {}
                result => first = first.and(result),
            }
        }
        self.frozen_at = None;
        first?;
        Ok(Some(Held {
            pid: self.pid,
            owed: None,
            _bound: PhantomData,
        }))
    }

    /// Kills the process and waits until its threads are gone. If this process is its parent, its status is reaped too.
    ///
    /// # Errors
    /// [`Error::Silent`] when it does not die.
    pub fn kill(mut self) -> Result<()> {
        match self.send(libc::SIGKILL) {
            Err(error) if error.is_gone() => {}
            result => result?,
        }
        // The leader last: it is reported only when all others are gone.
        for thread in std::mem::take(&mut self.threads).into_iter().rev() {
            let mut patience = Patience::new(PATIENCE);
            while !matches!(ptrace::look(thread.tid), Ok(Report::Ended(_)) | Err(_)) {
                if !patience.nap() {
                    return Err(Error::Silent {
                        tid: thread.tid,
                        what: "its end",
                    });
                }
            }
        }
        Ok(())
    }

    /// Looks for the instructions an injection needs, in the vdso and in mapped files, `except` in one range.
    pub(crate) fn find_code(
        &self,
        except: Option<std::ops::Range<u64>>,
    ) -> Result<Option<CodePlaces>> {
        CodePlaces::find(self.pid, except)
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        // Nobody is left to be told; the kernel lets go of the rest when this thread ends.
        let _ = self.let_go();
    }
}

impl CodePlaces {
    /// Largest mapping that is searched, bytes.
    const LIMIT: u64 = 64 << 20;
    const SYSCALL: &[u8] = &[0x0f, 0x05];
    const SYSCALL_RETURN: &[u8] = &[0x0f, 0x05, 0xc3];
    /// `mov $15, %rax; syscall` as the C libraries have it, and as other assemblers shorten it.
    const SIGRETURN: [&[u8]; 2] = [
        &[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05],
        &[0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05],
    ];

    fn find(pid: i32, except: Option<std::ops::Range<u64>>) -> Result<Option<Self>> {
        let mut code: Vec<_> = procfs::maps(pid)?
            .into_iter()
            .filter(|vma| vma.exec && vma.read && vma.len() <= Self::LIMIT)
            .filter(|vma| vma.path == "[vdso]" || vma.path.starts_with('/'))
            // Written by whoever has it, and what a killed tracer left is unmapped by a call from elsewhere.
            .filter(|vma| vma.path != leftover::SHARED_ANONYMOUS)
            .filter(|vma| {
                except
                    .as_ref()
                    .is_none_or(|range| vma.end <= range.start || range.end <= vma.start)
            })
            // Its own dynamic linker has all of it and is small; the vdso is there whatever else is.
            .collect();
        code.sort_by_key(|vma| (vma.path != "[vdso]", vma.shared, vma.len()));
        let memory = RemoteMemory::open(pid)?;
        let (mut syscall, mut syscall_return, mut sigreturn) = (None, None, None);
        for vma in code {
            let mut bytes = vec![0; vma.len() as usize];
            match memory.read(vma.start, &mut bytes) {
                Ok(()) => {}
                Err(Error::Unreadable { .. }) => continue,
                Err(error) => return Err(error),
            }
            let at =
                |pattern: &[u8]| position(&bytes, pattern).map(|offset| vma.start + offset as u64);
            syscall = syscall.or_else(|| at(Self::SYSCALL));
            syscall_return = syscall_return.or_else(|| at(Self::SYSCALL_RETURN));
            sigreturn =
                sigreturn.or_else(|| Self::SIGRETURN.iter().find_map(|pattern| at(pattern)));
            if syscall.is_some() && syscall_return.is_some() && sigreturn.is_some() {
                break;
            }
        }
        Ok(syscall.map(|syscall| Self {
            syscall,
            homing: syscall_return.zip(sigreturn),
        }))
    }

    /// Whether the instructions are still where they were found.
    pub(crate) fn still_there(&self, memory: &RemoteMemory) -> bool {
        let holds = |address: u64, patterns: &[&[u8]]| {
            patterns.iter().any(|pattern| {
                let mut bytes = vec![0; pattern.len()];
                memory.read(address, &mut bytes).is_ok() && bytes == *pattern
            })
        };
        holds(self.syscall, &[Self::SYSCALL])
            && self.homing.is_none_or(|(syscall_return, sigreturn)| {
                holds(syscall_return, &[Self::SYSCALL_RETURN]) && holds(sigreturn, &Self::SIGRETURN)
            })
    }
}

fn position(bytes: &[u8], pattern: &[u8]) -> Option<usize> {
    bytes
        .windows(pattern.len())
        .position(|window| window == pattern)
}

/// The highest 64-byte aligned place for `len` bytes below the 128 bytes under a stack pointer that functions may use
/// without asking (the red zone of the System V ABI).
pub(crate) fn below_red_zone(stack_pointer: u64, len: u64) -> u64 {
    stack_pointer.wrapping_sub(128 + len) & !63
}

/// Where the stack begins that a thread certainly runs on, so that nothing lies between there and its red zone: the main
/// stack, or one that the C library made for a thread, which holds the thread's control block further up. A coroutine's
/// stack may end anywhere, with somebody else's memory below it.
pub(crate) fn stack_start(maps: &[procfs::Vma], registers: &Registers) -> Option<u64> {
    let Registers { rsp, fs_base, .. } = *registers;
    maps.iter()
        .find(|vma| {
            let contains = |address| (vma.start..vma.end).contains(&address);
            vma.write
                && contains(rsp.wrapping_sub(1))
                && (vma.path == "[stack]" || (contains(fs_base) && rsp < fs_base))
        })
        .map(|vma| vma.start)
}

/// Where a thread can be given a shortened timeout: on its own stack, but so far below that neither a signal handler that
/// comes before the call nor an injection's signal frame reaches it.
fn timeout_place(maps: &[procfs::Vma], registers: &Registers) -> Option<u64> {
    const FAR: u64 = 64 << 10;
    const NEAR: u64 = 24 << 10;
    let start = stack_start(maps, registers)?;
    let distance = (registers.rsp - start).saturating_sub(256).min(FAR);
    (distance >= NEAR).then(|| below_red_zone(registers.rsp, distance))
}

/// A restartable sequence registration and what the thread had put into it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rseq {
    /// Where the pointer to the running sequence is, 0 = none registered.
    pub(crate) place: u64,
    /// The pointer; not 0 = a sequence runs, or ran and has not been cleared yet.
    pub(crate) pointer: u64,
}

impl Rseq {
    /// `offsetof(struct rseq, rseq_cs)`, linux/rseq.h.
    const POINTER_OFFSET: u64 = 8;

    pub(crate) fn of(tid: i32, memory: &RemoteMemory) -> Result<Self> {
        let configuration = ptrace::rseq(tid)?;
        if configuration.address == 0 {
            return Ok(Self::default());
        }
        let place = configuration.address + Self::POINTER_OFFSET;
        Ok(Self {
            place,
            pointer: memory.read_value(RemotePtr::new(place))?,
        })
    }

    /// The registers, moved to the abort handler when they are inside the sequence.
    pub(crate) fn aborted(&self, memory: &RemoteMemory, registers: Registers) -> Registers {
        if self.pointer == 0 {
            return registers;
        }
        // struct rseq_cs: version and flags, start_ip, post_commit_offset, abort_ip. An address that cannot be read is the
        // program's own undoing, to be found by its own kernel.
        let Ok([_, start, len, abort]) =
            memory.read_value(RemotePtr::<[u64; 4]>::new(self.pointer))
        else {
            return registers;
        };
        if registers.rip.wrapping_sub(start) < len {
            Registers {
                rip: abort,
                ..registers
            }
        } else {
            registers
        }
    }
}

/// A running process whose leader stays seized with EXITKILL until it may live without us.
#[derive(Debug)]
pub struct Held {
    pid: i32,
    /// A stop that was reported and not passed on yet.
    owed: Option<Stop>,
    _bound: PhantomData<*mut ()>,
}

/// How a held process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pumped {
    /// It runs, or sleeps, or is stopped by a signal of its own.
    Running,
    /// It has ended with this wait status.
    Exited(i32),
}

impl Held {
    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Passes on what the leader reports for about `timeout`: signals reach it, stopping signals stop it. While nobody pumps,
    /// its signals wait.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn pump(&mut self, timeout: Duration) -> Result<Pumped> {
        let mut patience = Patience::new(timeout);
        loop {
            if let Some(stop) = self.owed {
                self.pass_on(stop)?;
                self.owed = None;
            }
            choke::pass(Kind::Ptrace).map_err(|errno| Error::kernel("waitpid", self.pid, errno))?;
            loop {
                match ptrace::look(self.pid)
                    .map_err(|errno| Error::kernel("waitpid", self.pid, errno))?
                {
                    Report::Ended(status) => return Ok(Pumped::Exited(status)),
                    Report::Stopped(stop) => {
                        // Told only once: what cannot be passed on now is on the next call.
                        self.owed = Some(stop);
                        break;
                    }
                    Report::Running => {
                        if !patience.nap() {
                            return Ok(Pumped::Running);
                        }
                    }
                }
            }
        }
    }

    fn pass_on(&self, stop: Stop) -> Result<()> {
        let result = match stop {
            Stop::Group => twice(|| ptrace::listen(self.pid)),
            Stop::Signal(signal) => {
                settle_ignored(self.pid, self.pid, signal)?;
                twice(|| ptrace::resume(self.pid, signal))
            }
            Stop::Trap | Stop::Syscall | Stop::Event(_) => twice(|| ptrace::resume(self.pid, 0)),
        };
        match result {
            // Killed between the look and now: the next look says so.
            Err(error) if error.is_gone() => Ok(()),
            result => result,
        }
    }

    /// Lets go of the leader: the process no longer depends on us.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Silent`]. It is then still held and may be released again.
    pub fn release(&mut self) -> Result<()> {
        if let Some(stop) = self.owed {
            self.pass_on(stop)?;
            self.owed = None;
        }
        let mut tracee = Tracee::adopted(self.pid, SeizeOptions::default());
        tracee.hold(0)?;
        tracee.let_go()
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Freezing

/// Processes that are frozen together, by one thread and within one budget.
pub(crate) trait Group {
    /// All of them, the root first.
    fn members(&mut self) -> &mut [Tracee];

    /// Seizes processes that belong to the group and are not of it yet; how many.
    fn find_newcomers(&mut self) -> Result<usize>;

    /// Forgets a process that has ended; false for the root, without which there is no group, and for strangers.
    fn lose(&mut self, pid: i32) -> bool;
}

impl Group for Tracee {
    fn members(&mut self) -> &mut [Tracee] {
        std::slice::from_mut(self)
    }

    fn find_newcomers(&mut self) -> Result<usize> {
        Ok(0)
    }

    fn lose(&mut self, _pid: i32) -> bool {
        false
    }
}

/// See [`Tracee::freeze`].
pub(crate) fn freeze(group: &mut impl Group, budget: Duration, attempts: u32) -> Result<Instant> {
    // All are frozen, or none is.
    if let Some(at) = group.members().first().and_then(|root| root.frozen_at) {
        return Ok(at);
    }
    let _urgent = Urgent::enter();
    let mut pause = Duration::from_millis(5);
    let mut attempt = 1;
    loop {
        let error = match try_freeze(group, budget) {
            Ok(at) => return Ok(at),
            Err(error) => error,
        };
        let mut running = Ok(());
        for member in group.members() {
            member.frozen_at = None;
            let result = member.run_on();
            running = running.and(result);
        }
        running?;
        if matches!(&error, Error::Gone { pid } if group.lose(*pid)) {
            continue;
        }
        if attempt >= attempts || !matches!(error, Error::NotFrozen { .. }) {
            return Err(error);
        }
        attempt += 1;
        // A thread that had not stopped yet will stop while we pause, and must not be kept.
        let mut patience = Patience::new(pause);
        while patience.nap() {
            let mut index = 0;
            while let Some(member) = group.members().get_mut(index) {
                match member.pump() {
                    Err(Error::Gone { pid }) if group.lose(pid) => {}
                    result => {
                        result?;
                        index += 1;
                    }
                }
            }
        }
        pause = FREEZE_PAUSE_MAX.min(pause * 2);
    }
}

fn try_freeze(group: &mut impl Group, budget: Duration) -> Result<Instant> {
    group.find_newcomers()?;
    find_hosts(group.members())?;
    for member in group.members() {
        member.seize_new_threads()?;
        member.look_before_touching(budget)?;
    }
    let began = Instant::now();
    let mut patience = Patience::new(budget);
    let mut all_maps = Vec::new();
    loop {
        // All are told before the first is waited for.
        for member in group.members() {
            member.frozen_at = Some(began);
            for index in 0..member.threads.len() {
                member.interrupt(index)?;
            }
        }
        for member in group.members() {
            member.collect_stops(&mut patience)?;
        }
        if group.find_newcomers()? > 0 {
            continue;
        }
        all_maps.clear();
        for member in group.members() {
            all_maps.push(member.leave_vdso(&mut patience)?);
        }
        // A thread that was let out of the vdso may have come as far as a fork.
        if group.find_newcomers()? == 0 {
            break;
        }
    }
    for member in group.members() {
        member.note_sleep();
        member.list_tids();
        if member.threads.is_empty() {
            return Err(Error::Gone { pid: member.pid });
        }
    }
    // Now that none is made, ends or executes another program.
    find_hosts(group.members())?;
    remove_leftovers(group, &all_maps)?;
    Ok(began)
}

/// Finds out who is in the memory of whom, by search, since the order of running processes may change meanwhile.
fn find_hosts(members: &mut [Tracee]) -> Result<()> {
    if members.len() == 1 {
        members[0].host = None;
        return Ok(());
    }
    let mut firsts: Vec<i32> = Vec::with_capacity(members.len());
    for member in members {
        let pid = member.pid;
        let mut failure = None;
        let place = firsts.binary_search_by(|&first| {
            descriptor::memory_order(first, pid).unwrap_or_else(|error| {
                failure.get_or_insert(error);
                std::cmp::Ordering::Equal
            })
        });
        member.host = match (failure, place) {
            // One of the two has ended, which is found out when it is to be stopped.
            (Some(error), _) if error.is_gone() => None,
            (Some(error), _) => return Err(error),
            (None, Ok(place)) => Some(firsts[place]),
            (None, Err(place)) => {
                firsts.insert(place, pid);
                None
            }
        };
    }
    Ok(())
}

/// Takes out the agents that killed tracers have left. A thread that is still on its way out of one needs time to run, which the
/// next attempt gives it; and so does one of another process in the same memory.
fn remove_leftovers(group: &mut impl Group, all_maps: &[Vec<procfs::Vma>]) -> Result<()> {
    let mut found = Vec::new();
    for (index, maps) in all_maps.iter().enumerate() {
        let agents = leftover::find(group.members()[index].pid, maps)?;
        if !agents.is_empty() {
            found.push((index, agents));
        }
    }
    for (index, agents) in &found {
        for (other, _) in &found {
            let (pid, tenant) = (group.members()[*index].pid, &group.members()[*other]);
            if other != index && !descriptor::same_memory(pid, tenant.pid)? {
                continue;
            }
            if let Some(tid) = tenant.in_leftover(agents, &all_maps[*index])? {
                return Err(tenant.not_frozen(tid));
            }
        }
    }
    for (index, agents) in found {
        let member = &mut group.members()[index];
        // Another process in this memory may have done it by now.
        let maps = procfs::maps(member.pid)?;
        let is_left = leftover::find(member.pid, &maps)?;
        if is_left == agents {
            Injection::unmap_leftovers(member, &agents)?;
        }
    }
    Ok(())
}

// ---------------------------------------------------------------------------------------------------------------------

/// Does `call`, and once more if it fails: for steps after which a process must be as it was.
pub(crate) fn twice<T>(mut call: impl FnMut() -> Result<T>) -> Result<T> {
    call().or_else(|error| if error.is_gone() { Err(error) } else { call() })
}

pub(crate) fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// Signals whose default is to do nothing.
const IGNORED_BY_DEFAULT: [i32; 4] = [libc::SIGCHLD, libc::SIGCONT, libc::SIGURG, libc::SIGWINCH];

/// Whether a signal waits that will really do something to this thread, given the signals it blocks.
fn deliverable(pid: i32, tid: i32, blocked: u64) -> Result<bool> {
    let status = procfs::status(pid, tid)?;
    let by_default = IGNORED_BY_DEFAULT
        .iter()
        .fold(0, |mask, &signal| mask | bit(signal));
    let ignored = status.sig_ign | (by_default & !status.sig_cgt);
    Ok((status.sig_pnd | status.shd_pnd) & !blocked & !ignored != 0)
}

fn settle_ignored(pid: i32, tid: i32, signal: i32) -> Result<()> {
    let registers = ptrace::registers(tid)?;
    if interrupted::leaked(&registers).is_none() {
        return Ok(());
    }
    let status = procfs::status(pid, tid)?;
    let does_nothing = status.sig_ign & bit(signal) != 0
        || (IGNORED_BY_DEFAULT.contains(&signal) && status.sig_cgt & bit(signal) == 0);
    if does_nothing && !deliverable(pid, tid, status.sig_blk)? {
        ptrace::set_registers(tid, &interrupted::rewound(&registers))?;
    }
    Ok(())
}

/// Lets go of a process that was attached because a thread of ours forked it.
fn release_child(pid: i32) -> Result<()> {
    match twice(|| ptrace::wait(pid, PATIENCE))? {
        Report::Stopped(_) => match twice(|| ptrace::detach(pid)) {
            Err(error) if error.is_gone() => Ok(()),
            result => result,
        },
        Report::Ended(_) => Ok(()),
        Report::Running => Err(Error::Silent {
            tid: pid,
            what: "its first stop",
        }),
    }
}

/// Does `seize` in such a way that it cannot hang: a thread inside execve(2) holds a lock PTRACE_SEIZE needs until its
/// siblings have been reaped, and those that we trace are ours to reap. Another thread of this process may do that.
fn reaping<T>(pid: i32, seize: impl FnOnce() -> T) -> T {
    /// A SEIZE takes microseconds; this is only ever reached by an execve.
    const QUICK: Duration = Duration::from_millis(20);
    let (done, finished) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while finished.recv_timeout(QUICK) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                let Ok(tids) = procfs::tids(pid) else {
                    continue;
                };
                for tid in tids.into_iter().filter(|&tid| tid != pid) {
                    if procfs::stat(pid, tid).is_ok_and(|stat| stat.state == 'Z') {
                        // Its end is not remembered: the next look at it finds it gone.
                        let _ = ptrace::look(tid);
                    }
                }
            }
        });
        let result = seize();
        drop(done);
        result
    })
}

fn scheduler_clock(pid: i32, tid: i32) -> Option<SchedulerClock> {
    choke::pass(Kind::Proc).ok()?;
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/sched")).ok()?;
    let value = |key: &str| {
        let line = text
            .lines()
            .find(|line| line.split_whitespace().next() == Some(key))?;
        line.rsplit(':').next().map(str::trim)
    };
    // Milliseconds with six decimals.
    let (whole, fraction) = value("se.exec_start")?.split_once('.')?;
    let nanoseconds = whole.parse::<u64>().ok()? * 1_000_000 + fraction.parse::<u64>().ok()?;
    Some(SchedulerClock {
        last_run: Duration::from_nanos(nanoseconds),
        sleeps: value("nr_voluntary_switches")?.parse().ok()?,
    })
}

/// SCHED_FIFO while it lives: with busy threads on every processor, stopping and releasing a thousand of them takes
/// milliseconds instead of seconds. Without the right to it, nothing changes.
struct Urgent {
    previous: Option<(i32, i32)>,
    _bound: PhantomData<*mut ()>,
}

impl Urgent {
    fn enter() -> Self {
        let mut parameters = libc::sched_param { sched_priority: 0 };
        // SAFETY: 0 = this thread; the parameter block outlives the calls.
        let previous = unsafe {
            let policy = libc::sched_getscheduler(0);
            libc::sched_getparam(0, &raw mut parameters);
            policy
        };
        let urgent = libc::sched_param { sched_priority: 1 };
        // SAFETY: as above.
        let entered = unsafe {
            libc::sched_setscheduler(
                0,
                libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK,
                &raw const urgent,
            )
        };
        Self {
            previous: (previous >= 0 && entered == 0)
                .then_some((previous, parameters.sched_priority)),
            _bound: PhantomData,
        }
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        if let Some((policy, priority)) = self.previous {
            let parameters = libc::sched_param {
                sched_priority: priority,
            };
            // SAFETY: as in `enter`.
            unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
        }
    }
}
