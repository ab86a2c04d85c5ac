"""Mixed precision: compute with 16 bits, update with 32."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import toy
from torch import nn
from toy import STAGES, seed

import zero_ref
from zero_ref import MixedPrecision, memory

BF16 = MixedPrecision(torch.bfloat16)
PLAIN = {"norm": False}


# ---- the same bits, and the right ones -----------------------------------------------------------


@pytest.mark.parametrize("precision", [
    BF16,
    MixedPrecision(torch.bfloat16, torch.bfloat16),
    MixedPrecision(torch.float16, torch.float32),
    MixedPrecision(torch.bfloat16, keep=(nn.BatchNorm1d, toy.Scale)),
    MixedPrecision(torch.float32),
], ids=str)
@pytest.mark.parametrize("world_size", [2, 3])
def test_all_stages_agree(world_size, precision):
    weights = toy.stages_agree(toy.run, world_size, "adamw", micro=2, clip=(0.5,),
                               mixed_precision=precision)[0][0]["weights"]
    # The master copy's values; a frozen weight has none.
    low = [name for name, v in weights.items() if v.dtype.itemsize == 2]
    assert low == ["blocks.3.weight"] * (precision.param_dtype != torch.float32)


def by_hand(steps=3, world_size=1, keep=()):
    """What mixed precision means, written out for one process: (weights, bf16 weights)."""
    module, low = toy.build(**PLAIN, frozen=False), toy.build(**PLAIN, frozen=False)
    master = dict(module.named_parameters())
    opt = torch.optim.AdamW(master.values(), lr=0.01, weight_decay=0.1)
    low = low.bfloat16()
    for step in range(steps):
        grads = []
        for rank in range(world_size):
            low.zero_grad()
            x, y = toy.batch(step, rank)
            F.cross_entropy(low(x), y).backward()
            grads.append({name: p.grad.float() for name, p in low.named_parameters()})
        for name, p in master.items():
            p.grad = sum((g[name] for g in grads[1:]), grads[0][name]) / world_size
        opt.step()
        low.load_state_dict(module.state_dict())  # rounds
    return module.state_dict(), low.state_dict()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_equals_the_recipe_by_hand(world_size):
    weights, _ = by_hand(world_size=world_size)
    for runs in toy.ranks(toy.run_stages, world_size, STAGES, "adamw", mixed_precision=BF16,
                          toy={**PLAIN, "frozen": False}):
        assert all(toy.equal(run["weights"], weights) for run in runs)


def what_the_module_holds(stage):
    """The dtypes inside the module while it computes, in full_params() and in the optimizer."""
    module = toy.build(frozen=False)
    model = zero_ref.wrap(module, stage, mixed_precision=BF16)
    seen = {}

    def look(m, args, output):
        seen[type(m).__name__] = (args[0].dtype, m.weight.dtype, output.dtype)

    for m in (module.head, module.blocks[1], module.norm):
        m.register_forward_hook(look, prepend=True)  # before BatchNorm's output is cast back
    out = model(toy.batch(0, 0)[0]).dtype
    during = dict(seen)
    with model.full_params():
        module(toy.batch(0, 0)[0])
        full = {p.dtype for p in module.parameters()}
    return during, out, module.norm.running_mean.dtype, full, seen, {
        p.dtype for p in model.parameters()}


@pytest.mark.parametrize("stage", STAGES)
def test_dtypes(stage):
    low, high = torch.bfloat16, torch.float32
    during, out, statistics, full, in_full, owned = toy.ranks(what_the_module_holds, 2, stage)[0]
    assert during == {"Linear": (low, low, low), "Scale": (low, low, low),
                      "BatchNorm1d": (high, high, high)}
    assert out == low and statistics == high and full == owned == {high}
    assert set(in_full.values()) == {(high, high, high)}  # the bare module works in full precision


class Head(nn.Module):
    """A module whose parameters are all its children's."""

    def __init__(self):
        super().__init__()
        self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))

    def forward(self, x):
        assert x.dtype == self.inner.weight.dtype == torch.float32
        return self.inner(x)


def test_keep_is_for_all_that_is_inside():
    def run(stage):
        seed(0)
        net = nn.Sequential(nn.Linear(4, 4), Head(), nn.Linear(2, 2))
        model = zero_ref.wrap(net, stage, mixed_precision=MixedPrecision(keep=Head))
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.ones(1, 4) + dist.get_rank()).square().sum().backward()
        opt.step()
        return model.state_dict()

    toy.stages_agree(run, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_the_bare_modules_state_dict_is_refused(stage):
    def run():
        model = zero_ref.wrap(toy.build(**PLAIN), stage, mixed_precision=BF16)
        state = model.state_dict()
        for use in (model.module.state_dict, lambda: model.module.load_state_dict(state)):
            with pytest.raises(RuntimeError, match=r"use model.state_dict\(\)|model.full_params"):
                use()
        model.load_state_dict(state)
        with model.full_params():
            assert toy.equal(model.module.state_dict(), state)

    toy.ranks(run, 2)


# ---- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [BF16, MixedPrecision(torch.bfloat16, torch.bfloat16)],
                         ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resident_bytes_are_those_of_the_formula(world_size, precision):
    plain = {**PLAIN, "frozen": False}
    for rank, runs in enumerate(toy.ranks(toy.run_stages, world_size, STAGES, "adam",
                                          mixed_precision=precision, toy=plain)):
        for stage, run in zip(STAGES, runs):
            expected = memory.model_states(run["sizes"], world_size, stage, rank=rank,
                                           mixed_precision=precision)
            assert run["after_backward"] == expected
            assert run["at_rest"] == expected


def test_the_papers_16_bytes_and_what_comes_on_top():
    for stage in STAGES:
        paper = memory.model_states(1200, 4, stage, param_dtype=torch.bfloat16,
                                    grad_dtype=torch.bfloat16,
                                    optimizer_dtypes=[torch.float32] * 3)
        ours = memory.model_states(1200, 4, stage,
                                   mixed_precision=MixedPrecision(reduce_dtype=torch.bfloat16))
        owned = 1200 // (4 if stage else 1)
        assert ours["parameters"] == paper["parameters"]
        assert ours["optimizer"] == paper["optimizer"]
        assert ours["gradients"] == paper["gradients"] + 4 * owned


@pytest.mark.parametrize("reduce_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_messages(reduce_dtype):
    """Parameters travel in param_dtype, gradients in reduce_dtype."""
    plain = {**PLAIN, "frozen": False}
    precision = MixedPrecision(torch.bfloat16, reduce_dtype)
    for stage in STAGES:
        run = toy.ranks(toy.run, 2, stage, toy=plain, mixed_precision=precision)[0]
        sent = Counter()
        for event in run["events"]:
            sent[event.op, event.dtype] += event.bytes
        numel = toy.padded(run["sizes"], 2, 2)
        gathered = {("all_gather", torch.bfloat16): 2 * numel * (2 if stage == 3 else 1)}
        reduce = "reduce_scatter" if stage else "all_reduce"
        assert sent == {(reduce, reduce_dtype): reduce_dtype.itemsize * numel,
                        **(gathered if stage else {})}


# ---- what it is for ------------------------------------------------------------------------------


def tiny_updates(stage, precision):
    """200 steps of 5e-4 each, down from 1, below which bf16 has nothing until 0.996."""
    module = nn.Linear(1, 3, bias=False).to(torch.float32 if precision else torch.bfloat16)
    nn.init.ones_(module.weight)
    model = zero_ref.wrap(module, stage, mixed_precision=precision)
    opt = torch.optim.SGD(model.parameters(), lr=5e-4)
    for _ in range(200):
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        opt.step()
        opt.zero_grad()
    with torch.no_grad():
        return model.state_dict()["weight"].float(), model(torch.ones(1, 1).bfloat16()).float()


@pytest.mark.parametrize("stage", STAGES)
def test_tiny_updates_are_not_lost(stage):
    (lost, _), (kept, computed) = toy.ranks(
        lambda: [tiny_updates(stage, None), tiny_updates(stage, BF16)], 2)[0]
    assert torch.equal(lost, torch.ones(3, 1))
    # 200 roundings of fp32, each by 6e-8 at most.
    assert torch.allclose(kept, torch.full((3, 1), 0.9), atol=2e-5, rtol=0)
    # The copy has followed: from 0.5 to 1, bf16 has a number every 2**-8.
    assert torch.allclose(computed, torch.full((1, 3), 0.9), atol=2**-9, rtol=0)


# ---- fp16 and its loss scale ---------------------------------------------------------------------


def scaled(stage, overflow_on, scaler_type=None):
    """Two good steps, and one between them in which the given rank's loss overflows."""
    rank = dist.get_rank()
    model = zero_ref.wrap(toy.build(rank, **PLAIN), stage,
                          mixed_precision=MixedPrecision(torch.float16))
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"init_scale": 1024.0, "growth_interval": 100}
    scaler = (scaler_type("cpu", **options) if scaler_type else
              zero_ref.GradScaler(model, **options))
    scales, weights = [], []
    for step in range(3):
        x, y = toy.batch(step, rank)
        loss = F.cross_entropy(model(x).float(), y)
        if step == 1 and rank == overflow_on:
            loss = loss * torch.tensor(1e30)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        model.clip_grad_norm_(1.0)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        scales.append(scaler.get_scale())
        weights.append(model.state_dict())
    return {"weights": weights[-1], "all weights": weights, "losses": scales}


@pytest.mark.parametrize("overflow_on", [0, 2])
def test_an_inf_on_one_rank_makes_all_ranks_skip_the_step(overflow_on):
    for runs in toy.stages_agree(scaled, 3, overflow_on):
        for run in runs:
            assert run["losses"] == [1024.0, 512.0, 512.0]
            before, skipped, after = run["all weights"]
            assert toy.equal(before, skipped) and not toy.equal(skipped, after)


def autocast(stage, wrapped=True):
    """torch's own mixed precision: fp32 parameters, and autocast around forward."""
    rank = dist.get_rank()
    module = toy.build(rank, **PLAIN)
    model = zero_ref.wrap(module, stage) if wrapped else nn.parallel.DistributedDataParallel(module)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        x, y = toy.batch(step, rank)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
    return model.state_dict() if wrapped else module.state_dict()


def test_autocast():
    ours = toy.stages_agree(autocast, 2)[0][0]
    ddp = toy.ranks(autocast, 2, None, False)[0]
    # Autocast computes in bf16, whatever the parameters are. Where the sums over the ranks differ
    # in a weight's last bit it may be rounded to another bf16 number, 2**-8 away, and so change the
    # gradient, of which lr = 0.1 is taken.
    assert all(torch.allclose(ours[k], ddp[k], atol=1e-3, rtol=0) for k in ddp)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_torchs_own_scaler_is_refused(stage):
    with pytest.raises(zero_ref.RankError, match=r"use zero_ref.GradScaler\(model\) instead"):
        toy.ranks(scaled, 2, stage, None, torch.amp.GradScaler)


@pytest.mark.parametrize("arguments, sentence", [
    ((torch.int8,), "param_dtype=torch.int8: must be a floating point dtype"),
    (("bf16",), "param_dtype='bf16': must be"),
    ((torch.bfloat16, torch.int32), "reduce_dtype=torch.int32"),
    ((torch.bfloat16, torch.float32, "norm"), "keep='norm': must be a module class"),
])
def test_bad_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        MixedPrecision(*arguments)
