"""The collectives that ZeRO needs. Every message of a stage is started by one of them.

They take flat, contiguous buffers and return a `Handle` at once; the result may be used after
`handle.wait()`. A buffer's *slices* are its world_size equal parts; slice r belongs to rank r.
With N ranks and a buffer of B bytes, each rank has to send

    broadcast        (N-1)·B from rank 0, nothing from the others
    reduce_scatter   (N-1)/N·B
    all_gather       (N-1)/N·B
    all_reduce       2·(N-1)/N·B, because it is a reduce_scatter followed by an all_gather

The last three also take a list of buffers, which then share one message per rank.

Sums are taken in rank order, on every backend: a rank receives everybody's part of its own slice
and adds them up from left to right. So the bits of a sum do not depend on where a buffer happens to
be cut, and that is why, whatever the world size, all stages end with the same weights, bit for bit.
The built-in reduce-scatter of NCCL or gloo adds in an order of its own.

A collective is a generator, which yields what it waits for; engine/transport.py resumes it.
"""

import json
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributed import ProcessGroup as Group

from .engine import check, transport
from .engine.transport import Steps
from .observe import trace

Tensors: TypeAlias = list[Tensor]
Buffers: TypeAlias = Tensor | Sequence[Tensor]
_CACHED = 1 << 16  # elements that are added up at a time, at most: 256 kB in fp32


class Handle:
    """A collective in flight. `wait()` returns when its result can be used."""

    def __init__(self, wait: Callable[[], object], event: trace.Event | None):
        self._wait, self._event = wait, event

    def wait(self) -> None:
        trace.awaited(self._event)
        self._wait()


# ---- what the stages call: each collective says which unit and which phase it belongs to ---------


def broadcast(flat: Tensor, group: Group, *, unit: str, phase: str) -> Handle:
    """Everyone gets rank 0's values. flat: (numel,)"""
    return _issue("broadcast", [flat], group, unit, phase, transport.broadcast(flat, group))


def reduce_scatter(out: Buffers, flat: Buffers, group: Group, *, unit: str, phase: str,
                   divide_by: int = 1) -> Handle:
    """Sum `flat` over the ranks, then divide; this rank gets its own slice of the result.

    flat: (world_size * n,), out: (n,), or as many of each. `flat` may be overwritten, and `out` may
    be this rank's slice of it.
    """
    outs, flats = _listed(out), _listed(flat)
    return _issue("reduce_scatter", flats, group, unit, phase,
                  _reduce_scatter(outs, flats, group, divide_by, "reduce_scatter"))


def all_gather(flat: Buffers, shard: Buffers, group: Group, *, unit: str, phase: str) -> Handle:
    """Everyone gets everyone's shard. shard: (n,), flat: (world_size * n,), or as many of each.

    `shard` may be this rank's slice of `flat` itself.
    """
    flats, shards = _listed(flat), _listed(shard)
    return _issue("all_gather", flats, group, unit, phase,
                  _all_gather(flats, shards, group, "all_gather"))


def all_reduce(flat: Buffers, group: Group, *, unit: str, phase: str,
               divide_by: int = 1) -> Handle:
    """Sum over the ranks, then divide, in place. flat: world_size * n elements, or several such."""
    flats = [buffer.view(-1) for buffer in _listed(flat)]
    return _issue("all_reduce", flats, group, unit, phase, _all_reduce(flats, group, divide_by))


def all_gather_object(value: object, group: Group, *, phase: str) -> list:
    """Every rank's (small) value, in rank order, as JSON gives it back: a tuple is a list then."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    event = _begin("all_gather_object", [text], group, "", phase)
    trace.awaited(event)
    texts = transport.all_gather_bytes(text, group)
    trace.end(event)
    return [json.loads(text) for text in texts]


# ---- how ----------------------------------------------------------------------------------------


def _reduce_scatter(outs: Tensors, flats: Tensors, group: Group, divide_by: int, op: str) -> Steps:
    flat = _pack(flats, group)
    out = outs[0] if len(outs) == 1 else rank_slice(flat, group)
    parts = yield from transport.all_to_all(flat, out, group, op)
    _sum(parts, out, divide_by)
    if len(outs) > 1:
        torch._foreach_copy_(outs, out.split([o.numel() for o in outs]))


def _all_gather(flats: Tensors, shards: Tensors, group: Group, op: str) -> Steps:
    shard = shards[0] if len(shards) == 1 else torch.cat(shards)
    flat = flats[0] if len(flats) == 1 else shard.new_empty(sum(flat.numel() for flat in flats))
    yield from transport.all_gather(flat, shard, group, op)
    if len(flats) > 1:
        _unpack(flat, flats, group)


def _all_reduce(flats: Tensors, group: Group, divide_by: int) -> Steps:
    flat = _pack(flats, group)
    part = rank_slice(flat, group)
    yield from _reduce_scatter([part], [flat], group, divide_by, "all_reduce, sum")
    yield from _all_gather([flat], [part], group, "all_reduce, gather")
    if len(flats) > 1:
        _unpack(flat, flats, group)


def _sum(parts: Tensors, out: Tensor, divide_by: int) -> None:
    """out = (parts[0] + parts[1] + …) / divide_by, from left to right. The parts are used up.

    On a CPU piece by piece, each small enough to stay in its cache from one operation to the next.
    `out` may be one of the parts: what it held has been added when it is written to.
    """
    if out.is_complex():  # whose operations lose the sign of a zero, see engine/backward.py
        parts, out = [torch.view_as_real(part) for part in parts], torch.view_as_real(out)
    chunks = 1 + out.numel() // _CACHED if out.device.type == "cpu" else 1
    for *pieces, result in zip(*[part.chunk(chunks) for part in (*parts, out)]):
        total = pieces[0]
        for piece in pieces[1:]:
            total = torch.add(total, piece, out=total if piece is not pieces[-1] else result)
        torch.div(total, divide_by, out=result)


def rank_slice(flat: Tensor, group: Group) -> Tensor:
    """flat: (world_size * n,) → this rank's slice of it, (n,)."""
    numel = flat.numel() // group.size()
    return flat[group.rank() * numel :][:numel]


def _listed(buffers: Buffers) -> Tensors:
    return [buffers] if isinstance(buffers, Tensor) else list(buffers)


def _pack(flats: Tensors, group: Group) -> Tensor:
    """Several flat buffers as one: slice r of it holds slice r of each."""
    if len(flats) == 1:
        return flats[0]
    return torch.cat([flat.view(group.size(), -1) for flat in flats], dim=1).view(-1)


def _unpack(packed: Tensor, flats: Tensors, group: Group) -> None:
    world_size = group.size()
    sizes = [flat.numel() // world_size for flat in flats]
    for flat, part in zip(flats, packed.view(world_size, -1).split(sizes, dim=1)):
        flat.view(world_size, -1).copy_(part)


def _issue(op: str, flats: Tensors, group: Group, unit: str, phase: str, steps: Steps) -> Handle:
    event = _begin(op, flats, group, unit, phase)

    def recorded() -> Steps:
        yield from steps
        trace.end(event)

    return Handle(transport.issue(recorded(), op, flats[0].device, group), event)


def _begin(op: str, flats: Tensors, group: Group, unit: str, phase: str) -> trace.Event | None:
    numel, nbytes = sum(flat.numel() for flat in flats), sum(flat.nbytes for flat in flats)
    dtype = flats[0].dtype
    check.compare(group, op, unit, phase, numel, dtype)
    rank, n = group.rank(), group.size()
    wire_bytes = {
        "broadcast": (n - 1) * nbytes if rank == 0 else 0,
        "reduce_scatter": (n - 1) * nbytes // n,
        "all_gather": (n - 1) * nbytes // n,
        "all_reduce": 2 * (n - 1) * nbytes // n,
        "all_gather_object": (n - 1) * nbytes,
    }[op]
    return trace.begin(rank=rank, op=op, unit=unit, phase=phase, numel=numel, dtype=dtype,
                       bytes=nbytes, wire_bytes=wire_bytes)
