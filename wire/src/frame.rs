//! Frames: a 12-byte header and a body. Hides every byte of the framing; must never allocate for a length it has not
//! compared with a limit, nor decode a body whose checksum it has not seen to be right.
//!
//! ```text
//! 0      1           4            8            12
//! | tag  | 0  0  0   | body_len   | crc32      | body …
//! ```
//! Integers are little-endian. The checksum covers the body, except that of PAGES: there it covers the batch's head (all
//! before the page bytes), and each page has a checksum of its own in that head.

use std::fmt;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::limits::{self, FRAME_HEADER_LEN};
use crate::message::{self, Checked};
use crate::pages::PageBatch;
use crate::{Error, Result};

/// Who may send a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Source to target.
    ToTarget,
    /// Target to source.
    ToSource,
    /// Both.
    Both,
}

/// A body that can be a frame's.
trait Body: Sized {
    /// The checked part and, if any, what its own checksums cover.
    fn encode(&self) -> (Bytes, Bytes);
    fn decode(tag: Tag, body: Bytes) -> Result<Self>;
    /// How much of `body` the frame's checksum covers. `body` may be of any content.
    fn checked_len(body: &[u8]) -> usize {
        body.len()
    }
}

impl<M: prost::Message + Default + Checked> Body for M {
    fn encode(&self) -> (Bytes, Bytes) {
        (self.encode_to_vec().into(), Bytes::new())
    }

    fn decode(tag: Tag, body: Bytes) -> Result<Self> {
        let message = M::decode(body).map_err(|source| Error::Decode { tag, source })?;
        message.check()?;
        Ok(message)
    }
}

impl Body for message::State {
    fn encode(&self) -> (Bytes, Bytes) {
        (self.tree.clone(), Bytes::new())
    }

    fn decode(_: Tag, body: Bytes) -> Result<Self> {
        Ok(Self { tree: body })
    }
}

impl Body for PageBatch {
    fn encode(&self) -> (Bytes, Bytes) {
        (self.head().clone(), self.data().clone())
    }

    fn decode(_: Tag, body: Bytes) -> Result<Self> {
        Self::from_body(body)
    }

    fn checked_len(body: &[u8]) -> usize {
        PageBatch::head_len(body)
    }
}

/// The one table of frames: number, name, body, direction, longest body.
macro_rules! frames {
    ($($(#[$doc:meta])* $number:literal $name:ident($body:ty) $direction:ident $limit:expr;)*) => {
        /// A frame's kind. Zero is no kind.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Tag { $($(#[$doc])* $name = $number,)* }

        impl Tag {
            /// Every tag, in order of number.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The tag with this number.
            pub fn from_number(number: u8) -> Result<Self> {
                match number { $($number => Ok(Self::$name),)* tag => Err(Error::UnknownTag { tag }) }
            }

            /// Who may send it.
            pub const fn direction(self) -> Direction {
                match self { $(Self::$name => Direction::$direction,)* }
            }

            /// The longest body, bytes.
            pub const fn body_len_max(self) -> u32 {
                match self { $(Self::$name => $limit,)* }
            }

            fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            fn checked_len(self, body: &[u8]) -> usize {
                match self { $(Self::$name => <$body as Body>::checked_len(body),)* }
            }
        }

        /// One message between the hosts.
        #[derive(Debug, Clone, PartialEq)]
        pub enum Frame { $($(#[$doc])* $name($body),)* }

        impl Frame {
            /// Its kind.
            pub const fn tag(&self) -> Tag {
                match self { $(Self::$name(_) => Tag::$name,)* }
            }

            fn body(&self) -> (Bytes, Bytes) {
                match self { $(Self::$name(body) => Body::encode(body),)* }
            }

            fn decode(tag: Tag, body: Bytes) -> Result<Self> {
                match tag { $(Tag::$name => <$body as Body>::decode(tag, body).map(Self::$name),)* }
            }
        }

        $(impl From<$body> for Frame { fn from(body: $body) -> Self { Self::$name(body) } })*
    };
}

frames! {
    /// Opens every connection.
    1 Hello(message::Hello) ToTarget limits::SMALL_LEN_MAX;
    /// Answers HELLO.
    2 Welcome(message::Welcome) ToSource limits::SMALL_LEN_MAX;
    /// What is about to come.
    3 Plan(message::Plan) ToTarget limits::PLAN_LEN_MAX;
    /// What the target thinks of the plan.
    4 Verdict(message::Verdict) ToSource limits::VERDICT_LEN_MAX;
    /// The captured tree.
    5 State(message::State) ToTarget limits::STATE_LEN_MAX;
    /// Pages.
    6 Pages(PageBatch) ToTarget limits::PAGES_LEN_MAX;
    /// The state and its eager pages are complete.
    7 StateEnd(message::StateEnd) ToTarget limits::SMALL_LEN_MAX;
    /// The prepared process stands.
    8 Ready(message::Ready) ToSource limits::SMALL_LEN_MAX;
    /// Hands over the right to run.
    9 Commit(message::Commit) ToTarget limits::SMALL_LEN_MAX;
    /// The process runs on the target.
    10 Running(message::Running) ToSource limits::SMALL_LEN_MAX;
    /// The target will never run it.
    11 Refused(message::Refused) ToSource limits::SMALL_LEN_MAX;
    /// Which pages have data.
    12 Map(message::Map) ToTarget limits::MAP_LEN_MAX;
    /// The map is complete.
    13 MapEnd(message::MapEnd) ToTarget limits::SMALL_LEN_MAX;
    /// Asks for pages.
    14 Fetch(message::Fetch) ToSource limits::SMALL_LEN_MAX;
    /// Every page has arrived.
    15 Resident(message::Resident) ToSource limits::SMALL_LEN_MAX;
    /// The source copy has ended.
    16 Done(message::Done) ToTarget limits::SMALL_LEN_MAX;
    /// Ends the migration before COMMIT.
    17 Abort(message::Abort) Both limits::SMALL_LEN_MAX;
    /// The sender lives.
    18 Heartbeat(message::Heartbeat) Both limits::SMALL_LEN_MAX;
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The protocol's own spelling: STATE_END for StateEnd.
        for (index, letter) in self.name().char_indices() {
            if index > 0 && letter.is_ascii_uppercase() {
                f.write_str("_")?;
            }
            write!(f, "{}", letter.to_ascii_uppercase())?;
        }
        Ok(())
    }
}

/// A frame ready for the stream: write `head`, then `data`. Neither is ever copied again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Header and checked part; for a long body the header alone.
    pub head: Bytes,
    /// The rest of the checked part, if it was too long to be worth copying behind the header.
    pub body: Bytes,
    /// Page bytes. Empty for every frame but PAGES.
    pub data: Bytes,
}

impl Encoded {
    /// Bytes on the stream.
    pub fn len(&self) -> usize {
        self.head.len() + self.body.len() + self.data.len()
    }

    /// Never: a frame has a header.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The parts in order, some of them empty.
    pub fn into_parts(self) -> [Bytes; 3] {
        [self.head, self.body, self.data]
    }
}

/// Bodies up to this length are copied behind their header, so that a small frame is one write.
const COPIED_LEN_MAX: usize = 16 << 10;

impl Frame {
    /// Encodes the frame.
    ///
    /// # Errors
    /// [`Error::TooLong`] if the body is over its limit: the peer would not take it.
    pub fn encode(&self) -> Result<Encoded> {
        let tag = self.tag();
        let (body, data) = self.body();
        let length = body.len() as u64 + data.len() as u64;
        let body_len = u32::try_from(length)
            .ok()
            .filter(|&length| length <= tag.body_len_max())
            .ok_or(Error::TooLong { tag, length, limit: tag.body_len_max() })?;
        let copied = body.len() <= COPIED_LEN_MAX;
        let mut head = BytesMut::with_capacity(FRAME_HEADER_LEN + if copied { body.len() } else { 0 });
        head.put_u8(tag as u8);
        head.put_bytes(0, 3);
        head.put_u32_le(body_len);
        head.put_u32_le(crc32fast::hash(&body));
        if copied {
            head.extend_from_slice(&body);
            return Ok(Encoded { head: head.freeze(), body: Bytes::new(), data });
        }
        Ok(Encoded { head: head.freeze(), body, data })
    }
}

/// Header of a frame whose body is still arriving.
#[derive(Debug, Clone, Copy)]
struct Header {
    tag: Tag,
    body_len: usize,
    checksum: u32,
}

/// Turns the bytes of one stream into frames, as they come. After an error the stream is of no use.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
    header: Option<Header>,
}

impl Decoder {
    /// A decoder at a frame's beginning.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes of the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        // Room for the rest of the body at once, so that pages are copied here once and never again; but not for more than a
        // peer could make us allocate by a claim alone.
        if self.buffer.capacity() - self.buffer.len() < bytes.len() {
            self.buffer.reserve(self.missing().min(limits::RESERVE_AHEAD_MAX).max(bytes.len()));
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, `None` until it has arrived.
    pub fn pull(&mut self) -> Result<Option<Frame>> {
        let header = match self.header {
            Some(header) => header,
            None => {
                let Some(header) = self.take_header()? else { return Ok(None) };
                *self.header.insert(header)
            }
        };
        if self.buffer.len() < header.body_len {
            return Ok(None);
        }
        self.header = None;
        let body = self.buffer.split_to(header.body_len).freeze();
        if crc32fast::hash(&body[..header.tag.checked_len(&body)]) != header.checksum {
            return Err(Error::Checksum { tag: header.tag });
        }
        Frame::decode(header.tag, body).map(Some)
    }

    /// Bytes still needed for the next frame, as far as is known; never 0 after [`Decoder::pull`] said `None`.
    pub fn missing(&self) -> usize {
        let whole = self.header.map_or(FRAME_HEADER_LEN, |header| header.body_len);
        whole.saturating_sub(self.buffer.len())
    }

    /// The stream has ended: an error unless it did so between frames.
    pub fn finish(&self) -> Result<()> {
        if self.header.is_none() && self.buffer.is_empty() { Ok(()) } else { Err(Error::Truncated { missing: self.missing() }) }
    }

    fn take_header(&mut self) -> Result<Option<Header>> {
        if self.buffer.len() < FRAME_HEADER_LEN {
            return Ok(None);
        }
        let mut bytes = self.buffer.split_to(FRAME_HEADER_LEN);
        let tag = Tag::from_number(bytes.get_u8())?;
        if bytes.get_uint_le(3) != 0 {
            return Err(Error::Reserved { tag });
        }
        let body_len = bytes.get_u32_le();
        if body_len > tag.body_len_max() {
            return Err(Error::TooLong { tag, length: body_len.into(), limit: tag.body_len_max() });
        }
        Ok(Some(Header { tag, body_len: body_len as usize, checksum: bytes.get_u32_le() }))
    }
}
