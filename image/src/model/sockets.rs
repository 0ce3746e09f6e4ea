//! Sockets.

#![allow(
    missing_docs,
    reason = "generated fields are documented in image/proto/sockets.proto"
)]

use super::{Invalid, at_most, ensure, limits};

include!("generated/pageferry.sockets.rs");

const AF_UNIX: i32 = 1;
const AF_INET: i32 = 2;
const AF_INET6: i32 = 10;
const SOCK_STREAM: i32 = 1;
const SOCK_DGRAM: i32 = 2;
const SOCK_SEQPACKET: i32 = 5;

impl Socket {
    /// Rules of one socket; that the two ends of a pair agree is a rule of the tree.
    ///
    /// # Errors
    /// The broken rule.
    pub fn validate(&self) -> Result<(), Invalid> {
        let object = || "socket".to_owned();
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
            State::Unbound => true,
            State::Bound => self.family != AF_UNIX,
            State::Listening | State::Dropped => {
                self.family != AF_UNIX && self.r#type == SOCK_STREAM
            }
            State::Paired => self.family == AF_UNIX,
        };
        ensure(is_possible, object, "is in no state of its kind")?;
        let has_address = matches!(state, State::Bound | State::Listening);
        let family = self
            .local
            .get(..2)
            .map(|family| i32::from(u16::from_le_bytes([family[0], family[1]])));
        let is_address =
            self.local.len() <= limits::SOCKET_ADDRESS_LEN && family == Some(self.family);
        ensure(
            if has_address {
                is_address
            } else {
                self.local.is_empty()
            },
            object,
            "has no address that fits its state",
        )?;
        ensure(
            is_paired == (self.pair != 0),
            object,
            "has the number of a pair, or none, against its state",
        )?;
        ensure(
            is_paired
                || (self.queue.is_empty()
                    && !self.shut_read
                    && !self.shut_write
                    && !self.peer_closed),
            object,
            "is no pair's end but has its state",
        )?;
        ensure(
            self.r#type != SOCK_STREAM || self.queue.len() <= 1,
            object,
            "is a stream with several messages",
        )?;
        at_most(self.queue.len(), limits::SOCKET_MESSAGES, || {
            "socket's queue".into()
        })?;
        at_most(self.options.len(), limits::SOCKET_OPTIONS, || {
            "socket's option list".into()
        })?;
        let are_short = self
            .options
            .iter()
            .all(|option| option.value.len() <= limits::SOCKET_OPTION_LEN);
        ensure(are_short, object, "has too long an option")
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
}
