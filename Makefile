# `make demo` and `make test` do all of their own set-up on a fresh Debian or Ubuntu machine with Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# FFCV comes as source and compiles against these; DeepSpeed looks for libaio-dev. libgl1 and libglib2.0-0 are for OpenCV's Python module.
PACKAGES := build-essential pkg-config libopencv-dev libturbojpeg0-dev libaio-dev libgl1 libglib2.0-0
READY := $(VENV)/ready

.PHONY: help demo test faults fuzz setup clean

help:
	@echo "make demo   train a hybrid CoDA ResNet and the plain ResNet it came from, and compare them"
	@echo "make test   lint, type-check and run the test-suite"
	@echo "make faults strike a training under a local Slurm 60 times: root, slurm-wlm and munge, over an hour"
	@echo "make fuzz   prepare and verify 2,000 mutated files (images, tars, .beton, manifests): some minutes"
	@echo "make setup  system packages, virtual environment and dependencies (both commands do this by themselves)"

demo: setup
	@$(BIN)/coda train recipes/digits_resnet20.yaml
	@$(BIN)/coda train recipes/digits_coda_resnet20.yaml
	@$(BIN)/coda compare runs/digits_coda_resnet20 runs/digits_resnet20

test: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest

faults: setup
	@OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python tests/slurm/faults.py

fuzz: setup
	@OMP_NUM_THREADS=1 PYTHONPATH=.:tests/data $(BIN)/python tests/data/fuzz.py --files 2000

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@PYTHON=$(PYTHON) PACKAGES="$(PACKAGES)" sh setup.sh $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
