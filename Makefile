# `make` lists what there is. Everything runs in .venv, which is made when it is missing.
PYTHON ?= python3
BIN := .venv/bin
BUILT := _build/html
MAIN := _build/main
CACHE := JUPYTERCACHE=_build/.jupyter_cache $(BIN)/jcache

# Programs that a notebook starts (`!python ...`) come from the environment too.
INSIDE := PATH="$(CURDIR)/$(BIN):$$PATH"

# Idle threads of GNU OpenMP, which torch uses, sleep soon: beside another process they would
# otherwise keep a core from the thread that they wait for, and training takes many times as long.
ifndef OMP_WAIT_POLICY
export GOMP_SPINCOUNT ?= 1000
endif

# Set in a shell, this variable would take every figure out of the notebooks.
unexport MPLBACKEND

.PHONY: help book test drills pair lint clean

help: ## list the targets
	@sed -n -E 's/^([a-z]+):[^#]*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

book: .venv/installed ## simulate, train and score a small model, then run and build the book
	@rm -rf $(MAIN)
	$(BIN)/python -m mtm simulate $(MAIN)/sessions --sessions 3 --trials 200 --seed 0
	OMP_NUM_THREADS=1 $(BIN)/python -m mtm train $(MAIN)/sessions/*.npz --out $(MAIN)/model --depth 1 --epochs 20
	@set -- $(MAIN)/sessions/*.npz && set -x && \
	OMP_NUM_THREADS=1 $(BIN)/python -m mtm evaluate $(MAIN)/model "$$1" --json $(MAIN)/scores.json
	@# the cache knows the notebooks' cells, not the package they import: run them all again,
	@# side by side; the build takes their outputs from the cache
	@rm -rf $(BUILT) _build/.doctrees _build/.jupyter_cache _build/jupyter_execute
	@echo "running the notebooks, a line each"
	@echo y | $(CACHE) notebook add -r myst_nb_md book/[0-9]*.md > _build/notebooks.log
	@$(INSIDE) OMP_NUM_THREADS=1 $(CACHE) project execute -e local-parallel -t 1800 2>&1 | \
	  tee -a _build/notebooks.log | grep --line-buffered -o 'Execution .*'
	@$(INSIDE) $(BIN)/jupyter-book build book -q -W --keep-going
	@for page in $$(sed -n -E 's/^[ -]*(file|root): *//p' _toc.yml); do \
	  test -f $(BUILT)/$$page.html || { echo "not built: $$page.html"; exit 1; }; \
	done
	@echo "the book: $(BUILT)/index.html"

test: .venv/installed lint ## check style and twins, run the tests, run every notebook
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2
	$(INSIDE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbmake --nbmake-timeout=600 -n 2 book

drills: .venv/installed ## kill processes many times over; some minutes
	OMP_NUM_THREADS=1 $(BIN)/python tests/drills/faults.py --json benchmarks/results/faults.json

pair: .venv/installed ## write the .ipynb twins of the book's pages
	$(BIN)/python book/_pair.py

lint: .venv/installed ## check style, types, spelling, and that the twins are in step with the pages
	$(BIN)/python book/_pair.py --check
	@# errors, docstrings, import order; in the pages' cells, too
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@# the types of the package, strictly
	$(BIN)/mypy
	@# words that are known to be misspelt
	$(BIN)/codespell *.md book/*.md mtm

clean: ## remove what was built; the environment stays
	rm -rf _build build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./.venv/*" -prune -exec rm -rf {} +

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "mtm needs Python 3.11 or newer, and $(PYTHON) is not; try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "installing requirements.txt into .venv; the first time this takes several minutes"
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@# the benchmark's scorer, for the tests: it pins exact versions, others than ours
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps ibl-bwb-eval==0.1.0
	@touch $@
