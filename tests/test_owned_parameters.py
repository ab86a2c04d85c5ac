"""What the optimizer sees: slices that nobody may take for the whole, and what goes with them."""

import copy
import io
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import toy
from torch import nn
from toy import STAGES, seed

import zero_ref
from zero_ref.engine import check
from zero_ref.engine.local import LocalGrad
from zero_ref.engine.optimizers import ELEMENTWISE
from zero_ref.engine.owned import MasterParameter
from zero_ref.engine.slices import GradSlice


def net():
    seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


def data(step, rank=None):
    rank = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 6, generator=generator)


def wrapped(kind, **options):
    return (nn.parallel.DistributedDataParallel(net()) if kind == "ddp"
            else zero_ref.wrap(net(), kind, **options))


def loss_of(model, step):
    return (model(data(step)) - 1).square().mean()


def weights(model):
    return {name.removeprefix("module."): value for name, value in model.state_dict().items()}


def as_with_ddp(loop, world_size):
    """loop(kind) gives weights: with torch DDP's values in float64, and at all stages the same
    bits."""
    toy.stages_agree(loop, world_size)
    both = toy.ranks(lambda: [loop(kind) for kind in ("ddp", 1, 3)], world_size,
                     dtype=torch.float64)
    for ddp, *ours in both:
        for weights_of_stage in ours:
            assert toy.close(weights_of_stage, ddp)


def refused(fn, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        fn()


# ---- what no_sync() has left ---------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_of_the_optimizer_drops_what_no_sync_has_left(set_to_none, world_size):
    def loop(kind, first_reduced=False):
        model = wrapped(kind)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        for epoch in range(2):
            if first_reduced:
                loss_of(model, epoch).backward()
            opt.zero_grad(set_to_none)
            for i in range(3):  # groups of two: the last is left over
                with nullcontext() if i == 1 else model.no_sync():
                    loss_of(model, 10 * epoch + i).backward()
                if i == 1:
                    opt.step()
                    opt.zero_grad(set_to_none)
        return weights(model)

    as_with_ddp(loop, world_size)
    as_with_ddp(lambda kind: loop(kind, first_reduced=True), world_size)


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, half):
        return self.a(x) if half else self.b(self.a(x))


@pytest.mark.parametrize("foreach", [False, True])
def test_what_is_local_is_zeroed_together_with_what_is_reduced(foreach):
    def run(stage):
        seed(0)
        model = zero_ref.wrap(Halves(), stage)
        opt = torch.optim.SGD(model.parameters(), lr=0.1, foreach=foreach)
        model(data(0), half=True).sum().backward()
        with model.no_sync():
            model(data(1), half=False).sum().backward()
        kinds = {isinstance(p.grad, LocalGrad) for p in model.parameters()}
        assert kinds == {False, True}
        opt.zero_grad(set_to_none=False)
        model(data(2), half=False).sum().backward()
        after = [p.grad.tolist() for p in model.parameters()]
        model.zero_grad()
        model(data(2), half=False).sum().backward()
        assert after == [p.grad.tolist() for p in model.parameters()]

    toy.ranks(lambda: [run(stage) for stage in STAGES], 2)


def test_a_local_gradient_is_no_gradient_yet():
    def run(stage):
        model = wrapped(stage)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        before = zero_ref.memory.resident(model, opt)
        with model.no_sync():
            loss_of(model, 0).backward()
        p = next(model.parameters())
        assert isinstance(p.grad, LocalGrad) and "not reduced" in repr(p.grad)
        assert p.grad.untyped_storage().nbytes() == 0
        held = zero_ref.memory.resident(model, opt)
        assert held["gradients"] - before["gradients"] == sum(
            q.numel() * 4 for q in net().parameters())
        with torch.no_grad():
            refused(lambda: p.add_(p.grad, alpha=-0.1), "this gradient is local")
        for use in (p.grad.sum, lambda: p.grad * 2, lambda: model.clip_grad_norm_(1.0),
                    lambda: (p * p.grad).sum(), lambda: p.detach() - p.grad,
                    model.grads_are_finite):
            refused(use, "this gradient is local")
        refused(opt.step, "has not been reduced")
        loss_of(model, 1).backward()
        assert not isinstance(p.grad, LocalGrad)
        with model.no_sync():
            loss_of(model, 2).backward()
        for q in model.parameters():
            q.grad.mul_(2)
            q.grad.add_(1)
        if p.numel():
            refused(lambda: loss_of(model, 3).backward(), "was changed while no_sync")

    toy.ranks(lambda: [run(stage) for stage in STAGES], 2)


@pytest.mark.parametrize("zero", [lambda g: g.data.zero_(), lambda g: g.detach().zero_()])
def test_a_local_gradient_is_zeroed_by_hand(zero):
    def loop(kind):
        model = wrapped(kind)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            with model.no_sync():
                loss_of(model, 2 * step).backward()
            for p in model.parameters():
                zero(p.grad)
            loss_of(model, 2 * step + 1).backward()
            opt.step()
            opt.zero_grad()
        return weights(model)

    as_with_ddp(loop, 2)


# ---- around a step -------------------------------------------------------------------------------


class Doubling(torch.optim.Adam):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(2).clamp_(-0.1, 0.1)
        return super().step(closure)


class Normalizing(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.div_(p.grad.norm())
        return super().step(closure)


def steps(kind, prepare=lambda opt: None, make=torch.optim.SGD):
    model = wrapped(kind)
    opt = make(model.parameters(), lr=0.1)
    prepare(opt)
    for step in range(3):
        loss_of(model, step).backward()
        opt.step()
        opt.zero_grad()
    for state in opt.state.values():
        assert {type(v) for v in state.values() if isinstance(v, torch.Tensor)} <= {torch.Tensor}
    return weights(model)


def halve(optimizer, args, kwargs):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad.mul_(0.5)


def test_a_step_of_the_users_own_and_hooks_around_a_step():
    as_with_ddp(lambda kind: steps(kind, make=Doubling), 2)
    as_with_ddp(lambda kind: steps(kind, lambda opt: opt.register_step_pre_hook(halve)), 2)


def test_a_step_of_the_users_own_and_hooks_see_slices_as_such():
    def look(optimizer, args, kwargs):
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.1)

    def run(stage):
        for prepare in (lambda opt: opt.register_step_pre_hook(look),
                        lambda opt: opt.register_step_post_hook(look)):
            refused(lambda prepare=prepare: steps(stage, prepare), "of a gradient's slice is not")
        refused(lambda: steps(stage, make=Normalizing), "`norm` of a gradient's slice is not")

    toy.ranks(lambda: [run(stage) for stage in (1, 2, 3)], 2)


def test_groups_change_while_the_optimizer_is_used():
    """Unfreezing layer by layer, as some write it."""
    def loop(kind):
        model = wrapped(kind)
        params = [*model.parameters()]
        opt = torch.optim.Adam(params[2:], lr=0.1)
        for step in range(3):
            if step == 1:
                opt.param_groups[0]["params"] = params[1:]
            loss_of(model, step).backward()
            opt.step()
            model.zero_grad()
        return weights(model)

    as_with_ddp(loop, 2)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_write_on_one_rank_alone_is_named(stage):
    def run():
        model = wrapped(stage, check=True)
        if dist.get_rank() == 0:
            with torch.no_grad(), mock.patch.object(check, "timeout", lambda: 1.0):
                next(model.parameters()).mul_(0.5)
                model(data(0))

    with pytest.raises(zero_ref.RankError, match="every rank has to write"):
        toy.ranks(run, 2)


# ---- a slice is not the whole --------------------------------------------------------------------

REDUCED = {
    "norm": torch.Tensor.norm, "linalg": torch.linalg.norm, "sum": torch.Tensor.sum,
    "mean": torch.Tensor.mean, "max": torch.Tensor.max, "max of a dimension": lambda g: g.max(0),
    "amin": torch.amin, "std": torch.std,
    "all": lambda g: g.isfinite().all(), "any": lambda g: torch.any(g > 1),
    "bool": lambda g: bool((g == 0)[:1]) if g.numel() else torch.any(g),
    "item": lambda g: g[:1].item(), "equal": lambda g: torch.equal(g, g),
    "cat": lambda g: torch.cat([g.flatten(), g]).norm(), "stack": lambda g: torch.stack([g]).sum(),
    "square": lambda g: sum(x.square().sum() for x in [g]), "detach": lambda g: g.detach().norm(),
    "data": lambda g: g.data.norm(2), "clone": lambda g: (g.clone().cpu() * 2.0).float().max(),
    "foreach": lambda g: torch._foreach_norm([g]), "views": lambda g: g.view(-1)[:2].abs().sum(),
    "foreach mul": lambda g: torch._foreach_mul([g], 2.0)[0].norm(), "dot": lambda g: g.dot(g),
    "in place": lambda g: g.mul_(1).norm(), "mse": lambda g: F.mse_loss(g, g * 2),
    "normalize": lambda g: F.normalize(g, dim=0), "l1": lambda g: F.l1_loss(g, torch.zeros_like(g)),
    "mse sum": lambda g: F.mse_loss(g, g * 2, reduction="sum"), "contains": lambda g: 1.0 in g,
    "first": lambda g: g[0], "place": lambda g: g.__setitem__(slice(0, len(g) - 1), 0.0),
    "some places": lambda g: g[torch.tensor([0])], "last": lambda g: g[-1:].norm(),
    "softmax": lambda g: g.softmax(0), "flip": lambda g: g.flip(0), "cumsum": lambda g: g.cumsum(0),
    "roll": lambda g: g.roll(1), "sort": torch.sort, "fft": lambda g: torch.fft.rfft(g, n=4),
    "float": lambda g: float(g[:1]), "matrix": lambda g: g @ torch.ones(1000),
    "shape of the whole": lambda g: g.view(7, 1001), "allclose": lambda g: g.allclose(g),
}


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_reduces_a_slice_of_a_gradient_is_refused(world_size):
    def run(stage):
        model = wrapped(stage)
        loss_of(model, 0).backward()
        for p in model.parameters():  # on some ranks without elements
            for reduce in REDUCED.values():
                refused(lambda p=p, reduce=reduce: reduce(p.grad), "grads_are_finite")
            p.grad = p.grad * 0.5
        refused(lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.1), "clip_grad_norm_")
        kept = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        for p, grad in zip(model.parameters(), kept):
            p.grad = grad
        refused(lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.1), "clip_grad_norm_")
        grad = kept[0]
        assert repr(grad) and grad.shape == grad.cpu().shape and len(grad.tolist()) == len(grad)
        assert grad.numpy().shape == tuple(grad.shape) and type(copy.deepcopy(grad)) is GradSlice
        assert torch.max(grad, grad * 2).shape == grad.shape
        assert type(torch._foreach_add([grad], [grad])[0]) is GradSlice
        grad[grad > 0] = 0.0
        grad[:] = torch.where(grad.abs() < 1, grad // 2, 1.0).exponential_()
        with torch.inference_mode():
            assert grad.cpu().flatten().tolist() == (grad * 1).tolist()
            assert type(grad.clone()) is GradSlice
        file = io.BytesIO()
        torch.save(grad, file)
        file.seek(0)
        assert type(torch.load(file)) is torch.Tensor

    toy.ranks(lambda: [run(stage) for stage in (1, 2, 3)], world_size)


def test_at_stage_0_gradients_are_whole():
    def run():
        model = wrapped(0)
        loss_of(model, 0).backward()
        for reduce in list(REDUCED.values())[:6]:
            reduce(next(model.parameters()).grad)
        return float(nn.utils.clip_grad_norm_(model.parameters(), 0.1))

    assert len(set(toy.ranks(run, 2))) == 1


def test_any_optimizer_works_at_stage_0():
    def loop(kind):
        model = wrapped(kind)
        opt = torch.optim.Adafactor(model.parameters(), lr=0.1)
        for step in range(2):
            opt.zero_grad()
            loss_of(model, step).backward()
            opt.step()
        return weights(model)

    for ddp, ours in toy.ranks(lambda: [loop("ddp"), loop(0)], 2, dtype=torch.float64):
        assert toy.close(ours, ddp)


@pytest.mark.parametrize("world_size", [2, 3])
def test_edited_gradients(world_size):
    def loop(kind):
        model = wrapped(kind)
        opt = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        slow = {}
        for step in range(3):
            loss_of(model, step).backward()
            for name, p in model.named_parameters():
                slow[name] = slow.get(name, 0) * 0.9 + p.grad * 0.1
                p.grad = p.grad + 2 * slow[name]
            clip = nn.utils.clip_grad_norm_ if kind == "ddp" else type(model).clip_grad_norm_
            clip(model.parameters() if kind == "ddp" else model, 0.1)
            opt.step()
            opt.zero_grad()
        return weights(model)

    as_with_ddp(loop, world_size)


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_hear_of_a_gradient_that_is_not_finite(world_size):
    def run(stage):
        model = wrapped(stage)
        answers = []
        for value in (1.0, float("nan"), float("inf")):
            (loss_of(model, 0) + 0 * value).backward()
            answers.append(model.grads_are_finite())
            *_, last = model.parameters()  # of which at least one rank has nothing
            if last.numel():
                last.grad.numpy()[-1:] = value
            with zero_ref.trace() as trace:
                answers.append(model.grads_are_finite())
            model.zero_grad()
        assert trace.wire_bytes() == (0 if stage == 0 else 8 * (world_size - 1))
        return answers

    for by_stage in toy.ranks(lambda: [run(stage) for stage in STAGES], world_size):
        for answers in by_stage:
            assert answers == [True, True, True, False, True, False] or (
                answers[:3] == [True, True, False])


TERMS = {
    "squares": lambda p: p.square().sum(), "absolute": lambda p: p.abs().sum(),
    "distance": lambda p: (p - 1).pow(2).sum(),
    "mse": lambda p: F.mse_loss(p, p.detach() + 1, reduction="sum"),
    "of two": lambda p: (p * p).sum() * 2,
    "scaled": lambda p: torch.tensor(0.5) * torch.stack([p.square().sum() / 2]).mean().float(),
    "huber": lambda p: F.huber_loss(p, p.detach() + 1, reduction="none").sum(),
}
WRONG = {
    "norm": lambda p: p.norm(), "torch.norm": lambda p: torch.norm(p, 2),
    "mean": lambda p: p.abs().mean(), "distance": lambda p: (p - 1).norm(),
    "max": lambda p: p.abs().max(), "root": lambda p: p.square().sum().sqrt(),
    "power": lambda p: p.square().sum() ** 0.5, "of a cat": lambda p: torch.cat([p, p]).norm(),
    "std": lambda p: p.std(), "mse": lambda p: F.mse_loss(p, p.detach() + 1),
    "some": lambda p: p[:2].square().sum(),
    "of a sum": lambda p: (1 + 3 * (p * p).sum()).sqrt(),
    "square of a sum": lambda p: p.sum() * p.sum(), "share": lambda p: p.sum() / p.sum().detach(),
    "weighted": lambda p: p.square().sum().detach() * p.square().sum(),
    "of two sums": lambda p: p.square().sum() * p.abs().sum(),
    "quotient": lambda p: torch.ones(()) / p.square().sum(), "softmax": lambda p: p.softmax(0),
    "divided": lambda p: torch.div(torch.ones(()), p.square().sum()), "flip": lambda p: p.flip(0),
    "roll": lambda p: p.roll(1), "fft": lambda p: torch.fft.rfft(p, n=4).abs().sum(),
    "matrix": lambda p: (p @ torch.ones(1000)).sum(), "spread": lambda p: (p - p.sum()).abs().sum(),
    "of the data's": lambda p: torch.ones((), requires_grad=True) * p.square().sum(),
    "sum and more": lambda p: F.pairwise_distance(p, p.detach() + 1),
    "mean of a sum": lambda p: F.kl_div(p, p.detach().abs(), reduction="batchmean"),
    "cosine": lambda p: F.cosine_similarity(p, p.detach(), dim=0),
}


@pytest.mark.parametrize("term", TERMS)
def test_sums_over_parameters_in_a_loss(term):
    def loop(kind):
        model = wrapped(kind)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            loss = loss_of(model, step) + 0.1 * sum(map(TERMS[term], model.parameters()))
            assert f"{loss:.2f}" and loss.item() > 0 and bool(loss.detach().exp() > 0)
            loss.backward()
            opt.step()
            opt.zero_grad()
        return weights(model)

    as_with_ddp(loop, 2)


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_no_sum_of_parts_gives_is_refused_in_a_loss(world_size):
    def run(stage):
        model = wrapped(stage)
        for p in model.parameters():
            for wrong in WRONG.values():
                refused(lambda p=p, wrong=wrong: wrong(p), "sums of squares or of absolute")
        refused(lambda: torch.autograd.grad(loss_of(model, 0), [*model.parameters()]),
                "autograd works on the module's own parameters")

    toy.ranks(lambda: [run(stage) for stage in (1, 2, 3)], world_size)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_as_factors_in_a_loss(world_size, turned):
    """As in elastic weight consolidation: what a step away costs comes from earlier gradients."""
    def loop(kind):
        model = wrapped(kind)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        loss_of(model, 0).backward()
        old = [(p.detach().clone(), p.grad.square() * 10) for p in model.parameters()]
        opt.step()
        for step in range(1, 3):
            opt.zero_grad()
            loss = loss_of(model, step)
            for p, (was, weight) in zip(model.parameters(), old):
                away = (p - was).square()
                loss = loss + (away * weight if turned else weight * away).sum()
            loss.backward()
            opt.step()
        return weights(model)

    as_with_ddp(loop, world_size)


PLAIN = {
    "slow": lambda g: torch.zeros_like(g).as_subclass(torch.Tensor).mul_(0.9).add_(g, alpha=0.1),
    "numpy": lambda g: torch.from_numpy(g.numpy() * 0.5), "copy": copy.copy,
    "list": lambda g: torch.tensor(g.tolist()), "of ours": lambda g: g * 0.5,
}


@pytest.mark.parametrize("plain", PLAIN)
def test_whatever_is_set_as_a_gradient_is_a_slice_of_one(plain):
    def run(stage):
        model = wrapped(stage)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        loss_of(model, 0).backward()
        for p in model.parameters():
            p.grad = PLAIN[plain](p.grad)
            assert type(p.grad) is (GradSlice if stage else torch.Tensor)
        clip = lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.1)  # noqa: E731
        refused(clip, "clip_grad_norm_") if stage else clip()
        opt.step()

    toy.ranks(lambda: [run(stage) for stage in STAGES], 2)


def test_other_tensors_may_get_a_parameter_of_the_optimizers():
    def run(stage):
        for p in wrapped(stage).parameters():
            other = nn.Parameter(torch.zeros(p.shape))
            other.data, other.grad = p, p
            assert other.detach().tolist() == p.detach().tolist()

    toy.ranks(lambda: [run(stage) for stage in STAGES], 2)


def test_weight_decay_by_hand_may_forget_no_grad():
    def loop(kind):
        model = wrapped(kind)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            loss_of(model, step).backward()
            for p in model.parameters():
                p.grad.add_(p, alpha=0.1)
            opt.step()
            opt.zero_grad()
        return weights(model)

    as_with_ddp(loop, 2)


def test_norms_of_parameters_that_need_no_gradient_are_refused():
    def run(stage):
        model = wrapped(stage)
        for p in model.parameters():
            with torch.no_grad():
                old = p.clone()
                for norm in (p.norm, (p - old).norm, p.abs().mean, lambda p=p: p.abs().max(),
                             p.isnan().any, lambda p=p: p[0], lambda p=p: p.__setitem__(0, 0.0)):
                    refused(norm, "of a parameter's slice")
            refused((p == p).all, "of a parameter's slice")

    toy.ranks(lambda: [run(stage) for stage in (1, 2, 3)], 2)


def squares(model):
    return 0.1 * sum(p.square().sum() for p in model.parameters())


def alone(model, step):
    return loss_of(model, step) + squares(model)


ACCUMULATIONS = {  # losses of backwards inside no_sync(), and of the last one
    "at the end": ([loss_of, loss_of], alone), "everywhere": ([alone, alone], alone),
    "at first": ([alone, loss_of], loss_of),
    "of nothing else": ([loss_of, lambda model, step: squares(model), loss_of], loss_of),
    "then dropped": ([loss_of, alone, None, lambda model, step: squares(model)], loss_of),
    "dropped, then at the end": ([alone, None], alone),
}


@pytest.mark.parametrize("losses", ACCUMULATIONS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_losses_over_parameters_while_gradients_are_local(world_size, losses):
    def loop(kind):
        model = wrapped(kind)
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(2):
            local, last = ACCUMULATIONS[losses]
            with model.no_sync():
                for i, loss in enumerate(local):
                    loss(model, 10 * step + i).backward() if loss else opt.zero_grad()
            last(model, 10 * step + 9).backward()
            opt.step()
            opt.zero_grad()
        return weights(model)

    as_with_ddp(loop, world_size)


def test_a_gradient_of_a_loss_over_parameters_alone_is_a_slice_too():
    def run(stage):
        model = wrapped(stage)
        for _ in range(2):  # the second one is added to the first
            squares(model).backward()
            for p in model.parameters():
                assert type(p.grad) is (GradSlice if stage else torch.Tensor)
        clip = lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.1)  # noqa: E731
        refused(clip, "clip_grad_norm_") if stage else clip()

    toy.ranks(lambda: [run(stage) for stage in STAGES], 2)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_gradient_that_somebody_keeps_is_not_overwritten(world_size):
    def loop(kind):
        model = wrapped(kind)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            kept = []
            for task in range(3):
                opt.zero_grad()
                loss_of(model, 10 * step + task).backward()
                kept.append([p.grad for p in model.parameters()])
            views = [[grad.view(-1)[:] for grad in grads] for grads in kept[:2]]
            del kept
            opt.zero_grad()
            loss_of(model, 10 * step + 4).backward()
            for p, first, second in zip(model.parameters(), *views):
                p.grad = p.grad + torch.where(first * second < 0, first, second).view_as(p)
            opt.step()
        return weights(model)

    as_with_ddp(loop, world_size)


def test_gradients_that_nobody_keeps_lie_in_the_same_memory():
    def run(stage):
        model, places = wrapped(stage), []
        for step in range(3):
            model.zero_grad()
            loss_of(model, step).backward()
            places.append({p.grad.untyped_storage().data_ptr() for p in model.parameters()})
        return places[0] == places[1] == places[2]

    assert all(map(all, toy.ranks(lambda: [run(stage) for stage in STAGES], 2)))


# ---- values, attributes, types -------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("how", ["swap", "clamp", "assign", "vector"])
def test_what_is_written_through_data_is_followed(how, world_size):
    def loop(kind, **options):
        model = wrapped(kind, **options)
        opt = torch.optim.SGD(model.parameters(), lr=0.3)
        shadow = [p.detach().clone() for p in model.parameters()]
        seen = []
        for step in range(3):
            loss_of(model, step).backward()
            opt.step()
            opt.zero_grad()
            params = [*model.parameters()]
            if how == "swap":  # averaged weights for the evaluation, and back
                for s, p in zip(shadow, params):
                    s.mul_(0.9).add_(p.detach(), alpha=0.1)
                stored = [p.detach().clone() for p in params]
                for s, p in zip(shadow, params):
                    p.data.copy_(s.data)
                with torch.no_grad():
                    seen.append(model(data(7, 0)))
                for s, p in zip(stored, params):
                    p.data.copy_(s.data)
            elif how == "vector":
                vector = nn.utils.parameters_to_vector(params).detach()
                nn.utils.vector_to_parameters(vector * 0.9, params)
            else:
                for p in params:
                    if how == "assign":
                        p.data = p.data * 0.9
                    else:
                        p.data.clamp_(-0.1, 0.1)
        return {**weights(model), **{f"seen{i}": s for i, s in enumerate(seen)}}

    as_with_ddp(loop, world_size)
    toy.stages_agree(loop, world_size, mixed_precision=zero_ref.MixedPrecision())


def test_data_of_another_shape_and_reading_on_one_rank():
    def run(stage):
        model = wrapped(stage)
        p = next(model.parameters())
        refused(lambda: setattr(p, "data", torch.zeros(p.numel() + 1)), "lies in a flat buffer")
        refused(lambda: setattr(p, "data", p.data.double()), "lies in a flat buffer")
        with zero_ref.trace() as trace:
            if dist.get_rank() == 0:
                assert repr(p.data)
                if stage:
                    refused(p.data.mean, "of a parameter's slice")
            loss_of(model, 0)
        assert all(event.phase == "forward" for event in trace.events)  # nothing was followed

    toy.ranks(lambda: [run(stage) for stage in STAGES], 2)


@pytest.mark.parametrize("world_size", [2, 3])
def test_attributes_travel_with_the_parameter(world_size):
    def loop(kind):
        module = net()
        module[0].bias.spared = module[2].weight.spared = True
        module[2].weight.original = module[2].weight.elements = 5  # any name is the user's
        model = (nn.parallel.DistributedDataParallel(module) if kind == "ddp"
                 else zero_ref.wrap(module, kind))
        spared = [p for p in model.parameters() if getattr(p, "spared", False)]
        others = [p for p in model.parameters() if not hasattr(p, "spared")]
        assert sorted(getattr(p, "elements", 0) for p in model.parameters()) == [0, 0, 0, 5]
        assert len(spared) == len(others) == 2
        opt = torch.optim.AdamW([{"params": others, "weight_decay": 0.5}, {"params": spared}],
                                lr=0.05, weight_decay=0.0)
        for step in range(3):
            loss_of(model, step).backward()
            opt.step()
            opt.zero_grad()
        return weights(model)

    as_with_ddp(loop, world_size)

    def built_on_meta():
        with torch.device("meta"):
            module = nn.Linear(3, 3)
        module.bias.spared = True
        return [getattr(p, "spared", False) for p in zero_ref.wrap(module, 3).parameters()]

    assert toy.ranks(built_on_meta, world_size) == [[False, True]] * world_size


def make(kind, params):
    return kind(params, lr=0.01)


@pytest.mark.parametrize("kind", ELEMENTWISE, ids=lambda kind: kind.__name__)
def test_optimizer_states_are_plain_and_say_whose_they_are(kind):
    def run(stage):
        model = wrapped(stage)
        opt = make(kind, model.parameters())
        if kind is torch.optim.SGD:
            opt = kind(model.parameters(), lr=0.01, momentum=0.9)
        types = []
        model_step = opt.step

        def closure():
            types.extend(type(p) for p in model.parameters())
            opt.zero_grad()
            loss = loss_of(model, len(types))
            loss.backward()
            return loss

        loss_of(model, 0).backward()
        for _ in range(2):
            model_step(closure)
        assert set(types) == {nn.Parameter}  # of which torch's default chooses foreach on a GPU
        assert {type(p) for p in model.parameters()} == {MasterParameter}
        for state in opt.state.values():
            assert all(type(value) in (torch.Tensor, int, float)
                       for key, value in state.items() if key != "zero_ref_elements")
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        again = make(kind, model.parameters())
        again.load_state_dict(torch.load(file, weights_only=True))
        loss_of(model, 1).backward()
        again.step()

    toy.ranks(lambda: [run(stage) for stage in STAGES], 2)


@pytest.mark.parametrize("world_size", [2, 3])
def test_another_ranks_states_are_refused(world_size):
    def run(stage, saved_at, theirs=True, groups=True):
        model = wrapped(saved_at)
        opt = torch.optim.Adam(model.parameters(), lr=0.05)
        loss_of(model, 0).backward()
        opt.step()
        box = [opt.state_dict()]
        if theirs:
            dist.broadcast_object_list(box, 0)
        model = wrapped(stage)
        opt = torch.optim.Adam(model.parameters(), lr=0.05)
        if not groups:
            box[0]["param_groups"] = opt.state_dict()["param_groups"]
        opt.load_state_dict(box[0])
        loss_of(model, 1).backward()
        if stage == 0 == saved_at or not theirs or (stage > 0 and dist.get_rank() == 0 < saved_at):
            opt.step()
        else:
            refused(opt.step, "has loaded states of")

    def outcomes():
        for stage, saved_at in ((0, 0), (1, 0), (0, 1)):
            run(stage, saved_at)
            run(stage, saved_at, groups=False)
        for stage, saved_at in ((1, 1), (2, 3), (3, 2)):
            run(stage, saved_at, theirs=False)  # all stages from 1 on have the same slices

    toy.ranks(outcomes, world_size)
    for stage in (1, 2, 3):
        sentence = r"has loaded states of the elements from \d+ to \d+ of a parameter"

        def loads_rank_0s(stage=stage):
            model = wrapped(stage)
            opt = torch.optim.Adam(model.parameters(), lr=0.05)
            loss_of(model, 0).backward()
            opt.step()
            box = [opt.state_dict()]
            dist.broadcast_object_list(box, 0)
            opt.load_state_dict(box[0])
            opt.zero_grad()
            loss_of(model, 1).backward()
            opt.step()

        with pytest.raises(zero_ref.RankError, match=sentence):
            toy.ranks(loads_rank_0s, world_size)


# ---- gradients that never come -------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_step_that_no_backward_came_before(world_size):
    """It changes nothing, as with torch DDP."""
    def run(stage):
        model = wrapped(stage)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        opt.step()  # as a scheduler wants it before the first forward
        before = weights(model)
        loss_of(model, 0)  # a loss that is skipped
        opt.step()
        assert all(torch.equal(before[name], value) for name, value in weights(model).items())
        loss_of(model, 0).backward()
        opt.step()
        with torch.no_grad():
            model(data(1))
        opt.zero_grad()
        opt.step()  # without a gradient, as DDP allows

    toy.ranks(lambda: [run(stage) for stage in STAGES], world_size)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_backward_that_names_the_parameters(world_size):
    def loop(kind):
        model = wrapped(kind)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            loss = F.mse_loss(model(data(step)), torch.ones(4, 3))
            loss = loss + 0.1 * sum(p.square().sum() for p in model.parameters())
            loss.backward(inputs=[*model.parameters()])
            opt.step()
            opt.zero_grad()
        return weights(model)

    as_with_ddp(loop, world_size)
