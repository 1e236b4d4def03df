# make demo   train, quantize, reload and measure a ViT; report in demo-output/
# make test   the tests
# make check  lint and formatting
# make sanitize  the op tests on kernels with address and undefined-behaviour sanitizers
# make emulate  all op tests on kernels of AVX-512 VNNI and AVX-VNNI, emulated with AVX2
# make bench  latency and error tables, appended to benchmarks/results/

PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check sanitize emulate bench

demo: $(INSTALLED)
	$(VENV)/bin/python -m vqvit.cli demo --output demo-output

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q --numprocesses auto --dist loadfile --no-loadscope-reorder tests

check: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

sanitize: $(INSTALLED)
	$(VENV)/bin/python tests/sanitize.py

emulate: $(INSTALLED)
	$(VENV)/bin/python tests/emulate.py

bench: $(INSTALLED)
	$(VENV)/bin/python benchmarks/cpu_latency.py
	$(VENV)/bin/python benchmarks/compensation.py

$(INSTALLED): pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable ".[dev]"
	touch $@
