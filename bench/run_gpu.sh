#!/usr/bin/env bash
# Builds, tests and measures Esper on this machine in one go; meant for a machine with a GPU, works without.
#
#   bench/run_gpu.sh [--cpu] [--short] [--no-build] [OUT]
#
#   --cpu       leave a GPU alone and run what a CPU has (without a GPU this is so by itself)
#   --short     few rounds of small cases: shows that the script works; no tests and no kernels compiled
#   --no-build  take the extension as it is
#
# Uses the python3 on the path ($PYTHON) with the packages it has: no environment is made and nothing is downloaded. The
# package is built in place, for this GPU alone. OUT (default: bench/results/<host's GPU>) gets
#
#   environment.json    versions, devices, and which backend each operation takes
#   tests.log           the tests, those that need a GPU included
#   kernels.txt         registers, spills and shared memory of every Triton kernel
#   bench.log, bench.json, ratios.json    every benchmark of bench/, among them launch cost and load latency
#   gpu.json, gpu.md    the promises for a GPU with their targets, and a table of them (bench/gpu.py)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cpu=() short=() build=1 out=
for argument in "$@"; do
    case $argument in
        --cpu) cpu=(--cpu) ;;
        --short) short=(--short) ;;
        --no-build) build= ;;
        -*) echo "unknown option $argument; see the head of bench/run_gpu.sh" >&2; exit 2 ;;
        *) out=$argument ;;
    esac
done

python=${PYTHON:-python3}
name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr ' /' '--')
[ ${#cpu[@]} -gt 0 ] && name= && export CUDA_VISIBLE_DEVICES=
out=${out:-bench/results/${name:-no-gpu}}
mkdir -p "$out"
out=$(cd "$out" && pwd)

if [ -n "$name" ]; then
    export ESPER_CUDA=1
    export ESPER_CUDA_ARCHS=${ESPER_CUDA_ARCHS:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)}
fi
if [ -n "$build" ]; then
    "$python" setup.py -q build_ext --inplace || exit 1
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# What is measured to be fastest here is kept here.
export ESPER_CACHE_DIR=${ESPER_CACHE_DIR:-$out/cache}

"$python" -m esper.cli.main env --json >"$out/environment.json"
tests=0 bench=0
if [ ${#short[@]} -eq 0 ]; then
    "$python" -m pytest -q --ignore=tests/packaging -o addopts="" 2>&1 | tee "$out/tests.log" | tail -n 15
    tests=${PIPESTATUS[0]}
    "$python" -m esper.ops.aot >"$out/kernels.txt" 2>&1
    ESPER_BENCH_OUT=$out/ratios.json "$python" -m pytest -q -s --benchmark-only --timeout=0 bench/test_*.py \
        --benchmark-json="$out/bench.json" 2>&1 | tee "$out/bench.log" | tail -n 60
    bench=${PIPESTATUS[0]}
fi
"$python" -m bench.gpu --out "$out" "${cpu[@]}" "${short[@]}"
promises=$?
echo "tests: exit $tests, benchmarks: exit $bench, promises: exit $promises, results in $out"
[ "$tests" -eq 0 ] && [ "$bench" -eq 0 ] && [ "$promises" -eq 0 ]
