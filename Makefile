# make speak TEXT="…" OUT=hello.wav   speaks with the embedded voice; installs the runtime only; VOICE=… SEED=… choose another take
# make serve                          serves speech on http://127.0.0.1:8080, for clients of OpenAI's API and others; ARGS="--port 9000"
# make test                           installs everything, runs the tests: minutes, in most of which torch traces graphs
# make thorough                       runs the tests that `make test` leaves out: other sizes, deep models, memory of a server, the GPU benchmark
# make quick                          runs the tests that are not marked "slow": none traces or exports; under a minute
# make clients                        installs more clients of the server (1 GB) and Playwright, and tests it with them and a browser
# make ray                            installs Ray in an environment of its own (500 MB), and tests what runs on it
# make lint                           checks style and types
# make smoke                          runs the benchmark once on a tiny checkpoint, to see that it works
# make docs                           builds the documentation into site/
VENV   := .venv
CLIENTS := .venv-clients
RAY    := .venv-ray
PYTHON ?= python3
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
TEXT   ?= Good morning! The sun is shining, and the birds are singing in the trees.
OUT    ?= speech.wav
VOICE  ?= awb
SEED   ?= 6

# The shell reads these from the environment, so that quotes, dollars and backticks in a text are only spoken.
export FISHRT_TEXT = $(value TEXT)
export FISHRT_OUT = $(value OUT)
export FISHRT_VOICE = $(value VOICE)
export FISHRT_SEED = $(value SEED)

.PHONY: speak serve test thorough quick clients ray venv lint smoke docs clean

speak: $(VENV)/runtime
	@$(BIN)/fishrt speak --voice "$$FISHRT_VOICE" --seed "$$FISHRT_SEED" --output "$$FISHRT_OUT" -- "$$FISHRT_TEXT"
	@echo 'Listen to it with any player, such as: aplay "'"$$FISHRT_OUT"'"'

serve: $(VENV)/server
	@$(BIN)/fishrt serve $(ARGS)

# Torch traces on one core, so that two processes share the tests, and what tests/support/shared.py keeps for both.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses 2 --dist worksteal

# Each process starts servers of its own, so that a file is not shared between two.
SERVED := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: venv $(CLIENTS)/small
	$(PYTEST) -m "not thorough and not clients and not browser and not ray"
	$(SERVED) tests/clients -m "not large"

thorough: venv
	$(PYTEST) -m thorough

quick: venv
	$(PYTEST) -m "not slow and not thorough and not clients and not browser and not ray"

clients: venv $(VENV)/browser $(CLIENTS)/large
	$(SERVED) tests/clients tests/server/test_page_browser.py

ray: $(RAY)/made
	$(RAY)/bin/python -m pytest tests/scale

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread: torch's wait for each other, and on a busy machine longer than they work.
smoke: venv
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/cpu.py --smoke

docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

venv: $(VENV)/dev

# Opset 24 needs a newer ONNX Runtime than the last with wheels for Python 3.10 (1.23). A half-made environment is not left behind.
$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; this is " + sys.version) if sys.version_info < (3, 11) else 0'
	@echo "Making $(VENV) …"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@touch $@

$(VENV)/runtime: pyproject.toml constraints.txt | $(VENV)/made
	@echo "Installing the runtime (about 200 MB) …"
	@$(PIP) --editable ".[cpu]"
	@touch $@

$(VENV)/server: pyproject.toml constraints.txt | $(VENV)/made
	@echo "Installing the server (about 300 MB) …"
	@$(PIP) --editable ".[cpu,server]"
	@touch $@ $(VENV)/runtime

# torch alone first: its pinned build must be there before anything asks for "torch" of any version.
$(VENV)/dev: pyproject.toml constraints.txt | $(VENV)/made
	@echo "Installing everything, with torch (gigabytes) …"
	@$(PIP) torch
	@$(PIP) --editable ".[dev]"
	@touch $@ $(VENV)/runtime $(VENV)/server

# A browser itself is of the system: its package is not installed here.
$(VENV)/browser: constraints.txt | $(VENV)/dev
	@echo "Installing Playwright (about 170 MB) …"
	@$(PIP) playwright
	@touch $@

CLIENTS_PIP := $(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/clients

$(CLIENTS)/small: tests/clients/requirements-small.txt | $(VENV)/made
	@echo "Installing small clients of the server (about 240 MB) …"
	@$(PYTHON) -m venv --clear $(CLIENTS)
	@$(CLIENTS_PIP)/requirements-small.txt
	@touch $@

$(CLIENTS)/large: $(CLIENTS)/small tests/clients/requirements.txt tests/clients/package-lock.json
	@echo "Installing more clients of the server (about 700 MB) …"
	@$(CLIENTS_PIP)/requirements.txt
	@! command -v npm >/dev/null || npm ci --prefix tests/clients --no-audit --no-fund --loglevel error
	@touch $@

$(RAY)/made: pyproject.toml constraints.txt | $(VENV)/made
	@echo "Installing Ray (about 500 MB) …"
	@$(PYTHON) -m venv --clear $(RAY)
	@$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[cpu,ray]" pytest
	@touch $@

clean:
	rm -rf $(VENV) $(CLIENTS) $(RAY) tests/clients/node_modules site
