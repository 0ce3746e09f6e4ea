/* Clocks through the vdso and through the kernel: monotonic ones never go back, and do not jump by more than a crossing
 * may last (--clock keep). Argument: how many threads watch them without rest (1). */
#include "subject.h"
#include <sys/time.h>

static const clockid_t steady[] = {CLOCK_MONOTONIC, CLOCK_MONOTONIC_RAW, CLOCK_MONOTONIC_COARSE, CLOCK_BOOTTIME};
enum { STEADY = 4 };
static const int64_t longest_pause = 30000000000; /* ns: what a loaded machine may need between two looks */
static _Atomic uint64_t looks;

static int64_t vdso(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * 1000000000l + now.tv_nsec;
}

static int64_t kernel(clockid_t clock) {
    struct timespec now;
    syscall(SYS_clock_gettime, clock, &now);
    return now.tv_sec * 1000000000l + now.tv_nsec;
}

static void *look(void *unused) {
    (void)unused;
    int64_t last[STEADY];
    for (int i = 0; i < STEADY; i++) last[i] = kernel(steady[i]);
    for (;; atomic_fetch_add(&looks, 1)) {
        for (int i = 0; i < STEADY; i++) {
            int64_t now = atomic_load(&looks) % 64 ? vdso(steady[i]) : kernel(steady[i]);
            int64_t slack = steady[i] == CLOCK_MONOTONIC_COARSE ? 20000000 : 0; /* a tick of either host */
            CHECK(now >= last[i] - slack, "clock %d went back by %ld ns", steady[i], last[i] - now);
            CHECK(now - last[i] < longest_pause, "clock %d jumped by %ld ns", steady[i], now - last[i]);
            last[i] = now;
        }
    }
    return NULL;
}

static void setup(void) {
    for (int i = argument_count ? atoi(arguments[0]) : 1; i > 0; i--) thread(look, NULL);
    MUST(EVENTUALLY(atomic_load(&looks) > 100));
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    uint64_t before = atomic_load(&looks);
    CHECK(EVENTUALLY(atomic_load(&looks) > before + 1000), "the watcher of the clocks stands still");
    for (int i = 0; i < STEADY; i++) {
        int64_t low = kernel(steady[i]), middle = vdso(steady[i]), high = kernel(steady[i]);
        CHECK(low <= middle && middle <= high, "clock %d: vdso says %ld, the kernel %ld and %ld", steady[i], middle, low, high);
    }
    int64_t low = kernel(CLOCK_REALTIME), middle, high;
    struct timeval now;
    gettimeofday(&now, NULL);
    middle = now.tv_sec * 1000000000l + now.tv_usec * 1000l;
    high = kernel(CLOCK_REALTIME);
    CHECK(low - 1000 <= middle && middle <= high, "gettimeofday says %ld, the kernel %ld and %ld", middle, low, high);
    unsigned cpu = 4096;
    CHECK(syscall(SYS_getcpu, &cpu, NULL, NULL) == 0 && cpu < 4096, "getcpu fails");
    int64_t started = vdso(CLOCK_MONOTONIC);
    doze(50);
    int64_t slept = vdso(CLOCK_MONOTONIC) - started;
    CHECK(slept >= 50000000 && slept < 5000000000, "50 ms of sleep lasted %ld ns", slept);
}
