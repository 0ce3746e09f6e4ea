/* Private anonymous memory: every word a function of its address, holes and pages of zeros between, protections that
 * differ, and writes that go on. Argument: size in MiB (default 48). */
#include "subject.h"

enum { STRIPE = 64 }; /* pages: 40 filled, 8 touched but zero, 16 never touched */
static char *block;
static size_t size;
static uint64_t *scratch; /* written all the time */
static uint64_t written;
static char *read_only, *closed;

static void setup(void) {
    size = (argument_count ? strtoul(arguments[0], NULL, 10) : 48) << 20;
    block = pages(size, PROT_READ | PROT_WRITE);
    for (size_t at = 0; at < size; at += STRIPE * PAGE) {
        fill(block + at, 40 * PAGE, 1);
        for (int page = 40; page < 48; page++) *(volatile char *)(block + at + (size_t)page * PAGE) = 0;
    }
    scratch = pages(512 * PAGE, PROT_READ | PROT_WRITE);
    read_only = pages(16 * PAGE, PROT_READ | PROT_WRITE);
    fill(read_only, 16 * PAGE, 2);
    MUST(mprotect(read_only, 16 * PAGE, PROT_READ) == 0);
    closed = pages(16 * PAGE, PROT_READ | PROT_WRITE);
    fill(closed, 16 * PAGE, 3);
    MUST(mprotect(closed, 16 * PAGE, PROT_NONE) == 0);
}

static void step(void) {
    for (int i = 0; i < 512; i++) {
        CHECK(scratch[i * (PAGE / 8)] == written, "page %d was last written at %lu, not %lu", i, scratch[i * (PAGE / 8)], written);
        scratch[i * (PAGE / 8)] = written + 1;
    }
    written++;
    doze(2);
}

static void verify(int round) {
    (void)round;
    /* From the end to the beginning: against the order a drain would take. */
    for (size_t at = size - STRIPE * PAGE;; at -= STRIPE * PAGE) {
        uint64_t bad = differs(block + at, 40 * PAGE, 1);
        CHECK(!bad, "memory differs at %lx", bad);
        for (size_t word = 40 * PAGE / 8; word < STRIPE * PAGE / 8; word += 64)
            CHECK(((uint64_t *)(block + at))[word] == 0, "a page of zeros is not zero at %p", (void *)(block + at + word * 8));
        if (!at) break;
    }
    CHECK(!differs(read_only, 16 * PAGE, 2), "read-only memory differs");
    CHECK(mprotect(closed, 16 * PAGE, PROT_READ) == 0 && !differs(closed, 16 * PAGE, 3), "PROT_NONE memory differs");
    mprotect(closed, 16 * PAGE, PROT_NONE);
}
