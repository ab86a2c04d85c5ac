"""Buffers (BatchNorm's statistics, say) are not partitioned: every rank has rank 0's, as in DDP."""

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import nn

from .. import comm


def broadcast(module: nn.Module, group: dist.ProcessGroup, phase: str) -> None:
    """Overwrite all buffers with rank 0's: one message per dtype."""
    by_dtype = defaultdict(list)
    for buffer in module.buffers():
        by_dtype[buffer.dtype].append(buffer)
    for buffers in by_dtype.values():
        flat = torch.cat([buffer.detach().reshape(-1) for buffer in buffers])
        comm.broadcast(flat, group, unit="buffers", phase=phase).wait()
        sizes = [buffer.numel() for buffer in buffers]
        for buffer, values in zip(buffers, flat.split(sizes)):
            buffer.detach().copy_(values.view(buffer.shape))
