//! A copy in namespaces of its own runs beside the original, and neither finds anything that the other has done.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::sys::signal::Signal;
use nix::sys::stat::Mode;

use crate::ferry::Ferry;
use crate::hosts::{Clocks, Host, Pair, eventually, ns_pids, skip};
use crate::subject::{Answer, ORDINARY, Subject};

/// What lies at `path` for those inside.
fn read_in(inside: &Host, path: &Path) -> Vec<u8> {
    let path = path.to_str().expect("it is ASCII");
    fs::read(inside.outside(path)).expect("it is there")
}

#[test]
fn a_copy_runs_beside_the_original_and_changes_nothing_of_it() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let mut subject = Subject::start(&pair, &pair.a, "isolated", ORDINARY, &[pair.a.address])
        .expect("it needs nothing");
    subject.must_pass("before");
    let ferry = Ferry::new(&pair);
    // What the original has written since is no longer what an image goes with.
    let dump = |subject: &Subject, name: &str| {
        let image = pair.path(name);
        let dumped = ferry.dump(subject.pid, &image, &["--leave-running"]);
        dumped.must_exit(0);
        image
    };

    // At once; page by page, while pageferry stays and ends as the copy does; and stopped until it is told to go on.
    // Beside what it has there itself, for somebody else.
    let folder = pair.path("isolated.state.d");
    let [foreign_fifo, foreign_socket] =
        ["foreign fifo", "foreign socket"].map(|name| folder.join(name));
    nix::unistd::mkfifo(&foreign_fifo, Mode::from_bits_retain(0o666)).expect("mkfifo");
    let _listener = UnixListener::bind(&foreign_socket).expect("bind");
    fs::write(folder.join("foreign file"), "text").expect("written");
    let many = pair
        .a
        .run("sh", &["-c", "echo 77 > /proc/sys/net/unix/max_dgram_qlen"]);
    assert!(many.status.success(), "{many:?}");

    let image = dump(&subject, "first");
    let detached = ferry.restore(&image, &["--isolate", "--detach"]).wait();
    detached.must_exit(0);
    let inside = pair.a.nested().expect("it runs in namespaces of its own");
    let reached = format!("nsenter -t {} -p -m -n -i -u", ns_pids(inside.init)[1]);
    assert!(detached.stderr.contains(&reached), "{detached:?}");
    let listed = inside.run("ls", &[folder.to_str().expect("it is ASCII")]);
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert_eq!(listed, "fifo\nforeign file\nsocket\n");
    let queue = inside.run("cat", &["/proc/sys/net/unix/max_dgram_qlen"]);
    assert_eq!(queue.stdout, b"77\n");
    the_copy_keeps_to_itself(&pair, &mut subject, &inside, "restored at once");

    let image = dump(&subject, "second");
    let mut lazy = ferry.restore(&image, &["--isolate", "--lazy", "--drain", "off"]);
    lazy.wait_for_phase("drain");
    let inside = pair.a.nested().expect("it runs in namespaces of its own");
    the_copy_keeps_to_itself(&pair, &mut subject, &inside, "restored lazily");
    lazy.wait().must_exit(137);

    let image = dump(&subject, "third");
    let stopped = ferry.restore(&image, &["--isolate", "--stopped"]);
    let (inside, copy) = eventually("it to be there, stopped", || {
        let inside = pair.a.nested()?;
        let copy = subject.copy_on(&inside)?;
        (copy.state == 'T' && copy.tracer() == Some(0)).then_some((inside, copy))
    });
    copy.signal(Signal::SIGCONT);
    the_copy_keeps_to_itself(&pair, &mut subject, &inside, "restored stopped");
    stopped.wait().must_exit(137);

    // What is written through a mapping of a tmpfs changes nothing but the content.
    let image = dump(&subject, "fourth");
    subject.must_pass("once more");
    let shared = pair.shared.to_str().expect("it is ASCII");
    let options = ["--isolate", "--same-file", shared];
    let refused = ferry.restore(&image, &options).wait();
    refused.must_exit(7);
    let refusals = refused.refusals();
    let is_named = |text: &&str| text.contains("/dev/shm/") && text.contains("other content");
    assert!(
        refusals.len() == 1 && refusals.iter().any(is_named),
        "{refusals:?}"
    );
    assert!(!refused.stderr.contains("nsenter"), "{refused:?}");
    for name in [foreign_fifo, foreign_socket, folder.join("foreign file")] {
        fs::remove_file(name).expect("it is ours");
    }
    subject.end(&pair.a);
}

/// The copy inside and the original each find all as it was, one after the other, and neither what the other did. Ends the copy.
#[track_caller]
fn the_copy_keeps_to_itself(pair: &Pair, subject: &mut Subject, inside: &Host, when: &str) {
    let copy = subject.copy_on(inside).expect("it runs");
    let original = subject.copy_on(&pair.a).expect("it runs on");
    assert!(subject.runs_on(inside) && subject.runs_on(&pair.a));

    // One after the other answers the same question, in a log of its own.
    let (log, file) = (
        pair.path("isolated.state"),
        pair.path("isolated.state.file"),
    );
    for round in 0..3 {
        original.signal(Signal::SIGSTOP);
        let before = (
            fs::read(&log).expect("read"),
            fs::read(&file).expect("read"),
        );
        let said_before = read_in(inside, &log).len();
        subject.ask_only();
        let answered = eventually("the copy to answer", || {
            let said = String::from_utf8(read_in(inside, &log)).expect("it is text");
            let last = said.lines().last()?.to_owned();
            (said.len() > said_before).then_some(last)
        });
        assert_eq!(answered, subject.asked_line(), "{when}, round {round}");
        let after = (
            fs::read(&log).expect("read"),
            fs::read(&file).expect("read"),
        );
        assert_eq!(before, after, "the copy wrote to files of the original");
        assert_ne!(read_in(inside, &file), after.1, "the copy did not write");
        original.signal(Signal::SIGCONT);
        assert_eq!(
            subject.answer(),
            Answer::Pass,
            "the original, {when}, round {round}"
        );
    }

    // Nobody in there can change what is not the copy's.
    for path in ["/tmp/new", "/var/tmp/new", "/dev/new", "/new"] {
        let refused = inside.run("touch", &[path]);
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(said.contains("Read-only file system"), "{path}: {said}");
    }
    copy.signal(Signal::SIGKILL);
    eventually("the namespaces to be gone", || {
        pair.a.nested().is_none().then_some(())
    });
    subject.must_pass("when the copy has ended");
}

#[test]
fn what_cannot_be_kept_apart_is_refused_before_anything_is_made() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let mut subject = Subject::start(&pair, &pair.a, "isolated", ORDINARY, &[pair.a.address])
        .expect("it needs nothing");
    let ferry = Ferry::new(&pair);
    let image = pair.path("image");
    let dumped = ferry.dump(subject.pid, &image, &["--leave-running"]);
    dumped.must_exit(0);
    let refused = ferry
        .restore(&image, &["--isolate", "--isolate-limit", "100"])
        .wait();
    refused.must_exit(7);
    let file = pair.path("isolated.state.file");
    let file = file.to_str().expect("it is ASCII");
    let is_named = |text: &&str| text.contains(file) && text.contains("--isolate-limit");
    assert!(refused.refusals().iter().any(is_named), "{refused:?}");
    assert!(pair.a.nested().is_none(), "something was made");

    // What the copies may take, the copy may write, and a little more.
    let options = ["--isolate", "--isolate-limit", "200000", "--detach"];
    ferry.restore(&image, &options).wait().must_exit(0);
    let inside = pair.a.nested().expect("it runs");
    let write = format!("head -c 4000000 /dev/zero >> '{file}'");
    let written = inside.run("sh", &["-c", &write]);
    let said = String::from_utf8_lossy(&written.stderr);
    assert!(said.contains("No space left on device"), "{said}");
    subject
        .copy_on(&inside)
        .expect("it runs")
        .signal(Signal::SIGKILL);
    eventually("the namespaces to be gone", || {
        pair.a.nested().is_none().then_some(())
    });
    subject.must_pass("after the refusal");
    subject.end(&pair.a);
}
