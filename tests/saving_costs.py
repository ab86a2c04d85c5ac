"""What saving and loading cost, beside torch.save and torch.load of the same tensors.

    python tests/saving_costs.py --table docs/checkpoints.md

Ten million parameters with Adam, two ranks; old and new in turns, medians of five rounds.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import zero_ref
from zero_ref.commands.measure import most_bytes

WIDTH, LAYERS, RANKS, ROUNDS, STEPS = 1024, 10, 2, 5, 4
STAGES = 0, 3


def seconds(found):
    return f"{found:.2f} s"


def of_a_step(found):
    return f"{1000 * found / STEPS:.0f} ms"


def megabytes(found):
    return f"{found / 1e6:.2f} MB"


ROWS = [("save", "save", seconds),
        ("torch.save", "`torch.save` of what the rank keeps, and fsync", seconds),
        ("load", "load, with all checks", seconds),
        ("torch.load", "`torch.load`, which checks nothing", seconds),
        ("save returns", "an asynchronous save returns after", seconds),
        ("steps", "a step, when nothing is written", of_a_step),
        ("steps meanwhile", "a step, beside an asynchronous save", of_a_step),
        ("sent", "bytes sent at save", "{:,}".format),
        ("memory", "memory that a save takes", megabytes),
        ("memory of an asynchronous one", "memory that an asynchronous save takes", megabytes)]


def measured(folder: str, stage: int) -> dict[str, float]:
    """Seconds, bytes."""
    rank = dist.get_rank()
    model = zero_ref.wrap(nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]), stage)
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(16, WIDTH)
    times = defaultdict(list)

    def timed(what, fn, *args, **options):
        dist.barrier()
        start = time.perf_counter()
        result = fn(*args, **options)
        times[what].append(time.perf_counter() - start)
        return result

    def steps():
        for _ in range(STEPS):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def torch_save():
        with open(plain, "wb") as file:
            torch.save([[*model.parameters()], optimizer.state_dict()], file)
            file.flush()
            os.fsync(file.fileno())

    steps()
    own, plain = f"{folder}/own", f"{folder}/rank{rank}.pt"
    for _ in range(ROUNDS):
        timed("save", zero_ref.save, own, model, optimizer, keep=1)
        timed("torch.save", torch_save)
        timed("load", zero_ref.load, own, model, optimizer)
        timed("torch.load", torch.load, plain)
        timed("steps", steps)
        saving = timed("save returns", zero_ref.save, own, model, optimizer, keep=1,
                       asynchronous=True)
        timed("steps meanwhile", steps)
        timed("wait", saving.wait)
    found = {what: statistics.median(of_what) for what, of_what in times.items()}
    with zero_ref.trace() as sent:
        found["memory"] = most_bytes(torch.device("cpu"), lambda: zero_ref.save(
            own, model, optimizer, keep=1))
    found["sent"] = sent.wire_bytes()
    found["memory of an asynchronous one"] = most_bytes(torch.device("cpu"), lambda: zero_ref.save(
        own, model, optimizer, keep=1, asynchronous=True).wait())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, metavar="OUT", help="write the result to this page")
    args = parser.parse_args()
    found = []
    for stage in STAGES:
        with tempfile.TemporaryDirectory() as folder:
            found.append(zero_ref.launch(measured, RANKS, folder, stage)[0])
    rows = ["| on a rank | " + " | ".join(f"stage {stage}" for stage in STAGES) + " |",
            "|---|" + "--:|" * len(STAGES),
            *(f"| {label} | " + " | ".join(shown(of_stage[what]) for of_stage in found) + " |"
              for what, label, shown in ROWS)]
    text = "\n".join([f"Measured on {date.today():%Y-%m-%d}, on {os.cpu_count()} cores, with "
                      f"{LAYERS * (WIDTH + 1) * WIDTH / 1e6:.1f} million parameters, Adam and "
                      f"{RANKS} ranks", "(`python tests/saving_costs.py`):", "", *rows])
    print(text)
    if args.table:
        before, mark, after = args.table.read_text().partition("## What it costs\n")
        _, following, rest = after.partition("\n## ")
        args.table.write_text(f"{before}{mark}\n{text}\n{following}{rest}")


if __name__ == "__main__":
    main()
