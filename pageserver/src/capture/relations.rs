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
pub(crate) const MEMORY: &str = "memory";
const ACTIONS: &str = "signal actions";

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
    pub(crate) memory: BTreeMap<i32, i32>,
    /// Signal actions, in one memory.
    pub(crate) actions: BTreeMap<i32, i32>,
}

impl Common {
    /// Of `rows`, parents before their children. One that ends meanwhile has nothing in common with others.
    pub(crate) fn of(rows: &[Row]) -> Result<Self> {
        let pids: Vec<i32> = rows.iter().map(|(pid, _)| *pid).collect();
        let memory = first_of(&pids, descriptor::memory_order)?;
        // Nobody else can have signal actions in common.
        let hosts: BTreeSet<i32> = memory.values().copied().collect();
        let mut tenants = pids.clone();
        tenants.retain(|pid| memory.contains_key(pid) || hosts.contains(pid));
        Ok(Self {
            tables: first_of(&pids, descriptor::table_order)?,
            directories: first_of(&pids, descriptor::directory_order)?,
            actions: first_of(&tenants, descriptor::actions_order)?,
            memory,
        })
    }
}

/// Which processes have the memory of which, of those that stand before them.
pub(crate) fn memories(pids: &[i32]) -> Result<BTreeMap<i32, i32>> {
    first_of(pids, descriptor::memory_order)
}

/// Those of `memory` whose parents wait in vfork(2) for them: nothing else reaches such a thread but SIGKILL.
pub(crate) fn in_vfork(rows: &[Row], memory: &BTreeMap<i32, i32>) -> Result<Vec<Refusal>> {
    let mut found = Vec::new();
    // One may have many children and threads.
    let mut parents: BTreeMap<i32, bool> = BTreeMap::new();
    for (pid, stat) in rows.iter().filter(|(pid, _)| memory.contains_key(pid)) {
        let waits = match (parents.get(&stat.ppid), stat.ppid) {
            (Some(&known), _) => known,
            (None, parent) => match procfs::stands_in_vfork(parent) {
                Err(error) if error.is_gone() => false,
                waits => waits?,
            },
        };
        parents.insert(stat.ppid, waits);
        if waits {
            found.push(Refusal {
                pid: *pid,
                object: Object::Process,
                what: RefusalKind::SharedWith {
                    other: stat.ppid,
                    what: MEMORY,
                },
            });
        }
    }
    Ok(found)
}

/// By search, not by sorting: the order of running processes may change meanwhile.
fn first_of(
    pids: &[i32],
    order: fn(i32, i32) -> pageferry_tracee::Result<Ordering>,
) -> Result<BTreeMap<i32, i32>> {
    let mut firsts: Vec<i32> = Vec::with_capacity(pids.len());
    let mut found = BTreeMap::new();
    for &pid in pids {
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
        memory_of: first(&common.memory, pid),
        actions_of: first(&common.actions, pid),
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
                Shares {
                    directory: true, ..
                } => DIRECTORY,
                Shares { memory: true, .. } => MEMORY,
                _ => ACTIONS,
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
