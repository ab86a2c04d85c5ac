"""The broken stages of the hunt break what they are said to break, and nothing else."""

import ast
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import zero_ref
from zero_ref import comm, course
from zero_ref.labs import check, hunt, small

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "11_the_hunt.ipynb"

# Of each bug that ends: whether the bits are right, and which bytes are not the formula's.
SEEN = {
    "11.0": (False, {"sent"}),
    "11.1": (False, set()),
    "11.2": (False, set()),
    "11.4": (False, {"optimizer", "sent"}),
    "11.5": (False, set()),
    "11.6": (True, {"most gradients"}),
    "11.7": (True, {"most parameters"}),
    "11.8": (True, {"parameters", "gradients", "optimizer", "sent"}),
    "11.9": (False, {"sent"}),
}


def seen_of(name, kind):
    bug = hunt.BUGS[name]
    return zero_ref.launch(hunt.watched, bug.world_size, name, getattr(bug, kind), bug.optimizer)


def other_bytes(name, seen):
    bug = hunt.BUGS[name]
    here = hunt.bytes_seen(seen[0])
    return {what for what, wanted in hunt.formula(bug, bug.optimizer).items()
            if here[what] != wanted}


@pytest.mark.parametrize("name", hunt.BUGS)
def test_a_mended_stage_keeps_all_promises(name):
    seen = seen_of(name, "mended")
    assert all("diverged" not in rank for rank in seen)
    assert course.same_bits(*(rank["weights"] for rank in seen))
    assert other_bytes(name, seen) == set()


@pytest.mark.parametrize("name", hunt.BUGS)
def test_a_broken_stage_breaks_what_it_should(name):
    seen, ends = seen_of(name, "broken"), name in SEEN
    assert all(("diverged" not in rank) == ends == hunt.BUGS[name].ends for rank in seen)
    if ends:
        bits, wrong_bytes = SEEN[name]
        right = seen_of(name, "mended")
        assert course.same_bits(right[0]["weights"], seen[0]["weights"]) == bits
        assert other_bytes(name, seen) == wrong_bytes


def test_the_remainder_is_seen_on_three_ranks_only():
    runs = [zero_ref.launch(hunt.watched, 4, "11.4", answer, "Adam")[0]["weights"]
            for answer in (hunt.DropsTheRemainder, small.Stage1)]
    assert course.same_bits(*runs)


def test_symptoms_are_printed(capsys):
    hunt.symptoms("11.10")
    shown = capsys.readouterr().out
    assert "It does not end." in shown
    assert "  rank 1: all_gather '1' in phase 'step'" in shown
    hunt.symptoms("11.4")
    shown = capsys.readouterr().out
    assert "Rank 0 has the right bits: NO" in shown
    assert re.search(r"  sent in a step +8,640 +8,736\n", shown)
    assert max(map(len, shown.splitlines())) <= 80


def test_what_there_is_not_is_said():
    with pytest.raises(ValueError, match=r"there is no bug .12\.1.: there are 11\.0, "):
        hunt.symptoms("12.1")
    with pytest.raises(ValueError, match="optimizer='adam': must be one of Adam, SGD"):
        hunt.symptoms("11.2", "adam")
    with pytest.raises(ValueError, match=r"a step of 11\.10 does not end"):
        hunt.timeline("11.10")


class RoundsUp(hunt.DropsTheRemainder):
    def own(self, unit):
        size = -(-sum(p.numel() for p in unit.params) // self.world_size)
        unit.used = unit.flat[: size * self.world_size]
        unit.shard = unit.used.chunk(self.world_size)[self.rank]
        return unit.shard


class GathersTheSquares(small.Stage2):
    def clip_grad_norm_(self, max_norm):
        grads = [unit.owned.grad for unit in self.units]
        squares = torch.zeros(self.world_size)
        squares[self.rank] = torch.cat(grads).square().sum()
        comm.all_gather(squares, squares[self.rank : self.rank + 1].clone(), self.group,
                        unit="squares", phase="clip").wait()
        norm = squares.sum().sqrt()
        for grad in grads:
            grad.mul_(min(1.0, max_norm / norm))
        return norm


class LastOutside(hunt.Accumulates):
    def accumulate(self, batches):
        *most, (images, labels) = batches
        with self.no_sync():
            for x, y in most:
                (F.cross_entropy(self(x), y) / len(batches)).backward()
        (F.cross_entropy(self(images), labels) / len(batches)).backward()


class AsksAll(small.Stage1):
    def skips(self, loss):
        return any(comm.all_gather_object(int(loss.item() > 10), self.group, phase="loss"))


@pytest.mark.parametrize(("name", "answer"), [
    ("11.4", RoundsUp), ("11.5", GathersTheSquares), ("11.9", LastOutside), ("11.10", AsksAll)])
def test_another_way_to_mend_it_is_right_too(name, answer):
    assert check(name, answer)


def shape(text):
    """A class without its name and docstring, and with what it inherits from by its last name."""
    node = ast.parse(text).body[0]
    body = node.body[isinstance(node.body[0], ast.Expr):]
    bases = [ast.unparse(base).split(".")[-1] for base in node.bases]
    return bases, [ast.unparse(statement) for statement in body]


@pytest.mark.parametrize("name", hunt.BUGS)
def test_the_notebook_has_the_broken_code_and_not_its_name(name):
    source = inspect.getsource(hunt.BUGS[name].broken)
    assert len(source.splitlines()) <= 20
    cells = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"]]
    called = "Broken" if name == "11.0" else f"Mended{name.split('.')[1]}"
    [cell] = [cell for cell in cells if cell.startswith(f"class {called}(")]
    assert shape(cell) == shape(source)
    assert all(hunt.BUGS[name].broken.__name__ not in cell for cell in cells)


class ReducesTheLossItself(small.Stage1):
    def skips(self, loss):
        dist.all_reduce(loss, dist.ReduceOp.MAX, group=self.group)
        return loss.item() > 10


def test_a_loss_that_skips_has_changed_gets_a_hint():
    assert "exchanged in place" in check("11.10", ReducesTheLossItself).text.replace("\n", " ")
