# Every target prepares .venv by itself. Paths are relative, so that a checkout under a path with a space works.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install --no-deps
READY := .venv/package.stamp
FUXICTR := 0245987fdc1d43c36164ea496a02324885a8557a

.DEFAULT_GOAL := help
.PHONY: help demo test long check lint bench peers lock clean

help:
	@echo "make demo   simulate an ads log, train on it, end with metrics and a report (in work/)"
	@echo "make test   run the tests, but for those below"
	@echo "make long   run those that take minutes each: a training through twenty failures, a model's whole life, an image"
	@echo "make check  lint, then test"
	@echo "make lint   format, style, types, spelling, file sizes"
	@echo "make bench  measure every speed and accuracy claim"
	@echo "make peers  install the libraries that 'make bench' compares crossings with (in .peers/)"
	@echo "make lock   resolve requirements/cpu.txt and images/locks again from pyproject.toml"
	@echo "make clean  remove .venv, .peers, builds and caches; work/ stays"

demo: $(READY)
	@mkdir -p work
	@test -d work/ads || { echo "== simulating an ads log into work/ads"; $(BIN)/mlenv data simulate --out work/ads; }
	@echo "== training the demo ranker, examples/demo/ranker.yaml"
	@$(BIN)/mlenv train examples/demo/ranker.yaml

test: $(READY)
	@echo "== running the tests"
	@$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile -m "not long"

long: $(READY)
	@echo "== running the tests that take minutes each"
	@$(BIN)/pytest -m long

check: lint
	@$(MAKE) --no-print-directory test

lint: $(READY)
	@echo "== checking format, style, types, spelling and file sizes"
	@PRE_COMMIT_HOME=.venv/pre-commit $(BIN)/pre-commit run --all-files

bench: $(READY)
	@echo "== running the benchmarks"
	@$(BIN)/python -m benchmarks

peers: $(READY)
	@echo "== installing benchmarks/peers.txt into .peers"
	@rm -rf .peers
	@$(PIP) --target .peers -r benchmarks/peers.txt
	@echo "== cloning FuxiCTR's model_zoo, which its wheel leaves out; the benchmark runs without it too"
	-@git clone --quiet https://github.com/reczoo/FuxiCTR .peers/FuxiCTR && git -C .peers/FuxiCTR checkout --quiet $(FUXICTR)

lock: .venv/bin/python
	@echo "== resolving pyproject.toml into requirements/cpu.txt and images/locks"
	@$(BIN)/python requirements/lock.py
	@$(BIN)/python requirements/image_locks.py

clean:
	@echo "== removing .venv, .peers, builds and caches; work/ stays, it holds your runs"
	@rm -rf .venv .peers build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './work/*' -prune -exec rm -rf {} +

.venv/bin/python:
	@echo "== creating .venv with $(PYTHON)"
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mlenv needs Python 3.11 or newer. Fix: make PYTHON=python3.11 ..."; exit 1; }
	@"$(PYTHON)" -m venv .venv

# The environment is made anew for a new lock, so that it never holds a package that the lock does not name.
.venv/lock.stamp: requirements/cpu.txt
	@rm -rf .venv
	@$(MAKE) --no-print-directory .venv/bin/python
	@echo "== installing the packages of requirements/cpu.txt into .venv (a few minutes, once)"
	@$(PIP) -r requirements/cpu.txt
	@$(BIN)/python -c 'import torch' || { echo "torch does not load. Fix: offer pip PyTorch's CPU builds, for example by PIP_EXTRA_INDEX_URL, and run make again"; exit 1; }
	@touch $@

$(READY): .venv/lock.stamp pyproject.toml
	@echo "== installing mlenv itself into .venv, editable"
	@$(PIP) --no-build-isolation --editable .
	@touch $@
