# Every target sets itself up in .venv with plain pip, and is quick when nothing has changed.
PYTHON ?= python3
BIN := .venv/bin
# Modules are compiled when they are first imported, which of most is never; if not, then every time.
unexport PYTHONDONTWRITEBYTECODE
INSTALLED := .venv/.installed

.PHONY: install demo test drill test-all check lint types imports bench

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -c 'import mlflow, ray.train, ray.tune, torchvision'
	@touch $@

# `make demo DEMO="schedule.epochs=1"` overrides keys of configs/demo.yaml.
demo: $(INSTALLED)
	$(BIN)/python -m jobs.demo $(DEMO)

# Each process of the tests has one thread, for they share the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PARALLEL := --numprocesses auto --dist loadgroup --no-loadscope-reorder

test: $(INSTALLED)
	$(PYTEST) $(PARALLEL) -m "not chaos and not slow"

test-all: $(INSTALLED)
	$(PYTEST) $(PARALLEL) -m "not chaos"
	$(PYTEST) -m chaos

drill: $(INSTALLED)
	@$(BIN)/python -c 'import sys; from tests.support import servers; sys.exit(servers.PostgreSQL.tools is None and "make drill needs PostgreSQL: apt install postgresql")'
	$(PYTEST) --capture no tests/gfl_platform/cluster/test_drill.py

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
