"""The exercises of the course: what an answer is run on, its solution, and wrong answers."""

from .exercise import Exercise
from .on_checkpoints import ON_CHECKPOINTS
from .on_collectives import ON_COLLECTIVES
from .on_hunt import ON_HUNT
from .on_numbers import ON_NUMBERS
from .on_planning import ON_PLANNING
from .on_stages import ON_STAGES
from .on_training import ON_TRAINING
from .on_variants import ON_VARIANTS

EXERCISES: dict[str, Exercise] = dict(sorted({
    **ON_NUMBERS, **ON_COLLECTIVES, **ON_STAGES, **ON_TRAINING, **ON_CHECKPOINTS, **ON_PLANNING,
    **ON_VARIANTS, **ON_HUNT}.items(),
    key=lambda item: [*map(int, item[0].split("."))]))  # 11.10 after 11.9
