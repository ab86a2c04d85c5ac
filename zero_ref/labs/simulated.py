"""A step of stage 3 on a clock that nothing disturbs: one lane computes, and one sends."""

from collections.abc import Iterable
from dataclasses import dataclass, field

# In f, the time that the forward of one unit takes. A gather or a reduce takes as long: m = f.
TAKES = {"forward": 1, "backward": 2, "gather": 1, "reduce": 1}
REFUSED = {"gather": "is there already", "reduce": "has no gradient to send",
           "forward": "is not there", "backward": "is not there", "free": "is not there"}
UNKNOWN = f"can be told one of {', '.join(sorted(REFUSED))}"


@dataclass
class Step:
    """Times are in f. Printed, it is drawn."""

    most: int = 0  # units in full at one time
    left: int = 0  # units in full at the end
    computed: list[str] = field(default_factory=list)
    ends: dict[str, int] = field(default_factory=dict)  # of the last of each kind
    not_reduced: set[int] = field(default_factory=set)  # units whose gradients nobody has sent
    lanes: dict[str, str] = field(default_factory=lambda: {"compute": "", "network": ""})

    def occupy(self, lane: str, start: int, what: str, unit: int) -> int:
        """Draw that a lane is busy from then on, three characters to an f. Returns when it ends."""
        drawn = f"{what[0]}{unit}".ljust(3 * TAKES[what] - 1, "=")
        self.lanes[lane] = self.lanes[lane].ljust(3 * start) + drawn + " "
        self.ends[what] = start + TAKES[what]
        return self.ends[what]

    def __str__(self) -> str:
        drawn = [f"{lane} {busy}".rstrip() for lane, busy in self.lanes.items()]
        took = max(self.ends.values(), default=0)
        return "\n".join([*drawn, f"{took}f; units in full at one time: {self.most}"])


def run(schedule: Iterable[tuple[str, int]]) -> Step:
    """What becomes of a schedule, a list of (what, unit) in the order in which a rank does it.

    "gather" and "reduce" are only issued: they take their time on the network, in the order of
    issue. The memory of a unit is there from the issue of its gather until "free". "forward" and
    "backward" first wait until their unit has arrived, and nothing else is issued until they end.
    """
    step, now, line_free = Step(), 0, 0
    arrives: dict[int, int] = {}  # when, of the units that are there or on their way
    for what, unit in schedule:
        if what in ("forward", "backward") and unit in arrives:
            now = step.occupy("compute", max(now, arrives[unit]), what, unit)
            step.computed.append(f"{what} {unit}")
            if what == "backward":
                step.not_reduced.add(unit)
        elif what == "gather" and unit not in arrives:
            line_free = step.occupy("network", max(now, line_free), what, unit)
            arrives[unit] = line_free
            step.most = max(step.most, len(arrives))
        elif what == "free" and unit in arrives:
            del arrives[unit]
        elif what == "reduce" and unit in step.not_reduced:
            line_free = step.occupy("network", max(now, line_free), what, unit)
            step.not_reduced.remove(unit)
        else:
            raise ValueError(f"{what} {unit}: unit {unit} {REFUSED.get(what, UNKNOWN)}")
    step.left = len(arrives)
    return step
