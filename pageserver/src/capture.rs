//! A frozen process tree, as the model that is carried. One module per kind of kernel object, named as in `image` and `restorer`.
//!
//! [`capture`] runs on the thread that froze the process. It leaves no trace: what has to be asked from inside is asked by an
//! agent in a mapping of its own that is gone again, also on error. It repeats the survey's questions as far as the answer may
//! have changed; a new object that cannot be carried is [`Error::Refused`] and the process is thawed. Nothing here may take
//! longer because the process has more memory: page tables of anonymous memory are not walked.

pub(crate) mod files;
pub mod locks;
pub(crate) mod memory;
pub(crate) mod relations;
pub mod shared;
pub(crate) mod signals;
pub(crate) mod sockets;
pub(crate) mod task;
pub(crate) mod timers;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use pageferry_image::model::files::{Descriptor, File, file};
use pageferry_image::model::memory as model;
use pageferry_image::model::memory::FileIdentity;
use pageferry_image::model::relations::Zombie;
use pageferry_image::model::task::{Process, Tree};
use pageferry_image::model::timers::Passed;
use pageferry_image::page::PageRange;
use pageferry_tracee::host;
use pageferry_tracee::procfs::{self, Vma};
use pageferry_tracee::{Family, Injection, Tracee};

use self::files::{Depth, Look};
use self::locks::{HeldLocks, Leased};
use self::memory::FirstTouch;
use self::relations::Common;
use self::shared::{Moved, Objects, SharedPages};
use self::sockets::flight::InFlight;
use self::task::{Answered, Cpus};
use crate::survey::{
    self, Member, Object, Refusal, RefusalKind, Survey, SurveyOptions, executable,
    working_directory,
};
use crate::{Error, Result};

/// Longest wait for the storage of written files, with the process frozen.
const SYNC_WAIT_FROZEN: Duration = Duration::from_secs(5);

/// Most processes that are looked at in the freeze for the first time.
const NEWCOMERS_MAX: usize = 16;

/// What one freeze yields.
#[derive(Debug)]
pub struct Captured {
    /// The model.
    pub tree: Tree,
    /// The pages of each process, in the order of the model.
    pub pages: Vec<Pages>,
    /// Where the pages of each shared object are, in the order of the model: all travel before the tree runs.
    pub shared: Vec<SharedPages>,
    /// Files that are in the way here once the tree runs elsewhere.
    pub moved: Vec<Moved>,
    /// Locks that are in the way of those the tree is to hold elsewhere.
    pub held_locks: HeldLocks,
}

/// Which pages of a process are carried, and when.
#[derive(Debug, Default)]
pub struct Pages {
    /// The process.
    pub pid: i32,
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

/// Captures a frozen process and all its descendants, which `survey` found fit to be carried.
///
/// # Errors
/// [`Error::Refused`] lists what cannot be carried and was not there, or could not be seen, before the freeze. After any error
/// the processes are as they were, still frozen.
pub fn capture(family: &mut Family, survey: &Survey, options: &SurveyOptions) -> Result<Captured> {
    let pids = family.pids();
    let mut look = Look {
        pid: survey.pid,
        pids: &pids,
        options,
        known: survey.known.clone(),
        shared: Objects::default(),
        ended: Vec::new(),
        leased: Leased::default(),
    };
    let Ordered {
        rows: stats,
        zombies,
        common,
        mut refusals,
    } = ordered(survey.pid, &pids)?;
    look.ended = zombies.iter().map(|zombie| zombie.pid).collect();
    let mut entries = Vec::with_capacity(stats.len());
    for (pid, _) in &stats {
        // A table is looked at once.
        let is_first = !common.tables.contains_key(pid);
        let table = is_first.then(|| procfs::descriptors(*pid)).transpose()?;
        let table = table.unwrap_or_default();
        look.leased.add(*pid, &table);
        entries.push((*pid, table));
    }
    let newcomers = newcomers(&mut look, &stats, &common.memory, survey, &mut refusals)?;
    if !refusals.is_empty() {
        return Err(Error::Refused(refusals));
    }
    let in_flight = InFlight::find(family, &mut entries)?;
    let timerfds_read = host::clocks()?;
    let mut table = files::table(&mut look, &entries, &in_flight, Depth::Capture)?;
    refusals.append(&mut table.refusals);
    let unknown: BTreeSet<u64> = table.inodes.difference(&survey.inodes).copied().collect();
    let fifos: BTreeSet<(u64, u64)> = table.fifos.difference(&survey.fifos).copied().collect();
    if !unknown.is_empty() || !fifos.is_empty() {
        refusals.extend(files::held_outside(&entries, &unknown, &fifos)?);
    }
    let places = locks::of_files(&table.locks);
    let unknown = places.difference(&survey.locks).copied().collect();
    refusals.extend(locks::held_outside(&pids, &unknown)?);
    let mut members = Vec::with_capacity(stats.len());
    let mut homes: BTreeMap<i32, Home> = BTreeMap::new();
    for (pid, stat) in stats {
        look.pid = pid;
        if !common.memory.contains_key(&pid) {
            let surveyed = survey.members.get(&pid).or(newcomers.get(&pid));
            let surveyed = surveyed.map(Arc::as_ref);
            homes.insert(pid, Home::of(&mut look, surveyed, &mut refusals)?);
        }
        members.extend(Outside::of(
            &mut look,
            family.member(pid)?,
            stat,
            &mut refusals,
        )?);
    }
    let unknown: BTreeSet<_> = look
        .shared
        .keys()
        .difference(&survey.shared)
        .copied()
        .collect();
    refusals.extend(look.shared.held_outside(&pids, &unknown)?);
    if !refusals.is_empty() {
        return Err(Error::Refused(in_flight.named(refusals)));
    }

    let cpus = Cpus::online()?;
    let mut tree = Tree {
        zombies,
        ..Tree::default()
    };
    let mut pages = Vec::with_capacity(members.len());
    let mut clocks = Vec::with_capacity(members.len());
    let mut first_touch: BTreeMap<i32, Vec<PageRange>> = BTreeMap::new();
    let count = members.len();
    for (index, member) in members.into_iter().enumerate() {
        look.pid = member.pid;
        // Timers of files belong to no process: with the last one the tree's time is read.
        let timerfds = (index + 1 == count).then_some((table.files.as_mut_slice(), timerfds_read));
        let descriptors = table.descriptors.remove(&member.pid).unwrap_or_default();
        let pid = member.pid;
        let memory_of = common.memory.get(&pid).copied();
        let home = homes.get(&memory_of.unwrap_or(pid));
        let home = home.ok_or(pageferry_tracee::Error::Gone { pid })?;
        let mut inside = member.ask(&mut look, family, home, descriptors, &cpus, timerfds)?;
        inside.process.table_of = common.tables.get(&pid).copied().unwrap_or(0);
        inside.process.directory_of = common.directories.get(&pid).copied().unwrap_or(0);
        inside.process.memory_of = memory_of.unwrap_or(0);
        inside.process.actions_of = common.actions.get(&pid).copied().unwrap_or(0);
        if inside.process.actions_of != 0 {
            inside.process.actions.clear();
        }
        tree.processes.push(inside.process);
        pages.push(inside.pages);
        clocks.push(inside.clocks_ns);
        first_touch
            .entry(home.pid)
            .or_default()
            .append(&mut inside.first_touch);
    }
    for (process, pages) in tree.processes.iter_mut().zip(&mut pages) {
        // What the others in its memory touch first is there when they are.
        let Some(touched) = first_touch.remove(&process.pid) else {
            continue;
        };
        pages.eager = memory::merge([std::mem::take(&mut pages.eager), touched.clone()].concat());
        process.first_touch = memory::merge(touched)
            .into_iter()
            .map(|range| model::Range {
                start: range.start,
                end: range.end,
            })
            .collect();
    }
    // One time for all: what had been left of the timers of those that were asked before the last has become less.
    let now = clocks.last().copied().unwrap_or_default();
    for (process, then) in tree.processes.iter_mut().zip(clocks) {
        timers::pass(process, &Passed::between(then, now));
    }
    [tree.monotonic_ns, tree.boottime_ns, tree.realtime_ns] = now;
    (tree.files, tree.pipes) = (table.files, table.pipes);
    let (models, held_locks) = locks::in_order(table.locks);
    tree.locks = models;
    look.known.sync_written(SYNC_WAIT_FROZEN)?;
    let moved = look.shared.moved();
    let (objects, mut shared) = look.shared.into_models(tree.processes.len());
    in_flight.keep(&mut shared)?;
    tree.shared = objects;
    Ok(Captured {
        tree,
        pages,
        shared,
        moved,
        held_locks,
    })
}

/// A process and its row in the process table.
pub(crate) type Row = (i32, procfs::Stat);

/// The frozen processes and their relations.
struct Ordered {
    /// Parents before their children.
    rows: Vec<Row>,
    /// Children of theirs that have ended.
    zombies: Vec<Zombie>,
    /// What they share, other than open files.
    common: Common,
    /// What of this is refused.
    refusals: Vec<Refusal>,
}

fn ordered(root: i32, pids: &[i32]) -> Result<Ordered> {
    let mut refusals = Vec::new();
    let mut refuse = |pid, what| {
        refusals.push(Refusal {
            pid,
            object: Object::Process,
            what,
        })
    };
    let mut left: BTreeSet<i32> = pids.iter().copied().filter(|&pid| pid != root).collect();
    let mut rows = vec![(root, procfs::stat(root, root)?)];
    let mut zombies = Vec::new();
    let mut index = 0;
    while let Some(&(pid, _)) = rows.get(index) {
        for child in procfs::children(pid)? {
            let stat = match procfs::stat(child, child) {
                // It ended just now, and its parent does not want to know.
                Err(error) if error.is_gone() && !left.contains(&child) => continue,
                stat => stat?,
            };
            if left.remove(&child) {
                rows.push((child, stat));
                continue;
            }
            // Only what has ended could not be seized.
            match stat.state {
                'Z' => match relations::zombie(child, &stat)? {
                    Ok(zombie) => zombies.push(zombie),
                    Err(what) => refuse(child, what),
                },
                'X' => {}
                _ => refuse(child, RefusalKind::Newcomer),
            }
        }
        index += 1;
    }
    for pid in left {
        let parent = procfs::stat(pid, pid)?.ppid;
        refuse(pid, RefusalKind::Orphan { parent });
    }
    let common = Common::of(&rows)?;
    refusals.extend(relations::making(&rows, &zombies, &common).1);
    Ok(Ordered {
        rows,
        zombies,
        common,
        refusals,
    })
}

/// Looks at the processes that came after the survey, if they are few and small: a program that makes short-lived ones all the
/// time always has some. Larger ones are for another survey. `common`: which have the memory of which; one that came into a memory
/// that was there already is small, whatever that is. What was found, by those that have a memory first.
fn newcomers(
    look: &mut Look<'_>,
    rows: &[Row],
    common: &BTreeMap<i32, i32>,
    survey: &Survey,
    refusals: &mut Vec<Refusal>,
) -> Result<BTreeMap<i32, Arc<Member>>> {
    let is_new = |row: &&Row| !survey.members.contains_key(&row.0);
    let new: Vec<&Row> = rows.iter().filter(is_new).collect();
    let mut found = BTreeMap::new();
    let refuse = |pid| Refusal {
        pid,
        object: Object::Process,
        what: RefusalKind::Newcomer,
    };
    if new.len() > NEWCOMERS_MAX {
        refusals.extend(new.iter().map(|(pid, _)| refuse(*pid)));
        return Ok(found);
    }
    for &(pid, stat) in &new {
        look.pid = *pid;
        survey::newcomer(look, survey.pid, stat, refusals)?;
        // Looked at with the first.
        if common.contains_key(pid) {
            continue;
        }
        let mut tenants = common.iter().filter(|(_, host)| *host == pid);
        let surveyed = tenants.find_map(|(tenant, _)| survey.members.get(tenant));
        let memory = match surveyed {
            Some(known) => Some(Arc::clone(known)),
            None => survey::newcomers_memory(*pid, refusals)?,
        };
        match memory {
            Some(memory) => drop(found.insert(*pid, memory)),
            None => refusals.push(refuse(*pid)),
        }
    }
    Ok(found)
}

/// The memory of a frozen process, and of those that share it.
struct Home {
    /// The first that has it.
    pid: i32,
    vmas: Vec<Vma>,
    guards: Vec<PageRange>,
}

impl Home {
    fn of(
        look: &mut Look<'_>,
        surveyed: Option<&Member>,
        refusals: &mut Vec<Refusal>,
    ) -> Result<Self> {
        let pid = look.pid;
        let (known, guards) = surveyed.map_or((&[][..], &[][..]), |surveyed| {
            (&surveyed.vmas[..], &surveyed.guards[..])
        });
        let vmas = memory::frozen_mappings(pid, known)?;
        refusals.extend(memory::refusals(look, &vmas)?);
        Ok(Self {
            pid,
            guards: frozen_guards(pid, &vmas, guards)?,
            vmas,
        })
    }
}

/// What is had of a frozen process without asking it.
struct Outside {
    pid: i32,
    stat: procfs::Stat,
    seen: Vec<task::Seen>,
    exe: FileIdentity,
    cwd: String,
}

/// And what it told.
struct Inside {
    process: Process,
    pages: Pages,
    /// Pages of its memory that its threads touch first, and its arguments.
    first_touch: Vec<PageRange>,
    /// When it was asked: the tree's monotonic, boot time and real-time clock.
    clocks_ns: [u64; 3],
}

impl Outside {
    /// `None`, with a refusal added, if it is refused as a whole.
    fn of(
        look: &mut Look<'_>,
        tracee: &Tracee,
        stat: procfs::Stat,
        refusals: &mut Vec<Refusal>,
    ) -> Result<Option<Self>> {
        let pid = look.pid;
        refusals.extend(timers::refusals(pid)?);
        let mut seen = Vec::with_capacity(tracee.tids().len());
        for &tid in tracee.tids() {
            let thread = task::seen(tracee, tid)?;
            refusals.extend(thread.refusals(pid));
            seen.push(thread);
        }
        let mut refuse = |what| {
            refusals.push(Refusal {
                pid,
                object: Object::Process,
                what,
            })
        };
        // The leader is first, and its status has the process' memory counters.
        if let Some(kib @ 1..) = seen.first().map(|leader| leader.status().vm_pin_kib) {
            refuse(RefusalKind::Pinned { kib });
        }
        let exe = executable(look)?;
        let cwd = working_directory(look)?;
        let (exe, cwd) = match (exe, cwd) {
            (Ok(exe), Ok(cwd)) => (exe, cwd),
            (exe, cwd) => {
                exe.err().into_iter().chain(cwd.err()).for_each(refuse);
                return Ok(None);
            }
        };
        Ok(Some(Self {
            pid,
            stat,
            seen,
            exe,
            cwd,
        }))
    }

    /// Asks it for the rest. Of `home`, its memory, it tells only if that is not another's.
    fn ask(
        self,
        look: &mut Look<'_>,
        family: &mut Family,
        home: &Home,
        descriptors: Vec<Descriptor>,
        cpus: &Cpus,
        timerfds: Option<(&mut [File], host::Clocks)>,
    ) -> Result<Inside> {
        let Self {
            pid,
            stat,
            seen,
            exe,
            cwd,
        } = self;
        let Home { vmas, guards, .. } = home;
        let is_owner = home.pid == pid;
        let copied = match is_owner {
            true => memory::copied_file_pages(pid, vmas)?,
            false => Vec::new(),
        };
        let posix_timers = procfs::posix_timers(pid)?;
        let pending = signals::pending(family.member(pid)?, pid, true)?;
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
            exit_signal: u32::try_from(stat.exit_signal).ok(),
            pending,
            descriptors,
            cwd,
            umask,
            limits: task::limits(pid)?,
            oom_score_adj: procfs::oom_score_adj(pid)?,
            coredump_filter: procfs::coredump_filter(pid)?,
            ..Process::default()
        };

        let mut injection = family.plant(pid)?;
        let asked = ask(
            &mut injection,
            &mut process,
            seen,
            posix_timers,
            timerfds,
            cpus,
        );
        // The agent's mapping is locked if every new mapping is, which nothing else tells.
        let lock_future = asked.is_ok() && {
            let agent = injection.mapping();
            procfs::status(pid, pid)?.vm_lck_kib * 1024 >= locked_bytes + (agent.end - agent.start)
        };
        injection.cure()?;
        let (answered, touched) = asked?;
        let tracee: &Tracee = family.member(pid)?;
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
        if is_owner {
            process.space = Some(memory::space(look, vmas, guards, &stat, asked, exe)?);
            process.membarrier = answered.membarrier;
        }
        process.dumpable = answered.dumpable;
        process.child_subreaper = answered.child_subreaper;
        // /proc/PID/cmdline and environ are read by others, without a fault: a missing page would show as an empty line in ps.
        let arguments = [
            (stat.arg_start, stat.arg_end),
            (stat.env_start, stat.env_end),
        ];
        let first_touch = memory::first_touch_pages(&touched, &arguments, vmas, guards);
        let lazy = match is_owner {
            true => memory::lazy(vmas, guards),
            false => Vec::new(),
        };
        Ok(Inside {
            process,
            pages: Pages {
                pid,
                eager: copied,
                lazy,
            },
            first_touch,
            clocks_ns: [
                answered.monotonic_ns,
                answered.boottime_ns,
                answered.realtime_ns,
            ],
        })
    }
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
    timerfds: Option<(&mut [File], host::Clocks)>,
    cpus: &Cpus,
) -> Result<(Answered, Vec<FirstTouch>)> {
    let pid = process.pid;
    process.actions = signals::actions(injection, pid)?;
    process.itimers = timers::itimers(injection, pid)?;
    let itimers_read = host::clocks()?;
    process.posix_timers = timers::posix(injection, pid, posix_timers)?;
    let posix_timers_read = host::clocks()?;
    let mut answered = task::ask_process(injection, pid)?;
    timers::pass_itimers(process, &timers::until_now(itimers_read)?);
    timers::pass_posix(process, &timers::until_now(posix_timers_read)?);
    if let Some((files, timerfds_read)) = timerfds {
        let passed = timers::until_now(timerfds_read)?;
        for file in files {
            if let Some(file::Kind::Timerfd(timer)) = &mut file.kind {
                timer.value_ns = passed.left_ns(timer.clock, timer.value_ns);
            }
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
