"""Exercises of the deep dives: tied parameters, accumulation, and collectives on two levels."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from .. import comm, course
from ..engine import transport
from ..observe import memory
from ..observe.trace import recording_into, trace
from . import small
from .exercise import Exercise, Mistake, Observed
from .on_stages import (
    WAIT_HINTS,
    Fullest,
    backward,
    beside,
    bytes_of_all_tensors,
    full_units,
    train,
    weights_of,
    what_was_sent,
)

# ---- the solutions -------------------------------------------------------------------------------


def units_of(module):
    """{name of a child: the parameters in its flat buffer}. Each parameter is in one buffer: that
    of the first child that has it."""
    units, seen = {}, set()
    for name, child in module.named_children():
        units[name] = [p for p in child.parameters() if p not in seen]
        seen.update(units[name])
    return units


class Accumulating(small.Stage2):
    """Stage 2 that adds up the gradients of several micro-batches, and keeps its slice of them."""

    def reduce(self, unit, grad):
        earlier = unit.owned.grad
        super().reduce(unit, grad)
        if earlier is not None:
            unit.owned.grad += earlier

    def accumulate(self, batches):
        for images, labels in batches:
            loss = F.cross_entropy(self(images), labels)
            (loss / len(batches)).backward()


def all_reduce_on_two_levels(flat):
    """Four ranks are two machines of two. `flat` becomes the mean over all of them."""
    rank = dist.get_rank()
    inside = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    mine = comm.rank_slice(flat, inside)
    comm.reduce_scatter(mine, flat, inside, unit="flat", phase="backward").wait()
    comm.all_reduce(mine, across, unit="flat", phase="backward", divide_by=4).wait()
    comm.all_gather(flat, mine, inside, unit="flat", phase="backward").wait()


class Hybrid(small.Stage3):
    """HSDP: stage 3 inside a machine, and the same once more on the other one."""

    def __init__(self, module):
        rank = dist.get_rank()
        self.inside = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
        self.across = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
        super().__init__(module)

    def own(self, unit):
        unit.shard = comm.rank_slice(unit.flat, self.inside).clone()
        return unit.shard

    def gather(self, unit, phase):
        unit.flat.untyped_storage().resize_(unit.flat.numel() * unit.flat.element_size())
        comm.all_gather(unit.flat, unit.shard, self.inside, unit=unit.name, phase=phase).wait()

    def reduce(self, unit, grad):
        mine = torch.empty_like(unit.shard)
        comm.reduce_scatter(mine, grad, self.inside, unit=unit.name, phase="backward").wait()
        comm.all_reduce(mine, self.across, unit=unit.name, phase="backward",
                        divide_by=self.world_size).wait()
        unit.owned.grad = mine
        self.free(unit)


# ---- what an answer is run on --------------------------------------------------------------------


def tied(seed: int) -> nn.Sequential:
    """The course's net, in which layers 1 and 6 share a weight, and 2 and 4 share everything. All
    biases have the same values, and are not the same."""
    net = course.build(seed)
    net[6][1].weight = net[1][1].weight
    net[4][1].weight, net[4][1].bias = net[2][1].weight, net[2][1].bias
    for _, layer in net[1:]:
        nn.init.zeros_(layer.bias)
    return net


class Assigned(nn.Module):
    """A module for the frame, with these parameters in its children, which computes what `net`
    computes."""

    def __init__(self, net: nn.Module, units: dict[str, list]):
        super().__init__()
        self.net, self.assigned = net, units

    def named_children(self):
        for name, params in self.assigned.items():
            yield name, SimpleNamespace(parameters=lambda params=params: params)

    def forward(self, images):
        return self.net(images)


def _observe_tied(answer) -> Observed:
    net = tied(seed=dist.get_rank())
    units = answer(net)
    if not isinstance(units, dict):
        return {"what is returned": type(units).__name__}
    names = {id(p): name for name, p in net.named_parameters()}
    taken = {id(p) for params in units.values() for p in params}
    found: Observed = {
        "what is returned": "dict",
        "parameters in no unit": [name for key, name in names.items() if key not in taken],
        "units": {f'unit "{unit}"': [names.get(id(p), "something else") for p in params]
                  if isinstance(params, (list, tuple)) else type(params).__name__
                  for unit, params in units.items() if len(params)}}
    if found["parameters in no unit"]:
        return found  # the frame refuses to train
    model = small.Stage1(Assigned(net, units))
    with trace() as sent:
        found |= train(model)
    buffers = {unit.flat.untyped_storage().data_ptr() for unit in model.units}
    reduced = dict.fromkeys(event.unit for event in sent.events if event.phase == "backward")
    return found | {
        "the order in which units are reduced": ", ".join(reduced),
        "all parameters lie in the buffers": all(
            p.untyped_storage().data_ptr() in buffers for p in net.parameters()),
        "layers 1 and 6 share a weight": net[6][1].weight is net[1][1].weight,
        "weights": weights_of(net)}


def _observe_accumulating(answer) -> Observed:
    model, held, in_all = answer(course.build(seed=dist.get_rank())), [], []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def look(*_):
        held.append(_bytes_of_gradients(model))
        in_all.append(bytes_of_all_tensors())

    model.module.register_forward_pre_hook(look)
    for step in range(2):
        batches = [course.batch(4 * step + i, dist.get_rank()) for i in range(4)]
        held.clear()
        if step == 1:  # all that there will be in the second step is there when it begins
            grown = max(in_all, default=0) - min(in_all, default=0)
        with trace() as sent:
            model.accumulate(batches)
            held.append(_bytes_of_gradients(model))
            optimizer.step()
            optimizer.zero_grad()
    between = max(held[1:-1], default=0)
    return {"bytes of gradients between two micro-batches": between,
            "what else stays after a micro-batch": beside(grown - between, model.units),
            "bytes of gradients": held[-1], **what_was_sent(sent.events),
            "bytes of optimizer states": memory.resident(model, optimizer)["optimizer"],
            "weights": weights_of(model)}


def _bytes_of_gradients(model):
    """Bytes of gradients, wherever in the model and its units they are kept."""
    params = [*model.module.parameters(), *model.parameters()]
    kept = [*_tensors_in([vars(model), *map(vars, model.units)]), *[p.grad for p in params]]
    for unit in model.units:
        params += [unit.flat, unit.shard]
    return _bytes(kept, besides={p.untyped_storage()._cdata for p in params})


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(inner)


def _bytes(tensors, besides):
    storages = [t.untyped_storage() for t in tensors if t is not None]
    return sum({s._cdata: s.nbytes() for s in storages if s._cdata not in besides}.values())


@contextmanager
def _messages() -> Iterator[Counter]:
    """Bytes that comm sends from this rank to each of the others, by their number. A trace does not
    know them: it counts what a collective has to send, and not to whom."""
    sent, send = Counter(), dist.ProcessGroup.send

    def noted(group, tensors, to, tag):
        if tag in transport._TAGS.values():  # and not what ranks check in between
            sent[dist.get_global_rank(group, to)] += sum(tensor.nbytes for tensor in tensors)
        return send(group, tensors, to, tag)

    with mock.patch.object(dist.ProcessGroup, "send", noted):
        yield sent


def _by_machine(sent: Counter) -> Observed:
    """Ranks 0 and 1 are one machine, 2 and 3 the other."""
    here = dist.get_rank() // 2
    return {"bytes sent to the other machine": sum(
                n for rank, n in sent.items() if rank // 2 != here),
            "bytes sent inside the machine": sum(
                n for rank, n in sent.items() if rank // 2 == here),
            "ranks that it sends to": sorted(sent)}


# The groups that an answer makes stay until its ranks end. Destroying them is no help: torch waits
# for ever if a group is then made anew under the same name, as with use_local_synchronization.


def _observe_two_levels(answer) -> Observed:
    rank = dist.get_rank()
    flat = (torch.arange(16.0) + 1) * 10**rank  # whole numbers: any order is right
    with trace() as events, _messages() as sent:
        answer(flat)
    found = what_was_sent(events.events)
    del found["bytes sent"]  # see below, from message to message
    return {**found, "flat": flat.clone(), **_by_machine(sent)}


def _observe_hybrid(answer) -> Observed:
    model = answer(course.build(seed=dist.get_rank()))
    same = course.same_bits(course.build(seed=0).state_dict(), weights_of(model))
    begins = comm.all_gather_object(int(same), dist.group.WORLD, phase="init")
    optimizer, fullest = torch.optim.Adam(model.parameters(), lr=0.01), Fullest(model.units)
    for step in range(3):
        with recording_into(fullest), trace() as events, _messages() as sent:
            backward(model, step)
            held, full = memory.resident(model, optimizer), full_units(model.units)
            of_backward = len(events.events)
            optimizer.step()
            optimizer.zero_grad()
    found = what_was_sent(events.events)
    del found["bytes sent"]
    return {**found, "ranks that begin with rank 0's weights": [
                rank for rank, the_same in enumerate(begins) if the_same],
            "bytes of optimizer states": held["optimizer"],
            "bytes of gradients": held["gradients"], "bytes of parameters": held["parameters"],
            "collectives after backward": len(events.events) - of_backward,
            "most full units at one time": fullest.most, "full units after backward": full,
            **_by_machine(sent), "weights": weights_of(model)}


# ---- wrong answers -------------------------------------------------------------------------------


def _twice(module):
    return {name: list(child.parameters()) for name, child in module.named_children()
            if list(child.parameters())}


def _nowhere(module):
    having = Counter(p for child in module.children() for p in child.parameters())
    return {name: [p for p in child.parameters() if having[p] == 1]
            for name, child in module.named_children()}


def _by_values(module):
    units, seen = {}, []
    for name, child in module.named_children():
        units[name] = [p for p in child.parameters()
                       if not any(p.shape == q.shape and torch.equal(p, q) for q in seen)]
        seen += units[name]
    return units


def _last_one(module):
    home = {p: name for name, child in module.named_children() for p in child.parameters()}
    return {name: [p for p in child.parameters() if home[p] == name]
            for name, child in module.named_children()}


def _in_a_list(module):
    units, seen = {}, []
    for name, child in module.named_children():
        units[name] = [p for p in child.parameters() if p not in seen]
        seen += units[name]
    return units


def _in_sets(module):
    return {name: set(params) for name, params in units_of(module).items()}


def _names(module):
    units = {}
    for name, _ in module.named_parameters():
        units.setdefault(name.split(".")[0], []).append(name)
    return units


def _unit_of_its_own(module):
    having = Counter(p for child in module.children() for p in child.parameters())
    return {"tied": [p for p in module.parameters() if having[p] > 1], **_nowhere(module)}


def _copies(module):
    units, seen = {}, set()
    for name, child in module.named_children():
        for layer in child.modules():
            for attribute, p in list(layer.named_parameters(recurse=False)):
                if p in seen:
                    setattr(layer, attribute, nn.Parameter(p.detach().clone()))
                seen.add(p)
        units[name] = list(child.parameters())
    return units


def _whole_children(module):
    units, seen = {}, set()
    for name, child in module.named_children():
        if not seen & set(child.parameters()):
            units[name] = list(child.parameters())
        seen.update(child.parameters())
    return units


class _Overwrites(Accumulating):
    reduce = small.Stage2.reduce


class _KeepsFullGradients(Accumulating):
    def reduce(self, unit, grad):
        kept = self.kept[unit] = self.kept.get(unit, 0) + grad
        if self.last:
            small.Stage2.reduce(self, unit, kept)

    def accumulate(self, batches):
        self.kept = {}
        for i, (images, labels) in enumerate(batches):
            self.last = i == len(batches) - 1
            (F.cross_entropy(self(images), labels) / len(batches)).backward()


class _DividesTwice(Accumulating):
    def reduce(self, unit, grad):
        earlier, mine = unit.owned.grad, torch.empty_like(unit.shard)
        comm.reduce_scatter(mine, grad, self.group, unit=unit.name, phase="backward",
                            divide_by=4 * self.world_size).wait()
        unit.owned.grad = mine if earlier is None else earlier + mine


class _Sums(Accumulating):
    def accumulate(self, batches):
        for images, labels in batches:
            F.cross_entropy(self(images), labels).backward()


class _GathersEachTime(Accumulating):
    def accumulate(self, batches):
        for images, labels in batches:
            (F.cross_entropy(self(images), labels) / len(batches)).backward()
            for unit in self.units:
                self.after_step(unit)


class _OneBackward(Accumulating):
    def accumulate(self, batches):
        losses = [F.cross_entropy(self(images), labels) for images, labels in batches]
        (sum(losses) / len(batches)).backward()


class _KeepsAView(Accumulating):
    def reduce(self, unit, grad):
        mine, earlier = grad.chunk(self.world_size)[self.rank], unit.owned.grad
        comm.reduce_scatter(mine, grad, self.group, unit=unit.name, phase="backward",
                            divide_by=self.world_size).wait()
        unit.owned.grad = mine if earlier is None else mine + earlier


class _AddsToAView(Accumulating):
    def reduce(self, unit, grad):
        mine, earlier = grad.chunk(self.world_size)[self.rank], unit.owned.grad
        comm.reduce_scatter(mine, grad, self.group, unit=unit.name, phase="backward",
                            divide_by=self.world_size).wait()
        unit.owned.grad = mine if earlier is None else earlier.add_(mine)


class _AddsToNone(Accumulating):
    def reduce(self, unit, grad):
        mine = torch.empty_like(unit.shard)
        comm.reduce_scatter(mine, grad, self.group, unit=unit.name, phase="backward",
                            divide_by=self.world_size).wait()
        unit.owned.grad += mine


class _NeverBeginsAnew(Accumulating):
    def reduce(self, unit, grad):
        small.Stage2.reduce(self, unit, grad)
        unit.total = unit.owned.grad + getattr(unit, "total", 0)
        unit.owned.grad = unit.total


class _MeanOfTheMean(Accumulating):
    def reduce(self, unit, grad):
        earlier = unit.owned.grad
        small.Stage2.reduce(self, unit, grad)
        if earlier is not None:
            unit.owned.grad = (earlier + unit.owned.grad) / 2


class _BeginsEachTimeAnew(Accumulating):
    def accumulate(self, batches):
        for images, labels in batches:
            for p in self.parameters():
                p.grad = None
            (F.cross_entropy(self(images), labels) / len(batches)).backward()


def _groups():
    """As the solution makes them."""
    rank = dist.get_rank()
    return ([dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2],
            [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2])


_FLAT: dict = {"unit": "flat", "phase": "backward"}


def _one_level(flat):
    comm.all_reduce(flat, dist.group.WORLD, **_FLAT, divide_by=4).wait()


def _whole_buffer_across(flat):
    inside, across = _groups()
    comm.all_reduce(flat, inside, **_FLAT).wait()
    comm.all_reduce(flat, across, **_FLAT, divide_by=4).wait()


def _levels_swapped(flat):
    across, inside = _groups()
    mine = comm.rank_slice(flat, inside)
    comm.reduce_scatter(mine, flat, inside, **_FLAT).wait()
    comm.all_reduce(mine, across, **_FLAT, divide_by=4).wait()
    comm.all_gather(flat, mine, inside, **_FLAT).wait()


def _divided_by_two(flat):
    inside, across = _groups()
    mine = comm.rank_slice(flat, inside)
    comm.reduce_scatter(mine, flat, inside, **_FLAT).wait()
    comm.all_reduce(mine, across, **_FLAT, divide_by=dist.get_world_size(across)).wait()
    comm.all_gather(flat, mine, inside, **_FLAT).wait()


def _not_divided(flat):
    inside, across = _groups()
    mine = comm.rank_slice(flat, inside)
    comm.reduce_scatter(mine, flat, inside, **_FLAT).wait()
    comm.all_reduce(mine, across, **_FLAT).wait()
    comm.all_gather(flat, mine, inside, **_FLAT).wait()


def _divided_too_often(flat):
    inside, across = _groups()
    mine = comm.rank_slice(flat, inside)
    comm.reduce_scatter(mine, flat, inside, **_FLAT, divide_by=4).wait()
    comm.all_reduce(mine, across, **_FLAT, divide_by=4).wait()
    comm.all_gather(flat, mine, inside, **_FLAT).wait()


def _not_across(flat):
    inside, _ = _groups()
    mine = comm.rank_slice(flat, inside)
    comm.reduce_scatter(mine, flat, inside, **_FLAT, divide_by=4).wait()
    comm.all_gather(flat, mine, inside, **_FLAT).wait()


def _not_gathered(flat):
    inside, across = _groups()
    mine = comm.rank_slice(flat, inside)
    comm.reduce_scatter(mine, flat, inside, **_FLAT).wait()
    comm.all_reduce(mine, across, **_FLAT, divide_by=4).wait()


def _into_other_memory(flat):
    inside, across = _groups()
    mine, mean = torch.empty(flat.numel() // 2), torch.empty_like(flat)
    comm.reduce_scatter(mine, flat, inside, **_FLAT).wait()
    comm.all_reduce(mine, across, **_FLAT, divide_by=4).wait()
    comm.all_gather(mean, mine, inside, **_FLAT).wait()
    return mean


def _only_own_groups(flat):
    rank = dist.get_rank()
    inside = dist.new_group([0, 1] if rank < 2 else [2, 3])
    across = dist.new_group([0, 2] if rank % 2 == 0 else [1, 3])
    mine = comm.rank_slice(flat, inside)
    comm.reduce_scatter(mine, flat, inside, **_FLAT).wait()
    comm.all_reduce(mine, across, **_FLAT, divide_by=4).wait()
    comm.all_gather(flat, mine, inside, **_FLAT).wait()


def _one_machine(flat):
    inside, across = dist.new_group([0, 1]), dist.new_group([0, 2])
    mine = flat.chunk(2)[dist.get_rank() % 2]
    comm.reduce_scatter(mine, flat, inside, **_FLAT).wait()
    comm.all_reduce(mine, across, **_FLAT, divide_by=4).wait()
    comm.all_gather(flat, mine, inside, **_FLAT).wait()


def _slice_of_the_global_rank(flat):
    inside, across = _groups()
    mine = flat.chunk(2)[dist.get_rank()]
    comm.reduce_scatter(mine, flat, inside, **_FLAT).wait()
    comm.all_reduce(mine, across, **_FLAT, divide_by=4).wait()
    comm.all_gather(flat, mine, inside, **_FLAT).wait()


def _quarters(flat):
    inside, across = _groups()
    mine = flat.chunk(4)[dist.get_rank()]
    comm.reduce_scatter(mine, flat, inside, **_FLAT).wait()
    comm.all_reduce(mine, across, **_FLAT, divide_by=4).wait()
    comm.all_gather(flat, mine, inside, **_FLAT).wait()


class _NotAcross(Hybrid):
    reduce = small.Stage3.reduce

    def __init__(self, module):
        super().__init__(module)
        self.group = self.inside


class _DividesByTwo(Hybrid):
    def reduce(self, unit, grad):
        mine = torch.empty_like(unit.shard)
        comm.reduce_scatter(mine, grad, self.inside, unit=unit.name, phase="backward").wait()
        comm.all_reduce(mine, self.across, unit=unit.name, phase="backward", divide_by=2).wait()
        unit.owned.grad = mine
        self.free(unit)


class _DividesTooOften(Hybrid):
    def reduce(self, unit, grad):
        mine = torch.empty_like(unit.shard)
        comm.reduce_scatter(mine, grad, self.inside, unit=unit.name, phase="backward",
                            divide_by=4).wait()
        comm.all_reduce(mine, self.across, unit=unit.name, phase="backward", divide_by=4).wait()
        unit.owned.grad = mine
        self.free(unit)


class _MachinesStartDifferently(Hybrid):
    def start(self, unit):
        comm.broadcast(unit.flat, self.inside, unit=unit.name, phase="init").wait()


class _WholeGradientAcross(Hybrid):
    def reduce(self, unit, grad):
        mine = torch.empty_like(unit.shard)
        comm.all_reduce(grad, self.across, unit=unit.name, phase="backward").wait()
        comm.reduce_scatter(mine, grad, self.inside, unit=unit.name, phase="backward",
                            divide_by=4).wait()
        unit.owned.grad = mine
        self.free(unit)


class _ReducesOverAll(Hybrid):
    def reduce(self, unit, grad):
        comm.all_reduce(grad, self.group, unit=unit.name, phase="backward",
                        divide_by=self.world_size).wait()
        unit.owned.grad = comm.rank_slice(grad, self.inside).clone()
        self.free(unit)


class _ShardedAcross(Hybrid):
    def own(self, unit):
        if unit is self.units[0]:
            self.inside, self.across = self.across, self.inside
        return super().own(unit)


class _GathersOverAll(Hybrid):
    gather = small.Stage3.gather


class _HalfOfTheGlobalRank(Hybrid):
    def own(self, unit):
        unit.shard = unit.flat.chunk(2)[self.rank].clone()
        return unit.shard


class _ShardIsAView(Hybrid):
    def own(self, unit):
        unit.shard = comm.rank_slice(unit.flat, self.inside)
        return unit.shard


class _KeepsQuarters(Hybrid):
    own = small.Stage3.own


class _StaysGathered(Hybrid):
    def reduce(self, unit, grad):
        mine = torch.empty_like(unit.shard)
        comm.reduce_scatter(mine, grad, self.inside, unit=unit.name, phase="backward").wait()
        comm.all_reduce(mine, self.across, unit=unit.name, phase="backward", divide_by=4).wait()
        unit.owned.grad = mine


class _GroupsTooLate(Hybrid):
    def __init__(self, module):
        small.Stage3.__init__(self, module)
        self.inside, self.across = _groups()


class _OnlyOwnGroups(Hybrid):
    def __init__(self, module):
        rank = dist.get_rank()
        self.inside = dist.new_group([0, 1] if rank < 2 else [2, 3])
        self.across = dist.new_group([0, 2] if rank % 2 == 0 else [1, 3])
        small.Stage3.__init__(self, module)


class _OneMachine(Hybrid):
    def __init__(self, module):
        self.inside, self.across = dist.new_group([0, 1]), dist.new_group([0, 2])
        small.Stage3.__init__(self, module)


class _NotResized(Hybrid):
    def gather(self, unit, phase):
        comm.all_gather(unit.flat, unit.shard, self.inside, unit=unit.name, phase=phase).wait()


class _AveragesWeights(Hybrid):
    def reduce(self, unit, grad):
        mine = torch.empty_like(unit.shard)
        comm.reduce_scatter(mine, grad, self.inside, unit=unit.name, phase="backward",
                            divide_by=2).wait()
        unit.owned.grad = mine
        self.free(unit)

    def after_step(self, unit):
        comm.all_reduce(unit.shard, self.across, unit=unit.name, phase="step", divide_by=2).wait()


class _ParametersStayWhole(small.Stage2):

    def __init__(self, module):
        self.inside, self.across = _groups()
        super().__init__(module)

    def own(self, unit):
        unit.shard = comm.rank_slice(unit.flat, self.inside)
        return unit.shard

    def reduce(self, unit, grad):
        mine = torch.empty_like(unit.shard)
        comm.reduce_scatter(mine, grad, self.inside, unit=unit.name, phase="backward").wait()
        comm.all_reduce(mine, self.across, unit=unit.name, phase="backward", divide_by=4).wait()
        unit.owned.grad = mine

    def after_step(self, unit):
        comm.all_gather(unit.flat, unit.shard, self.inside, unit=unit.name, phase="step").wait()


_SIZES = r"The size of tensor a \(\d+\) must match|SIGABRT"
_OWN_GROUPS_ONLY = (
    "Ranks wait for each other. All ranks have to make all groups, in the same order, also those "
    "in which they are not; and in each group all of its ranks have to call the same collectives.")
_WAITS = "stuck|[Cc]onnect|[Tt]imed out"
_NOT_A_MEMBER = ("This rank is in no such group. Each machine has a group of its own, and so has "
                 "each place on the machines: that makes four groups, two of which have this rank.")
_RANK_IN_THE_GROUP = ("In a group of two there are two slices, 0 and 1. Which of them is yours "
                      "says your rank in the group, and not the one among all four.")
_DIVIDED_BY_TWO = ("Divided by the ranks of one group. What has been added up comes from all four "
                   "ranks.")
_DIVIDED_TOO_OFTEN = "Divided by four on both levels. That belongs to the whole sum, once."
_LEVELS_SWAPPED = ("Right, but over the wrong cables: the large messages go from machine to "
                   "machine, and the small ones stay inside. Ranks 0 and 1 are one machine, 2 and "
                   "3 the other.")

ON_VARIANTS = {
    "3.3": Exercise(
        "a function (module) → {name of a child: its parameters}", _observe_tied, units_of, [
            Mistake(_twice, "A shared parameter is in two buffers. It can be a view of one of "
                    "them, and autograd has one gradient for it: the other unit waits for it in "
                    "vain."),
            Mistake(_nowhere, "A parameter that two children have is left out for both of them. "
                    "Somebody has to own it."),
            Mistake(_whole_children, "A child that shares one parameter is left out as a whole, "
                    "and with it what it has for itself."),
            Mistake(_by_values, "Parameters with equal values need not be the same one: all biases "
                    "are zero here, and will not stay so. Ask whether it is the same object."),
            Mistake(_last_one, "That would train, too. But backward comes to the first use of a "
                    "shared parameter last, and only then is its gradient complete: until then "
                    "this unit would have to keep all of its other gradients."),
            Mistake(_unit_of_its_own, "That would train, too, and the package does something like "
                    "it. Here a shared parameter belongs to the first child that has it."),
            Mistake(_in_a_list, "In a list, `in` compares with ==, which for tensors means "
                    "element by element. A set compares whether it is the same object.",
                    "Boolean value of Tensor"),
            Mistake(_in_sets, "A set has no order, and in the buffer the parameters need one that "
                    "is the same on all ranks. Return lists.", by=("units",)),
            Mistake(_names, "The lists are to hold the module's parameters themselves: not their "
                    "names, and not p.data, which is another tensor.",
                    by=("parameters in no unit",)),
            Mistake(_copies, "Layers 1 and 6 have weights of their own now. They shared one, and "
                    "would now be trained apart."),
        ],
        {"what is returned": "Return a dict: for the name of each child a list of parameters.",
         "parameters in no unit": "Every parameter needs an owner, or it is never updated.",
         "units": "A parameter belongs to the first child that has it, and to no other.",
         "bytes of parameters": "Every parameter has one place, in one buffer.",
         "weights": "The units are right, but the module is not as it was."}),
    "5.2": Exercise(
        "a class like small.Stage2, with reduce and accumulate", _observe_accumulating,
        Accumulating, [
            Mistake(_Overwrites, "Only the last micro-batch counts: its gradient has replaced what "
                    "was there. Add to it."),
            Mistake(_BeginsEachTimeAnew, "Only the last micro-batch counts: before each of them "
                    "the gradients are thrown away. The optimizer's loop does that, once a step."),
            Mistake(_KeepsFullGradients, "That sends less, but keeps the gradients of all "
                    "parameters in full between the micro-batches: what stage 2 was meant to save. "
                    "Reduce after each of them."),
            Mistake(_KeepsAView, "The slice is a view of the full buffer, and keeps all of it "
                    "alive until the next micro-batch. Let the sum arrive in memory of its own."),
            Mistake(_AddsToAView, "The slice is a view of the full buffer, and keeps all of it "
                    "alive. Let the sum arrive in memory of its own."),
            Mistake(_DividesTwice, "Divided by the number of micro-batches twice: the loss has "
                    "been divided by it, and the gradients are again."),
            Mistake(_Sums, "That is the sum over the micro-batches. The step is to follow their "
                    "mean, so that its size does not depend on how many there are."),
            Mistake(_MeanOfTheMean, "Half of what was there and half of the new: the last "
                    "micro-batch counts as much as all before it. Add, and divide by their number "
                    "once."),
            Mistake(_NeverBeginsAnew, "The first step is right. In the second one the gradients of "
                    "the first are still in the sum: begin anew when the optimizer's gradient is "
                    "None."),
            Mistake(_GathersEachTime, "The parameters are gathered after each micro-batch, but "
                    "they change once, in the optimizer's step."),
            Mistake(_OneBackward, "That is one backward for all micro-batches, so the activations "
                    "of all of them are there at once. Accumulation is to need those of one.",
                    by=("bytes of gradients between two micro-batches", "collectives")),
            Mistake(_AddsToNone, "In the first micro-batch of a step there is nothing yet to add "
                    "to: unit.owned.grad is None.", r"'NoneType'"),
        ],
        {**WAIT_HINTS,
         "bytes of gradients between two micro-batches": "Of each micro-batch this rank's slice of "
         "the sum stays, and nothing else.",
         "what else stays after a micro-batch": "Gradients in full are kept somewhere, if not in "
         "the model. Only the slices have to stay.",
         "bytes of gradients": "Look for a second sum, or for a view of a full buffer.",
         "bytes sent": "A reduce_scatter after each micro-batch, and one all_gather at the end.",
         "collectives": "For each unit a reduce_scatter after each micro-batch, and one all_gather "
         "after the step.",
         "weights": "What is held and sent is right. Is it the mean over ranks and "
         "micro-batches?"}),
    "10.1": Exercise(
        "a function (flat), which changes flat", _observe_two_levels, all_reduce_on_two_levels, [
            Mistake(_one_level, "The mean is right, but two thirds of what a rank sends go to the "
                    "other machine, as much as the whole buffer. First add up inside the machine."),
            Mistake(_whole_buffer_across, "The whole buffer travels between the machines. A rank "
                    "needs to take only its own slice there, if its neighbour takes the other."),
            Mistake(_levels_swapped, _LEVELS_SWAPPED,
                    by=("bytes sent to the other machine", "bytes sent inside the machine")),
            Mistake(_divided_by_two, _DIVIDED_BY_TWO),
            Mistake(_not_divided, "That is the sum. Divide it by the number of all ranks."),
            Mistake(_divided_too_often, _DIVIDED_TOO_OFTEN),
            Mistake(_not_across, "Nothing goes from machine to machine, so each has its own mean.",
                    by=("collectives", "bytes sent to the other machine")),
            Mistake(_not_gathered, "A rank has its own slice of the mean, and its neighbour has "
                    "the other one. Both need both."),
            Mistake(_into_other_memory, "The mean has to be in `flat` itself; what the function "
                    "returns is not looked at."),
            Mistake(_slice_of_the_global_rank, _RANK_IN_THE_GROUP, "index out of range"),
            Mistake(_one_machine, _NOT_A_MEMBER,
                    "'int' object has no attribute|Invalid process group"),
            Mistake(_quarters, "The buffers of a collective have the wrong sizes. In a group of "
                    "two a slice is half of the buffer.", _SIZES),
            Mistake(_only_own_groups, _OWN_GROUPS_ONLY, _WAITS),
        ],
        {**WAIT_HINTS,
         "collectives": "One collective inside the machine, one across, and one inside again.",
         "flat": "After the last collective, `flat` has the mean over four ranks, on all of them.",
         "bytes sent to the other machine": "Across go only sums of a machine, half a buffer of "
         "them for each rank.",
         "bytes sent inside the machine": "Inside, a rank sends half of the buffer twice.",
         "ranks that it sends to": "A rank talks to its neighbour, and to the rank in the same "
         "place on the other machine."}, (4,)),
    "10.2": Exercise(
        "a class like small.Stage3", _observe_hybrid, Hybrid, [
            Mistake(small.Stage3, "That is stage 3 over all four ranks, which gathers every unit "
                    "from both machines. Shard over the two ranks of a machine."),
            Mistake(_ParametersStayWhole, "The gradients and the optimizer are sharded, but all "
                    "parameters stay whole, as at stage 2. Begin with stage 3.",
                    by=("bytes of parameters", "most full units at one time")),
            Mistake(_NotAcross, "The machines never hear of each other's gradients, so each trains "
                    "a model of its own.",
                    by=("collectives", "bytes sent to the other machine")),
            Mistake(_MachinesStartDifferently, "The machines begin with different weights, and "
                    "equal gradients do not bring them together. One rank of all four gives "
                    "everyone its values, for each unit: self.group must not be replaced before.",
                    by=("ranks that begin with rank 0's weights",)),
            Mistake(_DividesByTwo, _DIVIDED_BY_TWO),
            Mistake(_DividesTooOften, _DIVIDED_TOO_OFTEN),
            Mistake(_WholeGradientAcross, "The whole gradient travels between the machines. Reduce "
                    "inside first: then a rank takes only its slice to the other machine.",
                    by=("collectives", "bytes sent to the other machine")),
            Mistake(_ReducesOverAll, "The gradients are added up over all four ranks at once, "
                    "which takes a whole buffer to the other machine. First inside, then across.",
                    by=("collectives", "bytes sent to the other machine")),
            Mistake(_ShardedAcross, _LEVELS_SWAPPED,
                    by=("bytes sent to the other machine", "bytes sent inside the machine")),
            Mistake(_StaysGathered, "Backward leaves its units behind in full. Free each when its "
                    "gradients have been reduced."),
            Mistake(_HalfOfTheGlobalRank, _RANK_IN_THE_GROUP, "index out of range"),
            Mistake(_GroupsTooLate, "The frame's __init__ already asks for each unit's shard, so "
                    "what `own` uses has to be there before it runs.",
                    r"'(?!int|NoneType|Tensor|Unit|list|tuple)\w+' object has no attribute"),
            Mistake(_OneMachine, _NOT_A_MEMBER,
                    "'int' object has no attribute|Invalid process group"),
            Mistake(_GathersOverAll, "Shard and group do not fit together. Of the two ranks of a "
                    "machine each has half of a unit, and a gather inside the machine makes it "
                    "whole.", _SIZES),
            Mistake(_KeepsQuarters, "Shard and group do not fit together. Of the two ranks of a "
                    "machine each has half of a unit, and a gather inside the machine makes it "
                    "whole.", _SIZES),
            Mistake(_ShardIsAView, "The shard is a view of the flat buffer, and empty when that "
                    "is. It needs memory of its own.", "SIGSEGV|SIGBUS"),
            Mistake(_NotResized, "The flat buffer has been emptied, so what is gathered has no "
                    "place to go. First it needs its memory back.",
                    "out of bounds for storage of size 0"),
            Mistake(_AveragesWeights, "Each machine takes a step by its own gradients, and then "
                    "the weights are averaged. After Adam's step that is something else: take the "
                    "mean of the gradients across the machines, before it.",
                    by=("collectives after backward",)),
            Mistake(_OnlyOwnGroups, _OWN_GROUPS_ONLY, _WAITS),
        ],
        {**WAIT_HINTS,
         "ranks that begin with rank 0's weights": "Before the first step all have rank 0's "
         "values, which stay as they are.",
         "bytes of optimizer states": "Sharded over two ranks, Adam's two values take half.",
         "bytes of gradients": "A rank keeps the gradients of its shard, and of nothing else.",
         "bytes of parameters": "A shard is half of a unit, in memory of its own.",
         "most full units at one time": "One unit is full at a time, as at stage 3.",
         "collectives after backward": "When the optimizer has stepped, there is nothing to send: "
         "the next forward gathers what it needs.",
         "full units after backward": "Free each unit when its gradients have been reduced.",
         "collectives": "For each unit two gathers inside, a reduction inside, and one across.",
         "bytes sent to the other machine": "Across go gradients alone, and of them a rank's "
         "shard.",
         "bytes sent inside the machine": "Inside goes what stage 3 sends on two ranks.",
         "ranks that it sends to": "A rank talks to its neighbour, and to the rank in the same "
         "place on the other machine.",
         "weights": "What is held and sent is right. Is it the mean over all four ranks?"}, (4,)),
}
