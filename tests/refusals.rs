//! What cannot be carried is refused by name, all of it at once, with exit 7, and nothing has been touched.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::ferry::{Drain, Ferry, Finished};
use crate::hosts::{
    Before, Clocks, Host, LIBRARY_THAT_DIFFERS, Pair, eventually, say_skipped, skip,
};
use crate::subject::{Answer, ORDINARY, Subject};

/// Tries a crossing that must be refused; checks that neither side did anything.
#[track_caller]
fn refused(ferry: &Ferry<'_>, subject: &mut Subject) -> Finished {
    let mut receive = ferry.receive(Drain::On);
    let finished = ferry.migrate(subject.pid).wait();
    finished.must_exit(7);
    if receive.runs() {
        receive.signal(ferry.target, nix::sys::signal::Signal::SIGTERM);
    }
    receive.wait();
    assert!(
        !finished.refusals().is_empty(),
        "exit 7 without a reason: {finished:?}"
    );
    assert_eq!(subject.ask(), Answer::Pass, "after the refusal");
    assert!(subject.runs_on(ferry.source), "it was left stopped");
    assert!(
        subject
            .copy_on(ferry.source)
            .and_then(|process| process.tracer())
            == Some(0),
        "it is still traced"
    );
    finished
}

#[track_caller]
fn assert_some(finished: &Finished, what: &str, parts: &[&str]) {
    let found = finished
        .refusals()
        .iter()
        .any(|text| parts.iter().all(|part| text.contains(part)));
    assert!(
        found,
        "{what}: no refusal with {parts:?} among {:#?}",
        finished.refusals()
    );
}

#[test]
fn everything_that_cannot_be_carried_is_named_at_once() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let before = Before::of(&pair);
    let mut subject =
        Subject::start(&pair, &pair.a, "refused", ORDINARY, &[]).expect("it needs nothing");
    let mut ferry = Ferry::new(&pair);
    // Not given at all: refusing is the default.
    ferry.tcp = None;
    let finished = refused(&ferry, &mut subject);
    let pid = format!("pid {}", subject.pid);
    for line in subject.lines() {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["OBJECT", "tcp", "fd", fd] => {
                assert_some(
                    &finished,
                    "tcp",
                    &[
                        &format!("{pid} fd {fd}: established TCP 127.0.0.1:"),
                        "--tcp close",
                    ],
                );
            }
            ["OBJECT", "unix-outside", "fd", fd] => assert_some(
                &finished,
                "unix-outside",
                &[
                    &format!("{pid} fd {fd}: UNIX connection to a socket without a name"),
                    "outside of the tree",
                ],
            ),
            ["OBJECT", kind, "fd", fd] => {
                assert_some(&finished, kind, &[&format!("{pid} fd {fd}: ")])
            }
            ["OBJECT", kind, "at", address] => assert_some(&finished, kind, &[&pid, address]),
            ["OBJECT", kind, "pid", child] => assert_some(&finished, kind, &[child]),
            ["ABSENT", kind, errno] => {
                say_skipped(&format!("{kind} cannot be made (errno {errno})"));
            }
            _ => {}
        }
    }
    // With close the two connections are no reason any more, all others still are.
    let closing = Ferry::new(&pair);
    let with_close = refused(&closing, &mut subject);
    assert_eq!(
        with_close.refusals().len() + 2,
        finished.refusals().len(),
        "{:#?}",
        with_close.refusals()
    );
    subject.end(&pair.a);
    before.assert_nothing_left(&pair);
}

/// Only the process itself can be asked, so that it is found in the freeze: which must leave no trace.
#[test]
fn what_only_the_frozen_process_can_tell_is_refused_by_name() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    for (argument, call) in [
        ("mdwe", "PR_SET_MDWE"),
        ("dispatch", "PR_SET_SYSCALL_USER_DISPATCH"),
    ] {
        let Some(mut subject) =
            Subject::start(&pair, &pair.a, "steadfast", ORDINARY, &["2", argument])
        else {
            return;
        };
        let before = Before::of(&pair);
        let finished = refused(&Ferry::new(&pair), &mut subject);
        let pid = format!("pid {}", subject.pid);
        assert_some(&finished, argument, &[&pid, call]);
        assert!(
            finished.stderr.contains(&format!("{pid} runs on here")),
            "{finished:?}"
        );
        before.assert_nothing_left_but(&pair, subject.pid, "after the refusal");
        subject.end(&pair.a);
    }
}

/// What lies in a message nobody else has, and only in the freeze it is looked for.
#[test]
fn what_travels_in_a_message_and_cannot_cross_is_refused_by_name() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let before = Before::of(&pair);
    let mut subject = Subject::start(
        &pair,
        &pair.a,
        "descriptors_in_flight",
        ORDINARY,
        &["inotify"],
    )
    .expect("it needs nothing");
    let finished = refused(&Ferry::new(&pair), &mut subject);
    let lines = subject.lines();
    let fd = lines
        .iter()
        .find_map(|line| line.strip_prefix("OBJECT unix-in-flight fd "))
        .expect("it says so");
    let of_socket = format!("pid {} fd {fd}: ", subject.pid);
    let parts = [&of_socket, "message 3 brings this: inotify instance"];
    assert_some(&finished, "in flight", &parts);
    assert_eq!(finished.refusals().len(), 1, "{:#?}", finished.refusals());
    subject.end(&pair.a);
    before.assert_nothing_left(&pair);
}

/// What comes about at birth only, and cannot in the order in which there are births.
#[test]
fn memory_and_tables_that_cannot_come_to_a_process_are_refused_by_name() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    for (name, argument, what) in [
        ("common_memory", "parted", "shares its memory with process"),
        (
            "sharing",
            "crossed",
            "shares its descriptor table with process",
        ),
    ] {
        let mut subject =
            Subject::start(&pair, &pair.a, name, ORDINARY, &[argument]).expect("it needs nothing");
        let finished = refused(&Ferry::new(&pair), &mut subject);
        let said = subject.lines();
        let pid = said.iter().find_map(|line| line.strip_prefix("REFUSED "));
        let pid = format!("pid {}: ", pid.expect("it says whom it made"));
        assert_some(&finished, argument, &[&pid, what]);
        assert_eq!(finished.refusals().len(), 1, "{:#?}", finished.refusals());
        subject.end(&pair.a);
    }
}

#[test]
fn a_pid_that_is_taken_is_refused_naming_its_holder() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let mut subject =
        Subject::start(&pair, &pair.a, "registers", ORDINARY, &[]).expect("it needs nothing");
    let ferry = Ferry::new(&pair);
    let holder = format!(
        "echo {} > /proc/sys/kernel/ns_last_pid; sleep 1000 > /dev/null 2>&1 & echo $!",
        subject.pid - 1
    );
    let taken = pair.b.must("sh", &["-c", &holder]);
    assert_eq!(taken.trim(), subject.pid.to_string());
    let finished = refused(&ferry, &mut subject);
    assert_some(&finished, "taken pid", &[&subject.pid.to_string(), "sleep"]);
    subject.end(&pair.a);
    pair.b.must("kill", &[taken.trim()]);
}

/// Builds the sample library into `folder` and gives its path.
fn sample_library(folder: &Path, value: i32) -> PathBuf {
    fs::create_dir_all(folder).expect("the folder is ours");
    let source = folder.join("sample.c");
    fs::write(
        &source,
        format!("int sample_value(void) {{ return {value}; }}\n"),
    )
    .expect("the folder is ours");
    let library = folder.join("libsample.so");
    let status = Command::new("cc")
        .args(["-shared", "-fPIC", "-Wl,--build-id", "-o"])
        .arg(&library)
        .arg(&source)
        .status()
        .expect("cc was found");
    assert!(status.success());
    library
}

/// The program that uses the sample library, built into the shared directory.
fn library_user(pair: &Pair, library: &Path) -> PathBuf {
    let program = pair.path("library_user");
    let status = Command::new("cc")
        .args(["-std=gnu11", "-O2", "-pthread", "-o"])
        .arg(&program)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/subjects/library_user.c"))
        .arg(library)
        .status()
        .expect("cc was found");
    assert!(status.success());
    program
}

#[test]
fn a_library_that_differs_on_the_target_is_refused() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let library = sample_library(&pair.path("lib"), 41);
    let other = sample_library(&pair.path("other"), 42);
    let program = library_user(&pair, &library);
    let command = [program.to_str().expect("it is ASCII")];
    let mut subject = Subject::launch(&pair, &pair.a, "library_user", &program, ORDINARY, &command)
        .expect("it needs nothing");
    let mut ferry = Ferry::new(&pair);
    // Not even a promise that files are the same helps against a build id.
    ferry.migrate_options.clear();
    for check in ["build-id", "content"] {
        pair.b.must(
            "mount",
            &[
                "--bind",
                other.to_str().expect("it is ASCII"),
                library.to_str().expect("it is ASCII"),
            ],
        );
        ferry.migrate_options = vec!["--file-check".to_owned(), check.to_owned()];
        let finished = refused(&ferry, &mut subject);
        assert_some(&finished, check, &["libsample.so"]);
        pair.b
            .must("umount", &[library.to_str().expect("it is ASCII")]);
    }
    // A file that is missing there is refused too.
    pair.b.must(
        "mount",
        &[
            "-t",
            "tmpfs",
            "none",
            pair.path("lib").to_str().expect("it is ASCII"),
        ],
    );
    let finished = refused(&ferry, &mut subject);
    assert_some(&finished, "missing library", &["libsample.so"]);
    pair.b
        .must("umount", &[pair.path("lib").to_str().expect("it is ASCII")]);
    // And with the same file everywhere it crosses.
    ferry.cross(subject.pid);
    subject.must_pass("after the library was the same again");
    subject.end(&pair.b);
}

/// Every pair of hosts differs in one library ([`LIBRARY_THAT_DIFFERS`]): a program that maps it stays.
#[test]
fn a_program_that_maps_the_library_that_differs_is_refused() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::FarAhead);
    let program = crate::hosts::compile(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/subjects/threads.c"),
        "threads",
        &[],
    );
    let state = pair.path("threads.state");
    let preload = format!("LD_PRELOAD={LIBRARY_THAT_DIFFERS}");
    let command = [
        "/usr/bin/env",
        &preload,
        program.to_str().expect("it is ASCII"),
        "--state",
        state.to_str().expect("it is ASCII"),
    ];
    let mut subject = Subject::launch(&pair, &pair.a, "threads", &program, ORDINARY, &command)
        .expect("it needs nothing");
    let finished = refused(&Ferry::new(&pair), &mut subject);
    assert_some(&finished, "other library", &["libBrokenLocale.so.1"]);
    assert_eq!(finished.refusals().len(), 1, "{:#?}", finished.refusals());
    subject.end(&pair.a);
}

/// `--file-check mtime` and `size` look at what they say and no more: with them another build of a library passes, and it is the
/// target's own that the program then runs.
#[test]
fn a_file_check_looks_at_what_it_says_and_no_more() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let library = sample_library(&pair.path("lib"), 41);
    let other = sample_library(&pair.path("other"), 42);
    let file = fs::File::options()
        .write(true)
        .open(&other)
        .expect("it was made");
    let (here, there) = (
        fs::metadata(&library).expect("it was made"),
        fs::metadata(&other).expect("it was made"),
    );
    assert_eq!(here.len(), there.len(), "they must be of one size");
    let same_time = here.modified().expect("every file has it");
    let other_time = same_time - std::time::Duration::from_secs(60);
    let program = library_user(&pair, &library);
    let command = [program.to_str().expect("it is ASCII")];
    let paths = [&other, &library].map(|path| path.to_str().expect("it is ASCII"));
    pair.b.must("mount", &["--bind", paths[0], paths[1]]);
    for (check, passes, fails, length) in [
        ("mtime", same_time, other_time, here.len()),
        ("size", other_time, other_time, here.len() + 1),
    ] {
        let mut subject =
            Subject::launch(&pair, &pair.a, "library_user", &program, ORDINARY, &command)
                .expect("it needs nothing");
        let mut ferry = Ferry::new(&pair);
        ferry.migrate_options = vec!["--file-check".to_owned(), check.to_owned()];
        file.set_len(length).expect("it is ours");
        file.set_modified(fails).expect("it is ours");
        let finished = refused(&ferry, &mut subject);
        assert_some(&finished, check, &["libsample.so"]);
        file.set_len(here.len()).expect("it is ours");
        file.set_modified(passes).expect("it is ours");
        ferry.cross(subject.pid);
        assert!(
            matches!(subject.ask(), Answer::Fail(why) if why.contains("the library says 42")),
            "{check}: it does not run the target's own library"
        );
        subject.end(&pair.b);
    }
    pair.b.must("umount", &[paths[1]]);
}

#[test]
fn a_target_whose_processor_lacks_something_is_refused_unless_forced() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let mut subject =
        Subject::start(&pair, &pair.a, "threads", ORDINARY, &[]).expect("it needs nothing");
    let poorer = fs::read_to_string("/proc/cpuinfo")
        .expect("it is always there")
        .replace(" sse4_2 ", " ");
    let path = pair.path("cpuinfo");
    fs::write(&path, poorer).expect("the directory is ours");
    pair.b.must(
        "mount",
        &[
            "--bind",
            path.to_str().expect("it is ASCII"),
            "/proc/cpuinfo",
        ],
    );
    let mut ferry = Ferry::new(&pair);
    let finished = refused(&ferry, &mut subject);
    assert_some(&finished, "processor", &["sse4_2", "--force-cpu"]);
    ferry.migrate_options.push("--force-cpu".to_owned());
    ferry.cross(subject.pid);
    subject.must_pass("forced");
    subject.end(&pair.b);
    pair.b.must("umount", &["/proc/cpuinfo"]);
}

#[test]
fn a_target_without_enough_memory_is_refused() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let mut subject = Subject::start(&pair, &pair.a, "memory_chain", ORDINARY, &["64"])
        .expect("it needs nothing");
    let real = fs::read_to_string("/proc/meminfo").expect("it is always there");
    let poorer: String = real
        .lines()
        .map(|line| match line.split_once(':') {
            Some((name @ ("MemAvailable" | "MemFree"), _)) => format!("{name}:       20480 kB\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    let path = pair.path("meminfo");
    fs::write(&path, poorer).expect("the directory is ours");
    pair.b.must(
        "mount",
        &[
            "--bind",
            path.to_str().expect("it is ASCII"),
            "/proc/meminfo",
        ],
    );
    let finished = refused(&Ferry::new(&pair), &mut subject);
    assert_some(&finished, "memory", &["20 MiB"]);
    subject.end(&pair.a);
    pair.b.must("umount", &["/proc/meminfo"]);
}

/// A control group as a service manager makes it; removed with the value.
struct ServiceGroup(Vec<PathBuf>);

impl ServiceGroup {
    fn make(name: &str) -> Option<Self> {
        let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .into_iter()
            .find(|root| Path::new(root).join("cgroup.procs").exists())?;
        let slice = Path::new(root).join("system.slice");
        let mut made = Vec::new();
        if !slice.exists() {
            fs::create_dir(&slice).ok()?;
            made.push(slice.clone());
        }
        let service = slice.join(name);
        fs::create_dir(&service).ok()?;
        made.push(service);
        Some(Self(made))
    }
}

impl Drop for ServiceGroup {
    fn drop(&mut self) {
        for folder in self.0.iter().rev() {
            let _ = fs::remove_dir(folder);
        }
    }
}

#[test]
fn a_service_that_would_be_started_again_is_refused_unless_told_otherwise() {
    if skip().is_some() {
        return;
    }
    let Some(group) = ServiceGroup::make(&format!("sample-{}.service", std::process::id())) else {
        say_skipped("no control group can be made here");
        return;
    };
    let pair = Pair::new(Clocks::Behind);
    let mut subject =
        Subject::start(&pair, &pair.a, "threads", ORDINARY, &[]).expect("it needs nothing");
    let process = subject.copy_on(&pair.a).expect("it runs");
    fs::write(
        group.0.last().expect("one was made").join("cgroup.procs"),
        process.outer.to_string(),
    )
    .expect("root may move it");
    let mut ferry = Ferry::new(&pair);
    let finished = refused(&ferry, &mut subject);
    assert_some(&finished, "service", &[".service", "--unmanaged"]);
    ferry.migrate_options.push("--unmanaged".to_owned());
    ferry.cross(subject.pid);
    subject.must_pass("unmanaged");
    subject.end(&pair.b);
    drop(pair);
    drop(group);
}

#[test]
fn a_writable_file_that_only_this_host_has_is_refused() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let mut subject =
        Subject::start(&pair, &pair.a, "regular_file", ORDINARY, &[]).expect("it needs nothing");
    let mut ferry = Ferry::new(&pair);
    ferry.migrate_options.clear();
    let finished = refused(&ferry, &mut subject);
    assert_some(
        &finished,
        "writable file",
        &["regular_file.state.file", "--same-file"],
    );
    subject.end(&pair.a);
}

/// What goes along is made where nothing is, and never put in another's place; a deleted file only up to the limit.
#[test]
fn a_file_that_goes_along_needs_its_place_on_the_target() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let before = Before::of(&pair);
    let mut subject =
        Subject::start(&pair, &pair.a, "tmpfs_files", ORDINARY, &[]).expect("it needs nothing");
    let mut ferry = Ferry::new(&pair);
    let path = format!("/dev/shm/subject.{}", subject.pid);
    pair.b.must("touch", &[&path]);
    let finished = refused(&ferry, &mut subject);
    assert_some(
        &finished,
        "a file that is there",
        &[&format!("file {path}: "), "is there on the target already"],
    );
    pair.b.must("rm", &[&path]);
    let options = ferry.migrate_options.clone();
    ferry
        .migrate_options
        .extend(["--ghost-limit".to_owned(), "4096".to_owned()]);
    let finished = refused(&ferry, &mut subject);
    assert_some(
        &finished,
        "a large deleted file",
        &["tmpfs_files.state.ghost", "--ghost-limit"],
    );
    ferry.migrate_options = options;
    ferry.cross(subject.pid);
    subject.must_pass("where its files had a place");
    subject.end(&pair.b);
    before.assert_nothing_left(&pair);
}

/// Attaches to, or makes, a segment of System V shared memory as its arguments say, and stays if it is to.
const SEGMENTS: &str = "import ctypes, sys, time
libc, what, number = ctypes.CDLL(None), sys.argv[1], int(sys.argv[2])
libc.shmat.restype = ctypes.c_void_p
if what == 'attach':
    assert libc.shmat(number, None, 0) + 1
    time.sleep(100000)
elif what == 'key':
    # The first segment of a host would get the very number.
    open('/proc/sys/kernel/shm_next_id', 'w').write('77')
    assert libc.shmget(number, 4096, 0o1600) >= 0
elif what == 'number':
    open('/proc/sys/kernel/shm_next_id', 'w').write(str(number))
    assert libc.shmget(0, 4096, 0o1600) == number
else:
    assert libc.shmctl(number, 0, None) == 0";

/// Who else is attached to a segment keeps it here; who has its number or key there keeps it from there.
#[test]
fn segments_that_others_have_are_refused_by_name() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let before = Before::of(&pair);
    let subject = Subject::start(&pair, &pair.a, "sysv_memory", ORDINARY, &[]);
    let mut subject = subject.expect("it needs nothing");
    let segments = |host: &Host| -> Vec<(i64, i64)> {
        let table = host.must("cat", &["/proc/sysvipc/shm"]);
        let rows = table.lines().skip(1).map(|line| {
            let mut numbers = line
                .split_whitespace()
                .map(|word| word.parse().unwrap_or(0));
            (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
        });
        rows.collect()
    };
    let has_key = |(key, _): &(i64, i64)| *key != 0;
    let kept = segments(&pair.a).into_iter().find(has_key);
    let (key, number) = kept.expect("one has a key");
    let (key, number) = (key.to_string(), number.to_string());
    let ferry = Ferry::new(&pair);

    pair.a
        .start(&[], &["python3", "-c", SEGMENTS, "attach", &number]);
    let stranger = eventually("somebody to be attached", || {
        let mut processes = pair.a.processes().into_iter();
        processes.find(|process| {
            let maps = fs::read_to_string(process.proc("maps")).unwrap_or_default();
            process.name.starts_with("python") && maps.contains("/SYSV")
        })
    });
    let receive = ferry.receive(Drain::On);
    let finished = ferry.migrate(subject.pid).wait();
    finished.must_exit(7);
    receive.signal(ferry.target, nix::sys::signal::Signal::SIGTERM);
    receive.wait();
    let named = format!("is shared with process {}", stranger.inner);
    assert_some(&finished, "attached", &[&named]);
    stranger.signal(nix::sys::signal::Signal::SIGKILL);
    eventually("it to end", || {
        pair.a.process(stranger.inner).is_none().then_some(())
    });

    for (what, argument) in [("key", &key), ("number", &number)] {
        pair.b.must("python3", &["-c", SEGMENTS, what, argument]);
        let finished = refused(&ferry, &mut subject);
        let object = format!("System V shared memory {number}");
        assert_some(&finished, what, &[&object, what, "on the target"]);
        for (_, number) in segments(&pair.b) {
            pair.b
                .must("python3", &["-c", SEGMENTS, "remove", &number.to_string()]);
        }
    }
    ferry.cross(subject.pid);
    assert_eq!(subject.ask(), Answer::Pass, "on B");
    assert_eq!(segments(&pair.a), [], "left on A");
    subject.end(&pair.b);
    before.assert_nothing_left(&pair);
}
