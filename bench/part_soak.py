"""soak: bench/soak with its count; what it says is passed on, its checks and cycle times become figures."""
import os
import re
import subprocess
import sys

import harness
from measure import HERE


def measure(report, options):
    argv = [sys.executable, os.path.join(HERE, "soak"), str(options.soak)]
    env = {**os.environ, "AIRLOCK_BIN": harness.BIN, "AIRLOCK_IMAGES": harness.IMAGES}
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, env=env)
    try:
        said = []
        for text in child.stdout:
            said.append(text.rstrip("\n"))
            print(said[-1], flush=True)
        child.wait()
    except BaseException:
        child.terminate()  # it ends its server and VMs itself
        child.wait(60)
        raise
    for text in said:
        m = re.match(r"# (create|run|delete): p50 (\d+) ms, max (\d+) ms, n (\d+)", text)
        if m:
            report.figure(f"soak: {m[1]}", "ms", [int(m[2])], n=int(m[4]), note=f"p50; at most {m[3]} ms, n {m[4]}")
    bad = [t for t in said if t.startswith("not ok")]
    good = sum(t.startswith("ok") for t in said)
    if not bad and (child.returncode != 0 or not good):
        bad = [f"bench/soak ended with {child.returncode} after {good} checks"]
    for text in bad:
        report.note(text)
    report.figure("soak: checks failed", "", [len(bad)], ("worst<=", 0), promised_n=200, n=options.soak,
                  note=f"{good} of {good + len(bad)} passed after {options.soak} create-run-delete cycles")
