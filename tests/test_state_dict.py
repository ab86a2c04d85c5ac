"""Full parameters and state dicts: what comes out of a wrapped model, and what goes in again."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
import toy
from torch import nn
from toy import STAGES

import zero_ref
from zero_ref import memory


def train(model, steps=2):
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        x, y = toy.batch(step, dist.get_rank())
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()


# ---- full_params() -------------------------------------------------------------------------------


def in_full(stage):
    """Train, read and write in full_params(), which an exception leaves too, and train on."""
    rank = dist.get_rank()
    model = zero_ref.wrap(toy.build(rank, norm=False), stage)
    train(model)
    with model.full_params():
        weight = model.module.blocks[0].up.weight
        weight.fill_(rank + 0.5)  # rank 0's is kept
        with model.full_params():
            inside = model.state_dict()
        output = model.module(toy.batch(0, 0)[0])  # the bare module works in here
    with pytest.raises(KeyError, match="on purpose"), model.full_params():
        model.module.blocks[1].weight.mul_(2)
        raise KeyError("on purpose")
    after = model.state_dict()
    assert (after["blocks.0.up.weight"] == 0.5).all()
    assert torch.equal(after["blocks.1.weight"], 2 * inside["blocks.1.weight"])
    train(model)
    return {"weights": model.state_dict(), "losses": output.flatten(),
            "held": memory.resident(model)["parameters"]}


def test_full_params():
    for stages in toy.stages_agree(in_full, 2):
        held = [run["held"] for run in stages]
        assert held[0] == held[1] == held[2] == 2 * held[3]  # sharded again


@pytest.mark.parametrize("precision", [None, zero_ref.MixedPrecision(keep=toy.Scale)])
@pytest.mark.parametrize("stage", STAGES)
def test_a_copy_of_the_gathered_module_lives_on_its_own(stage, precision):
    def copy_and_use():
        model = zero_ref.wrap(toy.build(norm=False, frozen=precision is None), stage,
                              mixed_precision=precision)
        with model.full_params():
            twin = copy.deepcopy(model.module)
        with io.BytesIO() as file:
            torch.save(twin, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        if dist.get_rank() == 0:  # would hang if it communicated
            twin(toy.batch(0, 0)[0]).sum().backward()
            assert twin.blocks[1].weight.grad is not None
        train(model)

    toy.ranks(copy_and_use, 2)


# ---- state dicts ---------------------------------------------------------------------------------


def round_trip(stage, other):
    rank = dist.get_rank()
    model = zero_ref.wrap(toy.build(rank), stage)
    saved = model.state_dict()
    bare = toy.build(99)
    bare.load_state_dict(saved)
    torch.manual_seed(rank + 50)
    again = zero_ref.wrap(toy.Toy(), other)
    again.load_state_dict(bare.state_dict())
    assert toy.equal(again.state_dict(), saved, toy.LOCAL if rank else ())
    for wrapped in (model, again):  # both can train on
        train(wrapped, steps=1)
    assert toy.equal(again.state_dict(), model.state_dict(), toy.LOCAL if rank else ())
    assert not toy.equal(again.state_dict(), saved)
    with pytest.raises(RuntimeError, match=r'Missing key.*"blocks.1.weight"'):
        again.load_state_dict({k: v for k, v in saved.items() if k != "blocks.1.weight"})


@pytest.mark.parametrize("stage, other", [(0, 3), (3, 0), (1, 2), (2, 3), (3, 3)])
def test_state_dicts_fit_the_bare_module_and_every_stage(stage, other):
    toy.ranks(round_trip, 3, stage, other)


def test_names_with_a_prefix():
    def names():
        model = zero_ref.wrap(toy.build(), 1)
        inside_another = nn.ModuleDict({"m": model})
        return [[name for name, _ in named]
                for named in (model.named_parameters("m"), inside_another.named_parameters())]

    with_prefix, inside_another = toy.ranks(names, 1)[0]
    assert "m.blocks.1.weight" in with_prefix
    assert {"m.blocks.1.weight", "m.module.blocks.1.weight"} & {*inside_another}
