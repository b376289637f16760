// Signals: their names, and sending one to a command's process group.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sandbox/command_int.h"

// Linux numbers on x86-64: the guest's.
static const struct {
    const char *name;
    int number;
} SIGNALS[] = {
    {"HUP", 1},   {"INT", 2},   {"QUIT", 3},  {"ILL", 4},   {"TRAP", 5},  {"ABRT", 6},    {"BUS", 7},    {"FPE", 8},
    {"KILL", 9},  {"USR1", 10}, {"SEGV", 11}, {"USR2", 12}, {"PIPE", 13}, {"ALRM", 14},   {"TERM", 15},  {"STKFLT", 16},
    {"CHLD", 17}, {"CONT", 18}, {"STOP", 19}, {"TSTP", 20}, {"TTIN", 21}, {"TTOU", 22},   {"URG", 23},   {"XCPU", 24},
    {"XFSZ", 25}, {"VTALRM", 26}, {"PROF", 27}, {"WINCH", 28}, {"IO", 29}, {"PWR", 30}, {"SYS", 31},
};

int command_signal_number(const char *name)
{
    for (size_t i = 0; i < sizeof SIGNALS / sizeof *SIGNALS; i++)
        if (strcmp(SIGNALS[i].name, name) == 0)
            return SIGNALS[i].number;
    return -1;
}

const char *command_signal_name(int number)
{
    for (size_t i = 0; i < sizeof SIGNALS / sizeof *SIGNALS; i++)
        if (SIGNALS[i].number == number)
            return SIGNALS[i].name;
    return NULL;
}

// ---- signal -----------------------------------------------------------------------------------------------------
struct signal_call {
    struct act act;
    struct sandbox *s;
    char id[ID_MAX];
    int number;
    void (*done)(void *arg, const struct err *err);
    void *arg;
};

static void signal_go(struct act *act)
{
    struct signal_call *call = (struct signal_call *)act;
    struct sandbox *s = call->s;
    struct err err = {0};
    CLEANUP_BUF struct buf b = BUF_INIT(256);
    const struct msg_signal m = {.signal = (uint64_t)call->number, .group = true};
    msg_signal_encode(&b, &m);
    pthread_mutex_lock(&s->lock);
    struct command *c = command_by_id(s, call->id);
    if (!c || c->exited || c->finishing)
        err_set(&err, ERR_CONFLICT, "not_running", "the command has finished");
    else if (sandbox_require_running(s, &err) == 0 && c->sent)
        (void)vm_send(s->vm, FRAME_SIGNAL, c->row.agent_id, &b, &err);
    pthread_mutex_unlock(&s->lock);
    act->facts = json_object();
    json_put_str(act->facts, "command_id", call->id);
    json_put_str(act->facts, "signal", command_signal_name(call->number));
    act_end(act, err.kind != ERR_NONE ? &err : NULL);
}

static void signal_done(struct act *act, const struct err *err)
{
    struct signal_call *call = (struct signal_call *)act;
    call->done(call->arg, err);
    sandbox_unref(call->s);
    free(call);
}

int command_signal(struct manager *m, const char *sandbox_id, const char *id, const char *name, const struct admission *a,
                   int success_status, void (*done)(void *arg, const struct err *err), void *arg)
{
    struct err err = {0};
    bool running;
    struct sandbox *s = command_find(m, a->tenant, sandbox_id, id, &running, &err);
    struct signal_call *call = s ? calloc(1, sizeof *call) : NULL;
    if (!call) {
        if (s)
            err_set(&err, ERR_INTERNAL, "out_of_memory", "out of memory");
        sandbox_unref(s);
        done(arg, &err);
        return 0;
    }
    call->act = (struct act){.m = m, .a = *a, .status = success_status, .go = signal_go, .done = signal_done};
    snprintf(call->act.a.sandbox_id, sizeof call->act.a.sandbox_id, "%s", sandbox_id);
    call->s = s;
    call->number = command_signal_number(name);
    call->done = done;
    call->arg = arg;
    snprintf(call->id, sizeof call->id, "%s", id);
    act_begin(&call->act);
    return 0;
}
