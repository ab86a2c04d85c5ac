"""The broken stages of the hunt break what they are said to break, and nothing else."""

import ast
import inspect
import io
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
from zero_ref.labs.exercises import EXERCISES

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
    assert all(("diverged" not in rank) == ends == (hunt.BUGS[name].hangs is None) for rank in seen)
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
    assert re.search(r"  optimizer states +3,264 +3,264\n", shown)
    assert "Collectives of the step before:\n  6 reduce_scatter in backward\n" in shown
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


@pytest.mark.parametrize(("name", "which", "alone", "others"), [
    ("11.3", 0, ["forward", "backward"], ["forward", "backward", "step", "forward"]),
    ("11.10", 1, ["forward", "backward", "step"], ["forward", "backward"])])
def test_a_timeline_without_an_end_shows_where_each_rank_stays(name, which, alone, others):
    bug = hunt.BUGS[name]
    recordings = zero_ref.launch(hunt._recorded, 4, name, bug.broken, bug.optimizer)
    phases = [[span.phase for span in recording.spans] for recording in recordings]
    assert phases == [alone if rank == which else others for rank in range(4)]
    waiting = [recording.spans[-1] for recording in recordings if recording.rank != which]
    assert all(span.end - span.start > 0.009 for span in waiting)
    if name == "11.3":  # whose rank 0 saves, and is in none of these phases
        assert all(span.end - recordings[0].spans[-1].end > 0.009 for span in waiting)
    assert "Timeline" in hunt.timeline(name).text


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


class Broken(small.Stage0):
    def reduce(self, unit, grad):
        unit.owned.grad = grad


class AsksAHelper(Broken):  # a learner's own class, whose method is replaced
    def mean(self, unit, grad):
        comm.all_reduce(grad, self.group, unit=unit.name, phase="backward",
                        divide_by=self.world_size).wait()
        return grad

    def reduce(self, unit, grad):
        unit.owned.grad = self.mean(unit, grad)


class Inherits(AsksAHelper):
    pass


class Means:
    def reduce(self, unit, grad):
        super().reduce(unit, grad)


class FromAMixin(Means, small.Stage1):
    pass


class MovesWhatItDoes(hunt.DropsTheRemainder):
    def start(self, unit):
        unit.used = unit.flat
        super().start(unit)

    def own(self, unit):
        return unit.shard


class NeedsNoBucket(small.Stage2):
    def reduce(self, unit, grad):
        super().reduce(unit, grad)


class GathersInPlace(small.Stage3):
    def before_forward(self, unit):
        unit.flat.untyped_storage().resize_(unit.flat.nbytes)
        comm.all_gather(unit.flat, unit.shard, self.group, unit=unit.name, phase="forward").wait()


class EachOnce(small.Stage1):
    def start(self, unit):
        every = [p for module in unit.layer.modules() for p in module.parameters(recurse=False)]
        unit.params = list(dict.fromkeys(every))
        unit.flat = small.flatten(unit.params, self.world_size)
        unit.shard = unit.flat.chunk(self.world_size)[self.rank]
        super().start(unit)


class AllWrite(small.Stage3):
    def save(self, file):
        state = self.state_dict()
        torch.save(state, file if self.rank == 0 else io.BytesIO())


@pytest.mark.parametrize(("name", "answer"), [
    ("11.1", AsksAHelper), ("11.1", Inherits), ("11.2", FromAMixin), ("11.3", AllWrite),
    ("11.4", MovesWhatItDoes), ("11.6", NeedsNoBucket), ("11.7", GathersInPlace),
    ("11.8", EachOnce), ("11.4", RoundsUp), ("11.5", GathersTheSquares), ("11.9", LastOutside),
    ("11.10", AsksAll)])
def test_another_way_to_mend_it_is_right_too(name, answer):
    assert check(name, answer)


@pytest.mark.parametrize(("name", "method"), [
    (name, method) for name, bug in hunt.BUGS.items() if name in EXERCISES
    for method in vars(bug.broken) if not method.startswith("__")])
def test_who_has_deleted_a_method_is_told_so(name, method):
    """Even if it is all that was wrong, since what is inherited then is right."""
    broken = hunt.BUGS[name].broken
    kept = {other: value for other, value in vars(broken).items() if other != method}
    for answer in (type("Mended", broken.__bases__, kept), type("Empty", broken.__bases__, {})):
        verdict = check(name, answer)
        assert not verdict and re.search(
            r"raised TypeError: the method \w+ is gone; keep it, and mend the line that is wrong.$",
            verdict.text), verdict
        assert f"the method {method} is gone" in verdict.text or answer.__name__ == "Empty"


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


class AllFlags(small.Stage1):
    def skips(self, loss):
        flag = (loss.detach() > 10).float()
        dist.all_reduce(flag, group=self.group)
        return flag.item() == self.world_size


class MeanInPlace(small.Stage1):
    def skips(self, loss):
        dist.all_reduce(loss, group=self.group)
        loss /= self.world_size
        return loss.item() > 10


class SumOfCopies(small.Stage1):
    def skips(self, loss):
        total = loss.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total.item() > 10


@pytest.mark.parametrize(("answer", "hint"), [
    (ReducesTheLossItself, "exchanged in place"), (AllFlags, "the step is not left out."),
    (MeanInPlace, "the step is not left out."), (SumOfCopies, "Do you add the losses up?")])
def test_relatives_of_known_ways_to_skip_get_a_hint_that_fits(answer, hint):
    verdict = check("11.10", answer)
    assert hint in verdict.text, verdict
