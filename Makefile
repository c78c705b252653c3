# The two commands a newcomer needs: `make demo` and `make test`. Everything else is for developers.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
WORKERS ?= 2
PEERS  ?= .venv-peers
LATEST ?= .venv-latest

.PHONY: demo install test test-slow test-real check check-latest bench bench-gpu format clean

demo: $(VENV)/.installed           ## install, run the whole pipeline on the embedded world, say where the report is
	$(BIN)/keel run helpdesk

install: $(VENV)/.installed        ## keel in a virtual environment of its own

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and by its exact version: an open range would pull gigabytes of CUDA packages.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

test: $(VENV)/.installed-dev       ## what every change must pass; under 10 minutes on 2 cores
	$(BIN)/python -m pytest -n $(WORKERS)

test-slow: $(VENV)/.installed-dev  ## minutes each: killed runs, whole recipes
	$(BIN)/python -m pytest -m slow

test-real: $(VENV)/.installed-dev  ## on real models and data, where KEEL_REAL_DATA names a folder that has them
	$(BIN)/python -m pytest -m real

# The fast paths against the newest transformers; torch stays pinned unless TORCH names another, since an open range
# would pull gigabytes of CUDA packages.
TORCH ?= $(shell grep '^torch==' constraints.txt)
check-latest:                      ## accel's tests on the newest transformers that pip offers
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(LATEST)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(LATEST)/bin/python -m pip install --quiet --disable-pip-version-check -U transformers $(TORCH)
	$(LATEST)/bin/python -m pytest tests/accel

check: $(VENV)/.installed-dev      ## format, lint, types, import contract, then the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(MAKE) test

# Peers live in an environment of their own: TRL 1.16, and beside it 1.12, the last release that has PPO.
$(PEERS)/.installed: constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt trl==1.16.0
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(PEERS)/trl112 trl==1.12.0
	touch $@

bench: $(VENV)/.installed $(PEERS)/.installed  ## against peers, in pairs in one run; half an hour on an idle machine
	$(BIN)/python benchmarks/peers.py --peer $(PEERS)/bin/python --ppo-peer $(PEERS)/trl112
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/scaling.py

bench-gpu: $(VENV)/.installed $(PEERS)/.installed  ## correctness, sampling, memory and peers on one CUDA device
	$(BIN)/python benchmarks/gpu.py --peer $(PEERS)/bin/python --ppo-peer $(PEERS)/trl112

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(PEERS) $(LATEST) runs build dist .pytest_cache .ruff_cache
