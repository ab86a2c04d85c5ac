"""What makes a stage look like any nn.Module. The algorithms are the stages' own."""

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import groupby
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .. import comm
from . import check, clip, failure, local, materialize, optimizers, slices, writes
from .buckets import buckets
from .buffers import Buffers
from .hooks import Hook
from .owned import MasterParameter
from .units import Structure

wrapped = weakref.WeakSet()  # the modules, with all inside them, that belong to a model


class Shell(nn.Module):
    """`module`, with its units laid out, rank 0's values in them, and the stage's hooks on it."""

    def __init__(self, module: nn.Module, units: Sequence, group: dist.ProcessGroup, *,
                 overlap: bool = True, mixed_precision=None, checked: bool = False,
                 bucket_cap_mb: float = 1):
        super().__init__()
        # No child, of which torch would find the parameters beside those that this module owns.
        self.__dict__["module"] = module
        self.units, self.group = units, group
        self.overlap, self.mixed_precision = overlap, mixed_precision
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self._checker = check.checker(group) if checked else None
        self._sync = True  # whether backward reduces: False inside no_sync()
        self._backward: Any = None  # the Backward that is running
        self._in_full_params = False
        original_names = [name for name, p in module.named_parameters() if p.requires_grad]

        materialize.give_memory_to_buffers(module, group)
        for _, of_one_module in groupby(units, key=lambda unit: unit.module):
            together = list(of_one_module)
            materialize.flatten(together, module, group)
            for unit in together:
                comm.broadcast(unit.flat, group, unit=unit.name, phase="init").wait()
                self._keep(unit)
        self._buffers_of_rank_0 = Buffers(module, group)
        self._buffers_of_rank_0.broadcast("init")

        self.trainable = [unit for unit in units if not unit.frozen]
        master = {name: p for u in self.trainable for name, p in zip(u.names, u.master_params)}
        self._parameters.update({name: master[name] for name in original_names})
        self._structure = Structure(self, units)
        cap = bucket_cap_mb * 2**20
        self._reduce_buckets = buckets(self.trainable, cap, lambda unit: unit.grad_dtype)
        self._gather_buckets = buckets(units, cap, lambda unit: unit.dtype)

        hooks = self._register_hooks()
        members = weakref.WeakSet(module.modules())
        wrapped.update(members)
        failure.models.add(self)
        weakref.finalize(self, _unwrap, hooks, members).atexit = False

    def _keep(self, unit) -> None:
        """Called once, with rank 0's values in unit.flat."""
        unit.keep(self.keeps)
        writes.watch(unit)
        local.watch(unit)

    def _register_hooks(self) -> list:
        hooks = optimizers.watch(self)
        if self.mixed_precision is not None:
            hooks += self.mixed_precision.watch_kept(self.module)
            hooks += self.mixed_precision.guard_state_dict(self)
        # torch.compile may compile the module and its units, but not our code.
        _leave_our_code_to_python()
        before = self._module_hook("_pre_forward")
        for submodule in {unit.module for unit in self.units} - {self.module}:
            # First, before a hook of the user's may want to see the parameters.
            hooks.append(submodule.register_forward_pre_hook(before, prepend=True,
                                                             with_kwargs=True))
        for unit in self.trainable:
            for index, p in enumerate(unit.params):
                on_grad = self._weak_hook("_on_grad", unit, index)
                hooks.append(p.register_post_accumulate_grad_hook(on_grad))
        return hooks

    def _weak_hook(self, method: str, *args) -> Callable:
        """A hook that calls self.method(*args, …) and does not keep the model alive."""
        model = weakref.ref(self)

        def hook(*more):
            if model() is not None:
                return getattr(model(), method)(*args, *more)

        return hook

    def _module_hook(self, method: str) -> Callable:
        """The same for a module, which torch.compile may compile without looking into the hook."""
        return Hook(torch.compiler.disable(self._weak_hook(method)))

    # ---- around the stage's forward and step -----------------------------------------------------

    def forward(self, *args, **kwargs):
        self._drop_failed_backward()
        self._look_at_module()
        # Somebody wrote into model.parameters(), to clip weights for instance: all ranks need that.
        written = [u for u in self.trainable if u.version != u.master._version]
        try:
            self._follow(written)
        except RuntimeError as error:
            if written:
                raise RuntimeError(
                    f"on this rank, parameters of {written[0].name!r} in model.parameters() have "
                    "been written since the last step, and what other ranks keep of them could not "
                    "be gathered: every rank has to write, even if none of what it owns changes"
                ) from error
            raise
        if self.mixed_precision is not None and not self._in_full_params:
            args, kwargs = self.mixed_precision.cast_inputs((args, kwargs))
        return self._forward(args, kwargs)

    def _look_at_module(self) -> None:
        """Whether all still hangs where it did, and what has been written into it."""
        self._structure.check(self)
        for unit in self.units:
            if unit.gathered and not self._in_full_params:
                writes.keep_written(unit)

    def _drop_failed_backward(self) -> None:
        """A backward that raised never came to its end: forget it, or the next would add to it."""
        if self._backward is not None and torch._C._current_graph_task_id() == -1:  # none runs
            try:
                for _, _, handle in self._backward.in_flight:
                    handle.wait()
            finally:
                self._leave_backward()

    def _follow(self, units: list) -> None:
        """The optimizer's parameters of these units have new values: the module's follow."""
        for unit in units:
            writes.know(unit)
        self._after_step(units)
        for unit in units:
            unit.version = unit.master._version

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scale all gradients so that their global norm is at most `max_norm`.

        Returns the norm before clipping, a 0-dim tensor with the same bits on every rank and at
        every stage.
        """
        return clip.clip_grad_norm_(self, max_norm, float(norm_type))

    def grads_are_finite(self) -> bool:
        """Whether no gradient is inf or NaN, on any rank: the same answer on all of them."""
        return clip.grads_are_finite(self)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward reduces nothing and accumulates local gradients, a full set of them at
        every stage; stage 3 goes on to gather parameters. The first backward outside reduces the
        sum; `model.zero_grad()` drops it."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for unit in self.trainable:
            for p in unit.params:
                p.grad = None  # what no_sync() left there

    # ---- names and values ------------------------------------------------------------------------

    def named_parameters(self, prefix: str = "", recurse: bool = True,
                         remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) for each trainable parameter, as this rank's optimizer sees it."""
        for name, p in self._parameters.items():
            if recurse or "." not in name:
                yield f"{prefix}.{name}" if prefix else name, p

    @contextmanager
    def full_params(self) -> Iterator[None]:
        """All parameters in full, in `model.module`, on every rank (so all must enter together).
        What rank 0 writes into them there is kept. With mixed precision, in full precision."""
        with self._all_pinned() as full_of, torch.no_grad():
            try:
                yield
            finally:
                for unit, full in full_of.items():
                    comm.broadcast(full, self.group, unit=unit.name, phase="full_params").wait()

    @contextmanager
    def _all_pinned(self) -> Iterator[dict]:
        """Yields {unit: its full buffer}. What that holds at the end is kept."""
        if self._in_full_params:
            yield {}
            return
        self._look_at_module()
        self._follow([u for u in self.trainable if u.version != u.master._version])
        full_of = {unit: self._pin(unit) for unit in self.units}
        self._in_full_params = True
        try:
            yield full_of
            for unit, full in full_of.items():
                writes.refuse_moved(unit, unit.params, full)
        finally:
            self._in_full_params = False
            for unit, full in full_of.items():
                self._unpin(unit, full)

    def _pin(self, unit) -> torch.Tensor:
        """Show the unit's parameters in full and in full precision until `_unpin`.

        Returns the buffer, (padded_numel,)."""
        if unit.gathered and not unit.mixed:
            return unit.flat
        full = unit.master
        if full.numel() < unit.padded_numel:
            full = full.new_empty(unit.padded_numel)
            comm.all_gather(full, unit.master, self.group, unit=unit.name,
                            phase="full_params").wait()
        unit.point_to(full)
        return full

    def _unpin(self, unit, full: torch.Tensor) -> None:
        unit.adopt(full)
        unit.version = unit.master._version
        writes.know(unit)

    def state_dict(self, *, destination=None, prefix: str = "", keep_vars: bool = False
                   ) -> dict[str, Any]:
        """Full, unpadded copies under the original names, on every rank (so all must call it).
        With mixed precision, the values of the master copy."""
        with self._all_pinned():
            found = self.module.state_dict(prefix=prefix)
            copies = {name: value.clone() if isinstance(value, torch.Tensor) else value
                      for name, value in found.items()}
        if destination is None:
            return copies
        destination.update(copies)  # a parent's, in which this model has the prefix
        destination._metadata.update(found._metadata)
        return destination

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True):
        """Takes what `state_dict()` or the bare module's gives. Rank 0's values are kept."""
        with self.full_params():
            result = self.module.load_state_dict(state_dict, strict)
        self._buffers_of_rank_0.broadcast("load_state_dict")
        return result

    # ---- inside another module -------------------------------------------------------------------

    # A parent finds parameters and buffers here, under the names that they have in the module.
    _buffers = property(lambda self: MappingProxyType(dict(self.module.named_buffers())),
                        lambda self, empty: None)  # type: ignore[assignment]

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True):
        yield from self.module.named_buffers(prefix, recurse, remove_duplicate)

    def named_modules(self, memo=None, prefix: str = "", remove_duplicate: bool = True):
        yield prefix, self  # in the place of the module inside
        frame: Any = sys._getframe()
        while frame is not None and frame.f_code is not nn.Module._named_members.__code__:
            frame = frame.f_back
        if frame is None:  # nobody collects parameters, which this module has itself
            inside = self.module.named_modules(memo, prefix, remove_duplicate)
            yield from ((name, m) for name, m in inside if m is not self.module)

    def named_children(self):
        yield from self.module.named_children()

    def __getattr__(self, name: str):
        modules = self.__dict__["module"]._modules if "module" in self.__dict__ else {}
        return modules[name] if name in modules else super().__getattr__(name)

    def __repr__(self):
        inside = repr(self.module).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  (module): {inside}\n)"

    def train(self, mode: bool = True):
        self.module.train(mode)
        self.training = mode
        return self

    def apply(self, fn):
        self.module.apply(fn)
        fn(self)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys,
                              unexpected_keys, error_msgs):
        own = {name.removeprefix(prefix): value for name, value in state_dict.items()
               if name.startswith(prefix)}
        result = self.load_state_dict(own, strict=False)
        missing_keys += [prefix + name for name in result.missing_keys]
        unexpected_keys += [prefix + name for name in result.unexpected_keys]

    def _apply(self, fn, recurse=True):
        """A parent's .to(…) may come by here, if it changes nothing."""
        alike = [u.master.new_empty([2] * len(shape)) for u in self.units for shape in u.shapes]
        if any(fn(tensor) is not tensor for tensor in [*alike, *self.buffers()]):
            raise RuntimeError("a wrapped model cannot be moved or cast: its flat buffers would "
                               "stay behind; call .to(...) on the module before zero_ref.wrap")
        return self

    def __getstate__(self):
        raise RuntimeError("a wrapped model cannot be copied or pickled, because it belongs to a "
                           "process group: copy `model.module` inside `with model.full_params():`, "
                           "or save model.state_dict()")


@cache
def _leave_our_code_to_python() -> None:
    """Where torch.compile compiles a wrapped model, it goes on to the module inside."""
    import torch._dynamo  # more than a second, which only a process that wraps a model has to pay

    for name in ("comm", "engine", "partition", "stage0", "stage1", "stage2", "stage3"):
        torch._dynamo.trace_rules.add(f"zero_ref.{name}")
    torch._dynamo.config.nontraceable_tensor_subclasses |= {MasterParameter, *slices.KINDS}


def _unwrap(hooks, members):
    """When a model is gone, its hooks go too, and its module may be wrapped again."""
    for hook in hooks:
        hook.remove()
    for member in members:
        wrapped.discard(member)
