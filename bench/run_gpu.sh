#!/usr/bin/env bash
# Builds, tests and measures Esper on this machine in one go; meant for a machine with a GPU, works without.
#
#   bench/run_gpu.sh [--cpu] [--short] [--no-build] [--only STAGES] [--limit SECONDS] [--tar FILE] [OUT]
#
#   --cpu       leave a GPU alone and run what a CPU has (without a GPU this is so by itself)
#   --short     few rounds of small cases, a handful of tests: shows that the script works; no kernels compiled
#   --no-build  take the extension as it is
#   --only      these stages, with commas between them or one --only for each
#   --limit     be done after so many seconds, summary and tables included: each stage has a share of them (below), what
#               takes longer is stopped, and what has no time left is left out
#   --tar       write all of OUT into this one file too, compressed as its name says
#
# The stages come in the order of what they are worth on a machine that is lent for minutes, short ones first. Behind
# each is its share, in seconds of 570; of a file where there are several. What is not used is left to those behind it,
# and what is left when all of them have theirs goes to the one that runs:
#
#   build       240  the extension, in place, for this GPU alone          build.log
#   launch       60  launch cost and load latency                         launch.log, bench.json, ratios.json, gpu.json
#   lattice      60  what is promised for a GPU, with targets and a       promises.log, gpu.json, gpu.md (bench/gpu.py)
#   stats        60    table: these five together are called promises
#   dormant      90
#   gpu         180  the tests that need a GPU                            gpu-tests.log
#   grafts      150
#   linear      120
#   tests       120  all other tests, first those of what runs on a GPU   tests.log
#   kernels      60  registers, spills, shared memory of Triton's kernels kernels.txt
#   bench        60  all other benchmarks of bench/                       bench.log, bench.json, ratios.json
#
# One that fails is noted, and the others run all the same, as does every file of benchmarks. summary.txt, printed in
# the end, says what became of each. The exit status is 1 if anything failed or was stopped, and 0 if something was only
# left out: for want of a GPU, of a package or of time. OUT (default: bench/results/<host's GPU>) gets all of it, and
# environment.json: versions, devices, and which backend each operation takes. Paths are relative to the checkout.
#
# Uses the python3 on the path ($PYTHON) with the packages it has: no environment is made and nothing is downloaded. Where
# its setuptools is too old for pyproject.toml, CMake builds the extension by itself.
# pytest-xdist, if it is there, runs the tests in $JOBS processes (default: half of the cores, at most 8).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

usage() {
    echo "$1; see the head of bench/run_gpu.sh" >&2
    exit 2
}

promises=(lattice stats dormant grafts linear)
stages=(build launch lattice stats dormant gpu grafts linear tests kernels bench)
declare -A share=([build]=240 [launch]=60 [lattice]=60 [stats]=60 [dormant]=90 [gpu]=180 [grafts]=150 [linear]=120
    [tests]=120 [kernels]=60 [bench]=60)
shared=570  # seconds that the shares are of

cpu=() short=() building=1 only=() limit=0 archive= out=
while [ $# -gt 0 ]; do
    case $1 in
        --cpu) cpu=(--cpu) ;;
        --short) short=(--short) ;;
        --no-build) building= ;;
        --only | --limit | --tar)
            [ $# -gt 1 ] || usage "$1 needs a value"
            case $1 in
                --only) only+=(${2//,/ }) ;;
                --limit) limit=$2 ;;
                --tar) archive=$2 ;;
            esac
            shift ;;
        --only=*) value=${1#*=}; only+=(${value//,/ }) ;;
        --limit=*) limit=${1#*=} ;;
        --tar=*) archive=${1#*=} ;;
        -*) usage "unknown option $1" ;;
        *) out=$1 ;;
    esac
    shift
done
chosen=" "
for stage in "${only[@]}"; do
    if [ "$stage" = promises ]; then
        chosen+="${promises[*]} "
    else
        [[ " ${stages[*]} " == *" $stage "* ]] || usage "unknown stage $stage, there are ${stages[*]}, and promises"
        chosen+="$stage "
    fi
done
[ ${#only[@]} -gt 0 ] || chosen=" ${stages[*]} "
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

failed=0 ungathered=
printf '%-28s %-9s %7s  %s\n' what result seconds about >"$out/summary.txt"

# note WHAT RESULT SECONDS ABOUT: written at once, so that it is there whatever ends this script.
note() {
    printf '%-28s %-9s %7s  %s\n' "$@" >>"$out/summary.txt"
    case $2 in failed | stopped) failed=1 ;; esac
}

finish() {
    local status=$?
    [ -z "$ungathered" ] || gather
    rm -f "$out/.last"
    echo
    cat "$out/summary.txt"
    echo "results in $out"
    if [ -n "$archive" ]; then
        tar --create --auto-compress --file "$archive" --exclude "$(basename "$archive")" \
            -C "$(dirname "$out")" "$(basename "$out")" && echo "and in $archive" || failed=1
    fi
    [ "$status" -ne 0 ] || status=$failed
    exit "$status"
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

# -- time

# Until a command that was asked to end is made to, and for the summary, the tables and the archive.
grace=$((limit / 50)) && grace=$((grace < 1 ? 1 : grace > 10 ? 10 : grace)) reserve=$grace

# share_of STAGE: its seconds of this limit.
share_of() {
    local seconds=$((share[$1] * limit / shared))
    echo $((seconds < 3 ? 3 : seconds))
}

# Seconds that a command can have.
remaining() {
    echo $((limit - SECONDS - grace - reserve))
}

# later STAGE: the shares of the chosen stages behind it.
later() {
    local other behind= sum=0 files
    for other in "${stages[@]}"; do
        if [ -n "$behind" ] && [[ $chosen == *" $other "* ]]; then
            case $other in
                launch) files=${#first[@]} ;;
                tests) files=2 ;;
                bench) files=$(($(ls bench/test_*.py | wc -l) - ${#first[@]})) ;;
                *) files=1 ;;
            esac
            sum=$((sum + files * $(share_of "$other")))
        fi
        [ "$other" != "$1" ] || behind=1
    done
    echo $sum
}

# Of the stage that runs: its name, and how many more commands it has behind the one that is run.
stage= more=0

# run WHAT LOG COMMAND...: its output goes to the screen and to the end of LOG. Gives the command's status.
run() {
    local what=$1 log=$out/$2 began=$SECONDS bound=() waiting=() left own allowed status result about
    shift 2
    if [ "$limit" -gt 0 ]; then
        left=$(remaining)
        if [ "$left" -lt 2 ]; then
            note "$what" "left out" 0 "of $limit s none are left"
            return 0
        fi
        own=$(share_of "$stage")
        allowed=$((left - $(later "$stage") - more * own))
        # In short mode nothing takes long, and some stages run as one.
        [ ${#short[@]} -eq 0 ] || own=$left
        allowed=$((allowed < own ? own : allowed))
        allowed=$((allowed > left ? left : allowed))
        # Ctrl-C first: pytest then says what it found until then.
        bound=(timeout --signal=INT --kill-after="$grace" "$allowed")
        # What a command has started and left behind may keep its output open.
        waiting=(timeout $((allowed + grace + 1)))
    fi
    echo "== $what"
    "${bound[@]}" "$@" 2>&1 | "${waiting[@]}" tee "$out/.last" | tee -a "$log"
    status=${PIPESTATUS[0]}
    about=$(about "$out/.last" "$log")
    case $status in
        0) result=ok ;;
        # Nothing ran. A file that skipped itself says why; where something was chosen and not found, that is a failure.
        5) result=failed && grep -qaE '^=* *[0-9]+ skipped in ' "$out/.last" && result="left out" ;;
        *) result=failed about="exit $status; $about" ;;
    esac
    if [ ${#bound[@]} -gt 0 ] && { [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; }; then
        about=${about#exit *; }
        result=stopped
        if [ "$allowed" -lt "$left" ]; then
            about="after its $allowed s of $limit; $about"
        else
            about="after the last $allowed s of $limit; $about"
        fi
    fi
    note "$what" "$result" $((SECONDS - began)) "$about"
    return "$status"
}

# briefly SECONDS COMMAND...: at most so long, and no longer than the limit.
briefly() {
    local seconds=$1 left
    shift
    if [ "$limit" -gt 0 ]; then
        left=$((limit - SECONDS - 1))
        seconds=$((left < 1 ? 1 : left < seconds ? left : seconds))
    fi
    timeout --kill-after=1 "$seconds" "$@"
}

# -- the stages

# What there is after building, or without.
environment() {
    local seconds=60
    if [ "$limit" -gt 0 ]; then
        seconds=$(remaining)
        if [ "$seconds" -lt 1 ]; then
            note environment "left out" 0 "of $limit s none are left"
            return
        fi
        seconds=$((seconds < 60 ? seconds : 60))
    fi
    briefly "$seconds" "$python" -m esper.cli.main env --json >"$out/environment.json" || note environment failed 0 ""
}

build() {
    : >"$out/build.log"
    local how=("$python" setup.py -q build_ext --inplace)
    if ! "$python" -c 'import sys, setuptools; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)' 2>/dev/null; then
        how=(bash -c with_cmake)
        echo "setuptools 77 or newer is not there: CMake alone builds" | tee -a "$out/build.log"
    fi
    run build build.log "${how[@]}" && return
    [ -n "$name" ] || return
    # C++ alone still launches and loads.
    ESPER_CUDA=0 run "build without CUDA" build.log "${how[@]}"
}

# As setup.py has it done, in a shell of its own. The tools may lie beside the interpreter.
with_cmake() {
    set -e
    local archs= reason="ESPER_CUDA was not 1 at build time" make=() built
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    PATH=$(dirname "$(command -v "$python")"):$PATH
    if [ "${ESPER_CUDA:-}" = 1 ]; then
        CUDACXX=${CUDACXX:-$(PATH=${CUDA_HOME:+$CUDA_HOME/bin:}$PATH:/usr/local/cuda/bin; command -v nvcc || true)}
        [ -n "$CUDACXX" ] || { echo "nvcc was not found (CUDA_HOME or CUDACXX says where it is)"; exit 1; }
        export CUDACXX
        archs=${ESPER_CUDA_ARCHS//[, ]/;} reason=
    fi
    ! command -v ninja >/dev/null || make=(-G Ninja)
    cmake -S . -B "$work" "${make[@]}" -DCMAKE_BUILD_TYPE=Release \
        -DPython_EXECUTABLE="$("$python" -c 'import os, sys; print(os.path.realpath(sys.executable))')" \
        -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" -DESPER_CUDA_ARCHS="$archs" -DESPER_CUDA_REASON="$reason"
    cmake --build "$work" --parallel
    for built in "$work"/_native*; do
        # In one step: a process may have the one before mapped.
        cp "$built" "esper/$(basename "$built").new"
        mv "esper/$(basename "$built").new" "esper/$(basename "$built")"
    done
}
export python
export -f with_cmake

workers=()
find_workers() {
    local cores jobs
    cores=$(nproc 2>/dev/null || echo 1)
    jobs=${JOBS:-$((cores / 2 < 8 ? cores / 2 : 8))}
    # One after another, an error that the GPU does not recover from would fail every test behind it.
    [ "$jobs" -gt 1 ] && installed xdist && workers=(-n "$jobs" --dist)
}

# tested WHAT LOG DIST ARGUMENTS...: DIST is how several processes share the tests, the rest pytest's own.
tested() {
    local what=$1 log=$2 dist=$3
    shift 3
    run "$what" "$log" "$python" -m pytest -q -rfEs --ignore=tests/packaging -o addopts="" \
        ${workers:+"${workers[@]}" "$dist"} "$@"
}

gpu() {
    if [ -z "$name" ]; then
        note "gpu tests" "left out" 0 "no GPU${cpu:+ wanted}"
        return
    fi
    : >"$out/gpu-tests.log"
    # One file has most of them. None starts a server or leaves anything to the next.
    tested "gpu tests" gpu-tests.log worksteal -m gpu ${short:+tests/ops/test_stats.py}
}

# One part in a process of its own; in short mode all of them in one, at the first.
promised=
promise() {
    local part parts=()
    [ -n "$promised" ] || : >"$out/promises.log"
    if [ ${#short[@]} -eq 0 ]; then
        run "promises: $1" promises.log "$python" -m bench.gpu --out "$out" "${cpu[@]}" --part "$1"
    elif [ -z "$promised" ]; then
        for part in "${promises[@]}"; do
            [[ $chosen != *" $part "* ]] || parts+=("$part")
        done
        run promises promises.log "$python" -m bench.gpu --out "$out" "${cpu[@]}" --short --part "${parts[@]}"
    fi
    promised=1
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
    more=${#files[@]}
    ungathered=1
    for file in "${files[@]}"; do
        more=$((more - 1))
        base=$(basename "$file" .py)
        ESPER_BENCH_OUT=$out/ratios.json run "${log%.log}: ${base#test_}" "$log" \
            "$python" -m pytest -q -s -rfEs -o addopts="" --benchmark-only "${patience[@]}" \
            --benchmark-json="$out/bench/$base.json" "$@" "$file"
    done
}

# PyTorch is not imported for it: there is time for it in the last seconds of a limit.
gather() {
    ungathered=
    briefly 20 "$python" -m bench.gpu_report --out "$out" || note gathering failed 0 gpu.json
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
        tested tests tests.log loadfile tests/contracts/test_ids.py
        return
    fi
    # With a GPU, Triton's kernels run there in tests of these folders; without, in its interpreter.
    local folder near=(tests/ops tests/nn tests/execution tests/reserved tests/core) far=()
    for folder in "${near[@]}"; do far+=("--ignore=$folder"); done
    more=1
    tested "tests: kernels and seeds" tests.log loadfile -m "not gpu" "${near[@]}"
    more=0
    tested "tests: the rest" tests.log loadfile -m "not gpu" "${far[@]}" tests
}

kernels() {
    if [ ${#short[@]} -gt 0 ]; then
        note kernels "left out" 0 "--short"
        return
    fi
    : >"$out/kernels.txt"
    # Blocks were chosen for the compiler on record; what another one spills is told, and fails nothing.
    run kernels kernels.txt "$python" -m esper.ops.aot --jobs "$(nproc)" --against bench/results/kernels.json
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
    more=0
    if [[ $chosen != *" $stage "* ]]; then
        note "$stage" "left out" 0 "not among --only"
    elif [ "$stage" = build ] && [ -z "$building" ]; then
        note build "left out" 0 "--no-build"
    elif [[ " ${promises[*]} " == *" $stage "* ]]; then
        promise "$stage"
    else
        "$stage"
    fi
    [ "$stage" != build ] || environment
done
exit $failed
