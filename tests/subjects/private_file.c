/* A private file mapping: pages written to are the program's own, the others are the file's.
 * Argument: megabytes of a further one of which every page was written to. */
#include "subject.h"

enum { PAGES = 64 };
static char *mapped, *closed, *tail, *copied;
static size_t copied_size;
static char content[PAGES * PAGE];
static char path[4096];

/* Some of the pages that were written to hold nothing but zeros: those of the file must not show through. */
static uint64_t expected(int page, int word) {
    if (page % 5 != 2) return ((uint64_t *)content)[page * 512 + word];
    return page % 10 == 7 ? 0 : mix(7000u + (unsigned)(page * 512 + word));
}

static void setup(void) {
    snprintf(path, sizeof path, "%s.data", state_path);
    for (size_t i = 0; i < sizeof content / 8; i++) ((uint64_t *)content)[i] = mix(i);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    MUST(fd >= 0 && write(fd, content, sizeof content - 1000) == sizeof content - 1000);
    close(fd);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    mapped = mmap(NULL, sizeof content, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    closed = mmap(NULL, sizeof content, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    tail = mmap(NULL, 4 * PAGE, PROT_READ, MAP_PRIVATE, fd, (PAGES - 4) * PAGE);
    MUST(mapped != MAP_FAILED && closed != MAP_FAILED && tail != MAP_FAILED);
    close(fd);
    memset(content + sizeof content - 1000, 0, 1000);
    for (int page = 2; page < PAGES; page += 5)
        for (int word = 0; word < 512; word++) {
            ((uint64_t *)mapped)[page * 512 + word] = expected(page, word);
            ((uint64_t *)closed)[page * 512 + word] = expected(page, word);
        }
    if (argument_count) {
        copied_size = strtoul(arguments[0], NULL, 10) << 20;
        snprintf(path, sizeof path, "%s.copied", state_path);
        fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
        MUST(fd >= 0 && ftruncate(fd, (off_t)copied_size) == 0);
        copied = mmap(NULL, copied_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
        MUST(copied != MAP_FAILED);
        close(fd);
        fill(copied, copied_size, 3);
    }
    MUST(mprotect(closed, sizeof content / 2, PROT_NONE) == 0);
    MUST(mprotect(closed + sizeof content / 2, sizeof content / 2, PROT_READ) == 0);
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    mprotect(closed, sizeof content / 2, PROT_READ);
    for (int page = 0; page < PAGES; page++)
        for (int word = 0; word < 512; word++) {
            CHECK(((uint64_t *)mapped)[page * 512 + word] == expected(page, word), "page %d of the mapping differs", page);
            CHECK(((uint64_t *)closed)[page * 512 + word] == expected(page, word), "page %d of the closed mapping differs", page);
        }
    CHECK(!memcmp(tail, content + (PAGES - 4) * PAGE, 4 * PAGE), "the mapping with an offset differs");
    CHECK(!differs(copied, copied_size, 3), "the written mapping differs at %lx", differs(copied, copied_size, 3));
    CHECK(mprotect(closed, sizeof content / 2, PROT_NONE) == 0, "mprotect fails");
}
