/* A program that notices when anything about it was touched: registers held in a spin, memory, the layout of its address
 * space, signal state, descriptors. For crossings that fail: afterwards the source must be exactly what it was.
 * Arguments: megabytes of memory (default 8); "agent-may-stay": a tracer may be killed while its agent is planted, and the
 * mapping of that is left; "rests": the spins are short, for where many of these run (both in one word, with a comma);
 * "mdwe": it denies itself executable memory that was writable; "dispatch": its system calls would come back to it, if it asked for that. */
#include <sys/utsname.h>

#include "hold.h"

enum { SET_MDWE = 65, REFUSE_EXEC_GAIN = 1 }; /* linux/prctl.h of 6.3 */

enum { HOLDERS = 2 };
static struct holding holders[HOLDERS];
static bool rests;
static char *block;
static size_t size;
static struct utsname home;
static char *maps_before, *status_before;
static uint64_t sum_before, inodes_before;
static char maps_now[1 << 17], status_now[1 << 14];

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

static uint64_t descriptor_sum(bool inodes) {
    uint64_t sum = 0;
    for (int fd = 0; fd < 64; fd++) {
        struct stat one;
        if (fstat(fd, &one) == 0) sum += mix((uint64_t)fd * 1000003 ^ (inodes ? one.st_ino : 0) ^ (uint64_t)fcntl(fd, F_GETFL) << 32 ^ (uint64_t)fcntl(fd, F_GETFD) << 60);
    }
    return sum;
}

static void on_signal(int signo) { fail(__LINE__, "signal %d arrived", signo); }

static void setup(void) {
    size = (argument_count ? strtoul(arguments[0], NULL, 10) : 8) << 20;
    block = pages(size, PROT_READ | PROT_WRITE);
    fill(block, size, 1);
    signal(SIGTRAP, SIG_IGN);
    signal(SIGURG, on_signal);
    signal(SIGCHLD, on_signal);
    rests = argument_count > 1 && strstr(arguments[1], "rests");
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
    sum_before = descriptor_sum(false);
    inodes_before = descriptor_sum(true);
    maps_before = pages(sizeof maps_now, PROT_READ | PROT_WRITE);
    status_before = pages(sizeof status_now, PROT_READ | PROT_WRITE);
    descriptor_sum(true);
    fail(__LINE__, "warm up"), failure[0] = 0;
    MUST(uname(&home) == 0);
    read_file("/proc/self/status", status_before, sizeof status_now);
    keep_lines(status_before);
    read_file("/proc/self/maps", maps_before, sizeof maps_now);
}

static void step(void) {
    doze(5);
    for (int i = 0; rests && i < HOLDERS; i++) atomic_store(&holders[i].stop, 1);
}

static void verify(int round) {
    (void)round;
    read_file("/proc/self/maps", maps_now, sizeof maps_now);
    /* Elsewhere, neighbours that the linker had split and written to are one mapping: only at home are they the same lines. */
    struct utsname here;
    MUST(uname(&here) == 0);
    int at_home = !strcmp(here.nodename, home.nodename);
    bool agent_may_stay = argument_count > 1 && strstr(arguments[1], "agent-may-stay");
    for (char *old = maps_before, *now = maps_now; at_home && (*old || *now);) {
        size_t old_length = strcspn(old, "\n"), now_length = strcspn(now, "\n");
        if (agent_may_stay && now_length > 19 && !memcmp(now + now_length - 19, "/dev/zero (deleted)", 19)) {
            now += now_length + (now[now_length] == '\n');
            continue;
        }
        if (old_length != now_length || memcmp(old, now, old_length)) {
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
    CHECK(descriptor_sum(false) == sum_before, "the descriptor table changed");
    CHECK(!at_home || descriptor_sum(true) == inodes_before, "a descriptor means another file");
    CHECK(!differs(block, size, 1), "memory differs at %lx", differs(block, size, 1));
    for (int i = 0; i < HOLDERS; i++) let_go(&holders[i]);
}
