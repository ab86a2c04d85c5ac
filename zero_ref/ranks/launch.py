"""Run a function on several ranks of this machine: `launch(fn, world_size, *args)`.

The rank processes start once and stay for the next call, so that only the first call pays for
importing torch. pool.py starts and watches them, rank.py is what runs in them, travel.py is how a
function gets there, and errors.py how a failure gets from there to here.
"""

import atexit
import math
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from . import errors, machine, travel
from .errors import Interrupted, RankError
from .pool import Pool
from .rank import join

__all__ = ["Interrupted", "RankError", "default_backend", "init", "join", "launch"]

_pools: dict[tuple[int, str], Pool] = {}
_one_at_a_time = threading.Lock()


def launch(fn: Callable[..., Any], world_size: int, *args: Any,
           backend: str | None = None) -> list[Any]:
    """Run `fn(*args)` on `world_size` ranks, joined in one process group. Returns the list of their
    results in rank order. The processes stay for the next call, with the modules they imported.

    `fn` may be defined in a script or a notebook cell. What the ranks print appears here while they
    run, each line labelled with its rank; in a notebook it ends up in rank order. backend: by
    default gloo, and nccl for CUDA tensors too if every rank can have a GPU of its own. Collectives
    give up after $ZERO_REF_TIMEOUT seconds (default 600). Ctrl-C ends the ranks and says where they
    were.

    Ranks follow this process's environment variables and folder at each call.

    Raises RankError within seconds if a rank fails (all ranks are ended then, and the next call
    starts new ones), KeyboardInterrupt, ValueError if world_size is below 1 or if something cannot
    travel to the ranks, such as a lock, and RuntimeError in a process that is a rank itself.
    """
    return within(math.inf, fn, world_size, *args, backend=backend)


def within(seconds: float, fn: Callable[..., Any], world_size: int, *args: Any,
           backend: str | None = None) -> list[Any]:
    """`launch` with a limit. Raises errors.Stuck, which says where each rank was, if they are not
    done after that time; all ranks are ended then."""
    if type(world_size) is not int or world_size < 1:
        raise ValueError(f"world_size={world_size!r}: must be a whole number, 1 or more")
    if dist.is_available() and dist.is_initialized():
        raise RuntimeError("launch was called in a process that is a rank already; under torchrun "
                           "call zero_ref.init() and run the function itself")
    backend = backend or default_backend(world_size)
    job = travel.job(fn, args)
    with _one_at_a_time:
        pool = _pools.get((world_size, backend))
        if pool is None or not pool.alive():
            if pool is not None:
                pool.close()  # one of its ranks has died meanwhile
            pool = _pools[world_size, backend] = Pool(world_size, backend)
        try:
            return pool.run(job, seconds)
        except KeyboardInterrupt:
            text = ["Interrupted. All ranks were ended; the next call starts new ones."]
            text += [f"rank {rank} had finished" for rank in range(world_size)
                     if rank not in pool.unfinished]
            try:
                text += pool.where(sorted(pool.unfinished), timeout=0.3)
            finally:  # also if it is pressed once more
                pool.close()
            raise Interrupted("\n".join(text)) from None
        except BaseException:  # the ranks' state is unknown now
            pool.close()
            raise


def processes(world_size: int, backend: str) -> list[int]:
    """The process ids of the ranks that wait for a call, by rank; none if there are no such ranks.
    """
    pool = _pools.get((world_size, backend))
    return [process.pid or 0 for process in pool.ranks] if pool is not None else []


def init(backend: str | None = None) -> torch.device:
    """Join the ranks that torchrun started. Returns this rank's torch.device.

    backend: by default gloo, and nccl for CUDA tensors too if this machine has a GPU for each of
    its ranks. With nccl, LOCAL_RANK decides which GPU is this rank's. Raises RuntimeError outside
    torchrun, and on ranks that have joined already.
    """
    if dist.is_available() and dist.is_initialized():
        raise RuntimeError(errors.JOINED)
    missing = [v for v in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if v not in os.environ]
    if missing:
        raise RuntimeError(f"{', '.join(missing)} not set: zero_ref.init() joins ranks that "
                           "torchrun started; without torchrun use zero_ref.launch(fn, world_size)")
    machine.end_with_parent()
    machine.talk_towards(os.environ.get("MASTER_ADDR", "localhost"))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    backend = backend or default_backend(local_ranks)
    return join(backend, int(os.environ["LOCAL_RANK"]))


def default_backend(ranks_here: int) -> str:
    """The backend for that many ranks on this machine: with NCCL each needs a GPU of its own."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= ranks_here else "gloo"


@atexit.register
def _close_all():
    for pool in _pools.values():
        pool.close()
