//! Makes the husks of a tree, each the child of whom it was, in its session and group; and those that have ended, ended.
//!
//! The order is the model's ([`Making`]). It comes before anything else is made in any husk: all of them have the same memory,
//! and a child has its parent's descriptors, which are none. So what processes share is empty when it comes to them. Who is to
//! share memory is born into that of a husk, and stands still until its owner's is made of it.

use std::collections::BTreeMap;

use pageferry_image::model::relations::sharing::Shares;
use pageferry_image::model::relations::{Making, Obstacle, Step};
use pageferry_image::model::task::{Process, Tree};
use pageferry_tracee::family::Family;
use pageferry_tracee::injection::{Birth, End, Injection};
use pageferry_tracee::{descriptor, procfs};

use super::{Error, Result, Work};

const SIGCHLD: u32 = 17;

/// Makes all of `tree` but its root, the only one of `family`.
pub(crate) fn make(family: &mut Family, tree: &Tree) -> Result<()> {
    let Making { steps, shares, .. } = tree.making().map_err(|obstacles| Error::Mismatch {
        object: "the tree".into(),
        what: match obstacles.first() {
            Some(Obstacle::Session { session, .. }) => format!("session {session} cannot be made"),
            Some(Obstacle::Group { group, .. }) => format!("group {group} cannot be made"),
            Some(Obstacle::Sharing { pid, other, .. }) => {
                format!("what process {pid} shares with {other} cannot come to it")
            }
            None => "it cannot be made".into(),
        },
    })?;
    let running = tree.processes.iter();
    let running = running.map(|process| (process.pid, process.end_signal()));
    let ended = tree.zombies.iter();
    let ended = ended.map(|zombie| (zombie.pid, zombie.exit_signal));
    let signals: BTreeMap<i32, u32> = running.chain(ended).collect();
    let birth = |pid| {
        let shares: Shares = shares.get(&pid).copied().unwrap_or_default();
        Birth {
            pid: Some(pid),
            exit_signal: signals.get(&pid).copied().unwrap_or(0),
            shares_table: shares.table,
            shares_directory: shares.directory,
            shares_memory: shares.memory,
            shares_actions: shares.actions,
        }
    };
    let mut steps = steps.into_iter().peekable();
    while let Some(step) = steps.next() {
        match step {
            Step::Bear { parent, child } => {
                let mut children = vec![birth(child)];
                // What one bears at a time costs one visit.
                while let Some(Step::Bear { child, .. }) = steps.next_if(
                    |step| matches!(step, Step::Bear { parent: next, .. } if *next == parent),
                ) {
                    children.push(birth(child));
                }
                family.bear(parent, &children)?;
            }
            Step::Help { parent, helper } => family.bear(parent, &[birth(helper)])?,
            Step::Foster {
                parent,
                leader,
                child,
            } => family.foster(parent, leader, birth(child))?,
            Step::LeadSession { pid } => family.member(pid)?.lead_session()?,
            Step::LeadGroup { pid } => family.member(pid)?.join_group(pid)?,
            Step::Join { pid, group } => family.member(pid)?.join_group(group)?,
            Step::Part { pid, shares } => {
                family.member(pid)?.part(shares.table, shares.directory)?
            }
            Step::Dismiss { parent, helper } => {
                family.end(helper, &End::default())?;
                family.member(parent)?.reap(helper)?;
            }
        }
    }
    end_ended(family, tree)?;
    verify(tree)
}

/// Those that had ended end, behind each other those of one parent: it keeps them in the order of their births, and is told of all.
fn end_ended(family: &mut Family, tree: &Tree) -> Result<()> {
    let mut parents: Vec<i32> = tree.zombies.iter().map(|zombie| zombie.ppid).collect();
    parents.dedup();
    for parent in parents {
        // One that ignores it, as a husk may whose maker did, would not find them.
        family.member(parent)?.default_action(SIGCHLD as i32)?;
    }
    for zombie in &tree.zombies {
        let end = End {
            status: zombie.status,
            uid: zombie.uid,
            comm: zombie.comm.clone(),
        };
        family.end(zombie.pid, &end)?;
    }
    Ok(())
}

/// The kernel has the last word on who is whose.
fn verify(tree: &Tree) -> Result<()> {
    let Some(root) = tree.processes.first() else {
        return Ok(());
    };
    for member in tree.members().into_iter().skip(1) {
        let stat = procfs::stat(member.pid, member.pid)?;
        let sid = if member.sid == root.sid {
            root.pid
        } else {
            member.sid
        };
        if (stat.ppid, stat.session) != (member.ppid, sid) {
            return Err(Error::Mismatch {
                object: format!("process {}", member.pid),
                what: format!(
                    "it was made as a child of {} in session {}",
                    stat.ppid, stat.session
                ),
            });
        }
    }
    for process in tree.processes.iter().skip(1) {
        let has = |other, same: fn(i32, i32) -> pageferry_tracee::Result<bool>| match other {
            0 => Ok(true),
            other => same(process.pid, other),
        };
        if !has(process.table_of, descriptor::same_table)?
            || !has(process.directory_of, descriptor::same_directory)?
            || !has(process.memory_of, descriptor::same_memory)?
            || !has(process.actions_of, descriptor::same_actions)?
        {
            return Err(Error::Mismatch {
                object: format!("process {}", process.pid),
                what: "it was made without what it shares".into(),
            });
        }
        let signal = procfs::stat(process.pid, process.pid)?.exit_signal;
        if u32::try_from(signal) != Ok(process.end_signal()) {
            return Err(Error::Mismatch {
                object: format!("process {}", process.pid),
                what: format!("it would tell its end by signal {signal}"),
            });
        }
    }
    Ok(())
}

/// Takes back what the ends of its children have told the process: it was told where they had ended, and what of that it had not
/// noticed is pending there, and comes from the model.
pub(crate) fn forget_ends(
    injection: &mut Injection<'_>,
    process: &Process,
    tree: &Tree,
) -> Result<()> {
    let mut work = Work::new(injection, process.pid);
    let children = tree
        .zombies
        .iter()
        .filter(|zombie| zombie.ppid == process.pid);
    for zombie in children.filter(|zombie| zombie.exit_signal != 0) {
        work.room()?;
        let mask = 1_u64 << (zombie.exit_signal - 1);
        let mask = work.bytes(&mask.to_le_bytes())?;
        let now = work.bytes(&[0; 16])?;
        // Signals are told once, however often they were raised, except real-time signals: EAGAIN says that it was the last.
        work.ignored(
            "rt_sigtimedwait",
            libc::SYS_rt_sigtimedwait,
            &[mask.into(), 0u64.into(), now.into(), 8u64.into()],
        );
    }
    work.run()?;
    Ok(())
}
