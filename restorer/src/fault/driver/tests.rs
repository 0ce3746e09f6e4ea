//! The driver against the real kernel. The process to fill is a small Python program: it makes its own userfaultfd,
//! then forks, remaps, drops, guards and reads its memory while an in-memory source in this process serves it, and says
//! whether every byte was right.
//!
//! Needs root (page faults raised in system calls), Linux 6.15 and python3; without them the tests say so and pass,
//! unless `PAGEFERRY_TEST_STRICT=1`.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use pageferry_tracee::descriptor::PidFd;
use pageferry_wire::pages::PageBatchBuilder;

use super::*;

/// Pages of the subject's memory.
const PAGES: u64 = 4096;

/// The parts all subjects share: a mapping, a userfaultfd for it, and what each page must hold. Every eighth page is a
/// hole.
const PROLOGUE: &str = r#"
import ctypes, mmap, os, struct, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
PAGE, PAGES = 4096, 4096
def area(pages, at=None, flags=0x22):
    return libc.mmap(at, pages * PAGE, 3, flags, -1, 0)
base = area(PAGES)
uffd = libc.syscall(323, 0o2000000 | 0o4000)
assert uffd >= 0, "userfaultfd"
# FORK, REMAP, REMOVE, UNMAP, POISON
api = ctypes.create_string_buffer(struct.pack("QQQ", 0xaa, 2 | 4 | 8 | 64 | (1 << 14), 0))
assert libc.ioctl(uffd, ctypes.c_ulong(0xc018aa3f), api) == 0, "UFFDIO_API"
register = ctypes.create_string_buffer(struct.pack("QQQQ", base, PAGES * PAGE, 1, 0))
assert libc.ioctl(uffd, ctypes.c_ulong(0xc020aa00), register) == 0, "UFFDIO_REGISTER"
print(uffd, base, flush=True)
sys.stdin.readline()
os.close(uffd)
def expected(page):
    source = base // PAGE + page
    return bytes(PAGE) if page % 8 == 5 else struct.pack("Q", source) * 512
def read(address):
    return ctypes.string_at(address, PAGE)
def check(pages, at=None, what=""):
    at = base if at is None else at
    for page in pages:
        if read(at + page * PAGE) != expected(page):
            print("WRONG", what, page, read(at + page * PAGE)[:16], flush=True)
            os._exit(1)
"#;

struct Subject {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    base: u64,
    uffd: u32,
}

impl Subject {
    fn spawn(body: &str) -> Option<Self> {
        let script =
            format!("{PROLOGUE}\n{body}\nprint('PASS', flush=True)\nsys.stdin.readline()\n");
        let spawned = Command::new("python3")
            .arg("-c")
            .arg(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let subject = spawned.ok().and_then(|mut child| {
            let input = child.stdin.take()?;
            let mut output = BufReader::new(child.stdout.take()?);
            let mut line = String::new();
            output.read_line(&mut line).ok()?;
            let (uffd, base) = line.trim().split_once(' ')?;
            Some(Self {
                uffd: uffd.parse().ok()?,
                base: base.parse().ok()?,
                child,
                input,
                output,
            })
        });
        if subject.is_none() || !pagemap::knows_guards().unwrap_or(false) {
            assert!(
                std::env::var_os("PAGEFERRY_TEST_STRICT").is_none(),
                "python3, root and Linux 6.15 are needed"
            );
            eprintln!("skipped: python3, root and Linux 6.15 are needed");
            return None;
        }
        subject
    }

    fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    fn range(&self) -> PageRange {
        PageRange {
            start: self.base,
            end: self.base + PAGES * PAGE_SIZE,
        }
    }

    fn memory(&self) -> Memory {
        let fd = PidFd::open(self.pid())
            .and_then(|pidfd| pidfd.get_fd(self.uffd))
            .expect("our own child's descriptor");
        let lazy = vec![self.range()];
        Memory {
            object: 1,
            pids: vec![self.pid()],
            uffd: Uffd::adopt(fd),
            lazy,
            resident: Vec::new(),
            wipe_on_fork: Vec::new(),
        }
    }

    fn go(&mut self) {
        self.input
            .write_all(b"\n")
            .expect("the subject reads its input");
    }

    fn verdict(&mut self) -> String {
        let mut line = String::new();
        self.output
            .read_line(&mut line)
            .expect("the subject says something");
        line.trim().to_owned()
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        // Ended already, or hanging in a failed test.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Page contents as a function of the address, and what can go wrong with them.
#[derive(Clone, Copy)]
struct Source {
    base: u64,
    /// Bulk replies with a wrong bit in every page, by number. Few enough for the link to stay trusted.
    damaged: Option<(u64, u64)>,
    /// Pause before each bulk reply, so that threads fault in the meantime.
    bulk_pause: Duration,
}

impl Source {
    fn new(base: u64) -> Self {
        Self {
            base,
            damaged: None,
            bulk_pause: Duration::from_micros(200),
        }
    }

    fn is_hole(&self, address: u64) -> bool {
        (address - self.base) / PAGE_SIZE % 8 == 5
    }

    fn batch(&self, fetch: &Fetch) -> PageBatch {
        let range = fetch.range();
        let mut builder = PageBatchBuilder::new(
            fetch.object,
            fetch.request,
            range.start,
            fetch.page_count as usize,
        );
        for page in (range.start..range.end).step_by(PAGE_LEN) {
            if self.is_hole(page) {
                builder.without_data(PageKind::Zero, 1);
            } else {
                let word = (page / PAGE_SIZE).to_le_bytes();
                builder
                    .data(1)
                    .chunks_exact_mut(8)
                    .for_each(|slot| slot.copy_from_slice(&word));
            }
        }
        builder.finish()
    }

    fn map(&self) -> Vec<PageRange> {
        let pages = (0..PAGES).map(|page| PageRange::page_of(self.base + page * PAGE_SIZE));
        pages.filter(|page| !self.is_hole(page.start)).collect()
    }

    /// Serves until its requests end.
    fn serve(self) -> Connections {
        let (fault_fetches, mut fault_asked) = mpsc::unbounded_channel::<Fetch>();
        let (bulk_fetches, mut bulk_asked) = mpsc::unbounded_channel::<Fetch>();
        let (fault_answers, fault_pages) = mpsc::channel(64);
        let (bulk_answers, bulk_pages) = mpsc::channel(4);
        tokio::spawn(async move {
            while let Some(fetch) = fault_asked.recv().await {
                if fault_answers.send(self.batch(&fetch)).await.is_err() {
                    return;
                }
            }
        });
        tokio::spawn(async move {
            let mut count = 0_u64;
            while let Some(fetch) = bulk_asked.recv().await {
                tokio::time::sleep(self.bulk_pause).await;
                count += 1;
                let mut batch = self.batch(&fetch);
                if self
                    .damaged
                    .is_some_and(|(first, last)| first <= count && count <= last)
                {
                    batch = damaged(&batch);
                }
                if bulk_answers.send(batch).await.is_err() {
                    return;
                }
            }
        });
        Connections {
            fault_fetches,
            fault_pages,
            bulk_fetches,
            bulk_pages,
        }
    }
}

/// The same batch as it would come over a wire that flips one bit of each page: the checksums are those of the
/// original.
fn damaged(batch: &PageBatch) -> PageBatch {
    let encoded = pageferry_wire::Frame::from(batch.clone())
        .encode()
        .expect("a batch can be sent");
    let mut decoder = pageferry_wire::Decoder::new();
    for part in encoded.into_parts() {
        let mut part = part.to_vec();
        if part.len() == batch.data().len() {
            part.iter_mut()
                .step_by(PAGE_LEN)
                .for_each(|byte| *byte ^= 1);
        }
        decoder.push(&Bytes::from(part));
    }
    match decoder.pull() {
        Ok(Some(pageferry_wire::Frame::Pages(batch))) => batch,
        other => panic!("a batch, not {other:?}"),
    }
}

/// Fills a subject running `body` with the drain as told, and returns what the driver counted.
fn fill(body: &str, source: impl FnOnce(u64) -> Source, drain: bool) -> Option<Summary> {
    let mut subject = Subject::spawn(body)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let summary = runtime.block_on(async {
        let source = source(subject.base);
        let (driver, handle) = Driver::new(vec![subject.memory()], source.serve(), Options { drain, ..Options::default() }).expect("a driver");
        subject.go();
        let running = driver.run();
        tokio::pin!(running);
        // The map comes a little later, as it does in a crossing.
        let told = handle.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(5)).await;
            for piece in source.map().chunks(100) {
                told.map(1, piece);
            }
            told.map_end();
        });
        let verdict = tokio::task::spawn_blocking(move || (subject.verdict(), subject));
        tokio::pin!(verdict);
        let mut subject = None;
        let summary = loop {
            tokio::select! {
                summary = &mut running => break summary.expect("the process is filled"),
                said = &mut verdict, if subject.is_none() => {
                    let (said, who) = said.expect("the reader ends");
                    assert_eq!(said, "PASS");
                    subject = Some(who);
                    handle.drain(true);
                }
                () = tokio::time::sleep(Duration::from_secs(20)) => panic!("neither filled nor failed: {:?}", handle.progress()),
            }
        };
        // Everything is resident: the subject has to be right without us, too.
        if subject.is_none() {
            let (said, _) = verdict.await.expect("the reader ends");
            assert_eq!(said, "PASS");
        }
        summary
    });
    Some(summary)
}

const DATA_PAGES: u64 = PAGES / 8 * 7;

#[test]
fn four_threads_read_every_page_right_while_the_rest_streams_in() {
    let body = "
def reader(seed):
    import random
    pages = list(range(PAGES)); random.Random(seed).shuffle(pages)
    check(pages, what='thread')
threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]";
    let Some(summary) = fill(body, Source::new, true) else {
        return;
    };
    assert_eq!(
        (summary.pages_total, summary.pages_installed),
        (DATA_PAGES, DATA_PAGES)
    );
    assert!(summary.pages_faulted > 0);
}

#[test]
fn without_the_drain_only_what_is_touched_is_fetched() {
    let Some(mut subject) = Subject::spawn("check(range(0, 64))") else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let source = Source::new(subject.base);
        let (driver, handle) = Driver::new(vec![subject.memory()], source.serve(), Options { drain: false, ..Options::default() }).expect("a driver");
        handle.map(1, &source.map());
        handle.map_end();
        subject.go();
        let verdict = tokio::task::spawn_blocking(move || (subject.verdict(), subject));
        tokio::select! {
            summary = driver.run() => panic!("complete without its pages: {summary:?}"),
            said = verdict => {
                let (said, _subject) = said.expect("the reader ends");
                assert_eq!(said, "PASS");
                assert_eq!(handle.progress(), Progress { pages_total: DATA_PAGES, pages_resident: 56, pages_faulted: 56, pages_waiting: 0 });
            }
        }
    });
}

#[test]
fn a_program_may_fork_remap_drop_and_unmap_during_the_drain() {
    let body = "
check(range(0, 32), what='before')
def born(what):
    child = os.fork()
    if child == 0:
        check(range(0, 2048), what=what)
        os._exit(0)
    return child
children = [born('first child'), born('second child')]
# A child of a child.
middle = os.fork()
if middle == 0:
    inner = os.fork()
    check(range(1024, 1100), what='middle')
    if inner == 0:
        check(range(0, 512), what='inner')
        os._exit(0)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]))
children.append(middle)
# Moved: the pages follow, wherever they are.
new = area(512)
assert libc.mremap(base + 2048 * PAGE, 512 * PAGE, 512 * PAGE, 3, new) == new
check(range(2048, 2560), at=new - 2048 * PAGE, what='moved')
# Dropped: zeros, for ever.
assert libc.madvise(base + 3000 * PAGE, 200 * PAGE, 4) == 0
for page in range(3000, 3200):
    assert read(base + page * PAGE) == bytes(PAGE), 'dropped'
# Unmapped, and something else mapped there.
assert libc.munmap(base + 3200 * PAGE, 100 * PAGE) == 0
assert area(100, base + 3200 * PAGE, 0x22 | 0x10) == base + 3200 * PAGE
for page in range(3200, 3300):
    assert read(base + page * PAGE) == bytes(PAGE), 'mapped anew'
# Through a system call.
out = os.open('/dev/null', os.O_WRONLY)
r, w = os.pipe()
assert libc.write(w, base + 3400 * PAGE, PAGE) == PAGE
assert os.read(r, PAGE) == expected(3400), 'system call'
check(range(0, 2048), what='parent'); check(range(2560, 3000), what='parent'); check(range(3300, PAGES), what='parent')
for child in children:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, 'child'";
    for drain in [true, false] {
        let Some(summary) = fill(body, Source::new, drain) else {
            return;
        };
        assert_eq!(summary.forks, 4);
        assert!(
            summary.pages_zero > 0 && summary.pages_faulted > 0,
            "{summary:?}"
        );
    }
}

#[test]
fn a_guard_made_during_the_drain_is_not_overwritten_in_parent_or_child() {
    // Whether a guard stands is seen by process_vm_readv of the page: it stops short, without a signal.
    let body = "
import time
libc.process_vm_readv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
def guarded(page):
    buffer = ctypes.create_string_buffer(PAGE)
    local = struct.pack('QQ', ctypes.addressof(buffer), PAGE); remote = struct.pack('QQ', base + page * PAGE, PAGE)
    return libc.process_vm_readv(os.getpid(), ctypes.c_char_p(local), 1, ctypes.c_char_p(remote), 1, 0) != PAGE
assert libc.madvise(base + 2000 * PAGE, 8 * PAGE, 102) == 0
child = os.fork()
if child == 0:
    assert libc.madvise(base + 3000 * PAGE, 8 * PAGE, 102) == 0
    # The drain has been everywhere when this time is over; a fault of our own would not do, it would be the only one.
    time.sleep(2)
    ok = all(guarded(page) for page in list(range(2000, 2008)) + list(range(3000, 3008)))
    os._exit(0 if ok else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, 'child'
assert all(guarded(page) for page in range(2000, 2008)), 'parent'
assert libc.madvise(base + 2000 * PAGE, 8 * PAGE, 103) == 0
for page in range(2000, 2008):
    assert read(base + page * PAGE) == bytes(PAGE), 'a removed guard leaves zeros'
check(range(0, 2000)); check(range(2008, PAGES))";
    let Some(summary) = fill(
        body,
        |base| Source {
            bulk_pause: Duration::from_millis(2),
            ..Source::new(base)
        },
        true,
    ) else {
        return;
    };
    assert_eq!(summary.forks, 1);
}

#[test]
fn damaged_pages_never_reach_the_program() {
    // The program sleeps first: it would overtake the damaged batches by faulting.
    let source = |base| Source {
        damaged: Some((3, 7)),
        bulk_pause: Duration::ZERO,
        ..Source::new(base)
    };
    let Some(summary) = fill(
        "import time; time.sleep(0.3); check(range(PAGES))",
        source,
        true,
    ) else {
        return;
    };
    assert_eq!(summary.pages_installed, DATA_PAGES);
}

#[test]
fn threads_wait_for_a_lost_source_and_go_on_when_it_is_back() {
    let Some(mut subject) = Subject::spawn("check(range(PAGES))") else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let source = Source::new(subject.base);
        let (driver, handle) = Driver::new(vec![subject.memory()], source.serve(), Options { drain: false, ..Options::default() }).expect("a driver");
        handle.map(1, &source.map());
        handle.map_end();
        handle.link_lost();
        subject.go();
        let verdict = tokio::task::spawn_blocking(move || (subject.verdict(), subject));
        let running = driver.run();
        tokio::pin!(running, verdict);
        tokio::select! {
            ended = &mut running => panic!("{ended:?}"),
            said = &mut verdict => panic!("went on without its pages: {:?}", said.map(|(said, _)| said)),
            () = tokio::time::sleep(Duration::from_millis(200)) => {}
        }
        assert_eq!(handle.progress().pages_waiting, 1);
        handle.link_restored(source.serve());
        handle.drain(true);
        running.await.expect("filled after all");
        let (said, _subject) = verdict.await.expect("the reader ends");
        assert_eq!(said, "PASS");
    });
}

#[test]
fn a_process_that_ends_in_the_middle_ends_the_driver() {
    let body = "check(range(0, 100))\nprint('PASS', flush=True)\nos._exit(0)";
    let Some(summary) = fill(body, Source::new, true) else {
        return;
    };
    assert!(summary.pages_installed < DATA_PAGES, "{summary:?}");
}

/// One that was made in the memory of another here, and that nobody knows, outlives it and finds its pages.
#[cfg(target_arch = "x86_64")]
#[test]
fn memory_is_filled_as_long_as_anybody_is_in_it() {
    // read(0, one byte), write(1, 16 bytes of page 78), exit(0); then CLONE_VM | SIGCHLD.
    let body = r#"
code = area(16)
ctypes.memset(code, 0, 16 * PAGE)
text = (b"\x31\xff\x48\xbe" + struct.pack("Q", code + PAGE) + b"\xba\x01\0\0\0\x31\xc0\x0f\x05"
    + b"\xbf\x01\0\0\0\x48\xbe" + struct.pack("Q", base + 78 * PAGE) + b"\xba\x10\0\0\0\xb8\x01\0\0\0\x0f\x05"
    + b"\x31\xff\xb8\x3c\0\0\0\x0f\x05")
ctypes.memmove(code, text, len(text))
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
assert libc.mprotect(code, PAGE, 7) == 0
libc.clone.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
assert libc.clone(code, code + 16 * PAGE, 0x111, None) > 0
os._exit(0)"#;
    let Some(mut subject) = Subject::spawn(body) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let source = Source::new(subject.base);
        let (base, pid) = (subject.base, subject.pid());
        let (driver, handle) = Driver::new(
            vec![subject.memory()],
            source.serve(),
            Options {
                drain: false,
                ..Options::default()
            },
        )
        .expect("a driver");
        handle.map(1, &source.map());
        handle.map_end();
        let told = handle.clone();
        let page = tokio::task::spawn_blocking(move || {
            subject.go();
            subject.child.wait().expect("it ends");
            told.ended(pid);
            std::thread::sleep(3 * OWNERLESS_PAUSE);
            subject.go();
            let mut page = [0; 16];
            let read = std::io::Read::read_exact(&mut subject.output, &mut page);
            read.expect("the other one is there");
            page
        });
        // It ends with the last of them.
        let ended = tokio::time::timeout(Duration::from_secs(20), driver.run()).await;
        ended.expect("nobody is left").expect("nothing was lacking");
        let page = page.await.expect("the reader ends");
        let expected = (base / PAGE_SIZE + 78).to_le_bytes();
        assert_eq!(page, [expected, expected].concat()[..]);
    });
}

#[test]
fn children_that_have_ended_do_not_pile_up_while_the_drain_is_off() {
    let body = "
for round in range(200):
    child = os.fork()
    if child == 0:
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, 'child'";
    let Some(mut subject) = Subject::spawn(body) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let source = Source::new(subject.base);
        let (driver, _handle) = Driver::new(
            vec![subject.memory()],
            source.serve(),
            Options {
                drain: false,
                ..Options::default()
            },
        )
        .expect("a driver");
        subject.go();
        let verdict = tokio::task::spawn_blocking(move || (subject.verdict(), subject));
        let running = driver.run();
        tokio::select! {
            ended = running => panic!("{ended:?}"),
            said = verdict => {
                let (said, subject) = said.expect("the reader ends");
                assert_eq!(said, "PASS");
                drop(subject);
                let contexts = open_userfaultfds();
                assert!(contexts < 3 * SWEEP_MIN, "{contexts} contexts are open");
            }
        }
    });
}

/// Open userfaultfds of this process. Other tests of this binary have a few, too.
fn open_userfaultfds() -> usize {
    let links = std::fs::read_dir("/proc/self/fd")
        .expect("procfs")
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok());
    links
        .filter(|link| link.as_os_str() == "anon_inode:[userfaultfd]")
        .count()
}
