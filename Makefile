PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO_DIR ?= runs/demo

# The oldest torch that is declared is a large download; continuous integration sets TORCH=torch==2.11.0.
TORCH ?= $(shell grep '^torch==' constraints.txt)
# Test processes; a file of tests stays in one of them.
WORKERS ?= 2
LOWER := .venv-lower
VLLM := .venv-vllm
DEEPSPEED := .deepspeed
# Which laws of vLLM: all, or an expression of pytest.
LAWS ?=
CORE := test_switch test_sampling test_divergences test_loss test_entry test_trainer test_golden

.PHONY: demo test test-long test-vllm test-vllm-long test-deepspeed lint install docs docs-serve test-lower-bounds clean

demo: $(VENV)/.installed  ## Install, then distil the embedded student with SWITCH (about 2 minutes on 2 cores).
	$(BIN)/switchkd demo --output_dir $(DEMO_DIR)

test: install  ## Install, then run the tests, the slow ones included.
	$(BIN)/python -m pytest -m "not long" --numprocesses $(WORKERS) --dist loadfile

test-long: install  ## What takes minutes: two steps of every stage of every recipe.
	$(BIN)/python -m pytest -m long

test-vllm: install $(VLLM)/.installed  ## The laws of rollouts on vLLM, in an environment of their own (2.8 GB).
	SWITCHKD_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest tests/vllm -m "not long" -k "$(LAWS)" \
	  --numprocesses $(WORKERS) --dist loadfile

test-vllm-long: install $(VLLM)/.installed  ## Those that take minutes: exact distributions, two workers, two processes.
	SWITCHKD_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest tests/vllm -m long

test-deepspeed: install $(DEEPSPEED)/.installed  ## ZeRO-2 and ZeRO-3 in two processes; DeepSpeed lies outside of .venv.
	PYTHONPATH=$(CURDIR)/$(DEEPSPEED) $(BIN)/python -m pytest tests/training/test_distributed.py -k "zero2 or zero3"

lint: install  ## Style, types, and the file tree in README.md.
	$(BIN)/ruff check src tests benchmarks docs/theme
	$(BIN)/ruff format --check src tests benchmarks docs/theme
	$(BIN)/mypy
	$(BIN)/python .ci/check_tree.py

install: $(VENV)/.installed-dev  ## All that `make test` and `make lint` need.

docs: $(VENV)/.installed-docs  ## The documentation site, in site/; every warning is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(VENV)/.installed-docs  ## The same on http://127.0.0.1:8000, built again whenever a page changes.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

test-lower-bounds:  ## The core of the suite with the oldest dependencies that pyproject.toml allows.
	$(PYTHON) -m venv --clear $(LOWER)
	$(LOWER)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lower.txt $(TORCH) -e ".[peft]" pytest
	$(LOWER)/bin/python -m pytest $(foreach name,$(CORE),$(or $(shell find tests -name $(name).py),no-file-$(name)))

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "switchkd needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e ".[dev]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) -e ".[docs]"
	touch $@

# Every package of the file is named, so nothing else comes along: what a rollout imports of vLLM, and torch as ours.
$(VLLM)/.installed: tests/vllm/requirements.txt constraints.txt
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(TORCH) -r tests/vllm/requirements.txt
	touch $@

# Not in .venv: where it is installed other libraries behave otherwise.
$(DEEPSPEED)/.installed: constraints.txt
	$(PIP) --no-deps --target $(DEEPSPEED) deepspeed hjson py-cpuinfo einops msgpack ninja
	touch $@

clean:
	rm -rf $(VENV) $(LOWER) $(VLLM) $(DEEPSPEED) runs build dist site src/*.egg-info
