/* Sessions and process groups whose leaders are gone, have ended, or are somewhere else in the tree: a daemon whose maker led
 * its session; groups that outlive their first member; orphans that the subject got as their subreaper, out of sessions that
 * live on further down; a child that was born before its parent led a session. Each tells its parent, group and session. */
#include "subject.h"

enum { DAEMON, MEMBER, BESIDE, HEIR, EARLY, LATE, LEADER, ORPHAN, MIDDLE, DEEP, FAR, WORKERS };
/* Sessions and groups that are the subject's own are 0: it may lead others after its first journey. */
struct place { int who; pid_t pid, parent, group, session; };

static int questions[WORKERS][2], answers[2];
static struct place places[WORKERS];
static pid_t root, zombie_group, zombie_session, dead_group, dead_session;

static void tell(int who) {
    struct place place = {who, getpid(), getppid(), getpgid(0), getsid(0)};
    if (place.session == getsid(root)) place.session = 0;
    if (place.group == getpgid(root)) place.group = 0;
    if (write(answers[1], &place, sizeof place) != sizeof place) _exit(99);
}

static void work(int who) {
    for (;;) {
        tell(who);
        char question;
        if (read(questions[who][0], &question, 1) != 1) _exit(98);
        /* By now it has the parent it keeps. */
        prctl(PR_SET_PDEATHSIG, SIGKILL);
    }
}

static struct place hear(void) {
    struct place place = {-1, 0, 0, 0, 0};
    ssize_t got;
    while ((got = read(answers[0], &place, sizeof place)) < 0 && errno == EINTR) {}
    if (got != sizeof place) place.who = -1;
    return place;
}

static struct place ask(int who) {
    if (write(questions[who][1], "?", 1) != 1) return (struct place){-1, 0, 0, 0, 0};
    return hear();
}

static void start(int who) {
    if (fork() == 0) work(who);
}

/* Makes a worker whose maker ends. */
static void start_orphan(int who) {
    pid_t maker = fork();
    if (maker == 0) {
        start(who);
        _exit(0);
    }
    while (waitpid(maker, NULL, 0) < 0 && errno == EINTR) {}
}

/* A process that leads a group, and a worker in it. */
static pid_t group_with(int who) {
    pid_t leader = fork();
    if (leader == 0)
        for (;;) pause();
    MUST(setpgid(leader, leader) == 0);
    if (fork() == 0) {
        setpgid(0, leader);
        work(who);
    }
    MUST(hear().who == who);
    MUST(kill(leader, SIGKILL) == 0);
    return leader;
}

/* A process that leads a session, and ends when it has a worker. */
static pid_t session_with(int who) {
    pid_t leader = fork();
    if (leader == 0) {
        setsid();
        start(who);
        _exit(4);
    }
    MUST(hear().who == who);
    return leader;
}

static void setup(void) {
    root = getpid();
    MUST(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0 && pipe(answers) == 0);
    for (int who = 0; who < WORKERS; who++) MUST(pipe(questions[who]) == 0);
    dead_session = session_with(DAEMON);
    MUST(waitpid(dead_session, NULL, 0) == dead_session);
    dead_group = group_with(MEMBER);
    MUST(waitpid(dead_group, NULL, 0) == dead_group);
    zombie_group = group_with(BESIDE);
    zombie_session = session_with(HEIR);
    if (fork() == 0) {
        start(EARLY);
        setsid();
        work(LATE);
    }
    MUST(hear().who >= EARLY && hear().who >= EARLY);
    if (fork() == 0) {
        setsid();
        start_orphan(ORPHAN);
        work(LEADER);
    }
    MUST(hear().who >= LEADER && hear().who >= LEADER);
    if (fork() == 0) {
        if (fork() == 0) {
            setsid();
            start_orphan(FAR);
            work(DEEP);
        }
        work(MIDDLE);
    }
    for (int i = 0; i < 3; i++) MUST(hear().who >= MIDDLE);
    siginfo_t found;
    MUST(!waitid(P_PID, (id_t)zombie_group, &found, WEXITED | WNOWAIT));
    MUST(!waitid(P_PID, (id_t)zombie_session, &found, WEXITED | WNOWAIT));
    for (int who = 0; who < WORKERS; who++) {
        places[who] = ask(who);
        MUST(places[who].who == who);
    }
    /* As it is meant to be. */
    MUST(places[DAEMON].session == dead_session && places[DAEMON].parent == root);
    MUST(places[MEMBER].group == dead_group && places[BESIDE].group == zombie_group);
    MUST(places[HEIR].session == zombie_session && places[HEIR].parent == root);
    MUST(places[EARLY].session == 0 && places[EARLY].parent == places[LATE].pid && places[LATE].session == places[LATE].pid);
    MUST(places[ORPHAN].session == places[LEADER].pid && places[ORPHAN].parent == root);
    MUST(places[FAR].session == places[DEEP].pid && places[FAR].parent == root && places[DEEP].parent == places[MIDDLE].pid);
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    for (int who = 0; who < WORKERS; who++) {
        struct place now = ask(who), then = places[who];
        CHECK(now.who == who && now.pid == then.pid, "worker %d is %d, pid %d", who, now.who, now.pid);
        CHECK(now.parent == then.parent, "worker %d: parent %d, was %d", who, now.parent, then.parent);
        CHECK(now.group == then.group, "worker %d: group %d, was %d", who, now.group, then.group);
        CHECK(now.session == then.session, "worker %d: session %d, was %d", who, now.session, then.session);
    }
    siginfo_t found = {0};
    CHECK(!waitid(P_PGID, (id_t)zombie_group, &found, WEXITED | WNOWAIT) && found.si_pid == zombie_group && found.si_status == SIGKILL,
          "the group's leader: %d, status %d", found.si_pid, found.si_status);
    CHECK(!waitid(P_PGID, (id_t)zombie_session, &found, WEXITED | WNOWAIT) && found.si_pid == zombie_session && found.si_status == 4,
          "the session's leader: %d, status %d", found.si_pid, found.si_status);
    CHECK(kill(-dead_group, 0) == 0 && kill(-dead_session, 0) == 0, "a group is gone");
    CHECK(kill(dead_group, 0) == -1 && kill(dead_session, 0) == -1, "a leader has come back");
}
