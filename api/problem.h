// problem.h - the one shape of a refusal, and the one place that maps kinds to statuses. Pure; any thread.
#ifndef AIRLOCK_API_PROBLEM_H
#define AIRLOCK_API_PROBLEM_H

#include <jansson.h>

#include "api/faults.h"
#include "store/evidence.h"

// The contract's word and kind for a refusal whose meaning depends on the operation.
void problem_adjust(struct err *err, const char *operation);
int problem_status(enum err_kind kind);
const char *problem_title(enum err_kind kind);
// What is said beside the error itself; members may be NULL.
struct problem_about {
    const char *operation, *request_id, *sandbox_id, *job_id, *audit_id;
    const struct faults *faults;
};
json_t *problem_json(const struct err *err, const struct problem_about *about); // new
// {"kind","status","recovery"} of the eight failures that need different recoveries, for the security model. New.
json_t *problem_failures(void);
// Not stored for replay: 401, 429, 5xx.
bool problem_storable(int status);

#endif
