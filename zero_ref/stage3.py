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

All ranks have to run the same units in the same order. What a unit returns has to be made of
tensors in tuples, lists and dicts: backward is noticed there.

Rajbhandari et al., ZeRO, arXiv 1910.02054, section 5.3. The words are those of PyTorch's FSDP2.
"""

from collections import defaultdict

import torch
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from . import comm
from .placeholder import make_placeholders, show_in_module
from .stage2 import Stage2


class Stage3(Stage2):
    stage = 3

    def __init__(self, module, units, group, overlap=True, reshard_after_forward=True):
        self.reshard_after_forward = reshard_after_forward
        super().__init__(module, units, group, overlap)

    def _register_hooks(self):
        hooks = super()._register_hooks()
        self._forward_order, self._backward_order = Order(), Order()
        self._units_of = defaultdict(list)  # module -> its units, a trainable and a frozen one
        for unit in self.units:
            self._units_of[unit.module].append(unit)
        for submodule in self._units_of.keys() - {self.module}:  # the root's turn is in forward()
            # First, before a hook of the user's may want to see the parameters.
            hooks.append(submodule.register_forward_pre_hook(
                self._weak_hook("_pre_forward"), prepend=True, with_kwargs=True))
            hooks.append(submodule.register_forward_hook(self._weak_hook("_post_forward")))
        return hooks

    # ---- unshard and reshard ---------------------------------------------------------------------

    def _unshard(self, unit, phase):
        """Start to gather the unit's full parameters, unless they are there or on their way."""
        if not unit.gathered and unit.gathering is None:
            unit.flat.untyped_storage().resize_(unit.padded_numel * unit.flat.itemsize)
            unit.gathering = comm.all_gather(unit.flat, unit.shard, self.group,
                                             unit=unit.name, phase=phase)

    def _wait_for_unshard(self, unit):
        if unit.gathering is not None:
            unit.gathering.wait()
            unit.gathering = None
            for p, view in zip(unit.params, unit.full_views(unit.flat)):
                p.data = view
            show_in_module(unit, unit.params)
            unit.gathered = True

    def _unshard_module(self, submodule, phase, order):
        """Gather a module's units, and start to gather those of the module that will come next, so
        that they arrive while this one computes. One module ahead: more would cost memory."""
        following = order.after(submodule)
        for unit in self._units_of[submodule]:
            self._unshard(unit, phase)
            self._wait_for_unshard(unit)
        if self.overlap and following is not None:
            for unit in self._units_of[following]:
                self._unshard(unit, phase)

    def _reshard(self, unit):
        """Let go of all but this rank's slice."""
        self._wait_for_unshard(unit)
        if unit.gathered and not self._in_full_params:
            show_in_module(unit, unit.placeholders)
            for p in unit.params:  # for who kept a reference: an empty tensor, not a dangling one
                p.data = p.data.new_empty(0)
            unit.flat.untyped_storage().resize_(0)
            unit.gathered = False

    # ---- Phase 1: forward ------------------------------------------------------------------------

    def forward(self, *args, **kwargs):
        self._drop_failed_backward()
        self._forward_order.restart()
        args, kwargs = self._pre_forward(self.module, args, kwargs)
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
        if not units or not torch.is_grad_enabled():
            return args, kwargs
        # Backward has left the unit when it has the gradients of these views of its inputs.
        inputs, structure = tree_flatten((args, kwargs))
        inputs = [x.view_as(x) if _has_grad(x) else x for x in inputs]
        if any(map(_has_grad, inputs)):
            register_multi_grad_hook([x for x in inputs if _has_grad(x)],
                                     self._weak_hook("_post_backward", submodule))
        return tree_unflatten(inputs, structure)

    def _post_forward(self, submodule, args, output):
        units = self._units_of.get(submodule, [])
        if not units:
            return output
        output = tree_map(lambda x: x.clone() if _is_fragile(x, units) else x, output)
        self._on_grad_of(output, "_pre_backward", submodule)
        for unit in units:
            recomputing = unit.in_backward  # activation checkpointing runs forward again
            if not recomputing and (self.reshard_after_forward or not torch.is_grad_enabled()):
                self._reshard(unit)
        return output

    # ---- Phase 2: backward -----------------------------------------------------------------------

    def _pre_backward(self, submodule, grad):
        """Runs when autograd has the gradient of one of the unit's outputs, and needs the rest."""
        self._begin_backward()
        units = self._units_of[submodule]
        if not all(unit.in_backward for unit in units):
            for unit in units:
                unit.in_backward = True
            self._unshard_module(submodule, "backward", self._backward_order)

    def _post_backward(self, submodule, grads):
        """Runs when autograd has the gradients of the unit's inputs."""
        for unit in self._units_of[submodule]:
            unit.in_backward = False
        self._reshard_if_done(submodule)

    def _unit_ready(self, unit):
        self._reshard_if_done(unit.module)
        super()._unit_ready(unit)

    def _reshard_if_done(self, submodule):
        """Neither a parameter's gradient nor an input's may be missing: each may need the others'
        parameters. A unit whose inputs have no gradient is done when backward ends."""
        units = self._units_of[submodule]
        if all(unit.complete() and not unit.in_backward for unit in units):
            for unit in units:
                self._reshard(unit)

    def _leave_backward(self):
        super()._leave_backward()
        self._backward_order.restart()
        for unit in self.units:
            unit.in_backward = False
            self._reshard(unit)

    # ---- Phase 4: the optimizer's step -----------------------------------------------------------

    def _make_owned(self, unit):
        unit.shard = unit.shard.clone()
        unit.placeholders = make_placeholders(unit)
        self._reshard(unit)
        return self._as_parameters(unit, unit.shard)

    def _after_step(self, units):
        for unit in units:  # gathered still if a forward was not followed by its backward: outdated
            self._reshard(unit)

    # ---- full parameters -------------------------------------------------------------------------

    def _gather_all(self):
        for unit in self.units:
            self._unshard(unit, "full_params")
            self._wait_for_unshard(unit)

    def _keep_all(self):
        for unit in self.units:
            unit.shard.copy_(unit.flat[unit.own_slice])
            self._reshard(unit)


class Order:
    """In which order modules come in a pass. What came after what last time will again."""

    def __init__(self):
        self.last, self.now = [], []

    def after(self, module):
        """Note that `module` is there. Returns which will be next, None if that is not known."""
        self.now.append(module)
        as_last_time = self.last[: len(self.now)][-1:] == [module]
        return next(iter(self.last[len(self.now) :]), None) if as_last_time else None

    def restart(self):
        self.last, self.now = self.now, []


def _has_grad(x):
    return isinstance(x, torch.Tensor) and x.requires_grad


def _is_fragile(x, units):
    """Whether a unit may not return this tensor as it is: a view, whose hooks a later in-place
    operation would do away with, or a parameter of the unit, which is about to be resharded."""
    if not isinstance(x, torch.Tensor) or x.layout != torch.strided:
        return False
    storages = {unit.flat.untyped_storage().data_ptr() for unit in units}
    return (x.requires_grad and x._is_view()) or x.untyped_storage().data_ptr() in storages
