# make study · test · test-slow · lab · verify · docs: each makes its own environment in .venv first
PROFILE ?= mini
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
export PYTHONUTF8 = 1
export OMP_WAIT_POLICY ?= passive
export JUPYTER_PLATFORM_DIRS = 1

.PHONY: help study test test-slow lab verify docs lock readme
help:
	@echo 'make study [PROFILE=mini] [DATA=folder]   run the study and write its report'
	@echo 'make test                                 everything that is checked on every change'
	@echo 'make test-slow                            what takes longer'
	@echo 'make lab [LAB=--no-browser]               the notebooks in JupyterLab'
	@echo 'make verify [PROFILE=mini]                compare a fresh run with the committed report'
	@echo 'make docs                                 the documentation, runs/docs/html/index.html'
	@echo 'make lock, make readme                    derive requirements.lock and README.md anew'

# torch comes first and through pip, so that a wheel chosen for this machine is kept; the rest is pinned by the lock
$(READY): requirements.lock settings.ini setup.py
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
	  'Python 3.11, 3.12 or 3.13 is needed, this is %d.%d. Name another one: make PYTHON=python3.11' % v)"
	@echo 'Installing into $(VENV): several minutes, once.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --quiet uv \
	  && $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock \
	  || $(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

study: $(READY)
	@$(BIN)/gac run --profile $(PROFILE) $(if $(DATA),--data "$(DATA)")

# the notebooks are the tests; two at a time with one thread each use two cores best
test: $(READY)
	$(BIN)/ruff check nbs tests docs
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing
	$(BIN)/python -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow' tests

# the last result is kept in reports/test-slow.txt
test-slow: $(READY)
	@mkdir -p runs; $(BIN)/python -m pytest -q -rs -m slow --durations=0 --disable-warnings tests > runs/test-slow.txt; status=$$?; cat runs/test-slow.txt; \
	  [ $$status -eq 0 ] && cp runs/test-slow.txt reports/test-slow.txt; exit $$status

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir=nbs $(LAB)

verify: $(READY)
	@$(BIN)/gac verify --profile $(PROFILE)

docs: $(READY)
	$(BIN)/python docs/collect.py runs/docs/source
	$(BIN)/python -m sphinx -W --keep-going -q -E -b html -c docs runs/docs/source runs/docs/html
	@echo 'Open runs/docs/html/index.html'

# torch brings the accelerator runtime of its platform, so the lock leaves that open
lock: $(READY)
	$(BIN)/python -c "from gac.core.environment import requirements; print(*requirements(), sep=chr(10))" > $(VENV)/requirements.in
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-header --no-annotate \
	  $(VENV)/requirements.in | grep -v -E '^(nvidia-|cuda-|triton==)' > $(VENV)/requirements.lock
	mv $(VENV)/requirements.lock requirements.lock

readme: $(READY)
	$(BIN)/python -c "import sys; from gac.runner.page import render_readme; sys.stdout.write(render_readme())" > .README.md && mv .README.md README.md
