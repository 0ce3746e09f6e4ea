/* UDP sockets: unbound, bound to an address and to all, v4 and v6, with options and a multicast membership. */
#include "subject.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

static int unbound4, unbound6, bound4, bound6, any;
struct option { int level, name, value; };
static const struct option wanted[] = {
    {SOL_SOCKET, SO_REUSEADDR, 1}, {SOL_SOCKET, SO_REUSEPORT, 1}, {SOL_SOCKET, SO_BROADCAST, 1}, {SOL_SOCKET, SO_RCVBUF, 70000},
    {SOL_SOCKET, SO_SNDBUF, 60000}, {IPPROTO_IP, IP_TTL, 33}, {IPPROTO_IP, IP_PKTINFO, 1}, {IPPROTO_IP, IP_MULTICAST_TTL, 5},
    {IPPROTO_IP, IP_RECVTOS, 1}, {IPPROTO_IPV6, IPV6_UNICAST_HOPS, 44}, {IPPROTO_IPV6, IPV6_RECVPKTINFO, 1},
    {SOL_SOCKET, SO_TIMESTAMP, 0}, {IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO}, {SOL_SOCKET, SO_RXQ_OVFL, 1},
};
enum { OPTIONS = sizeof wanted / sizeof *wanted, SOCKETS = 5 };
static int before[SOCKETS][OPTIONS];
static int sockets[SOCKETS];
static struct sockaddr_storage names[SOCKETS];
static struct timeval patience = {3, 250000};

static int option(int fd, int level, int name) {
    int value = 0;
    socklen_t length = sizeof value;
    return getsockopt(fd, level, name, &value, &length) ? -errno : value;
}

static int make(int family, int index) {
    int fd = socket(family, SOCK_DGRAM | (index % 2 ? SOCK_NONBLOCK : SOCK_CLOEXEC), 0);
    MUST(fd >= 0);
    for (int i = 0; i < OPTIONS; i++) setsockopt(fd, wanted[i].level, wanted[i].name, &wanted[i].value, sizeof(int));
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    for (int i = 0; i < OPTIONS; i++) before[index][i] = option(fd, wanted[i].level, wanted[i].name);
    return sockets[index] = fd;
}

static void setup(void) {
    unbound4 = make(AF_INET, 0);
    unbound6 = make(AF_INET6, 1);
    bound4 = make(AF_INET, 2);
    bound6 = make(AF_INET6, 3);
    any = make(AF_INET, 4);
    struct sockaddr_in at4 = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in6 at6 = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    MUST(bind(bound4, (struct sockaddr *)&at4, sizeof at4) == 0);
    MUST(bind(bound6, (struct sockaddr *)&at6, sizeof at6) == 0);
    at4.sin_addr.s_addr = htonl(INADDR_ANY);
    MUST(bind(any, (struct sockaddr *)&at4, sizeof at4) == 0);
    for (int i = 0; i < SOCKETS; i++) {
        socklen_t length = sizeof names[i];
        MUST(getsockname(sockets[i], (struct sockaddr *)&names[i], &length) == 0);
    }
}

static void step(void) { doze(5); }

static void send_to(int fd, int index) {
    struct sockaddr_storage to = names[index];
    socklen_t length = to.ss_family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
    if (index == 4) ((struct sockaddr_in *)&to)->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    uint64_t word = mix((unsigned)index), got = 0;
    CHECK(sendto(fd, &word, 8, 0, (struct sockaddr *)&to, length) == 8, "nothing can be sent to socket %d", index);
    CHECK(EVENTUALLY(recv(sockets[index], &got, 8, MSG_DONTWAIT) == 8) && got == word, "socket %d does not get it", index);
}

static void verify(int round) {
    (void)round;
    for (int s = 0; s < SOCKETS; s++) {
        for (int i = 0; i < OPTIONS; i++) {
            int now = option(sockets[s], wanted[i].level, wanted[i].name);
            CHECK(now == before[s][i], "socket %d: option %d of level %d is %d, was %d", s, wanted[i].name, wanted[i].level, now, before[s][i]);
        }
        struct sockaddr_storage name;
        memset(&name, 0, sizeof name);
        socklen_t length = sizeof name;
        CHECK(getsockname(sockets[s], (struct sockaddr *)&name, &length) == 0 && !memcmp(&name, &names[s], length), "socket %d has another name", s);
        struct timeval now;
        length = sizeof now;
        CHECK(getsockopt(sockets[s], SOL_SOCKET, SO_RCVTIMEO, &now, &length) == 0 && now.tv_sec == patience.tv_sec, "socket %d: timeout changed", s);
        CHECK(fcntl(sockets[s], F_GETFD) == (s % 2 ? 0 : FD_CLOEXEC), "socket %d: close-on-exec changed", s);
        CHECK(fcntl(sockets[s], F_GETFL) == (s % 2 ? O_RDWR | O_NONBLOCK : O_RDWR), "socket %d: flags changed", s);
    }
    send_to(bound4, 2); /* not from the unbound ones: sending binds */
    send_to(bound6, 3);
    send_to(bound4, 4);
}
