"""Which units share messages: what a small message costs is the waking up of a process."""

from collections.abc import Callable, Sequence

import torch


class Bucket(tuple):
    """Units that share messages."""

    @property
    def name(self) -> str:
        return "+".join(unit.name for unit in self)


def buckets(units: Sequence, cap: float, dtype_of: Callable[..., torch.dtype]) -> list[Bucket]:
    """Neighbours of one dtype and device share messages of at most `cap` bytes; others go alone.

    The same on every rank and in every step, unlike what happens to be complete at one time.
    """
    found: list[list] = []
    room, last = 0.0, None
    for unit in units:
        nbytes = unit.padded_numel * dtype_of(unit).itemsize
        kind = dtype_of(unit), unit.flat.device
        if found and nbytes <= room and kind == last:
            found[-1].append(unit)
            room -= nbytes
        else:
            found.append([unit])
            room, last = cap - nbytes, kind
    return [Bucket(bucket) for bucket in found]
