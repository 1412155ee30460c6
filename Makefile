# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo native test lint clean

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

# liger_deploy/native/: the kernel library for ONNX Runtime, and liger-run. Needs cmake and a C++17 compiler.
NATIVE := liger_deploy/native/libliger_ort_ops.so
native: $(NATIVE)
$(NATIVE): CMakeLists.txt export/onnxruntime/ops.cpp $(wildcard export/kernels/*.h runtimes/include/liger/*.h \
		runtimes/src/* tests/native/*.cpp)
	[ -n "$$ONNXRUNTIME_ROOT" ] || [ -d build/onnxruntime ] || export/onnxruntime/fetch_headers.sh || true
	cmake -S . -B build/native
	cmake --build build/native
	cmake --install build/native --prefix .
	touch $@

# onnxruntime-node, for the test that runs a bundle in Node.
NODE := tests/node/node_modules/.package-lock.json
$(NODE): tests/node/package.json tests/node/package-lock.json
	cd tests/node && npm ci --ignore-scripts --no-audit --no-fund --silent

# One process a core, one thread each: lowering is bound by Python, not by arithmetic.
test: $(STAMP) $(NATIVE) $(NODE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build liger_deploy/native tests/node/node_modules demo bundle-*
