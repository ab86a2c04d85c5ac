"""A check that the other tests can fail: break the engine in one place, and a promise breaks."""

from functools import cache
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import toy

from zero_ref import RankError, comm, memory
from zero_ref.engine.placeholder import show_in_module
from zero_ref.partition import Layout
from zero_ref.stage1 import Stage1
from zero_ref.stage2 import Stage2
from zero_ref.stage3 import Stage3

N = 3
PLAIN = {"norm": False}


# ---- the comparisons themselves ------------------------------------------------------------------


REFERENCE = {"w": torch.tensor([-4.0, 1.0], dtype=torch.float64), "count": torch.tensor(3),
             "zero": torch.zeros(2, dtype=torch.float64)}


@pytest.mark.parametrize("name, change, is_close", [
    ("w", 3e-10, True), ("w", 5e-10, False), ("w", float("nan"), False),
    ("zero", 3e-10, True), ("zero", 5e-10, False), ("count", 1, False),
])
def test_close_tells_a_mistake_from_rounding(name, change, is_close):
    ours = {**REFERENCE, name: REFERENCE[name] + change}
    assert toy.close(ours, REFERENCE) == is_close


def test_close_looks_at_names_shapes_and_dtypes():
    for other in ({"w": REFERENCE["w"]}, {**REFERENCE, "count": torch.tensor(3.0)},
                  {**REFERENCE, "zero": torch.zeros(1, dtype=torch.float64)}):
        assert not toy.close(other, REFERENCE)
    with pytest.raises(AssertionError, match="rounding in fp32 depends on the machine"):
        toy.close({"w": torch.ones(1)}, {"w": torch.ones(1)})


@pytest.mark.parametrize("kind, who", [("weights", "stage"), ("weights", "rank"),
                                       ("losses", "stage"), ("norms", "rank")])
def test_stages_that_differ_do_not_agree(kind, who):
    def run(stage):
        result = {"weights": {"w": torch.ones(1)}, "losses": [0.5], "norms": [torch.tensor(2.0)]}
        if stage == 2 if who == "stage" else torch.distributed.get_rank() == 1:
            result[kind] = {"w": torch.zeros(1)} if kind == "weights" else [1.0]
        return result

    with pytest.raises(AssertionError, match=r"\([0-3], [0-2]\)"):
        toy.stages_agree(run, N)


# ---- the engine ----------------------------------------------------------------------------------


def broken(patch, *args):
    """toy.run on a rank, with the engine patched there."""
    with patch():
        return toy.run(*args, toy=PLAIN, bucket_cap_mb=0)


def run_broken(patch, stage):
    return toy.ranks(broken, N, patch, stage, "sgd", dtype=torch.float64)


@cache
def right():
    return toy.in_float64(toy.single_process, "sgd", world_size=N, toy=PLAIN)


def right_weights(run):
    return toy.close(run["weights"], right())


def right_bytes(run, stage, moment="after_backward"):
    expected = memory.model_states(run["sizes"], N, stage, param_dtype=torch.float64,
                                   grad_dtype=torch.float64)
    expected["parameters"] += 8 * toy.padded(run["frozen"], N, 8) // (N if stage == 3 else 1)
    return all(run[moment][kind] == expected[kind] for kind in ("parameters", "gradients"))


def nothing():
    return mock.patch.object(comm, "_sum", comm._sum)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_unbroken(stage):
    runs = run_broken(nothing, stage)
    assert all(right_weights(run) and right_bytes(run, stage) for run in runs)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_without_the_division_by_world_size(stage):
    def undivided():
        intact = comm._sum
        return mock.patch.object(comm, "_sum", lambda parts, out, _: intact(parts, out, 1))

    runs = run_broken(undivided, stage)
    assert not any(right_weights(run) for run in runs)


def without_one_reduction():
    intact = comm._reduce_scatter
    calls = []

    def skip_second(outs, flats, group, divide_by, op):
        calls.append(1)
        if len(calls) != 2:
            yield from intact(outs, flats, group, divide_by, op)
            return
        yield []  # nothing to wait for
        for out, flat in zip(outs, flats):
            torch.div(comm.rank_slice(flat, group), divide_by, out=out)

    return mock.patch.object(comm, "_reduce_scatter", skip_second)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_without_one_reduction(stage):
    assert not any(right_weights(run) for run in run_broken(without_one_reduction, stage))


@pytest.mark.parametrize("stage", [1, 2])
def test_without_the_gather_after_the_step(stage):
    runs = run_broken(lambda: mock.patch.object(Stage1, "_after_step", lambda self, units: None),
                      stage)
    assert not any(right_weights(run) for run in runs)


def without_padding():
    """The remainder is dropped where sizes do not divide."""
    intact = Layout.__init__

    def truncated(self, *args):
        intact(self, *args)
        self.shard_numel = self.numel // N
        self.padded_numel = self.shard_numel * N

    return mock.patch.object(Layout, "__init__", truncated)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_without_padding(stage):
    # 77 parameters do not fit into 3 slices of 25.
    with pytest.raises(RankError, match=r"shape '\[11, 7\]' is invalid for input of size 75"):
        run_broken(without_padding, stage)


@pytest.mark.parametrize("stage", [2, 3])
def test_without_freeing_gradients(stage):
    def keep():
        return mock.patch.object(Stage2, "_reduce_into", Stage1._reduce_into)

    runs = run_broken(keep, stage)
    assert all(right_weights(run) for run in runs)  # nothing but memory can tell
    assert not any(right_bytes(run, stage) for run in runs)


def test_without_freeing_gathered_parameters():
    def keep(self, unit):
        if unit.gathered:
            show_in_module(unit, unit.placeholders)
            unit.gathered = False

    runs = run_broken(lambda: mock.patch.object(Stage3, "_reshard", keep), 3)
    assert all(right_weights(run) for run in runs)
    assert not any(right_bytes(run, 3) for run in runs)


def test_with_a_sum_in_another_order_the_bits_change():
    def own_first(parts, out, divide_by):
        others = parts[1:] if dist.get_rank() else parts[:0:-1]
        out.copy_(sum(others, parts[0]) / divide_by)

    runs = run_broken(lambda: mock.patch.object(comm, "_sum", own_first), 1)
    intact = run_broken(nothing, 1)
    assert all(right_weights(run) for run in runs)
    assert not toy.equal(runs[0]["weights"], intact[0]["weights"])
