"""What trains a module in data parallel: torch's DDP and FSDP2, the stages, a user's own."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .. import MixedPrecision
from ..engine.units import find_units

# Takes a module and a stage, and returns the model: what zero_ref.wrap does.
WrapLike = Callable[[nn.Module, int], nn.Module]


def ddp(net: nn.Module, find_unused: bool = False) -> nn.Module:
    return DistributedDataParallel(net, find_unused_parameters=find_unused)


def fsdp2(net: nn.Module, units: Any = None, mixed_precision: MixedPrecision | None = None,
          reshard_after_forward: bool = True) -> nn.Module:
    """The same modules are units as with `wrap`. The module itself is changed, and returned."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {"reshard_after_forward": reshard_after_forward}
    if mixed_precision is not None:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=mixed_precision.param_dtype,
                                                    reduce_dtype=mixed_precision.reduce_dtype)
    # Of a unit that returns a view, which is nothing unusual.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    kind = next(net.parameters()).device.type
    options["mesh"] = init_device_mesh(kind, (dist.get_world_size(),))
    for unit in reversed(find_units(net, units).values()):  # what is inside of another comes first
        fully_shard(unit, **options)
    return fully_shard(net, **options)


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's full tensors under the module's own names. Every rank must call it."""
    net = model.module if isinstance(model, DistributedDataParallel) else model
    state = {}
    for name, value in net.state_dict().items():
        if isinstance(value, torch.Tensor):
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            state[name] = value.detach().cpu()
    return state
