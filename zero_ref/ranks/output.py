"""Where the launcher puts what the ranks print, and what a notebook calls its cells."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

_TIMEOUT = 2.0  # seconds that a line waits for its turn
_cell_is_ours = False


@contextmanager
def owning_the_cell() -> Iterator[None]:
    """Inside, all that the notebook's cell shows comes from ranks, so it may be written anew."""
    global _cell_is_ours
    _cell_is_ours = True
    try:
        yield
    finally:
        _cell_is_ours = False


@contextmanager
def output(world_size: int) -> Iterator["_AsTheyCome"]:
    """Where the launcher puts what the ranks print."""
    lines = _InOrder(world_size) if _in_notebook() else _AsTheyCome()
    try:
        yield lines
    finally:
        lines.close()


class _AsTheyCome:
    def line(self, rank: int, text: str) -> None:
        self.print(rank, text, flush=True)

    def print(self, rank: int, text: str, flush: bool = False) -> None:
        print(f"[rank {rank}] {text}", flush=flush)

    def done(self, rank: int) -> None:
        """This rank prints nothing more."""

    def due(self) -> float:
        """When the output has something to do: never."""
        return math.inf

    def close(self) -> None:
        """Nothing is left to show."""


class _InOrder(_AsTheyCome):
    """All of rank 0's lines, then all of rank 1's, and so on, so that a notebook looks the same
    after every run. A line that has to wait long for its turn appears before it; in that case a
    %%ranks cell's output is written anew at the end."""

    def __init__(self, world_size: int):
        self.of_rank: list[list[tuple[int, str]]] = [[] for _ in range(world_size)]
        # When each line came, and its text.
        self.waiting: list[list[tuple[float, str]]] = [[] for _ in range(world_size)]
        self.running = set(range(world_size))
        self.shown: list[tuple[int, str]] = []

    def line(self, rank: int, text: str) -> None:
        self.of_rank[rank].append((rank, text))
        self.waiting[rank].append((time.monotonic(), text))
        self._show()

    def done(self, rank: int) -> None:
        self.running.discard(rank)
        self._show()

    def due(self) -> float:
        arrivals = [lines[0][0] for lines in self.waiting if lines]
        when = min(arrivals, default=math.inf) + _TIMEOUT
        if when <= time.monotonic():
            self._show(everything=True)
            return math.inf
        return when

    def _show(self, everything=False):
        for rank, lines in enumerate(self.waiting):
            for _, text in lines:
                self.print(rank, text)  # not flushed: one message for many lines
                self.shown.append((rank, text))
            lines.clear()
            if rank in self.running and not everything:
                break

    def close(self) -> None:
        self._show(everything=True)
        in_order = list(chain(*self.of_rank))
        if _cell_is_ours and self.shown != in_order:
            from IPython.display import clear_output

            clear_output(wait=True)
            for rank, text in in_order:
                self.print(rank, text)


# ---- IPython -------------------------------------------------------------------------------------


def name_of_cell(filename: str) -> str:
    """"Cell In[3]" for the temporary name that IPython gives a cell; others as they are."""
    shell = _shell()
    name = shell and shell.compile.format_code_name(filename)
    return " ".join(name) if name else filename


def this_cell() -> str:
    """The name of the cell that is running."""
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
