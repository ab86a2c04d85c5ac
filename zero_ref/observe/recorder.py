"""Record a training step: what this rank holds of every unit, from one event to the next.

    with record(model, optimizer) as step:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

`zero_ref.viz` draws what every rank has recorded. What is held is read off the storages that are
alive at that moment; the stages know nothing of it.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..engine.slices import without_marks
from . import memory
from .hooks import HookCall, noted
from .tensors import Tensors
from .trace import Event, Trace, recording_into

if TYPE_CHECKING:
    from ..partition import Unit
    from ..stage0 import Stage0

# What a rank has of one slice of a unit: a letter each, so that "og  " are four slices.
OWNED = "o"  # this rank's own, whose optimizer states and updates are its task
TEMPORARY = "t"  # somebody else's parameters, or gradients that are not summed over the ranks yet
IN_FLIGHT = "f"  # part of a collective that this rank has issued and not yet waited for
EMPTY = "e"  # memory is there, but holds nothing that counts
ABSENT = " "

COMPUTED = ("start", "forward", "backward", "step", "end")  # the frames that all stages have

_GATHERS, _REDUCES = {"all_gather"}, {"reduce_scatter", "all_reduce"}


@dataclass
class Layout:
    """A unit's flat buffer, sizes in elements. starts: where each parameter begins."""

    name: str
    names: list[str]
    shapes: list[tuple[int, ...]]
    starts: list[int]
    numel: int
    padded_numel: int
    world_size: int
    frozen: bool

    @property
    def sizes(self) -> list[int]:
        """Of each parameter, as `memory.model_states` takes them."""
        return [math.prod(shape) for shape in self.shapes]


@dataclass
class Frame:
    """What a rank held at one moment of a step.

    what: "start", "forward", "backward", "reshard", "step", "end" or the name of the collective
    that was just issued. time: `time.monotonic()` seconds. held: {unit: {"parameters": …,
    "gradients": …, "optimizer": …}}, each a letter per slice. bytes: `memory.resident` at this
    moment. sent: bytes that this rank has had to send since the start, this collective's included;
    wire_bytes: for this collective alone. total: the most bytes that all tensors together took at
    one time since the previous frame, if that was recorded.
    """

    what: str
    unit: str
    phase: str
    time: float
    held: dict[str, dict[str, str]]
    bytes: dict[str, int]
    sent: int
    wire_bytes: int = 0
    total: int | None = None


@dataclass
class Span:
    """Time in which a rank computed (or waited for what it needed to), in `time.monotonic()`."""

    phase: str
    unit: str
    start: float
    end: float


@dataclass
class Recording:
    """One rank's step. Plain data: it can be sent, kept and compared."""

    rank: int
    world_size: int
    stage: int
    overlap: bool
    units: list[Layout]
    frames: list[Frame] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    calls: list[HookCall] = field(default_factory=list)


def layout(model: "Stage0") -> list[Layout]:
    """The flat buffers of a wrapped model, as a list of Layouts, which any process may draw."""
    return [Layout(u.name, list(u.names), [tuple(shape) for shape in u.shapes], u.starts,
                   u.numel, u.padded_numel, u.world_size, u.frozen)
            for u in model.units if u.numel]


@contextmanager
def record(model: "Stage0", optimizer: torch.optim.Optimizer | None = None, *,
           all_tensors: bool = False) -> Iterator[Recording]:
    """Record this rank's part of what happens inside. Yields a Recording, filled at the end.

    model: what `zero_ref.wrap` returned. The optimizer's states exist from its first step on, so
    record the second step to see them from the start. Collectives of another model inside the block
    would be taken for this one's. Raises ValueError for any other module.
    all_tensors: also measure `Frame.total`: the model states that were there at the start, and
        every tensor that was made inside and is still alive: activations, gradients, temporaries,
        landing buffers. torch's profiler runs for that, so times are longer. It does not see that
        an older tensor is freed, such as the loss of the step before, and warns: `del` it first.
    """
    if not hasattr(model, "units"):
        raise ValueError(f"record takes what zero_ref.wrap returned, this is a "
                         f"{type(model).__name__}")
    recording = Recording(model.rank, model.world_size, model.stage, model.overlap, layout(model))
    recorder = _Recorder(model, optimizer, recording)
    with ExitStack() as stack:
        for hook in recorder.register_hooks():
            stack.callback(hook.remove)
        recording.calls = stack.enter_context(noted(model))
        stack.enter_context(recording_into(recorder))
        if all_tensors:
            recorder.tensors = Tensors(recorder, model.units[0].flat.device)
            stack.enter_context(recorder.tensors.counting())
        recorder.frame("start")
        yield recording
        recorder.frame("end")
    if recorder.tensors is not None:
        at_the_start = sum(recording.frames[0].bytes.values())
        for frame, most in zip(recording.frames, recorder.tensors.most):
            frame.total = at_the_start + most


class _Recorder(Trace):
    """Takes a frame at each collective, and where a unit's forward and backward begin and end."""

    def __init__(self, model: "Stage0", optimizer: torch.optim.Optimizer | None,
                 recording: Recording):
        super().__init__()
        self.model, self.optimizer, self.recording = model, optimizer, recording
        recording.events = self.events
        self.tensors: Tensors | None = None
        self.mark = time.monotonic()  # when the last span ended
        self.started: list[float] = []  # of units whose forward is running, the innermost last
        self.gradients = {}  # unit -> indices of the parameters that backward has come to

    def add(self, event: Event) -> None:
        super().add(event)
        self.frame(event.op, event.unit, event.phase, event.wire_bytes)

    @without_marks()
    def frame(self, what: str, unit: str = "", phase: str = "", wire_bytes: int = 0) -> None:
        if self.tensors is not None:
            self.tensors.mark()
        self.recording.frames.append(Frame(
            what, unit, phase, time.monotonic(), self.held(),
            memory.resident(self.model, self.optimizer), self.wire_bytes(), wire_bytes))

    def span(self, phase: str, unit: str, start: float) -> None:
        self.mark = time.monotonic()
        self.recording.spans.append(Span(phase, unit, start, self.mark))

    # ---- what is held ----------------------------------------------------------------------------

    def held(self) -> dict[str, dict[str, str]]:
        in_flight = {(unit, event.op) for event in self.events if event.awaited is None
                     for unit in event.unit.split("+")}
        return {unit.name: {
            "parameters": self.parameters(unit, any((unit.name, op) in in_flight
                                                    for op in _GATHERS)),
            "gradients": self.gradient(unit, any((unit.name, op) in in_flight
                                                 for op in _REDUCES)),
            "optimizer": self.states(unit),
        } for unit in self.model.units if unit.numel}

    def slices(self, unit: "Unit", own: str, others: str) -> str:
        """A letter per slice. own: for those that this rank's optimizer updates."""
        everything = unit.master.numel() == unit.padded_numel and not unit.frozen
        return "".join(own if everything or rank == unit.rank else others
                       for rank in range(unit.world_size))

    def parameters(self, unit: "Unit", in_flight: bool) -> str:
        if in_flight:
            return self.slices(unit, OWNED, IN_FLIGHT)
        return self.slices(unit, OWNED, TEMPORARY if _alive(unit.flat) else ABSENT)

    def gradient(self, unit: "Unit", in_flight: bool) -> str:
        if in_flight:
            return IN_FLIGHT * unit.world_size
        backward = self.model._backward
        fills_up = backward is not None and unit in backward.grads and any(
            unit in bucket for bucket in backward.queue)
        if fills_up or any(p.grad is not None for p in unit.params):
            return TEMPORARY * unit.world_size
        kept = [b for b in unit.kept_grads.values() if _alive(b)]
        reduced = [p.grad for p in unit.master_params if p.grad is not None]
        sizes = [b.untyped_storage().nbytes() // b.itemsize for b in kept + reduced]
        memory_of = max(sizes, default=0)
        own = OWNED if reduced else EMPTY if memory_of else ABSENT
        return self.slices(unit, own, EMPTY if memory_of >= unit.padded_numel else ABSENT)

    def states(self, unit: "Unit") -> str:
        known = self.optimizer.state if self.optimizer is not None else {}
        has = any(key != "step" for p in unit.master_params if p.numel()
                  for key in known.get(p, ()))
        return self.slices(unit, OWNED if has else ABSENT, ABSENT)

    # ---- where ----------------------------------------------------------------------------------

    def register_hooks(self) -> list[RemovableHandle]:
        hooks, units = [], [unit for unit in self.model.units if unit.numel]
        for module in dict.fromkeys(unit.module for unit in units):
            name = next(unit.name for unit in units if unit.module is module)
            hooks.append(module.register_forward_pre_hook(self.enters(name)))
            hooks.append(module.register_forward_hook(self.leaves(name)))
        for unit in units:
            for index, p in enumerate(unit.params):
                if p.requires_grad:
                    hooks.append(p.register_hook(self.has_gradient(unit, index)))
        if self.optimizer is not None:
            hooks.append(self.optimizer.register_step_pre_hook(self.begins_step))
            hooks.append(self.optimizer.register_step_post_hook(self.ends_step))
        return hooks

    def enters(self, name: str) -> Callable[[nn.Module, tuple], None]:
        def hook(module, args):
            self.frame("forward", name, "forward")
            self.started.append(time.monotonic())
        return hook

    def leaves(self, name: str) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(module, args, output):
            self.span("forward", name, self.started.pop())
            if self.held() != self.recording.frames[-1].held:
                self.frame("reshard", name, "forward")
        return hook

    def has_gradient(self, unit: "Unit", index: int) -> Callable[[torch.Tensor], None]:
        def hook(grad):  # before it is accumulated, so before the stage's own hook
            came = self.gradients.setdefault(unit, set())
            came.add(index)
            if len(came) == sum(p.requires_grad for p in unit.params):
                del self.gradients[unit]
                self.frame("backward", unit.name, "backward")
                self.span("backward", unit.name, self.mark)
        return hook

    def begins_step(self, *_: Any) -> None:
        self.gradients.clear()  # of units with unused parameters
        self.frame("step", "", "step")
        self.mark = time.monotonic()

    def ends_step(self, *_: Any) -> None:
        self.span("step", "", self.mark)


def _alive(buffer):
    return buffer is not None and buffer.untyped_storage().nbytes() > 0
