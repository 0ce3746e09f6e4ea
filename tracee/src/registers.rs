//! The registers of a stopped x86-64 thread, and the signal frame from which the kernel itself can put them back.
//!
//! A thread whose stack pointer is at such a frame and that calls rt_sigreturn(2) becomes what the frame says, whether we
//! still exist or not. Together with `agent` and `interrupted` this is all the crate knows about x86-64; nothing here talks
//! to the kernel.

use std::arch::x86_64::__cpuid_count;
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
        self.words()
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect()
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

/// Where in the XSAVE area the header's XSTATE_BV word lies: which components are not in their initial state.
const XSTATE_IN_USE: usize = 512;
/// Where in the legacy area software may keep bytes; the kernel's ptrace interface tells XCR0 there.
const SOFTWARE_RESERVED: usize = 464;
/// AMX tile configuration and data. A thread that never asked for them has no room for them in the kernel.
const XFEATURE_AMX: u64 = 1 << 17 | 1 << 18;
/// x87, SSE: their state lies in the legacy area.
const XFEATURE_LEGACY: u64 = 3;
/// `FP_XSTATE_MAGIC1` and `2`, asm/sigcontext.h.
const MAGIC_START: u32 = 0x4650_5853;
const MAGIC_END: u32 = 0x4650_5845;

/// What a signal frame has to hold of a thread.
pub(crate) struct Frame<'a> {
    pub(crate) registers: &'a Registers,
    /// As ptrace gives it: standard format, XCR0 in the software bytes.
    pub(crate) xsave: &'a [u8],
    pub(crate) sigmask: u64,
    /// Where a `ret` onto the frame goes: an rt_sigreturn. 0 when nobody returns onto it.
    pub(crate) restorer: u64,
}

/// `struct sigcontext_64`, asm/sigcontext.h.
#[repr(C)]
struct SignalContext {
    general: [u64; 16],
    rip: u64,
    eflags: u64,
    cs: u16,
    gs: u16,
    fs: u16,
    ss: u16,
    error: u64,
    trap: u64,
    old_mask: u64,
    cr2: u64,
    extended: u64,
    reserved: [u64; 8],
}
const _: () = assert!(size_of::<SignalContext>() == 256);

/// `struct rt_sigframe` without its siginfo, which rt_sigreturn does not read.
#[repr(C)]
struct SignalFrame {
    restorer: u64,
    flags: u64,
    link: u64,
    stack_pointer: u64,
    stack_flags: u64,
    stack_size: u64,
    context: SignalContext,
    sigmask: u64,
}
const _: () = assert!(size_of::<SignalFrame>() == 312);
const _: () = assert!(
    offset_of!(SignalFrame, sigmask) - offset_of!(SignalFrame, flags)
        == offset_of!(libc::ucontext_t, uc_sigmask)
);

impl Frame<'_> {
    /// Frames start at addresses that are a multiple of this: XSAVE asks for it.
    pub(crate) const ALIGNMENT: u64 = 64;
    /// From the start to the frame proper: rt_sigreturn wants its stack pointer, 8 above it, at a multiple of 16.
    const LEAD: usize = 8;
    /// From the start to the extended state; the hole is where a siginfo would be.
    const EXTENDED: usize = 448;

    const UC_FP_XSTATE: u64 = 1;
    const UC_SIGCONTEXT_SS: u64 = 2;
    const UC_STRICT_RESTORE_SS: u64 = 4;
    /// No valid `ss_flags`: the kernel refuses the alternate stack, keeps the one it has, and goes on.
    const KEEP_ALTERNATE_STACK: u64 = 0x4000;

    /// Bytes of a frame for this extended state.
    pub(crate) fn byte_len(xsave: &[u8]) -> usize {
        Self::EXTENDED + extended_len(xsave) + size_of::<u32>()
    }

    /// What `rip = ret` needs as its stack pointer to fall onto a frame that starts at `start`: the restorer's address.
    pub(crate) const fn return_slot(start: u64) -> u64 {
        start + Self::LEAD as u64
    }

    /// The stack pointer with which rt_sigreturn finds a frame that starts at `start`.
    pub(crate) const fn stack_pointer(start: u64) -> u64 {
        Self::return_slot(start) + 8
    }

    /// The frame's bytes when it lies at `start` in the thread's memory.
    pub(crate) fn to_bytes(&self, start: u64) -> Vec<u8> {
        debug_assert_eq!(start % Self::ALIGNMENT, 0);
        let r = self.registers;
        let frame = SignalFrame {
            restorer: self.restorer,
            flags: Self::UC_FP_XSTATE | Self::UC_SIGCONTEXT_SS | Self::UC_STRICT_RESTORE_SS,
            link: 0,
            stack_pointer: 0,
            stack_flags: Self::KEEP_ALTERNATE_STACK,
            stack_size: 0,
            context: SignalContext {
                general: [
                    r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp,
                    r.rbx, r.rdx, r.rax, r.rcx, r.rsp,
                ],
                rip: r.rip,
                eflags: r.eflags,
                cs: r.cs as u16,
                gs: r.gs as u16,
                fs: r.fs as u16,
                ss: r.ss as u16,
                error: 0,
                trap: 0,
                old_mask: 0,
                cr2: 0,
                extended: start + Self::EXTENDED as u64,
                reserved: [0; 8],
            },
            sigmask: self.sigmask,
        };
        let mut bytes = vec![0; Self::byte_len(self.xsave)];
        // SAFETY: a repr(C) struct of integers without padding (its size is asserted), read as bytes.
        let head = unsafe {
            std::slice::from_raw_parts((&raw const frame).cast::<u8>(), size_of::<SignalFrame>())
        };
        bytes[Self::LEAD..Self::LEAD + head.len()].copy_from_slice(head);

        let len = extended_len(self.xsave);
        let extended = &mut bytes[Self::EXTENDED..];
        extended[..len].copy_from_slice(&self.xsave[..len]);
        // struct _fpx_sw_bytes: magic1, extended_size, xfeatures, xstate_size, padding
        let mut software = [0; 48];
        software[0..4].copy_from_slice(&MAGIC_START.to_le_bytes());
        software[4..8].copy_from_slice(&(len as u32 + 4).to_le_bytes());
        software[8..16].copy_from_slice(&features(self.xsave).to_le_bytes());
        software[16..20].copy_from_slice(&(len as u32).to_le_bytes());
        extended[SOFTWARE_RESERVED..SOFTWARE_RESERVED + 48].copy_from_slice(&software);
        extended[len..len + 4].copy_from_slice(&MAGIC_END.to_le_bytes());
        bytes
    }
}

fn word(bytes: &[u8], offset: usize) -> u64 {
    bytes.get(offset..offset + 8).map_or(0, |word| {
        u64::from_le_bytes(word.try_into().expect("8 bytes"))
    })
}

/// The components a frame carries: those the processor has switched on, AMX only for a thread that uses it.
fn features(xsave: &[u8]) -> u64 {
    let enabled = word(xsave, SOFTWARE_RESERVED) | XFEATURE_LEGACY;
    if word(xsave, XSTATE_IN_USE) & XFEATURE_AMX == 0 {
        enabled & !XFEATURE_AMX
    } else {
        enabled
    }
}

/// Length of the standard-format XSAVE area that holds [`features`].
fn extended_len(xsave: &[u8]) -> usize {
    /// Legacy area and header.
    const SMALLEST: usize = 576;
    let features = features(xsave);
    (2..63)
        .filter(|component| features & 1 << component != 0)
        .map(|component| {
            // SAFETY: every x86-64 processor has CPUID; leaf 0xd exists where XSAVE does. (Safe to call in newer compilers.)
            #[allow(unused_unsafe)]
            let leaf = unsafe { __cpuid_count(0xd, component) };
            (leaf.eax + leaf.ebx) as usize
        })
        .fold(SMALLEST, usize::max)
        .min(xsave.len().max(SMALLEST))
}
