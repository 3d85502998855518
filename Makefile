# make install · make demo · make test · make bench: each works on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# tritonclient wants an older protobuf, so the peer lives in an environment of its own.
PEER := .venv-tritonclient
CONTRACTS := $(shell find proto -name '*.proto')
NATIVE := kernels/native_build.py $(wildcard kernels/els_kernels/native/src/*)

.PHONY: install demo test lint bench clean

install: $(VENV)/.installed $(PEER)/.installed

$(VENV)/.installed: pyproject.toml proto/build_hook.py $(CONTRACTS) $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[server,tracing,gpu,dev]'
	touch $@

$(PEER)/.installed:
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/pip install --quiet 'tritonclient[grpc]==2.73.0'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python clients/examples/demo.py --out demo.png

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest

bench: install
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.kernels --errors
	$(BIN)/python -m benchmarks.service.peers install
	$(BIN)/python -m benchmarks.service

# Longer than the tests do it: SECONDS of coverage-guided fuzzing, MINUTES of a loaded server.
SECONDS ?= 60
MINUTES ?= 10

.PHONY: fuzz soak

fuzz: install
	$(BIN)/pip install --quiet 'atheris>=3,<4'
	$(BIN)/python -m tests.fuzz.atheris_codec --seconds $(SECONDS)

soak: install
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

clean:
	rm -rf $(VENV) $(PEER) proto/python demo.png
