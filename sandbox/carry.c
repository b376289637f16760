#include "sandbox/carry.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sandbox/command_int.h"
#include "store/spool.h"

#define COPY_BYTES (1u << 20)

// ---- which ------------------------------------------------------------------------------------------------------
// Archive transfers are a client's stream: they belong to the source alone.
static bool carries(const struct command *c)
{
    return c->sent && c->durable && !c->archive && !c->row.internal && !c->finishing;
}

void carry_sent_locked(struct sandbox *s, struct carry *c)
{
    const size_t most = sizeof c->v / sizeof *c->v;
    for (struct command *one = s->commands; one && c->n < most; one = one->next)
        if (carries(one) && command_row_copy(&c->v[c->n].row, &one->row) == 0)
            c->n++;
}

void carry_all(struct sandbox *s, struct carry *c)
{
    pthread_mutex_lock(&s->lock);
    carry_sent_locked(s, c);
    pthread_mutex_unlock(&s->lock);
}

void carry_offsets(struct sandbox *s, struct carry *c)
{
    pthread_mutex_lock(&s->lock);
    for (size_t i = 0; i < c->n; i++) {
        const struct command *one = command_by_id(s, c->v[i].row.id);
        c->v[i].there = one != NULL; // else its outcome is recorded, and a fork need not tell it again
        if (one)
            memcpy(c->v[i].spooled, one->spooled, sizeof one->spooled);
    }
    pthread_mutex_unlock(&s->lock);
}

void carry_free(struct carry *c)
{
    for (size_t i = 0; i < c->n; i++)
        command_row_free(&c->v[i].row);
    c->n = 0;
}

json_t *carry_json(const struct carry *c)
{
    json_t *list = json_array();
    for (size_t i = 0; i < c->n; i++) {
        const struct command_row *row = &c->v[i].row;
        if (!c->v[i].there)
            continue;
        json_t *o = json_object();
        json_put_str(o, "id", row->id);
        json_put_int(o, "agent_id", (int64_t)row->agent_id);
        json_put_str(o, "user", row->user);
        json_put_int(o, "timeout_ms", row->timeout_ms);
        json_put_int(o, "max_output_bytes", row->max_output_bytes);
        json_put_int(o, "has_stdin", row->has_stdin);
        json_put_int(o, "stdin_closed", row->stdin_closed);
        json_put_int(o, "stdin_bytes", row->stdin_bytes);
        json_put_str(o, "argv_hmac", row->argv_hmac);
        json_put_str(o, "env_names", row->env_names_json);
        json_put_int(o, "redacted", row->redacted);
        json_put_int(o, "stdout_bytes", (int64_t)c->v[i].spooled[0]);
        json_put_int(o, "stderr_bytes", (int64_t)c->v[i].spooled[1]);
        json_array_append_new(list, o);
    }
    return list;
}

// ---- output -------------------------------------------------------------------------------------------------------
// In the order in which it arrived, each stream up to its limit.
static int copy_pieces(struct spool_reader *r, struct spool *to, const uint64_t limit[2], struct err *err)
{
    CLEANUP_FREE uint8_t *chunk = malloc(COPY_BYTES);
    uint64_t position = 0, offset;
    enum spool_stream stream;
    if (!chunk)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    for (int64_t n; (n = spool_next(r, &position, &stream, &offset, chunk, COPY_BYTES, err)) != 0;) {
        if (n < 0)
            return -1;
        if (offset >= limit[stream])
            continue;
        const uint64_t left = limit[stream] - offset;
        const struct spool_piece p = {.stream = stream, .offset = offset, .data = chunk,
                                      .len = (uint64_t)n < left ? (uint64_t)n : left};
        if (spool_write(to, &p, 1, err) != 0)
            return -1;
    }
    return 0;
}

// What a stream produced past its cap was counted there, and is here. All else has to be there.
static int count_dropped(struct spool *to, const uint64_t limit[2], struct err *err)
{
    struct spool_state st;
    spool_state(to, &st);
    for (unsigned i = 0; i < 2; i++) {
        const uint64_t most = limit[i] < LIMIT_SPOOL_STREAM_BYTES ? limit[i] : LIMIT_SPOOL_STREAM_BYTES;
        const struct spool_piece past = {.stream = i, .offset = most, .data = "", .len = limit[i] - most};
        if (st.kept[i] != most)
            return err_set(err, ERR_INTERNAL, "spool_short", "the output of a command is not all there");
        if (past.len > 0 && spool_write(to, &past, 1, err) != 0)
            return -1;
    }
    return 0;
}

static int copy_spool(int from_dirfd, const char *from, int to_dirfd, const char *to, const json_t *command, struct err *err)
{
    const uint64_t limit[2] = {(uint64_t)json_get_int(command, "stdout_bytes", 0),
                               (uint64_t)json_get_int(command, "stderr_bytes", 0)};
    if (limit[0] == 0 && limit[1] == 0)
        return 0;
    struct spool_reader *r = spool_reader_open(from_dirfd, from, err);
    struct spool *sp = r ? spool_open(to_dirfd, to, err) : NULL;
    const int failed = sp && copy_pieces(r, sp, limit, err) == 0 ? count_dropped(sp, limit, err) : -1;
    spool_close(sp);
    spool_reader_close(r);
    return failed;
}

int carry_spools(int from_dirfd, int to_dirfd, const json_t *commands, struct err *err)
{
    size_t i;
    json_t *one;
    json_array_foreach(commands, i, one) {
        const char *id = json_get_str(one, "id");
        if (!id || !id_valid(ID_COMMAND, id) || copy_spool(from_dirfd, id, to_dirfd, id, one, err) != 0)
            return -1;
    }
    return 0;
}

// ---- the fork's own -------------------------------------------------------------------------------------------------
static void fill(struct continued *c, struct sandbox *s, const struct admission *by, const json_t *one)
{
    struct command_row *row = &c->row;
    const char *hmac = json_get_str(one, "argv_hmac"), *user = json_get_str(one, "user");
    const char *names = json_get_str(one, "env_names");
    c->a = *by; // who asked for the fork asked for this
    c->a.idem_key[0] = 0;
    snprintf(c->a.operation, sizeof c->a.operation, "command.continue");
    snprintf(c->a.sandbox_id, sizeof c->a.sandbox_id, "%s", s->id);
    id_new(ID_AUDIT, c->a.audit_id);
    id_new(ID_RECEIPT, c->a.receipt_id);
    id_new(ID_JOB, c->a.job_id);
    id_new(ID_COMMAND, row->id);
    snprintf(row->tenant, sizeof row->tenant, "%s", s->tenant);
    snprintf(row->sandbox_id, sizeof row->sandbox_id, "%s", s->id);
    snprintf(row->user, sizeof row->user, "%s", user ? user : "");
    snprintf(row->argv_hmac, sizeof row->argv_hmac, "%s", hmac ? hmac : "");
    row->env_names_json = names ? strdup(names) : NULL;
    row->phase = COMMAND_RUNNING_;
    row->background = true; // nobody waits for its answer
    row->timeout_ms = json_get_int(one, "timeout_ms", 0);
    row->max_output_bytes = json_get_int(one, "max_output_bytes", 0);
    row->has_stdin = json_get_int(one, "has_stdin", 0) != 0;
    row->stdin_closed = json_get_int(one, "stdin_closed", 0) != 0;
    row->stdin_bytes = json_get_int(one, "stdin_bytes", 0);
    row->redacted = json_get_int(one, "redacted", 0) != 0;
    row->agent_id = (uint64_t)json_get_int(one, "agent_id", 0);
    row->created_at_ms = row->started_at_ms = clock_wall_ms();
    snprintf(row->job_id, sizeof row->job_id, "%s", c->a.job_id);
    snprintf(row->audit_id, sizeof row->audit_id, "%s", c->a.audit_id);
    snprintf(row->receipt_id, sizeof row->receipt_id, "%s", c->a.receipt_id);
    job_begin(&c->job, &c->a, c->a.operation);
    snprintf(c->job.ref, sizeof c->job.ref, "%s", row->id);
    c->facts = json_object();
    json_put_str(c->facts, "continues", json_get_str(one, "id"));
}

void carry_discard(struct continued *c, size_t n)
{
    for (size_t i = 0; c && i < n; i++) {
        command_row_free(&c[i].row);
        job_row_free(&c[i].job);
        json_decref(c[i].facts);
    }
    free(c);
}

int carry_prepare(struct sandbox *s, const struct admission *by, const json_t *commands, int from_dirfd,
                  struct continued **ret, size_t *ret_n, struct err *err)
{
    const size_t n = json_array_size(commands);
    struct continued *all = calloc(n + 1, sizeof *all);
    int failed = 0;
    if (!all)
        return err_set(err, ERR_INTERNAL, "out_of_memory", "out of memory");
    for (size_t i = 0; !failed && i < n; i++) {
        const json_t *one = json_array_get(commands, i);
        const char *id = json_get_str(one, "id");
        fill(&all[i], s, by, one);
        failed = id && id_valid(ID_COMMAND, id)
                     ? copy_spool(from_dirfd, id, s->out_dirfd, all[i].row.id, one, err)
                     : err_set(err, ERR_INTERNAL, "carry", "a command of the saved state has no id");
    }
    if (failed) {
        carry_discard(all, n);
        return -1;
    }
    *ret = all;
    *ret_n = n;
    return 0;
}

int carry_insert(struct store_tx *tx, const struct continued *c, size_t n, struct err *err)
{
    for (size_t i = 0; i < n; i++) {
        const struct change change = {.admit = &c[i].a, .admit_facts = c[i].facts, .job_insert = &c[i].job};
        if (change_apply(tx, &change, err) != 0 || command_insert(tx, &c[i].row, 0, err) != 0)
            return -1;
    }
    return 0;
}

int carry_list(struct sandbox *s, struct continued *c, size_t n, struct err *err)
{
    for (size_t i = 0; i < n; i++)
        if (command_adopt(s, &c[i].row, &c[i].a, err) != 0)
            return -1;
    return 0;
}
