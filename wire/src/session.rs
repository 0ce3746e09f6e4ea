//! Both sides of a crossing as pure state machines: who may say what when, and who holds the right to run. Frames and reports go
//! in by `handle_*`, actions come out by `poll`; nothing here waits, reads a clock or touches a process.
//!
//! The shell does the actions one after the other, in order, each to its end, and reports those that say so. A late report is
//! ignored, so that an abort may overtake what is being done.
//!
//! ```text
//!      source                                        target
//!      HELLO, PLAN        ------------------------>  Check
//!      Freeze, Capture    <------------------------  VERDICT; Prepare
//!      STATE, STATE_END   ------------------------>  Rebuild
//!      record PARK, Park  <------------------------  READY
//!      record COMMIT
//!      COMMIT             ------------------------>  record RUN, ClearExitKill, record RELEASING, Release
//!      Serve              <------------------------  RUNNING
//!      record RESIDENT, Kill <---------------------  RESIDENT
//!      record DONE, DONE  ------------------------>  record DONE
//! ```
//!
//! **Exactly one copy runs.** The source holds the right to run until its shell is told to record COMMIT. From then on it gets it
//! back only by the target's REFUSED, or because COMMIT was never sent. The target takes it by recording RELEASING, and gives it
//! up for good by recording REFUSED, after which it destroys what it prepared and says so.

use std::collections::VecDeque;
use std::fmt;

use crate::message::{
    Abort, AbortCode, Commit, Done, Hello, Map, MapEnd, Plan, Ready, Refused, Resident, Running,
    State, StateEnd, Verdict, Welcome,
};
use crate::{Error, Frame, Phase, Result};

/// What the journals of both hosts record about one migration, in the order in which it can happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Record {
    /// Source: the processes are about to be stopped in a way that outlives us. Without [`Record::Commit`] after it, whoever
    /// finds them stopped lets them go.
    Park,
    /// Source: the right to run is about to be handed over.
    Commit,
    /// Source: locks of the stopped processes are about to be given up. Without [`Record::Thawed`] after it they may lack them, and
    /// only somebody who knows that lets them go.
    Unlocked,
    /// Target: COMMIT has come, and it will be accepted unless something fails now.
    Run,
    /// Target: the process is about to run; from here on it can never be refused.
    Releasing,
    /// Target: it will never run here. Source: it has the right to run back.
    Refused,
    /// Source: nothing holds its copy any more, and it has all its locks.
    Thawed,
    /// Every page is on the target.
    Resident,
    /// The source copy is gone.
    Done,
}

impl Record {
    /// Every record.
    pub const ALL: [Self; 9] = [
        Self::Park,
        Self::Commit,
        Self::Unlocked,
        Self::Run,
        Self::Releasing,
        Self::Refused,
        Self::Thawed,
        Self::Resident,
        Self::Done,
    ];

    /// The word in the journal.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Park => "park",
            Self::Commit => "commit",
            Self::Unlocked => "unlocked",
            Self::Run => "run",
            Self::Releasing => "releasing",
            Self::Refused => "refused",
            Self::Thawed => "thawed",
            Self::Resident => "resident",
            Self::Done => "done",
        }
    }

    /// The record with this word.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|record| record.name() == name)
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a source's journal says: true if its copy may be let run. The keeper asks this when the engine has died.
pub fn source_may_run(records: &[Record]) -> bool {
    !records.contains(&Record::Commit) || records.contains(&Record::Refused)
}

/// What a target's journal says: true if its copy may have executed an instruction.
pub fn target_may_have_run(records: &[Record]) -> bool {
    records.contains(&Record::Releasing) && !records.contains(&Record::Refused)
}

/// What the source's shell is to do next.
#[derive(Debug, Clone, PartialEq)]
#[allow(
    clippy::large_enum_variant,
    reason = "few are queued at once, and a frame is what most of them are"
)]
pub enum SourceAction {
    /// Send this on the control stream. A failure is reported as [`Source::handle_link_lost`].
    Send(Frame),
    /// Stop every thread. Report [`Source::handle_frozen`].
    Freeze,
    /// Read the kernel objects. Report [`Source::handle_captured`], and when the eager pages are on their way
    /// [`Source::handle_eager_sent`].
    Capture,
    /// Write this record. Report [`Source::handle_recorded`].
    Record(Record),
    /// Make the stop outlive us. Report [`Source::handle_parked`].
    Park,
    /// The process runs on the target: scan the page map, send it, serve pages.
    Serve(Running),
    /// Let the process go on as if nothing had happened, however far freeze and park have come: it has the right to run.
    Thaw,
    /// Every page has arrived: end the copy. Report [`Source::handle_killed`].
    Kill,
    /// The copy stays stopped. Reach the target again if that can be, and report [`Source::handle_link_restored`].
    Reconnect,
    /// It is over. Nothing more comes.
    Finish(SourceEnd),
}

/// How a crossing ended for the source.
#[derive(Debug, Clone, PartialEq)]
pub enum SourceEnd {
    /// The process runs on the target, wholly, and the copy is gone.
    Done(Resident),
    /// The target found things that cannot be carried; nothing was touched.
    Refused(Verdict),
    /// It did not work; the process runs on here.
    Failed {
        /// Where.
        phase: Phase,
        /// Why.
        text: String,
    },
    /// After COMMIT something was lost; the copy here stays stopped.
    Lost {
        /// Why.
        text: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum SourceStage {
    Hello,
    Plan,
    Freeze,
    Capture,
    Sending,
    Rebuild,
    Parking,
    /// COMMIT is to be recorded, or is being recorded.
    Committing,
    /// COMMIT was sent, or could not be.
    Answer,
    /// REFUSED is being recorded: the right to run is back.
    Returning,
    Drain,
    Killing,
    Ending,
    Over,
}

/// The source's session.
#[derive(Debug)]
pub struct Source {
    stage: SourceStage,
    linked: bool,
    gave_right: bool,
    plan: Option<Plan>,
    verdict: Option<Verdict>,
    resident: Option<Resident>,
    figures: Done,
    /// Why the crossing must end, where that has to wait for a record.
    failure: Option<String>,
    actions: VecDeque<SourceAction>,
}

impl Source {
    /// A crossing about to begin, over a control stream on which nothing has been sent.
    pub fn new(hello: Hello, plan: Plan) -> Self {
        Self {
            stage: SourceStage::Hello,
            linked: true,
            gave_right: false,
            plan: Some(plan),
            verdict: None,
            resident: None,
            figures: Done::default(),
            failure: None,
            actions: VecDeque::from([SourceAction::Send(hello.into())]),
        }
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        match self.stage {
            SourceStage::Hello => Phase::Hello,
            SourceStage::Plan => Phase::Plan,
            SourceStage::Freeze => Phase::Freeze,
            SourceStage::Capture | SourceStage::Sending => Phase::Capture,
            SourceStage::Rebuild => Phase::Rebuild,
            SourceStage::Parking => Phase::Ready,
            SourceStage::Committing | SourceStage::Answer | SourceStage::Returning => Phase::Commit,
            SourceStage::Drain | SourceStage::Killing => Phase::Drain,
            SourceStage::Ending | SourceStage::Over => Phase::Done,
        }
    }

    /// True while the copy here may run: it runs, or everything that holds it may let it go.
    pub fn may_run(&self) -> bool {
        !self.gave_right
    }

    /// What the target said of the plan.
    pub fn verdict(&self) -> Option<&Verdict> {
        self.verdict.as_ref()
    }

    /// The next thing to do; `None` until something is handled.
    pub fn poll(&mut self) -> Option<SourceAction> {
        let action = self.actions.pop_front()?;
        match action {
            // From the moment it may be on disk.
            SourceAction::Record(Record::Commit) => self.gave_right = true,
            SourceAction::Thaw => self.gave_right = false,
            _ => {}
        }
        Some(action)
    }

    /// A frame of the control stream.
    ///
    /// # Errors
    /// [`Error::Order`] if it must not come now. Before COMMIT the crossing has then been given up; after it the frame is
    /// ignored, and the link should be closed and reported lost.
    pub fn handle_frame(&mut self, frame: Frame) -> Result<()> {
        let phase = self.phase();
        let tag = frame.tag();
        match (self.stage, frame) {
            (_, Frame::Heartbeat(_) | Frame::Progress(_)) => {}
            (_, Frame::Abort(abort)) => self.aborted(&abort),
            (SourceStage::Hello, Frame::Welcome(Welcome { .. })) => {
                self.stage = SourceStage::Plan;
                if let Some(plan) = self.plan.take() {
                    self.send(plan);
                }
            }
            (SourceStage::Plan, Frame::Verdict(verdict)) => {
                if verdict.refusals.is_empty() {
                    self.verdict = Some(verdict);
                    self.stage = SourceStage::Freeze;
                    self.actions.push_back(SourceAction::Freeze);
                } else {
                    self.over(SourceEnd::Refused(verdict));
                }
            }
            (SourceStage::Rebuild, Frame::Ready(_)) => {
                self.stage = SourceStage::Parking;
                self.actions.push_back(SourceAction::Record(Record::Park));
            }
            (SourceStage::Answer, Frame::Running(running)) => {
                self.stage = SourceStage::Drain;
                self.actions.push_back(SourceAction::Serve(running));
            }
            (
                SourceStage::Rebuild
                | SourceStage::Parking
                | SourceStage::Committing
                | SourceStage::Answer,
                Frame::Refused(refused),
            ) => self.refused(&refused),
            (SourceStage::Drain, Frame::Resident(resident)) => {
                self.stage = SourceStage::Killing;
                self.resident = Some(resident);
                self.actions
                    .push_back(SourceAction::Record(Record::Resident));
            }
            // Answers to a COMMIT repeated after a lost link, of which the first was answered after all.
            (
                SourceStage::Drain | SourceStage::Killing | SourceStage::Ending,
                Frame::Running(_) | Frame::Resident(_),
            )
            | (SourceStage::Returning, Frame::Refused(_)) => {}
            // It has not heard yet that this side is done with it.
            (SourceStage::Over, _) => {}
            _ => {
                let error = Error::Order { tag, phase };
                self.fail(AbortCode::Protocol, &error.to_string());
                return Err(error);
            }
        }
        Ok(())
    }

    /// Every thread is stopped.
    pub fn handle_frozen(&mut self) {
        if self.stage == SourceStage::Freeze {
            self.stage = SourceStage::Capture;
            self.actions.push_back(SourceAction::Capture);
        }
    }

    /// The tree is captured.
    pub fn handle_captured(&mut self, state: State) {
        if self.stage == SourceStage::Capture {
            self.stage = SourceStage::Sending;
            self.send(state);
        }
    }

    /// The eager pages have been sent, `page_count` of them with data.
    pub fn handle_eager_sent(&mut self, page_count: u64) {
        if self.stage == SourceStage::Sending {
            self.stage = SourceStage::Rebuild;
            self.send(StateEnd { page_count });
        }
    }

    /// The copy is parked.
    pub fn handle_parked(&mut self) {
        if self.stage == SourceStage::Parking {
            self.stage = SourceStage::Committing;
            self.actions.push_back(SourceAction::Record(Record::Commit));
        }
    }

    /// A record is written.
    pub fn handle_recorded(&mut self, record: Record) {
        match (self.stage, record) {
            (SourceStage::Parking, Record::Park) => self.actions.push_back(SourceAction::Park),
            (SourceStage::Committing, Record::Commit) => match self.failure.take() {
                // Nobody has been told yet.
                Some(text) => self.take_back(text),
                None => {
                    self.stage = SourceStage::Answer;
                    self.send(Commit {});
                }
            },
            (SourceStage::Returning, Record::Refused) => self.thaw(),
            (SourceStage::Killing, Record::Resident) => self.actions.push_back(SourceAction::Kill),
            (SourceStage::Ending, Record::Done) => self.done(),
            _ => {}
        }
    }

    /// A record could not be written.
    pub fn handle_record_failed(&mut self, record: Record, text: &str) {
        match (self.stage, record) {
            // It may be on disk all the same, but nobody has been told: a record after it takes it back.
            (SourceStage::Committing, Record::Commit) => {
                self.fail(AbortCode::Failed, text);
                let text = self.failure.take().unwrap_or_default();
                self.take_back(text);
            }
            // The right is back by what the target said, or because it was never told; the journal only remembers it.
            (SourceStage::Returning, Record::Refused) => self.thaw(),
            (SourceStage::Killing, Record::Resident) => self.actions.push_back(SourceAction::Kill),
            (SourceStage::Ending, Record::Done) => self.done(),
            _ => self.fail(AbortCode::Failed, text),
        }
    }

    /// What the crossing cost: it goes to the target with DONE. Before [`Source::handle_killed`].
    pub fn handle_figures(&mut self, figures: Done) {
        self.figures = figures;
    }

    /// The copy has ended.
    pub fn handle_killed(&mut self) {
        if self.stage == SourceStage::Killing {
            self.stage = SourceStage::Ending;
            self.actions.push_back(SourceAction::Record(Record::Done));
        }
    }

    /// The last action failed, or something that is needed is gone (the process, a page link).
    pub fn handle_failed(&mut self, text: &str) {
        self.fail(AbortCode::Failed, text);
    }

    /// The operator wants the crossing to end. False if it is too late: the right to run has been handed over.
    pub fn handle_cancel(&mut self) -> bool {
        let in_time = self.stage < SourceStage::Answer && self.failure.is_none();
        if in_time {
            self.fail(AbortCode::Cancelled, "cancelled");
        }
        in_time
    }

    /// A link is lost.
    pub fn handle_link_lost(&mut self, text: &str) {
        if !std::mem::replace(&mut self.linked, false) {
            return;
        }
        // What waits for the link would be sent too late.
        self.actions
            .retain(|action| !matches!(action, SourceAction::Send(_)));
        match self.stage {
            SourceStage::Answer | SourceStage::Drain => {
                self.actions.push_back(SourceAction::Reconnect)
            }
            SourceStage::Returning
            | SourceStage::Killing
            | SourceStage::Ending
            | SourceStage::Over => {}
            _ => self.fail(AbortCode::Failed, text),
        }
    }

    /// There is a new control stream, on which both have greeted.
    pub fn handle_link_restored(&mut self) {
        self.linked = true;
        self.actions
            .retain(|action| *action != SourceAction::Reconnect);
        if self.stage == SourceStage::Answer {
            self.send(Commit {});
        }
    }

    /// A lost link will not be made again: the operator, or the shell's patience.
    pub fn handle_abandoned(&mut self, text: &str) {
        if matches!(self.stage, SourceStage::Answer | SourceStage::Drain) {
            self.over(SourceEnd::Lost {
                text: text.to_owned(),
            });
        }
    }

    fn send(&mut self, frame: impl Into<Frame>) {
        if self.linked {
            self.actions.push_back(SourceAction::Send(frame.into()));
        }
    }

    /// The target will never run it. It says so by itself when what it prepared is lost after READY.
    fn refused(&mut self, refused: &Refused) {
        let text = format!("the target refused to run it: {}", refused.reason);
        match self.stage {
            SourceStage::Answer => self.take_back(text),
            SourceStage::Committing if self.gave_right => _ = self.failure.get_or_insert(text),
            _ => self.end_before_commit(text),
        }
    }

    fn aborted(&mut self, abort: &Abort) {
        let text = format!(
            "the target gave up in phase {}: {}",
            abort.phase, abort.text
        );
        match self.stage {
            // No answer to COMMIT: the target may have run it. The copy stays stopped.
            SourceStage::Answer | SourceStage::Drain => self.over(SourceEnd::Lost { text }),
            SourceStage::Returning
            | SourceStage::Killing
            | SourceStage::Ending
            | SourceStage::Over => {}
            SourceStage::Committing if self.gave_right => _ = self.failure.get_or_insert(text),
            _ => self.end_before_commit(text),
        }
    }

    fn fail(&mut self, code: AbortCode, text: &str) {
        match self.stage {
            SourceStage::Answer | SourceStage::Returning | SourceStage::Over => {}
            SourceStage::Drain if code == AbortCode::Failed => {
                self.send(Abort::new(Phase::Drain, code, text));
                self.over(SourceEnd::Lost {
                    text: text.to_owned(),
                });
            }
            SourceStage::Drain => {}
            // The target has everything: what failed concerns this host alone.
            SourceStage::Killing | SourceStage::Ending => self.over(SourceEnd::Lost {
                text: text.to_owned(),
            }),
            // COMMIT is being recorded: what may be on disk is taken back by a record after it.
            SourceStage::Committing if self.gave_right => {
                if self.failure.is_none() {
                    self.failure = Some(text.to_owned());
                    self.send(Abort::new(Phase::Commit, code, text));
                }
            }
            _ => {
                self.send(Abort::new(self.phase(), code, text));
                self.end_before_commit(text.to_owned());
            }
        }
    }

    fn end_before_commit(&mut self, text: String) {
        let end = SourceEnd::Failed {
            phase: self.phase(),
            text,
        };
        // Undone, not done: what was still to do is dropped, but not what is to be said.
        self.actions
            .retain(|action| matches!(action, SourceAction::Send(Frame::Abort(_))));
        if self.stage >= SourceStage::Freeze {
            self.actions.push_back(SourceAction::Thaw);
        }
        self.over(end);
    }

    /// The right to run is back after COMMIT was recorded.
    fn take_back(&mut self, text: String) {
        self.stage = SourceStage::Returning;
        self.failure = Some(text);
        self.actions
            .push_back(SourceAction::Record(Record::Refused));
    }

    fn thaw(&mut self) {
        let text = self.failure.take().unwrap_or_default();
        self.actions.push_back(SourceAction::Thaw);
        self.over(SourceEnd::Failed {
            phase: Phase::Commit,
            text,
        });
    }

    fn done(&mut self) {
        let figures = std::mem::take(&mut self.figures);
        self.send(figures);
        let resident = self.resident.take().unwrap_or_default();
        self.over(SourceEnd::Done(resident));
    }

    fn over(&mut self, end: SourceEnd) {
        self.stage = SourceStage::Over;
        self.actions.push_back(SourceAction::Finish(end));
    }
}

/// What the target's shell is to do next.
#[derive(Debug, Clone, PartialEq)]
pub enum TargetAction {
    /// Send this on the control stream. A failure is reported as [`Target::handle_link_lost`].
    Send(Frame),
    /// Compare the plan with this host. Report [`Target::handle_verdict`].
    Check(Plan),
    /// Make the process that is to become the tree.
    Prepare,
    /// Build everything but its pages. Report [`Target::handle_rebuilt`] when that and all eager pages are in place.
    Rebuild(State),
    /// How many eager pages the source has sent.
    EagerPages(StateEnd),
    /// Write this record. Report [`Target::handle_recorded`].
    Record(Record),
    /// Let the process outlive us. Report [`Target::handle_exit_kill_cleared`].
    ClearExitKill,
    /// Let it run. Report [`Target::handle_released`].
    Release,
    /// End the prepared process, to the last thread. Report [`Target::handle_destroyed`] or
    /// [`Target::handle_destroy_failed`].
    Destroy,
    /// Part of the page map.
    Map(Map),
    /// The page map is complete.
    MapEnd(MapEnd),
    /// No page can come until the source has reached this host again; what waits goes on waiting. Report
    /// [`Target::handle_link_restored`] when it has.
    Wait,
    /// The source has lost what it served: pages that are missing will never come.
    SourceLost(Abort),
    /// It is over. Nothing more comes, except what is to be said again over a new link.
    Finish(TargetEnd),
}

/// How a crossing ended for the target.
#[derive(Debug, Clone, PartialEq)]
pub enum TargetEnd {
    /// The process runs here, wholly.
    Done {
        /// What was counted.
        resident: Resident,
        /// True if the source said that its copy is gone; else the link was lost before it could.
        confirmed: bool,
    },
    /// This host cannot take it; nothing was touched.
    Refused(Verdict),
    /// It did not work; nothing is left here and the source has the right to run.
    Failed {
        /// Where.
        phase: Phase,
        /// Why.
        text: String,
    },
    /// Nothing is left here, and the source could not be told: its copy stays stopped.
    Lost {
        /// Why.
        text: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum TargetStage {
    Hello,
    Plan,
    Checking,
    State,
    /// STATE has come, STATE_END has not.
    Building,
    BuildingComplete,
    Ready,
    /// COMMIT has come: RUN is recorded, EXITKILL cleared, RELEASING recorded.
    Taking,
    Releasing,
    Drain,
    /// REFUSED is being recorded.
    Refusing,
    /// It is recorded; the prepared process is being destroyed.
    Destroying,
    /// It will never run here.
    Refused,
    RecordingResident,
    /// Every page is here, and DONE is awaited.
    Resident,
    Over,
}

/// The target's session.
#[derive(Debug)]
pub struct Target {
    stage: TargetStage,
    linked: bool,
    has_right: bool,
    host_name: String,
    running: Option<Running>,
    resident: Option<Resident>,
    /// Why it will not run here.
    failure: Option<(Phase, String)>,
    actions: VecDeque<TargetAction>,
}

impl Target {
    /// A crossing about to begin, over a control stream from which nothing has been read.
    pub fn new(host_name: &str) -> Self {
        Self {
            stage: TargetStage::Hello,
            linked: true,
            has_right: false,
            host_name: host_name.to_owned(),
            running: None,
            resident: None,
            failure: None,
            actions: VecDeque::new(),
        }
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        match self.stage {
            TargetStage::Hello => Phase::Hello,
            TargetStage::Plan | TargetStage::Checking => Phase::Plan,
            TargetStage::State => Phase::Rounds,
            TargetStage::Building | TargetStage::BuildingComplete => Phase::Rebuild,
            TargetStage::Ready => Phase::Ready,
            TargetStage::Taking
            | TargetStage::Releasing
            | TargetStage::Refusing
            | TargetStage::Destroying
            | TargetStage::Refused => Phase::Commit,
            TargetStage::Drain | TargetStage::RecordingResident => Phase::Drain,
            TargetStage::Resident | TargetStage::Over => Phase::Done,
        }
    }

    /// True once the process may have executed an instruction here.
    pub fn may_run(&self) -> bool {
        self.has_right
    }

    /// The next thing to do; `None` until something is handled.
    pub fn poll(&mut self) -> Option<TargetAction> {
        let action = self.actions.pop_front()?;
        if action == TargetAction::Release {
            self.has_right = true;
        }
        Some(action)
    }

    /// A frame of the control stream.
    ///
    /// # Errors
    /// [`Error::Order`] if it must not come now, [`Error::Version`] if the hosts cannot understand each other. Before COMMIT the
    /// crossing has then been given up; after it the frame is ignored, and the link should be closed and reported lost.
    pub fn handle_frame(&mut self, frame: Frame) -> Result<()> {
        let phase = self.phase();
        let tag = frame.tag();
        match (self.stage, frame) {
            (_, Frame::Heartbeat(_)) => {}
            (_, Frame::Abort(abort)) => self.aborted(abort),
            (TargetStage::Hello, Frame::Hello(hello)) => match hello.version() {
                Ok(version) => {
                    self.stage = TargetStage::Plan;
                    let host_name = std::mem::take(&mut self.host_name);
                    self.send(Welcome { version, host_name });
                }
                Err(error) => {
                    self.fail(AbortCode::Version, &error.to_string());
                    return Err(error);
                }
            },
            (TargetStage::Plan, Frame::Plan(plan)) => {
                self.stage = TargetStage::Checking;
                self.actions.push_back(TargetAction::Check(plan));
            }
            (TargetStage::State, Frame::State(state)) => {
                self.stage = TargetStage::Building;
                self.actions.push_back(TargetAction::Rebuild(state));
            }
            (TargetStage::Building, Frame::StateEnd(end)) => {
                self.stage = TargetStage::BuildingComplete;
                self.actions.push_back(TargetAction::EagerPages(end));
            }
            (TargetStage::Ready, Frame::Commit(Commit {})) => {
                self.stage = TargetStage::Taking;
                self.actions.push_back(TargetAction::Record(Record::Run));
            }
            // Repeated over a new link: the answer stays the same, and comes by itself where it is not yet given.
            (_, Frame::Commit(Commit {})) if self.stage > TargetStage::Ready => self.answer(),
            (TargetStage::Drain, Frame::Map(map)) => self.actions.push_back(TargetAction::Map(map)),
            (TargetStage::Drain, Frame::MapEnd(end)) => {
                self.actions.push_back(TargetAction::MapEnd(end))
            }
            // The program may end, and so be resident, while the map is still coming.
            (
                TargetStage::RecordingResident | TargetStage::Resident,
                Frame::Map(_) | Frame::MapEnd(_),
            ) => {}
            (TargetStage::Resident, Frame::Done(_)) => self.done(true),
            (TargetStage::Over, _) => {}
            _ => {
                let error = Error::Order { tag, phase };
                self.fail(AbortCode::Protocol, &error.to_string());
                return Err(error);
            }
        }
        Ok(())
    }

    /// The plan is checked.
    pub fn handle_verdict(&mut self, verdict: Verdict) {
        if self.stage != TargetStage::Checking {
            return;
        }
        self.send(verdict.clone());
        if verdict.refusals.is_empty() {
            self.stage = TargetStage::State;
            self.actions.push_back(TargetAction::Prepare);
        } else {
            self.over(TargetEnd::Refused(verdict));
        }
    }

    /// Everything but the lazy pages is in place. Only after STATE_END and all eager pages.
    pub fn handle_rebuilt(&mut self, ready: Ready) {
        if self.stage == TargetStage::BuildingComplete {
            self.stage = TargetStage::Ready;
            self.send(ready);
        }
    }

    /// A record is written.
    pub fn handle_recorded(&mut self, record: Record) {
        match (self.stage, record) {
            (TargetStage::Taking, Record::Run) => {
                self.actions.push_back(TargetAction::ClearExitKill)
            }
            (TargetStage::Taking, Record::Releasing) => {
                self.stage = TargetStage::Releasing;
                self.actions.push_back(TargetAction::Release);
            }
            (TargetStage::Refusing, Record::Refused) => {
                self.stage = TargetStage::Destroying;
                self.actions.push_back(TargetAction::Destroy);
            }
            (TargetStage::RecordingResident, Record::Resident) => self.resident(),
            _ => {}
        }
    }

    /// A record could not be written.
    pub fn handle_record_failed(&mut self, record: Record, text: &str) {
        match (self.stage, record) {
            // A refusal that could be forgotten is none. An abort still saves a source that has not sent COMMIT.
            (TargetStage::Refusing, Record::Refused) => self.lose(text),
            (TargetStage::RecordingResident, Record::Resident) => self.resident(),
            _ => self.fail(AbortCode::Failed, text),
        }
    }

    /// The process outlives us.
    pub fn handle_exit_kill_cleared(&mut self) {
        if self.stage == TargetStage::Taking {
            self.actions
                .push_back(TargetAction::Record(Record::Releasing));
        }
    }

    /// It runs.
    pub fn handle_released(&mut self, running: Running) {
        if self.stage == TargetStage::Releasing {
            self.stage = TargetStage::Drain;
            self.running = Some(running);
            self.answer();
            if !self.linked {
                self.actions.push_back(TargetAction::Wait);
            }
        }
    }

    /// Nothing is left of the prepared process.
    pub fn handle_destroyed(&mut self) {
        if self.stage != TargetStage::Destroying {
            return;
        }
        self.stage = TargetStage::Refused;
        self.answer();
        let (phase, text) = self
            .failure
            .clone()
            .unwrap_or((Phase::Commit, String::new()));
        self.actions
            .push_back(TargetAction::Finish(TargetEnd::Failed { phase, text }));
    }

    /// Something may be left of it: the source must not hear that nothing is.
    pub fn handle_destroy_failed(&mut self, text: &str) {
        if self.stage == TargetStage::Destroying {
            self.over(TargetEnd::Lost {
                text: text.to_owned(),
            });
        }
    }

    /// No page is missing any more: all have arrived, or the program has ended.
    pub fn handle_resident(&mut self, resident: Resident) {
        if self.stage == TargetStage::Drain {
            self.stage = TargetStage::RecordingResident;
            self.resident = Some(resident);
            self.actions
                .push_back(TargetAction::Record(Record::Resident));
        }
    }

    /// The last action failed, or something that is needed is gone (the prepared process, memory, a page link).
    pub fn handle_failed(&mut self, text: &str) {
        self.fail(AbortCode::Failed, text);
    }

    /// The operator wants the crossing to end. False if it is too late.
    pub fn handle_cancel(&mut self) -> bool {
        let in_time = self.stage <= TargetStage::Releasing && !self.has_right;
        if in_time {
            self.fail(AbortCode::Cancelled, "cancelled on the target");
        }
        in_time
    }

    /// A link is lost.
    pub fn handle_link_lost(&mut self, text: &str) {
        if !std::mem::replace(&mut self.linked, false) {
            return;
        }
        self.actions
            .retain(|action| !matches!(action, TargetAction::Send(_)));
        match self.stage {
            // COMMIT may be on its way: the answer must be there when the source asks again.
            TargetStage::Ready => self.refuse(text),
            stage if stage < TargetStage::Ready => self.end_before_commit(text),
            TargetStage::Drain => self.actions.push_back(TargetAction::Wait),
            // Nothing is needed of the source any more.
            TargetStage::Resident => self.done(false),
            _ => {}
        }
    }

    /// The source has reached this host again, and both have greeted.
    pub fn handle_link_restored(&mut self) {
        self.linked = true;
        self.actions.retain(|action| *action != TargetAction::Wait);
        // Whatever was said last may have been lost with the link.
        self.answer();
        if let (TargetStage::Resident | TargetStage::Over, Some(resident)) =
            (self.stage, self.resident)
        {
            self.send(resident);
        }
    }

    /// A lost link will not be made again: the operator, or the shell's patience.
    pub fn handle_abandoned(&mut self, text: &str) {
        if self.stage == TargetStage::Drain {
            self.actions.push_back(TargetAction::SourceLost(Abort::new(
                Phase::Drain,
                AbortCode::Timeout,
                text,
            )));
        }
    }

    /// The answer to COMMIT: as soon as there is one, and as often as it is asked for. A refusal does not wait to be asked.
    fn answer(&mut self) {
        if let Some(running) = self.running {
            self.send(running);
        } else if self.stage == TargetStage::Refused {
            let reason = self.failure.as_ref().map_or("", |(_, text)| text);
            self.send(Refused::new(reason));
        }
    }

    fn send(&mut self, frame: impl Into<Frame>) {
        if self.linked {
            self.actions.push_back(TargetAction::Send(frame.into()));
        }
    }

    fn aborted(&mut self, abort: Abort) {
        match self.stage {
            TargetStage::Drain | TargetStage::Releasing => {
                self.actions.push_back(TargetAction::SourceLost(abort))
            }
            // The source has not sent COMMIT, and never will: it says so by aborting.
            stage if stage <= TargetStage::Ready => {
                self.end_before_commit(&format!(
                    "the source gave up in phase {}: {}",
                    abort.phase, abort.text
                ));
            }
            _ => {}
        }
    }

    fn fail(&mut self, code: AbortCode, text: &str) {
        match self.stage {
            // COMMIT has come or may be on its way: only a refusal that lasts lets the source go on.
            TargetStage::Ready | TargetStage::Taking => self.refuse(text),
            // Recorded, but not yet told to do: nothing has run.
            TargetStage::Releasing if !self.has_right => self.refuse(text),
            // Some of it may have run: it can never be refused, only lost.
            TargetStage::Releasing | TargetStage::Drain | TargetStage::RecordingResident
                if code == AbortCode::Failed =>
            {
                self.lose(text);
            }
            stage if stage < TargetStage::Ready => {
                self.send(Abort::new(self.phase(), code, text));
                self.end_before_commit(text);
            }
            _ => {}
        }
    }

    /// Nobody has sent COMMIT: READY was not sent, or the source has aborted.
    fn end_before_commit(&mut self, text: &str) {
        let end = TargetEnd::Failed {
            phase: self.phase(),
            text: text.to_owned(),
        };
        self.actions
            .retain(|action| matches!(action, TargetAction::Send(Frame::Abort(_))));
        if self.stage >= TargetStage::State {
            self.actions.push_back(TargetAction::Destroy);
        }
        self.over(end);
    }

    /// Gives up without the certainty that lets the source go on.
    fn lose(&mut self, text: &str) {
        // Never to be said again: the source would end its copy.
        self.resident = None;
        self.actions.clear();
        self.actions.push_back(TargetAction::Destroy);
        self.send(Abort::new(self.phase(), AbortCode::Failed, text));
        self.over(TargetEnd::Lost {
            text: text.to_owned(),
        });
    }

    fn refuse(&mut self, text: &str) {
        self.failure = Some((self.phase(), text.to_owned()));
        self.stage = TargetStage::Refusing;
        self.actions.clear();
        self.actions
            .push_back(TargetAction::Record(Record::Refused));
    }

    fn resident(&mut self) {
        self.stage = TargetStage::Resident;
        let resident = self.resident.unwrap_or_default();
        if self.linked {
            self.send(resident);
        } else {
            self.done(false);
        }
    }

    fn done(&mut self, confirmed: bool) {
        let resident = self.resident.unwrap_or_default();
        if confirmed {
            self.actions.push_back(TargetAction::Record(Record::Done));
        }
        self.over(TargetEnd::Done {
            resident,
            confirmed,
        });
    }

    fn over(&mut self, end: TargetEnd) {
        self.stage = TargetStage::Over;
        self.actions.push_back(TargetAction::Finish(end));
    }
}

#[cfg(test)]
mod tests;
