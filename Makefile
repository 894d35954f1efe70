# Two commands: `make demo` sets up and runs the main job, `make test` sets up and passes the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo demo-quick test test-fast test-all test-fla quality style docs bench clean

$(INSTALLED): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and pinned: a plain install would fetch the CUDA build
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/hf-hybrid demo --resume

demo-quick: $(INSTALLED)
	$(BIN)/hf-hybrid demo --quick --resume --output_dir smollm2-sentiment-hybrid-quick

test: $(INSTALLED) quality
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not sweep"

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m "not slow and not sweep"

# also every contract on a toy model of every model type of transformers (five minutes more)
test-all: $(INSTALLED) quality
	$(BIN)/python -m pytest -n 2

# every op that maps to a flash-linear-attention kernel, on a CPU through Triton's interpreter; in an environment of its own (2 GB)
test-fla:
	$(MAKE) VENV=.venv-fla .venv-fla/.installed
	.venv-fla/bin/python -m pip install --quiet --constraint constraints.txt triton flash-linear-attention
	.venv-fla/bin/python -m pytest tests/ops/test_fla.py

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python benchmarks/cards.py --check

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict

bench: $(INSTALLED)
	$(BIN)/python benchmarks/fidelity.py --output benchmarks/results/fidelity.json
	$(BIN)/python benchmarks/distillation_step.py --output benchmarks/results/distillation_step.json
	$(BIN)/python benchmarks/initialization.py --output benchmarks/results/initialization.json
	$(BIN)/python benchmarks/mixers.py --output benchmarks/results/mixers.json
	$(BIN)/python benchmarks/ops.py --json benchmarks/results/ops.json
	$(BIN)/python benchmarks/exact_memory.py --output benchmarks/results/exact_memory.json
	$(BIN)/python benchmarks/repair_step.py --output benchmarks/results/repair_step.json
	$(BIN)/python benchmarks/hybrid_speed.py --output benchmarks/results/hybrid_speed.json
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/cards.py
	$(BIN)/python benchmarks/backbones.py

clean:
	rm -rf $(VENV) build dist *.egg-info
