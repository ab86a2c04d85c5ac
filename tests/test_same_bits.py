"""Promise 2: the same bits at every stage, and the right ones."""

from unittest import mock

import pytest
import torch
import toy
from toy import STAGES, seed

import zero_ref
from zero_ref import comm
from zero_ref.engine import transport

PLAIN = {"norm": False}  # BatchNorm sees another batch on one process


@pytest.mark.parametrize("optimizer", toy.OPTIMIZERS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_all_stages_equal_each_other_torch_ddp_and_one_process(world_size, optimizer):
    toy.stages_agree(toy.run, world_size, optimizer)
    ours = toy.stages_agree(toy.run, world_size, optimizer, toy=PLAIN, dtype=torch.float64)[0][0]
    ddp = toy.ranks(toy.torch_ddp, world_size, optimizer, toy=PLAIN, dtype=torch.float64)[0]
    alone = toy.in_float64(toy.single_process, optimizer, world_size=world_size, toy=PLAIN)
    assert toy.close(ours["weights"], ddp)
    assert toy.close(ours["weights"], alone)


@pytest.mark.parametrize("optimizer", toy.OPTIMIZERS)
def test_one_rank_equals_one_process(optimizer):
    alone = toy.in_float64(toy.single_process, optimizer)
    ours = toy.stages_agree(toy.run, 1, optimizer, dtype=torch.float64)[0][0]
    assert toy.close(ours["weights"], alone)


def test_training_changes_every_trainable_parameter_and_no_frozen_one():
    before = toy.build().state_dict()
    for after in toy.ranks(toy.run_stages, 3, STAGES)[2]:
        for name, value in after["weights"].items():
            changed = (value != before[name]).all() if value.dim() < 2 else (
                (value != before[name]).any(dim=1).all())  # every row
            assert changed == (name != "blocks.3.weight"), name


@pytest.mark.parametrize("world_size", [2, 3])
def test_batch_norm_follows_ddp(world_size):
    # SGD: what comes before BatchNorm has shifts whose gradient is all rounding, and Adam would
    # make large steps of it.
    ours = toy.stages_agree(toy.run, world_size, "sgd", dtype=torch.float64)
    ddp = toy.ranks(toy.torch_ddp, world_size, "sgd", dtype=torch.float64)
    for mine, theirs in zip(ours, ddp):
        assert toy.close(mine[3]["weights"], theirs)  # buffers of every rank included


@pytest.mark.parametrize("world_size", [2, 4])
def test_without_overlap(world_size):
    with_overlap = toy.stages_agree(toy.run, world_size)
    without = toy.stages_agree(toy.run, world_size, overlap=False)
    assert toy.equal(with_overlap[0][0]["weights"], without[0][0]["weights"])


def test_without_reshard_after_forward():
    kept = toy.ranks(toy.run, 3, 3, reshard_after_forward=False)
    assert toy.equal(kept[0]["weights"], toy.ranks(toy.run, 3, 0)[0]["weights"])


@pytest.mark.parametrize("units", [
    toy.Block, (toy.Block, toy.Scale), toy.Toy,
    lambda m: not any(m.children()),  # every leaf
    lambda m: isinstance(m, torch.nn.Linear) and m.bias is None,  # the tied head among them
])
def test_any_choice_of_units(units):
    toy.stages_agree(toy.run, 3, units=units)


@pytest.mark.parametrize("sync_all", [True, False])
def test_gradient_accumulation(sync_all):
    by_rank = toy.stages_agree(toy.run, 3, micro=3, sync_all=sync_all, clip=(0.5,))
    assert by_rank[0][0]["norms"][0] > 0.5  # or clipping did nothing


@pytest.mark.parametrize("norm_type", [1, 2, 3, float("inf")])
def test_clipping_by_the_global_norm(norm_type):
    limit = 1e-3
    toy.stages_agree(toy.run, 3, clip=(limit, norm_type), toy=PLAIN)
    ours = toy.stages_agree(toy.run, 3, clip=(limit, norm_type), toy=PLAIN, dtype=torch.float64)

    def alone():
        module = toy.build(**PLAIN)
        x, y = toy.whole_batch(0, 3)
        torch.nn.functional.cross_entropy(module(x), y).backward()
        return torch.nn.utils.clip_grad_norm_(module.parameters(), limit, norm_type).item()

    whole = toy.in_float64(alone)
    assert ours[0][0]["norms"][0].item() == pytest.approx(whole, rel=1e-10)
    assert whole > limit


def unused(stage):
    """A parameter that no rank uses, and one that only rank 1 uses."""
    rank = torch.distributed.get_rank()
    seed(rank)
    module = torch.nn.ModuleDict({k: torch.nn.Linear(3, 3) for k in ("used", "rank1", "never")})
    module.forward = lambda x: module["rank1"](module["used"](x)) if rank else module["used"](x)
    # At stage 3 all ranks have to run the same units: here the root is the only one.
    model = zero_ref.wrap(module, stage, units=None if stage == 3 else torch.nn.Linear)
    opt = torch.optim.Adam(model.parameters())
    for _ in range(2):
        model(torch.ones(2, 3) + rank).sum().backward()
        opt.step()
        opt.zero_grad()
    return model.state_dict()


def test_parameters_without_a_gradient_do_not_hang():
    reference = toy.stages_agree(unused, 2)[0][0]
    seed(0)
    initial = {k: torch.nn.Linear(3, 3) for k in ("used", "rank1", "never")}
    assert not torch.equal(reference["rank1.weight"], initial["rank1"].weight)
    assert torch.equal(reference["never.weight"], initial["never"].weight)


def two_optimizers(stage):
    model = zero_ref.wrap(toy.build(torch.distributed.get_rank()), stage)
    named = dict(model.named_parameters())
    opts = [torch.optim.Adam([p for n, p in named.items() if ("bias" in n) == bias])
            for bias in (True, False)]
    for step in range(4):
        x, y = toy.batch(step, torch.distributed.get_rank())
        torch.nn.functional.cross_entropy(model(x), y).backward()
        opts[step % 2].step()
        model.zero_grad()
    return model.state_dict()


def test_two_optimizers_take_turns():
    toy.stages_agree(two_optimizers, 3)


def checkpointed(stage, reentrant):
    module = toy.build(torch.distributed.get_rank(), frozen=False)

    def forward(ids):
        x = module.token(ids)
        for block in module.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
        return module.head(module.norm(x))

    if reentrant is not None:
        module.forward = forward
    model = zero_ref.wrap(module, stage)
    opt = torch.optim.Adam(model.parameters())
    with zero_ref.trace() as t:
        for step in range(2):
            x, y = toy.batch(step, torch.distributed.get_rank())
            torch.nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
    return model.state_dict(), [(e.op, e.unit, e.phase) for e in t.events]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_activation_checkpointing(stage, reentrant):
    plain, events = toy.ranks(checkpointed, 2, stage, None)[0]
    recomputed, events_recomputed = toy.ranks(checkpointed, 2, stage, reentrant)[0]
    assert toy.equal(plain, recomputed)
    if (stage, reentrant) != (3, True):  # there, recomputing a unit gathers it once more
        assert events == events_recomputed


def built_in(stage):
    """toy.run with the built-in collectives, as on NCCL: here gloo's."""
    with (mock.patch.object(transport, "on_gloo", lambda device, group: False),
          mock.patch.object(transport.dist, "all_to_all_single",
                            wraps=transport.dist.all_to_all_single) as called):
        run = toy.run(stage, "sgd", clip=(0.5,))
    assert called.call_count
    return run


@pytest.mark.parametrize("stage", STAGES)
def test_with_the_built_in_collectives(stage):
    """The same bits: they send, and the sum is taken here."""
    ours = toy.ranks(toy.run, 3, stage, "sgd", clip=(0.5,))
    for run, reference in zip(toy.ranks(built_in, 3, stage), ours):
        assert toy.equal(run["weights"], reference["weights"])
        assert all(event.start <= event.end for event in run["events"])


def many_at_once():
    """More all_reduces than a rank starts at one time, while the ranks are out of step."""
    group = torch.distributed.group.WORLD
    rank = torch.distributed.get_rank()
    buffers = [torch.full((3 * (i % 5 + 1),), float(rank + i)) for i in range(200)]
    handles = []
    for i, buffer in enumerate(buffers):
        handles.append(comm.all_reduce(buffer, group, unit=str(i), phase="test"))
        if i % (7 + rank) == 0:
            handles[-1].wait()
    for handle in handles:
        handle.wait()
    return [buffer.unique().tolist() for buffer in buffers]


def test_ranks_may_be_out_of_step():
    for results in toy.ranks(many_at_once, 3):
        assert results == [[3.0 * i + 3] for i in range(200)]
