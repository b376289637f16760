#!/usr/bin/env python3
"""Checks of openapi/openapi.yaml that a general linter does not know. Usage: test_spec.py [openapi.yaml]

Prints one line per check, exits 1 when one failed. Needs python3-yaml and python3-jsonschema (Debian)."""
import json
import os
import re
import sys
import warnings

warnings.simplefilter("ignore")
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "../../openapi"))
sys.dont_write_bytecode = True

import jsonschema  # noqa: E402
import docs_page  # noqa: E402
import to_json  # noqa: E402

SPEC = to_json.load(sys.argv[1] if len(sys.argv) > 1 else os.path.join(HERE, "../../openapi/openapi.yaml"))
METHODS = ("get", "head", "put", "post", "patch", "delete")
SCOPES = set(SPEC["components"]["schemas"]["Scope"]["enum"])
# What the server's validator implements for requests, and what it passes over.
KEYWORDS = {"type", "properties", "required", "additionalProperties", "propertyNames", "enum", "const", "minimum", "maximum",
            "minLength", "maxLength", "pattern", "items", "minItems", "maxItems", "maxProperties", "minProperties", "oneOf",
            "$ref"}
ANNOTATIONS = {"default", "description", "examples", "example", "format", "x-airlock-unbuilt", "x-airlock-unbuilt-values",
               "x-airlock-root-scope"}
# Routes of the contract that this version does not have: they must stay 404 and out of here.
LATER = re.compile(r"/(plans|workloads|secrets|policies|watch|tty)(/|$)")
failed = 0
number = 0


def check(name, faults):
    global failed, number
    number += 1
    faults = list(faults)
    print(f"{'not ok' if faults else 'ok'} {number} - {name}")
    for fault in faults:
        print(f"#   {fault}")
    failed += bool(faults)


def resolve(node):
    while isinstance(node, dict) and "$ref" in node:
        target = SPEC
        for part in node["$ref"][2:].split("/"):
            target = target[part.replace("~1", "/").replace("~0", "~")]
        node = target
    return node


def operations():
    for path, item in SPEC["paths"].items():
        for method in METHODS:
            if method in item:
                yield path, method, item, item[method]


def parameters(item, op):
    return [resolve(p) for p in item.get("parameters", []) + op.get("parameters", [])]


def subschemas(schema, where, seen):
    """Every schema that a request can meet, with where it stands, references followed once."""
    if "$ref" in schema:
        if schema["$ref"] in seen:
            return
        seen.add(schema["$ref"])
        yield where, schema
        yield from subschemas(resolve(schema), schema["$ref"], seen)
        return
    yield where, schema
    for name, sub in schema.get("properties", {}).items():
        yield from subschemas(sub, f"{where}/properties/{name}", seen)
    for key in ("additionalProperties", "propertyNames", "items"):
        if isinstance(schema.get(key), dict):
            yield from subschemas(schema[key], f"{where}/{key}", seen)


def request_schemas():
    seen = set()
    for path, method, item, op in operations():
        for p in parameters(item, op):
            yield from subschemas(p["schema"], f"{method} {path} parameter {p['name']}", seen)
        for media, content in resolve(op.get("requestBody", {})).get("content", {}).items():
            if media == "application/json":
                yield from subschemas(content["schema"], f"{method} {path} body", seen)


def validator(schema):
    # The document is the root, so that #/components/… resolves.
    root = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    resolver = jsonschema.RefResolver("", SPEC)
    return jsonschema.Draft202012Validator(root, resolver=resolver,
                                           format_checker=jsonschema.FormatChecker())


def media_of(where, carrier):
    for media, content in carrier.get("content", {}).items():
        yield f"{where} {media}", content


def bodies():
    for path, method, item, op in operations():
        yield from media_of(f"{op['operationId']} request", resolve(op.get("requestBody", {})))
        for status, response in op["responses"].items():
            yield from media_of(f"{op['operationId']} {status}", resolve(response))


# ---- checks ---------------------------------------------------------------------------------------------------------
def x_fields():
    for path, method, item, op in operations():
        for key in ("operationId", "summary", "description", "tags", "responses"):
            if not op.get(key):
                yield f"{method} {path}: no {key}"
        if not re.fullmatch(r"[a-z_]+\.[a-z_]+", op.get("x-airlock-operation", "")):
            yield f"{method} {path}: x-airlock-operation"
        if op.get("x-airlock-scope") not in SCOPES | {"none"}:
            yield f"{method} {path}: x-airlock-scope"
        if op.get("x-airlock-evidence") not in ("receipt", "audit", "none"):
            yield f"{method} {path}: x-airlock-evidence"
        if op.get("x-airlock-body") not in ("json", "raw", "none"):
            yield f"{method} {path}: x-airlock-body"
        if (op.get("x-airlock-scope") == "none") != (op.get("security") == []):
            yield f"{method} {path}: scope and security disagree"


def unique():
    seen = {}
    for path, method, item, op in operations():
        for key in ("operationId", "x-airlock-operation"):
            if (key, op[key]) in seen:
                yield f"{key} {op[key]} twice"
            seen[key, op[key]] = True
        if not re.fullmatch(r"[a-z]+([A-Z][a-z]+)*[A-Z]?[a-z]*", op["operationId"]):
            yield f"operationId {op['operationId']} is not camelCase"


def evidence():
    for path, method, item, op in operations():
        reads_content = method == "get" and op["x-airlock-operation"] in ("file.read", "archive.read")
        if (method not in ("get", "head") or reads_content) and op["x-airlock-evidence"] != "receipt":
            yield f"{method} {path}: has no receipt"
        for status, response in op["responses"].items():
            response = resolve(response)
            headers = {n: resolve(h).get("required", False) for n, h in response.get("headers", {}).items()}
            if "X-Request-Id" not in headers:
                yield f"{method} {path} {status}: X-Request-Id is not declared"
            if status[0] != "2":
                continue
            want = {"receipt": (True, True), "audit": (True, False), "none": (False, False)}[op["x-airlock-evidence"]]
            has = (headers.get("Airlock-Audit-Id", False), headers.get("Airlock-Receipt-Id", False))
            if has != want:
                yield f"{method} {path} {status}: evidence headers {has}, wanted {want}"
            for media, content in response.get("content", {}).items():
                schema = resolve(content["schema"])
                for one in [resolve(s) for s in schema.get("anyOf", [schema])]:
                    if op["x-airlock-evidence"] == "receipt" and media == "application/json" and \
                            not {"audit_id", "receipt_id"} <= set(one.get("required", [])):
                        yield f"{method} {path} {status}: body without audit_id and receipt_id"


def idempotency():
    for path, method, item, op in operations():
        has = any(p["name"] == "Idempotency-Key" for p in parameters(item, op))
        want = method == "post" and op["x-airlock-body"] != "raw"
        if has != want:
            yield f"{method} {path}: Idempotency-Key {'declared' if has else 'missing'}"


def bodies_declared():
    for path, method, item, op in operations():
        content = resolve(op.get("requestBody", {})).get("content", {})
        kind = "json" if "application/json" in content else "raw" if content else "none"
        if kind != op["x-airlock-body"]:
            yield f"{method} {path}: x-airlock-body {op['x-airlock-body']}, requestBody {kind}"


def closed():
    for where, schema in request_schemas():
        types = schema.get("type", [])
        if "object" in ([types] if isinstance(types, str) else types):
            extra = schema.get("additionalProperties")
            if extra is not False and not isinstance(extra, dict):
                yield f"{where}: open object"
            if isinstance(extra, dict) and "maxProperties" not in schema:
                yield f"{where}: map without maxProperties"
            for top in ("query", "header"):
                if top in schema.get("properties", {}):
                    yield f"{where}: field {top} would be taken for a parameter in a pointer"
        if schema.get("type") == "array" and "maxItems" not in schema:
            yield f"{where}: array without maxItems"


def keywords():
    for where, schema in request_schemas():
        for key in schema:
            if key not in KEYWORDS | ANNOTATIONS:
                yield f"{where}: keyword {key}"
        if "$ref" in schema and set(schema) - {"$ref"}:
            yield f"{where}: $ref with siblings"
        for one in schema.get("oneOf", []):
            if set(one) != {"required"}:
                yield f"{where}: oneOf other than of required"
        if isinstance(schema.get("propertyNames"), dict) and \
                set(schema["propertyNames"]) - {"pattern", "minLength", "maxLength"}:
            yield f"{where}: propertyNames"


def every_schema(node, where=""):
    if isinstance(node, dict):
        yield where, node
        for key, sub in node.items():
            if key not in ("examples", "example"):
                yield from every_schema(sub, f"{where}/{key}")
    elif isinstance(node, list):
        for n, sub in enumerate(node):
            yield from every_schema(sub, f"{where}/{n}")


def every_node(node):
    if isinstance(node, dict):
        yield "", node
    for sub in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from every_node(sub)


def patterns():
    # Read alike by ECMA-262 and POSIX ERE: no classes by letter, no groups with ?, no lazy quantifiers.
    for where, node in every_schema(SPEC):
        text = node.get("pattern")
        if not isinstance(text, str):
            continue
        if re.search(r"\\[a-zA-Z0-9]|\(\?|[*+?}]\?|\[\[:", text):
            yield f"{where}: {text} is not portable"
        for bound in re.findall(r"\{[0-9]*,?([0-9]+)\}", text):
            if int(bound) > 255:
                yield f"{where}: {text} repeats more than RE_DUP_MAX"
        if not text.startswith(("^",)):
            yield f"{where}: {text} is not anchored"
        re.compile(text)


def answers_closed():
    for where, node in every_schema(SPEC["components"]["schemas"], "schemas"):
        types = node.get("type")
        if isinstance(node.get("properties"), dict) and types in ("object", ["object", "null"]) and \
                "additionalProperties" not in node:
            yield f"{where}: open object"
        for name in node.get("required", []) if isinstance(node.get("required"), list) else []:
            if isinstance(node.get("properties"), dict) and name not in node["properties"]:
                yield f"{where}: {name} is required and not declared"


def parameters_declared():
    for path, method, item, op in operations():
        names = [(p["in"], p["name"]) for p in parameters(item, op)]
        if len(names) != len(set(names)):
            yield f"{method} {path}: a parameter twice"
        in_path = set(re.findall(r"\{([a-z_]+)\}", path))
        if in_path != {n for where, n in names if where == "path"}:
            yield f"{method} {path}: path parameters"
        for p in parameters(item, op):
            if p["in"] == "path" and ("x-airlock-id" not in p or "pattern" in p["schema"]):
                yield f"{method} {path}: {p['name']} must have x-airlock-id and no pattern (a malformed id is a 404)"
            if not p.get("description") or "example" not in p:
                yield f"{method} {path}: {p['name']} without description or example"
        if ("header", "X-Request-Id") not in names:
            yield f"{method} {path}: X-Request-Id is not declared"


def later_routes():
    for path in SPEC["paths"]:
        if LATER.search(path):
            yield path
    if "post" in SPEC["paths"]["/v1/images"]:
        yield "POST /v1/images"


def statuses():
    for path, method, item, op in operations():
        have = set(op["responses"])
        want = {"422"}
        if op["x-airlock-scope"] != "none":
            want |= {"401", "403", "422", "500", "503"}
        if "{" in path:
            want |= {"404"}
        if op["x-airlock-body"] == "json":
            want |= {"409", "413", "415"}
        if any(p["name"] == "If-Match" for p in parameters(item, op)):
            want |= {"412"}
        if any(p["name"] == "Prefer" for p in parameters(item, op)):
            want |= {"202"}
        if want - have:
            yield f"{method} {path}: {sorted(want - have)} missing"


def limits():
    """The numbers of the contract, where they are promised."""
    s = SPEC["components"]["schemas"]
    r, c, life = (s[n]["properties"] for n in ("Resources", "CommandCreate", "Lifecycle"))
    facts = [
        ("vcpus", (r["vcpus"]["minimum"], r["vcpus"]["maximum"], r["vcpus"]["default"]), (1, 8, 1)),
        ("memory", (r["memory_mib"]["minimum"], r["memory_mib"]["maximum"], r["memory_mib"]["default"]), (128, 16384, 256)),
        ("disk", (r["disk_mib"]["minimum"], r["disk_mib"]["maximum"], r["disk_mib"]["default"]), (64, 65536, 1024)),
        ("ttl", (life["ttl_seconds"]["minimum"], life["ttl_seconds"]["maximum"]), (1, 2592000)),
        ("labels", (s["Labels"]["maxProperties"], s["Labels"]["propertyNames"]["maxLength"],
                    s["Labels"]["additionalProperties"]["maxLength"]), (32, 64, 256)),
        ("deadline", (c["timeout_seconds"]["default"], c["timeout_seconds"]["maximum"]), (60, 86400)),
        ("output", c["max_output_bytes"]["default"], 65536),
        ("entries", s["DirList"]["properties"]["entries"]["maxItems"], 4096),
    ]
    p = SPEC["components"]["parameters"]["Limit"]["schema"]
    facts.append(("list", (p["default"], p["maximum"]), (50, 500)))
    for name, have, want in facts:
        if have != want:
            yield f"{name}: {have}, wanted {want}"


def unbuilt():
    want = {"SandboxCreate": ["plan_id", "secrets"], "CommandCreate": ["tty"]}
    for schema, names in want.items():
        have = sorted(n for n, p in SPEC["components"]["schemas"][schema]["properties"].items() if p.get("x-airlock-unbuilt"))
        if have != names:
            yield f"{schema}: {have}"
    network = SPEC["components"]["schemas"]["SandboxCreate"]["properties"]["network"]
    if not network["properties"]["egress"].get("x-airlock-unbuilt"):
        yield "network.egress"


def faults_of(schema, value):
    for e in validator(schema).iter_errors(value):
        yield f"{'/'.join(map(str, e.absolute_path))}: {e.message[:200]}"


def sse_faults(content, text):
    kinds = content["x-airlock-events"]
    for block in text.strip("\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        schema = kinds.get(fields.get("event"), kinds.get("*"))
        if schema is None:
            yield f"event {fields.get('event')} is not declared"
            continue
        yield from faults_of(schema, json.loads(fields["data"]))


def examples():
    for where, content in bodies():
        stream = where.endswith("text/event-stream")
        if "examples" not in content and (where.endswith("json") or stream):
            yield f"{where}: no examples"
        for name, example in content.get("examples", {}).items():
            value = resolve(example)["value"]
            for fault in faults_of(content["schema"], value):
                yield f"{where} {name}: {fault}"
            if stream:
                for fault in sse_faults(content, value):
                    yield f"{where} {name}: {fault}"
    for kind in ("parameters", "headers"):
        for name, one in SPEC["components"][kind].items():
            for fault in faults_of(one["schema"], one["example"]):
                yield f"{kind} {name}: {fault}"
    for path, method, item, op in operations():
        for p in parameters(item, op):
            for fault in faults_of(p["schema"], p["example"]):
                yield f"{op['operationId']} {p['name']}: {fault}"


def used_components():
    used = {node["$ref"] for _, node in every_node(SPEC) if isinstance(node.get("$ref"), str)}
    for kind, group in SPEC["components"].items():
        for name in group:
            if kind != "securitySchemes" and f"#/components/{kind}/{name}" not in used:
                yield f"{kind} {name}"
    for ref in used:
        try:
            resolve({"$ref": ref})
        except KeyError:
            yield f"{ref} leads nowhere"


def page():
    text = docs_page.render(SPEC)
    ids = re.findall(r'\bid="([^"]+)"', text)
    for one in sorted({i for i in ids if ids.count(i) > 1}):
        yield f"id {one} twice"
    for target in sorted(set(re.findall(r"href=[\"']#([^\"']+)", text)) - set(ids)):
        yield f"link to #{target} leads nowhere"
    outside = set(re.findall(r"(?:src|href)=[\"'](?!#)([^\"']+)", text)) - {"/openapi.json"}
    outside |= set(re.findall(r"url\(|@import|<script|<link", text))
    for one in sorted(outside):
        yield f"loads {one}"
    for path, method, item, op in operations():
        if op["operationId"] not in ids:
            yield f"{op['operationId']} is not on the page"


def refused():
    """Bodies that must not pass, so that the schemas are as closed as they look."""
    life = {"ttl_seconds": 60, "on_expiry": "destroy"}
    create = [
        {}, {"image": "debian"}, {"lifecycle": life}, {"image": "debian", "lifecycle": {}},
        {"image": "debian", "lifecycle": dict(life, ttl_seconds=0)},
        {"image": "debian", "lifecycle": dict(life, ttl_seconds=2592001)},
        {"image": "debian", "lifecycle": dict(life, ttl_seconds="60")},
        {"image": "debian", "lifecycle": dict(life, on_expiry="sleep")},
        {"image": "debian", "lifecycle": life, "resources": {"vcpus": 9}},
        {"image": "debian", "lifecycle": life, "resources": {"cpus": 1}},
        {"image": "debian", "lifecycle": life, "labels": {"k" * 65: "v"}},
        {"image": "debian", "lifecycle": life, "labels": {str(n): "" for n in range(33)}},
        {"image": "debian", "lifecycle": life, "env": {"1A": ""}},
        {"image": "debian", "snapshot_id": "snp", "lifecycle": life},
        {"image": "debian", "lifecycle": life, "colour": "red"},
        {"image": "debian", "lifecycle": life, "network": {"mode": "host"}},
    ]
    command = [{}, {"argv": []}, {"argv": "true"}, {"argv": ["true"], "shell": "true"}, {"argv": ["true"], "timeout_seconds": 0},
               {"argv": ["true"], "timeout_seconds": 86401}, {"argv": ["true"], "user": "Root!"}]
    update = [{}, {"labels": None}, {"ttl_seconds": 0}, {"name": "x"}, {"lifecycle": {}}]
    for schema, values in (("SandboxCreate", create), ("CommandCreate", command), ("SandboxUpdate", update)):
        for value in values:
            if not list(faults_of({"$ref": f"#/components/schemas/{schema}"}, value)):
                yield f"{schema} takes {str(value)[:120]}"


check("every operation carries its fields", x_fields())
check("operation names are unique", unique())
check("evidence is declared in headers and bodies", evidence())
check("every POST but raw stdin takes an Idempotency-Key", idempotency())
check("bodies are what x-airlock-body says", bodies_declared())
check("request objects are closed and bounded", closed())
check("request schemas keep to the server's keywords", keywords())
check("patterns are read alike by ECMA-262 and POSIX", patterns())
check("answer objects are closed", answers_closed())
check("parameters are declared and described", parameters_declared())
check("later routes are absent", later_routes())
check("problem statuses are listed", statuses())
check("limits are those of the contract", limits())
check("unbuilt fields are marked", unbuilt())
check("examples are valid", examples())
check("components are used and references lead somewhere", used_components())
check("the page names every operation and loads nothing", page())
check("faulty bodies are refused", refused())
print(f"1..{number}")
print(f"# {sum(1 for _ in operations())} operations, {len(SPEC['components']['schemas'])} schemas")
sys.exit(1 if failed else 0)
