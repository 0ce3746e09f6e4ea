/* Stands in a restartable sequence until the test says go, and tells whether it was aborted (1) or came through (2). */
#include "victim.h"
#include <sys/rseq.h>

static struct page *page;

int main(void) {
	become_ordinary();
	page = shared_page();
	struct rseq *rseq = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
	must(__rseq_size > 0, "rseq");
	page->threads = 1;
	uint64_t verdict;
	asm volatile(
		".pushsection __rseq_cs, \"aw\"\n .balign 32\n"
		"3: .long 0, 0\n .quad 1f, 2f - 1f, 4f\n .popsection\n"
		"5: lea 3b(%%rip), %%rax\n"
		"mov %%rax, %[place]\n"
		"1: cmpq $0, %[go]\n je 1b\n"
		"2: mov $2, %[verdict]\n jmp 6f\n"
		/* the signature, as the displacement of an undefined instruction */
		".byte 0x0f, 0xb9, 0x3d\n .long 0x53053053\n"
		"4: incq %[turns]\n cmpq $0, %[go]\n je 5b\n mov $1, %[verdict]\n"
		"6:\n"
		: [verdict] "=&r"(verdict), [place] "=m"(rseq->rseq_cs), [turns] "+m"(page->turns[0])
		: [go] "m"(page->go)
		: "rax", "memory", "cc");
	page->verdict = verdict;
	pause();
}
