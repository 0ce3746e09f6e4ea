//! The only place that parks, kills and resumes.
//!
//! ptrace is bound to the thread that seized, so each side keeps the process in a thread of its own that takes commands
//! from the closed enums here. Until COMMIT the hold on the source is ptrace: our death thaws the process. PARK turns it
//! round: from there our death leaves it stopped.
//!
//! The races, told as steps:
//! 1. Source: PARK record → SIGSTOP queued while every thread is ptrace-stopped → COMMIT record → COMMIT frame.
//!    Killed before the COMMIT record: the keeper continues the process. After it: the process stays in state T.
//! 2. Target: COMMIT frame → RUN record → EXITKILL cleared on all threads but the leader's → RELEASING record → detach.
//!    Killed before RELEASING nobody ran; the husk dies with us. Afterwards the leader's EXITKILL, and the cradle, end
//!    the whole process rather than let it run without its pages.

use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pageferry_image::model::task::Tree;
use pageferry_pageserver::capture::{self, Captured};
use pageferry_pageserver::survey::{Survey, SurveyOptions};
use pageferry_restorer::rebuild::{self, EagerPage, Rebuilt};
use pageferry_tracee::host;
use pageferry_tracee::tree::{Held, Pumped, SeizeOptions, Tracee};
use tokio::sync::oneshot;

/// Longest time a freeze may take before every thread is let go again.
pub const FREEZE_BUDGET: Duration = Duration::from_millis(20);
/// How often a freeze is tried; between two tries all threads run.
pub const FREEZE_ATTEMPTS: u32 = 25;

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
    /// It could not be let go.
    #[error("the process could not be let go cleanly; the kernel does so when pageferry ends")]
    Thaw(#[source] pageferry_tracee::Error),
    /// It could not be ended.
    #[error("the stopped source copy could not be ended; end it by hand")]
    Kill(#[source] pageferry_tracee::Error),
    /// It could not be built here.
    #[error("the process could not be rebuilt here; the source keeps it")]
    Rebuild(#[source] rebuild::Error),
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
    Capture(Box<(Survey, SurveyOptions)>, Reply<Captured>),
    Park(Reply<()>),
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

    /// Reads the frozen process. On `Err` it stays frozen, until it is rolled back.
    pub async fn capture(&self, survey: Survey, options: SurveyOptions) -> Result<Captured, Error> {
        ask(&self.commands, |reply| {
            SourceCommand::Capture(Box::new((survey, options)), reply)
        })
        .await
    }

    /// Queues the SIGSTOP that outlives us. On `Err` it may be queued or not; [`SourceTree::roll_back`] looks.
    pub async fn park(&self) -> Result<(), Error> {
        ask(&self.commands, SourceCommand::Park).await
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
    let mut held: Option<Tracee> = None;
    let mut parked = false;
    while let Ok(command) = inbox.recv() {
        match command {
            SourceCommand::Freeze(reply) => {
                let outcome = freeze(pid);
                let _ = reply.send(outcome.map(|(tracee, frozen)| {
                    held = Some(tracee);
                    frozen
                }));
            }
            SourceCommand::Capture(work, reply) => {
                let (survey, options) = *work;
                let outcome = held.as_mut().ok_or(Error::Thread).and_then(|tracee| {
                    capture::capture(tracee, &survey, &options).map_err(Error::Capture)
                });
                let _ = reply.send(outcome);
            }
            SourceCommand::Park(reply) => {
                let outcome = held
                    .as_mut()
                    .ok_or(Error::Thread)
                    .and_then(|tracee| tracee.park().map_err(Error::Park));
                // Also after an error: the SIGSTOP may be in the queue, and a roll-back looks.
                parked = true;
                let _ = reply.send(outcome);
            }
            SourceCommand::RollBack(reply) => {
                let _ = reply.send(roll_back(held.take(), std::mem::take(&mut parked)));
            }
            SourceCommand::Kill(reply) => {
                let outcome = held
                    .take()
                    .ok_or(Error::Thread)
                    .and_then(|tracee| tracee.kill().map_err(Error::Kill));
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

fn freeze(pid: i32) -> Result<(Tracee, Frozen), Error> {
    let seize = SeizeOptions {
        exit_kill: false,
        follow: true,
        suspend_seccomp: true,
    };
    let mut tracee = Tracee::seize(pid, seize).map_err(Error::Freeze)?;
    let began = tracee
        .freeze(FREEZE_BUDGET, FREEZE_ATTEMPTS)
        .map_err(Error::Freeze)?;
    Ok((
        tracee,
        Frozen {
            began,
            stopped: Instant::now(),
        },
    ))
}

fn roll_back(held: Option<Tracee>, parked: bool) -> Result<(), Error> {
    let Some(mut tracee) = held else {
        return Ok(());
    };
    if parked {
        tracee.unpark().map_err(Error::Thaw)?;
    }
    tracee.thaw().map_err(Error::Thaw)
}

enum TargetCommand {
    Rebuild(Box<(Tree, Vec<EagerPage>, i64, i64)>, Reply<Rebuilt>),
    ClearExitKill(Reply<()>),
    Release(Reply<()>),
    LetGo(Reply<()>),
}

/// The process on the target, held by a thread of its own: EXITKILL stays on its leader until every page is there.
///
/// Dropped before it was let go, the process is killed.
#[derive(Debug)]
pub struct TargetTree {
    commands: mpsc::Sender<TargetCommand>,
    thread: Option<JoinHandle<()>>,
    ended: Option<oneshot::Receiver<i32>>,
}

impl TargetTree {
    /// Seizes the husk `pid` on a new thread.
    pub fn new(pid: i32) -> std::io::Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let (end, ended) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("hold".into())
            .spawn(move || hold_target(pid, &inbox, end))?;
        Ok(Self {
            commands,
            thread: Some(thread),
            ended: Some(ended),
        })
    }

    /// Rebuilds `tree` in the husk. The tree's clocks are this host's plus the two offsets, nanoseconds.
    pub async fn rebuild(
        &self,
        tree: Tree,
        eager: Vec<EagerPage>,
        monotonic_offset_ns: i64,
        boottime_offset_ns: i64,
    ) -> Result<Rebuilt, Error> {
        let work = Box::new((tree, eager, monotonic_offset_ns, boottime_offset_ns));
        ask(&self.commands, |reply| TargetCommand::Rebuild(work, reply)).await
    }

    /// First half of the release: nobody has run yet, our death still ends it by the leader.
    pub async fn clear_exit_kill(&self) -> Result<(), Error> {
        ask(&self.commands, TargetCommand::ClearExitKill).await
    }

    /// Lets every thread run; the leader stays held with EXITKILL.
    pub async fn release(&self) -> Result<(), Error> {
        ask(&self.commands, TargetCommand::Release).await
    }

    /// Every page is there: lets go of the leader too. On `Err` it is still held, and may be let go again.
    pub async fn let_go(&self) -> Result<(), Error> {
        ask(&self.commands, TargetCommand::LetGo).await
    }

    /// Resolves when the process ends while it is held; the sender is dropped when it is let go. Once.
    pub fn ended(&mut self) -> Option<oneshot::Receiver<i32>> {
        self.ended.take()
    }
}

impl Drop for TargetTree {
    fn drop(&mut self) {
        let (closed, _) = mpsc::channel();
        self.commands = closed;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// How long one look at the held leader waits before commands are looked at again.
const PUMP_PAUSE: Duration = Duration::from_millis(20);

fn hold_target(pid: i32, inbox: &mpsc::Receiver<TargetCommand>, end: oneshot::Sender<i32>) {
    let seize = SeizeOptions {
        exit_kill: true,
        follow: false,
        suspend_seccomp: false,
    };
    let mut husk: Option<Tracee> = None;
    let mut held = None;
    let mut complained = false;
    let mut end = Some(end);
    loop {
        let command = if let Some(leader) = &mut held {
            match Held::pump(leader, PUMP_PAUSE) {
                Ok(Pumped::Running) => {}
                Ok(Pumped::Exited(status)) => {
                    held = None;
                    if let Some(end) = end.take() {
                        let _ = end.send(status);
                    }
                }
                // It stays held: only one who holds it can let it go, and without that it would end with us.
                Err(error) => {
                    if !std::mem::replace(&mut complained, true) {
                        tracing::warn!("the held process could not be looked at: {error}");
                    }
                    if error.is_gone() {
                        held = None;
                    } else {
                        std::thread::sleep(PUMP_PAUSE);
                    }
                }
            }
            match inbox.try_recv() {
                Ok(command) => command,
                Err(mpsc::TryRecvError::Empty) => continue,
                Err(mpsc::TryRecvError::Disconnected) => break,
            }
        } else {
            match inbox.recv() {
                Ok(command) => command,
                Err(mpsc::RecvError) => break,
            }
        };
        match command {
            TargetCommand::Rebuild(work, reply) => {
                let (tree, eager, monotonic, boottime) = *work;
                let outcome =
                    seize_and_rebuild(pid, seize, &tree, &eager, monotonic, boottime, &mut husk);
                let _ = reply.send(outcome);
            }
            TargetCommand::ClearExitKill(reply) => {
                let outcome = husk
                    .as_mut()
                    .ok_or(Error::Thread)
                    .and_then(|h| h.clear_exit_kill().map_err(Error::Release));
                let _ = reply.send(outcome);
            }
            TargetCommand::Release(reply) => {
                let outcome = husk
                    .take()
                    .ok_or(Error::Thread)
                    .and_then(|h| h.release(true).map_err(Error::Release));
                let _ = reply.send(outcome.map(|leader| held = leader));
            }
            TargetCommand::LetGo(reply) => {
                let outcome = match held.as_mut().map_or(Ok(()), Held::release) {
                    Err(error) if !error.is_gone() => Err(Error::Release(error)),
                    _ => Ok(()),
                };
                if outcome.is_ok() {
                    held = None;
                }
                let _ = reply.send(outcome);
            }
        }
    }
    if let Some(husk) = husk {
        let _ = husk.kill();
    }
    // A leader still held here dies with this thread: EXITKILL.
}

fn seize_and_rebuild(
    pid: i32,
    seize: SeizeOptions,
    tree: &Tree,
    eager: &[EagerPage],
    monotonic_offset_ns: i64,
    boottime_offset_ns: i64,
    husk: &mut Option<Tracee>,
) -> Result<Rebuilt, Error> {
    let tracee = husk.insert(Tracee::seize(pid, seize).map_err(|e| Error::Rebuild(e.into()))?);
    tracee
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
    rebuild::rebuild(tracee, tree, eager, clock).map_err(Error::Rebuild)
}
