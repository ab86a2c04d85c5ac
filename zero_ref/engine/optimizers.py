"""What a stage has to know about the optimizer: when it steps, and whether it may."""

import sys
import weakref
from typing import Any

import torch
from torch import nn, optim
from torch.amp import GradScaler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from . import writes
from .gradslice import GradSlice

# Each element of a parameter is updated from that element of its gradient and of its states alone,
# so a slice is updated as it would be inside the whole.
ELEMENTWISE = (optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax,
               optim.Adagrad, optim.Adadelta, optim.RMSprop, optim.Rprop, optim.ASGD)


def watch(model) -> list:
    """Check every optimizer that holds parameters of `model` before its step, and call
    `model._follow(units)` after it. Returns the hooks."""
    ref: Any = weakref.ref(model)

    def before(optimizer, args, kwargs):
        _refuse_foreign(ref(), optimizer)
        units = _units_in(ref(), optimizer)
        if units:
            _refuse_unreduced(optimizer, units)
            _refuse_moved(units)
        if units and ref().stage >= 1:
            _refuse_not_elementwise(ref(), optimizer)
            _refuse_scaler_of_one_rank(ref())
            _mark(units, torch.Tensor)  # the optimizer, and its states, work on plain tensors

    def after(optimizer, args, kwargs):
        units = _units_in(ref(), optimizer)
        if units and ref().stage >= 1:
            _mark(units, GradSlice)
        for unit in units:  # a graph from before the step may not be differentiated any more
            torch.autograd.graph.increment_version(unit.params)
        if units:
            ref()._follow(units)

    return [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]


def _mark(units, kind):
    for unit in units:
        for p in unit.master_params:
            if p.grad is not None:
                p.grad = p.grad.as_subclass(kind)


def _held_by(optimizer):
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _units_in(model, optimizer):
    """The units of which this optimizer holds a parameter: the same on every rank, because every
    rank's optimizer has an (at worst empty) piece of each."""
    held = _held_by(optimizer)
    return [u for u in model.trainable if not held.isdisjoint(map(id, u.master_params))]


def _refuse_foreign(model, optimizer):
    held = _held_by(optimizer)
    for unit in model.units:
        for name, p, placeholder in zip(unit.names, unit.params, unit.placeholders or unit.params):
            if id(p) in held or id(placeholder) in held:
                raise RuntimeError(
                    f"this {type(optimizer).__name__} holds {name!r} of the bare module, which "
                    "training does not update; build it from model.parameters() or "
                    "model.named_parameters(), where model is what zero_ref.wrap returned")


def _refuse_unreduced(optimizer, units):
    for unit in units:
        for name, p in zip(unit.names, unit.params):
            if p.grad is not None:
                raise RuntimeError(
                    f"{type(optimizer).__name__}.step() with a gradient of {name!r} that has not "
                    "been reduced: after no_sync(), the last backward before a step has to run "
                    "outside of it; model.zero_grad() drops what was accumulated")


def _refuse_moved(units):
    for unit in units:
        if unit.gathered:
            writes.keep_written(unit)
        begin, end = unit.master.data_ptr(), unit.master.data_ptr() + unit.master.nbytes
        with torch._C.DisableTorchFunctionSubclass():
            for name, p in zip(unit.names, unit.master_params):
                if p.numel() and not begin <= p.data_ptr() < end:
                    raise RuntimeError(writes.moved(unit, name))


def master_parameter(view: torch.Tensor, trainable: bool) -> nn.Parameter:
    """What the optimizer sees of a parameter. Its gradient is set, not accumulated by autograd."""
    p = nn.Parameter(view, requires_grad=trainable)
    p.register_hook = p.register_post_accumulate_grad_hook = _refuse_hook
    return p


def _refuse_hook(hook):
    raise RuntimeError("a hook on a parameter of model.parameters() would never run, for autograd "
                       "works on the bare module's parameters: change p.grad after backward")


def _refuse_not_elementwise(model, optimizer):
    if not isinstance(optimizer, ELEMENTWISE):
        known = ", ".join(kind.__name__ for kind in ELEMENTWISE)
        raise RuntimeError(
            f"{type(optimizer).__name__} is not known to update every element on its own, so on "
            f"the slices of stage {model.stage} it may compute something else than on whole "
            f"parameters; use stage 0, or one of {known}")


def _refuse_scaler_of_one_rank(model):
    """torch's own GradScaler looks for inf in this rank's slice alone, and so would skip the step
    on some ranks only. Who calls the optimizer can only be seen on the stack."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code is GradScaler.step.__code__ and type(frame.f_locals["self"]) is GradScaler:
            raise RuntimeError(
                f"torch.amp.GradScaler sees only this rank's slice of the gradients at stage "
                f"{model.stage}; use zero_ref.GradScaler(model) instead, which takes the same "
                "arguments otherwise")
        frame = frame.f_back
