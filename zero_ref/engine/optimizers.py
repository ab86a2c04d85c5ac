"""What a stage has to know about the optimizer: when it steps, and whether it may."""

import functools
import inspect
import weakref
from typing import Any

import torch
from torch import optim
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from . import writes
from .local import hide_local
from .owned import mark
from .slices import unmarked

# Each element of a parameter is updated from that element of its gradient and of its states alone,
# so a slice is updated as it would be inside the whole.
ELEMENTWISE = (optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax,
               optim.Adagrad, optim.Adadelta, optim.RMSprop, optim.Rprop, optim.ASGD)

ELEMENTS = "zero_ref_elements"  # in each state: (begin, end) of what it belongs to


def watch(model) -> list:
    """Check every optimizer that holds parameters of `model` before its step, and call
    `model._follow(units)` after it. Returns the hooks."""
    while _gone:
        _gone.pop().remove()
    ref: Any = weakref.ref(model)
    around: Any = weakref.WeakKeyDictionary()  # by optimizer: hooks during its step

    def before(optimizer, args, kwargs):
        if ref() is None:
            return
        _refuse_foreign(ref(), optimizer)
        units = _units_in(ref(), optimizer)
        if units:
            hide_local(units)
            _refuse_unreduced(optimizer, units)
            _refuse_others_states(optimizer)
            _refuse_moved(units)
        if units and ref().stage >= 1:
            _refuse_not_elementwise(ref(), optimizer)
        for hook in around.pop(optimizer, ()):  # of a step that failed
            hook.remove()
        if units:
            around[optimizer] = _unmark_around(optimizer, units)

    def after(optimizer, args, kwargs):
        if ref() is None:
            return
        units = _units_in(ref(), optimizer)
        for hook in around.pop(optimizer, ()):
            hook.remove()
        for unit in units:  # a graph from before the step may not be differentiated any more
            torch.autograd.graph.increment_version(unit.params)
        if units:
            _say_whose_states(optimizer)
            ref()._follow(units)

    return [_Later(register_optimizer_step_pre_hook(before)),
            _Later(register_optimizer_step_post_hook(after))]


_gone: list = []  # hooks of models that are gone


class _Later:
    """A hook that is removed when the next model is watched. A model may go at any moment, also
    while torch goes through these hooks, whose number may not change then."""

    def __init__(self, hook):
        self.hook = hook

    def remove(self):
        _gone.append(self.hook)


def _unmark_around(optimizer, units):
    """Take the marks off while torch updates: after the user's hooks before a step, and before
    those after it. A step that the user wrote sees the marks, and its states lose them."""
    update = inspect.unwrap(type(optimizer).step)
    written_by_torch = update.__module__.startswith("torch.")

    def before(optimizer, args, kwargs):
        if written_by_torch:
            mark(units, on=False)
            then_plain = functools.partial(_then_plain, units)
            return tuple(map(then_plain, args)), {k: then_plain(v) for k, v in kwargs.items()}

    def after(optimizer, args, kwargs):
        mark(units, on=True)
        if not written_by_torch:
            for state in optimizer.state.values():
                state.update({key: unmarked(value) for key, value in state.items()})

    hooks = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    optimizer._optimizer_step_post_hooks.move_to_end(hooks[1].id, last=False)
    return hooks


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


def _params_in(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def _held_by(optimizer):
    return set(map(id, _params_in(optimizer)))


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


def _refuse_others_states(optimizer):
    """States fit the elements that they were made for. Each says which these are, and what it says
    is saved and loaded with it."""
    for p, state in _states_in(optimizer):
        if (of_state := state.get(ELEMENTS)) == p._elements:
            continue
        sizes = {value.numel() for value in state.values()
                 if isinstance(value, torch.Tensor) and value.ndim}
        if of_state is not None or not sizes <= {p.numel()}:
            what = (f"the elements from {of_state[0]} to {of_state[1]}" if of_state else
                    f"{max(sizes)} elements")
            raise RuntimeError(
                f"this {type(optimizer).__name__} has loaded states of {what} of a parameter, and "
                f"on this rank it updates the elements from {p._elements[0]} to {p._elements[1]}: "
                "load what optimizer.state_dict() gave on the same rank, with as many ranks and "
                "the same units, at stage 0 or at one of the stages 1 to 3")


def _say_whose_states(optimizer):
    for p, state in _states_in(optimizer):
        state[ELEMENTS] = p._elements


def _states_in(optimizer):
    with torch._C.DisableTorchFunctionSubclass():
        return [(p, state) for p in _params_in(optimizer) if hasattr(p, "_elements")
                and (state := optimizer.state.get(p))]


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
