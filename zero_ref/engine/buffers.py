"""Buffers (BatchNorm's statistics, say) are not partitioned: every rank has rank 0's, as in DDP."""

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import nn

from .. import comm


class Buffers:
    """The buffers of a module, whose shapes all ranks have agreed on when it was wrapped."""

    def __init__(self, module: nn.Module, group: dist.ProcessGroup):
        self.module, self.group = module, group
        self.agreed = [_kind(buffer) for buffer in module.buffers()]

    def broadcast(self, phase: str) -> None:
        """Overwrite all buffers with rank 0's: one message per dtype."""
        buffers_now = list(self.module.buffers())
        if [_kind(buffer) for buffer in buffers_now] != self.agreed:
            self._refuse_changed()
        by_dtype = defaultdict(list)
        for buffer in buffers_now:
            by_dtype[buffer.dtype].append(buffer)
        for buffers in by_dtype.values():
            flat = torch.cat([buffer.detach().reshape(-1) for buffer in buffers])
            comm.broadcast(flat, self.group, unit="buffers", phase=phase).wait()
            sizes = [buffer.numel() for buffer in buffers]
            for buffer, values in zip(buffers, flat.split(sizes)):
                # Not a change for autograd: an earlier forward may have saved this buffer, and its
                # backward is still to come. DDP writes in this way, too.
                buffer.data.copy_(values.view(buffer.shape))

    def _refuse_changed(self):
        """A message of another size than the receiver expects would end its process."""
        now = [(name, _kind(buffer)) for name, buffer in self.module.named_buffers()]
        for (name, kind), agreed in zip(now, self.agreed):
            if kind != agreed:
                raise RuntimeError(
                    f"buffer {name!r} is {_say(kind)} now, and where it is there was one that is "
                    f"{_say(agreed)} when the model was wrapped: ranks exchange buffers, so give "
                    "them their final sizes before zero_ref.wrap, or keep what changes in an "
                    "attribute that is not a buffer")
        raise RuntimeError(
            f"the module had {len(self.agreed)} buffers when it was wrapped, and has {len(now)} "
            f"now, the last of them {now[-1][0] if now else None!r}: ranks exchange buffers, so "
            "register them before zero_ref.wrap, or keep what changes in an attribute that is not "
            "a buffer")


def _kind(buffer):
    return buffer.shape, buffer.dtype, buffer.layout


def _say(kind):
    shape, dtype, layout = kind
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')}" + (
        f" ({layout})" if layout != torch.strided else "")
