/* Two processes in one memory: the second is made by clone(2) with CLONE_VM, and its stack pointer stands at the very bottom of its
 * stack, below which nothing may be touched. Each counts its turns in the shared page; the second needs no stack for that. */
#include "victim.h"
#include <sched.h>

enum { STACK = 1 << 16, PAGE = 4096, PAUSE = 200 * 1000 };

static struct page *page;
static char *bottom;
static const struct timespec pause_of_guest = {.tv_nsec = PAUSE};

static int guest(void *nothing) {
	(void)nothing;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	__atomic_add_fetch((uint64_t *)&page->threads, 1, __ATOMIC_SEQ_CST);
	register const struct timespec *pause asm("r12") = &pause_of_guest;
	register volatile uint64_t *turns asm("r13") = &page->turns[1];
	asm volatile("mov %[bottom], %%rsp\n"
		     "1: lock incq (%%r13)\n"
		     "mov %[nanosleep], %%eax\n"
		     "mov %%r12, %%rdi\n"
		     "xor %%esi, %%esi\n"
		     "syscall\n"
		     "jmp 1b\n"
		     :
		     : [bottom] "r"(bottom), [nanosleep] "i"(SYS_nanosleep), "r"(pause), "r"(turns)
		     : "rax", "rcx", "rdi", "rsi", "r11", "memory");
	__builtin_unreachable();
}

int main(void) {
	become_ordinary();
	page = shared_page();
	char *guard = mmap(NULL, PAGE + STACK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	must(guard != MAP_FAILED, "a stack");
	bottom = guard + PAGE;
	must(mprotect(bottom, STACK, PROT_READ | PROT_WRITE) == 0, "a stack");
	must(clone(guest, bottom + STACK, CLONE_VM | SIGCHLD, NULL) > 0, "clone");
	__atomic_add_fetch((uint64_t *)&page->threads, 1, __ATOMIC_SEQ_CST);
	for (;;) {
		usleep(200);
		page->turns[0]++;
	}
}
