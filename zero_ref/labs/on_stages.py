"""Exercises on the stages: classes like those of small.py, which are trained on real ranks."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .. import comm, course
from ..observe import memory
from ..observe.trace import Event, Trace, recording_into, trace
from . import small
from .exercise import Exercise, Mistake, Observed

# ---- what an answer is run on --------------------------------------------------------------------


def _with(answer: type, **methods: Any) -> type:
    """The answer, with some of its methods replaced by the solution's."""
    return type(answer.__name__, (answer,), methods)


def weights_of(model):
    return {name.removeprefix("module."): value.detach().clone()
            for name, value in model.state_dict().items()}


def backward(model, step):
    images, labels = course.batch(step, dist.get_rank())
    F.cross_entropy(model(images), labels).backward()


def what_was_sent(events: list[Event]) -> Observed:
    waits = [event for event in events if event.awaited is None]
    return {"collectives that were not waited for": len(waits),
            "something was sent through zero_ref.comm": bool(events),
            "bytes sent": sum(event.wire_bytes for event in events),
            "collectives": ", ".join(f"{count} {op}" for op, count in sorted(
                Counter(event.op for event in events).items())) or "none"}


def train(model, steps: int = 3, after_backward: Callable[[], Observed] = dict) -> Observed:
    """Of the last step: what was sent, and what was held before the optimizer's step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(steps):
        with trace() as sent:
            backward(model, step)
            held, more = memory.resident(model, optimizer), after_backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"bytes of optimizer states": held["optimizer"], "bytes of gradients": held["gradients"],
            "bytes of parameters": held["parameters"], **what_was_sent(sent.events), **more,
            "weights": weights_of(model)}


def _observe_start(answer) -> Observed:
    with trace() as sent:
        model = answer(course.build(seed=dist.get_rank()))
    weights = weights_of(model)
    whose = ("rank 0's" if course.same_bits(course.build(seed=0).state_dict(), weights) else
             "its own" if course.same_bits(course.build(dist.get_rank()).state_dict(), weights) else
             "nobody's")
    return {**what_was_sent(sent.events), "whose weights it has": whose, "weights": weights,
            "unit.flat is still the buffer": all(
                isinstance(unit.flat, torch.Tensor)
                and unit.flat.data_ptr() == unit.params[0].data_ptr() for unit in model.units)}


def _observe_average(answer) -> Observed:
    model = _with(answer, start=small.Stage0.start)(course.build(seed=dist.get_rank()))
    with trace() as sent:
        backward(model, 0)
    return {**what_was_sent(sent.events),
            "gradients": {f'unit "{unit.name}"': _like(unit.owned.grad) for unit in model.units}}


def _like(grad):
    return None if grad is None else grad.detach().clone()


def _observe_stage_1(answer) -> Observed:
    found = train(answer(course.build(seed=dist.get_rank())))
    del found["bytes of gradients"]  # who holds less of them is ahead of its time
    return found


def _observe_stage_2(answer) -> Observed:
    full = []

    def reduce(self, unit, grad):
        full.append(weakref.ref(grad))
        answer.reduce(self, unit, grad)

    model = _with(answer, reduce=reduce)(course.build(seed=dist.get_rank()))
    return train(model, after_backward=lambda: {
        "full gradients that are still there after backward": sum(
            grad() is not None for grad in full)})


def _observe_sharded(answer) -> Observed:
    model = answer(course.build(seed=dist.get_rank()))
    unit = model.units[0]
    before = unit.flat.clone()
    full = before.nbytes
    found: Observed = {}
    model.free(unit)
    found["bytes of the flat buffer after free"] = unit.flat.untyped_storage().nbytes()
    found["bytes of the layer's weight after free"] = (
        unit.params[0].untyped_storage().nbytes())
    found["left in the flat buffer after free"] = (
        "nothing" if unit.flat.untyped_storage().nbytes() == 0 else
        "another shape" if unit.flat.shape != before.shape else
        "its values" if unit.flat.any() else "zeros")
    found["bytes of the shard after free"] = unit.shard.untyped_storage().nbytes()
    found["elements of the shard"] = unit.shard.numel()
    found["the optimizer's parameter is the shard's memory"] = (
        unit.owned.data_ptr() == unit.shard.data_ptr())
    if (found["bytes of the shard after free"] == 0
            or found["bytes of the layer's weight after free"] > 0):
        return found  # the rest says nothing more
    unit.owned.data.mul_(2)  # as if the optimizer had stepped
    with trace() as sent:
        model.gather(unit, "forward")
    found |= what_was_sent(sent.events)
    found["bytes of the flat buffer after gather"] = unit.flat.untyped_storage().nbytes()
    if sent.events and unit.flat.untyped_storage().nbytes() == full:
        found["the flat buffer after gather"] = unit.flat.detach().clone()
        found["the layer's weight after gather"] = unit.params[0].detach().clone()
    return found


class Fullest(Trace):
    """Notes how many units' full parameters were there at once, when something was sent."""

    def __init__(self, units):
        super().__init__()
        self.units, self.most = units, 0

    def add(self, event: Event) -> None:
        super().add(event)
        if event.phase != "state_dict":
            self.most = max(self.most, full_units(self.units))


def full_units(units):
    return sum(unit.flat.untyped_storage().nbytes() > 0 for unit in units)


def bytes_of_all_tensors() -> int:
    """Of this process, wherever they are kept, except for those that only autograd refers to."""
    gc.collect()  # what is left of an earlier answer would be freed later
    return memory._bytes(memory.all_tensors())


def beside(more, units):
    """Says how much more there is than is needed: logits, losses and a landing buffer may be
    alive, too, but less than half of what the units have in fp32."""
    some = more < 2 * sum(unit.flat.numel() for unit in units)
    return "a few tensors" if some else f"{more:,} bytes"


def _observe_hooks(answer) -> Observed:
    model = answer(course.build(seed=dist.get_rank()))
    found: Observed = {"full units before the first step": full_units(model.units)}
    watch = Fullest(model.units)
    with recording_into(watch):
        found |= train(model, after_backward=lambda: {
            "full units after backward": full_units(model.units)})
    found["most full units at one time"] = watch.most
    with torch.no_grad():
        model(course.batch(0, dist.get_rank())[0])
    found["full units after a forward without gradients"] = full_units(model.units)
    return found


# ---- solutions and wrong answers -----------------------------------------------------------------


class _FromEachRank(small.Stage0):
    def start(self, unit):
        pass


class _AverageAtStart(small.Stage0):
    def start(self, unit):
        comm.all_reduce(unit.flat, self.group, unit=unit.name, phase="init",
                        divide_by=self.world_size).wait()


class _ShardFromEach(small.Stage0):
    def start(self, unit):
        comm.all_gather(unit.flat, unit.shard, self.group, unit=unit.name, phase="init").wait()


class _NamesTheUnit(small.Stage0):
    def start(self, unit):
        comm.broadcast(unit.flat, self.group, unit=unit, phase="init").wait()


class _OnlyRank0Broadcasts(small.Stage0):
    def start(self, unit):
        if self.rank == 0:
            comm.broadcast(unit.flat, self.group, unit=unit.name, phase="init").wait()


class _SameSeed(small.Stage0):
    def start(self, unit):
        torch.manual_seed(0)
        unit.flat.normal_()


class _BroadcastsACopy(small.Stage0):
    def start(self, unit):
        comm.broadcast(unit.flat.clone(), self.group, unit=unit.name, phase="init").wait()


class _Sum(small.Stage0):
    def reduce(self, unit, grad):
        comm.all_reduce(grad, self.group, unit=unit.name, phase="backward").wait()
        unit.owned.grad = grad


class _Local(small.Stage0):
    def reduce(self, unit, grad):
        unit.owned.grad = grad


class _DividedTwice(small.Stage0):
    def reduce(self, unit, grad):
        comm.all_reduce(grad, self.group, unit=unit.name, phase="backward",
                        divide_by=self.world_size).wait()
        unit.owned.grad = grad / self.world_size


class _DividedBefore(small.Stage0):
    def reduce(self, unit, grad):
        grad /= self.world_size
        comm.all_reduce(grad, self.group, unit=unit.name, phase="backward").wait()
        unit.owned.grad = grad


class _DividedByFour(small.Stage0):
    def reduce(self, unit, grad):
        comm.all_reduce(grad, self.group, unit=unit.name, phase="backward", divide_by=4).wait()
        unit.owned.grad = grad


class _OnlyRank0Reduces(small.Stage0):
    def reduce(self, unit, grad):
        if self.rank == 0:
            super().reduce(unit, grad)


class _Rank0sGradients(small.Stage0):
    def reduce(self, unit, grad):
        comm.broadcast(grad, self.group, unit=unit.name, phase="backward").wait()
        unit.owned.grad = grad


class _SumsTheParameters(small.Stage0):
    def reduce(self, unit, grad):
        comm.all_reduce(unit.flat, self.group, unit=unit.name, phase="backward",
                        divide_by=self.world_size).wait()
        unit.owned.grad = grad


class _CopiesIntoNone(small.Stage0):
    def reduce(self, unit, grad):
        comm.all_reduce(grad, self.group, unit=unit.name, phase="backward",
                        divide_by=self.world_size).wait()
        unit.owned.grad.copy_(grad)


class _NotDelivered(small.Stage0):
    def reduce(self, unit, grad):
        comm.all_reduce(grad, self.group, unit=unit.name, phase="backward",
                        divide_by=self.world_size).wait()


class _SliceOnly(small.Stage0):
    def reduce(self, unit, grad):
        mine = grad.chunk(self.world_size)[self.rank]
        comm.reduce_scatter(mine, grad, self.group, unit=unit.name, phase="backward",
                            divide_by=self.world_size).wait()
        unit.owned.grad = grad


class AllReduceStage1(small.Stage0):
    """Stage 1 that sends 3Ψ·(N-1)/N: everyone gets the whole mean, and uses its slice of it."""

    def own(self, unit):
        return unit.shard

    def reduce(self, unit, grad):
        comm.all_reduce(grad, self.group, unit=unit.name, phase="backward",
                        divide_by=self.world_size).wait()
        unit.owned.grad = grad.chunk(self.world_size)[self.rank]

    def after_step(self, unit):
        comm.all_gather(unit.flat, unit.shard, self.group, unit=unit.name, phase="step").wait()


class _OwnsEverything(AllReduceStage1):
    def own(self, unit):
        return unit.flat

    def reduce(self, unit, grad):
        small.Stage0.reduce(self, unit, grad)


class _NothingGathered(AllReduceStage1):
    def after_step(self, unit):
        pass


class _GathersGradients(AllReduceStage1):
    def after_step(self, unit):
        full = torch.empty_like(unit.flat)
        comm.all_gather(full, unit.owned.grad.contiguous(), self.group, unit=unit.name,
                        phase="step").wait()


class _Rank0sSlice(AllReduceStage1):
    def reduce(self, unit, grad):
        comm.all_reduce(grad, self.group, unit=unit.name, phase="backward",
                        divide_by=self.world_size).wait()
        unit.owned.grad = grad.chunk(self.world_size)[0]


class _WholeGradientForASlice(AllReduceStage1):
    def reduce(self, unit, grad):
        small.Stage0.reduce(self, unit, grad)


class _BroadcastsInstead(AllReduceStage1):
    def after_step(self, unit):
        comm.broadcast(unit.flat, self.group, unit=unit.name, phase="step").wait()


class _UpdatesACopy(AllReduceStage1):
    def own(self, unit):
        return unit.shard.clone()


class _GathersIntoTheShard(AllReduceStage1):
    def after_step(self, unit):
        comm.all_gather(unit.shard, unit.flat, self.group, unit=unit.name, phase="step").wait()


class _SomeGather(AllReduceStage1):
    def after_step(self, unit):
        if self.rank == 0:
            super().after_step(unit)


class _ReduceScatterOfSums(small.Stage1):
    def reduce(self, unit, grad):
        mine = grad.chunk(self.world_size)[self.rank]
        comm.reduce_scatter(mine, grad, self.group, unit=unit.name, phase="backward").wait()
        unit.owned.grad = mine


class _GathersGradientsToo(small.Stage1):
    def reduce(self, unit, grad):
        mine = grad.chunk(self.world_size)[self.rank]
        comm.reduce_scatter(mine, grad, self.group, unit=unit.name, phase="backward",
                            divide_by=self.world_size).wait()
        comm.all_gather(grad, mine, self.group, unit=unit.name, phase="backward").wait()
        unit.owned.grad = mine


class _LocalSlice(small.Stage1):
    def reduce(self, unit, grad):
        unit.owned.grad = grad.chunk(self.world_size)[self.rank]


class _Stage1WithoutGather(small.Stage1):
    def after_step(self, unit):
        pass


class _Stage1OnlyRank0Gathers(small.Stage1):
    def after_step(self, unit):
        if self.rank == 0:
            super().after_step(unit)


class _Stage1UpdatesACopy(small.Stage1):
    def own(self, unit):
        return unit.shard.clone()


class _Stage1GathersIntoTheShard(small.Stage1):
    def after_step(self, unit):
        comm.all_gather(unit.shard, unit.flat, self.group, unit=unit.name, phase="step").wait()


class _ScattersIntoTheGradient(small.Stage1):
    def reduce(self, unit, grad):
        mine = grad.chunk(self.world_size)[self.rank]
        comm.reduce_scatter(grad, mine, self.group, unit=unit.name, phase="backward",
                            divide_by=self.world_size).wait()
        unit.owned.grad = mine


class _OnlyRank0Scatters(small.Stage1):
    def reduce(self, unit, grad):
        if self.rank == 0:
            super().reduce(unit, grad)


class _StillAView(small.Stage2):
    def reduce(self, unit, grad):
        mine = grad.chunk(self.world_size)[self.rank]
        comm.reduce_scatter(mine, grad, self.group, unit=unit.name, phase="backward",
                            divide_by=self.world_size).wait()
        unit.owned.grad = mine


class _KeepsTheFullOne(small.Stage2):
    def reduce(self, unit, grad):
        super().reduce(unit, grad)
        unit.full_grad = grad


class _Stage2Sum(small.Stage2):
    def reduce(self, unit, grad):
        mine = torch.empty_like(unit.shard)
        comm.reduce_scatter(mine, grad, self.group, unit=unit.name, phase="backward").wait()
        unit.owned.grad = mine


class _EmptiesTheGradient(small.Stage2):
    def reduce(self, unit, grad):
        mine = grad.chunk(self.world_size)[self.rank]
        comm.reduce_scatter(mine, grad, self.group, unit=unit.name, phase="backward",
                            divide_by=self.world_size).wait()
        grad.untyped_storage().resize_(0)
        unit.owned.grad = torch.zeros_like(unit.shard)


class _AllReduceThenCopy(small.Stage2):
    def reduce(self, unit, grad):
        comm.all_reduce(grad, self.group, unit=unit.name, phase="backward",
                        divide_by=self.world_size).wait()
        unit.owned.grad = grad.chunk(self.world_size)[self.rank].clone()


class _Stage2ScattersIntoTheGradient(small.Stage2):
    def reduce(self, unit, grad):
        mine = torch.empty_like(unit.shard)
        comm.reduce_scatter(grad, mine, self.group, unit=unit.name, phase="backward",
                            divide_by=self.world_size).wait()
        unit.owned.grad = mine


class _Stage2OnlyRank0Reduces(small.Stage2):
    def reduce(self, unit, grad):
        if self.rank == 0:
            super().reduce(unit, grad)


class _ShardIsAView(small.Sharded):
    def own(self, unit):
        return unit.shard


class _PointsElsewhere(small.Sharded):
    def free(self, unit):
        for p in unit.params:
            p.data = torch.empty(0)


class _CloneIsNotStored(small.Sharded):
    def own(self, unit):
        return unit.shard.clone()


class _ShardAndCopy(small.Sharded):
    def own(self, unit):
        unit.shard = unit.shard.clone()
        return unit.shard.clone()


class _FlatPointsElsewhere(small.Sharded):
    def free(self, unit):
        unit.flat.data = torch.empty(0)


class _FlatIsNone(small.Sharded):
    def free(self, unit):
        unit.flat = None


class _DeletesTheName(small.Sharded):
    def free(self, unit):
        flat = unit.flat
        del flat


class _DeletesTheAttribute(small.Sharded):
    def free(self, unit):
        del unit.flat


class _ShapeOfTheTensor(small.Sharded):
    def free(self, unit):
        unit.flat.resize_(0)


class _BroadcastsTheUnit(small.Sharded):
    def gather(self, unit, phase):
        unit.flat.untyped_storage().resize_(unit.flat.numel() * unit.flat.element_size())
        comm.broadcast(unit.flat, self.group, unit=unit.name, phase=phase).wait()


class _ShardedGathersIntoTheShard(small.Sharded):
    def gather(self, unit, phase):
        unit.flat.untyped_storage().resize_(unit.flat.numel() * unit.flat.element_size())
        comm.all_gather(unit.shard, unit.flat, self.group, unit=unit.name, phase=phase).wait()


class _FreesNothing(small.Sharded):
    def free(self, unit):
        unit.flat.zero_()


class _NoMemory(small.Sharded):
    def gather(self, unit, phase):
        comm.all_gather(unit.flat, unit.shard, self.group, unit=unit.name, phase=phase).wait()


class _TooLittleMemory(small.Sharded):
    def gather(self, unit, phase):
        unit.flat.untyped_storage().resize_(unit.flat.numel())
        comm.all_gather(unit.flat, unit.shard, self.group, unit=unit.name, phase=phase).wait()


class _NothingSent(small.Sharded):
    def gather(self, unit, phase):
        unit.flat.untyped_storage().resize_(unit.flat.numel() * unit.flat.element_size())


class _KeptAfterForward(small.Stage3):
    def after_forward(self, unit, output):
        if output.requires_grad:
            output.register_hook(lambda grad: None)


class _NotGatheredForBackward(small.Stage3):
    def after_forward(self, unit, output):
        self.free(unit)


class _HookIsCalled(small.Stage3):
    def after_forward(self, unit, output):
        self.free(unit)
        if output.requires_grad:
            output.register_hook(self.gather(unit, "backward"))


class _HookWithoutArgument(small.Stage3):
    def after_forward(self, unit, output):
        self.free(unit)
        if output.requires_grad:
            output.register_hook(lambda: self.gather(unit, "backward"))


class _HookWithoutGradient(small.Stage3):
    def after_forward(self, unit, output):
        self.free(unit)
        output.register_hook(lambda grad: self.gather(unit, "backward"))


class _KeptAfterBackward(small.Stage3):
    def reduce(self, unit, grad):
        small.Stage2.reduce(self, unit, grad)


class _GathersAfterTheStep(small.Stage3):
    def after_step(self, unit):
        self.gather(unit, "step")
        self.free(unit)


class _NoReshardAfterForward(small.Stage3):
    def after_forward(self, unit, output):
        if not output.requires_grad:
            self.free(unit)


WAIT_HINTS = {
    "collectives that were not waited for": "A collective has only been started when the call "
    "returns. Wait for its handle before its result is used: ….wait().",
    "something was sent through zero_ref.comm": "Nothing was sent through zero_ref.comm. (Its sums "
    "are in rank order. Those of torch.distributed are not, and are not counted here.)"}
_GRADS = {**WAIT_HINTS,
          "gradients": "The optimizer needs the mean of the ranks' gradients in unit.owned.grad.",
          "bytes sent": "One all_reduce of the unit's gradients: 2·(N-1)/N of their bytes.",
          "collectives": "One all_reduce for each unit."}
_STEP = {**WAIT_HINTS,
         "bytes of optimizer states": "The optimizer keeps states for what it is given: "
         "unit.owned, which is what `own` returns.",
         "bytes of gradients": "A tensor keeps its whole storage alive, even if it is a view of "
         "only a part.",
         "bytes sent": "Go through your step: which collectives, of how many elements each?",
         "collectives": "Which collectives does the target allow, and how often?",
         "weights": "What is held and sent is right, but the weights are not stage 0's. Does the "
         "optimizer get the mean, and of this rank's own slice?"}

_NOT_ALL = "stuck|is missing|diverge"
_SOME = ("Every rank must take part in a collective. Here some ranks reach one, while others have "
         "skipped it or are at another.")
_SWAPPED = ("The buffers of a collective have the wrong sizes. Its first argument is what it "
            "fills: a whole buffer in an all_gather, and a slice in a reduce_scatter.")
_SIZES = r"tensor a \(\d+\) must match the size of tensor b|refer to a single memory location"
_COPY = ("The optimizer updates a copy. After the step the others get unit.shard, in which nothing "
         "has changed.")
_ELSEWHERE = ("unit.flat is something else now, but its memory is still there: the layer's "
              "parameters are views of it. This memory has to become empty.")
_DELETED = ("Nothing is freed. (`del` removes a name, not the memory. The memory stays as long as "
            "something refers to it, and the layer's parameters are views of it.)")
_KEPT = "Something still refers to the full gradient, so its memory stays."
_SHAPE = ("resize_ of a tensor changes its shape. The memory stays as it is: it belongs to the "
          "tensor's storage.")


def _alone_in_a_barrier(answer: type, method: str) -> Mistake:
    """The answer, with a barrier in one of its methods that only rank 0 comes to."""
    def with_barrier(self, *args):
        if self.rank == 0:
            dist.barrier()
        return getattr(answer, method)(self, *args)

    return Mistake(type("_AloneInABarrier", (answer,), {method: with_barrier}),
                   "Some ranks wait in a barrier while others wait in a collective. Every rank has "
                   "to come to both, and in the same order.",
                   r"stuck.*barrier\(")


ON_STAGES = {
    "2.1": Exercise(
        "a class like small.Stage0, with a method start(self, unit)", _observe_start, small.Stage0,
        [
            Mistake(_FromEachRank, "Nothing was sent, so each rank begins with its own random "
                    "weights. Everyone has to get rank 0's."),
            Mistake(_AverageAtStart, "All ranks begin with the same weights, but with the mean of "
                    "random ones, which nobody chose. Everyone has to get rank 0's."),
            Mistake(_ShardFromEach, "All ranks begin with the same weights, but each slice comes "
                    "from a different rank. Everyone has to get rank 0's: broadcast."),
            Mistake(_NamesTheUnit, "unit= takes a name, unit.name, and not the unit itself.",
                    "object at 0x"),
            Mistake(_SameSeed, "All ranks begin with the same weights, but they have drawn new "
                    "ones, and nothing was sent. Rank 0's own weights, which may come from a file, "
                    "are lost.",
                    by=("something was sent through zero_ref.comm", "whose weights it has")),
            _alone_in_a_barrier(small.Stage0, "start"),
            Mistake(_OnlyRank0Broadcasts, "A broadcast is a collective: all ranks call it, "
                    "including those that receive.", _NOT_ALL),
            Mistake(_BroadcastsACopy, "What arrives is thrown away: the collective has to write "
                    "into unit.flat itself, of which the module's parameters are views."),
        ],
        {**WAIT_HINTS, "bytes sent": "Rank 0 sends unit.flat, all of it, to each of the others.",
         "weights": "After wrapping, every rank's module must have rank 0's values.",
         "collectives": "One broadcast for each unit.",
         "unit.flat is still the buffer": "unit.flat has to stay the buffer: a collective writes "
         "into it, and wait() returns nothing."}),
    "2.2": Exercise(
        "a class like small.Stage0, with a method reduce(self, unit, grad)", _observe_average,
        small.Stage0, [
            Mistake(_Sum, "That is the sum of the ranks' gradients, N times their mean: a learning "
                    "rate N times as large. Divide by world_size: divide_by=…"),
            Mistake(_Local, "Nothing was sent: each rank would follow its own images only."),
            Mistake(_DividedTwice, "Divided twice by the number of ranks."),
            Mistake(_DividedBefore, "That is right except for rounding: dividing before the sum "
                    "rounds each part. Divide once, after the sum: divide_by=…"),
            Mistake(_DividedByFour, "On four ranks that is right. Divide by self.world_size."),
            Mistake(_Rank0sGradients, "Now all have rank 0's gradient, and the images of the "
                    "others count for nothing. The target is the mean over all ranks."),
            Mistake(_SumsTheParameters, "That averages the parameters, which are equal anyway. The "
                    "ranks differ in `grad`."),
            Mistake(_CopiesIntoNone, "unit.owned.grad is None until you assign it.",
                    "'NoneType' object has no attribute"),
            Mistake(_NotDelivered, "The mean is computed, but the optimizer does not get it: it "
                    "looks at unit.owned.grad."),
            _alone_in_a_barrier(small.Stage0, "reduce"),
            Mistake(_OnlyRank0Reduces, _SOME, _NOT_ALL),
            Mistake(_SliceOnly, "With reduce_scatter only this rank's slice of `grad` is the mean. "
                    "At stage 0 everyone needs all of it: all_reduce."),
        ], _GRADS),
    "4.1": Exercise(
        "a class like small.Stage0, with own, reduce and after_step", _observe_stage_1,
        AllReduceStage1, [
            Mistake(_OwnsEverything, "The optimizer still owns the whole unit, and keeps states "
                    "for all of it. Let `own` return this rank's shard."),
            Mistake(_NothingGathered, "Each rank has updated its own slice, and nobody has told "
                    "the others. Gather the parameters after the step."),
            Mistake(_GathersGradients, "You gather gradients. The others need what the optimizer "
                    "has computed from them: the updated parameters."),
            Mistake(_Rank0sSlice, "Every rank takes the first slice of the gradient. It has to be "
                    "the slice of `self.rank`."),
            Mistake(_BroadcastsInstead, "A broadcast sends rank 0's version of everything, in "
                    "which only rank 0's slice is updated."),
            Mistake(_WholeGradientForASlice, "What the optimizer updates and its gradient "
                    "have to be the same slice of the unit, and one of them is not: compare their "
                    "shapes.", "different size|shape|assign"),
            Mistake(_UpdatesACopy, _COPY, by=("bytes of parameters", "bytes of optimizer states")),
            Mistake(_GathersIntoTheShard, _SWAPPED, _SIZES),
            _alone_in_a_barrier(AllReduceStage1, "after_step"),
            Mistake(_SomeGather, _SOME, _NOT_ALL),
        ], _STEP),
    "4.2": Exercise(
        "a class like small.Stage1", _observe_stage_1, small.Stage1, [
            Mistake(AllReduceStage1, "That works, and sends 1.5 times what is needed: with "
                    "all_reduce everyone gets the whole mean, of which it uses a slice."),
            Mistake(_ReduceScatterOfSums, "That is the sum of the gradients. Divide by the number "
                    "of ranks: divide_by=…"),
            Mistake(_GathersGradientsToo, "The gradients are gathered again after the "
                    "reduce_scatter. A rank needs its own slice of them and nothing else."),
            Mistake(_LocalSlice, "Your slice of `grad` is this rank's own gradient: it has not "
                    "been added to the others' yet."),
            Mistake(_Stage1WithoutGather, "Each rank has updated its own slice, and nobody has "
                    "told the others. Gather the parameters after the step."),
            Mistake(_Stage1UpdatesACopy, _COPY,
                    by=("bytes of parameters", "bytes of optimizer states")),
            Mistake(_Stage1GathersIntoTheShard, _SWAPPED, _SIZES),
            Mistake(_ScattersIntoTheGradient, _SWAPPED, _SIZES),
            _alone_in_a_barrier(small.Stage1, "after_step"),
            Mistake(_Stage1OnlyRank0Gathers, "A gather is a collective: all ranks call it.",
                    r"diverge.* all_gather .* before that all went to .* in phase 'backward'"),
            Mistake(_OnlyRank0Scatters, _SOME, _NOT_ALL),
        ], _STEP),
    "5.1": Exercise(
        "a class like small.Stage2, with a method reduce", _observe_stage_2, small.Stage2, [
            Mistake(_StillAView, "The slice is a view of the full buffer, and keeps all of it "
                    "alive: that needs stage 1's memory. Let the sum arrive in memory of its own."),
            Mistake(_KeepsTheFullOne, _KEPT),
            Mistake(_Stage2Sum, "That is the sum of the gradients. Divide by the number of ranks: "
                    "divide_by=…"),
            Mistake(_EmptiesTheGradient, "The result was freed together with the buffer that held "
                    "it. It needs memory of its own before the buffer is emptied."),
            Mistake(_AllReduceThenCopy, "The memory is right, but all_reduce sends twice what "
                    "reduce_scatter sends, for slices that you throw away."),
            Mistake(_Stage2ScattersIntoTheGradient, _SWAPPED, _SIZES),
            _alone_in_a_barrier(small.Stage2, "reduce"),
            Mistake(_Stage2OnlyRank0Reduces, _SOME, _NOT_ALL),
        ], {**_STEP, "full gradients that are still there after backward": _KEPT}),
    "6.1": Exercise(
        "a class like small.Sharded, with own, gather and free", _observe_sharded, small.Sharded, [
            Mistake(_ShardIsAView, "The shard is a view of the flat buffer, so emptying the buffer "
                    "empties the shard, which nobody else has. Clone it."),
            Mistake(_CloneIsNotStored, "The optimizer has memory of its own, but unit.shard is "
                    "still a view of the flat buffer, and empty when that is.",
                    by=("bytes of the shard after free",
                        "the optimizer's parameter is the shard's memory")),
            Mistake(_ShardAndCopy, "The optimizer updates other memory than unit.shard, and it is "
                    "unit.shard that is gathered.",
                    by=("bytes of the shard after free",
                        "the optimizer's parameter is the shard's memory")),
            Mistake(_FlatPointsElsewhere, _ELSEWHERE,
                    by=("bytes of the flat buffer after free",
                        "bytes of the layer's weight after free")),
            Mistake(_FlatIsNone, _ELSEWHERE, "'NoneType' object has no attribute"),
            Mistake(_DeletesTheName, _DELETED,
                    by=("left in the flat buffer after free",
                        "bytes of the layer's weight after free")),
            Mistake(_DeletesTheAttribute, _DELETED, "has no attribute '(flat|params|shard)'"),
            Mistake(_ShapeOfTheTensor, _SHAPE, by=("left in the flat buffer after free",)),
            Mistake(_BroadcastsTheUnit, "A broadcast sends what rank 0 has. Of this unit it has a "
                    "shard, as everyone does: the other slices are memory that nobody has filled.",
                    by=("collectives",)),
            Mistake(_ShardedGathersIntoTheShard, _SWAPPED, _SIZES),
            Mistake(_PointsElsewhere, "You point the parameters elsewhere, but the flat buffer is "
                    "still there, and so is what autograd has saved of it. Empty its storage."),
            Mistake(_FreesNothing, "Zeros take as much memory as other numbers. The storage has to "
                    "become empty."),
            Mistake(_NoMemory, "The storage is empty when the gather writes into it: first give it "
                    "its memory back.", r"storage of size 0\b"),
            Mistake(_TooLittleMemory, "resize_ counts bytes, not elements: an element of fp32 has "
                    "4.", "out of bounds for storage"),
            Mistake(_NothingSent, "The memory is there, but nothing was sent."),
        ],
        {**WAIT_HINTS, "the flat buffer after gather": "All slices, each from its owner's shard.",
         "bytes of the flat buffer after free": "The storage of the flat buffer has to become "
         "empty; the buffer itself stays."}),
    "6.2": Exercise(
        "a class like small.Stage3, with its four hooks", _observe_hooks, small.Stage3, [
            Mistake(_KeptAfterForward, "The units stay gathered from forward to backward, so all "
                    "of them are held in full at the end of forward. Free each after its forward, "
                    "and gather it again before its backward."),
            Mistake(_NoReshardAfterForward, "The units stay gathered from forward to backward, so "
                    "all of them are held in full at the end of forward. Free each after its "
                    "forward, and gather it again before its backward."),
            Mistake(_KeptAfterBackward, "Backward leaves its units behind in full. Free each when "
                    "its gradients have been reduced."),
            Mistake(_GathersAfterTheStep, "After the step there is nothing to send: every unit is "
                    "gathered in the next forward anyway."),
            Mistake(_NotGatheredForBackward, "Something uses a unit's parameters while they "
                    "are freed. Forward needs them, and backward needs them again, on every rank; "
                    "and stage 1's phase after the step would need them, too.",
                    "out of bounds for storage|SIGSEGV|SIGBUS"),
            Mistake(_HookIsCalled, "A hook is called later, with the gradient. This one was called "
                    "at once, and what it returned was registered: None.",
                    "'NoneType' object is not callable"),
            Mistake(_HookWithoutArgument, "A hook is called with the gradient. This one takes no "
                    "argument.", r"takes 0 positional arguments but 1 was given"),
            Mistake(_HookWithoutGradient, "A forward without gradients has no backward: its output "
                    "takes no hook.", "hook on a tensor that doesn't require"),
        ],
        {**_STEP,
         "bytes of optimizer states": "The optimizer gets no gradient, or a wrong one: `reduce` "
         "also has to do what it does at stage 2.",
         "most full units at one time": "Without prefetching one unit is enough: the one that "
         "computes."}),
}
