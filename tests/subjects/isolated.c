/* What a copy must not have in common with the original that runs beside it: a file that is written to, mapped and locked, POSIX and
 * System V shared memory, sockets on an address of the host and at a path, a named pipe, a deleted file. Each of the two finds only
 * what it has written itself. */
#include "subject.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/file.h>
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/un.h>

enum { SLOTS = 512 };
static char path[4200], folder[4200], fifo_path[4300], shm_name[64];
static struct sockaddr_un unix_name = {.sun_family = AF_UNIX};
static struct sockaddr_in here = {.sin_family = AF_INET}, loopback = {.sin_family = AF_INET};
static int log_file, file, ghost, fifo, on_path, on_host, on_loopback, segment;
static key_t key;
static uint64_t *mapped, *posix, *sysv, own[SLOTS];
static int written;

static void remove_names(void) {
    shm_unlink(shm_name);
    shmctl(segment, IPC_RMID, NULL);
    unlink(fifo_path), unlink(unix_name.sun_path), rmdir(folder);
}

static int listen_at(void *name, socklen_t length) {
    int fd = socket(((struct sockaddr *)name)->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    MUST(fd >= 0 && bind(fd, name, length) == 0 && listen(fd, 5) == 0);
    MUST(getsockname(fd, name, &length) == 0);
    return fd;
}

static void *map(int fd) {
    void *at = mmap(NULL, SLOTS * 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    MUST(at != MAP_FAILED);
    return at;
}

static void setup(void) {
    MUST(argument_count == 1 && inet_pton(AF_INET, arguments[0], &here.sin_addr) == 1);
    /* Open as long as it runs, so that a copy has a log of its own. */
    log_file = open(state_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    snprintf(path, sizeof path, "%s.file", state_path);
    file = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0640);
    MUST(log_file >= 0 && file >= 0 && ftruncate(file, SLOTS * 8) == 0 && flock(file, LOCK_EX | LOCK_NB) == 0);
    mapped = map(file);
    snprintf(folder, sizeof folder, "%s.d", state_path);
    MUST(mkdir(folder, 0750) == 0);
    snprintf(fifo_path, sizeof fifo_path, "%s/fifo", folder);
    MUST(mkfifo(fifo_path, 0600) == 0);
    fifo = open(fifo_path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    char gone[4300];
    snprintf(gone, sizeof gone, "%s/gone", folder);
    ghost = open(gone, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    MUST(fifo >= 0 && ghost >= 0 && unlink(gone) == 0);
    MUST(snprintf(unix_name.sun_path, sizeof unix_name.sun_path, "%s/socket", folder) < (int)sizeof unix_name.sun_path);
    on_path = listen_at(&unix_name, sizeof unix_name);
    on_host = listen_at(&here, sizeof here);
    loopback.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    on_loopback = listen_at(&loopback, sizeof loopback);
    snprintf(shm_name, sizeof shm_name, "/pageferry-isolated-%d", getpid());
    int memory = shm_open(shm_name, O_RDWR | O_CREAT | O_EXCL, 0600);
    MUST(memory >= 0 && ftruncate(memory, SLOTS * 8) == 0);
    posix = map(memory);
    close(memory);
    key = (key_t)(0x71000000u | (unsigned)getpid());
    segment = shmget(key, SLOTS * 8, IPC_CREAT | IPC_EXCL | 0600);
    MUST(segment >= 0);
    sysv = shmat(segment, NULL, 0);
    MUST(sysv != (void *)-1);
    atexit(remove_names);
}

static void step(void) { doze(5); }

static void serve(int listener, void *name, socklen_t length, const char *what) {
    int client = socket(((struct sockaddr *)name)->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct linger reset = {1, 0}; /* no TIME_WAIT */
    setsockopt(client, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    bool connected = connect(client, name, length) == 0;
    CHECK(connected, "%s: connect fails", what);
    int server = connected ? accept4(listener, NULL, NULL, SOCK_CLOEXEC) : -1;
    uint64_t sent = own[written - 1], got = 0;
    CHECK(server >= 0 && write(client, &sent, 8) == 8 && recv(server, &got, 8, MSG_WAITALL) == 8 && got == sent, "%s: another serves", what);
    close(client);
    close(server);
}

static void verify(int round) {
    (void)round;
    MUST(written < SLOTS);
    /* The two write different things: they are in different networks. */
    struct stat network;
    CHECK(stat("/proc/self/ns/net", &network) == 0, "it has no network");
    uint64_t fresh = mix((uint64_t)network.st_ino * 1000 + (uint64_t)written);
    own[written] = mapped[written] = posix[written] = sysv[written] = fresh;
    CHECK(msync(mapped, SLOTS * 8, MS_SYNC) == 0, "the file cannot be synced");
    written++;
    CHECK(pwrite(file, &fresh, 8, SLOTS * 8 + (written - 1) * 8) == 8, "the file cannot be written to");
    CHECK(pwrite(ghost, &fresh, 8, (written - 1) * 8) == 8, "the deleted file cannot be written to");
    CHECK(write(fifo, &fresh, 8) == 8, "the pipe takes nothing");
    uint64_t got;
    CHECK(read(fifo, &got, 8) == 8 && got == fresh && read(fifo, &got, 8) == -1 && errno == EAGAIN, "another writes to the pipe");
    CHECK(!memcmp(own, mapped, sizeof own), "another writes to the mapped file");
    CHECK(!memcmp(own, posix, sizeof own), "another writes to POSIX shared memory");
    CHECK(!memcmp(own, sysv, sizeof own), "another writes to System V shared memory");
    uint64_t there[SLOTS * 2] = {0};
    ssize_t length = (SLOTS + written) * 8;
    int again = open(path, O_RDWR | O_CLOEXEC);
    CHECK(again >= 0 && pread(again, there, sizeof there, 0) == length, "the file, opened again, has not %zd bytes", length);
    CHECK(!memcmp(there, own, sizeof own) && !memcmp(there + SLOTS, own, (size_t)written * 8), "the file, opened again, differs");
    CHECK(flock(again, LOCK_SH | LOCK_NB) == -1 && errno == EWOULDBLOCK, "the file is not locked");
    close(again);
    CHECK(pread(ghost, there, sizeof there, 0) == written * 8 && !memcmp(there, own, (size_t)written * 8), "the deleted file differs");
    int memory = shm_open(shm_name, O_RDWR, 0);
    CHECK(memory >= 0 && pread(memory, there, SLOTS * 8, 0) == SLOTS * 8 && !memcmp(there, own, sizeof own), "its name leads to other shared memory");
    close(memory);
    CHECK(shmget(key, 0, 0) == segment, "its key leads to another segment");
    serve(on_path, &unix_name, sizeof unix_name, "the socket at a path");
    serve(on_loopback, &loopback, sizeof loopback, "the socket of the loopback");
    struct sockaddr_in name;
    socklen_t named = sizeof name;
    CHECK(getsockname(on_host, (struct sockaddr *)&name, &named) == 0 && !memcmp(&name, &here, sizeof here), "the socket of the host has another address");
}
