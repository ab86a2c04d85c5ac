"""The collectives that ZeRO needs. No other file sends anything between ranks.

Each takes flat, contiguous buffers and returns a `Handle` at once; the result may be used after
`handle.wait()`. A buffer's *slices* are its world_size equal parts; slice r belongs to rank r.
With N ranks and a buffer of B bytes, each rank has to send

    broadcast        (N-1)·B from rank 0, nothing from the others
    reduce_scatter   (N-1)/N·B
    all_gather       (N-1)/N·B
    all_reduce       2·(N-1)/N·B, because it is a reduce_scatter followed by an all_gather

On NCCL these are the built-in collectives (whose broadcast passes the buffer on from rank to rank
instead). On gloo they are direct messages between the ranks, for two reasons: gloo's own
reduce-scatter moves a whole all-reduce, and adding up what arrived in rank order gives sums whose
bits do not depend on where a buffer happens to be cut. The second is why all stages end with the
same weights, bit for bit, at any world size.
"""

import pickle

import torch
import torch.distributed as dist

from . import trace

# torch 2.13 deprecates the old names of these two; 2.11 has only the old ones.
_nccl_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_nccl_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_TAG = 1910  # keeps these messages apart from a user's own send and recv on the same group


class Handle:
    """A collective under way. `wait()` returns when its result can be used."""

    def __init__(self, works, finish=None):
        self._works, self._finish, self._event = works, finish, None

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        if self._finish is not None:
            self._finish()
        trace.end(self._event)

    def recorded(self, event) -> "Handle":
        self._event = event
        return self


# ---- what the stages call: each collective says which unit and which phase it belongs to ---------


def broadcast(flat, group, *, unit, phase) -> Handle:
    """Everyone gets rank 0's values. flat: (numel,)"""
    event = _begin("broadcast", flat, group, unit, phase)
    return _broadcast(flat, group).recorded(event)


def reduce_scatter(out, flat, group, *, unit, phase) -> Handle:
    """Sum `flat` over the ranks; this rank gets its own slice of the sum.

    flat: (world_size * n,), out: (n,). `out` may be this rank's slice of `flat` itself.
    """
    event = _begin("reduce_scatter", flat, group, unit, phase)
    return _reduce_scatter(out, flat, group).recorded(event)


def all_gather(flat, own, group, *, unit, phase) -> Handle:
    """Everyone gets everyone's slice. own: (n,), flat: (world_size * n,).

    `own` may be this rank's slice of `flat` itself.
    """
    event = _begin("all_gather", flat, group, unit, phase)
    return _all_gather(flat, own, group).recorded(event)


def all_reduce(flat, group, *, unit, phase) -> Handle:
    """Sum over the ranks in place. flat: (world_size * n,)"""
    event = _begin("all_reduce", flat, group, unit, phase)
    own = _slices(flat, group)[dist.get_rank(group)]
    scattered = _reduce_scatter(own, flat, group)
    if _on_nccl(flat, group):  # NCCL runs what it is given in order: both halves can be issued now
        return Handle([scattered, _all_gather(flat, own, group)]).recorded(event)
    return Handle([scattered], lambda: _all_gather(flat, own, group).wait()).recorded(event)


def all_gather_object(obj, group, *, phase) -> list:
    """Every rank's (small, picklable) object, in rank order."""
    as_bytes = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)
    event = _begin("all_gather_object", as_bytes, group, "", phase)
    objects = [None] * dist.get_world_size(group)
    dist.all_gather_object(objects, obj, group=group)
    trace.end(event)
    return objects


# ---- how: built in on NCCL, direct messages on gloo ----------------------------------------------


def _broadcast(flat, group):
    if _on_nccl(flat, group):
        return Handle([dist.broadcast(flat, group=group, group_src=0, async_op=True)])
    if dist.get_rank(group) == 0:
        return _exchange(group, send={r: flat for r in _others(group)}, recv={})
    return _exchange(group, send={}, recv={0: flat})


def _reduce_scatter(out, flat, group):
    if _on_nccl(flat, group):
        return Handle([_nccl_reduce_scatter(out, flat, group=group, async_op=True)])
    rank, others = dist.get_rank(group), _others(group)
    slices = _slices(flat, group)
    mine = slices[rank]
    recv = {r: torch.empty_like(out) for r in others}
    first = 1 if rank == 0 else 0  # the first part to be added up that is not my own
    if first in recv and mine.data_ptr() != out.data_ptr():
        recv[first] = out  # one buffer less
    in_rank_order = [recv.get(r, mine) for r in range(len(slices))]
    exchange = _exchange(group, send={r: slices[r] for r in others}, recv=recv)
    return Handle([exchange], lambda: _sum(in_rank_order, recv.get(first), out))


def _sum(parts, total, out):
    """out = parts[0] + parts[1] + …, from left to right. `total` is one of the first two."""
    if len(parts) == 1:
        total = parts[0]
    else:
        torch.add(parts[0], parts[1], out=total)
    for part in parts[2:]:
        total.add_(part)
    if total.data_ptr() != out.data_ptr():
        out.copy_(total)


def _all_gather(flat, own, group):
    if _on_nccl(flat, group):
        return Handle([_nccl_all_gather(flat, own, group=group, async_op=True)])
    slices = _slices(flat, group)
    mine = slices[dist.get_rank(group)]
    if mine.data_ptr() != own.data_ptr():
        mine.copy_(own)
    others = _others(group)
    return _exchange(group, send={r: own for r in others}, recv={r: slices[r] for r in others})


def _exchange(group, send, recv):
    """send[r] goes to rank r, recv[r] is filled by rank r. gloo's messages travel through host
    memory, so CUDA tensors are staged there."""
    landing = {r: t if t.device.type == "cpu" else torch.empty_like(t, device="cpu")
               for r, t in recv.items()}
    leaving = {t.data_ptr(): t.cpu() for t in send.values()}
    works = [dist.irecv(t, group=group, group_src=r, tag=_TAG) for r, t in landing.items()]
    works += [dist.isend(leaving[t.data_ptr()], group=group, group_dst=r, tag=_TAG)
              for r, t in send.items()]

    def unstage():
        for r, t in recv.items():
            if landing[r] is not t:
                t.copy_(landing[r])

    return Handle(works, unstage)


def _slices(flat, group):
    world_size = dist.get_world_size(group)
    return flat.view(world_size, flat.numel() // world_size).unbind()


def _others(group):
    """The other ranks, nearest first, so that not everyone sends to rank 0 at once."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    return [(rank + k) % world_size for k in range(1, world_size)]


def _on_nccl(flat, group):
    """Whether the group's backend for the buffer's device is NCCL (and not gloo)."""
    by_device = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    return by_device[flat.device.type] != "gloo"


def _begin(op, flat, group, unit, phase):
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    slice_bytes = flat.nbytes / n
    wire_bytes = {
        "broadcast": (n - 1) * flat.nbytes if rank == 0 else 0,
        "reduce_scatter": (n - 1) * slice_bytes,
        "all_gather": (n - 1) * slice_bytes,
        "all_reduce": 2 * (n - 1) * slice_bytes,
        "all_gather_object": (n - 1) * flat.nbytes,
    }[op]
    return trace.begin(rank=rank, op=op, unit=unit, phase=phase, numel=flat.numel(),
                       dtype=flat.dtype, bytes=flat.nbytes, wire_bytes=int(wire_bytes))
