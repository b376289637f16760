"""trips: thousands of round trips to the guest agent through the server; none may be lost. Each that takes over a second is
printed beside what a thread that only sleeps 10 ms saw of the host at that time."""
import threading
import time
from urllib.parse import quote

from measure import Stand, Wire

SLOW_S = 1.0
NAP_S = 0.01
NOTED_S = 0.05


class Stalls(threading.Thread):
    """Sleeps 10 ms again and again; (when, how late) of each nap that was 50 ms late or more."""

    def __init__(self):
        super().__init__(daemon=True)
        self.late, self.worst, self.ended = [], 0.0, threading.Event()

    def run(self):
        while not self.ended.is_set():
            t = time.monotonic()
            time.sleep(NAP_S)
            late = time.monotonic() - t - NAP_S
            self.worst = max(self.worst, late)
            if late >= NOTED_S:
                self.late.append((t, late))

    def between(self, began, ended):
        """Seconds that naps were late within a span, all of them and the longest."""
        found = [late for t, late in self.late if t + NAP_S + late > began and t < ended]
        return sum(found), max(found, default=0.0)


def measure(report, options):
    with Stand("trips") as st:
        box = "/v1/sandboxes/" + st.box()
        wire = Wire(st.s, timeout=60)
        wire.want(201, wire.request("PUT", f"{box}/files?path={quote('/work/file')}", b"x"))
        stat = wire.request("GET", f"{box}/files/stat?path={quote('/work/file')}")
        stalls = Stalls()
        stalls.start()
        took, lost, slow = [], [], []
        for n in range(options.trips):
            t = time.monotonic()
            try:
                status, body = wire.exchange(stat)
                fault = None if status == 200 and b'"bytes":1,' in body else f"{status} {body[:200]!r}"
            except OSError as e:
                fault = f"{type(e).__name__}: {e}"
                wire.close()
                wire = Wire(st.s, timeout=60)
            ended = time.monotonic()
            took.append((ended - t) * 1e3)
            if fault:
                lost.append(f"trip {n} after {ended - t:.2f} s: {fault}")
            if ended - t > SLOW_S:
                slow.append((n, t, ended))
        stalls.ended.set()
        stalls.join()
        wire.close()
        for text in lost[:20]:
            report.note("lost: " + text)
        for n, t, ended in slow:
            total, longest = stalls.between(t, ended)
            report.note(f"trip {n} took {ended - t:.2f} s; the sleeping thread was late by {total:.2f} s in that time, at "
                        f"most {longest:.2f} s at once")
        report.figure("agent round trips lost", "", [len(lost)], ("worst<=", 0), promised_n=10000, n=options.trips,
                      note=f"of {options.trips:,}")
        report.figure("agent round trips over 1 s", "", [len(slow)], note=f"worst trip {max(took):.0f} ms; the sleeping "
                      f"thread was late by {stalls.worst * 1e3:.0f} ms at worst")
        report.figure("agent round trip over HTTP", "ms", took)
