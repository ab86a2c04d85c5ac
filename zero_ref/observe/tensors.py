"""Bytes of all tensors in memory, also of those that only autograd or a collective refers to."""

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..engine import transport
from ..engine.transport import Steps
from .trace import Trace

_MARK = "zero_ref: a mark"


class Tensors:
    """Counts what is allocated and freed inside `counting()`, from one `mark()` to the next.

    trace: of this rank's collectives. device: whose memory is counted. most: the result, at each
    mark the most bytes at one time since the mark before, over what was there at the start.

    The profiler sees what this thread allocates, and when that is freed. It does not see the
    threads in which collectives run on a CPU, so what those allocate, the landing buffers, is noted
    as it is made. When in its time in flight a collective has its landing buffers is chance. All of
    them are counted for all of it: from the issue to the first mark after the rank began to wait.
    """

    def __init__(self, trace: Trace, device: torch.device):
        self.trace, self.device = trace, device
        self.most: list[int] = []
        self._landing: dict[int, int] = {}  # bytes, by the index of the collective's event
        self._in_flight: list[list[int]] = []  # at each mark, indices of events

    def mark(self) -> None:
        with record_function(_MARK):
            self._in_flight.append([i for i, event in enumerate(self.trace.events)
                                    if event.awaited is None])

    @contextmanager
    def counting(self) -> Iterator[None]:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler talks on stderr
        gc.collect()  # what is garbage now would be freed inside
        issue = transport.issue

        def noted(steps: Steps, *where: Any):
            place = len(self.trace.events) - 1, threading.get_ident()
            return issue(self._noted(steps, *place), *where)

        with (mock.patch.object(transport, "issue", noted),
              profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run):
            yield
        self._walk(run.profiler.kineto_results.events())

    def _noted(self, steps: Steps, event: int, issuer: int) -> Steps:
        """Carries out a collective, and notes what its thread allocates for it."""
        if threading.get_ident() == issuer:  # where the profiler sees it
            yield from steps
        else:
            with _Allocated() as allocated:
                yield from steps
            self._landing[event] = allocated.nbytes

    def _walk(self, events: list) -> None:
        now = most = 0
        landing = 0  # of what was in flight at the last mark
        marks = iter(self._in_flight)
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == _MARK:
                self.most.append(most + landing)
                most, landing = now, sum(self._landing.get(i, 0) for i in next(marks))
            elif event.name() == "[memory]":  # one for every allocation (+) and release (-)
                if event.device_type().name.lower() == self.device.type:
                    now += event.nbytes()
                    most = max(most, now)


class _Allocated(TorchDispatchMode):
    """nbytes: of the storages that this thread's operations have made."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = _storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        self.nbytes += sum(storage.nbytes() for key, storage in _storages(result).items()
                           if key not in given)
        return result


def _storages(tree):
    storages = [leaf.untyped_storage() for leaf in tree_leaves(tree)
                if isinstance(leaf, torch.Tensor)]
    return {storage._cdata: storage for storage in storages}
