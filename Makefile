# Two commands set everything up: `make demo` and `make test`. Both create .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help bench demo docs test test-slow lint types unit clean

help:
	@echo "make demo       compile wan-tiny, verify, sample from the original and from the artifact, compare"
	@echo "make test       lint, types, tests"
	@echo "make test-slow  the slow proofs as well"
	@echo "make bench      time linears and denoising steps beside torch's and diffusers'"
	@echo "make docs       write the pages of docs/ that are made from the code"
	@echo "make clean      remove the virtual environment and everything built"

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(STAMP)
	$(BIN)/python tools/demo.py --output demo

bench: $(STAMP)
	$(BIN)/python tools/bench.py linear --threads 1,2 -o bench/linear.json --markdown bench/linear.md --plot bench/linear.png
	$(BIN)/python tools/bench.py step --latent 5x24x52,20x24x52 -o bench/step.json --markdown bench/step.md --plot bench/step.png

docs: $(STAMP)
	$(BIN)/python tools/make_docs.py passes
	$(BIN)/python tools/make_docs.py api

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy resolves packages by folder name; the links give the folders their installed names.
types: $(STAMP)
	mkdir -p .mypy/hif4c
	for name in compiler passes runtime tools; do ln -sfn ../../$$name .mypy/hif4c/$$name; done
	MYPYPATH=.mypy $(BIN)/mypy -p hif4c.runtime -p hif4c.passes -p hif4c.compiler -p hif4c.tools

unit: $(STAMP)
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m 'slow or not slow'

clean:
	rm -rf $(VENV) .mypy build bench demo *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
