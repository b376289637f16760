"""Commands: how they end, what they write, what they read, and who may hold what open."""
import hashlib
import http.client
import json
import threading
import time

import harness
from harness import chunk, text_of


def test_not_found(s, box):
    """A program that is not there exits 127, one that cannot be executed 126, both with spawn_error"""
    r = s.run(box, ["no-such-program"])
    assert (r["outcome"], r["exit_code"]) == ("exited", 127) and r["spawn_error"], r
    s.put(s.file(box, "/work/plain.txt", mode="0644"), b"text\n", expect=(200, 201))
    r = s.run(box, ["/work/plain.txt"])
    assert (r["outcome"], r["exit_code"]) == ("exited", 126) and r["spawn_error"], r
    r = s.run(box, ["/work/none/of/this"])
    assert r["exit_code"] == 127, r


def test_spawn_failed(s, box):
    """A bad cwd and an unknown user are 422 spawn_failed"""
    for fields in ({"cwd": "/nowhere"}, {"user": "nobody-here"}):
        a = s.post(f"/v1/sandboxes/{box}/commands", {"argv": ["true"], **fields}, expect=422)
        assert (a.kind, a.code) == ("guest_command_failed", "spawn_failed"), a


def test_ends(s, box):
    """Exit codes and signals are told apart"""
    assert s.run(box, "exit 7")["exit_code"] == 7
    r = s.run(box, "kill -KILL $$")
    assert (r["outcome"], r["exit_code"], r["signal"]) == ("signaled", None, "KILL"), r
    r = s.run(box, "kill -SEGV $$")
    assert (r["outcome"], r["signal"]) == ("signaled", "SEGV"), r


def test_check(s, box):
    """check: true makes a failure a 422 that carries the result"""
    a = s.post(f"/v1/sandboxes/{box}/commands", {"shell": "echo out; exit 3", "check": True}, expect=422)
    assert a.kind == "guest_command_failed" and a.json["result"]["exit_code"] == 3
    assert a.json["result"]["stdout"] == "out\n"
    assert s.run(box, ["true"], check=True)["exit_code"] == 0


def test_no_shell(s, box):
    """argv is not seen by a shell; env and cwd reach the program"""
    assert s.run(box, ["echo", "$HOME; `id` *"])["stdout"] == "$HOME; `id` *\n"
    r = s.run(box, ["sh", "-c", "echo $A; pwd"], env={"A": "x y"}, cwd="/tmp")
    assert r["stdout"] == "x y\n/tmp\n", r


def test_timeout_term(s, box):
    """The deadline sends TERM; the answer is 200 timed_out"""
    t = time.monotonic()
    r = s.run(box, ["sleep", "60"], timeout_seconds=1)
    assert r["outcome"] == "timed_out" and r["timed_out"] and r["exit_code"] is None, r
    assert time.monotonic() - t < 6


def test_timeout_kill(s, box):
    """Who ignores TERM gets KILL after 2 s"""
    t = time.monotonic()
    r = s.run(box, "trap '' TERM; echo on; while :; do sleep 1; done", timeout_seconds=1)
    took = time.monotonic() - t
    assert r["outcome"] == "timed_out" and r["stdout"] == "on\n", r
    assert 2.5 < took < 8, took


def test_background_child(s, box):
    """A background child that holds stdout open does not hold the answer"""
    t = time.monotonic()
    r = s.run(box, "sleep 40 & echo done")
    assert r["stdout"] == "done\n" and time.monotonic() - t < 10, (r, time.monotonic() - t)


def test_timeout_with_child(s, box):
    """At the deadline the answer comes at once, whoever still holds the pipes"""
    t = time.monotonic()
    r = s.run(box, "setsid sleep 40 & sleep 50", timeout_seconds=1)
    assert r["timed_out"] and time.monotonic() - t < 8, (r, time.monotonic() - t)


def test_binary(s, box):
    """Binary output is base64 and says so"""
    r = s.run(box, ["python3", "-c", "import sys; sys.stdout.buffer.write(bytes(range(256)))"])
    assert r["stdout_encoding"] == "base64" and text_of(r) == bytes(range(256)), r
    r = s.run(box, ["printf", "h\u00e9\u4e16\U0001f600"])
    assert r["stdout_encoding"] == "utf8" and r["stdout"] == "h\u00e9\u4e16\U0001f600"


def test_cap(s, box):
    """max_output_bytes cuts the answer, not the command nor the spool"""
    r = s.run(box, "head -c 300000 /dev/zero | tr '\\0' a; echo end >&2", max_output_bytes=1000)
    assert r["stdout_bytes"] == 300000 and r["stdout_truncated"] and len(r["stdout"]) == 1000
    assert not r["stderr_truncated"] and r["stderr"] == "end\n"
    assert s.output(box, r["command_id"]) == b"a" * 300000
    r = s.run(box, "printf 1234", max_output_bytes=4)
    assert not r["stdout_truncated"] and r["stdout"] == "1234"


def test_lines(s, box):
    """100,000 lines in a burst arrive whole"""
    r = s.run(box, ["seq", "100000"])
    wanted = b"".join(b"%d\n" % n for n in range(1, 100001))
    assert r["stdout_bytes"] == len(wanted)
    assert s.output(box, r["command_id"]) == wanted


def test_spool_limit(s, box):
    """Past 64 MiB per stream the spool keeps the first bytes, counts the rest, and says gap"""
    r = s.run(box, "head -c 71303168 /dev/zero", timeout_seconds=80)
    assert r["exit_code"] == 0 and r["stdout_bytes"] == 71303168, r
    path = f"/v1/sandboxes/{box}/commands/{r['command_id']}/output"
    a = s.get(f"{path}?stream=stdout&offset={(64 << 20) - 10}", expect=200)
    assert a.body == bytes(10), len(a.body)
    stream = s.stream("GET", f"{path}?follow=true", headers={"Last-Event-ID": str((64 << 20) - 10)})
    kinds = [e[0] for e in stream.all(30)]
    stream.close()
    assert "gap" in kinds and kinds[-1] == "exit", kinds


def test_stdin(s, box):
    """stdin larger than the pipe goes in whole; without stdin a command reads nothing"""
    text = "".join(f"{n:09d}\n" for n in range(60_000))
    r = s.run(box, ["sha256sum"], stdin=text)
    assert r["stdout"].split()[0] == hashlib.sha256(text.encode()).hexdigest()
    assert s.run(box, ["cat"])["stdout"] == ""
    r = s.run(box, ["true"], stdin=text)
    assert r["exit_code"] == 0, r


def test_stdin_stream(s, box):
    """A background command is fed through POST stdin, with offsets, until eof"""
    c = s.background(box, ["sha256sum"])
    path = f"/v1/sandboxes/{box}/commands/{c}/stdin"
    h, at = hashlib.sha256(), 0
    for part in (b"abc", b"\0\xff" * 100_000, b"end"):
        a = s.post(f"{path}?offset={at}", data=part, headers={"Content-Type": "application/octet-stream"}, expect=200)
        at += len(part)
        h.update(part)
        assert a.json["next_offset"] == at, a
    a = s.post(f"{path}?offset=1", data=b"x", headers={"Content-Type": "application/octet-stream"}, expect=409)
    assert a.code == "stdin_offset", a
    s.post(f"{path}?eof=true", data=b"", headers={"Content-Type": "application/octet-stream"}, expect=200)
    assert s.wait(box, c)["stdout"].split()[0] == h.hexdigest()


def test_sse(s, box):
    """The stream: started, pieces with offsets, exit; a code point is never split"""
    line = "\u4e16" * 5000
    stream = s.stream("POST", f"/v1/sandboxes/{box}/commands",
                      {"argv": ["python3", "-c", "import sys; sys.stdout.write('\u4e16' * 5000); sys.stdout.flush(); print('e', file=sys.stderr)"]})
    events = stream.all()
    stream.close()
    assert events[0][0] == "started" and events[-1][0] == "exit" and events[-1][2]["exit_code"] == 0, events[-1]
    got = {"stdout": b"", "stderr": b""}
    for e in events[1:-1]:
        assert e[2]["offset"] == len(got[e[2]["stream"]])
        assert e[2]["encoding"] == "utf8", "a code point was split"
        got[e[2]["stream"]] += chunk(e)
    assert got == {"stdout": line.encode(), "stderr": b"e\n"}


def test_sse_resume(s, box):
    """A client that leaves in mid-stream takes up at its Last-Event-ID; 8 KiB, then small writes"""
    # The program prints 8 KiB, then waits for a line between small writes, so that the client decides the pace.
    program = ("import sys\nsys.stdout.write('a' * 8192); sys.stdout.flush()\n"
               "for n in range(20):\n  sys.stdin.readline()\n  print(n, flush=True)")
    c = s.background(box, ["python3", "-c", program])
    path = f"/v1/sandboxes/{box}/commands/{c}"
    raw = {"Content-Type": "application/octet-stream"}
    got, last = b"", None
    stream = s.stream("GET", path + "/output?follow=true")
    while len(got) < 8192:
        kind, ident, _ = event = stream.next()
        if kind in ("stdout", "stderr"):
            got, last = got + chunk(event), ident
    stream.close()
    s.post(path + "/stdin", data=b"\n" * 5, headers=raw, expect=200)
    stream = s.stream("GET", path + "/output?follow=true", headers={"Last-Event-ID": last})
    while not got.endswith(b"4\n"):
        got += chunk(stream.next())
    for _ in range(15):
        s.post(path + "/stdin", data=b"\n", headers=raw, expect=200)
    while (event := stream.next()) is not None and event[0] != "exit":
        if event[0] == "stdout":
            got += chunk(event)
    stream.close()
    assert got == b"a" * 8192 + b"".join(b"%d\n" % n for n in range(20))
    assert event and event[2]["exit_code"] == 0


def test_client_gone(s, box):
    """A client that goes away does not stop the command"""
    s.run(box, ["mkfifo", "/work/gate"], check=True)
    # The gate lets the end be ours to choose: the command waits to open it.
    stream = s.stream("POST", f"/v1/sandboxes/{box}/commands", {"shell": "echo one; read x < /work/gate; echo two"})
    while (event := stream.next())[0] != "stdout":
        if event[0] == "started":
            c = event[2]["command_id"]
    stream.close()
    s.run(box, "echo go > /work/gate")
    assert s.wait(box, c)["stdout"] == "one\ntwo\n"


def test_client_gone_buffered(s, box):
    """A buffered call whose client left still ends and settles"""
    connection = http.client.HTTPConnection(s.host, s.port)
    s.run(box, "rm -f /work/gone")
    body = json.dumps({"shell": "sleep 1; echo here > /work/gone; echo late"}).encode()
    connection.request("POST", f"/v1/sandboxes/{box}/commands", body, s.headers(None, {"Content-Type": "application/json"}))
    # Gone as soon as the command is listed.
    before = harness.until(lambda: [c for c in s.get(f"/v1/sandboxes/{box}/commands?limit=1").json["items"]
                                    if c["state"] == "running"], 10, "the command runs")
    connection.close()
    assert s.wait(box, before[0]["command_id"])["stdout"] == "late\n"


def test_slow_reader(s, box):
    """A slow reader holds the stream back, and loses nothing"""
    stream = s.stream("POST", f"/v1/sandboxes/{box}/commands", {"argv": ["seq", "400000"], "timeout_seconds": 60})
    first = stream.next()
    assert first[0] == "started"
    done = s.wait(box, first[2]["command_id"])  # the command does not wait for this reader: the spool takes it
    assert done["outcome"] == "exited"
    got = b"".join(chunk(e) for e in stream.all() if e[0] == "stdout")
    stream.close()
    assert got == b"".join(b"%d\n" % n for n in range(1, 400001))


def test_thirty_third(s, box):
    """32 commands at once; the 33rd is a 429"""
    ids = [s.background(box, ["cat"]) for _ in range(32)]
    try:
        a = s.post(f"/v1/sandboxes/{box}/commands", {"argv": ["true"]}, expect=429)
        assert a.kind == "rate_limited" and a.code == "too_many_commands" and a.headers.get("Retry-After"), a
    finally:
        for c in ids:
            s.post(f"/v1/sandboxes/{box}/commands/{c}/signal", {"signal": "KILL"}, expect=200)
        for c in ids:
            assert s.wait(box, c)["signal"] == "KILL"
    assert s.run(box, ["true"])["exit_code"] == 0


def test_signal_group(s, box):
    """A signal reaches the process group; one to a finished command is 409 not_running"""
    c = s.background(box, "sh -c 'trap \"echo child; exit 0\" USR1; echo ready; while :; do sleep 0.1; done' & "
                          "trap 'wait; exit 5' USR1; wait; exit 6")
    harness.until(lambda: "ready" in s.get(f"/v1/sandboxes/{box}/commands/{c}").json["stdout"], 20, "the child is ready")
    s.post(f"/v1/sandboxes/{box}/commands/{c}/signal", {"signal": "USR1"}, expect=200)
    r = s.wait(box, c, 20)
    assert r["exit_code"] == 5 and r["stdout"] == "ready\nchild\n", r
    a = s.post(f"/v1/sandboxes/{box}/commands/{c}/signal", {"signal": "TERM"}, expect=409)
    assert a.code == "not_running", a


def test_orphans_reaped(s, box):
    """Orphans end as nobody's zombies"""
    s.run(box, "for i in $(seq 40); do (sleep 0.01 &) ; done")
    ask = "for p in /proc/[0-9]*/stat; do cut -d' ' -f3 $p 2>/dev/null; done | grep -c Z"
    harness.until(lambda: s.run(box, ask, user="root")["stdout"].strip() == "0", 20, "no zombies")


def test_large_arguments(s, box):
    """Arguments at the limit pass, past it they are refused"""
    r = s.run(box, ["printf", "%s", "x" * 100_000], max_output_bytes=200_000)
    assert r["stdout_bytes"] == 100_000
    s.post(f"/v1/sandboxes/{box}/commands", {"argv": ["echo", "x" * 140_000]}, expect=422)


def test_denied_env(s, box):
    """An environment name that changes what a program loads is refused"""
    a = s.post(f"/v1/sandboxes/{box}/commands", {"argv": ["true"], "env": {"LD_PRELOAD": "/work/x.so"}}, expect=403)
    assert (a.kind, a.code) == ("policy_denied", "env_denied"), a


def test_token_masked(s, box):
    """A token printed in the guest is masked, wherever it is cut"""
    half = len(s.token) // 2
    r = s.run(box, f"printf %s {s.token[:half]}; sleep 0.3; printf '%s\\n' {s.token[half:]}")
    assert s.token not in r["stdout"] and r["stdout_bytes"] == len(s.token) + 1, r["stdout_bytes"]
    assert s.token.encode() not in s.output(box, r["command_id"])
    assert s.get(f"/v1/sandboxes/{box}/commands/{r['command_id']}").json["redacted"]


def test_parallel(s, box):
    """Sixteen commands at once keep their outputs apart"""
    results = {}

    def one(n):
        results[n] = s.run(box, ["sh", "-c", f"for i in $(seq 200); do echo {n}-$i; done"])["stdout"]
    threads = [threading.Thread(target=one, args=(n,)) for n in range(16)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for n in range(16):
        assert results[n] == "".join(f"{n}-{i}\n" for i in range(1, 201)), n


def test_list(s, box):
    """The list is paged, newest first, without output"""
    page = s.get(f"/v1/sandboxes/{box}/commands?limit=3", expect=200).json
    assert len(page["items"]) == 3 and page["next_cursor"]
    more = s.get(f"/v1/sandboxes/{box}/commands?limit=3&cursor={page['next_cursor']}", expect=200).json
    ids = [c["command_id"] for c in page["items"] + more["items"]]
    assert ids == sorted(ids, reverse=True) and len(set(ids)) == 6


def test_output_range(s, box):
    """Output by offset and limit; past the end is a 416 or an empty page"""
    r = s.run(box, "printf 0123456789")
    path = f"/v1/sandboxes/{box}/commands/{r['command_id']}/output?stream=stdout"
    a = s.get(path + "&offset=3&limit=4", expect=200)
    assert a.body == b"3456" and a.headers["Airlock-Next-Offset"] == "7" and a.headers["Airlock-Complete"] == "false"
    assert a.headers["X-Content-Type-Options"] == "nosniff"
    a = s.get(path + "&offset=7", expect=200)
    assert a.body == b"789" and a.headers["Airlock-Complete"] == "true"
    assert s.get(path + "&offset=11").status in (200, 416)


def test_idempotent(s, box):
    """The same key runs once and is told so; another body is refused"""
    key = {"Idempotency-Key": "commands-1"}
    body = {"shell": "echo x >> /work/once; cat /work/once"}
    first = s.post(f"/v1/sandboxes/{box}/commands", body, headers=key, expect=200)
    again = s.post(f"/v1/sandboxes/{box}/commands", body, headers=key, expect=200)
    assert again.headers["Idempotent-Replayed"] == "true" and again.json == first.json
    assert s.run(box, ["cat", "/work/once"])["stdout"] == "x\n"
    a = s.post(f"/v1/sandboxes/{box}/commands", {"shell": "echo y"}, headers=key, expect=409)
    assert a.code == "idempotency_mismatch", a


if __name__ == "__main__":
    harness.main()
