//! Two hosts made of namespaces: pid, network, mount, UTS, IPC and time of their own, joined by a veth pair.
//!
//! Hides how they are made (`unshare`), entered (`nsenter`), looked at (from outside, through `/proc`) and removed. A host
//! lives exactly as long as its [`Host`]: whatever happens to the test, the pipe to the host's process 1 closes, that
//! process ends, and the kernel kills everything inside. It never touches a process that is not in one of its hosts.

use nix::fcntl::{Flock, FlockArg};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

/// Before the privileges of a program: it leads no session.
pub(crate) const NO_SESSION: &str = "--no-session";

/// How long anything that must happen may take. A slow machine sets `PAGEFERRY_TEST_PATIENCE` (seconds).
pub(crate) fn patience() -> Duration {
    static SECONDS: OnceLock<u64> = OnceLock::new();
    let read = || std::env::var("PAGEFERRY_TEST_PATIENCE").ok()?.parse().ok();
    Duration::from_secs(*SECONDS.get_or_init(|| read().unwrap_or(30)))
}

/// Polls until `what` gives a value, at most [`patience`].
///
/// # Panics
/// When it does not in time, naming `expected`.
#[track_caller]
pub(crate) fn eventually<T>(expected: &str, mut what: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(value) = what() {
            return value;
        }
        assert!(
            started.elapsed() < patience(),
            "waited {:?} for {expected}",
            started.elapsed()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// True when what is not tested here must be what `tests/skips.txt` expects.
fn strict() -> bool {
    std::env::var_os("PAGEFERRY_TEST_STRICT").is_some_and(|value| value != "0")
}

/// Says what is not tested here and why; the same words for the same thing on every run. Also into the file that
/// `PAGEFERRY_TEST_SKIPS` names, for a comparison with `tests/skips.txt`.
///
/// # Panics
/// With `PAGEFERRY_TEST_STRICT=1`, unless that file expects it: a run in CI never goes quietly green.
#[track_caller]
pub(crate) fn say_skipped(what: &str) {
    let expected = include_str!("skips.txt").lines().any(|line| line == what);
    assert!(
        expected || !strict(),
        "skipped though PAGEFERRY_TEST_STRICT is set and tests/skips.txt does not expect it: {what}"
    );
    eprintln!("skipped: {what}");
    if let Some(path) = std::env::var_os("PAGEFERRY_TEST_SKIPS") {
        let file = fs::File::options().append(true).create(true).open(path);
        file.and_then(|mut file| file.write_all(format!("{what}\n").as_bytes()))
            .expect("it can be appended to");
    }
}

/// Why tests that need a test host cannot run here, if they cannot.
///
/// Says so, see [`say_skipped`].
#[track_caller]
pub(crate) fn skip() -> Option<&'static str> {
    static REASON: OnceLock<Option<&'static str>> = OnceLock::new();
    let reason = *REASON.get_or_init(|| {
        if !nix::unistd::geteuid().is_root() {
            return Some("needs root: sudo ./test");
        }
        for (program, package) in [
            ("unshare", "needs util-linux: apt-get install util-linux"),
            ("nsenter", "needs util-linux: apt-get install util-linux"),
            ("setpriv", "needs util-linux: apt-get install util-linux"),
            ("ip", "needs iproute2: apt-get install iproute2"),
            ("nft", "needs nftables: apt-get install nftables"),
            ("cc", "needs a C compiler: apt-get install gcc libc6-dev"),
        ] {
            if find_program(program).is_none() {
                return Some(package);
            }
        }
        None
    });
    if let Some(reason) = reason {
        say_skipped(reason);
    }
    reason
}

/// Where a program lies, searched as a shell of root would.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/usr/bin:/sbin:/bin";
    path.split(':')
        .map(|directory| Path::new(directory).join(name))
        .find(|candidate| candidate.is_file())
}

/// Runs a command on the real host.
///
/// # Panics
/// When it fails.
#[track_caller]
fn must_run(program: &str, arguments: &[&str]) {
    let output = Command::new(find_program(program).unwrap_or_else(|| program.into()))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A number that no other pair of hosts on this machine has.
fn unique_number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    std::process::id() % 100_000 * 1000 + NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Seconds this machine has been up on CLOCK_BOOTTIME.
fn uptime_s() -> i64 {
    let text = fs::read_to_string("/proc/uptime").expect("/proc/uptime can always be read");
    text.split('.')
        .next()
        .and_then(|seconds| seconds.parse().ok())
        .expect("/proc/uptime begins with a number")
}

/// How B's CLOCK_MONOTONIC lies to A's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Clocks {
    /// B's clock shows less than A's: an event loop that trusted it would wait for ever.
    Behind,
    /// B's clock is 40 days ahead of A's.
    FarAhead,
}

/// Two hosts that see each other, and a directory both see.
#[derive(Debug)]
pub(crate) struct Pair {
    /// 10.77.0.1
    pub(crate) a: Host,
    /// 10.77.0.2
    pub(crate) b: Host,
    /// Visible on both hosts at the same path and writable by everyone; removed with the pair.
    pub(crate) shared: PathBuf,
    /// What was there when the test began; compared when the pair is dropped.
    before: Option<Before>,
    /// Beginnings of lines of the inventory that this test leaves behind on purpose, by host.
    declared: Mutex<Vec<(&'static str, String)>>,
}

impl Pair {
    /// Makes both hosts and joins them. [`skip`] must have said that this is possible.
    pub(crate) fn new(clocks: Clocks) -> Self {
        let number = unique_number();
        let shared = PathBuf::from(format!("/var/tmp/pageferry-test-{number}"));
        fs::create_dir_all(&shared).expect("/var/tmp can be written by root");
        fs::set_permissions(&shared, fs::Permissions::from_mode(0o1777))
            .expect("it was made a moment ago");
        let offset_s = match clocks {
            Clocks::Behind => -(uptime_s() / 2),
            Clocks::FarAhead => 40 * 86_400,
        };
        let a = Host::new("A", number, "10.77.0.1", 0);
        let b = Host::new("B", number, "10.77.0.2", offset_s);
        let (end_a, end_b) = (format!("pf{number}a"), format!("pf{number}b"));
        must_run(
            "ip",
            &[
                "link", "add", &end_a, "type", "veth", "peer", "name", &end_b,
            ],
        );
        let mut pair = Self {
            a,
            b,
            shared,
            before: None,
            declared: Mutex::default(),
        };
        for (host, end) in [(&pair.a, &end_a), (&pair.b, &end_b)] {
            must_run(
                "ip",
                &[
                    "link",
                    "set",
                    end,
                    "netns",
                    &host.init.to_string(),
                    "name",
                    "eth0",
                ],
            );
            let script = format!(
                "ip link set lo up && ip address add {}/24 dev eth0 && ip link set eth0 up",
                host.address
            );
            host.must("sh", &["-c", &script]);
        }
        // The kernel activates a link in its own time, and behind the removal of another test's network that may be many
        // seconds later. What is sent until then is dropped.
        for host in [&pair.a, &pair.b] {
            eventually(&format!("the link of {} to carry", host.name), || {
                let shown = host.must("ip", &["-o", "link", "show", "eth0"]);
                shown.contains("state UP").then_some(())
            });
        }
        // Programs of A get numbers that nobody on B has: the target must not refuse a taken pid by accident.
        pair.a
            .must("sh", &["-c", "echo 20000 > /proc/sys/kernel/ns_last_pid"]);
        pair.b
            .must("sh", &["-c", "echo 300 > /proc/sys/kernel/ns_last_pid"]);
        let other = pair.b.outside(LIBRARY_THAT_DIFFERS);
        pair.b.must(
            "mount",
            &[
                "--bind",
                other_library().to_str().expect("it is ASCII"),
                LIBRARY_THAT_DIFFERS,
            ],
        );
        assert!(
            fs::read(other).ok() != fs::read(LIBRARY_THAT_DIFFERS).ok(),
            "{LIBRARY_THAT_DIFFERS} is the same on B"
        );
        pair.before = Some(Before::of(&pair));
        pair
    }

    /// Says that this test leaves something behind on purpose on a host: lines of its inventory that begin with `line`. All
    /// else that is left when the pair is dropped fails the test.
    pub(crate) fn leaves(&self, host: &Host, line: &str) {
        self.declared
            .lock()
            .expect("nobody panics with it")
            .push((host.name, line.to_owned()));
    }

    fn is_declared(&self, host: &Host, line: &str) -> bool {
        let declared = self.declared.lock().expect("nobody panics with it");
        declared
            .iter()
            .any(|(name, beginning)| *name == host.name && line.starts_with(beginning))
    }

    /// Where a program may keep its state so that both hosts see it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.shared.join(name)
    }
}

impl Drop for Pair {
    /// A test that has failed already says why; any other one must leave both hosts as it found them, or have said
    /// ([`Pair::leaves`]) what stays.
    fn drop(&mut self) {
        let left = match self.before.take() {
            Some(before) if !std::thread::panicking() => before.differences_at_last(self, 0),
            _ => String::new(),
        };
        // The hosts first: their processes may still write into it.
        self.a.end();
        self.b.end();
        if std::env::var_os("PAGEFERRY_TEST_KEEP").is_none() {
            let _ = fs::remove_dir_all(&self.shared);
        }
        assert!(
            left.is_empty(),
            "the hosts are not what they were at the beginning:{left}"
        );
    }
}

/// One process inside a host, as seen from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    /// Its number on the real host.
    pub(crate) outer: i32,
    /// Its number inside.
    pub(crate) inner: i32,
    /// Its name, at most 15 bytes.
    pub(crate) name: String,
    /// The letter of its leader's state: R, S, D, T, t, Z…
    pub(crate) state: char,
}

impl Process {
    /// The path of a file of it in the real host's /proc.
    pub(crate) fn proc(&self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{file}", self.outer))
    }

    /// Reads its memory; `None` when the page cannot be had (or it is gone).
    pub(crate) fn memory(&self, address: u64, length: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; length];
        fs::File::open(self.proc("mem"))
            .ok()?
            .read_exact_at(&mut bytes, address)
            .ok()?;
        Some(bytes)
    }

    /// CPU time it has used, user and system together, in clock ticks; all threads.
    pub(crate) fn cpu_ticks(&self) -> Option<u64> {
        let stat = fs::read_to_string(self.proc("stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
        Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
    }

    /// Who traces it (0: nobody).
    pub(crate) fn tracer(&self) -> Option<i32> {
        let status = fs::read_to_string(self.proc("status")).ok()?;
        status
            .lines()
            .find_map(|line| line.strip_prefix("TracerPid:"))?
            .trim()
            .parse()
            .ok()
    }

    /// Sends a signal to it.
    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.outer), signal);
    }

    fn read(outer: i32, pid_namespace: &Path) -> Option<Self> {
        if fs::read_link(format!("/proc/{outer}/ns/pid")).ok()? != pid_namespace {
            return None;
        }
        let status = fs::read_to_string(format!("/proc/{outer}/status")).ok()?;
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .map(str::trim)
        };
        Some(Self {
            outer,
            inner: field("NSpid:")?
                .split_whitespace()
                .next_back()?
                .parse()
                .ok()?,
            name: field("Name:")?.to_owned(),
            state: field("State:")?.chars().next()?,
        })
    }
}

/// One host.
#[derive(Debug)]
pub(crate) struct Host {
    /// "A" or "B".
    pub(crate) name: &'static str,
    /// What `uname -n` says inside.
    pub(crate) hostname: String,
    /// Its address on the wire between the two.
    pub(crate) address: &'static str,
    /// Its process 1, numbered by the real host.
    pub(crate) init: i32,
    /// None: it is a part of another host, and ends by itself.
    holder: Option<Child>,
    pid_namespace: PathBuf,
}

impl Host {
    fn new(name: &'static str, number: u32, address: &'static str, clock_offset_s: i64) -> Self {
        let hostname = format!("pageferry-{}-{number}", name.to_lowercase());
        let offset = clock_offset_s.to_string();
        let mut holder = Command::new("unshare")
            .args([
                "--pid",
                "--fork",
                "--kill-child",
                "--net",
                "--mount",
                "--uts",
                "--ipc",
                "--time",
                "--mount-proc",
            ])
            .args(["--monotonic", &offset, "--boottime", &offset])
            .arg(host_program("init"))
            .arg(&hostname)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .current_dir("/")
            .spawn()
            .expect("unshare was found");
        let mut line = String::new();
        BufReader::new(holder.stdout.take().expect("it is piped"))
            .read_line(&mut line)
            .expect("a pipe can be read");
        assert_eq!(
            line,
            "ready\n",
            "host {name} did not come up: {:?}",
            holder.try_wait()
        );
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", holder.id()))
            .expect("the holder lives");
        let init = children.trim().parse().expect("unshare has one child");
        let pid_namespace = fs::read_link(format!("/proc/{init}/ns/pid")).expect("process 1 lives");
        Self {
            name,
            hostname,
            address,
            init,
            holder: Some(holder),
            pid_namespace,
        }
    }

    /// The pid namespace in here that something has for itself, if there is one. In all else it is this host, unless that was
    /// isolated.
    pub(crate) fn nested(&self) -> Option<Self> {
        let namespace = |pid: i32, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
        let depth = ns_pids(self.init).len();
        let init = numbers_in("/proc").find(|&pid| {
            let numbers = ns_pids(pid);
            numbers.len() == depth + 1
                && numbers.last() == Some(&1)
                && namespace(pid, "time") == namespace(self.init, "time")
        })?;
        Some(Self {
            name: self.name,
            hostname: self.hostname.clone(),
            address: self.address,
            init,
            holder: None,
            pid_namespace: namespace(init, "pid")?,
        })
    }

    /// A command that will run inside this host, as root, with an empty environment and `/` as its directory.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args([
                "--target",
                &self.init.to_string(),
                "--pid",
                "--net",
                "--mount",
                "--uts",
                "--ipc",
                "--time",
                "--",
            ])
            .arg(program)
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .env("LANG", "C.UTF-8")
            .current_dir("/")
            .stdin(Stdio::null());
        command
    }

    /// Runs a command inside and gives what came of it.
    pub(crate) fn run(&self, program: &str, arguments: &[&str]) -> Output {
        self.command(program)
            .args(arguments)
            .output()
            .expect("nsenter was found")
    }

    /// Runs a command inside and gives its output.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub(crate) fn must(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.run(program, arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "on {}: {program} {arguments:?}: {}{errors}",
            self.name,
            output.status
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Starts a program as an orphan of process 1, a session of its own, with /dev/null as its three standard files, as a
    /// service manager would. `privileges` are arguments of setpriv(1). With [`NO_SESSION`] before them it stays in the session
    /// of the tests, whose number is 0 inside.
    pub(crate) fn start(&self, privileges: &[&str], program: &[&str]) {
        let (session, privileges) = privileges.split_at(usize::from(
            privileges.first().is_some_and(|&first| first == NO_SESSION),
        ));
        let status = self
            .command(host_program("start"))
            .args(session)
            .arg("setpriv")
            .args(privileges)
            .arg("--")
            .args(program)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .expect("nsenter was found");
        assert!(
            status.success(),
            "on {}: {program:?} cannot be started: {status}",
            self.name
        );
    }

    /// Every process inside but process 1, ascending by inner number. Zombies too.
    pub(crate) fn processes(&self) -> Vec<Process> {
        let mut found: Vec<Process> = numbers_in("/proc")
            .filter_map(|outer| Process::read(outer, &self.pid_namespace))
            .collect();
        found.retain(|process| process.inner != 1);
        found.sort_by_key(|process| process.inner);
        found
    }

    /// The process with this number inside.
    pub(crate) fn process(&self, inner: i32) -> Option<Process> {
        self.processes()
            .into_iter()
            .find(|process| process.inner == inner)
    }

    /// A path of this host as the real host can open it.
    pub(crate) fn outside(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init))
    }

    /// True when a socket is bound to this UDP port here.
    pub(crate) fn udp_bound(&self, port: u16) -> bool {
        ["udp", "udp6"].iter().any(|table| {
            let text =
                fs::read_to_string(format!("/proc/{}/net/{table}", self.init)).unwrap_or_default();
            let suffix = format!(":{port:04X}");
            text.lines().skip(1).any(|line| {
                line.split_whitespace()
                    .nth(1)
                    .is_some_and(|local| local.ends_with(&suffix))
            })
        })
    }

    /// Everything that could be left behind here, one line each.
    pub(crate) fn inventory(&self) -> BTreeSet<String> {
        let mut lines = BTreeSet::new();
        for process in self.processes() {
            // Whether it works or waits is chance.
            let state = match process.state {
                'R' | 'D' => 'S',
                state => state,
            };
            let Process { inner, name, .. } = &process;
            lines.insert(format!("process {inner} {name} {state}"));
            let root = format!("/proc/{}", process.outer);
            for descriptor in numbers_in(&format!("{root}/fd")) {
                if let Ok(link) = fs::read_link(format!("{root}/fd/{descriptor}")) {
                    let link = link.to_string_lossy();
                    if link.contains("userfaultfd") {
                        lines.insert(format!(
                            "userfaultfd of process {} {}",
                            process.inner, process.name
                        ));
                    }
                }
            }
            for namespace in ["pid", "net", "mnt", "uts", "ipc", "time", "user", "cgroup"] {
                if let Ok(link) = fs::read_link(format!("{root}/ns/{namespace}")) {
                    lines.insert(format!("namespace {}", link.display()));
                }
            }
        }
        for line in self.text("mountinfo").lines() {
            // Mount number, parent and device change by themselves nowhere; root, place and type say what it is.
            let fields: Vec<&str> = line.split(' ').collect();
            lines.insert(format!("mount {}", fields[2..].join(" ")));
        }
        for (table, columns) in [
            ("tcp", &[1, 2, 3][..]),
            ("tcp6", &[1, 2, 3]),
            ("udp", &[1, 2, 3]),
            ("udp6", &[1, 2, 3]),
            ("udplite", &[1, 2, 3]),
            ("raw", &[1, 2, 3]),
            ("raw6", &[1, 2, 3]),
            ("packet", &[2, 3, 4]),
            ("netlink", &[1, 2, 3]),
            ("unix", &[3, 4, 5, 6, 7]),
        ] {
            for line in self.text(&format!("net/{table}")).lines().skip(1) {
                let fields: Vec<&str> = line.split_whitespace().collect();
                // A connection in TIME_WAIT (06) belongs to no process any more.
                if table.starts_with("tcp") && fields.get(3) == Some(&"06") {
                    continue;
                }
                let kept: Vec<&str> = columns
                    .iter()
                    .filter_map(|&column| fields.get(column).copied())
                    .collect();
                lines.insert(format!("socket {table} {}", kept.join(" ")));
            }
        }
        for directory in ["/tmp", "/run", "/dev/shm", "/dev/mqueue", "/var/lib"] {
            list_files(&self.outside(directory), directory, &mut lines);
        }
        let script = "for table in shm sem msg; do tail -n +2 /proc/sysvipc/$table | sed \"s/^/ipc $table /\"; done; nft list ruleset | sed 's/^/nftables /'";
        lines.extend(self.must("sh", &["-c", script]).lines().map(str::to_owned));
        let groups = self.text("cgroup");
        for line in self.text("mountinfo").lines() {
            // A hierarchy as mounted here: its root, its place, after " - " its type and at the end its options.
            let Some((place, kind)) = line.split_once(" - ") else {
                continue;
            };
            let Some(mount) = place.split(' ').nth(4) else {
                continue;
            };
            if !kind.starts_with("cgroup") {
                continue;
            }
            // Our program can leave a group below the one it is in, or one that bears its name.
            let own = groups.lines().find_map(|line| {
                let (controllers, group) = line.split_once(':')?.1.split_once(':')?;
                let options = kind.rsplit(' ').next().unwrap_or("");
                (if controllers.is_empty() {
                    kind.starts_with("cgroup2 ")
                } else {
                    options.ends_with(controllers)
                })
                .then_some(group)
            });
            list_groups(
                &self.outside(mount),
                mount,
                &format!("{mount}{}", own.unwrap_or("/").trim_end_matches('/')),
                &mut lines,
            );
        }
        lines
    }

    fn text(&self, file: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{file}", self.init)).unwrap_or_default()
    }

    fn end(&mut self) {
        let Some(mut holder) = self.holder.take() else {
            return;
        };
        drop(holder.stdin.take());
        let _ = holder.kill();
        let _ = holder.wait();
        // unshare --kill-child: process 1 dies with the holder, and the kernel reaps the rest before it lets go of it.
        let started = Instant::now();
        while Path::new(&format!("/proc/{}", self.init)).exists()
            && started.elapsed() < Duration::from_secs(10)
        {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.end();
    }
}

/// What was there before, on both hosts; the test ends by comparing.
#[derive(Debug)]
pub(crate) struct Before {
    a: BTreeSet<String>,
    b: BTreeSet<String>,
}

impl Before {
    /// Takes stock.
    pub(crate) fn of(pair: &Pair) -> Self {
        Self {
            a: pair.a.inventory(),
            b: pair.b.inventory(),
        }
    }

    /// Waits until both hosts hold exactly what they held before.
    ///
    /// # Panics
    /// When they do not in time: names every difference.
    #[track_caller]
    pub(crate) fn assert_nothing_left(&self, pair: &Pair) {
        self.assert_nothing_left_but(pair, 0, "");
    }

    /// The same while process `pid` is alive and doing its work: its own comings and goings do not count.
    #[track_caller]
    pub(crate) fn assert_nothing_left_but(&self, pair: &Pair, pid: i32, when: &str) {
        let differences = self.differences_at_last(pair, pid);
        assert!(
            differences.is_empty(),
            "the hosts are not what they were {when}:{differences}"
        );
    }

    /// Waits until there is no difference but process `pid`; what there still is after five seconds, one line each.
    fn differences_at_last(&self, pair: &Pair, pid: i32) -> String {
        let own = format!("process {pid} ");
        let started = Instant::now();
        loop {
            let mut differences = String::new();
            for (host, before) in [(&pair.a, &self.a), (&pair.b, &self.b)] {
                let now = host.inventory();
                for (sign, line) in now
                    .difference(before)
                    .map(|line| ("left on", line))
                    .chain(before.difference(&now).map(|line| ("gone from", line)))
                {
                    if !line.starts_with(&own) && !pair.is_declared(host, line) {
                        differences += &format!("\n  {sign} {}: {line}", host.name);
                    }
                }
            }
            if differences.is_empty() || started.elapsed() > Duration::from_secs(5) {
                return differences;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// A file of one line that each host has for itself at the same path, looking the same. Removed when this is dropped.
#[derive(Debug)]
pub(crate) struct LocalFile<'a> {
    pair: &'a Pair,
    pub(crate) path: PathBuf,
}

impl<'a> LocalFile<'a> {
    /// `path` lies in `/tmp`, which each host has for itself. It is nobody's (65534).
    #[track_caller]
    pub(crate) fn make(pair: &'a Pair, path: &str) -> Self {
        let script =
            format!("echo one line >{path}; chown 65534 {path}; touch -d @1700000000 {path}");
        for host in [&pair.a, &pair.b] {
            host.must("sh", &["-c", &script]);
        }
        let path = PathBuf::from(path);
        Self { pair, path }
    }
}

impl Drop for LocalFile<'_> {
    fn drop(&mut self) {
        for host in [&self.pair.a, &self.pair.b] {
            // What is left is found by who looks for it.
            let _ = fs::remove_file(host.outside(self.path.to_str().expect("it is ASCII")));
        }
    }
}

/// The numbers of a process in all pid namespaces it is in, the real host's first.
pub(crate) fn ns_pids(pid: i32) -> Vec<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    let numbers = numbers.unwrap_or_default().split_whitespace();
    numbers.filter_map(|number| number.parse().ok()).collect()
}

/// The entries of a directory of /proc that are numbers.
fn numbers_in(directory: &str) -> impl Iterator<Item = i32> + use<> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn list_files(outside: &Path, inside: &str, lines: &mut BTreeSet<String>) {
    for entry in fs::read_dir(outside).into_iter().flatten().flatten() {
        let name = format!("{inside}/{}", entry.file_name().to_string_lossy());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            list_files(&entry.path(), &name, lines);
        }
        // Where journals lie; the folder itself says nothing, what is in it does.
        if name != "/run/pageferry" {
            lines.insert(format!("file {name}"));
        }
    }
}

/// Lists the control groups below `own`, and those anywhere that are named after pageferry. Not those that tests make beside
/// this one, as service managers do (`sample-…` in system.slice).
pub(crate) fn list_groups(outside: &Path, inside: &str, own: &str, lines: &mut BTreeSet<String>) {
    for entry in fs::read_dir(outside).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !entry.file_type().is_ok_and(|kind| kind.is_dir())
            || name == "system.slice"
            || name.starts_with("sample-")
        {
            continue;
        }
        let inside = format!("{inside}/{name}");
        if inside.starts_with(&format!("{own}/")) || name.contains("pageferry") {
            lines.insert(format!("cgroup {inside}"));
        }
        list_groups(&entry.path(), &inside, own, lines);
    }
}

/// A library of which B has another build than A. It belongs to the C library, so every Debian has it; no program that crosses
/// maps it.
pub(crate) const LIBRARY_THAT_DIFFERS: &str = "/lib/x86_64-linux-gnu/libBrokenLocale.so.1";

/// The build that B has.
fn other_library() -> PathBuf {
    compile(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hosts/other_library.c"),
        "libother.so",
        &["-shared", "-fPIC", "-Wl,--build-id"],
    )
}

/// A program of `tests/hosts`, compiled where that is still to be done.
fn host_program(name: &str) -> PathBuf {
    compile(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/hosts/{name}.c")),
        &format!("host-{name}"),
        &[],
    )
}

/// Where what this test run compiles lies: readable by every user, unlike perhaps the checkout. Removed by nobody but the
/// next run of [`compile`], which replaces what is older than its source.
pub(crate) fn programs_directory() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        // One for each checkout: a program that runs must not be replaced by another one's build.
        let mut checkout = DefaultHasher::new();
        env!("CARGO_MANIFEST_DIR").hash(&mut checkout);
        let directory = PathBuf::from(format!(
            "/var/tmp/pageferry-test-programs-{:016x}",
            checkout.finish()
        ));
        fs::create_dir_all(&directory).expect("/var/tmp can be written by root");
        directory
    })
}

/// Compiles one C program and gives its path. Safe to be called by several test binaries at once.
pub(crate) fn compile(source: &Path, name: &str, options: &[&str]) -> PathBuf {
    let program = programs_directory().join(name);
    // One at a time: the second to find a program outdated would replace it while the first one's test runs it.
    let lock = fs::File::create(programs_directory().join("lock")).expect("the folder is ours");
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).expect("a file can be locked");
    let modified = |path: &Path| fs::metadata(path).and_then(|data| data.modified()).ok();
    let newest = fs::read_dir(source.parent().expect("a source lies in a directory"))
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| {
            entry.path() == source || entry.path().extension().is_some_and(|suffix| suffix == "h")
        })
        .filter_map(|entry| modified(&entry.path()))
        .max();
    if modified(&program).is_some_and(|built| Some(built) > newest) {
        return program;
    }
    let fresh = programs_directory().join(format!("{name}.{}", unique_number()));
    let output = Command::new("cc")
        .args([
            "-std=gnu11",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-pthread",
            "-o",
        ])
        .arg(&fresh)
        .arg(source)
        .args(options)
        .output()
        .expect("cc was found");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    fs::rename(&fresh, &program).expect("both lie in one directory");
    program
}
