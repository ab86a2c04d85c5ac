"""What a rank's optimizer sees of a parameter and of its gradient.

From stage 1 on these are slices, and what is computed from them is marked, see slices.py. While an
optimizer steps, the marks are off, so that its states are plain tensors, and types those that torch
optimizes for.
"""

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .local import refuse_local
from .slices import GradSlice, ParamSlice

_SET_GRAD = Tensor.grad.__set__  # type: ignore[attr-defined]


class MasterParameter(nn.Parameter):
    """A parameter of `model.parameters()`. Its gradient is set, not accumulated by autograd."""

    _is_slice = False

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):  # an attribute
            p, *value = args  # p may be another tensor, and this its value
            if func == _SET_GRAD and type(*value) is Tensor and getattr(p, "_is_slice", False):
                args = p, value[0].as_subclass(GradSlice)
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        if func is torch.autograd.grad:
            raise RuntimeError(
                "autograd works on the module's own parameters, not on those of "
                "model.parameters(): call loss.backward(), or give torch.autograd.grad "
                "`[*model.module.parameters()]`, at stages 0 to 2")
        if func is torch.autograd.backward and (inputs := (kwargs or {}).get("inputs")):
            # Those that a loss uses itself get gradients of their own, see ParamSlice.
            inputs = [inputs] if isinstance(inputs, Tensor) else [*inputs]
            kwargs["inputs"] = [*inputs, *(p._original for p in inputs if isinstance(p, cls))]
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            leaves = tree_leaves((args, kwargs))
            refuse_local(leaves)
            in_place = name.endswith("_") and not name.endswith("__")
            if in_place or not any(getattr(leaf, "_is_slice", False) for leaf in leaves):
                return func(*args, **(kwargs or {}))
            args, kwargs = tree_map(
                lambda x: x.as_subclass(ParamSlice) if isinstance(x, cls) else x,
                (args, kwargs or {}))
        return func(*args, **kwargs)

    def _write(self, values):
        if values.shape != self.shape or values.dtype != self.dtype:
            raise RuntimeError(
                f"a parameter of {tuple(self.shape)} and {self.dtype} cannot have the .data of "
                f"{tuple(values.shape)} and {values.dtype}: it lies in a flat buffer; only values "
                "of the same shape and dtype can be copied there")
        with torch.no_grad():
            self.copy_(values)

    # A detached tensor shares the version counter, by which forward sees that values are new.
    data = property(lambda self: self.detach(), _write)  # type: ignore[assignment]

    def register_hook(self, hook):
        raise RuntimeError("a hook on a parameter of model.parameters() would never run, for "
                           "autograd works on the bare module's parameters: change p.grad after "
                           "backward")

    register_post_accumulate_grad_hook = register_hook

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), nn.Parameter(self.detach().clone(), self.requires_grad))


def master_parameter(view: Tensor, original: nn.Parameter, span: tuple[int, int] | None
                     ) -> nn.Parameter:
    """What the optimizer sees of a parameter, with the attributes that the user gave to it.
    span: which elements of it these are, or None if it is the whole."""
    p = MasterParameter(view, requires_grad=original.requires_grad)
    p.__dict__.update(original.__dict__)
    p._original, p._is_slice = original, span is not None
    p._elements = (0, original.numel()) if span is None else span
    return p


def mark(units, on: bool) -> None:
    """Mark what an optimizer sees, or while it steps show it plain parameters and gradients."""
    with torch._C.DisableTorchFunctionSubclass():
        for unit in units:
            for p in unit.master_params:
                p.__class__ = MasterParameter if on else nn.Parameter
                if p._is_slice and p.grad is not None:
                    p.grad = p.grad.as_subclass(GradSlice if on else Tensor)
