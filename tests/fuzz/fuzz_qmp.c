// What QEMU says on its monitor socket. Input: seed of the cuts, bytes.
//
// Claims: objects, their kinds and what is skipped do not depend on how the bytes arrive; only objects come out; each
// one, written as one line and parsed again, is the same.
#include "base/json.h"
#include "fuzz.h"
#include "qemu/qmp_parse.h"

struct seen {
    uint64_t hash;
    unsigned objects, skipped;
    size_t rest; // bytes of the line that has no end yet
};

static uint64_t mix_object(uint64_t hash, enum qmp_kind kind, const json_t *o)
{
    char *text = json_canonical(o);
    CLAIM(text);
    hash = mix(mix(hash, &kind, sizeof kind), text, strlen(text));
    free(text);
    return hash;
}

static void again(enum qmp_kind kind, const json_t *o)
{
    struct qmp_parser p;
    enum qmp_kind now = QMP_OTHER;
    char *text = json_canonical(o);
    qmp_parser_init(&p);
    CLAIM(text && qmp_parser_feed(&p, text, strlen(text)) == 0);
    CLAIM(!qmp_parser_next(&p, &now, NULL));
    CLAIM(qmp_parser_feed(&p, "\r\n", 2) == 0);
    json_t *same = qmp_parser_next(&p, &now, NULL);
    CLAIM(same && now == kind && json_equal(same, o));
    json_decref(same);
    qmp_parser_free(&p);
    free(text);
}

static void drain(struct qmp_parser *p, struct seen *s, bool twice)
{
    enum qmp_kind kind;
    for (json_t *o; (o = qmp_parser_next(p, &kind, &s->skipped));) {
        CLAIM(json_is_object(o));
        CLAIM(kind != QMP_RETURN || json_object_get(o, "return"));
        CLAIM(kind != QMP_EVENT || json_object_get(o, "event"));
        CLAIM(kind != QMP_ERROR || json_object_get(o, "error"));
        CLAIM(kind != QMP_GREETING || json_object_get(o, "QMP"));
        s->objects++;
        s->hash = mix_object(s->hash, kind, o);
        if (twice)
            again(kind, o);
        json_decref(o);
    }
    s->rest = p->line.len;
}

static struct seen run(const uint8_t *data, size_t len, bool whole, uint8_t seed)
{
    struct qmp_parser p;
    struct seen s = {0};
    struct cuts cuts = {seed};
    qmp_parser_init(&p);
    drain(&p, &s, false); // before anything came
    for (size_t at = 0; at < len;) {
        const size_t piece = whole ? len : next_cut(&cuts), n = piece < len - at ? piece : len - at;
        uint8_t *copy = exact_copy(data + at, n);
        CLAIM(qmp_parser_feed(&p, copy, n) == 0);
        free(copy);
        drain(&p, &s, whole);
        at += n;
    }
    qmp_parser_free(&p);
    return s;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct bytes in = {data, size};
    const uint8_t seed = take_u8(&in);
    if (in.left > QMP_LINE_MAX)
        return 0;
    const struct seen whole = run(in.data, in.left, true, 0), pieces = run(in.data, in.left, false, seed);
    CLAIM(whole.objects == pieces.objects && whole.hash == pieces.hash);
    CLAIM(whole.skipped == pieces.skipped && whole.rest == pieces.rest);
    return 0;
}
