# Everything a person types here; `make help` lists it. Needs Python >= 3.10, Git and make, nothing else.
VENV    ?= .venv
PYTHON  ?= python3
JOBS    ?=
STUDY   ?=
STUDIES ?=
TESTS   ?=
A       ?=
B       ?=
BIN     := $(VENV)/bin

# Stages are run by name (`python pipeline/...`): the environment's python and dvc come first.
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup repro update test test-all study studies preview status report compare lint

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

READY := $(VENV)/.installed

setup: $(READY) ## create the environment with the pinned packages (once, about a minute)
	@echo "the environment $(VENV) is ready"

# A second time is instant: setup.py runs only when requirements.txt is newer than the stamp.
$(READY): requirements.txt tasks/setup.py
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python >= 3.10, or say which: make setup PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) tasks/setup.py $(VENV)

repro: $(READY) ## run the study of params.yaml on all cores (JOBS=n for fewer) and print where the results are
	@$(BIN)/python tasks/repro.py $(if $(JOBS),--jobs $(JOBS))

update: $(READY) ## rerun only what an edit changed and what that needs, also in a fresh clone without cache
	@$(BIN)/python tasks/repro.py $(if $(JOBS),--jobs $(JOBS)) --changed-only

test: $(READY) ## run the tests (TESTS=tests/test_x.py for some)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup $(TESTS)

test-all: $(READY) ## also the slow tests: every network of torchvision and timm (installs timm; an hour or two)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements-networks.txt
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "slow or not slow" $(TESTS)

study: $(READY) ## switch to another study: STUDY=toy writes params.yaml = configs/default.yaml + configs/toy.yaml (or path/to/mine.yaml)
	@$(BIN)/python tasks/study.py $(STUDY)

studies: $(READY) ## run several studies one after the other: STUDIES="pareto pareto_70 pareto_50 pareto_35 pareto_15"
	@test -n "$(STUDIES)" || { echo 'error: say which: make studies STUDIES="pareto pareto_70 pareto_50"'; exit 1; }
	@for name in $(STUDIES); do $(MAKE) --no-print-directory study STUDY=$$name && $(MAKE) --no-print-directory repro || exit 1; done

preview: $(READY) ## what the current params mean: groups, MACs, predicted loss, estimated time (seconds, no training)
	@$(BIN)/python tasks/preview.py $(if $(JOBS),--jobs $(JOBS))

status: $(READY) ## cells done, failed, stale and missing, and how long the rest will take
	@$(BIN)/python tasks/status.py $(if $(JOBS),--jobs $(JOBS))

report: $(READY) ## the page and figures of any study from its records, in seconds (STUDY=pareto)
	@$(BIN)/python tasks/report.py $(STUDY)

compare: $(READY) ## two revisions or experiments, paired by seed: make compare A=HEAD~1 B=workspace
	@$(BIN)/python tasks/compare.py $(A) $(B)

lint: $(READY) ## check the style
	@$(BIN)/ruff check
