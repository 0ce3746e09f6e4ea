//! Everything that is not carried, by name: one table of what it is and what the operator can do about it. Each row is one of
//! `docs/coverage.md`; a test compares the two.

use std::fmt;

/// The part of a process a refusal is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Object {
    /// The process as a whole.
    Process,
    /// One of its threads.
    Thread(i32),
    /// A descriptor.
    Fd(u32),
    /// A mapping.
    Mapping {
        /// First address.
        start: u64,
        /// One past the last address.
        end: u64,
    },
}

/// One thing that cannot be carried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Process.
    pub pid: i32,
    /// Part of it.
    pub object: Object,
    /// What it is and what to do.
    pub what: RefusalKind,
}

impl Refusal {
    /// The part it is about, as in `pid 4711 fd 9`.
    pub fn subject(&self) -> String {
        let pid = self.pid;
        match self.object {
            Object::Process => format!("pid {pid}"),
            Object::Thread(tid) => format!("pid {pid} thread {tid}"),
            Object::Fd(fd) => format!("pid {pid} fd {fd}"),
            Object::Mapping { start, end } => format!("pid {pid} mapping {start:x}-{end:x}"),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject(), self.what)
    }
}

/// Process ids, as in `12, 13 and 4 more`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pids(pub Vec<i32>);

impl fmt::Display for Pids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 5;
        for (index, pid) in self.0.iter().take(SHOWN).enumerate() {
            write!(f, "{}{pid}", if index == 0 { "" } else { ", " })?;
        }
        match self.0.len().checked_sub(SHOWN) {
            Some(more) if more > 0 => write!(f, " and {more} more"),
            _ => Ok(()),
        }
    }
}

macro_rules! refusals {
    ($($(#[$doc:meta])* $name:ident $({ $($(#[$field_doc:meta])* $field:ident: $kind:ty,)* })? = $key:literal, $text:literal;)*) => {
        /// What cannot be carried. `Display` says what it is and what to do.
        #[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
        #[non_exhaustive]
        pub enum RefusalKind {
            $($(#[$doc])* #[error($text)] $name $({ $($(#[$field_doc])* $field: $kind,)* })?,)*
        }

        impl RefusalKind {
            /// The key of every kind, as `docs/coverage.md` names it.
            pub const KEYS: &[&str] = &[$($key),*];

            /// The key of this kind.
            pub fn key(&self) -> &'static str {
                match self {
                    $(Self::$name { .. } => $key,)*
                }
            }
        }
    };
}

refusals! {
    // The process and its threads.

    /// pageferry cannot freeze itself, nor what it runs in.
    Itself = "itself", "is part of this pageferry (name another process)";
    /// Process 1 of a pid namespace.
    Init = "init", "is process 1 of its pid namespace (move the programs it runs instead)";
    /// A thread's number was given.
    NotLeader {
        /// The process it belongs to.
        leader: i32,
    } = "not-leader", "is a thread of process {leader} (name that)";
    /// A kernel thread.
    KernelThread = "kernel-thread", "is a kernel thread (name a program)";
    /// It has ended, and nobody is left to move.
    Zombie = "zombie", "has ended and is a zombie (start it again)";
    /// The leader has ended, other threads go on.
    DeadLeader = "dead-leader", "its first thread has ended while others run, which is not carried (let the first thread wait for them)";
    /// A debugger has it.
    Traced {
        /// The tracer.
        by: i32,
    } = "traced", "is traced by process {by} (detach the debugger)";
    /// Stopped by a signal.
    Stopped = "stopped", "is stopped by a signal (send it SIGCONT)";
    /// It is writing a core dump.
    CoreDumping = "core-dumping", "is writing a core dump (it is about to end)";
    /// It came after the survey.
    Newcomer = "newcomer", "was made after the tree was looked at, and is too large, or one of too many, for that to be made up for in the freeze (try again)";
    /// Its parent has ended, and left it to a process outside of the tree.
    Orphan {
        /// Who is its parent now.
        parent: i32,
    } = "orphan", "lost its parent and belongs to process {parent} now, which stays here (try again)";
    /// No order of births leads to its session.
    Session {
        /// The session.
        session: i32,
    } = "session", "is in session {session}, into which no way leads from its parent (start it in its parent's session)";
    /// Its group cannot be made in its session.
    Group {
        /// The group.
        group: i32,
    } = "group", "is in process group {group}, which cannot be made again (start it in a group of its own)";
    /// Another process that stays here, or waits in vfork(2), shares its memory, descriptor table or file-system context.
    SharedWith {
        /// The other process.
        other: i32,
        /// What is shared.
        what: &'static str,
    } = "shared-context", "shares its {what} with process {other}, which stays here or waits for it in vfork(2) (wait until one of them has ended or executes another program)";
    /// The same, between two of the tree, of what is carried where a child has it from its parent.
    Sharing {
        /// The first that has it.
        other: i32,
        /// What.
        what: &'static str,
    } = "sharing", "shares its {what} with process {other}, from which it cannot come to it again: one between them has its own or shares with others (end that)";
    /// A thread that left the descriptor table or file-system context of its process.
    Unshared {
        /// What it does not share.
        what: &'static str,
    } = "unshared-thread", "has {what} of its own, apart from the other threads', which is not carried yet (avoid unshare(2) in threads)";
    /// A namespace other than pageferry's.
    Namespace {
        /// Its kind.
        kind: &'static str,
    } = "namespace", "is in another {kind} namespace than pageferry (run pageferry inside it, as with nsenter)";
    /// chroot(2).
    Chroot {
        /// Its root directory.
        root: String,
    } = "chroot", "has the root directory {root} (run pageferry inside that root)";
    /// A controlling terminal.
    ControllingTerminal {
        /// Major device number.
        major: u64,
        /// Minor device number.
        minor: u64,
    } = "controlling-terminal", "has the controlling terminal {major}:{minor} (start it with setsid and without a terminal)";
    /// Seccomp.
    Seccomp {
        /// 1 strict, 2 filter.
        mode: u32,
    } = "seccomp", "has a seccomp filter (mode {mode}), which is not carried yet (start it without one)";
    /// CET shadow stacks.
    ShadowStack = "shadow-stack", "uses a shadow stack, which is not carried (start it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off)";
    /// 32-bit code.
    CompatMode = "32-bit", "runs 32-bit code, which is not carried (use its 64-bit build)";
    /// A service manager or container runtime would start it again.
    Managed {
        /// Its control group.
        unit: String,
    } = "managed", "belongs to {unit}, whose manager would start it again here (--unmanaged once that is prevented)";
    /// Pages pinned for devices.
    Pinned {
        /// How much.
        kib: u64,
    } = "pinned", "has {kib} KiB of memory pinned for a device (close RDMA, vfio or io_uring buffers)";
    /// Memory policy of a thread.
    MemoryPolicy {
        /// `MPOL_*`.
        mode: u32,
    } = "memory-policy", "has the NUMA memory policy {mode}, which is not carried yet (start it without numactl)";
    /// Memory policy of a mapping.
    MappingPolicy {
        /// The kernel's words.
        policy: String,
    } = "mapping-policy", "has the NUMA memory policy {policy}, which is not carried yet (start it without numactl or mbind)";
    /// `PR_SET_MDWE`.
    DenyWriteExecute = "mdwe", "denies itself writable and executable memory (PR_SET_MDWE), which is not carried yet (start it without MemoryDenyWriteExecute)";
    /// `PR_SET_TSC`.
    TscTrap = "tsc-trap", "traps the time stamp counter (PR_SET_TSC), which is not carried (start it without)";
    /// `PR_MCE_KILL`.
    MceKill = "mce-kill", "has a memory failure policy of its own (PR_MCE_KILL), which is not carried (reset it)";
    /// `PR_SET_IO_FLUSHER`.
    IoFlusher = "io-flusher", "is part of a block device's I/O path (PR_SET_IO_FLUSHER) and cannot leave it (stop the device first)";
    /// `PR_SET_SYSCALL_USER_DISPATCH`.
    SyscallUserDispatch = "syscall-user-dispatch", "has its system calls dispatched to itself (PR_SET_SYSCALL_USER_DISPATCH, as Wine does), which is not carried (start it without)";
    /// `ARCH_REQ_XCOMP_PERM`.
    DynamicXstate {
        /// Components beyond the default ones.
        components: u64,
    } = "dynamic-xstate", "has asked for the processor state components {components:#x} (AMX), which are not carried yet (start it without)";

    // Mappings.

    /// Shared memory that a process outside of the tree reaches too.
    SharedOutside {
        /// The other processes.
        holders: Pids,
    } = "shared-outside", "is shared with process {holders}, which stays here (stop that process)";
    /// A shared object that is too large.
    SharedSize {
        /// Its size.
        bytes: u64,
    } = "shared-size", "is shared memory of {bytes} bytes, more than an address space has (make it smaller)";
    /// Too many shared objects.
    SharedCount {
        /// The limit.
        limit: usize,
    } = "shared-count", "is one more shared object than the {limit} that are carried (use fewer, larger ones)";
    /// System V shared memory that was moved to below its beginning, was not attached but mapped otherwise, or is of another ipc namespace.
    SysvMemory {
        /// The kernel's name of it.
        path: String,
    } = "sysv-memory", "maps the System V shared memory {path} in a way that cannot be made again (detach it)";
    /// A segment that others are attached to, who cannot be named.
    SysvOutside {
        /// Its number.
        id: i32,
        /// Their mappings.
        count: u64,
    } = "sysv-outside", "is the System V shared memory {id}, which is attached {count} time(s) by processes that cannot be seen from here (detach it there)";
    /// Huge pages of hugetlbfs.
    HugePages = "hugetlb", "uses hugetlb pages, which are not carried yet (use transparent huge pages)";
    /// A file that has no name any more.
    DeletedMapping {
        /// The name it had.
        path: String,
    } = "deleted-mapping", "maps the file {path}, which has another name now (restart the program after an upgrade)";
    /// A deleted file that is too large.
    GhostLimit {
        /// The name it had.
        path: String,
        /// What it takes.
        bytes: u64,
    } = "ghost-limit", "has the deleted file {path} of {bytes} bytes (--ghost-limit {bytes} to carry it)";
    /// A file that is carried, and has other names.
    HardLinks {
        /// One of its names.
        path: String,
        /// How many it has.
        count: u64,
    } = "hard-links", "has the file {path}, which has {count} names and is not carried yet (remove the others)";
    /// A file that is carried, and has extended attributes.
    FileAttributes {
        /// Its name.
        path: String,
    } = "file-attributes", "has the file {path} with extended attributes, which are not carried yet (remove them)";
    /// The path now leads to another file.
    ReplacedMapping {
        /// The path.
        path: String,
    } = "replaced-mapping", "maps a file that {path} no longer leads to (restart the program after an upgrade)";
    /// Shared and writable, on local storage.
    SharedWritable {
        /// The file.
        path: String,
    } = "shared-writable-mapping", "maps {path} shared and writable, which is on local storage (--same-file {path} if the target sees the same file)";
    /// AIO completion ring.
    AioRing = "aio-ring", "is the completion ring of an AIO context, which is not carried yet (start the program with its AIO turned off)";
    /// Memory of a device or of a kernel object.
    DeviceMapping {
        /// What is mapped.
        path: String,
    } = "device-mapping", "maps memory of {path}, which cannot leave this host (close that device)";
    /// `memfd_secret(2)`.
    SecretMemory = "secret-memory", "is secret memory (memfd_secret), which nobody else can read (start the program without)";
    /// A shadow stack.
    ShadowStackMapping = "shadow-stack-mapping", "is a shadow stack, which is not carried (start it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off)";
    /// Registered with a userfaultfd.
    UserfaultMapping = "userfault-mapping", "is registered with a userfaultfd (wait for the migration or snapshot that uses it to end)";
    /// `mseal(2)`.
    SealedMapping = "sealed-mapping", "is sealed (mseal), which is not carried yet (start the program without)";
    /// A protection key.
    ProtectionKey {
        /// The key.
        key: u32,
    } = "protection-key", "has the memory protection key {key}, which is not carried yet (start the program without)";
    /// Mapped by the kernel for a purpose unknown here.
    SpecialMapping {
        /// The kernel's name of it.
        path: String,
    } = "special-mapping", "is the kernel's own mapping {path}, which is not carried (remove the probe or device that made it)";
    /// A mapping above the addresses of 4-level page tables.
    HighMapping = "high-mapping", "lies above 128 TiB (57-bit addresses), which is not carried yet (start the program without)";

    // Descriptors.

    /// A connection, or one being made or closed.
    Tcp {
        /// State as netstat names it, in words.
        state: &'static str,
        /// Local address.
        local: String,
        /// Remote address.
        remote: String,
    } = "tcp", "{state} TCP {local} → {remote} (--tcp close to drop it)";
    /// Connections nobody has accepted yet.
    AcceptQueue {
        /// Local address.
        local: String,
        /// How many.
        count: u32,
    } = "accept-queue", "listening TCP {local} has {count} connection(s) waiting to be accepted (--tcp close to drop them)";
    /// `SO_ATTACH_FILTER`, `SO_ATTACH_BPF`.
    SocketFilter = "socket-filter", "has a BPF filter attached (SO_ATTACH_FILTER), which is not carried yet (SO_DETACH_FILTER it, or close the socket)";
    /// A UDP socket with a fixed peer.
    ConnectedUdp {
        /// Local address.
        local: String,
        /// Remote address.
        remote: String,
    } = "connected-udp", "connected UDP {local} → {remote}, which is not carried yet (close it)";
    /// A UNIX socket whose other end is elsewhere.
    UnixOutside {
        /// The other end's name, as ss(8) writes it.
        name: String,
        /// The other end's inode.
        inode: u64,
    } = "unix-outside", "UNIX connection to {name} (inode {inode}), which is outside of the tree (close it)";
    /// A UNIX socket whose path cannot be given again.
    UnixNamed {
        /// The name.
        name: String,
    } = "unix-named", "UNIX socket {name}, whose path is relative or goes back up, which is not carried (bind it by a plain absolute path)";
    /// Connections nobody has accepted yet.
    UnixAcceptQueue {
        /// The name.
        name: String,
        /// How many.
        count: u32,
    } = "unix-accept-queue", "listening UNIX socket {name} has {count} connection(s) waiting to be accepted, some from outside of the tree, closed, or with data sent, or its file is gone (let the program accept them)";
    /// A descriptor that travels in an unread message and is of no kind that is carried.
    UnixInFlight {
        /// Place of the message in the queue, from 1.
        message: usize,
        /// What would be said of the descriptor.
        what: String,
    } = "unix-in-flight", "UNIX socket whose unread message {message} brings this: {what}";
    /// An unread message whose sender was noted and will not be there.
    UnixSender {
        /// The sender; 0: of another pid namespace.
        pid: i32,
    } = "unix-sender", "UNIX socket with an unread message that process {pid} sent, which is not in the tree or has ended (let the program receive it)";
    /// A UNIX socket with unread out-of-band data, or one half torn down.
    UnixState {
        /// What is wrong.
        what: &'static str,
    } = "unix-state", "UNIX socket with {what}, which is not carried yet (close it)";
    /// Any other family or type.
    OtherSocket {
        /// Family and type in words.
        kind: String,
    } = "other-socket", "{kind} socket, which is not carried yet (close it)";
    /// A socket another process has too.
    SocketShared {
        /// The other processes.
        holders: Pids,
    } = "shared-socket", "socket that process {holders} holds too (close it there)";
    /// An option that names a network interface by its number here.
    InterfaceOption {
        /// Its name.
        what: &'static str,
    } = "interface-option", "socket with {what}, which names an interface of this host (use SO_BINDTODEVICE)";
    /// A pipe whose other end is elsewhere.
    PipeOutside {
        /// Inode.
        inode: u64,
        /// Who holds it.
        holders: Pids,
    } = "pipe-outside", "pipe:[{inode}] is also held by process {holders} (start it with its output in a file, or close it)";
    /// An end open for reading and writing.
    PipeBothWays {
        /// Inode.
        inode: u64,
    } = "pipe-both-ways", "pipe:[{inode}] is open for reading and writing at once, which is not carried yet (close it)";
    /// A pipe that holds more than bytes.
    PipeSpecial {
        /// What.
        what: &'static str,
    } = "pipe-special", "pipe {what}, which is not carried yet (drain it)";
    /// A named pipe whose name is gone.
    Fifo {
        /// Its path.
        path: String,
    } = "fifo", "named pipe that {path} no longer leads to, which is not carried (close it)";
    /// A named pipe that others have open too.
    FifoOutside {
        /// Its path.
        path: String,
        /// Who holds it.
        holders: Pids,
    } = "fifo-outside", "named pipe {path} is also held by process {holders} (close it there)";
    /// A terminal.
    Terminal {
        /// Its path.
        path: String,
    } = "terminal", "terminal {path} (start it with its input and output redirected)";
    /// A device other than null, zero, full, random, urandom.
    Device {
        /// Its path.
        path: String,
        /// Major device number.
        major: u64,
        /// Minor device number.
        minor: u64,
    } = "device", "device {path} ({major}:{minor}), which cannot leave this host (close it)";
    /// The program's own file was deleted.
    DeletedFile {
        /// The name it had.
        path: String,
    } = "deleted-file", "runs the deleted file {path} (restart the program after an upgrade)";
    /// The path leads elsewhere now.
    ReplacedFile {
        /// The path.
        path: String,
    } = "replaced-file", "file that {path} no longer leads to (reopen it, as after a log rotation)";
    /// Open for writing on local storage.
    WritableFile {
        /// The path.
        path: String,
    } = "writable-file", "{path} is open for writing on local storage (--same-file {path} if the target sees the same file)";
    /// A delegation, or a lock of a kind unknown here.
    FileLock {
        /// The path.
        path: String,
        /// The kernel's word, or its whole line.
        kind: String,
    } = "file-lock", "{kind} lock on {path}, which is not carried yet (release it)";
    /// A lease that could not be had again, or would be broken on the way.
    Lease {
        /// The path.
        path: String,
        /// Why, and what to do.
        why: &'static str,
    } = "lease", "lease on {path} {why}";
    /// A lock of an open file that is not the tree's alone.
    LockOutside {
        /// The path.
        path: String,
        /// Who has the open file too.
        holders: Pids,
    } = "lock-outside", "has a lock on {path} together with process {holders}, which stays here (close it there)";
    /// `O_PATH`.
    PathOnly {
        /// The path.
        path: String,
    } = "path-only", "{path} is open with O_PATH, which is not carried yet (close it)";
    /// proc, sysfs, cgroup and their like.
    KernelFile {
        /// The path.
        path: String,
    } = "kernel-file", "{path} is a file of the kernel and means this host (close it)";
    /// A memfd whose name cannot be told again.
    Memfd {
        /// Its name.
        path: String,
    } = "memfd", "memfd {path}, whose name is no UTF-8 text (give it another)";
    /// `MFD_HUGETLB`.
    MemfdHuge {
        /// Its name.
        path: String,
    } = "memfd-hugetlb", "memfd {path} of hugetlb pages, which are not carried yet (use transparent huge pages)";
    /// inotify.
    Inotify = "inotify", "inotify instance, which is not carried yet (close it)";
    /// fanotify.
    Fanotify = "fanotify", "fanotify group, which is not carried (close it)";
    /// A pidfd.
    Pidfd = "pidfd", "pidfd, which is not carried yet (close it)";
    /// io_uring.
    IoUring = "io-uring", "io_uring instance, which is not carried (start the program with its io_uring turned off)";
    /// userfaultfd.
    Userfaultfd = "userfaultfd", "userfaultfd, which is not carried (wait for its user to be done)";
    /// perf events.
    PerfEvent = "perf-event", "perf event, which counts on this host's processor (stop the profiler)";
    /// BPF objects.
    Bpf {
        /// The kernel's name.
        name: String,
    } = "bpf", "{name}, which is an object of this kernel (close it)";
    /// A namespace descriptor.
    NamespaceFile {
        /// The kernel's name.
        name: String,
    } = "namespace-file", "namespace {name}, which stays on this host (close it)";
    /// Anything else without a path.
    KernelObject {
        /// The kernel's name.
        name: String,
    } = "kernel-object", "{name}, which is not carried (close it)";
    /// A watch on a file that is not, or no longer, the descriptor it was added under.
    EpollForeign {
        /// The watched descriptor number.
        fd: u32,
    } = "epoll-foreign", "epoll instance watches fd {fd}, which is closed or another file now (remove the watch before closing)";
    /// A timerfd on an alarm clock or with a cancel flag that cannot be made again.
    TimerClock {
        /// The clock.
        clock: i32,
    } = "timer-clock", "timer on the clock {clock}, which counts a processor or process of this host (delete it)";
    /// A POSIX timer that tells a thread that has ended.
    TimerTarget {
        /// Timer id.
        id: u32,
    } = "timer-target", "POSIX timer {id} tells a thread that has ended (delete it)";
    /// `F_SETOWN` to somebody else.
    SignalOwner {
        /// Process, thread or group.
        id: i32,
    } = "signal-owner", "signals its readiness to {id}, which stays here (reset it with F_SETOWN)";
    /// Working directory gone.
    DeletedDirectory {
        /// The name it had.
        path: String,
    } = "deleted-directory", "the deleted directory {path} (let it change to another)";
    /// A path that is not UTF-8 or not absolute as pageferry sees it.
    UnreachablePath {
        /// As far as it can be shown.
        path: String,
    } = "unreachable-path", "{path} cannot be reached by that name from here (reopen it by an absolute UTF-8 path)";
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_refusal_reads_as_promised() {
        let refusal = Refusal {
            pid: 4711,
            object: Object::Fd(9),
            what: RefusalKind::Tcp {
                state: "established",
                local: "10.0.0.1:6379".into(),
                remote: "10.0.0.9:51234".into(),
            },
        };
        assert_eq!(
            refusal.to_string(),
            "pid 4711 fd 9: established TCP 10.0.0.1:6379 → 10.0.0.9:51234 (--tcp close to drop it)"
        );
    }

    #[test]
    fn every_kind_has_one_row_in_the_coverage_table() {
        let text = include_str!("../../../docs/coverage.md");
        let (_, text) = text.split_once("\n## Refused by name").expect("a heading");
        let rows: Vec<&str> = text
            .lines()
            .filter_map(|line| {
                line.strip_prefix("| `")?
                    .split_once('`')
                    .map(|(key, _)| key)
            })
            .collect();
        let distinct: BTreeSet<&str> = rows.iter().copied().collect();
        assert_eq!(rows.len(), distinct.len(), "a row appears twice");
        let keys: BTreeSet<&str> = RefusalKind::KEYS.iter().copied().collect();
        assert_eq!(keys.len(), RefusalKind::KEYS.len(), "a key appears twice");
        assert_eq!(distinct, keys);
    }

    #[test]
    fn long_pid_lists_are_cut() {
        assert_eq!(Pids(vec![1, 2]).to_string(), "1, 2");
        assert_eq!(
            Pids((1..=7).collect()).to_string(),
            "1, 2, 3, 4, 5 and 2 more"
        );
    }
}
