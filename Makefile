# Everything runs from .venv, which is made on first use and again when a requirement changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): setup.py setup.cfg pyproject.toml $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, %s is %s: make PYTHON=/path/to/python" % (sys.executable, sys.version.split()[0]))'
	@echo '==> [1/2] $(VENV): a virtual environment'
	@$(PYTHON) -m venv $(VENV)
	@echo '==> [2/2] installing PyTorch, the OpenMMLab packages (OneDL) and mdeq_mm: some minutes'
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e '.[onedl,optional,tests]'
	@$(BIN)/python -m mdeq_mm.check
	@touch $@

install: $(STAMP)  ## make .venv and install everything into it

demo: $(STAMP)  ## train and evaluate a small MDEQ on embedded data, print mIoU and a picture
	@echo '==> demo'
	@$(BIN)/python tools/demo.py

test: $(STAMP)  ## run the whole test suite
	@echo '==> tests'
	@$(BIN)/python -m pytest

lint: $(STAMP)  ## check style and format
	@echo '==> lint'
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .

format: $(STAMP)  ## mend style and format
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

clean:  ## remove .venv and what builds leave
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
