"""Who owns what: flat buffers, their parameters and their slices."""

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..observe.recorder import Layout, Recording
from .palette import INK, OPTIMIZER, PADDING, PARAMETERS, tint
from .picture import Picture


def partition_map(layouts: Sequence[Layout] | Recording) -> Picture:
    """Draw the flat buffers of a model, one below the other, each as wide as it has elements.

    layouts: what `zero_ref.observe.recorder.layout(model)` returned, or a Recording.
    """
    layouts = layouts.units if isinstance(layouts, Recording) else layouts
    if not layouts:
        raise ValueError("no units to draw: the model has no parameters")
    figure = Figure(figsize=(9, 0.55 + 1.15 * len(layouts)), layout="constrained", dpi=150)
    widest = max(unit.padded_numel for unit in layouts)
    for ax, unit in zip(figure.subplots(len(layouts), squeeze=False).flatten(), layouts):
        _draw(ax, unit, widest)
    return Picture(figure, "\n".join(_describe(unit) for unit in layouts))


def _draw(ax, unit, widest):
    size = unit.padded_numel // unit.world_size
    _box(ax, 0, unit.padded_numel, 1, "white", [], widest, hatch="////")  # seen where padding is
    for i, (name, start, shape) in enumerate(zip(unit.names, unit.starts, unit.shapes)):
        end = start + math.prod(shape)
        colour = PARAMETERS if i % 2 == 0 else tint(PARAMETERS, 0.25)
        size_of = f"{end - start:,}"
        names = [name.removeprefix(f"{unit.name}."), name.rsplit(".", 1)[-1]]
        _box(ax, start, end, 1, colour, [*(f"{n}  {size_of}" for n in names), size_of], widest)
    for rank in range(unit.world_size):
        colour = OPTIMIZER if rank % 2 == 0 else tint(OPTIMIZER, 0.25)
        if unit.frozen:
            colour = PADDING if rank % 2 == 0 else tint(PADDING, 0.25)
        labels = [f"rank {rank}: [{rank * size:,}, {(rank + 1) * size:,})", f"rank {rank}",
                  str(rank)]
        _box(ax, rank * size, (rank + 1) * size, 0, colour, labels, widest)
        ax.axvline((rank + 1) * size, color=INK, linestyle=":", linewidth=1)
    padding = unit.padded_numel - unit.numel
    notes = (", frozen: no gradient, no optimizer state" if unit.frozen else "")
    ax.set_title(f"unit {unit.name!r}: {unit.numel:,} elements + {padding} of padding = "
                 f"{unit.world_size} × {size:,}{notes}", loc="left", fontsize=10)
    ax.set_xlim(0, widest)
    ax.set_ylim(-0.05, 2)
    ax.set_yticks([0.45, 1.45], ["slices", "flat buffer"], fontsize=9)
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _box(ax, start, end, y, colour, labels, widest, hatch=None):
    ax.add_patch(Rectangle((start, y), end - start, 0.9, facecolor=colour, hatch=hatch,
                           edgecolor="white" if hatch is None else PADDING))
    for label in labels:  # the longest that fits, with a margin: 115 characters fill the picture
        if (len(label) + 0.1) / 115 < (end - start) / widest:
            ax.text((start + end) / 2, y + 0.45, label, ha="center", va="center", color="white",
                    fontsize=9, zorder=3,  # above the borders of slices
                    bbox={"facecolor": colour, "edgecolor": "none", "pad": 1})
            break


def _describe(unit):
    size = unit.padded_numel // unit.world_size
    parts = [f"{name} {math.prod(shape)}" for name, shape in zip(unit.names, unit.shapes)]
    return (f"unit {unit.name}: {' | '.join(parts)} | padding {unit.padded_numel - unit.numel}; "
            f"{unit.world_size} slices of {size}" + (", frozen" if unit.frozen else ""))
