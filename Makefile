# make speak TEXT="…" OUT=hello.wav   speaks with the embedded voice; installs the runtime only
# make test                           installs everything, runs every test
VENV   := .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
TEXT   ?= Hello! I am a small voice, and I speak from an O N N X graph.
OUT    ?= speech.wav

.PHONY: speak test venv lint clean

speak: $(VENV)/runtime
	$(BIN)/fishrt speak "$(TEXT)" -o "$(OUT)"

test: venv
	$(BIN)/python -m pytest tests

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: $(VENV)/dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable ".[cpu]"
	touch $@

# torch alone first: its pinned build must be there before anything asks for "torch" of any version.
$(VENV)/dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	$(PIP) --editable ".[dev]"
	touch $@ $(VENV)/runtime

clean:
	rm -rf $(VENV)
