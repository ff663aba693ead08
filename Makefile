# make demo    train, sample and evaluate on handwritten digits; says where the pictures are
# make test    lint, types, import contracts, all tests but the slow ones, and a short run of the demo
# make test-all    the same with the slow tests;   make lint, make clean
# make bench       times the ops and a training step;   make bench-peers    other libraries and ours
#
# Each sets up its own environment under .venv/ first, and again when what it was made from changes. By variable:
#   PYTHON=python3.12            the Python (3.10 or later) to make environments with
#   TORCH=torch==2.11.0          another torch; this is the oldest
#   SYSTEM_SITE_PACKAGES=1       use the torch that PYTHON has already (on a machine set up for CUDA)
#   PEERS=--peers-settings=all   options of make bench-peers
#   JOBS=2                       test processes; every core otherwise
#   CUDA_ARCHS=90                the GPUs that the tests compile the CUDA kernels for; make test-all: all that are shipped

SHELL := bash
.DELETE_ON_ERROR:
.SUFFIXES:

PYTHON ?= python3
SYSTEM_SITE_PACKAGES ?= 0
TORCH ?= $(if $(filter 1,$(SYSTEM_SITE_PACKAGES)),torch>=2.11,torch==2.13.0)
JOBS ?= auto
CUDA_ARCHS ?= $(or $(FASTDDPM_CUDA_ARCHS),$(if $(filter test-all,$(MAKECMDGOALS)),,90))

DEMO := .venv/demo
TEST := .venv/test
EXTRAS_demo := digits,plot
EXTRAS_test := test,peer,datasets,tensorboard
# it asks for torchvision and others that the tests do without, and so do we
PEER := denoising-diffusion-pytorch==2.3.4
# the CUDA compiler, for the tests, where the machine has none
NVCC := cuda-toolkit[nvcc,cudart,crt,nvvm,cccl]==13.0.*
NATIVE := pyproject.toml setup.py $(shell find csrc -type f)

FIND_NVCC = [ -n "$$CUDA_HOME" ] || command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]

# one test process a core, so one thread each; who is done takes over tests of the others: some take seconds, most none
PYTEST = OMP_NUM_THREADS=1 $(TEST)/bin/python -m pytest -n $(JOBS) --dist worksteal
SUMMARY := $(TEST)/summary.txt

.PHONY: demo test test-all smoke lint bench bench-peers clean FORCE
.SECONDARY:

demo: $(DEMO)/installed
	$(DEMO)/bin/python examples/digits.py --out demo

test: lint
	set -o pipefail; $(PYTEST) | tee $(SUMMARY)
	$(MAKE) --no-print-directory smoke
	@tail -n 1 $(SUMMARY)

test-all: lint
	set -o pipefail; $(PYTEST) --run-slow | tee $(SUMMARY)
	$(MAKE) --no-print-directory smoke
	@tail -n 1 $(SUMMARY)

smoke: $(TEST)/installed
	out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; $(TEST)/bin/python examples/digits.py --smoke --out "$$out"

lint: $(TEST)/installed
	$(TEST)/bin/ruff check .
	$(TEST)/bin/mypy
	$(TEST)/bin/lint-imports

bench: $(TEST)/installed
	$(TEST)/bin/python -m pytest benchmarks --benchmark-only --benchmark-columns=min,median,rounds

bench-peers: $(TEST)/installed
	$(TEST)/bin/python -m pytest benchmarks/peers --benchmark-only $(PEERS)

clean:
	rm -rf .venv build dist *.egg-info demo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .benchmarks
	rm -f fastddpm/_*.so fastddpm/_*_build.json
	find fastddpm tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# The package, editable. The tests need the native module, and the CUDA kernels wherever there is nvcc; the demo takes
# the module where it can be built, and does not wait for nvcc. Both lie in this checkout: what the demo's build leaves
# is a reason for the tests to build again.
.venv/test/installed: $(wildcard fastddpm/_cuda_build.json) .venv/test.archs
.venv/test/installed: export FASTDDPM_REQUIRE_NATIVE := 1
.venv/demo/installed: export FASTDDPM_NO_CUDA := 1
.venv/%/installed: .venv/%/ready $(NATIVE)
	$(if $(filter test,$*),FASTDDPM_CUDA_ARCHS="$$(sed s/all// .venv/test.archs)") .venv/$*/bin/python -m pip install --quiet --no-build-isolation --editable '.[$(EXTRAS_$*)]' '$(TORCH)'
	$(if $(filter test,$*),.venv/$*/bin/python -m pip install --quiet --no-deps '$(PEER)')
	touch $@

# An environment with torch and what setup.py needs; made anew when it is asked for with another Python or torch.
.venv/%/ready: .venv/%.wanted
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'fastddpm needs Python 3.10 or later: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo '$(PYTHON) cannot make virtual environments; install its venv package (on Debian: apt install python3-venv)' >&2; exit 1; }
	rm -rf .venv/$*
	$(PYTHON) -m venv $(if $(filter 1,$(SYSTEM_SITE_PACKAGES)),--system-site-packages) .venv/$*
	.venv/$*/bin/python -m pip install --quiet '$(TORCH)' 'setuptools>=77' wheel ninja pybind11
	$(if $(filter test,$*),@$(FIND_NVCC) || .venv/$*/bin/python -m pip install --quiet '$(NVCC)' || echo 'no nvcc: the tests of the CUDA kernels will be skipped')
	touch $@

# The architectures that the tests' kernels are compiled for, at least; in setup.py none named are all.
.venv/test.archs: FORCE
	@mkdir -p .venv
	@wanted='$(or $(CUDA_ARCHS),all)'; wanted=$${wanted//[;,]/ }; grep -qsx all $@ || for arch in $$wanted; do grep -qsw "$$arch" $@ || echo "$$wanted" >$@; done

.venv/%.wanted: FORCE
	@mkdir -p .venv
	@echo '$(PYTHON) $(TORCH) $(SYSTEM_SITE_PACKAGES)' | cmp -s - $@ || echo '$(PYTHON) $(TORCH) $(SYSTEM_SITE_PACKAGES)' >$@
