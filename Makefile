# Every target sets up what it needs: a virtual environment in .venv with the versions that CI ran.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= requirements/constraints.txt
BIN := $(VENV)/bin

SLURM_PACKAGES := slurmctld slurmd slurm-client munge
SLURM_IS_THERE := command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null
CONTAINER_PACKAGES := docker.io debootstrap
CONTAINERS_ARE_THERE := { docker info || { command -v dockerd && command -v debootstrap; }; } >/dev/null 2>&1
# The short form: make test-cluster CLUSTER_TESTS="cluster and not slow"
CLUSTER_TESTS ?= cluster

.DEFAULT_GOAL := help
.PHONY: help demo suite test test-slow test-attacks test-cluster slurm test-container containers lint docs check clean

help:            ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 18

demo: $(VENV)/.run     ## pretrain on synthetic scans, then show what was learned
	$(BIN)/python scripts/demo.py

# What the tables at hand allow: make suite SUITE_DATA=/data SUITE_MODELS=runs/mine,random,hu_statistics,raw_voxels
SUITE_DATA ?= ../shared/data
SUITE_MODELS ?= random:small,random:concentric,random:radial,hu_statistics,raw_voxels
SUITE_TASKS ?= lidc_texture,lidc_margin,lidc_spiculation,lidc_malignancy,luna16_malignancy_crops,sarcoma_metastasis,sarcoma_survival
suite: $(VENV)/.run     ## compare models on public lesion tasks; needs the scans and tables of docs/suite.md
	$(BIN)/python scripts/suite.py "models=[$(SUITE_MODELS)]" "tasks=[$(SUITE_TASKS)]" tables=$(SUITE_DATA) output=runs/suite num_workers=2

test: $(VENV)/.dev     ## run the tests, on all cores
	$(BIN)/python -m pytest -n auto -m "not slow and not cluster and not container"

test-slow: $(VENV)/.dev     ## run the tests that take long
	$(BIN)/python -m pytest -m "slow and not cluster and not container"

test-attacks: $(VENV)/.dev     ## run the tests that kill, damage or mislead what they test, on all cores
	$(BIN)/python -m pytest -n auto -m "attack and not cluster and not container"

test-cluster: slurm $(VENV)/.dev     ## start Slurm on this machine (root, Debian) and run the tests that need it; about 10 minutes
	$(BIN)/python -m pytest tests/cluster -m "$(CLUSTER_TESTS)"

slurm:     ## install Slurm, if it is not here (root, Debian)
	@$(SLURM_IS_THERE) || { apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SLURM_PACKAGES); } || \
	  { echo "Slurm is not here and cannot be installed: that takes root, and Debian's packages"; exit 1; }

test-container: containers $(VENV)/.dev     ## build the image, run it under Docker; 25 GB of disk, 15 minutes or more
	$(BIN)/python -m pytest tests/container

containers:     ## install Docker, if it is not here (root, Debian)
	@$(CONTAINERS_ARE_THERE) || { apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(CONTAINER_PACKAGES); } || \
	  { echo "Docker is not here and cannot be installed: that takes root, and Debian's packages"; exit 1; }

lint: $(VENV)/.dev     ## style, types, import rules, Dockerfile, shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck .ci/run $$(find scripts -name '*.sh' -o -name '*.sbatch')

docs: $(VENV)/.dev     ## build the documentation into site/; a broken link or name is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

check: lint docs test     ## what CI runs

clean:     ## remove the environment and what tools leave behind
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "fmcib_ssl needs Python 3.11 to 3.13; this is $$($(PYTHON) --version). Name another: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.python pyproject.toml $(CONSTRAINTS)
	@echo "installing fmcib_ssl and what it needs into $(VENV): several GB, a few minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[report]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@
