"""Stage 1 with torch alone: DDP and ZeroRedundancyOptimizer, on the course's net and data.

    torchrun --nproc-per-node 4 docs/elsewhere/zero_redundancy_stage1.py

The optimizer deals out whole parameters, so a rank may hold more of the states than another. DDP
all-reduces the gradients, and then each rank broadcasts what it has updated: about 3Ψ·(N-1)/N
elements per rank, where a reduce_scatter and an all_gather send 2Ψ·(N-1)/N.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from zero_ref import course, memory


def train(steps: int = 3) -> dict[str, float]:
    """On this rank. Returns the bytes that it holds after the last backward, and its loss."""
    model = DistributedDataParallel(course.build(), gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01)
    for step in range(steps):
        images, labels = course.batch(step, dist.get_rank())
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        held = memory.resident(model, optimizer.optim)  # this rank's Adam is inside
        optimizer.step()
        optimizer.zero_grad()
    return held | {"loss": loss.item()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    print(f"rank {dist.get_rank()}: {train()}")
    dist.destroy_process_group()
