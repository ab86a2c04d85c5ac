"""What `compare` shows: two tables, and what can be said about their numbers."""

import base64
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..viz.palette import bytes_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLOSE = 1e-9  # what is closer in float64 differs by rounding alone


class Report(dict):
    """What `compare` found: settings, a dict per system in "systems", and "failed_promises".

    Shows itself: `print(report)` as text, in a notebook with its picture.
    """

    def __str__(self) -> str:
        # In a notebook, rich would show at each call what is printed, and write nothing here.
        console = Console(file=io.StringIO(), width=100, highlight=False, markup=False, emoji=False,
                          force_jupyter=False)
        _print(self, console)
        return "\n".join(map(str.rstrip, console.file.getvalue().rstrip().splitlines()))

    __repr__ = __str__

    def figure(self) -> "Figure":
        """The picture, a matplotlib Figure."""
        from ..viz.compare import draw

        return draw(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
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
    for sentence in [*_about_differences(report), ""]:
        console.print(sentence)
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
    for where, key in (("", "failed"), (" in float64", "float64_failed")):
        reasons = defaultdict(list)
        for row in rows:
            if row.get(key):
                reasons[row[key]].append(row["system"])
        for reason, names in reasons.items():
            console.print(f"{_listed(names)} failed{where}: {reason}\n", soft_wrap=True)
    for sentence in [*what_to_look_at(report), *verdict(report)]:
        console.print(sentence)


def _about_differences(report) -> Iterator[str]:
    others = [row for row in report["systems"] if row["failed"] is None and row["kind"] != "ours"]
    for row in others:
        if row["difference"] is None:
            yield (f"The weights of {row['system']} could not be compared: its state_dict() has "
                   "other names or shapes than the module's.")
        if row["kind"] == "user" and not row["same_on_all_ranks"]:
            yield f"The ranks of {row['system']} end with different weights."
    if not report["deterministic"]:
        yield ("Two equal runs of this model's first step gave different gradients, so differences "
               "of weights say nothing here.")
        return
    if report["mixed_precision"] and any(row["system"] == "DDP" for row in others):
        yield ("DDP computes in the module's own precision, so its weights differ from those of "
               "the others.")
        others = [row for row in others if row["system"] != "DDP"]
    compared = [row for row in others if row["float64_difference"] is not None]
    same = [row["system"] for row in compared if row["float64_difference"] < CLOSE
            and row["difference"]]
    if same:
        yield (f"{_listed(same)} {'sums' if len(same) == 1 else 'sum'} in another order, so "
               "rounding differs; the optimizer turns that into a difference of weights, and it "
               "grows from step to step. In float64, rounding errors are about a billion times "
               "smaller, and so are these differences: it is the same computation.")
    for row in compared:
        if row["float64_difference"] >= CLOSE:
            yield (f"{row['system']} differs in float64, too: that is not rounding, but another "
                   "computation.")


def _listed(names):
    """a; a and b; a, b and c."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


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
    peaks = bytes_text(first["peak_bytes"]), bytes_text(peak)
    found = [f"What to look at: the peak in a step. It is {peaks[0]} with DDP and "
             f"{'as much' if peaks[0] == peaks[1] else peaks[1]} at {last['system']}"
             + ("." if len(stages) == 1 else f", which sends {bytes_text(sent)} per step"
                + (", as much as stage 0." if sent == least else
                   f" instead of {bytes_text(least)}."))]
    lowest = min(stages, key=lambda row: row["peak_bytes"])
    if lowest is not last:
        found.append(f"The lowest peak is that of {lowest['system']}, "
                     f"{bytes_text(lowest['peak_bytes'])}: what {last['system']} saves between "
                     "steps, it gathers again within each step.")
    activations = stages[0]["peak_bytes"] - sum(stages[0]["resident_bytes"].values())
    if activations > states:
        kept = report["activations"]
        checkpointed = activations - kept["in_units"] + kept["largest_unit"] + kept["inputs"]
        found.append(f"Activations and other temporary tensors take about "
                     f"{bytes_text(activations)} of the peak at every stage, more than the "
                     f"{bytes_text(states)} of states at {last['system']}; ZeRO does not shard "
                     f"them. Half the samples per rank would take about "
                     f"{bytes_text(activations / 2)}"
                     + (", and with activation checkpointing of each of the "
                        f"{report['unit_count']} units about {bytes_text(checkpointed)} would "
                        "remain." if checkpointed < 0.9 * activations else "."))
    if last["system"] != "stage 3":
        return found
    largest, in_root = report["largest_unit"], report["root_numel"]
    unit_bytes, root_bytes, inside = (numel * report["itemsize"] for numel in (
        largest["numel"], in_root, largest["largest_child"]))
    unit_bytes_text = bytes_text(unit_bytes)
    if in_root == report["numel"]:
        found.append(f"All parameters belong to the root, so stage 3 gathers {unit_bytes_text} of "
                     "them at once: name the modules that are to be units in `units`"
                     + (f"; the largest child of the model has {bytes_text(inside)}."
                        if 0 < inside < unit_bytes else "."))
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
                     f"computes, its {unit_bytes_text} of parameters "
                     + ("are held in full; " if largest["frozen"] else
                        "and as many bytes of gradients are held in full; ")
                     + (f"if its children were units, the largest would have {bytes_text(inside)}."
                        if 0 < inside < unit_bytes else "it is one layer, so it cannot be split."))
    return found


def verdict(report: Mapping[str, Any]) -> list[str]:
    """Which promises hold, in sentences."""
    failed = report["failed_promises"]
    promises = [promise for row in report["systems"] for promise in row["promises"]]
    found = []
    if not report["deterministic"]:
        found.append("This model is not deterministic, so the promises about weights could not be "
                     "checked.")
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
        stages_failed = any(row["failed"] for row in report["systems"] if row["kind"] == "ours")
        found.append(f"All {len(promises)} promises "
                     + ("that could be checked hold:" if stages_failed else "hold, at each stage:"))
        found += [f"  {promise}" for promise in dict.fromkeys(promises)]
    return found
