//! The process and its threads: registers and everything else the kernel keeps per thread.

use pageferry_image::model::task::{Credentials, Limit, Rseq, Scheduling, Thread};
use pageferry_tracee::procfs::{self, Status};
use pageferry_tracee::{Batch, Injection, Registers, RseqConfiguration, Tracee};

use super::memory::FirstTouch;
use super::{Answers, signals};
use crate::Result;
use crate::survey::{Object, Refusal, RefusalKind};

const PR_MCE_KILL_DEFAULT: u64 = 2;
const PR_TSC_ENABLE: u32 = 1;
const PR_GET_MDWE: i32 = 66;
const PR_GET_THP_DISABLE: i32 = 42;
const PR_GET_IO_FLUSHER: i32 = 58;
const ARCH_GET_XCOMP_PERM: i32 = 0x1022;
/// Processor state components a program has to ask for: AMX tile data.
const DYNAMIC_COMPONENTS: u64 = 1 << 18;
const MEMBARRIER_GET_REGISTRATIONS: u64 = 1 << 9;
const IOPRIO_WHO_PROCESS: u64 = 1;
const PERSONALITY_ASK: u64 = 0xffff_ffff;
/// `struct sched_attr` up to and with `sched_period`.
const SCHED_ATTR_LEN: u64 = 48;
/// Code segment of 64-bit user code.
const USER_CODE_64: u64 = 0x33;
/// `struct robust_list_head`.
const ROBUST_LIST_HEAD_LEN: u64 = 24;

/// Where in a thread's scratch memory each answer lies.
mod at {
    pub(super) const ALTSTACK: usize = 0;
    pub(super) const DEATH_SIGNAL: usize = 32;
    pub(super) const TID_ADDRESS: usize = 40;
    pub(super) const TSC: usize = 48;
    pub(super) const MEMORY_POLICY: usize = 52;
    pub(super) const SCHEDULING: usize = 64;
    pub(super) const SUBREAPER: usize = 128;
    pub(super) const COMPONENTS: usize = 136;
    pub(super) const MONOTONIC: usize = 144;
    pub(super) const BOOTTIME: usize = 160;
    pub(super) const REALTIME: usize = 176;
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// What of a thread is had without asking it.
#[derive(Debug)]
pub(crate) struct Seen {
    tid: i32,
    status: Status,
    comm: String,
    registers: Registers,
    rseq: RseqConfiguration,
    dispatches_syscalls: bool,
    robust_list: (u64, u64),
    thread: Thread,
}

/// Looks at a frozen thread from outside.
pub(crate) fn seen(tracee: &Tracee, tid: i32) -> Result<Seen> {
    let registers = tracee.portable_registers(tid)?;
    let robust_list = tracee.robust_list(tid)?;
    let rseq = tracee.rseq(tid)?;
    let dispatches_syscalls = tracee.dispatches_syscalls(tid)?;
    let thread = Thread {
        tid,
        registers: registers.to_bytes(),
        xsave: tracee.xsave(tid)?,
        sigmask: tracee.sigmask(tid)?,
        pending: signals::pending(tracee, tid, false)?,
        ..Thread::default()
    };
    let pid = tracee.pid();
    Ok(Seen {
        tid,
        status: procfs::status(pid, tid)?,
        comm: procfs::comm(pid, tid)?,
        registers,
        rseq,
        dispatches_syscalls,
        robust_list,
        thread,
    })
}

impl Seen {
    /// What the status of a thread rules out, and 32-bit code.
    pub(crate) fn refusals(&self, pid: i32) -> Vec<Refusal> {
        let mut found = thread_refusals(pid, self.tid, &self.status);
        if self.registers.cs != USER_CODE_64 {
            found.push(Refusal {
                pid,
                object: Object::Thread(self.tid),
                what: RefusalKind::CompatMode,
            });
        }
        if self.dispatches_syscalls {
            found.push(Refusal {
                pid,
                object: Object::Thread(self.tid),
                what: RefusalKind::SyscallUserDispatch,
            });
        }
        found
    }

    pub(crate) fn tid(&self) -> i32 {
        self.tid
    }

    pub(crate) fn status(&self) -> &Status {
        &self.status
    }
}

/// What the status of a thread rules out.
pub(crate) fn thread_refusals(pid: i32, tid: i32, status: &Status) -> Vec<Refusal> {
    let mut found = Vec::new();
    let mut refuse = |what| {
        found.push(Refusal {
            pid,
            object: Object::Thread(tid),
            what,
        })
    };
    if status.seccomp != 0 {
        refuse(RefusalKind::Seccomp {
            mode: status.seccomp,
        });
    }
    if status
        .x86_thread_features
        .split_ascii_whitespace()
        .any(|feature| feature == "shstk")
    {
        refuse(RefusalKind::ShadowStack);
    }
    found
}

/// The questions put to every thread.
pub(crate) fn questions(scratch: u64) -> Batch {
    let mut batch = Batch::new();
    let mut call =
        |number: i64, arguments: [u64; 5]| batch.call(number, &arguments.map(Into::into));
    let address = |offset: usize| scratch + offset as u64;
    let option = |option: i32| u64::from(option as u32);
    call(libc::SYS_sigaltstack, [0, address(at::ALTSTACK), 0, 0, 0]);
    call(
        libc::SYS_prctl,
        [
            option(libc::PR_GET_PDEATHSIG),
            address(at::DEATH_SIGNAL),
            0,
            0,
            0,
        ],
    );
    call(
        libc::SYS_prctl,
        [option(libc::PR_GET_SECUREBITS), 0, 0, 0, 0],
    );
    call(
        libc::SYS_prctl,
        [option(libc::PR_GET_TIMERSLACK), 0, 0, 0, 0],
    );
    call(
        libc::SYS_prctl,
        [
            option(libc::PR_GET_TID_ADDRESS),
            address(at::TID_ADDRESS),
            0,
            0,
            0,
        ],
    );
    call(
        libc::SYS_sched_getattr,
        [0, address(at::SCHEDULING), SCHED_ATTR_LEN, 0, 0],
    );
    call(libc::SYS_ioprio_get, [IOPRIO_WHO_PROCESS, 0, 0, 0, 0]);
    call(libc::SYS_personality, [PERSONALITY_ASK, 0, 0, 0, 0]);
    call(
        libc::SYS_prctl,
        [option(libc::PR_GET_TSC), address(at::TSC), 0, 0, 0],
    );
    call(libc::SYS_prctl, [option(libc::PR_MCE_KILL_GET), 0, 0, 0, 0]);
    call(
        libc::SYS_get_mempolicy,
        [address(at::MEMORY_POLICY), 0, 0, 0, 0],
    );
    batch
}

/// Every CPU of this host, which a program that never asked for less may run on.
#[derive(Debug, Clone)]
pub(crate) struct Cpus(Vec<u32>);

impl Cpus {
    /// The CPUs that are online.
    pub(crate) fn online() -> Result<Self> {
        const PATH: &str = "/sys/devices/system/cpu/online";
        let text = std::fs::read_to_string(PATH).map_err(|source| crate::Error::File {
            path: PATH.into(),
            source,
        })?;
        Ok(Self(parse_cpu_list(text.trim())))
    }

    fn all_in(&self, mask: &[u8]) -> bool {
        self.0.iter().all(|&cpu| {
            mask.get(cpu as usize / 8)
                .is_some_and(|byte| byte >> (cpu % 8) & 1 != 0)
        })
    }
}

/// `0-3,8` as numbers.
fn parse_cpu_list(text: &str) -> Vec<u32> {
    text.split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(first.parse::<u32>().ok()?..=last.parse::<u32>().ok()?)
        })
        .flatten()
        .collect()
}

/// The model of a thread from what was seen and what it answered, what it will touch first, and what of it is refused.
pub(crate) fn thread(
    pid: i32,
    seen: Seen,
    answers: &Answers,
    scratch: &[u8],
    cpus: &Cpus,
) -> Result<(Thread, FirstTouch, Vec<Refusal>)> {
    let Seen {
        tid,
        status,
        comm,
        registers,
        rseq,
        dispatches_syscalls: _,
        robust_list,
        thread,
    } = seen;
    for (index, what) in [
        "sigaltstack",
        "prctl(PR_GET_PDEATHSIG)",
        "prctl(PR_GET_SECUREBITS)",
        "prctl(PR_GET_TIMERSLACK)",
        "prctl(PR_GET_TID_ADDRESS)",
        "sched_getattr",
        "ioprio_get",
        "personality",
    ]
    .into_iter()
    .enumerate()
    {
        answers.expect(index, what)?;
    }
    let mut refusals = Vec::new();
    let mut refuse = |what| {
        refusals.push(Refusal {
            pid,
            object: Object::Thread(tid),
            what,
        })
    };
    // The three below do not exist on every kernel; without them nobody can have changed them.
    if answers.get(8).is_some() && u32_at(scratch, at::TSC) != PR_TSC_ENABLE {
        refuse(RefusalKind::TscTrap);
    }
    if answers
        .get(9)
        .is_some_and(|policy| policy != PR_MCE_KILL_DEFAULT)
    {
        refuse(RefusalKind::MceKill);
    }
    if answers.get(10).is_some() && u32_at(scratch, at::MEMORY_POLICY) != 0 {
        refuse(RefusalKind::MemoryPolicy {
            mode: u32_at(scratch, at::MEMORY_POLICY),
        });
    }
    let clear_child_tid = u64_at(scratch, at::TID_ADDRESS);
    let first_touch = FirstTouch {
        instruction: registers.rip,
        stack: registers.rsp,
        thread_pointer: registers.fs_base,
        areas: [
            (rseq.address, u64::from(rseq.size)),
            (robust_list.0, ROBUST_LIST_HEAD_LEN),
            (clear_child_tid, 4),
        ],
    };
    let [ruid, euid, suid, fsuid] = status.uid;
    let [rgid, egid, sgid, fsgid] = status.gid;
    let thread = Thread {
        comm,
        altstack: Some(signals::parse_altstack(
            &scratch[at::ALTSTACK..at::ALTSTACK + signals::ALTSTACK_LEN],
        )),
        robust_list: robust_list.0,
        robust_list_len: robust_list.1,
        clear_child_tid,
        rseq: Some(Rseq {
            address: rseq.address,
            size: rseq.size,
            signature: rseq.signature,
            flags: rseq.flags,
        }),
        credentials: Some(Credentials {
            ruid,
            euid,
            suid,
            fsuid,
            rgid,
            egid,
            sgid,
            fsgid,
            groups: status.groups,
            cap_inheritable: status.cap_inh,
            cap_permitted: status.cap_prm,
            cap_effective: status.cap_eff,
            cap_bounding: status.cap_bnd,
            cap_ambient: status.cap_amb,
            securebits: low(answers.expect(2, "prctl(PR_GET_SECUREBITS)")?),
            no_new_privs: status.no_new_privs,
        }),
        scheduling: Some(Scheduling {
            affinity_default: cpus.all_in(&status.cpus_allowed),
            affinity: status.cpus_allowed,
            ioprio: low(answers.expect(6, "ioprio_get")?),
            timer_slack_ns: answers.expect(3, "prctl(PR_GET_TIMERSLACK)")?,
            ..parse_scheduling(&scratch[at::SCHEDULING..at::SCHEDULING + SCHED_ATTR_LEN as usize])
        }),
        parent_death_signal: u32_at(scratch, at::DEATH_SIGNAL),
        personality: low(answers.expect(7, "personality")?),
        ..thread
    };
    Ok((thread, first_touch, refusals))
}

/// The low half of what a call returned: these calls answer with an int.
fn low(answer: u64) -> u32 {
    (answer & 0xffff_ffff) as u32
}

fn parse_scheduling(bytes: &[u8]) -> Scheduling {
    Scheduling {
        policy: u32_at(bytes, 4),
        flags: u64_at(bytes, 8),
        nice: (u32_at(bytes, 16) as i32),
        priority: u32_at(bytes, 20),
        runtime_ns: u64_at(bytes, 24),
        deadline_ns: u64_at(bytes, 32),
        period_ns: u64_at(bytes, 40),
        ..Scheduling::default()
    }
}

/// What the process as a whole answered.
#[derive(Debug, Clone, Default)]
pub(crate) struct Answered {
    pub dumpable: u32,
    pub child_subreaper: bool,
    pub thp_disabled: bool,
    pub membarrier: u32,
    pub brk: u64,
    pub monotonic_ns: u64,
    pub boottime_ns: u64,
    pub realtime_ns: u64,
    pub refusals: Vec<Refusal>,
}

/// Asks the leader what is the same for all threads.
pub(crate) fn ask_process(injection: &mut Injection<'_>, pid: i32) -> Result<Answered> {
    let scratch = injection.scratch_address(pid);
    let address = |offset: usize| scratch + offset as u64;
    let option = |option: i32| u64::from(option as u32);
    let mut batch = Batch::new();
    let mut call =
        |number: i64, arguments: [u64; 5]| batch.call(number, &arguments.map(Into::into));
    call(libc::SYS_prctl, [option(libc::PR_GET_DUMPABLE), 0, 0, 0, 0]);
    call(
        libc::SYS_prctl,
        [
            option(libc::PR_GET_CHILD_SUBREAPER),
            address(at::SUBREAPER),
            0,
            0,
            0,
        ],
    );
    call(libc::SYS_prctl, [option(PR_GET_THP_DISABLE), 0, 0, 0, 0]);
    call(libc::SYS_brk, [0; 5]);
    call(
        libc::SYS_clock_gettime,
        [
            libc::CLOCK_MONOTONIC as u64,
            address(at::MONOTONIC),
            0,
            0,
            0,
        ],
    );
    call(
        libc::SYS_clock_gettime,
        [libc::CLOCK_BOOTTIME as u64, address(at::BOOTTIME), 0, 0, 0],
    );
    call(
        libc::SYS_clock_gettime,
        [libc::CLOCK_REALTIME as u64, address(at::REALTIME), 0, 0, 0],
    );
    call(
        libc::SYS_membarrier,
        [MEMBARRIER_GET_REGISTRATIONS, 0, 0, 0, 0],
    );
    call(libc::SYS_prctl, [option(PR_GET_MDWE), 0, 0, 0, 0]);
    call(libc::SYS_prctl, [option(PR_GET_IO_FLUSHER), 0, 0, 0, 0]);
    call(
        libc::SYS_arch_prctl,
        [
            option(ARCH_GET_XCOMP_PERM),
            address(at::COMPONENTS),
            0,
            0,
            0,
        ],
    );
    let answers = Answers::new(pid, injection.run(pid, &batch)?);
    for (index, what) in [
        (1, "prctl(PR_GET_CHILD_SUBREAPER)"),
        (4, "clock_gettime"),
        (5, "clock_gettime"),
        (6, "clock_gettime"),
    ] {
        answers.expect(index, what)?;
    }
    let bytes = &*injection.scratch(pid);
    let clock_ns = |at: usize| {
        u64_at(bytes, at)
            .saturating_mul(1_000_000_000)
            .saturating_add(u64_at(bytes, at + 8))
    };
    let mut refusals = Vec::new();
    let mut refuse = |what| {
        refusals.push(Refusal {
            pid,
            object: Object::Process,
            what,
        })
    };
    // What a kernel does not know, nobody has asked it for; PR_GET_IO_FLUSHER is only answered to a process that could be one.
    if answers.get(8).is_some_and(|flags| flags != 0) {
        refuse(RefusalKind::DenyWriteExecute);
    }
    if answers.get(9).is_some_and(|flags| flags != 0) {
        refuse(RefusalKind::IoFlusher);
    }
    let components = u64_at(bytes, at::COMPONENTS) & DYNAMIC_COMPONENTS;
    if answers.get(10).is_some() && components != 0 {
        refuse(RefusalKind::DynamicXstate { components });
    }
    Ok(Answered {
        dumpable: low(answers.expect(0, "prctl(PR_GET_DUMPABLE)")?),
        child_subreaper: u32_at(bytes, at::SUBREAPER) != 0,
        thp_disabled: answers.expect(2, "prctl(PR_GET_THP_DISABLE)")? != 0,
        // Asked for since 6.3. Before, a program that relies on it finds itself unregistered and is told so by EPERM.
        membarrier: answers.get(7).map_or(0, low),
        brk: answers.expect(3, "brk")?,
        monotonic_ns: clock_ns(at::MONOTONIC),
        boottime_ns: clock_ns(at::BOOTTIME),
        realtime_ns: clock_ns(at::REALTIME),
        refusals,
    })
}

/// All resource limits.
pub(crate) fn limits(pid: i32) -> Result<Vec<Limit>> {
    Ok((0..)
        .zip(procfs::limits(pid)?)
        .map(|(resource, (soft, hard))| Limit {
            resource,
            soft,
            hard,
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scheduling_attributes_are_understood() {
        let mut bytes = vec![48, 0, 0, 0, 3, 0, 0, 0];
        bytes.extend_from_slice(&1u64.to_le_bytes());
        bytes.extend_from_slice(&(-5i32).to_le_bytes());
        bytes.extend_from_slice(&7u32.to_le_bytes());
        bytes.extend_from_slice(&[0; 24]);
        let scheduling = parse_scheduling(&bytes);
        assert_eq!(
            (
                scheduling.policy,
                scheduling.flags,
                scheduling.nice,
                scheduling.priority
            ),
            (3, 1, -5, 7)
        );
    }

    #[test]
    fn cpu_lists_and_masks_agree() {
        let cpus = Cpus(parse_cpu_list("0-1,9"));
        assert_eq!(cpus.0, [0, 1, 9]);
        assert!(cpus.all_in(&[0x03, 0x02, 0, 0]));
        assert!(!cpus.all_in(&[0x01, 0x02]));
        assert!(!cpus.all_in(&[0x03]));
    }
}
