"""The solutions of the deep dives' exercises keep the promises of the stages, and what is observed
of them is what is sent and held."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import zero_ref
from zero_ref import comm, course, memory
from zero_ref.labs import on_variants, small


def weights_of(model):
    return {name.removeprefix("module."): value for name, value in model.state_dict().items()}


def trained(model, step_of, steps=3, dtype=torch.float32):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(steps):
        step_of(model, step, dtype)
        held = memory.resident(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model), held


def one_batch(model, step, dtype):
    images, labels = course.batch(step, dist.get_rank())
    F.cross_entropy(model(images.to(dtype)), labels).backward()


def four_batches(model, step, dtype):
    batches = [course.batch(4 * step + i, dist.get_rank()) for i in range(4)]
    if isinstance(model, on_variants.Accumulating):
        model.accumulate(batches)
    else:
        for images, labels in batches:
            (F.cross_entropy(model(images), labels) / 4).backward()


def tied(how):
    net = on_variants.tied(seed=dist.get_rank())
    if how == "zero_ref":
        return trained(zero_ref.wrap(net, 0, bucket_cap_mb=0), one_batch)[0]
    trained(small.Stage1(on_variants.Assigned(net, on_variants.units_of(net))), one_batch)
    return net.state_dict()


@pytest.mark.parametrize("world_size", [3, 4])
def test_units_of_a_tied_model_have_the_package_s_bits(world_size):
    ours = zero_ref.launch(tied, world_size, "zero_ref")
    mine = zero_ref.launch(tied, world_size, "small")
    assert course.same_bits(ours[0], *ours, *mine)
    assert torch.equal(mine[0]["1.1.weight"], mine[0]["6.1.weight"])


def accumulated(how):
    net = course.build(seed=dist.get_rank())
    model = (on_variants.Accumulating(net) if how == "small" else
             zero_ref.wrap(net, 2, bucket_cap_mb=0))
    with zero_ref.trace() as sent:
        weights, held = trained(model, four_batches)
    return weights, held, Counter(event.op for event in sent.events if event.phase != "init")


@pytest.mark.parametrize("world_size", [2, 4])
def test_accumulation_has_the_package_s_bits_bytes_and_collectives(world_size):
    ours = zero_ref.launch(accumulated, world_size, "zero_ref")
    mine = zero_ref.launch(accumulated, world_size, "small")
    for (weights, held, ops), (their_weights, their_held, their_ops) in zip(ours, mine):
        assert course.same_bits(weights, their_weights)
        assert held["optimizer"] == their_held["optimizer"]
        assert their_held["gradients"] == 4 * 1632 // world_size
        assert {op: ops[op] for op in their_ops} == their_ops


def two_levels():
    torch.manual_seed(dist.get_rank())
    flat = torch.randn(16, dtype=torch.float64)
    plain = flat.clone()
    comm.all_reduce(plain, dist.group.WORLD, unit="flat", phase="backward", divide_by=4).wait()
    with zero_ref.trace() as sent, on_variants._messages() as messages:
        on_variants.all_reduce_on_two_levels(flat)
    return flat, plain, sent.wire_bytes(), messages


def test_two_levels_give_the_mean_and_messages_are_those_of_the_trace():
    ranks = zero_ref.launch(two_levels, 4)
    for flat, plain, wire_bytes, messages in ranks:
        assert torch.equal(flat, ranks[0][0])
        assert torch.allclose(flat, plain, rtol=0, atol=1e-15)
        assert sum(messages.values()) == wire_bytes == 2 * 3 * flat.nbytes // 4


def hybrid(how):
    net = course.build(seed=dist.get_rank()).double()
    model = (on_variants.Hybrid(net) if how == "small" else
             zero_ref.wrap(net, 3, bucket_cap_mb=0))
    return trained(model, one_batch, dtype=torch.float64)


def test_hsdp_trains_like_stage_3_and_holds_what_half_the_ranks_hold():
    ours, mine = zero_ref.launch(hybrid, 4, "zero_ref"), zero_ref.launch(hybrid, 4, "small")
    wanted = memory.model_states([[256, 16]] * 6, 2, 3, param_dtype=torch.float64,
                                 grad_dtype=torch.float64, optimizer_dtypes=[torch.float64] * 2)
    assert course.same_bits(*[weights for weights, _ in mine])
    for name, value in mine[0][0].items():
        assert torch.allclose(value, ours[0][0][name], rtol=0, atol=1e-9)
    assert [held for _, held in mine] == [wanted] * 4
