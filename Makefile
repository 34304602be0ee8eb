# Every target makes its own virtual environment, from Python 3.11+ and make alone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CODE := bge_core langchain_bge llamaindex_bge tests examples benchmarks

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench soak clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## Ask the Python documentation, in LangChain and LlamaIndex (ARGS="--question '...'")
	$(BIN)/python examples/ask_python_docs.py $(ARGS)

test: $(VENV)/.dev  ## Run all tests (ARGS="-k words")
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev  ## Check style and types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: $(VENV)/.dev  ## Mend style where a tool can
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

bench: $(VENV)/.bench  ## Speed against the hosts' own classes (ARGS="--quick", "--write" for the README)
	$(BIN)/python benchmarks/speed.py $(ARGS)

soak: $(VENV)/.bench  ## Half an hour of mixed load (ARGS="--minutes 3 --warm-up 1" for a short look)
	$(BIN)/python benchmarks/soak.py $(ARGS)

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.dev $(VENV)/.demo $(VENV)/.bench: $(VENV)/.%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bge-adapters needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@
