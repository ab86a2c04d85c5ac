"""Stage 0: plain data parallelism (DDP). Every rank keeps everything.

Ψ is the number of parameters, N the number of ranks. One training step:

    Phase 1  forward     rank 0's buffers are broadcast; then the module runs as it is
    Phase 2  backward    in turn, when autograd has produced the gradients of a bucket, they are
                         summed over the ranks and divided by N: one all_reduce per bucket,
                         2Ψ·(N-1)/N elements sent in all, while autograd goes on
    Phase 3  deliver     when a bucket's mean has arrived, the optimizer's parameters get it
    Phase 4  step        every rank updates every parameter, all in the same way

The later stages have the same four phases, and keep less. A *bucket* is a unit, usually one layer,
or several small ones that follow one another and share messages.

The optimizer does not see the module's own parameters but `model.parameters()`. At this stage
those are views of the same memory, in the same shapes; from stage 1 on, this rank's part of each.
The module's own parameters carry local gradients only, from a backward that is running or, inside
no_sync(), has run.

Who calls what: the shell (engine/shell.py), which looks like an nn.Module, calls `_forward`, and
`_after_step` when an optimizer has stepped; each unit's module `_pre_forward`; autograd
`_begin_backward` with the gradient of the model's output, `_on_grad` with that of a parameter, and
`_finish_backward` at its end.

Li et al., PyTorch Distributed: Experiences on Accelerating Data Parallel Training, VLDB 2020.
"""

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from . import comm
from .engine.backward import Backward
from .engine.buckets import Bucket
from .engine.shell import Shell
from .engine.tree import map_tensors, tensors_in
from .partition import FULL, Keeps, Unit


class Stage0(Shell):
    """`module` trained in data parallel; made by `zero_ref.wrap`."""

    stage = 0
    keeps = Keeps(params=FULL, grads=FULL, states=FULL)
    max_in_flight = 1  # buckets being reduced at one time; for each, a landing buffer is needed

    # ---- Phase 1: forward ------------------------------------------------------------------------

    def _forward(self, args: tuple, kwargs: dict):
        if self.training and torch.is_grad_enabled():
            self._buffers_of_rank_0.broadcast("forward")
        args, kwargs = self._pre_forward(self.module, args, kwargs)
        output = self.module(*args, **kwargs)
        self._on_grad_of(output, "_begin_backward")
        return output

    def _pre_forward(self, submodule: nn.Module, args: tuple, kwargs: dict) -> tuple:
        """Every unit gets views of its inputs. Stage 3 needs them, and how autograd adds up the
        gradients of a tensor that several units use depends on them; so all stages have them."""
        if not torch.is_grad_enabled():
            return args, kwargs
        views: dict = {}  # one view of each, so that `query is key` still holds
        return map_tensors(lambda x: views.setdefault(x, x.view_as(x)) if x.requires_grad else x,
                           (args, kwargs))

    # ---- Phase 2: backward -----------------------------------------------------------------------

    def _on_grad_of(self, output, method: str, *args) -> None:
        """Call self.method(*args, grad) when backward has the gradient of a tensor in `output`."""
        for tensor in tensors_in(output):
            if tensor.requires_grad and not is_functorch_wrapped_tensor(tensor):  # torch.func's own
                tensor.register_hook(self._weak_hook(method, *args))

    def _begin_backward(self, grad: Tensor | None = None) -> None:
        """At the model's output, so also on a rank where no parameter gets a gradient. If no tensor
        was found in the output, at the first parameter."""
        if self._backward is None:
            self._backward = Backward(self, self._reduce_buckets, self._finish_backward)

    def _on_grad(self, unit: Unit, index: int, param: Tensor) -> None:
        """Runs when autograd has accumulated one parameter's gradient."""
        self._begin_backward()
        if self._sync:
            self._backward.refuse_late(unit, index)
            self._backward.collect(unit, index)
        self._backward.ready[unit].add(index)
        if self._backward.complete([unit]):
            self._reduce_complete()

    def _reduce_complete(self) -> None:
        """Start to reduce the next buckets in the queue, as long as their gradients are there."""
        backward = self._backward
        while (self._sync and backward.queue and backward.complete(backward.queue[-1])
               and not backward.others_come_first()):
            self._start_reduction(backward.queue.pop())

    def _start_reduction(self, bucket: Bucket) -> None:
        for unit in bucket:
            self._backward.fill_missing(unit)
        while len(self._backward.in_flight) >= self.max_in_flight:
            self._finish_reduction()
        self._backward.in_flight.append((bucket, *self._reduce(bucket)))
        if not self.overlap:
            self._finish_reduction()

    def _reduce(self, bucket: Bucket) -> tuple[list[Tensor], comm.Handle]:
        """Start to sum the gradients. Returns where this rank's results will be, and a handle."""
        grads = [self._backward.grads[unit] for unit in bucket]
        handle = comm.all_reduce(grads, self.group, unit=bucket.name, phase="backward",
                                 divide_by=self.world_size)
        return grads, handle

    # ---- Phase 3: deliver ------------------------------------------------------------------------

    def _finish_reduction(self) -> Bucket:
        bucket, reduced, handle = self._backward.in_flight.popleft()
        handle.wait()
        for unit, grad in zip(bucket, reduced):
            if unit.deliver(grad, self._backward.missing[unit]):
                del self._backward.grads[unit]  # it has been added to an earlier one
        return bucket

    def _finish_backward(self) -> None:
        """Reduce what is left (units with unused parameters, for instance), then tidy up."""
        while self._sync and self._backward.queue:
            self._start_reduction(self._backward.queue.pop())
        while self._backward.in_flight:
            self._finish_reduction()
        self._leave_backward()

    def _leave_backward(self) -> None:
        self._backward.end(local=[] if self._sync else self.trainable)
        self._backward = None

    # ---- Phase 4: the optimizer's step -----------------------------------------------------------

    def _after_step(self, units: list[Unit]) -> None:
        for unit in units:
            unit.publish()
