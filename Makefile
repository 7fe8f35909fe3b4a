# demo and test set up what they need (a virtual environment, the package) and are safe to repeat.
PYTHON ?= python3
VENV ?= .venv
HASH := $(shell cksum setup.py | cut -d' ' -f1)
INSTALLED := $(VENV)/.hfkd-$(HASH)
RUN := $(CURDIR)/$(VENV)/bin
ifneq ($(filter /%,$(VENV)),)
RUN := $(VENV)/bin
endif

.PHONY: demo test bench docs lint clean

demo: $(INSTALLED)  ## teach a small net on scikit-learn's digits: 2 to 4 minutes
	$(RUN)/python scripts/demo.py

test: $(INSTALLED)  ## the whole suite
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 $(PYTEST_FLAGS)

bench: $(INSTALLED)  ## speed against plain training, torchdistill and TextBrewer: under 30 minutes on 2 cores
	$(RUN)/python -m pip install --quiet --editable ".[bench]"
	$(RUN)/python benchmarks/run.py --output outputs/bench.json

docs: $(INSTALLED)  ## the site, into site/: every warning is an error
	NO_MKDOCS_2_WARNING=1 $(RUN)/python -m mkdocs build --strict

lint:  ## what the workflow checks; needs ruff
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

$(INSTALLED): setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "hfkd needs Python 3.10 to 3.13, and $(PYTHON) is another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV)
