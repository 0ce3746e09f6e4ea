//! What a page server takes of its host while many restore from it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::ferry::{Ferry, program};
use crate::hosts::{Clocks, Pair, eventually, skip};
use crate::subject::{ORDINARY, Subject};

/// Copies that are restored at the same time.
const MANY: usize = 8;
/// How many of them stop reading in the middle.
const SLOW: usize = 2;

/// A restore in a pid namespace of its own on the target, so that each copy can have the number it had.
struct Restore {
    child: Child,
    log: PathBuf,
}

impl Restore {
    /// Starts one that reads only what it touches, until it is told otherwise.
    fn start(pair: &Pair, ferry: &Ferry<'_>, name: &str) -> Self {
        let log = pair.path(name);
        let (out, err) = (File::create(&log), File::create(log.with_extension("err")));
        let child = ferry
            .target
            .command("unshare")
            .args(["--pid", "--fork", "--kill-child", "--mount", "--mount-proc"])
            .args(["sh", "-c", "\"$@\"; exit $?", "sh"])
            .arg(program())
            .args(ferry.restore_arguments("image"))
            .args(["--lazy", "--drain", "off", "--json", "--same-file"])
            .arg(&pair.shared)
            .stdout(Stdio::from(out.expect("the folder is ours")))
            .stderr(Stdio::from(err.expect("the folder is ours")))
            .spawn()
            .expect("nsenter was found");
        Self { child, log }
    }

    /// Waits until its copy runs.
    #[track_caller]
    fn wait_for_drain(&mut self) {
        eventually("a restore to reach drain", || {
            let said = fs::read_to_string(&self.log).unwrap_or_default();
            let has_ended = matches!(self.child.try_wait(), Ok(Some(_)));
            assert!(!has_ended, "{said}{}", self.errors());
            said.contains("\"phase\":\"drain\"").then_some(())
        });
    }

    fn errors(&self) -> String {
        fs::read_to_string(self.log.with_extension("err")).unwrap_or_default()
    }

    /// Its processes of pageferry, the one that the operator started first.
    fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        let mut left = vec![self.child.id().to_string()];
        while let Some(pid) = left.pop() {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
            let children = children.unwrap_or_default();
            left.extend(children.split_whitespace().rev().map(str::to_owned));
            if fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program()) {
                found.push(pid.parse().expect("pids are numbers"));
            }
        }
        found
    }

    /// Reads all from now on.
    fn drain(&self) {
        let front = self.processes()[0];
        kill(Pid::from_raw(front), Signal::SIGTERM).expect("it runs");
    }

    fn signal_all(&self, signal: Signal) {
        for pid in self.processes() {
            // One of them may end meanwhile.
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    #[track_caller]
    fn must_end_well(mut self) {
        let status = eventually("a restore to end", || self.child.try_wait().ok()?);
        assert!(status.success(), "{status:?}: {}", self.errors());
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Memory of a process in KiB, by its names in `/proc/PID/status`.
fn memory_kib<const N: usize>(pid: i32, names: [&str; N]) -> [u64; N] {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    names.map(|name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let value = line.and_then(|line| line.strip_prefix(':')?.split_whitespace().next());
        value
            .and_then(|value| value.parse().ok())
            .expect("a number")
    })
}

/// The most memory that the process had since this was last asked, in KiB: all that is resident, and what of that is not its
/// program's.
fn peak_kib(pid: i32) -> [u64; 2] {
    let [peak, file] = memory_kib(pid, ["VmHWM", "RssFile"]);
    let clear = Path::new("/proc").join(pid.to_string()).join("clear_refs");
    // See proc(5): the peak is what it is now.
    fs::write(clear, "5").expect("root may");
    [peak, peak - file]
}

/// One round: so many copies run, then pull all their pages at the same time, and find them right. The first `slow` of them stop
/// reading until all others are done.
fn round(pair: &Pair, ferry: &Ferry<'_>, subject: &mut Subject, count: usize, slow: usize) {
    let mut restores: Vec<_> = (0..count)
        .map(|number| Restore::start(pair, ferry, &format!("restore-{number}")))
        .collect();
    for restore in &mut restores {
        restore.wait_for_drain();
    }
    for restore in &restores[..slow] {
        restore.drain();
    }
    std::thread::sleep(std::time::Duration::from_millis(30));
    for restore in &restores[..slow] {
        restore.signal_all(Signal::SIGSTOP);
    }
    for restore in &restores[slow..] {
        restore.drain();
    }
    subject.ask_only();
    let wanted = subject.asked_line();
    let answers = |count: usize| {
        eventually("copies to find their memory right", || {
            let answered = subject.lines().into_iter().filter(|line| *line == wanted);
            (answered.count() >= count).then_some(())
        });
    };
    answers(count - slow);
    for restore in &restores[..slow] {
        restore.signal_all(Signal::SIGCONT);
    }
    answers(count);
    subject.tell_to_end();
    for restore in restores {
        restore.must_end_well();
    }
    subject.forget_the_end();
}

/// Eight restores at once, two of which stop reading for a while, take no more of the server's memory than one, within a tenth.
#[test]
fn eight_restores_at_once_take_the_memory_of_one() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::FarAhead);
    let ferry = Ferry::new(&pair);
    let mut subject = Subject::start(&pair, &pair.a, "memory_chain", ORDINARY, &["64"])
        .expect("it needs nothing");
    let image = pair.path("image");
    ferry.dump(subject.pid, &image, &[]).must_exit(0);
    let server = ferry.page_server(&image);
    let pid = pair
        .a
        .processes()
        .into_iter()
        .find(|process| process.name == "pageferry");
    let pid = pid.expect("it serves").outer;
    round(&pair, &ferry, &mut subject, 1, 0);
    peak_kib(pid);
    round(&pair, &ferry, &mut subject, 1, 0);
    let one = peak_kib(pid);
    round(&pair, &ferry, &mut subject, MANY, SLOW);
    let many = peak_kib(pid);
    println!("peak of one restore {one:?} KiB, of {MANY} {many:?} KiB");
    for (one, many) in one.into_iter().zip(many) {
        assert!(
            many * 10 <= one * 11,
            "{one} KiB for one, {many} KiB for {MANY}"
        );
    }
    server.signal(&pair.a, Signal::SIGTERM);
    server.wait().must_exit(143);
}
