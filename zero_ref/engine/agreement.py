"""Before a model is wrapped, all ranks hear of everyone's plan."""

from collections.abc import Sequence
from itertools import zip_longest

import torch.distributed as dist
from torch import nn

from .. import comm
from ..partition import Unit


def agree(options: dict, module: nn.Module, units: Sequence[Unit],
          problem: ValueError | None, group: dist.ProcessGroup) -> None:
    """Raise the same ValueError on every rank unless all of them plan to do the same."""
    plan: list[tuple] = [(f"{name} =", repr(value)) for name, value in options.items()]
    for unit in units:
        plan += [(name, str(tuple(p.shape)), str(p.dtype), unit.name)
                 for name, p in zip(unit.names, unit.params)]
    plan += [("buffer", name, str(tuple(b.shape)), str(b.dtype))
             for name, b in module.named_buffers()]
    plans = comm.all_gather_json((problem and str(problem), plan), group, phase="init")
    if problem:
        raise problem
    for rank, (other_problem, _) in enumerate(plans):
        if other_problem:
            raise ValueError(f"rank {rank} reports: {other_problem}")
    for rank, (_, other) in enumerate(plans):
        for mine, theirs in zip_longest(plans[0][1], other):
            if mine != theirs:
                raise ValueError("the module differs between the ranks, first here: rank 0 has "
                                 f"{_say(mine)}, rank {rank} has {_say(theirs)}")


def _say(entry):
    return "nothing more" if entry is None else " ".join(map(str, entry))
