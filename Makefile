PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_CUDA ?= torch==2.11.0
TORCH_NEWEST ?= torch==2.14.1
# The one that TORCH is released with.
TRITON ?= triton==3.7.1
VENV ?= .venv
VENV_CUDA ?= .venv-cuda
# Files of Triton alone: torch.compile in VENV is to find none.
TRITON_FILES ?= .venv-triton
ARGS ?=
CALLS ?= 20000

PY := $(VENV)/bin/python
# Stamps carry the torch they stand for, so that TORCH=... installs and builds anew.
INSTALLED := $(VENV)/.installed-$(subst /,-,$(subst =,-,$(TORCH)))
INSTALLED_TRITON := $(TRITON_FILES)/.installed-$(subst /,-,$(subst =,-,$(TRITON)))
BUILT := build/.built$(if $(filter 1,$(DROPOUT_EXT_DEBUG)),-debug)
CXX_FILES = $(shell find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# What a CUDA build without a GPU can show of itself, and what differs between versions of torch;
# `make test` runs everything.
VERSION_TESTS = $(foreach t,operator keys module family errors layouts functorch autograd \
  checkpoint compile seeds modes amp interop monte_carlo distributed fused compat convert \
  keys_context override override_compile,tests/test_$(t).py)
# What calls the extension in every way, in minutes.
SANITIZE_TESTS = $(foreach t,operator layouts errors keys fuzz,tests/test_$(t).py)
# A file in a process of its own at a time; four need not more than 8 GB of memory.
IN_PARALLEL = -n auto --maxprocesses 4 --dist loadfile
QUICK_FLAG = $(if $(filter-out 0,$(QUICK)),--quick)

# Into a directory whose build/ stays: an extension built there leaves the one of `make build` alone.
define copy-sources
mkdir -p $(1) && find $(1) -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
git ls-files -co --exclude-standard -z | tar --null -T - --ignore-failed-read -cf - | tar -C $(1) -xf -
endef
# A torch of its CUDA build, $(2), in the environment $(1). pip remarks that Triton and the CUDA
# bindings are missing; nothing here uses them.
define install-linked
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install -q packaging
$(1)/bin/python -m pip install -q --no-deps "$(2)"
$(1)/bin/python tools/cuda_requirements.py > $(1)/requirements.txt
$(1)/bin/python -m pip install -q -r $(1)/requirements.txt -r requirements-test.txt
endef
# In the folder $(1), with the environment $(2), with CUDA or not ($(3)).
define build-and-test
$(call copy-sources,$(1))
@echo "building the extension in $(1) (log: $(1).log)"
@cd $(1) && DROPOUT_EXT_CUDA=$(3) $(abspath $(2))/bin/python setup.py -q build_ext --inplace \
  >../$(notdir $(1)).log 2>&1 || { cat ../$(notdir $(1)).log; exit 1; }
cd $(1) && $(abspath $(2))/bin/python -m dropout_ext
cd $(1) && $(abspath $(2))/bin/python -m pytest --timeout=600 $(IN_PARALLEL) \
  -m "not cuda and not slow" $(VERSION_TESTS) $(ARGS)
endef
# The runtime comes before everything else in the process; the C++ library with it, whose exceptions
# it watches. Python and torch end without freeing all that they hold, so leaks are for tests to find.
SANITIZED_ENV = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1

export DROPOUT_EXT_WERROR ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help build test clang fuzz sanitize bench bench-compare stats plots demo lint format \
  cuda-build cuda-static triton-static newest gpu-check wheel dist clean distclean tidy

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "variables: PYTHON=$(PYTHON) TORCH=$(TORCH) TORCH_CUDA=$(TORCH_CUDA) QUICK=1 ARGS='passed on'"

build: $(BUILT) ## create .venv with all that is needed, build the extension in place

$(INSTALLED): requirements-dev.txt requirements-test.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "$(TORCH)" -r requirements-dev.txt
	@rm -f $(VENV)/.installed-*; touch $@

$(BUILT): $(INSTALLED) setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*/*)
	@mkdir -p build && touch build/.started  # an edit during the build is newer than the stamp
	@echo "building the extension (log: build/build.log)"
	@$(PY) setup.py -q build_ext --inplace >build/build.log 2>&1 || { cat build/build.log; exit 1; }
	@rm -f build/.built*; mv build/.started $@

compile_commands.json: $(BUILT) ## how each source is compiled, for editors and clang-tidy
	@$(VENV)/bin/ninja -C $$(ls -td build/temp.* | head -1) -t compdb compile >$@

tidy: compile_commands.json ## clang-tidy (of the system), on all but the CUDA sources
	ls csrc/operators.cpp csrc/*/*.cpp | grep -vE '^csrc/(cuda|operator)/' | \
	  xargs -P $$(nproc) -n 1 clang-tidy -p . --quiet

test: build ## run the tests; ARGS="-k name" narrows them
	$(PY) -m pytest --timeout=600 $(IN_PARALLEL) $(ARGS)

# Their code, of which clang-tidy reads no more than the sources; without sanitizers for the time.
clang: build ## compile the CPU kernels and their native tests by clang, and run those
	CXX=clang++ DROPOUT_EXT_SANITIZE= $(PY) -m pytest --timeout=600 -k "variant or headers_on_the_host" \
	  tests/test_cpu_kernel.py tests/test_contract.py $(ARGS)

fuzz: build ## random calls against the reference, other ones every time; CALLS=<how many>
	DROPOUT_EXT_FUZZ=$(CALLS) $(PY) -m pytest tests/test_fuzz.py $(ARGS)

sanitize: $(INSTALLED) ## build the extension with sanitizers, apart, and run the operators' tests in it
	$(call copy-sources,build/sanitized)
	@echo "building the extension with sanitizers (log: build/sanitize.log)"
	@cd build/sanitized && DROPOUT_EXT_CUDA=0 DROPOUT_EXT_SANITIZE=address,undefined $(abspath $(PY)) \
	  setup.py -q build_ext --inplace >../sanitize.log 2>&1 || { cat ../sanitize.log; exit 1; }
	cd build/sanitized && $(SANITIZED_ENV) $(abspath $(PY)) -m pytest -p no:cacheprovider \
	  --timeout=600 $(IN_PARALLEL) -m "not slow" $(SANITIZE_TESTS) $(ARGS)

bench: build ## measure against nn.Dropout; QUICK=1 in under a minute
	$(PY) -m benchmarks $(QUICK_FLAG) $(ARGS)

bench-compare: build ## measure this tree against another commit: BASE=<commit>
	@test -n "$(BASE)" || { echo "usage: make bench-compare BASE=<commit>"; exit 2; }
	$(PY) -m benchmarks.compare $(BASE) $(QUICK_FLAG) $(ARGS)

stats: build ## statistics of the masks; QUICK=1 in under a minute
	$(PY) -m benchmarks.stats $(QUICK_FLAG) $(ARGS)

plots: build ## draw the pictures from the measured CSV files
	$(PY) -m benchmarks.plots $(ARGS)

demo: build ## run the examples
	$(PY) -m examples $(ARGS)

lint: $(INSTALLED) ## ruff, clang-format, mypy and pyright, changing nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pyright --pythonpath $(PY)
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)

format: $(INSTALLED) ## let ruff and clang-format rewrite the sources
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

cuda-build: ## build, import and test the CUDA extension as far as that goes without a GPU
	@command -v nvcc >/dev/null || test -x "$$CUDA_HOME/bin/nvcc" || \
	  { echo "make cuda-build: nvcc was not found; install the CUDA toolkit and put nvcc on PATH or set CUDA_HOME"; exit 1; }
	$(call install-linked,$(VENV_CUDA),$(TORCH_CUDA))
	$(call build-and-test,build/with-cuda,$(VENV_CUDA),1)

newest: ## build and test with the newest torch, without CUDA
	$(call install-linked,.venv-newest,$(TORCH_NEWEST))
	$(call build-and-test,build/with-newest,.venv-newest,0)

cuda-static: build ## compile the kernels for every architecture; compare their instruction counts
	$(PY) tools/cuda_static.py --check $(ARGS)

$(INSTALLED_TRITON): $(INSTALLED)
	rm -rf $(TRITON_FILES)
	$(PY) -m pip install -q --no-deps --target $(TRITON_FILES) "$(TRITON)"
	@touch $@

triton-static: build $(INSTALLED_TRITON) ## what torch.compile writes for CUDA: run its masks, compare its instruction counts
	PYTHONPATH=$(TRITON_FILES) TRITON_INTERPRET=1 $(PY) -m tools.triton_bits
	PYTHONPATH=$(TRITON_FILES) $(PY) -m tools.triton_static --check $(ARGS)

# torch's own libraries, and CUDA's, are those of the torch that is installed beside the wheel.
wheel: build ## sdist, and from it a wheel named for its torch; installed and checked in a new environment
	@rm -rf build/dist && mkdir -p build
	@echo "building sdist and wheel (log: build/dist.log)"
	@{ $(PY) -m build --no-isolation --sdist --outdir build/dist . && \
	  tar -C build/dist -xf build/dist/*.tar.gz && \
	  DROPOUT_EXT_WHEEL=1 $(PY) -m build --no-isolation --wheel --outdir build/dist build/dist/dropout_ext-*/; \
	  } >build/dist.log 2>&1 || { cat build/dist.log; exit 1; }
	PATH="$(abspath $(VENV))/bin:$$PATH" auditwheel repair --wheel-dir build/dist/wheel \
	  --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' build/dist/*.whl
	$(PYTHON) -m venv build/dist/env
	build/dist/env/bin/pip install -q "$(TORCH)" numpy build/dist/wheel/*.whl
	cd build/dist/env && bin/dropout-ext
	@ls build/dist/env/lib/python*/site-packages/dropout_ext/py.typed >/dev/null
	@ls build/dist/wheel/*+torch*.whl

dist: wheel ## the wheel, and the tests of the sdist, which must be complete
	@git ls-files | (cd build/dist/dropout_ext-*/ && xargs ls -d >/dev/null) || \
	  { echo "make dist: MANIFEST.in leaves these files out of the sdist"; exit 1; }
	cp build/dist/env/lib/python*/site-packages/dropout_ext/_C*.so build/dist/dropout_ext-*/dropout_ext/
	cd build/dist/dropout_ext-*/ && $(abspath $(PY)) -m pytest -q --collect-only >/dev/null
	cd build/dist/dropout_ext-*/ && $(abspath $(PY)) -m pytest -q --timeout=600 tests/test_docs.py $(ARGS)

gpu-check: ## on a machine with a GPU: build, test and measure with what is installed there
	$(PYTHON) tools/gpu_check.py $(ARGS)

clean: ## remove what was built
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -f compile_commands.json dropout_ext/*.so dropout_ext/*.pyd
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environments too
	rm -rf $(VENV) $(VENV_CUDA) $(TRITON_FILES) .venv-newest
