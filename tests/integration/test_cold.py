"""Pause and cold state: what goes on without a gap, what is refused, what is left."""
import os
import subprocess
import time

import harness
from saved import (BOX, COUNT, KEEP, MARK, after, aside, drop, end, fork, goes_on, hidden, jobs_ended, lines, marked,
                   restore, snapshot, who)


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


if __name__ == "__main__":
    harness.main()
