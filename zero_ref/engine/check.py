"""Before every collective, compare what each rank is about to do: `zero_ref.wrap(…, check=True)`.

Ranks that take different branches wait for each other until the group's timeout, half an hour by
default, and then only one of them may say why. With checking on, every rank first tells the others
its next collective, and all of them learn at once who is where. It costs one small message to each
other rank before each collective.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

from . import transport

_checkers = WeakValueDictionary()  # name of a group -> the Checker of the models that live there
_NUMEL = 512  # bytes of a message
_TAG = 1915  # of messages, see transport.py


def wanted() -> bool:
    """Whether the environment asks for it: ZERO_REF_CHECK=1."""
    return os.environ.get("ZERO_REF_CHECK", "0") not in ("", "0")


def timeout() -> float:
    """Seconds that a rank waits for the others: a minute, or less if collectives get less."""
    return min(60.0, float(os.environ.get("ZERO_REF_TIMEOUT", 600)))


class Checker:
    """Checks the collectives of a group for as long as a model holds it."""

    def __init__(self, group: dist.ProcessGroup):
        self.rank, self.world_size = group.rank(), group.size()
        # NCCL carries no host memory. Another group of gloo's would have a thread of its own, which
        # polls, in each rank.
        self.group = group if transport.on_gloo(torch.device("cpu"), group) else dist.new_group(
            dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)
        self.last = "nothing yet"

    def compare(self, mine: str) -> None:
        """Raises RuntimeError on every rank unless all of them are about to do the same."""
        said = torch.zeros(self.world_size, _NUMEL, dtype=torch.uint8)  # by rank
        encoded = bytearray(mine.encode()[:_NUMEL])
        said[self.rank, : len(encoded)] = torch.frombuffer(encoded, dtype=torch.uint8)
        others, seconds = [r for r in range(self.world_size) if r != self.rank], timeout()
        works = {r: self.group.recv([said[r]], r, _TAG) for r in others}
        sent = [self.group.send([said[self.rank]], r, _TAG) for r in others]
        for rank, work in works.items():
            try:
                work.wait(timedelta(seconds=seconds))
            except RuntimeError:
                raise RuntimeError(
                    f"rank {rank} is missing: rank {self.rank} is about to {mine}, and for "
                    f"{seconds:g} s or because its process is gone nothing came from rank "
                    f"{rank}, which before that went to {self.last}") from None
        for work in sent:
            work.wait()
        if not torch.equal(said[1:], said[:-1]):
            plans = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in said]
            everyone = "; ".join(f"rank {rank} to {plan}" for rank, plan in enumerate(plans))
            raise RuntimeError(f"the ranks diverge, they are about to do different things: "
                               f"{everyone}; before that all went to {self.last}")
        self.last = mine


def checker(group: dist.ProcessGroup) -> Checker:
    """The group's checker, a new one if it has none. Called by all its ranks."""
    found = _checkers.get(group.group_name)
    if found is None:
        found = _checkers[group.group_name] = Checker(group)
    return found


@contextmanager
def comparing(group: dist.ProcessGroup, checker: Checker) -> Iterator[None]:
    """Check the group's collectives with this checker until the block ends."""
    _checkers[group.group_name] = checker
    try:
        yield
    finally:
        del _checkers[group.group_name]


def compare(group: dist.ProcessGroup, op: str, unit: str, phase: str, numel: int,
            dtype: torch.dtype) -> None:
    """Called by comm.py before each collective."""
    if _checkers and group.group_name in _checkers:
        # The texts of an all_gather_object may differ in length.
        size = "" if op == "all_gather_object" else f", {numel:,} elements of {dtype}"
        _checkers[group.group_name].compare(f"{op} {unit!r} in phase {phase!r}{size}")
