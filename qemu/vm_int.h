// vm_int.h - one VM's insides, shared by vm.c (life), vm_session.c (agent), vm_qmp.c (QMP, console).
#ifndef AIRLOCK_QEMU_VM_INT_H
#define AIRLOCK_QEMU_VM_INT_H

#include <pthread.h>
#include <stdatomic.h>

#include "qemu/channel.h"
#include "qemu/process.h"
#include "qemu/qmp_parse.h"
#include "qemu/vm.h"

#define RECONNECT_MS 50
#define RECONNECT_MAX_MS 2000
#define PING_MS 3000

// A blocking QMP call that waits for its answer; on the caller's stack.
struct qmp_call {
    struct qmp_call *next;
    uint64_t id;
    bool done;
    json_t *ret;
    char error[200];
};

struct vm {
    struct loop *loop;
    const struct vm_callbacks *cb;
    void *arg;
    char id[64];                 // names the process
    char hostname[64];           // the guest's, told with every hello
    enum vm_accel accel;
    struct process process;
    int run_dirfd;               // own duplicate
    bool adopted, ram_is_file;

    pthread_mutex_t lock;        // what worker threads wait for
    pthread_cond_t changed;
    bool ready, gone, detached;
    unsigned sessions;           // begun so far
    bool waits;                  // for vm_resume, after vm_restore: no session yet
    bool paused;                 // by us: no pings, and a new server leaves it so
    unsigned frozen;             // ports that have answered the freeze under way: 1 << enum msg_port
    uint64_t freeze_id;          // 0: none
    bool freeze_lost;            // its session ended
    struct vm_frozen frozen_said;
    bool refreshed_came;
    uint8_t refresh_generation[16];
    // Of whoever saves or resumes, who exclude each other.
    int state_fd;                // what QEMU saves its state into, kept as long as the VM stands still; -1
    int64_t state_fdset;
    bool states_left;            // QEMU may have others: of an earlier server, or of a save that failed
    struct vm_refreshed refreshed;
    struct err fatal;
    struct qmp_call *calls;
    uint64_t next_qmp_id;
    int qmp_fd;                  // written by any thread under lock
    bool qmp_up;

    // The loop's own.
    bool attached;
    struct channel control, bulk;
    uint8_t session[16];
    int early_fds[2];            // connected before a saved state is loaded, silent until it goes on; else -1
    struct buf *first;           // goes with the next hello; borrowed, NULL: nothing
    struct vm_hello hello;
    bool control_said, bulk_said, states_done, session_up, mute;
    struct loop_timer *hello_timer, *ping_timer, *reconnect_timer, *resume_timer;
    int reconnect_ms;
    int64_t ping_sent_us, pong_ms;
    bool ping_open;
    struct loop_watch *qmp_watch, *console_watch, *gone_watch;
    struct qmp_parser qmp;
    int console_fd;
    int64_t console_window_ms;
    uint64_t console_bytes, console_dropped;
    uint8_t console_line[512];       // what has come of a line that has not ended
    size_t console_len;
    bool shutdown_seen, panic_seen, io_paused;
    atomic_ullong next_id;
    atomic_llong last_ping_us;
};

// vm_session.c: loop thread but where said.
extern const struct channel_callbacks VM_CHANNEL_CALLBACKS;
void session_connect(struct vm *vm);
void session_hold(struct vm *vm);             // connects, says nothing: the guest has not been loaded
void session_close(struct vm *vm);
// vm_state.c
void vm_fds_close(struct vm *vm, const char *opaque); // takes back what was given under that name
int vm_go(struct vm *vm, struct err *err);            // vm_resume without vm_save_done
void state_frozen(struct vm *vm, const struct frame *f);    // loop
void state_refreshed(struct vm *vm, const struct frame *f); // loop
void state_session_lost(struct vm *vm);                     // loop
// vm_qmp.c
void qmp_connect(struct vm *vm, int fd_stolen);
void qmp_close(struct vm *vm);
void qmp_send(struct vm *vm, const char *command); // any thread; not waiting for the answer
void qmp_go_on(struct vm *vm, bool or_stop);  // `cont` unless its owner has paused it; then `stop`, or nothing
void qmp_drain(struct vm *vm);                // what has come so far
void console_connect(struct vm *vm, int fd_stolen);
void console_close(struct vm *vm);
void stderr_tell(struct vm *vm);
// vm.c: any thread.
void vm_note_fatal(struct vm *vm, const struct err *err);
void vm_note_ready(struct vm *vm);

#endif
