"""How messages travel: by the built-in collectives of NCCL, or directly between ranks on gloo.

`all_to_all`, `all_gather` and `broadcast` are generators: they start what they say, yield what has
to be waited for, and end when it is there. `issue` runs a generator while the caller computes: on a
CPU in a thread of its own, on a GPU on a stream of its own.
"""

import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup as Group

from . import failure

# What a collective yields is to be waited for before it is resumed.
Steps: TypeAlias = Generator[list[dist.Work], None, Any]

# torch 2.13 deprecates the old name; 2.11 has only that one.
_built_in_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Message tags keep the kinds apart, and all of them from a user's own send and recv. Messages with
# the same tag arrive in the order of sending, so each half of an all_reduce has a tag of its own:
# one rank may start the next first half before this second half, and another one after it.
_TAGS = {"broadcast": 1910, "reduce_scatter": 1911, "all_gather": 1912,
         "all_reduce, sum": 1913, "all_reduce, gather": 1914}

# Bytes. The C library gives free memory back to the kernel when there is more of it than twice the
# largest block that was ever freed, and gets it again page by page, which costs a small model a
# tenth of its step. So each lane allocates and frees such a block once.
_KEEP = 8 << 20


def on_gloo(device: torch.device, group: Group) -> bool:
    """Whether the group's backend for tensors of this device is gloo, and not a built-in one."""
    return f"{device.type}:gloo" in dist.get_backend_config(group)


def all_to_all(flat: Tensor, out: Tensor, group: Group, op: str) -> Steps:
    """Slice r of everybody's `flat` goes to rank r. Returns what this rank gets, in rank order.

    out: where their sum will be, so that a part may arrive there if it is free.
    """
    if not on_gloo(flat.device, group):
        landing = torch.empty_like(flat)
        yield [dist.all_to_all_single(landing, flat, group=group, async_op=True)]
        return _slices(landing, group)
    slices, rank = _slices(flat, group), group.rank()
    recv = {r: torch.empty_like(out) for r in _others(group)}
    if recv and slices[rank].data_ptr() != out.data_ptr():
        recv[next(iter(recv))] = out
    yield from _exchange(group, op, {r: slices[r] for r in recv}, recv)
    return [recv.get(r, own) for r, own in enumerate(slices)]


def all_gather(flat: Tensor, shard: Tensor, group: Group, op: str) -> Steps:
    """`shard` goes to everybody, into slice r of `flat` if it is rank r's."""
    if not on_gloo(flat.device, group):
        yield [_built_in_all_gather(flat, shard, group=group, async_op=True)]
        return
    slices, others, rank = _slices(flat, group), _others(group), group.rank()
    if slices[rank].data_ptr() != shard.data_ptr():
        slices[rank].copy_(shard)
    yield from _exchange(group, op, {r: shard for r in others}, {r: slices[r] for r in others})


def broadcast(flat: Tensor, group: Group) -> Steps:
    """Rank 0's `flat` goes to everybody."""
    if not on_gloo(flat.device, group):
        yield [dist.broadcast(flat, group=group, group_src=0, async_op=True)]
        return
    first = group.rank() == 0
    send, recv = {r: flat for r in _others(group) if first}, {} if first else {0: flat}
    yield from _exchange(group, "broadcast", send, recv)


def all_gather_bytes(data: Tensor, group: Group) -> list[bytes]:
    """Everybody's bytes, in rank order: first how many each rank has, then all of them, padded."""
    # The group may carry tensors of GPUs alone.
    on_cpu = "cpu:" in dist.get_backend_config(group)
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    mine = torch.tensor([data.numel()], device=device)
    counts = [torch.empty_like(mine) for _ in range(group.size())]
    with failure.explained():
        dist.all_gather(counts, mine, group=group)
    padded = torch.zeros(int(max(counts)), dtype=torch.uint8, device=device)
    padded[: data.numel()] = data
    rows = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(rows, padded, group=group)
    return [bytes(row[:count].tolist()) for row, count in zip(rows, counts)]


def _exchange(group: Group, op: str, send: dict[int, Tensor], recv: dict[int, Tensor]) -> Steps:
    """send[r] goes to rank r, recv[r] is filled by rank r. gloo's messages travel through host
    memory, so CUDA tensors are staged there."""
    landing = {r: t if t.device.type == "cpu" else torch.empty_like(t, device="cpu")
               for r, t in recv.items()}
    leaving = {t.data_ptr(): t.cpu() for t in send.values()}
    # As dist.irecv and dist.isend do it, which take several times as long to find the group.
    works = [group.recv([t], r, _TAGS[op]) for r, t in landing.items()]
    works += [group.send([leaving[t.data_ptr()]], r, _TAGS[op]) for r, t in send.items()]
    yield works
    for r, t in recv.items():
        if landing[r] is not t:
            t.copy_(landing[r])


def _slices(flat: Tensor, group: Group) -> tuple[Tensor, ...]:
    world_size = group.size()
    return flat.view(world_size, flat.numel() // world_size).unbind()


def _others(group: Group) -> list[int]:
    """The other ranks, nearest first, so that not everyone sends to rank 0 at once."""
    rank, world_size = group.rank(), group.size()
    return [(rank + k) % world_size for k in range(1, world_size)]


# ---- while the caller computes -------------------------------------------------------------------

_lanes: dict[tuple, "Lane"] = {}
_streams: dict[tuple, torch.cuda.Stream] = {}


def issue(steps: Steps, op: str, device: torch.device, group: Group) -> Callable[[], object]:
    """Run a collective's generator. Returns a function that waits until it is done."""
    if on_gloo(device, group):
        if (group.group_name, op) not in _lanes:
            _lanes[group.group_name, op] = Lane()
        if device.type == "cuda":
            steps = _on_stream(steps, torch.cuda.current_stream(device))
        return _lanes[group.group_name, op].issue(steps).result
    if device.type != "cuda":
        _run(steps)
        return lambda: None
    key = (group.group_name, op, device)
    if key not in _streams:
        _streams[key] = torch.cuda.Stream(device)
    _streams[key].wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(_streams[key]):
        _run(steps)
    done = _streams[key].record_event()
    return lambda: torch.cuda.current_stream(device).wait_event(done)


def _on_stream(steps: Steps, stream: torch.cuda.Stream) -> Steps:
    """Where the caller computes: the current stream of a lane's thread is another one."""
    with torch.cuda.stream(stream):
        yield from steps


def _run(steps: Steps) -> None:
    for works in steps:
        with failure.explained():
            for work in works:
                work.wait()


class Lane(threading.Thread):
    """On a CPU, what a stream is on a GPU: a thread that carries out collectives of one kind, one
    after the other."""

    def __init__(self):
        super().__init__(name="zero_ref.comm", daemon=True)
        bytes(_KEEP)
        self._line = queue.SimpleQueue()
        self.start()

    def issue(self, steps: Steps) -> Future:
        done = Future()
        self._line.put((steps, done))
        return done

    def run(self):
        torch.set_num_threads(1)  # here and in threads that begin later: the others are the model's
        while True:
            steps, done = self._line.get()
            try:
                _run(steps)
            except BaseException as error:
                done.set_exception(error)
            else:
                del steps  # and with it the buffers that it used
                done.set_result(None)
