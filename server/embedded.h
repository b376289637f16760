// embedded.h - what CMake puts into the binary: the specification as JSON, the documentation page.
#ifndef AIRLOCK_SERVER_EMBEDDED_H
#define AIRLOCK_SERVER_EMBEDDED_H

extern const char embedded_openapi_json[], embedded_openapi_json_end[];
extern const char embedded_docs_html[], embedded_docs_html_end[];

#endif
