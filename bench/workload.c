/* The program that bench/crossing moves: memory nobody can compress or guess, touched to the last page and read at
 * random all the time. A second thread does nothing but look at the clock, so the program knows itself how long it did
 * not run. Round 1 forgets that silence; round 2 tells it and checks every word.
 * Argument: bytes of memory. */
#include "../tests/subjects/subject.h"

enum { READS = 16 };
static const uint64_t seed = 20261121;
static char *block;
static size_t size;
static uint64_t steps;
static _Atomic uint64_t silence_ns;

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static void *pulse(void *unused) {
    (void)unused;
    const struct timespec rest = {0, 200000};
    for (uint64_t last = now_ns();;) {
        nanosleep(&rest, NULL);
        uint64_t now = now_ns();
        if (now - last > atomic_load(&silence_ns)) atomic_store(&silence_ns, now - last);
        last = now;
    }
}

static void setup(void) {
    MUST(argument_count == 1);
    size = strtoull(arguments[0], NULL, 10) / PAGE * PAGE;
    MUST(size > 0);
    block = pages(size, PROT_READ | PROT_WRITE);
    fill(block, size, seed);
    thread(pulse, NULL);
}

static void step(void) {
    for (unsigned i = 0; i < READS; i++) {
        size_t page = mix(steps * READS + i) % (size / PAGE);
        CHECK(!differs(block + page * PAGE, PAGE, seed), "page %zu differs", page);
    }
    steps++;
    doze(1);
}

static void verify(int round) {
    if (round == 1) {
        atomic_store(&silence_ns, 0);
        return;
    }
    say("SILENT %lu", (unsigned long)atomic_load(&silence_ns));
    uint64_t where = differs(block, size, seed);
    CHECK(!where, "the word at %lx differs", (unsigned long)where);
}
