"""Broken stages, to be hunted: `symptoms("11.4")` shows what a user would see of one.

Each class breaks one stage of small.py in one place, as public code has been seen to. BUGS says
what each is run on, and what it is when it is mended. The names and docstrings here tell what is
wrong; learners get the code without them.
"""

import io
import re
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from .. import comm, course
from ..engine import check as checking
from ..observe import memory
from ..observe.recorder import Frame, Recording, Span
from ..observe.trace import Event, Trace, recording_into
from ..ranks.launch import launch
from . import small
from .on_stages import weights_of

if TYPE_CHECKING:
    from ..viz import Picture

STEPS = 5

# ---- the bugs ------------------------------------------------------------------------------------


class AveragesUpdated(small.Stage1):
    """Each rank has updated its shard; the mean with those who have not is a small part of it."""

    def after_step(self, unit):
        comm.all_reduce(unit.flat, self.group, unit=unit.name, phase="step",
                        divide_by=self.world_size).wait()


class ReducesTheParameter(small.Stage0):
    """The mean is taken of the parameters, and every rank follows its own gradient."""

    def reduce(self, unit, grad):
        comm.all_reduce(unit.flat, self.group, unit=unit.name, phase="backward",
                        divide_by=self.world_size).wait()
        unit.owned.grad = grad


class Sums(small.Stage1):
    """The sum in place of the mean. Adam divides by the gradient's size, and hides it."""

    def reduce(self, unit, grad):
        mine = grad.chunk(self.world_size)[self.rank]
        comm.reduce_scatter(mine, grad, self.group, unit=unit.name, phase="backward").wait()
        unit.owned.grad = mine


class SavesAlone(small.Stage3):
    """At stage 3 state_dict() gathers, so that all ranks have to call it."""

    def save(self, file):
        if self.rank == 0:
            torch.save(self.state_dict(), file)


class SavesTogether(small.Stage3):
    def save(self, file):
        state = self.state_dict()
        if self.rank == 0:
            torch.save(state, file)


class DropsTheRemainder(small.Stage1):
    """Where a unit does not divide evenly, its last elements belong to nobody."""

    def own(self, unit):
        size = sum(p.numel() for p in unit.params) // self.world_size
        unit.used = unit.flat[: size * self.world_size]
        unit.shard = unit.used.chunk(self.world_size)[self.rank]
        return unit.shard

    def reduce(self, unit, grad):
        super().reduce(unit, grad[: unit.used.numel()])

    def after_step(self, unit):
        comm.all_gather(unit.used, unit.shard, self.group, unit=unit.name, phase="step").wait()


class CutsTheWholeBuffer(DropsTheRemainder):
    def own(self, unit):
        unit.used = unit.flat  # which is padded
        return unit.shard


class ClipsByTheLocalNorm(small.Stage2):
    """Each rank has a slice of the gradients, and scales it by the norm of that slice."""

    def clip_grad_norm_(self, max_norm):
        grads = [p.grad for p in self.parameters()]
        norm = sum(grad.square().sum() for grad in grads).sqrt()
        for grad in grads:
            grad.mul_((max_norm / norm).clamp(max=1.0))
        return norm


class ClipsByTheGlobalNorm(small.Stage2):
    def clip_grad_norm_(self, max_norm):
        grads = [p.grad for p in self.parameters()]
        squares = sum(grad.square().sum() for grad in grads)
        dist.all_reduce(squares, group=self.group)
        norm = squares.sqrt()
        for grad in grads:
            grad.mul_((max_norm / norm).clamp(max=1.0))
        return norm


class ReducesAtTheEnd(small.Stage2):
    """The full gradients of all units exist at once, before the first of them is reduced."""

    def __init__(self, module):
        super().__init__(module)
        self.bucket = []

    def reduce(self, unit, grad):
        self.bucket.append((unit, grad))
        if len(self.bucket) == len(self.units):
            for unit, grad in self.bucket:
                super().reduce(unit, grad)
            self.bucket.clear()


class GathersTheWholeModel(small.Stage3):
    """The full parameters of all units exist at once, before the first of them computes."""

    def before_forward(self, unit):
        if unit is self.units[0]:
            for each in self.units:
                self.gather(each, "forward")


class CountsTiedTwice(small.Stage1):
    """A weight that two modules of a unit share gets two places in the flat buffer."""

    def start(self, unit):
        unit.params = [p for module in unit.layer.modules()
                       for p in module.parameters(recurse=False)]
        unit.flat = small.flatten(unit.params, self.world_size)
        begin, end = small.shard_bounds(unit.flat.numel(), self.world_size, self.rank)
        unit.shard = unit.flat[begin:end]
        super().start(unit)


class CountsTiedOnce(small.Stage1):
    def start(self, unit):
        unit.params = list(unit.layer.parameters())
        unit.flat = small.flatten(unit.params, self.world_size)
        begin, end = small.shard_bounds(unit.flat.numel(), self.world_size, self.rank)
        unit.shard = unit.flat[begin:end]
        super().start(unit)


class Accumulates(small.Stage1):
    """Stage 1 with no_sync(). As in DDP, forward decides whether its backward will reduce."""

    sync = True

    @contextmanager
    def no_sync(self):
        self.sync = False
        yield
        self.sync = True

    def forward(self, *args):
        self.reduces = self.sync
        return super().forward(*args)

    def reduce(self, unit, grad):
        unit.kept = getattr(unit, "kept", 0) + grad
        if self.reduces:
            earlier = unit.owned.grad
            super().reduce(unit, unit.kept)
            unit.owned.grad += 0 if earlier is None else earlier
            unit.kept = 0


class EntersNoSyncTooLate(Accumulates):
    """When no_sync() is entered, forward has decided already: every micro-batch is reduced."""

    def accumulate(self, batches):
        for i, (images, labels) in enumerate(batches):
            loss = F.cross_entropy(self(images), labels) / len(batches)
            with self.no_sync() if i < len(batches) - 1 else nullcontext():
                loss.backward()


class EntersNoSyncInTime(Accumulates):
    def accumulate(self, batches):
        for i, (images, labels) in enumerate(batches):
            with self.no_sync() if i < len(batches) - 1 else nullcontext():
                loss = F.cross_entropy(self(images), labels) / len(batches)
                loss.backward()


class SkipsAlone(small.Stage1):
    """A rank whose loss is large leaves the step out, and the others wait for it."""

    def skips(self, loss):
        return loss.item() > 10


class SkipsTogether(small.Stage1):
    def skips(self, loss):
        largest = loss.detach().clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest.item() > 10


# ---- what they are run on ------------------------------------------------------------------------


def tied(seed: int = 0) -> nn.Sequential:
    """The course's net with its layers in pairs: three units, in each of which two layers share a
    weight."""
    image, *layers = course.build(seed)
    for first, second in zip(layers[::2], layers[1::2]):
        second[1].weight = first[1].weight
    return nn.Sequential(image, *map(nn.Sequential, layers[::2], layers[1::2]))


def _loss(model, step):
    images, labels = course.batch(step, dist.get_rank())
    return F.cross_entropy(model(images), labels)


def _plain(model, step, seen):
    loss = _loss(model, step)
    loss.backward()
    return loss


def _saved(model, step, seen):
    loss = _plain(model, step, seen)
    if step == 1:
        seen["phases"].append(("", time.monotonic()))  # backward is over, and this is none
        file = io.BytesIO()
        model.save(file)
        file.seek(0)
        state = torch.load(file) if file.getbuffer().nbytes else {}
        seen["saved"] = {name.removeprefix("module."): value for name, value in state.items()}
        seen["full after saving"] = sum(unit.flat.untyped_storage().nbytes() > 0
                                        for unit in model.units)
    return loss


def _clipped(model, step, seen):
    loss = _plain(model, step, seen)
    max_norm = 0.2 if step < STEPS - 1 else 1.0  # the last one is smaller, and stays as it is
    seen.setdefault("norms", []).append(float(model.clip_grad_norm_(max_norm)))
    grads = [p.grad for p in model.parameters()]
    seen.setdefault("clipped", []).append(torch.cat(grads).norm().item())
    return loss


def _accumulated(model, step, seen):
    with torch.no_grad():
        before = _loss(model, 4 * step)
    model.accumulate([course.batch(4 * step + i, dist.get_rank()) for i in range(4)])
    return before


def _with_spikes(model, step, seen):
    """In some steps some ranks have a batch whose loss is 10.5."""
    ranks = {1: [1], 2: [0], 3: range(model.world_size)}.get(step, [])
    loss = _loss(model, step)
    if model.rank in ranks:
        loss = loss * (10.5 / loss.item())
    skipped = bool(model.skips(loss))
    seen.setdefault("skipped", []).append(skipped)
    if not skipped:
        loss.backward()
    return loss


def _adam(params):
    return torch.optim.Adam(params, lr=0.01)


def _sgd(params):
    return torch.optim.SGD(params, lr=2.0)


@dataclass(frozen=True)
class Bug:
    """stage: what it says it is. step: a step of training up to the optimizer's, which returns the
    loss. hangs: the step in which ranks begin to wait for each other for ever."""

    broken: type
    mended: type
    stage: int
    step: Callable[[Any, int, dict], torch.Tensor] = _plain
    build: Callable[[int], nn.Module] = course.build
    optimizer: str = "Adam"
    world_size: int = 4
    hangs: int | None = None


BUGS = {
    "11.0": Bug(AveragesUpdated, small.Stage1, stage=1),
    "11.1": Bug(ReducesTheParameter, small.Stage0, stage=0),
    "11.2": Bug(Sums, small.Stage1, stage=1, optimizer="SGD"),
    "11.3": Bug(SavesAlone, SavesTogether, stage=3, step=_saved, hangs=1),
    "11.4": Bug(DropsTheRemainder, CutsTheWholeBuffer, stage=1, world_size=3),
    "11.5": Bug(ClipsByTheLocalNorm, ClipsByTheGlobalNorm, stage=2, step=_clipped,
                optimizer="SGD"),
    "11.6": Bug(ReducesAtTheEnd, small.Stage2, stage=2),
    "11.7": Bug(GathersTheWholeModel, small.Stage3, stage=3),
    "11.8": Bug(CountsTiedTwice, CountsTiedOnce, stage=1, build=tied),
    "11.9": Bug(EntersNoSyncTooLate, EntersNoSyncInTime, stage=1, step=_accumulated),
    "11.10": Bug(SkipsAlone, SkipsTogether, stage=1, step=_with_spikes, hangs=1),
}
_OPTIMIZERS = {"Adam": _adam, "SGD": _sgd}


# ---- on a rank -----------------------------------------------------------------------------------


class _Ledger(Trace):
    """The most bytes of parameters and of gradients that were there when something was sent, or a
    unit had been reduced."""

    def __init__(self, model, grads):
        super().__init__()
        self.model, self.grads = model, grads
        self.most = {"parameters": 0, "gradients": 0}

    def add(self, event: Event) -> None:
        super().add(event)
        if event.phase != "state_dict":  # which needs all of the model
            self.look()

    def look(self) -> None:
        units = self.model.units
        now = {"parameters": _bytes([t for unit in units for t in (unit.flat, unit.shard)]),
               "gradients": _bytes([unit.owned.grad for unit in units]
                                   + [grad() for grad in self.grads])}
        self.most = {what: max(now[what], most) for what, most in self.most.items()}


def run(name: str, answer: Any, optimizer: str, seen: dict[str, Any],
        since: int = STEPS - 1) -> None:
    """Train for some steps. seen: takes what there is to be seen of it; of a step, of the last that
    has ended. Its "phases", each with its beginning, and what was "issued" are those from step
    `since` on."""
    bug, full = BUGS[name], []

    def reduce(self, unit, grad):
        full.append(weakref.ref(grad))
        answer.reduce(self, unit, grad)
        ledger.look()

    def noted(phase):
        def note(*_):
            if torch.is_grad_enabled():  # not a forward that backward does not follow
                seen["phases"].append((phase, time.monotonic()))
        return note

    model = type(answer.__name__, (answer,), {"reduce": reduce})(bug.build(dist.get_rank()))
    model.register_forward_pre_hook(noted("forward"))
    model.register_forward_hook(noted("backward"))  # a micro-batch's, up to the next forward
    opt = _OPTIMIZERS[optimizer](model.parameters())
    ledger, seen["losses"] = _Ledger(model, full), []
    with recording_into(ledger):
        for step in range(STEPS):
            if step <= since:
                seen["phases"], seen["issued"] = [], []
                ledger.events = seen["issued"]
            loss = bug.step(model, step, seen)
            seen["losses"].append(loss.item())
            seen["phases"].append(("step", time.monotonic()))
            opt.step()
            seen["held"] = memory.resident(model, opt)  # Adam, too, has states by now
            opt.zero_grad()
            seen["events"], seen["most"] = ledger.events, ledger.most
    seen["weights"] = weights_of(model)


def _bytes(tensors):
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def watched(name, answer, optimizer, since=STEPS - 1):
    """Like `run`, but ranks that diverge say where they are, in place of waiting for ever."""
    seen: dict[str, Any] = {}
    with checking.comparing(dist.group.WORLD, checking.Checker(dist.group.WORLD)):
        try:
            run(name, answer, optimizer, seen, since)
        except RuntimeError as error:
            seen["diverged"] = str(error)
    return seen


def _recorded(name, answer, optimizer):
    bug, seen = BUGS[name], {}
    if bug.hangs is None:
        run(name, answer, optimizer, seen)
    else:
        seen = watched(name, answer, optimizer, bug.hangs)
        time.sleep(0.01)  # as they would for ever
    phases = [*seen["phases"], ("", time.monotonic())]
    spans = [Span(phase, "", start, end)
             for (phase, start), (_, end) in pairwise(phases) if phase]
    begin = Frame("start", "", "", spans[0].start, {}, {}, 0)
    return Recording(dist.get_rank(), bug.world_size, bug.stage, False, [], [begin],
                     seen["issued"], spans)


# ---- what is shown of it -------------------------------------------------------------------------


def symptoms(name: str, optimizer: str | None = None) -> "Picture":
    """Train with the broken stage on real ranks, and print what there is to be seen: whether it
    ends, the loss beside that of the right stage, bytes beside the formula, and collectives.
    Returns the timeline of a step. If that does not end, bytes and collectives are of the step
    before.

    optimizer: "Adam" or "SGD", by default the one with which the bug shows."""
    bug, optimizer = _known(name, optimizer)
    seen, right = (launch(watched, bug.world_size, name, answer, optimizer, backend="cpu:gloo")
                   for answer in (bug.broken, bug.mended))
    print(f"{name}: stage {bug.stage} with {optimizer} on {bug.world_size} ranks\n")
    print("\n\n".join("\n".join(part) for part in _parts(bug, optimizer, seen, right)))
    return timeline(name, optimizer)


def _parts(bug, optimizer, seen, right):
    diverged = next((rank["diverged"] for rank in seen if "diverged" in rank), None)
    yield _losses(seen, right)
    if "norms" in seen[0]:
        yield _norms(seen)
    if diverged is None:
        yield ["It ends.", *_weights(seen, right)]
    else:
        yield ["It does not end. Ranks wait for each other:", *_where(diverged)]
    yield _held(bug, optimizer, seen[0])
    of = "a step" if diverged is None else "the step before"
    yield [f"Collectives of {of}:", *_collectives(seen[0]["events"])]


def _losses(seen, right):
    def mean(ranks):
        return [sum(losses) / len(ranks) for losses in zip(*(rank["losses"] for rank in ranks))]

    return [f"{'Loss':22}" + "".join(f"   step {step + 1}" for step in range(STEPS)),
            *(f"{label:22}" + "".join(f"{loss:#9.4g}" for loss in mean(ranks))
              for label, ranks in (("  here", seen), ("  right", right)))]


def _norms(seen):
    return [f"{'Norm, as clipping says':22}" + "".join(f"   step {s + 1}" for s in range(STEPS)),
            *(f"  {f'rank {rank}':20}" + "".join(f"{norm:9.4f}" for norm in ranks["norms"])
              for rank, ranks in enumerate(seen))]


def _where(diverged):
    places: dict[str, list[str]] = {}
    for rank, place in re.findall(r"rank (\d+) to (\w+ '\w+' in phase '\w+')", diverged):
        places.setdefault(place, []).append(rank)
    return [f"  {'ranks' if len(ranks) > 1 else 'rank'} {', '.join(ranks)}: {place}"
            for place, ranks in places.items()]


def _weights(seen, right):
    alike = all(course.same_bits(seen[0]["weights"], rank["weights"]) for rank in seen)
    wanted, got = right[0]["weights"], seen[0]["weights"]
    near = all(torch.allclose(got[name], wanted[name], rtol=0, atol=1e-5) for name in wanted)
    bits = "yes" if course.same_bits(wanted, got) else "NO, but nearly" if near else "NO"
    return [f"All ranks have the same weights: {'yes' if alike else 'NO'}",
            f"Rank 0 has the right bits: {bits}"]


def _held(bug, optimizer, seen):
    here, wanted = bytes_seen(seen), formula(bug, optimizer)
    return [f"{'Bytes on rank 0':32}{'here':>9}{'formula':>10}",
            *(f"  {label:30}{here[what]:9,}{wanted[what]:10,}" for what, label in _LABELS.items()
              if what in wanted)]


def _collectives(events: Sequence[Event]):
    return [f"  {count} {op} in {phase}" for (op, phase), count in
            Counter((event.op, event.phase) for event in events).items()]


_LABELS = {"parameters": "parameters", "gradients": "gradients", "optimizer": "optimizer states",
           "sent": "sent in a step", "most parameters": "parameters, at most",
           "most gradients": "gradients, at most"}


def bytes_seen(seen: dict[str, Any]) -> dict[str, int]:
    """What a rank has held and sent, under the names of `formula`."""
    return {**seen["held"], "sent": sum(event.wire_bytes for event in seen["events"]),
            **{f"most {what}": most for what, most in seen["most"].items()}}


def formula(bug: Bug, optimizer: str) -> dict[str, int]:
    """What a rank holds and sends at that stage. At most: with one unit in full beside the shards,
    where a stage frees it."""
    n = bug.world_size
    units = [sum(p.numel() for p in child.parameters()) for child in bug.build(0)]
    units = [numel + -numel % n for numel in units]
    total, unit = 4 * sum(units), 4 * max(units)
    states = [torch.float32] * {"Adam": 2, "SGD": 0}[optimizer]
    wanted = memory.model_states(sum(units), n, bug.stage, optimizer_dtypes=states)
    wanted["sent"] = (3 if bug.stage == 3 else 2) * total * (n - 1) // n
    if bug.stage == 3:
        wanted["most parameters"] = total // n + unit
    if bug.stage >= 2:
        wanted["most gradients"] = total // n + unit
    return wanted


def timeline(name: str, optimizer: str | None = None) -> "Picture":
    """When each rank computed, sent and waited in a step of a broken stage. If ranks wait for each
    other for ever, it shows what they do from that step on, and breaks off soon after."""
    from .. import viz

    bug, optimizer = _known(name, optimizer)
    return viz.timeline(launch(_recorded, bug.world_size, name, bug.broken, optimizer,
                               backend="cpu:gloo"))


def _known(name, optimizer):
    if name not in BUGS:
        raise ValueError(f"there is no bug {name!r}: there are {', '.join(BUGS)}")
    if optimizer not in (None, *_OPTIMIZERS):
        raise ValueError(f"optimizer={optimizer!r}: must be one of {', '.join(_OPTIMIZERS)}")
    return BUGS[name], optimizer or BUGS[name].optimizer
