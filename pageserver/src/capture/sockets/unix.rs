//! UNIX sockets: their names with the files that belong to these, connections inside the tree, and what lies unread.
//!
//! Who is at the other end only the kernel's socket diagnostics tell. A connection to a socket that no process of the tree has
//! is refused, and so is one that lies unaccepted: what was sent on it cannot be seen.

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
use pageferry_tracee::socket;
use pageferry_tracee::unix_diag::Peer;

use super::Pairs;
use crate::capture::files::{Depth, Verdict};
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

/// One socket. With [`Depth::Survey`] without what lies unread.
pub(super) fn socket(
    entry: &DescriptorEntry,
    inode: u64,
    fd: BorrowedFd<'_>,
    kind: i32,
    depth: Depth,
    pairs: &mut Pairs,
) -> Result<Verdict<Socket>> {
    let local = named(socket::local_address(fd)?);
    let name = unix_name(&local).unwrap_or_default();
    if unix_path(&local).is_some_and(|path| !leads_there(path)) {
        return Ok(Err(RefusalKind::UnixNamed { name }));
    }
    if let Some(count @ 1..) = entry.info.scm_fds {
        return Ok(Err(RefusalKind::UnixInFlight { count }));
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
            let count = found.waiting;
            return Ok(Err(RefusalKind::UnixAcceptQueue { name, count }));
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
            return Ok(Err(RefusalKind::UnixState {
                what: "a connection that nobody has accepted",
            }));
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
        Peer::Socket(peer) => {
            let address = socket::peer_address(fd)?.unwrap_or_default();
            return Ok(Err(RefusalKind::UnixOutside {
                name: unix_name(&address).unwrap_or_else(|| "a socket without a name".to_owned()),
                inode: peer,
            }));
        }
    }
    let has_queue = made.state() == State::Paired || is_datagram;
    if depth == Depth::Capture && has_queue {
        let queue = socket::peek_all(fd)?;
        if queue.descriptors {
            return Ok(Err(RefusalKind::UnixInFlight { count: 1 }));
        }
        for (index, message) in (0..).zip(queue.messages) {
            let address = named(message.address);
            // Of a stream the kernel tells the sender too: it is the other end.
            if is_datagram && !address.is_empty() {
                made.attached.push(Attached {
                    message: index,
                    address,
                });
            }
            made.queue.push(message.bytes);
        }
    }
    Ok(Ok(made))
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
/// its name and not the file; and whether each sender of an unread datagram is there. What is refused, by the number of the open
/// file.
pub(crate) fn finish(files: &mut [File]) -> Vec<(u32, RefusalKind)> {
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
    let mut refused = Vec::new();
    for (index, file) in files.iter_mut().enumerate() {
        let Some(file::Kind::Socket(socket)) = &mut file.kind else {
            continue;
        };
        let is_there = if socket.pair == 0 {
            let mut senders = socket.attached.iter();
            senders.all(|attached| receivers.contains(&attached.address))
        } else {
            // Nobody but the other end can send to it now.
            let other = if socket.peer_closed {
                &socket.remote
            } else {
                others.get(&index).unwrap_or(&socket.remote)
            };
            let is_other = socket
                .attached
                .iter()
                .all(|attached| &attached.address == other);
            socket.attached.clear();
            is_other
        };
        if !is_there {
            let what = "an unread message from a socket that is not in the tree";
            refused.push((file.id, RefusalKind::UnixState { what }));
        }
    }
    refused
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
