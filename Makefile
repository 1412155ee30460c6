# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint clean

# torch is named first and exactly: the tested version, and a CPU build where the index has one.
$(STAMP): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[finetune,onnx,dev]'
	touch $@

demo: $(STAMP)
	rm -rf demo && mkdir demo
	$(BIN)/liger-deploy convert --model liger_deploy/assets/tiny/base --out demo/converted
	$(BIN)/liger-deploy export --target onnx --out demo/bundle
	$(BIN)/liger-deploy verify --bundle demo/bundle
	$(BIN)/liger-deploy generate --bundle demo/bundle --temperature 0.6 --seed 3 --max-new-tokens 200 \
		--prompt "class Stack:"

# One process a core, one thread each: lowering is bound by Python, not by arithmetic.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo bundle-*
