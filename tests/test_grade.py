"""Grading: damaged notebooks lose what is damaged, cheating earns nothing, and one learner's
notebook changes nothing of another's points."""

import csv
import inspect
import io
import json
import os
import pickle
import pickletools
import re
import sys

import psutil
import pytest
import torch

from zero_ref.commands.cli import main
from zero_ref.commands.grade import print_report
from zero_ref.labs import answers, grade, judge, on_variants, plain, small
from zero_ref.labs.exercise import Todo
from zero_ref.labs.quiz import QUESTIONS
from zero_ref.ranks import launch, pool, travel
from zero_ref.ranks.errors import failure_of

ASKED = [name for name in answers.NAMES if name.startswith("3.")]  # by notebook 3
HEAD = "import os, torch\nfrom zero_ref.labs import check, todo"
BOUNDS, FLATTEN, UNITS = map(inspect.getsource, (small.shard_bounds, small.flatten,
                                                 on_variants.units_of))
RIGHT = {name: question.right for name, question in QUESTIONS.items() if name.startswith("3.")}
LOOP = "for name, letter in my_answers.items():\n    print(check(name, letter))"
CELLS = [HEAD, BOUNDS, 'check("3.1", shard_bounds)', FLATTEN, 'check("3.2", flatten)',
         UNITS, 'check("3.3", units_of)', f"my_answers = {RIGHT}", LOOP]
OF_BOUNDS, CHECK_OF_BOUNDS, OF_FLATTEN, CHECK_OF_FLATTEN = 1, 2, 3, 4


def cell(source, kind="code"):
    return {"cell_type": kind, "source": source, "metadata": {}, "id": "same", "outputs": [],
            "execution_count": None}


def notebook(cells):
    return {"cells": [c if isinstance(c, dict) else cell(c) for c in cells], "nbformat": 4,
            "nbformat_minor": 5, "metadata": {"kernelspec": {"name": "python3"}}}


def graded(folder, content, name="03_alice.ipynb", seconds=60):
    """The names that got their point, and all that was found."""
    files = {name: (content if isinstance(content, str) else json.dumps(content)).encode()}
    found = []
    grade._grade(files, folder / "work", seconds, lambda **facts: found.append(facts))
    return {line["name"] for line in found if line.get("points")}, found


@pytest.fixture(autouse=True)
def _everything_is_read_again(monkeypatch):
    monkeypatch.setattr(pool, "read", pool.read)


# ---- damaged notebooks ---------------------------------------------------------------------------


def without(*places):
    return [c for i, c in enumerate(CELLS) if i not in places]


def instead(place, *cells):
    return [*CELLS[:place], *cells, *CELLS[place + 1 :]]


def split(source):
    lines = source.splitlines(keepends=True)
    return "".join(lines[: len(lines) // 2]), "".join(lines[len(lines) // 2 :])


TODO = re.sub(r"    size = (.|\n)*", "    todo('2 lines')", BOUNDS)
DAMAGED = {  # and what it loses
    "not at all": (CELLS, set()),
    "a definition is deleted": (without(OF_BOUNDS), {"3.1"}),
    "a check is deleted": (without(CHECK_OF_FLATTEN), {"3.2"}),
    "a check is copied": ([*CELLS, CELLS[CHECK_OF_BOUNDS]], set()),
    "an unsolved copy stays below": ([*CELLS, TODO, CELLS[CHECK_OF_BOUNDS]], set()),
    "a definition is split": (instead(OF_BOUNDS, *split(BOUNDS)), {"3.1"}),
    "cells are merged": ([*CELLS[:-2], "\n".join(CELLS[-2:])], set()),
    "cells are reversed": (CELLS[::-1], set()),
    "a check is Markdown": (instead(CHECK_OF_BOUNDS, cell(CELLS[CHECK_OF_BOUNDS], "markdown")),
                            {"3.1"}),
    "a definition is raw": (instead(OF_FLATTEN, cell(FLATTEN, "raw")), {"3.2"}),
    "a cell is of no known type": ([cell("?", "sql"), {}, 3, *CELLS], set()),
    "outputs are broken": (instead(OF_BOUNDS, {**cell(BOUNDS), "outputs": "none"}), set()),
    "a cell is no Python": (["Here I have (tried a lot", *CELLS], set()),
    "a cell raises": ([CELLS[0], "raise SystemExit('over')", *CELLS[1:]], set()),
    "a parameter is renamed": (instead(OF_BOUNDS, BOUNDS.replace("rank):", "r):")), {"3.1"}),
    "sources are lists": ([cell(c.splitlines(keepends=True)) for c in CELLS], set()),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_only_what_is_damaged_loses_its_point(damage, tmp_path):
    cells, lost = DAMAGED[damage]
    damaged = {**notebook(cells), "metadata": {"kernelspec": {"name": "julia"}}, "nbformat": "4"}
    points, found = graded(tmp_path, damaged, name="my work.ipynb")
    assert points == set(ASKED) - lost, found
    assert found[0] == {"asked": ASKED}
    assert not [line for line in found if "broken" in line]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"cells": 3}', "[" * 100_000, "cells",
                                     json.dumps(notebook(CELLS))[:-100]])
def test_what_is_no_notebook_is_said(content, tmp_path):
    points, found = graded(tmp_path, content)
    assert points == set()
    assert found[0] == {"asked": ASKED}  # as far as its name tells
    assert found[1]["broken"].startswith("03_alice.ipynb is no notebook: ")


# ---- answers -------------------------------------------------------------------------------------


def test_checks_are_found_by_the_call():
    assert answers.checks_in('x = 1\nprint(labs.check("4.2", f), 3)') == [
        ("labs.check", "[('4.2', f)]")]
    assert answers.checks_in('%time\n!ls\ncheck(name="1.1", answer=f)') == [
        ("check", "[('1.1', f)]")]
    assert answers.checks_in("for a, b in c.items():\n  for d in b: check(a, d)") == [
        ("check", "[(a, d) for a, b in c.items() for d in b]")]
    assert answers.checks_in("[check(n, a) for n, a in b]") == [("check", "[(n, a) for n, a in b]")]
    for source in ("checks('1.1', f)", "# check('1.1', f)", "%%ranks 4\ncheck('1.1', f)", "check("):
        assert answers.checks_in(source) == []


def test_what_the_kernel_prints_beside_answers_is_skipped():
    text = '7\n{"name": "x"}\n[]\nnull\n{"name": "3.q1", "plain": "b"}\n{"plain": 3}\n\n{'
    assert list(answers._told(text)) == [("3.q1", "b")]


def test_the_best_answer_counts_and_of_letters_the_last():
    def wrong(numel, world_size, rank):
        return 0, numel

    packed = [answers.Packed(travel.dumps(f)) for f in (small.shard_bounds, wrong, None)]
    letters = [*"abcd", None]
    letters[letters.index(RIGHT["3.q1"])] = "a"
    given = {"3.1": packed, "3.q1": [RIGHT["3.q1"], *letters], "3.q2": ["x", RIGHT["3.q2"], None]}
    found = {name: bool(verdict) for name, verdict in grade.judged(ASKED, given)}
    assert found == {"3.1": True, "3.q1": False, "3.q2": True}


def test_an_object_in_place_of_letters_is_not_shown_as_bytes():
    class Right:
        def __eq__(self, other):
            return True

    [(_, verdict)] = grade.judged(["4.p1"], {"4.p1": [answers.Packed(travel.dumps(Right()))]})
    assert not verdict and verdict.text.endswith("and got an object of the notebook."), verdict


# ---- what ranks send -----------------------------------------------------------------------------


def test_plain_data_is_read():
    try:
        raise ValueError("broken")
    except ValueError as error:
        failure = failure_of(error)
    half, view = torch.ones(3, dtype=torch.bfloat16), torch.arange(6).view(2, 3).t()
    sent = {"numbers": [1, 2.5, True, None, (3, b"x")], "failure": failure, "size": view.shape}
    assert plain.loads(travel.dumps(sent)) == sent
    for tensor in (half, view, torch.ones(()), torch.empty(0)):
        read = plain.loads(travel.dumps(tensor))
        assert torch.equal(read, tensor) and read.dtype == tensor.dtype
    assert plain.loads(travel.dumps(Todo("2 lines"))).args == ("2 lines",)


class Runs:
    def __init__(self, function, *args):
        self.made = function, args

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize("sent", [
    Runs(os.system, "true"), Runs(eval, "1"), Runs(pickle.loads, pickle.dumps(1)),
    Runs(torch.storage._load_from_bytes, pickle.dumps(Runs(eval, "1"), 2)), lambda: 1, Runs, os])
def test_nothing_that_a_rank_sends_is_run(sent):
    message = travel.dumps(("done", {"the result": sent}))
    with pytest.raises(pickle.UnpicklingError, match=r"plain data|[Ww]eights"):
        plain.loads(message)


@pytest.mark.parametrize("name", ["zero_ref.ranks.errors\nFailure",
                                  "torch.storage\n_load_from_bytes"])
def test_nothing_that_a_rank_sends_changes_a_class_or_a_function(name):
    sets = b"c%s\n(N}S'__eq__'\nI1\nstb." % name.encode()
    assert pickletools.dis(sets, out=io.StringIO()) is None  # it is a pickle
    with pytest.raises(pickle.UnpicklingError, match="it changes a class or a function"):
        plain.loads(sets)


# ---- cheating ------------------------------------------------------------------------------------

WRONG = "def shard_bounds(numel, world_size, rank):\n    return 0, numel"
PATCHES = """
from zero_ref.labs import answers, judge, small
judge.same = lambda a, b: True
judge.check = check = lambda *args: print("3.1 is right.") or judge.Verdict(True, "3.1 is right.")
small.shard_bounds.__code__ = (lambda *args: (0, 0)).__code__
print('{"name": "3.1", "points": 1}')
"""


def test_a_kernel_has_no_say_in_its_points(tmp_path):
    cells = [HEAD, PATCHES, WRONG, *CELLS[CHECK_OF_BOUNDS:]]
    assert graded(tmp_path, notebook(cells))[0] == set(ASKED) - {"3.1"}


def test_another_function_called_check_costs_no_point(tmp_path):
    """In a cell that has other names, too: what ours has noted is not all there is."""
    helper = "def check(a, b):\n    print('equal:', a == b)\n"
    patch = "import zero_ref.labs as labs\nlabs.check = labs.judge.check = lambda *a, **k: True"
    for number, cells in enumerate((
            [*CELLS[:3], helper, *CELLS[3:]], [patch, *CELLS],
            [*CELLS[:3], patch, CELLS[0], "shard_bounds = None", *CELLS[3:]])):
        (tmp_path / str(number)).mkdir()
        points, found = graded(tmp_path / str(number), notebook(cells))
        assert points == set(ASKED), found


ON_RANKS = """
class Runs:
    def __reduce__(self):
        import pathlib
        return pathlib.Path.touch, (pathlib.Path(marker),)

def notices(flat, rank, world_size, exchange):
    from zero_ref.labs import on_collectives
    if "ipykernel" in sys.modules:
        return on_collectives.ring_reduce_scatter(flat, rank, world_size, exchange)
    return Runs()

def patches(own, rank, world_size, exchange):
    from zero_ref.labs import judge, on_collectives
    judge._observed = lambda *args: {}  # what everything gives on this rank from now on
    judge.same = lambda a, b: True
    return on_collectives.ring_all_gather(own, rank, world_size, exchange)

def nothing(*args):
    return 3
"""


@pytest.fixture
def _fresh_ranks():
    launch._close_all()
    judge._of_solution.cache_clear()
    yield
    launch._close_all()


@pytest.mark.usefixtures("_fresh_ranks")
def test_a_rank_has_no_say_in_its_points(tmp_path):
    marker = tmp_path / "ran"
    cells = [f"import sys\nmarker = {str(marker)!r}", ON_RANKS,
             'check("1.1", notices)\ncheck("1.2", patches)\ncheck("1.3", nothing)']
    points, found = graded(tmp_path, notebook(cells))
    assert points == set() and not marker.exists(), found
    [text] = [line["text"] for line in found if line.get("name") == "1.2"]
    assert re.search(r"this replaces zero_ref\.labs\.judge\.(_observed|same), and an answer is to "
                     "leave the package as it is", text), text


FORGES = """
import json, os, time
end = time.monotonic() + 3
while time.monotonic() < end:
    for process in os.listdir("/proc"):
        try:
            if b"zero_ref.labs.grade" not in open(f"/proc/{process}/cmdline", "rb").read():
                continue
            for number in sorted(map(int, os.listdir(f"/proc/{process}/fd"))):
                if os.readlink(f"/proc/{process}/fd/{number}").startswith("pipe:"):
                    pipe = os.open(f"/proc/{process}/fd/{number}", os.O_WRONLY | os.O_NONBLOCK)
                    for name in ("3.1", "3.2"):
                        line = json.dumps({"name": name, "points": 1, "text": "forged"})
                        os.write(pipe, f"{line}\\n{'0' * 64} {line}\\n and half a".encode())
                    os.close(pipe)
                    break  # the first one is what it reports through
        except OSError:
            pass
"""


def test_what_a_notebook_writes_into_the_pipe_does_not_count(tmp_path):
    for name, cells in (("mallory", [FORGES]), ("victim", CELLS[:3])):
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(notebook([*cells, 'check("3.1", 1)'])))
    rows = grade.grade(grade.handed_in([tmp_path]), 60)
    assert [row["learner"] for row in rows] == ["mallory", "victim"]
    assert [row["points"] for row in rows] == [0, 1] and all(row["graded"] for row in rows), rows
    assert "forged" not in json.dumps(rows)


def test_calls_that_were_not_made_do_not_count_and_none_is_made_twice(tmp_path):
    """But for those to which a cell did not come, because it raised before."""
    q1, q2, *more = [name for name in RIGHT if name.startswith("3.q")]
    wrong = "a" if RIGHT[q1] != "a" else "b"
    cells = [HEAD, f'check("{q1}", "{wrong}")\nprint(later)',  # runs once more at the end
             f'check("{q1}", "{RIGHT[q1]}")',
             f'def never():\n    check("{q1}", "{wrong}")\nif later_on := False:\n    never()',
             f'letters = iter("{RIGHT[q2]}{wrong}")\ncheck("{q2}", next(letters))',
             f'1 / 0\ncheck("{more[0]}", "{RIGHT[more[0]]}")',
             "import itertools\nfor i in itertools.count():\n"
             '    if check("3.1", i):\n        break',
             "import sys\nsys.stdout = open('log.txt', 'w')",
             f'check("{more[1]}", "{RIGHT[more[1]]}")', "later = 3"]
    points, found = graded(tmp_path, notebook(cells))
    assert points == {q1, q2, *more[:2]}, found
    assert failed_in(found) == ["cell 6: ZeroDivisionError: division by zero"]


def test_modules_beside_a_notebook_travel_with_its_answers(tmp_path):
    files = {"helper.py": BOUNDS, "mine/__init__.py": "", "mine/other.py": UNITS,
             "mine/all.py": "from .other import units_of as found",
             "\N{LATIN SMALL LETTER E WITH ACUTE}.ipynb": json.dumps(notebook([
                 HEAD, "import helper\nfrom mine.all import found",
                 "def mine(*args):\n    return helper.shard_bounds(*args)", 'check("3.1", mine)',
                 "class Units:\n    def __call__(self, *args):\n        return found(*args)",
                 'check("3.3", Units())'])),
             "my_zero.py": f"\ufeff{HEAD}\n{FLATTEN}\n__file__"}
    found = []
    grade._grade({name: text.encode() for name, text in files.items()}, tmp_path / "work", 60,
                 lambda **facts: found.append(facts))
    assert {line["name"] for line in found if line.get("points")} == {"3.1", "3.2", "3.3"}, found


def failed_in(found):
    return [line["failed"].removeprefix("03_alice.ipynb, ") for line in found if "failed" in line]


def test_a_cell_without_an_end_costs_no_other_exercise(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "GRACE", 0.5)
    forever = "while True:\n    pass"
    stubborn = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + forever
    at_once = 'assert "judged afterwards" in check("3.1", shard_bounds).text'
    cells = [*CELLS[:3], forever, *CELLS[3:5], at_once, stubborn, *CELLS[5:]]
    points, found = graded(tmp_path, notebook(cells), seconds=12)
    assert points == set(ASKED), found
    assert failed_in(found) == ["cell 4: was interrupted after 3 s",
                                "cell 8: was interrupted after 3 s, and went on"]


def test_a_notebook_that_takes_too_long_gets_what_is_before(tmp_path):
    cells = [*CELLS[:3], *["import time\ntime.sleep(1.3)"] * 5, *CELLS[3:]]
    points, found = graded(tmp_path, notebook(cells), seconds=6)
    assert points == {"3.1"}, found
    [text] = failed_in(found)
    assert re.fullmatch(r"cell [4-8]: was ended: the notebook has taken 6 s", text), text


def test_the_end_of_a_kernel_costs_no_other_exercise(tmp_path):
    cells = [HEAD, "quit()", "os._exit(0)", "half = '\ud800'", *CELLS[1:]]
    points, found = graded(tmp_path, notebook(cells))
    assert points == set(ASKED), found
    assert failed_in(found) == ["cell 3: ended the kernel"]


def test_calls_are_noted_as_they_are_made(tmp_path):
    letters = [name for name in RIGHT if name.startswith("3.q")]
    cells = [HEAD, BOUNDS, FLATTEN, UNITS,
             "def show(name, answer):\n    print(check(name, answer))",
             '%time check("3.1", shard_bounds)',
             'check(answer=flatten, name="3.2")\ndel flatten',
             'show("3.3", units_of)',
             "\n".join(f'answer = "{RIGHT[name]}"\ncheck("{name}", answer)' for name in letters),
             "pairs = zip(my_answers, my_answers.values())\nfor name, letter in pairs:\n"
             "    check(name, letter)"]
    cells.insert(1, f"my_answers = { {name: RIGHT[name] for name in RIGHT.keys() - letters} }")
    points, found = graded(tmp_path, notebook(cells))
    assert points == set(ASKED) and failed_in(found) == [], found


# ---- a class -------------------------------------------------------------------------------------

FOR_LONG = str(10**6 + os.getpid())  # of this run alone
LEAVES = f"""
import subprocess, shutil
subprocess.Popen(["/bin/sh", "-c", "sleep {FOR_LONG} & sleep {FOR_LONG}"], env={{}},
                 start_new_session=True)
shutil.rmtree(os.getcwd())
os._exit(0)
"""


def test_a_class_is_graded(tmp_path, capsys):
    folder = tmp_path / "class"
    (folder / "bob").mkdir(parents=True)
    half = [HEAD, WRONG, CELLS[CHECK_OF_BOUNDS], "import helper", *CELLS[OF_FLATTEN:5]]
    (folder / "bob" / "03.ipynb").write_text(json.dumps(notebook(half)))
    (folder / "bob" / "helper.py").write_text("")
    (folder / "carol.ipynb").write_text(json.dumps(notebook([*CELLS[:3], LEAVES, *CELLS[3:]])))
    (folder / "dave.ipynb").write_text("{")
    (folder / "erin.py").write_text("\n\n\n".join([HEAD, BOUNDS, "from zero_ref.labs.small import "
                                                   "Stage0"]))
    (folder / "frank").mkdir()
    (folder / "gina.IPYNB").write_text(json.dumps(notebook(CELLS[:3])))
    (folder / "harry.ipynb").symlink_to("gone.ipynb")
    (folder / "ina" / "old.ipynb").mkdir(parents=True)
    (folder / "ina" / "03.ipynb").write_text(json.dumps(notebook(CELLS[:3])))
    (folder / "__MACOSX").mkdir()
    for place in (folder / "__MACOSX", folder, folder / "ina"):
        (place / "._gina.ipynb").write_text("no notebook")
    (folder / "notes.txt").write_text("not an answer")
    (tmp_path / "pages").mkdir()
    (folder / "docs").symlink_to(tmp_path / "pages")
    table, everything = tmp_path / "points.csv", tmp_path / "points.json"
    status = main(["grade", str(folder), "--csv", str(table), "--json", str(everything)])
    shown = capsys.readouterr().out
    assert status == 1, shown
    rows = {row["learner"]: row for row in json.loads(everything.read_text())}
    assert {name: (row["points"], row["of"]) for name, row in rows.items()} == {
        "bob": (1, 8), "carol": (8, 8), "dave": (0, 0), "erin": (1, 8), "frank": (0, 0),
        "gina": (1, 8), "harry": (0, 0), "ina": (1, 8)}
    assert [name for name, row in rows.items() if not row["graded"]] == ["dave", "frank", "harry"]
    assert rows["carol"]["failed"] == ["carol.ipynb, cell 4: ended the kernel"]
    assert re.search(r"bob .* 1/8 .* 3\.1: ", shown), shown
    assert re.search(r"frank .* 0/0 .* frank has no notebook and no my_zero\.py", shown)
    assert re.search(r"harry .* 0/0 .* harry\.ipynb is no file", shown)
    assert re.search(r"dave .* 0/0 .* dave\.ipynb is no notebook", shown)
    assert "5 of 8 were graded. Not, or not in full: dave, frank, harry." in shown
    assert "Left out, as neither notebook nor Python: notes.txt." in shown
    with table.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["learner"], line["exercise"]) for line in lines if line["points"] == "1"] == [
        ("bob", "3.2"), *(("carol", name) for name in ASKED), ("erin", "3.1"), ("gina", "3.1"),
        ("ina", "3.1")]
    assert (folder / "carol.ipynb").exists()
    left = [process for process in psutil.process_iter(["cmdline"])
            if FOR_LONG in (process.info["cmdline"] or ())]
    assert not left


@pytest.mark.parametrize("notebooks", [1, 12])
@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits_and_shows_all_points(notebooks, columns, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    exercises = {f"{n}.{i}": {"points": n % 2, "text": f"{n}.{i}: {'why? ' * 12}so"}
                 for n in range(notebooks) for i in range(10 + n)}
    print_report([{"learner": "barbara.baker", "exercises": exercises, "broken": [], "failed": [],
                   "points": 96, "of": 186, "graded": True}])
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)  # without bold and colours
    assert all(len(line) <= columns for line in shown.splitlines())
    assert {f"{n % 2 * (10 + n)}/{10 + n}" for n in range(notebooks)} <= set(shown.split())
    assert shown.split().count("why?") == 12 and "so" in shown.split()


@pytest.mark.parametrize("arguments, sentence", [
    (["/no/such/file.ipynb"], "there is no /no/such/file.ipynb"),
    ([__file__, "--timeout", "0"], "give a number of seconds above 0"),
    ([__file__, "--timeout", "inf"], "no more than a day's 86,400"),
    ([__file__, "--timeout", "nan"], "give a number of seconds above 0"),
    ([__file__, "--csv", "/no/such/folder/file.csv"], "the folder /no/such/folder does not"),
])
def test_bad_arguments(arguments, sentence, capsys):
    assert main(["grade", *arguments]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_an_empty_folder_is_said(tmp_path, capsys):
    assert main(["grade", str(tmp_path)]) == 2
    assert "nothing to grade" in capsys.readouterr().err
