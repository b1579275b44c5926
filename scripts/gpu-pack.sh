#!/usr/bin/env bash
# Builds what scripts/gpu-check.sh runs on a machine with a GPU and without Rust, into target/gpu/ (under 64 MiB):
# the tests and the benches with CUDA code, the dilt binary, the goldens, the peers, and the script itself. Needs nvcc (see
# CONTRIBUTING.md), but for --no-gpu, which packs a build of the host device alone.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
"") export DILT_REQUIRE_NVCC=1 ;;
--no-gpu) ;;
*)
    echo "usage: scripts/gpu-pack.sh [--no-gpu]" >&2
    exit 2
    ;;
esac

target=${CARGO_TARGET_DIR:-target}
pack=target/gpu
rm -rf "$pack"
mkdir -p "$pack/bin"

# Cargo names each binary that it built: "name path".
build() {
    cargo "$@" --release --message-format=json-render-diagnostics |
        python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable"):
        print(message["target"]["name"], message["executable"])'
}
cargo build --release --bin dilt
cp "$target/release/dilt" "$pack/bin/dilt"
build test --no-run --test it | while read -r _ path; do cp "$path" "$pack/bin/tests"; done
if [ -d benches ]; then
    build bench --no-run --benches | while read -r name path; do
        [ "$name" = dilt ] || cp "$path" "$pack/bin/bench-$name"
    done
fi
strip "$pack"/bin/*
cp -r tests/golden "$pack/golden"
[ ! -d models ] || cp -r models "$pack/models"
cp -r benches/peers "$pack/peers"
cp scripts/gpu-check.sh "$pack/"
git rev-parse HEAD >"$pack/commit"

kib=$(du -sk "$pack" | cut -f1)
echo "$pack: $kib KiB"
if [ "$kib" -ge 65536 ]; then
    echo "gpu-pack: more than 64 MiB" >&2
    exit 1
fi
