# make demo   install, then run the quick start in a kernel and print what it reached
# make test   install, then run every test
# make lab    install, then open the quick start in JupyterLab
# make bench  install, then measure speed and memory against the raw loop and other libraries (half an hour)
#
# For development: make notebooks [NB=nbs/00_core.ipynb], make readme, make install, make clean
# Another Python: make demo PYTHON=python3.12        Other tests: make test ARGS="-k sync"

PYTHON ?= python3
ARGS ?=
NB ?=
BIN := .venv/bin
INSTALLED := .venv/installed

# Idle threads of PyTorch sleep instead of spinning. With a browser or another training on the same cores that is twice as fast.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lab bench install notebooks readme clean

demo: $(INSTALLED)
	@$(BIN)/python scripts/demo.py

test: $(INSTALLED)
	@$(BIN)/python $(if $(ARGS),-m pytest $(ARGS),scripts/tests.py)

lab: $(INSTALLED)
	@PATH="$(CURDIR)/$(BIN):$$PATH" JUPYTER_PREFER_ENV_PATH=1 JUPYTER_PLATFORM_DIRS=1 \
	    $(BIN)/jupyter-lab $$(test "$$(id -u)" = 0 && echo --allow-root) nbs/20_quick_start.ipynb $(ARGS)

bench: $(INSTALLED)
	@$(BIN)/python -m benchmarks $(ARGS)

install: $(INSTALLED)

$(INSTALLED): settings.ini setup.py pyproject.toml constraints.txt
	@command -v "$(PYTHON)" > /dev/null || \
	    { echo "There is no $(PYTHON) here. Install Python 3.10 or later, or name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$$("$(PYTHON)" --version 2>&1) is too old: Python 3.10 or later is needed. Name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv || \
	    { echo "$(PYTHON) has no venv module. On Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing into .venv, once; this takes a minute or two."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

notebooks: $(INSTALLED)
	@$(BIN)/python scripts/notebooks.py $(NB)

readme: $(INSTALLED)
	@$(BIN)/python scripts/readme.py

clean:
	rm -rf demo runs nbs/runs build dist tests/shots .pytest_cache .ruff_cache
