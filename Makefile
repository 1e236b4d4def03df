# make demo   train, quantize, reload and measure a ViT; report in demo-output/
# make test   the tests
# make test-all  what takes longer: kernels under more schedules, planted mistakes, soaks, some fuzzing, sanitizers
# make check  lint and formatting
# make sanitize  the op tests on kernels with address and undefined-behaviour sanitizers
# make emulate  all op tests on kernels of AVX-512 VNNI and AVX-VNNI, emulated with AVX2
# make fuzz   random op arguments, and mutated files, on kernels with sanitizers: an hour; FUZZ_CASES, FUZZ_SEED
# make bench  latency and error tables, appended to benchmarks/results/

PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

FUZZ_CASES ?= 100000
FUZZ_SEED ?= 1

.PHONY: demo test test-all check sanitize emulate fuzz bench

demo: $(INSTALLED)
	$(VENV)/bin/python -m vqvit.cli demo --output demo-output

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q --numprocesses auto --dist loadfile --no-loadscope-reorder tests

# Of fuzzing a part: `make fuzz` goes on for as long as it is given.
test-all: $(INSTALLED)
	VQVIT_TWIN_SEEDS=20 $(VENV)/bin/python -m pytest -q --numprocesses auto \
		tests/test_cuda_schedules.py tests/test_cuda_twin.py
	for seed in 1 2 3; do VQVIT_TWIN_SEED=$$seed $(VENV)/bin/python -m pytest -q --numprocesses auto \
		-k "cuda and not triton" tests/test_ops_parity.py tests/test_cuda_kernels*.py || exit 1; done
	$(VENV)/bin/python tests/fuzz_ops.py --cases 3000 --seed $(FUZZ_SEED) --sanitize
	$(VENV)/bin/python tests/fuzz_files.py --kind exported --cases 1000 --seed $(FUZZ_SEED) --sanitize
	$(VENV)/bin/python tests/sanitize.py twin
	$(VENV)/bin/python -m pytest -q --numprocesses auto -m long tests

check: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

sanitize: $(INSTALLED)
	$(VENV)/bin/python tests/sanitize.py cpu
	$(VENV)/bin/python tests/sanitize.py twin

emulate: $(INSTALLED)
	$(VENV)/bin/python tests/emulate.py

fuzz: $(INSTALLED)
	$(VENV)/bin/python tests/fuzz_ops.py --cases $(FUZZ_CASES) --seed $(FUZZ_SEED) --sanitize
	$(VENV)/bin/python tests/fuzz_files.py --kind exported --cases $(FUZZ_CASES) --seed $(FUZZ_SEED) --keep
	$(VENV)/bin/python tests/fuzz_files.py --kind checkpoint --cases $$(($(FUZZ_CASES) / 10)) --seed $(FUZZ_SEED) --keep
	$(VENV)/bin/python tests/fuzz_files.py --kind exported --cases $$(($(FUZZ_CASES) / 10)) --seed $(FUZZ_SEED) --sanitize

bench: $(INSTALLED)
	$(VENV)/bin/python benchmarks/cpu_latency.py
	$(VENV)/bin/python benchmarks/compensation.py

$(INSTALLED): pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable ".[dev]"
	touch $@
