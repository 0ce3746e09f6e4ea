/* Registers: general, vector (as wide as the processor has them), mask, and the two floating-point control words, held
 * across whatever happens by threads that make no system call. */
#include "hold.h"

enum { HOLDERS = 3 };
static struct holding holders[HOLDERS];

static void setup(void) {
    for (uint64_t i = 0; i < HOLDERS; i++) {
        holders[i].seed = 77 * i + i;
        thread(hold_for_ever, &holders[i]);
    }
    for (int i = 0; i < HOLDERS; i++) MUST(EVENTUALLY(atomic_load(&holders[i].held)));
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    for (int i = 0; i < HOLDERS; i++) let_go(&holders[i]);
}
