/* Descriptors that a parent and its child share, and what lies between the two: one position in a file, one counter; pipes with
 * contents and a size of their own; socket pairs of every type with messages in both directions; an epoll instance that both
 * have, which watches what only the child still has open, and is itself watched by one of the child's. */
#include "subject.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

enum { FILE_POSITION, COUNTER, QUEUE, SHARED, WORDS = 512, PAIRS = 3 };
static const int types[PAIRS] = {SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET};
static int shared[SHARED], pair[PAIRS][2], there[2], back[2], watched[2], outer, questions[2], answers[2];
static pid_t child;
static bool is_child;
static uint64_t round_of; /* what lies unread is a function of it */

static bool same(int fd) { return syscall(SYS_kcmp, getpid(), is_child ? getppid() : child, 0 /* KCMP_FILE */, fd, fd) == 0; }

static uint64_t word(int what, bool from_child) { return mix(round_of * 100 + (unsigned)what * 2 + from_child); }

static void load(void) {
    uint64_t value = word(50, is_child);
    CHECK(write(is_child ? back[1] : there[1], &value, 8) == 8, "the pipe takes nothing");
    for (int type = 0; type < PAIRS; type++)
        for (int i = 0; i < 5; i++) {
            value = word(type * 5 + i, is_child);
            CHECK(send(pair[type][is_child], &value, 8, MSG_NOSIGNAL) == 8, "pair %d takes nothing", type);
        }
}

static void look(void) {
    uint64_t value = 0;
    for (int i = 0; i < SHARED; i++) CHECK(same(shared[i]), "shared file %d is another in each", i);
    CHECK(!same(outer) && same(watched[1]), "the private ones are shared or the reverse");
    CHECK(read(is_child ? there[0] : back[0], &value, 8) == 8 && value == word(50, !is_child), "the pipe holds something else");
    CHECK(fcntl(there[is_child ? 0 : 1], F_GETPIPE_SZ) == 8192, "the pipe has another size");
    for (int type = 0; type < PAIRS; type++) {
        for (int i = 0; i < 5; i++)
            CHECK(recv(pair[type][is_child], &value, 8, MSG_DONTWAIT) == 8 && value == word(type * 5 + i, !is_child), "pair %d: message %d differs", type, i);
        CHECK(recv(pair[type][is_child], &value, 8, MSG_DONTWAIT) == -1 && errno == EAGAIN, "pair %d has a message too many", type);
    }
    /* One position: each reads the word behind that of the other. */
    off_t at = lseek(shared[FILE_POSITION], 0, SEEK_CUR);
    CHECK(read(shared[FILE_POSITION], &value, 8) == 8 && value == mix((uint64_t)at / 8), "the file differs at %ld", (long)at);
    CHECK(read(shared[COUNTER], &value, 8) == 8 && value == 1, "the counter was %lu", value);
    struct epoll_event event = {0};
    CHECK(epoll_wait(shared[QUEUE], &event, 1, 0) == 1 && event.data.u64 == 77, "the shared queue does not tell what is ready");
    if (is_child) {
        CHECK(epoll_wait(outer, &event, 1, 0) == 1 && event.data.u64 == 88, "the outer queue does not tell of the shared one");
        CHECK(epoll_ctl(shared[QUEUE], EPOLL_CTL_MOD, watched[0], &(struct epoll_event){.events = EPOLLIN, .data.u64 = 77}) == 0, "the watch has another number");
    }
}

static void answer(void) {
    CHECK(write(answers[1], failure, sizeof failure) == sizeof failure, "no answer");
    failure[0] = 0;
}

static void serve(void) {
    is_child = true;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (int type = 0; type < PAIRS; type++) close(pair[type][0]);
    close(there[1]), close(back[0]);
    outer = epoll_create1(0);
    CHECK(epoll_ctl(outer, EPOLL_CTL_ADD, shared[QUEUE], &(struct epoll_event){.events = EPOLLIN, .data.u64 = 88}) == 0, "no nested watch");
    answer();
    for (char what; read(questions[0], &what, 1) == 1; answer()) {
        if (what == 'c') look();
        else round_of++, load();
    }
    _exit(0);
}

static void ask(char what) {
    char why[sizeof failure] = "";
    CHECK(write(questions[1], &what, 1) == 1, "the child cannot be asked");
    CHECK(read(answers[0], why, sizeof why) == sizeof why && !why[0], "the child: %s", why);
}

static void next_round(void) {
    round_of++;
    load();
    ask('l');
    CHECK(write(shared[COUNTER], &(uint64_t){2}, 8) == 8, "the counter takes nothing");
}

static void setup(void) {
    char path[4200];
    snprintf(path, sizeof path, "%s.words", state_path);
    shared[FILE_POSITION] = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    for (uint64_t i = 0; i < WORDS; i++) MUST(write(shared[FILE_POSITION], &(uint64_t){mix(i)}, 8) == 8);
    MUST(lseek(shared[FILE_POSITION], 80, SEEK_SET) == 80);
    shared[COUNTER] = eventfd(0, EFD_SEMAPHORE);
    shared[QUEUE] = epoll_create1(EPOLL_CLOEXEC);
    MUST(pipe(there) == 0 && pipe(back) == 0 && pipe(watched) == 0 && pipe(questions) == 0 && pipe(answers) == 0);
    MUST(fcntl(there[0], F_SETPIPE_SZ, 8192) == 8192 && write(watched[1], "x", 1) == 1);
    MUST(epoll_ctl(shared[QUEUE], EPOLL_CTL_ADD, watched[0], &(struct epoll_event){.events = EPOLLIN, .data.u64 = 77}) == 0);
    for (int type = 0; type < PAIRS; type++) MUST(socketpair(AF_UNIX, types[type], 0, pair[type]) == 0);
    child = fork();
    if (child == 0) serve();
    for (int type = 0; type < PAIRS; type++) close(pair[type][1]);
    close(there[0]), close(back[1]);
    close(watched[0]);
    outer = open("/dev/null", O_RDONLY); /* the child has a queue under this number */
    char why[sizeof failure];
    MUST(read(answers[0], why, sizeof why) == sizeof why && !why[0]);
    next_round();
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    look();
    ask('c');
    CHECK(waitpid(child, NULL, WNOHANG) == 0, "the child has ended");
    next_round();
}
