//! Rebuilds sockets: unbound, bound and listening ones, UNIX socket pairs with what was queued in them, and closed ones
//! in the place of connections that the operator chose to drop.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use pageferry_image::model::Invalid;
use pageferry_image::model::files::file;
use pageferry_image::model::sockets::{Socket, State};
use pageferry_image::model::task::Tree;
use pageferry_tracee::descriptor::PidFd;
use pageferry_tracee::injection::Injection;
use pageferry_tracee::socket;

use super::{Error, Result, Work, files};

/// Options that must be set before bind(2) to matter; the others are set after it, as the program did.
const BEFORE_BIND: [(i32, i32); 5] = [
    (libc::SOL_SOCKET, libc::SO_REUSEADDR),
    (libc::SOL_SOCKET, libc::SO_REUSEPORT),
    (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
    (libc::IPPROTO_IP, libc::IP_FREEBIND),
    (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
];

/// Makes a socket in our process; `None` for an end of a pair, which [`make_pairs`] makes in the husk.
pub(crate) fn make(carried: &Socket, object: &str) -> Result<Option<OwnedFd>> {
    let state = carried.state();
    if state == State::Paired {
        return Ok(None);
    }
    let kernel = |call: &'static str| {
        move |error: pageferry_tracee::Error| {
            Error::object(object, call, std::io::Error::other(error))
        }
    };
    let made = socket::create(carried.family, carried.r#type, carried.protocol)
        .map_err(kernel("socket"))?;
    let (before, after): (Vec<_>, Vec<_>) = carried
        .options
        .iter()
        .partition(|option| BEFORE_BIND.contains(&(option.level, option.name)));
    for option in before {
        socket::set_option(made.as_fd(), option.level, option.name, &option.value)
            .map_err(kernel("setsockopt"))?;
    }
    match state {
        State::Bound | State::Listening => {
            socket::bind_raw(made.as_fd(), &carried.local).map_err(kernel("bind"))?;
        }
        State::Unbound | State::Dropped => {}
        State::Paired | State::Invalid => {
            return Err(Invalid::new(object, "is in no known state").into());
        }
    }
    for option in after {
        socket::set_option(made.as_fd(), option.level, option.name, &option.value)
            .map_err(kernel("setsockopt"))?;
    }
    if state == State::Listening {
        socket::listen(made.as_fd(), carried.backlog).map_err(kernel("listen"))?;
    }
    Ok(Some(made))
}

/// Makes those UNIX socket pairs inside the husk of which an end is among `new`, the open files that it is the first to have, each
/// with its lowest descriptor. The husk already has the leader's user and group: the kernel records the maker as each end's peer.
/// Returns our copies of both ends; the husk's own are closed again.
pub(crate) fn make_pairs(
    injection: &mut Injection<'_>,
    pid: i32,
    new: &BTreeMap<u32, u32>,
    tree: &Tree,
) -> Result<Vec<(u32, OwnedFd)>> {
    let mut ends: BTreeMap<u32, Vec<(u32, &Socket, u32)>> = BTreeMap::new();
    for carried in &tree.files {
        if let Some(file::Kind::Socket(socket)) = &carried.kind {
            if socket.state() == State::Paired {
                ends.entry(socket.pair)
                    .or_default()
                    .push((carried.id, socket, carried.flags));
            }
        }
    }
    let mut made = Vec::new();
    for (pair, carried) in ends {
        let Some(fd) = carried.iter().find_map(|(id, ..)| new.get(id)) else {
            continue;
        };
        let object = format!("fd {fd} (UNIX socket pair {pair})");
        let (first, second) = make_pair(injection, pid, carried[0].1, &object)?;
        let kernel = |call: &'static str| {
            let object = object.clone();
            move |error: pageferry_tracee::Error| {
                Error::object(object, call, std::io::Error::other(error))
            }
        };
        // What lies unread at one end was sent from the other.
        for (end, from) in [(carried.first(), &second), (carried.get(1), &first)] {
            for message in end.map_or(&[][..], |(_, socket, _)| &socket.queue) {
                socket::send(from.as_fd(), message).map_err(kernel("send"))?;
            }
        }
        for (at, fd) in [(0usize, first), (1, second)] {
            let Some((id, socket, flags)) = carried.get(at) else {
                continue;
            };
            for option in &socket.options {
                socket::set_option(fd.as_fd(), option.level, option.name, &option.value)
                    .map_err(kernel("setsockopt"))?;
            }
            if socket.shut_read || socket.shut_write {
                socket::shutdown(fd.as_fd(), socket.shut_read, socket.shut_write)
                    .map_err(kernel("shutdown"))?;
            }
            files::set_status(&fd, *flags)
                .map_err(|errno| Error::object(object.as_str(), "fcntl(F_SETFL)", errno))?;
            made.push((*id, fd));
        }
    }
    Ok(made)
}

fn make_pair(
    injection: &mut Injection<'_>,
    pid: i32,
    carried: &Socket,
    object: &str,
) -> Result<(OwnedFd, OwnedFd)> {
    let mut work = Work::new(injection, pid);
    let at = work.bytes(&[0; 8])?;
    work.call(
        object,
        "socketpair",
        libc::SYS_socketpair,
        &[
            carried.family.into(),
            (carried.r#type | libc::SOCK_CLOEXEC).into(),
            carried.protocol.into(),
            at.into(),
        ],
    );
    work.run()?;
    let offset = usize::try_from(at - work.injection().scratch_address(pid)).unwrap_or(0);
    let numbers = work.injection().scratch(pid)[offset..offset + 8].to_vec();
    let number = |index: usize| {
        u32::from_le_bytes([
            numbers[index],
            numbers[index + 1],
            numbers[index + 2],
            numbers[index + 3],
        ])
    };
    let (first, second) = (number(0), number(4));
    let pidfd = PidFd::open(pid)?;
    let ours = (pidfd.get_fd(first)?, pidfd.get_fd(second)?);
    for fd in [first, second] {
        work.call(object, "close", libc::SYS_close, &[u64::from(fd).into()]);
    }
    work.run()?;
    Ok(ours)
}
