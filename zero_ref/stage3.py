"""Stage 3: parameters are partitioned too (P_os+g+p in the paper).

Stage 2 plus one partition: between uses, a rank keeps only its shard of a unit's parameters. The
full ones are gathered just before a unit's forward and again before its backward, and freed right
after, so the all_gather after the step is gone:

    Phase 1  forward     unshard each unit (all_gather), run it, reshard it; the next bucket is
                         gathered while it runs: Ψ·(N-1)/N elements sent in all
    Phase 2  backward    unshard each unit again, Ψ·(N-1)/N; when autograd has left it, reshard it.
                         One reduce_scatter per bucket as at stage 2, Ψ·(N-1)/N
    Phase 4  step        every rank updates its shard, and sends nothing

Together 3Ψ·(N-1)/N, 1.5 times stage 0. At the peak there are the shards, the unit that computes,
those that come next, and the root's own parameters.

Views of parameters that autograd has saved share the flat buffer's storage. Resharding empties that
storage (`untyped_storage().resize_(0)`), and unsharding refills it, so the saved views are valid
again. Pointing a parameter elsewhere would leave the old memory to the saved views.

All ranks have to run the same units in the same order, because everyone's shard is needed. What a
unit takes and returns has to be made of tensors in tuples, lists, dicts and dataclasses: backward
is noticed there, and not at a tensor that leaves by another way (an attribute, a hook's capture).

Who calls what, beside stage 0's list: each unit's module `_post_forward`; autograd `_pre_backward`
and `_post_backward` at a unit's outputs and inputs. What a module shows in place of parameters that
are not there is in engine/placeholder.py.

Rajbhandari et al., ZeRO, arXiv 1910.02054, section 5.3. The words are those of PyTorch's FSDP2.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn

from . import comm
from .engine.buckets import Bucket
from .engine.calls import Call, Calls, Mark, Pass, without_fragile
from .engine.placeholder import empty_flat, empty_params, make_placeholders, show_in_module
from .engine.tree import tensors_in
from .engine.writes import keep_written
from .partition import SHARD, Keeps, Unit
from .stage2 import Stage2


class Stage3(Stage2):
    stage = 3
    keeps = Keeps(params=SHARD, grads=SHARD, states=SHARD)

    def __init__(self, *args, reshard_after_forward: bool = True, **options):
        self.reshard_after_forward = reshard_after_forward
        super().__init__(*args, **options)

    def _register_hooks(self) -> list:
        hooks = super()._register_hooks()
        # How many buckets are gathered ahead; with check=True none, for one order of collectives.
        self.prefetch = 1 if self.overlap and self._checker is None else 0
        self._passes, self._calls = {"forward": Pass(), "backward": Pass()}, Calls()
        self._units_of = defaultdict(list)  # module -> its units: trainable, frozen, by dtype
        for unit in self.units:
            self._units_of[unit.module].append(unit)
        self._bucket_of = {unit: bucket for bucket in self._gather_buckets for unit in bucket}
        after = self._module_hook("_post_forward")
        for submodule in self._units_of.keys() - {self.module}:  # the root's turn is in _forward
            hooks.append(submodule.register_forward_hook(after))
        return hooks

    def _keep(self, unit: Unit) -> None:
        super()._keep(unit)
        unit.placeholders = make_placeholders(unit)
        self._free(unit)

    # ---- unshard and reshard ---------------------------------------------------------------------

    def _unshard(self, units: list[Unit], phase: str) -> None:
        """Start to gather the full parameters of these units, where they are not there yet."""
        bucket = Bucket(unit for unit in units if unit.resharded)
        if bucket and not self._in_full_params:
            for unit in bucket:
                unit.flat.untyped_storage().resize_(unit.padded_numel * unit.flat.itemsize)
            handle = comm.all_gather(
                [unit.flat for unit in bucket], [unit.shard for unit in bucket], self.group,
                unit=bucket.name, phase=phase)
            for unit in bucket:
                unit.gathering = handle

    def _wait_for_unshard(self, unit: Unit) -> None:
        if unit.gathering is not None:
            unit.gathering.wait()
            unit.gathering = None
            unit.point_to(unit.flat)
            show_in_module(unit, unit.params)
            unit.gathered = True

    def _unshard_module(self, submodule: nn.Module, phase: str) -> None:
        """Gather a module's units, and start to gather what will be needed next, so that it
        arrives while this one computes."""
        this_pass = self._passes[phase]
        this_pass.arrived(submodule, self._units_of[submodule])
        for unit in self._units_of[submodule]:
            self._unshard(this_pass.together(unit, self._bucket_of[unit]), phase)
            self._wait_for_unshard(unit)
        while (len(this_pass.ahead) < self.prefetch
               and (following := this_pass.next_resharded(self._units_of))):
            for unit in following:
                self._unshard(this_pass.together(unit, self._bucket_of[unit]), phase)
            this_pass.ahead.append({u for unit in following for u in self._bucket_of[unit]})

    def _reshard(self, unit: Unit) -> None:
        """Free all but this rank's shard."""
        self._wait_for_unshard(unit)
        if unit.gathered and not self._in_full_params:
            keep_written(unit)
            self._free(unit)

    def _free(self, unit: Unit) -> None:
        show_in_module(unit, unit.placeholders)
        if self._backward is None:  # in backward, checkpointing compares shapes of saved tensors
            empty_params(unit)
        empty_flat(unit)
        unit.gathered = False

    # ---- Phase 1: forward ------------------------------------------------------------------------

    def _forward(self, args: tuple, kwargs: dict):
        self._passes["forward"].begin()
        self._calls.open.clear()
        output = super()._forward(args, kwargs)
        output = self._post_forward(self.module, args, output)
        for unit in self.units:
            if unit.gathering is not None:  # this forward took another path than the last one
                self._reshard(unit)
        return output

    def _pre_forward(self, submodule: nn.Module, args: tuple, kwargs: dict) -> tuple:
        units = self._units_of.get(submodule, [])  # none: a root, or a copy that has our hooks
        if self._backward is not None:  # activation checkpointing runs forward again
            for unit in units:
                self._unshard([unit], "recompute")
                self._wait_for_unshard(unit)
        elif units:
            self._unshard_module(submodule, "forward")
        args, kwargs = super()._pre_forward(submodule, args, kwargs)
        if units and torch.is_grad_enabled():
            # Backward has left the unit when it has the gradients of these views of its inputs.
            inputs = [x for x in dict.fromkeys(tensors_in((args, kwargs))) if x.requires_grad]
            mark = self._calls.begin(submodule, inputs, self._entered(submodule))
            self._on_grad_of(inputs, "_post_backward", mark)
        return args, kwargs

    def _post_forward(self, submodule: nn.Module, args: tuple, output):
        units = self._units_of.get(submodule, [])
        if not units:
            return output
        output = without_fragile(output, units)
        if torch.is_grad_enabled():
            call = self._calls.open.pop()
            call.returns(output, units[0])
            self._on_grad_of(output, "_pre_backward", call)
        if not self._entered(submodule) and (
                self.reshard_after_forward or not torch.is_grad_enabled()):
            for unit in units:
                self._reshard(unit)
        return output

    # ---- Phase 2: backward -----------------------------------------------------------------------

    def _entered(self, submodule: nn.Module) -> bool:
        """Whether backward is between this module's outputs and its inputs."""
        return self._backward is not None and submodule in self._backward.entered

    def _begin_backward(self, grad: Tensor | None = None) -> None:
        begins = self._backward is None
        super()._begin_backward()
        if begins:
            self._calls.expect([*self._calls.of], self._backward)

    def _pre_backward(self, call: Call, grad: Tensor) -> None:
        """Runs when autograd has the gradient of one of the unit's outputs, and needs the rest."""
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True does not work at stage 3: a gradient's own graph "
                               "uses parameters after their unit was resharded; use stage 2")
        self._begin_backward()
        module = call.mark.module
        self._calls.expect([module], self._backward)
        if not self._entered(module):
            self._backward.entered.add(module)
            self._unshard_module(module, "backward")

    def _post_backward(self, mark: Mark, grad: Tensor) -> None:
        """Runs when autograd has the gradient of one of the unit's inputs. When it has the last one
        of the unit's last call, it has those of the parameters too: reshard and reduce.

        Stages 0 to 2 reduce when the last gradient is there. This stage must not wait for one that
        only other ranks have: between gathers, all ranks have to reduce at the same point.
        """
        backward = self._backward
        if backward is None:  # the gradient of an input that somebody else has kept
            return
        mark.expected -= 1
        if mark.expected == 0:
            backward.to_leave[mark.module].discard(mark)
            backward.entered.discard(mark.module)
        if mark in backward.asked and not backward.to_leave[mark.module]:
            for unit in self._units_of[mark.module]:
                self._reshard(unit)
                backward.left.add(unit)
            for bucket in [b for b in backward.queue if self._sync and backward.left.issuperset(b)]:
                backward.queue.remove(bucket)
                self._start_reduction(bucket)

    def _reduce_complete(self) -> None:
        """This stage waits for _post_backward."""

    def _leave_backward(self) -> None:
        super()._leave_backward()
        self._passes["backward"].begin()
        running = {call.mark.module for call in self._calls.open}  # autograd.grad in a forward
        for unit in self.units:
            if unit.module not in running:
                self._reshard(unit)
                if not unit.gathered:
                    empty_params(unit)

    # ---- Phase 4: the optimizer's step -----------------------------------------------------------

    def _after_step(self, units: list[Unit]) -> None:
        for unit in units:
            unit.publish()
            self._wait_for_unshard(unit)
            if unit.gathered:  # a forward had no backward; what it has is outdated now
                self._free(unit)

    # ---- full parameters -------------------------------------------------------------------------

    def _pin(self, unit: Unit) -> Tensor:
        self._reshard(unit)
        show_in_module(unit, unit.params)
        return super()._pin(unit)

    def _unpin(self, unit: Unit, full: Tensor) -> None:
        super()._unpin(unit, full)
        self._free(unit)
