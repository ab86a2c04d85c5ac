"""Exercises on what real training adds: a master copy, a loss scale, and buffers."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import comm, course
from ..engine.tree import tensors_in
from ..observe import memory
from ..observe.trace import trace
from . import small
from .exercise import Exercise, Mistake, Observed
from .on_stages import WAIT_HINTS, weights_of, what_was_sent

# ---- the solutions -------------------------------------------------------------------------------


class Mixed(small.Stage2):
    """Of a module in bf16: the optimizer updates a master copy of this rank's shard, in fp32."""

    def own(self, unit):
        return unit.shard.float()

    def reduce(self, unit, grad):
        mine = torch.empty_like(unit.shard)
        comm.reduce_scatter(mine, grad, self.group, unit=unit.name, phase="backward",
                            divide_by=self.world_size).wait()
        unit.owned.grad = mine.float()

    def after_step(self, unit):
        unit.shard.copy_(unit.owned.data)
        comm.all_gather(unit.flat, unit.shard, self.group, unit=unit.name, phase="step").wait()


class LossScale:
    """What the loss is multiplied by, the same on all ranks."""

    def __init__(self, scale, growth_interval):
        self.scale, self.growth_interval, self.good = scale, growth_interval, 0

    def step(self, optimizer, grads, clip):
        """grads: this rank's slices, scaled. clip(): clips them, as they are now."""
        finite = torch.tensor(float(all(grad.isfinite().all() for grad in grads)))
        dist.all_reduce(finite, dist.ReduceOp.MIN)
        if not finite:
            self.scale, self.good = self.scale / 2, 0
            return
        for grad in grads:
            grad /= self.scale
        clip()
        optimizer.step()
        self.good += 1
        if self.good == self.growth_interval:
            self.scale, self.good = self.scale * 2, 0


class WithBuffers(small.Stage0):
    """Every training forward begins with rank 0's buffers on all ranks."""

    def forward(self, *args):
        if self.training:
            for buffer in self.module.buffers():
                comm.broadcast(buffer.view(-1), self.group, unit="buffers", phase="forward").wait()
        return super().forward(*args)


# ---- what an answer is run on --------------------------------------------------------------------


def _observe_mixed(answer) -> Observed:
    model = answer(course.build(seed=dist.get_rank()).bfloat16())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    for step in range(3):
        images, labels = course.batch(step, dist.get_rank())
        with trace() as sent:
            F.cross_entropy(model(images.bfloat16()).float(), labels).backward()
            held = _held(model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
    return {**held, **what_was_sent(sent.events),
            "unit.shard is still a slice of unit.flat": all(
                unit.shard.untyped_storage().data_ptr() == unit.flat.untyped_storage().data_ptr()
                for unit in model.units),
            "autograd has recorded the copy": any(
                unit.flat.requires_grad or unit.shard.requires_grad for unit in model.units),
            "the shard is the master, rounded": all(
                torch.equal(unit.shard, unit.owned.data.to(unit.shard.dtype))
                for unit in model.units),
            "weights": weights_of(model)}


def _held(model, optimizer):
    """Bytes, each storage counted once: what is also a parameter of the module counts there."""
    params = [p for unit in model.units for p in unit.params]
    grads = [p.grad for p in (*params, *model.parameters())]
    states = [value for p, state in optimizer.state.items() for value in state.values()
              if value.shape == p.shape]
    kept = [vars(unit) for unit in model.units]
    kept.append({name: value for name, value in vars(model).items() if not name.startswith("_")})
    found, before, together = {}, 0, []
    for what, tensors in (("parameters", params),
                          ("master and optimizer states", [*model.parameters(), *states]),
                          ("gradients", grads),
                          ("anything else that the units keep", tensors_in(kept))):
        together += tensors
        found[f"bytes of {what}"] = memory._bytes(together) - before
        before += found[f"bytes of {what}"]
    return found


class _Overflows(small.Stage3):
    """Stage 3, in which the gradients of some ranks overflow in some steps."""

    step = 0

    def reduce(self, unit, grad):
        if unit is self.units[-1] and (self.step, self.rank) == (1, 1):
            grad[-1] = torch.inf  # in the last rank's slice
        if unit is self.units[0] and self.step == 6 and self.rank < 2:
            grad[0] = (torch.inf, -torch.inf)[self.rank]  # NaN in rank 0's slice
        super().reduce(unit, grad)


class _Messages(TorchDispatchMode):
    """The bytes of the largest tensor of each collective of torch.distributed."""

    def __init__(self):
        super().__init__()
        self.largest = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.largest.append(max((x.nbytes for x in tensors_in(args)), default=0))
        return func(*args, **(kwargs or {}))


def _observe_scale(answer) -> Observed:
    model = _Overflows(course.build(seed=dist.get_rank())[:4])  # three units
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler, scales, taken, messages = answer(2.0**10, 2), [], [], []

    def clip():
        for p in model.parameters():
            p.grad.clamp_(-0.01, 0.01)

    for model.step in range(8):
        before = [p.detach().clone() for p in model.parameters()]
        images, labels = course.batch(model.step, dist.get_rank())
        (F.cross_entropy(model(images), labels) * float(scaler.scale)).backward()
        with trace() as sent, _Messages() as direct:
            scaler.step(optimizer, [p.grad for p in model.parameters()], clip)
        optimizer.zero_grad()
        messages.append([event.bytes for event in sent.events] or direct.largest)
        scales.append(float(scaler.scale))
        taken.append(not all(map(torch.equal, before, model.parameters())))
    most = max([nbytes for of_step in messages for nbytes in of_step], default=0)
    few = most <= 8 * dist.get_world_size()  # a number from each rank
    return {"steps that this rank took": taken, "the scale after each step": scales,
            "collectives in each step": [len(of_step) for of_step in messages],
            "the largest message": "a few bytes" if few else f"{most:,} bytes",
            "weights": weights_of(model)}


def _observe_buffers(answer) -> Observed:
    torch.manual_seed(rank := dist.get_rank())
    norm = nn.BatchNorm1d(12)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), norm, nn.Tanh(), nn.Linear(12, 10))
    norm.running_mean.fill_(rank)  # each rank has trained before, by itself
    norm.num_batches_tracked.fill_(2**24 + 1 + rank)  # one more than fp32 can count to
    seen: list[dict] = []

    def look(*_):
        seen.append({name: buffer.clone() for name, buffer in norm.named_buffers()})

    norm.register_forward_pre_hook(look)
    model = answer(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        images, labels = course.batch(step, rank)
        with trace() as sent:
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    trained, saved = [*seen], weights_of(model)
    if rank == 0:  # evaluates alone
        model.eval()
        model(images)
    of_buffers = what_was_sent([event for event in sent.events
                                if (event.op, event.phase) != ("all_reduce", "backward")])
    del of_buffers["collectives"]  # one for each buffer or one for each dtype
    return {**of_buffers, **{f"the buffers when forward {step + 1} begins": buffers
                           for step, buffers in enumerate(trained)},
            "what rank 0 saves": saved if rank == 0 else None}


# ---- wrong answers -------------------------------------------------------------------------------


class _NoMaster(Mixed):
    def own(self, unit):
        return unit.shard

    def reduce(self, unit, grad):
        small.Stage2.reduce(self, unit, grad)

    def after_step(self, unit):
        small.Stage2.after_step(self, unit)


class _FullMaster(Mixed):
    def own(self, unit):
        return unit.flat.float().chunk(self.world_size)[self.rank]


class _FullMasterBeside(Mixed):
    def own(self, unit):
        unit.master = unit.flat.float()
        return unit.master.chunk(self.world_size)[self.rank].clone()


class _UpdatesEverything(Mixed):
    def own(self, unit):
        return unit.flat.float()

    def reduce(self, unit, grad):
        comm.all_reduce(grad, self.group, unit=unit.name, phase="backward",
                        divide_by=self.world_size).wait()
        unit.owned.grad = grad.float()

    def after_step(self, unit):
        unit.flat.copy_(unit.owned.data)


class _SendsFp32Gradients(Mixed):
    def reduce(self, unit, grad):
        mine = torch.empty_like(unit.owned.data)
        comm.reduce_scatter(mine, grad.float(), self.group, unit=unit.name, phase="backward",
                            divide_by=self.world_size).wait()
        unit.owned.grad = mine


class _GradientStaysBf16(Mixed):
    def reduce(self, unit, grad):
        small.Stage2.reduce(self, unit, grad)


class _FullGradientInFp32(Mixed):
    def reduce(self, unit, grad):
        comm.reduce_scatter(grad.chunk(self.world_size)[self.rank], grad, self.group,
                            unit=unit.name, phase="backward", divide_by=self.world_size).wait()
        unit.owned.grad = grad.float().chunk(self.world_size)[self.rank]


class _MasterNotCopied(Mixed):
    def after_step(self, unit):
        small.Stage2.after_step(self, unit)


class _CopiesTheOtherWay(Mixed):
    def after_step(self, unit):
        unit.owned.data.copy_(unit.shard)
        small.Stage2.after_step(self, unit)


class _CopiesAfterTheGather(Mixed):
    def after_step(self, unit):
        small.Stage2.after_step(self, unit)
        unit.shard.copy_(unit.owned.data)


class _RoundsTheMaster(Mixed):
    def after_step(self, unit):
        super().after_step(unit)
        unit.owned.data.copy_(unit.shard)


class _GathersTheMaster(Mixed):
    def after_step(self, unit):
        full = torch.empty_like(unit.flat, dtype=torch.float32)
        comm.all_gather(full, unit.owned.data, self.group, unit=unit.name, phase="step").wait()
        unit.flat.copy_(full)


class _GathersFp32IntoBf16(Mixed):
    def after_step(self, unit):
        comm.all_gather(unit.flat, unit.owned.data, self.group, unit=unit.name, phase="step").wait()


class _AnotherShard(Mixed):
    def after_step(self, unit):
        unit.shard = unit.owned.data.bfloat16()
        small.Stage2.after_step(self, unit)


class _WithAutograd(Mixed):
    def after_step(self, unit):
        unit.shard.copy_(unit.owned)
        small.Stage2.after_step(self, unit)


class _Scale(LossScale):
    """The solution, in pieces of which a wrong answer changes one."""

    def step(self, optimizer, grads, clip):
        finite = self.agree(all(grad.isfinite().all() for grad in grads), grads)
        if finite:
            self.update_weights(optimizer, grads, clip)
        self.update(finite)

    def agree(self, mine, grads):
        flag = torch.tensor(float(mine))
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    def update_weights(self, optimizer, grads, clip):
        for grad in grads:
            grad.div_(self.scale)
        clip()
        optimizer.step()

    def update(self, finite):
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.scale /= 2
        if self.good == self.growth_interval:
            self.scale, self.good = self.scale * 2, 0


class _EachForItself(_Scale):
    def agree(self, mine, grads):
        return mine


class _Rank0Decides(_Scale):
    def agree(self, mine, grads):
        flag = torch.tensor(float(mine))
        dist.broadcast(flag, 0)
        return bool(flag)


class _AnyRankWillDo(_Scale):
    def agree(self, mine, grads):
        flag = torch.tensor(float(mine))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


class _OnlyInf(_Scale):
    def agree(self, mine, grads):
        return super().agree(not any(grad.isinf().any() for grad in grads), grads)


class _SendsTheGradients(_Scale):
    def agree(self, mine, grads):
        total = torch.cat(grads)
        dist.all_reduce(total)
        return bool(total.isfinite().all())


class _OneForEachUnit(_Scale):
    def agree(self, mine, grads):
        return all([_Scale.agree(self, grad.isfinite().all(), grads) for grad in grads])


class _TellsTheOthers(_Scale):
    def agree(self, mine, grads):
        return mine if mine else _Scale.agree(self, mine, grads)


class _ItsOwnScale(_Scale):
    def agree(self, mine, grads):
        self.mine = mine
        return super().agree(mine, grads)

    def update(self, finite):
        super().update(self.mine)


class _NeverHalves(_Scale):
    def update(self, finite):
        super().update(finite)
        if not finite:
            self.scale *= 2


class _NeverDoubles(_Scale):
    def update(self, finite):
        if not finite:
            self.scale /= 2


class _NotInARow(_Scale):
    def update(self, finite):
        if finite:
            super().update(finite)
        else:
            self.scale /= 2


class _CountsOn(_Scale):
    def update(self, finite):
        self.good = self.good + 1 if finite else 0
        self.scale = self.scale / 2 if not finite else (
            self.scale * 2 if self.good >= self.growth_interval else self.scale)


class _DoublesAtOnce(_Scale):
    def update(self, finite):
        self.scale = self.scale * 2 if finite else self.scale / 2


class _NotUnscaled(_Scale):
    def update_weights(self, optimizer, grads, clip):
        clip()
        optimizer.step()


class _ClipsFirst(_Scale):
    def update_weights(self, optimizer, grads, clip):
        clip()
        for grad in grads:
            grad.div_(self.scale)
        optimizer.step()


class _UnscalesACopy(_Scale):
    def update_weights(self, optimizer, grads, clip):
        grads = [grad / self.scale for grad in grads]
        clip()
        optimizer.step()


class _ByTheNextScale(_Scale):
    def step(self, optimizer, grads, clip):
        finite = self.agree(all(grad.isfinite().all() for grad in grads), grads)
        self.update(finite)
        if finite:
            self.update_weights(optimizer, grads, clip)


class _OnlyAtTheBeginning(small.Stage0):
    def __init__(self, module):
        super().__init__(module)
        for buffer in module.buffers():
            comm.broadcast(buffer.view(-1), self.group, unit="buffers", phase="init").wait()


class _Averages(WithBuffers):
    def forward(self, *args):
        if self.training:
            for buffer in self.module.buffers():
                if buffer.is_floating_point():
                    comm.all_reduce(buffer, self.group, unit="buffers", phase="forward",
                                    divide_by=self.world_size).wait()
        return small.Stage0.forward(self, *args)


class _AveragesTheCount(WithBuffers):
    def forward(self, *args):
        if self.training:
            for buffer in self.module.buffers():
                dist.all_reduce(buffer)
                buffer /= self.world_size
        return small.Stage0.forward(self, *args)


class _OnlyFloats(WithBuffers):
    def forward(self, *args):
        if self.training:
            for buffer in self.module.buffers():
                if buffer.is_floating_point():
                    comm.broadcast(buffer, self.group, unit="buffers", phase="forward").wait()
        return small.Stage0.forward(self, *args)


class _AllAsFloats(WithBuffers):
    def forward(self, *args):
        if self.training:
            buffers = list(self.module.buffers())
            flat = torch.cat([buffer.view(-1) for buffer in buffers])
            comm.broadcast(flat, self.group, unit="buffers", phase="forward").wait()
            for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers])):
                buffer.copy_(part.view(buffer.shape))
        return small.Stage0.forward(self, *args)


class _SendsACopy(WithBuffers):
    def forward(self, *args):
        if self.training:
            for buffer in self.module.buffers():
                comm.broadcast(buffer.clone().view(-1), self.group, unit="buffers",
                               phase="forward").wait()
        return small.Stage0.forward(self, *args)


class _BehindTheForward(small.Stage0):
    def forward(self, *args):
        output = super().forward(*args)
        if self.training:
            for buffer in self.module.buffers():
                comm.broadcast(buffer.data.view(-1), self.group, unit="buffers",
                               phase="forward").wait()
        return output


class _OnlyRank0Broadcasts(WithBuffers):
    def forward(self, *args):
        if self.rank == 0:
            return super().forward(*args)
        return small.Stage0.forward(self, *args)


class _InEvaluationToo(WithBuffers):
    def forward(self, *args):
        for buffer in self.module.buffers():
            comm.broadcast(buffer.view(-1), self.group, unit="buffers", phase="forward").wait()
        return small.Stage0.forward(self, *args)


_LOST = ("After each step the optimizer goes on from rounded numbers, so what is rounded away is "
         "lost each time. What it updates must never be rounded.")
_WHOLE = ("A rank keeps a whole unit in fp32, of which it updates a slice. Copy the shard alone. "
          "(A view of a larger copy keeps all of that alive.)")
_UNCHANGED = ("The module's weights never change: what the optimizer has updated does not reach "
              "unit.shard, which is what the others get.")
_NOT_EVERYWHERE = ("An inf or NaN is in the slice of one rank, which may be any of them. If one "
                   "finds one, all have to skip the step.")
_IN_A_ROW = ("The scale doubles after growth_interval good steps in a row. When does their count "
             "begin anew?")
_UNSCALE = ("The scales are right, and the weights are not: clip() and the optimizer have to find "
            "the gradients unscaled, by the scale that their loss was multiplied by.")

ON_TRAINING = {
    "7.2": Exercise(
        "a class like small.Stage2, with own, reduce and after_step", _observe_mixed, Mixed, [
            Mistake(_NoMaster, "There is no master: the optimizer updates numbers in bf16, and "
                    "what is smaller than half the distance to the next such number is lost."),
            Mistake(_RoundsTheMaster, _LOST),
            Mistake(_FullMaster, _WHOLE),
            Mistake(_FullMasterBeside, _WHOLE),
            Mistake(_UpdatesEverything, "That is stage 0: every rank keeps a master of everything, "
                    "and updates all of it. It has to be this rank's shard."),
            Mistake(_SendsFp32Gradients, "The gradients travel in fp32. Their sum is rounded less "
                    "(and the package does so unless told otherwise), but the target is to send "
                    "half as much: convert the mean, not what is summed."),
            Mistake(_GradientStaysBf16, "torch wants a gradient in the dtype of what it belongs "
                    "to, and the master is fp32.", "assign a gradient with dtype"),
            Mistake(_FullGradientInFp32, "The whole gradient was converted, and a view of a slice "
                    "keeps all of it alive. Convert this rank's slice."),
            Mistake(_MasterNotCopied, _UNCHANGED),
            Mistake(_CopiesTheOtherWay, _UNCHANGED),
            Mistake(_CopiesAfterTheGather, "The others get this rank's shard as it was before the "
                    "step. First it has to be brought up to date."),
            Mistake(_GathersTheMaster, "The masters travel, in fp32, and everyone rounds them: "
                    "twice the bytes. Whose shard it is can round it before it is sent."),
            Mistake(_GathersFp32IntoBf16, "The two buffers of a collective need one dtype. Here "
                    "a slice in fp32 is sent to where bf16 is expected.",
                    "SIGABRT|size doesn't match"),
            Mistake(_WithAutograd, "unit.owned is a parameter, so autograd records what is "
                    "computed from it, here one more copy in each step. Copy its data."),
            Mistake(_AnotherShard, "unit.shard has become new memory, beside the flat buffer, "
                    "whose slice it was. Write into it instead."),
        ],
        {**WAIT_HINTS,
         "bytes of parameters": "The module's parameters stay as they are: bf16, in unit.flat.",
         "bytes of gradients": "4 bytes for each element of the shard, and nothing beside them: a "
         "view keeps all of its storage alive.",
         "bytes of master and optimizer states": "12 bytes for each element of the shard: the "
         "master and Adam's two averages in fp32.",
         "bytes of anything else that the units keep": "Besides the parameters in bf16, the "
         "gradient and what the optimizer updates, nothing has to stay.",
         "bytes sent": "A reduce_scatter and an all_gather, both in bf16.",
         "collectives": "One reduce_scatter and one all_gather for each unit, as at stage 2.",
         "the shard is the master, rounded": "After a step, unit.shard is not unit.owned rounded, "
         "or neither is a number. If so, look at the reduction: its two buffers need one dtype.",
         "weights": "What is held and sent is right, but the weights are not. Follow one number "
         "through a step: gradient, master, shard, everyone's flat buffer."}),
    "7.3": Exercise(
        "a class (scale, growth_interval) with scale and step(optimizer, grads, clip)",
        _observe_scale, LossScale, [
            Mistake(_EachForItself, "Each rank looks at its own slices and decides alone. Then "
                    "some update their shard and some do not, and nothing stops them."),
            Mistake(_Rank0Decides, _NOT_EVERYWHERE),
            Mistake(_AnyRankWillDo, _NOT_EVERYWHERE, by=(
                "steps that this rank took", "the scale after each step")),
            Mistake(_OnlyInf, "When inf of one rank meets -inf of another, their sum is neither.",
                    by=("steps that this rank took", "the scale after each step")),
            Mistake(_SendsTheGradients, "All ranks know, but for that the gradients were sent. One "
                    "number from each rank says as much."),
            Mistake(_OneForEachUnit, "One collective for each slice of the gradients. A rank can "
                    "first make one number of all its slices."),
            Mistake(_TellsTheOthers, "Every rank takes part in a collective, also one that has "
                    "nothing to report: the others cannot know that.", "stuck|is missing"),
            Mistake(_ItsOwnScale, "All skip the same steps, but each changes its scale by what it "
                    "has found itself. Then their losses are multiplied by different numbers."),
            Mistake(_NeverHalves, "After an overflow the scale stays, so the next step overflows, "
                    "too. Halve it."),
            Mistake(_NeverDoubles, "The scale only falls. After growth_interval good steps in a "
                    "row it doubles."),
            Mistake(_NotInARow, _IN_A_ROW),
            Mistake(_CountsOn, _IN_A_ROW),
            Mistake(_DoublesAtOnce, _IN_A_ROW),
            Mistake(_NotUnscaled, _UNSCALE),
            Mistake(_UnscalesACopy, _UNSCALE),
            Mistake(_ClipsFirst, "clip() got gradients that were still scaled, and has cut almost "
                    "all of them."),
            Mistake(_ByTheNextScale, "The gradients belong to the scale that their loss was "
                    "multiplied by. Here it has been changed before they are divided."),
        ],
        {"steps that this rank took": "A step is skipped on all ranks if any of them has found an "
         "inf or NaN, and taken on all ranks otherwise.",
         "the scale after each step": "Halved after an overflow, doubled after growth_interval "
         "good steps in a row, and otherwise as it was.",
         "collectives in each step": "One in each step, whether or not there is an overflow. "
         "(Those of objects send sizes first.)",
         "the largest message": "One number from each rank is enough.", "weights": _UNSCALE}),
    "7.4": Exercise(
        "a class like small.Stage0, with forward(self, *args)", _observe_buffers, WithBuffers, [
            Mistake(small.Stage0, "Nothing is sent: each rank has statistics of its own images, "
                    "which no other rank has seen."),
            Mistake(_OnlyAtTheBeginning, "All ranks begin alike, and then each forward changes the "
                    "buffers by its own images. Once is not enough."),
            Mistake(_Averages, "An average is the same on all ranks, too, but nobody's: here the "
                    "target is rank 0's. (And a mean of variances is not the variance of all "
                    "images.)"),
            Mistake(_AveragesTheCount, "num_batches_tracked is a whole number, which the ranks "
                    "count alike: what would its average be? The target is rank 0's buffers.",
                    "can't be cast to the desired output type"),
            Mistake(_OnlyFloats, "One buffer is left out: num_batches_tracked, an integer."),
            Mistake(_AllAsFloats, "Put together with the others, num_batches_tracked has become a "
                    "float, and large integers are rounded. A message has one dtype."),
            Mistake(_SendsACopy, "What arrives is thrown away: the collective has to write into "
                    "the buffers themselves."),
            Mistake(_BehindTheForward, "The first forward begins before anything was sent."),
            Mistake(_OnlyRank0Broadcasts, "A broadcast is a collective: all ranks call it, "
                    "including those that receive.", "diverge"),
            Mistake(_InEvaluationToo, "Rank 0 evaluates alone, and sends to ranks that do not "
                    "receive. Evaluation changes no buffers.", "stuck|is missing"),
        ],
        {**WAIT_HINTS, "bytes sent": "In each training forward, rank 0 sends each of its buffers "
         "to each of the others.",
         **{f"the buffers when forward {step} begins": "On every rank, they have to be what rank "
            "0's are at that moment." for step in (1, 2, 3)},
         "what rank 0 saves": "Rank 0's buffers are the ones that count: sending must not change "
         "them."}),
}
