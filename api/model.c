// The security model as data: what is told at GET /v1/security-model. Status words say how far this version enforces a
// rule; change them together with the code that does.
#include <stdlib.h>

#include "api/problem.h"
#include "api/view.h"

struct boundary {
    const char *name, *runs, *rule, *status;
};
static const struct boundary BOUNDARIES[] = {
    {"sdk_client", "code that calls the API", "trusted with its token's scopes and nothing more; the server executes none of it",
     "enforced"},
    {"static_compiler", "a declaration, read as data",
     "never imports or evaluates user code; a pure document in, a normalized plan out", "planned"},
    {"build", "builder microVM", "image assembly and verification run in a builder VM, never on the host", "planned"},
    {"guest", "commands, tools, services, generated code",
     "isolated by the backend and policy; its output is untrusted and may be sensitive", "enforced"},
    {"host_control_plane", "admission, transfer, logs, receipts, policy, backend",
     "every crossing explicit, bounded, audited", "enforced"},
};

struct mode {
    const char *name, *use;
    bool script, guest, available;
};
static const struct mode MODES[] = {
    {"static", "reviewable declarations from users, agents, review queues", false, false, false},
    {"record", "a trusted script produces the declaration", true, false, false},
    {"plan", "admission review before launch", true, false, false},
    {"live", "boot, files, commands, logs, audit, cleanup", true, true, true},
};

struct rule {
    const char *data, *rule, *status;
};
static const struct rule CROSSINGS[] = {
    {"command_arguments", "no secrets in argv; receipts carry a keyed hash of argv, never argv", "partial"},
    {"environment",
     "receipts carry names only; LD_*, BASH_ENV, NODE_OPTIONS, PYTHONSTARTUP and their kin are refused; secret references "
     "are not built yet",
     "partial"},
    {"file_writes", "narrow paths, no traversal, no host directory is ever mirrored", "enforced"},
    {"file_reads", "bytes are untrusted: octet-stream, nosniff, audited with a keyed hash of the path and a byte count only",
     "enforced"},
    {"logs", "credentials redacted once, at capture; sizes bounded; what was dropped is said", "enforced"},
    {"ports", "an explicit binding and a policy decision for each exposed service; none can be exposed yet", "planned"},
    {"receipts_and_audit_ids", "stored with the job record, returned with the result, verifiable without the server",
     "enforced"},
    {"snapshots", "treated as sensitive: 0600, integrity-checked, retention required, deletion reported", "enforced"},
};
static const struct rule DEFAULTS[] = {
    {NULL, "Static declarations for work from users, agents or queues", "planned"},
    {NULL, "Nix flake targets preferred", "planned"},
    {NULL, "OCI inputs pinned by digest", "planned"},
    {NULL, "Network denied unless the exact egress is declared", "enforced"},
    {NULL, "Secret references rather than literals", "planned"},
    {NULL, "Explicit TTL, cleanup or detach for every sandbox", "enforced"},
    {NULL, "Receipt and audit ids in result objects", "enforced"},
    {NULL, "Explicit snapshot retention and deletion", "enforced"},
    {NULL, "Capability errors surfaced, never a silent fall back to a less secure path", "enforced"},
};

static json_t *boundaries(void)
{
    json_t *list = json_array();
    for (size_t i = 0; i < sizeof BOUNDARIES / sizeof *BOUNDARIES; i++) {
        json_t *j = json_object();
        json_put_str(j, "name", BOUNDARIES[i].name);
        json_put_str(j, "runs", BOUNDARIES[i].runs);
        json_put_str(j, "rule", BOUNDARIES[i].rule);
        json_put_str(j, "status", BOUNDARIES[i].status);
        json_array_append_new(list, j);
    }
    return list;
}

static json_t *modes(void)
{
    json_t *list = json_array();
    for (size_t i = 0; i < sizeof MODES / sizeof *MODES; i++) {
        json_t *j = json_object();
        json_put_str(j, "name", MODES[i].name);
        json_put(j, "script_runs_on_host", json_boolean(MODES[i].script));
        json_put(j, "guest_runs", json_boolean(MODES[i].guest));
        json_put_str(j, "use", MODES[i].use);
        json_put(j, "available", json_boolean(MODES[i].available));
        json_array_append_new(list, j);
    }
    return list;
}

static json_t *rules(const struct rule *all, size_t n)
{
    json_t *list = json_array();
    for (size_t i = 0; i < n; i++) {
        json_t *j = json_object();
        if (all[i].data)
            json_put_str(j, "data", all[i].data);
        json_put_str(j, "rule", all[i].rule);
        json_put_str(j, "status", all[i].status);
        json_array_append_new(list, j);
    }
    return list;
}

json_t *model_json(void)
{
    json_t *j = json_object();
    json_put(j, "isolation", json_null());
    json_put(j, "boundaries", boundaries());
    json_put(j, "modes", modes());
    json_put(j, "crossings", rules(CROSSINGS, sizeof CROSSINGS / sizeof *CROSSINGS));
    json_put(j, "defaults", rules(DEFAULTS, sizeof DEFAULTS / sizeof *DEFAULTS));
    json_put(j, "failures", problem_failures());
    return j;
}
