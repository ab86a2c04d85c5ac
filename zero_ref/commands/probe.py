"""Before `compare` trains anything: whether the task is what it has to be, and what it is like."""

import hashlib
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..engine.precision import own_precision
from ..engine.tree import tensors_in
from ..partition import lay_out
from ..ranks import travel
from ..tasks.task import Task, seed_everything
from .measure import Settings, groups
from .train import describe, prepare_device

_PACKAGE = str(Path(__file__).parents[1])


def probe(make_task: Callable[[], Task], settings: Settings) -> dict[str, Any] | None:
    """On rank 0, without any system: whether the task is what it has to be, and what it is like.

    Raises ValueError in one sentence if it cannot be trained.
    """
    device = prepare_device(settings.device)
    if dist.get_rank() != 0:
        return None
    task, world_size = make_task(), dist.get_world_size()
    batches, again = ([_batch(task, settings, device, rank) for rank in range(world_size)]
                      for _ in range(2))
    if [*map(_fingerprint, batches)] != [*map(_fingerprint, again)]:
        if not tensors_in(batches[0]):
            raise ValueError(f"batch(0, 0) of {task.name} returned a {type(batches[0]).__name__}, "
                             "in which no tensors were found: return a tensor, or tensors in "
                             "tuples, lists, dicts or dataclasses (`dict(…)` of what a tokenizer "
                             "returns)")
        raise ValueError(f"batch(0, rank) of {task.name} gives other data when it is called again, "
                         "so the systems would not see the same: seed it, for instance with "
                         "torch.Generator().manual_seed(1000 * step + rank)")
    if world_size > 1 and len(set(map(_fingerprint, batches))) == 1:
        raise ValueError(f"batch(0, rank) of {task.name} gives every rank the same data, so that "
                         f"{world_size} ranks would compute what one does: choose the samples by "
                         "rank")
    activations = _Activations()
    with activations:
        net, calls, gradients = _first_step(task, settings, device, batches[0], activations.watch)
    net_again, _, gradients_again = _first_step(task, settings, device, batches[0])
    if net_again is net:
        raise ValueError(f"build() of {task.name} returns the same module each time, which then "
                         "several systems would train: build a new one in it")
    missing, called = [_without(gradients)], [set(calls)]  # for each rank
    for batch in batches[1:]:
        _, calls_there, gradients_there = _first_step(task, settings, device, batch)
        missing.append(_without(gradients_there))
        called.append(set(calls_there))

    mixed = settings.mixed_precision
    units = lay_out(net, task.units, own_precision if mixed is None else mixed.of, 0, world_size)
    optimizer = _call(f"optimizer(params) of {task.name}", task.optimizer, [*net.parameters()])
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer(params) of {task.name} returned a {type(optimizer).__name__}: "
                         "it has to return a torch.optim.Optimizer")
    in_groups = groups(optimizer)
    names = {module: name for name, module in net.named_modules()}
    inner = [names[unit.module] for unit in units if unit.module is not net]
    largest = max(units, key=lambda unit: unit.numel)
    inside = [sum(p.numel() for p in child.parameters() if any(p is own for own in largest.params))
              for child in largest.module.children()]
    return {
        "task": task.name, "numel": sum(unit.numel for unit in units),
        "device": describe(device), "optimizer": type(optimizer).__name__,
        "metric": task.metric if task.evaluate is not None else None,
        "mixed_precision": mixed is not None,
        "groups": in_groups, "unit_count": len(inner), "activations": activations.bytes(),
        "unused": sorted(set.intersection(*missing)),
        "used_on_some_ranks": sorted(set.union(*missing) - set.intersection(*missing)),
        "run_on_some_ranks": sorted({*inner} & set.union(*called) - set.intersection(*called)),
        "deterministic": all(
            _same(gradients_again[name], gradients[name]) for name in gradients),
        "once": all(calls[name] == 1 for name in inner)
        and not any(unit.frozen for unit in units),
        "largest_unit": {"name": largest.name, "kind": type(largest.module).__name__,
                         "numel": largest.numel, "largest_child": max(inside, default=0),
                         "frozen": largest.frozen,
                         "tied": any(len(places) > 1 for places in largest.slots)},
        "root_numel": sum(unit.numel for unit in units if unit.module is net),
        "itemsize": max(unit.dtype.itemsize for unit in units),
    }


def _batch(task, settings, device, rank):
    seed_everything(settings.seed + 1 + rank)
    _call(f"batch(0, {rank}) of {task.name}", task.batch, 0, rank)
    seed_everything(settings.seed + 1 + rank)
    return task.batch_on(device, 0, rank)


class _Activations(saved_tensors_hooks):
    """Bytes of what autograd keeps of a forward inside of units, and of the units' inputs. What is
    inside of a unit in another one counts for the outer one."""

    def __init__(self):
        super().__init__(self._pack, lambda tensor: tensor)
        self.running: list[nn.Module] = []
        self.kept: dict[nn.Module, dict[int, int]] = {}  # by unit: bytes of each storage
        self.inputs: dict[int, int] = {}

    def watch(self, net, units):
        self.parameters = {p.untyped_storage()._cdata for p in net.parameters()}
        for unit in {unit.module for unit in units} - {net}:
            unit.register_forward_pre_hook(self._enter, with_kwargs=True)
            unit.register_forward_hook(self._leave)

    def _enter(self, unit, args, kwargs):
        if not self.running:
            self.inputs |= self._bytes(*tensors_in((args, kwargs)))
        self.running.append(unit)

    def _leave(self, unit, args, output):
        self.running.pop()

    def _pack(self, tensor):
        if self.running:
            of_unit = self.kept.setdefault(self.running[0], {})
            of_unit |= self._bytes(tensor)
        return tensor

    def _bytes(self, *tensors):
        storages = [t.untyped_storage() for t in tensors if t.layout == torch.strided]
        return {s._cdata: s.nbytes() for s in storages if s._cdata not in self.parameters}

    def bytes(self) -> dict[str, int]:
        of_units = [sum(storages.values()) for storages in self.kept.values()]
        return {"in_units": sum(of_units), "largest_unit": max(of_units, default=0),
                "inputs": sum(self.inputs.values())}


def _first_step(task, settings, device, batch, watch=lambda net, units: None):
    """A new module, how often each part of it was called, and its gradients, by name."""
    net, calls = _build(task, settings).to(device), Counter()  # how often each part was called
    for name, module in net.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    watch(net, lay_out(net, task.units, own_precision, 0, 1))  # raises what zero_ref.wrap would
    seed_everything(settings.seed)
    loss = _loss(task, net, batch)
    _call(f"backward of {task.name}", loss.backward)
    return net, calls, {name: p.grad for name, p in net.named_parameters() if p.requires_grad}


def _without(gradients):
    return {name for name, grad in gradients.items() if grad is None}


def _call(what, fn, *args):
    """fn(*args). A failure becomes a ValueError, which says where in the user's file it came up."""
    try:
        return fn(*args)
    except Exception as error:
        file = getattr(getattr(fn, "__func__", fn), "__code__", _call.__code__).co_filename
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == file]
        theirs = lines and not file.startswith(_PACKAGE)
        where = f", at line {lines[-1]} of {Path(file).name}" if theirs else ""
        raise ValueError(f"{what} failed with {type(error).__name__}{where}: {error}") from error


def _build(task, settings):
    seed_everything(settings.seed)
    net = _call(f"build() of {task.name}", task.build)
    if isinstance(net, nn.Module) and any(
            isinstance(m, torch.jit.ScriptModule) for m in net.modules()):
        raise ValueError(f"build() of {task.name} returned a module with TorchScript in it, which "
                         "takes no hooks: return it as it is before torch.jit.script")
    if isinstance(net, nn.Module) and not any(p.requires_grad for p in net.parameters()):
        raise ValueError(f"{type(net).__name__} has no trainable parameters: build() of "
                         f"{task.name} has to return a module that can be trained")
    if isinstance(net, nn.Module) and any(p.is_meta for p in net.parameters()):
        raise ValueError(f"build() of {task.name} returned a module on the meta device, which DDP "
                         "cannot train: build it on a real one")
    if not isinstance(net, nn.Module):
        raise ValueError(f"build() of {task.name} returned a {type(net).__name__}: it has to "
                         "return a torch.nn.Module")
    return net


def _loss(task, net, batch):
    loss = _call(f"loss(model, batch) of {task.name}", task.loss, net, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"a {type(loss).__name__}"
        if isinstance(loss, Tensor):
            what = ("a tensor that needs no gradient" if loss.numel() == 1 else
                    f"a tensor of shape {tuple(loss.shape)}")
        raise ValueError(f"loss(model, batch) of {task.name} returned {what}: it has to return a "
                         "scalar tensor that comes from the model, such as a mean over the batch")
    if loss.isnan():
        raise ValueError(f"loss(model, batch) of {task.name} is NaN at the first step")
    return loss


def _fingerprint(batch):
    tensors = [t.detach().cpu().contiguous() for t in tensors_in(batch)]
    parts = [t.view(torch.uint8).numpy().tobytes() if t.dim() else str(t).encode()
             for t in tensors] or [travel.dumps(batch)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _same(a, b):
    """Bit for bit, also where both are NaN or None."""
    if a is None or b is None:
        return a is b
    a, b = (t.to_dense() if t.layout != torch.strided else t for t in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
