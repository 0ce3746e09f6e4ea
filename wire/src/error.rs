//! The crate's one error type: what is wrong with bytes or messages, from whichever side they come.

use pageferry_image::model::Invalid;

use crate::frame::Tag;
use crate::phase::Phase;

/// Bytes that are no frame, a message that breaks its rules, or one that must not come now.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tag that no version knows. The stream cannot be read further.
    #[error(
        "frame tag {tag} is unknown: both hosts must run versions of pageferry that know each other"
    )]
    UnknownTag {
        /// The byte found.
        tag: u8,
    },
    /// Header bytes that must be zero are not.
    #[error("the header of a {tag} frame has reserved bytes set")]
    Reserved {
        /// The frame.
        tag: Tag,
    },
    /// A body longer than its frame allows; nothing was allocated for it.
    #[error("a {tag} frame of {length} bytes is over the limit of {limit}")]
    TooLong {
        /// The frame.
        tag: Tag,
        /// The length claimed, or to be sent, bytes.
        length: u64,
        /// The limit, bytes.
        limit: u32,
    },
    /// The body is not what was sent.
    #[error("a {tag} frame has the wrong checksum")]
    Checksum {
        /// The frame.
        tag: Tag,
    },
    /// The body passed its checksum, and is garbled or would take too much memory; nothing was allocated for it.
    #[error("the body of a {tag} frame is not one that is decoded")]
    Body {
        /// The frame.
        tag: Tag,
        /// Why.
        source: pageferry_image::encoding::Error,
    },
    /// The body passed its checksum and still is no such message.
    #[error("a {tag} frame cannot be decoded")]
    Decode {
        /// The frame.
        tag: Tag,
        /// What the decoder says.
        source: prost::DecodeError,
    },
    /// A captured tree that cannot be built.
    #[error("what a {} frame carries is no tree that can be", Tag::State)]
    Tree {
        /// Why.
        source: pageferry_image::encoding::Error,
    },
    /// A message that breaks one of its rules.
    #[error("a {tag} frame breaks a rule")]
    Rule {
        /// The frame.
        tag: Tag,
        /// The object and the rule.
        source: Invalid,
    },
    /// A page's bytes are not those that were read on the source.
    #[error("the page at {address:#x} has the wrong checksum")]
    Page {
        /// Its address.
        address: u64,
    },
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame, {missing} bytes short")]
    Truncated {
        /// Bytes still missing, as far as is known.
        missing: usize,
    },
    /// A frame that must not come now, or not from this side.
    #[error("a {tag} frame must not come in phase {phase}")]
    Order {
        /// The frame.
        tag: Tag,
        /// Where the session stands.
        phase: Phase,
    },
    /// No version in common.
    #[error(
        "the peer speaks versions {peer_min} to {peer_max} of the protocol, this host {} to {}: update the older one",
        crate::VERSION_MIN,
        crate::VERSION_MAX
    )]
    Version {
        /// The peer's oldest.
        peer_min: u32,
        /// The peer's newest.
        peer_max: u32,
    },
}

impl Error {
    /// Whether an honest peer over a good link cannot be the cause. A stream that ends early and a version too far off can be.
    pub fn is_bad_data(&self) -> bool {
        !matches!(self, Self::Truncated { .. } | Self::Version { .. })
    }

    /// `object` of a `tag` frame breaks `rule`.
    pub(crate) fn rule(tag: Tag, object: impl Into<String>, rule: impl Into<String>) -> Self {
        Self::Rule {
            tag,
            source: Invalid::new(object, rule),
        }
    }
}
