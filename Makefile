# Each target installs what it needs first; `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALLED := build/types
RUN ?= runs/demo
# Two processes with one thread each: the models in the tests are too small to gain from more threads.
# Each begins with half of the tests, in order, so that the fixtures of most files are made once.
PYTEST_ARGS ?= -n 2 --dist worksteal
OMP_NUM_THREADS ?= 1
BENCH_ARGS ?=
OTHER ?= python3.13
# pip reads the indexes and certificates that are set on this machine; uv is faster: INSTALL="uv pip install --python $(BIN)/python"
INSTALL ?= $(BIN)/python -m pip install --quiet
# About a minute on two cores; test_storage.py asks for equal bits after a reload and a resumed run. Of test_exact.py
# only what is compared to rounding errors: the bounds of its fits are far above them.
NUMERICAL := $(patsubst %,tests/test_%.py,curvature elbo factored_normal fast_path language_model laplace \
  scoring sites storage weight_distributions) \
  $(addprefix tests/test_exact.py::,test_no_steps_is_the_prior test_pyro_s_estimator_agrees)
# They use every dependency: about a minute.
LOWEST := $(patsubst %,tests/test_%.py,base_model completion loading lora_settings posterior_plots \
  prediction_draws saved_files statistics table_formats trackers)
CHECKED := bayes_lora models guides tests examples benchmarks docs/hooks
# Phrases that are not standard technical English; CONTRIBUTING.md says what to write instead.
PHRASES := cannot be had|to be had|told from|anew|will do|likewise|held[ -]back|ours, one pass

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-isa test-lowest test-python test-quantized bench docs lint phrases format types installed wheel package clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

setup: $(STAMP)  ## make .venv and install everything into it
	@:

# torch comes first and alone, so that nothing else chooses another build of it. The stamp is written last:
# an interrupted installation is taken up again by the next call.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "bayes-lora needs Python 3.11 or newer; name one: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "installing into $(VENV), which takes some minutes and 2 GB; more if torch brings CUDA"
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(INSTALL) -c constraints.txt "setuptools>=77"
	$(INSTALL) -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup  ## adapt the shipped prior to unseen tasks and a spreadsheet; the report lands in runs/demo
	$(BIN)/bayes-lora demo --run $(RUN) --overwrite

test: setup  ## run the tests but the slow ones, about six minutes; PYTEST_ARGS chooses some
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/pytest -m "not slow" $(PYTEST_ARGS)

test-all: setup  ## run all the tests
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/pytest $(PYTEST_ARGS)

# Which kernels compute a product depends on the CPU, and with them its last bits. torch's own kernels obey ATEN_...,
# those of MKL and oneDNN the other two. A vendor's newest kernels are what `make test` runs anyway.
test-isa: setup  ## run the numerical tests again as on older CPUs: with SSE and with AVX2
	ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 \
	  OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/pytest -m "not slow" $(PYTEST_ARGS) $(NUMERICAL)
	ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 \
	  OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/pytest -m "not slow" $(PYTEST_ARGS) $(NUMERICAL)

test-quantized: setup  ## install bitsandbytes, and run the tests that need it
	$(INSTALL) -c constraints.txt "$$(grep '^bitsandbytes==' constraints.txt)"
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/pytest tests/test_quantized.py

# torch is the build of constraints.txt: of older ones, PyPI has only those with CUDA. Old libraries warn of newer ones.
test-lowest: setup  ## run some tests with the lowest versions that pyproject.toml allows, but of torch
	$(PYTHON) -m venv --clear build/lowest
	grep '^torch==' constraints.txt >build/lowest/torch.txt
	build/lowest/bin/python -m pip install --quiet -r build/lowest/torch.txt
	$(BIN)/uv pip install --quiet --python build/lowest/bin/python --resolution lowest-direct -c build/lowest/torch.txt \
	  -e ".[arviz]" "pytest>=8.3" "pytest-xdist>=3.6" "hypothesis>=6.100" "tensorboard>=2.16"
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) build/lowest/bin/pytest -m "not slow" -o filterwarnings=ignore $(PYTEST_ARGS) $(LOWEST)

# On Linux, PyPI's torch brings CUDA: 3 GB to download, 5 GB on disk.
test-python: setup  ## run some tests with another Python; OTHER chooses it, by default python3.13
	$(OTHER) -m venv --clear build/other
	$(BIN)/uv pip install --quiet --python build/other/bin/python -c constraints.txt \
	  -e ".[arviz]" pytest pytest-xdist hypothesis tensorboard
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) build/other/bin/pytest -m "not slow" $(PYTEST_ARGS) tests/test_distributed.py $(LOWEST)

bench: setup  ## measure speed and memory on this machine's CPU, about eight minutes; BENCH_ARGS chooses cases
	$(BIN)/python benchmarks/speed.py $(BENCH_ARGS)

# The reference is made of the built wheel, as lint and types are. With --quiet, mkdocs would count no warnings.
docs: installed  ## build the documentation into build/site, and check it
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	$(BIN)/python docs/hooks/check_site.py build/site

lint: installed phrases  ## check style, formatting, phrases, and which module may import which
	$(BIN)/ruff check $(wildcard $(CHECKED))
	$(BIN)/ruff format --check $(wildcard $(CHECKED))
	cd $(INSTALLED) && PYTHONPATH=. $(abspath $(BIN))/lint-imports --no-cache $(abspath pyproject.toml)

phrases:
	@git grep -nEiw '$(PHRASES)' -- '*.py' '*.md' ':!CHANGELOG.md' ':!tests/fixtures*'; test $$? -eq 1 || \
	  { echo "error: phrases that are not standard English; see Style in CONTRIBUTING.md" >&2; exit 1; }

format: setup  ## format, and fix what ruff can fix
	$(BIN)/ruff check --fix $(wildcard $(CHECKED))
	$(BIN)/ruff format $(wildcard $(CHECKED))

types: installed  ## check the types of the package, models and guides with it
	cd $(INSTALLED) && MYPYPATH=. $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) \
	  --cache-dir $(abspath .mypy_cache) -p bayes_lora

# At the root, models/ and guides/ are not yet parts of the package: mypy and lint-imports would skip them silently.
installed: wheel
	rm -rf $(INSTALLED) && mkdir -p $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --target $(INSTALLED) dist/*.whl

# setuptools would pack files that were deleted since the last build, if it found them in build/lib.
wheel: setup  ## build dist/*.whl
	rm -rf build/lib build/bdist.* dist/*.whl
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

package: setup  ## build the wheel and the sdist in dist as for a release, and check them
	rm -rf build/lib build/bdist.* dist && mkdir -p build
	$(BIN)/python -m build --no-isolation >build/package.log 2>&1 || { cat build/package.log >&2; exit 1; }
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

clean:  ## delete what was built, .venv included
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
