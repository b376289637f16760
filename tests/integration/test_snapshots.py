"""Snapshots and restores: what goes on without a gap, what is fresh, what is refused, what is left."""
import os
import signal
import subprocess

import harness
from saved import (BOX, COUNT, KEEP, LIFE, MARK, SNAP, after, aside, differ, drop, end, fork, goes_on, hidden, jobs_ended,
                   lines, live, marked, restore, snapshot, unique, who)


def test_retention_required(s):
    """A snapshot says how long it is kept: none and both are refused by pointer"""
    box = s.create()["id"]
    for body, pointer in (({}, "/retention"), ({"retention": {}}, "/retention"),
                          ({"retention": {"keep": True, "expires_in_seconds": 60}}, "/retention"),
                          ({"retention": {"keep": False}}, "/retention/keep"),
                          ({"retention": {"expires_in_seconds": 0}}, "/retention/expires_in_seconds")):
        a = s.post(f"{BOX}/{box}/snapshots", body, expect=422)
        assert pointer in [e["pointer"] for e in a.json["errors"]], (body, a)
    assert s.get(f"{SNAP}?sandbox_id={box}").json["items"] == []
    end(s, box)


@harness.deadline(120)
def test_restore(s):
    """Two restores of one snapshot: same file and memory as at that moment, everything else fresh, source goes on"""
    src = s.create(name="restored", env={"MODE": "ci"})
    box = src["id"]
    s.run(box, MARK)
    c = s.background(box, COUNT, timeout_seconds=600)
    goes_on(s, box, c)
    a = snapshot(s, box, name="first")
    assert (a["sandbox_id"], a["parent_id"], a["state"], a["name"]) == (box, None, "ready", "first"), a
    assert a["sensitivity"] == "may_contain_secrets" and a["bytes"] > 0 and a["paused_ms"] > 0 and a["retention"]["keep"], a
    goes_on(s, box, c)
    s.run(box, "echo changed > /work/x; rm /dev/shm/x")
    verdict = s.get(f"{SNAP}/{a['id']}/compat", expect=200).json
    assert verdict["compatible"] and verdict["mismatches"] == [], verdict
    made = [restore(s, a["id"]) for _ in range(2)]
    for m in made:
        assert m["state"] == "running" and m["backend"]["boot_path"] == "snapshot" and m["env_keys"] == ["MODE"], m
        assert m["parent"] == {"sandbox_id": box, "snapshot_id": a["id"]} and m["resources"] == src["resources"], m
        marked(s, m["id"])
        assert s.run(m["id"], "echo $MODE")["stdout"] == "ci\n"
    assert len({unique(m) for m in made}) == 2
    differ(who(s, box), *[who(s, m["id"]) for m in made])
    s.run(made[0]["id"], "echo mine > /work/x")
    assert s.run(made[1]["id"], "sha256sum -c --quiet /work/sums")["exit_code"] == 0, "one wrote into the other's disk"
    goes_on(s, box, c)
    end(s, box, *[m["id"] for m in made])
    drop(s, a["id"])
    assert not hidden(s)


@harness.deadline(120)
def test_restored_command(s):
    """A command that ran at the snapshot goes on in the restored one under an id of its own, from the same bytes"""
    box = s.create()["id"]
    c = s.background(box, COUNT, timeout_seconds=600)
    goes_on(s, box, c)
    snap = snapshot(s, box)["id"]
    at = lines(s, box, c)
    other = restore(s, snap)["id"]
    mine = [x["command_id"] for x in s.get(f"{BOX}/{other}/commands", expect=200).json["items"]]
    assert len(mine) == 1 and mine[0] != c, mine
    goes_on(s, other, mine[0])
    goes_on(s, box, c)
    assert lines(s, other, mine[0]) > at - 20
    s.post(f"{BOX}/{other}/commands/{mine[0]}/signal", {"signal": "KILL"}, expect=200)
    r = s.wait(other, mine[0], 20)
    assert r["outcome"] == "signaled" and r["receipt_id"] != s.get(f"{BOX}/{box}/commands/{c}").json["receipt_id"], r
    goes_on(s, box, c)
    end(s, box, other)
    drop(s, snap)


@harness.deadline(120)
def test_snapshot_of_paused(s):
    """A paused sandbox is saved and stays paused; its restore runs"""
    box = s.create()["id"]
    s.run(box, MARK)
    s.post(f"{BOX}/{box}/pause", expect=200)
    snap = snapshot(s, box)["id"]
    assert s.get(f"{BOX}/{box}").json["state"] == "paused"
    other = restore(s, snap)["id"]
    marked(s, other)
    child = fork(s, box, 1)["items"][0]["id"]
    marked(s, child)
    assert s.get(f"{BOX}/{box}").json["state"] == "paused"
    s.post(f"{BOX}/{box}/resume", expect=200)
    marked(s, box)
    end(s, box, other, child)
    drop(s, snap)


@harness.deadline(180)
def test_snapshots_of_paused(s):
    """A paused sandbox is saved as often as one likes: QEMU has one descriptor more meanwhile, none after a resume; it goes cold"""
    box = s.create(resources={"vcpus": 1, "memory_mib": 128, "disk_mib": 64})["id"]
    s.run(box, MARK)
    pid = next(p for p, (folder, name) in harness.disks(s.state).items() if (folder, name) == ("sandboxes", box))
    count = lambda: len(os.listdir(f"/proc/{pid}/fd"))  # noqa: E731
    drop(s, snapshot(s, box)["id"])
    before = count()
    for n in (20, 2):
        s.post(f"{BOX}/{box}/pause", expect=200)
        for i in range(n):
            snap = snapshot(s, box)["id"]
            assert count() <= before + 1, f"{count() - before} descriptors more after {i + 1} snapshots"
            if i < n - 1:
                drop(s, snap)
        other = restore(s, snap)["id"]  # the last is as good as the first
        marked(s, other)
        end(s, other)
        drop(s, snap)
        s.post(f"{BOX}/{box}/resume", expect=200)
        assert count() == before, f"{count() - before} descriptors more after a resume"
        marked(s, box)
        drop(s, snapshot(s, box)["id"])
        assert count() == before
    s.post(f"{BOX}/{box}/pause", expect=200)
    drop(s, snapshot(s, box)["id"])
    assert s.post(f"{BOX}/{box}/cold", expect=200).json["state"] == "cold"
    s.post(f"{BOX}/{box}/resume", expect=200)
    marked(s, box)
    end(s, box)


@harness.deadline(120)
def test_snapshot_and_stop(s):
    """stop: the source is stopped with its snapshot, its commands are killed; start boots from its disk"""
    box = s.create()["id"]
    s.run(box, MARK)  # what is not synced: stop is no cut of the power
    c = s.background(box, COUNT, timeout_seconds=600)
    snap = snapshot(s, box, stop=True)["id"]
    a = s.get(f"{BOX}/{box}").json
    assert a["state"] == "stopped" and not harness.vm_pids([box]), a
    assert s.get(f"{BOX}/{box}/commands/{c}").json["outcome"] == "killed"
    a = s.post(f"{BOX}/{box}/start", expect=200).json
    assert a["state"] == "running" and a["backend"]["boot_path"] == "cold", a["backend"]
    assert s.run(box, "ls /dev/shm; grep /work/ /work/sums | sha256sum -c --quiet")["exit_code"] == 0, "the disk is not what it was"
    other = restore(s, snap)["id"]
    marked(s, other)
    end(s, box, other)
    drop(s, snap)


@harness.deadline(120)
def test_replay(s):
    """Fork and snapshot under one Idempotency-Key are done once"""
    before = live(s)
    box = s.create()["id"]
    key = {"Idempotency-Key": "snapshot-once"}
    one = s.post(f"{BOX}/{box}/snapshots", KEEP, headers=key, expect=201)
    two = s.post(f"{BOX}/{box}/snapshots", KEEP, headers=key, expect=201)
    assert two.headers["Idempotent-Replayed"] == "true" and one.json == two.json, (one, two)
    assert [i["id"] for i in s.get(f"{SNAP}?sandbox_id={box}").json["items"]] == [one.json["id"]]
    assert s.post(f"{BOX}/{box}/snapshots", {**KEEP, "name": "b"}, headers=key, expect=409).code == "idempotency_mismatch"
    key = {"Idempotency-Key": "fork-once"}
    one = s.post(f"{BOX}/{box}/fork", {"count": 2}, headers=key, expect=201)
    two = s.post(f"{BOX}/{box}/fork", {"count": 2}, headers=key, expect=201)
    ids = [i["id"] for i in one.json["items"]]
    assert two.headers["Idempotent-Replayed"] == "true" and ids == [i["id"] for i in two.json["items"]], two
    assert live(s) - before == {box, *ids}
    end(s, box, *ids)
    drop(s, *[i["id"] for i in s.get(f"{SNAP}?sandbox_id={box}").json["items"]])


@harness.deadline(120)
def test_delete_and_lists(s):
    """Deleting: a report, the same the second time, state deleted afterwards; lists by sandbox and state"""
    box = s.create()["id"]
    a, b = snapshot(s, box)["id"], snapshot(s, box)["id"]
    ids = [i["id"] for i in s.get(f"{SNAP}?sandbox_id={box}").json["items"]]
    assert ids == [b, a], "newest first"
    page = s.get(f"{SNAP}?sandbox_id={box}&limit=1").json
    assert [i["id"] for i in page["items"]] == [b] and page["next_cursor"]
    assert [i["id"] for i in s.get(f"{SNAP}?sandbox_id={box}&limit=1&cursor={page['next_cursor']}").json["items"]] == [a]
    one = s.delete(f"{SNAP}/{a}", expect=200).json
    two = s.delete(f"{SNAP}/{a}", expect=200).json
    lists = ("erased", "retained", "failed", "deleted_at", "state")
    assert one["erased"][0]["bytes"] > 0 and not one["failed"] and one["state"] == "deleted", one
    assert [one[k] for k in lists] == [two[k] for k in lists] and one["receipt_id"] != two["receipt_id"]
    got = s.get(f"{SNAP}/{a}", expect=200).json
    assert got["state"] == "deleted" and got["state_reason"] == "deleted" and got["deleted_at"], got
    assert not os.path.exists(os.path.join(s.state, "snapshots", a))
    assert [i["id"] for i in s.get(f"{SNAP}?sandbox_id={box}").json["items"]] == [b]
    assert [i["id"] for i in s.get(f"{SNAP}?sandbox_id={box}&state=deleted").json["items"]] == [a]
    s.get(f"{SNAP}/{a}/compat", expect=409)
    s.post(BOX, {"snapshot_id": a, "lifecycle": LIFE}, expect=409)
    s.post(f"{SNAP}/{a}/fork", {"count": 1, "lifecycle": LIFE}, expect=409)
    end(s, box)
    other = restore(s, b)["id"]  # a snapshot outlives its source
    end(s, other)
    drop(s, b)


@harness.deadline(60)
def test_precondition(s):
    """DELETE with If-Match: the generation that was seen, or 412 and the snapshot stays"""
    box = s.create()["id"]
    snap = snapshot(s, box)["id"]
    tag = s.get(f"{SNAP}/{snap}", expect=200).headers["ETag"]
    a = s.delete(f"{SNAP}/{snap}", headers={"If-Match": '"99"'}, expect=412)
    assert a.kind == "precondition_failed" and a.code == "generation_mismatch", a
    kept = s.get(f"{SNAP}/{snap}", expect=200)
    assert kept.json["state"] == "ready" and kept.headers["ETag"] == tag, kept
    end(s, box, restore(s, snap)["id"])
    s.delete(f"{SNAP}/{snap}", headers={"If-Match": tag}, expect=200)
    s.delete(f"{SNAP}/{snap}", headers={"If-Match": tag}, expect=412)  # it is at another now
    s.delete(f"{SNAP}/{snap}", headers={"If-Match": "*"}, expect=200)


@harness.deadline(150)
def test_second_generation(s):
    """A snapshot of a restored sandbox has a parent, which cannot go before it; it restores alone, also after the child of it went"""
    box = s.create()["id"]
    s.run(box, MARK)
    first = snapshot(s, box)["id"]
    child = restore(s, first)["id"]
    s.run(child, "echo second > /work/second; echo more > /dev/shm/more")
    second = snapshot(s, child)
    assert second["parent_id"] == first and second["sandbox_id"] == child, second
    a = s.delete(f"{SNAP}/{first}", expect=409)
    assert a.code == "has_children" and "1" in a.json["detail"], a
    grand = restore(s, second["id"])
    marked(s, grand["id"])
    assert s.run(grand["id"], "cat /work/second /dev/shm/more")["stdout"] == "second\nmore\n"
    assert grand["parent"] == {"sandbox_id": child, "snapshot_id": second["id"]}, grand["parent"]
    third = snapshot(s, grand["id"])
    assert third["parent_id"] == second["id"], third
    drop(s, third["id"], second["id"], first)
    # What runs does not need the files it came from.
    marked(s, grand["id"])
    alone = snapshot(s, grand["id"])
    last = restore(s, alone["id"])["id"]
    marked(s, last)
    assert s.run(last, "cat /work/second /dev/shm/more")["stdout"] == "second\nmore\n"
    end(s, box, child, grand["id"], last)
    drop(s, alone["id"])


@harness.deadline(120)
def test_expires(s):
    """A snapshot whose time is over is deleted by the server, with an audit entry; its files are gone"""
    box = s.create()["id"]
    a = snapshot(s, box, retention={"expires_in_seconds": 1})
    assert not a["retention"]["keep"] and a["retention"]["expires_at"], a
    got = harness.until(lambda: (x := s.get(f"{SNAP}/{a['id']}").json)["state"] == "deleted" and x, 20, "it expires")
    assert got["state_reason"] == "expired", got
    harness.until(lambda: not os.path.exists(os.path.join(s.state, "snapshots", a["id"])), 10, "its files are gone")

    def entries():
        found, seq, items = [], 0, [None] * 500
        while len(items) == 500:  # every look is an entry itself
            items = s.get(f"/v1/audit?limit=500&after_seq={seq}").json["items"]
            found += [i for i in items if i["operation"] == "snapshot.delete"]
            seq = items[-1]["seq"]
        return found
    mine = harness.until(lambda: [e for e in entries() if e["token_id"] is None and e["outcome"] == "succeeded"], 10, "its audit entry")
    assert len(mine) == 1, mine
    assert s.post(BOX, {"snapshot_id": a["id"], "lifecycle": LIFE}, expect=409).code == "snapshot_deleted"
    end(s, box)


@harness.deadline(120)
def test_delete_while_snapshotting(s):
    """Delete wins over a snapshot that waits for a frozen guest: 409 deleted, nothing half made"""
    box = s.create()["id"]
    os.kill(harness.qemu_pid(box), signal.SIGSTOP)
    t, answers = aside(s.post, f"{BOX}/{box}/snapshots", KEEP)
    harness.until(lambda: [j for j in s.get(f"/v1/jobs?sandbox_id={box}").json["items"] if j["state"] == "running" and "snapshot" in j["kind"]],
                  10, "the snapshot has begun")
    report = s.delete(f"{BOX}/{box}", expect=200).json
    t.join(30)
    assert not report["failed"], report
    assert answers[0].status == 409 and answers[0].code == "deleted", answers[0]
    assert s.get(f"{SNAP}?sandbox_id={box}").json["items"] == [] and not hidden(s)
    harness.until(lambda: not harness.vm_pids([box]), 5, "QEMU is gone")
    harness.until(lambda: jobs_ended(s), 10, "every job ends")


@harness.deadline(120)
def test_delete_while_restoring(s):
    """Delete wins while a snapshot is restored; its create answers 409 deleted. A deleted child ends alone"""
    before = live(s)
    box = s.create()["id"]
    snap = snapshot(s, box)["id"]
    t, answers = aside(s.post, BOX, {"snapshot_id": snap, "lifecycle": LIFE})
    other = harness.until(lambda: list(live(s) - before - {box}), 20, "the restore has begun")[0]
    s.delete(f"{BOX}/{other}", expect=200)
    t.join(60)
    assert answers[0].status == 201 or (answers[0].status == 409 and answers[0].code == "deleted"), answers[0]
    assert s.get(f"{BOX}/{other}").json["state"] == "destroyed"
    harness.until(lambda: not harness.vm_pids([other]), 5, "QEMU is gone")
    t, answers = aside(s.post, f"{BOX}/{box}/fork", {"count": 2})
    kid = harness.until(lambda: list(live(s) - before - {box}), 20, "the fork has begun")[0]
    s.delete(f"{BOX}/{kid}", expect=200)
    t.join(60)
    left = live(s) - before
    if answers[0].status == 201:
        assert left == {box} | {i["id"] for i in answers[0].json["items"]} - {kid}, (left, answers[0])
    else:
        assert answers[0].status == 409 and left == {box}, (left, answers[0])
    end(s, *left)
    drop(s, snap)
    harness.until(lambda: jobs_ended(s), 10, "every job ends")


@harness.deadline(120)
def test_snapshot_deleted_while_restored(s):
    """A snapshot that is deleted while a restore reads its files is held by nobody afterwards"""
    def held():
        return [n for n in harness.fd_names(s.process.pid) if f"/snapshots/{snap}/disk.raw" in n]
    before = live(s)
    box = s.create()["id"]
    s.run(box, "head -c 80000000 /dev/urandom > /dev/shm/x; head -c 80000000 /dev/urandom > /work/x; sync", timeout_seconds=120)
    snap = snapshot(s, box)["id"]
    t, answers = aside(s.post, BOX, {"snapshot_id": snap, "lifecycle": LIFE})
    other = harness.until(lambda: list(live(s) - before - {box}), 20, "the restore has begun")[0]
    harness.until(lambda: answers or held(), 30, "it reads the disk")
    drop(s, snap)
    t.join(60)
    if answers[0].status == 201:  # it had the files open
        end(s, other)
    else:
        assert answers[0].status == 409 and "snapshot" in answers[0].kind + (answers[0].code or ""), answers[0]
        end(s, *(live(s) - before - {box}))
    end(s, box)
    harness.until(lambda: not held(), 10, f"nothing of the snapshot is held: {held()}")


@harness.deadline(120)
def test_foreign_snapshot(s):
    """Another tenant's snapshot is the same 404 as none, on every route"""
    box = s.create()["id"]
    snap = snapshot(s, box)["id"]
    scopes = ["sandbox:read", "sandbox:write", "command:run", "files:read", "audit:read"]
    other = s.post("/v1/tokens", {"name": "foreign", "tenant": "foreign", "scopes": scopes}, expect=201).json["token"]

    def plain(a):
        headers = sorted((k, v) for k, v in a.headers.items() if k.lower() not in ("date", "x-request-id"))
        return a.status, headers, a.body.decode().replace(a.json["request_id"], "ID")
    for method, path, body in (("GET", "", None), ("GET", "/compat", None), ("DELETE", "", None),
                               ("POST", "/fork", {"count": 1, "lifecycle": LIFE})):
        got = [s.req(method, f"{SNAP}/{i}{path}", body, token=other) for i in (snap, "snp" + "0" * 26, "nonsense")]
        assert got[0].status == 404 and plain(got[0]) == plain(got[1]) == plain(got[2]), (method, path, got)
    got = [s.post(BOX, {"snapshot_id": i, "lifecycle": LIFE}, token=other, expect=404) for i in (snap, "snp" + "0" * 26)]
    assert plain(got[0]) == plain(got[1]), got
    got = [s.req(m, f"{BOX}/{i}/{v}", b, token=other, expect=404) for i in (box, "sbx" + "0" * 26)
           for m, v, b in (("POST", "pause", None), ("POST", "resume", None), ("POST", "cold", None), ("POST", "fork", {"count": 1}),
                           ("POST", "snapshots", KEEP), ("GET", "memory", None))]
    for one, two in zip(got[:6], got[6:]):
        assert plain(one) == plain(two), (one, two)
    assert s.get(SNAP, token=other).json["items"] == [] and s.get(f"{SNAP}?sandbox_id={box}", token=other).json["items"] == []
    reader = s.post("/v1/tokens", {"name": "reader", "scopes": ["sandbox:read"]}, expect=201).json["token"]
    for path, body in ((f"{BOX}/{box}/snapshots", KEEP), (f"{BOX}/{box}/fork", {"count": 1}), (f"{BOX}/{box}/pause", None)):
        assert s.post(path, body, token=reader, expect=403).code == "scope_missing"
    s.get(f"{SNAP}/{snap}", token=reader, expect=200)
    end(s, box)
    drop(s, snap)


# Writes pass after pass over 600 blocks, past the page cache and in order: at every moment the first ones are of this pass and
# the rest of the one before.
WRITER = """
import mmap, os
with open('/work/pid', 'w') as f:
    f.write(str(os.getpid()))
fd = os.open('/work/blocks', os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o644)
block = mmap.mmap(-1, 4096)
n = 0
while True:
    n += 1
    block[:] = n.to_bytes(4, 'big') * 1024
    for i in range(600):
        os.pwrite(fd, block, 4096 * i)
    if n == 1:
        os.close(os.open('/work/begun', os.O_CREAT | os.O_WRONLY))
"""
CHECK = """
import mmap, os
fd = os.open('/work/blocks', os.O_RDONLY | os.O_DIRECT)
block = mmap.mmap(-1, 4096)
seen = []
for i in range(600):
    assert os.preadv(fd, [block], 4096 * i) == 4096
    words = {block[k:k + 4] for k in range(0, 4096, 4)}
    assert len(words) == 1, f'block {i} is torn'
    seen.append(int.from_bytes(words.pop(), 'big'))
assert seen == sorted(seen, reverse=True) and seen[0] - seen[-1] <= 1, [n for n, m in zip(seen, seen[1:]) if n != m] + seen[-1:]
"""


@harness.deadline(150)
def test_disk_of_the_moment(s):
    """A disk that is written all the time: snapshot and fork have it as it was at one moment, and their commands go on from there"""
    box = s.create()["id"]
    s.run(box, "head -c 10000000 /dev/urandom > /work/big; sha256sum /work/big > /work/sum; sync", timeout_seconds=60)
    for name, text in (("writer.py", WRITER), ("check.py", CHECK)):
        s.put(s.file(box, f"/work/{name}"), text.encode(), expect=201)
    c = s.background(box, ["python3", "/work/writer.py"], timeout_seconds=600)
    harness.until(lambda: s.run(box, "test -e /work/begun")["exit_code"] == 0, 30, "the first pass is over")
    made, snaps = [fork(s, box, 1)["items"][0]["id"]], []
    for _ in range(2):
        snaps.append(snapshot(s, box)["id"])
        made.append(restore(s, snaps[-1])["id"])
        for one in made:  # each writes on, from its own place
            r = s.run(one, "kill -STOP $(cat /work/pid); python3 /work/check.py && sha256sum -c --quiet /work/sum")
            assert r["exit_code"] == 0, (one, r)
        end(s, *made)
        made = []
    assert s.get(f"{BOX}/{box}/commands/{c}").json["state"] == "running"
    end(s, box)
    drop(s, *snaps)
    assert not hidden(s)


@harness.deadline(120)
def test_guest_disk_full(s):
    """A guest whose disk is full is not saved: 409 guest_disk_full; it goes on, and is saved when there is room"""
    box = s.create(resources={"vcpus": 1, "memory_mib": 256, "disk_mib": 64})["id"]
    s.run(box, "dd if=/dev/zero of=/work/fill bs=1M 2>/dev/null; sync", user="root")
    for path, body in (("snapshots", KEEP), ("fork", {"count": 1})):
        a = s.post(f"{BOX}/{box}/{path}", body, expect=409)
        assert a.code == "guest_disk_full", a
    # Its own disk stays where it is: a full one is no reason to keep it awake.
    assert s.post(f"{BOX}/{box}/cold", expect=200).json["state"] == "cold"
    assert s.post(f"{BOX}/{box}/resume", expect=200).json["state"] == "running"
    assert s.get(f"{BOX}/{box}").json["state"] == "running"
    assert s.run(box, "rm /work/fill", user="root")["exit_code"] == 0
    drop(s, snapshot(s, box)["id"])
    end(s, box)
    assert not hidden(s)


@harness.deadline(90)
def test_erased_has_its_room_back(s):
    """What continues from a deleted snapshot, or from a live fork's moment, holds no file of it open; it and its own go on"""
    box = s.create()["id"]
    s.run(box, "head -c 5000000 /dev/urandom > /work/big; sync; sha256sum /work/big > /work/sum")
    snap = snapshot(s, box)["id"]
    kid = restore(s, snap)["id"]
    twin = fork(s, box, 1)["items"][0]["id"]
    drop(s, snap)

    def held():
        return [n for n in harness.fd_names(s.process.pid) if n.endswith("(deleted)") and "/snapshots/" in n or f"{s.state}/#" in n]
    harness.until(lambda: not held(), 10, f"no file of it is held: {held()}")
    later = snapshot(s, kid)["id"]
    s.post(f"{BOX}/{kid}/cold", expect=200)
    s.post(f"{BOX}/{kid}/resume", expect=200)
    more = [restore(s, later)["id"], *(b["id"] for b in fork(s, twin, 2)["items"])]
    for one in (kid, twin, *more):
        s.run(one, "sha256sum -c --quiet /work/sum", check=True)
    end(s, box, kid, twin, *more)
    drop(s, later)


@harness.deadline(60)
def test_snapshot_that_cannot_be_erased(s):
    """A delete of a snapshot that leaves something is a cleanup_failed with its report, and can be tried again"""
    box = s.create()["id"]
    snap = snapshot(s, box)["id"]
    inside = os.path.join(s.state, "snapshots", snap, "in-the-way")
    os.mkdir(inside)
    if subprocess.run(["mount", "-t", "tmpfs", "none", inside], capture_output=True).returncode != 0:
        raise harness.Skip("mounting is not allowed here")
    try:
        a = s.delete(f"{SNAP}/{snap}", expect=500)
        assert a.kind == "cleanup_failed" and a.json["report"]["failed"] and a.json["report"]["snapshot_id"] == snap, a
    finally:
        subprocess.run(["umount", inside], check=True)
    report = s.delete(f"{SNAP}/{snap}", expect=200).json
    assert report["state"] == "deleted" and not report["failed"], report
    assert snap not in os.listdir(os.path.join(s.state, "snapshots"))
    end(s, box)


@harness.deadline(120)
def test_mute_agent(s):
    """A guest that does not answer is not saved: 504 agent_freeze for snapshot, cold and fork; it goes on when it answers again"""
    before = live(s)
    box = s.create()["id"]
    c = s.background(box, COUNT, timeout_seconds=600)
    goes_on(s, box, c)
    pid = harness.qemu_pid(box)
    os.kill(pid, signal.SIGSTOP)
    try:
        for path, body in (("snapshots", KEEP), ("cold", None), ("fork", {"count": 2})):
            a = s.post(f"{BOX}/{box}/{path}", body, expect=504)
            assert a.code == "agent_freeze", a
    finally:
        os.kill(pid, signal.SIGCONT)
    assert s.get(f"{BOX}/{box}").json["state"] == "running"
    assert s.run(box, ["true"])["exit_code"] == 0
    goes_on(s, box, c)
    assert live(s) - before == {box}
    assert not hidden(s) and s.get(f"{SNAP}?sandbox_id={box}").json["items"] == []
    snap = snapshot(s, box)["id"]
    other = restore(s, snap)["id"]
    assert s.run(other, ["true"])["exit_code"] == 0
    end(s, box, other)
    drop(s, snap)


if __name__ == "__main__":
    harness.main()
