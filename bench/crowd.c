/* The program that bench/trees moves: so many processes, threads, mappings or descriptors, each of which it can tell from the
 * others and looks at when asked. Arguments: what (processes, threads, mappings, descriptors), how many. */
#include "../tests/subjects/subject.h"

static int count;
static bool is_processes, is_threads, is_mappings, is_descriptors;
static char *block;
static int *numbers;                 /* of pipes: [2n] reads, [2n+1] writes */
static sigset_t question;
static pid_t *children;
static int answers[2];
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int round_now, answered;

/* Asked by a signal, it gives its number back as long as its memory is its own. */
static void child(int number) {
    uint64_t own = (uint64_t)number * 0x9e3779b97f4a7c15;
    siginfo_t asked;
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    for (;;) {
        if (sigwaitinfo(&question, &asked) != SIGUSR1) continue;
        if (own != (uint64_t)number * 0x9e3779b97f4a7c15) _exit(1);
        if (write(answers[1], &number, sizeof number) != sizeof number) _exit(2);
    }
}

static void *waiting(void *unused) {
    (void)unused;
    int seen = 0;
    pthread_mutex_lock(&turn);
    for (;;) {
        while (round_now == seen) pthread_cond_wait(&changed, &turn);
        seen = round_now;
        answered++;
        pthread_cond_broadcast(&changed);
    }
    return NULL;
}

static void setup(void) {
    MUST(argument_count == 2);
    count = atoi(arguments[1]);
    MUST(count > 0);
    is_processes = !strcmp(arguments[0], "processes");
    is_threads = !strcmp(arguments[0], "threads");
    is_mappings = !strcmp(arguments[0], "mappings");
    is_descriptors = !strcmp(arguments[0], "descriptors");
    MUST(is_processes || is_threads || is_mappings || is_descriptors);
    if (is_processes) {
        sigemptyset(&question);
        sigaddset(&question, SIGUSR1);
        MUST(sigprocmask(SIG_BLOCK, &question, NULL) == 0 && pipe(answers) == 0);
        children = calloc((size_t)count, sizeof *children);
        for (int n = 0; n < count; n++) {
            children[n] = fork();
            MUST(children[n] >= 0);
            if (children[n] == 0) child(n);
        }
    }
    if (is_threads)
        for (int n = 0; n < count; n++) thread(waiting, NULL);
    if (is_mappings) {
        block = pages((size_t)count * PAGE, PROT_READ | PROT_WRITE);
        for (int n = 0; n < count; n++) {
            memcpy(block + (size_t)n * PAGE, &n, sizeof n);
            /* Neighbours that differ do not merge. */
            if (n % 2) MUST(mprotect(block + (size_t)n * PAGE, PAGE, PROT_READ) == 0);
        }
    }
    if (is_descriptors) {
        numbers = calloc((size_t)count, sizeof *numbers);
        for (int n = 0; n + 1 < count; n += 2) {
            MUST(pipe(numbers + n) == 0);
            MUST(write(numbers[n + 1], &n, sizeof n) == sizeof n);
        }
    }
}

static void step(void) { doze(5); }

static void verify(int round) {
    if (is_processes) {
        for (int n = 0; n < count; n++) {
            int answer = -1;
            CHECK(kill(children[n], SIGUSR1) == 0, "child %d is gone", n);
            CHECK(read(answers[0], &answer, sizeof answer) == sizeof answer && answer == n, "child %d answers %d", n, answer);
        }
        int status;
        CHECK(waitpid(-1, &status, WNOHANG) == 0, "a child has ended");
    }
    if (is_threads) {
        pthread_mutex_lock(&turn);
        answered = 0;
        round_now++;
        pthread_cond_broadcast(&changed);
        while (answered < count) pthread_cond_wait(&changed, &turn);
        pthread_mutex_unlock(&turn);
    }
    for (int n = 0; is_mappings && n < count; n++) {
        int found;
        memcpy(&found, block + (size_t)n * PAGE, sizeof found);
        CHECK(found == n, "mapping %d holds %d", n, found);
    }
    for (int n = 0; is_descriptors && n + 1 < count; n += 2) {
        int found = -1;
        CHECK(read(numbers[n], &found, sizeof found) == sizeof found && found == n, "pipe %d holds %d", n, found);
        CHECK(write(numbers[n + 1], &n, sizeof n) == sizeof n, "pipe %d", n);
    }
    (void)round;
}
