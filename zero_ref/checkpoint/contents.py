"""What a checkpoint holds of a model and its optimizers, and which elements of it this rank writes.

Names and shapes are those of the bare module: nothing says at which stage, or by how many ranks, it
was written. An optimizer's states are called as torch flattens them, state.<parameter>.exp_avg.
"""

import random
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..engine.optimizers import ELEMENTS
from .pack import pack, writable

# States of torch's optimizers that are one number, even for a parameter of no dimensions.
_NUMBERS = {"step", "mu_product", "eta", "mu"}


class Piece(NamedTuple):
    """Elements of a tensor, from `begin` on, that this rank writes. shape: the whole tensor's."""

    name: str
    shape: tuple[int, ...]
    begin: int
    values: Tensor  # (n,)


class Owned(NamedTuple):
    """A parameter: its names (tied ones have several), shape, what the optimizer updates of it, and
    which elements are this rank's to write. leads: whether the first one is. Then so are states
    that are no elements, such as a step: a rank that has no element may never have had a gradient.
    """

    names: list[str]
    shape: tuple[int, ...]
    p: nn.Parameter
    begin: int
    end: int
    leads: bool

    def piece(self, name: str, values: Tensor) -> Piece:
        """This rank's, of the parameter's values or of a state. It may be empty."""
        first = self.p._elements[0]
        mine = values.detach().reshape(-1)[self.begin - first : self.end - first]
        return Piece(name, self.shape, self.begin, writable(mine, name))


def owned(model) -> list[Owned]:
    paths: dict[nn.Module, list[str]] = {}
    for path, m in model.module.named_modules(remove_duplicate=False):
        paths.setdefault(m, []).append(path)
    found = []
    for unit in model.units:
        for i, (name, p) in enumerate(zip(unit.names, unit.master_params)):
            places = {f"{path}.{key}" if path else key
                      for m, key in unit.slots[i] for path in paths[m]}
            names = [name, *sorted(places - {name})]
            begin, end = unit.span(i, unit.rank)
            leads = begin == 0 < end if unit.sizes[i] else unit.rank == 0
            found.append(Owned(names, tuple(unit.shapes[i]), p, begin, end, leads))
    return found


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """Those that are in a state dict."""
    return {f"{path}.{key}" if path else key: buffer
            for path, m in module.named_modules(remove_duplicate=False)
            for key, buffer in m._buffers.items()
            if buffer is not None and key not in m._non_persistent_buffers_set}


def with_extra_state(module: nn.Module) -> dict[str, nn.Module]:
    """The modules that define get_extra_state(), by the name that it has in a state dict."""
    return {f"{path}._extra_state" if path else "_extra_state": m
            for path, m in module.named_modules()
            if type(m).get_extra_state is not nn.Module.get_extra_state}


def whole(name: str, value: Tensor) -> Piece:
    return Piece(name, tuple(value.shape), 0, writable(value, name).reshape(-1))


def of_model(model) -> list[Piece]:
    """This rank's elements of all parameters, tied ones under every name; on rank 0 buffers, too.
    """
    with torch._C.DisableTorchFunctionSubclass():
        found = [one.piece(name, one.p) for one in owned(model) for name in one.names]
    if model.rank == 0:
        found += [whole(name, buffer) for name, buffer in buffers(model.module).items()]
    return found


def of_optimizer(model, optimizer: Optimizer) -> list[Piece]:
    """This rank's elements of all states, and of what it leads those that have another shape."""
    found = []
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    with torch._C.DisableTorchFunctionSubclass():
        for one in owned(model):
            if id(one.p) not in held:  # its group was removed, and its states were not
                continue
            for key, value in optimizer.state.get(one.p, {}).items():
                name = f"state.{one.names[0]}.{key}"
                if _belongs_to_elements(key, value, one.p):
                    found.append(one.piece(name, value))
                elif isinstance(value, Tensor) and one.leads:
                    found.append(whole(name, value))
    return found


def described(model, optimizer: Optimizer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """All of an optimizer that is not in its pieces: its class, its groups, with the names of their
    parameters, and which states there are of those that this rank leads. tensors: takes those of
    the groups."""
    name_of = {id(one.p): one.names[0] for one in owned(model)}
    led = {id(one.p) for one in owned(model) if one.leads}
    kind, groups, states = type(optimizer).__name__, [], {}
    for index, group in enumerate(optimizer.param_groups):
        if not all(id(p) in name_of for p in group["params"]):
            raise ValueError(f"this {kind} holds a parameter that is not of this model: build it "
                             "from model.parameters(), and give others an optimizer of their own, "
                             "which can be saved as an extra value's state_dict()")
        groups.append({"params": [name_of[id(p)] for p in group["params"]], "options": pack(
            {key: value for key, value in group.items() if key != "params"},
            f"group {index} of {kind}", tensors)})
        for p in group["params"]:
            if id(p) not in led:
                continue
            name = name_of[id(p)]
            with torch._C.DisableTorchFunctionSubclass():
                states[name] = {
                    key: "like the parameter" if _belongs_to_elements(key, value, p) else
                    "whole" if isinstance(value, Tensor) else
                    {"value": pack(value, f"state.{name}.{key}", tensors)}
                    for key, value in optimizer.state.get(p, {}).items() if key != ELEMENTS}
    return {"class": kind, "groups": groups, "states": states}


def _belongs_to_elements(key, value, p):
    return isinstance(value, Tensor) and value.shape == p.shape and not (
        p.ndim == 0 and key in _NUMBERS)


# ---- random numbers ------------------------------------------------------------------------------


def generators(device: torch.device) -> dict[str, Any]:
    """The state of this process's generators of random numbers."""
    state = numpy.random.get_state(legacy=False)
    state["state"] = {**state["state"], "key": state["state"]["key"].tolist()}
    found = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": state}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def check_generators(found: dict[str, Any], device: torch.device) -> None:
    """Raise something unless these are states of generators."""
    if "cuda" in found and device.type == "cuda":
        torch.Generator(device).set_state(found["cuda"])
    torch.Generator().set_state(found["torch"])
    random.Random().setstate(found["python"])
    numpy.random.RandomState().set_state(found["numpy"])
    if not 0 <= found["numpy"]["state"]["pos"] <= len(found["numpy"]["state"]["key"]):
        raise ValueError("a generator would read beyond its numbers")  # NumPy lets it


def restore_generators(found: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(found["torch"])
    random.setstate(found["python"])
    numpy.random.set_state(found["numpy"])
    if "cuda" in found and device.type == "cuda":
        torch.cuda.set_rng_state(found["cuda"], device)
