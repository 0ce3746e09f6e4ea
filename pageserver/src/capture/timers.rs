//! Interval timers and POSIX timers. Which there are stands in `/proc`; what is left of each only the process can ask.

use pageferry_image::model::signals::Pending;
use pageferry_image::model::task::Process;
use pageferry_image::model::timers::{Itimer, Passed, Posix};
use pageferry_tracee::host;
use pageferry_tracee::procfs::{self, PosixTimer};
use pageferry_tracee::{Batch, Injection};

use super::Answers;
use crate::Result;
use crate::survey::{Object, Refusal, RefusalKind};

/// `struct itimerval` and `struct itimerspec`: interval, then value, each in seconds and a fraction.
const TIMER_LEN: usize = 32;
/// ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF.
const ITIMERS: u32 = 3;
/// Low bits of a dynamic clock id that name a clock by descriptor (`CLOCKFD`).
const CLOCK_BY_DESCRIPTOR: i32 = 3;
const SIGEV_THREAD_ID: u32 = 4;

/// How far the clocks have gone since they were read.
pub(crate) fn until_now(then: host::Clocks) -> Result<Passed> {
    Ok(Passed::between(then.all_ns(), host::clocks()?.all_ns()))
}

/// Takes from the process' timers what has passed since they were read.
pub(crate) fn pass(process: &mut Process, passed: &Passed) {
    pass_itimers(process, passed);
    pass_posix(process, passed);
}

/// The same for its interval timers only.
pub(crate) fn pass_itimers(process: &mut Process, passed: &Passed) {
    for timer in &mut process.itimers {
        timer.value_us = passed
            .left_ns(timer.clock(), timer.value_us.saturating_mul(1000))
            .div_ceil(1000);
    }
}

/// The same for its POSIX timers only.
pub(crate) fn pass_posix(process: &mut Process, passed: &Passed) {
    for timer in &mut process.posix_timers {
        timer.value_ns = passed.left_ns(timer.clock, timer.value_ns);
    }
}

/// The armed interval timers.
pub(crate) fn itimers(injection: &mut Injection<'_>, pid: i32) -> Result<Vec<Itimer>> {
    let at = injection.scratch_address(pid);
    let mut batch = Batch::new();
    for which in 0..ITIMERS {
        batch.call(
            libc::SYS_getitimer,
            &[
                which.into(),
                (at + u64::from(which) * TIMER_LEN as u64).into(),
            ],
        );
    }
    let answers = Answers::new(pid, injection.run(pid, &batch)?);
    for index in 0..ITIMERS as usize {
        answers.expect(index, "getitimer")?;
    }
    let bytes = injection.scratch(pid);
    Ok((0..ITIMERS)
        .zip(bytes.chunks_exact(TIMER_LEN))
        .map(|(which, bytes)| {
            let (interval_us, value_us) = parse(bytes, 1_000_000);
            Itimer {
                which,
                value_us,
                interval_us,
            }
        })
        // A periodic ITIMER_REAL whose signal nobody has taken yet says that nothing is left; disarmed, it has no interval. The
        // other two keep their interval when they are disarmed, and never say 0 while they are armed.
        .filter(|timer| timer.value_us != 0 || (timer.which == 0 && timer.interval_us != 0))
        .collect())
}

/// Interval and value, in fractions of which `per_second` make a second.
fn parse(bytes: &[u8], per_second: u64) -> (u64, u64) {
    let word = |index: usize| {
        u64::from_le_bytes(
            bytes[index * 8..index * 8 + 8]
                .try_into()
                .expect("eight bytes"),
        )
    };
    let time =
        |seconds: u64, fraction: u64| seconds.saturating_mul(per_second).saturating_add(fraction);
    (time(word(0), word(1)), time(word(2), word(3)))
}

/// The POSIX timers that cannot be made again.
pub(crate) fn refusals(pid: i32) -> Result<Vec<Refusal>> {
    Ok(procfs::posix_timers(pid)?
        .iter()
        .filter_map(refusal)
        .map(|what| Refusal {
            pid,
            object: Object::Process,
            what,
        })
        .collect())
}

fn refusal(timer: &PosixTimer) -> Option<RefusalKind> {
    if timer.clock < 0 && timer.clock & 7 == CLOCK_BY_DESCRIPTOR {
        return Some(RefusalKind::TimerClock { clock: timer.clock });
    }
    (timer.notify & SIGEV_THREAD_ID != 0 && timer.target == 0)
        .then_some(RefusalKind::TimerTarget { id: timer.id })
}

/// All POSIX timers, by id.
pub(crate) fn posix(
    injection: &mut Injection<'_>,
    pid: i32,
    mut timers: Vec<PosixTimer>,
) -> Result<Vec<Posix>> {
    timers.sort_by_key(|timer| timer.id);
    let mut found = Vec::with_capacity(timers.len());
    for chunk in timers.chunks(Batch::LIMIT.min(injection.scratch(pid).len() / TIMER_LEN)) {
        let at = injection.scratch_address(pid);
        let mut batch = Batch::new();
        for (index, timer) in chunk.iter().enumerate() {
            batch.call(
                libc::SYS_timer_gettime,
                &[timer.id.into(), (at + (index * TIMER_LEN) as u64).into()],
            );
        }
        let answers = Answers::new(pid, injection.run(pid, &batch)?);
        for (index, (timer, bytes)) in chunk
            .iter()
            .zip(injection.scratch(pid).chunks_exact(TIMER_LEN))
            .enumerate()
        {
            answers.expect(index, "timer_gettime")?;
            let (interval_ns, value_ns) = parse(bytes, 1_000_000_000);
            found.push(Posix {
                id: timer.id,
                clock: timer.clock,
                notify: timer.notify,
                tid: if timer.notify & SIGEV_THREAD_ID == 0 {
                    0
                } else {
                    timer.target
                },
                signo: timer.signo,
                sigev_value: timer.value,
                value_ns,
                interval_ns,
            });
        }
    }
    Ok(found)
}

/// What is in a queue of signals now that was not before.
pub(crate) fn since(before: &[Pending], now: Vec<Pending>) -> Vec<Pending> {
    now.into_iter()
        .filter(|signal| !before.contains(signal))
        .collect()
}

/// Arms again, for at once, what expired for the last time between two questions:
/// 1. the queued signals are read;
/// 2. a timer that fires once fires: its signal is queued, and nothing is left of it;
/// 3. the timer is read.
///
/// Neither the signals nor the timers that were read know of it. `since` are the signals queued after step 1.
pub(crate) fn rearm(process: &mut Process, since: &[Pending]) {
    let word = |signal: &Pending, at: usize| {
        let bytes = signal.siginfo.get(at..at + 4);
        bytes.map(|bytes| i32::from_le_bytes(bytes.try_into().expect("four bytes")))
    };
    for signal in since {
        // siginfo_t: signo, errno, code, a gap, and for timers their id.
        match (word(signal, 0), word(signal, 8)) {
            (_, Some(libc::SI_TIMER)) => {
                let id = word(signal, 16).and_then(|id| u32::try_from(id).ok());
                for timer in &mut process.posix_timers {
                    if Some(timer.id) == id && timer.value_ns == 0 && timer.interval_ns == 0 {
                        timer.value_ns = 1;
                    }
                }
            }
            (Some(libc::SIGALRM), Some(libc::SI_KERNEL))
                if process.itimers.iter().all(|timer| timer.which != 0) =>
            {
                let expired = Itimer {
                    which: 0,
                    value_us: 1,
                    interval_us: 0,
                };
                process.itimers.insert(0, expired);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queued(signo: i32, code: i32, timer: i32) -> Pending {
        let mut siginfo = vec![0; 128];
        for (at, value) in [(0, signo), (8, code), (16, timer)] {
            siginfo[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        Pending { siginfo }
    }

    #[test]
    fn what_expired_between_two_questions_expires_again() {
        let timer = |id, value_ns, interval_ns| Posix {
            id,
            value_ns,
            interval_ns,
            ..Posix::default()
        };
        let mut process = Process {
            posix_timers: vec![
                timer(3, 0, 0),
                timer(4, 0, 0),
                timer(5, 7, 0),
                timer(6, 0, 9),
            ],
            ..Process::default()
        };
        let seen = queued(libc::SIGUSR1, libc::SI_TIMER, 4);
        let now = vec![
            seen.clone(),
            queued(libc::SIGUSR1, libc::SI_TIMER, 3),
            queued(libc::SIGUSR1, libc::SI_TIMER, 5),
            queued(libc::SIGUSR1, libc::SI_TIMER, 6),
            queued(libc::SIGALRM, libc::SI_USER, 0),
        ];
        let new = since(&[seen], now);
        assert_eq!(new.len(), 4);
        rearm(&mut process, &new);
        let left: Vec<u64> = process.posix_timers.iter().map(|t| t.value_ns).collect();
        assert_eq!(left, [1, 0, 7, 0]);
        assert!(process.itimers.is_empty(), "that one came from kill(2)");
        rearm(&mut process, &[queued(libc::SIGALRM, libc::SI_KERNEL, 0)]);
        assert_eq!((process.itimers.len(), process.itimers[0].value_us), (1, 1));
    }

    #[test]
    fn timers_of_ended_threads_and_of_descriptors_are_refused() {
        let timer = PosixTimer {
            id: 3,
            signo: 14,
            value: 0,
            notify: 4,
            target: 12,
            clock: 1,
        };
        assert_eq!(refusal(&timer), None);
        assert_eq!(
            refusal(&PosixTimer { target: 0, ..timer }),
            Some(RefusalKind::TimerTarget { id: 3 })
        );
        let by_descriptor = (!7i32 << 3) | CLOCK_BY_DESCRIPTOR;
        assert_eq!(
            refusal(&PosixTimer {
                clock: by_descriptor,
                ..timer
            }),
            Some(RefusalKind::TimerClock {
                clock: by_descriptor
            })
        );
    }

    #[test]
    fn times_are_interval_then_value() {
        let bytes: Vec<u8> = [1u64, 2, 3, 4]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        assert_eq!(parse(&bytes, 1000), (1002, 3004));
    }
}
