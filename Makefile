# Every target sets up what it needs in .venv; `make demo` and `make test` work on a fresh clone.
# PYTHON: any Python >= 3.11; the first one on PATH that runs is taken.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Most of what tests do is to compile small programs: without LLVM's optimisation and the MLIR emitters of fusions they
# take less than half of the time. `make test-slow` and pytest by hand compile as users do.
TEST_XLA_FLAGS ?= --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 $(WITHOUT_MLIR)
# Asked of the XLA that is installed, since one that does not know a flag (jax 0.12) ends the process.
WITHOUT_MLIR = $(shell f=--xla_cpu_use_fusion_emitters=false; JAX_PLATFORMS=cpu XLA_FLAGS=$$f \
	$(BIN)/python -c 'import jax; jax.devices()' >/dev/null 2>&1 && echo $$f)
# The tests' oracle; installed on its own first, so that a CPU build is taken where pip knows one.
TORCH ?= torch==2.13.0

.PHONY: venv demo test test-slow lint format clean help

help:
	@echo "make demo       the main job end to end on real input (about ten minutes on two cores)"
	@echo "make test       the test suite, without what takes long"
	@echo "make test-slow  what takes long: real models, whole runs"
	@echo "make lint       ruff and mypy"
	@echo "make format     ruff format, import order"
	@echo "make clean      remove what the targets made"

venv: $(VENV)/.installed-jora

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 on PATH; set PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Each stamp installs one set of extras, so that a demo does not wait for the test oracles.
$(VENV)/.installed-jora: $(VENV)/.made pyproject.toml
	@echo "installing jora into $(VENV)"
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.made pyproject.toml
	@echo "installing jora and the demo's model (about 250 MB) into $(VENV)"
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.made pyproject.toml
	@echo "installing jora, the demo's model and the test oracles into $(VENV)"
	$(PIP) '$(TORCH)'
	$(PIP) -e '.[test,demo]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	@echo "installing the linters into $(VENV)"
	$(PIP) -e '.[dev,demo]'
	@touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/jora demo $(ARGS)

test: $(VENV)/.installed-test
	XLA_FLAGS="$(TEST_XLA_FLAGS)" $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
