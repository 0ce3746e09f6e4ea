/* Pipes inside the process: what lies in them, their size, flags and dups; one that is full, one without a writer, one
 * without a reader. */
#include "subject.h"

enum { SMALL = 0, BIG = 1, FULL = 2, PIPES = 3 };
static int end[PIPES][2], orphan, widow, extra;
static uint64_t put[PIPES], taken[PIPES]; /* bytes over all time */
static int flags[PIPES][2];

static void put_some(int pipe, size_t count) {
    while (count) {
        unsigned char bytes[4096];
        size_t now = count < sizeof bytes ? count : sizeof bytes;
        for (size_t i = 0; i < now; i++) bytes[i] = (unsigned char)mix(put[pipe] + i);
        ssize_t done = write(pipe == SMALL ? extra : end[pipe][1], bytes, now);
        CHECK(done == (ssize_t)now, "pipe %d: write of %zu gives %zd", pipe, now, done);
        if (done <= 0) return;
        put[pipe] += (uint64_t)done;
        count -= (size_t)done;
    }
}

static void take_all(int pipe) {
    while (taken[pipe] < put[pipe]) {
        unsigned char bytes[3000];
        uint64_t left = put[pipe] - taken[pipe];
        ssize_t got = read(end[pipe][0], bytes, left < sizeof bytes ? left : sizeof bytes);
        CHECK(got > 0, "pipe %d: %lu bytes are missing", pipe, left);
        if (got <= 0) return;
        for (ssize_t i = 0; i < got; i++)
            CHECK(bytes[i] == (unsigned char)mix(taken[pipe] + (uint64_t)i), "pipe %d: byte %lu differs", pipe, taken[pipe] + (uint64_t)i);
        taken[pipe] += (uint64_t)got;
    }
}

static void load(void) {
    put_some(SMALL, 777);
    put_some(BIG, 100000);
    put_some(FULL, (size_t)fcntl(end[FULL][1], F_GETPIPE_SZ));
}

static void setup(void) {
    for (int i = 0; i < PIPES; i++) MUST(pipe2(end[i], i == FULL ? O_NONBLOCK | O_CLOEXEC : 0) == 0);
    MUST(fcntl(end[BIG][1], F_SETPIPE_SZ, 262144) == 262144);
    MUST(fcntl(end[FULL][1], F_SETPIPE_SZ, 8192) == 8192);
    extra = dup(end[SMALL][1]);
    int pair[2];
    MUST(pipe(pair) == 0 && write(pair[1], "last words", 10) == 10);
    close(pair[1]);
    orphan = pair[0];
    MUST(pipe(pair) == 0);
    close(pair[0]);
    widow = pair[1];
    signal(SIGPIPE, SIG_IGN);
    for (int i = 0; i < PIPES; i++)
        for (int side = 0; side < 2; side++) flags[i][side] = fcntl(end[i][side], F_GETFL);
    load();
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    static bool heard;
    CHECK(fcntl(end[BIG][0], F_GETPIPE_SZ) == 262144, "the big pipe has size %d", fcntl(end[BIG][0], F_GETPIPE_SZ));
    CHECK(fcntl(end[FULL][0], F_GETPIPE_SZ) == 8192, "the full pipe has size %d", fcntl(end[FULL][0], F_GETPIPE_SZ));
    CHECK(fcntl(end[SMALL][0], F_GETPIPE_SZ) == 65536, "the small pipe has size %d", fcntl(end[SMALL][0], F_GETPIPE_SZ));
    char byte = 0;
    CHECK(write(end[FULL][1], &byte, 1) == -1 && errno == EAGAIN, "the full pipe takes another byte");
    for (int i = 0; i < PIPES; i++)
        for (int side = 0; side < 2; side++) {
            CHECK(fcntl(end[i][side], F_GETFL) == flags[i][side], "pipe %d end %d: flags are %o", i, side, fcntl(end[i][side], F_GETFL));
            CHECK(fcntl(end[i][side], F_GETFD) == (i == FULL ? FD_CLOEXEC : 0), "pipe %d end %d: close-on-exec changed", i, side);
        }
    for (int i = 0; i < PIPES; i++) take_all(i);
    char words[32] = "";
    ssize_t got = read(orphan, words, sizeof words);
    if (!heard) CHECK(got == 10 && !memcmp(words, "last words", 10), "a pipe without a writer gives %zd", got);
    else CHECK(got == 0, "an empty pipe without a writer gives %zd", got);
    heard = true;
    CHECK(write(widow, "x", 1) == -1 && errno == EPIPE, "a pipe without a reader takes a byte");
    load();
}
