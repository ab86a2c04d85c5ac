"""Stage 1: optimizer states are partitioned (P_os in the paper).

Stage 0 plus one partition: the optimizer of rank r sees only slice r of every unit, and so keeps
states only for that. It needs only that slice of the summed gradient, and the others need its
updated slice afterwards. The all_reduce of stage 0 comes apart into its two halves, with the step
in between:

    Phase 2  backward    one reduce_scatter per unit, Ψ·(N-1)/N elements sent in all
    Phase 3  hand over   only this rank's slice of the gradient is the mean. The rest of the buffer
                         stays allocated, which stage 2 will change
    Phase 4  step        every rank updates its slice; then one all_gather of the parameters per
                         unit, Ψ·(N-1)/N elements sent in all

Together 2Ψ·(N-1)/N, as at stage 0: the all-gather has moved from gradients to parameters.

Rajbhandari et al., ZeRO, arXiv 1910.02054, section 5.1.
"""

from . import comm
from .engine import clip
from .stage0 import Stage0


class Stage1(Stage0):
    stage = 1

    # ---- Phase 2: backward -----------------------------------------------------------------------

    def _reduce(self, unit):
        reduced = unit.grad[unit.own_slice]  # in place: the other slices keep the local gradient
        handle = comm.reduce_scatter(reduced, unit.grad, self.group,
                                     unit=unit.name, phase="backward", divide_by=self.world_size)
        return reduced, handle

    # ---- Phase 3: hand over ----------------------------------------------------------------------

    def _as_grad(self, grad):
        return grad.as_subclass(clip.GradSlice)  # whose norm is not to be taken for the gradient's

    # ---- Phase 4: the optimizer's step -----------------------------------------------------------

    def _make_master(self, unit, full):
        return unit.shard if full is unit.flat else full[unit.own_slice].clone()

    def _owned_views(self, unit, buffer):
        return unit.shard_views(buffer)

    def _owned_slices(self, unit, index, tensor):
        return {self.rank: tensor}

    def _after_step(self, units):
        for unit in units:
            unit.shard.copy_(unit.master)  # nothing without mixed precision: they are one
        handles = [comm.all_gather(unit.flat, unit.shard, self.group, unit=unit.name, phase="step")
                   for unit in units]
        for handle in handles:
            handle.wait()

    def _share_norms(self, norms):
        # Every entry is zero on all ranks but one, so this sum is exact.
        comm.all_reduce(norms, self.group, unit="norms", phase="clip").wait()

    # ---- full parameters -------------------------------------------------------------------------

    def _gather_full(self, unit):
        if not unit.mixed:
            return unit.flat
        full = unit.master.new_empty(unit.padded_numel)
        comm.all_gather(full, unit.master, self.group, unit=unit.name, phase="full_params").wait()
        unit.point_to(full)
        return full

    def _take_over(self, unit, full):
        unit.master.copy_(full[unit.own_slice])
        super()._take_over(unit, full)
