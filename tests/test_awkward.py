"""Loops and models that other implementations trip over: the same result at every stage."""

import copy

import pytest
import torch
import torch.distributed as dist
import toy
from torch import nn

import zero_ref

STAGES = (0, 1, 2, 3)


def check(build, loop, units=None, world_size=2):
    """`loop(model, optimizer, rank)` ends with the same weights at all stages and on all ranks."""
    def run(stage):
        torch.manual_seed(0)
        model = zero_ref.wrap(build(), stage, units=units)
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        before = model.state_dict()
        extra = loop(model, opt, dist.get_rank())
        after = model.state_dict()
        assert any(not torch.equal(after[k], before[k]) for k in after)  # or nothing was tried
        return after, extra

    by_rank = toy.ranks(lambda: [run(stage) for stage in STAGES], world_size)
    reference = by_rank[0][0]
    for runs in by_rank:
        for weights, _ in runs:
            assert toy.equal(weights, reference[0])
    return by_rank[0]


def steps(model, opt, rank, count=2):
    for step in range(count):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))
        output = model(x)
        output.square().mean().backward()
        opt.step()
        opt.zero_grad()


def close_to_bare(build, results):
    """The first step of `steps` on one process with the whole batch, twice."""
    torch.manual_seed(0)
    module = build()
    opt = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for step in range(2):
        x = torch.cat([torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))
                       for rank in range(2)])
        module(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
    return all(toy.close(weights, dict(module.state_dict())) for weights, _ in results)


# ---- modules -------------------------------------------------------------------------------------


class Unit(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.linear, self.w = nn.Linear(6, 6), nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.do = forward

    def forward(self, *args, **kwargs):
        return self.do(self, *args, **kwargs)


def chain(*forwards, between=lambda y: y):
    """Units in a row, with what the caller does to each output in between."""
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.units = nn.ModuleList([Unit(f) for f in forwards])

        def forward(self, x):
            for unit in self.units:
                x = between(unit(x))
            return x

    return Chain


def PLAIN(unit, x):
    return unit.linear(x) * unit.w


MODULES = {
    "plain": chain(PLAIN, PLAIN),
    "view, then in place": chain(lambda u, x: (u.linear(x) * u.w).view(-1, 6), PLAIN,
                                 between=lambda y: torch.relu_(y.mul_(0.5).add_(0.1))),
    "in place on the input": chain(PLAIN, lambda u, x: u.linear(x.mul_(2)) * u.w),
    "detached use of a parameter": chain(
        PLAIN, lambda u, x: torch.tanh(u.linear(x) * u.w.detach()) * u.w),
    "parameters used beside the input": chain(
        PLAIN, lambda u, x: u.linear(x) * u.w + (u.w * u.w * u.w.detach()).sum()),
    "dict and tuple": chain(lambda u, x: {"y": (u.linear(x) * u.w, None)}, PLAIN,
                            between=lambda y: y["y"][0] if isinstance(y, dict) else y),
    "returns a view of its parameter": chain(
        PLAIN, lambda u, x: (u.linear(x), u.w[:5]),
        between=lambda y: y[0][:, :5] * y[1] if isinstance(y, tuple) else y),
    "returns its parameter": chain(
        PLAIN, lambda u, x: (u.linear(x), u.w),
        between=lambda y: y[0] * y[1] if isinstance(y, tuple) else y),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    results = check(MODULES[name], steps)
    assert close_to_bare(MODULES[name], results)


def test_a_unit_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.units = nn.ModuleList([Unit(PLAIN), Unit(PLAIN)])

        def forward(self, x):
            for i in (0, 1, 1, 0):
                x = self.units[i](x)
            return x

    assert close_to_bare(Twice, check(Twice, steps))


def test_outputs_in_eval_and_no_grad_are_not_dangling():
    def loop(model, opt, rank):
        steps(model, opt, rank)
        with torch.no_grad():
            kept = model.eval()(torch.ones(1, 6))
        inside = model.module.units[0].do
        steps(model.train(), opt, rank)
        return kept, inside is not None

    results = check(MODULES["returns a view of its parameter"], loop)
    assert all(torch.equal(kept, results[0][1][0]) for _, (kept, _) in results)


def lora():
    net = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(2, 6))
                          for _ in range(8)])
    for block in net:
        block[0].requires_grad_(False)
    return net


def test_almost_everything_frozen():
    """At stage 3 a unit is let go right after its backward, its frozen parameters too."""
    def loop(model, opt, rank):
        most = [0]

        def count(*_):
            most[0] = max(most[0], len({u.module for u in model.units if u.gathered}))

        for unit in model.trainable:
            for p in unit.params:
                p.register_post_accumulate_grad_hook(count)
        steps(model, opt, rank)
        return most[0]

    assert [most for _, most in check(lora, loop)] == [8, 8, 8, 1]


# ---- loops ---------------------------------------------------------------------------------------


class Fail(torch.autograd.Function):
    armed = False

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        if Fail.armed:
            raise ArithmeticError("on purpose")
        return grad


@pytest.mark.parametrize("where", [0, 1, 2])
def test_after_a_failed_backward_the_next_step_is_right(where):
    def build():
        forwards = [PLAIN] * 3
        forwards[where] = lambda u, x: Fail.apply(PLAIN(u, x))
        return chain(*forwards)()

    def loop(model, opt, rank):
        steps(model, opt, rank, 1)
        Fail.armed = True
        with pytest.raises(ArithmeticError):
            model(torch.ones(4, 6)).sum().backward()
        Fail.armed = False
        model.zero_grad()
        steps(model, opt, rank, 2)
        return zero_ref.memory.resident(model)

    def undisturbed(model, opt, rank):
        steps(model, opt, rank, 1)
        steps(model, opt, rank, 2)
        return zero_ref.memory.resident(model)

    for (failed, held), (good, expected) in zip(check(build, loop), check(build, undisturbed)):
        assert toy.equal(failed, good) and held == expected


@pytest.mark.parametrize("stage", STAGES)
def test_a_graph_from_before_the_step_is_refused(stage):
    def loop():
        model = zero_ref.wrap(MODULES["plain"](), stage)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        first, second = model(torch.ones(2, 6)).sum(), model(torch.ones(2, 6)).sum()
        first.backward()
        opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            second.backward()

    toy.ranks(loop, 2)


def test_two_forwards_then_two_backwards():
    def loop(model, opt, rank):
        for step in range(2):
            first = model(torch.ones(2, 6) + rank).square().mean()
            with torch.no_grad():
                model.eval()(torch.ones(2, 6))
            second = model.train()(torch.ones(2, 6) - rank).square().mean()
            first.backward()
            second.backward(retain_graph=step == 0)
            if step == 0:
                second.backward()
            opt.step()
            opt.zero_grad(set_to_none=step == 0)

    check(MODULES["plain"], loop)


def test_a_parameter_used_only_inside_no_sync():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.units, self.skip = nn.ModuleList([Unit(PLAIN), Unit(PLAIN)]), False

        def forward(self, x):
            return self.units[0](x) if self.skip else self.units[1](self.units[0](x))

    def loop(model, opt, rank, bare=False):
        for _ in range(2):
            x = torch.ones(2, 6) + rank
            with model.no_sync():
                model(x).square().mean().backward()
            model.module.skip = True
            model(x).square().mean().backward()
            model.module.skip = False
            opt.step()
            opt.zero_grad()

    results = check(Branches, loop)
    torch.manual_seed(0)
    module = Branches()
    opt = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        for module.skip in (False, True):
            for rank in range(2):
                (module(torch.ones(2, 6) + rank).square().mean() / 2).backward()
        opt.step()
        opt.zero_grad()
    assert all(toy.close(weights, dict(module.state_dict())) for weights, _ in results)


# ---- full parameters and state dicts -------------------------------------------------------------


def test_full_params():
    def loop(model, opt, rank):
        steps(model, opt, rank)
        with model.full_params():
            weight = model.module.units[0].linear.weight
            weight.fill_(rank + 0.5)  # rank 0's is kept
            with model.full_params():
                inside = model.state_dict()
            output = model.module(torch.ones(1, 6))  # the bare module works in here
        with pytest.raises(KeyError), model.full_params():
            model.module.units[1].w.mul_(2)
            raise KeyError
        after = model.state_dict()
        assert (after["units.0.linear.weight"] == 0.5).all()
        assert torch.equal(after["units.1.w"], 2 * inside["units.1.w"])
        steps(model, opt, rank)
        return output.detach(), zero_ref.memory.resident(model)["parameters"]

    results = check(MODULES["plain"], loop)
    assert results[3][1][1] * 2 == results[0][1][1]  # sharded again


def round_trip(stage, other):
    rank = dist.get_rank()
    model = zero_ref.wrap(toy.build(rank), stage)
    saved = model.state_dict()
    bare = toy.build(99)
    bare.load_state_dict(saved)
    torch.manual_seed(rank + 50)
    again = zero_ref.wrap(toy.Toy(), other)
    again.load_state_dict(bare.state_dict())
    for module in (model, again):  # both can train on
        torch.optim.Adam(module.parameters()).step()
    with pytest.raises(RuntimeError, match=r'Missing key.*"blocks.1.weight"'):
        again.load_state_dict({k: v for k, v in saved.items() if k != "blocks.1.weight"})
    return toy.equal(again.state_dict(), saved, "norm." if rank else ())


@pytest.mark.parametrize("stage, other", [(0, 3), (3, 0), (1, 2), (2, 3), (3, 3)])
def test_state_dicts_fit_the_bare_module_and_every_stage(stage, other):
    assert toy.ranks(round_trip, 3, stage, other) == [True] * 3


@pytest.mark.parametrize("stage", STAGES)
def test_a_copy_of_the_gathered_module_lives_on_its_own(stage):
    def copy_and_use():
        model = zero_ref.wrap(MODULES["plain"](), stage)
        with model.full_params():
            twin = copy.deepcopy(model.module)
        if dist.get_rank() == 0:  # would hang if it communicated
            twin(torch.ones(1, 6)).sum().backward()
            assert twin.units[0].w.grad is not None
        steps(model, torch.optim.SGD(model.parameters(), lr=0.1), dist.get_rank())

    toy.ranks(copy_and_use, 2)


def test_names_with_a_prefix():
    def names():
        model = zero_ref.wrap(MODULES["plain"](), 1)
        return [name for name, _ in nn.ModuleDict({"m": model}).named_parameters()]

    assert "m.module.units.0.w" in toy.ranks(names, 1)[0] or "m.units.0.w" in toy.ranks(names, 1)[0]


# ---- groups and backends -------------------------------------------------------------------------


def test_a_backend_by_device():
    def run():
        return toy.run_stages(STAGES)

    ours = toy.ranks(run, 3)
    by_device = zero_ref.launch(run, 3, backend="cpu:gloo")
    for a, b in zip(ours, by_device):
        assert all(toy.equal(x["weights"], y["weights"]) for x, y in zip(a, b))
        assert all(x["wire_bytes"] == y["wire_bytes"] for x, y in zip(a, b))


def in_a_subgroup(stage):
    groups = [dist.new_group([0]), dist.new_group([1, 2])]
    rank = dist.get_rank()
    model = zero_ref.wrap(toy.build(rank, norm=False), stage, process_group=groups[rank > 0])
    opt = torch.optim.Adam(model.parameters())
    for step in range(2):
        x, y = toy.batch(step, rank)
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    return model.state_dict()


def test_process_groups():
    by_stage = [toy.ranks(in_a_subgroup, 3, stage) for stage in STAGES]
    for alone, one, two in by_stage:
        assert toy.equal(one, two) and not toy.equal(alone, one)
        assert toy.equal(one, by_stage[0][1]) and toy.equal(alone, by_stage[0][0])
