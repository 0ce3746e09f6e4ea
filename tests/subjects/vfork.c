/* A thread stands in vfork(2), where nothing but its child's end or a SIGKILL reaches it, until FILE.release exists. The
 * child is not ours: it is its grandparent's (CLONE_PARENT), and has memory of its own. Says "HELD tid" before READY. */
#include "subject.h"
#include <sched.h>

static char release_path[4096];
static _Atomic pid_t held;
static _Atomic int over;

static void *stand(void *unused) {
    (void)unused;
    atomic_store(&held, own_tid());
    long child = syscall(SYS_clone, CLONE_VFORK | CLONE_PARENT | SIGCHLD, 0, 0, 0, 0);
    if (child == 0) {
        while (access(release_path, F_OK)) doze(2);
        _exit(0);
    }
    CHECK(child > 0, "clone fails");
    atomic_store(&over, 1);
    for (;;) pause();
    return NULL;
}

static char state_of(pid_t tid) {
    char path[64];
    snprintf(path, sizeof path, "/proc/self/task/%d/stat", tid);
    char *text = slurp(path, NULL), *end = text ? strrchr(text, ')') : NULL;
    char state = end ? end[2] : '?';
    free(text);
    return state;
}

static void setup(void) {
    snprintf(release_path, sizeof release_path, "%s.release", state_path);
    unlink(release_path);
    thread(stand, NULL);
    MUST(EVENTUALLY(atomic_load(&held) && state_of(atomic_load(&held)) == 'D'));
    say("HELD %d", atomic_load(&held));
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    if (access(release_path, F_OK) == 0) CHECK(EVENTUALLY(atomic_load(&over)), "the thread has not returned from vfork");
    else CHECK(state_of(atomic_load(&held)) == 'D', "the thread has left vfork: %c", state_of(atomic_load(&held)));
}
