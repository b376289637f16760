"""Receipts, the audit chain and its checkpoint; and `airlock verify` from the files alone, also on files that were changed."""
import base64
import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import tempfile

import harness
from test_tour import receipt, verified_by_openssl

BOX = "/v1/sandboxes"


def verify(state, *args):
    p = subprocess.run([harness.BIN, "verify", "--state-dir", state, *args], capture_output=True, text=True, timeout=60)
    return p.returncode, p.stdout + p.stderr


def entries(s, token=None):
    out, after = [], 0
    while True:
        page = s.get(f"/v1/audit?after_seq={after}&limit=500", token=token, expect=200).json
        out += page["items"]
        if len(page["items"]) < 500:
            return out
        after = page["items"][-1]["seq"]


def test_every_change(s, box):
    """Every call that changes something has a receipt and an audit entry; a read of contents too, a stat only the entry"""
    path = s.file(box, "/work/e")
    calls = [s.put(path, b"x", expect=201), s.get(path, expect=200), s.delete(path, expect=200),
             s.patch(f"{BOX}/{box}", {"labels": {"a": "b"}}, expect=200),
             s.post(f"{BOX}/{box}/dirs", {"path": "/work/edir"}, expect=201),
             s.post(f"{BOX}/{box}/commands", {"argv": ["true"]}, expect=200),
             s.get(f"{BOX}/{box}/archive?path=/work/edir", expect=200)]
    receipts = [a.headers["Airlock-Receipt-Id"] for a in calls]
    audits = [a.headers["Airlock-Audit-Id"] for a in calls]
    for r, a in zip(receipts, audits):
        fact = receipt(s, r)
        assert fact["receipt_id"] == r and fact["audit_id"] == a and fact["tenant"] == "default", fact
    stat = s.get(f"{BOX}/{box}/files/stat?path=/work", expect=200)
    assert "Airlock-Receipt-Id" not in stat.headers
    audits.append(stat.headers["Airlock-Audit-Id"])
    harness.until(lambda: set(audits) <= {e["id"] for e in entries(s)}, 10, "all audit entries are there")


def test_denied(s, box):
    """A denial is an audit entry too"""
    tok = s.post("/v1/tokens", {"name": "weak", "scopes": ["sandbox:read"]}, expect=201).json["token"]
    s.post(f"{BOX}/{box}/commands", {"argv": ["true"]}, token=tok, expect=403)
    harness.until(lambda: [e for e in entries(s) if e["decision"] == "denied"], 10, "an entry with decision denied")


def test_no_values(s, box):
    """Arguments, environment values, file contents and paths do not stand in receipts and entries"""
    mark = "s3cr3t-marker-value"
    a = s.run(box, ["echo", mark], env={"NAME_OF_IT": mark}, stdin=mark)
    b = s.put(s.file(box, f"/work/{mark}"), mark.encode(), expect=201).json
    for r in (a["receipt_id"], b["receipt_id"]):
        assert mark not in json.dumps(receipt(s, r))
    assert "NAME_OF_IT" in json.dumps(receipt(s, a["receipt_id"]))
    assert mark not in json.dumps(entries(s))


def test_output_hash(s, box):
    """The receipt carries the SHA-256 of each stream, of all that was kept"""
    r = s.run(box, "seq 50000; echo err >&2", max_output_bytes=10)
    facts = receipt(s, r["receipt_id"])["facts"]
    out = b"".join(b"%d\n" % n for n in range(1, 50001))
    assert facts["stdout_sha256"] == harness.sha256(out) and facts["stdout_bytes"] == len(out)
    assert facts["stderr_sha256"] == harness.sha256(b"err\n")


def test_pending(s, box):
    """While a command runs its receipt is a 409 receipt_pending"""
    c = s.post(f"{BOX}/{box}/commands", {"argv": ["cat"], "background": True}, expect=202).json
    a = s.get(f"/v1/receipts/{c['receipt_id']}", expect=409)
    assert a.code == "receipt_pending", a
    s.post(f"{BOX}/{box}/commands/{c['command_id']}/signal", {"signal": "KILL"}, expect=200)
    s.wait(box, c["command_id"])
    fact = receipt(s, c["receipt_id"])
    assert fact["outcome"] == "signaled", fact


def test_chain(s, box):
    """The chain adds up entry by entry, and the signed checkpoint names its head"""
    chain = entries(s)
    seqs = [e["seq"] for e in chain]
    assert seqs == sorted(seqs)
    for before, e in zip(chain, chain[1:]):
        if e["seq"] == before["seq"] + 1:
            assert e["prev_hash"] == before["hash"], e
    point = s.get("/v1/audit/checkpoint", expect=200).json
    body = verified_by_openssl(point, s.get("/v1/keys").json["items"])
    assert body["size"] == point["size"] and body["head_hash"] == point["head_hash"], body
    assert point["size"] >= chain[-1]["seq"]
    v = s.get("/v1/audit/verify", expect=200).json
    assert v["verdict"] == "verified" and v["entries"] >= len(chain), v


def test_receipt_chain(s):
    """Receipts of a tenant name their predecessor"""
    items = s.get("/v1/receipts?limit=20", expect=200).json["items"]
    facts = [receipt(s, i["id"]) for i in items if i["state"] == "final"]
    assert any(f["previous_receipt_sha256"] for f in facts)


@contextlib.contextmanager
def copy_of(s):
    """The state of a stopped server, to break."""
    with tempfile.TemporaryDirectory() as d:
        to = os.path.join(d, "state")
        shutil.copytree(s.state, to, ignore=lambda folder, names: [n for n in names if n.endswith((".raw", ".sock")) or n in ("run", "disks")],
                        ignore_dangling_symlinks=True)
        yield to


def stopped(s):
    if s.process.poll() is None:
        assert s.terminate() == 0


def sql(state, *statements):
    db = sqlite3.connect(os.path.join(state, "airlock.db"))
    for statement in statements:
        changed = db.execute(statement).rowcount
        assert changed > 0, f"nothing to change: {statement}"
    db.commit()
    db.close()


def columns(state, table):
    db = sqlite3.connect(os.path.join(state, "airlock.db"))
    names = [r[1] for r in db.execute(f"PRAGMA table_info({table})")]
    db.close()
    assert names, f"there is no table {table}"
    return names


def audit_table(state):
    db = sqlite3.connect(os.path.join(state, "airlock.db"))
    names = [r[0] for r in db.execute("SELECT name FROM sqlite_master WHERE type='table' AND name LIKE 'audit%'")]
    db.close()
    assert names
    return names[0]


def test_verify_running(s):
    """airlock verify on a running server's files: 0"""
    code, text = verify(s.state)
    assert code == 0, (code, text)


def test_verify(s):
    """airlock verify: 0 on what was left; also deep, and with the checkpoint kept elsewhere"""
    stopped(s)
    with copy_of(s) as state:
        assert verify(state)[0] == 0, verify(state)
        assert verify(state, "--deep")[0] == 0, verify(state, "--deep")
        assert verify(state, "--checkpoint", os.path.join(s.state, "checkpoint.json"))[0] == 0
        before = {n: hashlib.sha256(open(os.path.join(state, n), "rb").read()).hexdigest()
                  for n in os.listdir(state) if os.path.isfile(os.path.join(state, n))}
        verify(state, "--deep")
        after = {n: hashlib.sha256(open(os.path.join(state, n), "rb").read()).hexdigest()
                 for n in os.listdir(state) if os.path.isfile(os.path.join(state, n))}
        assert before == after, "verify wrote something"


def test_verify_changed(s):
    """A changed entry, receipt or output: 1"""
    stopped(s)
    with copy_of(s) as state:
        table = audit_table(state)
        sql(state, f"UPDATE {table} SET entry_json = replace(entry_json, 'command.run', 'command.ran') WHERE seq = "
                   f"(SELECT min(seq) FROM {table} WHERE entry_json LIKE '%command.run%')")
        code, text = verify(state)
        assert code == 1, (code, text)
    with copy_of(s) as state:
        db = sqlite3.connect(os.path.join(state, "airlock.db"))
        ident, envelope = next(r for r in db.execute("SELECT id, envelope_json FROM receipts WHERE envelope_json IS NOT NULL"))
        value = json.loads(envelope)
        body = bytearray(base64.b64decode(value["payload"]))
        body[-3] ^= 1
        value["payload"] = base64.b64encode(bytes(body)).decode()
        db.execute("UPDATE receipts SET envelope_json = ? WHERE id = ?", (json.dumps(value), ident))
        db.commit()
        db.close()
        code, text = verify(state)
        assert code == 1, (code, text)
    with copy_of(s) as state:
        for folder, _, names in os.walk(os.path.join(state, "sandboxes")):
            for name in names:
                if name.endswith(".stdout") and os.path.getsize(os.path.join(folder, name)):
                    with open(os.path.join(folder, name), "r+b") as f:
                        f.write(b"X")
                    break
        code, text = verify(state, "--deep")
        assert code == 1, (code, text)


def test_verify_truncated(s):
    """Entries cut off at the end: 2, by the checkpoint file beside the database"""
    stopped(s)
    with copy_of(s) as state:
        table = audit_table(state)
        sql(state, f"DELETE FROM {table} WHERE seq > (SELECT max(seq) - 3 FROM {table})")
        code, text = verify(state)
        assert code in (1, 2), (code, text)
        code, text = verify(state, "--checkpoint", os.path.join(s.state, "checkpoint.json"))
        assert code == 2, (code, text)


@harness.deadline(120)
def test_verify_restored(s):
    """An old database restored whole looks right by itself; the kept checkpoint finds it: 2"""
    stopped(s)
    with copy_of(s) as old:
        s.start()
        for _ in range(3):
            s.post("/v1/tokens", {"name": "later", "scopes": ["sandbox:read"]}, expect=201)
        stopped(s)
        kept = os.path.join(s.state, "checkpoint.json")
        assert verify(old)[0] == 0, verify(old)
        code, text = verify(old, "--checkpoint", kept)
        assert code == 2, (code, text)


def test_verify_unreadable(s):
    """No database, or none that can be read: 3"""
    stopped(s)
    with tempfile.TemporaryDirectory() as d:
        assert verify(d)[0] == 3, verify(d)
        assert verify(os.path.join(d, "none"))[0] == 3
    with copy_of(s) as state:
        for name in os.listdir(state):
            if name.startswith("airlock.db"):
                with open(os.path.join(state, name), "wb") as f:
                    f.write(b"this is no database" * 1000)
        assert verify(state)[0] == 3, verify(state)


@harness.deadline(120)
def test_verify_receipt(s):
    """One envelope against one key: 0; a changed one: 1"""
    if s.process.poll() is not None:
        s.start()
    item = next(i for i in s.get("/v1/receipts?limit=20").json["items"] if i["state"] == "final")
    envelope = s.get(f"/v1/receipts/{item['id']}", expect=200).json
    key = next(k for k in s.get("/v1/keys").json["items"] if k["key_id"] == envelope["signatures"][0]["keyid"])
    with tempfile.TemporaryDirectory() as d:
        def check(value):
            with open(f"{d}/r.json", "w") as f:
                json.dump(value, f)
            with open(f"{d}/key.pem", "w") as f:
                f.write(key["public_key_pem"])
            return subprocess.run([harness.BIN, "verify", "--receipt", f"{d}/r.json", "--key", f"{d}/key.pem"],
                                  capture_output=True, text=True).returncode
        assert check(envelope) == 0
        body = base64.b64decode(envelope["payload"]).replace(b'"tenant":"default"', b'"tenant":"defaulu"')
        assert check({**envelope, "payload": base64.b64encode(body).decode()}) == 1
        assert check({"payload": 1}) in (1, 3)


if __name__ == "__main__":
    harness.main()
