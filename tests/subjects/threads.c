/* Threads: each has its own id, its own thread-local storage and its own stack, and all of them go on.
 * Argument: how many (24). */
#include "subject.h"

enum { THREADS_MAX = 2000, STACK = 128 << 10 };
static int threads = 24;

static __thread uint64_t secret;          /* initialised thread by thread */
static __thread uint64_t zeroed[600];     /* more than a page of .tbss */
static __thread uint64_t loaded = 0x5eed; /* .tdata */

static struct {
    pthread_t self;
    pid_t tid;
    _Atomic uint64_t beats;
} roster[THREADS_MAX];

static void *work(void *argument) {
    uint64_t index = (uint64_t)(uintptr_t)argument;
    uint64_t on_stack[64];
    roster[index].self = pthread_self();
    roster[index].tid = own_tid();
    secret = mix(index);
    fill(on_stack, sizeof on_stack, index);
    for (uint64_t beat = 0;; beat++) {
        CHECK(secret == mix(index), "thread %lu: thread-local word changed", index);
        CHECK(loaded == 0x5eed + beat, "thread %lu: initialised thread-local word is %lx", index, loaded);
        CHECK(zeroed[beat % 600] == beat / 600, "thread %lu: thread-local array changed", index);
        CHECK(pthread_equal(pthread_self(), roster[index].self), "thread %lu: pthread_self changed", index);
        CHECK(own_tid() == roster[index].tid, "thread %lu: its id is %d, was %d", index, own_tid(), roster[index].tid);
        CHECK(!differs(on_stack, sizeof on_stack, index), "thread %lu: its stack changed", index);
        loaded++;
        zeroed[beat % 600]++;
        atomic_fetch_add(&roster[index].beats, 1);
        if (index % 8 || index >= 24) doze(threads / 8); /* three of them never rest */
    }
    return NULL;
}

static void setup(void) {
    if (argument_count) threads = atoi(arguments[0]);
    MUST(threads > 0 && threads <= THREADS_MAX);
    pthread_attr_t small;
    MUST(!pthread_attr_init(&small) && !pthread_attr_setstacksize(&small, STACK) && !pthread_setattr_default_np(&small));
    for (uintptr_t i = 0; i < (uintptr_t)threads; i++) thread(work, (void *)i);
    for (int i = 0; i < threads; i++) MUST(EVENTUALLY(atomic_load(&roster[i].beats)));
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    static uint64_t before[THREADS_MAX];
    for (int i = 0; i < threads; i++) before[i] = atomic_load(&roster[i].beats);
    for (int i = 0; i < threads; i++) {
        CHECK(EVENTUALLY(atomic_load(&roster[i].beats) > before[i]), "thread %d stands still", i);
        CHECK(syscall(SYS_tgkill, getpid(), roster[i].tid, 0) == 0, "thread %d is gone", i);
    }
}
