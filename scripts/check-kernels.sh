#!/usr/bin/env bash
# Checks the compiled kernels of the newest build in a target folder:
#
#   scripts/check-kernels.sh [PROFILE FOLDER]       default: target/release, or the one in CARGO_TARGET_DIR
#
# Host objects: no weak symbols, of which the linker would keep one copy for all instruction sets. CUDA code, where the
# build had nvcc: no serialised wgmma (C75xx), no spills; in the machine code of sm_80 and sm_90a no local memory (LDL,
# STL), in the products of kernels/*_mma.cu tensor cores (HMMA) and asynchronous copies (LDGSTS), and in those of
# kernels/*_wgmma.cu for sm_90a wgmma (HGMMA) and TMA (UTMALDG), or of groups of rows asynchronous copies that are shown to wgmma
# (LDGSTS, FENCE.VIEW.ASYNC). The entries for arrays of tickets are kernels as others are.
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
# Of the kernels of files: which instructions must be in their machine code, a line each.
demand() {
    local instructions=$1 file kernel instruction
    shift
    for file in "$@"; do
        for kernel in $(sed -n 's/^KERNEL(\([a-z0-9_]*\).*/\1/p' "$file"); do
            for instruction in $instructions; do
                echo "$kernel $instruction"
                grep -q '^#define DILT_NO_ARRAYS' "$file" || echo "${kernel}_array $instruction"
            done
        done
    done
}
portable=$(demand "HMMA LDGSTS" kernels/*_mma.cu)
hopper=$(for file in kernels/*_wgmma.cu; do
    case $file in
    *_groups_wgmma.cu) demand "HGMMA LDGSTS FENCE.VIEW.ASYNC" "$file" ;;
    *) demand "HGMMA UTMALDG" "$file" ;;
    esac
done)
for arch in sm_80 sm_90a; do
    code=$(for fatbin in "${fatbins[@]}"; do
        PATH=$tools cuobjdump --dump-sass --gpu-architecture "$arch" "$fatbin"
    done)
    kernels=$(grep -c 'Function : ' <<<"$code" || true)
    [ "$kernels" -gt 0 ] || fail "no machine code for $arch in $out"
    demanded=$portable
    [ "$arch" = sm_80 ] || demanded+=$'\n'$hopper
    wrong=$(demanded=$demanded awk -v allowed="$allowed" '
        BEGIN { count = split(ENVIRON["demanded"], demands, "\n") }
        /Function : / { kernel = $3 }
        / (LDL|STL)[. ]/ && kernel !~ allowed { local_memory[kernel]++ }
        match($0, / (HMMA|LDGSTS|HGMMA|UTMALDG|FENCE\.VIEW\.ASYNC)/) { seen[kernel substr($0, RSTART, RLENGTH)] = 1 }
        END {
            for (kernel in local_memory) print kernel ": " local_memory[kernel] " instructions of local memory"
            for (i = 1; i <= count; ++i)
                if (!(demands[i] in seen)) print "not there: " demands[i]
        }' <<<"$code")
    [ -z "$wrong" ] || fail "machine code of $arch:"$'\n'"$wrong"
    echo "machine code: $kernels kernels of $arch looked at for local memory," \
        "$(cut -d' ' -f1 <<<"$demanded" | sort -u | wc -l) for tensor cores and asynchronous copies"
done
exit "$failed"
