//! The supervisor and the cradles: who is parent of a husk, and what happens to it when the engine dies.
//!
//! The supervisor is single-threaded and shares one descriptor table with the engine, so that no userfaultfd closes with
//! a killed engine: threads that wait for a page go on waiting until they are killed, and never read zeros. For each
//! migration it forks a cradle, which enters a time namespace of the tree's own, makes the husk, and stays its parent
//! until every page is there; then it ends and the kernel hands the process to the nearest subreaper or init.
//!
//! One migration is served at a time, so supervisor and cradle take turns at one socket.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use pageferry_tracee::descriptor::PidFd;
use pageferry_tracee::husk::{self, HuskRequest};
use pageferry_tracee::{process, procfs};

use crate::{exit, report};

/// How often the supervisor and a cradle look whether the engine lives.
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// How long the engine waits for an answer: ending a process with much memory takes seconds.
const ANSWER_WAIT: Duration = Duration::from_secs(30);

/// What a cradle ends with whose process nobody waits for any more.
const COMPLETE: u8 = 100;

/// Between two looks whether a process that is waited for has ended without a word.
const END_LOOK_PAUSE: Duration = Duration::from_secs(1);

/// How long after the end of a cradle the engine may still be busy with its migration.
const TAIL: Duration = Duration::from_secs(30);

/// What the engine asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HuskOrder {
    /// The process id wanted.
    pub pid: i32,
    /// Make it the leader of a session of its own.
    pub set_sid: bool,
    /// What the clocks of a time namespace of its own are ahead of ours, nanoseconds; `None`: none is made.
    pub clock_offsets_ns: Option<(i64, i64)>,
}

/// The engine's end of the socket.
#[derive(Debug)]
pub struct Cradle {
    writer: UnixStream,
    reader: BufReader<UnixStream>,
    /// An answer did not come in time.
    is_silent: bool,
}

impl Cradle {
    fn new(socket: UnixStream) -> std::io::Result<Self> {
        // The shared table keeps the other end open, so that a dead supervisor shows by its silence only.
        socket.set_read_timeout(Some(ANSWER_WAIT))?;
        Ok(Self {
            writer: socket.try_clone()?,
            reader: BufReader::new(socket),
            is_silent: false,
        })
    }

    /// Has a husk made. Blocks for a millisecond or so.
    ///
    /// # Errors
    /// Why not, in words for the operator.
    pub fn make(&mut self, order: HuskOrder) -> Result<(), String> {
        let (keep, monotonic, boottime) = match order.clock_offsets_ns {
            Some((monotonic, boottime)) => (1, monotonic, boottime),
            None => (0, 0, 0),
        };
        let line = format!(
            "make {} {} {keep} {monotonic} {boottime}",
            order.pid,
            u8::from(order.set_sid),
        );
        self.ask(&line, "made it")
    }

    /// Tells the cradle that the process may have run: from now on its loss is a loss.
    pub fn running(&mut self) -> Result<(), String> {
        self.ask("running", "noted it")
    }

    /// Every page is there: the cradle ends, the process gets its new parent.
    pub fn let_go(&mut self) -> Result<(), String> {
        self.ask("let-go", "gone it")
    }

    /// Every page is there, and the process stays our child: waits for its end, without a limit. Gives its wait status. From here on
    /// our own death ends nobody.
    ///
    /// # Errors
    /// Why its end cannot be told.
    pub fn wait_for_end(mut self, pid: i32) -> Result<i32, String> {
        self.ask("wait", "noted it")?;
        let unreachable = |error| format!("the supervisor cannot be reached: {error}");
        self.reader
            .get_ref()
            .set_read_timeout(Some(END_LOOK_PAUSE))
            .map_err(unreachable)?;
        let mut answer = String::new();
        let mut was_gone = false;
        loop {
            match self.reader.read_line(&mut answer) {
                Ok(_) => break,
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => return Err(unreachable(error)),
            }
            // Who should tell may have been killed, which shows by silence only.
            let is_gone = procfs::stat(pid, pid).is_err();
            if is_gone && was_gone {
                return Err("it has ended, and the one who should say how was killed".into());
            }
            was_gone = is_gone;
        }
        let status = answer.trim_end().strip_prefix("ended ");
        let status = status.and_then(|status| status.parse().ok());
        status.ok_or_else(|| format!("the supervisor said {answer:?}"))
    }

    /// Ends the husk, or the process with all its children.
    pub fn destroy(&mut self) -> Result<(), String> {
        self.ask("destroy", "gone it")
    }

    fn ask(&mut self, line: &str, wanted: &str) -> Result<(), String> {
        if self.is_silent {
            return Err("the supervisor did not answer before; start receive anew".into());
        }
        let mut answer = String::new();
        writeln!(self.writer, "{line}")
            .and_then(|()| self.reader.read_line(&mut answer))
            .map_err(|error| {
                // A late answer would be taken for that to the next question.
                self.is_silent = true;
                format!("the supervisor cannot be reached: {error}")
            })?;
        match answer.trim_end() {
            "" => Err("the supervisor is gone".into()),
            answer if answer == wanted => Ok(()),
            answer => Err(answer.strip_prefix("failed ").unwrap_or(answer).to_owned()),
        }
    }
}

/// How the engine ended.
#[derive(Debug, Clone, Copy)]
pub struct Supervised {
    /// Pageferry's exit code.
    pub code: u8,
    /// It was killed (or never began), and has said nothing itself.
    pub silent: bool,
}

impl Supervised {
    fn silent(code: u8) -> Self {
        Self { code, silent: true }
    }
}

/// Forks the engine and supervises it.
///
/// Must be called while the process has one thread. `engine` runs in the child, which shares our descriptor table.
pub fn supervise(engine: impl FnOnce(Cradle) -> u8) -> Supervised {
    let (ours, theirs) = match UnixStream::pair() {
        Ok(pair) => pair,
        Err(error) => {
            eprintln!("pageferry: no socket for the supervisor: {error}");
            return Supervised::silent(exit::FAILED);
        }
    };
    let mut both = Some((ours, theirs));
    let forked = process::fork(true, || {
        let Some((ours, theirs)) = both.take() else {
            return i32::from(exit::FAILED);
        };
        // The table is shared: closing the supervisor's end here would close it there.
        std::mem::forget(ours);
        // The terminal's signals come through the supervisor; its end is not ours.
        let _ = process::set_session();
        // Those that are held tell of their stops by SIGCHLD, which one thread waits for: a thread that did not block it would
        // have it ignored, and each stop would last until the next look.
        let mut stops = SigSet::empty();
        stops.add(Signal::SIGCHLD);
        let _ = stops.thread_block();
        // Before there is a second thread. Without it, held processes are looked at now and then.
        let _ = process::queue_child_signals();
        match Cradle::new(theirs) {
            Ok(cradle) => i32::from(engine(cradle)),
            Err(error) => {
                eprintln!("pageferry: no socket to the supervisor: {error}");
                i32::from(exit::FAILED)
            }
        }
    });
    let Some((ours, theirs)) = both.take() else {
        return Supervised::silent(exit::FAILED);
    };
    std::mem::forget(theirs);
    match forked {
        Ok(engine) => supervisor(Pid::from_raw(engine), ours),
        Err(error) => {
            eprintln!("pageferry: the engine could not be started: {error}");
            Supervised::silent(exit::FAILED)
        }
    }
}

fn supervisor(engine: Pid, socket: UnixStream) -> Supervised {
    // Signals are the engine's business: it is asked to end in order. It has a session of its own, so each comes to it
    // once, through us.
    let Some(mut signals) = Signals::catch() else {
        eprintln!("pageferry: signals cannot be caught; nothing was received");
        let _ = kill(engine, Signal::SIGKILL);
        return Supervised::silent(exit::FAILED);
    };
    let mut last = (Rocked::NeverRan, Instant::now());
    let _ = socket.set_read_timeout(Some(LOOK_PAUSE));
    let mut lines = Lines::new(socket);
    loop {
        signals.hand_on(engine);
        match lines.next() {
            Some(line) if line.starts_with("make ") => {
                let ended = rock(engine, &mut lines, &mut signals, &line);
                last = (ended, Instant::now());
            }
            Some(_) => lines.answer("failed no husk is held"),
            None => {}
        }
        match waitpid(engine, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => {
                return Supervised {
                    code: u8::try_from(code).unwrap_or(exit::FAILED),
                    silent: false,
                };
            }
            Ok(WaitStatus::Signaled(_, signal, _)) => {
                let (what, code) = match last.0 {
                    _ if last.1.elapsed() > TAIL => {
                        ("no process was being received".to_owned(), exit::FAILED)
                    }
                    Rocked::NeverRan => ("no process had run here".to_owned(), exit::FAILED),
                    Rocked::Lost => (
                        "the process had run here without all its pages and was ended".to_owned(),
                        exit::LOST,
                    ),
                    Rocked::LetGo(pid) => (
                        format!(
                            "pid {pid} runs here with all its pages; the source may not know it and keep its stopped copy: look there"
                        ),
                        exit::DONE,
                    ),
                    Rocked::Complete(pid) => (
                        format!("pid {pid} runs here with all its pages; nobody will tell its end"),
                        exit::FAILED,
                    ),
                };
                eprintln!("pageferry: the engine was killed by {signal}; {what}");
                return Supervised::silent(code);
            }
            Err(Errno::ECHILD) => return Supervised::silent(exit::FAILED),
            _ => {}
        }
    }
}

/// The signals that are meant for the engine.
struct Signals(SignalFd);

impl Signals {
    fn catch() -> Option<Self> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            set.add(signal);
        }
        set.thread_block().ok()?;
        SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
            .ok()
            .map(Self)
    }

    fn hand_on(&mut self, engine: Pid) {
        while let Ok(Some(caught)) = self.0.read_signal() {
            let signal = i32::try_from(caught.ssi_signo)
                .ok()
                .and_then(|n| Signal::try_from(n).ok());
            if let Some(signal) = signal {
                let _ = kill(engine, signal);
            }
        }
    }
}

/// How a cradle ended.
enum Rocked {
    /// Nothing that was made in it had run.
    NeverRan,
    /// It ended a process that may have run.
    Lost,
    /// This process is complete and on its own.
    LetGo(i32),
    /// The same, while a restore waited for its end.
    Complete(i32),
}

/// One migration: forks the cradle and waits for its end.
fn rock(engine: Pid, lines: &mut Lines, signals: &mut Signals, order: &str) -> Rocked {
    let forked = process::fork(false, || i32::from(cradle(engine, lines, order)));
    match forked {
        Ok(child) => loop {
            match waitpid(Pid::from_raw(child), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(_, code)) if code == i32::from(exit::DONE) => {
                    return Rocked::LetGo(parse(order).map_or(0, |order| order.pid));
                }
                Ok(WaitStatus::Exited(_, code)) if code == i32::from(COMPLETE) => {
                    return Rocked::Complete(parse(order).map_or(0, |order| order.pid));
                }
                Ok(WaitStatus::Exited(_, code)) if code == i32::from(exit::FAILED) => {
                    return Rocked::NeverRan;
                }
                Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) | Err(Errno::ECHILD) => {
                    return Rocked::Lost;
                }
                _ => {}
            }
            signals.hand_on(engine);
            std::thread::sleep(LOOK_PAUSE);
        },
        Err(error) => {
            lines.answer(&format!("failed the cradle could not be forked: {error}"));
            Rocked::NeverRan
        }
    }
}

fn cradle(engine: Pid, lines: &mut Lines, order: &str) -> u8 {
    let Some(order) = parse(order) else {
        lines.answer("failed the order is not understood");
        return exit::FAILED;
    };
    // Grandchildren whose parents end come to us: none can be left behind if the process must be ended.
    if let Err(error) = process::become_subreaper() {
        lines.answer(&format!("failed {error}"));
        return exit::FAILED;
    }
    let made = order
        .clock_offsets_ns
        .map_or(Ok(()), |(monotonic, boottime)| {
            process::unshare_time(monotonic, boottime)
        })
        .and_then(|()| {
            husk::spawn(&HuskRequest {
                set_sid: order.set_sid,
                ..HuskRequest::new(order.pid)
            })
        });
    match made {
        Ok(_) => lines.answer("made it"),
        Err(error) => {
            lines.answer(&format!("failed {}", report::chain(&error)));
            return exit::FAILED;
        }
    }
    let engine = PidFd::open(engine.as_raw());
    let mut may_have_run = false;
    let mut root = Some(order.pid);
    // Whether the engine waits for the end of the process, and how it ended.
    let (mut waited_for, mut status) = (false, None);
    loop {
        match lines.next().as_deref() {
            Some("running") => {
                may_have_run = true;
                lines.answer("noted it");
            }
            Some("let-go") => {
                lines.answer("gone it");
                return exit::DONE;
            }
            Some("wait") => {
                lines.answer("noted it");
                waited_for = true;
            }
            Some("destroy") => {
                end_all(root);
                lines.answer("gone it");
                return ended(may_have_run);
            }
            Some(_) => lines.answer("failed not understood"),
            None => {}
        }
        let alive = engine
            .as_ref()
            .is_ok_and(|engine| matches!(engine.poll_exit(Duration::ZERO), Ok(false)));
        if !alive && waited_for {
            return COMPLETE;
        }
        if !alive {
            end_all(root);
            return ended(may_have_run);
        }
        if may_have_run {
            status = reap(&mut root).or(status);
        }
        if let (true, Some(status)) = (waited_for, status) {
            lines.answer(&format!("ended {status}"));
            return exit::DONE;
        }
    }
}

/// What a cradle whose process was ended says.
fn ended(may_have_run: bool) -> u8 {
    if may_have_run {
        exit::LOST
    } else {
        exit::FAILED
    }
}

fn parse(line: &str) -> Option<HuskOrder> {
    let mut words = line.strip_prefix("make ")?.split(' ');
    let pid = words.next()?.parse().ok()?;
    let set_sid = words.next()? == "1";
    let keep = words.next()? == "1";
    let monotonic = words.next()?.parse().ok()?;
    let boottime = words.next()?.parse().ok()?;
    Some(HuskOrder {
        pid,
        set_sid,
        clock_offsets_ns: keep.then_some((monotonic, boottime)),
    })
}

/// Reaps what ended, the process itself included, whose number is then anybody's. Gives its wait status if it is among them.
fn reap(root: &mut Option<i32>) -> Option<i32> {
    let mut found = None;
    loop {
        let (pid, status) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) => (pid, code << 8),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, signal as i32),
            _ => return found,
        };
        if *root == Some(pid.as_raw()) {
            *root = None;
            found = Some(status);
        }
    }
}

/// Kills the process and every descendant, and reaps them. We are their subreaper: what is orphaned meanwhile becomes
/// our child and is found on the next look.
fn end_all(root: Option<i32>) {
    if let Some(root) = root {
        let _ = kill(Pid::from_raw(root), Signal::SIGKILL);
    }
    loop {
        for pid in procfs::children(process::own_pid()).unwrap_or_default() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        match waitpid(None, None) {
            Err(Errno::ECHILD) => return,
            _ => continue,
        }
    }
}

/// Lines of the socket, read with a time limit.
struct Lines {
    reader: BufReader<UnixStream>,
    partial: String,
}

impl Lines {
    fn new(socket: UnixStream) -> Self {
        Self {
            reader: BufReader::new(socket),
            partial: String::new(),
        }
    }

    /// The next line, or `None` if none came within [`LOOK_PAUSE`].
    fn next(&mut self) -> Option<String> {
        match self.reader.read_line(&mut self.partial) {
            Ok(n) if n > 0 && self.partial.ends_with('\n') => {
                let line = std::mem::take(&mut self.partial);
                Some(line.trim_end().to_owned())
            }
            _ => None,
        }
    }

    fn answer(&mut self, line: &str) {
        // The engine that asked may be dead; the next look finds out.
        let _ = writeln!(self.reader.get_mut(), "{line}");
    }
}
