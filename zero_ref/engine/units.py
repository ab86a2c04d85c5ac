"""Which submodules are units, and whether their parameters fit into flat buffers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn


class Kind(NamedTuple):
    """What all parameters of a unit have in common, beside the module that they belong to."""

    frozen: bool
    dtype: torch.dtype
    precision: tuple[torch.dtype, torch.dtype]  # of parameters while they compute, of gradients


def find_units(module: nn.Module, units) -> dict[str, nn.Module]:
    """The unit modules by name, in the order of `module.named_modules()`, without the root."""
    named = {name: m for name, m in module.named_modules() if name}
    if units is None:
        names = {m: name for name, m in named.items()}
        return {names[m]: m for m in _default_units(module)}

    matches = _as_predicate(units)
    found = {name: m for name, m in named.items() if matches(m) and _has_parameters(m)}
    if not found and not matches(module):
        kinds = sorted({type(m).__name__ for m in module.modules() if _has_parameters(m)})
        raise ValueError(f"units={_describe(units)} matches no submodule with parameters in "
                         f"{type(module).__name__}; it has: {', '.join(kinds)}")
    for name, m in found.items():
        if type(m).forward is nn.Module.forward:
            raise ValueError(f"unit {name!r} is a {type(m).__name__}, which has no forward of its "
                             "own: name what is inside it instead")
    return found


def modules_around(module: nn.Module, name: str) -> list[nn.Module]:
    """The submodule of this name and the modules that contain it, the outermost first."""
    around = [module]
    for part in filter(None, name.split(".")):
        around.append(around[-1]._modules[part])
    return around


def label(name: str, kind: Kind, kinds: Sequence[Kind]) -> str:
    """What a unit is called, if its module has units of all these kinds."""
    notes = ["frozen"] * kind.frozen
    if kind._replace(frozen=kinds[0].frozen) != kinds[0]:
        notes.append(str(kind.precision[0]).removeprefix("torch."))
    return (name or "root") + (f" ({', '.join(notes)})" if notes else "")


def _default_units(module):
    """Each child with parameters of the outermost ModuleLists and Sequentials."""
    listed = isinstance(module, nn.ModuleList | nn.Sequential)
    for child in module.children():
        callable_child = type(child).forward is not nn.Module.forward  # not a bare container
        if listed and callable_child and _has_parameters(child):
            yield child
        elif not (listed and callable_child):
            yield from _default_units(child)


def _as_predicate(units):
    if callable(units) and not isinstance(units, type):
        return units
    if not all(isinstance(u, type) for u in (units if isinstance(units, tuple) else (units,))):
        raise ValueError(f"units={units!r}: give a module class, a tuple of classes, or a function "
                         "that takes a module and returns True or False")
    return lambda m: isinstance(m, units)


def _has_parameters(module):
    return next(module.parameters(), None) is not None


def _describe(units):
    units = units if isinstance(units, tuple) else (units,)
    return " or ".join(getattr(u, "__name__", repr(u)) for u in units)


def check_devices(label: str, names: Sequence[str], params: Sequence[nn.Parameter]) -> None:
    for name, p in zip(names, params):
        if p.device != params[0].device:
            raise ValueError(f"unit {label!r} mixes devices: {names[0]!r} is {params[0].device}, "
                             f"{name!r} is {p.device}; move them to one device, or give them "
                             "units of their own")


def check_module(module: nn.Module) -> None:
    for name, m in module.named_modules():
        if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.max_norm is not None:
            raise ValueError(f"{name!r} has max_norm={m.max_norm}: its forward overwrites the rows "
                             "that it looks up, other ones on every rank; build it without")
    seen = {}
    for name, p in module.named_parameters():
        if p.data_ptr() and seen.setdefault(p.data_ptr(), name) != name:
            raise ValueError(f"{name!r} and {seen[p.data_ptr()]!r} are two parameters that share "
                             "their memory and would come apart in the flat buffers; tie them by "
                             "using one nn.Parameter in both places")


def refuse_unfrozen(units: Sequence) -> None:
    """What is frozen when it is wrapped has no gradient buffer and no part in an optimizer."""
    for unit in units:
        if unit.frozen:
            for name, [(module, attribute), *_] in zip(unit.names, unit.slots):
                if module._parameters[attribute].requires_grad:
                    raise RuntimeError(
                        f"{name!r} was frozen when the model was wrapped, so no optimizer has a "
                        "part of it: wrap it trainable, and freeze it after that")
