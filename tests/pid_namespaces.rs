//! Where its numbers are taken a tree runs in a pid namespace of its own: as anywhere, and leaves nothing when it has gone.

use nix::sys::signal::Signal;

use crate::ferry::{Drain, Ferry, Finished, Running};
use crate::hosts::{Clocks, Host, Pair, eventually, ns_pids, skip};
use crate::subject::{ORDINARY, Subject};

const OPTION: &str = "--new-pid-ns";

/// Something else that has a number on a host, until it is told to end.
struct Occupant<'h> {
    host: &'h Host,
    pid: i32,
}

impl<'h> Occupant<'h> {
    fn of(host: &'h Host, pid: i32) -> Self {
        let script = format!(
            "echo {} > /proc/sys/kernel/ns_last_pid; sleep 1000 > /dev/null 2>&1 & echo $!",
            pid - 1
        );
        let taken = host.must("sh", &["-c", &script]);
        assert_eq!(taken.trim(), pid.to_string());
        Self { host, pid }
    }

    fn end(self) {
        self.host.must("kill", &[&self.pid.to_string()]);
        eventually("the number to be free", || {
            self.host.process(self.pid).is_none().then_some(())
        });
    }
}

/// Nothing was done, for this number is taken; and there is something to be done about it.
#[track_caller]
fn must_name_the_option(finished: &Finished, pid: i32) {
    finished.must_exit(7);
    let (taken, pid) = (format!("process id {pid} is taken"), format!("pid {pid}"));
    let is_named = |text: &&str| {
        [&taken, &pid, "sleep", OPTION]
            .iter()
            .all(|part| text.contains(*part))
    };
    assert!(finished.refusals().iter().any(is_named), "{finished:?}");
}

#[track_caller]
fn nested(host: &Host) -> Host {
    host.nested()
        .expect("it runs in a pid namespace of its own")
}

/// It has ended, or was moved away, and its reaper with it.
#[track_caller]
fn must_be_gone(host: &Host) {
    eventually("the pid namespace to be gone", || {
        host.nested().is_none().then_some(())
    });
}

#[test]
fn a_tree_whose_numbers_are_taken_crosses_into_a_pid_namespace_and_back() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let mut subject =
        Subject::start(&pair, &pair.a, "sharing", ORDINARY, &[]).expect("it needs nothing");
    let occupant = Occupant::of(&pair.b, subject.pid);
    let mut ferry = Ferry::new(&pair);

    let mut receive = ferry.receive(Drain::On);
    let refused = ferry.migrate(subject.pid).wait();
    must_name_the_option(&refused, subject.pid);
    if receive.runs() {
        receive.signal(&pair.b, Signal::SIGTERM);
    }
    receive.wait();
    subject.must_pass("after the refusal");

    ferry.receive_options = vec![OPTION.to_owned()];
    for drain in [Drain::Off, Drain::On] {
        let receive = ferry.receive(drain);
        let mut migrate = ferry.migrate(subject.pid);
        if drain == Drain::Off {
            migrate.wait_for_phase("drain");
            subject.must_pass("in there, with its drain off");
            // It is the front that an operator can reach.
            receive.signal(&pair.b, Signal::SIGTERM);
        }
        ferry.must_succeed(migrate, receive);
        let inside = nested(&pair.b);
        assert!(subject.runs_on(&inside), "it does not run in there");
        // Its /proc shows its own numbers: it looks for its children there.
        subject.must_pass("in there");
        let reaper = inside.must("cat", &["/proc/1/comm"]);
        assert_eq!(reaper.trim(), "pageferry-init");

        // From outside it has another number, and other surroundings.
        let copy = subject.copy_on(&inside).expect("it has answered");
        let numbers = ns_pids(copy.outer);
        let outer = numbers[numbers.len() - 2];
        let from_outside = ferry.back().dump(outer, &pair.path("outside"), &[]);
        from_outside.must_exit(7);
        let is_named = |text: &&str| text.contains("is in another pid namespace");
        assert!(
            from_outside.refusals().iter().any(is_named),
            "{from_outside:?}"
        );
        subject.must_pass("after the refusal in there");

        let mut back = ferry.back();
        back.receive_options = Vec::new();
        back.source = &inside;
        back.cross(subject.pid);
        must_be_gone(&pair.b);
        subject.must_pass("at home again");
    }
    occupant.end();
    subject.end(&pair.a);
}

#[test]
fn a_restore_in_a_pid_namespace_ends_as_the_program_does_and_leaves_orphans_alone() {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(Clocks::Behind);
    let mut subject =
        Subject::start(&pair, &pair.a, "sharing", ORDINARY, &[]).expect("it needs nothing");
    let pid = subject.pid;
    let ferry = Ferry::new(&pair);
    let (image, again) = (pair.path("image"), pair.path("again"));
    ferry.dump(pid, &image, &[]).must_exit(0);
    eventually("it to be gone", || {
        pair.a.process(pid).is_none().then_some(())
    });
    let occupant = Occupant::of(&pair.a, pid);
    must_name_the_option(&ferry.restore(&image, &[]).wait(), pid);

    // Lazily, and into another image from in there.
    let lazy = [OPTION, "--detach", "--lazy", "--drain", "off"];
    let mut restoring: Running = ferry.restore(&image, &lazy);
    restoring.wait_for_phase("drain");
    subject.must_pass("restored lazily");
    restoring.signal(&pair.a, Signal::SIGTERM);
    let restored = restoring.wait();
    restored.must_exit(0);
    let inside = nested(&pair.a);
    let reached = format!("-t {} -p -m", ns_pids(inside.init)[1]);
    assert!(restored.stderr.contains(&reached), "{restored:?}");
    subject.must_pass("with all its pages");
    let mut from_inside = ferry.clone();
    from_inside.source = &inside;
    from_inside.dump(pid, &again, &[]).must_exit(0);
    must_be_gone(&pair.a);

    // Somebody waits: the program's end is the restore's, at once, and what it leaves lives on.
    let mut restoring = ferry.restore(&again, &[OPTION]);
    subject.must_pass("restored from in there");
    let inside = nested(&pair.a);
    let copy = subject.copy_on(&inside).expect("it has answered");
    copy.signal(Signal::SIGTERM);
    eventually("the restore to end", || (!restoring.runs()).then_some(()));
    let left = inside.processes();
    let is_orphan = |one: &crate::hosts::Process| one.name == copy.name && one.state == 'S';
    assert!(left.iter().any(is_orphan), "it left nobody: {left:?}");
    restoring.wait().must_exit(7);
    must_be_gone(&pair.a);

    // And one that is killed.
    let restoring = ferry.restore(&again, &[OPTION]);
    subject.must_pass("restored once more");
    let copy = subject.copy_on(&nested(&pair.a)).expect("it has answered");
    copy.signal(Signal::SIGKILL);
    restoring.wait().must_exit(137);
    must_be_gone(&pair.a);

    // Without its process 1 nobody lives on in there.
    let restoring = ferry.restore(&again, &[OPTION]);
    subject.must_pass("restored for the last time");
    let inside = nested(&pair.a);
    let reaper = nix::unistd::Pid::from_raw(inside.init);
    nix::sys::signal::kill(reaper, Signal::SIGKILL).expect("it lives");
    let lost = restoring.wait();
    assert_eq!(lost.must_exit(5).ledger().exit, 5);
    must_be_gone(&pair.a);
    eventually("all to have ended", || {
        inside.processes().is_empty().then_some(())
    });
    occupant.end();
}
