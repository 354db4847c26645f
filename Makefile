# Everything runs in .venv, which these commands make. Another interpreter: make PYTHON=python3.12 ...
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

BUILD_FILES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)
PACKAGE := $(shell find sparta_kernels -name '*.py')

# The demonstration: a narrow ResNet-18 with SPARTA on 8x8 digits, whose grey levels lie 16/255 apart; 32/255 is two.
RUN := runs/digits
DEMO := --width 16 --epochs 10 --batch-size 64 --schedule one-cycle --threads 1 --overwrite
EPS := 32/255

.PHONY: help evaluate test lint mutants bench clean

help:
	@echo "make evaluate  install, train a small SPARTA ResNet-18 on handwritten digits, attack it with PGD-10/30/50"
	@echo "make test      install the development extras, run every check that needs no GPU"
	@echo "make mutants   plant faults one at a time and see the tests catch each"
	@echo "make bench     time the operations against copy, eager PyTorch and torch.compile"
	@echo "make clean     remove .venv, builds and runs"

.venv/bin/python:
	$(PYTHON) -m venv .venv

# What a user installs.
.venv/installed: .venv/bin/python $(BUILD_FILES) $(PACKAGE)
	$(PIP) '.[data,report]'
	@touch $@ && rm -f .venv/installed-dev

# The same, editable, with the tools, and with what the tests and benchmarks compare with.
.venv/installed-dev: .venv/bin/python $(BUILD_FILES) requirements-compare.txt
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps --requirement requirements-compare.txt
	@touch $@ .venv/installed

evaluate: .venv/installed
	@mkdir -p $(RUN)
	$(BIN)/sparta train $(RUN)/standard.safetensors $(DEMO) --attack none
	$(BIN)/sparta train $(RUN)/robust.safetensors $(DEMO) --attack xie2019 --attack-steps 7 --eps $(EPS)
	$(BIN)/sparta evaluate $(RUN)/standard.safetensors $(RUN)/robust.safetensors --eps $(EPS) --steps 50 \
	  --batch-size 360 --threads 1 --backend auto --backend reference \
	  --json $(RUN)/evaluate.json --plot $(RUN)/loss.png

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A process for each core; each takes whole files, in order of their names, so that the longest are not the last.
test: lint
	$(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
	  --cov --cov-report=term --cov-fail-under=90 --benchmark-disable tests benchmarks

mutants: .venv/installed-dev
	$(BIN)/python tests/mutants.py

bench: .venv/installed-dev
	@mkdir -p runs
	$(BIN)/python benchmarks/ops.py --json runs/ops.json

clean:
	rm -rf .venv build dist runs *.egg-info sparta_kernels/_native*.so
