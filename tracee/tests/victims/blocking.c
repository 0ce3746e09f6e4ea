/* One blocking system call in the middle of which the test stops and resumes this process. Usage: blocking NAME.
 * Prints "ready" before the call and "NAME result errno milliseconds" after it. What ends the call is its own timeout, or a
 * helper (a thread, or a process where locks ask for one) after the same time. */
#include "victim.h"
#include <arpa/inet.h>
#include <linux/aio_abi.h>
#include <linux/futex.h>
#include <linux/io_uring.h>
#include <mqueue.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>

enum { WAIT_MS = 2500 };
static const struct timespec WAIT = {WAIT_MS / 1000, WAIT_MS % 1000 * 1000000L};
static struct timespec timeout_() { return WAIT; }
#define TIMEOUT ({ static struct timespec t; t = timeout_(); &t; })

static int fd[2], other, queue, futex_word, priority_word;
static pid_t child;
static pthread_t main_thread;
static sigset_t usr1;
static uint64_t began;
static struct sockaddr_un name;

/* -- what the helper does when the time is up ------------------------------------------------------------------------ */
static void end_by_writing(void) { must(write(fd[1], "12345678", 8) == 8, "helper write"); }
static void end_by_reading(void) { static char buffer[1 << 20]; must(read(fd[1], buffer, sizeof buffer) > 0, "helper read"); }
static void end_by_eventfd(void) { uint64_t one = 7; must(write(fd[0], &one, 8) == 8, "helper eventfd"); }
static void end_by_connecting(void) {
	int s = socket(AF_UNIX, SOCK_STREAM, 0);
	must(connect(s, (void *)&name, sizeof name) == 0, "helper connect");
}
static void end_by_accepting(void) { must(accept(other, NULL, NULL) >= 0, "helper accept"); }
static void end_by_waking(void) { futex_word = 1; syscall(SYS_futex, &futex_word, FUTEX_WAKE, 1, NULL, NULL, 0); }
static void end_by_signal(void) { pthread_kill(main_thread, SIGUSR1); }
static void end_by_message(void) { struct { long type; char text[8]; } m = {1, "hi"}; must(msgsnd(queue, &m, 8, 0) == 0, "helper msgsnd"); }
static void end_by_receiving(void) { struct { long type; char text[64]; } m; must(msgrcv(queue, &m, 64, 0, MSG_NOERROR) >= 0, "helper msgrcv"); }
static void end_by_semaphore(void) { struct sembuf up = {0, 1, 0}; must(semop(queue, &up, 1) == 0, "helper semop"); }
static void end_by_unlock(void) { must(flock(other, LOCK_UN) == 0, "helper unlock"); }
static void end_by_ofd_unlock(void) { struct flock lock = {.l_type = F_UNLCK}; must(fcntl(other, F_OFD_SETLK, &lock) == 0, "helper unlock"); }
static void end_by_mqueue(void) { must(mq_send(queue, "hi", 2, 0) == 0, "helper mq_send"); }
static void end_by_opening(void) { char path[64]; sprintf(path, "fifo-%d", getpid()); must(open(path, O_WRONLY) >= 0, "helper open"); unlink(path); }

/* -- how things are made --------------------------------------------------------------------------------------------- */
static void make_pipe(void) { must(pipe(fd) == 0, "pipe"); }
static void make_full_pipe(void) {
	make_pipe();
	fcntl(fd[1], F_SETFL, O_NONBLOCK);
	static char zeros[4096];
	while (write(fd[1], zeros, sizeof zeros) > 0) ;
	fcntl(fd[1], F_SETFL, 0);
	int swap = fd[0]; fd[0] = fd[1]; fd[1] = swap;
}
static void make_pair(void) { must(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0, "socketpair"); }
static void make_full_pair(void) {
	make_pair();
	static char zeros[4096];
	while (send(fd[0], zeros, sizeof zeros, MSG_DONTWAIT) > 0) ;
}
/* Longer than the wait: it starts anew when the call is resumed, and is not what ends it. */
static void set_timeout(int option) { struct timeval t = {3 * WAIT_MS / 1000, 0}; must(setsockopt(fd[0], SOL_SOCKET, option, &t, sizeof t) == 0, "timeout"); }
static void make_listener(void) {
	fd[0] = socket(AF_UNIX, SOCK_STREAM, 0);
	name.sun_family = AF_UNIX;
	sprintf(name.sun_path + 1, "pageferry-%d", getpid());
	must(bind(fd[0], (void *)&name, sizeof name) == 0 && listen(fd[0], 0) == 0, "listen");
}
static void make_full_listener(void) {
	make_listener();
	other = fd[0];
	must(connect(socket(AF_UNIX, SOCK_STREAM, 0), (void *)&name, sizeof name) == 0, "fill backlog");
	fd[0] = socket(AF_UNIX, SOCK_STREAM, 0);
}
static void make_epoll(void) { fd[0] = epoll_create1(0); }
static void make_eventfd(void) { fd[0] = eventfd(0, 0); }
static void make_timerfd(void) { fd[0] = timerfd_create(CLOCK_MONOTONIC, 0); struct itimerspec t = {.it_value = WAIT}; timerfd_settime(fd[0], 0, &t, NULL); }
static void make_signalfd(void) { fd[0] = signalfd(-1, &usr1, 0); }
static void make_queue(void) { queue = msgget(IPC_PRIVATE, 0600); must(queue >= 0, "msgget"); }
static void make_full_queue(void) { make_queue(); struct { long type; char text[1024]; } m = {1, ""}; while (msgsnd(queue, &m, 1024, IPC_NOWAIT) == 0) ; }
static void drop_queue(void) { msgctl(queue, IPC_RMID, NULL); }
static void make_semaphore(void) { queue = semget(IPC_PRIVATE, 1, 0600); must(queue >= 0, "semget"); }
static void drop_semaphore(void) { semctl(queue, 0, IPC_RMID); }
static void make_mqueue(void) {
	char path[64]; sprintf(path, "/pageferry-%d", getpid());
	struct mq_attr a = {.mq_maxmsg = 2, .mq_msgsize = 64};
	queue = mq_open(path, O_CREAT | O_RDWR, 0600, &a);
	must(queue >= 0, "mq_open");
	mq_unlink(path);
}
static int reopened(int f) { char path[64]; sprintf(path, "/proc/self/fd/%d", f); int g = open(path, O_RDWR); must(g >= 0, "reopen"); return g; }
static void make_locked_file(void) { fd[0] = memfd_create("lock", 0); other = reopened(fd[0]); must(flock(other, LOCK_EX) == 0, "flock"); }
static void make_ofd_locked_file(void) { fd[0] = memfd_create("lock", 0); other = reopened(fd[0]); struct flock lock = {.l_type = F_WRLCK}; must(fcntl(other, F_OFD_SETLK, &lock) == 0, "lock"); }
static void make_locking_child(void) {
	fd[0] = memfd_create("lock", 0);
	int ready[2];
	must(pipe(ready) == 0, "pipe");
	child = fork();
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		struct flock lock = {.l_type = F_WRLCK};
		must(fcntl(fd[0], F_SETLK, &lock) == 0, "lock");
		must(write(ready[1], "x", 1) == 1, "write");
		nanosleep(&WAIT, NULL);
		_exit(0);
	}
	char c;
	must(read(ready[0], &c, 1) == 1, "child");
}
static void make_child(void) {
	child = fork();
	if (child == 0) { prctl(PR_SET_PDEATHSIG, SIGKILL); nanosleep(&WAIT, NULL); _exit(5); }
}
static void make_terminal(void) {
	fd[1] = posix_openpt(O_RDWR | O_NOCTTY);
	must(fd[1] >= 0 && grantpt(fd[1]) == 0 && unlockpt(fd[1]) == 0, "pty");
	fd[0] = open(ptsname(fd[1]), O_RDWR | O_NOCTTY);
	must(fd[0] >= 0, "pts");
	struct termios t; tcgetattr(fd[0], &t); cfmakeraw(&t); tcsetattr(fd[0], TCSANOW, &t);
}
static void make_fifo(void) { char path[64]; sprintf(path, "fifo-%d", getpid()); unlink(path); must(mkfifo(path, 0600) == 0, "mkfifo"); }
static aio_context_t aio;
static void make_aio(void) { must(syscall(SYS_io_setup, 4, &aio) == 0, "io_setup"); }
static void make_ring(void) { struct io_uring_params p = {0}; fd[0] = syscall(SYS_io_uring_setup, 4, &p); }
static void handle(int s) { (void)s; }
static void make_handler(void) { struct sigaction a = {.sa_handler = handle}; sigaction(SIGUSR1, &a, NULL); pthread_sigmask(SIG_UNBLOCK, &usr1, NULL); }
static void make_handler_blocked(void) { struct sigaction a = {.sa_handler = handle}; sigaction(SIGUSR1, &a, NULL); }
static void *hold_priority(void *unused) {
	(void)unused;
	syscall(SYS_futex, &priority_word, FUTEX_LOCK_PI, 0, NULL, NULL, 0);
	futex_word = 1;
	nanosleep(&WAIT, NULL);
	syscall(SYS_futex, &priority_word, FUTEX_UNLOCK_PI, 0, NULL, NULL, 0);
	pause();
	return NULL;
}
static void make_priority(void) { pthread_t t; pthread_create(&t, NULL, hold_priority, NULL); while (!*(volatile int *)&futex_word) sched_yield(); }

/* -- the calls ------------------------------------------------------------------------------------------------------- */
static char buffer[4096];
static struct timespec absolute(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); t.tv_sec += WAIT.tv_sec; t.tv_nsec += WAIT.tv_nsec; if (t.tv_nsec >= 1000000000) { t.tv_sec++; t.tv_nsec -= 1000000000; } return t; }
static struct pollfd *one(void) { static struct pollfd p; p = (struct pollfd){fd[0], POLLIN, 0}; return &p; }
static fd_set *set(void) { static fd_set s; FD_ZERO(&s); FD_SET(fd[0], &s); return &s; }
static struct epoll_event event;
static struct iovec vector = {buffer, sizeof buffer};
static struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1};
static struct mmsghdr messages[1] = {{.msg_hdr = {.msg_iov = &vector, .msg_iovlen = 1}}};
static struct { long type; char text[1024]; } note = {1, ""};

static long do_nanosleep(void) { return nanosleep(&WAIT, NULL); }
static long do_clock_nanosleep(void) { return clock_nanosleep(CLOCK_MONOTONIC, 0, &WAIT, NULL); }
static long do_clock_nanosleep_absolute(void) { struct timespec t = absolute(); return clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL); }
static long do_poll(void) { return poll(one(), 1, WAIT_MS); }
static long do_ppoll(void) { return ppoll(one(), 1, TIMEOUT, &usr1); }
static long do_select(void) { struct timeval t = {WAIT_MS / 1000, WAIT_MS % 1000 * 1000}; return select(fd[0] + 1, set(), NULL, NULL, &t); }
static long do_pselect(void) { return pselect(fd[0] + 1, set(), NULL, NULL, TIMEOUT, &usr1); }
static long do_epoll_wait(void) { return epoll_wait(fd[0], &event, 1, WAIT_MS); }
static long do_epoll_pwait(void) { return epoll_pwait(fd[0], &event, 1, WAIT_MS, &usr1); }
static long do_epoll_pwait2(void) { return syscall(SYS_epoll_pwait2, fd[0], &event, 1, TIMEOUT, NULL, 0); }
static long do_futex(void) { return syscall(SYS_futex, &futex_word, FUTEX_WAIT, 0, NULL, NULL, 0); }
static long do_futex_timeout(void) { return syscall(SYS_futex, &futex_word, FUTEX_WAIT, 0, TIMEOUT, NULL, 0); }
static long do_futex_absolute(void) { struct timespec t = absolute(); return syscall(SYS_futex, &futex_word, FUTEX_WAIT_BITSET, 0, &t, NULL, -1); }
static long do_futex_priority(void) { return syscall(SYS_futex, &priority_word, FUTEX_LOCK_PI, 0, NULL, NULL, 0); }
static long do_read(void) { return read(fd[0], buffer, 8); }
static long do_readv(void) { return readv(fd[0], &vector, 1); }
static long do_write(void) { return write(fd[0], buffer, 1024); }
static long do_recv(void) { return recv(fd[0], buffer, 8, 0); }
static long do_recvmsg(void) { return recvmsg(fd[0], &message, 0); }
static long do_recvmmsg(void) { return recvmmsg(fd[0], messages, 1, 0, NULL); }
static long do_send(void) { return send(fd[0], buffer, 64, 0); }
static long do_sendmsg(void) { vector.iov_len = 64; return sendmsg(fd[0], &message, 0); }
static long do_accept(void) { return accept(fd[0], NULL, NULL) < 0 ? -1 : 0; }
static long do_connect(void) { return connect(fd[0], (void *)&name, sizeof name); }
static long do_wait4(void) { int status; long r = wait4(child, &status, 0, NULL); return r == child ? WEXITSTATUS(status) : -1; }
static long do_waitid(void) { siginfo_t i; return waitid(P_PID, child, &i, WEXITED) == 0 ? i.si_status : -1; }
static long do_flock(void) { return flock(fd[0], LOCK_EX); }
static long do_setlkw(void) { struct flock l = {.l_type = F_WRLCK}; return fcntl(fd[0], F_SETLKW, &l); }
static long do_ofd_setlkw(void) { struct flock l = {.l_type = F_WRLCK}; return fcntl(fd[0], F_OFD_SETLKW, &l); }
static long do_msgrcv(void) { return msgrcv(queue, &note, 64, 0, 0); }
static long do_msgsnd(void) { return msgsnd(queue, &note, 1024, 0); }
static long do_semop(void) { struct sembuf down = {0, -1, 0}; return semop(queue, &down, 1); }
static long do_semtimedop(void) { struct sembuf down = {0, -1, 0}; return semtimedop(queue, &down, 1, TIMEOUT); }
static long do_mq_receive(void) { return mq_receive(queue, buffer, 64, NULL); }
static long do_sigtimedwait(void) { return sigtimedwait(&usr1, NULL, TIMEOUT); }
static long do_sigwaitinfo(void) { return sigwaitinfo(&usr1, NULL); }
static long do_pause(void) { return pause(); }
static long do_sigsuspend(void) { sigset_t none; sigemptyset(&none); return sigsuspend(&none); }
static long do_open_fifo(void) { char path[64]; sprintf(path, "fifo-%d", getpid()); return open(path, O_RDONLY) < 0 ? -1 : 0; }
static long do_splice(void) { int to[2]; must(pipe(to) == 0, "pipe"); return splice(fd[0], NULL, to[1], NULL, 8, 0); }
static long do_tee(void) { int to[2]; must(pipe(to) == 0, "pipe"); return tee(fd[0], to[1], 8, 0); }
static long do_io_getevents(void) { struct io_event e; return syscall(SYS_io_getevents, aio, 1, 1, &e, TIMEOUT); }
static long do_ring_enter(void) {
	/* A wait without end; the helper's signal ends it. */
	return syscall(SYS_io_uring_enter, fd[0], 0, 1, IORING_ENTER_GETEVENTS, NULL, 0);
}
static void receive_timeout(void) { make_pair(); set_timeout(SO_RCVTIMEO); }
static void accept_timeout(void) { make_listener(); set_timeout(SO_RCVTIMEO); }
static void send_timeout(void) { make_full_pair(); set_timeout(SO_SNDTIMEO); }

static const struct { const char *name; void (*make)(void); long (*call)(void); void (*end)(void); void (*drop)(void); } CALLS[] = {
	{"nanosleep", NULL, do_nanosleep, NULL, NULL},
	{"clock_nanosleep", NULL, do_clock_nanosleep, NULL, NULL},
	{"clock_nanosleep-absolute", NULL, do_clock_nanosleep_absolute, NULL, NULL},
	{"poll", make_pipe, do_poll, NULL, NULL},
	{"ppoll", make_pipe, do_ppoll, NULL, NULL},
	{"select", make_pipe, do_select, NULL, NULL},
	{"pselect6", make_pipe, do_pselect, NULL, NULL},
	{"epoll_wait", make_epoll, do_epoll_wait, NULL, NULL},
	{"epoll_pwait", make_epoll, do_epoll_pwait, NULL, NULL},
	{"epoll_pwait2", make_epoll, do_epoll_pwait2, NULL, NULL},
	{"futex", NULL, do_futex, end_by_waking, NULL},
	{"futex-timeout", NULL, do_futex_timeout, NULL, NULL},
	{"futex-absolute", NULL, do_futex_absolute, NULL, NULL},
	{"futex-priority", make_priority, do_futex_priority, NULL, NULL},
	{"read-pipe", make_pipe, do_read, end_by_writing, NULL},
	{"readv-pipe", make_pipe, do_readv, end_by_writing, NULL},
	{"write-pipe", make_full_pipe, do_write, end_by_reading, NULL},
	{"read-eventfd", make_eventfd, do_read, end_by_eventfd, NULL},
	{"read-timerfd", make_timerfd, do_read, NULL, NULL},
	{"read-signalfd", make_signalfd, do_readv, end_by_signal, NULL},
	{"read-terminal", make_terminal, do_read, end_by_writing, NULL},
	{"recv", make_pair, do_recv, end_by_writing, NULL},
	{"recv-timeout", receive_timeout, do_recv, end_by_writing, NULL},
	{"recvmsg", make_pair, do_recvmsg, end_by_writing, NULL},
	{"recvmmsg", make_pair, do_recvmmsg, end_by_writing, NULL},
	{"send", make_full_pair, do_send, end_by_reading, NULL},
	{"send-timeout", send_timeout, do_send, end_by_reading, NULL},
	{"sendmsg", make_full_pair, do_sendmsg, end_by_reading, NULL},
	{"accept", make_listener, do_accept, end_by_connecting, NULL},
	{"accept-timeout", accept_timeout, do_accept, end_by_connecting, NULL},
	{"connect", make_full_listener, do_connect, end_by_accepting, NULL},
	{"wait4", make_child, do_wait4, NULL, NULL},
	{"waitid", make_child, do_waitid, NULL, NULL},
	{"flock", make_locked_file, do_flock, end_by_unlock, NULL},
	{"fcntl-setlkw", make_locking_child, do_setlkw, NULL, NULL},
	{"fcntl-ofd-setlkw", make_ofd_locked_file, do_ofd_setlkw, end_by_ofd_unlock, NULL},
	{"msgrcv", make_queue, do_msgrcv, end_by_message, drop_queue},
	{"msgsnd", make_full_queue, do_msgsnd, end_by_receiving, drop_queue},
	{"semop", make_semaphore, do_semop, end_by_semaphore, drop_semaphore},
	{"semtimedop", make_semaphore, do_semtimedop, NULL, drop_semaphore},
	{"mq_receive", make_mqueue, do_mq_receive, end_by_mqueue, NULL},
	{"rt_sigtimedwait", NULL, do_sigtimedwait, NULL, NULL},
	{"sigwaitinfo", NULL, do_sigwaitinfo, end_by_signal, NULL},
	{"pause", make_handler, do_pause, end_by_signal, NULL},
	{"rt_sigsuspend", make_handler_blocked, do_sigsuspend, end_by_signal, NULL},
	{"open-fifo", make_fifo, do_open_fifo, end_by_opening, NULL},
	{"splice", make_pipe, do_splice, end_by_writing, NULL},
	{"tee", make_pipe, do_tee, end_by_writing, NULL},
	{"io_getevents", make_aio, do_io_getevents, NULL, NULL},
	{"io_uring_enter", make_ring, do_ring_enter, end_by_signal, NULL},
};

static void *help(void *end) {
	/* From when the call began, as a timeout of its own would count. */
	struct timespec t = {began / 1000000 + WAIT_MS / 1000, (began % 1000000 + WAIT_MS % 1000 * 1000) * 1000};
	if (t.tv_nsec >= 1000000000) { t.tv_sec++; t.tv_nsec -= 1000000000; }
	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL)) ;
	((void (*)(void))end)();
	pause();
	return NULL;
}

int main(int count, char **arguments) {
	become_ordinary();
	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &usr1, NULL);
	main_thread = pthread_self();
	if (count < 2) {
		for (size_t i = 0; i < sizeof CALLS / sizeof *CALLS; i++)
			puts(CALLS[i].name);
		return 0;
	}
	for (size_t i = 0; i < sizeof CALLS / sizeof *CALLS; i++) {
		if (strcmp(CALLS[i].name, arguments[1]))
			continue;
		if (!strcmp(CALLS[i].name, "io_uring_enter"))
			make_handler();
		if (CALLS[i].make)
			CALLS[i].make();
		began = microseconds();
		if (CALLS[i].end) {
			pthread_t helper;
			/* The helper blocks what the call waits for. */
			sigset_t all, before;
			sigfillset(&all);
			pthread_sigmask(SIG_SETMASK, &all, &before);
			must(pthread_create(&helper, NULL, help, CALLS[i].end) == 0, "helper");
			pthread_sigmask(SIG_SETMASK, &before, NULL);
		}
		puts("ready");
		fflush(stdout);
		began = microseconds();
		errno = 0;
		long result = CALLS[i].call();
		int error = result < 0 ? errno : 0;
		printf("%s %ld %d %ld\n", arguments[1], result, error, (long)(microseconds() - began) / 1000);
		fflush(stdout);
		if (CALLS[i].drop)
			CALLS[i].drop();
		_exit(0);
	}
	return 98;
}
