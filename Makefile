# `make demo` and `make test` do their own set-up where there is Python 3.11 or newer with venv.

VENV ?= .venv
BIN := $(VENV)/bin
SETUP := sh install/setup.sh $(VENV)
export PYTHON WHEELHOUSE TORCH_INDEX

.PHONY: help demo test docs fresh faults fuzz setup ready wheelhouse clean

help:
	@echo "make demo        train a hybrid CoDA ResNet and the ResNet it came from, and compare them"
	@echo "make test        lint, type-check and run the test-suite"
	@echo "make docs        the documentation as a site: site/index.html"
	@echo "make setup       the environment $(VENV), 6.9 GB (both commands do this by themselves)"
	@echo "                 PYTHON=...       another interpreter"
	@echo "                 WHEELHOUSE=...   install from that folder, without network"
	@echo "                 TORCH_INDEX=https://download.pytorch.org/whl/cpu   no GPU, less disk"
	@echo "make wheelhouse  fill the folder WHEELHOUSE (wheelhouse) for machines without network"
	@echo "make fresh       set-up and use in bare root file systems: root, debootstrap, an hour"
	@echo "make faults      strike a training under a local Slurm 60 times: root, slurm-wlm, munge"
	@echo "make fuzz        prepare and verify 2,000 mutated images, tars, .beton and manifests"

demo: ready
	@$(BIN)/coda train recipes/digits_resnet20.yaml
	@$(BIN)/coda train recipes/digits_coda_resnet20.yaml
	@$(BIN)/coda compare runs/digits_coda_resnet20 runs/digits_resnet20

test: ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

# The packages of the site (extra docs) are installed the first time.
docs: ready
	@$(BIN)/python -c 'import material, mkdocstrings' 2>/dev/null || \
		$(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --config-file docs/website/mkdocs.yml
	@echo "site/index.html"

fresh:
	@bash tests/fresh/run.sh

faults: ready
	@OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python tests/slurm/faults.py

fuzz: ready
	@OMP_NUM_THREADS=1 PYTHONPATH=.:tests/data $(BIN)/python tests/data/fuzz.py --files 2000

setup:
	@$(SETUP)

ready:
	@$(SETUP) --if-needed

wheelhouse:
	@WHEELHOUSE= $(SETUP) --if-needed
	@sh install/wheelhouse.sh $(VENV) $(or $(WHEELHOUSE),wheelhouse)

clean:
	rm -rf $(VENV) build dist site *.egg-info
