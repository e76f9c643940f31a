# make demo   a first fine-tune, on the built-in model       make test   the test suite
# make lint   ruff and mypy                                   make quick  the tests of a minute
# make bench  our training step against mlx-lm's

PYTHON ?= python3
VENV ?= .venv
RUN_DIR ?= adapters/quickstart
# Empty leaves out the tests that compare with torch and PEFT.
TORCH ?= torch==2.13.0 peft accelerate

# MLX's Linux wheel computes on reference BLAS; OpenBLAS is 40 times as fast in fp32.
OPENBLAS := $(firstword $(wildcard /usr/lib/*-linux-gnu/openblas-pthread/libopenblas.so.0 /usr/lib64/libopenblas.so.0))
ifneq ($(OPENBLAS),)
PRELOAD := LD_PRELOAD=$(OPENBLAS)
endif

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DELETE_ON_ERROR:
.PHONY: demo test quick metal lint fix bench clean
.DEFAULT_GOAL := help
help:
	@sed -n '1,3s/^# //p' Makefile

$(BIN)/python:
	@if [ "$(origin PYTHON)" = file ] && command -v uv >/dev/null; then \
		uv venv --quiet --seed --python '>=3.11' $(VENV); \
	elif $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		$(PYTHON) -m venv $(VENV); \
	else \
		echo '$(PYTHON) is not Python 3.11 or newer: install one (a Mac: brew install python@3.12),'; \
		echo 'then make $(MAKECMDGOALS) PYTHON=python3.12; or install uv, which fetches one'; \
		exit 1; \
	fi

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PIP) -e '.[test]'
	@if [ -n "$(TORCH)" ]; then $(PIP) $(TORCH) || echo "no torch: its tests will be skipped"; fi
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	@touch $@

# One of the held-out rows.
PROMPT := Write a Python function `last_word` that returns the last word of a string.

demo: $(VENV)/.installed
	$(PRELOAD) $(BIN)/mlx-tune run recipes/quickstart.toml --run-dir $(RUN_DIR) --overwrite
	@echo '$(PROMPT)'
	@echo; echo '--- the base model:'
	@$(PRELOAD) $(BIN)/mlx-tune generate $(RUN_DIR) '$(PROMPT)' --base --max-tokens 100
	@echo; echo '--- fine-tuned:'
	@$(PRELOAD) $(BIN)/mlx-tune generate $(RUN_DIR) '$(PROMPT)' --max-tokens 100

# Two processes side by side, on matrices too small for threads.
PYTEST := OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(PRELOAD) $(BIN)/python -m pytest -q -n 2 --dist worksteal

test: $(VENV)/.test
	$(PYTEST)

quick: $(VENV)/.test
	$(PYTEST) --quick

metal: $(VENV)/.test
	$(BIN)/python -m pytest -q -m metal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mlx_tuner

fix: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(PRELOAD) $(BIN)/python benchmarks/training.py

clean:
	rm -rf $(VENV) build dist *.egg-info
