"""The picture of a `zero-ref compare` report."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from .palette import COMMUNICATION, INK, KINDS, PADDING, bytes_text


def draw(report: Mapping[str, Any]) -> Figure:
    """report: what `zero_ref.compare` returned. Returns a matplotlib Figure.

    For each system what a rank holds between two steps, how far that rises within a step, and what
    it sends per step.
    """
    rows = [row for row in report["systems"] if row["failed"] is None]
    if not rows:
        raise ValueError("there is nothing to draw: every system failed")
    names = [row["system"] for row in rows]
    figure = Figure(figsize=(10, 1.9 + 0.45 * len(rows)), layout="constrained", dpi=150)
    held, sent = figure.subplots(1, 2, width_ratios=[3, 1.3], sharey=True)

    left = [0.0] * len(rows)
    for kind, colour in KINDS.items():
        width = [row["resident_bytes"][kind] for row in rows]
        held.barh(names, width, left=left, color=colour, height=0.62,
                  label={"optimizer": "optimizer states"}.get(kind, kind))
        left = [a + b for a, b in zip(left, width)]
    others = [max(0.0, row["together_bytes"] - states) if row["kind"] == "user" else 0.0
              for row, states in zip(rows, left)]
    if any(others):
        held.barh(names, others, left=left, color=PADDING, height=0.62, label="other tensors")
        left = [a + b for a, b in zip(left, others)]
    rest = [max(0, row["peak_bytes"] - states) for row, states in zip(rows, left)]
    held.barh(names, rest, left=left, color="none", edgecolor=PADDING, hatch="////", linewidth=0.8,
              height=0.62, label="beyond that at the peak: activations, buckets, full units")
    for y, row in enumerate(rows):
        peak = row["peak_bytes"]
        held.annotate(f"{bytes_text(left[y])} → {bytes_text(peak)}", (max(peak, left[y]), y),
                      xytext=(6, 0), textcoords="offset points", va="center", color=INK)
    held.set_xlim(0, max(row["peak_bytes"] for row in rows) * 1.28)
    held.set_title("What a rank holds: after backward → at the peak of a step", loc="left",
                   fontsize=11)
    held.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.04), ncols=4, fontsize=9,
                columnspacing=1.2, handlelength=1.4)
    held.invert_yaxis()

    bytes_sent = [row["sent_bytes_per_step"] or row["counted_by_kernel"] or 0 for row in rows]
    sent.barh(names, bytes_sent, color=COMMUNICATION, height=0.62)
    for y, total in enumerate(bytes_sent):
        known = rows[y]["sent_bytes_per_step"] is not None
        text = bytes_text(total) if known else f"≈ {bytes_text(total)}" if total else "?"
        sent.annotate(text, (total, y), xytext=(6, 0), va="center",
                      textcoords="offset points", color=INK)
    sent.set_xlim(0, max([*bytes_sent, 1]) * 1.5)
    sent.set_title("What it sends per step", loc="left", fontsize=11)

    for axes in (held, sent):
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        axes.tick_params(axis="both", length=0)
        axes.set_xticks([])
    figure.suptitle(f"{report['task']}: {report['numel']:,} parameters, {report['world_size']} "
                    "ranks", x=0.01, ha="left", weight="bold")
    return figure
