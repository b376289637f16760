#include "api/problem.h"

#include <stdio.h>
#include <string.h>

#include "api/api.h"
#include "base/json.h"

// boundary: where it was refused or failed, unless its code says otherwise. retryable: the same request may succeed later.
struct kind_facts {
    int status;
    const char *title, *boundary;
    bool retryable;
};

static const struct kind_facts KINDS[] = {
    [ERR_NONE] = {500, "Internal error", "host_control_plane", false},
    [ERR_POLICY_DENIED] = {403, "Policy denied", "host_control_plane", false},
    [ERR_ADMISSION_FAILED] = {422, "Admission failed", "host_control_plane", false},
    [ERR_GUEST_COMMAND_FAILED] = {422, "Guest command failed", "guest", false},
    [ERR_TIMEOUT] = {504, "Deadline missed", "host_control_plane", true},
    [ERR_TRANSPORT_FAILED] = {502, "Channel to the VM broke", "host_control_plane", true},
    [ERR_CLEANUP_FAILED] = {500, "Cleanup failed", "host_control_plane", true},
    [ERR_SNAPSHOT_MISMATCH] = {409, "Snapshot does not match", "host_control_plane", false},
    [ERR_UNSUPPORTED_CAPABILITY] = {501, "Unsupported capability", "host_control_plane", false},
    [ERR_VALIDATION] = {422, "Invalid request", "sdk_client", false},
    [ERR_UNAUTHORIZED] = {401, "Unauthorized", "sdk_client", false},
    [ERR_NOT_FOUND] = {404, "Not found", "host_control_plane", false},
    [ERR_METHOD_NOT_ALLOWED] = {405, "Method not allowed", "sdk_client", false},
    [ERR_CONFLICT] = {409, "Conflict", "host_control_plane", false},
    [ERR_PRECONDITION_FAILED] = {412, "Precondition failed", "sdk_client", false},
    [ERR_TOO_LARGE] = {413, "Too large", "sdk_client", false},
    [ERR_UNSUPPORTED_MEDIA_TYPE] = {415, "Unsupported media type", "sdk_client", false},
    [ERR_RANGE] = {416, "Range not satisfiable", "sdk_client", false},
    [ERR_RATE_LIMITED] = {429, "Too much at once", "host_control_plane", true},
    [ERR_UNAVAILABLE] = {503, "Unavailable", "host_control_plane", true},
    [ERR_INTERNAL] = {500, "Internal error", "host_control_plane", false},
};

int problem_status(enum err_kind kind)
{
    return KINDS[kind].status;
}

const char *problem_title(enum err_kind kind)
{
    return KINDS[kind].title;
}

bool problem_storable(int status)
{
    return status != 401 && status != 429 && status < 500;
}

// Refusals by code that are decided elsewhere than their kind suggests, or that pass with time.
static const char *boundary_of(const struct err *err)
{
    static const char *const GUEST[] = {"path_outside_roots", "permission_denied", "path_not_found", "not_a_regular_file",
                                        "not_a_directory",    "archive_invalid",   "exists",         "not_empty"};
    for (size_t i = 0; i < sizeof GUEST / sizeof *GUEST; i++)
        if (strcmp(err->code, GUEST[i]) == 0)
            return "guest";
    return KINDS[err->kind].boundary;
}

static bool retryable(const struct err *err)
{
    return KINDS[err->kind].retryable || strcmp(err->code, "receipt_pending") == 0 ||
           strcmp(err->code, "sandbox_not_running") == 0;
}

// A code that only repeats the kind says nothing.
static const char *code_of(const struct err *err)
{
    return *err->code && strcmp(err->code, err_kind_name(err->kind)) != 0 ? err->code : NULL;
}

static const char *or_null(const char *text)
{
    return text && *text ? text : NULL;
}

static json_t *errors_of(const struct faults *f)
{
    json_t *list = json_array();
    for (size_t i = 0; f && i < f->n; i++) {
        json_t *one = json_object();
        json_put_str(one, "pointer", f->items[i].pointer);
        json_put_str(one, "message", f->items[i].message);
        json_array_append_new(list, one);
    }
    return list;
}

// Fields that a room below names, each by what it is called there.
static void add_fields(json_t *errors, const struct err *err)
{
    for (const char *at = err->fields; *at;) {
        const char *tab = strchr(at, '\t'), *end = strchr(at, '\n');
        if (!tab || !end || tab > end)
            return;
        json_t *one = json_object();
        json_put(one, "pointer", json_sprintf("/%.*s", (int)(tab - at), at));
        json_put(one, "message", json_sprintf("%.*s", (int)(end - tab - 1), tab + 1));
        json_array_append_new(errors, one);
        at = end + 1;
    }
}

// "… line 3, column 7 …" of a body that is no JSON also stands as numbers.
static void add_position(json_t *errors, const struct err *err)
{
    int line, column;
    const char *at = strstr(err->detail, "line ");
    if (strcmp(err->code, "malformed_json") != 0 || json_array_size(errors) > 0)
        return;
    json_t *one = json_object();
    json_put_str(one, "pointer", "");
    json_put_str(one, "message", err->detail);
    if (at && sscanf(at, "line %d, column %d", &line, &column) == 2) {
        json_put_int(one, "line", line > 0 ? line : 1);
        json_put_int(one, "column", column > 0 ? column : 0);
    }
    json_array_append_new(errors, one);
}

json_t *problem_json(const struct err *err, const struct problem_about *about)
{
    char type[64];
    json_t *p = json_object(), *errors = errors_of(about->faults);
    add_position(errors, err);
    add_fields(errors, err);
    snprintf(type, sizeof type, "urn:airlock:problem:%s", err_kind_name(err->kind));
    json_put_str(p, "type", type);
    json_put_str(p, "title", problem_title(err->kind));
    json_put_int(p, "status", problem_status(err->kind));
    json_put_str(p, "detail", *err->detail ? err->detail : problem_title(err->kind));
    json_put_str(p, "kind", err_kind_name(err->kind));
    json_put_str(p, "code", code_of(err));
    json_put_str(p, "boundary", boundary_of(err));
    json_put_str(p, "operation", or_null(about->operation));
    json_put(p, "retryable", json_boolean(retryable(err)));
    json_put_str(p, "remedy", or_null(err->remedy));
    json_put_str(p, "request_id", about->request_id);
    json_put_str(p, "sandbox_id", or_null(about->sandbox_id));
    json_put_str(p, "job_id", or_null(about->job_id));
    json_put_str(p, "audit_id", or_null(about->audit_id));
    json_put(p, "errors", errors);
    return p;
}

// An existing target is a failed precondition only where If-None-Match asked for it.
void problem_adjust(struct err *err, const char *operation)
{
    const bool precondition = strcmp(operation, "file.write") == 0;
    if (strcmp(err->code, "exists") == 0 && err->kind == ERR_PRECONDITION_FAILED && !precondition)
        err->kind = ERR_CONFLICT;
    if (strcmp(err->code, "file_not_found") == 0)
        snprintf(err->code, sizeof err->code, "path_not_found");
    if (strcmp(err->code, "archive_failed") == 0 && strcmp(operation, "archive.write") == 0)
        snprintf(err->code, sizeof err->code, "archive_invalid");
}

char *api_render_problem(const struct err *original, const struct admission *a, int *ret_status)
{
    struct err copy = *original, *err = &copy;
    problem_adjust(err, a->operation);
    const struct problem_about about = {.operation = a->operation, .request_id = a->request_id,
                                        .sandbox_id = a->sandbox_id, .job_id = a->job_id, .audit_id = a->audit_id};
    CLEANUP_JSON json_t *p = problem_json(err, &about);
    if (ret_status)
        *ret_status = problem_status(err->kind);
    return json_dumps(p, JSON_COMPACT);
}

json_t *problem_failures(void)
{
    static const struct {
        enum err_kind kind;
        const char *recovery;
    } FAILURES[] = {
        {ERR_POLICY_DENIED, "Ask for less, or have the policy changed; the same request is refused again."},
        {ERR_ADMISSION_FAILED, "Correct the image, plan or build that code names."},
        {ERR_GUEST_COMMAND_FAILED, "Look at result: the platform worked, the command did not."},
        {ERR_TIMEOUT, "Try again; look at the host's load and at the job's stages."},
        {ERR_TRANSPORT_FAILED, "Look at the sandbox's state; start it again or create another one."},
        {ERR_CLEANUP_FAILED, "Read the report and delete again; an operator removes what stays."},
        {ERR_SNAPSHOT_MISMATCH, "Restore on a host that fits, or take a new snapshot."},
        {ERR_UNSUPPORTED_CAPABILITY, "Take the alternative that remedy names, or another host."},
    };
    json_t *list = json_array();
    for (size_t i = 0; i < sizeof FAILURES / sizeof *FAILURES; i++) {
        json_t *one = json_object();
        json_put_str(one, "kind", err_kind_name(FAILURES[i].kind));
        json_put_int(one, "status", problem_status(FAILURES[i].kind));
        json_put_str(one, "recovery", FAILURES[i].recovery);
        json_array_append_new(list, one);
    }
    return list;
}
