"""zero_ref: ZeRO stages 1-3, step by step on top of data parallelism.

Read comm, partition, stage0, stage1, stage2, stage3, in this order.
"""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn

from .checkpoint.folder import NoCheckpoint
from .checkpoint.loading import load
from .checkpoint.saving import save
from .engine import agreement
from .engine import check as checking
from .engine.precision import GradScaler, MixedPrecision, own_precision
from .engine.shell import wrapped
from .observe import memory
from .observe.recorder import record
from .observe.trace import trace
from .partition import lay_out
from .ranks.launch import RankError, init, launch
from .ranks.notebook import load_ipython_extension
from .ranks.stopping import on_sigterm
from .stage0 import Stage0
from .stage1 import Stage1
from .stage2 import Stage2
from .stage3 import Stage3

__all__ = ["GradScaler", "MixedPrecision", "NoCheckpoint", "RankError", "Stage0", "Stage1",
           "Stage2", "Stage3", "compare", "init", "launch", "load", "load_ipython_extension",
           "memory", "on_sigterm", "record", "save", "trace", "wrap"]
__version__ = "0.1.0"

_STAGES = {0: Stage0, 1: Stage1, 2: Stage2, 3: Stage3}


def wrap(module: nn.Module, stage: int, *,
         units: type | tuple[type, ...] | Callable[[nn.Module], bool] | None = None,
         process_group: dist.ProcessGroup | None = None,
         mixed_precision: MixedPrecision | None = None, reshard_after_forward: bool = True,
         overlap: bool = True, check: bool = False, bucket_cap_mb: float = 1) -> Stage0:
    """Train `module` in data parallel at ZeRO stage 0, 1, 2 or 3. Called on every rank.

    units: which submodules are gathered, reduced and freed together: a module class, a tuple of
        them, or a predicate. Default: each child with parameters of the outermost nn.ModuleLists
        and nn.Sequentials. What no unit contains belongs to the root.
    process_group: the ranks that share the module; default: all of them.
    mixed_precision: a MixedPrecision, for 16-bit computation with fp32 updates.
    reshard_after_forward: stage 3 only. False keeps the parameters gathered between a unit's
        forward and backward: 2Ψ instead of 3Ψ elements sent, for the memory of the whole model.
    overlap: whether the module goes on computing while gradients are reduced and, at stage 3, while
        the next unit's parameters are gathered. The result has the same bits.
    bucket_cap_mb: neighbouring units share messages of at most this size (1 MB is 2**20 bytes);
        larger units go alone. 0: a message per unit. The result has the same bits.
    check: before every collective, compare what each rank is about to do, and say who is where if
        they differ. ZERO_REF_CHECK=1 in the environment does the same.

    Rank 0's initial values are broadcast. A module on the meta device gets its memory unit by unit,
    and its values from reset_parameters() and _init_weights(module).

    Build the optimizer from `model.parameters()`. From stage 1 on these are 1-D pieces: sort them
    into groups by name, not by shape; clip with `model.clip_grad_norm_`; write values inside
    `model.full_params()`. A parameter that no rank uses gets no gradient; one that some ranks use
    counts as zero on the others. After zero_grad() the next backward writes its gradients into the
    same memory: clone what is to be kept.

    Returns a Stage0, Stage1, Stage2 or Stage3. Raises ValueError for an argument or a module that
    does not fit, also if it differs between the ranks, and RuntimeError without a process group.
    """
    if not dist.is_initialized():
        raise RuntimeError("no process group: call zero_ref.init() in a script started by "
                           "torchrun, or run this function through zero_ref.launch(fn, world_size)")
    group = process_group or dist.group.WORLD
    problem, units_found = None, []
    try:
        units_found = _plan(module, stage, units, mixed_precision, bucket_cap_mb, group)
    except ValueError as error:
        problem = error
    # Everyone hears of everyone's plan or problem before anything else is sent, so that a mistake
    # on one rank is an error on all ranks, and not a wait for ever.
    options: dict[str, Any] = {"overlap": overlap, "mixed_precision": mixed_precision,
                               "checked": bool(check) or checking.wanted(),
                               "bucket_cap_mb": bucket_cap_mb}
    if stage == 3:
        options["reshard_after_forward"] = reshard_after_forward
    agreement.agree({"stage": stage, **options}, module, units_found, problem, group)
    return _STAGES[stage](module, units_found, group, **options)


def _plan(module, stage, units, mixed_precision, bucket_cap_mb, group):
    if type(stage) is not int or stage not in _STAGES:
        raise ValueError(f"stage={stage!r}: must be 0, 1, 2 or 3")
    for name, m in module.named_modules():
        if isinstance(m, Stage0) or m in wrapped:
            what = f"submodule {name!r} of this" if name else "this"
            raise ValueError(f"{what} {type(module).__name__} is wrapped already: build a new one")
    if not isinstance(mixed_precision, MixedPrecision | None):
        raise ValueError(f"mixed_precision={mixed_precision!r}: give a zero_ref.MixedPrecision")
    precision_of = mixed_precision.of if mixed_precision is not None else own_precision
    if not isinstance(bucket_cap_mb, int | float) or not bucket_cap_mb >= 0:
        raise ValueError(f"bucket_cap_mb={bucket_cap_mb!r}: must be a number of MB, 0 or more")
    found = lay_out(module, units, precision_of, dist.get_rank(group), dist.get_world_size(group))
    if all(unit.numel == 0 or (unit.frozen and stage < 3) for unit in found):
        raise ValueError(f"{type(module).__name__} has no trainable parameters, so stage {stage} "
                         "has nothing to do: use the module as it is, or give at least one "
                         "parameter requires_grad=True. Stage 3 shards frozen parameters, too")
    return found


def __getattr__(name):
    if name == "compare":  # imported only when it is asked for: it draws, and prints tables
        from .commands.compare import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
