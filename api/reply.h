// reply.h - answers: exactly one per call. Each function ends the handler's hold on the call (call_answer). Threads: the
// one that has the call.
#ifndef AIRLOCK_API_REPLY_H
#define AIRLOCK_API_REPLY_H

#include "api/call.h"

void reply_header(struct api_call *c, const char *name, const char *value); // borrowed until the end of the call

void reply_json(struct api_call *c, int status, json_t *stolen);
void reply_text(struct api_call *c, int status, const char *type, char *text_taken, size_t len);
// body lives until release(owner).
void reply_borrowed(struct api_call *c, int status, const char *type, const char *body, size_t len, const void *owner,
                    void (*release)(const void *owner));
// len -1: unknown. c->stream and c->state are set.
void reply_stream(struct api_call *c, int status, const char *type, int64_t len);
void reply_head(struct api_call *c, int status, const char *type, size_t len);
// c->in->err with faults and extras, as it is: evidence is settled already.
void reply_problem(struct api_call *c);
char *reply_problem_text(struct api_call *c); // new
// c->in->err is the one answer for missing, foreign and malformed: no ids stand in it.
bool reply_says_nothing(const struct api_call *c);

#endif
