//! Rebuilds the signal action table and what was pending. Alternate stacks and masks belong to threads: see `task`.

use pageferry_image::model::signals::{Action, Pending};
use pageferry_image::model::task::Process;
use pageferry_tracee::injection::Injection;
use pageferry_tracee::procfs;

use super::{Result, Work};

/// Size of the kernel's sigset_t.
const SIGSET_LEN: u64 = 8;

/// Sets every action that is not the default, and back to it what was inherited. SIGKILL and SIGSTOP have none. What is another's
/// too has been set there.
pub(crate) fn rebuild_actions(injection: &mut Injection<'_>, process: &Process) -> Result<()> {
    if process.actions_of != 0 {
        return Ok(());
    }
    // What pageferry ignores (SIGPIPE, as every Rust program) the husk ignores too, across its exec.
    let ignored = procfs::status(process.pid, process.pid)?.sig_ign;
    let inherited = (1..=64u32)
        .filter(|signo| ignored & (1 << (signo - 1)) != 0)
        .map(|signo| Action {
            signo,
            ..Action::default()
        });
    let mut work = Work::new(injection, process.pid);
    for action in inherited.chain(process.actions.iter().cloned()) {
        work.room()?;
        let mut bytes = Vec::with_capacity(32);
        for field in [action.handler, action.flags, action.restorer, action.mask] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        let at = work.bytes(&bytes)?;
        work.call(
            format!("action of signal {}", action.signo),
            "rt_sigaction",
            libc::SYS_rt_sigaction,
            &[
                u64::from(action.signo).into(),
                at.into(),
                0u64.into(),
                SIGSET_LEN.into(),
            ],
        );
    }
    work.run()?;
    Ok(())
}

/// Queues what was pending, in order. A process may queue any siginfo to itself, so the process does it; every signal
/// is blocked meanwhile.
pub(crate) fn rebuild_pending(injection: &mut Injection<'_>, process: &Process) -> Result<()> {
    let pid = process.pid;
    let mut work = Work::new(injection, pid);
    for pending in &process.pending {
        work.room()?;
        let at = work.bytes(&pending.siginfo)?;
        let signo = signo(pending);
        work.call(
            format!("pending signal {signo}"),
            "rt_sigqueueinfo",
            libc::SYS_rt_sigqueueinfo,
            &[pid.into(), u64::from(signo).into(), at.into()],
        );
    }
    work.run()?;
    for thread in &process.threads {
        let mut work = Work::new(injection, thread.tid);
        for pending in &thread.pending {
            work.room()?;
            let at = work.bytes(&pending.siginfo)?;
            let signo = signo(pending);
            let object = format!("thread {}, pending signal {signo}", thread.tid);
            work.call(
                object,
                "rt_tgsigqueueinfo",
                libc::SYS_rt_tgsigqueueinfo,
                &[
                    pid.into(),
                    thread.tid.into(),
                    u64::from(signo).into(),
                    at.into(),
                ],
            );
        }
        work.run()?;
    }
    Ok(())
}

fn signo(pending: &Pending) -> u32 {
    pending
        .siginfo
        .first_chunk::<4>()
        .map_or(0, |bytes| u32::from_le_bytes(*bytes))
}
