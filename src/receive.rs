//! `pageferry receive`, the target's side of a crossing.
//!
//! The supervisor (see [`crate::cradle`]) stays single-threaded; the engine here speaks with the source, holds the husk
//! in a thread of its own, and answers page faults.

use std::time::{Duration, Instant};

use pageferry_image::model::task::Tree;
use pageferry_image::page::PAGE_SIZE;
use pageferry_restorer::fault::driver::{DriverHandle, Summary};
use pageferry_restorer::rebuild::locks::Waiting;
use pageferry_restorer::rebuild::shared::NewFiles;
use pageferry_restorer::rebuild::{Eager, Rebuilt};
use pageferry_tracee::host;
use pageferry_wire::message::{
    Abort, AbortCode, Done, Hello, Plan, Progress, Ready, Refusal, Resident, Role, Running, State,
    Verdict, Welcome,
};
use pageferry_wire::session::{Target, TargetAction, TargetEnd};
use pageferry_wire::{Frame, PageBatch, PageKind, Phase};
use tokio::task::JoinSet;

use crate::cli::{Clock, Common, Drain, ReceiveArgs};
use crate::commit::{self, Ends, TargetTree, next_end};
use crate::cradle::{Cradle, HuskOrder, supervise};
use crate::identity::{Identity, TrustSet};
use crate::journal::Journal;
use crate::migrate::hex;
use crate::pid_namespace::{self, Wanted};
use crate::report::{self, Ledger, Report};
use crate::stop::Stop;
use crate::transport::{FramedRecv, FramedSend, HANDSHAKE_TIMEOUT, Link, Listener, silence_max};
use crate::{check, drain, exit, plan};

/// Longest wait for the source to have read the last word.
const LAST_WORD_WAIT: Duration = Duration::from_secs(2);
/// How long the source's last word is waited for once every page is here.
const DONE_WAIT: Duration = Duration::from_secs(10);
/// Longest wait for the tree's clocks that nobody has to know of.
const CLOCK_WAIT_NOTED: Duration = Duration::from_millis(5);
/// Between two attempts to let go of a process that has all its pages.
const LET_GO_PAUSE: Duration = Duration::from_millis(500);
/// Pause between two looks at the drain for the progress line.
const PROGRESS_PAUSE: Duration = Duration::from_millis(200);

/// Runs the verb; the exit code.
pub fn run(args: &ReceiveArgs, common: &Common) -> u8 {
    let ended = pid_namespace::run(Wanted::new(args.new_pid_ns, None), || receive(args, common));
    ended.unwrap_or_else(|code| report::without_engine(common, String::new(), code))
}

fn receive(args: &ReceiveArgs, common: &Common) -> u8 {
    if let Some(missing) = check::first_missing() {
        eprintln!("pageferry: {missing}");
        return exit::HOST;
    }
    let opened = Identity::open_with_peers(&args.identity.identity, &args.trust);
    let (identity, trust) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            eprintln!("pageferry: {}", report::chain(&error));
            return exit::FAILED;
        }
    };
    let ended = supervise(|cradle| {
        let code = engine(args, common, &identity, &trust, cradle);
        pageferry_tracee::choke::report();
        code
    });
    if ended.silent {
        return report::without_engine(common, String::new(), ended.code);
    }
    ended.code
}

fn engine(
    args: &ReceiveArgs,
    common: &Common,
    identity: &Identity,
    trust: &TrustSet,
    mut cradle: Cradle,
) -> u8 {
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("pageferry: no runtime: {error}");
            return exit::FAILED;
        }
    };
    runtime.block_on(async {
        let mut listener = match Listener::bind(args.listen, identity, trust) {
            Ok(listener) => listener,
            Err(error) => {
                eprintln!("pageferry: {}", report::chain(&error));
                return exit::FAILED;
            }
        };
        let mut stop = match Stop::new() {
            Ok(stop) => stop,
            Err(error) => {
                eprintln!("pageferry: signals cannot be watched: {error}");
                return exit::FAILED;
            }
        };
        tracing::info!(
            "listening on {} as {}",
            listener.local_address(),
            identity.fingerprint()
        );
        let code = serve(args, common, &mut listener, &mut cradle, &mut stop).await;
        listener.close();
        let _ = tokio::time::timeout(Duration::from_secs(1), listener.wait_idle()).await;
        code
    })
}

async fn serve(
    args: &ReceiveArgs,
    common: &Common,
    listener: &mut Listener,
    cradle: &mut Cradle,
    stop: &mut Stop,
) -> u8 {
    let mut met = Met::default();
    loop {
        let links = tokio::select! {
            met = met.next(listener) => met,
            signal = stop.wait() => return exit::signalled(signal),
        };
        let mut report = Report::new(common);
        let links = match links {
            Ok(links) => links,
            Err(text) => {
                tracing::warn!("{text}");
                continue;
            }
        };
        report.set_id(links.id.clone());
        tracing::info!(id = %links.id, "migration from {} ({})", links.control.remote_address(), links.hello.host_name);
        let mut ledger = Ledger {
            id: links.id.clone(),
            mode: "post-copy".into(),
            ..Ledger::default()
        };
        let outcome = {
            let crossing = crossing(args, &mut report, &mut ledger, links, cradle, stop);
            tokio::pin!(crossing);
            loop {
                tokio::select! {
                    outcome = &mut crossing => break outcome,
                    other = listener.accept() => if let Some(Ok(link)) = other {
                        tokio::spawn(turn_away(link));
                    },
                }
            }
        };
        let code = match outcome {
            Ok(code) => code,
            Err(failure) => {
                report.failure(&failure);
                failure.exit_code()
            }
        };
        ledger.exit = code;
        report.ledger(&ledger);
        if args.once {
            return code;
        }
    }
}

/// Says that another migration is being served.
async fn turn_away(link: Link) {
    if let Ok((_, mut sender, _)) = link.greeted().await {
        let busy = Abort::new(
            Phase::Hello,
            AbortCode::Busy,
            "another migration is being received; try again when it is done",
        );
        if sender.send(busy).await.is_ok() {
            let _ = tokio::time::timeout(Duration::from_secs(1), link.closed()).await;
        }
    }
}

/// The connections of a migration, greeted.
struct Links {
    id: String,
    hello: Hello,
    own_name: String,
    control: Link,
    sender: FramedSend,
    receiver: FramedRecv,
    faults: Link,
    bulk: Link,
}

/// A greeted connection.
type Greeted = (Link, Hello, FramedSend, FramedRecv);

/// Connections of migrations that are not complete yet.
#[derive(Default)]
struct Met {
    greetings: JoinSet<Result<Greeted, String>>,
    waiting: Vec<(Instant, Greeted)>,
}

/// Connections that may wait for their companions at once.
const WAITING_MAX: usize = 32;

impl Met {
    /// Waits for the three connections of one migration, in whatever order they greet. The control link's hello is left
    /// to the session to answer.
    async fn next(&mut self, listener: &mut Listener) -> Result<Links, String> {
        let own_name = host::host_name().unwrap_or_default();
        loop {
            tokio::select! {
                link = listener.accept() => match link {
                    Some(Ok(link)) => {
                        let own_name = own_name.clone();
                        self.greetings.spawn(greet(link, own_name));
                    }
                    Some(Err(error)) => tracing::warn!("turned away: {}", report::chain(&error)),
                    None => return Err("the listener is closed".into()),
                },
                Some(greeted) = self.greetings.join_next() => match greeted {
                    Ok(Ok(greeted)) => {
                        self.waiting.retain(|(since, _)| since.elapsed() < HANDSHAKE_TIMEOUT);
                        if self.waiting.len() < WAITING_MAX {
                            let id = greeted.1.id();
                            self.waiting.push((Instant::now(), greeted));
                            if let Some(links) = self.complete(id, &own_name) {
                                return Ok(links);
                            }
                        }
                    }
                    Ok(Err(text)) => tracing::warn!("{text}"),
                    Err(error) => tracing::warn!("a greeting was given up: {error}"),
                },
            }
        }
    }

    /// The connections of migration `id`, if all are here and end at the same peer.
    fn complete(&mut self, id: [u8; 16], own_name: &str) -> Option<Links> {
        let place = |role: Role| {
            self.waiting
                .iter()
                .position(|(_, (_, hello, ..))| hello.id() == id && hello.role() == role)
        };
        place(Role::Control)?;
        place(Role::Faults)?;
        place(Role::Bulk)?;
        let mut take = |role: Role| {
            let at = self
                .waiting
                .iter()
                .position(|(_, (_, hello, ..))| hello.id() == id && hello.role() == role)?;
            Some(self.waiting.swap_remove(at).1)
        };
        let (control, hello, sender, receiver) = take(Role::Control)?;
        let (faults, bulk) = (take(Role::Faults)?.0, take(Role::Bulk)?.0);
        if faults.peer() != control.peer() || bulk.peer() != control.peer() {
            tracing::warn!("three connections of one migration came from different hosts");
            return None;
        }
        Some(Links {
            id: hex(&id),
            hello,
            own_name: own_name.to_owned(),
            control,
            sender,
            receiver,
            faults,
            bulk,
        })
    }
}

async fn greet(link: Link, own_name: String) -> Result<Greeted, String> {
    let (hello, mut sender, receiver) = link
        .greeted()
        .await
        .map_err(|error| report::chain(&error))?;
    if hello.role() != Role::Control {
        let version = hello.version().map_err(|error| report::chain(&error))?;
        sender
            .send(Welcome {
                version,
                host_name: own_name,
            })
            .await
            .map_err(|error| report::chain(&error))?;
    }
    Ok((link, hello, sender, receiver))
}

/// Why a migration did not end well here.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(
        "{what}; the source sent what cannot be: use the same version on both hosts; nothing runs here, the source keeps the process"
    )]
    BadData { what: String },
    #[error("{what}; nothing runs here, the source keeps the process")]
    Before { what: String },
    #[error("{what}; the process ran here and was ended, since pages of it can no longer be had")]
    Lost { what: String },
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Self::BadData { .. } => exit::BAD_DATA,
            Self::Before { .. } => exit::FAILED,
            Self::Lost { .. } => exit::LOST,
        }
    }
}

async fn crossing(
    args: &ReceiveArgs,
    report: &mut Report,
    ledger: &mut Ledger,
    mut links: Links,
    cradle: &mut Cradle,
    stop: &mut Stop,
) -> Result<u8, Failure> {
    let mut session = Target::new(&links.own_name);
    let hello = std::mem::take(&mut links.hello);
    let mut shell = Shell {
        args,
        report,
        ledger,
        links,
        cradle,
        in_cradle: false,
        pid: 0,
        offsets: ClockOffsets {
            monotonic_ns: 0,
            boottime_ns: 0,
            keep: false,
        },
        tree: None,
        bad_data: false,
        plan: None,
        state: None,
        rebuilt: Vec::new(),
        new_files: NewFiles::default(),
        waiting: Vec::new(),
        resident_at_run: 0,
        committed: None,
        running: None,
        journal: None,
        handle: None,
        driver: JoinSet::new(),
        ended: None,
        source_lost: None,
    };
    if let Err(error) = session.handle_frame(hello.into()) {
        tracing::warn!("{}", report::chain(&error));
    }
    let end = shell.walk(&mut session, stop).await;
    shell.finish(end).await
}

/// How the walk ended.
enum End {
    Session(TargetEnd),
    /// A signal, before the process could run.
    Cancelled(i32),
    /// The operator gave up waiting for a lost source.
    GivenUp(String),
}

/// Does what the session says, and tells it what came of it.
struct Shell<'a> {
    args: &'a ReceiveArgs,
    report: &'a mut Report,
    ledger: &'a mut Ledger,
    links: Links,
    cradle: &'a mut Cradle,
    /// A husk, or the process, is in the cradle and must not outlive a failure.
    in_cradle: bool,
    pid: i32,
    offsets: ClockOffsets,
    tree: Option<TargetTree>,
    /// The source sent what cannot be.
    bad_data: bool,
    /// What the verdict was about.
    plan: Option<Plan>,
    /// What is to be built, and the pages that came with it.
    state: Option<(Tree, Eager)>,
    rebuilt: Vec<Rebuilt>,
    new_files: NewFiles,
    /// Locks that the source is to give up before it hands over.
    waiting: Vec<Waiting>,
    resident_at_run: u64,
    committed: Option<Instant>,
    running: Option<Instant>,
    journal: Option<Journal>,
    handle: Option<DriverHandle>,
    driver: JoinSet<Result<Summary, String>>,
    ended: Option<Ends>,
    source_lost: Option<String>,
}

impl Shell<'_> {
    async fn walk(&mut self, session: &mut Target, stop: &mut Stop) -> End {
        let control = self.links.control.clone();
        let silence = control.silent_for(silence_max());
        tokio::pin!(silence);
        let mut silent = false;
        let mut closed = false;
        let mut cancelled = None;
        let mut phase = Phase::Hello;
        let mut progress = tokio::time::interval(PROGRESS_PAUSE);
        loop {
            while let Some(action) = session.poll() {
                if session.phase() != phase {
                    phase = session.phase();
                    self.report.phase(phase);
                }
                match action {
                    TargetAction::Finish(end) => {
                        return match cancelled {
                            Some(signal) if matches!(end, TargetEnd::Failed { .. }) => {
                                End::Cancelled(signal)
                            }
                            _ => End::Session(end),
                        };
                    }
                    action => self.perform(action, session).await,
                }
            }
            let done_deadline = async {
                match session.phase() {
                    Phase::Done => tokio::time::sleep(DONE_WAIT).await,
                    _ => std::future::pending().await,
                }
            };
            let ended = next_end(&mut self.ended);
            tokio::select! {
                frame = self.links.receiver.expect(), if !closed => match frame {
                    Ok(Frame::Pages(batch)) => {
                        let kept = match &mut self.state {
                            Some((_, eager)) => keep_eager(&batch, eager),
                            // It could not be decoded or made, which has been said.
                            None => Ok(()),
                        };
                        if let Err(Unkept { text, is_bad }) = kept {
                            self.bad_data |= is_bad;
                            session.handle_failed(&text);
                        }
                    }
                    Ok(frame) => {
                        match &frame {
                            Frame::Commit(_) => self.committed = Some(Instant::now()),
                            Frame::Done(done) => enter(self.ledger, done),
                            _ => {}
                        }
                        if let Err(error) = session.handle_frame(frame) {
                            self.bad_data |= report::is_bad_data(&error);
                            tracing::warn!("{}", report::chain(&error));
                        }
                    }
                    Err(error) => {
                        closed = true;
                        self.bad_data |= report::is_bad_data(&error);
                        self.source_lost = Some(report::chain(&error));
                        session.handle_link_lost(&report::chain(&error));
                    }
                },
                error = &mut silence, if !silent && !closed => {
                    silent = true;
                    self.source_lost = Some(report::chain(&error));
                    session.handle_link_lost(&report::chain(&error));
                }
                Some(over) = self.driver.join_next() => match over {
                    Ok(Ok(summary)) => {
                        // Before the source hears of it, and gives up its copy: our death must not be the process's any more.
                        match self.let_go().await {
                            Ok(()) => session.handle_resident(self.resident(&summary)),
                            Err(text) => session.handle_failed(&text),
                        }
                    }
                    Ok(Err(text)) => session.handle_failed(&text),
                    Err(error) => session.handle_failed(&error.to_string()),
                },
                (pid, status) = ended => {
                    if let Some(handle) = &self.handle {
                        handle.ended(pid);
                    }
                    tracing::info!("pid {pid} ended by itself (wait status {status:#x})");
                }
                _ = progress.tick(), if self.handle.is_some() => {
                    if let Some(seen) = self.handle.as_ref().map(DriverHandle::progress) {
                        if seen.pages_total > 0 && self.source_lost.is_none() {
                            self.report.progress(seen.pages_total, seen.pages_resident, seen.pages_faulted);
                            let frame = Progress {
                                pages_total: seen.pages_total,
                                pages_resident: seen.pages_resident,
                                pages_faulted: seen.pages_faulted,
                            };
                            let _ = self.links.sender.send(frame).await;
                        }
                    }
                }
                signal = stop.wait() => {
                    if session.handle_cancel() {
                        cancelled = Some(signal);
                    } else if signal == nix::libc::SIGHUP {
                        tracing::warn!("the terminal is gone; the drain goes on");
                    } else if let Some(why) = &self.source_lost {
                        return End::GivenUp(why.clone());
                    } else if let Some(handle) = &self.handle {
                        tracing::warn!("the process runs here and cannot be given back: fetching all its pages, then ending");
                        handle.drain(true);
                    }
                }
                () = done_deadline => session.handle_link_lost("the source did not say that its stopped copy ended; look there"),
            }
        }
    }

    async fn perform(&mut self, action: TargetAction, session: &mut Target) {
        match action {
            TargetAction::Send(frame) => {
                if let Err(error) = self.links.sender.send(frame).await {
                    self.source_lost = Some(report::chain(&error));
                    session.handle_link_lost(&report::chain(&error));
                }
            }
            TargetAction::Check(plan) => {
                match self.check(&plan).await {
                    Ok(verdict) => session.handle_verdict(verdict),
                    Err(text) => session.handle_failed(&text),
                }
                self.plan = Some(plan);
            }
            TargetAction::Prepare => match TargetTree::new(self.pid) {
                Ok(tree) => self.tree = Some(tree),
                Err(error) => {
                    session.handle_failed(&format!("no thread to hold the process: {error}"))
                }
            },
            // Built when its eager pages are here too.
            TargetAction::Rebuild(state) => match self.take_state(&state) {
                Ok(state) => self.state = Some(state),
                Err(text) => session.handle_failed(&text),
            },
            TargetAction::EagerPages(end) => match self.rebuild(end.page_count).await {
                Ok(ready) => session.handle_rebuilt(ready),
                Err(text) => session.handle_failed(&text),
            },
            TargetAction::Record(record) => {
                let written = match &mut self.journal {
                    Some(journal) => journal.record(record),
                    None => Journal::create(self.report.id(), "target", self.pid, None).and_then(
                        |journal| {
                            let journal = self.journal.insert(journal);
                            journal.record(record)
                        },
                    ),
                };
                match written {
                    Ok(()) => session.handle_recorded(record),
                    Err(error) => session.handle_record_failed(
                        record,
                        &format!("the journal cannot be written: {error}"),
                    ),
                }
            }
            TargetAction::ClearExitKill => match self.take_right().await {
                Ok(()) => session.handle_exit_kill_cleared(),
                Err(text) => session.handle_failed(&text),
            },
            TargetAction::Release => match self.release().await {
                Ok(running) => session.handle_released(running),
                Err(text) => session.handle_failed(&text),
            },
            TargetAction::Destroy => {
                self.driver.abort_all();
                self.tree = None;
                if self.in_cradle {
                    match self.cradle.destroy() {
                        Ok(()) => self.in_cradle = false,
                        Err(error) => {
                            session.handle_destroy_failed(&error);
                            return;
                        }
                    }
                }
                session.handle_destroyed();
            }
            TargetAction::Map(map) => match (map.ranges(), &self.handle) {
                (Ok(ranges), Some(handle)) => handle.map(map.object, &ranges),
                (Err(error), _) => session.handle_failed(&report::chain(&error)),
                (Ok(_), None) => {}
            },
            TargetAction::MapEnd(_) => {
                if let Some(handle) = &self.handle {
                    handle.map_end();
                }
            }
            TargetAction::Wait => {
                let why = self.source_lost.clone().unwrap_or_default();
                tracing::error!(
                    "the source is lost ({why}); threads that touch missing pages wait. Ctrl-C or SIGTERM gives up and ends the process"
                );
                if let Some(handle) = &self.handle {
                    handle.link_lost();
                }
            }
            TargetAction::SourceLost(abort) => {
                session.handle_failed(&format!(
                    "the source lost the pages it served: {}",
                    abort.text
                ));
            }
            TargetAction::Finish(_) => {}
        }
    }

    /// Looks at the plan, and makes the husk: what would fail then must be said in the verdict.
    async fn check(&mut self, plan: &Plan) -> Result<Verdict, String> {
        let now = host::clocks().map_err(|error| report::chain(&error))?;
        self.offsets = ClockOffsets::new(plan, self.args.clock, now);
        self.pid = plan.pid;
        // Files are read, with --file-check content to their end: the links must not fall silent meanwhile.
        let (judged, force_cpu) = (plan.clone(), self.args.force_cpu);
        let judging = tokio::task::spawn_blocking(move || plan::judge(&judged, force_cpu));
        let mut verdict = judging.await.map_err(|error| error.to_string())?;
        if verdict.refusals.is_empty() {
            match self.cradle.make(self.offsets.order(plan.pid)) {
                Ok(()) => self.in_cradle = true,
                Err(text) => verdict.refusals.push(Refusal {
                    object: format!("pid {}", plan.pid),
                    text: format!("no process can be prepared on the target: {text}"),
                }),
            }
        }
        for refusal in &verdict.refusals {
            self.report
                .refusal(&format!("{}: {}", refusal.object, refusal.text));
        }
        Ok(verdict)
    }

    /// Decodes the tree, and makes its shared objects: they are filled by the pages that come next.
    fn take_state(&mut self, state: &State) -> Result<(Tree, Eager), String> {
        let tree = state.decode().map_err(|error| {
            self.bad_data |= report::is_bad_data(&error);
            report::chain(&error)
        })?;
        let eager = Eager::new(&tree).map_err(|error| report::chain(&error))?;
        Ok((tree, eager))
    }

    async fn rebuild(&mut self, eager_page_count: u64) -> Result<Ready, String> {
        let began = Instant::now();
        let (tree, eager) = self.state.take().ok_or("no state came")?;
        if eager.page_count() != eager_page_count {
            return Err(format!(
                "{} of {eager_page_count} pages came with the state",
                eager.page_count()
            ));
        }
        let plan = self.plan.take().ok_or("no plan came")?;
        let looked_at = tokio::task::spawn_blocking(move || (plan::late_files(&tree, &plan), tree));
        let (late, mut tree) = looked_at.await.map_err(|error| error.to_string())?;
        if !late.is_empty() {
            return Err(format!(
                "what the process opened since the plan is not the same on the target: {}",
                late.join("; ")
            ));
        }
        self.offsets.adjust(&mut tree)?;
        let frozen_at = (tree.monotonic_ns, tree.boottime_ns);
        let target = self.tree.as_ref().ok_or("nothing is prepared")?;
        let (rebuilt, new_files, waiting) = target
            .rebuild(
                tree,
                eager,
                self.offsets.monotonic_ns,
                self.offsets.boottime_ns,
            )
            .await
            .map_err(|error| report::chain(&error))?;
        let behind = self.offsets.behind(frozen_at)?;
        if behind > silence_max() {
            return Err(format!("its clocks would go back by {behind:?}"));
        }
        if behind > CLOCK_WAIT_NOTED {
            tracing::warn!(
                "the process stays stopped for {behind:?} more, or its clocks would go back"
            );
        }
        tokio::time::sleep(behind).await;
        self.resident_at_run = rebuilt.iter().map(Rebuilt::page_count).sum();
        self.rebuilt = rebuilt;
        self.new_files = new_files;
        let waits_for_locks = !waiting.is_empty();
        self.waiting = waiting;
        Ok(Ready {
            waits_for_locks,
            rebuild_ns: nanoseconds(began),
            pages_resident: self.resident_at_run,
        })
    }

    /// COMMIT is here and RUN is recorded: faults can be answered, and our death may no longer leave the source in doubt.
    async fn take_right(&mut self) -> Result<(), String> {
        let rebuilt = std::mem::take(&mut self.rebuilt);
        if rebuilt.is_empty() {
            return Err("nothing is rebuilt".into());
        }
        let waiting = std::mem::take(&mut self.waiting);
        if !waiting.is_empty() {
            let tree = self.tree.as_ref().ok_or("nothing is prepared")?;
            tree.take_locks(waiting)
                .await
                .map_err(|error| report::chain(&error))?;
        }
        let drain = self.args.drain == Drain::On;
        let connections = drain::from_links(&self.links.faults, &self.links.bulk)
            .await
            .map_err(|error| report::chain(&error))?;
        let (driver, handle) =
            drain::start(rebuilt, connections, drain).map_err(|error| report::chain(&error))?;
        self.handle = Some(handle);
        self.driver
            .spawn(async move { driver.run().await.map_err(|error| report::chain(&error)) });
        self.cradle.running()?;
        let tree = self.tree.as_ref().ok_or("nothing is prepared")?;
        tree.clear_exit_kill()
            .await
            .map_err(|error| report::chain(&error))
    }

    async fn release(&mut self) -> Result<Running, String> {
        let tree = self.tree.as_mut().ok_or("nothing is prepared")?;
        self.ended = tree.ended();
        tree.release()
            .await
            .map_err(|error| report::chain(&error))?;
        self.running = Some(Instant::now());
        self.new_files.keep();
        tracing::info!(id = %self.report.id(), "pid {} runs here; its pages follow", self.pid);
        let commit_ns = self.committed.map_or(0, nanoseconds);
        Ok(Running {
            commit_ns,
            pages_resident: self.resident_at_run,
        })
    }

    /// Nothing is missing: the process is its own again, and the child of the nearest subreaper or init.
    async fn let_go(&mut self) -> Result<(), String> {
        if let Some(tree) = &self.tree {
            // For as long as it takes: held, the process would end with us, and the source gives up its copy next.
            while let Err(error) = tree.let_go().await {
                if matches!(error, commit::Error::Thread) {
                    return Err(report::chain(&error));
                }
                tracing::error!(
                    "pid {} has all its pages but is still held, trying again: {}",
                    self.pid,
                    report::chain(&error)
                );
                tokio::time::sleep(LET_GO_PAUSE).await;
            }
        }
        if let Err(error) = self.cradle.let_go() {
            tracing::warn!("{error}");
        }
        self.in_cradle = false;
        Ok(())
    }

    fn resident(&mut self, summary: &Summary) -> Resident {
        self.handle = None;
        let drain_ns = self.running.map_or(0, nanoseconds);
        self.ledger.drain_ms = drain_ns as f64 / 1e6;
        self.ledger.pages_total = summary.pages_total;
        self.ledger.pages_faulted = summary.pages_faulted;
        self.ledger.pages_resident_at_run = self.resident_at_run;
        Resident {
            pages_total: summary.pages_total,
            pages_resident_at_run: self.resident_at_run,
            pages_faulted: summary.pages_faulted,
            drain_ns,
            page_bytes: summary.pages_installed * PAGE_SIZE,
        }
    }

    async fn finish(mut self, end: End) -> Result<u8, Failure> {
        // It may not have heard what was decided here, and sends its operator to look.
        let mut undecided_there = self.source_lost.is_some()
            || matches!(
                end,
                End::Session(TargetEnd::Done {
                    confirmed: false,
                    ..
                })
            );
        let outcome = match end {
            End::Session(TargetEnd::Done { confirmed, .. }) => {
                if !confirmed {
                    tracing::warn!(
                        "the source did not say that its stopped copy ended; look there"
                    );
                }
                Ok(exit::DONE)
            }
            End::Session(TargetEnd::Refused(_)) => Ok(exit::REFUSED),
            End::Session(TargetEnd::Failed { phase, text }) => {
                let what = format!("failed in phase {phase}: {text}");
                Err(if self.bad_data {
                    Failure::BadData { what }
                } else {
                    Failure::Before { what }
                })
            }
            End::Cancelled(signal) => Ok(exit::signalled(signal)),
            End::Session(TargetEnd::Lost { text: what }) | End::GivenUp(what) => {
                Err(Failure::Lost { what })
            }
        };
        self.driver.abort_all();
        self.tree = None;
        if self.in_cradle {
            if let Err(error) = self.cradle.destroy() {
                tracing::error!("the prepared process could not be ended: {error}");
            }
        }
        if outcome.is_err() || matches!(outcome, Ok(code) if code != exit::DONE) {
            // The source closes when it has read the last word.
            let closed = self.links.control.closed();
            undecided_there |= tokio::time::timeout(LAST_WORD_WAIT, closed).await.is_err();
        }
        self.ledger.wire_bytes = self.links.control.udp_bytes()
            + self.links.faults.udp_bytes()
            + self.links.bulk.udp_bytes();
        self.links.control.close();
        match (&outcome, self.journal) {
            (Err(Failure::Lost { .. }), Some(journal)) => {
                tracing::error!("what was recorded lies in {}", journal.path().display());
            }
            (_, Some(journal)) if undecided_there => {
                tracing::warn!(
                    "the source may not know how this ended; what was decided lies in {}",
                    journal.path().display()
                );
            }
            (_, Some(journal)) => journal.settle(),
            _ => {}
        }
        outcome
    }
}

fn nanoseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// Why pages that came with the state are not kept.
struct Unkept {
    text: String,
    /// The source is to blame.
    is_bad: bool,
}

/// Keeps the pages that travel with the state, each verified.
fn keep_eager(batch: &PageBatch, eager: &mut Eager) -> Result<(), Unkept> {
    for run in batch.runs() {
        match run.kind {
            PageKind::Data => {
                let bytes = batch.verify_run(run).map_err(|error| Unkept {
                    text: report::chain(&error),
                    is_bad: true,
                })?;
                let taken = eager.take(batch.object(), run.range.start, &bytes);
                taken.map_err(|error| Unkept {
                    text: report::chain(&error),
                    is_bad: report::is_bad_data(&error),
                })?;
            }
            // Untouched pages are so here too, and guard regions are part of the mapping.
            PageKind::Zero | PageKind::Guard => {}
            // Which is said honestly.
            PageKind::Gone => {
                return Err(Unkept {
                    text: format!("page {:x} cannot be read on the source", run.range.start),
                    is_bad: false,
                });
            }
        }
    }
    Ok(())
}

/// The source's figures, in the target's ledger.
fn enter(ledger: &mut Ledger, done: &Done) {
    let ms = |ns: u64| ns as f64 / 1e6;
    ledger.freeze_ms = ms(done.freeze_ns);
    ledger.capture_ms = ms(done.capture_ns);
    ledger.rebuild_ms = ms(done.rebuild_ns);
    ledger.commit_ms = ms(done.commit_ns);
    ledger.downtime_ms = ms(done.downtime_ns);
    ledger.eager_bytes = done.eager_bytes;
}

/// What the tree's clocks are ahead of this host's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ClockOffsets {
    /// Against our own CLOCK_MONOTONIC.
    pub(crate) monotonic_ns: i64,
    /// Against our own CLOCK_BOOTTIME.
    pub(crate) boottime_ns: i64,
    /// Whether the tree gets a time namespace with these offsets.
    keep: bool,
}

impl ClockOffsets {
    pub(crate) fn new(plan: &Plan, clock: Clock, now: host::Clocks) -> Self {
        if clock == Clock::Jump {
            return Self {
                monotonic_ns: 0,
                boottime_ns: 0,
                keep: false,
            };
        }
        let ahead =
            |tree: u64, ours: u64| i64::from_ne_bytes(tree.wrapping_sub(ours).to_ne_bytes());
        Self {
            monotonic_ns: ahead(plan.monotonic_ns, now.monotonic_ns),
            boottime_ns: ahead(plan.boottime_ns, now.boottime_ns),
            keep: true,
        }
    }

    /// The husk of `pid` in which they hold.
    pub(crate) fn order(self, pid: i32) -> HuskOrder {
        HuskOrder {
            pid,
            set_sid: true,
            clock_offsets_ns: self.keep.then_some((self.monotonic_ns, self.boottime_ns)),
        }
    }

    /// With `--clock jump` the tree gets this host's clocks, which show another time: its timers go on from here with what they
    /// had left.
    ///
    /// # Errors
    /// If the clocks cannot be read.
    pub(crate) fn adjust(self, tree: &mut Tree) -> Result<(), String> {
        if !self.keep {
            let now = host::clocks().map_err(|error| report::chain(&error))?;
            tree.monotonic_ns = now.monotonic_ns;
            tree.boottime_ns = now.boottime_ns;
        }
        Ok(())
    }

    /// How far the tree's clocks are behind what it last saw. The plan was on its way for a while that nobody knows, and the
    /// offsets are short by that; if the freeze was shorter still, its clocks must be waited for, or they would go back.
    fn behind(self, (monotonic_ns, boottime_ns): (u64, u64)) -> Result<Duration, String> {
        if !self.keep {
            return Ok(Duration::ZERO);
        }
        let now = host::clocks().map_err(|error| report::chain(&error))?;
        let behind = |seen: u64, ours: u64, offset: i64| {
            seen.saturating_sub(ours.saturating_add_signed(offset))
        };
        Ok(Duration::from_nanos(
            behind(monotonic_ns, now.monotonic_ns, self.monotonic_ns).max(behind(
                boottime_ns,
                now.boottime_ns,
                self.boottime_ns,
            )),
        ))
    }
}
