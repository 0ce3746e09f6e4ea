//! `pageferry restore`: what an image holds runs, here and as often as anybody likes.
//!
//! The same husk, rebuild and fault engine as at the end of a crossing, with the image as the source of pages: there is
//! nobody to agree with, and nothing to lose but what is made here. An eager restore fills the memory before the process
//! runs, a lazy one behind it.

use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pageferry_image::model::memory::Kind;
use pageferry_image::model::task::Process;
use pageferry_image::page::PageRange;
use pageferry_image::store::Image;
use pageferry_pageserver::at_rest;
use pageferry_restorer::fault::driver::{DriverHandle, Summary};
use pageferry_restorer::rebuild::shared::NewFiles;
use pageferry_restorer::rebuild::{Eager, Rebuilt};
use pageferry_tracee::descriptor::PidFd;
use pageferry_tracee::{host, process, procfs};
use pageferry_wire::Phase;
use pageferry_wire::message::Refusal;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::cli::{Common, Drain, RestoreArgs};
use crate::commit::{Ends, TargetTree, next_end};
use crate::cradle::{Cradle, supervise};
use crate::identity::Identity;
use crate::isolation::Isolation;
use crate::origin::{self, Origin};
use crate::pid_namespace::Wanted;
use crate::receive::ClockOffsets;
use crate::report::{self, Ledger, Report, ms};
use crate::stop::Stop;
use crate::{check, drain, exit, migrate, pid_namespace, plan};

/// Pause between two looks at the drain for the progress line.
const PROGRESS_PAUSE: Duration = Duration::from_millis(200);

/// Why nothing runs, or not any more.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("the image cannot be restored; nothing was made")]
    Image(#[source] Box<origin::Error>),
    #[error("refused; nothing was made")]
    Refused,
    #[error("{what}; nothing is left of it here")]
    Before {
        what: String,
        /// The image is to blame.
        is_bad: bool,
    },
    #[error("{what}; the process ran and was ended, since pages of it cannot be had")]
    Lost { what: String },
    #[error("{what}; pid {pid} had all its pages and needs nobody here")]
    Complete { what: String, pid: i32 },
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Image(source) if source.is_bad_data() => exit::BAD_DATA,
            Self::Before { is_bad: true, .. } => exit::BAD_DATA,
            Self::Refused => exit::REFUSED,
            Self::Lost { .. } => exit::LOST,
            Self::Image(_) | Self::Before { .. } | Self::Complete { .. } => exit::FAILED,
        }
    }
}

fn before(what: impl Into<String>) -> Failure {
    Failure::Before {
        what: what.into(),
        is_bad: false,
    }
}

/// Runs the verb; the exit code: pageferry's own, or the status of a process that was waited for.
pub fn run(args: &RestoreArgs, common: &Common) -> u8 {
    let isolation = match isolation(args, common) {
        Ok(isolation) => isolation,
        Err(failure) => {
            Report::new(common).failure(&failure);
            return report::without_engine(common, mode(args), failure.exit_code());
        }
    };
    let wanted = Wanted::new(args.new_pid_ns, isolation.as_ref());
    let ended = pid_namespace::run(wanted, || supervised(args, common));
    ended.unwrap_or_else(|code| report::without_engine(common, mode(args), code))
}

/// What the copy must have for itself, if it is to be isolated. It looks into the image, and makes nothing.
fn isolation(args: &RestoreArgs, common: &Common) -> Result<Option<Isolation>, Failure> {
    let Some(path) = args.image.as_deref().filter(|_| args.isolate) else {
        return Ok(None);
    };
    let image = Image::open(path).map_err(|error| Failure::Image(Box::new(error.into())))?;
    let planned = Isolation::of(image.tree(), args.isolate_limit, &args.same_file);
    // The copies are looked at again: whatever they are of may be written to until they are made.
    let touched = plan::touched_files(image.tree(), &args.same_file);
    let touched = touched.iter().map(shown);
    match planned {
        Ok(planned) if touched.len() == 0 => Ok(Some(planned)),
        planned => {
            let report = Report::new(common);
            for refusal in planned.err().into_iter().flatten().chain(touched) {
                report.refusal(&refusal);
            }
            Err(Failure::Refused)
        }
    }
}

fn shown(refusal: &Refusal) -> String {
    format!("{}: {}", refusal.object, refusal.text)
}

fn supervised(args: &RestoreArgs, common: &Common) -> u8 {
    if let Some(missing) = check::first_missing() {
        eprintln!("pageferry: {missing}");
        return report::without_engine(common, mode(args), exit::HOST);
    }
    let ended = supervise(|cradle| {
        let code = engine(args, common, cradle);
        pageferry_tracee::choke::report();
        code
    });
    if ended.silent {
        return report::without_engine(common, mode(args), ended.code);
    }
    ended.code
}

fn mode(args: &RestoreArgs) -> String {
    if args.lazy {
        "restore-lazy".into()
    } else {
        "restore".into()
    }
}

fn engine(args: &RestoreArgs, common: &Common, cradle: Cradle) -> u8 {
    let mut report = Report::new(common);
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("pageferry: no runtime: {error}; nothing was made");
            return exit::FAILED;
        }
    };
    let mut ledger = Ledger {
        mode: mode(args),
        ..Ledger::default()
    };
    let outcome = runtime.block_on(restore(args, &mut report, &mut ledger, cradle));
    let code = outcome.unwrap_or_else(|failure| {
        report.failure(&failure);
        failure.exit_code()
    });
    ledger.id = report.id().to_owned();
    ledger.exit = code;
    report.ledger(&ledger);
    code
}

/// A process that is being made, and that ends with this unless it was let go.
struct Made {
    pid: i32,
    /// All of the tree, once they are known.
    pids: Vec<i32>,
    cradle: Option<Cradle>,
    tree: Option<TargetTree>,
    /// Removed behind it.
    new_files: NewFiles,
}

impl Made {
    /// The thread that holds it; there is one until it is dropped.
    fn tree(&mut self) -> Result<&mut TargetTree, Failure> {
        self.tree
            .as_mut()
            .ok_or_else(|| before("nothing is prepared"))
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        // Its tracer first, who is told of its end before its parent can be; the cradle then ends what that leaves.
        self.tree = None;
        if let Some(cradle) = &mut self.cradle {
            if let Err(error) = cradle.destroy() {
                tracing::error!("pid {} could not be ended: {error}", self.pid);
            }
        }
    }
}

async fn restore(
    args: &RestoreArgs,
    report: &mut Report,
    ledger: &mut Ledger,
    mut cradle: Cradle,
) -> Result<u8, Failure> {
    let mut stop =
        Stop::new().map_err(|error| before(format!("signals cannot be watched: {error}")))?;
    let id = migrate::new_id().map_err(|error| before(format!("no restore id: {error}")))?;
    report.set_id(migrate::hex(&id));
    report.phase(Phase::Plan);
    let began = Instant::now();
    let origin = tokio::select! {
        opened = open(args, id) => opened?,
        signal = stop.wait() => {
            eprintln!("pageferry: cancelled; nothing was made");
            return Ok(exit::signalled(signal));
        }
    };
    let mut tree = origin.tree.clone();
    let mut plan = plan::of_tree(&tree, origin.resident_bytes());
    plan.set_file_check(plan::file_check(args.file_check));
    let pid = plan.pid;
    let refusals = {
        let (plan, tree) = (plan.clone(), tree.clone());
        let (force_cpu, same_file) = (args.force_cpu, args.same_file.clone());
        tokio::task::spawn_blocking(move || {
            let verdict = plan::judge(&plan, force_cpu);
            for note in verdict.notes {
                tracing::warn!("{note}");
            }
            let mut refusals = verdict.refusals;
            refusals.extend(plan::touched_files(&tree, &same_file));
            refusals
        })
        .await
        .map_err(|error| before(error.to_string()))?
    };
    if !refusals.is_empty() {
        for refusal in &refusals {
            report.refusal(&shown(refusal));
        }
        return Err(Failure::Refused);
    }

    report.phase(Phase::Rebuild);
    let now = host::clocks().map_err(|error| before(report::chain(&error)))?;
    let offsets = ClockOffsets::new(&plan, args.clock, now);
    cradle
        .make(offsets.order(pid))
        .map_err(|text| before(format!("no process can be prepared: {text}")))?;
    let held = match TargetTree::new(pid) {
        Ok(tree) => tree,
        Err(error) => {
            let _ = cradle.destroy();
            return Err(before(format!("no thread to hold the process: {error}")));
        }
    };
    let mut made = Made {
        pid,
        pids: Vec::new(),
        cradle: Some(cradle),
        tree: Some(held),
        new_files: NewFiles::default(),
    };
    offsets.adjust(&mut tree).map_err(before)?;
    // What its threads touch on their way to their first instruction, and copied pages of files, which cannot be filled later.
    let at_first = |(object, process): (u32, &Process)| {
        let first = process.first_touch.iter();
        let mut wanted: Vec<PageRange> = first
            .filter_map(|range| PageRange::new(range.start, range.end))
            .chain(at_rest::mapped(process, Kind::FilePrivate))
            .collect();
        wanted.sort_unstable();
        (object, origin.data_in(object, &wanted))
    };
    let later = |(object, process): (u32, &Process)| {
        let wanted = at_rest::mapped(process, Kind::Anon);
        (object, origin.data_in(object, &wanted))
    };
    let mut at_once: Vec<_> = (1..).zip(&tree.processes).map(at_first).collect();
    at_once.extend(
        at_rest::shared(&tree).map(|(object, pages)| (object, origin.data_in(object, &[pages]))),
    );
    let lazy: Vec<_> = (1..).zip(&tree.processes).map(later).collect();
    let mut eager = Eager::new(&tree).map_err(|error| before(report::chain(&error)))?;
    origin
        .read(&at_once, &mut eager)
        .await
        .map_err(|error| bad_pages(&error))?;
    made.pids = tree.processes.iter().map(|process| process.pid).collect();
    let (rebuilt, new_files, waiting) = made
        .tree()?
        .rebuild(tree, eager, offsets.monotonic_ns, offsets.boottime_ns)
        .await
        .map_err(|error| before(report::chain(&error)))?;
    // Nobody will give them up.
    if let Some(lock) = waiting.first() {
        return Err(before(report::chain(&lock.refused())));
    }
    ledger.pages_resident_at_run = rebuilt.iter().map(Rebuilt::page_count).sum();

    let drains = !args.lazy || args.drain == Drain::On;
    let mut filling = Filling::start(rebuilt, &origin, lazy, drains).await?;
    if !args.lazy {
        match filling.filled(report, &mut stop, None).await {
            Ok(summary) => filling.enter(ledger, &summary),
            Err(Unfilled {
                signal: Some(signal),
                ..
            }) => {
                eprintln!("pageferry: cancelled; nothing is left of it here");
                return Ok(exit::signalled(signal));
            }
            Err(Unfilled { what, is_bad, .. }) => return Err(Failure::Before { what, is_bad }),
        }
        ledger.pages_resident_at_run = ledger.pages_total;
    }
    ledger.rebuild_ms = ms(began.elapsed());
    report.phase(Phase::Commit);
    let ended = made.tree()?.ended();
    made.new_files = new_files;
    release(&mut made, args.stopped).await?;
    ledger.downtime_ms = ms(began.elapsed());
    ledger.commit_ms = ledger.downtime_ms - ledger.rebuild_ms;
    let state = if args.stopped {
        "is here, stopped"
    } else {
        "runs"
    };
    tracing::info!(id = %report.id(), "pid {pid} {state}, {:.1} ms after the start", ledger.downtime_ms);
    if args.lazy {
        report.phase(Phase::Drain);
        match filling.filled(report, &mut stop, ended).await {
            Ok(summary) => filling.enter(ledger, &summary),
            Err(Unfilled { what, .. }) => return Err(Failure::Lost { what }),
        }
    }
    ledger.wire_bytes = origin.close();
    report.phase(Phase::Done);
    if let Err(error) = made.tree()?.let_go().await {
        return Err(Failure::Lost {
            what: format!("it could not be let go of: {}", report::chain(&error)),
        });
    }
    let Some(mut cradle) = made.cradle.take() else {
        return Ok(exit::DONE);
    };
    if args.detach {
        if let Err(error) = cradle.let_go() {
            tracing::warn!("{error}");
        }
        return Ok(exit::DONE);
    }
    // Its number may be somebody else's by the time a signal comes.
    let pidfd = PidFd::open(pid);
    let mut waiting = tokio::task::spawn_blocking(move || cradle.wait_for_end(pid));
    loop {
        tokio::select! {
            ended = &mut waiting => {
                let ended = ended.map_err(|error| error.to_string()).and_then(|ended| ended);
                return match ended {
                    Ok(status) => Ok(exit_of(status)),
                    Err(what) => Err(Failure::Complete { what, pid }),
                };
            }
            signal = stop.wait() => {
                if let Ok(process) = &pidfd {
                    // It may have ended.
                    let _ = process.send_signal(signal);
                }
            }
        }
    }
}

/// Says that it may run, and lets it.
async fn release(made: &mut Made, stopped: bool) -> Result<(), Failure> {
    let failed = |error| before(report::chain(&error));
    if let Some(cradle) = &mut made.cradle {
        cradle.running().map_err(before)?;
    }
    let pids = std::mem::take(&mut made.pids);
    let tree = made.tree()?;
    tree.clear_exit_kill().await.map_err(failed)?;
    if stopped {
        // One for each thread, in a queue of its own: none executes an instruction before it has taken that, whichever goes first.
        // SIGCONT takes them all away.
        let failed = |error| before(report::chain(&error));
        for pid in pids {
            for tid in procfs::tids(pid).map_err(failed)? {
                process::signal_thread(pid, tid, Signal::SIGSTOP as i32).map_err(failed)?;
            }
        }
    }
    tree.release().await.map_err(failed)?;
    made.new_files.keep();
    Ok(())
}

/// Opens the image, here or there.
async fn open(args: &RestoreArgs, id: [u8; 16]) -> Result<Origin, Failure> {
    let failed = |source| Failure::Image(Box::new(source));
    let (Some(from), Some(name)) = (&args.from, &args.name) else {
        let path = args.image.as_deref().unwrap_or(Path::new(""));
        return Origin::here(path).map_err(failed);
    };
    let (identity, peers) = Identity::open_with_peers(&args.identity.identity, &args.peer)
        .map_err(|error| before(report::chain(&error)))?;
    Origin::there(from, name, &identity, &peers, id)
        .await
        .map_err(failed)
}

fn bad_pages(error: &origin::Error) -> Failure {
    Failure::Before {
        what: report::chain(error),
        is_bad: error.is_bad_data(),
    }
}

/// As a shell tells it.
fn exit_of(status: i32) -> u8 {
    match status & 0x7f {
        0 => u8::try_from(status >> 8 & 0xff).unwrap_or(exit::FAILED),
        signal => exit::signalled(signal),
    }
}

/// Why the memory is not full.
struct Unfilled {
    what: String,
    /// The image is to blame.
    is_bad: bool,
    /// The signal that ended the wait.
    signal: Option<i32>,
}

/// The memory of a process while it is being filled.
struct Filling {
    driver: JoinHandle<Result<Summary, String>>,
    handle: DriverHandle,
    failures: mpsc::UnboundedReceiver<origin::Error>,
    began: Instant,
}

impl Filling {
    /// Must be called inside a tokio runtime.
    async fn start(
        rebuilt: Vec<Rebuilt>,
        origin: &Origin,
        lazy: Vec<(u32, Vec<PageRange>)>,
        drains: bool,
    ) -> Result<Self, Failure> {
        let (connections, failures) = origin.connect().await.map_err(|error| bad_pages(&error))?;
        let (driver, handle) = drain::start(rebuilt, connections, drains)
            .map_err(|error| before(report::chain(&error)))?;
        for (object, ranges) in lazy {
            handle.map(object, &ranges);
        }
        handle.map_end();
        let driver =
            tokio::spawn(async move { driver.run().await.map_err(|error| report::chain(&error)) });
        Ok(Self {
            driver,
            handle,
            failures,
            began: Instant::now(),
        })
    }

    /// Until every page is there, or nobody wants one any more. `ended` is given for a process that runs: a signal then switches the
    /// drain on, and gives up only where pages cannot be had.
    async fn filled(
        &mut self,
        report: &mut Report,
        stop: &mut Stop,
        mut ended: Option<Ends>,
    ) -> Result<Summary, Unfilled> {
        let runs = ended.is_some();
        let mut lost: Option<Unfilled> = None;
        let mut progress = tokio::time::interval(PROGRESS_PAUSE);
        loop {
            tokio::select! {
                done = &mut self.driver => return match done {
                    Ok(Ok(summary)) => Ok(summary),
                    Ok(Err(what)) => Err(Unfilled { what, is_bad: false, signal: None }),
                    Err(error) => Err(Unfilled { what: error.to_string(), is_bad: false, signal: None }),
                },
                Some(error) = self.failures.recv() => {
                    let unfilled = Unfilled {
                        what: report::chain(&error),
                        is_bad: error.is_bad_data(),
                        signal: None,
                    };
                    if !runs {
                        return Err(unfilled);
                    }
                    if lost.is_some() {
                        continue;
                    }
                    self.handle.link_lost();
                    tracing::error!(
                        "pages cannot be had any more ({}); threads that touch missing pages wait. Ctrl-C or SIGTERM gives up and ends the process",
                        unfilled.what
                    );
                    lost = Some(unfilled);
                }
                (pid, _) = next_end(&mut ended) => {
                    self.handle.ended(pid);
                    tracing::info!("pid {pid} ended by itself");
                }
                signal = stop.wait() => match lost.take() {
                    Some(unfilled) => return Err(Unfilled { signal: Some(signal), ..unfilled }),
                    None if runs => {
                        tracing::warn!("the process runs: reading all its pages first");
                        self.handle.drain(true);
                    }
                    None => {
                        return Err(Unfilled { what: "cancelled".into(), is_bad: false, signal: Some(signal) });
                    }
                },
                _ = progress.tick() => {
                    let seen = self.handle.progress();
                    if seen.pages_total > 0 && lost.is_none() {
                        report.progress(seen.pages_total, seen.pages_resident, seen.pages_faulted);
                    }
                }
            }
        }
    }

    fn enter(&self, ledger: &mut Ledger, summary: &Summary) {
        ledger.drain_ms = ms(self.began.elapsed());
        ledger.pages_total = summary.pages_total;
        ledger.pages_faulted = summary.pages_faulted;
    }
}
