# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

# Every target does its own set-up, from nothing but make, Python 3.10-3.12 and pip, into .venv.
#   make test PYTHON=python3.12              another Python for the environment (read when .venv is made)
#   make test PYTEST_ARGS='-k decay -x'      arguments for pytest
#   make test-kills KILLS_SEED=1             other moments
#   make test VENV=.venv-lowest UV_RESOLUTION=lowest-direct      the oldest versions that setup.py admits
#   make test VENV=.venv-extra EXTRAS=test,trl                   what else the environment has

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test
PYTEST_ARGS ?=
KILLS ?= 24
TRL_VENV ?= .venv-trl
LLMFOUNDRY_VENV ?= .venv-llmfoundry
CORE_VENV ?= .venv-core
CORE_PYTHON ?= $(VENV)/bin/python
TORCH ?= torch
PACKAGE_VENV ?= .venv-package

UV := $(VENV)/uv/bin/uv
INSTALLED := $(VENV)/.installed
LINTERS := $(VENV)/.linters
SPHINX := $(VENV)/.sphinx
TRL_INSTALLED := $(TRL_VENV)/.installed
LLMFOUNDRY_INSTALLED := $(LLMFOUNDRY_VENV)/.installed

# uv then trusts the certificates that the system trusts, as pip does: behind a company's proxy it could fetch nothing.
export UV_SYSTEM_CERTS ?= 1
# pyright is pinned; a note that a newer one exists costs a request and helps nobody.
export PYRIGHT_PYTHON_IGNORE_WARNINGS ?= 1

.PHONY: help install quickstart study cooldowns evidence evidence-theory evidence-language-model evidence-digits bench-offline bench-offload bench-update bench-update-gpu bench-memory bench-training bench-startup bench-tables test test-kills test-docs-slow test-trl test-llmfoundry test-core package test-package lint docs format hooks clean
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

bench-tables: $(INSTALLED)  ## Put what was measured into docs/performance.md
	$(VENV)/bin/python benchmarks/paste_tables.py docs/performance.md

bench-startup: $(INSTALLED)  ## Measure how long the command line takes to start: docs/performance.md
	$(VENV)/bin/python benchmarks/startup.py

bench-offload: $(INSTALLED)  ## Measure what an average in host memory costs a model on a GPU: needs one, 40 GB of its memory
	$(VENV)/bin/python benchmarks/offload.py

bench-update-gpu: $(INSTALLED)  ## Measure updates on a GPU beside copies there, for 124M and 1.1B parameters, in a minute
	$(VENV)/bin/python benchmarks/update_gpu.py

test: $(INSTALLED)  ## Run the tests; those that need a GPU are skipped where there is none
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-kills: $(INSTALLED)  ## Kill each of the runs of tests/distributed/test_kill.py KILLS times (24), in five minutes
	KILLS=$(KILLS) $(VENV)/bin/python -m pytest tests/distributed/test_kill.py -rP --show-capture=stdout $(PYTEST_ARGS)

test-docs-slow: $(INSTALLED)  ## Run all code in README and docs, those blocks too that take minutes: half an hour, 10 GB of disk
	SLOW_DOCS=1 $(VENV)/bin/python -m pytest tests/docs -o faulthandler_timeout=3600 $(PYTEST_ARGS)

test-trl: $(INSTALLED) $(TRL_INSTALLED)  ## Hold DPO against TRL's own trainer, which gets the environment .venv-trl, of several GB
	TRL_PYTHON=$(TRL_VENV)/bin/python $(VENV)/bin/python -m pytest tests/preference/test_trl.py $(PYTEST_ARGS)

test-llmfoundry: $(INSTALLED) $(LLMFOUNDRY_INSTALLED)  ## Train with llm-foundry's command, in its environment .venv-llmfoundry, of several GB
	LLMFOUNDRY_PYTHON=$(LLMFOUNDRY_VENV)/bin/python $(VENV)/bin/python -m pytest tests/llmfoundry $(PYTEST_ARGS)

test-core: $(UV)  ## Test the averages with torch alone, the newest or TORCH=torch==2.9.1, in .venv-core: no Composer
	$(UV) venv --quiet --clear --python $(CORE_PYTHON) $(CORE_VENV)
	$(UV) pip install --quiet --python $(CORE_VENV)/bin/python '$(TORCH)' numpy 'pytest>=9,<10' 'hypothesis>=6.100,<7'
	$(UV) pip install --quiet --python $(CORE_VENV)/bin/python --no-deps --editable .
	$(CORE_VENV)/bin/python -c 'import platform, torch; print("Python", platform.python_version(), "torch", torch.__version__)'
	$(CORE_VENV)/bin/python -m pytest tests/averaging tests/test_functional.py $(PYTEST_ARGS)

package: $(UV)  ## Build the source distribution and, from it, the wheel: dist/
	rm -rf dist
	$(UV) build --quiet --python $(VENV)/bin/python --out-dir dist

# The extras are resolved, not installed: what comes with them is tested elsewhere.
test-package: $(INSTALLED) package  ## Install the wheel into .venv-package, an empty environment, and try it there
	$(UV) venv --quiet --clear --python $(VENV)/bin/python $(PACKAGE_VENV)
	$(UV) pip install --quiet --python $(PACKAGE_VENV)/bin/python dist/*.whl
	for extras in eval,peft,trl eval,peft,llmfoundry; do \
	    $(UV) pip install --quiet --dry-run --python $(PACKAGE_VENV)/bin/python "$$(echo dist/*.whl)[$$extras]" || exit 1; \
	done
	PACKAGE_PYTHON=$(PACKAGE_VENV)/bin/python $(VENV)/bin/python -m pytest tests/test_built_package.py $(PYTEST_ARGS)

lint: $(LINTERS)  ## Check style, formatting and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

docs: $(SPHINX)  ## Make a site of docs/ with a reference of the API, in build/docs; warnings are errors
	$(VENV)/bin/sphinx-build --fail-on-warning --keep-going --fresh-env --quiet docs build/docs

format: $(LINTERS)  ## Rewrite the code as `make lint` wants it
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

hooks: $(LINTERS)  ## Run the linters before each git commit
	$(VENV)/bin/pre-commit install

clean:  ## Remove the environments and the caches of the tools
	rm -rf $(VENV) $(TRL_VENV) $(LLMFOUNDRY_VENV) $(CORE_VENV) $(PACKAGE_VENV) dist .pytest_cache .ruff_cache .hypothesis build composer_bema.egg-info composer_bema/averaging/*.so

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
$(INSTALLED): setup.py composer_bema/version.py composer_bema/averaging/compiled_kernels.c | $(UV)
	$(UV) pip install --python $(VENV)/bin/python --editable '.[$(EXTRAS)]'
	@touch $@

$(LINTERS): $(INSTALLED) | $(UV)
	$(UV) pip install --python $(VENV)/bin/python --editable '.[$(EXTRAS),lint]'
	@touch $@

$(SPHINX): $(INSTALLED) | $(UV)
	$(UV) pip install --python $(VENV)/bin/python --editable '.[$(EXTRAS),docs]'
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

# llm-foundry's bounds are narrower than the package's, and the tests need no more of it than its commands.
$(LLMFOUNDRY_INSTALLED): setup.py composer_bema/version.py | $(UV)
	$(UV) venv --clear --python $(VENV)/bin/python $(LLMFOUNDRY_VENV)
	$(UV) pip install --python $(LLMFOUNDRY_VENV)/bin/python --editable '.[llmfoundry]'
	@touch $@
