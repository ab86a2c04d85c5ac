"""Damaged notebooks, drawn by Hypothesis from those of the course: grading crashes on none, and
only the exercise that is damaged loses its point.

    python tests/soak_grade.py                300 notebooks
    python tests/soak_grade.py --number 20    fewer

The notebooks are the course's, with the solutions written in and without the cells that no exercise
needs. Exits with 1 at the first that is graded wrongly. Takes about twenty minutes, and is not part
of `make test`.
"""

import argparse
import inspect
import json
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_labs import ordered

from zero_ref.labs import answers, grade
from zero_ref.labs.exercises import EXERCISES
from zero_ref.labs.ordering import ORDERINGS
from zero_ref.labs.quiz import QUESTIONS

COURSE = Path(__file__).parent.parent / "notebooks"
TITLE = "## Does grading bear damaged notebooks?"


@dataclass
class Cell:
    """names: the exercises that it is about, which lose their points if it is damaged."""

    source: str
    names: frozenset[str]
    kind: str = "code"
    more: dict = field(default_factory=dict)


def solved(path):
    """The cells of a course's notebook that exercises need, with right answers."""
    code = answers.cells_of(path.name, path.read_bytes())
    everything = frozenset(answers.names_asked(path.name, path.read_bytes()))
    cells = [Cell(code[0], everything)]
    for source in code[1:]:
        names = frozenset(name for name in everything if f'"{name}"' in source)
        if "check(" not in source or not names:
            continue
        for name in names & EXERCISES.keys():
            answer = re.search(r"check\(.*, (\w+)\)", source)[1]
            cells.append(Cell(written(name, answer), names))
        for name in names & ORDERINGS.keys():
            source = source.replace("= None", f"= {ordered(ORDERINGS[name])!r}")
        for name in names & QUESTIONS.keys():
            source = source.replace(f'"{name}": None', f'"{name}": "{QUESTIONS[name].right}"')
        cells.append(Cell(source, names))
    return cells


def written(name, answer):
    """The solution, as a learner would have it in a cell."""
    solution = EXERCISES[name].solution
    imports = f"from {solution.__module__} import *\nfrom zero_ref.labs import small\n"
    return f"{imports}{inspect.getsource(solution)}\n{answer} = {solution.__name__}"


# ---- damages: each changes the cells, and returns the names that may lose their points -----------


def delete(draw, cells, at):
    return cells.pop(at).names


def copy(draw, cells, at):
    return insert(draw, cells, cells[at])


def move(draw, cells, at):
    cell = cells.pop(at)
    return cell.names | insert(draw, cells, cell)


def insert(draw, cells, cell):
    """What lies around the place may need what was there before."""
    place = draw(st.integers(0, len(cells)))
    around = cells[max(0, place - 1) : place + 1]
    cells.insert(place, cell)
    return frozenset().union(cell.names, *(other.names for other in around))


def split(draw, cells, at):
    lines = cells[at].source.splitlines(keepends=True)
    cut, names = draw(st.integers(0, len(lines))), cells[at].names
    cells[at : at + 1] = [Cell("".join(part), names) for part in (lines[:cut], lines[cut:])]
    return names


def retype(draw, cells, at):
    kind = draw(st.sampled_from(["markdown", "raw", "sql", ""]))
    cells[at] = Cell(cells[at].source, cells[at].names, kind)
    return cells[at].names


def cut_off(draw, cells, at):
    source = cells[at].source
    cells[at] = Cell(source[: draw(st.integers(0, len(source)))], cells[at].names)
    return cells[at].names


def garbage(draw, cells, at):
    """A cell of anything, which needs nothing that is there."""
    text = draw(st.text(max_size=40).filter(lambda text: not set(text) & set("!%?/,;")))
    cells.insert(at, Cell(text, frozenset()))
    return frozenset()


def relabel(draw, cells, at):
    """Metadata and outputs mean nothing."""
    anything = st.one_of(st.none(), st.integers(), st.text(), st.lists(st.text(), max_size=2))
    more = draw(st.dictionaries(st.sampled_from(["id", "metadata", "outputs", "execution_count"]),
                                anything))
    cells[at] = Cell(cells[at].source, cells[at].names, cells[at].kind, more)
    return frozenset()


DAMAGES = [delete, copy, move, split, retype, cut_off, garbage, relabel]


@st.composite
def damaged(draw):
    """The file, its text now, what was done to it, and which names may lose their points; None if
    it is no notebook any more."""
    path = draw(st.sampled_from(sorted(COURSE.glob("*.ipynb"))))
    cells, lost, done = solved(path), frozenset(), []
    for damage in draw(st.lists(st.sampled_from(DAMAGES), min_size=1, max_size=3)):
        if cells:
            lost |= damage(draw, cells, draw(st.integers(0, len(cells) - 1)))
            done.append(damage.__name__)
    kernel = draw(st.sampled_from([{}, {"kernelspec": {"name": "julia-1.9"}}, None]))
    text = json.dumps({"cells": [{"cell_type": cell.kind, "source": cell.source, **cell.more}
                                 for cell in cells], "metadata": kernel})
    if draw(st.integers(0, 19)) == 0:
        text, lost = text[: draw(st.integers(0, len(text) - 1))], None
        done.append("no JSON")
    return path, text, done, lost


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=300)
    parser.add_argument("--table", type=Path, metavar="OUT", help="write the result to this page")
    args = parser.parse_args()
    counts, start = Counter(), time.monotonic()

    @settings(max_examples=args.number, deadline=None, database=None, derandomize=True,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(damaged())
    def is_graded(drawn):
        path, text, done, lost = drawn
        found = []
        with tempfile.TemporaryDirectory() as folder:
            grade._grade({path.name: text.encode()}, Path(folder, "work"), 60,
                         lambda **facts: found.append(facts))
        counts.update(done)
        counts["notebooks"] += 1
        got = {line["name"] for line in found if line.get("points")}
        broken = [line for line in found if "broken" in line]
        asked = set(answers.names_asked(path.name, path.read_bytes()))
        print(counts["notebooks"], path.name, *done, f"{len(got)}/{len(asked)}", flush=True)
        assert set(found[0]["asked"]) == asked, (drawn, found)
        if lost is None:
            assert broken and not got, (drawn, found)
        else:
            assert not broken and got >= asked - lost, (drawn, asked - lost - got, found)

    is_graded()
    total = counts.pop("notebooks")
    text = (f"Of {total} notebooks of the course, solved and then damaged, each was graded, and no "
            f"exercise lost its point but those that were damaged: "
            f"{', '.join(f'{kind} {count}' for kind, count in sorted(counts.items()))}. (Up to "
            f"three damages in a notebook; {date.today():%Y-%m-%d}, torch {torch.__version__}, "
            f"{time.monotonic() - start:.0f} s.)")
    print(text)
    if args.table:
        page = args.table.read_text().partition(TITLE)[0].rstrip()
        args.table.write_text(f"{page}\n\n{TITLE}\n\n{text}\n")


if __name__ == "__main__":
    sys.exit(main())
