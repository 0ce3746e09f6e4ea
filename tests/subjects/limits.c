/* Resource limits: soft and hard value of each. */
#include "subject.h"
#include <sys/resource.h>

static struct rlimit before[RLIM_NLIMITS];

static void lower(int resource, rlim_t soft, rlim_t hard) {
    struct rlimit now, wanted;
    getrlimit(resource, &now);
    wanted.rlim_max = hard < now.rlim_max ? hard : now.rlim_max;
    wanted.rlim_cur = soft < wanted.rlim_max ? soft : wanted.rlim_max;
    MUST(setrlimit(resource, &wanted) == 0);
}

static void setup(void) {
    lower(RLIMIT_NOFILE, 211, 223);
    lower(RLIMIT_CORE, 0, 4096 * 7);
    lower(RLIMIT_STACK, 3 << 20, 5 << 20);
    lower(RLIMIT_FSIZE, 1 << 30, 1l << 40);
    lower(RLIMIT_CPU, 40000, 50000);
    lower(RLIMIT_MEMLOCK, 65536, 131072);
    lower(RLIMIT_MSGQUEUE, 1000, 2000);
    lower(RLIMIT_RTTIME, 900000, 950000);
    lower(RLIMIT_AS, 1l << 36, 1l << 37);
    lower(RLIMIT_SIGPENDING, 300, 400);
    for (int i = 0; i < RLIM_NLIMITS; i++) getrlimit(i, &before[i]);
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    for (int i = 0; i < RLIM_NLIMITS; i++) {
        struct rlimit now;
        getrlimit(i, &now);
        CHECK(now.rlim_cur == before[i].rlim_cur && now.rlim_max == before[i].rlim_max, "limit %d is %lu:%lu, was %lu:%lu", i,
              now.rlim_cur, now.rlim_max, before[i].rlim_cur, before[i].rlim_max);
    }
}
