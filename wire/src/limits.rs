//! Every limit of the protocol, by name. A length or count from the peer is compared with one of these before anything is
//! allocated for it; the sender asserts the same.

/// Bytes of a frame header.
pub const FRAME_HEADER_LEN: usize = 12;
/// Body of a small frame.
pub const SMALL_LEN_MAX: u32 = 4 << 10;
/// Body of PLAN: a path and a build id for each file, a tid for each thread.
pub const PLAN_LEN_MAX: u32 = 64 << 20;
/// Bytes of memory that a decoded body takes, nearly; of STATE see the model, and PAGES is not decoded. Twice the longest PLAN:
/// empty entries of a list would take fifty times their encoding.
pub const BODY_MEMORY: usize = 128 << 20;
/// Body of VERDICT: one line for each thing that cannot be carried.
pub const VERDICT_LEN_MAX: u32 = 16 << 20;
/// Body of STATE: the encoded tree.
pub const STATE_LEN_MAX: u32 = pageferry_image::model::limits::TREE_LEN as u32;
/// Body of MAP.
pub const MAP_LEN_MAX: u32 = 1 << 20;
/// Body of PAGES: [`BATCH_DATA_PAGES_MAX`] pages, their checksums, [`BATCH_RUNS_MAX`] runs and the batch header.
pub const PAGES_LEN_MAX: u32 =
    (BATCH_HEADER_LEN as u32) + BATCH_RUNS_MAX * 8 + BATCH_DATA_PAGES_MAX * (4 + 4096);

/// Bytes of an image's name, as in NAME_MAX.
pub const IMAGE_NAME_LEN_MAX: usize = 255;

/// Bytes of a page batch before its runs.
pub const BATCH_HEADER_LEN: usize = 32;
/// Pages with data in one batch: 1 MiB.
pub const BATCH_DATA_PAGES_MAX: u32 = 256;
/// Runs in one batch.
pub const BATCH_RUNS_MAX: u32 = 1024;
/// Pages, with data or without, that one batch spans: 256 MiB of addresses.
pub const BATCH_PAGES_MAX: u32 = 65_536;

/// Pages one FETCH may ask for: what one batch can carry as data.
pub const FETCH_PAGES_MAX: u32 = BATCH_DATA_PAGES_MAX;
/// Fetches a page source holds unanswered on one stream before it stops reading the stream.
pub const FETCHES_IN_FLIGHT_MAX: usize = 256;

/// (gap, length) pairs in one MAP frame; both are varints of at most 10 bytes.
pub const MAP_RANGES_PER_FRAME_MAX: usize = 32_768;
/// Ranges in a whole map.
pub const MAP_RANGES_MAX: usize = 1 << 26;

/// Bytes of a migration id.
pub const MIGRATION_ID_LEN: usize = 16;
/// Bytes of a host name (HOST_NAME_MAX is 64).
pub const HOST_NAME_LEN_MAX: usize = 255;
/// Bytes of a reason or other text from the peer that is shown or kept.
pub const TEXT_LEN_MAX: usize = 2048;
/// Threads in a plan.
pub const TIDS_MAX: usize = 65_536;
/// Files in a plan.
pub const FILES_MAX: usize = 65_536;
/// Files in a plan that will be made.
pub const SHARED_MAX: usize = pageferry_image::model::limits::SHARED;
/// Bound sockets in a plan.
pub const SOCKETS_MAX: usize = 65_536;
/// Refusals, and notes, in a verdict.
pub const REFUSALS_MAX: usize = 65_536;

/// One past the largest page-aligned user address.
pub const USER_ADDRESS_END: u64 = pageferry_image::model::limits::ADDRESS_END;
/// The highest object number: that of the last shared object of the largest tree.
pub const OBJECTS_MAX: u32 = pageferry_image::model::limits::OBJECTS as u32;

/// Bytes that the decoder reserves ahead of what has arrived: a peer that only claims a length gets no more.
pub const RESERVE_AHEAD_MAX: usize = 2 << 20;
/// Unread records a side remembers of one migration.
pub const ACTIONS_QUEUED_MAX: usize = 64;
