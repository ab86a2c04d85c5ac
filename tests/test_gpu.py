"""The promises on CUDA: `pytest -m gpu`."""

import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import zero_ref
from zero_ref import comm
from zero_ref.commands.cli import main

pytestmark = pytest.mark.gpu
FEW = ["--steps", "6", "--batch-size", "24", "--device", "cuda"]


def check(report):
    assert not report["failed_promises"]
    assert "cpu" not in report["device"]


@pytest.mark.parametrize("task", ["digits", "text"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_compare_with_ranks_that_share_gpus(task, world_size, tmp_path):
    file = tmp_path / "report.json"
    assert main(["compare", "--task", task, *FEW, "--world-size", str(world_size),
                 "--backend", "gloo", "--json", str(file)]) == 0
    check(json.loads(file.read_text()))


@pytest.mark.parametrize("task", ["digits", "text"])
def test_compare_with_nccl_and_a_gpu_per_rank(task, tmp_path):
    file = tmp_path / "report.json"
    assert main(["compare", "--task", task, *FEW, "--json", str(file),
                 "--world-size", str(torch.cuda.device_count())]) == 0
    check(json.loads(file.read_text()))


def test_more_ranks_than_gpus_are_refused(capsys):
    ranks = torch.cuda.device_count() + 1
    assert main(["train", "--stage", "1", "--device", "cuda", "--world-size", str(ranks)]) == 2
    assert "Add --backend gloo to share GPUs" in capsys.readouterr().err


@pytest.mark.parametrize("stage", [0, 3])
def test_torchrun(stage, tmp_path):
    file = tmp_path / "report.json"
    subprocess.run([sys.executable, "-m", "torch.distributed.run",
                    "--nproc-per-node", str(torch.cuda.device_count()), "-m", "zero_ref", "train",
                    "--stage", str(stage), *FEW, "--json", str(file)], check=True, timeout=120)
    assert json.loads(file.read_text())["device"] == torch.cuda.get_device_name()


def sums(device):
    """This rank's slices of a sum over the ranks, of numbers that rank order rounds its own way."""
    group, rank = dist.group.WORLD, dist.get_rank()
    x = torch.randn(4 * 3 * 1001, generator=torch.Generator().manual_seed(rank)).exp().to(device)
    out = torch.empty(x.numel() // dist.get_world_size(), device=device)
    comm.reduce_scatter(out, x.clone(), group, unit="", phase="", divide_by=3).wait()
    comm.all_reduce(x, group, unit="", phase="", divide_by=3).wait()
    return out.cpu(), x.cpu()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_sum_in_rank_order_has_the_cpus_bits(world_size):
    on_gpu = zero_ref.launch(sums, world_size, "cuda")  # gloo ranks that share the GPU
    on_cpu = zero_ref.launch(sums, world_size, "cpu")
    for ours, theirs in zip(on_gpu, on_cpu):
        assert all(map(torch.equal, ours, theirs))
