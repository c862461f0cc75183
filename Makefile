# make demo: install and train the embedded default.  make test: install, lint, test.
PYTHON ?= python3
BIN := .venv/bin
# A torch that is already installed is used, not installed again.
SITE := $(shell $(PYTHON) -c "import torch; v = torch.__version__.split('.'); print('--system-site-packages' * ((int(v[0]), int(v[1])) >= (2, 6)))" 2>/dev/null)

# Networks this small gain nothing from a second thread, so that the second core takes tests of its own.
ONE_THREAD := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10

.PHONY: demo test test-all test-lowest faults fuzz errors format

demo: .venv/.installed
	$(BIN)/python train.py

test: .venv/.installed-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(PYTEST)

test-all: .venv/.installed-test
	$(PYTEST) -m ""

# The oldest release of each dependency that pyproject.toml admits, beside one torch: docs/versions.md keeps the results.
TORCH ?= 2.13.0
LOWEST := .venv-lowest/bin

test-lowest: .venv-lowest/.installed
	$(ONE_THREAD) $(LOWEST)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10

# Kills a training and the making of a cache 200 times each and compares what comes out with what was not killed.
faults: .venv/.installed-test
	FAULTS=200 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -s tests/training/test_faults.py tests/cache/test_cache.py -k killed

# Tries all readers with damaged files for ten minutes on one core.
fuzz: .venv/.installed-test
	FUZZ=2500 $(ONE_THREAD) $(BIN)/python -m pytest -m "" tests/fuzz

# Writes docs/errors.md.
errors: .venv/.installed-test
	WRITE_ERRORS=1 $(ONE_THREAD) $(BIN)/python -m pytest -m "" tests/scripts/test_errors.py

format: .venv/.installed-test
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

$(BIN)/python:
	$(PYTHON) -m venv $(SITE) .venv

.venv/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e .
	touch $@

.venv/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e ".[test]"
	touch $@

# fsspec comes with torch, in its newest release.
.venv-lowest/.installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv-lowest
	$(LOWEST)/python -m pip install uv torch==$(TORCH)
	$(LOWEST)/uv pip install --python $(LOWEST)/python --resolution lowest-direct --reinstall-package fsspec -e ".[test]"
	touch $@
