"""A wrapped model inside another module, and what a module may hold when it is wrapped: buffers and
lazy parameters."""

import copy
import time

import pytest
import torch
import torch.distributed as dist
import toy
from torch import nn
from toy import STAGES, seed

import zero_ref

IN, HIDDEN = 6, 7


def net(outputs):
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Tanh(),
                         nn.Linear(HIDDEN, outputs))


class Agent(nn.Module):
    def __init__(self, actor, critic):
        super().__init__()
        self.actor, self.critic, self.scale = actor, critic, nn.Linear(1, 1)
        self.scale.requires_grad_(False)

    def forward(self, x):
        return self.actor(x), self.critic(x)


def batch(step):
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return torch.randn(4, IN, generator=generator)


def build(kind):
    seed(0)
    nets = net(3), net(1)
    if kind == "ddp":
        return Agent(*map(nn.parallel.DistributedDataParallel, nets))
    return Agent(*(zero_ref.wrap(n, kind) for n in nets))


def step_of(agent, opt, step):
    actor, critic = agent(batch(step))
    (actor.square().mean() + critic.square().mean()).backward()
    opt.step()
    opt.zero_grad()


def saved(agent):
    """Under the names that the bare modules would have: DDP adds its own "module."."""
    return {name.replace(".module.", "."): value.clone()
            for name, value in agent.state_dict().items()}


def life(kind):
    """What happens to a parent in training: each of these reaches the wrapped models."""
    agent = build(kind)
    opt = torch.optim.SGD([p for p in agent.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    step_of(agent, opt, 0)
    checkpoint = copy.deepcopy(agent.state_dict())
    step_of(agent, opt, 1)
    agent.load_state_dict(checkpoint)
    agent.eval()
    step_of(agent, opt, 2)
    agent.train()
    agent.zero_grad()
    agent.requires_grad_(True)
    agent.scale.requires_grad_(False)
    agent.to("cpu").to(torch.float64).double()  # changes nothing
    step_of(agent, opt, 3)
    return saved(agent)


@pytest.mark.parametrize("world_size", [2, 3])
def test_training_inside_a_parent(world_size):
    by_rank = toy.ranks(lambda: [life(kind) for kind in ("ddp", *STAGES)], world_size,
                        dtype=torch.float64)
    for reference, *stages in by_rank:
        for weights in stages:
            assert toy.close(weights, reference)
            assert toy.equal(weights, stages[0])
            assert toy.equal(weights, by_rank[0][1], toy.LOCAL)


def names(stage):
    """The wrapped model has the bare one's names, alone and in a parent."""
    bare, agent = Agent(net(3), net(1)), build(stage)
    trainable = [name for name, p in bare.named_parameters() if p.requires_grad]
    found = dict(agent.named_parameters())
    assert [name for name in found if not name.startswith("scale")] == trainable
    assert [*agent.state_dict()] == [*bare.state_dict()]
    assert [name for name, _ in agent.named_buffers()] == [name for name, _ in bare.named_buffers()]
    assert [name for name, _ in agent.named_modules()] == [n for n, _ in bare.named_modules()]
    assert dict(agent.named_modules())["actor"] is agent.actor
    assert [*dict(agent.actor.named_modules())] == [*dict(bare.actor.named_modules())]
    assert ([name for name, _ in agent.actor.named_buffers("x")]
            == [name for name, _ in bare.actor.named_buffers("x")])
    assert [*agent.actor.named_buffers(recurse=False)] == []
    assert [*agent.actor.named_parameters(recurse=False)] == []
    assert [*agent.named_parameters(recurse=False)] == []
    assert [name for name, _ in agent.actor.named_children()] == ["0", "1", "2", "3"]
    assert sum(isinstance(m, nn.BatchNorm1d) for m in agent.modules()) == 2
    assert agent.get_submodule("actor.1") is agent.actor.module[1] is agent.actor.get_submodule("1")
    owned = [*agent.actor.parameters(), *agent.critic.parameters(), *agent.scale.parameters()]
    assert {id(p) for p in agent.parameters()} == {id(p) for p in owned}
    assert all(found[f"actor.{name}"] is p for name, p in agent.actor.named_parameters())
    assert "(module): Sequential(" in repr(agent) and "(1): BatchNorm1d(7" in repr(agent.actor)
    seen = []
    agent.apply(lambda m: seen.append(type(m).__name__))
    assert seen.count("Tanh") == 2 and seen.count(f"Stage{stage}") == 2 and seen[-1] == "Agent"
    root = zero_ref.wrap(nn.BatchNorm1d(HIDDEN), stage)
    assert [name for name, _ in root.named_parameters(recurse=False)] == ["weight", "bias"]
    assert len([*root.named_buffers(recurse=False)]) == 3
    assert not hasattr(root, "no_such_thing") and not hasattr(agent.actor, "no_such_thing")


def test_names_in_a_parent():
    toy.ranks(lambda: [names(stage) for stage in STAGES], 2)


def loads(stage):
    agent = build(stage)
    state = {name: value + 1 for name, value in agent.state_dict().items()}
    result = agent.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    assert toy.equal(agent.state_dict(), state)
    lacking = {name: value for name, value in state.items() if name != "critic.3.bias"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"critic.3.bias"'):
        agent.load_state_dict(lacking)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"actor.9.bias"'):
        agent.load_state_dict({**state, "actor.9.bias": torch.ones(1)})
    assert agent.load_state_dict(lacking, strict=False).missing_keys == ["critic.3.bias"]
    prefixed = agent.actor.state_dict(prefix="a.")
    assert next(iter(prefixed)) == "a.0.weight"
    for change in (lambda: agent.to(torch.float64), lambda: agent.half(), agent.bfloat16,
                   lambda: agent.actor.to("meta")):
        with pytest.raises(RuntimeError, match="cannot be moved or cast"):
            change()
    assert agent.float() is agent and agent.cpu() is agent


def test_state_dicts_in_a_parent():
    toy.ranks(lambda: [loads(stage) for stage in STAGES], 2)


def moved_inside_a_parent(stage):
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = zero_ref.wrap(nn.Conv2d(2, 2, 3), stage)

    with pytest.raises(RuntimeError, match="cannot be moved or cast"):
        Images().to(memory_format=torch.channels_last)
    mixed = zero_ref.wrap(nn.Linear(3, 3), stage, mixed_precision=zero_ref.MixedPrecision())
    assert mixed.float() is mixed
    with pytest.raises(RuntimeError, match="cannot be moved or cast"):
        mixed.bfloat16()


def test_formats_and_mixed_precision_in_a_parent():
    toy.ranks(lambda: [moved_inside_a_parent(stage) for stage in STAGES], 2)


# ---- buffers and lazy modules --------------------------------------------------------------------


def with_buffer(buffer):
    module = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, 1))
    module[1].register_buffer("extra", buffer)
    return module


def batch_through(module):
    module(torch.ones(4, IN))
    return module


@pytest.mark.parametrize("build, sentence", [
    (lambda: with_buffer(torch.eye(3).to_sparse()),
     r"buffer '1.extra' is torch.sparse_coo: .* register buffer.to_dense\(\)"),
    (lambda: with_buffer(torch.eye(3).to_sparse_csr()), "buffer '1.extra' is torch.sparse_csr"),
    (lambda: with_buffer(torch.ones(1, 3).expand(5, 3)),
     r"buffer '1.extra' is expanded, .* register buffer.clone\(\)"),
    (lambda: nn.Sequential(nn.Linear(IN, 2), nn.LazyLinear(3)),
     "'1' is a LazyLinear, whose parameters have no shape yet: run one batch through the module"),
    (lambda: nn.Sequential(nn.Linear(IN, 2), nn.LazyBatchNorm1d(affine=False)),
     "'1' is a LazyBatchNorm1d"),
    (lambda: nn.LazyLinear(3), "'the module' is a LazyLinear"),
])
@pytest.mark.parametrize("on", [(0, 1), (1,)], ids=["everywhere", "rank 1"])
def test_what_cannot_be_wrapped(build, sentence, on):
    def run():
        module = build() if dist.get_rank() in on else with_buffer(torch.ones(3))
        with pytest.raises(ValueError, match=sentence):
            zero_ref.wrap(module, 3)

    toy.ranks(run, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_buffers_and_lazy_modules_that_work(stage):
    def run():
        for module in (batch_through(nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())),
                       with_buffer(torch.ones(3, 2).t()), with_buffer(torch.ones(0, 3)),
                       with_buffer(torch.tensor(True)), with_buffer(torch.ones(1).expand(1, 1))):
            model = zero_ref.wrap(module, stage)
            model(torch.ones(4, IN)).sum().backward()

    toy.ranks(run, 2)


BUFFER_CHANGES = {
    "buffer '1.extra' is (4,) float32 now, and where it is there was one that is (3,) float32":
        lambda m: setattr(m, "extra", torch.ones(4)),
    "buffer '1.extra' is (3,) float64 now": lambda m: setattr(m, "extra", torch.ones(3).double()),
    "buffer '1.extra' is (3, 3) float32 (torch.sparse_coo) now":
        lambda m: setattr(m, "extra", torch.eye(3).to_sparse()),
    "the module had 1 buffers when it was wrapped, and has 0 now":
        lambda m: setattr(m, "extra", None),
    "has 2 now, the last of them '1.more'": lambda m: m.register_buffer("more", torch.ones(3)),
}


@pytest.mark.parametrize("world_size", [2, 3])
def test_buffers_that_changed_since_wrap(world_size):
    def run():
        for stage in STAGES:
            for sentence, change in BUFFER_CHANGES.items():
                model = zero_ref.wrap(with_buffer(torch.ones(3)), stage)
                change(model.module[1])
                with pytest.raises(RuntimeError, match=r"before zero_ref.wrap, or keep") as error:
                    model(torch.ones(4, IN))
                assert sentence in str(error.value)

    toy.ranks(run, world_size)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_buffer_that_changed_on_one_rank_ends_the_run_at_once(rank):
    def run():
        model = zero_ref.wrap(with_buffer(torch.ones(3)), 1)
        if dist.get_rank() == rank:
            model.module[1].extra = torch.ones(4)
        model(torch.ones(4, IN))

    begin = time.monotonic()
    with pytest.raises(zero_ref.RankError, match=rf"rank {rank} raised RuntimeError: buffer '1.ex"):
        toy.ranks(run, 2)
    assert time.monotonic() - begin < 20


# ---- torch.compile -------------------------------------------------------------------------------


class Decaying(nn.Linear):
    """Writes into its own weight before it uses it, in three ways."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.data.mul_(0.9)
            self.weight.mul_(0.9)
            self.bias.detach().add_(0.1)
        return torch.tanh(super().forward(x))


def compiled(kind, whole):
    torch._dynamo.reset()
    seed(0)
    module = nn.Sequential(Decaying(IN, IN), Decaying(IN, IN))
    if not whole:
        for unit in module:
            unit.compile(backend="aot_eager")
    model = (nn.parallel.DistributedDataParallel(module) if kind == "ddp"
             else zero_ref.wrap(module, kind))
    call = torch.compile(model, backend="aot_eager") if whole else model
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        call(batch(step)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    return copy.deepcopy(module.state_dict() if kind == "ddp" else model.state_dict())


def test_a_compiled_model_whose_forward_writes():
    def run():
        return [[compiled(kind, whole) for kind in ("ddp", 0, 3)] for whole in (False, True)]

    for rank in toy.ranks(run, 2, dtype=torch.float64):
        for reference, *stages in rank:
            assert all(toy.close(weights, reference) for weights in stages)
            assert toy.equal(*stages)
