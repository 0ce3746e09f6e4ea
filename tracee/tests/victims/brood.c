/* A tree of processes, each at work: process n is made by process (n-1)/2 and counts its turns in the shared page.
 * Usage: brood PROCESSES [forking]. With `forking` every process makes a child in each turn, which ends at once. */
#include "victim.h"
#include <sys/wait.h>

int main(int argc, char **argv) {
	int count = atoi(argv[1]), forking = argc > 2, own = 0;
	become_ordinary();
	struct page *page = shared_page();
	pid_t parent = getpid();
	for (int child = 1; child < count; child++) {
		if ((child - 1) / 2 != own)
			continue;
		pid_t pid = fork();
		if (pid < 0)
			return 1;
		if (pid == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			if (getppid() != parent)
				return 1;
			parent = getpid();
			own = child;
			child = own;
		}
	}
	__atomic_add_fetch((uint64_t *)&page->threads, 1, __ATOMIC_SEQ_CST);
	for (;;) {
		if (forking) {
			pid_t pid = fork();
			if (pid == 0)
				_exit(7);
			int status;
			while (waitpid(pid, &status, 0) < 0)
				if (errno != EINTR)
					page->failure = __LINE__;
			if (!WIFEXITED(status) || WEXITSTATUS(status) != 7)
				page->failure = __LINE__;
		} else {
			usleep(200);
		}
		page->turns[own]++;
	}
}
