# make demo   draw "a red fox in snow" with the bundled model
# make test   the whole suite
# make check  what a change must pass: format, lint, types, fast tests
# make fix    let ruff repair what it can

# .venv once it has the test tools, else the python at hand
PYTHON ?= $(if $(wildcard .venv/test),.venv/bin/python,python3)

.PHONY: demo test check fix clean

demo: .venv/demo
	.venv/bin/python -m ldm.generate "a red fox in snow"

test: .venv/test
	.venv/bin/python -m pytest -n auto

check:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q -n auto -m "not slow"

fix:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean:
	rm -rf .venv build *.egg-info

# Both runs import the checkout, so an install is made anew only when the dependencies change.
.venv/bin/python:
	python3 -m venv .venv

.venv/demo: pyproject.toml constraints.txt | .venv/bin/python
	rm -rf build  # or modules that are gone stay in the wheel
	.venv/bin/python -m pip install -c constraints.txt .
	touch $@

.venv/test: pyproject.toml constraints.txt | .venv/bin/python
	rm -rf build  # or modules that are gone stay in the wheel
	.venv/bin/python -m pip install -c constraints.txt '.[test]'
	touch $@
