/* Open files in messages that nobody has received: of a stream between bytes that came without them, of datagrams and packets,
 * empty ones too; a memfd, an end of a pipe and a socket that nobody has open any more, what is open elsewhere as well, a socket in
 * a message to itself, and a message within a message. Each is what it was, arrives with the very byte it was sent with, and every
 * page that it reaches is there: by pread, by a new mapping, and through a descriptor that is sent on. With the argument "inotify"
 * one of them cannot cross: it lies behind two others. */
#include "subject.h"
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/socket.h>

enum { PAGES = 300, HOLE = 20 };
static int stream[2], datagram[2], packet[2]; /* what is sent into [0] comes out of [1] */
static int drain, far, counter;               /* the other ends of what travels: a pipe for writing, a socket, an eventfd */
static uint64_t seed;
static unsigned long memory;                  /* its inode */

static unsigned long inode(int fd) {
    struct stat stat;
    return fstat(fd, &stat) ? 0 : stat.st_ino;
}

static bool send_with(int fd, const char *bytes, int count, const int *files) {
    union { struct cmsghdr header; char room[CMSG_SPACE(8 * sizeof(int))]; } control = {0};
    struct iovec part = {(void *)bytes, strlen(bytes)};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count) {
        message.msg_control = &control, message.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
        control.header = (struct cmsghdr){.cmsg_len = CMSG_LEN((size_t)count * sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(&control.header), files, (size_t)count * sizeof(int));
    }
    return sendmsg(fd, &message, MSG_NOSIGNAL) == (ssize_t)strlen(bytes);
}

/* Receives at most `room` bytes, which must be these, with so many files. */
static bool receives(int line, int fd, size_t room, const char *bytes, int count, int *files) {
    union { struct cmsghdr header; char room[CMSG_SPACE(8 * sizeof(int))]; } control = {0};
    char buffer[64] = "";
    struct iovec part = {buffer, room};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t got = recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    int found = 0;
    if (got >= 0 && message.msg_controllen >= CMSG_LEN(0) && control.header.cmsg_type == SCM_RIGHTS) {
        found = (int)((control.header.cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(files, CMSG_DATA(&control.header), (size_t)found * sizeof(int));
    }
    bool is_it = got == (ssize_t)strlen(bytes) && !memcmp(buffer, bytes, (size_t)got) && found == count && !(message.msg_flags & MSG_CTRUNC);
    if (!is_it) fail(line, "%zd bytes, %.20s, with %d files instead of %s with %d", got, buffer, found, bytes, count);
    return is_it;
}
#define RECEIVES(...) receives(__LINE__, __VA_ARGS__)

/* Every page of the memfd, holes too, by every way there is. */
static void is_whole(int fd) {
    static uint64_t page[PAGE / 8];
    char *anew = mmap(NULL, PAGES * PAGE, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(anew != MAP_FAILED, "it cannot be mapped");
    int by[2], sent = -1;
    CHECK(socketpair(AF_UNIX, SOCK_DGRAM, 0, by) == 0 && send_with(by[0], "on", 1, &fd) && RECEIVES(by[1], 64, "on", 1, &sent), "it cannot be sent on");
    close(by[0]), close(by[1]);
    CHECK(lseek(fd, 0, SEEK_HOLE) == HOLE * PAGE && lseek(fd, HOLE * PAGE, SEEK_DATA) == 2 * HOLE * PAGE, "its hole is at %ld", (long)lseek(fd, 0, SEEK_HOLE));
    CHECK(lseek(fd, (off_t)seed, SEEK_SET) == (off_t)seed && lseek(sent, 0, SEEK_CUR) == (off_t)seed, "what is sent on is another file");
    for (int i = 0; i < PAGES; i++) {
        for (int way = 0; way < 3; way++) {
            if (way == 1) memcpy(page, anew + i * PAGE, PAGE);
            else CHECK(pread(way ? sent : fd, page, PAGE, (off_t)i * PAGE) == PAGE, "page %d cannot be read by way %d", i, way);
            for (uint64_t at = 0; at < PAGE / 8; at++) {
                uint64_t wanted = i >= HOLE && i < 2 * HOLE ? 0 : mix(seed + (uint64_t)i * 512 + at);
                if (page[at] == wanted) continue;
                fail(__LINE__, "page %d differs by way %d", i, way);
                break;
            }
        }
    }
    munmap(anew, PAGES * PAGE);
    close(sent);
}

static void load(void) {
    int files[4], ends[2], inner[2], memfd = memfd_create("in flight", 0);
    seed++;
    CHECK(ftruncate(memfd, PAGES * PAGE) == 0 && pipe(ends) == 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, inner) == 0, "what travels cannot be made");
    for (int i = 0; i < PAGES; i++) {
        uint64_t page[PAGE / 8];
        for (uint64_t at = 0; at < PAGE / 8; at++) page[at] = mix(seed + (uint64_t)i * 512 + at);
        if (i < HOLE || i >= 2 * HOLE) CHECK(pwrite(memfd, page, PAGE, (off_t)i * PAGE) == PAGE, "page %d cannot be written", i);
    }
    lseek(memfd, 12345, SEEK_SET);
    drain = ends[1], far = inner[0];
    CHECK(write(drain, "in the pipe", 11) == 11 && write(far, "in the socket", 13) == 13, "nothing goes in");

    files[0] = memfd, files[1] = ends[0], files[2] = counter;
    CHECK(send_with(stream[0], "plain", 0, NULL) && send_with(stream[0], "bytes", 0, NULL) && send_with(stream[0], "with", 3, files) &&
              send_with(stream[0], "again", 1, files) && send_with(stream[0], "tail", 0, NULL), "the stream does not take it");
    /* A socket that travels, with a message in it that brings the memfd, and itself. */
    files[0] = memfd, files[1] = inner[1];
    CHECK(send_with(far, "!", 2, files), "the inner socket does not take it");
    CHECK(send_with(datagram[0], "first", 0, NULL) && send_with(datagram[0], "", 1, &inner[1]) && send_with(datagram[0], "last", 0, NULL), "the datagrams do not go");
    /* One to which nothing travels, with bytes alone. */
    int bare[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, bare) == 0 && write(bare[0], "bytes alone", 11) == 11, "no bytes go in");
    CHECK(send_with(datagram[0], "bare", 1, &bare[1]), "the datagram does not go");
    close(bare[0]), close(bare[1]);
    close(inner[1]), close(ends[0]), close(memfd);
    CHECK(send_with(packet[0], "self", 1, &packet[1]), "the packet does not go");
    CHECK(eventfd_write(counter, 3) == 0, "the counter does not count");
}

static void setup(void) {
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, stream) == 0 && socketpair(AF_UNIX, SOCK_DGRAM, 0, datagram) == 0);
    MUST(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, packet) == 0);
    counter = eventfd(0, EFD_NONBLOCK);
    load();
    if (!argument_count) return;
    int refused[2], watcher = inotify_init();
    MUST(socketpair(AF_UNIX, SOCK_DGRAM, 0, refused) == 0 && send_with(refused[0], "one", 0, NULL) && send_with(refused[0], "two", 1, &counter));
    MUST(watcher >= 0 && send_with(refused[0], "three", 1, &watcher));
    close(watcher);
    say("OBJECT unix-in-flight fd %d", refused[1]);
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    char bytes[64] = "";
    int files[8], got[8];
    eventfd_t count = 0;
    /* What came without files is read without them, into the very byte before. */
    CHECK(recv(stream[1], bytes, 7, MSG_DONTWAIT) == 7 && !memcmp(bytes, "plainby", 7), "the stream begins with %s", bytes);
    if (!RECEIVES(stream[1], 3, "tes", 0, files) || !RECEIVES(stream[1], 64, "with", 3, files)) return;
    CHECK(inode(files[0]) && lseek(files[0], 0, SEEK_CUR) == 12345, "the memfd is at %ld", (long)lseek(files[0], 0, SEEK_CUR));
    memory = inode(files[0]);
    is_whole(files[0]);
    if (!RECEIVES(stream[1], 64, "again", 1, got)) return;
    CHECK(inode(got[0]) == memory && lseek(got[0], 0, SEEK_CUR) == lseek(files[0], 0, SEEK_CUR), "it is another the second time");
    close(got[0]);
    RECEIVES(stream[1], 64, "tail", 0, got);
    CHECK(read(files[1], bytes, sizeof bytes) == 11 && !memcmp(bytes, "in the pipe", 11), "the pipe has %s", bytes);
    CHECK(write(drain, "x", 1) == 1 && read(files[1], bytes, sizeof bytes) == 1, "the pipe has another end");
    CHECK(eventfd_read(files[2], &count) == 0 && count == 3 && eventfd_read(counter, &count) == -1 && errno == EAGAIN, "the counters are two");
    close(files[0]), close(files[1]), close(files[2]);

    RECEIVES(datagram[1], 64, "first", 0, files);
    if (!RECEIVES(datagram[1], 64, "", 1, files)) return;
    RECEIVES(datagram[1], 64, "last", 0, got);
    if (!RECEIVES(datagram[1], 64, "bare", 1, got)) return;
    memset(bytes, 0, sizeof bytes);
    CHECK(recv(got[0], bytes, sizeof bytes, MSG_DONTWAIT) == 11 && !memcmp(bytes, "bytes alone", 11), "the bare socket has %s", bytes);
    close(got[0]);
    CHECK(recv(files[0], bytes, 13, MSG_DONTWAIT) == 13 && !memcmp(bytes, "in the socket", 13), "the socket has %s", bytes);
    if (!RECEIVES(files[0], 64, "!", 2, got)) return;
    CHECK(inode(got[0]) == memory && inode(got[1]) == inode(files[0]), "the inner message brings something else");
    CHECK(write(far, "y", 1) == 1 && read(got[1], bytes, sizeof bytes) == 1, "the socket has another end");
    close(got[0]), close(got[1]), close(files[0]), close(far), close(drain);

    if (!RECEIVES(packet[1], 64, "self", 1, files)) return;
    CHECK(inode(files[0]) == inode(packet[1]), "it brings another socket than itself");
    close(files[0]);
    CHECK(recv(packet[1], bytes, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN, "there is a message too many");
    load();
}
