//! The survey of `/proc`: every fact about a process that the kernel tells as text, as typed values.
//!
//! It only reads, and never needs the process stopped; a process or thread that ends meanwhile is [`Error::Gone`], and a
//! descriptor that is closed meanwhile is left out. Text that cannot be understood is an error, never a default value, because
//! what is not understood would be silently lost in a migration. Names and paths are bytes to the kernel; those that are not
//! UTF-8 get U+FFFD in place of the odd bytes and so name no existing file.
//!
//! The parsers are written here rather than taken from the `procfs-core` crate because that crate refuses a thread whose
//! name is not UTF-8 and drops fields that a migration needs.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::str::FromStr;

use nix::errno::Errno;

use crate::choke::{self, Kind};
use crate::error::{Error, Result};
use crate::memory::{RemoteMemory, RemotePtr};
use crate::process::own_pid;

/// Number of resource limits, `RLIM_NLIMITS`.
pub const LIMIT_COUNT: usize = 16;

// ---------------------------------------------------------------------------------------------------------------------
// Reading

/// The error of an operation on a file below `/proc/<pid>`.
fn failed(what: &'static str, pid: i32, path: &str, error: &io::Error) -> Error {
    let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    match errno {
        Errno::ESRCH => Error::Gone { pid },
        // The same answer for a process that has ended and for a file this kernel does not have.
        Errno::ENOENT if !Path::new(&format!("/proc/{pid}")).exists() => Error::Gone { pid },
        errno => Error::path(what, path, errno),
    }
}

fn read(pid: i32, path: &str) -> Result<Vec<u8>> {
    choke::pass(Kind::Proc).map_err(|errno| Error::path("read", path, errno))?;
    std::fs::read(path).map_err(|error| failed("read", pid, path, &error))
}

fn read_text(pid: i32, path: &str) -> Result<String> {
    read(pid, path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

fn read_link(pid: i32, path: &str) -> Result<String> {
    choke::pass(Kind::Proc).map_err(|errno| Error::path("readlink", path, errno))?;
    std::fs::read_link(path)
        .map(|link| link.as_os_str().to_string_lossy().into_owned())
        .map_err(|error| failed("readlink", pid, path, &error))
}

/// The entries of a directory of `/proc` whose names are numbers, ascending.
fn numbers<T: FromStr + Ord>(pid: i32, path: &str) -> Result<Vec<T>> {
    choke::pass(Kind::Proc).map_err(|errno| Error::path("list", path, errno))?;
    list_numbers(path).map_err(|error| failed("list", pid, path, &error))
}

fn list_numbers<T: FromStr + Ord>(path: &str) -> io::Result<Vec<T>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let name = entry?.file_name();
        if let Some(number) = name.to_str().and_then(|name| name.parse().ok()) {
            found.push(number);
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Where a piece of text came from, for the error that says it makes no sense.
struct Origin<'a>(&'a str);

impl Origin<'_> {
    fn malformed(&self, what: &'static str) -> Error {
        Error::Malformed {
            path: self.0.to_owned(),
            what,
        }
    }

    fn decimal<T: FromStr>(&self, text: Option<&str>, what: &'static str) -> Result<T> {
        text.and_then(|text| text.parse().ok())
            .ok_or_else(|| self.malformed(what))
    }

    fn radix(&self, text: Option<&str>, radix: u32, what: &'static str) -> Result<u64> {
        text.map(|text| text.trim_start_matches("0x"))
            .and_then(|text| u64::from_str_radix(text, radix).ok())
            .ok_or_else(|| self.malformed(what))
    }

    fn hex(&self, text: Option<&str>, what: &'static str) -> Result<u64> {
        self.radix(text, 16, what)
    }

    fn hex_u32(&self, text: Option<&str>, what: &'static str) -> Result<u32> {
        u32::try_from(self.hex(text, what)?).map_err(|_| self.malformed(what))
    }
}

/// The value of every `key: value` line.
fn fields(text: &str) -> BTreeMap<&str, &str> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key, value.trim_matches(['\t', ' '])))
        .collect()
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads and children

/// Threads of a process: the leader first, the others ascending.
///
/// # Errors
/// [`Error::Gone`].
pub fn tids(pid: i32) -> Result<Vec<i32>> {
    let mut tids: Vec<i32> = numbers(pid, &format!("/proc/{pid}/task"))?;
    tids.sort_by_key(|&tid| (tid != pid, tid));
    Ok(tids)
}

/// Children of all threads of a process, each once, in the order in which a wait looks at those of one thread: as they were
/// born, or came from others. Zombies count.
///
/// # Errors
/// [`Error::Gone`]; [`Error::Path`] without `CONFIG_PROC_CHILDREN`.
pub fn children(pid: i32) -> Result<Vec<i32>> {
    let (mut found, mut known) = (Vec::new(), BTreeSet::new());
    for tid in tids(pid)? {
        let path = format!("/proc/{pid}/task/{tid}/children");
        let text = match read_text(tid, &path) {
            Ok(text) => text,
            Err(Error::Gone { .. }) if tid != pid => continue,
            Err(error) => return Err(error),
        };
        for word in text.split_ascii_whitespace() {
            let child = Origin(&path).decimal::<i32>(Some(word), "child")?;
            // It may be passed on from one thread to another while we look.
            if known.insert(child) {
                found.push(child);
            }
        }
    }
    Ok(found)
}

/// A process and all that descend from it now, parents before their children. Zombies count.
///
/// # Errors
/// As [`children`], for the process itself.
pub fn descendants(root: i32) -> Result<Vec<i32>> {
    let mut all = vec![root];
    let mut index = 0;
    while let Some(&pid) = all.get(index) {
        match children(pid) {
            Ok(children) => all.extend(children),
            Err(error) if error.is_gone() && pid != root => {}
            Err(error) => return Err(error),
        }
        index += 1;
    }
    Ok(all)
}

/// The process groups and sessions that there are, whether their leaders are there or not. Processes that end meanwhile are left
/// out. Counts once at the choke point: how many processes there are on a host is chance.
///
/// # Errors
/// [`Error::Path`] when `/proc` cannot be listed.
pub fn groups_and_sessions() -> Result<BTreeSet<i32>> {
    choke::pass(Kind::Proc).map_err(|errno| Error::path("list", "/proc", errno))?;
    let pids: Vec<i32> =
        list_numbers("/proc").map_err(|error| failed("list", 0, "/proc", &error))?;
    let mut found = BTreeSet::new();
    for pid in pids {
        let path = format!("/proc/{pid}/stat");
        let Ok(text) = std::fs::read_to_string(&path) else {
            continue;
        };
        let stat = parse_stat(&text, &path)?;
        found.extend([stat.pgrp, stat.session]);
    }
    Ok(found)
}

// ---------------------------------------------------------------------------------------------------------------------
// status

/// `/proc/<pid>/task/<tid>/status`. Numbers are as our own user and pid namespaces see them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Thread name, at most 15 bytes. `\n` and `\\` are unescaped.
    pub name: String,
    /// Scheduler state: `R S D T t Z X I`.
    pub state: char,
    /// Process (thread group) id.
    pub tgid: i32,
    /// Parent process.
    pub ppid: i32,
    /// Process that traces this thread; 0 = none.
    pub tracer_pid: i32,
    /// Real, effective, saved and file-system user id.
    pub uid: [u32; 4],
    /// Real, effective, saved and file-system group id.
    pub gid: [u32; 4],
    /// Supplementary groups, ascending.
    pub groups: Vec<u32>,
    /// Thread id in each pid namespace, ours first, its own last.
    pub ns_pid: Vec<i32>,
    /// Process group in each pid namespace, ours first.
    pub ns_pgid: Vec<i32>,
    /// Session in each pid namespace, ours first.
    pub ns_sid: Vec<i32>,
    /// Number of threads.
    pub threads: u32,
    /// Inheritable capabilities.
    pub cap_inh: u64,
    /// Permitted capabilities.
    pub cap_prm: u64,
    /// Effective capabilities.
    pub cap_eff: u64,
    /// Bounding set.
    pub cap_bnd: u64,
    /// Ambient capabilities.
    pub cap_amb: u64,
    /// `PR_SET_NO_NEW_PRIVS`.
    pub no_new_privs: bool,
    /// Seccomp mode: 0 none, 1 strict, 2 filter.
    pub seccomp: u32,
    /// Number of seccomp filters (5.9; 0 when the kernel does not say).
    pub seccomp_filters: u32,
    /// File mode creation mask.
    pub umask: u32,
    /// Signals pending for this thread. Bit n-1 is signal n, here and below.
    pub sig_pnd: u64,
    /// Signals pending for the process.
    pub shd_pnd: u64,
    /// Blocked signals. During `ppoll(2)` and its like this is the temporary mask.
    pub sig_blk: u64,
    /// Ignored signals.
    pub sig_ign: u64,
    /// Signals with a handler.
    pub sig_cgt: u64,
    /// KiB pinned for DMA (`VmPin`).
    pub vm_pin_kib: u64,
    /// KiB locked (`VmLck`).
    pub vm_lck_kib: u64,
    /// Resident KiB.
    pub vm_rss_kib: u64,
    /// Resident private anonymous KiB.
    pub rss_anon_kib: u64,
    /// Resident KiB of shared memory and tmpfs files.
    pub rss_shmem_kib: u64,
    /// Swapped KiB.
    pub vm_swap_kib: u64,
    /// KiB in huge pages of hugetlbfs.
    pub hugetlb_kib: u64,
    /// Whether transparent huge pages are allowed (`PR_SET_THP_DISABLE` unset; 5.0, else `true`).
    pub thp_enabled: bool,
    /// Whether a core dump is being written.
    pub core_dumping: bool,
    /// CPUs the thread may run on: little-endian bit mask.
    pub cpus_allowed: Vec<u8>,
    /// NUMA nodes it may allocate from: little-endian bit mask.
    pub mems_allowed: Vec<u8>,
    /// Voluntary context switches.
    pub voluntary_switches: u64,
    /// Involuntary context switches.
    pub involuntary_switches: u64,
    /// Enabled x86 thread features, as in `shstk`; empty when there are none.
    pub x86_thread_features: String,
    /// Locked x86 thread features.
    pub x86_thread_features_locked: String,
    /// `PR_SET_SPECULATION_CTRL` state of speculative store bypass, the kernel's words.
    pub speculation_store_bypass: String,
    /// `PR_SET_SPECULATION_CTRL` state of indirect branch speculation, the kernel's words.
    pub speculation_indirect_branch: String,
}

/// Reads the status of one thread.
///
/// # Errors
/// [`Error::Gone`], [`Error::Malformed`].
pub fn status(pid: i32, tid: i32) -> Result<Status> {
    let path = format!("/proc/{pid}/task/{tid}/status");
    parse_status(&read_text(tid, &path)?, &path)
}

fn parse_status(text: &str, path: &str) -> Result<Status> {
    let origin = Origin(path);
    let fields = fields(text);
    let text_of = |key: &str| fields.get(key).copied();
    // Values that kernel threads and zombies do not have, or that older kernels do not print.
    let optional = |key: &'static str| -> Result<u64> {
        match text_of(key) {
            None => Ok(0),
            Some(text) => origin.decimal(text.split_ascii_whitespace().next(), key),
        }
    };
    let integer = |key: &'static str| -> Result<i32> { origin.decimal(text_of(key), key) };
    let capabilities = |key: &'static str| origin.hex(text_of(key), key);
    let list = |key: &'static str| -> Result<Vec<i32>> {
        text_of(key)
            .unwrap_or_default()
            .split_ascii_whitespace()
            .map(|word| origin.decimal(Some(word), key))
            .collect()
    };
    let four = |key: &'static str| -> Result<[u32; 4]> {
        let ids: Vec<u32> = text_of(key)
            .unwrap_or_default()
            .split_ascii_whitespace()
            .map(|word| origin.decimal(Some(word), key))
            .collect::<Result<_>>()?;
        ids.try_into().map_err(|_| origin.malformed(key))
    };
    let small = |key: &'static str| -> Result<u32> {
        u32::try_from(optional(key)?).map_err(|_| origin.malformed(key))
    };
    Ok(Status {
        name: unescape_name(text_of("Name").ok_or_else(|| origin.malformed("Name"))?),
        state: text_of("State")
            .and_then(|text| text.chars().next())
            .ok_or_else(|| origin.malformed("State"))?,
        tgid: integer("Tgid")?,
        ppid: integer("PPid")?,
        tracer_pid: integer("TracerPid")?,
        uid: four("Uid")?,
        gid: four("Gid")?,
        groups: text_of("Groups")
            .ok_or_else(|| origin.malformed("Groups"))?
            .split_ascii_whitespace()
            .map(|word| origin.decimal(Some(word), "Groups"))
            .collect::<Result<_>>()?,
        ns_pid: list("NSpid")?,
        ns_pgid: list("NSpgid")?,
        ns_sid: list("NSsid")?,
        threads: small("Threads")?,
        cap_inh: capabilities("CapInh")?,
        cap_prm: capabilities("CapPrm")?,
        cap_eff: capabilities("CapEff")?,
        cap_bnd: capabilities("CapBnd")?,
        cap_amb: capabilities("CapAmb")?,
        no_new_privs: integer("NoNewPrivs")? != 0,
        seccomp: small("Seccomp")?,
        seccomp_filters: small("Seccomp_filters")?,
        umask: match text_of("Umask") {
            // A zombie has no file-system state any more.
            None => 0,
            Some(text) => u32::from_str_radix(text, 8).map_err(|_| origin.malformed("Umask"))?,
        },
        sig_pnd: capabilities("SigPnd")?,
        shd_pnd: capabilities("ShdPnd")?,
        sig_blk: capabilities("SigBlk")?,
        sig_ign: capabilities("SigIgn")?,
        sig_cgt: capabilities("SigCgt")?,
        vm_pin_kib: optional("VmPin")?,
        vm_lck_kib: optional("VmLck")?,
        vm_rss_kib: optional("VmRSS")?,
        rss_anon_kib: optional("RssAnon")?,
        rss_shmem_kib: optional("RssShmem")?,
        vm_swap_kib: optional("VmSwap")?,
        hugetlb_kib: optional("HugetlbPages")?,
        thp_enabled: text_of("THP_enabled") != Some("0"),
        core_dumping: optional("CoreDumping")? != 0,
        cpus_allowed: parse_mask(text_of("Cpus_allowed"))
            .ok_or_else(|| origin.malformed("Cpus_allowed"))?,
        mems_allowed: match text_of("Mems_allowed") {
            None => Vec::new(),
            some => parse_mask(some).ok_or_else(|| origin.malformed("Mems_allowed"))?,
        },
        voluntary_switches: optional("voluntary_ctxt_switches")?,
        involuntary_switches: optional("nonvoluntary_ctxt_switches")?,
        x86_thread_features: text_of("x86_Thread_features")
            .unwrap_or_default()
            .to_owned(),
        x86_thread_features_locked: text_of("x86_Thread_features_locked")
            .unwrap_or_default()
            .to_owned(),
        speculation_store_bypass: text_of("Speculation_Store_Bypass")
            .unwrap_or_default()
            .to_owned(),
        speculation_indirect_branch: text_of("SpeculationIndirectBranch")
            .unwrap_or_default()
            .to_owned(),
    })
}

/// Undoes the escapes of the `Name:` line: `\n` and `\\`.
fn unescape_name(text: &str) -> String {
    let mut name = String::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(character) = rest.next() {
        match character {
            '\\' => match rest.next() {
                Some('n') => name.push('\n'),
                Some(other) => name.push(other),
                None => name.push('\\'),
            },
            other => name.push(other),
        }
    }
    name
}

/// `00000000,00000003`, groups of 32 bits with the highest first, as little-endian bytes.
fn parse_mask(text: Option<&str>) -> Option<Vec<u8>> {
    let mut mask = Vec::new();
    for group in text?.rsplit(',') {
        mask.extend(u32::from_str_radix(group, 16).ok()?.to_le_bytes());
    }
    Some(mask)
}

// ---------------------------------------------------------------------------------------------------------------------
// stat

/// The fields of `/proc/<pid>/task/<tid>/stat` that are nowhere else.
///
/// Addresses are 0 for a reader that may not trace the process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stat {
    /// Scheduler state letter. A zombie is `Z`, which is all that its other files tell of it.
    pub state: char,
    /// Parent process.
    pub ppid: i32,
    /// Process group.
    pub pgrp: i32,
    /// Session.
    pub session: i32,
    /// Controlling terminal's device number; 0 = none.
    pub tty_nr: i32,
    /// Kernel `PF_*` flags.
    pub flags: u32,
    /// Clock ticks in user mode.
    pub utime: u64,
    /// Clock ticks in the kernel.
    pub stime: u64,
    /// Number of threads.
    pub num_threads: u32,
    /// Start time in clock ticks since boot.
    pub start_time_ticks: u64,
    /// First byte of text.
    pub start_code: u64,
    /// End of text.
    pub end_code: u64,
    /// Bottom of the initial stack.
    pub start_stack: u64,
    /// Signal the parent gets at exit. Not `SIGCHLD` after an odd `clone(2)`.
    pub exit_signal: i32,
    /// Start of initialised data.
    pub start_data: u64,
    /// End of data.
    pub end_data: u64,
    /// Start of the heap.
    pub start_brk: u64,
    /// Start of the arguments.
    pub arg_start: u64,
    /// End of the arguments.
    pub arg_end: u64,
    /// Start of the environment.
    pub env_start: u64,
    /// End of the environment.
    pub env_end: u64,
    /// Wait status of a zombie; 0 for a reader that may not trace it.
    pub exit_code: u32,
}

/// Reads the stat line of one thread.
///
/// # Errors
/// [`Error::Gone`], [`Error::Malformed`].
pub fn stat(pid: i32, tid: i32) -> Result<Stat> {
    let path = format!("/proc/{pid}/task/{tid}/stat");
    parse_stat(&read_text(tid, &path)?, &path)
}

fn parse_stat(text: &str, path: &str) -> Result<Stat> {
    let origin = Origin(path);
    // The name may hold spaces and parentheses; nothing after it does.
    let (_, rest) = text
        .rsplit_once(')')
        .ok_or_else(|| origin.malformed("name"))?;
    let words: Vec<&str> = rest.split_ascii_whitespace().collect();
    // proc(5) numbers the fields from 1 and `state`, the first after the name, is number 3.
    let field = |number: usize| words.get(number - 3).copied();
    Ok(Stat {
        state: field(3)
            .and_then(|text| text.chars().next())
            .ok_or_else(|| origin.malformed("state"))?,
        ppid: origin.decimal(field(4), "ppid")?,
        pgrp: origin.decimal(field(5), "pgrp")?,
        session: origin.decimal(field(6), "session")?,
        tty_nr: origin.decimal(field(7), "tty_nr")?,
        flags: origin.decimal(field(9), "flags")?,
        utime: origin.decimal(field(14), "utime")?,
        stime: origin.decimal(field(15), "stime")?,
        num_threads: origin.decimal(field(20), "num_threads")?,
        start_time_ticks: origin.decimal(field(22), "starttime")?,
        start_code: origin.decimal(field(26), "startcode")?,
        end_code: origin.decimal(field(27), "endcode")?,
        start_stack: origin.decimal(field(28), "startstack")?,
        exit_signal: origin.decimal(field(38), "exit_signal")?,
        start_data: origin.decimal(field(45), "start_data")?,
        end_data: origin.decimal(field(46), "end_data")?,
        start_brk: origin.decimal(field(47), "start_brk")?,
        arg_start: origin.decimal(field(48), "arg_start")?,
        arg_end: origin.decimal(field(49), "arg_end")?,
        env_start: origin.decimal(field(50), "env_start")?,
        env_end: origin.decimal(field(51), "env_end")?,
        exit_code: origin.decimal(field(52), "exit_code")?,
    })
}

// ---------------------------------------------------------------------------------------------------------------------
// Mappings

/// The two-letter flags of a `VmFlags:` line.
///
/// The ones that matter to a migration: `gd` grows down, `lo` locked, `dc` not copied on fork, `dd` not dumped, `wf` wiped on
/// fork, `hg`/`nh` transparent huge pages wanted/unwanted, `mg` mergeable (KSM), `sr`/`rr` sequential/random advice, `nr` no swap
/// reserved, `um`/`uw`/`ui` userfaultfd missing/write-protect/minor, `ht` hugetlb, `io`/`pf` device memory, `ss` shadow stack,
/// `sl` sealed, `mw` may be made writable, `sh` shared, `gu` guard regions were installed somewhere in it.
///
/// `gu` (seen on 6.18) is set on the whole mapping by the first `MADV_GUARD_INSTALL`, stays after `MADV_GUARD_REMOVE` and
/// spreads to neighbours that merge with it;
/// which pages are guards only the page map tells ([`crate::pagemap::GUARD`]). Before 6.18 it is missing, so its absence
/// proves nothing there. `MLOCK_ONFAULT` shows as `lf` on 6.18 and `lo` stands beside it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmFlags(Vec<[u8; 2]>);

impl VmFlags {
    /// Whether the flag of this name is set.
    pub fn has(&self, flag: &str) -> bool {
        self.0.iter().any(|known| known == flag.as_bytes())
    }

    /// All flags, in the kernel's order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0
            .iter()
            .map(|flag| std::str::from_utf8(flag).unwrap_or("??"))
    }

    /// Whether nothing is known: the mapping came from `maps`, not from `smaps`.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// One mapping of an address space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// One past the last address.
    pub end: u64,
    /// Readable.
    pub read: bool,
    /// Writable.
    pub write: bool,
    /// Executable.
    pub exec: bool,
    /// `MAP_SHARED`. A shared mapping of a file that was never writable shows as shared too.
    pub shared: bool,
    /// Offset in the file, bytes.
    pub offset: u64,
    /// Device as `makedev(3)` encodes it; 0 for private anonymous memory.
    pub device: u64,
    /// Inode; 0 for private anonymous memory.
    pub inode: u64,
    /// What is mapped: empty, `[heap]`, `[vdso]`, `/lib/…`, with ` (deleted)` kept. The kernel writes a line feed in a name as
    /// `\012` and a backslash as itself, so a name that holds a literal `\012` reads as one with a line feed.
    pub path: String,
    /// Name given by `PR_SET_VMA_ANON_NAME`. The path is then what it would be without a name.
    pub name: Option<String>,
    /// Flags. Only from [`smaps`].
    pub flags: VmFlags,
    /// Page size in bytes, larger than 4096 for hugetlb. Only from [`smaps`], else 0.
    pub page_bytes: u64,
    /// Resident bytes. Only from [`smaps`].
    pub resident_bytes: u64,
    /// Resident bytes that belong to no file: anonymous and copied-on-write pages. Only from [`smaps`].
    pub anonymous_bytes: u64,
    /// Bytes in swap. Only from [`smaps`].
    pub swapped_bytes: u64,
    /// Memory protection key. Only from [`smaps`].
    pub protection_key: u32,
}

impl Vma {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// A mapping is never empty; this is for symmetry with [`Vma::len`].
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }
}

/// The mappings of a process, ascending.
///
/// # Errors
/// [`Error::Gone`], [`Error::Malformed`].
pub fn maps(pid: i32) -> Result<Vec<Vma>> {
    let path = format!("/proc/{pid}/maps");
    parse_maps(&read_text(pid, &path)?, &path)
}

/// The mappings of a process with their flags and usage. Walks the page tables: tens of milliseconds for gigabytes, so it
/// belongs before a freeze, not inside it.
///
/// # Errors
/// [`Error::Gone`], [`Error::Malformed`].
pub fn smaps(pid: i32) -> Result<Vec<Vma>> {
    let path = format!("/proc/{pid}/smaps");
    parse_maps(&read_text(pid, &path)?, &path)
}

fn parse_maps(text: &str, path: &str) -> Result<Vec<Vma>> {
    let origin = Origin(path);
    let mut found: Vec<Vma> = Vec::new();
    for line in text.lines() {
        // `Rss:  4 kB` below a header line; a header line's first word is a range and never ends in a colon.
        let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
        let Some(key) = first.strip_suffix(':') else {
            found.push(parse_vma(line, &origin)?);
            continue;
        };
        let vma = found
            .last_mut()
            .ok_or_else(|| origin.malformed("detail before a mapping"))?;
        let mut words = rest.split_ascii_whitespace();
        let mut kib = |what| -> Result<u64> {
            let kib: u64 = origin.decimal(words.next(), what)?;
            Ok(kib * 1024)
        };
        match key {
            "KernelPageSize" => vma.page_bytes = kib("KernelPageSize")?,
            "Rss" => vma.resident_bytes = kib("Rss")?,
            "Anonymous" => vma.anonymous_bytes = kib("Anonymous")?,
            "Swap" => vma.swapped_bytes = kib("Swap")?,
            "ProtectionKey" => {
                vma.protection_key = origin.decimal(words.next(), "ProtectionKey")?;
            }
            "VmFlags" => {
                vma.flags = VmFlags(
                    words
                        .map(|word| word.as_bytes().try_into())
                        .collect::<std::result::Result<_, _>>()
                        .map_err(|_| origin.malformed("VmFlags"))?,
                );
            }
            _ => {}
        }
    }
    Ok(found)
}

fn parse_vma(line: &str, origin: &Origin<'_>) -> Result<Vma> {
    let mut words = line.splitn(6, ' ');
    let (start, end) = words
        .next()
        .and_then(|range| range.split_once('-'))
        .ok_or_else(|| origin.malformed("address range"))?;
    let permissions = words.next().unwrap_or_default().as_bytes();
    let &[read, write, exec, shared] = permissions else {
        return Err(origin.malformed("permissions"));
    };
    let offset = origin.hex(words.next(), "offset")?;
    let (major, minor) = words
        .next()
        .and_then(|device| device.split_once(':'))
        .ok_or_else(|| origin.malformed("device"))?;
    let device = nix::sys::stat::makedev(
        origin.hex(Some(major), "device")?,
        origin.hex(Some(minor), "device")?,
    );
    let inode = origin.decimal(words.next(), "inode")?;
    let mapped = words.next().unwrap_or_default().trim_start_matches(' ');
    let bracketed = |prefix: &str| {
        mapped
            .strip_prefix(prefix)
            .and_then(|rest| rest.strip_suffix(']'))
            .map(str::to_owned)
    };
    let (path, name) = if let Some(name) = bracketed("[anon:") {
        (String::new(), Some(name))
    } else if let Some(name) = bracketed("[anon_shmem:") {
        ("/dev/zero (deleted)".to_owned(), Some(name))
    } else {
        (mapped.replace("\\012", "\n"), None)
    };
    Ok(Vma {
        start: origin.hex(Some(start), "start address")?,
        end: origin.hex(Some(end), "end address")?,
        read: read == b'r',
        write: write == b'w',
        exec: exec == b'x',
        shared: shared == b's',
        offset,
        device,
        inode,
        path,
        name,
        ..Vma::default()
    })
}

// ---------------------------------------------------------------------------------------------------------------------
// Descriptors

/// One row of a descriptor table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DescriptorEntry {
    /// Descriptor number.
    pub fd: u32,
    /// What it refers to: `/path`, `/path (deleted)`, `pipe:[7]`, `socket:[7]`, `anon_inode:[eventfd]`.
    pub link: String,
    /// What `fdinfo` tells.
    pub info: FdInfo,
}

impl DescriptorEntry {
    /// The inode of a `pipe:[n]` or `socket:[n]`.
    pub fn pipe_or_socket_inode(&self) -> Option<u64> {
        pipe_or_socket_inode(&self.link)
    }
}

/// `/proc/<pid>/fdinfo/<fd>`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FdInfo {
    /// File position.
    pub position: u64,
    /// `F_GETFL` flags, with `O_CLOEXEC` when the descriptor has it.
    pub flags: u32,
    /// Mount it was opened through.
    pub mnt_id: i32,
    /// Inode (5.14; 0 when the kernel does not say).
    pub ino: u64,
    /// Of an eventfd.
    pub eventfd: Option<EventfdInfo>,
    /// Of an epoll instance: what it watches.
    pub epoll: Vec<EpollItem>,
    /// Of a timerfd.
    pub timerfd: Option<TimerfdInfo>,
    /// Of a signalfd: its mask, bit n-1 for signal n.
    pub signalfd_mask: Option<u64>,
    /// Has inotify watches.
    pub inotify: bool,
    /// Has fanotify lines.
    pub fanotify: bool,
    /// Record locks, leases and `flock`s held through it, as the kernel's lines without `lock:`.
    pub locks: Vec<String>,
    /// Of a UNIX socket: descriptors in flight in its receive queue (5.11).
    pub scm_fds: Option<u32>,
    /// Of a pidfd: the process; -1 when it has been reaped.
    pub pidfd: Option<i32>,
}

impl FdInfo {
    /// Whether `execve(2)` would close it.
    pub fn close_on_exec(&self) -> bool {
        self.flags & libc::O_CLOEXEC as u32 != 0
    }
}

/// An eventfd's state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventfdInfo {
    /// Counter.
    pub count: u64,
    /// `EFD_SEMAPHORE` (6.5; before that the kernel does not say and this is `None`).
    pub semaphore: Option<bool>,
    /// Number of the eventfd on this host (5.2; -1 when the kernel does not say): the same for every descriptor of it.
    pub id: i64,
}

/// One watch of an epoll instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpollItem {
    /// Number under which the file was added. The descriptor may have been closed or replaced since:
    /// [`crate::descriptor::epoll_watches`] tells.
    pub fd: u32,
    /// `EPOLL*` events. A one-shot watch that has fired shows only its flag bits.
    pub events: u32,
    /// The program's data.
    pub data: u64,
    /// File position of the watched file.
    pub pos: i64,
    /// Inode of the watched file.
    pub ino: u64,
    /// Device of the watched file, in `makedev(3)` encoding.
    pub device: u64,
}

/// A timerfd's state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimerfdInfo {
    /// Clock.
    pub clock: i32,
    /// Expirations not yet read.
    pub ticks: u64,
    /// `TFD_TIMER_*` flags it was armed with.
    pub settime_flags: u32,
    /// Nanoseconds left, also for an absolute timer; 0 = disarmed.
    pub value_ns: u64,
    /// Interval in nanoseconds; 0 = one shot.
    pub interval_ns: u64,
}

/// The descriptors of a process (of its leader's table), ascending.
///
/// # Errors
/// [`Error::Gone`], [`Error::Malformed`].
pub fn descriptors(pid: i32) -> Result<Vec<DescriptorEntry>> {
    let mut found = Vec::new();
    for fd in numbers::<u32>(pid, &format!("/proc/{pid}/fd"))? {
        match descriptor(pid, fd) {
            Ok(entry) => found.push(entry),
            // Closed since the directory was read.
            Err(Error::Path {
                errno: Errno::ENOENT,
                ..
            }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// One descriptor of a process.
///
/// # Errors
/// [`Error::Path`] with `ENOENT` for a number that is not open; as [`descriptors`] else.
pub fn descriptor(pid: i32, fd: u32) -> Result<DescriptorEntry> {
    let link = read_link(pid, &format!("/proc/{pid}/fd/{fd}"))?;
    let path = format!("/proc/{pid}/fdinfo/{fd}");
    let info = parse_fdinfo(&read_text(pid, &path)?, &path)?;
    Ok(DescriptorEntry { fd, link, info })
}

/// What the kernel tells of a descriptor of ours, of this thread's table.
pub(crate) fn own_descriptor(fd: BorrowedFd<'_>) -> Result<FdInfo> {
    let path = format!("/proc/thread-self/fdinfo/{}", fd.as_raw_fd());
    parse_fdinfo(&read_text(own_pid(), &path)?, &path)
}

/// Major and minor number of the device of a mount, as mountinfo names it; `None` if no such mount is seen from here.
pub(crate) fn mounted_device(mnt_id: i32) -> Result<Option<(u64, u64)>> {
    const PATH: &str = "/proc/thread-self/mountinfo";
    let text = read_text(own_pid(), PATH)?;
    Ok(parse_mounted_device(&text, mnt_id))
}

/// Lines are `ID PARENT MAJOR:MINOR …`.
fn parse_mounted_device(text: &str, mnt_id: i32) -> Option<(u64, u64)> {
    let mut lines = text.lines().map(|line| line.split(' '));
    let mut fields = lines.find_map(|mut fields| {
        let is_it = fields.next()?.parse() == Ok(mnt_id);
        is_it.then_some(fields)
    })?;
    let (major, minor) = fields.nth(1)?.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn parse_fdinfo(text: &str, path: &str) -> Result<FdInfo> {
    let origin = Origin(path);
    let mut info = FdInfo::default();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else {
            // `inotify wd:…` and `fanotify …` have their first colon further on; nothing else is without one.
            continue;
        };
        let value = value.trim();
        match key {
            "pos" => info.position = parse_position(value, &origin)?,
            "flags" => {
                let flags = origin.radix(Some(value), 8, "flags")?;
                info.flags = u32::try_from(flags).map_err(|_| origin.malformed("flags"))?;
            }
            "mnt_id" => info.mnt_id = origin.decimal(Some(value), "mnt_id")?,
            "ino" => info.ino = origin.decimal(Some(value), "ino")?,
            "eventfd-count" => {
                let eventfd = info.eventfd.get_or_insert(EventfdInfo {
                    id: -1,
                    ..EventfdInfo::default()
                });
                eventfd.count = origin.hex(Some(value), "eventfd-count")?;
            }
            "eventfd-id" => {
                let id = origin.decimal(Some(value), "eventfd-id")?;
                info.eventfd.get_or_insert_default().id = id;
            }
            "eventfd-semaphore" => {
                info.eventfd.get_or_insert_default().semaphore = Some(value != "0");
            }
            "tfd" => info.epoll.push(parse_epoll_item(value, &origin)?),
            "clockid" => {
                info.timerfd.get_or_insert_default().clock =
                    origin.decimal(Some(value), "clockid")?;
            }
            "ticks" => {
                info.timerfd.get_or_insert_default().ticks =
                    origin.decimal(Some(value), "ticks")?;
            }
            "settime flags" => {
                let flags = origin.radix(Some(value), 8, "settime flags")?;
                info.timerfd.get_or_insert_default().settime_flags =
                    u32::try_from(flags).map_err(|_| origin.malformed("settime flags"))?;
            }
            "it_value" => {
                info.timerfd.get_or_insert_default().value_ns = parse_timespec(value, &origin)?;
            }
            "it_interval" => {
                info.timerfd.get_or_insert_default().interval_ns = parse_timespec(value, &origin)?;
            }
            "sigmask" => info.signalfd_mask = Some(origin.hex(Some(value), "sigmask")?),
            "lock" => info.locks.push(value.to_owned()),
            "scm_fds" => info.scm_fds = Some(origin.decimal(Some(value), "scm_fds")?),
            "Pid" => info.pidfd = Some(origin.decimal(Some(value), "Pid")?),
            _ if key.starts_with("inotify ") => info.inotify = true,
            _ if key.starts_with("fanotify ") => info.fanotify = true,
            _ => {}
        }
    }
    Ok(info)
}

/// Positions are signed: memory devices have ones above 2^63.
fn parse_position(text: &str, origin: &Origin<'_>) -> Result<u64> {
    let position: i64 = origin.decimal(Some(text), "pos")?;
    Ok(position as u64)
}

/// `       3 events:       1d data:                3  pos:0 ino:414 sdev:10`
fn parse_epoll_item(text: &str, origin: &Origin<'_>) -> Result<EpollItem> {
    let spaced = text.replace(':', " ");
    let words: Vec<&str> = spaced.split_ascii_whitespace().collect();
    let after = |key: &str| {
        let at = words.iter().position(|&word| word == key)?;
        words.get(at + 1).copied()
    };
    // The kernel's own device numbers keep the minor in the low 20 bits.
    let device = origin.hex(after("sdev").or(Some("0")), "sdev")?;
    Ok(EpollItem {
        fd: origin.decimal(words.first().copied(), "tfd")?,
        events: origin.hex_u32(after("events"), "events")?,
        data: origin.hex(after("data"), "data")?,
        pos: origin.decimal(after("pos").or(Some("0")), "pos")?,
        ino: origin.hex(after("ino").or(Some("0")), "ino")?,
        device: nix::sys::stat::makedev(device >> 20, device & 0xf_ffff),
    })
}

/// `(9, 999204432)` in nanoseconds.
fn parse_timespec(text: &str, origin: &Origin<'_>) -> Result<u64> {
    let (seconds, nanoseconds) = text
        .strip_prefix('(')
        .and_then(|text| text.strip_suffix(')'))
        .and_then(|text| text.split_once(','))
        .ok_or_else(|| origin.malformed("time"))?;
    let seconds: u64 = origin.decimal(Some(seconds.trim()), "seconds")?;
    let nanoseconds: u64 = origin.decimal(Some(nanoseconds.trim()), "nanoseconds")?;
    Ok(seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(nanoseconds))
}

fn pipe_or_socket_inode(link: &str) -> Option<u64> {
    link.strip_prefix("pipe:[")
        .or_else(|| link.strip_prefix("socket:["))?
        .strip_suffix(']')?
        .parse()
        .ok()
}

/// Which processes of this pid namespace have a descriptor of the pipes and sockets with these inodes.
///
/// One pass over `/proc/*/fd`, whatever the number of inodes; it counts once at the choke point, because the number of
/// processes on a host is no property of the migrated one. Descriptors in flight in a socket, and tables that a thread does
/// not share with its process, are not seen. Processes that end meanwhile are left out.
///
/// # Errors
/// [`Error::Path`] when `/proc` cannot be listed, or when a process may not be looked at.
pub fn pipe_or_socket_holders(inodes: &BTreeSet<u64>) -> Result<BTreeMap<u64, BTreeSet<i32>>> {
    choke::pass(Kind::Proc).map_err(|errno| Error::path("list", "/proc", errno))?;
    holders(inodes, |_, link| {
        link.to_str().and_then(pipe_or_socket_inode)
    })
}

/// Which processes of this pid namespace have a descriptor of the named pipes with these devices and inodes.
///
/// As [`pipe_or_socket_holders`]; it looks at every open file with a path, and only when there are named pipes to look for.
///
/// # Errors
/// As [`pipe_or_socket_holders`].
pub fn fifo_holders(fifos: &BTreeSet<(u64, u64)>) -> Result<BTreeMap<(u64, u64), BTreeSet<i32>>> {
    choke::pass(Kind::Proc).map_err(|errno| Error::path("list", "/proc", errno))?;
    holders(fifos, |path, link| {
        if !link.has_root() {
            return None;
        }
        let found = std::fs::metadata(path).ok()?;
        found
            .file_type()
            .is_fifo()
            .then(|| (found.dev(), found.ino()))
    })
}

/// Who has which of `wanted`, told by the path of a descriptor and what it links to.
fn holders<K: Ord>(
    wanted: &BTreeSet<K>,
    key: impl Fn(&Path, &Path) -> Option<K>,
) -> Result<BTreeMap<K, BTreeSet<i32>>> {
    let mut holders: BTreeMap<K, BTreeSet<i32>> = BTreeMap::new();
    if wanted.is_empty() {
        return Ok(holders);
    }
    let pids: Vec<i32> =
        list_numbers("/proc").map_err(|error| failed("list", 0, "/proc", &error))?;
    for pid in pids {
        let table = format!("/proc/{pid}/fd");
        let entries = match std::fs::read_dir(&table) {
            Ok(entries) => entries,
            Err(error) => match failed("list", pid, &table, &error) {
                Error::Gone { .. } => continue,
                error => return Err(error),
            },
        };
        for entry in entries {
            // A process that ends while its table is listed answers with an error in the middle of it.
            let Ok(entry) = entry else { break };
            let Ok(link) = std::fs::read_link(entry.path()) else {
                continue;
            };
            if let Some(found) = key(&entry.path(), &link).filter(|found| wanted.contains(found)) {
                holders.entry(found).or_default().insert(pid);
            }
        }
    }
    Ok(holders)
}

/// What tells a file from all others of this host: device as `makedev(3)` encodes it, and inode.
pub type FileKey = (u64, u64);

/// Which processes of this pid namespace map the files with these keys, or have a descriptor of one. As [`pipe_or_socket_holders`],
/// over `/proc/*/maps` and `/proc/*/fdinfo`; processes that may not be looked at are left out.
///
/// # Errors
/// [`Error::Path`] when `/proc` cannot be listed.
pub fn file_holders(keys: &BTreeSet<FileKey>) -> Result<BTreeMap<FileKey, BTreeSet<i32>>> {
    let mut holders: BTreeMap<FileKey, BTreeSet<i32>> = BTreeMap::new();
    if keys.is_empty() {
        return Ok(holders);
    }
    choke::pass(Kind::Proc).map_err(|errno| Error::path("list", "/proc", errno))?;
    let pids: Vec<i32> =
        list_numbers("/proc").map_err(|error| failed("list", 0, "/proc", &error))?;
    for pid in pids {
        // One that has ended, or that nobody may look at, such as process 1 of some containers.
        let Ok(text) = std::fs::read(format!("/proc/{pid}/maps")) else {
            continue;
        };
        for key in String::from_utf8_lossy(&text)
            .lines()
            .filter_map(mapped_key)
        {
            if keys.contains(&key) {
                holders.entry(key).or_default().insert(pid);
            }
        }
        let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        for entry in entries {
            let Ok(entry) = entry else { break };
            let fd = entry.file_name();
            let info = format!("/proc/{pid}/fdinfo/{}", fd.to_string_lossy());
            let inode = std::fs::read_to_string(info).ok().and_then(|text| {
                let line = text.lines().find_map(|line| line.strip_prefix("ino:"));
                line?.trim().parse::<u64>().ok()
            });
            // Only those are looked at: to look at a file of a network file system may take for ever.
            if !inode.is_some_and(|inode| keys.iter().any(|key| key.1 == inode)) {
                continue;
            }
            if let Ok(found) = std::fs::metadata(entry.path()) {
                let key = (found.dev(), found.ino());
                if keys.contains(&key) {
                    holders.entry(key).or_default().insert(pid);
                }
            }
        }
    }
    Ok(holders)
}

/// Device and inode of a line of `maps`: `7f00-7f01 rw-s 00000000 00:01 1036  /dev/zero (deleted)`.
fn mapped_key(line: &str) -> Option<FileKey> {
    let mut fields = line.split_ascii_whitespace().skip(3);
    let (device, inode) = (fields.next()?, fields.next()?);
    // The inode of a System V segment is its number, which a file of the same device may have, too.
    let name = [fields.next().unwrap_or(""), fields.next().unwrap_or("")].join(" ");
    if crate::sysv::is_name(&name) {
        return None;
    }
    let (major, minor) = device.split_once(':')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    let device = nix::sys::stat::makedev(number(major)?, number(minor)?);
    Some((device, inode.parse().ok()?))
}

// ---------------------------------------------------------------------------------------------------------------------
// Limits and timers

/// Soft and hard resource limits, indexed by `RLIMIT_*`; `u64::MAX` is infinity.
///
/// # Errors
/// [`Error::Gone`], [`Error::Malformed`].
pub fn limits(pid: i32) -> Result<[(u64, u64); LIMIT_COUNT]> {
    let path = format!("/proc/{pid}/limits");
    parse_limits(&read_text(pid, &path)?, &path)
}

fn parse_limits(text: &str, path: &str) -> Result<[(u64, u64); LIMIT_COUNT]> {
    /// Width of the name column, which holds spaces (`fs/proc/base.c`, `%-25s `).
    const NAME_WIDTH: usize = 26;
    let origin = Origin(path);
    let value = |word: Option<&str>| match word {
        Some("unlimited") => Ok(u64::MAX),
        word => origin.decimal(word, "limit"),
    };
    let mut limits = [(0, 0); LIMIT_COUNT];
    // Below the heading there is one line for every limit, in RLIMIT_* order.
    let mut lines = text.lines().skip(1);
    for limit in &mut limits {
        let mut words = lines
            .next()
            .and_then(|line| line.get(NAME_WIDTH..))
            .ok_or_else(|| origin.malformed("limit"))?
            .split_ascii_whitespace();
        *limit = (value(words.next())?, value(words.next())?);
    }
    Ok(limits)
}

/// One POSIX timer, without its times: those only the process itself can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PosixTimer {
    /// Timer id.
    pub id: u32,
    /// Signal number.
    pub signo: u32,
    /// `sigev_value`.
    pub value: u64,
    /// `SIGEV_SIGNAL` 0, `SIGEV_NONE` 1, `SIGEV_THREAD` 2, with `SIGEV_THREAD_ID` 4 as a further bit.
    pub notify: u32,
    /// Process, or with `SIGEV_THREAD_ID` the thread, that is told. 0 when it has ended.
    pub target: i32,
    /// Clock id as the program gave it: may be negative for CPU-time clocks of a thread or process.
    pub clock: i32,
}

/// POSIX timers of a process, in the kernel's order.
///
/// # Errors
/// [`Error::Gone`], [`Error::Malformed`].
pub fn posix_timers(pid: i32) -> Result<Vec<PosixTimer>> {
    let path = format!("/proc/{pid}/timers");
    parse_timers(&read_text(pid, &path)?, &path)
}

fn parse_timers(text: &str, path: &str) -> Result<Vec<PosixTimer>> {
    let origin = Origin(path);
    let mut lines = text
        .lines()
        .map(|line| line.split_once(':').unwrap_or((line, "")));
    let mut found = Vec::new();
    while let Some((key, id)) = lines.next() {
        if key != "ID" {
            return Err(origin.malformed("ID"));
        }
        let mut expect = |wanted: &'static str| match lines.next() {
            Some((key, value)) if key == wanted => Ok(value.trim()),
            _ => Err(origin.malformed(wanted)),
        };
        let (signo, value) = expect("signal")?
            .split_once('/')
            .ok_or_else(|| origin.malformed("signal"))?;
        let (how, whom) = expect("notify")?
            .split_once('/')
            .ok_or_else(|| origin.malformed("notify"))?;
        let how = match how {
            "signal" => 0,
            "none" => 1,
            "thread" => 2,
            _ => return Err(origin.malformed("notify")),
        };
        let (thread, target) = match whom.split_once('.') {
            Some(("pid", target)) => (0, target),
            Some(("tid", target)) => (4, target),
            _ => return Err(origin.malformed("notify")),
        };
        let clock = expect("ClockID")?;
        found.push(PosixTimer {
            id: origin.decimal(Some(id.trim()), "ID")?,
            signo: origin.decimal(Some(signo), "signal")?,
            value: origin.hex(Some(value), "signal value")?,
            notify: how | thread,
            target: origin.decimal(Some(target), "notify")?,
            clock: origin.decimal(Some(clock), "ClockID")?,
        });
    }
    Ok(found)
}

// ---------------------------------------------------------------------------------------------------------------------
// Small files

/// The auxiliary vector as the program got it.
///
/// # Errors
/// [`Error::Gone`].
pub fn auxv(pid: i32) -> Result<Vec<u8>> {
    read(pid, &format!("/proc/{pid}/auxv"))
}

/// Working directory, with ` (deleted)` when it is.
///
/// # Errors
/// [`Error::Gone`]; also for a zombie.
pub fn cwd(pid: i32) -> Result<String> {
    read_link(pid, &format!("/proc/{pid}/cwd"))
}

/// Executable, with ` (deleted)` when it is.
///
/// # Errors
/// [`Error::Gone`]; [`Error::Path`] for a kernel thread or zombie.
pub fn exe(pid: i32) -> Result<String> {
    read_link(pid, &format!("/proc/{pid}/exe"))
}

/// Root directory.
///
/// # Errors
/// [`Error::Gone`]; also for a zombie.
pub fn root(pid: i32) -> Result<String> {
    read_link(pid, &format!("/proc/{pid}/root"))
}

/// Control groups, one `hierarchy:controllers:path` a line as `cgroups(7)` tells it.
///
/// # Errors
/// [`Error::Gone`].
pub fn cgroups(pid: i32) -> Result<Vec<String>> {
    let text = read_text(pid, &format!("/proc/{pid}/cgroup"))?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// The inodes of a process' namespaces: equal numbers on one host are the same namespace. 0 when the kernel has no such kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// Process ids.
    pub pid: u64,
    /// Process ids of its future children.
    pub pid_for_children: u64,
    /// Network.
    pub net: u64,
    /// Mounts.
    pub mnt: u64,
    /// Host name.
    pub uts: u64,
    /// System V IPC and message queues.
    pub ipc: u64,
    /// Clocks.
    pub time: u64,
    /// Clocks of its future children.
    pub time_for_children: u64,
    /// User ids.
    pub user: u64,
    /// Control groups.
    pub cgroup: u64,
}

/// Namespaces of a process.
///
/// # Errors
/// [`Error::Gone`], [`Error::Malformed`].
pub fn namespaces(pid: i32) -> Result<Namespaces> {
    let inode = |kind: &str| -> Result<u64> {
        let path = format!("/proc/{pid}/ns/{kind}");
        let link = match read_link(pid, &path) {
            Ok(link) => link,
            // A kernel without this kind has no such file, and `pid_for_children` has no answer before the first child of a
            // new pid namespace.
            Err(Error::Path {
                errno: Errno::ENOENT,
                ..
            }) => return Ok(0),
            Err(error) => return Err(error),
        };
        let number = link
            .split_once(":[")
            .and_then(|(_, number)| number.strip_suffix(']'));
        Origin(&path).decimal(number, "namespace")
    };
    Ok(Namespaces {
        pid: inode("pid")?,
        pid_for_children: inode("pid_for_children")?,
        net: inode("net")?,
        mnt: inode("mnt")?,
        uts: inode("uts")?,
        ipc: inode("ipc")?,
        time: inode("time")?,
        time_for_children: inode("time_for_children")?,
        user: inode("user")?,
        cgroup: inode("cgroup")?,
    })
}

/// Offsets, in nanoseconds, that the time namespace *for the children* of a process adds to the host's CLOCK_MONOTONIC and
/// CLOCK_BOOTTIME. Both 0 on a kernel without time namespaces.
///
/// # Errors
/// [`Error::Gone`], [`Error::Malformed`].
pub fn timens_offsets(pid: i32) -> Result<(i64, i64)> {
    let path = format!("/proc/{pid}/timens_offsets");
    let text = match read_text(pid, &path) {
        Ok(text) => text,
        Err(Error::Path {
            errno: Errno::ENOENT,
            ..
        }) => return Ok((0, 0)),
        Err(error) => return Err(error),
    };
    parse_timens_offsets(&text, &path)
}

fn parse_timens_offsets(text: &str, path: &str) -> Result<(i64, i64)> {
    let origin = Origin(path);
    let mut offsets = (0, 0);
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let clock = words.next();
        let seconds: i64 = origin.decimal(words.next(), "seconds")?;
        let nanoseconds: i64 = origin.decimal(words.next(), "nanoseconds")?;
        let offset = seconds
            .checked_mul(1_000_000_000)
            .and_then(|whole| whole.checked_add(nanoseconds))
            .ok_or_else(|| origin.malformed("offset"))?;
        match clock {
            Some("monotonic") => offsets.0 = offset,
            Some("boottime") => offsets.1 = offset,
            _ => return Err(origin.malformed("clock")),
        }
    }
    Ok(offsets)
}

/// The out-of-memory killer's adjustment, -1000 to 1000.
///
/// # Errors
/// [`Error::Gone`], [`Error::Malformed`].
pub fn oom_score_adj(pid: i32) -> Result<i32> {
    let path = format!("/proc/{pid}/oom_score_adj");
    Origin(&path).decimal(Some(read_text(pid, &path)?.trim()), "oom_score_adj")
}

/// Which kinds of mappings a core dump holds: a bit mask, see core(5). 0 for a process without memory.
///
/// # Errors
/// [`Error::Gone`], [`Error::Malformed`].
pub fn coredump_filter(pid: i32) -> Result<u32> {
    let path = format!("/proc/{pid}/coredump_filter");
    match read_text(pid, &path)?.trim() {
        "" => Ok(0),
        text => Origin(&path).hex_u32(Some(text), "coredump_filter"),
    }
}

/// Execution domain of a thread, see personality(2).
///
/// # Errors
/// [`Error::Gone`], [`Error::Malformed`].
pub fn personality(pid: i32, tid: i32) -> Result<u32> {
    let path = format!("/proc/{pid}/task/{tid}/personality");
    Origin(&path).hex_u32(Some(read_text(tid, &path)?.trim()), "personality")
}

/// Name of a thread, at most 15 bytes.
///
/// # Errors
/// [`Error::Gone`].
pub fn comm(pid: i32, tid: i32) -> Result<String> {
    let mut text = read_text(tid, &format!("/proc/{pid}/task/{tid}/comm"))?;
    // The kernel adds one line feed; the name itself may end in one.
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}

/// Timer slack of a thread in nanoseconds. The file exists for every thread, though only below `/proc/<tid>`.
///
/// # Errors
/// [`Error::Gone`], [`Error::Malformed`].
pub fn timerslack(tid: i32) -> Result<u64> {
    let path = format!("/proc/{tid}/timerslack_ns");
    Origin(&path).decimal(Some(read_text(tid, &path)?.trim()), "timerslack_ns")
}

/// Kernel function a thread sleeps in; `0` when it runs or the kernel does not say.
///
/// # Errors
/// [`Error::Gone`].
pub fn wchan(pid: i32, tid: i32) -> Result<String> {
    read_text(tid, &format!("/proc/{pid}/task/{tid}/wchan"))
}

/// Where in the kernel a thread that does not run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockedCall {
    /// System call number; -1 = stopped outside a system call.
    pub nr: i64,
    /// Its arguments; zeros outside a system call.
    pub args: [u64; 6],
    /// Stack pointer.
    pub sp: u64,
    /// Instruction pointer.
    pub pc: u64,
}

/// The system call a thread is blocked in; `None` while it runs.
///
/// # Errors
/// [`Error::Gone`], [`Error::Malformed`]; [`Error::Path`] with `EPERM` for a reader that may not trace it.
pub fn syscall(pid: i32, tid: i32) -> Result<Option<BlockedCall>> {
    let path = format!("/proc/{pid}/task/{tid}/syscall");
    parse_syscall(&read_text(tid, &path)?, &path)
}

/// Whether a thread of the process waits in vfork(2), or in a clone(2) with CLONE_VFORK, for the end of its child.
///
/// # Errors
/// As [`tids`], [`stat`] and [`syscall`]; a thread that ends meanwhile does not wait.
pub fn stands_in_vfork(pid: i32) -> Result<bool> {
    let waits = |tid| -> Result<bool> {
        if self::stat(pid, tid)?.state != 'D' {
            return Ok(false);
        }
        let Some(call) = syscall(pid, tid)? else {
            return Ok(false);
        };
        let flags = match call.nr {
            libc::SYS_vfork => return Ok(true),
            libc::SYS_clone => call.args[0],
            // The first word of struct clone_args, which is the parent's own.
            libc::SYS_clone3 => {
                let place = RemotePtr::<u64>::new(call.args[0]);
                RemoteMemory::open(pid)?.read_value(place).unwrap_or(0)
            }
            _ => 0,
        };
        Ok(flags & libc::CLONE_VFORK as u64 != 0)
    };
    for tid in tids(pid)? {
        match waits(tid) {
            Err(error) if error.is_gone() && tid != pid => {}
            Ok(false) => {}
            answer => return answer,
        }
    }
    Ok(false)
}

fn parse_syscall(text: &str, path: &str) -> Result<Option<BlockedCall>> {
    let origin = Origin(path);
    let mut words = text.split_ascii_whitespace();
    let nr = match words.next() {
        Some("running") => return Ok(None),
        word => origin.decimal(word, "system call")?,
    };
    let mut args = [0; 6];
    if nr != -1 {
        for arg in &mut args {
            *arg = origin.hex(words.next(), "argument")?;
        }
    }
    Ok(Some(BlockedCall {
        nr,
        args,
        sp: origin.hex(words.next(), "stack pointer")?,
        pc: origin.hex(words.next(), "instruction pointer")?,
    }))
}

/// Whether a process of this number exists, zombies included. Reads nothing of it and so does not count at the choke point.
pub fn exists(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor;
    use crate::process::{self, alone, own_pid};
    use std::os::fd::OwnedFd;

    fn own_tid() -> i32 {
        nix::unistd::gettid().as_raw()
    }

    fn info_of(descriptor: &OwnedFd) -> DescriptorEntry {
        super::descriptor(own_pid(), descriptor.as_raw_fd() as u32).expect("own descriptor")
    }

    #[test]
    fn status_tells_what_the_kernel_tells_us() {
        let (pid, tid) = (own_pid(), own_tid());
        let status = status(pid, tid).expect("status");
        assert_eq!((status.tgid, status.ppid), (pid, process::parent_pid()));
        assert_eq!(status.ns_pid.first(), Some(&tid));
        assert_eq!(status.uid, [nix::unistd::getuid().as_raw(); 4]);
        assert!(status.threads > 1 && status.thp_enabled && status.vm_rss_kib > 0);
        assert_eq!(status.name, comm(pid, tid).expect("comm"));
        assert!(status.cpus_allowed.iter().any(|&byte| byte != 0));
        let stat = stat(pid, tid).expect("stat");
        assert_eq!(stat.ppid, status.ppid);
        assert!(stat.env_end > stat.env_start && stat.env_start >= stat.arg_end);
        assert!(stat.start_time_ticks > 0);
    }

    #[test]
    fn odd_names_do_not_shift_the_fields() {
        let line = "7 (a) R (b) 1) S 3 4 5 0 -1 4194304 0 0 0 0 11 12 0 0 20 0 2 0 99 1 2 \
                    18446744073709551615 21 22 23 0 0 0 0 0 0 0 0 0 17 1 0 0 0 0 0 \
                    31 32 33 34 35 36 37 768";
        let stat = parse_stat(line, "stat").expect("stat");
        assert_eq!(
            (stat.state, stat.ppid, stat.pgrp, stat.session),
            ('S', 3, 4, 5)
        );
        assert_eq!((stat.utime, stat.stime, stat.num_threads), (11, 12, 2));
        assert_eq!((stat.start_time_ticks, stat.exit_signal), (99, 17));
        assert_eq!(stat.exit_code, 3 << 8);
        assert_eq!(
            (stat.start_code, stat.end_code, stat.start_stack),
            (21, 22, 23)
        );
        assert_eq!(
            (stat.start_data, stat.start_brk, stat.env_end),
            (31, 33, 37)
        );
        assert!(parse_stat("7 (a) S 1", "stat").is_err());
        assert_eq!(unescape_name("a\\nb\\\\n"), "a\nb\\n");
    }

    #[test]
    fn masks_are_little_endian_bytes() {
        assert_eq!(
            parse_mask(Some("00000001,80000003")),
            Some(vec![3, 0, 0, 0x80, 1, 0, 0, 0])
        );
        assert_eq!(parse_mask(Some("")), None);
    }

    #[test]
    fn maps_lines_are_understood() {
        let text = "\
7f00-8f00 r--p 00001000 fe:01 247282                     /a b\\012c (deleted)
8f00-9f00 rw-p 00000000 00:00 0                          [anon:my heap]
9f00-af00 rw-s 00000000 00:01 9                          [anon_shmem:box]
af00-bf00 ---p 00000000 00:00 0 
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";
        let maps = parse_maps(text, "maps").expect("maps");
        let paths: Vec<_> = maps.iter().map(|vma| vma.path.as_str()).collect();
        assert_eq!(
            paths,
            [
                "/a b\nc (deleted)",
                "",
                "/dev/zero (deleted)",
                "",
                "[vsyscall]"
            ]
        );
        let names: Vec<_> = maps.iter().map(|vma| vma.name.as_deref()).collect();
        assert_eq!(names, [None, Some("my heap"), Some("box"), None, None]);
        assert_eq!((maps[0].offset, maps[0].inode), (0x1000, 247_282));
        assert_eq!(maps[0].device, nix::sys::stat::makedev(0xfe, 1));
        assert!(maps[0].read && !maps[0].write && maps[2].shared && !maps[3].read);
        assert!(parse_maps("VmFlags: rd\n", "smaps").is_err());
    }

    #[test]
    fn smaps_shows_flags_and_guards_do_not_hide() {
        alone(|| {
            const LEN: usize = 8 * 4096;
            const MADV_GUARD_INSTALL: i32 = 102;
            // SAFETY: a new mapping, which is then advised within its length.
            let start = unsafe {
                let start = libc::mmap(
                    std::ptr::null_mut(),
                    LEN,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                    -1,
                    0,
                );
                assert_ne!(start, libc::MAP_FAILED);
                assert_eq!(libc::madvise(start, LEN, libc::MADV_DONTFORK), 0);
                start as u64
            };
            let find = || {
                let vma = smaps(own_pid()).expect("smaps");
                vma.into_iter()
                    .find(|vma| vma.start <= start && start < vma.end)
                    .expect("the mapping")
            };
            let vma = find();
            assert!(vma.flags.has("dc") && vma.flags.has("rd") && !vma.flags.has("lo"));
            assert!(!vma.flags.has("gu") && vma.page_bytes == 4096 && vma.resident_bytes == 0);
            assert_eq!(vma.flags.iter().next(), Some("rd"));
            // SAFETY: nothing refers to this memory.
            if unsafe { libc::madvise((start + 4096) as *mut _, 4096, MADV_GUARD_INSTALL) } != 0 {
                return;
            }
            // One mapping still; only the page map tells which page.
            assert_eq!(find().end - find().start, vma.len());
            let regions = crate::pagemap::scan(
                &crate::pagemap::open(own_pid()).expect("pagemap"),
                &crate::pagemap::Scan {
                    range: start..start + LEN as u64,
                    category_mask: crate::pagemap::GUARD,
                    return_mask: crate::pagemap::GUARD | crate::pagemap::SWAPPED,
                    ..crate::pagemap::Scan::default()
                },
            );
            let regions = regions.expect("scan");
            assert_eq!(regions.len(), 1);
            assert_eq!(
                (regions[0].start, regions[0].end),
                (start + 4096, start + 8192)
            );
            assert_eq!(
                regions[0].categories,
                crate::pagemap::GUARD | crate::pagemap::SWAPPED
            );
        });
    }

    #[test]
    fn descriptors_show_their_state() {
        let eventfd = descriptor::create_eventfd(u64::MAX - 1, true).expect("eventfd");
        let info = info_of(&eventfd).info;
        assert!(info.close_on_exec());
        let state = info.eventfd.expect("eventfd");
        assert_eq!((state.count, state.semaphore), (u64::MAX - 1, Some(true)));
        assert!(state.id >= 0);

        let mask = 1 << 9 | 1 << 33;
        let signalfd = descriptor::create_signalfd(mask).expect("signalfd");
        assert_eq!(info_of(&signalfd).info.signalfd_mask, Some(mask));

        let file = tempfile();
        let entry = info_of(&file);
        assert!(entry.link.ends_with(" (deleted)"), "{entry:?}");
        assert_eq!(entry.pipe_or_socket_inode(), None);
        assert_eq!(entry.info.position, 3);
        assert_eq!(entry.info.locks.len(), 1);
    }

    /// An unnamed locked file at position 3.
    fn tempfile() -> OwnedFd {
        use std::io::Write as _;
        use std::os::unix::fs::OpenOptionsExt as _;
        let mut file = std::fs::File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .open("/tmp")
            .expect("open");
        file.write_all(b"abc").expect("write");
        // SAFETY: no pointers.
        assert_eq!(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) }, 0);
        file.into()
    }

    #[test]
    fn a_mount_is_found_with_its_device() {
        let text = "24 1 254:0 / / rw,relatime - ext4 /dev/vda rw
90 24 0:43 / /tmp/a\\040b rw shared:3 - overlay none rw
9 24 x - -
";
        assert_eq!(parse_mounted_device(text, 90), Some((0, 43)));
        assert_eq!(parse_mounted_device(text, 24), Some((254, 0)));
        assert_eq!(parse_mounted_device(text, 9), None);
        assert_eq!(parse_mounted_device(text, 2), None);
    }

    #[test]
    fn fdinfo_lines_are_understood() {
        let text = "\
pos:\t0
flags:\t02004002
mnt_id:\t17
ino:\t1044
tfd:        3 events:       1d data:                3  pos:0 ino:414 sdev:10
tfd:       70 events: 80000019 data: ffffffffffffffff  pos:12 ino:a sdev:fe00001
clockid: 1
ticks: 4
settime flags: 03
it_value: (9, 999204432)
it_interval: (1, 500)
lock:\t1: FLOCK  ADVISORY  WRITE 6980 fe:00:10010831 0 EOF
scm_fds: 2
Pid:\t-1
inotify wd:1 ino:3c4a7 sdev:fe00000 mask:2 ignored_mask:0 fhandle-bytes:8
";
        let info = parse_fdinfo(text, "fdinfo").expect("fdinfo");
        assert_eq!(info.flags, 0o2_004_002);
        assert!(info.inotify && !info.fanotify && info.close_on_exec());
        assert_eq!((info.scm_fds, info.pidfd), (Some(2), Some(-1)));
        assert_eq!(
            info.locks,
            ["1: FLOCK  ADVISORY  WRITE 6980 fe:00:10010831 0 EOF"]
        );
        assert_eq!(
            info.timerfd,
            Some(TimerfdInfo {
                clock: 1,
                ticks: 4,
                settime_flags: 3,
                value_ns: 9_999_204_432,
                interval_ns: 1_000_000_500,
            })
        );
        assert_eq!(
            info.epoll[1],
            EpollItem {
                fd: 70,
                events: 0x8000_0019,
                data: u64::MAX,
                pos: 12,
                ino: 10,
                device: nix::sys::stat::makedev(0xfe, 1),
            }
        );
        assert!(parse_fdinfo("flags:\t9\n", "fdinfo").is_err());
    }

    #[test]
    fn limits_are_those_of_getrlimit() {
        let limits = limits(own_pid()).expect("limits");
        for (resource, &(soft, hard)) in limits.iter().enumerate() {
            let mut limit = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            // SAFETY: the kernel stores one rlimit.
            let answer = unsafe { libc::getrlimit(resource as u32, &raw mut limit) };
            assert_eq!(answer, 0);
            assert_eq!((limit.rlim_cur, limit.rlim_max), (soft, hard), "{resource}");
        }
    }

    #[test]
    fn timers_are_understood() {
        let text = "\
ID: 0
signal: 60/00007fff86e452a8
notify: signal/tid.2634
ClockID: 0
ID: 7
signal: 0/0000000000000000
notify: none/pid.2634
ClockID: -6
";
        let timers = parse_timers(text, "timers").expect("timers");
        assert_eq!(
            timers,
            [
                PosixTimer {
                    id: 0,
                    signo: 60,
                    value: 0x7fff_86e4_52a8,
                    notify: 4,
                    target: 2634,
                    clock: 0,
                },
                PosixTimer {
                    id: 7,
                    signo: 0,
                    value: 0,
                    notify: 1,
                    target: 2634,
                    clock: -6,
                },
            ]
        );
        assert_eq!(parse_timers("", "timers").expect("none"), []);
        assert!(parse_timers("ID: 0\nnotify: signal/pid.1\n", "timers").is_err());
    }

    #[test]
    fn small_files_are_understood() {
        let pid = own_pid();
        assert_eq!(auxv(pid).expect("auxv").len() % 16, 0);
        assert_eq!(
            exe(pid).expect("exe"),
            std::env::current_exe().expect("exe").to_string_lossy()
        );
        assert_eq!(
            cwd(pid).expect("cwd"),
            std::env::current_dir().expect("cwd").to_string_lossy()
        );
        assert_eq!(root(pid).expect("root"), "/");
        assert!(!cgroups(pid).expect("cgroups").is_empty());
        let namespaces = namespaces(pid).expect("namespaces");
        assert!(namespaces.pid > 0 && namespaces.net > 0 && namespaces.user > 0);
        assert_eq!(namespaces.pid, namespaces.pid_for_children);
        assert!((-1000..=1000).contains(&oom_score_adj(pid).expect("oom_score_adj")));
        assert_eq!(coredump_filter(pid).expect("coredump_filter"), 0x33);
        assert_eq!(personality(pid, own_tid()).expect("personality"), 0);
        assert_eq!(timerslack(own_tid()).expect("timerslack"), 50_000);
        // Ours, at that moment, is the read(2) that asks.
        let call = syscall(pid, own_tid()).expect("syscall");
        assert_eq!(call.map(|call| call.nr), Some(libc::SYS_read));
        assert_eq!(
            parse_syscall("running\n", "syscall").expect("syscall"),
            None
        );
        assert_eq!(wchan(pid, own_tid()).expect("wchan"), "0");
        assert_eq!(tids(pid).expect("tids").first(), Some(&pid));
        assert_eq!(
            parse_timens_offsets("monotonic -1 999999999\nboottime 2 5\n", "offsets")
                .expect("offsets"),
            (-1, 2_000_000_005)
        );
        assert_eq!(
            parse_syscall("-1 0x7ffd 0x401000", "syscall").expect("syscall"),
            Some(BlockedCall {
                nr: -1,
                args: [0; 6],
                sp: 0x7ffd,
                pc: 0x40_1000
            })
        );
    }

    #[test]
    fn what_is_gone_is_called_gone() {
        alone(|| {
            let child = process::fork(false, || 0).expect("fork");
            process::wait(child).expect("wait");
            let gone =
                |answer: Result<()>| matches!(answer, Err(Error::Gone { pid }) if pid == child);
            assert!(gone(status(child, child).map(drop)));
            assert!(gone(stat(child, child).map(drop)));
            assert!(gone(maps(child).map(drop)));
            assert!(gone(descriptors(child).map(drop)));
            assert!(gone(limits(child).map(drop)));
            assert!(gone(children(child).map(drop)));
            assert!(gone(tids(child).map(drop)));
            assert!(gone(cwd(child).map(drop)));
            assert!(!exists(child));
            // A number that is not open is no dead process.
            assert!(matches!(
                super::descriptor(own_pid(), 1_000_000),
                Err(Error::Path {
                    errno: Errno::ENOENT,
                    ..
                })
            ));
        });
    }

    #[test]
    fn holders_of_a_pipe_are_found_once_each() {
        alone(|| {
            let (read_end, write_end) = crate::pipe::create(4096, &[]).expect("pipe");
            let inode = info_of(&read_end).pipe_or_socket_inode().expect("a pipe");
            assert_eq!(info_of(&write_end).pipe_or_socket_inode(), Some(inode));
            let child = process::fork(false, || {
                std::thread::sleep(std::time::Duration::from_secs(60));
                0
            });
            let child = child.expect("fork");
            assert_eq!(children(own_pid()).expect("children"), [child]);
            let holders = pipe_or_socket_holders(&BTreeSet::from([inode, u64::MAX])).expect("scan");
            assert_eq!(
                holders,
                BTreeMap::from([(inode, BTreeSet::from([own_pid(), child]))])
            );
            process::kill(child, libc::SIGKILL).expect("kill");
            process::wait(child).expect("wait");
            assert_eq!(children(own_pid()).expect("children"), [0; 0]);
        });
    }
}
