# make demo: compile the embedded model and compare it with the float model.
# make test: run all tests. Both make the virtual environment first.
SHELL := /bin/bash -o pipefail
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.mqc-installed
NATIVE_STAMP := $(VENV)/.mqc-native
NATIVE_SOURCES := CMakeLists.txt tools/build_native.sh \
	$(shell find backends/onnx/native cuda -type f -not -path '*/__pycache__/*')
ROOMS := mqc passes backends cuda tests tools
# Tests run in WORKERS processes; one math thread each keeps them from fighting for the cores.
WORKERS ?= 2
TEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast native lint format venv clean

help: ## Show these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

venv: $(STAMP) ## Make .venv and install everything into it

$(STAMP): pyproject.toml constraints.txt tools/setup_venv.sh
	@VENV=$(VENV) tools/setup_venv.sh
	@touch $@

# The library is optional: tests that need it are skipped without it.
$(NATIVE_STAMP): $(STAMP) $(NATIVE_SOURCES)
	@VENV=$(VENV) tools/build_native.sh || echo "native: going on without the libraries" >&2
	@touch $@

native: $(STAMP) ## Build the native libraries again; fail where they cannot be built
	@VENV=$(VENV) tools/build_native.sh
	@touch $(NATIVE_STAMP)

demo: $(NATIVE_STAMP) ## Compile tiny-qwen2-vl for onnx, run it, compare it with the float model
	@$(BIN)/mqc demo

test: $(NATIVE_STAMP) ## Run all tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(TEST_ARGS)

test-fast: $(NATIVE_STAMP) ## Run the tests that are not marked slow
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow" $(TEST_ARGS)

lint: $(STAMP) ## Check style and types
	@$(BIN)/ruff check $(ROOMS)
	@$(BIN)/ruff format --check --quiet $(ROOMS) || \
		{ echo "run: make format"; $(BIN)/ruff format --check $(ROOMS); }
	@$(BIN)/python tools/lint_tree.py
	@$(BIN)/mypy | sed -E 's#^\.lint/mqc/(passes|backends|cuda)/#\1/#; s#^\.lint/##'

format: $(STAMP) ## Rewrite the sources in the project's style
	@$(BIN)/ruff check --fix-only --quiet $(ROOMS)
	@$(BIN)/ruff format $(ROOMS)

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .lint build backends/onnx/*.so dist *.egg-info .pytest_cache .ruff_cache .hypothesis
