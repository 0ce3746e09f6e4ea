/* Regular files: offsets, status flags, descriptors that share one open file description and descriptors that do not,
 * close-on-exec, and writes that go on where they were. */
#include "subject.h"

static char path[4096];
static int reader, reader_dup, other, writer, appender, appender_dup, high;
static off_t at;       /* of `reader` */
static off_t appended; /* bytes in the file */
static bool known[300];
static int appender_flags, writer_flags;

static unsigned char byte_at(off_t offset) { return (unsigned char)mix((uint64_t)offset); }

static void append(int fd, int count) {
    unsigned char bytes[256];
    for (int i = 0; i < count; i++) bytes[i] = byte_at(appended + i);
    CHECK(write(fd, bytes, (size_t)count) == count, "write fails");
    appended += count;
}

static void setup(void) {
    snprintf(path, sizeof path, "%s.file", state_path);
    appender = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC | O_DSYNC, 0600);
    MUST(appender >= 0);
    for (int i = 0; i < 40; i++) append(appender, 250);
    appender_dup = dup(appender);
    reader = open(path, O_RDONLY);
    other = open(path, O_RDONLY | O_NOATIME | O_CLOEXEC);
    writer = open(path, O_RDWR | O_NONBLOCK);
    MUST(reader >= 0 && other >= 0 && writer >= 0);
    high = fcntl(reader, F_DUPFD_CLOEXEC, 200);
    reader_dup = dup(reader);
    MUST(high >= 200 && lseek(other, 1234, SEEK_SET) == 1234);
    at = lseek(reader, 777, SEEK_SET);
    appender_flags = fcntl(appender, F_GETFL);
    writer_flags = fcntl(writer, F_GETFL);
    for (int fd = 0; fd < 300; fd++) known[fd] = fcntl(fd, F_GETFD) >= 0;
}

static void step(void) {
    if (appended < 1 << 20) append(appended % 2 ? appender : appender_dup, 1 + (int)(mix((uint64_t)appended) % 200));
    doze(5);
}

static void expect(int fd, off_t offset) {
    unsigned char bytes[64];
    CHECK(read(fd, bytes, sizeof bytes) == sizeof bytes, "descriptor %d: read fails", fd);
    for (int i = 0; i < (int)sizeof bytes; i++)
        CHECK(bytes[i] == byte_at(offset + i), "descriptor %d: byte %ld of the file differs", fd, (long)offset + i);
}

static void verify(int round) {
    (void)round;
    int descriptors[] = {reader, high, reader_dup};
    for (int i = 0; i < 3; i++) {
        CHECK(lseek(descriptors[i], 0, SEEK_CUR) == at, "descriptor %d is at %ld, not %ld", descriptors[i], lseek(descriptors[i], 0, SEEK_CUR), (long)at);
        expect(descriptors[i], at);
        at += 64;
    }
    CHECK(lseek(other, 0, SEEK_CUR) == 1234, "the other description is at %ld", lseek(other, 0, SEEK_CUR));
    CHECK(fcntl(reader, F_GETFD) == 0 && fcntl(high, F_GETFD) == FD_CLOEXEC && fcntl(other, F_GETFD) == FD_CLOEXEC &&
          fcntl(reader_dup, F_GETFD) == 0, "close-on-exec changed");
    CHECK(fcntl(appender, F_GETFL) == appender_flags, "appender has flags %o, had %o", fcntl(appender, F_GETFL), appender_flags);
    CHECK(fcntl(writer, F_GETFL) == writer_flags, "writer has flags %o, had %o", fcntl(writer, F_GETFL), writer_flags);
    CHECK(syscall(SYS_kcmp, getpid(), getpid(), 0, reader, high) == 0 || errno == EPERM || errno == ENOSYS, "descriptors are no longer shared");
    struct stat now;
    CHECK(fstat(appender, &now) == 0 && now.st_size == appended, "the file has %ld bytes, not %ld", (long)now.st_size, (long)appended);
    CHECK(pread(writer, &(unsigned char){0}, 1, appended - 1) == 1, "the writer cannot read the last byte");
    for (int fd = 0; fd < 300; fd++) {
        CHECK((fcntl(fd, F_GETFD) >= 0) == known[fd], "descriptor %d is %s", fd, known[fd] ? "gone" : "new");
    }
}
