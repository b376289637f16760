#!/usr/bin/env python3
"""The specification as one readable page that loads nothing from elsewhere. Usage: docs_page.py INPUT.yaml OUTPUT.html

Deterministic. Needs PyYAML (Debian python3-yaml)."""
import html
import json
import os
import re
import shlex
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import to_json  # noqa: E402

METHODS = ("get", "head", "put", "post", "patch", "delete")
STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1c2126; --dim: #5b6670; --line: #d9dfe4; --box: #f5f7f9; --link: #0b5cad;
  --get: #1a7f4b; --head: #1a7f4b; --post: #0b5cad; --put: #9a5b00; --patch: #7a4fb5; --delete: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --bg: #14181c; --fg: #dfe5ea; --dim: #93a0ab; --line: #2c343b; --box: #1c2228;
  --link: #7fb8f0; --get: #6cc893; --head: #6cc893; --post: #7fb8f0; --put: #e0a950; --patch: #bb9bea; --delete: #f08a83; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg); font: 15px/1.55 system-ui, sans-serif; }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
nav { position: fixed; inset: 0 auto 0 0; width: 19rem; overflow-y: auto; padding: 1.2rem 1rem; border-right: 1px solid var(--line);
  font-size: 13px; }
nav h2 { font-size: 13px; margin: 1.1rem 0 .2rem; } nav ol { list-style: none; margin: 0; padding: 0; } nav li { padding: .1rem 0; }
main { margin-left: 19rem; padding: 1.5rem 2.5rem 6rem; max-width: 72rem; }
h1 { margin: 0 0 .2rem; } h2 { margin: 3rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
h3 { margin: 2.6rem 0 .3rem; } h4 { margin: 1.2rem 0 .3rem; font-size: 14px; }
code, pre { font: 13px/1.45 ui-monospace, monospace; } code { background: var(--box); padding: .05em .3em; border-radius: 3px; }
pre { background: var(--box); border: 1px solid var(--line); border-radius: 5px; padding: .7rem .9rem; overflow-x: auto; margin: .4rem 0; }
pre code { background: none; padding: 0; }
table { border-collapse: collapse; width: 100%; margin: .4rem 0; font-size: 14px; display: block; overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 600; white-space: nowrap; } td p { margin: 0; }
.route { font: 14px/1.6 ui-monospace, monospace; } .method { font-weight: 700; } .dim { color: var(--dim); font-size: 13px; }
.get { color: var(--get); } .head { color: var(--head); } .post { color: var(--post); } .put { color: var(--put); }
.patch { color: var(--patch); } .delete { color: var(--delete); }
.facts { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: .3rem 0 .6rem; font-size: 13px; color: var(--dim); }
details { margin: .3rem 0; } summary { cursor: pointer; }
@media (max-width: 60rem) { nav { position: static; width: auto; border-right: 0; border-bottom: 1px solid var(--line); }
  main { margin-left: 0; padding: 1rem; } }
"""


class Page:
    def __init__(self, spec):
        self.spec = spec
        self.out = []

    def put(self, text):
        self.out.append(text)

    def resolve(self, node):
        while isinstance(node, dict) and "$ref" in node:
            target = self.spec
            for part in node["$ref"][2:].split("/"):
                target = target[part.replace("~1", "/").replace("~0", "~")]
            node = target
        return node

    def operations(self):
        for path, item in self.spec["paths"].items():
            for method in METHODS:
                if method in item:
                    yield path, method, item, item[method]


def esc(text):
    return html.escape(str(text), quote=True)


def inline(text):
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(f"<code>{esc(p[1:-1])}</code>" if p.startswith("`") else
                   re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", esc(p)) for p in parts)


def cells(line):
    return [c.strip() for c in re.split(r"\|(?=(?:[^`]*`[^`]*`)*[^`]*$)", line.strip().strip("|"))]


def markdown(text, level=2):
    """The little of it that the specification uses: paragraphs, headings, lists, tables, code spans."""
    out = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.split("\n")
        if lines[0].startswith("#"):
            title = lines[0].lstrip("#").strip()
            out.append(f"<h{level}>{inline(title)}</h{level}>")
        elif lines[0].startswith("- "):
            items = re.split(r"\n- ", "\n" + block)[1:]
            out.append("<ul>" + "".join(f"<li>{inline(' '.join(i.split()))}</li>" for i in items) + "</ul>")
        elif lines[0].startswith("|"):
            head, rows = cells(lines[0]), [cells(line) for line in lines[2:]]
            out.append("<table><tr>" + "".join(f"<th>{inline(c)}</th>" for c in head) + "</tr>" + "".join(
                "<tr>" + "".join(f"<td>{inline(c)}</td>" for c in row) + "</tr>" for row in rows) + "</table>")
        else:
            out.append(f"<p>{inline(' '.join(block.split()))}</p>")
    return "".join(out)


def type_text(page, schema):
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        target = page.resolve(schema)
        if "properties" in target:
            return f'<a href="#schema-{esc(name)}">{esc(name)}</a>'
        return type_text(page, target)
    if "anyOf" in schema:
        return " or ".join(type_text(page, s) for s in schema["anyOf"])
    if "allOf" in schema:
        return type_text(page, schema["allOf"][0])
    if "const" in schema:
        return f"<code>{esc(json.dumps(schema['const']))}</code>"
    if "enum" in schema:
        return " ".join(f"<code>{esc('null' if v is None else v)}</code>" for v in schema["enum"])
    types = schema.get("type", "any")
    types = types if isinstance(types, list) else [types]
    text = " or ".join(types)
    if "array" in types and "items" in schema:
        text = text.replace("array", "array of " + type_text(page, schema["items"]))
    extra = schema.get("additionalProperties")
    if "object" in types and "properties" not in schema and isinstance(extra, dict):
        text += " of " + type_text(page, extra)
    return text


def bounds(page, schema):
    schema = page.resolve(schema)
    said = []
    low, high = schema.get("minimum"), schema.get("maximum")
    if high == 9007199254740991:
        high = None
    if low is not None and high is not None:
        said.append(f"{low:,} to {high:,}")
    elif low is not None:
        said.append(f"at least {low:,}")
    elif high is not None:
        said.append(f"at most {high:,}")
    for key, word in (("maxLength", "characters"), ("maxItems", "items"), ("maxProperties", "entries")):
        if key in schema:
            said.append(f"at most {schema[key]:,} {word}")
    if "pattern" in schema:
        said.append(f"<code>{esc(schema['pattern'])}</code>")
    if "default" in schema:
        said.append(f"default <code>{esc(json.dumps(schema['default']))}</code>")
    return "; ".join(said)


def rows(page, schema, prefix=""):
    """Fields of an object as table rows; nested objects follow with dotted names."""
    schema = page.resolve(schema)
    required = schema.get("required", [])
    for name, sub in schema.get("properties", {}).items():
        target = page.resolve(sub)
        text = sub.get("description") or target.get("description", "")
        limit = bounds(page, sub)
        need = "" if not required or name in required else ' <span class="dim">optional</span>'
        yield (f"<tr><td><code>{esc(prefix + name)}</code>{need}</td><td>{type_text(page, sub)}</td><td>{markdown(text)}"
               + (f'<span class="dim">{limit}</span>' if limit else "") + "</td></tr>")
        if "$ref" not in sub and "properties" in target:
            yield from rows(page, target, f"{prefix}{name}.")
        items = target.get("items", {})
        if "$ref" not in sub and "$ref" not in items and "properties" in items:
            yield from rows(page, items, f"{prefix}{name}[].")


def fields(page, schema):
    body = "".join(rows(page, schema))
    if body:
        page.put(f"<table><tr><th>field</th><th>type</th><th></th></tr>{body}</table>")


def example_text(value):
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)


def curl(page, path, method, item, op):
    params = [page.resolve(p) for p in item.get("parameters", []) + op.get("parameters", [])]
    url, query = path, []
    for p in params:
        if p["in"] == "path":
            url = url.replace("{%s}" % p["name"], str(p["example"]))
        elif p["in"] == "query" and p.get("required"):
            query.append(f"{p['name']}={p['example']}")
    if op["x-airlock-operation"] == "command.stdin":
        query.append("eof=true")
    words = ["curl", "-sS"]
    if method == "head":
        words.append("-I")
    elif method not in ("get", "post") or (method == "post" and op["x-airlock-body"] != "json"):
        words += ["-X", method.upper()]
    if "text/event-stream" in page.resolve(op["responses"].get("200", {})).get("content", {}) and path == "/v1/events":
        words.append("-N")
    address = page.spec["servers"][0]["url"] + url + ("?" + "&".join(query) if query else "")
    text = " ".join(words) + " " + shlex.quote(address)
    if op["x-airlock-scope"] != "none":
        text += ' \\\n  -H "Authorization: Bearer $TOKEN"'
    if any(p["name"] == "Idempotency-Key" for p in params):
        text += ' \\\n  -H "Idempotency-Key: $(uuidgen)"'
    content = page.resolve(op.get("requestBody", {})).get("content", {})
    if "application/json" in content:
        value = page.resolve(next(iter(content["application/json"]["examples"].values())))["value"]
        text += " \\\n  -H 'Content-Type: application/json'"
        text += " \\\n  -d " + shlex.quote(json.dumps(value, ensure_ascii=False))
    elif op["x-airlock-body"] == "raw":
        text += " \\\n  --data-binary @file" if method == "post" else " \\\n  -T file"
    return text


def parameter_table(page, params):
    shown = [p for p in params if p["name"] != "X-Request-Id"]
    if not shown:
        return
    page.put("<h4>Parameters</h4><table><tr><th>name</th><th>in</th><th>type</th><th></th></tr>")
    for p in shown:
        limit = bounds(page, p["schema"])
        need = "" if p.get("required") else ' <span class="dim">optional</span>'
        page.put(f"<tr><td><code>{esc(p['name'])}</code>{need}</td><td>{p['in']}</td><td>{type_text(page, p['schema'])}</td>"
                 f"<td>{markdown(p['description'])}" + (f'<span class="dim">{limit}</span>' if limit else "") + "</td></tr>")
    page.put("</table>")


def examples(page, content):
    for name, example in content.get("examples", {}).items():
        example = page.resolve(example)
        page.put(f"<details><summary>{esc(example.get('summary', name))}</summary>"
                 f"<pre><code>{esc(example_text(example['value']))}</code></pre></details>")


def body(page, op):
    request = page.resolve(op.get("requestBody", {}))
    if not request:
        return
    page.put("<h4>Body</h4>")
    if request.get("description"):
        page.put(markdown(request["description"]))
    for media, content in request["content"].items():
        if media == "*/*":
            continue
        page.put(f'<p class="dim">{esc(media)}{"" if request.get("required") else ", optional"}</p>')
        schema = page.resolve(content["schema"])
        choice = [" and ".join(f"<code>{esc(n)}</code>" for n in one["required"]) for one in schema.get("oneOf", [])]
        if choice:
            page.put(f"<p>Exactly one of {', '.join(choice)}.</p>")
        fields(page, schema)
        examples(page, content)


def answers(page, op):
    page.put("<h4>Answers</h4>")
    problems = []
    for status, response in op["responses"].items():
        name = response.get("$ref", "").rsplit("/", 1)[-1]
        response = page.resolve(response)
        if status[0] in "45":
            problems.append(f'<a href="#problem-{esc(name)}">{status}</a>')
            continue
        page.put(f"<p><strong>{status}</strong> {inline(' '.join(response['description'].split()))}</p>")
        headers = [h for h in response.get("headers", {}) if h != "X-Request-Id"]
        if headers:
            page.put('<p class="dim">Headers: ' + ", ".join(f"<code>{esc(h)}</code>" for h in headers) + "</p>")
        for media, content in response.get("content", {}).items():
            kind = type_text(page, content["schema"])
            page.put(f'<p class="dim">{esc(media)}{"" if kind == "string" else ": " + kind}</p>')
            events = content.get("x-airlock-events", {})
            if events:
                page.put("<table><tr><th>event</th><th>data</th></tr>" + "".join(
                    f"<tr><td><code>{esc(k)}</code></td><td>{type_text(page, v)}</td></tr>" for k, v in events.items()) + "</table>")
            examples(page, content)
    page.put(f'<p class="dim">Problems: {" ".join(problems)}</p>')


def operation(page, path, method, item, op):
    page.put(f'<section id="{esc(op["operationId"])}"><h3>{esc(op["summary"])}</h3>'
             f'<div class="route"><span class="method {method}">{method.upper()}</span> {esc(path)}</div>')
    scope = op["x-airlock-scope"]
    said = {"receipt": "receipt and audit entry", "audit": "audit entry", "none": "no evidence"}[op["x-airlock-evidence"]]
    page.put('<div class="facts">'
             + (f"<span>scope <code>{esc(scope)}</code></span>" if scope != "none" else "<span>no token needed</span>")
             + f"<span>{said}</span><span>operation <code>{esc(op['x-airlock-operation'])}</code></span></div>")
    page.put(markdown(op["description"]))
    page.put(f"<pre><code>{esc(curl(page, path, method, item, op))}</code></pre>")
    parameter_table(page, [page.resolve(p) for p in item.get("parameters", []) + op.get("parameters", [])])
    body(page, op)
    answers(page, op)
    page.put("</section>")


def navigation(page):
    page.put("<nav><strong>Airlock</strong><ol><li><a href='#top'>Conventions</a></li></ol>")
    for tag in page.spec["tags"]:
        page.put(f"<h2>{esc(tag['name'])}</h2><ol>")
        for path, method, _, op in page.operations():
            if tag["name"] in op["tags"]:
                page.put(f'<li><a href="#{esc(op["operationId"])}">{esc(op["summary"])}</a></li>')
        page.put("</ol>")
    page.put("<h2>Reference</h2><ol><li><a href='#problems'>Problems</a></li><li><a href='#schemas'>Objects</a></li></ol></nav>")


def problems(page):
    page.put('<h2 id="problems">Problems</h2>')
    page.put(markdown(page.spec["components"]["schemas"]["Problem"]["description"]))
    fields(page, page.spec["components"]["schemas"]["Problem"])
    for name, response in page.spec["components"]["responses"].items():
        for content in (response.get("content", {}).get("application/problem+json"),):
            if not content:
                continue
            facts = content["schema"]["allOf"][1]["properties"]
            kinds = ", ".join(f"<code>{esc(k)}</code>" for k in facts["kind"]["enum"])
            page.put(f'<section id="problem-{esc(name)}"><h3>{facts["status"]["const"]} {kinds}</h3>'
                     + markdown(response["description"]))
            examples(page, content)
            page.put("</section>")


def objects(page):
    page.put('<h2 id="schemas">Objects</h2>')
    for name, schema in page.spec["components"]["schemas"].items():
        if "properties" not in schema or name == "Problem" or not schema["properties"]:
            continue
        page.put(f'<section id="schema-{esc(name)}"><h3>{esc(name)}</h3>' + markdown(schema.get("description", "")))
        fields(page, schema)
        page.put("</section>")


def render(spec):
    page = Page(spec)
    info = spec["info"]
    page.put('<!doctype html><html lang="en"><head><meta charset="utf-8">'
             '<meta name="viewport" content="width=device-width, initial-scale=1">'
             f"<title>{esc(info['title'])} API</title><style>{STYLE}</style></head><body>")
    navigation(page)
    page.put(f'<main id="top"><h1>{esc(info["title"])}</h1><p class="dim">API of version {esc(info["version"])}. '
             f'<a href="/openapi.json">openapi.json</a></p><p>{esc(info["summary"])}</p>')
    page.put(markdown(info["description"]))
    for tag in spec["tags"]:
        page.put(f"<h2>{esc(tag['name'])}</h2>{markdown(tag['description'])}")
        for path, method, item, op in page.operations():
            if tag["name"] in op["tags"]:
                operation(page, path, method, item, op)
    problems(page)
    schema_problem = '<span id="schema-Problem"></span>'
    page.put(schema_problem)
    objects(page)
    page.put("</main></body></html>")
    return "\n".join(page.out) + "\n"


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with open(sys.argv[2], "w", encoding="utf-8") as f:
        f.write(render(to_json.load(sys.argv[1])))


if __name__ == "__main__":
    main()
