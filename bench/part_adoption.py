"""adoption: five sandboxes print a line each 0.2 s and one of them 10 MiB in a burst; kill -9 of the server; a new one. How
long from its exec until `true` is answered in all five, and whether a byte of the output is lost."""
import http.client
import threading
import time

import harness
from measure import Stand

BOXES = 5
TICKS = 60
TICK_PROGRAM = f"import time\nfor n in range({TICKS}):\n  print('tick', n, flush=True)\n  time.sleep(0.2)"
TICK_OUTPUT = b"".join(b"tick %d\n" % n for n in range(TICKS))
LINES = (10 << 20) // 10
BURST_PROGRAM = f"import sys\nw = sys.stdout.write\nfor n in range({LINES}): w('%09d\\n' % n)"
WAIT_S = 60
END_S = 60


def until_true(s, box, began, took):
    """One try after the other, each on a connection of its own, from the moment that the new server is started."""
    while time.monotonic() - began < WAIT_S:
        try:
            if s.address():
                answer = s.post(f"/v1/sandboxes/{box}/commands", {"argv": ["true"]}, timeout=20, check=False)
                if answer.status == 200 and answer.json["exit_code"] == 0:
                    took[box] = time.monotonic() - began
                    return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(.005)


def faults_of(s, what, box, command, wanted):
    """What is wrong with a finished command's end or output; nothing where every byte is there."""
    path = f"/v1/sandboxes/{box}/commands/{command}"
    r = s.get(f"{path}/wait?timeout_seconds={END_S}", expect=200, timeout=END_S + 30).json
    if r["state"] != "finished":
        now = s.get(path, expect=200).json
        return [f"{what}: {command} is {now['state']} after {END_S} s with {now['stdout_bytes']} bytes of {len(wanted)}"]
    got = s.output(box, command)
    out = []
    if r["outcome"] != "exited" or r["exit_code"] != 0:
        out.append(f"{what}: {r['outcome']} {r['exit_code']}")
    if got != wanted:
        at = next((i for i, (a, b) in enumerate(zip(got, wanted)) if a != b), min(len(got), len(wanted)))
        out.append(f"{what}: {len(got)} bytes of {len(wanted)}, differs at {at}: {got[at:at + 40]!r}")
    return out


def round_of(s, boxes, burst_output, report):
    """One kill; returns (seconds until true in all, faults)."""
    def printed(b, command):
        return s.get(f"/v1/sandboxes/{b}/commands/{command}").json["stdout_bytes"]

    ticks = {b: s.background(b, ["python3", "-c", TICK_PROGRAM]) for b in boxes}
    for b in boxes:
        harness.until(lambda b=b: printed(b, ticks[b]), 60, "the first tick")
    burst = s.background(boxes[0], ["python3", "-c", BURST_PROGRAM])
    harness.until(lambda: printed(boxes[0], burst) > 100_000, 60, "the burst has begun")
    at_kill = printed(boxes[0], burst)
    s.kill()
    took, began = {}, time.monotonic()
    s.spawn()
    threads = [threading.Thread(target=until_true, args=(s, b, began, took)) for b in boxes]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    s.wait_ready(60)
    report.note(f"killed with {at_kill:,} of {len(burst_output):,} bytes of the burst taken over; `true` after " +
                ", ".join(f"{took[b]:.2f}" if b in took else "never" for b in boxes) + " s")
    faults = [f"no `true` in {b} within {WAIT_S} s" for b in boxes if b not in took]
    for n, b in enumerate(boxes):
        faults += faults_of(s, f"ticks of sandbox {n}", b, ticks[b], TICK_OUTPUT)
    faults += faults_of(s, "the burst", boxes[0], burst, burst_output)
    return max(took.values(), default=float(WAIT_S)) if len(took) == len(boxes) else float(WAIT_S), faults


def measure(report, options):
    burst_output = b"".join(b"%09d\n" % n for n in range(LINES))
    with Stand("adoption") as st:
        boxes = [st.box() for _ in range(BOXES)]
        times, faults = [], []
        for _ in range(options.samples_adoptions):
            took, wrong = round_of(st.s, boxes, burst_output, report)
            times.append(took)
            faults.append(len(wrong))
            for text in wrong:
                report.note("lost or wrong: " + text)
        report.figure("true in all after kill -9", "s", times, ("worst<=", 2.0), promised_n=3,
                      note=f"{BOXES} sandboxes, from the exec of the new server; worst {max(times):.2f} s")
        report.figure("outputs lost or wrong after kill -9", "", faults, ("worst<=", 0), promised_n=3,
                      note=f"{BOXES} x {TICKS} lines and one burst of 10 MiB each time")
