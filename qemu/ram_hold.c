#include "qemu/ram_hold.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/fd.h"
#include "qemu/ram.h"

#define RAM_FD 3
#define END_FD 4

void ram_hold_begin(const char *program, int ram_fd, uint64_t bytes, struct ram_hold *ret)
{
    char size[24];
    int end[2];
    posix_spawn_file_actions_t actions;
    *ret = (struct ram_hold){0, -1};
    if (!program || pipe2(end, O_CLOEXEC) != 0)
        return;
    // Above the numbers that they get: one must not overwrite the other.
    CLEANUP_FD int ram = fcntl(ram_fd, F_DUPFD_CLOEXEC, 10), theirs = fcntl(end[0], F_DUPFD_CLOEXEC, 10);
    close(end[0]);
    snprintf(size, sizeof size, "%" PRIu64, bytes);
    char *argv[] = {(char *)"airlock", (char *)RAM_HOLD_COMMAND, size, NULL}, *env[] = {NULL};
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ram, RAM_FD);
    posix_spawn_file_actions_adddup2(&actions, theirs, END_FD);
    pid_t pid;
    if (ram >= 0 && theirs >= 0 && posix_spawn(&pid, program, &actions, NULL, argv, env) == 0)
        *ret = (struct ram_hold){pid, end[1]};
    else
        close(end[1]);
    posix_spawn_file_actions_destroy(&actions);
}

void ram_hold_end(struct ram_hold *h)
{
    if (h->pid <= 0)
        return;
    fd_close(&h->fd);
    while (waitpid(h->pid, NULL, 0) < 0 && errno == EINTR)
        ;
    h->pid = 0;
}

// Only where there is data: a hole that is read becomes a page.
static void populate(uint8_t *map, uint64_t bytes)
{
    struct ram_runs runs = {0};
    struct err err = {0};
    if (ram_runs_of_file(RAM_FD, bytes, &runs, &err) != 0)
        return;
    for (size_t i = 0; i < runs.n; i++)
        (void)madvise(map + runs.v[i].offset, runs.v[i].pages * RAM_PAGE, MADV_POPULATE_READ);
    ram_runs_free(&runs);
}

int ram_hold_main(int argc, char **argv)
{
    const uint64_t bytes = argc == 1 ? strtoull(argv[0], NULL, 10) : 0;
    char byte;
    uint8_t *map = bytes ? mmap(NULL, bytes, PROT_READ, MAP_SHARED, RAM_FD, 0) : MAP_FAILED;
    if (map == MAP_FAILED)
        return 1;
    populate(map, bytes);
    while (read(END_FD, &byte, 1) < 0 && errno == EINTR) // nobody writes: it ends with the server
        ;
    return 0;
}
