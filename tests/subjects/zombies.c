/* Children that have ended and that nobody has waited for: by themselves, by signals, one with a name and one with an exit
 * signal of its own. Each is found once, in the order of their births, as it ended; and nobody is told of their ends a second
 * time, neither by a handler nor by a signal that is blocked. One of the children has such a child, too. */
#include "subject.h"

enum { ENDED = 8, ODD = 5 }; /* ODD tells by a real-time signal */
/* Exit code, or minus the signal. */
static const int ends[ENDED] = {7, -SIGKILL, -SIGTERM, 0, -SIGSEGV, 3, -64, 255};
static pid_t ended[ENDED];
static volatile sig_atomic_t told[65];
static pid_t keeper;
static int asks[2], answers[2];

static void note(int signal) { told[signal]++; }

static int odd_signal(void) { return SIGRTMIN + 3; }

static pid_t end_one(int which) {
    long flags = which == ODD ? odd_signal() : SIGCHLD;
    pid_t child = (pid_t)syscall(SYS_clone, flags, 0, 0, 0, 0);
    if (child) return child;
    signal(SIGSEGV, SIG_DFL);
    prctl(PR_SET_DUMPABLE, 0); /* no core */
    if (which == 3) prctl(PR_SET_NAME, "a (gone) one");
    if (ends[which] < 0) {
        sigset_t none;
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        syscall(SYS_kill, syscall(SYS_getpid), -ends[which]);
        for (;;) pause();
    }
    _exit(ends[which]);
}

static int has_ended(pid_t pid) {
    siginfo_t found = {0};
    return !waitid(P_PID, (id_t)pid, &found, WEXITED | WNOWAIT | __WALL) && found.si_pid == pid;
}

static void end_all(void) {
    for (int i = 0; i < ENDED; i++) {
        ended[i] = end_one(i);
        CHECK(ended[i] > 0 && has_ended(ended[i]), "child %d does not end", i);
    }
}

/* The line at which a process that blocks SIGCHLD finds fault with what it knows of its ended child. */
static int look(pid_t child, int code) {
    sigset_t set;
    siginfo_t told_of = {0}, found = {0};
    struct timespec now = {0, 0};
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    if (sigtimedwait(&set, &told_of, &now) != SIGCHLD) return __LINE__;
    if (told_of.si_pid != child || told_of.si_code != CLD_EXITED || told_of.si_status != code) return __LINE__;
    if (sigtimedwait(&set, &told_of, &now) != -1) return __LINE__;
    if (waitid(P_ALL, 0, &found, WEXITED) || found.si_pid != child || found.si_status != code) return __LINE__;
    if (waitid(P_ALL, 0, &found, WEXITED) != -1 || errno != ECHILD) return __LINE__;
    return 0;
}

static void keep(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGCHLD, SIG_DFL);
    close(asks[1]);
    for (int code = 1;; code++) {
        pid_t child = fork();
        if (!child) _exit(code);
        if (!has_ended(child)) _exit(98);
        int line = 0;
        if (write(answers[1], &line, sizeof line) != sizeof line) _exit(99);
        if (read(asks[0], &line, sizeof line) != sizeof line) _exit(97);
        line = look(child, code);
        if (write(answers[1], &line, sizeof line) != sizeof line) _exit(99);
    }
}

static int hear(void) {
    int line = -1;
    ssize_t got;
    while ((got = read(answers[0], &line, sizeof line)) < 0 && errno == EINTR) {}
    return got == sizeof line ? line : -1;
}

static void setup(void) {
    MUST(pipe(asks) == 0 && pipe(answers) == 0);
    struct sigaction action = {.sa_handler = note, .sa_flags = SA_RESTART};
    MUST(!sigaction(SIGCHLD, &action, NULL) && !sigaction(odd_signal(), &action, NULL));
    keeper = fork();
    if (!keeper) keep();
    MUST(hear() == 0);
    end_all();
    MUST(!failure[0]);
}

static void step(void) { doze(5); }

static void verify(int round) {
    static int chld, odd; /* what it was told when it looked last; what it had not noticed then has come since */
    if (round == 1) chld = told[SIGCHLD], odd = told[odd_signal()];
    CHECK(told[SIGCHLD] == chld, "told %d times of %d ends", told[SIGCHLD], chld);
    CHECK(told[odd_signal()] == odd, "told %d times of %d odd ends", told[odd_signal()], odd);
    char path[64], *name;
    snprintf(path, sizeof path, "/proc/%d/comm", ended[3]);
    name = slurp(path, NULL);
    CHECK(name && !strcmp(name, "a (gone) one\n"), "it is called %s", name ? name : "nothing");
    free(name);
    for (int i = 0; i < ENDED; i++) {
        siginfo_t found = {0};
        CHECK(!waitid(P_ALL, 0, &found, WEXITED | WNOHANG | __WALL), "child %d is not there", i);
        int code = ends[i] < 0 ? CLD_KILLED : CLD_EXITED, status = ends[i] < 0 ? -ends[i] : ends[i];
        CHECK(found.si_pid == ended[i], "child %d is %d, not %d", i, found.si_pid, ended[i]);
        CHECK(found.si_code == code && found.si_status == status, "child %d: code %d, status %d", i, found.si_code, found.si_status);
        CHECK(found.si_uid == getuid(), "child %d is of user %d", i, found.si_uid);
    }
    siginfo_t none = {0};
    CHECK(!waitid(P_ALL, 0, &none, WEXITED | WNOHANG | __WALL) && none.si_pid == 0, "%d has ended, too", none.si_pid);
    CHECK(write(asks[1], &round, sizeof round) == sizeof round, "the keeper cannot be asked");
    int line = hear();
    CHECK(line == 0, "the keeper finds fault at line %d", line);
    CHECK(hear() == 0, "the keeper has no new child");
    end_all();
    chld = told[SIGCHLD], odd = told[odd_signal()];
}
