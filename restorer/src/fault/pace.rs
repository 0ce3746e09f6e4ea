//! How much the drain may have asked for at a time, so that faults stay quick. Pure: what happened in, a window out.
//!
//! A fault has a connection of its own, yet its answer shares sockets, processors and the wire with whatever bulk was
//! asked for before it. So the window is governed by what faults take, as delay-based congestion control does it:
//!
//! 1. After the process has begun to run it touches page after page, each of which it needs before the next. The drain
//!    holds back until the first quiet moment, at most [`Pace::new`]'s number of beats.
//! 2. From then on each fault whose answer took much longer than the quickest halves the window; each that did not
//!    widens it a little; a beat without any fault doubles it.
//!
//! The quickest answer grows older by `AGEING` with each fault, or a path that has become longer would look busy for
//! ever. The window never falls below a minimum: a process that faults all the time is drained too.

use std::time::Duration;

/// Beats without a fault that make a quiet moment.
const QUIET_BEATS: u32 = 2;
/// What an answer may take beyond twice the quickest: the scheduler's, not the queue's.
const SLACK: Duration = Duration::from_micros(500);
/// The quickest answer counts as longer by one part in so many with each fault.
const AGEING: u32 = 256;

/// See the module's text. Windows are in pages.
#[derive(Debug)]
pub struct Pace {
    min: u64,
    max: u64,
    window: u64,
    /// While the drain holds back: beats until it begins whatever happens.
    hold_beats: u32,
    quiet_beats: u32,
    /// Whether there was a fault since the last beat.
    faulted: bool,
    quickest: Option<Duration>,
}

impl Pace {
    /// A window between `min` and `max`, at first none for at most `hold_beats`.
    pub fn new(min: u64, max: u64, hold_beats: u32) -> Self {
        let min = min.min(max);
        Self {
            min,
            max,
            window: if hold_beats == 0 { min } else { 0 },
            hold_beats,
            quiet_beats: 0,
            faulted: false,
            quickest: None,
        }
    }

    /// How many pages the drain may have asked for and not yet installed.
    pub fn window(&self) -> u64 {
        self.window
    }

    /// Whether [`Pace::handle_beat`] could change anything.
    pub fn wants_beats(&self) -> bool {
        self.window < self.max
    }

    /// A thread needs a page from the source.
    pub fn handle_fault(&mut self) {
        self.faulted = true;
    }

    /// The source's answer to a fault came so long after the question.
    pub fn handle_answer(&mut self, took: Duration) {
        let quickest = self
            .quickest
            .map_or(took, |quickest| took.min(quickest + quickest / AGEING));
        self.quickest = Some(quickest);
        if self.hold_beats > 0 {
            return;
        }
        self.window = if took > quickest * 2 + SLACK {
            (self.window / 2).max(self.min)
        } else {
            (self.window + self.min).min(self.max)
        };
    }

    /// A short while has passed; `waiting`: a thread waits for the source now.
    pub fn handle_beat(&mut self, waiting: bool) {
        let quiet = !waiting && !std::mem::take(&mut self.faulted);
        self.quiet_beats = if quiet { self.quiet_beats + 1 } else { 0 };
        if self.hold_beats > 0 {
            self.hold_beats -= 1;
            if self.quiet_beats >= QUIET_BEATS {
                self.hold_beats = 0;
            }
            if self.hold_beats == 0 {
                self.window = self.min;
            }
        } else if quiet {
            self.window = (self.window * 2).min(self.max);
        }
    }

    /// The way to the source is another one.
    pub fn handle_link_lost(&mut self) {
        self.quickest = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Duration = Duration::from_micros(80);
    const SLOW: Duration = Duration::from_millis(3);

    fn beats(pace: &mut Pace, count: u32) {
        for _ in 0..count {
            pace.handle_beat(false);
        }
    }

    #[test]
    fn nothing_is_drained_before_the_first_quiet_moment() {
        let mut pace = Pace::new(16, 1024, 50);
        for _ in 0..10 {
            pace.handle_fault();
            pace.handle_answer(QUICK);
            pace.handle_beat(false);
            assert_eq!(pace.window(), 0);
        }
        pace.handle_beat(true);
        pace.handle_beat(true);
        assert_eq!(pace.window(), 0, "a thread that waits is no quiet");
        beats(&mut pace, 1);
        assert_eq!(pace.window(), 0);
        beats(&mut pace, 1);
        assert_eq!(pace.window(), 16);
    }

    #[test]
    fn a_process_that_is_never_quiet_is_drained_too() {
        let mut pace = Pace::new(16, 1024, 50);
        for _ in 0..50 {
            assert_eq!(pace.window(), 0);
            pace.handle_fault();
            pace.handle_beat(true);
        }
        assert_eq!(pace.window(), 16);
        for _ in 0..1000 {
            pace.handle_answer(QUICK);
            pace.handle_answer(SLOW);
            pace.handle_beat(true);
            assert!(pace.window() >= 16);
        }
    }

    #[test]
    fn slow_answers_narrow_the_window_and_quiet_opens_it_again() {
        let mut pace = Pace::new(16, 1024, 0);
        beats(&mut pace, 6);
        assert_eq!(pace.window(), 1024);
        assert!(!pace.wants_beats());
        pace.handle_answer(QUICK);
        assert_eq!(pace.window(), 1024);
        pace.handle_answer(SLOW);
        assert_eq!(pace.window(), 512);
        assert!(pace.wants_beats());
        for _ in 0..9 {
            pace.handle_answer(SLOW);
        }
        assert_eq!(pace.window(), 16);
        pace.handle_answer(QUICK);
        assert_eq!(pace.window(), 32);
        beats(&mut pace, 5);
        assert_eq!(pace.window(), 1024);
    }

    #[test]
    fn a_long_way_is_not_taken_for_a_queue() {
        let mut pace = Pace::new(16, 1024, 0);
        for _ in 0..64 {
            pace.handle_answer(Duration::from_millis(50));
        }
        assert_eq!(pace.window(), 1024);
        // It has become longer still: that counts as a queue only until the memory of the short one has faded.
        for _ in 0..400 {
            pace.handle_answer(Duration::from_millis(150));
        }
        assert_eq!(pace.window(), 1024);
    }
}
