"""kill -9 of the server at bad moments: what ran runs on, what was acknowledged is there, every job ends."""
import hashlib
import http.client
import os
import select
import shutil
import signal
import subprocess
import threading
import time

import harness

BOX = "/v1/sandboxes"
LIFE = {"ttl_seconds": 1800, "on_expiry": "destroy"}
BURST = 10 << 20
# 10 MiB of numbered lines whose end the reader can compute.
BURST_PROGRAM = "import sys\nw=sys.stdout.write\nfor n in range(1, 1048577): w('%09d\\n' % n)"
TICKS = 60


def burst_digest():
    h = hashlib.sha256()
    for n in range(1, 1048577, 4096):
        h.update(b"".join(b"%09d\n" % i for i in range(n, n + 4096)))
    return h.hexdigest()


@harness.deadline(300)
def test_commands_survive(s):
    """kill -9 while five sandboxes print every 0.2 s and one bursts 10 MiB: `true` in all within 2 s, output byte-exact"""
    boxes = [s.create()["id"] for _ in range(5)]
    program = f"import time\nfor n in range({TICKS}):\n  print('tick', n, flush=True)\n  time.sleep(0.2)"
    ticks = {b: s.background(b, ["python3", "-c", program]) for b in boxes}
    for b in boxes:
        harness.until(lambda b=b: s.get(f"{BOX}/{b}/commands/{ticks[b]}").json["stdout_bytes"] > 0, 30, "the first tick")
    burst = s.background(boxes[0], ["python3", "-c", BURST_PROGRAM])
    harness.until(lambda: s.get(f"{BOX}/{boxes[0]}/commands/{burst}").json["stdout_bytes"] > 100_000, 30, "the burst has begun")
    s.kill()
    began = time.monotonic()
    s.spawn()
    took = {}

    def true(b):
        while b not in took:
            try:
                if s.address() and s.post(f"{BOX}/{b}/commands", {"argv": ["true"]}, timeout=20).status == 200:
                    took[b] = time.monotonic() - began
            except (ConnectionError, http.client.HTTPException, TimeoutError):
                pass
            if b not in took:
                assert time.monotonic() - began < 30, f"no answer of {b}"
                select.select([], [], [], 0.005)
    threads = [threading.Thread(target=true, args=(b,)) for b in boxes]
    [t.start() for t in threads]
    [t.join(40) for t in threads]
    print(f"# true in all after {max(took.values()) * 1000:.0f} ms")
    assert len(took) == 5
    s.wait_ready()
    for b in boxes:
        r = s.wait(b, ticks[b], 60)
        assert r["outcome"] == "exited" and r["exit_code"] == 0, r
        assert s.output(b, ticks[b]) == b"".join(b"tick %d\n" % n for n in range(TICKS)), b
    r = s.wait(boxes[0], burst, 90)
    assert r["outcome"] == "exited" and r["stdout_bytes"] == BURST, r
    assert hashlib.sha256(s.output(boxes[0], burst)).hexdigest() == burst_digest()
    assert max(took.values()) <= 2.0, f"{took}"
    for b in boxes:
        s.delete(f"{BOX}/{b}", expect=200)


@harness.deadline(200)
def test_stream_resumes(s):
    """A stream cut by kill -9 is taken up at its position in the new server, no byte twice, none lost"""
    box = s.create()["id"]
    c = s.background(box, ["python3", "-c", "import time\nfor n in range(40):\n  print(n, flush=True); time.sleep(0.1)"])
    stream = s.stream("GET", f"{BOX}/{box}/commands/{c}/output?follow=true")
    got, last = b"", None
    while len(got) < 20:
        e = stream.next()
        if e[0] == "stdout":
            got, last = got + harness.chunk(e), e[1]
    s.kill()
    stream.close()
    s.start()
    stream = s.stream("GET", f"{BOX}/{box}/commands/{c}/output?follow=true", headers={"Last-Event-ID": last})
    got += b"".join(harness.chunk(e) for e in stream.all() if e[0] == "stdout")
    stream.close()
    assert got == b"".join(b"%d\n" % n for n in range(40)), got[-100:]
    s.delete(f"{BOX}/{box}", expect=200)


@harness.deadline(150)
def test_mute_after_restart(s):
    """A guest that is frozen when a new server comes is told as agent_unresponsive, and is itself again when it thaws"""
    box = s.create()["id"]
    pid = harness.qemu_pid(box)
    s.kill()
    os.kill(pid, signal.SIGSTOP)
    try:
        s.start()
        harness.until(lambda: s.get(f"{BOX}/{box}").json["state_reason"] == "agent_unresponsive", 40, "agent_unresponsive")
        assert s.get(f"{BOX}/{box}").json["state"] == "running"
    finally:
        os.kill(pid, signal.SIGCONT)
    harness.until(lambda: s.get(f"{BOX}/{box}").json["state_reason"] is None, 30, "it answers again")
    assert s.run(box, ["true"])["exit_code"] == 0
    s.delete(f"{BOX}/{box}", expect=200)


@harness.deadline(200)
def test_stdin_and_deadline(s):
    """After a restart a running command still takes stdin, and its deadline still holds"""
    box = s.create()["id"]
    c = s.background(box, ["cat"])
    raw = {"Content-Type": "application/octet-stream"}
    s.post(f"{BOX}/{box}/commands/{c}/stdin?offset=0", data=b"one\n", headers=raw, expect=200)
    d = s.background(box, ["sleep", "100"], timeout_seconds=6)
    s.kill()
    s.start()
    s.post(f"{BOX}/{box}/commands/{c}/stdin?offset=4&eof=true", data=b"two\n", headers=raw, expect=200)
    assert s.wait(box, c)["stdout"] == "one\ntwo\n"
    assert s.wait(box, d, 20)["outcome"] == "timed_out"
    s.delete(f"{BOX}/{box}", expect=200)


@harness.deadline(200)
def test_idempotency(s):
    """A key holds across a restart: what was done is replayed, not done again"""
    box_body = {"image": "debian", "lifecycle": LIFE}
    first = s.post(BOX, box_body, headers={"Idempotency-Key": "restart-create"}, expect=201, timeout=120)
    box = first.json["id"]
    body = {"shell": "echo x >> /work/n; cat /work/n"}
    ran = s.post(f"{BOX}/{box}/commands", body, headers={"Idempotency-Key": "restart-run"}, expect=200)
    s.kill()
    s.start()
    again = s.post(BOX, box_body, headers={"Idempotency-Key": "restart-create"}, expect=201)
    assert again.json["id"] == box and again.headers["Idempotent-Replayed"] == "true"
    again = s.post(f"{BOX}/{box}/commands", body, headers={"Idempotency-Key": "restart-run"}, expect=200)
    assert again.json == ran.json and again.headers["Idempotent-Replayed"] == "true"
    assert s.run(box, ["cat", "/work/n"])["stdout"] == "x\n"
    s.delete(f"{BOX}/{box}", expect=200)


@harness.deadline(240)
def test_killed_while_starting(s):
    """kill -9 while a create runs: finished or undone, its job ends, and the same key brings exactly one sandbox"""
    for n, moment in enumerate(("at once", "QEMU runs")):
        key = {"Idempotency-Key": f"starting-{n}"}
        body = {"image": "debian", "name": f"starting-{n}", "lifecycle": LIFE}

        def ask():
            try:
                s.post(BOX, body, headers=key, timeout=60)
            except (ConnectionError, http.client.HTTPException, OSError):
                pass
        t = threading.Thread(target=ask)
        t.start()
        box = harness.until(lambda: [i["id"] for i in s.get(f"{BOX}?state=starting").json["items"]], 20, "it starts")[0]
        if moment == "QEMU runs":
            harness.until(lambda b=box: [w for w in harness.vm_pids([b]).values() if "qemu" in os.path.basename(w[0])], 20, "QEMU runs")
        s.kill()
        t.join(20)
        s.start()
        jobs = s.get(f"/v1/jobs?sandbox_id={box}", expect=200).json["items"]
        harness.until(lambda: all(s.get(f"/v1/jobs/{j['id']}").json["state"] in ("succeeded", "failed", "cancelled") for j in jobs), 60,
                      "every job ends")
        retry = s.post(BOX, body, headers=key, expect=201, timeout=120)
        live = [i for i in s.get(f"{BOX}?limit=500").json["items"] if i["name"] == f"starting-{n}"]
        assert [i["id"] for i in live] == [retry.json["id"]], live
        assert s.run(retry.json["id"], ["true"])["exit_code"] == 0
        if retry.json["id"] != box:
            assert not harness.vm_pids([box]), "the undone sandbox still runs"
        s.delete(f"{BOX}/{retry.json['id']}", expect=200)


@harness.deadline(200)
def test_killed_while_deleting_and_stopping(s):
    """kill -9 in the middle of a delete or a stop: it is finished"""
    boxes = [s.create()["id"] for _ in range(2)]
    def fire(method, path):
        c = http.client.HTTPConnection(s.host, s.port)
        c.request(method, path, headers=s.headers())
        return c
    a = fire("POST", f"{BOX}/{boxes[0]}/stop")
    b = fire("DELETE", f"{BOX}/{boxes[1]}")
    harness.until(lambda: s.get(f"{BOX}/{boxes[0]}").json["state"] != "running", 10, "the stop has begun")
    s.kill()
    a.close(), b.close()
    s.start()
    s.reach(boxes[0], "stopped", 20)
    s.delete(f"{BOX}/{boxes[1]}", expect=200)
    assert s.get(f"{BOX}/{boxes[1]}").json["state"] == "destroyed"
    assert not harness.vm_pids(boxes)
    s.post(f"{BOX}/{boxes[0]}/start", expect=200)
    s.delete(f"{BOX}/{boxes[0]}", expect=200)


@harness.deadline(200)
def test_gone_while_down(s):
    """A VM that died while the server was down: failed/vm_died, its commands lost with the output they had"""
    box = s.create()["id"]
    c = s.background(box, "echo kept; sleep 300")
    harness.until(lambda: s.get(f"{BOX}/{box}/commands/{c}").json["stdout"] == "kept\n", 20, "its output is kept")
    s.kill()
    for pid in harness.vm_pids([box]):
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            pass
    harness.until(lambda: not [p for p in harness.vm_pids([box]) if harness.alive(p)], 10, "QEMU is gone")
    s.start()
    a = s.reach(box, "failed", 10)
    assert a["state_reason"] == "vm_died", a
    r = s.wait(box, c, 10)
    assert r["outcome"] == "lost" and r["stdout"] == "kept\n", r
    s.delete(f"{BOX}/{box}", expect=200)


@harness.deadline(200)
def test_ttl_while_down(s):
    """A ttl that passed while the server was down is applied at start"""
    box = s.create(lifecycle={"ttl_seconds": 5, "on_expiry": "destroy"})
    s.kill()
    ends = time.time() + 6
    harness.until(lambda: time.time() > ends, 10, "the ttl is over")
    s.start()
    s.reach(box["id"], "destroyed", 15)
    assert not harness.vm_pids([box["id"]])


@harness.deadline(200)
def test_orphan(s):
    """A QEMU whose sandbox the server does not know is ended at start, with its run directory"""
    box = s.create()["id"]
    run = os.path.join(s.state, "run", box)
    assert os.path.isdir(run)
    s.kill()
    # A database that never heard of the sandbox: as after a restored backup.
    for name in os.listdir(s.state):
        if name.startswith("airlock.db") or name in ("checkpoint.json", "token", "keys"):
            path = os.path.join(s.state, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
    s.start()
    harness.until(lambda: not harness.vm_pids([box]), 20, "the orphan is ended")
    harness.until(lambda: not os.path.exists(run), 10, "its run directory is gone")
    assert s.get(f"{BOX}/{box}").status == 404


@harness.deadline(60)
def test_records_without_a_row():
    """What a prune that was cut left of a sandbox goes at the next start; the records of one that has its row stay"""
    s = harness.Server("test_restart.records").start()
    try:
        box = s.create()["id"]
        s.run(box, "echo kept")
        s.delete(f"{BOX}/{box}", expect=200)
        folder = os.path.join(s.state, "sandboxes")
        stray = os.path.join(folder, box[:-1] + ("0" if box[-1] != "0" else "1"))
        os.makedirs(os.path.join(stray, "out"))
        with open(os.path.join(stray, "out/x.stdout"), "w") as f:
            f.write("secret")
        whole = stray[:-1] + "z"  # as a database from a backup would not know it
        os.makedirs(whole)
        with open(os.path.join(whole, "disk.raw"), "w") as f:
            f.write("somebody's")
        s.kill()
        s.start()
        harness.until(lambda: not os.path.exists(stray), 20, "the stray records' end")
        assert os.path.exists(os.path.join(whole, "disk.raw")), "data that no record knows were erased"
        shutil.rmtree(whole)
        c = s.get(f"{BOX}/{box}/commands", expect=200).json["items"][0]["command_id"]
        assert s.output(box, c) == b"kept\n"
    finally:
        s.close()


@harness.deadline(120)
def test_second_server(s):
    """A second server on one state directory refuses and names the pid that holds it"""
    p = subprocess.run(s.argv(), env=s.environment(), capture_output=True, text=True, timeout=30)
    assert p.returncode != 0 and str(s.process.pid) in p.stderr, (p.returncode, p.stderr)
    s.get("/healthz", expect=200)


@harness.deadline(240)
def test_sigterm(s):
    """SIGTERM leaves sandboxes running, and ends with 0"""
    box = s.create()["id"]
    c = s.background(box, "sleep 2; echo after")
    pid = harness.qemu_pid(box)
    assert s.terminate() == 0
    assert harness.alive(pid)
    s.start()
    assert harness.qemu_pid(box) == pid
    assert s.wait(box, c)["stdout"] == "after\n"
    s.delete(f"{BOX}/{box}", expect=200)


@harness.deadline(300)
def test_many_kills(s):
    """Ten kill -9 in a row while commands, files and creates run: nothing that was acknowledged is lost"""
    box = s.create()["id"]
    acknowledged, stop = [], threading.Event()

    def work(n):
        i = 0
        while not stop.is_set():
            i += 1
            try:
                a = s.post(f"{BOX}/{box}/commands", {"argv": ["echo", f"{n}-{i}"]}, timeout=20)
                if a.status == 200 and a.json["outcome"] == "exited":
                    acknowledged.append((a.json["command_id"], a.json["receipt_id"], f"{n}-{i}\n"))
            except (ConnectionError, http.client.HTTPException, OSError, AssertionError):
                stop.wait(0.01)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    [t.start() for t in threads]
    try:
        for _ in range(10):
            before = len(acknowledged)
            harness.until(lambda: len(acknowledged) > before + 5, 30, "work is done")
            s.kill()
            s.start()
    finally:
        stop.set()
        [t.join(30) for t in threads]
    assert len(acknowledged) > 50
    for command, receipt, text in acknowledged:
        a = s.get(f"{BOX}/{box}/commands/{command}", expect=200).json
        assert (a["state"], a["outcome"], a["stdout"]) == ("finished", "exited", text), a
        s.get(f"/v1/receipts/{receipt}", expect=200)
    def ended():
        return not [j for j in s.get("/v1/jobs?limit=500").json["items"] if j["state"] in ("queued", "running")]
    harness.until(ended, 30, "every job ends")
    assert s.get("/v1/audit/verify", expect=200).json["verdict"] == "verified"
    assert len(harness.vm_pids([box])) >= 1
    s.delete(f"{BOX}/{box}", expect=200)


if __name__ == "__main__":
    harness.main()
