"""Models that have a name, such as those of `zero-ref bench`."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from . import data
from .models import GPT
from .task import Task

VOCAB = 256


def adamw(params) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-4)


def _cnn(world_size):
    task = data.task("cnn", None, world_size, 48 // world_size * world_size)
    return replace(task, optimizer=adamw)


def _gpt(width, layers, heads, sequences, tokens):
    """sequences: per rank; tokens: per sequence, random ones."""
    def batch(step, rank):
        generator = torch.Generator().manual_seed(1000 * step + rank)
        return torch.randint(VOCAB, (2, sequences, tokens), generator=generator)

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    return lambda _: Task("GPT", lambda: GPT(VOCAB, tokens, width, heads, layers), batch, loss,
                          adamw)


# By name, a function that takes the world size. The CNN is so small that what a step costs apart
# from computing decides. The first GPT has work enough per parameter to hide messages behind; the
# last has next to none, so messages decide.
NAMED: dict[str, Callable[[int], Task]] = {
    "CNN": _cnn,
    "3M": _gpt(256, 4, 4, 4, 64),
    "15M": _gpt(448, 6, 7, 2, 32),
    "57M": _gpt(768, 8, 12, 1, 16),
}
