# Two commands: `make demo` shows what it does, `make test` checks it. Everything installs into VENV.
VENV ?= .venv
PYTHON ?= $(shell for v in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$v -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$v && break; done)
RUN = $(VENV)/bin/python

.PHONY: demo test lint format types bench readme assets install clean help

help:
	@echo "make demo    images and a video with and without acceleration, into out/"
	@echo "make test    the tests"
	@echo "make lint    ruff: rules and format          make format  apply them"
	@echo "make types   mypy over everything that ships"
	@echo "make bench   the benchmarks in bench/, one after the other"
	@echo "make assets  train the bundled pipelines again; resumable, many hours: assets/make/README.md"
	@echo "make readme  measure again what README shows, and put it there"

demo: $(VENV)/.installed
	$(RUN) scripts/demo.py

test: $(VENV)/.installed-dev
	$(RUN) -m pytest -n logical --maxprocesses 4

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/.installed-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

types: $(VENV)/.installed-dev
	$(RUN) scripts/linktree.py
	$(RUN) -m mypy

bench: $(VENV)/.installed-dev
	for file in bench/*.py; do echo "== $$file"; $(RUN) $$file || exit 1; done

readme: $(VENV)/.installed-dev
	$(RUN) scripts/readme_table.py --measure --peers

assets: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(RUN) assets/make/run.py --install

install: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python"; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); torch is large, the first time takes some minutes."
	$(RUN) -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf build dist out .typecheck .mypy_cache .ruff_cache .pytest_cache
