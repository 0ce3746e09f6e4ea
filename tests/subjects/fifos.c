/* Named pipes of two processes: open for reading, for writing, for both and twice, with what lies unread and their sizes; one
 * that nobody writes to. */
#include "subject.h"
#include <sys/ioctl.h>

enum { PLAIN, WIDE, LONELY, FIFOS };
static char path[FIFOS][4200];
static int reader[FIFOS], writer[FIFOS], second, flags, capacity[FIFOS];
static uint64_t sent[FIFOS], received[FIFOS];
static pid_t child;

static int open_fifo(int fifo, int flags) {
    int fd = open(path[fifo], flags);
    MUST(fd >= 0);
    return fd;
}

static void load(void) {
    for (int fifo = PLAIN; fifo <= WIDE; fifo++)
        for (int i = 0; i < 40; i++) {
            uint64_t word = mix(sent[fifo]++ + (uint64_t)fifo);
            CHECK(write(i % 2 && fifo == PLAIN ? second : writer[fifo], &word, 8) == 8, "fifo %d takes nothing", fifo);
        }
}

static void setup(void) {
    for (int fifo = 0; fifo < FIFOS; fifo++) {
        snprintf(path[fifo], sizeof path[fifo], "/tmp/fifo.%d.%d", getpid(), fifo);
        unlink(path[fifo]);
        MUST(mkfifo(path[fifo], 0600) == 0 && chmod(path[fifo], 0642) == 0);
    }
    reader[PLAIN] = open_fifo(PLAIN, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    writer[PLAIN] = open_fifo(PLAIN, O_WRONLY);
    second = open_fifo(PLAIN, O_WRONLY | O_NONBLOCK);
    reader[WIDE] = writer[WIDE] = open_fifo(WIDE, O_RDWR);
    MUST(fcntl(writer[WIDE], F_SETPIPE_SZ, 1 << 17) == 1 << 17);
    reader[LONELY] = open_fifo(LONELY, O_RDONLY | O_NONBLOCK);
    child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(reader[PLAIN]);
        for (;;) pause();
    }
    for (int fifo = 0; fifo < FIFOS; fifo++) capacity[fifo] = fcntl(reader[fifo], F_GETPIPE_SZ);
    flags = fcntl(reader[PLAIN], F_GETFL);
    load();
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    for (int fifo = PLAIN; fifo <= WIDE; fifo++) {
        int unread = -1;
        CHECK(ioctl(reader[fifo], FIONREAD, &unread) == 0 && unread == 8 * (int)(sent[fifo] - received[fifo]), "fifo %d holds %d bytes", fifo, unread);
        for (uint64_t word; received[fifo] < sent[fifo];) {
            CHECK(read(reader[fifo], &word, 8) == 8 && word == mix(received[fifo] + (uint64_t)fifo), "fifo %d differs at %lu", fifo, received[fifo]);
            received[fifo]++;
        }
    }
    for (int fifo = 0; fifo < FIFOS; fifo++) {
        struct stat named, opened;
        CHECK(fcntl(reader[fifo], F_GETPIPE_SZ) == capacity[fifo], "fifo %d has another size", fifo);
        CHECK(stat(path[fifo], &named) == 0 && fstat(reader[fifo], &opened) == 0 && named.st_ino == opened.st_ino, "fifo %d is not that of its path", fifo);
        CHECK((named.st_mode & 07777) == 0642 && named.st_uid == getuid() && named.st_gid == getgid(), "fifo %d has mode %o", fifo, named.st_mode);
    }
    CHECK(fcntl(reader[PLAIN], F_GETFL) == flags, "flags are %o, not %o", fcntl(reader[PLAIN], F_GETFL), flags);
    CHECK(fcntl(reader[PLAIN], F_GETFD) == FD_CLOEXEC && fcntl(writer[PLAIN], F_GETFD) == 0, "close-on-exec changed");
    char byte;
    CHECK(read(reader[PLAIN], &byte, 1) == -1 && errno == EAGAIN, "an empty one ends though it is open for writing");
    CHECK(read(reader[LONELY], &byte, 1) == 0, "one that nobody writes to does not end");
    int late = open(path[LONELY], O_WRONLY | O_NONBLOCK);
    CHECK(late >= 0 && write(late, "x", 1) == 1 && read(reader[LONELY], &byte, 1) == 1 && byte == 'x', "a new writer does not reach the reader");
    close(late);
    CHECK(waitpid(child, NULL, WNOHANG) == 0, "the child has ended");
    load();
}
