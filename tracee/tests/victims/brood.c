/* A tree of processes, each at work: process n is made by process (n-1)/2 and counts its turns in the shared page.
 * Usage: brood PROCESSES [forking|cloning]. With either every process makes a child in each turn, which ends at once: one of fork(2),
 * or by turns one that tells its end with no signal, and one in its parent's memory that tells it with another than SIGCHLD. */
#include "victim.h"
#include <sched.h>
#include <sys/wait.h>

/* Our errno is its too. */
static int end(void *nothing) {
	(void)nothing;
	syscall(SYS_exit_group, 7);
	return 7;
}

static pid_t bear(int cloning, uint64_t turn) {
	static char stack[1 << 14] __attribute__((aligned(16)));
	if (cloning && turn % 2)
		return clone(end, stack + sizeof stack, CLONE_VM | SIGUSR1, NULL);
	pid_t pid = cloning ? (pid_t)syscall(SYS_clone, 0, 0, 0, 0, 0) : fork();
	if (pid == 0)
		_exit(7);
	return pid;
}

int main(int argc, char **argv) {
	int count = atoi(argv[1]), forking = argc > 2, own = 0;
	int cloning = forking && !strcmp(argv[2], "cloning");
	become_ordinary();
	signal(SIGUSR1, SIG_IGN);
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
			pid_t pid = bear(cloning, page->turns[own]);
			int status;
			while (waitpid(pid, &status, __WALL) < 0)
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
