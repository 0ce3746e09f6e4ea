/* Guard pages, by mprotect and by MADV_GUARD_INSTALL: touching one is still a fault, its neighbours are what they were,
 * and what was guarded while pages streamed in reads as zeros once the guard is gone, never as what was there before.
 * (A guard that comes and goes before the page under it was due raises no event anywhere: that is documented, and not
 * tried here. One is removed only when it has seen two questions.) */
#include "subject.h"
#include <setjmp.h>

enum { PAGES = 96, MADV_GUARD_INSTALL_ = 102, MADV_GUARD_REMOVE_ = 103 };
static char *by_protection, *by_advice, *churned;
static sigjmp_buf back;
static bool advice_known;
static int installed[PAGES]; /* the question before which a page of `churned` got its guard; 0: it has none */
static bool zeroed[PAGES];   /* pages of `churned` that were once guarded are zero now */
static unsigned turn, now_round = 1;

static void on_fault(int signo) {
    (void)signo;
    siglongjmp(back, 1);
}

static bool faults(volatile char *at) {
    if (sigsetjmp(back, 1)) return true;
    (void)*at;
    return false;
}

static bool guarded(int page) { return page % 7 == 3 || page % 16 == 15; }

static void setup(void) {
    struct sigaction action = {.sa_handler = on_fault};
    sigaction(SIGSEGV, &action, NULL);
    by_protection = pages(PAGES * PAGE, PROT_READ | PROT_WRITE);
    by_advice = pages(PAGES * PAGE, PROT_READ | PROT_WRITE);
    churned = pages(PAGES * PAGE, PROT_READ | PROT_WRITE);
    fill(by_protection, PAGES * PAGE, 1);
    fill(by_advice, PAGES * PAGE, 2);
    fill(churned, PAGES * PAGE, 3);
    advice_known = madvise(by_advice, PAGE, MADV_GUARD_INSTALL_) == 0 && madvise(by_advice, PAGE, MADV_GUARD_REMOVE_) == 0;
    if (advice_known) fill(by_advice, PAGE, 2);
    for (int page = 0; page < PAGES; page++)
        if (guarded(page)) {
            MUST(mprotect(by_protection + page * PAGE, PAGE, PROT_NONE) == 0);
            if (advice_known) MUST(madvise(by_advice + page * PAGE, PAGE, MADV_GUARD_INSTALL_) == 0);
        }
}

static void step(void) {
    if (advice_known && turn < 12) {
        unsigned page = (unsigned)mix(turn++ + now_round * 100u) % PAGES;
        if (!installed[page]) {
            CHECK(madvise(churned + page * PAGE, PAGE, MADV_GUARD_INSTALL_) == 0, "MADV_GUARD_INSTALL fails");
            installed[page] = (int)now_round;
        }
    }
    doze(3);
}

static void verify(int round) {
    now_round = (unsigned)round + 1;
    turn = 0;
    for (int page = 0; page < PAGES; page++) {
        bool now = faults(by_protection + page * PAGE);
        CHECK(now == guarded(page), "page %d by mprotect: %s", page, now ? "faults" : "is open");
        if (!now) CHECK(!differs(by_protection + page * PAGE, PAGE, 1), "page %d by mprotect differs", page);
        if (!advice_known) continue;
        now = faults(by_advice + page * PAGE);
        CHECK(now == guarded(page), "page %d by MADV_GUARD_INSTALL: %s", page, now ? "faults" : "is open");
        if (!now) CHECK(!differs(by_advice + page * PAGE, PAGE, 2), "page %d by MADV_GUARD_INSTALL differs", page);
        if (installed[page]) {
            CHECK(faults(churned + page * PAGE), "a guard installed before question %d is gone", installed[page]);
            if (installed[page] >= round) continue;
            CHECK(madvise(churned + page * PAGE, PAGE, MADV_GUARD_REMOVE_) == 0, "MADV_GUARD_REMOVE fails");
            installed[page] = 0;
            zeroed[page] = true;
        }
        if (zeroed[page]) CHECK(*(uint64_t *)(churned + page * PAGE) == 0, "page %d is not zero after its guard", page);
        else CHECK(!differs(churned + page * PAGE, PAGE, 3), "page %d without guard differs", page);
    }
}
