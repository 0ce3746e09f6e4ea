//! Facts about this host that a migration compares with the other host's, and what the kernel here can do.
//!
//! It reads; nothing it starts outlives the call that started it.
//!
//! # Safety
//! The unsafe blocks are `cpuid` and `xgetbv`, system calls with structures that outlive them, and one copy out of our own vdso,
//! whose mapping never changes.

use std::collections::BTreeSet;

use nix::errno::Errno;
use procfs_core::{CpuInfo, FromBufRead as _, Meminfo};

use crate::error::{Error, Result};
use crate::process::{errno_of, own_pid};
use crate::procfs;

/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;

fn read(path: &'static str) -> Result<String> {
    std::fs::read_to_string(path).map_err(|error| Error::path("read", path, errno_of(&error)))
}

fn read_number(path: &'static str) -> Result<u64> {
    read(path)?.trim().parse().map_err(|_| Error::Malformed {
        path: path.to_owned(),
        what: "a number",
    })
}

// ---------------------------------------------------------------------------------------------------------------------
// Processor

/// The processor's features by the kernel's names, of the first CPU.
///
/// # Errors
/// [`Error::Path`], [`Error::Malformed`].
pub fn cpu_flags() -> Result<BTreeSet<String>> {
    const PATH: &str = "/proc/cpuinfo";
    let malformed = || Error::Malformed {
        path: PATH.to_owned(),
        what: "flags",
    };
    let info = CpuInfo::from_buf_read(read(PATH)?.as_bytes()).map_err(|_| malformed())?;
    let flags = info.flags(0).ok_or_else(malformed)?;
    Ok(flags.into_iter().map(str::to_owned).collect())
}

/// The processor's name.
///
/// # Errors
/// [`Error::Path`], [`Error::Malformed`].
pub fn cpu_model() -> Result<String> {
    const PATH: &str = "/proc/cpuinfo";
    let malformed = || Error::Malformed {
        path: PATH.to_owned(),
        what: "model name",
    };
    let info = CpuInfo::from_buf_read(read(PATH)?.as_bytes()).map_err(|_| malformed())?;
    info.model_name(0).map(str::to_owned).ok_or_else(malformed)
}

/// The extended register state: its extent and what it is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Xsave {
    /// State components that the kernel has enabled (XCR0).
    pub xcr0: u64,
    /// Bytes of the standard-format area for them.
    pub size: u32,
}

/// What the kernel here saves of the extended registers.
///
/// # Errors
/// [`Error::Unsupported`] on a processor without xsave.
pub fn xsave() -> Result<Xsave> {
    const OSXSAVE: u32 = 1 << 27;
    const STATE_LEAF: u32 = 0xd;
    if std::arch::x86_64::__cpuid(1).ecx & OSXSAVE == 0 {
        return Err(Error::Unsupported { what: "xsave" });
    }
    let (low, high): (u32, u32);
    // SAFETY: OSXSAVE says that the instruction exists and is allowed.
    unsafe {
        std::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack));
    }
    Ok(Xsave {
        xcr0: u64::from(high) << 32 | u64::from(low),
        size: std::arch::x86_64::__cpuid_count(STATE_LEAF, 0).ebx,
    })
}

/// Bytes of the standard-format xsave area.
///
/// # Errors
/// As [`xsave`].
pub fn xsave_size() -> Result<u32> {
    xsave().map(|xsave| xsave.size)
}

/// Enabled state components.
///
/// # Errors
/// As [`xsave`].
pub fn xcr0() -> Result<u64> {
    xsave().map(|xsave| xsave.xcr0)
}

/// CPUs this process may run on.
pub fn cpu_count() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernel

/// Kernel release, as in `6.18.44`.
///
/// # Errors
/// [`Error::Path`].
pub fn kernel_release() -> Result<String> {
    read("/proc/sys/kernel/osrelease").map(|text| text.trim_end().to_owned())
}

/// Kernel build, as in `#1 SMP PREEMPT_DYNAMIC …`: with the release it tells one build from another.
///
/// # Errors
/// [`Error::Path`].
pub fn kernel_version() -> Result<String> {
    read("/proc/sys/kernel/version").map(|text| text.trim_end().to_owned())
}

/// Host name in our UTS namespace.
///
/// # Errors
/// [`Error::Path`].
pub fn host_name() -> Result<String> {
    read("/proc/sys/kernel/hostname").map(|text| text.trim_end().to_owned())
}

/// Random number of this boot: records that carry another one are about processes that no longer exist.
///
/// # Errors
/// [`Error::Path`].
pub fn boot_id() -> Result<String> {
    read("/proc/sys/kernel/random/boot_id").map(|text| text.trim_end().to_owned())
}

/// One past the highest pid in our pid namespace.
///
/// # Errors
/// [`Error::Path`], [`Error::Malformed`].
pub fn pid_max() -> Result<u64> {
    read_number("/proc/sys/kernel/pid_max")
}

/// Most mappings a process may have.
///
/// # Errors
/// [`Error::Path`], [`Error::Malformed`].
pub fn max_map_count() -> Result<u64> {
    read_number("/proc/sys/vm/max_map_count")
}

/// The bytes of the vdso that the kernel maps into every program: programs hold addresses into it, so it has to be equal.
///
/// # Errors
/// [`Error::Unsupported`] when there is none.
pub fn vdso() -> Result<Vec<u8>> {
    let none = Error::Unsupported { what: "a vdso" };
    let Some(vma) = procfs::maps(own_pid())?
        .into_iter()
        .find(|vma| vma.path == "[vdso]")
    else {
        return Err(none);
    };
    let length = usize::try_from(vma.len()).map_err(|_| none)?;
    // SAFETY: the mapping is readable, at most a few pages, and nothing in this program unmaps or moves it.
    Ok(unsafe { std::slice::from_raw_parts(vma.start as *const u8, length) }.to_vec())
}

/// The lengths in bytes of the kernel's data mappings beside the vdso (`[vvar]`, `[vvar_vclock]`), which lie below it.
///
/// # Errors
/// [`Error::Gone`] never; [`Error::Path`] when `/proc` is not there.
pub fn vvar_lengths() -> Result<Vec<(String, u64)>> {
    Ok(procfs::maps(own_pid())?
        .into_iter()
        .filter(|vma| vma.path.starts_with("[vvar"))
        .map(|vma| (vma.path.clone(), vma.len()))
        .collect())
}

// ---------------------------------------------------------------------------------------------------------------------
// Clocks and memory

/// What a clock shows, in nanoseconds; the time namespace we are in applies.
///
/// # Errors
/// [`Error::Kernel`] with `EINVAL` for a clock that does not exist.
pub fn clock_ns(clock: i32) -> Result<u64> {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel stores one timespec.
    let answer = unsafe { libc::clock_gettime(clock, &raw mut now) };
    Errno::result(answer).map_err(|errno| Error::kernel("clock_gettime", own_pid(), errno))?;
    // Clocks before 1970 do not occur.
    Ok((now.tv_sec as u64)
        .saturating_mul(1_000_000_000)
        .saturating_add(now.tv_nsec as u64))
}

/// What clocks show at one moment, in nanoseconds: ours, or those of a time namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clocks {
    /// CLOCK_MONOTONIC.
    pub monotonic_ns: u64,
    /// CLOCK_BOOTTIME.
    pub boottime_ns: u64,
    /// CLOCK_REALTIME.
    pub realtime_ns: u64,
}

impl Clocks {
    /// In the order of the fields.
    pub fn all_ns(self) -> [u64; 3] {
        [self.monotonic_ns, self.boottime_ns, self.realtime_ns]
    }
}

/// Reads our three clocks; tens of nanoseconds lie between them.
///
/// # Errors
/// [`Error::Kernel`].
pub fn clocks() -> Result<Clocks> {
    Ok(Clocks {
        monotonic_ns: clock_ns(libc::CLOCK_MONOTONIC)?,
        boottime_ns: clock_ns(libc::CLOCK_BOOTTIME)?,
        realtime_ns: clock_ns(libc::CLOCK_REALTIME)?,
    })
}

fn memory() -> Result<Meminfo> {
    const PATH: &str = "/proc/meminfo";
    Meminfo::from_buf_read(read(PATH)?.as_bytes()).map_err(|_| Error::Malformed {
        path: PATH.to_owned(),
        what: "memory",
    })
}

/// Bytes that programs can still take without swapping (`MemAvailable`).
///
/// # Errors
/// [`Error::Path`], [`Error::Malformed`].
pub fn memory_available_bytes() -> Result<u64> {
    memory()?.mem_available.ok_or_else(|| Error::Malformed {
        path: "/proc/meminfo".to_owned(),
        what: "MemAvailable",
    })
}

/// Bytes of swap space.
///
/// # Errors
/// [`Error::Path`], [`Error::Malformed`].
pub fn swap_total_bytes() -> Result<u64> {
    memory().map(|memory| memory.swap_total)
}

// ---------------------------------------------------------------------------------------------------------------------
// Capabilities

/// One thing a migration needs from the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What it is.
    pub name: &'static str,
    /// What the kernel answered when it was tried; `None` = it works.
    pub problem: Option<Errno>,
    /// What an operator can do about it.
    pub help: &'static str,
}

/// Tries everything that a migration needs, in the order in which it would need it. Changes nothing on the host.
///
/// Some of it is tried in a child of this process, so the caller must have one thread; with more, those are reported with
/// `EBUSY`.
pub fn checks() -> Vec<Check> {
    let mut found = Vec::new();
    let mut note = |name, answer: Result<()>, help| {
        found.push(Check {
            name,
            problem: answer.err().map(|error| errno_of_failure(&error)),
            help,
        });
    };
    note(
        "kernel 6.7 or newer (PAGEMAP_SCAN)",
        check_pagemap_scan(),
        "boot a kernel of version 6.7 or newer",
    );
    note(
        "userfaultfd with kernel faults",
        check_userfaultfd(),
        "run as root, outside a container profile that blocks userfaultfd; the kernel needs CONFIG_USERFAULTFD",
    );
    note(
        "CAP_SYS_PTRACE",
        check_capability(CAP_SYS_PTRACE),
        "run as root; in a container add the SYS_PTRACE capability",
    );
    note(
        "CAP_CHECKPOINT_RESTORE",
        check_capability(CAP_CHECKPOINT_RESTORE),
        "run as root; in a container add the CHECKPOINT_RESTORE capability",
    );
    note(
        "CAP_SYS_ADMIN",
        check_capability(CAP_SYS_ADMIN),
        "run as root; in a container add the SYS_ADMIN capability",
    );
    note(
        "CONFIG_CHECKPOINT_RESTORE",
        check_checkpoint_restore(),
        "boot a kernel with CONFIG_CHECKPOINT_RESTORE",
    );
    note(
        "kcmp",
        crate::descriptor::same_file(own_pid(), 0, own_pid(), 0).map(drop),
        "boot a kernel with CONFIG_KCMP, outside a profile that blocks kcmp",
    );
    note(
        "/proc/self/map_files",
        check_map_files(),
        "boot a kernel with CONFIG_CHECKPOINT_RESTORE and mount /proc",
    );
    note(
        "not filtered by seccomp",
        check_unfiltered(),
        "run outside a container's seccomp profile: a filtered tracer cannot suspend a program's own filter",
    );
    note(
        "time namespaces and clone3 with a chosen pid",
        check_spawn(),
        "run as root on a kernel with CONFIG_TIME_NS; in a container clone3 and unshare must be allowed",
    );
    found
}

fn errno_of_failure(error: &Error) -> Errno {
    match error {
        Error::Kernel { errno, .. } | Error::Path { errno, .. } | Error::Injected { errno, .. } => {
            *errno
        }
        Error::Gone { .. } => Errno::ESRCH,
        Error::WrongState { .. } => Errno::EBUSY,
        Error::Unsupported { .. } => Errno::ENOSYS,
        _ => Errno::EIO,
    }
}

const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_CHECKPOINT_RESTORE: u32 = 40;

fn check_capability(number: u32) -> Result<()> {
    let status = procfs::status(own_pid(), own_pid())?;
    if status.cap_eff & 1 << number != 0 {
        Ok(())
    } else {
        Err(Error::kernel("capget", own_pid(), Errno::EPERM))
    }
}

fn check_unfiltered() -> Result<()> {
    match procfs::status(own_pid(), own_pid())?.seccomp {
        0 => Ok(()),
        _ => Err(Error::kernel("seccomp", own_pid(), Errno::EPERM)),
    }
}

fn check_pagemap_scan() -> Result<()> {
    let page = std::hint::black_box(0_u8);
    let start = &raw const page as u64 / PAGE_SIZE * PAGE_SIZE;
    let scan = crate::pagemap::Scan {
        range: start..start + PAGE_SIZE,
        category_mask: crate::pagemap::PRESENT,
        return_mask: crate::pagemap::PRESENT,
        ..crate::pagemap::Scan::default()
    };
    crate::pagemap::scan(&crate::pagemap::open(own_pid())?, &scan).map(drop)
}

fn check_userfaultfd() -> Result<()> {
    use crate::uffd::{Features, Uffd};
    Uffd::create()?
        .handshake(
            Features::EVENT_FORK
                | Features::EVENT_REMAP
                | Features::EVENT_REMOVE
                | Features::EVENT_UNMAP
                | Features::THREAD_ID,
        )
        .map(drop)
}

fn check_checkpoint_restore() -> Result<()> {
    let timer = crate::procfs::TimerfdInfo {
        clock: libc::CLOCK_MONOTONIC,
        ticks: 1,
        ..crate::procfs::TimerfdInfo::default()
    };
    crate::timer::create(&timer).map(drop)
}

fn check_map_files() -> Result<()> {
    let path = "/proc/self/map_files";
    let mut entries =
        std::fs::read_dir(path).map_err(|error| Error::path("list", path, errno_of(&error)))?;
    let Some(Ok(entry)) = entries.next() else {
        return Err(Error::path("list", path, Errno::ENOENT));
    };
    std::fs::metadata(entry.path())
        .map(drop)
        .map_err(|error| Error::path("stat", path, errno_of(&error)))
}

/// Makes a husk inside a new time namespace, from a child of ours, so that our own future children stay where they are.
fn check_spawn() -> Result<()> {
    use crate::{husk, process};
    let child = process::fork(false, || {
        let tried = process::unshare_time(1, 1).and_then(|()| try_husk(husk::DEFAULT_LOAD_ADDRESS));
        match tried {
            Ok(()) => 0,
            Err(error) => errno_of_failure(&error) as i32,
        }
    });
    match process::wait(child?)? {
        process::Ended::Exited(0) => Ok(()),
        process::Ended::Exited(code) => Err(Error::kernel(
            "clone3(set_tid)",
            own_pid(),
            Errno::from_raw(code),
        )),
        process::Ended::Killed(_) => Err(Error::kernel("clone3(set_tid)", own_pid(), Errno::EIO)),
    }
}

/// Makes a husk with some free pid and ends it again.
fn try_husk(load_address: u64) -> Result<()> {
    use crate::{husk, process};
    let highest = i32::try_from(pid_max()?).unwrap_or(i32::MAX) - 1;
    // The highest numbers are the last that the kernel gives out.
    let mut last = Error::Gone { pid: highest };
    for pid in (highest.saturating_sub(64)..=highest).rev() {
        let request = husk::HuskRequest {
            load_address,
            ..husk::HuskRequest::new(pid)
        };
        match husk::spawn(&request) {
            Ok(pid) => {
                process::kill(pid, libc::SIGKILL)?;
                return process::wait(pid).map(drop);
            }
            Err(error @ Error::PidTaken { .. }) => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::alone;

    #[test]
    fn the_processor_is_described() {
        let flags = cpu_flags().expect("flags");
        assert!(flags.contains("fpu") && flags.contains("sse2"));
        assert!(!cpu_model().expect("model").is_empty());
        let xsave = xsave().expect("xsave");
        // x87 and SSE are always enabled; their area and the header come first.
        assert!(xsave.xcr0 & 3 == 3 && xsave.size >= 576);
        assert!(cpu_count() >= 1);
    }

    #[test]
    fn the_kernel_is_described() {
        assert!(kernel_release().expect("release").contains('.'));
        assert!(!kernel_version().expect("version").is_empty());
        assert!(!host_name().expect("name").is_empty());
        assert_eq!(boot_id().expect("boot id").len(), 36);
        assert!(pid_max().expect("pid_max") >= 301);
        assert!(max_map_count().expect("max_map_count") > 0);
        let vdso = vdso().expect("vdso");
        assert!(vdso.starts_with(b"\x7fELF") && vdso.len() % PAGE_SIZE as usize == 0);
        assert!(
            vvar_lengths()
                .expect("vvar")
                .iter()
                .any(|(name, _)| name == "[vvar]")
        );
    }

    #[test]
    fn clocks_and_memory_are_read() {
        let (first, second) = (clocks().expect("clocks"), clocks().expect("clocks"));
        assert!(second.monotonic_ns >= first.monotonic_ns);
        // 2020 is past.
        assert!(first.realtime_ns > 1_577_836_800_000_000_000);
        assert!(clock_ns(12_345).is_err());
        assert!(memory_available_bytes().expect("available") > 0);
        swap_total_bytes().expect("swap");
    }

    #[test]
    fn this_host_passes_its_checks() {
        alone(|| {
            let failed: Vec<_> = checks()
                .into_iter()
                .filter(|c| c.problem.is_some())
                .collect();
            assert_eq!(failed, []);
            // Nothing of the trial is left, and our own clocks are where they were.
            assert_eq!(procfs::children(own_pid()).expect("children"), [0; 0]);
            let namespaces = procfs::namespaces(own_pid()).expect("namespaces");
            assert_eq!(namespaces.time, namespaces.time_for_children);
        });
    }
}
