# `make help` lists what can be done. Everything runs in .venv, which make creates and fills once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
OUT := out
MODEL := models/wikitext2-llama-1m

# Threads that spin while they wait make a machine with busy neighbours many times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo results test fuzz lint types fmt docs install clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.cpu ## compile the bundled model, generate text, and compare it with uniform 3 bits
	@$(BIN)/python examples/demo.py --model $(MODEL) --out $(OUT)/demo

results: $(VENV)/.cpu ## print the table of the README (minutes)
	@$(BIN)/python examples/demo.py --full --model $(MODEL) --out $(OUT)/results

test: $(VENV)/.dev ## run all tests
	@$(BIN)/python -m pytest -n auto --dist loadfile

fuzz: $(VENV)/.dev ## run 100,000 cases of the fuzzer on two cores; the log is out/fuzz.jsonl
	@mkdir -p $(OUT)
	@$(BIN)/python -m tests.fuzz --full --cases 100000 --workers 2 --log $(OUT)/fuzz.jsonl

lint: $(VENV)/.dev ## check style and formatting
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(VENV)/.dev ## check types
	@$(BIN)/basedpyright --pythonpath $(BIN)/python

fmt: $(VENV)/.dev ## format the code and mend what can be mended
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

docs: $(VENV)/.dev ## write the generated parts of docs/ and build the site in out/site
	@$(BIN)/python docs/generate.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

install: $(VENV)/.dev ## create .venv with everything in it

clean: ## remove .venv, outputs and caches
	@rm -rf $(VENV) $(OUT) .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: each step is done once, and again when the file that it depends on changes.

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' is missing or not Python 3.10 to 3.13" >&2; \
	  echo "help: name one that is, for example: make demo PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "error: '$(PYTHON) -m venv' failed" >&2; \
	  echo "help: on Debian and Ubuntu it needs the package python3-venv" >&2; exit 1; }
	@touch $@

# torch alone first, in the pinned version, so that nothing else picks another.
$(VENV)/.torch: $(VENV)/.made constraints.txt
	@echo "installing torch into $(VENV) (once, some minutes) ..."
	@$(PIP) torch
	@touch $@

$(VENV)/.cpu: $(VENV)/.torch pyproject.toml
	@echo "installing scalebits-compiler with the CPU target ..."
	@$(PIP) -e '.[cpu]'
	@touch $@

$(VENV)/.dev: $(VENV)/.cpu
	@echo "installing the tools for development ..."
	@$(PIP) -e '.[cpu,dev]'
	@touch $@
