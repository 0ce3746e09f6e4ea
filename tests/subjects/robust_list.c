/* Robust futexes: each thread's list head is known to the kernel, so that the death of a holder wakes the next. */
#include "subject.h"
#include <linux/futex.h>

static pthread_mutex_t mutex;
static _Atomic int owned, may_die;
static pthread_t owner;
static struct robust_list_head *head_before;
static size_t length_before;

static void *own_and_die(void *unused) {
    (void)unused;
    pthread_mutex_lock(&mutex);
    atomic_store(&owned, 1);
    while (!atomic_load(&may_die)) doze(2);
    return NULL;
}

static void arm(void) {
    atomic_store(&owned, 0);
    atomic_store(&may_die, 0);
    owner = thread(own_and_die, NULL);
    MUST(EVENTUALLY(atomic_load(&owned)));
}

static void setup(void) {
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    MUST(pthread_mutex_init(&mutex, &attributes) == 0);
    MUST(syscall(SYS_get_robust_list, 0, &head_before, &length_before) == 0 && head_before);
    arm();
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    struct robust_list_head *head = NULL;
    size_t length = 0;
    CHECK(syscall(SYS_get_robust_list, 0, &head, &length) == 0, "get_robust_list fails");
    CHECK(head == head_before && length == length_before, "the robust list is %p, was %p", (void *)head, (void *)head_before);
    CHECK(pthread_mutex_trylock(&mutex) == EBUSY, "the mutex is not held by the other thread");
    atomic_store(&may_die, 1);
    CHECK(EVENTUALLY(pthread_tryjoin_np(owner, NULL) == 0), "the owner does not end");
    int got = pthread_mutex_trylock(&mutex);
    CHECK(got == EOWNERDEAD, "the mutex of a dead thread gives %d, not EOWNERDEAD", got);
    if (got == EOWNERDEAD) pthread_mutex_consistent(&mutex), pthread_mutex_unlock(&mutex);
    arm();
}
