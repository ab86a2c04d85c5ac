"""The picture of a `zero-ref bench` report."""

from matplotlib.figure import Figure

from . import COMMUNICATION, INK, PADDING

OURS = "stage"  # how the names of this project's systems begin


def draw(report):
    """report: what `zero_ref.bench.bench` returned. Returns a matplotlib Figure.

    A panel per model and world size: time per step of each system beside DDP's in the same round,
    median and range. With several models at one world size, a last panel shows the step time
    against the number of parameters.
    """
    parts = report["parts"]
    world_size = parts[0]["world_size"]
    sizes = [part for part in parts if part["world_size"] == world_size]
    panels = len(parts) + (len(sizes) > 1)
    figure = Figure(figsize=(4.6 * panels + 1.6, 5.2), layout="constrained", dpi=130)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for i, (ax, part) in enumerate(zip(axes, parts)):
        _ratios(ax, part, names=i == 0)
    if len(sizes) > 1:
        _times(axes[-1], sizes)
    figure.suptitle(f"Time per training step, {report['machine']}, torch {report['torch']}, "
                    f"{report['rounds']} rounds", x=0.01, ha="left", weight="bold")
    return figure


def _ratios(ax, part, names):
    rows = [row for row in part["systems"] if row["system"] != "DDP"]
    for y, row in enumerate(rows):
        ours = row["system"].startswith(OURS)
        colour = COMMUNICATION if ours else INK
        ax.plot([row["least"], row["most"]], [y, y], color=colour, linewidth=2, alpha=0.5)
        ax.plot(row["ratio"], y, "o" if ours else "s", color=colour, markersize=8 if ours else 6)
        ax.annotate(f"{row['ratio']:.2f}", (row["most"], y), xytext=(6, 0), va="center",
                    textcoords="offset points", color=INK)
    ax.axvline(1, color=PADDING, linewidth=1)
    ax.set_yticks(range(len(rows)), [row["system"] for row in rows] if names else [])
    ax.set_xlim(0.3, max(row["most"] for row in rows) * 1.15)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel("time per step / DDP's (grey line); range over rounds")
    ax.set_title(f"{part['numel'] / 1e6:.0f} M parameters, {part['world_size']} ranks", loc="left")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)


def _times(ax, parts):
    x = [part["numel"] / 1e6 for part in parts]
    by_system = {row["system"]: [] for row in parts[0]["systems"]}
    for part in parts:
        for row in part["systems"]:
            by_system[row["system"]].append(row["seconds"] * 1e3)
    ends = sorted(by_system, key=lambda system: by_system[system][-1])
    for system, ms in by_system.items():
        colour = COMMUNICATION if system.startswith(OURS) else INK
        ax.loglog(x, ms, "o-" if system.startswith(OURS) else "s--", color=colour, markersize=4,
                  linewidth=1.5, alpha=0.8)
    # The names, evenly spaced in the order in which the lines end.
    low, high = min(map(min, by_system.values())), max(map(max, by_system.values()))
    for i, system in enumerate(ends):
        y = low * (high / low) ** (0.25 + 0.75 * i / max(1, len(ends) - 1))
        ax.annotate(system, (x[-1], by_system[system][-1]), xytext=(x[-1] * 1.5, y), va="center",
                    textcoords="data", color=COMMUNICATION if system.startswith(OURS) else INK,
                    arrowprops={"arrowstyle": "-", "color": PADDING, "linewidth": 0.6},
                    annotation_clip=False, fontsize=9)
    ax.set_xlim(x[0] * 0.8, x[-1] * 9)
    ax.set_xticks(x, [f"{value:.0f} M" for value in x])
    ax.minorticks_off()
    ax.set_yticks([100, 200, 500, 1000, 2000], ["100", "200", "500", "1,000", "2,000"])
    ax.set_ylim(low * 0.85, high * 1.15)
    ax.set_xlabel(f"parameters, {parts[0]['world_size']} ranks")
    ax.set_title("ms per step", loc="left")
    ax.spines[["top", "right"]].set_visible(False)
