#!/usr/bin/env python3
"""The tables of src/nn/paths.rs from what benches/crossover.rs has measured.

    python3 scripts/fit_rates.py CROSSOVER.csv [--gpu]

Of each way and pass the costs of a multiply-add, of a written value and, with --gpu, of a launch and of a step, in
picoseconds: none below 0, least squares of relative errors over all cells but those whose pass multiplies nothing, which
take next to no time. Prints them as Rust, how far off they are, and what the plan makes of the measured cells by them: how
much faster than dense its passes are, and those that are slower. Needs numpy.

Of a run of gpu-check.sh: tar xzf OUT/logs.tar.gz -C FOLDER, then FOLDER/crossover.csv, crossover-bf16.csv and, of a Hopper
GPU, crossover-bf16-wgmma.csv.
"""

import argparse
import collections
import csv
import itertools
import math
import re

import numpy

PASSES = ["forward", "input_gradient", "weight_gradient"]
WAYS = ["dense", "groups", "direct"]


def layer(name):
    """Rows and written values of each pass of a layer of benches/layers.rs, and the columns that each weight is multiplied with."""
    if match := re.fullmatch(r"conv 3x3 (\d+)x(\d+)x\d+ to (\d+)(?: by (\d))?", name):
        c, image, k, stride = (int(size or 1) for size in match.groups())
        outputs = ((image - 1) // stride + 1) ** 2 * 128
        return {"linear": False, "rows": (k, c, k), "written": (k * outputs, c * image**2 * 128, 0), "columns": outputs}
    c, k, samples = (int(size or 8) for size in re.fullmatch(r"linear (\d+) to (\d+)(?: \((\d+) samples\))?", name).groups())
    columns = samples * 200
    return {"linear": True, "rows": (k, c, k), "written": (k * columns, c * columns, 0), "columns": columns}


def multiplied(row, which):
    return int(row["multiplied_input_gradient" if which == 1 else "multiplied_forward"])


def features(row, which):
    """What each cost is multiplied with."""
    own, count = layer(row["layer"]), multiplied(row, which)
    return [count * own["columns"], own["written"][which], 1, count / own["rows"][which]]


def picoseconds(row, which):
    return 1e9 * float(row[f"{PASSES[which]}_ms"])


def fit(rows, which, free):
    """Costs, root mean square and largest relative error; only `free` of the costs may differ from 0."""
    used = [row for row in rows if picoseconds(row, which) > 0 and multiplied(row, which) > 0]
    shares = numpy.array([[f / picoseconds(row, which) for f in features(row, which)] for row in used])
    best = None
    for count in range(1, len(free) + 1):
        for some in itertools.combinations(free, count):
            if not shares[:, some].any(axis=0).all():
                continue
            costs = numpy.zeros(4)
            costs[list(some)] = numpy.linalg.lstsq(shares[:, some], numpy.ones(len(used)), rcond=None)[0]
            errors = shares @ costs - 1
            if costs.min() >= 0 and (best is None or errors @ errors < best[1] @ best[1]):
                best = costs, errors
    costs, errors = best
    return costs, math.sqrt(errors @ errors / len(errors)), abs(errors).max()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", metavar="CROSSOVER.csv")
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    with open(options.csv, newline="") as file:
        rows = list(csv.DictReader(file))
    free, worth = ([0, 1, 2, 3], 0.85) if options.gpu else ([0, 1], 0.9)

    tables = {}
    for linear in (False, True):
        own = [row for row in rows if layer(row["layer"])["linear"] == linear]
        if not own:
            continue
        print("LINEAR" if linear else "FILTERS")
        for way in WAYS:
            fits = [fit([row for row in own if row["way"] == way], which, free) for which in range(3)]
            tables[linear, way] = [costs for costs, _, _ in fits]
            costs = ", ".join("[" + ", ".join(f"{cost:.4g}" for cost in costs) + "]" for costs, _, _ in fits)
            off = ", ".join(f"{mean:.0%} ({most:.0%})" for _, mean, most in fits)
            print(f"    rate(Way::{way.title()}, [{costs}]),  // off by {off}")

    cells = collections.defaultdict(dict)
    for row in rows:
        cells[row["layer"], row["mask"], row["sparsity"]][row["way"]] = row
    gains, possible, slower = [], [], []
    for cell, ways in cells.items():
        for which in range(3):
            taken = {way: picoseconds(row, which) for way, row in ways.items()}
            if not all(taken.values()) or not all(multiplied(row, which) for row in ways.values()):
                continue
            def predicted(way):
                costs = tables[layer(cell[0])["linear"], way][which]
                return costs @ features(ways[way], which) * (worth if way == "dense" else 1)
            way = min(ways, key=predicted)
            gains.append(taken["dense"] / taken[way])
            possible.append(taken["dense"] / min(taken.values()))
            if gains[-1] < 1:
                slower.append((gains[-1], *cell, PASSES[which], way))
    mean = [math.exp(sum(map(math.log, each)) / len(each)) for each in (gains, possible)]
    print(f"{len(gains)} passes, {mean[0]:.2f} times as fast as dense by the table, {mean[1]:.2f} by the best way of each "
          "(geometric means)")
    for gain, *cell in sorted(slower):
        print(f"    {gain:.2f} of dense: {', '.join(cell)}")


if __name__ == "__main__":
    main()
