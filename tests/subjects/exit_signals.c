/* Children whose parent hears of their end by another signal than SIGCHLD, or by none: made by clone(2), they live on, and end when
 * they are told to. Only a wait that asks for such children finds them. */
#include "subject.h"

enum { CHILDREN = 3 };
static int asks[CHILDREN][2];
static pid_t children[CHILDREN];
static volatile sig_atomic_t told[65];

static void note(int signal) { told[signal]++; }

static int exit_signal(int which) { return which == 0 ? SIGUSR1 : which == 1 ? SIGRTMIN + 1 : 0; }

static void start(int which) {
    children[which] = (pid_t)syscall(SYS_clone, (long)exit_signal(which), 0, 0, 0, 0);
    if (children[which] == 0) {
        char code;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (read(asks[which][0], &code, 1) != 1) code = 99;
        syscall(SYS_exit_group, (int)code);
    }
}

static void setup(void) {
    for (int which = 0; which < CHILDREN; which++) {
        MUST(pipe(asks[which]) == 0);
        struct sigaction action = {.sa_handler = note, .sa_flags = SA_RESTART};
        if (exit_signal(which)) MUST(sigaction(exit_signal(which), &action, NULL) == 0);
        start(which);
        MUST(children[which] > 0);
    }
    signal(SIGCHLD, note);
}

static void step(void) { doze(5); }

static void verify(int round) {
    CHECK(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD, "a child can be waited for as any other");
    for (int which = 0; which < CHILDREN; which++) {
        char code = (char)(round % 50 + which);
        int status = -1, before = told[exit_signal(which)];
        CHECK(waitpid(children[which], NULL, WNOHANG | __WALL) == 0, "child %d has ended", which);
        CHECK(write(asks[which][1], &code, 1) == 1, "child %d cannot be told", which);
        pid_t ended;
        while ((ended = waitpid(children[which], &status, __WALL)) < 0 && errno == EINTR) {}
        CHECK(ended == children[which] && WIFEXITED(status) && WEXITSTATUS(status) == code, "child %d: %d, status %x", which, ended, status);
        if (exit_signal(which)) CHECK(EVENTUALLY(told[exit_signal(which)] == before + 1), "child %d told %d times", which, told[exit_signal(which)] - before);
        start(which);
        CHECK(children[which] > 0, "there is no new child %d", which);
    }
    CHECK(told[SIGCHLD] == 0, "%d ends were told by SIGCHLD", told[SIGCHLD]);
}
