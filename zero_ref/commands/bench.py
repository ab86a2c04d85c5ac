"""Step time, bytes and memory of every stage, side by side with what people use instead.

The systems take turns, each in fresh processes, and the order rotates from round to round. Ratios
are taken within a round, so that whatever else the machine is doing hits all alike.
"""

import importlib.util
import inspect
import io
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from .. import comm, wrap
from ..engine import transport
from ..engine.units import find_units
from ..observe import memory
from ..observe.trace import loopback_bytes
from ..ranks import travel
from ..ranks.pool import Pool
from ..tasks import files
from ..tasks.models import GPT, cnn
from ..tasks.named import NAMED, VOCAB, adamw
from ..tasks.task import Task
from .systems import ddp, fsdp2
from .train import backend_for, describe, prepare_device

WARM_UP = 3  # steps that are not counted: the first creates optimizer states, and connections
TIMES = {"CNN": 10}  # how many times as many steps are taken, where a step is short
TITLES = {"CNN": "CNN on digits (48 a step, ten times the steps)", "3M": "GPT", "15M": "GPT",
          "57M": "GPT"}
OVERHEAD_AT = (1, 8, 64, 1024)  # world sizes
Step = Callable[[Any], Tensor]


def bench(models: Sequence[str], systems: Sequence[str] | None, world_sizes: Sequence[int], *,
          rounds: int, steps: int, device: str = "cpu",
          backend: str | None = None) -> dict[str, Any]:
    """Time the systems in turns. Returns the report that `zero-ref bench --json` writes: for each
    model and world size a part, in it a row per system, and the Python overhead per unit.

    models: what `zero_ref.tasks.files.load` takes. systems: keys of SYSTEMS, None for all that are
    installed; "DDP" and "floor" are always measured. Raises ValueError for what cannot be run.
    """
    if rounds < 1 or steps < 1 or min(world_sizes) < 1:
        raise ValueError(f"rounds={rounds}, steps={steps}, world sizes {world_sizes}: at least 1")
    backends = {n: backend_for(device, n, backend) for n in world_sizes}
    available = [s for s in SYSTEMS if not s.startswith("DeepSpeed") or _has_deepspeed()]
    unknown = [s for s in systems or [] if s not in available]
    if unknown:
        raise ValueError(f"systems {', '.join(unknown)}: not among {', '.join(available)}"
                         + ("" if _has_deepspeed() else " (DeepSpeed is not installed)"))
    systems = [s for s in available if systems is None or s in {*systems, "DDP", "floor"}]
    report: dict[str, Any] = {"rounds": rounds, "steps": steps, "machine": _machine(),
                              "torch": torch.__version__, "parts": [],
                              "optimizer": "AdamW" if {*models} <= {*NAMED} else "its optimizer"}
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        line = bar.add_task("", total=len(models) * len(world_sizes) * rounds * len(systems))
        for model, world_size in [(m, n) for m in models for n in world_sizes]:
            runs: dict[str, list[dict]] = {system: [] for system in systems}
            for turn in range(rounds):
                shift = turn % len(systems)
                for system in systems[shift:] + systems[:shift]:
                    bar.update(line, description=f"{model}, {world_size} ranks, {system}")
                    runs[system].append(_in_fresh_processes(
                        _measure, world_size, backends[world_size], system, model, device, steps))
                    bar.advance(line)
            report["parts"].append({"model": model, "world_size": world_size,
                                    **runs["DDP"][0]["about"],
                                    "systems": _summary(runs, world_size)})
    report["overhead_us"] = _overhead_in_a_fresh_process(OVERHEAD_AT)
    return report


def _in_fresh_processes(fn, world_size, backend, *args):
    """Start ranks, run fn(*args) on them, end them. Returns rank 0's answer, with the largest
    peak of all ranks."""
    pool = Pool(world_size, backend)
    try:
        answers = pool.run(travel.job(fn, args))
    finally:
        pool.close()
    return answers[0] | {"peak": max(answer["peak"] for answer in answers)}


# ---- the systems: each turns a module and its Task into a function step(batch) -> loss -----------


def _loop(model, task, optimizer=None):
    optimizer = optimizer or task.optimizer(model.parameters())

    def step(batch):
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def _ddp(net, task):
    """Looks for unused parameters in every step if the first batch of some rank leaves any."""
    device = next(net.parameters()).device
    task.loss(net, task.batch_on(device, 0, dist.get_rank())).backward()
    unused = any(p.grad is None for p in net.parameters() if p.requires_grad)
    net.zero_grad()
    return ddp(net, any(comm.all_gather_object(unused, dist.group.WORLD, phase="init")))


def _zero_redundancy(net, task):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    like = task.optimizer([nn.Parameter(torch.zeros(1))])
    takes = inspect.signature(type(like)).parameters
    options = {name: value for name, value in like.defaults.items() if name in takes}
    model = _ddp(net, task)
    return _loop(model, task, ZeroRedundancyOptimizer(model.parameters(), type(like), **options))


def _fsdp2(reshard_after_forward):
    return lambda net, task: _loop(fsdp2(
        net, task.units, reshard_after_forward=reshard_after_forward), task)


def _deepspeed(stage):
    def build(net, task):
        os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
        import deepspeed

        engine, *_ = deepspeed.initialize(
            model=net, model_parameters=net.parameters(), dist_init_required=False,
            optimizer=task.optimizer(net.parameters()),
            config={"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
                    "zero_force_ds_cpu_optimizer": False,
                    "zero_optimization": {"stage": stage, "overlap_comm": False}})

        def step(batch):
            loss = task.loss(engine, batch)
            engine.backward(loss)
            engine.step()
            return loss

        return step

    return build


def _ours(stage, **options):
    return lambda net, task: _loop(wrap(net, stage, units=task.units, **options), task)


# "floor" is one process without communication: no system can be faster on the same cores.
SYSTEMS: dict[str, Callable[[nn.Module, Task], Step]] = {
    "floor": _loop,
    "DDP": lambda net, task: _loop(_ddp(net, task), task),
    "stage 0": _ours(0),
    "stage 1": _ours(1),
    "stage 2": _ours(2),
    "stage 3": _ours(3),
    "stage 3, no reshard": _ours(3, reshard_after_forward=False),
    "DDP + ZeroRedundancy": _zero_redundancy,
    "FSDP2, no reshard": _fsdp2(False),
    "FSDP2": _fsdp2(True),
    "DeepSpeed 1": _deepspeed(1),
    "DeepSpeed 2": _deepspeed(2),
    "DeepSpeed 3": _deepspeed(3),
}


def _has_deepspeed():
    return importlib.util.find_spec("deepspeed") is not None


# ---- on every rank -------------------------------------------------------------------------------


def _measure(system: str, name: str, device: str, steps: int) -> dict[str, Any]:
    device = prepare_device(device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    task, times = files.load(name, world_size), TIMES.get(name, 1)
    warm_up, steps = times * WARM_UP, times * steps
    _load_libraries(device)
    before = _resident_set(device)
    torch.manual_seed(0)
    net = task.build().to(device)
    about = {"numel": _numel(net), "device": describe(device),
             "dtype": str(next(net.parameters()).dtype).removeprefix("torch."),
             "largest_unit": max(map(_numel, find_units(net, task.units).values()), default=0)}
    batches = [task.batch_on(device, step, rank) for step in range(warm_up + steps)]

    with redirect_stdout(io.StringIO()):  # DeepSpeed talks
        step = SYSTEMS[system](net, task)
        for batch in batches[:warm_up]:
            step(batch)
    dist.barrier()
    _reset_peak(device)
    sent_before = loopback_bytes()
    clock = _clock(device)
    for batch in batches[warm_up:]:
        loss = step(batch)
    seconds = clock() / steps
    # This also waits for the other ranks.
    losses = comm.all_gather_object(loss.item(), dist.group.WORLD, phase="report")
    sent_after, sent = loopback_bytes(), None
    if sent_before is not None and sent_after is not None:
        sent = (sent_after - sent_before) / steps / world_size
    return {"seconds": seconds, "sent": sent, "loss": sum(losses) / world_size,
            "peak": _peak(device) - before, "about": about}


def _load_libraries(device):
    """Two tiny steps, so that the memory of code and libraries is not taken for a model's."""
    for net, x in ((GPT(VOCAB, 2, 8, 1, 1), torch.zeros(1, 2, dtype=torch.long)),
                   (cnn(2, 2), torch.zeros(1, 1, 2, 2))):
        net.to(device)(x.to(device)).sum().backward()
        adamw(net.parameters()).step()


def _numel(net):
    return sum(p.numel() for p in net.parameters())


def _clock(device):
    """Returns a function that says how many seconds ago this was called."""
    if device.type == "cpu":
        start = time.perf_counter()
        return lambda: time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()

    def seconds():
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return seconds


def _status(field: str) -> int:
    """A size from what Linux says about this process, in bytes; 0 on other systems."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _resident_set(device):
    return torch.cuda.memory_allocated() if device.type == "cuda" else _status("VmRSS")


def _reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device):
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


# ---- Python's share ------------------------------------------------------------------------------


def _overhead_in_a_fresh_process(world_sizes):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return {n: fresh.submit(overhead, n).result() for n in world_sizes}


def overhead(world_size: int, units: int = 64, steps: int = 12) -> dict[int, float]:
    """Microseconds per unit and step that each stage adds to the bare module: Python alone, on one
    rank of `world_size` whose messages go nowhere (torch's "fake" backend, whose own time is not
    counted). Returns {stage: µs}.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    os.environ["ZERO_REF_CHECK"] = "0"  # the other ranks are not there to be asked
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    x = torch.ones(1, 8)
    in_backend = 0.0

    def timed(collective):
        def call(*args, **kwargs):
            nonlocal in_backend
            start = time.perf_counter()
            work = collective(*args, **kwargs)
            in_backend += time.perf_counter() - start
            return work

        return call

    transport._built_in_all_gather = timed(transport._built_in_all_gather)
    dist.all_to_all_single = timed(dist.all_to_all_single)

    def seconds(stage):
        nonlocal in_backend
        model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(units)])
        if stage is not None:
            model = wrap(model, stage)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        times = []
        for _ in range(steps):
            start, in_backend = time.perf_counter(), 0.0
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - start - in_backend)
        return statistics.median(times)

    bare = seconds(None)
    found = {stage: round((seconds(stage) - bare) / units * 1e6, 1) for stage in range(4)}
    dist.destroy_process_group()
    return found


# ---- the report ----------------------------------------------------------------------------------


def _machine():
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in
             (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
             if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {names[0] if names else platform.machine()}"


def _stage_of(system):
    """The ZeRO stage whose formula says what a system keeps."""
    if system.startswith(("stage", "DeepSpeed")):
        return int(system.split()[1].rstrip(","))
    return {"FSDP2": 3, "FSDP2, no reshard": 3, "DDP + ZeroRedundancy": 1}.get(system, 0)


def _summary(runs, world_size):
    """A dict per system: medians over the rounds, and the least and largest ratio."""
    about = runs["DDP"][0]["about"]
    rows = []
    for system, measured in runs.items():
        ratios = [m["seconds"] / d["seconds"] for m, d in zip(measured, runs["DDP"])]
        floors = [f["seconds"] / m["seconds"] for m, f in zip(measured, runs["floor"])]
        dtype = getattr(torch, about["dtype"])
        sent = [m["sent"] / (dtype.itemsize * about["numel"]) for m in measured
                if m["sent"] is not None]
        states = memory.model_states(about["numel"], world_size, _stage_of(system),
                                     param_dtype=dtype, grad_dtype=dtype,
                                     optimizer_dtypes=(dtype, dtype))
        rows.append({
            "system": system, "seconds": statistics.median(m["seconds"] for m in measured),
            "ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
            "floor_share": statistics.median(floors),
            "sent_psi": statistics.median(sent) if sent else None,
            "peak_bytes": statistics.median(m["peak"] for m in measured),
            "formula_bytes": sum(states.values()),
            "loss": measured[0]["loss"],
        })
    return rows


def _mb(nbytes):
    return f"{nbytes / 1e6:.1f}" if nbytes < 1e7 else f"{nbytes / 1e6:,.0f}"


def print_report(report: dict[str, Any]) -> None:
    """A table per model and world size, and one of the overhead, on stdout."""
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    console.print(f"{report['machine']}, torch {report['torch']}; {report['rounds']} rounds of "
                  f"{report['steps']} steps, {report['optimizer']}")
    for part in report["parts"]:
        console.print()
        what = TITLES.get(part["model"], part["model"])
        title = (f"{what} with Ψ = {part['numel']:,} parameters, N = "
                 f"{part['world_size']} ranks on {part['device']}")
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for heading in ("", "ms", "/ DDP", "least–most", "floor", "sent", "peak", "states", "loss"):
            table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
        for row in part["systems"]:
            sent = "?" if row["sent_psi"] is None else f"{row['sent_psi']:.3f} Ψ"
            table.add_row(row["system"], f"{row['seconds'] * 1e3:.1f}", f"{row['ratio']:.2f}",
                          f"{row['least']:.2f}–{row['most']:.2f}", f"{row['floor_share']:.0%}",
                          sent, _mb(row["peak_bytes"]), _mb(row["formula_bytes"]),
                          "" if row["system"] == "floor" else f"{row['loss']:.4f}")
        console.print(table)
    console.print(
        "ms: per step, median over rounds. / DDP: median of the ratios within a round. floor: its "
        "share of\nthe time, each process alone without communication. sent: per rank and step, by "
        "the kernel's count\non the loopback device. peak: resident memory above start-up, MB. "
        "states: parameters, gradients\nand optimizer states by formula, MB.\n")
    console.print("Python overhead, µs per unit and step, on one of N ranks whose messages go "
                  "nowhere")
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("N", "stage 0", "stage 1", "stage 2", "stage 3"):
        table.add_column(heading, justify="right")
    for world_size, stages in report["overhead_us"].items():
        table.add_row(str(world_size), *[f"{us:.0f}" for us in stages.values()])
    console.print(table)
