//! Signal actions and alternate stacks, which only the process itself can ask for.

use pageferry_image::model::signals::{Action, AltStack, Pending};
use pageferry_tracee::{Batch, Injection, Tracee};

use super::Answers;
use crate::Result;

/// Highest signal number.
const SIGNALS: u32 = 64;
/// `struct kernel_sigaction`: handler, flags, restorer, mask.
const ACTION_LEN: usize = 32;
/// `stack_t`.
pub(crate) const ALTSTACK_LEN: usize = 24;

/// The actions that are not the default.
pub(crate) fn actions(injection: &mut Injection<'_>, pid: i32) -> Result<Vec<Action>> {
    let at = injection.scratch_address(pid);
    let mut batch = Batch::new();
    for signo in 1..=SIGNALS {
        let old = at + u64::from(signo - 1) * ACTION_LEN as u64;
        batch.call(
            libc::SYS_rt_sigaction,
            &[signo.into(), 0u64.into(), old.into(), 8u64.into()],
        );
    }
    let answers = Answers::new(pid, injection.run(pid, &batch)?);
    for index in 0..SIGNALS as usize {
        answers.expect(index, "rt_sigaction")?;
    }
    let bytes = injection.scratch(pid);
    Ok((1..=SIGNALS)
        .zip(bytes.chunks_exact(ACTION_LEN))
        .map(|(signo, bytes)| parse_action(signo, bytes))
        .filter(|action| action.handler != 0 || action.flags != 0)
        .collect())
}

fn word(bytes: &[u8], index: usize) -> u64 {
    u64::from_le_bytes(
        bytes[index * 8..index * 8 + 8]
            .try_into()
            .expect("eight bytes"),
    )
}

fn parse_action(signo: u32, bytes: &[u8]) -> Action {
    Action {
        signo,
        handler: word(bytes, 0),
        flags: word(bytes, 1),
        restorer: word(bytes, 2),
        mask: word(bytes, 3),
    }
}

/// A `stack_t` as sigaltstack(2) filled it.
pub(crate) fn parse_altstack(bytes: &[u8]) -> AltStack {
    AltStack {
        sp: word(bytes, 0),
        flags: i32::from_le_bytes(bytes[8..12].try_into().expect("four bytes")),
        size: word(bytes, 2),
    }
}

/// Queued signals of a thread, or with `shared` of the process.
pub(crate) fn pending(tracee: &Tracee, tid: i32, shared: bool) -> Result<Vec<Pending>> {
    Ok(tracee
        .pending(tid, shared)?
        .into_iter()
        .map(|siginfo| Pending {
            siginfo: siginfo.to_vec(),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_of_the_kernel_are_understood() {
        let bytes: Vec<u8> = [0x1234u64, 0x0400_0004, 0x5678, 0x202]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        let action = parse_action(10, &bytes);
        assert_eq!(
            (
                action.signo,
                action.handler,
                action.flags,
                action.restorer,
                action.mask
            ),
            (10, 0x1234, 0x0400_0004, 0x5678, 0x202)
        );
        let stack = parse_altstack(&[
            0, 0x10, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 9, 9, 9, 9, 0, 0x20, 0, 0, 0, 0, 0, 0,
        ]);
        assert_eq!((stack.sp, stack.flags, stack.size), (0x1000, 2, 0x2000));
    }
}
