"""Stage 3: parameters are partitioned too (P_os+g+p in the paper).

Stage 2 plus one partition: between uses, a rank keeps only its slice of a unit's parameters. The
full ones are gathered just before a unit's forward and again before its backward, and let go right
after, so the all_gather after the step is gone:

    Phase 1  forward     unshard each unit (all_gather), run it, reshard it; the next unit is
                         gathered while it runs: Ψ·(N-1)/N elements sent in all
    Phase 2  backward    unshard each unit again, Ψ·(N-1)/N; when autograd has left it, reshard it.
                         One reduce_scatter of its gradients as at stage 2, Ψ·(N-1)/N
    Phase 4  step        every rank updates its slice, and sends nothing

Together 3Ψ·(N-1)/N, 1.5 times stage 0. What is left at the peak are the slices plus the units that
are gathered at one time: the one that computes, the one that comes next, and the root's own
parameters.

A unit's flat buffer keeps its address in every view that autograd has saved. Letting go means
emptying the storage behind them (`untyped_storage().resize_(0)`), not pointing the parameter
elsewhere: saved views would keep the old memory alive.

All ranks have to run the same units in the same order, because everyone's slice is needed. What a
unit takes and returns has to be made of tensors in tuples, lists, dicts and dataclasses: backward
is noticed there. A tensor that leaves a unit by another way (an attribute, a hook's capture) and
gets a gradient is not, and its backward may come when the parameters are not there.

Rajbhandari et al., ZeRO, arXiv 1910.02054, section 5.3. The words are those of PyTorch's FSDP2.
"""

from collections import defaultdict
from weakref import WeakSet

import torch
from torch.autograd.graph import register_multi_grad_hook

from . import comm
from .engine.placeholder import make_placeholders, show_in_module
from .engine.tree import map_tensors, tensors_in
from .stage2 import Stage2


class Stage3(Stage2):
    stage = 3

    def __init__(self, *args, reshard_after_forward=True, **options):
        self.reshard_after_forward = reshard_after_forward
        super().__init__(*args, **options)

    def _register_hooks(self):
        hooks = super()._register_hooks()
        self._forward_order, self._backward_order = Order(), Order()
        self._units_of = defaultdict(list)  # module -> its units: trainable, frozen, by dtype
        self._calls_of = defaultdict(WeakSet)  # module -> its Calls
        self._open_calls = []  # those whose forward is running, the innermost last
        self._left_now = set()  # those that this backward has been through
        for unit in self.units:
            self._units_of[unit.module].append(unit)
        after = torch.compiler.disable(self._weak_hook("_post_forward"))
        for submodule in self._units_of.keys() - {self.module}:  # the root's turn is in forward()
            hooks.append(submodule.register_forward_hook(after))
        return hooks

    # ---- unshard and reshard ---------------------------------------------------------------------

    def _unshard(self, unit, phase):
        """Start to gather the unit's full parameters, unless they are there or on their way."""
        if not unit.gathered and unit.gathering is None and not self._in_full_params:
            unit.flat.untyped_storage().resize_(unit.padded_numel * unit.flat.itemsize)
            unit.gathering = comm.all_gather(unit.flat, unit.shard, self.group,
                                             unit=unit.name, phase=phase)

    def _wait_for_unshard(self, unit):
        if unit.gathering is not None:
            unit.gathering.wait()
            unit.gathering = None
            unit.point_to(unit.flat)
            show_in_module(unit, unit.params)
            unit.gathered = True

    def _unshard_module(self, submodule, phase, order):
        """Gather a module's units, and start to gather those of the module that will come next, so
        that they arrive while this one computes. One module ahead: more would cost memory."""
        following = order.arrived(submodule)
        for unit in self._units_of[submodule]:
            self._unshard(unit, phase)
            self._wait_for_unshard(unit)
        if self.overlap and following is not None and self._checker is None:
            for unit in self._units_of[following]:
                self._unshard(unit, phase)

    def _reshard(self, unit):
        """Let go of all but this rank's slice."""
        self._wait_for_unshard(unit)
        if unit.gathered and not self._in_full_params:
            self._let_go(unit)

    def _let_go(self, unit):
        show_in_module(unit, unit.placeholders)
        if not self._in_backward:  # while it runs, a checkpoint compares the shapes of what it kept
            self._empty(unit)
        unit.flat.untyped_storage().resize_(0)
        unit.gathered = False

    def _empty(self, unit):
        """For who kept a reference to a parameter: an empty tensor, not a dangling one."""
        for p in unit.params:
            p.data = p.data.new_empty(0)

    # ---- Phase 1: forward ------------------------------------------------------------------------

    def forward(self, *args, **kwargs):
        self._drop_failed_backward()
        self._forward_order.restart()
        self._open_calls.clear()
        output = super().forward(*args, **kwargs)
        output = self._post_forward(self.module, args, output)
        for unit in self.units:
            if unit.gathering is not None:  # this forward took another way than the last one
                self._reshard(unit)
        return output

    def _pre_forward(self, submodule, args, kwargs):
        units = self._units_of.get(submodule, [])  # none: the root, or a copy that has our hooks
        if self._in_backward:  # activation checkpointing runs forward again
            for unit in units:
                self._unshard(unit, "forward")
                self._wait_for_unshard(unit)
        elif units:
            self._unshard_module(submodule, "forward", self._forward_order)
        args, kwargs = super()._pre_forward(submodule, args, kwargs)
        if not units or not torch.is_grad_enabled():
            return args, kwargs
        call = Call(submodule)
        if not any(unit.in_backward for unit in units):  # else a checkpointed unit is recomputed
            self._calls_of[submodule].add(call)
        self._open_calls.append(call)
        # Backward has left the unit when it has the gradients of these views of its inputs.
        inputs = [x for x in tensors_in((args, kwargs)) if x.requires_grad]
        if inputs:
            register_multi_grad_hook(inputs, self._weak_hook("_post_backward", submodule, call))
        return args, kwargs

    def _post_forward(self, submodule, args, output):
        units = self._units_of.get(submodule, [])
        if not units:
            return output
        clones = {}  # one of each
        output = map_tensors(lambda x: clones.setdefault(x, x.clone()) if _is_fragile(x, units)
                             else x, output)
        if torch.is_grad_enabled():
            self._refuse_opaque(units[0], output)
            self._on_grad_of(output, "_pre_backward", submodule, self._open_calls.pop())
        for unit in units:
            recomputing = unit.in_backward  # activation checkpointing runs forward again
            if not recomputing and (self.reshard_after_forward or not torch.is_grad_enabled()):
                self._reshard(unit)
        return output

    def _refuse_opaque(self, unit, output):
        if output is not None and not isinstance(output, torch.Tensor) and not tensors_in(output):
            raise RuntimeError(
                f"unit {unit.name!r} returned {type(output).__name__}, in which no tensor was "
                "found: stage 3 has to notice when backward comes back, so a unit returns tensors, "
                "or tuples, lists, dicts or dataclasses of them")

    # ---- Phase 2: backward -----------------------------------------------------------------------

    def _pre_backward(self, submodule, call, grad):
        """Runs when autograd has the gradient of one of the unit's outputs, and needs the rest."""
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True does not work at stage 3: a gradient's own graph "
                               "uses parameters after their unit was resharded; use stage 2")
        self._begin_backward()
        units = self._units_of[submodule]
        if call.left and call not in self._left_now:  # a graph once more, with retain_graph=True
            for again in self._calls_of[submodule]:
                again.left = False
        if not all(unit.in_backward for unit in units):
            for unit in units:
                unit.in_backward = True
            self._unshard_module(submodule, "backward", self._backward_order)

    def _post_backward(self, submodule, call, grads):
        """Runs when autograd has the gradients of the unit's inputs, and so those of its
        parameters. If this was its last call, reshard and reduce.

        Stages 0 to 2 reduce when the last gradient is there. Here it may not wait for a gradient
        that only other ranks have: between gathers, all ranks have to reduce at the same point.
        """
        call.left = True
        self._left_now.add(call)
        for unit in self._units_of[submodule]:
            unit.in_backward = False
        if all(call.left for call in self._calls_of[submodule]):
            for unit in self._units_of[submodule]:
                self._reshard(unit)
                if self._sync and unit in self._queue:
                    self._queue.remove(unit)
                    self._start_reduction(unit)

    def _unit_ready(self, unit):
        """All of the unit's gradients are there: this stage waits for _post_backward."""

    def _leave_backward(self):
        super()._leave_backward()
        self._left_now.clear()
        self._backward_order.restart()
        running = {call.module for call in self._open_calls}  # torch.autograd.grad in a forward
        for unit in self.units:
            unit.in_backward = False
            if unit.module not in running:
                self._reshard(unit)
                if not unit.gathered:
                    self._empty(unit)

    # ---- Phase 4: the optimizer's step -----------------------------------------------------------

    def _make_master(self, unit, full):
        master = full[unit.own_slice].clone()
        unit.shard = master.to(unit.dtype)  # without mixed precision they are one
        unit.placeholders = make_placeholders(unit)
        self._let_go(unit)
        return master

    def _after_step(self, units):
        for unit in units:
            unit.shard.copy_(unit.master)
            # Gathered still, if a forward was not followed by its backward: outdated.
            self._reshard(unit)

    # ---- full parameters -------------------------------------------------------------------------

    def _gather_full(self, unit):
        if unit.mixed:
            self._reshard(unit)
            show_in_module(unit, unit.params)
            return super()._gather_full(unit)
        self._unshard(unit, "full_params")
        self._wait_for_unshard(unit)
        return unit.flat

    def _take_over(self, unit, full):
        unit.master.copy_(full[unit.own_slice])
        unit.shard.copy_(unit.master)
        self._let_go(unit)


class Call:
    """One forward of a unit, for as long as its graph is alive."""

    def __init__(self, module):
        self.module = module
        self.left = False  # whether backward has been through


class Order:
    """In which order modules come in a pass. What came after what last time will again."""

    def __init__(self):
        self.last, self.now = [], []

    def arrived(self, module):
        """`module` is there. Returns which will be next, None if that is not known."""
        self.now.append(module)
        as_last_time = self.last[: len(self.now)][-1:] == [module]
        return next(iter(self.last[len(self.now) :]), None) if as_last_time else None

    def restart(self):
        self.last, self.now = self.now, []


def _is_fragile(x, units):
    """Whether a unit may not return this tensor as it is: a view, whose hooks a later in-place
    operation would do away with; a unit's inside this one, so that both would hook one tensor, on
    the ranks that take this branch; or a parameter of the unit, which is about to be resharded."""
    if x.layout != torch.strided:
        return False
    storages = {unit.flat.untyped_storage().data_ptr() for unit in units}
    return ((x.requires_grad and (x._is_view() or bool(x._backward_hooks)))
            or x.untyped_storage().data_ptr() in storages)
