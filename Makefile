# Everything runs in .venv, made on first use; a stamp file there says which extras are installed.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
FUZZ_ARGS ?= analyze --count 2000 --jobs 2

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test slow fuzz lint format docs bench clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

demo: $(READY)-onnx ## Compile the bundled 50-layer network: demo/report.html, demo/model.onnx
	$(BIN)/kgraph demo --out demo

test: lint ## Lint, then the tests on all cores (PYTEST_ARGS="-k shaping" selects)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -q -m "not slow" $(PYTEST_ARGS)

slow: $(READY)-test,dev ## The full-size tests, which `make test` leaves out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -q -m slow $(PYTEST_ARGS)

fuzz: $(READY)-test ## Random graphs against plain torch (FUZZ_ARGS="kernels --count 500")
	$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

lint: $(READY)-test,dev ## Ruff, pyright, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(READY)-test,dev ## Sort imports, fix what ruff can fix, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)-docs ## Build docs/_build/html/index.html
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

bench: $(READY)-test ## Run every benchmark
	set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

clean: ## Remove .venv and everything generated
	rm -rf $(VENV) demo build dist docs/_build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# constraints.txt: the versions that the tests passed with.
$(READY)-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing kgraph[$*] into $(VENV): some minutes the first time'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch '$@'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
