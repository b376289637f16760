#include "qemu/qmp_parse.h"

#include <string.h>

#include "base/json.h"

void qmp_parser_init(struct qmp_parser *p)
{
    buf_init(&p->line, QMP_LINE_MAX);
    p->scanned = 0;
}

void qmp_parser_free(struct qmp_parser *p)
{
    buf_free(&p->line);
    p->scanned = 0;
}

int qmp_parser_feed(struct qmp_parser *p, const void *data, size_t len)
{
    return buf_add(&p->line, data, len) ? 0 : -1;
}

static enum qmp_kind kind_of(const json_t *o)
{
    if (json_object_get(o, "return"))
        return QMP_RETURN;
    if (json_object_get(o, "error"))
        return QMP_ERROR;
    if (json_object_get(o, "event"))
        return QMP_EVENT;
    return json_object_get(o, "QMP") ? QMP_GREETING : QMP_OTHER;
}

json_t *qmp_parser_next(struct qmp_parser *p, enum qmp_kind *ret_kind, unsigned *ret_skipped)
{
    for (;;) {
        const uint8_t *nl = p->line.len > p->scanned
                                ? memchr(p->line.data + p->scanned, '\n', p->line.len - p->scanned)
                                : NULL; // data is NULL before anything came
        if (!nl) {
            p->scanned = p->line.len;
            return NULL;
        }
        const size_t len = (size_t)(nl - p->line.data);
        json_t *o = json_parse_strict((const char *)p->line.data, len, NULL);
        buf_consume(&p->line, len + 1);
        p->scanned = 0;
        if (json_is_object(o)) {
            *ret_kind = kind_of(o);
            return o;
        }
        json_decref(o);
        if (ret_skipped)
            (*ret_skipped)++;
    }
}
