/* An open directory, read half way. */
#include "subject.h"
#include <dirent.h>

enum { FILES = 300 };
static int fd;
static char path[4096];
static bool seen[FILES];
static int seen_count;

struct entry {
    uint64_t inode;
    int64_t offset;
    unsigned short length;
    unsigned char type;
    char name[];
};

static int read_some(void) {
    _Alignas(8) char buffer[1024];
    long got = syscall(SYS_getdents64, fd, buffer, sizeof buffer);
    CHECK(got >= 0, "getdents64 fails");
    for (long at = 0; at < got;) {
        struct entry *one = (struct entry *)(buffer + at);
        int number;
        if (sscanf(one->name, "file-%d", &number) == 1 && number >= 0 && number < FILES) {
            CHECK(!seen[number], "%s is listed twice", one->name);
            seen[number] = true;
            seen_count++;
        }
        at += one->length;
    }
    return (int)got;
}

static void setup(void) {
    snprintf(path, sizeof path, "%s.directory", state_path);
    MUST(mkdir(path, 0755) == 0);
    for (int i = 0; i < FILES; i++) {
        char file[4200];
        snprintf(file, sizeof file, "%s/file-%d", path, i);
        int one = open(file, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
        MUST(one >= 0);
        close(one);
    }
    fd = open(path, O_RDONLY | O_DIRECTORY);
    MUST(fd >= 0);
    read_some();
}

static void step(void) { doze(5); }

static void verify(int round) {
    read_some();
    if (round % 3 == 0) { /* to the end, then from the start again */
        while (read_some() > 0) {}
        CHECK(seen_count == FILES, "%d of %d files were listed", seen_count, FILES);
        CHECK(lseek(fd, 0, SEEK_SET) == 0, "lseek fails");
        memset(seen, 0, sizeof seen);
        seen_count = 0;
        read_some();
    }
    struct stat one, other;
    CHECK(fstat(fd, &one) == 0 && stat(path, &other) == 0 && one.st_ino == other.st_ino, "it is another directory");
}
