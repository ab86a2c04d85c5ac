"""Stage 2: gradients are partitioned too (P_os+g in the paper).

Stage 1 plus one partition: the sum of a unit's gradients goes into a buffer of the slice's own
size, so that the full buffer is freed as soon as it has been sent:

    Phase 2  backward    one reduce_scatter per unit, as at stage 1. Full gradient buffers exist
                         only for the unit that fills up, the one in flight, and the root, whose
                         parameters are used first and last (and for units that run in another
                         order than they were defined, until their turn comes)
    Phase 3  hand over   what is left of a unit's gradients is this rank's slice

Ψ·(N-1)/N + Ψ·(N-1)/N elements sent, as at stage 1. Rajbhandari et al., ZeRO, section 5.2.
"""

from . import comm
from .stage1 import Stage1


class Stage2(Stage1):
    stage = 2

    # ---- Phase 2: backward -----------------------------------------------------------------------

    def _grad_buffer(self, unit):
        # Only until it has been sent.
        return unit.flat.new_empty(unit.padded_numel, dtype=unit.grad_dtype)

    def _reduce(self, unit):
        reduced = unit.grad_memory(unit.shard_numel, unit.grad_dtype)
        handle = comm.reduce_scatter(reduced, unit.grad, self.group,
                                     unit=unit.name, phase="backward", divide_by=self.world_size)
        return reduced, handle
