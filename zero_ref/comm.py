"""The collectives that ZeRO needs. No other file sends anything between ranks.

Each takes flat, contiguous buffers and returns a `Handle` at once; the result may be used after
`handle.wait()`. A buffer's *slices* are its world_size equal parts; slice r belongs to rank r.
With N ranks and a buffer of B bytes, each rank has to send

    broadcast        (N-1)·B from rank 0, nothing from the others
    reduce_scatter   (N-1)/N·B
    all_gather       (N-1)/N·B
    all_reduce       2·(N-1)/N·B, because it is a reduce_scatter followed by an all_gather

On NCCL these are the built-in collectives, on a stream of their own (whose broadcast passes the
buffer on from rank to rank instead). On gloo they are direct messages between the ranks, for two
reasons: gloo's own reduce-scatter moves a whole all-reduce, and adding up what arrived in rank
order gives sums whose bits do not depend on where a buffer happens to be cut. The second is why all
stages end with the same weights, bit for bit, at any world size.
"""

import pickle
import queue
import threading

import torch
import torch.distributed as dist

from .engine import agreement
from .observe import trace

# torch 2.13 deprecates the old names of these two; 2.11 has only the old ones.
_nccl_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_nccl_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Message tags keep the kinds apart, and all of them from a user's own send and recv. Messages with
# the same tag arrive in the order of sending, so each half of an all_reduce has a tag of its own:
# one rank may start the next first half before this second half, and another one after it.
_TAGS = {"broadcast": 1910, "reduce_scatter": 1911, "all_gather": 1912,
         "all_reduce, sum": 1913, "all_reduce, gather": 1914}
_CACHED = 1 << 16  # elements that are added up at a time: 256 kB in fp32


class Handle:
    """A collective under way. `wait()` returns when its result can be used."""

    def __init__(self, works, finish=None):
        self._works, self._finish, self._event = works, finish, None

    def wait(self) -> None:
        trace.awaited(self._event)
        for work in self._works:  # on NCCL the computing stream waits, not this thread
            work.wait()
        if self._finish is not None:
            self._finish()
        trace.end(self._event)

    def recorded(self, event) -> "Handle":
        self._event = event
        return self


class _Job(Handle):
    """A collective that a `_Lane` carries out. post(): sends and receives, and returns a Handle."""

    def __init__(self, post):
        self._post, self._posted, self._error = post, None, None
        self._done = threading.Lock()
        self._done.acquire()

    def post(self):
        try:
            self._posted = self._post()
        except BaseException as error:
            self._error = error

    def finish(self):
        try:
            if self._posted is not None:
                self._posted.wait()
                trace.end(self._event)
        except BaseException as error:
            self._error = error
        self._done.release()

    def wait(self):
        trace.awaited(self._event)
        with self._done:
            self._post = self._posted = None  # and with them the buffers that they used
        if self._error is not None:
            raise self._error


class _Lane(threading.Thread):
    """On a CPU, what a stream is on a GPU: a thread that carries out collectives of one kind in
    order of issue, while the thread that issued them computes."""

    def __init__(self):
        super().__init__(name="zero_ref.comm", daemon=True)
        self._jobs = queue.SimpleQueue()
        self.start()

    def issue(self, job):
        self._jobs.put(job)
        return job

    def run(self):
        torch.set_num_threads(1)  # of this thread only: the others are for the model
        while True:
            jobs = [self._jobs.get()]
            while not self._jobs.empty():
                jobs.append(self._jobs.get())
            for job in jobs:
                job.post()
            while jobs:
                jobs.pop(0).finish()
            del job


_lanes: dict[tuple[str, str], _Lane] = {}


# ---- what the stages call: each collective says which unit and which phase it belongs to ---------


def broadcast(flat, group, *, unit, phase) -> Handle:
    """Everyone gets rank 0's values. flat: (numel,)"""
    event = _begin("broadcast", flat, group, unit, phase)
    return _issue("broadcast", flat, group, event, lambda: _broadcast(flat, group))


def reduce_scatter(out, flat, group, *, unit, phase, divide_by=1) -> Handle:
    """Sum `flat` over the ranks, then divide; this rank gets its own slice of the result.

    flat: (world_size * n,), out: (n,). `out` may be this rank's slice of `flat` itself, which is
    overwritten in any case.
    """
    event = _begin("reduce_scatter", flat, group, unit, phase)
    recv = _landing(out, flat, group)
    return _issue("reduce_scatter", flat, group, event,
                  lambda: _reduce_scatter(out, flat, recv, group, divide_by))


def all_gather(flat, own, group, *, unit, phase) -> Handle:
    """Everyone gets everyone's slice. own: (n,), flat: (world_size * n,).

    `own` may be this rank's slice of `flat` itself.
    """
    event = _begin("all_gather", flat, group, unit, phase)
    return _issue("all_gather", flat, group, event, lambda: _all_gather(flat, own, group))


def all_reduce(flat, group, *, unit, phase, divide_by=1) -> Handle:
    """Sum over the ranks, then divide, in place. flat: world_size * n elements, contiguous."""
    event = _begin("all_reduce", flat, group, unit, phase)
    flat = flat.view(-1)
    own = _own_slice(flat, group)
    recv = _landing(own, flat, group)

    def both_halves():
        if _on_nccl(flat, group):  # its stream runs one after the other; the division comes last
            scatter = _reduce_scatter(own, flat, recv, group, 1)
            return Handle([scatter, _all_gather(flat, own, group)], lambda: flat.div_(divide_by))
        scatter = _reduce_scatter(own, flat, recv, group, divide_by, "all_reduce, sum")
        gather = "all_reduce, gather"
        return Handle([scatter], lambda: _all_gather(flat, own, group, gather).wait())

    return _issue("all_reduce", flat, group, event, both_halves)


def all_gather_object(obj, group, *, phase) -> list:
    """Every rank's (small, picklable) object, in rank order."""
    as_bytes = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)
    event = _begin("all_gather_object", as_bytes, group, "", phase)
    trace.awaited(event)
    objects = [None] * dist.get_world_size(group)
    dist.all_gather_object(objects, obj, group=group)
    trace.end(event)
    return objects


# ---- how: built in on NCCL, direct messages on gloo ----------------------------------------------


def _issue(op, flat, group, event, post):
    if _on_nccl(flat, group):
        return post().recorded(event)
    key = (group.group_name, op)
    if key not in _lanes:
        _lanes[key] = _Lane()
    return _lanes[key].issue(_Job(post).recorded(event))


def _broadcast(flat, group):
    if _on_nccl(flat, group):
        return Handle([dist.broadcast(flat, group=group, group_src=0, async_op=True)])
    if dist.get_rank(group) == 0:
        return _exchange(group, "broadcast", send={r: flat for r in _others(group)}, recv={})
    return _exchange(group, "broadcast", send={}, recv={0: flat})


def _landing(out, flat, group):
    """Where the other ranks' slices arrive before they are added up: {rank: (n,)}."""
    if _on_nccl(flat, group):
        return {}
    others = _others(group)
    recv = {r: torch.empty_like(out) for r in others}
    if others and _own_slice(flat, group).data_ptr() != out.data_ptr():
        recv[others[0]] = out  # one buffer less
    return recv


def _reduce_scatter(out, flat, recv, group, divide_by, op="reduce_scatter"):
    if _on_nccl(flat, group):
        return Handle([_nccl_reduce_scatter(out, flat, group=group, async_op=True)],
                      lambda: out.div_(divide_by))
    own, slices = _own_slice(flat, group), _slices(flat, group)
    in_rank_order = [recv.get(r, own) for r in range(len(slices))]
    exchange = _exchange(group, op, send={r: slices[r] for r in recv}, recv=recv)
    return Handle([exchange], lambda: _sum(in_rank_order, out, divide_by))


def _sum(parts, out, divide_by):
    """out = (parts[0] + parts[1] + …) / divide_by, from left to right. The parts are used up.

    Piece by piece, each small enough to stay in the processor's cache from one operation to the
    next. `out` may be one of the parts: what it held has been added when it is written to.
    """
    for *pieces, result in zip(*[part.split(_CACHED) for part in (*parts, out)]):
        total = pieces[0]
        for piece in pieces[1:]:
            total = torch.add(total, piece, out=total if piece is not pieces[-1] else result)
        torch.div(total, divide_by, out=result)


def _all_gather(flat, own, group, op="all_gather"):
    if _on_nccl(flat, group):
        return Handle([_nccl_all_gather(flat, own, group=group, async_op=True)])
    mine, others, slices = _own_slice(flat, group), _others(group), _slices(flat, group)
    if mine.data_ptr() != own.data_ptr():
        mine.copy_(own)
    return _exchange(group, op, send={r: own for r in others}, recv={r: slices[r] for r in others})


def _exchange(group, op, send, recv):
    """send[r] goes to rank r, recv[r] is filled by rank r. gloo's messages travel through host
    memory, so CUDA tensors are staged there."""
    landing = {r: t if t.device.type == "cpu" else torch.empty_like(t, device="cpu")
               for r, t in recv.items()}
    leaving = {t.data_ptr(): t.cpu() for t in send.values()}
    works = [dist.irecv(t, group=group, group_src=r, tag=_TAGS[op]) for r, t in landing.items()]
    works += [dist.isend(leaving[t.data_ptr()], group=group, group_dst=r, tag=_TAGS[op])
              for r, t in send.items()]

    def unstage():
        for r, t in recv.items():
            if landing[r] is not t:
                t.copy_(landing[r])

    return Handle(works, unstage)


def _slices(flat, group):
    world_size = dist.get_world_size(group)
    return flat.view(world_size, flat.numel() // world_size).unbind()


def _own_slice(flat, group):
    numel = flat.numel() // dist.get_world_size(group)
    return flat[dist.get_rank(group) * numel :][:numel]


def _others(group):
    """The other ranks, nearest first, so that not everyone sends to rank 0 at once."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    return [(rank + k) % world_size for k in range(1, world_size)]


def _on_nccl(flat, group):
    """Whether the group's backend for the buffer's device is NCCL (and not gloo)."""
    by_device = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    return by_device[flat.device.type] != "gloo"


def _begin(op, flat, group, unit, phase):
    agreement.compare(group, op, unit, phase, flat.numel(), flat.dtype)
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
