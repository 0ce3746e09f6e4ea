/* Threads blocked in system calls. Those that wait without a limit go on waiting: they come back when, and only when,
 * what they wait for happens. Those with a limit that the kernel restarts by its own means may be cut short by EINTR on
 * another host (as by a signal without a handler), but then say rightly how much is left. */
#include "subject.h"
#include <linux/futex.h>
#include <poll.h>
#include <semaphore.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/timerfd.h>

static int stop_pipe[2], data_pipe[2], full_pipe[2], pairs[2], datagrams[2], counter, epoll, listener, timer;
static char filling[PAGE];
static uint32_t word;
static sem_t semaphore;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static bool signalled;

/* Each waits without limit and returns true when what it got is what release() gave. */
static bool read_pipe(void) { char byte = 0; return read(data_pipe[0], &byte, 1) == 1 && byte == 'd'; }
static bool write_pipe(void) { return write(full_pipe[1], "w", 1) == 1; }
static bool poll_pipe(void) { struct pollfd one = {stop_pipe[0], POLLIN, 0}; return poll(&one, 1, -1) == 1 && one.revents == POLLIN; }
static bool ppoll_pipe(void) {
    struct pollfd one = {stop_pipe[0], POLLIN, 0};
    sigset_t all;
    sigfillset(&all);
    return ppoll(&one, 1, NULL, &all) == 1;
}
static bool select_pipe(void) { fd_set set; FD_ZERO(&set); FD_SET(stop_pipe[0], &set); return select(stop_pipe[0] + 1, &set, NULL, NULL, NULL) == 1; }
static bool pselect_pipe(void) {
    fd_set set;
    sigset_t all;
    sigfillset(&all);
    FD_ZERO(&set);
    FD_SET(stop_pipe[0], &set);
    return pselect(stop_pipe[0] + 1, &set, NULL, NULL, NULL, &all) == 1;
}
static bool wait_epoll(void) { struct epoll_event one; return epoll_wait(epoll, &one, 1, -1) == 1 && one.data.u32 == 99; }
static bool pwait_epoll(void) {
    struct epoll_event one;
    sigset_t all;
    sigfillset(&all);
    return epoll_pwait(epoll, &one, 1, -1, &all) == 1 && one.data.u32 == 99;
}
static bool wait_futex(void) { return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0) == 0 || (errno == EAGAIN && word); }
static bool wait_semaphore(void) { return sem_wait(&semaphore) == 0; }
static bool wait_condition(void) {
    pthread_mutex_lock(&mutex);
    while (!signalled) pthread_cond_wait(&condition, &mutex);
    pthread_mutex_unlock(&mutex);
    return true;
}
static bool wait_signal(void) { sigset_t one; sigemptyset(&one); sigaddset(&one, SIGUSR1); return sigwaitinfo(&one, NULL) == SIGUSR1; }
static bool read_eventfd(void) { uint64_t value = 0; return read(counter, &value, 8) == 8 && value == 1; }
static bool receive_stream(void) { char bytes[4] = ""; return recv(pairs[0], bytes, 4, MSG_WAITALL) == 4 && !memcmp(bytes, "gram", 4); }
static bool receive_message(void) {
    char bytes[8] = "";
    struct iovec part = {bytes, sizeof bytes};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    return recvmsg(datagrams[0], &message, 0) == 5 && !memcmp(bytes, "acket", 5);
}
static bool accept_none(void) { int fd = accept(listener, NULL, NULL); if (fd >= 0) close(fd); return fd >= 0; }
static bool read_timer(void) { uint64_t value = 0; return read(timer, &value, 8) == 8; }
static bool wait_child(void) {
    pid_t child = fork();
    if (child == 0) _exit(9);
    int status = 0;
    return waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 9;
}

static const struct { const char *name; bool (*wait)(void); } calls[] = {
    {"read of a pipe", read_pipe}, {"write to a full pipe", write_pipe}, {"poll", poll_pipe}, {"ppoll", ppoll_pipe},
    {"select", select_pipe}, {"pselect", pselect_pipe}, {"epoll_wait", wait_epoll}, {"epoll_pwait", pwait_epoll},
    {"futex", wait_futex}, {"sem_wait", wait_semaphore}, {"pthread_cond_wait", wait_condition}, {"sigwaitinfo", wait_signal},
    {"read of an eventfd", read_eventfd}, {"recv of a stream, waiting for all", receive_stream}, {"recvmsg", receive_message},
    {"read of a timerfd", read_timer}, {"accept", accept_none}, {"wait4", wait_child},
};
enum { CALLS = sizeof calls / sizeof *calls };
static _Atomic int begun[CALLS], returned[CALLS], released, cleared;

static void *block(void *argument) {
    uintptr_t index = (uintptr_t)argument;
    for (;;) {
        int round = atomic_load(&released);
        atomic_store(&begun[index], round + 1);
        bool right = calls[index].wait();
        CHECK(right, "%s returned wrongly", calls[index].name);
        CHECK(atomic_load(&released) > round || calls[index].wait == wait_child, "%s returned though nothing had happened", calls[index].name);
        atomic_store(&returned[index], round + 1);
        while (atomic_load(&released) == round) doze(2);
        while (atomic_load(&cleared) != atomic_load(&released)) doze(1); /* verify() has cleared up */
    }
    return NULL;
}

/* Waits with a limit: an hour, of which what is left must be told rightly. */
static _Atomic int cut_short;
static void *sleep_long(void *unused) {
    (void)unused;
    struct timespec left = {3600, 0}, began, now;
    clock_gettime(CLOCK_MONOTONIC, &began);
    for (;;) {
        int rc = nanosleep(&left, &left);
        clock_gettime(CLOCK_MONOTONIC, &now);
        CHECK(rc == -1 && errno == EINTR, "nanosleep returns %d", rc);
        long gone = now.tv_sec - began.tv_sec;
        CHECK(labs(3600 - gone - left.tv_sec) <= 3, "nanosleep was cut short after %ld s with %ld s left", gone, (long)left.tv_sec);
        atomic_fetch_add(&cut_short, 1);
    }
    return NULL;
}

static struct sockaddr_storage listening_at;
static socklen_t listening_length = sizeof listening_at;

static void setup(void) {
    sigset_t one;
    sigemptyset(&one);
    sigaddset(&one, SIGUSR1);
    sigprocmask(SIG_BLOCK, &one, NULL);
    MUST(pipe(stop_pipe) == 0 && pipe(data_pipe) == 0 && pipe2(full_pipe, O_NONBLOCK) == 0);
    while (write(full_pipe[1], filling, PAGE) == PAGE) {}
    fcntl(full_pipe[1], F_SETFL, O_WRONLY);
    fcntl(full_pipe[0], F_SETFL, O_RDONLY);
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pairs) == 0 && socketpair(AF_UNIX, SOCK_DGRAM, 0, datagrams) == 0);
    counter = eventfd(0, 0);
    epoll = epoll_create1(0);
    struct epoll_event item = {.events = EPOLLIN, .data.u32 = 99};
    MUST(epoll_ctl(epoll, EPOLL_CTL_ADD, stop_pipe[0], &item) == 0);
    sem_init(&semaphore, 0, 0);
    timer = timerfd_create(CLOCK_MONOTONIC, 0);
    listener = socket(AF_INET, SOCK_STREAM, 0);
    MUST(listen(listener, 5) == 0 && getsockname(listener, (struct sockaddr *)&listening_at, &listening_length) == 0);
    for (uintptr_t i = 0; i < CALLS; i++) thread(block, (void *)i);
    thread(sleep_long, NULL);
    for (int i = 0; i < CALLS; i++) MUST(EVENTUALLY(atomic_load(&begun[i])));
    doze(50);
}

static void step(void) { doze(5); }

/* Gives each call what it waits for. */
static void release(void) {
    char bytes[PAGE];
    CHECK(write(data_pipe[1], "d", 1) == 1, "write fails");
    CHECK(read(full_pipe[0], bytes, PAGE) == PAGE, "the full pipe was not full");
    CHECK(write(stop_pipe[1], "s", 1) == 1, "write fails");
    word = 1;
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 9, NULL, NULL, 0);
    sem_post(&semaphore);
    pthread_mutex_lock(&mutex);
    signalled = true;
    pthread_cond_broadcast(&condition);
    pthread_mutex_unlock(&mutex);
    kill(getpid(), SIGUSR1);
    CHECK(write(counter, &(uint64_t){1}, 8) == 8, "write fails");
    CHECK(send(pairs[1], "gram", 4, 0) == 4 && send(datagrams[1], "acket", 5, 0) == 5, "send fails");
    struct itimerspec soon = {.it_value.tv_nsec = 1000000};
    CHECK(timerfd_settime(timer, 0, &soon, NULL) == 0, "timerfd_settime fails");
    int client = socket(AF_INET, SOCK_STREAM, 0);
    struct linger reset = {1, 0};
    setsockopt(client, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    CHECK(connect(client, (struct sockaddr *)&listening_at, listening_length) == 0, "connect fails");
    doze(20);
    close(client);
}

static void verify(int round) {
    (void)round;
    int now = atomic_load(&released);
    for (int i = 0; i < CALLS; i++)
        CHECK(atomic_load(&returned[i]) != now + 1 || calls[i].wait == wait_child, "%s returned before anything happened", calls[i].name);
    atomic_store(&released, now + 1);
    release();
    for (int i = 0; i < CALLS; i++) CHECK(EVENTUALLY(atomic_load(&returned[i]) == now + 1), "%s does not return", calls[i].name);
    char bytes[PAGE];
    CHECK(read(stop_pipe[0], bytes, 1) == 1, "read fails");
    fcntl(full_pipe[1], F_SETFL, O_WRONLY | O_NONBLOCK);
    while (write(full_pipe[1], filling, PAGE) == PAGE) {}
    while (write(full_pipe[1], filling, 1) == 1) {} /* the last page holds only what the thread wrote: it takes more */
    fcntl(full_pipe[1], F_SETFL, O_WRONLY);
    word = 0;
    signalled = false;
    atomic_store(&cleared, now + 1);
    for (int i = 0; i < CALLS; i++) CHECK(EVENTUALLY(atomic_load(&begun[i]) == now + 2), "%s does not begin again", calls[i].name);
    doze(30);
}
