"""Training loops that work with torch DDP work at every stage, with the same result."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import toy
from torch import nn
from torch.optim import lr_scheduler
from toy import STAGES, seed

import zero_ref
from zero_ref.engine.local import LocalGrad

PLAIN = {"norm": False}


def compare_with_ddp(loop, world_size=2):
    """`loop(model, loss)` trains; `loss(i)` is one micro-batch's. All stages end with the same bits
    on all ranks, and in float64 the last of them with what torch DDP makes of the same loop. What
    `loop` returns, learning rates for instance, is compared as well. Returns the float64 weights.
    """
    def run(stage):
        rank = dist.get_rank()
        module = toy.build(rank, **PLAIN)
        model = (nn.parallel.DistributedDataParallel(module) if stage == "ddp"
                 else zero_ref.wrap(module, stage))

        def loss(i):
            x, y = toy.batch(i, rank)
            return F.cross_entropy(model(x), y)

        numbers = loop(model, loss) or []
        return {"weights": (module if stage == "ddp" else model).state_dict(), "losses": numbers}

    toy.stages_agree(run, world_size)
    by_rank = toy.ranks(lambda: (run(3), run("ddp")), world_size, dtype=torch.float64)
    for ours, ddp in by_rank:
        assert toy.close(ours["weights"], ddp["weights"])
        assert ours["losses"] == pytest.approx(ddp["losses"], rel=1e-10)
    return by_rank[0][0]["weights"]


def original_names(model):
    """(name, parameter), without DDP's prefix."""
    return [(name.removeprefix("module."), p) for name, p in model.named_parameters()
            if p.requires_grad]


def no_decay(model):
    """Two groups by name, and an empty one between them."""
    named = original_names(model)
    return [
        {"params": [p for n, p in named if "bias" not in n], "weight_decay": 0.1, "lr": 0.05},
        {"params": [], "lr": 1.0},
        {"params": [p for n, p in named if "bias" in n], "weight_decay": 0.0, "lr": 0.2},
    ]


def train(model, loss, opt, scheduler=None, steps=4):
    for i in range(steps):
        loss(i).backward()
        opt.step()
        if scheduler:
            scheduler.step()
        opt.zero_grad()
    return [group["lr"] for group in opt.param_groups]


# ---- groups, schedulers, optimizers --------------------------------------------------------------


SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(
        opt, [lambda i: 1 / (1 + i), lambda i: 1.0, lambda i: 0.5**i]),
    "OneCycle": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=[0.1, 0.2, 0.3], total_steps=6),
    "warm-up, then cosine": lambda opt: lr_scheduler.SequentialLR(opt, [
        lr_scheduler.LinearLR(opt, 0.1, total_iters=2),
        lr_scheduler.CosineAnnealingLR(opt, T_max=4)], milestones=[2]),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_groups_and_schedulers(scheduler):
    def loop(model, loss):
        opt = torch.optim.SGD(no_decay(model), momentum=0.9)
        lrs = train(model, loss, opt, SCHEDULERS[scheduler](opt))
        assert len(opt.param_groups) == 3 and not opt.param_groups[1]["params"]
        return lrs

    compare_with_ddp(loop, 3)


def test_a_group_that_comes_later_and_an_lr_changed_by_hand():
    def loop(model, loss):
        named = original_names(model)
        opt = torch.optim.SGD([p for n, p in named if "blocks" in n], lr=0.1, momentum=0.9)
        train(model, loss, opt, steps=2)
        model.zero_grad()  # what was not in the optimizer yet
        opt.add_param_group({"params": [p for n, p in named if "blocks" not in n], "lr": 0.01})
        opt.param_groups[0]["lr"] = 0.02
        return train(model, loss, opt, steps=2)

    compare_with_ddp(loop)


ELEMENTWISE = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "amsgrad": True}, "AdamW": {"lr": 0.01}, "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.01}, "Adamax": {"lr": 0.01}, "Adagrad": {"lr": 0.01},
    "Adadelta": {"lr": 1.0}, "RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True},
    "Rprop": {"lr": 0.01}, "ASGD": {"lr": 0.01},
}


def with_optimizer(stage, name, options, steps=3):
    module = toy.build(dist.get_rank(), **PLAIN)
    model = zero_ref.wrap(module, stage)
    opt = getattr(torch.optim, name)(model.parameters(), **options)
    for i in range(steps):
        x, y = toy.batch(i, dist.get_rank())
        F.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    steps_counted = {int(s["step"]) for s in opt.state.values() if "step" in s}
    assert steps_counted <= {steps}  # once per step
    return model.state_dict()


def one_process(name, options, world_size, steps=3):
    module = toy.build(**PLAIN)
    opt = getattr(torch.optim, name)(module.parameters(), **options)
    for i in range(steps):
        for rank in range(world_size):
            x, y = toy.batch(i, rank)
            (F.cross_entropy(module(x), y) / world_size).backward()
        opt.step()
        opt.zero_grad()
    return module.state_dict()


# No gradient of this net is zero but for rounding. Rprop would take whole steps by the sign of such
# a gradient, and Adam or Adagrad by its ratio to itself.
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_optimizers(name, foreach):
    options = {**ELEMENTWISE[name], "foreach": foreach}
    toy.stages_agree(with_optimizer, 3, name, options)
    ours = toy.ranks(with_optimizer, 3, 3, name, options, dtype=torch.float64)
    assert toy.close(ours[0], toy.in_float64(one_process, name, options, 3))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_fused_optimizers_agree_within_rounding(name):
    """Fused kernels round the end of a slice in another way than its middle."""
    options = {"lr": 0.01, "fused": True}
    alone = toy.in_float64(one_process, name, options, 3)
    stages = toy.ranks(lambda: [with_optimizer(stage, name, options) for stage in STAGES], 3,
                       dtype=torch.float64)[0]
    for weights in stages:
        assert toy.close(weights, alone)


def test_closures():
    def loop(model, loss):
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        values = []
        for i in range(3):
            def closure(i=i):
                opt.zero_grad()
                value = loss(i)
                value.backward()
                return value
            values.append(opt.step(closure).item())
        return values

    compare_with_ddp(loop)


# ---- accumulation and clipping -------------------------------------------------------------------


def accumulate(how, micro=3):
    """One optimizer step per `micro` micro-batches."""
    def loop(model, loss):
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(2):
            for part in range(micro):
                i, last = step * micro + part, part == micro - 1
                if last or how == "every backward reduces":
                    (loss(i) / micro).backward()
                else:
                    with model.no_sync():
                        (loss(i) / micro).backward()
            opt.step()
            opt.zero_grad()

    return loop


@pytest.mark.parametrize("how", ["every backward reduces", "no_sync"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_accumulation(how, world_size):
    def big_batch():
        module = toy.build(**PLAIN)
        opt = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for step in range(2):
            parts = [toy.whole_batch(3 * step + part, world_size) for part in range(3)]
            x, y = (torch.cat(both) for both in zip(*parts))
            F.cross_entropy(module(x), y).backward()
            opt.step()
            opt.zero_grad()
        return module.state_dict()

    weights = compare_with_ddp(accumulate(how), world_size)
    assert toy.close(weights, toy.in_float64(big_batch))


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("sync_all", [True, False])
def test_collectives_per_step(micro, sync_all):
    """In units of Ψ·(N-1)/N elements: 2G, G+1, G+1, 3G; with no_sync those of one micro-batch, but
    for stage 3, which has to gather for every micro-batch."""
    plain = {**PLAIN, "frozen": False}
    runs = toy.ranks(toy.run_stages, 3, STAGES, "sgd", 2, micro, sync_all=sync_all, toy=plain)[0]
    reduces = micro if sync_all else 1
    expected = {0: 2 * reduces, 1: reduces + 1, 2: reduces + 1, 3: 2 * micro + reduces}
    for stage, run in zip(STAGES, runs):
        padded = toy.padded(run["sizes"], 3)
        assert run["wire_bytes"] == expected[stage] * 4 * padded * 2 // 3


def test_no_sync_entered_before_forward_counts_for_backward():
    """As with DDP the forward may lie inside or outside: what counts is where backward runs."""
    def run(stage):
        model = zero_ref.wrap(toy.build(**PLAIN), stage)
        x, y = toy.batch(0, dist.get_rank())
        with model.no_sync():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        inside = [p.grad is not None for p in model.parameters()]
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        with model.no_sync():
            loss.backward()
        return any(inside), not any(isinstance(p.grad, LocalGrad) for p in model.parameters())

    for reduced, kept_back in toy.ranks(lambda: [run(s) for s in STAGES], 2)[0]:
        assert reduced and not kept_back


@pytest.mark.parametrize("norm_type", [1, 2, 3, float("inf")])
def test_clipping_while_accumulating(norm_type):
    for sync_all in (True, False):
        by_rank = toy.stages_agree(toy.run, 3, "sgd", 2, 2, (0.1, norm_type), sync_all)
        assert by_rank[0][0]["norms"][0] > 0.1  # or clipping did nothing


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_torchs_own_clipping_of_slices_is_refused(stage):
    def clip():
        model = zero_ref.wrap(toy.build(**PLAIN), stage)
        model(toy.batch(0, 0)[0]).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    with pytest.raises(zero_ref.RankError, match=r"use model.clip_grad_norm_\(max_norm\)"):
        toy.ranks(clip, 2)


class Skips(nn.Module):
    """Two units, of which it leaves out the second when it is told to."""

    def __init__(self):
        super().__init__()
        self.units = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)])
        self.skip = False

    def forward(self, x):
        return self.units[0](x) if self.skip else self.units[1](self.units[0](x))


def second_unit_only_inside_no_sync(stage):
    seed(0)
    module = Skips()
    model = module if stage is None else zero_ref.wrap(module, stage)
    ranks = (0, 1) if stage is None else (dist.get_rank(),)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        for module.skip in (False, True):
            with nullcontext() if module.skip or stage is None else model.no_sync():
                for rank in ranks:
                    (model(torch.ones(2, 6) + rank).square().mean() / len(ranks)).backward()
        opt.step()
        opt.zero_grad()
    return model.state_dict()


def test_a_parameter_used_only_inside_no_sync():
    toy.stages_agree(second_unit_only_inside_no_sync, 2)
    ours = toy.ranks(second_unit_only_inside_no_sync, 2, 3, dtype=torch.float64)[0]
    assert toy.close(ours, toy.in_float64(second_unit_only_inside_no_sync, None))


# ---- backward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    def loop(model, loss):
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for i in range(3):
            loss(2 * i).backward()
            loss(2 * i + 1).backward()  # twice before a step
            opt.step()
            (model if i else opt).zero_grad(set_to_none=set_to_none)

    compare_with_ddp(loop)


def test_inference_between_steps():
    def loop(model, loss):
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for i in range(3):
            loss(i).backward()
            model.eval()
            with torch.no_grad():
                loss(100 + i)
            with torch.inference_mode():
                loss(200 + i)
            model.train()
            opt.step()
            opt.zero_grad()
            loss(300 + i)  # with a graph, and never a backward

    compare_with_ddp(loop)


def twice_through_a_graph(stage):
    """retain_graph, which torch DDP does not reduce for the second time."""
    module = toy.build(**PLAIN)
    model = zero_ref.wrap(module, stage) if stage is not None else module
    ranks = (0, 1) if stage is None else (dist.get_rank(),)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for i in range(2):
        for rank in ranks:
            x, y = toy.batch(i, rank)
            value = F.cross_entropy(model(x), y) / len(ranks)
            (value * 0.5).backward(retain_graph=True)
            (value * 0.25).backward()
        opt.step()
        opt.zero_grad()
    return model.state_dict()


def test_twice_through_a_graph():
    toy.stages_agree(twice_through_a_graph, 2)
    ours = toy.ranks(twice_through_a_graph, 2, 3, dtype=torch.float64)[0]
    assert toy.close(ours, toy.in_float64(twice_through_a_graph, None))


def penalised(stage):
    """The gradient with respect to the input is part of the loss."""
    seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    model = module if stage is None else zero_ref.wrap(module, stage)
    ranks = (0, 1) if stage is None else (dist.get_rank(),)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(2):
        for rank in ranks:
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * i + rank))
            out = model(x.requires_grad_())
            slope, = torch.autograd.grad(out.sum(), x, create_graph=True)
            ((out.square().mean() + slope.square().sum()) / len(ranks)).backward()
        opt.step()
        opt.zero_grad()
    return model.state_dict()


def test_a_gradient_penalty():
    toy.stages_agree(penalised, 2, stages=(0, 1, 2))
    ours = toy.ranks(penalised, 2, 2, dtype=torch.float64)[0]
    assert toy.close(ours, toy.in_float64(penalised, None))


def two_graphs_at_a_time(stage):
    """Two forwards, then their backwards, with one in eval between them and one backward twice."""
    rank = dist.get_rank()
    model = zero_ref.wrap(toy.build(rank, **PLAIN), stage)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(2):
        x, y = toy.batch(2 * step, rank)
        first = F.cross_entropy(model(x), y)
        with torch.no_grad():
            model.eval()(x)
        x, y = toy.batch(2 * step + 1, rank)
        second = F.cross_entropy(model.train()(x), y)
        first.backward()
        second.backward(retain_graph=step == 0)
        if step == 0:
            second.backward()
        opt.step()
        opt.zero_grad(set_to_none=step == 0)
    return model.state_dict()


def test_two_forwards_then_two_backwards():
    toy.stages_agree(two_graphs_at_a_time, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_a_graph_from_before_the_step_is_refused(stage):
    def loop():
        model = zero_ref.wrap(toy.build(**PLAIN), stage)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        x, _ = toy.batch(0, dist.get_rank())
        first, second = model(x).sum(), model(x).sum()
        first.backward()
        opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            second.backward()

    toy.ranks(loop, 2)


def test_a_gradient_penalty_at_stage_3_is_refused():
    with pytest.raises(zero_ref.RankError, match="create_graph=True does not work at stage 3"):
        toy.ranks(penalised, 2, 3)


def test_create_graph_in_backward_is_refused():
    def run(stage):
        model = zero_ref.wrap(toy.build(**PLAIN), stage)
        with pytest.raises(RuntimeError, match="create_graph=True"):
            model(toy.batch(0, 0)[0]).sum().backward(create_graph=True)

    toy.ranks(lambda: [run(stage) for stage in STAGES], 2)


def test_sparse_gradients_are_refused():
    def run(stage):
        model = zero_ref.wrap(nn.Sequential(nn.Embedding(5, 3, sparse=True)), stage)
        with pytest.raises(RuntimeError, match=r"the gradient of '0\.weight' is sparse"):
            model(torch.tensor([1])).sum().backward()

    toy.ranks(lambda: [run(stage) for stage in STAGES], 2)


# ---- two models ----------------------------------------------------------------------------------


def of_all(models):
    """One state dict of several models'."""
    return {f"{i}.{k}": v for i, model in enumerate(models) for k, v in model.state_dict().items()}


def adversaries(stage):
    """Two models whose losses run through each other, with an optimizer each."""
    seed(0)
    modules = [nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)),
               nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))]
    if stage is None:
        (maker, critic), ranks = modules, (0, 1)
    else:
        (maker, critic), ranks = [zero_ref.wrap(m, stage) for m in modules], (dist.get_rank(),)
    opts = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (maker, critic)]
    for i in range(3):
        for which, sign in ((1, 1.0), (0, -1.0)):
            for r in ranks:
                x = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * i + r))
                made = maker(x) if which == 0 else maker(x).detach()
                value = sign * (critic(made) - critic(x)).tanh().mean()
                (value / len(ranks)).backward()
            opts[which].step()
            maker.zero_grad()
            critic.zero_grad()
    return of_all((maker, critic))


def test_two_models():
    toy.stages_agree(adversaries, 2)
    ours = toy.ranks(adversaries, 2, 3, dtype=torch.float64)[0]
    assert toy.close(ours, toy.in_float64(adversaries, None))


class OnRank1(nn.Module):
    """Uses its weight on rank 1 only."""

    def __init__(self):
        super().__init__()
        self.linear, self.rank = nn.Linear(3, 3), 1

    def forward(self, x):
        return torch.tanh(self.linear(x)) if self.rank else x


def two_in_one_backward(stage):
    """The critic's gradients are late on rank 0; the maker's, of the same sizes, are not."""
    seed(0)
    maker = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    critic = nn.Sequential(nn.Linear(3, 3), OnRank1(), nn.Linear(3, 3))
    bare, ranks = stage is None, (0, 1) if stage is None else (dist.get_rank(),)
    models = [m if bare else zero_ref.wrap(m, stage) for m in (maker, critic)]
    opts = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    for i in range(2):
        for critic[1].rank in ranks:
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * i + critic[1].rank))
            (models[1](models[0](x)).square().mean() / len(ranks)).backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
    return of_all(models)


def test_two_models_in_one_backward_with_a_gradient_that_one_rank_lacks():
    toy.stages_agree(two_in_one_backward, 2)
    ours = toy.ranks(two_in_one_backward, 2, 3, dtype=torch.float64)[0]
    assert toy.close(ours, toy.in_float64(two_in_one_backward, None))


# ---- what reaches behind the engine's back -------------------------------------------------------


@pytest.mark.parametrize("write", [
    lambda p: p.clamp_(-0.05, 0.05), lambda p: p.mul_(0.5), lambda p: p.zero_()])
def test_writing_into_the_optimizers_parameters(write):
    """Clipped weights, say: as the optimizer's own updates they reach all ranks."""
    def loop(model, loss):
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for i in range(3):
            train(model, lambda _, i=i: loss(i), opt, steps=1)
            with torch.no_grad():
                for _, p in original_names(model):
                    write(p)
        loss(5)

    compare_with_ddp(loop, 3)


def moved(stage):
    model = zero_ref.wrap(toy.build(**PLAIN), stage)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    model(toy.batch(0, 0)[0]).sum().backward()
    model.module.double()
    with pytest.raises(RuntimeError, match="does not lie in its flat buffer any more"):
        opt.step()


def test_moving_what_the_module_holds():
    toy.ranks(lambda: [moved(stage) for stage in (0, 1, 2)], 2)


def test_hooks_that_would_never_run_are_refused():
    def run(stage):
        model = zero_ref.wrap(toy.build(**PLAIN), stage)
        with pytest.raises(RuntimeError, match="would never run"):
            next(model.parameters()).register_hook(print)

    toy.ranks(lambda: [run(stage) for stage in STAGES], 2)


def test_norms_of_slices_are_refused():
    def run(stage):
        model = zero_ref.wrap(toy.build(**PLAIN), stage)
        model(toy.batch(0, 0)[0]).sum().backward()
        grad = next(p.grad for p in model.parameters() if p.grad is not None)
        assert (grad * 2 - grad).tolist() == grad.tolist()  # anything else works
        for norm in (grad.norm, grad.detach().norm, grad.data.norm,
                     lambda: torch.linalg.norm(grad)):
            with pytest.raises(RuntimeError, match=r"use model.clip_grad_norm_\(max_norm\)"):
                norm()

    toy.ranks(lambda: [run(stage) for stage in (1, 2, 3)], 2)


def test_an_embedding_with_max_norm_is_refused():
    with pytest.raises(zero_ref.RankError, match=r"has max_norm=1\.0: its forward overwrites"):
        toy.ranks(lambda: zero_ref.wrap(nn.Embedding(3, 3, max_norm=1.0), 0), 2)
