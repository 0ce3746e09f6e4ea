//! Rebuilds interval timers and POSIX timers. They are armed last, with what is left of them now.

use pageferry_image::model::task::{Process, Tree};
use pageferry_image::model::timers::Passed;
use pageferry_tracee::host::Clocks;
use pageferry_tracee::injection::Injection;

use super::{Result, Work};

const NS_PER_S: u64 = 1_000_000_000;
const US_PER_S: u64 = 1_000_000;
/// `timer_settime(2)`: the value is a moment, not a distance.
const TIMER_ABSTIME: u64 = 1;
/// prctl(2), Linux 6.15: timer_create takes the wanted id from `*timerid` while this is on.
const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;

/// How far the tree's clocks have gone since the capture.
pub(crate) fn since_capture(tree: &Tree, now: Clocks) -> Passed {
    let then = [tree.monotonic_ns, tree.boottime_ns, tree.realtime_ns];
    Passed::between(then, now.all_ns())
}

fn pair(first: u64, second: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&first.to_le_bytes());
    bytes[8..].copy_from_slice(&second.to_le_bytes());
    bytes
}

/// Makes and arms the timers; every signal is blocked in the agent, so one that fires now stays pending.
pub(crate) fn rebuild(
    injection: &mut Injection<'_>,
    process: &Process,
    tree: &Tree,
    passed: impl Fn() -> Result<Passed>,
) -> Result<()> {
    let mut work = Work::new(injection, process.pid);
    if !process.posix_timers.is_empty() {
        work.call(
            "POSIX timers",
            "prctl(PR_TIMER_CREATE_RESTORE_IDS)",
            libc::SYS_prctl,
            &[
                PR_TIMER_CREATE_RESTORE_IDS.into(),
                1u64.into(),
                0u64.into(),
                0u64.into(),
                0u64.into(),
            ],
        );
    }
    for timer in &process.posix_timers {
        work.room()?;
        let name = format!("POSIX timer {}", timer.id);
        // struct sigevent: value, signo, notify, tid; 64 bytes.
        let mut event = [0u8; 64];
        event[..8].copy_from_slice(&timer.sigev_value.to_le_bytes());
        event[8..12].copy_from_slice(&timer.signo.to_le_bytes());
        event[12..16].copy_from_slice(&timer.notify.to_le_bytes());
        event[16..20].copy_from_slice(&timer.tid.to_le_bytes());
        let event = work.bytes(&event)?;
        let id = work.bytes(&timer.id.to_le_bytes())?;
        work.call(
            name.as_str(),
            "timer_create",
            libc::SYS_timer_create,
            &[timer.clock.into(), event.into(), id.into()],
        );
        // An absolute time does not depend on when it is armed; the tree's clocks are those of the husk already. The wall clock
        // may be set meanwhile, and a timer that was armed with a relative time must not notice.
        let (flags, value_ns) = match (timer.value_ns, timer.clock) {
            (0, _) => (0, 0),
            (left, libc::CLOCK_MONOTONIC) => {
                (TIMER_ABSTIME, tree.monotonic_ns.saturating_add(left))
            }
            (left, libc::CLOCK_BOOTTIME) => (TIMER_ABSTIME, tree.boottime_ns.saturating_add(left)),
            (left, clock) => (0, passed()?.left_ns(clock, left)),
        };
        let mut spec = pair(timer.interval_ns / NS_PER_S, timer.interval_ns % NS_PER_S).to_vec();
        spec.extend_from_slice(&pair(value_ns / NS_PER_S, value_ns % NS_PER_S));
        let spec = work.bytes(&spec)?;
        work.call(
            name,
            "timer_settime",
            libc::SYS_timer_settime,
            &[
                u64::from(timer.id).into(),
                flags.into(),
                spec.into(),
                0u64.into(),
            ],
        );
    }
    if !process.posix_timers.is_empty() {
        work.room()?;
        work.call(
            "POSIX timers",
            "prctl(PR_TIMER_CREATE_RESTORE_IDS)",
            libc::SYS_prctl,
            &[
                PR_TIMER_CREATE_RESTORE_IDS.into(),
                0u64.into(),
                0u64.into(),
                0u64.into(),
                0u64.into(),
            ],
        );
    }
    work.run()?;
    for timer in &process.itimers {
        // A periodic timer whose signal is pending says 0: it would be armed again when the signal is taken.
        let value_us = if timer.value_us == 0 {
            timer.interval_us
        } else {
            timer.value_us
        };
        let left_ns = passed()?.left_ns(timer.clock(), value_us.saturating_mul(1000));
        let value_us = left_ns.div_ceil(1000);
        let mut spec = pair(timer.interval_us / US_PER_S, timer.interval_us % US_PER_S).to_vec();
        spec.extend_from_slice(&pair(value_us / US_PER_S, value_us % US_PER_S));
        let spec = work.bytes(&spec)?;
        work.call(
            format!("interval timer {}", timer.which),
            "setitimer",
            libc::SYS_setitimer,
            &[u64::from(timer.which).into(), spec.into(), 0u64.into()],
        );
    }
    work.run()?;
    Ok(())
}
