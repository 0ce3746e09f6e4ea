//! The registers of a stopped x86-64 thread.

use std::mem::{offset_of, size_of};

/// General registers of a thread, in the layout of the kernel's `user_regs_struct`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub orig_rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub eflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

const _: () = assert!(size_of::<Registers>() == Registers::BYTE_LEN);
const _: () = assert!(size_of::<Registers>() == size_of::<libc::user_regs_struct>());
const _: () = assert!(offset_of!(Registers, rip) == offset_of!(libc::user_regs_struct, rip));
const _: () = assert!(offset_of!(Registers, gs) == offset_of!(libc::user_regs_struct, gs));

impl Registers {
    /// Length of [`Registers::to_bytes`].
    pub const BYTE_LEN: usize = 27 * 8;

    /// The 27 words in kernel order, little-endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words().iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// The reverse of [`Registers::to_bytes`]; `None` unless there are exactly [`Registers::BYTE_LEN`] bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != Self::BYTE_LEN {
            return None;
        }
        let mut words = [0; 27];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(chunk.try_into().expect("chunks of 8 bytes"));
        }
        // SAFETY: a repr(C) struct of 27 u64 without padding, for which every bit pattern is valid.
        Some(unsafe { std::mem::transmute::<[u64; 27], Self>(words) })
    }

    fn words(&self) -> [u64; 27] {
        // SAFETY: as in `from_bytes`.
        unsafe { std::mem::transmute::<Self, [u64; 27]>(*self) }
    }
}
