# All packages are installed into .venv. Five purposes have environments of their
# own: .venv-plan, .venv-parity, .venv-peers, .venv-lowest and .venv-newest.
PYTHON ?= python3
BIN := .venv/bin
PLAN := .venv-plan/bin
PARITY := .venv-parity/bin
PEERS := .venv-peers/bin
LOWEST := .venv-lowest/bin
NEWEST := .venv-newest/bin

# If the machine has an NVIDIA GPU, the training program uses it.
CARD := $(shell nvidia-smi -L 2>/dev/null | grep '^GPU')
TRAIN := .venv/$(if $(CARD),train-cuda,train)

# A step on the CPU allocates and frees its scratch memory each time. With huge
# pages it takes a tenth less time.
train train-layerwise: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
# Tests and plans run on the CPU, also on a machine with a GPU.
test slow optimized cpu plan card parity peers lowest newest docs release: \
  export JAX_PLATFORMS := cpu

.PHONY: train train-layerwise test slow optimized cpu plan card parity peers \
  lowest newest lint docs release clean

train: $(TRAIN)
	$(BIN)/python -m train.pretrain configs/quickstart.py $(ARGS)

# The same model. Each layer is updated as soon as its gradients are computed.
train-layerwise: $(TRAIN)
	$(BIN)/python -m train.pretrain configs/quickstart.py --update Layerwise \
	  --optimizer Galore8bit --optimizer.rank 64 --optimizer.gap 50 \
	  --optimizer.subspace power $(ARGS)

test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

slow: .venv/test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'slow and not optimized' \
	  tests $(ARGS)

# Slow tests that compile with all optimizations, as users do. The other tests
# compile with fewer optimizations, which takes less time.
optimized: .venv/test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m optimized tests $(ARGS)

# Runs the library's tests with the rounding of another x86 CPU. `CORE` selects the
# kernels of OpenBLAS, which NumPy's products and XLA's decompositions use. `ISA`
# limits the instructions that XLA emits.
CORE ?= Haswell
ISA ?= AVX2
cpu: export OPENBLAS_CORETYPE := $(CORE)
cpu: export XLA_FLAGS := --xla_cpu_max_isa=$(ISA)
cpu: .venv/test
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/galore_optax $(ARGS)

# Plans the memory of a step on an absent GPU:
# make plan ARGS='configs/llama_7b.py --device rtx4090 --batch-size 2'
plan: .venv-plan/plan
	$(PLAN)/python -m train.plan $(ARGS)

# Compiles for an RTX 4090, which takes minutes.
card: .venv-plan/plan
	$(PLAN)/python -m pytest -m card tests $(ARGS)

parity: .venv-parity/parity
	$(PARITY)/python -m pytest -m parity tests/parity $(ARGS)

# Runs the library inside the trainers and solvers of other projects. Without slow
# tests, programs are compiled with few optimizations, which takes a third of the
# time.
peers: .venv-peers/peers
	$(PEERS)/python -m pytest -n 2 --dist loadfile -m 'peers and not slow' \
	  tests/peers $(ARGS)

# Tests the core with the lowest versions that pyproject.toml allows. The other
# environments have the newest versions at the time of their installation.
lowest: .venv-lowest/lowest
	$(LOWEST)/python -m pytest tests/galore_optax/test_chain.py \
	  tests/galore_optax/test_galore.py $(ARGS)

# Installs the newest versions, and runs the tests of the library and the models
# and all doctests: make newest PYTHON=python3.13
newest:
	test -x $(NEWEST)/python || $(PYTHON) -m venv .venv-newest
	$(NEWEST)/python -m pip install -q --upgrade --upgrade-strategy eager \
	  -e '.[test]'
	$(NEWEST)/python -m pytest tests/galore_optax tests/models galore_optax \
	  models train configs/studies $(ARGS)

lint: .venv/test .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Builds a site from the READMEs and the docstrings, in build/docs. A warning, such
# as a broken link or a documented parameter that does not exist, is an error.
docs: export NO_MKDOCS_2_WARNING := 1
docs: .venv/docs
	$(BIN)/mkdocs build --strict --config-file tests/docs/mkdocs.yml $(ARGS)

# Builds the sdist and the wheel, in build/release. Then installs the wheel into a
# new environment and runs the first lines of README.md there.
release: .venv/release
	rm -rf build/release
	$(BIN)/python -m build --outdir build/release
	$(BIN)/twine check --strict build/release/galore_optax-*
	$(PYTHON) -m venv build/release/venv
	build/release/venv/bin/pip install -q build/release/*.whl
	cd build/release && venv/bin/python -I ../../tests/release.py

.venv/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[$*]'
	touch $@

# On a machine without a GPU, JAX prints an error at every start here.
.venv-plan/plan: pyproject.toml
	test -x $(PLAN)/python || $(PYTHON) -m venv .venv-plan
	$(PLAN)/pip install -q -e '.[plan,test]'
	touch $@

# Install the CPU build of torch first: plain `torch` is a CUDA build.
.venv-parity/parity: pyproject.toml
	test -x $(PARITY)/python || $(PYTHON) -m venv .venv-parity
	$(PARITY)/pip install -q torch==2.13.0
	$(PARITY)/pip install -q -e '.[parity,test]'
	touch $@

.venv-peers/peers: pyproject.toml
	test -x $(PEERS)/python || $(PYTHON) -m venv .venv-peers
	$(PEERS)/pip install -q -e '.[peers]'
	touch $@

.venv-lowest/lowest: pyproject.toml tests/lowest.py
	test -x $(LOWEST)/python || $(PYTHON) -m venv .venv-lowest
	$(LOWEST)/pip install -q $$($(LOWEST)/python tests/lowest.py chex pytest)
	$(LOWEST)/pip install -q -e .
	touch $@

clean:
	rm -rf .venv .venv-plan .venv-parity .venv-peers .venv-lowest .venv-newest \
	  runs build *.egg-info .pytest_cache .ruff_cache
