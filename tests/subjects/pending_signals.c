/* Pending signals: those of the process and those of one thread, real-time ones several times, in order and with their
 * values and senders. */
#include "subject.h"

static pid_t other_tid;
static _Atomic int asked, answered;
static sigset_t blocked;

static void queue(pid_t tid, int signo, int value) {
    siginfo_t info;
    memset(&info, 0, sizeof info);
    info.si_signo = signo;
    info.si_code = SI_QUEUE;
    info.si_pid = 4321;
    info.si_uid = 1234;
    info.si_value.sival_ptr = (void *)(uintptr_t)mix((uint64_t)value);
    if (tid) MUST(syscall(SYS_rt_tgsigqueueinfo, getpid(), tid, signo, &info) == 0);
    else MUST(syscall(SYS_rt_sigqueueinfo, getpid(), signo, &info) == 0);
}

static void expect(int signo, int value) {
    sigset_t one;
    siginfo_t info;
    struct timespec none = {0, 0};
    sigemptyset(&one);
    sigaddset(&one, signo);
    memset(&info, 0, sizeof info);
    int got = sigtimedwait(&one, &info, &none);
    CHECK(got == signo, "signal %d is not pending", signo);
    if (got != signo) return;
    CHECK(info.si_code == SI_QUEUE && info.si_pid == 4321 && info.si_uid == 1234, "signal %d: sender is %d %d %d", signo,
          info.si_code, info.si_pid, info.si_uid);
    CHECK((uintptr_t)info.si_value.sival_ptr == mix((uint64_t)value), "signal %d: its value changed", signo);
}

static void expect_none(const char *who) {
    sigset_t pending;
    sigpending(&pending);
    for (int signo = 1; signo < 65; signo++)
        CHECK(sigismember(&pending, signo) != 1 || signo == SIGSTOP, "%s: signal %d is pending once too often", who, signo);
}

enum { FIRST_RT = 40, OWN = 44 };

static void arm_process(void) {
    for (int i = 0; i < 5; i++) queue(0, FIRST_RT, i), queue(0, FIRST_RT + 1, 10 + i);
    queue(0, SIGUSR1, 21);
    queue(0, SIGTERM, 22);
}
static void check_process(void) {
    for (int i = 0; i < 5; i++) expect(FIRST_RT, i);
    for (int i = 0; i < 5; i++) expect(FIRST_RT + 1, 10 + i);
    expect(SIGUSR1, 21);
    expect(SIGTERM, 22);
}

static void *work(void *unused) {
    (void)unused;
    other_tid = own_tid();
    for (;;) {
        for (int i = 0; i < 4; i++) queue(own_tid(), OWN, 100 + i);
        queue(own_tid(), SIGUSR2, 120);
        int now = atomic_load(&answered) + 1;
        while (atomic_load(&asked) != now) doze(2);
        for (int i = 0; i < 4; i++) expect(OWN, 100 + i);
        expect(SIGUSR2, 120);
        expect_none("thread");
        atomic_store(&answered, now);
    }
    return NULL;
}

static void setup(void) {
    sigfillset(&blocked);
    sigdelset(&blocked, SIGSEGV);
    sigprocmask(SIG_SETMASK, &blocked, NULL);
    arm_process();
    thread(work, NULL);
    MUST(EVENTUALLY(other_tid));
    doze(20);
}

static void step(void) { doze(5); }

static void verify(int round) {
    check_process();
    expect_none("process");
    atomic_store(&asked, round);
    CHECK(EVENTUALLY(atomic_load(&answered) == round), "the thread does not answer");
    arm_process();
    doze(20); /* the thread queues its own again */
}
