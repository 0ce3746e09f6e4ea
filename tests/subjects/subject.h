/* What every subject shares: a subject is a small program that sets up one kind of kernel object, says READY,
 * and checks itself whenever it is asked, on whichever host it happens to be.
 *
 * Usage: SUBJECT --state FILE [argument…]
 * It appends lines to FILE, opened anew for each line so that no descriptor stays open between them:
 *     READY pid address     everything is set up; the 64-bit heartbeat counter lies at this address
 *     PASS n | FAIL n why   the answer to question n
 *     BYE                   it ended on request
 * The harness asks by writing "n" or "end" to FILE.ask. FILE must lie on a path both hosts see.
 *
 * A subject defines setup(), verify(round) and step(), and never asks the host what time it is, except where the
 * clock is the object under test. */
#ifndef SUBJECT_H
#define SUBJECT_H
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096 };

static void setup(void);           /* makes the object */
static void verify(int round);     /* CHECKs it and leaves it ready for the next round; round counts from 1 */
static void step(void);            /* one beat of steady work: pause() below, or something busier */

static const char *state_path;
static int argument_count;
static char **arguments;           /* what follows --state FILE */
static _Atomic uint64_t heartbeat; /* moves as long as the program runs */

static pthread_mutex_t failure_lock = PTHREAD_MUTEX_INITIALIZER;
static char failure[400];          /* the first CHECK that failed since the last answer */

__attribute__((format(printf, 2, 3))) static void fail(int line, const char *format, ...) {
    int error = errno;
    pthread_mutex_lock(&failure_lock);
    if (!failure[0]) {
        int used = snprintf(failure, sizeof failure, "line %d: ", line);
        va_list list;
        va_start(list, format);
        used += vsnprintf(failure + used, sizeof failure - (size_t)used, format, list);
        va_end(list);
        if (used < (int)sizeof failure) snprintf(failure + used, sizeof failure - (size_t)used, " (errno %d)", error);
        for (char *c = failure; *c; c++)
            if (*c == '\n') *c = ' ';
    }
    pthread_mutex_unlock(&failure_lock);
}

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...) {
    char line[512];
    va_list list;
    va_start(list, format);
    int length = vsnprintf(line, sizeof line - 1, format, list);
    va_end(list);
    if (length > (int)sizeof line - 2) length = sizeof line - 2;
    line[length++] = '\n';
    int fd = open(state_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0 || write(fd, line, (size_t)length) != length) abort();
    close(fd);
}

/* Remembers the first violation; the answer to the question is then FAIL. */
#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (!(condition)) fail(__LINE__, __VA_ARGS__);                                                                 \
    } while (0)

/* For setup(): without this the subject makes no sense. */
#define MUST(condition)                                                                                                \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fail(__LINE__, "setup: %s", #condition);                                                                   \
            say("FAIL 0 %s", failure);                                                                                 \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* For setup(): this kernel or processor does not have the object. */
#define NEEDS(condition, what)                                                                                         \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            say("SKIP %s", what);                                                                                      \
            exit(0);                                                                                                   \
        }                                                                                                              \
    } while (0)

__attribute__((unused)) static void doze(long milliseconds) {
    struct timespec rest = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    while (nanosleep(&rest, &rest) && errno == EINTR) {}
}

/* Waits until the condition holds, at most ten seconds of dozing. */
#define EVENTUALLY(condition)                                                                                          \
    ({                                                                                                                 \
        int tries_ = 2000;                                                                                             \
        while (!(condition) && --tries_) doze(5);                                                                      \
        tries_ > 0;                                                                                                    \
    })

/* A number that looks random and is a function of its argument alone (splitmix64). */
__attribute__((unused)) static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* Fills memory so that every word is a function of its own address and the seed: a page from another place, another
 * time or of zeros is always found. */
__attribute__((unused)) static void fill(void *start, size_t length, uint64_t seed) {
    for (uint64_t *word = start, *end = (uint64_t *)((char *)start + length); word < end; word++)
        *word = mix((uint64_t)(uintptr_t)word ^ seed);
}

/* The address of the first word that is not what fill() put there, or 0. */
__attribute__((unused)) static uint64_t differs(const void *start, size_t length, uint64_t seed) {
    for (const uint64_t *word = start, *end = (const uint64_t *)((const char *)start + length); word < end; word++)
        if (*word != mix((uint64_t)(uintptr_t)word ^ seed)) return (uint64_t)(uintptr_t)word;
    return 0;
}

__attribute__((unused)) static void *pages(size_t length, int protection) {
    void *at = mmap(NULL, length, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(at != MAP_FAILED);
    return at;
}

/* Reads a whole small file, such as one of /proc; the text is the caller's to free. */
__attribute__((unused)) static char *slurp(const char *path, size_t *length) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return NULL;
    size_t size = 1 << 18, used = 0;
    char *text = malloc(size);
    for (;;) {
        if (used + 1 >= size) text = realloc(text, size *= 2);
        ssize_t got = read(fd, text + used, size - used - 1);
        if (got <= 0) break;
        used += (size_t)got;
    }
    close(fd);
    text[used] = 0;
    if (length) *length = used;
    return text;
}

/* Starts a thread that must start. */
__attribute__((unused)) static pthread_t thread(void *(*body)(void *), void *argument) {
    pthread_t id;
    MUST(pthread_create(&id, NULL, body, argument) == 0);
    return id;
}

__attribute__((unused)) static pid_t own_tid(void) { return (pid_t)syscall(SYS_gettid); }

int main(int count, char **values) {
    if (count < 3 || strcmp(values[1], "--state")) {
        fprintf(stderr, "usage: %s --state FILE [argument...]\n", values[0]);
        return 2;
    }
    state_path = values[2];
    argument_count = count - 3;
    arguments = values + 3;
    static char ask_path[4096];
    snprintf(ask_path, sizeof ask_path, "%s.ask", state_path);

    setup();
    say("READY %d %lx", getpid(), (unsigned long)(uintptr_t)&heartbeat);

    for (int answered = 0;;) {
        step();
        atomic_fetch_add(&heartbeat, 1);
        int fd = open(ask_path, O_RDONLY | O_CLOEXEC);
        if (fd < 0) continue;
        char question[32] = "";
        ssize_t length = read(fd, question, sizeof question - 1);
        close(fd);
        if (length <= 0 || question[length - 1] != '\n') continue;
        if (!strncmp(question, "end", 3)) {
            say("BYE");
            exit(0);
        }
        int round = atoi(question);
        if (round <= answered) continue;
        verify(round);
        answered = round;
        pthread_mutex_lock(&failure_lock);
        if (failure[0]) say("FAIL %d %s", round, failure);
        else say("PASS %d", round);
        failure[0] = 0;
        pthread_mutex_unlock(&failure_lock);
    }
}
#endif
