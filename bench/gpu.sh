#!/usr/bin/env bash
# Run everything that needs a GPU, on a machine that has one; no network is needed.
#
#   bash bench/gpu.sh [STAGE ...]      from the root of the repository; default: smoke test bench
#
#   smoke      each family of kernels once, against the reference (under a minute)
#   test       the table of tests on the GPU, and tests/test_gpu.py
#   sanitize   compute-sanitizer, memcheck and racecheck, over the families of kernels
#   quick      the quick benchmark (full: all of it; bench: quick, then full)
#   call       small calls only
#   profile    Nsight Compute on four large calls: bandwidth, occupancy, registers
#
# Results go to OUT (bench/results/gpu); compiled kernels are kept in CACHE (~/.cache/fastll-gpu) between
# stages. Each stage has its own limit in seconds (SMOKE_LIMIT=120 and so on); if one fails, the others
# still run. PYTHON is the interpreter (python3).
set -uo pipefail
cd "$(dirname "$0")/.." || exit

OUT=$(mkdir -p "${OUT:-bench/results/gpu}" && cd "${OUT:-bench/results/gpu}" && pwd) || exit
CACHE=${CACHE:-${HOME:-/tmp}/.cache/fastll-gpu}
PYTHON=${PYTHON:-python3}
mkdir -p "$CACHE"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
export NUMBA_CACHE_DIR="$CACHE" FASTLL_TEST_CACHE="$CACHE" CUDA_CACHE_PATH="$CACHE/driver"
export TORCHINDUCTOR_CACHE_DIR="$CACHE/inductor" TRITON_CACHE_DIR="$CACHE/triton"
for place in /usr/local/cuda /opt/cuda; do # has libnvvm and ptxas where no wheel does
    [ -n "${CUDA_HOME:-}" ] || { [ -d "$place" ] && export CUDA_HOME="$place"; }
done
PATH="$PATH:${CUDA_HOME:+$CUDA_HOME/bin}"
declare -A said=()

# stage NAME SECONDS COMMAND...: output goes to a log and to the terminal, the outcome to the table
stage() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    printf '\n== %s (at most %s s)\n' "$name" "$limit"
    timeout --signal=INT --kill-after=15 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
    code=${PIPESTATUS[0]}
    case $code in
        0) said[$name]="ok" ;;
        124 | 137) said[$name]="OUT OF TIME" ;;
        *) said[$name]="FAILED ($code)" ;;
    esac
    said[$name]+=", $((SECONDS - start)) s"
    order+=("$name")
}

order=()

versions() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,memory.free,clocks.sm,clocks.mem --format=csv || true
    nvcc --version 2>/dev/null | tail -n 2
    "$PYTHON" -m bench.summary versions
}

extension() { # the cython backend for the CPU; the GPU does not need it
    command -v c++ >/dev/null && "$PYTHON" setup.py -q build_ext --inplace
}

tests() {
    local several=()
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then # most of the time is compilation
        several=(-n "${WORKERS:-$(($(nproc) < 12 ? $(nproc) : 12))}" --dist=worksteal)
    fi
    local options=(-W default -o addopts= -q -p no:cacheprovider -ra --durations=10)
    FASTLL_EMULATE=all "$PYTHON" -m pytest tests -k "cuda and not test_gpu" "${several[@]}" "${options[@]}" \
        --junitxml="$OUT/table.xml"
}

sanitize() { # with Numba's arrays: torch caches memory, which would hide accesses beyond an array
    local tool=$1
    shift
    compute-sanitizer --tool "$tool" --error-exitcode 7 --launch-timeout 120 "$@" \
        "$PYTHON" -m bench.families --arrays numba
}

profile() {
    local metrics=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
    metrics+=,dram__bytes_read.sum,dram__bytes_write.sum,lts__t_sector_hit_rate.pct
    metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread
    metrics+=,launch__occupancy_limit_registers,launch__grid_size,launch__block_size,launch__cluster_size
    metrics+=,smsp__inst_executed.sum,sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active
    ncu --clock-control none --profile-from-start off --metrics "$metrics" --csv --page raw \
        --log-file "$OUT/profile.csv" "$PYTHON" -m bench.families --profile
    local code=$?
    [ ! -f "$OUT/profile.csv" ] || "$PYTHON" -m bench.summary profile "$OUT/profile.csv"
    return $code
}

bench() { # bench NAME LIMIT OPTIONS...: stops before the limit, so that the results are written
    local name=$1 limit=$2
    shift 2
    stage "$name" "$limit" "$PYTHON" -m bench --device cuda --seconds $((limit - 45)) --output "$OUT/$name" "$@"
    [ -f "$OUT/$name/results.json" ] && measured+=("$OUT/$name/results.json")
}

measured=()
export -f versions extension tests sanitize profile
export OUT PYTHON
stage versions 60 bash -c versions
[ $# -gt 0 ] || set -- smoke test bench
for name in "$@"; do
    case $name in
        smoke) stage smoke "${SMOKE_LIMIT:-120}" "$PYTHON" -m bench.families ;;
        build) stage build "${BUILD_LIMIT:-150}" bash -c extension ;;
        test)
            stage gpu-tests "${GPU_TESTS_LIMIT:-240}" "$PYTHON" -m pytest tests/test_gpu.py -W default \
                -o addopts= -q -p no:cacheprovider -ra --durations=5
            stage table "${TABLE_LIMIT:-420}" bash -c tests
            ;;
        sanitize)
            stage memcheck "${MEMCHECK_LIMIT:-240}" bash -c "sanitize memcheck"
            stage racecheck "${RACECHECK_LIMIT:-300}" bash -c "sanitize racecheck"
            ;;
        quick) bench quick "${QUICK_LIMIT:-240}" ;;
        full) bench full "${FULL_LIMIT:-540}" --full ;;
        call) bench call "${CALL_LIMIT:-120}" --full --shape call ;;
        bench)
            bench quick "${QUICK_LIMIT:-240}"
            bench full "${FULL_LIMIT:-540}" --full
            ;;
        profile) stage profile "${PROFILE_LIMIT:-240}" bash -c profile ;;
        *)
            echo "unknown stage $name; expected smoke, build, test, sanitize, quick, full, bench, call or profile" >&2
            exit 2
            ;;
    esac
done

if [ ${#measured[@]} -gt 0 ]; then
    "$PYTHON" -m bench merge "$OUT/gpu.json" "${measured[@]}" && "$PYTHON" -m bench table "$OUT/gpu.json" \
        >"$OUT/gpu.md" && "$PYTHON" -m bench plot "$OUT/gpu.json"
    printf '\n'
    "$PYTHON" -m bench.summary results "$OUT/gpu.json"
fi
printf '\n'
bad=0
for name in "${order[@]}"; do
    printf '%-12s %s\n' "$name" "${said[$name]}"
    case ${said[$name]} in ok*) ;; *) bad=1 ;; esac
done
exit $bad
