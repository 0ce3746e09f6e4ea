/* clear_child_tid: a thread that ends clears the word the kernel was given for it, and wakes who joins. */
#include "subject.h"
#include <sys/prctl.h>

enum { THREADS = 8 };
static pthread_t crowd[THREADS];
static _Atomic int wave, waiting;
static int *address[THREADS];
static _Atomic int address_changed;

static int *clear_address(void) {
    int *at = NULL;
    return prctl(PR_GET_TID_ADDRESS, &at) == 0 ? at : NULL;
}

static void *work(void *argument) {
    uintptr_t index = (uintptr_t)argument;
    address[index] = clear_address();
    int born = atomic_load(&wave);
    atomic_fetch_add(&waiting, 1);
    while (atomic_load(&wave) == born) doze(2);
    if (clear_address() != address[index]) atomic_store(&address_changed, 1);
    return argument;
}

static void arm(void) {
    atomic_store(&waiting, 0);
    for (uintptr_t i = 0; i < THREADS; i++) crowd[i] = thread(work, (void *)i);
    MUST(EVENTUALLY(atomic_load(&waiting) == THREADS));
}

static void setup(void) { arm(); }
static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    atomic_fetch_add(&wave, 1);
    for (uintptr_t i = 0; i < THREADS; i++) {
        void *result = NULL;
        CHECK(EVENTUALLY(pthread_tryjoin_np(crowd[i], &result) == 0), "thread %lu cannot be joined", i);
        CHECK(result == (void *)i, "thread %lu returned %p", i, result);
    }
    CHECK(!atomic_load(&address_changed), "PR_GET_TID_ADDRESS changed");
    arm();
}
