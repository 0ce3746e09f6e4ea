//! The model as bytes: protobuf, bounded. A tree from a file or a peer is decoded here and nowhere else.
//!
//! An encoded element may take two bytes and a decoded one some hundred, so a limit on the length alone does not bound the
//! memory. The encoding is walked first, without keeping anything, and what it would take is summed up; only
//! what stays within [`limits::TREE_MEMORY`] is decoded.

use prost::Message as _;

use crate::model::{Invalid, task::Tree};
use crate::model::{
    files, limits, locks, memory, relations, shared, signals, sockets, task, timers,
};

/// Why bytes are no tree.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Longer than any tree.
    #[error("has {len} bytes, more than the limit of {}", limits::TREE_LEN)]
    TooLong {
        /// Its length, bytes.
        len: usize,
    },
    /// It would take too much memory.
    #[error("would take more than the limit of {limit} bytes of memory")]
    TooLarge {
        /// The limit.
        limit: usize,
    },
    /// The bytes are no protobuf.
    #[error("is broken off or garbled at byte {offset}")]
    Malformed {
        /// Where, bytes from its beginning.
        offset: usize,
    },
    /// They are protobuf but no tree.
    #[error("cannot be decoded")]
    Decode(#[from] prost::DecodeError),
    /// It is a tree that cannot be.
    #[error("breaks a rule")]
    Invalid(#[from] Invalid),
}

impl Tree {
    /// Decodes a tree and checks every rule of the model: what comes out may be built.
    ///
    /// # Errors
    /// [`Error`]; nothing has been allocated for what is over a limit.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        if bytes.len() > limits::TREE_LEN {
            return Err(Error::TooLong { len: bytes.len() });
        }
        check_memory(bytes, TREE, limits::TREE_MEMORY)?;
        let tree = Self::decode(bytes)?;
        tree.validate()?;
        Ok(tree)
    }
}

/// What a length-delimited field becomes.
#[derive(Debug)]
pub enum Shape {
    /// A message: bytes of its type, and its own such fields.
    Message(usize, &'static [Field]),
    /// Numbers, packed: bytes of one.
    Numbers(usize),
}

/// A field that takes more memory than bytes in the encoding. Those that are not listed are strings and byte strings.
#[derive(Debug)]
pub struct Field {
    number: u32,
    shape: Shape,
    /// As in the .proto file.
    #[cfg(test)]
    name: &'static str,
}

impl Field {
    /// A field of a message that has parts of the model in it.
    pub const fn new(number: u32, shape: Shape) -> Self {
        Self {
            number,
            shape,
            #[cfg(test)]
            name: "",
        }
    }
}

macro_rules! fields {
    ($($number:literal $name:literal: $shape:expr),* $(,)?) => {
        &[$(Field { number: $number, shape: $shape, #[cfg(test)] name: $name }),*]
    };
}

/// The shape of messages of type `T` with these fields.
pub const fn of<T>(fields: &'static [Field]) -> Shape {
    Shape::Message(size_of::<T>(), fields)
}

const RANGE: Shape = of::<memory::Range>(&[]);
/// Of [`memory::FileIdentity`].
pub const IDENTITY: Shape = of::<memory::FileIdentity>(&[]);
const MAPPING: Shape = of::<memory::Mapping>(
    fields! {6 "file": IDENTITY, 12 "advice": Shape::Numbers(4), 14 "guards": RANGE},
);
const SPACE: Shape = of::<memory::Space>(fields! {1 "mappings": MAPPING, 14 "exe": IDENTITY});
const PENDING: Shape = of::<signals::Pending>(&[]);
const THREAD: Shape = of::<task::Thread>(fields! {
    6 "pending": PENDING, 7 "altstack": of::<signals::AltStack>(&[]), 11 "rseq": of::<task::Rseq>(&[]),
    12 "credentials": of::<task::Credentials>(fields! {9 "groups": Shape::Numbers(4)}),
    13 "scheduling": of::<task::Scheduling>(&[]),
});
const PROCESS: Shape = of::<task::Process>(fields! {
    5 "threads": THREAD, 6 "space": SPACE, 7 "actions": of::<signals::Action>(&[]), 8 "pending": PENDING,
    9 "itimers": of::<timers::Itimer>(&[]), 10 "posix_timers": of::<timers::Posix>(&[]),
    11 "descriptors": of::<files::Descriptor>(&[]), 14 "limits": of::<task::Limit>(&[]),
    20 "first_touch": RANGE,
});
const IDS: Shape = of::<sockets::Ids>(&[]);
const SOCKET: Shape = of::<sockets::Socket>(fields! {
    7 "options": of::<sockets::Option>(&[]), 14 "file": of::<sockets::SocketFile>(&[]),
    16 "peer": IDS, 17 "attached": of::<sockets::Attached>(fields! {3 "sender": IDS, 4 "files": Shape::Numbers(4)}),
    18 "waiting": Shape::Numbers(4),
});
// The kinds are part of the file itself.
const FILE: Shape = of::<files::File>(fields! {
    3 "owner": of::<files::Owner>(&[]), 4 "regular": of::<files::Regular>(fields! {1 "identity": IDENTITY}),
    5 "directory": of::<files::Directory>(&[]), 6 "device": of::<files::Device>(&[]),
    7 "pipe": of::<files::PipeEnd>(&[]), 8 "eventfd": of::<files::Eventfd>(&[]),
    9 "epoll": of::<files::Epoll>(fields! {1 "items": of::<files::EpollItem>(&[])}),
    10 "timerfd": of::<files::Timerfd>(&[]), 11 "signalfd": of::<files::Signalfd>(&[]), 12 "socket": SOCKET,
    13 "shared": of::<files::SharedFile>(&[]), 14 "fifo": of::<files::Fifo>(&[]),
});
/// Of [`shared::Shared`].
pub const SHARED: Shape = of::<shared::Shared>(
    fields! {3 "anonymous": of::<shared::Anonymous>(&[]), 4 "memfd": of::<shared::Memfd>(&[]), 5 "carried": of::<shared::Carried>(&[]), 10 "segment": of::<shared::Segment>(&[])},
);
/// Of [`task::Host`].
pub const HOST: Shape = of::<task::Host>(&[]);
const TREE: &[Field] = fields! {
    1 "processes": PROCESS, 2 "files": FILE, 3 "pipes": of::<files::Pipe>(&[]), 7 "host": HOST,
    8 "shared": SHARED, 16 "zombies": of::<relations::Zombie>(&[]), 20 "locks": of::<locks::Lock>(&[]),
};

/// Memory of a byte string beside its bytes: the string itself, and what an allocation costs.
const STRING_LEN: usize = size_of::<String>() + 16;
/// Memory of a number that is not packed.
const NUMBER_LEN: usize = 8;

/// Makes sure that the message encoded in `bytes`, with these fields, would take no more than `limit` bytes of memory, nearly. Takes
/// none itself, and never more steps than bytes.
///
/// # Errors
/// [`Error::TooLarge`]; [`Error::Malformed`] for what is no message at all.
pub fn check_memory(bytes: &[u8], fields: &'static [Field], limit: usize) -> Result<(), Error> {
    let mut walk = Walk {
        bytes,
        at: 0,
        left: limit,
        limit,
    };
    walk.message(bytes.len(), fields)
}

struct Walk<'b> {
    bytes: &'b [u8],
    at: usize,
    /// Bytes of memory that may still be taken.
    left: usize,
    limit: usize,
}

impl Walk<'_> {
    /// Walks the fields up to `end`. Goes as deep as the table does.
    fn message(&mut self, end: usize, fields: &'static [Field]) -> Result<(), Error> {
        while self.at < end {
            let key = self.number(end)?;
            match key & 7 {
                0 => {
                    self.number(end)?;
                    self.take(NUMBER_LEN)?;
                }
                1 => self.skip(8, end)?,
                5 => self.skip(4, end)?,
                2 => {
                    let offset = self.at;
                    let len = self.number(end)?;
                    let len = usize::try_from(len)
                        .ok()
                        .filter(|&len| len <= end - self.at)
                        .ok_or(Error::Malformed { offset })?;
                    let field = fields
                        .iter()
                        .find(|field| u64::from(field.number) == key >> 3);
                    match field.map(|field| &field.shape) {
                        Some(&Shape::Message(own, fields)) => {
                            self.take(own)?;
                            self.message(self.at + len, fields)?;
                        }
                        Some(&Shape::Numbers(own)) => {
                            self.take(own.saturating_mul(len))?;
                            self.at += len;
                        }
                        None => {
                            self.take(STRING_LEN.saturating_add(len))?;
                            self.at += len;
                        }
                    }
                }
                // Groups, which proto3 does not have.
                _ => return Err(Error::Malformed { offset: self.at }),
            }
        }
        Ok(())
    }

    fn take(&mut self, len: usize) -> Result<(), Error> {
        let left = self.left.checked_sub(len);
        self.left = left.ok_or(Error::TooLarge { limit: self.limit })?;
        Ok(())
    }

    fn skip(&mut self, len: usize, end: usize) -> Result<(), Error> {
        if len > end - self.at {
            return Err(Error::Malformed { offset: self.at });
        }
        self.at += len;
        self.take(NUMBER_LEN)
    }

    /// A varint that ends before `end`.
    fn number(&mut self, end: usize) -> Result<u64, Error> {
        let offset = self.at;
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let Some(&byte) = self.bytes[..end].get(self.at) else {
                break;
            };
            self.at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Error::Malformed { offset })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Message → its fields that the table must list, by number: those of a message type, and repeated numbers.
    fn written_down() -> BTreeMap<String, BTreeMap<u32, (String, String)>> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/proto");
        let mut found: BTreeMap<String, BTreeMap<u32, (String, String)>> = BTreeMap::new();
        for entry in std::fs::read_dir(folder).expect("it is part of the project") {
            let path = entry.expect("it can be read").path();
            let text = std::fs::read_to_string(path).expect("it can be read");
            let text: String = text
                .lines()
                .map(|line| line.split("//").next().unwrap_or_default().to_owned() + " ")
                .collect();
            let spaced = text
                .replace('{', " { ")
                .replace('}', " } ")
                .replace(';', " ; ");
            let mut stack: Vec<String> = Vec::new();
            let mut words: Vec<&str> = Vec::new();
            for word in spaced.split_whitespace() {
                match word {
                    "{" => {
                        stack.push(words.join(" "));
                        words.clear();
                    }
                    "}" => {
                        stack.pop();
                    }
                    ";" => {
                        let message = stack
                            .iter()
                            .find_map(|block| block.strip_prefix("message "));
                        if let (Some(message), [repeated @ .., kind, name, "=", number]) =
                            (message, &words[..])
                        {
                            let kind = kind.rsplit('.').next().unwrap_or_default();
                            let is_message = kind.starts_with(char::is_uppercase)
                                && !matches!(kind, "Kind" | "State");
                            let is_list =
                                *repeated == ["repeated"] && !matches!(kind, "string" | "bytes");
                            if is_message || is_list {
                                found.entry(message.to_owned()).or_default().insert(
                                    number.parse().expect("a field number"),
                                    ((*name).to_owned(), kind.to_owned()),
                                );
                            }
                        }
                        words.clear();
                    }
                    word => words.push(word),
                }
            }
        }
        found
    }

    #[test]
    fn every_field_that_grows_is_accounted_for() {
        let written = written_down();
        let mut seen = 0;
        let mut open = vec![("Tree".to_owned(), TREE)];
        while let Some((message, fields)) = open.pop() {
            let wanted = written.get(&message).cloned().unwrap_or_default();
            let listed: BTreeMap<u32, &str> = fields
                .iter()
                .map(|field| (field.number, field.name))
                .collect();
            assert_eq!(
                listed,
                wanted
                    .iter()
                    .map(|(&number, (name, _))| (number, name.as_str()))
                    .collect(),
                "fields of {message}"
            );
            seen += 1;
            for field in fields {
                if let Shape::Message(_, inner) = field.shape {
                    open.push((wanted[&field.number].1.clone(), inner));
                }
            }
        }
        assert!(seen > 20, "{seen} messages");
    }

    #[test]
    fn what_would_outgrow_the_host_is_not_decoded() {
        // Empty mappings: two bytes each.
        let count = limits::TREE_MEMORY / size_of::<memory::Mapping>() + 1;
        let mappings = [0x0a, 0].repeat(count);
        let wrap = |tag: u8, inner: Vec<u8>| {
            let mut bytes = vec![tag];
            prost::encode_length_delimiter(inner.len(), &mut bytes).expect("a vector grows");
            bytes.extend(inner);
            bytes
        };
        let tree = wrap(0x0a, wrap(0x32, mappings));
        assert!(tree.len() < limits::TREE_LEN / 10);
        assert!(matches!(
            Tree::from_bytes(&tree),
            Err(Error::TooLarge { .. })
        ));
        let numbers = wrap(
            0x0a,
            wrap(
                0x2a,
                wrap(0x62, wrap(0x4a, vec![1; limits::TREE_MEMORY / 4 + 1])),
            ),
        );
        assert!(matches!(
            Tree::from_bytes(&numbers),
            Err(Error::TooLarge { .. })
        ));
    }

    #[test]
    fn garbage_is_named_where_it_lies() {
        for bytes in [
            &[0x0a][..],
            &[0x0a, 5, 0],
            &[0x80; 11],
            &[0x0b],
            &[0x09, 1, 2],
        ] {
            assert!(
                matches!(Tree::from_bytes(bytes), Err(Error::Malformed { .. })),
                "{bytes:?}"
            );
        }
        assert!(matches!(Tree::from_bytes(&[]), Err(Error::Invalid(_))));
    }
}
