"""When each rank computed, sent and waited, and for what."""

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..observe.recorder import Recording
from .palette import BACKWARD, COMMUNICATION, FORWARD, INK, LATE, OPTIMIZER, SHORT
from .picture import Picture

_PHASES = {"forward": FORWARD, "backward": BACKWARD, "step": OPTIMIZER}


def timeline(recordings: Sequence[Recording]) -> Picture:
    """Lanes for each rank, in milliseconds: what it computes, and below that each kind of
    collective. Until the last rank has issued the same collective, the others wait for that rank.

    recordings: one per rank, of the same step, on one machine (so that they share a clock).
    """
    began = min(r.frames[0].time for r in recordings)
    ops = list(dict.fromkeys(event.op for r in recordings for event in r.events))
    rows = len(recordings) * (1.9 + len(ops))
    figure = Figure(figsize=(9, 1.1 + 0.26 * rows), layout="constrained", dpi=150)
    ax = figure.subplots()
    lanes, names, y = [], [], 0.0

    def bar(start, end, y, label="", high=0.84, **style):
        left, width = (start - began) * 1e3, (end - start) * 1e3
        ax.broken_barh([(left, width)], (y, high), **style)
        if label:
            text = ax.text(left + width / 2, y + 0.42, label, ha="center", va="center", fontsize=7)
            names.append((text, left, left + width))

    # When the last rank issued each collective: all ranks issue the same ones in the same order.
    issued = [max(event.start for event in together)
              for together in zip(*(r.events for r in recordings))]
    for r in recordings:
        lanes.append((y + 0.5, f"rank {r.rank}  computes"))
        lanes += [(y + 1.7 + i, op) for i, op in enumerate(ops)]
        for span in r.spans:
            bar(span.start, span.end, y, span.unit, facecolor=_PHASES[span.phase],
                edgecolor="white", linewidth=0.6)
        free = dict.fromkeys(ops, began)  # a lane carries out one after the other
        for event, last in zip(r.events, issued):
            if event.end is None:  # the step failed while it was in flight
                continue
            lane, starts = y + 1.3 + ops.index(event.op), max(event.start, free[event.op])
            sends = last if starts < last < event.end else starts
            free[event.op] = event.end
            bar(starts, sends, lane, color=LATE, linewidth=0)
            bar(sends, event.end, lane, event.unit, facecolor=COMMUNICATION, edgecolor="white",
                linewidth=0.6)
            if event.awaited is not None and event.end > event.awaited:
                below, sends = y + 0.84, max(event.awaited, sends)
                bar(event.awaited, sends, below, high=0.3, color=LATE, linewidth=0)
                bar(sends, event.end, below, high=0.3, color=COMMUNICATION, linewidth=0)
                bar(event.awaited, event.end, below, high=0.3, facecolor="none", edgecolor=INK,
                    linewidth=0.8)
        y += 1.9 + len(ops)
    ax.set_yticks(*zip(*lanes), fontsize=9)
    ax.set_ylim(y - 0.7, -0.1)
    ax.set_xlabel("milliseconds from the start of the step")
    ax.set_xlim(0)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    legend = [Patch(color=colour, label=phase) for phase, colour in _PHASES.items()]
    legend += [Patch(color=LATE, label="waits for another rank"),
               Patch(color=COMMUNICATION, label="sends"),
               Patch(facecolor="white", edgecolor=INK, label="the rank stands still")]
    figure.legend(handles=legend, loc="outside upper left", ncols=6, frameon=False, fontsize=9,
                  columnspacing=1.2, handlelength=1.4)
    _keep_what_fits(figure, ax, names)
    first = recordings[0]
    return Picture(figure, f"Timeline of a step at stage {first.stage} on {len(recordings)} ranks, "
                           f"{'overlapped' if first.overlap else 'not overlapped'}: "
                           f"{len(first.events)} collectives per rank")


def _keep_what_fits(figure, ax, names):
    """Remove those names that are wider than their bars."""
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    for text, left, right in names:
        (x0, _), (x1, _) = ax.transData.transform([(left, 0), (right, 0)])
        if text.get_window_extent().width > x1 - x0 - 2:
            text.remove()


def chrome_trace(recordings: Sequence[Recording], path: Path | str) -> None:
    """Write the recordings as a trace file for chrome://tracing or Perfetto: a process per rank,
    a thread for what it computes, one for what it communicates, one for when it waits."""
    began = min(r.frames[0].time for r in recordings)

    def entry(rank, thread, name, start, end, **args):
        return {"ph": "X", "pid": rank, "tid": thread, "name": name, "args": args,
                "ts": (start - began) * 1e6, "dur": (end - start) * 1e6}

    entries = []
    for r in recordings:
        entries.append({"ph": "M", "name": "process_name", "pid": r.rank,
                        "args": {"name": f"rank {r.rank}"}})
        for span in r.spans:
            entries.append(entry(r.rank, "1 computes", f"{span.phase} {span.unit}", span.start,
                                 span.end))
        # Kind of collective -> when the last one ended: bars of a thread may not cross.
        free: dict[str, float] = {}
        for event in r.events:
            if event.end is None:
                continue
            name = f"{SHORT[event.op]} {event.unit}"
            start = max(event.start, free.get(event.op, event.start))
            end = free[event.op] = max(start, event.end)
            # all_gathers and reductions may be in flight at once, which one thread cannot show
            entries.append(entry(r.rank, f"2 {event.op}", name, start, end,
                                 op=event.op, phase=event.phase, bytes=event.bytes,
                                 wire_bytes=event.wire_bytes))
            if event.awaited is not None and event.end > event.awaited:
                entries.append(entry(r.rank, "3 waits", f"for {name}", event.awaited, event.end))
    with open(path, "w") as file:
        json.dump({"traceEvents": entries, "displayTimeUnit": "ms"}, file)

