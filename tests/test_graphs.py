"""Graphs that are not one chain: stage 3 asks autograd which calls of a unit backward comes by."""

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
import toy
from test_model import WIDTH, Layer, Stack, compare, data
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy import STAGES, seed

import zero_ref


class Stopped(nn.Module):
    """One unit twice; once its input's gradient is stopped inside of it, as in SimSiam."""

    def __init__(self):
        super().__init__()
        self.first, self.head = Layer(), Layer()
        forward = self.head.forward
        self.head.forward = lambda x, stop=False: forward(x.detach() if stop else x)

    def forward(self, x):
        h = self.first(x)
        return self.head(h, stop=True) - self.head(2 * h)


class Mixed(nn.Module):
    """One unit plainly, and in a re-entrant checkpoint, which has a backward of its own."""

    def __init__(self, order):
        super().__init__()
        self.order, self.first, self.shared = order, Layer(), Layer()

    def forward(self, x):
        x = self.first(x)
        for how in self.order:
            x = self.shared(x) if how == "plain" else checkpoint(
                self.shared, x, use_reentrant=True)
        return x


@pytest.mark.parametrize("cap", [0, 1])
def test_a_gradient_that_is_stopped_inside_of_a_unit(cap):
    compare(Stopped, Layer, bucket_cap_mb=cap)


@pytest.mark.parametrize("cap", [0, 1])
def test_plain_and_checkpointed_again(cap):
    def run(stage):
        seed(0)
        model = zero_ref.wrap(Mixed(["plain", "checkpoint"]), stage, units=Layer,
                              bucket_cap_mb=cap if stage == 3 else 1)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            model(data(step, dist.get_rank())).square().mean().backward()
            opt.step()
            opt.zero_grad()
        return model.state_dict()

    toy.stages_agree(run, 2, stages=(3,) if cap == 0 else STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_rank_keeps_of_outputs_decides_nothing(stage):
    """Forwards with a graph and no backward, whose outputs rank 0 holds, and units of one size."""
    def run():
        seed(0)
        model = zero_ref.wrap(Stack([Layer(), Layer(), Layer()]), stage, bucket_cap_mb=0)
        kept = []
        for step in range(3):
            kept.append(model(data(step + 9, dist.get_rank())))
            if dist.get_rank():
                kept.clear()
                gc.collect()
            with zero_ref.trace() as t:
                model(data(step, dist.get_rank())).square().mean().backward()
        return [(e.op, e.unit) for e in t.events], {
            name: p.grad.tolist() for name, p in model.named_parameters()}

    (events, _), (others, _) = toy.ranks(run, 2)
    assert events == others


@pytest.mark.parametrize("stage", STAGES)
def test_a_backward_from_a_captured_input_goes_through_no_unit(stage):
    def run():
        net = Stack([Layer(), Layer()])
        model, kept = zero_ref.wrap(net, stage, bucket_cap_mb=0), []
        net.layers[1].register_forward_pre_hook(lambda m, args: kept.append(args[0]))
        model(data(0, dist.get_rank()))
        kept[0].square().mean().backward()
        return [p.grad is not None and p.grad.as_subclass(torch.Tensor).abs().sum().item() > 0
                for name, p in model.named_parameters() if name.startswith("layers.0.a")]

    by_rank = toy.ranks(run, 2)
    assert [any(ranks) for ranks in zip(*by_rank)] == [True, True]  # on the rank that has a part


@pytest.mark.parametrize("stage", STAGES)
def test_a_module_may_take_what_is_no_tensor(stage):
    class TakesAnything(Layer):
        def forward(self, x, array, table):
            assert array.shape == (2,) and table == {}
            return super().forward(x)

    def run():
        model = zero_ref.wrap(TakesAnything(), stage)
        model(torch.ones(2, WIDTH), np.array([1, 2]), {}).sum().backward()

    toy.ranks(run, 2)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("on purpose")


class FailingLayer(Layer):
    def forward(self, x):
        return Fails.apply(super().forward(x))


@pytest.mark.parametrize("stage", STAGES)
def test_a_failed_backward_keeps_no_memory(stage):
    def run():
        model = zero_ref.wrap(Stack([Layer(), FailingLayer(), Layer()]), stage, bucket_cap_mb=0)
        unit = weakref.ref(model.units[-1])
        with pytest.raises(ArithmeticError, match="on purpose"):
            model(data(0, 0)).sum().backward()
        assert unit() is not None
        del model
        gc.collect()
        return unit() is None

    assert toy.ranks(run, 2) == [True, True]


@pytest.mark.parametrize("stage", STAGES)
def test_a_write_to_the_optimizers_parameters_is_in_the_next_state_dict(stage):
    def run():
        seed(0)
        model = zero_ref.wrap(Layer(), stage)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(3.0)
        return all((value == 3).all() for value in model.state_dict().values())

    assert toy.ranks(run, 3) == [True] * 3


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_torchs_clipping_is_refused_in_a_closure_too(stage):
    def run():
        model = zero_ref.wrap(Layer(), stage)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)

        def closure():
            opt.zero_grad(set_to_none=False)
            loss = model(data(0, dist.get_rank())).sum()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            return loss

        model(data(0, dist.get_rank())).sum().backward()
        opt.step(closure)

    with pytest.raises(zero_ref.RankError, match=r"use model.clip_grad_norm_\(max_norm\)"):
        toy.ranks(run, 2)
