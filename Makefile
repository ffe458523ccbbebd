# The two commands: `make demo` and `make test`. Both make their own environment in .venv and need no model hub.
# On Linux without CUDA, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes of torch.

PYTHON ?= python3
BIN := .venv/bin
MODEL := artifacts/all-minilm-l6-v2
# A name of models.yaml, a hub id or a folder; where it can't be had, the demo shows its first stage alone.
RERANKER ?= ms-marco-minilm-l6

BENCH := $(BIN)/python -m benchmarks
BENCH_RERANKER ?= artifacts/bench-reranker
# Data to measure quality on: a folder, and a folder or CSV; without them, speed alone is measured.
BEIR ?=
STS ?=
# Those that need no environment of their own, one of a kind; without --engines, all that are there.
ENGINES ?= ours,sentence_transformers:fp32,optimum:int8
DATA := $(if $(BEIR),--beir $(BEIR)) $(if $(STS),--sts $(STS))

.PHONY: install demo bench bench-full bench-gpu test test-long test-gpu lint fix wheel clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,retrieve,prometheus,export,demo,bench,dev]'
	@touch $@

demo: install
	$(BIN)/python -m export --model all-minilm-l6-v2 --force
	@if $(BIN)/python -m export --model $(RERANKER) --variants int8 --out artifacts/demo-reranker --force; \
	then $(BIN)/python docs/demo.py $(MODEL) artifacts/demo-reranker; \
	else $(BIN)/python docs/demo.py $(MODEL); fi

bench: install
	@test -d $(MODEL) || $(BIN)/python -m export --model all-minilm-l6-v2
	$(BENCH) all $(MODEL) $(DATA) --engines $(ENGINES)
	$(BENCH) report benchmarks/results/quick.jsonl

# The reranker gets the quick profile from one start, and is left out where there is none.
bench-full: install
	@test -d $(MODEL) || $(BIN)/python -m export --model all-minilm-l6-v2
	$(BENCH) install
	@if test -d $(BENCH_RERANKER) || $(BIN)/python -m export --model $(RERANKER) --variants fp32,int8 --out $(BENCH_RERANKER); \
	then $(BENCH) all $(MODEL) $(DATA) --profile full --reranker $(BENCH_RERANKER) && \
	$(BENCH) all $(BENCH_RERANKER) --checkpoint $(RERANKER) $(DATA) --starts 1 --results benchmarks/results/full.jsonl; \
	else $(BENCH) all $(MODEL) $(DATA) --profile full; fi
	$(BENCH) report --readme README.md

# Models of these shapes with random weights, in an environment of yours with onnxruntime-gpu and torch with CUDA.
SHAPES ?= base large reranker-large
# Whose tokenizer they get: a model or a checkpoint's folder.
TOKENIZER ?= all-minilm-l6-v2

bench-gpu: export PYTHONPATH := .
bench-gpu:
	@for model in $(SHAPES:%=artifacts/random-%); do \
	test -d $$model-checkpoint || \
	$(PYTHON) docs/random_checkpoint.py $$model-checkpoint --shape $${model#*-} --tokenizer $(TOKENIZER) && \
	{ test -d $$model || $(PYTHON) -m export --model $$model-checkpoint --variants fp16 --out $$model; } && \
	$(PYTHON) -m benchmarks speed $$model --checkpoint $$model-checkpoint --device cuda --profile gpu \
	--engines ours:fp16,sentence_transformers:fp16,compiled || exit 1; done

test: install
	$(BIN)/python -m pytest -m 'not long and not gpu'

test-long: install
	$(BIN)/python -m pytest -m long

# In an environment of yours that has onnxruntime-gpu and torch with CUDA.
test-gpu:
	$(PYTHON) -m pytest -m gpu tests/test_gpu.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: install
	$(BIN)/python -m build --wheel

clean:
	rm -rf .venv artifacts build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
