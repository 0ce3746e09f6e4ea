//! A frozen process, as the model that is carried. One module per kind of kernel object, named as in `image` and `restorer`.
//!
//! [`capture`] runs on the thread that froze the process. It leaves no trace: what has to be asked from inside is asked by an
//! agent in a mapping of its own that is gone again, also on error. It repeats the survey's questions as far as the answer may
//! have changed; a new object that cannot be carried is [`Error::Refused`] and the process is thawed. Nothing here may take
//! longer because the process has more memory: page tables of anonymous memory are not walked.

pub(crate) mod files;
pub(crate) mod memory;
pub(crate) mod signals;
pub(crate) mod sockets;
pub(crate) mod task;
pub(crate) mod timers;

use std::collections::BTreeSet;
use std::time::Duration;

use nix::errno::Errno;
use pageferry_image::model::files::{File, file};
use pageferry_image::model::memory as model;
use pageferry_image::model::task::{Process, Tree};
use pageferry_image::page::PageRange;
use pageferry_tracee::host;
use pageferry_tracee::procfs::{self, Vma};
use pageferry_tracee::{Injection, Tracee};

use self::files::{Depth, Look};
use self::memory::FirstTouch;
use self::task::{Answered, Cpus};
use crate::survey::{
    Object, Pids, Refusal, RefusalKind, Survey, SurveyOptions, executable, working_directory,
};
use crate::{Error, Result};

/// Longest wait for the storage of written files, with the process frozen.
const SYNC_WAIT_FROZEN: Duration = Duration::from_secs(5);

/// What one freeze yields.
#[derive(Debug)]
pub struct Captured {
    /// The model.
    pub tree: Tree,
    /// Pages that must be resident on the target before the process runs: copied pages of private file mappings, and what
    /// each thread touches first. Ascending, disjoint. Pages of them may be holes.
    pub eager: Vec<PageRange>,
    /// What is filled after the process runs: private anonymous memory without the guard regions that are in the model.
    /// Ascending, disjoint. Contains part of `eager`.
    pub lazy: Vec<PageRange>,
}

/// The answers to one batch of questions.
#[derive(Debug)]
pub(crate) struct Answers {
    tid: i32,
    results: Vec<std::result::Result<u64, Errno>>,
}

impl Answers {
    pub(crate) fn new(tid: i32, results: Vec<std::result::Result<u64, Errno>>) -> Self {
        Self { tid, results }
    }

    /// The answer to a question that every process can answer.
    pub(crate) fn expect(&self, index: usize, what: &'static str) -> Result<u64> {
        let answer = self.results.get(index).copied().unwrap_or(Err(Errno::EIO));
        answer.map_err(|errno| Error::Asked {
            what,
            tid: self.tid,
            errno,
        })
    }

    /// The answer to a question that not every kernel understands.
    pub(crate) fn get(&self, index: usize) -> Option<u64> {
        self.results
            .get(index)
            .copied()
            .and_then(std::result::Result::ok)
    }
}

/// Captures a frozen process that `survey` found fit to be carried.
///
/// # Errors
/// [`Error::Refused`] lists what cannot be carried and was not there, or could not be seen, before the freeze. After any error
/// the process is as it was, still frozen.
pub fn capture(tracee: &mut Tracee, survey: &Survey, options: &SurveyOptions) -> Result<Captured> {
    let pid = tracee.pid();
    let mut look = Look {
        pid,
        options,
        known: survey.known.clone(),
    };

    let entries = procfs::descriptors(pid)?;
    let timerfds_read = host::clocks()?;
    let mut table = files::table(&mut look, &entries, Depth::Capture)?;
    let vmas = memory::frozen_mappings(pid, &survey.vmas)?;
    let mut refusals = std::mem::take(&mut table.refusals);
    let unknown: BTreeSet<u64> = table.inodes.difference(&survey.inodes).copied().collect();
    if !unknown.is_empty() {
        refusals.extend(files::held_outside(pid, &entries, &unknown)?);
    }
    refusals.extend(memory::refusals(&mut look, &vmas)?);
    refusals.extend(timers::refusals(pid)?);
    let children = procfs::children(pid)?;
    if !children.is_empty() {
        refusals.push(Refusal {
            pid,
            object: Object::Process,
            what: RefusalKind::Children {
                pids: Pids(children),
            },
        });
    }
    let tids = tracee.tids().to_vec();
    let mut seen = Vec::with_capacity(tids.len());
    for &tid in &tids {
        let thread = task::seen(tracee, tid)?;
        refusals.extend(thread.refusals(pid));
        seen.push(thread);
    }
    // The leader is first, and its status has the process' memory counters.
    if let Some(kib @ 1..) = seen.first().map(|leader| leader.status().vm_pin_kib) {
        refusals.push(Refusal {
            pid,
            object: Object::Process,
            what: RefusalKind::Pinned { kib },
        });
    }
    let exe = match executable(&mut look)? {
        Ok(exe) => exe,
        Err(what) => {
            refusals.push(Refusal {
                pid,
                object: Object::Process,
                what,
            });
            return Err(Error::Refused(refusals));
        }
    };
    let cwd = working_directory(&mut look)?.unwrap_or_else(|what| {
        refusals.push(Refusal {
            pid,
            object: Object::Process,
            what,
        });
        String::new()
    });
    if !refusals.is_empty() {
        return Err(Error::Refused(refusals));
    }

    let guards = frozen_guards(pid, &vmas, &survey.guards)?;
    let copied = memory::copied_file_pages(pid, &vmas)?;
    let stat = procfs::stat(pid, pid)?;
    let posix_timers = procfs::posix_timers(pid)?;
    let pending = signals::pending(tracee, pid, true)?;
    let umask = seen.first().map_or(0, |leader| leader.status().umask);
    let locked_bytes: u64 = vmas
        .iter()
        .filter(|vma| vma.flags.has("lo"))
        .map(Vma::len)
        .sum();
    let mut process = Process {
        pid,
        ppid: stat.ppid,
        pgid: stat.pgrp,
        sid: stat.session,
        pending,
        descriptors: table.descriptors,
        cwd,
        umask,
        limits: task::limits(pid)?,
        oom_score_adj: procfs::oom_score_adj(pid)?,
        coredump_filter: procfs::coredump_filter(pid)?,
        ..Process::default()
    };

    let cpus = Cpus::online()?;
    let mut injection = tracee.plant(None)?;
    let asked = ask(
        &mut injection,
        &mut process,
        seen,
        posix_timers,
        (&mut table.files, timerfds_read),
        &cpus,
    );
    // The agent's mapping is locked if every new mapping is, which nothing else tells.
    let lock_future = asked.is_ok() && {
        let agent = injection.mapping();
        procfs::status(pid, pid)?.vm_lck_kib * 1024 >= locked_bytes + (agent.end - agent.start)
    };
    injection.cure()?;
    let (answered, first_touch) = asked?;
    let mut since = timers::since(&process.pending, signals::pending(tracee, pid, true)?);
    for thread in &process.threads {
        let now = signals::pending(tracee, thread.tid, false)?;
        since.extend(timers::since(&thread.pending, now));
    }
    timers::rearm(&mut process, &since);

    let asked = memory::Asked {
        brk: answered.brk,
        thp_disabled: answered.thp_disabled,
        lock_future,
    };
    process.space = Some(memory::space(&mut look, &vmas, &guards, &stat, asked, exe)?);
    process.dumpable = answered.dumpable;
    process.child_subreaper = answered.child_subreaper;
    process.membarrier = answered.membarrier;
    // /proc/PID/cmdline and environ are read by others, without a fault: a missing page would show as an empty line in ps.
    let arguments = [
        (stat.arg_start, stat.arg_end),
        (stat.env_start, stat.env_end),
    ];
    let mut eager = memory::first_touch_pages(&first_touch, &arguments, &vmas, &guards);
    process.first_touch = memory::merge(eager.clone())
        .into_iter()
        .map(|range| model::Range {
            start: range.start,
            end: range.end,
        })
        .collect();
    eager.extend(copied);
    let lazy = vmas
        .iter()
        .filter(|vma| memory::is_lazy(memory::classify(vma).ok().flatten()))
        .map(|vma| PageRange {
            start: vma.start,
            end: vma.end,
        })
        .collect();
    let lazy = memory::without(memory::merge(lazy), &guards);
    look.known.sync_written(SYNC_WAIT_FROZEN)?;
    Ok(Captured {
        tree: Tree {
            root: Some(process),
            files: table.files,
            pipes: table.pipes,
            monotonic_ns: answered.monotonic_ns,
            boottime_ns: answered.boottime_ns,
            realtime_ns: answered.realtime_ns,
            host: None,
        },
        eager: memory::merge(eager),
        lazy,
    })
}

/// Largest mapping of a process that uses guards that is searched anew in the freeze, bytes: a program that has guards makes
/// more of them, and thread stacks are of this kind.
const SEARCHED_LEN_MAX: u64 = 16 << 20;

/// Guard regions, looked for only in a process in which the survey found some: in the mappings that had them, and in all that
/// are small. Others that came since are found by the full scan after the commit.
fn frozen_guards(pid: i32, vmas: &[Vma], surveyed: &[PageRange]) -> Result<Vec<PageRange>> {
    if surveyed.is_empty() {
        return Ok(Vec::new());
    }
    memory::guards(pid, vmas, |vma| {
        let whole = PageRange {
            start: vma.start,
            end: vma.end,
        };
        whole.byte_len() <= SEARCHED_LEN_MAX
            || surveyed
                .iter()
                .any(|guard| guard.intersect(whole).is_some())
    })
}

/// Everything that is asked from inside.
fn ask(
    injection: &mut Injection<'_>,
    process: &mut Process,
    seen: Vec<task::Seen>,
    posix_timers: Vec<procfs::PosixTimer>,
    (files, timerfds_read): (&mut [File], host::Clocks),
    cpus: &Cpus,
) -> Result<(Answered, Vec<FirstTouch>)> {
    let pid = process.pid;
    process.actions = signals::actions(injection, pid)?;
    process.itimers = timers::itimers(injection, pid)?;
    let itimers_read = host::clocks()?;
    process.posix_timers = timers::posix(injection, pid, posix_timers)?;
    let posix_timers_read = host::clocks()?;
    let mut answered = task::ask_process(injection, pid)?;
    let passed = timers::until_now(itimers_read)?;
    for timer in &mut process.itimers {
        timer.value_us = passed
            .left_ns(timer.clock(), timer.value_us.saturating_mul(1000))
            .div_ceil(1000);
    }
    let passed = timers::until_now(posix_timers_read)?;
    for timer in &mut process.posix_timers {
        timer.value_ns = passed.left_ns(timer.clock, timer.value_ns);
    }
    let passed = timers::until_now(timerfds_read)?;
    for file in files {
        if let Some(file::Kind::Timerfd(timer)) = &mut file.kind {
            timer.value_ns = passed.left_ns(timer.clock, timer.value_ns);
        }
    }
    let mut refusals = std::mem::take(&mut answered.refusals);

    let work: Vec<_> = seen
        .iter()
        .map(|thread| {
            (
                thread.tid(),
                task::questions(injection.scratch_address(thread.tid())),
            )
        })
        .collect();
    let all = injection.run_all(&work)?;
    let mut first_touch = Vec::with_capacity(seen.len());
    for (thread, results) in seen.into_iter().zip(all) {
        let tid = thread.tid();
        let answers = Answers::new(tid, results);
        let (thread, touched, refused) =
            task::thread(pid, thread, &answers, injection.scratch(tid), cpus)?;
        process.threads.push(thread);
        first_touch.push(touched);
        refusals.extend(refused);
    }
    if !refusals.is_empty() {
        return Err(Error::Refused(refusals));
    }
    Ok((answered, first_touch))
}

#[cfg(test)]
mod tests;
