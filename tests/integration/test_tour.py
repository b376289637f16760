"""The main job from nothing to its receipt, as the README tells it."""
import base64
import json
import os
import subprocess
import tempfile

import harness
from harness import text_of


def verified_by_openssl(envelope, keys):
    """The receipt's payload, after the openssl command line has found its signature good."""
    signature = envelope["signatures"][0]
    key = next(k for k in keys if k["key_id"] == signature["keyid"])
    body = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"].encode()
    pae = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(body), body)
    with tempfile.TemporaryDirectory() as d:
        files = {"key.pem": key["public_key_pem"].encode(), "pae": pae, "sig": base64.b64decode(signature["sig"])}
        for name, data in files.items():
            with open(os.path.join(d, name), "wb") as f:
                f.write(data)
        argv = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "key.pem", "-rawin", "-in", "pae", "-sigfile", "sig"]
        good = subprocess.run(argv, cwd=d, capture_output=True, text=True)
        assert good.returncode == 0, f"openssl: {good.stdout} {good.stderr}"
        with open(os.path.join(d, "pae"), "ab") as f:
            f.write(b" ")
        assert subprocess.run(argv, cwd=d, capture_output=True).returncode != 0, "openssl takes a changed receipt"
    return json.loads(body)


def receipt(s, ident, token=None):
    """A settled receipt's payload, checked."""
    def ask():
        a = s.get(f"/v1/receipts/{ident}", token=token, expect=(200, 409))
        assert a.status == 200 or a.code == "receipt_pending", a
        return a if a.status == 200 else None
    a = harness.until(ask, 15, f"receipt {ident}")
    return verified_by_openssl(a.json, s.get("/v1/keys", expect=200).json["items"])


def test_open_routes(s):
    """/healthz, /readyz, /openapi.json and /docs need no token"""
    for path in ("/healthz", "/readyz", "/openapi.json", "/docs"):
        s.get(path, token=False, expect=200)
    page = s.get("/docs", token=False).body
    assert b"src=\"http" not in page and b"href=\"http" not in page.split(b"</head>")[0], "the page loads from outside"
    assert s.get("/openapi.json", token=False).json["paths"].keys() == harness.SPEC.doc["paths"].keys()


def test_token_file(s):
    """The first start leaves an admin token, mode 0600, of the form alk_ and 40 base62 digits"""
    st = os.stat(os.path.join(s.state, "token"))
    assert st.st_mode & 0o777 == 0o600
    assert len(s.token) == 44 and s.token.startswith("alk_") and s.token[4:].isalnum()
    assert s.get("/v1/sandboxes", token=False).status == 401
    assert s.get("/v1/sandboxes", token="alk_" + "x" * 40).status == 401


def test_capabilities(s):
    """Capabilities and the security model say what this host is"""
    c = s.get("/v1/capabilities", expect=200).json
    assert c["api_version"] == "v1" and c["images"]["available"]
    model = s.get("/v1/security-model", expect=200).json
    if c["accel"]["selected"] == "tcg":
        assert c["isolation"] == "emulated" and "boundary" in (c["isolation_note"] or ""), c["isolation_note"]
        assert model["isolation"]["isolation"] == "emulated"
    assert any(i["name"] == "debian" for i in s.get("/v1/images", expect=200).json["items"])


@harness.deadline(180)
def test_main_job(s):
    """Create, run Python, write and read a file, logs, receipts checked by openssl, delete with a report"""
    box = s.create(name="tour", labels={"team": "infra"}, env={"MODE": "ci"})
    assert box["state"] == "running" and box["network"] in (None, {"egress": []}) and box["env_keys"] == ["MODE"]
    assert box["backend"]["boot_path"] == "cold" and box["timings_ms"]["total"] > 0
    ident = box["id"]

    ran = s.run(ident, ["python3", "-c", "import os; print(6 * 7, os.environ['MODE'], os.getuid(), os.getcwd())"])
    assert (ran["outcome"], ran["exit_code"], ran["stdout"]) == ("exited", 0, "42 ci 1000 /work\n"), ran

    data = os.urandom(200_000)
    put = s.put(s.file(ident, "/work/data.bin"), data, expect=201).json
    assert put["bytes"] == len(data) and put["sha256"] == harness.sha256(data)
    assert s.get(s.file(ident, "/work/data.bin"), expect=200).body == data
    seen = s.run(ident, ["sha256sum", "/work/data.bin"])
    assert seen["stdout"].split()[0] == put["sha256"][7:]

    logs = s.get(f"/v1/sandboxes/{ident}/logs", expect=200).json
    assert logs["items"], "no log entry"

    fact = receipt(s, ran["receipt_id"])
    text = json.dumps(fact)
    assert "command.run" in text and ran["command_id"] in text, text
    assert harness.sha256(text_of(ran)) in text, "the hash of stdout is not in the receipt"
    assert "6 * 7" not in text, "argv stands in the receipt"
    for ident_ in (box["receipt_id"], put["receipt_id"]):
        receipt(s, ident_)

    job = s.get(f"/v1/jobs/{box['job_id']}", expect=200).json
    assert job["state"] == "succeeded" and [x["name"] for x in job["stages"]], job
    report = s.delete(f"/v1/sandboxes/{ident}", expect=200).json
    assert report["state"] == "destroyed" and report["erased"] and not report["failed"], report
    receipt(s, report["receipt_id"])
    assert s.get(f"/v1/sandboxes/{ident}", expect=200).json["state"] == "destroyed"
    assert not harness.vm_pids([ident]), "QEMU outlives its sandbox"
    assert s.get("/v1/audit/verify", expect=200).json["verdict"] == "verified"


def test_no_network(s, box):
    """A guest has no network device, and loopback is up"""
    seen = s.run(box, "ls /sys/class/net; python3 -c 'import socket; s=socket.create_server((\"127.0.0.1\",0));"
                      "socket.create_connection(s.getsockname()); print(\"loop\")'")
    assert seen["stdout"].split() == ["lo", "loop"], seen


def test_root_command(s, box):
    """A command runs as root where the token's scope allows it"""
    assert s.run(box, ["id", "-u"], user="root")["stdout"] == "0\n"
    assert s.run(box, ["id", "-un"])["stdout"] == "sandbox\n"


def test_metrics(s):
    """/metrics is Prometheus text"""
    a = s.get("/metrics", expect=200)
    assert b"# TYPE " in a.body


if __name__ == "__main__":
    harness.main()
