"""Which hook of a stage is called when, and what happens in it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

from torch import nn

from ..engine.slices import without_marks
from .trace import Event, Trace, recording_into

if TYPE_CHECKING:
    from ..stage0 import Stage0

# Methods of the stages that somebody outside calls: a unit's module, autograd or an optimizer.
_OF_UNITS = ("_pre_forward", "_post_forward", "_pre_backward", "_on_grad", "_post_backward",
             "_after_step")
_OF_THE_MODEL = ("_begin_backward", "_finish_backward")
_STEPS = ("_reshard", "_finish_reduction")  # methods that hooks call

_ENDS = {"unshards": "reshards", "begins": "ends"}


@dataclass
class HookCall:
    """A hook was called, and not by another one.

    unit: whose, or "" for the whole model's. did: what happened in it, in turn, as (what, unit):
    the name of a collective that it issued; "unshards" or "reshards", when the full parameters are
    there, or no longer; "collects", when the first gradient is in the unit's buffer; "delivers",
    when the optimizer has the mean; "begins" or "ends", of backward.
    """

    hook: str
    unit: str
    did: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def noted(model: "Stage0") -> Iterator[list[HookCall]]:
    """Yields a list, which gets every call of a hook of this model inside the block."""
    notes = _Notes(model)
    with ExitStack() as stack:
        stack.enter_context(recording_into(notes))
        for name in (*_OF_UNITS, *_OF_THE_MODEL, *_STEPS):
            if hasattr(model, name):
                wrapper = notes.looked_at(name) if name in _STEPS else notes.noted(name)
                stack.enter_context(mock.patch.object(model, name, wrapper))
        yield notes.calls


class _Notes(Trace):
    def __init__(self, model: "Stage0"):
        super().__init__()
        self.model = model
        self.calls: list[HookCall] = []
        self.running: HookCall | None = None
        self.before: set[tuple[str, str]] = set()

    def noted(self, name: str) -> Callable:
        method = getattr(self.model, name)

        def hook(*args, **kwargs):
            unit = "" if name in _OF_THE_MODEL else self.meant(args[0])
            if self.running is not None or (name in _OF_UNITS and not unit):
                return method(*args, **kwargs)
            self.running, self.before = HookCall(name, unit), self.there()
            self.calls.append(self.running)
            try:
                return method(*args, **kwargs)
            finally:
                self.look()
                self.running = None

        return hook

    def looked_at(self, name: str) -> Callable:
        method = getattr(self.model, name)

        def step(*args):
            result = method(*args)
            self.look()
            return result

        return step

    def add(self, event: Event) -> None:
        self.look()
        if self.running is not None:
            self.running.did.append((event.op, event.unit))

    def look(self) -> None:
        """Note what has happened since the last look, if a hook is running."""
        if self.running is not None:
            now = self.there()
            self.running.did += sorted(now - self.before)
            self.running.did += [(_ENDS[what], unit) for what, unit in sorted(self.before - now)
                                 if what in _ENDS]
            self.before = now

    @without_marks()
    def there(self) -> set[tuple[str, str]]:
        """What hooks bring about, as (the word for it, unit)."""
        backward = self.model._backward
        found = {("begins", "")} if backward is not None else set()
        for unit in self.model.units:
            if unit.gathered:
                found.add(("unshards", unit.name))
            if backward is not None and unit in backward.grads:
                found.add(("collects", unit.name))
            if any(p.grad is not None for p in unit.master_params):
                found.add(("delivers", unit.name))
        return found

    def meant(self, what: Any) -> str:
        """The units that a hook's first argument belongs to."""
        if isinstance(what, list):
            return "+".join(unit.name for unit in what)
        module = what if isinstance(what, nn.Module) else getattr(what, "mark", what).module
        return "+".join(unit.name for unit in self.model.units if unit.module is module)
