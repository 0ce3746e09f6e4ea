/* What a debugger is to find in a core file: known values in data, heap, shared memory and registers, threads that wait each as
 * many calls deep as its number says, a signal that waits, and a child with values of its own. */
#include "../subjects/subject.h"

enum { THREADS = 3, MARKER = 0x51510000 };

const char known_text[] = "of the file";                /* never written to: a page of the program */
volatile uint64_t known_global = 0x0123456789abcdef;
uint64_t *known_heap, *known_shared, *known_secret;     /* the third is kept out of core files */

static volatile sig_atomic_t ready;
static volatile bool is_waiting = true;

/* Waits for ever with its number in a general and in a vector register. */
__attribute__((noinline)) void wait_at_depth(long number, long depth) {
    if (depth > 0) {
        wait_at_depth(number, depth - 1);
        __asm__ volatile("" ::: "memory");              /* this call is no jump */
        return;
    }
    register long marker __asm__("r12") = MARKER + number;
    __asm__ volatile("movq %0, %%xmm15" ::"r"(marker) : "xmm15");
    __atomic_fetch_add(&ready, 1, __ATOMIC_SEQ_CST);
    while (is_waiting) {
        long call = SYS_pause;
        __asm__ volatile("syscall" : "+a"(call) : "r"(marker) : "rcx", "r11", "memory");
    }
}

static void *body(void *number) {
    wait_at_depth((long)number, (long)number);
    return NULL;
}

static void setup(void) {
    known_heap = pages(64 << 20, PROT_READ | PROT_WRITE);
    known_heap[1] = 0x1111;
    known_heap[(32 << 20) / 8] = 0x2222;
    known_secret = pages(PAGE, PROT_READ | PROT_WRITE);
    known_secret[0] = 0x5ec4e7;
    MUST(madvise(known_secret, PAGE, MADV_DONTDUMP) == 0);
    known_shared = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    MUST(known_shared != MAP_FAILED);
    known_shared[2 * PAGE / 8] = 0x3333;

    pid_t child = fork();
    MUST(child >= 0);
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        known_global = 0xc11d;
        known_shared[0] = 0x4444;
        for (;;) pause();
    }
    MUST(EVENTUALLY(known_shared[0] == 0x4444));

    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    pthread_t last = 0;
    for (long number = 1; number <= THREADS; number++) last = thread(body, (void *)number);
    MUST(EVENTUALLY(ready == THREADS));
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    pthread_kill(last, SIGUSR2);
    known_global = 0xfedcba9876543210;
}

static void verify(int round) { (void)round; }

static void step(void) { doze(5); }
