//! `./demo`: moves a self-checking program from one host to another, both made of namespaces, and shows what it cost.
//!
//! It drives the real program with the command lines an operator would type and believes nothing but the program that
//! moved: its own word on which host it is, and its own check of every byte. Exit 0 only if all of it is as promised.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

#[path = "../ferry.rs"]
#[allow(dead_code, reason = "shared with the tests, which use the rest")]
mod ferry;
#[path = "../hosts.rs"]
#[allow(dead_code, reason = "shared with the tests, which use the rest")]
mod hosts;
#[path = "../subject.rs"]
#[allow(dead_code, reason = "shared with the tests, which use the rest")]
mod subject;

use ferry::{Drain, Ferry};
use hosts::{Clocks, Pair, eventually};
use subject::{Answer, ORDINARY, Subject};

/// What the memory's content follows from, beside its addresses.
const SEED: &str = "20261121";

/// Faults over the network that a demonstration of post-copy must show at least.
const FAULTS_MIN: u64 = 1000;

/// Pages that may be on the target when the program begins to run there: its stacks, its libraries' data.
const RESIDENT_AT_RUN_MAX: u64 = 1024;

/// What a demonstration may take in all, for memory up to [`TIMED_MEMORY_MAX`].
const ELAPSED_MAX: Duration = Duration::from_secs(60);

/// The largest memory for which [`ELAPSED_MAX`] is promised, bytes.
const TIMED_MEMORY_MAX: u64 = 2 << 30;

fn main() -> ExitCode {
    let mut memory = 256 << 20;
    let mut as_json = false;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match (argument.as_str(), argument.strip_prefix("--memory=")) {
            ("--json", _) => as_json = true,
            ("--memory", _) | (_, Some(_)) => {
                let text = argument
                    .strip_prefix("--memory=")
                    .map(str::to_owned)
                    .or_else(|| arguments.next());
                let Some(bytes) = text.as_deref().and_then(parse_size) else {
                    eprintln!("--memory takes a size such as 512MiB or 2GiB");
                    return ExitCode::from(2);
                };
                memory = bytes;
            }
            _ => {
                eprintln!("usage: demo [--memory SIZE] [--json]");
                return ExitCode::from(2);
            }
        }
    }
    // Failures inside panic, so that the hosts are removed by their guards; the message has been printed by then.
    match std::panic::catch_unwind(|| demonstrate(memory, as_json)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) | Err(_) => ExitCode::FAILURE,
    }
}

/// Bytes of "2GiB", "512MiB", "64KiB" or a plain number.
fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit: u64 = match &text[digits.len()..] {
        "" => 1,
        "KiB" | "K" => 1 << 10,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        _ => return None,
    };
    digits
        .parse::<u64>()
        .ok()?
        .checked_mul(unit)
        .filter(|bytes| *bytes >= 1 << 20)
}

/// The whole show. False: it ended, but not as promised.
fn demonstrate(memory: u64, as_json: bool) -> bool {
    let started = Instant::now();
    let show = |text: &str| eprintln!("{:6.2} s  {text}", started.elapsed().as_secs_f64());
    let pair = Pair::new(Clocks::FarAhead);
    show(&format!(
        "two hosts: {} and {}",
        pair.a.hostname, pair.b.hostname
    ));
    let ferry = Ferry::new(&pair);
    let program = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/demo/workload.c");
    let bytes = memory.to_string();
    let mut workload = Subject::start_program(&pair, &pair.a, &program, ORDINARY, &[&bytes, SEED])
        .expect("it needs nothing special");
    let mut right = workload.ask() == Answer::Pass;
    let before = told(&workload, "before");
    show(&format!(
        "process {} holds {} MiB on {}, step {}",
        workload.pid,
        memory >> 20,
        text(&before, "host"),
        before["step"]
    ));

    let receive = ferry.receive(Drain::On);
    let mut migrate = ferry.migrate(workload.pid);
    migrate.wait_for_phase("drain");
    // Asked while its pages are on their way.
    right &= workload.ask() == Answer::Pass;
    let after = told(&workload, "after");
    show(&format!(
        "it runs on {}, step {}",
        text(&after, "host"),
        after["step"]
    ));
    let (source, target) = ferry.must_succeed(migrate, receive);
    let ledger = target.ledger().clone();
    let source_ledger = source.ledger();
    show(&format!(
        "down for {:.1} ms (freeze {:.1}, capture {:.1}, rebuild {:.1}, commit {:.1}), drained in {:.1} s, {} of {} pages by fault",
        source_ledger.downtime_ms,
        source_ledger.freeze_ms,
        source_ledger.capture_ms,
        source_ledger.rebuild_ms,
        source_ledger.commit_ms,
        ledger.drain_ms / 1000.0,
        ledger.pages_faulted,
        ledger.pages_total,
    ));
    let verdict = workload.ask();
    right &= verdict == Answer::Pass;
    let complete = told(&workload, "complete");
    show(&match &verdict {
        Answer::Pass => format!(
            "every byte is right after {} steps, {} forks and {} moves",
            complete["step"], complete["forks"], complete["remaps"]
        ),
        Answer::Fail(reason) => format!("it finds: {reason}"),
    });

    let grew =
        |name: &str, earlier: &Value, later: &Value| later[name].as_u64() > earlier[name].as_u64();
    let elapsed = started.elapsed();
    let in_time = memory > TIMED_MEMORY_MAX || elapsed < ELAPSED_MAX;
    let checks = [
        (
            "moved",
            before["host"] != after["host"]
                && before["network_namespace"] != after["network_namespace"],
        ),
        ("same_process", before["pid"] == after["pid"]),
        (
            "steps_went_on",
            grew("step", &before, &after) && grew("step", &after, &complete),
        ),
        ("forked_after_the_move", grew("forks", &before, &complete)),
        (
            "remapped_after_the_move",
            grew("remaps", &before, &complete),
        ),
        ("memory_right", right),
        (
            "faulted_over_the_network",
            ledger.pages_faulted > FAULTS_MIN,
        ),
        (
            "little_resident_at_run",
            ledger.pages_resident_at_run <= RESIDENT_AT_RUN_MAX,
        ),
        ("source_is_gone", pair.a.process(workload.pid).is_none()),
        ("in_time", in_time),
    ];
    let ok = checks.iter().all(|(_, holds)| *holds);
    if as_json {
        for line in source
            .stdout
            .lines()
            .chain(target.stdout.lines())
            .filter(|line| line.contains("\"ledger\""))
        {
            println!("{line}");
        }
        for line in [&before, &after, &complete] {
            println!("{}", json!({"type": "workload", "data": line}));
        }
        let checks: serde_json::Map<String, Value> = checks
            .iter()
            .map(|(name, holds)| ((*name).to_owned(), json!(holds)))
            .collect();
        println!(
            "{}",
            json!({"type": "demo", "data": {"ok": ok, "memory_bytes": memory, "elapsed_ms": elapsed.as_secs_f64() * 1e3, "checks": checks}})
        );
    }
    for (name, holds) in checks {
        if !holds {
            show(&format!("not as promised: {}", name.replace('_', " ")));
        }
    }
    if !in_time {
        show(&format!(
            "it took {:.1} s; {} MiB are promised in less than {} s",
            elapsed.as_secs_f64(),
            memory >> 20,
            ELAPSED_MAX.as_secs()
        ));
    }
    if ok {
        workload.end(&pair.b);
        show("done");
    }
    ok
}

/// What the workload itself said last about where it is.
fn told(workload: &Subject, when: &str) -> Value {
    eventually(&format!("the workload to say where it is ({when})"), || {
        workload
            .lines()
            .iter()
            .rev()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .map(|mut line| line["data"].take())
            .find(|data| data["when"] == when)
    })
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or("?")
}
