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
    """Replace buffers on the meta device, and initialize the modules that have nothing else."""
    for name, submodule in module.named_modules():
        on_meta = {k: b for k, b in submodule._buffers.items() if b is not None and b.is_meta}
        for key, buffer in on_meta.items():
            with_memory = torch.empty_like(buffer, device=_device(group))
            submodule._buffers[key] = _without_values(with_memory)
        params = _own_params(submodule)
        if on_meta and not any(p.is_meta for p in params):  # else they are initialized together
            _initialize(name, submodule, module, whole=not params)


def flatten(units, module, group):
    """Lay the units of one submodule into flat buffers, and initialize them if they are on meta."""
    on_meta = [unit for unit in units if unit.params[0].is_meta]
    for unit in units:
        if unit in on_meta:
            _give_memory(unit, _device(group))
        else:
            unit.flatten()
    homes = {m for unit in on_meta for places in unit.slots for m, _ in places}
    here = {p for unit in units for p in unit.params}
    for name, submodule in module.named_modules():
        if submodule in homes:
            if not here.issuperset(_own_params(submodule)):
                raise ValueError(f"{name!r} was built on meta, and its parameters belong to "
                                 "two units, because one of them is tied: it cannot be "
                                 "initialized unit by unit; build it on a real device")
            _initialize(name, submodule, module)


def _give_memory(unit, device):
    unit.flat = torch.zeros(unit.padded_numel, dtype=unit.params[0].dtype, device=device)
    unit.shard = unit.flat[unit.own_slice]
    # Empty at first: made from a view, a parameter would share the version counter with the flat
    # buffer, and autograd would take a gather for a change of the parameter.
    unit.params = [nn.Parameter(unit.flat.new_empty(0), p.requires_grad) for p in unit.params]
    _without_values(unit.flat[: unit.numel])
    unit.point_to(unit.flat)
    show_in_module(unit, unit.params)


@torch.no_grad()
def _initialize(name, submodule, module, whole=True):
    for method in ("reset_parameters", "_reset_parameters") if whole else ():
        if hasattr(submodule, method):
            getattr(submodule, method)()
    if whole and hasattr(module, "_init_weights"):
        module._init_weights(submodule)
    for attribute, tensor in [*submodule._parameters.items(), *submodule._buffers.items()]:
        if tensor is not None and tensor.numel() and _has_no_values(tensor):
            raise ValueError(
                f"{name + '.' * bool(name)}{attribute} was built on the meta device, and nothing "
                f"has given it values: {type(submodule).__name__} needs a reset_parameters() that "
                f"does, or {type(module).__name__} an _init_weights(module)")


def _own_params(submodule):
    return [p for p in submodule._parameters.values() if p is not None]


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
