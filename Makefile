# Every target sets up what it needs, in a virtual environment of its own: .venv, or .venv-cpu for torch's CPU build.
PYTHON ?= python3
RUN := .venv/bin/python
# Threads that wait by spinning make a step several times slower where another process wants the same core. The benchmark
# wants the cores for itself, and threads as torch has them.
demo test coverage test-cpu fuzz soak: export OMP_WAIT_POLICY := PASSIVE
PIP := -m pip install --quiet --disable-pip-version-check

# Tests run on two cores or more, those of a file in one process. PYTEST="-n 0" runs them one by one.
WORKERS := -n auto --maxprocesses 4 --dist loadfile

.PHONY: help demo test coverage test-cpu fuzz lint bench compiled soak large tables figure1 install-check clean

help:  ## List the targets
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed -E 's/:.*##/\t/'

demo: .venv/.demo  ## Train a RetinaNet with aLRP Loss on scenes of handwritten digits; pictures and figures in demo/
	$(RUN) -m examples.digits --out demo

test: .venv/.test .venv/.demo  ## Run the test suite (Triton's interpreter and compiler; a GPU if there is one)
	$(RUN) -m pytest $(WORKERS) $(PYTEST)

coverage: .venv/.test .venv/.demo  ## The same, slower, and which lines of the package it runs
	$(RUN) -m pytest --cov --cov-report=term $(WORKERS) $(PYTEST)

# What Triton's interpreter is slow at, it does in full with one torch only; here the cases that have caught most.
SAMPLE := not triton or random or hard_ties or nan_negative or opcheck or no_positives or compiled or test_api

test-cpu: .venv-cpu/.test  ## Run the test suite with torch 2.13.0, CPU build, and the triton beside it
	.venv-cpu/bin/python -m pytest $(WORKERS) -k "$(SAMPLE)" $(PYTEST)

fuzz: .venv/.test  ## 20,000 random hostile cases against the oracle, others each time (some minutes)
	$(RUN) -m pytest tests/test_fuzz.py --hypothesis-profile=fuzz --hypothesis-show-statistics $(PYTEST)

lint: .venv/.test .venv/.demo .venv/.bench .venv/.lint  ## Check style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

bench: .venv/.bench  ## Check, then time the loss beside its baselines; writes bench/results/cpu.json, or that of a GPU
	$(RUN) -m bench $(BENCH)

compiled: .venv/.bench  ## Compile all kernels for GPUs that are not there, and read registers, spills, instructions
	$(RUN) -m bench compiled

soak: .venv/.bench  ## 50,000 steps on changing sizes, memory watched (some minutes); writes bench/results/soak.json
	$(RUN) -m bench.endurance soak

large: .venv/.bench  ## A step on 3e8 and on 2.2e9 logits, checked by hand (minutes, 14 GiB); writes bench/results/large.json
	$(RUN) -m bench.endurance large

tables: .venv/.bench  ## Make the tables of README.md and docs/, and the plots, from bench/results/ again
	$(RUN) -m bench report

figure1: .venv/.demo  ## Reproduce Figure 1 of the paper
	$(RUN) -m examples.figure1

install-check:  ## Build sdist and wheel, install the wheel without triton beside it, use it
	rm -rf .venv-install dist && $(PYTHON) -m venv .venv-install
	.venv-install/bin/python $(PIP) build torch==2.13.0
	.venv-install/bin/python -m build --outdir dist . > /dev/null
	.venv-install/bin/python $(PIP) dist/*.whl
	cd .venv-install && bin/python -W error -c "import torch, alrp_triton as a; \
	  print(a.__version__, a.alrp_loss(torch.zeros(4), torch.tensor([1, 0, 0, -1]), torch.ones(1)).classification)"

clean:  ## Remove all that was made here
	rm -rf .venv .venv-cpu .venv-install dist build demo .coverage .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.%: pyproject.toml | .venv/bin/python
	$(RUN) $(PIP) --editable ".[$*]"
	@touch $@

.venv-cpu/.test: pyproject.toml
	$(PYTHON) -m venv .venv-cpu
	.venv-cpu/bin/python $(PIP) torch==2.13.0
	.venv-cpu/bin/python $(PIP) --editable ".[test]"
	@touch $@
