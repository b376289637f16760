"""http: requests a second against nginx, the server's memory after them, a thousand idle followers, an idle sandbox."""
import collections
import os
import resource
import time

import harness
from measure import NotMeasured, Stand, Wire, interleave, rss_kib
from nginx import Nginx, need_tools, wrk

TICKS = os.sysconf("SC_CLK_TCK")
GONE_S = 20


def measure(report, options):
    with Stand("http") as st:
        box = st.box()
        requests(report, options, st, box)
        kib = rss_kib(st.s.process.pid)
        report.figure("server's memory afterwards", "KiB", [kib], ("worst<=", 20 * 1024 + 100),
                      note="VmRSS with one sandbox; limit 20 MiB + 100 KiB per sandbox")
        followers(report, options, st)
        idle(report, options, st, box)


def requests(report, options, st, box):
    name = "GET of a sandbox, 32 connections"
    try:
        tools = need_tools()
    except NotMeasured as why:
        report.unmeasured(name, str(why))
        return
    target = f"/v1/sandboxes/{box}"
    wire = st.wire()
    body = wire.want(200, wire.request("GET", target))
    nginx = Nginx(tools["nginx"], body)
    try:
        url = f"http://{st.s.host}:{st.s.port}{target}"
        mine, its = interleave(3, lambda: wrk(tools["wrk"], options.wrk_seconds, url, st.s.token),
                               lambda: wrk(tools["wrk"], options.wrk_seconds, nginx.url, st.s.token))
    finally:
        nginx.close()
    report.figure(name, "requests/s", mine, ("pairs>=", .7), its, f"nginx, file of {len(body)} bytes", promised_n=30,
                  n=3 * options.wrk_seconds, note=f"three runs of {options.wrk_seconds} s each, alternating")


# ---- followers --------------------------------------------------------------------------------------------------------
def calls_under_way(s):
    for text in s.get("/metrics", expect=200, check=False).body.decode().splitlines():
        if text.startswith("airlock_calls "):
            return int(text.split()[1])
    raise AssertionError("no airlock_calls in /metrics")


def descriptors(pid):
    """How many of each: files by name, sockets and the like by kind."""
    out = collections.Counter()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            out[os.readlink(f"/proc/{pid}/fd/{fd}").split(":[")[0]] += 1
        except OSError:
            pass
    return out


def followers(report, options, st):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = options.followers + 200
    if soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            report.unmeasured("idle followers", f"{wanted} descriptors are needed, {hard} allowed: ulimit -Hn")
            return
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    pid, s = st.s.process.pid, st.s
    before = {"fds": descriptors(pid), "calls": calls_under_way(s), "kib": rss_kib(pid)}
    wires = []
    try:
        for _ in range(options.followers):
            wires.append(Wire(s, timeout=30))
            wires[-1].sock.sendall(wires[-1].request("GET", "/v1/events", headers="Accept: text/event-stream\r\n"))
        for w in wires:
            status, head, rest, _ = w.head()
            assert status == 200 and b"text/event-stream" in head, f"follower: {head!r} {rest!r}"
        during = calls_under_way(s)
        assert during >= before["calls"] + options.followers, f"{during} calls under way with {options.followers} followers"
        kib = max(watch(pid, options.idle_seconds))
    finally:
        for w in wires:
            w.close()
    closed = time.monotonic()
    each = (kib - before["kib"]) / options.followers
    report.figure("memory of an idle follower", "KiB", [each], ("worst<=", 32), promised_n=1000, n=options.followers,
                  note=f"{options.followers:,} of GET /v1/events, highest VmRSS of {options.idle_seconds} s: {kib:,} KiB, "
                       f"{before['kib']:,} before")
    while True:
        more, calls = descriptors(pid) - before["fds"], calls_under_way(s) - before["calls"]
        # Names of files are the store's readers, which are opened once when many ask at the same time.
        left = {kind: n for kind, n in more.items() if not kind.startswith("/")}
        gone = time.monotonic() - closed
        if (not left and calls <= 0) or gone > 2 * GONE_S:
            break
        time.sleep(.1)
    if more or calls > 0:
        names = ", ".join(f"{n} of {os.path.basename(kind)}" for kind, n in more.items())
        report.note(f"{gone:.1f} s after their clients there are {max(calls, 0)} calls more than before; descriptors: "
                    + (names or "none"))
    report.figure("followers gone after their clients", "s", [gone], ("worst<=", GONE_S), promised_n=1000,
                  n=options.followers, note="sockets of the server and airlock_calls are as before")


def watch(pid, seconds):
    out = []
    for _ in range(seconds):
        time.sleep(1)
        out.append(rss_kib(pid))
    return out


# ---- an idle sandbox --------------------------------------------------------------------------------------------------
def cpu_seconds(pids):
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as f:
            fields = f.read().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def idle(report, options, st, box):
    """Nobody asks anything: what QEMU, its jail and the server use, second by second and over the whole span."""
    pids = [st.s.process.pid, *harness.vm_pids([box])]
    time.sleep(5)
    samples, began, first = [], time.monotonic(), cpu_seconds(pids)
    at, last = began, first
    for _ in range(options.idle_seconds):
        time.sleep(1)
        now, used = time.monotonic(), cpu_seconds(pids)
        samples.append(100 * (used - last) / (now - at))
        at, last = now, used
    share = 100 * (last - first) / (at - began)
    report.figure("CPU of an idle sandbox", "%", [share], ("worst<=", 1), promised_n=20, n=options.idle_seconds,
                  note=f"of one core, QEMU, its jail and the server over {options.idle_seconds} s; worst second "
                       f"{max(samples):.1f} %")
    report.result.setdefault("idle_percent_by_second", samples)
