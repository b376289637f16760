// embedded.h - what CMake puts into the binary: the specification as JSON, the documentation page.
#ifndef AIRLOCK_SERVER_EMBEDDED_H
#define AIRLOCK_SERVER_EMBEDDED_H

#include <stdint.h>

extern const char embedded_openapi_json[], embedded_docs_html[];
extern const uint64_t embedded_openapi_json_len, embedded_docs_html_len;

#endif
