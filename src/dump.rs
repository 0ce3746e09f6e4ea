//! `pageferry dump`: a process comes to rest in an image.
//!
//! It is held by ptrace, and by nothing that outlives us, until its image lies complete on the disk: whatever ends us
//! before, it runs on, and what is left of the image has no name (`image ls` shows it, `image rm` takes it away). Then it is
//! stopped, its root first, before any of its processes is killed: whatever ends us meanwhile, the root does not run without
//! the others, and what is left of it waits for kill -CONT or kill -KILL.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pageferry_image::model::files::file;
use pageferry_image::model::memory::FileIdentity;
use pageferry_image::model::relations::Member;
use pageferry_image::model::task::Tree;
use pageferry_image::page::PageRange;
use pageferry_image::store::{self, Compression, Header, ImageWriter, ObjectId, Origin};
use pageferry_pageserver::capture::Captured;
use pageferry_pageserver::capture::shared::{Moved, SharedPages};
use pageferry_pageserver::serve::{PageReader, Piece};
use pageferry_pageserver::shared::SharedReader;
use pageferry_pageserver::{Error as SourceError, at_rest, identity, survey};
use pageferry_tracee::{host, procfs};
use pageferry_wire::Phase;

use crate::cli::{Common, Compress, DumpArgs};
use crate::commit::{self, SourceTree};
use crate::report::{self, Ledger, Report, ms};
use crate::stop::Stop;
use crate::{check, exit, migrate, plan};

/// Longest wait for the number of a process that was ended to be free, and the pause between two looks.
const GONE_WAIT: Duration = Duration::from_secs(2);
const GONE_PAUSE: Duration = Duration::from_millis(2);

/// Why there is no image, or no end. Says where the process is.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{what}; no image was made and pid {pid} runs on, as before")]
    Before {
        what: String,
        pid: i32,
        #[source]
        source: Option<BoxError>,
    },
    #[error("refused; no image was made and pid {pid} runs on, as before")]
    Refused { pid: i32 },
    #[error("{what}; no image was made, and pid {pid} ended meanwhile, and not by pageferry")]
    Ended {
        what: String,
        pid: i32,
        #[source]
        source: Option<BoxError>,
    },
    #[error(
        "{what}; pid {pid} is intact, but could not be let go of: {why}. If it stays stopped: kill -CONT {}",
        report::all_of(.pid)
    )]
    Stuck { what: String, pid: i32, why: String },
    #[error(
        "{image} is complete, but pid {pid} could not be ended: {why}. End it: kill -KILL {}",
        report::all_of(.pid)
    )]
    Alive {
        image: String,
        pid: i32,
        why: String,
    },
    #[error("cancelled when {image} was complete: it stays, and pid {pid} runs on, as before")]
    Late { image: String, pid: i32 },
    #[error("pid {pid} runs on, as before, but the image could not be completed")]
    Unfinished {
        pid: i32,
        #[source]
        source: store::Error,
    },
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Before { .. }
            | Self::Ended { .. }
            | Self::Late { .. }
            | Self::Unfinished { .. } => exit::FAILED,
            Self::Refused { .. } => exit::REFUSED,
            Self::Stuck { .. } | Self::Alive { .. } => exit::UNDECIDED,
        }
    }
}

/// Runs the verb; the exit code.
pub fn run(args: &DumpArgs, common: &Common) -> u8 {
    let mut report = Report::new(common);
    let mut ledger = Ledger {
        mode: "dump".into(),
        ..Ledger::default()
    };
    let code = if let Some(missing) = check::first_missing() {
        eprintln!("pageferry: {missing}");
        exit::HOST
    } else {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        match runtime {
            Ok(runtime) => {
                let dumped = runtime.block_on(cancellable(args, &mut report, &mut ledger));
                dumped.unwrap_or_else(|failure| {
                    report.failure(&failure);
                    failure.exit_code()
                })
            }
            Err(error) => {
                eprintln!("pageferry: no runtime: {error}; nothing was touched");
                exit::FAILED
            }
        }
    };
    ledger.id = report.id().to_owned();
    ledger.exit = code;
    report.ledger(&ledger);
    code
}

/// A signal ends the dump, not the process; an image that is complete by then stays.
async fn cancellable(
    args: &DumpArgs,
    report: &mut Report,
    ledger: &mut Ledger,
) -> Result<u8, Failure> {
    let pid = args.pid;
    let mut stop = Stop::new().map_err(|error| Failure::Before {
        what: "signals cannot be watched".into(),
        pid,
        source: Some(error.into()),
    })?;
    let cancel = Arc::new(AtomicBool::new(false));
    let work = dump(args, report, ledger, Arc::clone(&cancel));
    tokio::pin!(work);
    let mut signal = None;
    loop {
        tokio::select! {
            done = &mut work => return match (done, signal) {
                (Err(Failure::Before { .. }), Some(signal)) if cancel.load(Ordering::Relaxed) => {
                    eprintln!("pageferry: cancelled; no image was made and pid {pid} runs on, as before");
                    Ok(exit::signalled(signal))
                }
                (Err(late @ Failure::Late { .. }), Some(signal)) => {
                    eprintln!("pageferry: {late}");
                    Ok(exit::signalled(signal))
                }
                (done, _) => done,
            },
            caught = stop.wait() => {
                signal = Some(caught);
                cancel.store(true, Ordering::Relaxed);
            }
        }
    }
}

async fn dump(
    args: &DumpArgs,
    report: &mut Report,
    ledger: &mut Ledger,
    cancel: Arc<AtomicBool>,
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
    report.phase(Phase::Plan);
    let mut options = plan::survey_options(&args.carry, vec!["/".into()]);
    // A process that goes on here needs no manager to leave it alone.
    options.unmanaged |= args.leave_running;
    options.at_rest = true;
    let survey = survey::survey(pid, &options)
        .map_err(|e| before("the process cannot be looked at")(e.into()))?;
    for note in &survey.notes {
        tracing::warn!("{note}");
    }
    if !survey.refusals.is_empty() {
        return Err(refused(report, pid, &survey.refusals));
    }
    let id = migrate::new_id().map_err(|e| before("no dump id")(e.into()))?;
    report.set_id(migrate::hex(&id));
    let this_host =
        plan::this_host().map_err(|e| before("this host cannot be described")(e.into()))?;
    check_place(&args.image, survey.resident_bytes).map_err(before("there is no place for it"))?;
    let origin = Origin {
        id,
        created_ns: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| {
                u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
            }),
        host: host::host_name().unwrap_or_default(),
        program: env!("CARGO_PKG_VERSION").to_owned(),
    };

    report.phase(Phase::Freeze);
    let process =
        SourceTree::new(pid).map_err(|e| before("no thread to hold the process")(e.into()))?;
    let mut frozen = process
        .freeze()
        .await
        .map_err(|e| before("it was not dumped")(e.into()))?;
    report.phase(Phase::Capture);
    let written = async {
        let (mut captured, again) = process
            .capture(survey, options)
            .await
            .map_err(Unwritten::Capture)?;
        frozen = again.unwrap_or(frozen);
        captured.tree.host = Some(this_host);
        let members = captured.tree.members();
        let mut memory = std::mem::take(&mut captured.moved);
        memory.retain(Moved::is_memory);
        let (image, compression) = (args.image.clone(), compression(args.compress));
        let cancelled = Arc::clone(&cancel);
        let writing = tokio::task::spawn_blocking(move || {
            let Captured {
                mut tree, shared, ..
            } = captured;
            refresh_written(&mut tree)?;
            write(&image, tree, shared, origin, compression, &cancelled)
        });
        let written = writing.await.map_err(|_| Unwritten::Thread)?;
        written.map(|writer| (writer, members, memory))
    }
    .await;
    let account = |ledger: &mut Ledger| {
        ledger.freeze_ms = ms(frozen.stopped - frozen.began);
        ledger.capture_ms = ms(frozen.stopped.elapsed());
        ledger.downtime_ms = ledger.freeze_ms + ledger.capture_ms;
    };

    let (writer, members, memory) = match written {
        Ok(written) => written,
        Err(error) => {
            let thawed = process.roll_back().await;
            account(ledger);
            return Err(not_written(report, pid, error, thawed));
        }
    };
    let header = if args.leave_running {
        // Its image is told apart from what it does now: it need not wait for the disk.
        let thawed = process.roll_back().await;
        account(ledger);
        if let Err(error) = thawed {
            return Err(Failure::Stuck {
                what: "its pages were read".into(),
                pid,
                why: report::chain(&error),
            });
        }
        finish(writer)
            .await
            .map_err(|source| Failure::Unfinished { pid, source })?
    } else {
        match finish(writer).await {
            Ok(header) if cancel.load(Ordering::Relaxed) => {
                let thawed = process.roll_back().await;
                account(ledger);
                ledger.pages_total = header.counts.data_pages;
                return Err(match thawed {
                    Ok(()) => Failure::Late {
                        image: args.image.display().to_string(),
                        pid,
                    },
                    Err(error) => Failure::Stuck {
                        what: "it was cancelled when its image was complete".into(),
                        pid,
                        why: report::chain(&error),
                    },
                });
            }
            Ok(header) => {
                let ended = end(&process).await;
                account(ledger);
                if let Err(why) = ended {
                    let image = args.image.display().to_string();
                    return Err(Failure::Alive { image, pid, why });
                }
                wait_until_gone(&members).await;
                for segment in memory {
                    if let Err(error) = segment.remove() {
                        let name = segment.name();
                        tracing::warn!(
                            "{name} is in the image and could not be removed here: {error}"
                        );
                    }
                }
                header
            }
            Err(error) => {
                let thawed = process.roll_back().await;
                account(ledger);
                return Err(not_written(report, pid, Unwritten::Store(error), thawed));
            }
        }
    };
    ledger.pages_total = header.counts.data_pages;
    let place = args.image.display();
    let stored_mb = header.stored_len() as f64 / 1e6;
    let fate = if args.leave_running {
        "it runs on"
    } else {
        "it was ended"
    };
    tracing::info!(id = %report.id(), "pid {pid} is in {place}, {stored_mb:.1} MB; {fate}");
    Ok(exit::DONE)
}

fn refused(report: &Report, pid: i32, refusals: &[survey::Refusal]) -> Failure {
    for refusal in refusals {
        report.refusal(&refusal.to_string());
    }
    Failure::Refused { pid }
}

/// Ends the process that lies in an image. Why not, and how it is instead.
async fn end(process: &SourceTree) -> Result<(), String> {
    if let Err(error) = process.park().await {
        let why = report::chain(&error);
        return Err(match process.roll_back().await {
            Ok(()) => why,
            Err(also) => format!("{why}; and {}", report::chain(&also)),
        });
    }
    let stays = |error| {
        format!(
            "{}; what is left of it stays stopped",
            report::chain(&error)
        )
    };
    process.kill().await.map_err(stays)
}

/// Whoever restores the image next wants their numbers. They are free when their parents have taken note of the ends, which may be
/// never.
async fn wait_until_gone(members: &[Member]) {
    let started = Instant::now();
    for Member { pid, .. } in members {
        while procfs::status(*pid, *pid).is_ok() {
            if started.elapsed() > GONE_WAIT {
                return tracing::warn!(
                    "its parent has not taken note of its end: pid {pid} is not free yet"
                );
            }
            tokio::time::sleep(GONE_PAUSE).await;
        }
    }
}

/// Why the pages of a frozen process are not in an image.
#[derive(Debug, thiserror::Error)]
enum Unwritten {
    #[error(transparent)]
    Capture(commit::Error),
    #[error("its memory cannot be read")]
    Memory(#[source] SourceError),
    #[error("what it writes cannot be looked at")]
    File(#[from] SourceError),
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error("cancelled")]
    Cancelled,
    #[error("the thread that writes ended early")]
    Thread,
}

/// What that means, now that the process was thawed or could not be.
fn not_written(
    report: &Report,
    pid: i32,
    error: Unwritten,
    thawed: Result<(), commit::Error>,
) -> Failure {
    if migrate::is_gone(pid) {
        return Failure::Ended {
            what: "it was not dumped".into(),
            pid,
            source: Some(error.into()),
        };
    }
    if let Err(why) = thawed {
        return Failure::Stuck {
            what: report::chain(&error),
            pid,
            why: report::chain(&why),
        };
    }
    if let Unwritten::Capture(commit::Error::Capture(SourceError::Refused(refusals))) = &error {
        return refused(report, pid, refusals);
    }
    Failure::Before {
        what: "it was not dumped".into(),
        pid,
        source: Some(error.into()),
    }
}

fn compression(compress: Compress) -> Compression {
    match compress {
        Compress::Lz4 => Compression::Lz4,
        Compress::None => Compression::Raw,
    }
}

/// Whether an image can be made at `path`: what would fail then is said while the process runs.
fn check_place(path: &Path, resident_bytes: u64) -> Result<(), BoxError> {
    if path.symlink_metadata().is_ok() {
        return Err(format!("{} exists: an image is never overwritten", path.display()).into());
    }
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let room = nix::sys::statvfs::statvfs(folder)
        .map_err(|errno| format!("folder {}: {}", folder.display(), errno.desc()))?;
    let free = room.blocks_available().saturating_mul(room.fragment_size());
    if free < resident_bytes {
        return Err(format!(
            "folder {} has {} MiB free, and the process takes up to {} MiB",
            folder.display(),
            free >> 20,
            resident_bytes >> 20
        )
        .into());
    }
    Ok(())
}

/// The files it writes, as they are now that it is frozen: whether somebody else touches them later is told by that.
fn refresh_written(tree: &mut Tree) -> pageferry_pageserver::Result<()> {
    let spaces = tree
        .processes
        .iter_mut()
        .filter_map(|process| process.space.as_mut());
    let mapped = spaces
        .flat_map(|space| &mut space.mappings)
        .filter_map(|mapping| mapping.file.as_mut());
    let open = tree
        .files
        .iter_mut()
        .filter_map(|file| match &mut file.kind {
            Some(file::Kind::Regular(regular)) => regular.identity.as_mut(),
            _ => None,
        });
    mapped
        .chain(open)
        .filter(|file: &&mut FileIdentity| file.must_be_shared)
        .try_for_each(identity::refresh)
}

/// Writes all but the last step of an image, which gives it its name.
fn write(
    path: &Path,
    tree: Tree,
    shared: Vec<SharedPages>,
    origin: Origin,
    compression: Compression,
    cancel: &AtomicBool,
) -> Result<ImageWriter, Unwritten> {
    let pids: Vec<i32> = tree.processes.iter().map(|process| process.pid).collect();
    let work = at_rest::all_mapped(&tree);
    let began = Instant::now();
    let mut writer = ImageWriter::create(path, tree, origin, compression)?;
    let mut put = |object, range: PageRange, piece: Piece<'_>| {
        if cancel.load(Ordering::Relaxed) {
            return Err(Unwritten::Cancelled);
        }
        match piece {
            Piece::Bytes(bytes) => writer.pages(object, range.start, bytes)?,
            Piece::Without(kind) => writer.without_data(object, kind, range)?,
        }
        Ok(())
    };
    for (pid, (object, ranges)) in pids.into_iter().zip(work) {
        let mut reader = PageReader::open(object, pid).map_err(Unwritten::Memory)?;
        for range in ranges {
            reader
                .read_all(range, |range, piece| put(ObjectId(object), range, piece))
                .map_err(Unwritten::Memory)??;
        }
    }
    for pages in shared {
        let object = ObjectId(pages.object);
        let mut reader = SharedReader::open(pages).map_err(Unwritten::Memory)?;
        reader
            .read_all(|range, piece| put(object, range, piece))
            .map_err(Unwritten::Memory)??;
    }
    tracing::debug!("its pages were read in {:.0} ms", ms(began.elapsed()));
    if cancel.load(Ordering::Relaxed) {
        return Err(Unwritten::Cancelled);
    }
    Ok(writer)
}

async fn finish(writer: ImageWriter) -> Result<Header, store::Error> {
    let finishing = tokio::task::spawn_blocking(move || writer.finish());
    match finishing.await {
        Ok(finished) => finished,
        // The pool ends with the runtime, which is waiting here.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
