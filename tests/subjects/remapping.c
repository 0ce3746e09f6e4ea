/* A program that moves, drops and unmaps memory all the time, so also while its pages are still on the way. It keeps
 * account of what each page must hold: what it was filled with (tied to the page's number, not its address, since it
 * moves), zeros after MADV_DONTNEED, zeros in a mapping made where another was. Even regions move, odd ones have parts
 * replaced: a mapping made next to one that is still filled does not merge with it, and mremap(2) across both would
 * fail, which is documented. */
#include "subject.h"

enum { REGIONS = 24, PAGES = 128 };
static struct {
    char *at;
    uint64_t seed;
    bool zero[PAGES];
} region[REGIONS];
static uint64_t turn;

static uint64_t word(int r, int page, int i) { return region[r].zero[page] ? 0 : mix(region[r].seed * 100000 + (unsigned)(page * 512 + i)); }

static void check_page(int r, int page) {
    uint64_t *at = (uint64_t *)(region[r].at + page * PAGE);
    for (int i = 0; i < 512; i++)
        if (at[i] != word(r, page, i)) {
            fail(__LINE__, "region %d page %d word %d is %lx, not %lx (turn %lu)", r, page, i, at[i], word(r, page, i), turn);
            return;
        }
}

static void fill_region(int r, uint64_t seed) {
    region[r].seed = seed;
    memset(region[r].zero, 0, sizeof region[r].zero);
    for (int page = 0; page < PAGES; page++)
        for (int i = 0; i < 512; i++) ((uint64_t *)(region[r].at + page * PAGE))[i] = word(r, page, i);
}

static void setup(void) {
    for (int r = 0; r < REGIONS; r++) {
        region[r].at = pages(PAGES * PAGE, PROT_READ | PROT_WRITE);
        fill_region(r, (unsigned)r);
    }
}

static void step(void) {
    uint64_t dice = mix(++turn);
    int r = (int)(dice % REGIONS), page = (int)(dice >> 16) % (PAGES - 8);
    if (page < 0) page = -page;
    unsigned what = dice >> 8 & 7;
    if (what < 2) r &= ~1;
    if (what == 3 || what == 5) r |= 1;
    switch (what) {
    case 0: /* move it to wherever there is room */
    case 1: {
        char *room = pages(PAGES * PAGE, PROT_NONE);
        void *now = mremap(region[r].at, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, room);
        CHECK(now == room, "mremap fails");
        if (now == room) region[r].at = room;
        break;
    }
    case 2: /* drop eight pages */
        CHECK(madvise(region[r].at + page * PAGE, 8 * PAGE, MADV_DONTNEED) == 0, "MADV_DONTNEED fails");
        for (int i = 0; i < 8; i++) region[r].zero[page + i] = true;
        break;
    case 3: /* unmap it and map anew at the same place */
        if (turn % 5 == 0) {
            CHECK(munmap(region[r].at, PAGES * PAGE) == 0, "munmap fails");
            CHECK(mmap(region[r].at, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == region[r].at,
                  "the same place cannot be mapped again");
            for (int i = 0; i < PAGES; i++) region[r].zero[i] = true;
        }
        break;
    case 4: /* fill one page */
        if (region[r].zero[page]) {
            region[r].zero[page] = false;
            for (int i = 0; i < 512; i++) ((uint64_t *)(region[r].at + page * PAGE))[i] = word(r, page, i);
        }
        break;
    case 5: /* replace eight pages by a new mapping over them */
        CHECK(mmap(region[r].at + page * PAGE, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED,
              "mmap over a mapping fails");
        for (int i = 0; i < 8; i++) region[r].zero[page + i] = true;
        break;
    default:
        for (int i = 0; i < 4; i++) check_page(r, (page + i * 31) % PAGES);
    }
    if (turn % 8 == 0) doze(1);
}

static void verify(int round) {
    (void)round;
    for (int r = 0; r < REGIONS; r++)
        for (int page = 0; page < PAGES; page++) check_page(r, page);
    /* Some regions are filled anew, so that there is again something to lose. */
    for (int r = 0; r < REGIONS; r += 3) fill_region(r, turn + (unsigned)r + 1000);
}
