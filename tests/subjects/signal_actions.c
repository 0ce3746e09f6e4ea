/* Signals: the action of each, the mask and the alternate stack of each thread, ignored and blocked SIGTRAP among them. */
#include "subject.h"

#ifndef SS_AUTODISARM
#define SS_AUTODISARM (1u << 31)
#endif

enum { THREADS = 4 };
struct kernel_action { /* what rt_sigaction(2) itself takes: glibc hides restorer and mask */
    uint64_t handler, flags, restorer, mask;
};
static struct kernel_action before[65];
static struct {
    sigset_t mask;
    stack_t stack;
    pid_t tid;
    _Atomic int asked, answered;
} roster[THREADS];
static __thread volatile uintptr_t where; /* written by the handler */

static void on_stack(int signo, siginfo_t *info, void *context) {
    (void)signo, (void)info, (void)context;
    where = (uintptr_t)__builtin_frame_address(0);
}

static int raw_action(int signo, struct kernel_action *out) {
    return (int)syscall(SYS_rt_sigaction, signo, NULL, out, 8);
}

static void *work(void *argument) {
    uintptr_t index = (uintptr_t)argument;
    stack_t stack = {.ss_sp = pages(1 << 16, PROT_READ | PROT_WRITE), .ss_size = (1 << 16) - 512 * index,
                     .ss_flags = index == 3 ? (int)SS_AUTODISARM : 0};
    MUST(sigaltstack(&stack, NULL) == 0);
    sigset_t mask;
    sigfillset(&mask);
    for (int signo = 1 + (int)index; signo < 64; signo += 3 + (int)index) sigdelset(&mask, signo);
    sigdelset(&mask, SIGUSR2);
    sigaddset(&mask, SIGTRAP);
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    pthread_sigmask(SIG_SETMASK, NULL, &roster[index].mask);
    sigaltstack(NULL, &roster[index].stack);
    roster[index].tid = own_tid();
    for (;;) {
        int asked = atomic_load(&roster[index].asked);
        if (asked != atomic_load(&roster[index].answered)) {
            sigset_t now;
            stack_t stack_now;
            pthread_sigmask(SIG_SETMASK, NULL, &now);
            CHECK(!memcmp(&now, &roster[index].mask, 8), "thread %lu: mask changed", index);
            sigaltstack(NULL, &stack_now);
            CHECK(stack_now.ss_sp == stack.ss_sp && stack_now.ss_size == stack.ss_size &&
                  stack_now.ss_flags == roster[index].stack.ss_flags,
                  "thread %lu: alternate stack is %p %zu %x", index, stack_now.ss_sp, stack_now.ss_size, stack_now.ss_flags);
            where = 0;
            syscall(SYS_tgkill, getpid(), own_tid(), SIGUSR2);
            uintptr_t base = (uintptr_t)stack.ss_sp;
            CHECK(where >= base && where < base + stack.ss_size, "thread %lu: handler ran at %lx", index, where);
            atomic_store(&roster[index].answered, asked);
        }
        doze(2);
    }
    return NULL;
}

static void setup(void) {
    for (int signo = 1; signo < 65; signo++) {
        if (signo == SIGKILL || signo == SIGSTOP || signo == SIGSEGV || signo == 32 || signo == 33) continue;
        struct sigaction action = {.sa_flags = 0};
        if (signo % 4 == 1) action.sa_handler = SIG_IGN;
        else if (signo % 4 == 2) {
            action.sa_sigaction = on_stack;
            action.sa_flags = SA_SIGINFO | SA_RESTART | (signo % 3 ? SA_NODEFER : 0);
            for (int blocked = 1; blocked < 64; blocked += signo) sigaddset(&action.sa_mask, blocked);
        } else action.sa_handler = SIG_DFL;
        if (signo == SIGTRAP) action.sa_handler = SIG_IGN;
        if (signo == SIGUSR2) action.sa_sigaction = on_stack, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        MUST(sigaction(signo, &action, NULL) == 0);
    }
    for (uintptr_t i = 0; i < THREADS; i++) thread(work, (void *)i);
    for (int i = 0; i < THREADS; i++) MUST(EVENTUALLY(roster[i].tid));
    /* Last: glibc takes signals of its own with the first thread. */
    for (int signo = 1; signo < 65; signo++) raw_action(signo, &before[signo]);
}

static void step(void) { doze(5); }

static void verify(int round) {
    for (int signo = 1; signo < 65; signo++) {
        struct kernel_action now = {0};
        raw_action(signo, &now);
        CHECK(!memcmp(&now, &before[signo], sizeof now), "signal %d: action is {%lx %lx %lx %lx}, was {%lx %lx %lx %lx}", signo,
              now.handler, now.flags, now.restorer, now.mask, before[signo].handler, before[signo].flags,
              before[signo].restorer, before[signo].mask);
    }
    for (int i = 0; i < THREADS; i++) atomic_store(&roster[i].asked, round);
    for (int i = 0; i < THREADS; i++) CHECK(EVENTUALLY(atomic_load(&roster[i].answered) == round), "thread %d does not answer", i);
}
