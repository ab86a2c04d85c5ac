"""Models that work with torch DDP work at every stage, with the same result."""

import dataclasses
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
import toy
from torch import nn
from torch.optim import optimizer
from torch.utils.checkpoint import checkpoint
from toy import STAGES, seed

import zero_ref
from zero_ref.engine import optimizers

WIDTH = 6


def data(step, rank):
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))


def compare(build, units=None, world_size=2, steps=2, change=None, dtype=torch.float64,
            within=1e-10, **options):
    """Train what `build()` returns: all stages end with the same bits on all ranks, and in `dtype`
    the last of them with what one process computes. Returns the weights.

    change(module, step): called before each step, on the bare module's attributes.
    """
    def run(stage):
        seed(0)
        module = build()
        model = module if stage is None else zero_ref.wrap(module, stage, units=units, **options)
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for step in range(steps):
            if change:
                change(module, step)
            for rank in range(world_size) if stage is None else (dist.get_rank(),):
                module.rank = rank
                loss = model(data(step, rank)).square().mean()
                (loss / (world_size if stage is None else 1)).backward()
            opt.step()
            opt.zero_grad()
        return model.state_dict()

    weights = toy.stages_agree(run, world_size)[0][0]
    ours = toy.ranks(run, world_size, 3, dtype=dtype)[0]
    with toy.new_tensors_in(dtype):
        alone = run(None)
        seed(0)
        assert not toy.equal(alone, build().state_dict())  # or nothing was tried
    assert toy.close(ours, alone, within)
    return weights


class Layer(nn.Module):
    """y = tanh(A x) * w, in as many ways as a test needs."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.a, self.w = nn.Linear(width, width), nn.Parameter(torch.ones(width))

    def forward(self, x):
        return torch.tanh(self.a(x)) * self.w


class Stack(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


# ---- parameters: unused, frozen, tied, odd -------------------------------------------------------


class Sometimes(Layer):
    """Its w is used on some ranks only, and never is used nowhere."""

    def __init__(self, users):
        super().__init__()
        self.users, self.never = users, nn.Parameter(torch.ones(3))

    def forward(self, x):
        y = torch.tanh(self.a(x))
        return y * self.w if self.owner[0].rank in self.users else y


def sometimes(users):
    def build():
        stack = Stack([Sometimes(users) for _ in range(4)])
        for layer in stack.layers:
            layer.owner = [stack]  # in a list: not a submodule
        return stack

    return build


@pytest.mark.parametrize("users", [(), (0,), (1,), (0, 1, 2)])
@pytest.mark.parametrize("world_size", [2, 3])
def test_unused_parameters(users, world_size):
    """On all ranks: it does not even decay. On some: its gradient is zero there; never a hang."""
    weights = compare(sometimes(users), Sometimes, world_size)
    for i in range(4):
        assert torch.equal(weights[f"layers.{i}.never"], torch.ones(3))
        used = any(rank < world_size for rank in users)
        assert torch.equal(weights[f"layers.{i}.w"], torch.ones(WIDTH)) != used


class Branches(Stack):
    """On some ranks it returns its last unit's output as it is, on others it uses a parameter."""

    def __init__(self, numel):
        super().__init__([Layer(), Layer()])
        self.scale = nn.Parameter(torch.ones(numel))

    def forward(self, x):
        x = super().forward(x)
        return x * self.scale[:WIDTH] if self.rank == 1 else x


@pytest.mark.parametrize("numel", [WIDTH, sum(p.numel() for p in Layer().parameters())])
def test_branches_of_the_root(numel):
    """Also with buffers of equal size, which ranks could gather into one another's place."""
    compare(lambda: Branches(numel), world_size=2)


def test_unused_with_torch_ddp():
    """That is what DDP does with find_unused_parameters."""
    def run(kind):
        seed(0)
        module = sometimes((1,))()
        module.rank = dist.get_rank()
        model = (nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
                 if kind == "ddp" else zero_ref.wrap(module, kind, units=Sometimes))
        opt = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        for step in range(3):
            model(data(step, module.rank)).square().mean().backward()
            opt.step()
            opt.zero_grad()
        return (module if kind == "ddp" else model).state_dict()

    toy.stages_agree(run, 3)
    ours = toy.stages_agree(run, 3, dtype=torch.float64)[0][0]
    assert toy.close(ours, toy.ranks(run, 3, "ddp", dtype=torch.float64)[0])


def test_frozen_and_unfrozen_in_mid_training():
    def change(module, step):
        assert module.layers[1].w.requires_grad == (step != 3)  # what the step before has set
        module.layers[0].requires_grad_(step not in (1, 2))  # all of a unit
        module.layers[1].w.requires_grad_(step != 2)         # a part of one

    compare(lambda: Stack([Layer(), Layer(), Layer()]), steps=5, change=change)


def frozen_by_the_optimizers_parameters(stage):
    seed(0)
    model = zero_ref.wrap(Stack([Layer(), Layer()]), stage)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    before = model.state_dict()
    for _, p in model.named_parameters():
        p.requires_grad_(p.numel() == 0 or not _.startswith("layers.0"))
    model(data(0, dist.get_rank())).square().mean().backward()
    opt.step()
    after = model.state_dict()
    return {k for k in before if not torch.equal(before[k], after[k])}


def test_frozen_through_model_parameters():
    for changed in toy.ranks(lambda: list(map(frozen_by_the_optimizers_parameters, STAGES)),
                             2)[0]:
        assert changed == {"layers.1.a.weight", "layers.1.a.bias", "layers.1.w"}


@pytest.mark.parametrize("stage", STAGES)
def test_unfreezing_what_was_frozen_when_wrapped_is_refused(stage):
    def run():
        net = Stack([Layer(), Layer()])
        net.layers[0].requires_grad_(False)
        model = zero_ref.wrap(net, stage)
        model(data(0, 0))
        net.layers[0].requires_grad_(True)
        with pytest.raises(RuntimeError, match=r"'layers.0.w' was frozen when the model was wrap"):
            model(data(0, 0))

    toy.ranks(run, 2)


class LowRank(nn.Module):
    """A frozen weight and a small trainable update of it."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x):
        return torch.tanh(self.frozen(x) + self.up(self.down(x)))


def test_almost_everything_frozen():
    weights = compare(lambda: Stack([LowRank() for _ in range(3)]), world_size=3)
    seed(0)
    initial = Stack([LowRank() for _ in range(3)]).state_dict()
    for name, value in weights.items():
        assert torch.equal(value, initial[name]) == ("frozen" in name)


class Tied(nn.Module):
    """One weight in three places: twice in a unit, once outside of it; 5 x 6 cut by 2, 3 and 4."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, WIDTH))
        self.second = nn.Sequential(nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH), nn.Linear(WIDTH, 5))
        self.second[2].weight = self.second[0].weight
        self.first[0].weight = self.second[0].weight

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("units", [None, nn.Sequential, nn.Linear], ids=str)
def test_tied_parameters(units, world_size):
    weights = compare(Tied, units, world_size)
    names = ["first.0.weight", "second.0.weight", "second.2.weight"]
    seed(0)
    before = Tied().state_dict()
    for name in names:
        assert torch.equal(weights[name], weights[names[0]])
        assert (weights[name] != before[name]).any(dim=1).all()  # every row moves


class Odd(nn.Module):
    """Parameters of no dimension, of no element, not contiguous, and of one element."""

    def __init__(self):
        super().__init__()
        self.scalar, self.empty = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.ones(0, 3))
        self.turned = nn.Parameter(torch.randn(WIDTH, WIDTH).t())
        self.strided = nn.Parameter(torch.randn(2 * WIDTH)[::2])
        self.one = nn.Parameter(torch.ones(1))
        assert not self.turned.is_contiguous() and not self.strided.is_contiguous()

    def forward(self, x):
        x = torch.tanh(x @ self.turned) * self.strided * self.one + self.scalar
        return x + self.empty.sum()


def test_odd_parameters():
    compare(lambda: Stack([Odd(), Odd()]), world_size=3)


class TwoDtypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH).double()
        self.b.bias.requires_grad_(False)

    def forward(self, x):
        return self.b(self.a(x).double()).float()


def test_two_dtypes_in_a_unit():
    # In fp32, because one of the two has to be; there, rounding is 6e-8.
    compare(lambda: Stack([TwoDtypes(), TwoDtypes()]), world_size=3, dtype=torch.float32,
            within=1e-5)


def test_another_dtype_than_new_tensors_have():
    """A float64 model where torch.get_default_dtype() is fp32."""
    def run(stage):
        module = toy.build(norm=False).double()
        model = module if stage is None else zero_ref.wrap(module, stage)
        opt = torch.optim.Adam(model.parameters(), lr=0.01)
        norms = []
        for step in range(2):
            x, y = toy.whole_batch(step, 3) if stage is None else toy.batch(step, dist.get_rank())
            nn.functional.cross_entropy(model(x), y).backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1) if stage is None
                         else model.clip_grad_norm_(0.1))
            opt.step()
            opt.zero_grad()
        return {"weights": model.state_dict(), "norms": norms}

    ours, alone = toy.stages_agree(run, 3)[0][0], run(None)
    assert toy.close(ours["weights"], alone["weights"])
    assert list(map(float, ours["norms"])) == pytest.approx(list(map(float, alone["norms"])),
                                                            rel=1e-10)


# ---- units ---------------------------------------------------------------------------------------


class Nested(nn.Module):
    """A unit with parameters of its own and units inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.w = inner, nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return self.inner(x * self.w) + self.w


def test_nested_units():
    compare(lambda: Stack([Nested(Nested(Layer())), Layer(), Nested(Layer())]), (Nested, Layer), 3)


class Twice(Stack):
    def __init__(self, order):
        super().__init__([Layer() for _ in range(max(order) + 1)])
        self.order = order

    def forward(self, x):
        for i in self.order:
            x = self.layers[i](x)
        return x


@pytest.mark.parametrize("order", [(0, 1, 1, 0, 2), (0, 1, 1, 0)], ids=str)
@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_a_unit_used_twice(reshard_after_forward, order):
    compare(lambda: Twice(order), world_size=3, reshard_after_forward=reshard_after_forward)


def twice_through_the_graph_of_a_unit_used_twice(stage):
    seed(0)
    model = zero_ref.wrap(Twice((0, 1, 1, 0, 2)), stage)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(data(0, dist.get_rank())).square().mean()
    for _ in range(3):
        loss.backward(retain_graph=True)
    opt.step()
    return model.state_dict()


def test_twice_through_the_graph_of_a_unit_used_twice():
    toy.stages_agree(twice_through_the_graph_of_a_unit_used_twice, 2)


class TwoOfOne(Layer):
    def forward(self, x):
        y = super().forward(x).t()
        return y, y


class UsesBoth(Stack):
    def forward(self, x):
        for layer in self.layers:
            a, b = layer(x)
            assert a is b
            x = (torch.tanh(a) * torch.sin(b) + torch.cos(a) * torch.exp(b) + a * 0.3 + b * 0.7).t()
        return x


def test_a_unit_that_returns_one_view_twice():
    compare(lambda: UsesBoth([TwoOfOne(), TwoOfOne()]), TwoOfOne)


class Recurrent(Stack):
    """Its unit runs first on what needs no gradient, then on its own output."""

    def forward(self, x):
        for _ in range(3):
            x = self.layers[0](x)
        return x


def test_a_recurrent_unit():
    compare(lambda: Recurrent([Layer()]), Layer, 3)


def test_modules_without_parameters_as_units():
    compare(lambda: Stack([nn.Tanh(), Layer(), nn.Identity()]), (Layer, nn.Tanh, nn.Identity))


def test_two_hundred_tiny_layers():
    compare(lambda: Stack([nn.Linear(WIDTH, WIDTH) for _ in range(200)]), steps=1)


def test_one_huge_layer():
    compare(lambda: Stack([nn.Linear(WIDTH, 100_003), nn.Tanh(), nn.Linear(100_003, 2)]), steps=1)


# ---- what units take and return ------------------------------------------------------------------


class Given(nn.Module):
    """A unit that computes what it is given to: forward(unit, *its arguments)."""

    def __init__(self, forward):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.w = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.given = forward

    def forward(self, *args, **kwargs):
        return self.given(self, *args, **kwargs)


class Chain(nn.Module):
    """Units in a row, with what the caller does to each output in between."""

    def __init__(self, *forwards, between=lambda y: y):
        super().__init__()
        self.units, self.between = nn.ModuleList([Given(f) for f in forwards]), between

    def forward(self, x):
        for unit in self.units:
            x = self.between(unit(x))
        return x


def usual(unit, x):
    return unit.linear(x) * unit.w


CHAINS = {
    "plain": lambda: Chain(usual, usual),
    "view, then in place": lambda: Chain(
        lambda u, x: (u.linear(x) * u.w).view(-1, WIDTH), usual,
        between=lambda y: torch.relu_(y.mul_(0.5).add_(0.1))),
    "in place on the input": lambda: Chain(usual, lambda u, x: u.linear(x.mul_(2)) * u.w),
    "detached use of a parameter": lambda: Chain(
        usual, lambda u, x: torch.tanh(u.linear(x) * u.w.detach()) * u.w),
    "parameters used beside the input": lambda: Chain(
        usual, lambda u, x: u.linear(x) * u.w + (u.w * u.w * u.w.detach()).sum()),
    "dict and tuple": lambda: Chain(
        lambda u, x: {"y": (u.linear(x) * u.w, None)}, usual,
        between=lambda y: y["y"][0] if isinstance(y, dict) else y),
    "returns a view of its parameter": lambda: Chain(
        usual, lambda u, x: (u.linear(x), u.w[:5]),
        between=lambda y: y[0][:, :5] * y[1] if isinstance(y, tuple) else y),
    "returns its parameter": lambda: Chain(
        usual, lambda u, x: (u.linear(x), u.w),
        between=lambda y: y[0] * y[1] if isinstance(y, tuple) else y),
}


@pytest.mark.parametrize("name", CHAINS)
def test_views_parameters_and_writing_in_place(name):
    compare(CHAINS[name])


def test_a_parameter_that_was_returned_is_there_when_its_unit_is_not():
    def run(stage):
        model = zero_ref.wrap(Chain(lambda u, x: (u.w, u.w[1:], u.w.detach())), stage)
        with torch.no_grad():
            kept = model.eval()(torch.ones(1, WIDTH))
            model(torch.ones(1, WIDTH))
        return [tensor.tolist() for tensor in kept]

    values = torch.linspace(0.5, 1.5, WIDTH).tolist()
    for stages in toy.ranks(lambda: [run(stage) for stage in STAGES], 2):
        assert stages == [[values, values[1:], values]] * 4


@dataclasses.dataclass(frozen=True)
class Output:
    y: torch.Tensor
    more: dict
    nothing: None = None


class Returns(Layer):
    def __init__(self, pack, unpack):
        super().__init__()
        self.pack, self.unpack = pack, unpack

    def forward(self, *args, **kwargs):
        x = self.unpack(*args, **kwargs)
        return self.pack(super().forward(x))


class Chained(Stack):
    def __init__(self, pack, unpack, pass_on):
        super().__init__([Returns(pack, unpack) for _ in range(3)])
        self.pass_on, self.final = pass_on, unpack

    def forward(self, x):
        state = self.layers[0].pack(x)
        for layer in self.layers:
            state = self.pass_on(layer, state)
        return self.final(state)


PASSED = {
    "tuples": (lambda y: (y, None, [y[:, :1]]), lambda s: s[0] + s[2][0], lambda f, s: f(s)),
    "dicts": (lambda y: {"y": y}, lambda s: s["y"], lambda f, s: f(s)),
    "dataclasses": (lambda y: Output(y * 2, {"half": y}), lambda s: s.y + s.more["half"],
                    lambda f, s: f(s)),
    "keywords": (lambda y: {"y": y}, lambda y, **_: y, lambda f, s: f(**s)),
}


@pytest.mark.parametrize("kind", PASSED)
def test_inputs_and_outputs(kind):
    def build():
        chained = Chained(*PASSED[kind])
        if kind == "keywords":
            chained.final = lambda s: s["y"]
        return chained

    compare(build, Returns, 3)


class Opaque:
    def __init__(self, y):
        self.y = y


def test_an_output_in_which_no_tensor_can_be_found_is_refused():
    def run():
        net = Chained(Opaque, lambda s: s.y, lambda f, s: f(s))
        model = zero_ref.wrap(net, 3, units=Returns)
        with pytest.raises(RuntimeError, match=r"unit 'layers\.0' returned Opaque"):
            model(data(0, 0))

    toy.ranks(run, 2)


class Attends(nn.Module):
    """Takes another way when query and key are one tensor."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, query, key):
        return torch.tanh(self.a(query)) if query is key else query


class SelfAttends(Stack):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x, key=x)
        return x


def test_one_tensor_given_twice_is_one_tensor():
    compare(lambda: SelfAttends([Attends(), Attends()]), Attends)


class Inner(nn.Module):
    """Differentiates inside of its forward."""

    def __init__(self):
        super().__init__()
        self.layer, self.w = Layer(), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        y = x.detach().requires_grad_()
        slope, = torch.autograd.grad(self.layer(y).sum(), y)
        return self.layer(x - 0.1 * slope) * self.w


def test_autograd_grad_inside_forward():
    compare(Inner, Layer)


class Leaks(Layer):
    def forward(self, x):
        y = super().forward(x)
        self.aux = (self.a(y)).square().mean()
        return y


def test_a_tensor_that_leaves_its_unit_on_the_side():
    """Stages 0 to 2 allow it. Stage 3 cannot notice it; with check=True it does not gather ahead,
    so that what is missing is noticed."""
    def run(stage):
        net = Stack([Leaks(), Leaks(), Leaks()])
        model = zero_ref.wrap(net, stage, check=True, bucket_cap_mb=0)
        for step in range(2):
            loss = model(data(step, 0)).square().mean() + net.layers[0].aux
            loss.backward()

    toy.ranks(lambda: [run(stage) for stage in (0, 1, 2)], 2)
    with pytest.raises(zero_ref.RankError, match="did a tensor leave a unit in another way than"):
        toy.ranks(run, 2, 3)


class Checkpointed(Stack):
    """One checkpoint around several units, one of them frozen."""

    def __init__(self):
        super().__init__([Odd(), Odd(), Odd(), Layer()])
        self.layers[1].requires_grad_(False)

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def test_a_checkpoint_around_several_units():
    compare(Checkpointed, (Odd, Layer))


def test_nothing_of_a_checkpoint_is_kept_after_backward():
    """What it has recomputed is freed with its graph, whenever Python's collector comes."""
    def run(stage):
        model = zero_ref.wrap(Checkpointed(), stage, units=(Odd, Layer))
        kept = []

        def watch(module, args, output):
            output.grad_fn.metadata["watched"] = watched = nn.Identity()
            kept.append(weakref.ref(watched))

        for layer in model.module.layers:
            layer.register_forward_hook(watch)
        gc.disable()
        try:
            model(data(0, 0)).square().mean().backward()
            return len(kept), sum(watched() is not None for watched in kept)
        finally:
            gc.enable()

    for by_stage in toy.ranks(lambda: [run(stage) for stage in STAGES], 2):
        assert by_stage == [(7, 0)] * 4  # recomputing stops where nothing more is needed


# ---- a parameter read outside of its unit --------------------------------------------------------


class ReadsOutside(Stack):
    def forward(self, x):
        return super().forward(x) * self.layers[0].w


def test_a_parameter_read_outside_its_unit():
    """Works at stages 0 to 2, and at stage 3 if it belongs to the root; else it says so."""
    everything_else = lambda m: isinstance(m, nn.Linear)  # noqa: E731
    compare(lambda: ReadsOutside([Layer(), Layer()]), everything_else, 3)

    def refused():
        model = zero_ref.wrap(ReadsOutside([Layer(), Layer()]), 3)
        what = "parameter 'layers.0.w' of unit 'layers.0' is not gathered"
        with pytest.raises(RuntimeError, match=what) as error:
            model(data(0, 0))
        return str(error.value)

    for sentence in toy.ranks(refused, 2):
        assert "leave its module out of `units`" in sentence


# ---- torch.compile -------------------------------------------------------------------------------


def compile_layer(module):
    if isinstance(module, Layer):
        module.compile(backend="aot_eager")


@pytest.mark.parametrize("stage", STAGES)
def test_compiled_units(stage):
    """Compiled before or after wrapping, one by one, with a backend that needs no C++ compiler."""
    def run(when):
        torch.compiler.reset()  # nothing is compiled yet
        seed(0)
        net = Stack([Layer(), Layer()])
        if when == "before":
            net.layers.apply(compile_layer)
        model = zero_ref.wrap(net, stage)
        if when == "after":
            net.layers.apply(compile_layer)
        frames = torch._dynamo.utils.counters["frames"]
        compiled_before = frames["ok"]
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            model(data(step, dist.get_rank())).square().mean().backward()
            opt.step()
            opt.zero_grad()
        assert (frames["ok"] > compiled_before) == (when is not None)
        return model.state_dict()

    plain, *compiled = toy.ranks(lambda: [run(None), run("before"), run("after")], 2,
                                 dtype=torch.float64)[0]
    assert all(toy.close(weights, plain) for weights in compiled)


# ---- leaving nothing behind ----------------------------------------------------------------------


@pytest.mark.parametrize("precision", [None, zero_ref.MixedPrecision()], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_deleting_model_and_optimizer_frees_everything(stage, precision):
    def hooks_that_stay():
        return len(optimizer._global_optimizer_pre_hooks) - len(optimizers._gone) // 2

    def run():
        gc.collect()
        before = hooks_that_stay()  # of models of other tests
        module = Stack([Layer(), Layer()])
        model = zero_ref.wrap(module, stage, mixed_precision=precision)
        opt = torch.optim.Adam(model.parameters())
        for step in range(2):
            model(data(step, 0)).square().mean().backward()
            opt.step()
        alive = [weakref.ref(model), *map(weakref.ref, model.parameters())]
        for unit in model.units:
            alive += [weakref.ref(t) for t in (unit.flat, unit.shard, unit.master)]
            alive += map(weakref.ref, unit.kept_grads.values())
        assert all(ref() is not None for ref in alive)
        params = [p for unit in model.units for p in unit.params]
        del model, opt, unit
        gc.collect()
        hooks = [hook for m in module.modules() for hook in (*m._forward_hooks,
                                                             *m._forward_pre_hooks)]
        hooks += [p for p in params if p._post_accumulate_grad_hooks]
        del module, params  # its parameters lie in the flat buffers of stages 0 to 2
        gc.collect()
        return (sum(ref() is not None for ref in alive), len(hooks), hooks_that_stay() - before)

    assert toy.ranks(run, 2) == [(0, 0, 0)] * 2


def test_a_model_may_go_while_torch_goes_through_the_hooks_of_a_step():
    def run():
        cycle = [zero_ref.wrap(Stack([Layer()]), 1)]
        cycle.append(cycle)  # so that it goes when the collector comes by
        hook = optimizer.register_optimizer_step_pre_hook(lambda *_: [gc.collect()] and None)
        model = zero_ref.wrap(Stack([Layer()]), 1)
        opt = torch.optim.Adam(model.parameters())
        model(data(0, 0)).square().mean().backward()
        gone = weakref.ref(cycle[0])
        del cycle
        try:
            opt.step()
        finally:
            hook.remove()
        return gone() is None

    assert toy.ranks(run, 2) == [True, True]


@pytest.mark.parametrize("stage", STAGES)
def test_copying_a_wrapped_model_is_refused(stage):
    def run():
        import copy
        model = zero_ref.wrap(Stack([Layer()]), stage)
        with pytest.raises(RuntimeError, match="a wrapped model cannot be copied or pickled"):
            copy.deepcopy(model)

    toy.ranks(run, 2)
