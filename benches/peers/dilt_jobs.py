#!/usr/bin/env python3
"""dilt's side of the jobs of jobs.py: `dilt bench` on each network, dense or of tickets, and `dilt bench --op` on each single
operation.

    python3 benches/peers/dilt_jobs.py DILT [--kind KIND...] [--precision f32|bf16|wgmma...] [--tickets] [--only TEXT]
        [--device auto] [--runs N]

Prints a line of JSON for each: of a network what `dilt bench --json` says, with the times of all kernels, of an operation its
time, with the keys of torch_gpu.py's and with those of `dilt bench --op`; for what fails one with `error`. The rest goes on, and
the exit code is 1 at the end. All jobs are done in one precision before the next; wgmma is bf16 with DILT_WGMMA=1.

With --tickets, of networks: the same network several times at a time, where it is small, then random tickets from half to a
hundredth of its weights; of large ones two, which take long. Runs of several at a time are few, for each is one of all of them.

PyTorch is not needed: the jobs are those of the committed file. Similarity has a script of its own, pot_gw.py.
"""

import argparse
import itertools
import json
import os
import pathlib
import subprocess

OPERATIONS = ["conv", "linear", "attention", "optimizer", "prune"]
# Of a forward pass: more is a large network.
LARGE_FLOP = 2e11
AT_A_TIME = [4, 16]
# Whether the network is large.
SPARSITIES = {False: [0.5, 0.8, 0.9, 0.95, 0.98, 0.99], True: [0.9, 0.98]}


def steps(job, precision, tickets):
    """Options of `dilt bench` for a network, or for its tickets."""
    bench = {"model": job["model"], "batch": job["batch"], "runs": 20, "kernels": True}
    if not tickets:
        return [bench]
    large = job["flop"][0] > LARGE_FLOP
    several = [] if large else [{"tickets": count, "runs": 3} for count in AT_A_TIME]
    # Without a table of rates for its precision a plan multiplies densely.
    tune = {} if precision == "f32" else {"tune": True}
    random = [{"random-ticket": sparsity, **tune} for sparsity in SPARSITIES[large]]
    return [bench | own for own in several + random]


def operations(job, precision):
    """Options of `dilt bench` for each operation of a job that there is in this precision: weights that are trained, and what is
    done to them, are f32; by wgmma go products of layers alone."""
    weights, layer = job["kind"] in ("optimizer", "prune"), job["kind"] in ("conv", "linear")
    if (weights and precision != "f32") or (precision == "wgmma" and not layer):
        return []
    shape = ",".join(f"{key}={size}" for key, size in job["shape"].items())
    return [{"op": op, "shape": shape, "runs": 30} for op in job["op"]]


def measured(dilt, precision, bench):
    """What `dilt bench` says, or its error."""
    environment = os.environ | ({"DILT_WGMMA": "1"} if precision == "wgmma" else {})
    bench = bench | {"precision": "bf16" if precision == "wgmma" else precision}
    words = [[f"--{key}"] if value is True else [f"--{key}", str(value)] for key, value in bench.items()]
    command = [dilt, "bench", *itertools.chain(*words), "--json", "-q"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    if done.returncode == 0:
        return json.loads(done.stdout)
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    # A panic says where first.
    return {"error": " ".join(said[:2]), "command": " ".join(command[1:])}


def lines(options):
    """What is printed."""
    jobs = map(json.loads, pathlib.Path(__file__).with_name("jobs.jsonl").read_text().splitlines())
    jobs = [job for job in jobs if job["kind"] in options.kind and options.only in job["name"]]
    common = {"device": options.device} | ({"runs": options.runs} if options.runs else {})
    for precision, job in itertools.product(options.precision, jobs):
        of_step = job["kind"] == "step"
        for bench in steps(job, precision, options.tickets) if of_step else operations(job, precision):
            result = measured(options.dilt, precision, bench | common)
            row = {"job": job["name"], "precision": precision} | ({} if of_step else {"op": bench["op"]})
            if "error" in result:
                yield row | result
            elif of_step:
                yield result
            else:
                yield row | {key: result[key] for key in ("precision", "device", "ceilings")} | result["rows"][0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dilt", help="the program")
    parser.add_argument("--kind", nargs="*", choices=["step", *OPERATIONS], default=OPERATIONS,
                        help="of jobs; all single operations if not given")
    parser.add_argument("--precision", nargs="*", choices=["f32", "bf16", "wgmma"], default=["f32", "bf16"])
    parser.add_argument("--tickets", action="store_true")
    parser.add_argument("--only", default="", metavar="TEXT", help="jobs whose names contain it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runs", type=int, help="20 of steps, 3 of several at a time, 30 of operations if not given")
    options = parser.parse_args()
    failed = False
    for line in lines(options):
        failed |= "error" in line
        print(json.dumps(line), flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
