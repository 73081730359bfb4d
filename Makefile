# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

# Every target does its own set-up, from nothing but make, Python 3.10-3.12 and pip, into .venv.
#   make test PYTHON=python3.12              another Python for the environment (read when .venv is made)
#   make test PYTEST_ARGS='-k decay -x'      arguments for pytest
#   make test-kills KILLS_SEED=1             other moments

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
KILLS ?= 24
TRL_VENV ?= .venv-trl

UV := $(VENV)/uv/bin/uv
INSTALLED := $(VENV)/.installed
LINTERS := $(VENV)/.linters
TRL_INSTALLED := $(TRL_VENV)/.installed

# uv then trusts the certificates that the system trusts, as pip does: behind a company's proxy it could fetch nothing.
export UV_SYSTEM_CERTS ?= 1
# pyright is pinned; a note that a newer one exists costs a request and helps nobody.
export PYRIGHT_PYTHON_IGNORE_WARNINGS ?= 1

.PHONY: help install quickstart study cooldowns evidence evidence-theory evidence-language-model evidence-digits bench-offline bench-update bench-memory bench-training bench-startup test test-kills test-trl lint format hooks clean
.DELETE_ON_ERROR:

help:  ## Say what the targets do
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 32

install: $(INSTALLED)  ## Make .venv with the package (editable) and what its tests need

quickstart: $(INSTALLED)  ## Train a tiny model with BEMA on the CPU
	$(VENV)/bin/composer-bema train yamls/quickstart.yaml run_name=quickstart save_overwrite=true

study: $(INSTALLED)  ## Tune the quickstart's averages again, over seeds: the tables of docs/quickstart.md, in five minutes
	$(VENV)/bin/python benchmarks/quickstart_study.py

cooldowns: $(INSTALLED)  ## Train one long run, three branches with a cooldown and averages: docs/cooldowns.md, in eleven minutes
	$(VENV)/bin/python benchmarks/cooldowns.py

evidence: evidence-theory evidence-language-model evidence-digits  ## All of docs/evidence.md, in under half an hour

evidence-theory: $(INSTALLED)  ## Compute and simulate the averages' errors on quadratics: runs/evidence/theory, in a minute
	$(VENV)/bin/python benchmarks/evidence_theory.py

evidence-language-model: $(INSTALLED)  ## Compare EMA and BEMA on a language model over five seeds: docs/evidence.md, in 13 minutes
	$(VENV)/bin/python benchmarks/evidence_language_model.py

evidence-digits: $(INSTALLED)  ## The same on a classifier with BatchNorm: docs/evidence.md, in four minutes
	$(VENV)/bin/python benchmarks/evidence_digits.py

bench-offline: $(INSTALLED)  ## Measure averaging ten checkpoints offline: the table of docs/offline.md, 10 GB of disk
	$(VENV)/bin/python benchmarks/offline.py

bench-update: $(INSTALLED)  ## Measure updates and swaps, ours and others': docs/performance.md, 18 GB of memory
	$(VENV)/bin/python benchmarks/update.py --model 124m
	$(VENV)/bin/python benchmarks/update.py --model adapters --dtype bf16
	$(VENV)/bin/python benchmarks/update.py --model 1b --repeats 3

bench-memory: $(INSTALLED)  ## Measure the memory of averages, ours and others': docs/performance.md
	$(VENV)/bin/python benchmarks/memory.py

bench-training: $(INSTALLED)  ## Measure what averages cost a training run: docs/performance.md
	$(VENV)/bin/python benchmarks/training.py

bench-startup: $(INSTALLED)  ## Measure how long the command line takes to start: docs/performance.md
	$(VENV)/bin/python benchmarks/startup.py

test: $(INSTALLED)  ## Run the tests; those that need a GPU are skipped where there is none
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-kills: $(INSTALLED)  ## Kill each of the runs of tests/distributed/test_kill.py KILLS times (24), in five minutes
	KILLS=$(KILLS) $(VENV)/bin/python -m pytest tests/distributed/test_kill.py -rP --show-capture=stdout $(PYTEST_ARGS)

test-trl: $(INSTALLED) $(TRL_INSTALLED)  ## Hold DPO against TRL's own trainer, which gets the environment .venv-trl, of several GB
	TRL_PYTHON=$(TRL_VENV)/bin/python $(VENV)/bin/python -m pytest tests/preference/test_trl.py $(PYTEST_ARGS)

lint: $(LINTERS)  ## Check style, formatting and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(LINTERS)  ## Rewrite the code as `make lint` wants it
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

hooks: $(LINTERS)  ## Run the linters before each git commit
	$(VENV)/bin/pre-commit install

clean:  ## Remove .venv, .venv-trl and the caches of the tools
	rm -rf $(VENV) $(TRL_VENV) .pytest_cache .ruff_cache .hypothesis build composer_bema.egg-info

# The environment has no pip of its own, since Debian's Python cannot put one there without a further package; the pip of
# $(PYTHON) fetches uv instead. uv resolves Composer's dependencies in seconds, where pip takes more than ten minutes.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || { \
	    echo "composer_bema needs Python 3.10, 3.11 or 3.12, and '$(PYTHON)' is none of them:" \
	         "name one, as in 'make test PYTHON=python3.11'." >&2; exit 1; }
	@$(PYTHON) -c 'import venv' || { \
	    echo "'$(PYTHON)' lacks the venv module: install it ('apt install python3-venv' on Debian and Ubuntu)" \
	         "or name another Python, as in 'make test PYTHON=python3.11'." >&2; exit 1; }
	$(PYTHON) -m venv --without-pip $(VENV)

$(UV): | $(VENV)/bin/python
	@$(PYTHON) -m pip --version >/dev/null || { \
	    echo "'$(PYTHON)' lacks pip: install it ('apt install python3-pip' on Debian and Ubuntu)" \
	         "or name another Python, as in 'make test PYTHON=python3.11'." >&2; exit 1; }
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --upgrade --target $(VENV)/uv uv

# The stamps are as old as the last installation, which setup.py and the version in it can make stale.
$(INSTALLED): setup.py composer_bema/version.py | $(UV)
	$(UV) pip install --python $(VENV)/bin/python --editable '.[test]'
	@touch $@

$(LINTERS): $(INSTALLED) | $(UV)
	$(UV) pip install --python $(VENV)/bin/python --editable '.[test,lint]'
	@touch $@

# TRL wants a transformers that the package excludes, and so lives apart; the versions are those it was tested with. Made
# anew whenever this file changes, for the versions are in it: from uv's cache that takes seconds.
$(TRL_INSTALLED): Makefile | $(UV)
	@$(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "TRL 1.16 needs Python 3.11 or newer, and $(VENV) has an older one: make it anew," \
	         "as in 'make clean' and 'make test-trl PYTHON=python3.11'." >&2; exit 1; }
	$(UV) venv --clear --python $(VENV)/bin/python $(TRL_VENV)
	$(UV) pip install --python $(TRL_VENV)/bin/python \
	    'trl==1.16.*' 'transformers==5.24.0' 'accelerate==1.15.0' 'datasets==5.2.0' 'torch==2.7.0'
	@touch $@
