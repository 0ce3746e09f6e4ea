/* Starts a program as a service manager would: a session of its own, an orphan of process 1, no descriptor inherited but
 * the three standard ones. (Whoever runs the tests may have left all kinds of them open.) */
#define _GNU_SOURCE
#include <stdio.h>
#include <unistd.h>

int main(int count, char **values) {
    if (count < 2) return 2;
    close_range(3, ~0u, 0);
    switch (fork()) {
    case -1:
        return perror("fork"), 1;
    case 0:
        setsid();
        execvp(values[1], values + 1);
        perror(values[1]);
        _exit(127);
    default:
        return 0;
    }
}
