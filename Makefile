# Every target sets itself up in .venv with plain pip, and is quick when nothing has changed.
PYTHON ?= python3
BIN := .venv/bin
# Modules are compiled when they are first imported, which of most is never; if not, then every time.
unexport PYTHONDONTWRITEBYTECODE
INSTALLED := .venv/.installed

.PHONY: install demo test test-most test-ray test-rest drill test-all check lint types imports bench

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -c 'import mlflow, ray.train, ray.tune, torchvision'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m jobs.demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow and not cluster"

# `make --jobs=2 test-most` runs them side by side. Ray runs its workers at nice 15: the rest yields.
test-most: test-ray test-rest

test-ray: $(INSTALLED)
	$(BIN)/python -m pytest -m "ray and not slow"

test-rest: $(INSTALLED)
	OMP_WAIT_POLICY=passive nice -n 19 $(BIN)/python -m pytest -m "not ray and not slow"

drill: $(INSTALLED)
	@$(BIN)/python -c 'import sys; from tests.support import servers; sys.exit(servers.PostgreSQL.tools is None and "make drill needs PostgreSQL: apt install postgresql")'
	$(BIN)/python -m pytest -s -m cluster tests/gfl_platform/cluster/test_drill.py

test-all: $(INSTALLED)
	$(BIN)/python -m pytest

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
