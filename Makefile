PYTHON ?= python3
BIN := .venv/bin
# A file of exact versions, such as constraints.txt: those that continuous integration runs with.
CONSTRAINTS ?=

# One thread a process: tests run several at a time, on small tensors.
export OMP_NUM_THREADS ?= 1
# Tests start many processes, each of which would otherwise compile every module again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo quick test check docs dist format clean

setup: .venv/.installed

.venv/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=-c %) -e '.[vision,data,report,dev,docs]'
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

# Two files at a time, in their order: pytest-xdist would begin with those of the most tests, and end with one long test.
# If a process of pytest dies, the run fails at once: pytest-xdist can hang when it replaces one.
TWO_AT_A_TIME := -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# Tests of one process or of kept ranks: what a change should pass at every step.
quick: setup
	$(BIN)/python -m pytest $(TWO_AT_A_TIME) tests/unit

# The rest also runs two files at a time, except tests that need the machine for themselves (marked `alone`).
test: quick
	$(BIN)/python -m pytest $(TWO_AT_A_TIME) -m "not alone" tests/multiprocess tests/faults
	$(BIN)/python -m pytest -m alone tests/multiprocess tests/faults tests/lab

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in build/site. A warning, such as a link to a page that does not exist, is an error.
docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The wheel and the sdist, in dist/. Both are checked, and the wheel runs in a new environment.
dist: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation .
	$(BIN)/python .ci/check_dist.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python docs/make_map.py
	$(BIN)/python docs/make_pages.py

clean:
	rm -rf .venv build dist
