/* Stacks that grow: the main one, deeper after each crossing than ever before, and a mapping with MAP_GROWSDOWN. */
#include "subject.h"

enum { FRAMES_PER_ROUND = 40, FRAME = 8192, BELOW = 64 };
static char *low; /* the page from which the second stack grows down */
static int grown;

/* Recurses, fills a frame on the way down and checks it on the way up. */
__attribute__((noinline)) static void descend(int depth) {
    uint64_t frame[FRAME / 8];
    fill(frame, sizeof frame, (unsigned)depth);
    __asm__ volatile("" ::"r"(frame) : "memory");
    if (depth > 0) descend(depth - 1);
    CHECK(!differs(frame, sizeof frame, (unsigned)depth), "frame %d of the main stack differs", depth);
}

static void grow(void) {
    for (int i = 0; i < 4 && grown < BELOW - 2; i++) {
        grown++;
        CHECK(*(uint64_t *)(low - grown * PAGE) == 0, "a new page of the stack is not zero");
        fill(low - grown * PAGE, PAGE, 5);
    }
}

static void setup(void) {
    char *area = pages((BELOW + 400) * PAGE, PROT_NONE);
    low = area + (BELOW + 300) * PAGE;
    munmap(area, (BELOW + 400) * PAGE); /* room below: the kernel keeps a gap of 256 pages to other mappings */
    MUST(mmap(low, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED, -1, 0) == low);
    fill(low, PAGE, 5);
    grow();
    descend(20);
}

static void step(void) { doze(5); }

static void verify(int round) {
    for (int i = 0; i <= grown; i++) CHECK(!differs(low - i * PAGE, PAGE, 5), "page %d of the second stack differs", i);
    grow();
    descend(20 + FRAMES_PER_ROUND * (round > 4 ? 4 : round));
}
