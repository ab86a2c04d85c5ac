# make compare   the main job: all stages side by side on real data
# make test      all checks: ruff and pytest
# make figures   draws figures/ anew, from a run
# Each makes .venv and installs what it needs when that is missing.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: compare test figures clean

compare: .venv/.installed
	$(BIN)/zero-ref compare --figure compare.png $(ARGS)

test: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/pytest $(ARGS)

figures: .venv/.installed
	$(BIN)/zero-ref compare --figure figures/compare.png

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf .venv
