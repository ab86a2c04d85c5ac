"""Grading: what learners have handed in is run, judged and counted, each for itself.

For each learner there is a process that never runs code of the learner's:

    python -P -m zero_ref.labs.grade FOLDER SECONDS

It gets the files through a pipe, because another learner's code may change what lies in a folder,
and starts those that do run them: kernels, which give the answers (answers.py), and ranks, on which
the answers are judged as `check` judges them. What ranks send back is read as plain data
(plain.py), and what the solutions give was found out before an answer came to them. The process
prints a line of JSON for each thing that it finds, which the caller reads. A key, which it gets
from the caller, signs each line: a notebook may find the pipe and write to it, too. Before it ends,
it ends all that the notebooks have started.
"""

import ctypes
import hmac
import itertools
import json
import os
import pickle
import secrets
import subprocess
import sys
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..ranks import pool, travel
from . import judge, plain
from .answers import LARGEST, NAMES, Answers, cells_of, names_asked, run
from .exercises import EXERCISES
from .keep import PIECES

Files = dict[str, bytes]  # of a learner, by their paths in the learner's folder

TRIES = 3  # answers to one exercise that are judged, from the last one on
LONGEST = 5_000  # characters of a verdict
KINDS = (".py", ".ipynb")
_FIGURES = Path(__file__).parents[2] / "figures"
_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 4, 36
_MARK = "ZERO_REF_GRADING"  # in the environment of all processes of a learner

# ---- the learner's process -----------------------------------------------------------------------


def judged(names: Iterable[str], answers: Answers) -> Iterator[tuple[str, judge.Verdict]]:
    """The verdict on each name that has an answer."""
    pool.read = plain.loads
    names = [name for name in names if answers.get(name)]
    for name in names:  # what the solutions give, before an answer is on these ranks
        for world_size in EXERCISES[name].world_sizes if name in EXERCISES else ():
            judge._of_solution(name, world_size)
    for name in names:
        yield name, _best(name, answers[name])


def _best(name, answers):
    """The best answer counts, but of what could be guessed in a loop, the last one that is given.
    """
    if name not in EXERCISES:
        given = [answer for answer in answers if answer is not None]
        return judge.check(name, given[-1] if given else None)
    latest = [a for i, a in enumerate(answers) if a not in answers[i + 1 :]][-TRIES:]
    tried = []
    for answer in reversed(latest):
        tried.append(judge.check(name, answer))
        if tried[-1]:
            return tried[-1]
    return tried[0]


def _grade(files: Files, folder: Path, seconds: float, say: Callable[..., None]) -> None:
    """A my_zero.py beside notebooks may answer what they ask. Alone, it is asked for all of its
    pieces. folder: where they are written, and run."""
    for file, content in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    if _FIGURES.is_dir():  # cells of the course read what was measured
        (folder.parent / "figures").symlink_to(_FIGURES)
    mine, notebooks = ([file for file in sorted(files) if _answers(file) == kind] for kind in KINDS)
    asked = {name for file in notebooks for name in names_asked(Path(file).name, files[file])}
    if not notebooks:
        asked = {name for names in PIECES.values() for name in names}
    names = [name for name in NAMES if name in asked]
    say(asked=names)
    answers: Answers = defaultdict(list)
    for path in map(Path, (*notebooks, *mine)):
        try:
            given, failed = run(cells_of(path.name, files[str(path)]),
                                (folder / path).parent, seconds)
        except (ValueError, RuntimeError) as error:  # no notebook, or its kernel does not start
            say(broken=str(error))
            continue
        for name, more in given.items():
            answers[name] += more
        for text in failed:
            say(failed=f"{path.name}, {text}")
    for name, verdict in judged(names, answers):
        say(name=name, points=int(verdict.passed), text=verdict.text[:LONGEST])


def _main():
    keep_out_of_reach()
    key, files = pickle.load(sys.stdin.buffer)
    out = open(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    numbers = itertools.count()

    def say(**found: Any) -> None:
        text = json.dumps(found, ensure_ascii=False).encode(errors="replace")
        signed = b"%d %s" % (next(numbers), text)
        # After the end of whatever line somebody else has begun.
        out.write(b"\n%s %s\n" % (_signature(key, signed), signed))
        out.flush()

    if sys.platform == "linux":  # then who leaves its parent, or outlives it, is this one's child
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        _grade(files, Path(sys.argv[1]), float(sys.argv[2]), say)
    except Exception as error:
        say(broken=f"grading failed: {travel.said(error)}")
    finally:
        _end_all(os.getpid())
    say(done=True)


def _end_all(pid: int) -> None:
    """End what a process has started, and what that has."""
    import psutil  # comes with Jupyter's kernel

    for _ in range(50):  # some may have started others meanwhile
        try:
            theirs = psutil.Process(pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        for process in theirs:
            with suppress(psutil.Error):
                process.kill()
        if not psutil.wait_procs(theirs, timeout=0.1)[1] and not theirs:
            return


def keep_out_of_reach() -> None:
    """From now on, other processes of this user can neither read this one's memory nor use its open
    files; root's can. (On Linux: prctl(2).)"""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)


def _signature(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256").hex().encode()


# ---- the class -----------------------------------------------------------------------------------


def handed_in(paths: Iterable[Path]) -> dict[str, Files | Exception]:
    """The files of each learner, with their content, or why there are none: all is read before
    anything runs. Raises ValueError if there is nothing to grade."""
    found: dict[str, Files | Exception] = {}
    for path in paths:
        if not os.path.lexists(path):
            raise ValueError(f"there is no {path}")
        of_path = [path]
        if path.is_dir():
            of_path = sorted(p for p in path.iterdir() if not _is_hidden(p.name)
                             and (p.is_dir() or p.suffix.lower() in KINDS))
        for learner in of_path:
            name = learner.name if learner.is_dir() else learner.stem
            name = name.encode(errors="replace").decode()
            try:
                files: Files | Exception = _files(learner)
            except (OSError, ValueError) as error:
                if learner.is_dir() and learner.is_symlink():  # such as the pages, in lab/
                    continue
                files = error
            found[str(learner) if name in found else name] = files
    if not found:
        raise ValueError("there is nothing to grade: name notebooks, files like my_zero.py, or a "
                         "folder with a file or a folder for each learner")
    return found


def _files(learner):
    if learner.is_dir():
        found = {str(name): path for path in learner.rglob("*") if path.is_file()
                 and not any(map(_is_hidden, (name := path.relative_to(learner)).parts))}
    elif learner.is_file():
        found = {learner.name if learner.suffix.lower() != ".py" else "my_zero.py": learner}
    else:
        raise ValueError(f"{learner.name} is no file")
    if not any(map(_answers, found)):
        raise ValueError(f"{learner.name} " + ("has" if learner.is_dir() else "is") +
                         " no notebook and no my_zero.py")
    files = {}
    for name, path in found.items():
        if _answers(name) or path.stat().st_size <= LARGEST:
            with path.open("rb") as file:
                files[name] = file.read(LARGEST + 1)
        if sum(map(len, files.values())) > 4 * LARGEST:
            raise ValueError(f"{learner.name} has more than {4 * LARGEST:,} bytes")
    return files


def left_out(paths: Iterable[Path]) -> list[str]:
    """What lies among the learners' files and is none."""
    return sorted(p.name for path in paths if path.is_dir() for p in path.iterdir()
                  if not _is_hidden(p.name) and not p.is_dir() and p.suffix.lower() not in KINDS)


def _answers(file: str) -> str | None:
    """The kind of a file that is run; None for what lies beside it."""
    kind = Path(file).suffix.lower()
    return kind if kind == ".ipynb" or Path(file).name == "my_zero.py" else None


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__pycache__", "__MACOSX")  # in the Mac's archives


def grade(learners: dict[str, Files | Exception], seconds: float,
          done: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """A row for each learner: "points" and "of", for each exercise its points and the verdict, what
    "failed" meanwhile, and whether it was "graded" at all. seconds: for each notebook. done: is
    called after each learner."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Each has a kernel and up to eight ranks: too many at once would need much memory.
    with ThreadPoolExecutor(min(cores or 1, 8)) as workers:
        rows = {workers.submit(_row, name, files, seconds): name
                for name, files in learners.items()}
        try:
            for _ in as_completed(rows):
                done()
            return [row.result() for row in rows]
        finally:  # after Ctrl-C, which those that run have got, too
            workers.shutdown(cancel_futures=True)


def _row(name, files, seconds):
    found: list[dict[str, Any]] = ([{"broken": str(files)}, {"done": True}]
                                   if isinstance(files, Exception) else _found_in(files, seconds))
    asked = [name for line in found for name in line.get("asked", [])]
    exercises = {name: {"points": 0, "text": f"{name}: not yet."} for name in asked}
    for line in found:
        if "name" in line:
            exercises[line["name"]] = {"points": line["points"], "text": line["text"]}
    broken = [line["broken"] for line in found if "broken" in line]
    if not any("done" in line for line in found):
        broken.append("grading was ended, because it took too long or by the notebook itself")
    elif not asked and not broken:
        broken.append("no exercise of the course is in it")
    return {"learner": name, "graded": not broken,
            "points": sum(exercise["points"] for exercise in exercises.values()), "of": len(asked),
            "broken": broken, "failed": [line["failed"] for line in found if "failed" in line],
            "exercises": exercises}


def _found_in(files, seconds):
    """Run the learner's process, and return what it has found, all of it or until it was ended."""
    key, notebooks = secrets.token_hex().encode(), sum(map(bool, map(_answers, files)))
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="zero_ref-", ignore_cleanup_errors=True) as temporary:
        command = [sys.executable, "-P", "-m", "zero_ref.labs.grade",
                   str(Path(temporary, "work")), str(seconds)]
        environment = {**os.environ, _MARK: mark, "IPYTHONDIR": str(Path(temporary, "ipython")),
                       "TMPDIR": temporary}  # what those leave there who are killed goes, too
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, env=environment) as process:
            try:
                text, _ = process.communicate(pickle.dumps((key, files)),
                                              60 + notebooks * (seconds + 90))
            except subprocess.TimeoutExpired:
                _end_all(process.pid)
                process.kill()
                text, _ = process.communicate()
            finally:
                _end_marked(mark)
    return [*_signed(text, key)]


def _signed(text: bytes, key: bytes) -> Iterator[dict[str, Any]]:
    """What the process has said itself, in its order."""
    last = -1
    for line in text.split(b"\n"):
        signature, _, signed = line.partition(b" ")
        if hmac.compare_digest(signature, _signature(key, signed)):
            number, _, found = signed.partition(b" ")
            if int(number) > last:  # not once more
                last = int(number)
                yield json.loads(found)


def _end_marked(mark):
    """End what a notebook has left that has ended the learner's process."""
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(_MARK) == mark:
                process.kill()


def wrong_first(row: dict[str, Any]) -> str:
    """What went wrong first, in a line."""
    if said := [*row["broken"], *row["failed"] * (row["points"] < row["of"])]:
        return said[0]
    for name, exercise in row["exercises"].items():
        if not exercise["points"]:
            last = exercise["text"].strip().splitlines()[-1]  # the hint, if there is one
            return f"{name}: " + last.removeprefix(f"{name}: ").removeprefix("Hint: ").strip()
    return ""


def notebooks(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The numbers of the notebooks that somebody has handed in."""
    return sorted({name.split(".")[0] for row in rows for name in row["exercises"]}, key=int)


if __name__ == "__main__":
    _main()
