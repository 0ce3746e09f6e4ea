//! Images as an operator handles them: shown, checked, listed, removed. Those of others are looked at under a filter that kills
//! whatever makes a process or a thread.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nix::sys::signal::Signal;

use crate::ferry::{Ferry, program};
use crate::hosts::{Before, Clocks, Pair, compile, eventually, skip};
use crate::subject::{ORDINARY, Subject};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// The wrapper that installs the filter.
fn no_fork() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images/no_fork.c");
    compile(&source, "no_fork", &[])
}

/// Runs pageferry under the filter, in `folder`.
fn run(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(no_fork())
        .arg(program())
        .args(arguments)
        .current_dir(folder)
        .output()
        .expect("it was compiled")
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).expect("what it prints is text")
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).expect("what it prints is text")
}

/// A folder with copies of the golden image.
fn copies(names: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for name in names {
        fs::create_dir(folder.path().join(name)).expect("names differ");
        for file in fs::read_dir(golden().join("v1")).expect("it is committed") {
            let file = file.expect("it can be read");
            let to = folder.path().join(name).join(file.file_name());
            fs::copy(file.path(), to).expect("the folder is ours");
        }
    }
    folder
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).expect("it is there");
    bytes[at] ^= 1;
    fs::write(path, bytes).expect("it is ours");
}

/// The directories in a folder.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .expect("it is there")
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn the_filter_kills_what_forks() {
    if skip().is_some() {
        return;
    }
    let status = Command::new(no_fork()).arg("fork").status();
    let status = status.expect("it was compiled");
    assert_eq!(status.signal(), Some(Signal::SIGSYS as i32), "{status:?}");
}

/// Each of the malformed images is refused with exit 4 and the sentence that was written down for it, which no other kind of
/// damage has.
#[test]
fn malformed_images_are_refused_each_with_its_own_sentence() {
    if skip().is_some() {
        return;
    }
    let folder = golden().join("malformed");
    let list = fs::read_to_string(folder.join("sentences")).expect("it is committed");
    let sentences: BTreeMap<&str, &str> = list
        .lines()
        .map(|line| line.split_once(": ").expect("name: sentence"))
        .collect();
    assert!(sentences.len() >= 30, "{} images", sentences.len());
    assert_eq!(
        names(&folder),
        sentences.keys().copied().collect::<Vec<_>>()
    );
    let mut said = BTreeMap::new();
    for (name, sentence) in &sentences {
        let output = run(&folder, &["image", "verify", name]);
        let text = stderr(&output).to_owned();
        assert_eq!(output.status.code(), Some(4), "{name}: {output:?}");
        assert!(text.contains(sentence), "{name} is refused with: {text}");
        assert!(
            text.starts_with(&format!("pageferry: {name}: ")) && text.lines().count() == 1,
            "{name} is refused with: {text}"
        );
        let text = text.replace(&format!("pageferry: {name}: "), "");
        said.entry(text).or_insert_with(Vec::new).push(*name);
        // What cannot be checked cannot be shown either, unless only pages are lost, which are not read for it.
        let output = run(&folder, &["inspect", name]);
        let is_shown = sentence.contains("is lost") || sentence.contains("belongs to no image");
        let wanted = if is_shown { 0 } else { 4 };
        assert_eq!(output.status.code(), Some(wanted), "{name}: {output:?}");
    }
    let shared: Vec<_> = said.values().filter(|names| names.len() > 1).collect();
    assert!(shared.is_empty(), "refused alike: {shared:?}");
}

/// What the first format's image holds is shown for ever as it was on the day that the format was made.
#[test]
fn the_golden_image_is_shown_as_it_was() {
    if skip().is_some() {
        return;
    }
    let output = run(&golden(), &["inspect", "--json", "v1"]);
    assert!(output.status.success(), "{output:?}");
    let wanted = fs::read_to_string(golden().join("v1.jsonl")).expect("it is committed");
    assert_eq!(stdout(&output), wanted);
    for line in wanted.lines() {
        let value: serde_json::Value = serde_json::from_str(line).expect("JSON");
        assert!(
            value["type"].is_string() && value["data"].is_object(),
            "{line}"
        );
    }
    let output = run(&golden(), &["inspect", "v1"]);
    assert!(output.status.success(), "{output:?}");
    for part in [
        "process 4711 subject: /usr/bin/subject",
        "4712 worker",
        "1 anonymous, 96.0 KiB",
        "68.0 KiB data, stored as 4.3 KiB; 8.0 KiB zero; 24.0 KiB never touched; 4.0 KiB guards",
        "3 pipe 1, read end",
    ] {
        assert!(
            stdout(&output).contains(part),
            "{part}: {}",
            stdout(&output)
        );
    }
    let output = run(&golden(), &["image", "verify", "v1"]);
    assert!(
        output.status.success() && stderr(&output).starts_with("good "),
        "{output:?}"
    );
    let output = run(&golden(), &["image", "verify", "v1", "-q"]);
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
}

#[test]
fn verify_goes_through_all_and_ends_with_the_worst() {
    if skip().is_some() {
        return;
    }
    let folder = copies(&["bad", "good"]);
    flip(&folder.path().join("bad/pages"), 9);
    let output = run(folder.path(), &["image", "verify", "bad", "good", "--json"]);
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    let lines: Vec<serde_json::Value> = stdout(&output)
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert_eq!(
        (&lines[0]["type"], &lines[0]["data"]["path"]),
        (&"bad".into(), &"bad".into())
    );
    assert_eq!(
        (&lines[1]["type"], &lines[1]["data"]["path"]),
        (&"good".into(), &"good".into())
    );
    // The host is to blame, not the image.
    let output = run(folder.path(), &["image", "verify", "nothing"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let output = run(folder.path(), &["inspect", "nothing"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    for arguments in [
        &["image", "verify"][..],
        &["image"],
        &["inspect"],
        &["image", "rm"],
    ] {
        let output = run(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
    }
}

#[test]
fn images_are_listed_and_removed_and_nothing_else_is() {
    if skip().is_some() {
        return;
    }
    let folder = copies(&["one", "two", "damaged", ".unfinished-00"]);
    let path = |name: &str| folder.path().join(name);
    flip(&path("damaged/header"), 100);
    fs::create_dir(path("mine")).expect("the name is free");
    fs::write(path("mine/header"), "of a letter").expect("the folder is ours");

    let output = run(folder.path(), &["image", "ls"]);
    assert_eq!(output.status.code(), Some(4), "one is damaged: {output:?}");
    let listed: Vec<&str> = stdout(&output)
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert_eq!(listed, ["NAME", "one", "two"]);
    assert!(
        stdout(&output).contains("4711 subject         2025-01-01 12:34:56Z    7.2 KiB alpha"),
        "{}",
        stdout(&output)
    );
    let said = stderr(&output);
    assert!(
        said.contains("damaged: `header` has the wrong checksum") && said.contains("leftover "),
        "{said}"
    );
    let output = run(folder.path(), &["image", "ls", "--json"]);
    let types: Vec<String> = stdout(&output)
        .lines()
        .map(|line| {
            let value: serde_json::Value = serde_json::from_str(line).expect("JSON");
            value["type"].as_str().expect("a type").to_owned()
        })
        .collect();
    assert_eq!(types, ["image", "image", "bad", "leftover"]);

    let output = run(
        folder.path(),
        &["image", "rm", "one", "mine", "damaged", "nothing"],
    );
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    assert_eq!(names(folder.path()), [".unfinished-00", "mine", "two"]);
    fs::write(path("two/notes"), "mine").expect("the folder is ours");
    let output = run(folder.path(), &["image", "rm", "two"]);
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    assert!(
        stderr(&output).contains("\"notes\" lies in it"),
        "{output:?}"
    );
    let output = run(folder.path(), &["image", "rm", ".unfinished-00"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(names(folder.path()), ["mine", "two"]);
}

#[test]
fn prune_keeps_what_an_option_keeps() {
    if skip().is_some() {
        return;
    }
    let folder = copies(&["a", "b", "c", "damaged"]);
    flip(&folder.path().join("damaged/header"), 100);
    let prune = |options: &[&str]| {
        let mut arguments = vec!["image", "prune", "."];
        arguments.extend(options);
        run(folder.path(), &arguments)
    };
    for wrong in [
        &[][..],
        &["--keep", "-1"],
        &["--older-than", "7"],
        &["--older-than", "d"],
    ] {
        let output = prune(wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}: {output:?}");
    }
    let all = ["a", "b", "c", "damaged"];
    // One that is damaged is said to be, and stays.
    let output = prune(&["--keep", "1", "--dry-run"]);
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    assert!(stderr(&output).contains("would remove ./b"), "{output:?}");
    assert_eq!(names(folder.path()), all);
    prune(&["--older-than", "5200w"]);
    assert_eq!(names(folder.path()), all);
    prune(&["--keep", "2", "--older-than", "0s"]);
    assert_eq!(names(folder.path()), ["a", "b", "damaged"]);
    prune(&["--older-than", "0s"]);
    assert_eq!(names(folder.path()), ["damaged"]);
}

/// One image, restored as often as one likes, beside nobody and on another host, eagerly and lazily.
#[test]
fn one_image_is_restored_many_times() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::FarAhead);
    let ferry = Ferry::new(&pair);
    let mut subject = Subject::start(&pair, &pair.a, "memory_chain", ORDINARY, &["32"])
        .expect("it needs nothing");
    let image = pair.path("image");
    let finished = ferry.dump(subject.pid, &image, &["--leave-running"]);
    finished.must_exit(0);
    subject.must_pass("left running");
    assert!(subject.runs_on(&pair.a));
    // A second dump finds the name taken, and says so before it touches anybody.
    let again = ferry.dump(subject.pid, &image, &["--leave-running"]);
    again.must_exit(1);
    assert!(
        again.stderr.contains("is never overwritten") && again.stderr.contains("runs on"),
        "{again:?}"
    );
    subject.must_pass("after a dump that was refused");
    subject.end_copy(&pair.a);
    let shared = pair.shared.display().to_string();
    for host in [ferry.clone(), ferry.back(), ferry.back(), ferry.clone()] {
        for options in [&["--detach"][..], &["--detach", "--lazy"]] {
            let mut options = options.to_vec();
            // Its state file has been written to by those that ran before.
            options.extend(["--same-file", &shared]);
            let restored = host.restore(&image, &options).wait();
            restored.must_exit(0);
            let ledger = restored.ledger();
            let is_lazy = options.contains(&"--lazy");
            assert_eq!(ledger.mode == "restore-lazy", is_lazy);
            assert!(
                ledger.pages_total > 5000
                    && (ledger.pages_resident_at_run < 1000) == is_lazy
                    && ledger.downtime_ms > 0.0
                    && (ledger.rebuild_ms + ledger.commit_ms - ledger.downtime_ms).abs() < 0.01,
                "{ledger:?}"
            );
            subject.must_pass(&format!("restored on {}", host.source.name));
            subject.end_copy(host.source);
        }
    }
}

/// What only a message holds is open in no process, and is shown all the same.
#[test]
fn what_travels_in_messages_is_shown() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let mut subject = Subject::start(&pair, &pair.a, "descriptors_in_flight", ORDINARY, &[])
        .expect("it needs nothing");
    let image = pair.path("image");
    let ferry = Ferry::new(&pair);
    let finished = ferry.dump(subject.pid, &image, &["--leave-running"]);
    finished.must_exit(0);
    subject.must_pass("left running");
    let shown = run(&pair.shared, &["inspect", "image"]);
    let text = stdout(&shown);
    for part in [
        "UNIX datagram, paired, pair 2, 13 bytes unread, 2 open files in its messages",
        "in a message: shared object memfd in flight",
        "in a message: pipe 1, read end",
        "in a message: socket UNIX stream, paired",
    ] {
        assert!(text.contains(part), "no {part} in {text}");
    }
    subject.end(&pair.a);
}

/// What somebody wrote to a file of the program since is found and named, and nothing is made.
#[test]
fn a_file_that_was_written_to_since_the_dump_is_refused_by_name() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let ferry = Ferry::new(&pair);
    let subject =
        Subject::start(&pair, &pair.a, "regular_file", ORDINARY, &[]).expect("it needs nothing");
    let image = pair.path("image");
    ferry.dump(subject.pid, &image, &[]).must_exit(0);
    let before = Before::of(&pair);
    let state = pair.path("regular_file.state.file");
    assert!(state.exists());
    fs::write(&state, "somebody else's").expect("it is there");
    let refused = ferry.restore(&image, &[]).wait();
    refused.must_exit(7);
    let named = format!("pid {} file {}: has ", subject.pid, state.display());
    assert!(
        refused
            .refusals()
            .iter()
            .any(|text| text.starts_with(&named)),
        "no {named:?}: {:?}",
        refused.refusals()
    );
    before.assert_nothing_left(&pair);
}

/// A restore stays with its process: it hands signals on and ends with its status. `--stopped` leaves it stopped until SIGCONT.
#[test]
fn a_restore_stays_with_its_process_and_ends_with_its_status() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let ferry = Ferry::new(&pair);
    let mut subject =
        Subject::start(&pair, &pair.a, "eventfds", ORDINARY, &[]).expect("it needs nothing");
    let image = pair.path("image");
    ferry.dump(subject.pid, &image, &[]).must_exit(0);
    let mut stopped = ferry.restore(&image, &["--stopped"]);
    let copy = eventually("it to be here, stopped", || {
        let copy = subject.copy_on(&pair.a)?;
        (copy.state == 'T' && copy.tracer() == Some(0)).then_some(copy)
    });
    let (ticks, beats) = (copy.cpu_ticks(), subject.heartbeat(&pair.a));
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(
        (copy.cpu_ticks(), subject.heartbeat(&pair.a)),
        (ticks, beats),
        "it runs"
    );
    assert!(stopped.runs(), "it did not stay");
    copy.signal(Signal::SIGCONT);
    subject.must_pass("continued");
    stopped.signal(&pair.a, Signal::SIGTERM);
    stopped.wait().must_exit(143);
    assert!(subject.copy_on(&pair.a).is_none(), "it was not handed on");
    let shared = pair.shared.display().to_string();
    let waiting = ferry.restore(&image, &["--same-file", &shared]);
    subject.must_pass("restored");
    subject.end_copy(&pair.a);
    waiting.wait().must_exit(0);
}

/// A page that cannot be had is never zeros: an eager restore makes nothing, a lazy one lets threads wait.
#[test]
fn a_damaged_page_is_named_and_never_read_as_zeros() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let ferry = Ferry::new(&pair);
    let mut subject = Subject::start(&pair, &pair.a, "memory_chain", ORDINARY, &["32"])
        .expect("it needs nothing");
    let image = pair.path("image");
    ferry
        .dump(subject.pid, &image, &["--compress", "none"])
        .must_exit(0);
    let before = Before::of(&pair);
    let pages = image.join("pages");
    let length = fs::metadata(&pages).expect("it was dumped there").len();
    // In the middle of the chain.
    for at in (length / 4..length * 3 / 4).step_by(1 << 20) {
        flip(&pages, usize::try_from(at).expect("it is small"));
    }
    let eager = ferry.restore(&image, &[]).wait();
    eager.must_exit(4);
    assert!(
        eager.stderr.contains("checksum") && eager.stderr.contains("nothing is left of it here"),
        "{eager:?}"
    );
    before.assert_nothing_left(&pair);
    let mut lazy = ferry.restore(&image, &["--lazy", "--drain", "off"]);
    lazy.wait_for_phase("drain");
    let said = subject.lines().len();
    subject.ask_only();
    std::thread::sleep(std::time::Duration::from_secs(1));
    assert_eq!(subject.lines().len(), said, "it went on without its pages");
    assert!(subject.copy_on(&pair.a).is_some() && lazy.runs());
    lazy.signal(&pair.a, Signal::SIGTERM);
    let finished = lazy.wait();
    finished.must_exit(5);
    assert!(finished.stderr.contains("checksum"), "{finished:?}");
    assert!(subject.copy_on(&pair.a).is_none());
}

/// One page server, several restores on two hosts, some at the same time.
#[test]
fn a_page_server_serves_one_image_to_several_hosts() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::FarAhead);
    let ferry = Ferry::new(&pair);
    let mut subject = Subject::start(&pair, &pair.a, "memory_chain", ORDINARY, &["32"])
        .expect("it needs nothing");
    subject.must_pass("before it rests");
    let image = pair.path("image");
    ferry.dump(subject.pid, &image, &[]).must_exit(0);
    let server = ferry.page_server(&image);
    let shared = pair.shared.display().to_string();
    for options in [&["--detach"][..], &["--detach", "--lazy"]] {
        let mut options = options.to_vec();
        options.extend(["--same-file", &shared]);
        let restored = ferry.restore_from(&pair.b, "image", &options).wait();
        restored.must_exit(0);
        let ledger = restored.ledger();
        let is_lazy = options.contains(&"--lazy");
        assert!(
            ledger.pages_total > 5000
                && (ledger.pages_resident_at_run < 1000) == is_lazy
                && ledger.wire_bytes > 5000 * 4096,
            "{ledger:?}"
        );
        subject.must_pass("on B");
        subject.end_copy(&pair.b);
    }
    // Two at once, each reading only what it touches: one question, and both answer.
    let options = [
        "--detach",
        "--lazy",
        "--drain",
        "off",
        "--same-file",
        &shared,
    ];
    let mut both: Vec<_> = [&pair.a, &pair.b]
        .into_iter()
        .map(|host| (host, ferry.restore_from(host, "image", &options)))
        .collect();
    for (_, restoring) in &mut both {
        restoring.wait_for_phase("drain");
    }
    subject.ask_only();
    let wanted = subject.asked_line();
    eventually("both to answer", || {
        let answers = subject.lines().into_iter().filter(|line| *line == wanted);
        (answers.count() == 2).then_some(())
    });
    for (host, restoring) in both {
        restoring.signal(host, Signal::SIGTERM);
        restoring.wait().must_exit(0);
        subject
            .copy_on(host)
            .expect("it runs")
            .signal(Signal::SIGKILL);
        eventually("it to end", || {
            subject.copy_on(host).is_none().then_some(())
        });
    }
    // Names and keys.
    let refused = ferry.restore_from(&pair.b, "another", &[]).wait();
    refused.must_exit(1);
    assert!(
        refused
            .stderr
            .contains("there is no image \"another\" here; there are: image"),
        "{refused:?}"
    );
    let stranger = ferry.back().restore_from(&pair.b, "image", &[]);
    // It asks B, where nobody listens, and would trust nobody else.
    stranger.wait().must_exit(1);
    server.signal(&pair.a, Signal::SIGTERM);
    server.wait().must_exit(143);
}

/// A page server that ends leaves nothing of an eager restore; threads of a lazy one wait for their pages.
#[test]
fn a_page_server_that_ends_is_noticed() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let mut ferry = Ferry::new(&pair);
    ferry.shorten_silence();
    let mut subject = Subject::start(&pair, &pair.a, "memory_chain", ORDINARY, &["32"])
        .expect("it needs nothing");
    let image = pair.path("image");
    ferry.dump(subject.pid, &image, &[]).must_exit(0);
    let server = ferry.page_server(&image);
    let mut lazy = ferry.restore_from(&pair.b, "image", &["--lazy", "--drain", "off"]);
    lazy.wait_for_phase("drain");
    server.signal(&pair.a, Signal::SIGKILL);
    let said = subject.lines().len();
    subject.ask_only();
    eventually("it to be noticed", || {
        lazy.has_said("pages cannot be had any more").then_some(())
    });
    assert_eq!(subject.lines().len(), said, "it went on without its pages");
    assert!(subject.copy_on(&pair.b).is_some() && lazy.runs());
    lazy.signal(&pair.b, Signal::SIGTERM);
    lazy.wait().must_exit(5);
    assert!(subject.copy_on(&pair.b).is_none());
    let nobody = ferry.restore_from(&pair.b, "image", &[]).wait();
    nobody.must_exit(1);
    drop(server);
}
