"""What the engine computes without sending anything: no ranks are needed to try it."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from zero_ref import comm
from zero_ref.engine.backward import nobody_had_it
from zero_ref.engine.buckets import buckets
from zero_ref.engine.calls import Pass
from zero_ref.engine.precision import own_precision
from zero_ref.engine.tree import map_tensors, tensors_in
from zero_ref.partition import FULL, SHARD, Keeps, Layout, lay_out

# ---- where parameters lie ------------------------------------------------------------------------


def test_parameters_and_slices_begin_at_16_bytes():
    layout = Layout([10, 3], world_size=2, itemsize=4)  # four elements of fp32 are 16 bytes
    assert layout.starts == [0, 12]
    assert (layout.numel, layout.shard_numel, layout.padded_numel) == (13, 8, 16)
    # Rank 0 owns the first eight elements of the first, rank 1 its last two and the second.
    assert [layout.span(0, rank) for rank in range(2)] == [(0, 8), (8, 10)]
    assert [layout.span(1, rank) for rank in range(2)] == [(0, 0), (0, 3)]


@pytest.mark.parametrize("itemsize, step", [(16, 1), (8, 2), (4, 4), (2, 8), (1, 16)])
def test_the_narrowest_buffer_decides(itemsize, step):
    layout = Layout([1, 1, 1], world_size=2, itemsize=itemsize)
    assert layout.starts == [0, step, 2 * step] and layout.shard_numel % step == 0


@pytest.mark.parametrize("sizes", [[1], [0], [5, 0, 7], [56, 8, 56, 1], [4, 4], [3] * 9, [100_003]])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_every_element_has_one_owner(sizes, world_size):
    layout = Layout(sizes, world_size, itemsize=4)
    for index, size in enumerate(sizes):
        spans = [layout.span(index, rank) for rank in range(world_size)]
        owned = [element for begin, end in spans for element in range(begin, end)]
        assert owned == list(range(size))
    assert layout.padded_numel - layout.numel < 4 * (len(sizes) + world_size)


def units_of(module, rank=0, world_size=2, keeps=None):
    found = lay_out(module, None, own_precision, rank, world_size)
    for unit in found if keeps else ():
        unit.flatten()
        unit.keep(keeps)
    return found


def test_the_modules_parameters_are_views_of_the_flat_buffer():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    values = [p.detach().clone() for p in net.parameters()]
    first, second = units_of(net, keeps=Keeps(params=FULL, grads=FULL, states=FULL))
    assert first.starts == [0, 8] and first.padded_numel == 16 and second.padded_numel == 8
    assert torch.equal(first.flat[:6], values[0].flatten())
    first.flat.fill_(7.0)
    assert all((p == 7).all() for p in net[0].parameters())
    assert torch.equal(net[1].weight, values[2])


@pytest.mark.parametrize("params", [FULL, SHARD])
def test_the_optimizer_sees_what_its_rank_owns(params):
    keeps = Keeps(params=params, grads=FULL, states=SHARD)
    net = nn.Linear(3, 2)
    weight, bias = (p.detach().clone().flatten() for p in net.parameters())
    (unit,) = units_of(net, rank=1, keeps=keeps)
    assert [p.tolist() for p in unit.master_params] == [[], bias.tolist()]  # rank 0 has the weight
    unit.master_params[1].data.fill_(5.0)
    assert (net.bias == 5).all() == (params == FULL)  # a shard has memory of its own
    assert torch.equal(net.weight.flatten(), weight)


def test_a_parameter_may_be_viewed_as_complex():
    """Which wants an even offset."""
    net = nn.Module()
    net.odd, net.pairs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 2))
    units_of(net, keeps=Keeps(params=FULL, grads=FULL, states=FULL))
    assert torch.view_as_complex(net.pairs).shape == (4,)
    assert all(p.data_ptr() % 16 == net.odd.data_ptr() % 16 for p in net.parameters())


# ---- messages ------------------------------------------------------------------------------------


FLAT = torch.empty(0)  # on one device


@dataclass(frozen=True)
class Sized:
    name: str
    padded_numel: int
    dtype: torch.dtype = torch.float32
    flat: torch.Tensor = FLAT


def shared(cap, *units):
    return [bucket.name for bucket in buckets(units, cap, lambda unit: unit.dtype)]


def test_neighbours_share_messages_up_to_a_size():
    a, b, c, large = Sized("a", 10), Sized("b", 10), Sized("c", 5), Sized("large", 100)
    assert shared(80, a, b, c) == ["a+b", "c"]
    assert shared(100, a, b, c) == ["a+b+c"]
    assert shared(100, a, large, b, c) == ["a", "large", "b+c"]  # neighbours only
    assert shared(0, a, b, c) == ["a", "b", "c"]
    assert shared(80, a, Sized("half", 5, torch.bfloat16), b) == ["a", "half", "b"]


def test_a_sum_goes_from_left_to_right():
    """1 disappears beside 1e8 in fp32, so the order of a sum can be seen."""
    parts = [torch.tensor([value]) for value in (1e8, 1.0, -1e8)]
    out = torch.empty(1)
    comm._sum([part.clone() for part in parts], out, divide_by=1)
    assert out.item() == 0.0
    comm._sum([parts[0].clone(), parts[2].clone(), parts[1].clone()], out, divide_by=2)
    assert out.item() == 0.5


@pytest.mark.parametrize("numel", [1, comm._CACHED - 1, comm._CACHED, 2 * comm._CACHED + 3])
def test_a_sum_may_lie_where_a_part_was(numel):
    parts = [torch.full((numel,), float(value)) for value in (1, 2, 3)]
    comm._sum(parts, parts[1], divide_by=3)
    assert (parts[1] == 2).all()


def test_negative_zeros_say_that_nobody_had_a_gradient():
    def mean(*values):
        out = torch.empty(1)
        comm._sum([torch.tensor([value]) for value in values], out, divide_by=len(values))
        return out

    assert nobody_had_it(mean(-0.0, -0.0, -0.0))
    assert not nobody_had_it(mean(-0.0, 0.0, -0.0))
    assert not nobody_had_it(mean(1.0, -0.0, -1.0))


# ---- what comes next -----------------------------------------------------------------------------


@dataclass(eq=False)
class Gathered:
    module: str
    resharded: bool = True


def test_what_came_last_time_comes_again():
    units = {name: [Gathered(name)] for name in "abc"}
    order = Pass()
    for name in "abc":
        order.now.append(name)
        assert order.next_resharded(units) == []  # not known yet
    order.begin()
    order.now.append("a")
    assert order.next_resharded(units) == units["b"]
    units["b"][0].resharded = False  # it came with the last message: the one after it is next
    assert order.next_resharded(units) == units["c"]
    order.now.append("c")  # another way than last time
    assert order.next_resharded(units) == []


def test_a_bucket_is_gathered_once_in_a_pass():
    a, b, c = bucket = [Gathered(name) for name in "abc"]
    order = Pass()
    assert order.together(b, bucket) == [a, b, c]
    assert order.together(b, bucket) == [b]  # once more, after it was resharded
    order.now += ["a", "b"]
    order.begin()
    assert order.together(a, bucket) == [a, b]  # c did not run last time
    a.resharded = False
    assert order.together(a, bucket) == []


# ---- tensors in whatever a module takes and returns ----------------------------------------------


@dataclass
class Output:
    logits: torch.Tensor
    note: str = "kept"


def test_tensors_are_found_and_replaced():
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    value = {"a": [one, (two, None)], "b": Output(three)}
    assert [t.numel() for t in tensors_in(value)] == [1, 2, 3]
    doubled = map_tensors(lambda t: 2 * t, value)
    assert doubled["a"][1][0].tolist() == [2, 2] and doubled["b"].note == "kept"
    assert doubled["b"].logits.tolist() == [2, 2, 2] and three.tolist() == [1, 1, 1]
    assert map_tensors(lambda t: None, value)["b"] is value["b"]  # nothing to replace
