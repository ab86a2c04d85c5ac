"""Record every collective that this process issues: `with zero_ref.trace() as t: ...`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_active: list["Trace"] = []


@dataclass
class Event:
    """One collective, as one rank saw it.

    numel: elements of the whole buffer. bytes: the same in bytes. wire_bytes: what this rank has
    to send. start, awaited, end: `time.monotonic()` seconds at which it was issued, at which the
    rank came to need its result, and at which that was there (None before; on CUDA the host's
    times). From awaited to end, should end be later, the rank stood still.
    """

    rank: int
    op: str
    unit: str
    phase: str
    numel: int
    dtype: torch.dtype
    bytes: int
    wire_bytes: int
    start: float
    awaited: float | None = None
    end: float | None = None


class Trace:
    """The events recorded inside one `with zero_ref.trace()` block, in the order of issue."""

    def __init__(self):
        self.events: list[Event] = []

    def add(self, event: Event) -> None:
        self.events.append(event)

    def wire_bytes(self) -> int:
        """Bytes that this rank had to send, over all recorded events."""
        return sum(event.wire_bytes for event in self.events)


@contextmanager
def trace() -> Iterator[Trace]:
    """Record this process's collectives until the block ends; traces may be nested."""
    with recording_into(Trace()) as recording:
        yield recording


@contextmanager
def recording_into(recording: Trace) -> Iterator[Trace]:
    """Add to `recording` what this process issues until the block ends."""
    _active.append(recording)
    try:
        yield recording
    finally:
        _active.remove(recording)


def begin(**facts: Any) -> Event | None:
    """Called by comm.py when a collective is issued. Returns None while nobody is recording."""
    if not _active:
        return None
    event = Event(**facts, start=time.monotonic())
    for recording in _active:
        recording.add(event)
    return event


def awaited(event: Event | None) -> None:
    """Called by comm.py when the rank starts to wait for the collective's result."""
    if event is not None and event.awaited is None:
        event.awaited = time.monotonic()


def end(event: Event | None) -> None:
    """Called by comm.py when the collective's result can be used."""
    if event is not None:
        event.end = time.monotonic()


def loopback_bytes() -> int | None:
    """Bytes that this machine has sent to itself, as the kernel counts them; None if unknown."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return None
    loopback = [line.split() for line in lines if line.strip().startswith("lo:")]
    return int(loopback[0][9]) if loopback else None
