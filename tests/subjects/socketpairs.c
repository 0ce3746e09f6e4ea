/* UNIX socket pairs inside the process, stream, datagram and packet: what lies in them unread, in both directions, an end
 * shut down, an end closed, options. */
#include "subject.h"
#include <sys/socket.h>
#include <sys/un.h>

enum { STREAM, DATAGRAM, PACKET, KINDS };
static int pair[KINDS][2], shut[2], orphan;
static uint64_t sent[KINDS][2], received[KINDS][2]; /* [kind][sending end] messages, for streams words */
static int buffers[KINDS][2];

static size_t length_of(int kind, uint64_t number) { return kind == STREAM ? 8 : 1 + (size_t)(mix(number) % 900); }

static void send_some(int kind, int from, int count) {
    for (int i = 0; i < count; i++) {
        unsigned char bytes[1000];
        uint64_t number = sent[kind][from]++;
        size_t length = length_of(kind, number);
        for (size_t at = 0; at < length; at++) bytes[at] = (unsigned char)mix(number * 1000 + at + (unsigned)from);
        CHECK(send(pair[kind][from], bytes, length, MSG_NOSIGNAL) == (ssize_t)length, "kind %d end %d: send fails", kind, from);
    }
}

static void receive_all(int kind, int from) {
    while (received[kind][from] < sent[kind][from]) {
        unsigned char bytes[1000];
        uint64_t number = received[kind][from]++;
        size_t length = length_of(kind, number);
        ssize_t got = recv(pair[kind][!from], bytes, kind == STREAM ? length : sizeof bytes, MSG_DONTWAIT | (kind == STREAM ? MSG_WAITALL : 0));
        CHECK(got == (ssize_t)length, "kind %d from end %d: message %lu has %zd bytes, not %zu", kind, from, number, got, length);
        if (got != (ssize_t)length) return;
        for (size_t at = 0; at < length; at++)
            CHECK(bytes[at] == (unsigned char)mix(number * 1000 + at + (unsigned)from), "kind %d: message %lu differs", kind, number);
    }
    char byte;
    CHECK(recv(pair[kind][!from], &byte, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN, "kind %d: there is a message too many", kind);
}

static void load(void) {
    for (int kind = 0; kind < KINDS; kind++) send_some(kind, 0, 9), send_some(kind, 1, 4);
}

static void setup(void) {
    const int types[] = {SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET};
    for (int kind = 0; kind < KINDS; kind++) {
        MUST(socketpair(AF_UNIX, types[kind] | (kind == PACKET ? SOCK_NONBLOCK | SOCK_CLOEXEC : 0), 0, pair[kind]) == 0);
        MUST(setsockopt(pair[kind][0], SOL_SOCKET, SO_SNDBUF, &(int){150000}, sizeof(int)) == 0);
        /* Not on datagrams: sending from such an end would bind it to a name. */
        MUST(setsockopt(pair[kind][1], SOL_SOCKET, SO_PASSCRED, &(int){kind == STREAM}, sizeof(int)) == 0);
        for (int end = 0; end < 2; end++) {
            socklen_t length = sizeof(int);
            getsockopt(pair[kind][end], SOL_SOCKET, SO_SNDBUF, &buffers[kind][end], &length);
        }
    }
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, shut) == 0 && shutdown(shut[0], SHUT_WR) == 0);
    int ends[2];
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0 && write(ends[1], "last words", 10) == 10);
    close(ends[1]);
    orphan = ends[0];
    load();
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    static bool heard;
    for (int kind = 0; kind < KINDS; kind++)
        for (int end = 0; end < 2; end++) {
            int size = 0;
            socklen_t length = sizeof size;
            CHECK(getsockopt(pair[kind][end], SOL_SOCKET, SO_SNDBUF, &size, &length) == 0 && size == buffers[kind][end], "kind %d end %d: buffer is %d, was %d", kind, end, size, buffers[kind][end]);
            CHECK(fcntl(pair[kind][end], F_GETFL) == (kind == PACKET ? O_RDWR | O_NONBLOCK : O_RDWR), "kind %d end %d: flags changed", kind, end);
            CHECK(fcntl(pair[kind][end], F_GETFD) == (kind == PACKET ? FD_CLOEXEC : 0), "kind %d end %d: close-on-exec changed", kind, end);
            receive_all(kind, end);
        }
    int passes = 0;
    socklen_t length = sizeof passes;
    CHECK(getsockopt(pair[STREAM][1], SOL_SOCKET, SO_PASSCRED, &passes, &length) == 0 && passes == 1, "SO_PASSCRED is lost");
    char bytes[32];
    CHECK(recv(shut[1], bytes, 1, MSG_DONTWAIT) == 0, "the end of a half-closed pair does not read end of file");
    CHECK(send(shut[0], "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE, "a closed direction takes a byte");
    CHECK(send(shut[1], "y", 1, MSG_NOSIGNAL) == 1 && recv(shut[0], bytes, 1, MSG_DONTWAIT) == 1, "the open direction is closed");
    ssize_t got = recv(orphan, bytes, sizeof bytes, MSG_DONTWAIT);
    CHECK(heard ? got == 0 : got == 10 && !memcmp(bytes, "last words", 10), "a pair without its other end gives %zd", got);
    heard = true;
    CHECK(send(orphan, "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE, "a pair without its other end takes a byte");
    load();
}
