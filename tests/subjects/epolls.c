/* epoll: many items with their data and flags; a ready one is reported, an edge already taken is not reported again, a
 * one-shot item stays silent, one epoll watches another. */
#include "subject.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>

enum { ITEMS = 200 };
static int inner, outer, item[ITEMS], edge, once, gone;

static int ready(int epoll, struct epoll_event *events, int count) { return epoll_wait(epoll, events, count, 0); }

static void watch(int epoll, int fd, uint32_t events, uint64_t data) {
    struct epoll_event event = {.events = events, .data.u64 = data};
    MUST(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0);
}

static void setup(void) {
    inner = epoll_create1(EPOLL_CLOEXEC);
    outer = epoll_create1(0);
    for (int i = 0; i < ITEMS; i++) {
        item[i] = eventfd(0, EFD_NONBLOCK);
        watch(inner, item[i], EPOLLIN | (i % 2 ? EPOLLRDHUP : 0), mix((unsigned)i));
    }
    watch(outer, inner, EPOLLIN, 4242);
    once = eventfd(1, EFD_NONBLOCK);
    watch(inner, once, EPOLLIN | EPOLLONESHOT, 43);
    edge = eventfd(0, EFD_NONBLOCK);
    watch(inner, edge, EPOLLOUT | EPOLLIN | EPOLLET, 44);
    struct epoll_event events[8];
    MUST(ready(inner, events, 8) == 2);
    gone = dup(item[0]);
}

static void step(void) { doze(5); }

static void verify(int round) {
    struct epoll_event events[ITEMS];
    /* A restored edge-triggered item may be reported once more: a spurious edge is allowed by epoll(7), a lost one never. */
    int count = ready(inner, events, ITEMS);
    CHECK(count == 0 || (count == 1 && events[0].data.u64 == 44), "%d items are ready, one with data %lx", count, events[0].data.u64);
    for (int i = round % 7; i < ITEMS; i += 7) CHECK(write(item[i], &(uint64_t){1}, 8) == 8, "write fails");
    count = ready(outer, events, ITEMS);
    CHECK(count == 1 && events[0].data.u64 == 4242 && events[0].events == EPOLLIN, "the outer epoll reports %d", count);
    count = ready(inner, events, ITEMS);
    int wanted = (ITEMS - round % 7 + 6) / 7;
    CHECK(count == wanted, "%d items are ready, not %d", count, wanted);
    for (int i = 0; i < count && i < wanted; i++) {
        bool known = false;
        for (int j = round % 7; j < ITEMS; j += 7) known |= events[i].data.u64 == mix((unsigned)j);
        CHECK(known && events[i].events == EPOLLIN, "an item with data %lx is ready", events[i].data.u64);
    }
    uint64_t value;
    for (int i = round % 7; i < ITEMS; i += 7) CHECK(read(item[i], &value, 8) == 8, "read fails");
    CHECK(write(edge, &(uint64_t){1}, 8) == 8, "write fails");
    CHECK(ready(inner, events, ITEMS) == 1 && events[0].data.u64 == 44, "a new edge is not reported");
    CHECK(ready(inner, events, ITEMS) == 0, "an edge is reported twice");
    CHECK(read(edge, &value, 8) == 8, "read fails");
    ready(inner, events, ITEMS); /* reading makes room: an edge of its own */
    struct epoll_event again = {.events = EPOLLIN | EPOLLONESHOT, .data.u64 = 45 + (unsigned)round};
    CHECK(epoll_ctl(inner, EPOLL_CTL_MOD, once, &again) == 0, "the one-shot item is gone");
    CHECK(ready(inner, events, ITEMS) == 1 && events[0].data.u64 == 45 + (unsigned)round, "the one-shot item is not ready when armed");
    struct epoll_event same = {.events = EPOLLIN};
    CHECK(epoll_ctl(inner, EPOLL_CTL_ADD, item[5], &same) == -1 && errno == EEXIST, "an item can be added twice");
    CHECK(fcntl(inner, F_GETFD) == FD_CLOEXEC && fcntl(outer, F_GETFD) == 0, "close-on-exec changed");
}
