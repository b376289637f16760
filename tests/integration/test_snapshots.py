"""Pause, cold, snapshots, restores, forks: what goes on without a gap, what is fresh, what is refused, what is left."""
import http.client
import os
import select
import signal
import subprocess
import threading
import time

import harness

BOX = "/v1/sandboxes"
SNAP = "/v1/snapshots"
LIFE = {"ttl_seconds": 1800, "on_expiry": "destroy"}
KEEP = {"retention": {"keep": True}}
COUNT = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done"
# A pattern in the guest's memory, a file on its disk, and their digest.
MARK = "head -c 3000000 /dev/urandom > /dev/shm/x; head -c 300000 /dev/urandom > /work/x; sha256sum /dev/shm/x /work/x > /work/sums"
WHO = ("cat /etc/machine-id; cat /proc/sys/kernel/random/boot_id; hostname; head -c 32 /dev/urandom | sha256sum; "
       "cat /proc/sys/kernel/random/uuid")
WHO_WORDS = ("machine_id", "boot_id", "hostname", "urandom", "uuid")


def snapshot(s, box, expect=201, headers=None, **fields):
    return s.post(f"{BOX}/{box}/snapshots", {**KEEP, **fields}, expect=expect, headers=headers).json


def restore(s, snap, expect=201, **fields):
    return s.post(BOX, {"snapshot_id": snap, "lifecycle": LIFE, **fields}, expect=expect).json


def fork(s, box, count, expect=201, headers=None, **fields):
    return s.post(f"{BOX}/{box}/fork", {"count": count, **fields}, expect=expect, headers=headers).json


def end(s, *boxes):
    for box in boxes:
        s.delete(f"{BOX}/{box}", expect=200)


def drop(s, *snaps):
    for snap in snaps:
        s.delete(f"{SNAP}/{snap}", expect=200)


def who(s, box):
    words = dict(zip(WHO_WORDS, s.run(box, WHO)["stdout"].replace("  -", "").split("\n")))
    assert all(words.values()) and len(words) == len(WHO_WORDS), words
    return words


def differ(*all_of_them):
    """Every word of every one differs from that of every other."""
    for word in WHO_WORDS:
        got = [w[word] for w in all_of_them]
        assert len(set(got)) == len(got), f"{word} twice: {got}"


def unique(box):
    """The agent's evidence that it is one of its own."""
    u = box["uniqueness"]
    assert u and all(u[k] for k in ("entropy", "clock", "hostname", "machine_id", "boot_id")), u
    assert abs(u["clock_offset_ms"]) <= 2000, u
    return u["generation"]


def marked(s, box):
    r = s.run(box, "sha256sum -c --quiet /work/sums")
    assert r["exit_code"] == 0, r


def lines(s, box, command):
    """The counter's output so far: every number once, in order. Returns how many."""
    whole = s.output(box, command).rsplit(b"\n", 1)[0]
    got = [int(x) for x in whole.split(b"\n")] if whole else []
    wrong = next((i for i, n in enumerate(got) if n != i + 1), None)
    assert wrong is None, f"after {got[max(0, wrong - 2):wrong]} comes {got[wrong:wrong + 3]}"
    return len(got)


def goes_on(s, box, command):
    """The counter prints more than it had."""
    before = lines(s, box, command)
    harness.until(lambda: lines(s, box, command) > before + 2, 20, f"{command} goes on")


def hidden(s):
    """What a cut or failed operation would leave."""
    found = [f for f in os.listdir(os.path.join(s.state, "snapshots")) if f.startswith(".")]
    for box in os.listdir(os.path.join(s.state, "sandboxes")):
        try:
            found += [f"{box}/{f}" for f in os.listdir(os.path.join(s.state, "sandboxes", box)) if f.startswith(".")]
        except (NotADirectoryError, FileNotFoundError):
            pass
    return found


def live(s):
    return {i["id"] for i in s.get(f"{BOX}?limit=500").json["items"]}


def jobs_ended(s):
    kept = ("command.run", "command.continue")
    return not [j for j in s.get("/v1/jobs?limit=500").json["items"] if j["state"] in ("queued", "running") and j["kind"] not in kept]


def aside(fn, *args, **kw):
    """Runs a call beside; returns (thread, answers)."""
    answers = []

    def work():
        try:
            answers.append(fn(*args, **kw))
        except (ConnectionError, http.client.HTTPException, OSError) as e:
            answers.append(e)
    t = threading.Thread(target=work)
    t.start()
    return t, answers


def after(seconds):
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        select.select([], [], [], left)


# ---- pause ------------------------------------------------------------------------------------------------------------
def test_pause_resume(s):
    """pause and resume: idempotent, commands refused meanwhile, the clock is right after it, a command goes on"""
    box = s.create()["id"]
    c = s.background(box, COUNT, timeout_seconds=600)
    goes_on(s, box, c)
    a = s.post(f"{BOX}/{box}/pause", expect=200).json
    assert a["state"] == "paused", a
    assert s.post(f"{BOX}/{box}/pause", expect=200).json["generation"] == a["generation"]
    r = s.post(f"{BOX}/{box}/commands", {"argv": ["true"]}, expect=409)
    assert r.code == "sandbox_not_running", r
    assert s.get(s.file(box, "/etc/hostname"), expect=409).code == "sandbox_not_running"
    had = lines(s, box, c)
    after(3.5)  # what the guest's clock would be behind by
    assert lines(s, box, c) <= had + 2, "it ran while it was paused"
    a = s.post(f"{BOX}/{box}/resume", expect=200).json
    assert a["state"] == "running", a
    before = time.time()
    guest = float(s.run(box, ["date", "+%s.%N"])["stdout"])
    assert before - 2 <= guest <= time.time() + 2, f"the guest's clock is {guest - before:.1f} s off"
    assert s.post(f"{BOX}/{box}/resume", expect=200).json["generation"] == a["generation"]
    goes_on(s, box, c)
    end(s, box)


def test_verbs_from_wrong_states(s):
    """pause, resume, cold, fork and snapshot of a stopped or destroyed sandbox are 409 with a word"""
    box = s.create()["id"]
    s.post(f"{BOX}/{box}/stop", expect=200)
    for verb, code in (("pause", "not_pausable"), ("resume", "not_resumable"), ("cold", "not_coolable")):
        assert s.post(f"{BOX}/{box}/{verb}", expect=409).code == code, verb
    assert s.post(f"{BOX}/{box}/fork", {"count": 1}, expect=409).code == "sandbox_not_running"
    assert s.post(f"{BOX}/{box}/snapshots", KEEP, expect=409).code == "sandbox_not_running"
    assert s.get(f"{BOX}/{box}/memory").status == 409
    end(s, box)
    for verb in ("pause", "resume", "cold"):
        s.post(f"{BOX}/{box}/{verb}", expect=409)
    s.post(f"{BOX}/{box}/fork", {"count": 1}, expect=409)
    s.post(f"{BOX}/{box}/snapshots", KEEP, expect=409)


# ---- snapshots --------------------------------------------------------------------------------------------------------
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


# ---- forks ------------------------------------------------------------------------------------------------------------
@harness.deadline(150)
def test_fork(s):
    """Three forks of a running sandbox: same memory, writes of their own, nothing equal that must differ, commands go on"""
    box = s.create(lifecycle={"ttl_seconds": 900, "on_expiry": "stop"}, labels={"team": "x"})["id"]
    s.run(box, MARK)
    c = s.background(box, COUNT, timeout_seconds=600)
    goes_on(s, box, c)
    at = lines(s, box, c)
    a = fork(s, box, 3)
    kids = a["items"]
    assert len({k["id"] for k in kids} | {box}) == 4
    for k in kids:
        assert k["state"] == "running" and k["backend"]["boot_path"] == "fork", k
        assert k["parent"] == {"sandbox_id": box, "snapshot_id": None} and k["name"] is None, k
        assert k["lifecycle"]["ttl_seconds"] == 900 and k["lifecycle"]["on_expiry"] == "stop", k["lifecycle"]
        marked(s, k["id"])
    assert len({unique(k) for k in kids}) == 3
    differ(who(s, box), *[who(s, k["id"]) for k in kids])
    for n, k in enumerate(kids):
        s.run(k["id"], f"echo {n} > /work/mine; echo {n} > /dev/shm/mine")
    s.run(box, "echo source > /work/mine")
    for n, k in enumerate(kids):
        assert s.run(k["id"], "cat /work/mine /dev/shm/mine")["stdout"] == f"{n}\n{n}\n"
    assert s.run(box, "cat /work/mine; ls /dev/shm")["stdout"] == "source\nx\n"
    receipts = {s.get(f"{BOX}/{box}/commands/{c}").json["receipt_id"]}
    for k in kids:
        [mine] = [x for x in s.get(f"{BOX}/{k['id']}/commands").json["items"] if x["state"] == "running"]
        assert mine["command_id"] != c and mine["state"] == "running", mine
        goes_on(s, k["id"], mine["command_id"])
        assert lines(s, k["id"], mine["command_id"]) > at
        receipts.add(mine["receipt_id"])
    assert len(receipts) == 4, receipts
    goes_on(s, box, c)
    end(s, box)
    for k in kids:
        marked(s, k["id"])
    end(s, *[k["id"] for k in kids])


@harness.deadline(120)
def test_fork_of_snapshot(s):
    """A snapshot is restored several times at once; lifecycle is required"""
    box = s.create()["id"]
    s.run(box, MARK)
    snap = snapshot(s, box)["id"]
    a = s.post(f"{SNAP}/{snap}/fork", {"count": 2}, expect=422)
    assert "/lifecycle" in [e["pointer"] for e in a.json["errors"]], a
    kids = s.post(f"{SNAP}/{snap}/fork", {"count": 2, "lifecycle": LIFE}, expect=201).json["items"]
    for k in kids:
        assert k["parent"] == {"sandbox_id": box, "snapshot_id": snap}, k["parent"]
        marked(s, k["id"])
    assert len({unique(k) for k in kids}) == 2
    differ(who(s, box), *[who(s, k["id"]) for k in kids])
    end(s, box, *[k["id"] for k in kids])
    drop(s, snap)


@harness.deadline(150)
def test_fork_limits():
    """A fork that does not fit the quota (429) or the memory budget (503) leaves nothing; the remedy says what would have to end"""
    s = harness.Server("test_snapshots-limits", args=["--max-sandboxes-per-tenant", "3", "--memory-budget-mib", "1400"]).start()
    try:
        def untouched(box):
            assert [i["id"] for i in s.get(BOX).json["items"]] == [box]
            harness.until(lambda: jobs_ended(s), 10, "every job ends")
            boxes = {n for n in os.listdir(os.path.join(s.state, "sandboxes")) if n.startswith("sbx")} - gone
            assert boxes == {box}, boxes
            harness.until(lambda: set(harness.vm_pids(s.sandbox_ids())) == set(harness.vm_pids([box])), 60, "no QEMU beside its own")
        gone = set()  # their logs and output are kept
        small = {"vcpus": 1, "memory_mib": 128, "disk_mib": 64}
        box = s.create(resources=small)["id"]
        a = s.post(f"{BOX}/{box}/fork", {"count": 3}, expect=429)
        assert a.code == "quota_exceeded", a
        untouched(box)
        kids = [k["id"] for k in fork(s, box, 2)["items"]]
        assert s.post(f"{BOX}/{box}/fork", {"count": 1}, expect=429).code == "quota_exceeded"
        end(s, box, *kids)
        gone = {box, *kids}
        box = s.create(resources={"vcpus": 1, "memory_mib": 512, "disk_mib": 64})["id"]
        a = s.post(f"{BOX}/{box}/fork", {"count": 2}, expect=503)
        assert a.code == "memory_budget" and "MiB" in a.json["remedy"], a
        untouched(box)
        worth = int("".join(ch for ch in a.json["remedy"].split("MiB")[0] if ch.isdigit()))
        assert 0 < worth < 1400, a.json["remedy"]
        assert s.run(box, ["true"])["exit_code"] == 0
        end(s, box)
        left = fork_after = s.create(resources=small)["id"]  # what was promised to the fork is free again
        kids = [k["id"] for k in fork(s, fork_after, 2)["items"]]
        end(s, left, *kids)
    finally:
        s.close()


# ---- cold -------------------------------------------------------------------------------------------------------------
@harness.deadline(120)
def test_cold(s):
    """cold: files in place, no QEMU, idempotent, nothing wakes it; resume brings memory, commands and its own machine id back"""
    box = s.create()["id"]
    s.run(box, MARK)
    was = who(s, box)
    c = s.background(box, COUNT, timeout_seconds=600)
    goes_on(s, box, c)
    a = s.post(f"{BOX}/{box}/cold", expect=200).json
    assert a["state"] == "cold" and not harness.vm_pids([box]), a
    kept = os.path.join(s.state, "sandboxes", box, "cold")
    assert {"manifest.json", "state", "memory"} <= set(os.listdir(kept)), os.listdir(kept)
    assert s.post(f"{BOX}/{box}/cold", expect=200).json["generation"] == a["generation"]
    assert s.post(f"{BOX}/{box}/commands", {"argv": ["true"]}, expect=409).code == "sandbox_not_running"
    s.post(f"{BOX}/{box}/pause", expect=409)
    s.post(f"{BOX}/{box}/snapshots", KEEP, expect=409)
    assert s.get(f"{BOX}/{box}/memory").status == 409
    assert s.get(f"{BOX}/{box}/commands/{c}").json["state"] == "running"
    lines(s, box, c)
    after(2.5)
    a = s.post(f"{BOX}/{box}/resume", expect=200).json
    assert a["state"] == "running" and a["uniqueness"]["entropy"] and a["uniqueness"]["clock"], a
    assert not os.path.exists(kept), "the memory of before is still there"
    guest, now = float(s.run(box, ["date", "+%s.%N"])["stdout"]), time.time()
    assert abs(guest - now) < 2, guest - now
    marked(s, box)
    goes_on(s, box, c)
    now = who(s, box)
    assert [now[k] for k in ("machine_id", "hostname")] == [was[k] for k in ("machine_id", "hostname")], (was, now)
    assert now["boot_id"] != was["boot_id"] and now["urandom"] != was["urandom"], (was, now)
    for _ in range(2):  # from the second time on it is a delta to what it was
        s.post(f"{BOX}/{box}/cold", expect=200)
        s.post(f"{BOX}/{box}/resume", expect=200)
        marked(s, box)
    goes_on(s, box, c)
    other = restore(s, snapshot(s, box)["id"])["id"]
    marked(s, other)
    end(s, box, other)
    assert not hidden(s)


@harness.deadline(120)
def test_one_command_through_all(s):
    """One command's output has no gap and no byte twice over pause, snapshot, fork and cold"""
    box = s.create()["id"]
    c = s.background(box, "n=0; while [ $n -lt 3000 ]; do n=$((n+1)); echo $n; [ $((n%100)) -eq 0 ] && sleep 0.1; done",
                     timeout_seconds=600)
    for _ in range(2):
        s.post(f"{BOX}/{box}/pause", expect=200)
        s.post(f"{BOX}/{box}/resume", expect=200)
        drop(s, snapshot(s, box)["id"])
        end(s, fork(s, box, 1)["items"][0]["id"])
        s.post(f"{BOX}/{box}/cold", expect=200)
        s.post(f"{BOX}/{box}/resume", expect=200)
    r = s.wait(box, c, 60)
    assert r["outcome"] == "exited" and r["exit_code"] == 0, r
    assert lines(s, box, c) == 3000
    end(s, box)


@harness.deadline(120)
def test_ttl_cold(s):
    """A ttl that passes puts it into cold state where that was asked for; it can be resumed with a new ttl"""
    box = s.create(lifecycle={"ttl_seconds": 4, "on_expiry": "cold"})["id"]
    s.run(box, MARK)
    a = s.reach(box, "cold", 40)
    assert a["state_reason"] == "expired", a
    harness.until(lambda: not harness.vm_pids([box]), 10, "QEMU is gone")
    s.patch(f"{BOX}/{box}", {"ttl_seconds": 900}, expect=200)
    s.post(f"{BOX}/{box}/resume", expect=200)
    marked(s, box)
    assert s.get(f"{BOX}/{box}").json["state_reason"] is None
    end(s, box)


# ---- deletes that race ------------------------------------------------------------------------------------------------
def test_delete_while_cold(s):
    """Deleting a cold sandbox erases its memory and disk"""
    box = s.create()["id"]
    s.post(f"{BOX}/{box}/cold", expect=200)
    report = s.delete(f"{BOX}/{box}", expect=200).json
    assert not report["failed"] and sum(e["bytes"] for e in report["erased"]) > 0, report
    assert not os.path.exists(os.path.join(s.state, "sandboxes", box, "cold"))
    assert not os.path.exists(os.path.join(s.state, "sandboxes", box, "disk.raw"))
    s.post(f"{BOX}/{box}/resume", expect=409)


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


@harness.deadline(150)
def test_delete_while_forking(s):
    """Deleting the source while its fork runs: all children or none, never a part"""
    for moment in ("freeze", "children"):
        before = live(s)
        box = s.create()["id"]
        if moment == "freeze":
            os.kill(harness.qemu_pid(box), signal.SIGSTOP)
        t, answers = aside(s.post, f"{BOX}/{box}/fork", {"count": 2})
        harness.until(lambda: len(live(s) - before - {box}) == 2 or answers, 20, "children are begun")
        s.delete(f"{BOX}/{box}", expect=200)
        t.join(60)
        left = live(s) - before
        if moment == "freeze" or answers[0].status == 409:
            assert answers[0].status == 409 and answers[0].code == "deleted", (moment, answers)
            assert not left, (moment, left)
        else:
            assert answers[0].status == 201, (moment, answers)
            assert left == {i["id"] for i in answers[0].json["items"]}, (moment, left)
            for i in left:
                assert s.run(i, ["true"])["exit_code"] == 0
        kids = left | {i["id"] for i in s.get(f"{BOX}?state=destroyed&limit=500").json["items"] if (i["parent"] or {}).get("sandbox_id") == box}
        end(s, *left)
        harness.until(lambda: not harness.vm_pids([box, *kids]), 5, "no QEMU is left")
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
def test_fork_disk_reserve():
    """Copies of a disk do not eat the reserve: a fork or restore that would is a 503 disk_full; what fits is made"""
    with harness.small_disk(900) as mount:
        s = harness.Server("test_snapshots-reserve", state=os.path.join(mount, "state"), args=["--disk-reserve-mib", "150"])
        try:
            s.start()
            box = s.create(resources={"vcpus": 1, "memory_mib": 128, "disk_mib": 256})["id"]
            s.run(box, "head -c 120000000 /dev/urandom > /work/x; sync; sha256sum /work/x > /work/sums", timeout_seconds=120)
            harness.until(lambda: jobs_ended(s) and not s.vms("templates"), 60, "the template is made")
            snap = snapshot(s, box)["id"]
            used = os.stat(os.path.join(s.state, "sandboxes", box, "disk.raw")).st_blocks * 512

            def fill(copies, name="fill"):
                """So many copies fit, and no more."""
                v = os.statvfs(mount)
                room = v.f_bavail * v.f_frsize - int((copies + 0.5) * used) - (150 << 20)
                assert room > 0, room
                with open(os.path.join(mount, name), "wb") as f:
                    os.posix_fallocate(f.fileno(), 0, room)

            def refused(path, body):
                before, boxes = os.statvfs(mount).f_bavail, live(s)
                a = s.post(path, body)
                assert a.status == 503 and a.code == "disk_full" and a.json["retryable"], a
                harness.until(lambda: os.statvfs(mount).f_bavail > before - 1024, 10, "nothing is left of it")
                return boxes
            fill(2)
            for path, body in ((f"{BOX}/{box}/fork", {"count": 2}), (f"{SNAP}/{snap}/fork", {"count": 3, "lifecycle": LIFE})):
                assert live(s) == refused(path, body)
            kid = fork(s, box, 1)["items"][0]["id"]
            marked(s, kid)
            v = os.statvfs(mount)
            assert v.f_bavail * v.f_frsize > 150 << 20, "the reserve"
            fill(0, "more")  # the copy of the moment is gone with the fork
            refused(BOX, {"snapshot_id": snap, "lifecycle": LIFE})
            os.unlink(os.path.join(mount, "more"))
            end(s, *(live(s) - {box}))
            marked(s, restore(s, snap)["id"])  # what was promised is given back
            assert s.run(box, ["true"])["exit_code"] == 0
        finally:
            s.close()


@harness.deadline(120)
def test_delete_while_cooling_and_waking(s):
    """Delete wins while a sandbox is put into cold state, and while it comes back"""
    for verb in ("cold", "resume"):
        box = s.create()["id"]
        if verb == "resume":
            s.post(f"{BOX}/{box}/cold", expect=200)
        t, answers = aside(s.post, f"{BOX}/{box}/{verb}")
        harness.until(lambda: answers or [j for j in s.get(f"/v1/jobs?sandbox_id={box}").json["items"] if j["state"] == "running"], 10, "it has begun")
        report = s.delete(f"{BOX}/{box}", expect=200).json
        t.join(60)
        assert not report["failed"], report
        assert answers[0].status == 200 or (answers[0].status == 409 and answers[0].code in ("deleted", "destroyed")), (verb, answers[0])
        assert s.get(f"{BOX}/{box}").json["state"] == "destroyed"
        harness.until(lambda: not harness.vm_pids([box]), 5, "QEMU is gone")
        folder = os.path.join(s.state, "sandboxes", box)
        left = os.listdir(folder) if os.path.isdir(folder) else []
        assert not {"cold", ".cold", "disk.raw"} & set(left), left


# ---- who and what refuses ---------------------------------------------------------------------------------------------
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
def test_asynchronous(s):
    """`Prefer: respond-async` on a snapshot and on both kinds of fork: 202, and the job says what was made"""
    later = {"Prefer": "respond-async"}

    def done(path, body):
        a = s.req("POST", path, body, headers=later, expect=202)
        job = a.json["id"]
        harness.until(lambda: s.get(f"/v1/jobs/{job}", expect=200).json["state"] not in ("queued", "running"), 40, "the job's end")
        j = s.get(f"/v1/jobs/{job}", expect=200).json
        assert j["state"] == "succeeded" and j["result"]["status"] == 201, j
        assert [x["name"] for x in j["stages"]] == ["capture", "launch" if "fork" in path else "write"], j["stages"]
        return j["result"]
    box = s.create()["id"]
    r = done(f"{BOX}/{box}/snapshots", KEEP)
    snap = s.get(r["href"], expect=200).json
    assert snap["sandbox_id"] == box and r["href"].startswith(SNAP), r
    for path, n in ((f"{BOX}/{box}/fork", 2), (f"{SNAP}/{snap['id']}/fork", 1)):
        r = done(path, {"count": n, "lifecycle": LIFE})
        assert len(r["sandbox_ids"]) == n and r["href"] == f"{BOX}/{r['sandbox_ids'][0]}", r
        for kid in r["sandbox_ids"]:
            assert s.run(kid, ["true"])["exit_code"] == 0
            s.delete(f"{BOX}/{kid}", expect=200)
    s.delete(f"{BOX}/{box}", expect=200)
    s.delete(f"{SNAP}/{snap['id']}", expect=200)


@harness.deadline(60)
def test_if_match(s):
    """If-Match holds for snapshot and fork, and when a verb's turn comes: of two at once one is done"""
    box = s.create()["id"]

    def tag():
        return s.get(f"{BOX}/{box}", expect=200).headers["ETag"]
    old = {"If-Match": '"999"'}
    s.req("POST", f"{BOX}/{box}/fork", {"count": 1}, headers=old, expect=412)
    s.req("POST", f"{BOX}/{box}/snapshots", {**KEEP, "stop": True}, headers=old, expect=412)
    snap = snapshot(s, box)["id"]
    s.req("POST", f"{SNAP}/{snap}/fork", {"count": 1, "lifecycle": LIFE}, headers=old, expect=412)
    for none in ('"0"', '"999"'):
        s.req("PATCH", f"{BOX}/{box}", {"labels": {"a": "b"}}, headers={"If-Match": none}, expect=412)
        s.req("DELETE", f"{SNAP}/{snap}", headers={"If-Match": none}, expect=412)
        s.req("DELETE", f"{BOX}/{box}", headers={"If-Match": none}, expect=412)
    drop(s, snap)
    assert s.get(f"{BOX}/{box}").json["state"] == "running"
    now = {"If-Match": tag()}
    kids = s.req("POST", f"{BOX}/{box}/fork", {"count": 1}, headers=now, expect=201).json["items"]
    for _ in range(3):
        now = {"If-Match": tag()}
        both = [aside(s.req, "POST", f"{BOX}/{box}/{v}", headers=now) for v in ("pause", "cold")]
        codes = sorted([t.join(), got[0].status][1] for t, got in both)
        assert codes == [200, 412], codes
        s.req("POST", f"{BOX}/{box}/resume", expect=200)
    s.delete(f"{BOX}/{box}", expect=200)
    s.delete(f"{BOX}/{kids[0]['id']}", expect=200)


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
def test_cold_that_cannot_be_erased(s):
    """A delete of a cold sandbox that leaves something is a cleanup_failed with its report, its job ends, and it can be tried again"""
    box = s.create()["id"]
    s.post(f"{BOX}/{box}/cold", expect=200)
    inside = os.path.join(s.state, "sandboxes", box, "cold", "in-the-way")
    os.mkdir(inside)
    if subprocess.run(["mount", "-t", "tmpfs", "none", inside], capture_output=True).returncode != 0:
        raise harness.Skip("mounting is not allowed here")
    try:
        a = s.delete(f"{BOX}/{box}", expect=500)
        assert a.kind == "cleanup_failed" and a.json["report"]["failed"], a
        assert s.get(f"{BOX}/{box}").json["state"] == "failed"
    finally:
        subprocess.run(["umount", inside], check=True)
    report = s.delete(f"{BOX}/{box}", expect=200).json
    assert report["state"] == "destroyed" and not report["failed"], report
    jobs_ended(s)


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


@harness.deadline(60)
def test_ttl_of_cold(s):
    """The ttl runs on in cold state: with `stop` the memory goes and the disk stays"""
    box = s.create(lifecycle={"ttl_seconds": 600, "on_expiry": "stop"})["id"]
    s.run(box, "echo kept > /work/x; sync", check=True)
    c = s.background(box, COUNT, timeout_seconds=600)
    s.post(f"{BOX}/{box}/cold", expect=200)
    s.req("PATCH", f"{BOX}/{box}", {"lifecycle": {"ttl_seconds": 1}}, expect=200)
    harness.until(lambda: s.get(f"{BOX}/{box}").json["state"] == "stopped", 15, "its expiry")
    assert s.get(f"{BOX}/{box}").json["state_reason"] == "expired"
    harness.until(lambda: not os.path.exists(os.path.join(s.state, "sandboxes", box, "cold")), 10, "its memory's end")
    assert s.wait(box, c, 10)["outcome"] == "killed"
    s.req("PATCH", f"{BOX}/{box}", {"lifecycle": {"ttl_seconds": 600}}, expect=200)
    s.post(f"{BOX}/{box}/start", expect=200)
    assert s.run(box, "cat /work/x")["stdout"] == "kept\n"
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
