"""Draw the figures of the README and the notebooks anew, each from a step recorded here and now.

    python -m zero_ref.viz.figures figures
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import course, launch, memory, wrap
from ..record import record
from . import figure1, memory_over_step, partition_map, timeline
from .stepper import StepDrawing

RANKS = 4


def draw(folder):
    """Returns the paths of what was written."""
    recordings = {stage: launch(_recorded, RANKS, stage) for stage in range(4)}
    sizes = [unit.numel for unit in recordings[0][0].units]
    formula = {stage: sum(memory.model_states(sizes, RANKS, stage).values()) for stage in range(4)}
    together = StepDrawing(list(recordings.values()))
    step = StepDrawing([recordings[3]], recordings[0])
    backward = [(f.what, f.unit) for f in recordings[3][0].frames].index(("backward", "3"))
    pictures = {
        "figure1": figure1(),
        "partition_map": partition_map(recordings[1][0]),
        "memory_over_step": memory_over_step(*[r[0] for r in recordings.values()],
                                             formula=formula),
        "timeline": timeline(launch(_recorded, 2, 3, _wide, 64)),
    }
    written = {name: picture.png() for name, picture in pictures.items()}
    written["stepper"] = step.png(backward)
    written["side_by_side"] = together.png(together.moments.index(("backward", "3")))
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    for name, png in written.items():
        (folder / f"{name}.png").write_bytes(png)
    return [folder / f"{name}.png" for name in written]


def _recorded(stage, build=course.build, size=8):
    model = wrap(build(), stage)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(3):
        x, y = course.batch(step, model.rank, size)
        with record(model, optimizer) as recording:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return recording


def _wide():
    """Large enough that computing and sending take a while."""
    torch.manual_seed(0)
    linear = torch.nn.Linear
    return torch.nn.Sequential(torch.nn.Flatten(), linear(64, 768), torch.nn.ReLU(),
                               linear(768, 768), torch.nn.ReLU(), linear(768, 768),
                               torch.nn.ReLU(), linear(768, 10))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    for path in draw(parser.parse_args().folder):
        print(path)
