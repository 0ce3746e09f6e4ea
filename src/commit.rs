//! The only place that parks, kills and resumes.
//!
//! ptrace is bound to the thread that seized, so each side keeps the tree in a thread of its own that takes commands
//! from the closed enums here. Until COMMIT the hold on the source is ptrace: our death thaws the process. PARK turns it
//! round: from there our death leaves it stopped.
//!
//! The races, told as steps:
//! 1. Source: PARK record → SIGSTOP queued while every thread is ptrace-stopped → COMMIT record → COMMIT frame.
//!    Killed before the COMMIT record: the keeper continues the process. After it: the process stays in state T.
//! 2. Target: COMMIT frame → RUN record → EXITKILL cleared on all threads but the first of each process → RELEASING record →
//!    detach. Killed before RELEASING nobody ran; the husks die with us. Afterwards the first threads' EXITKILL, and the
//!    cradle, end the whole tree rather than let it run without its pages.

use std::os::fd::AsFd as _;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use pageferry_image::model::task::Tree;
use pageferry_pageserver::capture::locks::HeldLocks;
use pageferry_pageserver::capture::{self, Captured};
use pageferry_pageserver::survey::{self, Refusal, Survey, SurveyOptions};
use pageferry_restorer::rebuild::locks::{self, Waiting};
use pageferry_restorer::rebuild::shared::NewFiles;
use pageferry_restorer::rebuild::{self, Eager, Rebuilt};
use pageferry_tracee::family::Family;
use pageferry_tracee::tree::{Held, Pumped, SeizeOptions};
use pageferry_tracee::{host, lock};
use tokio::sync::mpsc as unbounded;
use tokio::sync::oneshot;

/// Longest time a freeze may take before every thread is let go again.
pub const FREEZE_BUDGET: Duration = Duration::from_millis(20);
/// How often a freeze is tried; between two tries all threads run.
pub const FREEZE_ATTEMPTS: u32 = 25;
/// How often a tree is looked at anew because it had other members when it was frozen.
const LOOKS: u32 = 10;

/// What went wrong with the process on this host. The message says where it is.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be stopped; it runs.
    #[error("the process could not be frozen; it runs on here, untouched")]
    Freeze(#[source] pageferry_tracee::Error),
    /// It could not be read; it runs.
    #[error("the process could not be captured; it runs on here, as before")]
    Capture(#[source] pageferry_pageserver::Error),
    /// It could not be parked; it runs.
    #[error("the process could not be parked; it runs on here, as before")]
    Park(#[source] pageferry_tracee::Error),
    /// Its locks could not be given up.
    #[error("the locks of the process could not be given up for the target, which waits for them")]
    GiveUp(#[source] pageferry_tracee::Error),
    /// Somebody took a lock that had been given up.
    #[error(
        "the lock of pid {pid} on its fd {fd} was taken by somebody else when it was given up for the target, so that the process must not run without it"
    )]
    LockLost {
        /// The process.
        pid: i32,
        /// A descriptor of the file.
        fd: u32,
    },
    /// It could not be let go.
    #[error("the process could not be let go cleanly; the kernel does so when pageferry ends")]
    Thaw(#[source] pageferry_tracee::Error),
    /// It could not be ended.
    #[error("the stopped source copy could not be ended; end it by hand")]
    Kill(#[source] pageferry_tracee::Error),
    /// It could not be built here.
    #[error("the process could not be rebuilt here; the source keeps it")]
    Rebuild(#[source] rebuild::Error),
    /// A lock of it cannot be had here.
    #[error("a lock that the source gave up could not be taken here; the source keeps the process")]
    Locks(#[source] rebuild::Error),
    /// It could not be let run here.
    #[error("the rebuilt process could not be let go")]
    Release(#[source] pageferry_tracee::Error),
    /// The thread that holds the process is gone.
    #[error("the thread that holds the process ended early")]
    Thread,
}

type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// Has the thread behind `commands` do something, and waits for its answer.
async fn ask<C, T>(
    commands: &mpsc::Sender<C>,
    command: impl FnOnce(Reply<T>) -> C,
) -> Result<T, Error> {
    let (reply, answer) = oneshot::channel();
    commands.send(command(reply)).map_err(|_| Error::Thread)?;
    answer.await.map_err(|_| Error::Thread)?
}

/// When a freeze happened.
#[derive(Debug, Clone, Copy)]
pub struct Frozen {
    /// Just before the first thread was told to stop, in the attempt that stopped all.
    pub began: Instant,
    /// Every thread stopped.
    pub stopped: Instant,
}

enum SourceCommand {
    Freeze(Reply<Frozen>),
    Capture(
        Box<(Survey, SurveyOptions)>,
        Reply<(Captured, Option<Frozen>)>,
    ),
    Park(Reply<()>),
    GiveUpLocks(HeldLocks, Reply<()>),
    RollBack(Reply<()>),
    Kill(Reply<()>),
    Abandon,
}

/// The process on the source, held by a thread of its own.
///
/// Dropped before [`SourceTree::park`], the process runs on as if nothing had been; after it, it stays stopped.
#[derive(Debug)]
pub struct SourceTree {
    commands: mpsc::Sender<SourceCommand>,
    thread: Option<JoinHandle<()>>,
}

impl SourceTree {
    /// Starts the thread; the process is not touched yet.
    pub fn new(pid: i32) -> std::io::Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("hold".into())
            .spawn(move || hold_source(pid, &inbox))?;
        Ok(Self {
            commands,
            thread: Some(thread),
        })
    }

    /// Seizes and freezes. On `Err` the process runs on as before.
    pub async fn freeze(&self) -> Result<Frozen, Error> {
        ask(&self.commands, SourceCommand::Freeze).await
    }

    /// Reads the frozen process. Where it has other descendants than `survey` saw, it runs on, is looked at and frozen anew; then
    /// the time of that is given, too. On `Err` it may be frozen, until it is rolled back.
    pub async fn capture(
        &self,
        survey: Survey,
        options: SurveyOptions,
    ) -> Result<(Captured, Option<Frozen>), Error> {
        ask(&self.commands, |reply| {
            SourceCommand::Capture(Box::new((survey, options)), reply)
        })
        .await
    }

    /// Queues the SIGSTOP that outlives us. On `Err` it may be queued or not; [`SourceTree::roll_back`] looks.
    pub async fn park(&self) -> Result<(), Error> {
        ask(&self.commands, SourceCommand::Park).await
    }

    /// Gives up the locks of the parked process: the target waits for them. [`SourceTree::roll_back`] takes them again.
    pub async fn give_up_locks(&self, locks: HeldLocks) -> Result<(), Error> {
        ask(&self.commands, |reply| {
            SourceCommand::GiveUpLocks(locks, reply)
        })
        .await
    }

    /// Lets the process go on as if nothing had been, parked or not. Never after the target may run it.
    pub async fn roll_back(&self) -> Result<(), Error> {
        ask(&self.commands, SourceCommand::RollBack).await
    }

    /// Ends the source copy. Only after the target has confirmed every page.
    pub async fn kill(&self) -> Result<(), Error> {
        ask(&self.commands, SourceCommand::Kill).await
    }

    /// Leaves the process stopped for good: COMMIT was sent, and the outcome is not ours to decide.
    pub fn abandon(mut self) {
        let _ = self.commands.send(SourceCommand::Abandon);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for SourceTree {
    fn drop(&mut self) {
        // The thread sees the closed channel and lets go of what it holds.
        let (closed, _) = mpsc::channel();
        self.commands = closed;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn hold_source(pid: i32, inbox: &mpsc::Receiver<SourceCommand>) {
    let mut held: Option<Family> = None;
    let mut parked = false;
    let mut given_up = HeldLocks::default();
    while let Ok(command) = inbox.recv() {
        match command {
            SourceCommand::Freeze(reply) => {
                let outcome = freeze(pid);
                let _ = reply.send(outcome.map(|(family, frozen)| {
                    held = Some(family);
                    frozen
                }));
            }
            SourceCommand::Capture(work, reply) => {
                let (survey, options) = *work;
                let _ = reply.send(capture_steady(pid, &mut held, survey, &options));
            }
            SourceCommand::Park(reply) => {
                let outcome = held
                    .as_mut()
                    .ok_or(Error::Thread)
                    .and_then(|family| family.park().map_err(Error::Park));
                // Also after an error: the SIGSTOP may be in the queue, and a roll-back looks.
                parked = true;
                let _ = reply.send(outcome);
            }
            SourceCommand::GiveUpLocks(locks, reply) => {
                let outcome = held
                    .as_mut()
                    .ok_or(Error::Thread)
                    .and_then(|family| give_up_locks(family, &locks));
                // Also after an error: some may be given up.
                given_up = locks;
                let _ = reply.send(outcome);
            }
            SourceCommand::RollBack(reply) => {
                let locked = match held.as_mut() {
                    Some(family) if !given_up.is_empty() => take_locks_again(family, &given_up),
                    _ => Ok(()),
                };
                // Without its locks it must not run: it stays held, and parked when this thread ends.
                let outcome =
                    locked.and_then(|()| roll_back(held.take(), std::mem::take(&mut parked)));
                let _ = reply.send(outcome);
            }
            SourceCommand::Kill(reply) => {
                let outcome = held
                    .take()
                    .ok_or(Error::Thread)
                    .and_then(|family| family.kill().map_err(Error::Kill));
                let _ = reply.send(outcome);
            }
            SourceCommand::Abandon => break,
        }
    }
    if parked && held.is_some() {
        // The thread's end detaches; the queued SIGSTOP takes over. A thaw would do the same with more steps.
        std::mem::forget(held);
    }
}

fn freeze(pid: i32) -> Result<(Family, Frozen), Error> {
    let seize = SeizeOptions {
        exit_kill: false,
        follow: true,
        suspend_seccomp: true,
    };
    let mut family = Family::seize(pid, seize).map_err(Error::Freeze)?;
    let began = family
        .freeze(FREEZE_BUDGET, FREEZE_ATTEMPTS)
        .map_err(Error::Freeze)?;
    Ok((
        family,
        Frozen {
            began,
            stopped: Instant::now(),
        },
    ))
}

/// Captures what is held. A process that was made since the survey has not been looked at, and in the freeze is no time for that:
/// 1. The survey saw the tree, and the plan was agreed on.
/// 2. A process of it forked, or ended and left children.
/// 3. The freeze found that. Everything runs on, a new survey is made at once, and the tree is frozen again.
///
/// The target judges what the first plan did not name when it gets the state.
fn capture_steady(
    pid: i32,
    held: &mut Option<Family>,
    mut survey: Survey,
    options: &SurveyOptions,
) -> Result<(Captured, Option<Frozen>), Error> {
    let (mut again, mut looks) = (None, 1);
    loop {
        let family = held.as_mut().ok_or(Error::Thread)?;
        let refusals = match capture::capture(family, &survey, options) {
            Ok(captured) => return Ok((captured, again)),
            Err(pageferry_pageserver::Error::Refused(refusals)) => refusals,
            Err(error) => return Err(Error::Capture(error)),
        };
        if looks == LOOKS || !refusals.iter().all(|refusal| survey.is_passing(refusal)) {
            return Err(refused(refusals));
        }
        looks += 1;
        roll_back(held.take(), false)?;
        survey = survey::survey(pid, options).map_err(Error::Capture)?;
        if !survey.refusals.is_empty() {
            return Err(refused(survey.refusals));
        }
        let (family, frozen) = freeze(pid)?;
        *held = Some(family);
        again = Some(frozen);
    }
}

fn refused(refusals: Vec<Refusal>) -> Error {
    Error::Capture(pageferry_pageserver::Error::Refused(refusals))
}

fn roll_back(held: Option<Family>, parked: bool) -> Result<(), Error> {
    let Some(mut family) = held else {
        return Ok(());
    };
    if parked {
        family.unpark().map_err(Error::Thaw)?;
    }
    family.thaw().map_err(Error::Thaw)
}

fn give_up_locks(family: &mut Family, locks: &HeldLocks) -> Result<(), Error> {
    for (pid, locks) in locks.iter() {
        family.give_up_locks(pid, locks).map_err(Error::GiveUp)?;
    }
    Ok(())
}

/// Takes back what was given up, before the process runs again. On `Err` it is parked as before.
fn take_locks_again(family: &mut Family, locks: &HeldLocks) -> Result<(), Error> {
    let mut taken = family.unpark().map_err(Error::Thaw);
    for (pid, locks) in locks.iter() {
        taken = taken.and_then(|()| take_again(family, pid, locks));
    }
    if taken.is_err() {
        family.park().map_err(Error::Park)?;
    }
    taken
}

/// How often a lock that somebody has taken meanwhile is asked for, and how long is waited in between: who takes one for a moment, to
/// see whether anybody has it, must not keep the program from running.
const LOCK_TRIES: u32 = 21;
const LOCK_WAIT: Duration = Duration::from_millis(50);

fn take_again(family: &mut Family, pid: i32, locks: &[lock::Held]) -> Result<(), Error> {
    let mut left = locks.to_vec();
    for attempt in 1.. {
        let member = family.member(pid).map_err(Error::Thaw)?;
        let answers = match member.take_locks_again(&left) {
            // One that has ended meanwhile has no locks.
            Err(error) if error.is_gone() => return Ok(()),
            answers => answers.map_err(Error::Thaw)?,
        };
        let lost = left.into_iter().zip(answers);
        left = lost
            .filter_map(|(held, answer)| answer.err().map(|_| held))
            .collect();
        match left.first() {
            Some(held) if attempt == LOCK_TRIES => {
                return Err(Error::LockLost { pid, fd: held.fd });
            }
            Some(_) => {
                // Whatever ends us meanwhile: without its locks it must not run.
                family.park().map_err(Error::Park)?;
                std::thread::sleep(LOCK_WAIT);
                family.unpark().map_err(Error::Thaw)?;
            }
            None => break,
        }
    }
    Ok(())
}

enum TargetCommand {
    Rebuild(Box<(Tree, Eager, i64, i64)>, Reply<Built>),
    TakeLocks(Vec<Waiting>, Reply<()>),
    ClearExitKill(Reply<()>),
    Release(Reply<()>),
    LetGo(Reply<()>),
}

/// The process tree on the target, held by a thread of its own: EXITKILL stays on the first thread of each process until every page
/// is there.
///
/// Dropped before it was let go, the tree is killed.
#[derive(Debug)]
pub struct TargetTree {
    /// `None` when it is being dropped.
    commands: Option<mpsc::Sender<TargetCommand>>,
    /// Tells the thread that there is a command, or that there will be none.
    bell: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    ended: Option<Ends>,
}

/// A rebuilt tree, the files that were made for it, and the locks that somebody else has.
pub type Built = (Vec<Rebuilt>, NewFiles, Vec<Waiting>);

/// Which processes end while they are held: the process id and wait status of each.
pub type Ends = unbounded::UnboundedReceiver<(i32, i32)>;

/// The next process that ends; never, when none is held any more or nobody can tell.
pub async fn next_end(ended: &mut Option<Ends>) -> (i32, i32) {
    if let Some(ended) = ended {
        if let Some(end) = ended.recv().await {
            return end;
        }
    }
    std::future::pending().await
}

impl TargetTree {
    /// Seizes the husk `pid` on a new thread. Every thread of ours must block SIGCHLD, which comes from those that are held.
    pub fn new(pid: i32) -> std::io::Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let (end, ended) = unbounded::unbounded_channel();
        let bell = Arc::new(EventFd::from_flags(
            EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
        )?);
        let inbox = Inbox::new(inbox, Arc::clone(&bell))?;
        let thread = std::thread::Builder::new()
            .name("hold".into())
            .spawn(move || hold_target(pid, &inbox, &end))?;
        Ok(Self {
            commands: Some(commands),
            bell,
            thread: Some(thread),
            ended: Some(ended),
        })
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> TargetCommand) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let commands = self.commands.as_ref().ok_or(Error::Thread)?;
        commands.send(command(reply)).map_err(|_| Error::Thread)?;
        ring(&self.bell);
        answer.await.map_err(|_| Error::Thread)?
    }

    /// Rebuilds `tree` in the husk; the files that were made go again unless they are kept. The tree's clocks are this host's plus
    /// the two offsets, nanoseconds.
    pub async fn rebuild(
        &self,
        tree: Tree,
        eager: Eager,
        monotonic_offset_ns: i64,
        boottime_offset_ns: i64,
    ) -> Result<Built, Error> {
        let work = Box::new((tree, eager, monotonic_offset_ns, boottime_offset_ns));
        self.ask(|reply| TargetCommand::Rebuild(work, reply)).await
    }

    /// Takes the locks that the source has given up by now.
    pub async fn take_locks(&self, waiting: Vec<Waiting>) -> Result<(), Error> {
        self.ask(|reply| TargetCommand::TakeLocks(waiting, reply))
            .await
    }

    /// First half of the release: nobody has run yet, our death still ends each process by its first thread.
    pub async fn clear_exit_kill(&self) -> Result<(), Error> {
        self.ask(TargetCommand::ClearExitKill).await
    }

    /// Lets every thread run; the first of each process stays held with EXITKILL.
    pub async fn release(&self) -> Result<(), Error> {
        self.ask(TargetCommand::Release).await
    }

    /// Every page is there: lets go of the first threads too. On `Err` some are still held, and may be let go again.
    pub async fn let_go(&self) -> Result<(), Error> {
        self.ask(TargetCommand::LetGo).await
    }

    /// Tells of every process that ends while it is held. Once.
    pub fn ended(&mut self) -> Option<Ends> {
        self.ended.take()
    }
}

impl Drop for TargetTree {
    fn drop(&mut self) {
        self.commands = None;
        ring(&self.bell);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn ring(bell: &EventFd) {
    // It is full when it has rung long ago.
    let _ = bell.write(1);
}

/// Longest pause between two looks at the held processes: each has told of its stop by SIGCHLD, and nobody's loss of that signal
/// may leave one standing.
const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// The same after a look that failed.
const FAILED_PAUSE: Duration = Duration::from_millis(20);

/// What the thread that holds a tree waits for.
struct Inbox {
    commands: mpsc::Receiver<TargetCommand>,
    bell: Arc<EventFd>,
    stops: SignalFd,
}

impl Inbox {
    fn new(commands: mpsc::Receiver<TargetCommand>, bell: Arc<EventFd>) -> std::io::Result<Self> {
        let mut child = SigSet::empty();
        child.add(Signal::SIGCHLD);
        let stops = SignalFd::with_flags(&child, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self {
            commands,
            bell,
            stops,
        })
    }

    /// Waits for a command or a stop. What is looked for after this, and not found, wakes the next wait.
    fn wait(&self, longest: Duration) {
        let mut sources = [
            PollFd::new(self.bell.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.stops.as_fd(), PollFlags::POLLIN),
        ];
        let timeout = PollTimeout::try_from(longest).unwrap_or(PollTimeout::ZERO);
        // An error is a wait that was too short.
        let _ = poll(&mut sources, timeout);
        let _ = self.bell.read();
        while let Ok(Some(_)) = self.stops.read_signal() {}
    }
}

fn hold_target(pid: i32, inbox: &Inbox, ended: &unbounded::UnboundedSender<(i32, i32)>) {
    let seize = SeizeOptions {
        exit_kill: true,
        follow: false,
        suspend_seccomp: false,
    };
    let mut husks: Option<Family> = None;
    let mut held: Vec<Held> = Vec::new();
    let mut complained = false;
    loop {
        let command = if held.is_empty() {
            match inbox.commands.recv() {
                Ok(command) => command,
                Err(mpsc::RecvError) => break,
            }
        } else {
            let mut pause = LOOK_PAUSE;
            held.retain_mut(|leader| match leader.pump(Duration::ZERO) {
                Ok(Pumped::Running) => true,
                Ok(Pumped::Exited(status)) => {
                    // Nobody may want to know any more.
                    let _ = ended.send((leader.pid(), status));
                    false
                }
                // It stays held: only one who holds it can let it go, and without that it would end with us.
                Err(error) => {
                    if !std::mem::replace(&mut complained, true) {
                        tracing::warn!("a held process could not be looked at: {error}");
                    }
                    pause = FAILED_PAUSE;
                    !error.is_gone()
                }
            });
            match inbox.commands.try_recv() {
                Ok(command) => command,
                Err(mpsc::TryRecvError::Disconnected) => break,
                Err(mpsc::TryRecvError::Empty) => {
                    inbox.wait(pause);
                    continue;
                }
            }
        };
        match command {
            TargetCommand::Rebuild(work, reply) => {
                let (tree, eager, monotonic, boottime) = *work;
                let outcome =
                    seize_and_rebuild(pid, seize, &tree, eager, monotonic, boottime, &mut husks);
                let _ = reply.send(outcome);
            }
            TargetCommand::TakeLocks(waiting, reply) => {
                let outcome = husks
                    .as_mut()
                    .ok_or(Error::Thread)
                    .and_then(|h| locks::take(h, &waiting).map_err(Error::Locks));
                let _ = reply.send(outcome);
            }
            TargetCommand::ClearExitKill(reply) => {
                let outcome = husks
                    .as_mut()
                    .ok_or(Error::Thread)
                    .and_then(|h| h.clear_exit_kill().map_err(Error::Release));
                let _ = reply.send(outcome);
            }
            TargetCommand::Release(reply) => {
                let outcome = husks
                    .take()
                    .ok_or(Error::Thread)
                    .and_then(|h| h.release().map_err(Error::Release));
                let _ = reply.send(outcome.map(|leaders| held = leaders));
            }
            TargetCommand::LetGo(reply) => {
                let mut outcome = Ok(());
                held.retain_mut(|leader| match leader.release() {
                    Err(error) if !error.is_gone() => {
                        outcome = Err(Error::Release(error));
                        true
                    }
                    _ => false,
                });
                let _ = reply.send(outcome);
            }
        }
    }
    if let Some(husks) = husks {
        let _ = husks.kill();
    }
    // What is still held here dies with this thread: EXITKILL.
}

fn seize_and_rebuild(
    pid: i32,
    seize: SeizeOptions,
    tree: &Tree,
    eager: Eager,
    monotonic_offset_ns: i64,
    boottime_offset_ns: i64,
    husks: &mut Option<Family>,
) -> Result<Built, Error> {
    let family = husks.insert(Family::seize(pid, seize).map_err(|e| Error::Rebuild(e.into()))?);
    family
        .freeze(FREEZE_BUDGET, FREEZE_ATTEMPTS)
        .map_err(|e| Error::Rebuild(e.into()))?;
    let clock = || {
        let now = host::clocks()?;
        Ok(host::Clocks {
            monotonic_ns: now.monotonic_ns.saturating_add_signed(monotonic_offset_ns),
            boottime_ns: now.boottime_ns.saturating_add_signed(boottime_offset_ns),
            realtime_ns: now.realtime_ns,
        })
    };
    rebuild::rebuild(family, tree, eager, clock).map_err(Error::Rebuild)
}
