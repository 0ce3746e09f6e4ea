/* Files that go along with a process: POSIX shared memory and semaphores, with a name and without, a file of O_TMPFILE, and deleted
 * files of a disk; open, mapped, shared with a child, with what they hold, holes, mode, time and position. */
#include "subject.h"
#include <semaphore.h>

enum { PAGES = 12, SIZE = PAGES * PAGE + 7, OLD = 1234567890 };

struct control { _Atomic int question, answer, line; };

static char name[64], path[80], sem_name[64], old_path[80];
static int named, reader, gone, nameless, ghost, old;
static char *shared, *readable, *unlinked, *ghost_copy;
static sem_t *asked, *answered; /* with a name, and without */
static struct control *control;

static char *mapped(int fd, size_t size, int rights, int how) {
    char *at = mmap(NULL, size, rights, how, fd, 0);
    MUST(at != MAP_FAILED);
    return at;
}

static uint64_t word_of(int fd, int page) {
    uint64_t word = 0;
    return pread(fd, &word, sizeof word, (off_t)page * PAGE) == sizeof word ? word : ~word;
}

static void fill_file(int fd, uint64_t seed) {
    MUST(fd >= 0 && ftruncate(fd, SIZE) == 0);
    for (int page = 0; page < PAGES; page += 2) {
        uint64_t word = mix((uint64_t)page ^ seed);
        MUST(pwrite(fd, &word, sizeof word, (off_t)page * PAGE) == sizeof word);
    }
    MUST(pwrite(fd, "last", 5, PAGES * PAGE) == 5);
}

static void has(int fd, uint64_t seed, const char *what) {
    struct stat stat;
    char end[8] = "";
    CHECK(fstat(fd, &stat) == 0 && stat.st_size == SIZE, "%s has %ld bytes", what, (long)stat.st_size);
    /* The first two are written to. */
    for (int page = 2; page < PAGES; page++)
        CHECK(word_of(fd, page) == (page % 2 ? 0 : mix((uint64_t)page ^ seed)), "page %d of %s differs", page, what);
    CHECK(pread(fd, end, 7, PAGES * PAGE) == 7 && !memcmp(end, "last\0\0\0", 7), "the end of %s differs", what);
}

static unsigned long inode(int fd) {
    struct stat stat;
    return fstat(fd, &stat) ? 0 : stat.st_ino;
}

/* In the child; the line at which something is wrong. */
static int check(int round) {
    if (*(uint64_t *)(shared + PAGE) != mix((uint64_t)round)) return __LINE__;
    if (word_of(named, 1) != mix((uint64_t)round)) return __LINE__;
    *(uint64_t *)(unlinked + PAGE) = mix((uint64_t)round + 5);
    return 0;
}

static void work(void) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (;;) {
        while (sem_wait(asked)) {}
        control->line = check(control->question);
        control->answer = control->question;
        sem_post(answered);
    }
}

static void clean(void) {
    shm_unlink(name);
    sem_unlink(sem_name);
    unlink(old_path);
}

static void setup(void) {
    snprintf(name, sizeof name, "/subject.%d", getpid());
    snprintf(path, sizeof path, "/dev/shm%s", name);
    snprintf(sem_name, sizeof sem_name, "/subject.sem.%d", getpid());
    snprintf(old_path, sizeof old_path, "/tmp/subject.old.%d", getpid());
    atexit(clean);
    umask(0);
    named = shm_open(name, O_RDWR | O_CREAT | O_EXCL, 0640);
    fill_file(named, 1);
    reader = open(path, O_RDONLY);
    MUST(reader >= 0 && lseek(reader, 11, SEEK_SET) == 11 && lseek(named, 5, SEEK_SET) == 5);
    shared = mapped(named, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED);
    readable = mapped(reader, SIZE, PROT_READ, MAP_SHARED);
    control = (struct control *)shared;

    char other[100];
    snprintf(other, sizeof other, "%s.gone", path);
    gone = open(other, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    fill_file(gone, 2);
    unlinked = mapped(gone, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED);
    MUST(unlink(other) == 0);
    nameless = open("/dev/shm", O_TMPFILE | O_RDWR, 0600);
    fill_file(nameless, 3);
    char disk[4200];
    snprintf(disk, sizeof disk, "%s.ghost", state_path);
    ghost = open(disk, O_RDWR | O_CREAT | O_EXCL, 0600);
    fill_file(ghost, 4);
    MUST(fcntl(ghost, F_SETFL, O_APPEND) == 0);
    ghost_copy = mapped(ghost, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
    *(uint64_t *)ghost_copy = 4711;
    MUST(unlink(disk) == 0);
    old = open(old_path, O_RDWR | O_CREAT | O_EXCL, 0600);
    fill_file(old, 5);
    struct timespec times[] = {{OLD, 1}, {OLD, 2}};
    MUST(futimens(old, times) == 0);

    asked = sem_open(sem_name, O_CREAT | O_EXCL, 0600, 0);
    snprintf(other, sizeof other, "%s.brief", sem_name);
    answered = sem_open(other, O_CREAT | O_EXCL, 0600, 0);
    MUST(asked != SEM_FAILED && answered != SEM_FAILED && sem_unlink(other) == 0);
    pid_t child = fork();
    if (child == 0) work();
    MUST(child > 0);
}

static void step(void) { doze(5); }

static void verify(int round) {
    struct stat stat;
    has(named, 1, "the named one");
    has(reader, 1, "the named one, read");
    has(gone, 2, "the deleted one");
    has(nameless, 3, "the one without a name");
    has(ghost, 4, "the deleted one on a disk");
    has(old, 5, "the old one");
    CHECK(fstat(named, &stat) == 0 && (stat.st_mode & 07777) == 0640 && stat.st_uid == geteuid() && stat.st_nlink == 1, "mode %o of %u, %u names", stat.st_mode, stat.st_uid, (unsigned)stat.st_nlink);
    CHECK(fstat(old, &stat) == 0 && stat.st_mtim.tv_sec == OLD && stat.st_mtim.tv_nsec == 2, "it was modified at %ld", (long)stat.st_mtim.tv_sec);
    CHECK(fstat(gone, &stat) == 0 && stat.st_nlink == 0 && fstat(ghost, &stat) == 0 && stat.st_nlink == 0, "deleted files have names");
    int again = shm_open(name, O_RDONLY, 0);
    CHECK(again >= 0 && inode(again) == inode(named) && inode(reader) == inode(named), "its name leads to another file");
    close(again);
    CHECK(lseek(named, 0, SEEK_CUR) == 5 && lseek(reader, 0, SEEK_CUR) == 11, "positions %ld %ld", (long)lseek(named, 0, SEEK_CUR), (long)lseek(reader, 0, SEEK_CUR));
    CHECK((fcntl(ghost, F_GETFL) & O_APPEND) && (fcntl(gone, F_GETFD) & FD_CLOEXEC) && write(reader, "x", 1) == -1, "flags differ");
    CHECK(*(uint64_t *)ghost_copy == 4711 && *(uint64_t *)(ghost_copy + 2 * PAGE) == mix(2 ^ 4), "its private mapping differs");

    *(uint64_t *)(shared + PAGE) = mix((uint64_t)round);
    CHECK(*(uint64_t *)(readable + PAGE) == mix((uint64_t)round), "two mappings are not of one file");
    control->question = round;
    sem_post(asked);
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 20;
    int waited;
    while ((waited = sem_timedwait(answered, &until)) && errno == EINTR) {}
    CHECK(waited == 0 && control->answer == round, "the child does not answer");
    CHECK(!control->line, "the child finds fault at line %d", control->line);
    CHECK(word_of(gone, 1) == mix((uint64_t)round + 5), "what the child wrote is not here");
}
