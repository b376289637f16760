"""Seeds of the request target: every operation of the specification, right and wrong in each parameter and field."""
import json
import random
from urllib.parse import quote

import to_json

WRONG = {
    "text": ["", "%00", "%", "%4", "%zz", "%ff", "+", "a&a", "%C3%A4", "x" * 300, "a=b", "%2e%2e"],
    "path": ["/work/a", "%2Fwork%2Fa", "/work/../etc", "/work//a", "work", "/work%00", "/%ff", "/", "/w" + "/a" * 2100],
    "integer": ["0", "1", "-1", "500", "501", "9007199254740991", "9007199254740992", "99999999999999999999", "1.5", "", "-",
                "+1", "0x10", "%31", "1%00", "00"],
    "number": ["0", "0.1", "3600", "3600.1", "-0.0", "1e3", ".", "--1", "1.2.3", "1" * 30, ""],
    "boolean": ["true", "false", "TRUE", "1", "", "tru", "true%00"],
    "id": ["", "x", "sbx" + "0" * 26, "sbx" + "0" * 25 + "l", "SBX" + "0" * 26, "sbx" + "0" * 26 + "%00", "sbx" + "0" * 27],
}
RANGES = ["bytes=0-", "bytes=0-0", "bytes=-1", "bytes=-0", "bytes=5-2", "bytes=0-1,3-4", "bytes=", "bytes=-", "items=0-1",
          "BYTES= 1-999", "bytes=18446744073709551615-", "bytes=18446744073709551616-", "bytes=0-18446744073709551615", "bytes=a-b",
          "bytes=-99999999999999999999", "bytes=1x-2", "bytes=1-2x"]
BODIES = ["", "{}", "[]", "null", "1", '"x"', "true", "{", '{"a":1,"a":2}', '{"a":"\\u0000"}', "[" * 40, '{"a":NaN}', "\ufeff{}",
          '{"lifecycle":null}', '{"lifecycle":{}}', '{"x~y/z":{"a":[{}]}}', '{"\\u00e4":"\\ud83d\\ude00"}']
VALUES = [None, True, False, 0, 1, -1, 1.5, 1e300, 2**53, 2**63 - 1, "", "a", "ä" * 3, "x" * 130, "/work/../a", "/work", [], [1],
          ["a", "a"], ["x"] * 5, {}, {"a": 1}, {"a": "b"}, {"~/": None}, "root", "A=B", {"": ""}, {"A": "b", "1": "c"}]


class Spec:
    def __init__(self, document):
        self.document = document

    def at(self, node):
        while isinstance(node, dict) and "$ref" in node:
            target = self.document
            for part in node["$ref"][2:].split("/"):
                target = target[part]
            rest = {k: v for k, v in node.items() if k != "$ref"}
            node = {**target, **rest}
        return node

    def operations(self):
        for path, item in self.document["paths"].items():
            for method, op in item.items():
                if isinstance(op, dict) and "operationId" in op:
                    parameters = [self.at(p) for p in item.get("parameters", []) + op.get("parameters", [])]
                    yield method.upper(), path, parameters, self.at(op.get("requestBody"))

    def sample(self, node, depth=0):
        """A value that fits, as full as it gets."""
        node = self.at(node)
        if "const" in node:
            return node["const"]
        for key in ("default", "example"):
            if node.get(key) is not None:
                return node[key]
        if "enum" in node:
            return node["enum"][0]
        for key in ("allOf", "oneOf", "anyOf"):
            if key in node and "properties" not in node:
                return self.sample(node[key][0], depth + 1)
        kind = node.get("type", "object")
        kind = kind[0] if isinstance(kind, list) else kind
        if kind == "object" and depth < 6:
            return {k: self.sample(v, depth + 1) for k, v in node.get("properties", {}).items()}
        return {"string": "a" * max(1, node.get("minLength", 1)), "integer": node.get("minimum", 1), "boolean": True,
                "number": node.get("minimum", 1), "array": [self.sample(node.get("items", {}), depth + 1)] if depth < 6 else [],
                "null": None}.get(kind, {})


def filled(path, parameters):
    for p in parameters:
        if p["in"] == "path":
            path = path.replace("{" + p["name"] + "}", p.get("example", p["x-airlock-id"] + "0" * 26))
    return path


def request(method, path, query="", headers=(), body=""):
    text = f"{method} {path}{'?' + query if query else ''}\n"
    text += "".join(f"{name}: {value}\n" for name, value in headers)
    return (text + ("\n" + body if body else "")).encode()


def right(parameters, where):
    return [(p["name"], str(p.get("example", p["schema"].get("example", "1")))) for p in parameters if p["in"] == where]


def query_of(pairs):
    return "&".join(f"{k}={quote(str(v).lower() if v in ('True', 'False') else str(v), safe='/')}" for k, v in pairs)


def kind_of(spec, p):
    if p["name"] == "path":
        return "path"
    if "x-airlock-id" in p:
        return "id"
    kind = spec.at(p["schema"]).get("type", "string")
    return kind if kind in WRONG else "text"


def of_parameters(spec, method, path, parameters, rnd):
    headers = right(parameters, "header")
    query = right(parameters, "query")
    yield request(method, path, query_of(query), headers)
    yield request(method, path, query_of(query + query[:1]) + "&unknown~/%ff=1&&=x", headers)
    yield request(method, path)
    for p in parameters:
        if p["in"] == "query":
            for value in rnd.sample(WRONG[kind_of(spec, p)], 4):
                yield request(method, path, f"{p['name']}={value}", headers)
        elif p["in"] == "header":
            yield request(method, path, query_of(query), [(p["name"], rnd.choice(["", "\xff", "*", '"7"', "x" * 300, "0", "a b"]))])


def of_body(spec, method, path, schema, rnd):
    good = spec.sample(schema)
    texts = [json.dumps(good)] + [json.dumps(v) for v in rnd.sample(VALUES, 2)] + rnd.sample(BODIES, 3)
    for key in good if isinstance(good, dict) else []:
        texts.append(json.dumps({k: v for k, v in good.items() if k != key}))
        texts.append(json.dumps({key: good[key], "unknown/~field": 1}))
        texts.append(json.dumps({**good, key: rnd.choice(VALUES)}, ensure_ascii=False))
        if isinstance(good[key], dict):
            texts += [json.dumps({**good, key: {**good[key], inner: rnd.choice(VALUES)}}) for inner in good[key]]
    yield from (request(method, path, body=t) for t in texts)


def examples(document, method, path, body):
    media = (body or {}).get("content", {}).get("application/json", {})
    for one in media.get("examples", {}).values():
        yield request(method, path, body=json.dumps(one.get("value"), ensure_ascii=False))


def of_components(spec, rnd):
    """Schemas by name, also those of answers: they use what no request does."""
    for name, schema in spec.document["components"]["schemas"].items():
        good = spec.sample(schema)
        values = [good, rnd.choice(VALUES)]
        for key in list(good)[:4] if isinstance(good, dict) else []:
            values.append({**good, key: rnd.choice(VALUES)})
        yield from (request("GET", "/", headers=[("Schema", name)], body=json.dumps(v, ensure_ascii=False)) for v in values)
    for many in ({str(i): "x" for i in range(300)}, {f"k{i}": "x" for i in range(33)}, ["a"] * 1100, ["a", "a"]):
        yield from (request("GET", "/", headers=[("Schema", name)], body=json.dumps(many)) for name in ("Labels", "Env", "Resources"))
    yield request("POST", "/v1/sandboxes/sbx/commands", body=json.dumps({"argv": ["a"] * 1025}))
    yield request("GET", "/v1/jobs", "%zz=1&%4=2&limit=%zz")


def requests(path_of_specification):
    document = to_json.load(path_of_specification)
    spec = Spec(document)
    rnd = random.Random(5)
    for method, template, parameters, body in spec.operations():
        path = filled(template, parameters)
        yield from of_parameters(spec, method, path, parameters, rnd)
        yield from examples(document, method, path, body)
        schema = (body or {}).get("content", {}).get("application/json", {}).get("schema")
        if schema:
            yield from of_body(spec, method, path, schema, rnd)
        yield request(rnd.choice(["get", "BREW", "OPTIONS", ""]), path)
        yield request(method, template)
    files = "/v1/sandboxes/sbx" + "0" * 26 + "/files"
    yield from (request("GET", files, "path=/work/a", [("Range", r)]) for r in RANGES)
    for path in ("", "/", "//", "/v1", "/v1/", "/v1/sandboxes/", "/v1/sandboxes//files", "v1", "/v1/sandboxes/%73bx", files + "/", files + "/x"):
        yield request("GET", path)
    yield request("POST", "/v1/sandboxes", body=json.dumps({"lifecycle": {"ttl_seconds": 1}, "k" * 700 + "ä" * 800: 1}, ensure_ascii=False))
    yield from of_components(spec, rnd)
