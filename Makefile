# Every target sets up what it needs, in a virtual environment of its own: .venv, or .venv-cpu for torch's CPU build,
# .venv-oldest and .venv-2.11 for other versions of Python, torch and NumPy.
PYTHON ?= python3
RUN := .venv/bin/python
# Threads that wait by spinning make a step several times slower where another process wants the same core. The benchmark
# wants the cores for itself, and threads as torch has them.
demo trees test coverage test-cpu test-oldest test-2.11 fuzz soak compare: export OMP_WAIT_POLICY := PASSIVE
# Python keeps what it compiled of the modules that it imports, whatever the caller's environment says of it: to compile
# torch again in each process that a test starts takes ten seconds. So pip need not compile all that nobody imports.
unexport PYTHONDONTWRITEBYTECODE
PIP := -m pip install --no-compile --quiet --disable-pip-version-check

# Tests run on two cores or more, those of a file in one process, in the order of the files: the long ones come early.
# PYTEST="-n 0" runs them one by one.
WORKERS := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help demo trees test coverage test-cpu test-oldest test-2.11 fuzz lint docs compare bench gpu compiled soak large tables figure1 install-check clean

help:  ## List the targets
	@grep -E '^[a-z0-9.-]+:.*##' Makefile | sed -E 's/:.*##/\t/'

demo: .venv/.demo  ## Write scenes of handwritten digits in COCO format, train a RetinaNet with aLRP Loss; see demo/
	rm -rf demo
	$(RUN) -m examples.digits demo/data
	$(RUN) -m alrp_triton.trainer fit --config examples/digits.yaml --data.root demo/data --out demo --evaluate_first --goal 0.7

test: .venv/.dev .venv/.detectors  ## Run the test suite (Triton's interpreter and compiler; a GPU if there is one)
	$(RUN) -m pytest $(WORKERS) $(PYTEST)

coverage: .venv/.dev .venv/.detectors  ## The same, slower, and which lines of the package it runs
	$(RUN) -m pytest --cov --cov-report=term $(WORKERS) $(PYTEST)

# Triton's interpreter is slow, and does all of it with one torch only; with others the cases that have caught most.
SAMPLE := (not triton or random or hard_ties or nan_negative or opcheck or no_positives or compiled or test_api) and not gloo and not many_runs

# What another version may do to: the losses, torch.compile, training, detectors, metrics.
OF_VERSIONS := compiler/test_torch_compile bench/test_gpu_clock bench/test_gpu_command bench/test_gpu_oracles \
  bench/test_gpu_results bench/test_gpu_times core/test_binned core/test_comparison_matrix core/test_operators \
  integrations/test_masks integrations/test_torchvision integrations/test_torchvision_inputs \
  integrations/test_torchvision_models losses/test_alrp losses/test_ap_and_rank_sort losses/test_balance \
  losses/test_boxes losses/test_errors losses/test_groups losses/test_losses losses/test_reference losses/test_targets \
  losses/test_training metrics/test_lrp project/test_api project/test_readme project/test_suite
OTHERWISE := $(WORKERS) -k "$(SAMPLE)" $(OF_VERSIONS:%=tests/%.py) $(PYTEST)

test-cpu: .venv-cpu/.test  ## Test with torch 2.13.0, CPU build, and the triton beside it
	.venv-cpu/bin/python -m pytest $(OTHERWISE)

test-oldest: .venv-oldest/.test  ## Test with the oldest versions: Python 3.10, torch 2.4, NumPy 1.26
	.venv-oldest/bin/python -m pytest $(OTHERWISE)

test-2.11: .venv-2.11/.test  ## Test with Python 3.12, torch 2.11, triton 3.6
	.venv-2.11/bin/python -m pytest $(OTHERWISE)

fuzz: .venv/.dev  ## 20,000 random hostile cases against the oracle, others each time (some minutes)
	$(RUN) -m pytest tests/losses/test_fuzz.py --hypothesis-profile=fuzz --hypothesis-show-statistics $(PYTEST)

lint: .venv/.dev  ## Check style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

docs: .venv/.docs  ## Build the documentation's site, in site/
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

trees: .venv/.demo  ## The same on real photographs, tree crowns from the air, which pip fetches (a quarter of an hour); see trees/
	rm -rf trees
	$(RUN) -m examples.trees trees/data
	$(RUN) -m alrp_triton.trainer fit --config examples/trees.yaml --data.root trees/data --out trees
	$(RUN) -m alrp_triton.trainer validate --run trees --data.val test

compare: .venv/.demo .venv/.bench  ## Train with all losses, seeds and pictures (hours, goes on where it was); see docs/comparison.md
	$(RUN) -m bench train

bench: .venv/.bench  ## Check, then time the loss beside its baselines on a CPU; writes bench/results/cpu.json
	$(RUN) -m bench $(BENCH)

gpu: .venv/.bench .venv/.demo  ## All that a GPU can tell, in eight minutes (GPU=--rehearse: without one); adds to bench/results
	$(RUN) -m bench gpu $(GPU)

compiled: .venv/.bench  ## Compile all kernels for GPUs that are not there, and read registers, spills, instructions
	$(RUN) -m bench compiled

soak: .venv/.bench  ## 50,000 steps on changing sizes, memory watched (some minutes); writes bench/results/soak.json
	$(RUN) -m bench soak

large: .venv/.bench  ## A step on 3e8 and on 2.2e9 logits, checked by hand (minutes, 14 GiB); writes bench/results/large.json
	$(RUN) -m bench large

tables: .venv/.bench  ## Fill the tables of README.md and docs/, and the plots, from bench/results/ again
	$(RUN) -m bench report

figure1: .venv/.demo  ## Reproduce Figure 1 of the paper
	$(RUN) -m examples.figure1

install-check:  ## Build sdist and wheel, check them, install the wheel without triton beside it, use it
	rm -rf .venv-install dist && $(PYTHON) -m venv .venv-install
	.venv-install/bin/python $(PIP) build twine torch==2.13.0
	.venv-install/bin/python -m build --outdir dist . > /dev/null
	.venv-install/bin/python -m twine check --strict dist/*
	.venv-install/bin/python $(PIP) dist/*.whl
	cd .venv-install && bin/python -W error -c "import torch, alrp_triton as a; \
	  print(a.__version__, a.alrp_loss(torch.zeros(4), torch.tensor([1, 0, 0, -1]), torch.ones(1)).classification)"

clean:  ## Remove all that was made here
	rm -rf .venv .venv-cpu .venv-oldest .venv-2.11 .venv-install dist build site demo trees comparison .coverage .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

# Libraries of detectors that pip cannot install beside ours. mmdet asks for mmcv with compiled operators, and it and
# ultralytics for an OpenCV with windows: they train without. Without ultralytics-thop a model's FLOPs are not counted.
.venv/.detectors: .venv/.dev
	$(RUN) $(PIP) --no-deps mmdet==3.3.0 mmengine==0.10.7 mmcv-lite==2.1.0 ultralytics==8.4.190
	$(RUN) $(PIP) addict opencv-python-headless polars psutil pyyaml requests rich shapely six termcolor terminaltables yapf
	$(RUN) -c "import yapf"  # leaves its grammar in a cache, of which tests in two processes would read what is half written
	@touch $@

.venv/.%: pyproject.toml | .venv/bin/python
	@echo "installing what $* needs into .venv: minutes, the first time"
	$(RUN) $(PIP) --editable ".[$*]"
	@touch $@

.venv-cpu/.test: pyproject.toml
	$(PYTHON) -m venv .venv-cpu
	.venv-cpu/bin/python $(PIP) torch==2.13.0
	.venv-cpu/bin/python $(PIP) --editable ".[test]"
	@touch $@

# pyenv finds the version by this variable; without pyenv the name is enough.
.venv-oldest/.test: pyproject.toml
	PYENV_VERSION=3.10 python3.10 -m venv .venv-oldest
	.venv-oldest/bin/python $(PIP) --editable ".[test,torchvision]" torch==2.4.1 torchvision==0.19.1 "numpy==1.26.*"
	@touch $@

# Triton 3.6's interpreter indexes as NumPy 2.4 and newer forbid.
.venv-2.11/.test: pyproject.toml
	PYENV_VERSION=3.12 python3.12 -m venv .venv-2.11
	.venv-2.11/bin/python $(PIP) --editable ".[test,torchvision]" torch==2.11.0 torchvision==0.26.0 "numpy<2.4"
	@touch $@
