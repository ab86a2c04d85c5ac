"""Bytes held, from one event of a step to the next."""

from collections.abc import Mapping
from itertools import pairwise

from matplotlib.figure import Figure

from ..observe.recorder import COMPUTED, Recording
from .palette import ALL_TENSORS, COMMUNICATION, INK, KINDS, bytes_text
from .picture import Picture

_LINES = ["-", "--", "-.", ":"]


def memory_over_step(*recordings: Recording, formula: Mapping[int, int] | None = None) -> Picture:
    """Stacked bytes of parameters, gradients and optimizer states, a panel for each Recording, all
    to one scale: give those of one rank at several stages, for instance. Above them the line of all
    tensors, if they were recorded. Several are laid over one another in a last panel. Those of one
    stage are told apart by their ranks, or else by their numbers.

    formula: {stage: bytes of model states at rest} to draw as a line; by default none. Raises
    ValueError for no recording or more than four.
    """
    if not 1 <= len(recordings) <= len(_LINES):
        raise ValueError(f"{len(recordings)} recordings to draw: give at least one and at most "
                         f"{len(_LINES)}")
    together = len(recordings) > 1
    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=150)
    panels = figure.subplots(1, len(recordings) + together, sharey=True, squeeze=False)[0]
    largest = max(max(_model_states(r) + _all_tensors(r)) for r in recordings)
    unit, name = (1e6, "MB") if largest >= 1e7 else (1e3, "kB") if largest >= 1e4 else (1, "bytes")
    text, names = [], _names(recordings)
    for ax, recording, title in zip(panels, recordings, names):
        text.append(_draw(ax, recording, title, unit, largest / unit, formula))
    ranks = {recording.rank for recording in recordings}
    panels[0].set_ylabel(f"{name} held by {'a rank' if len(ranks) > 1 else f'rank {ranks.pop()}'}")
    handles, labels = panels[0].get_legend_handles_labels()
    ticks = panels[0].plot([], [], color=COMMUNICATION, linewidth=2)
    figure.legend([*handles, *ticks], [*labels, "a collective"], loc="outside lower center",
                  ncols=6, frameon=False, fontsize=9)
    if together:
        _draw_together(panels[-1], recordings, names, unit)
    return Picture(figure, "\n".join(text))


def _names(recordings):
    """What the recordings are called: by their stages, as far as these differ."""
    names = [f"stage {recording.stage}" for recording in recordings]
    if len({recording.rank for recording in recordings}) > 1:
        names = [f"{name}, rank {recording.rank}" for name, recording in zip(names, recordings)]
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name
            for i, name in enumerate(names)]


def _draw(ax, recording, name, unit, tallest, formula):
    frames = recording.frames
    stacked = [[f.bytes[kind] / unit for f in frames] for kind in reversed(KINDS)]
    ax.stackplot(range(len(frames)), stacked, colors=list(reversed(KINDS.values())), step="post",
                 labels=list(reversed(KINDS)))
    states = _model_states(recording)
    if formula is not None:
        ax.axhline(formula[recording.stage] / unit, color=INK, linewidth=1.2, linestyle="--",
                   label="formula, at rest")
    peak, at = _peak(states)
    said = f"{bytes_text(peak)} of model states at the peak ({_named(frames[at])})"
    peaks = [(INK, "model states", peak, at)]
    if everything := _all_tensors(recording):
        ax.step(range(len(frames)), [n / unit for n in everything], where="post", linewidth=1.6,
                color=ALL_TENSORS, label="all tensors")
        peak, at = _peak(everything)
        said += (f", {bytes_text(peak)} of all tensors at theirs (between {_named(frames[at])} and "
                 f"{_named(frames[at + 1])})")
        peaks = [(ALL_TENSORS, "all tensors", peak, at), *peaks]
    for line, (colour, of, peak, at) in enumerate(peaks):
        ax.plot(at, peak / unit, marker="v", color=colour, markersize=7, clip_on=False)
        ax.annotate(f"▼ {of} {bytes_text(peak)}", (0, 1), xytext=(0, 6 + 13 * line), fontsize=9,
                    color=colour, xycoords="axes fraction", textcoords="offset points")
    for i, frame in enumerate(frames):
        if frame.wire_bytes:
            ax.plot([i, i], [-0.035 * tallest, 0], color=COMMUNICATION, linewidth=2)
    ax.set_title(f"{name}\nat rest {bytes_text(states[0])}", fontsize=10,
                 loc="left", pad=8 + 13 * len(peaks))
    ax.set_ylim(-0.035 * tallest, tallest * 1.04)
    _tidy(ax, len(frames) - 1)
    return f"{name}: {bytes_text(states[0])} at rest, {said}"


def _draw_together(ax, recordings, names, unit):
    for i, recording in enumerate(recordings):
        everything = _all_tensors(recording)
        line = everything or _model_states(recording)
        ax.step(_moments(recording), [n / unit for n in line], where="post", linewidth=1.2,
                color=ALL_TENSORS if everything else INK, linestyle=_LINES[i],
                label=names[i])
    ax.legend(title="all tensors\ntogether" if everything else "all together", frameon=False,
              fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(-0.05, 1), borderpad=0,
              handlelength=1.6, columnspacing=0.8, alignment="left", title_fontsize=10)
    _tidy(ax, 1)


def _model_states(recording):
    return [sum(f.bytes.values()) for f in recording.frames]


def _all_tensors(recording):
    """For each frame but the last, the most bytes from there to the next, and that again."""
    totals = [f.total for f in recording.frames]
    return [] if totals[0] is None else [*totals[1:], totals[-1]]


def _peak(line):
    return max(line), line.index(max(line))


def _named(frame):
    return f"{frame.what} {frame.unit}".rstrip()


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
