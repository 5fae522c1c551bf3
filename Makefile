# `make demo` and `make test` need Python 3.11+, make and a package index; nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
SEEDS  ?= 3
ENGINE_TESTS = tests/test_engine_environments.py tests/network/door tests/network/nvflare tests/protocols/masking/test_masked.py tests/protocols/test_interface.py tests/test_cli.py
LOWEST_TESTS = tests/test_packaging.py tests/test_cli.py tests/privacy/dpsgd tests/privacy/accounting tests/protocols tests/trainers/federated \
	tests/trainers/local_steps tests/audits/report
OUT    ?= runs/digits
export PIP_DISABLE_PIP_VERSION_CHECK = 1
unexport PYTHONDONTWRITEBYTECODE  # or each of two workers compiles 300 files of tests, in each run

ENGINES = flower nvflare

.PHONY: accessibility docs demo test test-all test-engines test-lowest check coverage mutants gpu benchmarks clean

demo: $(VENV)/.demo
	$(BIN)/choral compare examples/digits.toml --out $(OUT) --seeds $(SEEDS) --resume

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

test-all: $(VENV)/.test
	HYPOTHESIS_PROFILE=searching $(BIN)/python -m pytest -q -n 2

check: $(VENV)/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Engines pin versions that the main environment does not have: each has its own, with Choral beside it.
test-engines: $(ENGINES:%=.venv-%/.ready)
	for engine in $(ENGINES); do .venv-$$engine/bin/python -m pytest -q -m "not slow" $(ENGINE_TESTS) tests/network/$$engine || exit 1; done

# The lowest versions that pyproject.toml allows, on Python 3.11; they warn of one another, which is not our concern.
test-lowest: .venv-lowest/.ready
	.venv-lowest/bin/python -m pytest -q -n 2 -m "not slow" -W default $(LOWEST_TESTS)

# Lines and branches that `make test` reaches, in the processes that tests start too.
coverage: $(VENV)/.check
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -n 2 -m "not slow"
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

# Which lines does no test miss? 300 changes at random, by a fixed seed; about an hour on one core.
mutants: $(VENV)/.test
	$(BIN)/python tests/mutants.py

# What wants a GPU, in eight minutes at most, without a network: docs/gpu.md. GPU="--device cpu --small" rehearses it.
GPU    ?= --device cuda
WHEELS ?= wheels
gpu:
	[ ! -d $(WHEELS) ] || $(PYTHON) -m pip install -q --no-index --no-deps --no-compile --upgrade --target build/gpu $(WHEELS)/*.whl
	PYTHONPATH=src:build/gpu:$$PYTHONPATH $(PYTHON) benchmarks/gpu.py $(GPU)

# The report of the demo against WCAG 2.2, by axe-core from npm in Chromium: desk, phone, dark, print; at most 12 pages.
accessibility: $(VENV)/.test
	npm install --no-save --no-audit --no-fund --prefix build/axe axe-core@4.14.1
	$(BIN)/python tests/accessibility.py build/axe/node_modules/axe-core/axe.min.js $(OUT)/report.html

# What has a peer or a limit, beside the newest of the peers, each in an environment of its own: build/benchmarks.jsonl, and
# the table of docs/benchmarks.md. BENCHMARKS=--small rehearses it, BENCHMARKS="--only opening bytes" does parts of it.
BENCHMARKS ?=
benchmarks: $(VENV)/.test .venv-flower/.ready .venv-peers/.ready
	$(BIN)/python benchmarks/all.py $(BENCHMARKS)

# The site, with its notebooks executed; links are checked, and a warning is an error. build/site/index.html is it.
docs: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Choral needs Python 3.11 or newer; set PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# Torch comes first and alone: with the pinned build present nothing pulls in gigabytes of another one.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt torch
	touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[all]"
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	touch $@ $(VENV)/.demo

$(VENV)/.check: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test,check]"
	touch $@ $(VENV)/.test $(VENV)/.demo

$(VENV)/.docs: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[all,docs,frames,notebooks]"
	touch $@

.venv-flower/.ready: ENGINE = "flwr[simulation]"
.venv-nvflare/.ready: ENGINE = nvflare
.venv-%/.ready: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install -q -c constraints-$*.txt torch
	.venv-$*/bin/python -m pip install -q -c constraints-$*.txt -e ".[all]" $(ENGINE) pytest hypothesis jsonschema
	touch $@

# Peers that are measured beside Choral, which is not in here: pfl wants another dp-accounting.
.venv-peers/.ready: constraints-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -q -c constraints-peers.txt torch
	.venv-peers/bin/python -m pip install -q -c constraints-peers.txt safetensors "flwr[simulation]" pfl
	touch $@

.venv-lowest/.ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q -c constraints-lowest.txt torch
	.venv-lowest/bin/python -m pip install -q -c constraints-lowest.txt -e ".[test]"
	touch $@
