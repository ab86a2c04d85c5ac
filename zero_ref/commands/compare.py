"""All stages and torch's DDP on the same data, and what ZeRO promises of them, checked."""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from .. import wrap
from ..observe import memory
from ..observe.trace import loopback_bytes, trace
from ..ranks.launch import launch
from ..tasks import data
from .train import OPTIMIZERS, STATES, backend_for, describe, prepare_device, progress

SENT_PSI = {"DDP": 2, 0: 2, 1: 2, 2: 2, 3: 3}  # elements sent per step, in Ψ·(N-1)/N


def compare(task: str, stages: Sequence[int], world_size: int, *, steps: int, batch_size: int,
            optimizer: str, device: str, backend: str | None, seed: int,
            data_dir: Path | None) -> dict[str, Any]:
    """Train DDP, stage 0 and `stages` on `world_size` ranks. Returns the report that
    `zero-ref compare --json` writes: settings, a dict per system, and the promises that failed."""
    if steps < 2:
        raise ValueError(f"steps={steps}: at least 2, the first only creates the optimizer states")
    backend = backend_for(device, world_size, backend)
    settings = {"steps": steps, "batch_size": batch_size, "optimizer": optimizer, "seed": seed}
    systems = ["DDP", *sorted({0, *stages})]
    # One launch for all: rank r's answer holds a measurement per system.
    by_rank = launch(_measure_all, world_size, systems, task, data_dir, device, settings,
                     backend=backend)
    reference = by_rank[0][systems.index(0)]["weights"]
    rows = []
    for i, system in enumerate(systems):
        ranks = [answers[i] for answers in by_rank]
        rows.append(_row(system, ranks, reference, world_size, optimizer))
    failed = [f"{row['system']}: {promise}" for row in rows
              for promise, holds in row["promises"].items() if not holds]
    return {"task": task, "world_size": world_size, **settings, "device": ranks[0]["device"],
            "torch": torch.__version__, "metric": ranks[0]["metric"],
            "parameters": rows[0]["numel"], "largest_unit": max(map(sum, ranks[0]["unit_sizes"])),
            "systems": rows, "failed_promises": failed}


# ---- on every rank -------------------------------------------------------------------------------


def _measure_all(systems, task_name, data_dir, device, settings):
    device = prepare_device(device)
    task = data.load(task_name, data_dir)
    with progress(len(systems) * settings["steps"]) as show:
        return [_measure(system, task, device, show, **settings) for system in systems]


def _measure(system, task, device, show, *, steps, batch_size, optimizer, seed):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    label = system if system == "DDP" else f"stage {system}"
    torch.manual_seed(seed + rank)  # different on every rank: rank 0's initial values must win
    net = task.build().to(device)
    model = DistributedDataParallel(net) if system == "DDP" else wrap(net, system)
    opt = OPTIMIZERS[optimizer](model.parameters())

    def step(x, y):
        loss = task.loss(model(x.to(device)), y.to(device))
        loss.backward()
        held = memory.resident(model, opt)
        opt.step()
        opt.zero_grad()
        return loss.item(), held

    times, losses = [], []
    dist.barrier()
    sent_before = loopback_bytes()
    for x, y in data.batches(task, steps, batch_size, rank, world_size, seed):
        start = time.perf_counter()
        with trace() as sent:
            loss, held = step(x, y)
        times.append(time.perf_counter() - start)
        losses.append(loss)
        show(f"{label}  loss {loss:.4f}")
    dist.barrier()
    sent_after, counted = loopback_bytes(), None
    if sent_before is not None and sent_after is not None:
        counted = (sent_after - sent_before) / steps / world_size

    # Copied, because the step that measures the peak trains on.
    state = net.state_dict() if system == "DDP" else model.state_dict()
    weights = {name: value.detach().cpu().clone() for name, value in state.items()}
    digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights.values())).hexdigest()
    result = {
        "numel": sum(p.numel() for p in task.build().parameters()),
        "unit_sizes": [u.sizes for u in model.units] if system != "DDP" else None,
        "loss": losses[-1], "metric": task.metric, "held_out": task.evaluate(model, device),
        "device": describe(device), "digest": digest, "weights": weights if rank == 0 else None,
        "resident": held, "sent": sent.wire_bytes() if system != "DDP" else None,
        "counted": counted, "seconds": sorted(times[1:])[len(times[1:]) // 2],
        "peak": _peak_bytes(device, model, opt, lambda: step(x, y)),
    }
    dist.barrier()
    return result


def _peak_bytes(device: torch.device, model: nn.Module, opt: torch.optim.Optimizer,
                step: Callable[[], Any]) -> int:
    """The most bytes of tensors that this rank holds at one time during a step."""
    at_rest = sum(memory.resident(model, opt).values())
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return at_rest + torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler talks on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    now = most = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":  # one for every allocation (+) and release (-)
            now += event.nbytes()
            most = max(most, now)
    return at_rest + most


# ---- the verdict ---------------------------------------------------------------------------------


def _row(system, ranks, reference, world_size, optimizer):
    """One system's measurements, and which promises hold. Bytes are those of the rank with most."""
    first = ranks[0]
    differences = [(first["weights"][name].double() - reference[name].double()).abs().max().item()
                   for name in reference if reference[name].numel()]
    same_bits = all(torch.equal(first["weights"][name], reference[name]) for name in reference)
    row = {
        "system": system if system == "DDP" else f"stage {system}", "numel": first["numel"],
        "loss": sum(r["loss"] for r in ranks) / len(ranks), "held_out": first["held_out"],
        "same_bits_as_stage_0": same_bits, "largest_difference": max(differences),
        "resident_bytes": max((r["resident"] for r in ranks), key=lambda d: sum(d.values())),
        "peak_bytes": max(r["peak"] for r in ranks),
        "sent_bytes_per_step": first["sent"], "counted_by_kernel": first["counted"],
        "seconds_per_step": first["seconds"], "promises": {},
    }
    stage = 0 if system == "DDP" else system
    sizes = first["unit_sizes"] or first["numel"]
    states = (torch.float32,) * STATES[optimizer]
    formulas = [memory.model_states(sizes, world_size, stage, rank=rank, optimizer_dtypes=states)
                for rank in range(world_size)]
    row["formula_bytes"] = max(formulas, key=lambda d: sum(d.values()))
    padded = formulas[0]["parameters"] * (world_size if stage == 3 else 1)
    row["formula_sent_bytes"] = SENT_PSI[system] * padded * (world_size - 1) // world_size
    if system != "DDP":
        row["promises"] = {
            "all ranks end with the same weights": len({r["digest"] for r in ranks}) == 1,
            "the weights are those of stage 0, bit for bit": same_bits,
            "resident bytes are those of the formula on every rank":
                [r["resident"] for r in ranks] == formulas,
            "bytes sent are those of the formula on every rank":
                all(r["sent"] == row["formula_sent_bytes"] for r in ranks),
        }
    return row


def print_report(report: dict[str, Any]) -> None:
    """The two tables, on stdout."""
    console = Console(width=None if sys.stdout.isatty() else 96, highlight=False)
    n = report["world_size"]
    console.print(f"{report['task']}: Ψ = {report['parameters']:,} parameters in fp32, N = {n} "
                  f"ranks on {report['device']}\n{report['optimizer']}, {report['steps']} steps of "
                  f"{report['batch_size']} samples, torch {report['torch']}\n")
    result = _table("The same training", "l", "", "r", "final loss",
                    "r", f"held-out {report['metric']}", "l", "weights against stage 0",
                    "r", "ms per step")
    cost = _table("What a rank holds and sends, in kB (1 kB = 1000 bytes)", "l", "",
                  "r", "parameters", "r", "gradients", "r", "optimizer", "r", "together",
                  "r", "peak in a step", "r", "sent per step")
    for row in report["systems"]:
        same = "the same bits" if row["same_bits_as_stage_0"] else (
            f"differ by at most {row['largest_difference']:.1e}")
        held_out = (f"{row['held_out']:.1%}" if report["metric"] == "accuracy"
                    else f"{row['held_out']:.4f}")
        result.add_row(row["system"], f"{row['loss']:.4f}", held_out, same,
                       f"{row['seconds_per_step'] * 1e3:.1f}")
        sent, counted = row["sent_bytes_per_step"], row["counted_by_kernel"]
        about = f"≈ {counted / 1e3:,.1f}" if counted is not None else "?"
        cost.add_row(row["system"], *_held(row["resident_bytes"]), _kb(row["peak_bytes"]),
                     about if sent is None else _kb(sent))
        cost.add_row("  formula", *_held(row["formula_bytes"]), "",
                     f"{_kb(row['formula_sent_bytes'])}", style="dim", end_section=True)
    console.print(result)
    console.print()
    console.print(cost)
    console.print("Peak: all tensors, also activations and messages in flight. At stage 3 it "
                  "contains the\nunits of one message; the largest unit has "
                  f"{report['largest_unit']:,} parameters.")
    console.print("Sent, by formula: 2Ψ·(N-1)/N at stages 0, 1, 2 and 3Ψ·(N-1)/N at stage 3, with "
                  "units padded.\n≈: DDP's share of what the kernel counted on the loopback device."
                  "\n")
    failed = report["failed_promises"]
    count = sum(len(row["promises"]) for row in report["systems"])
    if failed:
        console.print(f"{len(failed)} of {count} promises do NOT hold:")
        for promise in failed:
            console.print(f"  {promise}")
    else:
        console.print(f"All {count} promises hold: at every stage and on every rank the weights "
                      "have the bits of stage 0,\nand bytes held and bytes sent are those of the "
                      "formula.")


def _kb(nbytes):
    return f"{nbytes / 1e3:,.1f}"


def _held(states: Mapping[str, float]) -> list[str]:
    return [_kb(states[kind]) for kind in ("parameters", "gradients", "optimizer")] + [
        _kb(sum(states.values()))]


def _table(title, *columns):
    """columns: "l" or "r" for left or right, then the heading, for each."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for letter, heading in zip(columns[::2], columns[1::2]):
        table.add_column(heading, justify={"l": "left", "r": "right"}[letter])
    return table
