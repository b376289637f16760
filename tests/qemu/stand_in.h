// stand_in.h - a VM without QEMU, for the tests of vm.h: a process with QEMU's name on its command line, the four sockets
// of a run directory, and the test at their other ends as monitor, console and agent. It is taken over by vm_adopt.
#ifndef AIRLOCK_TESTS_QEMU_STAND_IN_H
#define AIRLOCK_TESTS_QEMU_STAND_IN_H

#include "peer.h"

#include <sys/types.h>

#include "base/id.h"
#include "base/json.h"
#include "qemu/vm.h"

#define STAND_IN_FEATURES (MSG_FEATURE_COMMANDS | MSG_FEATURE_FILES | MSG_FEATURE_STDIN | MSG_FEATURE_SHUTDOWN)

struct stand_in {
    char path[64], id[ID_MAX]; // the id is nobody else's on this host: a name ends all that have it
    int dirfd, control_listen, bulk_listen, qmp_listen, console_listen;
    pid_t pid;              // 0: it has ended and was waited for
    int stdin_fd;           // closing it ends the process as well
    json_t *runtime;        // as vm_runtime tells it
    struct loop *loop;
    struct vm *vm;
    struct notes notes;     // of all callbacks
    int qmp, console;
    struct buf qmp_in;
    struct peer control, bulk;
    struct frame f;
    uint8_t session[16];    // of the last hello on control
};

struct stand_in *stand_in_new(void);
void stand_in_free(struct stand_in *s);
enum vm_adopt_verdict stand_in_try(struct stand_in *s, struct err *err); // adopts, no more
void stand_in_adopt(struct stand_in *s);       // … which must work; accepts monitor and console
void stand_in_leave(struct stand_in *s);       // vm_free: the server stops; the process goes on
void stand_in_kill(struct stand_in *s);        // as QEMU's end
void stand_in_reap(struct stand_in *s);        // waits for an end that somebody else has caused

// The monitor.
void stand_in_greet(struct stand_in *s);       // greeting; the commands that must follow it
void stand_in_say(struct stand_in *s, const char *text);
json_t *stand_in_hear(struct stand_in *s);     // the next line, new

// The agent.
void stand_in_take(struct stand_in *s, int listen_fd, uint64_t port, struct peer *p); // accept, preamble, hello
void stand_in_reply(struct peer *p, uint64_t port, uint64_t version, uint64_t features);
void stand_in_session(struct stand_in *s);     // all of it, no commands; notes "ready …"

#endif
