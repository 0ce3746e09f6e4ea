//! The program under test, driven from outside with the command lines an operator would type.
//!
//! Hides process handling; knows nothing of what happens inside. The JSON contract is written down here a second time on
//! purpose: a field that is renamed or added by accident fails every test.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde::Deserialize;

use crate::hosts::{Host, Pair, Process, eventually, patience};

/// The port `receive` listens on.
pub(crate) const PORT: u16 = 7700;

/// A silence that lasts this long is long even on a loaded machine.
pub(crate) const SILENCE_MS: u64 = 2000;

/// One line of `--json`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(
    tag = "type",
    content = "data",
    rename_all = "snake_case",
    deny_unknown_fields
)]
pub(crate) enum Event {
    /// A phase begins.
    Phase(Phase),
    /// Something cannot be carried.
    Refusal(Refusal),
    /// How far the drain is.
    Progress(Progress),
    /// The last line.
    Ledger(Ledger),
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Phase {
    pub(crate) id: String,
    pub(crate) phase: String,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Refusal {
    pub(crate) id: String,
    pub(crate) text: String,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Progress {
    pub(crate) id: String,
    pub(crate) pages_total: u64,
    pub(crate) pages_resident: u64,
    pub(crate) pages_faulted: u64,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Ledger {
    pub(crate) id: String,
    pub(crate) mode: String,
    pub(crate) downtime_ms: f64,
    pub(crate) freeze_ms: f64,
    pub(crate) capture_ms: f64,
    pub(crate) rebuild_ms: f64,
    pub(crate) commit_ms: f64,
    pub(crate) hook_ms: f64,
    pub(crate) drain_ms: f64,
    pub(crate) eager_bytes: u64,
    pub(crate) pages_total: u64,
    pub(crate) pages_resident_at_run: u64,
    pub(crate) pages_faulted: u64,
    pub(crate) wire_bytes: u64,
    pub(crate) exit: u8,
}

/// Where the program lies: beside the test binary, or what `PAGEFERRY_PROGRAM` says.
pub(crate) fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        match (
            std::env::var_os("PAGEFERRY_PROGRAM"),
            option_env!("CARGO_BIN_EXE_pageferry"),
        ) {
            (Some(path), _) => path.into(),
            (None, Some(path)) => path.into(),
            (None, None) => {
                let this = std::env::current_exe().expect("a running program has a path");
                this.parent()
                    .and_then(Path::parent)
                    .expect("examples lie in a directory of the target")
                    .join("pageferry")
            }
        }
    })
}

/// The key directory of a host, and its fingerprint.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    /// What `--identity` names.
    pub(crate) directory: PathBuf,
    /// `SHA256:…`
    pub(crate) fingerprint: String,
}

impl Identity {
    /// Makes one with `pageferry identity`, in a directory only root can read.
    #[track_caller]
    pub(crate) fn make(pair: &Pair, host: &Host, name: &str) -> Self {
        let directory = pair.path(name);
        let printed = host.must(
            program().to_str().expect("its path is text"),
            &[
                "identity",
                "--identity",
                directory.to_str().expect("it is ASCII"),
            ],
        );
        let fingerprint = printed.strip_suffix('\n').expect("one line").to_owned();
        assert!(
            fingerprint.starts_with("SHA256:") && !fingerprint.contains(char::is_whitespace),
            "identity prints {printed:?}"
        );
        Self {
            directory,
            fingerprint,
        }
    }
}

/// One `pageferry` that was started inside a host.
#[derive(Debug)]
pub(crate) struct Running {
    what: String,
    child: Child,
    stdout: Stream,
    stderr: Stream,
}

/// What one of its streams has carried so far, collected by a thread that ends with the stream.
#[derive(Debug)]
struct Stream {
    /// `pipe:[INODE]`
    name: PathBuf,
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Stream {
    fn collect(mut from: impl Read + AsRawFd + Send + 'static) -> Self {
        let name = std::fs::read_link(format!("/proc/self/fd/{}", from.as_raw_fd()))
            .expect("an open descriptor has a name");
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&bytes);
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = from.read(&mut buffer) {
                into.lock()
                    .expect("nobody panics with it")
                    .extend_from_slice(&buffer[..length]);
            }
        });
        Self {
            name,
            bytes,
            reader: Some(reader),
        }
    }

    /// True when nobody can write to it any more and everything was read.
    fn has_ended(&self) -> bool {
        self.reader.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Who holds it open, ourselves included: number, name and descriptor of each.
    fn holders(&self) -> Vec<String> {
        let descriptors = listed("/proc")
            .into_iter()
            .flat_map(|process| listed(process.join("fd")));
        descriptors
            .filter(|descriptor| std::fs::read_link(descriptor).is_ok_and(|name| name == self.name))
            .map(|descriptor| {
                let comm = descriptor.parent().map(|fd| fd.with_file_name("comm"));
                let comm = comm.and_then(|comm| std::fs::read_to_string(comm).ok());
                format!(
                    "{} ({})",
                    descriptor.display(),
                    comm.unwrap_or_default().trim_end()
                )
            })
            .collect()
    }

    fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().expect("nobody panics with it")).into_owned()
    }

    fn all(&mut self) -> String {
        if let Some(reader) = self.reader.take() {
            reader.join().expect("it only reads");
        }
        self.so_far()
    }
}

/// What became of it.
#[derive(Debug)]
pub(crate) struct Finished {
    /// Its exit code, if it was not killed.
    pub(crate) code: Option<i32>,
    /// All its output.
    pub(crate) events: Vec<Event>,
    /// Its stdout as it was.
    pub(crate) stdout: String,
    /// Its stderr as it was.
    pub(crate) stderr: String,
}

impl Finished {
    /// The ledger, which must be the last line.
    #[track_caller]
    pub(crate) fn ledger(&self) -> &Ledger {
        let Some(Event::Ledger(ledger)) = self.events.last() else {
            panic!("no ledger at the end of {self:?}")
        };
        ledger
    }

    /// The sentences of what was refused.
    pub(crate) fn refusals(&self) -> Vec<&str> {
        self.events
            .iter()
            .filter_map(|event| match event {
                Event::Refusal(refusal) => Some(refusal.text.as_str()),
                _ => None,
            })
            .collect()
    }

    #[track_caller]
    pub(crate) fn must_exit(&self, code: i32) -> &Self {
        assert_eq!(
            self.code,
            Some(code),
            "stdout:\n{}\nstderr:\n{}",
            self.stdout,
            self.stderr
        );
        self
    }
}

impl Running {
    /// Starts `pageferry ARGUMENTS --json` on a host, as talkative as `PAGEFERRY_TEST_VERBOSE` says unless the arguments do.
    pub(crate) fn start(host: &Host, arguments: &[&str], environment: &[(&str, String)]) -> Self {
        let says_itself = |argument: &&str| argument.starts_with("-v") || **argument == *"-q";
        let verbose = std::env::var("PAGEFERRY_TEST_VERBOSE").ok();
        let mut command: Command = host.command(program());
        command
            .args(arguments)
            .arg("--json")
            .args(verbose.filter(|_| !arguments.iter().any(says_itself)))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        for (name, value) in environment {
            command.env(name, value);
        }
        let mut child = command.spawn().expect("nsenter was found");
        let stdout = Stream::collect(child.stdout.take().expect("it is piped"));
        let stderr = Stream::collect(child.stderr.take().expect("it is piped"));
        Self {
            what: format!(
                "pageferry {} on {}",
                arguments.first().unwrap_or(&""),
                host.name
            ),
            child,
            stdout,
            stderr,
        }
    }

    /// True while it has not ended.
    pub(crate) fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Whether this stands on its stderr by now.
    pub(crate) fn has_said(&self, text: &str) -> bool {
        self.stderr.so_far().contains(text)
    }

    /// Waits until it says that this phase has begun, or has ended without.
    #[track_caller]
    pub(crate) fn wait_for_phase(&mut self, phase: &str) {
        let wanted = format!("\"phase\":\"{phase}\"");
        eventually(&format!("{} to reach {phase}", self.what.clone()), || {
            (self.stdout.so_far().contains(&wanted) || !self.runs()).then_some(())
        });
    }

    /// Waits until it has ended.
    ///
    /// # Panics
    /// When that takes longer than the tests' patience; it is killed then, as all of its host is.
    #[track_caller]
    pub(crate) fn wait(mut self) -> Finished {
        let status = self.wait_status();
        // Whatever still holds a stream (a keeper, a cradle) is on its way out; one that is not is found here.
        let deadline = Instant::now() + patience();
        for stream in [&self.stdout, &self.stderr] {
            while !stream.has_ended() {
                assert!(
                    Instant::now() < deadline,
                    "{} has ended, but something of it holds its output open: {:?}",
                    self.what,
                    stream.holders()
                );
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        let (stdout, stderr) = (self.stdout.all(), self.stderr.all());
        let events = stdout
            .lines()
            .map(|line| {
                serde_json::from_str(line)
                    .unwrap_or_else(|error| panic!("{}: {line:?} on stdout: {error}", self.what))
            })
            .collect();
        Finished {
            code: status.code(),
            events,
            stdout,
            stderr,
        }
    }

    #[track_caller]
    fn wait_status(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return status;
            }
            assert!(
                started.elapsed() < patience() * 2,
                "{} does not end",
                self.what
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Signals the process that the operator started (not the engine or keeper it made).
    pub(crate) fn signal(&self, host: &Host, signal: Signal) {
        let front = i32::try_from(self.child.id()).expect("pids are small");
        for process in host.processes() {
            if parent(&process) == Some(front) {
                process.signal(signal);
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "{} has said so far:\n{}{}",
                self.what,
                self.stdout.so_far(),
                self.stderr.so_far()
            );
        }
        // Only nsenter; what runs inside ends with the host.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Paths of what lies in a directory that may be gone.
fn listed(directory: impl AsRef<Path>) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory);
    entries
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect()
}

fn parent(process: &Process) -> Option<i32> {
    let stat = std::fs::read_to_string(process.proc("stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

/// Whether the target fetches what nobody touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drain {
    /// `--drain on`, the default.
    On,
    /// `--drain off`: until it is told to end.
    Off,
}

/// Both ends of one crossing, and how they are to be called.
#[derive(Debug, Clone)]
pub(crate) struct Ferry<'a> {
    /// Where the program is.
    pub(crate) source: &'a Host,
    /// Where it goes.
    pub(crate) target: &'a Host,
    source_identity: Identity,
    target_identity: Identity,
    /// What `--trust` says, each.
    pub(crate) trust: Vec<String>,
    /// What `--peer` says, each.
    pub(crate) peers: Vec<String>,
    /// `receive`'s further options.
    pub(crate) receive_options: Vec<String>,
    /// `migrate`'s further options.
    pub(crate) migrate_options: Vec<String>,
    /// What `--tcp` says; `None`: it is not given.
    pub(crate) tcp: Option<&'static str>,
    /// Environment of `receive`.
    pub(crate) receive_environment: Vec<(&'static str, String)>,
    /// Environment of `migrate`.
    pub(crate) migrate_environment: Vec<(&'static str, String)>,
}

impl<'a> Ferry<'a> {
    /// From A to B, with keys made on first use. The shared directory is known to be the same on both.
    #[track_caller]
    pub(crate) fn new(pair: &'a Pair) -> Self {
        let source_identity = Identity::make(pair, &pair.a, "identity-a");
        let target_identity = Identity::make(pair, &pair.b, "identity-b");
        Self {
            source: &pair.a,
            target: &pair.b,
            trust: vec![source_identity.fingerprint.clone()],
            peers: vec![target_identity.fingerprint.clone()],
            source_identity,
            target_identity,
            receive_options: Vec::new(),
            migrate_options: vec!["--same-file".to_owned(), pair.shared.display().to_string()],
            tcp: Some("close"),
            receive_environment: Vec::new(),
            migrate_environment: Vec::new(),
        }
    }

    /// The other way.
    pub(crate) fn back(&self) -> Self {
        Self {
            source: self.target,
            target: self.source,
            source_identity: self.target_identity.clone(),
            target_identity: self.source_identity.clone(),
            trust: vec![self.target_identity.fingerprint.clone()],
            peers: vec![self.source_identity.fingerprint.clone()],
            ..self.clone()
        }
    }

    /// A peer that is gone is given up after [`SILENCE_MS`] instead of ten seconds.
    pub(crate) fn shorten_silence(&mut self) {
        let shorter = || ("PAGEFERRY_SILENCE_MS", SILENCE_MS.to_string());
        self.migrate_environment.push(shorter());
        self.receive_environment.push(shorter());
    }

    /// Starts `receive` and waits until it listens.
    #[track_caller]
    pub(crate) fn receive(&self, drain: Drain) -> Running {
        let listen = format!("{}:{PORT}", self.target.address);
        let identity = self.target_identity.directory.display().to_string();
        let mut arguments = vec!["receive", "--listen", &listen, "--identity", &identity];
        arguments.push("--once");
        for trust in &self.trust {
            arguments.extend(["--trust", trust]);
        }
        if drain == Drain::Off {
            arguments.extend(["--drain", "off"]);
        }
        arguments.extend(self.receive_options.iter().map(String::as_str));
        let mut running = Running::start(self.target, &arguments, &self.receive_environment);
        eventually("receive to listen", || {
            (self.target.udp_bound(PORT) || !running.runs()).then_some(())
        });
        running
    }

    /// Starts `migrate`.
    pub(crate) fn migrate(&self, pid: i32) -> Running {
        let to = format!("{}:{PORT}", self.target.address);
        let identity = self.source_identity.directory.display().to_string();
        let pid = pid.to_string();
        let mut arguments = vec![
            "migrate",
            "--pid",
            &pid,
            "--to",
            &to,
            "--identity",
            &identity,
        ];
        arguments.extend(["--mode", "post-copy"]);
        for peer in &self.peers {
            arguments.extend(["--peer", peer]);
        }
        if let Some(tcp) = self.tcp {
            arguments.extend(["--tcp", tcp]);
        }
        arguments.extend(self.migrate_options.iter().map(String::as_str));
        Running::start(self.source, &arguments, &self.migrate_environment)
    }

    /// Dumps a process of the source host to `image`.
    #[track_caller]
    pub(crate) fn dump(&self, pid: i32, image: &Path, options: &[&str]) -> Finished {
        let (pid, image) = (pid.to_string(), image.display().to_string());
        let mut arguments = vec!["dump", "--pid", &pid, "--image", &image, "--tcp", "close"];
        arguments.extend(options);
        Running::start(self.source, &arguments, &self.migrate_environment).wait()
    }

    /// Starts the restore of `image` on the source host.
    pub(crate) fn restore(&self, image: &Path, options: &[&str]) -> Running {
        let image = image.display().to_string();
        let mut arguments = vec!["restore", "--image", &image];
        arguments.extend(options);
        Running::start(self.source, &arguments, &self.migrate_environment)
    }

    /// Starts a page server on the source host and waits until it listens; the target may read.
    #[track_caller]
    pub(crate) fn page_server(&self, image: &Path) -> Running {
        let listen = format!("{}:{PORT}", self.source.address);
        let identity = self.source_identity.directory.display().to_string();
        let image = image.display().to_string();
        let mut arguments = vec!["page-server", "--image", &image, "--listen", &listen];
        arguments.extend(["--identity", &identity, "--trust"]);
        arguments.push(&self.target_identity.fingerprint);
        let mut running = Running::start(self.source, &arguments, &self.receive_environment);
        eventually("the page server to listen", || {
            (self.source.udp_bound(PORT) || !running.runs()).then_some(())
        });
        running
    }

    /// Starts a restore on `host` of what the source's page server calls `name`, with the target's key.
    pub(crate) fn restore_from(&self, host: &Host, name: &str, options: &[&str]) -> Running {
        let arguments = self.restore_arguments(name);
        let mut arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        arguments.extend(options);
        Running::start(host, &arguments, &self.migrate_environment)
    }

    /// The command line of such a restore.
    pub(crate) fn restore_arguments(&self, name: &str) -> Vec<String> {
        let from = format!("{}:{PORT}", self.source.address);
        let identity = self.target_identity.directory.display().to_string();
        let peer = &self.source_identity.fingerprint;
        [
            "restore",
            "--from",
            &from,
            "--name",
            name,
            "--identity",
            &identity,
            "--peer",
            peer,
        ]
        .map(str::to_owned)
        .to_vec()
    }

    /// One whole crossing that must succeed; both ledgers are checked. Gives the source's and the target's end.
    #[track_caller]
    pub(crate) fn cross(&self, pid: i32) -> (Finished, Finished) {
        let receive = self.receive(Drain::On);
        let migrate = self.migrate(pid);
        self.must_succeed(migrate, receive)
    }

    /// Waits for both ends of a crossing that must succeed.
    #[track_caller]
    pub(crate) fn must_succeed(
        &self,
        migrate: Running,
        mut receive: Running,
    ) -> (Finished, Finished) {
        let source = migrate.wait();
        if source.code != Some(0) && receive.runs() {
            receive.signal(self.target, Signal::SIGTERM);
            drop(receive);
            panic!("source: {source:#?}");
        }
        let target = receive.wait();
        check_success(&source, &target);
        (source, target)
    }
}

/// Both ends must have succeeded, under one id, with figures that fit together.
#[track_caller]
pub(crate) fn check_success(source: &Finished, target: &Finished) {
    assert!(
        source.code == Some(0) && target.code == Some(0),
        "source: {source:#?}\ntarget: {target:#?}"
    );
    for ledger in [source.ledger(), target.ledger()] {
        let parts = ledger.freeze_ms
            + ledger.capture_ms
            + ledger.rebuild_ms
            + ledger.commit_ms
            + ledger.hook_ms;
        assert!(
            (parts - ledger.downtime_ms).abs() < 0.01,
            "the parts sum to {parts}: {ledger:?}"
        );
        assert!(
            ledger.downtime_ms > 0.0 && ledger.exit == 0 && ledger.mode == "post-copy",
            "{ledger:?}"
        );
        assert!(
            ledger.pages_resident_at_run <= ledger.pages_total,
            "{ledger:?}"
        );
    }
    assert_eq!(source.ledger().id, target.ledger().id);
    assert!(!source.ledger().id.is_empty());
}
