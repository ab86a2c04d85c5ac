"""`zero-ref grade`: a table with a row for each learner."""

import csv
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from ..labs import grade

Row = dict[str, Any]


def run(paths: Sequence[Path], seconds: float) -> list[Row]:
    """Grade what is there. Returns a row for each learner. Raises ValueError if nothing is, or if
    nbclient is not installed."""
    for needed in ("nbclient", "ipykernel"):
        if not importlib.util.find_spec(needed):
            raise ValueError(f"grading runs notebooks, for which {needed} is missing: "
                             "pip install 'zero_ref[lab]'")
    if not seconds > 0:
        raise ValueError(f"--timeout {seconds:g}: give a number of seconds above 0")
    learners = grade.handed_in(paths)
    columns = [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        line = bar.add_task("", total=len(learners))
        return grade.grade(learners, seconds, lambda: bar.advance(line))


def print_report(rows: Sequence[Row]) -> None:
    """Points for each notebook and in all, and in a line what went wrong first."""
    numbers = grade.notebooks(rows)
    table = Table(title="Points in each notebook, and in all", title_justify="left",
                  box=box.SIMPLE_HEAD, expand=True)
    table.add_column("learner", no_wrap=True)
    for heading in (*numbers, "all"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("what went wrong first", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in rows:
        of_notebook = [_points(row, number) for number in numbers]
        table.add_row(row["learner"], *of_notebook, f"{row['points']}/{row['of']}",
                      _in_a_line(grade.wrong_first(row)))
    width = None if sys.stdout.isatty() else 120
    Console(width=width, highlight=False, markup=False, emoji=False).print(table)
    broken = [row["learner"] for row in rows if not row["graded"]]
    print(f"{len(rows) - len(broken)} of {len(rows)} were graded"
          + (f", but not, or not in full: {', '.join(broken)}." if broken else "."))


def _points(row, number):
    points = [exercise["points"] for name, exercise in row["exercises"].items()
              if name.split(".")[0] == number]
    return f"{sum(points)}/{len(points)}" if points else ""


def _in_a_line(text):
    return "".join(c if c.isprintable() else " " for c in text)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """A line for each learner and exercise: its points, and the verdict."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["learner", "exercise", "points", "verdict"])
        for row in rows:
            for text in (*row["broken"], *row["failed"]):
                writer.writerow([row["learner"], "", "", text])
            for name, exercise in row["exercises"].items():
                writer.writerow([row["learner"], name, exercise["points"], exercise["text"]])
