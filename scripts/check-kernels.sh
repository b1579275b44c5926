#!/usr/bin/env bash
# Checks the compiled kernels of the newest build in a target folder:
#
#   scripts/check-kernels.sh [PROFILE FOLDER]       default: target/release, or the one in CARGO_TARGET_DIR
#
# Host objects: no weak symbols, of which the linker would keep one copy for all instruction sets. CUDA code, where the
# build had nvcc: no serialised wgmma (C75xx), no spills; in the machine code of sm_80 and sm_90a no local memory (LDL,
# STL), in the products of kernels/*_mma.cu tensor cores (HMMA) and asynchronous copies (LDGSTS), and in those of
# kernels/*_wgmma.cu for sm_90a wgmma (HGMMA) and TMA (UTMALDG). The entries for arrays of tickets are kernels as others are.
# Tools: nm; cuobjdump and nvdisasm beside NVCC or in PATH; DILT_REQUIRE_NVCC=1 demands the CUDA half.
set -euo pipefail
cd "$(dirname "$0")/.."

# The `direct` tilings are compiled for the GPU as every kernel is, but only the host launches them.
allowed='_direct_'

profile=${1:-${CARGO_TARGET_DIR:-target}/release}
out=$(find "$profile/build" -path '*/dilt-*/out/kernels.rs' -printf '%T@ %h\n' | sort -n | tail -1 | cut -d' ' -f2-)
[ -n "$out" ] || { echo "check-kernels: no build of dilt in $profile" >&2; exit 1; }
failed=0
fail() {
    echo "check-kernels: $1" >&2
    failed=1
}

archives=("$out"/*/libdilt_host_*.a)
[ -e "${archives[0]}" ] || { echo "check-kernels: no host kernels in $out" >&2; exit 1; }
for archive in "${archives[@]}"; do
    weak=$(nm -A -C "$archive" | grep -E ' [WwVvu] ' || true)
    [ -z "$weak" ] || fail "weak symbols:"$'\n'"$weak"
done
echo "host objects: ${#archives[@]} instruction sets without weak symbols"

mapfile -t fatbins < <(grep -o '"[^"]*\.fatbin"' "$out/kernels.rs" | tr -d '"')
if [ "${#fatbins[@]}" = 0 ]; then
    [ -z "${DILT_REQUIRE_NVCC:-}" ] || fail "DILT_REQUIRE_NVCC is set, but $out has no CUDA code"
    echo "CUDA code: none in this build"
    exit "$failed"
fi

if grep -E '\(C75' "$out/ptxas.txt"; then
    fail "ptxas serialised a wgmma"
fi
spills=$(awk -v allowed="$allowed" '
    /Compiling entry function/ { split($0, part, "\047"); kernel = part[2]; arch = part[4] }
    /bytes spill stores/ && !/ 0 bytes spill stores, 0 bytes spill loads/ && kernel !~ allowed {
        sub(/^ +/, ""); print kernel " " arch ": " $0
    }' "$out/ptxas.txt")
[ -z "$spills" ] || fail "register spills:"$'\n'"$spills"
echo "ptxas: $(grep -c 'Compiling entry function' "$out/ptxas.txt") kernels looked at for spills"

tools=${NVCC:+$(dirname "$NVCC"):}$PATH
cuobjdump=$(PATH=$tools command -v cuobjdump || true)
if [ -z "$cuobjdump" ] || ! PATH=$tools command -v nvdisasm >/dev/null; then
    fail "cuobjdump and nvdisasm are needed beside NVCC or in PATH"
    exit 1
fi
# Of tensor-core products: which instructions must be there, beside no local memory anywhere.
kernels_of() {
    local file
    for file in "$@"; do
        sed -n 's/^KERNEL(\([a-z0-9_]*\).*/\1/p' "$file"
        grep -q '^#define DILT_NO_ARRAYS' "$file" || sed -n 's/^KERNEL(\([a-z0-9_]*\).*/\1_array/p' "$file"
    done
}
mma=$(kernels_of kernels/*_mma.cu)
wgmma=$(kernels_of kernels/*_wgmma.cu)
for arch in sm_80 sm_90a; do
    code=$(for fatbin in "${fatbins[@]}"; do
        PATH=$tools cuobjdump --dump-sass --gpu-architecture "$arch" "$fatbin"
    done)
    kernels=$(grep -c 'Function : ' <<<"$code" || true)
    [ "$kernels" -gt 0 ] || fail "no machine code for $arch in $out"
    hopper=$([ "$arch" = sm_80 ] || echo "$wgmma")
    wrong=$(awk -v allowed="$allowed" -v mma="${mma//$'\n'/ }" -v wgmma="${hopper//$'\n'/ }" '
        function demand(kernels, instruction, counts,    names, i) {
            for (i = split(kernels, names, " "); i > 0; --i)
                if (!counts[names[i]]) print names[i] ": no " instruction
        }
        /Function : / { kernel = $3 }
        / (LDL|STL)[. ]/ && kernel !~ allowed { local_memory[kernel]++ }
        / HMMA/ { products[kernel]++ }
        / LDGSTS/ { copies[kernel]++ }
        / HGMMA/ { group_products[kernel]++ }
        / UTMALDG/ { boxes[kernel]++ }
        END {
            for (kernel in local_memory) print kernel ": " local_memory[kernel] " instructions of local memory"
            demand(mma, "HMMA", products)
            demand(mma, "LDGSTS", copies)
            demand(wgmma, "HGMMA", group_products)
            demand(wgmma, "UTMALDG", boxes)
        }' <<<"$code")
    [ -z "$wrong" ] || fail "machine code of $arch:"$'\n'"$wrong"
    echo "machine code: $kernels kernels of $arch looked at for local memory, $(wc -w <<<"$mma $hopper") for tensor cores and asynchronous copies"
done
exit "$failed"
