# Everything installs into .venv from requirements.lock; a second call installs nothing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
# Prefect keeps its files inside the repository, and nothing is reported home.
export PREFECT_HOME := $(CURDIR)/.prefect
export PREFECT_SERVER_ANALYTICS_ENABLED := false

# Files side by side; at most four, for each starts servers and networks of its own.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

# Of the time that fuzzing takes.
MINUTES ?= 30

.PHONY: demo demo-data test test-all bench soak fuzz lint docs serve services services-stop lock clean help

help:
	@echo "make demo      install, then segment a Landsat scene and a brain MRI, with reports"
	@echo "make test      install, then run the tests;  make test-all: the slow ones too"
	@echo "make bench     measure the pipeline against the bare forward pass"
	@echo "make serve     a local Prefect server with every flow ready to be triggered"
	@echo "make services  a Prefect server, object store, Dask and workers on loopback (DATABASE=postgres);"
	@echo "               make services-stop ends them"
	@echo "make soak      45 minutes of scans, questions and cancels at random"
	@echo "make fuzz      every parser of what comes in, with inputs changed at random (MINUTES=30)"
	@echo "make lint      ruff and mypy;  make lock: resolve requirements.lock anew"
	@echo "make docs      the documentation as pages, in build/docs"

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m segpipe_flows.demo

demo-data: $(INSTALLED)
	$(BIN)/python -m segpipe_flows.demo --data-only

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-all: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.pipeline
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.zonal
	$(BIN)/python -m benchmarks.allocator

soak: demo-data
	$(BIN)/python -m benchmarks.soak

# Only Linux on x86-64 has what fuzzing needs, so it is no part of the lock.
fuzz: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[fuzz]'
	$(BIN)/python -m tools.fuzz --minutes $(MINUTES)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What only the pages need is no part of the lock: it is installed here, beside what the lock pins.
docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean
	@echo "build/docs/index.html"

serve: $(INSTALLED)
	$(BIN)/segpipe serve

services: $(INSTALLED)
	$(BIN)/python -m tests.services start --database $(or $(DATABASE),sqlite)

services-stop:
	@test ! -x $(BIN)/python || $(BIN)/python -m tests.services stop

lock: $(INSTALLED)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --upgrade --python-version 3.11 --extra all --extra demo --extra dev \
	    pyproject.toml \
	    --no-annotate --no-header --no-emit-index-url -o requirements.lock
	$(BIN)/uv pip compile --quiet --python-version 3.11 --extra all -c requirements.lock pyproject.toml \
	    --no-annotate --no-header --no-emit-index-url -o infra/docker/requirements.txt

clean: services-stop
	rm -rf .venv .prefect .demo .services runs
