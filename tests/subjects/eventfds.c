/* eventfd: counter, semaphore, blocked writer. */
#include "subject.h"
#include <sys/eventfd.h>

static int plain, semaphore, shut;

static void setup(void) {
    plain = eventfd(0, EFD_NONBLOCK);
    semaphore = eventfd(5, EFD_SEMAPHORE | EFD_NONBLOCK | EFD_CLOEXEC);
    shut = eventfd(0, EFD_NONBLOCK);
    uint64_t most = UINT64_MAX - 1, some = 0x123456789;
    MUST(write(shut, &most, 8) == 8 && write(plain, &some, 8) == 8);
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    uint64_t value = 0;
    CHECK(read(plain, &value, 8) == 8 && value == 0x123456789, "the counter holds %lx", value);
    CHECK(read(plain, &value, 8) == -1 && errno == EAGAIN, "the counter can be read twice");
    CHECK(write(plain, &(uint64_t){0x123456789}, 8) == 8, "write fails");
    for (int i = 0; i < 5; i++) CHECK(read(semaphore, &value, 8) == 8 && value == 1, "read %d of the semaphore gives %lu", i, value);
    CHECK(read(semaphore, &value, 8) == -1 && errno == EAGAIN, "the semaphore holds more than 5");
    CHECK(write(semaphore, &(uint64_t){5}, 8) == 8, "write fails");
    CHECK(write(shut, &(uint64_t){1}, 8) == -1 && errno == EAGAIN, "the full counter takes more");
    CHECK(fcntl(semaphore, F_GETFD) == FD_CLOEXEC && fcntl(plain, F_GETFD) == 0, "close-on-exec changed");
}
