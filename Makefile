# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo native aarch64 kotlin test test-slow lint clean

# torch is named first and exactly: the tested version, and a CPU build where the index has one.
$(STAMP): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[finetune,eval,onnx,executorch,dev]'
	touch $@

# The whole way on a CPU, about five minutes: convert, tune, merge, export, prove, generate.
TINY := liger_deploy/assets/tiny
demo: $(STAMP)
	rm -rf demo && mkdir demo
	$(BIN)/python examples/stdlib_corpus.py --out demo/corpus
	$(BIN)/liger-deploy convert --model $(TINY)/base --out demo/converted
	$(BIN)/liger-deploy finetune --model demo/converted --data demo/corpus/train.jsonl --out demo/adapter \
		--max-tokens 600000 --batch 8 --accumulation 1 --rank 32 --alpha 32 --lr 3e-3 --schedule cosine \
		--targets q_proj,k_proj,v_proj,o_proj --eval-fraction 0
	$(BIN)/liger-deploy merge --model demo/converted --adapter demo/adapter --out demo/tuned
	$(BIN)/liger-deploy evaluate --model $(TINY)/base demo/converted demo/tuned $(TINY)/liger \
		--data demo/corpus/held_out.jsonl --max-tokens 60000 --out demo/quality.json
	$(BIN)/liger-deploy export --target onnx --model demo/tuned --out demo/bundle
	$(BIN)/liger-deploy verify --bundle demo/bundle --model demo/tuned
	$(BIN)/liger-deploy generate --bundle demo/bundle --temperature 0.7 --seed 1 --max-new-tokens 200 \
		--prompt "class Stack:"

# liger_deploy/native/: the kernel library for ONNX Runtime, the C++ library with a backend a runtime, and liger-run.
# Needs cmake and a C++17 compiler; ExecuTorch and torch are those of the virtual environment.
NATIVE := liger_deploy/native/libliger_ort_ops.so
SITE = $(abspath $(wildcard $(VENV)/lib/python*/site-packages))
SOURCES := CMakeLists.txt export/onnxruntime/ops.cpp $(wildcard export/kernels/*.h runtimes/include/*.h \
	runtimes/include/liger/*.h runtimes/src/* tests/native/*.cpp)
HEADERS := build/onnxruntime
native: $(NATIVE)
$(HEADERS):
	[ -n "$$ONNXRUNTIME_ROOT" ] || export/onnxruntime/fetch_headers.sh || true
$(NATIVE): $(SOURCES) | $(STAMP) $(HEADERS)
	cmake -S . -B build/native -DCMAKE_PREFIX_PATH="$(SITE)/executorch;$(SITE)/torch"
	cmake --build build/native --parallel 2
	cmake --install build/native --component python --prefix .
	touch $@

# The same for 64-bit ARM with ExecuTorch, for a test under emulation. Needs g++-aarch64-linux-gnu and qemu-user.
ARM := build/aarch64/liger-run
aarch64: $(ARM)
$(ARM): $(SOURCES) runtimes/aarch64.cmake | $(STAMP) $(HEADERS)
	rm -rf build/aarch64/site
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/aarch64/site --only-binary :all: \
		--platform manylinux_2_28_aarch64 executorch==$$($(BIN)/pip show executorch | sed -n 's/^Version: //p')
	cmake -S . -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=runtimes/aarch64.cmake \
		-DCMAKE_PREFIX_PATH=$(abspath build/aarch64/site/executorch)
	cmake --build build/aarch64 --parallel 2
	touch $@

# A Kotlin compiler with coroutines, for the test of the Android library on a desktop JVM. Needs a JDK.
KOTLIN := build/kotlin/.installed
kotlin: $(KOTLIN)
$(KOTLIN): | $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/kotlin kotlin-jupyter-kernel==0.19.0.944
	touch $@

# onnxruntime-node, for the test that runs a bundle in Node.
NODE := tests/node/node_modules/.package-lock.json
$(NODE): tests/node/package.json tests/node/package-lock.json
	cd tests/node && npm ci --ignore-scripts --no-audit --no-fund --silent

# One process a core, one thread each: lowering is bound by Python, not by arithmetic.
# What a machine has no tools for is skipped, and pytest says so.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup
TESTED := $(STAMP) $(NATIVE) $(NODE) $(if $(shell command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64),$(ARM)) \
	$(if $(shell command -v javac),$(KOTLIN))
test: $(TESTED)
	$(PYTEST) -m "not slow"

# Sanitizers, fuzzing, and the lowerings that take longest.
test-slow: $(TESTED)
	$(PYTEST) -m slow

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build liger_deploy/native tests/node/node_modules demo bundle-*
