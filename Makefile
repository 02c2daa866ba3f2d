PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: demo test bench quality style clean

# One stamp per set of extras: an install is repeated only when setup.py or the pins change.
$(VENV)/.installed-%: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/ella demo $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(ARGS)

quality: $(VENV)/.installed-quality
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.installed-quality
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
