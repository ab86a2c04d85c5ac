"""Figure 1 of the ZeRO paper, for any model: memory per rank at each stage."""

from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..observe import memory
from .palette import INK, KINDS
from .picture import Picture, live

if TYPE_CHECKING:
    import ipywidgets

_NAMES = ["stage 0\n(baseline)", "stage 1\n$P_{os}$", "stage 2\n$P_{os+g}$",
          "stage 3\n$P_{os+g+p}$"]


class _Bytes:
    """What `memory.model_states` asks of a dtype."""

    def __init__(self, itemsize: int):
        self.itemsize = itemsize


def figure1(numel: int = 7_500_000_000, world_size: int = 64,
            bytes_per_value: tuple[int, int, int] = (2, 2, 12),
            stage: int | None = None) -> Picture:
    """Bars by `zero_ref.memory.model_states`, which tests hold to what is measured.

    bytes_per_value: of a parameter, its gradient and its optimizer states; the paper's
    mixed-precision Adam is (2, 2, 12), fp32 Adam (4, 4, 8). stage: the one to emphasize.
    """
    rows = [_states(numel, world_size, s, bytes_per_value) for s in range(4)]
    figure = Figure(figsize=(9, 3.1), dpi=100)
    ax = figure.add_axes([0.1, 0.17, 0.88, 0.73])
    unit, name = _unit(sum(rows[0].values()))
    for y, row in enumerate(rows):
        left = 0
        for kind, colour in KINDS.items():
            ax.barh(y, row[kind] / unit, left=left, color=colour, height=0.7,
                    alpha=1 if stage in (None, y) else 0.35)
            left += row[kind] / unit
        ax.annotate(_size(sum(row.values())), (left, y), xytext=(6, 0), va="center", color=INK,
                    textcoords="offset points", weight="bold" if stage == y else "normal")
    ax.set_yticks(range(4), _NAMES)
    ax.invert_yaxis()
    ax.set_xlim(0, sum(rows[0].values()) / unit * 1.14)
    ax.set_xlabel(f"{name} of model states per rank (1 {name} = {unit:,} bytes)")
    ax.legend(handles=[Patch(color=colour, label=kind) for kind, colour in KINDS.items()],
              frameon=False, loc="lower right")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(f"Ψ = {numel:,} parameters, N = {world_size} ranks, bytes per parameter: "
                 f"{' + '.join(map(str, bytes_per_value))}", loc="left", fontsize=11)
    text = "; ".join(f"stage {s}: {_size(sum(row.values()))}" for s, row in enumerate(rows))
    return Picture(figure, f"{numel:,} parameters on {world_size} ranks: {text}")


def explore_figure1(numel: int = 7_500_000_000, world_size: int = 64) -> "ipywidgets.VBox":
    """The same with sliders for parameters, ranks, bytes per value and stage: a widget."""
    import ipywidgets
    from ipywidgets import Layout

    sizes = [int(m * 10**e) for e in range(6, 12) for m in (1, 1.5, 2, 3, 5, 7.5)] + [10**12]
    choices = {
        "parameters Ψ": {n: f"{n:,}" for n in sorted({*sizes, numel})},
        "ranks N": {n: str(n) for n in sorted({*(2**i for i in range(11)), world_size})},
        "bytes per value": {(2, 2, 12): "2 + 2 + 12, mixed precision, Adam",
                            (2, 4, 12): "2 + 4 + 12, gradients in fp32",
                            (4, 4, 8): "4 + 4 + 8, Adam in fp32",
                            (4, 4, 4): "4 + 4 + 4, momentum in fp32"},
        "stage": {stage: str(stage) for stage in range(4)},
    }
    start = numel, world_size, (2, 2, 12), 3
    sliders, rows = [], []
    for (name, options), value in zip(choices.items(), start):
        slider = ipywidgets.SelectionSlider(
            options=[(label, option) for option, label in options.items()], value=value,
            description=name, readout=False, layout=Layout(width="480px"),
            style={"description_width": "120px"})
        label = ipywidgets.Label(layout=Layout(margin="0 0 0 12px"))
        ipywidgets.dlink((slider, "value"), (label, "value"), options.get)
        sliders.append(slider)
        rows.append(ipywidgets.HBox([slider, label]))
    drawn = {}

    def picture():
        key = tuple(slider.value for slider in sliders)
        if key not in drawn:
            drawn[key] = figure1(*key)
        return drawn[key]

    image = ipywidgets.Image(value=picture().png(), format="png", layout=Layout(width="900px"))
    for slider in sliders:
        slider.observe(lambda _: setattr(image, "value", picture().png()), "value")
    return live(rows, image, lambda: picture().png(), picture().text, 900)


def _states(numel, world_size, stage, bytes_per_value):
    parameter, gradient, optimizer = map(_Bytes, bytes_per_value)
    return memory.model_states(numel, world_size, stage, param_dtype=parameter,
                               grad_dtype=gradient, optimizer_dtypes=(optimizer,))


def _size(nbytes):
    unit, name = _unit(nbytes)
    return f"{nbytes / unit:,.2f} {name}"


def _unit(nbytes):
    return next(((u, n) for u, n in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")) if nbytes >= u),
                (1, "bytes"))
