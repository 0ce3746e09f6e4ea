/* Starts a program as a service manager would: a session of its own, an orphan of process 1, no descriptor inherited but
 * the three standard ones. (Whoever runs the tests may have left all kinds of them open.) With --no-session first, it stays
 * in the session of whoever runs the tests, as a program does that was sent into a container from outside. */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <unistd.h>

int main(int count, char **values) {
    int stays = count > 1 && strcmp(values[1], "--no-session") == 0;
    if (count < 2 + stays) return 2;
    values += stays;
    close_range(3, ~0u, 0);
    switch (fork()) {
    case -1:
        return perror("fork"), 1;
    case 0:
        if (!stays) setsid();
        execvp(values[1], values + 1);
        perror(values[1]);
        _exit(127);
    default:
        return 0;
    }
}
