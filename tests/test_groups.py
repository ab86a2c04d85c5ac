"""Process groups other than the default one, and backends."""

import torch
import torch.distributed as dist
import toy
from torch import nn
from toy import STAGES

import zero_ref


def test_a_backend_by_device():
    def run():
        return dist.get_backend_config(), toy.run_stages(STAGES)

    ours = toy.ranks(run, 3)
    by_device = zero_ref.launch(run, 3, backend="cpu:gloo")
    for (config, a), (config_by_device, b) in zip(ours, by_device):
        assert config_by_device == "cpu:gloo" != config
        assert all(toy.equal(x["weights"], y["weights"]) for x, y in zip(a, b))
        assert all(x["wire_bytes"] == y["wire_bytes"] for x, y in zip(a, b))


def in_a_subgroup(stage):
    groups = [dist.new_group([0]), dist.new_group([1, 2])]
    rank = dist.get_rank()
    model = zero_ref.wrap(toy.build(rank, norm=False), stage, process_group=groups[rank > 0])
    opt = torch.optim.Adam(model.parameters())
    for step in range(2):
        x, y = toy.batch(step, rank)
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    return model.state_dict()


def test_process_groups():
    by_stage = [toy.ranks(in_a_subgroup, 3, stage) for stage in STAGES]
    for alone, one, two in by_stage:
        assert toy.equal(one, two) and not toy.equal(alone, one)
        assert toy.equal(one, by_stage[0][1]) and toy.equal(alone, by_stage[0][0])
