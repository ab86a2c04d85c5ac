"""Modules built on the meta device get memory unit by unit, and the same values everywhere."""

import pytest
import torch
import torch.distributed as dist
import toy
from torch import nn
from toy import STAGES

import zero_ref
from zero_ref import memory


class Custom(nn.Module):
    """A parameter and two buffers of its own, and tied weights inside."""

    def __init__(self, width=7):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))
        self.register_buffer("positions", torch.arange(width))
        self.register_buffer("factors", torch.linspace(0, 1, width))
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(width)

    def reset_parameters(self):
        nn.init.normal_(self.scale)
        self.positions.copy_(torch.arange(len(self.positions)))
        self.factors.copy_(torch.linspace(0, 1, len(self.factors)))

    def forward(self, x):
        return self.norm(self.b(torch.tanh(self.a(x))) * self.scale + self.factors)


def on_meta(**options):
    with torch.device("meta"):
        return nn.Sequential(*[Custom(**options) for _ in range(3)])


def train(stage, steps=1):
    torch.manual_seed(17)
    model = zero_ref.wrap(on_meta(), stage)
    values = model.state_dict()
    opt = torch.optim.Adam(model.parameters())
    for _ in range(steps):
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(dist.get_rank()))
        model(x).square().mean().backward()
        opt.step()
    return {"weights": model.state_dict(), "initial": values}


def test_values_depend_neither_on_world_size_nor_on_stage():
    reference = None
    for world_size in (1, 2, 3):
        by_rank = toy.stages_agree(train, world_size)
        reference = reference or by_rank[0][0]["initial"]
        for stages in by_rank:
            assert all(toy.equal(run["initial"], reference) for run in stages)
    assert not any(value.is_meta or value.isnan().any() for value in reference.values())
    assert torch.equal(reference["0.positions"], torch.arange(7))
    assert torch.equal(reference["1.a.weight"], reference["1.b.weight"])
    assert not torch.equal(reference["0.scale"], reference["1.scale"])


def test_values_are_those_of_an_ordinary_build():
    def build():
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))

    def run(stage):
        with torch.device("meta"):
            module = build()
        torch.manual_seed(5)
        return zero_ref.wrap(module, stage).state_dict()

    torch.manual_seed(5)
    ordinary = build().state_dict()
    for values in toy.ranks(lambda: [run(stage) for stage in STAGES], 2)[1]:
        assert toy.equal(values, ordinary)


class InitializedByTheModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])
        self.token = nn.Parameter(torch.empty(2, 3))
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.25)
        if module is self:
            nn.init.ones_(self.token)

    def forward(self, x):
        return self.layers[1](self.layers[0](x)) @ self.token.T


def test_init_weights_of_the_model():
    def run(stage):
        with torch.device("meta"):
            module = InitializedByTheModel()
        return zero_ref.wrap(module, stage).state_dict()

    for values in toy.ranks(lambda: [run(stage) for stage in STAGES], 2)[0]:
        assert (values["layers.1.weight"] == 0.25).all() and (values["token"] == 1).all()


def peak_while_building(world_size_and_stage):
    """The most bytes of parameters that were alive at one time while wrapping."""
    layers, width = 10, 200
    with torch.device("meta"):
        module = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    with torch.profiler.profile(profile_memory=True) as profile:
        model = zero_ref.wrap(module, world_size_and_stage)
    alive = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    unit = 4 * toy.padded([[width * width, width]], dist.get_world_size())
    return most, memory.resident(model)["parameters"], unit, layers


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_peak_while_building_is_the_slices_and_one_unit(world_size):
    for most, held, unit, layers in toy.ranks(peak_while_building, world_size, 3):
        assert held == layers * unit // world_size
        # One unit, its slice once more, and while rank 0 fills it reset_parameters()' temporaries.
        assert held < most <= held + 1.6 * unit < layers * unit


class Forgetful(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.w = nn.Linear(3, 3), nn.Parameter(torch.empty(3))

    def forward(self, x):
        return self.linear(x) * self.w


@pytest.mark.parametrize("stage", STAGES)
def test_what_nobody_gives_values_is_named(stage):
    def run():
        with torch.device("meta"):
            module = nn.Sequential(Forgetful(), Forgetful())
        named = "0.w was built on the meta device, and nothing has given it values"
        with pytest.raises(ValueError, match=named) as error:
            zero_ref.wrap(module, stage)
        return str(error.value)

    for sentence in toy.ranks(run, 2):
        assert "Forgetful needs a reset_parameters()" in sentence


class OnlyBuffers(nn.Module):
    def __init__(self, resettable):
        super().__init__()
        self.register_buffer("table", torch.arange(3.0))
        if resettable:
            self.reset_parameters = lambda: self.table.copy_(torch.arange(3.0))

    def forward(self, x):
        return x + self.table


def test_modules_that_have_only_buffers():
    def run(resettable):
        with torch.device("meta"):
            module = nn.Sequential(OnlyBuffers(resettable), nn.Linear(3, 3))
        return zero_ref.wrap(module, 3).state_dict()["0.table"]

    assert torch.equal(toy.ranks(run, 2, True)[1], torch.arange(3.0))
    with pytest.raises(zero_ref.RankError, match=r"0\.table was built on the meta device"):
        toy.ranks(run, 2, False)


def test_tied_across_units_is_refused():
    def run():
        with torch.device("meta"):
            module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
            module[1].weight = module[0].weight
        zero_ref.wrap(module, 0)

    with pytest.raises(zero_ref.RankError, match="belong to two units"):
        toy.ranks(run, 2)


def test_with_mixed_precision():
    def run(stage):
        torch.manual_seed(1)
        model = zero_ref.wrap(on_meta(), stage, mixed_precision=zero_ref.MixedPrecision())
        return model.state_dict()

    values = toy.stages_agree(run, 2)[0][0]
    assert values["0.a.weight"].dtype == torch.float32
