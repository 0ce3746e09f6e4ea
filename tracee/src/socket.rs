//! Sockets, as the bytes the kernel takes and gives: options, addresses, states, and what lies unread in them.
//!
//! Everything works on a descriptor, be it a copy of one of the traced process' or a new one of ours. Reading never takes
//! anything out of a socket; descriptors that travel with a message are copied. An option is bytes here; which of them a migration carries is not this module's business.
//!
//! # Safety
//! Each unsafe block is one system call with buffers that outlive it and whose lengths are stated with them.

use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use nix::errno::Errno;

use crate::choke::{self, Kind};
use crate::error::{Error, Result};
use crate::process::own_pid;

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

/// The process that sent a message, as the kernel noted it (`SCM_CREDENTIALS`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sender {
    /// Its id; 0 for one that is not of our pid namespace.
    pub pid: i32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// One message, or of a stream what lies unread up to the next place where something else comes along.
#[derive(Debug, Default)]
pub struct Message {
    /// Content. A message may be empty.
    pub bytes: Vec<u8>,
    /// Sender's address; empty when there is none to tell.
    pub address: Vec<u8>,
    /// Who sent it, if anybody was noted. UNIX sockets only.
    pub sender: Option<Sender>,
    /// Descriptors of ours of the open files that travel with it (`SCM_RIGHTS`), in order. Of a stream they come with its first
    /// byte.
    pub files: Vec<OwnedFd>,
}

/// Most messages that are looked at: far more than the largest receive buffer holds.
const MESSAGES_MAX: usize = 1 << 20;
/// No IP datagram is longer.
const DATAGRAM_MAX: usize = 64 * 1024;
/// Words of control data that one message may bring: 253 descriptors, credentials, a pidfd, a security label, time stamps.
const CONTROL_WORDS: usize = 1024;
/// What the kernel tells of a message for which it noted no sender: this, unless somebody changed `kernel.overflowuid`, and the pid 0.
const NOBODY: u32 = 65534;
/// A pidfd of the sender (6.5).
const SCM_PIDFD: i32 = 4;

/// The options of level `SOL_SOCKET` that [`peek_all`] changes for a while, each with its value now; none if nothing lies unread,
/// since it changes none then.
///
/// # Errors
/// [`Error::Kernel`].
pub fn changed_by_peek(socket: BorrowedFd<'_>) -> Result<Vec<(i32, i32)>> {
    if !polls(socket, libc::POLLIN)? {
        return Ok(Vec::new());
    }
    let (family, _, _) = kind(socket)?;
    let names: &[i32] = match family {
        libc::AF_UNIX => &[libc::SO_PASSCRED, libc::SO_PEEK_OFF],
        _ => &[libc::SO_PEEK_OFF],
    };
    let value = |&name: &i32| Ok((name, int_option(socket, libc::SOL_SOCKET, name)?));
    names.iter().map(value).collect()
}

/// A copy of everything that lies unread in a connected or bound socket (not a listening one), leaving it there.
///
/// Messages behind the first can only be seen by `SO_PEEK_OFF`, and who sent them only by `SO_PASSCRED`: both are set for the time
/// of the call and put back to what they were; [`changed_by_peek`] tells who may be killed meanwhile. Nobody may read from the socket meanwhile. Empty messages at the very end of a
/// `SOCK_SEQPACKET` whose other end is closed are not told apart from that end.
///
/// # Errors
/// [`Error::Kernel`], `EMFILE` if we have no room for the descriptors that travel; [`Error::TooMuch`].
pub fn peek_all(socket: BorrowedFd<'_>) -> Result<Vec<Message>> {
    if !polls(socket, libc::POLLIN)? {
        return Ok(Vec::new());
    }
    let (family, socket_type, _) = kind(socket)?;
    let unread = unread_bytes(socket)?;
    let is_unix = family == libc::AF_UNIX;
    let senders = match is_unix {
        true => Some(Lent::start(socket, libc::SO_PASSCRED, 1)?),
        false => None,
    };
    let offset = Lent::start(socket, libc::SO_PEEK_OFF, 0)?;
    let messages = match socket_type {
        libc::SOCK_STREAM => peek_stream(socket, unread)?,
        _ => peek_messages(socket, is_unix, socket_type, unread)?,
    };
    offset.finish()?;
    if let Some(senders) = senders {
        senders.finish()?;
    }
    Ok(messages)
}

fn peek_messages(
    socket: BorrowedFd<'_>,
    is_unix: bool,
    socket_type: i32,
    unread: usize,
) -> Result<Vec<Message>> {
    let ends = socket_type == libc::SOCK_SEQPACKET && polls(socket, libc::POLLRDHUP)?;
    let (mut messages, mut total) = (Vec::new(), 0);
    loop {
        let next = match is_unix {
            true => peek_unix_message(socket)?,
            false => peek(socket, DATAGRAM_MAX, 0)?.map(|peeked| peeked.message),
        };
        let Some(next) = next else { break };
        if next.bytes.is_empty() && ends && total >= unread {
            break;
        }
        total += next.bytes.len();
        messages.push(next);
        enough(&messages)?;
    }
    Ok(messages)
}

/// A peek of a stream ends behind descriptors, where the sender changes, and at the end. What lies before the descriptors may have
/// come without them, and a program may read it without room for them.
fn peek_stream(socket: BorrowedFd<'_>, unread: usize) -> Result<Vec<Message>> {
    let mut messages: Vec<Message> = Vec::new();
    let mut start = 0;
    while start < unread {
        let mut next = match peek(socket, unread - start, 0)? {
            Some(peeked) if !peeked.message.bytes.is_empty() => peeked.message,
            _ => break,
        };
        let len = next.bytes.len();
        let mut without = len;
        if !next.files.is_empty() {
            go_to(socket, start)?;
            without = len_before_last_piece(socket, len)?;
            go_to(socket, start + len)?;
        }
        let with = next.bytes.split_off(without);
        let bytes = std::mem::replace(&mut next.bytes, with);
        match messages.last_mut() {
            _ if bytes.is_empty() => {}
            // Cut where two had different security labels.
            Some(last) if last.files.is_empty() && last.sender == next.sender => {
                last.bytes.extend(bytes);
            }
            _ => messages.push(Message {
                bytes,
                sender: next.sender,
                ..Message::default()
            }),
        }
        if !next.files.is_empty() {
            messages.push(next);
        }
        enough(&messages)?;
        start += len;
    }
    Ok(messages)
}

/// How many of the next `len` bytes of a stream, at least one, lie before the last of the pieces in which they were sent, which
/// alone can bring descriptors. The kernel copies a piece as a whole or stops before it; and for the last byte there is no room.
fn len_before_last_piece(socket: BorrowedFd<'_>, len: usize) -> Result<usize> {
    const WHAT: &str = "recvmsg(MSG_PEEK)";
    let mut bytes = vec![0_u8; len - 1];
    let mut parts = [
        libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: len - 1,
        },
        libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 1,
        },
    ];
    // SAFETY: all zeros is a valid msghdr: no buffers.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = parts.as_mut_ptr();
    header.msg_iovlen = parts.len();
    loop {
        pass(WHAT)?;
        // SAFETY: the first buffer is writable and outlives the call; nothing is mapped where the second would be, so that the kernel
        // writes nothing there. Without room for control data no descriptor arrives.
        let answer = unsafe {
            libc::recvmsg(
                socket.as_raw_fd(),
                &raw mut header,
                libc::MSG_PEEK | libc::MSG_DONTWAIT,
            )
        };
        match Errno::result(answer) {
            Ok(before) => return Ok(before as usize),
            Err(Errno::EFAULT) => return Ok(0),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(failed(WHAT, errno)),
        }
    }
}

fn enough(messages: &[Message]) -> Result<()> {
    if messages.len() <= MESSAGES_MAX {
        return Ok(());
    }
    Err(Error::TooMuch {
        what: "messages in a socket",
        asked: messages.len(),
        limit: MESSAGES_MAX,
    })
}

/// Whether any of `events` is there; `POLLRDHUP`: nothing will follow what lies unread.
fn polls(socket: BorrowedFd<'_>, events: i16) -> Result<bool> {
    pass("poll")?;
    let mut poll = libc::pollfd {
        fd: socket.as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: one pollfd, which outlives the call; it does not wait.
    let answer = unsafe { libc::poll(&raw mut poll, 1, 0) };
    done(answer, "poll")?;
    Ok(poll.revents & events != 0)
}

/// Lets the next peek begin `at` bytes behind the start.
fn go_to(socket: BorrowedFd<'_>, at: usize) -> Result<()> {
    let at = i32::try_from(at).map_err(|_| failed("setsockopt", Errno::EOVERFLOW))?;
    let value = at.to_ne_bytes();
    set_option(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &value)
}

/// An option of a socket that is another for a while, put back when this is dropped.
struct Lent<'a> {
    socket: BorrowedFd<'a>,
    name: i32,
    old: i32,
    finished: bool,
}

impl<'a> Lent<'a> {
    fn start(socket: BorrowedFd<'a>, name: i32, value: i32) -> Result<Self> {
        let old = int_option(socket, libc::SOL_SOCKET, name)?;
        set_option(socket, libc::SOL_SOCKET, name, &value.to_ne_bytes())?;
        Ok(Self {
            socket,
            name,
            old,
            finished: false,
        })
    }

    fn put_back(&mut self) -> Result<()> {
        self.finished = true;
        let old = self.old.to_ne_bytes();
        let put = || set_option(self.socket, libc::SOL_SOCKET, self.name, &old);
        // A clean-up: one failing call must not leave the program with our value.
        put().or_else(|_| put())
    }

    fn finish(mut self) -> Result<()> {
        self.put_back()
    }
}

impl Drop for Lent<'_> {
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
}

/// A UNIX datagram or packet, of any length: a first look without a buffer tells how long it is and moves no offset.
fn peek_unix_message(socket: BorrowedFd<'_>) -> Result<Option<Message>> {
    let shown = match peek(socket, 0, libc::MSG_TRUNC)? {
        // An empty one: looking again would show the next, because the kernel notes that it has been shown.
        Some(empty) if empty.full_len == 0 => Some(empty),
        Some(look) => peek(socket, look.full_len, 0)?,
        None => None,
    };
    Ok(shown.map(|peeked| peeked.message))
}

/// What a peek of at most `room` bytes shows; `None`: nothing.
fn peek(socket: BorrowedFd<'_>, room: usize, flags: i32) -> Result<Option<Peeked>> {
    const WHAT: &str = "recvmsg(MSG_PEEK)";
    let mut bytes = vec![0; room];
    let mut address = vec![0; ADDRESS_MAX];
    // Of words, for control messages are aligned to them.
    let mut beside = [0_u64; CONTROL_WORDS];
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
    header.msg_control = beside.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&beside);
    pass(WHAT)?;
    let full_len = loop {
        // SAFETY: the buffers that `header` names are writable and outlive the call.
        let answer = unsafe {
            libc::recvmsg(
                socket.as_raw_fd(),
                &raw mut header,
                flags | libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC,
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
    // SAFETY: the kernel has filled `header`, and what it names is still there.
    let (sender, files) = unsafe { came_along(&header) };
    if header.msg_flags & libc::MSG_CTRUNC != 0 {
        return Err(failed(WHAT, Errno::EMFILE));
    }
    bytes.truncate(full_len);
    address.truncate(header.msg_namelen as usize);
    Ok(Some(Peeked {
        message: Message {
            bytes,
            address,
            sender,
            files,
        },
        full_len,
    }))
}

/// Takes what came beside a message: every descriptor among it is ours from here on.
///
/// # Safety
/// recvmsg(2) has filled `header`, the buffers it names are still there, and it is asked once.
unsafe fn came_along(header: &libc::msghdr) -> (Option<Sender>, Vec<OwnedFd>) {
    let (mut sender, mut files) = (None, Vec::new());
    // SAFETY: as the caller promises.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !next.is_null() {
        // SAFETY: the macros stay inside of the control data that the kernel wrote, which is aligned for them.
        let (about, data, empty_len) =
            unsafe { (&*next, libc::CMSG_DATA(next), libc::CMSG_LEN(0) as usize) };
        let words = about.cmsg_len.saturating_sub(empty_len) / 4;
        // SAFETY: as many words lie there, as the kernel says.
        let word = |at: usize| unsafe { data.cast::<i32>().add(at).read_unaligned() };
        match (about.cmsg_level, about.cmsg_type) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS) => files.extend((0..words).map(|at| {
                // SAFETY: the kernel has just made this descriptor for us.
                unsafe { OwnedFd::from_raw_fd(word(at)) }
            })),
            (libc::SOL_SOCKET, SCM_PIDFD) if words == 1 && word(0) >= 0 => {
                // SAFETY: as above. Who has SO_PASSPIDFD set gets one, which nobody asked for here.
                drop(unsafe { OwnedFd::from_raw_fd(word(0)) });
            }
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if words == 3 => {
                let found = Sender {
                    pid: word(0),
                    uid: word(1) as u32,
                    gid: word(2) as u32,
                };
                let is_noted = (found.pid, found.uid, found.gid) != (0, NOBODY, NOBODY);
                sender = is_noted.then_some(found);
            }
            _ => {}
        }
        // SAFETY: as the caller promises.
        next = unsafe { libc::CMSG_NXTHDR(header, next) };
    }
    (sender, files)
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

/// What goes with a message.
#[derive(Clone, Copy, Debug, Default)]
pub struct Along<'a> {
    /// To whom, if the socket is not connected.
    pub address: &'a [u8],
    /// In whose name: any but our own takes CAP_SYS_ADMIN, CAP_SETUID and CAP_SETGID, and the process must be there. `None`: nobody
    /// is noted, unless a socket on either side asks for it.
    pub sender: Option<Sender>,
    /// Open files, at most 253. Of a stream they go with the first byte, and there must be one.
    pub files: &'a [BorrowedFd<'a>],
}

/// Sends one message, or bytes of a stream, without ever waiting and without raising SIGPIPE.
///
/// # Errors
/// [`Error::Kernel`]: `EAGAIN` when it does not fit as a whole, `ECONNREFUSED` when nobody has the address, `ESRCH` when there is no
/// process that it could be in the name of.
pub fn send(socket: BorrowedFd<'_>, message: &[u8], along: &Along<'_>) -> Result<()> {
    const WHAT: &str = "sendmsg";
    let mut beside = control_data(along);
    let mut rest = message;
    loop {
        let mut part = libc::iovec {
            iov_base: rest.as_ptr().cast_mut().cast(),
            iov_len: rest.len(),
        };
        // SAFETY: all zeros is a valid msghdr: no buffers.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        if !along.address.is_empty() {
            header.msg_name = along.address.as_ptr().cast_mut().cast();
            header.msg_namelen = along.address.len() as libc::socklen_t;
        }
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        header.msg_control = beside.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(&beside[..]);
        pass(WHAT)?;
        // SAFETY: everything that `header` names is readable and outlives the call, which writes to none of it.
        let answer = unsafe {
            libc::sendmsg(
                socket.as_raw_fd(),
                &raw const header,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        };
        match Errno::result(answer) {
            // A stream may take a part; what does not fit then is the error of the next round. The files have gone with it.
            Ok(sent) if (sent as usize) < rest.len() => {
                rest = &rest[sent as usize..];
                beside = control_data(&Along {
                    files: &[],
                    ..*along
                });
            }
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(failed(WHAT, errno)),
        }
    }
}

/// The control messages of `along`, as sendmsg(2) takes them: each a header of a length, in a word, a level and a type.
fn control_data(along: &Along<'_>) -> Vec<u64> {
    const HEADER_LEN: usize = size_of::<libc::cmsghdr>();
    const _: () = assert!(HEADER_LEN == 16);
    let mut bytes: Vec<u8> = Vec::new();
    let mut add = |kind: i32, data: &[i32]| {
        bytes.extend((HEADER_LEN + size_of_val(data)).to_ne_bytes());
        bytes.extend(libc::SOL_SOCKET.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(data.iter().flat_map(|word| word.to_ne_bytes()));
        bytes.resize(bytes.len().next_multiple_of(size_of::<u64>()), 0);
    };
    if let Some(Sender { pid, uid, gid }) = along.sender {
        let ids = [pid, uid as i32, gid as i32];
        add(libc::SCM_CREDENTIALS, &ids);
    }
    if !along.files.is_empty() {
        let files: Vec<i32> = along.files.iter().map(|file| file.as_raw_fd()).collect();
        add(libc::SCM_RIGHTS, &files);
    }
    let words = bytes.chunks_exact(size_of::<u64>()).map(|word| {
        let mut value = [0; size_of::<u64>()];
        value.copy_from_slice(word);
        u64::from_ne_bytes(value)
    });
    words.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};
    use std::os::fd::AsFd;

    fn contents(queue: Vec<Message>) -> Vec<Vec<u8>> {
        queue.into_iter().map(|m| m.bytes).collect()
    }

    fn send(socket: BorrowedFd<'_>, message: &[u8]) -> Result<()> {
        super::send(socket, message, &Along::default())
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
            assert_eq!(queue.len(), 1);
            assert!(queue[0].files.is_empty() && queue[0].sender.is_none());
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

    fn inode(file: &impl AsFd) -> u64 {
        nix::sys::stat::fstat(file).expect("it is open").st_ino
    }

    #[test]
    fn descriptors_in_flight_are_copied_and_stay() {
        let (end, _other) = create_pair(libc::SOCK_STREAM).expect("pair");
        for socket_type in [libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_SEQPACKET] {
            let (near, far) = create_pair(socket_type).expect("pair");
            for sent in ["before", "more"] {
                send(near.as_fd(), sent.as_bytes()).expect("send");
            }
            let files = [end.as_fd(), near.as_fd()];
            let along = Along {
                files: &files,
                ..Along::default()
            };
            super::send(near.as_fd(), b"with", &along).expect("sendmsg");
            super::send(near.as_fd(), b"w", &along).expect("sendmsg");
            send(near.as_fd(), b"after").expect("send");
            let expected: &[(&[u8], usize)] = match socket_type {
                libc::SOCK_STREAM => &[(b"beforemore", 0), (b"with", 2), (b"w", 2), (b"after", 0)],
                _ => &[
                    (b"before", 0),
                    (b"more", 0),
                    (b"with", 2),
                    (b"w", 2),
                    (b"after", 0),
                ],
            };
            for _ in 0..2 {
                let queue = peek_all(far.as_fd()).expect("peek");
                let found: Vec<_> = queue
                    .iter()
                    .map(|message| (&message.bytes[..], message.files.len()))
                    .collect();
                assert_eq!(found, expected);
                let with = &queue[queue.len() - 2].files;
                assert_eq!(
                    [inode(&with[0]), inode(&with[1])],
                    [inode(&end), inode(&near)]
                );
            }
            let passes = |name| int_option(far.as_fd(), libc::SOL_SOCKET, name).expect("option");
            assert_eq!(
                (passes(libc::SO_PASSCRED), passes(libc::SO_PEEK_OFF)),
                (0, -1)
            );
        }
    }

    #[test]
    fn senders_are_seen_as_they_were_noted() {
        let own = Sender {
            pid: own_pid(),
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
        };
        for socket_type in [libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_SEQPACKET] {
            let (near, far) = create_pair(socket_type).expect("pair");
            let signed = Along {
                sender: Some(own),
                ..Along::default()
            };
            send(near.as_fd(), b"unsigned").expect("send");
            for part in [&b"sig"[..], b"ned"] {
                super::send(near.as_fd(), part, &signed).expect("sendmsg");
            }
            send(near.as_fd(), b"x").expect("send");
            let queue = peek_all(far.as_fd()).expect("peek");
            let found: Vec<_> = queue
                .iter()
                .map(|message| (&message.bytes[..], message.sender))
                .collect();
            let expected: &[(&[u8], Option<Sender>)] = match socket_type {
                libc::SOCK_STREAM => &[(b"unsigned", None), (b"signed", Some(own)), (b"x", None)],
                _ => &[
                    (b"unsigned", None),
                    (b"sig", Some(own)),
                    (b"ned", Some(own)),
                    (b"x", None),
                ],
            };
            assert_eq!(found, expected);
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
        assert!(queue.iter().all(|message| message.address == from));
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
