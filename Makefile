# These two commands need only Python 3.11 to 3.13 with venv, and access to PyPI or a mirror:
#   make demo    synthetic mammograms -> prep -> train -> evaluate -> infer
#   make test    lint, format check, type check, tests

SHELL := /bin/bash
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c 'import sys, venv; raise SystemExit(not (3, 11) <= sys.version_info < (3, 14))' \
	2>/dev/null && echo $$python && break; done)
OLDEST_PYTHON ?= $(shell for python in python3.11 python3.12; do \
	$$python -c 'import venv' 2>/dev/null && echo $$python && break; done)
UV_VERSION := 0.13.9
UV := .uv/bin/uv
BIN := .venv/bin
PEERS := webdataset==1.0.2 mosaicml-streaming==0.13.0 torch==2.15.0
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
DEMO := demo
JOBS := 2
TARGET := cpu
IMAGE := flexunet:$(TARGET)
# The first one that works: a docker client without its daemon cannot build.
ENGINE ?= $(shell for engine in docker podman buildah; do \
	$$engine info >/dev/null 2>&1 && echo $$engine && break; done)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo demo-inbreast test test-cluster test-oldest test-faults test-image image lint setup docs bench bench-gpu bench-peers bench-results clean help

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/'

setup: .venv/.installed ## install everything from uv.lock into .venv

$(UV):
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 to 3.13 with venv found; install one or give PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv .uv
	.uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

.venv/.installed: $(UV) pyproject.toml uv.lock
	$(UV) sync --locked --quiet --compile-bytecode --python $(PYTHON)
	@touch $@

# tensorflow-io supports Python up to 3.12.
.venv-oldest/.installed: $(UV) pyproject.toml uv.lock
	@test -n "$(OLDEST_PYTHON)" || { echo "make: no Python 3.11 or 3.12 found; install one or give OLDEST_PYTHON=/path/to/python" >&2; exit 2; }
	UV_PROJECT_ENVIRONMENT=.venv-oldest $(UV) sync --locked --quiet --compile-bytecode --python $(OLDEST_PYTHON) --no-group current --extra tfio
	@touch $@

# The other data loaders of the benchmark. MosaicML Streaming requires older releases than this project:
# the project's versions override them, so that all loaders use the same NumPy and Pillow.
.venv-peers/.installed: $(UV) pyproject.toml uv.lock benchmarks/peers.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 to 3.13 with venv found; install one or give PYTHON=/path/to/python" >&2; exit 2; }
	UV_PROJECT_ENVIRONMENT=.venv-peers $(UV) sync --locked --quiet --compile-bytecode --python $(PYTHON)
	$(UV) export --locked --quiet --no-hashes --no-emit-project --output-file .venv-peers/locked.txt
	$(UV) pip install --quiet --python .venv-peers/bin/python --overrides .venv-peers/locked.txt \
		--constraints benchmarks/peers.txt $(PEERS)
	@touch $@

# What others train with; see benchmarks/quality_peers.py.
.venv-results/.installed: $(UV) pyproject.toml uv.lock benchmarks/quality.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 to 3.13 with venv found; install one or give PYTHON=/path/to/python" >&2; exit 2; }
	UV_PROJECT_ENVIRONMENT=.venv-results $(UV) sync --locked --quiet --compile-bytecode --python $(PYTHON)
	$(UV) export --locked --quiet --no-hashes --no-emit-project --output-file .venv-results/locked.txt
	$(UV) pip install --quiet --python .venv-results/bin/python --overrides .venv-results/locked.txt \
		--constraints benchmarks/quality.txt torch segmentation-models-pytorch timm albumentations scikit-learn
	@touch $@

lint: .venv/.installed ## lint, format check, type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## lint, then the tests that need one process, JOBS=2 at a time
	$(BIN)/pytest --numprocesses $(JOBS) --dist worksteal

test-cluster: .venv/.installed ## tests with Ray, several processes or kills, JOBS=2 at a time
	$(BIN)/pytest -m "cluster and not faults" --numprocesses $(JOBS) --dist worksteal

test-oldest: .venv-oldest/.installed ## the tests of test and test-cluster on TensorFlow 2.17 with tensorflow-io
	PATH="$(CURDIR)/.venv-oldest/bin:$$PATH" .venv-oldest/bin/pytest -m "not faults" --numprocesses $(JOBS) --dist worksteal

test-faults: .venv/.installed ## fault tests, 40 minutes; writes benchmarks/results/faults.json
	$(BIN)/python -m tests.faults.table --output benchmarks/results/faults.json

docs: .venv/.installed ## build the documentation site into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@printf '%s\n' 'Open site/index.html in a browser.'

image: ## build the container image: TARGET=cpu, gpu or bucket, IMAGE=name, BASE=base image
	@test -n "$(ENGINE)" || { echo "make: no docker, podman or buildah that works; install one or give ENGINE" >&2; exit 2; }
	$(ENGINE) build $(BUILD_FLAGS) --target $(TARGET) --tag $(IMAGE) $(if $(BASE),--build-arg BASE=$(BASE)) \
		--build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD) .

test-image: ## build the image without a registry and run the product in it; Debian, as root, 25 GB
	tests/image.sh

demo: .venv/.installed ## prep, train, evaluate, report and infer on synthetic mammograms
	rm -rf $(DEMO)
	python -m data_prep.phantoms $(DEMO)/source --num-images 240 --size 128
	flexunet prep $(DEMO)/source $(DEMO)/dataset --image-size 128 --group-regex "phantom-p[0-9]+" --fractions 0.75,0.1,0.15
	flexunet train --local --config docs/demo.yaml --data $(DEMO)/dataset --output $(DEMO)/runs --name demo
	flexunet evaluate $(DEMO)/runs/demo --split test
	flexunet report $(DEMO)/runs/demo
	flexunet infer $(DEMO)/runs/demo $(DEMO)/source/images
	@printf '%s\n' '' 'Look at:' \
		'  $(DEMO)/dataset/report/              images of the data' \
		'  $(DEMO)/runs/demo/report.html        everything on one page' \
		'  $(DEMO)/runs/demo/metrics/           curves and tables' \
		'  $(DEMO)/runs/demo/evaluation/        summary.json, per_case.csv, examples/' \
		'  $(DEMO)/runs/demo/inference/         masks, and overlays/'

demo-inbreast: .venv/.installed ## prepare a generated INbreast release; compare counts with the published ones
	rm -rf $(DEMO)/release $(DEMO)/release-dataset
	python -m data_prep.phantoms $(DEMO)/release --format inbreast --size 256
	flexunet prep --format inbreast $(DEMO)/release $(DEMO)/release-dataset --image-size 128 --crop breast --flip left

bench: .venv/.installed ## run all benchmarks but bench-gpu, bench-peers, bench-results, on an idle machine; writes benchmarks/results
	$(BIN)/python benchmarks/prep.py
	$(BIN)/python benchmarks/bucket.py
	$(BIN)/python benchmarks/input.py
	$(BIN)/python benchmarks/cache.py
	$(BIN)/python benchmarks/records.py
	$(BIN)/python benchmarks/metrics.py
	$(BIN)/python benchmarks/optimizer.py
	$(BIN)/python benchmarks/normalization.py
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/start.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/step.py --precision mixed_bfloat16
	$(BIN)/python benchmarks/exchange.py --image-size 256
	$(BIN)/python benchmarks/exchange.py --image-size 512 --repeats 3
	$(BIN)/python benchmarks/exchange.py --image-size 256 --num-workers 4 --repeats 2
	$(BIN)/python benchmarks/exchange.py --image-size 512 --table
	$(BIN)/python benchmarks/rounding.py
	$(BIN)/python benchmarks/plot.py

bench-gpu: .venv/.installed ## check and measure a GPU, 6 minutes; writes benchmarks/results/gpu-NAME.json
	$(BIN)/python benchmarks/gpu.py

bench-peers: .venv-peers/.installed ## compare input and step with WebDataset, MosaicML Streaming, TFRecordDataset, PyTorch; 9 GB
	.venv-peers/bin/python benchmarks/peers.py
	.venv-peers/bin/python benchmarks/peer_step.py

bench-results: .venv-results/.installed ## compare the Dice of presets, a peer and a random forest on the images in DATA; 7 hours; goes on
	@test -n "$(DATA)" || { echo "make: give DATA, the folder of the sets; see benchmarks/README.md" >&2; exit 2; }
	.venv-results/bin/python benchmarks/quality.py $(DATA)

clean: ## remove the outputs of the targets above, but not .venv
	rm -rf $(DEMO) site .mypy_cache .ruff_cache .pytest_cache .hypothesis
