// launch.h - bringing a sandbox's VM up, by boot or from an origin: the stages that create, start, restore, fork and resume
// of a cold sandbox share. Within the room.
#ifndef AIRLOCK_SANDBOX_LAUNCH_H
#define AIRLOCK_SANDBOX_LAUNCH_H

#include "sandbox/internal.h"

enum launch_kind {
    LAUNCH_CREATE,    // a new disk: of a template where there is one, else empty
    LAUNCH_START,     // boots from the disk that is there
    LAUNCH_RESTORE,   // a new disk and memory of a snapshot or of a live fork (origin is set before)
    LAUNCH_WAKE,      // memory of its cold state, its own disk
};

struct launch {
    struct sandbox *s;
    struct op *op;
    enum launch_kind kind;
    struct sandbox_row row;      // the next version of the sandbox's row
    struct job_row *job;
    enum vm_accel accel;
    const char *boot_path;       // "cold", "template", "pool", "snapshot", "fork"
    struct image_runtime runtime;
    struct origin *origin;       // NULL: boots
    char base_runs[DIGEST_TEXT_MAX]; // of the file that keep_base wrote; "" for none
    int kernel_fd, initrd_fd, root_fd, disk_fd;
    struct vm *vm;               // set while the sandbox has it
    bool continued;              // from an origin, also where an earlier server did it
    bool ran;                    // the guest was let go
    bool room_promised;          // for the copy of its disk, with those of its group
    bool pooled, pool_restored;  // the VM was made ahead; it runs already
    struct continued *commands;  // that go on in it; until they are listed
    size_t n_commands;
    struct vm_refreshed refreshed;
    int64_t t_prepare_us, t_launch_us, t_restore_us, t_agent_us;
};

void launch_init(struct launch *l, struct sandbox *s, struct op *op, enum launch_kind kind);
void launch_close(struct launch *l);
// The stages that are left of it, journaled. 0, or -1 with err, undone.
int launch_run(struct launch *l, struct err *err);
// The last stage alone, of a VM that an earlier server started: waits for the agent, renews its identity.
int launch_finish(struct launch *l, struct err *err);
// Of a create of an earlier server: what its row says.
void launch_resumed(struct launch *l);
void launch_undo(struct launch *l);              // ends the VM
// backend_json, timings_json, uniqueness_json, origin_json of the row.
void launch_describe(struct launch *l);
json_t *launch_facts(struct launch *l);          // of the receipt; new
// Gives a pooled VM's run directory the sandbox's name; again without harm.
int launch_take_directory(struct manager *m, const char *name, const char *id);

#endif
