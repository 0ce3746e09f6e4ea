//! The look before anything is touched: what a process tree consists of, and everything in it that cannot be carried, all at
//! once.
//!
//! It reads `/proc` and copies of descriptors of a running process, so a fact may be over when it is read. A refusal counts
//! when a second look confirms it, and capture asks again in the freeze.

mod managed;
mod refusal;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pageferry_image::model::files::file;
use pageferry_image::model::memory::FileIdentity;
use pageferry_image::model::relations::Zombie;
use pageferry_image::model::shared::Shared;
use pageferry_image::model::sockets::State;
use pageferry_image::page::PageRange;
use pageferry_tracee::choke::{self, Kind as Call};
use pageferry_tracee::procfs::{self, DescriptorEntry, FileKey, Namespaces, Vma};
use pageferry_tracee::{Error as ProcessError, descriptor, leftover, socket};
use pageferry_wire::message::{BoundSocket, Plan};

pub use self::refusal::{Object, Pids, Refusal, RefusalKind};
use crate::capture::files::{self, Depth, KnownFiles, Look, Table, Verdict};
use crate::capture::locks::Leased;
use crate::capture::relations::Common;
use crate::capture::shared::Objects;
use crate::capture::sockets::flight::InFlight;
use crate::capture::{locks, memory, relations, task, timers};
use crate::identity::FileCheck;
use crate::{Error, Result};

/// Longest wait for the storage of written files, with the process running.
const SYNC_WAIT: Duration = Duration::from_secs(60);

/// Largest memory of a process that is looked at in the freeze for the first time: its page tables are walked then.
const NEWCOMER_KIB_MAX: u64 = 128 << 10;

/// What to do with TCP connections (`--tcp`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TcpPolicy {
    /// A process that has any is refused.
    #[default]
    Refuse,
    /// They are dropped: the program finds them closed, their peers get no answer any more.
    Close,
}

/// What the operator allows.
#[derive(Debug, Clone, Default)]
pub struct SurveyOptions {
    /// TCP connections.
    pub tcp: TcpPolicy,
    /// How files are compared.
    pub file_check: FileCheck,
    /// Path prefixes under which the target sees the very same files.
    pub same_file: Vec<PathBuf>,
    /// Go on although a service manager or container runtime may start the process again here.
    pub unmanaged: bool,
    /// Bytes of a deleted file, not on a tmpfs, that is carried with its content.
    pub ghost_limit: u64,
    /// The tree comes to rest: nobody opens its files elsewhere while it has them here.
    pub at_rest: bool,
}

/// What was found.
#[derive(Debug)]
pub struct Survey {
    /// The root.
    pub pid: i32,
    /// The name of its first thread.
    pub comm: String,
    /// Everything that cannot be carried. Empty: go on.
    pub refusals: Vec<Refusal>,
    /// What will be different on the target, or is given up by an option, in sentences without a full stop.
    pub notes: Vec<String>,
    /// Every file and directory the target must have, each once.
    pub files: Vec<FileIdentity>,
    /// Addresses the target must be able to bind.
    pub sockets: Vec<BoundSocket>,
    /// Files that will be made on the target.
    pub carried: Vec<Shared>,
    /// Numbers that have to be free on the target: of the threads of all processes, the root's first, of what has ended, and of
    /// sessions and groups whose leaders are gone.
    pub tids: Vec<i32>,
    /// Private anonymous memory in use, swapped included, and that of the shared objects.
    pub resident_bytes: u64,
    /// Locked memory.
    pub locked_bytes: u64,
    /// One past the highest mapped user address.
    pub user_address_end: u64,
    /// What its time namespace adds to this host's CLOCK_MONOTONIC and CLOCK_BOOTTIME, nanoseconds.
    pub clock_offsets_ns: (i64, i64),
    /// Agents of killed tracers, which the freeze takes out: no part of the processes.
    leftovers: usize,
    /// Those in one memory have one in common.
    pub(crate) members: BTreeMap<i32, Arc<Member>>,
    pub(crate) inodes: BTreeSet<u64>,
    /// Shared objects.
    pub(crate) shared: BTreeSet<FileKey>,
    /// Locks of open files, which nobody outside has.
    pub(crate) locks: BTreeSet<locks::Place>,
    /// Named pipes, by device and inode.
    pub(crate) fifos: BTreeSet<(u64, u64)>,
    pub(crate) known: KnownFiles,
}

/// What the freeze need not look for again, of a process' memory.
#[derive(Debug, Default)]
pub(crate) struct Member {
    pub(crate) vmas: Vec<Vma>,
    /// Guard regions of private mappings.
    pub(crate) guards: Vec<PageRange>,
}

impl Survey {
    /// Whether what a freeze found to be refused may be gone, or be carried, after another survey: it is that the tree has changed,
    /// or is about a process that came since, as one that shares its parent's memory until it executes a program.
    pub fn is_passing(&self, refusal: &Refusal) -> bool {
        matches!(
            refusal.what,
            RefusalKind::Newcomer | RefusalKind::Orphan { .. }
        ) || !self.members.contains_key(&refusal.pid)
    }

    /// The part of the plan that is about the process; what is about the host and the operator's wishes is left empty.
    pub fn plan(&self) -> Plan {
        Plan {
            pid: self.pid,
            tids: self.tids.clone(),
            files: self.files.clone(),
            carried: self.carried.clone(),
            resident_bytes: self.resident_bytes,
            sockets: self.sockets.clone(),
            comm: self.comm.clone(),
            locked_bytes: self.locked_bytes,
            user_address_end: self.user_address_end,
            ..Plan::default()
        }
    }
}

/// Looks at a running process and all its descendants.
///
/// # Errors
/// [`Error::Process`] with `Gone` if there is no such process or it ends meanwhile; whatever else reading gave. What cannot be
/// carried is no error but a refusal.
pub fn survey(pid: i32, options: &SurveyOptions) -> Result<Survey> {
    let mut found = look(pid, options)?;
    if !found.refusals.is_empty() {
        // Of a running process, two looks at different moments may contradict each other: what only one of them saw has passed.
        let again = look(pid, options)?;
        let seen_twice = |refusal: &Refusal| {
            again.refusals.iter().any(|other| {
                (other.pid, other.object) == (refusal.pid, refusal.object)
                    && other.what.key() == refusal.what.key()
            })
        };
        found.refusals.retain(seen_twice);
        found = Survey {
            refusals: std::mem::take(&mut found.refusals),
            ..again
        };
    }
    if found.leftovers > 0 {
        tracing::info!(
            pid,
            mappings = found.leftovers,
            "found what an interrupted attempt left in the process; it is removed in the freeze"
        );
    }
    Ok(found)
}

fn look(root: i32, options: &SurveyOptions) -> Result<Survey> {
    let pids = procfs::descendants(root)?;
    let mut look = Look {
        pid: root,
        pids: &pids,
        options,
        known: KnownFiles::default(),
        shared: Objects::default(),
        ended: Vec::new(),
        leased: Leased::default(),
    };
    let stat = procfs::stat(root, root)?;
    // Nothing else can be asked about these.
    if let Some(what) = no_program(root, &stat)? {
        let refusals = vec![Refusal {
            pid: root,
            object: Object::Process,
            what,
        }];
        return Ok(empty(root, refusals));
    }
    let mut found = empty(root, Vec::new());
    found.comm = procfs::status(root, root)?.name;
    found.clock_offsets_ns = procfs::timens_offsets(root)?;
    found.notes.extend(identity_notes(root, &stat));
    let memory = relations::memories(&pids)?;
    // Before any file is opened. One that has none has ended, or is refused below.
    let mut read = BTreeMap::new();
    for &pid in &pids {
        if let Ok(entries) = procfs::descriptors(pid) {
            look.leased.add(pid, &entries);
            read.insert(pid, entries);
        }
    }
    let mut tables = Vec::new();
    let (mut stats, mut zombies) = (Vec::new(), Vec::new());
    for &pid in &pids {
        look.pid = pid;
        let host = memory.get(&pid).copied();
        let entries = read.remove(&pid);
        match member(&mut look, root, host, entries, &mut found, &mut zombies) {
            Ok(Some((stat, entries))) => {
                tables.push((pid, entries));
                stats.push((pid, stat));
            }
            Ok(None) => {}
            // Half of what a process has is gone before the process is.
            Err(_) if pid != root && has_ended(pid) => {}
            Err(error) => return Err(error),
        }
    }
    let common = Common::of(&stats)?;
    let (helpers, refusals) = relations::making(&stats, &zombies, &common);
    found.refusals.extend(refusals);
    let in_vfork = relations::in_vfork(&stats, &common.memory)?;
    found.refusals.extend(in_vfork);
    // A table is looked at once.
    for (pid, entries) in &mut tables {
        if common.tables.contains_key(pid) {
            entries.clear();
        }
    }
    found.tids.extend(zombies.iter().map(|zombie| zombie.pid));
    found.tids.extend(helpers);
    found.notes.extend(zombies.iter().filter_map(core_note));
    let table = files::table(&mut look, &tables, &InFlight::default(), Depth::Survey)?;
    found.refusals.extend(table.refusals.iter().cloned());
    found
        .refusals
        .extend(files::held_outside(&tables, &table.inodes, &table.fifos)?);
    found.locks = locks::of_files(&table.locks);
    found
        .refusals
        .extend(locks::held_outside(&pids, &found.locks)?);
    found.shared = look.shared.keys();
    let outside = look.shared.held_outside(&pids, &found.shared)?;
    found.refusals.extend(outside);
    found.resident_bytes += look.shared.bytes();
    found.carried = look.shared.carried();
    for file in look.shared.moved() {
        let name = file.name();
        found
            .notes
            .push(format!("{name} goes along and is removed here"));
    }
    found
        .refusals
        .sort_by_key(|refusal| (refusal.pid != root, refusal.pid, refusal.object));
    found.notes.extend(socket_notes(&tables, &table)?);
    if found.refusals.is_empty() {
        look.known.sync_written(SYNC_WAIT)?;
    }
    found.sockets = bound_sockets(&table);
    found.files = look.known.identities();
    found.files.dedup_by(|next, kept| {
        next.path == kept.path && {
            // The stricter of the two demands.
            kept.must_be_shared |= next.must_be_shared;
            true
        }
    });
    (found.inodes, found.fifos) = (table.inodes, table.fifos);
    found.known = look.known;
    Ok(found)
}

/// Adds what one process has to `found`; its row in the process table and its descriptors, which are `entries` if they are known.
/// `None`: it is refused as a whole, or has ended and is one of `zombies`. What is in the memory of `host` has been looked at there.
fn member(
    look: &mut Look<'_>,
    root: i32,
    host: Option<i32>,
    entries: Option<Vec<DescriptorEntry>>,
    found: &mut Survey,
    zombies: &mut Vec<Zombie>,
) -> Result<Option<(procfs::Stat, Vec<DescriptorEntry>)>> {
    let pid = look.pid;
    let mut refusals = Vec::new();
    let mut refuse = |what| {
        refusals.push(Refusal {
            pid,
            object: Object::Process,
            what,
        })
    };
    let stat = procfs::stat(pid, pid)?;
    if pid != root && stat.state == 'Z' {
        match relations::zombie(pid, &stat)? {
            Ok(zombie) => zombies.push(zombie),
            Err(what) => refuse(what),
        }
        found.refusals.extend(refusals);
        return Ok(None);
    }
    if let Some(what) = no_program(pid, &stat)? {
        refuse(what);
        found.refusals.extend(refusals);
        return Ok(None);
    }
    let status = procfs::status(pid, pid)?;
    if let Err(what) = executable(look)? {
        refuse(what);
    }
    if let Err(what) = working_directory(look)? {
        refuse(what);
    }
    let tids = procfs::tids(pid)?;
    if status.tracer_pid != 0 {
        refuse(RefusalKind::Traced {
            by: status.tracer_pid,
        });
    } else if matches!(status.state, 'T' | 't') {
        refuse(RefusalKind::Stopped);
    }
    process(look, root, &stat, &status, &mut refusals)?;
    threads(pid, &tids, false, &mut refusals)?;
    refusals.extend(timers::refusals(pid)?);
    let entries = entries.map_or_else(|| procfs::descriptors(pid), Ok)?;
    if let Some(shared) = host.and_then(|host| found.members.get(&host)).cloned() {
        found.refusals.extend(refusals);
        found.tids.extend(tids);
        found.members.insert(pid, shared);
        return Ok(Some((stat, entries)));
    }
    let all = procfs::smaps(pid)?;
    let agents = leftover::find(pid, &all)?;
    let is_left = |vma: &Vma| {
        agents
            .iter()
            .any(|agent| agent.start <= vma.start && vma.end <= agent.end)
    };
    let (left, vmas): (Vec<Vma>, Vec<Vma>) = all.into_iter().partition(is_left);
    let left_locked: u64 = left
        .iter()
        .filter(|vma| vma.flags.has("lo"))
        .map(Vma::len)
        .sum();
    refusals.extend(memory::refusals(look, &vmas)?);
    refusals.extend(memory_policies(pid)?);
    found.refusals.extend(refusals);
    found.tids.extend(tids);
    found.resident_bytes += (status.rss_anon_kib + status.vm_swap_kib) * 1024;
    found.locked_bytes += (status.vm_lck_kib * 1024).saturating_sub(left_locked);
    let highest = vmas.iter().filter(|vma| vma.path != "[vsyscall]");
    let highest = highest.map(|vma| vma.end).max().unwrap_or(0);
    found.user_address_end = found.user_address_end.max(highest);
    found.leftovers += agents.len();
    let guards = memory::guards(pid, &vmas, |_| true)?;
    let member = Arc::new(Member { vmas, guards });
    found.members.insert(pid, member);
    Ok(Some((stat, entries)))
}

/// Or is about to: its memory is gone first, and then it has no program file, but is no zombie yet.
fn has_ended(pid: i32) -> bool {
    const PF_EXITING: u32 = 0x4;
    procfs::stat(pid, pid).map_or_else(
        |error| error.is_gone(),
        |stat| stat.flags & PF_EXITING != 0 || matches!(stat.state, 'Z' | 'X'),
    )
}

/// Looks at a frozen process that came after the survey: at what that would have found, and what capture does not look at
/// again. Not at its memory, of which see [`newcomers_memory`].
pub(crate) fn newcomer(
    look: &Look<'_>,
    root: i32,
    stat: &procfs::Stat,
    refusals: &mut Vec<Refusal>,
) -> Result<()> {
    let pid = look.pid;
    let status = procfs::status(pid, pid)?;
    process(look, root, stat, &status, refusals)?;
    threads(pid, &procfs::tids(pid)?, true, refusals)
}

/// Looks at the memory of such a process, which the survey has not seen. `None` if it is so large that the freeze would last.
pub(crate) fn newcomers_memory(
    pid: i32,
    refusals: &mut Vec<Refusal>,
) -> Result<Option<Arc<Member>>> {
    if procfs::status(pid, pid)?.vm_rss_kib > NEWCOMER_KIB_MAX {
        return Ok(None);
    }
    let vmas = procfs::smaps(pid)?;
    refusals.extend(memory_policies(pid)?);
    let guards = memory::guards(pid, &vmas, |_| true)?;
    Ok(Some(Arc::new(Member { vmas, guards })))
}

fn empty(pid: i32, refusals: Vec<Refusal>) -> Survey {
    Survey {
        pid,
        comm: String::new(),
        refusals,
        notes: Vec::new(),
        files: Vec::new(),
        carried: Vec::new(),
        sockets: Vec::new(),
        tids: Vec::new(),
        resident_bytes: 0,
        locked_bytes: 0,
        user_address_end: 0,
        clock_offsets_ns: (0, 0),
        leftovers: 0,
        members: BTreeMap::new(),
        inodes: BTreeSet::new(),
        shared: BTreeSet::new(),
        fifos: BTreeSet::new(),
        locks: BTreeSet::new(),
        known: KnownFiles::default(),
    }
}

/// Why there is nothing to look at.
fn no_program(pid: i32, stat: &procfs::Stat) -> Result<Option<RefusalKind>> {
    const PF_KTHREAD: u32 = 0x0020_0000;
    if stat.flags & PF_KTHREAD != 0 {
        return Ok(Some(RefusalKind::KernelThread));
    }
    if matches!(stat.state, 'Z' | 'X') {
        let others = procfs::tids(pid)?.len() > 1;
        return Ok(Some(if others {
            RefusalKind::DeadLeader
        } else {
            RefusalKind::Zombie
        }));
    }
    if pid == (std::process::id() as i32) {
        return Ok(Some(RefusalKind::Itself));
    }
    let leader = procfs::status(pid, pid)?.tgid;
    Ok((leader != pid).then_some(RefusalKind::NotLeader { leader }))
}

fn process(
    look: &Look<'_>,
    root: i32,
    stat: &procfs::Stat,
    status: &procfs::Status,
    refusals: &mut Vec<Refusal>,
) -> Result<()> {
    let pid = look.pid;
    let mut refuse = |what| {
        refusals.push(Refusal {
            pid,
            object: Object::Process,
            what,
        })
    };
    if status.ns_pid.last() == Some(&1) {
        refuse(RefusalKind::Init);
    }
    if status.core_dumping {
        refuse(RefusalKind::CoreDumping);
    }
    if status.vm_pin_kib > 0 {
        refuse(RefusalKind::Pinned {
            kib: status.vm_pin_kib,
        });
    }
    if stat.tty_nr != 0 {
        let device = u64::from(stat.tty_nr as u32);
        // The kernel's own encoding: 12 bits of major from bit 8, the minor around them.
        refuse(RefusalKind::ControllingTerminal {
            major: device >> 8 & 0xfff,
            minor: device & 0xff | device >> 12 & 0xf_ff00,
        });
    }
    let namespaces = procfs::namespaces(pid)?;
    for kind in foreign_namespaces(&namespaces)? {
        refuse(RefusalKind::Namespace { kind });
    }
    // The tree gets one on the target.
    if pid != root && namespaces.time != procfs::namespaces(root)?.time {
        refuse(RefusalKind::Namespace { kind: "time" });
    }
    let directory = procfs::root(pid)?;
    if directory != "/" {
        refuse(RefusalKind::Chroot { root: directory });
    }
    if pid == root && !look.options.unmanaged {
        if let Some(unit) = managed::unit(pid, stat.ppid)? {
            refuse(RefusalKind::Managed { unit });
        }
    }
    // What those of the tree have in common is another matter.
    let relatives = relatives(stat.ppid, pid)?.into_iter();
    for other in relatives.filter(|other| !look.pids.contains(other)) {
        if let Some(what) = shared_context(pid, other)? {
            refuse(RefusalKind::SharedWith { other, what });
        }
    }
    Ok(())
}

/// The kinds of namespaces in which the process, or its next child, is not where we are. Its clocks may differ.
fn foreign_namespaces(its: &Namespaces) -> Result<Vec<&'static str>> {
    let ours = procfs::namespaces(std::process::id() as i32)?;
    let children_stay = its.pid_for_children == 0 || its.pid_for_children == its.pid;
    Ok([
        (its.pid == ours.pid && children_stay, "pid"),
        (its.net == ours.net, "network"),
        (its.mnt == ours.mnt, "mount"),
        (its.uts == ours.uts, "uts"),
        (its.ipc == ours.ipc, "ipc"),
        (its.user == ours.user, "user"),
        (its.cgroup == ours.cgroup, "cgroup"),
        (its.time == its.time_for_children, "time (for its children)"),
    ]
    .into_iter()
    .filter_map(|(same, kind)| (!same).then_some(kind))
    .collect())
}

/// The processes that may share more than files with `pid` without being its children: a clone(2) that shares has its maker,
/// or with CLONE_PARENT its maker's parent, as parent.
fn relatives(parent: i32, pid: i32) -> Result<Vec<i32>> {
    if parent == 0 {
        return Ok(Vec::new());
    }
    let siblings = match procfs::children(parent) {
        Ok(siblings) => siblings,
        Err(error) if error.is_gone() => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    let own = std::process::id() as i32;
    Ok(std::iter::once(parent)
        .chain(siblings)
        .filter(|&other| other != pid && other != own)
        .collect())
}

fn shared_context(pid: i32, other: i32) -> Result<Option<&'static str>> {
    type Question = fn(i32, i32) -> pageferry_tracee::Result<bool>;
    let questions: [(Question, &'static str); 3] = [
        (descriptor::same_memory, "memory"),
        (descriptor::same_table, relations::TABLE),
        (descriptor::same_directory, relations::DIRECTORY),
    ];
    for (question, what) in questions {
        match question(pid, other) {
            Ok(true) => return Ok(Some(what)),
            Ok(false) => {}
            // The other one has ended.
            Err(error) if error.is_gone() && procfs::exists(pid) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

fn threads(pid: i32, tids: &[i32], is_held: bool, refusals: &mut Vec<Refusal>) -> Result<()> {
    for &tid in tids {
        match thread(pid, tid, is_held) {
            Ok(found) => refusals.extend(found),
            Err(Error::Process(error)) if error.is_gone() && tid != pid => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// `is_held`: it is we who trace it.
fn thread(pid: i32, tid: i32, is_held: bool) -> Result<Vec<Refusal>> {
    let status = procfs::status(pid, tid)?;
    let mut found = task::thread_refusals(pid, tid, &status);
    let mut refuse = |what| {
        found.push(Refusal {
            pid,
            object: Object::Thread(tid),
            what,
        })
    };
    if tid != pid {
        if status.tracer_pid != 0 && !is_held {
            refuse(RefusalKind::Traced {
                by: status.tracer_pid,
            });
        }
        if !descriptor::same_table(pid, tid)? {
            refuse(RefusalKind::Unshared {
                what: "a descriptor table",
            });
        }
        if !descriptor::same_directory(pid, tid)? {
            refuse(RefusalKind::Unshared {
                what: "a working directory and umask",
            });
        }
    }
    Ok(found)
}

/// The program file, or why it cannot be named again.
pub(crate) fn executable(look: &mut Look<'_>) -> Result<Verdict<FileIdentity>> {
    let path = procfs::exe(look.pid)?;
    let through = format!("/proc/{}/exe", look.pid);
    choke::pass(Call::Proc).map_err(|errno| ProcessError::path("stat", through.as_str(), errno))?;
    let (open, named) = (std::fs::metadata(&through), std::fs::metadata(&path));
    match (open, named) {
        (Ok(open), Ok(named)) if files::same_inode(&open, &named) => {
            let (device, inode) = (open.dev(), open.ino());
            match look.known_file(&path, false, device, inode) {
                Some(known) => Ok(Ok(known)),
                None => look.identify(&path, false, device, inode).map(Ok),
            }
        }
        (Ok(_), Ok(_)) => Ok(Err(RefusalKind::ReplacedFile { path })),
        (Ok(_), Err(_)) => Ok(Err(RefusalKind::DeletedFile {
            path: path.trim_end_matches(" (deleted)").to_owned(),
        })),
        (Err(source), _) => Err(Error::File {
            path: through,
            source,
        }),
    }
}

/// The working directory, or why it cannot be entered again.
pub(crate) fn working_directory(look: &mut Look<'_>) -> Result<Verdict<String>> {
    let path = procfs::cwd(look.pid)?;
    let through = format!("/proc/{}/cwd", look.pid);
    choke::pass(Call::Proc).map_err(|errno| ProcessError::path("stat", through.as_str(), errno))?;
    match (std::fs::metadata(&through), std::fs::metadata(&path)) {
        (Ok(open), Ok(named)) if files::same_inode(&open, &named) => {
            look.directory(&path, &named);
            Ok(Ok(path))
        }
        (Ok(_), Ok(_)) => Ok(Err(RefusalKind::UnreachablePath { path })),
        (Ok(_), Err(_)) => Ok(Err(RefusalKind::DeletedDirectory {
            path: path.trim_end_matches(" (deleted)").to_owned(),
        })),
        (Err(source), _) => Err(Error::File {
            path: through,
            source,
        }),
    }
}

/// Mappings with a NUMA policy. On a host with one node a policy changes nothing and is not looked for.
fn memory_policies(pid: i32) -> Result<Vec<Refusal>> {
    let is_single = std::fs::read_to_string("/sys/devices/system/node/online")
        .is_ok_and(|nodes| nodes.trim() == "0");
    let path = format!("/proc/{pid}/numa_maps");
    if is_single || !std::path::Path::new(&path).exists() {
        return Ok(Vec::new());
    }
    choke::pass(Call::Proc).map_err(|errno| ProcessError::path("read", path.as_str(), errno))?;
    let text = std::fs::read_to_string(&path).map_err(|source| Error::File { path, source })?;
    Ok(text
        .lines()
        .filter_map(|line| {
            let (start, rest) = line.split_once(' ')?;
            let policy = rest.split(' ').next()?;
            let start = u64::from_str_radix(start, 16).ok()?;
            let is_own = policy != "default" && !policy.starts_with("local");
            is_own.then(|| Refusal {
                pid,
                object: Object::Mapping { start, end: start },
                what: RefusalKind::MappingPolicy {
                    policy: policy.to_owned(),
                },
            })
        })
        .collect())
}

fn core_note(zombie: &Zombie) -> Option<String> {
    zombie.dumped_core().then(|| {
        format!(
            "pid {} has ended with a core dump: on the target its parent learns of the signal {} and of no dump",
            zombie.pid,
            zombie.signal()
        )
    })
}

fn identity_notes(pid: i32, stat: &procfs::Stat) -> Vec<String> {
    let mut notes = Vec::new();
    if stat.session != pid {
        notes.push(format!(
            "pid {pid} leaves its session {} and leads one of its own on the target",
            stat.session
        ));
    } else if stat.pgrp != pid {
        notes.push(format!("pid {pid} leaves its process group {}", stat.pgrp));
    }
    if stat.ppid > 1 {
        notes.push(format!(
            "pid {pid} will be seen to exit by its parent, process {}",
            stat.ppid
        ));
    }
    notes
}

/// What sockets lose: a network may lose datagrams, and `--tcp close` drops connections.
fn socket_notes(tables: &[files::Entries], table: &Table) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    for (pid, fd, socket) in sockets(table) {
        if socket.state() == State::Dropped {
            notes.push(format!("pid {pid} fd {fd}: the TCP connection is dropped"));
        }
        let is_open = tables
            .iter()
            .any(|(owner, entries)| *owner == pid && entries.iter().any(|entry| entry.fd == fd));
        if socket.r#type == libc::SOCK_DGRAM && socket.family != libc::AF_UNIX && is_open {
            if let Ok(copy) = descriptor::PidFd::open(pid).and_then(|pidfd| pidfd.get_fd(fd)) {
                if socket::unread_bytes(copy.as_fd()).is_ok_and(|bytes| bytes > 0) {
                    notes.push(format!(
                        "pid {pid} fd {fd}: datagrams that lie unread are lost, as on a network"
                    ));
                }
            }
        }
    }
    Ok(notes)
}

/// Every socket with the first descriptor of it.
fn sockets(
    table: &Table,
) -> impl Iterator<Item = (i32, u32, &pageferry_image::model::sockets::Socket)> {
    let mut holders: BTreeMap<u32, (i32, u32)> = BTreeMap::new();
    for (&pid, descriptors) in &table.descriptors {
        for descriptor in descriptors {
            holders
                .entry(descriptor.file)
                .or_insert((pid, descriptor.fd));
        }
    }
    table.files.iter().filter_map(move |file| match &file.kind {
        Some(file::Kind::Socket(socket)) => {
            let &(pid, fd) = holders.get(&file.id)?;
            Some((pid, fd, socket))
        }
        _ => None,
    })
}

/// Every name once. One that several processes have is seen once for each of them.
fn bound_sockets(table: &Table) -> Vec<BoundSocket> {
    let mut bound: Vec<BoundSocket> = Vec::new();
    for (_, fd, socket) in sockets(table) {
        for name in BoundSocket::of(fd, socket) {
            match bound.iter_mut().find(|other| other.address == name.address) {
                // Those that were accepted have the name and not the file.
                Some(other) => other.inode = other.inode.max(name.inode),
                None => bound.push(name),
            }
        }
    }
    bound
}
