"""Stage 1: optimizer states are partitioned (P_os in the paper).

Stage 0 plus one partition: the optimizer of rank r sees only slice r of every unit, its shard, and
so keeps states only for that. It needs only that slice of the summed gradient, and the others need
its updated slice afterwards. The all_reduce of stage 0 comes apart into its two halves, with the
step in between:

    Phase 2  backward    one reduce_scatter per bucket, Ψ·(N-1)/N elements sent in all
    Phase 3  deliver     only this rank's slice of the gradient is the mean. The rest of the buffer
                         stays allocated, which stage 2 will change
    Phase 4  step        every rank updates its slice; then one all_gather of the parameters per
                         bucket, Ψ·(N-1)/N elements sent in all

Together 2Ψ·(N-1)/N, as at stage 0: the all-gather has moved from gradients to parameters.

Rajbhandari et al., ZeRO, arXiv 1910.02054, section 5.1.
"""

from torch import Tensor

from . import comm
from .engine.buckets import Bucket
from .partition import FULL, SHARD, Keeps, Unit
from .stage0 import Stage0


class Stage1(Stage0):
    stage = 1
    keeps = Keeps(params=FULL, grads=FULL, states=SHARD)

    # ---- Phase 2: backward -----------------------------------------------------------------------

    def _reduce(self, bucket: Bucket) -> tuple[list[Tensor], comm.Handle]:
        grads = [self._backward.grads[unit] for unit in bucket]
        reduced = [self._reduce_into(unit) for unit in bucket]
        handle = comm.reduce_scatter(reduced, grads, self.group, unit=bucket.name,
                                     phase="backward", divide_by=self.world_size)
        return reduced, handle

    def _reduce_into(self, unit: Unit) -> Tensor:
        """Where this rank's slice of the mean goes: in place. The other slices stay local."""
        return self._backward.grads[unit][unit.rank_slice]

    # ---- Phase 4: the optimizer's step -----------------------------------------------------------

    def _after_step(self, units: list[Unit]) -> None:
        super()._after_step(units)
        stepped = [Bucket(u for u in bucket if u in units) for bucket in self._gather_buckets]
        handles = [comm.all_gather([u.flat for u in bucket], [u.shard for u in bucket], self.group,
                                   unit=bucket.name, phase="step") for bucket in stepped if bucket]
        for handle in handles:
            handle.wait()
