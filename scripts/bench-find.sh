#!/usr/bin/env bash
# The whole of `dilt find` on real images: disentangled tickets of ResNet-20 on subsets of CIFAR-10 and Fashion-MNIST, on the
# host device, each in under 15 minutes on two cores. Writes commands, times, machine, commit and results to
# benches/results/find-host-<date>.json.
#
#   scripts/bench-find.sh CIFAR10 [FASHION_MNIST]
#
# The folders of the data sets; Fashion-MNIST is Debian's package dataset-fashion-mnist. CARGO_TARGET_DIR is honoured.
set -euo pipefail
cd "$(dirname "$0")/.."
cifar10=${1:?the folder of CIFAR-10, binary version} fashion=${2:-/usr/share/datasets/fashion-mnist}
cargo build --release --quiet
exec python3 - "${CARGO_TARGET_DIR:-target}/release/dilt" "$cifar10" "$fashion" <<'PYTHON'
import datetime, json, os, resource, subprocess, sys, tempfile, time

program, cifar10, fashion = sys.argv[1:]
# 3 levels of both searches and 18 tickets are 31 times the work of one training: 124,000 images of forward and backward.
options = ("--model resnet20 --device host --limit 1000 --epochs 4 --batch 32 --schedule cosine --warmup 0.5 "
           "--augment none --levels 3 --prune 0.5 --seeds 1").split()
today = datetime.date.today().isoformat()
experiments = []
for name, folder in [("cifar10", cifar10), ("idx", fashion)]:
    with tempfile.TemporaryDirectory() as runs:
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        output = subprocess.run([program, "find", "--data", f"{name}={folder}", *options, "--runs", runs, "--json"],
                                check=True, stdout=subprocess.PIPE, text=True).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = json.loads(output)
    result.pop("run")
    for ticket in result["tickets"]:
        ticket.pop("files")
    experiments.append({
        "command": " ".join(["dilt find --data", f"{name}=DIR", *options]),
        "wall_s": round(time.monotonic() - begun, 1),
        "processor_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "result": result,
    })
machine = dict(line.split(":", 1) for line in subprocess.check_output("lscpu", text=True).splitlines() if ":" in line)
path = f"benches/results/find-host-{today}.json"
with open(path, "w") as file:
    json.dump({
        "command": "scripts/bench-find.sh CIFAR10",
        "date": today,
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
        "machine": {key: machine.get(key, "").strip() for key in ("Model name", "CPU(s)", "L1d cache", "L2 cache")},
        "load_average_after": os.getloadavg(),
        "experiments": experiments,
    }, file, indent=1)
    file.write("\n")
for experiment in experiments:
    print(experiment["command"], f"{experiment['wall_s']} s")
    for ticket in experiment["result"]["tickets"]:
        at = f" at {ticket['matched']}" if ticket["matched"] else ""
        print(f"  {ticket['name'] + at:24} {ticket['density']:.4f}  {100 * ticket['top1']:.2f} %")
print("written to", path)
PYTHON
