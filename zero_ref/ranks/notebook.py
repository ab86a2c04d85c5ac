"""Ranks in a notebook: `%load_ext zero_ref`, then `%%ranks 4` as a cell's first line.

The cell runs on that many ranks of this machine, each of which keeps its variables for the next
such cell and has `rank`, `world_size`, `device`, `torch` and `dist` at hand. If the last line is an
expression, every rank shows its value.
"""

import ast
import linecache
import sys
import types
from typing import Any

import torch
import torch.distributed as dist

from .launch import launch
from .output import owning_the_cell, this_cell

_main = types.ModuleType("__main__")  # of this rank
_namespace = vars(_main)


def load_ipython_extension(shell: Any) -> None:
    """Called by `%load_ext zero_ref`."""
    shell.register_magic_function(_ranks, "cell", "ranks")


def fetch(name: str, world_size: int) -> list[Any]:
    """The values that a variable of `%%ranks` cells has, as a list in rank order. Each number of
    ranks has processes, and so variables, of its own. Raises RankError if there is none."""
    return launch(_value, world_size, name)


def _value(name: str) -> Any:
    if name not in _namespace:
        raise NameError(f"no %%ranks cell has defined {name!r} on these ranks")
    return _namespace[name]


def _ranks(line: str, cell: str) -> None:
    """%%ranks N: run this cell on N ranks."""
    from IPython.core.error import UsageError

    if not line.strip().isdecimal() or int(line) < 1:
        raise UsageError(f"%%ranks {line}: give the number of ranks, for example %%ranks 4")
    # As if the cell began with its second line, which keeps the line numbers that are shown.
    source = "\n" + cell
    name = this_cell()
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    try:
        compile(source, name, "exec")  # once, before anything runs
    except SyntaxError as error:
        line_of_it = (error.text or "").strip()
        raise UsageError(f"{name}, line {error.lineno}: {error.msg}: {line_of_it}\n(magics, ! and "
                         "await do not work in a %%ranks cell)") from None
    with owning_the_cell():
        launch(_run_cell, int(line), source, name)


def _run_cell(source: str, name: str) -> None:
    """On every rank: run the cell in the namespace that this rank keeps."""
    sys.modules["__main__"] = _main  # where pickle looks for the classes of such cells
    on_gpu = "nccl" in str(dist.get_backend_config())
    _namespace.update(rank=dist.get_rank(), world_size=dist.get_world_size(), torch=torch,
                      dist=dist, device=torch.device("cuda" if on_gpu else "cpu"))
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    tree = ast.parse(source, name)
    shown = tree.body and isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(";")
    last = tree.body.pop() if shown else None
    exec(compile(tree, name, "exec"), _namespace)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), name, "eval"), _namespace)
        if value is not None:
            print(repr(value))
