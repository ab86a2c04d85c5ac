"""What is trained: a model, its data, its loss and its optimizer."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.tree import map_tensors


def adam(params) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "adam": adam,
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3),
}


@dataclass
class Task:
    """build() returns the module, batch(step, rank) what that rank sees at that step, loss(model,
    batch) a scalar, optimizer(params) a torch.optim.Optimizer. units: see `zero_ref.wrap`.

    evaluate(model, device): the metric on samples that are held out, if there are any; at stage 3
    every rank must call it.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int, int], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    optimizer: Callable[..., torch.optim.Optimizer] = adam
    units: Any = None
    evaluate: Callable[[nn.Module, torch.device], float] | None = None
    metric: str = "loss"

    def batch_on(self, device: torch.device, step: int, rank: int, dtype=None) -> Any:
        """That batch, on a device, and with floating point numbers of this dtype if one is given.
        """
        return map_tensors(
            lambda x: x.to(device, dtype if x.is_floating_point() else None),
            self.batch(step, rank))


def seed_everything(seed: int) -> None:
    """For dropout and whatever else draws numbers: torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
