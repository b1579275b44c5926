#!/usr/bin/env python3
"""A short account of a run of gpu-check.sh, as Markdown, from what its sections left in OUT.

    scripts/summary.py OUT        prints it and writes OUT/summary.md

OUT is a folder with what gpu-check.sh packs into logs.tar.gz; those of several runs may be unpacked into the same. Read are
results.json (the machine, each section), the lines of JSON of its sections (dilt: steps, tickets, ops, ops-f32; PyTorch:
torch-steps, torch-ops, compiled) and gw.json; what is not there is left out and named. A ratio is dilt's speed over the peer's: 2
is twice as fast. Nothing is computed that was not measured.
"""

import json
import pathlib
import statistics
import sys

FILES = {"steps": ["steps", "tickets"], "ops": ["ops", "ops-f32"], "torch": ["torch-steps", "torch-ops", "compiled"]}


def lines(path):
    """Lines of JSON; one that a stopped section left half written is no line."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path.name}: a line is no JSON: {line[:60]}", file=sys.stderr)
    return found


def table(columns, rows):
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    yield from ("| " + " | ".join(row) + " |" for row in rows)
    yield ""


def number(value, digits=0):
    return "-" if value is None else f"{value:,.{digits}f}"


def share(row, key):
    return number(row[key], 3) if row and row.get(key) is not None else "-"


def machine(results, versions, steps, ops):
    yield "# gpu-check"
    yield ""
    names = {"gpu": "GPU", "driver": "driver", "cuda": "CUDA of the driver", "highest_clock": "highest clock of SM",
             "commit": "commit", "date": "date"}
    yield from (f"- {name}: {results[key]}" for key, name in names.items() if results.get(key))
    for version in versions:
        yield "- PyTorch's side: " + ", ".join(f"{key} {value}" for key, value in version.items())
    seen = set()
    for row in steps + ops:
        ceilings = row.get("ceilings")
        if ceilings and (place := (row["device"], row["precision"])) not in seen:
            seen.add(place)
            gflop, gb = (number(ceilings[key] / 1e9) for key in ("flop_per_second", "bytes_per_second"))
            yield (f"- ceilings, {row['precision']} on {row['device']}, measured: {gflop} GFLOP/s of {ceilings['products']}, "
                   f"{gb} GB/s copied")
    yield ""


def sections(results):
    yield "## Sections"
    yield ""
    outcomes = {True: "passed", False: "**failed**", None: ""}
    rows = [(check["name"], ", ".join(filter(None, (outcomes[check["passed"]], check.get("why")))),
             str(check.get("seconds", "-")), check.get("tests", ""), check.get("clocks", "")) for check in results["checks"]]
    yield from table(["section", "", "s", "tests", "clocks of SM, memory before; after"], rows)


def failures(rows):
    yield "## Failed jobs"
    yield ""
    keys = ["job", "part", "op", "precision", "how", "format"]
    for row in rows:
        what = ", ".join([str(row[key]) for key in keys if key in row] + ([f"`{row['command']}`"] if "command" in row else []))
        yield f"- {what}: {row['error']}"
    yield ""


def precision_of(row):
    return row["precision"] + (", wgmma" if row["device"].endswith(", wgmma") else "")


def beside(peers, job, op, precision):
    """Precision and the peer's fastest way to do it; of f32 also in TF32, which PyTorch has on tensor cores and dilt has not."""
    for theirs in ["f32", "tf32"] if precision == "f32" else [precision]:
        own = [row for row in peers if (row["job"], row["op"], row["precision"]) == (job, op, theirs)]
        peer = min(own, key=lambda row: row["ms"], default=None)
        if peer or theirs == precision:
            yield peer


def whole_steps(steps, peers):
    """Dense networks beside the peer's; tickets beside the same, which are no longer the same job."""
    yield "## Whole steps"
    yield ""
    rows = []
    for result in steps:
        if "rows" not in result:
            continue
        job = f"step {result['model']}, batch {result['batch']}"
        kept = "all" if result["density"] == 1 else number(100 * result["density"], 1) + " %"
        # Where several are measured at a time, one by itself has a result of its own.
        several = [row for row in result["rows"] if row.get("networks", 1) > 1]
        for row in several or result["rows"]:
            for peer in beside(peers, job, row["name"], result["precision"]):
                own = [result["model"], str(result["batch"]), precision_of(result), kept, row["name"],
                       number(row["images_per_second"]), share(row, "share_of_ceiling"), share(row, "share_of_roofline")]
                other = ["-", "-", "-"]
                if peer:
                    speed = 1e3 * result["batch"] / peer["ms"]
                    other = [f"{peer['precision']} {peer['how']}", number(speed), number(row["images_per_second"] / speed, 2)]
                rows.append(own + other)
    columns = ["model", "batch", "precision", "kept", "", "images/s", "of ceiling", "of roofline"]
    yield from table([*columns, "PyTorch, dense", "images/s", "ratio"], rows)


def operations(ops, peers):
    yield "## Single operations"
    yield ""
    rows = []
    for row in ops:
        for peer in beside(peers, row["job"], row["op"], row["precision"]):
            other = ["-", "-", "-"]
            if peer:
                other = [f"{peer['precision']} {peer['how']}", number(peer["ms"], 3), number(peer["ms"] / row["ms"], 2)]
            rows.append([row["job"], row["op"], precision_of(row), number(row["ms"], 3), share(row, "share_of_ceiling"),
                         share(row, "share_of_roofline"), *other])
    yield from table(["job", "operation", "precision", "ms", "of ceiling", "of roofline", "PyTorch", "ms", "ratio"], rows)


def gromov_wasserstein(result):
    yield "## Gromov-Wasserstein"
    yield ""
    seconds = {name: statistics.median(taken) for name, taken in result["seconds"].items()}
    rows = [(name, number(seconds[name], 2), number(beside["times_as_fast"], 2), number(beside["value_ratio"]["median"], 3))
            for name, beside in result["beside"].items()]
    yield (f"{result['pairs']} pairs of layers, {result['probes']} probes: dilt on {result['device']} "
           f"{number(seconds['dilt'], 2)} s, POT {result['pot']} on {result['pot_device']}")
    yield ""
    yield from table(["", "s", "ratio", "dilt's value over POT's, median"], rows)


def summary(out):
    results = json.loads((out / "results.json").read_text())
    found = {kind: [row for name in names for row in lines(out / f"{name}.jsonl")] for kind, names in FILES.items()}
    failed = [row for rows in found.values() for row in rows if "error" in row]
    steps, ops, torch = ([row for row in found[kind] if "error" not in row] for kind in FILES)
    versions, peers = [row for row in torch if "torch" in row], [row for row in torch if "job" in row]
    yield from machine(results, versions[:1], steps, ops)
    yield from sections(results)
    if failed:
        yield from failures(failed)
    if steps:
        yield from whole_steps(steps, peers)
    if ops:
        yield from operations(ops, peers)
    if (out / "gw.json").exists():
        yield from gromov_wasserstein(json.loads((out / "gw.json").read_text()))
    files = [f"{name}.jsonl" for names in FILES.values() for name in names] + ["gw.json"]
    missing = [name for name in files if not (out / name).exists()]
    if missing:
        yield f"Not there, so left out: {', '.join(missing)}."


def main():
    if len(sys.argv) != 2:
        raise SystemExit("usage: summary.py OUT")
    out = pathlib.Path(sys.argv[1])
    text = "\n".join(summary(out)).rstrip() + "\n"
    (out / "summary.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
