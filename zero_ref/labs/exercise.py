"""What an exercise consists of, and the hole that a learner fills."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# What a rank has observed of an answer: by name, numbers, texts, tensors, or lists and dicts of
# them.
Observed = dict[str, Any]


class Todo(Exception):
    """An answer came to a place that is still to be written."""


def todo(what: str = "") -> Any:
    """Stands where learners write their own lines. what: how much is to be written."""
    raise Todo(what)


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that people give, and what to say about it.

    code: the answer. raises: if it fails, a regular expression for its error's text; for one that
    is stuck that is "stuck: " and where each rank was. by: which observations tell it from other
    answers, if not all of them have to be the same.
    """

    code: Any
    hint: str
    raises: str | None = None
    by: Sequence[str] = ()


@dataclass(frozen=True)
class Exercise:
    """observe: runs an answer on every rank, and says what came of it. It has to be the same as
    what the solution gives. takes: what an answer is. hints: for an observation that differs, when
    it is none of the known mistakes."""

    takes: str
    observe: Callable[[Any], Observed]
    solution: Any
    mistakes: Sequence[Mistake]
    hints: Mapping[str, str] = field(default_factory=dict)
    world_sizes: Sequence[int] = (4, 3)
