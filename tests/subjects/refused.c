/* Holds, one each, the objects that cannot be carried, and says which descriptor or address each has: lines
 * "OBJECT kind fd N" or "OBJECT kind at ADDRESS". Nothing that is tried on it may disturb any of them. */
#include "subject.h"
#include <linux/netlink.h>
#include <netinet/in.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/fanotify.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ipc.h>
#include <sys/socket.h>
#include <sys/un.h>

enum { OBJECTS = 32 };
static int held[OBJECTS], count;
static struct stat before[OBJECTS];
static pid_t child;
static int connection; /* to the sibling */

static void holds(const char *kind, int fd) {
    if (fd < 0) {
        say("ABSENT %s %d", kind, errno);
        return;
    }
    say("OBJECT %s fd %d", kind, fd);
    fstat(fd, &before[count]);
    held[count++] = fd;
}

static void maps_object(const char *kind, void *at) {
    if (at == MAP_FAILED || (intptr_t)at == -1) {
        say("ABSENT %s %d", kind, errno);
        return;
    }
    *(volatile char *)at = 1;
    say("OBJECT %s at %lx", kind, (unsigned long)(uintptr_t)at);
}

static char local_path[64];

static void remove_local(void) { unlink(local_path); }

static void setup(void) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof at;
    int listener = socket(AF_INET, SOCK_STREAM, 0), client = socket(AF_INET, SOCK_STREAM, 0);
    MUST(bind(listener, (struct sockaddr *)&at, sizeof at) == 0 && listen(listener, 1) == 0);
    MUST(getsockname(listener, (struct sockaddr *)&at, &length) == 0 && connect(client, (struct sockaddr *)&at, length) == 0);
    holds("tcp", client);
    holds("tcp", accept(listener, NULL, NULL));

    maps_object("shared-outside", mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    int given = memfd_create("given", 0);
    MUST(ftruncate(given, PAGE) == 0);
    holds("memfd-outside", given);
    int ends[2], outside[2];
    MUST(pipe(ends) == 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, outside) == 0);
    /* No child, which would go with us, but a sibling. */
    child = (pid_t)syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0);
    if (child == 0) { /* it holds the other end of the pipe until we are gone */
        close(ends[1]), close(outside[1]);
        char byte;
        while (read(ends[0], &byte, 1) > 0) {}
        _exit(0);
    }
    close(ends[0]), close(outside[0]);
    holds("outside-pipe", ends[1]);
    holds("unix-outside", connection = outside[1]);

    holds("tty", open("/dev/ptmx", O_RDWR | O_NOCTTY));
    holds("inotify", inotify_init1(0));
    holds("memfd-hugetlb", memfd_create("huge", MFD_HUGETLB));
    holds("secret-memory", (int)syscall(SYS_memfd_secret, 0));
    holds("netlink", socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE));
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    snprintf(name.sun_path, sizeof name.sun_path, "/tmp/refused.%d", getpid());
    int named = socket(AF_UNIX, SOCK_STREAM, 0);
    MUST(bind(named, (struct sockaddr *)&name, sizeof name) == 0 && listen(named, 1) == 0);
    int waiting = socket(AF_UNIX, SOCK_STREAM, 0);
    MUST(connect(waiting, (struct sockaddr *)&name, sizeof name) == 0);
    unlink(name.sun_path);
    holds("unix-accept-queue", named);
    holds("unix-unaccepted", waiting);
    struct sockaddr_in dgram = {.sin_family = AF_INET, .sin_port = htons(9), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int udp = socket(AF_INET, SOCK_DGRAM, 0);
    MUST(connect(udp, (struct sockaddr *)&dgram, sizeof dgram) == 0);
    holds("udp-connected", udp);
    char path[4200];
    snprintf(path, sizeof path, "%s.deleted", state_path);
    int deleted = open(path, O_RDWR | O_CREAT, 0600);
    unlink(path);
    MUST(posix_fallocate(deleted, 0, 2 << 20) == 0);
    holds("deleted-file", deleted);
    /* On a disk: what lies on a tmpfs goes along. */
    snprintf(local_path, sizeof local_path, "/var/tmp/pageferry-local.%d", getpid());
    int local = open(local_path, O_RDWR | O_CREAT, 0600);
    atexit(remove_local);
    holds("local-file", local);
    snprintf(path, sizeof path, "%s.leased", state_path);
    close(open(path, O_RDWR | O_CREAT, 0600));
    int leased = open(path, O_RDONLY);
    unlink(path);
    holds("lease", fcntl(leased, F_SETLEASE, F_RDLCK) ? -1 : leased);
    holds("pidfd", (int)syscall(SYS_pidfd_open, getpid(), 0));
    holds("path-descriptor", open("/usr", O_PATH));
    struct { unsigned words[30]; } parameters = {0};
    holds("io-uring", (int)syscall(SYS_io_uring_setup, 4, &parameters));
    holds("userfaultfd", (int)syscall(SYS_userfaultfd, 1 /* UFFD_USER_MODE_ONLY */));

    say("OBJECT sibling pid %d", child);
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    for (int i = 0; i < count; i++) {
        struct stat now;
        CHECK(fstat(held[i], &now) == 0 && now.st_ino == before[i].st_ino, "descriptor %d is another", held[i]);
    }
    CHECK(kill(child, 0) == 0, "the sibling is gone");
    CHECK(send(connection, "x", 1, MSG_NOSIGNAL) == 1, "the connection to the sibling is broken");
    char bytes[4] = "";
    CHECK(write(held[0], "x", 1) == 1 && read(held[1], bytes, 1) == 1 && bytes[0] == 'x', "the connection is broken");
}
