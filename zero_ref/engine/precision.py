"""Mixed precision: compute with 16 bits, update with 32.

The parameters that the model computes with are rounded copies. The optimizer updates the master
copy, in which small steps are not lost, and which the stages cut as they cut optimizer states.
Per parameter that is 2 bytes, 2 for the gradient (4 if it is reduced in fp32) and 12 for fp32
Adam's states and master copy.

Micikevicius et al., Mixed Precision Training, ICLR 2018; Rajbhandari et al., ZeRO, section 3.1.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import comm
from .hooks import Hook
from .owned import mark
from .tree import map_tensors, tensors_in


@dataclass(frozen=True)
class MixedPrecision:
    """What `zero_ref.wrap(mixed_precision=…)` takes.

    param_dtype: parameters, activations and the inputs of the model. Buffers stay as they are.
    reduce_dtype: gradients while they are summed over the ranks. What the optimizer gets of them
        has the master copy's dtype, the one that the module had: 4 bytes more if this one differs.
        Inside no_sync() local gradients add up in param_dtype.
    keep: module classes (nn.LayerNorm, say, or a tuple of them) that compute in their own dtype,
        with all inside them: their inputs are cast to it and their outputs back. By default
        BatchNorm, which torch does not compute with fp32 statistics and 16-bit weights.

    Frozen parameters have no master copy. Raises ValueError for a dtype that is not floating point.
    """

    param_dtype: torch.dtype = torch.bfloat16
    reduce_dtype: torch.dtype = torch.float32
    keep: type | tuple[type, ...] = nn.modules.batchnorm._BatchNorm

    def __post_init__(self):
        for name in ("param_dtype", "reduce_dtype"):
            dtype = getattr(self, name)
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise ValueError(f"{name}={dtype!r}: must be a floating point dtype such as "
                                 "torch.bfloat16")
        kinds = self.keep if isinstance(self.keep, tuple) else (self.keep,)
        if not all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in kinds):
            raise ValueError(f"keep={self.keep!r}: must be a module class or a tuple of them")

    def of(self, p: nn.Parameter, modules: list[nn.Module]) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of a parameter that is inside `modules`, and of its gradient when reduced."""
        if p.is_floating_point() and not any(map(self.keeps, modules)):
            return self.param_dtype, self.reduce_dtype
        return own_precision(p, modules)

    def keeps(self, module: nn.Module) -> bool:
        return isinstance(module, self.keep)

    def cast_inputs(self, inputs):
        return _cast(inputs, self.param_dtype)

    def watch_kept(self, module: nn.Module) -> list:
        """Cast what goes into and comes out of the modules of the classes in `keep`."""
        if self.keeps(module):
            own = next((p.dtype for p in module.parameters()), None)
            return _compute_in(module, own) if own is not None else []
        return [hook for child in module.children() for hook in self.watch_kept(child)]

    def guard_state_dict(self, model):
        """The module holds rounded values, which are neither to be saved nor to be loaded. A part
        of it does, too."""
        ref: Any = weakref.ref(model)
        members = weakref.WeakSet(model.module.modules())

        def refuse(module, *_):
            if module in members and ref() is not None and not ref()._in_full_params:
                raise RuntimeError("with mixed precision the bare module has rounded values: use "
                                   "model.state_dict() and model.load_state_dict(), where model is "
                                   "what zero_ref.wrap returned")

        return [register(Hook(refuse)) for module in members
                for register in (module.register_state_dict_pre_hook,
                                 module.register_load_state_dict_pre_hook)]


def _compute_in(module, dtype):
    came_in = [dtype]

    def before(_, args, kwargs):
        floating = [x.dtype for x in tensors_in((args, kwargs)) if x.is_floating_point()]
        came_in[:] = floating[:1] or [dtype]
        return _cast((args, kwargs), dtype)

    def after(_, args, output):
        return _cast(output, came_in[0])

    return [module.register_forward_pre_hook(Hook(before), with_kwargs=True),
            module.register_forward_hook(Hook(after))]


def own_precision(p: nn.Parameter, modules: list[nn.Module]) -> tuple[torch.dtype, torch.dtype]:
    """Without mixed precision a parameter and its gradient have one dtype, whatever it is."""
    return p.dtype, p.dtype


def _cast(values, dtype):
    return map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, values)


class GradScaler(torch.amp.GradScaler):
    """torch's GradScaler, with a verdict that all ranks share: if one of them finds an inf or NaN
    in its slice of the gradients, every rank skips the step and backs off its scale.

    model: what `zero_ref.wrap` returned. The other arguments are those of torch's.
    Source: https://docs.pytorch.org/docs/stable/amp.html#torch.amp.GradScaler
    """

    def __init__(self, model: nn.Module, **options):
        super().__init__(model.units[0].flat.device.type, **options)
        self._model = model

    def _unscale_grads_(self, optimizer, *args):
        mark(self._model.trainable, on=False)
        try:
            found = super()._unscale_grads_(optimizer, *args)
        finally:
            mark(self._model.trainable, on=True)
        model, device = self._model, self._model.units[0].flat.device
        by_rank = torch.zeros(model.world_size, device=device)
        by_rank[model.rank] = sum(flag.to(device) for flag in found.values())
        comm.all_reduce(by_rank, model.group, unit="found_inf", phase="unscale").wait()
        return {device: by_rank.sum().clamp(max=1.0)}
