/* The program that ./demo moves. Its memory is a hash chain: every word follows from the one before and from its own
 * address, each page begins from its address and the seed, so a page that is missing, stale or misplaced cannot go
 * unnoticed. While it runs it reads pages at random; as soon as it finds itself on another host, with its pages still on
 * their way, it forks children that check theirs, moves a region about and drops pages of it. (A process with children is
 * not carried yet, so at home it has none.) Asked, it says where it finds itself and how many steps it has made, then checks everything.
 * Arguments: bytes of memory, seed. */
#include "../subjects/subject.h"

enum { REGION_PAGES = 4096 };
static uint64_t seed, steps, forks, remaps, pages_read;
static char *block;
static size_t size;
static char *region;      /* moves about; its content follows from `region_born`, where it was filled */
static uint64_t region_born;
static bool dropped[REGION_PAGES];
static char home[65];

/* `at` is where the page was filled. */
static void fill_page(uint64_t *page, uint64_t at) {
    uint64_t word = mix(at ^ seed);
    for (int i = 0; i < 512; i++) page[i] = word = (word ^ (at + (unsigned)i * 8)) * 0x9e3779b97f4a7c15u + (word >> 29);
}

static bool page_holds(const uint64_t *page, uint64_t at) {
    uint64_t word = mix(at ^ seed);
    for (int i = 0; i < 512; i++) {
        word = (word ^ (at + (unsigned)i * 8)) * 0x9e3779b97f4a7c15u + (word >> 29);
        if (page[i] != word) return false;
    }
    return true;
}

static bool block_page_holds(size_t page) {
    const uint64_t *at = (const uint64_t *)(block + page * PAGE);
    return page_holds(at, (uint64_t)(uintptr_t)at);
}

static bool region_page_holds(int page) {
    const uint64_t *at = (const uint64_t *)(region + (size_t)page * PAGE);
    if (!dropped[page]) return page_holds(at, region_born + (unsigned)page * PAGE);
    for (int i = 0; i < 512; i++)
        if (at[i]) return false;
    return true;
}

static void tell(const char *when) {
    char host[65] = "", network[64] = "";
    gethostname(host, sizeof host - 1);
    if (readlink("/proc/self/ns/net", network, sizeof network - 1) < 0) strcpy(network, "?");
    say("{\"type\":\"workload\",\"data\":{\"when\":\"%s\",\"host\":\"%s\",\"network_namespace\":\"%s\",\"pid\":%d,\"step\":%lu,"
        "\"forks\":%lu,\"remaps\":%lu,\"pages_read\":%lu}}",
        when, host, network, getpid(), steps, forks, remaps, pages_read);
}

static void setup(void) {
    MUST(argument_count == 2);
    size = strtoull(arguments[0], NULL, 10) / PAGE * PAGE;
    seed = strtoull(arguments[1], NULL, 10);
    block = pages(size, PROT_READ | PROT_WRITE);
    region = pages(REGION_PAGES * PAGE, PROT_READ | PROT_WRITE);
    for (size_t page = 0; page < size / PAGE; page++) fill_page((uint64_t *)(block + page * PAGE), (uint64_t)(uintptr_t)block + page * PAGE);
    gethostname(home, sizeof home - 1);
    region_born = (uint64_t)(uintptr_t)region;
    for (size_t page = 0; page < REGION_PAGES; page++) fill_page((uint64_t *)(region + page * PAGE), region_born + page * PAGE);
}

static void step(void) {
    uint64_t dice = mix(++steps ^ seed);
    for (unsigned i = 0; i < 32; i++, pages_read++) {
        size_t page = mix(dice + i) % (size / PAGE);
        CHECK(block_page_holds(page), "page %zu of the memory differs", page);
    }
    char here[65] = "";
    gethostname(here, sizeof here - 1);
    if (!strcmp(here, home)) return;
    if (steps % 8 == 0) { /* a child sees the same memory, and keeps what it writes to itself */
        pid_t child = fork();
        if (child == 0) {
            for (unsigned i = 0; i < 16; i++) {
                size_t page = mix(dice + 1000 + i) % (size / PAGE);
                if (!block_page_holds(page)) _exit(1);
                memset(block + page * PAGE, 0xdd, PAGE);
            }
            _exit(0);
        }
        int status = -1;
        CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0, "a child found its memory wrong: %x", status);
        forks++;
    }
    if (steps % 8 == 4) {
        char *room = mmap(NULL, REGION_PAGES * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        void *moved = mremap(region, REGION_PAGES * PAGE, REGION_PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, room);
        CHECK(moved == room, "mremap fails");
        if (moved == room) region = room;
        int page = (int)(dice % (REGION_PAGES - 4));
        CHECK(madvise(region + (size_t)page * PAGE, 4 * PAGE, MADV_DONTNEED) == 0, "MADV_DONTNEED fails");
        memset(dropped + page, true, 4);
        for (unsigned i = 0; i < 8; i++) {
            int other = (int)(mix(dice + i) % REGION_PAGES);
            CHECK(region_page_holds(other), "page %d of the moving region differs", other);
        }
        remaps++;
    }
}

static void verify(int round) {
    static const char *const names[] = {"", "before", "after", "complete"};
    tell(names[round < 3 ? round : 3]);
    if (round == 2) return; /* at once, while the pages are still on their way */
    for (size_t page = size / PAGE; page-- > 0;) CHECK(block_page_holds(page), "page %zu of the memory differs", page);
    for (int page = 0; page < REGION_PAGES; page++) CHECK(region_page_holds(page), "page %d of the moving region differs", page);
}
