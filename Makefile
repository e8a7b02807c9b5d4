# make suite: set up, run every notebook at the smallest profile, compare with the accepted results
# make test:  set up, run the tests, check the notebooks' stored outputs
# make lint:  ruff, as it is configured in pyproject.toml
# make lab:   open the course in JupyterLab
# make bench: what quantized training costs on this machine
# make notebooks: execute the notebooks at their defaults and store the outputs (before committing a changed one)
# make lock:  write the installed versions into constraints.txt
# make site:  build the web site into build/site/html, in a small environment of its own without torch
# make links: check the site's sources for files that are linked and missing
# make launch: write the notebooks for Colab and Binder into build/launch
# make versions: the fast tests with the lowest, the locked and the newest versions, in environments of their own

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= test
# The exact versions to install; /dev/null for the newest ones that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
# Where torch is looked for first: on Linux pip's own index has builds for CUDA, of several GB. Empty where there is a GPU,
# which takes pip's index; so does a machine that does not reach this one.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)
JOBS ?= 2
PYTEST_ARGS ?=
# A folder for the test results as JUnit XML; the suite's are always beside its run.json.
JUNIT ?=

# make runner: build lowbit-run, which runs plans without Python
.PHONY: runner setup suite test lint lab fuzz bench notebooks lock site links launch versions clean

setup: $(VENV)/.installed lowbit/kernels/_native.so

# The environment is made once and used again until pyproject.toml or the lock changes. The mark is their checksum, not
# their date, since a fresh clone has new dates.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@if [ -f $@ ] && cksum pyproject.toml $(CONSTRAINTS) | cmp -s - $@; then touch $@; else \
	  set -e; \
	  $(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}; say make PYTHON=..."'; \
	  test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install --quiet --upgrade pip; \
	  test -z "$(TORCH_INDEX)" || \
	  $(BIN)/python -m pip install --quiet --no-deps --constraint $(CONSTRAINTS) --index-url $(TORCH_INDEX) \
	    --retries 0 --timeout 5 torch torchvision torchaudio 2> /dev/null || \
	  echo "torch without CUDA cannot be had from $(TORCH_INDEX): pip's own index is asked, on Linux for several GB"; \
	  $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]'; \
	  cksum pyproject.toml $(CONSTRAINTS) > $@; \
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
	$(BIN)/mypy

lab: setup
	$(BIN)/jupyter lab notebooks

# What runs plans without Python: build/lowbit-run and build/liblowbit.a. CC names the compiler, also one for another processor.
runner:
	$(PYTHON) lowbit/kernels/build.py --runner build

# Damaged plan files, guided by coverage; needs clang. A finding is left in build/fuzz.
MINUTES := 30
fuzz: setup
	$(BIN)/python -m tools.fuzz --minutes $(MINUTES)

bench: setup
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[bench]'
	$(BIN)/lowbit bench training --json results/bench/training.json

notebooks: export OMP_NUM_THREADS = 1
notebooks: setup
	$(BIN)/python -m tools.tidy notebooks/*.ipynb

lock: setup
	@{ grep '^#' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable; } > constraints.new
	@mv constraints.new constraints.txt

# The site needs the extra [site] alone: it is built from the library's text and the notebooks' stored outputs.
SITE := build/site
SPHINX := $(SITE)/venv/bin/python -m sphinx --nitpicky --fail-on-warning --keep-going --quiet -c docs -d $(SITE)/doctrees

$(SITE)/.installed: pyproject.toml $(CONSTRAINTS)
	test -x $(SITE)/venv/bin/python || $(PYTHON) -m venv $(SITE)/venv
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["site"], sep="\n")' > $(SITE)/requirements.txt
	$(SITE)/venv/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --requirement $(SITE)/requirements.txt
	touch $@

site: $(SITE)/.installed
	$(SITE)/venv/bin/python docs/assemble.py $(SITE)/source
	$(SPHINX) -b html $(SITE)/source $(SITE)/html
	$(SITE)/venv/bin/python docs/check.py $(SITE)/html

links: $(SITE)/.installed
	$(SITE)/venv/bin/python docs/assemble.py $(SITE)/source
	$(SPHINX) -b linkcheck $(SITE)/source $(SITE)/links

launch: $(SITE)/.installed
	rm -rf build/launch
	$(SITE)/venv/bin/python docs/launch.py build/launch

versions:
	$(PYTHON) tools/versions.py

clean:
	rm -rf $(VENV) results/runs results/scratch build ./*.egg-info
