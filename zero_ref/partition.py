"""Units and flat buffers: the one layout that all stages share.

A unit is what is gathered, reduced and freed together: usually one layer. Its parameters lie one
after another in a flat buffer, which is padded to a multiple of the world size and cut into equal
slices; rank r owns slice r. A parameter may thus lie in several slices, or a slice in one
parameter:

    flat buffer   | weight, weight, weight, weight, | bias, bias, padding |
    slices        |     rank 0     |     rank 1     |       rank 2        |

Frozen parameters (requires_grad=False) have no gradient and no optimizer state. They get a flat
buffer of their own beside the unit's trainable one, which only stage 3 slices.
"""

from collections import defaultdict
from itertools import accumulate

import torch
from torch import nn

from .placeholder import placeholder


class Unit:
    """The parameters of one module, trainable or frozen, as one flat buffer."""

    def __init__(self, name, module, params, names, slots, rank, world_size):
        self.name, self.module = name, module
        self.params = params  # the module's own nn.Parameters, which autograd works on
        self.names = names  # their names in the wrapped module
        self.slots = slots  # for each, the (module, attribute) pairs where it hangs: tied, several
        self.frozen = not params[0].requires_grad
        self.shapes = [p.shape for p in params]
        self.offsets = [0, *accumulate(p.numel() for p in params)]

        self.numel = self.offsets[-1]
        self.shard_numel = -(-self.numel // world_size)  # rounded up: what padding is for
        self.padded_numel = self.shard_numel * world_size
        self.own = slice(rank * self.shard_numel, (rank + 1) * self.shard_numel)
        self.rank, self.world_size = rank, world_size

        self.flat = None  # all parameters, (padded_numel,)
        self.shard = None  # this rank's slice of them, (shard_numel,)
        self.owned = []  # for each parameter: what the optimizer sees of it on this rank
        self.grad = None  # all gradients while backward fills them in, (padded_numel,)
        self.ready = set()  # indices of the parameters whose gradient this backward has produced
        self.in_backward = False  # whether backward has reached this unit's outputs
        self.gathered = True  # whether `flat` holds the full parameters: only stage 3 lets them go
        self.placeholders = []  # what hangs in the module meanwhile

    def flatten(self):
        """Move the parameters into a new flat buffer; the module's tensors become views of it."""
        self.flat = self.params[0].new_zeros(self.padded_numel, requires_grad=False)
        for p, view in zip(self.params, self.full_views(self.flat)):
            view.copy_(p.detach())
            p.data, p.grad = view, None
        self.shard = self.flat[self.own]

    def full_views(self, flat):
        """flat: (padded_numel,) → one view per parameter, in the parameter's shape."""
        spans = zip(self.offsets, self.offsets[1:], self.shapes)
        return [flat[start:end].view(shape) for start, end, shape in spans]

    def shard_views(self, shard):
        """shard: (shard_numel,) → one 1-D view per parameter: what lies in this slice of it."""
        base = self.own.start
        return [shard[self._clip(start, self.rank) - base : self._clip(end, self.rank) - base]
                for start, end in zip(self.offsets, self.offsets[1:])]

    def slices_of(self, index, tensor):
        """A parameter's tensor, cut at the slices' borders: {rank: the 1-D part that rank owns}."""
        start, end = self.offsets[index], self.offsets[index + 1]
        flat = tensor.reshape(-1)
        return {r: flat[self._clip(start, r) - start : self._clip(end, r) - start]
                for r in range(self.world_size)}

    def _clip(self, position, rank):
        """Move a position in the flat buffer to the nearest one inside `rank`'s slice."""
        return min(max(position, rank * self.shard_numel), (rank + 1) * self.shard_numel)

    # ---- stage 3 only: what the module shows while the parameters are gathered, or not -----------

    def make_placeholders(self):
        self.placeholders = [placeholder(p, name, self.name)
                             for name, p in zip(self.names, self.params)]

    def show_full(self):
        self.gathered = True
        for p, view in zip(self.params, self.full_views(self.flat)):
            p.data = view
        self._hang(self.params)

    def show_placeholders(self):
        self.gathered = False
        self._hang(self.placeholders)
        for p in self.params:  # for those who kept a reference: an empty tensor, not a dangling one
            p.data = p.data.new_empty(0)

    def _hang(self, params):
        for p, places in zip(params, self.slots):
            for module, attribute in places:
                module._parameters[attribute] = p

    # ---- gradients -------------------------------------------------------------------------------

    def store_grad(self, index):
        """Move one parameter's gradient into the flat gradient buffer, and free the original."""
        if self.grad is None:
            self.grad = torch.empty(self.padded_numel, dtype=self.flat.dtype,
                                    device=self.flat.device)
        p = self.params[index]
        place = self.grad[self.offsets[index] : self.offsets[index + 1]]
        if index in self.ready:  # re-entrant checkpointing delivers a gradient in several pieces
            place += p.grad.reshape(-1)
        else:
            place.copy_(p.grad.reshape(-1))
        p.grad = None

    def complete(self):
        """Whether this backward has produced the gradients of all parameters."""
        return len(self.ready) == len(self.params)

    def fill_gaps(self):
        """Zero what backward did not reach: parameters without a gradient, and the padding."""
        for index in set(range(len(self.params))) - self.ready:
            self.grad[self.offsets[index] : self.offsets[index + 1]] = 0
        self.grad[self.numel :] = 0


def partition(module, units, rank, world_size):
    """Lay out `module` without touching it yet. Returns its Units, the root's first.

    `units`: which submodules are units, see `zero_ref.wrap`. What no unit contains, and a parameter
    tied across units, belongs to the root. Raises ValueError if the units match nothing or overlap,
    or if one would mix dtypes or devices.
    """
    found = _find_units(module, units)
    unit_of = defaultdict(set)  # submodule -> names of the units that contain it
    for name, unit in found.items():
        for submodule in unit.modules():
            unit_of[submodule].add(name)

    slots, homes = defaultdict(list), defaultdict(set)  # per parameter: where it hangs, which units
    for submodule in module.modules():
        for attribute, p in submodule._parameters.items():
            if p is not None:
                slots[p].append((submodule, attribute))
                homes[p] |= unit_of[submodule] or {""}

    members = {(name, frozen): [] for name in ["", *found] for frozen in (False, True)}
    for name, p in module.named_parameters():
        home = homes[p].pop() if len(homes[p]) == 1 else ""
        members[home, not p.requires_grad].append((name, p))

    result = []
    for (unit_name, frozen), named in members.items():
        if named:
            label = (unit_name or "root") + (" (frozen)" if frozen else "")
            names, params = zip(*named)
            _check_uniform(label, names, params)
            result.append(Unit(label, found.get(unit_name, module), params, names,
                               [slots[p] for p in params], rank, world_size))
    if all(unit.frozen or unit.numel == 0 for unit in result):
        raise ValueError(f"{type(module).__name__} has no trainable parameters: nothing to "
                         "partition. At least one parameter needs requires_grad=True")
    return result


def _find_units(module, units):
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
        inner = [other for other in found if other.startswith(name + ".")]
        if inner:
            raise ValueError(f"units overlap: {inner[0]!r} lies inside {name!r}; match only one "
                             "of the two")
    return found


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


def _check_uniform(label, names, params):
    for what in ("dtype", "device"):
        first = getattr(params[0], what)
        for name, p in zip(names, params):
            if getattr(p, what) != first:
                raise ValueError(f"unit {label!r} mixes {what}s: {names[0]!r} is {first}, {name!r} "
                                 f"is {getattr(p, what)}; give them one {what}, or units of their "
                                 "own")
