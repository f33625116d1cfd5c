#!/usr/bin/env bash
# Builds, tests and measures Esper on this machine in one go; meant for a machine with a GPU, works without.
#
#   bench/run_gpu.sh [OUT]
#
# Uses the python3 on the path with the packages it has: no environment is made and nothing is downloaded. The package is built in
# place, for this GPU alone. OUT (default: bench/results/<host's GPU>) gets environment.json, tests.log, bench.log, ratios.json
# and kernels.txt (registers, spills and shared memory of every Triton kernel).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr ' /' '--')
out=${1:-bench/results/${name:-no-gpu}}
mkdir -p "$out"

if [ -n "$name" ]; then
    export ESPER_CUDA=1
    export ESPER_CUDA_ARCHS=${ESPER_CUDA_ARCHS:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)}
fi
set -e
"$python" setup.py -q build_ext --inplace
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
set +e

"$python" -m esper.cli.main env --json >"$out/environment.json"
"$python" -m pytest -q --ignore=tests/packaging -o addopts="" 2>&1 | tee "$out/tests.log" | tail -n 15
tests=${PIPESTATUS[0]}
"$python" -m esper.ops.aot >"$out/kernels.txt" 2>&1
ESPER_BENCH_OUT=$PWD/$out/ratios.json "$python" -m pytest -q -s --benchmark-only --timeout=0 bench/test_*.py \
    --benchmark-json="$out/bench.json" 2>&1 | tee "$out/bench.log" | tail -n 60
bench=${PIPESTATUS[0]}
echo "tests: exit $tests, benchmarks: exit $bench, results in $out"
[ "$tests" -eq 0 ] && [ "$bench" -eq 0 ]
