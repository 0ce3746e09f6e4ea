/* UNIX sockets of two processes: listening by path, by an abstract name and by a path that is gone; connections between the two,
 * some to one name, some with names at both ends; datagram sockets connected both ways, one way and not at all; an end shut
 * down, an end closed. What lies unread in both directions, every name, mode, backlog and peer is as it was, and who connects
 * is served. */
#include "subject.h"
#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>

enum { BY_PATH, BY_NAME, AGAIN, TWICE, BOTH_WAYS, INHERITED, LINKS };
static const int types[LINKS] = {SOCK_STREAM, SOCK_SEQPACKET, SOCK_STREAM, SOCK_STREAM, SOCK_DGRAM, SOCK_STREAM};
struct name { struct sockaddr_un at; socklen_t length; };
static struct name path, abstract, gone, own, near, far, inbox_name;
static int path_listener, abstract_listener, gone_listener, inbox, half, orphan;
static int end[LINKS];                                /* this process' ends */
static uint64_t sent[LINKS][2], received[LINKS][2];   /* by the sending process: 0 the root */
static int self, outbox, half_end, questions[2], answers[2];
static pid_t root, child;
static bool heard;

static struct name name_of(bool is_path, const char *text) {
    struct name name = {.at.sun_family = AF_UNIX};
    char *start = name.at.sun_path + !is_path;
    int used = snprintf(start, sizeof name.at.sun_path - 1, "%s.%s", is_path ? state_path : "subject", text);
    if (!is_path) used += snprintf(start + used, 20, ".%d", root);
    name.length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)used);
    return name;
}

static int bound(int type, const struct name *name) {
    int fd = socket(AF_UNIX, type, 0);
    if (name->at.sun_path[0]) unlink(name->at.sun_path);
    MUST(fd >= 0 && bind(fd, (const struct sockaddr *)&name->at, name->length) == 0);
    return fd;
}

static int to(int fd, const struct name *name) { return connect(fd, (const struct sockaddr *)&name->at, name->length); }

static bool is(int (*call)(int, struct sockaddr *, socklen_t *), int fd, const struct name *name) {
    struct sockaddr_un at = {0};
    socklen_t length = sizeof at;
    if (call(fd, (struct sockaddr *)&at, &length)) return false;
    if (!name) return length == sizeof(sa_family_t);
    return length == name->length && !memcmp(&at, &name->at, length);
}

static int option(int fd, int name) {
    int value = -1;
    socklen_t length = sizeof value;
    return getsockopt(fd, SOL_SOCKET, name, &value, &length) ? -errno : value;
}

static pid_t peer_of(int fd) {
    struct ucred ids = {0};
    socklen_t length = sizeof ids;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &ids, &length)) return -errno;
    return ids.uid == getuid() && ids.gid == getgid() ? ids.pid : -1;
}

static void load(void) {
    for (int link = 0; link < LINKS; link++) {
        /* Both load in every round, and each knows how much. */
        sent[link][!self] += 3 + (uint64_t)!self;
        for (int i = 0; i < 3 + self; i++) {
            unsigned char bytes[500];
            uint64_t number = sent[link][self]++;
            for (size_t at = 0; at < sizeof bytes; at++) bytes[at] = (unsigned char)mix(number * 1000 + at + (unsigned)self);
            CHECK(send(end[link], bytes, sizeof bytes, MSG_NOSIGNAL) == sizeof bytes, "link %d: send fails", link);
        }
    }
    if (!self) return;
    CHECK(send(outbox, "unnamed", 7, 0) == 7, "the one-way socket does not send");
    CHECK(sendto(end[BOTH_WAYS], "named", 5, 0, (struct sockaddr *)&inbox_name.at, inbox_name.length) == 5, "a connected socket does not send elsewhere");
}

static void look(void) {
    static const struct name *const mine[LINKS][2] = {
        {&path, NULL}, {&abstract, &own}, {&path, NULL}, {&path, NULL}, {&near, &far}, {NULL, NULL}};
    for (int link = 0; link < LINKS; link++) {
        CHECK(is(getsockname, end[link], mine[link][self]), "link %d: own name differs in %d", link, self);
        CHECK(is(getpeername, end[link], mine[link][!self]), "link %d: the peer's name differs in %d", link, self);
        pid_t peer = link == BOTH_WAYS ? -1 : link == INHERITED || self ? root : child;
        CHECK(peer == -1 || peer_of(end[link]) == peer, "link %d: the peer of %d is %d", link, self, peer_of(end[link]));
        while (received[link][!self] < sent[link][!self]) {
            unsigned char bytes[600];
            uint64_t number = received[link][!self]++;
            ssize_t got = recv(end[link], bytes, types[link] == SOCK_STREAM ? 500 : sizeof bytes, MSG_DONTWAIT);
            CHECK(got == 500, "link %d: message %lu has %zd bytes", link, number, got);
            if (got != 500) return;
            for (size_t at = 0; at < 500; at++)
                CHECK(bytes[at] == (unsigned char)mix(number * 1000 + at + (unsigned)!self), "link %d: message %lu differs", link, number);
        }
        char byte;
        CHECK(recv(end[link], &byte, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN, "link %d: there is a message too many", link);
    }
}

static void answer(void) {
    CHECK(write(answers[1], failure, sizeof failure) == sizeof failure, "no answer");
    failure[0] = 0;
}

/* The child connects, and does what it is asked: 'c' looks at itself, 'l' loads. */
static void serve(int pair_end) {
    self = 1, child = getpid();
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    close(path_listener), close(abstract_listener), close(gone_listener), close(inbox), close(end[BOTH_WAYS]), close(end[INHERITED]);
    end[INHERITED] = pair_end;
    for (int link = 0; link <= TWICE; link++) {
        end[link] = link == BY_NAME ? bound(types[link], &own) : socket(AF_UNIX, types[link], 0);
        MUST(to(end[link], link == BY_NAME ? &abstract : &path) == 0);
    }
    end[BOTH_WAYS] = bound(SOCK_DGRAM, &far);
    MUST(to(end[BOTH_WAYS], &near) == 0);
    outbox = socket(AF_UNIX, SOCK_DGRAM, 0);
    MUST(to(outbox, &inbox_name) == 0);
    half_end = socket(AF_UNIX, SOCK_STREAM, 0);
    int brief = socket(AF_UNIX, SOCK_STREAM, 0);
    MUST(to(half_end, &path) == 0 && to(brief, &path) == 0 && write(brief, "last words", 10) == 10);
    close(brief);
    answer();
    for (char what; read(questions[0], &what, 1) == 1; answer()) {
        char byte;
        if (what == 'l') load();
        else {
            look();
            CHECK(is(getpeername, outbox, &inbox_name) && is(getsockname, outbox, NULL), "the one-way socket has other names");
            CHECK(recv(half_end, &byte, 1, MSG_DONTWAIT) == 0, "a half-closed connection does not end");
            CHECK(send(half_end, "y", 1, MSG_NOSIGNAL) == 1, "the open direction is closed");
        }
    }
    _exit(0);
}

static void ask(char what) {
    char why[sizeof failure] = "";
    CHECK(write(questions[1], &what, 1) == 1, "the child cannot be asked");
    CHECK(read(answers[0], why, sizeof why) == sizeof why && !why[0], "the child: %s", why);
}

static void setup(void) {
    root = getpid();
    path = name_of(true, "path"), gone = name_of(true, "gone"), near = name_of(true, "near"), far = name_of(true, "far"), inbox_name = name_of(true, "inbox");
    abstract = name_of(false, "abstract"), own = name_of(false, "own");
    path_listener = bound(SOCK_STREAM, &path);
    MUST(chmod(path.at.sun_path, 0751) == 0 && listen(path_listener, 7) == 0);
    abstract_listener = bound(SOCK_SEQPACKET, &abstract);
    gone_listener = bound(SOCK_STREAM, &gone);
    MUST(listen(abstract_listener, 9) == 0 && listen(gone_listener, 1) == 0 && unlink(gone.at.sun_path) == 0);
    end[BOTH_WAYS] = bound(SOCK_DGRAM, &near);
    inbox = bound(SOCK_DGRAM, &inbox_name);
    int pair[2];
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0 && pipe(questions) == 0 && pipe(answers) == 0);
    end[INHERITED] = pair[0];
    child = fork();
    if (child == 0) serve(pair[1]);
    close(pair[1]);
    for (int link = 0; link <= TWICE; link++) end[link] = accept(link == BY_NAME ? abstract_listener : path_listener, NULL, NULL);
    half = accept(path_listener, NULL, NULL), orphan = accept(path_listener, NULL, NULL);
    MUST(half >= 0 && orphan >= 0);
    char why[sizeof failure];
    MUST(read(answers[0], why, sizeof why) == sizeof why);
    MUST(to(end[BOTH_WAYS], &far) == 0 && shutdown(half, SHUT_WR) == 0);
    int one = 1;
    MUST(setsockopt(end[BY_NAME], SOL_SOCKET, SO_PASSCRED, &one, sizeof one) == 0);
    load();
    ask('l');
}

static void step(void) { doze(5); }

static void serves(int type, int listener, const struct name *name) {
    int client = socket(AF_UNIX, type, 0);
    CHECK(to(client, name) == 0, "nobody listens");
    int server = accept(listener, NULL, NULL);
    char byte = 0;
    CHECK(send(client, "x", 1, MSG_NOSIGNAL) == 1 && recv(server, &byte, 1, 0) == 1 && byte == 'x', "a new connection carries nothing");
    CHECK(peer_of(client) == root && is(getsockname, server, name), "a new connection is to somebody else");
    close(client), close(server);
}

static void verify(int round) {
    struct stat file;
    char bytes[32];
    (void)round;
    look();
    ask('c');
    CHECK(option(end[BY_NAME], SO_PASSCRED) == 1 && option(end[BY_PATH], SO_PASSCRED) == 0, "SO_PASSCRED is another");
    CHECK(lstat(path.at.sun_path, &file) == 0 && S_ISSOCK(file.st_mode) && (file.st_mode & 07777) == 0751 && file.st_uid == getuid(), "the file of the socket is another");
    CHECK(lstat(gone.at.sun_path, &file) == -1 && errno == ENOENT && is(getsockname, gone_listener, &gone), "the file that was gone is back");
    CHECK(option(gone_listener, SO_ACCEPTCONN) == 1, "the one without a file does not listen");
    serves(SOCK_STREAM, path_listener, &path);
    serves(SOCK_SEQPACKET, abstract_listener, &abstract);
    static const char *const wanted[] = {"unnamed", "named"};
    for (int i = 0; i < 2; i++) {
        struct name from = {.length = sizeof from.at};
        ssize_t got = recvfrom(inbox, bytes, sizeof bytes, MSG_DONTWAIT, (struct sockaddr *)&from.at, &from.length);
        CHECK(got == (ssize_t)strlen(wanted[i]) && !memcmp(bytes, wanted[i], (size_t)got), "the inbox gives %zd bytes", got);
        CHECK(i ? from.length == far.length && !memcmp(&from.at, &far.at, far.length) : from.length == 0, "message %d has another sender", i);
    }
    CHECK(send(half, "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE, "a closed direction takes a byte");
    CHECK(recv(half, bytes, 2, MSG_DONTWAIT) == 1, "the open direction carries nothing");
    ssize_t got = recv(orphan, bytes, sizeof bytes, MSG_DONTWAIT);
    CHECK(heard ? got == 0 : got == 10 && !memcmp(bytes, "last words", 10), "a connection without its other end gives %zd", got);
    heard = true;
    CHECK(is(getsockname, orphan, &path) && send(orphan, "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE, "a closed connection lives");
    CHECK(waitpid(child, NULL, WNOHANG) == 0, "the child has ended");
    load();
    ask('l');
}
