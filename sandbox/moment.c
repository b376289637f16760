// One moment of a sandbox: taken from its VM, and put back into memory from its files.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sandbox/carry.h"
#include "sandbox/cold.h"
#include "sandbox/disk.h"

#define FREEZE_MS 5000
#define QMP_MS 30000
#define GUEST_DISK_FULL_PERCENT 95 // a guest that cannot write cannot be trusted to come back in order

// ---- what memory differs from ---------------------------------------------------------------------------------------
static int base_refuse(const char *what, struct err *err)
{
    err_set(err, ERR_SNAPSHOT_MISMATCH, "snapshot_mismatch", "what the sandbox began from is not there as it was: %s", what);
    err_remedy(err, "put it back; until then the sandbox runs on, and cannot be saved or forked");
    return err_field(err, what, "missing or different");
}

// Pages that an origin had beside its template: kept by launch.c.
static int base_load(int dirfd, const char *digest, uint64_t bytes, struct ram_runs *ret, struct err *err)
{
    uint8_t hash[SHA256_BYTES];
    char found[DIGEST_TEXT_MAX];
    CLEANUP_FD int fd = openat(dirfd, "base.runs", O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0 && errno != ENOENT)
        return err_sys(err, errno, "reading what a sandbox is based on");
    if (fd >= 0 && crypto_sha256_fd(fd, hash, NULL, err) != 0)
        return -1;
    if (fd < 0 || strcmp(crypto_digest_text(hash, found), digest) != 0)
        return base_refuse("base.runs", err);
    return ram_runs_load(fd, bytes, ret, err);
}

static int base_from_file(struct sandbox *s, const struct sandbox_row *row, struct base *b, struct err *err)
{
    CLEANUP_JSON json_t *o = row->origin_json ? json_loads(row->origin_json, 0, NULL) : NULL;
    const char *key = json_get_str(o, "template"), *manifest = json_get_str(o, "template_manifest");
    const char *runs = json_get_str(o, "base_runs");
    snprintf(b->template_key, sizeof b->template_key, "%s", key ? key : "");
    snprintf(b->template_manifest, sizeof b->template_manifest, "%s", manifest ? manifest : "");
    return runs ? base_load(s->dirfd, runs, (uint64_t)row->memory_mib << 20, &b->runs, err) : 0;
}

static int check_template(struct manager *m, const struct base *b, struct err *err)
{
    CLEANUP_JSON json_t *mismatches = json_array();
    if (*b->template_key && template_check(m, b->template_key, b->template_manifest, mismatches, err) != 0)
        return -1;
    return json_array_size(mismatches) == 0 ? 0 : base_refuse("template", err);
}

int base_of(struct sandbox *s, struct base *ret, struct err *err)
{
    struct base b = {0};
    pthread_mutex_lock(&s->lock);
    struct origin *o = s->origin ? origin_ref(s->m, s->origin) : NULL;
    pthread_mutex_unlock(&s->lock);
    int failed = 0;
    if (o) {
        const struct ram_runs none = {0};
        snprintf(b.template_key, sizeof b.template_key, "%s", o->template_key);
        snprintf(b.template_manifest, sizeof b.template_manifest, "%s", o->template_manifest);
        failed = ram_runs_union(&o->runs, &none, &b.runs) != 0 ? err_sys(err, ENOMEM, "listing pages") : 0;
    } else {
        struct sandbox_info *view = sandbox_view(s);
        failed = base_from_file(s, &view->row, &b, err);
        sandbox_info_unref(view);
    }
    origin_unref(s->m, o);
    if (!failed)
        failed = check_template(s->m, &b, err);
    if (failed)
        base_free(&b);
    else
        *ret = b;
    return failed;
}

void base_free(struct base *b)
{
    ram_runs_free(&b->runs);
}

static json_t *machine_here(struct manager *m, const struct sandbox_row *row, struct err *err)
{
    struct image_runtime runtime;
    if (images_runtime(m->images, &runtime, err) != 0)
        return NULL;
    CLEANUP_JSON json_t *backend = row->backend_json ? json_loads(row->backend_json, 0, NULL) : NULL;
    const char *accel = json_get_str(backend, "accel");
    const struct machine_parts parts = {.image_digest = row->image_digest, .qemu_digest = m->host.qemu_sha256,
                                        .qemu_version = m->host.qemu_version, .runtime = &runtime,
                                        .accel = accel && strcmp(accel, "kvm") == 0 ? VM_ACCEL_KVM : VM_ACCEL_TCG,
                                        .vcpus = row->vcpus, .memory_mib = row->memory_mib, .disk_mib = row->disk_mib,
                                        .tsc_khz = m->host.tsc_khz, .host_cpu = m->host.cpu_sha256};
    return machine_of(&parts);
}

json_t *machine_of_row(struct manager *m, const struct sandbox_row *row, struct err *err)
{
    CLEANUP_JSON json_t *runtime = row->runtime_json ? json_loads(row->runtime_json, 0, NULL) : NULL;
    json_t *launched = json_object_get(runtime, "machine");
    return launched ? json_incref(launched) : machine_here(m, row, err);
}

int machine_fits(struct sandbox *s, struct err *err)
{
    struct sandbox_info *view = sandbox_view(s);
    CLEANUP_JSON json_t *mismatches = json_array();
    CLEANUP_JSON json_t *here = machine_here(s->m, &view->row, err), *its = here ? machine_of_row(s->m, &view->row, err) : NULL;
    sandbox_info_unref(view);
    if (!its)
        return -1;
    machine_compare(its, here, mismatches);
    return saved_refuse(mismatches, err);
}

// ---- taking -----------------------------------------------------------------------------------------------------------
struct watch {
    struct sandbox *s;
    struct carry carry;
};

static void at_step(void *arg, const char *step)
{
    struct watch *w = arg;
    crash_point(w->s, step);
    if (strcmp(step, "cont") == 0) // the guest stands still: no byte more has been produced than is counted now
        carry_offsets(w->s, &w->carry);
}

static int freeze(struct sandbox *s, struct vm *vm, bool with_disk, struct watch *w, struct moment *mo, struct err *err)
{
    struct vm_frozen f;
    const int64_t t = clock_mono_us();
    pthread_mutex_lock(&s->lock);
    int failed = vm_freeze_begin(vm, err); // what was sent is before it, what will be is after
    if (!failed)
        carry_sent_locked(s, &w->carry);
    pthread_mutex_unlock(&s->lock);
    if (!failed)
        failed = vm_freeze_wait(vm, FREEZE_MS, &f, err);
    mo->freeze_us = clock_mono_us() - t;
    if (failed)
        return -1;
    mo->disk_bytes = f.disk_bytes;
    mo->disk_free_bytes = f.disk_free_bytes;
    if (!with_disk || f.disk_bytes == 0 || f.disk_free_bytes * 100 > f.disk_bytes * (100 - GUEST_DISK_FULL_PERCENT))
        return 0;
    err_set(err, ERR_CONFLICT, "guest_disk_full", "the guest's disk is %d %% full or more", GUEST_DISK_FULL_PERCENT);
    return err_remedy(err, "remove files in the sandbox first");
}

// A copy by QEMU takes for a while as much as the disk is large: promised, so that two at once do not both count on it.
static bool promise_room(struct manager *m, uint64_t bytes)
{
    struct err err = {0};
    const uint64_t promised = atomic_fetch_add(&m->copying_bytes, bytes);
    if (room_for(m, promised + bytes, &err) == 0)
        return true;
    atomic_fetch_sub(&m->copying_bytes, bytes);
    return false;
}

int moment_take(struct sandbox *s, int state_fd, int disk_to_fd, bool go_on, struct moment *ret, struct err *err)
{
    struct moment mo = {0};
    struct watch w = {.s = s};
    pthread_mutex_lock(&s->lock);
    struct vm *vm = s->vm;
    const uint64_t bytes = (uint64_t)s->info->row.memory_mib << 20;
    pthread_mutex_unlock(&s->lock);
    if (!vm)
        return err_set(err, ERR_TRANSPORT_FAILED, "vm_gone", "the virtual machine has ended");
    if (base_of(s, &mo.base, err) != 0)
        return -1;
    CLEANUP_FD int disk = disk_to_fd >= 0 ? disk_open(s->dirfd, err) : -1;
    const bool was_paused = vm_is_paused(vm);
    int failed = disk_to_fd >= 0 && disk < 0 ? -1 : 0;
    crash_point(s, "freeze");
    if (!failed && was_paused)
        carry_all(s, &w.carry);
    else if (!failed)
        failed = freeze(s, vm, disk_to_fd >= 0, &w, &mo, err);
    struct stat st = {0};
    const bool later = !failed && disk >= 0 && fstat(disk, &st) == 0 && promise_room(s->m, (uint64_t)st.st_size);
    const struct capture_spec spec = {.ram_bytes = bytes, .copy_later = later, .state_fd = state_fd,
                                      .disk_from = disk, .disk_to = disk_to_fd,
                                      .base = &mo.base.runs, .go_on = go_on, .timeout_ms = QMP_MS, .at = at_step, .arg = &w};
    if (!failed)
        failed = vm_capture(vm, &spec, &mo.capture, err);
    if (!was_paused && (go_on || failed)) {
        vm_thaw(vm);
        vm_set_clock(vm); // it stood still
    }
    crash_point(s, "disk");
    if (!failed)
        failed = vm_capture_disk(vm, &mo.capture, err);
    if (later)
        atomic_fetch_sub(&s->m->copying_bytes, (uint64_t)st.st_size);
    if (!failed)
        mo.commands = carry_json(&w.carry);
    carry_free(&w.carry);
    if (failed)
        moment_free(&mo);
    else
        *ret = mo;
    return failed;
}

static int room(struct manager *m, uint64_t bytes, uint64_t promised, const char *what, struct err *err)
{
    const int64_t left = fd_free_bytes(m->snapshots_dirfd);
    if (left < 0 || (uint64_t)left >= bytes + promised + ((uint64_t)m->o.disk_reserve_mib << 20))
        return 0;
    err_set(err, ERR_UNAVAILABLE, "disk_full", "the host has no room for %llu MiB of %s",
            (unsigned long long)(bytes >> 20) + 1, what);
    return err_remedy(err, "delete snapshots or sandboxes, or free space on the host");
}

int room_for(struct manager *m, uint64_t bytes, struct err *err)
{
    return room(m, bytes, atomic_load(&m->promised_bytes), "saved state", err);
}

int room_promise(struct manager *m, uint64_t bytes, struct err *err)
{
    const uint64_t promised = atomic_fetch_add(&m->promised_bytes, bytes);
    const int refused = room(m, bytes, promised, "copies of a disk", err);
    if (refused)
        atomic_fetch_sub(&m->promised_bytes, bytes);
    return refused;
}

void room_give(struct manager *m, uint64_t bytes)
{
    atomic_fetch_sub(&m->promised_bytes, bytes);
}

uint64_t room_of_disk(int dirfd, const char *path)
{
    struct stat st;
    return fstatat(dirfd, path, &st, AT_SYMLINK_NOFOLLOW) == 0 ? (uint64_t)st.st_blocks * 512 : 0;
}

void moment_free(struct moment *mo)
{
    capture_free(&mo->capture);
    base_free(&mo->base);
    json_decref(mo->commands);
    mo->commands = NULL;
}

// ---- putting back -------------------------------------------------------------------------------------------------------
int saved_refuse(const json_t *mismatches, struct err *err)
{
    const size_t n = json_array_size(mismatches);
    char names[200] = "";
    if (n == 0)
        return 0;
    for (size_t i = 0; i < n; i++) {
        const char *field = json_get_str(json_array_get(mismatches, i), "field");
        const size_t at = strlen(names);
        snprintf(names + at, sizeof names - at, "%s%s", at ? ", " : "", field);
    }
    err_set(err, ERR_SNAPSHOT_MISMATCH, "snapshot_mismatch", "the saved state cannot be continued here: %s", names);
    err_remedy(err, "ask for its compat; restore it where it was made, or make a new one");
    for (size_t i = 0; i < n; i++) {
        const json_t *one = json_array_get(mismatches, i);
        const char *expected = json_get_str(one, "expected"), *found = json_get_str(one, "found");
        err_field(err, json_get_str(one, "field"), "expected %.80s, found %.80s", expected ? expected : "none",
                  found ? found : "none");
    }
    return -1;
}

static int load_disk(const struct saved *s, struct origin *o, json_t *mismatches, struct err *err)
{
    o->disk_fd = saved_open_disk(s, mismatches, err);
    return o->disk_fd == -1 ? -1 : 0;
}

// What one sandbox alone continues from is put over the template's pages in its own QEMU, where they are copied as it
// writes: nothing of the template is copied, and what it shares with others stays shared.
static int load_apart(const struct saved *s, struct origin *base, struct origin *o, json_t *mismatches, struct err *err)
{
    o->ram_fd = fcntl(base->ram_fd, F_DUPFD_CLOEXEC, 3);
    if (o->ram_fd < 0)
        return err_sys(err, errno, "sharing a template");
    return saved_load_apart(s, o->ram_bytes, &o->put_runs, &o->put_pages, &o->put_mapped, &o->state_fd, mismatches, err);
}

static int load_memory(struct manager *m, const struct saved *s, bool apart, struct origin *o, json_t *mismatches,
                       struct err *err)
{
    const char *key = json_get_str(s->manifest, "template"), *manifest = json_get_str(s->manifest, "template_manifest");
    struct origin *base = NULL;
    if (key && *key && origin_base(m, key, manifest ? manifest : "", &base, mismatches, err) != 0)
        return -1;
    if (json_array_size(mismatches) > 0)
        return 0;
    snprintf(o->template_key, sizeof o->template_key, "%s", key ? key : "");
    snprintf(o->template_manifest, sizeof o->template_manifest, "%s", manifest ? manifest : "");
    if (base && apart) {
        const int left = load_apart(s, base, o, mismatches, err);
        o->base_signature = base->signature;
        o->base = base; // the reference: it is in use as long as this one is
        return left;
    }
    o->ram_fd = ram_new(o->ram_bytes, err);
    int failed = o->ram_fd < 0 || (base && ram_copy(base->ram_fd, o->ram_fd, o->ram_bytes, err) != 0);
    if (base)
        o->base_signature = base->signature;
    origin_unref(m, base);
    if (!failed)
        failed = saved_load(s, o->ram_fd, o->ram_bytes, &o->runs, &o->state_fd, mismatches, err) != 0 ||
                 ram_seal(o->ram_fd, err) != 0;
    return failed ? -1 : 0;
}

int saved_origin(struct manager *m, const struct saved *s, const json_t *machine, bool with_disk, json_t *mismatches,
                 struct origin **ret, struct err *err)
{
    struct origin *o = origin_new();
    if (!o)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    if (json_array_size(mismatches) == 0)
        machine_compare(json_object_get(s->manifest, "machine"), machine, mismatches);
    o->ram_bytes = (uint64_t)json_get_int(machine, "memory_mib", 0) << 20;
    // Only what is in order so far is worth reading; nothing of it is used where something is not.
    int failed = saved_refuse(mismatches, err);
    if (!failed)
        failed = load_memory(m, s, !with_disk && m->host.is_root, o, mismatches, err);
    if (!failed && with_disk)
        failed = load_disk(s, o, mismatches, err);
    if (!failed)
        failed = saved_verify_rest(s, mismatches, err);
    if (!failed)
        failed = saved_refuse(mismatches, err);
    if (!failed && !with_disk && !o->base)
        origin_count(m, o); // of a cold sandbox: it is in no cache
    if (failed)
        origin_unref(m, o);
    else
        *ret = o;
    return failed;
}
