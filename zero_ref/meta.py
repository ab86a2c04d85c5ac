"""Modules built on the meta device (`with torch.device("meta"): …`) get their memory unit by unit.

So a model may be larger than what a rank can hold. Each module that has parameters or buffers of
its own is initialized as PyTorch does: by its `reset_parameters()`, and then by the model's
`_init_weights(module)` if there is one. Rank 0's values are broadcast, so they depend neither on
the number of ranks nor on the stage.
"""

import torch
import torch.distributed as dist
from torch import nn

from .placeholder import show_in_module


def give_memory_to_buffers(module, group):
    """Replace buffers on the meta device by buffers without values."""
    for submodule in module.modules():
        for name, buffer in submodule._buffers.items():
            if buffer is not None and buffer.is_meta:
                submodule._buffers[name] = _without_values(torch.empty_like(
                    buffer, device=_device(group)))


def flatten(units, module, group):
    """Lay the units of one submodule into flat buffers, and initialize them if they are on meta."""
    on_meta = [unit for unit in units if unit.params[0].is_meta]
    for unit in units:
        if unit in on_meta:
            unit.flat = torch.zeros(unit.padded_numel, dtype=unit.params[0].dtype,
                                    device=_device(group))
            # Empty at first: made from a view, a parameter would share the version counter with the
            # flat buffer, and autograd would take a gather for a change of the parameter.
            unit.params = [nn.Parameter(unit.flat.new_empty(0), p.requires_grad)
                           for p in unit.params]
            unit.point_to(_without_values(unit.flat))
            show_in_module(unit, unit.params)
            unit.shard = unit.flat[unit.own_slice]
        else:
            unit.flatten()
    if on_meta:
        homes = {m for unit in on_meta for places in unit.slots for m, _ in places}
        if units[0].module is module:  # what has only buffers has no unit
            homes |= {m for m in module.modules() if m._buffers and not any(
                p is not None for p in m._parameters.values())}
        for name, submodule in module.named_modules():
            if submodule in homes:
                _initialize(name, submodule, module)


@torch.no_grad()
def _initialize(name, submodule, module):
    for method in ("reset_parameters", "_reset_parameters"):
        if hasattr(submodule, method):
            getattr(submodule, method)()
    if hasattr(module, "_init_weights"):
        module._init_weights(submodule)
    for attribute, tensor in [*submodule._parameters.items(), *submodule._buffers.items()]:
        if tensor is not None and tensor.numel() and _has_no_values(tensor):
            raise ValueError(
                f"{name + '.' * bool(name)}{attribute} was built on the meta device, and nothing "
                f"has given it values: {type(submodule).__name__} needs a reset_parameters() that "
                f"does, or {type(module).__name__} an _init_weights(module)")


def _without_values(tensor):
    return tensor.fill_(_marker(tensor))


def _has_no_values(tensor):
    if tensor.dtype == torch.bool:
        return False  # there is no value that would tell
    marker = _marker(tensor)
    return bool((tensor.isnan() if marker != marker else tensor == marker).any())


def _marker(tensor):
    if tensor.dtype == torch.bool:
        return False
    if tensor.is_floating_point() or tensor.is_complex():
        return float("nan")
    return torch.iinfo(tensor.dtype).min


def _device(group):
    """Where the group's ranks compute: each on its GPU if they talk over NCCL."""
    if "nccl" in dist.get_backend_config(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
