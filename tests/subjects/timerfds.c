/* timerfd: periodic, once, far away, disarmed, and with expirations nobody has read yet. */
#include "subject.h"
#include <poll.h>
#include <sys/timerfd.h>

static int periodic, far_away, unread, unread_periodic, disarmed, absolute;
static int64_t far_started;

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000l + t.tv_nsec;
}

static int64_t left(int fd) {
    struct itimerspec spec;
    timerfd_gettime(fd, &spec);
    return spec.it_value.tv_sec * 1000000000l + spec.it_value.tv_nsec;
}

static void arm_far(void) {
    struct itimerspec spec = {.it_value.tv_sec = 10000};
    MUST(timerfd_settime(far_away, 0, &spec, NULL) == 0);
    far_started = now();
}

static void arm_unread(void) {
    struct itimerspec spec = {.it_value.tv_nsec = 1000000};
    MUST(timerfd_settime(unread, 0, &spec, NULL) == 0);
    while (left(unread)) doze(1);
    /* Expired, it says that nothing is left until it is read. */
    struct pollfd fired = {unread_periodic, POLLIN, 0};
    MUST(poll(&fired, 1, 10000) == 1);
}

static void setup(void) {
    periodic = timerfd_create(CLOCK_MONOTONIC, 0);
    far_away = timerfd_create(CLOCK_BOOTTIME, TFD_NONBLOCK);
    unread = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    disarmed = timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK | TFD_CLOEXEC);
    absolute = timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK);
    unread_periodic = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct itimerspec often = {.it_value.tv_nsec = 20000000, .it_interval.tv_nsec = 20000000};
    MUST(timerfd_settime(periodic, 0, &often, NULL) == 0);
    MUST(timerfd_settime(unread_periodic, 0, &often, NULL) == 0);
    struct itimerspec then = {.it_value.tv_sec = 4102444800}; /* the year 2100 */
    MUST(timerfd_settime(absolute, TFD_TIMER_ABSTIME, &then, NULL) == 0);
    arm_far();
    arm_unread();
}

static void step(void) { /* blocks in read(2) of a timer: the usual way an event loop waits */
    uint64_t ticks = 0;
    ssize_t got = read(periodic, &ticks, 8);
    CHECK(got == 8 && ticks >= 1, "the periodic timer gives %zd", got);
}

static void verify(int round) {
    (void)round;
    int64_t gone = now() - far_started, remains = left(far_away);
    CHECK(remains <= 10000000000000 - gone + 5000000 && remains >= 10000000000000 - gone - 5000000000,
          "%ld ns remain after %ld", remains, gone);
    uint64_t ticks = 0;
    CHECK(read(unread, &ticks, 8) == 8 && ticks == 1, "an expiration nobody read gives %lu", ticks);
    CHECK(read(unread, &ticks, 8) == -1 && errno == EAGAIN, "it is read twice");
    CHECK(read(unread_periodic, &ticks, 8) == 8 && ticks >= 1, "an expired periodic timer gives %lu", ticks);
    CHECK(EVENTUALLY(read(unread_periodic, &ticks, 8) == 8), "a periodic timer stopped after it was read");
    CHECK(left(disarmed) == 0 && read(disarmed, &ticks, 8) == -1 && errno == EAGAIN, "a disarmed timer runs");
    CHECK(left(absolute) > 1000000000000000, "the absolute timer has %ld ns left", left(absolute));
    struct itimerspec spec;
    CHECK(timerfd_gettime(periodic, &spec) == 0 && spec.it_interval.tv_nsec == 20000000, "the interval changed");
    CHECK(fcntl(disarmed, F_GETFD) == FD_CLOEXEC && fcntl(periodic, F_GETFL) == O_RDWR, "flags changed");
    arm_far();
    arm_unread();
}
