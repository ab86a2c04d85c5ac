"""What the tests train: tiny models with every awkward shape, and a run of a few steps."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import zero_ref
from zero_ref import memory

VOCAB, WIDTH, PER_RANK = 11, 7, 4


class Block(nn.Module):
    """113 parameters, 57 + 56: divides by none of 2, 3 and 4."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH + 1), nn.Linear(WIDTH + 1, WIDTH, bias=False)
        self.shift = nn.Parameter(torch.zeros(()))  # 0-dimensional

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x))) + self.shift


class Scale(nn.Module):
    """Fewer elements than ranks."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return x * self.weight[0] + self.weight[1]


class Toy(nn.Module):
    """Tied, frozen, tiny and (with norm) buffered parameters: (B,) ids -> (B, VOCAB) logits."""

    def __init__(self, norm=True, frozen=True):
        super().__init__()
        self.token = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block(), Scale(), Block(), nn.Linear(WIDTH, WIDTH)])
        self.blocks[3].weight.requires_grad_(not frozen)
        self.norm = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.token.weight

    def forward(self, ids):
        x = self.token(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
}


def batch(step, rank):
    """Different data on every rank and at every step: (PER_RANK,) ids and targets."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(0, VOCAB, (2, PER_RANK), generator=generator).unbind()


def build(rank=0, **options):
    torch.manual_seed(rank)  # different initial values on every rank
    return Toy(**options)


def run(stage, optimizer="adam", steps=3, micro=1, clip=None, sync_all=True, toy=None, **options):
    """A few steps on this rank. Returns what the promises are about, as a dict."""
    rank = dist.get_rank()
    model = zero_ref.wrap(build(rank, **(toy or {})), stage, **options)
    opt = OPTIMIZERS[optimizer](model.parameters())
    losses, norms, events = [], [], []
    for step in range(steps):
        with zero_ref.trace() as t:
            for part in range(micro):
                x, y = batch(step * micro + part, rank)
                last = part == micro - 1
                if last or sync_all:
                    loss = F.cross_entropy(model(x), y) / micro
                    loss.backward()
                else:
                    with model.no_sync():
                        loss = F.cross_entropy(model(x), y) / micro
                        loss.backward()
                losses.append(loss.item())
            after_backward = memory.resident(model, opt)
            if clip:
                norms.append(model.clip_grad_norm_(*clip))
            opt.step()
            opt.zero_grad()
        events = t.events
    return {
        "weights": model.state_dict(), "losses": losses, "norms": norms, "events": events,
        "wire_bytes": t.wire_bytes(), "after_backward": after_backward,
        "at_rest": memory.resident(model, opt),
        "sizes": [u.numel for u in model.units if not u.frozen],
        "frozen": [u.numel for u in model.units if u.frozen],
    }


def run_stages(stages, *args, **options):
    """The same run at several stages, in one launch."""
    return [run(stage, *args, **options) for stage in stages]


def ranks(fn, world_size, *args, **kwargs):
    return zero_ref.launch(lambda: fn(*args, **kwargs), world_size)


def single_process(optimizer="adam", steps=3, world_size=1, toy=None):
    """The same steps without ranks: the bare module on the whole batch."""
    module = build(**(toy or {}))
    opt = OPTIMIZERS[optimizer](module.parameters())
    for step in range(steps):
        parts = [batch(step, rank) for rank in range(world_size)]
        x, y = (torch.cat(both) for both in zip(*parts))
        F.cross_entropy(module(x), y).backward()
        opt.step()
        opt.zero_grad()
    return module.state_dict()


def torch_ddp(optimizer="adam", steps=3, toy=None):
    """The same steps with torch's DistributedDataParallel, on this rank."""
    module = build(dist.get_rank(), **(toy or {}))
    model = nn.parallel.DistributedDataParallel(module)
    opt = OPTIMIZERS[optimizer](model.parameters())
    for step in range(steps):
        x, y = batch(step, dist.get_rank())
        F.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    return module.state_dict()


def equal(a, b, skip=()):
    """Whether two state dicts have the same keys and the same bits."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) for k in a if not k.startswith(tuple(skip)))


def close(a, b):
    return a.keys() == b.keys() and all(
        torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-6) for k in a)
