"""Two tenants on one server: none sees the other's rows, and a foreign id is as good as none."""
import json
import os
import statistics
import time

import harness

BOX = "/v1/sandboxes"
ALL = ["sandbox:read", "sandbox:write", "command:run", "files:read", "files:write", "audit:read"]
made = {}


def token(s, tenant, scopes=ALL, **fields):
    a = s.post("/v1/tokens", {"name": f"t-{tenant}-{time.monotonic_ns()}", "tenant": tenant, "scopes": scopes, **fields}, expect=201)
    return a.json["id"], a.json["token"]


def world(s):
    """Two tenants with a sandbox each, made once."""
    if not made:
        made["a"], made["b"] = token(s, "acme")[1], token(s, "bolt")[1]
        made["box_a"] = s.create(token=made["a"], name="same-name")["id"]
        made["box_b"] = s.create(token=made["b"], name="same-name")["id"]
        made["cmd_a"] = s.run(made["box_a"], "echo of a", token=made["a"])
        made["cmd_b"] = s.run(made["box_b"], "echo of b", token=made["b"])
    return made


def plain(a):
    """An answer without what may differ: request_id and Date."""
    body = a.body.decode()
    if a.json:
        body = body.replace(a.json["request_id"], "ID")
    headers = sorted((k, v) for k, v in a.headers.items() if k.lower() not in ("date", "x-request-id"))
    return a.status, headers, body


@harness.deadline(150)
def test_same_name(s):
    """A name is unique within a tenant only"""
    world(s)


def test_not_found_alike(s):
    """A foreign, a missing and a malformed id give the same 404 byte for byte, on every route"""
    w = world(s)
    missing = {"sbx": "sbx" + "0" * 26, "cmd": "cmd" + "0" * 26, "job": "job" + "0" * 26, "rct": "rct" + "0" * 26}
    job = s.get("/v1/jobs", token=w["b"]).json["items"][0]["id"]
    receipt = w["cmd_b"]["receipt_id"]
    cid = w["cmd_b"]["command_id"]
    raw = {"Content-Type": "application/octet-stream"}
    routes = []
    for ids in ((w["box_b"], cid, job, receipt), (missing["sbx"], missing["cmd"], missing["job"], missing["rct"]),
                ("nonsense", "x", "sbx", "'%22"), ("sbx" + "u" * 26, "cmd" + "U" * 26, "JOB" + "0" * 26, "rct" + "0" * 500)):
        box, command, j, r = ids
        base = f"{BOX}/{box}"
        routes.append([
            ("GET", base, None), ("PATCH", base, {"ttl_seconds": 60}), ("DELETE", base, None), ("POST", base + "/stop", None),
            ("POST", base + "/start", None), ("POST", base + "/detach", {"owner": "me"}), ("GET", base + "/wait?timeout_seconds=1", None),
            ("GET", base + "/commands", None), ("POST", base + "/commands", {"argv": ["true"]}),
            ("GET", f"{base}/commands/{command}", None), ("GET", f"{base}/commands/{command}/wait?timeout_seconds=1", None),
            ("POST", f"{base}/commands/{command}/signal", {"signal": "TERM"}), ("GET", f"{base}/commands/{command}/output", None),
            ("GET", f"{base}/commands/{command}/output?follow=true", None), ("GET", base + "/files?path=/etc/passwd", None),
            ("DELETE", base + "/files?path=/work/x", None), ("GET", base + "/files/stat?path=/work", None),
            ("POST", base + "/files/move", {"from": "/work/a", "to": "/work/b"}), ("GET", base + "/dirs?path=/work", None),
            ("POST", base + "/dirs", {"path": "/work/d"}), ("GET", base + "/archive?path=/work", None), ("GET", base + "/logs", None),
            ("GET", base + "/logs?follow=true", None), ("GET", f"/v1/jobs/{j}", None), ("POST", f"/v1/jobs/{j}/cancel", None),
            ("GET", f"/v1/receipts/{r}", None)])
    for foreign, *others in zip(*routes):
        want = None
        for n, (method, path, body) in enumerate((foreign, *others)):
            a = s.req(method, path, body, token=w["a"])
            assert a.status == 404 and a.kind == "not_found", (method, path, a)
            assert a.json["sandbox_id"] is None and a.json["audit_id"] is None, (method, path, a)
            if want is None:
                want = plain(a)
            assert plain(a) == want, f"{method} {path}:\n{plain(a)}\n{want}"
    for box in (w["box_b"], missing["sbx"]):
        for path in (f"{BOX}/{box}/files?path=/work/x", f"{BOX}/{box}/archive?path=/work"):
            s.put(path, b"x" * 1000, token=w["a"], expect=404)
        s.post(f"{BOX}/{box}/commands/{cid}/stdin", data=b"x", headers=raw, token=w["a"], expect=404)
    # A command of one's own sandbox's neighbour, through one's own sandbox:
    s.get(f"{BOX}/{w['box_a']}/commands/{cid}", token=w["a"], expect=404)


def test_same_time(s):
    """A foreign and a missing id take the same time"""
    w = world(s)
    samples = {"foreign": [], "missing": []}
    for _ in range(150):
        for name, box in (("foreign", w["box_b"]), ("missing", "sbx" + "0" * 26)):
            t = time.perf_counter()
            s.req("GET", f"{BOX}/{box}", token=w["a"], check=False)
            samples[name].append(time.perf_counter() - t)
    a, b = (statistics.median(samples[n]) for n in ("foreign", "missing"))
    assert abs(a - b) < max(0.25 * min(a, b), 0.0003), f"foreign {a * 1e3:.2f} ms, missing {b * 1e3:.2f} ms"


def test_lists(s):
    """Lists, with every filter, show the tenant's own rows only"""
    w = world(s)
    for mine, other, other_box, tok in (("box_a", "box_b", w["box_b"], w["a"]), ("box_b", "box_a", w["box_a"], w["b"])):
        for path in (BOX, f"{BOX}?state=running", "/v1/jobs", f"/v1/jobs?sandbox_id={other_box}", "/v1/receipts",
                     f"/v1/receipts?sandbox_id={other_box}", "/v1/audit?after_seq=0", "/v1/events?after_seq=0&limit=500"):
            a = s.get(path, token=tok, expect=(200, 404))
            assert other_box not in a.body.decode(), (path, "shows another tenant's rows")
        assert w[mine] in s.get(BOX, token=tok).body.decode()
    everything = "".join(s.get(p, token=w["a"]).body.decode() for p in ("/v1/jobs?limit=500", "/v1/receipts?limit=500", "/v1/audit?after_seq=0&limit=500"))
    assert w["cmd_b"]["command_id"] not in everything and "bolt" not in everything


def test_cursor(s):
    """Another tenant's ids as a cursor show nothing of it"""
    w = world(s)
    a = s.get(f"{BOX}?cursor={w['box_b']}", token=w["a"])
    assert a.status == 422 or a.status == 200 and w["box_b"] not in a.body.decode(), a


def test_events_apart(s):
    """The stream of events carries the tenant's own only"""
    w = world(s)
    last = s.get("/v1/events?limit=500", token=w["a"]).json["last_seq"]
    stream = s.stream("GET", f"/v1/events?after_seq={last}", token=w["a"])
    s.run(w["box_b"], "echo other", token=w["b"])
    mine = s.run(w["box_a"], "echo mine", token=w["a"])
    while True:
        e = stream.next(20)
        assert e[2]["sandbox_id"] != w["box_b"], e
        if e[2]["data"].get("command_id") == mine["command_id"]:
            break
    stream.close()


def test_scopes(s):
    """Without the scope: 403 scope_missing, naming nothing else"""
    w = world(s)
    _, reader = token(s, "acme", ["sandbox:read"])
    for method, path, body in (("POST", BOX, {"image": "debian", "lifecycle": {"ttl_seconds": 9, "on_expiry": "destroy"}}),
                               ("DELETE", f"{BOX}/{w['box_a']}", None), ("POST", f"{BOX}/{w['box_a']}/commands", {"argv": ["true"]}),
                               ("GET", f"{BOX}/{w['box_a']}/files?path=/etc/passwd", None), ("GET", "/v1/receipts", None),
                               ("GET", "/v1/tokens", None), ("GET", "/metrics", None)):
        a = s.req(method, path, body, token=reader)
        assert a.status == 403 and (a.kind, a.code) == ("policy_denied", "scope_missing"), (method, path, a)
    s.get(f"{BOX}/{w['box_a']}", token=reader, expect=200)
    a = s.post(f"{BOX}/{w['box_a']}/commands", {"argv": ["id"], "user": "root"}, token=w["a"], expect=403)
    assert a.code == "scope_missing", a
    a = s.get(f"{BOX}/{w['box_a']}/files?path=/etc/shadow&user=root", token=w["a"], expect=403)
    assert a.code == "scope_missing", a


def test_admin_is_a_tenant(s):
    """The admin token manages tokens; it does not see other tenants' sandboxes"""
    w = world(s)
    assert s.get(f"{BOX}/{w['box_a']}").status == 404
    assert w["box_a"] not in s.get(BOX).body.decode()


def test_revoked_stream(s):
    """A revoked token ends its stream, and is a 401 from then on"""
    world(s)
    ident, tok = token(s, "acme")
    stream = s.stream("GET", "/v1/events", token=tok)
    s.delete(f"/v1/tokens/{ident}", expect=200)
    began = time.monotonic()
    while stream.next(30) is not None:
        assert time.monotonic() - began < 30
    stream.close()
    assert time.monotonic() - began < 20, "the stream outlived its token"
    s.get(BOX, token=tok, expect=401)
    s.delete(f"/v1/tokens/{ident}", expect=200)


def test_expired_stream(s):
    """An expired token ends its stream, and is a 401 from then on"""
    world(s)
    _, tok = token(s, "acme", expires_in_seconds=3)
    stream = s.stream("GET", "/v1/events", token=tok)
    began = time.monotonic()
    while stream.next(40) is not None:
        assert time.monotonic() - began < 40
    took = time.monotonic() - began
    stream.close()
    assert 1.5 < took < 20, took
    s.get(BOX, token=tok, expect=401)


def test_token_secret(s):
    """A token's text is told once: not in lists, not in replays, not in the log, not in the database"""
    key = {"Idempotency-Key": "tokens-1"}
    body = {"name": "once", "scopes": ["sandbox:read"]}
    a = s.post("/v1/tokens", body, headers=key, expect=201)
    secret = a.json["token"]
    assert secret.startswith("alk_") and len(secret) == 44
    again = s.post("/v1/tokens", body, headers=key, expect=201)
    assert again.json["token"] is None and again.json["id"] == a.json["id"] and again.headers["Idempotent-Replayed"] == "true"
    assert secret not in s.get("/v1/tokens?limit=500", expect=200).body.decode()
    assert secret not in s.get(f"/v1/receipts/{a.json['receipt_id']}").body.decode()
    for folder, _, names in os.walk(s.state):
        for name in names:
            path = os.path.join(folder, name)
            if name == "token" or name.endswith(".raw") or not os.path.isfile(path):
                continue
            with open(path, "rb") as f:
                data = f.read()
            assert secret.encode() not in data, f"{name} holds a token"
            assert s.token.encode() not in data, f"{name} holds the admin token"
    with open(s.log_path, "rb") as f:
        log = f.read()
    assert secret.encode() not in log and s.token.encode() not in log


def test_token_in_guest(s):
    """No token reaches the guest"""
    w = world(s)
    r = s.run(w["box_a"], "env; cat /proc/*/environ /proc/cmdline 2>/dev/null | tr '\\0' '\\n'", token=w["a"])
    assert "alk_" not in json.dumps(r)


def test_idempotency_apart(s):
    """The same key of two tenants is two keys"""
    w = world(s)
    key = {"Idempotency-Key": "shared-key"}
    a = s.post(f"{BOX}/{w['box_a']}/commands", {"argv": ["echo", "a"]}, token=w["a"], headers=key, expect=200)
    b = s.post(f"{BOX}/{w['box_b']}/commands", {"argv": ["echo", "b"]}, token=w["b"], headers=key, expect=200)
    assert a.json["stdout"] == "a\n" and b.json["stdout"] == "b\n" and "Idempotent-Replayed" not in b.headers


if __name__ == "__main__":
    harness.main()
