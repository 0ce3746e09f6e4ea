//! Who is whose child, session and group; what has ended and was not waited for.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use pageferry_image::model::relations::sharing::Shares;
use pageferry_image::model::relations::{Making, Member, Obstacle, Zombie};
use pageferry_tracee::descriptor;
use pageferry_tracee::procfs::{self, Stat};

use super::Row;
use crate::Result;
use crate::survey::{Object, Refusal, RefusalKind};

/// What tasks may have in common, as operators read it.
pub(crate) const TABLE: &str = "descriptor table";
pub(crate) const DIRECTORY: &str = "working directory and umask";

/// What can be told of a process that has ended, or why it is not carried.
pub(crate) fn zombie(pid: i32, stat: &Stat) -> Result<std::result::Result<Zombie, RefusalKind>> {
    if procfs::tids(pid)?.len() > 1 {
        return Ok(Err(RefusalKind::DeadLeader));
    }
    let status = procfs::status(pid, pid)?;
    if status.tracer_pid != 0 {
        return Ok(Err(RefusalKind::Traced {
            by: status.tracer_pid,
        }));
    }
    let [uid, ..] = status.uid;
    Ok(Ok(Zombie {
        pid,
        ppid: stat.ppid,
        pgid: stat.pgrp,
        sid: stat.session,
        status: stat.exit_code,
        comm: procfs::comm(pid, pid)?,
        uid,
        exit_signal: u32::try_from(stat.exit_signal).unwrap_or(0),
    }))
}

/// What processes of the tree have in common, each with the first of those that have it, in their order.
#[derive(Debug, Default)]
pub(crate) struct Common {
    /// Descriptor tables.
    pub(crate) tables: BTreeMap<i32, i32>,
    /// Working directories and umasks.
    pub(crate) directories: BTreeMap<i32, i32>,
    /// Address spaces.
    memory: BTreeMap<i32, i32>,
}

impl Common {
    /// Of `rows`, parents before their children. One that ends meanwhile has nothing in common with others.
    pub(crate) fn of(rows: &[Row]) -> Result<Self> {
        Ok(Self {
            tables: first_of(rows, descriptor::table_order)?,
            directories: first_of(rows, descriptor::directory_order)?,
            memory: first_of(rows, descriptor::memory_order)?,
        })
    }

    /// What of it is not carried.
    pub(crate) fn refusals(&self) -> impl Iterator<Item = Refusal> {
        self.memory.iter().map(|(&pid, &other)| Refusal {
            pid,
            object: Object::Process,
            what: RefusalKind::SharedWith {
                other,
                what: "memory",
            },
        })
    }
}

/// By search, not by sorting: the order of running processes may change meanwhile.
fn first_of(
    rows: &[Row],
    order: fn(i32, i32) -> pageferry_tracee::Result<Ordering>,
) -> Result<BTreeMap<i32, i32>> {
    let mut firsts: Vec<i32> = Vec::with_capacity(rows.len());
    let mut found = BTreeMap::new();
    for &(pid, _) in rows {
        let mut failure = None;
        let place = firsts.binary_search_by(|&first| {
            order(first, pid).unwrap_or_else(|error| {
                failure.get_or_insert(error);
                Ordering::Equal
            })
        });
        match (failure, place) {
            (Some(error), _) if error.is_gone() => {}
            (Some(error), _) => return Err(error.into()),
            (None, Ok(place)) => drop(found.insert(pid, firsts[place])),
            (None, Err(place)) => firsts.insert(place, pid),
        }
    }
    Ok(found)
}

/// How a tree can be made again, from the rows of its processes in the process table, the root's first: the numbers that this
/// takes beside its own, and what is in the way.
///
/// Of a running tree two rows may contradict each other; whoever has a parent that is not there is left out.
pub(crate) fn making(
    stats: &[Row],
    zombies: &[Zombie],
    common: &Common,
) -> (Vec<i32>, Vec<Refusal>) {
    let first = |of: &BTreeMap<i32, i32>, pid| of.get(pid).copied().unwrap_or(0);
    let rows = stats.iter().map(|(pid, stat)| Member {
        pid: *pid,
        ppid: stat.ppid,
        pgid: stat.pgrp,
        sid: stat.session,
        table_of: first(&common.tables, pid),
        directory_of: first(&common.directories, pid),
    });
    let running: BTreeSet<i32> = stats.iter().map(|(pid, _)| *pid).collect();
    let mut known = BTreeSet::new();
    let mut members = Vec::with_capacity(stats.len() + zombies.len());
    for member in rows.chain(zombies.iter().map(Member::from)) {
        let has_parent =
            members.is_empty() || (known.contains(&member.ppid) && running.contains(&member.ppid));
        if has_parent && known.insert(member.pid) {
            members.push(member);
        }
    }
    match Making::of(&members) {
        Ok(making) => (making.helpers, Vec::new()),
        Err(obstacles) => (Vec::new(), obstacles.into_iter().map(refusal).collect()),
    }
}

fn refusal(obstacle: Obstacle) -> Refusal {
    let (pid, what) = match obstacle {
        Obstacle::Session { pid, session } => (pid, RefusalKind::Session { session }),
        Obstacle::Group { pid, group } => (pid, RefusalKind::Group { group }),
        Obstacle::Sharing { pid, other, shares } => {
            let what = match shares {
                Shares { table: true, .. } => TABLE,
                Shares { table: false, .. } => DIRECTORY,
            };
            (pid, RefusalKind::Sharing { other, what })
        }
    };
    Refusal {
        pid,
        object: Object::Process,
        what,
    }
}
