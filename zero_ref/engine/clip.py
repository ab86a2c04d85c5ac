"""The global gradient norm over slices."""

import torch
from torch import Tensor

from .. import comm
from ..partition import SHARD
from .local import plain


def _by_slice(unit, index: int, grad: Tensor) -> list[tuple[int, Tensor]]:
    """What this rank has of a parameter's gradient, as (rank that owns it, 1-D part)."""
    if unit.keeps.states == SHARD:
        return [(unit.rank, grad)]
    spans = [unit.span(index, rank) for rank in range(unit.world_size)]
    return [(r, grad.reshape(-1)[begin:end]) for r, (begin, end) in enumerate(spans)]


def clip_grad_norm_(model, max_norm: float, norm_type: float) -> Tensor:
    """See Shell.clip_grad_norm_. A norm per parameter and slice, then the norm of those: the same
    numbers in the same order, whoever holds them. Padding belongs to no parameter."""
    masters = [unit.master for unit in model.trainable]
    if not masters:  # of a frozen module, as torch's does
        return torch.zeros(())
    dtype = max((m.dtype.to_real() for m in masters), key=lambda dtype: dtype.itemsize)
    dtype = torch.promote_types(dtype, torch.float32)
    params = [(unit, index, p) for unit in model.trainable
              for index, p in enumerate(unit.master_params)]
    norms = torch.zeros(len(params), model.world_size, dtype=dtype, device=masters[0].device)
    for row, (unit, index, p) in zip(norms, params):
        if p.grad is not None:
            for rank, part in _by_slice(unit, index, plain(p.grad)):
                if part.numel():
                    exact = dtype.to_complex() if part.is_complex() else dtype
                    row[rank] = torch.linalg.vector_norm(part, norm_type, dtype=exact)
    if model.keeps.states == SHARD:  # every entry is zero on all ranks but one: an exact sum
        comm.all_reduce(norms, model.group, unit="norms", phase="clip").wait()
    total = torch.linalg.vector_norm(norms, norm_type)
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for _, _, p in params:
        if p.grad is not None:
            plain(p.grad).mul_(scale)
    return total


def grads_are_finite(model) -> bool:
    """See Shell.grads_are_finite."""
    grads = [plain(p.grad) for unit in model.trainable for p in unit.master_params
             if p.grad is not None]
    mine = all(bool(grad.isfinite().all()) for grad in grads)
    counts = torch.zeros(model.world_size, device=model.units[0].flat.device)
    counts[model.rank] = float(not mine)
    if model.keeps.states == SHARD:
        comm.all_reduce(counts, model.group, unit="finite", phase="clip").wait()
    return not counts.any()
