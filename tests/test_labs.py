"""Every solution of the course's exercises passes, every wrong answer is told what is wrong with
it, and `check` never raises and never waits for ever."""

import inspect
import multiprocessing
import re
import subprocess
import sys
import textwrap
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import zero_ref
from zero_ref import comm, course, memory
from zero_ref.engine.buffers import Buffers
from zero_ref.labs import check, judge, keep, lines, on_training, questions, simulated, small, todo
from zero_ref.labs.exercises import EXERCISES
from zero_ref.labs.on_planning import package
from zero_ref.labs.ordering import ORDERINGS
from zero_ref.labs.quiz import QUESTIONS
from zero_ref.observe.kernel import tcp_bytes_sent
from zero_ref.ranks.launch import processes

MISTAKES = [pytest.param(name, index, id=f"{name}-{mistake.code.__name__.strip('_')}")
            for name, exercise in EXERCISES.items()
            for index, mistake in enumerate(exercise.mistakes)]


def small_step(how, stage):
    rank = torch.distributed.get_rank()
    net = course.build(seed=rank)
    model = small.wrap(net, stage) if how == "small" else zero_ref.wrap(net, stage)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(3):
        images, labels = course.batch(step, rank)
        with zero_ref.trace() as sent:
            F.cross_entropy(model(images), labels).backward()
            held = memory.resident(model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
    weights = {name.removeprefix("module."): value for name, value in model.state_dict().items()}
    return weights, held, sent.wire_bytes()


@pytest.mark.parametrize("world_size", [2, 4])  # where nothing is padded, in neither
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_in_small_has_the_package_s_bits_and_bytes(stage, world_size):
    ours = zero_ref.launch(small_step, world_size, "zero_ref", stage)
    mine = zero_ref.launch(small_step, world_size, "small", stage)
    for (weights, held, sent), (their_weights, their_held, their_sent) in zip(ours, mine):
        assert course.same_bits(weights, their_weights)
        assert held == their_held == memory.model_states([[256, 16]] * 6, world_size, stage)
        assert sent == their_sent


def test_zero_in_small_refuses_what_it_cannot_train():
    class Scaled(torch.nn.Sequential):
        def __init__(self):
            super().__init__(torch.nn.Linear(2, 2))
            self.scale = torch.nn.Parameter(torch.ones(2))

    with pytest.raises(zero_ref.RankError, match="in exactly one child"):
        zero_ref.launch(lambda: small.wrap(Scaled(), 1), 2)


def order_of_events(prefetch):
    """What a real rank computes and issues in a step of stage 3: (what, unit)."""
    model = zero_ref.wrap(course.build(), 3, overlap=True, bucket_cap_mb=0)
    model.prefetch = prefetch
    optimizer = torch.optim.Adam(model.parameters())
    images, labels = course.batch(0, torch.distributed.get_rank())
    for _ in range(2):  # in the first step nothing is known of the order of the units
        with zero_ref.record(model, optimizer) as recording:
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    happened = [(span.end, span.phase, span.unit) for span in recording.spans
                if span.phase != "step"]
    named = {"all_gather": "gather", "reduce_scatter": "reduce"}
    happened += [(event.start, named[event.op], event.unit) for event in recording.events]
    return [(what, int(unit) - 1) for _, what, unit in sorted(happened)]


@pytest.mark.parametrize(("prefetch", "takes"), [(0, 36), (1, 21), (2, 21)])  # as in notebook 8
def test_the_simulated_stage_3_is_the_package_s(prefetch, takes):
    schedule = list(package(6, prefetch))
    for real in zero_ref.launch(order_of_events, 2, prefetch):
        assert real == [(what, unit) for what, unit in schedule if what != "free"]
    step = simulated.run(schedule)
    assert (max(step.ends.values()), step.most, step.left) == (takes, prefetch + 1, 0)


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_passes(name):
    verdict = check(name, EXERCISES[name].solution)
    assert verdict.passed and f"{name} is right" in verdict.text, verdict


really, ran = judge.outcome_of, {}


def each_once(exercise, world_size, answer, limit):
    key = id(exercise), answer, world_size
    if key not in ran:
        ran[key] = really(exercise, world_size, answer, limit)
    return ran[key]


def test_to_wait_in_a_collective_is_no_loop():
    place = "stuck:\nrank 0 was still at\n  File \"/zero_ref/{}\", line 48, in wait\n"
    text = "This is a loop without an end, a message that nobody sends, or"
    assert judge._hint_for_error(EXERCISES["10.1"], judge.Failed(text, place.format("comm.py")))
    assert not judge._hint_for_error(EXERCISES["10.1"], judge.Failed(text, place.format("x.py")))


@pytest.mark.parametrize(("name", "index"), MISTAKES)
def test_a_wrong_answer_gets_its_own_hint(name, index, monkeypatch):
    """Each runs once, as the answer and as what answers are compared with."""
    mistake = EXERCISES[name].mistakes[index]
    monkeypatch.setattr(judge, "outcome_of", each_once)
    if "stuck" in (mistake.raises or ""):
        monkeypatch.setattr(judge, "LIMIT", 2)  # nothing is lost but time
    verdict = check(name, mistake.code)
    assert not verdict
    assert verdict.text.endswith(f"Hint: {mistake.hint}"), verdict


@pytest.mark.parametrize("name", EXERCISES)
def test_exercises_have_three_mistakes_and_verdicts_do_not_show_the_solution(name):
    exercise = EXERCISES[name]
    assert len({mistake.hint for mistake in exercise.mistakes}) >= 3
    said = [mistake.hint for mistake in exercise.mistakes] + [*exercise.hints.values()]
    code = [line.strip() for line in inspect.getsource(exercise.solution).splitlines()]
    for line in code:
        assert len(line) < 25 or not any(line in text for text in said), line


class GathersWhatIsRounded(on_training.Mixed):
    def after_step(self, unit):
        comm.all_gather(unit.flat, unit.owned.data.bfloat16(), self.group, unit=unit.name,
                        phase="step").wait()


class GathersFlags(on_training.LossScale):
    def step(self, optimizer, grads, clip):
        flags = torch.zeros(dist.get_world_size())
        flags[dist.get_rank()] = not all(grad.isfinite().all() for grad in grads)
        comm.all_reduce(flags, dist.group.WORLD, unit="", phase="unscale").wait()
        self.good = 0 if flags.any() else self.good + 1
        if self.good:
            torch._foreach_mul_(grads, 1 / self.scale)
            clip()
            optimizer.step()
        self.scale *= 0.5 if flags.any() else 2 - self.good % self.growth_interval


class OneMessageForEachDtype(small.Stage0):
    def __init__(self, module):
        super().__init__(module)
        self.buffers_of_rank_0 = Buffers(module, self.group)

    def forward(self, *args):
        if self.training:
            self.buffers_of_rank_0.broadcast("forward")
        return super().forward(*args)


class DividesIntoNewMemory(small.Stage1):
    def reduce(self, unit, grad):
        mine = grad.chunk(self.world_size)[self.rank]
        comm.reduce_scatter(mine, grad, self.group, unit=unit.name, phase="backward").wait()
        unit.owned.grad = mine / self.world_size  # less is held than stage 1 needs


def without_empty_lists(module):
    units: dict = {}
    for name, p in module.named_parameters():  # each once, at its first name
        units.setdefault(name.split(".")[0], []).append(p)
    return units


class AccumulatesInNewMemory(small.Stage2):
    def reduce(self, unit, grad):
        earlier = unit.owned.grad
        super().reduce(unit, grad)
        unit.owned.grad = unit.owned.grad if earlier is None else earlier + unit.owned.grad

    def accumulate(self, batches):
        kept = []
        for images, labels in batches:
            kept.append(self(images))  # logits and losses are few
            kept.append(F.cross_entropy(kept[-1], labels) / len(batches))
            kept[-1].backward()


@pytest.mark.parametrize(("name", "answer"), [
    ("3.3", without_empty_lists), ("5.2", AccumulatesInNewMemory),
    ("7.2", GathersWhatIsRounded), ("7.3", GathersFlags), ("7.4", OneMessageForEachDtype),
    ("11.2", DividesIntoNewMemory)])
def test_another_way_is_right_too(name, answer):
    verdict = check(name, answer)
    assert verdict, verdict


class Unsolved(small.Stage1):
    def reduce(self, unit, grad):
        todo("about 3 lines")


def test_what_is_not_written_yet_is_said():
    assert check("4.2", Unsolved).text == (
        "4.2: not yet. Write your own lines in place of todo('about 3 lines').")
    assert check("3.1", lambda *args: todo()).text.startswith("3.1: not yet.")


@pytest.mark.parametrize("answer", [None, 3, "reduce_scatter", [], object()])
def test_an_answer_of_another_kind_is_said(answer):
    assert "4.2 takes a class like small.Stage1" in check("4.2", answer).text


@pytest.mark.parametrize("name", ["4.9", "", None, 4.9, "Stage1"])
def test_an_unknown_exercise_is_said(name):
    assert "There is no exercise" in check(name, small.Stage1).text


def test_an_exercise_that_is_nearly_named_is_suggested():
    assert "4.1, 4.2, 4.p1" in check("4.9", small.Stage1).text


def test_an_error_of_the_answer_is_shown_with_its_line():
    def divides(numel, world_size, rank):
        return numel / (world_size - world_size), 0

    verdict = check("3.1", divides)
    assert "Your answer raised ZeroDivisionError: division by zero." in verdict.text
    assert "test_labs.py, line" in verdict.text
    assert "return numel / (world_size - world_size), 0" in verdict.text


def test_a_wrong_signature_is_an_error_like_others():
    assert "raised TypeError" in check("3.1", lambda: None).text


def test_what_cannot_travel_to_the_ranks_is_said():
    lock = multiprocessing.Lock()
    assert "could not be judged. ValueError" in check("3.1", lambda *args: lock).text


def test_what_is_shown_fits_into_a_notebook(capsys):
    def fails(numel, world_size, rank):
        raise ValueError("the bounds of these elements are not known to me: " + "why? " * 20)

    shown = repr(check("3.1", fails)).splitlines()
    code = [line for line in shown if "test_labs.py, line" in line]
    assert len(code) == 1 and code[0].endswith('"why? " * 20)')  # as it is, however long
    for name in QUESTIONS:
        shown += repr(check(name, "a")).splitlines()
    shown += repr(check("3.1", lambda *args: (1, 2))).splitlines()
    for name in ORDERINGS:
        lines(name)
    for number in range(12):
        questions(str(number))
    course.verdict("bytes", 3, 4, {3: "that is the sum over all ranks, of which one is yours " * 3})
    shown += capsys.readouterr().out.splitlines()
    assert len(shown) > 300
    assert all(len(line) <= 80 for line in shown if line not in code)


def test_a_deadlock_is_ended_and_explained():
    def waits(grads, group):
        if torch.distributed.get_rank() != 2:
            torch.distributed.all_reduce(torch.ones(1), group=group)
        return torch.ones(())

    started = time.monotonic()
    text = check("7.1", waits).text
    assert time.monotonic() - started < 10 * judge.LIMIT
    assert "After some seconds, ranks 0, 1 and 3 are still at" in text
    assert "torch.distributed.all_reduce(torch.ones(1), group=group)" in text
    assert "Rank 2 had finished, and will not come to what the others wait for." in text
    assert check("7.1", EXERCISES["7.1"].solution)  # on new ranks


def test_of_what_an_answer_prints_the_beginning_is_shown(capfd):
    def loud(numel, world_size, rank):
        for i in range(30_000):
            print("element", i)
        return small.shard_bounds(numel, world_size, rank)

    assert check("3.1", loud)
    shown = capfd.readouterr().out.splitlines()
    assert shown[0] == "[rank 0] element 0"
    assert shown[judge.PRINTED:] == ["[rank 0] (check shows no more than 100 lines of a rank)"]


def test_a_loop_without_end_is_ended():
    def forever(numel, world_size, rank):
        while True:
            pass

    text = check("3.1", forever).text
    assert "After some seconds, your answer is still at" in text
    assert text.endswith("one that nobody receives, because all are sending.")


def test_who_waits_for_whom_in_an_exchange():
    def to_the_left(own, rank, world_size, exchange):
        left, right = (rank - 1) % world_size, (rank + 1) % world_size
        if rank == 3:
            left, right = right, left
        exchange(send={right: own}, recv={left: torch.empty_like(own)})

    text = check("1.2", to_the_left).text
    assert re.search(r"round 1: rank \d waits for a message from rank \d, which sends to rank",
                     text)


@pytest.mark.parametrize("name", ["2.1", "2.2", "4.1", "4.2", "5.1"])
def test_what_is_not_waited_for_is_said(name):
    class NotWaited(EXERCISES[name].solution):
        pass

    for method in ("start", "reduce", "after_step"):
        source = textwrap.dedent(inspect.getsource(getattr(EXERCISES[name].solution, method)))
        namespace = {"comm": small.comm, "torch": torch}
        exec(source.replace(".wait()", ""), namespace)
        setattr(NotWaited, method, namespace[method])
    assert "only been started when the call returns" in check(name, NotWaited).text


class KeepsTheLast(small.Stage2):
    def reduce(self, unit, grad):
        self.last = grad
        super().reduce(unit, grad)


class BroadcastsOnOneRank(small.Stage0):
    def start(self, unit):
        if self.rank == 0:
            super().start(unit)
        torch.distributed.barrier()


KEPT: dict = {}  # outside of the model


class KeepsGradientsElsewhere(EXERCISES["5.2"].solution):
    def reduce(self, unit, grad):
        KEPT[unit.name] = grad.clone()
        super().reduce(unit, grad)


class KeepsMastersElsewhere(on_training.Mixed):
    def own(self, unit):
        KEPT[unit.name] = unit.flat.float()
        return super().own(unit)


@pytest.mark.parametrize(("name", "answer", "hint"), [
    ("5.2", KeepsGradientsElsewhere, "Gradients in full are kept somewhere"),
    ("7.2", KeepsMastersElsewhere, "Something large is kept outside of the model"),
    ("5.1", KeepsTheLast, "Something still refers to the full gradient"),
    ("2.1", BroadcastsOnOneRank, "Some ranks wait in a barrier while others wait in a collective")])
def test_a_relative_of_a_known_mistake_gets_a_hint_that_fits(name, answer, hint, monkeypatch):
    monkeypatch.setattr(judge, "LIMIT", 2)  # nothing is lost but time
    verdict = check(name, answer)
    assert f"Hint: {hint}" in verdict.text, verdict


def test_what_is_not_sent_through_comm_is_said():
    class Directly(small.Stage0):
        def reduce(self, unit, grad):
            torch.distributed.all_reduce(grad)
            unit.owned.grad = grad / self.world_size

    class AllReducesDirectly(EXERCISES["4.1"].solution):
        reduce = Directly.reduce

        def own(self, unit):
            return unit.flat

    assert "Nothing was sent through zero_ref.comm." in check("2.2", Directly).text
    assert "Nothing was sent" not in check("4.1", AllReducesDirectly).text


class AlsoSends(small.Stage1):
    def reduce(self, unit, grad):
        torch.distributed.all_reduce(grad.clone())
        super().reduce(unit, grad)


def test_what_the_ranks_send_besides_is_counted_by_the_kernel(monkeypatch):
    zero_ref.launch(judge._ready, 4, backend=judge.BACKEND)
    if tcp_bytes_sent(processes(4, judge.BACKEND)[0]) is None:
        pytest.skip("the kernel does not say what another process has sent")
    verdict = check("4.2", AlsoSends)
    assert not verdict and "as the kernel counts them" in verdict.text, verdict
    monkeypatch.setattr(judge, "tcp_bytes_sent", lambda pid: None)
    judge._of_solution.cache_clear()
    assert check("4.2", AlsoSends)  # nobody can tell, and nothing else is wrong
    judge._of_solution.cache_clear()


def test_the_kernel_counts_a_process_s_connections_and_nothing_else():
    other = subprocess.Popen([sys.executable, "-c", textwrap.dedent("""
        import socket
        with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as one:
            one.connect(server.getsockname())
            there, _ = server.accept()
            one.sendall(bytes(1000)), there.sendall(bytes(200))
            left, right = socket.socketpair()
            left.sendall(bytes(50))
            print("sent", flush=True)
            input()
        """)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with other:
        assert other.stdout.readline() == "sent\n"
        assert tcp_bytes_sent(other.pid) in (1200, None)
        other.communicate("\n")
    assert tcp_bytes_sent(other.pid) is None


def test_whole_numbers_are_wanted_for_bounds():
    def fractions(numel, world_size, rank):
        return rank * numel / world_size, (rank + 1) * numel / world_size

    assert "Return two whole numbers" in check("3.1", fractions).text
    assert "Return two whole numbers" in check("3.1", lambda *args: slice(0, 3)).text


def test_which_unit_differs_is_said():
    assert 'the first is unit "1": differs' in check("2.2", EXERCISES["2.2"].mistakes[0].code).text


def test_ranks_that_are_about_to_do_different_things_say_so():
    class Diverges(small.Stage1):
        def after_step(self, unit):
            if self.rank == 1:
                small.comm.all_reduce(unit.flat, self.group, unit=unit.name, phase="step").wait()
            super().after_step(unit)

    text = check("4.2", Diverges).text
    assert "rank 0 to all_gather '1' in phase 'step'" in text
    assert "rank 1 to all_reduce '1' in phase 'step'" in text


def test_nothing_is_checked_between_the_ranks_afterwards():
    check("2.2", small.Stage0)
    from zero_ref.engine import check as checking

    assert zero_ref.launch(lambda: len(checking._checkers), 4) == [0] * 4


def test_check_leaves_only_the_pools_of_ranks():
    code = ("import multiprocessing, zero_ref\nfrom zero_ref.labs import check, small\n"
            "print(check('2.2', small.Stage0))\n"
            "print(len(multiprocessing.active_children()))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert out.stdout.splitlines()[-1] == "7", out  # 4 + 3 ranks
    assert out.stderr == ""


@pytest.mark.parametrize("name", ORDERINGS)
def test_an_ordering_is_right_or_told_why_not(name, capsys):
    ordering = ORDERINGS[name]
    assert ordering.lines.keys() == ordering.needed.keys() | ordering.wrong.keys()
    assert len(ordering.wrong) >= 2
    assert not ordering.needed.keys() & ordering.wrong.keys()
    right = ordered(ordering)
    assert check(name, right)
    assert check(name, " ".join(right).lower())
    for first, second, why in ordering.before:
        swapped = right.translate(str.maketrans(first + second, second + first))
        assert not check(name, swapped)
        assert any(why == reason for *_, reason in ordering.before)
    for letter, why in ordering.wrong.items():
        assert why in check(name, right + letter).text
    for letter, hint in ordering.needed.items():
        assert hint in check(name, right.replace(letter, "")).text
    assert "twice" in check(name, right + right[0]).text
    assert "no line Z" in check(name, right + "Z").text
    assert "not yet" in check(name, None).text
    assert "takes letters" in check(name, 3).text
    assert right != "".join(sorted(right))  # they are shown in another order
    lines(name)
    shown = " ".join(capsys.readouterr().out.split())
    assert all(line in shown for line in ordering.lines.values())


def ordered(ordering):
    """A right order, by its rules."""
    left, found = list(ordering.needed), ""
    while left:
        free = [x for x in left if not any(b == x and a in left for a, b, _ in ordering.before)]
        found += free[0]
        left.remove(free[0])
    return found


def test_questions():
    name, question = next(iter(QUESTIONS.items()))
    assert check(name, question.right.upper() + " ")
    assert "not yet" in check(name, None).text
    assert "takes one of the letters" in check(name, "x").text
    for letter, remark in question.remarks.items():
        assert remark in check(name, letter).text


def test_a_file_of_one_s_own_grows_piece_by_piece(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for piece in (small.Stage2, small.shard_bounds, small.Stage1, small.flatten, small.Sharded):
        keep(piece)
        compile((tmp_path / "my_zero.py").read_text(), "my_zero.py", "exec")
    assert "Still the package's: Stage0, Stage3." in capsys.readouterr().out
    keep(Unsolved)
    assert "Unsolved is not a piece" in capsys.readouterr().out
    keep(small.Unit)
    assert "Unit is not a piece" in capsys.readouterr().out
    for piece in (small.Stage0, small.Stage3, small.Stage1):
        keep(piece)
    assert "All of it is yours." in capsys.readouterr().out
    text = (tmp_path / "my_zero.py").read_text()
    assert "zero_ref.labs" not in text
    assert text.count("class Stage1") == 1
    namespace = {"__name__": "my_zero"}
    exec(compile(text, "my_zero.py", "exec"), namespace)
    assert check("4.2", small.Stage1)
    assert namespace["wrap"] and namespace["Stage3"].__mro__[2].__name__ == "Stage2"


def test_what_is_not_right_is_not_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def shard_bounds(numel, world_size, rank):
        return 0, numel

    class Stage0(small.Stage0):  # right as far as exercise 2.1 goes
        def reduce(self, unit, grad):
            unit.owned.grad = grad

    for piece, exercise in ((shard_bounds, "3.1"), (Stage0, "2.2")):
        keep(piece)
        assert " ".join(capsys.readouterr().out.split()) == (
            f'{piece.__name__} is not kept: check("{exercise}", {piece.__name__}) says that it is '
            "not right yet.")
    assert not (tmp_path / "my_zero.py").exists()


def test_an_unfinished_piece_is_not_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def flatten(params, world_size):
        todo("5 lines")

    keep(flatten)
    assert "still a todo" in capsys.readouterr().out
    assert not (tmp_path / "my_zero.py").exists()
