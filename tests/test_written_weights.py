"""What is written into the module's own parameters, in a forward or a hook, is kept at every stage
as with torch DDP, or refused; and what comes into a module after it was wrapped is refused."""

import copy

import pytest
import torch
import torch.distributed as dist
import toy
from torch import nn
from torch.nn.utils import prune
from toy import STAGES, seed

import zero_ref

WIDTH = 6


class Layer(nn.Linear):
    """Writes into its own weight before it uses it."""

    def __init__(self, write):
        super().__init__(WIDTH, WIDTH)
        self.write = write

    def forward(self, x):
        with torch.no_grad():
            self.write(self)
        return super().forward(x)


class Block(nn.Module):
    """The layer that writes is neither the first nor the last of its unit."""

    def __init__(self, write):
        super().__init__()
        self.a, self.c, self.b = nn.Linear(WIDTH, WIDTH), Layer(write), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.b(torch.tanh(self.c(torch.tanh(self.a(x)))))


class Distilled(nn.Module):
    """A frozen teacher inside the module, which follows the student in forward."""

    def __init__(self, follow):
        super().__init__()
        self.student, self.teacher = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.teacher.requires_grad_(False)
        self.follow = follow

    def forward(self, x):
        with torch.no_grad():
            for s, t in zip(self.student.parameters(), self.teacher.parameters()):
                self.follow(s, t)
        return self.student(x) - self.teacher(x)


class Mine(nn.Parameter):
    pass


def own_class(write):
    block = Block(write)
    block.c.weight = Mine(block.c.weight.detach())
    return block


def hooked(before, after=lambda m: None):
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    net[1].register_forward_pre_hook(hook_that(before))
    net[1].register_forward_hook(hook_that(after))
    return net


def hook_that(does):
    @torch.no_grad()
    def hook(module, *_):
        does(module)

    return hook


def two(write):
    return nn.Sequential(Block(write), Block(write))


def batch(step, *shape):
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return torch.randn(*shape or (4, WIDTH), generator=generator)


def wrap(net, kind, **options):
    return (nn.parallel.DistributedDataParallel(net) if kind == "ddp"
            else zero_ref.wrap(net, kind, **options))


def train(build, kind, idle=False, **options):
    """idle: with a forward before each step that no backward follows."""
    seed(0)
    net = build()
    model = wrap(net, kind, **options)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        (model(batch(step)) - 1).square().mean().backward()
        kept = model(batch(step + 50)) if idle else None
        opt.step()
        opt.zero_grad()
        del kept
    return copy.deepcopy(net.state_dict() if kind == "ddp" else model.state_dict())


def like_ddp(cases, world_size, **options):
    """{name: build}: each gives DDP's numbers at every stage, and the same bits on all ranks."""
    def run():
        return [{name: train(build, kind, **(options if kind == 3 else {}), idle="idle" in name)
                 for name, build in cases.items()} for kind in ("ddp", *STAGES)]

    by_rank = toy.ranks(run, world_size, dtype=torch.float64)
    reference, first = by_rank[0][:2]
    for name in cases:
        for rank, (_, *runs) in enumerate(by_rank):
            for stage, weights in zip(STAGES, runs):
                assert toy.close(weights[name], reference[name]), (name, stage, rank)
                assert toy.equal(weights[name], first[name]), (name, stage, rank)


WRITES = {
    "in place": lambda m: m.weight.mul_(0.9),
    "in place, other values": lambda m: m.weight.copy_(torch.renorm(m.weight, 2, 0, 0.5)),
    ".data": lambda m: m.weight.data.clamp_(-0.2, 0.2),
    "a row of .data": lambda m: m.weight.data[1].mul_(0.5),
    "item of .data": lambda m: m.weight.data.__setitem__(0, 0.25),
    "detach": lambda m: m.bias.detach().add_(0.01),
    "all at once": lambda m: torch._foreach_mul_([*m.parameters()], 0.9),
    "init": lambda m: nn.init.constant_(m.bias, 0.1),
    "numpy": lambda m: m.weight.detach().numpy().__imul__(0.9),
}
READS = {
    "numpy": lambda m: m.weight.detach().cpu().numpy().std(),
    ".data": lambda m: m.weight.data.mean().item(),
}
FOLLOWS = {
    "in place": lambda s, t: t.mul_(0.9).add_(s, alpha=0.1),
    ".data": lambda s, t: t.data.mul_(0.9).add_(s.data, alpha=0.1),
}


def test_writes_in_forward_are_kept():
    like_ddp({
        **{f"unit: {how}": lambda w=w: two(w) for how, w in WRITES.items()},
        **{f"root: {how}": lambda w=w: Block(w) for how, w in WRITES.items()},
        "a class of its own": lambda: own_class(WRITES[".data"]),
    }, 3)


def test_writes_in_hooks_are_kept():
    like_ddp({
        **{f"hook: {how}": lambda w=w: hooked(w) for how, w in WRITES.items()},
        **{f"teacher: {how}": lambda f=f: Distilled(f) for how, f in FOLLOWS.items()},
        "after its forward": lambda: hooked(READS[".data"], lambda m: m.bias.data.add_(0.1)),
    }, 2)


@pytest.mark.parametrize("options", [{}, {"reshard_after_forward": False}])
def test_what_is_only_read_or_is_outdated_is_not_written_back(options):
    like_ddp({**{how: lambda r=r: hooked(r) for how, r in READS.items()},
              **{f"{how}, idle": lambda w=w: two(w) for how, w in WRITES.items()}}, 2, **options)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_numpy_array_keeps_its_values_and_the_unit_is_freed(world_size):
    def run():
        kept = []
        net = hooked(lambda m: kept.append((m.weight.detach().numpy(), m.weight.detach().clone())))
        model = zero_ref.wrap(net, 3)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            model(batch(step)).square().mean().backward()
            opt.step()
            assert all(u.flat.untyped_storage().nbytes() == 0 for u in model.units)
        assert all((array == values.numpy()).all() for array, values in kept)
        assert net[1].weight.shape == (WIDTH, WIDTH)
        assert net[1].weight.untyped_storage().nbytes() == 0  # nothing else holds the arrays

    toy.ranks(run, world_size)


# ---- two forwards, one backward ------------------------------------------------------------------


class Gain(nn.Linear):
    """Autograd saves its buffer."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        self.register_buffer("gain", torch.full((WIDTH,), 1.5))

    def forward(self, x):
        return super().forward(x) * self.gain


DISCRIMINATORS = {
    "BatchNorm": lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)),
    "buffer": lambda: nn.Sequential(Gain(), nn.Tanh(), nn.Linear(WIDTH, 1)),
    "spectral_norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, 8)), nn.Tanh(), nn.Linear(8, 1)),
    "older spectral_norm": lambda: nn.Sequential(
        nn.utils.spectral_norm(nn.Linear(WIDTH, 8)), nn.Tanh(), nn.Linear(8, 1)),
}


def gan(build, kind):
    seed(0)
    net = build()
    model = wrap(net, kind)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        real, fake = model(batch(step)), model(batch(step + 50))
        (nn.functional.softplus(-real).mean() + nn.functional.softplus(fake).mean()).backward()
        opt.step()
        opt.zero_grad()
    return {name: p.detach().clone() for name, p in
            (net.state_dict() if kind == "ddp" else model.state_dict()).items()
            if not name.endswith(toy.LOCAL)}


@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")
@pytest.mark.parametrize("world_size", [2, 3])
def test_buffers_that_an_earlier_forward_has_saved(world_size):
    def run():
        return [{name: gan(build, kind) for name, build in DISCRIMINATORS.items()}
                for kind in ("ddp", *STAGES)]

    for reference, *stages in toy.ranks(run, world_size, dtype=torch.float64):
        for name in DISCRIMINATORS:
            for weights in stages:
                assert toy.close(weights[name], reference[name]), name
                assert toy.equal(weights[name], stages[0][name]), name


# ---- what is refused -----------------------------------------------------------------------------


def refusals(cases, world_size=2, stages=STAGES, **options):
    """{name: (build, do)}: the sentences with which do(model) is refused, by name: one for all
    stages and ranks."""
    def run():
        return {name: [_refusal(build, do, stage, options) for stage in stages]
                for name, (build, do) in cases.items()}

    by_rank = toy.ranks(run, world_size)
    assert all(found == by_rank[0] for found in by_rank)
    return by_rank[0]


def _refusal(build, do, stage, options):
    seed(0)
    model = zero_ref.wrap(build(), stage, **options)
    try:
        do(model)
    except RuntimeError as error:
        return str(error)
    return "nothing was refused"


def steps(model):
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        model(batch(step)).square().mean().backward()
        opt.step()
        opt.zero_grad()


def set_data(m, values=None):
    m.weight.data = m.weight.data * 0.9 if values is None else values


def in_full(write):
    def do(model):
        with model.full_params():
            write(model.module)
        steps(model)

    return do


@pytest.mark.parametrize("world_size", [2, 3])
def test_data_that_is_replaced(world_size):
    found = refusals({
        "in forward": (lambda: two(set_data), steps),
        "transposed": (lambda: two(lambda m: set_data(m, m.weight.data.t())), steps),
        "in full_params": (lambda: two(lambda m: None), in_full(lambda net: set_data(net[0].c))),
        "for a checkpoint": (lambda: hooked(set_data), lambda model: (
            model(batch(0)), model.state_dict())),
    }, world_size)
    for name, sentences in found.items():
        for sentence in sentences:
            where = "1.weight" if "checkpoint" in name else "0.c.weight"
            assert f"'{where}' of unit" in sentence, (name, sentence)
            assert "does not lie in its flat buffer any more" in sentence, (name, sentence)
            assert "torch.no_grad(): p.copy_(values)" in sentence


def test_writes_that_the_master_would_not_see():
    found = refusals({how: (lambda w=w: two(w), steps) for how, w in WRITES.items()
                      if how != "numpy"},  # which has no bfloat16
                     mixed_precision=zero_ref.MixedPrecision())
    for name, sentences in found.items():
        for sentence in sentences:
            assert "written into a parameter of unit '0'" in sentence, (name, sentence)
            assert "With mixed precision" in sentence and "model.full_params()" in sentence


def test_a_frozen_teacher_has_no_master_and_follows_with_mixed_precision():
    def run(stage):
        return train(lambda: Distilled(FOLLOWS[".data"]), stage,
                     mixed_precision=zero_ref.MixedPrecision())

    toy.stages_agree(run, 2)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.head(self.first(x))


def change(fn):
    """Refused at the next forward, and not only after a step or a checkpoint."""
    def do(model):
        fn(model.module)
        model(batch(0))

    return Plain, do


def pruned(net):
    prune.l1_unstructured(net.head, "weight", 0.5)


CHANGES = {
    "head.weight": lambda net: setattr(net, "head", nn.Linear(WIDTH, WIDTH)),
    "first.0.weight": lambda net: net.first.__setitem__(0, nn.Linear(WIDTH, WIDTH)),
    "head.bias": lambda net: setattr(net.head, "bias", None),
    "first.0.bias": lambda net: setattr(net.first[0], "bias", nn.Parameter(torch.ones(WIDTH))),
    "extra": lambda net: net.register_parameter("extra", nn.Parameter(torch.ones(2))),
    "first.1.slope": lambda net: setattr(net.first[1], "slope", nn.Parameter(torch.ones(2))),
    "first.2.weight": lambda net: net.first.append(nn.Linear(WIDTH, WIDTH)),
}


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_comes_or_goes_after_wrap(world_size):
    found = refusals({
        **{name: change(fn) for name, fn in CHANGES.items()},
        **{f"{name} at a step": (Plain, lambda model, fn=fn: (
            steps(model), fn(model.module), model.state_dict())) for name, fn in CHANGES.items()},
        "first.0.weight in full_params": (Plain, in_full(CHANGES["first.0.weight"])),
        "first.0.bias in full_params": (Plain, in_full(CHANGES["first.0.bias"])),
        "other.weight on the model": (Plain, lambda model: (
            setattr(model, "other", nn.Linear(2, 2)), model(batch(0)))),
    }, world_size)
    for name, sentences in found.items():
        for sentence in sentences:
            start = "has been replaced, removed or added since the model was wrapped"
            assert sentence.startswith(f"{name.split()[0]!r} {start}"), (name, sentence)


def test_pruning_and_functional_call():
    def functional(model):
        params = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
        torch.func.functional_call(model, params, (batch(0),))

    def of_the_root(model):
        torch.func.functional_call(model, {"weight": torch.zeros(WIDTH, WIDTH)}, (batch(0),))

    found = refusals({"functional": (Plain, functional),
                      "root": (lambda: nn.Linear(WIDTH, WIDTH), of_the_root)})
    found |= refusals({"pruned": change(pruned)}, stages=(0, 1, 2))  # at stage 3 it cannot prune
    for sentences in found.values():
        for sentence in sentences:
            assert "weight' has been replaced, removed or added since" in sentence
            assert "torch.func.functional_call the bare model.module" in sentence


def test_modules_without_parameters_may_change():
    def build():
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def run(stage):
        model = zero_ref.wrap(build(), stage)
        model.module[1] = nn.ReLU()
        steps(model)
        model.module[0] = nn.Sequential(model.module[0])
        steps(model)
        with pytest.raises(RuntimeError, match=r"'2.weight' has been replaced"):
            model.module[2] = nn.Linear(WIDTH, WIDTH)
            model(batch(0))

    toy.ranks(lambda: [run(stage) for stage in STAGES], 2)


# ---- copies --------------------------------------------------------------------------------------


def averaged(stage):
    """An average of the weights, kept in a copy of the bare module."""
    seed(0)
    model = zero_ref.wrap(Plain(), stage, mixed_precision=zero_ref.MixedPrecision())
    with model.full_params():
        average = torch.optim.swa_utils.AveragedModel(model.module)
    steps(model)
    with model.full_params():
        average.update_parameters(model.module)
        for part in (model.module, model.module.head):
            part.state_dict()
    assert all(type(p) is nn.Parameter for p in average.parameters())
    weights = average.module.state_dict()
    average.module.load_state_dict(weights)
    for part in (model.module, model.module.head):
        with pytest.raises(RuntimeError, match=r"rounded values: use model.state_dict\(\)"):
            part.state_dict()
        with pytest.raises(RuntimeError, match=r"rounded values: use model.state_dict\(\)"):
            part.load_state_dict({})
    assert toy.equal(weights, model.state_dict())  # the first update copies
    return weights


def test_a_copy_of_the_module_is_averaged_and_saved_with_mixed_precision():
    toy.stages_agree(averaged, 2)
