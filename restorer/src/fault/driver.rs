//! The shell around the engine: reads what the kernel tells, does what the engine says. It hides userfaultfd, file
//! descriptors and channels, and decides nothing itself.
//!
//! One task does it all, so that a fault goes from the kernel to the outgoing stream without changing threads. It never
//! waits in the middle of an action; between two bulk installs it looks for faults.
//!
//! Who waits for whom: a program thread in fork, mremap, munmap or madvise is blocked until its event has been *read*,
//! and while one is unread every install is refused. So each refused install is followed by a read, never by a plain
//! retry.
//!
//! **Must never do:** close a userfaultfd of a process that still lacks pages, because the kernel then turns them into
//! zeros without a word. A driver that is dropped before its time keeps them open for as long as this process lives;
//! whoever drops it has to end the restored process first.
//!
//! Known limit: a guard region (MADV_GUARD_INSTALL) made by the program while memory is still missing raises no event.
//! Before a page that nobody waits for is installed, the range is searched for guards; a guard made between the search
//! and the install is lost (its page gets the old content). The same holds for the first prefetched pages of a child,
//! until it is known which process the child is.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::future::poll_fn;
use std::ops::Range;
use std::os::fd::{AsFd as _, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pageferry_image::page::{PAGE_LEN, PAGE_SIZE, PageRange};
use pageferry_tracee::pagemap::{self, GUARD, PRESENT, SWAPPED, Scan};
use pageferry_tracee::procfs;
use pageferry_tracee::uffd::{Copied, Event, Uffd};
use pageferry_wire::limits::{OBJECTS_MAX, USER_ADDRESS_END};
use pageferry_wire::message::Fetch;
use pageferry_wire::pages::{PageBatch, PageKind};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::time::{Interval, MissedTickBehavior};

use super::engine::{
    Action, BadPeer, Engine, LostPages, Missing, Options, Priority, ReplyId, RequestId, Run,
    RunKind, SpaceId, Stop,
};

/// Actions done before the task looks for faults and lets others run.
const ACTIONS_PER_TURN: usize = 64;
/// Refused installs after which the task sleeps instead of only yielding: the thread that is to leave its call needs
/// the processor.
const REFUSALS_BEFORE_SLEEP: u32 = 64;
/// How long it then sleeps.
const REFUSED_PAUSE: Duration = Duration::from_millis(1);
/// How long it waits for memory on a host that has none.
const NO_MEMORY_PAUSE: Duration = Duration::from_millis(20);
/// Attempts to find out which process a child's context belongs to.
const IDENTIFICATIONS_MAX: u32 = 8;
/// Processes up to which those that have ended are not looked for.
const SWEEP_MIN: usize = 16;
/// The engine's beat: far longer than a fault takes between neighbouring hosts, far shorter than anybody would notice.
const BEAT: Duration = Duration::from_millis(2);
/// Pause between two looks at memory whose processes have ended.
const OWNERLESS_PAUSE: Duration = Duration::from_millis(100);
/// Pages at which memory is asked whether it is still there: the lowest and the highest that may be mapped, where almost surely
/// nothing is.
const PROBES: [u64; 2] = [0x1_0000, 0x7fff_ffff_e000];
/// Bits of an address, and of what names a page within its object.
const OBJECT_SHIFT: u32 = 48;
const _: () = assert!(
    USER_ADDRESS_END < 1 << OBJECT_SHIFT && (OBJECTS_MAX as u64) < 1 << (64 - OBJECT_SHIFT)
);
/// Damaged batches after which the link is not believed any more.
const SPOILED_MAX: u32 = 8;

/// Memory to fill: that of a process, or of several.
#[derive(Debug)]
pub struct Memory {
    /// The source's object from which it is filled, counted from 1.
    pub object: u32,
    /// The processes that have it, one at least, by their numbers as this process sees them.
    pub pids: Vec<i32>,
    /// Its run userfaultfd, events on, from which nothing has been read yet.
    pub uffd: Uffd,
    /// What is registered: private anonymous memory only.
    pub lazy: Vec<PageRange>,
    /// First bytes of the pages in `lazy` that are there already.
    pub resident: Vec<u64>,
    /// Ranges with MADV_WIPEONFORK.
    pub wipe_on_fork: Vec<PageRange>,
}

/// The way to the source and back. What becomes of the frames in between is the caller's business.
#[derive(Debug)]
pub struct Connections {
    /// Pages that threads wait for. The engine bounds it: one for each thread that waits.
    pub fault_fetches: mpsc::UnboundedSender<Fetch>,
    /// Their answers. Its end means that the source is lost.
    pub fault_pages: mpsc::Receiver<PageBatch>,
    /// Everything else that is asked for. The engine bounds it: [`Options::bulk_requests_max`].
    pub bulk_fetches: mpsc::UnboundedSender<Fetch>,
    /// Their answers. Its end means that the source is lost.
    pub bulk_pages: mpsc::Receiver<PageBatch>,
}

/// Why a process cannot be filled any more. It must be ended before the driver's process ends: it would read zeros.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FaultError {
    /// The kernel refused something that an intact context does not refuse.
    #[error("{doing} of pid {pid} failed")]
    Kernel {
        /// What was tried.
        doing: &'static str,
        /// The restored process; its children share its fate.
        pid: i32,
        /// What the kernel said.
        source: pageferry_tracee::Error,
    },
    /// The runtime cannot watch a userfaultfd.
    #[error("the page faults of pid {pid} cannot be watched")]
    Watch {
        /// The restored process.
        pid: i32,
        /// Why not.
        source: std::io::Error,
    },
}

/// The final count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Summary {
    /// Pages that held data on the source, in the memory filled on demand; those there from the start included.
    pub pages_total: u64,
    /// Distinct pages a thread waited for over the network.
    pub pages_faulted: u64,
    /// Pages filled from the source, counted for each process they went to.
    pub pages_installed: u64,
    /// Faults answered with zeros.
    pub pages_zero: u64,
    /// Pages the source could not read.
    pub pages_lost: u64,
    /// Bytes that arrived and were wanted nowhere.
    pub duplicate_bytes: u64,
    /// Processes that forked while memory was missing.
    pub forks: u64,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// As in [`Summary`]; grows until the page map is complete.
    pub pages_total: u64,
    /// How many of them are here.
    pub pages_resident: u64,
    /// As in [`Summary`].
    pub pages_faulted: u64,
    /// Pages at which threads wait now.
    pub pages_waiting: u64,
}

#[derive(Debug, Default)]
struct Gauges {
    total: AtomicU64,
    resident: AtomicU64,
    faulted: AtomicU64,
    waiting: AtomicU64,
}

#[derive(Debug)]
enum Command {
    Map(Vec<PageRange>),
    MapEnd,
    Drain(bool),
    LostPages(LostPages),
    LinkLost,
    LinkRestored(Connections),
    Ended(i32),
}

/// Steers a running driver, from any thread. None of its calls waits; a driver that has ended ignores them.
#[derive(Debug, Clone)]
pub struct DriverHandle {
    // Unbounded because the caller may be the very task that polls the driver. Only map pieces come from the peer, and
    // they are taken at once.
    commands: mpsc::UnboundedSender<Command>,
    gauges: Arc<Gauges>,
}

impl DriverHandle {
    /// A piece of the source's page map: the ranges of `object` that hold data, ascending over all calls, first by object.
    pub fn map(&self, object: u32, ranges: &[PageRange]) {
        let source = ranges.iter().map(|&range| source_of(object, range));
        self.send(Command::Map(source.collect()));
    }

    /// The page map is complete.
    pub fn map_end(&self) {
        self.send(Command::MapEnd);
    }

    /// Whether pages are fetched that nobody has touched.
    pub fn drain(&self, on: bool) {
        self.send(Command::Drain(on));
    }

    /// What happens to threads that touch a page the source cannot read.
    pub fn lost_pages(&self, policy: LostPages) {
        self.send(Command::LostPages(policy));
    }

    /// The source cannot be reached. Threads that touch missing pages wait.
    pub fn link_lost(&self) {
        self.send(Command::LinkLost);
    }

    /// The source can be reached again; what was asked is asked again.
    pub fn link_restored(&self, connections: Connections) {
        self.send(Command::LinkRestored(connections));
    }

    /// This restored process has exited: only the others, children, and whoever shares its memory still need pages.
    pub fn ended(&self, pid: i32) {
        self.send(Command::Ended(pid));
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        Progress {
            pages_total: self.gauges.total.load(Ordering::Relaxed),
            pages_resident: self.gauges.resident.load(Ordering::Relaxed),
            pages_faulted: self.gauges.faulted.load(Ordering::Relaxed),
            pages_waiting: self.gauges.waiting.load(Ordering::Relaxed),
        }
    }

    fn send(&self, command: Command) {
        // Fails only when the driver has ended, and then there is nothing left to steer.
        let _ = self.commands.send(command);
    }
}

/// A [`Uffd`] as [`AsyncFd`] wants to see it. The descriptor stays the same for as long as this exists.
#[derive(Debug)]
struct Watched(Uffd);

impl AsRawFd for Watched {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// A process that is being filled.
#[derive(Debug)]
struct Process {
    uffd: AsyncFd<Watched>,
    /// What was registered in it, or in the one it was forked from.
    lazy: Arc<[PageRange]>,
    /// To look for guards in its memory; `None` while it is not known which process a child's context belongs to.
    pagemap: Option<File>,
    identifications_left: u32,
}

enum Turn {
    /// There may be more to do at once.
    Busy,
    /// An install was refused until events have been read.
    Refused(SpaceId),
    /// The host has no memory for a page.
    NoMemory,
    /// Nothing to do until something happens.
    Idle,
}

/// Fills a tree of processes until they lack nothing.
#[derive(Debug)]
pub struct Driver {
    /// The root.
    pid: i32,
    restored: BTreeMap<i32, SpaceId>,
    engine: Engine,
    processes: BTreeMap<SpaceId, Process>,
    /// Descendants whose context is known.
    pids: BTreeSet<i32>,
    /// Contexts that nobody can serve: kept open, because closing one means zeros.
    unserved: Vec<Uffd>,
    batches: HashMap<ReplyId, PageBatch>,
    /// When each page that a thread waits for was asked for.
    asked: HashMap<RequestId, Instant>,
    beat: Interval,
    connections: Option<Connections>,
    commands: mpsc::UnboundedReceiver<Command>,
    gauges: Arc<Gauges>,
    guards: bool,
    map_ended: bool,
    resident_at_start: u64,
    forks: u64,
    /// How many processes there may be before those that have ended are looked for.
    sweep_at: usize,
    /// Memory whose processes, as far as we know them, have all ended; one that was made in it on this host (CLONE_VM, and between
    /// vfork(2) and execve) may still be there, which nobody tells us.
    ownerless: BTreeSet<SpaceId>,
    ownerless_look: Interval,
    spoiled: u32,
    events: Vec<Event>,
}

impl Driver {
    /// Takes charge of the memory of processes that stand ready, not yet running. Must be called inside a tokio runtime with I/O and
    /// time enabled.
    ///
    /// # Errors
    /// [`FaultError`]. The contexts stay open then.
    pub fn new(
        memories: Vec<Memory>,
        connections: Connections,
        options: Options,
    ) -> Result<(Self, DriverHandle), FaultError> {
        let (sender, commands) = mpsc::unbounded_channel();
        let gauges = Arc::new(Gauges::default());
        let pages = |memory: &Memory| -> Vec<PageRange> {
            let pages = memory.resident.iter();
            pages.map(|&page| PageRange::page_of(page)).collect()
        };
        let here: Vec<Vec<PageRange>> = memories.iter().map(pages).collect();
        let missing: Vec<Missing<'_>> = memories
            .iter()
            .zip(&here)
            .map(|(memory, here)| Missing {
                registered: &memory.lazy,
                resident: here,
                wipe_on_fork: &memory.wipe_on_fork,
                source_offset: source_offset(memory.object),
            })
            .collect();
        let pids = memories
            .iter()
            .flat_map(|memory| memory.pids.iter().copied());
        let pids: BTreeSet<i32> = pids.collect();
        let root = memories.first().and_then(|memory| memory.pids.first());
        let mut driver = Self {
            pid: root.copied().unwrap_or(0),
            engine: Engine::new(&missing, options),
            restored: BTreeMap::new(),
            processes: BTreeMap::new(),
            pids,
            unserved: Vec::new(),
            batches: HashMap::new(),
            asked: HashMap::new(),
            beat: tokio::time::interval(BEAT),
            connections: Some(connections),
            commands,
            gauges: Arc::clone(&gauges),
            guards: false,
            map_ended: false,
            resident_at_start: here.iter().map(|pages| pages.len() as u64).sum(),
            forks: 0,
            sweep_at: SWEEP_MIN.max(2 * memories.len()),
            ownerless: BTreeSet::new(),
            ownerless_look: tokio::time::interval(OWNERLESS_PAUSE),
            spoiled: 0,
            events: Vec::new(),
        };
        for interval in [&mut driver.beat, &mut driver.ownerless_look] {
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        let mut failure = None;
        for (space, memory) in (SpaceId::ROOT.0..).map(SpaceId).zip(memories) {
            let pids = memory.pids.iter().map(|&pid| (pid, space));
            driver.restored.extend(pids);
            // Also after an error: no context may be closed.
            if let Err(error) = driver.watch(space, memory.uffd, memory.lazy.into()) {
                failure.get_or_insert(error);
            }
        }
        if let Some(error) = failure {
            return Err(error);
        }
        driver.guards = pagemap::knows_guards().unwrap_or_else(|error| {
            tracing::warn!("guard regions cannot be looked for: {error}");
            false
        });
        if driver.guards {
            for (&pid, space) in &driver.restored {
                let pagemap = pagemap::open(pid)
                    .map_err(|source| driver.failed("opening the page map", source))?;
                if let Some(process) = driver.processes.get_mut(space) {
                    process.pagemap.get_or_insert(pagemap);
                }
            }
        }
        Ok((
            driver,
            DriverHandle {
                commands: sender,
                gauges,
            },
        ))
    }

    /// Fills the processes and their children until nothing is missing anywhere or all have ended, then takes the
    /// userfaultfds away.
    ///
    /// Loss of the source is not an end: threads that touch missing pages wait for [`DriverHandle::link_restored`].
    ///
    /// # Errors
    /// [`FaultError`]: pages are missing and nobody will bring them. End the restored process.
    pub async fn run(mut self) -> Result<Summary, FaultError> {
        let mut refusals = 0;
        loop {
            poll_fn(|context| Poll::Ready(self.gather(context).map(drop))).await?;
            let turn = self.act()?;
            self.publish();
            if self.engine.is_complete() {
                break;
            }
            match turn {
                Turn::Busy => {
                    refusals = 0;
                    tokio::task::yield_now().await;
                }
                Turn::Refused(space) => {
                    refusals += 1;
                    self.read_events(space)?;
                    if refusals < REFUSALS_BEFORE_SLEEP {
                        tokio::task::yield_now().await;
                    } else {
                        tokio::time::sleep(REFUSED_PAUSE).await;
                    }
                }
                Turn::NoMemory => {
                    tracing::warn!(
                        pid = self.pid,
                        "this host has no memory for the next page; threads wait"
                    );
                    tokio::time::sleep(NO_MEMORY_PAUSE).await;
                }
                Turn::Idle => {
                    refusals = 0;
                    poll_fn(|context| match self.gather(context) {
                        Ok(false) => Poll::Pending,
                        Ok(true) => Poll::Ready(Ok(())),
                        Err(error) => Poll::Ready(Err(error)),
                    })
                    .await?;
                }
            }
        }
        Ok(self.finish())
    }

    /// Takes in all that has happened, and asks to be woken by the next thing. True if there was anything.
    fn gather(&mut self, context: &mut Context<'_>) -> Result<bool, FaultError> {
        let mut any = false;
        while let Poll::Ready(Some(command)) = self.commands.poll_recv(context) {
            any = true;
            self.obey(command);
        }
        while let Some(arrived) = self.poll_batch(context) {
            any = true;
            match arrived {
                Some(batch) => self.accept(batch),
                None => self.lose_link("it closed the connection"),
            }
        }
        if !self.engine.wants_beats() {
            self.beat.reset();
        }
        while self.engine.wants_beats() && self.beat.poll_tick(context).is_ready() {
            any = true;
            self.engine.handle_beat();
        }
        while !self.ownerless.is_empty() && self.ownerless_look.poll_tick(context).is_ready() {
            any = true;
            self.let_go_of_ownerless();
        }
        let spaces: Vec<SpaceId> = self.processes.keys().copied().collect();
        for space in spaces {
            while let Some(process) = self.processes.get(&space) {
                let mut ready = match process.uffd.poll_read_ready(context) {
                    Poll::Pending => break,
                    Poll::Ready(Err(source)) => {
                        return Err(FaultError::Watch {
                            pid: self.pid,
                            source,
                        });
                    }
                    Poll::Ready(Ok(ready)) => ready,
                };
                let mut events = std::mem::take(&mut self.events);
                let read = read_all(&process.uffd.get_ref().0, &mut events);
                // Only what was ready before the read is taken back: what has come since stays ready.
                ready.clear_ready();
                any |= !events.is_empty();
                self.take_events(space, events, read)?;
            }
        }
        Ok(any)
    }

    /// A batch, `Some(None)` for the end of a connection, `None` for nothing yet. Faults first.
    fn poll_batch(&mut self, context: &mut Context<'_>) -> Option<Option<PageBatch>> {
        let connections = self.connections.as_mut()?;
        if let Poll::Ready(batch) = connections.fault_pages.poll_recv(context) {
            return Some(batch);
        }
        match connections.bulk_pages.poll_recv(context) {
            Poll::Ready(batch) => Some(batch),
            Poll::Pending => None,
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Map(ranges) => {
                if let Err(error) = self.engine.handle_map(&ranges) {
                    self.disbelieve(error);
                }
            }
            Command::MapEnd => {
                self.map_ended = true;
                self.engine.handle_map_end();
            }
            Command::Drain(on) => self.engine.set_drain(on),
            Command::LostPages(policy) => self.engine.set_lost_pages(policy),
            Command::LinkLost => self.lose_link("its connections are gone"),
            Command::LinkRestored(connections) => {
                self.lose_link("it has new connections");
                self.connections = Some(connections);
                self.engine.handle_link_restored();
            }
            Command::Ended(pid) => {
                if let Some(space) = self.restored.remove(&pid) {
                    if self.restored.values().all(|&other| other != space) {
                        self.ownerless.insert(space);
                        self.let_go_of_ownerless();
                    }
                }
            }
        }
    }

    fn accept(&mut self, batch: PageBatch) {
        if let Some(asked) = self.asked.remove(&RequestId(batch.request())) {
            self.engine.handle_answer_time(asked.elapsed());
        }
        let runs: Vec<Run> = batch
            .runs()
            .iter()
            .map(|run| Run {
                page_count: run.range.page_count(),
                kind: kind(run.kind),
            })
            .collect();
        match self.engine.handle_reply(
            RequestId(batch.request()),
            source_of(batch.object(), batch.range()).start,
            &runs,
        ) {
            Ok(reply) => {
                self.batches.insert(reply, batch);
            }
            Err(error) => self.disbelieve(error),
        }
    }

    /// A peer that breaks the protocol is a lost peer: threads wait, nothing is guessed.
    fn disbelieve(&mut self, error: BadPeer) {
        tracing::error!(pid = self.pid, "the source broke the protocol: {error}");
        self.lose_link("it is not believed any more");
    }

    fn lose_link(&mut self, why: &str) {
        if self.connections.take().is_some() {
            tracing::warn!(pid = self.pid, "no pages from the source: {why}");
            self.asked.clear();
            self.engine.handle_link_lost();
        }
    }

    /// Reads one context until it has nothing more to tell.
    fn read_events(&mut self, space: SpaceId) -> Result<(), FaultError> {
        let Some(process) = self.processes.get(&space) else {
            return Ok(());
        };
        let mut events = std::mem::take(&mut self.events);
        let read = read_all(&process.uffd.get_ref().0, &mut events);
        self.take_events(space, events, read)
    }

    /// Hands on what was read, also when the reading ended in an error: it is told only once.
    fn take_events(
        &mut self,
        space: SpaceId,
        mut events: Vec<Event>,
        read: pageferry_tracee::Result<()>,
    ) -> Result<(), FaultError> {
        let mut result = read.map_err(|source| self.failed("reading the events", source));
        for event in events.drain(..) {
            // Also after an error: a child's context among them must not be dropped.
            result = result.and(self.take_event(space, event));
        }
        self.events = events;
        result
    }

    fn take_event(&mut self, space: SpaceId, event: Event) -> Result<(), FaultError> {
        match event {
            Event::Fault { address, .. } => self.engine.handle_fault(space, address),
            Event::Remap { from, to, len } => self.engine.handle_remap(
                space,
                PageRange {
                    start: from,
                    end: from + len,
                },
                to,
            ),
            Event::Remove { start, end } => {
                self.engine.handle_remove(space, PageRange { start, end })
            }
            Event::Unmap { start, end } => {
                self.engine.handle_unmap(space, PageRange { start, end })
            }
            Event::Fork { child } => match self.engine.handle_fork(space) {
                Some(id) => {
                    self.forks += 1;
                    let lazy = self
                        .processes
                        .get(&space)
                        .map(|parent| Arc::clone(&parent.lazy));
                    self.watch(id, child, lazy.unwrap_or_default())?;
                    self.sweep();
                }
                None => self.unserved.push(child),
            },
        }
        Ok(())
    }

    fn watch(
        &mut self,
        space: SpaceId,
        uffd: Uffd,
        lazy: Arc<[PageRange]>,
    ) -> Result<(), FaultError> {
        #[allow(
            deprecated,
            reason = "its successor is unsafe, to promise what `Watched` keeps: it owns one descriptor and never changes it"
        )]
        let watched = AsyncFd::try_with_interest(Watched(uffd), Interest::READABLE);
        match watched {
            Ok(uffd) => {
                self.processes.insert(
                    space,
                    Process {
                        uffd,
                        lazy,
                        pagemap: None,
                        identifications_left: IDENTIFICATIONS_MAX,
                    },
                );
                Ok(())
            }
            Err(error) => {
                let (Watched(uffd), source) = error.into_parts();
                self.unserved.push(uffd);
                Err(FaultError::Watch {
                    pid: self.pid,
                    source,
                })
            }
        }
    }

    /// Lets go of children that have ended or called execve: the kernel does not tell, and their descriptors add up in
    /// a program that forks all the time while the drain is off. Looks only when their number has doubled, so that a
    /// fork costs the same however many there are.
    fn sweep(&mut self) {
        if self.processes.len() < self.sweep_at {
            return;
        }
        let spaces: Vec<SpaceId> = self.processes.keys().copied().collect();
        self.let_go_of_gone(spaces);
        self.sweep_at = (2 * self.processes.len()).max(SWEEP_MIN);
    }

    fn let_go_of_ownerless(&mut self) {
        let spaces: Vec<SpaceId> = self.ownerless.iter().copied().collect();
        self.let_go_of_gone(spaces);
        let processes = &self.processes;
        self.ownerless.retain(|space| processes.contains_key(space));
    }

    /// Lets go of those of these that are memory no more.
    fn let_go_of_gone(&mut self, spaces: Vec<SpaceId>) {
        for space in spaces {
            // Zeros are right for any page that is not pending; memory that has ended says so instead.
            let probe = PROBES
                .into_iter()
                .find(|&probe| !self.engine.is_pending(space, probe));
            if let (Some(probe), Some(process)) = (probe, self.processes.get(&space)) {
                let page = addresses(PageRange::page_of(probe));
                if matches!(process.uffd.get_ref().0.zero(page), Ok(Copied::Gone)) {
                    self.forget(space);
                }
            }
        }
    }

    /// Carries out what the engine wants, for one turn.
    fn act(&mut self) -> Result<Turn, FaultError> {
        for _ in 0..ACTIONS_PER_TURN {
            let Some(action) = self.engine.poll_action() else {
                return Ok(Turn::Idle);
            };
            match action {
                Action::Fetch {
                    request,
                    source,
                    priority,
                } => self.fetch(request, source, priority),
                Action::Install {
                    space,
                    range,
                    reply,
                    source,
                    prefetch,
                } => {
                    match self.install(space, range, reply, source, prefetch)? {
                        // A large copy takes as long as several faults: look for them.
                        Turn::Busy if prefetch => return Ok(Turn::Busy),
                        Turn::Busy => {}
                        other => return Ok(other),
                    }
                }
                Action::Zero { space, range } => {
                    match self.fill(space, "giving zeros", |uffd| uffd.zero(addresses(range)))? {
                        Turn::Busy => {}
                        other => return Ok(other),
                    }
                }
                Action::Poison { space, range } => {
                    match self.fill(space, "poisoning", |uffd| uffd.poison(addresses(range)))? {
                        Turn::Busy => {}
                        other => return Ok(other),
                    }
                }
                Action::Wake { space, range } => {
                    if let Some(process) = self.processes.get(&space) {
                        let woken = process.uffd.get_ref().0.wake(addresses(range));
                        woken.map_err(|source| self.failed("waking threads", source))?;
                    }
                }
                Action::Lost { source } => tracing::error!(
                    pid = self.pid,
                    "the source cannot read its pages {:#x}..{:#x} any more; threads that touch them wait",
                    source.start,
                    source.end
                ),
                Action::Release { reply } => {
                    self.batches.remove(&reply);
                }
            }
        }
        Ok(Turn::Busy)
    }

    fn fetch(&mut self, request: RequestId, source: PageRange, priority: Priority) {
        let Some(connections) = &self.connections else {
            return;
        };
        let page_count = u32::try_from(source.page_count())
            .expect("the engine's requests are bounded by its options");
        let (object, address) = object_of(source.start);
        let fetch = Fetch {
            request: request.0,
            address,
            page_count,
            object,
        };
        let way = if priority == Priority::Fault {
            self.asked.insert(request, Instant::now());
            &connections.fault_fetches
        } else {
            &connections.bulk_fetches
        };
        if way.send(fetch).is_err() {
            self.lose_link("it takes no requests any more");
        }
    }

    fn install(
        &mut self,
        space: SpaceId,
        range: PageRange,
        reply: ReplyId,
        source: u64,
        prefetch: bool,
    ) -> Result<Turn, FaultError> {
        let wanted = PageRange {
            start: source,
            end: source + range.byte_len(),
        };
        let Some(bytes) = self
            .batches
            .get(&reply)
            .map(|batch| verified(batch, wanted))
        else {
            unreachable!("the engine installs only from replies it has not released");
        };
        let bytes = match bytes {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::error!(
                    pid = self.pid,
                    "pages arrived damaged and are fetched again: {error}"
                );
                self.engine.handle_spoiled(reply);
                self.spoiled += 1;
                if self.spoiled >= SPOILED_MAX {
                    self.lose_link("too many of its pages arrive damaged");
                }
                return Ok(Turn::Busy);
            }
        };
        if !prefetch || !self.guards {
            return self.fill(space, "installing pages", |uffd| {
                uffd.copy(range.start, &bytes)
            });
        }
        if self
            .processes
            .get(&space)
            .is_some_and(|process| process.pagemap.is_some())
        {
            if self.find_guards(space, range)? {
                return Ok(Turn::Busy);
            }
            return self.fill(space, "installing pages", |uffd| {
                uffd.copy(range.start, &bytes)
            });
        }
        let suspects = self.suspects(space, range);
        let turn = self.fill(space, "installing pages", |uffd| {
            uffd.copy(range.start, &bytes)
        })?;
        self.identify(space, range, suspects);
        Ok(turn)
    }

    /// Does one UFFDIO_* call that fills pages and tells the engine how it went.
    fn fill(
        &mut self,
        space: SpaceId,
        doing: &'static str,
        call: impl FnOnce(&Uffd) -> pageferry_tracee::Result<Copied>,
    ) -> Result<Turn, FaultError> {
        let Some(process) = self.processes.get(&space) else {
            self.engine.handle_gone(space);
            return Ok(Turn::Busy);
        };
        let answer =
            call(&process.uffd.get_ref().0).map_err(|source| self.failed(doing, source))?;
        let (bytes, stop, turn) = match answer {
            Copied::Done => (u64::MAX, None, Turn::Busy),
            Copied::Again(bytes) => (bytes, Some(Stop::Again), Turn::Refused(space)),
            Copied::NoMemory(bytes) => (bytes, Some(Stop::Again), Turn::NoMemory),
            Copied::Exists(bytes) => (bytes, Some(Stop::Exists), Turn::Busy),
            Copied::NoMapping(bytes) => (bytes, Some(Stop::NoMapping), Turn::Busy),
            Copied::Gone => {
                self.forget(space);
                return Ok(Turn::Busy);
            }
        };
        self.engine.handle_result(bytes / PAGE_SIZE, stop);
        Ok(turn)
    }

    /// The process has no memory any more.
    fn forget(&mut self, space: SpaceId) {
        self.engine.handle_gone(space);
        self.processes.remove(&space);
    }

    /// Looks for guard regions in a range nobody waits for. If there are any the engine has been told, and the install
    /// is off.
    fn find_guards(&mut self, space: SpaceId, range: PageRange) -> Result<bool, FaultError> {
        let Some(pagemap) = self
            .processes
            .get(&space)
            .and_then(|process| process.pagemap.as_ref())
        else {
            return Ok(false);
        };
        let scan = Scan {
            range: addresses(range),
            category_mask: GUARD,
            return_mask: GUARD,
            ..Scan::default()
        };
        let guards = match pagemap::scan(pagemap, &scan) {
            Ok(guards) => guards,
            // A process that is just ending; the install will tell.
            Err(error) => {
                tracing::debug!("guards cannot be looked for: {error}");
                return Ok(false);
            }
        };
        for guard in &guards {
            self.engine.handle_guarded(
                space,
                PageRange {
                    start: guard.start,
                    end: guard.end,
                },
            );
        }
        if !guards.is_empty() {
            self.engine.handle_result(0, None);
        }
        Ok(!guards.is_empty())
    }

    /// A FORK event does not tell the child's number. These are the descendants that may be it: unknown so far, and
    /// without the first page of `range`, which is about to be installed.
    fn suspects(&mut self, space: SpaceId, range: PageRange) -> Vec<(i32, File)> {
        let Some(process) = self.processes.get_mut(&space) else {
            return Vec::new();
        };
        if process.identifications_left == 0 {
            return Vec::new();
        }
        process.identifications_left -= 1;
        let mut unknown = BTreeSet::new();
        for &pid in &self.pids {
            // A parent may have ended meanwhile; its children then cannot be told apart, and are filled without looking
            // for guards.
            unknown.extend(procfs::children(pid).unwrap_or_default());
        }
        unknown.retain(|pid| !self.pids.contains(pid));
        let open = unknown
            .into_iter()
            .filter_map(|pid| Some((pid, pagemap::open(pid).ok()?)));
        open.filter(|(_, pagemap)| !is_present(pagemap, range.start))
            .collect()
    }

    /// The one in which the page has appeared is the child.
    fn identify(&mut self, space: SpaceId, range: PageRange, suspects: Vec<(i32, File)>) {
        let mut found = suspects
            .into_iter()
            .filter(|(_, pagemap)| is_present(pagemap, range.start));
        let (Some((pid, pagemap)), None) = (found.next(), found.next()) else {
            return;
        };
        if let Some(process) = self.processes.get_mut(&space) {
            process.pagemap = Some(pagemap);
            self.pids.insert(pid);
        }
    }

    fn publish(&self) {
        let counters = self.engine.counters();
        let resident = if self.map_ended {
            counters
                .pages_total
                .saturating_sub(self.engine.pages_pending())
        } else {
            (self.resident_at_start + counters.pages_installed).min(counters.pages_total)
        };
        self.gauges
            .total
            .store(counters.pages_total, Ordering::Relaxed);
        self.gauges.resident.store(resident, Ordering::Relaxed);
        self.gauges
            .faulted
            .store(counters.pages_faulted, Ordering::Relaxed);
        self.gauges
            .waiting
            .store(self.engine.pages_waiting(), Ordering::Relaxed);
    }

    /// Nothing is missing: the kernel may answer what is left, holes, by itself.
    fn finish(mut self) -> Summary {
        let processes = std::mem::take(&mut self.processes);
        for process in processes.into_values() {
            let Watched(uffd) = process.uffd.into_inner();
            for &range in process.lazy.iter() {
                // A range that the program has meanwhile changed is refused; closing the context ends that one too.
                // Both, because somebody else may hold the descriptor still.
                if let Err(error) = uffd.unregister(addresses(range)) {
                    tracing::debug!(
                        "{:#x}..{:#x} stays registered until the context is closed: {error}",
                        range.start,
                        range.end
                    );
                }
            }
        }
        let counters = self.engine.counters();
        Summary {
            pages_total: counters.pages_total,
            pages_faulted: counters.pages_faulted,
            pages_installed: counters.pages_installed,
            pages_zero: counters.pages_zero,
            pages_lost: counters.pages_lost,
            duplicate_bytes: counters.duplicate_bytes,
            forks: self.forks,
        }
    }

    fn failed(&self, doing: &'static str, source: pageferry_tracee::Error) -> FaultError {
        FaultError::Kernel {
            doing,
            pid: self.pid,
            source,
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // Reached with processes only when pages are missing. See the module's text.
        for process in std::mem::take(&mut self.processes).into_values() {
            std::mem::forget(process.uffd.into_inner());
        }
        for uffd in self.unserved.drain(..) {
            std::mem::forget(uffd);
        }
    }
}

fn addresses(range: PageRange) -> Range<u64> {
    range.start..range.end
}

fn kind(kind: PageKind) -> RunKind {
    match kind {
        PageKind::Data => RunKind::Data,
        PageKind::Zero => RunKind::Zero,
        PageKind::Guard => RunKind::Guard,
        PageKind::Gone => RunKind::Gone,
    }
}

/// What is added to an address of `object` to tell its pages from those of others: addresses end well below.
fn source_offset(object: u32) -> u64 {
    u64::from(object.saturating_sub(1)) << OBJECT_SHIFT
}

/// A range of an object's pages as the engine names them.
fn source_of(object: u32, range: PageRange) -> PageRange {
    PageRange {
        start: range.start + source_offset(object),
        end: range.end + source_offset(object),
    }
}

/// The reverse of [`source_of`].
fn object_of(source: u64) -> (u32, u64) {
    let index = u32::try_from(source >> OBJECT_SHIFT).expect("objects are limited");
    (index + 1, source & ((1 << OBJECT_SHIFT) - 1))
}

/// The bytes of some pages of one data run, each checked against its checksum. `wanted` is as the engine names them.
fn verified(batch: &PageBatch, wanted: PageRange) -> pageferry_wire::Result<Bytes> {
    let (_, start) = object_of(wanted.start);
    let wanted = PageRange {
        start,
        end: start + wanted.byte_len(),
    };
    let run = batch
        .runs()
        .iter()
        .find(|run| run.kind == PageKind::Data && run.range.contains(wanted.start))
        .expect("the engine asks for data where the reply said data");
    if run.range == wanted {
        return batch.verify_run(run);
    }
    for page in (wanted.start..wanted.end).step_by(PAGE_LEN) {
        batch.verify_page(page)?;
    }
    let first = run.data_index + ((wanted.start - run.range.start) / PAGE_SIZE) as usize;
    let count = wanted.page_count() as usize;
    Ok(batch
        .data()
        .slice(first * PAGE_LEN..(first + count) * PAGE_LEN))
}

/// Reads until nothing is left, without waiting.
fn read_all(uffd: &Uffd, events: &mut Vec<Event>) -> pageferry_tracee::Result<()> {
    while uffd.read_events(events)? > 0 {}
    Ok(())
}

fn is_present(pagemap: &File, page: u64) -> bool {
    let scan = Scan {
        range: page..page + PAGE_SIZE,
        category_anyof: PRESENT | SWAPPED,
        return_mask: PRESENT,
        ..Scan::default()
    };
    pagemap::scan(pagemap, &scan).is_ok_and(|found| !found.is_empty())
}

#[cfg(test)]
mod tests;
