"""Writes docs/performance.md from a result of bench/run: what was measured where, and what was missed or not measured."""
import json
import os
import sys

from measure import number

TITLES = {
    "fork": "Forks and the pool", "snapshot": "Snapshots and cold state", "cycles": "Many of them", "boot": "Boot", "calls": "Calls", "stream": "Streams", "http": "HTTP, memory and idling", "trips": "Round trips",
    "adoption": "kill -9 of the server", "soak": "Soak", "kernel": "The tuned guest kernel",
}
INTRO = """# Performance

Written by `bench/run --write-docs` from what `bench/run` measured; not by hand. Each part says when it was begun; product and
floor of a figure are of one run. bench/README.md defines each figure.

A promise is held against what QEMU itself costs on the same machine in the same run: the *floor*, a VM with the command
line, kernel, image and disk of a sandbox, but with the least agent and no server, HTTP, store or jail.
Samples of both sides alternate. All numbers are medians unless they say otherwise; the server ran with its defaults
(log, tokens, `synchronous=FULL`) on loopback. They are this machine's numbers: measure your own.
"""


def cell(text):
    return str(text).replace("|", "\\|").replace("\n", " ")


def measured(f):
    return "p50" in f


def with_unit(x, f):
    return "-" if x is None else number(x) + (" " + f["unit"] if f["unit"] else "")


def verdict(f):
    bold = f["verdict"] in ("MISSED", "FAILED")
    text = f"**{f['verdict']}**" if bold else f["verdict"]
    return text + (f", from {f['n']:,} of {f['promised_n']:,} samples" if f["short"] else "")


def row(f):
    if not measured(f):
        return f"| {cell(f['name'])} | - | - | - | - | - | {verdict(f)} |"
    return "| " + " | ".join(map(cell, (
        f["name"], with_unit(f["p50"], f), with_unit(f["p95"], f), with_unit(f["floor_p50"], f) + (
            f" ({f['floor_is']})" if f["floor_p50"] is not None else ""),
        f"{f['ratio']:.2f}" if f["ratio"] is not None else "-", f["limit"], verdict(f)))) + " |"


def summary(figures):
    """What is missed, what failed, what nobody knows: before the tables, not after them."""
    judged = [f for f in figures if f["verdict"] in ("ok", "MISSED")]
    out = [f"{sum(f['verdict'] == 'ok' for f in judged)} of {len(judged)} promises held in this run."]
    for what, kind in (("Missed", "MISSED"), ("Failed", "FAILED"), ("Not measured", "not measured")):
        for f in (f for f in figures if f["verdict"] == kind):
            how = f"{value(f)}, limit {f['limit']}" if kind == "MISSED" else f["note"][:200]
            out.append(f"- {what}: {f['name']}: {how}")
    if any(f["short"] for f in figures):
        out.append("- Some figures come from fewer samples than promised and are hints, not verdicts; the table says which.")
    return out


def value(f):
    """What was compared with the limit."""
    if f["limit"].startswith("floor +"):
        return f"floor + {number(f['value'])} {f['unit']}"
    return f"{f['value']:.2f}" if "ratio" in f["limit"] else with_unit(f["value"], f)


def page(result):
    figures, lines = result["figures"], [INTRO]
    lines += [f"Measured {result['measured_at']} with:\n", f"    {result['command'].strip()}\n", *summary(figures), ""]
    absent = [p for p in TITLES if p not in {f["part"] for f in figures}]
    if absent:
        lines += [f"Parts that were not run: {', '.join(absent)}.", ""]
    lines += ["## The host", "", "| | |", "|---|---|"]
    lines += [f"| {cell(k)} | {cell(v)} |" for k, v in result["host"].items()]
    for part, title in TITLES.items():
        mine = [f for f in figures if f["part"] == part]
        if not mine:
            continue
        lines += ["", f"## {title}", "", "| figure | product p50 | p95 | floor p50 | ratio | limit | verdict |",
                  "|---|---|---|---|---|---|---|", *map(row, mine), ""]
        lines += [f"- {f['name']}: {f['note']}." for f in mine if f["note"] and measured(f)]
        lines += [f"- {n['text'][:300]}." for n in result["notes"] if n["part"] == part]
    return "\n".join(lines).rstrip() + "\n"


def write(result_path, path):
    try:
        with open(result_path, encoding="utf-8") as f:
            result = json.load(f)
    except (OSError, ValueError) as e:
        print(f"no result of bench/run in {result_path}: {e}", file=sys.stderr)
        return 2
    if not result["figures"]:
        print(f"the result in {result_path} has no figures", file=sys.stderr)
        return 2
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        f.write(page(result))
    print(f"wrote {path} from {result_path}")
    return 0
