"""Stage 0: plain data parallelism (DDP). Every rank keeps everything.

Ψ is the number of parameters, N the number of ranks. One training step:

    Phase 1  forward     rank 0's buffers are broadcast; then the module runs as it is
    Phase 2  backward    as soon as autograd has produced the gradients of a unit, they are summed
                         over the ranks and divided by N: one all_reduce per unit, 2Ψ·(N-1)/N
                         elements sent in all, while autograd goes on with the unit before it
    Phase 3  hand over   when a unit's mean has arrived, the optimizer's parameters get it
    Phase 4  step        every rank updates every parameter, all in the same way

The later stages keep these four phases and change what is kept after each.

The optimizer does not see the module's own parameters but `model.parameters()`. At this stage
those are views of the same memory, in the same shapes; from stage 1 on, this rank's slices.
The module's own parameters only ever carry the local gradient of the backward that is running.

Li et al., PyTorch Distributed: Experiences on Accelerating Data Parallel Training, VLDB 2020.
"""

import weakref
from collections import defaultdict
from contextlib import contextmanager
from itertools import groupby

import torch
import torch.distributed as dist
from torch import nn

from . import comm
from .engine import agreement, buffers, clip, failure, materialize, optimizers
from .engine.tree import map_tensors, tensors_in
from .engine.units import refuse_thawed

wrapped = weakref.WeakSet()  # the modules, with all inside them, that belong to a model
_running_backward = defaultdict(list)  # name of a group -> its models in backward, as they began


class Stage0(nn.Module):
    """`module` trained in data parallel; made by `zero_ref.wrap`."""

    stage = 0

    def __init__(self, module, units, group, overlap=True, mixed_precision=None, checked=False):
        super().__init__()
        self.module, self.units = module, units
        self.group, self.overlap, self.mixed_precision = group, overlap, mixed_precision
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self._in_full_params = self._in_backward = False
        self._checker = agreement.checker(group) if checked else None
        original_names = [name for name, p in module.named_parameters() if p.requires_grad]

        materialize.give_memory_to_buffers(module, group)
        for _, units_of_one in groupby(units, key=lambda unit: unit.module):
            units_of_one = list(units_of_one)
            materialize.flatten(units_of_one, module, group)
            for unit in units_of_one:
                comm.broadcast(unit.flat, group, unit=unit.name, phase="init").wait()
                full = unit.round_flat()
                unit.master = self._make_master(unit, unit.flat if unit.frozen else full)
                unit.owned = [optimizers.owned_parameter(view, not unit.frozen)
                              for view in self._owned_views(unit, unit.master)]
                unit.version = unit.master._version
                del full  # nobody else holds it: with mixed precision, or at stage 3
        buffers.broadcast(module, group, "init")

        self.trainable = [unit for unit in units if not unit.frozen]
        owned = {name: p for u in self.trainable for name, p in zip(u.names, u.owned)}
        self._named_parameters = [(name, owned[name]) for name in original_names]

        self._sync = True  # whether backward reduces: False inside no_sync()
        self._queue = []  # units that this backward has yet to reduce, the next one last
        self._in_flight = None  # (unit, its reduced gradient, handle)

        hooks = self._register_hooks()
        members = weakref.WeakSet(module.modules())
        wrapped.update(members)
        failure.models.add(self)
        weakref.finalize(self, _unwrap, hooks, members).atexit = False

    def _register_hooks(self):
        hooks = optimizers.watch(self)
        if self.mixed_precision is not None:
            hooks += self.mixed_precision.watch_kept(self.module)
            hooks += self.mixed_precision.guard_state_dict(self)
        # torch.compile may compile the units, but not our hooks.
        before = torch.compiler.disable(self._weak_hook("_pre_forward"))
        for submodule in {unit.module for unit in self.units} - {self.module}:
            # First, before a hook of the user's may want to see the parameters.
            hooks.append(submodule.register_forward_pre_hook(before, prepend=True,
                                                             with_kwargs=True))
        for unit in self.trainable:
            for index, p in enumerate(unit.params):
                on_grad = self._weak_hook("_on_grad", unit, index)
                hooks.append(p.register_post_accumulate_grad_hook(on_grad))
        return hooks

    # ---- Phase 1: forward ------------------------------------------------------------------------

    def forward(self, *args, **kwargs):
        self._drop_failed_backward()
        refuse_thawed(self.units)
        # Somebody wrote into model.parameters(), to clip weights for instance: all ranks need that.
        self._follow([u for u in self.trainable if u.version != u.master._version])
        if self.training and torch.is_grad_enabled():
            buffers.broadcast(self.module, self.group, "forward")
        if self.mixed_precision is not None and not self._in_full_params:
            args, kwargs = self.mixed_precision.cast_inputs((args, kwargs))
        args, kwargs = self._pre_forward(self.module, args, kwargs)
        output = self.module(*args, **kwargs)
        self._on_grad_of(output, "_begin_backward")
        return output

    def _pre_forward(self, submodule, args, kwargs):
        """Every unit gets views of its inputs. Stage 3 needs them, and how autograd adds up the
        gradients of a tensor that several units use depends on them; so all stages have them."""
        if not torch.is_grad_enabled():
            return args, kwargs
        views = {}  # one view of each, so that `query is key` still holds
        return map_tensors(lambda x: views.setdefault(x, x.view_as(x)) if x.requires_grad else x,
                           (args, kwargs))

    # ---- Phase 2: backward -----------------------------------------------------------------------

    def _on_grad_of(self, output, method, *args):
        """Call self.method(*args, grad) when backward has the gradient of a tensor in `output`."""
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(self._weak_hook(method, *args))

    def _begin_backward(self, grad=None):
        """Runs at the model's output, so also on a rank where no parameter gets a gradient; at the
        first parameter, should the output be hidden."""
        if not self._in_backward:
            self._in_backward = True
            _running_backward[self.group.group_name].append(weakref.ref(self))
            # Always the same order on every rank, whatever order the gradients arrive in.
            self._queue = list(self.trainable)
            for unit in self.trainable:
                unit.expected = sum(p.requires_grad for p in unit.params)
            end_of_backward = torch.autograd.Variable._execution_engine.queue_callback
            end_of_backward(self._finish_backward)

    def _on_grad(self, unit, index, param):
        """Runs when autograd has accumulated one parameter's gradient."""
        self._begin_backward()
        if self._sync:
            if unit not in self._queue:
                raise RuntimeError(f"a gradient of {unit.names[index]!r} arrived after those of "
                                   f"unit {unit.name!r} had been reduced in this backward")
            self._collect(unit)
            unit.store_grad(index)
        unit.ready.add(index)
        if unit.complete():
            self._unit_ready(unit)

    def _unit_ready(self, unit):
        """All of the unit's gradients are there: reduce it, unless others come first."""
        while (self._sync and self._queue and self._queue[-1].complete()
               and not self._others_come_first()):
            self._start_reduction(self._queue.pop())

    def _others_come_first(self):
        """Whether another model that this backward came to earlier still has units to reduce: on
        every rank one comes after the other, also where a gradient is missing."""
        models = [ref() for ref in _running_backward[self.group.group_name]]
        return any(m is not None and m._queue for m in models[: models.index(self)])

    def _start_reduction(self, unit):
        self._finish_reduction()  # one unit in flight at a time bounds the memory
        self._collect(unit)
        unit.fill_gaps()
        self._in_flight = (unit, *self._reduce(unit))
        if not self.overlap:
            self._finish_reduction()

    def _collect(self, unit):
        if unit.grad is None:
            unit.grad = self._grad_buffer(unit)

    def _grad_buffer(self, unit):
        """Where backward collects a unit's gradients: at this stage, where they will stay."""
        return unit.grad_memory(unit.padded_numel, unit.grad_dtype)

    def _reduce(self, unit):
        """Start to sum the unit's gradient. Returns where this rank's result will be, a handle."""
        handle = comm.all_reduce(unit.grad, self.group, unit=unit.name, phase="backward",
                                 divide_by=self.world_size)
        return unit.grad, handle

    # ---- Phase 3: hand over ----------------------------------------------------------------------

    def _finish_reduction(self):
        if self._in_flight is None:
            return
        unit, reduced, handle = self._in_flight
        self._in_flight = None
        handle.wait()
        unit.grad = None
        if reduced.dtype != unit.master.dtype:
            reduced = unit.grad_memory(reduced.numel(), unit.master.dtype).copy_(reduced)
        for index, grad in enumerate(self._owned_views(unit, reduced)):
            p = unit.owned[index]
            if p.requires_grad and not unit.left_alone(index, grad):
                if p.grad is None:
                    p.grad = self._as_grad(grad)
                else:
                    p.grad.add_(grad)
        unit.gaps.clear()

    def _as_grad(self, grad):
        """What the optimizer finds in p.grad."""
        return grad

    def _finish_backward(self):
        """Reduce what is left (units with unused parameters, for instance), then tidy up."""
        while self._sync and self._queue:
            self._start_reduction(self._queue.pop())
        self._finish_reduction()
        self._leave_backward()

    def _leave_backward(self):
        for unit in self.units:
            unit.ready.clear()
            unit.gaps.clear()
            unit.grad = None
        self._in_backward, self._in_flight, self._queue = False, None, []
        _running_backward[self.group.group_name].remove(weakref.ref(self))

    def _drop_failed_backward(self):
        """A backward that raised never came to its end: forget it, or the next would add to it."""
        if self._in_backward and torch._C._current_graph_task_id() == -1:  # none is running
            if self._in_flight is not None:
                self._in_flight[-1].wait()
            self._leave_backward()

    # ---- Phase 4: the optimizer's step -----------------------------------------------------------

    def _make_master(self, unit, full):
        """What this rank's optimizer updates: at this stage, the full parameters.

        full: (padded_numel,) in full precision; without mixed precision it is `unit.flat`.
        """
        return full

    def _owned_views(self, unit, buffer):
        """`buffer`, parameters or gradients, as one view per parameter."""
        return unit.full_views(buffer)

    def _owned_slices(self, unit, index, tensor):
        """The slices of one owned parameter that this rank holds: {rank: 1-D view}."""
        return unit.slices_of(index, tensor)

    def _follow(self, units):
        """The optimizer's parameters of these units have new values: the module's follow."""
        self._after_step(units)
        for unit in units:
            unit.version = unit.master._version

    def _after_step(self, units):
        for unit in units:
            unit.flat.copy_(unit.master)  # nothing without mixed precision: they are one

    def clip_grad_norm_(self, max_norm, norm_type=2.0):
        """Scale all gradients so that their global norm is at most `max_norm`.

        Returns the norm before clipping, a 0-dim tensor with the same bits on every rank and at
        every stage.
        """
        return clip.clip_grad_norm_(self, max_norm, float(norm_type))

    def _share_norms(self, norms):
        """norms: (parameters, world_size). At this stage every rank has computed all of them."""

    # ---- what looks like any nn.Module -----------------------------------------------------------

    def named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
        """(name, parameter) for each trainable parameter, as this rank's optimizer sees it."""
        for name, p in self._named_parameters:
            yield f"{prefix}.{name}" if prefix else name, p

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        for unit in self.trainable:
            for p in unit.params:
                p.grad = None  # what no_sync() left there

    @contextmanager
    def no_sync(self):
        """Inside, backward sends nothing and accumulates local gradients, a full set of them at
        every stage. The first backward outside reduces the sum; `model.zero_grad()` drops it."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    @contextmanager
    def full_params(self):
        """All parameters in full, in `model.module`, on every rank (so all must enter together).
        What rank 0 writes into them there is kept. With mixed precision, in full precision."""
        with self._shown_in_full() as full_of, torch.no_grad():
            try:
                yield
            finally:
                for unit, full in full_of.items():
                    comm.broadcast(full, self.group, unit=unit.name, phase="full_params").wait()

    @contextmanager
    def _shown_in_full(self):
        """Yields {unit: its full buffer}. What that holds at the end is kept."""
        if self._in_full_params:
            yield {}
            return
        full_of = {unit: self._gather_full(unit) for unit in self.units}
        self._in_full_params = True
        try:
            yield full_of
        finally:
            self._in_full_params = False
            for unit, full in full_of.items():
                self._take_over(unit, full)
                unit.version = unit.master._version

    def _gather_full(self, unit):
        """Show the unit's parameters in full and in full precision: at this stage they are there.
        Returns the buffer, (padded_numel,)."""
        unit.point_to(unit.master)
        return unit.master

    def _take_over(self, unit, full):
        """The parameters now have the values in `full`, and the module shows its own again."""
        unit.flat.copy_(full)
        unit.point_to(unit.flat)

    def state_dict(self):
        """Full, unpadded copies under the original names, on every rank (so all must call it).
        With mixed precision, the values of the master copy."""
        with self._shown_in_full():
            return {name: value.clone() if isinstance(value, torch.Tensor) else value
                    for name, value in self.module.state_dict().items()}

    def load_state_dict(self, state_dict, strict=True):
        """Takes what `state_dict()` or the bare module's gives. Rank 0's values are kept."""
        with self.full_params():
            result = self.module.load_state_dict(state_dict, strict)
        buffers.broadcast(self.module, self.group, "load_state_dict")
        return result

    def _apply(self, fn, recurse=True):
        raise RuntimeError("a wrapped model cannot be moved or cast: its flat buffers would stay "
                           "behind; call .to(...) on the module before zero_ref.wrap")

    def __getstate__(self):
        raise RuntimeError("a wrapped model cannot be copied or pickled, because it belongs to a "
                           "process group: copy `model.module` inside `with model.full_params():`, "
                           "or save model.state_dict()")

    def _weak_hook(self, method, *args):
        """A hook that calls self.method(*args, …) and does not keep the model alive."""
        model = weakref.ref(self)

        def hook(*more):
            if model() is not None:
                return getattr(model(), method)(*args, *more)

        return hook


def _unwrap(hooks, members):
    """When a model is gone, its hooks go too, and its module may be wrapped again."""
    for hook in hooks:
        hook.remove()
    for member in members:
        wrapped.discard(member)
