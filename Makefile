PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# Processes of `make test`; 0 runs all tests in one, as `pytest` alone does.
WORKERS ?= auto

.PHONY: demo test bench bench-full bench-readme quality style clean

# One stamp per set of extras: an install is repeated only when setup.py or the pins change.
$(VENV)/.installed-%: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/ella demo $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 $(ARGS)

bench: $(VENV)/.installed-bench
	$(BIN)/python -m pytest -c bench/pytest.ini bench $(ARGS)

bench-full: $(VENV)/.installed-bench
	$(BIN)/python -m pytest -c bench/pytest.ini bench --full $(ARGS)

# The generated tables of README.md and docs/ from bench/results/.
bench-readme: $(VENV)/.installed-bench
	$(BIN)/python -m bench.readme

quality: $(VENV)/.installed-quality
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.installed-quality
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
