"""The promises on CUDA: `pytest -m gpu`.

A single rank talks over NCCL, and more ranks than GPUs share these and talk over gloo. What a test
does is in a function that takes the device, and can be called for a CPU, too. How long steps take
is printed by the last test, and measured with the command in gpt_350m.py.
"""

import gc
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import toy
from toy import STAGES

import zero_ref
from zero_ref import comm, memory
from zero_ref.commands.cli import main
from zero_ref.commands.measure import live_bytes, most_bytes
from zero_ref.engine import transport

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


# ---- the same bits -------------------------------------------------------------------------------


def parity(world_size, optimizer, device):
    by_rank = toy.stages_agree(toy.run, world_size, optimizer, clip=(0.5,), device=device)
    assert {w.device.type for run in by_rank[0] for w in run["weights"].values()} == {device}
    exact = {"toy": {"norm": False}, "dtype": torch.float64, "device": device}
    ours = toy.stages_agree(toy.run, world_size, optimizer, **exact)[0][0]
    assert toy.close(ours["weights"], toy.ranks(toy.torch_ddp, world_size, optimizer, **exact)[0])


@pytest.mark.parametrize("optimizer", toy.OPTIMIZERS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_stages_equal_each_other_and_torch_ddp(world_size, optimizer):
    parity(world_size, optimizer, "cuda")


CYCLES = 5_000_000  # of the GPU's clock: some 3 ms, in which the host starts hundreds of kernels


def late(stage, what, ranks):
    """toy.run where, on these ranks, what a collective takes or what it gives comes late."""
    def delay(tensors):
        """In the current stream: for a while they are zero, and then have their values again."""
        if dist.get_rank() not in ranks:
            return
        values = [t.clone() for t in tensors]
        for t in tensors:
            t.data.zero_()  # .data: nobody is to take it for a change
        if toy.DEVICE.type == "cuda":
            torch.cuda._sleep(CYCLES)
        else:
            time.sleep(0.003)
        for t, value in zip(tensors, values):
            t.data.copy_(value)

    def takes(issue):
        def call(op, flats, *args):
            delay(flats)  # in the stream that computes
            return issue(op, flats, *args)

        return call

    def gives(steps):
        def call(flat, *args):
            delay([flat])  # in the collective's own stream
            return (yield from steps(flat, *args))

        return call

    module, delayed, names = {
        "takes": (comm, takes, ["_issue"]),
        "gives": (transport, gives, ["all_to_all", "all_gather", "broadcast"])}[what]
    with mock.patch.multiple(module, **{name: delayed(getattr(module, name)) for name in names}):
        return toy.run(stage, clip=(0.5,))


def delays(world_size, what, ranks, device):
    late_ones = toy.stages_agree(late, world_size, what, ranks, device=device)
    for run, in_time in zip(late_ones, toy.stages_agree(
            toy.run, world_size, clip=(0.5,), device=device)):
        assert toy.equal(run[0]["weights"], in_time[0]["weights"])
        assert run[0]["losses"] == in_time[0]["losses"]


@pytest.mark.parametrize("what", ["takes", "gives"])
@pytest.mark.parametrize("world_size, ranks", [(1, [0]), (2, [0, 1]), (2, [0]), (4, [3])])
def test_delays_change_no_bit(world_size, ranks, what):
    delays(world_size, what, ranks, "cuda")


# ---- memory --------------------------------------------------------------------------------------

LAYERS, WIDTH = 12, 250
LAYER = [WIDTH * WIDTH]  # without a bias: cuBLAS, whose workspace stays, does all the work
BLOCK = 512  # bytes, to which the allocator rounds up what is no larger than 1 MB
# How many flat buffers of a layer a step needs at one time, beside what stays. All stages: what
# autograd has made, and where a message lands. From stage 2 on: full gradients that fill up, and
# those in flight. Stage 3: the parameters that compute, and those that come next.
IN_FLIGHT = {0: 2, 1: 2, 2: 4, 3: 6}


def allocated():
    if toy.DEVICE.type == "cuda":
        return torch.cuda.memory_allocated()
    return sum(live_bytes().values())


def held(stage):
    """Bytes that a model and its optimizer have allocated between steps, and at most during one."""
    def train():
        torch.manual_seed(0)
        net = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH, bias=False)
                                    for _ in range(LAYERS)])
        model = zero_ref.wrap(net.to(toy.DEVICE), stage, bucket_cap_mb=0)
        # Its step needs no memory, unlike Adam's on a GPU, which takes all parameters at once.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def step():
            model(torch.ones(1, WIDTH, device=toy.DEVICE)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        return step

    train()  # from now on libraries have what they keep
    gc.collect()
    before = allocated()
    step = train()
    at_rest = allocated() - before
    return at_rest, at_rest + most_bytes(toy.DEVICE, step)


def memory_is_the_formulas(world_size, device):
    layer = toy.padded([LAYER], world_size) * torch.float32.itemsize
    for rank, by_stage in enumerate(toy.ranks(lambda: list(map(held, STAGES)), world_size,
                                              device=device)):
        for stage, (at_rest, peak) in zip(STAGES, by_stage):
            states = sum(memory.model_states([LAYER] * LAYERS, world_size, stage, rank=rank,
                                             optimizer_dtypes=[torch.float32]).values())
            # Parameters, gradients and momentum, a block of each for each layer.
            assert states <= at_rest <= states + 3 * LAYERS * BLOCK, (stage, rank)
            # All else, such as activations and the rounding of blocks, is less than a layer.
            assert at_rest + LAYER[0] * 4 <= peak < at_rest + (IN_FLIGHT[stage] + 1) * layer, (
                stage, rank, (peak - at_rest) / layer)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_allocated_memory_is_that_of_the_formula(world_size):
    memory_is_the_formulas(world_size, "cuda")


# ---- checkpoints ---------------------------------------------------------------------------------

OPTIMIZERS = {name: toy.OPTIMIZERS[name] for name in ("sgd", "adam")}
OPTIMIZERS["fused"] = lambda params: torch.optim.AdamW(params, fused=True)  # steps on the GPU, too


def train(model, optimizer, steps):
    for step in steps:
        x, y = toy.batch(step, dist.get_rank())
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def contents(model, optimizer):
    """Of a model, its optimizer and the random generators, on the CPU."""
    states = {}
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            if isinstance(value, torch.Tensor):
                on_cpu = key == "step" and not optimizer.param_groups[0]["fused"]
                assert value.device == (torch.device("cpu") if on_cpu else toy.DEVICE), (name, key)
                states[f"{name} {key}"] = value.cpu()
    weights = model.state_dict()
    assert {value.device for value in weights.values()} == {toy.DEVICE}
    drawn = [torch.rand(()).item(), random.random(), numpy.random.rand(),
             torch.rand((), device=toy.DEVICE).item()]  # of a GPU, that is a generator of its own
    return {name: value.cpu() for name, value in weights.items()}, states, drawn


def save_or_load(stage, verb, path, optimizer, steps):
    """What is there when it has been saved or loaded, and the weights a step later."""
    model = zero_ref.wrap(toy.build(dist.get_rank()), stage)
    opt = OPTIMIZERS[optimizer](model.parameters())
    train(model, opt, range(steps))
    torch.manual_seed(10 * steps + dist.get_rank())  # of GPUs, too
    random.seed(steps)
    numpy.random.seed(steps)
    verb(f"{path}/{stage}", model, opt)
    found = contents(model, opt)
    train(model, opt, [100])
    return *found, {name: value.cpu() for name, value in model.state_dict().items()}


def travels(world_size, optimizer, saved_on, loaded_on, path):
    saved, loaded = (
        toy.ranks(lambda verb, steps: [save_or_load(stage, verb, path, optimizer, steps)
                                       for stage in STAGES], world_size, verb, steps, device=device)
        for verb, steps, device in ((zero_ref.save, 3, saved_on), (zero_ref.load, 2, loaded_on)))
    for stage in STAGES:
        for rank in range(world_size):
            weights, states, drawn, after = loaded[rank][stage]
            of_saved = saved[rank][stage]
            mine = toy.LOCAL if rank else ()  # the checkpoint has rank 0's buffers
            assert toy.equal(weights, of_saved[0], mine)
            assert states and toy.equal(states, of_saved[1])
            elsewhere = saved_on != loaded_on
            last = 3 if elsewhere else 4  # the fourth is of the device's own generator
            assert drawn[:last] == of_saved[2][:last]
            assert elsewhere or toy.equal(after, of_saved[3], mine)


@pytest.mark.parametrize("saved_on, loaded_on",
                         [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_checkpoints_travel_between_cpu_and_gpu(world_size, optimizer, saved_on, loaded_on,
                                                tmp_path):
    travels(world_size, optimizer, saved_on, loaded_on, tmp_path)


def fits_every_stage(device, backend, asynchronous, path):
    def saved():
        model, opt = trained(0, [0, 1, 2])
        zero_ref.save(path, model, opt, asynchronous=asynchronous).wait()
        return a_step_later(model, opt)

    def loaded(stage):
        model, opt = trained(stage, [7])
        zero_ref.load(path, model, opt)
        return a_step_later(model, opt)

    def trained(stage, steps):
        model = zero_ref.wrap(toy.build(), stage)
        opt = OPTIMIZERS["adam"](model.parameters())
        train(model, opt, steps)
        return model, opt

    def a_step_later(model, opt):
        assert dist.get_backend(model.group) == backend
        train(model, opt, [3])
        return {name: value.cpu() for name, value in model.state_dict().items()}

    where = {"device": device, "backend": backend}
    [undisturbed] = toy.ranks(saved, 1, **where)
    for stage in STAGES:
        assert toy.equal(toy.ranks(loaded, 1, stage, **where)[0], undisturbed)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_over_nccl_fits_every_stage(asynchronous, tmp_path):
    fits_every_stage("cuda", "nccl", asynchronous, tmp_path)


# ---- as large as people train --------------------------------------------------------------------


def beside_the_bare_module_and_fsdp2(model, device, tmp_path):
    """Returns the number of parameters."""
    file = tmp_path / "gpt.json"
    assert main(["bench", "--model", str(model), "--device", device, "--world-size", "1",
                 "--rounds", "1", "--steps", "3", "--json", str(file),
                 "--systems", *(f"stage {stage}" for stage in STAGES), "FSDP2"]) == 0
    [part] = json.loads(file.read_text())["parts"]
    losses = {row["system"]: row["loss"] for row in part["systems"]}
    assert len({losses[f"stage {stage}"] for stage in STAGES}) == 1, losses
    for other in ("floor", "FSDP2"):  # the floor is the bare module
        assert losses["stage 0"] == pytest.approx(losses[other], rel=0.01), losses
    for row in part["systems"]:
        assert row["peak_bytes"] >= row["formula_bytes"], row
    return part["numel"]


def test_a_gpt_of_350_million_parameters_in_bf16(tmp_path):
    numel = beside_the_bare_module_and_fsdp2(Path(__file__).parent / "gpt_350m.py", "cuda",
                                             tmp_path)
    assert numel > 350_000_000
