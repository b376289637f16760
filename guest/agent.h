// agent.h - what the files of the guest agent share. One static binary, PID 1 of the guest, from the initramfs.
//
// Threads: the main thread runs the loop (ports, pipes, children, deadlines). A few file threads do what may block on a
// disk, with the target user's credentials. The agent's state belongs to the main thread; file operations are handed
// over under file_lock, and the ports' send queues have a lock each so that a file thread can answer by itself.
#ifndef AIRLOCK_GUEST_AGENT_H
#define AIRLOCK_GUEST_AGENT_H

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/buf.h"
#include "base/limits.h"
#include "proto/frame.h"
#include "proto/msg.h"

#define AGENT_VERSION "0.1.0"
#define AGENT_FEATURES                                                                                                 \
    (MSG_FEATURE_COMMANDS | MSG_FEATURE_FILES | MSG_FEATURE_STDIN | MSG_FEATURE_SHUTDOWN | MSG_FEATURE_FREEZE |        \
     MSG_FEATURE_REFRESH | MSG_FEATURE_EARLY_BULK)

// ---- boot.c: from nothing to a root with our overlay --------------------------------------------------------------------
void boot_early(void);                 // proc, sys, dev, modules
const char *boot_root(void);           // mounts and moves the root; NULL, or what failed ("root: …", first word = stage)
void boot_finish(void);                // loopback, limits, /work, hostname
void boot_hostname(const char *name, size_t len);
void boot_shutdown(void) __attribute__((noreturn)); // kill, sync, power off
extern char boot_timings[256];

// ---- refresh.c: what makes this guest somebody, and becoming somebody else ------------------------------------------------
#define HOSTNAME_LEN_MAX 63
#define MACHINE_ID_LEN 32
#define BOOT_ID_LEN 36
struct refreshed {
    struct msg_refreshed m;            // its slices are of this structure
    uint8_t random[16];
    char hostname[HOSTNAME_LEN_MAX + 2], machine_id[MACHINE_ID_LEN + 2], boot_id[BOOT_ID_LEN + 2], fault[256];
};
void refresh_prepare(void);            // at boot: a fresh machine id, the kernel's boot id, both where a refresh can change them
void refresh_do(const struct msg_refresh *m, struct refreshed *ret); // does what it can, tells what is in force then

// ---- port.c: the two virtio-serial ports ----------------------------------------------------------------------------------
struct port {
    int fd;
    uint64_t which;                    // enum msg_port
    struct frame_parser parser;
    bool up;                           // hello answered in this session
    pthread_mutex_t lock;              // tx
    uint8_t *tx;                       // bytes to send, from tx_start to tx_end
    size_t tx_start, tx_end, tx_cap;
};
int port_open(struct port *p, const char *name, uint64_t which); // waits for the device; 0, or -1
void port_reset(struct port *p);                                 // a new session: nothing old is sent
// Queues and tries to write. False when the bounded queue is full.
bool port_send(struct port *p, uint8_t type, uint8_t flags, uint64_t id, const void *head, size_t head_len,
               const void *data, size_t len);
bool port_send_buf(struct port *p, uint8_t type, uint8_t flags, uint64_t id, const struct buf *payload);
void port_preamble(struct port *p, const uint8_t nonce[FRAME_NONCE_BYTES]);
bool port_flush(struct port *p);       // true when the queue is empty
bool port_idle(struct port *p);
void port_log(const char *fmt, ...) __attribute__((format(printf, 1, 2))); // FRAME_LOG on control

extern struct port control_port, bulk_port;

// ---- window.c: bytes kept until they are acknowledged ---------------------------------------------------------------------
struct window {
    uint8_t *data;                     // ring, grown on demand, freed when empty
    size_t cap;
    uint64_t acked, sent, end;         // acked <= sent <= end
};
#define WINDOW_MAX LIMIT_UNACKED_STREAM_BYTES
size_t window_room(const struct window *w);
// Contiguous space for at most want bytes at the end; *ret_n what fits (0: full or out of memory).
uint8_t *window_space(struct window *w, size_t want, size_t *ret_n);
void window_added(struct window *w, size_t n);
const uint8_t *window_unsent(const struct window *w, size_t *ret_n); // contiguous
void window_ack(struct window *w, uint64_t offset);
void window_rewind(struct window *w, uint64_t offset);               // send again from there (clamped to what is kept)
void window_free(struct window *w);

// ---- user.c -------------------------------------------------------------------------------------------------------
#define USER_GROUPS_MAX 32
struct user {
    char name[64], home[256], shell[128];
    uid_t uid;
    gid_t gid;
    gid_t groups[USER_GROUPS_MAX];
    size_t n_groups;
};
int user_find(const char *name, size_t len, struct user *ret);       // 0, or -1
void user_name_of(uid_t uid, char *out, size_t cap);                 // "" where unknown
void group_name_of(gid_t gid, char *out, size_t cap);

// ---- spawn.c ------------------------------------------------------------------------------------------------------
struct spawn {
    const struct user *user;
    const char *cwd;
    char *const *argv, *const *envp;
    const char *path;                  // where argv[0] is looked for
    int stdin_fd, stdout_fd, stderr_fd;
    const char *write_dir;             // must resolve below the write roots; NULL: not asked
    bool make_dir;                     // and is made when missing
    int stage, err;                    // enum msg_spawn_stage and errno of a failure
};
pid_t spawn_run(struct spawn *s);      // -1: see stage and err
struct spawn_pipes {
    int ours[3], theirs[3];            // -1: none
};
bool spawn_pipes(struct spawn_pipes *p, bool has_stdin); // false with errno; what was made is in p
void spawn_pipes_close(int fds[3]);
int spawn_null(void);                  // what a command without stdin reads; kept, made by spawn_pipes

// ---- words.c: of one command, valid until words_begin; NULL where they do not fit ------------------------------------------
void words_begin(void);
char *words_text(struct slice s);
char **words_argv(const struct msg_run *m);
// The command's own, and what a login would have set. *ret_path: where its program is looked for.
char **words_env(const struct msg_run *m, const struct user *u, const char **ret_path);

// ---- command.c ----------------------------------------------------------------------------------------------------
void command_run(uint64_t id, const struct msg_run *m);
void command_signal(uint64_t id, const struct msg_signal *m);
void command_forget(uint64_t id);
void command_attach(uint64_t id, const struct msg_offsets *o);
void command_ack(uint64_t id, const struct msg_offsets *o);
void command_stdin(uint64_t id, const struct msg_data *d, bool last);
size_t command_count(void);
size_t command_running(void);
void command_tell_states(void);        // COMMAND_STATE for each
void command_session_lost(void);       // sending waits for ATTACH
void command_reaped(pid_t pid, int status);
int64_t command_tick(int64_t now_ms);  // deadlines; ms until the next, -1 none
bool command_leaving(void);            // an output was closed since this was asked last
bool command_pump(void);               // one OUTPUT frame onto the bulk port; false: nothing to send
void command_event(void *source, uint32_t events);
void command_kill_all(void);

// ---- fileop.c -----------------------------------------------------------------------------------------------------
void fileop_start(void);
void fileop_begin(uint64_t id, const struct msg_file *m);
void fileop_data(uint64_t id, const struct msg_data *d, bool last);
void fileop_settle(void);              // no more content for now: what came is written
void fileop_credit(uint64_t id, uint64_t offset);
void fileop_abort(uint64_t id);
void fileop_session_lost(void);        // all are given up, temporary files removed
bool fileop_pump(void);                // one FILE_DATA frame onto the bulk port
// Refuses a directory that does not resolve below the write roots. 0, or an enum msg_file_status.
int fileop_dir_allowed(int dirfd);
// Makes what is missing of a path below the roots, with the calling process's rights; system calls only.
int fileop_make_dirs(const char *path);

// ---- main.c -------------------------------------------------------------------------------------------------------
enum source_kind { SOURCE_PORT, SOURCE_CHILD, SOURCE_PIPE, SOURCE_WAKE };
struct source {                        // first member of what an epoll event points to
    enum source_kind kind;
};
int loop_add(int fd, uint32_t events, void *source); // struct source *
int loop_mod(int fd, uint32_t events, void *source);
void loop_del(int fd);
void loop_wake(void);                  // from a file thread: bulk has something to send

#endif
