/* What a program finds around itself: working directory, executable, arguments, environment, auxiliary vector, heap end,
 * host-wide identity, and a heap that goes on growing. */
#include "subject.h"
#include <sys/auxv.h>

extern char **environ;

static struct {
    char cwd[4096], exe[4096];
    char *command_line, *environment, *auxv;
    size_t command_length, environment_length, auxv_length;
    void *brk;
    pid_t pid, pgid, sid;
} before;
static uint64_t *grown[64];
static int grown_count;

static void grow(void) {
    char *at = sbrk(3 * PAGE);
    CHECK(at != (void *)-1, "the heap does not grow");
    if (at == (void *)-1 || grown_count == 64) return;
    at = (char *)(((uintptr_t)at + 15) & ~15ul);
    fill(at, 2 * PAGE, 9);
    grown[grown_count++] = (uint64_t *)at;
    before.brk = sbrk(0);
}

static void setup(void) {
    char text[32];
    MUST(chdir("/usr/share") == 0);
    for (int i = 0; i < 40; i++) {
        snprintf(text, sizeof text, "PAGEFERRY_SAMPLE_%d", i);
        setenv(text, "value with spaces", 1);
    }
    MUST(getcwd(before.cwd, sizeof before.cwd) && readlink("/proc/self/exe", before.exe, sizeof before.exe) > 0);
    before.command_line = slurp("/proc/self/cmdline", &before.command_length);
    before.environment = slurp("/proc/self/environ", &before.environment_length);
    before.auxv = slurp("/proc/self/auxv", &before.auxv_length);
    MUST(before.command_line && before.environment && before.auxv && before.auxv_length > 100);
    before.pid = getpid();
    before.pgid = getpgrp();
    before.sid = getsid(0);
    before.brk = sbrk(0);
    grow();
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    CHECK(sbrk(0) == before.brk, "the heap ends at %p, not %p", sbrk(0), before.brk);
    char text[4096] = "";
    CHECK(getcwd(text, sizeof text) && !strcmp(text, before.cwd), "working directory is %s", text);
    memset(text, 0, sizeof text);
    CHECK(readlink("/proc/self/exe", text, sizeof text - 1) > 0 && !strcmp(text, before.exe), "executable is %s, was %s", text, before.exe);
    size_t length;
    char *now = slurp("/proc/self/cmdline", &length);
    CHECK(now && length == before.command_length && !memcmp(now, before.command_line, length), "command line changed");
    free(now);
    now = slurp("/proc/self/environ", &length);
    CHECK(now && length == before.environment_length && !memcmp(now, before.environment, length), "environment changed");
    free(now);
    now = slurp("/proc/self/auxv", &length);
    CHECK(now && length == before.auxv_length && !memcmp(now, before.auxv, length), "auxiliary vector changed");
    free(now);
    CHECK(getauxval(AT_PAGESZ) == PAGE && getauxval(AT_SYSINFO_EHDR), "the program's own copy of the auxiliary vector changed");
    CHECK(getenv("PAGEFERRY_SAMPLE_39") && !strcmp(getenv("PAGEFERRY_SAMPLE_39"), "value with spaces"), "environment lost");
    CHECK(getpid() == before.pid && getpgrp() == before.pgid && getsid(0) == before.sid, "pid %d, group %d, session %d; were %d, %d, %d",
          getpid(), getpgrp(), getsid(0), before.pid, before.pgid, before.sid);
    for (int i = 0; i < grown_count; i++) CHECK(!differs(grown[i], 2 * PAGE, 9), "the heap changed");
    grow();
}
