/* A program that is never still: it makes a child and a thread again and again, each there for a moment only, so that whoever
 * looks at it finds others than a moment before. No child is lost, and each tells the code it was told to end with. */
#include "subject.h"

static unsigned turn;

static void *brief(void *argument) {
    (void)argument;
    doze(1);
    return argument;
}

static void once(void) {
    int code = (int)(turn % 100), status = -1;
    void *came_back = NULL;
    pthread_t one;
    pid_t child = fork();
    if (child == 0) {
        doze(2);
        _exit(code);
    }
    CHECK(pthread_create(&one, NULL, brief, &turn) == 0, "thread %u cannot be made", turn);
    pid_t ended;
    while ((ended = waitpid(-1, &status, 0)) < 0 && errno == EINTR) {}
    CHECK(child > 0 && ended == child, "child %d of turn %u: %d ended", child, turn, ended);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == code, "child of turn %u ended with %x", turn, status);
    CHECK(pthread_join(one, &came_back) == 0 && came_back == &turn, "thread %u is lost", turn);
    turn++;
}

static void setup(void) { once(); }

static void step(void) { once(); }

static void verify(int round) {
    (void)round;
    once();
    CHECK(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD, "there is a child that nobody made");
}
