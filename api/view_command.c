#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/principal.h"
#include "api/view.h"
#include "base/clock.h"
#include "base/enc.h"
#include "sandbox/command.h"

// A start that failed for cwd or user has no outcome word of its own on the wire: as a shell would say, 126.
static const char *outcome_of(const struct command_row *row)
{
    return row->outcome == OUTCOME_SPAWN_FAILED ? "exited" : command_outcome_name(row->outcome);
}

static void put_end(json_t *j, const struct command_row *row)
{
    json_put_str(j, "outcome", outcome_of(row));
    const bool exited = row->outcome == OUTCOME_EXITED || row->outcome == OUTCOME_SPAWN_FAILED;
    const int code = row->outcome == OUTCOME_SPAWN_FAILED ? 126 : row->exit_code;
    json_put(j, "exit_code", exited ? json_integer(code) : json_null());
    char number[16];
    const char *name = row->signal > 0 && !exited ? command_signal_name(row->signal) : NULL;
    if (row->signal > 0 && !exited && !name) { // a real-time signal
        snprintf(number, sizeof number, "RT%d", row->signal);
        name = number;
    }
    json_put_str(j, "signal", name);
    view_put_text(j, "spawn_error", row->spawn_error);
}

static int64_t duration_of(const struct command_row *row)
{
    if (row->phase == COMMAND_FINISHED || row->started_at_ms == 0)
        return row->duration_ms;
    const int64_t so_far = clock_wall_ms() - row->started_at_ms;
    return so_far > 0 ? so_far : 0;
}

static void put_totals(json_t *j, const struct command_row *row)
{
    json_put_int(j, "stdout_bytes", row->stdout_bytes);
    json_put_int(j, "stderr_bytes", row->stderr_bytes);
}

static void put_time_taken(json_t *j, const struct command_row *row)
{
    json_put(j, "timed_out", json_boolean(row->outcome == OUTCOME_TIMED_OUT));
    json_put_int(j, "duration_ms", duration_of(row));
}

static void put_ids(json_t *j, const struct command_row *row)
{
    json_put_str(j, "job_id", row->job_id);
    json_put_str(j, "audit_id", row->audit_id);
    json_put_str(j, "receipt_id", row->receipt_id);
}

// ---- output -------------------------------------------------------------------------------------------------------
static int read_stream(struct spool_reader *r, enum spool_stream stream, int64_t max, struct buf *out)
{
    struct err err = {0};
    while (r && (int64_t)out->len < max) {
        const uint64_t want = (uint64_t)(max - (int64_t)out->len) < 65536 ? (uint64_t)(max - (int64_t)out->len) : 65536;
        if (!buf_reserve(out, want))
            return -1;
        const int64_t n = spool_read(r, stream, out->len, out->data + out->len, want, &err);
        if (n <= 0)
            return (int)n;
        out->len += (size_t)n;
    }
    return 0;
}

// The first bytes as text where they are UTF-8 (a code point that the cut splits is left out), else base64 of them all.
static void put_stream(json_t *j, const char *name, const struct buf *b, int64_t produced, bool open_end)
{
    char key[32];
    const bool cut_off = open_end || (int64_t)b->len < produced;
    const size_t whole = cut_off ? enc_utf8_cut(b->data, b->len) : b->len;
    const bool utf8 = enc_utf8_valid(b->data, whole);
    const size_t shown = utf8 ? whole : b->len;
    if (utf8) {
        json_put(j, name, json_stringn_nocheck((const char *)b->data, whole));
    } else {
        CLEANUP_BUF struct buf text = BUF_INIT(b->len / 3 * 4 + 8);
        enc_base64(&text, b->data, b->len);
        json_put(j, name, json_stringn_nocheck(buf_text(&text), text.len));
    }
    snprintf(key, sizeof key, "%s_encoding", name);
    json_put_str(j, key, utf8 ? "utf8" : "base64");
    snprintf(key, sizeof key, "%s_truncated", name);
    json_put(j, key, json_boolean((int64_t)shown < produced));
}

static void put_output(json_t *j, struct api_call *c, const struct command_row *row)
{
    struct err err = {0};
    const bool silent = row->phase == COMMAND_FINISHED && row->stdout_bytes == 0 && row->stderr_bytes == 0;
    struct spool_reader *r =
        silent ? NULL : command_output(c->a->manager, row->tenant, row->sandbox_id, row->id, &err);
    for (int i = 0; i < 2; i++) {
        CLEANUP_BUF struct buf b = BUF_INIT((size_t)row->max_output_bytes + 65536);
        buf_reserve(&b, 1);
        read_stream(r, i ? SPOOL_STDERR : SPOOL_STDOUT, row->max_output_bytes, &b);
        put_stream(j, i ? "stderr" : "stdout", &b, i ? row->stderr_bytes : row->stdout_bytes,
                   row->phase != COMMAND_FINISHED);
    }
    spool_reader_close(r);
}

// ---- the shapes -----------------------------------------------------------------------------------------------------
json_t *view_command_result(struct api_call *c, const struct command_row *row)
{
    json_t *j = json_object();
    json_put_str(j, "command_id", row->id);
    put_end(j, row);
    put_output(j, c, row);
    put_totals(j, row);
    put_time_taken(j, row);
    put_ids(j, row);
    return j;
}

json_t *view_command_result_by_id(struct api_call *c, const char *id)
{
    struct command_row row = {0};
    struct err err = {0};
    if (command_info(c->a->manager, c->who->row.tenant, c->in->ids[0], id, &row, &err) != 0)
        return NULL;
    json_t *j = view_command_result(c, &row);
    command_row_free(&row);
    return j;
}

static void put_facts(json_t *j, const struct command_row *row)
{
    json_put_str(j, "user", row->user);
    json_put(j, "background", json_boolean(row->background));
    json_put(j, "env_keys", view_sorted_keys(row->env_names_json));
    json_put(j, "timeout_seconds", view_seconds(row->timeout_ms));
    json_put_int(j, "stdin_bytes", row->stdin_bytes);
    json_put(j, "redacted", json_boolean(row->redacted));
    json_put_time(j, "created_at", row->created_at_ms);
    json_put_time(j, "started_at", row->started_at_ms);
    json_put_time(j, "finished_at", row->finished_at_ms);
    put_ids(j, row);
}

static json_t *begin_command(const struct command_row *row)
{
    json_t *j = json_object();
    json_put_str(j, "command_id", row->id);
    json_put_str(j, "sandbox_id", row->sandbox_id);
    json_put_str(j, "state", row->phase == COMMAND_FINISHED ? "finished" : "running");
    put_end(j, row);
    return j;
}

json_t *view_command(struct api_call *c, const struct command_row *row)
{
    json_t *j = begin_command(row);
    put_output(j, c, row);
    put_totals(j, row);
    put_time_taken(j, row);
    put_facts(j, row);
    return j;
}

json_t *view_command_summary(const struct command_row *row)
{
    json_t *j = begin_command(row);
    put_totals(j, row);
    put_time_taken(j, row);
    put_facts(j, row);
    return j;
}

json_t *view_command_exit(const struct command_row *row)
{
    json_t *j = json_object();
    json_put_str(j, "command_id", row->id);
    put_end(j, row);
    put_totals(j, row);
    put_time_taken(j, row);
    put_ids(j, row);
    return j;
}

json_t *view_command_started(const struct command_row *row)
{
    json_t *j = json_object();
    json_put_str(j, "command_id", row->id);
    put_ids(j, row);
    return j;
}
