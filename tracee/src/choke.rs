//! The choke point: every call that reaches into a traced process passes here first.
//!
//! Tests arm it through the environment so that the n-th call fails, or kills this program on the spot, and prove that the
//! traced process is unharmed for every n. It counts calls by kind and does nothing else; it must never allocate, lock or
//! log, because it stands in front of calls made while a process is frozen.
//!
//! Clean-up paths pass here too and try a failed call once more, so a single failing call never leaves a process hurt.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use nix::errno::Errno;

/// What sort of call is about to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `ptrace(2)`, `waitpid(2)` and signals to a traced process.
    Ptrace,
    /// A system call executed by the traced process for us, or a batch of them.
    Remote,
    /// `process_vm_readv(2)`, `/proc/<pid>/mem`, `/proc/<pid>/map_files`.
    Memory,
    /// `pidfd_open(2)`, `pidfd_getfd(2)`, `kcmp(2)` and calls on descriptors taken that way.
    Descriptor,
    /// A file or directory of `/proc` about a process.
    Proc,
    /// An `ioctl(2)` on a process' behalf: userfaultfd, pagemap.
    Ioctl,
    /// Making a process or a thread.
    Spawn,
    /// Parking: one call between the record of PARK and the SIGSTOP, one between that and the record of COMMIT.
    Park,
}

const KINDS: [(Kind, &str); 8] = [
    (Kind::Ptrace, "ptrace"),
    (Kind::Remote, "remote"),
    (Kind::Memory, "memory"),
    (Kind::Descriptor, "descriptor"),
    (Kind::Proc, "proc"),
    (Kind::Ioctl, "ioctl"),
    (Kind::Spawn, "spawn"),
    (Kind::Park, "park"),
];

static COUNTS: [AtomicU64; KINDS.len()] = [const { AtomicU64::new(0) }; KINDS.len()];
/// Calls so far, over all kinds.
static CALLS: AtomicU64 = AtomicU64::new(0);
/// Number of the call that fails; 0 = none.
static ARMED: AtomicU64 = AtomicU64::new(0);
/// The kind among which it is counted, as an index; [`ANY_KIND`] = over all.
static ARMED_KIND: AtomicUsize = AtomicUsize::new(ANY_KIND);
const ANY_KIND: usize = usize::MAX;
static DEADLY: AtomicBool = AtomicBool::new(false);

/// Counts a call and says whether it may be made.
///
/// # Errors
/// `EIO` for the one call that [`arm`] named.
pub fn pass(kind: Kind) -> std::result::Result<(), Errno> {
    let of_kind = COUNTS[kind as usize].fetch_add(1, Ordering::Relaxed) + 1;
    let of_all = CALLS.fetch_add(1, Ordering::Relaxed) + 1;
    let number = match ARMED_KIND.load(Ordering::Relaxed) {
        ANY_KIND => of_all,
        armed if armed == kind as usize => of_kind,
        _ => return Ok(()),
    };
    if number != ARMED.load(Ordering::Relaxed) {
        return Ok(());
    }
    if DEADLY.load(Ordering::Relaxed) {
        // SAFETY: raise(2) takes no pointers.
        unsafe { libc::raise(libc::SIGKILL) };
    }
    Err(Errno::EIO)
}

/// Makes one coming call fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The n-th call from now (counted from 1) answers `EIO`.
    Fail(u64),
    /// At the n-th call from now this process kills itself with SIGKILL.
    Kill(u64),
}

/// Arms `fault`, or disarms with `None`. The count starts here.
pub fn arm(fault: Option<Fault>) {
    let (number, deadly) = match fault {
        None => (0, false),
        Some(Fault::Fail(n)) => (CALLS.load(Ordering::Relaxed) + n, false),
        Some(Fault::Kill(n)) => (CALLS.load(Ordering::Relaxed) + n, true),
    };
    DEADLY.store(deadly, Ordering::Relaxed);
    ARMED.store(number, Ordering::Relaxed);
}

/// Whether the armed call has been made.
pub fn fired() -> bool {
    let armed = ARMED.load(Ordering::Relaxed);
    armed != 0 && CALLS.load(Ordering::Relaxed) >= armed
}

/// Arms what `PAGEFERRY_FAULT` says: `fail:N` or `kill:N`, over all calls or, as in `kill:park:1`, among those of one kind.
/// Anything else is ignored.
pub fn configure_from_environment() {
    let Ok(text) = std::env::var("PAGEFERRY_FAULT") else {
        return;
    };
    let (what, number) = text.split_once(':').unwrap_or_default();
    let (kind, number) = match number.split_once(':') {
        Some((name, number)) => match KINDS.iter().position(|&(_, known)| known == name) {
            Some(kind) => (kind, number),
            None => return,
        },
        None => (ANY_KIND, number),
    };
    let fault = {
        let number: Option<u64> = number.parse().ok().filter(|&n| n > 0);
        number.and_then(|number| match what {
            "fail" => Some(Fault::Fail(number)),
            "kill" => Some(Fault::Kill(number)),
            _ => None,
        })
    };
    ARMED_KIND.store(kind, Ordering::Relaxed);
    arm(fault);
}

/// Appends `kind count` lines to the file `PAGEFERRY_CALLS` names, if it names one.
///
/// The counts are a test's evidence: a file that cannot be written is reported by the test that misses it.
pub fn report() {
    let Some(path) = std::env::var_os("PAGEFERRY_CALLS") else {
        return;
    };
    if let Ok(mut file) = OpenOptions::new().create(true).append(true).open(path) {
        let lines: String = counts()
            .iter()
            .map(|(kind, count)| format!("{kind} {count}\n"))
            .collect();
        let _ = file.write_all(lines.as_bytes());
    }
}

/// Calls made so far, by kind.
pub fn counts() -> Vec<(&'static str, u64)> {
    KINDS
        .iter()
        .map(|&(kind, name)| (name, COUNTS[kind as usize].load(Ordering::Relaxed)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_own_counter() {
        for (index, (kind, _)) in KINDS.iter().enumerate() {
            assert_eq!(*kind as usize, index);
        }
    }
}
