"""Find and replace the tensors in whatever a module takes or returns."""

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch.utils._pytree import tree_leaves, tree_map


def tensors_in(value) -> list[torch.Tensor]:
    """All tensors in tuples, lists, dicts and dataclasses, nested in any way."""
    found: list[torch.Tensor] = []
    map_tensors(found.append, value)
    return found


def map_tensors(fn: Callable[[torch.Tensor], torch.Tensor | None], value):
    """`value` with fn(t) in place of each tensor t in it for which fn returns something."""
    if isinstance(value, torch.Tensor):  # quickly, what is there most often
        return _map_leaf(fn, value)
    if type(value) is tuple:
        return tuple([map_tensors(fn, item) for item in value])
    if type(value) is dict and not value:
        return value
    return tree_map(lambda leaf: _map_leaf(fn, leaf), value)


def _map_leaf(fn, leaf):
    if isinstance(leaf, torch.Tensor):
        new = fn(leaf)
        return leaf if new is None else new
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        old = {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf)
               if hasattr(leaf, f.name)}
        new = {name: map_tensors(fn, value) for name, value in old.items()}
        if any(_differ(new[name], old[name]) for name in old):
            leaf = copy.copy(leaf)
            for name, value in new.items():
                object.__setattr__(leaf, name, value)  # also where the dataclass is frozen
    return leaf


def _differ(new, old):
    return any(a is not b for a, b in zip(tree_leaves(new), tree_leaves(old)))
