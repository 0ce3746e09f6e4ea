//! The test hosts are what they claim to be, and the subjects are right when nothing is done to them: without this, no
//! other test means anything.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use crate::hosts::{
    Before, Clocks, LIBRARY_THAT_DIFFERS, Pair, compile, eventually, list_groups, skip,
};
use crate::lifecycle::{FILES, SUBJECTS};
use crate::subject::{ORDINARY, Subject};

fn monotonic_s(pair: &Pair, of_b: bool) -> f64 {
    let host = if of_b { &pair.b } else { &pair.a };
    // /proc/uptime shows CLOCK_BOOTTIME of the reader's time namespace.
    let text = host.must("cat", &["/proc/uptime"]);
    text.split(' ')
        .next()
        .and_then(|seconds| seconds.parse().ok())
        .expect("/proc/uptime begins with a number")
}

#[test]
fn two_hosts_have_namespaces_of_their_own_and_reach_each_other() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::FarAhead);
    for namespace in ["pid", "net", "mnt", "uts", "ipc", "time"] {
        let link = |init: i32| {
            fs::read_link(format!("/proc/{init}/ns/{namespace}")).expect("process 1 lives")
        };
        let own = fs::read_link(format!("/proc/self/ns/{namespace}")).expect("we live");
        assert!(
            link(pair.a.init) != link(pair.b.init) && link(pair.a.init) != own,
            "{namespace}"
        );
    }
    for host in [&pair.a, &pair.b] {
        assert_eq!(host.must("uname", &["-n"]).trim(), host.hostname);
    }
    assert!(
        monotonic_s(&pair, true) - monotonic_s(&pair, false) > 3e6,
        "B is far ahead"
    );
    for directory in ["/tmp", "/run", "/dev/shm"] {
        let mine = format!("{directory}/mine");
        pair.a.must("touch", &[&mine]);
        assert!(
            pair.a.outside(&mine).exists() && !pair.b.outside(&mine).exists(),
            "{directory} is not private"
        );
        pair.leaves(&pair.a, &format!("file {mine}"));
    }
    let library = |host: &crate::hosts::Host| {
        fs::read(host.outside(LIBRARY_THAT_DIFFERS)).expect("it is part of the C library")
    };
    assert_ne!(library(&pair.a), library(&pair.b));
    fs::write(pair.path("ours"), "x").expect("the directory is ours");
    pair.b
        .must("ls", &[pair.path("ours").to_str().expect("it is ASCII")]);
    let bash = "exec 3<>/dev/tcp/10.77.0.2/9 || exit 0";
    pair.a.must("bash", &["-c", bash]);
    assert!(
        pair.b
            .must("ip", &["-brief", "address"])
            .contains("10.77.0.2/24")
    );
}

#[test]
fn the_clock_of_b_can_be_behind() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    assert!(monotonic_s(&pair, true) < monotonic_s(&pair, false));
}

#[test]
fn whatever_is_left_on_a_host_is_found() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let before = Before::of(&pair);
    before.assert_nothing_left(&pair);
    let python = "import ctypes, socket, time, os, mmap
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).bind(('127.0.0.1', 4444)) if False else None
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('127.0.0.1', 4444))
l = ctypes.CDLL(None); l.shmget(4711, 4096, 0o1600); l.syscall(323, 0)
open('/tmp/left', 'w'); time.sleep(1000)";
    pair.b
        .start(&["--reuid=0"], &["/usr/bin/python3", "-c", python]);
    pair.b.must("nft", &["add", "table", "inet", "left"]);
    pair.b.must("mount", &["-t", "tmpfs", "left", "/mnt"]);
    eventually("the leftovers to appear", || {
        pair.b.outside("/tmp/left").exists().then_some(())
    });
    let now = pair.b.inventory();
    for wanted in [
        "process ",
        "socket udp 0100007F:115C",
        "ipc shm",
        "file /tmp/left",
        "nftables table inet left",
        "/mnt ",
        "userfaultfd of",
    ] {
        assert!(
            now.iter().any(|line| line.contains(wanted)),
            "{wanted:?} was not found in {now:#?}"
        );
    }
    let complaint = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        before.assert_nothing_left(&pair)
    }));
    assert!(complaint.is_err(), "the comparison is blind");
    // And nobody has to ask for it.
    let complaint = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(pair)));
    assert!(complaint.is_err(), "a pair may end with something left");
}

#[test]
fn what_a_test_says_it_leaves_is_no_difference_and_all_else_is() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    pair.b.must("touch", &["/tmp/said"]);
    pair.leaves(&pair.b, "file /tmp/said");
    drop(pair);
    let pair = Pair::new(Clocks::Behind);
    pair.a.must("touch", &["/tmp/said"]);
    pair.leaves(&pair.b, "file /tmp/said");
    let complaint = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(pair)));
    assert!(complaint.is_err(), "it was said of the other host");
}

/// A control group that bears our program's name, or lies below the one a host is in, is found however deep. On folders that
/// look like groups: real ones are seen by every other test.
#[test]
fn a_control_group_that_is_left_is_found() {
    let root = tempfile::tempdir().expect("a folder");
    for group in [
        "own/new/below",
        "elsewhere/pageferry-1",
        "elsewhere/mine",
        "system.slice/sample-1.service",
        "own/sample-2",
    ] {
        fs::create_dir_all(root.path().join(group)).expect("the folder is ours");
    }
    let mut found = BTreeSet::new();
    list_groups(root.path(), "/cg", "/cg/own", &mut found);
    let expected = [
        "/cg/elsewhere/pageferry-1",
        "/cg/own/new",
        "/cg/own/new/below",
    ];
    assert_eq!(
        found,
        expected
            .iter()
            .map(|group| format!("cgroup {group}"))
            .collect()
    );
}

#[test]
fn a_host_goes_with_everything_in_it() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    pair.a.start(ORDINARY, &["/bin/sleep", "12345"]);
    let sleeper = eventually("the sleeper", || {
        pair.a
            .processes()
            .into_iter()
            .find(|process| process.name == "sleep")
    });
    let shared = pair.shared.clone();
    for line in ["process ", "namespace "] {
        pair.leaves(&pair.a, line);
    }
    drop(pair);
    assert!(!sleeper.proc("").exists() && !shared.exists());
}

/// Every subject, five at a time, asked three times.
#[test]
fn subjects_pass_when_nothing_is_done_to_them() {
    if skip().is_some() {
        return;
    }
    let mut names: Vec<_> = SUBJECTS.to_vec();
    names.push(("steadfast", ORDINARY));
    names.dedup_by_key(|row| row.0);
    let pair = Pair::new(Clocks::Behind);
    for (_, files) in FILES {
        pair.leaves(&pair.a, files);
    }
    let before = Before::of(&pair);
    for group in names.chunks(5) {
        let mut subjects: Vec<Subject> = group
            .iter()
            .filter_map(|(name, privileges)| Subject::start(&pair, &pair.a, name, privileges, &[]))
            .collect();
        for round in 1..=3 {
            for subject in &mut subjects {
                subject.must_pass(&format!("undisturbed, round {round}"));
            }
        }
        for subject in subjects {
            assert!(
                subject.heartbeat(&pair.a).is_some_and(|beats| beats > 0),
                "{} has no heartbeat",
                subject.name()
            );
            subject.end(&pair.a);
        }
    }
    before.assert_nothing_left(&pair);
}

/// A process stopped and continued by a debugger that does nothing else stays what it was; the same program notices when
/// one byte of it changes. Both must hold, or the failure tests are worth nothing.
#[test]
fn the_steadfast_subject_notices_a_changed_byte() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let mut subject =
        Subject::start(&pair, &pair.a, "steadfast", ORDINARY, &["1"]).expect("it needs nothing");
    let process = subject.copy_on(&pair.a).expect("it runs");
    let status = Command::new(compile(
        &std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hosts/touch.c"),
        "touch",
        &[],
    ))
    .arg(process.outer.to_string())
    .status()
    .expect("it was compiled a moment ago");
    assert!(status.success());
    assert_ne!(
        subject.ask(),
        crate::subject::Answer::Pass,
        "a changed byte went unnoticed"
    );
    subject.end(&pair.a);
}
