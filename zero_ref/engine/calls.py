"""Stage 3: where a unit's forward and backward begin and end, and which unit comes next."""

from collections import defaultdict
from weakref import WeakSet

import torch

from .tree import map_tensors, tensors_in


class Call:
    """One forward of a unit. Alive as long as its graph, because the hooks at its outputs hold it.

    The hooks at its inputs hold `mark` alone: if they held the nodes, which hold them, the graph
    would stay until Python's garbage collector comes, on every rank at another time.
    """

    def __init__(self, module, inputs):
        self.mark, self.nodes = Mark(module), [x.grad_fn for x in inputs]

    def expect(self):
        """Whether the running backward comes by here, and so to how many of the inputs."""
        self.mark.expected = sum(map(torch._C._will_engine_execute_node, self.nodes))
        return self.mark.expected > 0


class Mark:
    def __init__(self, module):
        self.module, self.expected = module, 0


class Calls:
    """The forwards of all units that backward may still come to."""

    def __init__(self):
        self.of = defaultdict(WeakSet)  # module -> its Calls
        self.open = []  # those whose forward is running, the innermost last
        self.pending = {}  # module -> Marks of those that this backward has yet to leave
        self.endless = set()  # modules that backward does not leave: an input needs no gradient

    def begin(self, module, inputs, recomputing):
        self.open.append(Call(module, inputs))
        if not inputs:
            self.endless.add(module)
        if not recomputing:
            self.of[module].add(self.open[-1])
        return self.open[-1].mark

    def enter(self, module):
        if module not in self.pending:
            self.pending[module] = {call.mark for call in self.of[module] if call.expect()}

    def leave(self, mark):
        """Backward has another gradient of an input. Returns whether it has left the module."""
        mark.expected -= 1
        if mark.expected == 0:
            self.pending[mark.module].discard(mark)
        return not self.pending[mark.module] and mark.module not in self.endless


class Pass:
    """In which order modules come, forward or backward. What came last time will again.

    gathered: units that this pass has gathered. ahead: sets of units that were gathered ahead, and
    of which none has been needed yet.
    """

    def __init__(self):
        self.now = []
        self.begin()

    def begin(self):
        self.last, self.now, self.gathered, self.ahead = self.now, [], set(), []

    def arrived(self, module, units):
        self.now.append(module)
        self.ahead = [those for those in self.ahead if those.isdisjoint(units)]

    def together(self, unit, bucket):
        """Which of the bucket's units to gather when `unit` is needed: those that this pass needs
        and has not gathered yet, but `unit` alone if it is needed once more."""
        if not unit.resharded:
            return []
        found = [unit] if unit in self.gathered else [
            u for u in bucket if u is unit
            or (u not in self.gathered and (not self.last or u.module in self.last))]
        self.gathered.update(found)
        return found

    def next_resharded(self, units_of):
        """The units of the next module whose parameters are not there, if the order is known."""
        count = len(self.now)
        if self.last[count - 1 : count] == self.now[-1:]:
            for module in self.last[count:]:
                if any(unit.resharded for unit in units_of[module]):
                    return units_of[module]
        return []


def without_fragile(output, units):
    """A unit's output, with clones of what may not leave it as it is, see below."""
    clones = {}  # one of each
    storages = {unit.flat.untyped_storage().data_ptr() for unit in units}
    return map_tensors(lambda x: clones.setdefault(x, x.clone()) if _is_fragile(x, storages)
                       else x, output)


def _is_fragile(x, storages):
    """A view, whose hooks a later in-place operation would do away with; a tensor of a unit inside
    this one, so that both would hook one tensor, on the ranks that take this branch; or a parameter
    of the unit, which is about to be resharded."""
    return x.layout == torch.strided and (
        (x.requires_grad and (x._is_view() or bool(x._backward_hooks)))
        or x.untyped_storage().data_ptr() in storages)


def refuse_opaque(unit, output):
    if output is not None and not isinstance(output, torch.Tensor) and not tensors_in(output):
        raise RuntimeError(
            f"unit {unit.name!r} returned {type(output).__name__}, in which no tensor was "
            "found: stage 3 has to notice when backward comes back, so a unit returns tensors, "
            "or tuples, lists, dicts or dataclasses of them")
