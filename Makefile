# Each target sets up what it needs in .venv; a second call installs nothing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OUT ?= runs/demo
# The folder of the Slurm that `make test-cluster` starts.
CLUSTER ?= $(CURDIR)/build/slurm
# Small models are faster on one thread; the two test workers share two cores.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-gpu test-cluster setup lint docs bench world clean

demo: $(INSTALLED)  ## Run every stage in the embedded world; ends with a table and a report
	$(BIN)/holdfast demo --out $(OUT)

test: $(INSTALLED)  ## Run the whole test suite, offline and on the CPU
	CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-gpu: $(INSTALLED)  ## Run the tests that need a GPU
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu tests/gpu $(ARGS)

test-cluster: $(INSTALLED)  ## Set up a Slurm (Debian, as root) and Ray, and run sweeps on them; takes an hour on two busy cores
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[slurm,ray]"
	sh tests/cluster/slurm.sh install && sh tests/cluster/slurm.sh start $(CLUSTER) || echo "Without Slurm."
	SLURM_CONF=$(CLUSTER)/slurm.conf HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m cluster tests/cluster $(ARGS); \
		code=$$?; sh tests/cluster/slurm.sh stop $(CLUSTER); exit $$code

setup: $(INSTALLED)  ## Set up the environment only

lint: $(INSTALLED)  ## Run ruff, mypy and the import-direction check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

docs: $(INSTALLED)  ## Build the documentation as a site in build/site; every broken link is an error
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The site is in build/site/index.html. To search in it: python3 -m http.server -d build/site"

bench: $(INSTALLED)  ## Run every benchmark; results go to benchmarks/results
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script || exit 1; done

world: $(INSTALLED)  ## Make the embedded world's data, model and judge again (about ten minutes)
	$(BIN)/python -m holdfast.world.make

clean:  ## Remove the environment and everything that the targets above made
	rm -rf $(VENV) runs build src/*.egg-info .pytest_cache .ruff_cache .mypy_cache

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed: apt install python3.11 python3.11-venv"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "venv is needed: apt install python3.11-venv"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
