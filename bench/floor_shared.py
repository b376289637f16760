"""The project's plain floor script (no jail, no disk, no second port), run beside the floor that a promise is held against, with
the product's kernel and image: AIRLOCK_FLOOR, or ../shared/floor/floor.py. Where it is not there nothing is shown."""
import importlib.util
import os
import re
import subprocess
import sys
import tempfile

from floor import TOP, harness

CACHE = os.path.join(TOP, "var/cache")
PATH = os.environ.get("AIRLOCK_FLOOR", os.path.join(TOP, "../shared/floor/floor.py"))


def lay_out(work, root):
    """What the script would fetch: kernel, modules and root, as links."""
    spec = importlib.util.spec_from_file_location("shared_floor", PATH)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with open(os.path.join(CACHE, "kernel/version"), encoding="utf-8") as f:
        release = f.read().split("_")[0].strip()
    os.makedirs(f"{work}/kernel/boot")
    os.symlink(os.path.join(CACHE, "kernel/vmlinuz"), f"{work}/kernel/boot/vmlinuz-{release}")
    for module in script.MODULES:
        path = f"{work}/kernel/lib/modules/{release}/kernel/{module}.ko"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(os.path.join(CACHE, "kernel/modules", os.path.basename(module) + ".ko"), path)
    os.symlink(root, f"{work}/root.erofs")


def run(root, n):
    """{figure: (p50, unit)}, or None where the script or what it needs is missing."""
    if not os.path.exists(PATH) or not os.path.exists(os.path.join(CACHE, "kernel/vmlinuz")):
        return None
    with tempfile.TemporaryDirectory(prefix="airlock-shared-floor-") as work:
        try:
            lay_out(work, root)
            out = subprocess.run([sys.executable, "-B", PATH, "--work", work, "-n", str(n)], capture_output=True, text=True,
                                 timeout=300, check=True).stdout
        except (OSError, subprocess.SubprocessError) as why:
            return {"it did not run: " + str(why)[:100]: (0.0, "")}
    found = re.findall(r"^(.+?)\s+p50\s+([\d.]+)\s+p95\s+[\d.]+\s+n\s+\d+\s+(\S+)$", out, re.M)
    return {name: (float(p50), unit) for name, p50, unit in found}


def note(report, root, n, *names):
    figures = run(root, n)
    if figures is None:
        report.note("the plain floor script is not here: no figure of its own beside these")
        return
    shown = [f"{k} {v:.1f} {u}" for k, (v, u) in figures.items() if k in names or not u]
    report.note("the plain floor script (no jail, no writable disk, one port) in this run, p50: " + ", ".join(shown))
