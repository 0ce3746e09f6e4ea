//! The command line keeps its promises: identity, exit codes, help, and who is let in.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use nix::sys::signal::Signal;

use crate::ferry::{Drain, Ferry, Identity, Running, program};
use crate::hosts::{Clocks, Pair, say_skipped, skip};
use crate::subject::{ORDINARY, Subject};

#[test]
fn usage_errors_exit_with_2_and_help_lists_every_code() {
    for arguments in [
        &["no-such-verb"][..],
        &["migrate"],
        &["receive", "--listen", "nonsense"],
        // A pid namespace is for one tree.
        &[
            "receive",
            "--listen",
            "127.0.0.1:1",
            "--trust",
            "SHA256:x",
            "--new-pid-ns",
        ],
        // The network of an isolated copy has no page server in it.
        &[
            "restore",
            "--from",
            "127.0.0.1:1",
            "--name",
            "image",
            "--peer",
            "SHA256:x",
            "--isolate",
        ],
        &["restore", "--image", "image", "--isolate-limit", "1"],
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

    let counter = "nft add table inet heard && nft add chain inet heard input '{ type filter hook input priority 0; }' \
        && nft add rule inet heard input udp dport 7700 counter";
    let heard_bytes = || {
        let rules = pair.b.must("nft", &["list", "table", "inet", "heard"]);
        let mut words = rules.split_whitespace().skip_while(|word| *word != "bytes");
        let count: u64 = words.nth(1).expect("it counts").parse().expect("a number");
        count
    };
    pair.b.must("sh", &["-c", counter]);
    let mut receive = ferry.receive(Drain::On);
    // The source does not know the target, which hears a handshake and nothing of the process: what is said of it first, its
    // plan, holds a copy of the vdso, of two pages.
    let finished = migrate(&path("identity-a"), &stranger.fingerprint);
    assert!(matches!(finished.code, Some(1 | 4)), "{finished:?}");
    let heard = heard_bytes();
    assert!((1200..8192).contains(&heard), "it heard {heard} bytes");
    // The target does not know the source.
    let finished = migrate(&path("stranger"), &target);
    assert!(matches!(finished.code, Some(1 | 4)), "{finished:?}");
    assert!(receive.runs(), "a stranger ended receive");
    pair.b.must("nft", &["delete", "table", "inet", "heard"]);
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

/// Fingerprints may be given more than once, and by the names of /etc/pageferry/peers.toml; a name that is not there is refused
/// before anything else happens.
#[test]
fn peers_are_named_more_than_once_and_by_name() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let mut ferry = Ferry::new(&pair);
    let stranger = Identity::make(&pair, &pair.a, "stranger").fingerprint;
    let mut subject =
        Subject::start(&pair, &pair.a, "steadfast", ORDINARY, &["1"]).expect("it needs nothing");
    let (own, target) = (ferry.trust[0].clone(), ferry.peers[0].clone());
    ferry.trust.insert(0, stranger.clone());
    ferry.peers.insert(0, stranger.clone());
    ferry.cross(subject.pid);
    subject.must_pass("after --trust and --peer twice");

    // Each host gets an /etc of its own, with the other one's name in it.
    for (host, names) in [
        (&pair.a, format!("[peers]\nb = \"{target}\"\n")),
        (
            &pair.b,
            format!("[peers]\nx = \"{stranger}\"\na = \"{own}\"\n"),
        ),
    ] {
        let etc = pair.path(&format!("etc-{}", host.name));
        fs::create_dir_all(etc.join("upper/pageferry")).expect("the directory is ours");
        fs::write(etc.join("upper/pageferry/peers.toml"), names).expect("the directory is ours");
        let script = format!(
            "mount -t tmpfs etc {0}/mount && cp -r /etc/. {0}/mount && cp -r {0}/upper/. {0}/mount && mount --bind {0}/mount /etc",
            etc.display()
        );
        fs::create_dir_all(etc.join("mount")).expect("the directory is ours");
        host.must("sh", &["-c", &script]);
    }
    let mut back = ferry.back();
    back.cross(subject.pid);
    let mut by_name = ferry.clone();
    by_name.trust = vec!["x".to_owned(), "a".to_owned()];
    by_name.peers = vec!["b".to_owned()];
    by_name.cross(subject.pid);
    subject.must_pass("by name");
    // A name nobody has given.
    back.peers = vec!["nobody".to_owned()];
    let finished = back.migrate(subject.pid).wait();
    assert!(
        matches!(finished.code, Some(1 | 2)) && finished.stderr.contains("nobody"),
        "{finished:?}"
    );
    subject.must_pass("after a name that is not there");
    subject.end(&pair.b);
    for host in [&pair.a, &pair.b] {
        // Where mount(8) keeps its own lock.
        pair.leaves(host, "file /run/mount");
        let mount = pair.path(&format!("etc-{}/mount", host.name));
        let script = format!("umount /etc && umount {}", mount.display());
        host.must("sh", &["-c", &script]);
    }
}

/// What `-q`, nothing, `-v` and `--log-format json` put on stderr, which is no terminal here: plain lines, no escape sequence, no
/// bar.
#[test]
fn stderr_is_as_talkative_as_asked_for_and_plain() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let forth = Ferry::new(&pair);
    // Enough for the drain to be seen on its way.
    let mut subject = Subject::start(&pair, &pair.a, "memory_chain", ORDINARY, &["200"])
        .expect("it needs nothing");
    let mut spoken = Vec::new();
    for (number, options) in [&["-q"][..], &["-v"], &["--log-format", "json", "-v"]]
        .into_iter()
        .enumerate()
    {
        let mut ferry = if number % 2 == 0 {
            forth.clone()
        } else {
            forth.back()
        };
        for list in [&mut ferry.receive_options, &mut ferry.migrate_options] {
            list.extend(options.iter().map(|option| (*option).to_owned()));
        }
        let (source, target) = ferry.cross(subject.pid);
        for text in [&source.stderr, &target.stderr] {
            assert!(
                !text.contains('\x1b') && !text.contains('\r'),
                "{options:?}: {text:?}"
            );
        }
        spoken.push((source.stderr, target.stderr));
    }
    subject.must_pass("after three crossings");
    subject.end(&pair.b);
    let [
        (quiet_source, quiet_target),
        (source, target),
        (source_json, target_json),
    ] = &spoken[..]
    else {
        panic!("three crossings were made")
    };
    assert_eq!(
        (quiet_source.as_str(), quiet_target.as_str()),
        ("", ""),
        "-q says something though nothing is wrong"
    );
    for text in [source, target] {
        assert!(
            text.contains("DEBUG") && text.contains("phase"),
            "-v: {text}"
        );
        assert!(
            text.lines()
                .any(|line| line.contains("drain: ") && line.contains(" pages, ")),
            "no plain progress line: {text}"
        );
        assert!(
            text.lines()
                .last()
                .is_some_and(|line| line.starts_with("downtime ")),
            "the ledger is not the last line: {text}"
        );
    }
    for text in [source_json, target_json] {
        let (json, plain): (Vec<&str>, Vec<&str>) =
            text.lines().partition(|line| line.starts_with('{'));
        assert!(
            plain.iter().all(|line| line.starts_with("downtime ")),
            "--log-format json: {plain:?}"
        );
        assert!(json.len() > 2, "--log-format json: {text}");
        for line in json {
            let value: serde_json::Value =
                serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
            assert!(
                value["level"].is_string() && value["fields"].is_object(),
                "{line}"
            );
        }
    }
}

/// On a terminal the drain is a bar that is drawn again and again.
#[test]
fn on_a_terminal_the_drain_is_a_bar() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let ferry = Ferry::new(&pair);
    let mut subject = Subject::start(&pair, &pair.a, "memory_chain", ORDINARY, &["200"])
        .expect("it needs nothing");
    let receive = ferry.receive(Drain::On);
    // script(1) gives its command a terminal, and writes what appears there.
    let command = format!(
        "stty cols 120 rows 40; TERM=xterm {} migrate --pid {} --to 10.77.0.2:7700 --identity {} --peer {} --same-file {}",
        program().display(),
        subject.pid,
        pair.path("identity-a").display(),
        ferry.peers[0],
        pair.shared.display()
    );
    let typescript = pair.path("typescript").display().to_string();
    pair.a.must(
        "script",
        &["--quiet", "--return", "--command", &command, &typescript],
    );
    receive.wait().must_exit(0);
    let shown = fs::read_to_string(&typescript).expect("script has written it");
    let bars = shown.matches("drain [").count() + shown.matches("drain \u{2588}").count();
    assert!(
        bars > 0 && shown.contains('\r') && shown.contains(" waited for, "),
        "no bar: {shown:?}"
    );
    assert!(!shown.contains("drain: "), "a plain line too: {shown:?}");
    assert!(shown.contains("downtime "), "no ledger: {shown:?}");
    subject.must_pass("after it");
    subject.end(&pair.b);
}

/// Without `-v` no debug line is written; without `-q` the ledger is told in a sentence.
#[test]
fn without_an_option_stderr_tells_what_matters() {
    if skip().is_some() {
        return;
    }
    if std::env::var_os("PAGEFERRY_TEST_VERBOSE").is_some() {
        say_skipped("PAGEFERRY_TEST_VERBOSE asks for more than the default");
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let mut subject =
        Subject::start(&pair, &pair.a, "steadfast", ORDINARY, &["1"]).expect("it needs nothing");
    let (source, target) = Ferry::new(&pair).cross(subject.pid);
    for text in [&source.stderr, &target.stderr] {
        assert!(
            text.contains("downtime ") && !text.contains("DEBUG") && !text.contains("TRACE"),
            "{text}"
        );
    }
    subject.must_pass("there");
    subject.end(&pair.b);
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
