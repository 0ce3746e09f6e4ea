/* Processes, none of them threads of each other, in one memory, as clone(2) gives it with CLONE_VM: a child with threads of its
 * own, one that shares signal actions, descriptors and directory too, a grandchild that shares its parent's signal actions, one
 * that has ended; and a child of one of them with memory of its own. What one writes, maps, unmaps or moves the break to all find,
 * and a page that one touches first is right for it and for those it forks. Two others are in memory whose first process has ended;
 * in the second round the one ends, and the other finds there what it never touched. With "parted" there is one more that cannot be carried:
 * a child in our memory whose parent, which was in it too, has executed another program. */
#include "subject.h"
#include <sched.h>
#include <sys/syscall.h>

enum { SUBJECT, PLAIN, WHOLE, GRAND, APART, HEIR, LAST, ALL };
static const int memory_of[ALL] = {SUBJECT, SUBJECT, SUBJECT, SUBJECT, APART, HEIR, HEIR};
static const int actions_of[ALL] = {SUBJECT, PLAIN, SUBJECT, PLAIN, APART, HEIR, LAST};
static const int table_of[ALL] = {SUBJECT, PLAIN, SUBJECT, GRAND, APART, HEIR, LAST};
static const int place_of[ALL] = {SUBJECT, PLAIN, SUBJECT, GRAND, APART, HEIR, LAST};
static int parent_of[ALL] = {-1, SUBJECT, SUBJECT, PLAIN, WHOLE, SUBJECT, HEIR};

enum { STACK = 64 * PAGE, FIELD = 128 * PAGE, THREADS = 2, SIGNAL = SIGUSR2 };

/* In memory that all have, the one with its own too: what each is to do, and what it found. */
static struct {
    _Atomic int pid, asked, answered;
    int op;
    uint64_t value, found;
} *all;

/* In the common memory. */
static _Atomic uint64_t beats[ALL], thread_beats[THREADS];
static pid_t thread_ids[THREADS];
static char *fields[ALL]; /* one for each, whose pages it touches first */
static uint64_t seeds[ALL];
static pid_t ended, first;

static void handler(int signal) { (void)signal; }

static uint64_t look(int own, int op, uint64_t value) {
    switch (op) {
    case 'w': /* reads its field, which nobody else has touched, and writes it anew */
        if (differs(fields[own], FIELD, seeds[own])) return 1;
        fill(fields[own], FIELD, seeds[own] = value);
        return 0;
    case 'r': /* reads that of another */
        return differs(fields[value], FIELD, seeds[value]);
    case 'm':
        return (uint64_t)(uintptr_t)mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    case 'u':
        return (uint64_t)munmap((void *)(uintptr_t)value, PAGE);
    case 'p': /* whether there is a page */
        return msync((void *)(uintptr_t)value, PAGE, MS_ASYNC) == 0;
    case 'b':
        return (uint64_t)syscall(SYS_brk, value);
    case 'a': { /* sets an action */
        struct sigaction action = {.sa_handler = value ? handler : SIG_DFL};
        return (uint64_t)sigaction(SIGNAL, &action, NULL);
    }
    case 'q': {
        struct sigaction action;
        return sigaction(SIGNAL, NULL, &action) == 0 && action.sa_handler == handler;
    }
    case 'f': { /* what it forks has a copy of a field that nobody here has touched since */
        pid_t child = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
        if (child == 0) syscall(SYS_exit_group, differs(fields[value], FIELD, seeds[value]) != 0);
        int status = -1;
        while (waitpid(child, &status, 0) < 0 && errno == EINTR) {}
        return child < 0 || status != 0;
    }
    case 'x':
        syscall(SYS_exit_group, 8);
        return 1;
    default:
        return (uint64_t)syscall(SYS_getpid);
    }
}

static void serve(int own) {
    if (own != LAST) prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (;; doze(1)) {
        pid_t parent = getppid();
        if (own == LAST && parent != all[HEIR].pid && parent != all[SUBJECT].pid) syscall(SYS_exit_group, 0);
        atomic_fetch_add(&beats[own], 1);
        if (atomic_load(&all[own].asked) == atomic_load(&all[own].answered)) continue;
        all[own].found = look(own, all[own].op, all[own].value);
        atomic_fetch_add(&all[own].answered, 1);
    }
}

static uint64_t ask(int one, int op, uint64_t value) {
    if (one == SUBJECT) return look(one, op, value);
    all[one].op = op, all[one].value = value;
    int answers = atomic_fetch_add(&all[one].asked, 1) + 1;
    CHECK(EVENTUALLY(atomic_load(&all[one].answered) == answers), "process %d does not answer", one);
    return all[one].found;
}

static void *beat(void *argument) {
    int index = (int)(uintptr_t)argument;
    thread_ids[index] = own_tid();
    for (;; doze(1)) atomic_fetch_add(&thread_beats[index], 1);
    return NULL;
}

static int live(void *argument);

/* Makes a process in this memory, whose thread-local storage is that of a thread that does nothing else any more. */
static void *mother(void *argument) {
    static const int flags[ALL] = {
        [PLAIN] = CLONE_VM, [WHOLE] = CLONE_VM | CLONE_SIGHAND | CLONE_FILES | CLONE_FS, [GRAND] = CLONE_VM | CLONE_SIGHAND, [HEIR] = CLONE_VM, [LAST] = CLONE_VM};
    int own = (int)(uintptr_t)argument;
    char *stack = pages(STACK, PROT_READ | PROT_WRITE);
    /* One tells nobody of its end. */
    int pid = clone(live, stack + STACK, flags[own] | (own == GRAND ? 0 : SIGCHLD), argument);
    MUST(pid > 0);
    atomic_store(&all[own].pid, pid);
    for (;;) syscall(SYS_pause);
    return NULL;
}

static int live(void *argument) {
    int own = (int)(uintptr_t)argument;
    if (own == PLAIN) {
        for (uintptr_t index = 0; index < THREADS; index++) thread(beat, (void *)index);
        thread(mother, (void *)(uintptr_t)GRAND);
    }
    if (own == WHOLE) {
        pid_t child = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
        if (child == 0) serve(APART);
        atomic_store(&all[APART].pid, child);
    }
    if (own == HEIR) {
        thread(mother, (void *)(uintptr_t)LAST);
        while (getppid() != all[SUBJECT].pid) doze(1);
    }
    serve(own);
    return 0;
}

static int end(void *nothing) {
    (void)nothing;
    syscall(SYS_exit_group, 5);
    return 0;
}

static int rest(void *nothing) {
    (void)nothing;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (;;) syscall(SYS_pause);
    return 0;
}

/* A child of ours that leaves one in our memory and becomes another program. Says which it is that is refused. */
static int part(void *nothing) {
    (void)nothing;
    static char stack[STACK] __attribute__((aligned(16)));
    static char *const program[] = {"/bin/sleep", "1000", NULL};
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    ended = clone(rest, stack + STACK, CLONE_VM | SIGCHLD, NULL);
    execv(program[0], program);
    return 1;
}

/* And has not been waited for. */
static bool has_ended(pid_t child, int code) {
    siginfo_t info = {0};
    bool is_child = waitid(P_PID, (id_t)child, &info, WEXITED | WNOHANG | WNOWAIT) == 0;
    return is_child && info.si_pid == child && info.si_status == code;
}

static void setup(void) {
    all = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    MUST(all != MAP_FAILED && prctl(PR_SET_CHILD_SUBREAPER, 1) == 0);
    char *stack = pages(STACK, PROT_READ | PROT_WRITE);
    if (argument_count) {
        int parent = clone(part, stack + STACK, CLONE_VM | SIGCHLD, NULL);
        char path[64], *name;
        snprintf(path, sizeof path, "/proc/%d/comm", parent);
        MUST(parent > 0);
        MUST(EVENTUALLY((name = slurp(path, NULL)) && !strcmp(name, "sleep\n")));
        say("REFUSED %d", ended);
        return;
    }
    all[SUBJECT].pid = getpid();
    for (int one = 0; one < ALL; one++) fill(fields[one] = pages(FIELD, PROT_READ | PROT_WRITE), FIELD, seeds[one] = (uint64_t)one);
    thread(mother, (void *)(uintptr_t)PLAIN);
    thread(mother, (void *)(uintptr_t)WHOLE);
    first = fork();
    if (first == 0) {
        thread(mother, (void *)(uintptr_t)HEIR);
        while (!atomic_load(&all[LAST].pid)) doze(1);
        syscall(SYS_exit_group, 6);
    }
    for (int one = 1; one < ALL; one++) MUST(EVENTUALLY(atomic_load(&all[one].pid)));
    for (int index = 0; index < THREADS; index++) MUST(EVENTUALLY(atomic_load(&thread_beats[index])));
    ended = clone(end, stack + STACK, CLONE_VM | SIGCHLD, NULL);
    MUST(ended > 0);
    MUST(EVENTUALLY(has_ended(ended, 5) && has_ended(first, 6)));
}

static void step(void) { doze(5); }

/* The one ends whose memory it is: the other is alone in it then. */
static void verify_heirs(int round) {
    if (round == 1) {
        CHECK(ask(HEIR, 'w', 1000) == 0 && ask(LAST, 'r', HEIR) == 0, "the field of the heir");
        CHECK(ask(HEIR, 'p', ask(LAST, 'm', 0)) == 1, "the heirs map apart");
    }
    if (round == 2) {
        all[HEIR].op = 'x';
        atomic_fetch_add(&all[HEIR].asked, 1);
        CHECK(EVENTUALLY(has_ended(all[HEIR].pid, 8)), "the heir does not end");
        waitpid(all[HEIR].pid, NULL, 0);
        parent_of[LAST] = SUBJECT;
    }
    CHECK(ask(LAST, 'f', LAST) == 0, "what the last forks has another field");
    CHECK(ask(LAST, 'w', mix((uint64_t)round)) == 0, "the field of the last changed");
    CHECK(ask(LAST, 'r', HEIR) == 0, "the last sees another field of the heir");
}

static bool is_there(int one) { return one != HEIR || parent_of[LAST] == HEIR; }

static bool same(int a, int b, int what) { return syscall(SYS_kcmp, all[a].pid, all[b].pid, what, 0, 0) == 0; }

static void verify(int round) {
    enum { KCMP_VM = 1, KCMP_FILES = 2, KCMP_FS = 3, KCMP_SIGHAND = 4 };
    if (argument_count) return;
    uint64_t before[ALL], threads_before[THREADS];
    for (int one = 1; one < ALL; one++) before[one] = atomic_load(&beats[one]);
    for (int index = 0; index < THREADS; index++) threads_before[index] = atomic_load(&thread_beats[index]);
    verify_heirs(round);
    for (int one = 0; one < ALL; one++)
        for (int other = 0; other < ALL; other++) {
            if (!is_there(one) || !is_there(other)) continue;
            CHECK(same(one, other, KCMP_VM) == (memory_of[one] == memory_of[other]), "the memory of %d and %d", one, other);
            CHECK(same(one, other, KCMP_SIGHAND) == (actions_of[one] == actions_of[other]), "the actions of %d and %d", one, other);
            CHECK(same(one, other, KCMP_FILES) == (table_of[one] == table_of[other]), "the tables of %d and %d", one, other);
            CHECK(same(one, other, KCMP_FS) == (place_of[one] == place_of[other]), "the directories of %d and %d", one, other);
        }
    for (int one = 0; one < ALL; one++) {
        if (!is_there(one)) continue;
        CHECK(ask(one, 'i', 0) == (uint64_t)all[one].pid, "process %d has another number", one);
        if (memory_of[one] != SUBJECT) continue;
        /* What it forks sees pages that none of us has touched; then it touches them. */
        CHECK(ask(one, 'f', (uint64_t)one) == 0, "what process %d forks has another field", one);
        CHECK(ask(one, 'w', mix((uint64_t)(round * ALL + one))) == 0, "the field of process %d changed", one);
        uint64_t place = ask(one, 'm', 0);
        int next = (one + 1) % APART;
        for (int other = 0; other < ALL; other++) {
            bool shares = memory_of[other] == SUBJECT;
            CHECK(!shares || ask(other, 'r', (uint64_t)one) == 0, "process %d sees another field of %d", other, one);
            if (other > APART) continue; /* may have mapped something else there */
            CHECK(ask(other, 'p', place) == shares, "process %d and what %d has mapped", other, one);
        }
        CHECK(ask(next, 'u', place) == 0, "process %d does not unmap", next);
        CHECK(ask(one, 'p', place) == 0, "process %d still has it mapped", one);
        uint64_t end = ask(one, 'b', ask(one, 'b', 0) + PAGE);
        for (int other = 0; other < APART; other++) CHECK(ask(other, 'b', 0) == end, "process %d has another break", other);
        CHECK(ask(one, 'a', 1) == 0, "process %d sets no action", one);
        for (int other = 0; other < ALL; other++)
            CHECK(!is_there(other) || ask(other, 'q', 0) == (actions_of[one] == actions_of[other]), "process %d and the action of %d", other, one);
        CHECK(ask(one, 'a', 0) == 0, "process %d sets no action", one);
    }
    CHECK(ask(APART, 'r', APART) == 0, "the field of the one apart changed");
    for (int one = 1; one < APART; one++)
        CHECK(EVENTUALLY(atomic_load(&beats[one]) > before[one]), "process %d stands still", one);
    for (int index = 0; index < THREADS; index++) {
        CHECK(EVENTUALLY(atomic_load(&thread_beats[index]) > threads_before[index]), "thread %d stands still", index);
        CHECK(syscall(SYS_tgkill, all[PLAIN].pid, thread_ids[index], 0) == 0, "thread %d is not of its process", index);
    }
    for (int one = 1; one < ALL; one++) {
        char path[64], *stat;
        snprintf(path, sizeof path, "/proc/%d/stat", all[one].pid);
        stat = slurp(path, NULL);
        char *behind = stat ? strrchr(stat, ')') : NULL;
        CHECK(!is_there(one) || (behind && atoi(behind + 4) == all[parent_of[one]].pid), "process %d has another parent", one);
        free(stat);
    }
    CHECK(has_ended(ended, 5) && has_ended(first, 6), "those that had ended have not ended so");
}
