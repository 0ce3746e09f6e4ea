//! The agent: the few hundred bytes of code that a planted thread runs, and the memory it shares with us.
//!
//! The agent takes batches of system calls from its thread's slot, makes them, and waits for the next batch. It uses no
//! stack, never traps, and needs us only for work: every slot holds a signal frame with everything its thread was, and when
//! we are gone the agent returns into that frame and the thread goes on as if nothing had been.
//!
//! One word per slot says whose turn it is *and* whether we live. It is an entry of our robust futex list
//! (get_robust_list(2)), so that the kernel changes it when our thread ends in whatever way:
//!
//! | word                   | meaning                                                        |
//! |------------------------|----------------------------------------------------------------|
//! | tid, FUTEX_WAITERS     | the agent waits, and is woken if we die                         |
//! | tid                    | the agent works; it then sets FUTEX_WAITERS itself              |
//! | FUTEX_OWNER_DIED (…)   | we are gone: the agent blocks all signals, makes the calls of   |
//! |                        | our will, if there is one, and heals its thread                 |
//!
//! The memory is the tracee's too: nothing read from it may be trusted with more than the tracee's own fate.

use std::arch::global_asm;
use std::cell::RefCell;
use std::mem::{offset_of, size_of};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use nix::errno::Errno;

use crate::injection::{Arg, Batch};
use crate::registers::Frame;

/// Code comes first, on a page of its own because it is mapped executable and never writable.
pub(crate) const CODE_LEN: usize = 4096;
/// Room for a signal frame. The extended state of a thread that uses AMX takes 11 KiB of it.
pub(crate) const FRAME_LEN: usize = 16 * 1024;
/// Threads that can have agents planted by one thread of ours: the kernel walks no longer robust list (`ROBUST_LIST_LIMIT`,
/// linux/futex.h).
pub const THREAD_LIMIT: usize = 2048;
/// Memory for arguments and results of calls, per thread.
pub(crate) const SCRATCH_LEN: usize = 16 * 1024;

/// Last bytes of the code's page: whose it is, for whoever finds it after our death. 16 of them are chance.
pub(crate) const MARK: [u8; 32] =
    *b"pageferry agent \xd3\x1c\x8e\x57\x0a\xf4\x69\xb2\x95\x2e\x7b\xc0\x41\xda\x36\xef";
pub(crate) const MARK_OFFSET: usize = CODE_LEN - MARK.len();

/// Calls of a will, and words of memory for them.
pub const WILL_LIMIT: usize = 4;

const WAITERS: u32 = 0x8000_0000;
const OWNER_DIED: u32 = 0x4000_0000;

/// One system call.
#[repr(C)]
#[derive(Clone, Copy)]
struct CallMemory {
    number: u64,
    arguments: [u64; 6],
    result: u64,
    /// Bit n: argument n is the offset, from the start of the slot, of an earlier result.
    references: u64,
    /// For a call that returns twice: the slot of the thread in which it returns 0. Else 0.
    child_slot: u64,
}

/// One system call of a will: number and arguments.
type LastCall = [u64; 7];

/// What one thread's agent and we share. Aligned so that frame and scratch memory are.
#[repr(C, align(4096))]
pub(crate) struct SlotMemory {
    word: AtomicU32,
    /// Our thread id, which `word` holds while we live.
    owner: AtomicU32,
    /// Number of the batch the agent works at, or is to start.
    sequence: AtomicU32,
    /// Number of the batch it has finished.
    done: AtomicU32,
    count: AtomicU32,
    /// Calls of the will: 0 while there is none.
    will_count: AtomicU32,
    /// Next entry of the robust list. Only our kernel side reads it.
    robust_next: AtomicU64,
    all_signals: AtomicU64,
    will: [LastCall; WILL_LIMIT],
    will_values: [u64; WILL_LIMIT],
    /// `struct clone_args` and the thread id it names.
    clone: [u64; 16],
    calls: [CallMemory; Batch::LIMIT],
    frame: FrameMemory,
    scratch: [u8; SCRATCH_LEN],
}

#[repr(C, align(64))]
struct FrameMemory([u8; FRAME_LEN]);

const SLOT_LEN: usize = size_of::<SlotMemory>();
const _: () = assert!(offset_of!(SlotMemory, word) % 4 == 0);
const _: () = assert!(SLOT_LEN % CODE_LEN == 0);

global_asm!(
    ".pushsection .rodata.pageferry_agent, \"a\"",
    ".balign 16",
    ".globl pageferry_agent_start",
    ".hidden pageferry_agent_start",
    "pageferry_agent_start:",
    // Whose turn is it?
    "2:",
    "mov eax, [rbx + {word}]",
    "test eax, {owner_died}",
    "jnz 7f",
    "test eax, eax",
    "jns 3f",
    // futex(word, FUTEX_WAIT, eax, NULL): shared, and without a timeout, because a timeout would overwrite the thread's
    // own restart block.
    "mov edx, eax",
    "lea rdi, [rbx + {word}]",
    "xor esi, esi",
    "xor r10d, r10d",
    "mov eax, {sys_futex}",
    "syscall",
    "jmp 2b",
    // Work.
    "3:",
    "mov r14d, [rbx + {count}]",
    "lea r13, [rbx + {calls}]",
    "4:",
    "test r14d, r14d",
    "jz 6f",
    "mov r15, [r13 + {references}]",
    "mov rdi, [r13 + {arguments}]",
    "test r15b, 1",
    "jz 5f",
    "mov rdi, [rbx + rdi]",
    "5:",
    "mov rsi, [r13 + {arguments} + 8]",
    "test r15b, 2",
    "jz 5f",
    "mov rsi, [rbx + rsi]",
    "5:",
    "mov rdx, [r13 + {arguments} + 16]",
    "test r15b, 4",
    "jz 5f",
    "mov rdx, [rbx + rdx]",
    "5:",
    "mov r10, [r13 + {arguments} + 24]",
    "test r15b, 8",
    "jz 5f",
    "mov r10, [rbx + r10]",
    "5:",
    "mov r8, [r13 + {arguments} + 32]",
    "test r15b, 16",
    "jz 5f",
    "mov r8, [rbx + r8]",
    "5:",
    "mov r9, [r13 + {arguments} + 40]",
    "test r15b, 32",
    "jz 5f",
    "mov r9, [rbx + r9]",
    "5:",
    "mov rax, [r13 + {number}]",
    "mov r12, [r13 + {child_slot}]",
    "syscall",
    // Is this the new thread of a clone? It has a slot of its own. It may wake up when its maker works at another batch
    // already, so it must not look at the maker's slot any more.
    "test rax, rax",
    "jnz 5f",
    "test r12, r12",
    "jz 5f",
    "mov rbx, r12",
    "jmp 2b",
    "5:",
    "mov [r13 + {result}], rax",
    "add r13, {call_len}",
    "dec r14d",
    "jmp 4b",
    // Done: wait again, unless we have died, in which case the word is not what it was.
    "6:",
    "mov eax, [rbx + {owner}]",
    "mov edx, eax",
    "or edx, {waiters}",
    "lock cmpxchg [rbx + {word}], edx",
    "mov ecx, [rbx + {sequence}]",
    "mov [rbx + {done}], ecx",
    // futex(done, FUTEX_WAKE, 1)
    "lea rdi, [rbx + {done}]",
    "mov esi, 1",
    "mov edx, 1",
    "mov eax, {sys_futex}",
    "syscall",
    "jmp 2b",
    // Heal. Until the frame is in place no signal may come, since the frame is no stack; the frame's mask ends that.
    "7:",
    "mov edi, {sig_setmask}",
    "lea rsi, [rbx + {all_signals}]",
    "xor edx, edx",
    "mov r10d, 8",
    "mov eax, {sys_sigprocmask}",
    "syscall",
    // Our will.
    "mov r14d, [rbx + {will_count}]",
    "lea r13, [rbx + {will}]",
    "8:",
    "test r14d, r14d",
    "jz 9f",
    "mov rax, [r13]",
    "mov rdi, [r13 + 8]",
    "mov rsi, [r13 + 16]",
    "mov rdx, [r13 + 24]",
    "mov r10, [r13 + 32]",
    "mov r8, [r13 + 40]",
    "mov r9, [r13 + 48]",
    "syscall",
    "add r13, {last_call_len}",
    "dec r14d",
    "jmp 8b",
    "9:",
    "lea rsp, [rbx + {frame_stack}]",
    "mov eax, {sys_sigreturn}",
    "syscall",
    "ud2",
    ".globl pageferry_agent_end",
    ".hidden pageferry_agent_end",
    "pageferry_agent_end:",
    ".popsection",
    word = const offset_of!(SlotMemory, word),
    owner = const offset_of!(SlotMemory, owner),
    sequence = const offset_of!(SlotMemory, sequence),
    done = const offset_of!(SlotMemory, done),
    count = const offset_of!(SlotMemory, count),
    all_signals = const offset_of!(SlotMemory, all_signals),
    will_count = const offset_of!(SlotMemory, will_count),
    will = const offset_of!(SlotMemory, will),
    last_call_len = const size_of::<LastCall>(),
    calls = const offset_of!(SlotMemory, calls),
    frame_stack = const offset_of!(SlotMemory, frame) as u64 + Frame::stack_pointer(0),
    number = const offset_of!(CallMemory, number),
    arguments = const offset_of!(CallMemory, arguments),
    result = const offset_of!(CallMemory, result),
    references = const offset_of!(CallMemory, references),
    child_slot = const offset_of!(CallMemory, child_slot),
    call_len = const size_of::<CallMemory>(),
    waiters = const WAITERS,
    owner_died = const OWNER_DIED,
    sys_futex = const libc::SYS_futex,
    sys_sigprocmask = const libc::SYS_rt_sigprocmask,
    sys_sigreturn = const libc::SYS_rt_sigreturn,
    sig_setmask = const libc::SIG_SETMASK,
);

unsafe extern "C" {
    static pageferry_agent_start: u8;
    static pageferry_agent_end: u8;
}

/// The agent's code. It can be put anywhere; a thread enters at its first byte with its slot's address in rbx.
pub(crate) fn code() -> &'static [u8] {
    let start = &raw const pageferry_agent_start;
    let end = &raw const pageferry_agent_end;
    // SAFETY: both labels delimit one run of constant bytes in this program's image.
    unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
}

/// Length of an agent mapping with room for `threads` threads, in bytes.
pub fn byte_len(threads: usize) -> usize {
    CODE_LEN + threads * SLOT_LEN
}

/// Whether an agent mapping can have this length.
pub(crate) fn is_byte_len(len: u64) -> bool {
    len.checked_sub(CODE_LEN as u64).is_some_and(|slots| {
        slots % SLOT_LEN as u64 == 0
            && (1..=THREAD_LIMIT as u64).contains(&(slots / SLOT_LEN as u64))
    })
}

/// Offset of the slot with this index in the mapping.
pub(crate) fn slot_offset(index: usize) -> usize {
    CODE_LEN + index * SLOT_LEN
}

/// Offset of a slot's frame from the slot.
pub(crate) const FRAME_OFFSET: usize = offset_of!(SlotMemory, frame);
/// Offset of a slot's scratch memory from the slot.
pub(crate) const SCRATCH_OFFSET: usize = offset_of!(SlotMemory, scratch);
/// Offset of a slot's arguments for clone3 from the slot.
const CLONE_OFFSET: usize = offset_of!(SlotMemory, clone);
/// Offset of a slot's memory for its will from the slot.
pub(crate) const WILL_VALUES_OFFSET: usize = offset_of!(SlotMemory, will_values);

/// Our side of an agent mapping: the same memory the agent sees.
#[derive(Debug)]
pub(crate) struct Shared {
    base: *mut u8,
    len: usize,
    /// Where the tracee sees it.
    address: u64,
    /// Slots that are on this thread's robust list.
    on_list: usize,
    list_id: u64,
}

impl Shared {
    /// Maps `file`, which is what the tracee maps at `address`, and puts the mark and the code into it.
    pub(crate) fn new(
        file: &std::fs::File,
        len: usize,
        address: u64,
    ) -> std::result::Result<Self, Errno> {
        use std::os::fd::AsRawFd;
        // SAFETY: a fresh mapping of `len` bytes at an address of the kernel's choice; the file is shared memory of that
        // length, so that no access can fail for want of it.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        let base = base.cast::<u8>();
        let code = code();
        assert!(code.len() <= MARK_OFFSET);
        // SAFETY: the mapping is longer than CODE_LEN and nobody else of ours knows it yet.
        unsafe {
            // The mark first: from the address alone only memory that is still untouched can be told to be ours.
            base.add(MARK_OFFSET)
                .cast::<[u8; MARK.len()]>()
                .write_volatile(MARK);
            std::sync::atomic::compiler_fence(Ordering::SeqCst);
            std::ptr::copy_nonoverlapping(code.as_ptr(), base, code.len());
        };
        Ok(Self {
            base,
            len,
            address,
            on_list: 0,
            list_id: 0,
        })
    }

    /// How many threads have room.
    pub(crate) fn capacity(&self) -> usize {
        (self.len - CODE_LEN) / SLOT_LEN
    }

    fn slot(&self, index: usize) -> &SlotMemory {
        assert!(index < self.capacity());
        // SAFETY: within the mapping, page-aligned, alive as long as `self`; every field that the tracee writes while we
        // look is atomic, the others are read only while its agent waits.
        unsafe { &*self.base.add(slot_offset(index)).cast::<SlotMemory>() }
    }

    fn slot_pointer(&self, index: usize) -> *mut SlotMemory {
        assert!(index < self.capacity());
        // SAFETY: within the mapping.
        unsafe { self.base.add(slot_offset(index)).cast() }
    }

    /// Address of a slot in the tracee.
    pub(crate) fn slot_address(&self, index: usize) -> u64 {
        self.address + slot_offset(index) as u64
    }

    /// Prepares slots 0..count: nothing to do, and a frame to heal from.
    pub(crate) fn prepare(&mut self, index: usize, frame: &[u8]) {
        assert!(
            frame.len() <= FRAME_LEN,
            "signal frame larger than its place"
        );
        let slot = self.slot_pointer(index);
        // SAFETY: the slot is in the mapping and no agent runs in it yet.
        unsafe {
            std::ptr::copy_nonoverlapping(
                frame.as_ptr(),
                (&raw mut (*slot).frame).cast::<u8>(),
                frame.len(),
            );
        }
        let slot = self.slot(index);
        let owner = nix::unistd::gettid().as_raw() as u32;
        slot.all_signals.store(u64::MAX, Ordering::Relaxed);
        slot.owner.store(owner, Ordering::Relaxed);
        slot.word.store(owner | WAITERS, Ordering::Release);
    }

    /// Puts the words of slots 0..count on this thread's robust list: from here on our death wakes their agents.
    pub(crate) fn watch(&mut self, count: usize) -> std::result::Result<(), Errno> {
        self.unwatch();
        let chain = Chain {
            id: LIFELINES.with(|lifelines| lifelines.borrow_mut().new_id()),
            nodes: (0..count)
                .map(|index| &raw const self.slot(index).robust_next)
                .collect(),
        };
        self.list_id = chain.id;
        LIFELINES.with(|lifelines| lifelines.borrow_mut().add(chain))?;
        self.on_list = count;
        Ok(())
    }

    fn unwatch(&mut self) {
        if self.on_list > 0 {
            let id = self.list_id;
            // Fails only while the thread itself is being torn down, and its list with it.
            let _ = LIFELINES.try_with(|lifelines| lifelines.borrow_mut().remove(id));
            self.on_list = 0;
        }
    }

    /// Gives the agent of `index` a batch. Its previous one must be finished.
    pub(crate) fn start(&self, index: usize, batch: &Batch, child: Option<usize>) {
        let child_slot = child.map_or(0, |child| self.slot_address(child));
        let slot = self.slot_pointer(index);
        for (place, call) in batch.calls().iter().enumerate() {
            let mut arguments = [0; 6];
            let mut references = 0;
            for (n, argument) in call.arguments.iter().enumerate() {
                arguments[n] = match *argument {
                    Arg::Value(value) => value,
                    Arg::Result(of) => {
                        references |= 1 << n;
                        (offset_of!(SlotMemory, calls)
                            + of.0 * size_of::<CallMemory>()
                            + offset_of!(CallMemory, result)) as u64
                    }
                };
            }
            // SAFETY: the batch is no longer than the array, and the agent does not look at it before `word` says so.
            unsafe {
                (&raw mut (*slot).calls[place]).write(CallMemory {
                    number: call.number as u64,
                    arguments,
                    result: 0,
                    references,
                    child_slot,
                });
            }
        }
        let slot = self.slot(index);
        slot.count.store(batch.len() as u32, Ordering::Relaxed);
        slot.sequence.fetch_add(1, Ordering::Relaxed);
        slot.word
            .store(slot.owner.load(Ordering::Relaxed), Ordering::Release);
        futex_wake(&slot.word);
    }

    /// From here on our death has the agent of `index` make these calls, which may point to `values`; no calls: none.
    pub(crate) fn make_will(&self, index: usize, calls: &[LastCall], values: &[u64]) {
        assert!(calls.len() <= WILL_LIMIT && values.len() <= WILL_LIMIT);
        let count = &self.slot(index).will_count;
        // Never half a will: without one while it is written.
        count.store(0, Ordering::SeqCst);
        let slot = self.slot_pointer(index);
        // SAFETY: no more than the arrays hold, and the agent does not look at them while there are none.
        unsafe {
            let (to, memory) = (&raw mut (*slot).will, &raw mut (*slot).will_values);
            std::ptr::copy_nonoverlapping(calls.as_ptr(), to.cast(), calls.len());
            std::ptr::copy_nonoverlapping(values.as_ptr(), memory.cast(), values.len());
        }
        count.store(calls.len() as u32, Ordering::SeqCst);
    }

    /// Whether the agent has finished what [`Shared::start`] gave it; waits at most `nanoseconds` for it.
    pub(crate) fn finished(&self, index: usize, nanoseconds: i64) -> bool {
        let slot = self.slot(index);
        let wanted = slot.sequence.load(Ordering::Relaxed);
        let seen = slot.done.load(Ordering::Acquire);
        if seen != wanted {
            futex_wait(&slot.done, seen, nanoseconds);
        }
        slot.done.load(Ordering::Acquire) == wanted
    }

    /// What the calls of the last batch returned.
    pub(crate) fn results(
        &self,
        index: usize,
        count: usize,
    ) -> Vec<std::result::Result<u64, Errno>> {
        let slot = self.slot_pointer(index);
        (0..count)
            .map(|place| {
                // SAFETY: within the array; a volatile read, because the memory is the tracee's as well.
                let value = unsafe { (&raw const (*slot).calls[place].result).read_volatile() };
                answer(value)
            })
            .collect()
    }

    /// The slot's scratch memory.
    pub(crate) fn scratch(&mut self, index: usize) -> &mut [u8] {
        let slot = self.slot_pointer(index);
        // SAFETY: within the mapping, borrowed through `&mut self`; the agent touches it only inside a batch, during which
        // `Injection` lends nothing.
        unsafe {
            std::slice::from_raw_parts_mut((&raw mut (*slot).scratch).cast::<u8>(), SCRATCH_LEN)
        }
    }

    /// Writes clone3(2) arguments for a thread that is to have the id `tid`; returns their address in the tracee and their
    /// length.
    pub(crate) fn clone_arguments(&mut self, index: usize, flags: u64, tid: i32) -> (u64, u64) {
        let address = self.slot_address(index) + CLONE_OFFSET as u64;
        let arguments = CloneArguments::new(flags, 0, Some(tid));
        let slot = self.slot_pointer(index);
        // SAFETY: within the mapping; the agent waits.
        unsafe { (&raw mut (*slot).clone).write(arguments.words_at(address)) };
        (address, CloneArguments::LEN)
    }
}

/// `struct clone_args` (linux/sched.h) for a task, and behind it the id chosen for it, if any.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CloneArguments {
    flags: u64,
    exit_signal: u64,
    tid: Option<i32>,
}

impl CloneArguments {
    /// `CLONE_ARGS_SIZE_VER2`: with `set_tid`, before `cgroup` counts.
    pub(crate) const LEN: u64 = 88;
    const WORDS: usize = 16;
    /// Bytes of the whole.
    pub(crate) const MEMORY_LEN: u64 = Self::WORDS as u64 * 8;

    pub(crate) fn new(flags: u64, exit_signal: u64, tid: Option<i32>) -> Self {
        Self {
            flags,
            exit_signal,
            tid,
        }
    }

    /// As they lie at `address` in the tracee.
    pub(crate) fn words_at(&self, address: u64) -> [u64; Self::WORDS] {
        let mut words = [0_u64; Self::WORDS];
        words[0] = self.flags;
        words[4] = self.exit_signal;
        if let Some(tid) = self.tid {
            words[8] = address + Self::LEN; // set_tid
            words[9] = 1; // set_tid_size
            words[Self::LEN as usize / 8] = u64::from(tid as u32);
        }
        words
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.unwatch();
        // SAFETY: mapped by `new`, and nothing borrowed from it outlives `self`.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// A system call's return value as the C library would see it.
pub(crate) fn answer(value: u64) -> std::result::Result<u64, Errno> {
    match value as i64 {
        error @ -4095..=-1 => Err(Errno::from_raw(-error as i32)),
        _ => Ok(value),
    }
}

fn futex_wake(word: &AtomicU32) {
    // SAFETY: a live, aligned word; FUTEX_WAKE without the private flag, because the waiter is another process.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1) };
}

fn futex_wait(word: &AtomicU32, seen: u32, nanoseconds: i64) {
    let timeout = libc::timespec {
        tv_sec: 0,
        tv_nsec: nanoseconds,
    };
    // SAFETY: a live, aligned word and a timespec that outlives the call.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            seen,
            &raw const timeout,
        )
    };
}

// ---------------------------------------------------------------------------------------------------------------------
// The robust list of our thread

thread_local! {
    static LIFELINES: RefCell<Lifelines> = RefCell::new(Lifelines::new());
}

/// `struct robust_list_head`, linux/futex.h.
#[repr(C)]
struct RobustHead {
    next: AtomicU64,
    futex_offset: i64,
    pending: u64,
}
const _: () = assert!(size_of::<RobustHead>() == size_of::<[u64; 3]>());

/// The slots of one agent mapping, linked first to last.
struct Chain {
    id: u64,
    nodes: Vec<*const AtomicU64>,
}

impl Chain {
    fn node(&self, index: usize) -> &AtomicU64 {
        // SAFETY: the slots stay mapped until `Shared::drop` has taken the chain off the list.
        unsafe { &*self.nodes[index] }
    }

    fn last(&self) -> &AtomicU64 {
        self.node(self.nodes.len() - 1)
    }
}

/// This thread's robust list while an agent is planted by it. It takes the place of the C library's own, which is put back
/// with the last agent; until then robust mutexes that this thread holds are not marked if it dies.
struct Lifelines {
    head: Box<RobustHead>,
    chains: Vec<Chain>,
    previous: (u64, usize),
    ids: u64,
}

impl Lifelines {
    fn new() -> Self {
        Self {
            head: Box::new(RobustHead {
                next: AtomicU64::new(0),
                futex_offset: offset_of!(SlotMemory, word) as i64
                    - offset_of!(SlotMemory, robust_next) as i64,
                pending: 0,
            }),
            chains: Vec::new(),
            previous: (0, 0),
            ids: 0,
        }
    }

    fn new_id(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    fn head_address(&self) -> u64 {
        std::ptr::from_ref(&*self.head) as u64
    }

    /// Every store leaves a list that the kernel could walk: this thread may be killed between any two of them.
    fn add(&mut self, chain: Chain) -> std::result::Result<(), Errno> {
        let entries: usize = self.chains.iter().map(|chain| chain.nodes.len()).sum();
        if chain.nodes.is_empty() || entries + chain.nodes.len() > THREAD_LIMIT {
            return Err(Errno::E2BIG);
        }
        if self.chains.is_empty() {
            self.head.next.store(self.head_address(), Ordering::Release);
            self.install()?;
        }
        for index in 1..chain.nodes.len() {
            chain
                .node(index - 1)
                .store(chain.nodes[index] as u64, Ordering::Relaxed);
        }
        chain
            .last()
            .store(self.head.next.load(Ordering::Relaxed), Ordering::Relaxed);
        self.head
            .next
            .store(chain.nodes[0] as u64, Ordering::Release);
        self.chains.push(chain);
        Ok(())
    }

    fn remove(&mut self, id: u64) {
        let Some(index) = self.chains.iter().position(|chain| chain.id == id) else {
            return;
        };
        let after = self.chains[index].last().load(Ordering::Relaxed);
        // The list starts with the chain that was added last.
        match self.chains.get(index + 1) {
            Some(before) => before.last().store(after, Ordering::Release),
            None => self.head.next.store(after, Ordering::Release),
        }
        self.chains.remove(index);
        if self.chains.is_empty() {
            // SAFETY: the list this thread had before, whose owner still expects it.
            unsafe { libc::syscall(libc::SYS_set_robust_list, self.previous.0, self.previous.1) };
        }
    }

    fn install(&mut self) -> std::result::Result<(), Errno> {
        let (mut address, mut len) = (0_u64, 0_usize);
        // SAFETY: two words that outlive the call; 0 = this thread.
        Errno::result(unsafe {
            libc::syscall(libc::SYS_get_robust_list, 0, &raw mut address, &raw mut len)
        })?;
        self.previous = (address, len);
        // SAFETY: the head lives in a box of this thread's own storage and is taken back before that ends.
        Errno::result(unsafe {
            libc::syscall(
                libc::SYS_set_robust_list,
                self.head_address(),
                size_of::<RobustHead>(),
            )
        })
        .map(drop)
    }
}

impl Drop for Lifelines {
    fn drop(&mut self) {
        if !self.chains.is_empty() {
            // The thread ends with agents planted: they must notice. The kernel walks the list after this storage is
            // gone, so the head has to outlive it.
            std::mem::forget(std::mem::replace(
                &mut self.head,
                Box::new(RobustHead {
                    next: AtomicU64::new(0),
                    futex_offset: 0,
                    pending: 0,
                }),
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_fits_its_page_and_frames_are_aligned() {
        assert!((64..1024).contains(&code().len()), "{}", code().len());
        assert_eq!(FRAME_OFFSET as u64 % Frame::ALIGNMENT, 0);
    }

    #[test]
    fn the_robust_list_is_put_back() {
        let list = || {
            let (mut address, mut len) = (0_u64, 0_usize);
            // SAFETY: as in `install`.
            unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut address, &raw mut len) };
            (address, len)
        };
        let before = list();
        let nodes: Vec<AtomicU64> = (0..5).map(AtomicU64::new).collect();
        let chain = |id, range: std::ops::Range<usize>| Chain {
            id,
            nodes: nodes[range].iter().map(std::ptr::from_ref).collect(),
        };
        let mut lines = Lifelines::new();
        lines.add(chain(1, 0..2)).unwrap();
        lines.add(chain(2, 2..3)).unwrap();
        lines.add(chain(3, 3..5)).unwrap();
        let walk = |lines: &Lifelines| {
            let mut seen = Vec::new();
            let mut at = lines.head.next.load(Ordering::Relaxed);
            while at != lines.head_address() {
                let index = nodes
                    .iter()
                    .position(|node| std::ptr::from_ref(node) as u64 == at)
                    .unwrap();
                seen.push(index);
                at = nodes[index].load(Ordering::Relaxed);
            }
            seen
        };
        assert_eq!(walk(&lines), [3, 4, 2, 0, 1]);
        lines.remove(2);
        assert_eq!(walk(&lines), [3, 4, 0, 1]);
        lines.remove(3);
        assert_eq!(walk(&lines), [0, 1]);
        assert_ne!(list(), before);
        lines.remove(1);
        assert_eq!(list(), before);
    }
}
