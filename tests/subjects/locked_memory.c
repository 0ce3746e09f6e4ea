/* Locked memory: mlock and mlock2(MLOCK_ONFAULT). */
#include "smaps.h"

enum { PAGES = 8 };
static char *locked, *on_fault;
static char locked_flags[256], on_fault_flags[256];

static void setup(void) {
    locked = pages(PAGES * PAGE, PROT_READ | PROT_WRITE);
    pages(PAGE, PROT_NONE);
    on_fault = pages(PAGES * PAGE, PROT_READ | PROT_WRITE);
    pages(PAGE, PROT_NONE);
    fill(locked, PAGES * PAGE, 1);
    fill(on_fault, PAGE, 2);
    MUST(mlock(locked, PAGES * PAGE) == 0);
    MUST(mlock2(on_fault, PAGES * PAGE, MLOCK_ONFAULT) == 0);
    MUST(mapping_flags(locked, locked_flags, sizeof locked_flags, NULL, 0) && strstr(locked_flags, "lo"));
    MUST(mapping_flags(on_fault, on_fault_flags, sizeof on_fault_flags, NULL, 0) && strstr(on_fault_flags, "lf"));
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    char now[256] = "";
    CHECK(mapping_flags(locked, now, sizeof now, NULL, 0) && !strcmp(now, locked_flags), "locked memory is %s, was %s", now, locked_flags);
    CHECK(mapping_flags(on_fault, now, sizeof now, NULL, 0) && !strcmp(now, on_fault_flags), "memory locked on fault is %s, was %s", now, on_fault_flags);
    CHECK(!differs(locked, PAGES * PAGE, 1), "locked memory differs");
    CHECK(!differs(on_fault, PAGE, 2), "memory locked on fault differs");
    CHECK(on_fault[PAGE] == 0, "untouched memory is not zero");
}
