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
ALL = "all"
A_DAY = 24 * 60 * 60  # seconds
BESIDE = 60  # characters of what went wrong that are worth a column beside the points


def run(paths: Sequence[Path], seconds: float) -> list[Row]:
    """Grade what is there. Returns a row for each learner. Raises ValueError if nothing is, or if
    nbclient is not installed."""
    for needed in ("nbclient", "ipykernel"):
        if not importlib.util.find_spec(needed):
            raise ValueError(f"grading runs notebooks, for which {needed} is missing: "
                             "pip install 'zero_ref[lab]'")
    if not 0 < seconds <= A_DAY:
        raise ValueError(f"--timeout {seconds:g}: give a number of seconds above 0, and no more "
                         f"than a day's {A_DAY:,}")
    grade.keep_out_of_reach()
    learners = grade.handed_in(paths)
    columns = [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        line = bar.add_task("", total=len(learners))
        return grade.grade(learners, seconds, lambda: bar.advance(line))


def print_report(rows: Sequence[Row], left_out: Sequence[str] = ()) -> None:
    """Points for each notebook and in all, and what went wrong first: in a line, or below them if
    too little room is left. Points that do not fit beside each other take several tables. left_out:
    the names of files that nobody can grade."""
    width = None if sys.stdout.isatty() else 120
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    headings = [*grade.notebooks(rows), ALL]
    for size in range(len(headings), 0, -1):
        tables = [_table(rows, headings[i : i + size]) for i in range(0, len(headings), size)]
        needed = max(console.measure(table, options=console.options.update(max_width=1000)).maximum
                     for table in tables)
        if needed <= console.width:
            break
    if needed + BESIDE <= console.width and len(tables) == 1:
        tables = [_table(rows, headings, said=True)]
    elif wrong := [row for row in rows if grade.wrong_first(row)]:
        tables.append(_table(wrong, [], said=True))
    print("Points in each notebook, and in all")
    for table in tables:
        console.print(table)
    broken = [row["learner"] for row in rows if not row["graded"]]
    print(f"{len(rows) - len(broken)} of {len(rows)} were graded."
          + (f" Not, or not in full: {', '.join(broken)}." if broken else ""))
    if left_out:
        print(_in_a_line(f"Left out, as neither notebook nor Python: {', '.join(left_out)}."))


def _table(rows, headings, said=False):
    """said: with what went wrong first, which takes the width that is left."""
    table = Table(box=box.SIMPLE_HEAD, expand=said)
    table.add_column("learner", no_wrap=True, max_width=30)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    if said:
        table.add_column("what went wrong first", ratio=1, no_wrap=bool(headings),
                         overflow="ellipsis" if headings else "fold")
    for row in rows:
        points = [_points(row, heading) for heading in headings]
        wrong = [_in_a_line(grade.wrong_first(row))] if said else []
        table.add_row(row["learner"], *points, *wrong)
    return table


def _points(row, heading):
    points = [exercise["points"] for name, exercise in row["exercises"].items()
              if heading in (ALL, name.split(".")[0])]
    return f"{sum(points)}/{len(points)}" if points or heading == ALL else ""


def _in_a_line(text):
    return "".join(c if c.isprintable() else " " for c in text)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """A line for each learner and exercise: its points, and the verdict."""
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow(["learner", "exercise", "points", "verdict"])
        for row in rows:
            for text in (*row["broken"], *row["failed"]):
                writer.writerow([row["learner"], "", "", text])
            for name, exercise in row["exercises"].items():
                writer.writerow([row["learner"], name, exercise["points"], exercise["text"]])
