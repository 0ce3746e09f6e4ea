//! Rebuilds the descriptor table. Open file descriptions are made in our own process and handed over, so that all
//! kinds go one way; only what records its maker (UNIX sockets) or names descriptors (epoll) is done in the husk.

mod fifos;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File as StdFile, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use pageferry_image::model::Invalid;
use pageferry_image::model::files::{Descriptor, File, Pipe, Timerfd, file};
use pageferry_image::model::task::{Process, Tree};
use pageferry_image::model::timers::Passed;
use pageferry_tracee::injection::Injection;
use pageferry_tracee::procfs::TimerfdInfo;
use pageferry_tracee::{descriptor, pipe, timer};

use super::locks::{self, Locks};
use super::shared::Objects;
use super::sockets::names::Names;
use super::{Error, Result, Work, sockets};

/// Status flags that fcntl(F_SETFL) or open(2) can set again.
const STATUS_FLAGS: u32 = (libc::O_APPEND
    | libc::O_NONBLOCK
    | libc::O_ASYNC
    | libc::O_DIRECT
    | libc::O_NOATIME
    | libc::O_DSYNC
    | libc::O_SYNC)
    .unsigned_abs();

/// The way descriptors reach the husk: it takes them from us with pidfd_getfd(2) (Linux 5.6), as it may while it is
/// privileged. Keeps account of which numbers are in use, since the kernel always gives the lowest free one.
#[derive(Debug)]
pub struct Handover {
    pid: i32,
    /// Descriptor of a pidfd of ours inside the husk: one above all that the process has.
    pidfd: u64,
    used: BTreeSet<u64>,
    /// No number below is free.
    lowest: u64,
}

impl Handover {
    /// For the husk of `process`. A table that it shares with one that is there already is full.
    pub(crate) fn new(process: &Process, tree: &Tree) -> Self {
        let descriptors = tree.descriptors_of(process);
        let number = |descriptor: &Descriptor| u64::from(descriptor.fd);
        let full = (process.table_of != 0).then_some(descriptors);
        Self {
            pid: process.pid,
            pidfd: descriptors.iter().map(number).max().map_or(0, |fd| fd + 1) + 2,
            used: full.unwrap_or_default().iter().map(number).collect(),
            lowest: 0,
        }
    }

    /// Gives the husk a pidfd of ours, out of the way of the numbers the process uses.
    pub(crate) fn begin(&mut self, injection: &mut Injection<'_>) -> Result<()> {
        let above = self.pidfd;
        let ours = std::process::id();
        let mut work = Work::new(injection, self.pid);
        let opened = work.call(
            "our pidfd",
            "pidfd_open",
            libc::SYS_pidfd_open,
            &[ours.into(), 0u64.into()],
        );
        work.exactly(
            above,
            "our pidfd",
            "dup3",
            libc::SYS_dup3,
            &[opened.into(), above.into(), libc::O_CLOEXEC.into()],
        );
        work.call("our pidfd", "close", libc::SYS_close, &[opened.into()]);
        work.run()?;
        self.used.insert(above);
        Ok(())
    }

    /// Closes the pidfd: the table is now that of the process.
    pub(crate) fn end(&mut self, injection: &mut Injection<'_>) -> Result<()> {
        let mut work = Work::new(injection, self.pid);
        work.call("our pidfd", "close", libc::SYS_close, &[self.pidfd.into()]);
        work.run()?;
        self.give_up(self.pidfd);
        Ok(())
    }

    fn lowest_free(&mut self) -> u64 {
        while self.used.contains(&self.lowest) {
            self.lowest += 1;
        }
        self.lowest
    }

    fn give_up(&mut self, number: u64) {
        self.used.remove(&number);
        self.lowest = self.lowest.min(number);
    }

    fn take(&mut self, work: &mut Work<'_, '_>, ours: &impl AsFd, object: &str) -> u64 {
        let at = self.lowest_free();
        let raw = ours.as_fd().as_raw_fd();
        work.exactly(
            at,
            object,
            "pidfd_getfd",
            libc::SYS_pidfd_getfd,
            &[self.pidfd.into(), raw.into(), 0u64.into()],
        );
        at
    }

    /// Lends `ours` to the husk for a few calls; it runs what is collected, so that the file may be dropped afterwards.
    pub(crate) fn lend(&mut self, work: &mut Work<'_, '_>, ours: &StdFile) -> Result<u64> {
        work.room()?;
        let at = self.take(work, ours, "a mapped file");
        work.run()?;
        self.used.insert(at);
        Ok(at)
    }

    /// Ends a loan.
    pub(crate) fn take_back(&mut self, work: &mut Work<'_, '_>, fd: u64) -> Result<()> {
        work.room()?;
        work.call(format!("fd {fd}"), "close", libc::SYS_close, &[fd.into()]);
        self.give_up(fd);
        Ok(())
    }

    /// Puts `ours` at exactly `target` in the husk.
    fn put(
        &mut self,
        work: &mut Work<'_, '_>,
        ours: &impl AsFd,
        target: &Descriptor,
    ) -> Result<()> {
        work.room()?;
        let object = format!("fd {}", target.fd);
        let number = u64::from(target.fd);
        let at = self.take(work, ours, &object);
        if at == number {
            let flag = if target.close_on_exec {
                libc::FD_CLOEXEC
            } else {
                0
            };
            work.call(
                object,
                "fcntl(F_SETFD)",
                libc::SYS_fcntl,
                &[number.into(), libc::F_SETFD.into(), flag.into()],
            );
        } else {
            self.move_to(work, at, target, true);
        }
        self.used.insert(number);
        Ok(())
    }

    /// Duplicates descriptor `from` of the husk to `target`; closes `from` if asked.
    fn move_to(&mut self, work: &mut Work<'_, '_>, from: u64, target: &Descriptor, close: bool) {
        let number = u64::from(target.fd);
        let flag = if target.close_on_exec {
            libc::O_CLOEXEC
        } else {
            0
        };
        let object = format!("fd {number}");
        work.exactly(
            number,
            object.as_str(),
            "dup3",
            libc::SYS_dup3,
            &[from.into(), number.into(), flag.into()],
        );
        if close {
            work.call(object, "close", libc::SYS_close, &[from.into()]);
        }
        self.used.insert(number);
    }
}

/// The open file descriptions of a tree, made in our own process, each when the first process that has it is built.
#[derive(Debug)]
pub(crate) struct Files {
    /// Ends of pipes, true: for writing, that no description has yet.
    pipes: BTreeMap<(u32, bool), OwnedFd>,
    /// Named ones, for reading and writing.
    fifos: BTreeMap<u32, OwnedFd>,
    /// The description that got an end.
    first_of_pipe: BTreeMap<(u32, bool), u32>,
    made: BTreeMap<u32, OwnedFd>,
    /// Those that a process has by now.
    handed: BTreeSet<u32>,
    /// What is mapped and open in several.
    pub(super) objects: Objects,
    /// What is taken on them.
    pub(super) locks: Locks,
}

impl Files {
    pub(crate) fn new(tree: &Tree, objects: Objects, names: &mut Names) -> Result<Self> {
        let fifos = fifos::make(tree, names)?;
        let mut pipes = BTreeMap::new();
        let is_unnamed = |pipe: &&Pipe| !fifos.contains_key(&pipe.id);
        for carried in tree.pipes.iter().filter(is_unnamed) {
            let (read, write) =
                pipe::create(carried.capacity, &carried.content).map_err(|error| {
                    Error::object(
                        format!("pipe {}", carried.id),
                        "pipe2",
                        std::io::Error::other(error),
                    )
                })?;
            pipes.insert((carried.id, false), read);
            pipes.insert((carried.id, true), write);
        }
        Ok(Self {
            pipes,
            fifos,
            first_of_pipe: BTreeMap::new(),
            made: BTreeMap::new(),
            handed: BTreeSet::new(),
            objects,
            locks: Locks::new(tree),
        })
    }

    /// Takes the UNIX sockets, which are not made here.
    pub(super) fn take(&mut self, sockets: BTreeMap<u32, OwnedFd>) {
        self.made.extend(sockets);
    }

    /// Ours of an open file that is made already.
    pub(super) fn ours(&self, id: u32) -> Option<&OwnedFd> {
        self.made.get(&id)
    }

    /// Makes an open file that travels in a message, before any process has it. `object`: what receives it.
    pub(super) fn make_sent(
        &mut self,
        tree: &Tree,
        id: u32,
        object: &str,
        passed: impl Fn() -> Result<Passed>,
    ) -> Result<()> {
        if self.made.contains_key(&id) {
            return Ok(());
        }
        let object = format!("{object}, open file {id} in a message");
        let carried = File::find(&tree.files, id)
            .ok_or_else(|| Invalid::new(object.as_str(), "is not there"))?;
        let made = self.make(carried, &object, passed)?;
        self.made.insert(id, made);
        Ok(())
    }

    /// Makes what no process before this one has.
    fn make_new(
        &mut self,
        process: &Process,
        tree: &Tree,
        passed: impl Fn() -> Result<Passed>,
    ) -> Result<()> {
        let mut new: BTreeMap<u32, u32> = BTreeMap::new();
        for descriptor in &process.descriptors {
            if !self.made.contains_key(&descriptor.file) {
                new.entry(descriptor.file).or_insert(descriptor.fd);
            }
        }
        for (id, fd) in new {
            let Some(carried) = File::find(&tree.files, id) else {
                continue;
            };
            let made = self.make(carried, &format!("fd {fd}"), &passed)?;
            self.made.insert(carried.id, made);
        }
        Ok(())
    }

    /// Fills the descriptor table of a process.
    pub(crate) fn rebuild(
        &mut self,
        injection: &mut Injection<'_>,
        process: &Process,
        tree: &Tree,
        handed: &mut Handover,
        passed: impl Fn() -> Result<Passed>,
    ) -> Result<()> {
        let pid = process.pid;
        self.make_new(process, tree, passed)?;
        let is_root = tree.processes.first().is_some_and(|root| root.pid == pid);

        let mut work = Work::new(injection, pid);
        let mut first_of: BTreeMap<u32, u64> = BTreeMap::new();
        let mut descriptors: Vec<&Descriptor> = process.descriptors.iter().collect();
        // Ascending, so that the lowest free number is never above the one wanted.
        descriptors.sort_by_key(|d| d.fd);
        for descriptor in descriptors {
            if let Some(&from) = first_of.get(&descriptor.file) {
                work.room()?;
                handed.move_to(&mut work, from, descriptor, false);
                continue;
            }
            let ours = self.made.get(&descriptor.file).ok_or_else(|| {
                Invalid::new(format!("fd {}", descriptor.fd), "names no open file")
            })?;
            handed.put(&mut work, ours, descriptor)?;
            first_of.insert(descriptor.file, u64::from(descriptor.fd));
        }
        for (&id, &number) in &first_of {
            let Some(carried) = File::find(&tree.files, id) else {
                continue;
            };
            if let Some(file::Kind::Epoll(epoll)) = &carried.kind {
                let is_holder = epoll.holder == pid || (epoll.holder == 0 && is_root);
                for item in epoll.items.iter().filter(|_| is_holder) {
                    work.room()?;
                    // struct epoll_event is packed on x86-64 and naturally aligned elsewhere.
                    let mut event = item.events.to_le_bytes().to_vec();
                    if !cfg!(target_arch = "x86_64") {
                        event.extend_from_slice(&[0; 4]);
                    }
                    event.extend_from_slice(&item.data.to_le_bytes());
                    let at = work.bytes(&event)?;
                    work.call(
                        format!("fd {number} (epoll), item fd {}", item.fd),
                        "epoll_ctl",
                        libc::SYS_epoll_ctl,
                        &[
                            number.into(),
                            libc::EPOLL_CTL_ADD.into(),
                            u64::from(item.fd).into(),
                            at.into(),
                        ],
                    );
                }
            }
            if !self.handed.insert(id) {
                continue;
            }
            if let Some(owner) = &carried.owner {
                if owner.id != 0 {
                    work.room()?;
                    let mut bytes = owner.kind.to_le_bytes().to_vec();
                    bytes.extend_from_slice(&owner.id.to_le_bytes());
                    let at = work.bytes(&bytes)?;
                    let object = format!("fd {number}");
                    // F_SETOWN_EX
                    work.call(
                        object,
                        "fcntl(F_SETOWN_EX)",
                        libc::SYS_fcntl,
                        &[number.into(), 15u64.into(), at.into()],
                    );
                }
                if owner.signo != 0 {
                    work.room()?;
                    let object = format!("fd {number}");
                    // F_SETSIG
                    work.call(
                        object,
                        "fcntl(F_SETSIG)",
                        libc::SYS_fcntl,
                        &[number.into(), 10u64.into(), u64::from(owner.signo).into()],
                    );
                }
            }
        }
        work.run()?;
        Ok(())
    }

    /// Makes one open file description in our process. `named`: as an operator would name it.
    fn make(
        &mut self,
        carried: &File,
        named: &str,
        passed: impl Fn() -> Result<Passed>,
    ) -> Result<OwnedFd> {
        let object = || named.to_owned();
        let kernel = |call: &'static str| {
            move |error: pageferry_tracee::Error| {
                Error::object(object(), call, std::io::Error::other(error))
            }
        };
        let kind = carried
            .kind
            .as_ref()
            .ok_or_else(|| Invalid::new(object(), "is of no known kind"))?;
        let made: OwnedFd = match kind {
            file::Kind::Regular(regular) => {
                let identity = regular
                    .identity
                    .as_ref()
                    .ok_or_else(|| Invalid::new(object(), "names no file"))?;
                let object = format!("{named} ({})", identity.path);
                let (path, flags) = (identity.path.as_str(), carried.flags);
                if self.locks.is_leased(carried.id) {
                    locks::open_leased(&object, path, flags, regular.position)?
                } else {
                    open(path, flags, Some(regular.position))
                        .map_err(|error| Error::object(object, "open", error))?
                }
            }
            file::Kind::Shared(shared) => {
                let mut opened = self.objects.open(shared.object, carried.flags)?;
                if shared.position != 0 {
                    opened
                        .seek(SeekFrom::Start(shared.position))
                        .map_err(|error| Error::object(object(), "lseek", error))?;
                }
                opened.into()
            }
            file::Kind::Directory(directory) => {
                open(&directory.path, carried.flags, Some(directory.position)).map_err(|error| {
                    Error::object(format!("{named} ({})", directory.path), "open", error)
                })?
            }
            file::Kind::Device(device) => {
                let opened = open(&device.path, carried.flags, None).map_err(|error| {
                    Error::object(format!("{named} ({})", device.path), "open", error)
                })?;
                let rdev = nix::sys::stat::fstat(&opened)
                    .map_err(|e| Error::object(object(), "fstat", e))?
                    .st_rdev;
                if rdev != device.rdev {
                    return Err(Error::Mismatch {
                        object: object(),
                        what: format!("{} is another device here", device.path),
                    });
                }
                opened
            }
            file::Kind::Pipe(end) => {
                let place = (end.pipe, end.write_end);
                if let Some(ours) = self.pipes.remove(&place) {
                    // As pipe(2) made it: opening it anew would show in its flags.
                    self.first_of_pipe.insert(place, carried.id);
                    ours
                } else {
                    // A second description of the same end, which only an open can have made.
                    let first = self.first_of_pipe.get(&place);
                    let ours = first.and_then(|id| self.made.get(id)).ok_or_else(|| {
                        Invalid::new(
                            object(),
                            format!("names pipe {}, which is not there", end.pipe),
                        )
                    })?;
                    let path = format!("/proc/self/fd/{}", ours.as_raw_fd());
                    open(&path, carried.flags, None)
                        .map_err(|error| Error::object(object(), "open of a pipe end", error))?
                }
            }
            file::Kind::Eventfd(eventfd) => {
                descriptor::create_eventfd(eventfd.count, eventfd.semaphore)
                    .map_err(kernel("eventfd2"))?
            }
            file::Kind::Epoll(_) => {
                nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::EPOLL_CLOEXEC)
                    .map_err(|e| Error::object(object(), "epoll_create1", e))?
                    .0
            }
            file::Kind::Timerfd(carried) => timerfd(carried, passed, kernel("timerfd"))?,
            file::Kind::Signalfd(carried) => {
                descriptor::create_signalfd(carried.mask).map_err(kernel("signalfd4"))?
            }
            file::Kind::Socket(socket) => sockets::make(socket, named)?,
            file::Kind::Fifo(fifo) => {
                let object = format!("{named} ({})", fifo.path);
                let ours = self.fifos.get(&fifo.pipe).ok_or_else(|| {
                    Invalid::new(object.as_str(), "names a pipe that is not there")
                })?;
                let path = format!("/proc/self/fd/{}", ours.as_raw_fd());
                open(&path, carried.flags, None)
                    .map_err(|error| Error::object(object, "open", error))?
            }
        };
        if !matches!(
            kind,
            file::Kind::Regular(_)
                | file::Kind::Shared(_)
                | file::Kind::Directory(_)
                | file::Kind::Device(_)
        ) {
            set_status(&made, carried.flags)
                .map_err(|errno| Error::object(object(), "fcntl(F_SETFL)", errno))?;
        }
        Ok(made)
    }
}

/// Longest time between looking at the clock and having armed a timer by it, nanoseconds, and how often that is tried: a host
/// that is so busy arms it late, which a program has to expect of any timer.
const ARMED_WITHIN_NS: u64 = 200_000;
const ARMING_ATTEMPTS: usize = 5;

fn timerfd(
    carried: &Timerfd,
    passed: impl Fn() -> Result<Passed>,
    failed: impl Fn(pageferry_tracee::Error) -> Error,
) -> Result<OwnedFd> {
    let mut attempt = 1;
    loop {
        let before = passed()?;
        let timer = timer::create(&TimerfdInfo {
            clock: carried.clock,
            ticks: carried.ticks,
            settime_flags: carried.settime_flags,
            value_ns: before.left_ns(carried.clock, carried.value_ns),
            interval_ns: carried.interval_ns,
        })
        .map_err(&failed)?;
        if attempt == ARMING_ATTEMPTS
            || passed()?.monotonic_ns <= before.monotonic_ns.saturating_add(ARMED_WITHIN_NS)
        {
            return Ok(timer);
        }
        attempt += 1;
    }
}

pub(crate) fn set_status(fd: &OwnedFd, flags: u32) -> nix::Result<()> {
    let wanted = nix::fcntl::OFlag::from_bits_retain(as_c_int(flags & STATUS_FLAGS));
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFL(wanted))?;
    Ok(())
}

pub(super) fn open(path: &str, flags: u32, position: Option<u64>) -> std::io::Result<OwnedFd> {
    let mode = as_c_int(flags) & libc::O_ACCMODE;
    let custom = as_c_int(flags & STATUS_FLAGS)
        | (as_c_int(flags) & (libc::O_DIRECTORY | libc::O_LARGEFILE));
    let mut options = OpenOptions::new();
    options
        .read(mode == libc::O_RDONLY || mode == libc::O_RDWR)
        .write(mode == libc::O_WRONLY || mode == libc::O_RDWR);
    let mut file = options.custom_flags(custom | libc::O_NOCTTY).open(path)?;
    if let Some(position) = position.filter(|&p| p != 0) {
        file.seek(SeekFrom::Start(position))?;
    }
    Ok(file.into())
}

/// The same bits as the C int that open(2) and fcntl(2) take.
fn as_c_int(flags: u32) -> i32 {
    i32::from_ne_bytes(flags.to_ne_bytes())
}
