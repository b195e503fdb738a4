# Every target may be called on a fresh clone: what it needs, it makes first.
# A second call finds the work done and is quick.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := build
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
# rustup puts cargo here; a login that has not read its profile lacks it.
export PATH := $(PATH):$(HOME)/.cargo/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

RUST_SOURCES := Cargo.toml $(wildcard Cargo.lock) \
    $(shell find crates -name '*.rs' -o -name Cargo.toml -o -name build.rs -o -name '*.S' 2>/dev/null)

IMAGE ?=
ARGS ?=
SEED ?=
TIME ?=

.PHONY: help build run test lint fuzz bench format clean distclean check-tools

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed 's/:.*  ## /\t/' | expand -t 12

build: $(STAMPS)/native  ## Leave bunshin, with its engine and tools, in .venv

run: build  ## Boot Debian and give a shell; ARGS adds options, IMAGE chooses an image
	@$(BIN)/bunshin run $(IMAGE) $(ARGS)

test: lint  ## Lint, then cargo test and pytest; ARGS go to pytest
	cargo test --workspace --quiet
	$(BIN)/python -m pytest $(ARGS)

lint: build  ## ruff, mypy, stubtest, import-linter, rustfmt and clippy; warnings are errors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/stubtest bunshin._native
	$(BIN)/lint-imports --no-logo
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings

format: build  ## Put all sources into their standard form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	cargo fmt --all

fuzz: check-tools  ## Random instructions against the host processor until Ctrl-C; SEED=number TIME=seconds ARGS=--system|--rewriting|--narrow
	cargo run --release --quiet -p bunshin-oracle --bin bunshin-compare -- \
	    --seed $(or $(SEED),$(shell date +%s)) --seconds $(or $(TIME),1e9) $(ARGS)

bench: build  ## bunshin, QEMU's translator and the host side by side, docs/bench.svg; ARGS="--quick" for a short run
	$(BIN)/python bench/run.py $(ARGS)

clean:  ## Remove what was built; .venv stays
	rm -rf target bench/out dist src/bunshin/_native*.so $(STAMPS)/native
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

distclean: clean  ## Remove .venv too
	rm -rf $(VENV)

check-tools:
	@if ! command -v cargo >/dev/null; then \
	    echo 'make: cargo is missing. bunshin'"'"'s engine needs Rust 1.82 or later: install rustup' \
	         '(https://rustup.rs) or your distribution'"'"'s cargo package, and try again.' >&2; exit 1; fi
	@v=$$(cargo --version | sed -E 's/^cargo ([0-9]+)\.([0-9]+).*/\1 \2/'); set -- $$v; \
	if [ "$$1" -lt 1 ] || { [ "$$1" -eq 1 ] && [ "$$2" -lt 82 ]; }; then \
	    echo "make: this cargo is $$1.$$2; bunshin's engine needs Rust 1.82 or later (rustup brings it)." >&2; exit 1; fi
	@if ! command -v cc >/dev/null; then \
	    echo 'make: a C compiler is missing (Rust links with it): apt-get install gcc, and try again.' >&2; exit 1; fi

# The first python3 of 3.11 or later, wherever it stands.
$(STAMPS)/venv: | check-tools
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.14 /usr/bin/python3; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	    echo 'make: Python 3.11 or later is missing: apt-get install python3 python3-venv, or PYTHON=/path/to/python3' >&2; exit 1; fi; \
	if ! $$found -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "make: $$found has no venv module: apt-get install python3-venv, and try again." >&2; exit 1; fi; \
	$$found -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/tools: pyproject.toml $(STAMPS)/venv
	@$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	    print("\n".join(p["dependencies"] + p["optional-dependencies"]["dev"]))' > $(STAMPS)/requirements
	$(BIN)/pip install --quiet -r $(STAMPS)/requirements
	@touch $@

$(STAMPS)/native: $(STAMPS)/tools $(RUST_SOURCES) | check-tools
	env -u CONDA_PREFIX VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/maturin develop --release --quiet
	@touch $@
