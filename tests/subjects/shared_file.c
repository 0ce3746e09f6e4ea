/* A shared mapping of a file both hosts see: read-only and writable; what is written goes to the file. */
#include "subject.h"

enum { PAGES = 32 };
static uint64_t *writable, *readable;
static char path[4096];
static uint64_t written;

static void setup(void) {
    snprintf(path, sizeof path, "%s.shared", state_path);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    MUST(fd >= 0 && ftruncate(fd, PAGES * PAGE) == 0);
    writable = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    readable = mmap(NULL, PAGES * PAGE, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    MUST(writable != MAP_FAILED && readable != MAP_FAILED);
}

static void step(void) {
    written++;
    for (int page = 0; page < PAGES; page++) writable[page * 512] = mix(written + (unsigned)page);
    doze(5);
}

static void verify(int round) {
    (void)round;
    for (int page = 0; page < PAGES; page++)
        CHECK(readable[page * 512] == mix(written + (unsigned)page), "page %d of the file is not what was written last", page);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    for (int page = 0; page < PAGES; page++) {
        uint64_t word = 0;
        CHECK(pread(fd, &word, 8, page * PAGE) == 8 && word == mix(written + (unsigned)page), "page %d of the file as read differs", page);
    }
    close(fd);
    CHECK(mprotect(readable, PAGE, PROT_READ | PROT_WRITE) == -1 && errno == EACCES, "the read-only mapping may be made writable");
}
