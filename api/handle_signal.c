// Signals to a running command.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/principal.h"
#include "api/reply.h"
#include "api/view.h"
#include "sandbox/command.h"

struct sent {
    struct api_call *c; // a reference
    struct err err;
};

static struct sent *sent_new(struct api_call *c)
{
    struct sent *s = calloc(1, sizeof *s);
    if (s) {
        s->c = call_ref(c);
        c->in->settles_itself = true;
        call_admission(c);
        return s;
    }
    struct err err = {0};
    err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
    call_fail(c, &err);
    return NULL;
}

static void sent_free(struct sent *s)
{
    call_unref(s->c);
    free(s);
}

static void reply_signal(struct api_call *c, const char *name)
{
    json_t *j = json_object();
    json_put_str(j, "command_id", c->in->ids[1]);
    json_put_str(j, "signal", name);
    json_put_str(j, "audit_id", c->in->a.audit_id);
    json_put_str(j, "receipt_id", c->in->a.receipt_id);
    reply_json(c, 200, j);
}

static void answer_signal(void *arg)
{
    struct sent *s = arg;
    if (s->err.kind != ERR_NONE)
        call_fail(s->c, &s->err);
    else
        reply_signal(s->c, json_get_str(s->c->in->json, "signal"));
    sent_free(s);
}

static void on_signal(void *arg, const struct err *err)
{
    struct sent *s = arg;
    if (err)
        s->err = *err;
    if (work_submit(s->c->a->pool, answer_signal, s) != 0)
        answer_signal(s);
}

static void send_signal(struct api_call *c)
{
    struct sent *s = sent_new(c);
    if (s)
        command_signal(c->a->manager, c->in->ids[0], c->in->ids[1], json_get_str(c->in->json, "signal"), &c->in->a, 200,
                       on_signal, s);
}

static void replay_signal(struct api_call *c)
{
    struct err err = {0};
    if (replay_is_problem(c))
        return;
    c->in->json = json_parse_strict(buf_text(&c->in->body), c->in->body.len, &err);
    reply_signal(c, json_get_str(c->in->json, "signal"));
}

const struct handler SIGNAL_HANDLERS[] = {
    {"command.signal", RUN_ASYNC, send_signal, NULL, replay_signal},
    {0},
};
