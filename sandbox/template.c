// Templates: a boot of our own, warmed, stopped, and kept. Also what is on disk of them: loading, evicting.
#include "sandbox/origin.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "qemu/capture.h"
#include "sandbox/disk.h"
#include "sandbox/internal.h"
#include "sandbox/saved.h"
#include "sandbox/warm.h"

#define WARM_ROUNDS 4       // after three the guest's page cache does not grow any more
#define FREEZE_MS 5000
#define QMP_MS 20000

// The directory's name: the hex digits of the key.
const char *template_name(const char *key)
{
    return strncmp(key, "sha256:", 7) == 0 ? key + 7 : key;
}

struct template_build {
    struct template_build *next;        // of origins.builds, while it has a VM
    struct manager *m;
    const struct machine_parts *parts;
    struct origin *o;
    json_t *machine;
    char id[ID_MAX];                    // names the process and its run directory
    int run_dirfd, kernel_fd, initrd_fd, root_fd;
    unsigned uid;
    struct saved_writer w;
    struct warm warm;
    struct vm *vm;
};

static int open_blobs(struct template_build *b, struct err *err)
{
    struct images *im = b->m->images;
    b->kernel_fd = images_open_blob(im, b->parts->runtime->kernel_digest, err);
    b->initrd_fd = b->kernel_fd < 0 ? -1 : images_open_blob(im, b->parts->runtime->initramfs_digest, err);
    b->root_fd = b->initrd_fd < 0 ? -1 : images_open_blob(im, b->parts->image_digest, err);
    return b->root_fd < 0 ? -1 : 0;
}

// Known while it has a VM, so that a clean stop ends it (templates_stop).
static void build_list(struct template_build *b)
{
    struct origins *os = &b->m->origins;
    pthread_mutex_lock(&os->lock);
    b->next = os->builds;
    os->builds = b;
    pthread_mutex_unlock(&os->lock);
}

static void build_unlist(struct template_build *b)
{
    struct origins *os = &b->m->origins;
    pthread_mutex_lock(&os->lock);
    for (struct template_build **at = &os->builds; *at; at = &(*at)->next)
        if (*at == b) {
            *at = b->next;
            break;
        }
    pthread_mutex_unlock(&os->lock);
}

void templates_stop(struct manager *m)
{
    pthread_mutex_lock(&m->origins.lock);
    for (struct template_build *b = m->origins.builds; b; b = b->next)
        vm_kill(b->vm);
    pthread_mutex_unlock(&m->origins.lock);
}

static int boot(struct template_build *b, struct err *err)
{
    struct manager *m = b->m;
    id_new(ID_SANDBOX, b->id);
    if (mkdirat(m->run_dirfd, b->id, 0700) != 0 ||
        (b->run_dirfd = openat(m->run_dirfd, b->id, O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0)
        return err_sys(err, errno, "making a template's directory");
    if (manager_uid_take(m, &b->uid, err) != 0)
        return -1;
    const struct vm_spec spec = {.id = b->id, .accel = b->parts->accel, .qemu_path = m->o.qemu_path,
                                 .vcpus = b->parts->vcpus, .memory_mib = b->parts->memory_mib,
                                 .tsc_khz = m->host.tsc_khz, .kernel_fd = b->kernel_fd, .initrd_fd = b->initrd_fd,
                                 .root_fd = b->root_fd, .disk_fd = b->w.disk_fd, .ram_fd = b->o->ram_fd, .ram_shared = true,
                                 .background = true,
                                 .run_dirfd = b->run_dirfd, .jail_uid = b->uid, .cgroup_parent = m->o.cgroup_parent};
    b->vm = vm_launch(&spec, m->loop, &WARM_CALLBACKS, &b->warm, err);
    if (!b->vm)
        return -1;
    build_list(b);
    if (manager_stopping(m))
        return err_set(err, ERR_UNAVAILABLE, "stopping", "the server stops");
    if (!vm_wait_ready(b->vm, clock_mono_ms() + m->o.boot_timeout_ms, err))
        return -1;
    crash_point(NULL, "template.warm");
    if (warm_up(&b->warm, b->vm, WARM_ROUNDS, err) != 0)
        return -1;
    // Each fork begins with a refresh: what that needs is in the guest's caches after one.
    struct vm_refreshed r;
    uint8_t seed[MSG_SEED_BYTES];
    const struct vm_identity nobody = {.seed = seed, .clock = true, .hostname = b->id, .machine_id = WARM_MACHINE_ID,
                                       .boot_id = WARM_BOOT_ID};
    if (crypto_random(seed, sizeof seed) != 0)
        return err_set(err, ERR_INTERNAL, "no_entropy", "the host has no entropy");
    return vm_refresh(b->vm, &nobody, WARM_REFRESH_MS, &r, err);
}

static int stop_and_save(struct template_build *b, struct err *err)
{
    struct vm_frozen frozen;
    struct capture c = {0};
    const struct capture_spec spec = {.ram_bytes = b->o->ram_bytes, .state_fd = b->w.state_fd, .disk_from = -1,
                                      .disk_to = -1, .timeout_ms = QMP_MS};
    crash_point(NULL, "template.save");
    if (vm_freeze(b->vm, FREEZE_MS, &frozen, err) != 0 || vm_capture(b->vm, &spec, &c, err) != 0)
        return -1;
    capture_free(&c);
    build_unlist(b);
    struct vm *vm = b->vm;
    b->vm = NULL;
    const int failed = vm_end(vm, err);
    vm_free(vm);
    return failed ? -1 : ram_seal(b->o->ram_fd, err);
}

// Packs the template's pages for its file.
static int keep(struct template_build *b, struct err *err)
{
    struct origin *o = b->o;
    struct ram_runs runs = {0};
    struct saved_result r = {0};
    crash_point(NULL, "template.write");
    if (ram_runs_of_file(o->ram_fd, o->ram_bytes, &runs, err) != 0)
        return -1;
    const uint64_t bytes = ram_runs_bytes(&runs);
    uint8_t *packed = malloc(bytes + 1);
    const uint8_t *ram = mmap(NULL, o->ram_bytes, PROT_READ, MAP_PRIVATE, o->ram_fd, 0);
    const bool there = packed && ram != MAP_FAILED;
    int failed = there ? 0 : err_sys(err, ENOMEM, "reading a template");
    for (size_t i = 0, at = 0; there && i < runs.n; i++) {
        memcpy(packed + at, ram + runs.v[i].offset, runs.v[i].pages * RAM_PAGE);
        at += runs.v[i].pages * RAM_PAGE;
    }
    const struct saved_facts f = {.kind = "template", .id = o->key, .template_key = "", .template_manifest = "",
                                  .machine = b->machine};
    if (!failed)
        failed = saved_finish(&b->w, &f, &runs, packed, &r, err);
    json_decref(r.sizes);
    json_decref(r.digests);
    if (ram != MAP_FAILED)
        munmap((void *)ram, o->ram_bytes);
    free(packed);
    ram_runs_free(&runs);
    return failed;
}

static void build_end(struct template_build *b)
{
    struct manager *m = b->m;
    struct err ignored = {0};
    build_unlist(b);
    if (b->vm) {
        (void)vm_end(b->vm, &ignored);
        vm_free(b->vm);
    }
    if (b->uid)
        manager_uid_give(m, b->uid);
    fd_close(&b->run_dirfd);
    fd_close(&b->kernel_fd);
    fd_close(&b->initrd_fd);
    fd_close(&b->root_fd);
    if (*b->id)
        (void)fd_remove_tree(m->run_dirfd, b->id, NULL);
    saved_abort(&b->w);
    warm_free(&b->warm);
    json_decref(b->machine);
}

static void count(struct manager *m, uint64_t *counter)
{
    pthread_mutex_lock(&m->origins.lock);
    *counter += 1;
    pthread_mutex_unlock(&m->origins.lock);
}

int template_make(struct manager *m, const struct machine_parts *parts, struct origin *o, struct err *err)
{
    struct template_build b = {.m = m, .parts = parts, .o = o, .run_dirfd = -1, .kernel_fd = -1, .initrd_fd = -1, .root_fd = -1,
                               .machine = machine_of(parts)};
    warm_init(&b.warm);
    o->ram_bytes = (uint64_t)parts->memory_mib << 20;
    fd_close(&o->ram_fd);
    o->ram_fd = ram_new(o->ram_bytes, err);
    int failed = o->ram_fd < 0 || open_blobs(&b, err) != 0 ||
                 saved_begin(m->store, m->origins.templates_dirfd, template_name(o->key), true, &b.w, err) != 0 ||
                 disk_fill(m->o.state_dirfd, b.w.disk_fd, parts->disk_mib, err) != 0 || boot(&b, err) != 0 ||
                 stop_and_save(&b, err) != 0 || keep(&b, err) != 0;
    build_end(&b);
    if (!failed) { // the state as it was written, and checked on the way back
        fd_close(&o->ram_fd);
        failed = template_load(m, o->key, o, err) != 0;
        if (!failed)
            count(m, &m->origins.made);
    }
    if (failed) {
        fd_close(&o->ram_fd);
        if (err->kind == ERR_NONE)
            err_set(err, ERR_INTERNAL, "template_failed", "the template could not be made");
    }
    return failed ? -1 : 0;
}

// ---- on disk ----------------------------------------------------------------------------------------------------------
static void say_mismatches(const char *key, const json_t *mismatches)
{
    size_t i;
    json_t *one;
    json_array_foreach(mismatches, i, one)
        log_warn_limited("template %.20s: %s: expected %s, found %s", key, json_get_str(one, "field"),
                 json_get_str(one, "expected"), json_get_str(one, "found"));
}

static int load(struct manager *m, const struct saved *s, struct origin *o, json_t *mismatches, struct err *err)
{
    const json_t *machine = json_object_get(s->manifest, "machine");
    o->ram_bytes = (uint64_t)json_get_int(machine, "memory_mib", 0) << 20;
    (void)m;
    if (o->ram_bytes == 0 || o->ram_bytes > (uint64_t)LIMIT_MEMORY_MIB_MAX << 20) {
        saved_mismatch(mismatches, "memory_mib", "a size", "none");
        return 0;
    }
    o->ram_fd = ram_new(o->ram_bytes, err);
    if (o->ram_fd < 0 || saved_load(s, o->ram_fd, o->ram_bytes, NULL, &o->state_fd, mismatches, err) != 0)
        return -1;
    o->disk_fd = saved_open_disk(s, mismatches, err);
    if (o->disk_fd == -1 || saved_verify_rest(s, mismatches, err) != 0)
        return -1;
    return ram_seal(o->ram_fd, err);
}

int template_load(struct manager *m, const char *key, struct origin *o, struct err *err)
{
    struct saved s = {0};
    CLEANUP_JSON json_t *mismatches = json_array();
    const struct saved_expect expect = {.kind = "template", .id = key, .epoch = 0};
    if (saved_open(m->store, m->origins.templates_dirfd, template_name(key), &expect, &s, mismatches, err) != 0) {
        const bool missing = err->kind == ERR_NOT_FOUND;
        if (missing)
            memset(err, 0, sizeof *err);
        return missing ? TEMPLATE_MISSING : -1;
    }
    const int failed = json_array_size(mismatches) == 0 ? load(m, &s, o, mismatches, err) : 0;
    if (!failed && json_array_size(mismatches) == 0) {
        o->signature = s.signature;
        snprintf(o->template_manifest, sizeof o->template_manifest, "%s", s.manifest_sha256);
        (void)futimens(s.dirfd, NULL); // used now: eviction goes by it
        saved_verified(&s);
    }
    saved_close(&s);
    if (!failed && json_array_size(mismatches) == 0) {
        snprintf(o->template_key, sizeof o->template_key, "%s", key);
        ram_hold_begin(m->o.own_program, o->ram_fd, o->ram_bytes, &o->hold);
        count(m, &m->origins.loaded);
        return 0;
    }
    fd_close(&o->ram_fd);
    fd_close(&o->state_fd);
    fd_close(&o->disk_fd);
    if (failed)
        return -1;
    say_mismatches(key, mismatches);
    return TEMPLATE_DAMAGED;
}

bool template_same(const char *manifest, const char *found, json_t *mismatches)
{
    if (*manifest && strcmp(manifest, found) == 0)
        return true;
    saved_mismatch(mismatches, "template", *manifest ? manifest : "none", found);
    return false;
}

int template_check(struct manager *m, const char *key, const char *manifest, json_t *mismatches, struct err *err)
{
    struct saved s = {0};
    CLEANUP_JSON json_t *faults = json_array();
    const struct saved_expect expect = {.kind = "template", .id = key, .epoch = 0};
    if (origin_current(m, key, manifest))
        return 0;
    if (saved_open(m->store, m->origins.templates_dirfd, template_name(key), &expect, &s, faults, err) != 0) {
        if (err->kind != ERR_NOT_FOUND)
            return -1;
        memset(err, 0, sizeof *err);
        (void)template_same(manifest, "missing", mismatches);
        return 0;
    }
    const int failed = json_array_size(faults) == 0 ? saved_verify(&s, faults, err) : 0;
    if (!failed)
        (void)template_same(manifest, json_array_size(faults) == 0 ? s.manifest_sha256 : "damaged", mismatches);
    say_mismatches(key, faults);
    saved_close(&s);
    return failed;
}

// ---- eviction -----------------------------------------------------------------------------------------------------------
static void need(json_t *needed, const char *key)
{
    if (key && *key)
        json_object_set_new(needed, template_name(key), json_true());
}

static bool need_snapshot(void *arg, const struct snapshot_row *row)
{
    need(arg, row->template_key);
    return true;
}

// What snapshots, live and cold sandboxes go back to. Sandboxes first: one that ends with its snapshot is seen as what it was,
// or its snapshot is.
static int list_bases(struct manager *m, json_t *needed, struct err *err)
{
    size_t n;
    struct sandbox **all = registry_all(m, &n);
    if (!all)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    for (size_t i = 0; i < n; i++) {
        struct sandbox_info *view = sandbox_view(all[i]);
        CLEANUP_JSON json_t *o = view->row.origin_json ? json_loads(view->row.origin_json, 0, NULL) : NULL;
        if (view->row.state != SANDBOX_STOPPED && view->row.state != SANDBOX_FAILED) // which boot, if at all
            need(needed, json_get_str(o, "template"));
        sandbox_info_unref(view);
        sandbox_unref(all[i]);
    }
    free(all);
    return snapshot_each_alive_all_tenants(m->store, need_snapshot, needed, err);
}

static int list_needed(struct manager *m, json_t *needed, struct err *err)
{
    if (list_bases(m, needed, err) != 0)
        return -1;
    pthread_mutex_lock(&m->origins.lock);
    for (const struct origin *o = m->origins.list; o; o = o->next) {
        if (o->state == ORIGIN_READY && o->refs == 1)
            continue; // loaded, but nobody uses it now
        need(needed, o->key);
        if (o->state == ORIGIN_READY) // else who makes it may write there now
            need(needed, o->template_key);
    }
    pthread_mutex_unlock(&m->origins.lock);
    return 0;
}

bool template_needed(struct manager *m, const char *key)
{
    struct err err = {0};
    CLEANUP_JSON json_t *needed = json_object();
    return list_bases(m, needed, &err) != 0 || json_object_get(needed, template_name(key));
}

struct kept {
    char name[96];
    uint64_t bytes;
    int64_t used_ms;
    bool needed;
};

static uint64_t bytes_of(int dirfd)
{
    static const char *const FILES[] = {"state", "memory", "disk.raw"};
    struct stat st;
    uint64_t sum = 0;
    for (size_t i = 0; i < sizeof FILES / sizeof *FILES; i++)
        sum += fstatat(dirfd, FILES[i], &st, AT_SYMLINK_NOFOLLOW) == 0 ? (uint64_t)st.st_blocks * 512 : 0;
    return sum;
}

static size_t list_kept(struct manager *m, const json_t *needed, struct kept *kept, size_t most)
{
    size_t n = 0;
    const int fd = openat(m->origins.templates_dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = fd >= 0 ? fdopendir(fd) : NULL;
    if (!d) {
        fd_close(&(int){fd});
        return 0;
    }
    for (const struct dirent *e; n < most && (e = readdir(d));) {
        struct stat st;
        CLEANUP_FD int dir = e->d_name[0] == '.' ? -1 : openat(m->origins.templates_dirfd, e->d_name,
                                                               O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
        if (dir < 0 || fstat(dir, &st) != 0)
            continue;
        struct kept *k = &kept[n++];
        snprintf(k->name, sizeof k->name, "%.90s", e->d_name);
        k->bytes = bytes_of(dir);
        k->used_ms = (int64_t)st.st_mtim.tv_sec * 1000 + st.st_mtim.tv_nsec / 1000000;
        k->needed = json_object_get(needed, e->d_name) != NULL;
    }
    closedir(d);
    return n;
}

// What an earlier server had begun to write.
void templates_sweep(struct manager *m)
{
    const int fd = openat(m->origins.templates_dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = fd >= 0 ? fdopendir(fd) : NULL;
    if (!d) {
        fd_close(&(int){fd});
        return;
    }
    for (const struct dirent *e; (e = readdir(d));)
        if (e->d_name[0] == '.' && strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
            (void)fd_remove_tree(m->origins.templates_dirfd, e->d_name, NULL);
    closedir(d);
}

// A directory that is on its way out has a name that the next start sweeps.
static bool remove_kept(struct manager *m, const struct kept *k)
{
    char hidden[sizeof k->name + 8];
    snprintf(hidden, sizeof hidden, ".gone-%s", k->name);
    if (!origin_retire(m, k->name, hidden))
        return false;
    log_info("template %.12s: removed from disk", k->name);
    (void)fd_remove_tree(m->origins.templates_dirfd, hidden, NULL);
    return true;
}

static bool later(const struct kept *a, const struct kept *b)
{
    return !b || a->used_ms > b->used_ms;
}

void templates_evict(struct manager *m)
{
    struct err err = {0};
    struct kept kept[256], *last = NULL;
    uint64_t sum = 0;
    CLEANUP_JSON json_t *needed = json_object();
    if (list_needed(m, needed, &err) != 0)
        return;
    const size_t n = list_kept(m, needed, kept, sizeof kept / sizeof *kept);
    for (size_t i = 0; i < n; i++) {
        sum += kept[i].bytes;
        last = later(&kept[i], last) ? &kept[i] : last;
    }
    while (sum > (uint64_t)m->o.template_disk_mib << 20) {
        struct kept *oldest = NULL;
        for (size_t i = 0; i < n; i++)
            if (!kept[i].needed && &kept[i] != last && (!oldest || later(oldest, &kept[i])))
                oldest = &kept[i];
        if (!oldest)
            return;
        sum -= remove_kept(m, oldest) ? oldest->bytes : 0;
        oldest->needed = true; // or gone
    }
}
