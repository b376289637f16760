// vm.h - one microVM: QEMU in its jail, its QMP connection, its agent channel, its console. The only header of this
// room that sandbox/ includes (with probe.h and host.h).
//
// Owns: the QEMU process and its jail, the sockets in the run directory, the session with the agent. Does not own:
// what a sandbox is, disks' contents, images, rows, tenants, policy.
//
// Threads: vm_launch, vm_adopt, vm_wait_*, vm_qmp, vm_end block and are called from worker threads. vm_send_* may be
// called from any thread and never block (they write at once when nothing is queued, else they queue within a bound).
// Callbacks run on the loop's thread and never block; pointers in them are borrowed for the call. After vm_free
// returns no callback runs any more (vm_free must not be called from the loop's thread).
#ifndef AIRLOCK_QEMU_VM_H
#define AIRLOCK_QEMU_VM_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/err.h"
#include "base/loop.h"
#include "proto/msg.h"

struct vm;

enum vm_accel { VM_ACCEL_TCG = 1, VM_ACCEL_KVM = 2 };
const char *vm_accel_name(enum vm_accel a); // "tcg", "kvm"
// What device state depends on, of argv.c.
const char *vm_machine_name(void);
const char *vm_cpu_model(enum vm_accel a);
const char *vm_kernel_words(enum vm_accel a); // of the kernel's command line, that differ by accelerator
// What a VM may take at most beside the guest's memory, MiB: translation buffer (TCG) and QEMU's own.
int vm_overhead_mib(enum vm_accel a);

// How to launch. Descriptors are borrowed until vm_launch returns.
struct vm_spec {
    const char *id;            // sandbox id: names the process (-name) and proves its identity on adoption
    enum vm_accel accel;
    const char *qemu_path;     // NULL: qemu-system-x86_64 from PATH
    int vcpus, memory_mib;
    unsigned tsc_khz;          // of host.h
    int kernel_fd, initrd_fd, root_fd, disk_fd; // regular files, read-only but the last; no kernel with `incoming`
    int ram_fd;                // memory file of ram.h; 0 or -1: anonymous memory
    bool ram_shared;           // written through: the boot that becomes a template. Else a private copy
    bool incoming;             // waits for vm_restore instead of booting
    int run_dirfd;             // <state>/run/<id>: sockets, pid file, capped stderr; 0700, not visible in the jail
    uid_t jail_uid;            // host uid to drop to before bubblewrap; 0: stay (server is not root)
    const char *cgroup_parent; // delegated cgroup v2 directory, or NULL
    bool background;           // lowest priority from the start, until vm_background(false)
    bool no_jail;              // tests of argv only; never from configuration
};

// What the agent said when a session began.
struct vm_hello {
    uint64_t version, features;
    char agent_version[MSG_VERSION_MAX], kernel[96], boot_id[48];
    int64_t uptime_ms;
};

enum vm_gone { VM_GONE_SHUTDOWN = 1 /* guest powered off or rebooted */, VM_GONE_DIED = 2 };

struct vm_callbacks {
    // A session is up and complete: every command the agent holds was given to `command` before (with type
    // FRAME_COMMAND_STATE). Comes again after each reattach.
    void (*ready)(void *arg, const struct vm_hello *hello);
    // type: FRAME_COMMAND_STATE, FRAME_STARTED or FRAME_EXITED.
    void (*command)(void *arg, int type, uint64_t id, const struct msg_command *m);
    void (*output)(void *arg, uint64_t id, const struct msg_data *d);
    void (*stdin_credit)(void *arg, uint64_t id, uint64_t offset);
    void (*file_info)(void *arg, uint64_t id, const struct msg_file_result *r);
    void (*file_data)(void *arg, uint64_t id, const struct msg_data *d, bool last);
    void (*file_credit)(void *arg, uint64_t id, uint64_t offset);
    void (*file_result)(void *arg, uint64_t id, const struct msg_file_result *r, bool last);
    void (*console)(void *arg, const uint8_t *data, size_t len, uint64_t dropped); // rate-limited; bytes left out
    void (*agent_log)(void *arg, const char *text, size_t len);
    void (*vmm_log)(void *arg, const char *text, size_t len); // QEMU's stderr (capped) and QMP events worth telling
    void (*fatal)(void *arg, const char *text, size_t len);   // the guest cannot become ready
    // The session broke or the agent does not answer pings (mute), or answers again. A broken session is
    // re-established by the vm itself; file operations of the old session are void.
    void (*session)(void *arg, bool mute, bool session_lost);
    void (*io_error)(void *arg, bool paused);                 // host disk full: VM stopped; false: went on
    void (*gone)(void *arg, enum vm_gone how, const char *detail); // once; QEMU has ended
};

// Starts QEMU in its jail and connects QMP, console and both agent ports. Returns as soon as the process is started
// and known by pidfd and runtime facts; the guest is not up yet. Errors: unsupported_capability (missing program,
// code names it), unavailable/emfile …, transport_failed.
struct vm *vm_launch(const struct vm_spec *spec, struct loop *loop, const struct vm_callbacks *cb, void *arg,
                     struct err *err);

// ---- continuing from a saved state ----------------------------------------------------------------------------------
// Loads device state into a VM that was launched with `incoming`; the guest does not run yet. state_fd is read from its
// offset. Errors: snapshot_mismatch with the field `state` (QEMU refuses it), timeout, transport_failed.
int vm_restore(struct vm *vm, int state_fd, int timeout_ms, struct err *err);
// Stops and continues the virtual CPUs. A paused VM is sent no pings. vm_resume also lets a restored one run.
int vm_pause(struct vm *vm, struct err *err);
int vm_resume(struct vm *vm, struct err *err);
bool vm_is_paused(struct vm *vm);

// Holds back what is sent (it queues, within its bounds) after a last frame, and waits until the agent has taken all that
// was sent before. vm_thaw lets it go on; it is due after a failure too. Errors: timeout/agent_freeze,
// transport_failed, unsupported_capability/agent_freeze (an older agent).
struct vm_frozen {
    uint64_t disk_bytes, disk_free_bytes;
    unsigned n_commands;
};
// _begin sends and does not block (it may be called under the owner's lock, so that the owner knows what went before).
int vm_freeze_begin(struct vm *vm, struct err *err);
int vm_freeze_wait(struct vm *vm, int timeout_ms, struct vm_frozen *ret, struct err *err);
int vm_freeze(struct vm *vm, int timeout_ms, struct vm_frozen *ret, struct err *err);
void vm_thaw(struct vm *vm);

// Makes the guest somebody else, or sets its clock; waits for what the agent read back. NULL members stay as they are.
struct vm_identity {
    const uint8_t *seed;       // MSG_SEED_BYTES
    bool clock;
    const char *hostname, *machine_id, *boot_id;
};
struct vm_refreshed {
    uint8_t generation[16];
    unsigned done;             // enum msg_refresh_part
    int64_t clock_offset_ms;   // guest - host, at most half a round trip wrong
    char hostname[64], machine_id[40], boot_id[48], fault[128];
    uint8_t random[16];
};
// 0 only where everything asked for is in force and read back. Errors: timeout/agent_refresh, transport_failed,
// transport_failed/not_unique (naming the parts).
int vm_refresh(struct vm *vm, const struct vm_identity *id, int timeout_ms, struct vm_refreshed *ret, struct err *err);

// Sets the guest's wall clock and does not wait: after a pause that nobody asked for.
void vm_set_clock(struct vm *vm);
// vm_resume, vm_wait_ready until the deadline and vm_refresh in one, for a VM whose state was loaded.
int vm_resume_as(struct vm *vm, const struct vm_identity *id, int64_t deadline_mono_ms, int timeout_ms,
                 struct vm_refreshed *ret, struct err *err);

// From now on callbacks go to cb and arg. Waits for the loop: none of the old ones runs after it returns.
void vm_rebind(struct vm *vm, const struct vm_callbacks *cb, void *arg);
// Lowest scheduling priority, or back to normal, for all of QEMU's threads: best effort.
void vm_background(struct vm *vm, bool on);

#define VM_STATE_MAX (64u << 20) // device state is some 20 KiB; KVM adds little
// Device state of a stopped VM into a file (written from its start). Blocking. Errors: transport_failed, …/device_state
// (more than VM_STATE_MAX), timeout. As long as the VM stands still QEMU keeps one descriptor for it, however often it is
// saved; vm_resume takes it back.
int vm_save_state(struct vm *vm, int fd, int timeout_ms, struct err *err);
// Whether QEMU has room to save a VM that goes on; what it was given and could not give back counts. Errors:
// unavailable/state_descriptors.
int vm_save_room(struct vm *vm, struct err *err);
// Once the VM runs again: what vm_save_state gave to QEMU is closed there.
void vm_save_done(struct vm *vm);
// QEMU's process and what its memory is, for ram.h.
pid_t vm_pid(const struct vm *vm);
pid_t vm_outer_pid(const struct vm *vm);
bool vm_ram_is_file(const struct vm *vm);
// The name in QEMU's command line: the id it was launched with.
const char *vm_name(const struct vm *vm);

// Facts that adoption needs, as JSON (object new): pids with start times, uid, host boot id, accel, session marker.
// Valid after vm_launch.
json_t *vm_runtime(const struct vm *vm);

// VM_ADOPT_FAILED: it may well live, but cannot be looked at or held now (descriptors, memory): nobody must take it for gone.
enum vm_adopt_verdict { VM_ADOPTED = 0, VM_ADOPT_GONE = 1 /* no such process */, VM_ADOPT_HOST_REBOOTED = 2,
                        VM_ADOPT_FAILED = 3 };
// Takes over a VM that an earlier server started: checks pid, start time and identity (a recycled pid is not ours),
// and holds it. Nothing is called back before vm_connect, so that the owner can put *ret_vm where its callbacks look.
enum vm_adopt_verdict vm_adopt(const json_t *runtime, const char *id, int run_dirfd, struct loop *loop,
                               const struct vm_callbacks *cb, void *arg, struct vm **ret_vm, struct err *err);

// Connects an adopted VM, resumes one that is stopped for no reason (not paused); the session comes by callbacks as after
// launch. 0, or -1: nothing will be called back, and the VM is as it was.
int vm_connect(struct vm *vm, bool paused, struct err *err);

// Ends what an earlier server left of a VM (QEMU, jail, cgroup), by pid + start time. For half-made launches whose
// runtime was journaled, and for those that were not: finds processes named after id. 0, or -1 (still alive).
int vm_end_stray(const json_t *runtime_or_null, const char *id, const char *cgroup_parent, struct err *err);

// Waits until the first `ready` (true), or the deadline, fatal or gone (false with err: timeout/boot_timeout,
// transport_failed/vm_died, admission_failed/agent_version …).
bool vm_wait_ready(struct vm *vm, int64_t deadline_mono_ms, struct err *err);

// What is in force, read back from /proc after the launch: {"uid","seccomp","no_new_privs","capabilities",
// "namespaces":[…],"cgroup":{…}|null,"rlimits":{…},"bubblewrap":bool,"qemu_sha256"…}. New.
json_t *vm_isolation(struct vm *vm);

// Blocking QMP call with a deadline. Returns the `return` value (new), or NULL. Worker threads only.
json_t *vm_qmp(struct vm *vm, const char *command, json_t *arguments_stolen, int timeout_ms, struct err *err);
// The same with a descriptor (borrowed; -1: none) that QEMU receives with it.
json_t *vm_qmp_fd(struct vm *vm, const char *command, json_t *arguments_stolen, int fd, int timeout_ms,
                  struct err *err);

// Ids for commands and file operations: unique over the VM's life, also across servers; < 2^56.
uint64_t vm_next_id(struct vm *vm);

// 0, or -1: no session (transport_failed/agent_unreachable) or the bounded queue is full (unavailable/channel_busy).
int vm_send(struct vm *vm, int frame_type, uint64_t id, const struct buf *payload_or_null, struct err *err);
// The same by the bulk port: what must be in order with vm_send_data's content.
int vm_send_bulk(struct vm *vm, int frame_type, uint64_t id, const struct buf *payload_or_null, struct err *err);
// STDIN and FILE_DATA: splits and frames len bytes from `offset` on the bulk port. The caller keeps within the window
// of credits; queued bytes are bounded by VM_BULK_QUEUE_MAX per VM. All or nothing; callers exclude each other.
#define VM_BULK_QUEUE_MAX (16u << 20)
#define VM_WINDOW_BYTES (1u << 20)
int vm_send_data(struct vm *vm, int frame_type, uint64_t id, uint64_t stream, uint64_t offset, const void *data,
                 size_t len, bool last, struct err *err);

// Holds back the guest's bulk stream as a whole when the host cannot take more (all spools blocked): stops reading
// the bulk port until false. Control goes on.
void vm_hold_bulk(struct vm *vm, bool hold);

// Asks the agent to shut down, waits until grace_ms for QEMU to end, then kills. Returns whether it ended by itself.
bool vm_stop(struct vm *vm, int grace_ms);
// SIGKILL for QEMU, from any thread, at once: ends a wait for the agent; vm_end is still due.
void vm_kill(struct vm *vm);
// Kills QEMU and its jail and waits until both are reaped or gone (deadline inside). 0, or -1 (cleanup_failed).
int vm_end(struct vm *vm, struct err *err);
// Disconnects without touching the process (server shutdown: sandboxes go on) and frees. Accepts NULL.
void vm_free(struct vm *vm);

struct vm_stats {
    pid_t pid;
    uint64_t cpu_ms, rss_bytes;
    uint64_t frames_in, frames_out, violations;
    int64_t last_ping_us;
};
void vm_stats(struct vm *vm, struct vm_stats *ret);

#endif
