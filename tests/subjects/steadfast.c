/* A program that notices when anything about it was touched: registers held in a spin, memory, the layout of its address
 * space, signal state, descriptors. For crossings that fail: afterwards the source must be exactly what it was.
 * Arguments: megabytes of memory (default 8); "agent-may-stay": a tracer may be killed while its agent is planted, and the
 * mapping of that is left; "rests": the spins are short, for where many of these run; "family": it has children that look at
 * themselves as it does, and things that are shared with them (all of these in one word, with commas); "mdwe": it denies itself executable memory that was writable; "dispatch": its system calls would come back to it, if it asked for that. */
#include "hold.h"

#include <sched.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/socket.h>

enum { SET_MDWE = 65, REFUSE_EXEC_GAIN = 1 }; /* linux/prctl.h of 6.3 */

enum { HOLDERS = 2 };
static struct holding holders[HOLDERS];
static bool rests;
static char *block;
static size_t size;
static unsigned long long born_before;
static char *maps_before, *status_before;
enum { DESCRIPTORS = 64 };
static struct descriptor { int is_open; ino_t inode; int file_flags, flags; } descriptors_before[DESCRIPTORS], descriptors_now[DESCRIPTORS];
static char maps_now[1 << 17], status_now[1 << 14];

/* One that leads a session, a child of that, and one in the session of the subject. */
enum { LEADER, BELOW, BESIDE, CHILDREN, SHARED_PAGES = 16 };
struct member { _Atomic int asked, answered; pid_t parent; char why[200]; };
static struct member *family; /* memory that all share; behind it what none may change */
static int memfd, ghost, messages[2], queue[2];
static uint64_t *segment; /* System V shared memory */
static pid_t ended, locker;

/* A process in the subject's memory, on a stack with somebody else's memory on both sides, so small that nothing else fits on it. */
enum { GUEST_STACK = 4 * PAGE / 8, AROUND = 8 * PAGE };
static char *guest_home;
static _Atomic uint64_t guest_beats;

static size_t read_file(const char *path, char *into, size_t size) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    size_t used = 0;
    for (ssize_t got; (got = read(fd, into + used, size - 1 - used)) > 0;) used += (size_t)got;
    close(fd);
    into[used] = 0;
    return used;
}

/* The lines of /proc/self/status that must not change. */
static void keep_lines(char *status) {
    static const char *const names[] = {"Name", "Umask", "Tgid", "Pid", "TracerPid", "Uid", "Gid", "Groups", "Threads", "SigPnd", "ShdPnd",
                                        "SigBlk", "SigIgn", "SigCgt", "Cap", "NoNewPrivs", "Seccomp"};
    char *out = status;
    for (char *line = status, *end; *line; line = end) {
        end = strchr(line, '\n');
        end = end ? end + 1 : line + strlen(line);
        bool keep = false;
        for (size_t i = 0; i < sizeof names / sizeof *names; i++) keep |= !strncmp(line, names[i], strlen(names[i]));
        if (keep) memmove(out, line, (size_t)(end - line)), out += end - line;
    }
    *out = 0;
}

/* When the process was made: another one was made later. */
static unsigned long long born(void) {
    char stat[1024];
    unsigned long long ticks = 0;
    read_file("/proc/self/stat", stat, sizeof stat);
    char *field = strrchr(stat, ')');
    for (int number = 2; field && number < 22; number++) field = strchr(field + 1, ' ');
    MUST(field && sscanf(field, "%llu", &ticks) == 1);
    return ticks;
}

/* Zeros where none is open. */
static void look_at_descriptors(struct descriptor *all) {
    memset(all, 0, DESCRIPTORS * sizeof *all);
    for (int fd = 0; fd < DESCRIPTORS; fd++) {
        struct stat one;
        if (fstat(fd, &one)) continue;
        /* That a file never had a name is not carried: it reads as a deleted one. */
        all[fd] = (struct descriptor){1, one.st_ino, fcntl(fd, F_GETFL) & ~O_TMPFILE, fcntl(fd, F_GETFD)};
    }
}

static bool has_word(const char *word) { return argument_count > 1 && strstr(arguments[1], word); }

static void on_signal(int signo, siginfo_t *info, void *context) {
    (void)context;
    /* A tracer that is killed when it has parked its tree leaves stops that somebody else takes back, which parents are told of. */
    bool is_stop = signo == SIGCHLD && (info->si_code == CLD_STOPPED || info->si_code == CLD_CONTINUED);
    if (!is_stop || !has_word("agent-may-stay")) fail(__LINE__, "signal %d arrived, code %d", signo, info->si_code);
}

static void notice(int signo) { sigaction(signo, &(struct sigaction){.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO}, NULL); }

/* What the calling process is like now. */
static void remember(void) {
    born_before = born();
    look_at_descriptors(descriptors_before);
    fail(__LINE__, "warm up"), failure[0] = 0;
    read_file("/proc/self/status", status_before, sizeof status_now);
    keep_lines(status_before);
    read_file("/proc/self/maps", maps_before, sizeof maps_now);
}

static void compare(uint64_t seed) {
    read_file("/proc/self/maps", maps_now, sizeof maps_now);
    /* Once made again, neighbours that the linker had split and written to are one mapping: only before are they the same lines. */
    bool is_first = born() == born_before;
    bool agent_may_stay = has_word("agent-may-stay");
    for (char *old = maps_before, *now = maps_now; is_first && (*old || *now);) {
        size_t old_length = strcspn(old, "\n"), now_length = strcspn(now, "\n");
        bool differs = old_length != now_length || memcmp(old, now, old_length);
        if (differs && agent_may_stay && now_length > 19 && !memcmp(now + now_length - 19, "/dev/zero (deleted)", 19)) {
            now += now_length + (now[now_length] == '\n');
            continue;
        }
        if (differs) {
            fail(__LINE__, "maps: was %.*s, is %.*s", (int)old_length, old, (int)now_length, now);
            break;
        }
        old += old_length + (old[old_length] == '\n');
        now += now_length + (now[now_length] == '\n');
    }
    read_file("/proc/self/status", status_now, sizeof status_now);
    keep_lines(status_now);
    for (char *old = status_before, *now = status_now; *old || *now;) {
        size_t old_length = strcspn(old, "\n"), now_length = strcspn(now, "\n");
        if (old_length != now_length || memcmp(old, now, old_length)) {
            fail(__LINE__, "status: was %.*s, is %.*s", (int)old_length, old, (int)now_length, now);
            break;
        }
        old += old_length + (old[old_length] == '\n');
        now += now_length + (now[now_length] == '\n');
    }
    look_at_descriptors(descriptors_now);
    for (int fd = 0; fd < DESCRIPTORS; fd++) {
        struct descriptor *old = &descriptors_before[fd], *now = &descriptors_now[fd];
        CHECK(now->is_open == old->is_open && now->file_flags == old->file_flags && now->flags == old->flags, "fd %d: flags %x %x were %x %x", fd,
              now->file_flags, now->flags, old->file_flags, old->flags);
        CHECK(!is_first || now->inode == old->inode, "fd %d means another file", fd);
    }
    CHECK(!differs(block, size, seed), "memory differs at %lx", differs(block, size, seed));
}

static uint64_t word_of(int fd, int page) {
    uint64_t word = 0;
    return pread(fd, &word, sizeof word, (off_t)page * PAGE) == sizeof word ? word : ~word;
}

/* What all have and none has changed. */
static void compare_shared(void) {
    char *still = (char *)family + PAGE;
    CHECK(!differs(still, SHARED_PAGES * PAGE, 77), "shared memory differs at %lx", differs(still, SHARED_PAGES * PAGE, 77));
    for (int page = 0; page < SHARED_PAGES; page++) {
        CHECK(word_of(memfd, page) == mix((uint64_t)page + 5), "page %d of the memfd differs", page);
        CHECK(word_of(ghost, page) == mix((uint64_t)page + 6), "page %d of the deleted file differs", page);
    }
    for (uint64_t page = 0; page < SHARED_PAGES; page++) CHECK(segment[page * (PAGE / 8)] == mix(page + 8), "page %lu of the segment differs", page);
    struct flock lock = {.l_type = F_WRLCK};
    CHECK(fcntl(memfd, F_GETLK, &lock) == 0 && lock.l_type == (getpid() == locker ? F_UNLCK : F_WRLCK), "the record lock is of type %d", lock.l_type);
    CHECK(getpid() == locker || (lock.l_pid == locker && lock.l_start == 7 && lock.l_len == 5), "the record lock is another");
    char path[64], text[1024] = "";
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", ghost);
    read_file(path, text, sizeof text);
    CHECK(strstr(text, "FLOCK  ADVISORY  WRITE"), "the flock is gone");
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", memfd);
    read_file(path, text, sizeof text);
    CHECK(getpid() != locker || strstr(text, "POSIX  ADVISORY  WRITE"), "the record lock is gone");
    text[0] = 0;
    int waiting = -1;
    CHECK(recv(messages[0], text, sizeof text, MSG_PEEK | MSG_DONTWAIT) == 6 && !memcmp(text, "first", 6), "the message is %.15s", text);
    CHECK(ioctl(queue[0], FIONREAD, &waiting) == 0 && waiting == 3, "%d bytes in the pipe", waiting);
}

static void live(int own) {
    if (own == LEADER) {
        setsid();
        if (fork() == 0) own = BELOW;
    }
    struct member *self = &family[own];
    self->parent = getppid();
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    fill(block, size, 100 + (uint64_t)own);
    notice(SIGCHLD);
    remember();
    for (atomic_store(&self->answered, 1);; doze(5)) {
        int asked = atomic_load(&self->asked);
        if (asked <= atomic_load(&self->answered)) continue;
        compare(100 + (uint64_t)own);
        compare_shared();
        CHECK(getppid() == self->parent && getsid(0) == (own == LEADER ? getpid() : own == BELOW ? self->parent : getsid(self->parent)),
              "parent %d, session %d", getppid(), getsid(0));
        memcpy(self->why, failure, sizeof self->why - 1);
        failure[0] = 0;
        atomic_store(&self->answered, asked);
    }
}

static long plainly(long number, long first, long second) {
    long answer;
    asm volatile("syscall" : "=a"(answer) : "a"(number), "D"(first), "S"(second), "d"(0) : "rcx", "r11", "memory");
    return answer;
}

/* Uses no thread-local storage, not even errno: that is another's. */
__attribute__((optimize("no-stack-protector"))) static int visit(void *nothing) {
    (void)nothing;
    const struct timespec rest = {0, 5000000};
    plainly(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL);
    for (;;) {
        plainly(SYS_nanosleep, (long)&rest, 0);
        atomic_fetch_add(&guest_beats, 1);
    }
    return 0;
}

static void make_family(void) {
    family = mmap(NULL, (1 + SHARED_PAGES) * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    MUST(family != MAP_FAILED);
    fill((char *)family + PAGE, SHARED_PAGES * PAGE, 77);
    memfd = memfd_create("steadfast", 0);
    ghost = open("/tmp", O_TMPFILE | O_RDWR, 0600);
    MUST(memfd >= 0 && ghost >= 0);
    for (uint64_t page = 0; page < SHARED_PAGES; page++) {
        uint64_t one = mix(page + 5), other = mix(page + 6);
        MUST(pwrite(memfd, &one, sizeof one, (off_t)page * PAGE) == sizeof one);
        MUST(pwrite(ghost, &other, sizeof other, (off_t)page * PAGE) == sizeof other);
    }
    struct flock lock = {.l_type = F_WRLCK, .l_start = 7, .l_len = 5};
    MUST(fcntl(memfd, F_SETLK, &lock) == 0 && flock(ghost, LOCK_EX) == 0);
    locker = getpid();
    int number = shmget(IPC_PRIVATE, SHARED_PAGES * PAGE, 0600);
    segment = shmat(number, NULL, 0);
    MUST(segment != (void *)-1 && shmctl(number, IPC_RMID, NULL) == 0);
    for (uint64_t page = 0; page < SHARED_PAGES; page++) segment[page * (PAGE / 8)] = mix(page + 8);
    MUST(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, messages) == 0 && send(messages[1], "first", 6, 0) == 6);
    MUST(pipe(queue) == 0 && write(queue[1], "abc", 3) == 3);
    ended = fork();
    if (ended == 0) _exit(7);
    siginfo_t found;
    MUST(waitid(P_PID, (id_t)ended, &found, WEXITED | WNOWAIT) == 0);
    for (int i = 0; i < CHILDREN; i++) atomic_store(&family[i].asked, 1);
    guest_home = pages(2 * AROUND + GUEST_STACK, PROT_READ | PROT_WRITE);
    fill(guest_home, 2 * AROUND + GUEST_STACK, 99);
    MUST(clone(visit, guest_home + AROUND + GUEST_STACK, CLONE_VM | SIGCHLD, NULL) > 0);
    if (fork() == 0) live(LEADER);
    if (fork() == 0) live(BESIDE);
    for (int i = 0; i < CHILDREN; i++) MUST(EVENTUALLY(atomic_load(&family[i].answered)));
}

static void ask_family(void) {
    siginfo_t found = {0};
    CHECK(waitid(P_PID, (id_t)ended, &found, WEXITED | WNOWAIT) == 0 && found.si_pid == ended && found.si_status == 7, "pid %d ended with %d",
          found.si_pid, found.si_status);
    compare_shared();
    CHECK(!differs(guest_home, AROUND, 99) && !differs(guest_home + AROUND + GUEST_STACK, AROUND, 99), "memory beside the guest's stack differs");
    uint64_t beats = atomic_load(&guest_beats);
    CHECK(EVENTUALLY(atomic_load(&guest_beats) > beats), "the guest stands still");
    for (int i = 0; i < CHILDREN; i++) {
        int question = atomic_fetch_add(&family[i].asked, 1) + 1;
        CHECK(EVENTUALLY(atomic_load(&family[i].answered) == question), "child %d does not answer", i);
        CHECK(!family[i].why[0], "child %d: %s", i, family[i].why);
    }
}

static void setup(void) {
    size = (argument_count ? strtoul(arguments[0], NULL, 10) : 8) << 20;
    block = pages(size, PROT_READ | PROT_WRITE);
    fill(block, size, 1);
    maps_before = pages(sizeof maps_now, PROT_READ | PROT_WRITE);
    status_before = pages(sizeof status_now, PROT_READ | PROT_WRITE);
    signal(SIGTRAP, SIG_IGN);
    notice(SIGURG);
    if (has_word("family")) make_family();
    notice(SIGCHLD);
    rests = has_word("rests");
    for (uint64_t i = 0; i < HOLDERS; i++) {
        holders[i].seed = 50 * i + 7;
        holders[i].rest_ms = rests ? 200 : 0;
        thread(hold_for_ever, &holders[i]);
    }
    for (int i = 0; i < HOLDERS; i++) MUST(EVENTUALLY(atomic_load(&holders[i].held)));
    sigset_t blocked;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGTRAP);
    sigaddset(&blocked, SIGUSR2);
    sigprocmask(SIG_BLOCK, &blocked, NULL);
    if (argument_count > 1 && !strcmp(arguments[1], "mdwe"))
        NEEDS(prctl(SET_MDWE, REFUSE_EXEC_GAIN, 0, 0, 0) == 0, "PR_SET_MDWE (Linux 6.3)");
    static char allowed = SYSCALL_DISPATCH_FILTER_ALLOW;
    if (argument_count > 1 && !strcmp(arguments[1], "dispatch"))
        MUST(prctl(PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_ON, 0, 0, &allowed) == 0);
    int ends[2];
    MUST(pipe(ends) == 0 && open("/dev/null", O_RDWR) > 0);
    remember();
}

static void step(void) {
    doze(5);
    for (int i = 0; rests && i < HOLDERS; i++) atomic_store(&holders[i].stop, 1);
}

static void verify(int round) {
    (void)round;
    compare(1);
    if (family) ask_family();
    for (int i = 0; i < HOLDERS; i++) let_go(&holders[i]);
}
