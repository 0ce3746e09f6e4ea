//! Captures of live processes: a small C program sets things up, says so, and the model is compared with what it says.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pageferry_image::model::files::file;
use pageferry_image::model::sockets::{Attached, State};
use pageferry_image::page::PAGE_LEN;
use pageferry_tracee::{Registers, SeizeOptions};
use pageferry_wire::PageKind;

use super::*;
use crate::serve::PageReader;
use crate::survey::survey;

/// A program that runs until it is dropped.
struct Subject {
    child: Child,
    said: Vec<String>,
    _folder: tempfile::TempDir,
}

impl Subject {
    /// Compiles `body` as the body of main and starts it; it must end in `ready()`, and has said `name=value` lines before.
    fn start(body: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (source, program) = (
            folder.path().join("subject.c"),
            folder.path().join("subject"),
        );
        let text = format!(
            "#define _GNU_SOURCE\n{}\nstatic void ready(void) {{ puts(\"ready\"); fflush(stdout); close(1); open(\"/dev/null\", O_WRONLY); for (;;) pause(); }}\n{body}",
            include_str!("subject_includes.h")
        );
        std::fs::File::create(&source)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .expect("written");
        let compiled = Command::new("cc")
            .args(["-O1", "-w", "-pthread", "-o"])
            .arg(&program)
            .arg(&source)
            .status()
            .expect("cc runs");
        assert!(compiled.success(), "the subject compiles");
        let mut child = Command::new(&program)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .current_dir("/")
            .spawn()
            .expect("the subject starts");
        let mut said = Vec::new();
        for line in BufReader::new(child.stdout.take().expect("a pipe")).lines() {
            match line.expect("text").as_str() {
                "ready" => break,
                line => said.push(line.to_owned()),
            }
        }
        // The pipe's other end is closed right after the word.
        std::thread::sleep(Duration::from_millis(50));
        Self {
            child,
            said,
            _folder: folder,
        }
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// What it said of `name`, a number.
    fn said(&self, name: &str) -> u64 {
        let value = self
            .said
            .iter()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .expect("it was said");
        value
            .strip_prefix("0x")
            .map_or_else(|| value.parse(), |hex| u64::from_str_radix(hex, 16))
            .expect("a number")
    }

    fn refused(&self) -> Vec<&'static str> {
        self.refused_with(&SurveyOptions::default())
    }

    fn refused_with(&self, options: &SurveyOptions) -> Vec<&'static str> {
        survey(self.pid(), options)
            .expect("surveyed")
            .refusals
            .iter()
            .map(|refusal| refusal.what.key())
            .collect()
    }

    fn captured(&self, look: impl FnOnce(&Captured)) {
        let options = SurveyOptions::default();
        let found = survey(self.pid(), &options).expect("surveyed");
        assert!(found.refusals.is_empty(), "{:?}", found.refusals);
        let mut family = Family::seize(self.pid(), SeizeOptions::default()).expect("seized");
        family
            .freeze(Duration::from_millis(500), 5)
            .expect("frozen");
        let captured = capture(&mut family, &found, &options).expect("captured");
        assert_eq!(captured.tree.validate(), Ok(()));
        look(&captured);
        family.thaw().expect("thawed");
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn root(captured: &Captured) -> &Process {
    captured.tree.processes.first().expect("a process")
}

fn kind(captured: &Captured, fd: u64) -> &file::Kind {
    let file = root(captured)
        .descriptors
        .iter()
        .find(|row| u64::from(row.fd) == fd)
        .expect("a row")
        .file;
    captured
        .tree
        .files
        .iter()
        .find(|row| row.id == file)
        .and_then(|row| row.kind.as_ref())
        .expect("a file")
}

#[test]
fn a_process_is_captured_as_it_is() {
    let subject = Subject::start(
        r#"
static void *wait_for_ever(void *nothing) { prctl(PR_SET_NAME, "second"); for (;;) pause(); }
static void handler(int signo) {}
int main(void) {
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR2);
    sigprocmask(SIG_BLOCK, &mask, NULL);
    pthread_t thread;
    pthread_create(&thread, NULL, wait_for_ever, NULL);
    usleep(20000);
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
    sigaction(SIGUSR1, &action, NULL);
    raise(SIGUSR2);
    kill(getpid(), SIGUSR2);
    stack_t stack = {.ss_sp = malloc(65536), .ss_size = 65536};
    sigaltstack(&stack, NULL);
    umask(027);
    prctl(PR_SET_TIMERSLACK, 123456);
    prctl(PR_SET_PDEATHSIG, SIGHUP);
    syscall(SYS_membarrier, 16, 0, 0);
    struct itimerval real = {.it_value = {1000, 0}, .it_interval = {5, 6}};
    setitimer(ITIMER_REAL, &real, NULL);
    timer_t timer;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1, .sigev_value = {.sival_int = 77}};
    timer_create(CLOCK_MONOTONIC, &event, &timer);
    struct itimerspec spec = {.it_value = {2000, 0}, .it_interval = {0, 7}};
    timer_settime(timer, 0, &spec, NULL);
    int pipes[2];
    pipe(pipes);
    write(pipes[1], "hello", 5);
    int again = dup(pipes[1]);
    int pair[2];
    socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair);
    write(pair[0], "one", 3);
    write(pair[0], "three", 5);
    int event_fd = eventfd(42, EFD_SEMAPHORE | EFD_CLOEXEC);
    int epoll = epoll_create1(0);
    struct epoll_event watch = {.events = EPOLLIN, .data = {.u64 = 0x1234567890}};
    epoll_ctl(epoll, EPOLL_CTL_ADD, event_fd, &watch);
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    int one = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    listen(listener, 17);
    int file = open("/etc/passwd", O_RDONLY);
    lseek(file, 10, SEEK_SET);
    char *memory = mmap(NULL, 8 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(memory, 'x', 4096);
    memory[4 * 4096] = 0;
    madvise(memory, 8 * 4096, MADV_DONTFORK);
    int guarded = madvise(memory + 6 * 4096, 4096, 102);
    mlockall(MCL_FUTURE);
    printf("altstack=%p\npipe_read=%d\npipe_write=%d\nagain=%d\npair=%d\neventfd=%d\nepoll=%d\nlistener=%d\nfile=%d\nmemory=%p\nguarded=%d\nbrk=%p\n",
        stack.ss_sp, pipes[0], pipes[1], again, pair[1], event_fd, epoll, listener, file, memory, guarded == 0, sbrk(0));
    ready();
}
"#,
    );
    subject.captured(|captured| {
        let process = root(captured);
        let leader = &process.threads[0];
        assert_eq!((process.pid, process.threads.len(), process.umask, process.cwd.as_str()), (subject.pid(), 2, 0o027, "/"));
        assert_eq!(process.threads[1].comm, "second");
        assert_eq!(leader.comm, "subject");
        assert_eq!(leader.registers.len(), pageferry_tracee::Registers::BYTE_LEN);
        assert!(leader.xsave.len() >= 576);
        assert_eq!(leader.sigmask & (1 << (libc::SIGUSR2 - 1)), 1 << (libc::SIGUSR2 - 1));
        assert_eq!((leader.pending.len(), process.pending.len()), (1, 1));
        let altstack = leader.altstack.as_ref().expect("a stack");
        assert_eq!((altstack.sp, altstack.size), (subject.said("altstack"), 65536));
        assert_ne!(leader.clear_child_tid, 0);
        assert_ne!(leader.robust_list, 0);
        assert_eq!(leader.parent_death_signal, (libc::SIGHUP as u32));
        assert_eq!(leader.scheduling.as_ref().expect("scheduling").timer_slack_ns, 123_456);
        assert_eq!(process.actions.iter().map(|action| action.signo).filter(|&signo| signo == (libc::SIGUSR1 as u32)).count(), 1);
        assert_eq!(process.membarrier, 16);
        assert_eq!(process.itimers.len(), 1);
        assert!(process.itimers[0].value_us > 900_000_000 && process.itimers[0].interval_us == 5_000_006);
        let timer = &process.posix_timers[0];
        assert_eq!((timer.clock, timer.notify, timer.signo, timer.sigev_value & 0xffff, timer.interval_ns), (1, 0, (libc::SIGUSR1 as u32), 77, 7));
        assert!(timer.value_ns > 1_900_000_000_000);
        assert_eq!(process.limits.len(), 16);
        assert!(captured.tree.monotonic_ns > 0 && captured.tree.realtime_ns > 1_600_000_000_000_000_000);

        let file_of = |name| root(captured).descriptors.iter().find(|row| u64::from(row.fd) == subject.said(name)).map(|row| row.file);
        assert_eq!(file_of("pipe_write"), file_of("again"));
        assert_ne!(file_of("pipe_write"), file_of("pipe_read"));
        assert!(matches!(kind(captured, subject.said("pipe_read")), file::Kind::Pipe(end) if !end.write_end));
        assert_eq!((captured.tree.pipes.len(), captured.tree.pipes[0].content.as_slice()), (1, b"hello".as_slice()));
        let file::Kind::Socket(socket) = kind(captured, subject.said("pair")) else { panic!("a socket") };
        assert_eq!((socket.state(), socket.queue.as_slice()), (State::Paired, [b"one".to_vec(), b"three".to_vec()].as_slice()));
        assert!(matches!(kind(captured, subject.said("eventfd")), file::Kind::Eventfd(eventfd) if eventfd.count == 42 && eventfd.semaphore));
        let file::Kind::Epoll(epoll) = kind(captured, subject.said("epoll")) else { panic!("an epoll instance") };
        assert_eq!((u64::from(epoll.items[0].fd), epoll.items[0].data), (subject.said("eventfd"), 0x12_3456_7890));
        let file::Kind::Socket(socket) = kind(captured, subject.said("listener")) else { panic!("a socket") };
        assert_eq!((socket.state(), socket.backlog, socket.options.len()), (State::Listening, 17, 1));
        assert!(matches!(kind(captured, subject.said("file")), file::Kind::Regular(file) if file.position == 10));
        assert!(matches!(kind(captured, 0), file::Kind::Device(device) if device.path == "/dev/null"));

        let space = process.space.as_ref().expect("a space");
        assert_eq!(space.brk, subject.said("brk"));
        assert!(space.lock_future);
        let memory = subject.said("memory");
        let mapping = space.mappings.iter().find(|mapping| mapping.start <= memory && memory < mapping.end).expect("mapped");
        assert_eq!(mapping.advice, [(libc::MADV_DONTFORK as u32)]);
        assert_eq!(mapping.guards.len() as u64, subject.said("guarded"));
        assert!(space.mappings.iter().any(|mapping| mapping.grows_down));
        assert!(!space.mappings.iter().any(|mapping| mapping.file.as_ref().is_some_and(|file| file.path.contains("memfd"))));
        assert!(!captured.pages[0].eager.is_empty());

        let mut reader = PageReader::open(1, subject.pid()).expect("a reader");
        let range = PageRange { start: memory, end: memory + 8 * PAGE_LEN as u64 };
        let batch = reader.batch(7, range).expect("read");
        let kinds: Vec<(PageKind, u64)> = batch.runs().iter().map(|run| (run.kind, run.range.page_count())).collect();
        let mut expected = vec![(PageKind::Data, 1), (PageKind::Zero, 5), (PageKind::Guard, 1), (PageKind::Zero, 1)];
        if subject.said("guarded") == 0 {
            expected = vec![(PageKind::Data, 1), (PageKind::Zero, 7)];
        }
        assert_eq!((batch.request(), batch.range(), kinds), (7, range, expected));
        assert!(batch.data().iter().all(|&byte| byte == b'x'));
        let ranges: Vec<PageRange> = reader
            .page_map(&captured.pages[0].lazy)
            .flat_map(|piece| piece.expect("scanned").0.ranges().expect("a good map"))
            .filter(|found| found.intersect(range).is_some())
            .collect();
        assert_eq!(ranges, [PageRange { start: memory, end: memory + PAGE_LEN as u64 }, PageRange { start: memory + 4 * PAGE_LEN as u64, end: memory + 5 * PAGE_LEN as u64 }]);
    });
}

#[test]
fn capture_leaves_no_trace_and_can_be_repeated() {
    let subject = Subject::start("int main(void) { ready(); }");
    let before = (
        procfs::maps(subject.pid()).expect("maps"),
        procfs::descriptors(subject.pid()).expect("descriptors"),
    );
    for _ in 0..3 {
        subject.captured(|_| {});
        let after = (
            procfs::maps(subject.pid()).expect("maps"),
            procfs::descriptors(subject.pid()).expect("descriptors"),
        );
        assert_eq!(before, after);
    }
}

#[test]
fn everything_refused_is_listed_at_once() {
    let subject = Subject::start(
        r#"
int main(void) {
    inotify_init();
    memfd_create("x", MFD_HUGETLB);
    socket(AF_NETLINK, SOCK_RAW, 0);
    open("/proc/self/status", O_RDONLY);
    open("/etc/passwd", O_PATH);
    char path[] = "/var/tmp/pageferry-subject-XXXXXX";
    int gone = mkstemp(path);
    unlink(path);
    write(gone, "x", 1);
    signal(SIGPIPE, SIG_IGN);
    mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, gone, 0);
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    listen(listener, 1);
    struct sockaddr_in address;
    socklen_t length = sizeof address;
    getsockname(listener, (void *)&address, &length);
    int client = socket(AF_INET, SOCK_STREAM, 0);
    connect(client, (void *)&address, length);
    int udp = socket(AF_INET, SOCK_DGRAM, 0);
    connect(udp, (void *)&address, length);
    int named = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = "\0pageferry-subject"};
    bind(named, (void *)&name, sizeof name);
    listen(named, 5);
    int hasty = socket(AF_UNIX, SOCK_STREAM, 0);
    connect(hasty, (void *)&name, sizeof name);
    write(hasty, "x", 1);
    int relative = socket(AF_UNIX, SOCK_DGRAM, 0);
    struct sockaddr_un back = {.sun_family = AF_UNIX, .sun_path = "/tmp/../tmp/pageferry-subject.sock"};
    unlink(back.sun_path);
    bind(relative, (void *)&back, sizeof back);
    unlink(back.sun_path);
    mkfifo("/tmp/pageferry-subject.fifo", 0600);
    open("/tmp/pageferry-subject.fifo", O_RDWR);
    unlink("/tmp/pageferry-subject.fifo");
    int epoll = epoll_create1(0);
    int watched = eventfd(0, 0);
    struct epoll_event watch = {.events = EPOLLIN};
    epoll_ctl(epoll, EPOLL_CTL_ADD, watched, &watch);
    dup(watched);
    close(watched);
    char lent[] = "/var/tmp/pageferry-subject-XXXXXX";
    close(mkstemp(lent));
    int leased = open(lent, O_RDONLY);
    unlink(lent);
    fcntl(leased, F_SETLEASE, F_RDLCK);
    open("/dev/ptmx", O_RDWR);
    syscall(SYS_pidfd_open, getpid(), 0);
    ready();
}
"#,
    );
    let mut keys = subject.refused();
    keys.sort_unstable();
    keys.dedup();
    for expected in [
        "accept-queue",
        "connected-udp",
        "ghost-limit",
        "epoll-foreign",
        "fifo",
        "lease",
        "inotify",
        "kernel-file",
        "memfd-hugetlb",
        "other-socket",
        "path-only",
        "pidfd",
        "tcp",
        "terminal",
        "unix-accept-queue",
        "unix-named",
        "unix-state",
    ] {
        assert!(keys.contains(&expected), "{expected} in {keys:?}");
    }
    let close = SurveyOptions {
        tcp: crate::survey::TcpPolicy::Close,
        ..SurveyOptions::default()
    };
    let keys = subject.refused_with(&close);
    assert!(
        !keys.contains(&"tcp") && !keys.contains(&"accept-queue"),
        "{keys:?}"
    );
    for child in procfs::children(subject.pid()).expect("children") {
        pageferry_tracee::descriptor::PidFd::open(child)
            .and_then(|child| child.send_signal(libc::SIGKILL))
            .expect("ended");
    }
}

#[test]
fn files_open_for_writing_need_the_operators_word() {
    let subject = Subject::start(
        r#"
int main(void) { char path[] = "/tmp/pageferry-subject-XXXXXX"; mkstemp(path); puts(path); ready(); }
"#,
    );
    let path = subject.said[0].clone();
    let found = survey(subject.pid(), &SurveyOptions::default())
        .expect("surveyed")
        .refusals;
    assert_eq!(found.len(), 1, "{found:?}");
    let expected = format!(
        "{path} is open for writing on local storage (--same-file {path} if the target sees the same file)"
    );
    assert!(found[0].to_string().ends_with(&expected), "{}", found[0]);
    let vouched = SurveyOptions {
        same_file: vec!["/tmp".into()],
        ..SurveyOptions::default()
    };
    assert_eq!(subject.refused_with(&vouched), Vec::<&str>::new());
    std::fs::remove_file(&path).expect("removed");
}

#[test]
fn what_appears_between_survey_and_freeze_is_refused() {
    let subject = Subject::start(
        r#"
static void late(int signo) { inotify_init(); }
int main(void) { signal(SIGUSR1, late); ready(); }
"#,
    );
    let options = SurveyOptions::default();
    let found = survey(subject.pid(), &options).expect("surveyed");
    assert!(found.refusals.is_empty());
    pageferry_tracee::descriptor::PidFd::open(subject.pid())
        .and_then(|pidfd| pidfd.send_signal(libc::SIGUSR1))
        .expect("sent");
    std::thread::sleep(Duration::from_millis(50));
    let mut family = Family::seize(subject.pid(), SeizeOptions::default()).expect("seized");
    family
        .freeze(Duration::from_millis(500), 5)
        .expect("frozen");
    match capture(&mut family, &found, &options) {
        Err(Error::Refused(refusals)) => assert_eq!(refusals[0].what, RefusalKind::Inotify),
        other => panic!("{other:?}"),
    }
    family.thaw().expect("thawed");
}

/// Sends a descriptor and forgets it.
const GIVE: &str = r#"
static void give(int to, char *text, int fd) {
    struct { struct cmsghdr header; int fd; } rights = {{CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS}, fd};
    struct iovec part = {text, strlen(text)};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &rights, .msg_controllen = sizeof rights};
    sendmsg(to, &message, 0);
    close(fd);
}
"#;

#[test]
fn what_is_sent_and_not_received_is_captured_with_its_sender() {
    let subject = Subject::start(&format!(
        r#"{GIVE}
int main(void) {{
    int pair[2], one = 1, name = memfd_create("sent", 0);
    socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
    setsockopt(pair[1], SOL_SOCKET, SO_PASSCRED, &one, sizeof one);
    ftruncate(name, 8192);
    write(pair[0], "before", 6);
    give(pair[0], "with", dup(pair[0]));
    give(pair[0], "memory", name);
    printf("pair=%d\n", pair[1]);
    ready();
}}
"#
    ));
    subject.captured(|captured| {
        let file::Kind::Socket(socket) = kind(captured, subject.said("pair")) else {
            panic!("it is a socket");
        };
        let queue: Vec<&[u8]> = socket.queue.iter().map(Vec::as_slice).collect();
        assert_eq!(queue, [&b"before"[..], b"with", b"memory"]);
        let sender = |attached: &Attached| attached.sender.map(|ids| ids.pid);
        let senders: Vec<Option<i32>> = socket.attached.iter().map(sender).collect();
        assert_eq!(senders, [Some(subject.pid()); 3]);
        let sent: Vec<&[u32]> = socket.attached.iter().map(|of| &of.files[..]).collect();
        let is_held = |id: u32| {
            let rows = &root(captured).descriptors;
            rows.iter().any(|row| row.file == id)
        };
        assert!(sent[0].is_empty() && is_held(sent[1][0]) && !is_held(sent[2][0]));
        assert_eq!(captured.shared.len(), 1);
        assert!(captured.shared[0].kept.is_some(), "nobody else has it");
        crate::shared::SharedReader::open(captured.shared[0].clone()).expect("it can be read");
    });
}

#[test]
fn what_cannot_travel_in_a_message_is_refused_with_the_socket_that_brings_it() {
    let subject = Subject::start(&format!(
        r#"{GIVE}
int main(void) {{
    int pair[2], other[2], one = 1;
    socketpair(AF_UNIX, SOCK_DGRAM, 0, pair);
    socketpair(AF_UNIX, SOCK_STREAM, 0, other);
    write(pair[0], "first", 5);
    give(pair[0], "second", inotify_init());
    setsockopt(other[1], SOL_SOCKET, SO_PASSCRED, &one, sizeof one);
    if (fork() == 0) {{
        write(other[0], "x", 1);
        _exit(0);
    }}
    wait(NULL);
    printf("pair=%d\nother=%d\n", pair[1], other[1]);
    ready();
}}
"#
    ));
    let options = SurveyOptions::default();
    let found = survey(subject.pid(), &options).expect("surveyed");
    assert!(found.refusals.is_empty(), "{:?}", found.refusals);
    let mut family = Family::seize(subject.pid(), SeizeOptions::default()).expect("seized");
    family
        .freeze(Duration::from_millis(500), 5)
        .expect("frozen");
    let Err(Error::Refused(refusals)) = capture(&mut family, &found, &options) else {
        panic!("it is captured");
    };
    family.thaw().expect("thawed");
    let told: Vec<String> = refusals.iter().map(ToString::to_string).collect();
    let fd = |name| format!("pid {} fd {}: ", subject.pid(), subject.said(name));
    let is_told = |start: &str, text: &str| {
        told.iter()
            .any(|line| line.starts_with(start) && line.contains(text))
    };
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(
        is_told(&fd("pair"), "message 2 brings this: inotify"),
        "{told:?}"
    );
    assert!(
        is_told(&fd("other"), "which is not in the tree"),
        "{told:?}"
    );
}

/// A child that pauses for ever, and ends with its parent.
const CHILD: &str = r#"
static int child(int leads) {
    int told[2];
    char byte = 1;
    pipe(told);
    int pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(1);
        open("/dev/null", O_WRONLY);
        if (leads == 1) setpgid(0, 0);
        if (leads == 2) setsid();
        close(told[0]);
        write(told[1], &byte, 1);
        close(told[1]);
        for (;;) pause();
    }
    close(told[1]);
    read(told[0], &byte, 1);
    close(told[0]);
    return pid;
}
"#;

#[test]
fn a_tree_shares_what_it_shared() {
    let subject = Subject::start(&format!(
        r#"{CHILD}
int main(void) {{
    int pipe_ends[2], pair[2], queue;
    pipe(pipe_ends);
    socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
    queue = epoll_create1(0);
    struct epoll_event event = {{ .events = EPOLLIN, .data.u64 = 5 }};
    epoll_ctl(queue, EPOLL_CTL_ADD, pipe_ends[0], &event);
    write(pipe_ends[1], "on its way", 10);
    int own = child(1), session = child(2);
    close(pipe_ends[0]);
    int late = open("/dev/null", O_RDWR);
    printf("read=%d\nwrite=%d\npair=%d\nqueue=%d\nown=%d\nsession=%d\nlate=%d\n", pipe_ends[0], pipe_ends[1], pair[0], queue, own, session, late);
    ready();
}}
"#
    ));
    subject.captured(|captured| {
        let tree = &captured.tree;
        let pid = |name| i32::try_from(subject.said(name)).expect("a pid");
        let [root, own, session] = &tree.processes[..] else {
            panic!("three processes: {:?}", tree.processes.len());
        };
        assert_eq!(
            (root.pid, own.pid, session.pid),
            (subject.pid(), pid("own"), pid("session"))
        );
        assert_eq!((own.ppid, own.pgid, own.sid), (root.pid, own.pid, root.sid));
        assert_eq!(
            (session.ppid, session.pgid, session.sid),
            (root.pid, session.pid, session.pid)
        );
        let held = |process: &Process, name| {
            let fd = subject.said(name);
            let row = process
                .descriptors
                .iter()
                .find(|row| u64::from(row.fd) == fd);
            row.map(|row| row.file)
        };
        for name in ["write", "pair", "queue"] {
            let file = held(root, name);
            assert!(file.is_some());
            assert_eq!(
                (held(own, name), held(session, name)),
                (file, file),
                "{name}"
            );
        }
        assert_eq!(held(own, "read"), held(session, "read"));
        assert!(held(own, "read").is_some());
        // The root has closed that end, and has another file under its number.
        assert_ne!(held(root, "read"), held(own, "read"));
        assert_eq!(tree.pipes.len(), 1);
        assert_eq!(tree.pipes[0].content, b"on its way");
        let epolls: Vec<_> = tree
            .files
            .iter()
            .filter_map(|file| match &file.kind {
                Some(file::Kind::Epoll(epoll)) => Some(epoll),
                _ => None,
            })
            .collect();
        assert_eq!(epolls.len(), 1);
        assert_eq!(epolls[0].holder, own.pid, "who still has what is watched");
        let pids: Vec<i32> = captured.pages.iter().map(|pages| pages.pid).collect();
        assert_eq!(pids, [root.pid, own.pid, session.pid]);
        for (pages, process) in captured.pages.iter().zip(&tree.processes) {
            assert!(!pages.eager.is_empty() && !pages.lazy.is_empty());
            assert_eq!(process.threads.len(), 1);
            assert_eq!(
                process.threads[0].parent_death_signal,
                if process.pid == root.pid { 0 } else { 9 }
            );
        }
    });
}

#[test]
fn what_has_ended_is_told_with_its_end() {
    let subject = Subject::start(&format!(
        r#"{CHILD}
int main(void) {{
    signal(SIGUSR2, SIG_IGN);
    int leader = child(1), member = child(0), killed = child(0), odd = syscall(SYS_clone, SIGUSR2, 0, 0, 0, 0);
    if (odd == 0) _exit(9);
    setpgid(member, leader);
    kill(leader, SIGKILL);
    waitpid(leader, 0, 0);
    kill(killed, SIGTERM);
    siginfo_t info;
    waitid(P_PID, killed, &info, WEXITED | WNOWAIT);
    waitid(P_PID, odd, &info, WEXITED | WNOWAIT | __WALL);
    printf("leader=%d\nmember=%d\nkilled=%d\nodd=%d\n", leader, member, killed, odd);
    ready();
}}
"#
    ));
    let number = |name| subject.said(name) as i32;
    subject.captured(|captured| {
        let tree = &captured.tree;
        let members: Vec<i32> = tree.members().iter().map(|member| member.pid).collect();
        let [leader, member, killed, odd] = ["leader", "member", "killed", "odd"].map(number);
        assert_eq!(members, [subject.pid(), member, killed, odd]);
        assert_eq!(tree.processes[1].pgid, leader);
        assert_eq!(
            tree.making().expect("nothing is in the way").helpers,
            [leader]
        );
        let ends: Vec<_> = tree
            .zombies
            .iter()
            .map(|zombie| (zombie.status, zombie.exit_signal, zombie.comm.as_str()))
            .collect();
        assert_eq!(
            ends,
            [
                (libc::SIGTERM as u32, libc::SIGCHLD as u32, "subject"),
                (9 << 8, libc::SIGUSR2 as u32, "subject")
            ]
        );
    });
    let numbers = survey(subject.pid(), &SurveyOptions::default())
        .expect("surveyed")
        .tids;
    for name in ["leader", "member", "killed", "odd"] {
        assert!(numbers.contains(&number(name)), "{name} of {numbers:?}");
    }
}

/// A child by clone(2) that shares what `flags` say, and rests.
fn with_a_sharing_child(flags: &str) -> Subject {
    Subject::start(&format!(
        r#"static int rest(void *own_table) {{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (own_table) close(1), open("/dev/null", O_WRONLY);
    for (;;) pause();
}}
int main(void) {{
    static char stack[65536] __attribute__((aligned(16)));
    void *own_table = (({flags}) & CLONE_FILES) ? NULL : stack;
    printf("child=%d\n", clone(rest, stack + sizeof stack, SIGCHLD | {flags}, own_table));
    usleep(50000);
    ready();
}}
"#
    ))
}

#[test]
fn what_processes_have_in_common_is_told_once() {
    for (flags, table, directory) in [
        ("CLONE_FILES", true, false),
        ("CLONE_FS", false, true),
        ("CLONE_FILES | CLONE_FS", true, true),
        ("0", false, false),
    ] {
        let subject = with_a_sharing_child(flags);
        let (pid, number) = (subject.pid(), subject.said("child") as i32);
        subject.captured(|captured| {
            let [root, child] = &captured.tree.processes[..] else {
                panic!("{flags}: there are two");
            };
            let shared = |is_shared| if is_shared { pid } else { 0 };
            assert_eq!((root.table_of, root.directory_of), (0, 0));
            assert_eq!(
                (child.pid, child.table_of, child.directory_of),
                (number, shared(table), shared(directory)),
                "{flags}"
            );
            assert_eq!(child.descriptors.is_empty(), table, "{flags}");
            assert_eq!(
                captured.tree.descriptors_of(child).len(),
                root.descriptors.len()
            );
        });
    }
}

#[test]
fn memory_that_processes_have_in_common_is_told_once() {
    for (flags, has_actions) in [
        ("CLONE_VM", false),
        ("CLONE_VM | CLONE_SIGHAND | CLONE_FILES | CLONE_FS", true),
    ] {
        let subject = with_a_sharing_child(flags);
        let (pid, number) = (subject.pid(), subject.said("child") as i32);
        let surveyed = survey(pid, &SurveyOptions::default()).expect("surveyed");
        let kib = procfs::status(pid, pid).expect("it runs").rss_anon_kib;
        assert!(surveyed.resident_bytes < 2 * kib * 1024, "{flags}");
        subject.captured(|captured| {
            let [root, child] = &captured.tree.processes[..] else {
                panic!("{flags}: there are two");
            };
            assert_eq!((root.memory_of, root.actions_of), (0, 0));
            let actions_of = if has_actions { pid } else { 0 };
            assert_eq!(
                (child.pid, child.memory_of, child.actions_of),
                (number, pid, actions_of),
                "{flags}"
            );
            assert!(child.space.is_none() && child.first_touch.is_empty());
            assert_eq!(captured.tree.space_of(child), root.space.as_ref());
            // What its thread needs is there all the same: the page its stack is in.
            let stack = Registers::from_bytes(&child.threads[0].registers)
                .expect("it has registers")
                .rsp;
            let mut first = root.first_touch.iter();
            assert!(first.any(|range| (range.start..range.end).contains(&stack)));
            let [of_root, of_child] = &captured.pages[..] else {
                panic!("{flags}: one for each");
            };
            assert!(of_child.eager.is_empty() && of_child.lazy.is_empty());
            assert!(!of_root.lazy.is_empty());
        });
    }
}

/// Nothing but the child's end lets its parent be stopped.
#[test]
fn one_that_its_parent_waits_for_in_vfork_is_refused() {
    let subject = Subject::start(
        r#"static int rest(void *nothing) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    close(1);
    for (;;) pause();
}
static void *other(void *nothing) {
    usleep(100000);
    ready();
}
int main(void) {
    static char stack[65536] __attribute__((aligned(16)));
    pthread_t thread;
    pthread_create(&thread, 0, other, 0);
    clone(rest, stack + sizeof stack, SIGCHLD | CLONE_VM | CLONE_VFORK, 0);
}
"#,
    );
    assert_eq!(subject.refused(), ["shared-context"]);
}

#[test]
fn a_first_thread_that_has_ended_before_others_is_refused() {
    let subject = Subject::start(&format!(
        r#"{CHILD}
static void *others(void *nothing) {{ for (;;) pause(); }}
int main(void) {{
    if (child(0) && fork() == 0) {{
        pthread_t thread;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(1);
        pthread_create(&thread, 0, others, 0);
        pthread_exit(0);
    }}
    usleep(50000);
    ready();
}}
"#
    ));
    assert_eq!(subject.refused(), ["dead-leader"]);
}

/// The survey, then a child of a program that has this much memory by then, then the capture. `tenant`: the child has the memory
/// itself, no copy, and all of it was there before.
fn captured_with_a_newcomer(
    memory_mib: usize,
    tenant: bool,
) -> std::result::Result<Captured, Vec<Refusal>> {
    let tenant = u8::from(tenant);
    let subject = Subject::start(&format!(
        r#"{CHILD}
static void take(void) {{
    long len = {memory_mib}L << 20;
    char *block = mmap(NULL, len + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(block, 1, len + 1);
}}
static int rest(void *nothing) {{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (;;) pause();
}}
static void late(int signo) {{
    static char stack[65536] __attribute__((aligned(16)));
    if ({tenant}) clone(rest, stack + sizeof stack, SIGCHLD | CLONE_VM, 0);
    else take(), child(0);
}}
int main(void) {{
    signal(SIGUSR1, late);
    if ({tenant}) take();
    ready();
}}
"#
    ));
    let options = SurveyOptions::default();
    let found = survey(subject.pid(), &options).expect("surveyed");
    assert!(found.refusals.is_empty());
    pageferry_tracee::process::kill(subject.pid(), libc::SIGUSR1).expect("sent");
    while procfs::children(subject.pid())
        .expect("children")
        .is_empty()
    {
        std::thread::sleep(Duration::from_millis(1));
    }
    // It has said so, and closed what that took.
    std::thread::sleep(Duration::from_millis(200));
    let mut family = Family::seize(subject.pid(), SeizeOptions::default()).expect("seized");
    family
        .freeze(Duration::from_millis(500), 5)
        .expect("frozen");
    let pids = family.pids();
    let captured = capture(&mut family, &found, &options);
    family.thaw().expect("thawed");
    let captured = match captured {
        Err(Error::Refused(refusals)) => {
            assert!(refusals.iter().all(|refusal| found.is_passing(refusal)));
            return Err(refusals);
        }
        captured => captured.expect("captured"),
    };
    assert_eq!(captured.tree.validate(), Ok(()));
    let found: Vec<i32> = captured.tree.processes.iter().map(|one| one.pid).collect();
    assert_eq!(found, pids);
    Ok(captured)
}

#[test]
fn a_child_that_came_after_the_survey_is_looked_at_in_the_freeze() {
    let captured = captured_with_a_newcomer(1, false).expect("captured");
    assert_eq!(captured.tree.processes.len(), 2);
}

#[test]
fn a_large_child_that_came_after_the_survey_needs_another() {
    let refusals = captured_with_a_newcomer(192, false).expect_err("refused");
    assert_eq!(refusals.len(), 1, "{refusals:?}");
    assert_eq!(refusals[0].what, RefusalKind::Newcomer);
}

#[test]
fn a_child_that_came_into_a_large_memory_after_the_survey_is_small() {
    let captured = captured_with_a_newcomer(192, true).expect("captured");
    let [root, child] = &captured.tree.processes[..] else {
        panic!("there are two");
    };
    assert_eq!((root.memory_of, child.memory_of), (0, root.pid));
}
