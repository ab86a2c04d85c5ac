"""Grading: what learners have handed in is run, judged and counted, each for itself.

For each learner there is a process that never runs code of the learner's:

    python -P -m zero_ref.labs.grade FOLDER SECONDS

It starts those that do: kernels, which run the notebooks and give the answers (answers.py), and
ranks, on which the answers are judged as `check` judges them. What ranks send back is read as plain
data (plain.py), and what the solutions give was found out before an answer came to them. The
process prints a line of JSON for each thing that it finds, which the caller reads. A key, which it
gets from the caller, signs each line: a notebook may find the pipe and write to it, too.
"""

import ctypes
import hmac
import itertools
import json
import os
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

TRIES = 3  # answers to one exercise that are judged, from the last one on
LONGEST = 5_000  # characters of a verdict
KINDS = (".ipynb", ".py")
_PR_SET_DUMPABLE = 4
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


def _grade(folder: Path, seconds: float, say: Callable[..., None]) -> None:
    """A my_zero.py beside notebooks may answer what they ask. Alone, it is asked for all of its
    pieces."""
    found = [path for kind in ("my_zero.py", "*.ipynb") for path in sorted(folder.rglob(kind))
             if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    asked = {name for path in found if path.suffix == ".ipynb" for name in names_asked(path)}
    if all(path.suffix == ".py" for path in found):
        asked = {name for names in PIECES.values() for name in names}
    names = [name for name in NAMES if name in asked]
    say(asked=names)
    answers: Answers = defaultdict(list)
    for path in found:
        try:
            given, failed = run(cells_of(path), path.parent, seconds)
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
    key = sys.stdin.buffer.readline().strip()
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

    try:
        _grade(Path(sys.argv[1]), float(sys.argv[2]), say)
    except Exception as error:
        say(broken=f"grading failed: {travel.said(error)}")
    say(done=True)


def keep_out_of_reach() -> None:
    """From now on, other processes of this user can neither read this one's memory nor use its open
    files; root's can. (On Linux: prctl(2).)"""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)


def _signature(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256").hex().encode()


# ---- the class -----------------------------------------------------------------------------------


def handed_in(paths: Iterable[Path]) -> dict[str, dict[str, bytes]]:
    """The files of each learner, with their content: all of it is read before anything runs. Raises
    ValueError if there is nothing to grade."""
    found: dict[str, dict[str, bytes]] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"there is no {path}")
        of_path = [path]
        if path.is_dir():
            of_path = sorted(p for p in path.iterdir() if p.is_dir() or p.suffix in KINDS)
        for learner in of_path:
            if files := _files(learner):
                name = learner.name if learner.is_dir() else learner.stem
                found[str(learner) if name in found else name] = files
    if not found:
        raise ValueError("there is nothing to grade: name notebooks, files like my_zero.py, or a "
                         "folder with a file or a folder for each learner")
    return found


def _files(learner):
    if learner.is_file():
        name = learner.name if learner.suffix == ".ipynb" else "my_zero.py"
        return {name: learner.read_bytes()} if learner.suffix in KINDS else {}
    files = {str(path.relative_to(learner)): path.read_bytes() for path in learner.rglob("*")
             if path.is_file() and path.stat().st_size <= LARGEST}
    wanted = any(name.endswith(".ipynb") or name.endswith("my_zero.py") for name in files)
    return files if wanted and not learner.name.startswith(".") else {}


def grade(learners: dict[str, dict[str, bytes]], seconds: float,
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
    found = _found_in(files, seconds)
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
    key = secrets.token_hex().encode()
    mark, notebooks = uuid.uuid4().hex, sum(name.endswith(KINDS) for name in files)
    with tempfile.TemporaryDirectory(prefix="zero_ref-", ignore_cleanup_errors=True) as temporary:
        folder, own = Path(temporary, "work"), Path(temporary, "ipython")
        for file, content in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        command = [sys.executable, "-P", "-m", "zero_ref.labs.grade", str(folder), str(seconds)]
        environment = {**os.environ, _MARK: mark, "IPYTHONDIR": str(own)}
        try:
            text = subprocess.run(command, input=key + b"\n", stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, env=environment,
                                  timeout=60 + notebooks * (seconds + 90)).stdout
        except subprocess.TimeoutExpired as error:
            text = error.stdout or b""
        finally:
            _end_all(mark)
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


def _end_all(mark):
    """End what a notebook has started and left."""
    import psutil  # comes with Jupyter's kernel

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
