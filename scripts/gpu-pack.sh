#!/usr/bin/env bash
# Builds what scripts/gpu-check.sh runs on a machine with a GPU and without Rust, into target/gpu/ and target/gpu.tar.xz
# (under 64 MiB): tests and benches with CUDA code, the dilt binary, the goldens, PyTorch's side of the benches, and the
# script itself. Needs nvcc (see CONTRIBUTING.md), but for --no-gpu, which packs a build of the host device alone.
#
# There:  tar xJf gpu.tar.xz && gpu/gpu-check.sh OUT
# Without xz:  python3 -c "import tarfile; tarfile.open('gpu.tar.xz').extractall()" && gpu/gpu-check.sh OUT
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

# Cargo names each binary that it built; those of one kind of target are printed: "name path".
build() {
    local kind=$1
    shift
    cargo "$@" --message-format=json-render-diagnostics |
        KIND=$kind python3 -c '
import json, os, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and os.environ["KIND"] in message["target"]["kind"]:
        print(message["target"]["name"], message["executable"])'
}
cargo build --release --bin dilt
cp "$target/release/dilt" "$pack/bin/dilt"
build test test --release --no-run --test it | while read -r _ path; do cp "$path" "$pack/bin/tests"; done
build bench bench --no-run --bench crossover --bench ops --bench step | while read -r name path; do
    cp "$path" "$pack/bin/bench-$name"
done
strip "$pack"/bin/*
cp -r tests/golden "$pack/golden"
cp -r benches/peers "$pack/peers"
rm -rf "$pack/peers/__pycache__"
cp scripts/gpu-check.sh scripts/summary.py "$pack/"
git describe --always --dirty --abbrev=40 --exclude '*' >"$pack/commit"

# The binaries have most of their bytes in common, far apart.
tar c -C "$(dirname "$pack")" gpu | xz -T1 -4 --lzma2=dict=256MiB >"$pack.tar.xz"
kib=$(du -k "$pack.tar.xz" | cut -f1)
echo "$pack.tar.xz: $kib KiB"
if [ "$kib" -ge 65536 ]; then
    echo "gpu-pack: more than 64 MiB" >&2
    exit 1
fi
