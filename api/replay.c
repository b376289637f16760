// The stored answer again, built from status and reference.
#include <stdlib.h>
#include <string.h>

#include "api/call.h"
#include "api/problem.h"
#include "api/reply.h"
#include "api/view.h"
#include "sandbox/command.h"

static void replay_problem(struct api_call *c)
{
    struct input *in = c->in;
    json_t *p = json_loads(in->replay->problem_json, 0, NULL);
    if (!p) {
        struct err err = {0};
        err_set(&err, ERR_INTERNAL, "replay", "the stored answer cannot be read");
        in->admitted = false;
        call_fail(c, &err);
        return;
    }
    json_put_str(p, "request_id", c->request_id);
    const char *kind = json_get_str(p, "kind");
    if (kind && strcmp(kind, "guest_command_failed") == 0 && strncmp(in->replay->ref, "cmd", 3) == 0 &&
        !json_object_get(p, "result")) {
        json_t *result = view_command_result_by_id(c, in->replay->ref);
        if (result)
            json_put(p, "result", result);
    }
    const bool nothing = kind && strcmp(kind, "not_found") == 0;
    const int status = in->replay->status;
    char *text = json_dumps(p, JSON_COMPACT);
    json_decref(p);
    if (nothing)
        in->has_admission = false;
    reply_text(c, status, "application/problem+json", text, text ? strlen(text) : 0);
}

static void replay_sandbox(struct api_call *c)
{
    struct err err = {0};
    struct sandbox_info *info = manager_get(c->a->manager, c->in->a.tenant, c->in->replay->ref, &err);
    if (!info) {
        call_fail(c, &err);
        return;
    }
    view_reply_sandbox(c, c->in->replay->status, info);
    sandbox_info_unref(info);
}

void call_replay(struct api_call *c)
{
    const struct idem_row *row = c->in->replay;
    const bool wants_job = (c->in->prefer_async || row->status == 202) && *row->job_id;
    if (c->op->handler->replay)
        c->op->handler->replay(c);
    else if (wants_job)
        view_reply_accepted(c);
    else if (row->problem_json && row->status >= 400)
        replay_problem(c);
    else if (strncmp(row->ref, "sbx", 3) == 0)
        replay_sandbox(c);
    else {
        struct err err = {0};
        err_set(&err, ERR_INTERNAL, "replay", "the stored answer cannot be rebuilt");
        c->in->admitted = false;
        call_fail(c, &err);
    }
}

bool replay_is_problem(struct api_call *c)
{
    const struct idem_row *row = c->in->replay;
    if (!row->problem_json || row->status < 400)
        return false;
    replay_problem(c);
    return true;
}
