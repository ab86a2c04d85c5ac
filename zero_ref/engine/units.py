"""Which submodules are units, and whether their parameters fit into flat buffers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy


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
        own = {**m._parameters, **m._buffers}
        if any(is_lazy(tensor) for tensor in own.values()):
            raise ValueError(f"{name or 'the module'!r} is a {type(m).__name__}, whose parameters "
                             "have no shape yet: run one batch through the module first, and then "
                             "wrap it")
        for key, buffer in m._buffers.items():
            where = f"buffer {name + '.' * bool(name) + key!r}"
            if buffer is not None and buffer.layout != torch.strided:
                raise ValueError(f"{where} is {buffer.layout}: ranks exchange buffers as plain "
                                 "tensors; register buffer.to_dense(), or keep it in an attribute "
                                 "that is not a buffer")
            if buffer is not None and any(
                    step == 0 and n > 1 for step, n in zip(buffer.stride(), buffer.shape)):
                raise ValueError(f"{where} is expanded, so several of its elements share their "
                                 "memory and cannot be written to; register buffer.clone()")
    seen = {}
    for name, p in module.named_parameters():
        if p.data_ptr() and seen.setdefault(p.data_ptr(), name) != name:
            raise ValueError(f"{name!r} and {seen[p.data_ptr()]!r} are two parameters that share "
                             "their memory and would come apart in the flat buffers; tie them by "
                             "using one nn.Parameter in both places")


class Structure:
    """Which modules and parameters hang where in a wrapped model. What comes later is in no flat
    buffer and would never train; and what is unfrozen later has no gradient buffer."""

    def __init__(self, model: nn.Module, units: Sequence):
        self.frozen = {name for unit in units if unit.frozen for name in unit.names}
        pairs = [pair for unit in units
                 for pair in zip(unit.params, unit.placeholders or unit.params)]
        shown = {p: pair for pair in pairs for p in pair}  # the unit may be gathered, or not
        self.slots = {(home, key): (name, shown.get(p, (p, p)))
                      for home, key, name, p in _slots(model)}
        self._look(model)

    def _look(self, model):
        """What `check` compares, as quickly as it can."""
        empty = (None, (None, None))
        self.seen = [(m._modules, {**m._modules}, m._parameters,
                      [self.slots.get((home, key), empty) for key in m._parameters])
                     for home, _, m in _homes(model)]

    def check(self, model: nn.Module) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            for children, children_then, params, own in self.seen:
                if children != children_then or len(params) != len(own):
                    return self._look_closer(model)
                for p, (name, (param, placeholder)) in zip(params.values(), own):
                    if p is not param and p is not placeholder:
                        return self._look_closer(model)
                    if name in self.frozen and p.requires_grad:
                        raise RuntimeError(
                            f"{name!r} was frozen when the model was wrapped, so no optimizer has "
                            "a part of it: wrap it trainable, and freeze it after that")

    def _look_closer(self, model):
        """Something has changed, which may be other modules without parameters."""
        now = {(home, key): (name, p) for home, key, name, p in _slots(model)}
        for slot, (name, shown) in self.slots.items():
            if slot not in now or not any(now[slot][1] is p for p in shown):
                raise RuntimeError(replaced(name))
        for slot, (name, _) in now.items():
            if slot not in self.slots:
                raise RuntimeError(replaced(name))
        self._look(model)


def _homes(model):
    """The model itself as (None, "", model), which is not to keep itself alive, and all modules of
    the module, or that somebody has hung into the model, as (m, its name, m)."""
    yield None, "", model
    for path, top in {"": model.module, **model._modules}.items():
        for name, m in top.named_modules(prefix=path, remove_duplicate=False):
            yield m, name, m


def _slots(model):
    """Each place of a parameter, as (home, attribute, name, parameter)."""
    for home, path, m in _homes(model):
        for key, p in m._parameters.items():
            if p is not None:
                yield home, key, f"{path}.{key}" if path else key, p


def replaced(name: str) -> str:
    return (f"{name!r} has been replaced, removed or added since the model was wrapped, and would "
            "never train: change layers and parameters before zero_ref.wrap, write values inside "
            "model.full_params(), and give torch.func.functional_call the bare model.module")
