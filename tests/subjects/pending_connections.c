/* Connections that nobody has accepted yet, at a listening socket with a path and at one with an abstract name: of two processes in
 * turn, one with a name of its own, one half closed; and a call that waits because no more may wait. They are accepted in their
 * order, each leads to who had made it, and the call that waited goes on. */
#include "subject.h"
#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>

enum { BACKLOG = 2, WAITING = BACKLOG + 1, CLIENTS = WAITING + 1, PACKETS = 2 };
static struct sockaddr_un path, name, own;
static socklen_t path_length, name_length, own_length;
static int stream, packet, packets[PACKETS], questions[2], answers[2];
static int clients[CLIENTS]; /* in the child all but number 1, which is the root's */
static pid_t root, child;
static pthread_t blocked;

static void name_it(struct sockaddr_un *at, socklen_t *length, const char *text, bool is_path) {
    at->sun_family = AF_UNIX;
    int used = is_path ? snprintf(at->sun_path, sizeof at->sun_path, "%s.%s", state_path, text)
                       : snprintf(at->sun_path + 1, sizeof at->sun_path - 1, "subject.%s.%d", text, root);
    *length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)used);
}

static int connected(int type, const struct sockaddr_un *to, socklen_t length, bool is_named) {
    int fd = socket(AF_UNIX, type, 0);
    if (is_named && bind(fd, (const void *)&own, own_length)) return -1;
    return connect(fd, (const void *)to, length) ? -1 : fd;
}

static pid_t peer_of(int fd) {
    struct ucred ids = {0};
    socklen_t length = sizeof ids;
    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &ids, &length) ? -errno : ids.pid;
}

static void *connect_one_more(void *unused) {
    (void)unused;
    clients[WAITING] = connected(SOCK_STREAM, &path, path_length, false);
    return NULL;
}

/* The child: '0', '2', '3' connect that client, 's' lets all say their number, 'e' ends all. */
static void serve(void) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    close(stream), close(packet);
    for (char what; read(questions[0], &what, 1) == 1;) {
        bool done = true;
        if (what == '0') done = (clients[0] = connected(SOCK_STREAM, &path, path_length, false)) >= 0;
        if (what == '2') done = (clients[2] = connected(SOCK_STREAM, &path, path_length, true)) >= 0 && shutdown(clients[2], SHUT_WR) == 0;
        if (what == '3') done = pthread_create(&blocked, NULL, connect_one_more, NULL) == 0, doze(100);
        if (what == 's') {
            pthread_join(blocked, NULL);
            char byte = 0;
            done = clients[3] >= 0 && write(clients[0], "0", 1) == 1 && write(clients[3], "3", 1) == 1;
            done = done && read(clients[2], &byte, 1) == 1 && byte == '!' && peer_of(clients[0]) == root;
        }
        if (what == 'e') close(clients[0]), close(clients[2]), close(clients[3]);
        if (write(answers[1], &done, 1) != 1) _exit(1);
    }
    _exit(0);
}

static void ask(char what) {
    bool done = false;
    CHECK(write(questions[1], &what, 1) == 1 && read(answers[0], &done, 1) == 1 && done, "the child fails at %c", what);
}

static void load(void) {
    ask('0');
    clients[1] = connected(SOCK_STREAM, &path, path_length, false);
    CHECK(clients[1] >= 0, "the second cannot connect");
    ask('2');
    ask('3');
    for (int i = 0; i < PACKETS; i++) CHECK((packets[i] = connected(SOCK_SEQPACKET, &name, name_length, false)) >= 0, "packet %d cannot connect", i);
}

static void setup(void) {
    root = getpid();
    name_it(&path, &path_length, "path", true);
    name_it(&name, &name_length, "name", false);
    name_it(&own, &own_length, "own", false);
    stream = socket(AF_UNIX, SOCK_STREAM, 0), packet = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    unlink(path.sun_path);
    MUST(bind(stream, (const void *)&path, path_length) == 0 && listen(stream, BACKLOG) == 0);
    MUST(bind(packet, (const void *)&name, name_length) == 0 && listen(packet, 10) == 0);
    MUST(pipe(questions) == 0 && pipe(answers) == 0);
    child = fork();
    if (child == 0) serve();
    MUST(child > 0);
    load();
}

static void step(void) { doze(5); }

static void verify(int round) {
    (void)round;
    int got[CLIENTS];
    struct sockaddr_un at = {0};
    socklen_t length = sizeof at;
    for (int i = 0; i < CLIENTS; i++) {
        got[i] = accept(stream, i == 2 ? (void *)&at : NULL, i == 2 ? &length : NULL);
        CHECK(got[i] >= 0 && peer_of(got[i]) == (i == 1 ? root : child), "number %d is accepted from %d", i, peer_of(got[i]));
    }
    CHECK(length == own_length && !memcmp(&at, &own, length), "number 2 has another name");
    CHECK(write(clients[1], "1", 1) == 1 && write(got[2], "!", 1) == 1, "what was accepted leads nowhere");
    ask('s');
    for (int i = 0; i < CLIENTS; i++) {
        char byte = 0;
        ssize_t count = recv(got[i], &byte, 1, MSG_DONTWAIT);
        CHECK(i == 2 ? count == 0 : count == 1 && byte == '0' + i, "number %d says %c", i, byte);
    }
    for (int i = 0; i < PACKETS; i++) {
        char byte = 0;
        int server = accept(packet, NULL, NULL);
        CHECK(server >= 0 && send(packets[i], &(char){(char)('a' + i)}, 1, MSG_NOSIGNAL) == 1, "packet %d leads nowhere", i);
        CHECK(recv(server, &byte, 1, MSG_DONTWAIT) == 1 && byte == 'a' + i, "packet %d says %c", i, byte);
        close(server), close(packets[i]);
    }
    ask('e');
    for (int i = 0; i < CLIENTS; i++) close(got[i]);
    close(clients[1]);
    CHECK(waitpid(child, NULL, WNOHANG) == 0, "the child has ended");
    load();
}
