//! What can fail does fail here, call by call and kill by kill. Before COMMIT the source runs on exactly as it was and the
//! target is as it was; after it exactly one copy runs, or none, and the exit code says so.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::ferry::{Drain, Event, Ferry, Finished, Running, SILENCE_MS};
use crate::hosts::{Before, Clocks, Host, Pair, Process, eventually, skip};
use crate::subject::{Answer, ORDINARY, Subject};

/// What the two ends may take for their last words, at most.
const LAST_WORD: Duration = Duration::from_secs(5);

/// Which side's calls are made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    Target,
}

/// How a crossing ended.
struct Ended {
    source: Finished,
    target: Finished,
}

/// One crossing from A to B in which the n-th call of one side fails or kills it.
#[track_caller]
fn crossing_with(
    ferry: &Ferry<'_>,
    pid: i32,
    side: Side,
    fault: &str,
    calls: Option<&Path>,
) -> Ended {
    let mut ferry = ferry.clone();
    let mut environment = vec![("PAGEFERRY_FAULT", fault.to_owned())];
    if let Some(path) = calls {
        environment.push(("PAGEFERRY_CALLS", path.display().to_string()));
    }
    environment.retain(|(_, value)| !value.is_empty());
    ferry.shorten_silence();
    match side {
        Side::Source => ferry.migrate_environment.extend(environment),
        Side::Target => ferry.receive_environment.extend(environment),
    }
    let mut receive = ferry.receive(Drain::On);
    let source = ferry.migrate(pid).wait();
    // A source that failed before it spoke leaves the target waiting for somebody else.
    let has_spoken = source
        .events
        .iter()
        .any(|event| matches!(event, Event::Phase(phase) if phase.phase == "plan"));
    let last_word = match source.code {
        Some(0) => LAST_WORD * 2,
        _ if has_spoken => Duration::from_millis(300),
        _ => Duration::ZERO,
    };
    let patience = Instant::now();
    while receive.runs() && patience.elapsed() < last_word {
        std::thread::sleep(Duration::from_millis(5));
    }
    if receive.runs() {
        receive.signal(ferry.target, Signal::SIGTERM);
    }
    // A source that was killed after RUN is missed only when it has been silent for long: nobody waits for that here, and
    // the program ends with those who give it pages.
    let patience = std::time::Instant::now();
    while receive.runs() && patience.elapsed() < Duration::from_secs(2) {
        std::thread::sleep(Duration::from_millis(5));
    }
    if receive.runs() && matches!(source.code, None | Some(5 | 6)) {
        for process in ferry.target.processes() {
            if process.name.starts_with("pageferry") {
                process.signal(Signal::SIGKILL);
            }
        }
        eventually("the target to be empty", || {
            ferry.target.processes().is_empty().then_some(())
        });
    }
    Ended {
        source,
        target: receive.wait(),
    }
}

/// True when the copy on this host runs, and not only until it has looked into its queue: one that was let go with a SIGSTOP
/// waiting is on its way to that, in the kernel, for as long as it takes the scheduler to get there.
fn goes_on(subject: &Subject, host: &Host) -> bool {
    let beats = subject.heartbeat(host);
    let started = Instant::now();
    while subject.runs_on(host) {
        if subject.heartbeat(host) != beats || started.elapsed() > Duration::from_secs(2) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

/// The promise itself, whatever happened: at most one copy executes instructions. Gives the host it runs on.
#[track_caller]
fn one_copy<'a>(pair: &'a Pair, subject: &mut Subject, what: &str) -> Option<&'a Host> {
    let running: Vec<&Host> = [&pair.a, &pair.b]
        .into_iter()
        .filter(|host| goes_on(subject, host))
        .collect();
    assert!(running.len() <= 1, "{what}: two copies run");
    for host in [&pair.a, &pair.b] {
        if !running.iter().any(|other| other.name == host.name) {
            eventually(
                &format!("{what}: no part of it to run on {}", host.name),
                || {
                    let mut family = family(host).into_iter();
                    let runs = |process: Process| matches!(process.state, 'R' | 'S' | 'D');
                    (!family.any(runs)).then_some(())
                },
            );
        }
    }
    let host = *running.first()?;
    assert_eq!(subject.ask(), Answer::Pass, "{what}, on {}", host.name);
    Some(host)
}

/// After a failure before COMMIT: on A, untouched; B as it was.
#[track_caller]
fn assert_rolled_back(
    pair: &Pair,
    before: &Before,
    subject: &mut Subject,
    what: &str,
    ended: &Ended,
) {
    let details = || {
        format!(
            "{what}\nsource: {:#?}\ntarget: {:#?}",
            ended.source, ended.target
        )
    };
    assert!(
        subject.runs_on(&pair.a),
        "it does not run on A: {}",
        details()
    );
    assert_eq!(subject.ask(), Answer::Pass, "{}", details());
    let copy = subject.copy_on(&pair.a).expect("it runs");
    assert_eq!(copy.tracer(), Some(0), "still traced: {}", details());
    before.assert_nothing_left_but(pair, subject.pid, what);
}

/// Calls per kind, as `PAGEFERRY_CALLS` writes them.
fn read_calls(path: &Path) -> Vec<(String, u64)> {
    let text =
        fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.lines()
        .map(|line| {
            let (kind, count) = line.split_once(' ').expect("a kind and a count");
            (
                kind.to_owned(),
                count.trim().parse().expect("a count is a number"),
            )
        })
        .collect()
}

/// So many runs in a row that were not disturbed say that there are no more calls at which one could be.
const UNDISTURBED: u32 = 20;

/// Whom a loop is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subjects {
    /// One process, with the machine to itself.
    Alone,
    /// One process beside others: a dozen that never rest would leave nothing for the crossings.
    Beside,
    /// A tree of processes beside others, with shared memory, files without a name and messages.
    Families,
}

impl Subjects {
    /// The subject's arguments.
    fn arguments(self, verb: &str) -> [String; 2] {
        let words = match self {
            Self::Alone => "",
            Self::Beside => "rests",
            Self::Families => "rests,family",
        };
        // A killed pageferry leaves the agent's mapping behind until the next attempt, and nothing else.
        let words = match verb {
            "kill" => format!("agent-may-stay,{words}"),
            _ => words.to_owned(),
        };
        ["2".to_owned(), words]
    }

    /// A subject on A that fails its own test when anything about it is touched.
    #[track_caller]
    fn fresh(self, pair: &Pair, verb: &str) -> Subject {
        let arguments = self.arguments(verb);
        let arguments = arguments.each_ref().map(String::as_str);
        let mut subject = Subject::start(pair, &pair.a, "steadfast", ORDINARY, &arguments)
            .expect("it needs nothing");
        subject.must_pass("undisturbed");
        subject
    }

    /// Whether a mapping of an agent is left in any of its processes on A.
    fn hold_an_agent(self, pair: &Pair) -> bool {
        // Its shared memory looks the same.
        let own = usize::from(self == Self::Families);
        family(&pair.a).iter().any(|process| {
            let maps = fs::read_to_string(process.proc("maps")).unwrap_or_default();
            maps.matches("/dev/zero (deleted)").count() > own
        })
    }
}

/// The processes of the subject on this host.
fn family(host: &Host) -> Vec<Process> {
    let mut all = host.processes();
    all.retain(|process| process.name == "steadfast");
    all
}

/// The subject ends by itself, and all of it.
#[track_caller]
fn end(pair: &Pair, subject: Subject, host: &Host) {
    subject.end(host);
    all_gone(pair);
}

#[track_caller]
fn all_gone(pair: &Pair) {
    eventually("all of the subject to be gone", || {
        (family(&pair.a).is_empty() && family(&pair.b).is_empty()).then_some(())
    });
}

/// Makes call 1, 2, 3… of one side fail until a run passes; `steps` chooses which of them are tried.
/// There are `total` calls in an undisturbed crossing.
#[track_caller]
fn anomaly_loop(side: Side, verb: &str, subjects: Subjects, total: u64, steps: &[u64]) {
    let pair = Pair::new(Clocks::Behind);
    let ferry = Ferry::new(&pair);
    let mut subject = subjects.fresh(&pair, verb);
    let mut before = Before::of(&pair);
    let mut passed = None;
    let mut in_a_row = 0;
    let mut tried = 0;
    let mut left = 0;
    for &n in steps {
        let fault = format!("{verb}:{n}");
        println!("{side:?}: {fault}");
        let ended = crossing_with(&ferry, subject.pid, side, &fault, None);
        tried += 1;
        if ended.source.code == Some(0) {
            // Either there is no n-th call, or it was one that may fail: in both cases it must have moved whole.
            assert_eq!(
                one_copy(&pair, &mut subject, &fault).map(|host| host.name),
                Some("B"),
                "{fault}"
            );
            ferry.back().cross(subject.pid);
            assert!(subject.runs_on(&pair.a), "{fault}: it does not come back");
            // It has been elsewhere: what it compares itself with (its own maps) may have merged or split. A fresh one.
            end(&pair, subject, &pair.a);
            subject = subjects.fresh(&pair, verb);
            before = Before::of(&pair);
            passed = Some(n);
            in_a_row += 1;
            if n > total || in_a_row == UNDISTURBED {
                break;
            }
            continue;
        }
        in_a_row = 0;
        // Ready, the target had promised to answer a COMMIT, and keeps what it says of that until it knows that the source has heard
        // it: a killed one never has, and another may take long on a busy machine.
        if ended.target.stderr.contains("what was decided lies in") {
            fs::remove_dir_all(pair.b.outside("/run/pageferry")).expect("it says so");
        }
        match (
            ended.source.code,
            one_copy(&pair, &mut subject, &fault).map(|host| host.name),
        ) {
            // Failed before COMMIT; 3 is what the look at the host says.
            (Some(1 | 3 | 7), Some("A")) if verb == "fail" => {
                assert_rolled_back(&pair, &before, &mut subject, &fault, &ended)
            }
            // Killed before COMMIT: 1 is what the front says of a killed engine; killed itself, it has no code.
            // 3 if it was the child that tries what the host can do.
            (None | Some(1 | 3), Some("A")) if verb == "kill" => {
                assert_rolled_back(&pair, &before, &mut subject, &fault, &ended);
                // What may be left in it is named and no obstacle to another attempt.
                let is_left = subjects.hold_an_agent(&pair);
                left += u64::from(is_left);
                let (again, _) = ferry.cross(subject.pid);
                assert_eq!(
                    again
                        .stderr
                        .contains("found what an interrupted attempt left"),
                    is_left,
                    "{fault}: {again:?}"
                );
                assert_eq!(
                    one_copy(&pair, &mut subject, &fault).map(|host| host.name),
                    Some("B"),
                    "{fault}, and once more"
                );
                ferry.back().cross(subject.pid);
                end(&pair, subject, &pair.a);
                subject = subjects.fresh(&pair, verb);
                before = Before::of(&pair);
            }
            // Lost or undecided after COMMIT: the source copy must not run, and the code says so.
            (Some(5 | 6), None | Some("B")) => {
                println!("{fault}: exit {:?} after COMMIT", ended.source.code);
                for host in [&pair.a, &pair.b] {
                    pair.leaves(host, "file /run/pageferry/");
                }
                for host in [&pair.a, &pair.b] {
                    if let Some(copy) = subject.copy_on(host) {
                        copy.signal(Signal::SIGKILL);
                    }
                }
                all_gone(&pair);
                subject = subjects.fresh(&pair, verb);
                before = Before::of(&pair);
            }
            (code, place) => panic!(
                "{fault}: exit {code:?} while it runs on {place:?}\nsource: {:#?}\ntarget: {:#?}",
                ended.source, ended.target
            ),
        }
    }
    println!("{side:?}: {tried} of {total} calls were made to {verb}; a run passed at {passed:?}");
    assert!(
        passed.is_some(),
        "no run passed: there are calls beyond the last that was tried"
    );
    println!("{side:?}: {left} times an agent's mapping was left");
    assert!(
        left > 0 || (side, verb) != (Side::Source, "kill"),
        "no kill hit a planted agent: choose other calls"
    );
    end(&pair, subject, &pair.a);
}

/// Crossings of a twin that may be made to count the calls. Chance only adds calls: a retry of the freeze, a page that is
/// touched before it came. So the fewest of all say what there are, and the most of a few cannot be below that.
const COUNTED_CROSSINGS: usize = 6;

fn sum(calls: &[(String, u64)]) -> u64 {
    calls.iter().map(|(_, count)| count).sum()
}

/// How many calls one undisturbed crossing makes.
///
/// `tests/choke-floor.txt` holds what passed the choke point when it was last looked at: code that goes round the choke
/// point would no longer be tested here, so fewer calls are a failure. More are welcome; write them down with
/// `PAGEFERRY_CHOKE_FLOOR=write`.
#[track_caller]
fn counted_calls(side: Side) -> u64 {
    let pair = &Pair::new(Clocks::Behind);
    let ferry = &Ferry::new(pair);
    let count = || {
        let twin =
            Subject::start(pair, &pair.a, "threads", ORDINARY, &[]).expect("it needs nothing");
        let path = pair.path("calls");
        let undisturbed = crossing_with(ferry, twin.pid, side, "", Some(&path));
        assert_eq!(
            (undisturbed.source.code, undisturbed.target.code),
            (Some(0), Some(0)),
            "source: {:#?}\ntarget: {:#?}",
            undisturbed.source,
            undisturbed.target
        );
        twin.end(&pair.b);
        let calls = read_calls(&path);
        fs::remove_file(path).expect("it was just read");
        println!("{side:?}: calls through the choke point: {calls:?}");
        calls
    };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/choke-floor.txt");
    let mine = format!("{side:?} ").to_lowercase();
    let text = fs::read_to_string(&path).expect("the project holds it");
    if std::env::var("PAGEFERRY_CHOKE_FLOOR").is_ok_and(|value| value == "write") {
        let mut fewest = count();
        for _ in 1..COUNTED_CROSSINGS {
            for ((_, fewest), (_, now)) in fewest.iter_mut().zip(count()) {
                *fewest = now.min(*fewest);
            }
        }
        let mut lines: Vec<String> = text
            .lines()
            .filter(|line| !line.starts_with(&mine))
            .map(str::to_owned)
            .collect();
        lines.extend(
            fewest
                .iter()
                .filter(|(_, count)| *count > 0)
                .map(|(kind, count)| format!("{mine}{kind} {count}")),
        );
        fs::write(&path, lines.join("\n") + "\n").expect("the project can be written");
        return sum(&fewest);
    }
    let floors: Vec<(&str, u64)> = text
        .lines()
        .filter_map(|line| line.strip_prefix(&mine)?.split_once(' '))
        .map(|(kind, floor)| (kind, floor.trim().parse().expect("a count is a number")))
        .collect();
    assert!(!floors.is_empty(), "{side:?}: the floor names no calls");
    let mut most = count();
    let below = |calls: &[(String, u64)]| {
        floors.iter().copied().find(|(kind, floor)| {
            calls
                .iter()
                .find(|(name, _)| name == kind)
                .is_none_or(|(_, count)| count < floor)
        })
    };
    for _ in 1..COUNTED_CROSSINGS {
        if below(&most).is_none() {
            break;
        }
        for ((_, most), (_, now)) in most.iter_mut().zip(count()) {
            *most = now.max(*most);
        }
    }
    if let Some((kind, floor)) = below(&most) {
        panic!(
            "{side:?}: of {kind} calls {floor} passed the choke point before, and now fewer: {most:?}"
        );
    }
    sum(&most)
}

/// A spread of about `count` numbers over 1..=total, dense at the beginning, and one beyond the end.
fn spread(total: u64, count: u64) -> Vec<u64> {
    let mut numbers: Vec<u64> = (1..=5)
        .chain((1..=count).map(|i| i * (total / 2) / count))
        .filter(|n| *n > 0)
        .collect();
    numbers.sort_unstable();
    numbers.dedup();
    numbers.push(total + 1000);
    numbers
}

/// About `count` numbers all over 1..=total, and one beyond the end for each loop.
fn spread_with_ends(total: u64, count: u64) -> Vec<u64> {
    let step = (total / count).max(1);
    let within = (1..=total).step_by(usize::try_from(step).expect("it is small"));
    within
        .chain(total + 1001..=total + 1000 + LOOPS as u64)
        .collect()
}

#[test]
fn a_failing_call_on_the_source_leaves_the_program_as_it_was() {
    at_some_calls(Side::Source, "fail", 25);
}

#[test]
fn a_failing_call_on_the_target_leaves_the_program_as_it_was() {
    at_some_calls(Side::Target, "fail", 25);
}

#[test]
fn a_source_killed_at_any_call_leaves_one_copy_at_most() {
    at_some_calls(Side::Source, "kill", 15);
}

#[test]
fn a_target_killed_at_any_call_leaves_one_copy_at_most() {
    at_some_calls(Side::Target, "kill", 15);
}

/// One loop over a selection: few more than `count`.
#[track_caller]
fn at_some_calls(side: Side, verb: &str, count: u64) {
    if skip().is_some() {
        return;
    }
    let total = counted_calls(side);
    let mut numbers = spread(total * 2, count);
    if (side, verb) == (Side::Source, "kill") {
        // More of them where the agent is planted, which is early.
        numbers.extend((1..=16).map(|i| i * (total / 4) / 16));
        numbers.sort_unstable();
        numbers.dedup();
    }
    anomaly_loop(side, verb, Subjects::Alone, total, &numbers);
}

/// Every number up to well beyond the last call, or, to see a failure again, those of `PAGEFERRY_TEST_CALLS=FIRST-LAST`.
fn every_one(total: u64) -> Vec<u64> {
    let Ok(range) = std::env::var("PAGEFERRY_TEST_CALLS") else {
        return (1..=total + 1000).collect();
    };
    let (first, last) = range.split_once('-').expect("FIRST-LAST");
    let number = |text: &str| text.parse().expect("a number");
    // Beyond the last there is one for each loop, which none disturbs.
    let beyond = total + 1..=total + LOOPS as u64;
    (number(first)..=number(last)).chain(beyond).collect()
}

/// Loops over every call, each with hosts and a program of its own, that share the numbers among them: they wait more than they
/// work.
const LOOPS: usize = 6;

fn at_every_call(side: Side, verb: &'static str) {
    if skip().is_some() {
        return;
    }
    let total = counted_calls(side);
    in_loops(&every_one(total), |steps| {
        anomaly_loop(side, verb, Subjects::Beside, total, steps);
    });
}

/// Shares the numbers among the loops.
fn in_loops(numbers: &[u64], run: impl Fn(&[u64]) + Sync) {
    std::thread::scope(|scope| {
        for first in 0..LOOPS {
            let mine = numbers.iter().copied().skip(first).step_by(LOOPS);
            let (mine, run) = (mine.collect::<Vec<u64>>(), &run);
            scope.spawn(move || run(&mine));
        }
    });
}

#[test]
#[ignore = "long: every single call"]
fn every_single_call_on_the_source_may_fail() {
    at_every_call(Side::Source, "fail");
}

#[test]
#[ignore = "long: every single call"]
fn every_single_call_on_the_target_may_fail() {
    at_every_call(Side::Target, "fail");
}

#[test]
#[ignore = "long: a kill at every single call"]
fn every_single_call_on_the_source_may_be_the_last() {
    at_every_call(Side::Source, "kill");
}

#[test]
#[ignore = "long: a kill at every single call"]
fn every_single_call_on_the_target_may_be_the_last() {
    at_every_call(Side::Target, "kill");
}

/// How many calls one crossing of such a subject makes.
#[track_caller]
fn calls_of(subjects: Subjects, side: Side) -> u64 {
    let pair = Pair::new(Clocks::Behind);
    let ferry = Ferry::new(&pair);
    let subject = subjects.fresh(&pair, "fail");
    let path = pair.path("calls");
    let ended = crossing_with(&ferry, subject.pid, side, "", Some(&path));
    assert_eq!((ended.source.code, ended.target.code), (Some(0), Some(0)));
    end(&pair, subject, &pair.b);
    sum(&read_calls(&path))
}

/// A tree that shares much makes several times the calls of one process, most of them the same again and again: a selection.
fn at_many_calls_of_a_tree(side: Side, verb: &'static str) {
    if skip().is_some() {
        return;
    }
    let total = calls_of(Subjects::Families, side);
    in_loops(&spread_with_ends(total, 240), |steps| {
        anomaly_loop(side, verb, Subjects::Families, total, steps);
    });
}

#[test]
#[ignore = "long: many calls"]
fn many_calls_on_the_source_of_a_tree_may_fail() {
    at_many_calls_of_a_tree(Side::Source, "fail");
}

#[test]
#[ignore = "long: many calls"]
fn many_calls_on_the_target_of_a_tree_may_fail() {
    at_many_calls_of_a_tree(Side::Target, "fail");
}

#[test]
#[ignore = "long: a kill at many calls"]
fn many_calls_on_the_source_of_a_tree_may_be_the_last() {
    at_many_calls_of_a_tree(Side::Source, "kill");
}

#[test]
#[ignore = "long: a kill at many calls"]
fn many_calls_on_the_target_of_a_tree_may_be_the_last() {
    at_many_calls_of_a_tree(Side::Target, "kill");
}

/// What was made of the calls of one verb.
#[derive(Debug, Default)]
struct Tally {
    undisturbed: u32,
    ended: u32,
}

/// Dumps of a tree in which a call fails or kills. Before the image is complete the tree runs on, and no image has the name;
/// afterwards the image can be restored, and the root runs with all the others or not at all.
#[track_caller]
fn dump_loop(verb: &str, steps: &[u64]) -> Tally {
    let subjects = Subjects::Families;
    let pair = Pair::new(Clocks::Behind);
    let undisturbed = Ferry::new(&pair);
    let mut subject = subjects.fresh(&pair, verb);
    let mut before = Before::of(&pair);
    let image = pair.path("image");
    let mut tally = Tally::default();
    let mut in_a_row = 0;
    for (turn, &n) in steps.iter().enumerate() {
        let fault = format!("{verb}:{n}");
        println!("dump: {fault}");
        let mut ferry = undisturbed.clone();
        ferry.migrate_environment = vec![("PAGEFERRY_FAULT", fault.clone())];
        let stays = turn % 2 == 0;
        let options: &[&str] = if stays { &["--leave-running"] } else { &[] };
        let finished = ferry.dump(subject.pid, &image, options);
        let is_complete = image.exists();
        if finished.code == Some(0) {
            assert!(is_complete, "{fault}: no image");
            tally.undisturbed += 1;
            in_a_row += 1;
        } else {
            tally.ended += 1;
            in_a_row = 0;
            assert!(
                matches!(
                    (verb, finished.code),
                    ("fail", Some(1 | 3 | 6 | 7)) | ("kill", None | Some(3))
                ),
                "{fault}: {finished:?}"
            );
        }
        let runs = subject.runs_on(&pair.a);
        if runs {
            assert!(stays || finished.code != Some(0), "{fault}: {finished:?}");
            assert_eq!(subject.ask(), Answer::Pass, "{fault}: {finished:?}");
            for process in family(&pair.a) {
                assert_eq!(
                    process.tracer(),
                    Some(0),
                    "{fault}: still traced: {finished:?}"
                );
            }
        } else {
            // A kill between two stops, or two ends, leaves a part of the tree as it was.
            assert!(is_complete && !stays, "{fault}: {finished:?}");
            for process in family(&pair.a) {
                process.signal(Signal::SIGKILL);
            }
            all_gone(&pair);
        }
        if verb == "fail" && finished.code != Some(3) {
            let said = finished.code == Some(0) || finished.stderr.contains("runs on") == runs;
            assert!(said, "{fault}: {finished:?}");
        }
        // A kill leaves what it had written, under no name of its own.
        for entry in fs::read_dir(&pair.shared).expect("it is there").flatten() {
            if entry
                .file_name()
                .to_string_lossy()
                .starts_with(".unfinished")
            {
                assert!(verb == "kill" && !is_complete, "{fault}: {entry:?}");
                fs::remove_dir_all(entry.path()).expect("it is ours");
            }
        }
        if is_complete {
            if !runs {
                undisturbed
                    .restore(&image, &["--detach"])
                    .wait()
                    .must_exit(0);
                subject.must_pass(&format!("{fault}, restored"));
                end(&pair, subject, &pair.a);
                subject = subjects.fresh(&pair, verb);
                before = Before::of(&pair);
            }
            fs::remove_dir_all(&image).expect("it was dumped there");
        }
        before.assert_nothing_left_but(&pair, subject.pid, &fault);
        if in_a_row == UNDISTURBED {
            break;
        }
    }
    end(&pair, subject, &pair.a);
    tally
}

/// Restores of a tree in which a call fails or kills: nothing is left of it, and the image serves again.
#[track_caller]
fn restore_loop(verb: &str, steps: &[u64]) -> Tally {
    let pair = Pair::new(Clocks::Behind);
    let undisturbed = Ferry::new(&pair);
    let mut subject = Subjects::Families.fresh(&pair, verb);
    let image = pair.path("image");
    undisturbed.dump(subject.pid, &image, &[]).must_exit(0);
    all_gone(&pair);
    let before = Before::of(&pair);
    let mut tally = Tally::default();
    let mut in_a_row = 0;
    for (turn, &n) in steps.iter().enumerate() {
        let fault = format!("{verb}:{n}");
        println!("restore: {fault}");
        let mut ferry = undisturbed.clone();
        ferry.migrate_environment = vec![("PAGEFERRY_FAULT", fault.clone())];
        let options: &[&str] = if turn % 2 == 0 {
            &["--detach"]
        } else {
            &["--detach", "--lazy"]
        };
        let finished = ferry.restore(&image, options).wait();
        if finished.code == Some(0) {
            subject.must_pass(&fault);
            subject.end_copy(&pair.a);
            tally.undisturbed += 1;
            in_a_row += 1;
        } else {
            tally.ended += 1;
            in_a_row = 0;
            // 5: it ran, and was ended since not all of its pages had come.
            assert!(
                matches!(
                    (verb, finished.code),
                    (_, Some(1 | 3 | 5)) | ("fail", Some(7)) | ("kill", None)
                ),
                "{fault}: {finished:?}"
            );
        }
        all_gone(&pair);
        before.assert_nothing_left_but(&pair, 0, &fault);
        if in_a_row == UNDISTURBED {
            break;
        }
    }
    tally
}

/// Numbers for the slim loops over dump and restore.
const SOME_CALLS: [u64; 14] = [1, 2, 3, 8, 30, 90, 180, 300, 420, 540, 700, 900, 1200, 2000];

/// A loop over the calls of one verb.
type Loop = fn(&str, &[u64]) -> Tally;

#[track_caller]
fn at_some_calls_of(run: Loop) {
    if skip().is_some() {
        return;
    }
    for verb in ["fail", "kill"] {
        let tally = run(verb, &SOME_CALLS);
        assert!(tally.ended > 4, "{verb}: {tally:?}");
    }
}

/// About 300 of them. Each loop goes beyond the last.
#[track_caller]
fn at_many_calls_of(run: Loop, total: u64) {
    if skip().is_some() {
        return;
    }
    for verb in ["fail", "kill"] {
        in_loops(&spread_with_ends(total, 300), |steps| {
            let tally = run(verb, steps);
            assert!(
                tally.ended > 4 && tally.undisturbed > 0,
                "{verb}: {tally:?}"
            );
        });
    }
}

#[test]
fn a_dump_that_fails_or_is_killed_leaves_the_tree_as_it_was() {
    at_some_calls_of(dump_loop);
}

#[test]
fn a_restore_that_fails_or_is_killed_leaves_nothing() {
    at_some_calls_of(restore_loop);
}

#[test]
#[ignore = "long: many calls"]
fn many_calls_of_a_dump_may_fail_or_be_the_last() {
    at_many_calls_of(dump_loop, 6000);
}

#[test]
#[ignore = "long: many calls"]
fn many_calls_of_a_restore_may_fail_or_be_the_last() {
    at_many_calls_of(restore_loop, 4000);
}

/// Brings a subject to the state in which it runs on B and most of its pages are still on A.
#[track_caller]
fn half_way<'a>(ferry: &Ferry<'a>, subject: &Subject) -> (Running, Running) {
    let receive = ferry.receive(Drain::Off);
    let mut migrate = ferry.migrate(subject.pid);
    migrate.wait_for_phase("drain");
    (receive, migrate)
}

/// Ends what a loss after COMMIT leaves for the operator to look at: stopped copies, and the journals.
#[track_caller]
fn lay_to_rest(pair: &Pair, subject: &Subject) {
    for host in [&pair.a, &pair.b] {
        pair.leaves(host, "file /run/pageferry/");
        if let Some(copy) = subject.copy_on(host) {
            copy.signal(Signal::SIGKILL);
        }
    }
}

/// The process that holds the frozen copy by ptrace.
fn tracer_of(copy: &Process) -> Process {
    let tid = copy
        .tracer()
        .filter(|tid| *tid != 0)
        .expect("the frozen copy is traced");
    let status = fs::read_to_string(format!("/proc/{tid}/status")).expect("the tracer lives");
    let outer = status
        .lines()
        .find_map(|line| line.strip_prefix("Tgid:"))
        .and_then(|text| text.trim().parse().ok());
    Process {
        outer: outer.expect("every task has a Tgid"),
        inner: 0,
        name: "engine".to_owned(),
        state: 'S',
    }
}

#[test]
fn a_dead_target_engine_after_run_kills_the_program_and_exits_5() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let ferry = Ferry::new(&pair);
    let subject = Subject::start(&pair, &pair.a, "memory_chain", ORDINARY, &["32"])
        .expect("it needs nothing");
    let (receive, migrate) = half_way(&ferry, &subject);
    let engine = tracer_of(&subject.copy_on(&pair.b).expect("it runs on B"));
    engine.signal(Signal::SIGKILL);
    eventually("the program on B to be killed", || {
        subject.copy_on(&pair.b).is_none().then_some(())
    });
    let (source, target) = (migrate.wait(), receive.wait());
    source.must_exit(5);
    assert_eq!(target.code, Some(5), "{target:?}");
    assert!(
        !subject.runs_on(&pair.a),
        "the source copy runs again after COMMIT"
    );
    lay_to_rest(&pair, &subject);
}

#[test]
fn a_dead_source_engine_after_commit_leaves_the_source_copy_stopped_for_good() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let ferry = Ferry::new(&pair);
    let subject = Subject::start(&pair, &pair.a, "memory_chain", ORDINARY, &["32"])
        .expect("it needs nothing");
    let (mut receive, migrate) = half_way(&ferry, &subject);
    let copy = subject.copy_on(&pair.a).expect("the frozen copy is on A");
    tracer_of(&copy).signal(Signal::SIGKILL);
    let source = migrate.wait();
    // It had heard that the process runs on the target.
    source.must_exit(5);
    let copy = subject.copy_on(&pair.a).expect("nobody has killed it");
    assert_eq!(copy.state, 'T', "it is not stopped");
    let (ticks, beats) = (copy.cpu_ticks(), subject.heartbeat(&pair.a));
    assert!(ticks.is_some() && beats.is_some());
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(
        (copy.cpu_ticks(), subject.heartbeat(&pair.a)),
        (ticks, beats),
        "the source copy has moved"
    );
    assert_eq!(subject.copy_on(&pair.a).map(|copy| copy.state), Some('T'));
    // The target's operator gives up, which counts once the target has noticed that the source is lost.
    eventually("receive to give up", || {
        receive.signal(&pair.b, Signal::SIGTERM);
        std::thread::sleep(Duration::from_millis(200));
        (!receive.runs()).then_some(())
    });
    receive.wait().must_exit(5);
    lay_to_rest(&pair, &subject);
}

/// The OOM killer, or a service manager: the page tables of a dead process look like those of one that has only zeros.
#[test]
fn a_source_copy_that_somebody_kills_is_lost_and_never_read_as_zeros() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let ferry = Ferry::new(&pair);
    let mut subject = Subject::start(&pair, &pair.a, "memory_chain", ORDINARY, &["32"])
        .expect("it needs nothing");
    let (mut receive, migrate) = half_way(&ferry, &subject);
    let copy = subject.copy_on(&pair.a).expect("the frozen copy is on A");
    copy.signal(Signal::SIGKILL);
    let said = subject.lines().len();
    subject.ask_only();
    // The first page that is asked for tells.
    migrate.wait().must_exit(5);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(
        subject.lines().len(),
        said,
        "it went on without its pages: {:?}",
        subject.lines()
    );
    assert!(
        subject.copy_on(&pair.b).is_some(),
        "it waits until its operator gives up"
    );
    let started = Instant::now();
    while receive.runs() && started.elapsed() < Duration::from_secs(20) {
        receive.signal(&pair.b, Signal::SIGTERM);
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(receive.wait().code, Some(5));
    assert!(subject.copy_on(&pair.b).is_none());
    lay_to_rest(&pair, &subject);
}

/// Whether COMMIT stands in the journal of a migration that nobody on the source is left to settle. Takes the journal away.
fn commit_was_recorded(host: &Host) -> bool {
    let folder = host.outside("/run/pageferry");
    let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
    let journals: Vec<_> = entries
        .filter(|entry| entry.file_name().to_string_lossy().ends_with(".source"))
        .map(|entry| fs::read_to_string(entry.path()).expect("a journal is text"))
        .collect();
    let _ = fs::remove_dir_all(folder);
    assert!(journals.len() <= 1, "{journals:?}");
    journals
        .iter()
        .any(|journal| journal.lines().any(|line| line == "commit"))
}

/// The case the keeper is for: PARK is recorded, the SIGSTOP waits in the queue of the process or is just about to be sent, COMMIT
/// is not recorded, and the engine dies.
#[test]
fn the_keeper_lets_the_program_run_on_when_its_engine_dies_between_park_and_commit() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let mut subject =
        Subject::start(&pair, &pair.a, "steadfast", ORDINARY, &["4"]).expect("it needs nothing");
    for fault in ["kill:park:1", "kill:park:2"] {
        let mut ferry = Ferry::new(&pair);
        ferry.shorten_silence();
        ferry
            .migrate_environment
            .push(("PAGEFERRY_FAULT", fault.to_owned()));
        let receive = ferry.receive(Drain::On);
        let source = ferry.migrate(subject.pid).wait();
        source.must_exit(1);
        assert!(
            source.stderr.contains("runs on here, as before"),
            "{fault}: {source:?}"
        );
        subject.must_pass(fault);
        assert!(subject.runs_on(&pair.a), "{fault}");
        receive.wait().must_exit(1);
    }
    // The target has taken its promise back, and cannot know that the source need not ask.
    pair.leaves(&pair.b, "file /run/pageferry/");
    subject.end(&pair.a);
}

/// Every process of pageferry on the source killed at once, at times spread over a whole crossing.
#[test]
fn the_program_survives_sigkill_of_everything_on_the_source_before_commit() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::FarAhead);
    let ferry = Ferry::new(&pair);
    // Whoever is killed leaves its journal.
    for host in [&pair.a, &pair.b] {
        pair.leaves(host, "file /run/pageferry/");
    }
    for delay_ms in [0, 10, 20, 35, 50, 65, 80, 100, 130, 170, 250] {
        let mut subject = Subject::start(
            &pair,
            &pair.a,
            "steadfast",
            ORDINARY,
            &["4", "agent-may-stay"],
        )
        .expect("it needs nothing");
        let mut receive = ferry.receive(Drain::Off);
        let mut migrate = ferry.migrate(subject.pid);
        std::thread::sleep(Duration::from_millis(delay_ms));
        // Again and again: at first there may be nobody yet.
        while migrate.runs() {
            for process in pair.a.processes() {
                if process.name.starts_with("pageferry") {
                    process.signal(Signal::SIGKILL);
                }
            }
        }
        let _ = migrate.wait();
        // What the target makes of it is decided within the life of its connection.
        std::thread::sleep(Duration::from_millis(200));
        let what = format!("everything on the source killed after {delay_ms} ms");
        let survives = subject.runs_on(&pair.a);
        let commit_was_recorded = commit_was_recorded(&pair.a);
        if survives {
            assert_eq!(
                one_copy(&pair, &mut subject, &what).map(|host| host.name),
                Some("A")
            );
        } else {
            let copy = subject
                .copy_on(&pair.a)
                .expect("nobody kills the source copy");
            assert!(
                matches!(copy.state, 'T' | 't'),
                "{what}: the source copy is in state {}",
                copy.state
            );
            assert!(commit_was_recorded, "{what}: it is stopped before COMMIT");
        }
        if !survives {
            for host in [&pair.a, &pair.b] {
                if let Some(copy) = host.process(subject.pid) {
                    copy.signal(Signal::SIGKILL);
                }
            }
        }
        receive.signal(&pair.b, Signal::SIGTERM);
        let started = Instant::now();
        while receive.runs() && started.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(20));
        }
        for process in pair.b.processes() {
            process.signal(Signal::SIGKILL);
        }
        drop(receive);
        eventually("B to be empty", || {
            pair.b.processes().is_empty().then_some(())
        });
        if survives {
            // Undisturbed, it crosses.
            ferry.cross(subject.pid);
            assert_eq!(
                one_copy(&pair, &mut subject, &what).map(|host| host.name),
                Some("B"),
                "{what}, and once more"
            );
            subject.end(&pair.b);
        }
    }
}

#[test]
fn ctrl_c_before_commit_aborts_and_the_program_runs_on() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let ferry = Ferry::new(&pair);
    let mut subject =
        Subject::start(&pair, &pair.a, "steadfast", ORDINARY, &["2"]).expect("it needs nothing");
    // Its packets vanish: it waits for the connection when the signal comes.
    let drop = "nft add table inet hole && nft add chain inet hole input '{ type filter hook input priority 0; policy drop; }'";
    pair.b.must("sh", &["-c", drop]);
    let migrate = ferry.migrate(subject.pid);
    std::thread::sleep(Duration::from_millis(300));
    migrate.signal(&pair.a, Signal::SIGINT);
    let finished = migrate.wait();
    assert_eq!(finished.code, Some(130), "{finished:?}");
    pair.b.must("nft", &["delete", "table", "inet", "hole"]);
    subject.must_pass("after Ctrl-C");
    subject.end(&pair.a);
}

#[test]
fn a_target_that_is_not_there_is_exit_1() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let ferry = Ferry::new(&pair);
    let mut subject =
        Subject::start(&pair, &pair.a, "steadfast", ORDINARY, &["2"]).expect("it needs nothing");
    ferry.migrate(subject.pid).wait().must_exit(1);
    subject.must_pass("after a target that was not there");
    subject.end(&pair.a);
}

/// The state is larger than what QUIC sends ahead, so that sending it waits for the target, and the process is frozen.
#[test]
fn a_target_that_falls_silent_in_the_freeze_is_given_up_and_the_program_runs_on() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let mut ferry = Ferry::new(&pair);
    ferry.shorten_silence();
    let mut subject = Subject::start(&pair, &pair.a, "private_file", ORDINARY, &["40"])
        .expect("it needs nothing");
    subject.must_pass("undisturbed");
    // After the first megabytes of the state the wire is cut, both ways.
    let cut = "nft add table inet hole && nft add quota inet hole few '{ over 4 mbytes; }' \
        && nft add chain inet hole input '{ type filter hook input priority 0; }' \
        && nft add chain inet hole output '{ type filter hook output priority 0; }' \
        && nft add rule inet hole input quota name few drop && nft add rule inet hole output quota name few drop";
    pair.b.must("sh", &["-c", cut]);
    let receive = ferry.receive(Drain::On);
    let mut migrate = ferry.migrate(subject.pid);
    migrate.wait_for_phase("capture");
    let frozen = Instant::now();
    let source = migrate.wait();
    source.must_exit(1);
    assert!(
        frozen.elapsed() < Duration::from_millis(2 * SILENCE_MS) + LAST_WORD,
        "frozen for {:?}",
        frozen.elapsed()
    );
    for part in [
        "failed in phase capture: the link to",
        &format!("pid {} runs on here, as before", subject.pid),
    ] {
        assert!(source.stderr.contains(part), "no {part:?}: {source:#?}");
    }
    receive.wait().must_exit(1);
    pair.b.must("nft", &["delete", "table", "inet", "hole"]);
    subject.must_pass("after the target fell silent");
    subject.end(&pair.a);
}

/// A target that gives up reads no more, so the source must hear why while it is still sending, not when it is left alone.
#[test]
fn a_target_that_gives_up_in_the_freeze_is_quoted_and_the_program_runs_on() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let ferry = Ferry::new(&pair);
    let mut subject = Subject::start(&pair, &pair.a, "private_file", ORDINARY, &["40"])
        .expect("it needs nothing");
    subject.must_pass("undisturbed");
    // A wire on which the state takes many seconds.
    let slow = "nft add table inet slow && nft add chain inet slow input '{ type filter hook input priority 0; }' \
        && nft add rule inet slow input udp dport 7700 limit rate over 500 kbytes/second drop";
    pair.b.must("sh", &["-c", slow]);
    let mut receive = ferry.receive(Drain::On);
    let mut migrate = ferry.migrate(subject.pid);
    migrate.wait_for_phase("capture");
    receive.wait_for_phase("rounds");
    std::thread::sleep(Duration::from_millis(300));
    assert!(migrate.runs(), "the wire is too fast");
    receive.signal(&pair.b, Signal::SIGTERM);
    let source = migrate.wait();
    source.must_exit(1);
    for part in [
        "failed in phase capture: the target gave up in phase rebuild: cancelled on the target",
        &format!("pid {} runs on here, as before", subject.pid),
    ] {
        assert!(source.stderr.contains(part), "no {part:?}: {source:#?}");
    }
    receive.wait().must_exit(143);
    pair.b.must("nft", &["delete", "table", "inet", "slow"]);
    subject.must_pass("after the target gave up");
    subject.end(&pair.a);
}

/// A program of which one thread stands in vfork(2), and the number of that thread.
#[track_caller]
fn held_in_vfork(pair: &Pair) -> (Subject, String) {
    let subject = Subject::start(pair, &pair.a, "vfork", ORDINARY, &[]).expect("it needs nothing");
    let tid = subject
        .lines()
        .iter()
        .find_map(|line| line.strip_prefix("HELD ").map(str::to_owned));
    (subject, tid.expect("it says so before READY"))
}

#[test]
fn a_thread_that_does_not_stop_is_named_and_the_program_runs_on() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let ferry = Ferry::new(&pair);
    let (mut subject, tid) = held_in_vfork(&pair);
    let receive = ferry.receive(Drain::On);
    let mut migrate = ferry.migrate(subject.pid);
    migrate.wait_for_phase("freeze");
    let began = Instant::now();
    let source = migrate.wait();
    source.must_exit(1);
    assert!(
        began.elapsed() < LAST_WORD * 2,
        "it gave up only after {:?}",
        began.elapsed()
    );
    let named = format!("thread {tid} did not stop in time (state D, system call 56");
    assert!(source.stderr.contains(&named), "no {named:?}: {source:#?}");
    receive.wait().must_exit(1);
    assert_eq!(
        subject.copy_on(&pair.a).and_then(|copy| copy.tracer()),
        Some(0)
    );
    subject.must_pass("while it is held");
    fs::write(pair.path("vfork.state.release"), "").expect("the directory is ours");
    subject.must_pass("when it is held no more");
    subject.end(&pair.a);
}

#[test]
fn a_thread_that_stops_after_some_attempts_is_waited_for() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let ferry = Ferry::new(&pair);
    let (mut subject, _) = held_in_vfork(&pair);
    let receive = ferry.receive(Drain::On);
    let mut migrate = ferry.migrate(subject.pid);
    migrate.wait_for_phase("freeze");
    std::thread::sleep(Duration::from_millis(300));
    assert!(migrate.runs(), "it gave up at once");
    fs::write(pair.path("vfork.state.release"), "").expect("the directory is ours");
    ferry.must_succeed(migrate, receive);
    assert!(subject.runs_on(&pair.b));
    subject.must_pass("on B");
    subject.end(&pair.b);
}
