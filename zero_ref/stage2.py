"""Stage 2: gradients are partitioned too (P_os+g in the paper).

Stage 1 plus one partition: the sum of a unit's gradients goes into a buffer of the slice's own
size, so that the full buffer is freed as soon as it has been reduced:

    Phase 2  backward    one reduce_scatter per bucket, as at stage 1. Full gradient buffers exist
                         only for the bucket that fills up, the one in flight, and those whose
                         turn has not come: the root's, whose parameters are used first and last
    Phase 3  deliver     what is left of a unit's gradients is this rank's slice

Ψ·(N-1)/N + Ψ·(N-1)/N elements sent, as at stage 1. Rajbhandari et al., ZeRO, section 5.2.
"""

from torch import Tensor

from .engine.buckets import Bucket
from .partition import FULL, SHARD, Keeps, Unit
from .stage1 import Stage1


class Stage2(Stage1):
    stage = 2
    keeps = Keeps(params=FULL, grads=SHARD, states=SHARD)

    # ---- Phase 2: backward -----------------------------------------------------------------------

    def _reduce_into(self, unit: Unit) -> Tensor:
        return unit.grad_memory(unit.shard_numel, unit.grad_dtype)

    # ---- Phase 3: deliver ------------------------------------------------------------------------

    def _finish_reduction(self) -> Bucket:
        bucket = super()._finish_reduction()
        for unit in bucket:
            self._backward.grads.pop(unit, None)  # the full gradient is freed
        return bucket
