# Two commands do everything: `make demo` and `make test`. Python 3.10+ and pip are all that must be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: demo test slow check docs clean

demo: $(VENV)/.installed  ## install, fetch a real model (about 90 MB, once) and let it talk
	$(BIN)/hasten run smollm2-135m "Explain in two sentences why the sky is blue." --max-tokens 64 --stats

# A process per core with one thread each: processes of as many threads as cores would wait for each other.
test: $(VENV)/.tested check  ## every gate and the default test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --ignore=tests/shape  # make check has run those

slow: $(VENV)/.tested  ## the long tests too
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.tested  ## lint, types and shape of the code base
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/shape

docs: $(VENV)/.tested  ## regenerate the generated pages, build the site into site/, check its links
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -q
	$(BIN)/python -m pytest -q tests/shape/test_docs.py tests/shape/test_site.py

clean:  ## remove everything that can be made again
	rm -rf $(VENV) build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

NATIVE := CMakeLists.txt $(wildcard src/hasten/kernels/native/*)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt $(NATIVE)
	$(INSTALL) -e .
	touch $@

$(VENV)/.tested: $(VENV)/bin/python pyproject.toml constraints.txt $(NATIVE)
	$(INSTALL) -e '.[test]'
	touch $@ $(VENV)/.installed
