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

.PHONY: help setup search test test-all compile-check lint gpu-check clean

help:
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) ## create .venv and install ffnas in it

# PyTorch goes first and alone: a later resolver then keeps the build that is there.
$(STAMP): pyproject.toml setup.py
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "setting up .venv (once)"
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install -q --disable-pip-version-check setuptools ninja
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[demo]'
	@touch $@

$(DEV_STAMP): $(STAMP)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[demo,dev]'
	@touch $@

search: $(STAMP) ## search, train and export the demo model; at most 10 minutes on 2 cores
	@$(BIN)/python -m search.run $(ARGS)

test: $(DEV_STAMP) ## run the tests
	@$(BIN)/python -m pytest -q -n auto --dist worksteal $(ARGS)

test-all: $(DEV_STAMP) ## run the slow tests too
	@$(BIN)/python -m pytest -q -n auto --dist worksteal -m "slow or not slow" $(ARGS)

compile-check: $(DEV_STAMP) ## compile all GPU kernels for sm_80 and sm_90, without a GPU; registers, spills, tensor cores
	@$(BIN)/python -m kernels.compile_check $(ARGS)

lint: $(DEV_STAMP) ## check style
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

gpu-check: $(DEV_STAMP) ## on a machine with an NVIDIA GPU: build, test, sanitize, measure; at most 8 minutes
	@$(BIN)/python -m benchmarks.gpu_check $(ARGS)

clean: ## remove .venv and build leftovers (runs/ stays)
	rm -rf .venv build *.egg-info
