/* Shared anonymous memory of a tree: one object that all have, mapped twice in one process, in part and with other rights in
 * another, and one that only a child and its own child have. What one writes the others read, holes stay holes. */
#include "subject.h"

enum { CHILD, GRANDCHILD, WORKERS, PAGES = 64, CONTROL = 0, ROUND = 1, REPLY = 2, PATTERN = 8, HOLES = 32, PRIVATE_PAGES = 16 };

struct control {
    _Atomic int question[WORKERS], answer[WORKERS], line[WORKERS];
    unsigned long inode[WORKERS];
};

static char *all, *again; /* again: from page PATTERN on, by another mapping */
static char *between;     /* of child and grandchild */
static size_t tail = (PAGES - PATTERN) * PAGE;

static struct control *control(void) { return (struct control *)(all + CONTROL * PAGE); }

static uint64_t *word(char *at, int page) { return (uint64_t *)(at + page * PAGE); }

/* The inode that is mapped at an address, which must be shared anonymous memory; 0: it is not. */
static unsigned long inode_at(const void *at, const char *rights) {
    char *text = slurp("/proc/self/maps", NULL), *save, *line;
    unsigned long found = 0;
    for (line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        unsigned long start, end, inode;
        char allowed[5];
        if (sscanf(line, "%lx-%lx %4s %*s %*s %lu", &start, &end, allowed, &inode) != 4) continue;
        if (start <= (uintptr_t)at && (uintptr_t)at < end && !strcmp(allowed, rights) && strstr(line, " /dev/zero (deleted)")) found = inode;
    }
    free(text);
    return found;
}

/* As fill(), but the same from wherever it is seen. */
static void fill_pages(char *at, int from, int to, uint64_t seed) {
    for (int i = from * 512; i < to * 512; i++) ((uint64_t *)at)[i] = mix((uint64_t)i ^ seed);
}

static bool has_pages(const char *at, int from, int to, uint64_t seed) {
    for (int i = from * 512; i < to * 512; i++)
        if (((const uint64_t *)at)[i] != mix((uint64_t)i ^ seed)) return false;
    return true;
}

/* The line at which a worker finds something wrong; 0: nothing. */
static int check(int own, int round) {
    if (*word(all, ROUND) != mix((uint64_t)round)) return __LINE__;
    *word(all, REPLY + own) = mix((uint64_t)round * 7 + (uint64_t)own);
    if (!(control()->inode[own] = inode_at(all, "rw-s"))) return __LINE__;
    if (!has_pages(between, 2, PRIVATE_PAGES, 99)) return __LINE__;
    if (own == CHILD) {
        /* Pages PATTERN and PATTERN + 1 may only be read, the next two are gone. */
        if (inode_at(all + PATTERN * PAGE, "r--s") != control()->inode[own]) return __LINE__;
        if (!has_pages(all, PATTERN, PATTERN + 2, 1)) return __LINE__;
        unsigned char there;
        if (mincore(all + (PATTERN + 2) * PAGE, PAGE, &there) != -1 || errno != ENOMEM) return __LINE__;
        if (!has_pages(all, PATTERN + 4, HOLES, 1)) return __LINE__;
        *word(between, 0) = mix((uint64_t)round);
        /* It has the rights it had. */
        if (mprotect(all + PATTERN * PAGE, PAGE, PROT_READ | PROT_WRITE)) return __LINE__;
        if (mprotect(all + PATTERN * PAGE, PAGE, PROT_READ)) return __LINE__;
    } else {
        if (*word(between, 0) != mix((uint64_t)round)) return __LINE__;
        if (!has_pages(all, PATTERN, HOLES, 1)) return __LINE__;
        /* What it does to memory that only a relative has must be seen there as well. */
        *word(between, 1) += 1;
    }
    return 0;
}

static void work(int own) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (int answered = 0;;) {
        int round = control()->question[own];
        if (round == answered) {
            doze(2);
            continue;
        }
        control()->line[own] = check(own, round);
        control()->answer[own] = answered = round;
    }
}

static void setup(void) {
    all = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    MUST(all != MAP_FAILED);
    fill_pages(all, PATTERN, HOLES, 1);
    again = mremap(all + PATTERN * PAGE, 0, tail, MREMAP_MAYMOVE);
    MUST(again != MAP_FAILED);
    /* Larger than all memory: it takes what it holds. */
    size_t huge = (size_t)1 << 40;
    char *sparse = mmap(NULL, huge, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    MUST(sparse != MAP_FAILED && munmap(sparse + PAGE, huge - PAGE) == 0);
    *word(sparse, 0) = 77;
    pid_t child = fork();
    if (child == 0) {
        munmap(again, tail);
        between = mmap(NULL, PRIVATE_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        if (between == MAP_FAILED) _exit(1);
        fill_pages(between, 2, PRIVATE_PAGES, 99);
        if (fork() == 0) work(GRANDCHILD);
        if (mprotect(all + PATTERN * PAGE, 2 * PAGE, PROT_READ) || munmap(all + (PATTERN + 2) * PAGE, 2 * PAGE)) _exit(2);
        work(CHILD);
    }
    MUST(child > 0);
}

static void step(void) {
    *word(all, PAGES - 1) += 1;
    doze(2);
}

static void verify(int round) {
    unsigned char there[PAGES - HOLES - 1];
    CHECK(mincore(all + HOLES * PAGE, sizeof there * PAGE, there) == 0 && !memchr(there, 1, sizeof there), "a hole is no hole any more");
    CHECK(inode_at(all, "rw-s") && inode_at(again, "rw-s") == inode_at(all, "rw-s"), "two mappings are not of one object");
    *word(all, ROUND) = mix((uint64_t)round);
    for (int worker = 0; worker < WORKERS; worker++) {
        control()->question[worker] = round;
        CHECK(EVENTUALLY(control()->answer[worker] == round), "worker %d does not answer", worker);
        CHECK(!control()->line[worker], "worker %d finds fault at line %d", worker, control()->line[worker]);
        CHECK(*word(all, REPLY + worker) == mix((uint64_t)round * 7 + (uint64_t)worker), "what worker %d wrote is not here", worker);
        CHECK(control()->inode[worker] == inode_at(all, "rw-s"), "worker %d has another object", worker);
    }
    CHECK(has_pages(all, PATTERN, HOLES, 1), "the memory differs");
    CHECK(!memcmp(all + PATTERN * PAGE, again, tail), "the second mapping shows something else");
    *word(again, HOLES - PATTERN - 1) ^= 1;
    CHECK(!memcmp(all + PATTERN * PAGE, again, tail), "the second mapping does not follow");
    *word(again, HOLES - PATTERN - 1) ^= 1;
    /* The comparison has read the holes of both; they are made again for the next round. */
    MUST(madvise(all + HOLES * PAGE, (PAGES - HOLES - 1) * PAGE, MADV_REMOVE) == 0);
}
