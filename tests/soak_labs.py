"""Wrong answers, made from the exercises' solutions by one change each: `check` has to reject them.

    python tests/soak_labs.py                     all exercises
    python tests/soak_labs.py --only 4.2 --show   what the changes are, without running them

The changes are those of mutate.py (operators, numbers, calls that are left out), and statements and
keyword arguments that are left out, `rank` for `world_size`, and `left` for `right`. Exits with 1
if fewer than 95 % are rejected. Takes about ten minutes, and is not part of `make test`.
"""

import argparse
import ast
import inspect
import sys
import textwrap
import time
from datetime import date
from pathlib import Path
from typing import ClassVar

import torch
from mutate import Finder

from zero_ref.labs import judge
from zero_ref.labs.exercises import EXERCISES

ENOUGH = 0.95
TITLE = """# Do the exercises' checks reject wrong answers?

`make soak` changes the solution of each exercise in one place at a time, and lets `check` judge
the result. The changes that leave an answer right are listed below the table, with the reason. (The
wrong answers that people give are another matter: `make test` looks at whether each gets its own
hint, see [what the tests check](tests.md).)"""
# Of a class of which the learner writes only a part.
METHODS = {"2.1": {"start"}, "2.2": {"reduce"}, "6.1": {"own", "gather", "free"}}
# Changes after which an answer is still right, or wrong in a way in which nobody could see it:
# (exercise, line, change) and why.
EQUIVALENT = {
    ("1.1", "came = torch.empty_like(slices[0])", "0 -> 1"): "all slices have one size",
    ("1.3", "parts = {r: torch.empty_like(slices[0]) for r in others}", "0 -> 1"):
        "all slices have one size",
    ("3.2", "flat = params[0].new_zeros(numel + -numel % world_size, requires_grad=False)",
     "0 -> 1"): "all parameters of a layer have one dtype",
    ("7.5", "if low < high:", "< -> <="): "then nothing is read",
    ("11.8", "unit.params = list(unit.layer.parameters())", "a statement -> pass"):
        "the unit was made with these parameters",
    ("11.8", "unit.flat = small.flatten(unit.params, self.world_size)", "a statement -> pass"):
        "the unit was made with a buffer of this size",
    ("11.10", "return largest.item() > 10", "> -> >="): "no loss is exactly 10",
}


class MoreChanges(ast.NodeVisitor):
    """Statements and keyword arguments that are left out, and one name for another."""

    NAMES: ClassVar = {"rank": "world_size", "world_size": "rank", "left": "right", "right": "left",
             "flat": "grad", "grad": "flat"}

    def __init__(self, finder):
        self.finder = finder
        self.visit(ast.parse(finder.text))

    def replace(self, node, new, change):
        self.finder.add(self.finder.start(node), self.finder.end(node), new, change)

    def visit_Assign(self, node):
        self.replace(node, "pass", "a statement -> pass")
        self.generic_visit(node)

    visit_AugAssign = visit_Assign

    def visit_Call(self, node):
        for keyword in node.keywords:
            if keyword.arg == "divide_by":
                self.replace(keyword, "", "divide_by=… is left out")
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("clone", "contiguous"):
            self.replace(node, ast.unparse(node.func.value), f".{node.func.attr}() is left out")
        self.generic_visit(node)

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Load) and node.id in self.NAMES:
            self.replace(node, self.NAMES[node.id], f"{node.id} -> {self.NAMES[node.id]}")

    def visit_Return(self, node):
        if node.value is not None:
            self.replace(node, "return None", "return … -> return None")
        self.generic_visit(node)

    def visit_FunctionDef(self, node):
        for default in node.args.defaults:
            self.visit(default)
        for statement in node.body:
            self.visit(statement)


def mutants_of(name):
    """(Mutant, the changed source) of an exercise's solution."""
    solution = EXERCISES[name].solution
    text = textwrap.dedent(inspect.getsource(solution))
    finder = Finder("solution.py", text)
    finder.gpu = False
    MoreChanges(finder)
    lines = _lines_of_methods(text, METHODS.get(name))
    doc = {node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr)
           and isinstance(node.value, ast.Constant)}
    seen = {text}
    for mutant in sorted(finder.found, key=lambda mutant: mutant.start):
        changed = mutant.apply(text)
        if mutant.line in doc or (lines and mutant.line not in lines) or changed in seen:
            continue
        seen.add(changed)
        try:
            compile(changed, "mutant", "exec")
        except SyntaxError:
            continue
        yield mutant, changed


def _lines_of_methods(text, methods):
    return {line for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)
            and methods and node.name in methods
            for line in range(node.lineno, (node.end_lineno or 0) + 1)}


def made(name, source):
    """The answer that this source defines, with everything at hand that the solution has."""
    solution = EXERCISES[name].solution
    namespace = dict(vars(sys.modules[solution.__module__]), __name__="answer")
    exec(compile(source, "answer", "exec"), namespace)
    return namespace[solution.__name__]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(EXERCISES), metavar="NAME")
    parser.add_argument("--show", action="store_true", help="print the changes, run nothing")
    parser.add_argument("--table", type=Path, metavar="OUT", help="write the table to this file")
    args = parser.parse_args()
    rows, alive = [], []
    for name in args.only:
        rejected = equivalent = total = 0
        start = time.monotonic()
        for mutant, source in mutants_of(name):
            place = (name, mutant.source, mutant.change)
            if args.show:
                print(*place, sep="  |  ")
                continue
            total += 1
            if place in EQUIVALENT:
                equivalent += 1
                continue
            if judge.judge(name, EXERCISES[name], made(name, source)).passed:
                alive.append(place)
                print("not rejected:", *place, sep="  |  ", flush=True)
            else:
                rejected += 1
        rows.append((name, total, equivalent, rejected))
        print(f"{name}: {rejected} of {total - equivalent} rejected, {equivalent} equivalent, "
              f"{time.monotonic() - start:.0f} s", flush=True)
    if args.show:
        return
    table = ["| exercise | changes | still right | rejected | of the others |",
             "|---|---|---|---|---|"]
    for name, total, equivalent, rejected in rows:
        share = rejected / max(total - equivalent, 1)
        table.append(f"| {name} | {total} | {equivalent} | {rejected} | {share:.0%} |")
    total, equivalent, rejected = (sum(row[i] for row in rows) for i in (1, 2, 3))
    share = rejected / max(total - equivalent, 1)
    table.append(f"| all | {total} | {equivalent} | {rejected} | {share:.1%} |")
    print("\n".join(table))
    if args.table:
        when = f"{date.today():%Y-%m-%d}, torch {torch.__version__}"
        reasons = [f"- {name}, `{line}`, {change}: {why}"
                   for (name, line, change), why in EQUIVALENT.items()]
        page = [TITLE, "", f"Run on {when}.", "", *table, "", *reasons, ""]
        args.table.write_text("\n".join(page))
    sys.exit(share < ENOUGH)


if __name__ == "__main__":
    main()
