"""HTTP itself: bodies that are no JSON, methods that are not there, headers that come slowly, requests in a row."""
import json
import os
import re
import socket
import time

import harness

NEW = "/v1/sandboxes"
JSON = {"Content-Type": "application/json"}


def refused(s, body, **headers):
    a = s.req("POST", NEW, data=body, headers={**JSON, **headers})
    assert a.status == 422 and a.kind == "validation", (body[:80], a)
    return a


def pointers(a):
    return {e["pointer"] for e in a.json["errors"]}


def test_malformed_json(s):
    """A body that is no JSON: 422 malformed_json with line and column"""
    a = refused(s, b'{"image":"debian",\n  "lifecycle": oops}')
    assert a.code == "malformed_json", a
    fault = a.json["errors"][0]
    assert fault["line"] == 2 and 13 <= fault["column"] <= 20, fault
    for body in (b"{", b"nul", b'{"a":1}x', b'{"a":1,}', b"{'a':1}", b'{"a":01}', b'"\x01"', b"\xef\xbb\xbf{}"):
        assert refused(s, body).code == "malformed_json", body


def test_not_an_object(s):
    """A JSON body that is no object is refused with a pointer"""
    for body in (b"[]", b"1", b"null", b'"x"', b"true"):
        a = refused(s, body)
        assert a.code == "malformed_json" or "" in pointers(a), (body, a)


def test_duplicate_keys(s):
    """Duplicate keys are refused, at any depth"""
    for body in (b'{"image":"debian","image":"x","lifecycle":{"ttl_seconds":9,"on_expiry":"destroy"}}',
                 b'{"image":"debian","lifecycle":{"ttl_seconds":9,"ttl_seconds":8,"on_expiry":"destroy"}}',
                 b'{"image":"debian","im\\u0061ge":"x","lifecycle":{"ttl_seconds":9,"on_expiry":"destroy"}}'):
        assert refused(s, body).code == "malformed_json", body


def test_deep_json(s):
    """Deep JSON is refused, quickly"""
    for depth in (33, 5000, 100_000):
        assert refused(s, b'{"labels":' * depth + b"1" + b"}" * depth).code == "malformed_json", depth
        assert refused(s, b"[" * depth).code == "malformed_json", depth


def test_invalid_utf8(s):
    """Invalid UTF-8 is refused with its place"""
    for bad in (b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"):
        a = refused(s, b'{"image":"' + bad + b'"}')
        assert a.code == "malformed_json" and a.json["errors"][0]["line"] == 1, (bad, a)


def test_nul_in_strings(s, box):
    """A NUL in a string is refused where a program would cut it"""
    a = s.req("POST", f"{NEW}/{box}/commands", data=b'{"argv":["echo","a\\u0000b"]}', headers=JSON)
    assert a.status == 422, a


def test_all_faults(s):
    """Every fault of a body is listed, each with its pointer"""
    a = s.post(NEW, {"image": 7, "name": "UPPER CASE!", "colour": "red", "resources": {"vcpus": 9, "memory_mib": 1, "cpus": 1},
                     "lifecycle": {"ttl_seconds": 0, "on_expiry": "sleep"}, "labels": {"a": 1}}, expect=422)
    wanted = {"/image", "/colour", "/resources/vcpus", "/resources/memory_mib", "/resources/cpus", "/lifecycle/ttl_seconds",
              "/lifecycle/on_expiry", "/labels/a"}
    assert wanted <= pointers(a), wanted - pointers(a)


def test_required(s):
    """No lifecycle, no source, two sources: 422"""
    life = {"ttl_seconds": 60, "on_expiry": "destroy"}
    for body in ({"image": "debian"}, {"lifecycle": life}, {"image": "debian", "snapshot_id": "snp" + "0" * 26, "lifecycle": life},
                 {"image": "debian", "lifecycle": {"ttl_seconds": 60}}, {"image": "debian", "lifecycle": {"on_expiry": "stop"}}):
        a = s.post(NEW, body)
        assert a.status in (422, 501), (body, a)
        assert a.status == 422 or "snapshot_id" in body, (body, a)


def test_ranges(s):
    """Values at the edge of their range: never clamped"""
    ok = {"image": "debian", "lifecycle": {"ttl_seconds": 60, "on_expiry": "destroy"}}
    for resources, pointer in (({"vcpus": 0}, "/resources/vcpus"), ({"memory_mib": 127}, "/resources/memory_mib"),
                               ({"memory_mib": 16385}, "/resources/memory_mib"), ({"disk_mib": 63}, "/resources/disk_mib"),
                               ({"disk_mib": 65537}, "/resources/disk_mib"), ({"vcpus": 1.5}, "/resources/vcpus"),
                               ({"vcpus": "1"}, "/resources/vcpus"), ({"vcpus": True}, "/resources/vcpus"),
                               ({"vcpus": 1e30}, "/resources/vcpus")):
        a = s.post(NEW, {**ok, "resources": resources}, expect=422)
        assert pointer in pointers(a), (resources, a)
    a = s.post(NEW, {**ok, "lifecycle": {"ttl_seconds": 2592001, "on_expiry": "destroy"}}, expect=422)
    assert "/lifecycle/ttl_seconds" in pointers(a)


def test_unbuilt(s):
    """What is named but not built is 501 with its pointer as code; a route is 404"""
    ok = {"image": "debian", "lifecycle": {"ttl_seconds": 60, "on_expiry": "destroy"}}
    a = s.post(NEW, {**ok, "network": {"egress": [{"host": "example.org", "port": 443}]}}, expect=501)
    assert a.kind == "unsupported_capability" and a.code.startswith("/network"), a
    for path in ("/v1/plans", "/v1/workloads", "/v1/secrets/x", "/v1/policies/x"):
        s.get(path, expect=404)


def test_require_kvm(s):
    """require.accel kvm is never answered by emulation"""
    c = s.get("/v1/capabilities").json
    if c["accel"]["selected"] == "kvm":
        raise harness.Skip("this host has KVM")
    a = s.post(NEW, {"image": "debian", "lifecycle": {"ttl_seconds": 60, "on_expiry": "destroy"}, "require": {"accel": "kvm"}},
               expect=501)
    assert a.kind == "unsupported_capability" and a.code == "kvm" and a.json["remedy"], a


def test_content_type(s):
    """A body of another media type is 415; a charset of UTF-8 is fine"""
    body = b'{"image":"none-such","lifecycle":{"ttl_seconds":9,"on_expiry":"destroy"}}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", "multipart/form-data"):
        a = s.req("POST", NEW, data=body, headers={"Content-Type": kind}, expect=415)
        assert a.kind == "unsupported_media_type"
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        a = s.req("POST", NEW, data=body, headers={"Content-Type": kind}, expect=422)
        assert a.kind == "admission_failed" and a.code == "image_not_found", a


def test_unknown_query(s, box):
    """An unknown query parameter is a fault like an unknown field, and so is one given twice"""
    for path in (f"{NEW}?colour=red", f"{NEW}/{box}?x", f"{NEW}?limit=1&limit=2", "/v1/jobs?state=running"):
        a = s.get(path, expect=422)
        assert a.kind == "validation" and a.json["errors"], a
    for value in ("0", "501", "-1", "x", "", "1.5", "99999999999999999999"):
        s.get(f"{NEW}?limit={value}", expect=422)
    s.get(f"{NEW}?cursor=nonsense", expect=422)


def test_methods(s, box):
    """HEAD, OPTIONS, an unknown method: 405 with Allow, never a crash"""
    a = s.req("POST", f"{NEW}/{box}", data=b"{}", headers=JSON, expect=405)
    assert set(re.split(", *", a.headers["Allow"])) >= {"GET", "PATCH", "DELETE"}, a.headers["Allow"]
    for method in ("OPTIONS", "TRACE", "BREW", "PROPFIND", "PUT"):
        a = s.req(method, NEW)
        assert a.status in (200, 204, 405) and a.headers.get("Allow"), (method, a)
    a = s.req("HEAD", f"{NEW}/{box}")
    assert a.status in (200, 405) and not a.body, a
    assert s.req("HEAD", "/healthz", token=False).status in (200, 405)


def test_paths(s, box):
    """A trailing slash, a double slash, dots, another case and encodings are other paths"""
    for path in ("/v1/sandboxes/", "/v1//sandboxes", "/V1/sandboxes", "/v1/./sandboxes", "/v1/x/../sandboxes", "/v1/sandboxes%00",
                 f"/v1/sandboxes/{box}/", f"/v1/sandboxes/{box.upper()}", "/", "/v1", "/v1/%73andboxes%2f"):
        a = s.get(path)
        assert a.status == 404, (path, a)


def test_request_id(s):
    """X-Request-Id is echoed, or made; a bad one is a fault"""
    assert s.get("/healthz", headers={"X-Request-Id": "a.B_c-9"}).headers["X-Request-Id"] == "a.B_c-9"
    made = [s.get("/healthz").headers["X-Request-Id"] for _ in range(2)]
    assert made[0] != made[1]
    a = s.get(NEW, headers={"X-Request-Id": "x" * 129})
    assert a.status == 422, a
    a = s.get(NEW, headers={"X-Request-Id": "no spaces"})
    assert a.status == 422, a


def test_authorization(s):
    """Only a whole, well-formed bearer token is one"""
    for value in ("", "Bearer", "Bearer ", s.token, "Basic " + s.token, "Bearer " + s.token + "x", "Bearer " + s.token[:-1],
                  "Bearer  " + s.token[:-1] + "!", "Bearer " + "x" * 5000):
        a = s.req("GET", NEW, token=False, headers={"Authorization": value})
        assert a.status == 401 and a.kind == "unauthorized", (value[:20], a)
        assert s.token not in a.body.decode()


def head(s, method, path, *more):
    return ("\r\n".join([f"{method} {path} HTTP/1.1", "Host: test", f"Authorization: Bearer {s.token}", *more]) + "\r\n\r\n").encode()


def answers(data):
    """[(status, headers, body)] of answers with a known length in a row."""
    out = []
    while data:
        block, _, rest = data.partition(b"\r\n\r\n")
        lines = block.decode("latin-1").split("\r\n")
        status = int(lines[0].split()[1])
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
        if status == 100:
            out.append((100, headers, b""))
            data = rest
            continue
        n = int(headers.get("content-length", 0))
        out.append((status, headers, rest[:n]))
        data = rest[n:]
    return out


def test_pipelining(s, box):
    """Ten requests in one packet get ten answers in order"""
    paths = ["/healthz", f"{NEW}/{box}", f"{NEW}/{box}/files/stat?path=/work", "/v1/none", f"{NEW}?limit=1"] * 2
    data = b"".join(head(s, "GET", p, *(["Connection: close"] if n == 9 else [])) for n, p in enumerate(paths))
    got = [status for status, _, _ in answers(s.raw(data, 15))]
    assert got == [200, 200, 200, 404, 200] * 2, got


def test_pipelined_post(s, box):
    """A request behind a slow one in the same packet is not lost"""
    body = json.dumps({"shell": "sleep 0.5; echo one"}).encode()
    data = (head(s, "POST", f"{NEW}/{box}/commands", "Content-Type: application/json", f"Content-Length: {len(body)}") + body +
            head(s, "GET", f"{NEW}/{box}", "Connection: close"))
    got = answers(s.raw(data, 20))
    assert [g[0] for g in got] == [200, 200], got
    assert json.loads(got[0][2])["stdout"] == "one\n" and json.loads(got[1][2])["id"] == box


def test_expect_continue(s, box):
    """Expect: 100-continue is answered before the body, with 100 or with the refusal"""
    with socket.create_connection((s.host, s.port), timeout=10) as c:
        c.sendall(head(s, "PUT", s.file(box, "/work/expect"), "Content-Length: 5", "Expect: 100-continue", "Connection: close"))
        assert c.recv(1000).startswith(b"HTTP/1.1 100"), "no 100"
        c.sendall(b"12345")
        got = b""
        while part := c.recv(65536):
            got += part
    assert answers(got)[-1][0] in (200, 201), got
    with socket.create_connection((s.host, s.port), timeout=10) as c:
        c.sendall(head(s, "PUT", s.file(box, "/work/../x"), "Content-Length: 5000000", "Expect: 100-continue"))
        first = c.recv(65536)
    assert first.split()[1] in (b"422", b"100"), first[:100]
    assert first.split()[1] == b"422", "a refused upload is asked for"


def test_chunked_json(s):
    """A JSON body in chunks is a JSON body"""
    body = json.dumps({"image": "none-such", "lifecycle": {"ttl_seconds": 9, "on_expiry": "destroy"}}).encode()
    parts = [body[:7], body[7:8], body[8:]]
    a = s.req("POST", NEW, data=iter(parts), headers=JSON, expect=422)
    assert a.code == "image_not_found", a


def test_large_body(s):
    """A JSON body over the limit is 413, and the client sees the answer"""
    a = s.req("POST", NEW, data=b'{"image":"' + b"x" * 3_000_000 + b'"}', headers=JSON, expect=413)
    assert a.kind == "too_large"


def test_large_headers(s):
    """Huge headers and a huge request line end that connection only"""
    for data in (head(s, "GET", "/healthz", "X-Big: " + "x" * 200_000), head(s, "GET", "/" + "x" * 200_000),
                 head(s, "GET", "/healthz", *[f"X-{n}: y" for n in range(5000)])):
        got = s.raw(data, 10)
        assert not got or got.split()[1] in (b"400", b"413", b"414", b"431"), got[:80]
    s.get("/healthz", expect=200)


def test_smuggling(s):
    """Two lengths, a length beside chunks, HTTP/1.1 without Host: refused and closed"""
    auth = f"Authorization: Bearer {s.token}\r\n"
    start = f"POST {NEW} HTTP/1.1\r\nHost: x\r\n{auth}Content-Type: application/json\r\n"
    for data in (start + "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ",
                 start + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                 start + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
                 start + "Content-Length: -1\r\n\r\n",
                 f"GET {NEW} HTTP/1.1\r\n{auth}\r\n", f"GET {NEW} HTTP/1.1\r\nHost: a\r\nHost: b\r\n{auth}\r\n",
                 "\x16\x03\x01\x02\x00", "GET\r\n\r\n", "GET / HTTP/9.9\r\nHost: x\r\n\r\n"):
        got = s.raw(data.encode("latin-1"), 8, shut=True)
        assert not got or got.split()[1].startswith((b"4", b"5")), (data[-60:], got[:100])
    s.get("/healthz", expect=200)


@harness.deadline(60)
def test_slow_headers(s):
    """Headers that come a byte at a time end at their own deadline; others are served meanwhile"""
    began = time.monotonic()
    with socket.create_connection((s.host, s.port), timeout=1) as c:
        c.sendall(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
        while True:
            assert time.monotonic() - began < 45, "the connection outlives its deadline"
            try:
                c.sendall(b"x")
                if c.recv(100) == b"":
                    break
            except TimeoutError:
                s.get("/healthz", expect=200)  # a byte a second
            except ConnectionError:
                break


def test_many_idle(s):
    """500 idle connections keep nobody else out, and are let go"""
    before = len(os.listdir(f"/proc/{s.process.pid}/fd"))
    idle = [socket.create_connection((s.host, s.port)) for _ in range(500)]
    s.get("/healthz", expect=200)
    for c in idle:
        c.close()
    harness.until(lambda: len(os.listdir(f"/proc/{s.process.pid}/fd")) <= before + 5, 30, "descriptors are given back")


def test_not_modified_races(s, box):
    """If-Match: the generation that was seen, or 412"""
    a = s.get(f"{NEW}/{box}", expect=200)
    tag = a.headers["ETag"]
    assert tag == f"\"{a.json['generation']}\"", tag
    b = s.patch(f"{NEW}/{box}", {"labels": {"a": "1"}}, headers={"If-Match": tag}, expect=200)
    assert b.json["generation"] > a.json["generation"]
    s.patch(f"{NEW}/{box}", {"labels": {"a": "2"}}, headers={"If-Match": tag}, expect=412)
    assert s.get(f"{NEW}/{box}").json["labels"] == {"a": "1"}


def test_errors_say_nothing(s):
    """No host path, token or argv stands in an error"""
    for a in (s.get("/v1/none"), s.post(NEW, {"image": "/etc/passwd", "lifecycle": {"ttl_seconds": 9, "on_expiry": "destroy"}}),
              s.get(f"{NEW}/sbx" + "0" * 26)):
        text = a.body.decode()
        assert s.state not in text and s.token not in text and harness.IMAGES not in text, text


if __name__ == "__main__":
    harness.main()
