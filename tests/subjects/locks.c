/* Locks on files: record locks of two processes through one open file, and a thread that waits for one; flock(2), exclusive on an
 * open file that both have, shared on one of each, and on a directory; locks of two open files on ranges of one file.
 *
 * Whoever closes any descriptor of a file loses its record locks on it, so that strangers look at them: children made for that. */
#include "subject.h"
#include <sys/file.h>

enum { RECORDS, FLOCKED, SHARED_FLOCK, RANGES, FILES };
static char path[FILES][4200], folder[4200];
static int records, flocked, shared_flock, ranges[2], directory, questions[2], answers[2];
static pid_t child;

static struct flock part(short type, off_t start, off_t length) {
    return (struct flock){.l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = length};
}

static int set(int fd, int command, short type, off_t start, off_t length) {
    struct flock lock = part(type, start, length);
    return fcntl(fd, command, &lock);
}

/* What is in the way of a lock of that type on one byte. */
static void expect(int fd, int command, short type, off_t at, short there, off_t start, off_t length, pid_t owner) {
    struct flock lock = part(type, at, 1);
    CHECK(fcntl(fd, command, &lock) == 0 && lock.l_type == there, "byte %ld: type %d is in the way, not %d", (long)at, lock.l_type, there);
    if (there == F_UNLCK) return;
    CHECK(lock.l_start == start && lock.l_len == length, "byte %ld: from %ld, %ld bytes", (long)at, (long)lock.l_start, (long)lock.l_len);
    CHECK(lock.l_pid == owner, "byte %ld: of %d, not %d", (long)at, lock.l_pid, owner);
}

static bool may_flock(const char *name, int operation) {
    int fd = open(name, O_RDONLY | O_CLOEXEC);
    int answer = flock(fd, operation | LOCK_NB);
    CHECK(fd >= 0 && (answer == 0 || errno == EWOULDBLOCK), "flock");
    close(fd);
    return answer == 0;
}

static void look_as_a_stranger(void) {
    int fd = open(path[RECORDS], O_RDWR | O_CLOEXEC);
    pid_t parent = getppid();
    expect(fd, F_GETLK, F_RDLCK, 0, F_WRLCK, 0, 10, parent);
    expect(fd, F_GETLK, F_RDLCK, 19, F_WRLCK, 10, 10, child);
    expect(fd, F_GETLK, F_RDLCK, 30, F_UNLCK, 0, 0, 0);
    expect(fd, F_GETLK, F_WRLCK, 1 << 30, F_RDLCK, 20, 0, parent);
    CHECK(set(fd, F_SETLK, F_WRLCK, 15, 1) == -1 && errno == EAGAIN, "a lock may be taken twice");
    CHECK(!may_flock(path[FLOCKED], LOCK_SH) && !may_flock(path[FLOCKED], LOCK_EX), "the exclusive flock is gone");
    CHECK(may_flock(path[SHARED_FLOCK], LOCK_SH) && !may_flock(path[SHARED_FLOCK], LOCK_EX), "the shared flock is not one");
    CHECK(may_flock(folder, LOCK_SH) && !may_flock(folder, LOCK_EX), "the directory's flock is not shared");
    fd = open(path[RANGES], O_RDWR | O_CLOEXEC);
    expect(fd, F_OFD_GETLK, F_RDLCK, 99, F_WRLCK, 0, 100, -1);
    expect(fd, F_OFD_GETLK, F_RDLCK, 100, F_UNLCK, 0, 0, 0);
    expect(fd, F_OFD_GETLK, F_WRLCK, 1 << 30, F_RDLCK, 100, 0, -1);
}

static void ask_a_stranger(void) {
    int told[2];
    CHECK(pipe2(told, O_CLOEXEC) == 0, "no pipe");
    pid_t stranger = fork();
    if (stranger == 0) {
        failure[0] = 0;
        look_as_a_stranger();
        _exit(write(told[1], failure, sizeof failure) != sizeof failure);
    }
    char why[sizeof failure] = "it says nothing";
    close(told[1]);
    CHECK(read(told[0], why, sizeof why) == sizeof why && !why[0], "a stranger: %s", why);
    close(told[0]);
    CHECK(waitpid(stranger, NULL, 0) == stranger, "the stranger is lost");
}

static void hear(char wanted) {
    char what = 0;
    CHECK(read(answers[0], &what, 1) == 1 && what == wanted, "the child says %c, not %c", what, wanted);
}

/* Waits for the parent's lock, has it, gives it back. */
static void serve(void) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    shared_flock = open(path[SHARED_FLOCK], O_RDONLY);
    char what = flock(shared_flock, LOCK_SH) || set(records, F_SETLK, F_WRLCK, 10, 10) ? 'e' : 'r';
    while (write(answers[1], &what, 1) == 1) {
        if (read(questions[0], &what, 1) != 1) break;
        what = set(records, F_SETLKW, F_WRLCK, 0, 10) ? 'E' : 'g';
        if (write(answers[1], &what, 1) != 1 || read(questions[0], &what, 1) != 1) break;
        what = set(records, F_SETLK, F_UNLCK, 0, 10) ? 'u' : 'r';
    }
    _exit(0);
}

static void let_it_wait(void) {
    hear('r');
    CHECK(set(records, F_SETLK, F_WRLCK, 0, 10) == 0, "the first bytes are not free");
    CHECK(write(questions[1], "w", 1) == 1, "the child cannot be asked");
}

static void setup(void) {
    for (int i = 0; i < FILES; i++) {
        snprintf(path[i], sizeof path[i], "%s.lock%d", state_path, i);
        int fd = open(path[i], O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        MUST(fd >= 0);
        close(fd);
    }
    snprintf(folder, sizeof folder, "%s.folder", state_path);
    MUST(mkdir(folder, 0700) == 0 || errno == EEXIST);
    records = open(path[RECORDS], O_RDWR), flocked = open(path[FLOCKED], O_RDWR);
    MUST(flock(flocked, LOCK_EX) == 0);
    MUST(pipe(questions) == 0 && pipe(answers) == 0);
    child = fork();
    if (child == 0) serve();
    shared_flock = open(path[SHARED_FLOCK], O_RDWR), directory = open(folder, O_RDONLY | O_DIRECTORY);
    for (int i = 0; i < 2; i++) ranges[i] = open(path[RANGES], O_RDWR);
    MUST(flock(shared_flock, LOCK_SH) == 0 && flock(directory, LOCK_SH) == 0);
    MUST(set(ranges[0], F_OFD_SETLK, F_WRLCK, 0, 100) == 0 && set(ranges[1], F_OFD_SETLK, F_RDLCK, 100, 0) == 0);
    MUST(set(records, F_SETLK, F_RDLCK, 20, 0) == 0);
    let_it_wait();
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    ask_a_stranger();
    /* Each is its own, to give up and to take again. */
    CHECK(flock(flocked, LOCK_UN) == 0 && may_flock(path[FLOCKED], LOCK_EX), "the flock cannot be given up");
    CHECK(flock(flocked, LOCK_EX | LOCK_NB) == 0, "the flock cannot be taken again");
    CHECK(set(ranges[0], F_OFD_SETLK, F_UNLCK, 0, 100) == 0 && set(ranges[1], F_OFD_SETLK, F_WRLCK, 0, 100) == 0, "the range is not free");
    CHECK(set(ranges[1], F_OFD_SETLK, F_UNLCK, 0, 100) == 0 && set(ranges[0], F_OFD_SETLK, F_WRLCK, 0, 100) == 0, "the range cannot be taken again");
    /* The child has waited all the time. */
    char none = 0;
    fcntl(answers[0], F_SETFL, O_NONBLOCK);
    CHECK(read(answers[0], &none, 1) == -1 && errno == EAGAIN, "the child got what it waits for: %c", none);
    fcntl(answers[0], F_SETFL, 0);
    CHECK(set(records, F_SETLK, F_UNLCK, 0, 10) == 0, "the record cannot be given up");
    hear('g');
    expect(records, F_GETLK, F_RDLCK, 0, F_WRLCK, 0, 20, child);
    CHECK(write(questions[1], "u", 1) == 1, "the child cannot be asked");
    let_it_wait();
}
