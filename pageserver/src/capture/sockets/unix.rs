//! UNIX sockets: their names with the files that belong to these, connections inside the tree, and what lies unread.
//!
//! Who is at the other end only the kernel's socket diagnostics tell. A connection to a socket that no process of the tree has
//! is refused. One that lies unaccepted is carried as long as nothing was sent on it, for that could not be seen.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use pageferry_image::model::files::{File, file};
use pageferry_image::model::sockets::{
    Attached, Ids, Socket, SocketFile, State, unix_name, unix_path,
};
use pageferry_tracee::procfs::DescriptorEntry;
use pageferry_tracee::socket::{self, Message, Sender};
use pageferry_tracee::unix_diag::Peer;

use super::Pairs;
use super::flight::{self, InFlight};
use crate::capture::files::{Look, Verdict};
use crate::survey::RefusalKind;
use crate::{Error, Result};

/// Without a name nothing: the kernel tells the family only.
fn named(address: Vec<u8>) -> Vec<u8> {
    if address.len() > 2 {
        address
    } else {
        Vec::new()
    }
}

/// One socket. `unread`: the tree, and what travels in it, if what lies unread is to be had too.
pub(super) fn socket(
    entry: &DescriptorEntry,
    inode: u64,
    fd: BorrowedFd<'_>,
    kind: i32,
    unread: Option<(&Look<'_>, &InFlight)>,
    pairs: &mut Pairs,
) -> Result<Verdict<Socket>> {
    let local = named(socket::local_address(fd)?);
    let name = unix_name(&local).unwrap_or_default();
    if unix_path(&local).is_some_and(|path| !leads_there(path)) {
        return Ok(Err(RefusalKind::UnixNamed { name }));
    }
    let Some(found) = pairs.diag()?.socket(inode)? else {
        return Ok(Err(RefusalKind::UnixState {
            what: "no answer about its other end",
        }));
    };
    let is_bound = !local.is_empty();
    let mut made = Socket {
        file: file_of(&local, found.file_inode)?,
        local,
        peer: peer_ids(fd)?,
        ..Socket::default()
    };
    if found.state == socket::TCP_LISTEN {
        if found.waiting > 0 {
            let clients = pairs.diag()?.waiting(inode)?;
            pairs.waiting.insert(inode, (found.waiting, clients));
        }
        made.set_state(State::Listening);
        made.backlog = found.backlog;
        return Ok(Ok(made));
    }
    let is_datagram = kind == libc::SOCK_DGRAM;
    let alone = if is_bound {
        State::Bound
    } else {
        State::Unbound
    };
    let is_shut = (found.shut_read, found.shut_write);
    match found.peer {
        Peer::None => {
            made.set_state(alone);
            if is_datagram {
                (made.shut_read, made.shut_write) = is_shut;
            }
        }
        // One that waits to be accepted has no inode either, but nothing is shut.
        Peer::Hidden if !is_datagram && is_shut != (true, true) => {
            if socket::unsent_bytes(fd)? > 0 {
                return Ok(Err(RefusalKind::UnixState {
                    what: "a connection that nobody has accepted, and data sent on it",
                }));
            }
            made.set_state(State::Waiting);
            (made.shut_read, made.shut_write) = is_shut;
        }
        Peer::Hidden => {
            made.set_state(State::Paired);
            made.peer_closed = true;
            made.remote = named(socket::peer_address(fd)?.unwrap_or_default());
            made.pair = pairs.number(inode, inode);
        }
        Peer::Socket(peer) if pairs.own.contains(&peer) => {
            (made.shut_read, made.shut_write) = is_shut;
            let back = pairs.diag()?.socket(peer)?.map(|other| other.peer);
            if back == Some(Peer::Socket(inode)) && peer != inode {
                made.set_state(State::Paired);
                made.pair = pairs.number(inode, peer);
            } else {
                // A datagram socket may be connected to one that is not connected back.
                made.set_state(alone);
                made.remote = named(socket::peer_address(fd)?.unwrap_or_default());
                if !is_datagram || made.remote.is_empty() {
                    return Ok(Err(RefusalKind::UnixState {
                        what: "a one-sided connection",
                    }));
                }
            }
        }
        // It may be in a message, which is not looked at yet.
        Peer::Socket(_) if pairs.unseen => made.set_state(alone),
        Peer::Socket(peer) => {
            let address = socket::peer_address(fd)?.unwrap_or_default();
            return Ok(Err(RefusalKind::UnixOutside {
                name: unix_name(&address).unwrap_or_else(|| "a socket without a name".to_owned()),
                inode: peer,
            }));
        }
    }
    let has_queue = made.state() == State::Paired || is_datagram;
    let Some((look, in_flight)) = unread.filter(|_| has_queue) else {
        return Ok(Ok(made));
    };
    let Some(messages) = in_flight.queue(inode) else {
        return Ok(Err(RefusalKind::UnixState {
            what: "a queue that cannot be seen",
        }));
    };
    Ok(
        queue(&mut made, messages, is_datagram, look, pairs).and_then(|files| {
            // The kernel shows an empty message only once, and its program may have looked.
            match entry.info.scm_fds {
                Some(count) if count as usize != files => Err(RefusalKind::UnixState {
                    what: "a message that cannot be seen a second time",
                }),
                _ => Ok(made),
            }
        }),
    )
}

/// Takes what lies unread. How many open files travel with it.
fn queue(
    made: &mut Socket,
    messages: &[Message],
    is_datagram: bool,
    look: &Look<'_>,
    pairs: &Pairs,
) -> Verdict<usize> {
    let mut count = 0;
    for (index, message) in (0..).zip(messages) {
        // Of a stream the kernel tells the sender's name too: it is the other end.
        let address = match is_datagram {
            true => named(message.address.clone()),
            false => Vec::new(),
        };
        let sender = message
            .sender
            .map(|Sender { pid, uid, gid }| Ids { pid, uid, gid });
        if let Some(Ids { pid, .. }) = sender {
            if !look.pids.contains(&pid) && !look.ended.contains(&pid) {
                return Err(RefusalKind::UnixSender { pid });
            }
        }
        let sent = message.files.iter().map(flight::number);
        let files: Vec<u32> = sent.filter_map(|fd| pairs.sent.get(&fd).copied()).collect();
        count += files.len();
        if !address.is_empty() || sender.is_some() || !files.is_empty() {
            made.attached.push(Attached {
                message: index,
                address,
                sender,
                files,
            });
        }
        made.queue.push(message.bytes.clone());
    }
    Ok(count)
}

/// Whether the path means the same to everybody, and may be in a model.
fn leads_there(path: &[u8]) -> bool {
    path.starts_with(b"/") && path.split(|&byte| byte == b'/').all(|part| part != b"..")
}

/// The file of a bound socket, if it is still where it was made.
fn file_of(local: &[u8], inode: Option<u32>) -> Result<Option<SocketFile>> {
    let Some((path, inode)) = unix_path(local).zip(inode) else {
        return Ok(None);
    };
    let path = Path::new(OsStr::from_bytes(path));
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() && found.ino() as u32 == inode => {
            Ok(Some(SocketFile {
                mode: found.mode() & 0o7777,
                uid: found.uid(),
                gid: found.gid(),
                inode: found.ino(),
            }))
        }
        Ok(_) => Ok(None),
        Err(error)
            if matches!(
                error.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(source) => Err(Error::File {
            path: path.display().to_string(),
            source,
        }),
    }
}

fn peer_ids(fd: BorrowedFd<'_>) -> Result<Option<Ids>> {
    let (pid, uid, gid) = socket::peer_credentials(fd)?;
    // What the kernel tells where it has noted nobody.
    let nobody = (0, u32::MAX, u32::MAX);
    Ok(((pid, uid, gid) != nobody).then_some(Ids { pid, uid, gid }))
}

/// What can only be said of the sockets of a tree together: which end of each pair was accepted from a listening socket, and has
/// its name and not the file; whether each sender of an unread datagram is there; and who waits to be accepted where. What is
/// refused, by the number of the open file.
pub(crate) fn finish(files: &mut [File], pairs: &Pairs) -> Vec<(u32, RefusalKind)> {
    let mut uses: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
    let mut ends: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    let (mut receivers, mut listening) = (BTreeSet::new(), BTreeSet::new());
    for (index, file) in files.iter().enumerate() {
        let Some(file::Kind::Socket(socket)) = &file.kind else {
            continue;
        };
        if !socket.is_unix() {
            continue;
        }
        if !socket.local.is_empty() {
            *uses.entry(socket.local.clone()).or_default() += 1;
        }
        if socket.r#type == libc::SOCK_DGRAM {
            receivers.insert(socket.local.clone());
        }
        if socket.state() == State::Listening {
            listening.insert(socket.local.clone());
        }
        if socket.pair != 0 {
            ends.entry(socket.pair).or_default().push(index);
        }
    }
    let mut others: BTreeMap<usize, Vec<u8>> = BTreeMap::new();
    for pair in ends.values() {
        let local = |index: &usize| match &files[*index].kind {
            Some(file::Kind::Socket(socket)) => socket.local.clone(),
            _ => Vec::new(),
        };
        let names: Vec<Vec<u8>> = pair.iter().map(local).collect();
        for (index, other) in pair.iter().zip(names.iter().rev()) {
            others.insert(*index, other.clone());
        }
        // The name of a listening socket is that of others too; if neither is, it makes no difference.
        let rank = |name: &Vec<u8>| {
            let count = uses.get(name).copied().unwrap_or(0);
            (listening.contains(name), count)
        };
        let shared = |name: &Vec<u8>| rank(name) > (false, 1);
        let closed = match (&files[pair[0]].kind, pair.len()) {
            (Some(file::Kind::Socket(socket)), 1) => socket.remote.clone(),
            _ => Vec::new(),
        };
        let accepted = (0..names.len())
            .filter(|&at| !names[at].is_empty() && (closed.is_empty() || shared(&names[at])))
            .max_by_key(|&at| rank(&names[at]));
        if let Some(index) = accepted.map(|at| pair[at]) {
            if let Some(file::Kind::Socket(socket)) = &mut files[index].kind {
                if socket.r#type != libc::SOCK_DGRAM {
                    socket.accepted = true;
                    socket.file = None;
                }
            }
        }
    }
    let mut refused = accept_queues(files, pairs);
    for (index, file) in files.iter_mut().enumerate() {
        let Some(file::Kind::Socket(socket)) = &mut file.kind else {
            continue;
        };
        let is_there = if socket.pair == 0 {
            let mut senders = senders(socket);
            senders.all(|address| receivers.contains(address))
        } else {
            // Nobody but the other end can send to it now.
            let other = if socket.peer_closed {
                &socket.remote
            } else {
                others.get(&index).unwrap_or(&socket.remote)
            };
            let is_other = senders(socket).all(|address| address == other);
            for attached in &mut socket.attached {
                attached.address.clear();
            }
            let is_something =
                |attached: &Attached| attached.sender.is_some() || !attached.files.is_empty();
            socket.attached.retain(is_something);
            is_other
        };
        if !is_there {
            let what = "an unread message from a socket that is not in the tree";
            refused.push((file.id, RefusalKind::UnixState { what }));
        }
    }
    refused
}

/// The names from which its messages came.
fn senders(socket: &Socket) -> impl Iterator<Item = &Vec<u8>> {
    let attached = socket.attached.iter();
    attached
        .map(|attached| &attached.address)
        .filter(|address| !address.is_empty())
}

/// Tells listening sockets who waits to be accepted. What is refused: a queue that cannot be made again as a whole, and who waits in
/// it, or in one that is not there.
fn accept_queues(files: &mut [File], pairs: &Pairs) -> Vec<(u32, RefusalKind)> {
    let unix = |file: &File| match &file.kind {
        Some(file::Kind::Socket(socket)) if socket.is_unix() => Some(socket.state()),
        _ => None,
    };
    let mut unaccepted: BTreeSet<u32> = files
        .iter()
        .filter(|file| unix(file) == Some(State::Waiting))
        .map(|file| file.id)
        .collect();
    let mut refused = Vec::new();
    for (inode, (count, clients)) in &pairs.waiting {
        let number = |inode| pairs.files.get(inode).copied();
        let ids: Vec<u32> = clients
            .iter()
            .filter_map(number)
            .filter(|id| unaccepted.contains(id))
            .collect();
        let listener = files
            .iter_mut()
            .find(|file| Some(file.id) == pairs.files.get(inode).copied());
        let Some(file::Kind::Socket(socket)) = listener.and_then(|file| file.kind.as_mut()) else {
            continue;
        };
        let can_be_found = socket.file.is_some() || unix_path(&socket.local).is_none();
        if can_be_found && ids.len() == *count as usize {
            unaccepted.retain(|id| !ids.contains(id));
            socket.waiting = ids;
        } else if let Some(id) = number(inode).filter(|_| !pairs.unseen) {
            let name = unix_name(&socket.local).unwrap_or_default();
            let count = *count;
            refused.push((id, RefusalKind::UnixAcceptQueue { name, count }));
        }
    }
    if !pairs.unseen {
        let what = "a connection that nobody has accepted";
        refused.extend(
            unaccepted
                .into_iter()
                .map(|id| (id, RefusalKind::UnixState { what })),
        );
    }
    refused
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::files::Depth;

    fn finish(files: &mut [File]) -> Vec<(u32, RefusalKind)> {
        super::finish(files, &Pairs::new(&[], Depth::Capture))
    }

    fn file(id: u32, socket: Socket) -> File {
        File {
            id,
            kind: Some(file::Kind::Socket(Socket {
                family: libc::AF_UNIX,
                ..socket
            })),
            ..File::default()
        }
    }

    fn end(id: u32, pair: u32, local: &[u8], remote: &[u8]) -> File {
        let socket = Socket {
            r#type: libc::SOCK_STREAM,
            state: State::Paired.into(),
            pair,
            local: local.to_vec(),
            remote: remote.to_vec(),
            peer_closed: !remote.is_empty(),
            file: Some(SocketFile::default()).filter(|_| !local.is_empty()),
            ..Socket::default()
        };
        file(id, socket)
    }

    fn accepted(files: &[File]) -> Vec<u32> {
        let is_accepted = |file: &&File| matches!(&file.kind, Some(file::Kind::Socket(socket)) if socket.accepted && socket.file.is_none());
        files
            .iter()
            .filter(is_accepted)
            .map(|file| file.id)
            .collect()
    }

    #[test]
    fn who_was_accepted_has_the_name_that_others_have_too() {
        let (own, public) = (b"\x01\0/own\0", b"\x01\0/public\0");
        let mut files = [
            end(1, 1, own, b""),
            end(2, 1, public, b""),
            end(3, 2, b"", b""),
            end(4, 2, public, b""),
            end(5, 3, b"\x01\0/other\0", public),
            end(6, 4, b"", b""),
            end(7, 4, b"", b""),
            file(
                8,
                Socket {
                    r#type: libc::SOCK_STREAM,
                    state: State::Listening.into(),
                    local: public.to_vec(),
                    ..Socket::default()
                },
            ),
        ];
        assert_eq!(finish(&mut files), []);
        assert_eq!(accepted(&files), [2, 4]);
        let mut alone = [end(1, 1, b"", public), end(2, 2, own, public)];
        assert_eq!(finish(&mut alone), []);
        assert_eq!(accepted(&alone), [], "the closed end was accepted");
    }

    #[test]
    fn a_message_of_an_unknown_sender_is_refused() {
        let datagram = |id, local: &[u8], sender: &[u8]| {
            let socket = Socket {
                r#type: libc::SOCK_DGRAM,
                state: State::Bound.into(),
                local: local.to_vec(),
                queue: vec![Vec::new()],
                attached: vec![Attached {
                    message: 0,
                    address: sender.to_vec(),
                    ..Attached::default()
                }],
                ..Socket::default()
            };
            file(id, socket)
        };
        let (one, other) = (b"\x01\0/one\0", b"\x01\0/other\0");
        assert_eq!(
            finish(&mut [datagram(1, one, other), datagram(2, other, one)]),
            []
        );
        let refused = finish(&mut [datagram(1, one, other)]);
        assert!(matches!(refused[..], [(1, RefusalKind::UnixState { .. })]));
    }

    #[test]
    fn an_accept_queue_is_carried_as_a_whole_or_refused() {
        let (name, path) = (b"\x01\0\0public", b"\x01\0/public\0");
        let stream = |id, state: State, local: &[u8]| {
            let socket = Socket {
                r#type: libc::SOCK_STREAM,
                state: state.into(),
                local: local.to_vec(),
                ..Socket::default()
            };
            file(id, socket)
        };
        let check = |local: &[u8], count, clients: &[u64]| {
            let mut pairs = Pairs::new(&[], Depth::Capture);
            pairs.files = [(100, 1), (200, 2), (300, 3)].into();
            pairs.waiting = [(100, (count, clients.to_vec()))].into();
            let mut files = [
                stream(1, State::Listening, local),
                stream(2, State::Waiting, b""),
                stream(3, State::Waiting, b""),
            ];
            let refused = super::finish(&mut files, &pairs);
            let Some(file::Kind::Socket(listener)) = &files[0].kind else {
                panic!("it is a socket");
            };
            let ids: Vec<u32> = refused.iter().map(|(id, _)| *id).collect();
            (listener.waiting.clone(), ids)
        };
        assert_eq!(check(name, 2, &[300, 200]), (vec![3, 2], vec![]));
        assert_eq!(check(name, 1, &[200]), (vec![2], vec![3]), "one elsewhere");
        // A stranger, one that is closed, and one that the kernel does not tell.
        assert_eq!(check(name, 3, &[200, 900, 300]), (vec![], vec![1, 2, 3]));
        assert_eq!(check(name, 3, &[200, 0, 300]), (vec![], vec![1, 2, 3]));
        assert_eq!(check(name, 3, &[]), (vec![], vec![1, 2, 3]));
        assert_eq!(
            check(path, 2, &[200, 300]),
            (vec![], vec![1, 2, 3]),
            "no file"
        );
    }
}
