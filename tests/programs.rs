//! Real programs cross there and back, each as a user of its own, with every byte compared.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use nix::sys::signal::Signal;

use crate::ferry::{Drain, Ferry};
use crate::hosts::{Before, Clocks, Host, Pair, Process, eventually, find_program, skip};
use crate::subject::Subject;

const PAGE: u64 = 4096;

/// Hashes of the pages of private anonymous memory that hold something, by address. Reads the frozen or idle process
/// from outside; a page that cannot be read is not listed.
fn pages(process: &Process) -> BTreeMap<u64, u64> {
    let maps = fs::read_to_string(process.proc("maps")).unwrap_or_default();
    let mut found = BTreeMap::new();
    for line in maps.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (Some((start, end)), Some(&flags), Some(&inode)) =
            (fields[0].split_once('-'), fields.get(1), fields.get(4))
        else {
            continue;
        };
        let name = fields.get(5).copied().unwrap_or_default();
        if inode != "0"
            || !flags.starts_with('r')
            || !flags.ends_with('p')
            || name.starts_with("[v")
        {
            continue;
        }
        let number = |text: &str| u64::from_str_radix(text, 16).expect("maps lists addresses");
        let (start, end) = (number(start), number(end));
        let mut at = start;
        while at < end {
            let length = (end - at).min(1 << 20);
            let block = process.memory(at, usize::try_from(length).expect("at most 1 MiB"));
            for offset in (0..length).step_by(4096) {
                let page = match &block {
                    Some(block) => {
                        let from = usize::try_from(offset).expect("at most 1 MiB");
                        Some(block[from..from + 4096].to_vec())
                    }
                    None => process.memory(at + offset, 4096),
                };
                if let Some(page) = page.filter(|page| page.iter().any(|byte| *byte != 0)) {
                    let mut hasher = DefaultHasher::new();
                    page.hash(&mut hasher);
                    found.insert(at + offset, hasher.finish());
                }
            }
            at += length;
        }
    }
    found
}

fn find_user_program<'a>(host: &Host, user: u32, name: &'a str) -> (Process, &'a str) {
    let process = eventually(&format!("{name} to run"), || {
        host.processes().into_iter().find(|process| {
            process.name.starts_with(name)
                && fs::read_to_string(process.proc("status"))
                    .is_ok_and(|status| status.contains(&format!("\nUid:\t{user}\t")))
        })
    });
    (process, name)
}

/// Fills a server with data, takes it to B and back, and compares every byte at each stop.
fn server_crosses(
    kind: &str,
    user: u32,
    port: u16,
    records: u32,
    program: &str,
    arguments: &[&str],
    clocks: Clocks,
) {
    if skip().is_some() {
        return;
    }
    let Some(program) = find_program(program) else {
        let strict = std::env::var_os("PAGEFERRY_TEST_STRICT").is_some_and(|value| value != "0");
        assert!(!strict, "{program} is not installed");
        eprintln!("skipped: needs {program}");
        return;
    };
    let pair = Pair::new(clocks);
    let before = Before::of(&pair);
    let id = user.to_string();
    let privileges = [format!("--reuid={id}"), format!("--regid={id}")];
    let mut privileges: Vec<&str> = privileges.iter().map(String::as_str).collect();
    privileges.extend([
        "--clear-groups",
        "--no-new-privs",
        "--bounding-set=-all",
        "--inh-caps=-all",
    ]);
    let mut command = vec![program.to_str().expect("it is ASCII")];
    command.extend(arguments);
    pair.a.start(&privileges, &command);
    let (process, _) = find_user_program(&pair.a, user, kind);
    let pid = process.inner;
    let ready = format!("exec 3<>/dev/tcp/127.0.0.1/{port}");
    eventually("it to listen", || {
        pair.a
            .run("bash", &["-c", &ready])
            .status
            .success()
            .then_some(())
    });
    let client = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs/client.py");
    let client = client.to_str().expect("it is ASCII");
    let ask = |host: &Host, verb: &str| {
        host.must(
            "/usr/bin/python3",
            &[client, kind, verb, &port.to_string(), &records.to_string()],
        )
    };
    ask(&pair.a, "fill");
    let digest = ask(&pair.a, "digest");

    let forth = Ferry::new(&pair);
    let mut source_pages = BTreeMap::new();
    for (number, ferry) in [forth.clone(), forth.back(), forth.clone()]
        .iter()
        .enumerate()
    {
        if number == 0 {
            // Drain off: the source's copy stands still and can be read at leisure.
            let receive = ferry.receive(Drain::Off);
            let mut migrate = ferry.migrate(pid);
            migrate.wait_for_phase("drain");
            if let Some(copy) = ferry.source.process(pid) {
                source_pages = pages(&copy);
            }
            receive.signal(ferry.target, Signal::SIGTERM);
            ferry.must_succeed(migrate, receive);
            let arrived = pages(&ferry.target.process(pid).expect("it runs on B"));
            let differing = source_pages
                .iter()
                .filter(|(address, hash)| arrived.get(address) != Some(hash))
                .count();
            // An idle server touches its stacks and a few words of its own bookkeeping, nothing else.
            assert!(
                source_pages.len() as u64 > u64::from(records) * 3000 / PAGE,
                "only {} pages were seen",
                source_pages.len()
            );
            assert!(
                differing < 150 + source_pages.len() / 200,
                "{differing} of {} pages differ",
                source_pages.len()
            );
        } else {
            ferry.cross(pid);
        }
        assert!(
            ferry.source.process(pid).is_none(),
            "crossing {number}: it is still on {}",
            ferry.source.name
        );
        assert_eq!(ask(ferry.target, "digest"), digest, "crossing {number}");
        let copy = ferry.target.process(pid).expect("it has answered");
        let status = fs::read_to_string(copy.proc("status")).expect("it runs");
        assert!(
            status.contains(&format!("\nUid:\t{id}\t{id}\t{id}\t{id}\n")),
            "it runs as another user: {status}"
        );
    }
    pair.b
        .process(pid)
        .expect("it has answered")
        .signal(Signal::SIGTERM);
    eventually("it to end", || pair.b.process(pid).is_none().then_some(()));
    before.assert_nothing_left(&pair);
}

#[test]
fn redis_crosses_and_comes_back() {
    let arguments = [
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
        "--logfile",
        "",
    ];
    server_crosses(
        "redis",
        61_001,
        6379,
        25_000,
        "redis-server",
        &arguments,
        Clocks::Behind,
    );
}

#[test]
fn memcached_crosses_and_comes_back() {
    let arguments = [
        "-l", "0.0.0.0", "-p", "11211", "-U", "0", "-m", "220", "-t", "4", "-c", "200",
    ];
    server_crosses(
        "memcached",
        61_002,
        11_211,
        20_000,
        "memcached",
        &arguments,
        Clocks::FarAhead,
    );
}

#[test]
fn threaded_python_crosses_and_comes_back() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::FarAhead);
    let before = Before::of(&pair);
    let script = pair.path("threaded.py");
    fs::copy(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs/threaded.py"),
        &script,
    )
    .expect("the directory is ours");
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
        ferry.cross(subject.pid);
        subject.must_pass(&format!("on {}", ferry.target.name));
        assert!(ferry.source.process(subject.pid).is_none());
    }
    subject.end(&pair.b);
    before.assert_nothing_left(&pair);
}
