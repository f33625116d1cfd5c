# The environment is made once and redone only when pyproject.toml changes; see docs/install.md.
#
#   make grow     make the environment, build, and train a network that grows (options: ARGS="--seed 1")
#   make test     the tests, on two cores (options: ARGS="-k lattice"; JOBS=0 for one process)
#   make lint     ruff, mypy, import-linter
#   make sanitize the tests of the C++ code, built with checks of every address and of undefined behaviour (ten minutes)
#   make native   rebuild the C++/CUDA extension, only what changed
#   make bench, make bench-check    measure; compare with the stored ratios
#   make bench-report               put the stored ratios into docs/performance.md, tables and plots
#   make clean    remove what was built (the environment too: make distclean)

SHELL  := /bin/bash
# The first Python that is new enough; failing that, python3, for the error message.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
VENV   ?= .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check
ARGS   ?=
# Processes that share the tests, file by file, each with one thread.
JOBS   ?= 2

# Developers want to see a CUDA compile error; a plain `pip install .` would go on without.
export ESPER_CUDA ?= $(shell command -v nvcc >/dev/null && echo 1 || echo auto)

SANITIZE := -fsanitize=address,undefined -fno-sanitize=vptr -fno-omit-frame-pointer -g1
# What runs native code on a CPU; but for one test, which looks at how the process's memory grows.
NATIVE_TESTS := tests/execution/grafts tests/nn tests/reserved/test_reserved_model.py tests/execution/test_monitor.py \
  tests/core/test_clock.py $(addprefix tests/ops/test_,driver.py graft_seeds.py lattice_backends.py lattice_table.py stats.py)

.PHONY: grow test sanitize lint format native bench bench-check bench-report clean distclean env

grow: native
	$(VENV)/bin/esper grow $(ARGS)

test: native
	$(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# In a copy of the tree, whose extension is no use to anything else. The checks must be loaded before Python is.
sanitize: $(VENV)/.deps
	rm -rf build/sanitize && mkdir -p build/sanitize
	git ls-files -z -co --exclude-standard | xargs -0 cp -P --parents -t build/sanitize
	cd build/sanitize && CXXFLAGS="$(SANITIZE)" ESPER_CUDA=0 $(abspath $(PY)) setup.py -q build_ext --inplace
	cd build/sanitize && PYTHONPATH=$$PWD OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so.6)" \
	  $(abspath $(PY)) -m pytest -q -p no:cacheprovider -m "not aot and not packaging" -k "not memory_is_given_back" \
	  $(ARGS) $(NATIVE_TESTS)

lint: $(VENV)/.deps
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.deps
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: native
	$(VENV)/bin/esper bench $(ARGS)

bench-check: native
	$(VENV)/bin/esper bench --check $(ARGS)

bench-report: $(VENV)/.deps
	$(PY) -m bench.report

native: $(VENV)/.deps
	$(PY) setup.py -q build_ext --inplace

env: $(VENV)/.deps

$(VENV)/.made:
	@command -v "$(PYTHON)" >/dev/null || { echo '$(PYTHON) is no Python that can be run.' \
	  'Name another: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	  "Esper needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Name another: make PYTHON=/path/to/python3.11")'
	test -x $(PY) || "$(PYTHON)" -m venv $(VENV)
	touch $@

# A plain requirement of torch may fetch a CUDA build of several GB; without an NVIDIA GPU the version is named first, so that
# an installed or locally provided CPU build of it is taken.
$(VENV)/.deps: pyproject.toml | $(VENV)/.made
	command -v nvidia-smi >/dev/null || $(PIP) install torch==2.13.0
	$(PIP) install "setuptools>=77" "pybind11>=2.13" "ninja>=1.11" "cmake>=3.24"
	$(PIP) install --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis .benchmarks
	rm -f esper/_native*.so
	find esper kernels tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV)
