// ram_hold.h - a second mapping of a template's memory, in a process of its own, for as long as it is loaded. /proc counts a page
// that one process alone maps as that process's own (smaps: Private_Dirty), so that a template's pages would count as the
// memory of its only fork just now, for every tool that reads it. With this they are shared, as they are meant.
//
// Owns the process, which ends with its server, however that ends. Threads: any; blocking for milliseconds.
#ifndef AIRLOCK_QEMU_RAM_HOLD_H
#define AIRLOCK_QEMU_RAM_HOLD_H

#include <stdint.h>
#include <sys/types.h>

struct ram_hold {
    pid_t pid; // 0: none
    int fd;    // its end is the process's end
};

// program: this binary, which runs ram_hold_main for the word RAM_HOLD_COMMAND. Best effort: without it the numbers of other
// tools are off, nothing else.
#define RAM_HOLD_COMMAND "hold-memory"
void ram_hold_begin(const char *program, int ram_fd, uint64_t bytes, struct ram_hold *ret);
void ram_hold_end(struct ram_hold *h); // accepts a zeroed one
int ram_hold_main(int argc, char **argv);

#endif
