/* Settings of the process: umask, name, personality, dumpable, oom_score_adj, core dump filter, subreaper, parent death
 * signal. */
#include "subject.h"
#include <sys/personality.h>

struct settings {
    mode_t mask;
    char name[16], oom[16], filter[16];
    int personality, dumpable, subreaper, death_signal;
};
static struct settings before;

static void read_into(char *out, const char *path) {
    size_t length;
    char *text = slurp(path, &length);
    snprintf(out, 16, "%s", text ? text : "?");
    free(text);
}

static void look(struct settings *out) {
    memset(out, 0, sizeof *out);
    out->mask = umask(0);
    umask(out->mask);
    prctl(PR_GET_NAME, out->name, 0, 0, 0);
    out->personality = personality(0xffffffff);
    out->dumpable = prctl(PR_GET_DUMPABLE, 0, 0, 0, 0);
    prctl(PR_GET_CHILD_SUBREAPER, &out->subreaper, 0, 0, 0);
    prctl(PR_GET_PDEATHSIG, &out->death_signal, 0, 0, 0);
    /* An undumpable process may not read its own files in /proc. */
    prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
    read_into(out->oom, "/proc/self/oom_score_adj");
    read_into(out->filter, "/proc/self/coredump_filter");
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
}

static void write_text(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    MUST(fd >= 0 && write(fd, text, strlen(text)) > 0);
    close(fd);
}

static void setup(void) {
    umask(0137);
    prctl(PR_SET_NAME, "settled", 0, 0, 0);
    MUST(personality(ADDR_NO_RANDOMIZE | STICKY_TIMEOUTS) != -1);
    write_text("/proc/self/oom_score_adj", "345");
    write_text("/proc/self/coredump_filter", "0x21");
    MUST(prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0);
    MUST(prctl(PR_SET_PDEATHSIG, SIGURG, 0, 0, 0) == 0);
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    look(&before);
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    struct settings now;
    look(&now);
    CHECK(now.mask == before.mask, "umask is %o, was %o", now.mask, before.mask);
    CHECK(!memcmp(now.name, before.name, 16), "name is %s", now.name);
    CHECK(!strcmp(now.oom, before.oom), "oom_score_adj is %s, was %s", now.oom, before.oom);
    CHECK(!strcmp(now.filter, before.filter), "coredump_filter is %s, was %s", now.filter, before.filter);
    CHECK(now.personality == before.personality, "personality is %x, was %x", now.personality, before.personality);
    CHECK(now.dumpable == before.dumpable, "dumpable is %d, was %d", now.dumpable, before.dumpable);
    CHECK(now.subreaper == before.subreaper, "subreaper is %d", now.subreaper);
    CHECK(now.death_signal == before.death_signal, "parent death signal is %d, was %d", now.death_signal, before.death_signal);
}
