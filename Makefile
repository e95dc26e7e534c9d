# make quickstart   set up .venv, then run the five stages on the bundled model and print the table before and after
# make test         set up .venv, then run the tests (make test-quick: without those that start vLLM or train; make
#                   test-all: with whole recipes, engines on several workers, and more kills)
.PHONY: setup quickstart test test-quick test-all
PYTHON ?= python3
REQUIREMENTS := $(shell if command -v nvidia-smi >/dev/null 2>&1; then echo requirements.txt; else echo requirements-cpu.txt; fi)

setup: .venv/ready

.venv/ready: $(REQUIREMENTS)
	$(PYTHON) -m venv --clear .venv
	@# torch +cpu is on PyTorch's own index. Where pip does not find it, uv knows the address of that index.
	.venv/bin/pip install --quiet -r $(REQUIREMENTS) || { \
	  [ $(REQUIREMENTS) = requirements-cpu.txt ] && echo "pip alone cannot; trying with PyTorch's CPU index" >&2 && \
	  .venv/bin/pip install --quiet uv && \
	  .venv/bin/uv pip install --quiet --python .venv/bin/python --torch-backend cpu -r $(REQUIREMENTS); } || { \
	  echo "make setup: $(REQUIREMENTS) cannot be installed; check that $(PYTHON) is 3.11 to 3.13, and the network, or set PIP_EXTRA_INDEX_URL (docs/installation.md)" >&2; \
	  exit 2; }
	@# On the CPU these come along built for CUDA's torch and break `import transformers`; nothing here needs them.
	if [ $(REQUIREMENTS) = requirements-cpu.txt ]; then .venv/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec; fi
	touch .venv/ready

quickstart: setup
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash recipes/quickstart.sh

.venv/tests: .venv/ready requirements-test.txt
	.venv/bin/pip install --quiet -r requirements-test.txt
	touch .venv/tests

# two at a time, a core each; tests that share something costly to make are one group
PYTEST := OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind .venv/bin/python -m pytest -q -n 2 --dist loadgroup --durations=15

test: .venv/tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check --quiet .
	$(PYTEST) -m "not long"

test-all: test
	$(PYTEST) -m long

test-quick: .venv/tests
	$(PYTEST) -m "not slow"
