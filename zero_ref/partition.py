"""Units and flat buffers: the one layout that all stages share.

A unit is what is gathered, reduced and freed together: usually one layer. Its parameters lie one
after another in a flat buffer, which is padded to a multiple of the world size and cut into equal
slices; rank r owns slice r. A parameter may lie in several slices, and a slice in several
parameters. Four weights and a bias on three ranks:

    flat buffer   weight   weight   weight   weight   bias   padding
    slices        [---- rank 0 ---] [---- rank 1 ---] [--- rank 2 --]

Frozen parameters (requires_grad=False) have no gradient and no optimizer state. They get a flat
buffer of their own beside the unit's trainable one, which only stage 3 slices.
"""

from collections import defaultdict
from itertools import accumulate

from .units import check_storages, check_uniform, find_units


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
        self.own_slice = slice(rank * self.shard_numel, (rank + 1) * self.shard_numel)
        self.rank, self.world_size = rank, world_size

        # What lives as long as the model
        self.flat = None  # all parameters, (padded_numel,)
        self.shard = None  # this rank's slice of them, (shard_numel,)
        self.owned = []  # for each parameter: what the optimizer sees of it on this rank

        # Gradients
        self.grad = None  # this rank's own, while backward fills them in, (padded_numel,)
        self.ready = set()  # indices of the parameters whose gradient this backward has produced
        self.kept_grad = None  # the memory in which the optimizer finds the reduced ones

        # Stage 3 only
        self.gathered = True  # whether `flat` holds the full parameters
        self.gathering = None  # the all_gather under way that will fill it
        self.placeholders = []  # what the module shows while it does not
        self.in_backward = False  # whether backward is between the unit's outputs and inputs

    def flatten(self):
        """Move the parameters into a new flat buffer; the module's tensors become views of it."""
        self.flat = self.params[0].new_zeros(self.padded_numel, requires_grad=False)
        for p, view in zip(self.params, self.full_views(self.flat)):
            view.copy_(p.detach())
            p.data, p.grad = view, None
        self.shard = self.flat[self.own_slice]

    def full_views(self, flat):
        """flat: (padded_numel,) → one view per parameter, in the parameter's shape."""
        spans = zip(self.offsets, self.offsets[1:], self.shapes)
        return [flat[start:end].view(shape) for start, end, shape in spans]

    def shard_views(self, shard):
        """shard: (shard_numel,) → one 1-D view per parameter: what lies in this slice of it."""
        base = self.own_slice.start
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

    # ---- gradients -------------------------------------------------------------------------------

    def grad_memory(self, numel):
        """(numel,) for gradients that the optimizer is to see: the same memory in every step. New
        memory comes from the kernel page by page, which costs more time than to fill it."""
        if any(p.grad is not None for p in self.owned):
            return self.flat.new_empty(numel)  # for what will be added to those
        if self.kept_grad is None:
            self.kept_grad = self.flat.new_empty(numel)
        return self.kept_grad

    def store_grad(self, index):
        """Move one parameter's gradient into the flat gradient buffer, and free the original."""
        p = self.params[index]
        place = self.grad[self.offsets[index] : self.offsets[index + 1]]
        if index in self.ready:  # re-entrant checkpointing delivers a gradient in several pieces
            place += p.grad.reshape(-1)
        else:
            place.copy_(p.grad.reshape(-1))
        p.grad = None

    def complete(self):
        """Whether this backward has produced the gradients of all parameters that have one."""
        return self.frozen or len(self.ready) == len(self.params)

    def fill_gaps(self):
        """What this backward has not reached: gradients from inside no_sync(), else zeros."""
        for index in set(range(len(self.params))) - self.ready:
            if self.params[index].grad is not None:
                self.store_grad(index)
            else:
                self.grad[self.offsets[index] : self.offsets[index + 1]] = 0
        self.grad[self.numel :] = 0


def partition(module, units, rank, world_size):
    """Lay out `module` without touching it yet. Returns its Units, the root's first.

    `units`: which submodules are units, see `zero_ref.wrap`. What no unit contains, and a parameter
    tied across units, belongs to the root. Raises ValueError if the units match nothing or overlap,
    or if one would mix dtypes or devices.
    """
    check_storages(module)
    found = find_units(module, units)
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
            check_uniform(label, names, params)
            result.append(Unit(label, found.get(unit_name, module), params, names,
                               [slots[p] for p in params], rank, world_size))
    if all(unit.frozen or unit.numel == 0 for unit in result):
        raise ValueError(f"{type(module).__name__} has no trainable parameters: nothing to "
                         "partition. At least one parameter needs requires_grad=True")
    return result
