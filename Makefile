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

.PHONY: demo demo-data test test-all bench soak fuzz lint docs serve services services-stop lock sbom images faults clean help

help:
	@echo "make demo      install, then segment a Landsat scene and a brain MRI, with reports"
	@echo "make test      install, then run the tests;  make test-all: the slow ones too"
	@echo "make bench     measure the pipeline against the bare forward pass"
	@echo "make serve     a local Prefect server with every flow ready to be triggered"
	@echo "make services  a Prefect server, object store, Dask and workers on loopback (DATABASE=postgres);"
	@echo "               make services-stop ends them"
	@echo "make soak      45 minutes of scans, questions and cancels at random"
	@echo "make fuzz      every parser of what comes in, with inputs changed at random (MINUTES=30)"
	@echo "make lint      ruff and mypy;  make lock: resolve the locks anew, with hashes"
	@echo "make faults    damaged stores and object stores that fail, the long forms too"
	@echo "make sbom      what is installed and its licences, in build/sbom;  make images: pin base images by digest"
	@echo "make docs      the documentation as pages, in build/docs"

# Nothing is installed whose hash is not in a lock: a build has no environment of its own either, which pip
# would fill with whatever is newest.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation

$(INSTALLED): build.lock requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --require-hashes -r build.lock
	$(PIP) --require-hashes --no-deps -r requirements.lock
	$(PIP) --no-index --no-deps -e .
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m segpipe_flows.demo

demo-data: $(INSTALLED)
	$(BIN)/python -m segpipe_flows.demo --data-only

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-all: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL)

faults: $(INSTALLED)
	$(BIN)/python -m pytest tests/faults tests/inference/test_damage.py tests/export/test_damaged_files.py \
	    tests/flows/test_scan_killed.py tests/test_store_life.py tests/test_disk_full.py -m "slow or not slow"

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.pipeline
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.zonal
	$(BIN)/python -m benchmarks.allocator

soak: demo-data
	$(BIN)/python -m benchmarks.soak

# Not every platform has what fuzzing needs, so it has a lock of its own.
fuzz: $(INSTALLED)
	$(PIP) --require-hashes -r fuzz.lock
	$(BIN)/python -m tools.fuzz --minutes $(MINUTES)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean
	@echo "build/docs/index.html"

serve: $(INSTALLED)
	$(BIN)/segpipe serve

services: $(INSTALLED)
	$(BIN)/python -m tests.services start --database $(or $(DATABASE),sqlite)

services-stop:
	@test ! -x $(BIN)/python || $(BIN)/python -m tests.services stop

# For every platform, with the hashes of all files of a version. `make lock UPGRADE=` keeps the versions there are.
UPGRADE ?= --upgrade
LOCK := $(BIN)/uv pip compile --quiet --universal --fork-strategy fewest --python-version 3.11 --generate-hashes \
    --no-annotate --no-header --no-emit-index-url

lock: $(INSTALLED)
	$(LOCK) $(UPGRADE) $(addprefix --extra ,all demo dev docs) --group supply pyproject.toml -o requirements.lock
	$(LOCK) --extra all -c requirements.lock pyproject.toml -o infra/docker/requirements.txt
	$(LOCK) --group build -c requirements.lock -o build.lock
	$(LOCK) --group fuzz -c requirements.lock -o fuzz.lock

# Of this environment with its licences, and of what the images install.
sbom: $(INSTALLED)
	mkdir -p build/sbom
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	    --output-file build/sbom/environment.cdx.json $(BIN)/python
	$(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible \
	    --output-file build/sbom/image.cdx.json infra/docker/requirements.txt
	$(BIN)/pip-licenses --python $(BIN)/python --format csv --with-urls --output-file build/sbom/licences.csv

# Needs Docker and the registries of the images; what it writes is to be committed.
images: $(INSTALLED)
	$(BIN)/python -m infra.pin_images

clean: services-stop
	rm -rf .venv .prefect .demo .services runs
