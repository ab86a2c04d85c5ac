"""The global gradient norm over slices."""

import torch

from .. import comm

_NORMS = (torch._foreach_norm, torch.linalg.vector_norm, torch.linalg.norm, torch.norm,
          torch.Tensor.norm)
_SAME_VALUES = (torch.Tensor.detach, torch.Tensor.data.__get__)


class GradSlice(torch.Tensor):
    """This rank's slice of a gradient: a tensor like any other, but for its norm, which is not the
    gradient's. torch.nn.utils.clip_grad_norm_ would scale by it, differently on every rank."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _NORMS:
            raise RuntimeError("this is the gradient's slice of one rank, whose norm is not the "
                               "gradient's; use model.clip_grad_norm_(max_norm), which returns the "
                               "global norm and clips by it (math.inf: does not clip)")
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(cls) if func in _SAME_VALUES else result


def _by_slice(unit, index, grad):
    """What this rank has of a parameter's gradient, as (rank that owns it, 1-D part)."""
    if unit.keeps.states == "shard":
        return [(unit.rank, grad)]
    spans = [unit.span(index, rank) for rank in range(unit.world_size)]
    return [(r, grad.reshape(-1)[begin:end]) for r, (begin, end) in enumerate(spans)]


def clip_grad_norm_(model, max_norm, norm_type):
    """See Shell.clip_grad_norm_. A norm per parameter and slice, then the norm of those: the same
    numbers in the same order, whoever holds them. Padding belongs to no parameter."""
    masters = [unit.master for unit in model.trainable]
    dtype = max((m.dtype for m in masters), key=lambda dtype: dtype.itemsize)
    dtype = torch.promote_types(dtype, torch.float32)
    owned = [(unit, index, p) for unit in model.trainable for index, p in enumerate(unit.owned)]
    norms = torch.zeros(len(owned), model.world_size, dtype=dtype, device=masters[0].device)
    for row, (unit, index, p) in zip(norms, owned):
        if p.grad is not None:
            whole = p.grad.as_subclass(torch.Tensor)
            for rank, part in _by_slice(unit, index, whole):
                if part.numel():
                    row[rank] = torch.linalg.vector_norm(part, norm_type, dtype=dtype)
    if model.keeps.states == "shard":  # every entry is zero on all ranks but one: an exact sum
        comm.all_reduce(norms, model.group, unit="norms", phase="clip").wait()
    total = torch.linalg.vector_norm(norms, norm_type)
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for _, _, p in owned:
        if p.grad is not None:
            p.grad.mul_(scale)
    return total
