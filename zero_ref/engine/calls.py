"""Stage 3: where a unit's forward and backward begin and end, and which unit comes next."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .backward import Backward
from .buckets import Bucket
from .tree import map_tensors, tensors_in


class Call:
    """One forward of a unit. Alive as long as its graph, because the hooks at its outputs hold it.

    It holds autograd's nodes of its inputs, and those before its first output. The hooks at its
    inputs hold `mark` alone: if a node's hook held that node, the graph would stay until Python's
    garbage collector comes, on every rank at another time.
    """

    def __init__(self, module: nn.Module, inputs: list[Tensor]):
        self.mark, self.inputs, self.last = Mark(module), [x.grad_fn for x in inputs], []

    def returns(self, output, unit) -> None:
        if output is not None and not isinstance(output, Tensor) and not tensors_in(output):
            raise RuntimeError(
                f"unit {unit.name!r} returned {type(output).__name__}, in which no tensor was "
                "found: stage 3 has to notice when backward comes back, so a unit returns tensors, "
                "or tuples, lists, dicts or dataclasses of them")
        if forward_ad._current_level >= 0:
            for x in tensors_in(output):
                if (tangent := forward_ad.unpack_dual(x).tangent) is not None:
                    tangent.requires_grad and tangent.register_hook(_refuse_tangent)
        nodes = [x.grad_fn for x in tensors_in(output) if x.grad_fn is not None]
        if nodes:
            first = min(nodes, key=lambda node: node._sequence_nr())
            self.last = [node for node, _ in first.next_functions
                         if node is not None and not hasattr(node, "variable")]

    def expect(self) -> bool:
        """Whether the running backward comes by here. Counts the inputs at which it will leave."""
        will_run = torch._C._will_engine_execute_node
        self.mark.expected = sum(map(will_run, self.inputs))
        return self.mark.expected > 0 or any(map(will_run, self.last))


@dataclass(eq=False)
class Mark:
    module: nn.Module
    expected: int = 0  # gradients of inputs that the running backward has yet to come by


class Calls:
    """The forwards of all units that backward may still come to."""

    def __init__(self):
        self.of: dict[nn.Module, WeakSet[Call]] = defaultdict(WeakSet)
        self.open: list[Call] = []  # those whose forward is running, the innermost last

    def begin(self, module: nn.Module, inputs: list[Tensor], recomputing: bool) -> Mark:
        # A recomputed call is never asked, so it need not hold the graph before it.
        self.open.append(Call(module, [] if recomputing else inputs))
        if not recomputing:
            self.of[module].add(self.open[-1])
        return self.open[-1].mark

    def expect(self, modules: Iterable[nn.Module], backward: Backward) -> None:
        """Ask autograd which of these modules' calls the backward comes by. For all when it begins;
        re-entrant checkpointing adds new ones, and runs a backward of its own for them."""
        for call in [call for module in modules for call in self.of[module]]:
            if call.mark not in backward.asked:
                backward.asked.add(call.mark)
                if call.expect():
                    backward.to_leave[call.mark.module].add(call.mark)


class Pass:
    """In which order modules come, forward or backward. What came last time will again.

    gathered: units that this pass has gathered. ahead: sets of units that were gathered ahead, and
    of which none has been needed yet.
    """

    def __init__(self):
        self.now: list[nn.Module] = []
        self.begin()

    def begin(self) -> None:
        self.last, self.now, self.gathered, self.ahead = self.now, [], set(), []

    def arrived(self, module: nn.Module, units: Iterable) -> None:
        refuse_transforms()
        self.now.append(module)
        self.ahead = [those for those in self.ahead if those.isdisjoint(units)]

    def together(self, unit, bucket: Bucket) -> list:
        """Which of the bucket's units to gather when `unit` is needed: those that this pass needs
        and has not gathered yet, but `unit` alone if it is needed once more."""
        if not unit.resharded:
            return []
        found = [unit] if unit in self.gathered else [
            u for u in bucket if u is unit
            or (u not in self.gathered and (not self.last or u.module in self.last))]
        self.gathered.update(found)
        return found

    def next_resharded(self, units_of: dict[nn.Module, list]) -> list:
        """The units of the next module whose parameters are not there, if the order is known."""
        count = len(self.now)
        if self.last[count - 1 : count] == self.now[-1:]:
            for module in self.last[count:]:
                if any(unit.resharded for unit in units_of[module]):
                    return units_of[module]
        return []


def refuse_transforms() -> None:
    """They would keep parameters beyond the forward in which these are there. Backward itself may
    be batched (is_grads_batched), as it gathers."""
    tracing = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    if ((tracing is not None or torch._C._functorch.peek_interpreter_stack() is not None)
            and torch._C._current_graph_task_id() == -1):
        raise RuntimeError(
            "torch.func (grad, vjp, jvp, vmap, jacrev, …) and tracing do not work at stage 3: they "
            "use parameters after their unit was resharded; use stage 2, or for a jvp "
            "torch.autograd.forward_ad.make_dual, and torch.autograd.grad for a gradient")


def _refuse_tangent(grad):
    raise RuntimeError("backward through a forward-mode tangent does not work at stage 3: the "
                       "tangent's graph uses parameters after their unit was resharded; use "
                       "stage 2")


def without_fragile(output, units: Iterable):
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

