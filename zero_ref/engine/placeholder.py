"""What hangs in a module at stage 3 in place of a parameter that is not gathered.

It has the parameter's shape, dtype and device, and costs no memory, because it is a view of the
unit's emptied buffer. Whatever would read or write its values raises an error that says what to do
instead. (Tensors that autograd has saved are another matter: see stage3.py.)
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .units import replaced

# What may be asked without the values. Attributes reach __torch_function__ as their getters.
_ATTRIBUTES = ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad",
               "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "itemsize",
               "grad_fn")
_ALLOWED = {getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES}
_ALLOWED |= {torch.Tensor.requires_grad.__set__, torch.Tensor.requires_grad_}
_ALLOWED |= {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.stride,
             torch.Tensor.nelement, torch.Tensor.element_size, torch.Tensor.is_floating_point,
             torch.Tensor.is_complex, torch.Tensor.is_contiguous, torch.Tensor.untyped_storage,
             torch.Tensor.__len__, torch.Tensor.__hash__, torch.is_floating_point,
             torch.is_complex, torch.numel}


class Placeholder(nn.Parameter):
    """A parameter whose values are not on this rank at the moment."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _ALLOWED:
            return super().__torch_function__(func, types, args, kwargs or {})
        held = next(a for a in tree_leaves((args, kwargs)) if isinstance(a, cls))
        raise RuntimeError(
            f"parameter {held._name!r} of unit {held._unit!r} is not gathered: at stage 3 its "
            "values are on this rank only while its unit computes. Call the wrapped model, not the "
            "bare module or a part of it; to read or write values use `with model.full_params():` "
            "(which is under no_grad), and model.state_dict() instead of the module's; for a "
            "gradient with respect to it, as torch.autograd.grad gives, use stage 2. If another "
            "module's forward reads it, leave its module out of `units`: the root's parameters are "
            "there from the beginning of forward to the end of backward")

    def __repr__(self):
        return f"Placeholder for {self._name!r}, shape {tuple(self.shape)}, not gathered"

    __str__ = __repr__

    def __format__(self, spec):
        return format(str(self), spec)


def make_placeholders(unit) -> list[nn.Parameter]:
    """One for each parameter of the unit, which still are views of its flat buffer."""
    placeholders: list[nn.Parameter] = []
    for name, p in zip(unit.names, unit.params):
        held = torch.Tensor._make_subclass(Placeholder, p.data, p.requires_grad)
        held._name, held._unit = name, unit.name
        placeholders.append(held)
    return placeholders


def show_in_module(unit, params: Sequence[nn.Parameter]) -> None:
    """Put these, the unit's parameters or its placeholders, where the module has its parameters."""
    with torch._C.DisableTorchFunctionSubclass():
        for p, name, own, held, places in zip(params, unit.names, unit.params, unit.placeholders,
                                              unit.slots):
            for module, attribute in places:
                there = module._parameters.get(attribute)
                if there is not own and there is not held:
                    raise RuntimeError(replaced(name))
                # Whoever freezes a parameter sets the flag of what hangs there at that time.
                if p.requires_grad != (flag := there.requires_grad):
                    p.requires_grad = flag
                module._parameters[attribute] = p


def empty_params(unit) -> None:
    """Whoever kept a reference to a parameter has an empty tensor then, not a dangling one."""
    for p in unit.params:
        p.data = p.data.new_empty(0)


def empty_flat(unit) -> None:
    """Free the memory of the full parameters. If somebody holds it as a NumPy array, it stays with
    them, and with what autograd has saved of it; the unit is gathered into another one then."""
    if not unit.flat.untyped_storage().resizable():
        unit.flat = torch.empty_like(unit.flat)
        with torch._C.DisableTorchFunctionSubclass():
            for held, view in zip(unit.placeholders, unit.full_views(unit.flat)):
                held.data = view
    unit.flat.untyped_storage().resize_(0)
