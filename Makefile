# Every target makes .venv or reuses it, installs what it needs once (the stamp), and runs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := .venv-oldest
# One thread a process: two test processes share two cores, and sums do not depend on the machine.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
# In the order of tests/conftest.py: files that take long first, or one process waits for the other in the end.
BY_FILE := --dist loadfile --no-loadscope-reorder
PIP_FLAGS := --quiet --disable-pip-version-check

.PHONY: help install demo test test-all test-oldest lint marks ablations nearness methods high-resolution bench-cpu support clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP)  ## .venv with everything below

# torch first: with it in place, no other package pulls in a build of its own choice.
$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into $(VENV); the first time this takes a minute or two"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install $(PIP_FLAGS) $$(grep -E '^(torch|setuptools)==' constraints.txt)
	@$(BIN)/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## convert, distill and generate with the small model; pictures in demo/
	$(BIN)/python -m lineardit demo

test: $(STAMP)  ## everything that a change must pass, in minutes
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) $(BY_FILE)

test-all: $(STAMP)  ## the slow tests as well
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) $(BY_FILE) -m ''

$(OLDEST)/.installed: constraints-oldest.txt
	@echo "Installing the oldest supported versions into $(OLDEST)"
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install $(PIP_FLAGS) $$(grep '^torch==' constraints-oldest.txt)
	@$(OLDEST)/bin/python -m pip install $(PIP_FLAGS) --requirement constraints-oldest.txt
	@touch $@

# Group offload on a CPU and text masks for each query came to diffusers later.
test-oldest: $(OLDEST)/.installed  ## how attention gets into a model, with the oldest supported diffusers
	$(TEST_ENV) $(OLDEST)/bin/python -m pytest -n $(JOBS) $(addprefix tests/linearize/test_,seam.py traps.py convert.py) \
		-k 'not group_offload and not test_text_masks_are_taken_over'

lint: $(STAMP)  ## ruff, and mypy on an installed copy (it cannot follow an editable install)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --no-build-isolation --target build/lint .
	MYPYPATH=build/lint $(BIN)/mypy -p lineardit

marks: $(STAMP)  ## the figures of the README, again: hours, resumable
	$(BIN)/python benchmarks/marks.py

ablations: $(STAMP)  ## what each term of the loss brings on the small model: 90 CPU-minutes, resumable
	$(BIN)/python benchmarks/ablations.py

nearness: $(STAMP)  ## every method on the small model without training, by single predictions: minutes
	$(BIN)/python benchmarks/nearness.py

methods: $(STAMP)  ## every method on the small model, equal training: hours, resumable
	$(BIN)/python benchmarks/methods.py

high-resolution: $(STAMP)  ## the cascade at 512 and 1024 px on the small model: hours, resumable
	$(BIN)/python benchmarks/high_resolution.py

bench-cpu: $(STAMP)  ## window attention against dense attention on this CPU
	$(BIN)/python benchmarks/cpu.py

support: $(STAMP)  ## the table of docs/models.md, from the tests: some minutes
	$(TEST_ENV) $(BIN)/python benchmarks/support.py

clean:  ## remove what the targets made, except pictures and runs
	rm -rf $(VENV) $(OLDEST) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
