"""The picture of a `zero-ref compare` report."""

from typing import Any

from matplotlib.figure import Figure

from .palette import COMMUNICATION, INK, KINDS


def draw(report: dict[str, Any]) -> Figure:
    """report: what `zero_ref.commands.compare.compare` returned. Returns a matplotlib Figure.

    Bars are measurements; the thin black outlines and lines are the formula's values.
    """
    rows = report["systems"]
    names = [row["system"] for row in rows]
    figure = Figure(figsize=(10, 4.6), layout="constrained", dpi=150)
    held, sent = figure.subplots(1, 2, width_ratios=[3, 2], sharey=True)

    left = [0.0] * len(rows)
    for kind, colour in KINDS.items():
        width = [row["resident_bytes"][kind] / 1e3 for row in rows]
        held.barh(names, width, left=left, color=colour, height=0.62, label=kind)
        left = [a + b for a, b in zip(left, width)]
    formula = [sum(row["formula_bytes"].values()) / 1e3 for row in rows]
    held.barh(names, formula, color="none", edgecolor=INK, height=0.62, label="formula")
    for y, total in enumerate(left):
        held.annotate(f"{total:,.0f}", (total, y), xytext=(5, 0), textcoords="offset points",
                      va="center", color=INK)
    held.set_xlim(0, max(left) * 1.14)
    held.set_title("Model states held per rank, kB", loc="left")
    held.legend(frameon=False, loc="lower right")
    held.invert_yaxis()

    bytes_sent = [(row["sent_bytes_per_step"] or row["counted_by_kernel"] or 0) / 1e3
                  for row in rows]
    sent.barh(names, bytes_sent, color=COMMUNICATION, height=0.62)
    sent.barh(names, [row["formula_sent_bytes"] / 1e3 for row in rows], color="none",
              edgecolor=INK, height=0.62)
    for y, (row, total) in enumerate(zip(rows, bytes_sent)):
        psi = 3 if row["system"] == "stage 3" else 2
        equal = {row["formula_sent_bytes"]: "=", None: "≈"}.get(row["sent_bytes_per_step"], "≠")
        sent.annotate(f"{total:,.0f} {equal} {psi}Ψ·(N−1)/N", (0, y), xytext=(6, 0),
                      textcoords="offset points", va="center", color="black")
    sent.set_title("Sent per rank and step, kB", loc="left")

    for axes in (held, sent):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    same = [row for row in rows if row["system"] != "DDP" and row["same_bits_as_stage_0"]]
    stages = len(rows) - 1
    bits = (f"all {stages} stages end with the same weights, bit for bit" if len(same) == stages
            else f"only {len(same)} of {stages} stages end with the weights of stage 0")
    figure.suptitle(f"{report['task']}, Ψ = {report['parameters']:,} parameters, "
                    f"N = {report['world_size']} ranks: {bits}", x=0.01, ha="left", weight="bold")
    return figure
