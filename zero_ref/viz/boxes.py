"""What lies in which file of a checkpoint."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..checkpoint import folder
from ..checkpoint.loading import Source
from .palette import INK, PARAMETERS, tint
from .picture import Picture


def boxes(checkpoint: str | Path, names: Sequence[str]) -> Picture:
    """Draw tensors of a checkpoint's model, each box with the name of its file. Boxes of one rank
    have one colour. Raises ValueError for a tensor of more than two dimensions."""
    with ExitStack() as opened:
        shards = Source(folder.newest(Path(checkpoint)), opened).parts["model"]
        parts = {name: (shards.listed[name][1], shards.boxes_of(name)) for name in names}
    heights = [max(2, [1, 1, *shape][-2]) for shape, _ in parts.values()]
    figure = Figure(figsize=(9, 0.5 * len(parts) + 0.17 * sum(heights)), layout="constrained",
                    dpi=150)
    axes = figure.subplots(len(parts), 1, squeeze=False, height_ratios=heights).flatten()
    for ax, (name, (shape, found)) in zip(axes, parts.items()):
        if len(shape) > 2:
            raise ValueError(f"{name!r} has {len(shape)} dimensions: two can be drawn")
        rows, columns = [1, 1, *shape][-2:]
        for box, file in found:
            row, column = [0, 0, *box.offsets][-2:]
            high, wide = [1, 1, *box.sizes][-2:]
            odd = int(file.removeprefix("rank").split("-")[0]) % 2
            colour = tint(PARAMETERS, 0.25 if odd else 0.6)
            ax.add_patch(Rectangle((column, row), wide, high, edgecolor=INK, linewidth=0.8,
                                   facecolor=colour))
            ax.text(column + wide / 2, row + high / 2, file, ha="center", va="center", fontsize=7)
        ax.set(xlim=(0, columns), ylim=(rows, 0), xticks=[0, columns], yticks=[0, rows])
        ax.set_title(f"{name}, {tuple(shape)}", fontsize=8, loc="left")
        ax.tick_params(labelsize=7)
    described = [f"{name}: " + ", ".join(
        f"{file} has {tuple(box.sizes)} at {tuple(box.offsets)}" for box, file in found)
        for name, (_, found) in parts.items()]
    return Picture(figure, "\n".join(described))
