# The front door: each target is a line or two over `effnb`.
VENV := .venv
BIN := $(VENV)/bin
export MPLBACKEND := agg

.PHONY: book test lint check unit smoke site site-test bench lab clean

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

bench: $(VENV)/.ready  ## side-by-side timings, one thread, nothing else running
	$(BIN)/effnb bench

lab: $(VENV)/.ready  ## open the chapters in JupyterLab
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf _build

$(VENV)/.ready: requirements.lock pyproject.toml
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
