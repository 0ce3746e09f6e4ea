/* Scheduling of each thread: policy, nice value, affinity, I/O priority, timer slack and name. */
#include "subject.h"
#include <sched.h>

enum { THREADS = 5 };
struct schedule {
    struct { uint32_t size, policy; uint64_t flags; int32_t nice; uint32_t priority; uint64_t runtime, deadline, period; } attributes;
    cpu_set_t affinity;
    long ioprio, slack;
    char name[16];
};
static struct schedule before[THREADS];
static _Atomic int ready[THREADS], asked, answered[THREADS];

static void look(struct schedule *out) {
    memset(out, 0, sizeof *out);
    syscall(SYS_sched_getattr, 0, &out->attributes, sizeof out->attributes, 0);
    sched_getaffinity(0, sizeof out->affinity, &out->affinity);
    out->ioprio = syscall(SYS_ioprio_get, 1, 0);
    out->slack = prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0);
    prctl(PR_GET_NAME, out->name, 0, 0, 0);
}

static void *work(void *argument) {
    uintptr_t index = (uintptr_t)argument;
    struct sched_param none = {0};
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(0, &one);
    switch (index) {
    case 1:
        MUST(sched_setscheduler(0, SCHED_BATCH, &none) == 0);
        MUST(sched_setaffinity(0, sizeof one, &one) == 0);
        break;
    case 2:
        MUST(sched_setscheduler(0, SCHED_IDLE, &none) == 0);
        break;
    case 3:
        MUST(syscall(SYS_setpriority, 0, 0, 7) == 0);
        MUST(syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 6) == 0);
        break;
    case 4:
        MUST(prctl(PR_SET_TIMERSLACK, 777000, 0, 0, 0) == 0);
        MUST(syscall(SYS_ioprio_set, 1, 0, 3 << 13) == 0);
        break;
    }
    char name[16];
    snprintf(name, sizeof name, "odd) name %lu \xe2\x82\xac", index);
    prctl(PR_SET_NAME, name, 0, 0, 0);
    look(&before[index]);
    atomic_store(&ready[index], 1);
    for (;;) {
        int round = atomic_load(&asked);
        if (round != atomic_load(&answered[index])) {
            struct schedule now;
            look(&now);
            CHECK(!memcmp(&now.attributes, &before[index].attributes, sizeof now.attributes),
                  "thread %lu: policy %u nice %d priority %u, were %u %d %u", index, now.attributes.policy, now.attributes.nice,
                  now.attributes.priority, before[index].attributes.policy, before[index].attributes.nice,
                  before[index].attributes.priority);
            CHECK(CPU_EQUAL(&now.affinity, &before[index].affinity), "thread %lu: affinity changed", index);
            CHECK(now.ioprio == before[index].ioprio, "thread %lu: ioprio is %lx, was %lx", index, now.ioprio, before[index].ioprio);
            CHECK(now.slack == before[index].slack, "thread %lu: timer slack is %ld, was %ld", index, now.slack, before[index].slack);
            CHECK(!memcmp(now.name, before[index].name, 16), "thread %lu: name is %.16s", index, now.name);
            atomic_store(&answered[index], round);
        }
        doze(2);
    }
    return NULL;
}

static void setup(void) {
    for (uintptr_t i = 0; i < THREADS; i++) thread(work, (void *)i);
    for (int i = 0; i < THREADS; i++) MUST(EVENTUALLY(atomic_load(&ready[i])));
}

static void step(void) { doze(5); }

static void verify(int round) {
    atomic_store(&asked, round);
    for (int i = 0; i < THREADS; i++) CHECK(EVENTUALLY(atomic_load(&answered[i]) == round), "thread %d does not answer", i);
}
