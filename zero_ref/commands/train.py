"""One training run of one stage, on the ranks that are there."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import NoCheckpoint, comm, load, save, wrap
from ..engine.tree import tensors_in
from ..observe import memory
from ..ranks.stopping import on_sigterm
from ..tasks.task import Task

KEPT = 2  # checkpoints


def train(make_task: Callable[[], Task], stage: int, *, steps: int, device: str, seed: int,
          checkpoint_dir: Path | None = None, checkpoint_every: int = 10) -> dict[str, Any]:
    """Train on this rank, together with the others. Returns what was measured, as a dict.

    device: "cpu" or "cuda". checkpoint_dir: where a checkpoint is saved after every
    `checkpoint_every` steps, after the last one, and when a rank gets SIGTERM, which ends the run;
    and from where it goes on.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least 1")
    if checkpoint_every < 1:
        raise ValueError(f"--checkpoint-every {checkpoint_every}: at least 1")
    device = prepare_device(device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    task = make_task()
    torch.manual_seed(seed + rank)  # rank 0's initial values are the ones that count
    model = wrap(task.build().to(device), stage, units=task.units)
    opt = task.optimizer(model.parameters())

    first, done = 0, 0
    if checkpoint_dir:
        with suppress(NoCheckpoint):
            first = done = load(checkpoint_dir, model, opt).get("step", 0)
    if first > steps:
        raise ValueError(f"{checkpoint_dir} has a checkpoint of step {first} already: give at "
                         "least as many --steps, or another --checkpoint-dir")

    times, stopped = [], False
    with progress(steps - first) as show, (
            on_sigterm() if checkpoint_dir else nullcontext()) as stop:
        while done < steps and not stopped:
            batch = task.batch_on(device, done, rank)
            samples = world_size * len(tensors_in(batch)[0])
            start = time.perf_counter()
            loss = task.loss(model, batch)
            loss.backward()
            held = memory.resident(model, opt)
            opt.step()
            opt.zero_grad()
            loss_now = loss.item()  # on CUDA this also waits for the step
            times.append(time.perf_counter() - start)
            show(f"loss {loss_now:.4f}  {samples / times[-1]:,.0f} samples/s  "
                 f"{sum(held.values()) / 1e6:.2f} MB of model states per rank")
            done += 1
            if checkpoint_dir and stop:
                stopped = stop.agreed(model.group)
                if stopped or done == steps or done % checkpoint_every == 0:
                    save(checkpoint_dir, model, opt, keep=KEPT, step=done)
    if stopped:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # who asks once more gets no other status
    if not times:  # it had been done, and died after its last save
        batch = task.batch_on(device, steps - 1, rank)
        samples, held = world_size * len(tensors_in(batch)[0]), memory.resident(model, opt)
        with torch.no_grad():
            loss_now = task.loss(model, batch).item()
    losses = comm.all_gather_object(loss_now, model.group, phase="report")
    return {
        "task": task.name, "stage": stage, "world_size": world_size, "steps": done,
        "first_step": first, "stopped": stopped,
        "optimizer": type(opt).__name__, "device": describe(device),
        "loss": (mean := sum(losses) / world_size),
        "metric": task.metric if task.evaluate and not stopped else None,
        # Who was asked to stop has no time for more.
        "held_out": task.evaluate(model, device) if task.evaluate and not stopped else mean,
        "samples_per_second": samples / sorted(times)[len(times) // 2] if times else 0.0,
        "resident_bytes": held,
    }


# ---- devices -------------------------------------------------------------------------------------


def backend_for(device: str, ranks_here: int, backend: str | None = None) -> str:
    """The backend for `ranks_here` ranks on this machine. Raises ValueError if it cannot work."""
    if device == "cpu":
        if backend not in (None, "gloo"):
            raise ValueError(f"backend {backend!r} does not work on the CPU: use gloo")
        return "gloo"
    gpus = torch.cuda.device_count()
    if gpus == 0:
        raise ValueError("device cuda: this machine has no CUDA GPU, or this torch no CUDA "
                         f"({torch.__version__}); use --device cpu")
    if backend != "gloo" and gpus < ranks_here:
        raise ValueError(f"{ranks_here} ranks, but {gpus} GPU(s): NCCL needs one for each rank. "
                         "Add --backend gloo to share GPUs (messages then go through host memory)")
    return backend or "nccl"


def prepare_device(device: str) -> torch.device:
    """This rank's torch.device; ranks share a machine's GPUs if there are fewer."""
    if device == "cpu":
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    # Two runs of the same stage have to give the same bits before two stages can.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would fill every torch.empty
    return device


def describe(device: torch.device) -> str:
    """"cpu", or the GPU's name."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


# ---- progress ------------------------------------------------------------------------------------


@contextmanager
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on rank 0's terminal. Yields a function to call once per step, with a text."""
    columns = [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.description}")]
    hidden = dist.get_rank() != 0 or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=hidden) as bar:
        line = bar.add_task("", total=steps)
        yield lambda text: bar.update(line, advance=1, description=text)
