/* Credentials: of each thread its user and group ids, groups, capability sets, securebits and no_new_privs, which the
 * kernel keeps per thread. Started as root. */
#include "subject.h"
#include <grp.h>
#include <linux/capability.h>
#include <linux/securebits.h>

enum { THREADS = 4 };
struct identity {
    unsigned ids[8], group_count, groups[16], securebits;
    int no_new_privs;
    struct __user_cap_data_struct capability[2];
    uint64_t bounding, ambient;
};
static struct identity before[THREADS];
static _Atomic int ready[THREADS], asked, answered[THREADS];

static void look(struct identity *out) {
    memset(out, 0, sizeof *out);
    syscall(SYS_getresuid, &out->ids[0], &out->ids[1], &out->ids[2]);
    syscall(SYS_getresgid, &out->ids[3], &out->ids[4], &out->ids[5]);
    out->ids[6] = (unsigned)syscall(SYS_setfsuid, -1);
    out->ids[7] = (unsigned)syscall(SYS_setfsgid, -1);
    long count = syscall(SYS_getgroups, 16, out->groups);
    out->group_count = (unsigned)count;
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    syscall(SYS_capget, &header, out->capability);
    out->securebits = (unsigned)prctl(PR_GET_SECUREBITS);
    out->no_new_privs = prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0);
    for (unsigned long c = 0; c < 64; c++) {
        if (prctl(PR_CAPBSET_READ, c, 0, 0, 0) == 1) out->bounding |= 1ull << c;
        if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, c, 0, 0) == 1) out->ambient |= 1ull << c;
    }
}

static void become(uintptr_t index) {
    unsigned groups[3] = {100 + (unsigned)index, 2000, 70000};
    MUST(syscall(SYS_setgroups, 3, groups) == 0);
    if (index == 1) MUST(prctl(PR_SET_SECUREBITS, SECBIT_KEEP_CAPS | SECBIT_NO_SETUID_FIXUP) == 0);
    if (index == 2) {
        MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
        MUST(prctl(PR_CAPBSET_DROP, CAP_SYS_BOOT, 0, 0, 0) == 0);
    }
    MUST(syscall(SYS_setresgid, 1000 + index, 1100 + index, 1200 + index) == 0);
    if (index == 3) MUST(prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) == 0);
    MUST(syscall(SYS_setresuid, 2000 + index, index == 1 ? 0 : 2100 + index, 2200 + index) == 0);
    if (index == 1) syscall(SYS_setfsuid, 2300);
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2] = {0};
    if (index == 1 || index == 3) {
        data[0].permitted = 1u << CAP_NET_BIND_SERVICE | 1u << CAP_CHOWN | 1u << CAP_SETPCAP;
        data[0].effective = index == 1 ? 1u << CAP_CHOWN : 1u << CAP_NET_BIND_SERVICE;
        data[0].inheritable = 1u << CAP_NET_BIND_SERVICE;
        MUST(syscall(SYS_capset, &header, data) == 0);
        MUST(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_BIND_SERVICE, 0, 0) == 0);
    }
}

static void *work(void *argument) {
    uintptr_t index = (uintptr_t)argument;
    if (index) become(index);
    look(&before[index]);
    atomic_store(&ready[index], 1);
    for (;;) {
        int round = atomic_load(&asked);
        if (round != atomic_load(&answered[index])) {
            struct identity now;
            look(&now);
            for (int i = 0; i < 8; i++)
                CHECK(now.ids[i] == before[index].ids[i], "thread %lu: id %d is %u, was %u", index, i, now.ids[i], before[index].ids[i]);
            CHECK(now.group_count == before[index].group_count && !memcmp(now.groups, before[index].groups, sizeof now.groups),
                  "thread %lu: groups changed", index);
            CHECK(!memcmp(now.capability, before[index].capability, sizeof now.capability),
                  "thread %lu: capabilities changed: e %x p %x i %x, were e %x p %x i %x", index, now.capability[0].effective,
                  now.capability[0].permitted, now.capability[0].inheritable, before[index].capability[0].effective,
                  before[index].capability[0].permitted, before[index].capability[0].inheritable);
            CHECK(now.securebits == before[index].securebits, "thread %lu: securebits are %x", index, now.securebits);
            CHECK(now.no_new_privs == before[index].no_new_privs, "thread %lu: no_new_privs is %d", index, now.no_new_privs);
            CHECK(now.bounding == before[index].bounding, "thread %lu: bounding set is %lx, was %lx", index, now.bounding, before[index].bounding);
            CHECK(now.ambient == before[index].ambient, "thread %lu: ambient set is %lx, was %lx", index, now.ambient, before[index].ambient);
            atomic_store(&answered[index], round);
        }
        doze(2);
    }
    return NULL;
}

static void setup(void) {
    MUST(geteuid() == 0);
    for (uintptr_t i = 0; i < THREADS; i++) thread(work, (void *)i);
    for (int i = 0; i < THREADS; i++) MUST(EVENTUALLY(atomic_load(&ready[i])));
}

static void step(void) { doze(5); }

static void verify(int round) {
    atomic_store(&asked, round);
    for (int i = 0; i < THREADS; i++) CHECK(EVENTUALLY(atomic_load(&answered[i]) == round), "thread %d does not answer", i);
}
