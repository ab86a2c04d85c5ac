"""What each rank's buffer holds in a collective, round by round."""

from matplotlib.figure import Figure

from .palette import COMMUNICATION, GRADIENTS, INK, PAPER, PARAMETERS, tint
from .picture import Picture

RANKS = 4

Held = dict[tuple[int, int], tuple[int, ...]]  # (rank, slice): whose values are added up there
_SUMS = ("reduce_scatter", "all_reduce")
Messages = list[tuple[int, int, list[int]]]  # sender, receiver, slices


def simulate(op: str) -> list[tuple[Held, Messages]]:
    """What four ranks hold of their buffers' four slices, first before the collective, then after
    each round, with the messages of that round.

    Around a ring, every rank sends one slice to the next rank in each round. The receiver adds its
    own values (reduce_scatter) or has none (all_gather); all_reduce is the one after the other. In
    a broadcast, rank 0 sends its whole buffer to each. Raises ValueError for any other op.
    """
    ranks = range(RANKS)
    if op == "all_gather":
        held: Held = {(rank, s): (rank,) if rank == s else () for rank in ranks for s in ranks}
        return [(held, []), *_carry_out(held, _ring(first=0), adds=False)]
    held = {(rank, s): (rank,) for rank in ranks for s in ranks}
    if op == "broadcast":
        messages = [(0, rank, [*ranks]) for rank in ranks if rank != 0]
        return [(held, []), *_carry_out(held, [messages], adds=False)]
    if op not in _SUMS:
        raise ValueError(f"op={op!r}: must be broadcast, reduce_scatter, all_gather or all_reduce")
    moments = [(held, []), *_carry_out(held, _ring(first=-1), adds=True)]
    if op == "all_reduce":
        moments += _carry_out(moments[-1][0], _ring(first=0), adds=False)
    return moments


def _ring(first: int) -> list[Messages]:
    """The messages of each round. first: rank r begins with slice r + first."""
    return [[(rank, (rank + 1) % RANKS, [(rank + first - k) % RANKS]) for rank in range(RANKS)]
            for k in range(RANKS - 1)]


def _carry_out(held, rounds, adds):
    moments = []
    for messages in rounds:
        before, held = held, dict(held)
        for sender, receiver, slices in messages:
            for s in slices:
                held[receiver, s] = before[sender, s] + (before[receiver, s] if adds else ())
        moments.append((held, messages))
    return moments


def collective(op: str) -> Picture:
    """Four ranks' buffers before a collective and after each of its rounds; arrows are messages.

    op: "broadcast", "reduce_scatter", "all_gather" or "all_reduce". The numbers in a slice are the
    ranks whose values it has, in the order in which they were added.
    """
    moments = simulate(op)
    titles = ["at the start", *(f"after round {k}" for k in range(1, len(moments)))]
    if op == "all_reduce":  # a row for each half, below the start
        rows, columns, size, empty = 3, 3, 7.5, [1, 2]
        titles = [titles[0], *(f"{title}, {half}" for title, half in zip(
            titles[1:], ["reduce_scatter"] * (RANKS - 1) + ["all_gather"] * (RANKS - 1)))]
    else:
        rows, columns, size, empty = -(-len(moments) // 2), 2, 10, []
    figure = Figure(figsize=(9, 0.27 * rows * size + 0.1), layout="constrained", dpi=150)
    figure.get_layout_engine().set(h_pad=0.08)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for i in empty:
        axes[i].remove()
    axes = [ax for i, ax in enumerate(axes) if i not in empty]
    for ax, title, (held, messages) in zip(axes, titles, moments):
        _draw(ax, op, held, messages, size)
        ax.set_title(title, loc="left", fontsize=size + 1)
    return Picture(figure, _describe(op, moments))


def _draw(ax, op, held, messages, size):
    for (rank, s), values in held.items():
        ax.barh(rank, 0.92, 0.6, s, color=_colour(op, values), edgecolor=INK, linewidth=0.5)
        ax.text(s + 0.46, rank, "+".join(map(str, values)), ha="center", va="center", color=INK,
                fontsize=size)
    arrow = {"arrowstyle": "-|>", "color": COMMUNICATION, "lw": size / 5, "shrinkA": 0,
             "shrinkB": 0, "mutation_scale": size}
    for sender, receiver, slices in messages:
        if len(slices) == RANKS:  # the whole buffer, around the others
            ax.annotate("", (RANKS, receiver), (RANKS, sender),
                        arrowprops=arrow | {"connectionstyle": "arc3,rad=-0.35"})
        else:
            x = slices[0] + 0.46
            ax.annotate(f"from rank {sender}" if sender > receiver else "", (x, receiver - 0.3),
                        (x, receiver - 0.8), ha="center", va="center", color=COMMUNICATION,
                        fontsize=size, arrowprops=arrow)
    ax.set(xlim=(-0.1, RANKS + (0.6 if op == "broadcast" else 0)), ylim=(RANKS - 0.5, -1.1))
    ax.set_xticks([s + 0.46 for s in range(RANKS)], [f"slice {s}" for s in range(RANKS)])
    ax.set_yticks(range(RANKS), [f"rank {r}" for r in range(RANKS)])
    ax.tick_params(length=0, labelsize=size)
    ax.spines[:].set_visible(False)


def _colour(op, values):
    if not values:
        return PAPER
    if op in _SUMS:
        return tint(GRADIENTS, 1 - len(values) / RANKS)
    return tint(PARAMETERS, 0.8 if op == "broadcast" and values != (0,) else 0.3)


def _describe(op, moments):
    sent = [sum(len(slices) for _, messages in moments for sender, _, slices in messages
                if sender == rank) for rank in range(RANKS)]
    held, parts = moments[-1][0], []
    for s in range(RANKS):
        alike = [rank for rank in range(RANKS) if held[rank, s] == held[s, s]]
        where = "every rank" if len(alike) == RANKS else f"rank {s}"
        parts.append(f"slice {s} has the values of {'+'.join(map(str, held[s, s]))} on {where}")
    return (f"{op} on {RANKS} ranks. Rounds: {len(moments) - 1}. Slices that ranks 0 to "
            f"{RANKS - 1} send: {', '.join(map(str, sent))}. At the end, {'; '.join(parts)}")
