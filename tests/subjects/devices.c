/* /dev/null, zero, full, random and urandom. */
#include "subject.h"

static const char *const names[] = {"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"};
enum { DEVICES = 5 };
static int fd[DEVICES], flags[DEVICES];
static struct stat before[DEVICES];

static void setup(void) {
    for (int i = 0; i < DEVICES; i++) {
        fd[i] = open(names[i], (i < 3 ? O_RDWR : O_RDONLY) | (i % 2 ? O_CLOEXEC : O_NONBLOCK));
        MUST(fd[i] >= 0 && fstat(fd[i], &before[i]) == 0);
        flags[i] = fcntl(fd[i], F_GETFL);
    }
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    unsigned char bytes[32] = {1}, more[32];
    for (int i = 0; i < DEVICES; i++) {
        struct stat now;
        CHECK(fstat(fd[i], &now) == 0 && S_ISCHR(now.st_mode) && now.st_rdev == before[i].st_rdev, "%s is another device", names[i]);
        CHECK(fcntl(fd[i], F_GETFL) == flags[i], "%s has flags %o, had %o", names[i], fcntl(fd[i], F_GETFL), flags[i]);
        CHECK(fcntl(fd[i], F_GETFD) == (i % 2 ? FD_CLOEXEC : 0), "%s: close-on-exec changed", names[i]);
    }
    CHECK(read(fd[0], bytes, 32) == 0 && write(fd[0], bytes, 32) == 32, "/dev/null is no null");
    CHECK(read(fd[1], bytes, 32) == 32 && bytes[0] == 0, "/dev/zero is no zero");
    CHECK(write(fd[2], bytes, 32) == -1 && errno == ENOSPC, "/dev/full is not full");
    for (int i = 3; i < 5; i++)
        CHECK(read(fd[i], bytes, 32) == 32 && read(fd[i], more, 32) == 32 && memcmp(bytes, more, 32), "%s is not random", names[i]);
}
