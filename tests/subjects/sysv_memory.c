/* System V shared memory of two processes: a segment with a key, attached for writing, for reading, and with its middle cut out; one
 * that was removed and lives as long as somebody is attached. */
#include "subject.h"
#include <sys/ipc.h>
#include <sys/shm.h>

enum { PAGES = 5, LENGTH = PAGES * PAGE + 100, ATTACHED = 8 };
static int kept, removed, questions[2], answers[2];
static key_t key;
static unsigned char *whole, *cut, *readable, *orphan, *between;
static pid_t child;
static uint64_t round_of;

static unsigned char byte(int at) { return (unsigned char)(mix(round_of * 100000 + (unsigned)at) | 1); }

static void put(void) {
    round_of++;
    for (int at = 0; at < LENGTH; at += 97) whole[at] = byte(at);
    memset(orphan, (int)round_of, PAGE);
}

static void look(const char *who) {
    for (int at = 0; at < LENGTH; at += 97) {
        CHECK(whole[at] == byte(at), "%s: byte %d of the segment differs", who, at);
        CHECK(readable[at] == byte(at), "%s: byte %d differs where it may only be read", who, at);
        CHECK(at / PAGE == 2 || cut[at] == byte(at), "%s: byte %d differs beside the cut", who, at);
    }
    for (int at = 0; at < PAGE; at++) CHECK(orphan[at] == (unsigned char)round_of, "%s: the removed segment differs", who);
    CHECK(between[0] == 77 && between[PAGE - 1] == 78, "%s: what lies in the cut differs", who);
    struct shmid_ds now;
    CHECK(shmctl(kept, IPC_STAT, &now) == 0, "%s: its number is gone", who);
    CHECK(now.shm_perm.__key == key && now.shm_segsz == LENGTH, "%s: key %x, %zu bytes", who, now.shm_perm.__key, now.shm_segsz);
    CHECK((now.shm_perm.mode & 07777) == 0640, "%s: mode %o", who, now.shm_perm.mode);
    CHECK(now.shm_perm.uid == getuid() && now.shm_perm.gid == getgid(), "%s: of %u, %u", who, now.shm_perm.uid, now.shm_perm.gid);
    CHECK(now.shm_nattch == ATTACHED, "%s: attached %lu times", who, (unsigned long)now.shm_nattch);
    CHECK(shmctl(removed, IPC_STAT, &now) == 0 && (now.shm_perm.mode & SHM_DEST) && now.shm_nattch == 2, "%s: the removed one is not", who);
    CHECK(shmget(key, 0, 0) == kept, "%s: its key leads elsewhere", who);
    CHECK(mprotect(readable, PAGE, PROT_READ | PROT_WRITE) == -1 && errno == EACCES, "%s: it may be written where it may only be read", who);
}

static void serve(void) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (char what; read(questions[0], &what, 1) == 1;) {
        round_of += what == 'n';
        failure[0] = 0;
        if (what == 'l') look("the child");
        if (write(answers[1], failure, sizeof failure) != sizeof failure) break;
    }
    _exit(0);
}

static void ask(char what) {
    char why[sizeof failure] = "it says nothing";
    CHECK(write(questions[1], &what, 1) == 1, "the child cannot be asked");
    CHECK(read(answers[0], why, sizeof why) == sizeof why && !why[0], "%s", why);
}

static void remove_segment(void) { shmctl(kept, IPC_RMID, NULL); }

static void setup(void) {
    key = (key_t)(0x70000000u | (unsigned)getpid());
    kept = shmget(key, LENGTH, IPC_CREAT | IPC_EXCL | 0640);
    NEEDS(kept >= 0 || errno != ENOSYS, "System V shared memory");
    MUST(kept >= 0);
    removed = shmget(IPC_PRIVATE, PAGE, 0600);
    whole = shmat(kept, NULL, 0), cut = shmat(kept, NULL, 0), readable = shmat(kept, NULL, SHM_RDONLY), orphan = shmat(removed, NULL, 0);
    MUST(whole != (void *)-1 && cut != (void *)-1 && readable != (void *)-1 && orphan != (void *)-1);
    MUST(munmap(cut + 2 * PAGE, PAGE) == 0);
    between = mmap(cut + 2 * PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    MUST(between == cut + 2 * PAGE);
    between[0] = 77, between[PAGE - 1] = 78;
    MUST(shmctl(removed, IPC_RMID, NULL) == 0);
    MUST(pipe(questions) == 0 && pipe(answers) == 0);
    child = fork();
    if (child == 0) serve();
    atexit(remove_segment);
    put(), ask('n');
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    look("the parent");
    ask('l');
    unsigned char *again = shmat(kept, NULL, SHM_RDONLY);
    CHECK(again != (void *)-1 && again[97] == byte(97), "it cannot be attached again");
    CHECK(shmdt(again) == 0, "it cannot be detached");
    put(), ask('n');
    look("the parent"), ask('l');
}
