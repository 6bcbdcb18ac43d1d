# Everything a fresh machine needs is installed into .venv (and .venv-parity).
PYTHON ?= python3
BIN := .venv/bin
PARITY := .venv-parity/bin

# Tests run on the CPU, whatever the machine has.
test slow card parity: export JAX_PLATFORMS := cpu

.PHONY: train train-layerwise test slow card parity lint clean

train: .venv/train
	$(BIN)/python -m train.pretrain configs/quickstart.py $(ARGS)

# The same model, each weight updated as its gradient appears.
train-layerwise: .venv/train
	$(BIN)/python -m train.pretrain configs/quickstart.py --update Layerwise \
	  --optimizer Galore8bit --optimizer.rank 64 --optimizer.gap 50 $(ARGS)

test: .venv/test
	$(BIN)/python -m pytest -n 2 $(ARGS)

slow: .venv/test
	$(BIN)/python -m pytest -n 2 -m slow tests $(ARGS)

# Compiles for an RTX 4090: minutes, and the extra `plan`.
card: .venv/test .venv/plan
	$(BIN)/python -m pytest -m card tests $(ARGS)

parity: .venv-parity/parity
	$(PARITY)/python -m pytest -m parity tests/parity $(ARGS)

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.venv/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[$*]'
	touch $@

# The CPU build of torch first: a bare `torch` would pull in CUDA's.
.venv-parity/parity: pyproject.toml
	test -x $(PARITY)/python || $(PYTHON) -m venv .venv-parity
	$(PARITY)/pip install -q torch==2.13.0
	$(PARITY)/pip install -q -e '.[parity,test]'
	touch $@

clean:
	rm -rf .venv .venv-parity runs build *.egg-info .pytest_cache .ruff_cache
