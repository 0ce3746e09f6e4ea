//! Locks that cannot be had where a program goes: nobody ever runs who believes to have one and has not.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::sys::signal::Signal;

use crate::ferry::{Drain, Ferry};
use crate::hosts::{Before, Clocks, Host, LocalFile, Pair, eventually, skip};

/// Takes an exclusive flock and a record lock for reading on its first argument, opened for reading, and sleeps.
const HOLDER: &str = "import fcntl, os, sys, time
file = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(file, fcntl.LOCK_EX)
fcntl.lockf(file, fcntl.LOCK_SH, 10)
open(sys.argv[2], 'w').write(str(os.getpid()) + ' ' + str(file) + '\\n')
while True: time.sleep(1000)";

/// Exits with 0 if somebody has both.
const PROBE: &str = "import fcntl, os, sys
file = os.open(sys.argv[1], os.O_RDWR)
def has(take, how):
    try: take(file, how | fcntl.LOCK_NB)
    except OSError: return True
    return False
sys.exit(not (has(fcntl.flock, fcntl.LOCK_SH) and has(fcntl.lockf, fcntl.LOCK_EX)))";

/// The program, and its descriptor.
struct Holder {
    pid: i32,
    fd: String,
    file: PathBuf,
}

impl Holder {
    #[track_caller]
    fn start(pair: &Pair, file: &Path) -> Self {
        let said = pair.path("holder");
        let _ = fs::remove_file(&said);
        let command = ["python3", "-c", HOLDER, text(file), text(&said)];
        pair.a.start(&[], &command);
        let line = eventually("it to have its locks", || {
            let line = fs::read_to_string(&said).ok()?;
            line.ends_with('\n').then_some(line)
        });
        let (pid, fd) = line.trim_end().split_once(' ').expect("two numbers");
        Self {
            pid: pid.parse().expect("a number"),
            fd: fd.to_owned(),
            file: file.to_owned(),
        }
    }

    /// As refusals name its descriptor.
    fn name(&self) -> String {
        format!(
            "of pid {} on fd {} ({})",
            self.pid,
            self.fd,
            self.file.display()
        )
    }

    /// Whether somebody on `host` has them.
    fn are_taken(&self, host: &Host) -> bool {
        let probe = host.run("python3", &["-c", PROBE, text(&self.file)]);
        probe.status.success()
    }

    #[track_caller]
    fn must_have_its_locks(&self, host: &Host, when: &str) {
        assert!(
            self.are_taken(host),
            "it has not its locks on {} {when}",
            host.name
        );
        let process = host.process(self.pid).expect("it has answered");
        assert_eq!(process.tracer(), Some(0), "it is traced {when}");
        let stat = fs::read_to_string(process.proc("stat")).expect("it runs");
        assert!(stat.contains(") S "), "it does not run {when}: {stat}");
    }

    #[track_caller]
    fn end(&self, host: &Host) {
        let process = host.process(self.pid).expect("it has answered");
        process.signal(Signal::SIGKILL);
        eventually("it to end", || {
            host.process(self.pid).is_none().then_some(())
        });
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("it is ASCII")
}

/// On the target the file is another, and who has a lock on it cannot be seen from there: it may be the source. So the source gives
/// its locks up, the target cannot take them all the same, and they are the source's again.
#[test]
fn locks_that_were_given_up_in_vain_are_taken_again() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    // The target cannot be sure that its refusal was heard.
    pair.leaves(&pair.b, "file /run/pageferry/");
    let before = Before::of(&pair);
    let local = LocalFile::make(&pair, "/tmp/locked");
    let holder = Holder::start(&pair, &local.path);
    let ferry = Ferry::new(&pair);
    // Ours, and we are in no pid namespace of theirs.
    let on_target = || {
        let mut options = OpenOptions::new();
        let opened = options
            .read(true)
            .write(true)
            .open(pair.b.outside("/tmp/locked"));
        opened.expect("it was made")
    };
    for kind in ["flock", "record lock"] {
        let (mut flock, mut record) = (None, None);
        if kind == "flock" {
            let lock = Flock::lock(on_target(), FlockArg::LockExclusiveNonblock);
            flock = Some(lock.map_err(|(_, errno)| errno).expect("nobody has it"));
        } else {
            let file = on_target();
            let lock = nix::libc::flock {
                l_type: nix::libc::F_WRLCK as i16,
                l_whence: nix::libc::SEEK_SET as i16,
                l_start: 5,
                l_len: 1,
                l_pid: 0,
            };
            fcntl(&file, FcntlArg::F_SETLK(&lock)).expect("nobody has it");
            record = Some(file);
        }
        let receive = ferry.receive(Drain::On);
        let migrate = ferry.migrate(holder.pid).wait();
        migrate.must_exit(1);
        receive.wait().must_exit(1);
        for part in [
            kind,
            &holder.name(),
            "cannot be seen from here",
            "runs on here",
        ] {
            assert!(
                migrate.stderr.contains(part),
                "no {part:?} in {}",
                migrate.stderr
            );
        }
        assert!(pair.b.process(holder.pid).is_none(), "it is on B too");
        holder.must_have_its_locks(&pair.a, &format!("after the {kind} was refused"));
        drop((flock, record));
    }
    ferry.cross(holder.pid);
    holder.must_have_its_locks(&pair.b, "where it crossed to");
    holder.end(&pair.b);
    drop(local);
    before.assert_nothing_left(&pair);
}

/// Who can be seen on the target is told by process, and the source is not even parked.
#[test]
fn a_lock_that_a_process_of_the_target_has_is_refused_by_name() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::FarAhead);
    let before = Before::of(&pair);
    let local = LocalFile::make(&pair, "/tmp/locked");
    let holder = Holder::start(&pair, &local.path);
    pair.b.start(
        &[],
        &["flock", "--no-fork", text(&local.path), "sleep", "100000"],
    );
    let other = eventually("somebody to have it on B", || {
        let locks = pair.b.must("cat", &["/proc/locks"]);
        locks.split_whitespace().nth(4)?.parse::<i32>().ok()
    });
    let ferry = Ferry::new(&pair);
    let receive = ferry.receive(Drain::On);
    let migrate = ferry.migrate(holder.pid).wait();
    migrate.must_exit(1);
    receive.wait().must_exit(1);
    let named = format!(
        "exclusive flock {}: process {other} has it here",
        holder.name()
    );
    assert!(
        migrate.stderr.contains(&named),
        "no {named:?} in {}",
        migrate.stderr
    );
    holder.must_have_its_locks(&pair.a, "after the refusal");

    // At rest nobody has its locks; who has them when it is to run again is named, too.
    let image = pair.path("image");
    ferry.dump(holder.pid, &image, &[]).must_exit(0);
    eventually("it to be gone", || {
        pair.a.process(holder.pid).is_none().then_some(())
    });
    pair.a.start(
        &[],
        &["flock", "--no-fork", text(&local.path), "sleep", "100000"],
    );
    let other = eventually("somebody to have it on A", || {
        let locks = pair.a.must("cat", &["/proc/locks"]);
        locks.split_whitespace().nth(4)?.parse::<i32>().ok()
    });
    let restored = ferry.restore(&image, &["--detach"]).wait();
    restored.must_exit(1);
    let named = format!(
        "exclusive flock {}: process {other} has it here",
        holder.name()
    );
    assert!(
        restored.stderr.contains(&named),
        "no {named:?} in {}",
        restored.stderr
    );
    assert!(pair.a.process(holder.pid).is_none(), "it runs all the same");
    for (host, pid) in [(&pair.a, other), (&pair.b, 0)] {
        for process in host.processes() {
            if process.inner == pid || pid == 0 {
                process.signal(Signal::SIGKILL);
            }
        }
        eventually("the others to end", || {
            host.processes().is_empty().then_some(())
        });
    }
    ferry.restore(&image, &["--detach"]).wait().must_exit(0);
    holder.must_have_its_locks(&pair.a, "after its rest");
    holder.end(&pair.a);
    fs::remove_dir_all(image).expect("it was dumped there");
    drop(local);
    before.assert_nothing_left(&pair);
}

/// A shell that locks a file for a program it starts has the lock with it.
#[test]
fn a_lock_that_a_process_outside_has_too_is_refused_by_name() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let file = pair.path("locked");
    let script = format!(
        "exec 9>{}; flock 9; setsid sleep 100000 & wait",
        text(&file)
    );
    pair.a.start(&[], &["bash", "-c", &script]);
    let find = |name: &str| {
        let mut processes = pair.a.processes().into_iter();
        processes.find(|process| process.name == name)
    };
    let sleep = eventually("it to start", || find("sleep"));
    let shell = find("bash").expect("it waits");
    let ferry = Ferry::new(&pair);
    let receive = ferry.receive(Drain::On);
    let migrate = ferry.migrate(sleep.inner).wait();
    migrate.must_exit(7);
    receive.signal(ferry.target, Signal::SIGTERM);
    receive.wait();
    let named = format!(
        "pid {} fd 9: has a lock on {} together with process {}, which stays here (close it there)",
        sleep.inner,
        text(&file),
        shell.inner
    );
    assert_eq!(migrate.refusals(), [named]);
    for process in [shell, sleep] {
        process.signal(Signal::SIGKILL);
    }
    eventually("them to end", || {
        pair.a.processes().is_empty().then_some(())
    });
}

/// Who waits for a lock would get it in the moment in which nobody has it.
#[test]
fn a_lock_that_a_stranger_waits_for_is_not_given_up() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let before = Before::of(&pair);
    let file = pair.path("locked");
    fs::write(&file, "one line\n").expect("the directory is ours");
    let holder = Holder::start(&pair, &file);
    pair.b
        .start(&[], &["flock", "--no-fork", text(&file), "sleep", "100000"]);
    let waits = || {
        let locks = pair.a.must("cat", &["/proc/locks"]);
        locks.contains("-> FLOCK").then_some(())
    };
    eventually("somebody to wait for it", waits);
    let ferry = Ferry::new(&pair);
    let receive = ferry.receive(Drain::On);
    let migrate = ferry.migrate(holder.pid).wait();
    migrate.must_exit(1);
    receive.wait().must_exit(1);
    let named = format!(
        "waits for the lock of pid {} on its fd {}",
        holder.pid, holder.fd
    );
    assert!(
        migrate.stderr.contains(&named),
        "no {named:?} in {}",
        migrate.stderr
    );
    holder.must_have_its_locks(&pair.a, "after the refusal");
    for process in pair.b.processes() {
        process.signal(Signal::SIGKILL);
    }
    eventually("it to wait no more", || {
        pair.b.processes().is_empty().then_some(())
    });
    ferry.cross(holder.pid);
    holder.must_have_its_locks(&pair.b, "where it crossed to");
    holder.end(&pair.b);
    before.assert_nothing_left(&pair);
}

/// What no other host sees is in nobody's way: a copy that stays stopped keeps its locks, for whoever lets it run.
#[test]
fn locks_on_files_of_one_host_stay_with_the_stopped_copy() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let before = Before::of(&pair);
    let local = LocalFile::make(&pair, "/tmp/locked");
    let holder = Holder::start(&pair, &local.path);
    let ferry = Ferry::new(&pair);
    let receive = ferry.receive(Drain::Off);
    let mut migrate = ferry.migrate(holder.pid);
    migrate.wait_for_phase("drain");
    assert!(holder.are_taken(&pair.b), "it runs without its locks");
    assert!(
        holder.are_taken(&pair.a),
        "its copy on A has given its locks up"
    );
    receive.signal(ferry.target, Signal::SIGTERM);
    ferry.must_succeed(migrate, receive);
    eventually("its copy on A to be gone", || {
        (!holder.are_taken(&pair.a)).then_some(())
    });
    holder.end(&pair.b);
    drop(local);
    before.assert_nothing_left(&pair);
}

/// Takes an exclusive flock on its first argument as soon as it can be had, says so in the second, and ends a while later.
const INQUISITIVE: &str = "import fcntl, os, sys, time
file = os.open(sys.argv[1], os.O_RDONLY)
while True:
    try: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError: continue
    open(sys.argv[2], 'a').write('had')
    time.sleep(0.2)
    break";

/// Whoever takes a lock for a moment, as one does to see whether anybody has it, does not keep the program from running.
#[test]
fn a_lock_that_is_taken_for_a_moment_meanwhile_is_had_again() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    pair.leaves(&pair.b, "file /run/pageferry/");
    let before = Before::of(&pair);
    let local = LocalFile::make(&pair, "/tmp/locked");
    let holder = Holder::start(&pair, &local.path);
    let had = pair.path("had");
    fs::write(&had, "").expect("the directory is ours");
    let path = text(&local.path);
    pair.a
        .start(&[], &["python3", "-c", INQUISITIVE, path, text(&had)]);
    let on_target = fs::File::open(pair.b.outside(path)).expect("it was made");
    let lock = Flock::lock(on_target, FlockArg::LockExclusiveNonblock);
    let lock = lock.map_err(|(_, errno)| errno).expect("nobody has it");
    let ferry = Ferry::new(&pair);
    // On a busy machine it may come too late.
    for attempt in 1.. {
        assert!(attempt <= 20, "it never had the lock");
        let receive = ferry.receive(Drain::On);
        ferry.migrate(holder.pid).wait().must_exit(1);
        receive.wait().must_exit(1);
        holder.must_have_its_locks(&pair.a, "after the refusal");
        if !fs::read_to_string(&had).expect("it is text").is_empty() {
            break;
        }
    }
    drop(lock);
    for process in pair.a.processes() {
        process.signal(Signal::SIGKILL);
    }
    eventually("them to end", || {
        pair.a.processes().is_empty().then_some(())
    });
    drop(local);
    before.assert_nothing_left(&pair);
}
