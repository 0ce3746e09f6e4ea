//! The bodies of the small frames, generated from `wire/proto/message.proto`, and the rules each must meet before anything
//! believes it. Every message from a peer has passed `Checked::check` when it leaves the decoder.

use bytes::Bytes;
use pageferry_image::encoding::{self, Field, Shape};
use pageferry_image::model::sockets::{self, Socket};
use pageferry_image::model::task::{Host, Tree};
use pageferry_image::page::{PAGE_SIZE, PageRange};
use prost::Message as _;

use crate::frame::Tag;
use crate::limits;
use crate::{Error, Result};

pub use generated::*;

#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    reason = "generated; the fields are documented in wire/proto/message.proto"
)]
mod generated {
    include!("generated/pageferry.wire.rs");
}

/// A message with rules beyond its encoding. Asserted when building, an error when receiving.
pub(crate) trait Checked {
    /// Its fields that take more memory than bytes in the encoding: lists and messages, but those of texts.
    const GROWING: &'static [Field] = &[];

    /// The first broken rule, if any.
    fn check(&self) -> Result<()>;
}

/// Messages whose encoding says it all.
macro_rules! unruled {
    ($($message:ty),* $(,)?) => { $(impl Checked for $message { fn check(&self) -> Result<()> { Ok(()) } })* };
}
unruled!(
    StateEnd, Ready, Commit, Running, MapEnd, Resident, Done, Heartbeat, Progress
);

fn at_most(tag: Tag, object: &str, count: usize, limit: usize) -> Result<()> {
    if count > limit {
        Err(Error::rule(
            tag,
            object,
            format!("has {count} entries, over its limit of {limit}"),
        ))
    } else {
        Ok(())
    }
}

impl Hello {
    /// The hello of this program.
    pub fn new(migration_id: [u8; limits::MIGRATION_ID_LEN], role: Role, host_name: &str) -> Self {
        Self {
            version_min: crate::VERSION_MIN,
            version_max: crate::VERSION_MAX,
            migration_id: migration_id.to_vec(),
            role: role.into(),
            host_name: cut(host_name, limits::HOST_NAME_LEN_MAX),
        }
    }

    /// The migration's id. A hello that came through the decoder has one.
    pub fn id(&self) -> [u8; limits::MIGRATION_ID_LEN] {
        self.migration_id.as_slice().try_into().unwrap_or_default()
    }

    /// The version to speak with this peer.
    pub fn version(&self) -> Result<u32> {
        crate::select_version(self.version_min, self.version_max).ok_or(Error::Version {
            peer_min: self.version_min,
            peer_max: self.version_max,
        })
    }
}

impl Checked for Hello {
    fn check(&self) -> Result<()> {
        if self.migration_id.len() != limits::MIGRATION_ID_LEN {
            return Err(Error::rule(
                Tag::Hello,
                "migration id",
                format!("has {} bytes, not 16", self.migration_id.len()),
            ));
        }
        if self.role() == Role::Invalid {
            return Err(Error::rule(
                Tag::Hello,
                "role",
                format!("{} is unknown", self.role),
            ));
        }
        at_most(
            Tag::Hello,
            "host name",
            self.host_name.len(),
            limits::HOST_NAME_LEN_MAX,
        )
    }
}

impl Checked for Welcome {
    fn check(&self) -> Result<()> {
        if !(crate::VERSION_MIN..=crate::VERSION_MAX).contains(&self.version) {
            return Err(Error::Version {
                peer_min: self.version,
                peer_max: self.version,
            });
        }
        at_most(
            Tag::Welcome,
            "host name",
            self.host_name.len(),
            limits::HOST_NAME_LEN_MAX,
        )
    }
}

impl BoundSocket {
    /// The names that must be free for `socket`, which is open as `fd`.
    pub fn of(fd: u32, socket: &Socket) -> impl Iterator<Item = Self> {
        let number = |value: i32| u32::try_from(value).unwrap_or(0);
        socket.names().map(move |name| Self {
            fd,
            family: number(socket.family),
            kind: number(socket.r#type),
            protocol: number(socket.protocol),
            address: name.to_vec(),
            listening: socket.state() == sockets::State::Listening,
            inode: socket.file.map_or(0, |file| file.inode),
        })
    }
}

impl Checked for Plan {
    const GROWING: &'static [Field] = &[
        Field::new(2, Shape::Numbers(4)),
        Field::new(3, encoding::IDENTITY),
        Field::new(5, encoding::HOST),
        Field::new(17, encoding::of::<BoundSocket>(&[])),
        Field::new(23, encoding::SHARED),
    ];

    fn check(&self) -> Result<()> {
        let rule = |object: &str, text: String| Err(Error::rule(Tag::Plan, object, text));
        at_most(Tag::Plan, "thread list", self.tids.len(), limits::TIDS_MAX)?;
        at_most(Tag::Plan, "file list", self.files.len(), limits::FILES_MAX)?;
        at_most(
            Tag::Plan,
            "socket list",
            self.sockets.len(),
            limits::SOCKETS_MAX,
        )?;
        at_most(
            Tag::Plan,
            "list of carried files",
            self.carried.len(),
            limits::SHARED_MAX,
        )?;
        for file in &self.carried {
            if let Err(invalid) = file.validate() {
                return rule(&invalid.object, invalid.rule);
            }
        }
        if self.pid <= 1 {
            return rule("pid", format!("{} cannot be carried", self.pid));
        }
        if self.tids.first() != Some(&self.pid) {
            return rule("thread list", "does not begin with the leader".to_owned());
        }
        if let Some(tid) = self.tids.iter().find(|&&tid| tid <= 1) {
            return rule("thread list", format!("has the impossible id {tid}"));
        }
        match self.host.as_ref().map(Host::validate) {
            Some(Ok(())) => {}
            Some(Err(invalid)) => return rule(&invalid.object, invalid.rule),
            None => return rule("host", "is not told".to_owned()),
        }
        if self.file_check() == FileCheck::Invalid {
            return rule("file check", format!("{} is unknown", self.file_check));
        }
        Ok(())
    }
}

impl Open {
    /// For the image of this name.
    pub fn new(name: &str) -> Self {
        Self { name: name.into() }
    }
}

impl Checked for Open {
    fn check(&self) -> Result<()> {
        at_most(
            Tag::Open,
            "name",
            self.name.len(),
            limits::IMAGE_NAME_LEN_MAX,
        )
    }
}

impl Checked for Verdict {
    const GROWING: &'static [Field] = &[Field::new(1, encoding::of::<Refusal>(&[]))];

    fn check(&self) -> Result<()> {
        at_most(
            Tag::Verdict,
            "refusal list",
            self.refusals.len(),
            limits::REFUSALS_MAX,
        )?;
        at_most(
            Tag::Verdict,
            "note list",
            self.notes.len(),
            limits::REFUSALS_MAX,
        )
    }
}

impl Refused {
    /// Refused for `reason`, which is cut to its limit.
    pub fn new(reason: &str) -> Self {
        Self {
            reason: cut(reason, limits::TEXT_LEN_MAX),
        }
    }
}

impl Checked for Refused {
    fn check(&self) -> Result<()> {
        at_most(
            Tag::Refused,
            "reason",
            self.reason.len(),
            limits::TEXT_LEN_MAX,
        )
    }
}

impl Abort {
    /// An abort from `phase`; the text is cut to its limit.
    pub fn new(phase: crate::Phase, code: AbortCode, text: &str) -> Self {
        Self {
            phase: phase.name().to_owned(),
            code: code.into(),
            text: cut(text, limits::TEXT_LEN_MAX),
        }
    }
}

impl Checked for Abort {
    fn check(&self) -> Result<()> {
        at_most(Tag::Abort, "phase", self.phase.len(), 16)?;
        at_most(Tag::Abort, "text", self.text.len(), limits::TEXT_LEN_MAX)
    }
}

impl Fetch {
    /// The range asked for.
    pub fn range(&self) -> PageRange {
        // The end cannot overflow: `check` bounds both parts.
        PageRange {
            start: self.address,
            end: self.address + u64::from(self.page_count) * PAGE_SIZE,
        }
    }
}

impl Checked for Fetch {
    fn check(&self) -> Result<()> {
        check_object(Tag::Fetch, self.object)?;
        if self.address % PAGE_SIZE != 0 || self.address >= limits::USER_ADDRESS_END {
            return Err(Error::rule(
                Tag::Fetch,
                "address",
                format!("{:#x} is not that of a page", self.address),
            ));
        }
        if self.page_count == 0 || self.page_count > limits::FETCH_PAGES_MAX {
            return Err(Error::rule(
                Tag::Fetch,
                "page count",
                format!(
                    "{} is not in 1..={}",
                    self.page_count,
                    limits::FETCH_PAGES_MAX
                ),
            ));
        }
        if self.address + u64::from(self.page_count) * PAGE_SIZE > limits::USER_ADDRESS_END {
            return Err(Error::rule(
                Tag::Fetch,
                "range",
                format!("at {:#x} leaves the address space", self.address),
            ));
        }
        Ok(())
    }
}

/// Whether `object` can be one.
pub(crate) fn check_object(tag: Tag, object: u32) -> Result<()> {
    if (1..=limits::OBJECTS_MAX).contains(&object) {
        Ok(())
    } else {
        let rule = format!("{object} is not in 1..={}", limits::OBJECTS_MAX);
        Err(Error::rule(tag, "object", rule))
    }
}

impl Map {
    /// `ranges` of `object` as MAP frames, each within its limits.
    ///
    /// # Panics
    /// If the ranges are not ascending, not empty of nothing, or overlap: the sender's own mistake.
    pub fn frames(object: u32, ranges: &[PageRange]) -> impl Iterator<Item = Self> + '_ {
        let mut from = 0;
        ranges
            .chunks(limits::MAP_RANGES_PER_FRAME_MAX)
            .map(move |chunk| {
                let mut map = Self {
                    from,
                    runs: Vec::with_capacity(chunk.len() * 2),
                    object,
                };
                for range in chunk {
                    assert!(
                        !range.is_empty() && range.start / PAGE_SIZE >= from,
                        "map ranges ascend and are not empty"
                    );
                    map.runs.push(range.start / PAGE_SIZE - from);
                    map.runs.push(range.page_count());
                    from = range.end / PAGE_SIZE;
                }
                map
            })
    }

    /// The ranges, ascending.
    pub fn ranges(&self) -> Result<Vec<PageRange>> {
        let end_of_space = limits::USER_ADDRESS_END / PAGE_SIZE;
        let bad = |text: &str| Error::rule(Tag::Map, "range", text);
        check_object(Tag::Map, self.object)?;
        if self.runs.len() % 2 != 0 {
            return Err(bad("has a gap without a length"));
        }
        at_most(
            Tag::Map,
            "range list",
            self.runs.len() / 2,
            limits::MAP_RANGES_PER_FRAME_MAX,
        )?;
        let mut at = self.from;
        let mut ranges = Vec::with_capacity(self.runs.len() / 2);
        for pair in self.runs.chunks_exact(2) {
            let (gap, length) = (pair[0], pair[1]);
            if length == 0 {
                return Err(bad("is empty"));
            }
            let start = at.checked_add(gap).filter(|&start| start < end_of_space);
            let end = start
                .and_then(|start| start.checked_add(length))
                .filter(|&end| end <= end_of_space);
            let (Some(start), Some(end)) = (start, end) else {
                return Err(bad("leaves the address space"));
            };
            ranges.push(PageRange {
                start: start * PAGE_SIZE,
                end: end * PAGE_SIZE,
            });
            at = end;
        }
        Ok(ranges)
    }
}

impl Checked for Map {
    const GROWING: &'static [Field] = &[Field::new(2, Shape::Numbers(8))];

    fn check(&self) -> Result<()> {
        self.ranges().map(drop)
    }
}

/// The captured tree, still encoded: its bytes are the frame's whole body, so that a large tree is never copied into a message.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// The encoded [`Tree`].
    pub tree: Bytes,
}

impl State {
    /// Encodes `tree`.
    pub fn new(tree: &Tree) -> Self {
        Self {
            tree: tree.encode_to_vec().into(),
        }
    }

    /// Decodes the tree. Every rule of the model holds for it.
    pub fn decode(&self) -> Result<Tree> {
        Tree::from_bytes(&self.tree).map_err(|source| Error::Tree { source })
    }
}

/// `text` cut to `limit` bytes at a character.
fn cut(text: &str, limit: usize) -> String {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_a_tree_that_can_be() {
        let refused = |tree: &[u8]| {
            let state = State {
                tree: Bytes::copy_from_slice(tree),
            };
            let error = state.decode().expect_err("no such tree");
            assert!(error.is_bad_data());
            crate::Error::to_string(&error)
        };
        assert_eq!(
            refused(&Tree::default().encode_to_vec()),
            "what a STATE frame carries is no tree that can be"
        );
        refused(&[0x0a, 9]);
    }
}
