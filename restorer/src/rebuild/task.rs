//! Rebuilds what belongs to the process and its threads: limits, credentials, scheduling, names, and the addresses the
//! kernel writes to on a thread's behalf (robust list, clear_child_tid, rseq).

use pageferry_image::model::Invalid;
use pageferry_image::model::task::{Credentials, Process, Thread, Tree};
use pageferry_tracee::injection::{Injection, ThreadStart};
use pageferry_tracee::procfs;
use pageferry_tracee::registers::Registers;

use super::{Error, Result, Work};

const RLIMIT_NOFILE: u32 = 7;
const PR_SET_NAME: u64 = 15;
const PR_SET_DUMPABLE: u64 = 4;
const PR_SET_PDEATHSIG: u64 = 1;
const PR_CAPBSET_DROP: u64 = 24;
const PR_SET_SECUREBITS: u64 = 28;
const PR_SET_TIMERSLACK: u64 = 29;
const PR_SET_CHILD_SUBREAPER: u64 = 36;
const PR_SET_NO_NEW_PRIVS: u64 = 38;
const PR_CAP_AMBIENT: u64 = 47;
const PR_CAP_AMBIENT_RAISE: u64 = 2;
const PR_CAP_AMBIENT_CLEAR_ALL: u64 = 4;
/// securebits(7): set*uid leaves the capability sets alone.
const SECBIT_NO_SETUID_FIXUP: u32 = 1 << 2;
/// The bits that lock their neighbours; they come with the final securebits.
const SECURE_ALL_LOCKS: u32 = 0xaa;
const LINUX_CAPABILITY_VERSION_3: u32 = 0x2008_0522;
const MCL_FUTURE: u64 = 2;
const IOPRIO_WHO_PROCESS: u64 = 1;
const SS_ONSTACK: i32 = 1;
const CAPABILITIES_MAX: u32 = 64;

fn prctl(work: &mut Work<'_, '_>, object: &str, call: &'static str, option: u64, argument: u64) {
    let args = [
        option.into(),
        argument.into(),
        0u64.into(),
        0u64.into(),
        0u64.into(),
    ];
    work.call(object, call, libc::SYS_prctl, &args);
}

/// Makes room for the descriptors while the table is filled; the captured limit comes in [`limits_last`].
pub(crate) fn limits_first(
    injection: &mut Injection<'_>,
    process: &Process,
    tree: &Tree,
) -> Result<()> {
    let needed = tree
        .descriptors_of(process)
        .iter()
        .map(|d| u64::from(d.fd) + 1)
        .max()
        .unwrap_or(0)
        + 16;
    let (soft, hard) = procfs::limits(process.pid)?[RLIMIT_NOFILE as usize];
    if soft >= needed {
        return Ok(());
    }
    let mut work = Work::new(injection, process.pid);
    set_limit(&mut work, RLIMIT_NOFILE, needed, hard.max(needed))?;
    work.run()?;
    Ok(())
}

fn set_limit(work: &mut Work<'_, '_>, resource: u32, soft: u64, hard: u64) -> Result<()> {
    work.room()?;
    let mut bytes = soft.to_le_bytes().to_vec();
    bytes.extend_from_slice(&hard.to_le_bytes());
    let at = work.bytes(&bytes)?;
    work.call(
        format!("resource limit {resource} (soft {soft}, hard {hard})"),
        "prlimit64",
        libc::SYS_prlimit64,
        &[
            0u64.into(),
            u64::from(resource).into(),
            at.into(),
            0u64.into(),
        ],
    );
    Ok(())
}

/// Sets the resource limits of the captured process.
pub(crate) fn limits_last(injection: &mut Injection<'_>, process: &Process) -> Result<()> {
    let now = procfs::limits(process.pid)?;
    let mut work = Work::new(injection, process.pid);
    for limit in &process.limits {
        let same = now.get(limit.resource as usize) == Some(&(limit.soft, limit.hard));
        if !same {
            set_limit(&mut work, limit.resource, limit.soft, limit.hard)?;
        }
    }
    work.run()?;
    Ok(())
}

/// Gives the leader its user and group ids early, capabilities kept.
pub(crate) fn take_ids(injection: &mut Injection<'_>, process: &Process) -> Result<()> {
    let leader = process
        .threads
        .first()
        .ok_or_else(|| Invalid::new("the process", "has no thread"))?;
    let credentials = credentials(leader)?;
    let mut work = Work::new(injection, process.pid);
    ids(&mut work, leader.tid, credentials)?;
    work.run()?;
    Ok(())
}

fn credentials(thread: &Thread) -> Result<&Credentials> {
    Ok(thread
        .credentials
        .as_ref()
        .ok_or_else(|| Invalid::new(format!("thread {}", thread.tid), "has no credentials"))?)
}

fn ids(work: &mut Work<'_, '_>, tid: i32, credentials: &Credentials) -> Result<()> {
    work.room()?;
    let object = format!("thread {tid}: credentials");
    let bits = (credentials.securebits & !SECURE_ALL_LOCKS) | SECBIT_NO_SETUID_FIXUP;
    prctl(
        work,
        &object,
        "prctl(PR_SET_SECUREBITS)",
        PR_SET_SECUREBITS,
        u64::from(bits),
    );
    let groups: Vec<u8> = credentials
        .groups
        .iter()
        .flat_map(|group| group.to_le_bytes())
        .collect();
    let at = work.bytes(&groups)?;
    let count = credentials.groups.len();
    work.call(
        object.as_str(),
        "setgroups",
        libc::SYS_setgroups,
        &[count.into(), at.into()],
    );
    let id = |value: u32| u64::from(value).into();
    work.call(
        object.as_str(),
        "setresgid",
        libc::SYS_setresgid,
        &[
            id(credentials.rgid),
            id(credentials.egid),
            id(credentials.sgid),
        ],
    );
    work.call(
        object.as_str(),
        "setresuid",
        libc::SYS_setresuid,
        &[
            id(credentials.ruid),
            id(credentials.euid),
            id(credentials.suid),
        ],
    );
    // These give back the former id and no error; the capture read them from /proc, so they are valid.
    work.call(
        object.as_str(),
        "setfsgid",
        libc::SYS_setfsgid,
        &[id(credentials.fsgid)],
    );
    work.call(
        object,
        "setfsuid",
        libc::SYS_setfsuid,
        &[id(credentials.fsuid)],
    );
    Ok(())
}

/// What the process has once for all its threads, credentials excepted.
pub(crate) fn rebuild_process(injection: &mut Injection<'_>, process: &Process) -> Result<()> {
    let pid = process.pid;
    let mut work = Work::new(injection, pid);
    let cwd = work.text(&process.cwd)?;
    work.call(
        format!("working directory {}", process.cwd),
        "chdir",
        libc::SYS_chdir,
        &[cwd.into()],
    );
    work.call(
        "the process",
        "umask",
        libc::SYS_umask,
        &[u64::from(process.umask).into()],
    );
    if process.child_subreaper {
        prctl(
            &mut work,
            "the process",
            "prctl(PR_SET_CHILD_SUBREAPER)",
            PR_SET_CHILD_SUBREAPER,
            1,
        );
    }
    for command in (0..u32::BITS)
        .map(|bit| 1u32 << bit)
        .filter(|command| process.membarrier & command != 0)
    {
        work.room()?;
        let args = [u64::from(command).into(), 0u64.into(), 0u64.into()];
        work.call("the process", "membarrier", libc::SYS_membarrier, &args);
    }
    if process
        .space
        .as_ref()
        .is_some_and(|space| space.lock_future)
    {
        work.call(
            "the process",
            "mlockall(MCL_FUTURE)",
            libc::SYS_mlockall,
            &[MCL_FUTURE.into()],
        );
    }
    work.run()?;
    write_if_different(pid, "oom_score_adj", &process.oom_score_adj.to_string())?;
    write_if_different(
        pid,
        "coredump_filter",
        &format!("{:08x}", process.coredump_filter),
    )
}

fn write_if_different(pid: i32, name: &'static str, value: &str) -> Result<()> {
    let path = format!("/proc/{pid}/{name}");
    let object = || format!("{name} {value}");
    let now =
        std::fs::read_to_string(&path).map_err(|error| Error::object(object(), "read", error))?;
    if now.trim() == value {
        return Ok(());
    }
    let text = if name == "coredump_filter" {
        format!("0x{value}")
    } else {
        value.to_owned()
    };
    std::fs::write(&path, text).map_err(|error| Error::object(object(), "write", error))
}

/// The last batch of every thread: it drops its privileges at the end. The leader comes last of all, since it works
/// for the process until then.
pub(crate) fn rebuild_threads(injection: &mut Injection<'_>, process: &Process) -> Result<()> {
    for thread in process.threads.iter().rev() {
        let mut work = Work::new(injection, thread.tid);
        addresses(&mut work, thread)?;
        scheduling(&mut work, thread)?;
        if thread.tid != process.pid {
            ids(&mut work, thread.tid, credentials(thread)?)?;
        }
        privileges(&mut work, process, thread)?;
        work.run()?;
    }
    Ok(())
}

fn addresses(work: &mut Work<'_, '_>, thread: &Thread) -> Result<()> {
    let object = format!("thread {}", thread.tid);
    work.room()?;
    let mut comm = thread.comm.as_bytes().to_vec();
    comm.truncate(15);
    comm.resize(16, 0);
    let comm = work.bytes(&comm)?;
    prctl(work, &object, "prctl(PR_SET_NAME)", PR_SET_NAME, comm);
    if thread.robust_list != 0 {
        work.call(
            object.as_str(),
            "set_robust_list",
            libc::SYS_set_robust_list,
            &[thread.robust_list.into(), thread.robust_list_len.into()],
        );
    }
    work.call(
        object.as_str(),
        "set_tid_address",
        libc::SYS_set_tid_address,
        &[thread.clear_child_tid.into()],
    );
    if let Some(stack) = &thread.altstack {
        let mut bytes = stack.sp.to_le_bytes().to_vec();
        // The kernel works out SS_ONSTACK from the stack pointer.
        bytes.extend_from_slice(&(stack.flags & !SS_ONSTACK).to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&stack.size.to_le_bytes());
        let at = work.bytes(&bytes)?;
        work.call(
            object.as_str(),
            "sigaltstack",
            libc::SYS_sigaltstack,
            &[at.into(), 0u64.into()],
        );
    }
    work.call(
        object.as_str(),
        "personality",
        libc::SYS_personality,
        &[u64::from(thread.personality).into()],
    );
    if let Some(rseq) = thread.rseq.as_ref().filter(|rseq| rseq.size != 0) {
        work.call(
            object,
            "rseq",
            libc::SYS_rseq,
            &[
                rseq.address.into(),
                u64::from(rseq.size).into(),
                0u64.into(),
                u64::from(rseq.signature).into(),
            ],
        );
    }
    Ok(())
}

fn scheduling(work: &mut Work<'_, '_>, thread: &Thread) -> Result<()> {
    let Some(carried) = &thread.scheduling else {
        return Ok(());
    };
    let object = format!("thread {}: scheduling", thread.tid);
    work.room()?;
    // struct sched_attr, version 0: 48 bytes.
    let mut attr = 48u32.to_le_bytes().to_vec();
    attr.extend_from_slice(&carried.policy.to_le_bytes());
    attr.extend_from_slice(&carried.flags.to_le_bytes());
    attr.extend_from_slice(&carried.nice.to_le_bytes());
    attr.extend_from_slice(&carried.priority.to_le_bytes());
    for field in [carried.runtime_ns, carried.deadline_ns, carried.period_ns] {
        attr.extend_from_slice(&field.to_le_bytes());
    }
    let at = work.bytes(&attr)?;
    work.call(
        object.as_str(),
        "sched_setattr",
        libc::SYS_sched_setattr,
        &[0u64.into(), at.into(), 0u64.into()],
    );
    if !carried.affinity_default && !carried.affinity.is_empty() {
        let at = work.bytes(&carried.affinity)?;
        let len = carried.affinity.len();
        work.call(
            object.as_str(),
            "sched_setaffinity",
            libc::SYS_sched_setaffinity,
            &[0u64.into(), len.into(), at.into()],
        );
    }
    if carried.ioprio != 0 {
        work.call(
            object.as_str(),
            "ioprio_set",
            libc::SYS_ioprio_set,
            &[
                IOPRIO_WHO_PROCESS.into(),
                0u64.into(),
                u64::from(carried.ioprio).into(),
            ],
        );
    }
    if carried.timer_slack_ns != 0 {
        prctl(
            work,
            &object,
            "prctl(PR_SET_TIMERSLACK)",
            PR_SET_TIMERSLACK,
            carried.timer_slack_ns,
        );
    }
    Ok(())
}

fn privileges(work: &mut Work<'_, '_>, process: &Process, thread: &Thread) -> Result<()> {
    let carried = credentials(thread)?;
    let object = format!("thread {}: capabilities", thread.tid);
    for capability in 0..CAPABILITIES_MAX {
        if carried.cap_bounding & (1 << capability) == 0 {
            work.room()?;
            // EINVAL: this kernel knows no such capability.
            let args = [
                PR_CAPBSET_DROP.into(),
                u64::from(capability).into(),
                0u64.into(),
                0u64.into(),
                0u64.into(),
            ];
            work.ignored("prctl(PR_CAPBSET_DROP)", libc::SYS_prctl, &args);
        }
    }
    work.room()?;
    // Changing ids made the process undumpable; said while it may still be changed by root only.
    prctl(
        work,
        &object,
        "prctl(PR_SET_DUMPABLE)",
        PR_SET_DUMPABLE,
        u64::from(process.dumpable),
    );
    prctl(
        work,
        &object,
        "prctl(PR_SET_SECUREBITS)",
        PR_SET_SECUREBITS,
        u64::from(carried.securebits),
    );
    let ambient = [
        PR_CAP_AMBIENT.into(),
        PR_CAP_AMBIENT_CLEAR_ALL.into(),
        0u64.into(),
        0u64.into(),
        0u64.into(),
    ];
    work.call(
        object.as_str(),
        "prctl(PR_CAP_AMBIENT_CLEAR_ALL)",
        libc::SYS_prctl,
        &ambient,
    );
    let mut header = LINUX_CAPABILITY_VERSION_3.to_le_bytes().to_vec();
    header.extend_from_slice(&[0; 4]);
    let header = work.bytes(&header)?;
    let mut data = Vec::with_capacity(24);
    for shift in [0, 32] {
        for set in [
            carried.cap_effective,
            carried.cap_permitted,
            carried.cap_inheritable,
        ] {
            data.extend_from_slice(&(((set >> shift) & u64::from(u32::MAX)) as u32).to_le_bytes());
        }
    }
    let data = work.bytes(&data)?;
    work.call(
        object.as_str(),
        "capset",
        libc::SYS_capset,
        &[header.into(), data.into()],
    );
    for capability in 0..CAPABILITIES_MAX {
        if carried.cap_ambient & (1 << capability) != 0 {
            work.room()?;
            let args = [
                PR_CAP_AMBIENT.into(),
                PR_CAP_AMBIENT_RAISE.into(),
                u64::from(capability).into(),
                0u64.into(),
                0u64.into(),
            ];
            work.call(
                object.as_str(),
                "prctl(PR_CAP_AMBIENT_RAISE)",
                libc::SYS_prctl,
                &args,
            );
        }
    }
    work.room()?;
    if carried.no_new_privs {
        prctl(
            work,
            &object,
            "prctl(PR_SET_NO_NEW_PRIVS)",
            PR_SET_NO_NEW_PRIVS,
            1,
        );
    }
    // Also none: a husk is killed with its parent.
    if thread.parent_death_signal != 0 || thread.tid == process.pid {
        // Cleared by every change of credentials, so it comes last.
        prctl(
            work,
            &object,
            "prctl(PR_SET_PDEATHSIG)",
            PR_SET_PDEATHSIG,
            u64::from(thread.parent_death_signal),
        );
    }
    Ok(())
}

/// The state every thread starts with.
pub(crate) fn starts(process: &Process) -> Result<Vec<ThreadStart>> {
    let mut starts = Vec::with_capacity(process.threads.len());
    for thread in &process.threads {
        let registers = Registers::from_bytes(&thread.registers).ok_or_else(|| {
            Invalid::new(
                format!("thread {}", thread.tid),
                "has registers of the wrong size",
            )
        })?;
        starts.push(ThreadStart {
            tid: thread.tid,
            registers,
            xsave: thread.xsave.clone(),
            sigmask: thread.sigmask,
        });
    }
    Ok(starts)
}
