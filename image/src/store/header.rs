//! The header: what an image is, in fixed places, so that it can be told without decoding anything.

use super::{Damage, FORMAT_VERSION, limits};
use crate::page::{PAGE_LEN, PAGE_SIZE};

/// Bytes of the file `header`.
pub(super) const LEN: usize = 512;
/// How it begins, in every format.
const MAGIC: [u8; 16] = *b"pageferry image\n";
/// Where its checksum lies: over all bytes before.
const CHECKSUM_AT: usize = LEN - 4;
/// The only kind of image there is: a whole tree.
const KIND_WHOLE: u32 = 1;
/// The only architecture there is: x86-64.
const MACHINE_X86_64: u32 = 1;
const ID_LEN: usize = 16;
const COMM_LEN: usize = 64;

/// Who made an image, when and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The id of the dump, as in its log lines.
    pub id: [u8; ID_LEN],
    /// When, nanoseconds since 1970.
    pub created_ns: u64,
    /// The host's name; cut to [`limits::HOST_LEN`].
    pub host: String,
    /// The version of pageferry; cut to [`limits::PROGRAM_LEN`].
    pub program: String,
}

/// How many pages of each kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// [`PageKind::Data`](super::PageKind::Data)
    pub data_pages: u64,
    /// [`PageKind::Zero`](super::PageKind::Zero)
    pub zero_pages: u64,
    /// [`PageKind::Hole`](super::PageKind::Hole)
    pub hole_pages: u64,
    /// [`PageKind::Guard`](super::PageKind::Guard)
    pub guard_pages: u64,
}

impl Counts {
    /// Pages of this kind.
    pub fn of(&self, kind: super::PageKind) -> u64 {
        match kind {
            super::PageKind::Data => self.data_pages,
            super::PageKind::Zero => self.zero_pages,
            super::PageKind::Hole => self.hole_pages,
            super::PageKind::Guard => self.guard_pages,
        }
    }

    pub(super) fn add(&mut self, kind: super::PageKind, page_count: u64) {
        let count = match kind {
            super::PageKind::Data => &mut self.data_pages,
            super::PageKind::Zero => &mut self.zero_pages,
            super::PageKind::Hole => &mut self.hole_pages,
            super::PageKind::Guard => &mut self.guard_pages,
        };
        *count += page_count;
    }
}

/// Length and checksum of a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) len: u64,
    /// CRC-32 of all its bytes; 0 for `pages`, whose blocks have their own.
    pub(super) checksum: u32,
}

/// What an image says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Who made it.
    pub origin: Origin,
    /// The root's pid.
    pub pid: i32,
    /// The root's name.
    pub comm: String,
    /// Processes of the tree.
    pub process_count: u32,
    /// Threads of all of them.
    pub thread_count: u32,
    /// Its pages.
    pub counts: Counts,
    pub(super) tree: Extent,
    pub(super) map: Extent,
    pub(super) blocks: Extent,
    pub(super) pages: Extent,
}

/// A field as it lies in the header.
struct Place {
    name: &'static str,
    offset: usize,
}

macro_rules! places {
    ($($constant:ident = $offset:literal $name:literal;)*) => {
        $(const $constant: Place = Place { name: $name, offset: $offset };)*
        #[cfg(test)]
        pub(super) const PLACES: &[(&str, usize)] = &[$(($name, $offset)),*];
    };
}

places! {
    VERSION = 16 "format version";
    HEADER_LEN = 20 "header length";
    KIND = 24 "kind";
    MACHINE = 28 "machine";
    PAGE = 32 "page length";
    BLOCK = 36 "pages of a block";
    ID = 40 "id";
    CREATED = 56 "time";
    PID = 64 "pid";
    PROCESSES = 68 "process count";
    THREADS = 72 "thread count";
    COMM = 80 "name";
    HOST = 144 "host";
    PROGRAM = 208 "program";
    TREE = 240 "length of tree";
    MAP = 256 "length of map";
    BLOCKS = 272 "length of blocks";
    PAGES = 288 "length of pages";
    DATA = 304 "data pages";
    ZERO = 312 "zero pages";
    HOLE = 320 "hole pages";
    GUARD = 328 "guard pages";
    RESERVED = 336 "reserved bytes";
}

impl Place {
    fn bad(&self, rule: impl Into<String>) -> Damage {
        Damage::HeaderField {
            field: self.name,
            offset: self.offset,
            rule: rule.into(),
        }
    }

    fn array<const N: usize>(&self, bytes: &[u8; LEN]) -> [u8; N] {
        let mut array = [0; N];
        array.copy_from_slice(&bytes[self.offset..self.offset + N]);
        array
    }

    fn u32(&self, bytes: &[u8; LEN]) -> u32 {
        u32::from_le_bytes(self.array(bytes))
    }

    fn u64(&self, bytes: &[u8; LEN]) -> u64 {
        u64::from_le_bytes(self.array(bytes))
    }

    fn exactly(&self, bytes: &[u8; LEN], wanted: u32) -> Result<(), Damage> {
        let found = self.u32(bytes);
        if found == wanted {
            Ok(())
        } else {
            Err(self.bad(format!("is {found}, not {wanted}")))
        }
    }

    /// A text that is filled up with zero bytes.
    fn text<const N: usize>(&self, bytes: &[u8; LEN]) -> Result<String, Damage> {
        let array: [u8; N] = self.array(bytes);
        let len = array.iter().position(|&byte| byte == 0).unwrap_or(N);
        let is_filled_up = array[len..].iter().all(|&byte| byte == 0);
        match std::str::from_utf8(&array[..len]) {
            Ok(text) if is_filled_up => Ok(text.to_owned()),
            _ => Err(self.bad("is no text")),
        }
    }

    fn extent(&self, bytes: &[u8; LEN]) -> Result<Extent, Damage> {
        let checksum = u32::from_le_bytes(
            Place {
                name: self.name,
                offset: self.offset + 8,
            }
            .array(bytes),
        );
        let rest = Place {
            name: self.name,
            offset: self.offset + 12,
        }
        .u32(bytes);
        if rest != 0 {
            return Err(self.bad("has reserved bytes set"));
        }
        Ok(Extent {
            len: self.u64(bytes),
            checksum,
        })
    }

    fn put(&self, bytes: &mut [u8; LEN], value: &[u8]) {
        bytes[self.offset..self.offset + value.len()].copy_from_slice(value);
    }

    fn put_extent(&self, bytes: &mut [u8; LEN], extent: Extent) {
        self.put(bytes, &extent.len.to_le_bytes());
        bytes[self.offset + 8..self.offset + 12].copy_from_slice(&extent.checksum.to_le_bytes());
    }
}

/// `text` cut to `limit` bytes at a character, and at a zero byte.
fn cut(text: &str, limit: usize) -> &[u8] {
    let mut end = text.find('\0').unwrap_or(text.len()).min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text.as_bytes()[..end]
}

impl Header {
    pub(super) fn encode(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[..MAGIC.len()].copy_from_slice(&MAGIC);
        VERSION.put(&mut bytes, &FORMAT_VERSION.to_le_bytes());
        for (place, value) in [
            (HEADER_LEN, LEN as u32),
            (KIND, KIND_WHOLE),
            (MACHINE, MACHINE_X86_64),
            (PAGE, PAGE_LEN as u32),
            (BLOCK, super::BLOCK_PAGES as u32),
            (PROCESSES, self.process_count),
            (THREADS, self.thread_count),
        ] {
            place.put(&mut bytes, &value.to_le_bytes());
        }
        ID.put(&mut bytes, &self.origin.id);
        CREATED.put(&mut bytes, &self.origin.created_ns.to_le_bytes());
        PID.put(&mut bytes, &self.pid.to_le_bytes());
        COMM.put(&mut bytes, cut(&self.comm, COMM_LEN));
        HOST.put(&mut bytes, cut(&self.origin.host, limits::HOST_LEN));
        PROGRAM.put(&mut bytes, cut(&self.origin.program, limits::PROGRAM_LEN));
        TREE.put_extent(&mut bytes, self.tree);
        MAP.put_extent(&mut bytes, self.map);
        BLOCKS.put_extent(&mut bytes, self.blocks);
        PAGES.put_extent(&mut bytes, self.pages);
        for (place, value) in [
            (DATA, self.counts.data_pages),
            (ZERO, self.counts.zero_pages),
            (HOLE, self.counts.hole_pages),
            (GUARD, self.counts.guard_pages),
        ] {
            place.put(&mut bytes, &value.to_le_bytes());
        }
        let checksum = crc32fast::hash(&bytes[..CHECKSUM_AT]);
        bytes[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads what the file `header` holds; `bytes` may be cut off after one byte more than a header has.
    ///
    /// # Errors
    /// The damage. Lengths have been compared with their limits and with each other, not with the files.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Damage> {
        // What begins like a header but is cut off was one.
        let begin = bytes.len().min(MAGIC.len());
        if bytes[..begin] != MAGIC[..begin] {
            return Err(Damage::Magic);
        }
        // These two stay where they are in every format.
        if let Some(version) = bytes.get(VERSION.offset..VERSION.offset + 4) {
            let version = u32::from_le_bytes([version[0], version[1], version[2], version[3]]);
            if version != FORMAT_VERSION {
                return Err(Damage::Version { version });
            }
        }
        let bytes: &[u8; LEN] = bytes.try_into().map_err(|_| Damage::HeaderLength {
            len: bytes.len() as u64,
        })?;
        let mut checksum = [0; 4];
        checksum.copy_from_slice(&bytes[CHECKSUM_AT..]);
        if crc32fast::hash(&bytes[..CHECKSUM_AT]) != u32::from_le_bytes(checksum) {
            return Err(Damage::HeaderChecksum);
        }
        HEADER_LEN.exactly(bytes, LEN as u32)?;
        KIND.exactly(bytes, KIND_WHOLE)?;
        MACHINE.exactly(bytes, MACHINE_X86_64)?;
        PAGE.exactly(bytes, PAGE_LEN as u32)?;
        BLOCK.exactly(bytes, super::BLOCK_PAGES as u32)?;
        if bytes[RESERVED.offset..CHECKSUM_AT]
            .iter()
            .chain(&bytes[76..80])
            .any(|&byte| byte != 0)
        {
            return Err(RESERVED.bad("are set"));
        }
        let header = Self {
            origin: Origin {
                id: ID.array(bytes),
                created_ns: CREATED.u64(bytes),
                host: HOST.text::<{ limits::HOST_LEN }>(bytes)?,
                program: PROGRAM.text::<{ limits::PROGRAM_LEN }>(bytes)?,
            },
            pid: i32::from_le_bytes(PID.array(bytes)),
            comm: COMM.text::<COMM_LEN>(bytes)?,
            process_count: PROCESSES.u32(bytes),
            thread_count: THREADS.u32(bytes),
            counts: Counts {
                data_pages: DATA.u64(bytes),
                zero_pages: ZERO.u64(bytes),
                hole_pages: HOLE.u64(bytes),
                guard_pages: GUARD.u64(bytes),
            },
            tree: TREE.extent(bytes)?,
            map: MAP.extent(bytes)?,
            blocks: BLOCKS.extent(bytes)?,
            pages: PAGES.extent(bytes)?,
        };
        header.check_lengths()?;
        Ok(header)
    }

    fn check_lengths(&self) -> Result<(), Damage> {
        let over = |place: Place, value: u64, limit: u64| {
            if value <= limit {
                Ok(())
            } else {
                Err(place.bad(format!("is {value}, more than the limit of {limit}")))
            }
        };
        over(DATA, self.counts.data_pages, limits::DATA_PAGES)?;
        over(TREE, self.tree.len, crate::model::limits::TREE_LEN as u64)?;
        over(
            MAP,
            self.map.len,
            super::leaves::file_len::<{ super::pagemap::RANGE_LEN }>(limits::RANGES),
        )?;
        over(PAGES, self.pages.len, self.counts.data_pages * PAGE_SIZE)?;
        if !super::leaves::is_file_len::<{ super::pagemap::RANGE_LEN }>(self.map.len) {
            return Err(MAP.bad("is no number of whole records"));
        }
        let block_count = self.counts.data_pages.div_ceil(super::BLOCK_PAGES);
        let wanted = super::leaves::file_len::<{ super::pagemap::BLOCK_LEN }>(block_count);
        if self.blocks.len != wanted {
            return Err(BLOCKS.bad(format!(
                "is {}, not {wanted} as for {} data pages",
                self.blocks.len, self.counts.data_pages
            )));
        }
        if self.pages.checksum != 0 {
            return Err(PAGES.bad("has a checksum"));
        }
        Ok(())
    }

    /// Bytes of its files.
    pub fn stored_len(&self) -> u64 {
        LEN as u64 + self.tree.len + self.map.len + self.blocks.len + self.pages.len
    }

    /// Bytes of its page store.
    pub fn stored_pages_len(&self) -> u64 {
        self.pages.len
    }

    /// That the header tells what `tree` is.
    pub(super) fn check_tree(&self, tree: &crate::model::task::Tree) -> Result<(), Damage> {
        let told = Self::of_tree(tree);
        if self.pid != told.0 {
            return Err(PID.bad(format!("is {}, but that of the tree {}", self.pid, told.0)));
        }
        if cut(&told.1, COMM_LEN) != self.comm.as_bytes() {
            return Err(COMM.bad("is not that of the tree"));
        }
        for (field, own, told) in [
            (PROCESSES, self.process_count, told.2),
            (THREADS, self.thread_count, told.3),
        ] {
            if own != told {
                return Err(field.bad(format!("is {own}, but that of the tree {told}")));
            }
        }
        Ok(())
    }

    /// pid and name of the root, number of processes and of threads.
    pub(super) fn of_tree(tree: &crate::model::task::Tree) -> (i32, String, u32, u32) {
        let processes = || tree.processes.iter();
        let leader = processes().next().and_then(|root| root.threads.first());
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        (
            processes().next().map_or(0, |root| root.pid),
            leader.map(|leader| leader.comm.clone()).unwrap_or_default(),
            count(processes().count()),
            count(processes().map(|process| process.threads.len()).sum()),
        )
    }

    pub(super) fn check_counts(&self, found: Counts) -> Result<(), Damage> {
        for (place, said, found) in [
            (DATA, self.counts.data_pages, found.data_pages),
            (ZERO, self.counts.zero_pages, found.zero_pages),
            (HOLE, self.counts.hole_pages, found.hole_pages),
            (GUARD, self.counts.guard_pages, found.guard_pages),
        ] {
            if said != found {
                return Err(place.bad(format!("are {said}, but {found} in the map")));
            }
        }
        Ok(())
    }
}
