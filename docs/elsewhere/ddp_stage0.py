"""Stage 0 with torch alone: DistributedDataParallel, on the course's net and data.

    torchrun --nproc-per-node 4 docs/elsewhere/ddp_stage0.py
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from zero_ref import course, memory


def train(steps: int = 3) -> dict[str, float]:
    """On this rank. Returns the bytes that it holds after the last backward, and its loss."""
    # Without this option DDP holds every gradient twice, once more in the buckets that it sends.
    model = DistributedDataParallel(course.build(), gradient_as_bucket_view=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(steps):
        images, labels = course.batch(step, dist.get_rank())
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        held = memory.resident(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return held | {"loss": loss.item()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    print(f"rank {dist.get_rank()}: {train()}")
    dist.destroy_process_group()
