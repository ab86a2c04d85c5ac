"""What `compare` does on every rank: train with one system, and measure it."""

import gc
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from .. import MixedPrecision, wrap
from ..engine.optimizers import ELEMENTWISE
from ..engine.slices import without_marks
from ..observe import memory
from ..observe.trace import loopback_bytes, trace
from ..tasks.task import Task, seed_everything
from . import systems
from .train import prepare_device, progress

COUNTED = 3  # steps in which bytes are counted
TIMED = 5  # steps in each further round of timing


@dataclass
class Settings:
    """What is the same for all systems of a comparison. folder: where rank 0 keeps the weights of
    stage 0, for the others to compare with. unused: names of parameters that get no gradient on any
    rank. groups: how many parameters the optimizer sorts into each group, of the bare module's.
    find_unused: whether some get none on one of them."""

    steps: int
    seed: int
    device: str
    mixed_precision: MixedPrecision | None
    folder: Path
    unused: frozenset[str] = frozenset()
    groups: list[int] | None = None
    find_unused: bool = False


@dataclass
class System:
    """name: its row's. stage: the ZeRO stage whose formula it is to keep to, None for FSDP2 and
    for a user's own. wrap(net, task, settings) -> the model. kind: "ours", "torch" or "user"."""

    name: str
    wrap: Callable[[nn.Module, Task, Settings], nn.Module]
    stage: int | None = None
    kind: str = "torch"


def stage(number: int) -> System:
    return System(f"stage {number}", lambda net, task, settings: wrap(
        net, number, units=task.units, mixed_precision=settings.mixed_precision), number, "ours")


DDP = System("DDP", lambda net, task, settings: systems.ddp(net, settings.find_unused), 0)
FSDP2 = System("FSDP2", lambda net, task, settings: systems.fsdp2(
    net, task.units, settings.mixed_precision))


def users(name: str, wrap_like: systems.WrapLike, number: int) -> System:
    return System(f"{name}, stage {number}", lambda net, task, settings: wrap_like(net, number),
                  kind="user")


def train(make_task: Callable[[], Task], system: System, settings: Settings,
          dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Take the steps, without instruments, and compare the weights with those of stage 0, which
    comes first. dtype: the module's and the data's, instead of their own."""
    return _Run(make_task(), system, settings, dtype).train()


def measure(make_task: Callable[[], Task], system: System, settings: Settings) -> dict[str, Any]:
    """`train`, then count bytes in steps of their own, with a model of their own."""
    return _Run(make_task(), system, settings).train() | count_bytes(make_task, system, settings)


def time_steps(make_task: Callable[[], Task], system: System, settings: Settings) -> float:
    """Seconds per step, the median of a few, with a model of its own."""
    run, seconds = _Run(make_task(), system, settings), []
    for number in range(TIMED):
        run.step(number)
        seconds.append(time.perf_counter() - run.start)
    return _median(seconds)


def count_bytes(make_task: Callable[[], Task], system: System, settings: Settings
                ) -> dict[str, Any]:
    """What this rank holds between two steps and at the peak of one, and what it sends."""
    task = make_task()  # with its data, which are nobody's model states
    gc.collect()
    before = live_bytes()
    found: dict[str, Any] = {}
    run = _Run(task, system, settings)

    def at_rest():
        return sum(n for key, n in live_bytes().items() if key not in before)

    def look():
        found["resident"] = memory.resident(run.model, run.optimizer)
        found["together"] = at_rest()

    for number in range(2):  # optimizer states and DDP's buckets are there after these
        run.step(number)
    found["peak"] = at_rest() + _ddp_buckets(run.model) + most_bytes(run.device,
                                                                     lambda: run.step(2))
    run.step(3, look)
    counts = []
    for number in range(4, 4 + COUNTED):
        dist.barrier()
        sent_before = loopback_bytes()
        with trace() as sent:
            run.step(number)
        dist.barrier()
        sent_after = loopback_bytes()
        if sent_before is not None and sent_after is not None:
            counts.append((sent_after - sent_before) / dist.get_world_size())
    found["counted"] = min(counts, default=None)  # others may send something, too
    found["sent"] = sum(event.wire_bytes for event in sent.events if event.unit != "buffers")
    found["state_dtypes"] = _state_dtypes(run.optimizer)
    if system.kind == "ours":
        used = [p for name, p in run.model.named_parameters() if name not in settings.unused]
        has_states = [bool(run.optimizer.state.get(p)) for p in used if p.numel()]
        found["all_have_states"] = (isinstance(run.optimizer, ELEMENTWISE)
                                    and (all(has_states) or not any(has_states)))
        found["units"] = [
            (u.sizes, u.frozen, [*map(str, (u.dtype, u.grad_dtype, u.master.dtype))],
             [i for i, name in enumerate(u.names) if name in settings.unused])
            for u in run.model.units]
    return found


def _median(seconds):
    """Of all but the first step, which creates the optimizer states."""
    return sorted(seconds[1:])[len(seconds[1:]) // 2]


def _state_dtypes(optimizer):
    """Names of the dtypes of what the optimizer keeps for each element, by the parameter's."""
    found = {}
    for p, state in optimizer.state.items():
        if p.numel():
            found.setdefault(str(p.dtype), [
                str(value.dtype) for key, value in state.items()
                if key != "step" and getattr(value, "shape", None) == p.shape])
    return found


class _Run:
    def __init__(self, task: Task, system: System, settings: Settings, dtype=None):
        self.task, self.system, self.settings, self.dtype = task, system, settings, dtype
        self.rank, self.device = dist.get_rank(), prepare_device(settings.device)
        # Rank 0's values have to win; FSDP2, and maybe the user's, does not send them.
        seed_everything(settings.seed + (self.rank if system.stage is not None else 0))
        net = task.build().to(self.device, dtype)
        self.names = [name for name, _ in net.named_parameters()]
        self.model = system.wrap(net, task, settings)
        self.optimizer = task.optimizer([*self.model.parameters()])
        found = groups(self.optimizer)
        # A user's system may have one parameter for several, as FSDP1 has.
        alike = system.kind == "user" and len(found) == len(settings.groups or ())
        if settings.groups not in (None, found) and not alike:
            raise ValueError(
                f"optimizer(params) sorts the bare module's parameters into groups of "
                f"{settings.groups}, and this system's into groups of {found}: from stage 1 on, "
                "parameters are 1-D pieces, so do not sort by shape. Set an attribute in build(), "
                "such as p.decay = p.ndim > 1, and sort by that")

    def step(self, number: int, before_update: Callable[[], Any] = lambda: None) -> float:
        """Returns the loss. before_update: called when backward is through."""
        seed_everything(self.settings.seed + 1 + number * dist.get_world_size() + self.rank)
        batch = self.task.batch_on(self.device, number, self.rank, self.dtype)
        self.start = time.perf_counter()
        loss = self.task.loss(self.model, batch)
        loss.backward()
        before_update()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()  # on CUDA this waits for the step

    def train(self) -> dict[str, Any]:
        steps, seconds = self.settings.steps, []
        differences = {}
        with progress(steps) as show:
            for number in range(steps):
                loss = self.step(number)
                seconds.append(time.perf_counter() - self.start)
                show(f"{self.system.name}  loss {loss:.4f}")
                if number in (0, steps - 1):
                    differences[number + 1] = self.compare_weights(number + 1)
        held_out = None
        if self.task.evaluate is not None and self.dtype is None:
            held_out = self.task.evaluate(self.model, self.device)
        return {"loss": loss, "held_out": held_out,
                "seconds": _median(seconds), **self.weights,
                "first_difference": differences[1], "difference": differences[steps]}

    def compare_weights(self, step: int) -> float | None:
        """The largest difference from stage 0's weights after that step, or None."""
        state = systems.full_state(self.model)
        # A user's system may be DDP inside. Buffers are left out, which differ between the ranks.
        state = {name if name in self.names else name.removeprefix("module."): value
                 for name, value in state.items()}
        state = {name: state[name] for name in self.names if name in state}
        self.weights: dict[str, str | None] = {"digest": None}
        if len(state) == len(self.names):
            digest = hashlib.sha256()
            for value in state.values():
                digest.update(value.contiguous().view(-1).view(torch.uint8).numpy())
            self.weights = {"digest": digest.hexdigest()}
        file = self.settings.folder / f"{'fp64' if self.dtype else 'own'}-{step}.pt"
        if self.rank == 0 and self.system.name == "stage 0":
            torch.save(state, file)
        if self.rank != 0 or not file.exists():
            return None
        reference = torch.load(file, mmap=True)
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in reference.items()}:
            return None
        return max(((state[name].double() - reference[name].double()).abs().max().item()
                    for name in reference if reference[name].numel()), default=0.0)


@dataclass
class UnitFacts:
    """What the formula has to know of a unit. unused: indices of parameters without gradient.

    On its way from the ranks it is plain data, with names of dtypes, see `unit_facts`.
    """

    sizes: list[int]
    frozen: bool
    dtype: torch.dtype
    grad_dtype: torch.dtype
    master_dtype: torch.dtype
    unused: frozenset[int]


def groups(optimizer: torch.optim.Optimizer) -> list[int]:
    """How many trainable parameters are in each group."""
    return [sum(p.requires_grad for p in group["params"]) for group in optimizer.param_groups]


def unit_facts(sizes: list[int], frozen: bool, dtypes: list[str], unused: list[int]) -> UnitFacts:
    dtype, grad_dtype, master_dtype = map(dtype_named, dtypes)
    return UnitFacts(sizes, frozen, dtype, grad_dtype, master_dtype, frozenset(unused))


def dtype_named(name: str) -> torch.dtype:
    return getattr(torch, name.removeprefix("torch."))


@without_marks()
def live_bytes() -> dict[int, int]:
    """Bytes of every storage that a tensor in this process refers to, by the storage's address."""
    found = {}
    for tensor in memory.all_tensors():
        tensor = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
        if tensor.layout == torch.strided and not tensor.is_meta:
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return found


def most_bytes(device: torch.device, step: Callable[[], Any]) -> int:
    """The most bytes of tensors that `step()` has in memory at one time, beside what was there.

    On a CPU of those that this thread allocates: what a message needs on its way is not seen.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler talks on stderr
    gc.collect()  # what is garbage now would be freed inside
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    now = most = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":  # one for every allocation (+) and release (-)
            now += event.nbytes()
            most = max(most, now)
    return most


def _ddp_buckets(model):
    """Bytes of DDP's buckets, to which no tensor in Python refers."""
    if not isinstance(model, DistributedDataParallel):
        return 0
    facts = model._get_ddp_logging_data()
    sizes = facts.get("rebuilt_bucket_sizes") or facts["bucket_sizes"]
    return sum(int(nbytes) for nbytes in sizes.split(","))
