"""Bytes of parameters, gradients and optimizer states per rank: by formula, and as measured."""

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from ..engine.precision import MixedPrecision

from ..engine.shell import Shell
from ..engine.slices import without_marks
from ..partition import Layout


def model_states(numel: float | Sequence[Sequence[int]], world_size: int, stage: int, *,
                 rank: int = 0, param_dtype: torch.dtype = torch.float32,
                 grad_dtype: torch.dtype = torch.float32,
                 optimizer_dtypes: Sequence[torch.dtype] = (torch.float32, torch.float32),
                 mixed_precision: "MixedPrecision | None" = None) -> dict[str, int]:
    """What one rank keeps between steps, in bytes, as the paper computes it.

    numel: the number of parameters Ψ, as in the paper, or for a live model a list of units, each a
        list of its parameters' sizes in elements, for instance `unit.sizes`: the padding of
        its flat buffer is counted then. optimizer_dtypes: one per state that the optimizer keeps
        for each element; the default is fp32 Adam (exp_avg, exp_avg_sq). The paper's
        mixed-precision Adam is param_dtype=grad_dtype=torch.float16 and three fp32 states (master
        copy, exp_avg, exp_avg_sq): K = 12. Optimizer states have no padding, so they may depend on
        `rank`.
    mixed_precision: a zero_ref.MixedPrecision, in place of these two dtypes: what this package
        keeps for a module in fp32 that is wrapped with it. The master copy counts as an optimizer
        state, with padding. The optimizer wants gradients in fp32 too, so there are those of what
        the rank owns beside the reduced ones, unless reduce_dtype is fp32 already.

    Returns {"parameters": …, "gradients": …, "optimizer": …}.
    Rajbhandari et al., ZeRO, arXiv 1910.02054, section 5 and figure 1.
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"stage={stage!r}: must be 0, 1, 2 or 3")
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank={rank}, world_size={world_size}: must be 0 <= rank < world_size")
    if mixed_precision is not None:
        param_dtype, grad_dtype = mixed_precision.param_dtype, mixed_precision.reduce_dtype
    if isinstance(numel, Sequence):
        narrowest = min(param_dtype.itemsize, grad_dtype.itemsize)
        if mixed_precision is not None:  # of a module in fp32
            narrowest = min(narrowest, torch.float32.itemsize)
        units = [Layout(sizes, world_size, narrowest) for sizes in numel]
        full, own = sum(u.padded_numel for u in units), sum(u.shard_numel for u in units)
        spans = [u.span(index, rank) for u in units for index in range(len(u.sizes))]
        updated = sum(u.numel for u in units) if stage == 0 else sum(e - b for b, e in spans)
    else:
        full, own = int(numel), -(-int(numel) // world_size)
        updated = full if stage == 0 else min(max(full - rank * own, 0), own)
    master = full if stage == 0 else own
    kept = {"parameters": (own if stage >= 3 else full) * param_dtype.itemsize,
            "gradients": (own if stage >= 2 else full) * grad_dtype.itemsize,
            "optimizer": updated * sum(dtype.itemsize for dtype in optimizer_dtypes)}
    if param_dtype != torch.float32 and mixed_precision is not None:
        kept["optimizer"] += master * torch.float32.itemsize
        kept["gradients"] += master * torch.float32.itemsize if grad_dtype != torch.float32 else 0
    return kept


@without_marks()
def resident(model: nn.Module,
             optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
    """The same three sums, measured: the sizes of the storages that are alive, each counted once.

    model: what `zero_ref.wrap` returned, or any nn.Module. A wrapped model keeps the memory of its
    gradients from its first backward on, also after zero_grad(). What the optimizer keeps once per
    tensor (its step count, say) and not per element is left out, as are buffers and activations.
    With mixed precision the master copy counts as an optimizer state.
    """
    units = getattr(model, "units", []) if isinstance(model, Shell) else []
    masters = [unit.master for unit in units if unit.mixed]
    params = [] if units else list(model.parameters())
    grads = [p.grad for p in model.parameters()]
    for unit in units:
        params += [unit.flat, unit.shard, *unit.params]
        grads += unit.kept_grads.values()
    if (backward := getattr(model, "_backward", None)) is not None:
        grads += backward.grads.values()
        for _, reduced, _ in backward.in_flight:
            grads += reduced
    grads += [p.grad for p in params if p is not None]
    states = [value for p, state in (optimizer.state.items() if optimizer else ())
              for key, value in state.items()
              if key != "step" and getattr(value, "shape", None) == p.shape]
    return {"parameters": _bytes(params), "gradients": _bytes(grads),
            "optimizer": _bytes(states + masters)}


def all_tensors() -> list[torch.Tensor]:
    """Of this process, as far as Python knows them. A type is asked once, not each object."""
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, torch.Tensor)}
    return [x for x in objects if type(x) in kinds]


def _bytes(tensors):
    storages = {}
    for tensor in tensors:
        tensor = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())
