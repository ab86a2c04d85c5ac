"""Random module trees: the same bits at every stage and on every rank, and what torch DDP computes.

What is drawn is a plain description, from which every rank builds its module.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from random import Random
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import toy
from hypothesis import HealthCheck, Phase, assume, find, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import zero_ref
from zero_ref import partition
from zero_ref.engine import clip
from zero_ref.stage1 import Stage1

USED = {  # in which forwards of a run a parameter is used
    "always": lambda now: True,
    "never": lambda now: False,
    "in even forwards": lambda now: now.forward % 2 == 0,
    "on rank 0": lambda now: now.rank == 0,
}


@dataclass(frozen=True)
class Param:
    shape: tuple[int, ...]
    used: str
    frozen: bool
    tie: int  # those with the same number, except 0, and the same shape are one nn.Parameter


@dataclass(frozen=True)
class Node:
    params: tuple[Param, ...]
    children: tuple["Node", ...]
    holder: str  # what the children hang in
    calls: tuple[int, ...] | None  # which children are called, in this order; None: each once
    parallel: bool  # whether all of them get the same input
    checkpoint: bool
    unit: bool
    holder_unit: bool  # if that is an nn.Sequential
    share: int  # nodes with the same number, except 0, are one module


@dataclass(frozen=True)
class Example:
    width: int
    tree: Node
    world_size: int
    default_units: bool
    options: dict
    optimizer: str
    micro: int
    sync_all: bool
    clip: float | None
    set_to_none: bool


# ---- the module and its training -----------------------------------------------------------------


class Module(nn.Module):
    """(rows, width) -> (rows, width)."""

    def __init__(self, spec, now, tied, shared):
        super().__init__()
        self.spec, self.now, self.unit = spec, now, spec.unit
        for i, p in enumerate(spec.params):
            param = nn.Parameter(torch.randn(p.shape) / 2 + (p.shape == ()), not p.frozen)
            if p.tie:
                param = tied.setdefault((p.tie, p.shape), param)
            self.register_parameter(f"p{i}", param)
        children = [build(child, now, tied, shared) for child in spec.children]
        order = range(len(children)) if spec.calls is None or not children else spec.calls
        self.called = [children[i % len(children)] for i in order]  # a list: nothing hangs in it
        if spec.holder == "attributes":
            for i, child in enumerate(children):
                self.add_module(f"child{i}", child)
        elif spec.holder == "ModuleList":
            self.inner = nn.ModuleList(children)
        else:
            self.inner = nn.Sequential(*children)
            self.inner.unit = spec.holder_unit
            self.called = [self.inner]

    def forward(self, x):
        for i, p in enumerate(self.spec.params):
            if USED[p.used](self.now):
                x = apply(getattr(self, f"p{i}"), x)
        outputs = []
        for child in self.called:
            outputs.append(self.call(child, x))
            x = x if self.spec.parallel else outputs[-1]
        return sum(outputs, x) if self.spec.parallel else x

    def call(self, child, x):
        if self.spec.checkpoint:
            return checkpoint(child, x, use_reentrant=False)
        return child(x)


def apply(p, x):
    if p.numel() == 0:
        return x + p.sum()
    if p.dim() == 1:
        return x + p
    return torch.tanh(x @ p.t() @ p if p.dim() == 2 else x * p)  # bounded, however often it is used


def build(spec, now, tied, shared):
    if spec.share not in shared:
        module = Module(spec, now, tied, shared)
        if not spec.share:
            return module
        shared.setdefault(spec.share, module)
    return shared[spec.share]


def build_on(rank, example):
    toy.seed(rank)  # different initial values on every rank
    now = SimpleNamespace(rank=rank, forward=0)
    return build(example.tree, now, {}, {}), now


def train(model, now, example):
    """Two steps on this rank. Returns the losses and the norms."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    first, others = [[p for name, p in named if name.endswith("0") == is_first]
                     for is_first in (True, False)]
    groups = [{"params": first, "lr": 0.05, "weight_decay": 0.1}, {"params": others, "lr": 0.1}]
    sgd = partial(torch.optim.SGD, momentum=0.9)
    opt = (sgd if example.optimizer == "sgd" else torch.optim.AdamW)(groups, weight_decay=0.01)
    on_bare = partial(nn.utils.clip_grad_norm_, list(model.parameters()))
    losses, norms = [], []
    for now.forward in range(2 * example.micro):
        data = torch.Generator().manual_seed(10 * now.forward + now.rank)
        x, y = torch.randn(2, 3, example.width, generator=data)
        last = (now.forward + 1) % example.micro == 0
        with nullcontext() if last or example.sync_all else model.no_sync():
            loss = (model(x) - y).square().mean() / example.micro
            loss.backward()
        losses.append(loss.detach())
        if last:
            if example.clip:
                norms.append(getattr(model, "clip_grad_norm_", on_bare)(example.clip))
            opt.step()
            model.zero_grad(example.set_to_none)
    return losses, norms


def run(stage, example, patch=nullcontext):
    module, now = build_on(dist.get_rank(), example)
    module.unit = True  # so that there is one
    units = None if example.default_units else lambda m: getattr(m, "unit", False)
    with patch():
        model = (DistributedDataParallel(module, find_unused_parameters=True) if stage == "ddp"
                 else zero_ref.wrap(module, stage, units=units, **example.options))
        losses, norms = train(model, now, example)
    weights = (module if stage == "ddp" else model).state_dict()
    return {"weights": weights, "losses": losses, "norms": norms}


def check(example, patch=nullcontext):
    toy.stages_agree(run, example.world_size, example, patch)
    if example.optimizer == "sgd":  # AdamW makes large steps of gradients that are all rounding
        by_rank = toy.ranks(lambda: (run(3, example, patch), run("ddp", example)),
                            example.world_size, dtype=torch.float64)
        for ours, ddp in by_rank:
            assert toy.close(ours["weights"], ddp["weights"])
            for kind in ("losses", "norms"):
                mine, theirs = (list(map(float, run[kind])) for run in (ours, ddp))
                assert mine == pytest.approx(theirs, rel=1e-10)


# ---- what is drawn -------------------------------------------------------------------------------


seldom = st.sampled_from([False, False, True])


def tuples(elements, least, most):
    return st.lists(elements, min_size=least, max_size=most).map(tuple)


def nodes(width, depth, alike):
    """alike: whether every rank uses the same parameters. If not, nothing is checkpointed: what is
    computed once more, and so gathered, would depend on the rank."""
    shapes = st.tuples(st.integers(1, 9), st.just(width)) | st.sampled_from(
        [(), (width,), (0, width)])
    used = st.just("always") | st.sampled_from(list(USED)[: 3 if alike else 4])
    param = st.builds(Param, shapes, used, frozen=seldom, tie=st.sampled_from([0, 1]))
    children = tuples(nodes(width, depth - 1, alike), 1, 3) if depth else st.just(())
    return st.builds(
        Node, tuples(param, 0, 3), children,
        holder=st.sampled_from(["attributes", "ModuleList", "Sequential"]),
        calls=st.none() | tuples(st.integers(0, 2), 2, 4), parallel=st.booleans(),
        checkpoint=seldom if alike else st.just(False), unit=seldom.map(lambda value: not value),
        holder_unit=st.booleans(), share=st.sampled_from([0] * 4 + [1, 2]))


@st.composite
def examples(draw):
    width = draw(st.integers(1, 9))
    options = st.fixed_dictionaries(
        {name: st.booleans() for name in ("overlap", "reshard_after_forward", "check")})
    return draw(st.builds(
        Example, st.just(width), nodes(width, depth=2, alike=draw(st.booleans())),
        world_size=st.sampled_from([3, 2, 1]), default_units=seldom, options=options,
        optimizer=st.sampled_from(["sgd", "adamw"]), micro=st.integers(1, 2),
        sync_all=st.booleans(), clip=st.sampled_from([None, 0.1, 1.0]), set_to_none=st.booleans()))


def can_train(example):
    """Whether every forward has something to train, and each module's input and output need a
    gradient on all ranks or on none: stage 3 gathers and reduces when backward comes by."""
    by_rank = []
    for rank in range(2):
        module, now = build_on(rank, example)
        if not any(p.requires_grad and p.numel() for p in module.parameters()):
            return False
        seen = []
        for m in module.modules():
            m.register_forward_hook(lambda m, args, output, seen=seen: seen.append(
                (args[0].requires_grad, output.requires_grad)))
        for now.forward in range(2):
            if not module(torch.ones(1, example.width)).requires_grad:
                return False
        by_rank.append(seen)
    return by_rank[0] == by_rank[1]


# The same examples in every run.
SETTINGS = settings(max_examples=60, derandomize=True, database=None, deadline=None,
                    suppress_health_check=list(HealthCheck))


@SETTINGS
@given(examples())
def test_random_models(example):
    assume(can_train(example))
    check(example)


BROKEN = {
    "weight decay of what no rank uses": (partition, "nobody_had_it", lambda *args: False),
    "no gather after the step": (Stage1, "_after_step", lambda *args: None),
    "norms of this rank's slices": (clip, "comm", SimpleNamespace(
        all_reduce=lambda *args, **kwargs: SimpleNamespace(wait=lambda: None))),
}


@pytest.mark.parametrize("what", BROKEN)
def test_random_models_find_a_broken_engine(what):
    def fails(example):
        if can_train(example):
            try:
                check(example, lambda: mock.patch.object(*BROKEN[what]))
            except AssertionError:
                return True
        return False

    find(examples(), fails, settings=settings(SETTINGS, derandomize=False, phases=[Phase.generate]),
         random=Random(0))
