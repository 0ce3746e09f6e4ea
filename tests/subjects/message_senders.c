/* Who sent what lies unread: two processes send on one socket, of each type, some with their credentials and some without, by
 * themselves or because the receiver wants to know. Each message tells the same process, user and group, or nobody, and the bytes
 * of two senders are never read as one. */
#include "subject.h"
#include <sys/socket.h>

enum { STREAM, DATAGRAM, PACKET, KINDS };
static const int types[KINDS] = {SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET};
static int pair[KINDS][2], asking[2], questions[2], answers[2];
static pid_t root, child;

static bool send_signed(int fd, const char *bytes) {
    union { struct cmsghdr header; char room[CMSG_SPACE(sizeof(struct ucred))]; } control = {0};
    struct ucred own = {getpid(), getuid(), getgid()};
    control.header = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof own), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_CREDENTIALS};
    memcpy(CMSG_DATA(&control.header), &own, sizeof own);
    struct iovec part = {(void *)bytes, strlen(bytes)};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    return sendmsg(fd, &message, MSG_NOSIGNAL) == (ssize_t)strlen(bytes);
}

static void is_from(int line, int fd, const char *bytes, pid_t pid) {
    union { struct cmsghdr header; char room[CMSG_SPACE(sizeof(struct ucred))]; } control = {0};
    char buffer[64] = "";
    struct iovec part = {buffer, sizeof buffer - 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t got = recvmsg(fd, &message, MSG_DONTWAIT);
    struct ucred ids = {-1, 0, 0};
    if (got >= 0 && control.header.cmsg_type == SCM_CREDENTIALS) memcpy(&ids, CMSG_DATA(&control.header), sizeof ids);
    bool is_own = pid ? ids.uid == getuid() && ids.gid == getgid() : ids.uid == 65534 && ids.gid == 65534;
    if (got != (ssize_t)strlen(bytes) || memcmp(buffer, bytes, (size_t)got) || ids.pid != pid || !is_own)
        fail(line, "%.20s of %d (%u:%u) instead of %s of %d", buffer, ids.pid, ids.uid, ids.gid, bytes, pid);
}
#define IS_FROM(...) is_from(__LINE__, __VA_ARGS__)

static void serve(void) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (char what; read(questions[0], &what, 1) == 1;) {
        bool sent = true;
        for (int kind = 0; kind < KINDS; kind++) sent = sent && send_signed(pair[kind][0], "child");
        sent = sent && send(asking[0], "noted", 5, MSG_NOSIGNAL) == 5;
        if (write(answers[1], &sent, 1) != 1) _exit(1);
    }
    _exit(0);
}

static void load(void) {
    bool sent = false;
    for (int kind = 0; kind < KINDS; kind++)
        CHECK(send(pair[kind][0], "nobody", 6, 0) == 6 && send_signed(pair[kind][0], "root"), "kind %d does not send", kind);
    CHECK(send(asking[0], "own", 3, 0) == 3, "nothing is sent to who asks");
    CHECK(write(questions[1], "s", 1) == 1 && read(answers[0], &sent, 1) == 1 && sent, "the child does not send");
    for (int kind = 0; kind < KINDS; kind++) CHECK(send(pair[kind][0], "end", 3, 0) == 3, "kind %d does not send", kind);
}

static void asks(int fd, int whether) { CHECK(setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &whether, sizeof whether) == 0, "SO_PASSCRED cannot be set"); }

static void setup(void) {
    root = getpid();
    for (int kind = 0; kind < KINDS; kind++) MUST(socketpair(AF_UNIX, types[kind], 0, pair[kind]) == 0);
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, asking) == 0 && pipe(questions) == 0 && pipe(answers) == 0);
    asks(asking[1], 1);
    child = fork();
    if (child == 0) serve();
    MUST(child > 0);
    load();
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    for (int kind = 0; kind < KINDS; kind++) {
        int end = pair[kind][1], asked = -1;
        socklen_t length = sizeof asked;
        CHECK(getsockopt(end, SOL_SOCKET, SO_PASSCRED, &asked, &length) == 0 && asked == 0, "kind %d: SO_PASSCRED is %d", kind, asked);
        asks(end, 1);
        IS_FROM(end, "nobody", 0);
        IS_FROM(end, "root", root);
        IS_FROM(end, "child", child);
        IS_FROM(end, "end", 0);
        char byte;
        CHECK(recv(end, &byte, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN, "kind %d: there is a message too many", kind);
        asks(end, 0);
    }
    IS_FROM(asking[1], "own", root);
    IS_FROM(asking[1], "noted", child);
    CHECK(waitpid(child, NULL, WNOHANG) == 0, "the child has ended");
    load();
}
