//! Sockets: their kind, addresses, options and, for UNIX sockets inside the tree, what lies unread.
//!
//! Nothing is read out of a socket and no option of one is changed, except the peek offset and whether senders are told, for the
//! length of one peek.

pub(crate) mod flight;
mod unix;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, BorrowedFd};

use nix::errno::Errno;
use pageferry_image::model::sockets::{Option as SocketOption, Socket, State};
use pageferry_tracee::procfs::DescriptorEntry;
use pageferry_tracee::unix_diag::UnixDiag;
use pageferry_tracee::{Error as ProcessError, socket};

use self::flight::InFlight;
use super::files::{Depth, Look, Verdict};
use crate::Result;
use crate::survey::{RefusalKind, TcpPolicy};

pub(crate) use self::unix::finish;

const SO_RCVBUFFORCE: i32 = 33;
const SO_SNDBUFFORCE: i32 = 32;
/// Whether a message tells a pidfd of its sender (6.5), and whether it may bring descriptors (6.16).
const SO_PASSPIDFD: i32 = 76;
const SO_PASSRIGHTS: i32 = 83;
/// Which buffer sizes the program chose itself (5.14).
const SO_BUF_LOCK: i32 = 72;
/// Offsets of `tcpi_segs_out` and `tcpi_segs_in` in `struct tcp_info`.
const TCP_INFO_SEGMENTS: [usize; 2] = [136, 140];

/// Options that are carried when they differ from those of a socket just made. The value is told again as it was read.
const GENERAL: &[i32] = &[
    libc::SO_REUSEADDR,
    libc::SO_REUSEPORT,
    libc::SO_KEEPALIVE,
    libc::SO_BROADCAST,
    libc::SO_LINGER,
    libc::SO_MARK,
    libc::SO_OOBINLINE,
    libc::SO_DONTROUTE,
    libc::SO_PASSCRED,
    libc::SO_PASSSEC,
    libc::SO_RCVTIMEO,
    libc::SO_SNDTIMEO,
    libc::SO_RCVLOWAT,
    libc::SO_TIMESTAMP,
    libc::SO_TIMESTAMPNS,
    libc::SO_TIMESTAMPING,
    libc::SO_RXQ_OVFL,
    libc::SO_NO_CHECK,
    libc::SO_BUSY_POLL,
    libc::SO_MAX_PACING_RATE,
    libc::SO_ZEROCOPY,
    libc::SO_SELECT_ERR_QUEUE,
    libc::SO_BINDTODEVICE,
    libc::SO_PEEK_OFF,
    SO_PASSPIDFD,
    SO_PASSRIGHTS,
];
/// `IPPROTO_IP`, on IPv6 sockets too: they may speak IPv4. By number: IP_TOS, TTL, RECVOPTS, RETOPTS, PKTINFO, MTU_DISCOVER,
/// RECVERR, RECVTTL, RECVTOS, FREEBIND, TRANSPARENT, RECVORIGDSTADDR, MINTTL, NODEFRAG, BIND_ADDRESS_NO_PORT, RECVFRAGSIZE,
/// MULTICAST_TTL, MULTICAST_LOOP, MULTICAST_ALL, LOCAL_PORT_RANGE.
const IPV4: &[i32] = &[
    1, 2, 6, 7, 8, 10, 11, 12, 13, 15, 19, 20, 21, 22, 24, 25, 33, 34, 49, 51,
];
/// `IPPROTO_IPV6`. By number: UNICAST_HOPS, MULTICAST_HOPS, MULTICAST_LOOP, MTU_DISCOVER, RECVERR, V6ONLY, MULTICAST_ALL,
/// RECVPKTINFO, RECVHOPLIMIT, DONTFRAG, RECVTCLASS, TCLASS, AUTOFLOWLABEL, ADDR_PREFERENCES, MINHOPCOUNT, RECVORIGDSTADDR,
/// TRANSPARENT, FREEBIND.
const IPV6: &[i32] = &[
    16, 18, 19, 23, 25, 26, 29, 49, 51, 62, 66, 67, 70, 72, 73, 74, 75, 78,
];
/// `IPPROTO_TCP`. By number: NODELAY, MAXSEG, CORK, KEEPIDLE, KEEPINTVL, KEEPCNT, SYNCNT, LINGER2, DEFER_ACCEPT, WINDOW_CLAMP,
/// CONGESTION, THIN_LINEAR_TIMEOUTS, USER_TIMEOUT, FASTOPEN, NOTSENT_LOWAT, SAVE_SYN, FASTOPEN_CONNECT, FASTOPEN_NO_COOKIE,
/// INQ.
const TCP: &[i32] = &[
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 16, 18, 23, 25, 27, 30, 34, 36,
];
/// `IPPROTO_UDP`: CORK, NO_CHECK6_TX, NO_CHECK6_RX, SEGMENT, GRO.
const UDP: &[i32] = &[1, 101, 102, 103, 104];
/// Options that name an interface by its number here: IP_MULTICAST_IF, IP_UNICAST_IF, IPV6_MULTICAST_IF, IPV6_UNICAST_IF.
const INTERFACES: &[(i32, i32, &str)] = &[
    (libc::IPPROTO_IP, 32, "IP_MULTICAST_IF"),
    (libc::IPPROTO_IP, 50, "IP_UNICAST_IF"),
    (libc::IPPROTO_IPV6, 17, "IPV6_MULTICAST_IF"),
    (libc::IPPROTO_IPV6, 76, "IPV6_UNICAST_IF"),
];

/// An option's level, name and value; `None` where this kind of socket has not got it.
type Value = ((i32, i32), Option<Vec<u8>>);
type Kind = (i32, i32, i32);

/// What is known about all sockets of a table together.
#[derive(Debug)]
pub(crate) struct Pairs {
    own: BTreeSet<u64>,
    numbers: BTreeMap<u64, u32>,
    diag: Option<UnixDiag>,
    /// The options of a socket just made, by its kind.
    fresh: BTreeMap<Kind, Vec<Value>>,
    /// Something travels to a socket: other ends may be found there, but only in the freeze.
    unseen: bool,
    /// The open files of our own table, by descriptor: those that travel.
    pub(crate) sent: BTreeMap<u32, u32>,
    /// The open files of sockets, by inode.
    pub(crate) files: BTreeMap<u64, u32>,
    /// By the inode of a listening socket: how many wait to be accepted, and the inodes of those that do.
    waiting: BTreeMap<u64, (u32, Vec<u64>)>,
}

impl Pairs {
    pub(crate) fn new<'e>(
        entries: impl IntoIterator<Item = &'e DescriptorEntry, IntoIter: Clone>,
        depth: Depth,
    ) -> Self {
        let entries = entries.into_iter();
        let unseen = depth == Depth::Survey && flight::is_there(entries.clone());
        let own = entries
            .filter(|entry| entry.link.starts_with("socket:"))
            .filter_map(DescriptorEntry::pipe_or_socket_inode)
            .collect();
        Self {
            own,
            numbers: BTreeMap::new(),
            diag: None,
            fresh: BTreeMap::new(),
            unseen,
            sent: BTreeMap::new(),
            files: BTreeMap::new(),
            waiting: BTreeMap::new(),
        }
    }

    fn diag(&mut self) -> Result<&UnixDiag> {
        let diag = match self.diag.take() {
            Some(diag) => diag,
            None => UnixDiag::open()?,
        };
        Ok(self.diag.insert(diag))
    }

    /// The number both ends of a pair carry.
    fn number(&mut self, one_end: u64, other_end: u64) -> u32 {
        let next = u32::try_from(self.numbers.len() + 1).unwrap_or(u32::MAX);
        *self.numbers.entry(one_end.min(other_end)).or_insert(next)
    }
}

/// One socket. With [`Depth::Survey`] without what lies unread.
pub(crate) fn socket(
    look: &Look<'_>,
    entry: &DescriptorEntry,
    inode: u64,
    fd: BorrowedFd<'_>,
    depth: Depth,
    pairs: &mut Pairs,
    in_flight: &InFlight,
) -> Result<Verdict<Socket>> {
    let kind = socket::kind(fd)?;
    let found = match kind {
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP) => {
            tcp(fd, look.options.tcp)?
        }
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_UDP) => udp(fd)?,
        (libc::AF_UNIX, kind, _) => {
            let unread = match depth {
                Depth::Survey => None,
                Depth::Capture => Some((look, in_flight)),
            };
            unix::socket(entry, inode, fd, kind, unread, pairs)?
        }
        (family, kind, protocol) => Err(RefusalKind::OtherSocket {
            kind: other_kind(family, kind, protocol),
        }),
    };
    let mut socket = match found {
        Ok(socket) => socket,
        Err(refusal) => return Ok(Err(refusal)),
    };
    (socket.family, socket.r#type, socket.protocol) = kind;
    if socket.state() != State::Dropped {
        if socket::has_filter(fd)? {
            return Ok(Err(RefusalKind::SocketFilter));
        }
        match options(fd, kind, pairs)? {
            Ok(options) => socket.options = options,
            Err(refusal) => return Ok(Err(refusal)),
        }
    }
    Ok(Ok(socket))
}

fn other_kind(family: i32, kind: i32, protocol: i32) -> String {
    let family = match family {
        libc::AF_INET => "IPv4".to_owned(),
        libc::AF_INET6 => "IPv6".to_owned(),
        libc::AF_NETLINK => "netlink".to_owned(),
        libc::AF_PACKET => "packet".to_owned(),
        libc::AF_VSOCK => "vsock".to_owned(),
        libc::AF_ALG => "kernel crypto".to_owned(),
        libc::AF_BLUETOOTH => "Bluetooth".to_owned(),
        libc::AF_CAN => "CAN".to_owned(),
        libc::AF_XDP => "XDP".to_owned(),
        other => format!("family {other}"),
    };
    let kind = match kind {
        libc::SOCK_STREAM => "stream".to_owned(),
        libc::SOCK_DGRAM => "datagram".to_owned(),
        libc::SOCK_RAW => "raw".to_owned(),
        libc::SOCK_SEQPACKET => "seqpacket".to_owned(),
        other => format!("type {other}"),
    };
    format!("{family} {kind} (protocol {protocol})")
}

/// The address in a `sockaddr_in` or `sockaddr_in6`.
fn address(bytes: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
    let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
    let ip = match family {
        libc::AF_INET => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(4..8)?).ok()?)),
        libc::AF_INET6 => IpAddr::V6(Ipv6Addr::from(
            <[u8; 16]>::try_from(bytes.get(8..24)?).ok()?,
        )),
        _ => return None,
    };
    Some(SocketAddr::new(ip.to_canonical(), port))
}

fn text(bytes: &[u8]) -> String {
    address(bytes).map_or_else(|| "?".to_owned(), |address| address.to_string())
}

/// Unbound, or bound to what `local` says.
fn unconnected(local: Vec<u8>) -> Socket {
    let is_bound = address(&local).is_some_and(|address| address.port() != 0);
    let state = if is_bound {
        State::Bound
    } else {
        State::Unbound
    };
    Socket {
        state: state.into(),
        local: if is_bound { local } else { Vec::new() },
        ..Socket::default()
    }
}

fn tcp(fd: BorrowedFd<'_>, policy: TcpPolicy) -> Result<Verdict<Socket>> {
    let tcp = socket::tcp_state(fd)?;
    let local = socket::local_address(fd)?;
    let dropped = Socket {
        state: State::Dropped.into(),
        ..Socket::default()
    };
    match tcp.state {
        socket::TCP_LISTEN => {
            if tcp.waiting > 0 && policy == TcpPolicy::Refuse {
                return Ok(Err(RefusalKind::AcceptQueue {
                    local: text(&local),
                    count: tcp.waiting,
                }));
            }
            Ok(Ok(Socket {
                state: State::Listening.into(),
                local,
                backlog: tcp.backlog,
                ..Socket::default()
            }))
        }
        // Never connected, or connected once and over: a port that is still told is then not its own any more.
        socket::TCP_CLOSE if was_connected(fd)? => Ok(Ok(dropped)),
        socket::TCP_CLOSE => Ok(Ok(unconnected(local))),
        state => match policy {
            TcpPolicy::Close => Ok(Ok(dropped)),
            TcpPolicy::Refuse => {
                let remote = socket::peer_address(fd)?
                    .map_or_else(|| "nobody".to_owned(), |peer| text(&peer));
                Ok(Err(RefusalKind::Tcp {
                    state: tcp_state_name(state),
                    local: text(&local),
                    remote,
                }))
            }
        },
    }
}

fn was_connected(fd: BorrowedFd<'_>) -> Result<bool> {
    let info = socket::option(fd, libc::IPPROTO_TCP, libc::TCP_INFO)?;
    Ok(TCP_INFO_SEGMENTS
        .iter()
        .any(|&at| info.get(at..at + 4).is_some_and(|count| count != [0; 4])))
}

fn tcp_state_name(state: u8) -> &'static str {
    const NAMES: [&str; 13] = [
        "unknown",
        "established",
        "connecting",
        "half-open",
        "closing (FIN_WAIT1)",
        "closing (FIN_WAIT2)",
        "closing (TIME_WAIT)",
        "closed",
        "half-closed by its peer",
        "closing (LAST_ACK)",
        "listening",
        "closing",
        "half-open",
    ];
    NAMES.get(usize::from(state)).copied().unwrap_or("unknown")
}

fn udp(fd: BorrowedFd<'_>) -> Result<Verdict<Socket>> {
    let local = socket::local_address(fd)?;
    Ok(match socket::peer_address(fd)? {
        Some(peer) => Err(RefusalKind::ConnectedUdp {
            local: text(&local),
            remote: text(&peer),
        }),
        None => Ok(unconnected(local)),
    })
}

/// The options that make this socket different from one just made, in the form in which they are set.
fn options(
    fd: BorrowedFd<'_>,
    kind: Kind,
    pairs: &mut Pairs,
) -> Result<Verdict<Vec<SocketOption>>> {
    if let std::collections::btree_map::Entry::Vacant(e) = pairs.fresh.entry(kind) {
        let fresh = socket::create(kind.0, kind.1, kind.2)?;
        e.insert(values(fresh.as_fd(), kind)?);
    }
    let mut found = Vec::new();
    let fresh = &pairs.fresh[&kind];
    for ((option, value), (_, fresh)) in values(fd, kind)?.into_iter().zip(fresh) {
        let (level, name) = option;
        let Some(value) = value.filter(|value| Some(value) != fresh.as_ref()) else {
            continue;
        };
        if let Some(&(.., what)) = INTERFACES.iter().find(|&&(a, b, _)| (a, b) == option) {
            return Ok(Err(RefusalKind::InterfaceOption { what }));
        }
        found.push(SocketOption { level, name, value });
    }
    found.extend(buffer_sizes(fd)?);
    // Last: setting IP_TOS sets the priority too.
    let priority = socket::option(fd, libc::SOL_SOCKET, libc::SO_PRIORITY)?;
    if priority.iter().any(|&byte| byte != 0)
        || found
            .iter()
            .any(|option| (option.level, option.name) == (libc::IPPROTO_IP, libc::IP_TOS))
    {
        found.push(SocketOption {
            level: libc::SOL_SOCKET,
            name: libc::SO_PRIORITY,
            value: priority,
        });
    }
    Ok(Ok(found))
}

/// The options that may be carried, for this kind of socket.
fn values(fd: BorrowedFd<'_>, (family, _, protocol): Kind) -> Result<Vec<Value>> {
    let mut asked: Vec<(i32, i32)> = GENERAL
        .iter()
        .map(|&name| (libc::SOL_SOCKET, name))
        .collect();
    let is_internet = family != libc::AF_UNIX;
    if is_internet {
        asked.extend(IPV4.iter().map(|&name| (libc::IPPROTO_IP, name)));
    }
    if family == libc::AF_INET6 {
        asked.extend(IPV6.iter().map(|&name| (libc::IPPROTO_IPV6, name)));
    }
    asked.extend(
        INTERFACES
            .iter()
            .filter(|&&(level, ..)| match level {
                libc::IPPROTO_IP => is_internet,
                _ => family == libc::AF_INET6,
            })
            .map(|&(level, name, _)| (level, name)),
    );
    match protocol {
        libc::IPPROTO_TCP if is_internet => {
            asked.extend(TCP.iter().map(|&name| (libc::IPPROTO_TCP, name)))
        }
        libc::IPPROTO_UDP if is_internet => {
            asked.extend(UDP.iter().map(|&name| (libc::IPPROTO_UDP, name)))
        }
        _ => {}
    }
    asked
        .into_iter()
        .map(|(level, name)| match socket::option(fd, level, name) {
            Ok(value) => Ok(((level, name), Some(value))),
            Err(ProcessError::Kernel {
                errno: Errno::ENOPROTOOPT | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOTCONN,
                ..
            }) => Ok(((level, name), None)),
            Err(error) => Err(error.into()),
        })
        .collect()
}

/// The buffer sizes the program chose. The kernel doubles what it is told, and tells the double.
fn buffer_sizes(fd: BorrowedFd<'_>) -> Result<Vec<SocketOption>> {
    const SEND: i32 = 1;
    const RECEIVE: i32 = 2;
    let chosen = match socket::int_option(fd, libc::SOL_SOCKET, SO_BUF_LOCK) {
        Ok(chosen) => chosen,
        Err(ProcessError::Kernel {
            errno: Errno::ENOPROTOOPT,
            ..
        }) => SEND | RECEIVE,
        Err(error) => return Err(error.into()),
    };
    let mut found = Vec::new();
    for (bit, get, set) in [
        (SEND, libc::SO_SNDBUF, SO_SNDBUFFORCE),
        (RECEIVE, libc::SO_RCVBUF, SO_RCVBUFFORCE),
    ] {
        if chosen & bit != 0 {
            let value = socket::int_option(fd, libc::SOL_SOCKET, get)? / 2;
            found.push(SocketOption {
                level: libc::SOL_SOCKET,
                name: set,
                value: value.to_ne_bytes().to_vec(),
            });
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn addresses_are_shown_as_people_write_them() {
        assert_eq!(
            text(&[2, 0, 0x18, 0xeb, 10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
            "10.0.0.1:6379"
        );
        let mut mapped = vec![10, 0, 0x18, 0xeb, 0, 0, 0, 0];
        mapped.extend_from_slice(&Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped().octets());
        mapped.extend_from_slice(&[0; 4]);
        assert_eq!(text(&mapped), "10.0.0.1:6379");
        assert_eq!(text(&[2, 0]), "?");
    }

    #[test]
    fn only_chosen_options_are_carried() {
        let udp = UdpSocket::bind("127.0.0.1:0").expect("bound");
        let kind = socket::kind(udp.as_fd()).expect("a socket");
        let mut pairs = Pairs::new(&[], Depth::Survey);
        assert_eq!(
            options(udp.as_fd(), kind, &mut pairs).expect("asked"),
            Ok(Vec::new())
        );
        udp.set_broadcast(true).expect("set");
        udp.set_ttl(7).expect("set");
        socket::set_option(
            udp.as_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUF,
            &65536i32.to_ne_bytes(),
        )
        .expect("set");
        let found = options(udp.as_fd(), kind, &mut pairs)
            .expect("asked")
            .expect("carried");
        let value = |level, name| {
            found
                .iter()
                .find(|option| (option.level, option.name) == (level, name))
                .map(|option| option.value.clone())
        };
        assert_eq!(
            value(libc::SOL_SOCKET, libc::SO_BROADCAST),
            Some(1i32.to_ne_bytes().to_vec())
        );
        assert_eq!(
            value(libc::IPPROTO_IP, libc::IP_TTL),
            Some(7i32.to_ne_bytes().to_vec())
        );
        assert_eq!(
            value(libc::SOL_SOCKET, SO_RCVBUFFORCE),
            Some(65536i32.to_ne_bytes().to_vec())
        );
        assert_eq!(found.len(), 3, "{found:?}");
    }

    #[test]
    fn a_filter_is_seen() {
        let udp = UdpSocket::bind("127.0.0.1:0").expect("bound");
        assert_eq!(socket::has_filter(udp.as_fd()).ok(), Some(false));
        // One instruction: return everything.
        let program = [0x06_u16.to_ne_bytes(), [0; 2], [0xff; 2], [0xff; 2]].concat();
        let address = program.as_ptr() as u64;
        let attached = [1_u64.to_ne_bytes(), address.to_ne_bytes()].concat();
        socket::set_option(
            udp.as_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            &attached,
        )
        .expect("attached");
        assert_eq!(socket::has_filter(udp.as_fd()).ok(), Some(true));
    }

    #[test]
    fn a_listener_tells_its_backlog_and_who_waits() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let quiet = tcp(listener.as_fd(), TcpPolicy::Refuse)
            .expect("asked")
            .expect("carried");
        assert_eq!(quiet.state(), State::Listening);
        assert!(quiet.backlog > 0);
        let client =
            std::net::TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        assert!(matches!(
            tcp(listener.as_fd(), TcpPolicy::Refuse),
            Ok(Err(RefusalKind::AcceptQueue { count: 1, .. }))
        ));
        assert!(matches!(
            tcp(client.as_fd(), TcpPolicy::Refuse),
            Ok(Err(RefusalKind::Tcp {
                state: "established",
                ..
            }))
        ));
        assert_eq!(
            tcp(client.as_fd(), TcpPolicy::Close)
                .expect("asked")
                .map(|socket| socket.state()),
            Ok(State::Dropped)
        );
    }
}
