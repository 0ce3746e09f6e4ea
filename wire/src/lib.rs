//! The protocol: what travels between the two hosts, how it is framed and bounded, and both sides' pure state machines.
//!
//! Nothing here does I/O, reads a clock or touches a process: bytes and events come in, bytes and actions go out. The
//! normative description is `docs/wire.md`.
#![forbid(unsafe_code)]

pub mod frame;
pub mod limits;
pub mod message;
pub mod pages;
pub mod phase;
pub mod session;

mod error;

pub use error::Error;
pub use frame::{Decoder, Direction, Encoded, Frame, Tag};
pub use pages::{PageBatch, PageBatchBuilder, PageKind, Room, Run};
pub use phase::Phase;

/// The result of decoding or encoding.
pub type Result<T> = std::result::Result<T, Error>;

/// The application protocol both ends name in the TLS handshake. It changes only when the framing itself does; everything
/// else is negotiated by the versions in [`message::Hello`].
pub const ALPN: &[u8] = b"pageferry/1";

/// The oldest protocol version this program speaks.
pub const VERSION_MIN: u32 = 1;
/// The newest protocol version this program speaks, and prefers.
pub const VERSION_MAX: u32 = 1;

/// The version two sides will speak: the newest both know, `None` if there is none.
pub fn select_version(peer_min: u32, peer_max: u32) -> Option<u32> {
    let newest = VERSION_MAX.min(peer_max);
    (newest >= VERSION_MIN.max(peer_min)).then_some(newest)
}
