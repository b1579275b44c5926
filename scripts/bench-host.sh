#!/usr/bin/env bash
# Times training steps (ResNet-20 at batch 128, DeiT-Ti at batch 16, f32) of dilt and of PyTorch on the same two cores,
# A B A B, and prints the ratios of their medians. Writes machine, versions, commit and all samples to benches/results/host-<date>.json.
#
#   scripts/bench-host.sh [rounds, 3 if not given]
#
# THREADS (2), CORES (0,1) and PYTHON (/usr/bin/python3, which needs torch and torchvision) can be set in the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
threads=${THREADS:-2} cores=${CORES:-0,1} python=${PYTHON:-/usr/bin/python3} rounds=${1:-3}
bench=$(cargo bench --bench step --no-run --message-format=json |
    "$python" -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] == "step":
        print(message["executable"])')
samples=$(mktemp)
trap 'rm -f "$samples"' EXIT
round=1
while [ "$round" -le "$rounds" ]; do
    RAYON_NUM_THREADS=$threads DILT_BENCH_DEVICE=host taskset -c "$cores" "$bench" --json | tee -a "$samples"
    for model in resnet20 deit_tiny; do
        taskset -c "$cores" "$python" benches/peers/torch_cpu.py --model "$model" --threads "$threads" | tee -a "$samples"
    done
    round=$((round + 1))
done
out=benches/results/host-$(date -u +%Y-%m-%d).json
mkdir -p benches/results
COMMIT=$(git rev-parse HEAD) COMMAND="scripts/bench-host.sh $rounds" LOAD=$(cut -d' ' -f1-3 /proc/loadavg) \
    CORES=$cores "$python" - "$samples" "$out" <<'PYTHON'
import datetime, json, os, statistics, subprocess, sys

samples = [json.loads(line) for line in open(sys.argv[1])]
middle = lambda runs, key: round(statistics.median(run[key] for run in runs), 2)
machine = dict(line.split(":", 1) for line in subprocess.check_output("lscpu", text=True).splitlines() if ":" in line)
result = {
    "command": os.environ["COMMAND"],
    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    "commit": os.environ["COMMIT"],
    "machine": {key: machine.get(key, "").strip() for key in ("Model name", "CPU(s)", "L1d cache", "L2 cache")},
    "cores": os.environ["CORES"],
    "load_average_after": os.environ["LOAD"],
    "steps": {},
    "samples": samples,
}
for what in sorted({s["what"] for s in samples if "torch" in s}):
    ours, theirs = ([s for s in samples if s["what"] == what and ("torch" in s) == torch] for torch in (False, True))
    step = {
        "wall_ms": {"dilt": middle(ours, "median_ms"), "torch": middle(theirs, "median_ms")},
        "least_cpu_ms": {"dilt": min(r["min_cpu_ms"] for r in ours), "torch": min(r["min_cpu_ms"] for r in theirs)},
    }
    for kind in ("wall_ms", "least_cpu_ms"):
        step["speed_over_torch_" + kind] = round(step[kind]["torch"] / step[kind]["dilt"], 3)
    result["steps"][what] = step
with open(sys.argv[2], "w") as file:
    json.dump(result, file, indent=1)
    file.write("\n")
print(json.dumps({key: value for key, value in result.items() if key != "samples"}, indent=1))
print("written to", sys.argv[2])
PYTHON
