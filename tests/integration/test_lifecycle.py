"""Sandboxes from creation to the deletion report: expiry, stop and start, deletes that race, guests and VMs that end."""
import os
import signal
import threading
import time

import harness
import saved

BOX = "/v1/sandboxes"
LIFE = {"ttl_seconds": 1800, "on_expiry": "destroy"}


def collect_events(s, kinds=None):
    return [e for e in s.get("/v1/events?limit=500", expect=200).json["items"] if not kinds or e["kind"] in kinds]


def test_names(s):
    """A name is unique among sandboxes that are not destroyed"""
    a = s.create(name="only-one")
    b = s.post(BOX, {"image": "debian", "name": "only-one", "lifecycle": LIFE}, expect=409)
    assert b.code == "name_taken", b
    s.delete(f"{BOX}/{a['id']}", expect=200)
    c = s.post(BOX, {"image": "debian", "name": "only-one", "lifecycle": LIFE}, headers={"Prefer": "respond-async"}, expect=202)
    s.delete(f"{BOX}/{c.json['sandbox_id']}", expect=200)


def test_list_and_labels(s):
    """Lists filter by label and state, and page"""
    box = s.create(labels={"team": "x", "a": "b"})["id"]
    assert [i["id"] for i in s.get(f"{BOX}?label=team=x", expect=200).json["items"]] == [box]
    assert s.get(f"{BOX}?label=team=y", expect=200).json["items"] == []
    assert box in [i["id"] for i in s.get(f"{BOX}?state=running", expect=200).json["items"]]
    s.patch(f"{BOX}/{box}", {"labels": {"team": "y"}}, expect=200)
    assert s.get(f"{BOX}?label=team=x").json["items"] == []
    s.delete(f"{BOX}/{box}", expect=200)
    assert box not in [i["id"] for i in s.get(BOX).json["items"]], "a destroyed sandbox is listed"
    assert box in [i["id"] for i in s.get(f"{BOX}?state=destroyed").json["items"]]


def test_async_create(s):
    """respond-async gives a job, whose stages and end can be followed"""
    a = s.post(BOX, {"image": "debian", "lifecycle": LIFE}, headers={"Prefer": "respond-async"}, expect=202)
    assert a.headers["Location"] == f"/v1/jobs/{a.json['id']}" and a.headers["Preference-Applied"] == "respond-async"
    box = a.json["sandbox_id"]
    s.reach(box, "running", 60)
    job = harness.until(lambda: (j := s.get(f"/v1/jobs/{a.json['id']}").json)["state"] == "succeeded" and j, 10, "the job ends")
    assert [x["name"] for x in job["stages"] if x["name"] != "restore"] == ["prepare", "launch", "agent"], job["stages"]
    s.delete(f"{BOX}/{box}", expect=200)


def test_delete_while_starting(s):
    """Delete wins while the sandbox starts; its create answers 409 deleted"""
    answers = []
    t = threading.Thread(target=lambda: answers.append(s.post(BOX, {"image": "debian", "name": "doomed", "lifecycle": LIFE})))
    t.start()
    box = harness.until(lambda: [i["id"] for i in s.get(f"{BOX}?state=starting").json["items"]], 20, "a starting sandbox")[0]
    report = s.delete(f"{BOX}/{box}", expect=200).json
    t.join(60)
    assert report["state"] == "destroyed" and not report["failed"], report
    assert answers[0].status == 409 and answers[0].code == "deleted", answers[0]
    assert s.get(f"{BOX}/{box}").json["state"] == "destroyed"
    harness.until(lambda: not harness.vm_pids([box]), 5, "QEMU is gone")


@harness.deadline(150)
def test_delete_at_once(s):
    """A sandbox that is seen in the list can be deleted in that moment: it is not there afterwards, whatever its create answered"""
    body = {"image": "debian", "lifecycle": {"ttl_seconds": 600, "on_expiry": "destroy"}}
    mine = lambda: {i["id"] for i in s.get("/v1/sandboxes?limit=500", check=False).json["items"]}  # noqa: E731
    before = mine()
    for _ in range(60):
        t, answers = saved.aside(s.post, "/v1/sandboxes", body)
        listed = set()
        while not listed and not answers:  # without a pause: it is about that moment
            listed = mine() - before
        box = next(iter(listed or mine() - before))
        report = s.delete(f"/v1/sandboxes/{box}", expect=200).json
        t.join(30)
        assert not report["failed"], report
        assert answers[0].status == 201 or answers[0].code == "deleted", answers[0]
        assert s.get(f"/v1/sandboxes/{box}").json["state"] == "destroyed", (report, answers[0])
    assert mine() == before
    harness.until(lambda: not [j for j in s.get("/v1/jobs?limit=200").json["items"] if j["state"] in ("queued", "running")], 20,
                  "every job ends")


def test_delete_twice(s):
    """A second DELETE gives the same report; two at once too"""
    box = s.create()["id"]
    got = []
    threads = [threading.Thread(target=lambda: got.append(s.delete(f"{BOX}/{box}"))) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    got.append(s.delete(f"{BOX}/{box}"))
    assert {a.status for a in got} == {200}, got
    plain = [{k: a.json[k] for k in ("erased", "retained", "failed", "destroyed_at")} for a in got]
    assert all(p == plain[0] for p in plain), plain


def test_after_destroyed(s):
    """A destroyed sandbox refuses what would change it, and stays readable with its logs, commands and output"""
    box = s.create()["id"]
    c = s.run(box, "echo kept")["command_id"]
    s.delete(f"{BOX}/{box}", expect=200)
    a = s.post(f"{BOX}/{box}/commands", {"argv": ["true"]}, expect=409)
    assert a.code == "sandbox_not_running", a
    s.get(s.file(box, "/work/x"), expect=409)
    s.patch(f"{BOX}/{box}", {"ttl_seconds": 60}, expect=409)
    s.post(f"{BOX}/{box}/start", expect=409)
    assert s.output(box, c) == b"kept\n" and s.get(f"{BOX}/{box}/logs", expect=200).json["items"]
    assert s.get(f"{BOX}/{box}/commands/{c}", expect=200).json["stdout"] == "kept\n"


def test_stop_start(s):
    """stop keeps the disk and ends commands as killed; start boots from it; a verb that is there already changes nothing"""
    box = s.create()["id"]
    s.run(box, "echo disk > /work/keep; sync")
    c = s.background(box, ["sleep", "500"])
    s.post(f"{BOX}/{box}/stop", expect=200)
    assert s.get(f"{BOX}/{box}").json["state"] == "stopped"
    assert s.get(f"{BOX}/{box}/commands/{c}").json["outcome"] == "killed"
    assert not harness.vm_pids([box])
    generation = s.get(f"{BOX}/{box}").json["generation"]
    assert s.post(f"{BOX}/{box}/stop", expect=200).json["generation"] == generation
    a = s.post(f"{BOX}/{box}/commands", {"argv": ["true"]}, expect=409)
    assert a.code == "sandbox_not_running", a
    s.post(f"{BOX}/{box}/start", expect=200)
    assert s.run(box, ["cat", "/work/keep"])["stdout"] == "disk\n"
    generation = s.get(f"{BOX}/{box}").json["generation"]
    assert s.post(f"{BOX}/{box}/start", expect=200).json["generation"] == generation
    s.delete(f"{BOX}/{box}", expect=200)


def test_ttl_destroy(s):
    """A ttl that passes destroys"""
    box = s.create(lifecycle={"ttl_seconds": 6, "on_expiry": "destroy"})["id"]
    a = s.reach(box, "destroyed", 40)
    assert a["destroyed_at"], a
    assert not harness.vm_pids([box])


def test_ttl_stop(s):
    """A ttl that passes stops where that was asked for"""
    box = s.create(lifecycle={"ttl_seconds": 6, "on_expiry": "stop"})["id"]
    a = s.reach(box, "stopped", 40)
    assert a["state_reason"] == "expired", a
    s.delete(f"{BOX}/{box}", expect=200)


def test_ttl_renewed(s):
    """A renewed ttl counts from now; both spellings; one that is renewed against its expiry lives or is told that it is late"""
    box = s.create(lifecycle={"ttl_seconds": 8, "on_expiry": "destroy"})["id"]
    a = s.patch(f"{BOX}/{box}", {"ttl_seconds": 900}, expect=200).json
    assert a["lifecycle"]["ttl_seconds"] == 900
    s.patch(f"{BOX}/{box}", {"lifecycle": {"ttl_seconds": 600, "on_expiry": "stop"}}, expect=200)
    s.patch(f"{BOX}/{box}", {"ttl_seconds": 60, "lifecycle": {"ttl_seconds": 60}}, expect=422)
    harness.until(lambda: time.time() > time.mktime(time.strptime(a["created_at"][:19], "%Y-%m-%dT%H:%M:%S")) - time.timezone + 9,
                  20, "the first ttl is over")
    assert s.get(f"{BOX}/{box}").json["state"] == "running"
    late = s.patch(f"{BOX}/{box}", {"ttl_seconds": 1}, expect=200)
    assert late.json["lifecycle"]["on_expiry"] == "stop"
    for _ in range(200):
        a = s.patch(f"{BOX}/{box}", {"ttl_seconds": 1})
        assert a.status in (200, 409), a
    s.delete(f"{BOX}/{box}", expect=200)


def test_detach(s):
    """detach names an owner and keeps the ttl"""
    box = s.create()["id"]
    a = s.post(f"{BOX}/{box}/detach", {"owner": "nightly-build"}, expect=200).json
    assert a["lifecycle"]["detached"] and a["lifecycle"]["owner"] == "nightly-build" and a["lifecycle"]["ttl_seconds"] == 1800
    assert s.post(f"{BOX}/{box}/detach", expect=200).json["lifecycle"]["owner"] == "nightly-build"
    s.delete(f"{BOX}/{box}", expect=200)


def test_wait(s):
    """wait answers at once when there, at its timeout when not, and as soon as it cannot come any more"""
    box = s.create()["id"]
    assert s.get(f"{BOX}/{box}/wait?state=running&timeout_seconds=30", expect=200).json["state"] == "running"
    t = time.monotonic()
    assert s.get(f"{BOX}/{box}/wait?state=stopped&timeout_seconds=1", expect=200).json["state"] == "running"
    assert 0.9 < time.monotonic() - t < 5
    got = []
    w = threading.Thread(target=lambda: got.append(s.get(f"{BOX}/{box}/wait?state=stopped&timeout_seconds=60", timeout=90)))
    w.start()
    s.delete(f"{BOX}/{box}", expect=200)
    w.join(10)
    assert got and got[0].json["state"] == "destroyed", got


def test_job_cancel(s):
    """A create whose job is cancelled ends as 409 cancelled, and the sandbox can be removed"""
    a = s.post(BOX, {"image": "debian", "lifecycle": LIFE}, headers={"Prefer": "respond-async"}, expect=202)
    c = s.post(f"/v1/jobs/{a.json['id']}/cancel", expect=(200, 409))
    job = harness.until(lambda: (j := s.get(f"/v1/jobs/{a.json['id']}").json)["state"] not in ("queued", "running") and j, 30, "the job ends")
    if c.status == 200:
        assert job["state"] == "cancelled" and job["problem"]["code"] == "cancelled", job
    box = a.json["sandbox_id"]
    s.delete(f"{BOX}/{box}", expect=200)
    harness.until(lambda: not harness.vm_pids([box]), 5, "QEMU is gone")
    s.post(f"/v1/jobs/{a.json['id']}/cancel", expect=200 if job["state"] == "cancelled" else 409)  # unchanged, or too late


def test_guest_poweroff(s):
    """The guest powers off: stopped/guest_shutdown, and it starts again from its disk"""
    box = s.create()["id"]
    s.run(box, "echo still > /work/here; sync")
    s.post(f"{BOX}/{box}/commands", {"argv": ["python3", "-c", "import ctypes; ctypes.CDLL(None).reboot(0x4321fedc)"],
                                     "user": "root", "background": True}, expect=202)
    a = s.reach(box, "stopped", 30)
    assert a["state_reason"] == "guest_shutdown", a
    s.post(f"{BOX}/{box}/start", expect=200)
    assert s.run(box, ["cat", "/work/here"])["stdout"] == "still\n"
    s.delete(f"{BOX}/{box}", expect=200)


def test_vm_died(s):
    """QEMU is killed: failed/vm_died, running commands lost, calls answered, and the sandbox can be removed"""
    box = s.create()["id"]
    done = s.run(box, "echo before")["command_id"]
    c = s.background(box, "echo on; sleep 500")
    harness.until(lambda: s.get(f"{BOX}/{box}/commands/{c}").json["stdout"] == "on\n", 20, "its output is kept")
    buffered = []
    t = threading.Thread(target=lambda: buffered.append(s.post(f"{BOX}/{box}/commands", {"argv": ["sleep", "400"], "timeout_seconds": 450})))
    t.start()
    harness.until(lambda: len([x for x in s.get(f"{BOX}/{box}/commands").json["items"] if x["state"] == "running"]) == 2, 20,
                  "both run")
    os.kill(harness.qemu_pid(box), signal.SIGKILL)
    a = s.reach(box, "failed", 20)
    assert a["state_reason"] == "vm_died", a
    t.join(20)
    assert buffered and buffered[0].status in (200, 502), buffered
    if buffered[0].status == 200:
        assert buffered[0].json["outcome"] == "lost"
    else:
        assert buffered[0].kind == "transport_failed"
    r = s.wait(box, c, 10)
    assert r["outcome"] == "lost" and r["stdout"] == "on\n", r
    assert s.output(box, done) == b"before\n"
    s.post(f"{BOX}/{box}/commands", {"argv": ["true"]}, expect=409)
    report = s.delete(f"{BOX}/{box}", expect=200).json
    assert not report["failed"], report


def test_mute_agent(s):
    """A guest that is frozen is told as agent_unresponsive, stays deletable, and calls to it end"""
    box = s.create()["id"]
    pid = harness.qemu_pid(box)
    os.kill(pid, signal.SIGSTOP)
    try:
        harness.until(lambda: s.get(f"{BOX}/{box}").json["state_reason"] == "agent_unresponsive", 40, "agent_unresponsive")
        os.kill(pid, signal.SIGCONT)
        harness.until(lambda: s.get(f"{BOX}/{box}").json["state_reason"] is None, 30, "it answers again")
        assert s.run(box, ["true"])["exit_code"] == 0
        os.kill(pid, signal.SIGSTOP)
        s.delete(f"{BOX}/{box}", expect=200, timeout=60)
    finally:
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass
    harness.until(lambda: not harness.vm_pids([box]), 10, "QEMU is gone")


@harness.deadline(150)
def test_mute_through_a_pause(s):
    """A guest that its root made mute stays told as such over pause and resume, and a command to it ends after its deadline"""
    box = s.create()["id"]
    hog = "import os; open('/proc/sys/kernel/sched_rt_runtime_us','w').write('-1'); os.sched_setscheduler(0,os.SCHED_FIFO,os.sched_param(99))\nwhile 1: pass"
    s.background(box, ["python3", "-c", hog], user="root", timeout_seconds=600)
    def mute():
        return s.get(f"{BOX}/{box}").json["state_reason"] == "agent_unresponsive"
    harness.until(mute, 60, "agent_unresponsive")
    s.post(f"{BOX}/{box}/pause", expect=200)
    a = s.post(f"{BOX}/{box}/resume", expect=200).json
    assert a["state"] == "running" and a["state_reason"] == "agent_unresponsive", a
    r = s.post(f"{BOX}/{box}/commands", {"argv": ["true"], "timeout_seconds": 2}, expect=200, timeout=60).json
    assert r["outcome"] == "lost" and r["exit_code"] is None, r
    assert mute()
    s.delete(f"{BOX}/{box}", expect=200, timeout=60)


def test_boot_failure(s):
    """A create that cannot come up fails with a problem, and the errored sandbox can be removed"""
    a = s.post(BOX, {"image": "debian", "lifecycle": LIFE}, headers={"Prefer": "respond-async"}, expect=202)
    box = a.json["sandbox_id"]
    pid = harness.until(lambda: [p for p, w in harness.vm_pids([box]).items() if "qemu" in os.path.basename(w[0])], 20, "QEMU runs")[0]
    os.kill(pid, signal.SIGKILL)
    s.reach(box, "failed", 30)
    job = s.get(f"/v1/jobs/{a.json['id']}").json
    assert job["state"] == "failed" and job["problem"]["status"] in (502, 504), job
    s.post(f"{BOX}/{box}/commands", {"argv": ["true"]}, expect=409)
    s.delete(f"{BOX}/{box}", expect=200)


def test_events(s):
    """Each change of state is an event and an audit entry with its cause; the stream resumes where it was left"""
    last = s.get("/v1/events?limit=1", expect=200).json["last_seq"]
    seen = collect_events(s)
    start = max([last] + [e["seq"] for e in seen])
    stream = s.stream("GET", f"/v1/events?after_seq={start}")
    box = s.create()["id"]
    s.post(f"{BOX}/{box}/stop", expect=200)
    got, ident = [], None
    while not got or got[-1] != "stopped":
        e = stream.next(30)
        if e[2]["sandbox_id"] == box and "to" in e[2]["data"]:
            got.append(e[2]["data"]["to"])
            if got[-1] == "running":
                ident = e[1]
    stream.close()
    assert got == ["starting", "running", "stopping", "stopped"], got
    stream = s.stream("GET", "/v1/events", headers={"Last-Event-ID": ident})
    while (e := stream.next(20))[2]["data"].get("to") != "stopping":
        assert e[2]["seq"] > int(ident) if ident.isdigit() else True
    stream.close()
    s.delete(f"{BOX}/{box}", expect=200)
    entries, after, page = [], 0, None
    while page is None or len(page) == 500:  # not until there is none: to read it is an entry itself
        page = s.get(f"/v1/audit?limit=500&after_seq={after}", expect=200).json["items"]
        entries += [e for e in page if e["sandbox_id"] == box]
        after = page[-1]["seq"] if page else after
    assert entries, "no audit entry"


def test_console_log(s):
    """Logs by source, followed live, with gaps told"""
    box = s.create()["id"]
    stream = s.stream("GET", f"{BOX}/{box}/logs?follow=true&source=console")
    s.run(box, "echo marker-7711 > /dev/ttyS0; echo marker-7711 > /dev/console", user="root")
    while "marker-7711" not in stream.next(20)[2]["text"]:
        pass
    stream.close()
    for source in ("console", "agent", "vmm", "command"):
        items = s.get(f"{BOX}/{box}/logs?source={source}", expect=200).json["items"]
        assert all(i["source"] == source for i in items)
    s.run(box, "head -c 3000000 /dev/zero | tr '\\0' x | fold -w 100 > /dev/ttyS0", user="root", timeout_seconds=60)
    assert s.run(box, ["true"])["exit_code"] == 0
    s.delete(f"{BOX}/{box}", expect=200)


@harness.deadline(240)
def test_quota():
    """Admission is counted, not raced: 20 concurrent creates under a limit of 2"""
    s = harness.Server("test_lifecycle.quota", args=["--max-sandboxes-per-tenant", "2"]).start()
    try:
        got = []
        threads = [threading.Thread(target=lambda: got.append(
            s.post(BOX, {"image": "debian", "lifecycle": LIFE}, headers={"Prefer": "respond-async"}))) for _ in range(20)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        admitted = [a for a in got if a.status == 202]
        assert len(admitted) == 2, [a.status for a in got]
        assert {(a.status, a.code) for a in got if a.status != 202} == {(429, "quota_exceeded")}
        for a in admitted:
            s.delete(f"{BOX}/{a.json['sandbox_id']}", expect=200)
        s.post(BOX, {"image": "debian", "lifecycle": LIFE}, headers={"Prefer": "respond-async"}, expect=202)
    finally:
        s.close()


def test_many_creates(s):
    """Creates beyond what boots at once queue, and all come up"""
    got = []
    threads = [threading.Thread(target=lambda: got.append(s.create())) for _ in range(5)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(got) == 5 and all(b["state"] == "running" for b in got)
    for b in got:
        s.delete(f"{BOX}/{b['id']}", expect=200)


if __name__ == "__main__":
    harness.main()
