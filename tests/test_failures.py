"""When something goes wrong, every rank ends soon and says where."""

import os
import time
from functools import cache
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import toy
from torch import nn
from torch.utils.data import DataLoader, Dataset
from toy import STAGES, seed

import zero_ref
from zero_ref import comm, memory
from zero_ref.engine import check

WIDTH = 5


class FailInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fail):
        ctx.fail = fail
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        if ctx.fail():
            raise ArithmeticError("in backward, on purpose")
        return grad, None


class Layer(nn.Module):
    """Fails in forward or backward when it is told to."""

    def __init__(self):
        super().__init__()
        self.linear, self.fail = nn.Linear(WIDTH, WIDTH), None

    def forward(self, x):
        if self.fail == "forward":
            raise ArithmeticError("in forward, on purpose")
        return FailInBackward.apply(torch.tanh(self.linear(x)), lambda: self.fail == "backward")


def build():
    seed(0)
    return nn.Sequential(*[Layer() for _ in range(4)])


def data(step):
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(step + dist.get_rank()))


class BrokenData(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            raise ArithmeticError("in the data, on purpose")
        return torch.ones(WIDTH)


# ---- an exception on one rank --------------------------------------------------------------------


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_exception_on_one_rank_ends_all_and_names_the_unit(stage, where):
    def train():
        net = build()
        model = zero_ref.wrap(net, stage, bucket_cap_mb=0)
        if dist.get_rank() == 1:
            net[2].fail = where
        model(data(0)).sum().backward()
        model(data(1)).sum().backward()

    start = time.monotonic()
    with pytest.raises(zero_ref.RankError, match=f"in {where}, on purpose") as error:
        toy.ranks(train, 3)
    text = str(error.value)
    assert error.value.rank == 1 and error.value.kind == "ArithmeticError"
    assert "Traceback" in text
    assert f"This was in the {where} of unit '2', at stage {stage}, on rank 1." in text
    assert time.monotonic() - start < 15


def test_an_exception_in_the_data_of_one_rank():
    def train():
        model = zero_ref.wrap(build(), 2)
        loader = DataLoader(BrokenData() if dist.get_rank() == 2 else [torch.ones(WIDTH)] * 4)
        for x in loader:
            model(x).sum().backward()

    with pytest.raises(zero_ref.RankError, match="in the data, on purpose") as error:
        toy.ranks(train, 3)
    assert error.value.rank == 2 and "__getitem__" in str(error.value)


# ---- an exception that all ranks share, and that the loop survives -------------------------------


def survive(stage, failures, zero_grad_of="optimizer"):
    """Good steps, with failures that are caught between them."""
    net = build()
    model = zero_ref.wrap(net, stage)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(i):
        model(data(i)).square().mean().backward()
        opt.step()
        opt.zero_grad()

    step(0)
    for where, layer in failures:
        net[layer].fail = where
        with pytest.raises(ArithmeticError, match=f"in {where}, on purpose"):
            model(data(7)).sum().backward()
        net[layer].fail = None
        (opt if zero_grad_of == "optimizer" else model).zero_grad()
    step(1)
    step(2)
    return {"weights": model.state_dict(), "held": memory.resident(model, opt)}


@cache
def undisturbed():
    return toy.stages_agree(survive, 2, [])


@pytest.mark.parametrize("zero_grad_of", ["optimizer", "model"])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_the_next_good_step_is_right_and_nothing_leaks(layer, where, zero_grad_of):
    survived = toy.stages_agree(survive, 2, [(where, layer)] * 3, zero_grad_of)
    assert toy.equal(survived[0][0]["weights"], undisturbed()[0][0]["weights"])
    for after, expected in zip(survived, undisturbed()):
        assert [run["held"] for run in after] == [run["held"] for run in expected]


# ---- ranks that diverge --------------------------------------------------------------------------


class Branch(nn.Module):
    """Runs one of two units, as each rank decides."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.which = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), "a"

    def forward(self, x):
        return getattr(self, self.which)(x)


def diverge(stage, how, timeout=2.0, from_env=False):
    """One good step, then something that only rank 1 does."""
    rank = dist.get_rank()
    seed(0)
    net = nn.Sequential(Branch(), nn.Linear(WIDTH, WIDTH))
    with mock.patch.dict(os.environ, {"ZERO_REF_CHECK": "1"} if from_env else {}):
        model = zero_ref.wrap(net, stage, units=nn.Linear, check=not from_env, bucket_cap_mb=0)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with mock.patch.object(check, "timeout", lambda: timeout):
        for i in range(2 + (how == "one turn more" and rank == 1)):
            if i == 1 and how == "branch" and rank == 1:
                net[0].which = "b"
            model(data(i)).square().mean().backward()
            if i == 1 and how == "no step" and rank == 1:
                break
            opt.step()
            opt.zero_grad()
    return "through"


def gathers_texts():
    model = zero_ref.wrap(nn.Linear(WIDTH, WIDTH), 1, check=True)
    return comm.all_gather_object("x" * dist.get_rank(), model.group, phase="report")


def test_what_ranks_tell_each_other_may_differ_in_length():
    assert toy.ranks(gathers_texts, 2) == [["", "x"]] * 2


def test_another_branch():
    """Stages 0 to 2 reduce all units in any case; stage 3 has to gather, and says who is where."""
    for stage in (0, 1, 2):
        assert toy.ranks(diverge, 2, stage, "branch") == ["through"] * 2
    with pytest.raises(zero_ref.RankError, match="the ranks diverge") as error:
        toy.ranks(diverge, 2, 3, "branch")
    assert "rank 0 to all_gather '0.a' in phase 'forward'" in str(error.value)
    assert "rank 1 to all_gather '0.b' in phase 'forward'" in str(error.value)


@pytest.mark.parametrize("stage", STAGES)
def test_one_turn_more(stage):
    start = time.monotonic()
    missing = "rank 0 is missing: rank 1 is about to"
    with pytest.raises(zero_ref.RankError, match=missing) as error:
        toy.ranks(diverge, 2, stage, "one turn more")
    text = str(error.value)
    assert error.value.rank == 1
    assert "which before that went to" in text and time.monotonic() - start < 15


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_that_one_rank_leaves_out(stage):
    with pytest.raises(zero_ref.RankError, match="rank 1 is missing: rank 0 is about to all_gath"):
        toy.ranks(diverge, 2, stage, "no step", from_env=True)


@pytest.mark.parametrize("stage", STAGES)
def test_checking_changes_nothing(stage):
    for checked, plain in toy.ranks(
            lambda: (toy.run(stage, check=True), toy.run(stage)), 3):
        assert toy.equal(checked["weights"], plain["weights"])
        assert checked["wire_bytes"] == plain["wire_bytes"]


def test_checking_ends_with_its_model():
    def run():
        model = zero_ref.wrap(build(), 1, check=True)
        on = len(check._checkers)
        del model
        return on, len(check._checkers)

    assert toy.ranks(run, 2) == [(1, 0)] * 2
