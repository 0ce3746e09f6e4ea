//! Descriptors and open file descriptions: what each one is, whether it can be opened or made again, and its state.
//!
//! Only copies of descriptors are used, and nothing is read from or written to through them: a pipe's content is duplicated
//! inside the kernel (tee(2)). Descriptors that share an open file description are found by the kernel's own order of them.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::statfs::statfs;
use pageferry_image::model::files::{
    Descriptor, Device, Directory, Epoll, EpollItem, Eventfd, File, Owner, Pipe, PipeEnd, Regular,
    Signalfd, Timerfd, file,
};
use pageferry_image::model::memory::FileIdentity;
use pageferry_tracee::choke::{self, Kind as Call};
use pageferry_tracee::descriptor::{self, PidFd};
use pageferry_tracee::procfs::{self, DescriptorEntry};
use pageferry_tracee::{Error as ProcessError, pipe};

use super::sockets;
use crate::identity;
use crate::survey::{Object, Pids, Refusal, RefusalKind, SurveyOptions};
use crate::{Error, Result};

/// Either the thing or why it is refused.
pub(crate) type Verdict<T> = std::result::Result<T, RefusalKind>;

/// File systems on which one file is the same file on every host that mounts them (`statfs(2)` magic numbers): NFS, CIFS,
/// SMB, Ceph, AFS, GFS2, OCFS2, Lustre. FUSE is not among them: it may be anything.
const SHARED_STORAGE: [i64; 9] = [
    0x6969,
    0xff53_4d42,
    0xfe53_4d42,
    0x517b,
    0x00c3_6400,
    0x5346_414f,
    0x0116_1970,
    0x7461_636f,
    0x0bd0_0bd0,
];
/// File systems whose files are the kernel's own: proc, sysfs, cgroup, cgroup2, debugfs, tracefs, securityfs, bpf, devpts,
/// mqueue, nsfs, pstore, efivarfs, binfmt_misc, configfs, selinuxfs, fusectl, hugetlbfs.
const KERNEL_STORAGE: [i64; 18] = [
    0x9fa0,
    0x6265_6572,
    0x0027_e0eb,
    0x6367_7270,
    0x6462_6720,
    0x7472_6163,
    0x7363_6673,
    0xcafe_4a11,
    0x1cd1,
    0x1980_0202,
    0x6e73_6673,
    0x6165_676c,
    0xde5e_81e4,
    0x4249_4e4d,
    0x6265_6570,
    0xf97c_ff8c,
    0x6573_5543,
    0x9584_58f6,
];
/// Memory devices that are the same on every host, by minor number (major 1).
const MEMORY_DEVICES: [(u64, &str); 5] = [
    (3, "/dev/null"),
    (5, "/dev/zero"),
    (7, "/dev/full"),
    (8, "/dev/random"),
    (9, "/dev/urandom"),
];
const MEMORY_MAJOR: u64 = 1;
/// Consoles, `/dev/tty` and `/dev/ptmx`, pseudo-terminals.
const TERMINAL_MAJORS: [std::ops::RangeInclusive<u64>; 2] = [4..=5, 136..=143];

/// A process being looked at, and what is already known of its files: a library is examined once, not once a mapping.
#[derive(Debug)]
pub(crate) struct Look<'a> {
    pub pid: i32,
    pub options: &'a SurveyOptions,
    pub known: KnownFiles,
}

/// Identities already read, by path and whether the file must be the same one; with the device and inode they were read for.
#[derive(Debug, Clone, Default)]
pub(crate) struct KnownFiles(BTreeMap<(String, bool), (u64, u64, FileIdentity)>);

impl KnownFiles {
    /// Writes what the host still holds of the files the process may have changed to their storage, where the target reads them:
    /// its own cache does not know of ours, and ours would be written over what the process writes there. Waits for that as
    /// long as `limit`; the survey does it first, so that little is left in the freeze.
    ///
    /// # Errors
    /// [`Error::File`], after the time with [`ErrorKind::TimedOut`].
    pub(crate) fn sync_written(&self, limit: Duration) -> Result<()> {
        let shared = self.0.keys().filter(|(_, shared)| *shared);
        let paths: Vec<String> = shared.map(|(path, _)| path.clone()).collect();
        if paths.is_empty() {
            return Ok(());
        }
        let failed = |path: &str, source| Error::File {
            path: path.to_owned(),
            source,
        };
        // A call on a network file system whose server is gone does not come back, and cannot be taken back.
        let (tell, told) = mpsc::channel();
        let wanted = paths.clone();
        std::thread::Builder::new()
            .name("sync".into())
            .spawn(move || {
                for path in wanted {
                    if tell.send(sync(&path)).is_err() {
                        return;
                    }
                }
            })
            .map_err(|error| failed(&paths[0], error))?;
        let until = Instant::now() + limit;
        for path in &paths {
            told.recv_timeout(until.saturating_duration_since(Instant::now()))
                .unwrap_or_else(|_| {
                    let text = format!("its storage took longer than {limit:?} to write");
                    Err(std::io::Error::new(ErrorKind::TimedOut, text))
                })
                .map_err(|error| failed(path, error))?;
        }
        Ok(())
    }

    /// All of them.
    pub(crate) fn identities(&self) -> Vec<FileIdentity> {
        self.0
            .values()
            .map(|(_, _, identity)| identity.clone())
            .collect()
    }
}

/// What of the file at `path` is not on its storage yet goes there.
fn sync(path: &str) -> std::io::Result<()> {
    // By now there may be nothing under that name, or something else.
    let opened = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    match opened.and_then(|file| file.sync_data()) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        synced => synced,
    }
}

impl Look<'_> {
    pub(crate) fn known_file(
        &self,
        path: &str,
        must_be_shared: bool,
        device: u64,
        inode: u64,
    ) -> Option<FileIdentity> {
        // A map needs the key's own type; the strings are short and there are few.
        let (known_device, known_inode, identity) =
            self.known.0.get(&(path.to_owned(), must_be_shared))?;
        ((*known_device, *known_inode) == (device, inode)).then(|| identity.clone())
    }

    pub(crate) fn identify(
        &mut self,
        path: &str,
        must_be_shared: bool,
        device: u64,
        inode: u64,
    ) -> Result<FileIdentity> {
        let identity = identity::identify(path, self.options.file_check, must_be_shared)?;
        self.known.0.insert(
            (path.to_owned(), must_be_shared),
            (device, inode, identity.clone()),
        );
        Ok(identity)
    }

    /// Notes a directory that the target must have.
    pub(crate) fn directory(&mut self, path: &str, metadata: &Metadata) {
        let identity = identity::outline(path, metadata, false);
        self.known.0.insert(
            (path.to_owned(), false),
            (metadata.dev(), metadata.ino(), identity),
        );
    }

    /// Whether what is written to `path` here is what the target reads there.
    pub(crate) fn on_shared_storage(&self, path: &str) -> Result<bool> {
        if self
            .options
            .same_file
            .iter()
            .any(|prefix| std::path::Path::new(path).starts_with(prefix))
        {
            return Ok(true);
        }
        Ok(SHARED_STORAGE.contains(&storage(path)?))
    }
}

/// The file system `path` is on.
fn storage(path: &str) -> Result<i64> {
    // Magic numbers above 2^31 come sign-extended from some architectures' statfs.
    statfs(path)
        .map(|answer| answer.filesystem_type().0 & 0xffff_ffff)
        .map_err(|errno| Error::File {
            path: path.to_owned(),
            source: errno.into(),
        })
}

pub(crate) fn same_inode(a: &Metadata, b: &Metadata) -> bool {
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

/// What a descriptor refers to, as far as the survey has to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Shape {
    Regular(FileIdentity),
    Directory(String),
    Device { path: &'static str, rdev: u64 },
    Pipe { inode: u64, write_end: bool },
    Eventfd,
    Epoll,
    Timerfd,
    Signalfd,
    Socket { inode: u64 },
}

/// Access mode of a descriptor.
fn access(entry: &DescriptorEntry) -> i32 {
    (entry.info.flags as i32) & libc::O_ACCMODE
}

/// What `entry` refers to.
pub(crate) fn shape(look: &mut Look<'_>, entry: &DescriptorEntry) -> Result<Verdict<Shape>> {
    let link = entry.link.as_str();
    if let Some(inode) = entry.pipe_or_socket_inode() {
        if link.starts_with("socket:") {
            return Ok(Ok(Shape::Socket { inode }));
        }
        return Ok(match access(entry) {
            libc::O_RDWR => Err(RefusalKind::PipeBothWays { inode }),
            mode => Ok(Shape::Pipe {
                inode,
                write_end: mode == libc::O_WRONLY,
            }),
        });
    }
    if let Some(name) = link.strip_prefix("anon_inode:") {
        return Ok(anonymous_shape(name));
    }
    if link.starts_with("/memfd:") {
        return Ok(Err(RefusalKind::Memfd {
            path: link.to_owned(),
        }));
    }
    if link.starts_with("pidfd:") {
        return Ok(Err(RefusalKind::Pidfd));
    }
    if !link.starts_with('/') {
        let name = link.to_owned();
        let is_namespace = [
            "cgroup:", "ipc:", "mnt:", "net:", "pid:", "time:", "user:", "uts:",
        ]
        .iter()
        .any(|kind| link.starts_with(kind));
        return Ok(Err(if is_namespace {
            RefusalKind::NamespaceFile { name }
        } else {
            RefusalKind::KernelObject { name }
        }));
    }
    named_shape(look, entry)
}

fn anonymous_shape(name: &str) -> Verdict<Shape> {
    match name.trim_matches(['[', ']']) {
        "eventfd" => Ok(Shape::Eventfd),
        "eventpoll" => Ok(Shape::Epoll),
        "timerfd" => Ok(Shape::Timerfd),
        "signalfd" => Ok(Shape::Signalfd),
        "inotify" => Err(RefusalKind::Inotify),
        "fanotify" => Err(RefusalKind::Fanotify),
        "pidfd" => Err(RefusalKind::Pidfd),
        "io_uring" => Err(RefusalKind::IoUring),
        "userfaultfd" => Err(RefusalKind::Userfaultfd),
        "perf_event" => Err(RefusalKind::PerfEvent),
        other if other.starts_with("bpf") => Err(RefusalKind::Bpf {
            name: other.to_owned(),
        }),
        other => Err(RefusalKind::KernelObject {
            name: other.to_owned(),
        }),
    }
}

fn named_shape(look: &mut Look<'_>, entry: &DescriptorEntry) -> Result<Verdict<Shape>> {
    let through = format!("/proc/{}/fd/{}", look.pid, entry.fd);
    let path = entry.link.clone();
    if (entry.info.flags as i32) & libc::O_PATH != 0 {
        return Ok(Err(RefusalKind::PathOnly { path }));
    }
    choke::pass(Call::Proc).map_err(|errno| ProcessError::path("stat", through.as_str(), errno))?;
    let open = std::fs::metadata(&through).map_err(|source| Error::File {
        path: path.clone(),
        source,
    })?;
    let file_type = open.file_type();
    if file_type.is_fifo() {
        return Ok(Err(RefusalKind::Fifo { path }));
    }
    if file_type.is_char_device() || file_type.is_block_device() {
        return Ok(device_shape(path, &open));
    }
    if KERNEL_STORAGE.contains(&storage(&through)?) {
        return Ok(Err(RefusalKind::KernelFile { path }));
    }
    if let Some(lock) = entry.info.locks.first() {
        // `1: POSIX  ADVISORY  WRITE 4711 08:01:99 0 EOF`
        let kind = lock
            .split_ascii_whitespace()
            .nth(1)
            .unwrap_or("file")
            .to_owned();
        return Ok(Err(RefusalKind::FileLock { path, kind }));
    }
    let named = std::fs::metadata(&path);
    if file_type.is_dir() {
        return Ok(match named {
            Ok(named) if same_inode(&open, &named) => {
                look.directory(&path, &named);
                Ok(Shape::Directory(path))
            }
            Ok(_) => Err(RefusalKind::UnreachablePath { path }),
            Err(_) => Err(RefusalKind::DeletedDirectory { path }),
        });
    }
    match named {
        Ok(named) if same_inode(&open, &named) => {}
        _ if open.nlink() == 0 => {
            return Ok(Err(RefusalKind::DeletedFile {
                path: path.trim_end_matches(" (deleted)").to_owned(),
            }));
        }
        _ => {
            return Ok(Err(RefusalKind::ReplacedFile {
                path: path.trim_end_matches(" (deleted)").to_owned(),
            }));
        }
    }
    let writable = access(entry) != libc::O_RDONLY;
    if writable && !look.on_shared_storage(&path)? {
        return Ok(Err(RefusalKind::WritableFile { path }));
    }
    let identity = match look.known_file(&path, writable, open.dev(), open.ino()) {
        Some(known) => known,
        None => look.identify(&path, writable, open.dev(), open.ino())?,
    };
    Ok(Ok(Shape::Regular(identity)))
}

fn device_shape(path: String, open: &Metadata) -> Verdict<Shape> {
    let (major, minor) = (
        nix::sys::stat::major(open.rdev()),
        nix::sys::stat::minor(open.rdev()),
    );
    let is_character = open.file_type().is_char_device();
    let known = MEMORY_DEVICES.iter().find(|&&(number, _)| number == minor);
    match known {
        Some(&(_, path)) if is_character && major == MEMORY_MAJOR => Ok(Shape::Device {
            path,
            rdev: open.rdev(),
        }),
        _ if is_character && TERMINAL_MAJORS.iter().any(|majors| majors.contains(&major)) => {
            Err(RefusalKind::Terminal { path })
        }
        _ => Err(RefusalKind::Device { path, major, minor }),
    }
}

/// A descriptor table with everything in it that is carried.
#[derive(Debug, Default)]
pub(crate) struct Table {
    pub descriptors: Vec<Descriptor>,
    pub files: Vec<File>,
    pub pipes: Vec<Pipe>,
    pub refusals: Vec<Refusal>,
    /// Inodes of all pipes and sockets, for the question who else holds them.
    pub inodes: BTreeSet<u64>,
}

/// How deep a look at the table goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    /// Whether everything can be carried; the process runs.
    Survey,
    /// With everything needed to make it again; the process is frozen.
    Capture,
}

/// Looks at the whole descriptor table.
pub(crate) fn table(
    look: &mut Look<'_>,
    entries: &[DescriptorEntry],
    depth: Depth,
) -> Result<Table> {
    let pidfd = PidFd::open(look.pid)?;
    let groups = shared_groups(look.pid, entries, depth)?;
    let mut table = Table::default();
    let mut sockets = sockets::Pairs::new(entries);
    let mut pipes: BTreeMap<u64, Pipe> = BTreeMap::new();
    for (index, group) in groups.iter().enumerate() {
        let id = u32::try_from(index + 1).unwrap_or(u32::MAX);
        // A group is never empty: it is made of the entries.
        let entry = group[0];
        match file(
            look,
            &pidfd,
            entry,
            entries,
            depth,
            &mut sockets,
            &mut pipes,
        ) {
            Ok(Ok((kind, owner))) => {
                table.files.push(File {
                    id,
                    flags: entry.info.flags & !(libc::O_CLOEXEC as u32),
                    owner,
                    kind: Some(kind),
                });
                table
                    .descriptors
                    .extend(group.iter().map(|entry| Descriptor {
                        fd: entry.fd,
                        file: id,
                        close_on_exec: entry.info.close_on_exec(),
                    }));
            }
            Ok(Err(what)) => table.refusals.push(Refusal {
                pid: look.pid,
                object: Object::Fd(entry.fd),
                what,
            }),
            // Closed while we looked: only a running process can do that.
            Err(Error::Process(
                ProcessError::Kernel {
                    errno: Errno::EBADF,
                    ..
                }
                | ProcessError::Path {
                    errno: Errno::ENOENT,
                    ..
                },
            )) if depth == Depth::Survey => {}
            Err(Error::File { source, .. })
                if depth == Depth::Survey && source.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        table.inodes.extend(entry.pipe_or_socket_inode());
    }
    table.descriptors.sort_by_key(|descriptor| descriptor.fd);
    table.pipes = pipes.into_values().collect();
    Ok(table)
}

/// Entries by open file description, in order of their lowest descriptor.
fn shared_groups(
    pid: i32,
    entries: &[DescriptorEntry],
    depth: Depth,
) -> Result<Vec<Vec<&DescriptorEntry>>> {
    if depth == Depth::Survey {
        return Ok(entries.iter().map(|entry| vec![entry]).collect());
    }
    // Only descriptors that look alike in all that belongs to the description can be one: few, so few questions.
    let mut alike: BTreeMap<_, Vec<&DescriptorEntry>> = BTreeMap::new();
    for entry in entries {
        let info = &entry.info;
        let key = (
            entry.link.as_str(),
            info.ino,
            info.mnt_id,
            info.position,
            info.flags & !(libc::O_CLOEXEC as u32),
        );
        alike.entry(key).or_default().push(entry);
    }
    let mut groups: Vec<Vec<&DescriptorEntry>> = Vec::new();
    for mut candidates in alike.into_values() {
        let mut failure = None;
        candidates.sort_by(|a, b| {
            descriptor::order(pid, a.fd, pid, b.fd).unwrap_or_else(|error| {
                failure.get_or_insert(error);
                Ordering::Equal
            })
        });
        if let Some(error) = failure {
            return Err(error.into());
        }
        let mut previous: Option<&DescriptorEntry> = None;
        for entry in candidates {
            let shares = match previous {
                Some(previous) => descriptor::same_file(pid, previous.fd, pid, entry.fd)?,
                None => false,
            };
            match groups.last_mut() {
                Some(group) if shares => group.push(entry),
                _ => groups.push(vec![entry]),
            }
            previous = Some(entry);
        }
    }
    for group in &mut groups {
        group.sort_by_key(|entry| entry.fd);
    }
    groups.sort_by_key(|group| group[0].fd);
    Ok(groups)
}

type Made = (file::Kind, Option<Owner>);

fn file(
    look: &mut Look<'_>,
    pidfd: &PidFd,
    entry: &DescriptorEntry,
    entries: &[DescriptorEntry],
    depth: Depth,
    sockets: &mut sockets::Pairs,
    pipes: &mut BTreeMap<u64, Pipe>,
) -> Result<Verdict<Made>> {
    let shape = match shape(look, entry)? {
        Ok(shape) => shape,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let info = &entry.info;
    let malformed = |what| ProcessError::Malformed {
        path: format!("/proc/{}/fdinfo/{}", look.pid, entry.fd),
        what,
    };
    let can_signal = matches!(shape, Shape::Pipe { .. } | Shape::Socket { .. });
    let kind = match shape {
        Shape::Regular(identity) => file::Kind::Regular(Regular {
            identity: Some(identity),
            position: info.position,
        }),
        Shape::Directory(path) => file::Kind::Directory(Directory {
            path,
            position: info.position,
        }),
        Shape::Device { path, rdev } => file::Kind::Device(Device {
            path: path.to_owned(),
            rdev,
            position: info.position,
        }),
        Shape::Eventfd => {
            let eventfd = info.eventfd.ok_or_else(|| malformed("eventfd"))?;
            // Before 6.5 the kernel does not say, and a semaphore that comes back as a counter is silently wrong.
            let semaphore = eventfd.semaphore.ok_or(ProcessError::Unsupported {
                what: "eventfd-semaphore in fdinfo (Linux 6.5)",
            })?;
            file::Kind::Eventfd(Eventfd {
                count: eventfd.count,
                semaphore,
            })
        }
        Shape::Timerfd => {
            let timer = info.timerfd.ok_or_else(|| malformed("timerfd"))?;
            file::Kind::Timerfd(Timerfd {
                clock: timer.clock,
                ticks: timer.ticks,
                settime_flags: timer.settime_flags,
                value_ns: timer.value_ns,
                interval_ns: timer.interval_ns,
            })
        }
        Shape::Signalfd => file::Kind::Signalfd(Signalfd {
            mask: info.signalfd_mask.ok_or_else(|| malformed("sigmask"))?,
        }),
        Shape::Epoll => match epoll(look.pid, entry, entries)? {
            Ok(epoll) => file::Kind::Epoll(epoll),
            Err(refusal) => return Ok(Err(refusal)),
        },
        Shape::Pipe { inode, write_end } => {
            let next = u32::try_from(pipes.len() + 1).unwrap_or(u32::MAX);
            let pipe = pipes.entry(inode).or_insert(Pipe {
                id: next,
                capacity: 0,
                content: Vec::new(),
            });
            let copy = pidfd.get_fd(entry.fd)?;
            pipe.capacity = pipe::capacity(&copy)?;
            let unread = pipe::unread_bytes(&copy)?;
            if (info.flags as i32) & libc::O_DIRECT != 0 && unread > 0 {
                return Ok(Err(RefusalKind::PipeSpecial {
                    what: "in packet mode holds unread packets",
                }));
            }
            if depth == Depth::Capture && !write_end && pipe.content.is_empty() {
                pipe.content = pipe::contents(&copy)?;
            }
            file::Kind::Pipe(PipeEnd {
                pipe: pipe.id,
                write_end,
            })
        }
        Shape::Socket { inode } => {
            let copy = pidfd.get_fd(entry.fd)?;
            match sockets::socket(look, entry, inode, copy.as_fd(), depth, sockets)? {
                Ok(socket) => file::Kind::Socket(socket),
                Err(refusal) => return Ok(Err(refusal)),
            }
        }
    };
    if !can_signal && (info.flags as i32) & libc::O_ASYNC == 0 {
        return Ok(Ok((kind, None)));
    }
    Ok(owner(look.pid, pidfd, entry.fd)?.map(|owner| (kind, owner)))
}

/// Who is signalled when the descriptor becomes ready.
fn owner(pid: i32, pidfd: &PidFd, fd: u32) -> Result<Verdict<Option<Owner>>> {
    const F_OWNER_TID: u32 = 0;
    const F_OWNER_PID: u32 = 1;
    let copy = pidfd.get_fd(fd)?;
    let owner = descriptor::owner(copy.as_fd())?;
    let carried = Owner {
        kind: owner.kind,
        id: owner.id,
        signo: owner.signo,
    };
    Ok(match owner.id {
        0 if owner.signo == 0 => Ok(None),
        0 => Ok(Some(carried)),
        id if owner.kind == F_OWNER_PID && id == pid => Ok(Some(carried)),
        id if owner.kind == F_OWNER_TID && procfs::tids(pid)?.contains(&id) => Ok(Some(carried)),
        id => Err(RefusalKind::SignalOwner { id }),
    })
}

fn epoll(pid: i32, entry: &DescriptorEntry, entries: &[DescriptorEntry]) -> Result<Verdict<Epoll>> {
    let mut items = Vec::with_capacity(entry.info.epoll.len());
    let mut seen = BTreeSet::new();
    for item in &entry.info.epoll {
        let foreign = Ok(Err(RefusalKind::EpollForeign { fd: item.fd }));
        // Two watches under one number: the first file was closed and lives on elsewhere.
        if !seen.insert(item.fd) || !entries.iter().any(|other| other.fd == item.fd) {
            return foreign;
        }
        match descriptor::epoll_watches(pid, entry.fd, item.fd, 0, item.fd) {
            Ok(true) => items.push(EpollItem {
                fd: item.fd,
                events: item.events,
                data: item.data,
            }),
            Ok(false)
            | Err(ProcessError::Kernel {
                errno: Errno::ENOENT | Errno::EBADF,
                ..
            }) => return foreign,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Ok(Epoll { items }))
}

/// Pipes and sockets of the table that other processes hold too.
pub(crate) fn held_outside(
    pid: i32,
    entries: &[DescriptorEntry],
    inodes: &BTreeSet<u64>,
) -> Result<Vec<Refusal>> {
    let holders = procfs::pipe_or_socket_holders(inodes)?;
    let mut found = Vec::new();
    for entry in entries {
        let Some(inode) = entry.pipe_or_socket_inode() else {
            continue;
        };
        // Our own copies, taken for this very look, do not count.
        let own = std::process::id() as i32;
        let others: Vec<i32> = holders
            .get(&inode)
            .into_iter()
            .flatten()
            .copied()
            .filter(|&holder| holder != pid && holder != own)
            .collect();
        if others.is_empty() {
            continue;
        }
        let holders = Pids(others);
        let what = if entry.link.starts_with("pipe:") {
            RefusalKind::PipeOutside { inode, holders }
        } else {
            RefusalKind::SocketShared { holders }
        };
        found.push(Refusal {
            pid,
            object: Object::Fd(entry.fd),
            what,
        });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anonymous_inodes_are_named() {
        assert_eq!(anonymous_shape("[eventfd]"), Ok(Shape::Eventfd));
        assert_eq!(anonymous_shape("inotify"), Err(RefusalKind::Inotify));
        assert_eq!(
            anonymous_shape("bpf-map"),
            Err(RefusalKind::Bpf {
                name: "bpf-map".into()
            })
        );
        assert_eq!(
            anonymous_shape("[nobody knows]"),
            Err(RefusalKind::KernelObject {
                name: "nobody knows".into()
            })
        );
    }
}
