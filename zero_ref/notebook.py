"""Ranks in a notebook: `%load_ext zero_ref`, then `%%ranks 4` as a cell's first line.

The cell runs on that many ranks of this machine, each of which keeps its variables for the next
such cell and has `rank`, `world_size`, `device`, `torch` and `dist` at hand. If the last line is an
expression, every rank shows its value.
"""

import ast
import linecache
import math
import sys
import time
from contextlib import contextmanager
from itertools import chain

import torch
import torch.distributed as dist

_PATIENCE = 2.0  # seconds that a line waits for its turn
_namespace = {}  # of this rank


def load_ipython_extension(shell):
    """Called by `%load_ext zero_ref`."""
    shell.register_magic_function(_ranks, "cell", "ranks")


def fetch(name, world_size):
    """The values that a variable of `%%ranks` cells has, as a list in rank order."""
    from .launch import launch

    return launch(_value, world_size, name)


def _value(name):
    if name not in _namespace:
        raise NameError(f"no %%ranks cell has defined {name!r} on these ranks")
    return _namespace[name]


def _ranks(line, cell):
    """%%ranks N: run this cell on N ranks."""
    from IPython.core.error import UsageError

    from .launch import launch

    if not line.strip().isdecimal() or int(line) < 1:
        raise UsageError(f"%%ranks {line}: give the number of ranks, for example %%ranks 4")
    # As if the cell began with its second line, which keeps the line numbers that are shown.
    source = "\n" + cell
    name = _this_cell()
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    compile(source, name, "exec")  # a SyntaxError is shown once, before anything runs
    launch(_run_cell, int(line), source, name)


def _run_cell(source, name):
    """On every rank: run the cell in the namespace that this rank keeps."""
    if not _namespace:
        device = torch.device("cuda") if "nccl" in str(dist.get_backend_config()) else "cpu"
        _namespace.update(__name__="__main__", rank=dist.get_rank(), device=torch.device(device),
                          world_size=dist.get_world_size(), torch=torch, dist=dist)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), _namespace)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), name, "eval"), _namespace)
        if value is not None:
            print(repr(value))


# ---- what the ranks print ------------------------------------------------------------------------


@contextmanager
def output(world_size):
    """Where the launcher puts what the ranks print."""
    lines = _InOrder(world_size) if _in_notebook() else _AsTheyCome()
    try:
        yield lines
    finally:
        lines.close()


class _AsTheyCome:
    def line(self, rank, text):
        print(f"[rank {rank}] {text}", flush=True)

    def done(self, rank):
        """This rank prints nothing more."""

    def due(self):
        """When the output has something to do: never."""
        return math.inf

    def close(self):
        """Nothing is left to show."""


class _InOrder(_AsTheyCome):
    """All of rank 0's lines, then all of rank 1's, and so on, so that a notebook looks the same
    after every run. A line that has to wait long for its turn appears before it; in that case the
    cell's output is written anew at the end."""

    def __init__(self, world_size):
        self.of_rank = [[] for _ in range(world_size)]
        self.waiting = [[] for _ in range(world_size)]  # (when it came, text)
        self.running = set(range(world_size))
        self.shown = []

    def line(self, rank, text):
        self.of_rank[rank].append((rank, text))
        self.waiting[rank].append((time.monotonic(), text))
        self._show()

    def done(self, rank):
        self.running.discard(rank)
        self._show()

    def due(self):
        arrivals = [lines[0][0] for lines in self.waiting if lines]
        when = min(arrivals, default=math.inf) + _PATIENCE
        if when <= time.monotonic():
            self._show(everything=True)
            return math.inf
        return when

    def _show(self, everything=False):
        for rank, lines in enumerate(self.waiting):
            for _, text in lines:
                super().line(rank, text)
                self.shown.append((rank, text))
            lines.clear()
            if rank in self.running and not everything:
                break

    def close(self):
        self._show(everything=True)
        in_order = list(chain(*self.of_rank))
        if self.shown != in_order:
            from IPython.display import clear_output

            clear_output(wait=True)
            for rank, text in in_order:
                super().line(rank, text)


# ---- IPython -------------------------------------------------------------------------------------


def name_of_cell(filename):
    """"Cell In[3]" for the temporary name that IPython gives a cell; others as they are."""
    shell = _shell()
    name = shell and shell.compile.format_code_name(filename)
    return " ".join(name) if name else filename


def _this_cell():
    frame = sys._getframe()
    while frame.f_back and name_of_cell(frame.f_code.co_filename) == frame.f_code.co_filename:
        frame = frame.f_back
    return name_of_cell(frame.f_code.co_filename)


def _shell():
    if "IPython" not in sys.modules:
        return None
    return sys.modules["IPython"].get_ipython()


def _in_notebook():
    return hasattr(_shell(), "kernel")
