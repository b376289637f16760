// The server itself: health, readiness, documents, capabilities, images, metrics, security model.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/metrics.h"
#include "api/principal.h"
#include "api/reply.h"
#include "api/view.h"
#include "base/fd.h"

static void health(struct api_call *c)
{
    static const char OK[] = "{\"status\":\"ok\"}";
    reply_borrowed(c, 200, "application/json", OK, sizeof OK - 1, NULL, NULL);
}

static void ready(struct api_call *c)
{
    char missing[200] = "", more[200] = "";
    struct api *a = c->a;
    const bool server = !a->o.server_ready || a->o.server_ready(a->o.server_arg, missing, sizeof missing);
    const bool manager = manager_ready(a->manager, more, sizeof more);
    if (server && manager) {
        static const char READY[] = "{\"status\":\"ready\"}";
        reply_borrowed(c, 200, "application/json", READY, sizeof READY - 1, NULL, NULL);
        return;
    }
    struct err err = {0};
    err_set(&err, ERR_UNAVAILABLE, "not_ready", "missing: %s%s%s", server ? "" : missing,
            server || manager ? "" : "; ", manager ? "" : more);
    err_remedy(&err, "ask again in a moment");
    call_fail(c, &err);
}

static void openapi(struct api_call *c)
{
    reply_borrowed(c, 200, "application/json", c->a->o.spec_json, c->a->o.spec_len, NULL, NULL);
}

// No script and nothing from elsewhere can run in the page.
static void docs(struct api_call *c)
{
    reply_header(c, "Content-Security-Policy",
                 "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:");
    reply_header(c, "X-Content-Type-Options", "nosniff");
    reply_borrowed(c, 200, "text/html; charset=utf-8", c->a->o.docs_html ? c->a->o.docs_html : "", c->a->o.docs_len, NULL,
                   NULL);
}

// ---- capabilities -----------------------------------------------------------------------------------------------------
static json_t *limits(const json_t *facts)
{
    static const struct {
        const char *name;
        int64_t value;
    } LIMITS[] = {
        {"vcpus_max", LIMIT_VCPUS_MAX},
        {"memory_mib_min", LIMIT_MEMORY_MIB_MIN},
        {"memory_mib_max", LIMIT_MEMORY_MIB_MAX},
        {"disk_mib_min", LIMIT_DISK_MIB_MIN},
        {"disk_mib_max", LIMIT_DISK_MIB_MAX},
        {"ttl_seconds_max", LIMIT_TTL_SECONDS_MAX},
        {"labels_max", LIMIT_LABELS},
        {"label_key_chars_max", LIMIT_LABEL_KEY},
        {"label_value_chars_max", LIMIT_LABEL_VALUE},
        {"sandboxes_max", LIMIT_TENANT_SANDBOXES},
        {"commands_running_max", LIMIT_COMMANDS_RUNNING},
        {"command_timeout_seconds_default", LIMIT_COMMAND_TIMEOUT_S_DEFAULT},
        {"command_timeout_seconds_max", LIMIT_COMMAND_TIMEOUT_S_MAX},
        {"output_answer_bytes_default", LIMIT_OUTPUT_ANSWER_DEFAULT},
        {"output_answer_bytes_max", LIMIT_OUTPUT_ANSWER_MAX},
        {"output_stream_bytes_max", (int64_t)LIMIT_SPOOL_STREAM_BYTES},
        {"stdin_inline_bytes_max", LIMIT_STDIN_INLINE_BYTES},
        {"args_max", LIMIT_ARGS},
        {"args_bytes_max", LIMIT_ARGS_BYTES},
        {"path_bytes_max", LIMIT_PATH_BYTES},
        {"dir_entries_max", LIMIT_DIR_ENTRIES},
        {"json_body_bytes_max", LIMIT_BODY_JSON_BYTES},
        {"json_depth_max", LIMIT_JSON_DEPTH},
        {"list_default", LIMIT_LIST_DEFAULT},
        {"list_max", LIMIT_LIST_MAX},
        {"log_entries_max", LIMIT_LOG_ENTRIES},
        {"log_text_bytes_max", LIMIT_LOG_TEXT},
        {"idempotency_hours", LIMIT_IDEMPOTENCY_HOURS},
    };
    json_t *j = json_object();
    for (size_t i = 0; i < sizeof LIMITS / sizeof *LIMITS; i++)
        json_put_int(j, LIMITS[i].name, LIMITS[i].value);
    json_put_int(j, "sandboxes_max", json_get_int(facts, "sandboxes_max", LIMIT_TENANT_SANDBOXES)); // as configured
    return j;
}

static json_t *words(const char *const *list)
{
    json_t *j = json_array();
    for (; *list; list++)
        json_array_append_new(j, json_string(*list));
    return j;
}

static json_t *taken(const json_t *from, const char *key)
{
    json_t *v = json_object_get(from, key);
    return v ? json_incref(v) : json_null();
}

// A part that is there needs no reason.
static json_t *part(const json_t *jail, const char *key)
{
    const json_t *p = json_object_get(jail, key);
    const bool available = json_is_true(json_object_get(p, "available"));
    json_t *j = json_object();
    json_put(j, "available", json_boolean(available));
    json_put_str(j, "reason", available ? NULL : p ? json_get_str(p, "reason") : "not looked at");
    return j;
}

static json_t *accel(const json_t *facts)
{
    static const char *const KVM[] = {"usable", "reason", "probed_at", NULL}, *const TCG[] = {"usable", "reason", NULL};
    const json_t *a = json_object_get(facts, "accel");
    json_t *j = json_object(), *kvm = json_object(), *tcg = json_object();
    for (const char *const *k = KVM; *k; k++)
        json_put(kvm, *k, taken(json_object_get(a, "kvm"), *k));
    for (const char *const *k = TCG; *k; k++)
        json_put(tcg, *k, taken(json_object_get(a, "tcg"), *k));
    if (json_is_true(json_object_get(kvm, "usable")))
        json_put(kvm, "reason", json_null());
    json_put(j, "configured", taken(a, "configured"));
    json_put(j, "selected", taken(a, "selected"));
    json_put(j, "kvm", kvm);
    json_put(j, "tcg", tcg);
    return j;
}

static const char *isolation_of(const json_t *facts)
{
    const char *selected = json_get_str(json_object_get(facts, "accel"), "selected");
    return !selected ? NULL : strcmp(selected, "kvm") == 0 ? "hardware" : "emulated";
}

static json_t *image_facts(const json_t *facts)
{
    const size_t n = json_array_size(json_object_get(facts, "images"));
    const bool runtime = json_get_str(facts, "kernel_digest") != NULL;
    json_t *j = json_object();
    json_put(j, "available", json_boolean(runtime && n > 0));
    json_put_str(j, "reason", !runtime ? "no kernel and initramfs are registered: run airlock image"
                              : n == 0 ? "no image is registered: run airlock image"
                                       : NULL);
    json_put_int(j, "count", (int64_t)n);
    json_put(j, "kernel_digest", taken(facts, "kernel_digest"));
    json_put(j, "kernel_version", taken(facts, "kernel_version"));
    json_put(j, "initramfs_digest", taken(facts, "initramfs_digest"));
    return j;
}

static void capabilities(struct api_call *c)
{
    static const char *const FEATURES[] = {"commands", "files", "archives", "logs",   "events",
                                           "jobs",     "tokens", "receipts", "audit", NULL};
    static const char *const PATTERNS[] = {"airlock_token", NULL};
    static const char *const JAIL[] = {"bubblewrap", "seccomp", "uid_separation", "cgroup", NULL};
    CLEANUP_JSON json_t *facts = manager_facts(c->a->manager);
    const char *isolation = isolation_of(facts);
    json_t *j = json_object(), *jail = json_object(), *redaction = json_object();
    for (const char *const *k = JAIL; *k; k++)
        json_put(jail, *k, part(json_object_get(facts, "jail"), *k));
    json_put(redaction, "enabled", json_true());
    json_put(redaction, "patterns", words(PATTERNS));
    json_put_str(j, "api_version", "v1");
    json_put_str(j, "server_version", c->a->o.server_version);
    json_put(j, "accel", accel(facts));
    json_put_str(j, "isolation", isolation);
    json_put_str(j, "isolation_note", isolation && strcmp(isolation, "emulated") == 0
                                          ? "TCG is not a security boundary by QEMU's own policy; run only code you trust"
                                          : NULL);
    json_put(j, "qemu_version", taken(facts, "qemu_version"));
    json_put(j, "jail", jail);
    json_put(j, "images", image_facts(facts));
    json_put(j, "limits", limits(facts));
    json_put(j, "features", words(FEATURES));
    json_put(j, "redaction", redaction);
    reply_json(c, 200, j);
}

// ---- images -----------------------------------------------------------------------------------------------------------
static int by_name(const void *a, const void *b)
{
    return strcmp(json_get_str(*(json_t *const *)a, "name"), json_get_str(*(json_t *const *)b, "name"));
}

// By name; the cursor is the name that was shown last.
static void list_images(struct api_call *c)
{
    CLEANUP_JSON json_t *facts = manager_facts(c->a->manager);
    json_t *all = json_object_get(facts, "images"), *items = json_array();
    const size_t n = json_array_size(all), limit = (size_t)call_param_integer(c, "limit", LIMIT_LIST_DEFAULT);
    const char *after = call_param_text(c, "cursor", "");
    CLEANUP_FREE json_t **sorted = calloc(n + 1, sizeof *sorted);
    const char *next = NULL;
    for (size_t i = 0; sorted && i < n; i++)
        sorted[i] = json_array_get(all, i);
    if (sorted && n > 1)
        qsort(sorted, n, sizeof(json_t *), by_name);
    for (size_t i = 0; sorted && i < n && !next; i++) {
        if (strcmp(json_get_str(sorted[i], "name"), after) <= 0)
            continue;
        if (json_array_size(items) == limit)
            next = json_get_str(json_array_get(items, limit - 1), "name");
        else
            json_array_append(items, sorted[i]);
    }
    json_t *j = json_object();
    json_put(j, "items", items);
    json_put_str(j, "next_cursor", next);
    call_admission(c);
    reply_json(c, 200, j);
}

// ---- metrics ------------------------------------------------------------------------------------------------------------
static void gauge(struct buf *out, const char *name, const char *type, const char *help, uint64_t value)
{
    buf_addf(out, "# HELP %s %s\n# TYPE %s %s\n%s %llu\n", name, help, name, type, name, (unsigned long long)value);
}

static void manager_part(struct api *a, struct buf *out)
{
    CLEANUP_JSON json_t *gauges = manager_gauges(a->manager);
    const char *name;
    json_t *value;
    char family[96] = "";
    json_object_foreach(gauges, name, value) {
        const int len = (int)strcspn(name, "{");
        if (strncmp(family, name, (size_t)len) != 0 || family[len] != 0) {
            snprintf(family, sizeof family, "%.*s", len, name);
            const bool counter = len > 6 && strncmp(name + len - 6, "_total", 6) == 0;
            buf_addf(out, "# TYPE %s %s\n", family, counter ? "counter" : "gauge");
        }
        buf_addf(out, "%s %.15g\n", name, json_number_value(value));
    }
}

static void metrics(struct api_call *c)
{
    struct api *a = c->a;
    struct store_stats st = {0};
    CLEANUP_BUF struct buf out = BUF_INIT(4u << 20);
    store_stats(a->store, &st);
    metrics_render(a->metrics, a->spec, &out);
    manager_part(a, &out);
    gauge(&out, "airlock_store_commits_total", "counter", "Groups committed.", st.commits);
    gauge(&out, "airlock_store_transactions_total", "counter", "Transactions in them.", st.transactions);
    gauge(&out, "airlock_store_failed_commits_total", "counter", "Groups that failed.", st.failed_commits);
    gauge(&out, "airlock_store_queue", "gauge", "Transactions that wait for the writer.", st.queue_depth);
    gauge(&out, "airlock_store_last_commit_microseconds", "gauge", "Time of the last commit.", st.last_commit_us);
    gauge(&out, "airlock_store_database_bytes", "gauge", "Size of the database.", st.db_bytes);
    gauge(&out, "airlock_store_wal_bytes", "gauge", "Size of its write-ahead log.", st.wal_bytes);
    gauge(&out, "airlock_calls", "gauge", "Requests under way, streams among them.", atomic_load(&a->calls));
    const size_t len = out.len;
    char *text = buf_steal(&out);
    reply_text(c, 200, "text/plain; version=0.0.4; charset=utf-8", text, len);
}

// ---- security model -------------------------------------------------------------------------------------------------------
static void security_model(struct api_call *c)
{
    CLEANUP_JSON json_t *facts = manager_facts(c->a->manager);
    const char *isolation = isolation_of(facts);
    json_t *j = model_json(), *is = json_object();
    json_put(is, "accel", taken(json_object_get(facts, "accel"), "selected"));
    json_put_str(is, "isolation", isolation);
    json_put_str(is, "statement",
                 !isolation                          ? "No accelerator is selected: no guest can be started."
                 : strcmp(isolation, "hardware") == 0 ? "Guests are separated from the host by KVM and a jail around QEMU."
                                                     : "Guests are emulated (TCG). By QEMU's own policy that is not a "
                                                       "security boundary: run only code you trust.");
    json_put(j, "isolation", is);
    reply_json(c, 200, j);
}

const struct handler META_HANDLERS[] = {
    {"health.get", RUN_INLINE, health, NULL, NULL},
    {"ready.get", RUN_INLINE, ready, NULL, NULL},
    {"openapi.get", RUN_INLINE, openapi, NULL, NULL},
    {"docs.get", RUN_INLINE, docs, NULL, NULL},
    {"capabilities.get", RUN_POOLED, capabilities, NULL, NULL},
    {"security_model.get", RUN_POOLED, security_model, NULL, NULL},
    {"image.list", RUN_POOLED, list_images, NULL, NULL},
    {"metrics.get", RUN_POOLED, metrics, NULL, NULL},
    {0},
};
