# make suite: set up, run every notebook at the smallest profile, compare with the accepted results
# make test:  set up, run the tests, check the notebooks' stored outputs
# make lint:  ruff, as it is configured in pyproject.toml
# make lab:   open the course in JupyterLab
# make bench: what quantised training costs on this machine
# make notebooks: execute the notebooks at their defaults and store the outputs (before committing a changed one)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= test
JOBS ?= 2
PYTEST_ARGS ?=
# A folder for the test results as JUnit XML; the suite's are always beside its run.json.
JUNIT ?=

.PHONY: setup suite test lint lab bench notebooks clean

setup: $(VENV)/.installed lowbit/kernels/_native.so

# The environment is made once and used again until pyproject.toml changes. The mark is its checksum, not its date,
# since a fresh clone has new dates.
$(VENV)/.installed: pyproject.toml
	@if [ -f $@ ] && cksum pyproject.toml | cmp -s - $@; then touch $@; else \
	  set -e; \
	  $(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}; say make PYTHON=..."'; \
	  test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install --quiet --upgrade pip; \
	  $(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'; \
	  cksum pyproject.toml > $@; \
	fi

# Made while installing, and again when its sources change. Without a compiler everything works in PyTorch, more slowly.
lowbit/kernels/_native.so: $(wildcard lowbit/kernels/csrc/*.[ch]) | $(VENV)/.installed
	-$(BIN)/python -m lowbit.kernels.build

suite: setup
	$(BIN)/lowbit run --profile smoke -j $(JOBS)
	$(BIN)/lowbit check --profile smoke

# One process a core would share the cores with torch's own threads: each gets one thread.
test: export OMP_NUM_THREADS = 1
test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(if $(JUNIT),--junitxml=$(JUNIT)/tests.xml) $(PYTEST_ARGS)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --nbval-lax --nbval-cell-timeout=120 -p no:cacheprovider notebooks $(if $(JUNIT),--junitxml=$(JUNIT)/nbval.xml) $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

lab: setup
	$(BIN)/jupyter lab notebooks

bench: setup
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/lowbit bench training --json results/bench/training.json

notebooks: export OMP_NUM_THREADS = 1
notebooks: setup
	$(BIN)/python -m tools.tidy notebooks/*.ipynb

clean:
	rm -rf $(VENV) results/runs results/scratch build ./*.egg-info
