"""Bytes of parameters, gradients and optimizer states per rank: by formula, and as measured."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from ..engine.precision import MixedPrecision


def model_states(numel: int | list[int], world_size: int, stage: int, *, rank: int = 0,
                 param_dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype = torch.float32,
                 optimizer_dtypes: Sequence[torch.dtype] = (torch.float32, torch.float32),
                 mixed_precision: "MixedPrecision | None" = None) -> dict[str, int]:
    """What one rank keeps between steps, in bytes, as the paper computes it.

    numel: the number of parameters Ψ, or a list with that of each unit: every unit is padded to a
        multiple of world_size. optimizer_dtypes: one per state that the optimizer keeps for each
        element; the default is fp32 Adam (exp_avg, exp_avg_sq). The paper's mixed-precision Adam is
        param_dtype=grad_dtype=torch.float16 and three fp32 states (master copy, exp_avg,
        exp_avg_sq): K = 12. Optimizer states have no padding, so they may depend on `rank`.
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
    sizes = [int(n) for n in (numel if isinstance(numel, list | tuple) else [numel])]
    slices = [-(-n // world_size) for n in sizes]
    padded = sum(slices) * world_size
    owned = sum(min(max(n - rank * s, 0), s) for n, s in zip(sizes, slices))
    if mixed_precision is not None:
        param_dtype, grad_dtype = mixed_precision.param_dtype, mixed_precision.reduce_dtype
    kept = {
        "parameters": (sum(slices) if stage >= 3 else padded) * param_dtype.itemsize,
        "gradients": (sum(slices) if stage >= 2 else padded) * grad_dtype.itemsize,
        "optimizer": (owned if stage >= 1 else sum(sizes))
        * sum(dtype.itemsize for dtype in optimizer_dtypes),
    }
    of_owner = (sum(slices) if stage >= 1 else padded) * torch.float32.itemsize
    if param_dtype != torch.float32 and mixed_precision is not None:
        kept["optimizer"] += of_owner  # the master copy
        kept["gradients"] += of_owner if grad_dtype != torch.float32 else 0
    return kept


def resident(model: nn.Module,
             optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
    """The same three sums, measured: the sizes of the storages that are alive, each counted once.

    model: what `zero_ref.wrap` returned, or any nn.Module. A wrapped model keeps the memory of its
    gradients from its first backward on, also after zero_grad(). What the optimizer keeps once per
    tensor (its step count, say) and not per element is left out, as are buffers and activations.
    With mixed precision the master copy counts as an optimizer state.
    """
    units = getattr(model, "units", [])
    masters = [unit.master for unit in units if unit.mixed]
    params = [] if units else list(model.parameters())
    grads = [p.grad for p in model.parameters()]
    for unit in units:
        params += [unit.flat, unit.shard, *unit.params]
        grads += [unit.grad, *unit.kept_grads.values()]
    in_flight = getattr(model, "_in_flight", None)
    if in_flight:
        grads.append(in_flight[1])
    grads += [p.grad for p in params if p is not None]
    states = [value for p, state in (optimizer.state.items() if optimizer else ())
              for key, value in state.items()
              if key != "step" and getattr(value, "shape", None) == p.shape]
    return {"parameters": _bytes(params), "gradients": _bytes(grads),
            "optimizer": _bytes(states + masters)}


def _bytes(tensors):
    storages = {}
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())
