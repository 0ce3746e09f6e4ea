/* signalfd: its mask, and a signal that is pending when it crosses. */
#include "subject.h"
#include <sys/signalfd.h>

static int fd;
static sigset_t mask;

static void load(void) {
    union sigval value = {.sival_int = 4711};
    MUST(sigqueue(getpid(), SIGRTMIN + 3, value) == 0);
    MUST(kill(getpid(), SIGUSR1) == 0);
}

static void setup(void) {
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR1);
    sigaddset(&mask, SIGRTMIN + 3);
    sigprocmask(SIG_BLOCK, &mask, NULL);
    fd = signalfd(-1, &mask, SFD_NONBLOCK | SFD_CLOEXEC);
    MUST(fd >= 0);
    load();
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    struct signalfd_siginfo got[3];
    ssize_t length = read(fd, got, sizeof got);
    CHECK(length == 2 * sizeof *got, "it gives %zd bytes", length);
    if (length == 2 * sizeof *got) {
        CHECK(got[0].ssi_signo == SIGUSR1 && got[0].ssi_pid == (uint32_t)getpid(), "the first is signal %u", got[0].ssi_signo);
        CHECK(got[1].ssi_signo == (uint32_t)SIGRTMIN + 3 && got[1].ssi_int == 4711, "the second is signal %u", got[1].ssi_signo);
    }
    CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC && fcntl(fd, F_GETFL) == (O_RDWR | O_NONBLOCK), "flags changed");
    load();
}
