"""Forks: what is fresh, what goes on, what is all or none, what is promised."""
import os
import signal

import harness
from saved import (BOX, COUNT, KEEP, LIFE, MARK, SNAP, aside, differ, drop, end, fork, goes_on, jobs_ended, lines, live,
                   marked, restore, snapshot, unique, who)


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


if __name__ == "__main__":
    harness.main()
