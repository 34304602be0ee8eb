# Every target makes its own virtual environment, from Python 3.11+ and make alone.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
# What old packages say of each other, and newer ones don't; pytest-asyncio 1.0 leaves its loops' sockets open.
OLD_WARNINGS := -W ignore::DeprecationWarning:torch.jit._script \
	-W ignore::DeprecationWarning:llama_index.vector_stores.qdrant.base \
	-W ignore::pytest.PytestUnraisableExceptionWarning
# A file's tests stay together, for what they share; the files in the order of tests/conftest.py.
ON_ALL_CORES := -n auto --maxprocesses 4 --dist loadfile --max-worker-restart 2 --no-loadscope-reorder
CODE := bge_core langchain_bge llamaindex_bge tests examples benchmarks training docs

# What `make evaluate` measures without ARGS.
STAND_IN = --data examples/encyclopaedia --model "$$($(BIN)/python examples/stand_in.py embedder)" \
	--reranker "$$($(BIN)/python examples/stand_in.py reranker)"

.DEFAULT_GOAL := help
.PHONY: help demo playground evaluate test test-cuda test-browser test-notebooks test-server test-lowest test-newest test-stores lint format docs bench soak clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## Ask an encyclopaedia, in LangChain and LlamaIndex (MODELS=bge, ARGS="--question '...'")
	$(BIN)/python examples/demo.py $(if $(MODELS),--models $(MODELS)) $(ARGS)

playground: $(VENV)/.playground  ## A page to ask, and to see what reranking changes (ARGS="--embedder BAAI/bge-m3")
	$(BIN)/python examples/playground.py $(ARGS)

evaluate: $(VENV)/.demo $(if $(findstring --tasks,$(ARGS)),$(VENV)/.mteb)  ## How well a model finds (ARGS="--data FOLDER --model ... --reranker ...")
	$(BIN)/python -m bge_core.evaluate $(or $(ARGS),$(STAND_IN))

test: $(VENV)/.dev  ## Run all tests, on four cores at most (ARGS="-k words", "-n 0" for one process)
	$(BIN)/python -m pytest $(ON_ALL_CORES) $(ARGS)

test-browser:  ## Try the playground in Chromium, and take its picture for the README
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	{ echo "make test-browser needs Chromium and its driver: sudo apt-get install chromium chromium-driver" >&2; exit 1; }
	$(MAKE) $(VENV)/.browser
	$(BIN)/python -m pytest tests/browser $(ARGS)

test-notebooks: $(VENV)/.notebooks  ## Run the notebooks of examples/, and compare with what they show
	$(BIN)/python -m pytest tests/notebooks $(ARGS)

test-server: $(VENV)/.dev .venv-infinity/.made  ## Run the tests against a real Infinity server
	$(BIN)/python -m pytest tests/test_infinity.py $(ARGS)

test-cuda: $(VENV)/.dev  ## Test and measure on this machine's GPU, and print a page to paste (ARGS="--shapes small")
	$(BIN)/python benchmarks/cuda_page.py $(ARGS)

test-lowest:  ## Run all tests on the lowest versions that are supported (ARGS="-k words")
	PYTEST_ADDOPTS='$(OLD_WARNINGS)' $(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

test-newest:  ## Run all tests on what pip resolves today, without constraints (ARGS="-k words")
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=constraints-newest.txt

test-stores:  ## Run the tests of the vector stores, with all of their packages (ARGS="-k words")
	$(MAKE) --no-print-directory .venv-stores/.stores .venv-stores/langchain-milvus VENV=.venv-stores
	.venv-stores/bin/python -m pytest tests/stores $(ARGS)
	PYTHONPATH=.venv-stores/langchain-milvus .venv-stores/bin/python -m pytest tests/stores -k "LangChain and Milvus or langchain_milvus"

lint: $(VENV)/.dev  ## Check style, imports, types (those of the pages' examples, too) and spelling
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/lint-imports --no-logo
	$(BIN)/typos
	$(BIN)/mypy
	$(BIN)/python docs/code_blocks.py build/code_blocks
	$(BIN)/mypy build/code_blocks
	$(BIN)/basedpyright --project docs/pyrightconfig.json --pythonpath $(BIN)/python

format: $(VENV)/.dev  ## Mend style where a tool can, and draw docs/imports.svg anew
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)
	$(BIN)/python docs/draw_imports.py

docs: .venv-docs/.made  ## Build the documentation with the API reference, in site/
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet $(ARGS)

bench: $(VENV)/.bench .venv-peers/.made  ## Speed against the hosts' own classes (ARGS="--quick", "--write" for docs/speed.md)
	$(BIN)/python benchmarks/speed.py $(ARGS)

soak: $(VENV)/.bench  ## Half an hour of mixed load (ARGS="--minutes 3 --warm-up 1" for a short look)
	$(BIN)/python benchmarks/soak.py $(ARGS)

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .venv-docs .venv-infinity .venv-lowest .venv-newest .venv-peers .venv-stores site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

$(VENV)/.dev $(VENV)/.demo $(VENV)/.bench $(VENV)/.mteb $(VENV)/.playground $(VENV)/.browser $(VENV)/.notebooks $(VENV)/.stores: $(VENV)/.%: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bge-adapters needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$*]'
	@touch $@

# langchain-milvus wants pymilvus 3, LlamaIndex's package pymilvus 2.
.venv-stores/langchain-milvus: .venv-stores/.stores
	.venv-stores/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ langchain-milvus==0.4.0 pymilvus==3.0.2

.venv-docs/.made: docs/requirements.txt
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	@touch $@

# Their exporters pin another transformers than ours.
.venv-peers/.made: Makefile
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 'sentence-transformers>=5' 'optimum-onnx[onnxruntime]' 'optimum-intel[openvino]' 'fastembed>=0.7'
	@touch $@

# The server wants an older transformers than ours.
.venv-infinity/.made: Makefile
	test -x .venv-infinity/bin/python || $(PYTHON) -m venv .venv-infinity
	.venv-infinity/bin/python -m pip install --quiet --disable-pip-version-check 'infinity-emb[torch,server]==0.0.78' torch==2.13.0
	@touch $@
