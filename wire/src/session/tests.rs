//! Both sessions joined in memory, with every order of events that a seed can make: frames in flight, links that die and come
//! back, actions that fail, operators who cancel, engines that are killed. After each step at most one copy runs; at the end
//! exactly one does wherever nobody was killed.

use std::collections::VecDeque;

use super::*;
use crate::message::{Refusal, Role};
use pageferry_image::model::task::Host;

/// xorshift64*: good enough to choose among events, and the same everywhere.
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }

    fn one_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }
}

/// What may go wrong in a run.
#[derive(Debug, Clone, Copy, Default)]
struct Faults {
    links: bool,
    cancels: bool,
    prepared_dies: bool,
    actions: bool,
    journals: bool,
    crashes: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SourceCopy {
    Runs,
    Stopped,
    Parked,
    Dead,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TargetCopy {
    Absent,
    Prepared,
    Runs,
    Gone,
}

/// What an action's end tells the session.
#[derive(Debug)]
enum Report {
    None,
    Frozen,
    Captured,
    EagerSent,
    Parked,
    Killed,
    Recorded(Record),
    RecordFailed(Record),
    Failed,
    Verdict,
    Rebuilt,
    ExitKillCleared,
    Released,
    Destroyed,
    DestroyFailed,
}

struct Pair {
    dice: Dice,
    faults: Faults,
    rows: Vec<String>,
    source: Source,
    target: Target,
    source_report: Option<Report>,
    target_report: Option<Report>,
    source_journal: Vec<Record>,
    target_journal: Vec<Record>,
    source_copy: SourceCopy,
    target_copy: TargetCopy,
    source_end: Option<SourceEnd>,
    target_end: Option<TargetEnd>,
    to_target: VecDeque<Frame>,
    to_source: VecDeque<Frame>,
    linked: bool,
    source_noticed: bool,
    target_noticed: bool,
    source_crashed: bool,
    target_crashed: bool,
    reconnecting: bool,
    cut_short: u32,
}

#[derive(Debug, Clone, Copy)]
enum Event {
    SourceActs,
    TargetActs,
    SourceReports,
    TargetReports,
    SourceReceives,
    TargetReceives,
    LinkDies,
    SourceNotices,
    TargetNotices,
    Reconnected,
    PagesArrived,
    SourceCancels,
    TargetCancels,
    PreparedDies,
    DrainFails,
    SourceCrashes,
    TargetCrashes,
}

fn host_of_pages(page_size: u32) -> Host {
    Host {
        page_size,
        ..Host::default()
    }
}

fn plan() -> Plan {
    Plan {
        pid: 4711,
        tids: vec![4711],
        host: Some(host_of_pages(4096)),
        ..Plan::default()
    }
}

impl Pair {
    fn new(seed: u64, faults: Faults) -> Self {
        Self {
            dice: Dice::new(seed),
            faults,
            rows: Vec::new(),
            source: Source::new(Hello::new([7; 16], Role::Control, "alpha"), plan()),
            target: Target::new("beta"),
            source_report: None,
            target_report: None,
            source_journal: Vec::new(),
            target_journal: Vec::new(),
            source_copy: SourceCopy::Runs,
            target_copy: TargetCopy::Absent,
            source_end: None,
            target_end: None,
            to_target: VecDeque::new(),
            to_source: VecDeque::new(),
            linked: true,
            source_noticed: false,
            target_noticed: false,
            source_crashed: false,
            target_crashed: false,
            reconnecting: false,
            cut_short: 0,
        }
    }

    fn enabled(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        let mut add = |event, enabled: bool| {
            if enabled {
                events.push(event)
            }
        };
        add(
            Event::SourceActs,
            !self.source_crashed && self.source_report.is_none() && !self.source.actions.is_empty(),
        );
        add(
            Event::TargetActs,
            !self.target_crashed && self.target_report.is_none() && !self.target.actions.is_empty(),
        );
        add(
            Event::SourceReports,
            !self.source_crashed && self.source_report.is_some(),
        );
        add(
            Event::TargetReports,
            !self.target_crashed && self.target_report.is_some(),
        );
        add(
            Event::SourceReceives,
            self.linked && !self.source_crashed && !self.to_source.is_empty(),
        );
        add(
            Event::TargetReceives,
            self.linked && !self.target_crashed && !self.to_target.is_empty(),
        );
        add(
            Event::SourceNotices,
            !self.linked && !self.source_noticed && !self.source_crashed,
        );
        add(
            Event::TargetNotices,
            !self.linked && !self.target_noticed && !self.target_crashed,
        );
        let both_know = self.source_noticed && self.target_noticed;
        add(
            Event::Reconnected,
            self.reconnecting && both_know && !self.source_crashed && !self.target_crashed,
        );
        let frozen = matches!(self.source_copy, SourceCopy::Stopped | SourceCopy::Parked)
            && !self.source_crashed;
        let draining = self.target.stage == TargetStage::Drain && !self.target_crashed;
        add(Event::PagesArrived, draining && frozen && self.linked);
        // A fault is rare, so that runs get far; and there are only so many of them, so that they end.
        if self.cut_short < 6 && self.dice.one_in(24) {
            let faults = self.faults;
            add(Event::LinkDies, faults.links && self.linked);
            add(Event::SourceCancels, faults.cancels && !self.source_crashed);
            add(Event::TargetCancels, faults.cancels && !self.target_crashed);
            add(
                Event::PreparedDies,
                faults.prepared_dies
                    && self.target_copy == TargetCopy::Prepared
                    && !self.target_crashed,
            );
            add(
                Event::DrainFails,
                faults.actions && self.target_copy == TargetCopy::Runs && !self.target_crashed,
            );
            add(Event::SourceCrashes, faults.crashes && !self.source_crashed);
            add(Event::TargetCrashes, faults.crashes && !self.target_crashed);
        }
        events
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::SourceActs => self.source_acts(),
            Event::TargetActs => self.target_acts(),
            Event::SourceReports => self.source_reports(),
            Event::TargetReports => self.target_reports(),
            Event::SourceReceives => {
                let frame = self.to_source.pop_front().expect("enabled");
                self.rows.push(format!("  <- {}", frame.tag()));
                self.source
                    .handle_frame(frame)
                    .expect("the peer keeps the order");
            }
            Event::TargetReceives => {
                let frame = self.to_target.pop_front().expect("enabled");
                self.rows.push(format!("  -> {}", frame.tag()));
                self.target
                    .handle_frame(frame)
                    .expect("the peer keeps the order");
            }
            Event::LinkDies => self.cut(),
            Event::SourceNotices => {
                self.source_noticed = true;
                self.source.handle_link_lost("link");
            }
            Event::TargetNotices => {
                self.target_noticed = true;
                self.target.handle_link_lost("link");
            }
            Event::Reconnected => {
                (
                    self.linked,
                    self.source_noticed,
                    self.target_noticed,
                    self.reconnecting,
                ) = (true, false, false, false);
                self.source.handle_link_restored();
                self.target.handle_link_restored();
            }
            Event::PagesArrived => self.target.handle_resident(Resident::default()),
            Event::SourceCancels => {
                let _ = self.source.handle_cancel();
            }
            Event::TargetCancels => {
                let _ = self.target.handle_cancel();
            }
            Event::PreparedDies => {
                self.target_copy = TargetCopy::Gone;
                self.target.handle_failed("the prepared process was killed");
            }
            Event::DrainFails => self.target.handle_failed("a page is lost"),
            Event::SourceCrashes => {
                self.source_crashed = true;
                self.source_report = None;
                // A tracer's death lets the stopped go on; the keeper decides about the parked.
                match self.source_copy {
                    SourceCopy::Stopped => self.source_copy = SourceCopy::Runs,
                    SourceCopy::Parked if source_may_run(&self.source_journal) => {
                        self.source_copy = SourceCopy::Runs
                    }
                    _ => {}
                }
                self.cut();
            }
            Event::TargetCrashes => {
                self.target_crashed = true;
                self.target_report = None;
                // EXITKILL before the release, the supervisor after it.
                if self.target_copy != TargetCopy::Absent {
                    self.target_copy = TargetCopy::Gone;
                }
                self.cut();
            }
        }
        match event {
            Event::LinkDies
            | Event::SourceCancels
            | Event::TargetCancels
            | Event::PreparedDies
            | Event::DrainFails
            | Event::SourceCrashes
            | Event::TargetCrashes => self.cut_short += 1,
            _ => {}
        }
    }

    fn cut(&mut self) {
        self.linked = false;
        self.to_source.clear();
        self.to_target.clear();
    }

    fn source_acts(&mut self) {
        let Some(action) = self.source.poll() else {
            return;
        };
        self.rows.push(format!("S {action:?}"));
        let fails = self.faults.actions && self.dice.one_in(16);
        self.source_report = Some(match action {
            SourceAction::Send(frame) => {
                if self.linked {
                    self.to_target.push_back(frame);
                }
                Report::None
            }
            SourceAction::Freeze
            | SourceAction::Capture
            | SourceAction::Park
            | SourceAction::Kill
                if fails =>
            {
                Report::Failed
            }
            SourceAction::Freeze => {
                self.source_copy = SourceCopy::Stopped;
                Report::Frozen
            }
            SourceAction::Capture => Report::Captured,
            SourceAction::Park => {
                self.source_copy = SourceCopy::Parked;
                Report::Parked
            }
            SourceAction::Record(record) => write(
                &mut self.dice,
                self.faults,
                &mut self.source_journal,
                record,
            ),
            SourceAction::Thaw => {
                assert_ne!(
                    self.source_copy,
                    SourceCopy::Dead,
                    "a dead copy is not thawed"
                );
                self.source_copy = SourceCopy::Runs;
                Report::None
            }
            SourceAction::Kill => {
                let there = self.target_copy == TargetCopy::Runs || self.target_crashed;
                assert!(
                    self.target.resident.is_some() && there,
                    "killed only when wholly there"
                );
                self.source_copy = SourceCopy::Dead;
                Report::Killed
            }
            SourceAction::Serve(_) => Report::None,
            SourceAction::Reconnect => {
                self.reconnecting = true;
                Report::None
            }
            SourceAction::Finish(end) => {
                assert!(
                    self.source_end.replace(end).is_none(),
                    "the source finishes once"
                );
                Report::None
            }
        });
    }

    fn source_reports(&mut self) {
        match self.source_report.take().expect("enabled") {
            Report::Frozen => self.source.handle_frozen(),
            Report::Captured => {
                self.source.handle_captured(State {
                    tree: bytes::Bytes::new(),
                });
                self.source_report = Some(Report::EagerSent);
            }
            Report::EagerSent => self.source.handle_eager_sent(3),
            Report::Parked => self.source.handle_parked(),
            Report::Killed => self.source.handle_killed(),
            Report::Recorded(record) => self.source.handle_recorded(record),
            Report::RecordFailed(record) => self.source.handle_record_failed(record, "disk"),
            Report::Failed => self.source.handle_failed("action"),
            _ => {}
        }
    }

    fn target_acts(&mut self) {
        let Some(action) = self.target.poll() else {
            return;
        };
        self.rows
            .push(format!("                         T {action:?}"));
        let fails = self.faults.actions && self.dice.one_in(16);
        self.target_report = Some(match action {
            TargetAction::Send(frame) => {
                let refuses = matches!(frame, Frame::Refused(_));
                assert!(
                    !refuses || self.target_copy != TargetCopy::Prepared,
                    "refused while something is left"
                );
                if self.linked {
                    self.to_source.push_back(frame);
                }
                Report::None
            }
            TargetAction::Prepare
            | TargetAction::Rebuild(_)
            | TargetAction::ClearExitKill
            | TargetAction::Release
                if fails =>
            {
                Report::Failed
            }
            TargetAction::Destroy if fails => Report::DestroyFailed,
            TargetAction::Check(_) => Report::Verdict,
            TargetAction::Prepare => {
                self.target_copy = TargetCopy::Prepared;
                Report::None
            }
            TargetAction::Rebuild(_) => Report::None,
            TargetAction::EagerPages(_) => Report::Rebuilt,
            TargetAction::Record(record) => write(
                &mut self.dice,
                self.faults,
                &mut self.target_journal,
                record,
            ),
            TargetAction::ClearExitKill => Report::ExitKillCleared,
            TargetAction::Release => {
                assert!(
                    target_may_have_run(&self.target_journal),
                    "nothing runs that is not recorded"
                );
                if self.target_copy == TargetCopy::Prepared {
                    self.target_copy = TargetCopy::Runs;
                }
                Report::Released
            }
            TargetAction::Destroy => {
                self.target_copy = TargetCopy::Gone;
                Report::Destroyed
            }
            TargetAction::Finish(end) => {
                assert!(
                    self.target_end.replace(end).is_none(),
                    "the target finishes once"
                );
                Report::None
            }
            TargetAction::Map(_)
            | TargetAction::MapEnd(_)
            | TargetAction::Wait
            | TargetAction::SourceLost(_) => Report::None,
        });
    }

    fn target_reports(&mut self) {
        match self.target_report.take().expect("enabled") {
            Report::Verdict => self.target.handle_verdict(Verdict::default()),
            Report::Rebuilt => self.target.handle_rebuilt(Ready::default()),
            Report::ExitKillCleared => self.target.handle_exit_kill_cleared(),
            Report::Released => self.target.handle_released(Running::default()),
            Report::Destroyed => self.target.handle_destroyed(),
            Report::DestroyFailed => self.target.handle_destroy_failed("action"),
            Report::Recorded(record) => self.target.handle_recorded(record),
            Report::RecordFailed(record) => self.target.handle_record_failed(record, "disk"),
            Report::Failed => self.target.handle_failed("action"),
            _ => {}
        }
    }

    fn check(&self) {
        let (here, there) = (
            self.source_copy == SourceCopy::Runs,
            self.target_copy == TargetCopy::Runs,
        );
        assert!(!(here && there), "two copies run");
        assert!(
            !(self.source.may_run() && self.target.may_run()),
            "both believe that they may run"
        );
        assert!(
            self.source_crashed || !here || self.source.may_run(),
            "the source runs without the right"
        );
        assert!(
            self.target_crashed || !there || self.target.may_run(),
            "the target runs without the right"
        );
    }

    fn running(&self) -> u32 {
        u32::from(self.source_copy == SourceCopy::Runs)
            + u32::from(self.target_copy == TargetCopy::Runs)
    }

    /// Runs until nothing can happen any more; returns the number of steps.
    fn drive(&mut self) -> u32 {
        for step in 0..10_000 {
            let events = self.enabled();
            if events.is_empty() {
                return step;
            }
            let event =
                events[usize::try_from(self.dice.below(events.len() as u64)).expect("small")];
            self.rows.push(format!(
                "{step:4} {event:?}: {:?} {:?} | {:?} {:?} | link {}",
                self.source.stage,
                self.source_copy,
                self.target.stage,
                self.target_copy,
                self.linked
            ));
            self.happen(event);
            self.check();
        }
        panic!("it does not end");
    }
}

/// A failed write may have reached the disk or not.
fn write(dice: &mut Dice, faults: Faults, journal: &mut Vec<Record>, record: Record) -> Report {
    let fails = faults.journals && dice.one_in(12);
    if !fails || dice.one_in(2) {
        journal.push(record);
    }
    if fails {
        Report::RecordFailed(record)
    } else {
        Report::Recorded(record)
    }
}

/// Runs `check` after every run of `seeds`, and tells the story of the one that fails.
fn simulate(seeds: u64, faults: Faults, check: impl Fn(&Pair)) {
    for seed in 0..seeds {
        let mut pair = Pair::new(seed, faults);
        let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pair.drive();
            check(&pair);
        }));
        if let Err(panic) = told {
            for row in &pair.rows {
                println!("{row}");
            }
            println!(
                "seed {seed}, {faults:?}, ends: {:?} {:?}",
                pair.source_end, pair.target_end
            );
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn where_nothing_fails_the_process_crosses() {
    simulate(500, Faults::default(), |pair| {
        assert_eq!(
            (pair.source_copy, pair.target_copy),
            (SourceCopy::Dead, TargetCopy::Runs)
        );
        assert!(matches!(pair.source_end, Some(SourceEnd::Done(_))));
        assert!(matches!(
            pair.target_end,
            Some(TargetEnd::Done {
                confirmed: true,
                ..
            })
        ));
        use Record::{Commit, Done, Park, Releasing, Resident, Run};
        assert_eq!(pair.source_journal, [Park, Commit, Resident, Done]);
        assert_eq!(pair.target_journal, [Run, Releasing, Resident, Done]);
    });
}

#[test]
fn whatever_links_operators_and_prepared_processes_do_exactly_one_copy_runs_in_the_end() {
    let faults = Faults {
        links: true,
        cancels: true,
        prepared_dies: true,
        ..Faults::default()
    };
    simulate(20_000, faults, |pair| assert_eq!(pair.running(), 1));
}

#[test]
fn failing_actions_never_make_two_and_cost_the_process_only_after_release() {
    let faults = Faults {
        links: true,
        cancels: true,
        prepared_dies: true,
        actions: true,
        ..Faults::default()
    };
    simulate(20_000, faults, |pair| {
        // Zero only where the release, or the destruction that a refusal rests on, failed.
        let lost = matches!(pair.target_end, Some(TargetEnd::Lost { .. }));
        assert!(
            pair.running() == 1 || lost,
            "nobody runs, and nobody failed to release or to destroy"
        );
    });
}

#[test]
fn full_disks_never_make_two() {
    let faults = Faults {
        links: true,
        cancels: true,
        journals: true,
        ..Faults::default()
    };
    simulate(20_000, faults, |pair| {
        let lost = matches!(pair.target_end, Some(TargetEnd::Lost { .. }));
        assert!(pair.running() == 1 || lost);
    });
}

#[test]
fn killed_engines_never_make_two() {
    let faults = Faults {
        links: true,
        cancels: true,
        prepared_dies: true,
        actions: true,
        journals: true,
        crashes: true,
    };
    simulate(50_000, faults, |_| ());
}

#[test]
fn a_source_engine_killed_before_commit_leaves_a_running_process() {
    let faults = Faults {
        crashes: true,
        ..Faults::default()
    };
    simulate(20_000, faults, |pair| {
        if pair.source_crashed && source_may_run(&pair.source_journal) {
            assert_eq!(pair.source_copy, SourceCopy::Runs);
            assert_ne!(pair.target_copy, TargetCopy::Runs);
        }
    });
}

#[test]
fn an_abort_after_commit_does_not_thaw() {
    let mut pair = Pair::new(1, Faults::default());
    while pair.source.stage != SourceStage::Answer {
        let events = pair.enabled();
        pair.happen(events[0]);
    }
    let abort = Abort::new(Phase::Commit, AbortCode::Failed, "a lie");
    pair.source
        .handle_frame(abort.into())
        .expect("an abort may always come");
    assert!(!pair.source.may_run());
    while let Some(action) = pair.source.poll() {
        assert_ne!(action, SourceAction::Thaw);
    }
}

#[test]
fn refusals_of_the_plan_touch_nothing() {
    let mut source = Source::new(Hello::new([7; 16], Role::Control, "alpha"), plan());
    source
        .handle_frame(
            Welcome {
                version: 1,
                host_name: "beta".into(),
            }
            .into(),
        )
        .expect("in order");
    let refusal = Refusal {
        object: "pid 4711".into(),
        text: "is taken".into(),
    };
    source
        .handle_frame(
            Verdict {
                refusals: vec![refusal],
                ..Verdict::default()
            }
            .into(),
        )
        .expect("in order");
    let actions: Vec<_> = std::iter::from_fn(|| source.poll()).collect();
    assert!(matches!(
        actions.as_slice(),
        [
            SourceAction::Send(Frame::Hello(_)),
            SourceAction::Send(Frame::Plan(_)),
            SourceAction::Finish(SourceEnd::Refused(_))
        ]
    ));
}

#[test]
fn a_frame_out_of_order_ends_the_crossing_before_commit() {
    for frame in [
        Frame::from(Running::default()),
        Ready::default().into(),
        Resident::default().into(),
        Commit {}.into(),
    ] {
        let mut source = Source::new(Hello::new([7; 16], Role::Control, "alpha"), plan());
        assert!(matches!(
            source.handle_frame(frame),
            Err(Error::Order {
                phase: Phase::Hello,
                ..
            })
        ));
        let last = std::iter::from_fn(|| source.poll()).last();
        assert!(matches!(
            last,
            Some(SourceAction::Finish(SourceEnd::Failed { .. }))
        ));
    }
    for frame in [
        Frame::from(Commit {}),
        plan().into(),
        Done::default().into(),
        Ready::default().into(),
    ] {
        let mut target = Target::new("beta");
        assert!(matches!(
            target.handle_frame(frame),
            Err(Error::Order {
                phase: Phase::Hello,
                ..
            })
        ));
        let last = std::iter::from_fn(|| target.poll()).last();
        assert!(matches!(
            last,
            Some(TargetAction::Finish(TargetEnd::Failed { .. }))
        ));
    }
}

#[test]
fn hosts_without_a_common_version_say_so() {
    let mut target = Target::new("beta");
    let mut hello = Hello::new([7; 16], Role::Control, "alpha");
    (hello.version_min, hello.version_max) = (98, 99);
    assert!(matches!(
        target.handle_frame(hello.into()),
        Err(Error::Version {
            peer_min: 98,
            peer_max: 99
        })
    ));
    assert!(
        matches!(target.poll(), Some(TargetAction::Send(Frame::Abort(abort))) if abort.code() == AbortCode::Version)
    );
}

#[test]
fn record_names_go_there_and_back() {
    for record in Record::ALL {
        assert_eq!(Record::from_name(record.name()), Some(record));
    }
    assert_eq!(Record::from_name(""), None);
}
