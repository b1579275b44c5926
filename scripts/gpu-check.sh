#!/usr/bin/env bash
# Runs what scripts/gpu-pack.sh packed on this machine's GPU and writes logs and results.json into OUT:
#
#   gpu-check.sh OUT [--no-gpu] [TEST FILTER...]
#
# All tests, each of which compares the GPU with goldens or with the host device; then the tests that use the device
# under compute-sanitizer's memcheck, racecheck, synccheck and initcheck, where it is installed (COMPUTE_SANITIZER names
# it if it is not in PATH). --no-gpu runs the tests alone, on the host device, to try the pack. Fails if anything fails.
set -euo pipefail

usage="usage: gpu-check.sh OUT [--no-gpu] [TEST FILTER...]"
out=${1:?$usage}
shift
gpu=1
if [ "${1:-}" = --no-gpu ]; then
    gpu=0
    shift
fi

here=$(cd "$(dirname "$0")" && pwd)
[ -x "$here/bin/tests" ] || here=$(cd "$here/../target/gpu" && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
export DILT_GOLDEN=$here/golden DILT_BIN=$here/bin/dilt
unset DILT_REQUIRE_CUDA
[ "$gpu" = 0 ] || export DILT_REQUIRE_CUDA=1

rows=()
failed=0
# Runs a command with its output in OUT/NAME.log and notes whether it passed.
check() {
    local name=$1 start=$SECONDS passed=true
    shift
    if ! "$@" >"$out/$name.log" 2>&1; then
        passed=false
        failed=1
    fi
    local seconds=$((SECONDS - start)) tests
    tests=$(sed -n 's/^test result: [^.]*\. \([0-9]* passed; [0-9]* failed\).*/\1/p' "$out/$name.log" | head -1)
    rows+=("{\"name\": \"$name\", \"passed\": $passed, \"seconds\": $seconds, \"tests\": \"$tests\"}")
    echo "$name: passed $passed, $seconds s, $tests"
    [ "$passed" = true ] || tail -20 "$out/$name.log"
}

check tests "$here/bin/tests" "$@"

sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || true)}
for folder in "${CUDA_HOME:-/usr/local/cuda}"/bin "${CUDA_HOME:-/usr/local/cuda}"/compute-sanitizer; do
    [ -n "$sanitizer" ] || [ ! -x "$folder/compute-sanitizer" ] || sanitizer=$folder/compute-sanitizer
done
if [ "$gpu" = 1 ] && [ -n "$sanitizer" ]; then
    for tool in memcheck racecheck synccheck initcheck; do
        # One thread: a report then stands beside its test. Tests of files alone have nothing to show here.
        check "$tool" "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 \
            "$here/bin/tests" --test-threads=1 --skip weights:: --skip names:: --skip export:: --skip data:: --skip idx:: --skip cifar:: \
            --skip folder:: --skip image:: --skip partition:: --skip mask:: "$@"
    done
else
    echo "compute-sanitizer: left out"
fi

text() { printf '"%s"' "$(tr -cd 'A-Za-z0-9 .,:;()_+/-' <<<"$1")"; }
query() { nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null | head -1 || true; }
{
    echo "{"
    echo "  \"commit\": $(text "$(cat "$here/commit")"),"
    echo "  \"gpu\": $(text "$(query name)"),"
    echo "  \"driver\": $(text "$(query driver_version)"),"
    echo "  \"compute_capability\": $(text "$(query compute_cap)"),"
    echo "  \"cuda\": $(text "$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9.]*\).*/\1/p' || true)"),"
    echo "  \"compute_sanitizer\": $(text "$([ -z "$sanitizer" ] || "$sanitizer" --version | tail -1)"),"
    echo "  \"passed\": $([ "$failed" = 0 ] && echo true || echo false),"
    echo "  \"checks\": ["
    for i in "${!rows[@]}"; do
        echo "    ${rows[$i]}$([ "$i" = $((${#rows[@]} - 1)) ] || echo ,)"
    done
    echo "  ]"
    echo "}"
} >"$out/results.json"
exit "$failed"
