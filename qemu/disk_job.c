#include "qemu/disk_job.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/json.h"
#include "qemu/vm_int.h"

#define JOB "airlock-copy"         // job and target have one name: there is one at a time
#define DISK "data"                // of argv.c
#define QMP_MS 10000
#define STALL_MS 30000             // without a byte more
#define LOOK_FIRST_US 500          // QEMU's events are not waited for: one that is lost would be waited for ever
#define LOOK_MOST_US 10000

static int ask(struct vm *vm, const char *command, json_t *arguments_stolen, struct err *err)
{
    json_t *r = vm_qmp(vm, command, arguments_stolen, QMP_MS, err);
    json_decref(r);
    return r ? 0 : -1;
}

// ---- the job's own words ----------------------------------------------------------------------------------------------
struct look {
    bool there, concluded;
    int64_t done;
    char error[160];
};

static int look(struct vm *vm, struct look *ret, struct err *err)
{
    CLEANUP_JSON json_t *jobs = vm_qmp(vm, "query-jobs", NULL, QMP_MS, err);
    size_t i;
    json_t *one;
    memset(ret, 0, sizeof *ret);
    if (!jobs)
        return -1;
    json_array_foreach(jobs, i, one) {
        const char *id = json_get_str(one, "id"), *status = json_get_str(one, "status"), *error = json_get_str(one, "error");
        if (!id || strcmp(id, JOB) != 0)
            continue;
        ret->there = true;
        ret->concluded = status && strcmp(status, "concluded") == 0;
        ret->done = json_get_int(one, "current-progress", 0);
        snprintf(ret->error, sizeof ret->error, "%s", error ? error : "");
    }
    return 0;
}

static void pause_us(int64_t us)
{
    const struct timespec t = {.tv_nsec = us * 1000};
    nanosleep(&t, NULL);
}

// Until it has come to its end, or does not get on. *ret as it was seen last.
static int wait_concluded(struct vm *vm, struct look *ret, struct err *err)
{
    int64_t done = -1, until = 0, us = LOOK_FIRST_US;
    for (;; pause_us(us), us = us * 2 < LOOK_MOST_US ? us * 2 : LOOK_MOST_US) {
        if (look(vm, ret, err) != 0)
            return -1;
        if (!ret->there || ret->concluded)
            return 0;
        if (ret->done != done) {
            done = ret->done;
            until = clock_mono_ms() + STALL_MS;
        } else if (clock_mono_ms() > until) {
            return err_set(err, ERR_TIMEOUT, "disk_copy", "the copy of the disk did not get on for %d s", STALL_MS / 1000);
        }
    }
}

static void end(struct vm *vm)
{
    struct err err = {0};
    struct look l;
    if (look(vm, &l, &err) == 0 && l.there) {
        if (!l.concluded)
            (void)ask(vm, "job-cancel", json_pack("{s:s}", "id", JOB), &err);
        if (wait_concluded(vm, &l, &err) == 0 && l.there)
            (void)ask(vm, "job-dismiss", json_pack("{s:s}", "id", JOB), &err);
    }
    (void)ask(vm, "blockdev-del", json_pack("{s:s}", "node-name", JOB), &err);
}

// ---- the target -------------------------------------------------------------------------------------------------------
static int add_node(struct vm *vm, int64_t fdset, struct err *err)
{
    char path[48];
    snprintf(path, sizeof path, "/dev/fdset/%lld", (long long)fdset);
    // Synced by us when it is whole.
    return ask(vm, "blockdev-add",
               json_pack("{s:s, s:s, s:{s:b}, s:{s:s, s:s, s:s, s:{s:b}}}", "driver", "raw", "node-name", JOB, "cache",
                         "no-flush", 1, "file", "driver", "file", "filename", path, "locking", "off", "cache", "no-flush", 1),
               err);
}

static bool node_there(struct vm *vm)
{
    struct err err = {0};
    CLEANUP_JSON json_t *nodes = vm_qmp(vm, "query-named-block-nodes", json_pack("{s:b}", "flat", 1), QMP_MS, &err);
    size_t i;
    json_t *one;
    json_array_foreach(nodes, i, one) {
        const char *name = json_get_str(one, "node-name");
        if (name && strcmp(name, JOB) == 0)
            return true;
    }
    return false;
}

int disk_job_open(struct vm *vm, int to_fd, uint64_t bytes, struct disk_job *ret, struct err *err)
{
    struct err again = {0};
    if (ftruncate(to_fd, (off_t)bytes) != 0)
        return err_sys(err, errno, "making a copy of a disk");
    CLEANUP_JSON json_t *set = vm_qmp_fd(vm, "add-fd", json_pack("{s:s}", "opaque", JOB), to_fd, QMP_MS, err);
    if (!set)
        return -1;
    const int64_t fdset = json_get_int(set, "fdset-id", 0);
    int failed = add_node(vm, fdset, err);
    if (failed && node_there(vm)) { // of a server that was killed while it copied
        end(vm); // its descriptor goes with the next close
        failed = add_node(vm, fdset, &again);
        *err = again;
    }
    *ret = (struct disk_job){.open = true};
    if (failed)
        disk_job_close(vm, ret);
    return failed;
}

void disk_job_sweep(struct vm *vm)
{
    if (!node_there(vm))
        return;
    end(vm);
    vm_fds_close(vm, JOB);
}

// ---- the copy -----------------------------------------------------------------------------------------------------------
int disk_job_start(struct vm *vm, struct disk_job *j, struct err *err)
{
    const int failed = ask(vm, "blockdev-backup",
                           json_pack("{s:s, s:s, s:s, s:s, s:b, s:s, s:s, s:i}", "job-id", JOB, "device", DISK, "target", JOB,
                                     "sync", "full", "auto-dismiss", 0, "on-source-error", "report", "on-target-error",
                                     "report", "speed", 1), // a byte a second: it would keep QEMU from the rest of the pause
                           err);
    j->started = !failed;
    return failed;
}

int disk_job_wait(struct vm *vm, struct err *err)
{
    struct look l;
    struct err over = {0};
    (void)ask(vm, "block-job-set-speed", json_pack("{s:s, s:i}", "device", JOB, "speed", 0), &over); // refused: it is done
    if (wait_concluded(vm, &l, err) != 0)
        return -1;
    if (l.there && !*l.error)
        return 0;
    if (strstr(l.error, strerror(ENOSPC)) || strstr(l.error, strerror(EDQUOT)))
        return err_set(err, ERR_UNAVAILABLE, "disk_full", "the host has no room for a copy of the disk");
    return err_set(err, ERR_INTERNAL, "disk_copy", "the disk could not be copied");
}

void disk_job_close(struct vm *vm, struct disk_job *j)
{
    struct err err = {0};
    if (!j->open)
        return;
    if (j->started)
        end(vm);
    else
        (void)ask(vm, "blockdev-del", json_pack("{s:s}", "node-name", JOB), &err);
    vm_fds_close(vm, JOB); // also one that was not closed yet, because the guest stood still
    *j = (struct disk_job){0};
}
