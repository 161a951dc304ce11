# `make demo` and `make test` set up .venv by themselves. PYTHON=/path/to/python overrules the search.
BIN := .venv/bin
SOURCES := jaxdet pallas_kernels tests benchmarks
export PIP_DISABLE_PIP_VERSION_CHECK := 1

LIBTPU := .venv/libtpu
CUDA := .venv/cuda
OTHER_JAX := .venv/other-jax
OTHER_JAX_TESTS := golden engine sm90_attention sm90_backward sm90_matmul sm90_norm_product tpu_matmul tpu_rms_norm

.PHONY: help setup demo test test-slow test-other-jax check bench docs lock clean
help:
	@echo "make demo       answers a few prompts with SmolLM2-135M and proves that the bits do not move"
	@echo "make test       lint, types and tests (about 15 minutes on two cores)"
	@echo "make test-slow  the longer tests"
	@echo "make test-other-jax  some of the tests with the newer jax that is allowed, too"
	@echo "make bench      jaxdet beside plain jitted JAX"
	@echo "make docs       the documentation, in site/"

setup: .venv/.ready
.venv/.ready: requirements.lock pyproject.toml scripts/find_python.sh
	@set -e; python="$(PYTHON)"; [ -n "$$python" ] || python=$$(scripts/find_python.sh); \
	echo "Setting up .venv with $$($$python --version)"; $$python -m venv .venv
	@echo "Installing the locked packages"
	@$(BIN)/python -m pip install --progress-bar on --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

define install-apart
@$(BIN)/python -m pip install -q --no-deps --require-hashes --upgrade --target $(@D) -r $<
@touch $@
endef

# Out of Python's sight: JAX would look for a TPU, and complain, at every start on a machine that has none.
$(LIBTPU)/.ready: requirements-tpu.lock .venv/.ready
	$(install-apart)

# As far out of its sight: a plugin without a GPU.
$(CUDA)/.ready: requirements-cuda.lock .venv/.ready
	$(install-apart)

# Seen in the place of the locked one by what has it in its PYTHONPATH.
$(OTHER_JAX)/.ready: requirements-other-jax.lock .venv/.ready
	$(install-apart)

demo: setup
	@$(BIN)/jaxdet demo

check: setup
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

test: check $(LIBTPU)/.ready
	$(BIN)/pytest -n 2 -m "not slow and not gpu"

test-slow: setup $(LIBTPU)/.ready $(CUDA)/.ready
	$(BIN)/pytest -n 2 --dist loadfile -m "slow and not gpu"

test-other-jax: setup $(OTHER_JAX)/.ready
	PYTHONPATH=$(CURDIR)/$(OTHER_JAX) $(BIN)/pytest -n 2 -m "not slow and not gpu" $(addprefix tests/test_,$(addsuffix .py,$(OTHER_JAX_TESTS)))

bench: setup
	$(BIN)/python benchmarks/generate.py

docs: setup
	$(BIN)/mkdocs build --strict

lock:
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.12 --generate-hashes \
		--constraint constraints.txt --no-emit-index-url --no-emit-find-links --no-annotate \
		--custom-compile-command "make lock" --allow-unsafe --quiet -o requirements.lock
	uv pip compile --group tpu-aot --universal --python-version 3.12 --generate-hashes --no-emit-index-url \
		--no-emit-find-links --no-annotate --custom-compile-command "make lock" --quiet -o requirements-tpu.lock
	uv pip compile --group gpu-aot --universal --python-version 3.12 --generate-hashes --no-emit-index-url \
		--no-emit-find-links --no-annotate --custom-compile-command "make lock" --quiet -o requirements-cuda.lock
	uv pip compile --group other-jax --no-deps --universal --python-version 3.12 --generate-hashes --no-emit-index-url \
		--no-emit-find-links --no-annotate --custom-compile-command "make lock" --quiet -o requirements-other-jax.lock

clean:
	rm -rf .venv dist build out site .pytest_cache .ruff_cache .hypothesis
