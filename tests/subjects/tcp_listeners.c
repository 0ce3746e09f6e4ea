/* Listening TCP sockets, v4 and v6, with their options and backlog: whoever connects is served. */
#include "subject.h"
#include <arpa/inet.h>
#include <linux/filter.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

static int v4, v6, dual, unlistened;
struct option { int level, name, value; };
static const struct option wanted[] = {
    {SOL_SOCKET, SO_REUSEADDR, 1}, {SOL_SOCKET, SO_KEEPALIVE, 1}, {IPPROTO_TCP, TCP_KEEPIDLE, 77}, {IPPROTO_TCP, TCP_KEEPINTVL, 11},
    {IPPROTO_TCP, TCP_KEEPCNT, 5}, {IPPROTO_TCP, TCP_NODELAY, 1}, {IPPROTO_TCP, TCP_DEFER_ACCEPT, 0}, {IPPROTO_TCP, TCP_USER_TIMEOUT, 30000},
    {SOL_SOCKET, SO_RCVBUF, 100000}, {SOL_SOCKET, SO_SNDBUF, 90000}, {SOL_SOCKET, SO_OOBINLINE, 1}, {IPPROTO_TCP, TCP_FASTOPEN, 7},
    {IPPROTO_IP, IP_TOS, 0x10}, {SOL_SOCKET, SO_PRIORITY, 3}, {IPPROTO_TCP, TCP_MAXSEG, 1000}, {IPPROTO_TCP, TCP_QUICKACK, 1},
};
enum { OPTIONS = sizeof wanted / sizeof *wanted };
static int before[3][OPTIONS];
static struct linger linger = {1, 9};
static uint16_t ports[3];
static int in_backlog;

static int option(int fd, int level, int name) {
    int value = -1;
    socklen_t length = sizeof value;
    return getsockopt(fd, level, name, &value, &length) ? -errno : value;
}

static int open_listener(int family, bool only6, int index) {
    int fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK | (index == 1 ? SOCK_CLOEXEC : 0), 0);
    MUST(fd >= 0);
    for (int i = 0; i < OPTIONS; i++) setsockopt(fd, wanted[i].level, wanted[i].name, &wanted[i].value, sizeof(int));
    MUST(setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger) == 0);
    struct sockaddr_in at4 = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in6 at6 = {.sin6_family = AF_INET6};
    if (family == AF_INET) MUST(bind(fd, (struct sockaddr *)&at4, sizeof at4) == 0);
    else {
        int only = only6;
        MUST(setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &only, sizeof only) == 0);
        MUST(bind(fd, (struct sockaddr *)&at6, sizeof at6) == 0);
    }
    MUST(listen(fd, 31 + index) == 0);
    for (int i = 0; i < OPTIONS; i++) before[index][i] = option(fd, wanted[i].level, wanted[i].name);
    struct sockaddr_in6 name;
    socklen_t length = sizeof name;
    MUST(getsockname(fd, (struct sockaddr *)&name, &length) == 0);
    ports[index] = name.sin6_port; /* at the same place for both families */
    return fd;
}

static void setup(void) {
    v4 = open_listener(AF_INET, false, 0);
    v6 = open_listener(AF_INET6, true, 1);
    dual = open_listener(AF_INET6, false, 2);
    unlistened = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    MUST(bind(unlistened, (struct sockaddr *)&at, sizeof at) == 0);
    struct tcp_info info;
    socklen_t length = sizeof info;
    MUST(getsockopt(v4, IPPROTO_TCP, TCP_INFO, &info, &length) == 0);
    in_backlog = (int)info.tcpi_sacked;
}

static void step(void) { doze(5); }

/* Connects over the loopback, exchanges a few bytes and leaves nothing behind. */
static void serve(int listener, int family, uint16_t port, const char *what) {
    int client = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct linger reset = {1, 0}; /* no TIME_WAIT */
    setsockopt(client, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    struct sockaddr_in at4 = {.sin_family = AF_INET, .sin_port = port, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in6 at6 = {.sin6_family = AF_INET6, .sin6_port = port, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    int rc = family == AF_INET ? connect(client, (struct sockaddr *)&at4, sizeof at4) : connect(client, (struct sockaddr *)&at6, sizeof at6);
    CHECK(rc == 0, "%s: connect fails", what);
    int server = -1;
    CHECK(rc || EVENTUALLY((server = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) >= 0), "%s: accept fails", what);
    if (server >= 0) {
        char bytes[8] = "";
        CHECK(write(client, "hello", 5) == 5 && recv(server, bytes, 5, MSG_WAITALL) == 5 && !memcmp(bytes, "hello", 5), "%s: no bytes pass", what);
        CHECK(option(server, IPPROTO_TCP, TCP_KEEPIDLE) == 77, "%s: an accepted socket has no options of its listener", what);
        close(client);
        close(server);
    } else close(client);
}

static void verify(int round) {
    (void)round;
    const int listeners[] = {v4, v6, dual};
    for (int l = 0; l < 3; l++) {
        for (int i = 0; i < OPTIONS; i++) {
            int now = option(listeners[l], wanted[i].level, wanted[i].name);
            CHECK(now == before[l][i], "listener %d: option %d of level %d is %d, was %d", l, wanted[i].name, wanted[i].level, now, before[l][i]);
        }
        struct linger now;
        socklen_t length = sizeof now;
        CHECK(getsockopt(listeners[l], SOL_SOCKET, SO_LINGER, &now, &length) == 0 && now.l_onoff == 1 && now.l_linger == 9, "listener %d: linger changed", l);
        CHECK(option(listeners[l], SOL_SOCKET, SO_ACCEPTCONN) == 1, "listener %d does not listen", l);
        struct tcp_info info;
        length = sizeof info;
        CHECK(getsockopt(listeners[l], IPPROTO_TCP, TCP_INFO, &info, &length) == 0 && (int)info.tcpi_sacked == in_backlog + l, "listener %d: backlog is %u", l, info.tcpi_sacked);
        CHECK(fcntl(listeners[l], F_GETFL) == (O_RDWR | O_NONBLOCK), "listener %d: flags changed", l);
    }
    CHECK(fcntl(v6, F_GETFD) == FD_CLOEXEC && fcntl(v4, F_GETFD) == 0, "close-on-exec changed");
    CHECK(option(v6, IPPROTO_IPV6, IPV6_V6ONLY) == 1 && option(dual, IPPROTO_IPV6, IPV6_V6ONLY) == 0, "V6ONLY changed");
    serve(v4, AF_INET, ports[0], "v4");
    serve(v6, AF_INET6, ports[1], "v6");
    serve(dual, AF_INET, ports[2], "v4 on a dual socket");
    serve(dual, AF_INET6, ports[2], "v6 on a dual socket");
    CHECK(option(unlistened, SOL_SOCKET, SO_ACCEPTCONN) == 0, "a bound socket listens");
    struct sockaddr_in name;
    socklen_t length = sizeof name;
    CHECK(getsockname(unlistened, (struct sockaddr *)&name, &length) == 0 && name.sin_port != 0, "a bound socket has lost its port");
}
