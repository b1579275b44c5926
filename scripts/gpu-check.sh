#!/usr/bin/env bash
# Runs what scripts/gpu-pack.sh packed on this machine's GPU and writes results.json, summary.md and logs.tar.gz into OUT:
#
#   gpu-check.sh OUT [--seconds 570] [--no-gpu] [SECTION...] [-- TEST FILTER...]
#
#   tests        all tests, each of which compares the GPU with goldens or with the host device
#   steps        whole steps of the jobs that peers do too, of dense networks, in f32, bf16 and, of a Hopper GPU, in bf16 by
#                wgmma (DILT_WGMMA=1): steps.jsonl
#   torch-steps  PyTorch's side of them on the same GPU: torch-steps.jsonl
#   ops          the single layers and attentions that peers do too, in bf16 and by wgmma: ops.jsonl
#   torch-ops    PyTorch's side of all single operations: torch-ops.jsonl
#   compiled     its steps by torch.compile, bf16, as many as there is time for: compiled.jsonl
#   tickets      steps of random tickets and, of small networks, of several at a time: tickets.jsonl; the times that plans in
#                bf16 go by: tuning.json
#   sanitizers   the tests of kernels under compute-sanitizer's memcheck, racecheck, synccheck and initcheck, side by side,
#                where it is installed (COMPUTE_SANITIZER names it if it is not in PATH)
#   crossover    where masks begin to pay, layer by layer: crossover.csv, crossover.svg, and of both crossover-bf16 and, on a
#                Hopper GPU, crossover-bf16-wgmma
#   roofline     Nsight Compute's roofline of the five kernels that a step of ResNet-18 spends most time in, where ncu is
#                installed (NCU names it if it is not in PATH) and may read the GPU's counters: roofline.ncu-rep, roofline.txt
#   ops-f32      the single operations in f32, optimizers and selection too: ops-f32.jsonl
#   gw           Gromov-Wasserstein beside POT's on the same GPU, where POT and safetensors are installed: gw.json
#   criterion    the benches of all operations: criterion.log
#
# All in this order if none is named. --seconds are for all, from the start: a section is stopped after its own limit (`limits`
# below) or when they are over, and left out where next to none are left, which results.json says. The script ends some seconds
# after them at most.
#
# A lent GPU takes commands of 600 s, and is lent for 900. By estimate (measured on an H200: tests, 80 s; crossover in f32, 42 s)
# a first one has time for tests, steps, torch-steps, ops, torch-ops, and compiled for what is left of 570 s; a second one with
# --seconds 200 for tickets, or for crossover and roofline, or for ops-f32 and gw. sanitizers take a loan of their own.
#
# results.json and summary.md (summary.py: both sides beside each other) are written anew after every section, and everything
# is packed into logs.tar.gz, which a later run with the same OUT goes on with. What fails ends nothing else: a job that fails is
# a line with `error` in its section's file. Exits with 1 if anything failed. --no-gpu runs the tests alone, on the host device,
# to try the pack.
set -euo pipefail

all=(tests steps torch-steps ops torch-ops compiled tickets sanitizers crossover roofline ops-f32 gw criterion)
# Seconds that a section may take; of the sanitizers, each tool.
declare -A limits=([tests]=200 [steps]=200 [torch-steps]=250 [ops]=300 [torch-ops]=150 [compiled]=560 [tickets]=300
    [sanitizers]=560 [crossover]=200 [roofline]=150 [ops-f32]=300 [gw]=150 [criterion]=560)

usage="usage: gpu-check.sh OUT [--seconds 570] [--no-gpu] [$(tr ' ' '|' <<<"${all[*]}") ...] [-- TEST FILTER...]"
out=${1:?$usage}
shift
gpu=1 budget=570 sections=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    if [ "$1" = --no-gpu ]; then
        gpu=0
    elif [ "$1" = --seconds ] && [[ ${2:-} =~ ^[1-9][0-9]*$ ]]; then
        budget=$2
        shift
    elif [[ " ${all[*]} " == *" $1 "* ]]; then
        sections+=("$1")
    else
        echo "$usage" >&2
        exit 2
    fi
    shift
done
[ $# = 0 ] || shift
[ "${#sections[@]}" -gt 0 ] || sections=("${all[@]}")
[ "$gpu" = 1 ] || sections=(tests)

here=$(cd "$(dirname "$0")" && pwd)
[ -x "$here/bin/tests" ] || here=$(cd "$here/../target/gpu" && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
# Few files come back from a lent machine, so OUT has three and the others lie here.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ ! -e "$out/logs.tar.gz" ] || tar xzf "$out/logs.tar.gz" -C "$work"
export here work DILT_GOLDEN=$here/golden DILT_BIN=$here/bin/dilt DILT_CACHE=$work
unset DILT_REQUIRE_CUDA
[ "$gpu" = 0 ] || export DILT_REQUIRE_CUDA=1 DILT_BENCH_DEVICE=cuda

# ------------------------------------------------------------------------------------------------------------ what came out

query() { nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null | head -1 || true; }
clocks() { query clocks.sm,clocks.mem; }
text() { printf '"%s"' "$(tr -cd 'A-Za-z0-9 .,:;()_+/-' <<<"$1")"; }
wgmma=()
[ "$(query compute_cap)" != 9.0 ] || wgmma=(wgmma)
machine="
  \"commit\": $(text "$(cat "$here/commit")"),
  \"date\": $(text "$(date -u +%Y-%m-%d)"),
  \"gpu\": $(text "$(query name)"),
  \"driver\": $(text "$(query driver_version)"),
  \"compute_capability\": $(text "$(query compute_cap)"),
  \"highest_clock\": $(text "$(query clocks.max.sm)"),
  \"cuda\": $(text "$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9.]*\).*/\1/p' || true)"),"

rows=()
failed=0
# What came of NAME, whose output is in NAME.log: its exit code, when it began, and the clocks then. 77: left out, its last line
# says why.
note() {
    local name=$1 status=$2 took=$((SECONDS - $3)) before=$4 passed=true why="" tests
    if [ "$status" = 77 ]; then
        left_out "$name" "$(tail -1 "$work/$name.log")"
        return
    fi
    [ "$status" = 0 ] || passed=false failed=1
    # By SIGTERM, or by SIGKILL where that was not enough.
    if [ "$status" = 124 ] || [ "$status" = 137 ]; then
        why="stopped after $took s of at most $limit s"
        echo "$why" >>"$work/$name.log"
    fi
    tests=$(sed -n 's/^test result: [^.]*\. \([0-9]* passed; [0-9]* failed\).*/\1/p' "$work/$name.log" | head -1)
    rows+=("{\"name\": \"$name\", \"passed\": $passed, \"seconds\": $took, \"tests\": \"$tests\", \"why\": \"$why\",
     \"clocks\": $(text "$before; $(clocks)")}")
    echo "$name: passed $passed, $took s, $tests"
    [ "$passed" = true ] || tail -20 "$work/$name.log"
}
left_out() {
    rows+=("{\"name\": \"$1\", \"passed\": null, \"why\": $(text "left out: $2")}")
    echo "$1: left out: $2"
}

# OUT as of now. Each file is replaced at once, for the script may be killed at any time.
report() {
    local passed=true file IFS=,
    [ "$failed" = 0 ] || passed=false
    echo "{$machine \"passed\": $passed, \"checks\": [${rows[*]}]}" | python3 -m json.tool --indent 2 >"$work/results.json"
    if ! python3 "$here/summary.py" "$work" >"$work/summary.log" 2>&1; then
        failed=1
        cp "$work/summary.log" "$work/summary.md"
    fi
    tar czf "$out/logs.tar.gz.part" -C "$work" .
    mv "$out/logs.tar.gz.part" "$out/logs.tar.gz"
    for file in results.json summary.md; do
        cp "$work/$file" "$out/$file.part"
        mv "$out/$file.part" "$out/$file"
    done
}

# ----------------------------------------------------------------------------------------------------------------- sections

# Runs a command, or a function that is exported, with its output in NAME.log, for as long as its section may take.
check() {
    local name=$1 begin=$SECONDS before status=0
    shift
    before=$(clocks)
    timeout --kill-after=10 "$limit" bash -euo pipefail -c '"$@"' check "$@" >"$work/$name.log" 2>&1 || status=$?
    note "$name" "$status" "$begin" "$before"
}

# Runs a command that prints lines of JSON.
# shellcheck disable=SC2329  # check calls it
into() {
    local file=$work/$1
    shift
    "$@" >"$file"
}

# Tests that launch kernels themselves; those of files and commands have nothing to show to a sanitizer.
kernels=(array::memory array::more attention:: augment:: ceiling:: conv:: conv_sparse:: conv_wgmma:: device:: distances::
    dropout:: gelu:: gw:: layer_norm:: loss:: moments:: norm:: norm_before:: norm_pair:: norm_pool:: optimizer:: pointwise:: pool::
    prune:: row_map:: step:: tokens::)
sanitizers() {
    local sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || true)} folder tool begin=$SECONDS before
    for folder in "${CUDA_HOME:-/usr/local/cuda}"/bin "${CUDA_HOME:-/usr/local/cuda}"/compute-sanitizer; do
        [ -n "$sanitizer" ] || [ ! -x "$folder/compute-sanitizer" ] || sanitizer=$folder/compute-sanitizer
    done
    if [ -z "$sanitizer" ]; then
        left_out sanitizers "compute-sanitizer is not installed"
        return
    fi
    [ "$#" -gt 0 ] || set -- "${kernels[@]}"
    before=$(clocks)
    local -A pids
    for tool in memcheck racecheck synccheck initcheck; do
        # One thread: a report then stands beside its test. Errors of the driver that a program asks for are its own affair.
        DILT_TEST_DEVICES=cuda timeout --kill-after=10 "$limit" "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 \
            --report-api-errors no "$here/bin/tests" --test-threads=1 "$@" >"$work/$tool.log" 2>&1 &
        pids[$tool]=$!
    done
    for tool in memcheck racecheck synccheck initcheck; do
        local status=0
        wait "${pids[$tool]}" || status=$?
        note "$tool" "$status" "$begin" "$before"
    done
}

# Each ends by itself: what fails in one says nothing of the others.
# shellcheck disable=SC2329  # check calls it
crossover() {
    local status=0
    "$here/bin/bench-crossover" --out "$work" || status=1
    "$here/bin/bench-crossover" --precision bf16 --out "$work" || status=1
    if [ "$#" -gt 0 ]; then
        DILT_WGMMA=1 "$here/bin/bench-crossover" --precision bf16 --out "$work" || status=1
    fi
    return "$status"
}

# shellcheck disable=SC2329  # check calls it
tickets() {
    local status=0
    "$@" || status=1
    "$here/bin/bench-step" --json || status=1
    return "$status"
}

# Under ncu, all launches of those kernels in one step: that before it is captured, which is the first with them.
# shellcheck disable=SC2329  # check calls it
roofline() {
    local ncu=${NCU:-$(command -v ncu || true)} folder=${CUDA_HOME:-/usr/local/cuda}/bin status=0 longest
    local bench=("$DILT_BIN" bench --model resnet18_cifar --batch 128 --runs 1 -q --device cuda)
    [ -n "$ncu" ] || [ ! -x "$folder/ncu" ] || ncu=$folder/ncu
    [ -n "$ncu" ] || { echo "ncu is not installed" && return 77; }
    # Their names, then the number of their launches.
    mapfile -t longest < <("${bench[@]}" --kernels --json | python3 -c '
import json, sys
longest = json.load(sys.stdin)["kernels"][:5]
print("|".join(kernel["name"] for kernel in longest), sum(kernel["launches"] for kernel in longest), sep="\n")')
    [ "${#longest[@]}" = 2 ] || { echo "dilt bench --kernels failed" && return 1; }
    "$ncu" --set roofline --clock-control none --kernel-name "regex:^(${longest[0]})\$" --launch-count "${longest[1]}" \
        --force-overwrite --export "$work/roofline.ncu-rep" "${bench[@]}" || status=1
    ! grep -q ERR_NVGPUCTRPERM "$work/roofline.log" ||
        { echo "ncu may not read the counters of this GPU (ERR_NVGPUCTRPERM)" && return 77; }
    [ "$status" = 0 ] && "$ncu" --import "$work/roofline.ncu-rep" --page details >"$work/roofline.txt"
}

# shellcheck disable=SC2329  # check calls it
gw() {
    python3 -c 'import ot.batch, safetensors' ||
        { echo "POT (import ot.batch) or safetensors is not installed" && return 77; }
    python3 "$here/peers/pot_gw.py" "$DILT_BIN" --device cuda --threads "$(nproc)" --rounds 3 --out "$work/gw.json"
}
export -f into crossover tickets roofline gw

dilt=(python3 "$here/peers/dilt_jobs.py" "$DILT_BIN" --device cuda)
torch=(python3 "$here/peers/torch_gpu.py")
section() {
    local name=$1
    shift
    case "$name" in
    tests) check tests "$here/bin/tests" "$@" ;;
    steps) check steps into steps.jsonl "${dilt[@]}" --kind step --precision f32 bf16 "${wgmma[@]}" ;;
    torch-steps) check torch-steps into torch-steps.jsonl "${torch[@]}" --steps ;;
    ops) check ops into ops.jsonl "${dilt[@]}" --precision bf16 "${wgmma[@]}" ;;
    torch-ops) check torch-ops into torch-ops.jsonl "${torch[@]}" --layers --attention --optimizer --prune ;;
    compiled) check compiled into compiled.jsonl "${torch[@]}" --compiled ;;
    tickets) check tickets into tickets.jsonl tickets "${dilt[@]}" --kind step --tickets ;;
    sanitizers) sanitizers "$@" ;;
    crossover) check crossover crossover "${wgmma[@]}" ;;
    roofline | gw) check "$name" "$name" ;;
    ops-f32) check ops-f32 into ops-f32.jsonl "${dilt[@]}" --precision f32 ;;
    criterion) check criterion "$here/bin/bench-ops" --bench --warm-up-time 0.1 --measurement-time 0.3 ;;
    esac
}

for name in "${sections[@]}"; do
    left=$((budget - SECONDS))
    limit=$((limits[$name] < left ? limits[$name] : left))
    if [ "$left" -gt $((budget / 20)) ]; then
        section "$name" "$@"
    else
        left_out "$name" "no time left, $SECONDS of $budget s have passed"
    fi
    report
done
cat "$work/summary.log"
exit "$failed"
