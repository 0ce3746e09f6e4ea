//! Real programs cross there and back, each as a user of its own, with every byte of their memory compared, and with their
//! clients connected.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::ferry::{Drain, Ferry};
use crate::hosts::{
    Before, Clocks, Host, Pair, Process, eventually, find_program, programs_directory, say_skipped,
    skip,
};
use crate::lifecycle::{THERE_AND_BACK, journey};
use crate::subject::Subject;

const PAGE: usize = 4096;

/// The pages of a program's private mappings that hold something, by address: anonymous ones and those of files, but for the
/// kernel's own. It must stand still; a page that cannot be read fails the test.
fn pages(process: &Process) -> BTreeMap<u64, Vec<u8>> {
    let maps = fs::read_to_string(process.proc("maps")).expect("it is there");
    let mut found = BTreeMap::new();
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (range, flags) = (fields.next().unwrap_or(""), fields.next().unwrap_or(""));
        let name = fields.nth(3).unwrap_or("");
        if !flags.starts_with('r') || !flags.ends_with('p') || name.starts_with("[v") {
            continue;
        }
        let number = |text: &str| u64::from_str_radix(text, 16).expect("maps lists addresses");
        let (start, end) = range.split_once('-').expect("maps lists ranges");
        let (mut at, end) = (number(start), number(end));
        while at < end {
            let length = usize::try_from((end - at).min(1 << 20)).expect("at most 1 MiB");
            let block = process
                .memory(at, length)
                .unwrap_or_else(|| panic!("{length} bytes at {at:#x} cannot be read: {line}"));
            for page in block.chunks_exact(PAGE) {
                if page.iter().any(|byte| *byte != 0) {
                    found.insert(at, page.to_vec());
                }
                at += PAGE as u64;
            }
        }
    }
    found
}

/// True when two blocks can be one `struct rseq`, which is the kernel's to write whenever a thread runs: only the processor, the
/// node and the concurrency id differ.
fn same_rseq(one: &[u8], other: &[u8]) -> bool {
    let number = |block: &[u8], at: usize| {
        let word = block[at..at + 4].try_into().expect("four bytes");
        u32::from_le_bytes(word)
    };
    // cpu_id_start, cpu_id, rseq_cs, flags, node_id, mm_cid, nothing.
    let plausible = |block: &[u8]| {
        number(block, 0) == number(block, 4)
            && block[8..20] == [0; 12]
            && [0, 20, 24].iter().all(|&at| number(block, at) < 4096)
    };
    plausible(one) && plausible(other) && one[28..] == other[28..]
}

/// Addresses of the 32-byte blocks in which two copies of a program with so many threads differ.
fn differences(
    source: &BTreeMap<u64, Vec<u8>>,
    target: &BTreeMap<u64, Vec<u8>>,
    threads: usize,
) -> BTreeSet<u64> {
    let zeros = vec![0; PAGE];
    let addresses: BTreeSet<u64> = source.keys().chain(target.keys()).copied().collect();
    let (mut found, mut rseq) = (BTreeSet::new(), BTreeSet::new());
    for address in addresses {
        let (here, there) = (
            source.get(&address).unwrap_or(&zeros),
            target.get(&address).unwrap_or(&zeros),
        );
        for (number, (one, other)) in here.chunks(32).zip(there.chunks(32)).enumerate() {
            if one != other {
                let list = if same_rseq(one, other) {
                    &mut rseq
                } else {
                    &mut found
                };
                list.insert(address + number as u64 * 32);
            }
        }
    }
    // One for each thread at most; where there are more, they were none.
    if rseq.len() > threads {
        found.append(&mut rseq);
    }
    found
}

/// How often a program's threads have been given up a processor, all together, if none of them is running.
fn switches(process: &Process) -> Option<u64> {
    let mut sum = 0;
    for task in fs::read_dir(process.proc("task")).ok()? {
        let status = fs::read_to_string(task.ok()?.path().join("status")).ok()?;
        for line in status.lines() {
            match line.split_once(":\t") {
                Some(("State", state)) if !state.starts_with('S') => return None,
                Some((name, count)) if name.ends_with("ctxt_switches") => {
                    sum += count.parse::<u64>().ok()?;
                }
                _ => {}
            }
        }
    }
    Some(sum)
}

/// A named pipe at a path that a program opens now and then: it waits there until somebody opens the other end, and so stands
/// still without knowing.
struct Gate(PathBuf);

impl Gate {
    /// Puts the pipe there and waits until the program stands still: its first thread opens, no other one runs.
    fn close(path: PathBuf, pair: &Pair, process: &Process) -> Self {
        let text = path.to_str().expect("it is ASCII");
        let _ = fs::rename(&path, format!("{text}.old"));
        pair.a.must("mkfifo", &["--mode", "666", text]);
        eventually("the program to stand still", || {
            let call = fs::read_to_string(process.proc("syscall")).ok()?;
            let before = switches(process)?;
            std::thread::sleep(Duration::from_millis(200));
            (call.starts_with("257 ") && switches(process)? == before).then_some(())
        });
        Self(path)
    }

    /// Lets it go on, for good: the next time it finds no pipe. What it writes into the pipe may wait there as long as the
    /// returned file lives.
    fn open(self) -> fs::File {
        let both_ends = fs::File::options()
            .read(true)
            .write(true)
            .open(&self.0)
            .expect("it is there");
        fs::remove_file(&self.0).expect("it is there");
        both_ends
    }
}

/// One crossing with the drain off at first, in which nothing but the crossing touches the program's memory: as soon as it runs
/// on the target it is stopped there, then drained. Gives where the two copies differ, and how many pages were compared.
#[track_caller]
fn cross_stopped(ferry: &Ferry<'_>, pid: i32) -> (BTreeSet<u64>, usize) {
    let receive = ferry.receive(Drain::Off);
    let mut migrate = ferry.migrate(pid);
    migrate.wait_for_phase("drain");
    let copy = ferry.target.process(pid).expect("it runs there");
    copy.signal(Signal::SIGSTOP);
    eventually("it to stop", || {
        let mut tasks = fs::read_dir(copy.proc("task")).ok()?.flatten();
        tasks
            .all(|task| {
                fs::read_to_string(task.path().join("status")).is_ok_and(|status| {
                    status.contains("\nState:\tT") || status.contains("\nState:\tt")
                })
            })
            .then_some(())
    });
    // The source's copy stands still for good and is there until the drain is over.
    let source = pages(&ferry.source.process(pid).expect("it is served from"));
    receive.signal(ferry.target, Signal::SIGTERM);
    ferry.must_succeed(migrate, receive);
    let target = pages(&copy);
    let threads = fs::read_dir(copy.proc("task"))
        .expect("it is there")
        .count();
    copy.signal(Signal::SIGCONT);
    (differences(&source, &target, threads), source.len())
}

/// A server under test, and how it is started.
struct Server {
    kind: &'static str,
    user: u32,
    port: u16,
    records: u32,
    program: &'static str,
    /// `LOG` stands for a path in the shared directory.
    arguments: &'static [&'static str],
    /// It opens its log for each line, and writes one every few seconds: that is where a [`Gate`] holds it.
    opens_log: bool,
}

const REDIS: Server = Server {
    kind: "redis",
    user: 61_001,
    port: 6379,
    records: 25_000,
    program: "redis-server",
    arguments: &[
        "--port",
        "6379",
        "--bind",
        "0.0.0.0",
        "::",
        "--protected-mode",
        "no",
        "--save",
        "",
        "--appendonly",
        "no",
        "--daemonize",
        "no",
        "--dir",
        "/",
        "--jemalloc-bg-thread",
        "no",
        "--loglevel",
        "verbose",
        "--logfile",
        "LOG",
    ],
    opens_log: true,
};

const MEMCACHED: Server = Server {
    kind: "memcached",
    user: 61_002,
    port: 11_211,
    records: 20_000,
    program: "memcached",
    arguments: &[
        "-l",
        "0.0.0.0",
        "-p",
        "11211",
        "-U",
        "0",
        "-m",
        "220",
        "-t",
        "4",
        "-c",
        "200",
        "-o",
        "no_lru_maintainer,no_lru_crawler",
    ],
    opens_log: false,
};

impl Server {
    fn log(&self, pair: &Pair) -> PathBuf {
        pair.path(&format!("{}.log", self.kind))
    }

    /// Starts it on A as a user of its own and waits until it listens; gives its pid. `None`: it is not installed.
    #[track_caller]
    fn start(&self, pair: &Pair) -> Option<i32> {
        let Some(program) = find_program(self.program) else {
            say_skipped(&format!("needs {}", self.program));
            return None;
        };
        let ids = [
            format!("--reuid={}", self.user),
            format!("--regid={}", self.user),
        ];
        let mut privileges: Vec<&str> = ids.iter().map(String::as_str).collect();
        privileges.extend([
            "--clear-groups",
            "--no-new-privs",
            "--bounding-set=-all",
            "--inh-caps=-all",
        ]);
        let log = self.log(pair);
        let mut command = vec![program.to_str().expect("it is ASCII")];
        command.extend(self.arguments.iter().map(|argument| match *argument {
            "LOG" => log.to_str().expect("it is ASCII"),
            other => other,
        }));
        pair.a.start(&privileges, &command);
        let uid = format!("\nUid:\t{}\t", self.user);
        let process = eventually(&format!("{} to run", self.kind), || {
            pair.a.processes().into_iter().find(|process| {
                process.name.starts_with(self.kind)
                    && fs::read_to_string(process.proc("status"))
                        .is_ok_and(|status| status.contains(&uid))
            })
        });
        let ready = format!("exec 3<>/dev/tcp/127.0.0.1/{}", self.port);
        eventually("it to listen", || {
            pair.a
                .run("bash", &["-c", &ready])
                .status
                .success()
                .then_some(())
        });
        Some(process.inner)
    }

    /// Runs `tests/programs/client.py` on the server's host.
    #[track_caller]
    fn ask(&self, host: &Host, verb: &str) -> String {
        let client = programs("client.py");
        host.must(
            "/usr/bin/python3",
            &[
                client.to_str().expect("it is ASCII"),
                self.kind,
                verb,
                &self.port.to_string(),
                &self.records.to_string(),
            ],
        )
    }

    #[track_caller]
    fn end(host: &Host, pid: i32) {
        host.process(pid)
            .expect("it has answered")
            .signal(Signal::SIGTERM);
        eventually("it to end", || host.process(pid).is_none().then_some(()));
    }
}

fn programs(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/programs")
        .join(name)
}

/// Crossings at most until one was undisturbed by a program that cannot be held still. Its clock ticks once a second, and a
/// crossing takes a fraction of that.
const CROSSINGS_MAX: usize = 9;

/// Fills a server with data and takes it to B, back and there again. Its data are asked for at each stop, and all its memory is
/// compared bit for bit: at the first two crossings where it can be held still, else until one crossing fell between two ticks
/// of its clock, of at least three.
fn server_crosses(server: &Server, clocks: Clocks) {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(clocks);
    let before = Before::of(&pair);
    let Some(pid) = server.start(&pair) else {
        return;
    };
    server.ask(&pair.a, "fill");
    let digest = server.ask(&pair.a, "digest");

    let forth = Ferry::new(&pair);
    let mut identical = 0;
    let mut ferry = forth.back();
    for number in 0.. {
        ferry = ferry.back();
        let gate = (server.opens_log && number < 2).then(|| {
            let process = ferry.source.process(pid).expect("it runs there");
            Gate::close(server.log(&pair), &pair, &process)
        });
        let (differing, compared) = cross_stopped(&ferry, pid);
        assert!(
            compared > server.records as usize * 3000 / PAGE,
            "only {compared} pages were seen"
        );
        println!(
            "{} to {}: {compared} pages compared, differing blocks: {differing:x?}",
            server.kind, ferry.target.name
        );
        assert!(
            gate.is_none() || differing.is_empty(),
            "crossing {number}: of {compared} pages, blocks at these addresses differ: {differing:x?}"
        );
        identical += usize::from(differing.is_empty());
        let _log = gate.map(Gate::open);
        assert!(
            ferry.source.process(pid).is_none(),
            "crossing {number}: it is still on {}",
            ferry.source.name
        );
        assert_eq!(
            server.ask(ferry.target, "digest"),
            digest,
            "crossing {number}"
        );
        let copy = ferry.target.process(pid).expect("it has answered");
        let status = fs::read_to_string(copy.proc("status")).expect("it runs");
        let id = server.user;
        assert!(
            status.contains(&format!("\nUid:\t{id}\t{id}\t{id}\t{id}\n")),
            "it runs as another user: {status}"
        );
        if number >= 2 && identical > 0 {
            break;
        }
        assert!(
            number + 1 < CROSSINGS_MAX,
            "no crossing of {CROSSINGS_MAX} left the memory as it was; in the last one blocks at these addresses differ: {differing:x?}"
        );
    }
    Server::end(ferry.target, pid);
    before.assert_nothing_left(&pair);
}

#[test]
fn redis_crosses_and_comes_back() {
    server_crosses(&REDIS, Clocks::Behind);
}

#[test]
fn memcached_crosses_and_comes_back() {
    server_crosses(&MEMCACHED, Clocks::FarAhead);
}

/// A client of Redis on host A that stays connected (`tests/programs/visitor.py`).
struct Visitor {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Visitor {
    /// Connects, and sets `key` to `value` unless that is "-".
    #[track_caller]
    fn connect(pair: &Pair, server: &Host, key: &str, value: &str) -> Self {
        let mut child = pair
            .a
            .command("/usr/bin/python3")
            .arg(programs("visitor.py"))
            .args([server.address, &REDIS.port.to_string(), key, value])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("nsenter was found");
        let mut visitor = Self {
            input: child.stdin.take().expect("it is piped"),
            output: BufReader::new(child.stdout.take().expect("it is piped")),
            child,
        };
        assert_eq!(visitor.line(), "connected");
        visitor
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output
            .read_line(&mut line)
            .expect("a pipe can be read");
        line.trim_end().to_owned()
    }

    /// The answer to `get`, or to `wait`: "ended" once the connection is no more.
    fn ask(&mut self, what: &str) -> String {
        writeln!(self.input, "{what}").expect("it reads to the end");
        self.line()
    }

    #[track_caller]
    fn leave(mut self) {
        drop(self.input);
        let status = self.child.wait().expect("it is ours");
        assert!(status.success(), "the client ended with {status}");
    }
}

/// `--tcp refuse`, the default, touches neither server nor connection; `--tcp close` ends the connection, and the client finds
/// its data where the server has gone.
#[test]
fn redis_with_a_client_is_refused_or_drops_it() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let before = Before::of(&pair);
    let Some(pid) = REDIS.start(&pair) else {
        return;
    };
    let mut visitor = Visitor::connect(&pair, &pair.a, "mine", "kept");
    assert_eq!(visitor.ask("get"), "kept");

    let mut ferry = Ferry::new(&pair);
    for tcp in [None, Some("refuse")] {
        ferry.tcp = tcp;
        let receive = ferry.receive(Drain::On);
        let finished = ferry.migrate(pid).wait();
        finished.must_exit(7);
        receive.signal(ferry.target, Signal::SIGTERM);
        receive.wait();
        let named = format!("pid {pid} fd ");
        let refusals = finished.refusals();
        assert!(
            refusals.len() == 1
                && refusals[0].starts_with(&named)
                && refusals[0].contains("established TCP 10.77.0.1:6379 → 10.77.0.1:")
                && refusals[0].contains("--tcp close"),
            "{tcp:?}: {refusals:#?}"
        );
        assert_eq!(visitor.ask("get"), "kept", "after --tcp {tcp:?}");
        let process = pair.a.process(pid).expect("it has answered");
        assert_eq!(process.tracer(), Some(0), "it is still traced");
        assert!(pair.b.process(pid).is_none(), "something of it is on B");
    }

    ferry.tcp = Some("close");
    ferry.cross(pid);
    assert!(pair.a.process(pid).is_none(), "it is still on A");
    assert_eq!(visitor.ask("wait"), "ended", "after --tcp close");
    visitor.leave();
    let mut visitor = Visitor::connect(&pair, &pair.b, "mine", "-");
    assert_eq!(visitor.ask("get"), "kept", "on B");
    visitor.leave();
    Server::end(&pair.b, pid);
    before.assert_nothing_left(&pair);
}

#[test]
fn threaded_python_crosses_and_comes_back() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::FarAhead);
    let before = Before::of(&pair);
    let script = pair.path("threaded.py");
    fs::copy(programs("threaded.py"), &script).expect("the directory is ours");
    let state = pair.path("threaded.state");
    let python = fs::canonicalize("/usr/bin/python3").expect("Debian has it");
    let command = [
        "/usr/bin/python3",
        script.to_str().expect("it is ASCII"),
        "--state",
        state.to_str().expect("it is ASCII"),
    ];
    let privileges = [
        "--reuid=61003",
        "--regid=61003",
        "--clear-groups",
        "--no-new-privs",
        "--bounding-set=-all",
        "--inh-caps=-all",
    ];
    let mut subject = Subject::launch(&pair, &pair.a, "threaded", &python, &privileges, &command)
        .expect("it needs nothing");
    subject.must_pass("before it leaves");
    let forth = Ferry::new(&pair);
    for ferry in [forth.clone(), forth.back(), forth.clone()] {
        let process = ferry.source.process(subject.pid).expect("it has answered");
        let gate = Gate::close(pair.path("threaded.state.quiet"), &pair, &process);
        let (differing, compared) = cross_stopped(&ferry, subject.pid);
        assert!(
            compared > 5000 && differing.is_empty(),
            "of {compared} pages, blocks at these addresses differ: {differing:x?}"
        );
        let _gate = gate.open();
        subject.must_pass(&format!("on {}", ferry.target.name));
        assert!(ferry.source.process(subject.pid).is_none());
    }
    subject.end(&pair.b);
    before.assert_nothing_left(&pair);
}

/// A program with what it has started goes there and back, and to rest and up again; it checks itself all the way.
fn program_goes_there_and_back(name: &str, program: &str, arguments: &[&str], clocks: Clocks) {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(clocks);
    let before = Before::of(&pair);
    let Ok(program) = fs::canonicalize(program) else {
        return say_skipped(&format!("needs {program}"));
    };
    let state = pair.path(&format!("{name}.state"));
    let mut command = vec![program.to_str().expect("it is ASCII")];
    command.extend(arguments);
    command.extend(["--state", state.to_str().expect("it is ASCII")]);
    let privileges = [
        "--reuid=61004",
        "--regid=61004",
        "--clear-groups",
        "--no-new-privs",
        "--bounding-set=-all",
        "--inh-caps=-all",
    ];
    let mut subject = Subject::launch(&pair, &pair.a, name, &program, &privileges, &command)
        .expect("it needs nothing");
    let host = journey(&pair, subject.pid, THERE_AND_BACK, |host, when| {
        subject.must_pass(when);
        assert!(subject.runs_on(host), "not on {} {when}", host.name);
    });
    subject.end(host);
    eventually("what it has started to end", || {
        host.processes().is_empty().then_some(())
    });
    before.assert_nothing_left(&pair);
}

#[test]
fn a_pipeline_of_a_shell_crosses_and_comes_to_rest() {
    let script = programs("pipeline.sh");
    let script = script.to_str().expect("it is ASCII");
    program_goes_there_and_back("pipeline", "/usr/bin/bash", &[script], Clocks::Behind);
}

#[test]
fn the_workers_of_pythons_multiprocessing_cross_and_come_to_rest() {
    let script = programs("pool.py");
    let script = script.to_str().expect("it is ASCII");
    program_goes_there_and_back("pool", "/usr/bin/python3", &[script], Clocks::FarAhead);
}

/// A web server with workers answers wherever it is; in the end its master still rules them.
#[test]
#[ignore = "long: installs nginx"]
fn nginx_with_workers_crosses_and_comes_to_rest() {
    if skip().is_some() {
        return;
    }
    let Some(program) = find_program("nginx") else {
        return say_skipped("needs nginx");
    };
    let pair = Pair::new(Clocks::Behind);
    let before = Before::of(&pair);
    let folder = pair.path("nginx");
    let text = folder.to_str().expect("it is ASCII");
    pair.a.must("mkdir", &["-m", "777", text]);
    let page: String = (0..20_000).map(|n| format!("line {n}\n")).collect();
    fs::write(folder.join("page"), &page).expect("the directory is ours");
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|what| format!("{what}_temp_path {text}/{what};"))
        .concat();
    let configuration = format!(
        "daemon off; worker_processes 2; pid {text}/pid; error_log {text}/errors;
        events {{ worker_connections 64; }}
        http {{ access_log {text}/accesses; {temporary}
            limit_req_zone $binary_remote_addr zone=one:1m rate=10000r/s;
            server {{ listen 8080; root {text}; limit_req zone=one burst=1000; location /who {{ return 200 $pid; }} }} }}"
    );
    fs::write(folder.join("conf"), configuration).expect("the directory is ours");
    let (conf, errors) = (format!("{text}/conf"), format!("{text}/errors"));
    let command = [
        program.to_str().expect("it is ASCII"),
        "-e",
        &errors,
        "-c",
        &conf,
    ];
    let ids = [
        "--reuid=61005",
        "--regid=61005",
        "--clear-groups",
        "--no-new-privs",
    ];
    pair.a.start(&ids, &command);
    let get = |host: &Host, path: &str| {
        let script = format!(
            "exec 3<>/dev/tcp/127.0.0.1/8080; printf 'GET {path} HTTP/1.0\r\n\r\n' >&3; cat <&3"
        );
        let output = host.run("bash", &["-c", &script]);
        let answer = String::from_utf8(output.stdout).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        head.contains(" 200 ").then(|| body.to_owned())
    };
    eventually("it to answer", || get(&pair.a, "/who"));
    let children = |host: &Host, pid: i32| {
        let of = |process: &Process| {
            let stat = fs::read_to_string(process.proc("stat")).ok()?;
            stat.rsplit_once(") ")?
                .1
                .split(' ')
                .nth(1)?
                .parse::<i32>()
                .ok()
        };
        let outer = host.process(pid).map(|master| master.outer);
        let mut found: Vec<i32> = host
            .processes()
            .iter()
            .filter(|process| of(process) == outer)
            .map(|process| process.inner)
            .collect();
        found.sort_unstable();
        found
    };
    let master = fs::read_to_string(folder.join("pid")).expect("it answers");
    let master: i32 = master.trim().parse().expect("a process id");
    let workers = children(&pair.a, master);
    assert_eq!(workers.len(), 2, "{workers:?}");
    let host = journey(&pair, master, THERE_AND_BACK, |host, when| {
        assert_eq!(children(host, master), workers, "{when}");
        for _ in 0..8 {
            let who = get(host, "/who").unwrap_or_default();
            let who: i32 = who.parse().unwrap_or(0);
            assert!(workers.contains(&who), "{who} answers {when}");
            assert!(
                get(host, "/page").as_ref() == Some(&page),
                "another page {when}"
            );
        }
    });
    let process = host.process(master).expect("it has answered");
    process.signal(Signal::SIGHUP);
    eventually("other workers", || {
        let now = children(host, master);
        (now.len() == 2 && now.iter().all(|pid| !workers.contains(pid))).then_some(())
    });
    eventually("them to answer", || get(host, "/who"));
    process.signal(Signal::SIGQUIT);
    eventually("it to end", || host.processes().is_empty().then_some(()));
    before.assert_nothing_left(&pair);
}

#[test]
#[ignore = "long: installs and starts a Java virtual machine"]
fn a_java_virtual_machine_crosses_and_comes_to_rest() {
    let Some(compiler) = find_program("javac") else {
        return say_skipped("needs javac");
    };
    // Both hosts see it; /tmp is each one's own.
    let classes = programs_directory().join("java");
    let compiled = Command::new(compiler)
        .arg("-d")
        .arg(&classes)
        .arg(programs("Journey.java"))
        .status()
        .expect("it was found");
    assert!(compiled.success(), "javac: {compiled}");
    // Its performance data is a file in /tmp, which each host has for itself.
    let classes = classes.to_str().expect("it is ASCII");
    let arguments = ["-Xmx96m", "-XX:-UsePerfData", "-cp", classes, "Journey"];
    program_goes_there_and_back("java", "/usr/bin/java", &arguments, Clocks::FarAhead);
}

/// Where PostgreSQL's programs lie: Debian has the server's in a folder for each version.
fn find_postgresql() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let has_all = |folder: &PathBuf| {
        let mut programs = ["initdb", "postgres", "psql", "pg_controldata"].iter();
        programs.all(|program| folder.join(program).is_file())
    };
    let folders = versions.flatten().map(|version| version.path().join("bin"));
    let mut folders: Vec<PathBuf> = folders.filter(has_all).collect();
    folders.sort();
    folders.pop()
}

/// A database with its many processes, its System V segment, its POSIX shared memory and its shared buffers, idle while it is on its
/// way; its tables are read and written wherever it is, also by workers that it starts for that.
#[test]
#[ignore = "long: installs PostgreSQL"]
fn postgresql_crosses_and_comes_to_rest() {
    if skip().is_some() {
        return;
    }
    let Some(programs) = find_postgresql() else {
        return say_skipped("needs postgresql");
    };
    let program = |name: &str| programs.join(name).display().to_string();
    let pair = Pair::new(Clocks::Behind);
    let before = Before::of(&pair);
    let folder = pair.path("pg");
    let text = folder.to_str().expect("it is ASCII");
    // A user with a name, which it asks for.
    pair.a
        .must("install", &["-d", "-m", "700", "-o", "nobody", text]);
    let ids = [
        "--reuid=nobody",
        "--regid=65534",
        "--clear-groups",
        "--no-new-privs",
    ];
    let initdb = program("initdb");
    let data = format!("{text}/data");
    let mut command = ids.to_vec();
    command.extend(["--", &initdb, "-D", &data, "-U", "postgres", "-A", "trust"]);
    command.extend(["--no-sync", "--no-locale", "-E", "UTF8"]);
    pair.a.must("setpriv", &command);
    let postgres = program("postgres");
    let settings = [
        "shared_buffers=16MB".to_owned(),
        format!("unix_socket_directories={text}"),
        "listen_addresses=127.0.0.1".to_owned(),
        "logging_collector=on".to_owned(),
        "autovacuum_naptime=1h".to_owned(),
        "huge_pages=off".to_owned(),
    ];
    let mut command = vec![postgres.as_str(), "-D", &data];
    command.extend(settings.iter().flat_map(|setting| ["-c", setting]));
    pair.a.start(&ids, &command);
    let psql = program("psql");
    let query = |host: &Host, server: &str, sql: &str| {
        let arguments = [
            "-h", server, "-U", "postgres", "-d", "postgres", "-AtXqc", sql,
        ];
        let output = host.run(&psql, &arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
            false => Err(errors.into_owned()),
        }
    };
    eventually("it to answer", || query(&pair.a, text, "select 1").ok());
    let script = "create table words (id int primary key, word text);
        insert into words select n, md5(n::text) from generate_series(1, 50000) n;
        create table rounds (id serial, place text); analyze";
    query(&pair.a, text, script).expect("it is idle");
    let sum = "select count(*), md5(string_agg(word, '' order by id)) from words";
    let words = query(&pair.a, text, sum).expect("it is idle");
    assert!(words.starts_with("50000|"), "{words}");
    let pid = fs::read_to_string(folder.join("data/postmaster.pid")).expect("it answers");
    let pid: i32 = pid
        .lines()
        .next()
        .and_then(|pid| pid.parse().ok())
        .expect("a process id");
    // Postmaster, logger, checkpointer, two writers, two launchers, at least; what serves a client ends behind it.
    let (serving, standing) = (
        ["postgres: postgres ", "postgres: parallel "],
        ["postgres: ", &postgres],
    );
    let named = |host: &Host, names: &[&str]| -> Vec<i32> {
        let is_named = |process: &Process| {
            let command = fs::read(process.proc("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).into_owned();
            names.iter().any(|name| command.starts_with(name))
        };
        let processes = host.processes().into_iter();
        processes
            .filter(is_named)
            .map(|process| process.inner)
            .collect()
    };
    let is_idle = |host: &Host| named(host, &serving).is_empty();
    eventually("its clients' processes to end", || {
        is_idle(&pair.a).then_some(())
    });
    let rest = |host: &Host| named(host, &standing);
    let standing = rest(&pair.a);
    assert!(
        standing.len() >= 6 && standing.contains(&pid),
        "{standing:?}"
    );
    let mut rounds = 0;
    let host = journey(&pair, pid, THERE_AND_BACK, |host, when| {
        let ask = |server: &str, sql: &str| {
            let answer = query(host, server, sql);
            answer.unwrap_or_else(|why| panic!("{sql}: {why} {when}"))
        };
        assert_eq!(rest(host), standing, "{when}");
        assert_eq!(ask(text, sum), words, "{when}");
        rounds += 1;
        let place = format!("insert into rounds (place) values ('{}')", host.name);
        ask("127.0.0.1", &place);
        ask(
            text,
            "update words set word = md5(id::text) where id % 7 = 0; checkpoint",
        );
        let parallel = "set parallel_setup_cost = 0; set parallel_tuple_cost = 0;
            set min_parallel_table_scan_size = 0; set max_parallel_workers_per_gather = 2;";
        let plan = ask(
            text,
            &format!("{parallel} explain select count(*) from words"),
        );
        assert!(plan.contains("Workers Planned"), "{plan}");
        let count = ask(text, &format!("{parallel} select count(*) from words"));
        assert_eq!(count, "50000", "{when}");
        let count = ask(text, "select count(*), max(id) from rounds");
        assert_eq!(count, format!("{rounds}|{rounds}"), "{when}");
        eventually("its clients' processes to end", || {
            is_idle(host).then_some(())
        });
    });
    let process = host.process(pid).expect("it has answered");
    process.signal(Signal::SIGINT);
    eventually("it to end", || host.processes().is_empty().then_some(()));
    let state = host.must(&program("pg_controldata"), &[&data]);
    assert!(state.contains("shut down\n"), "{state}");
    before.assert_nothing_left(&pair);
}

/// Pages of a file that are not on its storage yet: cachestat(2), Linux 6.5.
#[track_caller]
fn unwritten_pages(host: &Host, path: &Path) -> u64 {
    let script = "import ctypes, os, sys
file = os.open(sys.argv[1], os.O_RDONLY)
whole, found = (ctypes.c_uint64 * 2)(), (ctypes.c_uint64 * 5)()
assert ctypes.CDLL(None).syscall(451, file, whole, found, 0) == 0
print(found[1] + found[2])";
    let path = path.to_str().expect("it is ASCII");
    let printed = host.must("/usr/bin/python3", &["-c", script, path]);
    printed.trim_end().parse().expect("a number")
}

/// The target reads a written file from its storage: what the source still held of it would be missing there, or be written over
/// what the program writes next.
#[test]
fn written_files_are_on_their_storage_before_the_program_runs_elsewhere() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let file = pair.path("written");
    let script = format!(
        "exec 7>{0}; chmod 666 {0}; head --bytes 4000000 /dev/zero >&7; exec sleep 100000",
        file.display()
    );
    pair.a.start(&[], &["bash", "-c", &script]);
    let process = eventually("it to have written", || {
        let mut processes = pair.a.processes().into_iter();
        processes.find(|process| process.name == "sleep")
    });
    if unwritten_pages(&pair.a, &file) == 0 {
        say_skipped(
            "the shared directory has no storage: it is not seen that written files are synced",
        );
        return;
    }
    let ferry = Ferry::new(&pair);
    ferry.cross(process.inner);
    assert_eq!(unwritten_pages(&pair.b, &file), 0);
    Server::end(&pair.b, process.inner);
}

/// The comparison sees one changed bit, a page more and a page less; what the kernel writes into `struct rseq` is no difference.
#[test]
fn the_comparison_of_two_copies_is_exact() {
    let page = |bytes: &[(usize, u8)]| {
        let mut page = vec![0; PAGE];
        bytes.iter().for_each(|&(at, byte)| page[at] = byte);
        page
    };
    let here = BTreeMap::from([
        (0x1000, page(&[(7, 1)])),
        (0x2000, page(&[(64, 3), (68, 3)])),
    ]);
    let with = |address: u64, page: Vec<u8>| {
        let mut there = here.clone();
        there.insert(address, page);
        differences(&here, &there, 1)
    };
    assert!(differences(&here, &here, 1).is_empty());
    assert_eq!(with(0x1000, page(&[(7, 3)])), BTreeSet::from([0x1000]));
    assert_eq!(with(0x3000, page(&[(4095, 1)])), BTreeSet::from([0x3fe0]));
    assert!(with(0x2000, page(&[(64, 1), (68, 1), (84, 1)])).is_empty());
    assert_eq!(
        with(0x2000, page(&[(64, 1), (68, 2)])),
        BTreeSet::from([0x2040])
    );
    // One thread has one of them.
    assert_eq!(
        with(0x2000, page(&[(64, 1), (68, 1), (96, 1), (100, 1)])),
        BTreeSet::from([0x2040, 0x2060])
    );
    let less = BTreeMap::from([(0x2000, here[&0x2000].clone())]);
    assert_eq!(differences(&here, &less, 1), BTreeSet::from([0x1000]));
}
