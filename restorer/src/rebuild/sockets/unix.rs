//! Rebuilds the UNIX sockets of a tree, before its processes: what is connected to each other, with names, files and what lies
//! unread.
//!
//! A socket notes for ever who made it listen, connected it or made it as one of a pair, and tells that to the other end
//! (SO_PEERCRED). So these three calls are made in the husk of the process that the source had noted, with its user and group; the
//! sockets are ours until all have been handed out.
//!
//! Order, and why:
//! 1. Connections by name, each name by a listening socket that is gone again: its own name is the accepted end's, and a program
//!    that finds the real one cannot come between.
//! 2. Pairs, and sockets that stand alone; then names, since a path is free only now.
//! 3. What lies unread, while nobody is connected to anybody else than the sender, no direction is shut and no option makes
//!    the kernel note us as the sender; in the name of who was noted, and with the open files that travel with it. All sockets are
//!    there by then, so that one may even be sent to itself.
//! 4. Datagram sockets that send to one that does not send back, those first that are sent to by nobody who is not connected
//!    yet: who is connected takes no connection from others.
//! 5. Options, shut directions, who listens, and last who waits to be accepted, in the order of before.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use pageferry_image::model::Invalid;
use pageferry_image::model::files::{File, file};
use pageferry_image::model::sockets::{Attached, Ids, Socket, SocketFile, State};
use pageferry_image::model::task::{Process, Tree};
use pageferry_image::model::timers::Passed;
use pageferry_tracee::Family;
use pageferry_tracee::descriptor::{self, PidFd};
use pageferry_tracee::injection::{Injection, Slot};
use pageferry_tracee::procfs;
use pageferry_tracee::socket::{self, Along, Sender};
use pageferry_tracee::unix_diag::{Peer, UnixDiag};

use super::names::Names;
use crate::rebuild::files::Files;
use crate::rebuild::{Error, Result, Work, files, memory, task};

/// Buffer of a socket that only hands over what lies unread, bytes: the largest that the kernel takes without doubling it over
/// its limit.
const SEND_BUFFER: i32 = 1 << 29;
const BUFFER_SIZES: [i32; 2] = [SO_SNDBUFFORCE, SO_RCVBUFFORCE];
const SO_SNDBUFFORCE: i32 = 32;
const SO_RCVBUFFORCE: i32 = 33;
/// Connections that may wait at a listening socket that is gone again: each is accepted at once, others may be strangers'.
const BACKLOG: u32 = 64;

/// A socket of the tree.
#[derive(Debug, Clone, Copy)]
struct Carried<'t> {
    id: u32,
    flags: u32,
    socket: &'t Socket,
    /// The first process that has it.
    holder: &'t Process,
    fd: u32,
}

impl Carried<'_> {
    fn object(&self) -> String {
        format!("pid {} fd {} (UNIX socket)", self.holder.pid, self.fd)
    }

    fn failed(&self, call: &'static str) -> impl Fn(pageferry_tracee::Error) -> Error {
        let object = self.object();
        move |error| Error::object(object.as_str(), call, std::io::Error::other(error))
    }

    fn is_datagram(&self) -> bool {
        self.socket.r#type == libc::SOCK_DGRAM
    }

    fn create(&self) -> Result<OwnedFd> {
        let socket = self.socket;
        socket::create(socket.family, socket.r#type, socket.protocol).map_err(self.failed("socket"))
    }
}

/// Two sockets that are connected to each other; the second may have been closed.
#[derive(Debug, Clone, Copy)]
struct Pair<'t> {
    ends: [Option<Carried<'t>>; 2],
    one: Carried<'t>,
}

impl<'t> Pair<'t> {
    /// The place of the end that was accepted, and the name by which it was found; `None` of a pair without names, and of
    /// datagram sockets, which have only their own.
    fn connection(&self) -> Option<(usize, &'t [u8])> {
        if self.one.is_datagram() {
            return None;
        }
        for (at, end) in self.ends.iter().enumerate() {
            if let Some(end) = end.filter(|end| end.socket.accepted) {
                return Some((at, &end.socket.local));
            }
        }
        let remote = &self.one.socket.remote;
        (!remote.is_empty()).then_some((1, remote))
    }

    /// The name of the end at `at`, with its file if it was bound to it.
    fn name(&self, at: usize) -> (&'t [u8], Option<SocketFile>) {
        match self.ends[at] {
            Some(end) => (&end.socket.local, end.socket.file),
            None => (&self.one.socket.remote, None),
        }
    }

    /// What the end at `at` tells of the other one.
    fn peer_of(&self, at: usize) -> Option<Ids> {
        self.ends[at].and_then(|end| end.socket.peer)
    }

    /// The first process that has the end at `at`, or the other if that is closed.
    fn holder(&self, at: usize) -> &'t Process {
        self.ends[at].unwrap_or(self.one).holder
    }
}

/// Makes all UNIX sockets of `tree`, and what travels in their messages, for `files` to have.
pub(crate) fn make(
    family: &mut Family,
    tree: &Tree,
    names: &mut Names,
    files: &mut Files,
    passed: impl Fn() -> Result<Passed>,
) -> Result<()> {
    let carried = carried(tree)?;
    if carried.is_empty() {
        return Ok(());
    }
    let mut maker = Maker {
        tree,
        names,
        own: BTreeMap::new(),
        made: BTreeMap::new(),
        closed: Vec::new(),
    };
    for one in &carried {
        let inode = one.socket.file.map_or(0, |file| file.inode);
        let own = maker.own.entry(&one.socket.local).or_default();
        *own = inode.max(*own);
    }
    let pairs = pairs(&carried);
    maker.connect_pairs(family, &pairs)?;
    let alone = || carried.iter().filter(|one| one.socket.pair == 0);
    for one in alone() {
        maker.made.insert(one.id, one.create()?);
    }
    for one in alone() {
        maker.bind(one, one.id, &one.socket.local, one.socket.file)?;
    }
    for one in &carried {
        for option in &one.socket.options {
            if BUFFER_SIZES.contains(&option.name) && option.level == libc::SOL_SOCKET {
                maker.set_option(one, option)?;
            }
        }
    }
    for one in &carried {
        for id in one.socket.in_flight() {
            if !maker.made.contains_key(&id) {
                files.make_sent(tree, id, &one.object(), &passed)?;
            }
        }
    }
    maker.send(&carried, &pairs, files)?;
    maker.connect_alone(&carried)?;
    let waits = |one: &&Carried<'_>| one.socket.state() == State::Waiting;
    for one in carried.iter().filter(|one| !waits(one)) {
        maker.finish(one)?;
    }
    let mut listening = Vec::new();
    for one in &carried {
        if one.socket.state() == State::Listening {
            let process = actor(tree, one.socket.peer, one.holder);
            // More may wait than its backlog lets in now.
            let more = u32::try_from(one.socket.waiting.len()).unwrap_or(u32::MAX);
            let backlog = one.socket.backlog.saturating_add(more);
            listening.push((process, one, maker.socket(one.id)?, backlog));
        }
    }
    listen(family, tree, &listening)?;
    maker.connect_waiting(family, &carried)?;
    listening.retain(|(_, one, ..)| !one.socket.waiting.is_empty());
    for (_, one, _, backlog) in &mut listening {
        *backlog = one.socket.backlog;
    }
    listen(family, tree, &listening)?;
    drop(listening);
    for one in carried.iter().filter(waits) {
        maker.finish(one)?;
    }
    files.take(maker.made);
    Ok(())
}

/// The UNIX sockets of a tree, each with the first descriptor of it, or of the socket that it travels to.
fn carried(tree: &Tree) -> Result<Vec<Carried<'_>>> {
    let mut holders: BTreeMap<u32, (&Process, u32)> = BTreeMap::new();
    for process in &tree.processes {
        for descriptor in &process.descriptors {
            holders
                .entry(descriptor.file)
                .or_insert((process, descriptor.fd));
        }
    }
    let mut left: Vec<u32> = holders.keys().copied().collect();
    while let Some(id) = left.pop() {
        let file = File::find(&tree.files, id);
        let (Some(Some(file::Kind::Socket(socket))), Some(&holder)) =
            (file.map(|file| &file.kind), holders.get(&id))
        else {
            continue;
        };
        for sent in socket.in_flight() {
            holders.entry(sent).or_insert_with(|| {
                left.push(sent);
                holder
            });
        }
    }
    let mut carried = Vec::new();
    for file in &tree.files {
        let Some(file::Kind::Socket(socket)) = &file.kind else {
            continue;
        };
        if !socket.is_unix() {
            continue;
        }
        let &(holder, fd) = holders.get(&file.id).ok_or_else(|| {
            Invalid::new(format!("open file {}", file.id), "is held by no process")
        })?;
        carried.push(Carried {
            id: file.id,
            flags: file.flags,
            socket,
            holder,
            fd,
        });
    }
    Ok(carried)
}

fn pairs<'t>(carried: &[Carried<'t>]) -> Vec<Pair<'t>> {
    let mut pairs: BTreeMap<u32, Pair<'t>> = BTreeMap::new();
    for &one in carried.iter().filter(|one| one.socket.pair != 0) {
        pairs
            .entry(one.socket.pair)
            .and_modify(|pair| pair.ends[1] = Some(one))
            .or_insert(Pair {
                ends: [Some(one), None],
                one,
            });
    }
    pairs.into_values().collect()
}

/// The process that was noted if it is in the tree, else `holder`.
fn actor<'t>(tree: &'t Tree, noted: Option<Ids>, holder: &'t Process) -> &'t Process {
    noted
        .and_then(|ids| {
            let mut processes = tree.processes.iter();
            processes.find(|process| process.pid == ids.pid)
        })
        .unwrap_or(holder)
}

/// Lets the husk of `process` make calls with its user and group.
fn in_husk<T>(
    family: &mut Family,
    tree: &Tree,
    process: &Process,
    calls: impl FnOnce(&mut Injection<'_>) -> Result<T>,
) -> Result<T> {
    let space = tree
        .space_of(process)
        .ok_or_else(|| Invalid::new(format!("process {}", process.pid), "has no memory"))?;
    let hole = memory::hole_for_agent(space, &procfs::maps(process.pid)?, 1)?;
    let mut injection = family.member(process.pid)?.plant_with_room(Some(hole), 1)?;
    let outcome = task::take_ids(&mut injection, process).and_then(|()| calls(&mut injection));
    let cured = injection.cure();
    let value = outcome?;
    cured?;
    Ok(value)
}

/// Calls of a husk on a socket of ours, which it has for that long.
fn lend(
    work: &mut Work<'_, '_>,
    ours: &OwnedFd,
    object: &str,
    calls: impl FnOnce(&mut Work<'_, '_>, Slot) -> Result<()>,
) -> Result<()> {
    work.room()?;
    let pidfd = work.call(
        object,
        "pidfd_open",
        libc::SYS_pidfd_open,
        &[std::process::id().into(), 0u64.into()],
    );
    let lent = work.call(
        object,
        "pidfd_getfd",
        libc::SYS_pidfd_getfd,
        &[pidfd.into(), ours.as_raw_fd().into(), 0u64.into()],
    );
    calls(work, lent)?;
    for fd in [lent, pidfd] {
        work.call(object, "close", libc::SYS_close, &[fd.into()]);
    }
    Ok(())
}

/// Makes sockets listen, each by its process.
fn listen(
    family: &mut Family,
    tree: &Tree,
    listening: &[(&Process, &Carried<'_>, &OwnedFd, u32)],
) -> Result<()> {
    let pids: BTreeSet<i32> = listening.iter().map(|(process, ..)| process.pid).collect();
    for pid in pids {
        let mut own = listening
            .iter()
            .filter(|(process, ..)| process.pid == pid)
            .peekable();
        let Some(&&(process, ..)) = own.peek() else {
            continue;
        };
        in_husk(family, tree, process, |injection| {
            let mut work = Work::new(injection, pid);
            for (_, one, ours, backlog) in own {
                let object = one.object();
                lend(&mut work, ours, &object, |work, lent| {
                    let args = [lent.into(), u64::from(*backlog).into()];
                    work.call(object.as_str(), "listen", libc::SYS_listen, &args);
                    Ok(())
                })?;
            }
            work.run()?;
            Ok(())
        })?;
    }
    Ok(())
}

/// Two sockets in a husk, ours now.
fn socketpair(injection: &mut Injection<'_>, pid: i32, one: &Carried<'_>) -> Result<[OwnedFd; 2]> {
    let object = one.object();
    let mut work = Work::new(injection, pid);
    let at = work.bytes(&[0; 8])?;
    work.call(
        object.as_str(),
        "socketpair",
        libc::SYS_socketpair,
        &[
            one.socket.family.into(),
            (one.socket.r#type | libc::SOCK_CLOEXEC).into(),
            one.socket.protocol.into(),
            at.into(),
        ],
    );
    work.run()?;
    let offset = usize::try_from(at - work.injection().scratch_address(pid)).unwrap_or(0);
    let numbers = work.injection().scratch(pid)[offset..offset + 8].to_vec();
    let number = |at: usize| {
        u32::from_le_bytes([
            numbers[at],
            numbers[at + 1],
            numbers[at + 2],
            numbers[at + 3],
        ])
    };
    let pidfd = PidFd::open(pid)?;
    let ours = [pidfd.get_fd(number(0))?, pidfd.get_fd(number(4))?];
    for fd in [number(0), number(4)] {
        work.call(
            object.as_str(),
            "close",
            libc::SYS_close,
            &[u64::from(fd).into()],
        );
    }
    work.run()?;
    Ok(ours)
}

fn inode(socket: &OwnedFd, one: &Carried<'_>) -> Result<u64> {
    let found = nix::sys::stat::fstat(socket);
    Ok(found
        .map_err(|errno| Error::object(one.object(), "fstat", errno))?
        .st_ino)
}

fn copy(socket: &OwnedFd, one: &Carried<'_>) -> Result<OwnedFd> {
    socket
        .try_clone()
        .map_err(|error| Error::object(one.object(), "dup", error))
}

struct Maker<'t, 'n> {
    tree: &'t Tree,
    names: &'n mut Names,
    /// The source's files, by address.
    own: BTreeMap<&'t [u8], u64>,
    made: BTreeMap<u32, OwnedFd>,
    /// Ends that are to be closed when what they sent has been sent, by the number of the other end's open file.
    closed: Vec<(u32, OwnedFd)>,
}

impl<'t> Maker<'t, '_> {
    fn socket(&self, id: u32) -> Result<&OwnedFd> {
        Ok(self
            .made
            .get(&id)
            .ok_or_else(|| Invalid::new(format!("open file {id}"), "is no UNIX socket"))?)
    }

    fn free(&mut self, address: &[u8], one: &Carried<'_>) -> Result<()> {
        let own = self.own.get(address).copied().unwrap_or(0);
        self.names.free(address, own, &one.object())
    }

    /// Gives a socket its name, and the name its file.
    fn bind_raw(
        &mut self,
        one: &Carried<'_>,
        ours: &OwnedFd,
        address: &[u8],
        file: Option<SocketFile>,
    ) -> Result<()> {
        if address.is_empty() {
            return Ok(());
        }
        self.free(address, one)?;
        socket::bind_raw(ours.as_fd(), address).map_err(one.failed("bind"))?;
        self.names.bound(address, file, &one.object())
    }

    fn bind(
        &mut self,
        one: &Carried<'_>,
        id: u32,
        address: &[u8],
        file: Option<SocketFile>,
    ) -> Result<()> {
        let ours = copy(self.socket(id)?, one)?;
        self.bind_raw(one, &ours, address, file)
    }

    fn keep(&mut self, pair: &Pair<'t>, made: [OwnedFd; 2]) {
        for (end, ours) in pair.ends.into_iter().zip(made) {
            match end {
                Some(end) => drop(self.made.insert(end.id, ours)),
                None => self.closed.push((pair.one.id, ours)),
            }
        }
    }

    /// Makes everything that is connected both ways.
    fn connect_pairs(&mut self, family: &mut Family, pairs: &[Pair<'t>]) -> Result<()> {
        // By name and type: who listens, for which pair it was made, and who connects.
        let mut listeners: BTreeMap<(&[u8], i32), (OwnedFd, &Process, Carried<'t>)> =
            BTreeMap::new();
        let mut by_maker: BTreeMap<i32, (&Process, Vec<&Pair<'t>>)> = BTreeMap::new();
        for pair in pairs {
            let maker = match pair.connection() {
                None => {
                    let noted = pair.peer_of(0).or(pair.peer_of(1));
                    actor(self.tree, noted, pair.one.holder)
                }
                Some((server, name)) => {
                    let client = 1 - server;
                    let key = (name, pair.one.socket.r#type);
                    if let std::collections::btree_map::Entry::Vacant(place) = listeners.entry(key)
                    {
                        let listener = pair.one.create()?;
                        self.free(name, &pair.one)?;
                        socket::bind_raw(listener.as_fd(), name)
                            .map_err(pair.one.failed("bind"))?;
                        descriptor::set_status_flags(
                            listener.as_fd(),
                            libc::O_NONBLOCK.unsigned_abs(),
                        )?;
                        let process = actor(self.tree, pair.peer_of(client), pair.holder(server));
                        place.insert((listener, process, pair.one));
                    }
                    actor(self.tree, pair.peer_of(server), pair.holder(client))
                }
            };
            by_maker
                .entry(maker.pid)
                .or_insert((maker, Vec::new()))
                .1
                .push(pair);
        }
        let listening: Vec<_> = listeners
            .values()
            .map(|(ours, process, one)| (*process, one, ours, BACKLOG))
            .collect();
        listen(family, self.tree, &listening)?;
        drop(listening);
        let diag = UnixDiag::open()?;
        for (pid, (process, pairs)) in by_maker {
            in_husk(family, self.tree, process, |injection| {
                for pair in pairs {
                    let made = match pair.connection() {
                        None => socketpair(injection, pid, &pair.one)?,
                        Some((server, name)) => {
                            let (listener, ..) = &listeners[&(name, pair.one.socket.r#type)];
                            let client = self.connect(injection, pid, pair, 1 - server, name)?;
                            let accepted = accept(&diag, listener, &client, &pair.one)?;
                            if server == 0 {
                                [accepted, client]
                            } else {
                                [client, accepted]
                            }
                        }
                    };
                    self.keep(pair, made);
                }
                Ok(())
            })?;
        }
        for ((name, _), (listener, _, one)) in listeners {
            drop(listener);
            self.names.bound(name, None, &one.object())?;
        }
        // Datagram sockets have their own names only, and their files.
        for pair in pairs.iter().filter(|pair| pair.one.is_datagram()) {
            for at in [0, 1] {
                let (name, file) = pair.name(at);
                match pair.ends[at] {
                    Some(end) => self.bind(&end, end.id, name, file)?,
                    None => {
                        let mut closed = self.closed.iter();
                        if let Some((_, ours)) = closed.find(|(id, _)| *id == pair.one.id) {
                            let ours = copy(ours, &pair.one)?;
                            self.bind_raw(&pair.one, &ours, name, file)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// A socket that the husk has connected to `name`.
    fn connect(
        &mut self,
        injection: &mut Injection<'_>,
        pid: i32,
        pair: &Pair<'t>,
        at: usize,
        name: &[u8],
    ) -> Result<OwnedFd> {
        let one = &pair.one;
        let client = one.create()?;
        let (own_name, file) = pair.name(at);
        self.bind_raw(one, &client, own_name, file)?;
        connect_raw(injection, pid, &client, name, &one.object())?;
        Ok(client)
    }

    /// Connects again who waits to be accepted.
    fn connect_waiting(&self, family: &mut Family, carried: &[Carried<'t>]) -> Result<()> {
        let by_id: BTreeMap<u32, &Carried<'t>> = carried.iter().map(|one| (one.id, one)).collect();
        for listener in carried {
            let waiting = listener.socket.waiting.iter();
            let clients: Vec<&Carried<'t>> =
                waiting.filter_map(|id| by_id.get(id).copied()).collect();
            for of_one in clients.chunk_by(|one, next| one.holder.pid == next.holder.pid) {
                let process = of_one[0].holder;
                in_husk(family, self.tree, process, |injection| {
                    for one in of_one {
                        let (ours, name) = (self.socket(one.id)?, &listener.socket.local);
                        connect_raw(injection, process.pid, ours, name, &one.object())?;
                    }
                    Ok(())
                })?;
            }
        }
        Ok(())
    }

    /// Sends a message to `one`, with what came along.
    fn send_one(
        &self,
        files: &Files,
        one: &Carried<'t>,
        from: &OwnedFd,
        address: &[u8],
        (message, attached): (&[u8], Option<&Attached>),
    ) -> Result<()> {
        let ours = |id: &u32| {
            let ours = self.made.get(id).or_else(|| files.ours(*id));
            let missing = || Invalid::new(format!("open file {id}"), "is not there");
            Ok(ours.ok_or_else(missing)?.as_fd())
        };
        let sent = attached.map_or(&[][..], |attached| &attached.files);
        let sent: Vec<BorrowedFd<'_>> = sent.iter().map(ours).collect::<Result<_>>()?;
        let sender = attached.and_then(|attached| attached.sender);
        let along = Along {
            address,
            sender: sender.map(|Ids { pid, uid, gid }| Sender { pid, uid, gid }),
            files: &sent,
        };
        socket::send(from.as_fd(), message, &along).map_err(one.failed("sendmsg"))
    }

    /// Sends everything that lies unread.
    fn send(&self, carried: &[Carried<'t>], pairs: &[Pair<'t>], files: &Files) -> Result<()> {
        for pair in pairs {
            for (end, other) in [(pair.ends[0], pair.ends[1]), (pair.ends[1], pair.ends[0])] {
                let Some(end) = end else { continue };
                let from = match other {
                    Some(other) => self.socket(other.id)?,
                    None => {
                        let mut closed = self.closed.iter();
                        let Some((_, from)) = closed.find(|(id, _)| *id == end.id) else {
                            continue;
                        };
                        widen(from, &end)?;
                        from
                    }
                };
                for message in messages(end.socket) {
                    self.send_one(files, &end, from, &[], message)?;
                }
            }
        }
        let mut senders: BTreeMap<&[u8], u32> = BTreeMap::new();
        for one in carried.iter().filter(|one| one.is_datagram()) {
            senders.insert(&one.socket.local, one.id);
        }
        for one in carried.iter().filter(|one| one.socket.pair == 0) {
            if one.socket.queue.is_empty() {
                continue;
            }
            let stranger = one.create()?;
            widen(&stranger, one)?;
            for message in messages(one.socket) {
                let address = message.1.map_or(&[][..], |attached| &attached.address);
                // Those without a name are in nobody's.
                let named = senders.get(address).filter(|_| !address.is_empty());
                let from = match named {
                    Some(&id) => self.socket(id)?,
                    None => &stranger,
                };
                self.send_one(files, one, from, &one.socket.local, message)?;
            }
        }
        Ok(())
    }

    /// Connects datagram sockets to those that are not connected back.
    fn connect_alone(&self, carried: &[Carried<'t>]) -> Result<()> {
        let mut left: Vec<&Carried<'t>> = carried
            .iter()
            .filter(|one| one.socket.pair == 0 && !one.socket.remote.is_empty())
            .collect();
        while !left.is_empty() {
            let wanted: BTreeSet<&[u8]> = left
                .iter()
                .filter(|one| one.socket.remote != one.socket.local)
                .map(|one| one.socket.remote.as_slice())
                .collect();
            let (now, later): (Vec<&Carried<'t>>, Vec<_>) = left
                .into_iter()
                .partition(|one| !wanted.contains(one.socket.local.as_slice()));
            if now.is_empty() {
                return Err(Invalid::new("datagram sockets", "are connected in a circle").into());
            }
            for one in now {
                let ours = self.socket(one.id)?;
                socket::connect_raw(ours.as_fd(), &one.socket.remote)
                    .map_err(one.failed("connect"))?;
            }
            left = later;
        }
        Ok(())
    }

    fn set_option(
        &self,
        one: &Carried<'t>,
        option: &pageferry_image::model::sockets::Option,
    ) -> Result<()> {
        let ours = self.socket(one.id)?;
        socket::set_option(ours.as_fd(), option.level, option.name, &option.value)
            .map_err(one.failed("setsockopt"))
    }

    fn finish(&self, one: &Carried<'t>) -> Result<()> {
        let ours = self.socket(one.id)?;
        for option in &one.socket.options {
            self.set_option(one, option)?;
        }
        if one.socket.shut_read || one.socket.shut_write {
            socket::shutdown(ours.as_fd(), one.socket.shut_read, one.socket.shut_write)
                .map_err(one.failed("shutdown"))?;
        }
        files::set_status(ours, one.flags)
            .map_err(|errno| Error::object(one.object(), "fcntl(F_SETFL)", errno))
    }
}

/// What lies unread, each message with what comes along.
fn messages(socket: &Socket) -> impl Iterator<Item = (&[u8], Option<&Attached>)> {
    let mut attached = socket.attached.iter().peekable();
    (0..).zip(&socket.queue).map(move |(index, message)| {
        let attached = attached.next_if(|attached| attached.message == index);
        (message.as_slice(), attached)
    })
}

/// Lets a husk connect a socket of ours to `name`.
fn connect_raw(
    injection: &mut Injection<'_>,
    pid: i32,
    ours: &OwnedFd,
    name: &[u8],
    object: &str,
) -> Result<()> {
    // The husk must not wait.
    descriptor::set_status_flags(ours.as_fd(), libc::O_NONBLOCK.unsigned_abs())?;
    let mut work = Work::new(injection, pid);
    lend(&mut work, ours, object, |work, lent| {
        let address = work.bytes(name)?;
        let args = [lent.into(), address.into(), name.len().into()];
        work.call(object, "connect", libc::SYS_connect, &args);
        Ok(())
    })?;
    work.run()?;
    descriptor::set_status_flags(ours.as_fd(), 0)?;
    Ok(())
}

/// Takes the connection of `client` from `listener`. Strangers who came by that name find theirs closed, as when a server starts
/// again.
fn accept(
    diag: &UnixDiag,
    listener: &OwnedFd,
    client: &OwnedFd,
    one: &Carried<'_>,
) -> Result<OwnedFd> {
    let wanted = Peer::Socket(inode(client, one)?);
    loop {
        let accepted = socket::accept(listener.as_fd()).map_err(one.failed("accept4"))?;
        let found = diag.socket(inode(&accepted, one)?)?;
        if found.is_some_and(|found| found.peer == wanted) {
            return Ok(accepted);
        }
    }
}

/// Makes room for everything that may be sent from it.
fn widen(from: &OwnedFd, one: &Carried<'_>) -> Result<()> {
    let size = SEND_BUFFER.to_ne_bytes();
    socket::set_option(from.as_fd(), libc::SOL_SOCKET, SO_SNDBUFFORCE, &size)
        .map_err(one.failed("setsockopt(SO_SNDBUFFORCE)"))
}
