#!/usr/bin/env bash
# Builds, tests and measures Esper on this machine in one go; meant for a machine with a GPU, works without.
#
#   bench/run_gpu.sh [--cpu] [--short] [--no-build] [--only STAGES] [--limit SECONDS] [OUT]
#
#   --cpu       leave a GPU alone and run what a CPU has (without a GPU this is so by itself)
#   --short     few rounds of small cases, a handful of tests: shows that the script works; no kernels compiled
#   --no-build  take the extension as it is
#   --only      these stages, with commas between them or one --only for each
#   --limit     stop what runs after so many seconds in all, and leave out what has no time left
#
# The stages come in the order of what they are worth on a machine that is lent for minutes:
#
#   build       the extension, in place, for this GPU alone           build.log
#   gpu         the tests that need a GPU                             gpu-tests.log
#   promises    what is promised for a GPU, with targets and a table  promises.log, gpu.json, gpu.md (bench/gpu.py)
#   launch      launch cost and load latency                          launch.log, bench.json, ratios.json, gpu.json
#   tests       all other tests, first those of what runs on a GPU    tests.log
#   kernels     registers, spills, shared memory of Triton's kernels  kernels.txt
#   bench       all other benchmarks of bench/                        bench.log, bench.json, ratios.json
#
# One that fails is noted, and the others run all the same, as does every file of benchmarks. summary.txt, printed in
# the end, says what became of each. The exit status is 1 if anything failed or was stopped, and 0 if something was only
# left out: for want of a GPU, of a package or of time. OUT (default: bench/results/<host's GPU>) gets all of it, and
# environment.json: versions, devices, and which backend each operation takes.
#
# Uses the python3 on the path ($PYTHON) with the packages it has: no environment is made and nothing is downloaded.
# pytest-xdist, if it is there, runs the tests in $JOBS processes (default: half of the cores, at most 8).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

usage() {
    echo "$1; see the head of bench/run_gpu.sh" >&2
    exit 2
}

stages=(build gpu promises launch tests kernels bench)
cpu=() short=() building=1 only=() limit=0 out=
while [ $# -gt 0 ]; do
    case $1 in
        --cpu) cpu=(--cpu) ;;
        --short) short=(--short) ;;
        --no-build) building= ;;
        --only | --limit)
            [ $# -gt 1 ] || usage "$1 needs a value"
            if [ "$1" = --only ]; then only+=(${2//,/ }); else limit=$2; fi
            shift ;;
        --only=*) value=${1#*=}; only+=(${value//,/ }) ;;
        --limit=*) limit=${1#*=} ;;
        -*) usage "unknown option $1" ;;
        *) out=$1 ;;
    esac
    shift
done
for stage in "${only[@]}"; do
    [[ " ${stages[*]} " == *" $stage "* ]] || usage "unknown stage $stage, there are ${stages[*]}"
done
[[ $limit =~ ^[0-9]+$ ]] || usage "--limit takes whole seconds, not $limit"

python=${PYTHON:-python3}
name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr ' /' '--')
[ ${#cpu[@]} -gt 0 ] && name= && export CUDA_VISIBLE_DEVICES=
out=${out:-bench/results/${name:-no-gpu}}
mkdir -p "$out/bench" && out=$(cd "$out" && pwd) || exit 1

if [ -n "$name" ]; then
    export ESPER_CUDA=1
    export ESPER_CUDA_ARCHS=${ESPER_CUDA_ARCHS:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)}
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1
# What is measured to be fastest here is kept here.
export ESPER_CACHE_DIR=${ESPER_CACHE_DIR:-$out/cache}

# -- what became of each

failed=0
printf '%-28s %-9s %7s  %s\n' what result seconds about >"$out/summary.txt"

# note WHAT RESULT SECONDS ABOUT: written at once, so that it is there whatever ends this script.
note() {
    printf '%-28s %-9s %7s  %s\n' "$@" >>"$out/summary.txt"
    case $2 in failed | stopped) failed=1 ;; esac
}

finish() {
    echo
    cat "$out/summary.txt"
    echo "results in $out"
}
trap finish EXIT
trap 'exit 130' INT TERM

# installed MODULE
installed() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

# about LOG: pytest's last words in it, and the packages that tests were left out for.
about() {
    local words without
    words=$(grep -aE '(passed|failed|skipped|deselected|errors?|no tests ran).* in [0-9.]+s' "$1" | tail -n 1)
    words=$(sed 's/^=* *//; s/ *=*$//' <<<"$words")
    without=$(grep -aoE "could not import '[A-Za-z0-9_.]+'" "$1" | cut -d "'" -f 2 | sort -u | paste -sd ' ')
    echo "${words:-see $(basename "$2")}${without:+; without $without}"
}

# run WHAT LOG COMMAND...: its output goes to the screen and to the end of LOG. Gives the command's status.
run() {
    local what=$1 log=$out/$2 began=$SECONDS bound=() left status result about
    shift 2
    if [ "$limit" -gt 0 ]; then
        left=$((limit - SECONDS))
        if [ $left -lt 5 ]; then
            note "$what" "left out" 0 "of $limit s none are left"
            return 0
        fi
        # Ctrl-C first: pytest then says what it found until then.
        bound=(timeout --signal=INT --kill-after=20 "$left")
    fi
    echo "== $what"
    "${bound[@]}" "$@" 2>&1 | tee "$out/.last" | tee -a "$log"
    status=${PIPESTATUS[0]}
    about=$(about "$out/.last" "$log")
    case $status in
        0) result=ok ;;
        # Nothing ran. A file that skipped itself says why; where something was chosen and not found, that is a failure.
        5) result=failed && grep -qaE '^=* *[0-9]+ skipped in ' "$out/.last" && result="left out" ;;
        *) result=failed about="exit $status; $about" ;;
    esac
    if [ ${#bound[@]} -gt 0 ] && { [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; }; then
        result=stopped about="after $limit s in all; ${about#exit *; }"
    fi
    note "$what" "$result" $((SECONDS - began)) "$about"
    return "$status"
}

# -- the stages

# What there is after building, or without.
environment() {
    "$python" -m esper.cli.main env --json >"$out/environment.json" || note environment failed 0 ""
}

build() {
    : >"$out/build.log"
    run build build.log "$python" setup.py -q build_ext --inplace && return
    [ -n "$name" ] || return
    # C++ alone still launches and loads.
    ESPER_CUDA=0 run "build without CUDA" build.log "$python" setup.py -q build_ext --inplace
}

workers=()
find_workers() {
    local cores jobs
    cores=$(nproc 2>/dev/null || echo 1)
    jobs=${JOBS:-$((cores / 2 < 8 ? cores / 2 : 8))}
    # One after another, an error that the GPU does not recover from would fail every test behind it.
    [ "$jobs" -gt 1 ] && installed xdist && workers=(-n "$jobs" --dist loadfile)
}

# tested WHAT LOG ARGUMENTS...: of pytest.
tested() {
    local what=$1 log=$2
    shift 2
    run "$what" "$log" "$python" -m pytest -q -rfEs --ignore=tests/packaging -o addopts="" "${workers[@]}" "$@"
}

gpu() {
    if [ -z "$name" ]; then
        note "gpu tests" "left out" 0 "no GPU${cpu:+ wanted}"
        return
    fi
    : >"$out/gpu-tests.log"
    tested "gpu tests" gpu-tests.log -m gpu ${short:+tests/ops/test_stats.py}
}

promises() {
    : >"$out/promises.log"
    local part parts=(dormant lattice stats grafts linear)
    if [ ${#short[@]} -gt 0 ]; then
        run promises promises.log "$python" -m bench.gpu --out "$out" "${cpu[@]}" --short
        return
    fi
    for part in "${parts[@]}"; do
        run "promises: $part" promises.log "$python" -m bench.gpu --out "$out" "${cpu[@]}" --part "$part"
    done
}

# benchmarks LOG FILE... [-- ARGUMENTS...]: file by file, so that one that cannot be loaded takes no other with it.
benchmarks() {
    local log=$1 files=() file base
    shift
    : >"$out/$log"
    while [ $# -gt 0 ] && [ "$1" != -- ]; do files+=("$1"); shift; done
    [ $# -gt 0 ] && shift
    if ! installed pytest_benchmark; then
        note "${log%.log}" "left out" 0 "could not import 'pytest_benchmark'"
        return
    fi
    for file in "${files[@]}"; do
        base=$(basename "$file" .py)
        ESPER_BENCH_OUT=$out/ratios.json run "${log%.log}: ${base#test_}" "$log" \
            "$python" -m pytest -q -s -rfEs -o addopts="" --benchmark-only "${patience[@]}" \
            --benchmark-json="$out/bench/$base.json" "$@" "$file"
    done
    ungathered=1
}

ungathered=
gather() {
    ungathered=
    "$python" -m bench.gpu --out "$out" "${cpu[@]}" "${short[@]}" --gather || note gathering failed 0 gpu.json
}

first=(bench/test_launch.py bench/test_kernel_cache.py)

launch() {
    if [ ${#short[@]} -gt 0 ]; then
        benchmarks launch.log bench/test_kernel_cache.py -- -k memory
    else
        benchmarks launch.log "${first[@]}"
        # Now, and not in the end: what comes next takes long.
        gather
    fi
}

tests() {
    : >"$out/tests.log"
    if [ ${#short[@]} -gt 0 ]; then
        tested tests tests.log tests/contracts/test_ids.py
        return
    fi
    # With a GPU, Triton's kernels run there in tests of these folders; without, in its interpreter.
    local folder near=(tests/ops tests/nn tests/execution tests/reserved tests/core) far=()
    for folder in "${near[@]}"; do far+=("--ignore=$folder"); done
    tested "tests: kernels and seeds" tests.log -m "not gpu" "${near[@]}"
    tested "tests: the rest" tests.log -m "not gpu" "${far[@]}" tests
}

kernels() {
    if [ ${#short[@]} -gt 0 ]; then
        note kernels "left out" 0 "--short"
        return
    fi
    : >"$out/kernels.txt"
    run kernels kernels.txt "$python" -m esper.ops.aot
}

bench() {
    if [ ${#short[@]} -gt 0 ]; then
        benchmarks bench.log bench/test_stats.py -- -k "test_channel_stats and nchw and float32 and not float32-torch"
        return
    fi
    local file others=()
    for file in bench/test_*.py; do
        [[ " ${first[*]} " == *" $file "* ]] || others+=("$file")
    done
    benchmarks bench.log "${others[@]}"
}

patience=()
installed pytest_timeout && patience=(--timeout=0)
find_workers
for stage in "${stages[@]}"; do
    if [ ${#only[@]} -gt 0 ] && [[ " ${only[*]} " != *" $stage "* ]]; then
        note "$stage" "left out" 0 "not among --only"
    elif [ "$stage" = build ] && [ -z "$building" ]; then
        note build "left out" 0 "--no-build"
    else
        "$stage"
    fi
    [ "$stage" != build ] || environment
done
[ -z "$ungathered" ] || gather
rm -f "$out/.last"
exit $failed
