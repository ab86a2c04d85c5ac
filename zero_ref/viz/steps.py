"""A recorded step, one event at a time: what every rank holds of every unit."""

from collections.abc import Sequence
from itertools import groupby, pairwise, takewhile
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..observe.recorder import ABSENT, COMPUTED, EMPTY, IN_FLIGHT, OWNED, TEMPORARY, Recording
from .palette import (
    BACKWARD,
    COMMUNICATION,
    FORWARD,
    INK,
    KINDS,
    OPTIMIZER,
    PAPER,
    SHORT,
    bytes_text,
    tint,
)
from .picture import encode, slides

if TYPE_CHECKING:
    import ipywidgets

_MOST_UNITS, _MOST_RANKS = 12, 8
_SAY = {
    "start": "before the step",
    "forward": "unit {unit} runs forward",
    "reshard": "unit {unit} is resharded: all but the own slice is freed",
    "backward": "backward has computed the gradients of unit {unit}",
    "step": "the optimizer updates what it owns",
    "end": "after the step and zero_grad()",
    "all_gather": "all_gather: everyone sends its slice of unit {unit} to everyone",
    "reduce_scatter": "reduce_scatter: each owner gets its slice of the sum of unit {unit}'s "
                      "gradients",
    "all_reduce": "all_reduce: unit {unit}'s gradients are summed for everyone",
    "broadcast": "broadcast: rank 0's {unit}",
}
_RIBBON = {"forward": FORWARD, "backward": BACKWARD, "step": OPTIMIZER}
_LETTER = {"forward": "F", "backward": "B", "step": "S"}


def stepper(recordings: Sequence[Recording], stage0: Sequence[Recording] | None = None,
            start: int | None = None) -> "ipywidgets.VBox":
    """A widget with a slider over the events of one step.

    recordings: one per rank, of 2 to 8 ranks. stage0: the recordings of the same step at stage 0,
        whose bytes are drawn as a dotted line beside these. start: the event that is shown first,
        and in the still picture; default: the first at which the most bytes are held.
    Raises ValueError if the ranks did not go through the same events, or if there is too much to
    draw.
    """
    drawing = StepDrawing([recordings], stage0)
    frames = recordings[0].frames
    if start is None:
        totals = [sum(frame.bytes.values()) for frame in frames]
        start = totals.index(max(totals))
    events = ", ".join(f"{f.what} {f.unit}".rstrip() for f in frames)
    text = f"Stage {recordings[0].stage} on {len(recordings)} ranks, event by event: {events}"
    return slides(drawing.png, len(frames), text, drawing.width, start)


def side_by_side(*stages: Sequence[Recording], start: int | None = None) -> "ipywidgets.VBox":
    """A widget with a slider over the moments that all stages have in common: the forward and the
    backward of each unit, and the optimizer's step.

    stages: for each stage its recordings, one per rank. Raises ValueError as `stepper` does.
    """
    drawing = StepDrawing(list(stages))
    moments = drawing.moments
    if start is None:
        start = next((i for i, m in enumerate(moments) if m[0] == "backward"), 0)
    names = [f"{what} {unit}".rstrip() for what, unit in moments]
    numbers = ", ".join(str(recordings[0].stage) for recordings in stages)
    text = f"Stages {numbers} side by side on {len(stages[0])} ranks: {', '.join(names)}"
    return slides(drawing.png, len(moments), text, drawing.width, start)


class StepDrawing:
    """Draws any moment of a step, at one stage or at several side by side.

    What does not change is drawn once. A new picture is that, with only the cells, bars and words
    drawn over it.
    """

    def __init__(self, stages: Sequence[Sequence[Recording]],
                 stage0: Sequence[Recording] | None = None):
        _check([*stages, stage0] if stage0 else stages)
        self.stages = stages
        self.several = len(stages) > 1
        self.moments, self.position = _moments(stages)
        first = stages[0][0]
        self.ranks, self.units = len(stages[0]), first.units
        reference = stage0 or stages[0]
        self.most_held = max(sum(f.bytes.values()) for s in [*stages, reference] for r in s
                             for f in r.frames)
        self.most_sent = max(f.sent for s in [*stages, reference] for r in s for f in r.frames)
        tall = (0.62 if self.ranks <= 4 else 0.5) * self.ranks
        self.figure = Figure(figsize=(9, tall + (1.6 if self.several else 2.2)), dpi=100)
        self.width = 900
        self.canvas = FigureCanvasAgg(self.figure)
        self.changing = []
        self._draw_what_stays(stage0)
        self.canvas.draw()
        self.background = self.canvas.copy_from_bbox(self.figure.bbox)

    def png(self, moment: int) -> bytes:
        self.canvas.restore_region(self.background)
        self._update(moment)
        for artist in self.changing:
            self.figure.draw_artist(artist)
        return encode(self.canvas)

    # ---- what stays ------------------------------------------------------------------------------

    def _draw_what_stays(self, stage0):
        height = self.figure.get_figheight()
        bottom, top = (0.85 if self.several else 1.35) / height, 1 - 0.62 / height
        tall = top - bottom
        self.title = self._changes(self.figure.text(0.012, 1 - 0.24 / height, "", fontsize=13,
                                                    weight="bold", va="center"))
        self.grids, self.bars, self.notes = [], [], []
        left = 68 / self.width  # whole pixels, see _grid
        if self.several:
            wide = int(0.925 * self.width / len(self.stages)) / self.width
            for i, recordings in enumerate(self.stages):
                place = [left + i * wide, bottom, wide - 18 / self.width, tall]
                ax = self._grid(place, ranks=i == 0)
                ax.set_title(f"stage {recordings[0].stage}", loc="left", fontsize=11)
                self.notes.append(self._changes(ax.text(
                    0, -0.26 / (tall * height), "", transform=ax.transAxes, fontsize=9,
                    va="top")))
        else:
            self._grid([left, bottom, 0.55, tall], ranks=True)
            of = stage0 or []
            held = max((sum(f.bytes.values()) for r in of for f in r.frames[-1:]), default=None)
            sent = max((r.frames[-1].sent for r in of), default=None)
            self._bar_axes([0.655, bottom, 0.19, tall], "held", self.most_held, held)
            self._bar_axes([0.87, bottom, 0.115, tall], "sent so far", self.most_sent, sent)
            self._ribbon([left, 0.52 / height, 0.91, 0.27 / height])
        self._legend(0.01)

    def _grid(self, place, ranks):
        ax = self.figure.add_axes(place)
        n, wide = self.ranks, round(place[2] * self.width) - 2
        ax.set_xlim(-1, wide + 1)  # in pixels
        ax.set_ylim(self.ranks * 4 - 0.6, -0.4)
        gap = wide / len(self.units) / 6
        widths = _widths([unit.padded_numel for unit in self.units],
                         wide - gap * (len(self.units) - 1), 6 * n)
        cells, colours, middles = [], [], []
        self.corners = {}
        left = 0
        for unit, width in zip(self.units, widths):
            step, between = width / n, min(1.5, 0.08 * width / n)
            if 3 < step < 10:  # whole pixels: one more or less would be seen
                step, between = int(step + 1e-6), 1
            for rank in range(n):
                for k, kind in enumerate(KINDS):
                    for s in range(n):
                        x, y = left + s * step, rank * 4 + k
                        z = x + step - between
                        square = [(x, y), (z, y), (z, y + 0.88), (x, y + 0.88)]
                        self.corners[unit.name, rank, kind, s] = square
                        cells.append(square)
                        colours.append(PAPER)
            middles.append(left + width / 2)
            left = round(left + width + gap)
        ax.add_collection(PolyCollection(cells, facecolors=colours), autolim=False)
        changing = [PolyCollection([], linewidths=1.1) for _ in range(3)]
        changing[1].set_hatch("//////")
        for collection in changing:
            ax.add_collection(self._changes(collection), autolim=False)
        self.grids.append(changing)
        names, size = fitting([unit.name for unit in self.units],
                               min((b - a for a, b in pairwise(middles)), default=wide))
        ax.set_xticks(middles, names, fontsize=size)
        ax.set_yticks([r * 4 + 1.4 for r in range(n)], [f"rank {r}" for r in range(n)]
                      if ranks else [""] * n, fontsize=10)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        return ax

    def _bar_axes(self, place, title, most, stage0):
        ax = self.figure.add_axes(place)
        ax.set_xlim(0, most * 1.05 or 1)
        ax.set_ylim(self.ranks * 4 - 0.6, -0.4)
        ax.set_yticks([])
        ax.set_xticks([most], [bytes_text(most)], fontsize=8.5)
        ax.get_xticklabels()[0].set_horizontalalignment("right")
        ax.set_title(title, loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        if stage0:
            ax.axvline(stage0, color=INK, linestyle=":", linewidth=1.3)
            ax.set_xticks([stage0], [f"stage 0\n{bytes_text(stage0)}"], fontsize=8.5)
        bars = self._changes(PolyCollection([]))
        ax.add_collection(bars, autolim=False)
        texts = [self._changes(ax.text(most * 0.03, r * 4 + 2.95, "", va="center", fontsize=8.5))
                 for r in range(self.ranks)]
        self.bars.append((bars, texts))

    def _ribbon(self, place):
        ax = self.figure.add_axes(place)
        frames = self.stages[0][0].frames
        ax.set_xlim(0, len(frames))
        ax.set_ylim(0, 1)
        ax.axis("off")
        room = place[2] * self.width / len(frames)
        for i, frame in enumerate(frames):
            letters = SHORT.get(frame.what) or _LETTER.get(frame.what)
            if letters and len(frames) <= 60:
                self._changes(ax.text(i + 0.48, 0.5, letters, ha="center", va="center", zorder=5,
                                      fontsize=min(8.5, 0.36 * room)))
        start = 0
        for phase, run in groupby(frames, key=lambda frame: frame.phase):
            end = start + len(list(run))
            if phase and (end - start) * room > 7 * len(phase):
                ax.text((start + end) / 2, -0.12, phase, ha="center", va="top", fontsize=9)
            start = end
        squares = [[(i + 0.04, 0), (i + 0.92, 0), (i + 0.92, 1), (i + 0.04, 1)]
                   for i in range(len(frames))]
        self.ribbon = PolyCollection(squares)
        ax.add_collection(self._changes(self.ribbon), autolim=False)
        self.changing.sort(key=lambda artist: artist.zorder)  # the letters last

    def _legend(self, y):
        patches = [Patch(color=colour, label=kind) for kind, colour in KINDS.items()]
        patches += [Patch(color=INK, label="its own"),
                    Patch(color=tint(INK), label="a copy, or not yet summed"),
                    Patch(facecolor="white", edgecolor=INK, label="memory without values"),
                    Patch(facecolor="white", edgecolor=COMMUNICATION, hatch="//////",
                          label="in flight")]
        self.figure.legend(handles=patches, loc="lower center", ncols=7, frameon=False,
                           bbox_to_anchor=(0.5, y - 0.012), fontsize=9, columnspacing=1,
                           handlelength=1.2, handletextpad=0.5)

    def _set_title(self, text):
        self.title.set_text(text)
        self.title.set_fontsize(13)
        wide = self.title.get_window_extent(self.canvas.get_renderer()).width
        self.title.set_fontsize(min(13, 13 * 0.95 * self.width / wide))

    def _changes(self, artist):
        artist.set_animated(True)
        self.changing.append(artist)
        return artist

    # ---- what changes ----------------------------------------------------------------------------

    def _update(self, moment):
        for recordings, positions, grid in zip(self.stages, self.position, self.grids):
            self._update_grid(grid, [r.frames[positions[moment]] for r in recordings])
        if self.several:
            self._update_several(moment)
        else:
            self._update_one(moment)

    def _update_grid(self, grid, frames):
        solid, flying, outlined = [], [], []
        colours, edges, hatched = [], [], []
        for rank, frame in enumerate(frames):
            for unit, held in frame.held.items():
                for kind, letters in held.items():
                    colour = KINDS[kind]
                    for s, letter in enumerate(letters):
                        square = self.corners[unit, rank, kind, s]
                        if letter in (OWNED, TEMPORARY):
                            solid.append(square)
                            colours.append(colour if letter == OWNED else tint(colour))
                        elif letter == IN_FLIGHT:
                            flying.append(square)
                            hatched.append(tint(colour, 0.8))
                        elif letter == EMPTY:
                            outlined.append(square)
                            edges.append(colour)
                        else:
                            assert letter == ABSENT
        grid[0].set(verts=solid, facecolors=colours)
        grid[1].set(verts=flying, facecolors=hatched, edgecolors=COMMUNICATION)
        grid[2].set(verts=outlined, facecolors="white", edgecolors=edges)

    def _update_one(self, moment):
        recordings = self.stages[0]
        frames = [r.frames[moment] for r in recordings]
        (held, held_texts), (sent, sent_texts) = self.bars
        self._set_bars(held, held_texts, [[(frame.bytes[kind], colour)
                                           for kind, colour in KINDS.items()] for frame in frames])
        self._set_bars(sent, sent_texts, [[(frame.sent, COMMUNICATION)] for frame in frames])
        first, last = frames[0], len(recordings[0].frames) - 1
        say = _SAY.get(first.what, first.what + " {unit}").format(unit=first.unit)
        self._set_title(f"Stage {recordings[0].stage}, event {moment} of {last}: {say}")
        colours, edges = [], []
        for i, frame in enumerate(recordings[0].frames):
            colour = COMMUNICATION if frame.what in SHORT else _RIBBON.get(frame.what, PAPER)
            colours.append(colour if i <= moment else tint(colour, 0.65))
            edges.append(INK if i == moment else FORWARD)
        widths = [2.5 if i == moment else 0.6 for i in range(len(colours))]
        self.ribbon.set(facecolors=colours, edgecolors=edges, linewidths=widths)

    def _update_several(self, moment):
        what, unit = self.moments[moment]
        self._set_title(_SAY[what].format(unit=unit).capitalize())
        for recordings, positions, note in zip(self.stages, self.position, self.notes):
            frames = [r.frames[positions[moment]] for r in recordings]
            held = max(sum(frame.bytes.values()) for frame in frames)
            sent = max(frame.sent for frame in frames)
            note.set_text(f"held {bytes_text(held)}, sent {bytes_text(sent)}")

    @staticmethod
    def _set_bars(bars, texts, parts_of_ranks):
        corners, colours = [], []
        for rank, parts in enumerate(parts_of_ranks):
            left = 0
            for width, colour in parts:
                right = left + width
                y, z = rank * 4, rank * 4 + 2.4
                corners.append([(left, y), (right, y), (right, z), (left, z)])
                colours.append(colour)
                left = right
            texts[rank].set_text(bytes_text(left))
        bars.set(verts=corners, facecolors=colours)


def _widths(sizes: Sequence[int], room: float, least: float) -> list[float]:
    """Proportional to the sizes, and `room` in all. Units too small to be seen get `least`, or half
    of what they would have if all were equal."""
    least = min(least, room / len(sizes) / 2)
    widths, left = [0.0] * len(sizes), sum(sizes)
    for i in sorted(range(len(sizes)), key=sizes.__getitem__):
        widths[i] = max(least, room * sizes[i] / left)
        room, left = room - widths[i], left - sizes[i]
    return widths


def fitting(names: Sequence[str], pixels: float) -> tuple[list[str], float]:
    """Names of units that fit into columns of this width, and their font size."""
    heads = zip(*[name.split(".")[:-1] for name in names])
    shared = "".join(f"{part[0]}." for part in takewhile(lambda part: len(set(part)) == 1, heads))
    names = [f"unit {name}" for name in names] if not shared else [
        name.removeprefix(shared) for name in names]
    longest = max(map(len, names))
    if longest * 6.5 > pixels and not shared:
        names = [name.removeprefix("unit ") for name in names]
        longest = max(map(len, names))
    size = min(9, max(5.5, 9 * pixels / (longest * 6.5)))
    room = max(2, int(pixels / (size * 0.72)))
    return [name if len(name) <= room else "…" + name[-room + 1 :] for name in names], size


def _check(stages):
    for recordings in stages:
        if not 2 <= len(recordings) <= _MOST_RANKS:
            raise ValueError(f"recordings of {len(recordings)} rank(s): the stepper draws 2 to "
                             f"{_MOST_RANKS}")
        units = recordings[0].units
        if len(units) > _MOST_UNITS:
            raise ValueError(f"{len(units)} units: the stepper draws up to {_MOST_UNITS}; wrap the "
                             "model with larger units=")
        events = [(f.what, f.unit) for f in recordings[0].frames]
        for r in recordings:
            theirs = [(f.what, f.unit) for f in r.frames]
            if theirs != events:
                at = next((i for i, (a, b) in enumerate(zip(events, theirs)) if a != b),
                          min(len(events), len(theirs)))
                raise ValueError(f"ranks {recordings[0].rank} and {r.rank} went through different "
                                 f"events, from number {at} on: record the same step on all ranks")
            if r.units != units or r.units != stages[0][0].units:
                raise ValueError("the recordings are of differently partitioned models")


def _moments(stages):
    """What the slider stops at, and for each stage at which frames that is."""
    if len(stages) == 1:
        frames = stages[0][0].frames
        return [(f.what, f.unit) for f in frames], [list(range(len(frames)))]
    positions = [[i for i, f in enumerate(recordings[0].frames) if f.what in COMPUTED]
                 for recordings in stages]
    moments = [[(r[0].frames[i].what, r[0].frames[i].unit) for i in where]
               for r, where in zip(stages, positions)]
    if any(m != moments[0] for m in moments):
        raise ValueError("the stages did not compute the same: record the same step of the same "
                         "model at each")
    return moments[0], positions
