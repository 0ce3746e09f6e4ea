/* Uses a shared library that another host may have in another version. */
#include "subject.h"

int sample_value(void);

static void setup(void) { MUST(sample_value() == 41); }
static void step(void) { doze(5); }
static void verify(int round) {
    (void)round;
    CHECK(sample_value() == 41, "the library says %d", sample_value());
}
