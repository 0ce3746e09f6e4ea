/* Restartable sequences: every thread's registration is there, and a critical section that was left is aborted, never
 * carried on: per-CPU counters that are incremented without atomics add up. */
#include "subject.h"
#include <sched.h>
#include <sys/rseq.h>

enum { COUNTERS = 256, WORKERS = 3 };

struct cell {
    int64_t count;
    int64_t pad[7];
};
static struct cell cells[COUNTERS]; /* one for each CPU number */
static _Atomic int64_t expected;    /* increments that said they happened */
static _Atomic int hold_still, still;

static struct rseq *area(void) { return (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset); }

/* One increment of this CPU's cell: load, think for a while, store. False: it was interrupted and did nothing. */
static bool increment(struct rseq *rs) {
    uint32_t cpu = *(volatile uint32_t *)&rs->cpu_id_start;
    if (cpu >= COUNTERS) return false;
    int64_t *at = &cells[cpu].count;
    __asm__ goto volatile(
        ".pushsection __rseq_cs, \"aw\"\n.balign 32\n3:\n.long 0, 0\n.quad 1f, (2f - 1f), 4f\n.popsection\n"
        "lea 3b(%%rip), %%rax\nmov %%rax, 8(%[rs])\n" /* rseq_cs */
        "1:\ncmp %[cpu], 4(%[rs])\njnz 4f\n"          /* cpu_id */
        "mov (%[at]), %%rax\n"
        "mov $40, %%ecx\n5: dec %%ecx\njnz 5b\n"
        "inc %%rax\nmov %%rax, (%[at])\n2:\n"
        ".pushsection __rseq_failure, \"ax\"\n.byte 0x0f, 0xb9, 0x3d\n.long %c[signature]\n4:\njmp %l[aborted]\n.popsection\n"
        :
        : [rs] "r"(rs), [cpu] "r"(cpu), [at] "r"(at), [signature] "i"(RSEQ_SIG)
        : "rax", "rcx", "memory", "cc"
        : aborted);
    return true;
aborted:
    return false;
}

static void *work(void *unused) {
    (void)unused;
    struct rseq *rs = area();
    for (;;) {
        while (atomic_load(&hold_still)) {
            atomic_fetch_add(&still, 1);
            while (atomic_load(&hold_still)) doze(1);
            atomic_fetch_sub(&still, 1);
        }
        int64_t done = 0;
        for (int i = 0; i < 1000; i++) done += increment(rs);
        atomic_fetch_add(&expected, done);
    }
    return NULL;
}

static void setup(void) {
    NEEDS(__rseq_size > 0, "this C library registers no rseq area");
    for (int i = 0; i < WORKERS; i++) thread(work, NULL);
    MUST(EVENTUALLY(atomic_load(&expected) > 10000));
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    atomic_store(&hold_still, 1);
    CHECK(EVENTUALLY(atomic_load(&still) == WORKERS), "a worker does not come to rest");
    int64_t sum = 0;
    for (int i = 0; i < COUNTERS; i++) sum += cells[i].count;
    CHECK(sum == atomic_load(&expected), "%ld increments were lost or doubled", (long)(sum - atomic_load(&expected)));
    int64_t before = atomic_load(&expected);
    atomic_store(&hold_still, 0);
    CHECK(EVENTUALLY(atomic_load(&still) == 0 && atomic_load(&expected) > before), "no critical section succeeds any more");
    unsigned size = __rseq_size < 32 ? 32 : __rseq_size;
    long again = syscall(SYS_rseq, area(), size, 0, RSEQ_SIG);
    CHECK(again == -1 && (errno == EBUSY || errno == EINVAL), "the rseq area was not registered");
    int cpu = (int)*(volatile uint32_t *)&area()->cpu_id;
    CHECK(cpu >= 0, "the kernel no longer writes the rseq area: cpu_id %d", cpu);
}
