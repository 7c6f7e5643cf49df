PYTHON ?= python3
BIN := .venv/bin
# A file of exact versions, such as constraints.txt: those that continuous integration runs with.
CONSTRAINTS ?=

.PHONY: setup demo test check format clean

setup: .venv/.installed

.venv/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=-c %) -e '.[vision,data,report,dev]'
	touch $@

demo: setup
	$(BIN)/abtrain train ab_outer --task digits-mlp --workers 4

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python docs/make_map.py

clean:
	rm -rf .venv build dist
