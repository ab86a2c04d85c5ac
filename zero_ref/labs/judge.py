"""`check("4.2", answer)`: what a learner's answer does on real ranks, and what it should do."""

import functools
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, TextIO

import cloudpickle
import torch
import torch.distributed as dist

from ..course import wrapped
from ..engine import check as checking
from ..observe.kernel import tcp_bytes_sent
from ..ranks.errors import RankError, Stuck
from ..ranks.launch import launch, processes, within
from .exercise import Exercise, Mistake, Observed, Todo
from .intact import intact

_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
LIMIT = 5  # seconds for an answer, beside a few times what the solution takes: milliseconds, mostly
# Ranks of their own, since an answer that fails ends them, and with them what %%ranks cells keep.
BACKEND = "cpu:gloo"
PRINTED = 100  # lines of a rank that are shown: more take longer than the answer does


@dataclass
class Verdict:
    """What `check` answers. It shows its text, with the prose wrapped and the code as it is."""

    passed: bool
    text: str

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return "\n".join(map(_as_shown, self.text.split("\n")))


@dataclass
class Failed:
    """An answer gave no result: it raised, or was stuck. text: for the learner. reason: the
    error's own."""

    text: str
    reason: str


Outcome = list[Observed | Todo] | Failed  # of each rank


def check(name: str, answer: Any) -> Verdict:
    """Judge the answer to an exercise, a question or an ordering of lines, by its name alone: a
    function or class is run on real ranks. Never raises, except for Ctrl-C, and takes at most a few
    seconds, also if ranks wait for each other for ever."""
    try:
        return _check(name, answer)
    except Exception as error:
        return Verdict(False, f"{name} could not be judged. {type(error).__name__}: {error}")


def _check(name, answer):
    if dist.is_initialized():
        return Verdict(False, "check belongs in an ordinary cell: it starts ranks of its own, so "
                              "it does not work on a rank (in a %%ranks cell, for instance).")
    name = str(name).strip()
    from .exercises import EXERCISES
    from .ordering import ORDERINGS
    from .quiz import QUESTIONS

    if name in EXERCISES:
        return judge(name, EXERCISES[name], answer)
    if name in ORDERINGS:
        return ORDERINGS[name].judge(name, answer)
    if name in QUESTIONS:
        return _question(name, QUESTIONS[name], answer)
    names = [*EXERCISES, *ORDERINGS]
    near = [n for n in (*names, *QUESTIONS) if n.split(".")[0] == name.split(".")[0]]
    return Verdict(False, f"There is no exercise {name!r}. There are "
                          f"{', '.join(sorted(near or names))}.")


def judge(name: str, exercise: Exercise, answer: Any) -> Verdict:
    """Run the answer on each number of ranks, until something is not as the solution has it."""
    if not callable(answer):
        return Verdict(False, f"{name} takes {exercise.takes}, and got {_shown(answer)}.")
    found: list[Observed] = []
    for world_size in exercise.world_sizes:
        expected, seconds, solutions_sent = _of_solution(name, world_size)
        with _counting(world_size) as sent:
            outcome = outcome_of(exercise, world_size, answer, LIMIT + 5 * seconds)
        if isinstance(outcome, Failed):
            hint = _hint_for_error(exercise, outcome)
            return Verdict(False, "\n".join([f"{name} is not right yet{_on(world_size)}.",
                                             outcome.text, *hint]))
        if holes := [seen for seen in outcome if isinstance(seen, Todo)]:
            return Verdict(False, f"{name}: not yet. Write your own lines in place of "
                                  f"todo({str(holes[0])!r}).")
        for rank, (seen, wanted) in enumerate(zip(outcome, expected)):
            assert not isinstance(seen, Todo)
            wrong = [what for what in wanted if not same(seen.get(what), wanted[what])]
            if wrong:
                where = f"{name} is not right yet{_on(world_size)}."
                where += f" On rank {rank}:" if world_size > 1 else ""
                lines = [_difference(what, wanted[what], seen.get(what)) for what in wrong
                         if what in seen or what == wrong[0]]
                hint = _hint(name, exercise, world_size, outcome, wrong[0])
                return Verdict(False, "\n".join([where, *lines, *hint]))
        if besides := _besides(sent, solutions_sent):
            return Verdict(False, f"{name} is not right yet{_on(world_size)}.\n{besides}")
        found.append(expected[0])
    numbers = [f"{what}: {_shown(value)}" for what, value in found[0].items()
               if isinstance(value, int) and not isinstance(value, bool) and value]
    first = exercise.world_sizes[0]
    where = f" On rank 0 of {first}, " if first > 1 else " "
    facts = f"{where}{'; '.join(numbers)}." if numbers else ""
    return Verdict(True, f"{name} is right{_on(*exercise.world_sizes)}.{facts}")


def _besides(sent, solutions_sent):
    """What to say if a rank has sent more than the solution does."""
    for rank, (count, enough) in enumerate(zip(sent, solutions_sent)):
        if count > 1.2 * enough + 1000:  # names of units and agreements between ranks travel, too
            return (f"All results are right, but rank {rank} has sent {count:,} bytes, as the "
                    f"kernel counts them, and {enough:,} are enough.\nHint: Something is sent that "
                    "is not needed, and not through zero_ref.comm, which would have counted it.")
    return ""


def _on(*world_sizes):
    return f", on {' and '.join(map(str, world_sizes))} ranks" if world_sizes[0] > 1 else ""


def outcome_of(exercise: Exercise, world_size: int, answer: Any, limit: float) -> Outcome:
    """What an answer does on that many ranks. limit: seconds."""
    launch(_ready, world_size, backend=BACKEND)  # starting ranks is not the answer's time
    try:
        with _as_it_is_now(answer):
            return within(limit, _observed, world_size, exercise.observe, answer, backend=BACKEND)
    except Stuck as error:
        return Failed(_who_waits(error, world_size), "\n".join(["stuck:", *error.where]))
    except RankError as error:
        reason = f"{error.kind}: {error.reason}"
        said = f"raised {reason.removesuffix(': ')}"
        if error.kind == "ProcessDied":
            said = f"is gone: {error.reason}"
            if "SIGSEGV" in reason or "SIGBUS" in reason:
                said += ", because memory was used that had been freed"
        # What the others were at comes after the first rank's traceback.
        own = re.split(r"^rank \d+ (?:was|raised)", str(error), flags=re.MULTILINE)[1]
        who = f"Rank {error.rank}" if world_size > 1 else "Your answer"
        return Failed(f"{who} {said.rstrip('.')}.{_learners_lines(own)}", reason)


@functools.cache
def _of_solution(name: str, world_size: int) -> tuple[list[Observed], float, list[int]]:
    """What the solution does, in how many seconds, and the bytes that each rank sends."""
    from .exercises import EXERCISES

    exercise = EXERCISES[name]
    with _counting(world_size) as sent:
        start = time.monotonic()
        outcome = launch(_observed, world_size, exercise.observe, exercise.solution,
                         backend=BACKEND)
        seconds = time.monotonic() - start
    return outcome, seconds, sent


@contextmanager
def _counting(world_size: int) -> Iterator[list[int]]:
    """The bytes that each rank sends inside the block, as the kernel counts them, in a list that is
    filled when it ends; it stays empty where the kernel does not say."""
    launch(_ready, world_size, backend=BACKEND)  # with all connections made

    def counts() -> dict[int, int]:
        found = {pid: tcp_bytes_sent(pid) for pid in processes(world_size, BACKEND)}
        return {pid: count for pid, count in found.items() if count is not None}

    before, sent = counts(), list[int]()
    yield sent
    after = counts()
    if before.keys() == after.keys():
        sent += [after[pid] - before[pid] for pid in before]


@functools.cache
def _of_mistake(name: str, index: int, world_size: int) -> Outcome:
    from .exercises import EXERCISES

    exercise = EXERCISES[name]
    return outcome_of(exercise, world_size, exercise.mistakes[index].code, LIMIT)


@contextmanager
def _as_it_is_now(answer: Any) -> Iterator[None]:
    """A learner's module travels by value: ranks keep the modules that they have imported, and
    would not see what was changed in the file since."""
    module = sys.modules.get(getattr(answer, "__module__", ""))
    file = getattr(module, "__file__", None) or ""
    own = bool(file) and "site-packages" not in file and not file.startswith(_PACKAGE)
    if own:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        if own:
            cloudpickle.unregister_pickle_by_value(module)


# ---- on the ranks --------------------------------------------------------------------------------


def _ready() -> None:
    pass


def _observed(observe: Callable[[Any], Observed], answer: Any) -> Observed | Todo:
    # An earlier answer may have changed these. New memory is NaN, and not by chance what it was.
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Ranks that are about to do different things say so, instead of waiting for each other.
    with (intact(), checking.comparing(dist.group.WORLD, _checker()),
          redirect_stdout(_Beginning(sys.stdout, PRINTED))):
        try:
            return observe(answer)
        except Todo as hole:
            return hole


@functools.cache
def _checker() -> checking.Checker:
    return checking.Checker(dist.group.WORLD)


class _Beginning(io.TextIOBase):
    """Shows the first lines of what is printed, and says that more are not shown."""

    def __init__(self, out: TextIO, lines: int):
        self.out, self.lines = out, lines

    def write(self, text: str) -> int:
        if self.lines > 0:
            lines = text.splitlines(keepends=True)[: self.lines]
            self.out.write("".join(lines))
            self.lines -= text.count("\n")
            if self.lines <= 0:
                self.out.write(f"(check shows no more than {PRINTED} lines of a rank)\n")
        return len(text)


# ---- what differs, and why -----------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    """Whether two observations are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and bool(a == b)


def _hint(name, exercise, world_size, outcome, first):
    for index, mistake in enumerate(exercise.mistakes):
        if mistake.raises is not None:
            continue
        known = _of_mistake(name, index, world_size)
        if not isinstance(known, Failed) and all(
                _alike(a, b, mistake.by) for a, b in zip(known, outcome)):
            return [f"Hint: {mistake.hint}"]
    return [f"Hint: {exercise.hints[first]}"] if first in exercise.hints else []


def _alike(a: Observed | Todo, b: Observed | Todo, by: Sequence[str]) -> bool:
    assert not isinstance(a, Todo) and not isinstance(b, Todo)
    return all(same(a.get(what), b.get(what)) for what in by or a.keys() | b.keys())


def _hint_for_error(exercise: Exercise, failed: Failed) -> list[str]:
    stuck = failed.reason.startswith("stuck")
    in_collective = re.search(r'/zero_ref/comm\.py", line \d+, in wait', failed.reason)
    if stuck and "a loop without" in failed.text and not in_collective:
        return []
    known: list[Mistake] = [m for m in exercise.mistakes if m.raises is not None
                            and ("stuck" in m.raises or not stuck)  # not by its lines of code
                            and re.search(m.raises, failed.reason, re.DOTALL)]
    return [f"Hint: {known[0].hint}"] if known else []


def _as_shown(line):
    if re.match(r"    |  .*, line \d+", line):  # code, and where it is
        return line
    if not line.startswith("  ") or line == wrapped(line):
        return wrapped(line)
    expected, got, value = line.strip().partition(", got ")  # a difference, see below
    parts = [wrapped(expected + "," * bool(got), "  ", "    ")]
    return "\n".join([*parts, *[wrapped("got " + value, "    ", "    ")] * bool(got)])


def _difference(what, expected, got):
    if isinstance(expected, dict) and isinstance(got, dict):  # the weights, say
        wrong = [key for key in expected if not same(expected[key], got.get(key))]
        if not wrong:
            return f"  {what}: unexpected {', '.join(map(str, got.keys() - expected.keys()))}"
        inner = _difference(wrong[0], expected[wrong[0]], got.get(wrong[0])).strip()
        return f"  {what}: {len(wrong)} of {len(expected)} differ, the first is {inner}"
    if isinstance(expected, torch.Tensor) and isinstance(got, torch.Tensor):
        if expected.shape != got.shape or expected.dtype != got.dtype:
            return (f"  {what}: expected shape {tuple(expected.shape)} of {expected.dtype}, got "
                    f"{tuple(got.shape)} of {got.dtype}")
    if isinstance(expected, torch.Tensor) and isinstance(got, torch.Tensor) and (
            expected.numel() > 12):
        off = (expected.double() - got.double()).abs().max().item()
        return f"  {what}: differs by up to {off:.2g}"
    return f"  {what}: expected {_shown(expected)}, got {_shown(got)}"


def _shown(value):
    if isinstance(value, torch.Tensor):
        if value.numel() > 12:
            return f"a tensor of shape {tuple(value.shape)}"
        return str([round(x, 6) for x in value.flatten().tolist()]).replace(".0,", ",").replace(
            ".0]", "]")
    if isinstance(value, bool) or not isinstance(value, int):
        text = repr(value) if not isinstance(value, str) else value
        return text if len(text) <= 200 else text[:200] + "…"
    return f"{value:,}"


def _who_waits(error: Stuck, world_size: int) -> str:
    places: dict[str, list[str]] = {}
    for text in error.where:
        rank, _, place = text.partition("\n")
        places.setdefault(_learners_lines(place) or "\n" + place, []).append(rank.split()[1])
    lines = [f"After some seconds, {_ranks(ranks) if world_size > 1 else 'your answer is'} still "
             f"at{place}" for place, ranks in places.items()]
    if len(places) == 1 and not error.finished:
        return "\n".join([*lines, "This is a loop without an end, a message that nobody sends, or "
                          "one that nobody receives, because all are sending."])
    if error.finished:
        there = [str(rank) for rank in error.finished]
        had = _ranks(there).replace(" is", " had").replace(" are", " had").capitalize()
        lines.append(f"{had} finished, and will not come to what the others wait for.")
    lines.append("Every rank has to take part in each exchange and collective, in the same order.")
    return "\n".join(lines)


def _ranks(ranks):
    *most, last = ranks
    return f"ranks {', '.join(most)} and {last} are" if most else f"rank {last} is"


def _learners_lines(text):
    """The last line of an error's traceback that is not the package's, with its file and number."""
    found = re.findall(r'^  File "(.*)", line (\d+), in .*\n    (.*)$', text, re.MULTILINE)
    theirs = [(file, line, code) for file, line, code in found if "/zero_ref/" not in file]
    return f"\n  {theirs[-1][0]}, line {theirs[-1][1]}: {theirs[-1][2]}" if theirs else ""


def _question(name, question, answer):
    letter = str(answer).strip().lower()
    if answer is None:
        return Verdict(False, f"{name}: not yet. Type a letter.")
    if letter == question.right:
        return Verdict(True, f"{name} is right.")
    if letter not in question.options:
        return Verdict(False, f"{name} takes one of the letters {', '.join(question.options)}, "
                              f"and got {answer!r}.")
    return Verdict(False, f"{name}: {letter} is not right. {question.remarks[letter]}")
