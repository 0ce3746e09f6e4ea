/* A program that forks as soon as it finds itself on another host, while its pages are still on the way: every child
 * finds all memory right, writes to its own copy, and its parent never sees it. Between bursts it has no children. */
#include "subject.h"

enum { PAGES = 4096, BURST = 60 };
static char *block;
static unsigned turn, left;
static char home[65];

static void setup(void) {
    block = pages(PAGES * PAGE, PROT_READ | PROT_WRITE);
    fill(block, PAGES * PAGE, 11);
    gethostname(home, sizeof home - 1);
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

static void fork_once(void) {
    pid_t one = fork();
    if (one == 0) child(turn);
    int status = -1;
    CHECK(one > 0 && waitpid(one, &status, 0) == one && status == 0, "child %u ended with %x", turn, status);
    turn++;
    left--;
}

static void look_around(void) {
    char here[65] = "";
    gethostname(here, sizeof here - 1);
    if (strcmp(here, home)) {
        strcpy(home, here);
        left = BURST;
    }
}

static void step(void) {
    look_around();
    if (left) fork_once();
    else doze(1);
}

static void verify(int round) {
    (void)round;
    look_around();
    while (left) fork_once();
    CHECK(!differs(block, PAGES * PAGE, 11), "memory differs at %lx", differs(block, PAGES * PAGE, 11));
}
