# Two commands: `make search` (the embedded demo, end to end) and `make test`. Each does its own set-up in .venv, once.
#
#   make search ARGS="--data.train a.csv --data.dev b.csv"     any option of `ffnas search`
#   make setup TORCH="torch==2.13.0"                           another PyTorch build

SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
STAMP := .venv/.installed
DEV_STAMP := .venv/.installed-dev
ARGS ?=

.PHONY: help setup search test test-all test-faults test-oldest mutations fuzz sanitize coverage check-long types \
  compile-check wheel-check runtime-wheel lint gpu-check clean

help:
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) ## create .venv and install ffnas in it

# PyTorch goes first and alone: a later resolver then keeps the build that is there.
$(STAMP): pyproject.toml setup.py
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "setting up .venv (once)"
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install -q --disable-pip-version-check setuptools ninja
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[demo,onnx]'
	@touch $@

$(DEV_STAMP): $(STAMP)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[demo,dev,onnx]'
	@touch $@

search: $(STAMP) ## search, train and export the demo model; about 10 minutes on 2 cores
	@$(BIN)/python -m search.run $(ARGS)

test: $(DEV_STAMP) ## run the tests
	@$(BIN)/python -m pytest -q -n auto --dist worksteal $(ARGS)

test-all: $(DEV_STAMP) ## run the slow tests too
	@$(BIN)/python -m pytest -q -n auto --dist worksteal -m "slow or not slow" $(ARGS)

test-faults: $(DEV_STAMP) ## the long fault suite: 100 kills, full disks, hostile input, 5,000 trials; an hour on 2 cores
	@$(BIN)/python -m pytest -q -n 0 -m "slow or not slow" tests/faults $(ARGS)

mutations: $(DEV_STAMP) ## take protections out one at a time: a test has to notice each; minutes
	@$(BIN)/python tests/faults/mutations.py $(ARGS)

fuzz: $(DEV_STAMP) ## a million hostile inputs for the expression parser, thousands for everything else that reads
	@$(BIN)/python tests/faults/fuzz.py --parser 1000000 --architecture 100000 --config 500 --data 500 --ledger 2000 --checkpoint 5000 $(ARGS)

# AddressSanitizer must be the first library of the process; Python itself leaks by design.
PROGRAMS ?= 20000
SANITIZED ?= $(addprefix tests/kernels/,test_cpu_ffn.py test_saved_memory.py test_packed_weights.py test_linear.py test_cpu_math.py test_losses_fused.py test_attention.py)
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1
sanitize: $(DEV_STAMP) ## CPU kernels and the runtime under AddressSanitizer and UBSan
	@$(BIN)/python -m pytest -q -n 0 -m slow -k sanitizers tests/engine/test_native_programs.py
	@env FFNAS_CXXFLAGS="$(SANITIZE)" FFNAS_CACHE=$(CURDIR)/.cache-sanitize OMP_NUM_THREADS=2 \
	  LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  bash -c '$(BIN)/python tests/faults/corrupt_programs.py --count $(PROGRAMS) && \
	  $(BIN)/python -m pytest -q -n 0 -p no:cacheprovider $(SANITIZED) $(ARGS)'

coverage: $(DEV_STAMP) ## branches of search and engine the default tests reach; ends with the uncovered
	@$(BIN)/python -m pytest -q -n auto --dist worksteal --cov --cov-report=term-missing:skip-covered --cov-fail-under=85 $(ARGS)

check-long: coverage test-oldest test-faults mutations fuzz sanitize ## what continuous integration has no time for; hours (docs/testing.md)

types: $(DEV_STAMP) ## types of engine, kernels and search
	@$(BIN)/python -m mypy

OLDEST ?= transformers==5.17.0
test-oldest: $(DEV_STAMP) ## tests with the oldest supported transformers, in .venv-oldest beside .venv's other packages
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	@echo "import site; site.addsitedir('$$(echo $(CURDIR)/.venv/lib/python3*/site-packages)')" > "$$(echo .venv-oldest/lib/python3*/site-packages)/zz-other.pth"
	@.venv-oldest/bin/python -m pip install -q --disable-pip-version-check "$(OLDEST)"
	@.venv-oldest/bin/python -m pytest -q -n auto --dist worksteal tests/engine tests/search tests/faults $(ARGS)

# Other packages come from .venv; ffnas itself is what the wheel brought: it stands first on the path.
wheel-check: $(STAMP) ## build the wheel, install it into an environment of its own, and use it from an empty folder
	@rm -rf .venv-wheel build/wheel build/lib*
	@$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w build/wheel .
	@$(PYTHON) -m venv .venv-wheel
	@echo "import site; site.addsitedir('$$(echo $(CURDIR)/.venv/lib/python3*/site-packages)')" > "$$(echo .venv-wheel/lib/python3*/site-packages)/zz-other.pth"
	@.venv-wheel/bin/python -m pip install -q --disable-pip-version-check --no-deps build/wheel/ffnas-*.whl
	@cd "$$(mktemp -d)" && $(CURDIR)/.venv-wheel/bin/python $(CURDIR)/tests/firstuse/installed.py
	@rm -rf .venv-wheel build/wheel

runtime-wheel: $(STAMP) ## a wheel of the runtime alone, in build/runtime: texts to answers without PyTorch
	@$(BIN)/python -m kernels.runtime.wheel build/runtime

compile-check: $(DEV_STAMP) ## compile all GPU kernels for sm_80 and sm_90, without a GPU; registers, spills, tensor cores
	@$(BIN)/python -m kernels.compile_check $(ARGS)

lint: $(DEV_STAMP) ## check style
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

gpu-check: ## on a machine with an NVIDIA GPU: build, test, sanitize, measure; 8 minutes; installs nothing
	@if test -x $(BIN)/python; then $(BIN)/python -m benchmarks.gpu_check $(ARGS); else $(PYTHON) -m benchmarks.gpu_check $(ARGS); fi

clean: ## remove .venv and build leftovers (runs/ stays)
	rm -rf .venv build *.egg-info
