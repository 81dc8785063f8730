# `make help` lists the targets. Each makes the virtual environment it needs and installs the project there.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS)

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18
	@echo
	@echo 'PYTHON=python3.12 picks the Python, VENV=.venv-3.12 the environment, ARGS="…" is handed to the program.'

train: $(VENV)/installed-examples ## train on real digits: four networks, a table, a picture (ARGS="--help" for the options)
	$(BIN)/python examples/05_digits.py $(ARGS)

train-many: $(VENV)/installed-examples ## train on many devices: two processes of four each, on this machine's CPU
	$(BIN)/python examples/many_devices_here.py $(ARGS)

test: $(VENV)/installed-test ## run the tests
	$(PYTEST) $(ARGS)

test-all: $(VENV)/installed-test ## run the tests, the slow ones too
	$(PYTEST) -m "slow or not slow" $(ARGS)

test-aot: ## compile for GPUs and TPUs that are not here, and check the memory that takes
	@$(MAKE) --no-print-directory VENV=$(VENV)-aot test-aot-here

test-aot-here: $(VENV)/installed-aot
	JAX_PLATFORMS=cpu $(PYTEST) tests/aot $(ARGS)

test-gpu: ## run the op and its family on a CUDA GPU that is here (WORKERS="12" for as many processes)
	@$(MAKE) --no-print-directory VENV=$(VENV)-gpu test-gpu-here

test-gpu-here: $(VENV)/installed-gpu
	JAX_PLATFORMS=cuda,cpu $(PYTEST) tests/gpu $(ARGS)

test-keras: ## run the tests of the Keras layers, on Keras's newest release
	@$(MAKE) --no-print-directory VENV=$(VENV)-keras test-keras-here

test-keras-here: $(VENV)/installed-keras-test
	KERAS_BACKEND=jax $(PYTEST) -m "slow or not slow" dcn_jax/keras tests/keras tests/examples/test_12_keras_digits.py $(ARGS)

docs: ## make the site, build/site/index.html
	@$(MAKE) --no-print-directory VENV=$(VENV)-site docs-here

docs-here: $(VENV)/installed-site
	$(BIN)/python docs/site/assemble.py build/site-source
	rm -rf build/site
	$(BIN)/sphinx-build -W --keep-going -q -b html -c docs/site build/site-source build/site

test-site: ## open the site and the explorer in Chromium (Debian: apt install chromium chromium-driver)
	@$(MAKE) --no-print-directory VENV=$(VENV)-site docs-here test-site-here

test-site-here: $(VENV)/installed-site
	$(BIN)/python -m pytest -q -m slow tests/site -rs $(ARGS)

bench: $(VENV)/installed-examples ## time the op beside the plain convolution (ARGS="--help" for the options)
	$(BIN)/python -m benchmarks.run $(ARGS)

lint: $(VENV)/installed-dev ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-dev ## bring the sources into style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environments and what tools leave behind
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find dcn_jax benchmarks examples tests -name __pycache__ -type d -prune -exec rm -rf {} +

# An extra of pyproject.toml, installed; again whenever pyproject.toml changes.
$(VENV)/installed-%: pyproject.toml | $(BIN)/python
	@echo 'installing dcn-jax[$*] into $(VENV) …'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo 'make: dcn-jax needs Python 3.11 or newer, and PYTHON=$(PYTHON) is not; name another: make PYTHON=python3.12 …' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo 'make: $(PYTHON) cannot make virtual environments; install its venv module (Debian: apt install python3-venv)' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

.PHONY: help train train-many test test-all test-aot test-aot-here test-gpu test-gpu-here test-keras test-keras-here docs docs-here test-site test-site-here bench lint format clean
.PRECIOUS: $(VENV)/installed-%
