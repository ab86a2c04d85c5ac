"""Exercises on the broken stages of hunt.py: each is to be mended, and judged as a stage is."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .. import comm
from . import hunt, small
from .exercise import Exercise, Mistake, Observed
from .on_stages import WAIT_HINTS, what_was_sent


def _observe(name: str, answer: type) -> Observed:
    bug, seen = hunt.BUGS[name], {}
    if gone := _gone(bug.broken, answer):
        raise TypeError(f"the method {gone[0]} is gone; keep it, and mend the line that is wrong")
    hunt.run(name, answer, bug.optimizer, seen)
    training = [event for event in seen["events"]
                if event.phase in ("forward", "backward", "step")]  # not of clipping, say
    found = {f"bytes of {what}": seen["held"][key] for what, key in (
        ("optimizer states", "optimizer"), ("gradients", "gradients"),
        ("parameters", "parameters"))} | what_was_sent(training)
    if bug.stage == 1:  # who holds less of the gradients is ahead of its time, and not wrong
        found["bytes of gradients"] = max(found["bytes of gradients"], found["bytes of parameters"])
    if bug.stage >= 2:
        found["most bytes of gradients at one time"] = seen["most"]["gradients"]
    if bug.stage == 3:
        found["most bytes of parameters at one time"] = seen["most"]["parameters"]
    if "norms" in seen:  # of a sum in whatever order
        return found | {what: [round(norm, 4) for norm in seen[key]] for what, key in (
            ("the norms that were returned", "norms"),
            ("the norms of this rank's slices after clipping", "clipped"))}
    if "saved" in seen:
        found |= {"full units after saving": seen["full after saving"],
                  "what this rank has saved": seen["saved"]}
    if "skipped" in seen:
        found |= {"steps that were left out": seen["skipped"], "losses": seen["losses"]}
    return found | {"weights": seen["weights"]}


def _gone(broken: type, answer: type) -> list[str]:
    """The methods of the broken class that neither the answer defines nor a class of the learner's
    above it. What is deleted is inherited from a stage that is right, and no line is mended.
    (`__init__` may go, since every module has one: who mends 11.6 needs no bucket.)"""
    own = [answer, *(cls for cls in answer.__mro__ if cls.__module__ != small.__name__)]
    return [name for name, value in vars(broken).items()
            if inspect.isfunction(value) and not any(name in vars(cls) for cls in own)]


# ---- wrong repairs -------------------------------------------------------------------------------


class _ReducesBoth(small.Stage0):
    def reduce(self, unit, grad):
        comm.all_reduce(unit.flat, self.group, unit=unit.name, phase="backward",
                        divide_by=self.world_size).wait()
        super().reduce(unit, grad)


class _AveragesAfterTheStep(small.Stage0):
    def reduce(self, unit, grad):
        unit.owned.grad = grad

    def after_step(self, unit):
        comm.all_reduce(unit.flat, self.group, unit=unit.name, phase="step",
                        divide_by=self.world_size).wait()


class _DoesNotDivide(small.Stage0):
    def reduce(self, unit, grad):
        comm.all_reduce(grad, self.group, unit=unit.name, phase="backward").wait()
        unit.owned.grad = grad


class _ReducesWhatIsNotThere(small.Stage0):
    def reduce(self, unit, grad):
        comm.all_reduce(unit.owned.grad, self.group, unit=unit.name, phase="backward",
                        divide_by=self.world_size).wait()


class _DividesByFour(small.Stage1):
    def reduce(self, unit, grad):
        mine = grad.chunk(self.world_size)[self.rank]
        comm.reduce_scatter(mine, grad, self.group, unit=unit.name, phase="backward",
                            divide_by=4).wait()
        unit.owned.grad = mine


class _DividesBefore(small.Stage1):
    def reduce(self, unit, grad):
        grad /= self.world_size
        mine = grad.chunk(self.world_size)[self.rank]
        comm.reduce_scatter(mine, grad, self.group, unit=unit.name, phase="backward").wait()
        unit.owned.grad = mine


class _DividesTwice(small.Stage1):
    def reduce(self, unit, grad):
        super().reduce(unit, grad)
        unit.owned.grad /= self.world_size


class _EveryoneSaves(small.Stage3):
    def save(self, file):
        torch.save(self.state_dict(), file)


class _SavesItsShards(small.Stage3):
    def save(self, file):
        if self.rank == 0:
            torch.save({unit.name: unit.shard for unit in self.units}, file)


class _LeavesAllGathered(small.Stage3):
    def save(self, file):
        for unit in self.units:
            self.gather(unit, "state_dict")
        if self.rank == 0:
            torch.save(self.module.state_dict(), file)


class _LastTakesTheRest(hunt.DropsTheRemainder):
    def own(self, unit):
        shard, unit.used = super().own(unit), unit.flat
        if self.rank == self.world_size - 1:
            unit.shard = unit.flat[self.rank * shard.numel():]
        return unit.shard


class _CutsElsewhere(hunt.DropsTheRemainder):
    def own(self, unit):
        begin = self.rank * (sum(p.numel() for p in unit.params) // self.world_size)
        unit.used = unit.flat
        unit.shard = unit.flat[begin : begin + unit.flat.numel() // self.world_size]
        return unit.shard


class _GradientStaysShort(hunt.CutsTheWholeBuffer):
    def reduce(self, unit, grad):
        size = sum(p.numel() for p in unit.params) // self.world_size
        super().reduce(unit, grad[: size * self.world_size])


class _Clips(small.Stage2):
    """By the norm that `norm(squares)` makes of the sum of this rank's squares."""

    def clip_grad_norm_(self, max_norm):
        grads = [p.grad for p in self.parameters()]
        norm = self.norm(sum(grad.square().sum() for grad in grads))
        for grad in grads:
            grad.mul_((max_norm / norm).clamp(max=1.0))
        return norm


class _SumOfNorms(_Clips):
    def norm(self, squares):
        norm = squares.sqrt()
        dist.all_reduce(norm, group=self.group)
        return norm


class _MeanOfSquares(_Clips):
    def norm(self, squares):
        dist.all_reduce(squares, group=self.group)
        return (squares / self.world_size).sqrt()


class _LargestNorm(_Clips):
    def norm(self, squares):
        dist.all_reduce(squares, dist.ReduceOp.MAX, group=self.group)
        return squares.sqrt()


class _ScalesAlways(small.Stage2):
    def clip_grad_norm_(self, max_norm):
        grads = [p.grad for p in self.parameters()]
        squares = sum(grad.square().sum() for grad in grads)
        dist.all_reduce(squares, group=self.group)
        norm = squares.sqrt()
        for grad in grads:
            grad.mul_(max_norm / norm)
        return norm


class _ReducesInHalves(hunt.ReducesAtTheEnd):
    def reduce(self, unit, grad):
        self.bucket.append((unit, grad))
        if 2 * len(self.bucket) == len(self.units):
            for unit, grad in self.bucket:
                small.Stage2.reduce(self, unit, grad)
            self.bucket.clear()


class _StillInTheBucket(hunt.ReducesAtTheEnd):
    def reduce(self, unit, grad):
        self.bucket.append((unit, grad))
        small.Stage2.reduce(self, unit, grad)


class _SliceIsAView(small.Stage2):
    def reduce(self, unit, grad):
        small.Stage1.reduce(self, unit, grad)


class _OneAhead(small.Stage3):
    def before_forward(self, unit):
        index = self.units.index(unit)
        for each in self.units[index + (index > 0) : index + 2]:
            self.gather(each, "forward")


class _EverythingForEach(small.Stage3):
    def before_forward(self, unit):
        for each in self.units:
            self.gather(each, "forward")
            if each is not unit:
                self.free(each)


class _KeptUntilBackward(small.Stage3):
    def before_forward(self, unit):
        self.gather(unit, "forward")

    def after_forward(self, unit, output):
        pass


class _OnceByShape(small.Stage1):
    def start(self, unit):
        unit.params = list({p.shape: p for p in unit.layer.parameters()}.values())
        unit.flat = small.flatten(unit.params, self.world_size)
        begin, end = small.shard_bounds(unit.flat.numel(), self.world_size, self.rank)
        unit.shard = unit.flat[begin:end]
        super().start(unit)


class _WithoutTheTied(small.Stage1):
    def start(self, unit):
        every = [p for module in unit.layer.modules() for p in module.parameters(recurse=False)]
        unit.params = [p for p in every if sum(p is other for other in every) == 1]
        unit.flat = small.flatten(unit.params, self.world_size)
        begin, end = small.shard_bounds(unit.flat.numel(), self.world_size, self.rank)
        unit.shard = unit.flat[begin:end]
        super().start(unit)


class _OldShard(small.Stage1):
    def start(self, unit):
        unit.params = list(unit.layer.parameters())
        unit.flat = small.flatten(unit.params, self.world_size)
        super().start(unit)


class _AlwaysInNoSync(hunt.Accumulates):
    def accumulate(self, batches):
        for images, labels in batches:
            with self.no_sync():
                (F.cross_entropy(self(images), labels) / len(batches)).backward()


class _FirstReduces(hunt.Accumulates):
    def accumulate(self, batches):
        for i, (images, labels) in enumerate(batches):
            self.sync = i == 0
            (F.cross_entropy(self(images), labels) / len(batches)).backward()


class _NotDivided(hunt.EntersNoSyncInTime):
    def accumulate(self, batches):
        for i, (images, labels) in enumerate(batches):
            self.sync = i == len(batches) - 1
            F.cross_entropy(self(images), labels).backward()


class _MeanDecides(small.Stage1):
    def skips(self, loss):
        total = loss.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total.item() / self.world_size > 10


class _AllHaveToAgree(small.Stage1):
    def skips(self, loss):
        smallest = loss.detach().clone()
        dist.all_reduce(smallest, dist.ReduceOp.MIN, group=self.group)
        return smallest.item() > 10


class _SumDecides(small.Stage1):
    def skips(self, loss):
        dist.all_reduce(loss, group=self.group)
        return loss.item() > 10


class _Rank0Decides(small.Stage1):
    def skips(self, loss):
        of_rank_0 = loss.detach().clone()
        dist.broadcast(of_rank_0, 0, group=self.group)
        return of_rank_0.item() > 10


class _NeverSkips(small.Stage1):
    def skips(self, loss):
        return False


# ---- hints ---------------------------------------------------------------------------------------

_HINTS = {
    **WAIT_HINTS,
    "bytes of optimizer states": "The optimizer keeps states for what `own` returns. How much of a "
    "unit should that be at this stage?",
    "bytes sent": "Compare your list of collectives with that of the stage as it should be.",
    "weights": "Bytes and collectives are right, but the weights are not."}


def _exercise(name: str, takes: str, *repairs: Mistake, broken: Mapping[str, Any],
              **hints: str) -> Exercise:
    bug = hunt.BUGS[name]
    return Exercise(takes, partial(_observe, name), bug.mended,
                    [Mistake(bug.broken, **broken), *repairs], _HINTS | hints,
                    (bug.world_size, 7 - bug.world_size))


_DIVERGE, _ASSIGNS = "diverge", "assign a gradient of size"
_UNEVEN = ("The slices of the parameters and those of the gradient have different sizes. Both have "
           "to be cut alike, into slices of one size.")
_OUTVOTED = ("All ranks decide alike, but where one rank's loss is large and the others' are not, "
             "the step is not left out.")
_LEFT_OUT = ["steps that were left out"]  # whether the losses were exchanged in place or as a copy

ON_HUNT = {
    "11.1": _exercise(
        "11.1", "a class like small.Stage0, with a method reduce",
        Mistake(_ReducesBoth, "The gradients are right now, but the parameters still travel with "
                "them, although all ranks have the same."),
        Mistake(_AveragesAfterTheStep, "The ranks end with the same weights, but each has let its "
                "optimizer see its own gradient. A mean of updates is not the update that belongs "
                "to the mean."),
        Mistake(_DoesNotDivide, "The right tensor is reduced now, but the optimizer gets the sum "
                "over the ranks, and not their mean."),
        Mistake(_ReducesWhatIsNotThere, "unit.owned.grad is None until somebody assigns it.",
                "'NoneType' object"),
        broken=dict(hint="Each rank follows its own gradient, and the ranks drift apart. Look at "
                    "what the collective changes, and at what the optimizer gets.")),
    "11.2": _exercise(
        "11.2", "a class like small.Stage1, with a method reduce",
        Mistake(_DividesByFour, "On four ranks that is right."),
        Mistake(_DividesBefore, "That is right except for rounding: each part is rounded before "
                "the sum, and not the sum once."),
        Mistake(_DividesTwice, "Now it is divided twice by the number of ranks."),
        broken=dict(hint="The gradient points the right way, but it is too long, and the longer "
                    "the more ranks there are.")),
    "11.3": _exercise(
        "11.3", "a class like small.Stage3, with a method save(self, file)",
        Mistake(_EveryoneSaves, "All ranks take part, but they all write the file as well, over "
                "one another."),
        Mistake(_SavesItsShards, "The file holds only what rank 0 owns. The rest of the model is "
                "on the other ranks."),
        Mistake(_LeavesAllGathered, "The file is right, but afterwards the whole model stays in "
                "the memory of each rank."),
        broken=dict(hint="One rank is in a collective that the others do not come to. Which call "
                    "of this method is one that all ranks have to make?", raises=_DIVERGE)),
    "11.4": _exercise(
        "11.4", "a class like small.Stage1, with own, reduce and after_step",
        Mistake(_LastTakesTheRest, _UNEVEN, _ASSIGNS),
        Mistake(_CutsElsewhere, "The slices have the right size but begin in the wrong places: "
                "some elements are in two of them.", "single memory location"),
        Mistake(_GradientStaysShort, _UNEVEN, _ASSIGNS),
        Mistake(small.Stage0, "Every rank updates everything now: this is stage 0."),
        broken=dict(hint="Some elements at the end of each unit never change. How many elements "
                    "have the slices of all ranks together?")),
    "11.5": _exercise(
        "11.5", "a class like small.Stage2, with a method clip_grad_norm_(self, max_norm)",
        Mistake(_SumOfNorms, "You add up the norms of the ranks. Norms do not add up."),
        Mistake(_MeanOfSquares, "Every element of the gradient is on exactly one rank, so there is "
                "nothing to take a mean of."),
        Mistake(_ScalesAlways, "A norm that is smaller than `max_norm` stays as it is, so the "
                "factor is at most 1."),
        Mistake(_LargestNorm, "All ranks agree on a norm now, but it is that of one rank's "
                "slices."),
        broken=dict(hint="Each rank has a norm of its own, and scales its slices by its own "
                    "factor. What is the norm of the whole gradient?")),
    "11.6": _exercise(
        "11.6", "a class like small.Stage2, with a method reduce",
        Mistake(_ReducesInHalves, "The peak is lower, but full gradients still wait for those of "
                "other units."),
        Mistake(_StillInTheBucket, "Each unit is reduced at once, but its full gradient is still "
                "kept."),
        Mistake(_SliceIsAView, "The slice is a view of the full gradient, whose memory stays for "
                "as long as the slice does."),
        broken=dict(hint="At one moment of backward the full gradients of all units are there. "
                    "What is the first of them waiting for?")),
    "11.7": _exercise(
        "11.7", "a class like small.Stage3, with a method before_forward",
        Mistake(_OneAhead, "Two units are held in full at a time. That would be prefetching, "
                "which pays only if the gather is not waited for."),
        Mistake(_EverythingForEach, "One unit is held at a time, but for each of them the whole "
                "model is sent."),
        Mistake(_KeptUntilBackward, "The units come one by one, but they stay: at the end of "
                "forward all of them are held in full."),
        broken=dict(hint="When the first unit computes, all units are held in full. Which of them "
                    "does it need?")),
    "11.8": _exercise(
        "11.8", "a class like small.Stage1, with a method start",
        Mistake(_OnceByShape, "Two parameters of one shape are not the same parameter: a bias is "
                "missing now."),
        Mistake(_WithoutTheTied, "The shared weight is in no buffer at all now, and is never "
                "updated."),
        Mistake(_OldShard, "unit.shard is still a slice of the old buffer, which nobody computes "
                "with any more."),
        broken=dict(hint="The flat buffer is longer than the unit has parameters. Which of them "
                    "has two places in it?")),
    "11.9": _exercise(
        "11.9", "a class like hunt.Accumulates, with a method accumulate(self, batches)",
        Mistake(_AlwaysInNoSync, "The last micro-batch is not reduced either, so the optimizer "
                "gets nothing."),
        Mistake(_FirstReduces, "The first micro-batch is reduced, and what comes after it is left "
                "for the next step."),
        Mistake(_NotDivided, "That is the sum over the micro-batches, and not their mean."),
        broken=dict(hint="Every micro-batch is reduced. When does this model decide whether a "
                    "backward reduces, and what does it know by then?")),
    "11.10": _exercise(
        "11.10", "a class like small.Stage1, with a method skips(self, loss)",
        Mistake(_MeanDecides, _OUTVOTED, by=_LEFT_OUT),
        Mistake(_AllHaveToAgree, _OUTVOTED, by=_LEFT_OUT),
        Mistake(_SumDecides, "All ranks decide alike, but steps are left out in which no rank's "
                "loss is large. Do you add the losses up?", by=_LEFT_OUT),
        Mistake(_Rank0Decides, "All ranks decide alike, but by rank 0's loss. A loss that is large "
                "elsewhere goes unnoticed.", by=_LEFT_OUT),
        Mistake(_NeverSkips, "All ranks decide alike, because no step is ever left out."),
        broken=dict(hint="A rank leaves a step out, and the others do not know of it.",
                    raises=_DIVERGE),
        losses="The right steps are left out, but the loss is not what it was: it was exchanged "
        "in place. Give the ranks a copy of it."),
}
