#!/usr/bin/env bash
# Runs the tests with instrumented host kernels:
#
#   scripts/sanitize.sh address [TEST FILTER...]    AddressSanitizer and UndefinedBehaviorSanitizer
#   scripts/sanitize.sh thread  [TEST FILTER...]    ThreadSanitizer: races within and between blocks
#
# Reports name lines of kernels/. A race fails the run after the last test; what AddressSanitizer and UBSan find stops
# it at once. Further options go to the sanitizers through ASAN_OPTIONS, UBSAN_OPTIONS, TSAN_OPTIONS.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
address | thread) sanitizer=$1 ;;
*)
    echo "usage: scripts/sanitize.sh address|thread [TEST FILTER...]" >&2
    exit 2
    ;;
esac
shift

# One folder for both: what dilt depends on is built once.
command=(cargo test --profile sanitize --target-dir "${CARGO_TARGET_DIR:-target}/sanitize" --test it -- "$@")
# ThreadSanitizer of g++ 12 needs the memory layout of older kernels: fewer random bits in addresses.
if [ "$sanitizer" = thread ] && setarch --addr-no-randomize true 2>/dev/null; then
    command=(setarch --addr-no-randomize "${command[@]}")
fi
export DILT_SANITIZE=$sanitizer
echo "DILT_SANITIZE=$sanitizer ${command[*]}" >&2
exec "${command[@]}"
