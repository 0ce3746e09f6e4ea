/* What all victims share: they become an ordinary user without privileges, tell the test what they see through a shared page,
 * and end when the test does. Nothing here knows that it will be traced. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static inline void must(int holds, const char *what) {
	if (!holds) {
		fprintf(stderr, "victim: %s: %s\n", what, strerror(errno));
		_exit(99);
	}
}

/* Docker's default profile in effect: what it does not list answers EPERM. */
static inline void filter_calls(void) {
	static const int denied[] = {
		SYS_acct, SYS_add_key, SYS_bpf, SYS_clock_adjtime, SYS_clock_settime, SYS_delete_module, SYS_finit_module,
		SYS_fsconfig, SYS_fsmount, SYS_fsopen, SYS_fspick, SYS_get_mempolicy, SYS_init_module, SYS_io_uring_enter,
		SYS_io_uring_register, SYS_io_uring_setup, SYS_ioperm, SYS_iopl, SYS_kcmp, SYS_kexec_file_load, SYS_kexec_load,
		SYS_keyctl, SYS_lookup_dcookie, SYS_mbind, SYS_mount, SYS_mount_setattr, SYS_move_mount, SYS_move_pages,
		SYS_nfsservctl, SYS_open_by_handle_at, SYS_open_tree, SYS_perf_event_open, SYS_pivot_root, SYS_process_madvise,
		SYS_process_vm_readv, SYS_process_vm_writev, SYS_ptrace, SYS_quotactl, SYS_quotactl_fd, SYS_reboot,
		SYS_request_key, SYS_set_mempolicy, SYS_setns, SYS_settimeofday, SYS_swapoff, SYS_swapon, SYS_sysfs,
		SYS__sysctl, SYS_umount2, SYS_unshare, SYS_uselib, SYS_userfaultfd, SYS_ustat, SYS_vhangup,
	};
	enum { COUNT = sizeof denied / sizeof *denied };
	struct sock_filter program[COUNT + 5];
	int at = 0;
	program[at++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
	for (int i = 0; i < COUNT; i++)
		program[at++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, denied[i], COUNT - i + 1, 0);
	program[at++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JGT | BPF_K, 449, 1, 0);
	program[at++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	program[at++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM);
	struct sock_fprog filter = {.len = at, .filter = program};
	must(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0, "seccomp");
}

/* Last words of the preparation; every victim calls it first. */
static inline void become_ordinary(void) {
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (geteuid() == 0) {
		must(setgroups(0, NULL) == 0, "setgroups");
		must(setresgid(65534, 65534, 65534) == 0, "setresgid");
		must(setresuid(65534, 65534, 65534) == 0, "setresuid");
	}
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "no_new_privs");
	if (getenv("VICTIM_FILTERED"))
		filter_calls();
}

/* The page the test sees. */
struct page {
	volatile uint64_t failure;     /* line that found something wrong */
	volatile uint64_t go;          /* the test's word to the victim */
	volatile uint64_t verdict;     /* the victim's to the test */
	volatile uint64_t threads;     /* that have started */
	volatile uint64_t turns[64];   /* of each thread */
};

static inline struct page *shared_page(void) {
	/* The test gives it as standard input. */
	struct page *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, 0, 0);
	must(page != MAP_FAILED, "shared page");
	return page;
}

static inline uint64_t microseconds(void) {
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000ull + now.tv_nsec / 1000;
}
