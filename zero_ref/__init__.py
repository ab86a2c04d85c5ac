"""zero_ref: ZeRO stages 1-3, step by step on top of data parallelism.

Read comm, partition, stage0, stage1, stage2, stage3, in this order.
"""

from itertools import zip_longest

import torch.distributed as dist

from . import comm
from .engine import agreement
from .engine.precision import GradScaler, MixedPrecision, own_precision
from .observe import memory
from .observe.trace import trace
from .partition import partition
from .ranks.launch import RankError, init, launch
from .ranks.notebook import load_ipython_extension
from .stage0 import Stage0, wrapped
from .stage1 import Stage1
from .stage2 import Stage2
from .stage3 import Stage3

__all__ = ["GradScaler", "MixedPrecision", "RankError", "Stage0", "Stage1", "Stage2", "Stage3",
           "init", "launch", "load_ipython_extension", "memory", "trace", "wrap"]
__version__ = "0.1.0"

_STAGES = {0: Stage0, 1: Stage1, 2: Stage2, 3: Stage3}


def wrap(module, stage, *, units=None, process_group=None, mixed_precision=None,
         reshard_after_forward=True, overlap=True, check=False):
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
    problem = parts = None
    try:
        parts = _plan(module, stage, units, mixed_precision, group)
    except ValueError as error:
        problem = error
    # Everyone hears of everyone's plan or problem before anything else is sent, so that a mistake
    # on one rank is an error on all ranks, and not a wait for ever.
    checked = bool(check) or agreement.wanted()
    _agree((stage, reshard_after_forward, repr(mixed_precision), checked), module, parts, problem,
           group)
    options = {"overlap": overlap, "mixed_precision": mixed_precision, "checked": checked}
    if stage == 3:
        options["reshard_after_forward"] = reshard_after_forward
    return _STAGES[stage](module, parts, group, **options)


def _plan(module, stage, units, mixed_precision, group):
    if type(stage) is not int or stage not in _STAGES:
        raise ValueError(f"stage={stage!r}: must be 0, 1, 2 or 3")
    for name, m in module.named_modules():
        if isinstance(m, Stage0) or m in wrapped:
            what = f"submodule {name!r} of this" if name else "this"
            raise ValueError(f"{what} {type(module).__name__} is wrapped already: build a new one")
    if not isinstance(mixed_precision, MixedPrecision | None):
        raise ValueError(f"mixed_precision={mixed_precision!r}: give a zero_ref.MixedPrecision")
    precision_of = mixed_precision.of if mixed_precision is not None else own_precision
    return partition(module, units, precision_of, dist.get_rank(group), dist.get_world_size(group))


def _agree(options, module, parts, problem, group):
    """Raise the same ValueError on every rank unless all of them plan to do the same."""
    plan = [("stage, reshard_after_forward, mixed_precision, check =", *options)]
    for unit in parts or []:
        plan += [(name, tuple(p.shape), str(p.dtype), unit.name)
                 for name, p in zip(unit.names, unit.params)]
    plan += [("buffer", name, tuple(b.shape), str(b.dtype)) for name, b in module.named_buffers()]
    plans = comm.all_gather_object((problem and str(problem), plan), group, phase="init")
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
