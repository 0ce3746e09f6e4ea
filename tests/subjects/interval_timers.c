/* Interval timers: the real one ticks on, the virtual and profiling ones keep what was left. */
#include "subject.h"
#include <sys/time.h>

static _Atomic uint64_t ticks;

static void on_alarm(int signo) {
    (void)signo;
    atomic_fetch_add(&ticks, 1);
}

static void setup(void) {
    struct sigaction action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
    sigaction(SIGALRM, &action, NULL);
    struct itimerval often = {{0, 20000}, {0, 20000}}, later = {{50, 500}, {4000, 0}};
    MUST(setitimer(ITIMER_REAL, &often, NULL) == 0);
    MUST(setitimer(ITIMER_VIRTUAL, &later, NULL) == 0);
    MUST(setitimer(ITIMER_PROF, &later, NULL) == 0);
    MUST(EVENTUALLY(atomic_load(&ticks) > 1));
    /* What a profiler leaves: disarmed, and its interval stays. */
    if (argument_count) {
        struct itimerval off = {{0, 1000}, {0, 0}};
        MUST(setitimer(ITIMER_PROF, &off, NULL) == 0);
    }
}

static void step(void) { doze(5); }

/* Blocked and pending, the real timer says that nothing is left of it: it goes on when the signal is taken. */
static void hold_alarm(bool hold) {
    sigset_t alarm_only, pending;
    sigemptyset(&alarm_only);
    sigaddset(&alarm_only, SIGALRM);
    pthread_sigmask(hold ? SIG_BLOCK : SIG_UNBLOCK, &alarm_only, NULL);
    if (hold) CHECK(EVENTUALLY(!sigpending(&pending) && sigismember(&pending, SIGALRM)), "the blocked timer does not fire");
}

static void verify(int round) {
    hold_alarm(false);
    uint64_t before = atomic_load(&ticks);
    CHECK(EVENTUALLY(atomic_load(&ticks) > before + 2), "the real timer does not tick");
    if (argument_count) {
        struct itimerval off;
        CHECK(getitimer(ITIMER_PROF, &off) == 0 && !off.it_value.tv_sec && !off.it_value.tv_usec, "a disarmed timer runs");
    }
    for (int which = ITIMER_VIRTUAL; which <= (argument_count ? ITIMER_VIRTUAL : ITIMER_PROF); which++) {
        struct itimerval now;
        CHECK(getitimer(which, &now) == 0 && now.it_interval.tv_sec == 50, "timer %d: interval is %ld", which, now.it_interval.tv_sec);
        CHECK(now.it_value.tv_sec > 3900 && now.it_value.tv_sec <= 4000, "timer %d: %ld s are left", which, now.it_value.tv_sec);
    }
    struct itimerval now;
    CHECK(getitimer(ITIMER_REAL, &now) == 0 && now.it_interval.tv_usec == 20000, "the real timer's interval is %ld", now.it_interval.tv_usec);
    hold_alarm(round % 2);
}
