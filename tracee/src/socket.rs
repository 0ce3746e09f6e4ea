//! Sockets, as the bytes the kernel takes and gives: options, addresses, states, and what lies unread in them.
//!
//! Everything works on a descriptor, be it a copy of one of the traced process' or a new one of ours. Reading never takes
//! anything out of a socket. An option is bytes here; which of them a migration carries is not this module's business.
//!
//! # Safety
//! Each unsafe block is one system call with buffers that outlive it and whose lengths are stated with them.

use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use nix::errno::Errno;

use crate::choke::{self, Kind};
use crate::error::{Error, Result};
use crate::process::own_pid;
use crate::procfs;

/// Longest address, `struct sockaddr_storage`.
const ADDRESS_MAX: usize = 128;
/// Longest option value that is read. The largest are classic BPF filters: 4096 instructions of 8 bytes.
const OPTION_MAX: usize = 32 * 1024;

fn failed(what: &'static str, errno: Errno) -> Error {
    Error::kernel(what, own_pid(), errno)
}

fn pass(what: &'static str) -> Result<()> {
    choke::pass(Kind::Descriptor).map_err(|errno| failed(what, errno))
}

fn done(answer: i32, what: &'static str) -> Result<()> {
    Errno::result(answer)
        .map(drop)
        .map_err(|errno| failed(what, errno))
}

// ---------------------------------------------------------------------------------------------------------------------
// Options and addresses

/// The value of an option, as long as the kernel has it.
///
/// # Errors
/// [`Error::Kernel`]: `ENOPROTOOPT` or `EOPNOTSUPP` for an option that this kind of socket has not.
pub fn option(socket: BorrowedFd<'_>, level: i32, name: i32) -> Result<Vec<u8>> {
    // Four bytes suffice for nearly all, and some options refuse any other length.
    let mut value = vec![0; 256];
    let len = option_into(socket, level, name, &mut value)?;
    if len < value.len() {
        value.truncate(len);
        return Ok(value);
    }
    value.resize(OPTION_MAX, 0);
    let len = option_into(socket, level, name, &mut value)?;
    value.truncate(len);
    Ok(value)
}

/// An option whose value is an int.
///
/// # Errors
/// As [`option`].
pub fn int_option(socket: BorrowedFd<'_>, level: i32, name: i32) -> Result<i32> {
    let mut value = [0; 4];
    option_into(socket, level, name, &mut value)?;
    Ok(i32::from_ne_bytes(value))
}

/// Whether a program of BPF decides what this socket receives: a classic one (`SO_ATTACH_FILTER`) tells its length, an extended
/// one (`SO_ATTACH_BPF`) that it cannot be told (`EACCES`).
///
/// # Errors
/// [`Error::Kernel`].
pub fn has_filter(socket: BorrowedFd<'_>) -> Result<bool> {
    match option_into(socket, libc::SOL_SOCKET, libc::SO_GET_FILTER, &mut []) {
        Ok(instructions) => Ok(instructions > 0),
        Err(Error::Kernel {
            errno: Errno::EACCES,
            ..
        }) => Ok(true),
        Err(error) => Err(error),
    }
}

/// The length the kernel tells: more than `value` takes, where it has more.
fn option_into(socket: BorrowedFd<'_>, level: i32, name: i32, value: &mut [u8]) -> Result<usize> {
    const WHAT: &str = "getsockopt";
    pass(WHAT)?;
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: `value` is writable for `len` bytes.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    done(answer, WHAT)?;
    Ok(len as usize)
}

/// Sets an option to a value as [`option`] gives it. Note that the kernel doubles `SO_RCVBUF` and `SO_SNDBUF`.
///
/// # Errors
/// [`Error::Kernel`].
pub fn set_option(socket: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> Result<()> {
    const WHAT: &str = "setsockopt";
    pass(WHAT)?;
    // SAFETY: `value` is readable for the length given.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    done(answer, WHAT)
}

/// Address family, type and protocol.
///
/// # Errors
/// [`Error::Kernel`]: `ENOTSOCK`.
pub fn kind(socket: BorrowedFd<'_>) -> Result<(i32, i32, i32)> {
    Ok((
        int_option(socket, libc::SOL_SOCKET, libc::SO_DOMAIN)?,
        int_option(socket, libc::SOL_SOCKET, libc::SO_TYPE)?,
        int_option(socket, libc::SOL_SOCKET, libc::SO_PROTOCOL)?,
    ))
}

type AddressCall =
    unsafe extern "C" fn(i32, *mut libc::sockaddr, *mut libc::socklen_t) -> libc::c_int;

fn address(socket: BorrowedFd<'_>, call: AddressCall, what: &'static str) -> Result<Vec<u8>> {
    pass(what)?;
    let mut bytes = vec![0; ADDRESS_MAX];
    let mut len = ADDRESS_MAX as libc::socklen_t;
    // SAFETY: both functions store at most `len` bytes of address and its length.
    let answer = unsafe { call(socket.as_raw_fd(), bytes.as_mut_ptr().cast(), &raw mut len) };
    done(answer, what)?;
    bytes.truncate(len as usize);
    Ok(bytes)
}

/// The local address, a `struct sockaddr` of exactly its length. An unbound UNIX socket has two bytes of family only.
///
/// # Errors
/// [`Error::Kernel`].
pub fn local_address(socket: BorrowedFd<'_>) -> Result<Vec<u8>> {
    address(socket, libc::getsockname, "getsockname")
}

/// The peer's address; `None` without a peer.
///
/// # Errors
/// [`Error::Kernel`].
pub fn peer_address(socket: BorrowedFd<'_>) -> Result<Option<Vec<u8>>> {
    match address(socket, libc::getpeername, "getpeername") {
        Ok(bytes) => Ok(Some(bytes)),
        Err(Error::Kernel {
            errno: Errno::ENOTCONN,
            ..
        }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Process, user and group of the peer of a UNIX socket as the kernel noted them when it was connected; the pid is 0 when it
/// lives outside our pid namespace or none was noted.
///
/// # Errors
/// [`Error::Kernel`].
pub fn peer_credentials(socket: BorrowedFd<'_>) -> Result<(i32, u32, u32)> {
    let mut value = [0; 12];
    option_into(socket, libc::SOL_SOCKET, libc::SO_PEERCRED, &mut value)?;
    let [pid, uid, gid] = [0, 4, 8].map(|at| {
        let mut word = [0; 4];
        word.copy_from_slice(&value[at..at + 4]);
        u32::from_ne_bytes(word)
    });
    Ok((pid as i32, uid, gid))
}

// ---------------------------------------------------------------------------------------------------------------------
// State

/// The part of `TCP_INFO` that tells what a TCP socket is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpState {
    /// `TCP_ESTABLISHED` 1, `TCP_SYN_SENT` 2 … `TCP_CLOSE` 7 … `TCP_LISTEN` 10 (see [`TCP_LISTEN`]).
    pub state: u8,
    /// Of a listening socket: most connections that may wait to be accepted.
    pub backlog: u32,
    /// Of a listening socket: connections that wait to be accepted now.
    pub waiting: u32,
}

/// State of a TCP connection that works.
pub const TCP_ESTABLISHED: u8 = 1;
/// State of a TCP socket that is not connected.
pub const TCP_CLOSE: u8 = 7;
/// State of a TCP socket that listens.
pub const TCP_LISTEN: u8 = 10;

/// What a TCP socket is doing.
///
/// # Errors
/// [`Error::Kernel`] for another kind of socket.
pub fn tcp_state(socket: BorrowedFd<'_>) -> Result<TcpState> {
    // struct tcp_info: eight bytes of small fields, of which the first is the state; then 32-bit words, of which number 4 is
    // tcpi_unacked and number 5 tcpi_sacked. For a listening socket the kernel keeps the accept queue's length and limit there.
    const UNACKED: usize = 24;
    const SACKED: usize = 28;
    const _: () = assert!(UNACKED == std::mem::offset_of!(libc::tcp_info, tcpi_unacked));
    const _: () = assert!(SACKED == std::mem::offset_of!(libc::tcp_info, tcpi_sacked));
    let mut value = [0; 104];
    let len = option_into(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut value)?;
    if len < SACKED + 4 {
        return Err(failed("getsockopt(TCP_INFO)", Errno::EIO));
    }
    let word = |at: usize| {
        let mut word = [0; 4];
        word.copy_from_slice(&value[at..at + 4]);
        u32::from_ne_bytes(word)
    };
    let state = value[0];
    let listening = state == TCP_LISTEN;
    Ok(TcpState {
        state,
        backlog: if listening { word(SACKED) } else { 0 },
        waiting: if listening { word(UNACKED) } else { 0 },
    })
}

/// Whether the socket listens (`SO_ACCEPTCONN`).
///
/// # Errors
/// [`Error::Kernel`].
pub fn is_listening(socket: BorrowedFd<'_>) -> Result<bool> {
    Ok(int_option(socket, libc::SOL_SOCKET, libc::SO_ACCEPTCONN)? != 0)
}

fn byte_count(socket: BorrowedFd<'_>, request: libc::Ioctl, what: &'static str) -> Result<usize> {
    pass(what)?;
    let mut bytes: libc::c_int = 0;
    // SAFETY: both requests store one int.
    let answer = unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut bytes) };
    done(answer, what)?;
    usize::try_from(bytes).map_err(|_| failed(what, Errno::EIO))
}

/// `SIOCINQ`: unread bytes; of a datagram socket only those of the first message.
///
/// # Errors
/// [`Error::Kernel`]: `EINVAL` for a listening socket.
pub fn unread_bytes(socket: BorrowedFd<'_>) -> Result<usize> {
    byte_count(socket, libc::FIONREAD, "ioctl(SIOCINQ)")
}

/// `SIOCOUTQ`: bytes sent that the peer has not read (UNIX, with the kernel's own overhead) or not acknowledged (TCP).
///
/// # Errors
/// [`Error::Kernel`]: `EINVAL` for a listening socket.
pub fn unsent_bytes(socket: BorrowedFd<'_>) -> Result<usize> {
    byte_count(socket, libc::TIOCOUTQ, "ioctl(SIOCOUTQ)")
}

// ---------------------------------------------------------------------------------------------------------------------
// What lies unread

/// One message, or of a stream everything that lies unread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// Content. A message may be empty.
    pub bytes: Vec<u8>,
    /// Sender's address; empty when there is none to tell.
    pub address: Vec<u8>,
}

/// What lies unread in a socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// In order of arrival.
    pub messages: Vec<Message>,
    /// Descriptors travel with some of it (`SCM_RIGHTS`).
    pub descriptors: bool,
}

/// Most messages that are looked at: far more than the largest receive buffer holds.
const MESSAGES_MAX: usize = 1 << 20;
/// No IP datagram is longer.
const DATAGRAM_MAX: usize = 64 * 1024;

/// A copy of everything that lies unread in a connected or bound socket (not a listening one), leaving it there.
///
/// Messages behind the first can only be seen by `SO_PEEK_OFF`, which is set for the time of the call where it is needed and
/// put back to what it was. Nobody may read from the socket meanwhile. Empty messages at the very end of a `SOCK_SEQPACKET`
/// whose other end is closed are not told apart from that end.
///
/// # Errors
/// [`Error::Kernel`]; [`Error::TooMuch`].
pub fn peek_all(socket: BorrowedFd<'_>) -> Result<Queue> {
    let (family, socket_type, _) = kind(socket)?;
    let mut queue = Queue::default();
    let unread = unread_bytes(socket)?;
    if socket_type == libc::SOCK_STREAM {
        // One peek goes over all of a stream unless descriptors stand in its way.
        let Some(first) = peek(socket, unread.max(1), 0)? else {
            return Ok(queue);
        };
        queue.descriptors = carries_descriptors(socket, first.control_cut)?;
        if first.message.bytes.len() == unread {
            if unread > 0 {
                queue.messages.push(first.message);
            }
            return Ok(queue);
        }
    }
    let ends = socket_type == libc::SOCK_SEQPACKET && is_hung_up(socket)?;
    let offset = PeekOffset::start(socket)?;
    let mut total = 0;
    loop {
        let next = match (family, socket_type) {
            (_, libc::SOCK_STREAM) => peek(socket, unread.max(1), 0)?,
            (libc::AF_UNIX, _) => peek_unix_message(socket)?,
            _ => peek(socket, DATAGRAM_MAX, 0)?,
        };
        let Some(next) = next else { break };
        let len = next.message.bytes.len();
        if len == 0 && (socket_type == libc::SOCK_STREAM || ends && total >= unread) {
            break;
        }
        total += len;
        queue.descriptors |= carries_descriptors(socket, next.control_cut)?;
        match queue.messages.last_mut() {
            Some(all) if socket_type == libc::SOCK_STREAM => all.bytes.extend(next.message.bytes),
            _ => queue.messages.push(next.message),
        }
        if queue.messages.len() > MESSAGES_MAX {
            return Err(Error::TooMuch {
                what: "messages in a socket",
                asked: queue.messages.len(),
                limit: MESSAGES_MAX,
            });
        }
    }
    offset.finish()?;
    Ok(queue)
}

/// Whether descriptors are in flight towards a socket: by our own `fdinfo` of it, or before 5.11 by control data having been
/// cut off, which credentials that the program asked for look like too.
fn carries_descriptors(socket: BorrowedFd<'_>, control_cut: bool) -> Result<bool> {
    let entry = procfs::descriptor(own_pid(), socket.as_raw_fd() as u32)?;
    Ok(entry.info.scm_fds.map_or(control_cut, |count| count > 0))
}

/// Whether nothing will follow what lies unread.
fn is_hung_up(socket: BorrowedFd<'_>) -> Result<bool> {
    pass("poll")?;
    let mut poll = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: one pollfd, which outlives the call; it does not wait.
    let answer = unsafe { libc::poll(&raw mut poll, 1, 0) };
    done(answer, "poll")?;
    Ok(poll.revents != 0)
}

/// The peek offset of a socket, put back when this is dropped.
struct PeekOffset<'a> {
    socket: BorrowedFd<'a>,
    old: i32,
    finished: bool,
}

impl<'a> PeekOffset<'a> {
    /// Lets every peek go on behind the one before.
    fn start(socket: BorrowedFd<'a>) -> Result<Self> {
        let old = int_option(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
        set_option(
            socket,
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            &0_i32.to_ne_bytes(),
        )?;
        Ok(Self {
            socket,
            old,
            finished: false,
        })
    }

    fn put_back(&mut self) -> Result<()> {
        self.finished = true;
        let old = self.old.to_ne_bytes();
        let put = || set_option(self.socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &old);
        // A clean-up: one failing call must not leave the program with our offset.
        put().or_else(|_| put())
    }

    fn finish(mut self) -> Result<()> {
        self.put_back()
    }
}

impl Drop for PeekOffset<'_> {
    fn drop(&mut self) {
        if !self.finished {
            // The error that led here is the one to report.
            let _ = self.put_back();
        }
    }
}

struct Peeked {
    message: Message,
    /// Length of the message, when `MSG_TRUNC` was asked for.
    full_len: usize,
    /// Control data was there and found no room.
    control_cut: bool,
}

/// A UNIX datagram or packet, of any length: a first look without a buffer tells how long it is and moves no offset.
fn peek_unix_message(socket: BorrowedFd<'_>) -> Result<Option<Peeked>> {
    match peek(socket, 0, libc::MSG_TRUNC)? {
        // An empty one: looking again would show the next, because the kernel notes that it has been shown.
        Some(empty) if empty.full_len == 0 => Ok(Some(empty)),
        Some(look) => peek(socket, look.full_len, 0),
        None => Ok(None),
    }
}

/// What a peek of at most `room` bytes shows; `None`: nothing.
fn peek(socket: BorrowedFd<'_>, room: usize, flags: i32) -> Result<Option<Peeked>> {
    const WHAT: &str = "recvmsg(MSG_PEEK)";
    let mut bytes = vec![0; room];
    let mut address = vec![0; ADDRESS_MAX];
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: room,
    };
    // SAFETY: all zeros is a valid msghdr: no buffers.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = address.as_mut_ptr().cast();
    header.msg_namelen = ADDRESS_MAX as libc::socklen_t;
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    pass(WHAT)?;
    let full_len = loop {
        // SAFETY: the buffers that `header` names are writable and outlive the call. Without room for control data no
        // descriptor can arrive in our table.
        let answer = unsafe {
            libc::recvmsg(
                socket.as_raw_fd(),
                &raw mut header,
                flags | libc::MSG_PEEK | libc::MSG_DONTWAIT,
            )
        };
        match Errno::result(answer) {
            Ok(len) => break len as usize,
            // Without a connection there is no queue.
            Err(Errno::EAGAIN | Errno::ENOTCONN) => return Ok(None),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(failed(WHAT, errno)),
        }
    };
    bytes.truncate(full_len);
    address.truncate(header.msg_namelen as usize);
    Ok(Some(Peeked {
        message: Message { bytes, address },
        full_len,
        control_cut: header.msg_flags & libc::MSG_CTRUNC != 0,
    }))
}

// ---------------------------------------------------------------------------------------------------------------------
// New sockets

fn own(answer: i32, what: &'static str) -> Result<OwnedFd> {
    let fd = Errno::result(answer).map_err(|errno| failed(what, errno))?;
    // SAFETY: every caller passes a descriptor that the kernel has just made for it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes a socket, close-on-exec and blocking.
///
/// # Errors
/// [`Error::Kernel`].
pub fn create(family: i32, socket_type: i32, protocol: i32) -> Result<OwnedFd> {
    pass("socket")?;
    // SAFETY: no pointers.
    own(
        unsafe { libc::socket(family, socket_type | libc::SOCK_CLOEXEC, protocol) },
        "socket",
    )
}

/// Makes two connected UNIX sockets, close-on-exec and blocking. Each notes *our* credentials as its peer's.
///
/// # Errors
/// [`Error::Kernel`].
pub fn create_pair(socket_type: i32) -> Result<(OwnedFd, OwnedFd)> {
    const WHAT: &str = "socketpair";
    pass(WHAT)?;
    let mut ends = [-1; 2];
    // SAFETY: the kernel stores two descriptors.
    let answer = unsafe {
        libc::socketpair(
            libc::AF_UNIX,
            socket_type | libc::SOCK_CLOEXEC,
            0,
            ends.as_mut_ptr(),
        )
    };
    done(answer, WHAT)?;
    Ok((own(ends[0], WHAT)?, own(ends[1], WHAT)?))
}

/// Binds a socket to an address as [`local_address`] gives it.
///
/// # Errors
/// [`Error::Kernel`]: `EADDRINUSE`, `EADDRNOTAVAIL`, `EACCES`.
pub fn bind_raw(socket: BorrowedFd<'_>, address: &[u8]) -> Result<()> {
    pass("bind")?;
    // SAFETY: `address` is readable for the length given.
    let answer = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            address.as_ptr().cast(),
            address.len() as libc::socklen_t,
        )
    };
    done(answer, "bind")
}

/// Connects a socket to an address as [`peer_address`] gives it; for a blocking stream socket this waits.
///
/// # Errors
/// [`Error::Kernel`].
pub fn connect_raw(socket: BorrowedFd<'_>, address: &[u8]) -> Result<()> {
    pass("connect")?;
    // SAFETY: `address` is readable for the length given.
    let answer = unsafe {
        libc::connect(
            socket.as_raw_fd(),
            address.as_ptr().cast(),
            address.len() as libc::socklen_t,
        )
    };
    done(answer, "connect")
}

/// Makes a socket listen. The kernel cuts the backlog to `net.core.somaxconn`.
///
/// # Errors
/// [`Error::Kernel`].
pub fn listen(socket: BorrowedFd<'_>, backlog: u32) -> Result<()> {
    pass("listen")?;
    // SAFETY: no pointers.
    let answer = unsafe {
        libc::listen(
            socket.as_raw_fd(),
            i32::try_from(backlog).unwrap_or(i32::MAX),
        )
    };
    done(answer, "listen")
}

/// Sends one datagram to `address`, as [`send`] does.
///
/// # Errors
/// [`Error::Kernel`]: `EAGAIN` when it does not fit, `ECONNREFUSED` when nobody has that address.
pub fn send_to(socket: BorrowedFd<'_>, message: &[u8], address: &[u8]) -> Result<()> {
    const WHAT: &str = "sendto";
    loop {
        pass(WHAT)?;
        // SAFETY: `message` and `address` are readable for the lengths given.
        let answer = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                message.as_ptr().cast(),
                message.len(),
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
                address.as_ptr().cast(),
                address.len() as libc::socklen_t,
            )
        };
        match Errno::result(answer) {
            // A datagram goes as a whole or not at all.
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(failed(WHAT, errno)),
        }
    }
}

/// The next connection that waits at a listening socket, close-on-exec and blocking. Waits itself, unless the listening socket
/// does not block.
///
/// # Errors
/// [`Error::Kernel`]: `EAGAIN` when there is none.
pub fn accept(listener: BorrowedFd<'_>) -> Result<OwnedFd> {
    const WHAT: &str = "accept4";
    loop {
        pass(WHAT)?;
        // SAFETY: the address may be null.
        let answer = unsafe {
            libc::accept4(
                listener.as_raw_fd(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                libc::SOCK_CLOEXEC,
            )
        };
        match Errno::result(answer) {
            Ok(fd) => return own(fd, WHAT),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(failed(WHAT, errno)),
        }
    }
}

/// Ends receiving, sending or both.
///
/// # Errors
/// [`Error::Kernel`]: `ENOTCONN`; `EINVAL` when neither is asked for.
pub fn shutdown(socket: BorrowedFd<'_>, read: bool, write: bool) -> Result<()> {
    let how = match (read, write) {
        (true, true) => libc::SHUT_RDWR,
        (true, false) => libc::SHUT_RD,
        (false, true) => libc::SHUT_WR,
        (false, false) => return Err(failed("shutdown", Errno::EINVAL)),
    };
    pass("shutdown")?;
    // SAFETY: no pointers.
    let answer = unsafe { libc::shutdown(socket.as_raw_fd(), how) };
    done(answer, "shutdown")
}

/// Sends one message, or bytes of a stream, without ever waiting and without raising SIGPIPE.
///
/// # Errors
/// [`Error::Kernel`]: `EAGAIN` when it does not fit as a whole.
pub fn send(socket: BorrowedFd<'_>, message: &[u8]) -> Result<()> {
    let mut rest = message;
    loop {
        pass("send")?;
        // SAFETY: `rest` is readable for its length.
        let answer = unsafe {
            libc::send(
                socket.as_raw_fd(),
                rest.as_ptr().cast(),
                rest.len(),
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        };
        match Errno::result(answer) {
            // A stream may take a part; what does not fit then is the error of the next round.
            Ok(sent) if (sent as usize) < rest.len() => rest = &rest[sent as usize..],
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(failed("send", errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};
    use std::os::fd::AsFd as _;

    fn contents(queue: Queue) -> Vec<Vec<u8>> {
        queue.messages.into_iter().map(|m| m.bytes).collect()
    }

    #[test]
    fn a_stream_is_one_message() {
        let (near, far) = create_pair(libc::SOCK_STREAM).expect("pair");
        assert_eq!(
            contents(peek_all(far.as_fd()).expect("peek")),
            Vec::<Vec<u8>>::new()
        );
        send(near.as_fd(), &[1; 50_000]).expect("send");
        send(near.as_fd(), &[2; 10]).expect("send");
        let expected = [vec![1; 50_000], vec![2; 10]].concat();
        for _ in 0..2 {
            let queue = peek_all(far.as_fd()).expect("peek");
            assert!(!queue.descriptors);
            assert_eq!(queue.messages.len(), 1);
            assert_eq!(contents(queue).concat(), expected);
        }
        assert_eq!(unread_bytes(far.as_fd()).expect("SIOCINQ"), 50_010);
        assert!(unsent_bytes(near.as_fd()).expect("SIOCOUTQ") >= 50_010);
    }

    #[test]
    fn every_message_is_seen_and_stays() {
        for socket_type in [libc::SOCK_DGRAM, libc::SOCK_SEQPACKET] {
            let (near, far) = create_pair(socket_type).expect("pair");
            let sent = [vec![1; 70_000], vec![], vec![2], vec![], vec![3; 9]];
            for message in &sent {
                send(near.as_fd(), message).expect("send");
            }
            assert_eq!(contents(peek_all(far.as_fd()).expect("peek")), sent);
            assert_eq!(
                int_option(far.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF).expect("offset"),
                -1
            );
            // A closed end is not an endless row of empty messages.
            drop(near);
            peek_all(far.as_fd()).expect("peek");
        }
    }

    #[test]
    fn descriptors_in_flight_are_noticed() {
        use std::io::IoSlice;
        for socket_type in [libc::SOCK_STREAM, libc::SOCK_DGRAM] {
            let (near, far) = create_pair(socket_type).expect("pair");
            send(near.as_fd(), b"before").expect("send");
            nix::sys::socket::sendmsg::<()>(
                near.as_raw_fd(),
                &[IoSlice::new(b"with")],
                &[nix::sys::socket::ControlMessage::ScmRights(&[0])],
                nix::sys::socket::MsgFlags::empty(),
                None,
            )
            .expect("sendmsg");
            send(near.as_fd(), b"after").expect("send");
            let queue = peek_all(far.as_fd()).expect("peek");
            assert!(queue.descriptors);
            assert_eq!(contents(queue).concat(), b"beforewithafter");
        }
    }

    #[test]
    fn datagrams_come_with_their_senders() {
        let receiver = UdpSocket::bind("127.0.0.1:0").expect("bind");
        let sender = UdpSocket::bind("127.0.0.1:0").expect("bind");
        let to = receiver.local_addr().expect("address");
        for message in [&b"one"[..], b"", b"three"] {
            sender.send_to(message, to).expect("send");
        }
        let queue = peek_all(receiver.as_fd()).expect("peek");
        let from = local_address(sender.as_fd()).expect("address");
        assert!(queue.messages.iter().all(|message| message.address == from));
        assert_eq!(contents(queue), [&b"one"[..], b"", b"three"]);
        let mut buffer = [0; 8];
        assert_eq!(receiver.recv(&mut buffer).expect("recv"), 3);
    }

    #[test]
    fn a_listening_socket_tells_its_backlog() {
        let made = create(libc::AF_INET, libc::SOCK_STREAM, 0).expect("socket");
        assert_eq!(tcp_state(made.as_fd()).expect("state").state, TCP_CLOSE);
        let address = [2, 0, 0, 0, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
        bind_raw(made.as_fd(), &address).expect("bind");
        listen(made.as_fd(), 17).expect("listen");
        assert!(is_listening(made.as_fd()).expect("option"));
        let state = tcp_state(made.as_fd()).expect("state");
        assert_eq!(
            (state.state, state.backlog, state.waiting),
            (TCP_LISTEN, 17, 0)
        );
        let client = create(libc::AF_INET, libc::SOCK_STREAM, 0).expect("socket");
        let bound = local_address(made.as_fd()).expect("address");
        connect_raw(client.as_fd(), &bound).expect("connect");
        assert_eq!(tcp_state(made.as_fd()).expect("state").waiting, 1);
        assert_eq!(peer_address(client.as_fd()).expect("peer"), Some(bound));
        assert_eq!(peer_address(made.as_fd()).expect("peer"), None);
    }

    #[test]
    fn options_are_bytes_that_can_be_set_again() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let linger = option(listener.as_fd(), libc::SOL_SOCKET, libc::SO_LINGER).expect("get");
        assert_eq!(linger.len(), 8);
        set_option(listener.as_fd(), libc::SOL_SOCKET, libc::SO_LINGER, &linger).expect("set");
        let congestion =
            option(listener.as_fd(), libc::IPPROTO_TCP, libc::TCP_CONGESTION).expect("get");
        assert!(!congestion.is_empty());
        assert_eq!(
            kind(listener.as_fd()).expect("kind"),
            (libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_TCP)
        );
    }
}
