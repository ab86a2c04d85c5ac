"""Units and flat buffers: the one layout that all stages share.

A unit is what is gathered, reduced and freed together: usually one layer. Its parameters lie one
after another in a flat buffer, which is padded to a multiple of the world size and cut into equal
slices; rank r owns slice r. A parameter may lie in several slices, and a slice in several
parameters. Four weights and a bias on three ranks:

    flat buffer   weight   weight   weight   weight   bias   padding
    slices        [---- rank 0 ---] [---- rank 1 ---] [--- rank 2 --]

Frozen parameters (requires_grad=False) have no gradient and no optimizer state. They get a flat
buffer of their own beside the unit's trainable one, which only stage 3 slices. So does each dtype.

The optimizer of a rank updates `master`. Which memory that is:

    stage                     0              1 and 2                   3
    one precision             flat           its own slice of flat     a buffer of its own, shard
    mixed precision           fp32 copy      fp32 copy of that slice   fp32 copy of shard

`params` are the module's, views of flat; `owned` the optimizer's, views of master.
"""

from collections import defaultdict
from itertools import accumulate

import torch

from .engine.units import (
    check_devices,
    check_max_norm,
    check_storages,
    find_units,
    modules_on_the_way,
)


class Unit:
    """The parameters of one module, trainable or frozen, as one flat buffer."""

    def __init__(self, name, module, params, names, slots, rank, world_size, precision):
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
        self.dtype, self.grad_dtype = precision  # of `flat` and of `grad`

        # What lives as long as the model
        self.flat = None  # all parameters, (padded_numel,)
        self.shard = None  # this rank's slice of them, (shard_numel,)
        self.master = None  # what the optimizer updates: `flat` or `shard`, or a copy of it in fp32
        self.owned = []  # the optimizer's view of each parameter in `master`
        self.version = 0  # of `master`, when the module's parameters last followed it

        # Gradients
        self.grad = None  # this rank's own, while backward fills them in, (padded_numel,)
        self.expected = 0  # how many of the parameters are not frozen at the moment
        self.ready = set()  # indices of the parameters whose gradient this backward has produced
        self.gaps = set()  # those for which this rank has had nothing to reduce
        self.kept_grads = {}  # dtype -> the memory in which the reduced ones stay

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
            p.grad = None
        self.point_to(self.flat)
        self.shard = self.flat[self.own_slice]

    def point_to(self, flat):
        """The module's parameters become views of `flat`."""
        for p, view in zip(self.params, self.full_views(flat)):
            p.data = view

    def round_flat(self):
        """Mixed precision: from now on `flat` has the dtype of the computation. Returns the buffer
        of before, which without mixed precision is the same."""
        full = self.flat
        self.flat = full.to(self.dtype)
        self.shard = self.flat[self.own_slice]
        self.point_to(self.flat)
        return full

    @property
    def mixed(self):
        """Whether the master copy is one: of another dtype than what the model computes with."""
        return self.master.dtype != self.flat.dtype

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

    def grad_memory(self, numel, dtype):
        """(numel,) for gradients that the optimizer is to see: the same memory in every step. New
        memory comes from the kernel page by page, which costs more time than to fill it."""
        if any(p.grad is not None for p in self.owned):
            return self.flat.new_empty(numel, dtype=dtype)  # for what will be added to those
        if dtype not in self.kept_grads:
            self.kept_grads[dtype] = self.flat.new_empty(numel, dtype=dtype)
        return self.kept_grads[dtype]

    def store_grad(self, index):
        """Move one parameter's gradient into the flat gradient buffer, and free the original."""
        p = self.params[index]
        if p.grad.layout != torch.strided or p.grad.requires_grad:
            what = "is sparse" if p.grad.is_sparse else "has a graph of its own (create_graph=True)"
            raise RuntimeError(f"the gradient of {self.names[index]!r} {what}: only plain "
                               "gradients can lie in a flat buffer")
        place = self.grad[self.offsets[index] : self.offsets[index + 1]].view(p.grad.shape)
        if index in self.ready:  # re-entrant checkpointing delivers a gradient in several pieces
            place += p.grad
        else:
            torch.add(p.grad, 0, out=place)  # a copy in which no zero is negative, see fill_gaps
        p.grad = None

    def complete(self):
        """Whether this backward has produced the gradients of all parameters that have one."""
        return len(self.ready) >= self.expected

    def fill_gaps(self):
        """What this backward has not reached: gradients from inside no_sync(), else zeros.

        Negative zeros, because no gradient has any: where the sum over the ranks is a negative
        zero, no rank had a gradient, and the parameter is to be left alone.
        """
        for index in set(range(len(self.params))) - self.ready:
            if self.params[index].grad is not None:
                self.store_grad(index)
            else:
                self.grad[self.offsets[index] : self.offsets[index + 1]] = -0.0
                self.gaps.add(index)
        self.grad[self.numel :] = 0

    def left_alone(self, index, reduced):
        """Whether no rank had a gradient for this parameter. reduced: this rank's part of it."""
        if index not in self.gaps:
            return False
        first = reduced.reshape(-1)[:1]
        return bool(((first == 0) & first.signbit()).all())  # or there is none in this slice


def partition(module, units, precision_of, rank, world_size):
    """Lay out `module` without touching it yet. Returns its Units, the root's first.

    units: which submodules are units, see `zero_ref.wrap`. A parameter belongs to the innermost
    unit that contains all the places where it hangs, or else to the root. precision_of: tells the
    dtypes of a parameter and of its gradient while they compute and communicate, from it and the
    modules that contain it. Raises ValueError if the units match nothing, or if one would mix
    devices.
    """
    check_storages(module)
    check_max_norm(module)
    found = find_units(module, units)
    slots = defaultdict(list)  # parameter -> where it hangs
    for submodule in module.modules():
        for attribute, p in submodule._parameters.items():
            if p is not None:
                slots[p].append((submodule, attribute))
    paths = defaultdict(list)  # parameter -> all its names
    for name, p in module.named_parameters(remove_duplicate=False):
        paths[p].append(name)

    members = {unit_module: defaultdict(list) for unit_module in (module, *found.values())}
    for name, p in module.named_parameters():
        ways = [modules_on_the_way(module, path) for path in paths[p]]
        home = [m for m in ways[0] if m in members and all(m in way for way in ways)][-1]
        precision = precision_of(p, ways[0])
        members[home][not p.requires_grad, p.dtype, precision].append((name, p))

    result = []
    for unit_name, unit_module in {"": module, **found}.items():
        kinds = sorted(members[unit_module], key=lambda kind: kind[0])  # the trainable ones first
        for kind in kinds:
            names, params = zip(*members[unit_module][kind])
            label = unit_name or "root"
            notes = ["frozen"] * kind[0] + [_short(kind[2][0])] * (kind[1:] != kinds[0][1:])
            label += f" ({', '.join(notes)})" if notes else ""
            check_devices(label, names, params)
            result.append(Unit(label, unit_module, params, names, [slots[p] for p in params],
                               rank, world_size, kind[-1]))
    if all(unit.frozen or unit.numel == 0 for unit in result):
        raise ValueError(f"{type(module).__name__} has no trainable parameters: nothing to "
                         "partition. At least one parameter needs requires_grad=True")
    return result


def _short(dtype):
    return str(dtype).removeprefix("torch.")
