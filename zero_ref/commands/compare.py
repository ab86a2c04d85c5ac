"""All stages beside torch's DDP and FSDP2, and what ZeRO promises of them, checked."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import MixedPrecision, comm
from ..observe import memory
from ..partition import Layout
from ..ranks import travel
from ..ranks.launch import RankError, launch
from ..tasks.task import Task, adam
from . import measure
from .measure import DDP, FSDP2, Settings, System, UnitFacts
from .probe import probe
from .report import CLOSE, Report
from .systems import WrapLike
from .train import backend_for

IN_FLOAT64 = 3  # steps
ROUNDS = 2  # of timing, after the training: a machine that others use has slower minutes


def compare(build: Callable[[], nn.Module], batch: Callable[[int, int], Any],
            loss: Callable[[nn.Module, Any], Tensor], *,
            optimizer: Callable[..., torch.optim.Optimizer] = adam,
            stages: Sequence[int] = (0, 1, 2, 3), world_size: int = 4, steps: int = 20,
            units: Any = None, mixed_precision: MixedPrecision | None = None,
            systems: Mapping[str, WrapLike] | None = None, device: str = "cpu",
            backend: str | None = None, seed: int = 0) -> Report:
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
        backend: str | None = None, seed: int = 0) -> Report:
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
    if not dist.is_initialized():
        travel.job(measure.measure, (make_task, *others))  # what cannot travel is refused first
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(steps, seed, device, mixed_precision, Path(folder))
        try:
            facts = everywhere(probe, make_task, settings)[0]
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
        settings = replace(settings, unused=frozenset(facts["unused"]), groups=facts["groups"],
                           find_unused=bool(facts["unused"] or sometimes))
        for system in [*ours, DDP, FSDP2, *others]:  # stage 0 first: it is what others are held to
            ranks, reason = None, skipped.get(system.name)
            if reason is None:
                ranks, reason = _attempt(everywhere, measure.measure, make_task, system, settings)
            rows[system.name] = _row(system, ranks, reason, rows.get("stage 0"), facts, settings,
                                     world_size)
        reasons = {row["failed"] for row in rows.values()}
        if len(reasons) == 1 and None not in reasons:
            raise ValueError(f"every system failed: {reasons.pop()}")
        measured = [system for system in (*ours, DDP, FSDP2, *others)
                    if rows[system.name]["failed"] is None]
        for system in ROUNDS * measured:
            ranks, _ = _attempt(everywhere, measure.time_steps, make_task, system, settings)
            if ranks is not None:
                row = rows[system.name]
                row["seconds_per_step"] = min(row["seconds_per_step"], ranks[0])
        in_float64 = replace(settings, steps=min(steps, IN_FLOAT64), mixed_precision=None)
        for system in measured:
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
    facts = {key: value for key, value in facts.items() if key not in ("units", "groups")}
    return Report(facts, world_size=world_size, steps=steps, seed=seed, torch=torch.__version__,
                  float64_steps=in_float64.steps, systems=[rows[name] for name in order],
                  failed_promises=failed)


def _attempt(everywhere, fn, *args):
    """(every rank's answer, None), or (None, why there is none)."""
    try:
        return everywhere(fn, *args), None
    except RankError as error:
        first_line = (error.reason.splitlines() or [""])[0]
        return None, f"{error.kind}: {first_line}"


def _on_ranks_that_are_there(fn, *args):
    """What `launch` does, where torchrun has started the ranks."""
    answer = error = None
    try:
        answer = fn(*args)
    except Exception as exception:
        error = type(exception).__name__, str(exception)
    answers = comm.all_gather_object((answer, error), dist.group.WORLD, phase="report")
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
        "same_on_all_ranks": len({r["digest"] for r in ranks}) == 1,
        "first_difference": first["first_difference"], "difference": first["difference"],
        "float64_difference": None,
        "resident_bytes": max((r["resident"] for r in ranks), key=lambda d: sum(d.values())),
        "together_bytes": max(r["together"] for r in ranks),
        "peak_bytes": max(r["peak"] for r in ranks), "counted_by_kernel": first["counted"],
        "sent_bytes_per_step": max(r["sent"] for r in ranks) if system.kind == "ours" else None,
        "formula_bytes": None, "formula_sent_bytes": None,
    }
    if system.name == "stage 0":
        facts["units"] = [measure.unit_facts(*fields) for fields in first["units"]]
    if system.stage is None or "units" not in facts:
        return row
    ours, named = system.kind == "ours", measure.dtype_named
    state_dtypes = {named(dtype): [*map(named, of_states)]
                    for dtype, of_states in first["state_dtypes"].items()}
    if ours:
        formulas = [formula(facts["units"], world_size, system.stage, rank, state_dtypes,
                            settings.mixed_precision) for rank in range(world_size)]
    else:
        formulas = [formula_of_ddp(facts["units"], state_dtypes)]
    row["formula_bytes"] = max(formulas, key=lambda d: sum(d.values()))
    if facts["once"]:
        row["formula_sent_bytes"] = formula_sent(facts["units"], world_size, system.stage)
    if ours:
        row["promises"] = {
            "all ranks end with the same weights": row["same_on_all_ranks"]}
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
            state_dtypes: Mapping[torch.dtype, Sequence[torch.dtype]],
            mixed_precision: MixedPrecision | None) -> dict[str, int]:
    """`memory.model_states` for a live model, of which parts may be frozen, or never used.

    state_dtypes: of what the optimizer keeps per element, for each dtype of its parameters.
    """
    total = {"parameters": 0, "gradients": 0, "optimizer": 0}
    for unit in units:
        mixed = mixed_precision is not None and unit.master_dtype != unit.dtype
        of_states = state_dtypes.get(unit.master_dtype, ())
        kept = memory.model_states([unit.sizes], world_size, stage, rank=rank,
                                   param_dtype=unit.dtype, grad_dtype=unit.grad_dtype,
                                   optimizer_dtypes=of_states,
                                   mixed_precision=mixed_precision if mixed else None)
        total["parameters"] += kept["parameters"]
        if not unit.frozen:
            total["gradients"] += kept["gradients"]
            total["optimizer"] += kept["optimizer"]
        layout = Layout(unit.sizes, world_size, min(unit.dtype.itemsize, unit.grad_dtype.itemsize))
        for index in unit.unused:  # the optimizer has no states of these
            begin, end = layout.span(index, rank) if stage else (0, unit.sizes[index])
            total["optimizer"] -= (end - begin) * sum(dtype.itemsize for dtype in of_states)
    return total


def formula_of_ddp(units: Sequence[UnitFacts],
                   state_dtypes: Mapping[torch.dtype, Sequence[torch.dtype]]) -> dict[str, int]:
    """The same without padding, and without gradients of what is never used."""
    total = {"parameters": 0, "gradients": 0, "optimizer": 0}
    for unit in units:
        used = sum(size for index, size in enumerate(unit.sizes) if index not in unit.unused)
        total["parameters"] += sum(unit.sizes) * unit.master_dtype.itemsize
        if not unit.frozen:
            total["gradients"] += used * unit.master_dtype.itemsize
            total["optimizer"] += used * sum(
                dtype.itemsize for dtype in state_dtypes.get(unit.master_dtype, ()))
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
