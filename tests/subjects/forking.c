/* A program that forks all the time, so also while its pages are still on the way: every child finds all memory right,
 * writes to its own copy, and its parent never sees it. */
#include "subject.h"

enum { PAGES = 4096 };
static char *block;
static unsigned turn;
static uint64_t forks;

static void setup(void) {
    block = pages(PAGES * PAGE, PROT_READ | PROT_WRITE);
    fill(block, PAGES * PAGE, 11);
}

static void child(unsigned seed) {
    for (int i = 0; i < 64; i++) {
        unsigned page = (unsigned)mix(seed * 64u + (unsigned)i) % PAGES;
        if (differs(block + (size_t)page * PAGE, PAGE, 11)) _exit(1);
    }
    for (int i = 0; i < 16; i++) memset(block + (size_t)((seed + (unsigned)i) % PAGES) * PAGE, 0xee, PAGE);
    if (seed % 4 == 0) { /* a grandchild */
        pid_t grandchild = fork();
        if (grandchild == 0) _exit(differs(block + (size_t)((seed + 77) % PAGES) * PAGE, PAGE, 11) ? 2 : 0);
        int status = -1;
        if (grandchild < 0 || waitpid(grandchild, &status, 0) != grandchild || status) _exit(3);
    }
    _exit(0);
}

static void step(void) {
    pid_t one = fork();
    if (one == 0) child(turn);
    int status = -1;
    CHECK(one > 0 && waitpid(one, &status, 0) == one && status == 0, "child %u ended with %x", turn, status);
    turn++;
    forks++;
    doze(1);
}

static void verify(int round) {
    (void)round;
    CHECK(!differs(block, PAGES * PAGE, 11), "memory differs at %lx", differs(block, PAGES * PAGE, 11));
}
