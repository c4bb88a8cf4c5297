# The front door: each target is a line or two over `effnb`.
VENV := .venv
BIN := $(VENV)/bin
export MPLBACKEND := agg

.PHONY: book test lint check unit smoke site site-test study bench oldest lab clean

book: $(VENV)/.ready  ## execute every chapter, judge all claims, build the site into _build/html
	$(BIN)/effnb book

test: lint check unit smoke site-test  ## lint, committed results, unit and property tests, chapters at smoke scale, the site in a browser

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check: $(VENV)/.ready
	$(BIN)/effnb stale --ignore python
	$(BIN)/effnb claims

unit: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not site"

smoke: $(VENV)/.ready
	$(BIN)/effnb smoke

site: $(VENV)/.ready  ## build the site from the committed outputs only
	$(BIN)/effnb site

site-test: site
	$(BIN)/python -m pytest -m site tests/site

study: $(VENV)/.ready  ## run the study of CHAPTER, up to an hour, and commit its result to book/results/study
	$(BIN)/effnb run $(CHAPTER) --profile study --jobs 1 --update

bench: $(VENV)/.ready  ## side-by-side timings, one thread, nothing else running
	$(BIN)/effnb bench

# `dependencies` of pyproject.toml with the lower end of each range.
LOWEST = $(shell sed -n 's/^dependencies = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",' | sed 's/>=/==/g')

oldest:  ## the methods' tests on the oldest torch, NumPy and SciPy that pyproject.toml admits
	python3 -m venv .oldest
	.oldest/bin/python -m pip install --quiet $(LOWEST) pytest pytest-xdist hypothesis
	OMP_NUM_THREADS=1 .oldest/bin/python -m pytest -n 2 -m "not slow and not site" \
	  $$(grep -L "effnb.lab" tests/test_*.py) $$(find effnb -mindepth 1 -maxdepth 1 ! -name lab ! -name "__*")

lab: $(VENV)/.ready  ## open the chapters in JupyterLab
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf _build

$(VENV)/.ready: requirements.lock pyproject.toml
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
