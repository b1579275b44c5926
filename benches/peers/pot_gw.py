#!/usr/bin/env python3
"""Gromov-Wasserstein between all pairs of layers: dilt beside POT's batched solver, on the same cores, or on the same GPU.

    python3 benches/peers/pot_gw.py DILT [--device host|cuda] [--probes 256] [--threads 2] [--rounds 2] [--out FILE]

Needs POT 0.9.7, numpy and safetensors; with --device cuda, PyTorch too: where it has CUDA, POT works on its tensors there, else
on the cores, which `pot_device` says. Eight layers see the same probes (representations.py). dilt's time is that of `dilt
similarity` from its start to its end, distances, CKA, modules and exact refinement included; POT's that of
ot.batch.solve_gromov_batch alone, f64, distance matrices given, where they are needed, from the product: with its defaults, whose
tolerance of 1e-5 for a plan of 1/n^2 ends most pairs after the first steps, and with --tolerance. POT's plans are rounded to
feasible ones (Altschuler et al. 2017) before their value is taken, as a plan with wrong sums may have a value below any
coupling's. Runs alternate; times are medians. Prints JSON.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

DEFAULT_PROBES = 256  # of the job that jobs.jsonl has

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("dilt", help="the program")
arguments.add_argument("--device", choices=["host", "cuda"], default="host")
arguments.add_argument("--probes", type=int, default=DEFAULT_PROBES)
arguments.add_argument("--threads", type=int, default=2)
arguments.add_argument("--rounds", type=int, default=1)
arguments.add_argument("--tolerance", type=float, default=1e-7, help="of POT, beside its default")
arguments.add_argument("--out", help="write the JSON to this file too")
arguments = arguments.parse_args()
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[variable] = str(arguments.threads)

import numpy as np  # noqa: E402
import ot  # noqa: E402
import ot.batch  # noqa: E402
from representations import job, layers  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402


def distances(x):
    c = np.sqrt(np.maximum(ot.dist(x.astype(float), x.astype(float), metric="sqeuclidean"), 0))
    np.fill_diagonal(c, 0)
    return c / c.max()


def rounded(t):
    p, q = 1 / t.shape[0], 1 / t.shape[1]
    t = t * np.minimum(1, p / t.sum(1))[:, None]
    t = t * np.minimum(1, q / t.sum(0))
    a, b = p - t.sum(1), q - t.sum(0)
    return t + np.outer(a, b) / max(a.sum(), 1e-300)


def value(c1, c2, t):
    return float((c1**2).mean() + (c2**2).mean() - 2 * ((c1 @ t @ c2) * t).sum())


class Cores:
    """POT on numpy's arrays."""

    name = "cpu"

    @staticmethod
    def there(array):
        return array

    @staticmethod
    def here(array):
        return array

    @staticmethod
    def wait():
        pass


class Gpu:
    """POT on PyTorch's tensors."""

    name = "cuda"

    @staticmethod
    def there(array):
        return torch.from_numpy(array).cuda()

    @staticmethod
    def here(tensor):
        return tensor.cpu().numpy()

    @staticmethod
    def wait():
        torch.cuda.synchronize()


def pot(machine, matrices, pairs, **settings):
    first, second = (machine.there(np.stack([matrices[pair[side]] for pair in pairs])) for side in (0, 1))
    machine.wait()
    begun = time.perf_counter()
    plans = ot.batch.solve_gromov_batch(first, second, symmetric=True, **settings).plan
    machine.wait()
    seconds = time.perf_counter() - begun
    plans = machine.here(plans)
    return seconds, [value(matrices[i], matrices[j], rounded(plan)) for (i, j), plan in zip(pairs, plans)]


def dilt(file, pairs):
    begun = time.perf_counter()
    command = [arguments.dilt, "similarity", "--representations", file, "--device", arguments.device, "--json", "-q"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    seconds = time.perf_counter() - begun
    found = json.loads(done.stdout)
    place = {name: index for index, name in enumerate(found["layers"])}
    return seconds, [found["gw"][place[names[i]]][place[names[j]]] for i, j in pairs]


machine = Cores
if arguments.device == "cuda":
    import torch

    machine = Gpu if torch.cuda.is_available() else Cores
own = job(arguments.probes)
committed = [json.loads(line) for line in pathlib.Path(__file__).with_name("jobs.jsonl").read_text().splitlines()]
if arguments.probes == DEFAULT_PROBES and own not in committed:
    raise SystemExit(f"jobs.jsonl has nothing like {own}; not timed")
made = layers(arguments.probes)
names = list(made)
matrices = [distances(made[name]) for name in names]
pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
with tempfile.TemporaryDirectory() as folder:
    file = os.path.join(folder, "layers.safetensors")
    save_file(made, file)
    runs = {
        "dilt": lambda: dilt(file, pairs),
        "pot_default": lambda: pot(machine, matrices, pairs),
        "pot": lambda: pot(machine, matrices, pairs, tol=arguments.tolerance),
    }
    # Loads what POT needs.
    pot(machine, matrices, pairs, max_iter=1)
    times, values = {name: [] for name in runs}, {}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            seconds, values[name] = run()
            times[name].append(seconds)
            print(f"{name}: {seconds:.2f} s", file=sys.stderr)
mine = values.pop("dilt")


def beside(name):
    ratios = [own / max(theirs, 1e-12) for own, theirs in zip(mine, values[name])]
    return {
        "times_as_fast": statistics.median(times[name]) / statistics.median(times["dilt"]),
        "value_ratio": {"median": statistics.median(ratios), "most": max(ratios), "least": min(ratios)},
        "not_above": sum(ratio <= 1 + 1e-6 for ratio in ratios),
    }


result = {
    "probes": arguments.probes,
    "pairs": len(pairs),
    "threads": arguments.threads,
    "device": arguments.device,
    "pot_device": machine.name,
    "tolerance": arguments.tolerance,
    "seconds": times,
    "beside": {name: beside(name) for name in values},
    "values": [
        {"layers": [names[i], names[j]], "dilt": own, **{name: values[name][at] for name in values}}
        for at, ((i, j), own) in enumerate(zip(pairs, mine))
    ],
    "pot": ot.__version__,
    "numpy": np.__version__,
    "python": platform.python_version(),
    "cpu": next((line.split(":")[1].strip() for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")), ""),
}
print(json.dumps(result))
if arguments.out:
    pathlib.Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")
