"""cycles: many forks, snapshots and creates, all of them good; and creates that stay as quick with many sandboxes and a long
history."""
import json
import sqlite3
import threading
import time

from measure import BODY, Stand, Wire, p50
from part_fork import command, create, wait_template

KEEP = {"retention": {"expires_in_seconds": 3600}}
IDENTITY = "cat /etc/machine-id /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid; hostname"


def run(wire, box, line):
    body = json.loads(wire.want(200, wire.request("POST", f"/v1/sandboxes/{box}/commands", {"shell": line})))
    assert body["exit_code"] == 0, body
    return body["stdout"]


def forks(report, options, st, wire):
    _, box = create(wire)
    box, bad, seen = box["id"], [], set()
    run(wire, box, "echo kept > /work/kept")
    for _ in range(0, options.forks, 10):
        items = json.loads(wire.want(201, wire.request("POST", f"/v1/sandboxes/{box}/fork", {"count": 10})))["items"]
        for one in items:
            words = run(wire, one["id"], "cat /work/kept; " + IDENTITY).split("\n")
            good = words[0] == "kept" and all(one["uniqueness"][k] for k in ("entropy", "clock", "hostname", "machine_id", "boot_id"))
            fresh = not seen.intersection(words[1:6])
            seen.update(words[1:6])
            bad.append(0 if good and fresh else 1)
            st.s.delete(f"/v1/sandboxes/{one['id']}", expect=200)
    report.figure("forks that were not right, or not unique", "", bad, ("bad<=", 0), promised_n=500,
                  note="machine-id, boot id, urandom, uuid and hostname of all of them compared")
    st.s.delete(f"/v1/sandboxes/{box}", expect=200)


def restores(report, options, st, wire):
    _, box = create(wire)
    box, bad = box["id"], []
    for n in range(options.restores):
        run(wire, box, f"echo {n} > /work/n; head -c 2000000 /dev/urandom > /dev/shm/p; sha256sum /dev/shm/p > /work/sum")
        snap = json.loads(wire.want(201, wire.request("POST", f"/v1/sandboxes/{box}/snapshots", KEEP)))["id"]
        body = {"snapshot_id": snap, "lifecycle": BODY["lifecycle"]}
        again = json.loads(wire.want(201, wire.request("POST", "/v1/sandboxes", body)))["id"]
        words = run(wire, again, "cat /work/n; sha256sum -c /work/sum").split()
        bad.append(0 if words == [str(n), "/dev/shm/p:", "OK"] else 1)
        st.s.delete(f"/v1/sandboxes/{box}", expect=200)
        st.s.delete(f"/v1/snapshots/{snap}", expect=200)
        box = again  # the next snapshot is of a restored one
    report.figure("snapshots that did not come back as they were", "", bad, ("bad<=", 0), promised_n=100,
                  note="a file and a pattern in memory, each cycle from the one before")
    st.s.delete(f"/v1/sandboxes/{box}", expect=200)


def concurrent(report, options, st):
    bad, boxes, lock = [], [], threading.Lock()

    def one():
        wire = Wire(st.s, timeout=300)
        try:
            _, box = create(wire)
            with lock:
                boxes.append(box["id"])
                bad.append(0)
        except Exception as e:
            with lock:
                bad.append(1)
            report.note(f"a concurrent create failed: {str(e)[:200]}")
        wire.close()
    threads = [threading.Thread(target=one) for _ in range(options.concurrent)]
    t = time.perf_counter()
    for th in threads:
        th.start()
    for th in threads:
        th.join()
    took = time.perf_counter() - t
    report.figure("concurrent creates that failed", "", bad, ("bad<=", 0), promised_n=50, note=f"all of them in {took:.1f} s")
    for box in boxes:
        st.s.delete(f"/v1/sandboxes/{box}", expect=200)


def creates(wire, st, n):
    took = []
    for _ in range(n):
        t, box = create(wire, "template")
        took.append(t)
        st.s.delete(f"/v1/sandboxes/{box['id']}", expect=200)
    return took


def crowd(report, options, st, wire):
    creates(wire, st, 3)
    alone = creates(wire, st, options.samples_flat)
    boxes = []
    for _ in range(40):
        _, box = create(wire)
        boxes.append(box["id"])
    time.sleep(5)  # what is measured are creates beside idle sandboxes
    among = creates(wire, st, options.samples_flat)
    report.figure("create beside 40 idle sandboxes", "ms", among, ("ratio<=", 1.2), alone, "beside none", promised_n=20)
    for box in boxes:
        st.s.delete(f"/v1/sandboxes/{box}", expect=200)


def history(report, options, st):
    """100,000 finished sandboxes: copies of one row under other ids, made while the server is down."""
    wire = st.wire()
    creates(wire, st, 3)
    before = creates(wire, st, options.samples_flat)
    st.s.terminate()
    db = sqlite3.connect(st.s.state + "/airlock.db")
    names = [r[1] for r in db.execute("PRAGMA table_info(sandboxes)")]
    row = dict(zip(names, db.execute("SELECT * FROM sandboxes WHERE destroyed_at_ms <> 0 LIMIT 1").fetchone()))
    letters = "0123456789abcdefghjkmnpqrstvwxyz"

    def ident(n):
        text = ""
        for _ in range(16):
            text, n = letters[n % 32] + text, n // 32
        return "sbx01k0000000" + text
    rows = (tuple({**row, "id": ident(n)}[k] for k in names) for n in range(options.history))
    db.executemany(f"INSERT INTO sandboxes ({','.join(names)}) VALUES ({','.join('?' * len(names))})", rows)
    db.commit()
    db.close()
    st.s.start()
    wire = st.wire()
    creates(wire, st, 3)
    after = creates(wire, st, options.samples_flat)
    report.figure("create beside a long history", "ms", after, ("ratio<=", 1.2), before, "beside none", promised_n=20,
                  note=f"{options.history:,} finished sandboxes in the database")


def measure(report, options):
    with Stand("cycles", args=("--pool", "0", "--max-sandboxes-per-tenant", "500")) as st:
        wire = st.wire()
        _, box = create(wire)
        st.s.delete(f"/v1/sandboxes/{box['id']}", expect=200)
        wait_template(st.s)
        crowd(report, options, st, wire)
        history(report, options, st)
        wire = st.wire()
        forks(report, options, st, wire)
        restores(report, options, st, wire)
        concurrent(report, options, st)
