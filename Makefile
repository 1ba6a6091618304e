PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.bench-ready

# make soak SECONDS=3600 SEED=7; without a seed, one of its own each time, which it tells.
SECONDS := 300
SEED ?=
# make test-engines ENGINES="20.10 26.1 28.5 rootless podman-4.3 podman-5.4"
ENGINES ?=

export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup engine rights run check fast test test-engines test-pythons soak bench publish clean
# setup and engine may both need apt, which allows one user at a time.
.NOTPARALLEL:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## create .venv with eventwatch and its tools (again only when pyproject.toml or the versions changed)

engine: ## make sure that a Docker engine answers (as root on Debian: install and start what is missing)
	@.ci/engine

rights:
	@.ci/engine check

run: rights setup engine ## run eventwatch beside two demo nodes until Ctrl-C
	@$(BIN)/python -m tests.demo

check: setup ## lint, formatting, types, import layers
	@echo "==> ruff check"
	@$(BIN)/ruff check
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check
	@echo "==> mypy"
	@$(BIN)/mypy
	@echo "==> lint-imports"
	@$(BIN)/lint-imports

fast: check ## check and the unit tests: under a minute, no engine needed
	@echo "==> pytest tests/unit"
	@$(BIN)/python -m pytest -q tests/unit

test: setup engine check ## everything: check, then all tests against a real engine and a real MongoDB
	@.ci/browser
	@echo "==> pytest"
	@$(BIN)/python -m tests.parts

test-engines: setup engine ## the end-to-end tests on Docker 26.1 and 28.5, or on ENGINES="rootless podman-5.4" (root on Debian)
	@$(BIN)/python -m tests.run_on_engines $(addprefix --engine ,$(ENGINES))

test-pythons: ## the unit tests on each Python from 3.11 on that is here (installs what they need in .cache)
	@.ci/pythons

soak: setup engine ## random faults on two engines with one database, 5 minutes (SECONDS=3600 SEED=7), root on Debian
	@$(BIN)/python -m tests.faults.soak --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

bench: setup engine $(BENCH_READY) ## measure every figure beside its floor, about 6 minutes (BENCH="--rounds 5")
	@$(BIN)/python -m tests.bench $(BENCH)

publish: ## build, try and upload this version (IMAGE=REGISTRY/NAME INDEX=URL; .ci/publish says what else)
	@.ci/publish

clean: ## remove .venv, caches and builds
	@echo "==> removing .venv, caches and builds"
	@rm -rf $(VENV) build dist .cache .coverage .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find . -name .git -prune -o -type d \( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +

$(READY): pyproject.toml .ci/dev-constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "error: $(PYTHON) is not Python 3.11 or newer; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
		if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
			echo "error: $(PYTHON) cannot create a venv; install its venv package (Debian: sudo apt-get install python3-venv)" >&2; \
			exit 1; \
		fi; \
		echo "==> installing python3-venv with apt-get"; \
		{ apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv; } >/dev/null 2>&1 \
			|| { echo "error: apt-get could not install python3-venv: run it by hand to see why" >&2; exit 1; }; \
	fi
	@echo "==> creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "==> installing eventwatch and its tools into $(VENV) (the first time, some 100 MB are downloaded)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/dev-constraints.txt -e '.[dev]'
	@touch $@

$(BENCH_READY): $(READY)
	@echo "==> installing what draws the benchmark's plot into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	@touch $@
