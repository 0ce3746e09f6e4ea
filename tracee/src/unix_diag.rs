//! What the kernel tells of UNIX sockets that no call on a descriptor does: who is at the other end, which file bind(2) made, how
//! many wait to be accepted (sock_diag(7), `CONFIG_UNIX_DIAG`).
//!
//! It asks about sockets of our own network namespace, one by one and by inode, and changes nothing.
//!
//! # Safety
//! Each unsafe block is one system call with a buffer that outlives it and whose length is stated with it.

use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;

use crate::choke::{self, Kind};
use crate::error::{Error, Result};
use crate::process::own_pid;
use crate::socket;

const WHAT: &str = "sock_diag";

fn failed(errno: Errno) -> Error {
    Error::kernel(WHAT, own_pid(), errno)
}

/// The other end of a UNIX socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Peer {
    /// There never was one.
    #[default]
    None,
    /// The socket with this inode.
    Socket(u64),
    /// One that no descriptor leads to: it is closed, or waits to be accepted.
    Hidden,
}

/// What the kernel tells about one UNIX socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnixSocket {
    /// State, as of TCP: [`socket::TCP_ESTABLISHED`] connected, [`socket::TCP_CLOSE`] not, [`socket::TCP_LISTEN`].
    pub state: u8,
    /// The other end.
    pub peer: Peer,
    /// Of a listening socket: connections that wait to be accepted.
    pub waiting: u32,
    /// Of a listening socket: most connections that may wait to be accepted.
    pub backlog: u32,
    /// Receiving has been shut down.
    pub shut_read: bool,
    /// Sending has been shut down. A stream or packet socket with a closed other end shows both.
    pub shut_write: bool,
    /// Lower half of the inode of the file that it was bound to, or that the socket that it was accepted from was.
    pub file_inode: Option<u32>,
}

/// `struct nlmsghdr` and `struct unix_diag_req`.
#[repr(C)]
struct Question {
    len: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    pid: u32,
    family: u8,
    protocol: u8,
    pad: u16,
    states: u32,
    inode: u32,
    show: u32,
    cookie: [u32; 2],
}
const _: () = assert!(size_of::<Question>() == 40);

/// `struct nlmsghdr`.
const HEADER_LEN: usize = 16;
/// Length of `struct unix_diag_msg`, which the attributes follow.
const ANSWER_LEN: usize = 16;
/// No answer is longer: two pages.
const ANSWER_MAX: usize = 8192;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SHOW_FILE: u32 = 2;
const SHOW_PEER: u32 = 4;
const SHOW_CONNECTIONS: u32 = 8;
const SHOW_QUEUE: u32 = 16;
const ATTRIBUTE_FILE: u16 = 1;
const ATTRIBUTE_PEER: u16 = 2;
const ATTRIBUTE_CONNECTIONS: u16 = 3;
const ATTRIBUTE_QUEUE: u16 = 4;
const ATTRIBUTE_SHUTDOWN: u16 = 6;

/// A netlink socket to ask by.
#[derive(Debug)]
pub struct UnixDiag {
    netlink: OwnedFd,
}

impl UnixDiag {
    /// Opens it in our own network namespace.
    ///
    /// # Errors
    /// [`Error::Kernel`]: `EPROTONOSUPPORT` without netlink diagnostics.
    pub fn open() -> Result<Self> {
        let netlink = socket::create(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_SOCK_DIAG)?;
        Ok(Self { netlink })
    }

    /// The socket with this inode, which is the number in `socket:[n]`; `None` if there is no such UNIX socket.
    ///
    /// # Errors
    /// [`Error::Kernel`]: `ENOENT` without `CONFIG_UNIX_DIAG` is told as `None` too.
    pub fn socket(&self, inode: u64) -> Result<Option<UnixSocket>> {
        let found = self.ask(inode, SHOW_FILE | SHOW_PEER | SHOW_QUEUE)?;
        Ok(found.map(|(found, _)| found))
    }

    /// The inodes of those who wait to be accepted by the listening socket with this one, in order; 0 for one that has closed its
    /// end. None of them if they are so many that the kernel does not tell, some nine hundred.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    pub fn waiting(&self, inode: u64) -> Result<Vec<u64>> {
        match self.ask(inode, SHOW_CONNECTIONS) {
            Ok(found) => Ok(found.map(|(_, waiting)| waiting).unwrap_or_default()),
            Err(Error::Kernel {
                errno: Errno::EMSGSIZE,
                ..
            }) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    fn ask(&self, inode: u64, show: u32) -> Result<Option<(UnixSocket, Vec<u64>)>> {
        let Ok(inode) = u32::try_from(inode) else {
            return Ok(None);
        };
        let question = Question {
            len: size_of::<Question>() as u32,
            kind: SOCK_DIAG_BY_FAMILY,
            flags: libc::NLM_F_REQUEST as u16,
            sequence: 0,
            pid: 0,
            family: libc::AF_UNIX as u8,
            protocol: 0,
            pad: 0,
            states: u32::MAX,
            inode,
            show,
            // Any cookie.
            cookie: [u32::MAX; 2],
        };
        choke::pass(Kind::Descriptor).map_err(failed)?;
        // SAFETY: a plain structure without padding, readable for its size.
        let answer = unsafe {
            libc::send(
                self.netlink.as_raw_fd(),
                (&raw const question).cast(),
                size_of::<Question>(),
                0,
            )
        };
        Errno::result(answer).map_err(failed)?;
        let mut buffer = [0_u8; ANSWER_MAX];
        let len = loop {
            // SAFETY: the buffer is writable for its length.
            let answer = unsafe {
                libc::recv(
                    self.netlink.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    0,
                )
            };
            match Errno::result(answer) {
                Ok(len) => break len as usize,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(failed(errno)),
            }
        };
        decode(&buffer[..len]).map_err(failed)
    }
}

/// One answer: the socket, and who waits to be accepted by it.
fn decode(answer: &[u8]) -> std::result::Result<Option<(UnixSocket, Vec<u64>)>, Errno> {
    const RECEIVE: u8 = 1;
    const SEND: u8 = 2;
    match half(answer, 4)? {
        SOCK_DIAG_BY_FAMILY => {}
        kind if i32::from(kind) == libc::NLMSG_ERROR => {
            let code = word(answer, HEADER_LEN)? as i32;
            return match Errno::from_raw(code.wrapping_neg()) {
                Errno::ENOENT => Ok(None),
                errno => Err(errno),
            };
        }
        _ => return Err(Errno::EBADMSG),
    }
    let body = answer.get(HEADER_LEN..).ok_or(Errno::EBADMSG)?;
    let mut found = UnixSocket {
        state: *body.get(2).ok_or(Errno::EBADMSG)?,
        ..UnixSocket::default()
    };
    let mut waiting = Vec::new();
    let mut rest = body.get(ANSWER_LEN..).ok_or(Errno::EBADMSG)?;
    while rest.len() >= 4 {
        let len = usize::from(half(rest, 0)?);
        let value = rest.get(4..len).ok_or(Errno::EBADMSG)?;
        match half(rest, 2)? {
            ATTRIBUTE_FILE => found.file_inode = Some(word(value, 0)?),
            ATTRIBUTE_PEER => {
                found.peer = match word(value, 0)? {
                    0 => Peer::Hidden,
                    inode => Peer::Socket(inode.into()),
                }
            }
            ATTRIBUTE_CONNECTIONS => {
                for at in (0..value.len()).step_by(4) {
                    waiting.push(word(value, at)?.into());
                }
            }
            ATTRIBUTE_QUEUE if found.state == socket::TCP_LISTEN => {
                (found.waiting, found.backlog) = (word(value, 0)?, word(value, 4)?);
            }
            ATTRIBUTE_SHUTDOWN => {
                let bits = *value.first().ok_or(Errno::EBADMSG)?;
                found.shut_read = bits & RECEIVE != 0;
                found.shut_write = bits & SEND != 0;
            }
            _ => {}
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(Some((found, waiting)))
}

fn word(bytes: &[u8], at: usize) -> std::result::Result<u32, Errno> {
    let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
    word.map(u32::from_ne_bytes).ok_or(Errno::EBADMSG)
}

fn half(bytes: &[u8], at: usize) -> std::result::Result<u16, Errno> {
    let half = bytes.get(at..at + 2).and_then(|half| half.try_into().ok());
    half.map(u16::from_ne_bytes).ok_or(Errno::EBADMSG)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::os::unix::fs::MetadataExt as _;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;
    use crate::procfs;

    fn inode_of(socket: &impl std::os::fd::AsRawFd) -> u64 {
        procfs::descriptor(own_pid(), socket.as_raw_fd() as u32)
            .expect("own descriptor")
            .pipe_or_socket_inode()
            .expect("a socket")
    }

    fn ask(socket: &impl std::os::fd::AsRawFd) -> UnixSocket {
        let diag = UnixDiag::open().expect("netlink");
        diag.socket(inode_of(socket))
            .expect("answered")
            .expect("it is there")
    }

    #[test]
    fn both_ends_of_a_pair_know_each_other() {
        let (near, far) = socket::create_pair(libc::SOCK_STREAM).expect("pair");
        assert_eq!(ask(&near).peer, Peer::Socket(inode_of(&far)));
        assert_eq!(ask(&far).peer, Peer::Socket(inode_of(&near)));
        assert_eq!(ask(&far).state, socket::TCP_ESTABLISHED);
        let (pid, uid, _) = socket::peer_credentials(far.as_fd()).expect("credentials");
        assert_eq!((pid, uid), (own_pid(), nix::unistd::getuid().as_raw()));
        socket::shutdown(near.as_fd(), false, true).expect("shutdown");
        assert!(ask(&far).shut_read && !ask(&far).shut_write);
        drop(near);
        let left = ask(&far);
        assert_eq!(left.peer, Peer::Hidden);
        assert!(left.shut_read && left.shut_write);
        let diag = UnixDiag::open().expect("netlink");
        assert_eq!(diag.socket(0xffff_fff0).expect("answered"), None);
    }

    #[test]
    fn a_listener_tells_its_file_its_backlog_and_who_waits() {
        let path = std::env::temp_dir().join(format!("pageferry-unix-diag-{}", own_pid()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).expect("bound");
        let inode = std::fs::metadata(&path).expect("it is there").ino() as u32;
        let quiet = ask(&listener);
        assert_eq!(
            (quiet.state, quiet.waiting, quiet.file_inode),
            (socket::TCP_LISTEN, 0, Some(inode))
        );
        assert!(quiet.backlog > 0);
        let client = UnixStream::connect(&path).expect("connected");
        assert_eq!(ask(&listener).waiting, 1);
        let diag = UnixDiag::open().expect("netlink");
        let connections = || diag.waiting(inode_of(&listener)).expect("answered");
        assert_eq!(connections(), [inode_of(&client)]);
        let closed = UnixStream::connect(&path).expect("connected");
        drop(closed);
        assert_eq!(connections(), [inode_of(&client), 0]);
        // Nobody has the other end yet, and nothing is shut: it is not closed.
        let waiting = ask(&client);
        assert_eq!(
            (waiting.peer, waiting.shut_read, waiting.shut_write),
            (Peer::Hidden, false, false)
        );
        let accepted = socket::accept(listener.as_fd()).expect("accepted");
        assert_eq!(ask(&client).peer, Peer::Socket(inode_of(&accepted)));
        assert_eq!(ask(&accepted).file_inode, Some(inode));
        std::fs::remove_file(&path).expect("it is ours");
    }

    #[test]
    fn what_is_no_answer_is_an_error() {
        for bad in [&[][..], &[0; 8], &[0; 40]] {
            assert_eq!(decode(bad), Err(Errno::EBADMSG));
        }
    }
}
