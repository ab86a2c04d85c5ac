"""Pictures of what was recorded. Imported only by those who draw.

partition_map     a unit's flat buffer: whose parameters, which slice is whose
stepper           a recorded step, one event at a time
side_by_side      the same step at several stages
memory_over_step  bytes held, from event to event
timeline          who computed and who communicated when; chrome_trace writes it for Perfetto
figure1           the paper's figure 1; explore_figure1 with sliders

Each returns a `Picture`, or a widget that carries one for readers without a kernel.
"""

from .maps import partition_map
from .memory import memory_over_step
from .paper import explore_figure1, figure1
from .picture import Picture
from .steps import side_by_side, stepper
from .timelines import chrome_trace, timeline

__all__ = ["Picture", "chrome_trace", "explore_figure1", "figure1", "memory_over_step",
           "partition_map", "side_by_side", "stepper", "timeline"]
