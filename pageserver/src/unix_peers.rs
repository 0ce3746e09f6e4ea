//! Who is at the other end of a UNIX socket: the kernel's socket diagnostics (sock_diag(7)), which alone tell it.
//!
//! It asks about sockets of our own network namespace by inode, and changes nothing.

use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};
use pageferry_tracee::Error as ProcessError;
use pageferry_tracee::choke::{self, Kind};

use crate::Result;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
/// `struct nlmsghdr`.
const HEADER_LEN: usize = 16;
/// `struct unix_diag_msg`.
const ANSWER_LEN: usize = 16;
const SHOW_PEER: u32 = 4;
const ATTRIBUTE_PEER: u16 = 2;
const ATTRIBUTE_SHUTDOWN: u16 = 6;
const WHAT: &str = "sock_diag";

/// What the kernel tells of one UNIX socket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Connection {
    /// Inode of the other end, 0 if that is closed; `None` if it was never connected.
    pub peer: Option<u32>,
    /// `RCV_SHUTDOWN` 1, `SEND_SHUTDOWN` 2.
    pub shutdown: u8,
}

/// A netlink socket to ask by.
#[derive(Debug)]
pub(crate) struct UnixPeers {
    netlink: OwnedFd,
}

fn failed(errno: Errno) -> crate::Error {
    ProcessError::kernel(WHAT, 0, errno).into()
}

impl UnixPeers {
    pub(crate) fn open() -> Result<Self> {
        choke::pass(Kind::Descriptor).map_err(failed)?;
        let netlink = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )
        .map_err(failed)?;
        Ok(Self { netlink })
    }

    /// The connection of the socket with this inode; `None` if there is no such UNIX socket.
    pub(crate) fn connection(&self, inode: u64) -> Result<Option<Connection>> {
        let Ok(inode) = u32::try_from(inode) else {
            return Ok(None);
        };
        choke::pass(Kind::Descriptor).map_err(failed)?;
        send(self.netlink.as_raw_fd(), &request(inode), MsgFlags::empty()).map_err(failed)?;
        let mut answer = vec![0; 8192];
        let length =
            recv(self.netlink.as_raw_fd(), &mut answer, MsgFlags::empty()).map_err(failed)?;
        parse(&answer[..length])
    }
}

fn request(inode: u32) -> Vec<u8> {
    let mut body = vec![libc::AF_UNIX as u8, 0, 0, 0];
    // All states, this inode, what to show, any cookie.
    for word in [u32::MAX, inode, SHOW_PEER, u32::MAX, u32::MAX] {
        body.extend_from_slice(&word.to_ne_bytes());
    }
    let mut message = Vec::with_capacity(HEADER_LEN + body.len());
    message.extend_from_slice(&((HEADER_LEN + body.len()) as u32).to_ne_bytes());
    message.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    message.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&body);
    message
}

fn parse(message: &[u8]) -> Result<Option<Connection>> {
    let half =
        |bytes: &[u8], at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let word =
        |bytes: &[u8], at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    match half(message, 4) {
        Some(SOCK_DIAG_BY_FAMILY) => {}
        Some(NLMSG_ERROR) => {
            return match Errno::from_raw(
                word(message, HEADER_LEN).map_or(0, |code| (code as i32).wrapping_neg()),
            ) {
                Errno::ENOENT => Ok(None),
                errno => Err(failed(errno)),
            };
        }
        _ => return Err(failed(Errno::EBADMSG)),
    }
    let mut connection = Connection::default();
    let mut rest = message.get(HEADER_LEN + ANSWER_LEN..).unwrap_or_default();
    while let (Some(length @ 4..), Some(kind)) = (half(rest, 0).map(usize::from), half(rest, 2)) {
        match kind {
            ATTRIBUTE_PEER => connection.peer = word(rest, 4),
            ATTRIBUTE_SHUTDOWN => connection.shutdown = rest.get(4).copied().unwrap_or_default(),
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(Some(connection))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn inode(socket: &UnixStream) -> u64 {
        std::fs::metadata(format!("/proc/self/fd/{}", socket.as_raw_fd()))
            .expect("own descriptor")
            .ino()
    }

    #[test]
    fn both_ends_of_a_pair_know_each_other() {
        let (first, second) = UnixStream::pair().expect("a pair");
        let peers = UnixPeers::open().expect("netlink");
        let connection = peers
            .connection(inode(&first))
            .expect("answered")
            .expect("found");
        assert_eq!(connection.peer.map(u64::from), Some(inode(&second)));
        first
            .shutdown(std::net::Shutdown::Write)
            .expect("shut down");
        assert_eq!(
            peers
                .connection(inode(&first))
                .expect("answered")
                .expect("found")
                .shutdown,
            2
        );
        drop(second);
        assert_eq!(
            peers
                .connection(inode(&first))
                .expect("answered")
                .expect("found")
                .peer,
            Some(0)
        );
        assert_eq!(peers.connection(0xffff_fff0).expect("answered"), None);
    }
}
