# make lab           opens the course in JupyterLab: a copy of the notebooks, in lab/, to work in;
#                    make lab AGAIN=4 starts notebook 4 over
# make wheelhouse    what the course needs, as files: for laptops without a network, on which
#                    make lab WHEELS=wheelhouse installs it from there
# make compare       the main job: all stages side by side on real data
# make quick         after each edit, half a minute: ruff, mypy, tests without ranks, a few with them
# make test          all checks: ruff, mypy, pytest, and the notebooks once more
# make soak          checks that take long: wrong answers made from the exercises' solutions, and
#                    damaged notebooks
# make test-newest   pytest with the newest release of everything, in an environment of its own
# make test-browser  the notebooks' widgets in a real browser, where Chromium is installed
# make notebooks     runs all notebooks and keeps what they print and show
# make figures       draws the figures anew, from runs; make bench draws its own
# make bench         times every stage beside what people use instead; half an hour
# make scale         the same with 1, 2, 4 and 8 ranks
# Each makes .venv and installs what it needs when that is missing.

PYTHON ?= python3
BIN := .venv/bin
LAB_CONFIG := .venv/etc/jupyter/labconfig/page_config.json

.PHONY: compare quick test soak bench scale figures lab notebooks test-browser test-newest \
    wheelhouse clean

compare: .venv/.installed
	$(BIN)/zero-ref compare --figure compare.png $(ARGS)

# All stages on two ranks: same bits, bytes, and one input that is refused.
QUICK := tests/test_arithmetic.py tests/test_formula.py tests/test_data.py \
    tests/test_notebooks.py \
    "tests/test_same_bits.py::test_all_stages_equal_each_other_torch_ddp_and_one_process[2-adam]" \
    "tests/test_bytes.py::test_resident_bytes_are_those_of_the_formula[2-adam]" \
    "tests/test_bytes.py::test_bytes_sent_are_those_of_the_formula[2]" \
    tests/test_bad_input.py::test_a_mistake_on_one_rank_is_an_error_on_all

quick: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest $(QUICK) $(ARGS)

# A file's tests stay together, because they share ranks.
TWO_AT_A_TIME := -n 2 --dist loadfile

# With an empty value, Python keeps the bytecode of the tests for the next process that needs them.
test: export PYTHONDONTWRITEBYTECODE =
test: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest $(TWO_AT_A_TIME) -m "not alone" $(ARGS)
	$(BIN)/pytest -m alone $(ARGS)
	JUPYTER_DEFAULT_PROVISIONER_NAME=forked-with-torch \
	    $(BIN)/pytest $(TWO_AT_A_TIME) --nbval notebooks/

soak: .venv/.installed-test
	$(BIN)/python tests/soak_labs.py --table docs/soak.md $(ARGS)
	$(BIN)/python tests/soak_grade.py --table docs/soak.md
	$(BIN)/python tests/faults.py --table docs/survives.md

# What people get who install without the pins.
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check \
	    --upgrade --upgrade-strategy eager -e '.[test]'
	.venv-newest/bin/pytest $(ARGS)

bench: .venv/.installed
	$(BIN)/zero-ref bench --model CNN 3M 15M 57M --rounds 3 --json figures/bench.json \
	    --figure figures/bench.png $(ARGS)

scale: .venv/.installed
	$(BIN)/zero-ref bench --model 3M --world-size 1 2 4 8 --rounds 2 --steps 5 \
	    --systems "stage 0" "stage 1" "stage 2" "stage 3" \
	    --json figures/scale.json --figure figures/scale.png

figures: .venv/.installed
	$(BIN)/zero-ref compare --figure figures/compare.png
	$(BIN)/python -m zero_ref.viz.figures figures
	$(BIN)/python -m zero_ref.viz.cheatsheet figures
	$(BIN)/python -m zero_ref.labs.sheet > docs/quiz.md

lab: .venv/.installed-lab $(LAB_CONFIG)
	$(BIN)/python -m zero_ref.labs.folder notebooks lab $(if $(AGAIN),--again $(AGAIN))
	$(BIN)/jupyter lab lab $(ARGS)

# Without this, JupyterLab opens with a question: whether it may fetch news.
$(LAB_CONFIG): | .venv/.installed-lab
	$(BIN)/jupyter labextension disable --level sys_prefix --log-level WARN \
	    @jupyterlab/apputils-extension:announcements

notebooks: .venv/.installed-lab
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace \
	    --ExecutePreprocessor.record_timing=False \
	    --ExecutePreprocessor.store_widget_state=False notebooks/*.ipynb \
	    notebooks/solutions/*.ipynb

test-browser: .venv/.installed-browser
	$(BIN)/pytest tests/browser -s -x $(ARGS)

# pip would compile all of torch, in half a minute, where Python compiles what it imports. Only where
# many processes follow it is worth it, on all cores.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
    $(if $(WHEELS),--no-index --find-links $(WHEELS))

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) -c constraints.txt -e .
	@touch $@

.venv/.installed-%: .venv/.installed
	$(PIP_INSTALL) -c constraints.txt -e '.[$*]'
	$(BIN)/python -m compileall -qq -j 0 .venv/lib zero_ref || true
	@touch $@

# setuptools builds the project, where pip would fetch it.
wheelhouse: .venv/.installed
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check -c constraints.txt \
	    --wheel-dir wheelhouse '.[lab]'
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps \
	    --dest wheelhouse 'setuptools>=77'

clean:
	rm -rf .venv .venv-newest
