"""Stage 3 with torch alone: FSDP2, on the course's net and data.

    torchrun --nproc-per-node 4 docs/elsewhere/fsdp2_stage3.py
    torchrun --nproc-per-node 4 docs/elsewhere/fsdp2_stage3.py --no-reshard-after-forward

FSDP2 shards parameters, gradients and optimizer states together, so it has no stage 1 and no stage
2. With --no-reshard-after-forward a layer stays unsharded from its forward until its backward: a
rank sends what it sends at stage 2, but it still holds only a shard of the parameters at rest.
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from zero_ref import course, memory


def train(reshard_after_forward: bool = True, steps: int = 3) -> dict[str, float]:
    """On this rank. Returns the bytes that it holds after the last backward, the most bytes of
    parameters in forward, and its loss."""
    model = course.build()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model[1:]:  # each call makes one unit; model[0] has no parameters
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard_after_forward)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    in_forward = []
    for layer in model[1:]:
        layer[1].register_forward_hook(
            lambda *_: in_forward.append(memory.resident(model)["parameters"]))
    for step in range(steps):
        images, labels = course.batch(step, dist.get_rank())
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        held = memory.resident(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return held | {"in forward": max(in_forward), "loss": loss.item()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--reshard-after-forward", action=argparse.BooleanOptionalAction,
                        default=True)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    print(f"rank {dist.get_rank()}: {train(options.reshard_after_forward)}")
    dist.destroy_process_group()
