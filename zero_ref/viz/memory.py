"""Bytes of model states from one event of a step to the next."""

from collections.abc import Mapping
from itertools import pairwise

from matplotlib.figure import Figure

from ..observe.recorder import COMPUTED, Recording
from .palette import COMMUNICATION, INK, KINDS, bytes_text
from .picture import Picture

_LINES = ["-", "--", "-.", ":"]


def memory_over_step(*recordings: Recording, formula: Mapping[int, int] | None = None) -> Picture:
    """Stacked bytes of parameters, gradients and optimizer states, a panel for each Recording, all
    to one scale: give those of one rank at several stages, for instance. Several are laid over one
    another in a last panel.

    formula: {stage: bytes at rest} to draw as a line; by default none. Activations and messages
    in flight are not model states, and so not in the picture. Raises ValueError for no recording or
    more than four.
    """
    if not 1 <= len(recordings) <= len(_LINES):
        raise ValueError(f"{len(recordings)} recordings to draw: give at least one and at most "
                         f"{len(_LINES)}")
    together = len(recordings) > 1
    figure = Figure(figsize=(9, 3.2), layout="constrained", dpi=150)
    panels = figure.subplots(1, len(recordings) + together, sharey=True, squeeze=False)[0]
    largest = max(sum(f.bytes.values()) for r in recordings for f in r.frames)
    unit, name = (1e6, "MB") if largest >= 1e7 else (1e3, "kB") if largest >= 1e4 else (1, "bytes")
    text = []
    for ax, recording in zip(panels, recordings):
        text.append(_draw(ax, recording, unit, largest / unit, formula))
    panels[0].set_ylabel(f"{name} held by rank {recordings[0].rank}")
    handles, labels = panels[0].get_legend_handles_labels()
    ticks = panels[0].plot([], [], color=COMMUNICATION, linewidth=2)
    figure.legend([*handles, *ticks], [*labels, "a collective"], loc="outside lower center",
                  ncols=5, frameon=False, fontsize=9)
    if together:
        ax = panels[-1]
        for i, recording in enumerate(recordings):
            total = [sum(f.bytes.values()) / unit for f in recording.frames]
            ax.step(_moments(recording), total, where="post", color=INK, linewidth=1.2,
                    linestyle=_LINES[i % 4], label=f"stage {recording.stage}")
        ax.legend(title="all together", frameon=False, fontsize=8, ncols=2, loc="lower left",
                  bbox_to_anchor=(-0.05, 1), borderpad=0, handlelength=1.6, columnspacing=0.8,
                  alignment="left", title_fontsize=10)
        _tidy(ax, 1)
    return Picture(figure, "\n".join(text))


def _draw(ax, recording, unit, tallest, formula):
    frames = recording.frames
    stacked = [[f.bytes[kind] / unit for f in frames] for kind in reversed(KINDS)]
    ax.stackplot(range(len(frames)), stacked, colors=list(reversed(KINDS.values())), step="post",
                 labels=list(reversed(KINDS)))
    total = [sum(f.bytes.values()) for f in frames]
    rest, peak = total[0], max(total)
    at = total.index(peak)
    title = f"stage {recording.stage}\nat rest {bytes_text(rest)}\n"
    if peak > rest:
        ax.plot(at, peak / unit, marker="v", color=INK, markersize=7, clip_on=False)
        title += f"▼ peak {bytes_text(peak)}"
    else:
        title += "at the peak the same"
    for i, frame in enumerate(frames):
        if frame.wire_bytes:
            ax.plot([i, i], [-0.035 * tallest, 0], color=COMMUNICATION, linewidth=2)
    if formula is not None:
        ax.axhline(formula[recording.stage] / unit, color=INK, linewidth=1.2, linestyle="--",
                   label="formula, at rest")
    ax.set_title(title, fontsize=10, loc="left")
    ax.set_ylim(-0.035 * tallest, tallest * 1.04)
    _tidy(ax, len(frames) - 1)
    return (f"stage {recording.stage}: {bytes_text(rest)} at rest, {bytes_text(peak)} at the peak "
            f"({frames[at].what} {frames[at].unit}".rstrip() + ")")


def _tidy(ax, right):
    ax.set_xlim(0, right)
    ax.set_xticks([])
    ax.set_xlabel("events of the step", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)


def _moments(recording):
    """Each frame's place between 0 and 1, the same for what all stages compute."""
    computed = [i for i, f in enumerate(recording.frames) if f.what in COMPUTED]
    places = []
    for k, (here, following) in enumerate(pairwise(computed)):
        places += [k + j / (following - here) for j in range(following - here)]
    return [place / (len(computed) - 1) for place in [*places, len(computed) - 1]]
