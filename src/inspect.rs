//! `pageferry inspect`: shows what an image holds. One thread and no process of its own, since an image may be anybody's; it
//! reads no page.

use std::collections::{BTreeMap, BTreeSet};

use pageferry_image::model::files::{self, File, file};
use pageferry_image::model::memory::{Kind, Mapping};
use pageferry_image::model::shared::{Shared, shared};
use pageferry_image::model::sockets;
use pageferry_image::model::task::{Process, Tree};
use pageferry_image::store::{FORMAT_VERSION, Image, PageKind, Stored};
use serde::Serialize;

use crate::cli::{Common, InspectArgs};
use crate::exit;
use crate::image::{ImageLine, failed, say, say_json, size, size_of_pages, utc};
use crate::report::plain;

/// One line on stdout under `--json`: `{"type": …, "data": {…}}`. Addresses are hexadecimal texts.
#[derive(Debug, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "snake_case")]
enum Line<'a> {
    /// The whole.
    Image(ImageLine<'a>),
    /// A process; its threads, mappings and descriptors follow.
    Process {
        pid: i32,
        ppid: i32,
        pgid: i32,
        sid: i32,
        program: &'a str,
        cwd: &'a str,
        umask: u32,
        /// Whose descriptors it has, if not its own; none are listed for it.
        #[serde(skip_serializing_if = "Option::is_none")]
        table_of: Option<i32>,
        /// Whose directory and umask these are, if not its own.
        #[serde(skip_serializing_if = "Option::is_none")]
        directory_of: Option<i32>,
        /// Whose memory it has, if not its own; no mappings are listed for it.
        #[serde(skip_serializing_if = "Option::is_none")]
        memory_of: Option<i32>,
        /// Whose signal actions it has, if not its own.
        #[serde(skip_serializing_if = "Option::is_none")]
        actions_of: Option<i32>,
    },
    /// A process that has ended and that its parent has not waited for.
    Zombie {
        pid: i32,
        ppid: i32,
        pgid: i32,
        sid: i32,
        comm: &'a str,
        uid: u32,
        status: u32,
    },
    /// A thread of the process before.
    Thread {
        pid: i32,
        tid: i32,
        comm: &'a str,
        uid: u32,
        gid: u32,
        pending_signals: usize,
    },
    /// A mapping of the process before.
    Mapping {
        pid: i32,
        start: String,
        end: String,
        prot: String,
        kind: &'static str,
        file: Option<&'a str>,
        /// The shared object that is mapped, if it is one.
        #[serde(skip_serializing_if = "Option::is_none")]
        shared: Option<u32>,
        offset: u64,
        name: &'a str,
        guards: usize,
    },
    /// A descriptor of the process before.
    Descriptor {
        pid: i32,
        fd: u32,
        file: u32,
        close_on_exec: bool,
    },
    /// An open file description.
    File {
        id: u32,
        kind: &'static str,
        flags: u32,
        what: String,
    },
    /// A pipe, with what lies unread in it.
    Pipe {
        id: u32,
        capacity_bytes: u32,
        queued_bytes: usize,
    },
    /// A shared object; its pages are those of object number process count + id.
    Shared {
        id: u32,
        kind: &'static str,
        size_bytes: u64,
        what: String,
    },
    /// The pages of one object: 1 is the address space of the root. Behind the address spaces are the shared objects.
    Pages {
        object: u32,
        data: u64,
        zero: u64,
        hole: u64,
        guard: u64,
    },
}

/// Runs `inspect`.
pub fn run(args: &InspectArgs, common: &Common) -> u8 {
    let opened = Image::open(&args.image).and_then(|image| Ok((image.stored()?, image)));
    let (stored, image) = match opened {
        Ok(opened) => opened,
        Err(error) => return failed(&error),
    };
    let said = if common.json {
        json(&image, &stored)
    } else {
        text(&image, &stored)
    };
    match said {
        Ok(()) => exit::DONE,
        Err(error) => {
            eprintln!("pageferry: stdout: {error}");
            exit::FAILED
        }
    }
}

fn json(image: &Image, stored: &[Stored]) -> std::io::Result<()> {
    let tree = image.tree();
    say_json(&Line::Image(ImageLine::new(image.path(), image.header())))?;
    for process in &tree.processes {
        let pid = process.pid;
        say_json(&Line::Process {
            pid,
            ppid: process.ppid,
            pgid: process.pgid,
            sid: process.sid,
            program: program(tree, process),
            cwd: &process.cwd,
            umask: process.umask,
            table_of: Some(process.table_of).filter(|&pid| pid != 0),
            directory_of: Some(process.directory_of).filter(|&pid| pid != 0),
            memory_of: Some(process.memory_of).filter(|&pid| pid != 0),
            actions_of: Some(process.actions_of).filter(|&pid| pid != 0),
        })?;
        for thread in &process.threads {
            let ids = thread.credentials.as_ref();
            say_json(&Line::Thread {
                pid,
                tid: thread.tid,
                comm: &thread.comm,
                uid: ids.map_or(0, |ids| ids.euid),
                gid: ids.map_or(0, |ids| ids.egid),
                pending_signals: thread.pending.len(),
            })?;
        }
        for mapping in mappings(process) {
            say_json(&Line::Mapping {
                pid,
                start: format!("{:#x}", mapping.start),
                end: format!("{:#x}", mapping.end),
                prot: protection(mapping),
                kind: kind_of(mapping),
                file: mapping.file.as_ref().map(|file| file.path.as_str()),
                shared: Some(mapping.shared).filter(|&id| id != 0),
                offset: mapping.offset,
                name: &mapping.name,
                guards: mapping.guards.len(),
            })?;
        }
        for descriptor in &process.descriptors {
            say_json(&Line::Descriptor {
                pid,
                fd: descriptor.fd,
                file: descriptor.file,
                close_on_exec: descriptor.close_on_exec,
            })?;
        }
    }
    for zombie in &tree.zombies {
        say_json(&Line::Zombie {
            pid: zombie.pid,
            ppid: zombie.ppid,
            pgid: zombie.pgid,
            sid: zombie.sid,
            comm: &zombie.comm,
            uid: zombie.uid,
            status: zombie.status,
        })?;
    }
    for file in &tree.files {
        let (kind, what) = described(file, &tree.shared);
        say_json(&Line::File {
            id: file.id,
            kind,
            flags: file.flags,
            what,
        })?;
    }
    for pipe in &tree.pipes {
        say_json(&Line::Pipe {
            id: pipe.id,
            capacity_bytes: pipe.capacity,
            queued_bytes: pipe.content.len(),
        })?;
    }
    for shared in &tree.shared {
        say_json(&Line::Shared {
            id: shared.id,
            kind: kind_of_shared(shared),
            size_bytes: shared.size,
            what: shared.name(),
        })?;
    }
    for stored in stored {
        say_json(&Line::Pages {
            object: stored.object.0,
            data: stored.counts.of(PageKind::Data),
            zero: stored.counts.of(PageKind::Zero),
            hole: stored.counts.of(PageKind::Hole),
            guard: stored.counts.of(PageKind::Guard),
        })?;
    }
    Ok(())
}

fn text(image: &Image, stored: &[Stored]) -> std::io::Result<()> {
    let (header, tree) = (image.header(), image.tree());
    let origin = &header.origin;
    say(&format!(
        "image {}: format {FORMAT_VERSION}, dumped {} on {} by pageferry {}",
        plain(&image.path().display().to_string()),
        utc(origin.created_ns),
        plain(&origin.host),
        plain(&origin.program),
    ))?;
    say(&format!("  id {}", crate::migrate::hex(&origin.id)))?;
    say(&format!("  {} on disk", size(header.stored_len())))?;
    for stored in stored {
        let count = |kind| size_of_pages(stored.counts.of(kind));
        say(&format!(
            "  pages: {} data, stored as {}; {} zero; {} never touched; {} guards",
            count(PageKind::Data),
            size(header.stored_pages_len()),
            count(PageKind::Zero),
            count(PageKind::Hole),
            count(PageKind::Guard),
        ))?;
    }
    for process in &tree.processes {
        text_of_process(process, tree)?;
    }
    for zombie in &tree.zombies {
        let how = match zombie.signal() {
            0 => format!("exit code {}", zombie.code()),
            signal => format!("signal {signal}"),
        };
        say(&format!(
            "ended {} {}: {how}; parent {} has not waited for it",
            zombie.pid,
            plain(&zombie.comm),
            zombie.ppid
        ))?;
    }
    for shared in &tree.shared {
        let name = plain(&shared.name());
        say(&format!("{name}: {}", size(shared.size)))?;
    }
    let processes = tree.processes.iter();
    let held: BTreeSet<u32> = processes
        .flat_map(|process| &process.descriptors)
        .map(|descriptor| descriptor.file)
        .collect();
    for file in tree.files.iter().filter(|file| !held.contains(&file.id)) {
        let (kind, what) = described(file, &tree.shared);
        say(&format!("in a message: {kind} {}", plain(&what)))?;
    }
    Ok(())
}

fn text_of_process(process: &Process, tree: &Tree) -> std::io::Result<()> {
    let name = process.threads.first().map_or("", |leader| &leader.comm);
    say(&format!(
        "process {} {}: {}",
        process.pid,
        plain(name),
        plain(program(tree, process))
    ))?;
    say(&format!(
        "  parent {}, group {}, session {}; directory {}",
        process.ppid,
        process.pgid,
        process.sid,
        plain(&process.cwd)
    ))?;
    say(&format!("  threads: {}", process.threads.len()))?;
    for thread in &process.threads {
        say(&format!("    {:>7} {}", thread.tid, plain(&thread.comm)))?;
    }
    let mut kinds: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    for mapping in mappings(process) {
        let (count, bytes) = kinds.entry(kind_of(mapping)).or_default();
        *count += 1;
        *bytes += mapping.end - mapping.start;
    }
    if process.memory_of != 0 {
        say(&format!("  mappings: those of {}", process.memory_of))?;
    } else {
        say(&format!("  mappings: {}", mappings(process).len()))?;
    }
    for (kind, (count, bytes)) in kinds {
        say(&format!("    {count:>7} {kind}, {}", size(bytes)))?;
    }
    if process.table_of != 0 {
        say(&format!("  descriptors: those of {}", process.table_of))?;
    } else {
        say(&format!("  descriptors: {}", process.descriptors.len()))?;
    }
    for descriptor in &process.descriptors {
        let (kind, what) = File::find(&tree.files, descriptor.file)
            .map(|file| described(file, &tree.shared))
            .unwrap_or_default();
        say(&format!("    {:>7} {kind} {}", descriptor.fd, plain(&what)))?;
    }
    Ok(())
}

fn program<'t>(tree: &'t Tree, process: &'t Process) -> &'t str {
    let space = tree.space_of(process);
    space
        .and_then(|space| space.exe.as_ref())
        .map_or("", |exe| &exe.path)
}

fn mappings(process: &Process) -> &[Mapping] {
    process.space.as_ref().map_or(&[], |space| &space.mappings)
}

/// As in `/proc/PID/maps`.
fn protection(mapping: &Mapping) -> String {
    let letter = |bit, letter| if mapping.prot & bit != 0 { letter } else { '-' };
    let shared = matches!(mapping.kind(), Kind::FileShared | Kind::Shared);
    [
        letter(1, 'r'),
        letter(2, 'w'),
        letter(4, 'x'),
        if shared { 's' } else { 'p' },
    ]
    .iter()
    .collect()
}

fn kind_of(mapping: &Mapping) -> &'static str {
    match mapping.kind() {
        Kind::Invalid => "unknown",
        Kind::Anon => "anonymous",
        Kind::FilePrivate => "private file",
        Kind::FileShared => "shared file",
        Kind::Shared => "shared object",
        Kind::Vvar => "vvar",
        Kind::Vdso => "vdso",
    }
}

fn kind_of_shared(shared: &Shared) -> &'static str {
    match &shared.kind {
        None => "unknown",
        Some(shared::Kind::Anonymous(_)) => "anonymous",
        Some(shared::Kind::Memfd(_)) => "memfd",
        Some(shared::Kind::Carried(_)) => "file",
        Some(shared::Kind::Segment(_)) => "segment",
    }
}

/// What an open file description is: its kind, and which.
fn described(file: &File, objects: &[Shared]) -> (&'static str, String) {
    match &file.kind {
        None => ("unknown", String::new()),
        Some(file::Kind::Regular(regular)) => {
            let path = regular.identity.as_ref().map(|identity| &identity.path);
            ("file", path.cloned().unwrap_or_default())
        }
        Some(file::Kind::Shared(shared)) => {
            let object = Shared::find(objects, shared.object);
            (
                "shared object",
                object.map(Shared::name).unwrap_or_default(),
            )
        }
        Some(file::Kind::Directory(directory)) => ("directory", directory.path.clone()),
        Some(file::Kind::Device(device)) => ("device", device.path.clone()),
        Some(file::Kind::Pipe(files::PipeEnd { pipe, write_end })) => {
            let end = if *write_end { "write end" } else { "read end" };
            ("pipe", format!("{pipe}, {end}"))
        }
        Some(file::Kind::Fifo(fifo)) => ("named pipe", fifo.path.clone()),
        Some(file::Kind::Eventfd(eventfd)) => ("eventfd", format!("at {}", eventfd.count)),
        Some(file::Kind::Epoll(epoll)) => ("epoll", format!("of {}", epoll.items.len())),
        Some(file::Kind::Timerfd(timerfd)) => ("timerfd", format!("clock {}", timerfd.clock)),
        Some(file::Kind::Signalfd(signalfd)) => ("signalfd", format!("{:#x}", signalfd.mask)),
        Some(file::Kind::Socket(socket)) => ("socket", described_socket(socket)),
    }
}

fn described_socket(socket: &sockets::Socket) -> String {
    let family = match socket.family {
        1 => "UNIX",
        2 => "IPv4",
        10 => "IPv6",
        _ => "unknown",
    };
    let kind = match socket.r#type {
        1 => "stream",
        2 => "datagram",
        5 => "seqpacket",
        _ => "unknown",
    };
    let state = match socket.state() {
        sockets::State::Invalid => "unknown",
        sockets::State::Unbound => "unbound",
        sockets::State::Bound => "bound",
        sockets::State::Listening => "listening",
        sockets::State::Paired => "paired",
        sockets::State::Dropped => "dropped",
        sockets::State::Waiting => "waiting to be accepted",
    };
    let mut text = format!("{family} {kind}, {state}");
    if socket.pair != 0 {
        let queued: usize = socket.queue.iter().map(Vec::len).sum();
        text += &format!(", pair {}, {queued} bytes unread", socket.pair);
    }
    let travel = socket.in_flight().count();
    if travel > 0 {
        text += &format!(", {travel} open files in its messages");
    }
    if !socket.waiting.is_empty() {
        text += &format!(", {} waiting to be accepted", socket.waiting.len());
    }
    if let Some(name) = sockets::unix_name(&socket.local) {
        text += &format!(", {name}");
    }
    // A port is the second half-word of both Internet addresses, in network order.
    if let (2 | 10, Some(port)) = (socket.family, socket.local.get(2..4)) {
        text += &format!(", port {}", u16::from_be_bytes([port[0], port[1]]));
    }
    text
}
