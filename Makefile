# make train EXP=tiny SET="run.name=mine train.steps=500"
PYTHON ?= python3
EXP ?= tiny
SET ?=
VENV := .venv
BIN := $(VENV)/bin
CONFIG := conf/experiments/$(EXP).yaml
STAMP := $(VENV)/.installed
# Kept open to be told where torch comes from: PIP_INSTALL="pip install --index-url ..." for a CPU-only or CUDA build.
PIP_INSTALL ?= $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help install train submit test test-unit test-distributed test-ray test-gpu families bench pictures bench-gpu chaos clusters fuzz check clean

help:
	@echo "make train              train the tiny model on this machine (EXP=name, SET=\"key=value ...\")"
	@echo "make submit             the same as a job of the cluster at RAY_API_SERVER_ADDRESS"
	@echo "make test               all tests; also test-unit, test-distributed, test-ray, test-gpu"
	@echo "make families           try every causal language model of transformers, and write the table into README.md"
	@echo "make bench              measure against the peers, side by side (ARMS=saves ROUNDS=5); bench-gpu: the engine on one GPU"
	@echo "make pictures           draw what bench measured last into the README's pictures (INTO=folder)"
	@echo "make chaos              real faults for MINUTES=15 in the order of SEED=0, and a check that nothing was lost"
	@echo "make clusters           several runs on one cluster, submitted drivers and sweeps, killed; NAMES=\"two_runs sweep\""
	@echo "make fuzz               N=20000 mutated checkpoints, logs and configs of SEED=0; CASE=n repeats one"
	@echo "make check              format, lint, types, import contracts"
	@echo "make install            .venv with everything pinned; the others call it when needed"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "areal_ray needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	@echo "installing into $(VENV) (a minute or two, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and by its exact version: a range would admit builds of several gigabytes.
	@$(PIP_INSTALL) --constraint constraints.txt torch
	@$(PIP_INSTALL) --constraint constraints.txt --editable '.[ray,s3,dev]'
	@touch $(STAMP)

train: install
	@$(BIN)/python jobs/train.py --config $(CONFIG) $(SET)

submit: install
	@$(BIN)/areal-ray submit --config $(CONFIG) $(SET)

# Two processes (tests/conftest.py says who gets which test); plain `pytest tests` is the same one after the other.
test: install
	@$(BIN)/pytest tests -m "not gpu" -n 2

test-unit: install
	@$(BIN)/pytest tests/unit -n 2

test-distributed: install
	@$(BIN)/pytest tests/distributed -m "not gpu" -n 2

test-ray: install
	@$(BIN)/pytest tests/ray

# On one GPU, with whatever Python has torch 2.11 or newer and tests/gpu-requirements.txt: no Ray, no installation. First
# the probe, then engine/, models/, checkpoint/ and what is below them; only the files that need no more than that.
test-gpu:
	@$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("test-gpu needs a CUDA device, and torch finds none here.")'
	@# strict-config would stumble over the options of absent plugins
	@$(PYTHON) -m tests.gpu_probe; probe=$$?; $(PYTHON) -m pytest $$(grep -rl 'pytest\.mark\.gpu' tests --include='test_*.py') -m gpu -o addopts="-q --strict-markers" -W ignore::pytest.PytestConfigWarning && exit $$probe

# make families NAMES="qwen3 mixtral": only these, without writing the table
families: install
	@$(BIN)/python -m tests.families $(NAMES)

# make bench ARMS="saves restart" ROUNDS=5 ONLY="tutorial areal_ray" MODEL=120M
bench: install
	@$(BIN)/python -m tests.bench $(ARMS) --rounds $(or $(ROUNDS),5) $(if $(ONLY),--only $(ONLY)) $(if $(MODEL),--model $(MODEL))

# Into the folder of the README's, unless INTO=folder is given.
pictures: install
	@$(BIN)/python -m tests.bench.pictures $(if $(INTO),--into $(INTO))

# As test-gpu.
bench-gpu:
	@$(PYTHON) -m tests.bench.gpu $(SET) --rounds $(or $(ROUNDS),2)

# make chaos MINUTES=15 SEED=1 SET="key=value"; MACHINES=1: with a network between the workers
chaos: install
	@$(BIN)/areal-ray chaos --config $(CONFIG) --minutes $(or $(MINUTES),15) --seed $(or $(SEED),0) $(if $(MACHINES),--machines) $(SET)

# make clusters NAMES="two_runs sweep": some ten minutes for all of them
clusters: install
	@$(BIN)/python -m tests.clusters $(NAMES)

# make fuzz N=20000 SEED=0 CASE=17 (that one again)
fuzz: install
	@$(BIN)/python -m tests.fuzz --cases $(or $(N),20000) --seed $(or $(SEED),0) $(if $(CASE),--case $(CASE))

check: install
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo --quiet 2>/dev/null || $(BIN)/lint-imports --no-logo

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
