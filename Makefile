VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-slow contract lint types docs bench paper clean

demo: $(VENV)/.installed ## the main job on the embedded model, in a few minutes
	$(RUN) examples/demo.py

test: $(VENV)/.installed ## the default test suite
	$(RUN) -m pytest -q -m "not slow" --cov --cov-report=term

test-slow: $(VENV)/.installed
	$(RUN) -m pytest -q -m slow

contract: $(VENV)/.installed ## PEFT's own tests, fetched for the version that is installed, on ESFT's configs
	$(RUN) tools/fetch_peft_tests.py
	$(RUN) -m pytest -q --disable-warnings tests/contract

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/.installed
	$(RUN) -m mypy

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

bench: $(VENV)/.installed ## every benchmark; results go to benchmarks/results
	$(RUN) benchmarks/scoring.py
	$(RUN) benchmarks/layer_step.py
	$(RUN) benchmarks/model_step.py
	$(RUN) benchmarks/memory.py
	$(RUN) benchmarks/inference.py
	$(RUN) benchmarks/swap.py
	$(RUN) benchmarks/roofline.py
	$(RUN) benchmarks/merging.py
	$(RUN) benchmarks/compact.py
	$(RUN) benchmarks/scaling.py

paper: $(VENV)/.installed ## the paper's comparison on the embedded model: some hours, may be stopped and started again
	$(RUN) benchmarks/paper/run.py

clean:
	rm -rf $(VENV) site demo_output .peft_tests

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
