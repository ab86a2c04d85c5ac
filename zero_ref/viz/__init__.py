"""Pictures of what was recorded. Imported only by those who draw.

partition_map     a unit's flat buffer: whose parameters, which slice is whose
stepper           a recorded step, one event at a time
side_by_side      the same step at several stages
memory_over_step  bytes held, from event to event
timeline          who computed, sent and waited when; chrome_trace writes it for Perfetto
hooks             which hook of the stage runs when in a recorded step, and what it does
collective        what each rank's buffer holds in a collective, round by round
boxes             which part of a tensor lies in which file of a checkpoint
figure1           the paper's figure 1; explore_figure1 with sliders

Each returns a `Picture`, or a widget that carries one for readers without a kernel.
"""

from .boxes import boxes
from .collectives import collective
from .hooks import hooks
from .maps import partition_map
from .memory import memory_over_step
from .paper import explore_figure1, figure1
from .picture import Picture
from .steps import side_by_side, stepper
from .timelines import chrome_trace, timeline

__all__ = ["Picture", "boxes", "chrome_trace", "collective", "explore_figure1", "figure1",
           "hooks", "memory_over_step", "partition_map", "side_by_side", "stepper", "timeline"]
