"""What the optimizer sees of a gradient from stage 1 on: a slice, and marked as one."""

import torch

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
