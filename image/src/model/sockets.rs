//! Sockets.

#![allow(
    missing_docs,
    reason = "generated fields are documented in image/proto/sockets.proto"
)]

use std::collections::{BTreeMap, BTreeSet};

use super::{Invalid, ascending, at_most, ensure, limits};

include!("generated/pageferry.sockets.rs");

const AF_UNIX: i32 = 1;
const AF_INET: i32 = 2;
const AF_INET6: i32 = 10;
const SOCK_STREAM: i32 = 1;
const SOCK_DGRAM: i32 = 2;
const SOCK_SEQPACKET: i32 = 5;

/// Longest `struct sockaddr_un`: the family and 108 bytes.
const UNIX_ADDRESS_LEN: usize = 110;
/// Permission bits of a file, with set-id and sticky bits.
const MODES: u32 = 0o7777;

/// The path in a `struct sockaddr_un`, as bytes; `None` for an abstract name and for an address of another family.
pub fn unix_path(address: &[u8]) -> std::option::Option<&[u8]> {
    let name = address.strip_prefix(&(AF_UNIX as u16).to_le_bytes()[..])?;
    let path = name.split(|&byte| byte == 0).next()?;
    (!path.is_empty()).then_some(path)
}

/// The name in a `struct sockaddr_un` as ss(8) writes it; `None` without one.
pub fn unix_name(address: &[u8]) -> std::option::Option<String> {
    let name = address.strip_prefix(&(AF_UNIX as u16).to_le_bytes()[..])?;
    match name {
        [] => None,
        [0, abstract_name @ ..] => Some(format!("@{}", String::from_utf8_lossy(abstract_name))),
        _ => Some(String::from_utf8_lossy(unix_path(address)?).into_owned()),
    }
}

/// Whether a UNIX socket can be bound to `address` again: to an abstract name, or to an absolute path that hides nothing.
fn is_unix_address(address: &[u8]) -> bool {
    let is_named = (3..=UNIX_ADDRESS_LEN).contains(&address.len())
        && address.starts_with(&(AF_UNIX as u16).to_le_bytes());
    is_named
        && (address[2] == 0
            || unix_path(address).is_some_and(|path| {
                path.starts_with(b"/") && path.split(|&byte| byte == b'/').all(|part| part != b"..")
            }))
}

impl Socket {
    /// Whether it is a UNIX socket.
    pub fn is_unix(&self) -> bool {
        self.family == AF_UNIX
    }

    /// The names that have to be free where it is made again: its own, and that of an end that is closed.
    pub fn names(&self) -> impl Iterator<Item = &[u8]> {
        let remote = self.remote.as_slice();
        let closed = if self.peer_closed { remote } else { &[] };
        [self.local.as_slice(), closed]
            .into_iter()
            .filter(|name| !name.is_empty())
    }

    /// Rules of one socket; that the two ends of a pair agree is a rule of the tree.
    ///
    /// # Errors
    /// The broken rule.
    pub fn validate(&self) -> Result<(), Invalid> {
        let object = || "socket".to_owned();
        let is_unix = self.is_unix();
        let is_datagram = self.r#type == SOCK_DGRAM;
        let is_known = match self.family {
            AF_UNIX => matches!(self.r#type, SOCK_STREAM | SOCK_DGRAM | SOCK_SEQPACKET),
            AF_INET | AF_INET6 => matches!(self.r#type, SOCK_STREAM | SOCK_DGRAM),
            _ => false,
        };
        ensure(is_known, object, "is of no kind that is carried")?;
        let state = State::try_from(self.state).unwrap_or(State::Invalid);
        let is_paired = state == State::Paired;
        let is_possible = match state {
            State::Invalid => false,
            State::Unbound | State::Bound => true,
            State::Listening => !is_datagram,
            State::Dropped => !is_unix && self.r#type == SOCK_STREAM,
            State::Paired => is_unix,
            State::Waiting => is_unix && !is_datagram,
        };
        ensure(is_possible, object, "is in no state of its kind")?;
        let is_address = |address: &[u8]| match self.family {
            AF_UNIX => is_unix_address(address),
            family => {
                address.len() <= limits::SOCKET_ADDRESS_LEN
                    && address
                        .get(..2)
                        .map(|family| i32::from(u16::from_le_bytes([family[0], family[1]])))
                        == Some(family)
            }
        };
        let is_good = match state {
            State::Bound | State::Listening => is_address(&self.local),
            State::Paired | State::Waiting => self.local.is_empty() || is_address(&self.local),
            _ => self.local.is_empty(),
        };
        ensure(is_good, object, "has no address that fits its state")?;
        self.validate_unix(state)?;
        ensure(
            is_paired == (self.pair != 0),
            object,
            "has the number of a pair, or none, against its state",
        )?;
        let has_queue = is_paired || is_unix && is_datagram;
        let may_be_shut = has_queue || state == State::Waiting;
        ensure(
            (has_queue || self.queue.is_empty())
                && (may_be_shut || !self.shut_read && !self.shut_write)
                && (is_paired || !self.peer_closed),
            object,
            "is no pair's end but has its state",
        )?;
        self.validate_queue()?;
        at_most(self.options.len(), limits::SOCKET_OPTIONS, || {
            "socket's option list".into()
        })?;
        let are_short = self
            .options
            .iter()
            .all(|option| option.value.len() <= limits::SOCKET_OPTION_LEN);
        ensure(are_short, object, "has too long an option")
    }

    /// What lies unread, and what comes with it.
    fn validate_queue(&self) -> Result<(), Invalid> {
        let object = || "socket".to_owned();
        let is_datagram = self.r#type == SOCK_DGRAM;
        at_most(self.queue.len(), limits::SOCKET_MESSAGES, || {
            "socket's queue".into()
        })?;
        ascending(
            self.attached.iter().map(|attached| attached.message),
            "what comes with a socket's messages",
        )?;
        let mut files = 0;
        for attached in &self.attached {
            let is_something = !attached.address.is_empty()
                || attached.sender.is_some()
                || !attached.files.is_empty();
            let is_named =
                attached.address.is_empty() || is_datagram && is_unix_address(&attached.address);
            ensure(
                (attached.message as usize) < self.queue.len() && is_something && is_named,
                object,
                "has a sender's name for no message, or an impossible one",
            )?;
            ensure(
                attached.sender.is_none_or(|sender| sender.pid > 0),
                object,
                "has a message that nobody sent",
            )?;
            let count = attached.files.len();
            at_most(count, limits::MESSAGE_FILES, || "socket's message".into())?;
            files += count;
        }
        at_most(files, limits::DESCRIPTORS_OPEN, || {
            "socket's messages".into()
        })?;
        if self.r#type != SOCK_STREAM {
            return Ok(());
        }
        // A stream is cut only where something comes, and behind it.
        let mut attached = self.attached.iter().map(|attached| attached.message);
        let mut next = attached.next();
        let mut may_be_cut = true;
        for (index, bytes) in (0..).zip(&self.queue) {
            let comes = next == Some(index);
            ensure(
                !bytes.is_empty() && (comes || may_be_cut),
                object,
                "is a stream with several messages",
            )?;
            may_be_cut = comes;
            if comes {
                next = attached.next();
            }
        }
        Ok(())
    }

    /// What only a UNIX socket has.
    fn validate_unix(&self, state: State) -> Result<(), Invalid> {
        let object = || "socket".to_owned();
        let is_paired = state == State::Paired;
        let is_datagram = self.r#type == SOCK_DGRAM;
        at_most(self.waiting.len(), limits::SOCKET_WAITING, || {
            "accept queue".into()
        })?;
        let is_found = self.file.is_some() || unix_path(&self.local).is_none();
        ensure(
            self.waiting.is_empty() || self.is_unix() && state == State::Listening && is_found,
            object,
            "has connections waiting that cannot be made",
        )?;
        ensure(
            self.is_unix()
                || self.remote.is_empty()
                    && self.file.is_none()
                    && self.peer.is_none()
                    && !self.accepted,
            object,
            "is no UNIX socket but has what only these have",
        )?;
        let may_have_remote = if is_paired {
            self.peer_closed
        } else {
            is_datagram
        };
        ensure(
            self.remote.is_empty() || may_have_remote && is_unix_address(&self.remote),
            object,
            "is connected to an impossible address",
        )?;
        ensure(
            self.file.is_none_or(|file| {
                unix_path(&self.local).is_some() && !self.accepted && file.mode & !MODES == 0
            }),
            object,
            "has an impossible file",
        )?;
        ensure(
            !self.accepted || is_paired && !is_datagram && !self.local.is_empty(),
            object,
            "was accepted, and has not what that needs",
        )
    }

    /// The open files that travel with what lies unread.
    pub fn in_flight(&self) -> impl Iterator<Item = u32> + '_ {
        let attached = self.attached.iter();
        attached.flat_map(|attached| attached.files.iter().copied())
    }

    /// Every connection that waits to be accepted does so once, at a socket of its type.
    fn validate_waiting<'s>(sockets: impl Iterator<Item = (u32, &'s Self)>) -> Result<(), Invalid> {
        let (mut waiting, mut listening) = (BTreeMap::new(), Vec::new());
        for (id, socket) in sockets {
            match socket.state() {
                State::Waiting => drop(waiting.insert(id, socket.r#type)),
                State::Listening => listening.push(socket),
                _ => {}
            }
        }
        for listener in listening {
            for id in &listener.waiting {
                ensure(
                    waiting.remove(id) == Some(listener.r#type),
                    || format!("open file {id}"),
                    "waits to be accepted twice, or is none that does",
                )?;
            }
        }
        match waiting.keys().next() {
            None => Ok(()),
            Some(id) => Err(Invalid::new(
                format!("open file {id}"),
                "waits to be accepted by nobody",
            )),
        }
    }

    /// Rules of the sockets of a tree together, by their open files: pairs have both their ends, names are there once, a datagram
    /// socket sends to one that has the name, and who waits to be accepted does so somewhere.
    ///
    /// # Errors
    /// The broken rule.
    pub(super) fn validate_all<'s>(
        files: impl Iterator<Item = (u32, &'s Self)> + Clone,
    ) -> Result<(), Invalid> {
        Self::validate_waiting(files.clone())?;
        let sockets = files.map(|(_, socket)| socket);
        let mut ends: BTreeMap<u32, Vec<&Self>> = BTreeMap::new();
        for socket in sockets.clone().filter(|socket| socket.pair != 0) {
            ends.entry(socket.pair).or_default().push(socket);
        }
        for (pair, ends) in ends {
            let object = || format!("socket pair {pair}");
            let (one, other_local, is_whole) = match ends.as_slice() {
                [one] => (one, &one.remote, one.peer_closed),
                [one, other] => {
                    let is_whole =
                        !one.peer_closed && !other.peer_closed && one.r#type == other.r#type;
                    (one, &other.local, is_whole)
                }
                _ => return Err(Invalid::new(object(), "has not its two ends")),
            };
            ensure(is_whole, object, "has not its two ends")?;
            // Who connects finds a name, and only who is accepted has another socket's.
            let accepted = ends.iter().filter(|end| end.accepted).count()
                + usize::from(ends.len() == 1 && !one.accepted && !one.remote.is_empty());
            let is_named = !one.local.is_empty() || !other_local.is_empty();
            ensure(
                one.r#type == SOCK_DGRAM || accepted == usize::from(is_named),
                object,
                "has names but was not connected by one, or the reverse",
            )?;
        }
        let mut owned = BTreeSet::new();
        let mut receivers = BTreeSet::new();
        for socket in sockets.clone().filter(|socket| socket.is_unix()) {
            let is_own = socket.file.is_some() || unix_path(&socket.local).is_none();
            if is_own && !socket.accepted && !socket.local.is_empty() {
                // One path is one file, an abstract name is one for each type.
                let kind = socket.file.map_or(socket.r#type, |_| 0);
                ensure(
                    owned.insert((kind, socket.local.as_slice())),
                    || "UNIX socket".into(),
                    "has a name that another has",
                )?;
            }
            if socket.r#type == SOCK_DGRAM && !socket.local.is_empty() {
                receivers.insert(socket.local.as_slice());
            }
        }
        for socket in sockets.filter(|socket| socket.is_unix() && socket.pair == 0) {
            let senders = socket.attached.iter().map(|attached| &attached.address);
            let names = senders.chain(Some(&socket.remote));
            for name in names.filter(|name| !name.is_empty()) {
                ensure(
                    receivers.contains(name.as_slice()),
                    || "datagram socket".into(),
                    "names a socket that is not there",
                )?;
            }
            ensure(
                socket.queue.is_empty() || !socket.local.is_empty(),
                || "datagram socket".into(),
                "holds what could not be sent to it, for it has no name",
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_follow_their_rules() {
        let listener = Socket {
            family: AF_INET,
            r#type: SOCK_STREAM,
            protocol: 6,
            state: State::Listening.into(),
            local: vec![2, 0, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            ..Socket::default()
        };
        assert_eq!(listener.validate(), Ok(()));
        let pair = Socket {
            family: AF_UNIX,
            r#type: SOCK_DGRAM,
            state: State::Paired.into(),
            pair: 1,
            queue: vec![vec![1]; 2],
            ..Socket::default()
        };
        assert_eq!(pair.validate(), Ok(()));
        for (why, bad) in [
            (
                "family",
                Socket {
                    family: 16,
                    ..listener.clone()
                },
            ),
            (
                "no state",
                Socket {
                    state: 0,
                    ..listener.clone()
                },
            ),
            (
                "unknown state",
                Socket {
                    state: 99,
                    ..listener.clone()
                },
            ),
            (
                "datagrams do not listen",
                Socket {
                    r#type: SOCK_DGRAM,
                    ..listener.clone()
                },
            ),
            (
                "no address",
                Socket {
                    local: Vec::new(),
                    ..listener.clone()
                },
            ),
            (
                "another family's address",
                Socket {
                    family: AF_INET6,
                    ..listener.clone()
                },
            ),
            (
                "long address",
                Socket {
                    local: vec![2; 129],
                    ..listener.clone()
                },
            ),
            (
                "queue",
                Socket {
                    queue: vec![vec![1]],
                    ..listener.clone()
                },
            ),
            (
                "a pair's number",
                Socket {
                    pair: 1,
                    ..listener.clone()
                },
            ),
            (
                "no pair's number",
                Socket {
                    pair: 0,
                    ..pair.clone()
                },
            ),
            (
                "stream of messages",
                Socket {
                    r#type: SOCK_STREAM,
                    ..pair.clone()
                },
            ),
            (
                "options",
                Socket {
                    options: vec![Option {
                        value: vec![0; 5000],
                        ..Option::default()
                    }],
                    ..listener.clone()
                },
            ),
        ] {
            assert!(bad.validate().is_err(), "{why}");
        }
    }

    #[test]
    fn names_are_shown_as_people_write_them() {
        assert_eq!(unix_name(&[1, 0]), None);
        assert_eq!(unix_name(b"\x02\0\0\x50").as_deref(), None);
        assert_eq!(unix_name(PATH).as_deref(), Some("/run/a"));
        assert_eq!(unix_name(ABSTRACT).as_deref(), Some("@a"));
    }

    fn unix(kind: i32, state: State, local: &[u8]) -> Socket {
        Socket {
            family: AF_UNIX,
            r#type: kind,
            state: state.into(),
            local: local.to_vec(),
            ..Socket::default()
        }
    }

    const PATH: &[u8] = b"\x01\0/run/a\0";
    const ABSTRACT: &[u8] = b"\x01\0\0a";

    #[test]
    fn names_of_unix_sockets_lead_where_they_say() {
        let check = |local: &[u8]| unix(SOCK_STREAM, State::Listening, local).validate();
        assert_eq!(check(PATH), Ok(()));
        assert_eq!(check(ABSTRACT), Ok(()));
        let long = [&PATH[..3], &[b'a'; 108]].concat();
        for bad in [
            &b""[..],
            b"\x01\0",
            b"\x02\0/run/a\0",
            b"\x01\0run/a\0",
            b"\x01\0/run/../a\0",
            &long,
        ] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
        assert!(
            unix(SOCK_DGRAM, State::Listening, PATH).validate().is_err(),
            "datagrams do not listen"
        );
        let file = Some(SocketFile::default());
        let with_file = |local| Socket {
            file,
            ..unix(SOCK_STREAM, State::Bound, local)
        };
        assert_eq!(with_file(PATH).validate(), Ok(()));
        assert!(with_file(ABSTRACT).validate().is_err(), "a file of no path");
        let internet = Socket {
            peer: Some(Ids::default()),
            family: AF_INET,
            ..unix(SOCK_STREAM, State::Unbound, b"")
        };
        assert!(internet.validate().is_err(), "a peer's credentials");
    }

    fn all(sockets: &[Socket]) -> Result<(), Invalid> {
        sockets.iter().try_for_each(Socket::validate)?;
        Socket::validate_all((1..).zip(sockets))
    }

    fn attached(message: u32, sender: i32, files: &[u32]) -> Attached {
        Attached {
            message,
            sender: (sender != 0).then_some(Ids {
                pid: sender,
                ..Ids::default()
            }),
            files: files.to_vec(),
            ..Attached::default()
        }
    }

    #[test]
    fn a_stream_is_cut_only_where_something_comes() {
        let stream = |count: usize, attached: &[Attached]| {
            Socket {
                pair: 1,
                queue: vec![b"x".to_vec(); count],
                attached: attached.to_vec(),
                ..unix(SOCK_STREAM, State::Paired, b"")
            }
            .validate()
        };
        assert_eq!(stream(1, &[]), Ok(()));
        assert_eq!(stream(3, &[attached(1, 0, &[7])]), Ok(()));
        assert_eq!(
            stream(2, &[attached(0, 9, &[]), attached(1, 8, &[])]),
            Ok(())
        );
        assert!(stream(2, &[]).is_err(), "nothing comes");
        assert!(stream(4, &[attached(1, 9, &[])]).is_err(), "cut once more");
        let empty = Socket {
            pair: 1,
            queue: vec![Vec::new()],
            attached: vec![attached(0, 9, &[])],
            ..unix(SOCK_STREAM, State::Paired, b"")
        };
        assert!(empty.validate().is_err(), "no byte");
    }

    #[test]
    fn what_comes_with_a_message_is_something_that_can_be() {
        let check = |attached: Attached| {
            Socket {
                queue: vec![Vec::new(); 2],
                attached: vec![attached],
                ..unix(SOCK_DGRAM, State::Bound, ABSTRACT)
            }
            .validate()
        };
        assert_eq!(check(attached(1, 9, &[7; limits::MESSAGE_FILES])), Ok(()));
        assert!(check(attached(1, 0, &[])).is_err(), "nothing");
        assert!(check(attached(2, 9, &[])).is_err(), "no such message");
        assert!(check(attached(1, -1, &[])).is_err(), "an impossible sender");
        assert!(
            check(attached(1, 0, &[7; limits::MESSAGE_FILES + 1])).is_err(),
            "more than one message takes"
        );
    }

    #[test]
    fn who_waits_to_be_accepted_does_so_once() {
        let listener = |waiting: &[u32]| Socket {
            waiting: waiting.to_vec(),
            ..unix(SOCK_STREAM, State::Listening, ABSTRACT)
        };
        let client = unix(SOCK_STREAM, State::Waiting, b"");
        let check = |waiting: &[u32], client: &Socket| all(&[listener(waiting), client.clone()]);
        assert_eq!(check(&[2], &client), Ok(()));
        assert!(check(&[], &client).is_err(), "nobody has it");
        assert!(check(&[2, 2], &client).is_err(), "twice");
        assert!(check(&[1], &client).is_err(), "another");
        assert!(check(&[9], &client).is_err(), "none");
        let packet = unix(SOCK_SEQPACKET, State::Waiting, b"");
        assert!(check(&[2], &packet).is_err(), "another type");
        let gone = Socket {
            waiting: vec![2],
            ..unix(SOCK_STREAM, State::Listening, PATH)
        };
        assert!(gone.validate().is_err(), "nobody can connect to it");
        let unread = Socket {
            queue: vec![b"x".to_vec()],
            ..client
        };
        assert!(unread.validate().is_err(), "nobody can have sent to it");
        assert!(unix(SOCK_DGRAM, State::Waiting, b"").validate().is_err());
    }

    #[test]
    fn connected_sockets_have_the_names_of_a_connection() {
        let end = |local: &[u8], accepted| Socket {
            pair: 1,
            accepted,
            ..unix(SOCK_STREAM, State::Paired, local)
        };
        let client = end(b"", false);
        assert_eq!(all(&[client.clone(), end(PATH, true)]), Ok(()));
        assert_eq!(all(&[end(ABSTRACT, false), end(PATH, true)]), Ok(()));
        assert!(all(&[client.clone(), end(PATH, false)]).is_err());
        assert!(all(&[end(ABSTRACT, true), end(PATH, true)]).is_err());
        assert!(all(&[client.clone(), end(b"", true)]).is_err());
        let closed = |local: &[u8], remote: &[u8], accepted| Socket {
            peer_closed: true,
            remote: remote.to_vec(),
            ..end(local, accepted)
        };
        assert_eq!(all(&[closed(b"", PATH, false)]), Ok(()));
        assert_eq!(all(&[closed(PATH, b"", true)]), Ok(()));
        assert!(all(&[closed(PATH, b"", false)]).is_err());
        let open = Socket {
            remote: PATH.to_vec(),
            ..client
        };
        assert!(open.validate().is_err(), "an open end tells its own name");
    }

    #[test]
    fn names_are_there_once_and_what_is_named_is_there() {
        let bound = |local| unix(SOCK_DGRAM, State::Bound, local);
        let with_file = |local| Socket {
            file: Some(SocketFile::default()),
            ..bound(local)
        };
        assert!(all(&[bound(ABSTRACT), bound(ABSTRACT)]).is_err());
        assert!(all(&[with_file(PATH), with_file(PATH)]).is_err());
        assert_eq!(all(&[bound(PATH), with_file(PATH)]), Ok(()));
        let sender = Socket {
            remote: PATH.to_vec(),
            ..unix(SOCK_DGRAM, State::Unbound, b"")
        };
        assert_eq!(all(&[sender.clone(), with_file(PATH)]), Ok(()));
        assert!(all(&[sender]).is_err(), "nobody has that name");
        let receiver = |message, address: &[u8]| Socket {
            queue: vec![b"x".to_vec()],
            attached: vec![Attached {
                message,
                address: address.to_vec(),
                ..Attached::default()
            }],
            ..bound(ABSTRACT)
        };
        assert_eq!(all(&[receiver(0, ABSTRACT)]), Ok(()));
        assert!(all(&[receiver(1, ABSTRACT)]).is_err(), "no such message");
        assert!(all(&[receiver(0, PATH)]).is_err(), "no such sender");
        assert!(all(&[receiver(0, b"")]).is_err(), "a name of nothing");
        let unnamed = Socket {
            queue: vec![Vec::new()],
            ..unix(SOCK_DGRAM, State::Unbound, b"")
        };
        assert!(all(&[unnamed]).is_err(), "nobody could send to it");
    }
}
