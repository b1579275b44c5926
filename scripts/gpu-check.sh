#!/usr/bin/env bash
# Runs what scripts/gpu-pack.sh packed on this machine's GPU and writes logs and results.json into OUT:
#
#   gpu-check.sh OUT [--no-gpu] [SECTION...] [-- TEST FILTER...]
#
#   tests       all tests, each of which compares the GPU with goldens or with the host device
#   sanitizers  the tests of kernels under compute-sanitizer's memcheck, racecheck, synccheck and initcheck, side by side,
#               where it is installed (COMPUTE_SANITIZER names it if it is not in PATH)
#   crossover   where masks begin to pay, layer by layer: crossover.csv, crossover.svg, and of both crossover-bf16 and, on a
#               Hopper GPU, crossover-bf16-wgmma
#   steps       whole steps of the jobs that peers do too, dense and of tickets, in f32 and bf16, small ones several at a time
#               too, of a Hopper GPU the dense ones in bf16 by wgmma too (DILT_WGMMA=1): steps.jsonl; the times that plans in
#               bf16 go by: tuning.json
#   ops         the single operations that peers do too, products by wgmma too: ops.jsonl; then the benches of all operations:
#               ops.log
#   peers       PyTorch's side of steps and ops on the same GPU: torch.jsonl
#   compiled    its steps by torch.compile, bf16, as many as there is time for: compiled.jsonl
#   roofline    Nsight Compute's roofline of the five kernels that a step of ResNet-18 spends most time in, where ncu is
#               installed (NCU names it if it is not in PATH) and may read the GPU's counters: roofline.ncu-rep, roofline.txt
#
# All sections if none is named; each is stopped after its own limit, at most ten minutes (`limits` below). At the end
# summary.py prints what came out, both sides beside each other, and writes it to OUT/summary.md. --no-gpu runs the tests
# alone, on the host device, to try the pack. Fails if anything fails.
set -euo pipefail

usage="usage: gpu-check.sh OUT [--no-gpu] [tests|sanitizers|crossover|steps|ops|peers|compiled|roofline ...] [-- TEST FILTER...]"
out=${1:?$usage}
shift
gpu=1
if [ "${1:-}" = --no-gpu ]; then
    gpu=0
    shift
fi
sections=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in
    tests | sanitizers | crossover | steps | ops | peers | compiled | roofline) sections+=("$1") ;;
    *)
        echo "$usage" >&2
        exit 2
        ;;
    esac
    shift
done
[ $# = 0 ] || shift
[ "${#sections[@]}" -gt 0 ] || sections=(tests sanitizers crossover steps ops peers compiled roofline)
[ "$gpu" = 1 ] || sections=(tests)

here=$(cd "$(dirname "$0")" && pwd)
[ -x "$here/bin/tests" ] || here=$(cd "$here/../target/gpu" && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
query() { nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null | head -1 || true; }
hopper=0
[ "$(query compute_cap)" != 9.0 ] || hopper=1
export hopper here out DILT_GOLDEN=$here/golden DILT_BIN=$here/bin/dilt DILT_CACHE=$out
unset DILT_REQUIRE_CUDA
[ "$gpu" = 0 ] || export DILT_REQUIRE_CUDA=1 DILT_BENCH_DEVICE=cuda

rows=()
failed=0
# Notes whether what wrote OUT/NAME.log has passed.
note() {
    local name=$1 status=$2 seconds=$3 passed=true tests
    [ "$status" = 0 ] || passed=false failed=1
    tests=$(sed -n 's/^test result: [^.]*\. \([0-9]* passed; [0-9]* failed\).*/\1/p' "$out/$name.log" | head -1)
    rows+=("{\"name\": \"$name\", \"passed\": $passed, \"seconds\": $seconds, \"tests\": \"$tests\"}")
    echo "$name: passed $passed, $seconds s, $tests"
    [ "$passed" = true ] || tail -20 "$out/$name.log"
}
# Seconds that a section may take; of the sanitizers, each tool.
declare -A limits=([tests]=560 [sanitizers]=560 [crossover]=300 [steps]=560 [ops]=560 [peers]=560 [compiled]=560 [roofline]=300)
# Runs a command, or a function that is exported, with its output in OUT/NAME.log, for as long as its section may take.
check() {
    local name=$1 start=$SECONDS status=0
    shift
    timeout --kill-after=10 "${limits[$name]}" bash -euo pipefail -c '"$@"' check "$@" >"$out/$name.log" 2>&1 || status=$?
    [ "$status" != 124 ] || echo "stopped after ${limits[$name]} s, the section's limit" >>"$out/$name.log"
    note "$name" "$status" $((SECONDS - start))
}

# Tests that launch kernels themselves; those of files and commands have nothing to show to a sanitizer.
kernels=(array::memory array::more attention:: augment:: ceiling:: conv:: conv_sparse:: conv_wgmma:: device:: distances::
    dropout:: gelu:: gw:: layer_norm:: loss:: moments:: norm:: norm_before:: norm_pair:: norm_pool:: optimizer:: pointwise:: pool::
    prune:: row_map:: step:: tokens::)
sanitizers() {
    local sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || true)} folder tool start=$SECONDS
    for folder in "${CUDA_HOME:-/usr/local/cuda}"/bin "${CUDA_HOME:-/usr/local/cuda}"/compute-sanitizer; do
        [ -n "$sanitizer" ] || [ ! -x "$folder/compute-sanitizer" ] || sanitizer=$folder/compute-sanitizer
    done
    if [ -z "$sanitizer" ]; then
        echo "compute-sanitizer: left out, it is not installed"
        return
    fi
    [ "$#" -gt 0 ] || set -- "${kernels[@]}"
    local -A pids
    for tool in memcheck racecheck synccheck initcheck; do
        # One thread: a report then stands beside its test. Errors of the driver that a program asks for are its own affair.
        DILT_TEST_DEVICES=cuda timeout --kill-after=10 "${limits[sanitizers]}" "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 \
            --report-api-errors no "$here/bin/tests" --test-threads=1 "$@" >"$out/$tool.log" 2>&1 &
        pids[$tool]=$!
    done
    for tool in memcheck racecheck synccheck initcheck; do
        local status=0
        wait "${pids[$tool]}" || status=$?
        [ "$status" != 124 ] || echo "stopped after ${limits[sanitizers]} s, the section's limit" >>"$out/$tool.log"
        note "$tool" "$status" $((SECONDS - start))
    done
}

# shellcheck disable=SC2329  # check calls it
crossover() {
    "$here/bin/bench-crossover" --out "$out" || return 1
    "$here/bin/bench-crossover" --precision bf16 --out "$out" || return 1
    [ "$hopper" = 0 ] || DILT_WGMMA=1 "$here/bin/bench-crossover" --precision bf16 --out "$out"
}

# A line of JSON of what one command prints.
# shellcheck disable=SC2329  # steps calls it
line() { "$@" | python3 -c 'import json, sys; print(json.dumps(json.load(sys.stdin)))'; }

# Dense, of small networks several at a time too; then random tickets from half to a hundredth; of ResNet-50 two of them, which
# take long.
# shellcheck disable=SC2329  # check calls it
steps() {
    local model batch at_a_time tickets sparsity sparsities precision bench jobs
    jobs=$(python3 -c '
import json, sys
for job in map(json.loads, open(sys.argv[1])):
    if job["kind"] == "step":
        large = job["flop"][0] > 1e12
        tickets, sparsities = ("-", [0.9, 0.98]) if large else ("4,16", [0.5, 0.8, 0.9, 0.95, 0.98, 0.99])
        print(job["model"], job["batch"], tickets, *sparsities)' \
        "$here/peers/jobs.jsonl") || return 1
    while read -r model batch at_a_time sparsities; do
        for precision in f32 bf16; do
            bench=(bench --model "$model" --batch "$batch" --precision "$precision" --runs 20 --kernels -q --json --device cuda)
            # Without a table of rates a plan multiplies densely.
            [ "$precision" = f32 ] || bench+=(--tune)
            line "$DILT_BIN" "${bench[@]}" || return 1
            if [ "$precision" = bf16 ] && [ "$hopper" = 1 ]; then
                DILT_WGMMA=1 line "$DILT_BIN" "${bench[@]}" || return 1
            fi
            for tickets in ${at_a_time//[-,]/ }; do
                line "$DILT_BIN" "${bench[@]}" --tickets "$tickets" || return 1
            done
            for sparsity in $sparsities; do
                line "$DILT_BIN" "${bench[@]}" --random-ticket "$sparsity" || return 1
            done
        done
    done <<<"$jobs" >"$out/steps.jsonl"
    "$here/bin/bench-step" --json >>"$out/steps.jsonl" || return 1
}

# shellcheck disable=SC2329  # check calls it
ops() {
    local jobs=(python3 "$here/peers/dilt_jobs.py" "$DILT_BIN" --device cuda)
    "${jobs[@]}" >"$out/ops.jsonl" || return 1
    [ "$hopper" = 0 ] || DILT_WGMMA=1 "${jobs[@]}" --kind conv linear --precision bf16 >>"$out/ops.jsonl" || return 1
    "$here/bin/bench-ops" --bench --warm-up-time 0.1 --measurement-time 0.3
}

# shellcheck disable=SC2329  # check calls it
peers() { python3 "$here/peers/torch_gpu.py" >"$out/torch.jsonl"; }
# shellcheck disable=SC2329  # check calls it
compiled() { python3 "$here/peers/torch_gpu.py" --compiled >"$out/compiled.jsonl"; }

# All launches of those kernels in one step: that before it is captured, which is the first with them.
bench=(bench --model resnet18_cifar --batch 128 --runs 1 -q --device cuda)
roofline() {
    local ncu=${NCU:-$(command -v ncu || true)} folder=${CUDA_HOME:-/usr/local/cuda}/bin start=$SECONDS status=0 kernels=()
    [ -n "$ncu" ] || [ ! -x "$folder/ncu" ] || ncu=$folder/ncu
    if [ -z "$ncu" ]; then
        echo "roofline: left out, ncu is not installed"
        return
    fi
    # Their names, then the number of their launches.
    mapfile -t kernels < <("$DILT_BIN" "${bench[@]}" --kernels --json | python3 -c '
import json, sys
longest = json.load(sys.stdin)["kernels"][:5]
print("|".join(kernel["name"] for kernel in longest), sum(kernel["launches"] for kernel in longest), sep="\n")')
    if [ "${#kernels[@]}" != 2 ]; then
        echo "dilt bench --kernels failed" >"$out/roofline.log"
        note roofline 1 $((SECONDS - start))
        return
    fi
    timeout --kill-after=10 "${limits[roofline]}" "$ncu" --set roofline --kernel-name "regex:^(${kernels[0]})\$" \
        --launch-count "${kernels[1]}" --force-overwrite --export "$out/roofline.ncu-rep" "$DILT_BIN" "${bench[@]}" \
        >"$out/roofline.log" 2>&1 || status=$?
    if grep -q ERR_NVGPUCTRPERM "$out/roofline.log"; then
        echo "roofline: left out, ncu may not read the counters of this GPU (ERR_NVGPUCTRPERM)"
        return
    fi
    [ "$status" != 124 ] || echo "stopped after ${limits[roofline]} s, the section's limit" >>"$out/roofline.log"
    if [ "$status" = 0 ]; then
        "$ncu" --import "$out/roofline.ncu-rep" --page details >"$out/roofline.txt" 2>>"$out/roofline.log" || status=$?
    fi
    note roofline "$status" $((SECONDS - start))
}
export -f crossover line steps ops peers compiled

for section in "${sections[@]}"; do
    case "$section" in
    tests) check tests "$here/bin/tests" "$@" ;;
    sanitizers) sanitizers "$@" ;;
    crossover) check crossover crossover ;;
    steps) check steps steps ;;
    ops) check ops ops ;;
    peers) check peers peers ;;
    compiled) check compiled compiled ;;
    roofline) roofline ;;
    esac
done

text() { printf '"%s"' "$(tr -cd 'A-Za-z0-9 .,:;()_+/-' <<<"$1")"; }
{
    echo "{"
    echo "  \"commit\": $(text "$(cat "$here/commit")"),"
    echo "  \"date\": $(text "$(date -u +%Y-%m-%d)"),"
    echo "  \"gpu\": $(text "$(query name)"),"
    echo "  \"driver\": $(text "$(query driver_version)"),"
    echo "  \"compute_capability\": $(text "$(query compute_cap)"),"
    echo "  \"clocks\": $(text "$(query clocks.sm,clocks.mem,clocks.max.sm)"),"
    echo "  \"cuda\": $(text "$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9.]*\).*/\1/p' || true)"),"
    echo "  \"passed\": $([ "$failed" = 0 ] && echo true || echo false),"
    echo "  \"checks\": ["
    for i in "${!rows[@]}"; do
        echo "    ${rows[$i]}$([ "$i" = $((${#rows[@]} - 1)) ] || echo ,)"
    done
    echo "  ]"
    echo "}"
} >"$out/results.json"
python3 "$here/summary.py" "$out" || failed=1
exit "$failed"
