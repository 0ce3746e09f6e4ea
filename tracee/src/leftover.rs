//! What a killed pageferry leaves in a process: the mapping of its agent, which nobody was left to unmap.
//!
//! The threads have healed by themselves, or are about to; the memory stays until the next freeze, which takes it out. Both
//! questions of that are answered here, without a change to anything: is a mapping ours, beyond doubt ([`find`]), and is
//! somebody still on the way out of it.
//!
//! Ours is what looks like an agent in kind, protection and length *and* bears a mark. The memory is marked before anything
//! else is written to it. Between mmap(2), which cannot give contents, and that there is only one place for a mark: the
//! address. So an agent is mapped at one that ends in `ADDRESS_MARK`, where that is free.

use std::ops::Range;

use crate::agent;
use crate::memory::RemoteMemory;
use crate::procfs::Vma;
use crate::registers::Registers;
use crate::{Error, Result};

/// How the kernel names shared anonymous memory.
pub(crate) const SHARED_ANONYMOUS: &str = "/dev/zero (deleted)";

/// Low 40 bits of an agent's address: 28 bits of chance and a page's offset.
const ADDRESS_MARK: u64 = 0x6b_1f3a_9000;
/// What lies above them in the addresses to choose from: between what programs map low and where they, their libraries and
/// stacks lie by default. Only sanitizers reserve such memory.
const ADDRESS_CHOICES: Range<u64> = 0x10..0x50;
const ADDRESS_CHOICE_SHIFT: u32 = 40;

/// How far above its stack pointer a thread's stack is searched for the way back of a signal handler.
const STACK_SEARCHED: u64 = 1 << 20;
const PIECE_LEN: u64 = 64 << 10;

/// Where an agent of this length goes, for mmap(2) to take as a hint; 0 when all these places are taken.
pub(crate) fn marked_place(maps: &[Vma], len: u64) -> u64 {
    ADDRESS_CHOICES
        .map(|choice| choice << ADDRESS_CHOICE_SHIFT | ADDRESS_MARK)
        .find(|&start| {
            let after = maps.partition_point(|vma| vma.end <= start);
            maps.get(after).is_none_or(|vma| start + len <= vma.start)
        })
        .unwrap_or(0)
}

fn is_marked_place(address: u64) -> bool {
    let (choice, rest) = (
        address >> ADDRESS_CHOICE_SHIFT,
        address & ((1 << ADDRESS_CHOICE_SHIFT) - 1),
    );
    ADDRESS_CHOICES.contains(&choice) && rest == ADDRESS_MARK
}

/// The agents among `maps`, which are all mappings of `pid`, ascending. In a process that we hold it finds our own, too.
///
/// # Errors
/// [`Error::Gone`], and what reading memory gives. A mapping that goes away meanwhile is none.
pub fn find(pid: i32, maps: &[Vma]) -> Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    for (index, first) in maps.iter().enumerate() {
        let Some(range) = shape(first, maps.get(index + 1)) else {
            continue;
        };
        let mut mark = [0; agent::MARK.len()];
        match RemoteMemory::open(pid)?.read(range.start + agent::MARK_OFFSET as u64, &mut mark) {
            Ok(()) => {}
            Err(Error::Unreadable { .. }) => continue,
            Err(error) => return Err(error),
        }
        let is_untouched = mark == [0; agent::MARK.len()];
        if mark == agent::MARK || (is_untouched && is_marked_place(range.start)) {
            found.push(range);
        }
    }
    Ok(found)
}

/// The whole of an agent's mapping that begins with `first`, going by how it is made: executable, not writable, of an agent's
/// length; all but the code is then made writable instead, which splits it.
fn shape(first: &Vma, next: Option<&Vma>) -> Option<Range<u64>> {
    let is_shared_anonymous = |vma: &Vma| vma.shared && vma.path == SHARED_ANONYMOUS;
    if !is_shared_anonymous(first)
        || (first.read, first.write, first.exec) != (true, false, true)
        || first.offset != 0
    {
        return None;
    }
    let mut end = first.end;
    if first.len() == agent::CODE_LEN as u64 {
        let rest = next.filter(|next| {
            is_shared_anonymous(next)
                && (next.read, next.write, next.exec) == (true, true, false)
                && (next.device, next.inode) == (first.device, first.inode)
                && (next.start, next.offset) == (first.end, first.len())
        })?;
        end = rest.end;
    }
    agent::is_byte_len(end - first.start).then_some(first.start..end)
}

/// Whether a stopped thread is in one of these agents or has to return into it: a signal that came between its entering the
/// agent and its signals being blocked has put a handler on top. The handler's frame is looked for on the stack it runs on.
pub(crate) fn is_needed(
    agents: &[Range<u64>],
    maps: &[Vma],
    memory: &RemoteMemory,
    registers: &Registers,
) -> Result<bool> {
    let is_code = |address: u64| {
        agents
            .iter()
            .any(|agent| address.wrapping_sub(agent.start) < agent::CODE_LEN as u64)
    };
    if is_code(registers.rip) {
        return Ok(true);
    }
    // A signal frame holds the address it returns to at a multiple of 8.
    let mut at = registers.rsp & !7;
    let Some(stack) = maps.iter().find(|vma| (vma.start..vma.end).contains(&at)) else {
        return Ok(false);
    };
    let end = stack.end.min(at.saturating_add(STACK_SEARCHED));
    while at < end {
        let mut piece = vec![0; (end - at).min(PIECE_LEN) as usize];
        match memory.read(at, &mut piece) {
            Ok(()) => {}
            // No stack goes on behind such a page.
            Err(Error::Unreadable { .. }) => break,
            Err(error) => return Err(error),
        }
        if piece.chunks_exact(8).any(|word| {
            is_code(u64::from_le_bytes(
                word.try_into().expect("chunks of 8 bytes"),
            ))
        }) {
            return Ok(true);
        }
        at += piece.len() as u64;
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(start: u64, len: u64, [read, write, exec]: [bool; 3], offset: u64) -> Vma {
        Vma {
            start,
            end: start + len,
            read,
            write,
            exec,
            shared: true,
            offset,
            device: 1,
            inode: 7,
            path: SHARED_ANONYMOUS.to_owned(),
            ..Vma::default()
        }
    }

    const CODE: [bool; 3] = [true, false, true];
    const DATA: [bool; 3] = [true, true, false];

    #[test]
    fn only_what_is_made_like_an_agent_has_its_shape() {
        let (code_len, len) = (agent::CODE_LEN as u64, agent::byte_len(3) as u64);
        let code = mapping(0x10_0000, code_len, CODE, 0);
        let data = mapping(code.end, len - code_len, DATA, code_len);
        let whole = Some(code.start..data.end);
        assert_eq!(shape(&code, Some(&data)), whole);
        assert_eq!(shape(&mapping(0x10_0000, len, CODE, 0), None), whole);
        assert_eq!(shape(&mapping(0x10_0000, len + 4096, CODE, 0), None), None);
        assert_eq!(shape(&mapping(0x10_0000, len, DATA, 0), None), None);
        assert_eq!(shape(&code, None), None);
        let other_memory = Vma {
            inode: 8,
            ..data.clone()
        };
        let elsewhere = mapping(data.start + 4096, data.len(), DATA, code_len);
        let private = Vma {
            shared: false,
            ..data.clone()
        };
        for next in [other_memory, elsewhere, private] {
            assert_eq!(shape(&code, Some(&next)), None, "{next:?}");
        }
        let file = Vma {
            path: "/dev/zero".to_owned(),
            ..code
        };
        assert_eq!(shape(&file, Some(&data)), None);
    }

    #[test]
    fn a_place_is_marked_and_free() {
        let len = agent::byte_len(1) as u64;
        let first = marked_place(&[], len);
        assert!(is_marked_place(first) && !is_marked_place(first + 4096));
        for (start, end) in [
            (first, first + len),
            (first - 4096, first + 4096),
            (first + len - 4096, first + len),
            (4096, first + 4096),
        ] {
            let taken = mapping(start, end - start, DATA, 0);
            let second = marked_place(&[taken], len);
            assert!(is_marked_place(second) && second > first, "{start:x}");
        }
        for (start, end) in [(4096, first), (first + len, first + 2 * len)] {
            assert_eq!(
                marked_place(&[mapping(start, end - start, DATA, 0)], len),
                first
            );
        }
        assert_eq!(marked_place(&[mapping(4096, 1 << 47, DATA, 0)], len), 0);
    }
}
