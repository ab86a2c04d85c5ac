"""When each rank computed, communicated and waited."""

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..observe.recorder import Recording
from .palette import BACKWARD, COMMUNICATION, FORWARD, INK, OPTIMIZER, SHORT
from .picture import Picture

_PHASES = {"forward": FORWARD, "backward": BACKWARD, "step": OPTIMIZER}
_HATCHES = {"all_gather": None, "reduce_scatter": "////", "all_reduce": "xxxx",
            "broadcast": "...."}


def timeline(recordings: Sequence[Recording]) -> Picture:
    """Lanes for each rank, what it computes above what it communicates, in milliseconds.

    recordings: one per rank, of ranks on one machine (which share a clock).
    """
    began = min(r.frames[0].time for r in recordings)
    figure = Figure(figsize=(9, 1.1 + 0.75 * len(recordings)), layout="constrained", dpi=150)
    ax = figure.subplots()
    ticks = []
    for row, r in enumerate(recordings):
        y = 2.4 * row
        ticks += [(y + 0.4, f"rank {r.rank}  computes"), (y + 1.3, "communicates")]
        for span in r.spans:
            _bar(ax, began, span.start, span.end, y, 0.8, color=_PHASES[span.phase])
        for event in r.events:
            if event.end is None:  # the step failed while it was in flight
                continue
            half = 0 if event.op == "all_gather" else 0.4  # two kinds may be in flight at once
            _bar(ax, began, event.start, event.end, y + 0.9 + half, 0.38, facecolor=COMMUNICATION,
                 hatch=_HATCHES.get(event.op), edgecolor="white", linewidth=0.5)
            if event.awaited is not None and event.end > event.awaited:
                _bar(ax, began, event.awaited, event.end, y + 0.1, 0.6, facecolor="white",
                     edgecolor=INK, linewidth=0.6, zorder=3)
    ax.set_yticks(*zip(*ticks), fontsize=9)
    ax.invert_yaxis()
    ax.set_xlabel("milliseconds from the start of the step")
    ax.set_xlim(0)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    used = {event.op for r in recordings for event in r.events}
    legend = [Patch(color=colour, label=phase) for phase, colour in _PHASES.items()]
    legend += [Patch(facecolor="white", edgecolor=INK, label="waits")]
    legend += [Patch(facecolor=COMMUNICATION, edgecolor="white", hatch=_HATCHES.get(op), label=op)
               for op in _HATCHES if op in used]
    figure.legend(handles=legend, loc="outside upper left", ncols=7, frameon=False, fontsize=9)
    first = recordings[0]
    return Picture(figure, f"Timeline of a step at stage {first.stage} on {len(recordings)} ranks, "
                           f"{'overlapped' if first.overlap else 'not overlapped'}: "
                           f"{len(first.events)} collectives per rank")


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


def _bar(ax, began, start, end, y, height, **style):
    ax.broken_barh([((start - began) * 1e3, (end - start) * 1e3)], (y, height), **style)
