//! The command line keeps its promises: identity, exit codes, help, and who is let in.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use nix::sys::signal::Signal;

use crate::ferry::{Drain, Ferry, Identity, Running, program};
use crate::hosts::{Clocks, Pair, skip};
use crate::subject::{ORDINARY, Subject};

#[test]
fn usage_errors_exit_with_2_and_help_lists_every_code() {
    for arguments in [
        &["no-such-verb"][..],
        &["migrate"],
        &["receive", "--listen", "nonsense"],
        &[],
    ] {
        let output = Command::new(program())
            .args(arguments)
            .output()
            .expect("it was built");
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.is_empty(), "{arguments:?} prints on stdout");
    }
    let help = Command::new(program())
        .arg("--help")
        .output()
        .expect("it was built");
    assert!(help.status.success());
    let text = String::from_utf8_lossy(&help.stdout).into_owned();
    for code in ["0 ", "1 ", "2 ", "3 ", "4 ", "5 ", "6 ", "7 ", "130/143"] {
        assert!(
            text.contains(code),
            "--help says nothing about exit code {code}: {text}"
        );
    }
}

#[test]
fn an_identity_is_made_once_and_kept_private() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let first = Identity::make(&pair, &pair.a, "keys");
    let again = Identity::make(&pair, &pair.a, "keys");
    let other = Identity::make(&pair, &pair.b, "other-keys");
    assert_eq!(first.fingerprint, again.fingerprint);
    assert_ne!(first.fingerprint, other.fingerprint);
    let mode = |path: &std::path::Path| {
        fs::metadata(path)
            .expect("it was made")
            .permissions()
            .mode()
            & 0o777
    };
    assert_eq!(mode(&first.directory), 0o700);
    for entry in fs::read_dir(&first.directory)
        .expect("it was made")
        .flatten()
    {
        assert_eq!(
            mode(&entry.path()) & 0o077,
            0,
            "{} can be read by others",
            entry.path().display()
        );
    }
}

#[test]
fn strangers_are_refused_on_either_side_before_anything_is_said() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let ferry = Ferry::new(&pair);
    let stranger = Identity::make(&pair, &pair.a, "stranger");
    let mut subject =
        Subject::start(&pair, &pair.a, "steadfast", ORDINARY, &["1"]).expect("it needs nothing");
    let pid = subject.pid.to_string();
    let migrate = |own: &str, peer: &str| {
        let arguments = [
            "migrate",
            "--pid",
            &pid,
            "--to",
            "10.77.0.2:7700",
            "--identity",
            own,
            "--peer",
            peer,
        ];
        Running::start(&pair.a, &arguments, &[]).wait()
    };
    let path = |name: &str| pair.path(name).display().to_string();
    let target = Identity::make(&pair, &pair.b, "identity-b").fingerprint;

    let mut receive = ferry.receive(Drain::On);
    // The source does not know the target.
    let finished = migrate(&path("identity-a"), &stranger.fingerprint);
    assert!(matches!(finished.code, Some(1 | 4)), "{finished:?}");
    // The target does not know the source.
    let finished = migrate(&path("stranger"), &target);
    assert!(matches!(finished.code, Some(1 | 4)), "{finished:?}");
    assert!(receive.runs(), "a stranger ended receive");
    receive.signal(&pair.b, Signal::SIGTERM);
    receive.wait();
    assert!(
        pair.b.processes().is_empty(),
        "something was made for a stranger: {:?}",
        pair.b.processes()
    );
    subject.must_pass("after two strangers");
    subject.end(&pair.a);
}

#[test]
fn a_process_that_is_not_there_is_exit_1_or_7() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let ferry = Ferry::new(&pair);
    let finished = ferry.migrate(31_999).wait();
    assert!(matches!(finished.code, Some(1 | 7)), "{finished:?}");
    assert!(
        finished.stderr.contains("31999") || finished.stdout.contains("31999"),
        "{finished:?}"
    );
}

#[test]
fn without_root_it_exits_with_3_and_the_line_that_helps() {
    if skip().is_some() {
        return;
    }
    let copy = crate::hosts::programs_directory().join("pageferry");
    // By a process of its own: a test that forks while we hold the copy open for writing would make it "busy".
    let copied = Command::new("cp").arg(program()).arg(&copy).status();
    assert!(copied.is_ok_and(|status| status.success()));
    let output = Command::new("setpriv")
        .args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "--bounding-set=-all",
            "--",
        ])
        .arg(&copy)
        .arg("check")
        .output()
        .expect("setpriv was found");
    let said = String::from_utf8_lossy(&output.stderr).into_owned()
        + &String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(
        said.to_lowercase().contains("root") || said.contains("CAP_"),
        "{said}"
    );
}

#[test]
fn check_says_that_this_host_is_capable() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    pair.a
        .must(program().to_str().expect("its path is text"), &["check"]);
}
