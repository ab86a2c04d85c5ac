"""Units and flat buffers: the one layout that all stages share.

A unit is what is gathered, reduced and freed together: usually one layer. Its parameters lie one
after another in a flat buffer, which is cut into world_size equal slices; slice r is the shard of
rank r. Parameters and slices begin at multiples of 16 bytes, so there may be padding between
parameters and at the end. A weight of ten and a bias of three elements in fp32, on two ranks:

    flat buffer   w w w w w w w w w w · · b b b ·      · is padding
    slices        [-- rank 0 ---] [-- rank 1 ---]

A parameter may lie in several slices, and a slice may hold parts of several parameters. The stages
differ in what a rank keeps (`Keeps`): everything, or its shard alone.

Frozen parameters (requires_grad=False) have no gradient and no optimizer state, so those of a
module are a unit of their own, and so are those of each further dtype.

`params` are the module's, views of `flat`. The optimizer updates `master`, and sees views of that,
`master_params`. The master is `shard` itself or, with mixed precision, a copy in higher precision.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .engine import units as rules
from .engine.backward import is_used_elsewhere, nobody_had_it
from .engine.owned import master_parameter
from .engine.slices import GradSlice, unmarked

FULL, SHARD = "full", "shard"
ALIGNMENT = 16  # bytes: what vectorized kernels want, and as much as the largest dtype has


class Keeps(NamedTuple):
    """What a rank keeps of parameters, gradients and optimizer states: FULL or SHARD."""

    params: str
    grads: str
    states: str


class Layout:
    """Where parameters of these sizes lie in a flat buffer. All numbers are elements.

    itemsize: bytes of an element in the narrowest buffer that has this layout. The others have the
    same offsets, and so are aligned too.
    """

    def __init__(self, sizes: Sequence[int], world_size: int, itemsize: int):
        step = max(1, ALIGNMENT // itemsize)
        self.sizes, self.world_size = list(sizes), world_size
        self.starts, end = [], 0
        for size in sizes:
            self.starts.append(-(-end // step) * step)  # rounded up
            end = self.starts[-1] + size
        self.numel = sum(sizes)
        self.shard_numel = -(-end // (step * world_size)) * step
        self.padded_numel = self.shard_numel * world_size

    def span(self, index: int, rank: int) -> tuple[int, int]:
        """Which elements of a parameter, from begin to end, lie in this rank's slice."""
        begin = rank * self.shard_numel - self.starts[index]
        clamp = [min(max(n, 0), self.sizes[index]) for n in (begin, begin + self.shard_numel)]
        return clamp[0], clamp[1]


class Unit(Layout):
    """The parameters of one module, trainable or frozen, as one flat buffer."""

    flat: Tensor  # the parameters, (padded_numel,)
    shard: Tensor  # what this rank updates of them: its slice, or at stage 0 everything
    master: Tensor  # what the optimizer updates: `shard`, or a copy of it in higher precision
    master_params: list[nn.Parameter]  # what it sees of each parameter: a view of `master`
    version: int  # of `master`, when the module's parameters last followed it

    def __init__(self, name: str, module: nn.Module, params: Sequence[nn.Parameter],
                 names: Sequence[str], slots: list, rank: int, world_size: int,
                 precision: tuple[torch.dtype, torch.dtype]):
        narrowest = min(dtype.itemsize for dtype in (params[0].dtype, *precision))
        super().__init__([p.numel() for p in params], world_size, narrowest)
        self.name, self.module = name, module
        self.params = params  # the module's own nn.Parameters, which autograd works on
        self.names = names  # their names in the wrapped module
        self.shapes = [p.shape for p in params]
        self.slots = slots  # for each, the (module, attribute) pairs where it hangs: tied, several
        self.frozen = not params[0].requires_grad
        self.dtype, self.grad_dtype = precision  # of `flat`, and of gradients when reduced
        self.rank = rank
        self.rank_slice = slice(rank * self.shard_numel, (rank + 1) * self.shard_numel)
        self.kept_grads: dict[torch.dtype, Tensor] = {}  # memory for gradients, the same every step
        self.local, self.local_marks = {}, {}  # what no_sync() has left, see engine/local.py
        # Stage 3 only
        self.gathered = True  # whether `flat` holds the full parameters
        self.gathering: Any = None  # the all_gather in flight that will fill it
        self.placeholders: list[nn.Parameter] = []  # what the module shows while it does not

    # ---- parameters ------------------------------------------------------------------------------

    def flatten(self) -> None:
        """Move the parameters into a new flat buffer; the module's tensors become views of it."""
        self.flat = self.params[0].new_zeros(self.padded_numel, requires_grad=False)
        for p, view in zip(self.params, self.full_views(self.flat)):
            view.copy_(p.detach())
            p.grad = None
        self.point_to(self.flat)

    def keep(self, keeps: Keeps) -> None:
        """Set up what this rank keeps. `flat` has the parameters, in full and in full precision."""
        full, self.keeps = self.flat, keeps
        self.shard_slice = slice(None) if keeps.states == FULL else self.rank_slice
        self.flat = full.to(self.dtype)  # without mixed precision they are one
        self.point_to(self.flat)
        self.shard = self.flat[self.shard_slice]
        if keeps.params == SHARD:
            self.shard = self.shard.clone()  # memory of its own
        mixed = self.dtype != full.dtype and not self.frozen
        self.master = full[self.shard_slice].clone() if mixed else self.shard
        self.master_params = [
            master_parameter(view, p, self.span(i, self.rank) if keeps.states == SHARD else None)
            for i, (p, view) in enumerate(zip(self.params, self.master_views(self.master)))]
        self.version = self.master._version

    @property
    def resharded(self) -> bool:
        """Whether the full parameters are neither there nor in flight."""
        return not self.gathered and self.gathering is None

    @property
    def mixed(self) -> bool:
        """Whether the master is a copy, of another dtype than what the model computes with."""
        return self.master.dtype != self.flat.dtype

    def publish(self) -> None:
        """Copy the master's new values into the shard, if it is not the same memory."""
        if self.mixed:
            self.shard.copy_(self.master)

    def adopt(self, full: Tensor) -> None:
        """The parameters now have the values in `full`, and the module shows its own again."""
        self.master.copy_(full[self.shard_slice])
        self.publish()
        if self.gathered:
            self.flat.copy_(full)
            self.point_to(self.flat)

    def point_to(self, flat: Tensor) -> None:
        """The module's parameters become views of `flat`."""
        for p, view in zip(self.params, self.full_views(flat)):
            p.data = view

    def full_views(self, flat: Tensor) -> list[Tensor]:
        """flat: (padded_numel,) → one view per parameter, in the parameter's shape."""
        return [flat[start : start + size].view(shape)
                for start, size, shape in zip(self.starts, self.sizes, self.shapes)]

    def shard_views(self, shard: Tensor) -> list[Tensor]:
        """shard: (shard_numel,) → one 1-D view per parameter: what lies in this slice of it."""
        spans = [(start - self.rank_slice.start, *self.span(index, self.rank))
                 for index, start in enumerate(self.starts)]
        return [shard[max(start + begin, 0) :][: end - begin] for start, begin, end in spans]

    def master_views(self, buffer: Tensor) -> list[Tensor]:
        """buffer: master, or its gradient → what the optimizer sees of each parameter."""
        return self.full_views(buffer) if self.keeps.states == FULL else self.shard_views(buffer)

    # ---- gradients -------------------------------------------------------------------------------

    def grad_buffer(self) -> Tensor:
        """(padded_numel,) in which a backward collects the gradients of the whole unit."""
        if self.keeps.grads == FULL:
            return self.grad_memory(self.padded_numel, self.grad_dtype)
        return self.flat.new_empty(self.padded_numel, dtype=self.grad_dtype)

    def grad_memory(self, numel: int, dtype: torch.dtype) -> Tensor:
        """(numel,) for gradients that the optimizer is to see: the same memory in every step,
        unless somebody still has a gradient of an earlier one. New memory comes from the kernel
        page by page, which takes longer than filling it."""
        if any(p.grad is not None for p in self.master_params):
            return self.flat.new_empty(numel, dtype=dtype)  # for what will be added to those
        if dtype not in self.kept_grads or is_used_elsewhere(self.kept_grads[dtype]):
            self.kept_grads[dtype] = self.flat.new_empty(numel, dtype=dtype)
        return self.kept_grads[dtype]

    def deliver(self, reduced: Tensor, missing: set[int]) -> bool:
        """Give the optimizer its mean gradient, in the master's dtype. reduced: like `shard`.

        missing: parameters that this rank had none for, see the note in engine/backward.py.
        Returns whether it was added to an earlier one.
        """
        added = any(p.grad is not None for p in self.master_params)
        if reduced.dtype != self.master.dtype:
            reduced = self.grad_memory(reduced.numel(), self.master.dtype).copy_(reduced)
        for index, (p, grad) in enumerate(zip(self.master_params, self.master_views(reduced))):
            if not p.requires_grad or (index in missing and nobody_had_it(grad)):
                continue
            # Detached, it may be edited in place as no view of autograd's may.
            grad = grad.detach() if p.grad is None else unmarked(p.grad).add_(grad)
            p.grad = grad if self.keeps.states == FULL else grad.as_subclass(GradSlice)
        return added


def lay_out(module: nn.Module, units, precision_of: Callable, rank: int, world_size: int
            ) -> list[Unit]:
    """The Units of `module`, the root's first. Nothing of the module is changed yet.

    units: which submodules are units, see `zero_ref.wrap`. A parameter belongs to the innermost
    unit that contains all the places where it hangs, or else to the root. precision_of: from a
    parameter and the modules around it to its dtype and its gradient's, as they are communicated.
    Raises ValueError if the units match nothing, or if one would mix devices.
    """
    rules.check_module(module)
    found = rules.find_units(module, units)
    slots, paths = defaultdict(list), defaultdict(list)  # of a parameter: places, and their names
    for path, submodule in module.named_modules(remove_duplicate=False):
        for attribute, p in submodule._parameters.items():
            if p is not None:
                slots[p].append((submodule, attribute))
                paths[p].append(path)

    members: dict = {unit_module: defaultdict(list) for unit_module in (module, *found.values())}
    for name, p in module.named_parameters():
        ways = [rules.modules_around(module, path) for path in paths[p]]
        home = [m for m in ways[0] if m in members and all(m in way for way in ways)][-1]
        kind = rules.Kind(not p.requires_grad, p.dtype, precision_of(p, ways[0]))
        members[home][kind].append((name, p))

    result = []
    for unit_name, unit_module in {"": module, **found}.items():
        kinds = sorted(members[unit_module], key=lambda kind: kind.frozen)  # trainable ones first
        for kind in kinds:
            names, params = zip(*members[unit_module][kind])
            label = rules.label(unit_name, kind, kinds)
            rules.check_devices(label, names, params)
            result.append(Unit(label, unit_module, params, names, [slots[p] for p in params],
                               rank, world_size, kind.precision))
    return result
