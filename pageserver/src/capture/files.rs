//! Descriptors and open file descriptions: what each one is, whether it can be opened or made again, and its state.
//!
//! Only copies of descriptors are used, and nothing is read from or written to through them: a pipe's content is duplicated
//! inside the kernel (tee(2)). Descriptors that share an open file description are found by the kernel's own order of them.

mod fifos;

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, btree_map};
use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::{
    DirEntryExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _,
};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::statfs::statfs;
use pageferry_image::model::files::{
    Descriptor, Device, Directory, Epoll, EpollItem, Eventfd, Fifo, File, Owner, Pipe, PipeEnd,
    Regular, SharedFile, Signalfd, Timerfd, file,
};
use pageferry_image::model::memory::FileIdentity;
use pageferry_tracee::choke::{self, Kind as Call};
use pageferry_tracee::descriptor::{self, PidFd};
use pageferry_tracee::procfs::{self, DescriptorEntry};
use pageferry_tracee::{Error as ProcessError, pipe};

use super::locks::{self, Leased};
use super::shared::Objects;
use super::sockets::{self, flight, flight::InFlight};
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
/// File systems whose files no other host sees, whatever the operator has not said: tmpfs, ext2 to ext4, XFS, Btrfs, F2FS.
const LOCAL_STORAGE: [i64; 5] = [TMPFS, 0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010];
/// tmpfs, of `statfs(2)`.
pub(crate) const TMPFS: i64 = 0x0102_1994;
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
    pub shared: Objects,
    /// The processes of the tree.
    pub pids: &'a [i32],
    /// Children of theirs that have ended, as far as they are known yet.
    pub ended: Vec<i32>,
    /// What they have a lease on.
    pub leased: Leased,
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
        let open = || match self.leased.copy((device, inode)) {
            Some(copy) => copy,
            None => identity::open(path),
        };
        let identity = identity::identify(path, self.options.file_check, must_be_shared, open)?;
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
        Ok(self.is_same_file(path) || SHARED_STORAGE.contains(&storage(path)?))
    }

    /// Whether what an open file leads to is certainly seen by no other host.
    fn is_local(&self, entry: &DescriptorEntry) -> bool {
        let through = format!("/proc/{}/fd/{}", self.pid, entry.fd);
        let is_of_host = |magic| LOCAL_STORAGE.contains(&magic);
        !self.is_same_file(&entry.link) && storage(&through).is_ok_and(is_of_host)
    }

    /// Whether the operator says so.
    pub(crate) fn is_same_file(&self, path: &str) -> bool {
        let mut prefixes = self.options.same_file.iter();
        prefixes.any(|prefix| std::path::Path::new(path).starts_with(prefix))
    }

    /// Whether the file at `path` goes with the tree: it is on a tmpfs, and the tree writes it. `writable`: here it does.
    pub(crate) fn goes_along(&mut self, path: &str, writable: bool, inode: u64) -> Result<bool> {
        if self.is_same_file(path) || storage(path)? != TMPFS {
            return Ok(false);
        }
        Ok(writable || self.shared.is_written(self.pids, inode)?)
    }
}

/// The file system `path` is on.
pub(crate) fn storage(path: &str) -> Result<i64> {
    // Magic numbers above 2^31 come sign-extended from some architectures' statfs.
    statfs(path)
        .map(|answer| answer.filesystem_type().0 & 0xffff_ffff)
        .map_err(|errno| Error::File {
            path: path.to_owned(),
            source: errno.into(),
        })
}

/// The name of a file on a tmpfs that was opened by another, which is gone: sem_open(3) makes a semaphore under a name of its own and
/// then gives it the one it was asked for. `path` itself for all other files.
pub(crate) fn present_name(path: String, open: &Metadata) -> Result<String> {
    let Some(gone) = path.strip_suffix(" (deleted)") else {
        return Ok(path);
    };
    let folder = std::path::Path::new(gone).parent();
    let Some(folder) = folder.filter(|folder| folder.is_dir() && open.nlink() > 0) else {
        return Ok(path);
    };
    let failed = |source| Error::File {
        path: folder.display().to_string(),
        source,
    };
    if storage(&folder.display().to_string())? != TMPFS {
        return Ok(path);
    }
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.ino() != open.ino() {
            continue;
        }
        let is_it = entry.metadata().is_ok_and(|found| same_inode(&found, open));
        if let (true, Some(name)) = (is_it, entry.path().to_str()) {
            return Ok(name.to_owned());
        }
    }
    Ok(path)
}

pub(crate) fn same_inode(a: &Metadata, b: &Metadata) -> bool {
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

/// What a descriptor refers to, as far as the survey has to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Shape {
    Regular(FileIdentity),
    Shared { object: u32 },
    Directory(String),
    Device { path: &'static str, rdev: u64 },
    Pipe { inode: u64, write_end: bool },
    Fifo(Fifo),
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
        return memfd_shape(look, entry);
    }
    if link == "/secretmem (deleted)" {
        return Ok(Err(RefusalKind::SecretMemory));
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

fn memfd_shape(look: &mut Look<'_>, entry: &DescriptorEntry) -> Result<Verdict<Shape>> {
    let path = entry.link.clone();
    if (entry.info.flags as i32) & libc::O_PATH != 0 {
        return Ok(Err(RefusalKind::PathOnly { path }));
    }
    opened_object(look, entry, &path)
}

fn opened_object(
    look: &mut Look<'_>,
    entry: &DescriptorEntry,
    name: &str,
) -> Result<Verdict<Shape>> {
    // Before it is opened.
    if locks::is_leased(entry) {
        return Ok(Err(RefusalKind::Lease {
            path: name.to_owned(),
            why: locks::GOES_ALONG,
        }));
    }
    let limit = look.options.ghost_limit;
    let object = look.shared.opened(look.pid, entry.fd, name, limit)?;
    Ok(object.map(|object| Shape::Shared { object }))
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
        return Ok(fifos::shape(path, &open));
    }
    if file_type.is_char_device() || file_type.is_block_device() {
        return Ok(device_shape(path, &open));
    }
    if KERNEL_STORAGE.contains(&storage(&through)?) {
        return Ok(Err(RefusalKind::KernelFile { path }));
    }
    let path = present_name(path, &open)?;
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
    let writable = access(entry) != libc::O_RDONLY;
    match named {
        Ok(named) if same_inode(&open, &named) => {
            if look.goes_along(&path, writable, open.ino())? {
                return opened_object(look, entry, &path);
            }
        }
        _ if open.nlink() == 0 => return opened_object(look, entry, &path),
        _ => {
            return Ok(Err(RefusalKind::ReplacedFile {
                path: path.trim_end_matches(" (deleted)").to_owned(),
            }));
        }
    }
    if writable && !look.on_shared_storage(&path)? {
        return Ok(Err(RefusalKind::WritableFile { path }));
    }
    if locks::is_leased_alone(entry) {
        let is_opened_there = !look.options.at_rest && look.on_shared_storage(&path)?;
        let why = match (writable, is_opened_there) {
            (true, _) => Some(locks::WRITTEN),
            (false, true) => Some(locks::SEEN),
            (false, false) => None,
        };
        if let Some(why) = why {
            return Ok(Err(RefusalKind::Lease { path, why }));
        }
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

/// The descriptors of one process.
pub(crate) type Entries = (i32, Vec<DescriptorEntry>);

/// One row of one of the tables.
#[derive(Debug, Clone, Copy)]
struct Row<'e> {
    /// Which table.
    table: usize,
    pid: i32,
    entry: &'e DescriptorEntry,
}

impl Row<'_> {
    /// Whether it is one of ours: nobody in the tree has it, but a message brings it.
    fn is_sent(&self) -> bool {
        self.pid == flight::own_pid()
    }

    fn place(&self) -> (usize, u32) {
        (self.table, self.entry.fd)
    }
}

/// The descriptor tables of a tree with everything in them that is carried.
#[derive(Debug, Default)]
pub(crate) struct Table {
    /// By process id.
    pub descriptors: BTreeMap<i32, Vec<Descriptor>>,
    pub files: Vec<File>,
    pub pipes: Vec<Pipe>,
    /// As they were found.
    pub locks: Vec<locks::Held>,
    pub refusals: Vec<Refusal>,
    /// Inodes of all pipes and sockets, for the question who else holds them.
    pub inodes: BTreeSet<u64>,
    /// The same of named pipes, by device and inode.
    pub fifos: BTreeSet<(u64, u64)>,
}

/// How deep a look at the tables goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    /// Whether everything can be carried; the processes run.
    Survey,
    /// With everything needed to make it again; the processes are frozen.
    Capture,
}

/// Looks at the whole descriptor tables of a tree, the root's first, and last at ours if `in_flight` is in it.
pub(crate) fn table(
    look: &mut Look<'_>,
    tables: &[Entries],
    in_flight: &InFlight,
    depth: Depth,
) -> Result<Table> {
    let groups = shared_groups(tables, depth)?;
    let mut table = Table::default();
    let entries = tables.iter().flat_map(|(_, entries)| entries);
    let mut sight = Sight {
        tables,
        depth,
        pidfds: BTreeMap::new(),
        sockets: sockets::Pairs::new(entries, depth),
        in_flight,
        pipes: BTreeMap::new(),
    };
    let number = |index: usize| u32::try_from(index + 1).unwrap_or(u32::MAX);
    for (index, group) in groups.iter().enumerate() {
        for Row { entry, .. } in group.iter().filter(|row| row.is_sent()) {
            sight.sockets.sent.insert(entry.fd, number(index));
            if access(entry) != libc::O_RDONLY {
                look.shared.will_be_written(entry.info.ino);
            }
        }
    }
    for (index, group) in groups.iter().enumerate() {
        let id = number(index);
        // A group is never empty: it is made of the rows.
        let Row { pid, entry, .. } = group[0];
        look.pid = pid;
        match sight.file(look, group) {
            Ok(Ok((kind, owner))) => {
                if let Some(inode) = entry.pipe_or_socket_inode() {
                    sight.sockets.files.insert(inode, id);
                }
                if let Some(what) = group[0].is_sent().then(|| locks::sent(entry)).flatten() {
                    table.refusals.push(Refusal {
                        pid,
                        object: Object::Fd(entry.fd),
                        what,
                    });
                }
                let opened = locks::Opened {
                    file: id,
                    kind: &kind,
                    owner: told(owner.as_ref()),
                    is_local: !entry.info.locks.is_empty() && look.is_local(entry),
                };
                for row in group.iter().filter(|row| !row.is_sent()) {
                    match locks::held(row.pid, row.entry, opened) {
                        Ok(held) => table.locks.extend(held),
                        Err(what) => table.refusals.push(Refusal {
                            pid: row.pid,
                            object: Object::Fd(row.entry.fd),
                            what,
                        }),
                    }
                    table
                        .descriptors
                        .entry(row.pid)
                        .or_default()
                        .push(Descriptor {
                            fd: row.entry.fd,
                            file: id,
                            close_on_exec: row.entry.info.close_on_exec(),
                        });
                }
                table.files.push(File {
                    id,
                    flags: entry.info.flags & !(libc::O_CLOEXEC as u32),
                    owner,
                    kind: Some(kind),
                });
            }
            Ok(Err(what)) => table.refusals.push(Refusal {
                pid,
                object: Object::Fd(entry.fd),
                what,
            }),
            // Closed while we looked, or its process ended: only a running process can do that.
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
            Err(Error::Process(error))
                if depth == Depth::Survey && error.is_gone() && group[0].table > 0 => {}
            Err(Error::File { source, .. })
                if depth == Depth::Survey && source.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        table.inodes.extend(entry.pipe_or_socket_inode());
    }
    for (id, what) in sockets::finish(&mut table.files, &sight.sockets) {
        // Numbers are given in the order of the groups.
        if let Some(Row { pid, entry, .. }) = groups.get(id as usize - 1).map(|group| group[0]) {
            table.refusals.push(Refusal {
                pid,
                object: Object::Fd(entry.fd),
                what,
            });
        }
    }
    for descriptors in table.descriptors.values_mut() {
        descriptors.sort_by_key(|descriptor| descriptor.fd);
    }
    table.fifos = sight
        .pipes
        .keys()
        .copied()
        .filter(|(device, _)| *device != 0)
        .collect();
    table.pipes = sight.pipes.into_values().collect();
    table.pipes.sort_by_key(|pipe| pipe.id);
    Ok(table)
}

/// All rows of all tables.
fn rows(tables: &[Entries]) -> impl Iterator<Item = Row<'_>> {
    tables
        .iter()
        .enumerate()
        .flat_map(|(table, (pid, entries))| {
            entries.iter().map(move |entry| Row {
                table,
                pid: *pid,
                entry,
            })
        })
}

/// Rows by open file description, in order of the first of each.
fn shared_groups(tables: &[Entries], depth: Depth) -> Result<Vec<Vec<Row<'_>>>> {
    let rows = rows(tables);
    if depth == Depth::Survey {
        return Ok(inherited_groups(rows));
    }
    // Only descriptors that look alike in all that belongs to the description can be one: few, so few questions.
    let mut alike: BTreeMap<_, Vec<Row<'_>>> = BTreeMap::new();
    for row in rows {
        let info = &row.entry.info;
        let key = (
            row.entry.link.as_str(),
            info.ino,
            info.mnt_id,
            info.position,
            info.flags & !(libc::O_CLOEXEC as u32),
        );
        alike.entry(key).or_default().push(row);
    }
    let mut groups: Vec<Vec<Row<'_>>> = Vec::new();
    for mut candidates in alike.into_values() {
        let mut failure = None;
        candidates.sort_by(|a, b| {
            descriptor::order(a.pid, a.entry.fd, b.pid, b.entry.fd).unwrap_or_else(|error| {
                failure.get_or_insert(error);
                Ordering::Equal
            })
        });
        if let Some(error) = failure {
            return Err(error.into());
        }
        let mut previous: Option<Row<'_>> = None;
        for row in candidates {
            let shares = match previous {
                Some(previous) => {
                    descriptor::same_file(previous.pid, previous.entry.fd, row.pid, row.entry.fd)?
                }
                None => false,
            };
            match groups.last_mut() {
                Some(group) if shares => group.push(row),
                _ => groups.push(vec![row]),
            }
            previous = Some(row);
        }
    }
    for group in &mut groups {
        group.sort_by_key(Row::place);
    }
    groups.sort_by_key(|group| group[0].place());
    Ok(groups)
}

/// Rows of running processes by open file description, as far as a child has it under its parent's number. What else is shared is
/// seen as several: the same questions, asked more than once.
fn inherited_groups<'e>(rows: impl Iterator<Item = Row<'e>>) -> Vec<Vec<Row<'e>>> {
    let mut groups: Vec<Vec<Row<'e>>> = Vec::new();
    let mut alike: BTreeMap<(u32, &str, u64), Vec<usize>> = BTreeMap::new();
    for row in rows {
        let Row { pid, entry, .. } = row;
        let known = alike
            .entry((entry.fd, entry.link.as_str(), entry.info.ino))
            .or_default();
        let is_same = |index: &&usize| {
            let first = groups[**index][0];
            // One that was closed meanwhile is shared with nobody.
            descriptor::same_file(first.pid, first.entry.fd, pid, entry.fd).unwrap_or(false)
        };
        match known.iter().find(is_same) {
            Some(&index) => groups[index].push(row),
            None => {
                known.push(groups.len());
                groups.push(vec![row]);
            }
        }
    }
    groups
}

type Made = (file::Kind, Option<Owner>);

/// What is known of all tables while one description after the other is looked at.
struct Sight<'e> {
    tables: &'e [Entries],
    depth: Depth,
    pidfds: BTreeMap<i32, PidFd>,
    sockets: sockets::Pairs,
    in_flight: &'e InFlight,
    /// By device and inode; unnamed pipes are on device 0.
    pipes: BTreeMap<(u64, u64), Pipe>,
}

impl Sight<'_> {
    fn pidfd(&mut self, pid: i32) -> Result<&PidFd> {
        Ok(match self.pidfds.entry(pid) {
            btree_map::Entry::Occupied(known) => known.into_mut(),
            btree_map::Entry::Vacant(place) => place.insert(PidFd::open(pid)?),
        })
    }

    /// The open file description that the rows of `group` share.
    fn file(&mut self, look: &mut Look<'_>, group: &[Row<'_>]) -> Result<Verdict<Made>> {
        let (pid, entry, depth) = (group[0].pid, group[0].entry, self.depth);
        let shape = match shape(look, entry)? {
            Ok(shape) => shape,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let info = &entry.info;
        let malformed = |what| ProcessError::Malformed {
            path: format!("/proc/{pid}/fdinfo/{}", entry.fd),
            what,
        };
        let can_signal = matches!(
            shape,
            Shape::Pipe { .. } | Shape::Fifo(_) | Shape::Socket { .. }
        );
        let kind = match shape {
            Shape::Regular(identity) => file::Kind::Regular(Regular {
                identity: Some(identity),
                position: info.position,
            }),
            Shape::Shared { object } => file::Kind::Shared(SharedFile {
                object,
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
            Shape::Epoll => match epoll(group, self.tables)? {
                Ok(epoll) => file::Kind::Epoll(epoll),
                Err(refusal) => return Ok(Err(refusal)),
            },
            Shape::Pipe { inode, write_end } => {
                let copy = self.pidfd(pid)?.get_fd(entry.fd)?;
                let next = u32::try_from(self.pipes.len() + 1).unwrap_or(u32::MAX);
                let pipe = self.pipes.entry((0, inode)).or_insert(Pipe {
                    id: next,
                    capacity: 0,
                    content: Vec::new(),
                });
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
            Shape::Fifo(mut fifo) => {
                let copy = self.pidfd(pid)?.get_fd(entry.fd)?;
                let next = u32::try_from(self.pipes.len() + 1).unwrap_or(u32::MAX);
                let pipe = self.pipes.entry(fifos::key(&copy)?).or_insert(Pipe {
                    id: next,
                    capacity: pipe::capacity(&copy)?,
                    content: Vec::new(),
                });
                fifo.pipe = pipe.id;
                if depth == Depth::Capture && pipe.content.is_empty() {
                    pipe.content = fifos::contents(&copy, &fifo.path)?;
                }
                file::Kind::Fifo(fifo)
            }
            Shape::Socket { inode } => {
                let copy = self.pidfd(pid)?.get_fd(entry.fd)?;
                let (pairs, in_flight) = (&mut self.sockets, self.in_flight);
                match sockets::socket(look, entry, inode, copy.as_fd(), depth, pairs, in_flight)? {
                    Ok(socket) => file::Kind::Socket(socket),
                    Err(refusal) => return Ok(Err(refusal)),
                }
            }
        };
        if !can_signal && (info.flags as i32) & libc::O_ASYNC == 0 {
            return Ok(Ok((kind, None)));
        }
        let copy = self.pidfd(pid)?.get_fd(entry.fd)?;
        Ok(match owner(pid, self.tables, copy.as_fd())? {
            // Only a process that has it can say whom it tells.
            Ok(Some(Owner { id, .. })) if group[0].is_sent() => {
                Err(RefusalKind::SignalOwner { id })
            }
            found => found.map(|owner| (kind, owner)),
        })
    }
}

/// As the kernel is told it.
fn told(owner: Option<&Owner>) -> descriptor::Owner {
    owner.map_or_else(descriptor::Owner::default, |owner| descriptor::Owner {
        kind: owner.kind,
        id: owner.id,
        signo: owner.signo,
    })
}

/// Who is signalled when the descriptor becomes ready.
fn owner(pid: i32, tables: &[Entries], copy: BorrowedFd<'_>) -> Result<Verdict<Option<Owner>>> {
    const F_OWNER_TID: u32 = 0;
    const F_OWNER_PID: u32 = 1;
    let owner = descriptor::owner(copy)?;
    let carried = Owner {
        kind: owner.kind,
        id: owner.id,
        signo: owner.signo,
    };
    Ok(match owner.id {
        0 if owner.signo == 0 => Ok(None),
        0 => Ok(Some(carried)),
        id if owner.kind == F_OWNER_PID && tables.iter().any(|(other, _)| *other == id) => {
            Ok(Some(carried))
        }
        id if owner.kind == F_OWNER_TID && procfs::tids(pid)?.contains(&id) => Ok(Some(carried)),
        id => Err(RefusalKind::SignalOwner { id }),
    })
}

/// An epoll instance, by the numbers that one of its holders has for what is watched: descriptors are watched under the number
/// they had when they were added, and after a fork another process may have something else there.
fn epoll(group: &[Row<'_>], tables: &[Entries]) -> Result<Verdict<Epoll>> {
    if group[0].is_sent() {
        // Its watches have the numbers of a process that has closed it.
        return Ok(match group[0].entry.info.epoll.first() {
            Some(item) => Err(RefusalKind::EpollForeign { fd: item.fd }),
            None => Ok(Epoll::default()),
        });
    }
    let mut foreign = Err(RefusalKind::EpollForeign { fd: 0 });
    for row in group.iter().filter(|row| !row.is_sent()) {
        match epoll_of(*row, &tables[row.table].1)? {
            Ok(epoll) => return Ok(Ok(epoll)),
            Err(refusal) => foreign = Err(refusal),
        }
    }
    Ok(foreign)
}

fn epoll_of(row: Row<'_>, entries: &[DescriptorEntry]) -> Result<Verdict<Epoll>> {
    let Row { table, pid, entry } = row;
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
    let holder = if table == 0 { 0 } else { pid };
    Ok(Ok(Epoll { items, holder }))
}

/// Pipes and sockets of the tables that other processes hold too, and the same of named pipes.
pub(crate) fn held_outside(
    tables: &[Entries],
    inodes: &BTreeSet<u64>,
    fifos: &BTreeSet<(u64, u64)>,
) -> Result<Vec<Refusal>> {
    let mut found = fifos::held_outside(tables, fifos)?;
    let holders = procfs::pipe_or_socket_holders(inodes)?;
    // Our own copies, taken for this very look, do not count.
    let own = std::process::id() as i32;
    let is_inside = |holder: i32| holder == own || tables.iter().any(|(pid, _)| *pid == holder);
    let rows = tables
        .iter()
        .flat_map(|(pid, entries)| entries.iter().map(move |entry| (*pid, entry)));
    for (pid, entry) in rows {
        let Some(inode) = entry.pipe_or_socket_inode() else {
            continue;
        };
        let others: Vec<i32> = holders
            .get(&inode)
            .into_iter()
            .flatten()
            .copied()
            .filter(|&holder| !is_inside(holder))
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
