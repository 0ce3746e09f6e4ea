/* Threads that keep checking themselves: registers, vector registers, memory, signal mask, and that no call of theirs is ever
 * interrupted. Usage: checker THREADS. Thread n counts its turns in the shared page. */
#include "victim.h"
#include <poll.h>
#include <linux/futex.h>
#include <sys/epoll.h>
#include <immintrin.h>

static struct page *page;
/* Whether a result is what it should be. When the test has said `go`, a call may answer EINTR: some do whenever the process was
 * stopped and continued by signals (signal(7)), or when it goes on after its tracer died without a word. */
static int is(long result, long wanted) { return result == wanted || (result == -EINTR && page->go); }
#define CHECK(holds) do { if (!(holds)) { page->failure = __LINE__; _exit(1); } } while (0)

/* Fills the registers from `seed`, works a while without touching them, and compares. 0 = all as they were. */
__attribute__((target("avx2"), noinline)) static int registers_hold(uint64_t seed, uint64_t rounds) {
	uint64_t vectors[16][4], after[16][4], bad;
	for (int i = 0; i < 16; i++)
		for (int j = 0; j < 4; j++)
			vectors[i][j] = seed * 0x9e3779b97f4a7c15ull + i * 1000003 + j * 7;
	asm volatile(
		"mov %[rounds], %%rcx\n mov %[seed], %%rax\n"
		"push %%rbp\n"
		"mov %%rax, %%r8\n not %%r8\n lea 1(%%rax), %%r9\n lea 2(%%rax), %%r10\n lea 3(%%rax), %%r11\n"
		"lea 4(%%rax), %%r12\n lea 5(%%rax), %%r13\n lea 6(%%rax), %%r14\n lea 7(%%rax), %%r15\n"
		"lea 8(%%rax), %%rbp\n lea 9(%%rax), %%rdx\n"
#define LOAD(n) "vmovdqu " #n "*32(%%rsi), %%ymm" #n "\n"
		LOAD(0) LOAD(1) LOAD(2) LOAD(3) LOAD(4) LOAD(5) LOAD(6) LOAD(7)
		LOAD(8) LOAD(9) LOAD(10) LOAD(11) LOAD(12) LOAD(13) LOAD(14) LOAD(15)
		"1: pause\n dec %%rcx\n jnz 1b\n"
		"xor %%ebx, %%ebx\n"
		"lea 9(%%rax), %%rcx\n cmp %%rcx, %%rdx\n setne %%bl\n"
#define SAME(reg, n) "lea " #n "(%%rax), %%rcx\n cmp %%rcx, %%" #reg "\n setne %%cl\n or %%cl, %%bl\n"
		SAME(r9, 1) SAME(r10, 2) SAME(r11, 3) SAME(r12, 4) SAME(r13, 5) SAME(r14, 6) SAME(r15, 7) SAME(rbp, 8)
		"not %%r8\n cmp %%r8, %%rax\n setne %%cl\n or %%cl, %%bl\n"
#define STORE(n) "vmovdqu %%ymm" #n ", " #n "*32(%%rdi)\n"
		STORE(0) STORE(1) STORE(2) STORE(3) STORE(4) STORE(5) STORE(6) STORE(7)
		STORE(8) STORE(9) STORE(10) STORE(11) STORE(12) STORE(13) STORE(14) STORE(15)
		"pop %%rbp\n"
		"movzx %%bl, %%ebx\n"
		: "=&b"(bad)
		: [seed] "m"(seed), [rounds] "m"(rounds), "S"(vectors), "D"(after)
		: "rax", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc",
		  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",
		  "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
	return bad || memcmp(vectors, after, sizeof vectors);
}

/* Registers must also survive a system call; only rax, rcx and r11 are the kernel's. The register that holds a timeout may
 * come back with what was left of it: rdx and r10 are not compared. */
__attribute__((noinline)) static long call_holds(long number, long a, long b, long c, long d) {
	register long r10 asm("r10") = d;
	register long r8 asm("r8") = 0x5a5a, r9 asm("r9") = 0xa5a5;
	register long r12 asm("r12") = a ^ 12, r13 asm("r13") = a ^ 13, r14 asm("r14") = a ^ 14, r15 asm("r15") = a ^ 15;
	long result, di = a, si = b, dx = c;
	asm volatile("syscall" : "=a"(result), "+D"(di), "+S"(si), "+d"(dx), "+r"(r10), "+r"(r8), "+r"(r9), "+r"(r12),
		"+r"(r13), "+r"(r14), "+r"(r15) : "0"(number) : "rcx", "r11", "memory");
	CHECK(di == a && si == b && r8 == 0x5a5a && r9 == 0xa5a5);
	CHECK(r12 == (a ^ 12) && r13 == (a ^ 13) && r14 == (a ^ 14) && r15 == (a ^ 15));
	return result;
}

enum { WORDS = 8192 };

static void *work(void *argument) {
	long number = (long)argument;
	uint64_t *memory = malloc(WORDS * 8), seed = number + 1;
	for (int i = 0; i < WORDS; i++)
		memory[i] = seed * i;
	sigset_t wanted, now;
	sigemptyset(&wanted);
	if (number % 2)
		sigaddset(&wanted, SIGTRAP);
	if (number % 3)
		sigaddset(&wanted, SIGUSR1);
	pthread_sigmask(SIG_SETMASK, &wanted, NULL);
	sigset_t signals;
	sigemptyset(&signals);
	sigaddset(&signals, SIGUSR2);
	pthread_sigmask(SIG_BLOCK, &signals, NULL);
	sigaddset(&wanted, SIGUSR2);
	int epoll = epoll_create1(0);
	uint32_t futex = 0;
	__atomic_add_fetch(&page->threads, 1, __ATOMIC_SEQ_CST);
	for (uint64_t turn = 0;; turn++) {
		CHECK(!registers_hold(seed + turn, 2000));
		for (int i = turn % 64; i < WORDS; i += 64)
			CHECK(memory[i] == seed * i);
		struct timespec one = {0, 1000000};
		struct epoll_event event;
		switch ((turn + number) % 4) {
		case 0: CHECK(is(call_holds(SYS_epoll_wait, epoll, (long)&event, 1, 1), 0)); break;
		case 1: CHECK(is(call_holds(SYS_futex, (long)&futex, FUTEX_WAIT_BITSET_PRIVATE, 1, 0), -EAGAIN)); break;
		case 2: CHECK(is(call_holds(SYS_rt_sigtimedwait, (long)&signals, 0, (long)&one, 8), -EAGAIN)); break;
		case 3: CHECK(is(call_holds(SYS_nanosleep, (long)&one, 0, 0, 0), 0)); break;
		}
		pthread_sigmask(SIG_SETMASK, NULL, &now);
		for (int s = 1; s < 32; s++)
			CHECK(sigismember(&now, s) == sigismember(&wanted, s));
		page->turns[number]++;
	}
	return NULL;
}

int main(int count, char **arguments) {
	become_ordinary();
	page = shared_page();
	long threads = count > 1 ? atol(arguments[1]) : 1;
	signal(SIGTRAP, SIG_IGN);
	stack_t alternate = {.ss_sp = malloc(65536), .ss_size = 65536};
	sigaltstack(&alternate, NULL);
	for (long i = 1; i < threads; i++) {
		pthread_t thread;
		must(pthread_create(&thread, NULL, work, (void *)i) == 0, "pthread_create");
	}
	work((void *)0);
}
