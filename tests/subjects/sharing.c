/* Processes, none of them threads of each other, that have a descriptor table or a working directory and umask in common, as
 * clone(2) gives it: with a child, a grandchild, a sibling, and with one whose maker is gone. What one does all find that share
 * it, and nobody else. A record lock is one table's: whoever of those that have it closes the file, which all map, gives it up.
 * With "crossed" there are two more that cannot be carried: children with one table whose parent shares its own with us. On
 * SIGTERM it leaves a child behind, which ends by itself, and ends with 7. */
#include "subject.h"
#include <alloca.h>
#include <sched.h>

/* TABLE has the subject's descriptors, PLACE its directory, BOTH is TABLE's child and has both of it. PARENT has nothing of
 * anybody, ONE and OTHER are its children, with one table and one directory. HEIR's maker had the subject's directory and has
 * ended; it is the subject's since. */
enum { SUBJECT, TABLE, PLACE, BOTH, PARENT, ONE, OTHER, HEIR, ALL };
static const int table_of[ALL] = {SUBJECT, SUBJECT, PLACE, SUBJECT, PARENT, ONE, ONE, HEIR};
static const int place_of[ALL] = {SUBJECT, TABLE, SUBJECT, TABLE, PARENT, ONE, ONE, SUBJECT};
static const int parent_of[ALL] = {-1, SUBJECT, SUBJECT, TABLE, SUBJECT, PARENT, PARENT, SUBJECT};

/* In memory that all have: what one is to do, and what it found. */
static struct {
    _Atomic int pid, asked, answered;
    int op, value, found;
    char place[64];
} *all;

static char locked[4200];

static int look(int op, int value, char *place) {
    switch (op) {
    case 'o': /* opens the null device under a number */
        return dup2(open("/dev/null", O_RDONLY), value);
    case 'c':
        return close(value);
    case 'f':
        return fcntl(value, F_GETFD) >= 0;
    case 'm': /* moves into a directory, with a umask */
        umask((mode_t)value);
        return chdir(place);
    default: { /* says where it is */
        mode_t mask = umask(0);
        umask(mask);
        if (!getcwd(place, sizeof all->place)) place[0] = 0;
        return (int)mask;
    }
    }
}

static void serve(int own) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (;; doze(1)) {
        if (atomic_load(&all[own].asked) == atomic_load(&all[own].answered)) continue;
        all[own].found = look(all[own].op, all[own].value, all[own].place);
        atomic_fetch_add(&all[own].answered, 1);
    }
}

static pid_t make(int own, long flags) {
    pid_t pid = (pid_t)syscall(SYS_clone, flags, 0, 0, 0, 0);
    if (pid == 0) return 0;
    atomic_store(&all[own].pid, pid);
    return pid;
}

/* What each does when it is there: makes those it is to make. */
static void live(int own) {
    if (own == TABLE && make(BOTH, CLONE_FILES | CLONE_FS | SIGCHLD) == 0) serve(BOTH);
    if (own == PARENT && make(ONE, SIGCHLD) == 0) {
        if (make(OTHER, CLONE_FILES | CLONE_FS | CLONE_PARENT) == 0) serve(OTHER);
        serve(ONE);
    }
    serve(own);
}

static int ask(int one, int op, int value, const char *place) {
    if (place) snprintf(all[one].place, sizeof all->place, "%s", place);
    if (one == SUBJECT) return look(op, value, all[one].place);
    all[one].op = op, all[one].value = value;
    int answers = atomic_fetch_add(&all[one].asked, 1) + 1;
    CHECK(EVENTUALLY(atomic_load(&all[one].answered) == answers), "process %d does not answer", one);
    return all[one].found;
}

static bool same(int a, int b, int what) { return syscall(SYS_kcmp, all[a].pid, all[b].pid, what, 0, 0) == 0; }

static int rest(void *nothing) {
    (void)nothing;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    while (syscall(SYS_pause)) {}
    return 0;
}

/* Says which process it is that is refused. */
static void add(void) {
    int ends[2], child;
    MUST(pipe(ends) == 0);
    if ((int)syscall(SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0) == 0) {
        if (fork() == 0) {
            child = (int)syscall(SYS_clone, CLONE_FILES | CLONE_PARENT, 0, 0, 0, 0);
            if (child) MUST(write(ends[1], &child, sizeof child) == sizeof child);
        }
        rest(NULL);
    }
    MUST(read(ends[0], &child, sizeof child) == sizeof child);
    say("REFUSED %d", child);
}

static void leave(int signal) {
    (void)signal;
    if (fork() == 0) doze(3000), _exit(0);
    _exit(7);
}

static void setup(void) {
    all = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    MUST(all != MAP_FAILED && prctl(PR_SET_CHILD_SUBREAPER, 1) == 0);
    all[SUBJECT].pid = getpid();
    snprintf(locked, sizeof locked, "%s.locked", state_path);
    int fd = open(locked, O_RDWR | O_CREAT | O_TRUNC, 0600);
    struct flock whole = {.l_type = F_WRLCK};
    MUST(fd >= 0 && ftruncate(fd, PAGE) == 0 && mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0) != MAP_FAILED);
    MUST(fcntl(fd, F_SETLK, &whole) == 0);
    if (make(TABLE, CLONE_FILES | SIGCHLD) == 0) live(TABLE);
    if (make(PLACE, CLONE_FS | SIGCHLD) == 0) live(PLACE);
    if (make(PARENT, SIGCHLD) == 0) live(PARENT);
    pid_t maker = (pid_t)syscall(SYS_clone, CLONE_FS | SIGCHLD, 0, 0, 0, 0);
    if (maker == 0) {
        if (make(HEIR, CLONE_FS | SIGCHLD) == 0) {
            while (getppid() != all[SUBJECT].pid) doze(1);
            live(HEIR);
        }
        _exit(0);
    }
    MUST(waitpid(maker, NULL, 0) == maker);
    for (int one = 1; one < ALL; one++) MUST(EVENTUALLY(atomic_load(&all[one].pid)));
    if (argument_count) add();
    signal(SIGTERM, leave);
}

/* Waits where the stack goes on in a page that nobody has ever touched. */
static void step(void) {
    uintptr_t here = (uintptr_t)__builtin_frame_address(0);
    volatile char *frame = alloca((1 << 16) + (here - 1024) % PAGE);
    frame[0] = 1;
    doze(5);
}

static void verify(int round) {
    enum { NUMBER = 90, KCMP_FILES = 2, KCMP_FS = 3 };
    static const char *const places[] = {"/", "/tmp", "/proc/sys", "/dev"};
    for (int one = 0; one < ALL; one++)
        for (int other = 0; other < ALL; other++) {
            CHECK(same(one, other, KCMP_FILES) == (table_of[one] == table_of[other]), "the tables of %d and %d", one, other);
            CHECK(same(one, other, KCMP_FS) == (place_of[one] == place_of[other]), "the directories of %d and %d", one, other);
        }
    for (int one = 0; one < ALL; one++) {
        /* What one opens is there for those that share, and gone when another of them closes it. */
        int last = one, number = NUMBER + one;
        CHECK(ask(one, 'o', number, NULL) == number, "process %d opens nothing", one);
        for (int other = 0; other < ALL; other++) {
            bool shares = table_of[one] == table_of[other];
            CHECK(ask(other, 'f', number, NULL) == shares, "process %d and what %d has opened", other, one);
            if (shares) last = other;
        }
        CHECK(ask(last, 'c', number, NULL) == 0, "process %d closes nothing", last);
        CHECK(ask(one, 'f', number, NULL) == 0, "process %d still has it", one);
        const char *place = places[(one + round) % 4];
        CHECK(ask(one, 'm', one + 1, place) == 0, "process %d cannot move", one);
        for (int other = 0; other < ALL; other++) {
            int mask = ask(other, 'w', 0, NULL);
            bool is_there = mask == one + 1 && !strcmp(all[other].place, place);
            if (place_of[one] == place_of[other]) CHECK(is_there, "process %d is in %s with %o", other, all[other].place, mask);
            else CHECK(mask != one + 1, "process %d has moved with %d", other, one);
        }
    }
    pid_t stranger = fork();
    if (stranger == 0) {
        struct flock whole = {.l_type = F_WRLCK};
        int fd = open(locked, O_RDWR);
        _exit(fcntl(fd, F_GETLK, &whole) == 0 && whole.l_type == F_WRLCK ? 0 : 1);
    }
    int status = -1;
    while (waitpid(stranger, &status, 0) < 0 && errno == EINTR) {}
    CHECK(status == 0, "the record lock is gone: %x", status);
    for (int one = 1; one < ALL; one++) {
        pid_t parent = all[parent_of[one]].pid;
        char path[64], *stat;
        snprintf(path, sizeof path, "/proc/%d/stat", all[one].pid);
        stat = slurp(path, NULL);
        char *behind = stat ? strrchr(stat, ')') : NULL;
        CHECK(behind && atoi(behind + 4) == parent, "process %d has another parent", one);
        free(stat);
    }
}
