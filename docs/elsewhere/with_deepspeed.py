"""Any stage with DeepSpeed, on the course's net and data: the JSON file says which.

    cd docs/elsewhere
    torchrun --nproc-per-node 4 with_deepspeed.py deepspeed_stage3.json
"""

import sys

import torch.distributed as dist
import torch.nn.functional as F

from zero_ref import course


def train(config: str, steps: int = 3) -> dict[str, float]:
    """On this rank. Returns how many elements of parameters are held in full at one time in the
    last forward, and its loss."""
    import deepspeed

    model = course.build()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(),
                                      config=config, dist_init_required=False)
    there = []
    for layer in model[1:]:  # at stage 3, what has been freed has no elements
        layer[1].register_forward_pre_hook(
            lambda *_: there.append(sum(p.numel() for p in model.parameters())))
    for step in range(steps):
        there.clear()
        images, labels = course.batch(step, dist.get_rank())
        loss = F.cross_entropy(engine(images), labels)
        engine.backward(loss)
        engine.step()
    return {"elements": max(there), "loss": loss.item()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    print(f"rank {dist.get_rank()}: {train(sys.argv[1])}")
    dist.destroy_process_group()
