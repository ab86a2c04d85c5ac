"""One backward that is running.

[Note: gradients that are missing] A rank may have no gradient for a parameter that others use; what
it then contributes to the sum are zeros. If no rank has one, the parameter's gradient has to stay
None, as with torch DDP: weight decay and momentum would change it otherwise. The sum itself says
so, without a message more. A rank that has no gradient puts in *negative* zeros, and gradients are
copied with `+ 0`, which turns any negative zero of theirs into a positive one. A sum of floating
point numbers is -0.0 only if all of them are. So where the sum is -0.0, nobody had a gradient.
"""

import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .buckets import Bucket
from .local import hide_local, show_local

_running = defaultdict(list)  # name of a group -> weakrefs to its Backwards, as they began


class Backward:
    """What a running backward has produced, and what is still to be reduced. It is dropped as a
    whole when autograd has come to its end, which calls `finish`, or has failed.

    queue: buckets that are yet to be reduced, the next one last: always the same order on every
    rank, whatever order the gradients arrive in. Empty if nothing will be accumulated, as in
    torch.autograd.grad: then there is nothing to sum.
    """

    def __init__(self, model, buckets: list[Bucket], finish: Callable[[], None]):
        hide_local(model.trainable)
        params = [p for unit in model.trainable for p in unit.params if p.requires_grad]
        self.queue = list(buckets) if _accumulates(params) else []
        self.in_flight: deque = deque()  # (bucket, its reduced gradients, handle)
        self.grads: dict = {}  # unit -> (padded_numel,), this rank's gradients, while they fill up
        self.ready = defaultdict(set)  # unit -> indices of the parameters whose gradient is there
        self.missing = defaultdict(set)  # unit -> those that this rank has none for
        # Stage 3 only
        self.entered = set()  # modules between their outputs and their inputs
        self.left = set()  # units that it has been through
        self.asked = set()  # Marks of the calls that autograd has been asked about, see calls.py
        self.to_leave = defaultdict(set)  # module -> Marks of its calls that it has yet to leave
        self.expected = {unit: sum(p.requires_grad for p in unit.params)
                         for bucket in buckets for unit in bucket}
        self.begun = _running[model.group.group_name]
        self.begun[:] = [ref for ref in self.begun if ref() is not None]
        self.begun.append(weakref.ref(self))
        torch.autograd.Variable._execution_engine.queue_callback(finish)

    def end(self, local: Iterable) -> None:
        """local: the units whose gradients stay local."""
        self.begun.remove(weakref.ref(self))
        show_local(local)

    def others_come_first(self) -> bool:
        """Whether another model that this backward came to earlier still has units to reduce: on
        every rank one comes after the other, also where a gradient is missing."""
        earlier = [ref() for ref in self.begun[: self.begun.index(weakref.ref(self))]]
        return any(backward.queue for backward in earlier if backward is not None)

    def complete(self, units: Iterable) -> bool:
        """Whether all gradients of these units are there."""
        return all(len(self.ready[unit]) >= self.expected[unit] for unit in units)

    def refuse_late(self, unit, index: int) -> None:
        if not any(unit in bucket for bucket in self.queue):
            raise RuntimeError(f"a gradient of {unit.names[index]!r} arrived after those of unit "
                               f"{unit.name!r} had been reduced in this backward")

    def collect(self, unit, index: int) -> None:
        """Move one parameter's gradient into the unit's flat buffer, and free the original."""
        p, begin = unit.params[index], unit.starts[index]
        if p.grad.layout != torch.strided or p.grad.requires_grad:
            what = "is sparse" if p.grad.is_sparse else "has a graph of its own (create_graph=True)"
            raise RuntimeError(f"the gradient of {unit.names[index]!r} {what}: only plain "
                               "gradients can lie in a flat buffer")
        place = self._buffer(unit)[begin:][: p.grad.numel()].view(p.grad.shape)
        if index in self.ready[unit]:  # re-entrant checkpointing delivers it in several pieces
            place += p.grad
        else:
            torch.add(p.grad, 0, out=place)  # see [Note: gradients that are missing]
        p.grad = None

    def fill_missing(self, unit) -> None:
        """What this backward has not reached: gradients from inside no_sync(), else zeros."""
        for index in set(range(len(unit.params))) - self.ready[unit]:
            if unit.params[index].grad is not None:
                self.collect(unit, index)
            else:
                self._buffer(unit)[unit.starts[index] :][: unit.sizes[index]] = -0.0
                self.missing[unit].add(index)

    def _buffer(self, unit):
        if unit not in self.grads:
            self.grads[unit] = unit.grad_buffer()
        return self.grads[unit]


def _accumulates(params: list[Tensor]) -> bool:
    """Whether the backward that is running accumulates gradients of any of these parameters, which
    torch.autograd.grad does not. True also where its graph has none of them, but would accumulate:
    other ranks, which took another branch, may have some.
    """
    will_run = torch._C._will_engine_execute_node
    try:
        if any(will_run(get_gradient_edge(p).node) for p in params):  # the first one, as a rule
            return True
        ours, seen, line = set(params), {None}, [torch._C._current_autograd_node()]
        while line and params:
            if (node := line.pop()) not in seen:
                if getattr(node, "variable", None) in ours:
                    return will_run(node)
                seen.add(node)
                line += [following for following, _ in node.next_functions]
    except RuntimeError:  # what autograd.grad is to return is the gradient of this very parameter
        return False
    return bool(params)


def nobody_had_it(reduced: Tensor) -> bool:
    """Whether this part of a reduced gradient says that no rank had one (or is empty)."""
    first = reduced.reshape(-1)[:1]
    first = first.real if first.is_complex() else first
    return bool(((first == 0) & first.signbit()).all())


def is_used_elsewhere(memory: Tensor) -> bool:
    """Whether another tensor or array has the memory of this one."""
    storage = memory.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) > 2  # `memory` and `storage`
