// msg.h - what the frames say: one struct per message with encode and decode. A payload is a sequence of fields
// `tag u8, length u32, bytes`; integers are 8 bytes little endian. Unknown tags are skipped, so that a newer peer
// may say more; a missing required field, a repeated scalar, a wrong size or a count past its limit fails the
// decode. Decoded slices borrow from the payload. Pure, libc only, any thread; fuzzed both ways.
#ifndef AIRLOCK_PROTO_MSG_H
#define AIRLOCK_PROTO_MSG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"

struct slice {
    const uint8_t *data;
    size_t len;
};

#define MSG_ARGS_MAX 1024
#define MSG_FEATURES_MAX 16
#define MSG_VERSION_MAX 32

// Feature bits of a hello: a server asks for what it needs and refuses by name what is missing.
#define MSG_FEATURE_COMMANDS (1ull << 0)
#define MSG_FEATURE_FILES (1ull << 1)
#define MSG_FEATURE_STDIN (1ull << 2)
#define MSG_FEATURE_SHUTDOWN (1ull << 3)
#define MSG_FEATURE_FREEZE (1ull << 4)
#define MSG_FEATURE_REFRESH (1ull << 5)
#define MSG_FEATURE_EARLY_BULK (1ull << 6) // bulk's hello may come before control's
const char *msg_feature_name(uint64_t bit); // "commands"; NULL for a bit we do not know

enum msg_port { MSG_PORT_CONTROL = 1, MSG_PORT_BULK = 2 };

struct msg_hello {
    uint64_t port;              // enum msg_port
    uint64_t version_min, version_max;
    uint8_t session[16];        // the same on both ports of one attach: bulk joins control by it
    int64_t wall_ms;            // the guest sets its clock when it differs by more than 500 ms
    struct slice hostname;      // empty: leave as it is
};

struct msg_hello_reply {
    uint64_t port;
    uint64_t version;           // chosen; 0: no common version, agent_version says who it is
    uint64_t features;
    struct slice agent_version; // MSG_VERSION_MAX
    struct slice kernel;        // uname release
    struct slice boot_id;
    int64_t uptime_ms;
    uint64_t n_commands;        // COMMAND_STATE frames that follow
};

struct msg_run {
    struct slice command_id;    // text id "cmd…", echoed in states so that a host with lost memory knows it
    struct slice args[MSG_ARGS_MAX];
    size_t n_args;
    struct slice env[MSG_ARGS_MAX]; // "K=V"
    size_t n_env;
    struct slice cwd;           // empty: /work, or / where that is missing
    struct slice user;          // name in the guest's /etc/passwd
    uint64_t timeout_ms;        // the agent enforces it: TERM, KILL after 2 s
    bool has_stdin;             // otherwise /dev/null
    bool raw_output;            // output acked as it is consumed, not spooled: archive transfers
    struct slice write_dir;     // not empty: cwd must resolve below the write roots (archive extraction)
    bool make_dir;              // and is made when missing
    bool quiet;                 // nobody waits for STARTED: it is not sent
};

enum msg_command_phase { MSG_COMMAND_RUNNING = 1, MSG_COMMAND_EXITED = 2 };
enum msg_outcome { MSG_EXITED = 1, MSG_SIGNALED = 2, MSG_TIMED_OUT = 3, MSG_KILLED = 4, MSG_SPAWN_FAILED = 5 };
enum msg_spawn_stage { MSG_SPAWN_OK = 0, MSG_SPAWN_EXEC = 1, MSG_SPAWN_CWD = 2, MSG_SPAWN_USER = 3,
                       MSG_SPAWN_SYSTEM = 4, MSG_SPAWN_ROOTS = 5 };

// STARTED, EXITED and COMMAND_STATE. id of the frame is the number the RUN had.
struct msg_command {
    struct slice command_id;
    uint64_t phase;             // enum msg_command_phase
    uint64_t outcome;           // enum msg_outcome; 0 while running
    int64_t exit_code;          // MSG_EXITED
    uint64_t signal;            // number, MSG_SIGNALED and where a timeout or kill ended it by one
    uint64_t spawn_stage, spawn_errno; // MSG_SPAWN_FAILED, or 126/127 with MSG_SPAWN_EXEC
    uint64_t pid;               // in the guest
    int64_t duration_ms;
    uint64_t stdout_bytes, stderr_bytes; // produced so far; final in EXITED
    uint64_t stdin_bytes;       // accepted by the command's pipe so far
    uint64_t stdin_received;    // … and those that wait for it; a new session goes on from here
    bool stdin_closed;          // its end was received
};

enum msg_stream { MSG_STDOUT = 1, MSG_STDERR = 2, MSG_STDIN = 3, MSG_FILE = 4 };

struct msg_offsets {
    uint64_t stdout_offset, stderr_offset, stdin_offset, file_offset;
};

struct msg_signal {
    uint64_t signal;            // guest number
    bool group;                 // the process group, not the leader alone
};

// Header of OUTPUT, STDIN and FILE_DATA payloads: 16 fixed bytes (stream u64, offset u64), then the bytes.
#define MSG_DATA_HEADER 16
struct msg_data {
    uint64_t stream, offset;
    struct slice bytes;
};

enum msg_file_op {
    MSG_FILE_STAT = 1, MSG_FILE_READ = 2, MSG_FILE_WRITE = 3, MSG_FILE_DELETE = 4, MSG_FILE_MOVE = 5,
    MSG_DIR_LIST = 6, MSG_DIR_MAKE = 7,
    MSG_FILE_CHECK_WRITE = 8,   // resolves path and says whether it may be written; changes nothing
};

struct msg_file {
    uint64_t op;
    struct slice path;          // absolute, syntax checked by the host and again by the agent
    struct slice to;            // MOVE
    struct slice user;
    uint64_t mode;              // WRITE, DIR_MAKE; 0: default (0644 / 0755)
    bool mkdirs;                // WRITE, DIR_MAKE, MOVE: make missing parents
    bool recursive;             // DELETE
    bool exclusive;             // WRITE: If-None-Match: * ; MOVE: refuse an existing target
    uint64_t offset, length;    // READ: range; length 0: to the end
    uint64_t depth;             // DIR_LIST: 1..
    uint64_t max_entries;       // DIR_LIST
};

enum msg_file_status {
    MSG_FILE_OK = 0, MSG_FILE_NOT_FOUND = 1, MSG_FILE_PERMISSION = 2, MSG_FILE_OUTSIDE_ROOTS = 3,
    MSG_FILE_NOT_REGULAR = 4, MSG_FILE_EXISTS = 5, MSG_FILE_NOT_DIRECTORY = 6, MSG_FILE_NOT_EMPTY = 7,
    MSG_FILE_NO_SPACE = 8, MSG_FILE_RANGE = 9, MSG_FILE_PATH_INVALID = 10, MSG_FILE_USER_UNKNOWN = 11,
    MSG_FILE_ABORTED = 12, MSG_FILE_BUSY = 13, MSG_FILE_READ_ONLY = 14, MSG_FILE_IS_DIRECTORY = 15,
    MSG_FILE_LOOP = 16, MSG_FILE_NAME_TOO_LONG = 17, MSG_FILE_ERROR = 18,
};

enum msg_file_kind { MSG_KIND_FILE = 1, MSG_KIND_DIRECTORY = 2, MSG_KIND_SYMLINK = 3, MSG_KIND_OTHER = 4 };

struct msg_entry {
    struct slice name;          // path relative to the listed directory
    uint64_t kind, mode, size;
    int64_t mtime_ms;
    uint64_t uid, gid;
    struct slice target;        // of a symlink
};

// One message carries at most this many entries; a listing is sent as several FILE_RESULT frames, the last one
// with FRAME_LAST.
#define MSG_ENTRIES_MAX 256

struct msg_file_result {
    uint64_t status;            // enum msg_file_status
    uint64_t sys_errno;
    uint64_t kind, mode, size;  // STAT, READ (in FILE_INFO), WRITE (size written)
    int64_t mtime_ms;
    uint64_t uid, gid;
    bool created;               // WRITE: a new file; DIR_MAKE: a new directory
    uint64_t removed;           // DELETE: entries
    bool truncated;             // DIR_LIST
    struct slice owner, group;  // names where the guest knows them
    struct slice target;        // STAT of a symlink
    struct msg_entry entries[MSG_ENTRIES_MAX];
    size_t n_entries;
};

struct msg_frozen {
    uint64_t port;              // enum msg_port: of the FREEZE that this answers
    uint64_t disk_bytes, disk_free_bytes; // of the writable filesystem: its size, what can still be written (df)
    uint64_t n_commands;        // still running
};

enum msg_refresh_part {         // bits
    MSG_REFRESH_ENTROPY = 1, MSG_REFRESH_CLOCK = 2, MSG_REFRESH_HOSTNAME = 4, MSG_REFRESH_MACHINE_ID = 8,
    MSG_REFRESH_BOOT_ID = 16,
};
#define MSG_REFRESH_ALL 31u
#define MSG_SEED_BYTES 32       // at least; all of it counts as entropy
// What is empty or 0 stays as it is.
struct msg_refresh {
    uint8_t generation[16];     // echoed: the answer belongs to this request and no earlier one
    struct slice seed;          // MSG_SEED_BYTES or more
    int64_t wall_ms;
    struct slice hostname;      // at most 63
    struct slice machine_id;    // 32 lower-case hex digits
    struct slice boot_id;       // 36 characters
};

// What is in force afterwards, read back from where a program would read it.
struct msg_refreshed {
    uint8_t generation[16];
    uint64_t done;              // enum msg_refresh_part: asked for and in force
    int64_t wall_ms;            // the guest's clock when the answer was made
    struct slice hostname, machine_id, boot_id;
    struct slice random;        // 16 bytes of the guest's urandom after the reseed
    struct slice fault;         // empty, or what failed
};

// Encoders append the payload to out (bounded by its max) and return 0, or -1 when it does not fit. Decoders
// return 0, or -1 and leave *ret_m unspecified.
int msg_hello_encode(struct buf *out, const struct msg_hello *m);
int msg_hello_decode(const uint8_t *data, size_t len, struct msg_hello *ret_m);
int msg_hello_reply_encode(struct buf *out, const struct msg_hello_reply *m);
int msg_hello_reply_decode(const uint8_t *data, size_t len, struct msg_hello_reply *ret_m);
int msg_run_encode(struct buf *out, const struct msg_run *m);
int msg_run_decode(const uint8_t *data, size_t len, struct msg_run *ret_m);
int msg_command_encode(struct buf *out, const struct msg_command *m);
int msg_command_decode(const uint8_t *data, size_t len, struct msg_command *ret_m);
int msg_offsets_encode(struct buf *out, const struct msg_offsets *m);
int msg_offsets_decode(const uint8_t *data, size_t len, struct msg_offsets *ret_m);
int msg_signal_encode(struct buf *out, const struct msg_signal *m);
int msg_signal_decode(const uint8_t *data, size_t len, struct msg_signal *ret_m);
int msg_file_encode(struct buf *out, const struct msg_file *m);
int msg_file_decode(const uint8_t *data, size_t len, struct msg_file *ret_m);
int msg_file_result_encode(struct buf *out, const struct msg_file_result *m);
int msg_file_result_decode(const uint8_t *data, size_t len, struct msg_file_result *ret_m);
int msg_frozen_encode(struct buf *out, const struct msg_frozen *m);
int msg_frozen_decode(const uint8_t *data, size_t len, struct msg_frozen *ret_m);
int msg_refresh_encode(struct buf *out, const struct msg_refresh *m);
int msg_refresh_decode(const uint8_t *data, size_t len, struct msg_refresh *ret_m);
int msg_refreshed_encode(struct buf *out, const struct msg_refreshed *m);
int msg_refreshed_decode(const uint8_t *data, size_t len, struct msg_refreshed *ret_m);

void msg_data_header(uint8_t out[MSG_DATA_HEADER], uint64_t stream, uint64_t offset);
int msg_data_decode(const uint8_t *data, size_t len, struct msg_data *ret_m);

#endif
