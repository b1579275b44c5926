#!/usr/bin/env python3
"""dilt's side of the jobs of jobs.py that are single operations: `dilt bench --op` on each, in f32, and in bf16 where it makes
a difference.

    python3 benches/peers/dilt_jobs.py DILT [--device auto] [--runs 30] [--only TEXT] [--kind KIND...] [--precision P...]

Prints a line of JSON for each time, with the keys of torch_gpu.py's and with those of `dilt bench --op`. PyTorch is not
needed: the jobs are those of the committed file. Similarity has a script of its own, pot_gw.py.
"""

import argparse
import json
import pathlib
import subprocess


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dilt", help="the program")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runs", default="30")
    parser.add_argument("--only", default="", metavar="TEXT", help="jobs whose names contain it")
    parser.add_argument("--kind", nargs="*", help="kinds of jobs, as the file has them; all that there are if not given")
    parser.add_argument("--precision", nargs="*", default=["f32", "bf16"])
    options = parser.parse_args()
    for job in map(json.loads, pathlib.Path(__file__).with_name("jobs.jsonl").read_text().splitlines()):
        if job["kind"] in ("step", "similarity") or options.only not in job["name"]:
            continue
        if options.kind and job["kind"] not in options.kind:
            continue
        shape = ",".join(f"{key}={size}" for key, size in job["shape"].items())
        # Weights that are trained, and what is done to them, are f32 in both.
        both = job["kind"] not in ("optimizer", "prune")
        for precision in [precision for precision in options.precision if both or precision == "f32"]:
            for op in job["op"]:
                command = [options.dilt, "bench", "--op", op, "--shape", shape, "--precision", precision, "--runs", options.runs,
                           "--device", options.device, "--json", "-q"]
                result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
                row = {"job": job["name"], "op": op, "precision": precision, **result["rows"][0]}
                print(json.dumps(row | {key: result[key] for key in ("device", "ceilings")}), flush=True)


if __name__ == "__main__":
    main()
