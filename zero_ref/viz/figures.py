"""Draw the README's figures anew, each from a step recorded here and now; those of the benchmark
from what it has measured.

    python -m zero_ref.viz.figures figures
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import course, launch, wrap
from ..observe import memory
from ..observe.recorder import record
from . import Picture, bench, memory_over_step, timeline
from .steps import StepDrawing

RANKS = 4


def draw(folder: Path | str) -> list[Path]:
    """Returns the paths of what was written."""
    recordings = {stage: launch(_recorded, RANKS, stage) for stage in range(4)}
    sizes = [unit.sizes for unit in recordings[0][0].units]
    formula = {stage: sum(memory.model_states(sizes, RANKS, stage).values()) for stage in range(4)}
    step = StepDrawing([recordings[3]], recordings[0])
    written = {
        "stepper": step.png(step.moments.index(("backward", "3"))),
        "memory_over_step": memory_over_step(*[r[0] for r in recordings.values()],
                                             formula=formula).png(),
        "timeline": timeline(launch(_recorded, 2, 3, False, _wide, 64)).png(),
    }
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    for name in ("bench", "scale"):
        if (measured := folder / f"{name}.json").exists():
            written[name] = Picture(bench.draw(json.loads(measured.read_text())), name).png()
    for name, png in written.items():
        (folder / f"{name}.png").write_bytes(png)
    return [folder / f"{name}.png" for name in written]


def _recorded(stage, all_tensors=True, build=course.build, size=8):
    model = wrap(build(), stage, bucket_cap_mb=0)  # a message per unit
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(3):
        x, y = course.batch(step, model.rank, size)
        with record(model, optimizer, all_tensors=all_tensors) as recording:
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
