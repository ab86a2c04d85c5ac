"""Modules built on the meta device (`with torch.device("meta"): …`) get their memory unit by unit.

So a model may be larger than what a rank can hold. Values come as in PyTorch: from the
`reset_parameters()` of each module that has parameters or buffers of its own, and then from the
model's `_init_weights(module)`, if there is one, for every module, children first. Rank 0's values
are broadcast, so they depend neither on the number of ranks nor on the stage.
"""

import torch
import torch.distributed as dist
from torch import nn


def give_memory_to_buffers(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Replace buffers on the meta device, and initialize the modules that have nothing else."""
    homes = set()
    for submodule in module.modules():
        for key, buffer in submodule._buffers.items():
            if buffer is not None and buffer.is_meta:
                with_memory = torch.empty_like(buffer, device=_device(group))
                submodule._buffers[key] = with_memory.fill_(_marker(with_memory))
                if not [*submodule.parameters(recurse=False)]:  # else initialized with these
                    homes.add(submodule)
    if homes:
        _initialize(module, homes, here=set())


def flatten(units: list, module: nn.Module, group: dist.ProcessGroup) -> None:
    """Lay the units of one submodule into flat buffers, and initialize them if they are on meta."""
    on_meta = [unit for unit in units if unit.params[0].is_meta]
    for unit in units:
        if unit in on_meta:
            _give_memory(unit, _device(group))
        else:
            unit.flatten()
    homes = {m for unit in on_meta for places in unit.slots for m, _ in places}
    here = {p for unit in units for p in unit.params}
    for name, submodule in module.named_modules() if homes else ():
        if submodule in homes and not here.issuperset(submodule.parameters(recurse=False)):
            raise ValueError(f"{name!r} was built on the meta device, but its parameters belong to "
                             "two units, because one of them is tied: it cannot be initialized "
                             "unit by unit; build it on a real device")
    if homes:
        _initialize(module, homes, here)


def _give_memory(unit, device):
    unit.flat = torch.zeros(unit.padded_numel, dtype=unit.params[0].dtype, device=device)
    # Empty at first: made from a view, a parameter would share the version counter with the flat
    # buffer, and autograd would take a gather for a change of the parameter.
    on_meta = unit.params
    unit.params = [nn.Parameter(unit.flat.new_empty(0), p.requires_grad) for p in on_meta]
    for p, original in zip(unit.params, on_meta):
        p.__dict__.update(original.__dict__)  # what the user has put there
    for view in unit.full_views(unit.flat):
        view.fill_(_marker(view))
    unit.point_to(unit.flat)
    for p, places in zip(unit.params, unit.slots):
        for m, attribute in places:
            m._parameters[attribute] = p


@torch.no_grad()
def _initialize(module, homes, here):
    """Give values to the parameters in `here` and to the buffers of the modules in `homes`."""
    aside = [(m, key, p) for m in module.modules() for key, p in m._parameters.items()
             if p is not None and p not in here]
    for m, key, p in aside:  # writing to a tensor on meta changes nothing, and draws no numbers
        m._parameters[key] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"),
                                          p.requires_grad)
    try:
        for m, model in _children_first(module, None):
            for method in ("reset_parameters", "_reset_parameters"):
                if m in homes and hasattr(m, method):
                    getattr(m, method)()
            if model is not None:
                model._init_weights(m)
    finally:
        for m, key, p in aside:
            m._parameters[key] = p
    for name, m in module.named_modules():
        for key, tensor in [*m._parameters.items(), *m._buffers.items()] if m in homes else ():
            if tensor is not None and _has_no_values(tensor):
                raise ValueError(
                    f"{name + '.' * bool(name)}{key} was built on the meta device, and nothing has "
                    f"given it values: {type(m).__name__} needs a reset_parameters() that does, or "
                    f"{type(module).__name__} an _init_weights(module)")


def _children_first(module, model):
    """(submodule, the innermost module around it that has _init_weights), as Module.apply goes."""
    model = module if hasattr(module, "_init_weights") else model
    for child in module.children():
        yield from _children_first(child, model)
    yield module, model


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
