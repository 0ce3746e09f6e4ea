/* Advice given to mappings, the names of anonymous ones, and MAP_NORESERVE, as /proc/self/smaps shows them; and what
 * advice promises: WIPEONFORK and DONTFORK in a child. */
#include "smaps.h"

static const int given[] = {MADV_NORMAL, MADV_DONTFORK, MADV_DONTDUMP, MADV_WIPEONFORK, MADV_SEQUENTIAL, MADV_RANDOM,
                            MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_MERGEABLE};
enum { ADVICES = sizeof given / sizeof *given, LENGTH = 4 * PAGE };
static struct {
    char *at;
    char flags[256], heading[256];
} mapping[ADVICES + 2];

static void setup(void) {
    for (int i = 0; i < ADVICES + 2; i++) {
        int extra = i == ADVICES ? MAP_NORESERVE : 0;
        mapping[i].at = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | extra, -1, 0);
        pages(PAGE, PROT_NONE);
        fill(mapping[i].at, LENGTH, (unsigned)i);
        if (i < ADVICES) madvise(mapping[i].at, LENGTH, given[i]); /* EINVAL: this kernel has no such thing */
        else prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, mapping[i].at, LENGTH, i == ADVICES ? "a name, with spaces" : "b");
    }
    for (int i = 0; i < ADVICES + 2; i++)
        MUST(mapping_flags(mapping[i].at, mapping[i].flags, 256, mapping[i].heading, 256));
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    for (int i = 0; i < ADVICES + 2; i++) {
        char flags[256] = "", heading[256] = "";
        CHECK(mapping_flags(mapping[i].at, flags, 256, heading, 256), "mapping %d is gone or merged", i);
        CHECK(!strcmp(flags, mapping[i].flags), "mapping %d has flags %s, had %s", i, flags, mapping[i].flags);
        CHECK(!strcmp(heading, mapping[i].heading), "mapping %d reads %s, was %s", i, heading, mapping[i].heading);
        CHECK(!differs(mapping[i].at, LENGTH, (unsigned)i), "mapping %d differs", i);
    }
    pid_t child = fork();
    if (child == 0) {
        int wrong = 0;
        for (int i = 0; i < ADVICES; i++) {
            if (given[i] == MADV_WIPEONFORK) wrong |= *(uint64_t *)mapping[i].at != 0;
            else if (given[i] == MADV_DONTFORK) wrong |= (msync(mapping[i].at, PAGE, MS_ASYNC) != -1) << 1;
            else wrong |= (differs(mapping[i].at, LENGTH, (unsigned)i) != 0) << 2;
        }
        _exit(wrong);
    }
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0, "a child finds its memory wrong: %x", status);
}
