"""A GPT of 355 million parameters in bf16, with the sizes of GPT-2 medium, for `zero-ref bench`:

    zero-ref bench --model tests/gpt_350m.py --device cuda --world-size 1 --rounds 3 \\
        --systems "stage 0" "stage 1" "stage 2" "stage 3" FSDP2

The row "floor" is the bare module, and the column "floor" says which share of a system's time it
takes.
"""

import torch
import torch.nn.functional as F

from zero_ref.tasks.models import GPT

VOCAB, CONTEXT, WIDTH, HEADS, LAYERS = 50304, 1024, 1024, 16, 24
SEQUENCES = 8  # of a rank


def build():
    return GPT(VOCAB, CONTEXT, WIDTH, HEADS, LAYERS).to(torch.bfloat16)


def batch(step, rank):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(VOCAB, (2, SEQUENCES, CONTEXT), generator=generator)


def loss(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def optimizer(params):
    return torch.optim.AdamW(params, lr=1e-4)
