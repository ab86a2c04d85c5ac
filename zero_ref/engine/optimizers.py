"""What a stage has to know about the optimizer: when it steps, and whether it may."""

import functools
import weakref
from typing import Any

import torch
from torch import optim
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from . import writes
from .owned import hide_local, mark

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
            hide_local(units)
            _refuse_unreduced(optimizer, units)
            _refuse_unreached(ref(), optimizer)
            _refuse_others_states(optimizer)
            _refuse_moved(units)
        if units and ref().stage >= 1:
            _refuse_not_elementwise(ref(), optimizer)
        mark(units, on=False)
        then_plain = functools.partial(_then_plain, units)
        return tuple(map(then_plain, args)), {k: then_plain(v) for k, v in kwargs.items()}

    def after(optimizer, args, kwargs):
        units = _units_in(ref(), optimizer)
        mark(units, on=True)
        for unit in units:  # a graph from before the step may not be differentiated any more
            torch.autograd.graph.increment_version(unit.params)
        if units:
            ref()._follow(units)

    return [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]


def _then_plain(units, value):
    """A closure of the step computes gradients, which are marked."""
    if not callable(value) or isinstance(value, optim.Optimizer):
        return value

    @functools.wraps(value)
    def closure(*args):
        result = value(*args)
        mark(units, on=False)
        return result

    return closure


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


def _refuse_unreached(model, optimizer):
    """A forward without a backward, and no gradient: backward(inputs=[*model.parameters()])."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if model.awaits_backward and not any(p.grad is not None for p in held):
        raise RuntimeError(
            f"{type(optimizer).__name__}.step() without any gradient, after a forward whose "
            "backward has not come by the model: if it was loss.backward(inputs=…), leave the "
            "inputs out")


def _refuse_others_states(optimizer):
    """States fit the elements that they were made for. Each group says which these are, and what it
    says is saved and loaded with the states."""
    for group in optimizer.param_groups:
        ours = [getattr(p, "elements", None) for p in group["params"]]
        theirs = group.setdefault("zero_ref_elements", ours)
        for p, loaded, own in zip(group["params"], theirs, ours):
            sizes = {value.numel() for value in optimizer.state.get(p, {}).values()
                     if isinstance(value, torch.Tensor) and value.ndim} if theirs is ours else set()
            if loaded != own or (own != "all" and not sizes <= {p.numel()}):
                what = f"elements {loaded}" if loaded != own else f"{max(sizes)} elements"
                raise RuntimeError(
                    f"this {type(optimizer).__name__} has loaded states of {what} of a parameter, "
                    f"and on this rank it updates elements {own}: load what "
                    "optimizer.state_dict() gave on the same rank, with as many ranks and the same "
                    "units, at stage 0 or at one of the stages 1 to 3")


def _refuse_moved(units):
    for unit in units:
        if unit.gathered:
            writes.keep_written(unit)
        begin, end = unit.master.data_ptr(), unit.master.data_ptr() + unit.master.nbytes
        with torch._C.DisableTorchFunctionSubclass():
            for name, p in zip(unit.names, unit.master_params):
                if p.numel() and not begin <= p.data_ptr() < end:
                    raise RuntimeError(writes.moved(unit, name))


def _refuse_not_elementwise(model, optimizer):
    if not isinstance(optimizer, ELEMENTWISE):
        known = ", ".join(kind.__name__ for kind in ELEMENTWISE)
        raise RuntimeError(
            f"{type(optimizer).__name__} is not known to update every element on its own, so on "
            f"the slices of stage {model.stage} it may compute something else than on whole "
            f"parameters; use stage 0, or one of {known}")
