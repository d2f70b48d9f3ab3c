# Every target makes what it needs in .venv; nothing is installed by hand.
PYTHON ?= python3
# An index that offers CPU builds of torch. It is left out when it is empty or does not answer.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
CTEST_BUILD := build/kernel-tests
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: venv demo test test-full test-kernels bench lint clean

venv: .venv/package

.venv/tools: constraints.txt
	$(PYTHON) -m venv .venv
	index='$(TORCH_INDEX)'; \
	if [ -n "$$index" ] && timeout 10 $(BIN)/python -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)' "$$index/torch/" 2>/dev/null; \
	then extra="--extra-index-url $$index"; else extra=; fi; \
	$(PIP) $$extra torch==2.13.0
	$(PIP) 'setuptools>=77' cmake ninja pybind11
	touch $@

# The native sources count too: what the tests load is what the tree says.
.venv/package: .venv/tools pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	$(PIP) --no-build-isolation --editable '.[dev,demo]'
	touch $@

demo: venv
	tersetorch demo

test: venv test-kernels
	python -m pytest -m 'not slow'

test-full: venv test-kernels
	python -m pytest

test-kernels: .venv/tools
	cmake -S . -B $(CTEST_BUILD) -G Ninja -DTERSETORCH_TESTS=ON >/dev/null
	cmake --build $(CTEST_BUILD)
	ctest --test-dir $(CTEST_BUILD) --output-on-failure

bench: venv
	python -m tersetorch.bench

lint: venv
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run --Werror $$(find csrc tests examples -name '*.cpp' -o -name '*.h' -o -name '*.cu')

clean:
	rm -rf .venv build dist python/*.egg-info python/tersetorch/*.so
