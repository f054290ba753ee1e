# make PYTHON=... CUDA_HOME=... choose another Python (torch is taken from it if it has one) and
# another CUDA toolkit. THUNDERKITTENS_ROOT=... uses a ThunderKittens checkout of your own.
PYTHON ?= python3
ARGS ?=
PY := .venv/bin/python

# A .venv stays what it is until PYTHON is named.
KEEP := $(if $(filter file,$(origin PYTHON)),--keep)
ENVIRONMENT := $(PYTHON) tools/environment.py $(KEEP)
RUN := PYTHONPATH=python:. $(PY)

ifdef CUDA_HOME
export CUDA_HOME
endif
ifdef THUNDERKITTENS_ROOT
export THUNDERKITTENS_ROOT
endif

.PHONY: all demo test check lint format bench gpu-check clean distclean help
.DEFAULT_GOAL := all

all:  ## build both extension modules in place
	@$(ENVIRONMENT) build
	@$(PY) tools/build.py

demo: all  ## the main job: four requests scheduled, run and checked
	@$(ENVIRONMENT) run
	@$(RUN) -m mla_decode demo $(ARGS)

test: all  ## the tests; those that need a GPU skip, loudly, where there is none
	@$(ENVIRONMENT) run test
	@$(RUN) -m pytest $(ARGS)

check: all lint  ## lint, format and types, then the tests
	@$(MAKE) --no-print-directory test

lint: all
	@$(ENVIRONMENT) run test lint
	@$(PY) tools/lint.py

format: all  ## rewrite Python, C++ and CUDA sources in the project's format
	@$(ENVIRONMENT) run test lint
	@$(PY) tools/lint.py --fix

bench: all  ## the benchmark table, beside the peers that are installed (ARGS="--shapes ...")
	@$(ENVIRONMENT) run
	@$(ENVIRONMENT) --optional peers
	@$(RUN) -m benchmarks.bench $(ARGS)

gpu-check: all  ## GPU tests and benchmark; writes benchmarks/results/<device>.json
	@$(ENVIRONMENT) run test
	@$(ENVIRONMENT) --optional peers
	@$(RUN) tools/gpu_check.py $(ARGS)

clean:  ## remove what make built
	rm -rf build python/mla_decode/*.so demos/*.so benchmarks/*.so tests/*.so

distclean: clean  ## remove the environment and the fetched headers too
	rm -rf .venv third_party

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|'
