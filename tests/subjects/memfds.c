/* memfds: open several times with positions and flags of their own, mapped shared, read-only and privately, by a child as well;
 * sealed in every way, of a mode and owner of its own, with holes, with a broken last page, empty, and one that only a mapping
 * reaches. What is read, read by a new mapping, read through a descriptor that was sent, and seen in the old mappings is the same. */
#include "subject.h"
#include <sys/socket.h>

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8u
#endif
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x10
#endif
enum { PAGES = 40, HOLES = 20, SIZE = PAGES * PAGE + 5, SEAL_EXEC = 0x20, LARGE_FILE = 0100000, SHUT = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL };

struct control { _Atomic int question, answer, line; };

static int plain, twin, reader, appender, sealed, future, data, empty;
static char *shared, *readable, *private, *shut, *writable, *nameless;
static struct control *control; /* at the beginning of the nameless one */
static uint64_t appended;

static int made(const char *name, unsigned flags, size_t size) {
    int fd = memfd_create(name, flags);
    MUST(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    return fd;
}

static char *mapped(int fd, size_t size, int rights, int how, int first) {
    char *at = mmap(NULL, size, rights, how, fd, (off_t)first * PAGE);
    MUST(at != MAP_FAILED);
    return at;
}

static uint64_t word_of(int fd, int page) {
    uint64_t word = 0;
    return pread(fd, &word, sizeof word, (off_t)page * PAGE) == sizeof word ? word : ~word;
}

static unsigned long inode(int fd) {
    struct stat stat;
    return fstat(fd, &stat) ? 0 : stat.st_ino;
}

/* The descriptor that comes out of a socket into which this one was sent. */
static int sent(int fd) {
    union { struct cmsghdr header; char room[CMSG_SPACE(sizeof(int))]; } control = {.header = {CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS}};
    struct iovec part = {&(char){0}, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    int by[2], got = -1;
    memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, by) == 0 && sendmsg(by[0], &message, 0) == 1 && recvmsg(by[1], &message, 0) == 1, "it cannot be sent");
    memcpy(&got, CMSG_DATA(&control.header), sizeof got);
    close(by[0]), close(by[1]);
    return got;
}

/* A line in the child at which something is wrong; 0: nothing is. */
static int check(int round) {
    if (*(uint64_t *)(shared + PAGE) != mix((uint64_t)round)) return __LINE__;
    if (word_of(plain, 3) != mix((uint64_t)round)) return __LINE__;
    /* Its position is its parent's, too. */
    if (lseek(twin, 0, SEEK_CUR) != 17 + round) return __LINE__;
    uint64_t reply = mix((uint64_t)round + 1000);
    if (pwrite(plain, &reply, sizeof reply, 4 * PAGE) != sizeof reply) return __LINE__;
    if (*(uint64_t *)(shared + 2 * PAGE) != reply) return __LINE__;
    return 0;
}

static void work(void) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (int answered = 0;;) {
        int round = control->question;
        if (round == answered) {
            doze(2);
            continue;
        }
        control->line = check(round);
        control->answer = answered = round;
    }
}

static void setup(void) {
    plain = made("a name", MFD_CLOEXEC | MFD_ALLOW_SEALING, SIZE);
    MUST(fchmod(plain, 0640) == 0);
    for (int page = 0; page < HOLES; page++) {
        uint64_t word = mix((uint64_t)page);
        MUST(pwrite(plain, &word, sizeof word, (off_t)page * PAGE) == sizeof word);
    }
    MUST(pwrite(plain, "last", 5, PAGES * PAGE) == 5);
    twin = dup(plain);
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", plain);
    reader = open(path, O_RDONLY | O_CLOEXEC);
    appender = open(path, O_WRONLY | O_APPEND | O_NONBLOCK);
    MUST(reader >= 0 && appender >= 0 && lseek(plain, 17, SEEK_SET) == 17 && lseek(reader, 3 * PAGE, SEEK_SET) == 3 * PAGE);
    shared = mapped(plain, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, 2);
    readable = mapped(reader, 8 * PAGE, PROT_READ, MAP_SHARED, 0);
    private = mapped(plain, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, 0);
    *(uint64_t *)(private + 5 * PAGE) = 4711;
    *(uint64_t *)(private + 6 * PAGE) = 0;

    sealed = made("shut", MFD_ALLOW_SEALING, 2 * PAGE);
    MUST(pwrite(sealed, "for good", 8, PAGE) == 8 && fcntl(sealed, F_ADD_SEALS, SHUT) == 0);
    shut = mapped(sealed, 2 * PAGE, PROT_READ, MAP_SHARED, 0);
    future = made("future", MFD_ALLOW_SEALING, PAGE);
    writable = mapped(future, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, 0);
    MUST(fcntl(future, F_ADD_SEALS, F_SEAL_FUTURE_WRITE) == 0);
    data = made("data", MFD_NOEXEC_SEAL, 0);
    empty = made("", 0, 0);
    int brief = made("nameless", 0, 3 * PAGE);
    nameless = mapped(brief, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, 0);
    close(brief);
    fill(nameless + PAGE, PAGE, 5);
    control = (struct control *)nameless;

    pid_t child = fork();
    if (child == 0) work();
    MUST(child > 0);
}

static void step(void) {
    *(uint64_t *)writable += 1;
    doze(2);
}

static void has_seals(int fd, int seals) { CHECK(fcntl(fd, F_GET_SEALS) == seals, "fd %d has the seals %x, not %x", fd, fcntl(fd, F_GET_SEALS), seals); }

static void is_called(int fd, const char *name) {
    char path[64], link[64] = "";
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    CHECK(readlink(path, link, sizeof link - 1) > 0 && !strcmp(link, name), "fd %d is called %s", fd, link);
}

static void verify(int round) {
    struct stat stat;
    CHECK(fstat(plain, &stat) == 0 && stat.st_size == SIZE + (off_t)appended, "it has %ld bytes", (long)stat.st_size);
    CHECK((stat.st_mode & 07777) == 0640 && stat.st_uid == geteuid() && stat.st_gid == getegid(), "mode %o of %u:%u", stat.st_mode, stat.st_uid, stat.st_gid);
    CHECK(inode(twin) == stat.st_ino && inode(reader) == stat.st_ino && inode(appender) == stat.st_ino, "several files were made of one");
    is_called(plain, "/memfd:a name (deleted)");
    is_called(empty, "/memfd: (deleted)");

    CHECK((fcntl(plain, F_GETFL) & ~LARGE_FILE) == O_RDWR && fcntl(plain, F_GETFD) == FD_CLOEXEC, "flags %x", fcntl(plain, F_GETFL));
    CHECK(fcntl(reader, F_GETFL) == (fcntl(reader, F_GETFL) & LARGE_FILE) && write(reader, "x", 1) == -1 && errno == EBADF, "the reader may write");
    CHECK((fcntl(appender, F_GETFL) & (O_ACCMODE | O_APPEND | O_NONBLOCK)) == (O_WRONLY | O_APPEND | O_NONBLOCK), "flags %x", fcntl(appender, F_GETFL));
    CHECK(lseek(plain, 0, SEEK_CUR) == 16 + round && lseek(twin, 0, SEEK_CUR) == 16 + round && lseek(reader, 0, SEEK_CUR) == 3 * PAGE, "positions %ld %ld %ld", (long)lseek(plain, 0, SEEK_CUR), (long)lseek(twin, 0, SEEK_CUR), (long)lseek(reader, 0, SEEK_CUR));
    CHECK(lseek(twin, 1, SEEK_CUR) == 17 + round && lseek(plain, 0, SEEK_CUR) == 17 + round, "positions are no longer shared");

    /* Everything, by every way. */
    off_t hole = lseek(reader, 0, SEEK_HOLE);
    CHECK(hole == HOLES * PAGE && lseek(reader, hole, SEEK_DATA) == PAGES * PAGE, "the first hole is at %ld", (long)hole);
    lseek(reader, 3 * PAGE, SEEK_SET);
    char *anew = mapped(reader, SIZE, PROT_READ, MAP_SHARED, 0);
    int given = sent(reader);
    for (int page = 0; page < PAGES; page++) {
        char bytes[PAGE], through[PAGE];
        CHECK(pread(plain, bytes, PAGE, (off_t)page * PAGE) == PAGE && pread(given, through, PAGE, (off_t)page * PAGE) == PAGE, "page %d cannot be read", page);
        CHECK(!memcmp(bytes, through, PAGE), "page %d differs through a descriptor that was sent", page);
        /* A mapping would make pages of the holes. */
        CHECK(page >= HOLES || !memcmp(bytes, anew + page * PAGE, PAGE), "page %d differs in a new mapping", page);
    }
    close(given);
    for (int page = 0; page < HOLES; page++) {
        uint64_t word = word_of(plain, page);
        if (page != 3 && page != 4) CHECK(word == mix((uint64_t)page), "page %d differs", page);
        CHECK(*(uint64_t *)(anew + page * PAGE) == word, "page %d differs in a new mapping", page);
        if (page < 8) CHECK(*(uint64_t *)(readable + page * PAGE) == word, "page %d differs in the old mapping", page);
        if (page < 8 && page != 5 && page != 6) CHECK(*(uint64_t *)(private + page * PAGE) == word, "page %d differs in the private mapping", page);
    }
    CHECK(!memcmp(anew + PAGES * PAGE, "last", 5), "its end differs");
    munmap(anew, SIZE);
    CHECK(*(uint64_t *)(private + 5 * PAGE) == 4711 && *(uint64_t *)(private + 6 * PAGE) == 0, "copied pages differ");
    CHECK(mprotect(readable, PAGE, PROT_READ | PROT_WRITE) == -1 && errno == EACCES, "what was mapped for reading may be written");
    CHECK(write(appender, "+", 1) == 1 && ++appended, "nothing can be appended");

    *(uint64_t *)(shared + PAGE) = mix((uint64_t)round);
    control->question = round;
    CHECK(EVENTUALLY(control->answer == round), "the child does not answer");
    CHECK(!control->line, "the child finds fault at line %d", control->line);
    CHECK(word_of(reader, 4) == mix((uint64_t)round + 1000), "what the child wrote is not here");
    CHECK(!differs(nameless + PAGE, PAGE, 5), "what only a mapping has differs");

    has_seals(plain, 0);
    has_seals(sealed, SHUT);
    CHECK(pwrite(sealed, "x", 1, 0) == -1 && errno == EPERM && !memcmp(shut + PAGE, "for good", 8), "the sealed one differs");
    CHECK(fcntl(sealed, F_ADD_SEALS, SEAL_EXEC) == -1 && errno == EPERM, "it may be sealed again");
    has_seals(future, F_SEAL_FUTURE_WRITE);
    CHECK(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, future, 0) == MAP_FAILED && errno == EPERM, "a new mapping may write");
    *(uint64_t *)writable += 1;
    CHECK(word_of(future, 0) == *(uint64_t *)writable, "the old mapping writes elsewhere");
    has_seals(data, SEAL_EXEC);
    CHECK(fstat(data, &stat) == 0 && (stat.st_mode & 0111) == 0 && fchmod(data, 0777) == -1 && errno == EPERM, "data may be executed");
    has_seals(empty, F_SEAL_SEAL);
    CHECK(fstat(empty, &stat) == 0 && stat.st_size == 0 && (stat.st_mode & 07777) == 0777, "the empty one has %ld bytes", (long)stat.st_size);
}
