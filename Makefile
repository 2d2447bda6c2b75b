# make demo    serve a small model here, talk to it, kill a process in the middle of an answer, and show what moved
# make test    lint, then every test
# make lint    ruff, mypy --strict, import-linter
# make lock    write requirements.lock anew, from what is installed
# make clean   remove everything that make made
#
# Where there is no NVIDIA driver, torch's CPU build is taken, a tenth of the size, from PyTorch's own index if that answers: pip
# prefers 2.13.0+cpu there to PyPI's 2.13.0. To decide it otherwise: make TORCH_INDEX= demo, or make TORCH_INDEX=https://... demo
# The environment is made once, in .venv, from requirements.lock. Another interpreter: make PYTHON=python3.12 test

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Looked up when it is used, which is once, when the environment is made.
TORCH_INDEX ?= $(shell $(or $(PYTHON),false) scripts/torch_index.py)

# Compute threads of the tests themselves: two cores are shared by many small processes.
test: export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lint format lock clean setup
.DEFAULT_GOAL := test

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "HetServe needs Python 3.11 or newer; got $$($(or $(PYTHON),python3) --version 2>&1). Name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (once, a minute or two)"
	@$(BIN)/python -m pip install -qq $(addprefix --extra-index-url ,$(TORCH_INDEX)) -r requirements.lock
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY)
	@$(BIN)/hetserve demo

test: lint
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Not $(READY): that would install the lock that is about to be replaced.
lock:
	$(BIN)/python scripts/lock.py > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean:
	rm -rf $(VENV) .demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
