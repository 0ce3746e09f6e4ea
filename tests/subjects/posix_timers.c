/* POSIX timers: their numbers (with gaps), what they signal and with which value, the thread they signal, what is left. */
#include "subject.h"

enum { THREAD, PROCESS, SILENT, FAR, KINDS };
static int id[KINDS]; /* the kernel's numbers */
static _Atomic uint64_t process_ticks, thread_ticks;
static _Atomic pid_t helper;
static int64_t far_started;

struct kernel_event {
    uint64_t value;
    int signo, notify, tid;
    int pad[12];
};

static int64_t now(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000l + t.tv_nsec;
}

static void on_tick(int signo, siginfo_t *info, void *context) {
    (void)context;
    int error = errno;
    uintptr_t value = (uintptr_t)info->si_value.sival_ptr;
    if (signo == SIGRTMIN + 1) {
        if (value == mix(1) && own_tid() == atomic_load(&helper)) atomic_fetch_add(&thread_ticks, 1);
        else fail(__LINE__, "a tick for thread %d arrives at %d with value %lx", atomic_load(&helper), own_tid(), value);
    } else {
        if (value == mix(2) && info->si_code == SI_TIMER) atomic_fetch_add(&process_ticks, 1);
        else fail(__LINE__, "a tick has code %d and value %lx", info->si_code, value);
    }
    errno = error;
}

static int create(clockid_t clock, int notify, int signo, uint64_t value, pid_t tid) {
    struct kernel_event event = {.value = value, .signo = signo, .notify = notify, .tid = tid};
    int made = -1;
    MUST(syscall(SYS_timer_create, clock, &event, &made) == 0);
    return made;
}

static void arm(int timer, long sec, long interval_ms) {
    struct itimerspec spec = {.it_value = {sec, sec ? 0 : interval_ms * 1000000}, .it_interval.tv_nsec = interval_ms * 1000000};
    MUST(syscall(SYS_timer_settime, timer, 0, &spec, NULL) == 0);
}

static void *help(void *unused) {
    (void)unused;
    atomic_store(&helper, own_tid());
    for (;;) doze(100);
    return NULL;
}

static void setup(void) {
    struct sigaction action = {.sa_sigaction = on_tick, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigaction(SIGRTMIN + 1, &action, NULL);
    sigaction(SIGRTMIN + 2, &action, NULL);
    thread(help, NULL);
    MUST(EVENTUALLY(atomic_load(&helper)));
    int dropped = create(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0, 0);
    id[THREAD] = create(CLOCK_MONOTONIC, SIGEV_THREAD_ID, SIGRTMIN + 1, mix(1), atomic_load(&helper));
    for (int i = 0; i < 3; i++) syscall(SYS_timer_delete, create(CLOCK_REALTIME, SIGEV_NONE, 0, 0, 0));
    id[PROCESS] = create(CLOCK_REALTIME, SIGEV_SIGNAL, SIGRTMIN + 2, mix(2), 0);
    id[SILENT] = create(CLOCK_BOOTTIME, SIGEV_NONE, 0, 0, 0);
    id[FAR] = create(CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGUSR1, 0, 0);
    syscall(SYS_timer_delete, dropped);
    arm(id[THREAD], 0, 20);
    arm(id[PROCESS], 0, 30);
    arm(id[FAR], 10000, 0);
    far_started = now(CLOCK_MONOTONIC);
    MUST(EVENTUALLY(atomic_load(&thread_ticks) > 1 && atomic_load(&process_ticks) > 1));
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    uint64_t thread_before = atomic_load(&thread_ticks), process_before = atomic_load(&process_ticks);
    CHECK(EVENTUALLY(atomic_load(&thread_ticks) > thread_before + 2), "the timer for a thread does not tick");
    CHECK(EVENTUALLY(atomic_load(&process_ticks) > process_before + 2), "the timer for the process does not tick");
    struct itimerspec spec;
    CHECK(syscall(SYS_timer_gettime, id[SILENT], &spec) == 0 && spec.it_value.tv_sec == 0 && spec.it_value.tv_nsec == 0, "a disarmed timer runs or is gone");
    CHECK(syscall(SYS_timer_gettime, id[PROCESS], &spec) == 0 && spec.it_interval.tv_nsec == 30000000, "an interval changed");
    CHECK(syscall(SYS_timer_gettime, id[FAR], &spec) == 0, "timer %d is gone", id[FAR]);
    int64_t gone = now(CLOCK_MONOTONIC) - far_started, left = spec.it_value.tv_sec * 1000000000l + spec.it_value.tv_nsec;
    CHECK(left <= 10000000000000 - gone + 5000000 && left >= 10000000000000 - gone - 5000000000, "%ld ns are left after %ld", left, gone);
    int next = create(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0, 0);
    CHECK(next != id[THREAD] && next != id[PROCESS] && next != id[SILENT] && next != id[FAR], "a new timer gets the number of an old one");
    syscall(SYS_timer_delete, next);
}
