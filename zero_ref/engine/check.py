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

_checkers = WeakValueDictionary()  # name of a group -> the Checker of the models that live there
_NUMEL = 512  # bytes of a message


def wanted() -> bool:
    """Whether the environment asks for it: ZERO_REF_CHECK=1."""
    return os.environ.get("ZERO_REF_CHECK", "0") not in ("", "0")


def timeout() -> float:
    """Seconds that a rank waits for the others: a minute, or less if collectives get less."""
    return min(60.0, float(os.environ.get("ZERO_REF_TIMEOUT", 600)))


class Checker:
    """Checks the collectives of a group for as long as a model holds it."""

    def __init__(self, group: dist.ProcessGroup):
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        # A group of its own, because NCCL carries no host memory.
        self.group = dist.new_group(dist.get_process_group_ranks(group), backend="gloo",
                                    use_local_synchronization=True)
        self.last = "nothing yet"

    def compare(self, mine: str) -> None:
        """Raises RuntimeError on every rank unless all of them are about to do the same."""
        message = torch.zeros(_NUMEL, dtype=torch.uint8)
        encoded = mine.encode()[:_NUMEL]
        message[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        answers = {r: torch.empty_like(message) for r in range(self.world_size) if r != self.rank}
        works = {r: dist.irecv(answer, group=self.group, group_src=r)
                 for r, answer in answers.items()}
        sent = [dist.isend(message, group=self.group, group_dst=r) for r in answers]
        plans = {self.rank: mine}
        for rank, work in works.items():
            try:
                work.wait(timedelta(seconds=timeout()))
            except RuntimeError:
                raise RuntimeError(
                    f"rank {rank} is missing: rank {self.rank} is about to {mine}, and for "
                    f"{timeout():g} s or because its process is gone nothing came from rank "
                    f"{rank}, which before that went to {self.last}") from None
            plans[rank] = bytes(answers[rank].tolist()).rstrip(b"\0").decode(errors="replace")
        for work in sent:
            work.wait()
        if len(set(plans.values())) > 1:
            everyone = "; ".join(f"rank {rank} to {plans[rank]}" for rank in sorted(plans))
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
