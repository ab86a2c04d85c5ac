"""The pages say what commands print and what the code is called; their links lead somewhere."""

import inspect
import json
import re
from pathlib import Path

import pytest
import reading_time
import torch

import zero_ref
from zero_ref.commands import bench, compare
from zero_ref.commands import report as shown
from zero_ref.engine import optimizers as optim
from zero_ref.tasks import data

ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path.read_text()
         for folder in (".", "docs", "notebooks") for path in sorted((ROOT / folder).glob("*.md"))}
README = PAGES["README.md"]


def test_the_table_is_what_compare_prints(monkeypatch):
    """Its bytes, that is: times, and the last digits of a loss, are a machine's. The peak falls."""
    monkeypatch.setattr(compare, "ROUNDS", 0)
    monkeypatch.setattr(compare.measure, "train", lambda *_: {"difference": 0.0})  # in float64
    report = compare.run(lambda: data.task("digits", None, 4, 96), (0, 1, 2, 3), 4, steps=2)
    rows = [re.split(r" {2,}", line.strip()) for line in PAGES["docs/comparing.md"].splitlines()]
    for system in report["systems"]:
        for name, kind in ((system["system"], "resident_bytes"), ("formula", "formula_bytes")):
            if system[kind] is not None:
                held = shown.held(system[kind], 1e6)
                assert any(row[0] == name and row[1:5] == held for row in rows), (name, held)
        if system["formula_sent_bytes"] is not None:
            sent = f"{system['formula_sent_bytes'] / 1e6:,.1f}"
            assert any(row[0] == "formula" and row[-1] == sent for row in rows)
    peaks = {system["system"]: system["peak_bytes"] for system in report["systems"]}
    assert peaks["DDP"] > peaks["stage 0"] > peaks["stage 1"] > peaks["stage 2"] > peaks["stage 3"]


def test_the_training_loop_runs(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.startswith("[{'parameters': 1")


def test_the_minutes_are_those_that_reading_takes():
    """A notebook may change a little: python tests/reading_time.py prints what it is now."""
    stated = dict(re.findall(r"\(notebooks/(\w+\.ipynb)\) .* (\d+) \|$", README, re.MULTILINE))
    assert stated.keys() == {path.name for path in reading_time.NOTEBOOKS.glob("*.ipynb")}
    for name, minutes in stated.items():
        assert abs(int(minutes) - reading_time.minutes(reading_time.NOTEBOOKS / name)) <= 5, name
    page = PAGES["notebooks/INSTRUCTOR.md"]
    assert dict(re.findall(r"\((\w+\.ipynb)\) \| (\d+) \|", page)) == stated


def test_the_options_of_wrap():
    for name, option in inspect.signature(zero_ref.wrap).parameters.items():
        if option.kind is option.KEYWORD_ONLY:
            assert f"| `{name}` | `{option.default}` |" in PAGES["docs/interface.md"]


@pytest.mark.parametrize("kind", optim.ELEMENTWISE)
def test_the_optimizers_that_work(kind):
    assert issubclass(kind, torch.optim.Optimizer)
    assert re.search(rf"\b{kind.__name__}\b", PAGES["docs/what_works.md"])


def test_the_bench_table_is_what_was_measured(capsys):
    report = json.loads((ROOT / "figures" / "bench.json").read_text())
    bench.print_report(report)
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    missing = [line for line in printed
               if line and line not in PAGES["docs/measuring.md"].splitlines()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """To files and folders of this repository, and to headings in its pages."""
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]) if "://" not in link]
    for link in links:
        name, _, heading = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if heading:
            assert heading in headings(target.read_text()), link
    assert links or page == "CHANGELOG.md"


def headings(text):
    """As GitHub writes them in a link."""
    lines = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_the_files_that_hold_the_promises_exist():
    there = {path.name for path in (ROOT / "tests").rglob("*.py")}
    named = set(re.findall(r"\w+\.py\b", PAGES["docs/tests.md"]))
    assert named and named <= there, named - there


def test_contributors_are_told_of_what_there_is():
    """Files, and names that the code has somewhere."""
    files = [path for folder in ("zero_ref", "tests") for path in (ROOT / folder).rglob("*.py")]
    code = "\n".join(path.read_text() for path in files if path != Path(__file__))
    for name in re.findall(r"`([\w./]+)`", PAGES["CONTRIBUTING.md"]):
        if name.endswith((".py", "/")):
            assert any((ROOT / folder / name).exists() for folder in (
                "", "zero_ref", "zero_ref/viz")), name
        else:
            assert re.search(rf"\b{re.escape(name)}\b", code), name
