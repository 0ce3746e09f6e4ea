//! `--new-pid-ns`: what is received or restored has all process ids for itself. With `--isolate` it has more for itself
//! ([`Isolation`]), which the reaper makes before the worker.
//!
//! Three processes: the *front*, which the operator started, stays outside; the *reaper* is process 1 of the new namespace; the
//! *worker*, its child, does in there what the verb does everywhere, so that all numbers are the same to the tree, to the
//! engine and to the /proc they both see. The reaper takes in what loses its parent, hands signals on to the worker, and tells
//! the front how that ended. It stays as long as anybody is in there, and then ends: a tree that was moved away, or has ended
//! with all it left behind, leaves nothing.
//!
//! The reaper must never end before the others: the kernel would end them. The pageferry that moves a tree out of there is one
//! of them.

use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use pageferry_tracee::process::{self, Ended};
use pageferry_tracee::procfs;

use crate::isolation::Isolation;
use crate::{exit, report};

/// How many numbers pageferry itself may need in there.
const OWN_NUMBERS: i32 = 1024;
/// Between how many places for them is chosen. One that is taken is found before anything is made; the next attempt gets another.
const PLACES: i32 = 64;
/// Where numbers begin again for those that are made later.
const FIRST_NUMBER: i32 = 300;
/// Between two looks for others, when no child is left.
const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// What the reaper tells the front beside the exit code: how it is in there when the worker has ended, or that none began.
const EMPTY: u8 = 0;
const PEOPLED: u8 = 1;
const NEVER_BEGAN: u8 = 2;
/// Not the end: the namespaces are made, and the verb begins.
const SETTLED: u8 = 3;
/// The signals that are meant for the worker.
const HANDED_ON: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// What a tree has for itself.
#[derive(Debug, Clone, Copy)]
pub enum Wanted<'i> {
    /// What this process has.
    Nothing,
    /// A pid namespace.
    Pids,
    /// That, and all that is in its way to run beside the original.
    Isolation(&'i Isolation),
}

impl<'i> Wanted<'i> {
    /// What was asked for on the command line.
    pub fn new(pids: bool, isolation: Option<&'i Isolation>) -> Self {
        match isolation {
            Some(isolation) => Self::Isolation(isolation),
            None if pids => Self::Pids,
            None => Self::Nothing,
        }
    }

    /// What nsenter(1) must be told to enter beside the process.
    fn entered(self) -> &'static str {
        match self {
            Self::Nothing | Self::Pids => "-p -m",
            Self::Isolation(_) => "-p -m -n -i -u",
        }
    }

    /// Makes it, in process 1 of the pid namespace.
    fn make(self) -> Result<(), String> {
        match self {
            Self::Nothing | Self::Pids => {
                process::mount_own_proc().map_err(|error| report::chain(&error))
            }
            Self::Isolation(isolation) => isolation.make(),
        }
    }
}

/// Runs `verb` in a new pid namespace, unless nothing is `wanted`; its exit code.
///
/// Must be called while the process has one thread.
///
/// # Errors
/// The exit code, said why, when `verb` did not come to its end.
pub fn run(wanted: Wanted<'_>, verb: impl FnOnce() -> u8) -> Result<u8, u8> {
    if matches!(wanted, Wanted::Nothing) {
        return Ok(verb());
    }
    front(wanted, verb).unwrap_or_else(|what| {
        eprintln!("pageferry: its namespaces cannot be made: {what}");
        Err(exit::FAILED)
    })
}

fn front(wanted: Wanted<'_>, verb: impl FnOnce() -> u8) -> Result<Result<u8, u8>, String> {
    let (mut told, tell) = UnixStream::pair().map_err(|error| error.to_string())?;
    let (signals, mask) = catch(&[])?;
    process::unshare_pids().map_err(|error| report::chain(&error))?;
    let mut ends = Some(tell);
    let reaper = process::fork(false, || {
        let Some(tell) = ends.take() else {
            return i32::from(exit::FAILED);
        };
        i32::from(reaper(tell, &mask, wanted, verb))
    })
    .map_err(|error| report::chain(&error))?;
    drop(ends);
    let reached = format!("nsenter -t {reaper} {}", wanted.entered());
    loop {
        let ready = process::wait_readable(&[signals.as_fd(), told.as_fd()], None)
            .map_err(|error| report::chain(&error))?;
        if ready.first() == Some(&true) {
            hand_on(&signals, reaper);
        }
        if ready.get(1) != Some(&true) {
            continue;
        }
        let mut ended = [0; 2];
        if told.read_exact(&mut ended).is_err() {
            eprintln!(
                "pageferry: process 1 of the pid namespace was ended, and with it all that was in there"
            );
            return Ok(Err(exit::LOST));
        }
        let [code, what] = ended;
        if what == SETTLED {
            if let Wanted::Isolation(_) = wanted {
                // It is there to be looked at while we wait for its end.
                tracing::info!(
                    "the copy will be in the namespaces of process {reaper}: look at it with {reached}"
                );
            }
            continue;
        }
        if what == PEOPLED {
            tracing::info!(
                "process 1 of the pid namespace is process {reaper} here: what runs in it is reached with {reached}"
            );
        } else {
            // Its end is at hand; nothing of ours is left when we have ended.
            let _ = process::wait(reaper);
        }
        return Ok(if what == NEVER_BEGAN {
            Err(code)
        } else {
            Ok(code)
        });
    }
}

/// Blocks the signals that are handed on, and `more`, which then come to the descriptor; with the mask there was.
fn catch(more: &[Signal]) -> Result<(SignalFd, SigSet), String> {
    let caught: SigSet = HANDED_ON.iter().chain(more).copied().collect();
    let mask = SigSet::thread_get_mask().map_err(|errno| errno.to_string())?;
    caught.thread_block().map_err(|errno| errno.to_string())?;
    let signals = SignalFd::with_flags(&caught, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .map_err(|errno| errno.to_string())?;
    Ok((signals, mask))
}

/// To `pid`, which is a child that nobody has waited for.
fn hand_on(signals: &SignalFd, pid: i32) {
    while let Ok(Some(caught)) = signals.read_signal() {
        if HANDED_ON
            .iter()
            .any(|&signal| signal as u32 == caught.ssi_signo)
        {
            let _ = process::kill(pid, caught.ssi_signo as i32);
        }
    }
}

/// Process 1. `mask`: the signals that were blocked before any was caught here.
fn reaper(
    mut tell: UnixStream,
    mask: &SigSet,
    wanted: Wanted<'_>,
    verb: impl FnOnce() -> u8,
) -> u8 {
    match settle(mask, wanted, verb) {
        Ok((worker, signals)) => {
            // Who waits for the end of our output waits for the worker's. What is held in spite of this is no reason to end.
            let named = process::set_name(c"pageferry-init");
            let alone = process::let_go_of_files(&[tell.as_fd(), signals.as_fd()]);
            if let Err(error) = named.and(alone) {
                tracing::warn!("{}", report::chain(&error));
            }
            let _ = tell.write_all(&[exit::DONE, SETTLED]);
            reap(worker, &signals, tell);
            exit::DONE
        }
        Err(what) => {
            eprintln!("pageferry: its namespaces cannot be made: {what}");
            let _ = tell.write_all(&[exit::FAILED, NEVER_BEGAN]);
            exit::FAILED
        }
    }
}

/// Makes the namespace fit to live in, and the worker.
fn settle(
    mask: &SigSet,
    wanted: Wanted<'_>,
    verb: impl FnOnce() -> u8,
) -> Result<(i32, SignalFd), String> {
    let failed = |error: pageferry_tracee::Error| report::chain(&error);
    // The terminal's signals come by the front.
    process::set_session().map_err(failed)?;
    wanted.make()?;
    process::set_last_pid(place_for_own(process::pid_max().map_err(failed)?)).map_err(failed)?;
    let (signals, _) = catch(&[Signal::SIGCHLD])?;
    let worker = process::fork(false, || match mask.thread_set_mask() {
        Ok(()) => i32::from(verb()),
        Err(errno) => {
            eprintln!("pageferry: the signal mask cannot be set: {errno}");
            i32::from(exit::FAILED)
        }
    })
    .map_err(failed)?;
    Ok((worker, signals))
}

/// The number before those that pageferry has in there: near the end, where few trees have theirs, and not always the same.
fn place_for_own(pid_max: i32) -> i32 {
    let places = (pid_max / 2 / OWN_NUMBERS).clamp(1, PLACES);
    let mut random = [0; 1];
    // Any place will do.
    let _ = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut random));
    (pid_max - OWN_NUMBERS * (1 + i32::from(random[0]) % places)).max(FIRST_NUMBER)
}

/// Until nobody is left.
fn reap(worker: i32, signals: &SignalFd, tell: UnixStream) {
    let mut tell = Some(tell);
    loop {
        // 1. Taken note of, so that an end after step 2 shows in step 4.
        match tell {
            Some(_) => hand_on(signals, worker),
            None => while let Ok(Some(_)) = signals.read_signal() {},
        }
        // 2. All that have ended.
        let mut code = None;
        while let Ok(Some((pid, ended))) = process::reap() {
            if pid == worker && tell.is_some() {
                code = Some(match ended {
                    Ended::Exited(code) => u8::try_from(code).unwrap_or(exit::FAILED),
                    Ended::Killed(signal) => exit::signalled(signal),
                });
            }
        }
        let is_peopled = is_peopled();
        if let (Some(code), Some(mut tell)) = (code, tell.take_if(|_| code.is_some())) {
            // What is made from here on need not stand behind our own numbers.
            let _ = process::set_last_pid(FIRST_NUMBER - 1);
            let _ = tell.write_all(&[code, if is_peopled { PEOPLED } else { EMPTY }]);
        }
        // 3. Who has come in by setns(2) is nobody's child here, and would not outlive us.
        if !is_peopled {
            return;
        }
        let has_children = procfs::children(process::own_pid()).is_ok_and(|all| !all.is_empty());
        // 4. Until the next end, or signal.
        if !has_children || process::wait_readable(&[signals.as_fd()], None).is_err() {
            std::thread::sleep(LOOK_PAUSE);
        }
    }
}

/// Whether there is anybody but process 1.
fn is_peopled() -> bool {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        // It cannot be told, so that nobody may be ended.
        return true;
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .any(|pid| pid != process::own_pid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_numbers_lie_above_the_middle() {
        for pid_max in [301, 4096, 32_768, 4_194_304] {
            for _ in 0..50 {
                let before = place_for_own(pid_max);
                assert!(before >= pid_max / 2 - OWN_NUMBERS || before == FIRST_NUMBER);
                assert!(before < pid_max, "{before} of {pid_max}");
                assert!(before == FIRST_NUMBER || before + OWN_NUMBERS <= pid_max);
            }
        }
    }
}
