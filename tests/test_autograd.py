"""What people do with autograd beside `loss.backward()`: gradients that are only returned, forwards
without a backward, torch.func, complex numbers, torch.compile of the whole model, frozen teachers.
torch DDP is the reference, in float64."""

import gc
import os
import shutil
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import toy
from torch import nn
from torch.autograd import forward_ad
from toy import STAGES, seed

import zero_ref
from zero_ref.engine import check

WIDTH = 6
grad = torch.autograd.grad


class UNet(nn.Module):
    """Its layers run in another order than that in which they were defined."""

    def __init__(self, inner=8):
        super().__init__()
        self.up = nn.ModuleList([nn.Linear(inner, WIDTH), nn.Linear(WIDTH, inner)])
        self.down = nn.ModuleList([nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)])
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        x = x * self.scale
        for layer in [*self.down, *reversed(self.up)]:
            x = torch.tanh(layer(x))
        return x


def data(step, rank=None):
    seed = 100 * step + (dist.get_rank() if rank is None else rank)
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed))


def wrap(net, stage, **options):
    return (nn.parallel.DistributedDataParallel(net, find_unused_parameters=True) if stage is None
            else zero_ref.wrap(net, stage, **options))


def values(model):
    bare = isinstance(model, nn.parallel.DistributedDataParallel)
    return (model.module if bare else model).state_dict()


def train(stage, loss_of, steps=3, net=UNet, optimizer="sgd", **options):
    """A few steps with the loss that loss_of(model, step) returns; None is torch DDP."""
    seed(0)
    model = wrap(net(), stage, **options)
    opt = toy.OPTIMIZERS[optimizer](model.parameters())
    for step in range(steps):
        loss_of(model, step).backward()
        opt.step()
        opt.zero_grad()
    return values(model)


def like_ddp(run, world_size, stages=STAGES):
    """run(stage) ends with the same bits at all stages, and with DDP's numbers."""
    by_stage = toy.stages_agree(run, world_size, stages=stages, dtype=torch.float64)[0]
    reference = toy.ranks(lambda: run(None), world_size, dtype=torch.float64)[0]
    assert toy.close(by_stage[0], reference)


def sent(fn):
    """What is sent while fn runs: {collective}."""
    with zero_ref.trace() as t:
        fn()
    return {event.op for event in t.events}


# ---- forwards that no backward comes to ----------------------------------------------------------


@pytest.mark.parametrize("inner", [WIDTH, 8])
@pytest.mark.parametrize("world_size", [2, 3])
def test_validation_with_a_graph_and_a_garbage_collector(inner, world_size):
    """Rank 0 keeps outputs, and collects; the others do not. Units of one size, and of several."""
    def run(stage):
        kept = []

        def loss_of(model, step):
            model.eval()
            kept.append(model(data(step + 50)))
            if dist.get_rank():
                kept.clear()
            elif step == 1:
                gc.collect()
            model.train()
            return model(data(step)).square().mean()

        return train(stage, loss_of, net=lambda: UNet(inner))

    like_ddp(run, world_size)


# ---- gradients that are returned, and not accumulated --------------------------------------------


def saliency(model, step):
    x = data(step, rank=0).requires_grad_()
    found, = grad(model(x).sum(), x)
    assert found.abs().sum() > 0


def on_rank_0(model, step):
    model.eval()
    if dist.get_rank() == 0:
        saliency(model, step)
    model.train()
    return model(data(step)).square().mean()


def on_all_ranks(model, step):
    saliency(model, step)
    return model(data(step)).square().mean()


def twice_in_one_graph(model, step):
    """Of the very graph that is then trained on; of the output, too; and inside no_sync()."""
    x = data(step).requires_grad_()
    out = model(x)
    first, = grad(out.sum(), x, retain_graph=True)
    with model.no_sync():
        second, = grad(out.sum(), x, retain_graph=True)
    grad(out.square().mean(), out, retain_graph=True)
    assert torch.equal(first, second)
    return out.square().mean() + first.sum() * out.mean()


def between_micro_batches(model, step):
    with model.no_sync():
        model(data(step + 20)).square().mean().backward()
        saliency(model, step)
    saliency(model, step)
    return model(data(step)).square().mean()


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("loss_of", [on_all_ranks, twice_in_one_graph, between_micro_batches])
def test_gradients_of_inputs(loss_of, world_size):
    like_ddp(lambda stage: train(stage, loss_of), world_size)


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_of_inputs_on_one_rank(world_size):
    like_ddp(lambda stage: train(stage, on_rank_0), world_size, stages=(0, 1, 2))


def penalty(model, step):
    x = data(step).requires_grad_()
    out = model(x)
    slope, = grad(out.sum(), x, create_graph=True)
    return out.square().mean() + slope.square().sum()


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_sent_for_gradients_that_are_not_accumulated(stage):
    """Stage 3 gathers, and reduces nothing."""
    gathers = {"all_gather"} if stage == 3 else set()

    def run():
        model = zero_ref.wrap(UNet(), stage)
        assert sent(lambda: saliency(model, 0)) == gathers
        assert [p.grad for p in model.parameters()] == [None] * 9
        if stage < 3:
            weight = model.module.scale
            assert sent(lambda: grad(model(data(0)).sum(), weight)) == set()
            assert sent(lambda: penalty(model, 0)) == set()
        model.module.requires_grad_(False)  # a discriminator while its generator trains
        x = data(0).requires_grad_()
        assert sent(lambda: model(x).sum().backward()) == gathers
        assert x.grad.abs().sum() > 0
        model.module.requires_grad_(True)
        assert sent(lambda: model(data(0)).sum().backward()) > gathers
        assert all(p.grad is not None for p in model.parameters())

    toy.ranks(run, 3)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_backward_into_some_of_the_modules_parameters(stage):
    """inputs=…: the others have no gradient. Each rank adds up its own part."""
    def run():
        seed(0)
        model = zero_ref.wrap(UNet(), stage)
        model(data(0)).sum().backward(inputs=[model.module.scale])
        found = {name: p.grad for name, p in model.named_parameters()}
        plain = UNet()
        plain.load_state_dict(model.state_dict())
        mean, = grad(sum(plain(data(0, rank)).sum() for rank in range(2)) / 2, plain.scale)
        mine = found.pop("scale").as_subclass(torch.Tensor).tolist()
        assert set(found.values()) == {None}
        return mine, mean.tolist()

    (first, mean), (second, _) = toy.ranks(run, 2, dtype=torch.float64)
    ours = first if stage == 0 else first + second
    assert ours == pytest.approx(mean, rel=1e-10)


@pytest.mark.parametrize("checked", [True, False])
def test_a_forward_on_one_rank_alone_at_stage_3(checked):
    """Its parameters are on the other ranks."""
    def run():
        model = zero_ref.wrap(UNet(), 3, check=checked)
        with mock.patch.object(check, "timeout", lambda: 1.0):
            if dist.get_rank() == 0:
                saliency(model, 0)

    with (mock.patch.dict(os.environ, {"ZERO_REF_TIMEOUT": "3"}),
          pytest.raises(zero_ref.RankError, match="rank 1 is missing" if checked else "imed out")):
        toy.ranks(run, 2)


# ---- gradients of a layer's weight ---------------------------------------------------------------


def adaptive(model, step):
    """Two losses, weighed by their gradients of the last layer's weight, as VQGAN does it."""
    out = model(data(step))
    one, two = out.square().mean(), (out - 1).abs().mean()
    last = model.module.up[0].weight
    norms = [grad(loss, last, retain_graph=True)[0].norm() for loss in (one, two)]
    return one + norms[0] / norms[1] * two


@pytest.mark.parametrize("world_size", [2, 3])
def test_losses_weighed_by_gradients_of_a_weight(world_size):
    like_ddp(lambda stage: train(stage, adaptive), world_size, stages=(0, 1, 2))


def inner_step(model, step):
    """As in MAML."""
    net, x = model.module, data(step)
    fast = net.up[0].weight - 0.1 * net.up[0].weight
    return model(x).sum() + fast.sum()


@pytest.mark.parametrize("loss_of", [adaptive, inner_step])
def test_gradients_of_a_weight_at_stage_3_are_refused(loss_of):
    def run():
        with pytest.raises(RuntimeError, match=r"gradient with respect to it.* use stage 2"):
            train(3, loss_of)

    toy.ranks(run, 2)


# ---- torch.func ----------------------------------------------------------------------------------

FUNC = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(x))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).square().sum())(x),
    "grads of samples": lambda f, x: torch.func.vmap(
        torch.func.grad(lambda x: f(x).square().sum()))(x),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](torch.ones_like(x)),
}


def dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


WITHOUT_FUNC = {
    "make_dual": dual,
    "jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x),
    "vectorized": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
}


@pytest.mark.parametrize("world_size", [2, 3])
def test_transforms(world_size):
    """Right at stages 0 to 2, on one rank alone. Refused at stage 3, but for what runs without
    torch.func."""
    def run():
        warnings.simplefilter("ignore")  # what linearize says about graphs of torch.fx
        for stage in STAGES:
            seed(0)
            model, plain = zero_ref.wrap(UNet(), stage), UNet()
            plain.load_state_dict(model.state_dict())
            for how, transform in (FUNC | WITHOUT_FUNC).items():
                if stage < 3 and how != "linearize" and dist.get_rank():
                    continue
                if stage < 3 or how in WITHOUT_FUNC:
                    model.eval()
                    ours, theirs = transform(model, data(0)), transform(plain, data(0))
                    assert torch.allclose(ours, theirs, rtol=1e-10), (stage, how)
                else:
                    for f in (model, model.module.down[0]):
                        with pytest.raises(RuntimeError, match=r"not work at stage 3: .*stage 2"):
                            transform(f, data(0))
                    with torch.no_grad():
                        model(data(0))  # and the model works on

    toy.ranks(run, world_size, dtype=torch.float64)


def through_a_jvp(model, step):
    out, tangent = torch.func.jvp(model, (data(step),), (torch.ones(4, WIDTH),))
    return out.square().mean() + tangent.square().mean()


def through_a_dual(model, step):
    with forward_ad.dual_level():
        out = model(forward_ad.make_dual(data(step), torch.ones(4, WIDTH)))
        return sum(part.square().mean() for part in forward_ad.unpack_dual(out))


def through_a_vmap(model, step):
    return torch.func.vmap(model)(data(step)).square().mean()


@pytest.mark.parametrize("loss_of", [through_a_jvp, through_a_dual, through_a_vmap])
def test_training_through_a_transform(loss_of):
    def run(stage):
        if stage is not None:
            return train(stage, loss_of)
        # torch.func does not take DDP itself, so it takes the module, and DDP reduces.
        return train(None, lambda ddp, step: loss_of(ddp.module, step) + 0 * ddp(data(step)).sum())

    like_ddp(run, 2, stages=(0, 1, 2))

    def refused():
        with pytest.raises(RuntimeError, match=r"not work at stage 3: .*stage 2"):
            train(3, loss_of)

    toy.ranks(refused, 2)


# ---- complex numbers -----------------------------------------------------------------------------


class Spectral(nn.Module):
    """Complex parameters, and real ones that forward views as complex; some of them unused."""

    def __init__(self):
        super().__init__()
        kind = torch.tensor(0.0).to(torch.get_default_dtype()).dtype.to_complex()
        self.w = nn.Parameter(torch.randn(5, 5, dtype=kind))
        self.odd = nn.Parameter(torch.ones(3))
        self.pairs = nn.Parameter(torch.randn(5, 3, 2))
        self.unused = nn.Parameter(torch.randn(17, dtype=kind))
        self.of_rank_0 = nn.Parameter(torch.ones(5, dtype=kind))

    def forward(self, x):
        x = torch.tanh(0.3 * (x @ self.w)) + torch.view_as_complex(self.pairs).sum(1)
        x = x * self.odd.sum()
        return x * self.of_rank_0 if dist.get_rank() == 0 else x


class Spectrum(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList([Spectral(), Spectral()]), nn.Linear(10, 3)
        self.register_buffer("phase", torch.polar(torch.ones(5), torch.rand(5)))

    def forward(self, x):
        x = x[:, :5] * self.phase
        for layer in self.layers:
            x = layer(x)
        return self.head(torch.view_as_real(x).flatten(1).to(self.head.weight.dtype))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("norm_type", [None, 2.0, float("inf"), 1.5])
def test_complex_parameters(norm_type, world_size):
    """With decay and momentum, which a gradient of zeros for an unused parameter would show."""
    def run(stage):
        seed(0)
        model, norms = wrap(Spectrum(), stage), []
        opt = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
        for step in range(3):
            model(data(step)).square().mean().backward()
            if norm_type is not None:
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5, norm_type)
                             if stage is None else model.clip_grad_norm_(0.5, norm_type))
            opt.step()
            opt.zero_grad()
        weights = {name: torch.view_as_real(value) if value.is_complex() else value
                   for name, value in values(model).items()}
        return weights | {f"norm {i}": norm for i, norm in enumerate(norms)}

    like_ddp(run, world_size)


def test_complex_parameters_keep_their_dtype_in_mixed_precision():
    def run(stage):
        seed(0)
        model = zero_ref.wrap(Spectrum(), stage, mixed_precision=zero_ref.MixedPrecision(
            keep=Spectral))
        opt = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(2):
            model(data(step)).float().square().mean().backward()
            model.clip_grad_norm_(0.5)
            opt.step()
            opt.zero_grad()
        assert {unit.dtype for unit in model.units} == {
            torch.complex64, torch.float32, torch.bfloat16}
        return {name: torch.view_as_real(value) if value.is_complex() else value
                for name, value in model.state_dict().items()}

    toy.stages_agree(run, 2)


# ---- frozen modules ------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_frozen_teacher_is_sharded_alone(world_size):
    """It is read, and gives gradients to its input; nothing of it is reduced."""
    def run():
        seed(0)
        teacher, plain = UNet().requires_grad_(False), UNet()
        plain.load_state_dict(teacher.state_dict())
        model = zero_ref.wrap(teacher.eval(), 3)
        kept = sum(unit.shard.numel() for unit in model.units)
        assert kept < sum(p.numel() for p in plain.parameters())
        assert all(unit.flat.untyped_storage().nbytes() == 0 for unit in model.units)
        with torch.no_grad():
            assert torch.equal(model(data(0)), plain(data(0)))
        x, y = data(1).requires_grad_(), data(1).requires_grad_()
        assert sent(lambda: model(x).sum().backward()) == {"all_gather"}
        plain(y).sum().backward()
        assert torch.equal(x.grad, y.grad)
        assert toy.equal(model.state_dict(), plain.state_dict())
        assert list(model.parameters()) == [] and model.clip_grad_norm_(1.0) == 0
        model.load_state_dict(UNet().state_dict())

    toy.ranks(run, world_size)


@pytest.mark.parametrize("stage", STAGES)
def test_a_module_that_has_nothing_to_do_at_this_stage(stage):
    def run():
        modules = [nn.ReLU(), nn.Linear(0, 0)]
        for module in modules + [UNet().requires_grad_(False)] * (stage < 3):
            with pytest.raises(ValueError, match=f"so stage {stage} has nothing to do: use the mo"):
                zero_ref.wrap(module, stage)

    toy.ranks(run, 2)


# ---- torch.compile -------------------------------------------------------------------------------


class Everything(UNet):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(self.norm(super().forward(x)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param(
    "inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler"))])
def test_the_whole_model_compiled(backend):
    """What is compiled is the module, and not what is around it."""
    def run():
        for stage in (0, 3) if backend == "inductor" else STAGES:
            weights = []
            for compiled in (True, False):
                torch.compiler.reset()
                seed(0)
                model = zero_ref.wrap(Everything(), stage)
                f = torch.compile(model, backend=backend) if compiled else model
                frames = torch._dynamo.utils.counters["frames"]
                before = frames["ok"]
                opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
                for step in range(2):
                    f(data(step)).square().mean().backward()
                    opt.step()
                    opt.zero_grad()
                assert (frames["ok"] > before) == compiled
                weights.append(model.state_dict())
            assert toy.close(*weights), stage

    toy.ranks(run, 2, dtype=torch.float64)
