//! The images under `tests/golden`: made here, committed, and compared with what is made.
//!
//! `PAGEFERRY_GOLDEN=write cargo test -p pageferry-image golden` writes them. Malformed ones may be written anew; what lies in
//! `tests/golden/v1` never changes again, for it must load for ever.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::model::files::{
    Descriptor, Device, Epoll, EpollItem, Eventfd, Fifo, File, Pipe, PipeEnd, Regular, SharedFile,
    file,
};
use crate::model::locks::{self, Lock};
use crate::model::memory::{FileIdentity, Kind, Mapping, Range, Space};
use crate::model::relations::Zombie;
use crate::model::shared::{Anonymous, Carried, Memfd, Segment, Shared, shared};
use crate::model::signals::Action;
use crate::model::sockets::{Attached, Ids, Socket, State};
use crate::model::task::{Credentials, Host, Limit, Process, Scheduling, Thread};
use crate::page::{PAGE_LEN, PAGE_SIZE};

const ROOT: ObjectId = ObjectId::ROOT_SPACE;
/// Where the anonymous memory lies, and how many pages it has.
const HEAP: u64 = 0x5555_5560_0000;
const HEAP_PAGES: u64 = 24;
/// Where the file is mapped.
const DATA: u64 = 0x5555_5555_8000;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden")
}

fn is_writing() -> bool {
    std::env::var_os("PAGEFERRY_GOLDEN").is_some_and(|value| value == "write")
}

fn thread(tid: i32, comm: &str) -> Thread {
    Thread {
        tid,
        comm: comm.into(),
        registers: (0..216).map(|byte| byte as u8).collect(),
        xsave: vec![0; 576],
        sigmask: 1 << 12,
        credentials: Some(Credentials {
            euid: 1000,
            groups: vec![4, 1000],
            ..Credentials::default()
        }),
        scheduling: Some(Scheduling {
            affinity_default: true,
            ..Scheduling::default()
        }),
        ..Thread::default()
    }
}

fn identity(path: &str) -> FileIdentity {
    FileIdentity {
        path: path.into(),
        size: 4096,
        ..FileIdentity::default()
    }
}

fn space() -> Space {
    let mapping = |start, pages, kind: Kind| Mapping {
        start,
        end: start + pages * PAGE_SIZE,
        prot: 3,
        kind: kind.into(),
        ..Mapping::default()
    };
    let heap = HEAP + (HEAP_PAGES - 1) * PAGE_SIZE;
    Space {
        mappings: vec![
            Mapping {
                file: Some(identity("/usr/bin/subject")),
                ..mapping(DATA, 2, Kind::FilePrivate)
            },
            Mapping {
                guards: vec![Range {
                    start: heap,
                    end: heap + PAGE_SIZE,
                }],
                name: "heap".into(),
                ..mapping(HEAP, HEAP_PAGES, Kind::Anon)
            },
            Mapping {
                prot: 5,
                ..mapping(0x7fff_0000_0000, 2, Kind::Vdso)
            },
        ],
        start_brk: HEAP,
        brk: HEAP,
        exe: Some(identity("/usr/bin/subject")),
        ..Space::default()
    }
}

/// One of most things there are.
fn tree() -> Tree {
    let open = |id, kind| File {
        id,
        flags: 2,
        kind: Some(kind),
        ..File::default()
    };
    let end = |write_end| file::Kind::Pipe(PipeEnd { pipe: 1, write_end });
    let pair = || {
        file::Kind::Socket(Socket {
            family: 1,
            r#type: 1,
            state: State::Paired.into(),
            pair: 1,
            queue: vec![b"unread".to_vec()],
            ..Socket::default()
        })
    };
    let files = vec![
        open(
            1,
            file::Kind::Device(Device {
                path: "/dev/null".into(),
                rdev: 0x103,
                position: 0,
            }),
        ),
        open(
            2,
            file::Kind::Regular(Regular {
                identity: Some(identity("/etc/subject.conf")),
                position: 17,
            }),
        ),
        open(3, end(false)),
        open(4, end(true)),
        open(5, pair()),
        open(6, pair()),
        open(
            7,
            file::Kind::Eventfd(Eventfd {
                count: 3,
                semaphore: false,
            }),
        ),
        open(
            8,
            file::Kind::Epoll(Epoll {
                holder: 0,
                items: vec![EpollItem {
                    fd: 7,
                    events: 1,
                    data: 9,
                }],
            }),
        ),
    ];
    Tree {
        processes: vec![Process {
            pid: 4711,
            ppid: 1,
            pgid: 4711,
            sid: 4711,
            threads: vec![thread(4711, "subject"), thread(4712, "worker")],
            space: Some(space()),
            actions: vec![Action {
                signo: 15,
                handler: HEAP,
                ..Action::default()
            }],
            descriptors: (1..9)
                .map(|file| Descriptor {
                    fd: file,
                    file,
                    close_on_exec: file > 2,
                })
                .collect(),
            cwd: "/var/lib/subject".into(),
            umask: 0o22,
            limits: vec![Limit {
                resource: 7,
                soft: 1024,
                hard: 4096,
            }],
            first_touch: vec![Range {
                start: HEAP,
                end: HEAP + PAGE_SIZE,
            }],
            ..Process::default()
        }],
        files,
        pipes: vec![Pipe {
            id: 1,
            capacity: 4096,
            content: b"in flight".to_vec(),
        }],
        monotonic_ns: 1_000,
        boottime_ns: 2_000,
        realtime_ns: 3_000,
        shared: Vec::new(),
        host: Some(Host {
            cpu_flags: vec!["fpu".into(), "sse2".into()],
            xsave_size: 2696,
            xcr0: 7,
            kernel_release: "6.18.0".into(),
            vdso: b"the vdso".to_vec(),
            page_size: 4096,
        }),
        ..Tree::default()
    }
}

/// What data page number `page` holds: the last one is not to be compressed.
fn content(page: u64) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..PAGE_LEN)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            if page == 16 {
                state as u8
            } else {
                page as u8 + 1
            }
        })
        .collect()
}

/// Writes the image that the golden one is, and all malformed ones are made of: 17 data pages, in one block that LZ4 has made
/// shorter and one that it has not.
fn write(path: &Path) {
    let origin = Origin {
        id: *b"golden image  v1",
        created_ns: 1_735_734_896_000_000_000,
        host: "alpha".into(),
        program: "0.1.0".into(),
    };
    let mut writer =
        ImageWriter::create(path, tree(), origin, Compression::Lz4).expect("a good tree");
    let heap = |from: u64, to: u64| PageRange {
        start: HEAP + from * PAGE_SIZE,
        end: HEAP + to * PAGE_SIZE,
    };
    let mut tell = |kind, range| writer.without_data(ROOT, kind, range).expect("the next");
    tell(
        PageKind::Hole,
        PageRange {
            start: DATA,
            end: DATA + PAGE_SIZE,
        },
    );
    writer
        .pages(ROOT, DATA + PAGE_SIZE, &content(0))
        .expect("the next");
    let bytes: Vec<u8> = (1..16).flat_map(content).collect();
    writer.pages(ROOT, HEAP, &bytes).expect("the next");
    let mut tell = |kind, range| writer.without_data(ROOT, kind, range).expect("the next");
    tell(PageKind::Zero, heap(15, 17));
    tell(PageKind::Hole, heap(17, 22));
    writer
        .pages(ROOT, heap(22, 23).start, &content(16))
        .expect("the next");
    writer
        .without_data(ROOT, PageKind::Guard, heap(23, 24))
        .expect("the next");
    writer.finish().expect("all pages");
}

#[test]
fn the_golden_image_of_version_1_holds_what_it_did() {
    let path = golden().join("v1");
    if is_writing() && !path.exists() {
        write(&path);
    }
    let image = Image::open(&path).expect("it must load for ever");
    image.verify().expect("it must load for ever");
    assert_eq!(image.tree(), &tree());
    assert_eq!(image.header().origin.id, *b"golden image  v1");
    let heap = |page| HEAP + page * PAGE_SIZE;
    let places = [(DATA + PAGE_SIZE, 0)].into_iter();
    let places = places
        .chain((0..15).map(|page| (heap(page), page + 1)))
        .chain([(heap(22), 16)]);
    for (address, page) in places {
        let mut bytes = vec![0; PAGE_LEN];
        image
            .read(ROOT, PageRange::page_of(address), &mut bytes)
            .expect("it must load for ever");
        assert!(bytes == content(page), "page {page}");
    }
    let kinds: Vec<_> = image
        .runs(
            ROOT,
            PageRange {
                start: DATA,
                end: HEAP + HEAP_PAGES * PAGE_SIZE,
            },
        )
        .expect("it must load for ever")
        .iter()
        .map(|run| (run.kind, run.range.page_count()))
        .collect();
    let gap = (HEAP - DATA) / PAGE_SIZE - 2;
    assert_eq!(
        kinds,
        [
            (Some(PageKind::Hole), 1),
            (Some(PageKind::Data), 1),
            (None, gap),
            (Some(PageKind::Data), 15),
            (Some(PageKind::Zero), 2),
            (Some(PageKind::Hole), 5),
            (Some(PageKind::Data), 1),
            (Some(PageKind::Guard), 1),
        ]
    );
}

type Files = BTreeMap<&'static str, Vec<u8>>;

/// An image in pieces, before its checksums are taken.
struct Parts {
    header: Header,
    /// Bytes put into the header before its checksum is taken.
    edits: Vec<(usize, Vec<u8>)>,
    tree: Vec<u8>,
    ranges: Vec<[u8; pagemap::RANGE_LEN]>,
    blocks: Vec<[u8; pagemap::BLOCK_LEN]>,
    pages: Vec<u8>,
}

/// The records of a file of one leaf.
fn records<const N: usize>(file: &[u8]) -> Vec<[u8; N]> {
    let records = file[32..].chunks_exact(N);
    records
        .map(|record| record.try_into().expect("N bytes"))
        .collect()
}

/// A file of one leaf, by the words of docs/image.md.
fn leaf<const N: usize>(number: u64, record_len: u32, records: &[[u8; N]]) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    bytes.extend((records.len() as u32).to_le_bytes());
    bytes.extend(number.to_le_bytes());
    bytes.extend(record_len.to_le_bytes());
    bytes.extend([0; 12]);
    bytes.extend(records.concat());
    let checksum = crc32fast::hash(&bytes[4..]);
    bytes[..4].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

impl Parts {
    fn of(path: &Path) -> Self {
        let read = |name: &str| fs::read(path.join(name)).expect("it was written");
        Self {
            header: Header::of(path).expect("it was written"),
            edits: Vec::new(),
            tree: read(TREE),
            ranges: records(&read(MAP)),
            blocks: records(&read(BLOCKS)),
            pages: read(PAGES),
        }
    }

    fn tree(&mut self, change: impl FnOnce(&mut Tree)) {
        let mut tree = Tree::decode(&self.tree[..]).expect("it was encoded");
        change(&mut tree);
        self.tree = tree.encode_to_vec();
    }

    fn root(&mut self, change: impl FnOnce(&mut Process)) {
        self.tree(|tree| change(&mut tree.processes[0]));
    }

    /// Adds a child of the root with one thread, changed.
    fn child(&mut self, change: impl FnOnce(&mut Process)) {
        self.tree(|tree| {
            let mut child = tree.processes[0].clone();
            (child.pid, child.ppid) = (4720, 4711);
            child.threads.truncate(1);
            child.threads[0].tid = 4720;
            change(&mut child);
            tree.processes.push(child);
        });
    }

    /// Adds a child of the root in its memory, changed.
    fn tenant(&mut self, change: impl FnOnce(&mut Process)) {
        self.child(|child| {
            child.memory_of = 4711;
            child.space = None;
            child.first_touch.clear();
            child.membarrier = 0;
            child.actions.clear();
            change(child);
        });
    }

    /// Adds a child of that, like it but for what is changed.
    fn grandchild(&mut self, change: impl FnOnce(&mut Process)) {
        self.tree(|tree| {
            let mut other = tree.processes[1].clone();
            (other.pid, other.ppid) = (4730, 4720);
            other.threads[0].tid = 4730;
            change(&mut other);
            tree.processes.push(other);
        });
    }

    /// Adds an ended child of the root, changed.
    fn zombie(&mut self, change: impl FnOnce(&mut Zombie)) {
        self.tree(|tree| {
            let mut zombie = Zombie {
                pid: 4725,
                ppid: 4711,
                pgid: 4711,
                sid: 4711,
                status: 3 << 8,
                exit_signal: 17,
                ..Zombie::default()
            };
            change(&mut zombie);
            tree.zombies.push(zombie);
        });
    }

    fn space(&mut self, change: impl FnOnce(&mut Space)) {
        self.root(|root| change(root.space.as_mut().expect("it has one")));
    }

    fn file(&mut self, id: usize, kind: file::Kind) {
        self.tree(|tree| tree.files[id - 1].kind = Some(kind));
    }

    fn socket(&mut self, id: usize, change: impl FnOnce(&mut Socket)) {
        self.tree(|tree| {
            if let Some(file::Kind::Socket(socket)) = &mut tree.files[id - 1].kind {
                change(socket);
            }
        });
    }

    /// Adds an exclusive lock of the root on the configuration file it has open, changed.
    fn lock(&mut self, change: impl FnOnce(&mut Lock)) {
        self.tree(|tree| {
            let mut lock = Lock {
                kind: locks::Kind::Record.into(),
                exclusive: true,
                pid: 4711,
                file: 2,
                start: 10,
                len: 5,
            };
            change(&mut lock);
            tree.locks.push(lock);
        });
    }

    /// Adds a write lease of the root.
    fn lease(&mut self, on: u32) {
        self.lock(|lock| {
            let kind = locks::Kind::Lease.into();
            (lock.kind, lock.file, lock.start, lock.len) = (kind, on, 0, 0);
        });
    }

    fn edit(&mut self, offset: usize, bytes: &[u8]) {
        self.edits.push((offset, bytes.to_vec()));
    }

    fn word(&mut self, range: usize, at: usize, value: u64) {
        self.ranges[range][at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// The checksums of the blocks are right, as far as their records are.
    fn seal_blocks(&mut self) {
        for record in &mut self.blocks {
            let block = pagemap::Block::decode(record);
            let start = usize::try_from(block.offset).unwrap_or(usize::MAX);
            let end = start.saturating_add(block.stored_len as usize);
            if let Some(stored) = self.pages.get(start..end) {
                record[12..].copy_from_slice(&crc32fast::hash(stored).to_le_bytes());
            }
        }
    }

    /// All checksums are right, and all lengths.
    fn seal(mut self) -> Files {
        let (map, blocks) = (leaf(0, 32, &self.ranges), leaf(0, 16, &self.blocks));
        let extent = |bytes: &[u8]| header::Extent {
            len: bytes.len() as u64,
            checksum: crc32fast::hash(bytes),
        };
        self.header.tree = extent(&self.tree);
        self.header.map = extent(&map);
        self.header.blocks = extent(&blocks);
        self.header.pages.len = self.pages.len() as u64;
        let mut header = self.header.encode().to_vec();
        for (offset, bytes) in &self.edits {
            header[*offset..offset + bytes.len()].copy_from_slice(bytes);
        }
        let mut files = Files::from([
            (HEADER, header),
            (TREE, self.tree),
            (MAP, map),
            (BLOCKS, blocks),
            (PAGES, self.pages),
        ]);
        seal_header(&mut files);
        files
    }
}

fn seal_header(files: &mut Files) {
    let header = files.get_mut(HEADER).expect("it has one");
    let checksum = crc32fast::hash(&header[..508]);
    header[508..].copy_from_slice(&checksum.to_le_bytes());
}

/// Puts a file in the place of another, and its checksum in the header.
fn replace(files: &mut Files, name: &'static str, bytes: Vec<u8>) {
    let at = match name {
        MAP => 256,
        _ => 272,
    };
    let header = files.get_mut(HEADER).expect("it has one");
    header[at..at + 8].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    header[at + 8..at + 12].copy_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
    files.insert(name, bytes);
    seal_header(files);
}

fn flip(files: &mut Files, name: &str, at: usize) {
    files.get_mut(name).expect("it is there")[at] ^= 0x10;
}

enum Change {
    /// Impossible, though every checksum is right.
    Built(fn(&mut Parts)),
    /// Torn, cut, flipped, foreign.
    Damaged(fn(&mut Files)),
}

use Change::{Built, Damaged};

fn anonymous(id: u32) -> Shared {
    Shared {
        id,
        size: PAGE_SIZE,
        kind: Some(shared::Kind::Anonymous(Anonymous::default())),
    }
}

fn memfd(seals: u32) -> Shared {
    let memfd = Memfd {
        name: "kept".into(),
        mode: 0o600,
        seals,
        ..Memfd::default()
    };
    Shared {
        id: 1,
        size: 100,
        kind: Some(shared::Kind::Memfd(memfd)),
    }
}

fn carried(id: u32, path: &str) -> Shared {
    let file = Carried {
        path: path.into(),
        mode: 0o600,
        ..Carried::default()
    };
    Shared {
        id,
        size: 100,
        kind: Some(shared::Kind::Carried(file)),
    }
}

fn segment(id: u32, change: impl FnOnce(&mut Segment)) -> Shared {
    let mut segment = Segment {
        number: 7,
        key: 42,
        mode: 0o600,
        ..Segment::default()
    };
    change(&mut segment);
    Shared {
        id,
        size: 100,
        kind: Some(shared::Kind::Segment(segment)),
    }
}

/// Has an open file whose content is carried, but not its pages.
fn shared_file(parts: &mut Parts) {
    parts.tree(|tree| tree.shared = vec![memfd(0)]);
    let object = SharedFile {
        object: 1,
        position: 0,
    };
    parts.file(1, file::Kind::Shared(object));
}

fn listener(local: &[u8]) -> file::Kind {
    file::Kind::Socket(Socket {
        family: 1,
        r#type: 1,
        state: State::Listening.into(),
        local: local.to_vec(),
        ..Socket::default()
    })
}

/// Name, what is done to the image, and the sentence that tells it.
fn cases() -> Vec<(&'static str, Change, &'static str)> {
    vec![
        // Torn, truncated, bit-flipped, foreign.
        (
            "header-missing",
            Damaged(|files| {
                files.remove(HEADER);
            }),
            "is no image, it has no file `header`",
        ),
        (
            "header-empty",
            Damaged(|files| {
                files.insert(HEADER, Vec::new());
            }),
            "`header` has 0 bytes, not 512",
        ),
        (
            "header-of-criu",
            Damaged(|files| {
                files.get_mut(HEADER).expect("there")[..4]
                    .copy_from_slice(&[0x19, 0x43, 0x56, 0x54])
            }),
            "is no image, its `header` does not begin as one",
        ),
        (
            "header-torn",
            Damaged(|files| files.get_mut(HEADER).expect("there").truncate(300)),
            "`header` has 300 bytes, not 512",
        ),
        (
            "header-too-long",
            Damaged(|files| files.get_mut(HEADER).expect("there").push(0)),
            "`header` has 513 bytes, not 512",
        ),
        (
            "header-flipped",
            Damaged(|files| flip(files, HEADER, 70)),
            "`header` has the wrong checksum",
        ),
        (
            "version-0",
            Damaged(|files| files.get_mut(HEADER).expect("there")[16] = 0),
            "`header` says format 0",
        ),
        (
            "version-of-the-future",
            Damaged(|files| files.get_mut(HEADER).expect("there")[16] = 2),
            "`header` says format 2",
        ),
        (
            "tree-missing",
            Damaged(|files| {
                files.remove(TREE);
            }),
            "the file `tree` is missing",
        ),
        (
            "tree-torn",
            Damaged(|files| files.get_mut(TREE).expect("there").truncate(100)),
            "`tree` ends at offset 100",
        ),
        (
            "tree-flipped",
            Damaged(|files| flip(files, TREE, 50)),
            "`tree` has not the checksum",
        ),
        (
            "map-missing",
            Damaged(|files| {
                files.remove(MAP);
            }),
            "the file `map` is missing",
        ),
        (
            "map-torn",
            Damaged(|files| files.get_mut(MAP).expect("there").truncate(64)),
            "`map` ends at offset 64",
        ),
        (
            "map-flipped",
            Damaged(|files| flip(files, MAP, 50)),
            "`map` has not the checksum",
        ),
        (
            "blocks-missing",
            Damaged(|files| {
                files.remove(BLOCKS);
            }),
            "the file `blocks` is missing",
        ),
        (
            "blocks-flipped",
            Damaged(|files| flip(files, BLOCKS, 50)),
            "`blocks` has not the checksum",
        ),
        (
            "pages-missing",
            Damaged(|files| {
                files.remove(PAGES);
            }),
            "the file `pages` is missing",
        ),
        (
            "pages-torn",
            Damaged(|files| files.get_mut(PAGES).expect("there").truncate(4096)),
            "`pages` ends at offset 4096",
        ),
        (
            "pages-with-more",
            Damaged(|files| files.get_mut(PAGES).expect("there").extend(b"more")),
            "`pages` goes on to offset",
        ),
        (
            "pages-flipped",
            Damaged(|files| flip(files, PAGES, 10)),
            "`pages`: the block at offset 0 has the wrong checksum, so page 555555559000 of object 1 is lost",
        ),
        (
            "pages-flipped-late",
            Damaged(|files| {
                let at = files[PAGES].len() - 1;
                flip(files, PAGES, at);
            }),
            "has the wrong checksum, so page 555555616000 of object 1 is lost",
        ),
        (
            "stranger",
            Damaged(|files| {
                files.insert("notes", b"mine\n".to_vec());
            }),
            "\"notes\" lies in it and belongs to no image",
        ),
        // The header.
        (
            "header-kind",
            Built(|parts| parts.edit(24, &[2])),
            "`header` at offset 24: kind is 2, not 1",
        ),
        (
            "header-machine",
            Built(|parts| parts.edit(28, &[183])),
            "`header` at offset 28: machine is 183, not 1",
        ),
        (
            "header-page-length",
            Built(|parts| parts.edit(32, &[0, 0x40])),
            "`header` at offset 32: page length is 16384, not 4096",
        ),
        (
            "header-name",
            Built(|parts| parts.edit(80, &[0xff])),
            "`header` at offset 80: name is no text",
        ),
        (
            "header-reserved",
            Built(|parts| parts.edit(400, &[1])),
            "`header` at offset 336: reserved bytes are set",
        ),
        (
            "header-tree-length",
            Built(|parts| parts.edit(240, &[0xff; 6])),
            "length of tree is 281474976710655, more than the limit of 268435456",
        ),
        (
            "header-map-length",
            Built(|parts| parts.edit(256, &[70, 0])),
            "`header` at offset 256: length of map is no number of whole records",
        ),
        (
            "header-blocks-length",
            Built(|parts| parts.edit(272, &[80])),
            "length of blocks is 80, not 64 as for 17 data pages",
        ),
        (
            "header-pages-length",
            Built(|parts| parts.edit(288, &[0, 0, 0, 1])),
            "length of pages is 16777216, more than the limit of 69632",
        ),
        (
            "header-data-pages",
            Built(|parts| parts.edit(304, &[0xff; 7])),
            "data pages is 72057594037927935, more than the limit of 4294967296",
        ),
        (
            "header-zero-pages",
            Built(|parts| parts.edit(312, &[9])),
            "`header` at offset 312: zero pages are 9, but 2 in the map",
        ),
        (
            "header-pid",
            Built(|parts| parts.edit(64, &[9, 0])),
            "`header` at offset 64: pid is 9, but that of the tree 4711",
        ),
        (
            "header-threads",
            Built(|parts| parts.edit(72, &[3])),
            "`header` at offset 72: thread count is 3, but that of the tree 2",
        ),
        // Impossible trees.
        (
            "tree-garbled",
            Built(|parts| {
                let len = parts.tree.len();
                parts.tree.truncate(len - 1);
            }),
            "`tree` is broken off or garbled at byte",
        ),
        (
            "tree-not-utf8",
            Built(|parts| {
                let at = parts
                    .tree
                    .windows(9)
                    .position(|text| text == b"/dev/null")
                    .expect("it is there");
                parts.tree[at] = 0xff;
            }),
            "`tree` cannot be decoded",
        ),
        (
            "tree-empty",
            Built(|parts| parts.tree.clear()),
            "`tree`: tree has no process",
        ),
        (
            "host-missing",
            Built(|parts| parts.tree(|tree| tree.host = None)),
            "`tree`: host is not told",
        ),
        (
            "host-of-other-pages",
            Built(|parts| {
                parts.tree(|tree| tree.host.as_mut().expect("it has").page_size = 65_536)
            }),
            "`tree`: host has pages of another size",
        ),
        (
            "first-pages-twice",
            Built(|parts| parts.root(|root| root.first_touch.push(root.first_touch[0]))),
            "`tree`: first pages are not in ascending order",
        ),
        (
            "pid-1",
            Built(|parts| {
                parts.root(|root| {
                    root.pid = 1;
                    root.threads[0].tid = 1;
                })
            }),
            "`tree`: process 1 is the first of its pid namespace",
        ),
        (
            "pid-negative",
            Built(|parts| parts.root(|root| root.pid = -5)),
            "`tree`: process -5 has the number of no process",
        ),
        (
            "parent-negative",
            Built(|parts| parts.root(|root| root.ppid = -1)),
            "has an impossible parent, group or session",
        ),
        (
            "no-leader",
            Built(|parts| parts.root(|root| root.threads.swap(0, 1))),
            "`tree`: process 4711 has not its leader first",
        ),
        (
            "no-threads",
            Built(|parts| parts.root(|root| root.threads.clear())),
            "`tree`: process 4711 has no thread",
        ),
        (
            "thread-twice",
            Built(|parts| parts.root(|root| root.threads[1].tid = 4711)),
            "`tree`: process 4711 has a thread twice",
        ),
        (
            "registers-short",
            Built(|parts| parts.root(|root| root.threads[1].registers.truncate(8))),
            "`tree`: thread 4712 has not the registers of x86-64",
        ),
        // Shared objects.
        (
            "mapping-of-no-object",
            Built(|parts| {
                parts.space(|space| {
                    let mapping = &mut space.mappings[0];
                    (mapping.file, mapping.shared) = (None, 1);
                })
            }),
            "`tree`: mapping 555555558000-55555555a000 names no shared object",
        ),
        (
            "mapping-of-object-and-file",
            Built(|parts| parts.space(|space| space.mappings[0].shared = 1)),
            "`tree`: mapping 555555558000-55555555a000 has a file it must not have",
        ),
        (
            "shared-unreached",
            Built(|parts| parts.tree(|tree| tree.shared = vec![anonymous(1)])),
            "`tree`: list of shared objects has one that nothing reaches",
        ),
        (
            "shared-out-of-order",
            Built(|parts| parts.tree(|tree| tree.shared = vec![anonymous(2), anonymous(1)])),
            "`tree`: shared objects are not numbered from 1 on",
        ),
        (
            "shared-half-page",
            Built(|parts| {
                parts.tree(|tree| {
                    tree.shared = vec![Shared {
                        size: 100,
                        ..anonymous(1)
                    }]
                })
            }),
            "`tree`: shared memory 1 is not made of whole pages",
        ),
        (
            "shared-without-end",
            Built(|parts| {
                parts.tree(|tree| {
                    tree.shared = vec![Shared {
                        size: 1 << 60,
                        ..anonymous(1)
                    }]
                })
            }),
            "`tree`: shared memory 1 is larger than an address space",
        ),
        (
            "memfd-of-unknown-seals",
            Built(|parts| parts.tree(|tree| tree.shared = vec![memfd(0x100)])),
            "`tree`: memfd kept has unknown seals",
        ),
        (
            "memfd-sealed-and-written",
            Built(|parts| {
                parts.space(|space| {
                    let mapping = &mut space.mappings[0];
                    (mapping.file, mapping.shared) = (None, 1);
                    mapping.kind = Kind::Shared.into();
                    mapping.file_writable = true;
                });
                parts.tree(|tree| tree.shared = vec![memfd(8)]);
            }),
            "`tree`: mapping 555555558000-55555555a000 may write an object that is sealed against it",
        ),
        (
            "segment-without-number",
            Built(|parts| {
                parts.tree(|tree| tree.shared = vec![segment(1, |segment| segment.number = -1)])
            }),
            "`tree`: System V shared memory -1 has an impossible number",
        ),
        (
            "segment-without-end",
            Built(|parts| {
                parts.tree(|tree| {
                    tree.shared = vec![Shared {
                        size: 1 << 60,
                        ..segment(1, |_| {})
                    }]
                })
            }),
            "`tree`: System V shared memory 7 is larger than an address space",
        ),
        (
            "segment-with-other-modes",
            Built(|parts| {
                parts.tree(|tree| tree.shared = vec![segment(1, |segment| segment.mode = 0o4600)])
            }),
            "`tree`: System V shared memory 7 has an impossible mode",
        ),
        (
            "segment-removed-with-key",
            Built(|parts| {
                parts.tree(|tree| tree.shared = vec![segment(1, |segment| segment.removed = true)])
            }),
            "`tree`: System V shared memory 7 is removed and has a key",
        ),
        (
            "segment-twice",
            Built(|parts| {
                let other = |segment: &mut Segment| segment.number = 8;
                parts.tree(|tree| tree.shared = vec![segment(1, |_| {}), segment(2, other)]);
            }),
            "`tree`: System V shared memory 8 has the number or key of another",
        ),
        (
            "segment-opened",
            Built(|parts| {
                let object = SharedFile {
                    object: 1,
                    position: 0,
                };
                parts.file(2, file::Kind::Shared(object));
                parts.tree(|tree| tree.shared = vec![segment(1, |_| {})]);
            }),
            "`tree`: open file 2 names no shared object that can be opened",
        ),
        (
            "segment-mapped-beyond-its-end",
            Built(|parts| {
                parts.space(|space| {
                    let mapping = &mut space.mappings[0];
                    (mapping.file, mapping.shared) = (None, 1);
                    mapping.kind = Kind::Shared.into();
                });
                parts.tree(|tree| tree.shared = vec![segment(1, |_| {})]);
            }),
            "`tree`: mapping 555555558000-55555555a000 is no part of the segment it names",
        ),
        (
            "carried-with-way-up",
            Built(|parts| {
                parts.tree(|tree| tree.shared = vec![carried(1, "/dev/shm/../../etc/x")])
            }),
            "has `..` in its path",
        ),
        (
            "carried-twice",
            Built(|parts| {
                parts.tree(|tree| {
                    tree.shared = vec![carried(1, "/dev/shm/x"), carried(2, "/dev/shm/x")]
                })
            }),
            "`tree`: file /dev/shm/x is made twice",
        ),
        (
            "file-of-no-object",
            Built(|parts| {
                parts.file(
                    1,
                    file::Kind::Shared(SharedFile {
                        object: 9,
                        position: 0,
                    }),
                )
            }),
            "`tree`: open file 1 names no shared object that can be opened",
        ),
        (
            "shared-uncovered",
            Built(shared_file),
            "`map` does not tell pages 0-1000 of object 2",
        ),
        (
            "shared-beyond-its-end",
            Built(|parts| {
                shared_file(parts);
                let mut range = parts.ranges[0];
                range[..4].copy_from_slice(&2_u32.to_le_bytes());
                range[8..16].fill(0);
                range[16] = 2;
                range[24] = 17;
                parts.ranges.push(range);
            }),
            "`map` tells pages 0-2000 of object 2",
        ),
        (
            "shared-with-guard",
            Built(|parts| {
                shared_file(parts);
                let mut range = parts.ranges[0];
                range[..4].copy_from_slice(&2_u32.to_le_bytes());
                range[4] = PageKind::Guard as u8;
                range[8..16].fill(0);
                range[16] = 1;
                range[24] = 17;
                parts.ranges.push(range);
            }),
            "in object 2, which can have none",
        ),
        (
            "parent-unknown",
            Built(|parts| parts.child(|child| child.ppid = 4242)),
            "`tree`: process 4720 has a parent that does not stand before it",
        ),
        (
            "table-of-nobody",
            Built(|parts| {
                parts.child(|child| {
                    child.table_of = 4242;
                    child.descriptors.clear();
                })
            }),
            "`tree`: process 4720 shares the descriptors of none that stands before it",
        ),
        (
            "table-of-a-sharer",
            Built(|parts| {
                parts.child(|child| {
                    child.table_of = 4711;
                    child.descriptors.clear();
                });
                parts.grandchild(|other| other.table_of = 4720);
            }),
            "`tree`: process 4730 shares the descriptors of one that has none of its own",
        ),
        (
            "directory-of-a-sharer",
            Built(|parts| {
                parts.child(|child| child.directory_of = 4711);
                parts.grandchild(|other| other.directory_of = 4720);
            }),
            "`tree`: process 4730 shares the directory of one that has none of its own",
        ),
        (
            "table-shared-and-listed",
            Built(|parts| parts.child(|child| child.table_of = 4711)),
            "`tree`: process 4720 shares descriptors and lists its own",
        ),
        (
            "memory-of-nobody",
            Built(|parts| {
                parts.tenant(|child| child.memory_of = 4242);
            }),
            "`tree`: process 4720 shares the memory of none that stands before it",
        ),
        (
            "memory-of-a-sharer",
            Built(|parts| {
                parts.tenant(|_| ());
                parts.grandchild(|other| other.memory_of = 4720);
            }),
            "`tree`: process 4730 shares the memory of one that has none of its own",
        ),
        (
            "memory-shared-and-own",
            Built(|parts| parts.child(|child| child.memory_of = 4711)),
            "`tree`: process 4720 shares memory and has its own",
        ),
        (
            "memory-shared-and-told",
            Built(|parts| {
                parts.tenant(|child| {
                    child.first_touch = vec![Range {
                        start: HEAP,
                        end: HEAP + PAGE_SIZE,
                    }];
                })
            }),
            "`tree`: process 4720 shares memory and tells of it itself",
        ),
        (
            "memory-across-another",
            Built(|parts| {
                parts.child(|_| ());
                parts.grandchild(|other| {
                    other.memory_of = 4711;
                    other.space = None;
                    other.first_touch.clear();
                });
            }),
            "`tree`: process 4730 shares with process 4711 what cannot come to it",
        ),
        (
            "pages-of-a-sharer",
            Built(|parts| {
                parts.tenant(|_| ());
                parts.header.process_count += 1;
                parts.header.thread_count += 1;
                let mut range = parts.ranges[0];
                range[..4].copy_from_slice(&2_u32.to_le_bytes());
                range[16] = 1;
                range[24] = 17;
                parts.ranges.push(range);
            }),
            "of object 2, which the tree does not have",
        ),
        (
            "actions-of-nobody",
            Built(|parts| parts.tenant(|child| child.actions_of = 4242)),
            "`tree`: process 4720 shares the signal actions of none that stands before it",
        ),
        (
            "actions-of-a-sharer",
            Built(|parts| {
                parts.tenant(|child| child.actions_of = 4711);
                parts.grandchild(|other| other.actions_of = 4720);
            }),
            "`tree`: process 4730 shares the signal actions of one that has none of its own",
        ),
        (
            "actions-in-another-memory",
            Built(|parts| {
                parts.child(|child| {
                    child.actions_of = 4711;
                    child.actions.clear();
                })
            }),
            "`tree`: process 4720 shares signal actions and not the memory they are in",
        ),
        (
            "actions-shared-and-listed",
            Built(|parts| {
                parts.tenant(|child| {
                    child.actions_of = 4711;
                    child.actions = vec![Action {
                        signo: 1,
                        handler: 1,
                        ..Action::default()
                    }];
                })
            }),
            "`tree`: process 4720 shares signal actions and lists its own",
        ),
        (
            "directory-of-nobody",
            Built(|parts| parts.child(|child| child.directory_of = 4242)),
            "`tree`: process 4720 shares the directory of none that stands before it",
        ),
        (
            "directory-shared-and-another",
            Built(|parts| {
                parts.child(|child| {
                    child.directory_of = 4711;
                    child.cwd = "/elsewhere".into();
                })
            }),
            "`tree`: process 4720 shares a working directory and umask and has others",
        ),
        (
            "tables-that-cross",
            Built(|parts| {
                parts.child(|child| {
                    child.table_of = 4711;
                    child.descriptors.clear();
                });
                parts.tree(|tree| {
                    for (pid, owner) in [(4730, 0), (4731, 4730)] {
                        let mut other = tree.processes[1].clone();
                        (other.pid, other.ppid, other.table_of) = (pid, 4720, owner);
                        other.threads[0].tid = pid;
                        tree.processes.push(other);
                    }
                });
            }),
            "`tree`: process 4731 shares with process 4730 what cannot come to it",
        ),
        (
            "parents-in-a-circle",
            Built(|parts| {
                parts.child(|child| {
                    (child.pid, child.ppid) = (4725, 4730);
                    child.threads[0].tid = 4725;
                });
                parts.tree(|tree| {
                    let mut other = tree.processes[1].clone();
                    (other.pid, other.ppid) = (4730, 4725);
                    other.threads[0].tid = 4730;
                    tree.processes.push(other);
                });
            }),
            "`tree`: process 4725 has a parent that does not stand before it",
        ),
        (
            "process-twice",
            Built(|parts| {
                parts.child(|_| ());
                parts.child(|_| ());
            }),
            "`tree`: process 4720 is in the tree twice",
        ),
        (
            "thread-of-two",
            Built(|parts| {
                parts.child(|child| {
                    let mut other = child.threads[0].clone();
                    other.tid = 4712;
                    child.threads.push(other);
                })
            }),
            "`tree`: thread 4712 is in two processes",
        ),
        (
            "session-of-nobody",
            Built(|parts| parts.child(|child| child.sid = 0)),
            "`tree`: process 4720 is in session 0, into which there is no way",
        ),
        (
            "group-of-another-session",
            Built(|parts| {
                parts.child(|child| (child.pgid, child.sid) = (4720, 4720));
                parts.tree(|tree| {
                    let mut other = tree.processes[1].clone();
                    (other.pid, other.sid) = (4730, 4711);
                    other.threads[0].tid = 4730;
                    tree.processes.push(other);
                });
            }),
            "`tree`: process 4730 is in process group 4720, into which there is no way",
        ),
        (
            "group-of-a-thread",
            Built(|parts| parts.child(|child| child.pgid = 4712)),
            "`tree`: thread 4712 has the number of an ended process, a session or a group",
        ),
        (
            "ended-of-nobody",
            Built(|parts| parts.zombie(|zombie| (zombie.pid, zombie.ppid) = (4726, 4242))),
            "`tree`: process 4726 has a parent that does not stand before it",
        ),
        (
            "ended-without-an-end",
            Built(|parts| parts.zombie(|zombie| zombie.status = 0x137f)),
            "`tree`: ended process 4725 has ended in an impossible way",
        ),
        (
            "ended-and-running",
            Built(|parts| parts.zombie(|zombie| zombie.pid = 4711)),
            "`tree`: process 4711 is in the tree twice",
        ),
        (
            "lock-of-no-kind",
            Built(|parts| parts.lock(|lock| lock.kind = 9)),
            "`tree`: lock on open file 2 is of no known kind",
        ),
        (
            "lock-of-nobody",
            Built(|parts| parts.lock(|lock| lock.pid = 4720)),
            "`tree`: lock on open file 2 is of a process that has not the file",
        ),
        (
            "lock-on-nothing",
            Built(|parts| parts.lock(|lock| lock.file = 99)),
            "`tree`: lock on open file 99 has no file",
        ),
        (
            "lock-beyond-the-end",
            Built(|parts| parts.lock(|lock| lock.start = u64::MAX)),
            "`tree`: lock on open file 2 reaches beyond the end of any file",
        ),
        (
            "lock-on-part-by-flock",
            Built(|parts| parts.lock(|lock| lock.kind = locks::Kind::Flock.into())),
            "`tree`: lock on open file 2 is a flock on a part of the file",
        ),
        (
            "lock-lease-on-part",
            Built(|parts| parts.lock(|lock| lock.kind = locks::Kind::Lease.into())),
            "`tree`: lock on open file 2 is a lease on a part of the file",
        ),
        (
            "lock-lease-on-no-file",
            Built(|parts| parts.lease(3)),
            "`tree`: lock on open file 3 is a lease on what can have none",
        ),
        (
            "lock-lease-on-an-open-file",
            Built(|parts| {
                parts.tree(|tree| {
                    let mut second = tree.files[1].clone();
                    second.id = tree.files.last().map_or(1, |last| last.id) + 1;
                    let descriptors = &mut tree.processes[0].descriptors;
                    let fd = descriptors.last().map_or(0, |last| last.fd) + 1;
                    descriptors.push(Descriptor {
                        fd,
                        file: second.id,
                        close_on_exec: false,
                    });
                    tree.files.push(second);
                });
                parts.lease(2);
            }),
            "`tree`: lock on open file 2 is a lease on a file that is open against it",
        ),
        (
            "lock-lease-on-a-mapped-file",
            Built(|parts| {
                parts.space(|space| space.mappings[0].file = Some(identity("/etc/subject.conf")));
                parts.lease(2);
            }),
            "`tree`: lock on open file 2 is a lease on a file that is mapped or executed against it",
        ),
        (
            "lock-over-another",
            Built(|parts| {
                parts.lock(|_| {});
                parts.lock(|lock| lock.start = 14);
            }),
            "`tree`: lock on open file 2 overlaps another of the same owner",
        ),
        (
            "lock-twice",
            Built(|parts| {
                parts.lock(|_| {});
                parts.lock(|_| {});
            }),
            "`tree`: locks are not in ascending order without duplicates",
        ),
        (
            "exit-signal",
            Built(|parts| parts.root(|root| root.exit_signal = Some(65))),
            "`tree`: process 4711 tells its end by an impossible signal",
        ),
        (
            "process-uncounted",
            Built(|parts| parts.child(|_| ())),
            "`header` at offset 68: process count is 1, but that of the tree 2",
        ),
        (
            "descriptor-twice",
            Built(|parts| parts.root(|root| root.descriptors[1].fd = 1)),
            "`tree`: descriptors are not in ascending order without duplicates",
        ),
        (
            "descriptor-of-no-file",
            Built(|parts| parts.root(|root| root.descriptors[1].file = 99)),
            "`tree`: fd 2 names no open file",
        ),
        (
            "file-twice",
            Built(|parts| parts.tree(|tree| tree.files[1].id = 1)),
            "`tree`: open files are not in ascending order without duplicates",
        ),
        (
            "file-of-no-kind",
            Built(|parts| parts.tree(|tree| tree.files[0].kind = None)),
            "`tree`: open file 1 is of no known kind",
        ),
        (
            "device-of-another-kind",
            Built(|parts| {
                parts.file(
                    1,
                    file::Kind::Device(Device {
                        path: "/dev/null".into(),
                        rdev: 0x800,
                        position: 0,
                    }),
                )
            }),
            "`tree`: open file 1 is no device that is carried",
        ),
        (
            "epoll-of-itself",
            Built(|parts| {
                parts.file(
                    8,
                    file::Kind::Epoll(Epoll {
                        holder: 0,
                        items: vec![EpollItem {
                            fd: 8,
                            events: 1,
                            data: 0,
                        }],
                    }),
                )
            }),
            "`tree`: epoll instances watch each other in a circle or too deep",
        ),
        (
            "pipe-over-its-limit",
            Built(|parts| parts.tree(|tree| tree.pipes[0].capacity = 4)),
            "`tree`: pipe 1 holds more than its capacity",
        ),
        (
            "pair-with-one-end",
            Built(|parts| parts.file(5, file::Kind::Eventfd(Eventfd::default()))),
            "`tree`: socket pair 1 has not its two ends",
        ),
        (
            "socket-file-back-up",
            Built(|parts| parts.file(7, listener(b"\x01\0/run/../etc/a\0"))),
            "`tree`: socket has no address that fits its state",
        ),
        (
            "socket-name-twice",
            Built(|parts| {
                parts.file(7, listener(b"\x01\0\0a"));
                parts.file(1, listener(b"\x01\0\0a"));
            }),
            "`tree`: UNIX socket has a name that another has",
        ),
        (
            "socket-accepted-by-nobody",
            Built(|parts| {
                parts.tree(|tree| {
                    if let Some(file::Kind::Socket(end)) = &mut tree.files[4].kind {
                        end.local = b"\x01\0/run/a\0".to_vec();
                    }
                })
            }),
            "`tree`: socket pair 1 has names but was not connected by one, or the reverse",
        ),
        (
            "socket-sends-to-nobody",
            Built(|parts| {
                parts.file(
                    7,
                    file::Kind::Socket(Socket {
                        family: 1,
                        r#type: 2,
                        state: State::Unbound.into(),
                        remote: b"\x01\0/run/a\0".to_vec(),
                        ..Socket::default()
                    }),
                )
            }),
            "`tree`: datagram socket names a socket that is not there",
        ),
        (
            "socket-stream-in-pieces",
            Built(|parts| {
                parts.socket(5, |socket| {
                    socket.queue = vec![b"un".to_vec(), b"read".to_vec()];
                })
            }),
            "`tree`: socket is a stream with several messages",
        ),
        (
            "message-with-a-file-that-is-not-there",
            Built(|parts| {
                parts.socket(5, |socket| {
                    socket.attached = vec![Attached {
                        files: vec![99],
                        ..Attached::default()
                    }];
                })
            }),
            "`tree`: open file 5 has a message with an open file that is not there",
        ),
        (
            "message-of-a-stranger",
            Built(|parts| {
                parts.socket(5, |socket| {
                    socket.attached = vec![Attached {
                        sender: Some(Ids {
                            pid: 99,
                            ..Ids::default()
                        }),
                        ..Attached::default()
                    }];
                })
            }),
            "`tree`: open file 5 has a message from a process that is not in the tree",
        ),
        (
            "message-with-too-many-files",
            Built(|parts| {
                parts.socket(5, |socket| {
                    socket.attached = vec![Attached {
                        files: vec![7; 254],
                        ..Attached::default()
                    }];
                })
            }),
            "`tree`: socket's message has 254, more than the limit of 253",
        ),
        (
            "message-with-what-only-a-process-has",
            Built(|parts| {
                parts.root(|root| root.descriptors.truncate(7));
                parts.socket(5, |socket| {
                    socket.attached = vec![Attached {
                        files: vec![8],
                        ..Attached::default()
                    }];
                });
            }),
            "`tree`: open file 8 is held by no process and has what only a process can give it",
        ),
        (
            "socket-waits-at-nobody",
            Built(|parts| {
                parts.file(
                    7,
                    file::Kind::Socket(Socket {
                        family: 1,
                        r#type: 1,
                        state: State::Waiting.into(),
                        ..Socket::default()
                    }),
                )
            }),
            "`tree`: open file 7 waits to be accepted by nobody",
        ),
        (
            "socket-lets-a-pair-wait",
            Built(|parts| {
                parts.file(7, listener(b"\x01\0\0a"));
                parts.socket(7, |socket| socket.waiting = vec![5]);
            }),
            "`tree`: open file 5 waits to be accepted twice, or is none that does",
        ),
        (
            "fifo-of-no-pipe",
            Built(|parts| {
                parts.file(
                    7,
                    file::Kind::Fifo(Fifo {
                        pipe: 9,
                        path: "/run/a".into(),
                        ..Fifo::default()
                    }),
                )
            }),
            "`tree`: pipes are not those their ends name",
        ),
        (
            "path-back-up",
            Built(|parts| parts.root(|root| root.cwd = "/var/../etc".into())),
            "`tree`: working directory /var/../etc has `..` in its path",
        ),
        (
            "path-relative",
            Built(|parts| parts.root(|root| root.cwd = "etc".into())),
            "`tree`: working directory etc is not an absolute path",
        ),
        (
            "path-to-the-terminal",
            Built(|parts| parts.root(|root| root.cwd = "\u{1b}[2J".into())),
            "working directory \\u{1b}[2J is not an absolute path",
        ),
        (
            "mapping-overlap",
            Built(|parts| parts.space(|space| space.mappings[0].end = HEAP + PAGE_SIZE)),
            "`tree`: mappings are not in ascending order without duplicates",
        ),
        (
            "mapping-of-the-kernel",
            Built(|parts| parts.space(|space| space.mappings[2].end = 0xffff_8000_0000_0000)),
            "is no range of user pages",
        ),
        (
            "mapping-over-the-agent",
            Built(|parts| {
                parts.space(|space| {
                    space.mappings.truncate(1);
                    space.mappings[0].start = PAGE_SIZE;
                    space.mappings[0].end = (1 << 47) - PAGE_SIZE;
                })
            }),
            "`tree`: address space leaves no room for the agent that rebuilds it",
        ),
        (
            "mapping-of-no-kind",
            Built(|parts| parts.space(|space| space.mappings[1].kind = 9)),
            "mapping 555555600000-555555618000 is of no known kind",
        ),
        (
            "guard-outside",
            Built(|parts| parts.space(|space| space.mappings[1].guards[0].end += PAGE_SIZE)),
            "mapping 555555600000-555555618000 has guard regions outside of it or out of order",
        ),
        // Impossible page maps.
        (
            "map-leaf-flipped",
            Damaged(|files| {
                let mut map = files[MAP].clone();
                map[50] ^= 1;
                replace(files, MAP, map);
            }),
            "`map`: the leaf at offset 0 has the wrong checksum",
        ),
        (
            "map-leaf-elsewhere",
            Damaged(|files| {
                let records = records::<32>(&files[MAP]);
                replace(files, MAP, leaf(1, 32, &records));
            }),
            "`map`: the leaf at offset 0 belongs elsewhere",
        ),
        (
            "map-leaf-of-blocks",
            Damaged(|files| {
                let records = records::<32>(&files[MAP]);
                replace(files, MAP, leaf(0, 16, &records));
            }),
            "`map`: the leaf at offset 0 is of another file",
        ),
        (
            "range-of-no-kind",
            Built(|parts| parts.ranges[2][4] = 7),
            "`map`: the range at offset 96 is of an unknown kind",
        ),
        (
            "range-empty",
            Built(|parts| parts.word(2, 16, 0)),
            "`map`: the range at offset 96 is empty",
        ),
        (
            "range-of-the-kernel",
            Built(|parts| parts.word(2, 8, u64::MAX >> 12)),
            "`map`: the range at offset 96 does not begin at a user address",
        ),
        (
            "range-that-wraps",
            Built(|parts| parts.word(2, 16, u64::MAX)),
            "`map`: the range at offset 96 leaves the address space",
        ),
        (
            "range-twice",
            Built(|parts| {
                let range = parts.ranges[0];
                parts.ranges.insert(1, range);
            }),
            "`map` tells pages 555555558000-555555559000 of object 1, which the tree does not have, or a second time",
        ),
        (
            "range-too-long",
            Built(|parts| parts.word(0, 16, 3)),
            "`map` tells pages 555555558000-55555555b000 of object 1",
        ),
        (
            "range-missing",
            Built(|parts| {
                parts.ranges.remove(3);
            }),
            "`map` does not tell pages 55555560f000-555555611000 of object 1",
        ),
        (
            "range-missing-at-the-end",
            Built(|parts| {
                parts.ranges.pop();
            }),
            "`map` does not tell pages 555555617000-555555618000 of object 1",
        ),
        (
            "range-of-another-object",
            Built(|parts| parts.ranges[0][0] = 2),
            "`map` does not tell pages 555555558000-55555555a000 of object 1",
        ),
        (
            "range-of-other-pages",
            Built(|parts| parts.word(2, 24, 0)),
            "`map`: the range at offset 96 has not the data pages that follow those before",
        ),
        (
            "memory-in-a-guard-region",
            Built(|parts| parts.ranges[6][4] = 2),
            "`map` has memory in the guard region pages 555555617000-555555618000 of object 1",
        ),
        // Impossible page stores.
        (
            "block-out-of-place",
            Built(|parts| parts.blocks[1][0] ^= 1),
            "`blocks`: the block at offset 48 does not lie behind the one before",
        ),
        (
            "block-empty",
            Built(|parts| parts.blocks[0][8..12].fill(0)),
            "`blocks`: the block at offset 32 has an impossible length",
        ),
        (
            "block-too-long",
            Built(|parts| parts.blocks[1][8..12].copy_from_slice(&8192_u32.to_le_bytes())),
            "`blocks`: the block at offset 48 has an impossible length",
        ),
        (
            "block-short-of-its-file",
            Built(|parts| parts.blocks[1][8..12].copy_from_slice(&100_u32.to_le_bytes())),
            "`blocks`: the block at offset 64 does not end where `pages` does",
        ),
        (
            "block-not-lz4",
            Built(|parts| {
                parts.pages[..64].fill(0xff);
                parts.seal_blocks();
            }),
            "`pages`: the block at offset 0 cannot be decoded, so page 555555559000 of object 1 is lost",
        ),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Whatever somebody puts into an image, with all checksums made right again: it is an image or it is refused, and nothing
    /// panics, hangs or takes the host's memory.
    #[test]
    fn no_image_is_more_than_refused(
        changes in prop::collection::vec((0usize..5, any::<prop::sample::Index>(), hostile()), 1..4),
    ) {
        let mut parts = Parts::of(&golden().join("v1"));
        for (file, place, bytes) in changes {
            let put = |target: &mut [u8]| {
                let at = place.index(target.len());
                let len = bytes.len().min(target.len() - at);
                target[at..at + len].copy_from_slice(&bytes[..len]);
            };
            match file {
                0 => parts.edit(20 + place.index(316), &bytes),
                1 => put(&mut parts.tree),
                2 => put(parts.ranges.as_flattened_mut()),
                3 => put(parts.blocks.as_flattened_mut()),
                _ => {
                    put(&mut parts.pages);
                    parts.seal_blocks();
                }
            }
        }
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("image");
        fs::create_dir(&path).expect("the folder is ours");
        for (file, bytes) in parts.seal() {
            fs::write(path.join(file), bytes).expect("the folder is ours");
        }
        match Image::open(&path) {
            Err(error) => prop_assert!(error.is_bad_image(), "{error}"),
            Ok(image) => {
                let verified = image.verify();
                prop_assert!(verified.as_ref().err().is_none_or(Error::is_bad_image));
                image.stored().expect("the map was checked");
                let all = PageRange { start: 0, end: crate::model::limits::ADDRESS_END };
                for run in image.runs(ROOT, all).expect("the map was checked") {
                    if run.kind == Some(PageKind::Data) {
                        let mut bytes = vec![0; run.range.byte_len() as usize];
                        let read = image.read(ROOT, run.range, &mut bytes);
                        prop_assert!(read.is_ok() || verified.is_err());
                    }
                }
            }
        }
    }
}

/// Bytes that somebody might put somewhere.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        any::<u8>().prop_map(|byte| vec![byte]),
        any::<[u8; 4]>().prop_map(|bytes| bytes.to_vec()),
        prop::sample::select(vec![
            0u64,
            1,
            15,
            16,
            17,
            1 << 31,
            1 << 32,
            1 << 47,
            u64::MAX >> 12,
            u64::MAX - 1,
            u64::MAX
        ])
        .prop_map(|number| number.to_le_bytes().to_vec()),
        (0u64..64).prop_map(|number| number.to_le_bytes().to_vec()),
    ]
}

#[test]
fn the_malformed_golden_images_are_those_that_are_made() {
    let folder = tempfile::tempdir().expect("a folder");
    let base = folder.path().join("base");
    write(&base);
    let committed = golden().join("malformed");
    if is_writing() {
        let _ = fs::remove_dir_all(&committed);
        fs::create_dir_all(&committed).expect("the folder is ours");
    }
    let mut sentences = String::new();
    let mut names = Vec::new();
    for (name, change, sentence) in cases() {
        let mut parts = Parts::of(&base);
        let files = match change {
            Built(change) => {
                change(&mut parts);
                parts.seal()
            }
            Damaged(change) => {
                let mut files = parts.seal();
                change(&mut files);
                files
            }
        };
        let path = committed.join(name);
        if is_writing() {
            fs::create_dir(&path).expect("names differ");
            for (file, bytes) in &files {
                fs::write(path.join(file), bytes).expect("the folder is ours");
            }
        }
        let mut found = Files::new();
        for file in fs::read_dir(&path).unwrap_or_else(|error| panic!("{name}: {error}")) {
            let file = file.expect("it can be read");
            let bytes = fs::read(file.path()).expect("it can be read");
            let known = files.keys().find(|known| file.file_name() == **known);
            found.insert(known.unwrap_or_else(|| panic!("{name}: {file:?}")), bytes);
        }
        assert!(found == files, "{name} is not what is made");
        sentences += &format!("{name}: {sentence}\n");
        names.push(name.to_owned());
        // The sentence itself is for the program's own tests; here, only that it is the image that is to blame.
        let refused = Image::open(&path).and_then(|image| image.verify());
        let error = refused.expect_err(name);
        assert!(error.is_bad_image(), "{name}: {error}");
    }
    let list = committed.join("sentences");
    if is_writing() {
        fs::write(&list, &sentences).expect("the folder is ours");
    }
    assert_eq!(
        fs::read_to_string(list).expect("it is committed"),
        sentences
    );
    names.push("sentences".to_owned());
    names.sort();
    let mut found: Vec<String> = fs::read_dir(committed)
        .expect("it is committed")
        .map(|entry| {
            let name = entry.expect("it can be read").file_name();
            name.to_string_lossy().into_owned()
        })
        .collect();
    found.sort();
    assert_eq!(found, names);
}
