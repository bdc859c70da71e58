# Every target sets itself up in .venv with plain pip, and is quick when nothing has changed.
PYTHON ?= python3
BIN := .venv/bin
# Modules are compiled when they are first imported, which of most is never; if not, then every time.
unexport PYTHONDONTWRITEBYTECODE
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --no-compile --no-deps

.PHONY: install lock demo test drill fuzz test-all check lint types imports bench

install: $(INSTALLED)

$(INSTALLED): pyproject.toml requirements-torch.txt requirements-dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --requirement requirements-torch.txt
	$(PIP) --require-hashes --requirement requirements-dev.lock
	$(PIP) --no-build-isolation --editable .
	$(BIN)/python -c 'import mlflow, ray.train, ray.tune, torchvision'
	@touch $@

# `make lock` writes every version with its hashes anew, `make lock UPGRADE=--upgrade` the newest.
COMPILE := $(BIN)/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe --no-header --no-annotate \
	--constraint requirements-torch.txt --unsafe-package torch --unsafe-package torchvision --unsafe-package gfl-platform $(UPGRADE)

lock: $(INSTALLED)
	$(COMPILE) --output-file requirements.lock pyproject.toml
	$(COMPILE) --constraint requirements.lock --extra dev --output-file requirements-dev.lock pyproject.toml
	$(COMPILE) --constraint requirements.lock --output-file deploy/mlflow/requirements.lock deploy/mlflow/requirements.in

# `make demo DEMO="schedule.epochs=1"` overrides keys of configs/demo.yaml.
demo: $(INSTALLED)
	$(BIN)/python -m jobs.demo $(DEMO)

# Each process of the tests has one thread, for they share the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PARALLEL := --numprocesses auto --dist loadgroup --no-loadscope-reorder

test: $(INSTALLED)
	$(PYTEST) $(PARALLEL) -m "not chaos and not slow and not fuzz"

test-all: $(INSTALLED)
	$(PYTEST) $(PARALLEL) -m "not chaos and not fuzz"
	$(PYTEST) -m chaos

drill: $(INSTALLED)
	@$(BIN)/python -c 'import sys; from tests.support import servers; sys.exit(servers.PostgreSQL.tools is None and "make drill needs PostgreSQL: apt install postgresql")'
	$(PYTEST) --capture no tests/gfl_platform/cluster/test_drill.py

# Files and requests that nobody would write, a few minutes of them.
fuzz: $(INSTALLED)
	$(PYTEST) -m fuzz tests/fuzz

check: lint types imports

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python deploy/lint.py

types: $(INSTALLED)
	$(BIN)/mypy

imports: $(INSTALLED)
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks $(if $(PEER),--peer $(PEER))
