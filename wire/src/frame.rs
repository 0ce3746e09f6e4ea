//! Frames: a 12-byte header and a body. Hides every byte of the framing; must never allocate for a length it has not
//! compared with a limit, nor decode a body whose checksum it has not seen to be right.
//!
//! ```text
//! 0      1           4            8            12
//! | tag  | 0  0  0   | body_len   | crc32      | body …
//! ```
//! Integers are little-endian. The checksum covers the eight bytes before it and the body, except that of PAGES: there it covers
//! the batch's head (all before the page bytes), and each page has a checksum of its own in that head.

use std::fmt;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use pageferry_image::encoding;

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
        encoding::check_memory(&body, M::GROWING, limits::BODY_MEMORY)
            .map_err(|source| Error::Body { tag, source })?;
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
    /// How far the drain is.
    19 Progress(message::Progress) ToSource limits::SMALL_LEN_MAX;
    /// Names the image that a connection to a page server is about.
    20 Open(message::Open) ToSource limits::SMALL_LEN_MAX;
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
            .ok_or(Error::TooLong {
                tag,
                length,
                limit: tag.body_len_max(),
            })?;
        let copied = body.len() <= COPIED_LEN_MAX;
        let mut head =
            BytesMut::with_capacity(FRAME_HEADER_LEN + if copied { body.len() } else { 0 });
        head.put_u8(tag as u8);
        head.put_bytes(0, 3);
        head.put_u32_le(body_len);
        head.put_u32_le(checksum(tag, body_len, &body));
        if copied {
            head.extend_from_slice(&body);
            return Ok(Encoded {
                head: head.freeze(),
                body: Bytes::new(),
                data,
            });
        }
        Ok(Encoded {
            head: head.freeze(),
            body,
            data,
        })
    }
}

/// The checksum of a frame whose body has `covered` as its covered part.
fn checksum(tag: Tag, body_len: u32, covered: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&[tag as u8, 0, 0, 0]);
    hasher.update(&body_len.to_le_bytes());
    hasher.update(covered);
    hasher.finalize()
}

/// Header of a frame whose body is still arriving.
#[derive(Debug, Clone, Copy)]
struct Header {
    tag: Tag,
    body_len: u32,
    checksum: u32,
}

impl Header {
    fn body_len(self) -> usize {
        self.body_len as usize
    }
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
            self.buffer.reserve(
                self.missing()
                    .min(limits::RESERVE_AHEAD_MAX)
                    .max(bytes.len()),
            );
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, `None` until it has arrived.
    pub fn pull(&mut self) -> Result<Option<Frame>> {
        let header = match self.header {
            Some(header) => header,
            None => {
                let Some(header) = self.take_header()? else {
                    return Ok(None);
                };
                *self.header.insert(header)
            }
        };
        if self.buffer.len() < header.body_len() {
            return Ok(None);
        }
        self.header = None;
        let body = self.buffer.split_to(header.body_len()).freeze();
        if checksum(
            header.tag,
            header.body_len,
            &body[..header.tag.checked_len(&body)],
        ) != header.checksum
        {
            return Err(Error::Checksum { tag: header.tag });
        }
        Frame::decode(header.tag, body).map(Some)
    }

    /// Bytes still needed for the next frame, as far as is known; never 0 after [`Decoder::pull`] said `None`.
    pub fn missing(&self) -> usize {
        let whole = self.header.map_or(FRAME_HEADER_LEN, Header::body_len);
        whole.saturating_sub(self.buffer.len())
    }

    /// The stream has ended: an error unless it did so between frames.
    pub fn finish(&self) -> Result<()> {
        if self.header.is_none() && self.buffer.is_empty() {
            Ok(())
        } else {
            Err(Error::Truncated {
                missing: self.missing(),
            })
        }
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
            return Err(Error::TooLong {
                tag,
                length: body_len.into(),
                limit: tag.body_len_max(),
            });
        }
        Ok(Some(Header {
            tag,
            body_len,
            checksum: bytes.get_u32_le(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use pageferry_image::model::task::Host;

    use super::*;
    use crate::message::{AbortCode, Fetch, Heartbeat, Hello, Map, Plan, Role, State};
    use crate::pages::{PageBatchBuilder, PageKind};
    use crate::{Phase, limits};
    use pageferry_image::page::PageRange;
    use proptest::prelude::*;

    fn bytes(frame: &Frame) -> Vec<u8> {
        frame
            .encode()
            .expect("within its limits")
            .into_parts()
            .concat()
    }

    fn batch() -> PageBatch {
        let mut builder = PageBatchBuilder::new(1, 9, 0x7f00_0000_0000, 2);
        builder.without_data(PageKind::Zero, 3);
        builder.data(2).fill(0x5a);
        builder.finish()
    }

    fn host_of_pages(page_size: u32) -> Host {
        Host {
            page_size,
            ..Host::default()
        }
    }

    /// One frame of each kind, by an exhaustive match: a new kind does not compile until it is here.
    fn examples() -> Vec<Frame> {
        let plan = Plan {
            pid: 4711,
            tids: vec![4711, 4712],
            host: Some(host_of_pages(4096)),
            file_check: 1,
            ..Plan::default()
        };
        Tag::ALL
            .iter()
            .map(|tag| match tag {
                Tag::Hello => Hello::new([1; 16], Role::Bulk, "alpha").into(),
                Tag::Welcome => message::Welcome {
                    version: 1,
                    host_name: "beta".into(),
                }
                .into(),
                Tag::Plan => plan.clone().into(),
                Tag::Verdict => message::Verdict {
                    notes: vec!["kernel differs".into()],
                    ..Default::default()
                }
                .into(),
                Tag::State => State {
                    tree: vec![3; 100_000].into(),
                }
                .into(),
                Tag::Pages => batch().into(),
                Tag::StateEnd => message::StateEnd { page_count: 2 }.into(),
                Tag::Ready => message::Ready {
                    rebuild_ns: 1,
                    pages_resident: 2,
                    waits_for_locks: true,
                }
                .into(),
                Tag::Commit => message::Commit {}.into(),
                Tag::Running => message::Running {
                    commit_ns: 1,
                    pages_resident: 2,
                }
                .into(),
                Tag::Refused => message::Refused::new("no").into(),
                Tag::Map => Map {
                    from: 1,
                    runs: vec![1, 2, 3, 4],
                    object: 2,
                }
                .into(),
                Tag::MapEnd => message::MapEnd { pages_total: 6 }.into(),
                Tag::Fetch => Fetch {
                    request: 1,
                    address: 0x1000,
                    page_count: 1,
                    object: 1,
                }
                .into(),
                Tag::Resident => message::Resident {
                    pages_total: 6,
                    ..Default::default()
                }
                .into(),
                Tag::Done => message::Done {
                    downtime_ns: 1,
                    ..Default::default()
                }
                .into(),
                Tag::Abort => {
                    message::Abort::new(Phase::Plan, AbortCode::Cancelled, "ctrl-c").into()
                }
                Tag::Heartbeat => Heartbeat { sequence: 1 }.into(),
                Tag::Progress => message::Progress {
                    pages_total: 6,
                    ..Default::default()
                }
                .into(),
                Tag::Open => message::Open::new("redis").into(),
            })
            .collect()
    }

    #[test]
    fn every_frame_goes_there_and_back_however_the_stream_is_cut() {
        let frames = examples();
        let stream: Vec<u8> = frames.iter().flat_map(bytes).collect();
        for piece in [1, 7, 11, 12, 13, 4096, stream.len()] {
            let mut decoder = Decoder::new();
            let mut seen = Vec::new();
            for chunk in stream.chunks(piece) {
                decoder.push(chunk);
                while let Some(frame) = decoder.pull().expect("good bytes") {
                    seen.push(frame);
                }
                assert!(decoder.missing() > 0);
            }
            decoder.finish().expect("whole frames");
            assert_eq!(seen, frames, "in pieces of {piece}");
        }
    }

    #[test]
    fn numbers_names_and_tags_agree() {
        for (index, &tag) in Tag::ALL.iter().enumerate() {
            assert_eq!(tag as usize, index + 1);
            assert_eq!(Tag::from_number(tag as u8).expect("it is one"), tag);
        }
        assert_eq!(Tag::StateEnd.to_string(), "STATE_END");
        for number in [0, Tag::ALL.len() as u8 + 1, 255] {
            assert!(
                matches!(Tag::from_number(number), Err(Error::UnknownTag { tag }) if tag == number)
            );
        }
    }

    #[test]
    fn a_length_over_its_limit_is_refused_before_anything_is_allocated() {
        for &tag in Tag::ALL {
            let mut decoder = Decoder::new();
            let mut header = [0; FRAME_HEADER_LEN];
            header[0] = tag as u8;
            header[4..8].copy_from_slice(&(tag.body_len_max() + 1).to_le_bytes());
            decoder.push(&header);
            assert!(matches!(decoder.pull(), Err(Error::TooLong { .. })));
        }
        // The longest that is allowed is not reserved on its word either.
        let mut decoder = Decoder::new();
        let mut header = [0; FRAME_HEADER_LEN];
        header[0] = Tag::State as u8;
        header[4..8].copy_from_slice(&limits::STATE_LEN_MAX.to_le_bytes());
        decoder.push(&header);
        assert!(decoder.pull().expect("a good header").is_none());
        decoder.push(&[0]);
        assert!(decoder.buffer.capacity() <= 2 * limits::RESERVE_AHEAD_MAX);
        assert!(matches!(decoder.finish(), Err(Error::Truncated { .. })));
    }

    #[test]
    fn what_is_too_long_is_not_sent_either() {
        let frame = Frame::from(Plan {
            comm: "x".repeat(65 << 20),
            ..Plan::default()
        });
        assert!(matches!(
            frame.encode(),
            Err(Error::TooLong { tag: Tag::Plan, .. })
        ));
    }

    #[test]
    fn a_changed_bit_is_found_in_every_frame() {
        for frame in examples() {
            let good = bytes(&frame);
            // In PAGES the page bytes at the end are covered page by page, when they are used.
            let covered = good.len() - frame.encode().expect("within its limits").data.len();
            for at in (0..covered).step_by(1 + covered / 97) {
                let mut bad = good.clone();
                bad[at] ^= 0x10;
                let mut decoder = Decoder::new();
                decoder.push(&bad);
                // Either an error, or more bytes are asked for: never a frame.
                assert!(
                    !matches!(decoder.pull(), Ok(Some(_))),
                    "bit 4 of byte {at} of a {}",
                    frame.tag()
                );
            }
        }
    }

    #[test]
    fn messages_that_break_their_rules_do_not_leave_the_decoder() {
        let broken: Vec<Frame> = vec![
            Hello {
                migration_id: vec![1; 15],
                ..Hello::new([1; 16], Role::Bulk, "a")
            }
            .into(),
            Hello {
                role: 9,
                ..Hello::new([1; 16], Role::Bulk, "a")
            }
            .into(),
            Plan {
                pid: 1,
                tids: vec![1],
                host: Some(host_of_pages(4096)),
                file_check: 1,
                ..Plan::default()
            }
            .into(),
            Plan {
                pid: 7,
                tids: vec![8],
                host: Some(host_of_pages(4096)),
                file_check: 1,
                ..Plan::default()
            }
            .into(),
            Plan {
                pid: 7,
                tids: vec![7],
                host: Some(host_of_pages(65_536)),
                file_check: 1,
                ..Plan::default()
            }
            .into(),
            Plan {
                pid: 7,
                tids: vec![7],
                host: Some(host_of_pages(4096)),
                file_check: 77,
                ..Plan::default()
            }
            .into(),
            Fetch {
                request: 1,
                address: 0x1001,
                page_count: 1,
                object: 1,
            }
            .into(),
            Fetch {
                request: 1,
                address: 0x1000,
                page_count: 0,
                object: 1,
            }
            .into(),
            Fetch {
                request: 1,
                address: 0x1000,
                page_count: limits::FETCH_PAGES_MAX + 1,
                object: 1,
            }
            .into(),
            Fetch {
                request: 1,
                address: !0xfff,
                page_count: 2,
                object: 1,
            }
            .into(),
            Fetch {
                request: 1,
                address: 0x1000,
                page_count: 1,
                object: 0,
            }
            .into(),
            Map {
                from: 0,
                runs: vec![1, 1],
                object: limits::OBJECTS_MAX + 1,
            }
            .into(),
            Map {
                from: 0,
                runs: vec![1],
                object: 1,
            }
            .into(),
            Map {
                from: 0,
                runs: vec![1, 0],
                object: 1,
            }
            .into(),
            Map {
                from: 0,
                runs: vec![u64::MAX, 1],
                object: 1,
            }
            .into(),
            Map {
                from: u64::MAX,
                runs: vec![1, 1],
                object: 1,
            }
            .into(),
            Map {
                from: 0,
                runs: vec![0, u64::MAX],
                object: 1,
            }
            .into(),
        ];
        for frame in broken {
            let mut decoder = Decoder::new();
            decoder.push(&bytes(&frame));
            assert!(
                matches!(decoder.pull(), Err(Error::Rule { .. })),
                "{frame:?}"
            );
        }
    }

    /// Bytes that somebody might put somewhere: tags, lengths and numbers at the ends of their ranges among them.
    fn hostile() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            any::<u8>().prop_map(|byte| vec![byte]),
            any::<[u8; 4]>().prop_map(|bytes| bytes.to_vec()),
            proptest::sample::select(vec![
                0u64,
                1,
                255,
                256,
                1 << 31,
                1 << 32,
                1 << 47,
                u64::MAX - 1,
                u64::MAX
            ])
            .prop_flat_map(|number| {
                let mut varint = Vec::new();
                prost::encoding::encode_varint(number, &mut varint);
                proptest::sample::select(vec![varint, number.to_le_bytes().to_vec()])
            }),
            // A field of each kind, empty and not.
            (1u8..16, 0u8..6, 0u8..4).prop_map(|(field, kind, len)| {
                let mut bytes = vec![field << 3 | kind, len];
                bytes.resize(2 + usize::from(len), 1);
                bytes
            }),
        ]
    }

    #[test]
    fn lists_that_would_outgrow_the_host_are_not_decoded() {
        // A field of these numbers in each, empty: two bytes, and far more once decoded.
        for (tag, keys) in [
            (
                Tag::Plan,
                &[&[0x1a][..], &[0x7a], &[0x8a, 1], &[0xba, 1]][..],
            ),
            (Tag::Verdict, &[&[0x0a], &[0x12]]),
        ] {
            for key in keys {
                let mut entry = key.to_vec();
                entry.push(0);
                let count = tag.body_len_max() as usize / entry.len();
                let body = Bytes::from(entry.repeat(count));
                let refused = Frame::decode(tag, body).expect_err("too many");
                assert!(
                    matches!(
                        refused,
                        Error::Body {
                            source: encoding::Error::TooLarge { .. },
                            ..
                        }
                    ),
                    "{tag} {key:?}: {refused:?}"
                );
                assert!(refused.is_bad_data());
            }
        }
        // Numbers of a list, packed.
        let mut body = vec![0x12];
        prost::encode_length_delimiter(60 << 20, &mut body).expect("a vector grows");
        body.resize(body.len() + (60 << 20), 1);
        let refused = Frame::decode(Tag::Plan, body.into()).expect_err("too many");
        assert!(matches!(refused, Error::Body { .. }), "{refused:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

        #[test]
        fn any_bytes_are_frames_or_errors_but_never_a_panic(stream in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = Decoder::new();
            decoder.push(&stream);
            while let Ok(Some(_)) = decoder.pull() {}
        }

        #[test]
        fn any_body_with_the_right_checksum_is_a_message_or_an_error(
            number in 1..=Tag::ALL.len() as u8, body in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let tag = Tag::from_number(number).expect("all from 1 are tags");
            let body_len = u32::try_from(body.len()).expect("short");
            let mut stream = vec![number, 0, 0, 0];
            stream.extend(body_len.to_le_bytes());
            stream.extend(checksum(tag, body_len, &body[..tag.checked_len(&body)]).to_le_bytes());
            stream.extend(&body);
            let mut decoder = Decoder::new();
            decoder.push(&stream);
            match decoder.pull() {
                Ok(frame) => prop_assert!(frame.is_some()),
                Err(error) => prop_assert!(!matches!(error, Error::Checksum { .. }), "{error:?}"),
            }
        }

        /// Whatever somebody makes of a good message, with its length and checksum made right again: it is a message that can be
        /// sent again as it is, or it is refused, and nothing panics, wherever the stream is cut.
        #[test]
        fn no_changed_message_is_more_than_refused(
            example in any::<proptest::sample::Index>(),
            changes in proptest::collection::vec((0u8..4, any::<proptest::sample::Index>(), hostile()), 1..4),
            piece in 1usize..200,
        ) {
            let examples = examples();
            let frame = example.get(&examples);
            let tag = frame.tag();
            let mut body = bytes(frame).split_off(limits::FRAME_HEADER_LEN);
            body.truncate(2000);
            for (how, place, new) in changes {
                let at = place.index(body.len() + 1);
                let end = (at + new.len()).min(body.len());
                match how {
                    0 => drop(body.splice(at..end, new)),
                    1 => drop(body.splice(at..at, new)),
                    2 => drop(body.drain(at..end)),
                    _ => body.extend_from_within(at..end),
                }
            }
            let body_len = u32::try_from(body.len()).expect("short");
            let mut stream = vec![tag as u8, 0, 0, 0];
            stream.extend(body_len.to_le_bytes());
            stream.extend(checksum(tag, body_len, &body[..tag.checked_len(&body)]).to_le_bytes());
            stream.extend(&body);
            let mut decoder = Decoder::new();
            let mut came = Ok(None);
            for piece in stream.chunks(piece) {
                prop_assert!(matches!(came, Ok(None)), "there is more of it");
                decoder.push(piece);
                came = decoder.pull();
            }
            let came = match came {
                Ok(came) => came.expect("all of it came"),
                Err(error) => {
                    prop_assert!(!matches!(error, Error::Checksum { .. }), "{error:?}");
                    return Ok(());
                }
            };
            prop_assert_eq!(decoder.finish().is_ok(), true);
            // Whoever gets it looks closer.
            match &came {
                Frame::Hello(hello) => drop((hello.version(), hello.id())),
                Frame::Fetch(fetch) => prop_assert!(fetch.range().end <= limits::USER_ADDRESS_END),
                Frame::State(state) => drop(state.decode()),
                Frame::Map(map) => {
                    if let Ok(ranges) = map.ranges() {
                        prop_assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
                    }
                }
                Frame::Pages(batch) => {
                    for run in batch.runs().iter().filter(|run| run.kind == PageKind::Data) {
                        drop(batch.verify_run(run));
                    }
                }
                _ => {}
            }
            let mut decoder = Decoder::new();
            decoder.push(&bytes(&came));
            prop_assert_eq!(decoder.pull().expect("it was one"), Some(came));
        }

        #[test]
        fn maps_go_there_and_back(gaps in proptest::collection::vec((1u64..1000, 1u64..1000), 0..200)) {
            let mut at = 0;
            let ranges: Vec<_> = gaps.iter().map(|&(gap, length)| {
                let start = at + gap * 4096;
                at = start + length * 4096;
                PageRange { start, end: at }
            }).collect();
            let back: Vec<_> = Map::frames(1, &ranges).flat_map(|map| map.ranges().expect("good ranges")).collect();
            prop_assert_eq!(back, ranges);
        }
    }

    #[test]
    fn a_map_of_any_size_fits_its_frames() {
        let first = 1u64 << 34;
        let ranges: Vec<_> = (0..100_000u64)
            .map(|index| first + index * 3)
            .map(|page| PageRange {
                start: page * 4096,
                end: (page + 1) * 4096,
            })
            .collect();
        let frames: Vec<_> = Map::frames(1, &ranges).collect();
        assert_eq!(frames.len(), 4);
        for map in &frames {
            Frame::from(map.clone())
                .encode()
                .expect("within its limits");
        }
        let back: Vec<_> = frames
            .iter()
            .flat_map(|map| map.ranges().expect("good ranges"))
            .collect();
        assert_eq!(back, ranges);
    }
}
