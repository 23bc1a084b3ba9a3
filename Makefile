# Everything runs from .venv, which is made on first use and again when a requirement changes.
# `make test STACK=upstream` does the same with upstream OpenMMLab, from .venv-upstream.
# `make gpu GPU_PYTHON=python3` takes an interpreter as it is and makes no environment.
PYTHON ?= python3
STACK ?= onedl
VENV := $(if $(filter onedl,$(STACK)),.venv,.venv-$(STACK))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off

define install_onedl
@$(PIP) -e '.[onedl,optional,tests,docs]'
endef

# mmcv comes as source. It compiles its operators, for 20 minutes and more, only where its build sees
# torch, and says nothing where it does not; a wheel of such a build may lie in pip's cache.
define install_upstream
@$(UPSTREAM) $(PIP) setuptools wheel ninja torch torchvision
@$(UPSTREAM) MMCV_WITH_OPS=1 $(PIP) --no-build-isolation --no-cache-dir mmcv
@$(UPSTREAM) $(PIP) -e '.[mim,optional,tests,docs]' mmdet
endef
UPSTREAM := PIP_CONSTRAINT='$(CURDIR)/requirements/upstream_constraints.txt'

# OpenMP threads that wait for each other spin for a bounded time, as mdeq_mm/threads.py says, unless
# the environment names a policy.
ifeq ($(OMP_WAIT_POLICY)$(KMP_BLOCKTIME),)
export GOMP_SPINCOUNT ?= 12000
endif

ifndef install_$(STACK)
$(error STACK=$(STACK): want onedl or upstream)
endif

.DEFAULT_GOAL := help
.PHONY: help install try demo test test-slow mutate gpu soak docs lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): setup.py setup.cfg pyproject.toml $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, %s is %s: make PYTHON=/path/to/python" % (sys.executable, sys.version.split()[0]))'
	@echo '==> [1/2] $(VENV): a virtual environment'
	@$(PYTHON) -m venv $(VENV)
	@echo '==> [2/2] installing PyTorch, the OpenMMLab packages ($(STACK)) and mdeq_mm: some minutes'
	$(install_$(STACK))
	@$(BIN)/python -m mdeq_mm.check
	@touch $@

install: $(STAMP)  ## make .venv and install everything into it

# Torch's own operators: the first use of those in C++ builds them for a minute.
TRY ?= work_dirs/try
try: $(STAMP)  ## paint what the weights in this repository predict: seconds
	@echo '==> try'
	@$(BIN)/python tools/dataset_converters/digits.py $(TRY)/digits
	@$(BIN)/python tools/analysis_tools/inference.py $(TRY)/digits/test/3/0045.png \
		configs/mdeq_tiny_digits.py --equilibrium --out $(TRY)/prediction.png \
		--cfg-options model.backbone.norm_kernel=native

demo: $(STAMP)  ## train and evaluate a small MDEQ on embedded data, print mIoU and a picture
	@echo '==> demo'
	@$(BIN)/python tools/demo.py

test: $(STAMP)  ## run the test suite, but for the slow tests
	@echo '==> tests'
	@$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(STAMP)  ## train the digits network by every gradient: 20 minutes
	@echo '==> slow tests'
	@$(BIN)/python -m pytest -n auto --dist worksteal -m slow

# mutmut's names: modules and functions, not files. Without FILES: hours.
mutate: $(STAMP)  ## put faults into the code, one by one: FILES='mdeq_mm.deq.solvers.anderson*'
	@$(PIP) -q -r requirements/mutation.txt
	@echo '==> faults'
	@OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 $(BIN)/python -m mutmut run $(FILES)
	@$(BIN)/python -m mutmut results

# A test that fails does not keep the benchmark from running: a GPU may be there for minutes only.
gpu: $(if $(GPU_PYTHON),,$(STAMP))  ## on a GPU: its tests, then the benchmark; GPU_PYTHON=python3
	@echo '==> tests on the GPU'
	@export PYTHONPATH='$(CURDIR)'"$${PYTHONPATH:+:$$PYTHONPATH}"; \
	python='$(or $(GPU_PYTHON),$(BIN)/python)'; \
	"$$python" -c 'import sys, torch; torch.cuda.is_available() or sys.exit("torch %s finds no GPU" % torch.__version__)' || exit 1; \
	"$$python" -m pytest -m gpu tests/test_gpu; tests=$$?; \
	echo '==> benchmark on the GPU'; \
	"$$python" tools/benchmarks/run.py --suite gpu --device cuda $(GPU_FLAGS) && exit $$tests

# SEED= repeats a run; unset, each run has one of its own and prints it.
MINUTES ?= 20
soak: $(STAMP)  ## before a release: MINUTES=20 of random models, actions and faults
	@echo '==> soak'
	@$(BIN)/python -m tests.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

docs: $(STAMP)  ## write pages and API as HTML; a broken link fails
	@echo '==> docs'
	@$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo 'build/docs/index.html'

lint: $(STAMP)  ## check style and format
	@echo '==> lint'
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .

format: $(STAMP)  ## fix style and format
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

clean:  ## remove .venv and what builds leave
	rm -rf .venv .venv-upstream build dist *.egg-info .pytest_cache .ruff_cache .hypothesis mutants
