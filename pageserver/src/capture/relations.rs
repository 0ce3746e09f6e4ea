//! Who is whose child, session and group; what has ended and was not waited for.

use std::collections::BTreeSet;

use pageferry_image::model::relations::{Making, Member, Obstacle, Zombie};
use pageferry_tracee::procfs::{self, Stat};

use super::Row;
use crate::Result;
use crate::survey::{Object, Refusal, RefusalKind};

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

/// How a tree can be made again, from the rows of its processes in the process table, the root's first: the numbers that this
/// takes beside its own, and what is in the way.
///
/// Of a running tree two rows may contradict each other; whoever has a parent that is not there is left out.
pub(crate) fn making(stats: &[Row], zombies: &[Zombie]) -> (Vec<i32>, Vec<Refusal>) {
    let rows = stats.iter().map(|(pid, stat)| Member {
        pid: *pid,
        ppid: stat.ppid,
        pgid: stat.pgrp,
        sid: stat.session,
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
    };
    Refusal {
        pid,
        object: Object::Process,
        what,
    }
}
