"""Ranks that are killed while they save: the newest checkpoint that was committed has to load, with
the right values."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import zero_ref
from zero_ref.checkpoint import folder
from zero_ref.ranks.launch import processes

WIDTH = 200


def resumed(path):
    """What the newest checkpoint holds. All its values are the number of its step."""
    torch.manual_seed(0)
    model = zero_ref.wrap(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)), 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, WIDTH)).sum().backward()
    optimizer.step()
    step = 0
    if folder.committed(Path(path)):
        step = zero_ref.load(path, model, optimizer)["step"]
        for values in tensors(model, optimizer):
            assert (values == step).all(), (step, values)
    dist.barrier()  # everyone has looked whether there is one
    return model, optimizer, step


def tensors(model, optimizer):
    with torch._C.DisableTorchFunctionSubclass():
        for p in model.parameters():
            yield p
            yield from (optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq", "step"))


def save_for_ever(path):
    model, optimizer, step = resumed(path)
    while True:
        step += 1
        with torch.no_grad():
            for values in tensors(model, optimizer):
                values.fill_(step)
        zero_ref.save(path, model, optimizer, keep=2, step=step)


def kill_while_saving(path: Path, who: str, moments, world_size=2):
    """For each moment: seconds after a checkpoint has begun, kill "one rank" or "all ranks", and
    look whether the newest checkpoint loads. Returns how many were committed."""
    for number, moment in enumerate(moments):
        zero_ref.launch(dist.get_rank, world_size)  # they are there
        pids, before = processes(world_size, "gloo"), folder.committed(path)[-1:]
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(zero_ref.launch, save_for_ever, world_size, str(path))
            while not running.done() and (
                    folder.committed(path)[-1:] == before or not [*path.glob(".writing-*")]):
                time.sleep(0.001)
            time.sleep(moment)
            for pid in pids if who == "all ranks" else [pids[number % world_size]]:
                os.kill(pid, signal.SIGKILL)
            error = running.exception()
        assert isinstance(error, zero_ref.RankError) and error.kind == "ProcessDied", error
        newest = int(folder.committed(path)[-1].name.split("-")[1])
        step = zero_ref.launch(lambda: resumed(str(path))[2], world_size)[0]
        assert step == newest, (step, newest)
    return newest
