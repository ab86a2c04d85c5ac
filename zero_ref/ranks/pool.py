"""The caller's side: the rank processes, what is sent to them, and what comes back.

A fork server starts them: it has a single thread and no CUDA, so forking it is safe even from a
notebook.
"""

import math
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import pickle
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from . import rank as rank_side
from .errors import Failure, RankError, Stuck, formatted
from .output import output

# Reads what a rank sends. Grading reads what is plain data, and nothing else.
read: Callable[[bytes], Any] = pickle.loads
_GRACE = 0.5  # seconds that the other ranks get to finish once one has failed
# What the fork server imports, once for all ranks. The first optimizer of a process would import
# torch._dynamo, in more than a second.
PRELOAD = ["zero_ref", "torch._dynamo"]


class Pool:
    """`world_size` rank processes that wait for work: `run` it, and `close` the pool at last."""

    def __init__(self, world_size: int, backend: str):
        self.backend = backend
        # Where the ranks find each other: nobody but this user can open it.
        self.meeting = tempfile.TemporaryDirectory(prefix="zero_ref-")
        self.ranks: list[multiprocessing.process.BaseProcess] = []
        self.jobs: list[Connection] = []  # by rank: what is to be run, and what came of it
        self.controls: list[Connection] = []  # by rank: where it is
        self.unfinished = set(range(world_size))
        try:
            self._start(world_size)
        except BaseException:
            self.close()
            raise

    def _start(self, world_size):
        for rank in range(world_size):
            (job, job_there), (control, control_there) = Pipe(), Pipe()
            place = (rank, world_size, self.backend, self.meeting.name)
            start(rank_side.main, (*place, job_there, control_there), f"rank {rank}", self.ranks)
            job_there.close()
            control_there.close()
            self.jobs.append(job)
            self.controls.append(control)

    def alive(self) -> bool:
        return bool(self.ranks) and all(process.is_alive() for process in self.ranks)

    def close(self) -> None:
        """End the processes, whatever they are doing, and those that they have started."""
        started = [process for process in self.ranks if process.pid]
        for process in started:
            if process.is_alive():
                _end_group(process)
                process.kill()  # it may not lead its group yet
        for process in started:
            process.join()
        self.ranks = []
        self.meeting.cleanup()

    def run(self, job: bytes, seconds: float = math.inf) -> list[Any]:
        """Run a pickled (fn, args) on every rank. Returns their results in rank order.

        Raises RankError if a rank fails, and Stuck if some are not done in time. The pool is of no
        use then: close it. It closes itself if a function has destroyed the process group.
        """
        message = pickle.dumps((dict(os.environ), os.getcwd(), job))
        for to_rank in self.jobs:
            to_rank.send_bytes(message)
        results: dict[int, Any] = {}
        failures: dict[int, Failure] = {}
        self.unfinished = set(range(len(self.ranks)))
        waiting: dict[Any, int] = dict(zip(self.jobs, range(len(self.jobs))))
        deadline, group_is_there = time.monotonic() + seconds, True
        with output(len(self.ranks)) as shown:
            while waiting and time.monotonic() < deadline:
                wake = min(deadline, shown.due())
                timeout = None if wake == math.inf else max(0, wake - time.monotonic())
                for connection in wait(list(waiting), timeout):
                    rank = waiting[connection]
                    kind, value = self._receive(connection, rank)
                    if kind == "line":
                        shown.line(rank, value)
                        continue
                    shown.done(rank)
                    self.unfinished.discard(rank)
                    (failures if kind == "failed" else results)[rank] = value
                    del waiting[connection]
                    group_is_there &= kind != "left"
                    if kind == "failed":
                        deadline = min(deadline, time.monotonic() + _GRACE)
        if failures:
            raise self._error(failures, sorted(waiting.values()))
        if waiting:
            raise Stuck(seconds, sorted(results), self.where(sorted(waiting.values()), timeout=2))
        if not group_is_there:
            self.close()
        return [results[rank] for rank in sorted(results)]

    def _receive(self, connection, rank):
        try:
            message = connection.recv_bytes()
        except (EOFError, ConnectionError):
            return "failed", self._how_it_ended(rank)
        try:
            return read(message)
        except Exception as error:
            reason = f"its answer cannot be read here: {error}"
            return "failed", Failure(time.monotonic(), type(error).__name__, reason)

    def _how_it_ended(self, rank):
        self.ranks[rank].join(1)
        _end_group(self.ranks[rank])
        code = self.ranks[rank].exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return Failure(time.monotonic(), "ProcessDied", f"its process ended with {how}")

    def _error(self, failures, still_waiting):
        """A rank that died is the cause, or else the earliest failure; the others' are usually its
        consequences."""
        first, *others = sorted(failures, key=lambda rank: (failures[rank].kind != "ProcessDied",
                                                            failures[rank].when))
        cause = failures[first]
        text = [f"rank {first} raised {cause.kind}: {cause.reason}"]
        text += map(formatted, cause.parts)
        for rank in others:
            f = failures[rank]
            same = (f.kind, f.reason) == (cause.kind, cause.reason)
            text.append(f"rank {rank} raised " + ("the same" if same else f"{f.kind}: {f.reason}"))
        text += self.where(still_waiting, timeout=2)
        text.append("All ranks were ended; the next call starts new ones.")
        return RankError("\n".join(text), first, cause.kind, cause.reason)

    def where(self, ranks: Sequence[int], timeout: float) -> list[str]:
        """Where each of these ranks is. timeout: seconds, for the answers of all of them."""
        deadline, text = time.monotonic() + timeout, []
        for rank in ranks:
            with suppress(OSError):
                self.controls[rank].send("where are you?")
        for rank in ranks:
            frames = None
            with suppress(EOFError, OSError):
                if self.controls[rank].poll(max(0, deadline - time.monotonic())):
                    frames = read(self.controls[rank].recv_bytes())
            place = "  (no answer)" if frames is None else "  (between two calls)"
            text.append(f"rank {rank} was still at\n{formatted(frames) if frames else place}")
        return text


def start(target: Callable, args: tuple, name: str,
          among: list | None = None) -> multiprocessing.process.BaseProcess:
    """Fork a process, from a server where it is possible. among: takes it before it starts."""
    context: Any = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    if os.name == "posix":
        context.set_forkserver_preload(PRELOAD)
        multiprocessing.resource_tracker.ensure_running()  # it would unblock the signal
        with _no_interrupt(), _nameless_main():
            multiprocessing.forkserver.ensure_running()
    process = context.Process(target=target, args=args, name=name)
    if among is not None:
        among.append(process)
    with _nameless_main():
        process.start()
    return process


def _end_group(process):
    """End a rank and the workers that it has started. Its number may be another's after a while, so
    not long after its death."""
    if os.name == "posix":
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def _no_interrupt():
    """The fork server inherits this: Ctrl-C while it imports torch would end it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _nameless_main():
    """Keep multiprocessing from running the caller's script again in every rank: whatever a rank
    needs of it travels by value."""
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
