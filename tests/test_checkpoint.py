"""save and load: any stage and number of ranks to any other, and never half a checkpoint."""

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import stat
import time
from collections import Counter, OrderedDict
from pathlib import Path
from unittest import mock

import faults
import kills
import numpy
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
import toy
from torch import nn
from toy import STAGES, seed

import zero_ref
from zero_ref import viz
from zero_ref.checkpoint import folder, loading, shards
from zero_ref.checkpoint.boxes import boxes
from zero_ref.checkpoint.converting import import_
from zero_ref.checkpoint.pack import pack, unpack
from zero_ref.checkpoint.saving import agree
from zero_ref.commands.cli import main
from zero_ref.commands.measure import most_bytes
from zero_ref.observe.kernel import tcp_bytes_sent
from zero_ref.ranks.launch import processes
from zero_ref.ranks.stopping import inside

WORLD_SIZES = (1, 2, 3, 4)
SAMPLES = 12  # of a step, all ranks together: as many at every world size


def build(stage, optimizer="adam", norm=True, **options):
    model = zero_ref.wrap(toy.build(dist.get_rank(), norm=norm), stage, **options)
    return model, OPTIMIZERS[optimizer](model.parameters())


def train(model, optimizer, steps):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randint(0, toy.VOCAB, (2, SAMPLES), generator=generator).view(
            2, world_size, -1)[:, rank]
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


OPTIMIZERS = {
    **toy.OPTIMIZERS,
    "plain sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "amsgrad": lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True),
    "nadam": torch.optim.NAdam, "radam": torch.optim.RAdam, "adamax": torch.optim.Adamax,
    "adagrad": torch.optim.Adagrad, "adadelta": torch.optim.Adadelta,
    "rmsprop": lambda params: torch.optim.RMSprop(params, momentum=0.9, centered=True),
    "rprop": torch.optim.Rprop,
    "asgd": lambda params: torch.optim.ASGD(params, t0=1),
}


# ---- from flat buffers to boxes ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 5), (1, 7), (7, 1), (2, 3, 4), (3, 1, 2),
                                   (2, 2, 2, 2), (0, 3), (3, 0)])
def test_boxes_are_the_range_in_its_order_and_few(shape):
    numel = math.prod(shape)
    values = torch.arange(numel).view(shape)
    for begin, end in itertools.combinations_with_replacement(range(numel + 1), 2):
        found = boxes(shape, begin, end)
        assert len(found) <= max(1, 2 * len(shape) - 1)
        got = [values[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes))].reshape(-1)
               for box in found]
        assert [part[0] for part in got] == [box.begin for box in found]
        assert torch.equal(torch.cat([torch.arange(0), *got]), torch.arange(begin, end))


# ---- any layout to any other ---------------------------------------------------------------------


def save_at_all_stages(path):
    """Train, save, and train on. Returns the weights at the end and the numbers drawn then."""
    found = []
    for stage in STAGES:
        seed(100 * stage + dist.get_rank())
        random.seed(stage)
        numpy.random.seed(stage)
        # BatchNorm computes with a rank's own samples, of which there are more on fewer ranks.
        model, optimizer = build(stage, norm=False)
        train(model, optimizer, range(3))
        zero_ref.save(f"{path}/{stage}", model, optimizer, stage=stage)
        drawn = [torch.rand(()), random.random(), numpy.random.rand()]
        train(model, optimizer, [3])
        found.append((model.state_dict(), drawn))
    return found


def load_at_all_stages(paths):
    found = {}
    for stage in STAGES:
        model, optimizer = build(stage, norm=False)
        for path in paths:
            seed(7)
            extra = zero_ref.load(path, model, optimizer)
            assert f"/{extra['stage']}/" in f"{path}/"
            drawn = [torch.rand(()), random.random(), numpy.random.rand()]
            train(model, optimizer, [3])
            found[path, stage] = model.state_dict(), drawn
    return found


class Branches(nn.Module):
    """With two ranks, all of `rare` is in rank 1's slice."""

    def __init__(self):
        super().__init__()
        self.usual, self.rare = nn.Linear(40, 4), nn.Linear(4, 2)

    def forward(self, x, rare):
        x = self.usual(x)
        return self.rare(x) if rare else x


def branch(path, stage, steps_of_rank_0):
    def go_on(model, optimizer, steps):
        for step in steps:
            rare = dist.get_rank() == 1 or step in steps_of_rank_0
            model(torch.full((2, 40), step + 1.0), rare).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def build_it():
        model = zero_ref.wrap(Branches(), stage)
        return model, torch.optim.Adam(model.parameters(), lr=0.1)

    model, optimizer = build_it()
    go_on(model, optimizer, range(3))
    zero_ref.save(path, model, optimizer)
    go_on(model, optimizer, range(3, 5))
    other, its_optimizer = build_it()
    zero_ref.load(path, other, its_optimizer)
    go_on(other, its_optimizer, range(3, 5))
    return toy.equal(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("steps_of_rank_0", [[], [0]])
def test_states_of_what_rank_0_has_no_element_of(tmp_path, steps_of_rank_0):
    """Where its own batches do not need it either, it has no gradient, and no state or an old one.
    """
    for stage in (1, 2):
        assert all(toy.ranks(branch, 2, str(tmp_path / f"{stage}"), stage, steps_of_rank_0))


def test_what_was_saved_goes_on_at_every_stage_and_world_size(tmp_path):
    saved = {n: toy.ranks(save_at_all_stages, n, f"{tmp_path}/{n}", dtype=torch.float64)
             for n in WORLD_SIZES}
    paths = [f"{tmp_path}/{n}/{stage}" for n in WORLD_SIZES for stage in STAGES]
    for n in WORLD_SIZES:
        for rank, loaded in enumerate(toy.ranks(load_at_all_stages, n, paths,
                                                dtype=torch.float64)):
            for (path, _), (weights, drawn) in loaded.items():
                of, stage = map(int, path.split("/")[-2:])
                expected, drawn_then = saved[of][min(rank, of - 1)][stage]
                if of == n:
                    assert toy.equal(weights, expected), (path, n)
                    assert drawn == drawn_then
                assert toy.close(weights, expected), (path, n)


def resume(path, optimizer, stage, others):
    model, opt = build(stage, optimizer)
    train(model, opt, range(3))
    zero_ref.save(path, model, opt)
    train(model, opt, range(3, 5))
    expected = model.state_dict()
    for other in others:
        model, opt = build(other, optimizer)
        train(model, opt, [9])  # it has states already
        zero_ref.load(path, model, opt)
        train(model, opt, range(3, 5))
        assert toy.equal(model.state_dict(), expected, toy.LOCAL), (optimizer, stage, other)
    return expected


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_states_of_every_optimizer_travel(tmp_path, optimizer):
    toy.ranks(resume, 3, str(tmp_path / "0"), optimizer, 0, (1, 3))
    toy.ranks(resume, 3, str(tmp_path / "3"), optimizer, 3, (0, 2))


class Run:
    """Mixed precision, two optimizers, a scheduler and a loss scale."""

    def __init__(self, stage):
        precision = zero_ref.MixedPrecision(torch.float16, keep=toy.Scale)
        self.model, _ = build(stage, norm=False, mixed_precision=precision)
        first, *rest = self.model.parameters()
        self.optimizers = [torch.optim.AdamW(rest, lr=0.1), torch.optim.SGD([first], lr=0.1)]
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizers[0], [1, 3], 0.5)
        self.scaler = zero_ref.GradScaler(self.model, init_scale=2.0**18, growth_interval=2)

    def train(self, steps):
        for step in steps:
            x, y = toy.batch(step, dist.get_rank())
            self.scaler.scale(F.cross_entropy(self.model(x), y)).backward()
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
                optimizer.zero_grad()
            self.scaler.update()
            self.scheduler.step()

    def save(self, path):
        zero_ref.save(path, self.model, self.optimizers, scheduler=self.scheduler,
                      scaler=self.scaler)

    def load(self, path):
        extra = zero_ref.load(path, self.model, self.optimizers)
        self.scheduler.load_state_dict(extra["scheduler"])
        self.scaler.load_state_dict(extra["scaler"])


def mixed(path, stage, other):
    run = Run(stage)
    run.train(range(4))
    run.save(path)
    run.train(range(4, 8))
    resumed = Run(other)
    resumed.load(path)
    resumed.train(range(4, 8))
    assert resumed.scaler.get_scale() == run.scaler.get_scale() < 2.0**18
    assert resumed.scheduler.get_last_lr() == run.scheduler.get_last_lr() == [0.025]
    assert toy.equal(resumed.model.state_dict(), run.model.state_dict())


@pytest.mark.parametrize(("stage", "other"), [(0, 3), (1, 2), (3, 0)])
def test_mixed_precision_several_optimizers_a_scheduler_and_a_loss_scale(tmp_path, stage, other):
    toy.ranks(mixed, 2, str(tmp_path), stage, other)


def onto_meta(path):
    model, optimizer = build(2)
    train(model, optimizer, range(2))
    zero_ref.save(path, model, optimizer)
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with pytest.raises(ValueError, match="of another model"):
        zero_ref.load(path, empty := zero_ref.wrap(module, 3),
                      torch.optim.Adam(empty.parameters()))
    seq = zero_ref.wrap(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), 1)
    opt = torch.optim.Adam(seq.parameters())
    zero_ref.save(f"{path}/seq", seq, opt)
    zero_ref.load(f"{path}/seq", empty, torch.optim.Adam(empty.parameters()))
    assert toy.equal(empty.state_dict(), seq.state_dict())


def test_a_model_from_the_meta_device_is_filled(tmp_path):
    toy.ranks(onto_meta, 2, str(tmp_path))


# ---- what it costs -------------------------------------------------------------------------------


def save_large(path, stage, width):
    model = zero_ref.wrap(nn.Sequential(*[nn.Linear(width, width) for _ in range(4)]), stage)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    with zero_ref.trace() as sent:
        peak = most_bytes(torch.device("cpu"), lambda: zero_ref.save(path, model, optimizer))
    return {event.op for event in sent.events}, sent.wire_bytes(), peak


@pytest.mark.parametrize("stage", [0, 3])
def test_no_tensor_is_sent_at_save_and_none_is_copied(tmp_path, stage):
    small = toy.ranks(save_large, 3, str(tmp_path / "1"), stage, 8)
    large = toy.ranks(save_large, 3, str(tmp_path / "2"), stage, 500)  # 1,002,000 parameters
    for (ops, sent, peak), (_, sent_of_small, _) in zip(large, small):
        assert ops == {"all_gather_object"} and sent < 100_000 and peak < 100_000
        assert abs(sent - sent_of_small) < 500  # whatever the size


def test_the_kernel_counts_no_tensor_at_save(tmp_path):
    def prepare():
        model = zero_ref.wrap(nn.Linear(700, 700), 3)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.ones(1, 700)).sum().backward()
        optimizer.step()
        toy.kept = model, optimizer

    path = str(tmp_path)
    toy.ranks(prepare, 2)
    before = [tcp_bytes_sent(pid) for pid in processes(2, "gloo")]
    if None in before:
        pytest.skip("the kernel does not say what another process has sent")
    toy.ranks(lambda: zero_ref.save(path, *toy.kept) and None, 2)
    after = [tcp_bytes_sent(pid) for pid in processes(2, "gloo")]
    assert all(0 < b - a < 100_000 for a, b in zip(before, after))  # of 5,886,000 bytes


# ---- what else belongs to it ---------------------------------------------------------------------


EXTRA = {
    "nothing": None, "true": True, "count": 3, "large": 2**70, "share": 0.1, "none": float("inf"),
    "text": "é\n\0", "list": [1, [2.5, "a"]], "tuple": (1, (None,)), "dict": {1: "a", "1": "b"},
    "counter": Counter({2: 1, 4: 1}), "ordered": OrderedDict(b=1, a=2),
    "keys": {(0, "x"): [], None: 1, True: 2.0}, "tensor": torch.arange(6.0).view(2, 3).t(),
    "bits": torch.tensor([True, False]), "scalar": torch.tensor(1, dtype=torch.int16),
    "windows": [*torch.arange(8.0).unfold(0, 5, 3)],  # which share memory
    "half": [torch.ones(2, dtype=torch.bfloat16)], "complex": torch.ones(1, dtype=torch.complex64),
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and [*map(type, a)] == [*map(type, b)] and all(
            same(a[k], b[k]) for k in a)
    return all(map(same, a, b)) and len(a) == len(b) if isinstance(a, list | tuple) else a == b


def extra_comes_back(path):
    model, optimizer = build(1)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [
        torch.optim.lr_scheduler.ConstantLR(optimizer), torch.optim.lr_scheduler.MultiStepLR(
            optimizer, [2, 4])], [3])
    own = EXTRA if dist.get_rank() == 0 else {"rank": "another"}
    zero_ref.save(path, model, optimizer, scheduler=scheduler, **own)
    return zero_ref.load(path, model, optimizer), scheduler.state_dict()


def test_extra_values_are_equal_in_value_and_type_on_every_rank(tmp_path):
    for extra, scheduler in toy.ranks(extra_comes_back, 2, str(tmp_path)):
        assert same(extra.pop("scheduler"), scheduler)
        assert same(extra, EXTRA)


def minimize(model, optimizer, steps):
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randint(0, toy.VOCAB, (2, SAMPLES), generator=generator)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[0]), x[1])
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def resume_lbfgs(path):
    def build_it():
        model = zero_ref.wrap(toy.build(0, norm=False), 0)
        return model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    model, optimizer = build_it()
    minimize(model, optimizer, 2)
    zero_ref.save(path, model, optimizer)
    minimize(model, optimizer, 2)
    other, its_optimizer = build_it()
    zero_ref.load(path, other, its_optimizer)
    minimize(other, its_optimizer, 2)
    return toy.equal(model.state_dict(), other.state_dict())


def test_tensors_that_are_no_parameter_s_go_on_with_the_same_bits(tmp_path):
    """LBFGS takes dot products of them, which are rounded by where a tensor begins."""
    assert toy.ranks(resume_lbfgs, 2, str(tmp_path)) == [True, True]


class Counts(nn.Linear):
    """Has a state that is neither a parameter nor a buffer."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)

    def get_extra_state(self):
        return {"calls": self.calls, "at": (torch.tensor([self.calls]),)}

    def set_extra_state(self, state):
        self.calls = state["at"][0].item()


class Overlapping(nn.Linear):
    """Its buffers share memory, as parts of one table."""

    def __init__(self):
        super().__init__(3, 2)
        table = torch.arange(8.0)
        self.register_buffer("first", table[:5])
        self.register_buffer("last", table[3:])


def overlapping_come_back(path):
    model = zero_ref.wrap(Overlapping(), 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    zero_ref.save(path, model, optimizer)
    model.module.first.zero_(), model.module.last.zero_()
    zero_ref.load(path, model, optimizer)
    return model.module.first.tolist(), model.module.last.tolist()


def test_buffers_that_overlap_come_back(tmp_path):
    assert toy.ranks(overlapping_come_back, 2, str(tmp_path)) == 2 * [
        ([0, 1, 2, 3, 4], [3, 4, 5, 6, 7])]


class Shared(nn.Linear):
    """Gives out its state itself, and writes into it."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.state = {"calls": torch.zeros(1)}

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state["calls"].copy_(state["calls"])
        if state["calls"] and self.out_features == dist.get_rank():
            raise RuntimeError("not here")


def refused_by_one_rank(path):
    model, optimizer = shared(3)
    for module in model.module:
        module.state["calls"] += 1
    zero_ref.save(path, model, optimizer)
    other, its_optimizer = shared(3)
    other.module[1].out_features = 1  # of rank 1, alone
    with pytest.raises(ValueError, match="not here"):
        zero_ref.load(path, other, its_optimizer)
    return [module.state["calls"].item() for module in other.module]


def shared(size):
    model = zero_ref.wrap(nn.Sequential(Shared(3, size), Shared(size, size)), 3)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_extra_states_are_as_before_if_one_rank_refuses_its_own(tmp_path):
    assert toy.ranks(refused_by_one_rank, 2, str(tmp_path)) == [[0, 0], [0, 0]]


class Refuses(Counts):
    def set_extra_state(self, state):
        super().set_extra_state(state)
        if state["calls"] == 3:
            raise RuntimeError("not three")


def extra_state_comes_back(path):
    def build_counting():
        model = zero_ref.wrap(nn.Sequential(Counts(3, 4), nn.Linear(4, 2)), 3)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    model, optimizer = build_counting()
    for _ in range(3):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    zero_ref.save(path, model, optimizer)
    other, its_optimizer = build_counting()
    zero_ref.load(path, other, its_optimizer)
    bare = zero_ref.wrap(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), 3)
    with pytest.raises(ValueError, match=r"the checkpoint has '0\._extra_state', and the"):
        zero_ref.load(path, bare, torch.optim.SGD(bare.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="not three"):
        refusing = zero_ref.wrap(nn.Sequential(Refuses(3, 4), nn.Linear(4, 2)), 3)
        before = refusing.state_dict()
        zero_ref.load(path, refusing, torch.optim.SGD(refusing.parameters(), lr=0.1))
    assert refusing.module[0].calls == 0
    assert before.pop("0._extra_state")["calls"] == 0
    assert toy.equal({name: refusing.state_dict()[name] for name in before}, before)
    return other.module[0].calls


def test_the_extra_state_of_a_module_comes_back(tmp_path):
    assert toy.ranks(extra_state_comes_back, 2, str(tmp_path)) == [3, 3]


def test_not_a_number_comes_back():
    assert math.isnan(unpack(json.loads(json.dumps(pack(math.nan, "x", {}))), {}.get))


@pytest.mark.parametrize(("value", "said"), [
    (object(), "x is a object: a checkpoint can hold"), ({"a": [{1}]}, r"x\['a'\]\[0\] is a set"),
    (torch.ones(1, dtype=torch.complex128), "x is a tensor of torch.complex128"),
    (torch.ones(2).to_sparse(), "x is a tensor of torch.sparse_coo"),
    (torch.optim.SGD([nn.Parameter(torch.ones(1))]), "x is a SGD, whose state_dict"),
    ({torch.float32: 1}, "x has the key torch.float32"), (lambda: 0, "x is a function"),
])
def test_other_extra_values_are_refused(tmp_path, value, said):
    def save():
        model, optimizer = build(1)
        with pytest.raises(ValueError, match=said if dist.get_rank() == 0 else f"rank 0: {said}"):
            zero_ref.save(tmp_path, model, optimizer, x=value)
        with pytest.raises(ValueError, match="x is a Stage1" if dist.get_rank() == 0 else "rank 0"):
            zero_ref.save(tmp_path, model, optimizer, x=model)
        around = nn.ModuleList([model])
        with pytest.raises(ValueError, match="x is a ModuleList, whose state_dict"):
            zero_ref.save(tmp_path, model, optimizer, x=around)
        train(model, optimizer, [0])
        states = {"of": optimizer.state_dict()}
        with pytest.raises(ValueError, match="is a state of an optimizer, of which this rank has"):
            zero_ref.save(tmp_path, model, optimizer, x=states)

    toy.ranks(save, 2)
    assert not [*tmp_path.iterdir()]


# ---- what others read and write ------------------------------------------------------------------


def save_trained(path, stage):
    model, optimizer = build(stage)
    train(model, optimizer, range(2))
    zero_ref.save(path, model, optimizer, step=2)
    with model.full_params():
        return model.state_dict(), optimizer.param_groups[0]["lr"]


def test_only_safetensors_and_json_are_on_disk(tmp_path):
    toy.ranks(save_trained, 3, str(tmp_path), 2)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ""}
    assert (tmp_path / "latest").read_text() == "checkpoint-000001\n"
    for path in files:
        if path.suffix == ".safetensors":
            assert safetensors.torch.load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
    names = {path.relative_to(tmp_path).parts[1] for path in files if path.parent != tmp_path}
    assert names == {"manifest.json", "model", "optimizer-0", "rest"}
    text = (tmp_path / "checkpoint-000001" / "manifest.json").read_text()
    assert '"token.weight"' in text and '"head.weight"' in text and "stage" not in text


def plain():
    seed(dist.get_rank())
    return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def save_plain(path):
    model = zero_ref.wrap(plain(), 3)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        model(torch.randn(4, 7)).square().sum().backward()
        optimizer.step()
    zero_ref.save(path, model, optimizer)
    return model.state_dict()


def torch_reads(path, expected):
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as of_torch
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.fsdp import fully_shard

    flat = of_torch.StateDictOptions(flatten_optimizer_state_dict=True)
    for sharded in (False, True):
        module = plain()
        if sharded:
            fully_shard(module)
        optimizer = torch.optim.Adam(module.parameters())
        weights = module.state_dict()
        dcp.load(weights, storage_reader=HuggingFaceStorageReader(f"{path}/model"))
        module.load_state_dict(weights)
        states = of_torch.get_optimizer_state_dict(module, optimizer, options=flat)
        states = {key: value for key, value in states.items() if key.startswith("state.")}
        assert len(states) == 18
        dcp.load(states, storage_reader=HuggingFaceStorageReader(f"{path}/optimizer-0"))
        whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value
                 for name, value in {**weights, **states}.items()}
        assert toy.equal({name: whole[name] for name in weights}, expected)
        assert whole["state.0.weight.step"] == 2 and whole["state.2.weight.exp_avg"].all()


def test_torch_reads_the_shards_into_a_plain_module_and_into_fsdp2(tmp_path):
    weights = toy.ranks(save_plain, 3, str(tmp_path))[0]
    toy.ranks(torch_reads, 2, str(tmp_path / "checkpoint-000001"), weights)


def test_export_import_and_show(tmp_path, capsys):
    weights, _ = toy.ranks(save_trained, 3, str(tmp_path / "a"), 3)[0]
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "a.safetensors")]) == 0
    assert toy.equal(safetensors.torch.load_file(tmp_path / "a.safetensors"), weights)
    module = toy.build()
    module.load_state_dict(safetensors.torch.load_file(tmp_path / "a.safetensors"))

    # Others leave out the second name of a tied parameter.
    some = {name: value for name, value in weights.items() if name != "head.weight"}
    parts = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for part, names in zip(parts, (list(some)[:5], list(some)[5:])):
        safetensors.torch.save_file({name: some[name] for name in names}, part)
    assert main(["import", *map(str, parts), str(tmp_path / "b")]) == 0

    def load(path):
        model, optimizer = build(3)
        extra = zero_ref.load(path, model, optimizer)
        return extra, model.state_dict(), len(optimizer.state)

    for extra, found, states in toy.ranks(load, 2, str(tmp_path / "b")):
        assert extra == {} and states == 0 and toy.equal(found, weights)
    assert main(["show", str(tmp_path / "a")]) == 0 == main(["show", str(tmp_path / "b")])
    printed = capsys.readouterr().out
    for said in ("written by 3 ranks", "imported", "state.token.weight.exp_avg", "(11, 7)",
                 "float32", "308", "Adam, group 0 of", "lr=0.01", "step: 2"):
        assert said in printed, said
    assert re.search(r"token\.weight +\(11, 7\) +float32 +308 +0–2 +\d+ *\n", printed)
    assert re.search(r"norm\.running_mean +\(7,\) +float32 +28 +0 +1 *\n", printed)


def test_show_prints_nothing_that_a_terminal_obeys(tmp_path, capsys):
    def save():
        zero_ref.save(tmp_path, *build(0), **{"a\x1b]0;b": "c\x1b"})

    toy.ranks(save, 1)
    assert main(["show", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "a\\x1b]0;b: 'c\\x1b'" in printed and "\x1b" not in printed


def test_what_cannot_be_exported_or_imported_is_said(tmp_path, capsys):
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    for command in (["export", tmp_path / "x", tmp_path / "o"], ["show", tmp_path],
                    ["import", tmp_path / "text.safetensors", tmp_path / "c"],
                    ["import", tmp_path / "nothing.safetensors", tmp_path / "c"]):
        assert main([*map(str, command)]) == 2
    said = capsys.readouterr().err
    assert "there is no such folder" in said and "no checkpoint was committed there" in said
    toy.ranks(save_trained, 2, str(tmp_path / "a"), 1)
    shard = tmp_path / "a/checkpoint-000001/model/rank0-0.safetensors"
    assert main(["import", str(shard), str(tmp_path / "c")]) == 2
    assert "has one rank's part of the tensors of a checkpoint" in capsys.readouterr().err
    before = shard.read_bytes()
    assert main(["export", str(tmp_path / "a"), str(shard)]) == 2 and shard.read_bytes() == before
    assert "would lie in a checkpoint: name a file outside" in capsys.readouterr().err
    assert said.count("is no safetensors file") == 2 and not (tmp_path / "c").exists()


def test_a_disk_that_is_full_at_export_is_said(tmp_path, capsys):
    import resource

    safetensors.torch.save_file({"x": torch.ones(100_000)}, tmp_path / "x.safetensors")
    import_([tmp_path / "x.safetensors"], tmp_path / "a")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert main(["export", str(tmp_path / "a"), str(tmp_path / "o.safetensors")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "o.safetensors: File too large" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "x.safetensors"]


# ---- damaged, hostile, or of something else ------------------------------------------------------


def unchanged_by(path, expected, stage=3, build_other=None):
    """load raises what is expected on every rank, and changes nothing."""
    model, optimizer = (build_other or build)(stage)
    if build_other is None:
        train(model, optimizer, [5])
    seed(3)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=re.escape(expected[0])) as caught:
        zero_ref.load(path, model, optimizer)
    assert snapshot(model, optimizer) == before
    assert all(part in str(caught.value) for part in expected), (str(caught.value), expected)
    return str(caught.value)


def snapshot(model, optimizer):
    with torch._C.DisableTorchFunctionSubclass():
        state = [(name, key, bytes(value.numpy().tobytes()) if isinstance(value, torch.Tensor) else
                  value) for name, p in model.named_parameters()
                 for key, value in optimizer.state.get(p, {}).items()]
    weights = [(name, bytes(value.reshape(-1).view(torch.uint8).numpy()))
               for name, value in model.state_dict().items()]
    return state, weights, torch.get_rng_state().tolist(), str(optimizer.param_groups[0]["lr"])


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with two committed checkpoints of stage 1 on three ranks."""
    def save():
        model, optimizer = build(1)
        for step in range(2):
            train(model, optimizer, [step])
            zero_ref.save(path, model, optimizer, step=step)

    path = str(tmp_path_factory.mktemp("good"))
    toy.ranks(save, 3)
    return Path(path)


def damages(file):
    """What may happen to a file, by name."""
    size = file.stat().st_size

    def bit(at):
        content = bytearray(file.read_bytes())
        content[at] ^= 4
        file.write_bytes(content)

    yield "lost", lambda: file.unlink()
    for share in (0, 0.5, 0.99):
        yield f"truncated at {share}", lambda share=share: os.truncate(file, int(share * size))
    yield "a bit flipped", lambda: bit(size // 2)
    yield "another step's", lambda: shutil.copyfile(
        str(file).replace("000002", "000001"), file)


def test_a_damaged_file_is_named_on_every_rank_and_nothing_changes(good, tmp_path):
    newest = tmp_path / "good" / "checkpoint-000002"
    names = sorted(str(file.relative_to(good / newest.name))
                   for file in (good / newest.name).rglob("*") if file.is_file())
    assert len(names) > 12
    cases = []
    for index, name in enumerate(names):
        for kind, _ in damages(good / newest.name / name):
            path = tmp_path / f"{index} {kind}"
            shutil.copytree(good, path)
            file = path / newest.name / name
            before = file.read_bytes()
            dict(damages(file))[kind]()
            if file.exists() and file.read_bytes() == before:
                continue  # both steps have the same content
            if name == "manifest.json" and kind in ("another step's", "lost"):
                continue  # see below
            cases.append((str(path), [name]))
    assert len(cases) > 60

    def load_all():
        return [unchanged_by(path, expected) for path, expected in cases]

    for said in toy.ranks(load_all, 2):
        assert all("\n" not in text for text in said)


def test_a_manifest_that_is_lost_or_another_step_s(good, tmp_path):
    lost, other = tmp_path / "lost", tmp_path / "other"
    for path in (lost, other):
        shutil.copytree(good, path)
    (lost / "checkpoint-000002/manifest.json").unlink()
    shutil.copyfile(good / "checkpoint-000001/manifest.json", other /
                    "checkpoint-000002/manifest.json")

    def load_both():
        unchanged_by(str(lost), ["checkpoint-000002/manifest.json"])
        unchanged_by(str(other), ["checkpoint-000002"])

    toy.ranks(load_both, 2)


def rewrite(path, change):
    """Change a checkpoint's shards, and make the manifest fit: {file: {name: tensor}}."""
    checkpoint = path / "checkpoint-000002"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    change(checkpoint, manifest)
    for name in manifest["files"]:
        if (checkpoint / name).is_file():
            manifest["files"][name] = folder.facts(checkpoint / name)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def tensors_of(file):
    with safetensors.safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()


def edit(file, **changes):
    tensors, metadata = tensors_of(file)
    where = json.loads(metadata["DCP_SHARDING_INFO"])
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name], where[name]
        else:
            tensors[name] = value
            if len(where.get(name, {"saved_offsets": ()})["saved_offsets"]) != value.ndim:
                where[name] = {"saved_offsets": [0] * value.ndim}
            where.setdefault(name, {"saved_offsets": []})
    safetensors.torch.save_file(tensors, file, {"DCP_SHARDING_INFO": json.dumps(where)})


def of_other_content(good, tmp_path):
    first = "model/rank0-0.safetensors"

    def key_missing(checkpoint, manifest):
        edit(checkpoint / first, token__weight=None)

    def one_too_many(checkpoint, manifest):
        edit(checkpoint / first, more=torch.ones(2))

    def listed_too(checkpoint, manifest):
        one_too_many(checkpoint, manifest)
        manifest["tensors"]["model"]["more"] = ["float32", [2]]

    def other_shape(checkpoint, manifest):
        edit(checkpoint / first, norm__running_mean=torch.ones(8))

    def other_shape_listed(checkpoint, manifest):
        other_shape(checkpoint, manifest)
        manifest["tensors"]["model"]["norm.running_mean"] = ["float32", [8]]

    def other_dtype(checkpoint, manifest):
        edit(checkpoint / first, norm__running_mean=torch.ones(7, dtype=torch.float64))

    def overlapping(checkpoint, manifest):
        tensors, metadata = tensors_of(checkpoint / first)
        where = json.loads(metadata["DCP_SHARDING_INFO"])
        where["token.weight"]["saved_offsets"][0] += 1
        safetensors.torch.save_file(tensors, checkpoint / first,
                                    {"DCP_SHARDING_INFO": json.dumps(where)})

    def a_number_of_another_kind(checkpoint, manifest):
        manifest["tensors"]["model"]["norm.running_mean"][1] = [7.0]

    def a_size_of_no_tensor(checkpoint, manifest):
        manifest["tensors"]["optimizer-0"]["state.norm.bias.step"][1] = [2**63, 0]

    def state_missing(checkpoint, manifest):
        for file in (checkpoint / "optimizer-0").iterdir():
            if "state.norm.bias.exp_avg" in tensors_of(file)[0]:
                edit(file, state__norm__bias__exp_avg=None)

    def state_not_described(checkpoint, manifest):
        for file in (checkpoint / "rest").glob("*.json"):
            rest = json.loads(file.read_text())
            rest["optimizers"][0]["states"].pop("norm.bias", None)
            file.write_text(json.dumps(rest))

    def states_edited(change):
        """change: of what rank 0 has described."""
        def edited(checkpoint, manifest):
            file = checkpoint / "rest/rank0.json"
            rest = json.loads(file.read_text())
            change(rest["optimizers"][0])
            file.write_text(json.dumps(rest))

        edited.__name__ = change.__name__
        return edited

    def state_lost_wholly(checkpoint, manifest):
        state_missing(checkpoint, manifest)
        del manifest["tensors"]["optimizer-0"]["state.norm.bias.exp_avg"]
        for file in (checkpoint / "rest").glob("*.json"):
            rest = json.loads(file.read_text())
            rest["optimizers"][0]["states"].get("norm.bias", {}).pop("exp_avg", None)
            file.write_text(json.dumps(rest))

    def state_of_other_shape(checkpoint, manifest):
        for file in (checkpoint / "optimizer-0").iterdir():
            if "state.norm.bias.step" in tensors_of(file)[0]:
                edit(file, state__norm__bias__step=torch.ones(2))
        manifest["tensors"]["optimizer-0"]["state.norm.bias.step"][1] = [2]

    def state_of_other_dtype(checkpoint, manifest):
        for file in (checkpoint / "optimizer-0").iterdir():
            for name, value in tensors_of(file)[0].items():
                if name == "state.norm.bias.exp_avg":
                    edit(file, state__norm__bias__exp_avg=value.to(torch.int8))
        manifest["tensors"]["optimizer-0"]["state.norm.bias.exp_avg"][0] = "int8"

    def option_of_other_type(optimizer):
        for pair in optimizer["groups"][0]["options"]["dict"]:
            if pair[0] == "lr":
                pair[1] = "fast"

    def no_option(optimizer):
        for pair in optimizer["groups"][0]["options"]["dict"]:
            if pair[0] == "lr":
                pair[1] = None

    def option_of_other_length(optimizer):
        for pair in optimizer["groups"][0]["options"]["dict"]:
            if pair[0] == "betas":
                pair[1] = {"tuple": [0.9]}

    def other_number_of_ranks(checkpoint, manifest):
        manifest["world_size"] += 1

    def of_another_optimizer(checkpoint, manifest):
        manifest["tensors"]["optimizer-1"] = {}

    def no_extra(checkpoint, manifest):
        rest = json.loads((checkpoint / "rest/rank0.json").read_text())
        del rest["extra"]
        (checkpoint / "rest/rank0.json").write_text(json.dumps(rest))

    def a_shape_that_is_no_list(checkpoint, manifest):
        manifest["tensors"]["optimizer-0"]["state.norm.bias.step"][1] = ""

    for change, said in ((key_missing, "token.weight"), (one_too_many, "more"),
                         (a_shape_that_is_no_list, "state.norm.bias.step"),
                         (listed_too, "more"), (other_shape, "norm.running_mean"),
                         (other_shape_listed, "norm.running_mean"),
                         (other_dtype, "norm.running_mean"), (overlapping, "token.weight"),
                         (a_number_of_another_kind, "norm.running_mean"),
                         (a_size_of_no_tensor, "state.norm.bias.step"),
                         (state_missing, "state.norm.bias.exp_avg"),
                         (state_not_described, "state.norm.bias.exp_avg"),
                         (state_lost_wholly, "the state 'exp_avg' of 'norm.bias' is missing"),
                         (state_of_other_shape, "'step' of 'norm.bias' is missing, or has"),
                         (state_of_other_dtype, "'exp_avg' of 'norm.bias' is missing, or has"),
                         (states_edited(option_of_other_type), "lr='fast', and here it is 0.01"),
                         (states_edited(no_option), "lr=None, and here it is 0.01"),
                         (states_edited(option_of_other_length), "betas=(0.9,)"),
                         (other_number_of_ranks, "does not say that 3 ranks have written it"),
                         (of_another_optimizer, "optimizer-1"),
                         (no_extra, "rest/rank0.json: 'extra' is missing")):
        path = tmp_path / change.__name__
        shutil.copytree(good, path)
        rewrite(path, change)
        yield str(path), [said]


def test_other_tensors_than_the_model_s_are_named(good, tmp_path):
    cases = [*of_other_content(good, tmp_path)]
    toy.ranks(lambda: [unchanged_by(*case) for case in cases], 2)


def others():
    def another_model(stage):
        model = zero_ref.wrap(toy.build(norm=False), stage)
        return model, torch.optim.Adam(model.parameters())

    def another_optimizer(stage):
        return build(stage, "sgd")

    def two_groups(stage):
        model, _ = build(stage)
        first, *rest = model.parameters()
        return model, torch.optim.Adam([{"params": [first]}, {"params": rest}])

    def other_order(stage):
        model, _ = build(stage)
        return model, torch.optim.Adam(reversed(list(model.parameters())))

    def in_float64(stage):
        with toy.new_tensors_in(torch.float64):
            return build(stage)

    return [(another_model, ["norm.bias"]), (another_optimizer, ["states of Adam", "SGD"]),
            (two_groups, ["group 0 of Adam has 'nothing more' in the place of '"]),
            (other_order, ["group 0 of Adam has '", "' in the place of '"]),
            (in_float64, ["float32", "float64"])]


def test_a_checkpoint_of_another_model_or_optimizer_is_refused(good):
    def load_all():
        for other, said in others():
            unchanged_by(str(good), said, build_other=other)
        model, optimizer = build(2)
        with pytest.raises(ValueError, match="has 1 optimizers, and 2 are to be loaded"):
            zero_ref.load(good, model, [optimizer, optimizer])

    toy.ranks(load_all, 2)


def test_what_users_do_to_optimizers_is_no_damage(tmp_path):
    def changed(kind):
        model = zero_ref.wrap(toy.build(), 2)
        late, *params = model.parameters()
        optimizer = torch.optim.Adam(params[:-2], amsgrad=kind == "amsgrad is switched off")
        optimizer.add_param_group({"params": params[-2:], "lr": 0.5, "mine": []})
        first, second = optimizer.param_groups
        train(model, optimizer, [0])
        if kind == "amsgrad is switched off":
            first["amsgrad"] = second["amsgrad"] = False
            first["params"].append(late)
            train(model, optimizer, [1])  # late has its first gradient, and fewer states
        elif kind == "states of my own":
            for p in params[:3]:
                optimizer.state[p]["ema"] = torch.zeros_like(p)
                optimizer.state[p]["count"] = torch.tensor(3)
        elif kind == "a group is removed":
            del optimizer.param_groups[1]
        elif kind == "options of my own":
            first["lr"], second["mine"] = numpy.float64(0.25), ["a", 1]
        return model, optimizer

    def save_and_load(kind):
        model, optimizer = changed(kind)
        zero_ref.save(tmp_path / kind, model, optimizer)
        other, its_optimizer = changed(kind)
        for group in its_optimizer.param_groups:
            group |= {"lr": 0.1} | ({"mine": []} if "mine" in group else {})
        zero_ref.load(tmp_path / kind, other, its_optimizer)
        for group, same in zip(optimizer.param_groups, its_optimizer.param_groups):
            assert all(group[key] == same[key] for key in group if key != "params")
        for run in (model, optimizer), (other, its_optimizer):
            train(*run, [2])
        assert toy.equal(model.state_dict(), other.state_dict(), toy.LOCAL)

    kinds = ["amsgrad is switched off", "states of my own", "a group is removed",
             "options of my own"]
    toy.ranks(lambda: [save_and_load(kind) for kind in kinds], 2)


class Runs:
    """A pickle of it writes a file where it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def hostile(good, tmp_path):
    first = "model/rank0-0.safetensors"
    marker, outside = tmp_path / "marker", tmp_path / "outside.safetensors"
    shutil.copyfile(good / "checkpoint-000002" / first, outside)

    def a_pickle(checkpoint, manifest):
        torch.save(Runs(marker), checkpoint / first)

    def a_pickle_for_json(checkpoint, manifest):
        torch.save(Runs(marker), checkpoint / "rest/rank0.json")

    def traversal(checkpoint, manifest):
        manifest["files"]["model/../../../outside.safetensors"] = {"bytes": 1, "sha256": ""}

    def absolute(checkpoint, manifest):
        manifest["files"][str(outside)] = {"bytes": 1, "sha256": ""}

    def a_link(checkpoint, manifest):
        (checkpoint / first).unlink()
        (checkpoint / first).symlink_to(outside)

    def a_linked_folder(checkpoint, manifest):
        shutil.move(checkpoint / "model", checkpoint.parent / "elsewhere")
        (checkpoint / "model").symlink_to(checkpoint.parent / "elsewhere")

    def a_pipe(checkpoint, manifest):
        (checkpoint / first).unlink()
        os.mkfifo(checkpoint / first)

    def header_bomb(checkpoint, manifest):
        (checkpoint / first).write_bytes((2**40).to_bytes(8, "little") + b"{}")

    def huge_header(checkpoint, manifest):
        with open(checkpoint / first, "wb") as file:
            file.write((2**33).to_bytes(8, "little") + b"{")
            file.truncate(2**33 + 8)  # sparse

    def huge_shape(checkpoint, manifest):
        header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}})
        (checkpoint / first).write_bytes(len(header).to_bytes(8, "little") + header.encode() +
                                         bytes(4))

    def huge_in_the_manifest(checkpoint, manifest):
        manifest["tensors"]["model"]["token.weight"][1] = [2**40, 7]

    def deep_json(checkpoint, manifest):
        (checkpoint / "rest/rank0.json").write_text("[" * 100_000)

    def many_values(checkpoint, manifest):
        (checkpoint / "rest/rank0.json").write_bytes(b"[" + b"[]," * 2_000_001 + b"[]]")

    def deep_extra(checkpoint, manifest):
        file = checkpoint / "rest/rank0.json"
        rest = json.loads(file.read_text())
        rest["extra"] = {"deep": None}
        file.write_text(json.dumps(rest).replace("null", "[" * 900 + "]" * 900))

    def deep_metadata(checkpoint, manifest):
        tensors, _ = tensors_of(checkpoint / first)
        safetensors.torch.save_file(tensors, checkpoint / first,
                                    {"DCP_SHARDING_INFO": "[" * 100_000})

    def no_tensor_of_a_generator(checkpoint, manifest):
        file = checkpoint / "rest/rank1.json"
        file.write_text(re.sub(r'"tensor": "\d+"', '"tensor": "77"', file.read_text()))

    def other_options(checkpoint, manifest):
        file = checkpoint / "rest/rank0.json"
        rest = json.loads(file.read_text())
        rest["optimizers"][0]["groups"][0]["options"] = {"dict": [["params", []]]}
        file.write_text(json.dumps(rest))

    def other_generators(checkpoint, manifest):
        file = checkpoint / "rest/rank1.json"
        rest = json.loads(file.read_text())
        rest["generators"] = {"dict": [["torch", 3]]}
        file.write_text(json.dumps(rest))

    def a_generator_that_reads_beyond_its_numbers(checkpoint, manifest):
        file = checkpoint / "rest/rank1.json"
        text = file.read_text()
        file.write_text(re.sub(r'\["pos", \d+\]', '["pos", 5000]', text))
        assert file.read_text() != text

    def a_pipe_that_is_not_listed(checkpoint, manifest):
        del manifest["files"]["rest/rank0.safetensors"]
        (checkpoint / "rest/rank0.safetensors").unlink()
        os.mkfifo(checkpoint / "rest/rank0.safetensors")

    def twice_in_a_header(checkpoint, manifest):
        tensor = '"token.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
        header = f"{{{tensor}, {tensor}}}"
        (checkpoint / first).write_bytes(len(header).to_bytes(8, "little") + header.encode() +
                                         bytes(4))

    said = {many_values: "rest/rank0.json is no JSON of a checkpoint: it has more than 4,000,000",
            deep_extra: "rest/rank0.json: too deep",
            no_tensor_of_a_generator: "rest/rank1.safetensors has no '77'"}
    for change in (a_pickle, a_pickle_for_json, traversal, absolute, a_link, a_linked_folder,
                   a_pipe, header_bomb, huge_shape, huge_in_the_manifest, twice_in_a_header,
                   deep_json, many_values, deep_extra, deep_metadata, no_tensor_of_a_generator,
                   other_options, other_generators, a_pipe_that_is_not_listed,
                   a_generator_that_reads_beyond_its_numbers):
        path = tmp_path / change.__name__
        shutil.copytree(good, path)
        rewrite(path, change)
        yield str(path), [str(path), said.get(change, "")]
    path = tmp_path / "huge_header"  # too large to be hashed here
    shutil.copytree(good, path)
    huge_header(path / "checkpoint-000002", None)
    yield str(path), [first]
    path = tmp_path / "twice in the manifest"
    shutil.copytree(good, path)
    file = path / "checkpoint-000002" / "manifest.json"
    file.write_text(file.read_text().replace('"files": {', f'"files": {{"{first}": {{}},', 1))
    yield str(path), ["a name is there twice"]


def test_a_hostile_checkpoint_runs_nothing_allocates_nothing_and_writes_nothing(good, tmp_path):
    cases = [*hostile(good, tmp_path)]
    assert len(cases) == 22

    def load_all():
        return max(most_bytes(torch.device("cpu"), lambda case=case: unchanged_by(*case))
                   for case in cases)

    before = sorted(path for path in tmp_path.rglob("*"))
    for peak in toy.ranks(load_all, 2):
        assert peak < 10**6
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert not (tmp_path / "marker").exists()


# ---- never half of one ---------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["one rank", "all ranks"])
def test_ranks_that_are_killed_leave_no_half_checkpoint(tmp_path, who):
    kills.kill_while_saving(tmp_path, who, moments=[0.0, 0.01])


def test_the_newest_that_was_committed_is_loaded_and_old_ones_go(tmp_path):
    def save_and_load():
        model, optimizer = build(2)
        for step in range(4):
            train(model, optimizer, [step])
            zero_ref.save(path, model, optimizer, keep=2, step=step)
        dist.barrier()
        (Path(path) / ".writing-000009").mkdir(exist_ok=True)
        (Path(path) / "checkpoint-x").mkdir(exist_ok=True)
        (Path(path) / "latest").unlink(missing_ok=True)
        dist.barrier()
        newest = zero_ref.load(path, model, optimizer)["step"]
        named = zero_ref.load(f"{path}/checkpoint-000003", model, optimizer)["step"]
        with pytest.raises(ValueError, match="never committed"):
            zero_ref.load(f"{path}/.writing-000009", model, optimizer)
        with pytest.raises(ValueError, match="is a checkpoint itself"):
            zero_ref.save(f"{path}/checkpoint-000003", model, optimizer)
        saved = zero_ref.save(path, model, optimizer).wait()
        return newest, named, str(saved)

    path = str(tmp_path)
    for newest, named, saved in toy.ranks(save_and_load, 2):
        assert (newest, named) == (3, 2) and saved == f"{path}/checkpoint-000005"
    found = {p.name for p in tmp_path.iterdir()}
    assert found == {"checkpoint-000003", "checkpoint-000004", "checkpoint-000005", "checkpoint-x",
                     "latest"}


def test_what_is_no_folder_is_not_taken_for_an_empty_one(tmp_path):
    """Or a run would start anew, and its saves remove what is there."""
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / ".writing-000002-x").mkdir()
    (tmp_path / ".writing-000002-x/manifest.json").write_text("{}")

    def load():
        model, optimizer = build(1)
        for name, kind, said in (("file", OSError, "Not a directory"), ("loop", OSError, "levels"),
                                 (".writing-000002-x", ValueError, "never committed")):
            with pytest.raises(kind, match=said):
                zero_ref.load(tmp_path / name, model, optimizer)

    toy.ranks(load, 2)


@pytest.mark.parametrize(("path", "said"), [
    ("nowhere", "there is no such folder"), ("", "no checkpoint was committed there")])
def test_no_checkpoint_is_said(tmp_path, path, said):
    def start_or_go_on():
        unchanged_by(str(tmp_path / path), [said])
        with pytest.raises(zero_ref.NoCheckpoint, match=said):  # on every rank
            zero_ref.load(tmp_path / path, *build(1))

    toy.ranks(start_or_go_on, 2)


def save_fails(path, how, asynchronous):
    """Returns what is said, on a disk with room for less than this rank's shard."""
    import resource
    import signal

    model = zero_ref.wrap(nn.Linear(400, 400), 1)
    optimizer = torch.optim.Adam(model.parameters())
    zero_ref.save(path, model, optimizer, step=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        # With room for what the ranks meet by, a file that grows with each group.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            saving = zero_ref.save(path, model, optimizer, asynchronous=asynchronous)
            if asynchronous:
                zero_ref.save(path, model, optimizer)
            saving.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert zero_ref.load(path, model, optimizer) == {"step": 0}
    zero_ref.save(path, model, optimizer, step=1)
    assert zero_ref.load(path, model, optimizer) == {"step": 1}
    return str(caught.value)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_said_on_every_rank_and_the_last_checkpoint_stays(tmp_path, asynchronous):
    for said in toy.ranks(save_fails, 2, str(tmp_path), "full", asynchronous):
        assert "/model/rank1-" in said and "File too large" in said
    assert len(folder.committed(tmp_path)) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_said(tmp_path):
    def save():
        model, optimizer = build(1)
        with pytest.raises(OSError, match="Permission denied"):
            zero_ref.save(tmp_path / "new", model, optimizer)

    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    toy.ranks(save, 2)


def save_meanwhile(path):
    model, optimizer = build(3)
    train(model, optimizer, range(2))
    then = model.state_dict()
    saving = zero_ref.save(path, model, optimizer, asynchronous=True, step=torch.tensor(2))
    train(model, optimizer, range(2, 6))
    saving.wait()
    zero_ref.load(path, model, optimizer)
    assert toy.equal(model.state_dict(), then, toy.LOCAL)
    saving = zero_ref.save(path, model, optimizer, asynchronous=True)
    return str(zero_ref.save(path, model, optimizer).wait()), str(saving.wait())


def test_an_asynchronous_save_has_the_values_of_its_moment(tmp_path):
    for found in toy.ranks(save_meanwhile, 2, str(tmp_path)):
        assert found == (f"{tmp_path}/checkpoint-000003", f"{tmp_path}/checkpoint-000002")


class Raises:
    def state_dict(self):
        raise TypeError("on purpose")


def save_with_problems(path):
    model, optimizer = build(3)
    first = dist.get_rank() == 0
    with pytest.raises(TypeError if first else ValueError, match="on purpose"):
        zero_ref.save(path, model, optimizer, x=Raises())
    with model.full_params():
        for call in (zero_ref.save, zero_ref.load):
            with pytest.raises(ValueError, match="outside of it"):
                call(path, model, optimizer)
    with pytest.raises(ValueError, match="to be the optimizer, or a list of optimizers, and is N"):
        zero_ref.save(path, model, None)
    with pytest.raises(ValueError, match="the third argument"):
        zero_ref.load(path, model, optimizer.state_dict())
    for call in (zero_ref.save, zero_ref.load):
        with pytest.raises(ValueError, match=r"what zero_ref\.wrap.* returns, and is a Linear"):
            call(path, nn.Linear(2, 2), optimizer)
    other, its_optimizer = build(1)  # as large, and into the same folder
    with torch.no_grad():
        for p in other.parameters():
            p.fill_(2)
    zero_ref.save(path, model, optimizer, asynchronous=True, whose="model")
    zero_ref.save(path, other, its_optimizer, asynchronous=True, whose="other")
    assert zero_ref.load(path, model, optimizer) == {"whose": "other"}
    assert zero_ref.load(f"{path}/checkpoint-000001", other, its_optimizer) == {"whose": "model"}
    assert not (other.state_dict()["token.weight"] == 2).all()


def test_problems_of_one_rank_and_two_models_in_one_folder(tmp_path):
    toy.ranks(save_with_problems, 2, str(tmp_path))
    assert len(folder.committed(tmp_path)) == 2


@pytest.mark.parametrize("keep", [0, -1, 1.5, True])
def test_keep_is_a_number_of_checkpoints(tmp_path, keep):
    def save():
        model, optimizer = build(0)
        with pytest.raises(ValueError, match="must be a number of checkpoints"):
            zero_ref.save(tmp_path, model, optimizer, keep=keep)

    toy.ranks(save, 1)
    assert not [*tmp_path.iterdir()]


def test_a_directory_in_the_place_of_latest_is_said_before_anything_is_written(tmp_path):
    (tmp_path / "latest").mkdir()

    def save():
        model, optimizer = build(2)
        with pytest.raises(ValueError, match="latest is a directory"):
            zero_ref.save(tmp_path, model, optimizer)

    toy.ranks(save, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_a_tensor_among_the_options_of_a_group_comes_back(tmp_path):
    def save_and_load():
        model, _ = build(1)
        optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.5))
        zero_ref.save(tmp_path, model, optimizer)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
        zero_ref.load(tmp_path, model, optimizer)
        return optimizer.param_groups[0]["lr"]

    assert all(torch.equal(lr, torch.tensor(0.5)) for lr in toy.ranks(save_and_load, 2))


def gone_meanwhile(path):
    model, optimizer = build(1)
    write = shards.write

    def write_too_late(*args):
        shards.write = write
        dist.barrier()  # all have found their folder
        if dist.get_rank() == 0:
            folder.begin(Path(path))  # as another run's save does, whose folder is not this one
        dist.barrier()
        return write(*args)

    shards.write = write_too_late
    with pytest.raises(OSError, match="another run saves in this folder, too"):
        zero_ref.save(path, model, optimizer)


def cleared_meanwhile(path):
    """Another run's save has cleared half of what this one commits."""
    model, optimizer = build(1)
    commit, rmtree = folder.commit, shutil.rmtree

    def commit_late(aside, manifest, keep):
        def half(left, ignore_errors):
            (left / "model/rank0-0.safetensors").unlink()
            commit(aside, manifest, keep)

        shutil.rmtree = half
        folder.begin(Path(path))

    folder.commit = commit_late
    try:
        with pytest.raises(OSError, match="No such file"):
            zero_ref.save(path, model, optimizer)
    finally:
        folder.commit, shutil.rmtree = commit, rmtree


def test_two_runs_in_one_folder_are_told(tmp_path):
    for meanwhile in (gone_meanwhile, cleared_meanwhile):
        toy.ranks(meanwhile, 2, str(tmp_path))
        assert not folder.committed(tmp_path)


def on_disk(path):
    """What a save does with files, in its order: (name of the call, path)."""
    model, optimizer = build(2)
    train(model, optimizer, [0])
    zero_ref.save(path, model, optimizer)
    done = []
    really = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def noted(name):
        def call(what, *to):
            done.append((name, os.readlink(f"/proc/self/fd/{what}") if name == "fsync" else
                         str(what)))
            return really[name](what, *to)
        return call

    try:
        for name in really:
            setattr(os, name, noted(name))
        zero_ref.save(path, model, optimizer, keep=1)
    finally:
        for name, call in really.items():
            setattr(os, name, call)
    return done


def test_all_is_on_disk_before_it_is_committed_and_old_ones_go_last(tmp_path):
    by_rank = toy.ranks(on_disk, 2, str(tmp_path))
    final = tmp_path / "checkpoint-000002"
    commit, aside = next((number, path) for number, (name, path) in enumerate(by_rank[0])
                         if name == "rename")
    synced = {path for name, path in [*by_rank[0][:commit], *by_rank[1]] if name == "fsync"}
    written = {str(path).replace(str(final), aside) for path in [final, *final.rglob("*")]}
    assert written <= synced and len(written) > 10
    after = [(name, path.removeprefix(f"{tmp_path}")) for name, path in by_rank[0][commit + 1 :]]
    assert after == [("fsync", ""), ("fsync", "/.latest"), ("replace", "/.latest"), ("fsync", ""),
                     ("rename", "/checkpoint-000001")]


def read_at_load(path, stage):
    model, optimizer = build(stage)
    read = []
    part = shards._part

    def noted(file, name, box):
        read.append(math.prod(box.sizes))
        return part(file, name, box)

    try:
        shards._part = noted
        zero_ref.load(path, model, optimizer)
    finally:
        shards._part = part
    own = sum(p.numel() for p in model.parameters())
    return sum(read), own, sum(buffer.numel() for buffer in model.module.buffers())


@pytest.mark.parametrize("stage", [1, 3])
def test_load_reads_this_rank_s_elements_alone(good, stage):
    for read, own, buffers in toy.ranks(read_at_load, 4, str(good), stage):
        tied, steps = toy.VOCAB * 7, 10  # of a tied parameter both names are read, and compared
        assert 3 * own <= read <= 3 * own + tied + buffers + steps


def load_nan(path):
    model, optimizer = build(2)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    zero_ref.save(path, model, optimizer)
    other, its_optimizer = build(3)
    zero_ref.load(path, other, its_optimizer)
    return other.state_dict()["head.weight"]


def test_what_is_not_a_number_is_loaded_under_both_names(tmp_path):
    for weight in toy.ranks(load_nan, 2, str(tmp_path)):
        assert weight.isnan().all()


def load_untied(path):
    model = zero_ref.wrap(toy.build(), 3)
    optimizer = torch.optim.Adam(model.parameters())
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"'token\.weight' and 'head\.weight' are one parameter"):
        zero_ref.load(path, model, optimizer)
    assert toy.equal(model.state_dict(), before)


def test_names_of_a_tied_parameter_have_the_same_values(tmp_path):
    weights = {name: value.clone() for name, value in toy.build().state_dict().items()}
    weights["head.weight"][-1, -1] += 1
    safetensors.torch.save_file(weights, tmp_path / "untied.safetensors")
    import_([tmp_path / "untied.safetensors"], tmp_path / "a")
    toy.ranks(load_untied, 2, str(tmp_path / "a"))


def save_one_optimizer_less(path):
    model = zero_ref.wrap(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), 1)
    first, second, *others = model.parameters()
    optimizers = [torch.optim.Adam([first, second]), torch.optim.Adam(others)]
    model(torch.ones(2, 3)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    with pytest.raises(ValueError, match="do all ranks save the same optimizers"):
        zero_ref.save(path, model, optimizers[: 2 - dist.get_rank()])


def test_folders_that_ranks_do_not_share_and_too_many_tensors_are_said(good, tmp_path):
    def save_in_my_own():
        model, optimizer = build(1)
        mine = tmp_path / str(model.rank) / "checkpoints"
        shutil.copytree(good, mine)
        file = mine / "checkpoint-000002/manifest.json"
        file.write_text(file.read_text() + " " * model.rank)

        def of_this_disk(*args):  # as if each had one of its own, and that at the same path
            found = agree(*args)
            return [str(file.parent)] * len(found) if isinstance(found[0], str) else found

        with (mock.patch.object(loading, "agree", of_this_disk),
              pytest.raises(ValueError, match="is not the same on all ranks")):
            zero_ref.load(mine, model, optimizer)
        shutil.rmtree(mine)
        with pytest.raises(OSError, match=r"rank 1 does not find .*, which rank 0 has made: save "
                                          "needs a folder that all ranks share"):
            zero_ref.save(tmp_path / str(model.rank), model, optimizer)
        with (mock.patch.object(shards, "_LARGEST_HEADER", 200),
              pytest.raises(OSError, match=r"tensors are too many for the header of a file")):
            zero_ref.save(tmp_path / "shared", model, optimizer)

    toy.ranks(save_in_my_own, 2)
    assert not [*tmp_path.rglob("checkpoint-*")] and not [*tmp_path.rglob(".writing-*")]


def test_what_would_not_load_is_not_committed(tmp_path):
    toy.ranks(save_one_optimizer_less, 2, str(tmp_path))
    assert not [*tmp_path.iterdir()]


def test_an_optimizer_of_something_else_is_refused(tmp_path):
    def save():
        model, _ = build(1)
        other = torch.optim.Adam([*model.parameters(), nn.Parameter(torch.ones(2))])
        with pytest.raises(ValueError, match="a parameter that is not of this model"):
            zero_ref.save(tmp_path, model, other)

    toy.ranks(save, 2)
    assert not [*tmp_path.iterdir()]


# ---- under torchrun ------------------------------------------------------------------------------


def stop_when_asked(wait):
    with zero_ref.on_sigterm() as stop:
        before = stop.agreed()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(wait)
        stopped = stop.agreed()
    return before, stopped, inside


@pytest.mark.parametrize("wait", [0, 0.1])
def test_sigterm_is_agreed_on_and_the_process_goes_on(wait):
    for before, stopped, left in toy.ranks(stop_when_asked, 2, wait):
        assert (before, stopped, left) == (False, True, [])


def stop_at_once():
    really = signal.signal

    def and_it_comes(number, handler):
        before = really(number, handler)
        if signal.signal is and_it_comes:
            signal.signal = really
            os.kill(os.getpid(), signal.SIGTERM)
        return before

    signal.signal = and_it_comes
    with zero_ref.on_sigterm() as stop:
        return stop.agreed()


def test_sigterm_that_comes_as_soon_as_it_is_waited_for():
    assert toy.ranks(stop_at_once, 1) == [True]


@pytest.mark.parametrize(("kind", "workers", "then"), [("kill", 0, 2), ("stop", 1, 3)])
def test_a_run_survives(tmp_path, kind, workers, then):
    """The other kinds, and more of these, are in faults.py."""
    assert faults.survived(tmp_path, 2, 2, kind, at=7, rank=1, workers=workers, then=then,
                           run_again=faults.run_here) == 0


def test_a_run_goes_on_with_fewer_ranks_and_with_more(tmp_path, capsys):
    (tmp_path / "model.py").write_text(faults.MODEL)
    options = ["train", "--model", str(tmp_path / "model.py"), "--checkpoint-dir",
               str(tmp_path / "saved"), "--checkpoint-every", "3"]
    for steps, stage, world_size in ((3, 1, 3), (6, 3, 2), (8, 0, 4)):
        assert main([*options, "--stage", str(stage), "--world-size", str(world_size), "--steps",
                     str(steps)]) == 0
    assert "8 steps from step 6 on" in capsys.readouterr().out
    assert main([*options, "--stage", "1", "--steps", "8", "--world-size", "2"]) == 0
    assert "8 steps from step 8 on" in capsys.readouterr().out  # nothing was left to do
    assert main([*options, "--stage", "1", "--steps", "7"]) == 2
    assert "has a checkpoint of step 8 already" in capsys.readouterr().err


def test_the_picture_shows_every_box(tmp_path):
    toy.ranks(save_plain, 3, str(tmp_path))
    picture = viz.boxes(tmp_path, ["0.weight", "0.bias"])
    labels = [text.get_text() for ax in picture.figure.axes for text in ax.texts]
    drawn = [(p.get_y(), p.get_x(), p.get_height(), p.get_width())
             for p in picture.figure.axes[0].patches]
    assert sum(high * wide for *_, high, wide in drawn) == 35 and "rank0-0" in labels
    assert picture.text.startswith("0.weight: rank0-0 has (")
    with pytest.raises(ValueError, match="there is no such folder"):
        viz.boxes(tmp_path / "nothing", ["0.weight"])
