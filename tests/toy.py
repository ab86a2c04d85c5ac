"""What the tests train: tiny models with every awkward shape, and a run of a few steps; and how the
results are compared. Two runs of ours have the same bits, in fp32: `stages_agree`, `equal`. What
others compute is as close as float64 gets, on every machine: `close`."""

from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import zero_ref
from zero_ref import memory
from zero_ref.commands.train import prepare_device
from zero_ref.partition import Layout

STAGES = (0, 1, 2, 3)
VOCAB, WIDTH, PER_RANK = 11, 7, 4
DEVICE = torch.device("cpu")  # of models and batches; `ranks` sets it


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
    return torch.randint(0, VOCAB, (2, PER_RANK), generator=generator).to(DEVICE).unbind()


def whole_batch(step, world_size):
    """What the ranks have between them."""
    return [torch.cat(parts) for parts in zip(*(batch(step, r) for r in range(world_size)))]


def seed(number):
    """For the CPU alone: torch.manual_seed notes for each kind of GPU where it was called, which
    takes a millisecond."""
    torch.default_generator.manual_seed(number)


def build(rank=0, **options):
    seed(rank)  # different initial values on every rank
    return Toy(**options).to(DEVICE)


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
        "sizes": [u.sizes for u in model.units if not u.frozen],
        "frozen": [u.sizes for u in model.units if u.frozen],
    }


def padded(sizes, world_size, itemsize=4):
    """Elements of the flat buffers of units whose parameters have these sizes."""
    return sum(Layout(unit, world_size, itemsize).padded_numel for unit in sizes)


def run_stages(stages, *args, **options):
    """The same run at several stages, in one launch."""
    return [run(stage, *args, **options) for stage in stages]


@contextmanager
def new_tensors_in(dtype):
    """The dtype of what does not say otherwise: new parameters, new data."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def ranks(fn, world_size, *args, dtype=torch.float32, device="cpu", backend=None, **kwargs):
    """What `fn` returns on each rank, where its new parameters and data have this dtype, and those
    of this file are on this device.

    Where it does not say otherwise, half of all models have a message per unit and the other half
    buckets: by stage and world size, so that each stage is tried both ways.
    """
    def wrap(module, stage, **options):
        cap = (stage + world_size) % 2 if stage in STAGES else 1
        return unpatched(module, stage, **{"bucket_cap_mb": cap, **options})

    def on_rank():
        here = prepare_device(device)
        with (new_tensors_in(dtype), mock.patch.object(zero_ref, "wrap", wrap),
              mock.patch("toy.DEVICE", here)):
            return fn(*args, **kwargs)

    unpatched = zero_ref.wrap
    return zero_ref.launch(on_rank, world_size, backend=backend)


# ---- what others compute -------------------------------------------------------------------------


def single_process(optimizer="adam", steps=3, world_size=1, toy=None):
    """The same steps without ranks: the bare module on the whole batch."""
    module = build(**(toy or {}))
    opt = OPTIMIZERS[optimizer](module.parameters())
    for step in range(steps):
        x, y = whole_batch(step, world_size)
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


def in_float64(fn, *args, **kwargs):
    """What `fn` returns here, without ranks, when its new parameters and data are in float64."""
    with new_tensors_in(torch.float64):
        return fn(*args, **kwargs)


# ---- comparisons ---------------------------------------------------------------------------------

LOCAL = ("running_mean", "running_var", "num_batches_tracked")  # BatchNorm's: each rank's own


def equal(a, b, skip=()):
    """Whether two state dicts have the same keys and, but for names that end so, the same bits."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k].cpu(), b[k].cpu()) for k in a if not k.endswith(tuple(skip)))


def stages_agree(fn, world_size, *args, stages=STAGES, dtype=torch.float32, device="cpu",
                 **kwargs):
    """Runs fn(stage, …) at all stages, and checks that they end with the same bits on all ranks.

    fn returns the weights, or a dict that has "weights" as that of `run`: then "losses", of which
    every rank has its own, and "norms" are compared as well. BatchNorm's statistics are each rank's
    own, too. Returns what fn returned, by rank and stage.
    """
    by_rank = ranks(lambda: [fn(stage, *args, **kwargs) for stage in stages], world_size,
                    dtype=dtype, device=device)
    first = _results(by_rank[0][0])
    assert first["weights"]
    for rank, runs in enumerate(by_rank):
        own = _results(runs[0])
        for stage, run in zip(stages, map(_results, runs)):
            assert equal(run["weights"], first["weights"], LOCAL), (stage, rank)
            assert equal(run["weights"], own["weights"]), (stage, rank)
            assert run["losses"] == own["losses"], (stage, rank)
            assert run["norms"] == first["norms"], (stage, rank)
    return by_rank


def _results(run):
    if "weights" not in run:
        run = {"weights": run}
    numbers = {kind: list(map(float, run.get(kind, ()))) for kind in ("losses", "norms")}
    return {"weights": run["weights"], **numbers}


def close(ours, reference, within=1e-10):
    """Whether each tensor of `ours` differs from the reference's by at most this share of its
    largest value. Rounding in float64 stays far below 1e-10, and a mistake far above.

    Where the reference is zero but for rounding, the largest value of all counts.
    """
    if ours.keys() != reference.keys():
        return False
    floats = {k: v for k, v in reference.items() if v.is_floating_point() and v.numel()}
    # Who has to compare in fp32 says how far rounding may go, and why.
    assert within > 1e-10 or all(v.dtype == torch.float64 for v in floats.values()), (
        "rounding in fp32 depends on the machine")
    size = {k: v.abs().max().item() for k, v in floats.items()}
    for name, theirs in reference.items():
        mine = ours[name]
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            return False
        if name not in floats:
            if not torch.equal(mine, theirs):
                return False
            continue
        scale = max(size.values()) if size[name] <= within * max(size.values()) else size[name]
        if not (mine - theirs).abs().max() <= within * scale:  # nor is a NaN close to anything
            return False
    return True
