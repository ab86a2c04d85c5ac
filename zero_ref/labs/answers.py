"""The answers in a notebook: its cells are run, and the kernel is asked for what they check.

An exercise is known by the name in the call alone, `check("4.2", Stage1)`. No code of the learner's
runs in this process, only in the kernel, which sends texts, among them the answers as pickled
bytes. Nobody but a rank reads these.
"""

import ast
import base64
import itertools
import json
import math
import os
import pickle
import re
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle

from ..ranks import travel
from . import judge
from .exercises import EXERCISES
from .keep import PIECES
from .ordering import ORDERINGS
from .quiz import QUESTIONS

NAMES = [*EXERCISES, *ORDERINGS, *QUESTIONS]
LARGEST = 50_000_000  # bytes of a file that is read


@dataclass(frozen=True, repr=False)
class Packed:
    """An answer: bytes here, and on a rank what they stand for."""

    pickled: bytes

    def __reduce__(self):
        return pickle.loads, (self.pickled,)

    def __repr__(self):
        return "an object of the notebook"

    def __call__(self, *_: Any) -> None:  # `check` wants something that can be called
        raise TypeError("an answer is called on ranks only")


Answers = dict[str, list[Any]]  # by name, in the order of the calls: Packed, or plain data

# ---- what is in a file ---------------------------------------------------------------------------


def cells_of(name: str, content: bytes) -> list[str]:
    """The code cells of a notebook, of which only kind and source count. Of a my_zero.py: the file,
    and a check of each piece that it defines. Raises ValueError if it is neither."""
    try:
        if len(content) > LARGEST:
            raise ValueError(f"larger than {LARGEST:,} bytes")
        if name.endswith(".py"):
            return _with_checks(content.decode("utf-8-sig"))
        cells = json.loads(content).get("cells")
        if cells is None:
            raise ValueError("it has no cells, as those of format 4 have")
        sources = [cell.get("source") for cell in cells
                   if isinstance(cell, dict) and cell.get("cell_type") == "code"]
        texts = ["".join(map(str, source)) if isinstance(source, list) else str(source or "")
                 for source in sources]
        return [text.encode(errors="replace").decode() for text in texts]  # no half characters
    except (ValueError, TypeError, AttributeError, SyntaxError, RecursionError) as error:
        kind = "Python" if name.endswith(".py") else "notebook"
        raise ValueError(f"{name} is no {kind}: {travel.said(error)}") from None


def _with_checks(text):
    defined = {getattr(node, "name", None) for node in ast.parse(text).body}
    return ["__file__ = 'my_zero.py'", text, "from zero_ref.labs import check",
            *(f'check("{name}", {piece})' for piece, names in PIECES.items() if piece in defined
              for name in names)]


def names_asked(file: str, content: bytes) -> list[str]:
    """What the course's notebook of the same number asks for. The number is that of most of the
    names in it, or else the file's."""
    text = content.decode(errors="replace")
    found = [name.split(".")[0] for name in NAMES
             if re.search(rf"""["']{re.escape(name)}\\?["']""", text)]
    found = found or re.findall(r"^0*(\d+)_", file)
    number = Counter(found).most_common(1)[0][0] if found else None
    return [name for name in NAMES if name.split(".")[0] == number]


def checks_in(source: str) -> list[tuple[str, str]]:
    """For each check that a cell calls, two expressions for the kernel: what is called, and a list
    of (name, answer). If a loop is around the call, it has a pair for each round."""
    from IPython.core.inputtransformer2 import TransformerManager

    try:
        return list(_checks(ast.parse(TransformerManager().transform_cell(source)), []))
    except Exception:  # the kernel, too, will say that this is no Python
        return []


def _checks(node, loops):
    if isinstance(node, ast.For):
        loops = [*loops, ast.comprehension(node.target, node.iter, [], 0)]
    loops = [*loops, *getattr(node, "generators", [])]
    if isinstance(node, ast.Call) and re.fullmatch(r"([\w.]+\.)?check", ast.unparse(node.func)):
        pair = ast.Tuple([*node.args, *(keyword.value for keyword in node.keywords)])
        pairs = ast.ListComp(pair, loops) if loops else ast.List([pair])
        yield ast.unparse(node.func), ast.unparse(pairs)
    for child in ast.iter_child_nodes(node):
        yield from _checks(child, loops)


# ---- what the kernel says ------------------------------------------------------------------------

LATEST = 10  # calls of `check` in a cell that are told, of each name
_calls: dict[str, deque[str]] = {}  # in the kernel: of the cell that runs, by name
_told_of: set[str] = set()  # the names in it, once they are told
_here = ""  # the notebook's folder
_check: Any = None  # the one that notes its calls
_KIND = "application/x-zero-ref"  # of an output that tells, whatever a cell has made of sys.stdout


def begin() -> None:
    """Called in the kernel: `check` answers at once, since what it would say is found out later, on
    other ranks. And quit() ends nothing."""
    from IPython import get_ipython

    global _here, _check
    _here, _check = os.path.join(os.getcwd(), ""), judge.check

    def noted(name: str, answer: Any) -> judge.Verdict:
        _calls.setdefault(str(name), deque(maxlen=LATEST)).append(_line(name, answer))
        return judge.Verdict(True, f"{name} is judged afterwards.")

    judge._check = noted
    get_ipython().ask_exit = lambda: None  # type: ignore[no-untyped-call]


def tell() -> None:
    """Called in the kernel, after a cell: show what it has called `check` with."""
    _told_of.clear()
    _told_of.update(_calls)
    _show(line for lines in _calls.values() for line in lines)
    _calls.clear()


def tell_also(called: Any, pairs: Callable[[], Iterable[tuple[str, Any]]]) -> None:
    """The same, of calls that something else has got than our `check`, or none, because the cell
    raised before."""
    if called is not _check:
        _show(_line(name, answer) for name, answer in pairs() if str(name) not in _told_of)


def _show(lines):
    from IPython.display import publish_display_data

    publish_display_data({_KIND: "\n".join(lines)})


def _line(name: str, answer: Any) -> str:
    """An answer as JSON, pickled unless it is plain."""
    try:
        return json.dumps({"name": str(name), "plain": answer})
    except (TypeError, ValueError):
        for module in [*sys.modules.values()]:  # ranks of the judge have no files beside theirs
            file = getattr(module, "__file__", None) or ""
            if file.startswith(_here) and "site-packages" not in file:
                cloudpickle.register_pickle_by_value(module)
        with judge._as_it_is_now(answer):
            pickled = base64.b64encode(travel.dumps(answer)).decode()
        return json.dumps({"name": str(name), "pickled": pickled})


def _told(text: str) -> Iterator[tuple[str, Any]]:
    """Read what the kernel tells, and skip what is no answer."""
    for line in text.splitlines():
        try:
            found = json.loads(line)
            answer = (Packed(base64.b64decode(found["pickled"])) if "pickled" in found else
                      found["plain"])
            yield str(found["name"]).strip(), answer
        except (ValueError, TypeError, KeyError, RecursionError):
            continue


# ---- a notebook is run ---------------------------------------------------------------------------

GRACE = 2  # seconds for a cell that was interrupted, until its kernel is killed


def run(cells: list[str], folder: Path, seconds: float) -> tuple[Answers, list[str]]:
    """Run a notebook's cells. Returns the answers, and which cells failed.

    A cell that takes a quarter of the time is interrupted, and the next one runs. If a cell ends
    the kernel, the others run in a new one. What has missed a name runs once more at the end: cells
    may have changed places.
    """
    told: dict[int, list[tuple[str, Any]]] = {}  # by cell: one that runs once more answers anew
    failed: dict[int, str] = {}
    left, end = dict(enumerate(cells, 1)), time.monotonic() + seconds
    while _run(left, folder, seconds, end, told, failed) and time.monotonic() < end:
        left = {number: source for number, source in left.items()
                if not failed.get(number, "").startswith(("ended", "was interrupted"))}
    answers: Answers = defaultdict(list)
    for of_cell in told.values():
        for name, answer in of_cell:
            answers[name].append(answer)
    return answers, [f"cell {number}: {error}" for number, error in sorted(failed.items()) if error]


def _run(cells, folder, seconds, end, told, failed):
    """Run the cells in a kernel of their own. Returns the number of the one that has ended it."""
    from nbclient import NotebookClient
    from nbclient.exceptions import DeadKernelError
    from nbformat.v4 import new_code_cell, new_notebook

    from .kernels import ForkedKernel

    client: Any = NotebookClient(new_notebook(), kernel_name="python3", allow_errors=True,
                                 interrupt_on_timeout=True, shutdown_kernel="immediate")
    limit = math.ceil(seconds / 4)

    def execute(source: str) -> tuple[str, str]:
        """What a cell tells, and its error."""
        client.nb.cells.append(new_code_cell(source))
        start = time.monotonic()
        patience = threading.Timer(max(min(limit + GRACE, end - start), 0),
                                   client.km.provisioner.process.kill)
        patience.start()
        try:
            outputs = client.execute_cell(client.nb.cells[-1], len(client.nb.cells) - 1).outputs
        except DeadKernelError:
            now = time.monotonic()
            raise DeadKernelError(
                f"was interrupted after {limit} s, and went on" if now >= start + limit + GRACE else
                f"was ended: the notebook has taken {seconds:g} s" if now >= end else
                "ended the kernel") from None
        finally:
            patience.cancel()
        errors = [f"{out.ename}: {out.evalue}" for out in outputs if out.output_type == "error"]
        if errors and time.monotonic() - start >= limit:
            errors = [f"was interrupted after {limit} s"]
        return ("".join(out.data[_KIND] for out in outputs if _KIND in out.get("data", ())),
                errors[0].splitlines()[0][:200].strip(" :") if errors else "")

    this = f"__import__({__name__!r}, fromlist=['tell'])"

    def run_cell(number: int) -> None:
        """Run a cell, and ask for what it checks."""
        _, failed[number] = execute(cells[number])
        told[number] = [*_told(execute(f"{this}.tell()")[0])]
        for called, pairs in checks_in(cells[number]):
            called = "None" if failed[number] else called
            told[number] += _told(execute(f"{this}.tell_also({called}, lambda: {pairs})")[0])

    manager = client.create_kernel_manager()
    manager.provisioner = ForkedKernel(kernel_spec=manager.kernel_spec, parent=manager)
    folder.mkdir(parents=True, exist_ok=True)  # an earlier kernel may have deleted it
    with client.setup_kernel(cwd=str(folder)):
        execute(f"{this}.begin()")
        client.timeout_func = lambda cell: limit
        again = (number for number in cells if failed[number].startswith("NameError"))
        for number in itertools.chain(cells, again):
            try:
                run_cell(number)
            except DeadKernelError as error:
                failed[number] = str(error)
                return number
            except Exception as error:  # the kernel says what no kernel says
                failed[number] = f"ended in {travel.said(error)}"
                return number
    return None
