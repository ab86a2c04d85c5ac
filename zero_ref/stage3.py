"""Stage 3: parameters are partitioned too (P_os+g+p in the paper).

Stage 2 plus one partition: between uses, a rank keeps only its slice of a unit's parameters. The
full ones are gathered just before a unit's forward and again before its backward, and let go right
after, so the all_gather after the step is gone:

    Phase 1  forward     unshard each unit (all_gather), run it, reshard it:
                         Ψ·(N-1)/N elements sent in all
    Phase 2  backward    unshard each unit again, Ψ·(N-1)/N; when its gradients are there, reshard
                         it and reduce_scatter them, Ψ·(N-1)/N
    Phase 4  step        every rank updates its slice, and sends nothing

Together 3Ψ·(N-1)/N, 1.5 times stage 0. What is left at the peak are the slices plus the units that
are gathered at one time: the one that computes, and the root's own parameters.

A unit's flat buffer keeps its address in every view that autograd has saved. Letting go means
emptying the storage behind them (`untyped_storage().resize_(0)`), not pointing the parameter
elsewhere: saved views would keep the old memory alive.

Rajbhandari et al., ZeRO, arXiv 1910.02054, section 5.3. The words are those of PyTorch's FSDP2.
"""

from collections import defaultdict

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from . import comm
from .stage2 import Stage2


class Stage3(Stage2):
    stage = 3

    def __init__(self, module, units, group, overlap=True, reshard_after_forward=True):
        super().__init__(module, units, group, overlap)
        self.reshard_after_forward = reshard_after_forward

    def _register_hooks(self):
        hooks = super()._register_hooks()
        self._units_of = defaultdict(list)  # module -> its units, a trainable and a frozen one
        for unit in self.units:
            self._units_of[unit.module].append(unit)
        for submodule in self._units_of.keys() - {self.module}:  # the root's turn is in forward()
            pre, post = self._weak_hook("_pre_forward"), self._weak_hook("_post_forward")
            hooks.append(submodule.register_forward_pre_hook(pre))
            hooks.append(submodule.register_forward_hook(post))
        return hooks

    # ---- unshard and reshard ---------------------------------------------------------------------

    def _unshard(self, unit, phase):
        """Gather the unit's full parameters, unless they are there."""
        if not unit.gathered:
            unit.flat.untyped_storage().resize_(unit.padded_numel * unit.flat.itemsize)
            comm.all_gather(unit.flat, unit.shard, self.group, unit=unit.name, phase=phase).wait()
            unit.show_full()

    def _reshard(self, unit):
        """Let go of all but this rank's slice."""
        if unit.gathered:
            unit.show_placeholders()
            unit.flat.untyped_storage().resize_(0)

    # ---- Phase 1: forward ------------------------------------------------------------------------

    def forward(self, *args, **kwargs):
        self._pre_forward(self.module, args)
        output = super().forward(*args, **kwargs)
        self._post_forward(self.module, args, output)
        return output

    def _pre_forward(self, submodule, args):
        for unit in self._units_of[submodule]:
            self._unshard(unit, "forward")

    def _post_forward(self, submodule, args, output):
        for unit in self._units_of[submodule]:
            recomputing = unit.in_backward  # activation checkpointing runs forward again
            if not recomputing and (self.reshard_after_forward or not torch.is_grad_enabled()):
                self._reshard(unit)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(self._weak_hook("_pre_backward", submodule))

    # ---- Phase 2: backward -----------------------------------------------------------------------

    def _pre_backward(self, submodule, grad):
        """Runs when autograd has the gradient of one of the unit's outputs, and needs the rest."""
        self._begin_backward()
        for unit in self._units_of[submodule]:
            unit.in_backward = True
            self._unshard(unit, "backward")

    def _unit_ready(self, unit):
        # A unit that also has frozen parameters may need them for longer: until backward ends.
        if len(self._units_of[unit.module]) == 1:
            self._reshard(unit)
        super()._unit_ready(unit)

    def _finish_backward(self):
        for unit in self.units:
            unit.in_backward = False
            self._reshard(unit)
        super()._finish_backward()

    # ---- Phase 4: the optimizer's step -----------------------------------------------------------

    def _make_owned(self, unit):
        unit.shard = unit.shard.clone()
        unit.make_placeholders()
        self._reshard(unit)
        return [nn.Parameter(view) for view in self._owned_views(unit, unit.shard)]

    def _after_step(self, units):
        for unit in units:  # gathered still if a forward was not followed by its backward: outdated
            self._reshard(unit)

    # ---- full parameters -------------------------------------------------------------------------

    def _gather_all(self):
        for unit in self.units:
            self._unshard(unit, "full_params")

    def _keep_all(self):
        for unit in self.units:
            unit.shard.copy_(unit.flat[unit.own])
            self._reshard(unit)
