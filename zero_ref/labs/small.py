"""ZeRO in small: what learners write in the course, complete.

Four stages on the package's collectives, whose sums are in rank order, so that they end with the
package's bits. Each child of the module that has parameters is a unit. What is not here, and what
the package adds: overlap, shared messages, gradient accumulation, mixed precision, parameters that
are frozen, unused, tied or outside of the children, buffers, clipping, and refusals of what would
go wrong in silence.
"""

import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from zero_ref import comm


class Unit:
    """One layer's parameters in a flat buffer, and this rank's shard of it."""

    def __init__(self, name, layer):
        self.name, self.layer, self.params = name, layer, list(layer.parameters())
        self.flat = flatten(self.params, dist.get_world_size())
        begin, end = shard_bounds(self.flat.numel(), dist.get_world_size(), dist.get_rank())
        self.shard = self.flat[begin:end]
        self.owned = None  # an nn.Parameter: what this rank's optimizer updates


class Frame(nn.Module):
    """What the stages share. A stage says how a unit starts, what a rank owns of it, how its
    gradients are reduced, and what is sent after the optimizer's step."""

    def __init__(self, module):
        super().__init__()
        self.module, self.group = module, dist.group.WORLD
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()
        self.units = [Unit(name, child) for name, child in module.named_children()
                      if list(child.parameters())]
        if sum(len(unit.params) for unit in self.units) < len(list(module.parameters())):
            raise ValueError("every parameter has to be in exactly one child of the module")
        for unit in self.units:
            self.start(unit)
            if (owned := self.own(unit)) is None:
                raise TypeError("own(unit) returns nothing; it returns what the optimizer updates")
            unit.owned = nn.Parameter(owned)
            for p in unit.params:
                p.register_post_accumulate_grad_hook(lambda p, unit=unit: self.on_grad(unit))
        this = weakref.ref(self)  # the hook is torch's, and stays

        def stepped(optimizer, *_):
            if (model := this()) is not None:
                model.on_step(optimizer)

        register_optimizer_step_post_hook(stepped)

    def forward(self, *args):
        return self.module(*args)

    def parameters(self, recurse=True):
        """One for each unit, for the optimizer."""
        return iter([unit.owned for unit in self.units])

    def on_grad(self, unit):
        """Autograd has accumulated one gradient of the unit. With the last one, reduce them."""
        if all(p.grad is not None for p in unit.params):
            grad = torch.cat([p.grad.view(-1) for p in unit.params])
            for p in unit.params:
                p.grad = None
            self.reduce(unit, nn.functional.pad(grad, (0, unit.flat.numel() - grad.numel())))

    def on_step(self, optimizer):
        """Some optimizer has stepped. If it is this model's, everyone may need the result."""
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for unit in self.units:
            if id(unit.owned) in stepped:
                self.after_step(unit)


def flatten(params, world_size):
    """Move the parameters into one flat buffer, which is padded with zeros to a multiple of
    world_size elements; they become views of it. Returns the buffer."""
    numel = sum(p.numel() for p in params)
    flat = params[0].new_zeros(numel + -numel % world_size, requires_grad=False)
    start = 0
    for p in params:
        view = flat[start : start + p.numel()].view(p.shape)
        view.copy_(p.data)
        p.data = view
        start += p.numel()
    return flat


def shard_bounds(numel, world_size, rank):
    """Which of numel elements are this rank's: (begin, end). All shards have ceil(numel /
    world_size) elements, but for the last ones, which have what is left: fewer, or none."""
    size = -(-numel // world_size)
    begin = min(rank * size, numel)
    return begin, min(begin + size, numel)


class Stage0(Frame):
    """Every rank keeps everything, and updates everything."""

    def start(self, unit):
        """Before training: every rank gets rank 0's values."""
        comm.broadcast(unit.flat, self.group, unit=unit.name, phase="init").wait()

    def own(self, unit):
        """What this rank's optimizer updates of the unit's parameters."""
        return unit.flat

    def reduce(self, unit, grad):
        """grad: this rank's gradients of the unit, like unit.flat. The optimizer gets their mean
        over the ranks, as unit.owned.grad."""
        comm.all_reduce(grad, self.group, unit=unit.name, phase="backward",
                        divide_by=self.world_size).wait()
        unit.owned.grad = grad

    def after_step(self, unit):
        """Every rank has updated everything: there is nothing to send."""


class Stage1(Stage0):
    """Every rank updates its shard, and keeps optimizer states for that alone."""

    def own(self, unit):
        return unit.shard

    def reduce(self, unit, grad):
        mine = grad.chunk(self.world_size)[self.rank]
        comm.reduce_scatter(mine, grad, self.group, unit=unit.name, phase="backward",
                            divide_by=self.world_size).wait()
        unit.owned.grad = mine

    def after_step(self, unit):
        comm.all_gather(unit.flat, unit.shard, self.group, unit=unit.name, phase="step").wait()


class Stage2(Stage1):
    """Of the gradients, too, every rank keeps its shard: the full buffer is freed."""

    def reduce(self, unit, grad):
        mine = torch.empty_like(unit.shard)  # memory of its own, which keeps nothing else alive
        comm.reduce_scatter(mine, grad, self.group, unit=unit.name, phase="backward",
                            divide_by=self.world_size).wait()
        unit.owned.grad = mine


class Sharded(Stage2):
    """Of the parameters, too, every rank keeps its shard. The full ones come and go."""

    def own(self, unit):
        unit.shard = unit.shard.clone()  # memory of its own: the flat buffer will be emptied
        return unit.shard

    def gather(self, unit, phase):
        """Give the flat buffer its memory back, and fill it with everyone's shards."""
        unit.flat.untyped_storage().resize_(unit.flat.numel() * unit.flat.element_size())
        comm.all_gather(unit.flat, unit.shard, self.group, unit=unit.name, phase=phase).wait()

    def free(self, unit):
        """Empty the flat buffer's storage, and so all views of it."""
        unit.flat.untyped_storage().resize_(0)

    def state_dict(self, *args, **kwargs):
        for unit in self.units:
            self.gather(unit, "state_dict")
        full = {name: value.clone() for name, value in super().state_dict(*args, **kwargs).items()}
        for unit in self.units:
            self.free(unit)
        return full


class Stage3(Sharded):
    """The full parameters of a unit are there while it computes, and otherwise not."""

    def __init__(self, module):
        super().__init__(module)
        for unit in self.units:
            unit.layer.register_forward_pre_hook(
                lambda layer, args, unit=unit: self.before_forward(unit))
            unit.layer.register_forward_hook(
                lambda layer, args, output, unit=unit: self.after_forward(unit, output))
            self.free(unit)

    def before_forward(self, unit):
        self.gather(unit, "forward")

    def after_forward(self, unit, output):
        self.free(unit)
        if output.requires_grad:  # its gradient is there when the unit's backward begins
            output.register_hook(lambda grad: self.gather(unit, "backward"))

    def reduce(self, unit, grad):
        super().reduce(unit, grad)
        self.free(unit)

    def after_step(self, unit):
        """Everyone gathers what it needs in the next forward: there is nothing to send."""


def wrap(module, stage):
    """Like zero_ref.wrap: train `module` in data parallel at this stage."""
    return {0: Stage0, 1: Stage1, 2: Stage2, 3: Stage3}[stage](module)
