// process.h - QEMU's process inside its jail: start, identity, end, and what is really in force. Owns pidfds.
// Blocking; worker threads.
#ifndef AIRLOCK_QEMU_PROCESS_H
#define AIRLOCK_QEMU_PROCESS_H

#include <stdatomic.h>

#include "qemu/argv.h"

struct process {
    pid_t outer, pid;            // bubblewrap; QEMU (pid 1 of its namespace)
    uint64_t outer_start, start; // start times, field 22 of /proc/PID/stat
    int outer_pidfd, pidfd;
    atomic_bool ours;            // outer is our child: to be reaped, by the loop or by who ends it
    int stderr_fd;               // what QEMU said, a sealed memory file of fixed size; -1 when adopted
    size_t stderr_told;
    uid_t uid;
};

#define PROCESS_STDERR_BYTES (64u << 10)

// Listening sockets and files for QEMU; -1 where there is none.
struct process_fds {
    int kernel, initrd, root, disk, control, bulk, qmp, console, disk_read, ram;
};

int process_start(const struct vm_spec *spec, const struct process_fds *fds, struct process *ret, struct err *err);
// By pid and start time. 0: opened; 1: gone (no such process, another start time, another name); -1 with errno: it cannot be
// told, for want of descriptors or memory, and may well live.
int process_open(pid_t outer, uint64_t outer_start, pid_t pid, uint64_t start, const char *id, struct process *ret);
void process_kill(const struct process *p);
// Kills and waits for both, reaps ours. 0, or -1 when something is left after timeout_ms.
int process_end(struct process *p, int timeout_ms);
// Exit status of our child when it has ended: bwrap's, which is QEMU's; -1 unknown.
int process_exit_status(struct process *p);
void process_close(struct process *p);
uint64_t process_start_time(pid_t pid); // 0: no such process
// Kills every process whose command line names id as ours does. Number still alive after timeout_ms; -1: not all could be
// looked at.
int process_end_named(const char *id, int timeout_ms);
json_t *process_isolation(const struct process *p);
void process_usage(const struct process *p, uint64_t *ret_cpu_ms, uint64_t *ret_rss_bytes);

#endif
