"""Gradients that no_sync() has left in the module, which are yet to be reduced.

The optimizer's parameters show that there are some, so that whoever drops or zeroes what they have
as a gradient drops these, too, as with torch DDP. What a loss over parameters has added to such a
gradient itself needs no reduction, and stays.
"""

import weakref
from functools import partial

import torch
from torch import Tensor, nn

from .slices import GradSlice, Marked

_IS_LOCAL = ("this gradient is local, for the last backward ran inside no_sync(): the next one "
             "outside of it reduces what has added up; optimizer.zero_grad() drops it")


class LocalGrad(Marked):
    """In place of a gradient that no_sync() has left in the module and that is yet to be reduced.
    It has no memory. Whoever drops it, or zeroes it, drops what no_sync() has left."""

    precedence = 3
    zeroed = False
    data = property(lambda self: self)  # type: ignore[assignment]  # for p.grad.data.zero_()

    @classmethod
    def call(cls, name, func, args, kwargs, given):
        if name in ("zero_", "_foreach_zero_"):
            for grad in given:
                if isinstance(grad, cls):
                    grad.zeroed = True
                else:
                    grad.zero_()
            return args[0], cls
        if name == "detach":
            return args[0], cls
        if name in ("__get__", "requires_grad_", "detach_", "size", "numel", "dim",
                    "untyped_storage", "element_size", "is_floating_point", "is_complex"):
            return func(*args, **kwargs), cls
        raise RuntimeError(_IS_LOCAL)

    def __repr__(self):
        return "LocalGrad: left by no_sync(), not reduced"

    __str__ = __repr__


def plain(grad: Tensor) -> Tensor:
    """A reduced gradient without its mark."""
    refuse_local([grad])
    return grad.as_subclass(Tensor)


def refuse_local(tensors) -> None:
    if any(isinstance(x, LocalGrad) for x in tensors):
        raise RuntimeError(_IS_LOCAL)


def watch(unit) -> None:
    """Called once. What a loss over parameters accumulates is no change by the user."""
    ref = weakref.ref(unit)

    def before(index, grad):
        if (unit := ref()) is not None and index in unit.local:
            with torch._C.DisableTorchFunctionSubclass():
                _settle(unit, index)

    def after(index, p):
        with torch._C.DisableTorchFunctionSubclass():
            if p._is_slice and type(p.grad) is Tensor:
                p.grad = p.grad.as_subclass(GradSlice)
            if (unit := ref()) is not None and index in unit.local:
                unit.local[index] = p.grad, p.grad._version

    with torch._C.DisableTorchFunctionSubclass():
        for index, p in enumerate(unit.master_params):
            if p.requires_grad:
                nn.Parameter.register_hook(p, partial(before, index))
                nn.Parameter.register_post_accumulate_grad_hook(p, partial(after, index))


def show_local(units) -> None:
    """At the end of a backward inside no_sync(): the optimizer's parameters show that the module
    has gradients which are yet to be reduced."""
    with torch._C.DisableTorchFunctionSubclass():
        for unit in units:
            for index, (p, own) in enumerate(zip(unit.master_params, unit.params)):
                if own.grad is not None:
                    if p.grad is None:
                        if index not in unit.local_marks:
                            unit.local_marks[index] = _local_mark(p)
                        p.grad = unit.local_marks[index]
                    unit.local[index] = p.grad, p.grad._version


def hide_local(units) -> None:
    """Before the next backward or step: what was dropped or zeroed there is dropped here, too."""
    with torch._C.DisableTorchFunctionSubclass():
        for unit in units:
            for index in list(unit.local):
                _settle(unit, index)
            unit.local = {}


def _local_mark(p):
    held = Tensor._make_subclass(LocalGrad, torch.empty_like(p))
    held.untyped_storage().resize_(0)
    return held


def _settle(unit, index: int) -> None:
    p, (shown, version) = unit.master_params[index], unit.local[index]
    if isinstance(shown, LocalGrad):
        gone, changed = p.grad is None or shown.zeroed, p.grad is not shown
        shown.zeroed = False
    else:
        changed = p.grad is not shown or shown._version != version
        gone = p.grad is None or (changed and not p.grad.any())
    if changed and not gone:
        raise RuntimeError(
            f"the gradient of {unit.names[index]!r} was changed while no_sync() has left another "
            "part of it, which is not reduced yet: change gradients after the backward that "
            "reduces")
    if gone:
        unit.params[index].grad = None
        del unit.local[index]
    if p.grad is shown and isinstance(shown, LocalGrad):
        p.grad = None
