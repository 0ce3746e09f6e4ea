//! What the user sees: log lines and progress on stderr, JSON lines on stdout, and the ledger that ends both.
//!
//! It only shows; it never decides.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use pageferry_tracee::procfs;
use pageferry_wire::phase::Phase;
use serde::{Deserialize, Serialize};
use tracing::level_filters::LevelFilter;

use crate::cli::{Common, LogFormat};

/// One line on stdout under `--json`: `{"type": …, "data": {…}}`. The last line of a run is the ledger.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(
    tag = "type",
    content = "data",
    rename_all = "snake_case",
    deny_unknown_fields
)]
pub enum Event {
    /// A phase begins.
    Phase(PhaseEvent),
    /// One object that cannot be carried; nothing was touched.
    Refusal(RefusalEvent),
    /// How far the drain is.
    Progress(ProgressEvent),
    /// The end.
    Ledger(Ledger),
}

/// A phase begins.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PhaseEvent {
    /// Migration id, the same on both hosts.
    pub id: String,
    /// Which phase.
    pub phase: Phase,
}

/// One object that cannot be carried.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RefusalEvent {
    /// Migration id; empty if the source refused before it spoke to the target.
    pub id: String,
    /// The sentence an operator reads: pid, object, kind, what to do.
    pub text: String,
}

/// How far the drain is.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProgressEvent {
    /// Migration id.
    pub id: String,
    /// Pages that are to be moved, as far as known.
    pub pages_total: u64,
    /// Pages that have arrived.
    pub pages_resident: u64,
    /// Pages a thread had to wait for.
    pub pages_faulted: u64,
}

/// What one crossing cost. Times are milliseconds; `downtime_ms` is on the source's clock, from just before the first
/// thread is stopped to the arrival of the target's word that the process runs. `freeze_ms`, `capture_ms`,
/// `rebuild_ms`, `commit_ms` and `hook_ms` are its consecutive pieces and sum to it. On the target's ledger the same
/// figures stand, as told by the source.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ledger {
    /// Migration id, the same on both hosts.
    pub id: String,
    /// `post-copy`, `dump`, `restore` or `restore-lazy`. A dump has freeze and capture only, the latter with all its pages written
    /// (and, unless it is left running, synced); a restore has rebuild and commit only, from its start until the process runs.
    pub mode: String,
    /// First thread stopped → running on the target.
    pub downtime_ms: f64,
    /// Until every thread is stopped.
    pub freeze_ms: f64,
    /// Until the last byte of the state is handed to the network.
    pub capture_ms: f64,
    /// Until the target is ready to run it.
    pub rebuild_ms: f64,
    /// From there until it runs: park, COMMIT, right to run.
    pub commit_ms: f64,
    /// Time spent in hooks inside the downtime; 0 while there are none.
    pub hook_ms: f64,
    /// From running until every page is on the target.
    pub drain_ms: f64,
    /// Bytes of page contents that travelled inside the downtime.
    pub eager_bytes: u64,
    /// Pages of the process that hold data.
    pub pages_total: u64,
    /// Pages that were on the target when it began to run.
    pub pages_resident_at_run: u64,
    /// Pages that a thread waited for while they came over the network.
    pub pages_faulted: u64,
    /// UDP payload bytes both ways, as this side counted them.
    pub wire_bytes: u64,
    /// pageferry's exit code.
    pub exit: u8,
}

impl Ledger {
    /// What a person wants to know of it.
    fn sentence(&self) -> String {
        match self.mode.as_str() {
            "dump" => format!(
                "frozen for {:.1} ms = freeze {:.1} + dump {:.1}; {} pages",
                self.downtime_ms, self.freeze_ms, self.capture_ms, self.pages_total
            ),
            "restore" | "restore-lazy" => format!(
                "ran after {:.1} ms; all pages in {:.0} ms; {} pages, {} there at the start, {} waited for",
                self.downtime_ms,
                self.drain_ms,
                self.pages_total,
                self.pages_resident_at_run,
                self.pages_faulted
            ),
            _ => format!(
                "downtime {:.1} ms = freeze {:.1} + capture {:.1} + rebuild {:.1} + commit {:.1} + hooks {:.1}; drain {:.0} ms; \
                 {} pages, {} there at the start, {} waited for; {:.1} MB on the wire",
                self.downtime_ms,
                self.freeze_ms,
                self.capture_ms,
                self.rebuild_ms,
                self.commit_ms,
                self.hook_ms,
                self.drain_ms,
                self.pages_total,
                self.pages_resident_at_run,
                self.pages_faulted,
                self.wire_bytes as f64 / 1e6,
            ),
        }
    }
}

/// Sets up log lines on stderr.
pub fn set_up_log(common: &Common) {
    let level = match (common.quiet, common.verbose) {
        (true, _) => LevelFilter::ERROR,
        (_, 0) => LevelFilter::INFO,
        (_, 1) => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    // The libraries' own lines are for their developers.
    let filter = tracing_subscriber::EnvFilter::default()
        .add_directive(LevelFilter::WARN.into())
        .add_directive(format!("pageferry={level}").parse().unwrap_or_default())
        .add_directive(
            format!("pageferry_pageserver={level}")
                .parse()
                .unwrap_or_default(),
        )
        .add_directive(
            format!("pageferry_restorer={level}")
                .parse()
                .unwrap_or_default(),
        );
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match common.log_format {
        LogFormat::Json => builder.json().init(),
        LogFormat::Text => builder
            .with_target(false)
            .with_ansi(std::io::stderr().is_terminal())
            .with_timer(tracing_subscriber::fmt::time::uptime())
            .init(),
    }
}

/// The processes of the tree of `root`, as kill(1) is to be told: who ends or goes on alone is not what the others count on. Children
/// before their parents: the end of a parent may let stopped children go on.
pub fn all_of(root: &i32) -> String {
    let all = procfs::descendants(*root).unwrap_or_else(|_| vec![*root]);
    let all: Vec<String> = all.iter().rev().map(i32::to_string).collect();
    all.join(" ")
}

/// Writes the ledger of a receive or restore, of mode `mode`, that has no engine to write it. Gives its exit code back.
pub fn without_engine(common: &Common, mode: String, exit: u8) -> u8 {
    Report::new(common).ledger(&Ledger {
        mode,
        exit,
        ..Ledger::default()
    });
    exit
}

/// The voice of one run.
#[derive(Debug)]
pub struct Report {
    json: bool,
    quiet: bool,
    id: String,
    bar: Option<indicatif::ProgressBar>,
    last_line: Mutex<Option<Instant>>,
}

/// Pause between two progress lines where stderr is no terminal.
const PROGRESS_LINE_PAUSE: Duration = Duration::from_secs(5);

impl Report {
    /// For migration `id` (may be set later by [`Report::set_id`]).
    pub fn new(common: &Common) -> Self {
        Self {
            json: common.json,
            quiet: common.quiet,
            id: String::new(),
            bar: None,
            last_line: Mutex::new(None),
        }
    }

    /// The migration id that every line carries from now on.
    pub fn set_id(&mut self, id: String) {
        self.id = id;
    }

    /// The migration id, empty before it is known.
    pub fn id(&self) -> &str {
        &self.id
    }

    fn emit(&self, event: &Event) {
        if !self.json {
            return;
        }
        // A reader that went away must not stop a migration.
        if let Ok(line) = serde_json::to_string(event) {
            let mut out = std::io::stdout().lock();
            let _ = writeln!(out, "{line}").and_then(|()| out.flush());
        }
    }

    /// A phase begins.
    pub fn phase(&self, phase: Phase) {
        tracing::debug!(id = %self.id, %phase, "phase");
        self.emit(&Event::Phase(PhaseEvent {
            id: self.id.clone(),
            phase,
        }));
    }

    /// One object that cannot be carried.
    pub fn refusal(&self, text: &str) {
        eprintln!("refused: {text}");
        self.emit(&Event::Refusal(RefusalEvent {
            id: self.id.clone(),
            text: text.to_owned(),
        }));
    }

    /// How far the drain is; on a terminal a bar, elsewhere a line now and then.
    pub fn progress(&mut self, pages_total: u64, pages_resident: u64, pages_faulted: u64) {
        let event = ProgressEvent {
            id: self.id.clone(),
            pages_total,
            pages_resident,
            pages_faulted,
        };
        let bar = self.bar.get_or_insert_with(|| {
            let bar = indicatif::ProgressBar::new(pages_total);
            if let Ok(style) = indicatif::ProgressStyle::with_template(
                "drain {bar:40} {pos}/{len} pages, {msg}, {eta} left",
            ) {
                bar.set_style(style);
            }
            bar
        });
        // Hidden where stderr is no terminal, or one that cannot draw.
        if !bar.is_hidden() && !self.quiet {
            bar.set_length(pages_total);
            bar.set_position(pages_resident);
            bar.set_message(format!("{pages_faulted} waited for"));
        } else if let Ok(mut last) = self.last_line.lock() {
            if last.is_none_or(|at| at.elapsed() >= PROGRESS_LINE_PAUSE) {
                *last = Some(Instant::now());
                tracing::info!(id = %self.id, "drain: {pages_resident} of {pages_total} pages, {pages_faulted} waited for");
            }
        }
        self.emit(&Event::Progress(event));
    }

    /// Why it did not end well, causes included: printed here and nowhere else.
    pub fn failure(&self, failure: &dyn std::error::Error) {
        eprintln!("pageferry: {}", chain(failure));
    }

    /// The last line.
    pub fn ledger(&mut self, ledger: &Ledger) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        if !self.quiet && ledger.downtime_ms > 0.0 {
            eprintln!("{}", ledger.sentence());
        }
        self.emit(&Event::Ledger(ledger.clone()));
    }
}

/// Whether this error, or a cause of it, is that the peer sent what cannot be.
pub fn is_bad_data(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(error), |error| error.source()).any(|error| {
        error
            .downcast_ref::<pageferry_wire::Error>()
            .is_some_and(pageferry_wire::Error::is_bad_data)
            || error.is::<pageferry_image::model::Invalid>()
    })
}

/// An error with all its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(": ");
        text.push_str(&source.to_string());
        next = source.source();
    }
    plain(&text.replace('\n', " "))
}

/// `text` with everything escaped that a terminal would not simply show: names may come from a peer or a file.
pub fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '"' | '\'' | '\\' => plain.push(character),
            other => plain.extend(other.escape_debug()),
        }
    }
    plain
}

/// Milliseconds in a duration, with fractions.
pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_file_says_does_not_reach_the_terminal_as_it_is() {
        assert_eq!(plain("größe \"x\" \\"), "größe \"x\" \\");
        assert_eq!(plain("a\x1b[2Jb\r\u{202e}"), "a\\u{1b}[2Jb\\r\\u{202e}");
    }

    #[test]
    fn a_command_names_all_of_a_tree() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("it can be started");
        let own = std::process::id();
        let said = all_of(&(own as i32));
        child.kill().and_then(|()| child.wait()).expect("it ran");
        let named: Vec<&str> = said.split(' ').collect();
        assert_eq!(named.last(), Some(&own.to_string().as_str()));
        assert!(named.contains(&child.id().to_string().as_str()), "{said}");
        assert_eq!(all_of(&0), "0");
    }

    #[test]
    fn bad_data_is_told_from_a_bad_link() {
        use pageferry_wire::Error as Wire;
        #[derive(Debug, thiserror::Error)]
        #[error("the control stream failed")]
        struct Outer(#[source] Wire);
        assert!(is_bad_data(&Outer(Wire::UnknownTag { tag: 99 })));
        assert!(!is_bad_data(&Outer(Wire::Truncated { missing: 1 })));
        assert!(!is_bad_data(&std::io::Error::other("reset")));
    }
}
