"""What every part of bench/run stands on: samples, figures with their limits, the host, a connection, a server with a
floor beside it. A figure is judged once, by report.figure, from samples of one run."""
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "tests/integration"))
import harness  # noqa: E402
import floor as floor_room  # noqa: E402

BODY = {"image": "debian", "lifecycle": {"ttl_seconds": 7200, "on_expiry": "destroy"}}


class NotMeasured(Exception):
    """This host cannot show what the part is about; the message says what is missing."""


# ---- samples ----------------------------------------------------------------------------------------------------------
def p50(samples):
    return statistics.median(samples)


def p95(samples):
    s = sorted(samples)
    return s[min(len(s) - 1, int(len(s) * .95))]


def p99(samples):
    s = sorted(samples)
    return s[min(len(s) - 1, int(len(s) * .99))]


def interleave(rounds, *tasks):
    """One sample of every task a round, every second round backwards, so that a slow spell of the host meets them all."""
    out = [[] for _ in tasks]
    for n in range(rounds):
        for i in range(len(tasks)) if n % 2 == 0 else reversed(range(len(tasks))):
            out[i].append(tasks[i]())
    return out


def ms(task, *arguments):
    t = time.perf_counter()
    task(*arguments)
    return (time.perf_counter() - t) * 1e3


# ---- figures ----------------------------------------------------------------------------------------------------------
def _ratio(product, floor):
    return p50(product) / p50(floor)


# kind: (the value that is compared, True where it may be at most the number, how the limit is printed)
LIMITS = {
    "ratio<=": (_ratio, True, "ratio <= {:g}"),
    "ratio>=": (_ratio, False, "ratio >= {:g}"),
    "pairs>=": (lambda p, f: p50([a / b for a, b in zip(p, f)]), False, "median of the pairs' ratios >= {:g}"),
    "over<=": (lambda p, f: p50(p) - p50(f), True, "floor + {:g}"),
    "p50<=": (lambda p, f: p50(p), True, "p50 <= {:g}"),
    "p99<=": (lambda p, f: p99(p), True, "p99 <= {:g}"),
    "bad<=": (lambda p, f: sum(p), True, "at most {:g}"),
    "worst<=": (lambda p, f: max(p), True, "worst <= {:g}"),
}
WITH_UNIT = ("over<=", "p50<=", "p99<=", "worst<=")


def number(x):
    if x is None:
        return "-"
    return f"{x:,.0f}" if abs(x) >= 1000 or x == int(x) else f"{x:.1f}" if abs(x) >= 100 else f"{x:.2f}"


def line(f):
    """`name: product p50 (p95) | floor p50 | ratio | limit | verdict`"""
    unit = " " + f["unit"] if f["unit"] else ""
    floor = f"floor {number(f['floor_p50'])}{unit} ({f['floor_is']})" if f["floor_p50"] is not None else "floor -"
    ratio = f"ratio {f['ratio']:.2f}" if f["ratio"] is not None else "ratio -"
    verdict = f["verdict"] + (f" (only n {f['n']} of {f['promised_n']})" if f["short"] else "")
    return (f"{f['name']}: {number(f['p50'])}{unit} ({number(f['p95'])}) | {floor} | {ratio} | {f['limit']} | {verdict}"
            + (f"   [{f['note']}]" if f["note"] else ""))


class Report:
    def __init__(self, options):
        self.result = {"measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "options": options,
                       "command": "bench/run " + " ".join(sys.argv[1:]), "host": {}, "figures": [], "notes": []}
        self.part = None

    def figure(self, name, unit, product, limit=None, floor=None, floor_is="", promised_n=1, note="", n=None):
        """limit: (kind of LIMITS, number), or None for what is no promise but helps to read one."""
        n = len(product) if n is None else n
        value, verdict, text = None, "for reading", "-"
        if limit:
            compare, at_most, form = LIMITS[limit[0]]
            value = compare(product, floor)
            verdict = "ok" if (value <= limit[1] if at_most else value >= limit[1]) else "MISSED"
            text = form.format(limit[1]) + (" " + unit if unit and limit[0] in WITH_UNIT else "")
        f = {"part": self.part, "name": name, "unit": unit, "p50": p50(product), "p95": p95(product), "n": n,
             "floor_p50": p50(floor) if floor else None, "floor_p95": p95(floor) if floor else None, "floor_is": floor_is,
             "ratio": _ratio(product, floor) if floor and p50(floor) else None, "value": value, "limit": text,
             "verdict": verdict, "promised_n": promised_n, "short": bool(limit) and n < promised_n, "note": note,
             "samples": product, "floor_samples": floor}
        self.result["figures"].append(f)
        print(line(f), flush=True)

    def keep(self, path, parts):
        """Figures and notes of an earlier run, of the parts that are not measured now."""
        with open(path, encoding="utf-8") as f:
            earlier = json.load(f)
        for kind in ("figures", "notes"):
            self.result[kind] += [x for x in earlier[kind] if x["part"] not in parts and x["part"]]

    def unmeasured(self, name, why, verdict="not measured"):
        f = {"part": self.part, "name": name, "verdict": verdict, "note": why, "limit": "-", "unit": "", "short": False}
        self.result["figures"].append(f)
        print(f"{name}: {verdict}: {why}", flush=True)

    def note(self, text):
        self.result["notes"].append({"part": self.part, "text": text})
        print("# " + text, flush=True)

    def save(self, path):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(path, "w", encoding="utf-8") as f:
            json.dump(self.result, f, indent=1)
            f.write("\n")


# ---- one connection ---------------------------------------------------------------------------------------------------
class Wire:
    """A keep-alive connection on a bare socket, so that the client adds as little as it can."""

    def __init__(self, server, timeout=150):
        self.server = server
        self.sock = socket.create_connection((server.host, server.port), timeout=timeout)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def request(self, method, target, body=b"", headers="", length=None):
        """The bytes of a request; with a length only its head, for a body that is sent apart."""
        if isinstance(body, dict):
            body = json.dumps(body).encode()
            headers += "Content-Type: application/json\r\n"
        if body or method in ("POST", "PUT"):
            headers += f"Content-Length: {len(body) if length is None else length}\r\n"
        return (f"{method} {target} HTTP/1.1\r\nHost: {self.server.host}:{self.server.port}\r\n"
                f"Authorization: Bearer {self.server.token}\r\n{headers}\r\n").encode() + body

    def head(self):
        """(status, headers in lower case, what came of the body, its length)"""
        got = b""
        while (end := got.find(b"\r\n\r\n")) < 0:
            part = self.sock.recv(65536)
            if not part:
                raise ConnectionError("the server closed the connection")
            got += part
        head = got[:end].lower()
        length = re.search(rb"\r\ncontent-length: *(\d+)", head)
        return int(head[9:12]), head, got[end + 4:], int(length[1]) if length else None

    def exchange(self, data):
        """Sends a whole request; returns (status, body)."""
        self.sock.sendall(data)
        return self.answer()

    def answer(self):
        status, head, body, length = self.head()
        assert length is not None, f"no Content-Length: {head!r}"
        while len(body) < length:
            part = self.sock.recv(65536)
            if not part:
                raise ConnectionError("the server closed the connection within an answer")
            body += part
        return status, body

    def want(self, status, data):
        """exchange that insists on a status."""
        got, body = self.exchange(data)
        if got != status:
            raise AssertionError(f"{got} instead of {status} for {data[:120]!r}: {body[:400]!r}")
        return body

    def close(self):
        self.sock.close()


# ---- a server of a part's own -----------------------------------------------------------------------------------------
class Stand:
    """with Stand(name, floor=True) as st: st.s the server, st.boot() a floor VM. Everything is ended at the end."""

    def __init__(self, name, floor=False, args=("--templates", "off"), make=None, images=None):
        """make: the class of the floor; its sandbox is the server's first, which boots."""
        self.s = harness.Server("bench-" + name, args=list(args), images=images)
        self.floor, self.with_floor, self.vms, self.wires = None, floor, [], []
        self.make = make or floor_room.Floor

    def __enter__(self):
        try:
            self.s.start()
            if self.with_floor:
                box = self.s.create()["id"]
                self.floor = self.make(self.s, box)
                self.s.delete(f"/v1/sandboxes/{box}", expect=200)
        except BaseException:
            self.__exit__()
            raise
        return self

    def boot(self):
        vm = self.floor.boot()
        self.vms.append(vm)
        return vm

    def kill(self, vm):
        self.vms.remove(vm)
        vm.kill()

    def wire(self):
        self.wires.append(Wire(self.s))
        return self.wires[-1]

    def box(self):
        return self.s.create(lifecycle=BODY["lifecycle"])["id"]

    def __exit__(self, *_):
        for w in self.wires:
            w.close()
        for vm in self.vms:
            vm.kill()
        if self.floor:
            self.floor.close()
        self.s.close()


def rss_kib(pid):
    with open(f"/proc/{pid}/status") as f:
        return int(re.search(r"VmRSS:\s+(\d+)", f.read())[1])


def first(path, pattern, fallback="?"):
    try:
        with open(path) as f:
            m = re.search(pattern, f.read(), re.M)
        return m[1].strip() if m else fallback
    except OSError:
        return fallback


def output_of(*argv):
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=30).stdout.strip()
    except OSError:
        return "missing"
