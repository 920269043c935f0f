# Two commands are all the set-up there is: `make quickstart` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-input --constraint requirements.lock

.PHONY: quickstart test install install-test install-dev lint types fuzz bench clean

quickstart: install
	$(BIN)/mycel run quickstart --out runs/quickstart-$$(date +%Y%m%d-%H%M%S)

test: install-test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

install: .venv/installed

install-test: .venv/installed-test

install-dev: .venv/installed-dev

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Python 3.11 or newer is needed: make PYTHON=python3.11 ...'; exit 1; }
	@echo 'Making .venv and installing Mycel: one to three minutes, most of it PyTorch.'
	@$(PYTHON) -m venv .venv || { echo 'The venv module is missing: apt-get install python3-venv'; rm -rf .venv; exit 1; }

.venv/installed: pyproject.toml requirements.lock | .venv/bin/python
	$(INSTALL) --progress-bar on --editable .
	@touch $@

.venv/installed-test: .venv/installed
	$(INSTALL) --quiet --editable '.[test]'
	@sh scripts/install-browser
	@touch $@

.venv/installed-dev: .venv/installed-test
	$(INSTALL) --quiet --editable '.[test,dev]'
	@touch $@

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev
	$(BIN)/mypy

FUZZ_SECONDS ?= 60

fuzz: install-test
	$(INSTALL) --quiet --editable '.[fuzz]'
	$(BIN)/python tests/fuzz_parcel.py -max_total_time=$(FUZZ_SECONDS)

bench: install-test
	@for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf .venv build dist *.egg-info src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
