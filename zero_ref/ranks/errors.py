"""How a failure gets from a rank to the caller: a Failure there, a RankError here."""

import concurrent.futures
import multiprocessing
import os
import queue
import selectors
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from traceback import FrameSummary, StackSummary

import torch

from ..engine import failure
from .output import name_of_cell

_RUNNERS = os.path.join(os.path.dirname(__file__), "")  # the files around what is launched
# Of torch, and of how a rank waits for a message, or for a worker.
_LIBRARY = (os.path.dirname(torch.__file__), os.path.dirname(concurrent.futures.__file__),
            os.path.dirname(multiprocessing.__file__), threading.__file__, queue.__file__,
            selectors.__file__, "<frozen")

JOINED = ("the process group is there already, because launch or zero_ref.init() has made it: "
          "leave out init_process_group() and zero_ref.init() in a function that launch runs")


class RankError(RuntimeError):
    """A rank failed. The text has that rank's traceback and says where the others were.

    rank: the first to fail. kind: the name of its exception's type. reason: its message.
    """

    def __init__(self, text: str, rank: int, kind: str, reason: str):
        super().__init__(text)
        self.rank, self.kind, self.reason = rank, kind, reason

    def _render_traceback_(self) -> list[str]:  # in a notebook: the learner's frames, not ours
        return str(self).splitlines()


class Stuck(RuntimeError):
    """Ranks were not done in time. finished: those that were. where: for each of the others a text,
    with its lines."""

    def __init__(self, seconds: float, finished: list[int], where: list[str]):
        super().__init__("\n".join([f"not done after {seconds:g} s", *where]))
        self.finished, self.where = finished, where


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or Kernel → Interrupt, while ranks were running. The text says where each was."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


@dataclass
class Failure:
    """An exception as plain data, that any process can read.

    when: `time.monotonic()` seconds. kind: the name of its type. reason: its message. parts: its
    traceback, as text and frames; see `formatted`.
    """

    when: float
    kind: str
    reason: str
    parts: Sequence[str | StackSummary] = ()


def failure_of(error: BaseException) -> Failure:
    """On the rank: what the caller is to hear of this exception."""
    failure.annotate(error)
    when, kind = time.monotonic(), type(error).__name__
    try:
        if "initialize the default process group twice" in str(error):
            error.args = (JOINED,)
        return Failure(when, kind, str(error), _parts(error))
    except Exception as another:  # an exception that cannot be shown
        return Failure(when, kind, f"(its message raised {type(another).__name__})")


def formatted(part: str | StackSummary) -> str:
    """Text as it is, frames with their source lines: these are looked up here, because only the
    notebook knows what is in its cells."""
    if isinstance(part, str):
        return part
    for frame in part:
        _ = frame.line
        frame.filename = name_of_cell(frame.filename)
    return "".join(traceback.format_list(part)).rstrip()


def launched_frames(stack: StackSummary) -> StackSummary:
    """What lies between the launcher and torch: the frames of the function that was launched."""
    ours = [frame.filename.startswith(_RUNNERS) for frame in stack]
    begin = ours.index(True) if True in ours else 0
    begin = ours.index(False, begin) if False in ours[begin:] else len(stack)
    end = ours.index(True, begin) if True in ours[begin:] else len(stack)  # it is printing
    return outside_libraries(stack[begin:end])


def outside_libraries(stack: Sequence[FrameSummary]) -> StackSummary:
    return StackSummary(frame for frame in stack if not frame.filename.startswith(_LIBRARY))


def _parts(error, seen=()):
    """The traceback of an exception and of those that led to it, as a list of text and frames."""
    parts, seen = [], (*seen, error)
    cause, context = error.__cause__, error.__context__
    if cause is not None and cause not in seen:
        parts += [*_parts(cause, seen), "The above was the direct cause of this:"]
    elif context is not None and not error.__suppress_context__ and context not in seen:
        parts += [*_parts(context, seen), "While that was handled, this came up:"]
    frames = StackSummary.extract(traceback.walk_tb(error.__traceback__), lookup_lines=False)
    what = "".join(traceback.format_exception_only(error)).rstrip()
    return [*parts, "Traceback (most recent call last):", launched_frames(frames), what]
