//! `pageferry migrate`, the source's side of a crossing.
//!
//! Three processes: the *front* talks to the terminal and waits; the *engine*, in a session of its own, does the work
//! and goes on when the terminal goes away; the *keeper* outlives a killed engine and puts right what it left.

use std::collections::VecDeque;
use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, pipe2, setsid};
use pageferry_image::page::{PAGE_SIZE, PageRange};
use pageferry_image::store::ObjectId;
use pageferry_pageserver::capture::Pages;
use pageferry_pageserver::capture::locks::HeldLocks;
use pageferry_pageserver::capture::shared::{Moved, SharedPages};
use pageferry_pageserver::shared::SharedReader;
use pageferry_pageserver::survey::{self, Survey, SurveyOptions};
use pageferry_tracee::{choke, host, process, procfs};
use pageferry_wire::message::{Done, Hello, MapEnd, Plan, Role, State};
use pageferry_wire::session::{Record, Source, SourceAction, SourceEnd};
use pageferry_wire::{Frame, Phase, Tag};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::cli::{Common, MigrateArgs};
use crate::commit::{self, Frozen, SourceTree};
use crate::identity::{Identity, PEERS, Peers, TrustSet};
use crate::journal::{Journal, Left, keep};
use crate::page_service::{self, Processes, twice};
use crate::report::{self, Ledger, Report, ms};
use crate::stop::Stop;
use crate::transport::{self, FramedRecv, FramedSend, Link};
use crate::{check, exit, plan};

/// Longest time from the end of the freeze to the target's READY, and from COMMIT to its answer.
const ANSWER_WAIT: Duration = Duration::from_secs(60);

/// Small frames that may come while something is being sent: how far the drain is, five times a second.
const EARLY_MAX: usize = 4096;

/// Longest wait for the target to have read the last word.
const LAST_WORD_WAIT: Duration = Duration::from_secs(2);

/// Runs the verb; the exit code.
pub fn run(args: &MigrateArgs, common: &Common) -> u8 {
    if let Some(missing) = check::first_missing() {
        eprintln!("pageferry: {missing}");
        return alone(args, common, exit::HOST);
    }
    let was_stopped = match procfs::status(args.pid, args.pid) {
        Ok(status) => status.state == 'T',
        Err(error) => {
            eprintln!("pageferry: pid {}: {error}; nothing was touched", args.pid);
            return alone(args, common, exit::FAILED);
        }
    };
    let (records, keeper_pipe) = match pipe2(nix::fcntl::OFlag::O_CLOEXEC) {
        Ok(ends) => ends,
        Err(errno) => {
            eprintln!("pageferry: no pipe to the keeper: {errno}; nothing was touched");
            return alone(args, common, exit::FAILED);
        }
    };
    let mut waited = SigSet::empty();
    for signal in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGCHLD,
    ] {
        waited.add(signal);
    }
    if let Err(errno) = waited.thread_block() {
        eprintln!("pageferry: signals cannot be blocked: {errno}; nothing was touched");
        return alone(args, common, exit::FAILED);
    }
    let (mut records, mut keeper_pipe) = (Some(records), Some(keeper_pipe));
    let keeper = process::fork(false, || {
        drop(keeper_pipe.take());
        let _ = setsid();
        // What a test makes fail is the engine.
        choke::arm(None);
        let records = records.take().map(File::from);
        records.map_or(Left::Undecided.status(), |records| {
            keep(records, args.pid, was_stopped).status()
        })
    });
    drop(records.take());
    let keeper = match keeper {
        Ok(pid) => Pid::from_raw(pid),
        Err(error) => {
            eprintln!("pageferry: the keeper could not be started: {error}; nothing was touched");
            return alone(args, common, exit::FAILED);
        }
    };
    let engine = process::fork(false, || {
        let _ = setsid();
        let _ = waited.thread_unblock();
        let code = keeper_pipe
            .take()
            .map_or(exit::FAILED, |pipe| engine(args, common, pipe));
        choke::report();
        i32::from(code)
    });
    drop(keeper_pipe.take());
    match engine {
        Ok(engine) => front(Pid::from_raw(engine), keeper, &waited, args, common),
        Err(error) => {
            eprintln!("pageferry: the engine could not be started: {error}; nothing was touched");
            alone(args, common, exit::FAILED)
        }
    }
}

/// The ledger of a migration that has no engine to write it: the last line on stdout is always one.
fn alone(args: &MigrateArgs, common: &Common, code: u8) -> u8 {
    Report::new(common).ledger(&Ledger {
        mode: args.mode.to_string(),
        exit: code,
        ..Ledger::default()
    });
    code
}

/// Waits for the engine; hands signals on; tells what became of the process if the engine was killed.
fn front(engine: Pid, keeper: Pid, waited: &SigSet, args: &MigrateArgs, common: &Common) -> u8 {
    let pid = args.pid;
    let mut engine_code = None;
    loop {
        match waited.wait() {
            Ok(Signal::SIGCHLD) => {}
            Ok(signal) => {
                let _ = kill(engine, signal);
            }
            Err(_) => {}
        }
        match waitpid(engine, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => {
                engine_code = Some(u8::try_from(code).unwrap_or(exit::FAILED))
            }
            Ok(WaitStatus::StillAlive) => continue,
            _ => {}
        }
        break;
    }
    let left = loop {
        match waitpid(keeper, None) {
            Ok(WaitStatus::Exited(_, status)) => break Left::from_status(status),
            Err(Errno::EINTR) => {}
            _ => break Left::Undecided,
        }
    };
    if let Some(code) = engine_code {
        return code;
    }
    eprintln!("pageferry: the engine was killed; {}", left.text(pid));
    alone(args, common, left.exit_code())
}

/// Why a migration did not end well. Says where the process is.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{what}; pid {pid} runs on here, as before")]
    Before {
        what: String,
        pid: i32,
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    #[error(
        "{what}; the target sent what cannot be: use the same version on both hosts; pid {pid} runs on here, as before"
    )]
    BadData { what: String, pid: i32 },
    #[error("refused; nothing was touched")]
    Refused,
    #[error("refused, as was seen when it was frozen; pid {pid} runs on here, as before")]
    RefusedFrozen { pid: i32 },
    #[error("{what}; pid {pid} ended meanwhile, and not by pageferry")]
    Ended { what: String, pid: i32 },
    #[error(
        "{what}; pid {pid} is intact here, but could not be let go of: {why}. If it stays stopped: kill -CONT {}",
        report::all_of(.pid)
    )]
    Stuck { what: String, pid: i32, why: String },
    #[error(
        "{what}; pid {pid} is here and stays stopped: {why}. Without the lock it may do harm: end it (kill -KILL {all}), or let it run if you know that nobody minds (kill -CONT {all})",
        all = report::all_of(.pid)
    )]
    LockLost { what: String, pid: i32, why: String },
    #[error(
        "{what}; COMMIT was sent and not answered: the source copy pid {pid} stays stopped, and has given up its locks on files that the target may see. Look at the target before continuing it"
    )]
    Undecided { what: String, pid: i32 },
    #[error(
        "{what}; the process ran on the target and pages were missing: the source copy pid {pid} stays stopped"
    )]
    Lost { what: String, pid: i32 },
}

fn engine(args: &MigrateArgs, common: &Common, keeper: OwnedFd) -> u8 {
    let mut report = Report::new(common);
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("pageferry: no runtime: {error}; nothing was touched");
            return exit::FAILED;
        }
    };
    let mut ledger = Ledger {
        mode: args.mode.to_string(),
        ..Ledger::default()
    };
    let outcome = runtime.block_on(crossing(args, &mut report, &mut ledger, File::from(keeper)));
    let code = match &outcome {
        Ok(code) => *code,
        Err(failure) => {
            report.failure(failure);
            match failure {
                Failure::Before { .. } | Failure::Ended { .. } => exit::FAILED,
                Failure::BadData { .. } => exit::BAD_DATA,
                Failure::Refused | Failure::RefusedFrozen { .. } => exit::REFUSED,
                Failure::Stuck { .. } | Failure::LockLost { .. } | Failure::Undecided { .. } => {
                    exit::UNDECIDED
                }
                Failure::Lost { .. } => exit::LOST,
            }
        }
    };
    ledger.id = report.id().to_owned();
    ledger.exit = code;
    report.ledger(&ledger);
    code
}

/// The three connections of a migration. The control link's stream has carried nothing yet: greeting is the session's.
struct Links {
    control: Link,
    sender: FramedSend,
    receiver: FramedRecv,
    faults: FaultServer,
    bulk: Link,
}

/// Walks the phases. On `Err` the failure itself says where the process is; before COMMIT it always runs on here.
async fn crossing(
    args: &MigrateArgs,
    report: &mut Report,
    ledger: &mut Ledger,
    keeper: File,
) -> Result<u8, Failure> {
    let pid = args.pid;
    let before = |what: &str| {
        let what = what.to_owned();
        move |source: BoxError| Failure::Before {
            what,
            pid,
            source: Some(source),
        }
    };
    let mut stop = Stop::new().map_err(|e| before("signals cannot be watched")(e.into()))?;
    report.phase(Phase::Hello);
    let identity = Identity::open(&args.identity.identity)
        .map_err(|e| before("this host's identity cannot be used")(e.into()))?;
    let peers = Peers::load(PEERS.as_ref())
        .map_err(|e| before("the peers file cannot be used")(e.into()))?;
    let trust = peers
        .resolve(args.peer.iter().map(String::as_str))
        .map_err(|e| before("the peer is not known")(e.into()))?;

    let options = plan::survey_options(&args.carry, args.same_file.clone());
    let survey = survey::survey(pid, &options)
        .map_err(|e| before("the process cannot be looked at")(e.into()))?;
    for note in &survey.notes {
        tracing::warn!("{note}");
    }
    if !survey.refusals.is_empty() {
        for refusal in &survey.refusals {
            report.refusal(&refusal.to_string());
        }
        return Err(Failure::Refused);
    }

    let id = new_id().map_err(|e| before("no migration id")(e.into()))?;
    report.set_id(hex(&id));
    let links = tokio::select! {
        links = connect(args, &identity, &trust, id) => links.map_err(before("the target cannot be reached"))?,
        signal = stop.wait() => {
            eprintln!("pageferry: cancelled; pid {pid} runs on here, as before");
            return Ok(exit::signalled(signal));
        }
    };
    let plan =
        make_plan(args, &survey).map_err(|e| before("this host cannot be described")(e.into()))?;
    let journal = Journal::create(report.id(), "source", pid, Some(keeper))
        .map_err(|e| before("the journal cannot be written")(e.into()))?;
    journal
        .sync()
        .map_err(|e| before("the journal cannot be written")(e.into()))?;

    let mut shell = Shell {
        pid,
        report,
        ledger,
        links,
        journal,
        tree: None,
        surveyed: Some((survey, options)),
        pages: Vec::new(),
        shared: Vec::new(),
        moved: Vec::new(),
        locks: HeldLocks::default(),
        waits_for_locks: false,
        clock: Clock::default(),
        refused: Vec::new(),
        bad_data: false,
        has_last_word: false,
        early: VecDeque::new(),
        stuck: None,
        page_service: JoinSet::new(),
    };
    let mut session = Source::new(hello(id, Role::Control), plan);
    let end = shell.walk(&mut session, &mut stop).await;
    shell.finish(end).await
}

/// When things happened.
#[derive(Debug, Default)]
struct Clock {
    frozen: Option<Frozen>,
    sent: Option<Instant>,
    ready: Option<Instant>,
    running: Option<Instant>,
}

/// How the walk ended.
enum End {
    Session(SourceEnd),
    /// A signal, before COMMIT.
    Cancelled(i32),
    /// The target cannot be reached any more, after COMMIT.
    Unreachable(String),
}

impl End {
    /// The first half of a sentence on it.
    fn what(&self) -> String {
        match self {
            Self::Session(SourceEnd::Failed { phase, text }) => {
                format!("failed in phase {phase}: {text}")
            }
            Self::Cancelled(_) => "cancelled".to_owned(),
            Self::Unreachable(what) | Self::Session(SourceEnd::Lost { text: what }) => what.clone(),
            Self::Session(_) => "ended".to_owned(),
        }
    }
}

/// Why something was not sent.
enum Unsent {
    /// The target gave up and said so; that is the next frame.
    Aborted,
    /// The link.
    Link(String),
    /// The process could not be read.
    Own(String),
}

impl From<pageferry_pageserver::Error> for Unsent {
    fn from(error: pageferry_pageserver::Error) -> Self {
        Self::Own(report::chain(&error))
    }
}

/// What came while something was being sent, then what comes.
async fn next_frame(
    early: &mut VecDeque<Frame>,
    receiver: &mut FramedRecv,
) -> Result<Frame, transport::Error> {
    match early.pop_front() {
        Some(frame) => Ok(frame),
        None => receiver.expect().await,
    }
}

/// Does what the session says, and tells it what came of it.
struct Shell<'a> {
    pid: i32,
    report: &'a mut Report,
    ledger: &'a mut Ledger,
    links: Links,
    journal: Journal,
    tree: Option<SourceTree>,
    surveyed: Option<(Survey, SurveyOptions)>,
    /// Of each process, once they are captured.
    pages: Vec<Pages>,
    /// Of each shared object.
    shared: Vec<SharedPages>,
    /// Files that are the target's once the process is.
    moved: Vec<Moved>,
    /// Locks of the processes, until they are given up.
    locks: HeldLocks,
    /// The target says that somebody has a lock it needs.
    waits_for_locks: bool,
    clock: Clock,
    /// What the capture found that cannot be carried.
    refused: Vec<survey::Refusal>,
    /// The target sent what cannot be.
    bad_data: bool,
    /// The target has given up and waits for us to have read it.
    has_last_word: bool,
    /// What came while something was being sent, oldest first.
    early: VecDeque<Frame>,
    /// Why the process could not be thawed.
    stuck: Option<commit::Error>,
    /// The page map and the bulk pages, once the process runs on the target. A task ends only when it failed.
    page_service: JoinSet<String>,
}

impl Shell<'_> {
    async fn walk(&mut self, session: &mut Source, stop: &mut Stop) -> End {
        let control = self.links.control.clone();
        let silence = control.silent_for(transport::silence_max());
        tokio::pin!(silence);
        let mut silent = false;
        let mut cancelled = None;
        let mut last_error = String::new();
        let mut phase = Phase::Hello;
        loop {
            while let Some(action) = session.poll() {
                if session.phase() != phase {
                    phase = session.phase();
                    self.report.phase(phase);
                }
                match action {
                    SourceAction::Finish(end) => {
                        return match cancelled {
                            Some(signal) if matches!(end, SourceEnd::Failed { .. }) => {
                                End::Cancelled(signal)
                            }
                            _ => End::Session(end),
                        };
                    }
                    SourceAction::Reconnect => return End::Unreachable(last_error),
                    action => self.perform(action, session).await,
                }
            }
            let deadline = async {
                match session.phase() {
                    Phase::Rebuild | Phase::Commit => tokio::time::sleep(ANSWER_WAIT).await,
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                frame = next_frame(&mut self.early, &mut self.links.receiver) => match frame {
                    Ok(Frame::Progress(progress)) => {
                        self.report.progress(progress.pages_total, progress.pages_resident, progress.pages_faulted);
                    }
                    Ok(frame) => {
                        let now = Instant::now();
                        match &frame {
                            Frame::Ready(ready) => {
                                self.clock.ready = Some(now);
                                self.waits_for_locks = ready.waits_for_locks;
                            }
                            Frame::Running(_) => self.clock.running = Some(now),
                            Frame::Abort(_) | Frame::Refused(_) => self.has_last_word = true,
                            _ => {}
                        }
                        if let Err(error) = session.handle_frame(frame) {
                            self.bad_data |= report::is_bad_data(&error);
                            tracing::warn!("{}", report::chain(&error));
                        }
                    }
                    Err(error) => {
                        self.bad_data |= report::is_bad_data(&error);
                        last_error = report::chain(&error);
                        session.handle_link_lost(&last_error);
                    }
                },
                error = &mut silence, if !silent => {
                    silent = true;
                    last_error = report::chain(&error);
                    session.handle_link_lost(&last_error);
                }
                signal = stop.wait() => {
                    if session.handle_cancel() {
                        cancelled = Some(signal);
                    } else {
                        tracing::warn!("too late to cancel: the process runs on the target; its pages follow");
                    }
                }
                Some(ended) = self.page_service.join_next() => {
                    last_error = ended.unwrap_or_else(|error| error.to_string());
                    session.handle_link_lost(&last_error);
                }
                () = deadline => {
                    last_error = format!("the target did not answer within {} s", ANSWER_WAIT.as_secs());
                    session.handle_link_lost(&last_error);
                }
            }
        }
    }

    async fn perform(&mut self, action: SourceAction, session: &mut Source) {
        match action {
            SourceAction::Send(mut frame) => {
                if let Frame::Plan(plan) = &mut frame {
                    if let Err(error) = tell_time(plan) {
                        return session.handle_failed(&report::chain(&error));
                    }
                }
                if frame.tag() == Tag::Commit {
                    self.give_up_locks().await;
                }
                let state = frame.tag() == Tag::State;
                let sent = match self.send(frame).await {
                    Ok(()) if state => self.send_eager().await.map(Some),
                    sent => sent.map(|()| None),
                };
                match sent {
                    Ok(Some(page_count)) => {
                        self.ledger.eager_bytes = page_count * PAGE_SIZE;
                        self.clock.sent = Some(Instant::now());
                        session.handle_eager_sent(page_count);
                    }
                    // What was said instead comes next.
                    Ok(None) | Err(Unsent::Aborted) => {}
                    Err(Unsent::Link(text)) => session.handle_link_lost(&text),
                    Err(Unsent::Own(text)) => session.handle_failed(&text),
                }
            }
            SourceAction::Freeze => {
                let frozen = match SourceTree::new(self.pid) {
                    Ok(tree) => self
                        .tree
                        .insert(tree)
                        .freeze()
                        .await
                        .map_err(|error| report::chain(&error)),
                    Err(error) => Err(format!("no thread to hold the process: {error}")),
                };
                match frozen {
                    Ok(frozen) => {
                        self.clock.frozen = Some(frozen);
                        session.handle_frozen();
                    }
                    Err(text) => session.handle_failed(&text),
                }
            }
            SourceAction::Capture => match self.capture().await {
                Ok(state) => session.handle_captured(state),
                Err(text) => session.handle_failed(&text),
            },
            SourceAction::Record(record) => match self.journal.record(record) {
                Ok(()) => session.handle_recorded(record),
                Err(error) => session.handle_record_failed(
                    record,
                    &format!("the journal cannot be written: {error}"),
                ),
            },
            SourceAction::Park => match self.park().await {
                Ok(()) => session.handle_parked(),
                Err(text) => session.handle_failed(&text),
            },
            SourceAction::Serve(running) => {
                self.ledger.pages_resident_at_run = running.pages_resident;
                // Threads wait already.
                if let Some(serve) = self.links.faults.serve.take() {
                    let _ = serve.send(self.pids());
                }
                // For the keeper: from here on a killed engine means a lost process, not an undecided one.
                if let Err(error) = self.journal.record(Record::Run) {
                    tracing::error!("the journal cannot be written: {error}");
                }
                // The process runs on the target: what cannot be had from here any more makes its threads wait, and nothing more.
                match self.serve().await {
                    Ok(()) | Err(Unsent::Aborted) => {}
                    Err(Unsent::Link(text) | Unsent::Own(text)) => {
                        self.page_service.spawn(std::future::ready(text));
                    }
                }
            }
            SourceAction::Thaw => {
                let thawed = match self.tree.take() {
                    Some(tree) => tree.roll_back().await,
                    None => Ok(()),
                };
                match thawed {
                    // For the keeper: there is nothing left to let go.
                    Ok(()) => {
                        if let Err(error) = self.journal.record(Record::Thawed) {
                            tracing::warn!("the journal cannot be written: {error}");
                        }
                    }
                    Err(error) => self.stuck = Some(error),
                }
            }
            SourceAction::Kill => {
                if let Ok(tree) = self.tree() {
                    if let Err(error) = tree.kill().await {
                        tracing::error!(
                            "{}: kill -KILL {}",
                            report::chain(&error),
                            report::all_of(&self.pid)
                        );
                    }
                }
                for file in std::mem::take(&mut self.moved) {
                    if let Err(error) = file.remove() {
                        tracing::warn!(
                            "{} went along and could not be removed here: {error}",
                            file.name()
                        );
                    }
                }
                self.account();
                session.handle_figures(self.done());
                session.handle_killed();
            }
            SourceAction::Reconnect | SourceAction::Finish(_) => {}
        }
    }

    fn tree(&self) -> Result<&SourceTree, String> {
        self.tree
            .as_ref()
            .ok_or_else(|| "nothing is held".to_owned())
    }

    async fn park(&mut self) -> Result<(), String> {
        self.locks = std::mem::take(&mut self.locks).in_the_way(self.waits_for_locks);
        let waited_for = self.locks.waited_for();
        match waited_for.map_err(|error| report::chain(&error))? {
            Some(who) if self.waits_for_locks => {
                return Err(format!(
                    "the target sees the same file, and {who}, and would get it on the way"
                ));
            }
            // Theirs when the copy here has ended, and not before that is certain.
            Some(_) => self.locks = HeldLocks::default(),
            None => {}
        }
        let parked = self.tree()?.park().await;
        parked.map_err(|error| report::chain(&error))
    }

    /// COMMIT is recorded: the copy stays stopped, or gets them again before it runs. On the target they may already be had once more,
    /// where they are for reading; there the program must find none but its own.
    async fn give_up_locks(&mut self) {
        let locks = std::mem::take(&mut self.locks);
        if let (Some(tree), false) = (&self.tree, locks.is_empty()) {
            // The target cannot have them then, and refuses.
            if let Err(error) = self.journal.record(Record::Unlocked) {
                tracing::warn!("the journal cannot be written: {error}");
            } else if let Err(error) = tree.give_up_locks(locks).await {
                tracing::warn!("{}", report::chain(&error));
            }
        }
    }

    async fn capture(&mut self) -> Result<State, String> {
        let (survey, options) = self.surveyed.take().ok_or("it was captured before")?;
        let captured = match self.tree()?.capture(survey, options).await {
            Ok((captured, again)) => {
                self.clock.frozen = again.or(self.clock.frozen);
                captured
            }
            Err(commit::Error::Capture(pageferry_pageserver::Error::Refused(refusals))) => {
                self.refused = refusals;
                return Err("what came since the survey cannot be carried".to_owned());
            }
            Err(error) => return Err(report::chain(&error)),
        };
        self.pages = captured.pages;
        self.shared = captured.shared;
        self.moved = captured.moved;
        self.locks = captured.held_locks;
        Ok(State::new(&captured.tree))
    }

    /// Sends on the control stream, but not for ever to a target that has fallen silent: the process may be frozen. After an
    /// error the stream is of no use, since a frame may have been sent in part. What comes meanwhile is kept: a target that gave
    /// up reads no more, and would be waited for while it waits for us.
    async fn send(&mut self, frame: impl Into<Frame>) -> Result<(), Unsent> {
        let Links {
            control,
            sender,
            receiver,
            ..
        } = &mut self.links;
        let sending = sender.send(frame);
        let silence = control.silent_for(transport::silence_max());
        tokio::pin!(sending, silence);
        loop {
            tokio::select! {
                biased;
                frame = receiver.expect() => match frame {
                    Ok(frame) => {
                        let aborted = frame.tag() == Tag::Abort;
                        if self.early.len() == EARLY_MAX || frame.tag() == Tag::Verdict {
                            return Err(Unsent::Link(format!("the target sent {} out of order", frame.tag())));
                        }
                        self.early.push_back(frame);
                        if aborted {
                            return Err(Unsent::Aborted);
                        }
                    }
                    Err(error) => return Err(Unsent::Link(report::chain(&error))),
                },
                sent = &mut sending => {
                    return sent.map_err(|error| Unsent::Link(report::chain(&error)));
                }
                error = &mut silence => {
                    return Err(Unsent::Link(report::chain(&error)));
                }
            }
        }
    }

    /// Sends the pages that must be there at the first instruction; how many have data.
    async fn send_eager(&mut self) -> Result<u64, Unsent> {
        let mut page_count = 0;
        let mut processes = Processes::new(self.pids());
        for index in 0..self.pages.len() {
            let reader = processes.reader(ObjectId::space(index).0)?;
            for range in std::mem::take(&mut self.pages[index].eager) {
                let mut next = range.start;
                while next < range.end {
                    let left = PageRange {
                        start: next,
                        end: range.end,
                    };
                    let batch = reader.batch(0, left)?;
                    next = batch.range().end;
                    page_count += batch.data_page_count() as u64;
                    self.send(batch).await?;
                }
            }
        }
        for pages in std::mem::take(&mut self.shared) {
            let mut left = pages.range();
            let mut reader = SharedReader::open(pages)?;
            loop {
                left = reader.skip_hole(left)?;
                if left.is_empty() {
                    break;
                }
                let batch = reader.batch(left)?;
                left.start = batch.range().end;
                page_count += batch.data_page_count() as u64;
                self.send(batch).await?;
            }
        }
        Ok(page_count)
    }

    /// Sends the page map of the frozen process, and beside it begins to serve its pages in bulk; faults are served already.
    async fn serve(&mut self) -> Result<(), Unsent> {
        let pids = self.pids();
        let (bulk, served) = (self.links.bulk.clone(), Arc::clone(&pids));
        self.page_service.spawn(async move {
            page_service::serve(&bulk, || Processes::new(Arc::clone(&served))).await;
            "the target closed the bulk connection".to_owned()
        });
        let faults = self.links.faults.link.clone();
        self.page_service.spawn(async move {
            let error = faults.closed().await;
            format!("the fault connection is gone: {}", report::chain(&error))
        });
        let mut processes = Processes::new(pids);
        let mut total = 0;
        for (index, pages) in std::mem::take(&mut self.pages).into_iter().enumerate() {
            let object = ObjectId::space(index).0;
            twice(|| processes.reader(object).map(drop))?;
            let reader = processes.reader(object)?;
            for piece in reader.page_map(&pages.lazy) {
                let (map, page_count) = piece?;
                total += page_count;
                self.send(map).await?;
                // Others serve pages on this thread.
                tokio::task::yield_now().await;
            }
        }
        self.send(MapEnd { pages_total: total }).await
    }

    /// The captured processes, in the order of the model.
    fn pids(&self) -> Arc<[i32]> {
        self.pages.iter().map(|pages| pages.pid).collect()
    }

    /// Fills in the times.
    fn account(&mut self) {
        let clock = &self.clock;
        let (Some(frozen), Some(sent), Some(ready), Some(running)) =
            (clock.frozen, clock.sent, clock.ready, clock.running)
        else {
            return;
        };
        self.ledger.freeze_ms = ms(frozen.stopped - frozen.began);
        self.ledger.capture_ms = ms(sent - frozen.stopped);
        self.ledger.rebuild_ms = ms(ready - sent);
        self.ledger.commit_ms = ms(running - ready);
        self.ledger.downtime_ms = ms(running - frozen.began);
        self.ledger.drain_ms = ms(running.elapsed());
    }

    /// The same for the target's ledger.
    fn done(&self) -> Done {
        let ns = |ms: f64| {
            Duration::try_from_secs_f64(ms / 1e3)
                .map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
        };
        Done {
            downtime_ns: ns(self.ledger.downtime_ms),
            freeze_ns: ns(self.ledger.freeze_ms),
            capture_ns: ns(self.ledger.capture_ms),
            rebuild_ns: ns(self.ledger.rebuild_ms),
            commit_ns: ns(self.ledger.commit_ms),
            eager_bytes: self.ledger.eager_bytes,
        }
    }

    async fn finish(mut self, end: End) -> Result<u8, Failure> {
        let pid = self.pid;
        self.account();
        let stuck = self.stuck.take();
        let outcome = match end {
            End::Session(SourceEnd::Failed { .. }) | End::Cancelled(_) if is_gone(pid) => {
                Err(Failure::Ended {
                    what: end.what(),
                    pid,
                })
            }
            End::Session(SourceEnd::Failed { .. }) | End::Cancelled(_) if stuck.is_some() => {
                let what = end.what();
                let why = stuck.as_ref().map(|error| report::chain(error));
                let why = why.unwrap_or_default();
                Err(match stuck {
                    Some(commit::Error::LockLost { .. }) => Failure::LockLost { what, pid, why },
                    _ => Failure::Stuck { what, pid, why },
                })
            }
            End::Session(SourceEnd::Done(resident)) => {
                self.ledger.pages_total = resident.pages_total;
                self.ledger.pages_faulted = resident.pages_faulted;
                Ok(exit::DONE)
            }
            End::Session(SourceEnd::Refused(verdict)) => {
                for refusal in &verdict.refusals {
                    self.report
                        .refusal(&format!("{}: {}", refusal.object, refusal.text));
                }
                Err(Failure::Refused)
            }
            End::Session(SourceEnd::Failed { .. }) if !self.refused.is_empty() => {
                for refusal in &self.refused {
                    self.report.refusal(&refusal.to_string());
                }
                Err(Failure::RefusedFrozen { pid })
            }
            End::Session(SourceEnd::Failed { .. }) => {
                let what = end.what();
                Err(if self.bad_data {
                    Failure::BadData { what, pid }
                } else {
                    Failure::Before {
                        what,
                        pid,
                        source: None,
                    }
                })
            }
            End::Cancelled(signal) => {
                eprintln!("pageferry: cancelled; pid {pid} runs on here, as before");
                Ok(exit::signalled(signal))
            }
            End::Session(SourceEnd::Lost { text: what }) | End::Unreachable(what) => {
                if self.clock.running.is_some() {
                    Err(Failure::Lost { what, pid })
                } else {
                    Err(Failure::Undecided { what, pid })
                }
            }
        };
        // What was said last must arrive: whoever has read it closes the link. That is us where the target gave up.
        if !self.has_last_word {
            let _ = tokio::time::timeout(LAST_WORD_WAIT, self.links.control.closed()).await;
        }
        self.ledger.wire_bytes = self.links.control.udp_bytes()
            + self.links.faults.link.udp_bytes()
            + self.links.bulk.udp_bytes();
        match &outcome {
            Err(
                Failure::Undecided { .. }
                | Failure::Lost { .. }
                | Failure::Stuck { .. }
                | Failure::LockLost { .. },
            ) => {
                tracing::error!(
                    "what was recorded lies in {}",
                    self.journal.path().display()
                );
                if let Some(tree) = self.tree.take() {
                    tree.abandon();
                }
            }
            _ => self.journal.settle(),
        }
        self.page_service.abort_all();
        self.links.control.close();
        self.links.bulk.close();
        self.links.faults.link.close();
        outcome
    }
}

/// Whether the process ended, or is ending.
pub(crate) fn is_gone(pid: i32) -> bool {
    procfs::status(pid, pid).map_or_else(
        |error| error.is_gone(),
        |status| matches!(status.state, 'Z' | 'X'),
    )
}

pub(crate) fn new_id() -> std::io::Result<[u8; 16]> {
    let mut id = [0; 16];
    std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut id)?;
    Ok(id)
}

/// A migration id as people read it.
pub(crate) fn hex(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

async fn connect(
    args: &MigrateArgs,
    identity: &Identity,
    trust: &TrustSet,
    id: [u8; 16],
) -> Result<Links, BoxError> {
    let address = tokio::net::lookup_host(&args.to)
        .await
        .map_err(|error| format!("{}: {error}", args.to))?
        .next()
        .ok_or_else(|| format!("{} has no address", args.to))?;
    let control = transport::dial(address, identity, trust, Role::Control, None).await?;
    let (sender, receiver) = control.open().await?;
    let faults = FaultServer::start(address, identity.clone(), trust.clone(), id).await?;
    let bulk = transport::dial(address, identity, trust, Role::Bulk, None).await?;
    bulk.greet(hello(id, Role::Bulk)).await?;
    if faults.link.peer() != control.peer() || bulk.peer() != control.peer() {
        return Err("the connections ended at different hosts".into());
    }
    Ok(Links {
        control,
        sender,
        receiver,
        faults,
        bulk,
    })
}

fn hello(id: [u8; 16], role: Role) -> Hello {
    Hello::new(id, role, &host::host_name().unwrap_or_default())
}

/// Serves faults on a thread, a runtime and a socket of their own: bulk never stands in front of a fault.
struct FaultServer {
    link: Link,
    serve: Option<oneshot::Sender<Arc<[i32]>>>,
}

impl FaultServer {
    async fn start(
        address: SocketAddr,
        identity: Identity,
        trust: TrustSet,
        id: [u8; 16],
    ) -> Result<Self, BoxError> {
        let (ready, dialled) = oneshot::channel();
        let (serve, begin) = oneshot::channel();
        std::thread::Builder::new()
            .name("faults".into())
            .spawn(move || {
                let runtime = match tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                {
                    Ok(runtime) => runtime,
                    Err(error) => {
                        let _ = ready.send(Err(BoxError::from(error)));
                        return;
                    }
                };
                runtime.block_on(async move {
                    let greeted = async {
                        let link =
                            transport::dial(address, &identity, &trust, Role::Faults, None).await?;
                        link.greet(hello(id, Role::Faults)).await?;
                        Ok::<_, transport::Error>(link)
                    };
                    let link = match greeted.await {
                        Ok(link) => link,
                        Err(error) => {
                            let _ = ready.send(Err(error.into()));
                            return;
                        }
                    };
                    if ready.send(Ok(link.clone())).is_err() {
                        return;
                    }
                    let pids = tokio::select! {
                        pids = begin => pids,
                        _ = link.closed() => return,
                    };
                    if let Ok(pids) = pids {
                        page_service::serve(&link, || Processes::new(Arc::clone(&pids))).await;
                    }
                    link.close_and_wait().await;
                });
            })?;
        let link = dialled.await??;
        Ok(Self {
            link,
            serve: Some(serve),
        })
    }
}

/// Writes the tree's clocks into the plan, as late as can be: on the target they are slow by the time it travels, and the process
/// waits for that if it is not stopped for longer.
fn tell_time(plan: &mut Plan) -> Result<(), pageferry_tracee::Error> {
    // Both count from the host's first clocks, and we may be in a time namespace ourselves.
    let (tree, own) = (
        procfs::timens_offsets(plan.pid)?,
        procfs::timens_offsets(process::own_pid())?,
    );
    let (monotonic_offset, boottime_offset) =
        (tree.0.saturating_sub(own.0), tree.1.saturating_sub(own.1));
    let now = host::clocks()?;
    plan.monotonic_ns = now.monotonic_ns.saturating_add_signed(monotonic_offset);
    plan.boottime_ns = now.boottime_ns.saturating_add_signed(boottime_offset);
    plan.realtime_ns = now.realtime_ns;
    Ok(())
}

fn make_plan(args: &MigrateArgs, survey: &Survey) -> Result<Plan, pageferry_tracee::Error> {
    let mut plan = Plan {
        pid: args.pid,
        comm: survey.comm.clone(),
        tids: survey.tids.clone(),
        files: survey.files.clone(),
        carried: survey.carried.clone(),
        sockets: survey.sockets.clone(),
        resident_bytes: survey.resident_bytes,
        locked_bytes: survey.locked_bytes,
        user_address_end: survey.user_address_end,
        ..Plan::default()
    };
    plan.host = Some(plan::this_host()?);
    plan.set_file_check(plan::file_check(args.carry.file_check));
    plan.same_file = args
        .same_file
        .iter()
        .map(|path| path.to_string_lossy().into_owned())
        .collect();
    plan.force_cpu = args.force_cpu;
    plan.clock_keep = true;
    Ok(plan)
}
