//! Every subject crosses: with the drain off, then on, there and back again, and nothing is left of it.
//!
//! One row in the table at the end is one kernel object, one program in `tests/subjects` and one test.

use std::path::Path;

use nix::sys::signal::Signal;

use crate::ferry::{Drain, Ferry};
use crate::hosts::{Before, Clocks, Host, NO_SESSION, Pair, compile, eventually, skip};
use crate::subject::{ORDINARY, ROOT, Subject};

/// What may happen to a subject.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Action {
    /// It looks at itself.
    Verify,
    /// It goes to the other host and is complete there before the next action.
    Cross,
    /// It goes to the other host, looks at itself while nothing but what it touches has come, and is then completed.
    CrossWithoutDrain,
    /// It comes to rest in an image, and runs from it when all of it is there.
    Rest,
    /// The same, but it looks at itself while nothing but what it touches has been read.
    RestLazily,
}

use Action::{Cross, CrossWithoutDrain, Rest, RestLazily, Verify};

/// There with the drain off, back with the drain on, there again; to rest and up again, lazily and whole.
pub(crate) const THERE_AND_BACK: &[Action] = &[
    Verify,
    CrossWithoutDrain,
    Verify,
    Cross,
    Verify,
    Cross,
    Verify,
    RestLazily,
    Verify,
    Rest,
    Verify,
];

/// Files that are a host's, and stay there when the subject that opened them has gone: subject, beginning of its lines.
pub(crate) const FILES: &[(&str, &str)] = &[("fifos", "file /tmp/fifo.")];

/// A subject goes through a list of actions; both hosts are then as they were.
#[track_caller]
pub(crate) fn lifecycle(
    name: &str,
    privileges: &[&str],
    arguments: &[&str],
    clocks: Clocks,
    actions: &[Action],
) {
    if skip().is_some() {
        return;
    }
    let pair = Pair::new(clocks);
    for host in [&pair.a, &pair.b] {
        for (_, files) in FILES.iter().filter(|(subject, _)| *subject == name) {
            pair.leaves(host, files);
        }
    }
    let before = Before::of(&pair);
    let Some(mut subject) = Subject::start(&pair, &pair.a, name, privileges, arguments) else {
        return;
    };
    let host = journey(&pair, subject.pid, actions, |host, when| {
        subject.must_pass(when);
        assert!(
            subject.runs_on(host),
            "{name} does not run on {} {when}",
            host.name
        );
    });
    subject.end(host);
    before.assert_nothing_left(&pair);
}

/// Takes a process that was started on A, with its children, through a list of actions. `verify` is called with the host it is on.
/// Gives the host it is on in the end.
#[track_caller]
pub(crate) fn journey<'a>(
    pair: &'a Pair,
    pid: i32,
    actions: &[Action],
    mut verify: impl FnMut(&Host, &str),
) -> &'a Host {
    let forth = Ferry::new(pair);
    let back = forth.back();
    let mut at_home = true;
    for (number, action) in actions.iter().enumerate() {
        let ferry = if at_home { &forth } else { &back };
        let when = format!(
            "at action {number} of {actions:?}, now on {}",
            ferry.source.name
        );
        match action {
            Verify => verify(ferry.source, &when),
            Cross => {
                ferry.cross(pid);
                at_home = !at_home;
            }
            CrossWithoutDrain => {
                let receive = ferry.receive(Drain::Off);
                let mut migrate = ferry.migrate(pid);
                migrate.wait_for_phase("drain");
                verify(ferry.target, &format!("with its drain off, {when}"));
                receive.signal(ferry.target, Signal::SIGTERM);
                ferry.must_succeed(migrate, receive);
                at_home = !at_home;
            }
            Rest | RestLazily => {
                let image = pair.path("image");
                ferry.dump(pid, &image, &[]).must_exit(0);
                // Killed, it is its parent's to reap.
                eventually("it to be gone", || {
                    ferry.source.process(pid).is_none().then_some(())
                });
                let restored = if matches!(action, Rest) {
                    ferry.restore(&image, &["--detach"])
                } else {
                    let lazy = &["--detach", "--lazy", "--drain", "off"];
                    let mut restoring = ferry.restore(&image, lazy);
                    restoring.wait_for_phase("drain");
                    verify(ferry.source, &format!("restored lazily, {when}"));
                    restoring.signal(ferry.source, Signal::SIGTERM);
                    restoring
                };
                restored.wait().must_exit(0);
                std::fs::remove_dir_all(image).expect("it was dumped there");
            }
        }
        let (here, there) = if at_home {
            (&pair.a, &pair.b)
        } else {
            (&pair.b, &pair.a)
        };
        assert!(
            here.process(pid).is_some(),
            "it is not on {} {when}",
            here.name
        );
        // Killed, it is its parent's to reap.
        eventually(&format!("it to be gone from {} {when}", there.name), || {
            there.process(pid).is_none().then_some(())
        });
    }
    if at_home { &pair.a } else { &pair.b }
}

#[test]
fn a_thousand_threads_cross_and_come_back() {
    lifecycle(
        "threads",
        ORDINARY,
        &["1000"],
        Clocks::Behind,
        &[Verify, Cross, Verify, Cross, Verify],
    );
}

/// The clock's page is mapped from the host: a thread that was stopped between reading two words of it, and went on elsewhere,
/// would see a time that never was.
#[test]
fn threads_that_stand_in_the_vdso_never_see_a_wrong_time() {
    let there_and_back = [Cross, Cross, Verify];
    lifecycle(
        "clocks",
        ORDINARY,
        &["4"],
        Clocks::FarAhead,
        &there_and_back.repeat(20),
    );
}

/// `--clock jump`: it gets the target's clocks, and its timers go on with what they had left.
#[test]
fn clocks_jump_where_that_is_asked_for() {
    if skip().is_some() {
        return;
    }
    for clocks in [Clocks::Behind, Clocks::FarAhead] {
        let pair = Pair::new(clocks);
        let mut ferry = Ferry::new(&pair);
        let options = ["--clock".to_owned(), "jump".to_owned()];
        let mut subject = Subject::start(&pair, &pair.a, "interval_timers", ORDINARY, &[])
            .expect("it needs nothing");
        subject.must_pass("at home");
        for jumps in [true, false, true] {
            ferry.receive_options = if jumps { options.to_vec() } else { Vec::new() };
            ferry.cross(subject.pid);
            let when = format!("{clocks:?}, on {}, jumps: {jumps}", ferry.target.name);
            subject.must_pass(&when);
            let copy = subject.copy_on(ferry.target).expect("it has answered");
            let own = std::fs::read_link(copy.proc("ns/time")).expect("it runs");
            let of_host = ferry.target.must("readlink", &["/proc/self/ns/time"]);
            assert_eq!(own.to_str() == Some(of_host.trim_end()), jumps, "{when}");
            ferry = ferry.back();
        }
        subject.end(&pair.b);
    }
}

#[test]
fn a_disarmed_interval_timer_that_keeps_its_interval_stays_disarmed() {
    let disarmed = &["disarmed"];
    lifecycle(
        "interval_timers",
        ORDINARY,
        disarmed,
        Clocks::Behind,
        THERE_AND_BACK,
    );
}

/// Its session, and without job control its group too, are led by a shell that stays behind; or by somebody outside the
/// container, whose number is 0 inside.
#[test]
fn programs_of_a_shell_lead_a_session_of_their_own_elsewhere() {
    if skip().is_some() {
        return;
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/subjects/leaders.c");
    let program = compile(&source, "leaders", &[]);
    let from_outside = [&[NO_SESSION], ORDINARY].concat();
    for (privileges, script) in [
        (ORDINARY, "\"$0\" \"$@\" & wait"),
        (ORDINARY, "set -m; \"$0\" \"$@\" & wait"),
        (&from_outside, "exec \"$0\" \"$@\""),
    ] {
        let pair = Pair::new(Clocks::Behind);
        let (own, state) = (program.display().to_string(), pair.path("leaders.state"));
        let state = state.display().to_string();
        let command = ["bash", "-c", script, &own, "--state", &state];
        let mut subject =
            Subject::launch(&pair, &pair.a, "leaders", &program, privileges, &command)
                .expect("it needs nothing");
        let pid = subject.pid;
        let mut is_at_home = true;
        let host = journey(
            &pair,
            pid,
            &[Verify, Cross, Verify, Cross, Rest, Verify],
            |host, when| {
                subject.must_pass(when);
                let copy = subject.copy_on(host).expect("it has answered");
                let stat = std::fs::read_to_string(copy.proc("stat")).expect("it runs");
                let fields: Vec<&str> = stat.split(' ').collect();
                // Group and session, as the test sees them, from outside.
                let outer = copy.outer.to_string();
                let leads = fields[4..6] == [outer.as_str(); 2];
                assert_ne!(leads, std::mem::take(&mut is_at_home), "{script} {when}");
            },
        );
        subject.end(host);
    }
}

/// The table: `test name: subject, privileges, clocks of B`.
macro_rules! objects {
    ($($test:ident: $subject:literal, $privileges:expr, $clocks:ident;)*) => {
        /// The subjects that cross, by name.
        pub(crate) const SUBJECTS: &[(&str, &[&str])] = &[$(($subject, $privileges)),*];

        $(
            #[test]
            fn $test() {
                lifecycle($subject, $privileges, &[], Clocks::$clocks, THERE_AND_BACK);
            }
        )*
    };
}

objects! {
    threads_and_their_storage_cross: "threads", ORDINARY, Behind;
    registers_cross_in_full_width: "registers", ORDINARY, FarAhead;
    restartable_sequences_cross_and_abort: "rseq", ORDINARY, Behind;
    robust_lists_cross: "robust_list", ORDINARY, FarAhead;
    clear_child_tid_crosses: "clear_child_tid", ORDINARY, Behind;
    signal_actions_masks_and_stacks_cross: "signal_actions", ORDINARY, FarAhead;
    pending_signals_cross_in_order: "pending_signals", ORDINARY, Behind;
    credentials_of_each_thread_cross: "credentials", ROOT, FarAhead;
    resource_limits_cross: "limits", ORDINARY, Behind;
    scheduling_of_each_thread_crosses: "scheduling", ORDINARY, FarAhead;
    process_settings_cross: "process_settings", ORDINARY, Behind;
    surroundings_cross: "surroundings", ORDINARY, FarAhead;
    clocks_go_on_where_the_other_host_is_behind: "clocks", ORDINARY, Behind;
    clocks_go_on_where_the_other_host_is_far_ahead: "clocks", ORDINARY, FarAhead;
    private_memory_crosses: "memory_chain", ORDINARY, Behind;
    copied_pages_of_private_files_cross: "private_file", ORDINARY, FarAhead;
    shared_file_mappings_cross: "shared_file", ORDINARY, Behind;
    shared_memory_crosses_and_is_shared: "shared_memory", ORDINARY, FarAhead;
    system_v_shared_memory_crosses: "sysv_memory", ORDINARY, Behind;
    memfds_cross_with_their_seals: "memfds", ORDINARY, Behind;
    files_on_a_tmpfs_and_deleted_ones_go_along: "tmpfs_files", ORDINARY, FarAhead;
    guard_pages_cross_and_are_followed: "guard_pages", ORDINARY, FarAhead;
    locked_memory_crosses: "locked_memory", ORDINARY, Behind;
    advice_and_names_of_mappings_cross: "advice", ORDINARY, FarAhead;
    growing_stacks_cross_and_grow_on: "growing_stack", ORDINARY, Behind;
    forks_during_the_drain_are_followed: "forking", ORDINARY, FarAhead;
    moved_and_dropped_memory_is_followed: "remapping", ORDINARY, Behind;
    regular_files_cross: "regular_file", ORDINARY, FarAhead;
    open_directories_cross: "directory", ORDINARY, Behind;
    devices_cross: "devices", ORDINARY, FarAhead;
    pipes_cross_with_their_contents: "pipes", ORDINARY, Behind;
    eventfds_cross: "eventfds", ORDINARY, FarAhead;
    epolls_cross_with_many_items: "epolls", ORDINARY, Behind;
    timerfds_cross_where_the_clock_is_behind: "timerfds", ORDINARY, Behind;
    timerfds_cross_where_the_clock_is_far_ahead: "timerfds", ORDINARY, FarAhead;
    signalfds_cross: "signalfds", ORDINARY, Behind;
    tcp_listeners_cross: "tcp_listeners", ORDINARY, FarAhead;
    udp_sockets_cross: "udp_sockets", ORDINARY, Behind;
    socketpairs_cross_with_their_contents: "socketpairs", ORDINARY, FarAhead;
    interval_timers_cross: "interval_timers", ORDINARY, Behind;
    posix_timers_cross: "posix_timers", ORDINARY, FarAhead;
    trees_of_processes_cross_with_what_they_share: "tree", ORDINARY, Behind;
    ended_children_cross_and_are_found_once: "zombies", ORDINARY, FarAhead;
    sessions_and_groups_outlive_their_leaders_on_the_way: "leaders", ORDINARY, Behind;
    exit_signals_of_children_cross: "exit_signals", ORDINARY, FarAhead;
    programs_that_make_children_all_the_time_cross: "restless", ORDINARY, Behind;
    descriptors_that_processes_share_cross: "shared_descriptors", ORDINARY, FarAhead;
    tables_and_directories_of_several_processes_cross: "sharing", ORDINARY, FarAhead;
    processes_in_one_memory_cross_in_one: "common_memory", ORDINARY, Behind;
    unix_sockets_cross_with_names_and_connections: "unix_sockets", ORDINARY, Behind;
    descriptors_in_flight_cross_and_reach_what_they_did: "descriptors_in_flight", ORDINARY, FarAhead;
    messages_tell_who_sent_them_elsewhere_too: "message_senders", ORDINARY, Behind;
    connections_that_wait_to_be_accepted_cross_in_order: "pending_connections", ORDINARY, FarAhead;
    locks_on_files_cross_and_are_waited_for: "locks", ORDINARY, Behind;
    leases_cross_and_tell_whom_they_told: "leases", ORDINARY, FarAhead;
    named_pipes_cross_with_their_contents: "fifos", ORDINARY, FarAhead;
    blocking_calls_cross_without_returning: "blocking", ORDINARY, Behind;
}
