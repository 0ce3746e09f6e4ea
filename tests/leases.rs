//! Leases on files: nothing that pageferry does breaks one, and where one could not be had the program is not taken from.

use std::fs;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;

use crate::ferry::{Drain, Ferry, Finished};
use crate::hosts::{Before, Clocks, Host, LocalFile, Pair, eventually, skip};
use crate::lifecycle::{THERE_AND_BACK, journey};
use crate::subject::{ORDINARY, Subject};

/// Takes a lease on its first argument, opened for reading, and sleeps. It writes down when somebody breaks it.
const HOLDER: &str = "import fcntl, mmap, os, signal, sys, time
path, said, kind = sys.argv[1:4]
def say(line):
    with open(said, 'a') as file: file.write(line + '\\n')
signal.signal(signal.SIGIO, lambda *_: say('broken'))
file = os.open(path, os.O_RDONLY)
if 'mapped' in sys.argv: memory = mmap.mmap(file, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK if kind == 'write' else fcntl.F_RDLCK)
say('%d %d' % (os.getpid(), file))
while True: time.sleep(1000)";

/// A file whose device stat(2) tells otherwise than /proc/PID/maps and /proc/locks, as on Btrfs: it is in an overlay whose layers are
/// on two file systems.
const OVERLAID: &str = "/tmp/overlaid/all/file";

/// The overlay.
struct Overlay<'a>(&'a Host);

impl<'a> Overlay<'a> {
    #[track_caller]
    fn make(pair: &Pair, host: &'a Host) -> Self {
        let script = "mkdir /tmp/overlaid && cd /tmp/overlaid && mkdir one two all &&
            mount -t tmpfs none one && mount -t tmpfs none two && echo one line >one/file &&
            mount -t overlay -o lowerdir=one:two,xino=off none all";
        // Of mount(8) itself.
        pair.leaves(host, "file /run/mount");
        host.must("sh", &["-c", script]);
        Self(host)
    }
}

impl Drop for Overlay<'_> {
    fn drop(&mut self) {
        let script = "cd /tmp/overlaid && umount all one two && cd .. && rm -r overlaid";
        // What is left is found by who looks for it.
        self.0.run("sh", &["-c", script]);
    }
}

/// A file that each host has for itself, the same on both.
const LOCAL: &str = "/tmp/leased";

/// The program.
struct Holder {
    pid: i32,
    fd: String,
    said: PathBuf,
}

impl Holder {
    /// `how`: `read` or `write`, and whether it is `mapped`.
    #[track_caller]
    fn start(pair: &Pair, host: &Host, path: &Path, how: &[&str]) -> Self {
        let said = pair.path(&format!("holder.{}", host.name));
        let _ = fs::remove_file(&said);
        let mut command = vec!["python3", "-c", HOLDER, text(path), text(&said)];
        command.extend(how);
        host.start(&[], &command);
        let line = eventually("it to have its lease", || {
            let line = fs::read_to_string(&said).ok()?;
            line.ends_with('\n').then_some(line)
        });
        let (pid, fd) = line.trim_end().split_once(' ').expect("two numbers");
        Self {
            pid: pid.parse().expect("a number"),
            fd: fd.to_owned(),
            said,
        }
    }

    /// How often it was told that its lease is being broken.
    fn told(&self) -> usize {
        let said = fs::read_to_string(&self.said).expect("it was written");
        said.matches("broken").count()
    }

    #[track_caller]
    fn must_have_its_lease(&self, host: &Host, kind: &str, when: &str) {
        let process = host.process(self.pid).expect("it runs");
        let path = process.proc(&format!("fdinfo/{}", self.fd));
        let info = fs::read_to_string(path).expect("it is open");
        let line = format!("LEASE  ACTIVE    {kind} ");
        assert!(info.contains(&line), "{when}: {info}");
        assert_eq!(self.told(), 0, "it was told to give it up {when}");
        assert_eq!(process.tracer(), Some(0), "it is traced {when}");
    }

    #[track_caller]
    fn end(&self, host: &Host) {
        end(host, self.pid);
    }
}

#[track_caller]
fn end(host: &Host, pid: i32) {
    host.process(pid).expect("it runs").signal(Signal::SIGKILL);
    eventually("it to end", || host.process(pid).is_none().then_some(()));
}

fn text(path: &Path) -> &str {
    path.to_str().expect("it is ASCII")
}

/// What a migration says that does not come to be.
#[track_caller]
fn fails(ferry: &Ferry<'_>, pid: i32, code: i32) -> Finished {
    let mut receive = ferry.receive(Drain::On);
    let migrate = ferry.migrate(pid).wait();
    if receive.runs() {
        receive.signal(ferry.target, Signal::SIGTERM);
    }
    receive.wait();
    migrate.must_exit(code);
    migrate
}

/// Any open(2) of the file would break it: also of the one who compares its content, or looks for a build id.
#[test]
fn a_write_lease_crosses_on_a_file_of_each_host_and_is_broken_by_nobody() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::FarAhead);
    let before = Before::of(&pair);
    let local = LocalFile::make(&pair, LOCAL);
    let mut subject = Subject::start(&pair, &pair.a, "leases", ORDINARY, &[LOCAL]).expect("it can");
    let on_a = journey(&pair, subject.pid, THERE_AND_BACK, |_, when| {
        subject.must_pass(when);
    });
    let mut ferry = Ferry::new(&pair);
    if on_a.name != pair.a.name {
        ferry = ferry.back();
    }
    let check = ["--file-check".to_owned(), "content".to_owned()];
    ferry.migrate_options.extend(check);
    ferry.cross(subject.pid);
    subject.must_pass("when the contents were compared");
    subject.end(ferry.target);
    drop(local);
    before.assert_nothing_left(&pair);
}

#[test]
fn leases_that_would_not_be_had_again_are_refused_by_name() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let before = Before::of(&pair);
    let local = LocalFile::make(&pair, LOCAL);
    let seen = pair.path("leased");
    fs::write(&seen, "one line\n").expect("the directory is ours");
    let overlay = Overlay::make(&pair, &pair.a);
    let overlaid = PathBuf::from(OVERLAID);
    let cases = [
        (&seen, &["write"][..], "by opening the same file"),
        (&local.path, &["write", "mapped"], "the file is mapped"),
        (&overlaid, &["write", "mapped"], "the file is mapped"),
    ];
    let ferry = Ferry::new(&pair);
    for (path, how, why) in cases {
        let holder = Holder::start(&pair, &pair.a, path, how);
        let refused = fails(&ferry, holder.pid, 7);
        let named = format!("pid {}", holder.pid);
        let refusals = refused.refusals();
        for part in [&named, &format!("lease on {}", text(path)), why] {
            assert!(
                refusals.iter().all(|refusal| refusal.contains(part)),
                "no {part:?} in {refusals:#?}"
            );
        }
        holder.must_have_its_lease(&pair.a, "WRITE", why);
        holder.end(&pair.a);
    }
    drop(overlay);

    let holder = Holder::start(&pair, &pair.a, &local.path, &["read"]);
    pair.a
        .start(&[], &["sh", "-c", "exec 3>>/tmp/leased; exec sleep 100000"]);
    eventually("somebody to want it", || (holder.told() == 1).then_some(()));
    let refused = fails(&ferry, holder.pid, 7);
    let named = format!(
        "pid {} fd {}: lease on {LOCAL} is being broken (try again when the program has answered)",
        holder.pid, holder.fd
    );
    assert_eq!(refused.refusals(), [named]);
    for process in pair.a.processes() {
        process.signal(Signal::SIGKILL);
    }
    eventually("them to end", || {
        pair.a.processes().is_empty().then_some(())
    });
    drop(local);
    before.assert_nothing_left(&pair);
}

/// The source is told before it has parked anything, and nobody on the target is disturbed either.
#[test]
fn who_is_against_a_lease_on_the_target_is_named() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let before = Before::of(&pair);
    let local = LocalFile::make(&pair, LOCAL);
    let holder = Holder::start(&pair, &pair.a, &local.path, &["read"]);
    let ferry = Ferry::new(&pair);

    pair.b
        .start(&[], &["sh", "-c", "exec 3>>/tmp/leased; exec sleep 100000"]);
    let other = eventually("it to have the file open", || {
        let mut processes = pair.b.processes().into_iter();
        processes.find(|process| process.name == "sleep")
    });
    let failed = fails(&ferry, holder.pid, 1);
    let named = format!(
        "read lease of pid {} on fd {} ({LOCAL}): the file is open for writing here, perhaps by process {}",
        holder.pid, holder.fd, other.inner
    );
    assert!(failed.stderr.contains(&named), "{}", failed.stderr);
    holder.must_have_its_lease(&pair.a, "READ", "after the refusal");
    end(&pair.b, other.inner);

    let other = Holder::start(&pair, &pair.b, &local.path, &["write"]);
    let failed = fails(&ferry, holder.pid, 1);
    let named = format!("process {} has a write lease on the file here", other.pid);
    assert!(failed.stderr.contains(&named), "{}", failed.stderr);
    holder.must_have_its_lease(&pair.a, "READ", "after the second refusal");
    other.must_have_its_lease(&pair.b, "WRITE", "after a refusal");
    other.end(&pair.b);

    ferry.cross(holder.pid);
    holder.must_have_its_lease(&pair.b, "READ", "where it crossed to");
    holder.end(&pair.b);

    // The target would have to read the file to compare it.
    let mut comparing = Ferry::new(&pair);
    let check = ["--file-check".to_owned(), "content".to_owned()];
    comparing.migrate_options.extend(check);
    let overlays = [&pair.a, &pair.b].map(|host| Overlay::make(&pair, host));
    for path in [LOCAL, OVERLAID].map(Path::new) {
        let holder = Holder::start(&pair, &pair.a, path, &["read"]);
        let other = Holder::start(&pair, &pair.b, path, &["write"]);
        let refused = fails(&comparing, holder.pid, 7);
        let named = format!(
            "pid {} file {}: has a write lease of process {}, which opening it would break",
            holder.pid,
            text(path),
            other.pid
        );
        assert_eq!(refused.refusals(), [named]);
        holder.must_have_its_lease(&pair.a, "READ", "after the third refusal");
        other.must_have_its_lease(&pair.b, "WRITE", "after the comparison");
        holder.end(&pair.a);
        other.end(&pair.b);
    }
    drop((overlays, local));
    before.assert_nothing_left(&pair);
}

/// The target waits for a lock, so that all is given up for it, and cannot have it. With a lease goes whom it tells.
#[test]
fn leases_that_were_given_up_in_vain_are_had_again_and_tell_whom_they_told() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    // The target cannot be sure that its refusal was heard.
    pair.leaves(&pair.b, "file /run/pageferry/");
    let before = Before::of(&pair);
    let local = LocalFile::make(&pair, LOCAL);
    let mut subject =
        Subject::start(&pair, &pair.a, "leases", ORDINARY, &["-", LOCAL]).expect("it can");
    let on_target = fs::File::open(pair.b.outside(LOCAL)).expect("it was made");
    let lock = Flock::lock(on_target, FlockArg::LockExclusiveNonblock);
    let lock = lock.map_err(|(_, errno)| errno).expect("nobody has it");
    let ferry = Ferry::new(&pair);
    let failed = fails(&ferry, subject.pid, 1);
    assert!(
        failed.stderr.contains("a lock that the source gave up"),
        "{}",
        failed.stderr
    );
    subject.must_pass("after the refusal");
    drop(lock);
    ferry.cross(subject.pid);
    subject.must_pass("where it crossed to");
    subject.end(&pair.b);
    drop(local);
    before.assert_nothing_left(&pair);
}

/// A copy of the file is made by reading it, of which only one that writes would be told.
#[test]
fn a_copy_beside_an_original_has_its_read_lease_and_is_refused_for_a_write_lease() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let local = LocalFile::make(&pair, LOCAL);
    let holder = Holder::start(&pair, &pair.a, &local.path, &["write"]);
    let ferry = Ferry::new(&pair);
    let image = pair.path("image");
    let dumped = ferry.dump(holder.pid, &image, &["--leave-running"]);
    dumped.must_exit(0);
    let restored = ferry.restore(&image, &["--isolate", "--detach"]).wait();
    assert_ne!(restored.code, Some(0), "{restored:?}");
    let named = format!("process {} has a write lease on it", holder.pid);
    assert!(restored.stderr.contains(&named), "{}", restored.stderr);
    holder.must_have_its_lease(&pair.a, "WRITE", "after the refusal");
    holder.end(&pair.a);
    fs::remove_dir_all(&image).expect("it was dumped there");

    let holder = Holder::start(&pair, &pair.a, &local.path, &["read"]);
    let dumped = ferry.dump(holder.pid, &image, &["--leave-running"]);
    dumped.must_exit(0);
    let restored = ferry.restore(&image, &["--isolate", "--detach"]).wait();
    restored.must_exit(0);
    let inside = pair.a.nested().expect("it runs in namespaces of its own");
    holder.must_have_its_lease(&inside, "READ", "beside the original");
    holder.must_have_its_lease(&pair.a, "READ", "beside its copy");
    holder.end(&inside);
    eventually("the namespaces to be gone", || {
        pair.a.nested().is_none().then_some(())
    });
    holder.end(&pair.a);
    fs::remove_dir_all(image).expect("it was dumped there");
    drop(local);
}
