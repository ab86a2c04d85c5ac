"""The picture of a `zero-ref bench` report."""

from typing import Any

from matplotlib.figure import Figure

from .palette import INK

GREY = "#777777"


def draw(report: dict[str, Any]) -> Figure:
    """report: what `zero_ref.commands.bench.bench` returned. Returns a matplotlib Figure.

    A panel per model and world size: time per step of each system over DDP's in the same round,
    median and range. With several models at one world size, a last panel shows the step time
    against the number of parameters. This project's stages are filled circles, black.
    """
    parts = report["parts"]
    world_size = parts[0]["world_size"]
    sizes = [part for part in parts if part["world_size"] == world_size]
    panels = len(parts) + (len(sizes) > 1)
    lines = -(-panels // 2)
    height = 0.9 + 0.3 * len(parts[0]["systems"])
    figure = Figure(figsize=(10, 0.4 + height * lines), layout="constrained", dpi=150)
    axes = figure.subplots(lines, min(2, panels), squeeze=False).flatten()
    for i, (ax, part) in enumerate(zip(axes, parts)):
        _ratios(ax, part, names=i % 2 == 0)
    if len(sizes) > 1:
        _times(axes[panels - 1], sizes)
    for ax in axes[panels:]:
        ax.set_visible(False)
    figure.suptitle(f"Time per training step, {report['machine']}, torch {report['torch']}, "
                    f"{report['rounds']} rounds", x=0.01, ha="left", weight="bold")
    return figure


def _ratios(ax, part, names):
    rows = [row for row in part["systems"] if row["system"] != "DDP"]
    for y, row in enumerate(rows):
        ax.plot([row["least"], row["most"]], [y, y], color=_colour(row["system"]), linewidth=1.5)
        ax.plot(row["ratio"], y, **_marker(row["system"]), markersize=8)
        ax.annotate(f"{row['ratio']:.2f}", (row["most"], y), xytext=(9, 0), va="center",
                    textcoords="offset points", color=INK,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    ax.axvline(1, color=GREY, linewidth=1, zorder=0)
    ax.set_yticks(range(len(rows)), [row["system"] for row in rows] if names else [])
    ax.set_xlim(0.3, max(row["most"] for row in rows) * 1.15)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel("time per step over DDP's (line); range over rounds")
    ranks = f"{part['world_size']} rank{'s' * (part['world_size'] > 1)}"
    ax.set_title(f"{_size(part['numel'])} parameters, {ranks}", loc="left")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)


def _times(ax, parts):
    x = [part["numel"] / 1e6 for part in parts]
    by_system: dict[str, list[float]] = {row["system"]: [] for row in parts[0]["systems"]}
    for part in parts:
        for row in part["systems"]:
            by_system[row["system"]].append(row["seconds"] * 1e3)
    ends = sorted(by_system, key=lambda system: by_system[system][-1])
    for system, ms in by_system.items():
        ax.loglog(x, ms, "-" if _ours(system) else "--", **_marker(system), markersize=5,
                  color=_colour(system), linewidth=1.2)
    # The names, evenly spaced in the order in which the lines end.
    low, high = min(map(min, by_system.values())), max(map(max, by_system.values()))
    for i, system in enumerate(ends):
        y = low * (high / low) ** (0.25 + 0.75 * i / max(1, len(ends) - 1))
        ax.annotate(system, (x[-1], by_system[system][-1]), xytext=(x[-1] * 1.5, y), va="center",
                    textcoords="data", color=_colour(system),
                    arrowprops={"arrowstyle": "-", "color": _colour(system), "linewidth": 0.5,
                                "relpos": (0, 0.5)},
                    annotation_clip=False, fontsize=9)
    ax.set_xlim(x[0] * 0.8, x[-1] * 9)
    ax.set_xticks(x, [_size(part["numel"]) for part in parts])
    ax.minorticks_off()
    ax.set_yticks(ticks := [10, 30, 100, 300, 1000, 3000], [f"{ms:,}" for ms in ticks])
    ax.set_ylim(low * 0.85, high * 1.15)
    ax.set_xlabel(f"parameters, {parts[0]['world_size']} ranks")
    ax.set_title("ms per step", loc="left")
    ax.spines[["top", "right"]].set_visible(False)


def _size(numel):
    return f"{numel / 1e6:.0f} M" if numel >= 1e6 else f"{numel / 1e3:.0f} k"


def _ours(system):
    return system.startswith("stage")


def _colour(system):
    return INK if _ours(system) else GREY


def _marker(system):
    return {"marker": "o" if _ours(system) else "s", "markeredgecolor": _colour(system),
            "markerfacecolor": INK if _ours(system) else "white"}
