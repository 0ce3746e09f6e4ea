/* A tree of processes: children and grandchildren that answer over pipes and socket pairs made before they were, one with a
 * session of its own, two in a group of their own. Each finds its memory, which lies at the same addresses in all, its
 * parent, session, group and parent-death signal as they were. Some end when asked to: their parent sees with what status,
 * its child gets the signal they wished for and go to the subreaper, and others take their places. */
#include "subject.h"
#include <poll.h>
#include <sys/socket.h>

enum { NEAR, FAR, LEADER, MEMBER, FIRST, SECOND, BRIEF, HEIR, WORKERS, PAGES = 64 };
/* Whose child each is: -1 is the subject itself. */
static const int parent_of[WORKERS] = {-1, NEAR, -1, LEADER, -1, -1, -1, BRIEF};
struct question { int op; int value; };
struct answer { int from, value, line; };

static char *block;
static int questions[WORKERS][2];  /* [0]: the worker's end */
static int answers[2];
static int *pids;                  /* of all, as each worker knows those that came before it */
static pid_t root;
static volatile sig_atomic_t orphaned;

static void note(int signal) { (void)signal, orphaned = 1; }

static void tell(int own, int value, int line) {
    struct answer answer = {own, value, line};
    if (write(answers[1], &answer, sizeof answer) != sizeof answer) _exit(99);
}

static pid_t spawn(int own);

/* The line at which a worker finds something wrong; 0: nothing. */
static int check(int own, pid_t parent) {
    size_t half = PAGES * PAGE / 2;
    int signal = -1;
    if (differs(block, half, 11)) return __LINE__;
    if (differs(block + half, half, 100 + (uint64_t)own)) return __LINE__;
    if (getppid() != parent) return __LINE__;
    if (prctl(PR_GET_PDEATHSIG, &signal) || signal != (own == HEIR ? SIGUSR1 : SIGKILL)) return __LINE__;
    pid_t session = own == LEADER ? getpid() : own == MEMBER ? parent : getsid(root);
    pid_t group = own == LEADER || own == FIRST ? getpid() : own == MEMBER ? parent : own == SECOND ? pids[FIRST] : getpgid(root);
    if (getsid(0) != session) return __LINE__;
    if (getpgid(0) != group) return __LINE__;
    return 0;
}

static void work(int own, pid_t parent) {
    prctl(PR_SET_PDEATHSIG, own == HEIR ? SIGUSR1 : SIGKILL);
    if (getppid() != parent) _exit(98);
    if (own == HEIR) sigaction(SIGUSR1, &(struct sigaction){.sa_handler = note}, NULL);
    if (own == LEADER) setsid();
    if (own == FIRST) setpgid(0, 0);
    if (own == SECOND) setpgid(0, pids[FIRST]);
    fill(block + PAGES * PAGE / 2, PAGES * PAGE / 2, 100 + (uint64_t)own);
    for (int child = 0; child < WORKERS; child++)
        if (parent_of[child] == own) spawn(child);
    tell(own, getpid(), 0);
    for (;;) {
        /* The signal may come before the wait begins. */
        struct pollfd one = {questions[own][0], POLLIN, 0};
        int ready = poll(&one, 1, 50);
        if (orphaned) {
            /* The parent is gone, and its heir is the subreaper's. */
            tell(own, -1, getppid() == root ? 0 : __LINE__);
            _exit(77);
        }
        if (ready != 1) continue;
        struct question question;
        if (read(questions[own][0], &question, sizeof question) != sizeof question) _exit(97);
        if (question.op == 'e') _exit(question.value);
        tell(own, question.value * 3 + own, check(own, parent));
    }
}

static pid_t spawn(int own) {
    pid_t parent = getpid(), child = fork();
    if (child == 0) work(own, parent);
    pids[own] = child;
    return child;
}

/* The next answer, which must come. */
static struct answer hear(void) {
    struct answer answer = {-1, 0, 0};
    struct pollfd one = {answers[0], POLLIN, 0};
    int ready;
    while ((ready = poll(&one, 1, 20000)) < 0 && errno == EINTR) {}
    if (ready == 1 && read(answers[0], &answer, sizeof answer) != sizeof answer) answer.from = -1;
    return answer;
}

/* Starts a child and hears of it and of its own. */
static void start(int own) {
    int expected = 1;
    for (int other = 0; other < WORKERS; other++) expected += parent_of[other] == own;
    MUST(spawn(own) > 0);
    while (expected--) {
        struct answer answer = hear();
        MUST(answer.from >= 0 && answer.from < WORKERS);
        pids[answer.from] = answer.value;
    }
}

static void ask(int worker, int op, int value) {
    struct question question = {op, value};
    CHECK(write(questions[worker][1], &question, sizeof question) == sizeof question, "worker %d cannot be asked", worker);
}

static void setup(void) {
    root = getpid();
    MUST(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0);
    block = pages(PAGES * PAGE, PROT_READ | PROT_WRITE);
    fill(block, PAGES * PAGE, 11);
    pids = calloc(WORKERS, sizeof *pids);
    MUST(pipe(answers) == 0);
    for (int worker = 0; worker < WORKERS; worker++)
        if (worker % 2) MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, questions[worker]) == 0);
        else MUST(pipe(questions[worker]) == 0);
    for (int worker = 0; worker < WORKERS; worker++)
        if (parent_of[worker] == -1) start(worker);
}

static void step(void) { doze(5); }

static void must_end(int worker, int wanted) {
    int status = -1;
    pid_t ended;
    while ((ended = waitpid(pids[worker], &status, 0)) < 0 && errno == EINTR) {}
    CHECK(ended == pids[worker] && WIFEXITED(status) && WEXITSTATUS(status) == wanted, "worker %d ended with %x (%d)", worker, status, ended);
}

static void verify(int round) {
    CHECK(!differs(block, PAGES * PAGE, 11), "memory differs at %lx", differs(block, PAGES * PAGE, 11));
    for (int worker = 0; worker < WORKERS; worker++) {
        ask(worker, 'v', round);
        struct answer answer = hear();
        CHECK(answer.from == worker && answer.value == round * 3 + worker, "worker %d: answer %d of %d", worker, answer.value, answer.from);
        CHECK(!answer.line, "worker %d finds fault at line %d", worker, answer.line);
    }
    /* One ends: its parent is told, its heir gets its signal and a new parent. */
    ask(BRIEF, 'e', round % 90);
    must_end(BRIEF, round % 90);
    struct answer last = hear();
    CHECK(last.from == HEIR && last.value == -1 && !last.line, "the heir says %d of %d, at line %d", last.value, last.from, last.line);
    must_end(HEIR, 77);
    CHECK(waitpid(-1, NULL, WNOHANG) == 0, "a child ended that nobody told to");
    start(BRIEF);
}
