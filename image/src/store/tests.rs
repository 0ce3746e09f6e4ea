//! Images that are written are read as they were; what is torn leaves nothing; what is changed is noticed.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::model::memory::{FileIdentity, Kind, Mapping, Range, Space};
use crate::model::shared::{Anonymous, Shared, shared};
use crate::model::task::{Credentials, Host, Process, Scheduling, Thread};
use crate::page::{PAGE_LEN, PAGE_SIZE};

const ROOT: ObjectId = ObjectId::ROOT_SPACE;
const AT: u64 = 0x1000_0000;

fn origin(id: u8) -> Origin {
    Origin {
        id: [id; 16],
        created_ns: u64::from(id) * 1_000_000_000,
        host: "alpha".into(),
        program: "0.1.0".into(),
    }
}

fn file() -> FileIdentity {
    FileIdentity {
        path: "/bin/true".into(),
        ..FileIdentity::default()
    }
}

/// A tree with these mappings: first page and count, and whether it is a file's.
fn tree(mappings: &[(u64, u64, bool)]) -> Tree {
    let mappings = mappings.iter().map(|&(page, count, is_file)| Mapping {
        start: AT + page * PAGE_SIZE,
        end: AT + (page + count) * PAGE_SIZE,
        prot: 3,
        kind: if is_file {
            Kind::FilePrivate
        } else {
            Kind::Anon
        }
        .into(),
        file: is_file.then(file),
        ..Mapping::default()
    });
    Tree {
        processes: vec![Process {
            pid: 7,
            threads: vec![Thread {
                tid: 7,
                comm: "seven".into(),
                registers: vec![0; 216],
                xsave: vec![0; 576],
                credentials: Some(Credentials::default()),
                scheduling: Some(Scheduling {
                    affinity_default: true,
                    ..Scheduling::default()
                }),
                ..Thread::default()
            }],
            space: Some(Space {
                mappings: mappings.collect(),
                exe: Some(file()),
                ..Space::default()
            }),
            cwd: "/".into(),
            ..Process::default()
        }],
        host: Some(Host {
            page_size: 4096,
            ..Host::default()
        }),
        ..Tree::default()
    }
}

fn range(page: u64, count: u64) -> PageRange {
    PageRange {
        start: AT + page * PAGE_SIZE,
        end: AT + (page + count) * PAGE_SIZE,
    }
}

/// What page number `page` holds: compressible or not, by its number.
fn content(page: u64) -> Vec<u8> {
    let mut state = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let period = if page % 3 == 0 { 1 } else { 64 };
    let mut bytes = vec![0; PAGE_LEN];
    for (at, byte) in bytes.iter_mut().enumerate() {
        if at % period == 0 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
        }
        *byte = state as u8;
    }
    bytes[0] = 1;
    bytes
}

/// Writes pages of these kinds, from page 0 on, as one anonymous mapping.
fn write(path: &Path, kinds: &[PageKind], compression: Compression) -> Header {
    let tree = tree(&[(0, kinds.len() as u64, false)]);
    let mut writer = ImageWriter::create(path, tree, origin(1), compression).expect("a good tree");
    for (page, &kind) in kinds.iter().enumerate() {
        let page = page as u64;
        match kind {
            PageKind::Data => writer
                .pages(ROOT, range(page, 1).start, &content(page))
                .expect("the next page"),
            kind => writer
                .without_data(ROOT, kind, range(page, 1))
                .expect("the next page"),
        }
    }
    writer.finish().expect("all pages")
}

/// The names in a folder.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .expect("it is ours")
        .map(|entry| {
            let name = entry.expect("it can be read").file_name();
            name.to_string_lossy().into_owned()
        })
        .collect();
    names.sort();
    names
}

fn damage(error: Error) -> Damage {
    match error {
        Error::Bad { damage, .. } | Error::Unwritable(damage) => damage,
        other => panic!("no damage: {other:?}"),
    }
}

/// Reads `pages` in pieces of `piece` pages, and tells the kind of each.
fn read_back(image: &Image, pages: PageRange, piece: u64) -> Vec<PageKind> {
    let mut kinds = Vec::new();
    let mut at = pages.start;
    while at < pages.end {
        let asked = PageRange {
            start: at,
            end: pages.end.min(at + piece * PAGE_SIZE),
        };
        for run in image.runs(ROOT, asked).expect("a good image") {
            assert_eq!(run.range.start, at, "no gaps");
            at = run.range.end;
            let kind = run.kind.expect("all of it is mapped");
            kinds.extend((0..run.range.page_count()).map(|_| kind));
            if kind != PageKind::Data {
                continue;
            }
            let mut bytes = vec![0; run.range.byte_len() as usize];
            image
                .read(ROOT, run.range, &mut bytes)
                .expect("a good image");
            for (index, page) in bytes.chunks(PAGE_LEN).enumerate() {
                let number = (run.range.start - AT) / PAGE_SIZE + index as u64;
                assert!(page == content(number), "page {number}");
            }
        }
    }
    kinds
}

fn kind() -> impl Strategy<Value = PageKind> {
    prop::sample::select(PageKind::ALL.to_vec())
}

/// The pages of shared objects stand behind those of the address spaces, each object's from 0 on.
#[test]
fn shared_objects_come_back_behind_the_address_spaces() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    let mut tree = tree(&[(0, 1, false)]);
    let anonymous = shared::Kind::Anonymous(Anonymous::default());
    for id in 1..=2 {
        tree.shared.push(Shared {
            id,
            size: 3 * PAGE_SIZE,
            kind: Some(anonymous.clone()),
        });
        tree.processes[0]
            .space
            .as_mut()
            .expect("it has one")
            .mappings
            .push(Mapping {
                kind: Kind::Shared.into(),
                shared: id,
                ..anonymous_at(u64::from(id))
            });
    }
    let mut writer =
        ImageWriter::create(&path, tree, origin(1), Compression::Raw).expect("a good tree");
    let pages = |from, to| PageRange {
        start: from * PAGE_SIZE,
        end: to * PAGE_SIZE,
    };
    writer
        .without_data(ROOT, PageKind::Hole, range(0, 1))
        .expect("the next");
    for (index, at) in [(0, 0), (1, 2)] {
        let object = ObjectId::shared(1, index);
        writer
            .without_data(object, PageKind::Hole, pages(0, at))
            .expect("the next");
        writer
            .pages(object, at * PAGE_SIZE, &content(at))
            .expect("the next");
        writer
            .without_data(object, PageKind::Hole, pages(at + 1, 3))
            .expect("the next");
    }
    writer.finish().expect("all pages");
    let image = Image::open(&path).expect("what was written");
    image.verify().expect("what was written");
    let objects: Vec<_> = image.stored().expect("a good image");
    let objects: Vec<u32> = objects.iter().map(|stored| stored.object.0).collect();
    assert_eq!(objects, [1, 2, 3]);
    for (index, at) in [(0, 0), (1, 2)] {
        let mut bytes = vec![0; PAGE_LEN];
        let object = ObjectId::shared(1, index);
        image
            .read(object, pages(at, at + 1), &mut bytes)
            .expect("a good image");
        assert!(bytes == content(at), "page {at}");
    }
}

fn anonymous_at(number: u64) -> Mapping {
    let start = AT + (number << 30);
    Mapping {
        start,
        end: start + PAGE_SIZE,
        prot: 3,
        ..Mapping::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_mixture_of_pages_comes_back(
        runs in prop::collection::vec((kind(), 1usize..40), 1..60),
        is_packed: bool,
        piece in 1u64..100,
    ) {
        let kinds: Vec<PageKind> = runs.iter().flat_map(|&(kind, count)| vec![kind; count]).collect();
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("image");
        let header = write(&path, &kinds, if is_packed { Compression::Lz4 } else { Compression::Raw });
        let image = Image::open(&path).expect("what was written");
        prop_assert_eq!(image.header(), &header);
        prop_assert_eq!(image.tree(), &tree(&[(0, kinds.len() as u64, false)]));
        image.verify().expect("what was written");
        prop_assert_eq!(read_back(&image, range(0, kinds.len() as u64), piece), kinds);
    }

    /// Whatever byte changes in whatever file: it is noticed, by open or by verify.
    #[test]
    fn no_flipped_bit_goes_unnoticed(file in 0usize..5, place: prop::sample::Index, bit in 0u8..8) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("image");
        let kinds: Vec<PageKind> = (0..50).map(|page| PageKind::ALL[page / 3 % 4]).collect();
        write(&path, &kinds, Compression::Lz4);
        let name = path.join(FILES[file]);
        let mut bytes = fs::read(&name).expect("it is there");
        let at = place.index(bytes.len());
        bytes[at] ^= 1 << bit;
        fs::write(&name, bytes).expect("it is ours");
        let found = Image::open(&path).and_then(|image| image.verify());
        prop_assert!(found.is_err_and(|error| error.is_bad_image()), "{} at {at}", FILES[file]);
    }
}

#[test]
fn zero_pages_among_data_are_found_and_take_no_room() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    let mut writer =
        ImageWriter::create(&path, tree(&[(0, 6, false)]), origin(1), Compression::Raw)
            .expect("a good tree");
    let mut bytes = [content(0), content(1)].concat();
    bytes.extend(vec![0; 3 * PAGE_LEN]);
    bytes.extend(content(5));
    writer.pages(ROOT, AT, &bytes).expect("all pages");
    let header = writer.finish().expect("all pages");
    assert_eq!((header.counts.data_pages, header.counts.zero_pages), (3, 3));
    let image = Image::open(&path).expect("what was written");
    let kinds: Vec<_> = read_back(&image, range(0, 6), 6);
    assert_eq!(
        kinds[1..4],
        [PageKind::Data, PageKind::Zero, PageKind::Zero]
    );
    assert_eq!(
        image.stored().expect("a good image"),
        [Stored {
            object: ROOT,
            counts: header.counts
        }]
    );
}

#[test]
fn what_is_not_mapped_is_told_as_nothing_and_never_as_zeros() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    let mapped = tree(&[(0, 2, false), (4, 2, true)]);
    let mut writer =
        ImageWriter::create(&path, mapped, origin(1), Compression::Lz4).expect("a good tree");
    for page in [0, 1] {
        writer
            .pages(ROOT, range(page, 1).start, &content(page))
            .expect("the next page");
    }
    writer
        .without_data(ROOT, PageKind::Hole, range(4, 2))
        .expect("the next pages");
    writer.finish().expect("all pages");
    let image = Image::open(&path).expect("what was written");
    let run = |page, count, kind| PageRun {
        range: range(page, count),
        kind,
    };
    assert_eq!(
        image.runs(ROOT, range(1, 9)).expect("a good image"),
        [
            run(1, 1, Some(PageKind::Data)),
            run(2, 2, None),
            run(4, 2, Some(PageKind::Hole)),
            run(6, 4, None)
        ]
    );
    for other in [ObjectId(0), ObjectId(2)] {
        assert_eq!(
            image.runs(other, range(0, 1)).expect("a good image"),
            [run(0, 1, None)]
        );
    }
    let mut bytes = vec![0; 2 * PAGE_LEN];
    let error = image
        .read(ROOT, range(1, 2), &mut bytes)
        .expect_err("page 2 is not there");
    assert_eq!(
        damage(error),
        Damage::NoData {
            object: ROOT,
            address: range(2, 1).start
        }
    );
    let error = image
        .read(ROOT, range(4, 2), &mut bytes)
        .expect_err("a hole has no bytes");
    assert!(matches!(damage(error), Damage::NoData { .. }));
}

/// Many leaves of the map: a page is found wherever it is asked for.
#[test]
fn pages_are_found_in_a_map_of_many_leaves() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    let kinds: Vec<PageKind> = (0..2000)
        .map(|page| {
            if page % 2 == 0 {
                PageKind::Data
            } else {
                PageKind::Hole
            }
        })
        .collect();
    let header = write(&path, &kinds, Compression::Lz4);
    assert!(header.map.len > 10 * leaves::LEN as u64);
    let image = Image::open(&path).expect("what was written");
    assert_eq!(read_back(&image, range(0, 2000), 1), kinds);
    assert_eq!(read_back(&image, range(0, 2000), 2000), kinds);
    let runs = image.runs(ROOT, range(0, 2000)).expect("a good image");
    assert!(
        (limits::RUNS - 2..=limits::RUNS).contains(&runs.len()),
        "{}",
        runs.len()
    );
    // Any number of readers at once.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let image = image.clone();
            scope.spawn(move || read_back(&image, range(500, 1000), 64));
        }
    });
}

#[test]
fn pages_that_the_tree_does_not_have_are_not_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    let mut guarded = tree(&[(0, 4, false)]);
    if let Some(space) = guarded.processes[0].space.as_mut() {
        space.mappings[0].guards = vec![Range {
            start: range(1, 1).start,
            end: range(1, 1).end,
        }];
    }
    let begin = || {
        ImageWriter::create(&path, guarded.clone(), origin(1), Compression::Raw)
            .expect("a good tree")
    };
    let tell = |writer: &mut ImageWriter, kind, pages| {
        writer.without_data(ROOT, kind, pages).map_err(damage)
    };
    let (object, hole) = (ROOT, PageKind::Hole);
    assert_eq!(
        tell(&mut begin(), hole, range(2, 1)),
        Err(Damage::Uncovered {
            object,
            range: range(0, 2)
        })
    );
    assert_eq!(
        tell(&mut begin(), hole, range(0, 2)),
        Err(Damage::Unguarded {
            object,
            range: range(1, 1)
        })
    );
    let mut writer = begin();
    tell(&mut writer, hole, range(0, 1)).expect("the next page");
    assert_eq!(
        tell(&mut writer, hole, range(0, 1)),
        Err(Damage::Unasked {
            object,
            range: range(0, 1)
        })
    );
    drop(writer);
    let mut writer = begin();
    tell(&mut writer, hole, range(0, 1)).expect("the next page");
    tell(&mut writer, PageKind::Guard, range(1, 1)).expect("the next page");
    assert_eq!(
        tell(&mut writer, hole, range(2, 3)),
        Err(Damage::Unasked {
            object,
            range: range(2, 3)
        })
    );
    tell(&mut writer, hole, range(2, 1)).expect("the next page");
    assert_eq!(
        writer
            .finish()
            .map_err(damage)
            .expect_err("a page is missing"),
        Damage::Uncovered {
            object,
            range: range(3, 1)
        }
    );
    assert_eq!(
        names(folder.path()),
        Vec::<String>::new(),
        "nothing is left"
    );
    let impossible = tree(&[(0, 2, false), (1, 2, false)]);
    let error = ImageWriter::create(&path, impossible, origin(1), Compression::Raw)
        .expect_err("mappings overlap");
    assert!(matches!(damage(error), Damage::Tree(_)));
}

#[test]
fn images_are_private_and_never_overwritten() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    write(&path, &[PageKind::Data], Compression::Raw);
    assert_eq!(names(folder.path()), ["image"]);
    let mode = |path: &Path| {
        fs::metadata(path)
            .expect("it is there")
            .permissions()
            .mode()
            & 0o7777
    };
    assert_eq!(mode(&path), 0o700);
    assert_eq!(names(&path), ["blocks", "header", "map", "pages", "tree"]);
    for name in FILES {
        assert_eq!(mode(&path.join(name)), 0o600, "{name}");
    }
    let before = fs::read(path.join(HEADER)).expect("it is there");
    let create = |path: &Path| {
        ImageWriter::create(path, tree(&[(0, 1, false)]), origin(2), Compression::Raw)
    };
    assert!(matches!(create(&path), Err(Error::Exists { .. })));
    // One that gets its name while another is written; an empty folder, a file, a dangling link.
    for taken in ["other", "folder", "file", "link"] {
        let path = folder.path().join(taken);
        let mut writer = create(&path).expect("the name is free");
        writer.pages(ROOT, AT, &content(0)).expect("the next page");
        match taken {
            "other" => {
                write(&path, &[PageKind::Data], Compression::Raw);
            }
            "folder" => fs::create_dir(&path).expect("the name is free"),
            "file" => fs::write(&path, "x").expect("the name is free"),
            _ => std::os::unix::fs::symlink("nowhere", &path).expect("the name is free"),
        }
        assert!(
            matches!(writer.finish(), Err(Error::Exists { .. })),
            "{taken}"
        );
    }
    assert_eq!(
        names(folder.path()),
        ["file", "folder", "image", "link", "other"]
    );
    assert_eq!(fs::read(path.join(HEADER)).expect("it is there"), before);
}

/// Cut off anywhere, by a kill or a full disk, there is nothing under the image's name; and a copy that was cut off is refused.
#[test]
fn what_is_torn_is_no_image() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    let mut writer =
        ImageWriter::create(&path, tree(&[(0, 40, false)]), origin(1), Compression::Raw)
            .expect("a good tree");
    for page in 0..40 {
        assert_eq!(
            names(folder.path()),
            [format!("{}{}", write::UNFINISHED, "01".repeat(16))]
        );
        assert!(matches!(Image::open(&path), Err(Error::Io { .. })));
        writer
            .pages(ROOT, range(page, 1).start, &content(page))
            .expect("the next page");
    }
    writer.finish().expect("all pages");
    assert_eq!(names(folder.path()), ["image"]);
    for name in FILES {
        let whole = fs::read(path.join(name)).expect("it is there");
        for len in [0, 1, 15, 16, 19, 20, whole.len() / 2, whole.len() - 1] {
            fs::write(path.join(name), &whole[..len]).expect("it is ours");
            let found = damage(Image::open(&path).expect_err("it is cut off"));
            let is_told = match (name, len) {
                (HEADER, _) => found == Damage::HeaderLength { len: len as u64 },
                _ => matches!(found, Damage::Length { file, .. } if file == name),
            };
            assert!(is_told, "{name} at {len}: {found}");
        }
        let longer = [&whole[..], &[0]].concat();
        fs::write(path.join(name), longer).expect("it is ours");
        Image::open(&path).expect_err("something follows");
        fs::remove_file(path.join(name)).expect("it is ours");
        let found = damage(Image::open(&path).expect_err("it is gone"));
        assert!(
            matches!(found, Damage::Missing { .. } | Damage::NoHeader),
            "{name}: {found}"
        );
        fs::write(path.join(name), whole).expect("it is ours");
    }
    Image::open(&path)
        .and_then(|image| image.verify())
        .expect("it is whole again");
}

/// A link, a folder and a pipe in place of a file: neither followed nor waited for.
#[test]
fn only_regular_files_are_opened() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    write(&path, &[PageKind::Data], Compression::Raw);
    for name in FILES {
        let file = path.join(name);
        let aside = folder.path().join(name);
        fs::rename(&file, &aside).expect("it is ours");
        let refused = || {
            let found = damage(Image::open(&path).expect_err("no regular file"));
            assert_eq!(found, Damage::NoFile { file: name });
        };
        std::os::unix::fs::symlink(&aside, &file).expect("the name is free");
        refused();
        fs::remove_file(&file).expect("it is ours");
        fs::create_dir(&file).expect("the name is free");
        refused();
        fs::remove_dir(&file).expect("it is ours");
        let made = std::process::Command::new("mkfifo").arg(&file).status();
        assert!(made.expect("coreutils").success());
        refused();
        fs::remove_file(&file).expect("it is ours");
        fs::rename(&aside, &file).expect("it is ours");
    }
}

#[test]
fn a_bad_block_is_told_by_file_offset_and_address() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    write(&path, &[PageKind::Data; 40], Compression::Raw);
    let image = Image::open(&path).expect("what was written");
    let mut bytes = fs::read(path.join(PAGES)).expect("it is there");
    bytes[20 * PAGE_LEN + 5] ^= 1;
    fs::write(path.join(PAGES), bytes).expect("it is ours");
    let mut buffer = vec![0; PAGE_LEN];
    // Its block is that of pages 16 to 31; the others are still good.
    image
        .read(ROOT, range(15, 1), &mut buffer)
        .expect("a good block");
    image
        .read(ROOT, range(32, 1), &mut buffer)
        .expect("a good block");
    let block = |page| Damage::BlockChecksum {
        offset: 16 * PAGE_SIZE,
        object: ROOT,
        address: range(page, 1).start,
    };
    let error = image
        .read(ROOT, range(17, 1), &mut buffer)
        .expect_err("a bad block");
    assert_eq!(damage(error), block(17));
    assert_eq!(damage(image.verify().expect_err("a bad block")), block(16));
}

#[test]
fn the_shelf_lists_removes_and_prunes_images_only() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    for (id, name) in [(3, "third"), (1, "first"), (2, "second")] {
        let mut writer = ImageWriter::create(
            &at(name),
            tree(&[(0, 1, false)]),
            origin(id),
            Compression::Raw,
        )
        .expect("a good tree");
        writer.pages(ROOT, AT, &content(0)).expect("the next page");
        writer.finish().expect("all pages");
    }
    write(&at("bad"), &[PageKind::Data], Compression::Raw);
    let mut bytes = fs::read(at("bad").join(HEADER)).expect("it is there");
    bytes[100] ^= 1;
    fs::write(at("bad").join(HEADER), bytes).expect("it is ours");
    fs::create_dir(at("folder")).expect("the name is free");
    fs::write(at("file"), "x").expect("the name is free");
    fs::create_dir(at(".unfinished-00")).expect("the name is free");

    let listed = list_names(folder.path());
    assert_eq!(
        listed,
        ["third", "second", "first", "bad!", ".unfinished-00?"]
    );
    let entries = shelf::list(folder.path()).expect("it is ours");
    let pruned = |keep, within_s: Option<u64>| -> Vec<String> {
        let within = within_s.map(|s| s * 1_000_000_000);
        shelf::to_prune(&entries, keep, within, 3_000_000_000)
            .iter()
            .map(|entry| {
                entry
                    .path
                    .file_name()
                    .expect("it has one")
                    .to_string_lossy()
                    .into_owned()
            })
            .collect()
    };
    assert_eq!(pruned(Some(1), None), ["second", "first"]);
    assert_eq!(pruned(Some(9), None), Vec::<String>::new());
    assert_eq!(pruned(None, Some(1)), ["first"]);
    assert_eq!(pruned(Some(2), Some(0)), ["first"]);
    assert_eq!(pruned(Some(0), Some(0)), ["second", "first"]);

    // Not an image, or not only one.
    assert_eq!(
        damage(shelf::remove(&at("folder")).expect_err("no image")),
        Damage::NoHeader
    );
    assert_eq!(
        damage(shelf::remove(&at("file")).expect_err("no image")),
        Damage::NoHeader
    );
    std::os::unix::fs::symlink("third", at("link")).expect("the name is free");
    assert_eq!(
        damage(shelf::remove(&at("link")).expect_err("no image")),
        Damage::NoHeader
    );
    fs::write(at("third").join("notes"), "mine").expect("the name is free");
    assert_eq!(
        damage(shelf::remove(&at("third")).expect_err("more than an image")),
        Damage::Stranger {
            name: "notes".into()
        }
    );
    let stranger = Image::open(&at("third")).and_then(|image| image.verify());
    assert!(matches!(
        damage(stranger.expect_err("a stranger")),
        Damage::Stranger { .. }
    ));
    for name in ["first", "bad", ".unfinished-00"] {
        shelf::remove(&at(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    assert_eq!(list_names(folder.path()), ["third", "second"]);
    assert_eq!(
        names(folder.path()),
        ["file", "folder", "link", "second", "third"]
    );
}

/// The names that the shelf tells; `!` behind a damaged one, `?` behind a leftover.
fn list_names(folder: &Path) -> Vec<String> {
    let entries = shelf::list(folder).expect("it is ours");
    entries
        .iter()
        .map(|entry| {
            let name = entry
                .path
                .file_name()
                .expect("it has one")
                .to_string_lossy();
            let mark = match entry.state {
                shelf::State::Image(_) => "",
                shelf::State::Bad(_) => "!",
                shelf::State::Leftover => "?",
            };
            format!("{name}{mark}")
        })
        .collect()
}

/// The page that others go by says what the code does.
#[test]
fn the_document_has_the_numbers_of_the_code() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/image.md");
    let text = fs::read_to_string(path).expect("it is part of the project");
    let says = |line: String| assert!(text.contains(&line), "docs/image.md does not say: {line}");
    let mut places = header::PLACES.to_vec();
    places.sort_by_key(|&(_, offset)| offset);
    for (name, offset) in places {
        let row = text
            .lines()
            .find(|line| line.starts_with(&format!("| {offset} | ")));
        let field = row.and_then(|row| row.split(" | ").nth(2));
        assert_eq!(field, Some(name), "the field at {offset}");
    }
    for kind in PageKind::ALL {
        says(format!(
            "| {} | {} |",
            kind as u32,
            format!("{kind:?}").to_lowercase()
        ));
    }
    for file in FILES {
        says(format!("| `{file}` | "));
    }
    says(format!("This page is format {FORMAT_VERSION}."));
    says(format!("\n{} bytes. What is not listed", header::LEN));
    says(format!("*leaves* of {} bytes", leaves::LEN));
    says(format!(
        "Records of {} bytes ({} a leaf)",
        pagemap::RANGE_LEN,
        leaves::per_leaf::<{ pagemap::RANGE_LEN }>()
    ));
    says(format!(
        "one record of {} bytes ({} a leaf)",
        pagemap::BLOCK_LEN,
        leaves::per_leaf::<{ pagemap::BLOCK_LEN }>()
    ));
    says(format!("{BLOCK_PAGES} pages, the last block"));
    says(format!("`{}` and the hexadecimal id", write::UNFINISHED));
    says(format!(
        "| `tree` | {} bytes, and as decoded {} bytes of memory |",
        crate::model::limits::TREE_LEN,
        crate::model::limits::TREE_MEMORY
    ));
    says(format!("| ranges | {} |", limits::RANGES));
    says(format!("| data pages | {} |", limits::DATA_PAGES));
}
