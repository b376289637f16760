"""http_params.dict from the specification: methods, paths, parameter and field names, enums. Prints it."""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.dont_write_bytecode = True
sys.path[:0] = [HERE, os.path.join(os.path.dirname(os.path.dirname(HERE)), "openapi")]

import seeds_http  # noqa: E402
import to_json  # noqa: E402

FIXED = ["GET /", "POST /", "PUT /", "DELETE /", "HEAD /", "PATCH /", "Range: bytes=", "Idempotency-Key: ", "If-Match: ", "%00", "%2F",
         "%C3%A4", "%ff", "&", "=", "?", "\\x0a\\x0a", "/../", "true", "false", "null", "9007199254740991", "{\\\"", "\\\":", "\\\"}", "[", "{}"]


def names(node, found):
    if isinstance(node, list):
        for one in node:
            names(one, found)
    elif isinstance(node, dict):
        found.update(f'\\"{k}\\":' for k in node.get("properties", {}) if isinstance(node["properties"], dict))
        found.update(str(v) for v in node.get("enum", []) if v is not None)
        for one in node.values():
            names(one, found)


def main():
    document = to_json.load(os.path.join(HERE, "../../openapi/openapi.yaml"))
    spec = seeds_http.Spec(document)
    words, found = list(FIXED), set()
    for method, template, parameters, body in spec.operations():
        words.append(f"{method} {seeds_http.filled(template, parameters)}")
        words += [f"{p['name']}=" if p["in"] == "query" else f"{p['name']}: " for p in parameters if p["in"] != "path"]
        schema = (body or {}).get("content", {}).get("application/json", {}).get("schema")
        if schema:
            names(spec.at(schema), found)
    for name in ("Labels", "Env", "Resources", "Lifecycle", "Scope", "EgressRule", "SecretBinding"):
        names(document["components"]["schemas"].get(name), found)
    for word in dict.fromkeys(words + sorted(found)):
        print('"' + word + '"')


main()
