"""All stages beside torch's DDP and FSDP2, and what ZeRO promises of them, checked."""

import base64
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .. import MixedPrecision
from ..observe import memory
from ..partition import Layout
from ..ranks.launch import RankError, launch
from ..tasks.task import Task, adam
from ..viz.palette import bytes_text
from . import measure
from .measure import DDP, FSDP2, Settings, System, UnitFacts
from .systems import WrapLike
from .train import backend_for

IN_FLOAT64 = 5  # steps
CLOSE = 1e-9  # the largest difference of any weight after those


def compare(build: Callable[[], nn.Module], batch: Callable[[int, int], Any],
            loss: Callable[[nn.Module, Any], Tensor], *,
            optimizer: Callable[..., torch.optim.Optimizer] = adam,
            stages: Sequence[int] = (0, 1, 2, 3), world_size: int = 4, steps: int = 20,
            units: Any = None, mixed_precision: MixedPrecision | None = None,
            systems: Mapping[str, WrapLike] | None = None, device: str = "cpu",
            backend: str | None = None, seed: int = 0) -> "Report":
    """Train a model of yours with torch DDP, FSDP2 and the stages, and measure them.

    build() returns the module; batch(step, rank) what that rank sees at that step: a tensor, or any
    nest of them; loss(model, batch) a scalar; optimizer(params) a torch.optim.Optimizer, by default
    Adam. units, mixed_precision: see `zero_ref.wrap`. systems: more to compare with, by name, each
    a function like `zero_ref.wrap`: wrap_like(module, stage) returns the model.

    Returns a Report: a dict that shows itself, as text or in a notebook with its picture. Raises
    ValueError for what cannot be trained. Under torchrun, after zero_ref.init(), it is called on
    every rank, and compares on the ranks that are there.
    """
    def make_task():
        return Task("this model", build, batch, loss, optimizer, units)

    return run(make_task, stages, world_size, steps=steps, mixed_precision=mixed_precision,
               systems=systems, device=device, backend=backend, seed=seed)


def run(make_task: Callable[[], Task], stages: Sequence[int], world_size: int, *, steps: int,
        mixed_precision: MixedPrecision | None = None,
        systems: Mapping[str, WrapLike] | None = None, device: str = "cpu",
        backend: str | None = None, seed: int = 0) -> "Report":
    """`compare` with a function that makes the Task, on every rank."""
    if not isinstance(mixed_precision, MixedPrecision | None):
        raise ValueError(f"mixed_precision={mixed_precision!r}: give a zero_ref.MixedPrecision")
    if type(steps) is not int or steps < 2:
        raise ValueError(f"steps={steps}: at least 2, the first only creates the optimizer states")
    if not stages or not {*stages} <= {0, 1, 2, 3}:
        raise ValueError(f"stages={list(stages)}: each must be 0, 1, 2 or 3")
    if dist.is_initialized():
        world_size, everywhere = dist.get_world_size(), _on_ranks_that_are_there
    else:
        backend = backend_for(device, world_size, backend)

        def everywhere(fn, *args):
            return launch(fn, world_size, *args, backend=backend)

    ours = [measure.stage(number) for number in sorted({0, *stages})]
    others = [measure.users(name, wrap_like, number)
              for name, wrap_like in (systems or {}).items() for number in sorted({*stages})]
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(steps, seed, device, mixed_precision, Path(folder))
        try:
            facts = everywhere(measure.probe, make_task, settings)[0]
        except RankError as error:
            if error.kind == "ValueError":
                raise ValueError(error.reason) from None
            raise
        sometimes, skipped = facts["used_on_some_ranks"], {}
        if sometimes:
            skipped["FSDP2"] = (f"{sometimes[0]!r} gets a gradient on some ranks only, and FSDP2's "
                                "ranks would wait for each other")
        if runs := facts["run_on_some_ranks"]:
            skipped["stage 3"] = (f"{runs[0]!r} runs on some ranks only, and at stage 3 all ranks "
                                  "have to run the same units: leave it out of `units`")
        settings = replace(settings, unused=frozenset(facts["unused"]),
                           find_unused=bool(facts["unused"] or sometimes))
        for system in [*ours, DDP, FSDP2, *others]:  # stage 0 first: it is what others are held to
            ranks, reason = None, skipped.get(system.name)
            if reason is None:
                ranks, reason = _attempt(everywhere, measure.measure, make_task, system, settings)
            rows[system.name] = _row(system, ranks, reason, rows.get("stage 0"), facts, settings,
                                     world_size)
        in_float64 = replace(settings, steps=min(steps, IN_FLOAT64), mixed_precision=None)
        for system in [system for system in (*ours, DDP, FSDP2, *others)
                       if rows[system.name]["failed"] is None]:
            ranks, reason = _attempt(everywhere, measure.train, make_task, system, in_float64,
                                torch.float64)
            rows[system.name]["float64_failed"] = reason
            if ranks is not None:
                rows[system.name]["float64_difference"] = ranks[0]["difference"]
    ddp = rows["DDP"].get("float64_difference")
    for row in [rows[system.name] for system in ours]:
        stage = row.get("float64_difference")
        if facts["deterministic"] and ddp is not None and stage is not None:
            row["promises"][f"in float64 the weights are DDP's, within {CLOSE:g}"] = (
                ddp + stage < CLOSE)
    order = ["DDP", "FSDP2", *[name for name in rows if name not in ("DDP", "FSDP2")]]
    failed = [f"{name}: {promise}" for name in order
              for promise, holds in rows[name]["promises"].items() if not holds]
    facts = {key: value for key, value in facts.items() if key != "units"}
    return Report(facts, world_size=world_size, steps=steps, seed=seed, torch=torch.__version__,
                  float64_steps=in_float64.steps, systems=[rows[name] for name in order],
                  failed_promises=failed)


def _attempt(everywhere, fn, *args):
    """(every rank's answer, None), or (None, why there is none)."""
    try:
        return everywhere(fn, *args), None
    except RankError as error:
        return None, f"{error.kind}: {error.reason}"


def _on_ranks_that_are_there(fn, *args):
    """What `launch` does, where torchrun has started the ranks."""
    answer = error = None
    try:
        answer = fn(*args)
    except Exception as exception:
        error = type(exception).__name__, str(exception)
    answers: list = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (answer, error))
    for rank, (_, error) in enumerate(answers):
        if error is not None:
            raise RankError(f"rank {rank} raised {error[0]}: {error[1]}", rank, *error)
    return [answer for answer, _ in answers]


# ---- the verdict ---------------------------------------------------------------------------------


def _row(system: System, ranks: list[dict] | None, reason: str | None, reference: dict | None,
         facts: dict, settings: Settings, world_size: int) -> dict[str, Any]:
    """One system's measurements, and which promises hold. Bytes are those of the rank with most.

    reference: stage 0's row.
    """
    row: dict[str, Any] = {"system": system.name, "kind": system.kind, "failed": reason,
                           "promises": {}, "peak_bytes": None, "seconds_per_step": None,
                           "held_out": None}
    if ranks is None:
        return row
    first = ranks[0]
    row |= {
        "loss": (loss := sum(r["loss"] for r in ranks) / world_size),
        "held_out": loss if first["held_out"] is None else first["held_out"],
        "seconds_per_step": first["seconds"], "digest": first["digest"],
        "same_bits_as_stage_0": first["digest"] is not None
        and first["digest"] == (reference or first).get("digest"),
        "first_difference": first["first_difference"], "difference": first["difference"],
        "float64_difference": None,
        "resident_bytes": max((r["resident"] for r in ranks), key=lambda d: sum(d.values())),
        "together_bytes": max(r["together"] for r in ranks),
        "peak_bytes": max(r["peak"] for r in ranks), "counted_by_kernel": first["counted"],
        "sent_bytes_per_step": max(r["sent"] for r in ranks) if system.kind == "ours" else None,
        "formula_bytes": None, "formula_sent_bytes": None,
    }
    if system.name == "stage 0":
        facts["units"] = first["units"]
    if system.stage is None or "units" not in facts:
        return row
    ours = system.kind == "ours"
    if ours:
        formulas = [formula(facts["units"], world_size, system.stage, rank, first["state_dtypes"],
                            settings.mixed_precision) for rank in range(world_size)]
    else:
        formulas = [formula_of_ddp(facts["units"], first["state_dtypes"])]
    row["formula_bytes"] = max(formulas, key=lambda d: sum(d.values()))
    if facts["once"]:
        row["formula_sent_bytes"] = formula_sent(facts["units"], world_size, system.stage)
    if ours:
        row["promises"] = {
            "all ranks end with the same weights": len({r["digest"] for r in ranks}) == 1}
        if all(r["all_have_states"] for r in ranks):  # the optimizer may hold only some parameters
            row["promises"]["resident bytes are those of the formula on every rank"] = (
                [r["resident"] for r in ranks] == formulas)
        if facts["deterministic"]:
            row["promises"]["the weights are those of stage 0, bit for bit"] = (
                row["same_bits_as_stage_0"])
        if facts["once"]:
            row["promises"]["bytes sent are those of the formula on every rank"] = all(
                r["sent"] == row["formula_sent_bytes"] for r in ranks)
    return row


def formula(units: Sequence[UnitFacts], world_size: int, stage: int, rank: int,
            state_dtypes: Sequence[torch.dtype],
            mixed_precision: MixedPrecision | None) -> dict[str, int]:
    """`memory.model_states` for a live model, of which parts may be frozen, or never used."""
    total = {"parameters": 0, "gradients": 0, "optimizer": 0}
    for unit in units:
        mixed = mixed_precision is not None and unit.master_dtype != unit.dtype
        kept = memory.model_states([unit.sizes], world_size, stage, rank=rank,
                                   param_dtype=unit.dtype, grad_dtype=unit.grad_dtype,
                                   optimizer_dtypes=state_dtypes,
                                   mixed_precision=mixed_precision if mixed else None)
        total["parameters"] += kept["parameters"]
        if not unit.frozen:
            total["gradients"] += kept["gradients"]
            total["optimizer"] += kept["optimizer"]
        layout = Layout(unit.sizes, world_size, min(unit.dtype.itemsize, unit.grad_dtype.itemsize))
        for index in unit.unused:  # the optimizer has no states of these
            begin, end = layout.span(index, rank) if stage else (0, unit.sizes[index])
            total["optimizer"] -= (end - begin) * sum(dtype.itemsize for dtype in state_dtypes)
    return total


def formula_of_ddp(units: Sequence[UnitFacts], state_dtypes: Sequence[torch.dtype]
                   ) -> dict[str, int]:
    """The same without padding, and without gradients of what is never used."""
    total = {"parameters": 0, "gradients": 0, "optimizer": 0}
    for unit in units:
        used = sum(size for index, size in enumerate(unit.sizes) if index not in unit.unused)
        total["parameters"] += sum(unit.sizes) * unit.master_dtype.itemsize
        if not unit.frozen:
            total["gradients"] += used * unit.master_dtype.itemsize
            total["optimizer"] += used * sum(dtype.itemsize for dtype in state_dtypes)
    return total


def formula_sent(units: Sequence[UnitFacts], world_size: int, stage: int) -> int:
    """Bytes that a rank sends per step, buffers aside: 2Ψ·(N-1)/N elements, 3Ψ·(N-1)/N at stage 3,
    with units padded. Each unit is used once."""
    sent = 0
    for unit in units:
        layout = Layout(unit.sizes, world_size, min(unit.dtype.itemsize, unit.grad_dtype.itemsize))
        gradients = 2 if stage == 0 else 1
        parameters = {0: 0, 1: 1, 2: 1, 3: 2}[stage]
        sent += layout.shard_numel * (world_size - 1) * (
            gradients * unit.grad_dtype.itemsize + parameters * unit.dtype.itemsize)
    return sent


# ---- what is shown -------------------------------------------------------------------------------


class Report(dict):
    """What `compare` found: settings, a dict per system in "systems", and "failed_promises".

    Shows itself: `print(report)` as text, in a notebook with its picture.
    """

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=100, highlight=False, markup=False, emoji=False)
        _print(self, console)
        return "\n".join(map(str.rstrip, console.file.getvalue().rstrip().splitlines()))

    __repr__ = __str__

    def figure(self):
        """The picture, a matplotlib Figure."""
        from ..viz.compare import draw

        return draw(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from html import escape

        file = io.BytesIO()
        self.figure().savefig(file, dpi=100)
        picture = base64.b64encode(file.getvalue()).decode()
        return {"text/plain": str(self),
                "text/html": f'<pre style="line-height: 1.2">{escape(str(self))}</pre>'
                             f'<img src="data:image/png;base64,{picture}">'}


def _print(report, console):
    rows, n = report["systems"], report["world_size"]
    measured = [row for row in rows if row["failed"] is None]
    console.print(f"{report['task']}: Ψ = {report['numel']:,} parameters, N = {n} ranks on "
                  f"{report['device']}\n{report['steps']} steps, {report['optimizer']}, torch "
                  f"{report['torch']}\n")
    metric = report["metric"]  # None: nothing is held out
    result = _table("The same training", "", "loss", *[f"held-out\n{metric}"] * bool(metric),
                    "ms per\nstep", "after\n1 step", f"after\n{report['steps']}",
                    f"in float64,\nafter {report['float64_steps']}")
    for row in rows:
        if row["failed"] is not None:
            result.add_row(row["system"], "failed")
            continue
        differences = [row["first_difference"], row["difference"], row["float64_difference"]]
        held_out = f"{row['held_out']:.1%}" if metric == "accuracy" else f"{row['held_out']:.4f}"
        result.add_row(row["system"], f"{row['loss']:.4f}", *[held_out] * bool(metric),
                       f"{row['seconds_per_step'] * 1e3:.1f}", *map(_difference, differences))
    console.print(result)
    console.print("The last three columns: the largest difference of any weight from stage 0's.")
    for sentence in [*_about_differences(rows), ""]:
        console.print(sentence)
    if report["mixed_precision"]:
        console.print("DDP computes in the module's own precision, so its weights differ from "
                      "those of the others.\n")
    unit = 1e6 if max((row["peak_bytes"] for row in measured), default=0) > 1e7 else 1e3
    name = "MB (1 MB = 1,000,000 bytes)" if unit == 1e6 else "kB (1 kB = 1000 bytes)"
    cost = _table(f"What a rank holds and sends, in {name}", "", "parameters", "gradients",
                  "optimizer", "total", "peak in\na step", "sent per\nstep")
    for row in measured:
        sent, counted = row["sent_bytes_per_step"], row["counted_by_kernel"]
        about = "?" if counted is None else f"≈ {counted / unit:,.1f}"
        whole = row["together_bytes"] if row["kind"] == "user" else None
        cost.add_row(row["system"], *held(row["resident_bytes"], unit, whole),
                     f"{row['peak_bytes'] / unit:,.1f}",
                     about if sent is None else f"{sent / unit:,.1f}")
        if row["formula_bytes"] is not None:
            sent = row["formula_sent_bytes"]
            cost.add_row("  formula", *held(row["formula_bytes"], unit), "",
                         "" if sent is None else f"{sent / unit:,.1f}", style="dim")
        cost.add_section()
    console.print(cost)
    console.print("Total: after backward, before the optimizer's step. Peak: all tensors of a "
                  "step, activations and\nfull units included. Sent, by formula: 2Ψ·(N-1)/N at "
                  "stages 0 to 2, 3Ψ·(N-1)/N at stage 3, with\npadded units. ≈: by the kernel's "
                  "count.\n")
    for row in rows:
        if row["failed"] is not None:
            console.print(f"{row['system']} failed: {row['failed']}\n", soft_wrap=True)
        elif row.get("float64_failed"):
            console.print(f"{row['system']} failed in float64: {row['float64_failed']}\n",
                          soft_wrap=True)
    for sentence in [*what_to_look_at(report), *verdict(report)]:
        console.print(sentence)


def _about_differences(rows):
    others = [row for row in rows if row["failed"] is None and row["kind"] != "ours"
              and row["float64_difference"] is not None]
    same = [row["system"] for row in others if row["float64_difference"] < CLOSE
            and row["difference"]]
    if same:
        yield (f"{' and '.join(same)} sum in another order, which rounds otherwise; the optimizer "
               "turns that into a difference of weights, and it grows from step to step. In "
               "float64, rounding errors are about a billion times smaller, and so are these "
               "differences: it is the same computation.")
    for row in others:
        if row["float64_difference"] >= CLOSE:
            yield (f"{row['system']} differs in float64, too: that is not rounding, but another "
                   "computation.")


def _difference(value):
    return "?" if value is None else "same bits" if value == 0 else f"{value:.1e}"


def held(states: Mapping[str, float], unit: float, total: float | None = None) -> list[str]:
    """Cells of the table: parameters, gradients, optimizer states, and their sum or `total`."""
    values = [states[kind] for kind in ("parameters", "gradients", "optimizer")]
    return [f"{value / unit:,.1f}" for value in (
        *values, sum(values) if total is None else total)]


def _table(title, *headings):
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    return table


def what_to_look_at(report: Mapping[str, Any]) -> list[str]:
    """Sentences about the numbers: what the stages save, what fills the peak, what would help."""
    rows = {row["system"]: row for row in report["systems"] if row["failed"] is None}
    stages = [row for row in rows.values() if row["kind"] == "ours"]
    if "DDP" not in rows or not stages:
        return []
    first, last = rows["DDP"], stages[-1]
    states, peak = sum(last["resident_bytes"].values()), last["peak_bytes"]
    least, sent = stages[0]["sent_bytes_per_step"], last["sent_bytes_per_step"]
    found = [f"What to look at: the peak in a step. It is {bytes_text(first['peak_bytes'])} with "
             f"DDP and {bytes_text(peak)} at {last['system']}"
             + ("." if len(stages) == 1 else f", which sends {bytes_text(sent)} per step"
                + (", as much as stage 0." if sent == least else
                   f" instead of {bytes_text(least)}."))]
    lowest = min(stages, key=lambda row: row["peak_bytes"])
    if lowest is not last:
        found.append(f"The lowest peak is that of {lowest['system']}, "
                     f"{bytes_text(lowest['peak_bytes'])}: what {last['system']} keeps less, it "
                     "gathers within the step.")
    if last["system"] != "stage 3":
        return found
    largest, in_root = report["largest_unit"], report["root_numel"]
    unit_bytes, root_bytes, inside = (numel * report["itemsize"] for numel in (
        largest["numel"], in_root, largest["largest_child"]))
    if in_root == report["numel"]:
        found.append("All parameters belong to the root, so stage 3 gathers the whole model at "
                     "once: name the modules that are to be units in `units`.")
    elif root_bytes > states / 2:
        found.append(f"The root's own parameters, {bytes_text(root_bytes)}, are there in full from "
                     "the beginning of a step to its end"
                     + (". A tied parameter has to belong to a unit that contains all the places "
                        "where it is used." if largest["tied"] else
                        f": as a unit, they would be there only while they compute, and "
                        f"{bytes_text(root_bytes / report['world_size'])} of them otherwise."))
    elif 2 * unit_bytes > (peak - states) / 2 and largest["numel"] > report["numel"] / 10:
        found.append(f"The largest unit, {largest['name']!r} ({largest['kind']}), has "
                     f"{largest['numel'] / report['numel']:.0%} of the parameters. While it "
                     f"computes, its {bytes_text(unit_bytes)} of parameters and as many bytes of "
                     "gradients are held in full; "
                     + (f"if its children were units, the largest would have {bytes_text(inside)}."
                        if 0 < inside < unit_bytes else "it is one layer, so it cannot be split."))
    activations = stages[0]["peak_bytes"] - sum(stages[0]["resident_bytes"].values())
    if activations > states:
        found.append(f"Activations and other temporary tensors take about "
                     f"{bytes_text(activations)} at every stage, more than the "
                     f"{bytes_text(states)} of states at stage 3. Half the samples per rank would "
                     f"take about {bytes_text(activations / 2)}; activation checkpointing takes "
                     "less, too.")
    return found


def verdict(report: Mapping[str, Any]) -> list[str]:
    """Which promises hold, in sentences."""
    failed = report["failed_promises"]
    promises = [promise for row in report["systems"] for promise in row["promises"]]
    found = []
    if not report["deterministic"]:
        found.append("This model is not deterministic: two equal runs of its first step gave "
                     "different gradients,\nso weights could not be compared.")
    if not report["once"]:
        found.append("Some units are frozen, or used more or less than once in a step, so bytes "
                     "sent have no simple\nformula.")
    if report["unused"]:
        found.append(f"{len(report['unused'])} parameters got no gradient, {report['unused'][0]!r} "
                     "for one.")
    if failed:
        found.append(f"{len(failed)} of {len(promises)} promises do NOT hold:")
        found += [f"  {promise}" for promise in failed]
    elif promises:
        found.append(f"All {len(promises)} promises hold, at each stage:")
        found += [f"  {promise}" for promise in dict.fromkeys(promises)]
    return found
