# Everything runs in .venv, which `make install` (or any target that needs it) makes once.
.DEFAULT_GOAL := help
.PHONY: help install data train quickstart reproduce-fig1 reproduce-fig2 bench scaling communication introspect torture test test-slow test-gpu gpu-report lint format docs

PYTHON ?= python3
VENV ?= .venv
RUN ?= $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# One thread per process: tests are many small tensors, where more threads only wait for each other.
TEST_ENV := OMP_NUM_THREADS=1
# Test processes at a time, each of which imports PyTorch: on 2 cores three, as many tests wait for what they start.
TEST_JOBS ?= 3
QUICKSTART_OUT ?= outputs/quickstart
# Of a figure or an ablation: how large, how many final runs per curve, how many runs at a time, what else.
SCALE ?= full
SEEDS ?=
JOBS ?=
WITH ?=
DRY_RUN ?=
# Who carries out its runs (local, joblib, slurm), and settings of that such as hydra.launcher.partition=gpu.
LAUNCHER ?=
LAUNCHER_ARGS ?=
# How long to try to break runs.
MINUTES ?= 15
REPRODUCE = $(RUN) -m kfac_sua.reproduce $(1) --scale $(SCALE) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(JOBS),--jobs $(JOBS)) \
	$(if $(DRY_RUN),--dry-run) $(if $(WITH),--with "$(WITH)") \
	$(if $(LAUNCHER),--launcher $(LAUNCHER)) $(LAUNCHER_ARGS) $(ARGS)

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9%-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make .venv with everything the project needs (about 6 GB with a CUDA build of PyTorch)

$(INSTALLED): pyproject.toml
	@echo "Installing into $(VENV), once: minutes without a word, about 6 GB with a CUDA build of PyTorch."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	@touch $@

data: $(INSTALLED) ## CIFAR-10 and CIFAR-100 into data/ before a run needs them, or check what is there
	$(RUN) scripts/download_data.py

train: $(INSTALLED) ## One run: make train ARGS="preconditioner=sua model=vgg11"
	$(RUN) -m kfac_sua.train $(ARGS)

quickstart: $(INSTALLED) ## The main job on the embedded digits: five settings, Figure 1, no download (SEEDS=2)
	$(RUN) -m kfac_sua.train -m 'experiment=glob(quickstart_*)' 'seed=range($(or $(SEEDS),2))' 'output_dir=$(QUICKSTART_OUT)/runs' $(ARGS)
	$(RUN) -m kfac_sua.figures.fig1 "$(QUICKSTART_OUT)/runs" --out "$(QUICKSTART_OUT)" --quiet

reproduce-fig1: $(INSTALLED) ## Figure 1 with grid and report: SCALE=full|small|smoke SEEDS=3 JOBS= WITH=adamw,muon DRY_RUN=1 LAUNCHER=joblib|slurm
	$(call REPRODUCE,fig1)

reproduce-fig2: $(INSTALLED) ## Figure 2, the same way
	$(call REPRODUCE,fig2)

ablation-%: $(INSTALLED) ## initialisation, sharing, fisher, damping_rule, refresh or group_size, the same way
	$(call REPRODUCE,ablation_$*)

bench: $(INSTALLED) ## Cost of each setting beside plain SGD: make bench ARGS="--layers --json new.json --against old.json"
	$(RUN) -m kfac_sua.bench $(ARGS)

scaling: $(INSTALLED) ## Cost against width, kernel, group size and mini-batch, with the fitted exponents
	$(RUN) -m kfac_sua.bench.scaling --out outputs/scaling $(ARGS)

communication: $(INSTALLED) ## What processes send each other: counted, measured for 1, 2 and 4, and 1,024 GPUs on paper
	$(TEST_ENV) $(RUN) -m kfac_sua.bench.communication --out outputs/communication --measure 1 2 4 --width 0.25 $(ARGS)
	$(RUN) -m kfac_sua.bench.communication.scaling_out --out outputs/communication

introspect: $(INSTALLED) ## How close each approximation is to the Fisher, and what that buys: make introspect ARGS="model=vgg11 model.width=0.125"
	$(RUN) -m kfac_sua.introspect $(ARGS)

torture: $(INSTALLED) ## Kill, corrupt, starve and exhaust small runs, one table (MINUTES=15; 2 is the short cut)
	$(TEST_ENV) $(RUN) scripts/torture.py --minutes $(MINUTES) $(ARGS)

test: $(INSTALLED) ## Tests without a GPU and without a download, 10 minutes on 2 cores
	$(TEST_ENV) $(RUN) -m pytest -n $(TEST_JOBS) --dist worksteal -m "not slow and not gpu"

test-slow: $(INSTALLED) ## The tests that `make test` leaves out because they take long
	$(TEST_ENV) $(RUN) -m pytest -n $(TEST_JOBS) --dist worksteal -m "slow and not gpu"

test-gpu: $(INSTALLED) ## Tests that need a CUDA device
	CUBLAS_WORKSPACE_CONFIG=:4096:8 $(RUN) -m pytest -m gpu

gpu-report: $(INSTALLED) ## What runs on this GPU, how fast, and whether captured steps keep their bits: 10 minutes, one archive
	$(RUN) scripts/gpu_report.py --out outputs/gpu-report $(ARGS)

docs: $(INSTALLED) ## The documentation as a site, site/index.html, without a network
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict $(ARGS)

lint: $(INSTALLED) ## Check style and types
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

format: $(INSTALLED) ## Rewrite the code in the project's format
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format
