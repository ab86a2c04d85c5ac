"""A run of `zero-ref train` under torchrun, in which something happens to a rank, once.

    python tests/faults.py --number 50 --table docs/survives.md

draws that many faults, and twice as many kills of ranks that save; it says which were survived and
how many steps were lost beyond the last save. It takes about half an hour, and is not part of `make
test`.
"""

import argparse
import io
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import redirect_stdout
from datetime import date
from pathlib import Path

import kills
import torch
from safetensors.torch import load_file

from zero_ref.checkpoint.converting import export
from zero_ref.commands.cli import main

STEPS, EVERY = 12, 5
MODEL = '''"""Something happens on one rank when it asks for the batch of one step, once."""

import os
import signal
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

WORKERS = int(os.environ.get("WORKERS", 0))
loaders = []


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 5)).double()


class Samples(torch.utils.data.Dataset):
    """A rank's share of the samples of each step, which are the same on any number of ranks."""

    def __init__(self, rank):
        self.share = slice(rank, None, dist.get_world_size())

    def __len__(self):
        return 100

    def __getitem__(self, step):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, 9, generator=generator, dtype=torch.float64)
        return x[self.share], torch.randint(0, 5, (12,), generator=generator)[self.share]


def batch(step, rank):
    fault, at, who, mark = os.environ.get("FAULT", "- - - -").split(" ", 3)
    if f"{step} {rank}" == f"{at} {who}" and not os.path.exists(mark):
        open(mark, "w").close()
        happens(fault)
    if not WORKERS:
        return Samples(rank)[step]
    if not loaders:
        later = torch.utils.data.Subset(Samples(rank), range(step, 100))
        loaders.append(iter(DataLoader(later, batch_size=None, num_workers=WORKERS)))
    return tuple(next(loaders[0]))


def happens(fault):
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "raise":
        raise RuntimeError("on purpose")
    if fault == "hang":
        time.sleep(1000)
    if fault == "machine":  # nothing of it is left
        os.killpg(os.getpgid(os.getppid()), signal.SIGKILL)
    if fault == "stop":
        os.kill(os.getppid(), signal.SIGTERM)


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
'''


def run(folder: Path, stage: int, world_size: int = 2, fault: str = "", workers: int = 0,
        checkpoints: str = "checkpoints") -> subprocess.CompletedProcess:
    """fault: "KIND STEP RANK"."""
    (folder / "model.py").write_text(MODEL)
    environment = {**os.environ, "WORKERS": str(workers),
                   # Ranks may need seconds to start, where much else is running.
                   "ZERO_REF_TIMEOUT": "10" if fault.startswith("hang") else "30",
                   # Or a restarted rank looks for the others where they were before:
                   # https://github.com/pytorch/pytorch/issues/135712
                   "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if fault:
        environment["FAULT"] = f"{fault} {folder / 'happened'}"
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "2",
         "--shutdown-timeout", "6", "--nproc-per-node", str(world_size), "-m", "zero_ref",
         *options(folder, stage, checkpoints)],
        capture_output=True, text=True, timeout=120, env=environment, start_new_session=True)


def run_here(folder: Path, stage: int, world_size: int = 2, fault: str = "", workers: int = 0,
             checkpoints: str = "checkpoints") -> subprocess.CompletedProcess:
    """The same without torchrun, in ranks that may be there already, and nothing happens."""
    (folder / "model.py").write_text(MODEL)
    with redirect_stdout(io.StringIO()) as printed:
        status = main([*options(folder, stage, checkpoints), "--world-size", str(world_size)])
    return subprocess.CompletedProcess([], status, printed.getvalue(), "")


def options(folder: Path, stage: int, checkpoints: str) -> list[str]:
    return ["train", "--stage", str(stage), "--model", str(folder / "model.py"), "--steps",
            str(STEPS), "--checkpoint-every", str(EVERY), "--checkpoint-dir",
            str(folder / checkpoints)]


def weights(folder: Path, checkpoints: str = "checkpoints") -> dict[str, torch.Tensor]:
    export(folder / checkpoints, folder / "weights.safetensors")
    return load_file(folder / "weights.safetensors")


def lost(done: subprocess.CompletedProcess, at: int) -> int:
    """Steps that were done before the fault, and after the save that the run went on from."""
    resumed = re.search(r"from step (\d+) on", done.stdout)
    return at - int(resumed[1]) if resumed else at


def survived(folder: Path, stage: int, world_size: int, kind: str, at: int, rank: int, workers: int,
             then: int, run_again=run) -> int:
    """Let something happen, start the command again, on `then` ranks, where torchrun does not, and
    compare with an undisturbed run. Returns how many steps were lost beyond the last save."""
    undisturbed = run_again(folder, stage, world_size, checkpoints="undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr
    done = run(folder, stage, world_size, f"{kind} {at} {rank}", workers)
    if kind in ("machine", "stop"):
        assert done.returncode != 0, done.stdout
        if kind == "stop":
            assert "(stopped by SIGTERM)" in done.stdout, done.stderr
        done = run_again(folder, stage, then, f"{kind} {at} {rank}", workers)
    assert done.returncode == 0, done.stderr
    if kind == "hang":
        assert f"rank {rank} was asked to stop" in done.stderr, done.stderr
    mine, theirs = weights(folder), weights(folder, "undisturbed")
    assert mine.keys() == theirs.keys()
    here = then if kind in ("machine", "stop") else world_size
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0,
                                   atol=0 if here == world_size else 1e-9)
    last_save = at + 1 if kind == "stop" else at // EVERY * EVERY
    return max(0, last_save - (at - lost(done, at)))


def soak():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=50)
    parser.add_argument("--table", type=Path, metavar="OUT", help="write the result to this page")
    args = parser.parse_args()
    draw, found, start = random.Random(0), defaultdict(list), time.monotonic()
    for number in range(args.number):
        kind = ("kill", "raise", "hang", "machine", "stop")[number % 5]
        world_size = draw.choice([2, 2, 3])
        case = (draw.choice(range(4)), world_size, kind, draw.randrange(1, STEPS - 1),
                draw.randrange(world_size), draw.choice([0, 0, 1]), draw.choice([1, 2, 3, 4]))
        with tempfile.TemporaryDirectory() as folder:
            found[kind].append(survived(Path(folder), *case))
        print(number + 1, *case, found[kind][-1], flush=True)
    for who in ("one rank", "all ranks"):
        moments = [draw.uniform(0, 0.03) for _ in range(args.number)]
        with tempfile.TemporaryDirectory() as folder:
            kills.kill_while_saving(Path(folder), who, moments)
        found[who] = [0] * args.number
        print(f"{args.number} times, {who} killed while saving", flush=True)
    rows = [f"| {SAID[kind]} | {len(steps)} | {len(steps)} | {sum(steps)} |"
            for kind, steps in found.items()]
    text = "\n".join([
        f"It ran on {date.today():%Y-%m-%d} with torch {torch.__version__}, in "
        f"{time.monotonic() - start:.0f} s, at stages 0 to 3 on two or three\nranks, and a third "
        "of the runs had a DataLoader worker. Runs that were started again had\none to four "
        "ranks:", "",
        "| what happened | how often | survived, with the undisturbed run's weights | steps lost "
        "beyond the last save |", "|---|---|---|---|", *rows])
    print(text)
    if args.table:
        page = args.table.read_text().partition("It ran on ")[0].rstrip()
        args.table.write_text(f"{page}\n\n{text}\n")


SAID = {"kill": "a rank is killed", "raise": "a rank raises an exception",
        "hang": "a rank hangs, until the others give up after `ZERO_REF_TIMEOUT`",
        "machine": "torchrun and all its ranks are killed; started again",
        "stop": "SIGTERM, as schedulers send it; started again",
        "one rank": "a rank is killed while all save",
        "all ranks": "all ranks are killed while they save"}

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(soak())
