/* Process 1 of a test host: names it, gives it empty /tmp, /run, /dev/shm and /var/lib of its own, then reaps orphans
 * until its standard input ends, which it does however the harness dies. The kernel then kills whatever is left inside.
 * Prints "ready" when the host can be entered. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static void on_child(int signo) { (void)signo; }

int main(int count, char **values) {
    static const char *const empty[] = {"/tmp", "/run", "/dev/shm", "/var/lib"};
    if (count != 2 || getpid() != 1) return 2;
    if (sethostname(values[1], strlen(values[1]))) return perror("sethostname"), 1;
    for (unsigned i = 0; i < sizeof empty / sizeof *empty; i++)
        if (mount("tmpfs", empty[i], "tmpfs", MS_NOSUID | MS_NODEV, i == 3 ? "mode=755" : "mode=1777")) return perror(empty[i]), 1;
    chmod("/run", 0755);
    if (mount("mqueue", "/dev/mqueue", "mqueue", 0, NULL) && errno != ENOENT && errno != ENODEV) return perror("/dev/mqueue"), 1;

    struct sigaction action = {.sa_handler = on_child};
    sigset_t blocked, open;
    sigaction(SIGCHLD, &action, NULL);
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGCHLD);
    sigprocmask(SIG_BLOCK, &blocked, &open);
    if (write(1, "ready\n", 6) != 6) return 1;
    for (;;) {
        while (waitpid(-1, NULL, WNOHANG) > 0) {}
        struct pollfd input = {0, POLLIN, 0};
        if (ppoll(&input, 1, NULL, &open) > 0) return 0;
    }
}
