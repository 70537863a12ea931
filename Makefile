# `make checks` is what a change must pass; `make quickstart` shows the whole job on toy clips.
# MEGAWAN_SYSTEM_PYTHON=1 uses the present interpreter and its tools instead of .venv.

ifeq ($(MEGAWAN_SYSTEM_PYTHON),1)
BIN :=
else
BIN := .venv/bin/
endif
SHELL_FILES := .ci/run $(wildcard launchers/*.sh slurm/*.sh)

.PHONY: setup format lint test checks quickstart clean

setup:
	bash launchers/setup.sh

format: setup
	$(BIN)ruff format .
	$(BIN)ruff check --fix .

lint: setup
	$(BIN)ruff format --check .
	$(BIN)ruff check .
	$(BIN)mypy
	$(BIN)shellcheck -x $(SHELL_FILES)

test:
	bash launchers/test.sh

checks: lint test

quickstart:
	bash launchers/quickstart.sh

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis megawan.egg-info build dist
	find megawan tools tests -type d -name __pycache__ -prune -exec rm -rf {} +
