#include <stdlib.h>
#include <string.h>

#include "store/int.h"

static const struct field EVENT_FIELDS[] = {
    FIELD(INT64, event_row, seq), FIELD(TEXT, event_row, id), FIELD(TEXT, event_row, tenant),
    FIELD(TEXT, event_row, kind), FIELD(TEXT, event_row, sandbox_id), FIELD(HEAP, event_row, data_json),
    FIELD(INT64, event_row, at_ms),
};
static const struct row_type EVENT = ROW_TYPE(event_row, EVENT_FIELDS);

// seq counts up for ever: store_prune never removes the newest row.
int event_append(struct store_tx *tx, const char *tenant, const char *kind, const char *sandbox_id,
                 const char *data_json, struct err *err)
{
    char id[ID_MAX];
    CLEANUP_STMT struct stmt *st = db_stmt(tx->db, "INSERT INTO events (id, tenant, kind, sandbox_id, data_json, at_ms)"
                                                   " VALUES (?, ?, ?, ?, ?, ?)", err);
    db_bind_text(st, id_new(ID_EVENT, id));
    db_bind_text(st, tenant);
    db_bind_text(st, kind);
    db_bind_text(st, sandbox_id ? sandbox_id : "");
    db_bind_text(st, data_json);
    db_bind_int(st, tx->now_ms);
    if (db_run(st, err) != 0)
        return -1;
    tx->events = true;
    return 0;
}

int event_list(struct store *s, const char *tenant, int64_t after_seq, unsigned limit,
               bool (*fn)(void *, const struct event_row *), void *arg, struct err *err)
{
    struct db *db = reader_db(s, err);
    CLEANUP_STMT struct stmt *st =
        db ? db_stmt(db, "SELECT seq, id, tenant, kind, sandbox_id, data_json, at_ms FROM events"
                         " WHERE tenant = ? AND seq > ? ORDER BY seq LIMIT ?", err) : NULL;
    db_bind_text(st, tenant);
    db_bind_int(st, after_seq);
    db_bind_int(st, limit);
    struct event_row row;
    int got;
    while ((got = row_next(st, &EVENT, &row, err)) > 0) {
        const bool more = fn(arg, &row);
        row_free(&EVENT, &row);
        if (!more)
            return 0;
    }
    return got;
}
