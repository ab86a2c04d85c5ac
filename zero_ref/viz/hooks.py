"""Which hook of a stage runs when, and what it does."""

from itertools import groupby

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from ..observe.recorder import ABSENT, Recording
from .palette import (
    BACKWARD,
    COMMUNICATION,
    FORWARD,
    GRADIENTS,
    INK,
    OPTIMIZER,
    PAPER,
    PARAMETERS,
    tint,
)
from .picture import Picture
from .steps import fitting

_WHEN = {
    "_pre_forward": ("model(x)", "unit {unit} is about to run forward"),
    "_post_forward": ("model(x)", "unit {unit} has run forward"),
    "_begin_backward": ("loss.backward()", "autograd has the gradient of the model's output"),
    "_pre_backward": ("loss.backward()", "autograd has the gradient of unit {unit}'s output"),
    "_on_grad": ("loss.backward()", "autograd has accumulated a gradient in unit {unit}"),
    "_post_backward": ("loss.backward()", "autograd has the gradient of unit {unit}'s input"),
    "_finish_backward": ("loss.backward()", "autograd has come to its end"),
    "_after_step": ("optimizer.step()", "the optimizer has updated what it owns"),
}
_COLOURS = {"model(x)": FORWARD, "loss.backward()": BACKWARD, "optimizer.step()": OPTIMIZER}
_DID = {  # the face of its box, and the edge; all others are collectives
    "unshards": (PARAMETERS, PARAMETERS), "reshards": ("white", PARAMETERS),
    "collects": ("white", GRADIENTS), "delivers": (GRADIENTS, GRADIENTS),
    "begins": (PAPER, PAPER), "ends": (PAPER, PAPER)}


def hooks(recording: Recording) -> Picture:
    """A row for each hook of the stage that was called in a recorded step, in the order of the
    calls: when that was, its name, what it did, and whose parameters were there in full after it.

    Of more than two units, the first and the last are shown, and the others only named.
    """
    rows = list(_rows(recording))
    figure = Figure(figsize=(9, 0.24 * (len(rows) + 1.7)), dpi=150)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 9), ylim=(len(rows) - 0.3, -2))
    ax.axis("off")
    names = [unit.name for unit in recording.units]
    squares = {name: 4.5 + 0.14 * i for i, name in enumerate(names)}
    chips = 4.65 + 0.14 * len(names)
    for x, title in ((0.1, "when"), (3.15, "hook"), (chips, "what it does")):
        ax.text(x, -1.2, title, va="center", fontsize=9, weight="bold")
    ax.text(4.5, -1.6, "full now", va="center", fontsize=8)
    for x, name in zip(squares.values(), fitting(names, 14)[0]):
        ax.text(x + 0.06, -0.85, name, va="center", ha="center", fontsize=7)
    for y, (code, when, hook, did, full) in enumerate(rows):
        if not hook:
            ax.text(0.1 if code else 0.3, y, code or when, va="center", fontsize=9 if code else 8,
                    family="monospace" if code else None, weight="bold" if code else None)
            continue
        ax.text(0.3, y, when, va="center", fontsize=8)
        _boxes(ax, y, 3.15, 4.45, [(hook, tint(_COLOURS[code], 0.5), "white")], "monospace")
        _boxes(ax, y, chips, 8.95, [
            (_words(what, units), *_DID.get(what, (COMMUNICATION, COMMUNICATION)))
            for what, units in did])
        for name, x in squares.items():
            ax.add_patch(Rectangle((x, y - 0.36), 0.12, 0.72,
                                   facecolor=PARAMETERS if name in full else PAPER))
    return Picture(figure, "\n".join(
        f"  {hook}: {', '.join(_words(*one) for one in did) or 'nothing'}" if hook else code or when
        for code, when, hook, did, _ in rows))


def _rows(recording):
    """(line of the loop, when, hook, what it did, units that are there in full after it) each."""
    units = [unit.name for unit in recording.units]
    shown = {units[0], units[-1]}
    full = {name for name in units if ABSENT not in recording.frames[0].held[name]["parameters"]}
    last, hidden = "", []
    for (hook, unit), group in groupby(recording.calls, lambda call: (call.hook, call.unit)):
        calls = list(group)
        code, when = _WHEN[hook]
        did = [one for call in calls for one in call.did]
        full |= {name for what, name in did if what == "unshards"}
        full -= {name for what, name in did if what == "reshards"}
        if "{unit}" in when and unit not in shown:
            hidden += [unit] * (unit not in hidden)
            continue
        if hidden:
            yield "", f"⋮ unit{'s' * (len(hidden) > 1)} {', '.join(hidden)}", "", [], set()
            hidden = []
        if code != last:
            yield code, "", "", [], set()
            last = code
        times = f" ×{len(calls)}" if len(calls) > 1 else ""
        joined = [(what, ", ".join(name for _, name in ones))
                  for what, ones in groupby(did, lambda one: one[0])]
        yield code, when.format(unit=unit), hook + times, joined, set(full)


def _words(what, units):
    return f"{what} {units or 'backward'}"


def _boxes(ax, y, left, right, boxes, family=None):
    """Words in boxes, one beside the other. boxes: (text, the face's colour, the edge's) each."""
    widths = [0.063 * len(text) + 0.1 for text, _, _ in boxes]
    scale = min(1, (right - left) / (sum(widths) + 0.06 * len(boxes) or 1))
    for (text, face, edge), width in zip(boxes, widths):
        width *= scale
        ax.add_patch(FancyBboxPatch((left + 0.03, y - 0.34), width - 0.06, 0.68, facecolor=face,
                                    edgecolor=edge, linewidth=0.8,
                                    boxstyle="round,pad=0.02,rounding_size=0.05"))
        ax.text(left + width / 2, y, text, ha="center", va="center", fontsize=7.5 * scale,
                family=family, color="white" if face in (PARAMETERS, COMMUNICATION) else INK)
        left += width + 0.06 * scale
