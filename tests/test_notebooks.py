"""The notebooks as they are committed: all run, all compared, no number that nothing computes."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
# What the order of a notebook promises, as it is found in its prose.
PARTS = ["At the end you can explain", "## Your prediction", "## The code", "## On real ranks",
         "## What it costs", "## What people get wrong", "## What it is called elsewhere",
         "## Summary"]


def cells(path, kind):
    found = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]
    return [{**cell, "source": "".join(cell["source"])} for cell in found]


def text_of(output):
    data = output.get("data", {})
    return "".join(output.get("text", []) or data.get("text/plain", []))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param


def test_the_course_is_complete():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{i:02}" for i in range(11)]


def test_every_cell_was_run_in_order_and_none_failed(notebook):
    """nbval runs a cell that has no number, but does not compare it."""
    code = cells(notebook, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        if "raises-exception" not in cell["metadata"].get("tags", []):
            assert all(output["output_type"] != "error" for output in cell["outputs"])
        assert all(output.get("name") != "stderr" for output in cell["outputs"])


def test_few_cells_are_exempt_from_comparison(notebook):
    exempt = [cell for cell in cells(notebook, "code")
              if "nbval-ignore-output" in cell["metadata"].get("tags", [])]
    assert len(exempt) <= 6
    for cell in cells(notebook, "code"):
        assert "NBVAL" not in cell["source"]


def test_the_parts_come_in_their_order(notebook):
    prose = "\n".join(cell["source"] for cell in cells(notebook, "markdown"))
    parts = [part for part in PARTS if notebook.name[:2] != "00" or "real ranks" not in part]
    places = [prose.find(part) for part in parts]
    assert -1 not in places, parts[places.index(-1)]
    assert places == sorted(places)


def test_predictions_are_the_learners(notebook):
    code = "\n".join(cell["source"] for cell in cells(notebook, "code"))
    names = re.findall(r"^(my_\w+) = ", code, re.M)
    assert names
    for name in names:
        assert f"{name} = None" in code
        assert len(re.findall(rf"\b{name}\b", code)) > 1, f"{name} is never compared"


def test_pictures_have_words_and_widgets_a_still(notebook):
    for cell in cells(notebook, "code"):
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data or "application/vnd.jupyter.widget-view+json" in data:
                assert "image/png" in data and len(text_of(output)) > 20, cell["source"]
                assert output["metadata"]["image/png"]["alt"]


def test_prose_states_no_number_that_no_cell_computes(notebook):
    shown = "\n".join(cell["source"] + "\n" + "\n".join(map(text_of, cell["outputs"]))
                      for cell in cells(notebook, "code"))
    known = set(map(float, re.findall(r"\d+(?:\.\d+)?", shown.replace(",", ""))))
    for cell in cells(notebook, "markdown"):
        prose = re.sub(r"```.*?```|`[^`]*`|\(http[^)]*\)|^#+ \d+\.", "", cell["source"],
                       flags=re.S | re.M)
        prose = re.sub(r"(?i)(sections?|notebooks?|stages?|figures?|tables?) "
                       r"\d+(\.\d+)*((,| and| to|–) \d+(\.\d+)*)*", "", prose)
        prose = re.sub(r"(?i)\b(fsdp|zero|torch|python|fp|bf|p)[- ]?\d+|arxiv \S+", "", prose)
        for number in re.findall(r"\d+(?:\.\d+)?", prose.replace(",", "")):
            small = float(number) in {0, 1, 2, 3, 4}
            assert small or float(number) in known, f"{number} in: {cell['source'][:200]}"
