# kvstore_s3: `make` alone lists what there is. Every target sets up what it needs; a second run installs nothing.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STORE ?= file
MODEL ?=
TEXTS ?=
FUZZ_SECONDS ?= 60
FUZZ_CXX ?= clang++
FUZZ_DIR := build/fuzz
# Four at once, for many wait more than they compute; one thread each for torch, or they would stand in each other's way.
# Bytecode is kept, whatever the environment says: importing torch and transformers takes many processes seconds without.
PYTEST := env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist worksteal
NATIVE := $(shell find csrc -type f 2>/dev/null)
CPP := $(filter %.h %.cpp %.cu %.cuh,$(NATIVE))
# The GPU's half is compiled by `make cuda`; a change there is no reason to install anew.
INSTALLED := $(filter-out csrc/cuda/%,$(NATIVE))

.PHONY: help venv demo test test-servers test-engine test-kernels check format minio minio-stop bench bench-codec bench-io bench-vllm \
  bench-gpu cuda gpu-check gpu-wheels fuzz clean

help: ## this list
	@echo "kvstore_s3: persistent LLM KV caches on object stores"
	@echo
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort -s -k1,1 | sed -E 's/:[^#]*## /\t/' | while IFS=$$'\t' read -r name text; do printf '  make %-14s %s\n' "$$name" "$$text"; done

venv: $(VENV)/.installed ## build .venv: the package, its command line and its development needs

$(VENV)/.installed: pyproject.toml $(INSTALLED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kvstore_s3 needs Python 3.11 or newer; say which: make PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# uv installs in seconds what takes pip minutes, and shares one copy between checkouts; pip is the way without it.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv || echo "uv cannot be had; going on with pip"
	@echo "building and installing kvstore_s3 into $(VENV) (torch is large: the first time takes minutes)"
	@if test -x $(BIN)/uv; then $(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev]'; else $(BIN)/python -m pip install --quiet -e '.[dev]'; fi
	@touch $@

demo: venv ## warm documents, then ask about one from a new process (STORE=minio over S3, MODEL=dir or hub id)
	@$(BIN)/python examples/demo.py --store $(STORE) $(if $(MODEL),--model $(MODEL))

test: venv ## the tests that need nothing but Python, a C++ compiler, make and git
	@$(PYTEST) -m "not server and not engine and not kernels"

test-servers: venv ## the tests against real S3 servers: MinIO and versitygw (built with go where absent)
	@$(PYTEST) -m server

test-engine: venv ## the tests against a real vLLM on the CPU, in an environment of its own
	@.ci/engine-test

test-kernels: venv ## the GPU's half without one: data races, orders, what nvcc (fetched where absent) makes of kernels, torch's CUDA calls
	@$(PYTEST) -m kernels
	@$(BIN)/python .ci/ptx-test
	@$(BIN)/python .ci/fake-gpu-test

check: venv ## format, lint, types, architecture
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $(CPP)
	@$(BIN)/python -m pytest -q tests/test_architecture.py

format: venv ## rewrite the sources the way `make check` wants them
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .
	@$(BIN)/clang-format -i $(CPP)

minio: venv ## start a MinIO for development, print endpoint and credentials; Ctrl-C or `make minio-stop` ends it
	@$(BIN)/python examples/minio_server.py

minio-stop: venv ## stop the MinIO of `make minio`
	@$(BIN)/python examples/minio_server.py --stop

bench: venv ## run the benchmarks; results go to benchmarks/results/ as JSON
	@for bench in hashing digests codec_lossless codec_chunks entropy load data_plane tier_policy streaming; do echo "== $$bench"; $(BIN)/python benchmarks/$$bench.py; done

# The decoders and encoders as the fuzzers link them: everything but the bindings.
FUZZ_FLAGS := -std=c++20 -O1 -g -fno-omit-frame-pointer -ffp-contract=off -Wall -Wextra -Wno-pass-failed \
  -fsanitize=address,undefined -fno-sanitize-recover=all
FUZZED := $(patsubst csrc/%.cpp,$(FUZZ_DIR)/%.o,$(filter-out csrc/bindings% csrc/fuzz/%,$(filter %.cpp,$(INSTALLED))))

fuzz: $(FUZZ_DIR)/.can-fuzz ## fuzz the native decoders under ASan and UBSan (clang, FUZZ_SECONDS=60 for each); findings stay in build/fuzz
	@$(MAKE) --no-print-directory $(FUZZ_DIR)/write_seeds $(FUZZ_DIR)/fuzz_lossless $(FUZZ_DIR)/fuzz_scalable
	@mkdir -p $(FUZZ_DIR)/corpus-lossless $(FUZZ_DIR)/corpus-scalable
	@$(FUZZ_DIR)/write_seeds $(FUZZ_DIR)/corpus-lossless $(FUZZ_DIR)/corpus-scalable
	@for name in lossless scalable; do
		echo "== $$name, $(FUZZ_SECONDS) s"
		$(FUZZ_DIR)/fuzz_$$name -max_total_time=$(FUZZ_SECONDS) -max_len=8192 -timeout=20 -print_final_stats=1 \
			-artifact_prefix=$(FUZZ_DIR)/finding-$$name- $(FUZZ_DIR)/corpus-$$name
	done

$(FUZZ_DIR)/.can-fuzz:
	@mkdir -p $(FUZZ_DIR)
	@echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' > $(FUZZ_DIR)/probe.cpp
	@$(FUZZ_CXX) -fsanitize=fuzzer,address,undefined $(FUZZ_DIR)/probe.cpp -o $(FUZZ_DIR)/probe 2> $(FUZZ_DIR)/probe.log || { echo "make fuzz needs clang with its fuzzer runtime (Debian, Ubuntu: apt install clang; else say which: make fuzz FUZZ_CXX=clang++-18); see $(FUZZ_DIR)/probe.log"; exit 2; }
	@touch $@

$(FUZZED): $(FUZZ_DIR)/%.o: csrc/%.cpp $(filter %.h,$(NATIVE))
	@mkdir -p $(@D)
	@$(FUZZ_CXX) $(FUZZ_FLAGS) -fsanitize=fuzzer-no-link -c $< -o $@

$(FUZZ_DIR)/fuzz_lossless $(FUZZ_DIR)/fuzz_scalable: $(FUZZ_DIR)/%: csrc/fuzz/%.cpp $(FUZZED)
	@$(FUZZ_CXX) $(FUZZ_FLAGS) -fsanitize=fuzzer $^ -o $@

$(FUZZ_DIR)/write_seeds: csrc/fuzz/write_seeds.cpp $(FUZZED)
	@$(FUZZ_CXX) $(FUZZ_FLAGS) -fsanitize=fuzzer-no-link $^ -o $@

bench-codec: venv ## quality for bits beside published KV codecs (MODEL=dir, TEXTS=dir of .txt files): table, JSON, SVG
	@$(BIN)/python benchmarks/codec_quality.py $(if $(MODEL),--model $(MODEL)) $(if $(TEXTS),--texts $(TEXTS))

bench-io: $(VENV)/.bench-io ## cost of moving bytes beside other S3 clients, lookups, many streams, local disk: table, JSON, SVG
	@$(BIN)/python benchmarks/io_bench.py

bench-vllm: ## a real vLLM on the CPU with MinIO: hits beside LMCache, tiers, many clients, cost of saving: table, JSON, SVG
	@.ci/bench-vllm

cuda: ## build the GPU library into the package, with this machine's nvcc or PyPI's; needs no GPU
	@.ci/cuda-build

gpu-check: ## on a machine with a GPU: build, test, sanitize, measure; needs python3 with torch, nvcc, no network
	@$(PYTHON) .ci/gpu-check

gpu-wheels: ## fetch the packages themselves in place of gpu-check's stand-ins (GPU_CHECK_WHEELS=dir, GPU_PYTHON=3.12)
	@$(PYTHON) .ci/gpu-wheels

bench-gpu: venv cuda ## decode and encode GB/s on a GPU beside what limits them, and time to first token; `make gpu-check` runs it too
	@$(BIN)/python benchmarks/gpu_bench.py
	@$(BIN)/python benchmarks/gpu_first_token.py

$(VENV)/.bench-io: $(VENV)/.installed
	@echo "installing the S3 clients to compare with into $(VENV)"
	@# uv takes the names alone; pip builds the package once more.
	@if test -x $(BIN)/uv; then $(BIN)/uv pip install --quiet --python $(BIN)/python -r pyproject.toml --extra bench-io; else $(BIN)/python -m pip install --quiet -e '.[bench-io]'; fi
	@touch $@

clean: ## remove what was built, but no stored data
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
