#include "fake.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "api/api.h"
#include "base/clock.h"
#include "base/fd.h"
#include "base/json.h"

struct manager *fake_new(struct store *store, int dirfd)
{
    struct manager *m = calloc(1, sizeof *m);
    struct err err = {0};
    m->store = store;
    m->dirfd = dirfd;
    m->hub = hub_new();
    m->pool = work_pool_new("fake", 8, 4096, &err);
    pthread_mutex_init(&m->lock, NULL);
    return m;
}

void fake_free(struct manager *m)
{
    work_pool_free(m->pool);
    for (size_t i = 0; i < m->n_live; i++)
        sandbox_info_unref(m->live[i]);
    for (struct fake_file *f = m->files, *next; f; f = next) {
        next = f->next;
        free(f->data);
        free(f);
    }
    for (size_t i = 0; i < m->n_logs; i++)
        free(m->log_texts[i]);
    hub_free(m->hub);
    pthread_mutex_destroy(&m->lock);
    free(m);
}

struct hub *manager_hub(struct manager *m)
{
    return m->hub;
}

struct store *manager_store(struct manager *m)
{
    return m->store;
}

bool manager_ready(struct manager *m, char *out, size_t cap)
{
    if (m->not_ready)
        snprintf(out, cap, "3 sandboxes not yet adopted");
    return !m->not_ready;
}

// ---- views --------------------------------------------------------------------------------------------------------
struct sandbox_info *sandbox_info_ref(const struct sandbox_info *i)
{
    __atomic_add_fetch(&((struct sandbox_info *)i)->refs_, 1, __ATOMIC_RELAXED);
    return (struct sandbox_info *)i;
}

void sandbox_info_unref(const struct sandbox_info *borrowed)
{
    struct sandbox_info *i = (struct sandbox_info *)borrowed;
    if (!i || __atomic_sub_fetch(&i->refs_, 1, __ATOMIC_ACQ_REL) > 0)
        return;
    if (i->cache && i->cache_free)
        i->cache_free(i->cache);
    sandbox_row_free(&i->row);
    free(i);
}

static struct sandbox_info *info_of(const struct sandbox_row *row)
{
    struct sandbox_info *i = calloc(1, sizeof *i);
    i->refs_ = 1;
    sandbox_row_copy(&i->row, row);
    return i;
}

static void publish(struct manager *m, const struct sandbox_row *row)
{
    struct sandbox_info *fresh = info_of(row), *old = NULL;
    pthread_mutex_lock(&m->lock);
    size_t i = 0;
    while (i < m->n_live && strcmp(m->live[i]->row.id, row->id) != 0)
        i++;
    if (i < m->n_live)
        old = m->live[i];
    else if (m->n_live < 63)
        m->n_live++;
    m->live[i] = fresh;
    pthread_mutex_unlock(&m->lock);
    sandbox_info_unref(old);
    hub_notify(m->hub, row->id);
}

struct sandbox_info *manager_get(struct manager *m, const char *tenant, const char *id, struct err *err)
{
    struct sandbox_info *found = NULL;
    pthread_mutex_lock(&m->lock);
    for (size_t i = 0; i < m->n_live && !found; i++)
        if (strcmp(m->live[i]->row.id, id) == 0 && strcmp(m->live[i]->row.tenant, tenant) == 0)
            found = sandbox_info_ref(m->live[i]);
    pthread_mutex_unlock(&m->lock);
    if (found)
        return found;
    struct sandbox_row row = {0};
    const int got = sandbox_get(m->store, tenant, id, &row, err);
    if (got == 0) {
        found = info_of(&row);
        sandbox_row_free(&row);
    } else if (got > 0) {
        err_set(err, ERR_NOT_FOUND, "not_found", "no such object");
    }
    return found;
}

struct list_ctx {
    bool (*fn)(void *arg, const struct sandbox_info *i);
    void *arg;
};

static bool list_one(void *arg, const struct sandbox_row *row)
{
    const struct list_ctx *ctx = arg;
    const struct sandbox_info view = {.row = *row, .refs_ = 1};
    return ctx->fn(ctx->arg, &view);
}

int manager_list(struct manager *m, const struct sandbox_filter *filter,
                 bool (*fn)(void *arg, const struct sandbox_info *i), void *arg, struct err *err)
{
    struct list_ctx ctx = {fn, arg};
    return sandbox_list(m->store, filter, list_one, &ctx, err);
}

// ---- operations -----------------------------------------------------------------------------------------------------
enum what { CREATE, VERB, DELETE, PATCH };

struct op {
    struct manager *m;
    enum what what;
    enum sandbox_verb verb;
    struct sandbox_row row;
    struct admission a;
    struct job_row job;
    int status;
    struct op_callbacks cb;
    bool admitted_tx;       // which half the transaction writes
    bool refused;           // admitted, then failed
    struct err why;
    char *problem;
};

static bool take_failure(struct manager *m, struct err *ret)
{
    pthread_mutex_lock(&m->lock);
    *ret = m->fail_next;
    m->fail_next = (struct err){0};
    pthread_mutex_unlock(&m->lock);
    return ret->kind != ERR_NONE;
}

static int op_tx(struct store_tx *tx, void *arg, struct err *err)
{
    struct op *op = arg;
    if (op->admitted_tx) {
        if (evidence_admit(tx, &op->a, NULL, err) != 0 || job_insert(tx, &op->job, err) != 0)
            return -1;
        return op->what == CREATE ? sandbox_insert(tx, &op->row, 100, err) : 0;
    }
    const struct settlement s = {.outcome = op->refused ? "failed" : "succeeded", .status = op->status, .ref = op->row.id,
                                 .problem_json = op->problem, .forget_idem = op->status >= 500};
    op->job.state = op->refused ? JOB_FAILED : JOB_SUCCEEDED;
    op->job.finished_at_ms = clock_wall_ms();
    snprintf(op->job.ref, sizeof op->job.ref, "%s", op->row.id);
    if (op->problem)
        op->job.problem_json = strdup(op->problem);
    if (sandbox_update(tx, &op->row, err) != 0 || job_update(tx, &op->job, err) != 0)
        return -1;
    if (event_append(tx, op->row.tenant, "sandbox.state", op->row.id, "{\"to\":\"running\",\"cause\":\"create\"}", err) != 0)
        return -1;
    return evidence_settle(tx, &op->a, &s, err);
}

static void op_free(struct op *op)
{
    sandbox_row_free(&op->row);
    job_row_free(&op->job);
    free(op->problem);
    free(op);
}

static void answer(struct op *op, const struct err *err)
{
    if (err) {
        op->cb.done(op->cb.arg, NULL, err);
    } else {
        struct sandbox_info *i = info_of(&op->row);
        op->cb.done(op->cb.arg, i, NULL);
        sandbox_info_unref(i);
    }
    op_free(op);
}

static void act(struct op *op)
{
    struct sandbox_row *row = &op->row;
    row->generation++;
    row->updated_at_ms = clock_wall_ms();
    switch (op->what) {
    case CREATE:
        row->state = op->refused ? SANDBOX_FAILED : SANDBOX_RUNNING;
        row->backend_json = strdup("{\"accel\":\"tcg\",\"isolation\":\"emulated\",\"boot_path\":\"cold\",\"qemu_version\":\"7.2\"}");
        break;
    case VERB:
        row->state = op->verb == VERB_STOP ? SANDBOX_STOPPED : SANDBOX_RUNNING;
        break;
    case DELETE:
        row->state = op->refused ? SANDBOX_FAILED : SANDBOX_DESTROYED;
        row->destroyed_at_ms = op->refused ? 0 : row->updated_at_ms;
        free(row->deletion_json);
        row->deletion_json = strdup("{\"erased\":[{\"kind\":\"disk\",\"bytes\":7}],\"retained\":[],\"failed\":[]}");
        break;
    case PATCH:
        break;
    }
}

static void op_work(void *arg)
{
    struct op *op = arg;
    struct manager *m = op->m;
    struct err err = {0};
    op->admitted_tx = true;
    if (store_write(m->store, op_tx, op, &err) != 0) {
        answer(op, &err);
        return;
    }
    publish(m, &op->row);
    if (op->cb.admitted)
        op->cb.admitted(op->cb.arg, op->job.id);
    if (op->what == CREATE && atomic_load(&m->hold)) {
        atomic_fetch_add(&m->held, 1);
        while (atomic_load(&m->hold))
            nanosleep(&(struct timespec){0, 1000000}, NULL);
    }
    op->refused = take_failure(m, &op->why);
    if (op->refused)
        op->problem = api_render_problem(&op->why, &op->a, &op->status);
    act(op);
    op->admitted_tx = false;
    if (store_write(m->store, op_tx, op, &err) != 0) {
        answer(op, &err);
        return;
    }
    publish(m, &op->row);
    const struct err why = op->why;
    answer(op, why.kind != ERR_NONE ? &why : NULL);
}

static struct op *op_new(struct manager *m, enum what what, const struct admission *a, int status,
                         const struct op_callbacks *cb)
{
    struct op *op = calloc(1, sizeof *op);
    op->m = m;
    op->what = what;
    op->a = *a;
    op->status = status;
    op->cb = *cb;
    return op;
}

static void begin_job(struct op *op)
{
    id_new(ID_JOB, op->a.job_id);
    snprintf(op->a.sandbox_id, sizeof op->a.sandbox_id, "%s", op->row.id);
    op->job = (struct job_row){.state = JOB_RUNNING, .created_at_ms = clock_wall_ms(), .updated_at_ms = clock_wall_ms()};
    snprintf(op->job.id, sizeof op->job.id, "%s", op->a.job_id);
    snprintf(op->job.tenant, sizeof op->job.tenant, "%s", op->a.tenant);
    snprintf(op->job.sandbox_id, sizeof op->job.sandbox_id, "%s", op->row.id);
    snprintf(op->job.kind, sizeof op->job.kind, "%s", op->a.operation);
    snprintf(op->job.audit_id, sizeof op->job.audit_id, "%s", op->a.audit_id);
    snprintf(op->job.receipt_id, sizeof op->job.receipt_id, "%s", op->a.receipt_id);
    snprintf(op->job.request_id, sizeof op->job.request_id, "%s", op->a.request_id);
}

static void fill(struct sandbox_row *row, const struct sandbox_request *r, const struct admission *a)
{
    const int64_t now = clock_wall_ms();
    id_new(ID_SANDBOX, row->id);
    snprintf(row->tenant, sizeof row->tenant, "%s", a->tenant);
    snprintf(row->name, sizeof row->name, "%s", r->name ? r->name : "");
    row->state = SANDBOX_STARTING;
    snprintf(row->image_ref, sizeof row->image_ref, "%s", r->image);
    snprintf(row->image_digest, sizeof row->image_digest, "sha256:%064d", 7);
    row->vcpus = r->vcpus;
    row->memory_mib = r->memory_mib;
    row->disk_mib = r->disk_mib;
    row->labels_json = r->labels ? json_dumps(r->labels, JSON_COMPACT) : strdup("{}");
    row->env_json = r->env ? json_dumps(r->env, JSON_COMPACT) : strdup("{}");
    row->ttl_seconds = r->ttl_seconds;
    row->expires_at_ms = now + r->ttl_seconds * 1000;
    snprintf(row->on_expiry, sizeof row->on_expiry, "%s", r->on_expiry);
    row->detached = r->detached;
    snprintf(row->owner, sizeof row->owner, "%s", r->owner ? r->owner : "");
    row->generation = 1;
    row->created_at_ms = row->updated_at_ms = now;
    snprintf(row->audit_id, sizeof row->audit_id, "%s", a->audit_id);
    snprintf(row->receipt_id, sizeof row->receipt_id, "%s", a->receipt_id);
}

int manager_create(struct manager *m, const struct sandbox_request *r, const struct admission *a, int success_status,
                   const struct op_callbacks *cb)
{
    struct err err = {0};
    atomic_fetch_add(&m->created, 1);
    if (json_object_get(r->env, "LD_PRELOAD"))
        err_set(&err, ERR_POLICY_DENIED, "env_denied", "LD_PRELOAD is refused");
    else if (strcmp(r->image, "missing") == 0)
        err_set(&err, ERR_ADMISSION_FAILED, "image_not_found", "no such image");
    if (err.kind != ERR_NONE) {
        cb->done(cb->arg, NULL, &err);
        return 0;
    }
    struct op *op = op_new(m, CREATE, a, success_status, cb);
    fill(&op->row, r, a);
    begin_job(op);
    snprintf(op->row.job_id, sizeof op->row.job_id, "%s", op->a.job_id);
    return work_submit(m->pool, op_work, op);
}

static int begin_on(struct manager *m, struct op *op, const char *id)
{
    struct err err = {0};
    struct sandbox_info *i = manager_get(m, op->a.tenant, id, &err);
    if (i) {
        sandbox_row_copy(&op->row, &i->row);
        if (i->row.state == SANDBOX_DESTROYED && op->what != DELETE)
            err_set(&err, ERR_CONFLICT, "destroyed", "the sandbox is destroyed");
    }
    sandbox_info_unref(i);
    if (err.kind != ERR_NONE) {
        answer(op, &err);
        return 0;
    }
    begin_job(op);
    return work_submit(m->pool, op_work, op);
}

static bool generation_fits(struct manager *m, const char *id, const struct admission *a, const struct op_callbacks *cb)
{
    struct err err = {0};
    struct sandbox_info *i = manager_get(m, a->tenant, id, &err);
    if (i && a->if_generation != 0 && a->if_generation != i->row.generation)
        err_set(&err, ERR_PRECONDITION_FAILED, "generation_mismatch", "another generation");
    sandbox_info_unref(i);
    if (err.kind != ERR_NONE)
        cb->done(cb->arg, NULL, &err);
    return err.kind == ERR_NONE;
}

int manager_verb(struct manager *m, const char *id, enum sandbox_verb verb, const char *owner, const struct admission *a,
                 int success_status, const struct op_callbacks *cb)
{
    (void)owner;
    if (!generation_fits(m, id, a, cb))
        return 0;
    struct op *op = op_new(m, VERB, a, success_status, cb);
    op->verb = verb;
    return begin_on(m, op, id);
}

int manager_delete(struct manager *m, const char *id, const struct admission *a, int success_status,
                   const struct op_callbacks *cb)
{
    return begin_on(m, op_new(m, DELETE, a, success_status, cb), id);
}

int manager_patch(struct manager *m, const char *id, const struct sandbox_patch *p, const struct admission *a,
                  int success_status, const struct op_callbacks *cb)
{
    (void)p;
    if (!generation_fits(m, id, a, cb))
        return 0;
    return begin_on(m, op_new(m, PATCH, a, success_status, cb), id);
}

int manager_job_cancel(struct manager *m, const char *tenant, const char *job_id, const struct admission *a,
                       struct err *err)
{
    (void)m, (void)tenant, (void)job_id, (void)a;
    return err_set(err, ERR_CONFLICT, "not_cancellable", "the job has ended");
}

// ---- facts ------------------------------------------------------------------------------------------------------------
json_t *manager_facts(struct manager *m)
{
    (void)m;
    return json_loads("{\"accel\":{\"configured\":\"auto\",\"selected\":\"tcg\",\"kvm\":{\"usable\":false,\"reason\":\"no "
                      "/dev/kvm\",\"probed_at\":null},\"tcg\":{\"usable\":true,\"reason\":null}},\"qemu_version\":\"7.2.22\","
                      "\"images\":[{\"name\":\"debian\",\"digest\":\"sha256:"
                      "9f2c4a7be1d035689f2c4a7be1d035689f2c4a7be1d035689f2c4a7be1d03568\",\"bytes\":5,\"created_at\":null}],"
                      "\"jail\":{\"bubblewrap\":{\"available\":true,\"reason\":null}}}",
                      0, NULL);
}

json_t *manager_gauges(struct manager *m)
{
    (void)m;
    return json_loads("{\"airlock_sandboxes{state=\\\"running\\\"}\":2,\"airlock_boots_total\":3}", 0, NULL);
}

// ---- logs and events ----------------------------------------------------------------------------------------------------
void fake_log(struct manager *m, const char *sandbox_id, enum log_source source, const char *text)
{
    char key[ID_MAX + 8];
    pthread_mutex_lock(&m->lock);
    struct log_entry *e = &m->logs[m->n_logs];
    *e = (struct log_entry){.seq = (int64_t)m->n_logs + 1, .at_ms = clock_wall_ms(), .source = source};
    m->log_texts[m->n_logs] = strdup(text);
    e->text = m->log_texts[m->n_logs];
    e->text_len = (uint32_t)strlen(text);
    m->n_logs++;
    pthread_mutex_unlock(&m->lock);
    snprintf(key, sizeof key, "log:%s", sandbox_id);
    hub_notify(m->hub, key);
}

int sandbox_logs(struct manager *m, const char *tenant, const char *id, int64_t after_seq, int source, unsigned limit,
                 bool (*fn)(void *, const struct log_entry *), void *arg, struct err *err)
{
    struct sandbox_info *i = manager_get(m, tenant, id, err);
    if (!i)
        return -1;
    sandbox_info_unref(i);
    pthread_mutex_lock(&m->lock);
    unsigned n = 0;
    for (size_t k = 0; k < m->n_logs && n < limit; k++) {
        const struct log_entry *e = &m->logs[k];
        if (e->seq <= after_seq || (source && (int)e->source != source))
            continue;
        n++;
        if (!fn(arg, e))
            break;
    }
    pthread_mutex_unlock(&m->lock);
    return 0;
}

struct event_ctx {
    const char *tenant, *kind, *sandbox_id;
};

static int event_tx(struct store_tx *tx, void *arg, struct err *err)
{
    const struct event_ctx *e = arg;
    return event_append(tx, e->tenant, e->kind, e->sandbox_id, "{\"to\":\"running\"}", err);
}

void fake_event(struct manager *m, const char *tenant, const char *kind, const char *sandbox_id)
{
    struct err err = {0};
    struct event_ctx e = {tenant, kind, sandbox_id};
    store_write(m->store, event_tx, &e, &err);
    hub_notify(m->hub, "events");
}

// ---- snapshots and forks: what is asked for is recorded, the answer is an error of the manager's ------------------------
int manager_fork(struct manager *m, const char *id, const struct fork_request *r, const struct admission *a,
                 int success_status, const struct fork_callbacks *cb)
{
    struct err err = {0};
    (void)m, (void)id, (void)r, (void)a, (void)success_status;
    err_set(&err, ERR_UNAVAILABLE, "memory_budget", "it does not fit");
    cb->done(cb->arg, NULL, 0, &err);
    return 0;
}

int manager_snapshot(struct manager *m, const char *sandbox_id, const struct snapshot_request *r,
                     const struct admission *a, int success_status, const struct snapshot_callbacks *cb)
{
    struct err err = {0};
    (void)m, (void)sandbox_id, (void)r, (void)a, (void)success_status;
    err_set(&err, ERR_CONFLICT, "guest_disk_full", "the guest's disk is full");
    cb->done(cb->arg, NULL, &err);
    return 0;
}

int manager_snapshot_delete(struct manager *m, const char *id, const struct admission *a,
                            int success_status, const struct snapshot_callbacks *cb)
{
    struct err err = {0};
    (void)m, (void)id, (void)success_status;
    if (a->if_generation != 0 && a->if_generation != 1)
        err_set(&err, ERR_PRECONDITION_FAILED, "generation_mismatch", "another generation");
    else
        err_set(&err, ERR_CONFLICT, "has_children", "others are built on it");
    cb->done(cb->arg, NULL, &err);
    return 0;
}

json_t *manager_snapshot_compat(struct manager *m, const char *tenant, const char *id, struct err *err)
{
    (void)tenant, (void)id;
    atomic_fetch_add(&m->held, 1);
    while (atomic_load(&m->hold))
        nanosleep(&(struct timespec){0, 1000000}, NULL);
    atomic_fetch_sub(&m->held, 1);
    err_set(err, ERR_CONFLICT, "snapshot_deleted", "the snapshot was deleted");
    return NULL;
}

json_t *manager_memory(struct manager *m, const char *tenant, const char *id)
{
    (void)m, (void)tenant, (void)id;
    return NULL;
}
