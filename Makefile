# Everything here makes .venv and installs what is missing; only Python 3.11 or newer must be there.
# Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow test-chaos test-soak test-full-size lint format bench kube-examples clean

help:  ## What can be made
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z%-]+):.*## /  make \1	/' | expand -t 22

install: $(INSTALLED)  ## Make .venv and install the exact versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: $(INSTALLED)  ## The whole path, from images to a served edit; ARGS="--once --workdir out"
	$(BIN)/insightedit quickstart $(ARGS)

test: $(INSTALLED)  ## The tests that every change must pass
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(INSTALLED)  ## The tests that take minutes each
	$(BIN)/python -m pytest -m slow $(ARGS)

test-chaos: $(INSTALLED)  ## Storms: whatever is killed, nothing is lost; counts in out/chaos.json
	$(BIN)/python -m pytest -m chaos -s $(ARGS)

test-soak: $(INSTALLED)  ## An hour of load: memory, descriptors and processes stay; INSIGHTEDIT_SOAK_MINUTES
	$(BIN)/python -m pytest -m soak -s $(ARGS)

test-full-size: $(INSTALLED)  ## The paper's model on a CPU, from random weights to an edit; 24 GB of memory, 35 of disk
	$(BIN)/python -m pytest -m full_size -s $(ARGS)

lint: $(INSTALLED)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(INSTALLED)  ## Put the code into ruff's form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# benchmarks/NAME.py prints its figures and writes out/NAME.json; NAME_PART.py is a part of it, figures.py of all.
# full_size_step.py wants a GPU and sources; it runs when it is named.
NO_BENCHMARKS := %_peers.py benchmarks/serve_%.py benchmarks/figures.py benchmarks/full_size_step.py
BENCHMARKS := $(filter-out $(NO_BENCHMARKS),$(sort $(wildcard benchmarks/*.py)))
bench: $(patsubst benchmarks/%.py,bench-%,$(BENCHMARKS))  ## Every benchmark

bench-%: $(INSTALLED)  ## One benchmark, benchmarks/%.py
	$(BIN)/python benchmarks/$*.py $(ARGS)

# Peers pin other versions than we do, so those of a benchmark have an environment of their own.
.venv-%-peers/.installed: benchmarks/%_peers.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps --requirement $<
	@touch $@

bench-data: $(INSTALLED) .venv-data-peers/.installed  ## Our stream beside torch's DataLoader, Hugging Face datasets and MosaicML streaming
	$(BIN)/python benchmarks/data.py --folder out/bench-data --peers .venv-data-peers/bin/python --rows 100000 $(ARGS)

bench-serve: $(INSTALLED) .venv-serve-peers/.installed  ## Our engine and server beside diffusers, LitServe and BentoML
	$(BIN)/python benchmarks/serve.py --peers .venv-serve-peers/bin/python $(ARGS)

KUBE := deploy/kuberay
kube-examples: $(INSTALLED)  ## deploy/kuberay/ anew from run.yaml, after a change of what the commands write
	$(BIN)/insightedit submit $(KUBE)/run.yaml --kube --name nano --out $(KUBE)/train.yaml
	$(BIN)/insightedit serve up --kube --config $(KUBE)/run.yaml --model 1 --out $(KUBE)/serve.yaml

clean:  ## Remove what building and running made; .venv and insightedit-work stay
	rm -rf build dist out src/*.egg-info .pytest_cache .ruff_cache
	find . -path "./.venv*" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
