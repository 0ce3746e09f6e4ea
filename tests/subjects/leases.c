/* Leases: for reading on files of both hosts, whose end is told to this process by a signal with the number of the descriptor, to
 * another process, to nobody; for writing on the file that the first argument names, if there is one, and not "-". The second is locked.
 *
 * Each is broken by a child that opens the file: it does not wait, and gets EWOULDBLOCK. */
#include "subject.h"
#include <sys/file.h>

enum { OWN, OF_CHILD, OF_NOBODY, WRITING, LEASES };
static char path[LEASES][4200];
static int leased[LEASES], second, answers[2], count = WRITING, signo[LEASES];
static pid_t child;
static volatile sig_atomic_t told, told_fd;

static void hear(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)context;
    told++, told_fd = info->si_fd;
}

static short type(int index) { return index == WRITING ? F_WRLCK : F_RDLCK; }

static pid_t owner(int fd) {
    struct f_owner_ex found = {0};
    return fcntl(fd, F_GETOWN_EX, &found) == 0 && (found.type == F_OWNER_PID || found.pid == 0) ? found.pid : -1;
}

static pid_t wanted_owner(int index) { return index == OF_CHILD ? child : index == OF_NOBODY ? 0 : getpid(); }

/* With its end the lease has taken owner and signal away. */
static bool take(int index) {
    int fd = leased[index];
    bool had = fcntl(fd, F_SETSIG, signo[index]) == 0 && (index != OF_CHILD || fcntl(fd, F_SETOWN, child) == 0) &&
               fcntl(fd, F_SETLEASE, type(index)) == 0;
    return had && (index != OF_NOBODY || fcntl(fd, F_SETOWN, 0) == 0);
}

static void serve(void) {
    sigset_t io;
    sigemptyset(&io), sigaddset(&io, SIGIO);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (;;) {
        char what = 'i';
        if (sigwaitinfo(&io, NULL) == SIGIO && write(answers[1], &what, 1) != 1) _exit(1);
    }
}

static void setup(void) {
    for (int i = 0; i < WRITING; i++) {
        snprintf(path[i], sizeof path[i], "%s.lease%d", state_path, i);
        int fd = open(path[i], O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        MUST(fd >= 0);
        close(fd);
    }
    if (argument_count > 0 && strcmp(arguments[0], "-")) snprintf(path[count++], sizeof path[0], "%s", arguments[0]);
    signo[OWN] = signo[WRITING] = SIGRTMIN + 3, signo[OF_NOBODY] = SIGRTMIN + 4;
    struct sigaction act = {.sa_sigaction = hear, .sa_flags = SA_SIGINFO | SA_RESTART};
    MUST(sigaction(SIGRTMIN + 3, &act, NULL) == 0 && pipe(answers) == 0);
    sigset_t io;
    sigemptyset(&io), sigaddset(&io, SIGIO);
    sigprocmask(SIG_BLOCK, &io, NULL);
    child = fork();
    if (child == 0) serve();
    for (int i = 0; i < count; i++) {
        MUST((leased[i] = open(path[i], O_RDONLY)) >= 0);
        MUST(take(i));
    }
    if (argument_count > 1) MUST(flock(open(arguments[1], O_RDONLY), LOCK_EX) == 0);
    MUST((second = dup(leased[OWN])) > leased[OWN]);
}

static void step(void) { doze(5); }

static void break_it(int index) {
    pid_t stranger = fork();
    if (stranger == 0) {
        int fd = open(path[index], (index == WRITING ? O_RDONLY : O_WRONLY) | O_NONBLOCK);
        _exit(fd >= 0 ? 1 : errno == EWOULDBLOCK ? 0 : 2);
    }
    int status = -1;
    CHECK(waitpid(stranger, &status, 0) == stranger && status == 0, "lease %d: a stranger who opens the file ends with %x", index, status);
}

static void verify(int round) {
    (void)round;
    char byte;
    CHECK(told == 0, "a lease was broken on the way: fd %d", (int)told_fd);
    fcntl(answers[0], F_SETFL, O_NONBLOCK);
    CHECK(read(answers[0], &byte, 1) == -1 && errno == EAGAIN, "the child's lease was broken on the way");
    fcntl(answers[0], F_SETFL, 0);
    CHECK(fcntl(second, F_GETLEASE) == F_RDLCK, "the second descriptor has no lease");
    for (int i = 0; i < count; i++) {
        CHECK(fcntl(leased[i], F_GETLEASE) == type(i), "lease %d is %d", i, fcntl(leased[i], F_GETLEASE));
        CHECK(owner(leased[i]) == wanted_owner(i), "lease %d tells %d, not %d", i, owner(leased[i]), wanted_owner(i));
        CHECK(fcntl(leased[i], F_GETSIG) == signo[i], "lease %d tells by %d", i, fcntl(leased[i], F_GETSIG));
        told = told_fd = 0;
        break_it(i);
        CHECK(fcntl(leased[i], F_GETLEASE) == (i == WRITING ? F_RDLCK : F_UNLCK), "lease %d is not to be broken: %d", i, fcntl(leased[i], F_GETLEASE));
        if (i == OWN || i == WRITING) {
            CHECK(EVENTUALLY(told) && told_fd == leased[i], "lease %d: told %d times, fd %d", i, (int)told, (int)told_fd);
        } else {
            CHECK(i == OF_NOBODY || (read(answers[0], &byte, 1) == 1 && byte == 'i'), "the child was not told");
            CHECK(told == 0, "lease %d: we were told", i);
        }
        CHECK(fcntl(leased[i], F_SETLEASE, F_UNLCK) == 0 && take(i), "lease %d cannot be taken again", i);
        told = told_fd = 0;
    }
}
