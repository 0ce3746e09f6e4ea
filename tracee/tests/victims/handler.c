/* Sleeps in a handler for SIGUSR2 and does next to nothing else. The word "go" says how many milliseconds it sleeps. */
#include "victim.h"

static struct page *page;

static void nap(int signal) {
	(void)signal;
	page->turns[1]++;
	uint64_t end = microseconds() + page->go * 1000;
	while (microseconds() < end)
		usleep(1000);
	page->turns[2]++;
}

int main(void) {
	become_ordinary();
	page = shared_page();
	signal(SIGUSR2, nap);
	page->threads = 1;
	for (;;) {
		page->turns[0]++;
		usleep(1000);
	}
}
