# `make test` is the whole gate, `make demo` the main job on a real model. A fresh machine needs
# python3 (with venv) and make; everything else goes into .venv, pinned by constraints.txt.

SHELL := bash
PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist loadfile
BIN := .venv/bin
READY := .venv/.mergekit-ft-ready
PEER := .venv-peer
PEER_READY := $(PEER)/.mergekit-ft-ready
TREE := .cache/floors/mergekit_ft

.PHONY: help venv demo evidence-tuning check format-check lint tree types floors test bench peers clean

help:
	@echo "make venv | demo | evidence-tuning | check | test | bench | peers | clean"

venv: $(READY)

# Done once, and again when what we need changes; a .venv without a working pip is made anew.
$(READY): pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "installing into .venv (torch is large; once, until what we need changes)"
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev,demo]'
	touch $@

demo: $(READY)
	$(BIN)/python examples/two_experts/demo.py

# Eleven ways to tune, compared: about an hour on two cores, and what was done is not done again.
evidence-tuning: $(READY)
	$(BIN)/python examples/compared_tuners/compare.py

check: format-check lint types floors

format-check: $(READY)
	$(BIN)/ruff format --check .

lint: $(READY)
	$(BIN)/ruff check .

# The package as a wheel carries it, as links: mypy and import-linter see the methods inside.
tree:
	@rm -rf $(TREE) && mkdir -p $(TREE)
	@cd $(TREE) && ln -s ../../../mergekit_ft/* ../../../methods .

types: $(READY) tree
	set -o pipefail; $(BIN)/mypy | sed -e 's|$(TREE)/methods/|methods/|' -e 's|^\.cache/floors/||'

floors: $(READY) tree
	cd $(TREE)/.. && ../../$(BIN)/lint-imports --config ../../setup.cfg --no-cache

test: check
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(READY)
	set -e; for script in benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python $$script; done

$(PEER_READY): constraints.txt
	$(PEER)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(PEER)
	$(PEER)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt \
		mergekit==0.1.5 torch==2.13.0 transformers==5.23.0
	touch $@

peers: $(READY) $(PEER_READY)
	MERGEKIT_PEER=$(CURDIR)/$(PEER)/bin/python $(BIN)/python -m pytest tests/peers --run-peer

clean:
	rm -rf .venv $(PEER) .cache build dist *.egg-info .coverage
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -path ./.git -prune -o -name __pycache__ -prune -exec rm -rf {} +
